"""muon.py: its steps against the formula by singular values, and against torch.optim.Muon."""

import functools

import pytest
import torch
from helpers import F64, close, gpu, randn, random_model, rel

import muon
from device import Graph
from muon import COEFFICIENTS, Muon, matrices_of_blocks, orthogonalize

SHAPES = [(6, 4), (4, 6), (5, 5), (6, 4)]  # tall, wide, square; two of one shape


def by_singular_values(matrix):
    """What the iterations do to a matrix: a polynomial of each singular value."""
    a, b, c = COEFFICIENTS
    U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return U @ torch.diag(values) @ Vh


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize(shape):
    matrices = randn(3, *shape)
    found = orthogonalize(matrices, F64)
    for got, matrix in zip(found, matrices, strict=True):
        close(got, by_singular_values(matrix), 1e-10)
    values = torch.linalg.svdvals(orthogonalize(randn(8, 64, 192)).double())
    assert values.median() > 0.6
    assert values.max() < 1.25  # in bfloat16
    assert not orthogonalize(torch.zeros(1, *shape)).any()


def parameters_with_gradients(dtype=F64):
    parameters = []
    for i, shape in enumerate(SHAPES):
        p = torch.nn.Parameter(randn(*shape, seed=i, dtype=dtype))
        p.grad = torch.empty_like(p)
        parameters.append(p)
    return parameters


def set_gradients(parameters, step):
    for i, p in enumerate(parameters):
        p.grad.copy_(randn(*p.shape, seed=100 * step + i, dtype=p.dtype))


def test_steps_against_the_formula(monkeypatch):
    """Three steps in float64 with another learning rate each, and with weight decay."""
    exact = functools.partial(orthogonalize, dtype=F64)
    monkeypatch.setattr(muon, "orthogonalize", exact)
    parameters = parameters_with_gradients()
    expected = [p.detach().clone() for p in parameters]
    momenta = [torch.zeros_like(p) for p in expected]
    rate = torch.tensor(0.0, dtype=F64)
    optimizer = Muon(parameters, rate, momentum=0.9, weight_decay=0.5)
    for step, lr in enumerate((0.1, 0.02, 0.05)):
        rate.fill_(lr)
        set_gradients(parameters, step)
        optimizer.step()
        for i, p in enumerate(parameters):
            momenta[i] = 0.9 * momenta[i] + 0.1 * p.grad
            direction = by_singular_values(0.9 * momenta[i] + 0.1 * p.grad)
            scale = 0.2 * max(p.shape) ** 0.5
            expected[i] = expected[i] - lr * 0.5 * expected[i] - lr * scale * direction
            close(p.detach(), expected[i], 1e-10)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_steps_against_pytorch():
    """Up to the rounding of bfloat16. A number and a tensor as learning rate do the same."""
    ours, again, theirs = (parameters_with_gradients(torch.float32) for _ in range(3))
    start = [p.detach().clone() for p in ours]
    options = dict(momentum=0.95, weight_decay=0.01)
    optimizers = [
        Muon(ours, 0.02, **options),
        Muon(again, torch.tensor(0.02), **options),
        torch.optim.Muon(theirs, 0.02, adjust_lr_fn="match_rms_adamw", **options),
    ]
    for step in range(4):
        for parameters, optimizer in zip((ours, again, theirs), optimizers, strict=True):
            set_gradients(parameters, step)
            optimizer.step()
    for a, b, c, before in zip(ours, again, theirs, start, strict=True):
        assert torch.equal(a, b)
        assert rel(a - before, c - before) < 0.02
    for a, c in zip(ours, theirs, strict=True):
        momentum = optimizers[0].state[a]["momentum_buffer"]
        close(momentum, optimizers[2].state[c]["momentum_buffer"], 1e-6)


def test_whose_matrices():
    """The five linear maps of each block, and no bias, norm, embedding or final layer."""
    net = random_model(depth=2)
    names = []
    for i in range(2):
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            names.append(f"blocks.{i}.{name}.weight")
    assert sorted(matrices_of_blocks(dict(net.named_parameters()))) == sorted(names)


@gpu
def test_gpu_muon_in_a_graph():
    """Steps of a recorded graph are the steps themselves, with a learning rate that changes."""
    found = []
    for recorded in (False, True):
        parameters = []
        for p in parameters_with_gradients(torch.float32):
            parameters.append(torch.nn.Parameter(p.detach().cuda()))
        for p in parameters:
            p.grad = torch.zeros_like(p)
        rate = torch.tensor(0.0, device="cuda")
        optimizer = Muon(parameters, rate, weight_decay=0.1)
        step_once = optimizer.step
        for step, lr in enumerate((0.1, 0.02, 0.05, 0.0)):
            rate.fill_(lr)
            set_gradients(parameters, step)
            step_once()
            if recorded and step == 0:
                step_once = Graph(optimizer.step, warm_ups=0)
        found.append([p.detach().cpu() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
