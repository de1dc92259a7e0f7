"""bench.py: what it refuses, in one line that says what is wrong. Its numbers need a GPU."""

import copy

import pytest
import torch
from helpers import run_script

from model import DiTConfig
from timing import RandomStep


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["what"], "invalid choice: 'what'"),
        (["step", "--batch=some"], "--batch: invalid int value"),
        (["sample", "--batch=0"], "--batch must be at least 1"),
        (["step", "--micro_batches=0"], "--micro_batches must be at least 1, not 0"),
        (["trainer", "--input_size=31"], "31 is not divisible"),
        (["step", "--modes=compiled,swift"], "no mode 'swift': there are graph, one_stream, eager"),
        (["sample", "--size=XXL/2"], "invalid choice: 'XXL/2'"),
        (["theory"], "attention"),
        ([], "required: what"),
    ],
)
def test_bench_refuses(folder, arguments, word):
    assert word in run_script("bench.py", *arguments)


def test_bench_under_half_of_torchrun(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("RANK", "x")
    assert "RANK must be a whole number" in run_script("bench.py", "step")


def test_a_step_that_is_timed_has_micro_batches():
    """Their gradient is the mean of each one's alone, and the weights are updated once."""
    step = RandomStep(DiTConfig.named("tiny", input_size=4), 2, micro_batches=3, device="cpu")
    step(0)
    loss = copy.deepcopy(step.loss)
    wanted = [torch.zeros_like(p) for p in step.step.weights]
    for k in (3, 4, 5):  # those of step 1
        x0 = step.images[k]
        value, _ = loss(x0, step.labels[k], *loss.draw(x0, k))
        weights = [p for p in loss.model.parameters() if p.requires_grad]
        for total, grad in zip(wanted, torch.autograd.grad(value, weights), strict=True):
            total += grad / 3
    step(1)
    for p, grad in zip(step.step.weights, wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-6 * grad.abs().max().item(), rtol=1e-4)
    (adamw,) = step.step.optimizers
    assert all(state["step"] == 2 for state in adamw.state.values())
