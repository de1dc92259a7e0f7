"""
The specification: what this project computes, each thing against an independent way to get it.

    pytest                      # this file, and tests/: everything
    pytest test_all.py          # the maths and the rehearsal; a minute or two on one core
    pytest -k gpu               # what needs a GPU, of all files

In this order:
    Duals           each rule against PyTorch's forward mode
    the network     its names, initialization, positions, switches, and shapes that are not square
    its derivative  against PyTorch's forward mode, finite differences, and reverse over reverse
    blocks          masked, checkpointed and compiled ones give what plain ones give
    samplers        times and guidance weights against their distributions
    TVM             exact flows have no loss; other networks, a loop over samples from the paper
    MeanFlow, its relatives and flow matching, in the same way
    TrainingLoss    what is random, dropout of labels, options
    seams           data and conditions of any shape
    the rehearsal   from JPEGs to FID on small files, with kills and two ranks
    on a GPU        the same, compiled, in bfloat16, as CUDA graphs

Attention has its own specification, tests/test_attention.py.
"""

import copy
import itertools
import math
import operator
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from helpers import (
    F64,
    HERE,
    SMALL,
    TINY,
    GaussianFlow,
    close,
    gpu,
    images_in,
    jvp_of,
    logged_losses,
    randn,
    random_inputs,
    random_model,
    rel,
    run_script,
    running,
    torchrun,
    until,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import attention_jvp as A
import claims
import dataset
import dual
import files
import fused
import pictures
import sample
from checkpoint import save_tensors
from device import Graph
from dual import Dual, column
from inception import InceptionV3
from loss import (
    OBJECTIVES,
    Term,
    TrainingLoss,
    adaptive_weight,
    alpha_at,
    alpha_flow_loss,
    backward,
    flow_matching_loss,
    improved_meanflow_loss,
    meanflow_loss,
    sample_guidance,
    sample_times,
    tvm_loss,
)
from model import (
    Block,
    DiT,
    DiTConfig,
    Embedder,
    LabelEmbedder,
    compile_blocks,
    load_model,
    positions,
)
from step import TrainingStep


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


def by_name(terms):
    return {term.name: term for term in terms}


def total(terms):
    """The sum of the losses of all samples and terms."""
    return sum(term.loss.sum() for term in terms)


def gradients(loss, net):
    return torch.autograd.grad(loss, trained(net))


def nearly_equal(gradient, reference, relative, absolute):
    """Of a gradient that may be zero."""
    return (gradient - reference).norm() <= relative * reference.norm() + absolute


# ---- Duals ---------------------------------------------------------------------------------------

WEIGHT = torch.arange(8.0, dtype=F64)


def torch_gelu(x):
    return F.gelu(x, approximate="tanh")


def torch_rms_norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rms_norm_with_weight(x):
    return dual.rms_norm(x, WEIGHT)


def torch_rms_norm_with_weight(x):
    return F.rms_norm(x, x.shape[-1:], WEIGHT, 1e-6)


def torch_layer_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def arithmetic(x):
    return x * x + x * 2 - (1 + x)


@pytest.mark.parametrize(
    "ours, reference",
    [
        (dual.silu, F.silu),
        (dual.gelu, torch_gelu),
        (dual.rms_norm, torch_rms_norm),
        (rms_norm_with_weight, torch_rms_norm_with_weight),
        (dual.layer_norm, torch_layer_norm),
        (arithmetic, arithmetic),
    ],
)
def test_rules(ours, reference):
    """A rule gives the function's value and derivative; of a tensor it gives the value alone."""
    x = 2 * randn(5, 8)
    dx = randn(5, 8, seed=1)
    value, tangent = torch.func.jvp(reference, (x,), (dx,))
    found = ours(Dual(x, dx))
    close(found.value, value, 1e-14)
    close(found.tangent, tangent, 1e-14)
    close(ours(x), value, 1e-14)


def test_hooks_of_a_layer():
    """They may change its input and result. The tangent is that of all three, in closed form."""
    layer = nn.Linear(8, 3).double()
    layer.register_forward_pre_hook(lambda layer, inputs: inputs[0].sin())
    layer.register_forward_hook(lambda layer, inputs, y: y.square())
    x = randn(5, 8).requires_grad_()
    dx = randn(5, 8, seed=1).requires_grad_()
    found = dual.linear(layer, Dual(x, dx))
    y = F.linear(x.sin(), layer.weight, layer.bias)
    tangent = 2 * y * F.linear(x.cos() * dx, layer.weight)
    close(found.value, y.square(), 1e-14)
    close(found.tangent, tangent, 1e-14)
    inputs = (x, dx, layer.weight, layer.bias)
    gradients = torch.autograd.grad((found.value * found.tangent).sum(), inputs)
    for a, b in zip(gradients, torch.autograd.grad((y.square() * tangent).sum(), inputs)):
        close(a, b, 1e-13)
    constant = nn.Linear(8, 3).double()
    constant.register_forward_hook(lambda layer, inputs, y: torch.ones_like(y))
    assert not dual.linear(constant, Dual(x, dx)).tangent.any()
    only_before = nn.Linear(8, 3).double()
    only_before.register_forward_pre_hook(lambda layer, inputs: 2 * inputs[0])
    close(dual.linear(only_before, Dual(x, dx)).tangent, 2 * dx @ only_before.weight.T, 1e-14)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"needs torch.no_grad\(\)"):
        dual.linear(only_before, Dual(x, dx))
    only_before.register_full_backward_hook(lambda layer, g_in, g_out: None)
    with pytest.raises(TypeError, match="has backward hooks, and forward hooks"):
        dual.linear(only_before, Dual(x, dx))
    seen = []
    watched = nn.Linear(8, 3).double()
    watched.register_full_backward_hook(lambda layer, g_in, g_out: seen.append(g_out[0]))
    dual.linear(watched, Dual(x, dx)).value.sum().backward()
    assert torch.equal(seen[0], torch.ones(5, 3, dtype=F64))


def operand(kind, seed):
    """A tensor, Dual or Residual of (2, 3, 4), and its value and tangent in plain tensors."""
    parts = iter(randn(7, 2, 3, 4, seed=seed))

    def one(is_dual):
        value = next(parts)
        if not is_dual:
            return value, value, torch.zeros_like(value)
        tangent = next(parts)
        return Dual(value, tangent), value, tangent

    if kind in ("tensor", "Dual"):
        return one(kind == "Dual")
    high, value, tangent = one(kind == "Residual of Duals")
    gate, gate_value, gate_tangent = one(kind == "Residual of Duals")
    branch, branch_value, branch_tangent = one(kind == "Residual of Duals")
    low = next(parts)
    value = value + low + gate_value * branch_value
    tangent = tangent + gate_tangent * branch_value + gate_value * branch_tangent
    return dual.Residual(high, low, gate, branch), value, tangent


KINDS = ("tensor", "Dual", "Residual of Duals", "Residual of tensors")


@pytest.mark.parametrize("left, right", list(itertools.product(KINDS, KINDS)))
def test_arithmetic_of_all_kinds(left, right):
    """+, - and * of a tensor, a Dual or a Residual on either side, against forward mode.

    Torch makes a division by a tensor a product. Other operators have no rule, which is an error.
    """
    x, x_value, x_tangent = operand(left, seed=0)
    y, y_value, y_tangent = operand(right, seed=1)
    with_rule = [operator.add, operator.sub, operator.mul]
    without_rule = [operator.matmul]
    (with_rule if right == "tensor" else without_rule).append(operator.truediv)
    for f in with_rule:
        value, tangent = torch.func.jvp(f, (x_value, y_value), (x_tangent, y_tangent))
        found = f(x, y)
        assert isinstance(found, Dual) == ("Dual" in left + right)
        close(dual.value_of(found), value, 1e-14)
        if isinstance(found, Dual):
            assert torch.is_tensor(found.value)
            assert torch.is_tensor(found.tangent)
            close(found.tangent, tangent, 1e-14)
    if (left, right) != ("tensor", "tensor"):
        for f in without_rule:
            with pytest.raises(TypeError):
                f(x, y)


def test_cat_of_duals_and_tensors():
    """The tangent of what is not a Dual is zero. Without any Dual it is torch.cat."""
    a, da, b = randn(2, 3), randn(2, 3, seed=1), randn(2, 4)
    for dim, parts in ((1, (b, Dual(a, da))), (0, (Dual(a, da), a)), (-1, (Dual(a, da), b, b))):

        def reference(x, dim=dim, parts=parts):
            return torch.cat([x if isinstance(part, Dual) else part for part in parts], dim)

        value, tangent = torch.func.jvp(reference, (a,), (da,))
        found = dual.cat(parts, dim)
        assert torch.equal(found.value, value)
        assert torch.equal(found.tangent, tangent)
    assert torch.equal(dual.cat([a, b], 1), torch.cat([a, b], 1))


def test_a_sum_that_broadcasts():
    """A tensor that is added gives the tangent its shape and dtype, and no derivative."""
    x = Dual(torch.randn(1, 4, dtype=torch.bfloat16), torch.randn(1, 4, dtype=torch.bfloat16))
    found = x + randn(3, 4, dtype=torch.float32)
    assert found.value.shape == found.tangent.shape == (3, 4)
    assert found.value.dtype == found.tangent.dtype == torch.float32
    assert (found.tangent == x.tangent.float()).all()


def test_attention_to_constants():
    """Queries that move, keys and values that do not, as in cross-attention to captions."""
    q, k, v = randn(2, 2, 3, 8), randn(2, 2, 5, 8, seed=1), randn(2, 2, 5, 8, seed=2)
    dq = randn(2, 2, 3, 8, seed=3)

    def reference(q):
        return (q @ k.mT / 8**0.5).softmax(-1) @ v

    value, tangent = torch.func.jvp(reference, (q,), (dq,))
    found = dual.attend(Dual(q, dq), k, v)
    close(found.value, value, 1e-14)
    close(found.tangent, tangent, 1e-14)


def test_linear_refuses_other_layers():
    """Of a layer that is more than W x + b, the weight alone would give a wrong tangent."""

    class WithAdapter(nn.Linear):
        pass

    with pytest.raises(TypeError, match="no rule for the tangent of a WithAdapter"):
        dual.linear(WithAdapter(4, 4), Dual(randn(2, 4), randn(2, 4)))


# ---- the network ---------------------------------------------------------------------------------


