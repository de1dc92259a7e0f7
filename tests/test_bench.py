"""bench.py: what it refuses, and what it times. Its numbers need a GPU."""

import copy

import pytest
import torch
from helpers import run_script

import bench
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


def test_a_step_of_micro_batches(monkeypatch):
    """Its gradient is the mean of its micro-batches' gradients, and weights are updated once."""
    step = RandomStep(DiTConfig.named("tiny", input_size=4), 2, micro_batches=3, device="cpu")
    assert step.images.shape == (64, 2, 4, 4, 4)
    assert step.images.std().item() == pytest.approx(2**0.5, rel=0.05)
    step(0)
    loss = copy.deepcopy(step.loss)
    wanted = [torch.zeros_like(p) for p in step.step.weights]
    for k in (3, 4, 5):  # those of step 1
        x0 = step.images[k]
        value, _ = loss(x0, step.labels[k], *loss.draw(x0, k))
        weights = [p for p in loss.model.parameters() if p.requires_grad]
        for total, grad in zip(wanted, torch.autograd.grad(value, weights), strict=True):
            total += grad / 3
    flags = []
    plain = step.step.gradients
    monkeypatch.setattr(step.step, "gradients", lambda *a, **k: flags.append(k) or plain(*a, **k))
    step(1)
    assert [k["is_first"] for k in flags] == [True, False, False]
    assert [k["is_last"] for k in flags] == [False, False, True]
    for p, grad in zip(step.step.weights, wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-6 * grad.abs().max().item(), rtol=1e-4)
    (adamw,) = step.step.optimizers
    assert [adamw.state[p]["step"].item() for p in step.step.weights] == [2] * len(wanted)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_step_that_is_not_finite_changes_nothing(part):
    """In any of its micro-batches."""
    step = RandomStep(DiTConfig.named("tiny", input_size=4), 2, micro_batches=3, device="cpu")
    step.images[part] = torch.nan
    before = [p.detach().clone() for p in step.step.weights]
    step(0)
    assert all(torch.equal(p, old) for p, old in zip(step.step.weights, before, strict=True))


def test_the_table_of_steps(monkeypatch, capsys):
    """Images, TFLOP and bytes are those of all micro-batches, the time is the slowest rank's."""
    given = []
    tuned = []

    def measure_step(config, batch, micro_batches, options):
        given.append((batch, micro_batches))
        tuned.append((options, bench.cublas.TUNED))
        kinds = dict.fromkeys([*bench.KERNELS, bench.OTHER], 0.0)
        return 500.0, 2e9, 1.0, {**kinds, "fused": 20.0, "AdamW": 10.0}

    for name, value in dict(
        find_device=lambda name: torch.device("cpu"),
        measure_step=measure_step,
        product_rate=lambda: 100.0,
        memory_rate=lambda: 1e12,
        from_all_ranks=lambda ms: [ms, 800.0],
    ).items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(bench.cublas, "TUNED", True)
    lines = {}
    for micro_batches in (1, 4):
        bench.step_table("tiny", 32, 16, micro_batches, ["one_stream"])
        said = capsys.readouterr().out.splitlines()
        lines[micro_batches] = {line.split("|")[0].strip(): line for line in said}
        ms, images, *_ = lines[micro_batches]["one_stream"].split("|")[1].split()
        assert (float(ms), int(images)) == (800.0, micro_batches * 20)
    assert given == [(16, 1), (16, 4)]
    config = bench.network_config("tiny", 32)
    assert bench.forward_tflop(config, 64) == pytest.approx(4 * bench.forward_tflop(config, 16))
    one, four = (bench.bytes_of_step(config, 16, n) for n in (1, 4))
    assert four == {"fused": 4 * one["fused"], "AdamW": one["AdamW"]}
    assert f"{four['fused'] / 1e9:.1f} GB" in lines[4]["fused"]
    assert any("batch 16 a GPU, 4 times a step; " in line for line in lines[4].values())
    tuned.clear()
    bench.step_table("tiny", 32, 16, 1, ["graph", "untuned", "one_stream"])
    assert tuned == [({}, True), ({}, False), (dict(two_streams=False), True)]
    assert bench.MODES["untuned"][0] == dict(tuned=False)
    monkeypatch.setattr(bench.cublas, "TUNED", False)  # as its line may say
    tuned.clear()
    bench.step_table("tiny", 32, 16, 1, ["graph", "untuned"])
    assert tuned == [({}, False), ({}, False)]
