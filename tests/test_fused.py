"""
The kernels of fused.py, in Triton's interpreter, against float64; and compiled without a GPU.

Functions without "test_" in front run in a process of their own, where the interpreter is on.
"""

import copy

import pytest
import torch
from helpers import compiled_for_gpu, gpu, interpreted_in, stack_of
from torch import nn
from torch.nn import functional

import dual
import fused
from dual import Dual
from loss import TrainingLoss, backward
from model import Block, DiT, DiTConfig

pytest.importorskip("triton")


@pytest.mark.parametrize("name", ["kernels_match", "network_matches"])
def test_in_the_interpreter(name):
    interpreted_in("test_fused", name)


def kernels_match():
    """In one process, because starting one takes seconds."""
    add_norm_matches()
    gelu_matches()
    qk_norm_matches()
    column_sums_match()
    low_parts_add_up()
    odd_residuals_match()
    other_dtypes_match()


def error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def leaves(*shapes):
    """Random float64 tensors that want gradients, and the same in float32. None stays None."""
    wide = []
    for shape in shapes:
        tensor = None if shape is None else torch.randn(shape, dtype=torch.float64)
        wide.append(tensor)
    narrow = [None if a is None else a.float().requires_grad_() for a in wide]
    return [None if a is None else a.requires_grad_() for a in wide], narrow


def check_outputs_and_gradients(found, wanted, narrow, wide, limit=1e-6):
    """Compare outputs, and the gradients of a random sum of them. None and None match."""
    loss = 0
    reference = 0
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        assert error(a.detach(), b.detach()) < limit
        weights = torch.randn_like(b)
        reference = reference + (b * weights).sum()
        loss = loss + (a * weights.float()).sum()
    reference.backward()
    loss.backward()
    for a, b in zip(narrow, wide, strict=True):
        if b is not None:
            assert error(a.grad, b.grad) < limit


def add_norm_matches():
    """Widths, lengths of several programs, with and without tangents, a branch to add."""
    torch.manual_seed(0)
    for B, T, D in ((2, 5, 48), (2, 33, 32), (1, 3, 17)):
        for tangents in (True, False):
            for adds in (True, False):
                token, vector = (B, T, D), (B, 1, D)
                shapes = (
                    [token, token, *[vector] * 3] if adds else [token, None, None, *[vector] * 2]
                )
                wide, narrow = leaves(*shapes, *(shapes if tangents else [None] * 5))
                x, y, gate, shift, scale = (dual.pair(*p) for p in zip(wide[:5], wide[5:]))
                total = x + gate * y if adds else x
                h = dual.modulate(dual.rms_norm(total), shift, scale)
                wanted = [dual.value_of(h), dual.tangent_of(h)]
                if adds:
                    wanted += [dual.value_of(total), dual.tangent_of(total)]
                v, d = narrow[:5], narrow[5:]
                pairs = [each for pair in zip(v, d) for each in pair]
                x, _, dx, h, dh = fused.add_norm(*pairs)  # x_out and dx_out
                found = [h, dh, x, dx] if adds else [h, dh]
                check_outputs_and_gradients(found, wanted, narrow, wide)


def tanh_gelu(x):
    return functional.gelu(x, approximate="tanh")


def gelu_matches():
    torch.manual_seed(0)
    for tangents in (True, False):
        wide, narrow = leaves((3, 50, 70), (3, 50, 70) if tangents else None)
        if tangents:
            wanted = torch.func.jvp(tanh_gelu, (wide[0],), (wide[1],))
        else:
            wanted = tanh_gelu(wide[0]), None
        bias = torch.zeros(70, requires_grad=True)
        check_outputs_and_gradients(fused.gelu(*narrow, bias), wanted, narrow, wide)
        assert error(bias.grad, wide[0].grad.sum((0, 1))) < 1e-6


def qk_norm_matches():
    torch.manual_seed(0)
    heads, d = 3, 24
    token = (2, 37, 3 * heads * d)

    def reference(qkv, q_weight, k_weight):
        q, k, v = dual.split(lambda x: x.unflatten(-1, (3, heads, -1)).unbind(2), qkv)
        return dual.rms_norm(q, q_weight), dual.rms_norm(k, k_weight), v

    for tangents in (True, False):
        wide, narrow = leaves(token, token if tangents else None, (d,), (d,))
        parts = reference(dual.pair(*wide[:2]), *wide[2:])
        wanted = [dual.value_of(part) for part in parts] + [dual.tangent_of(part) for part in parts]
        bias = torch.zeros(3 * heads * d, requires_grad=True)
        found = fused.qk_norm(*narrow, heads, bias)
        check_outputs_and_gradients(found, wanted, narrow, wide)
        assert error(bias.grad, wide[0].grad.sum((0, 1))) < 1e-6


