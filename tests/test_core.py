"""..."""
from inception import InceptionV3
import copy
import math
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import scipy.linalg
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
    log_lines,
    randn,
    random_inputs,
    random_model,
    rel,
    run_script,
    running,
    torchrun,
    until,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

import attention_jvp as A
import checkpoint as ckpt
import dataset
import dual
import files
import inception
import model as m
import sample as s
from device import Graph
from dual import Dual
from loss import (
    TVM,
    backward,
    flow_matching_loss,
    meanflow_loss,
    sample_guidance,
    sample_times,
    tvm_loss,
)
from model import Block, DiT, DiTConfig


@pytest.mark.parametrize("ours, reference", [
    (dual.silu, F.silu),
    (dual.gelu, lambda x: F.gelu(x, approximate="tanh")),
    (dual.rms_norm, lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6)),
    (lambda x: dual.rms_norm(x, torch.arange(8.0, dtype=F64)), lambda x: F.rms_norm(x, x.shape[-1:], torch.arange(8.0, dtype=F64), 1e-6)),
    (dual.layer_norm, lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6)),
    (lambda x: x * x + x * 2 - (1 + x), lambda x: x * x + 2 * x - (1 + x)),
])
def test_rules(ours, reference):
    x, dx = 2 * randn(5, 8), randn(5, 8, seed=1)
    value, tangent = torch.func.jvp(reference, (x,), (dx,))
    dual = ours(Dual(x, dx))
    close(dual.value, value, 1e-14), close(dual.tangent, tangent, 1e-14)
    close(ours(x), value, 1e-14)


@pytest.mark.parametrize("kwargs", [{}, dict(semi_lipschitz=False), dict(num_classes=0), dict(depth=1, num_heads=4, patch_size=1)])
def test_network_derivative(kwargs):
    """dF along x, t and s against PyTorch's own forward mode and central differences."""
    net = random_model(**kwargs)
    x, dx, t, s_, y, w = random_inputs(num_classes=net.config.num_classes)
    dt, ds = randn(3, seed=4), randn(3, seed=5)
    value, dF = net.jvp(x, t, s_, y, w, dx, dt, ds)
    assert value.dtype == F64 and value.shape == x.shape
    f = lambda x, t, s_: net(x, t, s_, y, w)
    close(value, f(x, t, s_), 1e-13)
    close(dF, torch.func.jvp(f, (x, t, s_), (dx, dt, ds))[1], 1e-12)
    h = 1e-5
    close(dF, (f(x + h * dx, t + h * dt, s_ + h * ds) - f(x - h * dx, t - h * dt, s_ - h * ds)) / (2 * h), 1e-7)
    only_s = net.jvp(x, t, s_, y, w, ds=torch.ones_like(s_))[1]
    close(only_s, (f(x, t, s_ + h) - f(x, t, s_ - h)) / (2 * h), 1e-7)


def test_gradient_through_the_derivative():
    """Reverse over forward against reverse over (reverse over reverse)."""
    net = random_model()
    x, R, t, s_, y, w = random_inputs()
    parameters = [p for p in net.parameters() if p.requires_grad]
    value, dF = net.jvp(x, t, s_, y, w, ds=torch.ones_like(s_))
    ours = torch.autograd.grad((dF * R).sum() + (value * R.sin()).sum(), parameters)

    with sdpa_kernel(SDPBackend.MATH):                                # the flash kernel has no second derivative
        s_ = s_.clone().requires_grad_()
        value = net(x, t, s_, y, w)
        probe = torch.zeros_like(value, requires_grad=True)
        along, = torch.autograd.grad(value, s_, probe, create_graph=True)       # J^T probe, linear in probe
        dF, = torch.autograd.grad(along.sum(), probe, create_graph=True)        # its derivative is J 1
        reference = torch.autograd.grad((dF * R).sum() + (value * R.sin()).sum(), parameters)
    for a, b in zip(ours, reference):
        close(a, b, 1e-10)


def test_parameter_names_and_count():
    with torch.device("meta"):
        net = DiT(DiTConfig.named("XL/2", input_size=32, in_channels=4, num_classes=1000))
    assert sum(p.numel() for p in net.parameters()) == 678_363_408
    both = lambda *names: [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    names = ["pos_embed", "y_embedder.embedding_table.weight"] + both("x_embedder.proj", "final_layer.adaLN_modulation.1", "final_layer.linear")
    names += both(*(f"{e}_embedder.mlp.{i}" for e in ("t", "s", "guidance") for i in (0, 2)))
    for i in range(28):
        names += both(*(f"blocks.{i}.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")))
        names += [f"blocks.{i}.attn.{part}_norm.weight" for part in "qk"]
    assert sorted(net.state_dict()) == sorted(names)
    assert net.pos_embed.shape == (1, 256, 1152) and net.x_embedder.proj.weight.shape == (1152, 4, 2, 2)


@pytest.mark.parametrize("time_init", ["spectral", "normal"])
def test_initialization(time_init):
    torch.manual_seed(0)
    net = DiT(DiTConfig.named("S/2", depth=2, time_init=time_init))
    for name, p in net.named_parameters():
        if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
            assert not p.any(), name
        elif "embedder.mlp" in name and time_init == "normal" or "embedding_table" in name:
            assert abs(p.std().item() - 0.02) < 4 * 0.02 / math.sqrt(2 * p.numel()), name
        elif name == "x_embedder.proj.weight":
            fan = sum(p.flatten(1).shape)
            assert abs(p.std().item() - math.sqrt(2 / fan)) < 4 * math.sqrt(2 / fan) / math.sqrt(2 * p.numel())
        elif name.endswith("_norm.weight"):
            assert (p == 1).all()
        elif name.endswith("weight"):
            assert abs(np.linalg.norm(p.detach().double().numpy(), 2) - 1) < 1e-5, name


