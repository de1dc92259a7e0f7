"""one_pass.py beside its formulas in float64 and beside torch.optim.AdamW."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import gpu, interpreted_in, rel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import one_pass
from device import Graph

pytest.importorskip("triton")

SHAPES = [(7, 5), (33,), (64, 40), (1,), (3, 1, 2, 2)]
LR, BETAS, EPS, WEIGHT_DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1
DECAYS = (0.99, 0.999)


def copies_of(tensors):
    """What one_pass.step takes as copy_of, for all of these tensors but the second."""
    copies = {id(t): torch.zeros_like(t, dtype=torch.bfloat16) for t in tensors}
    del copies[id(tensors[1])]
    return copies


def check_copies(copy_of, tensors):
    """Copies are the nearest numbers in bfloat16. (Triton's interpreter rounds towards 0.)"""
    for t in tensors:
        copy = copy_of.get(id(t))
        if copy is None:
            continue
        if t.is_cuda:
            assert torch.equal(copy, t.detach().bfloat16())
        else:
            assert (copy.float() - t.detach()).abs().max() <= 2**-7 * t.detach().abs().max()


def make(device="cpu"):
    """(weights, optimizer, averages), the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(device) for shape in SHAPES]
    weights = [t.clone().requires_grad_() for t in start]
    lr = torch.tensor(LR, device=device)
    capturable = device == "cuda"
    optimizer = torch.optim.AdamW(
        weights, lr, BETAS, EPS, WEIGHT_DECAY, capturable=capturable, foreach=capturable
    )
    averages = [([t.clone() for t in start], decay) for decay in DECAYS]
    return weights, optimizer, averages


def gradients(n, device="cpu"):
    generator = torch.Generator().manual_seed(n + 1)
    return [torch.randn(shape, generator=generator).to(device) for shape in SHAPES]


def test_in_the_interpreter():
    interpreted_in("test_one_pass", "matches_the_formulas")


def matches_the_formulas():
    """20 steps beside the formulas of one_pass.py in float64, with a learning rate that changes.

    One more weight never has a gradient.
    """
    weights, optimizer, averages = make()
    unused = torch.ones(3, requires_grad=True)
    optimizer.param_groups[0]["params"].append(unused)
    for average, _ in averages:
        average.append(torch.ones(3))
    wide = [p.detach().double() for p in weights]
    m = [torch.zeros_like(p) for p in wide]
    v = [torch.zeros_like(p) for p in wide]
    wide_averages = [copy.deepcopy(wide) for _ in DECAYS]
    beta1, beta2 = BETAS
    tensors = [*weights, *averages[0][0][:-1], *averages[1][0][:-1]]
    copies = copies_of(tensors)
    for n in range(1, 21):
        lr = LR / n
        optimizer.param_groups[0]["lr"].fill_(lr)
        for i, g in enumerate(gradients(n)):
            weights[i].grad = g
            g = g.double()
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            size = (v[i] / (1 - beta2**n)).sqrt() + EPS
            wide[i] = (1 - lr * WEIGHT_DECAY) * wide[i] - lr / (1 - beta1**n) * m[i] / size
            for average, decay in zip(wide_averages, DECAYS, strict=True):
                average[i] = decay * average[i] + (1 - decay) * wide[i]
        one_pass.step(optimizer, averages, copies)
    check_copies(copies, tensors)
    assert (unused == 1).all() and not optimizer.state[unused]
    for i, p in enumerate(weights):
        state = optimizer.state[p]
        assert state["step"].item() == 20
        assert rel(p, wide[i]) < 1e-6
        assert rel(state["exp_avg"], m[i]) < 1e-6
        assert rel(state["exp_avg_sq"], v[i]) < 1e-6
        for (average, _), wanted in zip(averages, wide_averages, strict=True):
            assert rel(average[i], wanted[i]) < 1e-6


def test_a_weight_that_joins_late():
    interpreted_in("test_one_pass", "counts_each_weight_on_its_own")


def counts_each_weight_on_its_own():
    """Beside torch.optim.AdamW, where one weight has its first gradient in the sixth step."""
    weights, optimizer, averages = make()
    copies, reference, _ = make()
    for n in range(10):
        for i, g in enumerate(gradients(n)):
            late = i == 1 and n < 5
            weights[i].grad = None if late else g
            copies[i].grad = None if late else g.clone()
        one_pass.step(optimizer, averages)
        reference.step()
    for p, q in zip(weights, copies, strict=True):
        assert rel(p, q) < 1e-6
        assert optimizer.state[p]["step"] == reference.state[q]["step"]


def test_parts_of_weights():
    interpreted_in("test_one_pass", "updates_parts_of_weights")


def updates_parts_of_weights():
    """Weights, gradients and averages that are DTensors, as FSDP2 has them, beside the same
    numbers as plain tensors. One part is empty: a rank has none of a weight of few rows."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def divided(t):
            return distribute_tensor(t, mesh, [Shard(0)])

        runs = []
        for make_part in (torch.clone, divided):
            start = [make_part(t) for t in (*gradients(0), torch.empty(0, 5))]
            weights = [t.clone().requires_grad_() for t in start]
            optimizer = torch.optim.AdamW(weights, LR, BETAS, EPS, WEIGHT_DECAY)
            averages = [([t.clone() for t in start], decay) for decay in DECAYS]
            for n in range(3):
                for p, g in zip(weights, (*gradients(n), torch.empty(0, 5)), strict=True):
                    p.grad = make_part(g)
                one_pass.step(optimizer, averages)
            moments = [t for p in weights for t in optimizer.state[p].values()]
            runs.append([*weights, *moments, *averages[0][0], *averages[1][0]])
        for whole, part in zip(*runs, strict=True):
            assert isinstance(part, DTensor) == (whole.ndim > 0)
            assert torch.equal(one_pass.local(part), whole)
    finally:
        dist.destroy_process_group()


def test_wrong_optimizer():
    weights, _, averages = make()
    with pytest.raises(ValueError, match="wants AdamW, not Adam$"):
        one_pass.step(torch.optim.Adam(weights), averages)


def test_wrong_tensors():
    weights, optimizer, averages = make()
    for p, g in zip(weights, gradients(0), strict=True):
        p.grad = g
    averages[1][0][2] = averages[1][0][2].T.contiguous().T
    with pytest.raises(ValueError, match="contiguous and float32"):
        one_pass.step(optimizer, averages)
    assert all(optimizer.state[p]["step"] == 0 for p in weights)
    averages[1][0][2] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"a weight \(64, 40\) .* average \(3,\)"):
        one_pass.step(optimizer, averages)
    averages[1][0][2] = torch.zeros(64, 40)
    for wrong in (torch.zeros(64, 40), torch.zeros(64, 39).bfloat16()):
        with pytest.raises(ValueError, match=r"a copy of a weight \(64, 40\) must be bfloat16"):
            one_pass.step(optimizer, averages, {id(weights[2]): wrong})
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="AdamW without maximize"):
        one_pass.step(optimizer, averages)
    optimizer.param_groups[0]["maximize"] = False
    averages[1][0].pop()
    with pytest.raises(ValueError, match="has 5 weights, the averages 5 and 4"):
        one_pass.step(optimizer, averages)
    with pytest.raises(ValueError, match="two averages, not 1"):
        one_pass.step(optimizer, averages[:1])
    optimizer.add_param_group(dict(params=[torch.ones(1)]))
    with pytest.raises(ValueError, match="one group"):
        one_pass.step(optimizer, averages)