def published_names(depth):
    """Of the tensors of the authors' checkpoints."""

    def both(prefix):
        return [f"{prefix}.weight", f"{prefix}.bias"]

    names = ["pos_embed", "y_embedder.embedding_table.weight"]
    names += both("x_embedder.proj")
    names += both("final_layer.adaLN_modulation.1")
    names += both("final_layer.linear")
    for embedder in ("t", "s", "guidance"):
        names += both(f"{embedder}_embedder.mlp.0")
        names += both(f"{embedder}_embedder.mlp.2")
    for i in range(depth):
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            names += both(f"blocks.{i}.{part}")
        names += [f"blocks.{i}.attn.q_norm.weight", f"blocks.{i}.attn.k_norm.weight"]
    return names


def test_parameter_names_and_count():
    """XL/2 has the names, shapes and number of parameters of the published checkpoints."""
    config = DiTConfig.named("XL/2", input_size=32, in_channels=4, num_classes=1000)
    with torch.device("meta"):
        net = DiT(config)
    assert sum(p.numel() for p in net.parameters()) == 678_363_408
    assert sorted(net.state_dict()) == sorted(published_names(28))
    assert net.pos_embed.shape == (1, 256, 1152)
    assert net.x_embedder.proj.weight.shape == (1152, 4, 2, 2)


@pytest.mark.parametrize("time_init", ["spectral", "normal"])
def test_initialization(time_init):
    """Zeros, ones, standard deviations (within 4 of their standard errors), spectral norms of 1."""
    torch.manual_seed(0)
    net = DiT(DiTConfig.named("S/2", depth=2, time_init=time_init))

    def has_std(p, std):
        return abs(p.std().item() - std) < 4 * std / math.sqrt(2 * p.numel())

    for name, p in net.named_parameters():
        is_normal_time_mlp = "embedder.mlp" in name and time_init == "normal"
        if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
            assert not p.any(), name
        elif is_normal_time_mlp or "embedding_table" in name:
            assert has_std(p, 0.02), name
        elif name == "x_embedder.proj.weight":
            fan = sum(p.flatten(1).shape)
            assert has_std(p, math.sqrt(2 / fan))
        elif name.endswith("_norm.weight"):
            assert (p == 1).all()
        elif name.endswith("weight"):
            largest = np.linalg.norm(p.detach().double().numpy(), 2)
            assert abs(largest - 1) < 1e-5, name


def test_frozen_layers_are_not_initialized(monkeypatch):
    """A pretrained encoder of conditions stays what it is."""

    class Encoder(LabelEmbedder):
        def __init__(self, config):
            super().__init__(config)
            self.encoder = nn.Linear(4, 4).requires_grad_(False)
            nn.init.constant_(self.encoder.weight, 3)
            nn.init.constant_(self.encoder.bias, 5)

    monkeypatch.setattr("model.LabelEmbedder", Encoder)
    encoder = DiT(DiTConfig.named("tiny")).y_embedder.encoder
    assert (encoder.weight == 3).all()
    assert (encoder.bias == 5).all()