def test_positions_and_time_features():
    table, D = m.positions(3, 16), 16
    for row, column, j in [(0, 0, 0), (2, 1, 1), (1, 2, 3)]:
        omega, token = 10000 ** (-j / (D / 4)), table[0, 3 * row + column]
        expected = [math.sin(column * omega), math.cos(column * omega), math.sin(row * omega), math.cos(row * omega)]
        assert np.allclose([token[j + i * D // 4] for i in range(4)], expected, atol=1e-7)
    features = m.Embedder.features(torch.tensor([0.3]))
    assert features.shape == (1, 256) and features.dtype == F64
    a = float(np.float32(0.3)) * 10000 ** (-5 / 128)
    assert abs(features[0, 5] - math.cos(a)) < 1e-14 and abs(features[0, 133] - math.sin(a)) < 1e-14


def test_patches_go_back_where_they_came_from():
    """With blocks that do nothing, output patch i depends on input patch i alone."""
    net = random_model(depth=1)
    with torch.no_grad():
        for p in net.blocks.parameters():
            p.zero_()
    x, _, t, s_, y, w = random_inputs()
    moved = x.clone()
    moved[:, 1, 0, 3] += 1                                            # patch (0, 1)
    where = (net(moved, t, s_, y, w) - net(x, t, s_, y, w)).abs().sum((0, 1)) > 1e-9
    assert where[:2, 2:].all() and where.sum() == 4


@pytest.mark.parametrize("kwargs, word", [(dict(hidden_size=30), "hidden_size 30"), (dict(patch_size=3), "patch_size"), (dict(num_heads=5), "num_heads"),
                                          (dict(time_init="no"), "time_init"), (dict(depth=0), "depth"), (dict(num_classes=-1), "num_classes")])
def test_config_refuses(kwargs, word):
    with pytest.raises(ValueError, match=word):
        DiTConfig.named("tiny", **{**TINY, **kwargs})
    with pytest.raises(ValueError, match="XL/2"):
        DiTConfig.named("XXL/2")


def test_switches_and_what_is_embedded():
    """Each norm is there or not as the config says; the embedders get t, t - s and 1/w; positions are fixed; threads are given back."""
    x, c = randn(2, 4, 32), randn(2, 32)
    for on in (True, False):
        assert DiTConfig.named("tiny", semi_lipschitz=on, **TINY) == DiTConfig.named("tiny", rms_norm=on, qk_norm=on, mod_norm=on, **TINY)
        net = random_model(semi_lipschitz=on)
        for block in (net.blocks[0], net.final_layer):
            rms = torch.stack(block.modulation(c)).square().mean(-1).sqrt()
            assert (block.norm(x + 3).mean(-1).abs().max() > 0.5) == on == ((rms - 1).abs().max() < 1e-3)
        assert (net.blocks[0].attn.q_norm is not None) == on and not net.pos_embed.requires_grad
    asked, (x, _, t, s_, y, w), threads = {}, random_inputs(), torch.get_num_threads()
    torch.set_num_threads(2)
    net = random_model()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    for name in ("t", "s", "guidance"):
        net.get_submodule(name + "_embedder").register_forward_pre_hook(lambda module, a, name=name: asked.update({name: a[0]}))
    net(x, t, s_, y, w)
    assert all(torch.equal(asked[name], a) for name, a in (("t", t), ("s", t - s_), ("guidance", 1 / w)))


def test_which_blocks_are_checkpointed():
    """Two of two run again where there is a derivative, one of two where not."""
    net, passes = random_model(), []
    net.checkpoint_blocks, net.run_block = 2, lambda block, x, c: (passes.append(isinstance(c, Dual)), Block.forward(block, x, c))[1]
    loss_gradients(net)
    assert (passes.count(True), passes.count(False)) == (4, 3)




@pytest.mark.parametrize("w", [1.0, 2.0])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
def test_gaussian_data(scaled, c, w):
    """The exact flow map has no terminal loss, and a flow-matching loss of c^2 / v_s' in the mean. At any w:
    where all classes are alike guidance changes no velocity, so the network is the same one over k, and
    the residual of the fm term is w (F - v) in place of F - v, which 1/w^2 takes back."""
    n, shape, mean = 4000, (2, 3, 3), 0.7
    x0, noise = mean + c * randn(n, *shape), randn(n, *shape, seed=1)
    t, s_, s_fm = (a.double() for a in sample_times(n, generator=torch.Generator().manual_seed(0)))
    guide, y = torch.full((n,), w, dtype=F64), torch.zeros(n, dtype=torch.long)
    flow = GaussianFlow(mean, c, scaled)
    terms = dict(tvm_loss(flow, flow, x0, noise, y, guide, t, s_, s_fm))
    assert terms["terminal"].max() < 1e-12
    r = s_fm.view(-1, 1, 1, 1)
    variance = (1 - r) ** 2 * c * c + r * r
    residual = (r * (x0 - mean) - (1 - r) * c * c * noise) / variance           # by hand, from F - v
    close(terms["fm"], residual.square().mean((1, 2, 3)), 1e-12)
    ratio = (terms["fm"] / (c * c / variance.flatten())).mean().item()          # each a chi^2_18 / 18 in distribution
    assert abs(ratio - 1) < 4 * math.sqrt(2 / 18 / n)


def naive_loss(net, target, x0, x1, y, w, t, s_, s_fm):
    """One sample after the other, the derivative by PyTorch's forward mode, straight from the paper."""
    terminal, fm = [], []
    for i in range(len(x0)):
        one = lambda a: a[i:i + 1]
        k = w[i] if net.config.scaled else 1.0
        call = lambda net, x, t, s_, c=y[i], w=w[i]: net(x, t.view(1), s_.view(1), c.view(1), w.view(1))
        x_t = (1 - t[i]) * one(x0) + t[i] * one(x1)
        f = lambda r: (r - t[i]) * k * call(net, x_t, t[i], r)
        displacement, df = torch.func.jvp(f, (s_[i],), (torch.ones_like(s_[i]),))
        u = k * call(target, (x_t + displacement).detach(), s_[i], s_[i])
        terminal.append(((df - u.detach()) ** 2).mean() / w[i] ** 2 if t[i] != s_[i] else torch.zeros((), dtype=F64))
        r, none = s_fm[i], torch.tensor(net.config.num_classes)
        x_r = (1 - r) * one(x0) + r * one(x1)
        guided = w[i] * (one(x1) - one(x0)) + (1 - w[i]) * call(target, x_r, r, r, none, torch.ones_like(w[i]))
        fm.append(((k * call(net, x_r, r, r) - guided.detach()) ** 2).mean() / w[i] ** 2)
    return {"terminal": torch.stack(terminal), "fm": torch.stack(fm)}


@pytest.mark.parametrize("scaled", [False, True])
def test_loss_against_a_naive_one(scaled):
    net, target = random_model(scaled=scaled), random_model(scaled=scaled, seed=1)
    x0, noise, t, s_, y, w = random_inputs(B=5)
    s_[2] = t[2]
    s_fm = torch.rand(5, dtype=F64, generator=torch.Generator().manual_seed(9))
    ours, naive = dict(tvm_loss(net, target, x0, noise, y, w, t, s_, s_fm)), naive_loss(net, target, x0, noise, y, w, t, s_, s_fm)
    assert ours["terminal"][2] == 0 and (ours["terminal"][[0, 1, 3, 4]] > 0).all()
    for term in ("terminal", "fm"):
        close(ours[term], naive[term], 1e-12)
    parameters = [p for p in net.parameters() if p.requires_grad]
    gradients = lambda terms: torch.autograd.grad(sum(term.sum() for term in terms.values()), parameters)
    expected, cut = gradients(naive), gradients(dict(tvm_loss(net, target, x0, noise, y, w, t, s_, s_fm, detach_jvp=True)))
    for a, b in zip(gradients(ours), expected):
        close(a, b, 1e-10)
    assert any((a - b).norm() > 0.01 * b.norm() for a, b in zip(cut, expected))
    assert all(p.grad is None for p in target.parameters())


def truncated(s_, top, mu, sigma):
    """Uniform on [0, 1] where s is a logit-normal truncated to s <= top."""
    cdf = lambda x: scipy.stats.norm.cdf((scipy.special.logit(x) - mu) / sigma)
    return cdf(s_) / cdf(top)


@pytest.mark.parametrize("sampler, mu, sigma", [("gap*", -0.8, 1.0), ("gap", -0.5, 0.7), ("trunc", 1.0, 1.0), ("clamp", 1.0, 1.2), ("two", 0.0, 1.0)])
def test_time_samplers(sampler, mu, sigma):
    n, mu_s, sigma_s = 20000, -0.4, 0.9
    times = sample_times(n, sampler=sampler, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, generator=torch.Generator().manual_seed(0))
    assert all(a.dtype == torch.float32 and a.shape == (n,) and 0 <= a.min() and a.max() <= 1 for a in times)
    t, s_, s_fm = (a.double().numpy() for a in times)
    assert (s_ <= t).all()
    p = lambda sample, cdf: scipy.stats.kstest(sample, cdf).pvalue
    normal = scipy.stats.norm.cdf
    logit_normal = lambda mu, sigma: lambda x: normal((scipy.special.logit(x) - mu) / sigma)
    if sampler in ("gap", "gap*"):
        inside = slice(None)
        first, u = t - s_, truncated(s_, 1 - (t - s_), mu_s, sigma_s)
    elif sampler == "trunc":
        first, u = t, truncated(s_, t, mu_s, sigma_s)
    elif sampler == "two":
        one = logit_normal(mu_s, sigma_s)
        assert p(t, lambda x: one(x) ** 2) > 1e-3 and p(s_, lambda x: 1 - (1 - one(x)) ** 2) > 1e-3
        first, u, mu, sigma = np.concatenate([t[::2], s_[1::2]]), None, mu_s, sigma_s     # of independent pairs, one each
    else:
        first = t
        both = lambda x: 1 - (1 - logit_normal(mu_s, sigma_s)(x)) * (1 - logit_normal(mu, sigma)(x))
        assert p(s_, both) > 1e-3                                     # the smaller of the two draws
        u = None
    assert p(first, logit_normal(mu, sigma)) > 1e-3
    if u is not None:
        assert p(u, "uniform") > 1e-3 and abs(np.corrcoef(u, first)[0, 1]) < 4 / math.sqrt(n)
    if sampler == "gap*":
        assert p(s_fm, logit_normal(mu_s, sigma_s)) > 1e-3 and abs(np.corrcoef(s_fm, s_)[0, 1]) < 4 / math.sqrt(n)
    else:
        assert (s_fm == s_).all()
    t, s_, _ = sample_times(n, sampler=sampler, p_equal=0.3, mu=mu, generator=torch.Generator().manual_seed(1))
    exact = (sample_times(n, sampler=sampler, mu=mu, generator=torch.Generator().manual_seed(1))[:2])
    share = (exact[0] == exact[1]).double().mean().item()
    assert abs((t == s_).double().mean().item() - (share + 0.3 * (1 - share))) < 4 * math.sqrt(0.21 / n)


def test_guidance_samplers():
    draw = lambda sampler: sample_guidance(20000, sampler=sampler, w=2.0, w_min=1.0, w_max=4.0, generator=torch.Generator().manual_seed(0)).double().numpy()
    assert (draw("constant") == 2).all()
    assert scipy.stats.kstest(1 / draw("inverse"), scipy.stats.uniform(0.25, 0.75).cdf).pvalue > 1e-3
    assert scipy.stats.kstest(draw("uniform"), scipy.stats.uniform(1, 3).cdf).pvalue > 1e-3
    for f in (sample_guidance, sample_times):
        with pytest.raises(ValueError, match="not 'no'"):
            f(2, sampler="no")


@pytest.mark.parametrize("kind", ["tvm", "meanflow", "flow_matching"])
def test_objective_is_a_function_of_seed_and_place(kind):
    net = random_model(torch.float32)
    objective = TVM(net, copy.deepcopy(net), guidance=dict(w=2.0), objective=kind, times=dict(sampler="two", p_equal=0.5))
    x0, y = randn(8, 2, 4, 4, dtype=torch.float32), torch.arange(8) % 3
    whole = objective(x0, y, *objective.draw(x0, 5))
    halves = [objective(x0[i:i + 4], y[i:i + 4], *objective.draw(x0[i:i + 4], 5, i, 8)) for i in (0, 4)]
    for key in ("terminal", "fm", "t", "s_fm"):
        assert kind == "flow_matching" and key == "terminal" or whole[key].norm() > 0
        assert torch.allclose(torch.cat([half[key] for half in halves]), whole[key], rtol=1e-5, atol=1e-6)
    if kind != "meanflow":                                            # which weighs the errors
        close(whole["loss"], (whole["terminal"] + whole["fm"]).mean(), 1e-6)
    assert (whole["t"] != objective.draw(x0, 6)[1]).any()

    parameters = [p for p in objective.model.parameters() if p.requires_grad]
    want = torch.autograd.grad(whole["loss"], parameters)
    parts = objective(x0, y, *objective.draw(x0, 5), backward=lambda part: part.backward() or part.detach())     # one after the other
    close(parts["loss"], whole["loss"], 1e-7)
    for p, g in zip(parameters, want):
        assert (p.grad - g).norm() <= 1e-5 * g.norm() + 1e-8


class Recorder:
    """A model that remembers what it was asked."""
    config = types.SimpleNamespace(scaled=True, num_classes=3)

    def __call__(self, x, t, s_, y, w):
        self.y, self.w = y, w
        return torch.zeros_like(x)

    def jvp(self, x, t, s_, y, w, ds):
        return self(x, t, s_, y, w), torch.zeros_like(x)


def test_label_dropout():
    """About a tenth of the samples lose their class and their guidance; the others keep both."""
    n, net = 4000, Recorder()
    objective = TVM(torch.nn.Identity(), torch.nn.Identity(), guidance=dict(w=2.0))
    objective.model = objective.target = None                        # Recorder is no module
    object.__setattr__(objective, "model", net), object.__setattr__(objective, "target", Recorder())
    y = torch.arange(n) % 3
    x0 = torch.zeros(n, 1, 2, 2)
    objective(x0, y, *objective.draw(x0, 0))
    dropped = net.y == 3
    assert abs(dropped.double().mean() - 0.1) < 4 * math.sqrt(0.09 / n)
    assert (net.w[dropped] == 1).all() and (net.w[~dropped] == 2).all() and (net.y[~dropped] == y[~dropped]).all()


def test_times_that_become_equal():
    """With p_equal t becomes s, but s becomes t with "two"; nothing else changes."""
    for sampler in ("gap*", "two"):
        draw = lambda p: sample_times(2000, sampler=sampler, p_equal=p, generator=torch.Generator().manual_seed(1))
        (t, s_, s_fm), exact = draw(0.3), draw(0.0)
        assert (t == exact[0]).all() and (s_fm == s_).all() if sampler == "two" else (s_ == exact[1]).all() and (s_fm == exact[2]).all()
    for f, bad in ((sample_times, dict(sigma=0.0)), (sample_times, dict(sigma_s=-1.0)), (sample_guidance, dict(w_min=0.0)),
                   (sample_guidance, dict(sampler="uniform", w_min=2.0, w_max=1.0))):
        with pytest.raises(ValueError, match="must be above 0"):
            f(2, **bad)


def test_detach_jvp_cuts_the_derivative_alone():
    net, target = random_model(), random_model(seed=1)
    x0, noise, t, s_, y, w = random_inputs(B=5)
    parameters = [p for p in net.parameters() if p.requires_grad]
    gradients = lambda **options: torch.autograd.grad(
        sum(term.sum() for term in dict(tvm_loss(net, target, x0, noise, y, w, t, s_, s_, **options)).values()), parameters)
    cut, jvp = gradients(detach_jvp=True), net.jvp
    net.jvp = lambda *arguments, **tangents: (lambda F, dF: (F, dF.detach()))(*jvp(*arguments, **tangents))
    for a, b in zip(cut, gradients()):
        close(a, b, 1e-12)


@pytest.mark.parametrize("w", [1.0, 2.0])
@pytest.mark.parametrize("scaled", [False, True])
def test_meanflow_on_gaussian_data(scaled, w):
    """The exact mean velocity satisfies MeanFlow's identity along the marginal velocity, and so the error is zero for
    pairs whose v is that. For others, by hand: the error is (1 + (s-t) dF/dx) (v~ - u), with v~ - u = omega (v - u)."""
    n, mean, c, kappa = 500, 0.7, 0.5, 0.25
    flow, y, guide = GaussianFlow(mean, c, scaled), torch.zeros(n, dtype=torch.long), torch.full((n,), w, dtype=F64)
    t, s_, _ = (a.double() for a in sample_times(n, sampler="two", p_equal=0.3, generator=torch.Generator().manual_seed(0)))
    x0, noise = mean + c * randn(n, 2, 3, 3), randn(n, 2, 3, 3, seed=1)
    r, k = t.view(-1, 1, 1, 1), w if scaled else 1
    x_t = (1 - r) * x0 + r * noise
    u = k * flow(x_t, t, t, y, guide)
    on_the_way = meanflow_loss(flow, x_t - r * u, x_t + (1 - r) * u, y, guide, t, s_, kappa)
    assert on_the_way["error"].max() < 1e-24
    slope = k * (flow(x_t + 1, t, s_, y, guide) - flow(x_t, t, s_, y, guide))               # F is linear in x
    omega = 1 if w == 1 else w * (1 - kappa)
    error = ((1 + (s_ - t).view(-1, 1, 1, 1) * slope) * omega * (noise - x0 - u)).square().mean((1, 2, 3))
    terms = meanflow_loss(flow, x0, noise, y, guide, t, s_, kappa)
    close(terms["error"], error, 1e-10)
    close(terms["loss"], error / (error + 1e-3), 1e-10)
    none = meanflow_loss(flow, x0, noise, y + 1, guide, t, s_, kappa)                              # y = no class: nothing guides
    close(none["error"], error / omega ** 2, 1e-10)


def naive_meanflow(net, x0, x1, y, w, t, s_, kappa, c, power):
    """One sample after the other, the derivative by PyTorch's forward mode, straight from the paper."""
    losses = []
    for i in range(len(x0)):
        k, call = w[i] if net.config.scaled else 1.0, lambda x, t, r, y: net(x, t.view(1), r.view(1), y.view(1), w[i].view(1))
        v, z = x1[i:i + 1] - x0[i:i + 1], (1 - t[i]) * x0[i:i + 1] + t[i] * x1[i:i + 1]
        none, omega = torch.tensor(net.config.num_classes), w[i] * (1 - kappa)
        if y[i] != none and w[i] != 1:
            v = omega * v + kappa * k * call(z, t[i], t[i], y[i]) + (1 - omega - kappa) * k * call(z, t[i], t[i], none)
        u, du = torch.func.jvp(lambda z, t: k * call(z, t, s_[i], y[i]), (z, t[i]), (v.detach(), torch.ones_like(t[i])))
        error = ((u - (v - (t[i] - s_[i]) * du).detach()) ** 2).mean()
        losses.append(error / (error.detach() + c) ** power)
    return torch.stack(losses)


@pytest.mark.parametrize("scaled", [False, True])
def test_meanflow_against_a_naive_one(scaled):
    """Loss and gradients in float64, and the derivative against finite differences."""
    net = random_model(scaled=scaled)
    x0, noise, t, s_, y, w = random_inputs(B=5)
    s_[2], y[3], w[4] = t[2], 3, 1.0
    ours = meanflow_loss(net, x0, noise, y, w, t, s_, 0.4, 0.01, 0.7)["loss"]
    naive = naive_meanflow(net, x0, noise, y, w, t, s_, 0.4, 0.01, 0.7)
    close(ours, naive, 1e-12)
    parameters = [p for p in net.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(ours.sum(), parameters), torch.autograd.grad(naive.sum(), parameters)):
        assert (a - b).norm() <= 1e-10 * b.norm() + 1e-13
    with torch.no_grad():
        h, v = 1e-6, noise - x0
        finite = (net(x0 + h * v, t + h, s_, y, w) - net(x0 - h * v, t - h, s_, y, w)) / (2 * h)
        close(net.jvp(x0, t, s_, y, w, dx=v, dt=torch.ones_like(t))[1], finite, 1e-7)


def test_flow_matching_is_the_fm_term():
    net, target = random_model(), random_model(seed=1)
    x0, noise, t, s_, y, w = random_inputs(B=5)
    alone, both = dict(flow_matching_loss(net, target, x0, noise, y, w, s_)), dict(tvm_loss(net, target, x0, noise, y, w, t, s_, s_))
    close(alone["fm"], both["fm"], 1e-12)
    assert list(alone) == ["fm"]
    parameters = [p for p in net.parameters() if p.requires_grad]
    for a, b in zip(*[torch.autograd.grad(terms["fm"].sum(), parameters) for terms in (alone, both)]):
        assert (a - b).norm() <= 1e-10 * b.norm() + 1e-13
    x, k = noise, w.view(-1, 1, 1, 1)
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            t = torch.full((5,), t, dtype=F64)
            x = x - 0.25 * k * net(x, t, t, y, w)
    close(s.sample(net, noise, y, w, 4, euler=True), x, 1e-12)


@pytest.mark.parametrize("name, kept", [("meanflow", 0), ("tvm", 0), ("tvm", 1)])
def test_blocks_compile_once(name, kept):
    """The trainer's compiled block needs three graphs, all in the first step: MeanFlow's without a derivative, and with one, whose
    tangent is the detached one of a block before or not; TVM's for the two passes and the target's."""
    torch._dynamo.reset()
    net, graphs = random_model(torch.float32), []
    count = lambda graph, inputs: graphs.append(graph) or graph.forward
    block, net.checkpoint_blocks = m.Block.forward_detached if name == "meanflow" else m.Block.forward, kept
    net.run_block = torch.compile(block, fullgraph=True, dynamic=False, backend=count)
    target, times = copy.deepcopy(net).requires_grad_(False), dict(sampler="two", p_equal=0.75) if name == "meanflow" else {}
    objective = TVM(net, target, guidance=dict(w=2.0), objective=name, times=times)
    seen = []
    for step in range(3):
        x0 = randn(8, 2, 4, 4, dtype=torch.float32)
        objective(x0, torch.arange(8) % 3, *objective.draw(x0, step))["loss"].backward()
        seen.append(len(graphs))
    assert seen == [3, 3, 3]


def test_other_objectives_train(folder):
    """The checkpoint says how it is sampled, and nonsense is refused."""
    assert run_script("train.py", "--steps=2", "--name=fm", "--objective=flow_matching", *SMALL) is None
    assert run_script("sample.py", "out/fm/ckpt.safetensors", "--n", 4, "--nfe", 3, "--out", "a.npz") is None
    net, about = m.load_model("out/fm/ckpt.safetensors")
    x1, y = s.draw(0, range(4), (1, 8, 8), about["data"]["class_counts"])
    euler, other = [s.to_images(s.sample(net, x1, y, torch.full((4,), 1.25), 3, e), about["data"]) for e in (True, False)]
    assert (np.load("a.npz")["arr_0"] == euler).all() and about["objective"] == "flow_matching"
    assert run_script("train.py", "--steps=2", "--name=mf", "--objective=meanflow", "--times=two", "--p_equal=0.75", *SMALL) is None
    assert run_script("sample.py", "out/mf/ckpt.safetensors", "--n", 4, "--out", "b.npz") is None
    complain = lambda *a: run_script("train.py", *a)
    assert "objective must be" in complain("--objective=no")
    assert 'meanflow takes guidance "constant"' in complain("--objective=meanflow", "--guidance=inverse", "--w_max=2")
    assert "kappa" in complain("--objective=meanflow", "--kappa=1")


def test_meanflow_asks_dropped_labels_at_w():
    n, net = 4000, Recorder()
    net.jvp = lambda x, t, s_, y, w, **tangents: (net(x, t, s_, y, w), torch.zeros_like(x))
    objective = TVM(torch.nn.Identity(), None, guidance=dict(w=2.0), objective="meanflow")
    objective.model = None
    object.__setattr__(objective, "model", net)
    x0 = torch.zeros(n, 1, 2, 2)
    objective(x0, torch.arange(n) % 3, *objective.draw(x0, 0))
    assert abs((net.y == 3).double().mean() - 0.1) < 4 * math.sqrt(0.09 / n) and (net.w == 2).all()


@pytest.mark.parametrize("objective, option", [("meanflow", dict(kappa=0.1)), ("tvm", dict(detach_jvp=True))])
def test_options_reach_the_objective(objective, option):
    net, gradients = random_model(torch.float32), []
    x0, y = randn(8, 2, 4, 4, dtype=torch.float32), torch.arange(8) % 3
    for options in ({}, option):
        module = TVM(net, copy.deepcopy(net).requires_grad_(False), dict(sampler="two"), dict(w=2.0), objective=objective, **options)
        net.zero_grad()
        module(x0, y, *module.draw(x0, 5))["loss"].backward()
        gradients.append(net.blocks[0].mlp.fc1.weight.grad.clone())
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


@pytest.mark.skipif(sys.platform != "linux", reason="kills processes as Linux does")
def test_rehearsal(folder, source, capsys, monkeypatch):
    """The whole way on small files: JPEGs, latents, a killed run and two ranks that finish it, training, 64 samples on two ranks."""
    arguments = ["imagenet", source / "src", "--size", 32, "--vae", source / "vae", "--vae-name", "tiny", "--batch", 1]
    assert run_script("prepare.py", *arguments, "--name", "whole") is None
    process = subprocess.Popen([sys.executable, os.path.join(HERE, "prepare.py"), *map(str, arguments), "--name", "cut"], stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    done = "data/cut.partial/done.npy"
    until(lambda: os.path.exists("data/cut.partial/plan.json") and np.count_nonzero(np.load(done)) >= 20, "20 encoded images")
    workers = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    process.kill(), process.wait()
    assert workers and until(lambda: not any(map(running, workers)), "the end of its workers", 2)
    at = np.count_nonzero(np.load(done))
    assert 20 <= at < 200 and not os.path.exists("data/cut")
    assert "begun with another batch" in run_script("prepare.py", *arguments[:-1], 2, "--name", "cut")
    failed = pytest.raises(subprocess.CalledProcessError, torchrun, "prepare.py", *arguments[:-1], 2, "--name", "cut").value
    assert failed.stderr.decode().count("begun with another batch") == 2                        # both ranks say why
    with monkeypatch.context() as patch:                                                          # another run ends while this one waits
        patch.setattr(ckpt, "hold", lambda path, seconds, hold=files.hold: (os.makedirs("data/late"), hold(path, seconds))[1])
        assert "another run made it" in run_script("prepare.py", *arguments, "--name", "late") and not os.path.exists("data/late.partial")
    with files.hold("data/cut.partial", 0), monkeypatch.context() as patch:
        patch.setattr(ckpt, "hold", lambda path, seconds, hold=files.hold: hold(path, 0))
        assert "data/cut: process" in (line := run_script("prepare.py", *arguments, "--name", "cut")) and "is at work in" in line
    images = open(file := "data/cut.partial/train_images.npy", "rb").read()
    os.truncate(file, 5000)
    assert "cannot write data/cut: mmap length" in run_script("prepare.py", *arguments, "--name", "cut") and os.path.getsize(file) == 5000
    with open(file, "wb") as f:
        f.write(images)
    assert f"| {at}/200 [" in torchrun("prepare.py", *arguments, "--name", "cut").stderr.decode()
    for file in os.listdir("data/whole"):
        if file != "header.json":
            assert open(f"data/whole/{file}", "rb").read() == open(f"data/cut/{file}", "rb").read(), file
    headers = [dataset.load_dataset(f"data/{name}")[0] for name in ("whole", "cut")]
    assert {**headers[0], "name": "cut"} == headers[1] and not os.path.exists("data/cut.partial")

    flags = ("--dataset=cut", "--vae=tiny", f"--vae_files={source / 'vae'}", "--steps=20", "--hidden_size=32", "--depth=1", "--num_heads=2",
             "--batch_size=16", "--log_every=5", "--ema_eval=0.9")
    assert run_script("train.py", *flags) is None
    torchrun("train.py", *flags, "--name=two")
    losses = [[line["loss"] for line in log_lines(name) if "loss" in line] for name in ("cut", "two")]
    assert np.allclose(*losses, rtol=1e-5) and len(losses[0]) == 4                               # ranks draw the same latents
    about = m.load_model("out/cut/ckpt.safetensors")[1]
    assert about["data"] == headers[1] and about["step"] == 20 and about["config"]["in_channels"] == 4

    sampling = ("out/cut/ckpt.safetensors", "--n", 64, "--nfe", 2, "--vae", source / "vae", "--out")
    torchrun("sample.py", *sampling, "samples.npz")
    assert run_script("sample.py", *sampling, "one.npz") is None
    images, one = (np.load(file, allow_pickle=False)["arr_0"] for file in ("samples.npz", "one.npz"))
    assert images.shape == (64, 32, 32, 3) and images.dtype == np.uint8 and images.std() > 1
    assert np.abs(images.astype(int) - one).max() <= 1

    os.mkdir("real")
    for path in sorted((source / "src").rglob("*0.JPEG")):
        shutil.copy(path, f"real/{path.parent.name}-{path.name}")
    torch.manual_seed(0)
    net = InceptionV3()
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")                     # or its features hardly vary
    torch.save(net.state_dict(), "inception.pth")
    assert run_script("fid.py", "--save-stats", "real", "real.npz", "--inception", "inception.pth") is None
    with np.load("real.npz", allow_pickle=False) as statistics:
        assert statistics["mu"].shape == (2048,) and statistics["sigma"].shape == (2048, 2048)
    capsys.readouterr()
    assert run_script("fid.py", "samples.npz", "real", "--inception", "inception.pth") is None
    scores = re.search(r"FID ([0-9.]+) .*Inception Score ([0-9.]+) .*precision ([0-9.]+), recall ([0-9.]+)", capsys.readouterr().out, re.DOTALL)
    assert float(scores[1]) > 0 and float(scores[2]) >= 1 and all(0 <= float(scores[i]) <= 1 for i in (3, 4))
    np.savez("eight.npz", arr_0=images[:8])                                                       # and without keeping them
    assert run_script("fid.py", "eight.npz", "real.npz", "--inception", "inception.pth") is None
    assert run_script("sample.py", "out/cut/ckpt.safetensors", "--n", 8, "--nfe", 2, "--vae", source / "vae", "--fid", "real.npz", "--inception", "inception.pth") is None
    kept, not_kept = (float(number) for number in re.findall(r"FID ([0-9.]+) .*\(too few images: 8 <= 2048\)", capsys.readouterr().out))
    assert abs(not_kept / kept - 1) < 1e-2                                                        # the same images, to a level


def step_gradients(device, dtype, half=False, compiled=False):
    """Loss and gradients; compiled: as train.py makes them, one term after the other, blocks compiled, all of it a CUDA graph."""
    net = random_model(depth=3, hidden_size=64).to(device, dtype)
    target = copy.deepcopy(net)
    x0, noise, t, s_, y, w = (a.to(device) for a in random_inputs(6, dtype=dtype))
    inputs, module = (x0, y, noise, t, s_, s_.flip(0), w, torch.zeros_like(w, dtype=bool)), TVM(net, target)

    def gradients(*inputs):
        net.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            return module(*inputs, backward=backward)["loss"]

    if compiled:
        torch._dynamo.reset()
        m.compile_blocks(net, target)
        loss = Graph(gradients, inputs)(*inputs)
    else:
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            loss = module(*inputs)["loss"]
        loss.backward()
    return {"loss": loss.detach().double().cpu()} | {name: p.grad.double().cpu() for name, p in net.named_parameters() if p.requires_grad}


def loss_gradients(net, **options):
    x0, noise, t, s_, y, w = random_inputs(6)
    terms = dict(tvm_loss(net, random_model(seed=1), x0, noise, y, w, t, s_, s_.flip(0), **options))
    return torch.autograd.grad(sum(term.sum() for term in terms.values()), [p for p in net.parameters() if p.requires_grad])


def test_checkpointed_blocks():
    """The gradient of the whole loss does not change by a bit, whether blocks keep their insides or run again."""
    net, gradients = random_model(), []
    for net.checkpoint_blocks in (0, 1, 2, 8):                        # of plain passes half as many
        gradients.append(loss_gradients(net))
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other))


def test_detached_blocks():
    """forward_detached changes nothing but what detach_jvp throws away."""
    net, gradients = random_model(), []
    for net.run_block in (m.Block.forward, m.Block.forward_detached):
        gradients.append(loss_gradients(net, detach_jvp=True))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_readme_snippets():
    """What README.md tells others to write runs, its derivative is the finite difference, its gradient reaches everything."""
    with open(os.path.join(HERE, "README.md")) as f:
        snippets = re.findall(r"```python\n(.*?)```", f.read(), re.DOTALL)
    assert len(snippets) == 2
    torch.manual_seed(0)
    names = {}
    for snippet, tangent in zip(snippets, ("xt", "s")):
        exec(snippet, names)
        net, z, r, t, du = (names[key].detach() if key != "net" else names[key] for key in ("net", "z", "r", "t", "du"))
        assert names["loss"].isfinite() and all(p.grad.abs().sum() > 0 for p in net.parameters())
        net, h = copy.deepcopy(net).double(), 1e-6
        z, r, t, v = (x.double() for x in (z, r, t, names["v"]))
        step = (lambda h: net(z + h * v, r, t + h)) if tangent == "xt" else (lambda h: net(z, r + h, t))
        close(du.double(), (step(h) - step(-h)) / (2 * h), 1e-5)
        names["net"].zero_grad()


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_readme_diffs(folder):
    """The changes that README.md shows apply together, and train."""
    with open(os.path.join(HERE, "README.md")) as f:
        diffs = re.findall(r"```diff\n(.*?)```", f.read(), re.DOTALL)
    assert len(diffs) == 3 and all(diff.count("\n") < 30 for diff in diffs)
    for file in os.listdir(HERE):
        if file.endswith(".py"):
            shutil.copy(os.path.join(HERE, file), folder)
    subprocess.run(["git", "apply", "--unsafe-paths", "-"], input="".join(diffs), text=True, check=True)
    for line in ("prepare.py stripes", " ".join(("train.py --dataset=stripes --patch_size=4 --steps=2", *SMALL)),
                 "sample.py out/stripes/ckpt.safetensors --nfe 2"):
        subprocess.run([sys.executable, *line.split()], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert os.path.exists("samples.png")


@gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("half, tolerance", [(False, 1e-4), (True, 2e-2)])
def test_gpu_gradients(half, tolerance, compiled, monkeypatch):
    """The loss and every gradient of a training step against float64 on the CPU. In bf16 a gradient that nearly cancels has
    no relative accuracy of its own, so there the error is taken over all of them; the kernels' is not above that of
    attention in PyTorch's operations."""
    reference, got = step_gradients("cpu", F64), step_gradients("cuda", torch.float32, half, compiled)
    if not half:
        for name in reference:
            close(got[name], reference[name], tolerance)
        return
    whole = lambda step: torch.cat([g.flatten() for name, g in step.items() if name != "loss"])
    monkeypatch.setattr(A, "FUSED", False)
    plain = step_gradients("cuda", torch.float32, half)
    errors = [(rel(whole(step), whole(reference)), rel(step["loss"], reference["loss"])) for step in (got, plain)]
    print("relative errors of gradients and loss, fused and plain:", errors)
    assert errors[0][0] < tolerance and errors[0][0] < 1.1 * errors[1][0] and errors[0][1] < max(1.1 * errors[1][1], 2 ** -9)


@gpu
def test_gpu_training(folder):
    assert run_script("train.py", "--steps=3", *SMALL) is None
    assert run_script("sample.py", "out/digits/ckpt.safetensors", "--n", 5, "--out", "a.npz", "--precision", "float32") is None
    assert run_script("sample.py", "out/digits/ckpt.safetensors", "--n", 5, "--out", "b.npz", "--device", "cpu") is None
    assert np.abs(np.load("a.npz")["arr_0"].astype(int) - np.load("b.npz")["arr_0"]).max() <= 1


@gpu
@pytest.mark.parametrize("how", ["whole", "eager", "two ranks"])
def test_gpu_trainings_are_alike(folder, how):
    """The losses of 40 steps in bfloat16: of accumulation, a graph for each half, against whole batches, as a graph and not,
    and against two ranks, of which the first is late after each step, since it writes the log."""
    arguments = (*SMALL, "--steps=40")
    assert run_script("train.py", "--name=halves", "--micro_batch=4", *arguments) is None
    if how == "two ranks":
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU here")
        torchrun("train.py", "--name=other", *arguments)
    else:
        assert run_script("train.py", "--name=other", f"--compile={how == 'whole'}", *arguments) is None
    halves, other = ([line["loss"] for line in log_lines(name) if "loss" in line] for name in ("halves", "other"))
    assert len(halves) == len(other) == 40
    assert max(abs(a / b - 1) for a, b in zip(halves, other)) < (1e-3 if how == "two ranks" else 1e-2)


@gpu
def test_gpu_fast_sampling():
    """bfloat16, eager and compiled, against float32: the error of the one is that of the other."""
    net, (_, noise, _, _, y, w) = random_model(torch.float32, depth=3, hidden_size=64).cuda(), (a.cuda() for a in random_inputs(6, dtype=torch.float32))
    exact = s.sample(net, noise, y, w, 2)
    for compiled in (False, True):
        with s.fast(net, compiled=compiled):
            x0 = s.sample(net, noise, y, w, 2)
        assert x0.dtype == F64 and not torch.equal(x0, exact)
        close(x0, exact, 2e-2)
    with s.fast(net, half=False, compiled=False):
        assert torch.equal(s.sample(net, noise, y, w, 2), exact)


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_graph_gpu(compiled):
    """The loss and its gradients as a CUDA graph are what they are without it, for other inputs than it was made with."""
    model = random_model(torch.float32).cuda()
    model.checkpoint_blocks = 1
    if compiled:
        model.run_block = torch.compile(Block.forward, fullgraph=True, dynamic=False)
    module = TVM(model, copy.deepcopy(model).requires_grad_(False), guidance=dict(w=2.0))
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}

    def gradients(*inputs):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            return module(*inputs, backward=backward)

    def batch(seed):
        x0 = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(seed)).cuda()
        return x0, (torch.arange(6) % 3).cuda(), *module.draw(x0, seed)

    def results(function, seed):
        terms = function(*batch(seed))
        return {key: a.clone() for key, a in [*terms.items(), *((key, p.grad) for key, p in parameters.items())]}

    graph = Graph(gradients, batch(0))
    got = [results(graph, seed) for seed in (1, 2)]
    for seed in (1, 2):
        want = results(gradients, seed)
        assert all(rel(got[seed - 1][key], want[key]) < 1e-5 for key in want if want[key].norm() > 0)