def column_sums_match():
    tensors = [torch.randn(shape) for shape in ((2, 70, 300), (1, 48), (257, 17), (129, 600))]
    tensors += [tensors[0].transpose(1, 2), tensors[2][:, :5], torch.ones(1).expand(40, 16)]
    assert torch.equal(fused.column_sums(torch.ones(0, 16)), torch.zeros(16))
    for x in tensors:
        assert error(fused.column_sums(x), x.double().flatten(0, -2).sum(0)) < 1e-6


def low_parts_add_up():
    """The residual's value in two parts of 16 bits is that of float32 to 2^-16."""
    torch.manual_seed(0)
    half = torch.bfloat16
    x, y = torch.randn(2, 2, 5, 48)
    gate, shift, scale = torch.randn(3, 2, 1, 48)
    high, y = x.to(half), y.to(half)
    low = (x - high.float()).to(half)
    out, low_out, _, _, _ = fused.add_norm(
        *(high, None, y, None, gate, None, shift, None, scale, None),
        low=low,
        dtype=half,
    )
    wanted = x.double() + gate.double() * y.double()
    assert error(out, wanted) > 1e-3
    assert error(out.float() + low_out.float(), wanted) < 2e-5


def odd_residuals_match():
    """Two branches without a norm between them; vectors of shapes that the kernels do not take."""
    torch.manual_seed(0)
    x, y, z = torch.randn(3, 2, 5, 48)
    gate, other = torch.randn(2, 2, 1, 48)
    found = dual.total(dual.add_gated(dual.add_gated(x, gate, y), other, z))
    assert error(found, (x.double() + gate.double() * y + other.double() * z)) < 1e-6
    y = torch.randn(1, 5, 48)  # a branch for all images
    assert error(dual.total(dual.add_gated(x, gate, y)), x.double() + gate.double() * y) < 1e-6
    x, y = torch.randn(2, 2, 5, 48)
    for shape in ((2, 5, 48), (1, 1, 48)):
        gate, shift, scale = torch.randn(3, *shape)
        wanted = x.double() + gate.double() * y
        x_out, h = dual.norm_modulate(dual.add_gated(x, gate, y), shift, scale)
        assert error(dual.total(x_out), wanted) < 1e-6
        wanted = functional.rms_norm(wanted, (48,), eps=fused.EPS) * (1 + scale.double()) + shift
        assert error(h, wanted) < 1e-6


def other_dtypes_match():
    """Vectors or a branch in float64, which the kernels do not take, go through the formulas."""
    x, y = torch.randn(2, 2, 5, 48)
    gate, shift, scale = torch.randn(3, 2, 1, 48).double()
    wanted = x + gate * y
    for a, b in ((gate, y), (gate.float(), y.double())):
        total = dual.add_gated(x, a, b)
        assert not isinstance(total, dual.Residual)
        assert error(total, wanted) < 1e-6
    _, h = dual.norm_modulate(x, shift, scale)
    wanted = functional.rms_norm(x.double(), (48,), eps=fused.EPS) * (1 + scale) + shift
    assert error(h, wanted) < 1e-6


def network_matches():
    """Loss and gradients: the formulas in float64; the kernels checkpointed, and with the tangent
    detached; and torch.compile, which takes the formulas where kernels could run."""
    torch.manual_seed(0)
    config = DiTConfig(input_size=(4, 2), hidden_size=48, depth=2, num_heads=2, num_classes=10)
    network = DiT(config)
    for p in network.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    x0 = torch.randn(2, 4, 4, 2)
    y = torch.randint(10, (2,))

    def gradients(fuse, dtype, detach, blocks=0, compiled=False):
        torch._dynamo.reset()
        fused.FUSED = fuse
        net = copy.deepcopy(network).to(dtype)
        target = copy.deepcopy(net).requires_grad_(False)
        net.checkpoint_blocks = blocks
        if compiled:
            net.run_block = torch.compile(Block.forward, fullgraph=True, backend="aot_eager")
            target.run_block = net.run_block
        loss = TrainingLoss(net, target, guidance=dict(w=2.0), detach_jvp=detach)
        drawn = [a.to(dtype) if a.dtype == torch.float32 else a for a in loss.draw(x0, 0)]
        value, _ = loss(x0.to(dtype), y, *drawn, backward_part=backward)
        backward(value)
        return [value, *(p.grad for p in net.parameters() if p.requires_grad)]

    for detach in (False, True):
        wanted = gradients(False, torch.float64, detach)
        for case in (dict(),) if detach else (dict(blocks=2), dict(compiled=True)):
            found = gradients(True, torch.float32, detach, **case)
            for a, b in zip(found, wanted, strict=True):
                assert (a.double() - b).norm() <= 2e-5 * b.norm(), case