def test_positions_and_time_features():
    """Some features of positions and times, by hand."""
    D = 16
    table = positions(3, 3, D)
    for row, col, j in [(0, 0, 0), (2, 1, 1), (1, 2, 3)]:
        omega = 10000 ** (-j / (D / 4))
        token = table[0, 3 * row + col]
        found = [token[j + i * D // 4] for i in range(4)]
        expected = [
            math.sin(col * omega),
            math.cos(col * omega),
            math.sin(row * omega),
            math.cos(row * omega),
        ]
        assert np.allclose(found, expected, atol=1e-7)
    features = Embedder.features(torch.tensor([0.3]))
    assert features.shape == (1, 256)
    assert features.dtype == F64
    a = float(np.float32(0.3)) * 10000 ** (-5 / 128)
    assert abs(features[0, 5] - math.cos(a)) < 1e-14
    assert abs(features[0, 133] - math.sin(a)) < 1e-14


def without_blocks(**kwargs):
    """A network whose block changes nothing: output patch i depends on input patch i alone."""
    net = random_model(depth=1, **kwargs)
    with torch.no_grad():
        for p in net.blocks.parameters():
            p.zero_()
    return net


def moved_pixels(net, x, row, col):
    """(height, width) bool: where the output changes when the input does at one pixel."""
    _, _, t, s, y, w = random_inputs()
    moved = x.clone()
    moved[:, 1, row, col] += 1
    change = net(moved, t, s, y, w) - net(x, t, s, y, w)
    return change.abs().sum((0, 1)) > 1e-9


def test_patches_go_back_where_they_came_from():
    """A change in patch (0, 1) comes out in that patch, in all of it and nowhere else."""
    where = moved_pixels(without_blocks(), random_inputs()[0], 0, 3)
    assert where[:2, 2:].all()
    assert where.sum() == 4


@pytest.mark.parametrize(
    "kwargs, word",
    [
        (dict(hidden_size=30), "hidden_size 30"),
        (dict(patch_size=3), "patch_size"),
        (dict(num_heads=5), "num_heads"),
        (dict(time_init="no"), "time_init"),
        (dict(depth=0), "depth"),
        (dict(num_classes=-1), "num_classes"),
        (dict(input_size=(4, 5)), "input_size 5 is not divisible by patch_size 2"),
        (dict(input_size=(0, 4)), "input_size must be at least 1"),
    ],
)
def test_config_refuses(kwargs, word):
    """Each value that no network has is named."""
    with pytest.raises(ValueError, match=word):
        DiTConfig.named("tiny", **{**TINY, **kwargs})
    with pytest.raises(ValueError, match="XL/2"):
        DiTConfig.named("XXL/2")


@pytest.mark.parametrize("on", [True, False])
def test_switches(on):
    """Each norm is there or not, as the config says. Positions are fixed."""
    x = randn(2, 4, 32)
    c = randn(2, 32)
    switches = dict(rms_norm=on, qk_norm=on, mod_norm=on)
    one_by_one = DiTConfig.named("tiny", **switches, **TINY)
    assert DiTConfig.named("tiny", semi_lipschitz=on, **TINY) == one_by_one
    net = random_model(semi_lipschitz=on)
    for block in (net.blocks[0], net.final_layer):
        keeps_the_mean = block.norm(x + 3).mean(-1).abs().max() > 0.5  # a LayerNorm takes it out
        assert keeps_the_mean == on
        rms = torch.stack(block.modulation(c)).square().mean(-1).sqrt()
        assert ((rms - 1).abs().max() < 1e-3) == on
    assert (net.blocks[0].attn.q_norm is not None) == on
    assert not net.pos_embed.requires_grad


def test_what_is_embedded():
    """The embedders are given t, t - s and 1/w."""
    asked = {}
    net = random_model()
    x, _, t, s, y, w = random_inputs()
    for name in ("t", "s", "guidance"):

        def remember(module, arguments, name=name):
            asked[name] = arguments[0]

        net.get_submodule(name + "_embedder").register_forward_pre_hook(remember)
    net(x, t, s, y, w)
    assert torch.equal(asked["t"], t)
    assert torch.equal(asked["s"], t - s)
    assert torch.equal(asked["guidance"], 1 / w)


def test_initialization_gives_threads_back():
    """It takes one thread for the spectral norms, and leaves as many as there were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    random_model()
    found = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert found == 2


def test_images_need_not_be_square(folder):
    """Images of 4 x 6: the patches' places, the positions' places, and the way through a file."""
    wide = dict(input_size=(4, 6))
    x, _, t, s, y, w = random_inputs(shape=(2, 4, 6))
    net = random_model(**wide)
    assert net(x, t, s, y, w).shape == x.shape
    assert net.config.grid == (2, 3)
    where = moved_pixels(without_blocks(**wide), x, 1, 4)  # in patch (0, 2)
    assert where[:2, 4:].all()
    assert where.sum() == 4
    two_of_three_rows = positions(3, 3, 32).view(3, 3, 32)[:2]
    assert torch.equal(DiT(net.config).pos_embed.view(2, 3, 32), two_of_three_rows)

    net = net.float()
    about = dict(
        config=vars(net.config),
        guidance=dict(sampler="constant", w=1.0, w_min=1.0, w_max=1.0),
        data=dict(class_counts=[1, 1, 1], mean=[0.0, 0.0], std=[1.0, 1.0]),
    )
    save_tensors("wide.safetensors", net.state_dict(), about)
    loaded, _ = load_model("wide.safetensors")
    assert loaded.config == net.config
    inputs = [a.float() if a.is_floating_point() else a for a in (x, t, s, y, w)]
    assert torch.equal(loaded(*inputs), net(*inputs))


# ---- its derivative ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(semi_lipschitz=False),
        dict(num_classes=0),
        dict(depth=1, num_heads=4, patch_size=1),
        dict(input_size=(4, 6)),
    ],
)
def test_network_derivative(kwargs):
    """dF along x, t and s against PyTorch's own forward mode and central differences."""
    net = random_model(**kwargs)
    shape = (2, *net.config.height_and_width)
    x, dx, t, s, y, w = random_inputs(num_classes=net.config.num_classes, shape=shape)
    dt = randn(3, seed=4)
    ds = randn(3, seed=5)
    h = 1e-5

    def f(x, t, s):
        return net(x, t, s, y, w)

    value, dF = net.jvp(x, t, s, y, w, dx, dt, ds)
    assert value.dtype == F64
    assert value.shape == x.shape
    close(value, f(x, t, s), 1e-13)
    close(dF, torch.func.jvp(f, (x, t, s), (dx, dt, ds))[1], 1e-12)
    after = f(x + h * dx, t + h * dt, s + h * ds)
    before = f(x - h * dx, t - h * dt, s - h * ds)
    close(dF, (after - before) / (2 * h), 1e-7)
    only_s = net.jvp(x, t, s, y, w, ds=torch.ones_like(s))[1]
    close(only_s, (f(x, t, s + h) - f(x, t, s - h)) / (2 * h), 1e-7)


def test_gradient_through_the_derivative():
    """The gradient of F and dF/ds: reverse over forward against reverse over (reverse twice)."""
    net = random_model()
    x, R, t, s, y, w = random_inputs()

    def some_loss(value, dF):
        return (dF * R).sum() + (value * R.sin()).sum()

    ours = gradients(some_loss(*net.jvp(x, t, s, y, w, ds=torch.ones_like(s))), net)

    with sdpa_kernel(SDPBackend.MATH):  # the flash kernel has no second derivative
        s = s.clone().requires_grad_()
        value = net(x, t, s, y, w)
        probe = torch.zeros_like(value, requires_grad=True)
        # J^T probe is linear in the probe, and its derivative along the probe is J 1 = dF/ds.
        (along,) = torch.autograd.grad(value, s, probe, create_graph=True)
        (dF,) = torch.autograd.grad(along.sum(), probe, create_graph=True)
        reference = gradients(some_loss(value, dF), net)
    for a, b in zip(ours, reference, strict=True):
        close(a, b, 1e-10)


# ---- blocks: masked, checkpointed, compiled ------------------------------------------------------


def gradient_of_some_loss(out, x):
    """Of a function of a Dual's value and tangent."""
    loss = out.value.sin().sum() + out.tangent.square().sum()
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def test_masked_tokens_do_not_count():
    """A block whose mask leaves out padding gives what it gives without these tokens.

    That holds for the value, the tangent and the gradient, with other padding in each sample.
    """
    block = random_model().blocks[0]
    B, T, D = 2, 6, 32
    counts = (4, 5)  # tokens that are no padding
    mask = torch.zeros(B, 1, 1, T, dtype=torch.bool)
    for i, count in enumerate(counts):
        mask[i, ..., :count] = True
    x = Dual(randn(B, T, D), randn(B, T, D, seed=1))
    c = Dual(randn(B, D, seed=2), randn(B, D, seed=3))
    x.value.requires_grad_()
    plain = block(x.value, c.value, mask)
    found = block(x, c, mask)
    close(found.value, plain, 1e-14)
    for i, count in enumerate(counts):
        alone = Dual(x.value[i : i + 1, :count], x.tangent[i : i + 1, :count])
        wanted = block(alone, Dual(c.value[i : i + 1], c.tangent[i : i + 1]))
        ours = Dual(found.value[i : i + 1, :count], found.tangent[i : i + 1, :count])
        close(ours.value, wanted.value, 1e-13)
        close(ours.tangent, wanted.tangent, 1e-13)

        found_gradient = gradient_of_some_loss(ours, x.value)
        close(found_gradient, gradient_of_some_loss(wanted, x.value), 1e-12)
        assert not found_gradient[i, count:].any()


def tvm_terms(net, target, inputs, **options):
    """The terms of the TVM loss, with s in the other order as s_fm."""
    x0, noise, t, s, y, w = inputs
    return list(tvm_loss(net, target, x0, y, noise, t, s, s.flip(0), w, **options))


def loss_gradients(net, **options):
    return gradients(total(tvm_terms(net, random_model(seed=1), random_inputs(6), **options)), net)


def test_checkpointed_blocks():
    """The gradient of the whole loss stays the same bit by bit when blocks run again."""
    net = random_model()
    found = []
    for count in (0, 1, 2, 8):  # of plain passes half as many
        net.checkpoint_blocks = count
        found.append(loss_gradients(net))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_which_blocks_are_checkpointed():
    """Two of two run again where there is a derivative, one of two where not."""
    net = random_model()
    passes = []

    def run_block(block, x, vectors):
        passes.append(isinstance(vectors[0], Dual))
        return Block.forward(block, x, vectors)

    net.checkpoint_blocks = 2
    net.run_block = run_block
    loss_gradients(net)
    assert passes.count(True) == 4
    assert passes.count(False) == 3


def test_detached_blocks():
    """forward_detach_jvp changes nothing but what detach_jvp throws away."""
    net = random_model()
    found = []
    for function in (Block.forward, Block.forward_detach_jvp):
        net.run_block = function
        found.append(loss_gradients(net, detach_jvp=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class GraphCounter:
    """A backend of torch.compile that runs graphs as they are, and keeps them to be counted."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


@pytest.mark.parametrize(
    "name, kept, graphs",
    [
        ("meanflow", 0, 3),
        ("improved_meanflow", 0, 3),
        ("alpha_flow", 0, 2),
        ("tvm", 0, 3),
        ("tvm", 1, 3),
    ],
)
def test_blocks_compile_once(name, kept, graphs):
    """The trainer's compiled block needs few graphs, and all of them in the first step.

    TVM's are those of its two passes and of the target. MeanFlow's are one without a derivative,
    and two with: the tangent that a block is given is the detached one of a block before, or not.
    alpha-Flow's are those of its pass and of the passes without gradient.
    """
    torch._dynamo.reset()
    net = random_model(torch.float32)
    counter = GraphCounter()
    detaches = name in ("meanflow", "improved_meanflow")
    block = Block.forward_detach_jvp if detaches else Block.forward
    net.checkpoint_blocks = kept
    net.run_block = torch.compile(block, fullgraph=True, dynamic=False, backend=counter)
    target = copy.deepcopy(net).requires_grad_(False)
    times = dict(sampler="two", p_equal=0.75) if detaches else {}
    objective = TrainingLoss(net, target, guidance=dict(w=2.0), objective=name, times=times)
    assert objective.detaches_jvp == detaches
    seen = []
    for step in range(3):
        x0 = randn(8, 2, 4, 4, dtype=torch.float32)
        loss, _ = objective(x0, torch.arange(8) % 3, *objective.draw(x0, step))
        loss.backward()
        seen.append(len(counter.graphs))
    assert seen == [graphs] * 3


def test_blocks_compile_for_many_batch_sizes(monkeypatch):
    """Twelve batch sizes in one process work, although Dynamo by itself gives up after eight.

    Of each there is one program for the blocks' vectors and one for the blocks.
    """
    torch._dynamo.reset()
    counter = GraphCounter()
    torch_compile = torch.compile

    def compile_with_counter(function, **options):
        return torch_compile(function, backend=counter, **options)

    monkeypatch.setattr(torch, "compile", compile_with_counter)
    net = random_model(depth=1).requires_grad_(False)
    compiled = copy.deepcopy(net)
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        compile_blocks(compiled)  # raises the limits
        for B in range(1, 13):
            x, _, t, s, y, w = random_inputs(B)
            close(compiled(x, t, s, y, w), net(x, t, s, y, w), 1e-14)
    assert len(counter.graphs) == 24


# ---- samplers ------------------------------------------------------------------------------------


def p_value(draws, cdf):
    """Of a Kolmogorov-Smirnov test: small where the draws are not from the distribution."""
    return scipy.stats.kstest(draws, cdf).pvalue


def logit_normal(mu, sigma):
    """Its distribution function."""

    def cdf(x):
        return scipy.stats.norm.cdf((scipy.special.logit(x) - mu) / sigma)

    return cdf


def truncated(s, top, mu, sigma):
    """Uniform on [0, 1] where s is a logit-normal truncated to s <= top."""
    cdf = logit_normal(mu, sigma)
    return cdf(s) / cdf(top)


def are_independent(a, b):
    return abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))


@pytest.mark.parametrize("sampler", ["gap", "trunc"])
@pytest.mark.parametrize("deviations", [(-37, -20), (-20, -8), (-8, -5), (-5, 5)])
def test_times_truncated_in_a_tail(sampler, deviations):
    """Also where nearly all of LN(mu_s, sigma_s) lies above: `deviations` from its median."""
    mu_s, sigma_s = 0.4, 0.1
    times = sample_times(
        10**6, sampler=sampler, mu=0.0, mu_s=mu_s, sigma_s=sigma_s, generator=seeded(0)
    )
    t, s, _ = (a.double().numpy() for a in times)
    top = 1 - (t - s) if sampler == "gap" else t
    z, z_top = ((scipy.special.logit(a) - mu_s) / sigma_s for a in (s, top))
    chosen = (deviations[0] < z_top) & (z_top < deviations[1])
    u = np.exp(scipy.stats.norm.logcdf(z) - scipy.stats.norm.logcdf(z_top))[chosen]
    assert len(u) > 1e4
    assert p_value(u[:20000], "uniform") > 1e-3


@pytest.mark.parametrize(
    "sampler, mu, sigma",
    [
        ("gap*", -0.8, 1.0),
        ("gap", -0.5, 0.7),
        ("trunc", 1.0, 1.0),
        ("clamp", 1.0, 1.2),
        ("two", 0.0, 1.0),
    ],
)
def test_time_samplers(sampler, mu, sigma):
    """What is drawn has the distributions that sample_times states."""
    n = 20000
    mu_s, sigma_s = -0.4, 0.9
    of_s = logit_normal(mu_s, sigma_s)
    times = sample_times(
        n,
        sampler=sampler,
        mu=mu,
        sigma=sigma,
        mu_s=mu_s,
        sigma_s=sigma_s,
        generator=seeded(0),
    )
    for a in times:
        assert a.dtype == torch.float32
        assert a.shape == (n,)
        assert a.min() >= 0
        assert a.max() <= 1
    t, s, s_fm = (a.double().numpy() for a in times)
    assert (s <= t).all()

    if sampler in ("gap", "gap*"):
        gap = t - s
        u = truncated(s, 1 - gap, mu_s, sigma_s)
        assert p_value(gap, logit_normal(mu, sigma)) > 1e-3
        assert p_value(u, "uniform") > 1e-3
        assert are_independent(u, gap)
    elif sampler == "trunc":
        u = truncated(s, t, mu_s, sigma_s)
        assert p_value(t, logit_normal(mu, sigma)) > 1e-3
        assert p_value(u, "uniform") > 1e-3
        assert are_independent(u, t)
    elif sampler == "clamp":

        def smaller_of_both(x):
            return 1 - (1 - of_s(x)) * (1 - logit_normal(mu, sigma)(x))

        assert p_value(t, logit_normal(mu, sigma)) > 1e-3
        assert p_value(s, smaller_of_both) > 1e-3
    else:  # two

        def larger(x):
            return of_s(x) ** 2

        def smaller(x):
            return 1 - (1 - of_s(x)) ** 2

        assert p_value(t, larger) > 1e-3
        assert p_value(s, smaller) > 1e-3
        one_of_each_pair = np.concatenate([t[::2], s[1::2]])
        assert p_value(one_of_each_pair, of_s) > 1e-3

    if sampler == "gap*":
        assert p_value(s_fm, of_s) > 1e-3
        assert are_independent(s_fm, s)
    else:
        assert (s_fm == s).all()


@pytest.mark.parametrize("sampler", ["gap*", "gap", "trunc", "clamp", "two"])
def test_share_of_equal_times(sampler):
    """With p_equal = 0.3 that share of the pairs becomes equal, of those that are not already."""
    n = 20000
    mu = {"gap*": -0.8, "gap": -0.5, "trunc": 1.0, "clamp": 1.0, "two": 0.0}[sampler]
    shares = []
    for p_equal in (0.0, 0.3):
        t, s, _ = sample_times(n, sampler=sampler, p_equal=p_equal, mu=mu, generator=seeded(1))
        shares.append((t == s).double().mean().item())
    before, after = shares
    assert abs(after - (before + 0.3 * (1 - before))) < 4 * math.sqrt(0.21 / n)


def test_times_that_become_equal():
    """With p_equal t becomes s, but with "two" s becomes t. Nothing else changes."""

    def times(sampler, p_equal):
        return sample_times(2000, sampler=sampler, p_equal=p_equal, generator=seeded(1))

    t, s, s_fm = times("gap*", 0.3)
    _, s_before, s_fm_before = times("gap*", 0.0)
    assert (s == s_before).all()
    assert (s_fm == s_fm_before).all()

    t, s, s_fm = times("two", 0.3)
    t_before, _, _ = times("two", 0.0)
    assert (t == t_before).all()
    assert (s_fm == s).all()


@pytest.mark.parametrize("sampler", ["gap*", "gap", "trunc", "clamp", "two"])
def test_share_of_times_at_noise(sampler):
    """With p_noise = 0.3 that share of t is 1, and s keeps its distribution. Then p_equal acts."""
    n = 20000
    options = dict(sampler=sampler, generator=seeded(1))
    _, s_before, _ = sample_times(n, sampler=sampler, generator=seeded(2))
    t, s, s_fm = sample_times(n, p_noise=0.3, **options)
    tolerance = 4 * math.sqrt(0.21 / n)
    assert abs((t == 1).double().mean().item() - 0.3) < tolerance
    assert ((s <= t) & (s < 1)).all()
    assert scipy.stats.ks_2samp(s.numpy(), s_before.numpy()).pvalue > 1e-3
    assert sampler == "gap*" or (s_fm == s).all()

    t, s, _ = sample_times(n, p_noise=1.0, p_equal=0.3, **options)
    assert abs((t == s).double().mean().item() - 0.3) < tolerance
    assert ((t == 1) | (t == s)).all()


def test_guidance_samplers():
    """The three distributions of w."""

    def draw(sampler):
        options = dict(w=2.0, w_min=1.0, w_max=4.0, generator=seeded(0))
        return sample_guidance(20000, sampler=sampler, **options).double().numpy()

    assert (draw("constant") == 2).all()
    assert p_value(1 / draw("inverse"), scipy.stats.uniform(0.25, 0.75).cdf) > 1e-3
    assert p_value(draw("uniform"), scipy.stats.uniform(1, 3).cdf) > 1e-3


@pytest.mark.parametrize(
    "function, options, word",
    [
        (sample_guidance, dict(sampler="no"), "not 'no'"),
        (sample_times, dict(sampler="no"), "not 'no'"),
        (sample_times, dict(sigma=0.0), "must be above 0"),
        (sample_times, dict(sigma_s=-1.0), "must be above 0"),
        (sample_guidance, dict(w_min=0.0), "must be above 0"),
        (sample_guidance, dict(sampler="uniform", w_min=2.0, w_max=1.0), "must be above 0"),
    ],
)
def test_samplers_refuse(function, options, word):
    with pytest.raises(ValueError, match=word):
        function(2, **options)


# ---- TVM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [1.0, 2.0])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
def test_gaussian_data(scaled, c, w):
    """The exact flow map of Gaussian data has no terminal loss, and a known fm loss.

    The fm loss is c^2 / (variance of x_s') in the mean, at any w. For where all classes are alike
    guidance changes no velocity. The network is then the same one over k, and the residual of the
    fm term is w (F - v) in place of F - v, which 1/w^2 takes back.
    """
    n = 4000
    shape = (2, 3, 3)
    mean = 0.7
    x0 = mean + c * randn(n, *shape)
    noise = randn(n, *shape, seed=1)
    t, s, s_fm = (a.double() for a in sample_times(n, generator=seeded(0)))
    guidance = torch.full((n,), w, dtype=F64)
    y = torch.zeros(n, dtype=torch.long)
    flow = GaussianFlow(mean, c, scaled)
    terms = by_name(tvm_loss(flow, flow, x0, y, noise, t, s, s_fm, guidance))
    assert terms["terminal"].loss.max() < 1e-12

    r = column(s_fm, x0)
    variance = (1 - r) ** 2 * c * c + r * r
    residual = (r * (x0 - mean) - (1 - r) * c * c * noise) / variance  # by hand, from F - v
    close(terms["fm"].loss, residual.square().mean((1, 2, 3)), 1e-12)
    # Each of these ratios is a chi^2 of 18 degrees of freedom over 18.
    ratio = (terms["fm"].loss / (c * c / variance.flatten())).mean().item()
    assert abs(ratio - 1) < 4 * math.sqrt(2 / 18 / n)


def naive_loss(net, target, x0, y, x1, t, s, s_fm, w):
    """{term: (B,)} straight from the paper, one sample after the other.

    The derivative is taken by PyTorch's forward mode.
    """
    terminal, fm = [], []
    for i in range(len(x0)):
        k = w[i] if net.config.scaled else 1.0
        x0_i = x0[i : i + 1]
        x1_i = x1[i : i + 1]
        y_i = y[i : i + 1]

        def call(net, x, t, s, y=y_i, w=w[i]):
            return net(x, t.view(1), s.view(1), y, w.view(1))

        x_t = (1 - t[i]) * x0_i + t[i] * x1_i

        def f(r, x_t=x_t, t=t[i], k=k, call=call):
            return (r - t) * k * call(net, x_t, t, r)

        displacement, df = torch.func.jvp(f, (s[i],), (torch.ones_like(s[i]),))
        u = k * call(target, (x_t + displacement).detach(), s[i], s[i])
        if t[i] == s[i]:
            terminal.append(torch.zeros((), dtype=F64))
        else:
            terminal.append(((df - u.detach()) ** 2).mean() / w[i] ** 2)

        r = s_fm[i]
        x_r = (1 - r) * x0_i + r * x1_i
        none = net.no_condition(y_i)
        u_none = call(target, x_r, r, r, none, torch.ones_like(w[i]))
        guided = w[i] * (x1_i - x0_i) + (1 - w[i]) * u_none
        fm.append(((k * call(net, x_r, r, r) - guided.detach()) ** 2).mean() / w[i] ** 2)
    return {"terminal": torch.stack(terminal), "fm": torch.stack(fm)}


@pytest.mark.parametrize("scaled", [False, True])
def test_loss_against_a_naive_one(scaled):
    """Both terms and the whole gradient, with random networks, in float64."""
    net = random_model(scaled=scaled)
    target = random_model(scaled=scaled, seed=1)
    x0, noise, t, s, y, w = random_inputs(B=5)
    s[2] = t[2]
    s_fm = torch.rand(5, dtype=F64, generator=seeded(9))
    inputs = (net, target, x0, y, noise, t, s, s_fm, w)
    ours = by_name(tvm_loss(*inputs))
    naive = naive_loss(*inputs)
    assert ours["terminal"].loss[2] == 0
    assert (ours["terminal"].loss[[0, 1, 3, 4]] > 0).all()
    for term in ("terminal", "fm"):
        close(ours[term].loss, naive[term], 1e-12)
        assert torch.equal(ours[term].error, ours[term].loss)
    assert torch.equal(ours["terminal"].time, t)
    assert torch.equal(ours["fm"].time, s_fm)

    expected = gradients(naive["terminal"].sum() + naive["fm"].sum(), net)
    for a, b in zip(gradients(total(ours.values()), net), expected, strict=True):
        close(a, b, 1e-10)
    cut = gradients(total(tvm_loss(*inputs, detach_jvp=True)), net)
    assert any((a - b).norm() > 0.01 * b.norm() for a, b in zip(cut, expected, strict=True))
    assert all(p.grad is None for p in target.parameters())


def test_detach_jvp_cuts_the_derivative_alone():
    """Its gradient is that of a network whose jvp has a detached derivative."""
    net = random_model()
    target = random_model(seed=1)
    x0, noise, t, s, y, w = random_inputs(B=5)
    inputs = (net, target, x0, y, noise, t, s, s, w)
    cut = gradients(total(tvm_loss(*inputs, detach_jvp=True)), net)
    jvp = net.jvp

    def detached_jvp(*arguments, **tangents):
        value, dF = jvp(*arguments, **tangents)
        return value, dF.detach()

    net.jvp = detached_jvp
    for a, b in zip(cut, gradients(total(tvm_loss(*inputs)), net), strict=True):
        close(a, b, 1e-12)


# ---- MeanFlow, its relatives and flow matching ---------------------------------------------------


def meanflow(*arguments):
    """The one term of meanflow_loss."""
    (term,) = meanflow_loss(*arguments)
    assert term.name == "meanflow"
    return term


@pytest.mark.parametrize("w", [1.0, 2.0])
@pytest.mark.parametrize("scaled", [False, True])
def test_meanflow_on_gaussian_data(scaled, w):
    """The exact average velocity of Gaussian data has a known error.

    It satisfies MeanFlow's identity along the marginal velocity u, so the error is zero for pairs
    whose v is u. For other pairs it is (1 + (s-t) dF/dx) (v~ - u), by hand, and v~ - u is
    omega (v - u).
    """
    n = 500
    mean, c, kappa = 0.7, 0.5, 0.25
    flow = GaussianFlow(mean, c, scaled)
    y = torch.zeros(n, dtype=torch.long)
    guidance = torch.full((n,), w, dtype=F64)
    keep = torch.zeros(n, dtype=torch.bool)
    k = w if scaled else 1
    omega = 1 if w == 1 else w * (1 - kappa)
    times = sample_times(n, sampler="two", p_equal=0.3, generator=seeded(0))
    t, s, _ = (a.double() for a in times)
    x0 = mean + c * randn(n, 2, 3, 3)
    noise = randn(n, 2, 3, 3, seed=1)
    r = column(t, x0)
    x_t = (1 - r) * x0 + r * noise
    u = k * flow(x_t, t, t, y, guidance)

    term = meanflow(flow, x_t - r * u, y, x_t + (1 - r) * u, t, s, guidance, keep, kappa)
    assert term.error.max() < 1e-24

    # F is linear in x, so a difference is its derivative.
    slope = k * (flow(x_t + 1, t, s, y, guidance) - flow(x_t, t, s, y, guidance))
    off = (1 + column(s - t, x0) * slope) * omega * (noise - x0 - u)
    error = off.square().mean((1, 2, 3))
    term = meanflow(flow, x0, y, noise, t, s, guidance, keep, kappa)
    close(term.error, error, 1e-10)
    close(term.loss, error / (error + 1e-3), 1e-10)
    assert torch.equal(term.time, t)

    # A dropped class: nothing guides.
    none = meanflow(flow, x0, flow.no_condition(y), noise, t, s, guidance, ~keep, kappa)
    close(none.error, error / omega**2, 1e-10)


def naive_meanflow(net, x0, y, x1, t, s, w, drop, kappa):
    """(B,) straight from the paper, one sample after the other.

    The derivative is taken by PyTorch's forward mode.
    """
    losses = []
    for i in range(len(x0)):
        k = w[i] if net.config.scaled else 1.0
        y_i = y[i : i + 1]

        def call(x, t, r, y, w=w[i]):
            return net(x, t.view(1), r.view(1), y, w.view(1))

        v = x1[i : i + 1] - x0[i : i + 1]
        z = (1 - t[i]) * x0[i : i + 1] + t[i] * x1[i : i + 1]
        omega = w[i] * (1 - kappa)
        if not drop[i] and w[i] != 1:
            u = k * call(z, t[i], t[i], y_i)
            u_none = k * call(z, t[i], t[i], net.no_condition(y_i))
            v = omega * v + kappa * u + (1 - omega - kappa) * u_none

        def mean_velocity(z, t, s=s[i], y=y_i, k=k, call=call):
            return k * call(z, t, s, y)

        tangents = (v.detach(), torch.ones_like(t[i]))
        u, du = torch.func.jvp(mean_velocity, (z, t[i]), tangents)
        error = ((u - (v - (t[i] - s[i]) * du).detach()) ** 2).mean()
        losses.append(error / (error.detach() + 1e-3))
    return torch.stack(losses)


@pytest.mark.parametrize("scaled", [False, True])
def test_meanflow_against_a_naive_one(scaled):
    """Loss and gradients in float64, and the derivative against finite differences."""
    net = random_model(scaled=scaled)
    x0, noise, t, s, y, w = random_inputs(B=5)
    s[2] = t[2]
    y[3] = 3  # "no class"
    w[4] = 1.0
    inputs = (net, x0, y, noise, t, s, w, y == 3, 0.4)
    ours = meanflow(*inputs).loss
    naive = naive_meanflow(*inputs)
    close(ours, naive, 1e-12)
    for a, b in zip(gradients(ours.sum(), net), gradients(naive.sum(), net), strict=True):
        assert nearly_equal(a, b, 1e-10, 1e-13)
    with torch.no_grad():
        h = 1e-6
        v = noise - x0
        after = net(x0 + h * v, t + h, s, y, w)
        before = net(x0 - h * v, t - h, s, y, w)
        dF = net.jvp(x0, t, s, y, w, dx=v, dt=torch.ones_like(t))[1]
        close(dF, (after - before) / (2 * h), 1e-7)


def improved_meanflow(*arguments):
    """The one term of improved_meanflow_loss."""
    (term,) = improved_meanflow_loss(*arguments)
    assert term.name == "improved_meanflow"
    return term


def alpha_flow(*arguments):
    """The one term of alpha_flow_loss."""
    (term,) = alpha_flow_loss(*arguments)
    assert term.name == "alpha_flow"
    return term


def test_adaptive_weight():
    """Against its formula, by hand. It is a constant to autograd."""
    errors = torch.tensor([0, 0.009], dtype=F64, requires_grad=True)
    weights = adaptive_weight(errors)
    close(weights, torch.tensor([1e3, 1e2], dtype=F64), 1e-12)
    assert not weights.requires_grad


@pytest.mark.parametrize("w", [1.0, 2.0])
@pytest.mark.parametrize("scaled", [False, True])
def test_improved_meanflow_on_gaussian_data(scaled, w):
    """The exact average velocity makes V the marginal velocity u, so V - v_g is w (u - v)."""
    n = 500
    flow = GaussianFlow(0.7, 0.5, scaled)
    y = torch.zeros(n, dtype=torch.long)
    guidance = torch.full((n,), w, dtype=F64)
    drop = torch.arange(n) % 5 == 0
    k = w if scaled else 1
    t, s, _ = (a.double() for a in sample_times(n, sampler="two", generator=seeded(0)))
    x0 = 0.7 + 0.5 * randn(n, 2, 3, 3)
    noise = randn(n, 2, 3, 3, seed=1)
    x_t = (1 - column(t, x0)) * x0 + column(t, x0) * noise
    u = k * flow(x_t, t, t, y, guidance)
    term = improved_meanflow(flow, x0, y, noise, t, s, guidance, drop)
    error = (noise - x0 - u).square().mean((1, 2, 3)) * torch.where(drop, 1.0, w**2)
    close(term.error, error, 1e-10)
    close(term.loss, error / (error + 1e-3), 1e-10)
    assert torch.equal(term.time, t)


def naive_sample(net, x0, y, x1, t, w, drop, i):
    """Of sample i: u, a function of z, t and r; z at time t; and the guided velocity there."""
    k = w[i] if net.config.scaled else 1.0
    y_i = y[i : i + 1]

    def u(z, t, r, y=y_i):
        return k * net(z, t.view(1), r.view(1), y, w[i].view(1))

    v = x1[i : i + 1] - x0[i : i + 1]
    z = (1 - t[i]) * x0[i : i + 1] + t[i] * x1[i : i + 1]
    if not drop[i]:
        v = w[i] * v + (1 - w[i]) * u(z, t[i], t[i], net.no_condition(y_i)).detach()
    return u, z, v


def naive_improved_meanflow(net, x0, y, x1, t, s, w, drop):
    """(B,) straight from the paper, one sample after the other.

    The derivative is taken by PyTorch's forward mode.
    """
    losses = []
    for i in range(len(x0)):
        u, z, v = naive_sample(net, x0, y, x1, t, w, drop, i)
        tangents = (u(z, t[i], t[i]).detach(), torch.ones_like(t[i]), torch.zeros_like(s[i]))
        mean_velocity, derivative = torch.func.jvp(u, (z, t[i], s[i]), tangents)
        V = mean_velocity + (t[i] - s[i]) * derivative.detach()
        error = ((V - v) ** 2).mean()
        losses.append(error / (error.detach() + 1e-3))
    return torch.stack(losses)


def naive_alpha_flow(net, x0, y, x1, t, s, r, w, drop):
    """(B,) straight from the paper, one sample after the other."""
    losses = []
    for i in range(len(x0)):
        u, z, v = naive_sample(net, x0, y, x1, t, w, drop, i)
        alpha = 1.0 if t[i] == s[i] else (t[i] - r[i]) / (t[i] - s[i])
        z_r = z - (t[i] - r[i]) * v
        mean_velocity = alpha * v + (1 - alpha) * u(z_r, r[i], s[i]).detach()
        error = ((u(z, t[i], s[i]) - mean_velocity) ** 2).mean()
        losses.append(error / (error.detach() + 1e-3))
    return torch.stack(losses)


@pytest.mark.parametrize("scaled", [False, True])
def test_relatives_of_meanflow_against_naive_ones(scaled):
    """Loss and gradients in float64, and V's derivative against finite differences."""
    net = random_model(scaled=scaled)
    x0, noise, t, s, y, w = random_inputs(B=5)
    s[2] = t[2]
    y[3] = 3  # "no class"
    w[4] = 1.0
    drop = y == 3
    inputs = (net, x0, y, noise, t, s)
    r = t + 0.2 * (s - t)
    others = (w, drop)
    for ours, naive in (
        (improved_meanflow(*inputs, *others).loss, naive_improved_meanflow(*inputs, *others)),
        (alpha_flow(*inputs, r, *others).loss, naive_alpha_flow(*inputs, r, *others)),
    ):
        close(ours, naive, 1e-12)
        for a, b in zip(gradients(ours.sum(), net), gradients(naive.sum(), net), strict=True):
            assert nearly_equal(a, b, 1e-10, 1e-13)

    with torch.no_grad():
        h = 1e-6
        k = column(w, x0) if scaled else 1
        x_t = x0 + column(t, x0) * (noise - x0)
        u = k * net(x_t, t, t, y, w)
        after = net(x_t + h * u, t + h, s, y, w)
        before = net(x_t - h * u, t - h, s, y, w)
        V = k * (net(x_t, t, s, y, w) + column(t - s, x0) * (after - before) / (2 * h))
        error = (V - velocity_to_match(net, x_t, noise - x0, t, y, w, drop)).square()
    close(improved_meanflow(*inputs, *others).error, error.mean((1, 2, 3)), 1e-7)


def velocity_to_match(net, x_t, v, t, y, w, drop):
    """v_g = w v + (1-w) u without a class; v where the class is dropped."""
    k = column(w, v) if net.config.scaled else 1
    u_none = k * net(x_t, t, t, net.no_condition(y), w)
    w_or_1 = column(torch.where(drop, 1.0, w), v)
    return w_or_1 * v + (1 - w_or_1) * u_none


def test_alpha_flow_between_flow_matching_and_meanflow():
    """With alpha = 1 the average velocity is matched to v_g. The residual over alpha becomes
    MeanFlow's as alpha goes to 0: their difference is of the order of alpha.
    """
    net = random_model()
    x0, noise, t, s, y, w = random_inputs(B=5)
    drop = y == 3
    inputs = (net, x0, y, noise, t, s)
    with torch.no_grad():
        of_meanflow = meanflow(*inputs, w, drop, 0.0).error
        differences = []
        for alpha in (1e-3, 1e-4):
            error = alpha_flow(*inputs, t + alpha * (s - t), w, drop).error
            differences.append(rel(error / alpha**2, of_meanflow))
        assert differences[1] < 1e-3
        assert abs(differences[0] / differences[1] - 10) < 0.1

        x_t = x0 + column(t, x0) * (noise - x0)
        v_g = velocity_to_match(net, x_t, noise - x0, t, y, w, drop)
        error = (column(w, x0) * net(x_t, t, s, y, w) - v_g).square().mean((1, 2, 3))
        close(alpha_flow(*inputs, s, w, drop).error, error, 1e-12)
    assert abs(alpha_at(0.0, 0.05) - 1) < 1e-5
    assert alpha_at(0.5, 0.05) == 0.5
    assert abs(alpha_at(0.6, 0.05) - 1 / (1 + math.exp(2.5))) < 1e-12
    assert alpha_at(1.0, 0.05) == 0.05


def test_flow_matching_is_the_fm_term():
    """Flow matching is TVM's second term alone, and is sampled by Euler steps."""
    net = random_model()
    target = random_model(seed=1)
    x0, noise, t, s, y, w = random_inputs(B=5)
    alone = by_name(flow_matching_loss(net, target, x0, y, noise, s, w))
    both = by_name(tvm_loss(net, target, x0, y, noise, t, s, s, w))
    assert list(alone) == ["fm"]
    close(alone["fm"].loss, both["fm"].loss, 1e-12)
    assert torch.equal(alone["fm"].time, s)
    of_alone, of_both = (gradients(terms["fm"].loss.sum(), net) for terms in (alone, both))
    for a, b in zip(of_alone, of_both, strict=True):
        assert nearly_equal(a, b, 1e-10, 1e-13)

    x = noise
    with torch.no_grad():
        for time in (1.0, 0.75, 0.5, 0.25):
            t = torch.full((5,), time, dtype=F64)
            x = x - 0.25 * column(w, x) * net(x, t, t, y, w)
    close(sample.sample(net, noise, y, w, 4, euler=True), x, 1e-12)


def test_other_objectives_train(folder):
    """The checkpoint says how it is sampled, and nonsense is refused."""
    flow_matching = ("--steps=2", "--name=fm", "--objective=flow_matching", *SMALL)
    assert run_script("train.py", *flow_matching) is None
    sampling = ("out/fm/ckpt.safetensors", "--n", 4, "--nfe", 3, "--out", "a.npz")
    assert run_script("sample.py", *sampling) is None
    net, about = load_model("out/fm/ckpt.safetensors")
    assert about["objective"] == "flow_matching"
    x1, y = sample.noise_and_labels(0, range(4), (1, 8, 8), about["data"]["class_counts"])
    w = torch.full((4,), 1.25)
    by_euler = pictures.to_images(sample.sample(net, x1, y, w, 3, euler=True), about["data"])
    assert (images_in("a.npz") == by_euler).all()

    of_meanflow = (
        "--steps=2",
        "--name=mf",
        "--objective=meanflow",
        "--times=two",
        "--p_equal=0.75",
    )
    assert run_script("train.py", *of_meanflow, *SMALL) is None
    assert run_script("sample.py", "out/mf/ckpt.safetensors", "--n", 4, "--out", "b.npz") is None

    assert "objective must be" in run_script("train.py", "--objective=no")
    complaint = run_script("train.py", "--objective=meanflow", "--guidance=inverse", "--w_max=2")
    assert 'meanflow takes guidance "constant"' in complaint
    assert "kappa" in run_script("train.py", "--objective=meanflow", "--kappa=1")
    assert "alpha_min" in run_script("train.py", "--objective=alpha_flow", "--alpha_min=0.0")


# ---- TrainingLoss --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_objective_is_a_function_of_seed_and_place(kind):
    """Two halves of a batch, each with its own place in it, have the terms of the whole batch.

    Backward of one term after the other gives the loss and the gradient of all of them together.
    """
    net = random_model(torch.float32)
    objective = TrainingLoss(
        net,
        copy.deepcopy(net),
        guidance=dict(w=2.0),
        objective=kind,
        times=dict(sampler="two", p_equal=0.5),
    )
    x0 = randn(8, 2, 4, 4, dtype=torch.float32)
    y = torch.arange(8) % 3
    loss, whole = objective(x0, y, *objective.draw(x0, 5))
    halves = []
    for first in (0, 4):
        half = x0[first : first + 4]
        drawn = objective.draw(half, 5, first, 8)
        _, terms = objective(half, y[first : first + 4], *drawn)
        halves.append(terms)
    names = {"tvm": ["terminal", "fm"], "flow_matching": ["fm"]}
    assert list(whole) == names.get(kind, [kind])
    for name, term in whole.items():
        assert term.name == name
        for field in ("loss", "error", "time"):
            of_whole = getattr(term, field)
            of_halves = torch.cat([getattr(half[name], field) for half in halves])
            assert of_whole.norm() > 0
            assert not of_whole.requires_grad
            assert torch.allclose(of_halves, of_whole, rtol=1e-5, atol=1e-6)
        other_times = objective.draw(x0, 6)[1:4]
        assert all((term.time != time).any() for time in other_times)
    close(loss, sum(term.loss for term in whole.values()).mean(), 1e-6)
    if kind in ("tvm", "flow_matching"):  # the others weigh the errors
        close(loss, sum(term.error for term in whole.values()).mean(), 1e-6)

    want = gradients(loss, objective.model)
    in_parts, _ = objective(x0, y, *objective.draw(x0, 5), backward_part=backward)
    backward(in_parts)
    close(in_parts, loss, 1e-7)
    for p, g in zip(trained(objective.model), want, strict=True):
        assert nearly_equal(p.grad, g, 1e-5, 1e-8)


class OwnLoss(TrainingLoss):
    """With one random number more than the objectives here need, and a given last term."""

    def draw(self, x0, *arguments, **options):
        return [*super().draw(x0, *arguments, **options), torch.rand(len(x0))]

    def terms(self, x0, y, x1, t, s, s_fm, w, drop, r):
        error = (self.model(x0, t, t, y, w) - x1).square().mean((1, 2, 3)) * r
        yield Term("first", error, error.detach(), t, early=True)
        error = error.detach() + (self.model(x1, t, t, y, w) ** 2).mean((1, 2, 3))
        yield self.last(error, t)


def test_terms_of_ones_own():
    """What is drawn goes to terms(), whatever that is. Terms of another form are refused."""
    net = random_model(torch.float32)
    objective = OwnLoss(net, copy.deepcopy(net), guidance=dict(w=2.0))
    x0 = randn(4, 2, 4, 4, dtype=torch.float32)

    def step(last):
        objective.last = last
        drawn = objective.draw(x0, 5)
        return objective(x0, torch.arange(4) % 3, *drawn, backward_part=backward)

    loss, terms = step(lambda error, t: Term("second", error, error, t))
    assert loss.requires_grad
    assert list(terms) == ["first", "second"]
    with pytest.raises(ValueError, match=r"term 'penalty': .* each be \(B,\)"):
        step(lambda error, t: Term("penalty", error.mean(), error, t))
    for last in (
        lambda error, t: Term("first", error, error, t),
        lambda error, t: Term("loss", error, error, t),
    ):
        with pytest.raises(ValueError, match="a second .* in the log"):
            step(last)
    empty = types.SimpleNamespace(terms=lambda *inputs: iter([]))
    with pytest.raises(ValueError, match="at least one Term"):
        TrainingLoss.forward(empty, x0, None)
    with pytest.raises(ValueError, match="yields Terms, not a Tensor"):
        step(lambda error, t: error)
    with pytest.raises(ValueError, match="each term of the loss is early"):
        step(lambda error, t: Term("second", error, error, t, early=True))


class Recorder(nn.Module):
    """A model that remembers what it was asked last. Its condition 3 is "no class"."""

    config = types.SimpleNamespace(scaled=True)

    def no_condition(self, y):
        return torch.full_like(y, 3)

    def forward(self, x, t, s, y, w):
        self.y = y
        self.w = w
        return torch.zeros_like(x)

    def jvp(self, x, t, s, y, w, **tangents):
        return self(x, t, s, y, w), torch.zeros_like(x)


@pytest.mark.parametrize("kind", ["tvm", "flow_matching"])
def test_label_dropout(kind):
    """About a tenth of the samples lose their class and their guidance; the others keep both."""
    n = 4000
    net = Recorder()
    objective = TrainingLoss(net, Recorder(), guidance=dict(w=2.0), objective=kind)
    y = torch.arange(n) % 3
    x0 = torch.zeros(n, 1, 2, 2)
    objective(x0, y, *objective.draw(x0, 0))
    dropped = net.y == 3
    assert abs(dropped.double().mean() - 0.1) < 4 * math.sqrt(0.09 / n)
    assert (net.w[dropped] == 1).all()
    assert (net.w[~dropped] == 2).all()
    assert (net.y[~dropped] == y[~dropped]).all()


@pytest.mark.parametrize("kind", ["meanflow", "improved_meanflow", "alpha_flow"])
def test_meanflow_asks_dropped_labels_at_w(kind):
    """MeanFlow drops labels, too, but the network is always given the one w."""
    n = 4000
    net = Recorder()
    objective = TrainingLoss(net, None, guidance=dict(w=2.0), objective=kind)
    x0 = torch.zeros(n, 1, 2, 2)
    objective(x0, torch.arange(n) % 3, *objective.draw(x0, 0))
    assert abs((net.y == 3).double().mean() - 0.1) < 4 * math.sqrt(0.09 / n)
    assert (net.w == 2).all()


def test_times_of_alpha_flow():
    """The third time is a share alpha of the way from t to s. t and s are as ever."""
    x0 = torch.zeros(100, 1, 1, 1)
    times = dict(sampler="two", p_equal=0.3)
    objective = TrainingLoss(None, None, times, objective="alpha_flow")
    _, t, s, r, _, _ = objective.draw(x0, 7, progress=0.6)
    _, plain_t, plain_s, _, _, _ = TrainingLoss(None, None, times).draw(x0, 7)
    assert torch.equal(t, plain_t)
    assert torch.equal(s, plain_s)
    close(t - r, (t - s) / (1 + math.exp(2.5)), 1e-5)


@pytest.mark.parametrize(
    "objective, option",
    [
        ("meanflow", dict(kappa=0.1)),
        ("alpha_flow", dict(alpha_min=0.2)),
        ("tvm", dict(detach_jvp=True)),
    ],
)
def test_options_reach_the_objective(objective, option):
    """The gradient changes with each of them."""
    net = random_model(torch.float32)
    target = copy.deepcopy(net).requires_grad_(False)
    x0 = randn(8, 2, 4, 4, dtype=torch.float32)
    y = torch.arange(8) % 3
    found = []
    for options in ({}, option):
        times = dict(sampler="two")
        module = TrainingLoss(net, target, times, dict(w=2.0), objective=objective, **options)
        net.zero_grad()
        loss, _ = module(x0, y, *module.draw(x0, 5, progress=0.9))
        loss.backward()
        found.append(net.blocks[0].mlp.fc1.weight.grad.clone())
    assert (found[0] - found[1]).norm() > 1e-3 * found[0].norm()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_networks_of_an_objective(objective):
    """networks() are those that the loss runs."""
    net = random_model(torch.float32)
    target = copy.deepcopy(net).requires_grad_(False)
    calls = []
    target.register_forward_hook(lambda *_: calls.append(1))
    loss = TrainingLoss(net, target, guidance=dict(w=2.0), objective=objective)
    x0 = randn(4, 2, 4, 4, dtype=torch.float32)
    loss(x0, torch.arange(4) % 3, *loss.draw(x0, 0))
    assert loss.networks() == ([net, target] if calls else [net])


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_training_step(micro_batches):
    """However a batch is cut, the gradient is that of the whole; then the update, the average."""
    net = random_model(torch.float32)
    whole, average, target = (copy.deepcopy(net) for _ in range(3))
    x0 = randn(8, 2, 4, 4, dtype=torch.float32)
    y = torch.arange(8) % 3
    weights = [p for p in net.parameters() if p.requires_grad]
    step = TrainingStep(
        TrainingLoss(net, target, guidance=dict(w=2.0)),
        [torch.optim.SGD(weights, lr=0.1)],
        [(average, 0.75)],
        torch.device("cpu"),
        micro_batches=micro_batches,
    )
    objective = TrainingLoss(whole, target, guidance=dict(w=2.0))
    before = [p.detach().clone() for p in weights]
    for n in range(2):  # the second step must not see the gradient of the first
        drawn = objective.draw(x0, n)
        whole.load_state_dict(net.state_dict())
        whole.zero_grad()
        objective(x0, y, *drawn)[0].backward()
        parts = zip(*(a.chunk(micro_batches) for a in (x0, y, *drawn)), strict=True)
        for i, part in enumerate(parts):
            step.gradients(*part, is_first=i == 0, is_last=i == micro_batches - 1)
        gradient = [p.grad for p in whole.parameters() if p.requires_grad]
        total = torch.cat([g.flatten() for g in gradient]).norm()
        assert abs(step.gradient_norm() / total - 1) < 1e-5
        for p, g in zip(weights, gradient, strict=True):
            assert (p.grad - g).norm() < 1e-5 * total
        averages = step.averages[0][0]
        wanted = []
        for p, a in zip(weights, averages, strict=True):
            new = p.detach() - 0.1 * p.grad
            wanted.append((new, 0.75 * a + 0.25 * new))
        step.update()
        for p, a, (new, new_average) in zip(weights, averages, wanted, strict=True):
            close(p.detach(), new, 1e-6)
            close(a.detach(), new_average, 1e-6)
    assert any(not torch.equal(p, old) for p, old in zip(weights, before, strict=True))


# ---- seams: data and conditions of any shape -----------------------------------------------------


class AnyShape(nn.Module):
    """A small network for x of any shape and conditions of any shape.

    The condition -1 everywhere is "no condition".
    """

    def __init__(self, shape, condition_shape):
        super().__init__()
        torch.manual_seed(0)
        self.config = types.SimpleNamespace(scaled=True)
        inputs = math.prod(shape) + math.prod(condition_shape) + 3
        self.inner = nn.Linear(inputs, 16, dtype=F64)
        self.outer = nn.Linear(16, math.prod(shape), dtype=F64)

    def forward(self, x, t, s, y, w):
        B = len(x)
        numbers = torch.stack([t, s, 1 / w], dim=1)
        inputs = [x.reshape(B, -1), y.reshape(B, -1).to(F64), numbers]
        return self.outer(torch.tanh(self.inner(torch.cat(inputs, dim=1)))).view_as(x)

    def jvp(self, x, t, s, y, w, dx=None, dt=None, ds=None):
        def at(x, t, s):
            return self(x, t, s, y, w)

        return jvp_of(at, (x, t, s), (dx, dt, ds))

    def no_condition(self, y):
        return torch.full_like(y, -1)


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize(
    "shape, condition_shape",
    [
        ((2, 5), ()),  # sequences (B, C, L) and labels (B,)
        ((2, 4, 6), (3, 4)),  # images and tokens of a caption (B, L, D)
        ((7,), (2,)),
    ],
)
def test_objectives_of_any_shape(shape, condition_shape, kind):
    """Nothing in loss.py takes x0 for images or y for labels.

    The module's terms and gradient are those of the naive loops, with its own draws; labels are
    dropped whole.
    """
    B = 6
    net = AnyShape(shape, condition_shape)
    target = AnyShape(shape, condition_shape)
    with torch.no_grad():
        target.outer.weight += 0.1
    objective = TrainingLoss(net, target, guidance=dict(w=2.0), objective=kind, label_dropout=0.4)
    x0 = randn(B, *shape)
    y = randn(B, *condition_shape, seed=3)
    if not condition_shape:
        y = torch.arange(B)
    drawn = [a.double() if a.is_floating_point() else a for a in objective.draw(x0, 7)]
    noise, t, s, s_fm, w, drop, *_ = drawn
    assert noise.shape == x0.shape
    assert 0 < drop.sum() < B
    loss, terms = objective(x0, y, *drawn)

    asked = y.clone()
    asked[drop] = -1
    w_fm = w.clone()
    w_fm[drop] = 1
    if kind == "meanflow":
        naive = {"meanflow": naive_meanflow(net, x0, asked, noise, t, s, w, drop, 0.5)}
    elif kind == "improved_meanflow":
        naive = {kind: naive_improved_meanflow(net, x0, asked, noise, t, s, w, drop)}
    elif kind == "alpha_flow":
        naive = {kind: naive_alpha_flow(net, x0, asked, noise, t, s, s_fm, w, drop)}
    elif kind in ("tvm", "flow_matching"):
        naive = naive_loss(net, target, x0, asked, noise, t, s, s_fm, w_fm)
    else:
        pytest.skip(f"there is no naive formula for {kind}: write one")
    if kind == "flow_matching":
        del naive["terminal"]
    assert terms.keys() == naive.keys()
    for name, term in terms.items():
        close(term.loss, naive[name], 1e-12)
    reference = gradients(sum(naive.values()).mean(), net)
    for a, b in zip(gradients(loss, net), reference, strict=True):
        close(a, b, 1e-10)


# ---- the rehearsal -------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="kills processes as Linux does")
def test_rehearsal(folder, source, capsys, monkeypatch):
    """The whole way on small files.

    JPEGs become latents, once in one go, and once by a run that is killed and two ranks that finish
    it. A network is trained on them, by one process and by two ranks, and sampled by two ranks.
    The samples are scored.
    """
    vae = source / "vae"
    arguments = ["imagenet", source / "src", "--size", 32, "--vae", vae, "--vae-name", "tiny"]
    assert run_script("prepare.py", *arguments, "--batch", 1, "--name", "whole") is None
    encoded = kill_while_encoding(*arguments, "--batch", 1, "--name", "cut")
    refuse_to_go_on(arguments, monkeypatch)
    finished = torchrun("prepare.py", *arguments, "--batch", 1, "--name", "cut")
    assert f"| {encoded}/200 [" in finished.stderr.decode()
    header = same_data("whole", "cut")

    train_on_latents(header, vae)
    images = sample_latents(vae)
    save_inception("inception.pth")
    score(source, images, vae, capsys)


def kill_while_encoding(*arguments):
    """Kill prepare.py when 20 images are encoded, and see its workers end. Returns how many are."""
    process = subprocess.Popen(
        [sys.executable, os.path.join(HERE, "prepare.py"), *map(str, arguments)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    partial = "data/cut.partial"

    def some_are_encoded():
        begun = os.path.exists(f"{partial}/plan.json")
        return begun and np.count_nonzero(np.load(f"{partial}/done.npy")) >= 20

    until(some_are_encoded, "20 encoded images")
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
        workers = f.read().split()
    process.kill()
    process.wait()
    assert workers
    until(lambda: not any(running(pid) for pid in workers), "the end of its workers", 2)
    encoded = np.count_nonzero(np.load(f"{partial}/done.npy"))
    assert 20 <= encoded < 200
    assert not os.path.exists("data/cut")
    return encoded


def refuse_to_go_on(arguments, monkeypatch):
    """What prepare.py says where it must not go on with data/cut.partial, and leaves as it is."""
    same = [*arguments, "--batch", 1, "--name", "cut"]
    other_batch = [*arguments, "--batch", 2, "--name", "cut"]

    assert "begun with another batch" in run_script("prepare.py", *other_batch)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        torchrun("prepare.py", *other_batch)
    said = failed.value.stderr.decode()
    assert said.count("begun with another batch") == 2  # both ranks say why

    def another_run_ends_first(path, seconds):
        lock = files.hold(path, seconds)
        os.makedirs("data/late")
        shutil.copy("data/whole/header.json", "data/late")
        return lock

    with monkeypatch.context() as patch:
        patch.setattr(claims, "hold", another_run_ends_first)
        complaint = run_script("prepare.py", *arguments, "--batch", 1, "--name", "late")
    assert "another run made it" in complaint
    assert not os.path.exists("data/late.partial")

    def hold_without_waiting(path, seconds):
        return files.hold(path, 0)

    with files.hold("data/cut.partial", 0), monkeypatch.context() as patch:
        patch.setattr(claims, "hold", hold_without_waiting)
        complaint = run_script("prepare.py", *same)
    assert "data/cut: process" in complaint
    assert "is at work in" in complaint

    file = "data/cut.partial/train_images.npy"
    with open(file, "rb") as f:
        whole = f.read()
    os.truncate(file, 5000)
    assert "cannot write data/cut: mmap length" in run_script("prepare.py", *same)
    assert os.path.getsize(file) == 5000
    with open(file, "wb") as f:
        f.write(whole)


def same_data(one, other):
    """Two datasets are the same bytes, but for their names. Returns the header of `other`."""
    for file in os.listdir(f"data/{one}"):
        if file != "header.json":
            with open(f"data/{one}/{file}", "rb") as f, open(f"data/{other}/{file}", "rb") as g:
                assert f.read() == g.read(), file
    header, _ = dataset.load_dataset(f"data/{one}")
    other_header, _ = dataset.load_dataset(f"data/{other}")
    assert {**header, "name": other} == other_header
    assert not os.path.exists(f"data/{other}.partial")
    return other_header


def train_on_latents(header, vae):
    """20 steps in one process, and again on two ranks: the same losses, for they draw the same."""
    flags = (
        "--dataset=cut",
        "--vae=tiny",
        f"--vae_files={vae}",
        "--steps=20",
        "--hidden_size=32",
        "--depth=1",
        "--num_heads=2",
        "--batch_size=16",
        "--muon_lr=0",
        "--log_every=5",
        "--ema_eval=0.9",
    )
    assert run_script("train.py", *flags) is None
    torchrun("train.py", *flags, "--name=two")
    losses = logged_losses("cut")
    assert len(losses) == 4
    assert np.allclose(losses, logged_losses("two"), rtol=1e-5)
    about = load_model("out/cut/ckpt.safetensors")[1]
    assert about["data"] == header
    assert about["step"] == 20
    assert about["config"]["in_channels"] == 4


def sample_latents(vae):
    """24 samples on two ranks, which are those of one process to a level. Returns the images."""
    small_batches = ("--n", 24, "--batch", 12, "--nfe", 2)  # a batch for each rank
    sampling = ("out/cut/ckpt.safetensors", *small_batches, "--vae", vae, "--out")
    torchrun("sample.py", *sampling, "samples.npz")
    assert run_script("sample.py", *sampling, "one.npz") is None
    images = images_in("samples.npz")
    assert images.shape == (24, 32, 32, 3)
    assert images.dtype == np.uint8
    assert images.std() > 1
    assert np.abs(images.astype(int) - images_in("one.npz")).max() <= 1
    return images


def save_inception(path):
    """An Inception network with random weights whose features vary with the image."""
    torch.manual_seed(0)
    net = InceptionV3()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.save(net.state_dict(), path)


def score(source, images, vae, capsys):
    """Statistics of 20 real images, the scores of samples, and FID without keeping samples."""
    with_weights = ("--inception", "inception.pth")
    os.mkdir("real")
    for path in sorted((source / "src").rglob("*0.JPEG")):
        shutil.copy(path, f"real/{path.parent.name}-{path.name}")
    assert run_script("fid.py", "--save-stats", "real", "real.npz", *with_weights) is None
    with np.load("real.npz", allow_pickle=False) as statistics:
        assert statistics["mu"].shape == (2048,)
        assert statistics["sigma"].shape == (2048, 2048)

    capsys.readouterr()
    assert run_script("fid.py", "samples.npz", "real", *with_weights) is None
    number = r"([0-9.]+)"
    pattern = f"FID {number} .*Inception Score {number} .*precision {number}, recall {number}"
    said = re.search(pattern, capsys.readouterr().out, re.DOTALL)
    fid, inception_score, precision, recall = (float(text) for text in said.groups())
    assert fid > 0
    assert inception_score >= 1
    assert 0 <= precision <= 1
    assert 0 <= recall <= 1

    # Eight of the samples from a file, and the same eight drawn for the score alone.
    np.savez("eight.npz", arr_0=images[:8])
    assert run_script("fid.py", "eight.npz", "real.npz", *with_weights) is None
    sampling = ("out/cut/ckpt.safetensors", "--n", 8, "--nfe", 2, "--vae", vae)
    assert run_script("sample.py", *sampling, "--fid", "real.npz", *with_weights) is None
    said = capsys.readouterr().out
    found = re.findall(rf"FID {number} .*\(too few images: 8 <= 2048\)", said)
    kept, not_kept = (float(text) for text in found)
    assert abs(not_kept / kept - 1) < 1e-2  # the same images, to a level


# ---- on a GPU ------------------------------------------------------------------------------------


def in_bfloat16(enabled=True):
    return torch.autocast("cuda", torch.bfloat16, enabled=enabled)


def step_gradients(device, dtype, half=False, compiled=False):
    """{name: float64} of the loss and of all gradients of one training step.

    compiled: as train.py makes them, which means that each term goes backward before the next,
    the blocks are compiled, and all of it is a CUDA graph.
    """
    net = random_model(depth=3, hidden_size=64).to(device, dtype)
    target = copy.deepcopy(net)
    module = TrainingLoss(net, target)
    x0, noise, t, s, y, w = (a.to(device) for a in random_inputs(6, dtype=dtype))
    drop = torch.zeros_like(w, dtype=torch.bool)
    inputs = (x0, y, noise, t, s, s.flip(0), w, drop)

    def step(*inputs):
        net.zero_grad()
        with in_bfloat16(half):
            loss, _ = module(*inputs, backward_part=backward)
        backward(loss)
        return loss.detach()

    if compiled:
        torch._dynamo.reset()
        compile_blocks(net, target)
        loss = Graph(step, inputs)(*inputs)
    else:
        with in_bfloat16(half):
            loss, _ = module(*inputs)
        loss.backward()
    found = {"loss": loss.detach().double().cpu()}
    for name, p in net.named_parameters():
        if p.requires_grad:
            found[name] = p.grad.double().cpu()
    return found


def all_gradients(step):
    return torch.cat([g.flatten() for name, g in step.items() if name != "loss"])


@gpu
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_gradients_in_float32(compiled, kernels, monkeypatch):
    """The loss and every gradient of a training step, against float64 on the CPU.

    With and without the kernels of fused.py.
    """
    monkeypatch.setattr(fused, "FUSED", kernels)
    reference = step_gradients("cpu", F64)
    found = step_gradients("cuda", torch.float32, compiled=compiled)
    for name in reference:
        close(found[name], reference[name], 1e-4)


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_gradients_in_bfloat16(compiled, monkeypatch):
    """The same in bfloat16, over all gradients together.

    A gradient that nearly cancels has no relative accuracy of its own there. The kernels' error is
    not above that of PyTorch's operations.
    """
    reference = step_gradients("cpu", F64)
    kernels = step_gradients("cuda", torch.float32, half=True, compiled=compiled)
    monkeypatch.setattr(A, "FUSED", False)
    monkeypatch.setattr(fused, "FUSED", False)
    plain = step_gradients("cuda", torch.float32, half=True)
    of_gradients, of_loss = [], []
    for found in (kernels, plain):
        of_gradients.append(rel(all_gradients(found), all_gradients(reference)))
        of_loss.append(rel(found["loss"], reference["loss"]))
    print("relative errors, kernels and plain: gradients", of_gradients, "loss", of_loss)
    assert of_gradients[0] < 2e-2
    assert of_gradients[0] < 1.1 * of_gradients[1]
    assert of_loss[0] < max(1.1 * of_loss[1], 2**-9)


@gpu
def test_gpu_training(folder):
    """train.py, and sample.py with the same images as on the CPU, to a level."""
    assert run_script("train.py", "--steps=3", *SMALL) is None
    sampling = ("out/digits/ckpt.safetensors", "--n", 5, "--out")
    assert run_script("sample.py", *sampling, "a.npz", "--precision", "float32") is None
    assert run_script("sample.py", *sampling, "b.npz", "--device", "cpu") is None
    assert np.abs(images_in("a.npz").astype(int) - images_in("b.npz")).max() <= 1


# At their own learning rate, 2e-3, these 40 steps amplify rounding to between 0.004 and 0.03, with
# the kernels of fused.py and without.
SLOWLY = "--lr=2e-4"


def losses_of_40_steps(name, *flags):
    assert run_script("train.py", f"--name={name}", "--steps=40", *flags, *SMALL) is None
    losses = logged_losses(name)
    assert len(losses) == 40
    return losses


def largest_difference(losses, others):
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))


@gpu
def test_gpu_trainings_are_alike(folder):
    """The losses of 40 steps in bfloat16, where a batch is taken in two ways, and without graphs.

    Halves of a batch are accumulated, with a graph for each half. They are compared with whole
    batches, as a graph and not.
    """
    halves = losses_of_40_steps("halves", SLOWLY, "--micro_batch=4")
    whole = losses_of_40_steps("whole", SLOWLY)
    eager = losses_of_40_steps("eager", SLOWLY, "--graph=False")
    assert largest_difference(halves, whole) < 1e-3
    assert largest_difference(halves, eager) < 1e-3


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here")
def test_gpu_trainings_on_two_gpus_are_alike(folder):
    """One GPU that takes halves, or quarters, and two ranks that take one, or two, each.

    The first rank is late after each step, since it writes the log.
    """
    for images in (4, 2):
        flags = (SLOWLY, f"--micro_batch={images}")
        alone = losses_of_40_steps(f"alone-{images}", *flags)
        name = f"ranks-{images}"
        torchrun("train.py", f"--name={name}", "--steps=40", *SMALL, *flags)
        losses = logged_losses(name)
        assert len(losses) == 40
        assert largest_difference(alone, losses) < 1e-3


@gpu
def test_gpu_fast_sampling():
    """bfloat16 against float32. Weights that are rounded beforehand give what weights give that
    autocast rounds at every call."""
    net = random_model(torch.float32, depth=3, hidden_size=64).cuda()
    _, noise, _, _, y, w = (a.cuda() for a in random_inputs(6, dtype=torch.float32))
    exact = sample.sample(net, noise, y, w, 2)
    assert torch.equal(sample.make_sampler(net, 2, bfloat16=False)(noise, y, w), exact)
    with torch.autocast("cuda", torch.bfloat16):
        wanted = sample.sample(net, noise, y, w, 2)
    assert wanted.dtype == F64
    assert not torch.equal(wanted, exact)
    close(wanted, exact, 2e-2)
    run = sample.make_sampler(net, 2)
    assert torch.equal(run(noise, y, w), wanted)
    for part in (slice(0, 3), slice(3, 6)):
        close(run(noise[part], y[part], w[part]), wanted[part], 1e-2)


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_graph_gpu(compiled):
    """A CUDA graph of the loss and its gradients gives what they are without it.

    That holds for other inputs than it was made with.
    """
    model = random_model(torch.float32).cuda()
    model.checkpoint_blocks = 1
    if compiled:
        model.run_block = torch.compile(Block.forward, fullgraph=True, dynamic=False)
    target = copy.deepcopy(model).requires_grad_(False)
    module = TrainingLoss(model, target, guidance=dict(w=2.0))
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}

    def step(*inputs):
        model.zero_grad()
        with in_bfloat16():
            loss, terms = module(*inputs, backward_part=backward)
        backward(loss)
        return loss.detach(), terms

    def batch(seed):
        x0 = torch.randn(6, 2, 4, 4, generator=seeded(seed)).cuda()
        y = (torch.arange(6) % 3).cuda()
        return x0, y, *module.draw(x0, seed)

    def results(function, seed):
        """Copies of all that a step gives, by name."""
        loss, terms = function(*batch(seed))
        found = {"loss": loss.clone()}
        for name, term in terms.items():
            for field in ("loss", "error", "time"):
                found[f"{name}.{field}"] = getattr(term, field).clone()
        for key, p in parameters.items():
            found[key] = p.grad.clone()
        return found

    graph = Graph(step, batch(0))
    by_graph = {seed: results(graph, seed) for seed in (1, 2)}
    for seed in (1, 2):
        for key, want in results(step, seed).items():
            if want.norm() > 0:
                assert rel(by_graph[seed][key], want) < 1e-5, key