@gpu
def test_gpu_matches_torch():
    """In a CUDA graph, beside torch.optim.AdamW and torch's averages, and with the same state."""
    weights, optimizer, averages = make("cuda")
    for p in weights:
        p.grad = torch.zeros_like(p)
    copies, reference, reference_averages = make("cuda")
    tensors = [*weights, *averages[0][0]]
    copy_of = copies_of(tensors)
    graph = None
    for n in range(20):
        optimizer.param_groups[0]["lr"].fill_(LR / (n + 1))
        reference.param_groups[0]["lr"].fill_(LR / (n + 1))
        for p, q, g in zip(weights, copies, gradients(n, "cuda"), strict=True):
            p.grad.copy_(g)
            q.grad = g
        if graph:
            graph()
        else:
            one_pass.step(optimizer, averages, copy_of)
            graph = Graph(lambda: one_pass.step(optimizer, averages, copy_of), warm_ups=0)
        reference.step()
        with torch.no_grad():
            for average, decay in reference_averages:
                torch._foreach_lerp_(average, copies, 1 - decay)
    check_copies(copy_of, tensors)
    for i, (p, q) in enumerate(zip(weights, copies, strict=True)):
        assert rel(p, q) < 1e-6
        for key, t in reference.state[q].items():
            assert rel(optimizer.state[p][key], t) < 1e-6
        for (average, _), (wanted, _) in zip(averages, reference_averages, strict=True):
            assert rel(average[i], wanted[i]) < 1e-6