B, T, D, HEADS = 2, 4, 32, 2
TOKENS = (B, T, D)
VECTORS = (B, 1, D)
ADD_NORM = dict(
    x=TOKENS,
    dx=TOKENS,
    y=TOKENS,
    dy=TOKENS,
    gate=VECTORS,
    dgate=VECTORS,
    shift=VECTORS,
    dshift=VECTORS,
    scale=VECTORS,
    dscale=VECTORS,
    low=TOKENS,
)
GELU = dict(u=TOKENS, du=TOKENS, bias=(D,))
QK_NORM = dict(
    qkv=(B, T, 3 * D),
    dqkv=(B, T, 3 * D),
    q_weight=(D // HEADS,),
    k_weight=(D // HEADS,),
    bias=(3 * D,),
)


@pytest.mark.parametrize(
    "name, shapes, wrong, words",
    [
        ("gelu", GELU, dict(du=(1, 1, D)), "wants du of (2, 4, 32), got (1, 1, 32)"),
        ("gelu", GELU, dict(bias=(D // 2,)), "wants bias of (32,), got (16,)"),
        ("gelu", GELU, dict(bias=(1, D)), "wants bias of (32,), got (1, 32)"),
        ("qk_norm", QK_NORM, dict(qkv=(B, T, 3 * D + 1)), "wants qkv of (B, T, 3 2 d), got"),
        ("qk_norm", QK_NORM, dict(qkv=(T, 3 * D)), "wants qkv of (B, T, 3 2 d), got (4, 96)"),
        ("qk_norm", QK_NORM, dict(dqkv=(B, 1, 3 * D)), "wants dqkv of (2, 4, 96), got (2, 1, 96)"),
        ("qk_norm", QK_NORM, dict(q_weight=(4,)), "wants q_weight of (16,), got (4,)"),
        ("qk_norm", QK_NORM, dict(k_weight=(D,)), "wants k_weight of (16,), got (32,)"),
        ("qk_norm", QK_NORM, dict(bias=(D,)), "wants bias of (96,), got (32,)"),
        ("add_norm", ADD_NORM, dict(x=(T, D)), "wants x of (B, T, D), got (4, 32)"),
        ("add_norm", ADD_NORM, dict(dx=(B, 1, D)), "wants dx of (2, 4, 32), got (2, 1, 32)"),
        ("add_norm", ADD_NORM, dict(y=(1, T, D)), "wants y of (2, 4, 32), got (1, 4, 32)"),
        ("add_norm", ADD_NORM, dict(low=(B, T, 1)), "wants low of (2, 4, 32), got (2, 4, 1)"),
        ("add_norm", ADD_NORM, dict(shift=(B, D)), "wants shift of (2, 1, 32), got (2, 32)"),
        ("add_norm", ADD_NORM, dict(dgate=(1, 1, D)), "wants dgate of (2, 1, 32), got (1, 1, 32)"),
        ("add_norm", ADD_NORM, dict(y=None), "takes all or none of y, gate, got no y"),
        ("add_norm", ADD_NORM, dict(dy=None), "takes all or none of dx, dy, dgate, dshift, dscale"),
        ("add_norm", ADD_NORM, dict(dx=None, dy=None), "dscale, got no dx, dy"),
        ("add_norm", ADD_NORM, dict(y=None, gate=None, dscale=None), "dscale, got no dscale"),
    ],
)
def test_wrong_shapes(name, shapes, wrong, words):
    """What the kernels would read outside of a tensor is refused, in one line."""
    shapes = {**shapes, **wrong}
    tensors = {key: None if shape is None else torch.zeros(shape) for key, shape in shapes.items()}
    heads = dict(heads=HEADS) if name == "qk_norm" else {}
    with pytest.raises(ValueError) as caught:
        getattr(fused, name)(**tensors, **heads)
    message = str(caught.value)
    assert message.startswith(name)
    assert words in message
    assert "\n" not in message


def test_formulas_without_kernels(monkeypatch):
    """What the kernels do not take goes through the formulas."""
    x = torch.randn(2, 3, 8)
    assert fused.why_not(x) is not None
    total = dual.add_gated(x, x[:, :1], x)
    assert torch.equal(total, x + x[:, :1] * x)
    assert fused.why_not(torch.zeros(1, fused.MAX_WIDTH + 1)) is not None
    monkeypatch.setattr(fused, "FUSED", False)
    assert fused.why_not(x) == "FUSED is False"


def test_a_residual_is_its_sum():
    x, y, gate = (Dual(*torch.randn(2, 2, 3, 8)) for _ in range(3))
    low = torch.randn(2, 3, 8)
    found = dual.total(dual.Residual(x, low, gate, y))
    wanted = x + low + gate * y
    assert torch.equal(found.value, wanted.value) and torch.equal(found.tangent, wanted.tangent)
    residual = dual.Residual(x, low, gate, y)
    values = dual.Residual(x.value, low, gate.value, y.value)
    assert torch.equal(dual.total(values), wanted.value)
    layer = torch.nn.Linear(8, 24)
    rules = [dual.silu, dual.gelu, dual.rms_norm, lambda x: x + 1, lambda x: 2 * x - low]
    rules += [lambda x: 1 - x, lambda x: dual.linear_gelu(layer, x)]
    rules += [lambda x: dual.linear_qkv(layer, x, 2)[2]]
    for rule in rules:
        assert torch.equal(rule(residual).tangent, rule(wanted).tangent)


def test_layers_that_must_be_called():
    """No kernel takes the place of a layer's hooks, or of another kind of layer."""
    layer = torch.nn.Linear(8, 8)
    layer.register_forward_hook(lambda layer, inputs, output: output + 1)
    x = torch.randn(2, 3, 8)
    assert not dual.has_kernels(x, layer=layer)
    qkv = nn.Sequential(nn.Linear(8, 24))  # as a wrapper around a layer: only its call is known
    assert len(dual.linear_qkv(qkv, x, 2, torch.ones(4), torch.ones(4))) == 3
    assert torch.equal(dual.linear_gelu(layer, x), dual.gelu(layer(x)))


@pytest.mark.parametrize("capability", (80, 90))
def test_the_backward_does_not_spill(capability, tmp_path):
    """The largest kernel at XL/2's width, compiled for a GPU, keeps its rows in registers."""
    kernel = fused.add_norm_backward_kernel
    tokens, warps, stages = fused.NORM_BACKWARD[True]
    first, second = fused.row_chunks(1152)
    constants = dict(D=1152, FIRST=first, SECOND=second, ROWS=tokens, STAGES=stages)
    kinds = dict.fromkeys(("GATE", "DGATE", "SCALE", "DSCALE", "R", "M", "SUMS"), "*fp32")
    kinds.update(dict.fromkeys(("gate_stride", "scale_stride", "T"), "i32"))
    kinds.update(dict.fromkeys(constants, "constexpr"))
    signature = {name: kinds.get(name, "*bf16") for name in kernel.arg_names}
    pointers = [name for name in kernel.arg_names if signature[name][0] == "*"]
    aligned = [*pointers, *(name for name in kernel.arg_names if name.endswith("stride"))]
    options = dict(num_warps=warps)
    made = compiled_for_gpu(kernel, signature, constants, aligned, capability, options)
    assert stack_of(made, tmp_path) == 0
    assert made.metadata.shared <= 99 * 1024


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_linear_gelu(compiled):
    """Without gradients dual.linear_gelu is one kernel in bfloat16. In float32 it is exact."""
    torch.manual_seed(0)
    layer = nn.Linear(72, 144, device="cuda")
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 33, 72, device="cuda").bfloat16().float()
    exact = x.double() @ layer.weight.double().t() + layer.bias.double()
    run = torch.compile(dual.linear_gelu, fullgraph=True) if compiled else dual.linear_gelu
    for half in (True, False):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=half):
            out = run(layer, x)
        assert out.dtype == (torch.bfloat16 if half else torch.float32)
        assert error(out, tanh_gelu(exact)) < (5e-3 if half else 1e-6)
