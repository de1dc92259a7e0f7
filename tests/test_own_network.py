"""
What is asked of a network: docs/changes.md, "Your own network".

To check one of your own, import it here, add it to NETWORKS with its config, and run this file. If
its data are not (2, 4, 4) with 3 classes, take DiT out, and give random_inputs() their shape.
"""

import json

import pytest
import torch
from helpers import F64, TINY, close, jvp_of, randn, random_inputs
from torch import nn

from attention_jvp import attention
from loss import TrainingLoss, backward
from model import DiT, DiTConfig


class AttentionNet(nn.Module):
    """Attention among pixels, with the derivative of torch.func.jvp."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.pixels = nn.Linear(config.in_channels, D)
        self.numbers = nn.Linear(3, D)
        self.classes = nn.Embedding(config.num_classes + 1, D)
        self.qkv = nn.Linear(D, 3 * D)
        self.last = nn.Linear(D, config.in_channels)

    def forward(self, x, t, s, y, w):
        c = self.numbers(torch.stack([t, t - s, 1 / w], dim=1)) + self.classes(y)  # (B, D)
        h = self.pixels(x.flatten(2).transpose(1, 2)) + c[:, None]  # (B, T, D)
        q, k, v = self.qkv(h.tanh()).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        h = h + attention(q, k, v).transpose(1, 2).flatten(2)  # (B, T, D)
        return self.last(h.tanh()).transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)

    def jvp(self, x, t, s, y, w, dx=None, dt=None, ds=None):
        return jvp_of(lambda *at: self(*at, y, w), (x, t, s), (dx, dt, ds))

    def no_condition(self, y):
        return torch.full_like(y, self.config.num_classes)


CONFIG = DiTConfig.named("tiny", **TINY)
NETWORKS = [(DiT, CONFIG), (AttentionNet, CONFIG)]

every_network = pytest.mark.parametrize(
    "network, config", NETWORKS, ids=[network.__name__ for network, _ in NETWORKS]
)


def make(network, config):
    """A small network in float64, with no weight left at zero."""
    torch.manual_seed(0)
    net = network(config).to(F64)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net


def inputs():
    """x, t, s, y, w, and tangents of the first three."""
    x, _, t, s, y, w = random_inputs()
    tangents = [randn(*a.shape, seed=5) for a in (x, t, s)]
    return x, t, s, y, w, tangents


def slope(function, h=1e-3):
    """The derivative of function(a) at a = 0, to the fourth order in h."""
    near = function(h) - function(-h)
    far = function(2 * h) - function(-2 * h)
    return (8 * near - far) / (12 * h)


@every_network
def test_what_comes_out(network, config):
    net = make(network, config)
    x, t, s, y, w, (dx, dt, ds) = inputs()
    F = net(x, t, s, y, w)
    assert F.shape == x.shape
    for out in net.jvp(x, t, s, y, w, dx, dt, ds):
        assert out.shape == x.shape
        assert out.dtype == x.dtype
    close(net.jvp(x, t, s, y, w, ds=ds)[0], F, 1e-12)
    none = net.no_condition(y)
    assert none.shape == y.shape
    assert none.dtype == y.dtype
    assert isinstance(net.config.scaled, bool)


@every_network
@pytest.mark.parametrize("given", ["x", "t", "s", "xt", "xts"])
def test_the_derivative(network, config, given):
    """Along some tangents, the others being None, against finite differences."""
    net = make(network, config)
    x, t, s, y, w, tangents = inputs()
    dx, dt, ds = [d if name in given else None for name, d in zip("xts", tangents, strict=True)]
    _, dF = net.jvp(x, t, s, y, w, dx, dt, ds)

    def moved(a):
        at = [v if d is None else v + a * d for v, d in ((x, dx), (t, dt), (s, ds))]
        return net(*at, y, w)

    with torch.no_grad():
        close(dF, slope(moved), 1e-8)


@every_network
def test_the_gradient_of_the_derivative(network, config):
    """Backward through F and dF at once, along a random direction of all weights.

    nn.LayerNorm fails here: PyTorch 2.13 loses a part of this gradient (pytorch#196700).
    """
    net = make(network, config)
    x, t, s, y, w, tangents = inputs()
    weights = [p for p in net.parameters() if p.requires_grad]
    of_F, of_dF = randn(*x.shape, seed=6), randn(*x.shape, seed=7)
    directions = [randn(*p.shape, seed=8) for p in weights]

    def total():
        F, dF = net.jvp(x, t, s, y, w, *tangents)
        return (F * of_F).sum() + (dF * of_dF).sum()

    def moved(a):
        for p, direction in zip(weights, directions, strict=True):
            p += a * direction
        value = total()
        for p, direction in zip(weights, directions, strict=True):
            p -= a * direction
        return value

    grads = torch.autograd.grad(total(), weights)
    along = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    with torch.no_grad():
        close(along, slope(moved, h=1e-4), 1e-6)


@every_network
def test_samples_do_not_mix(network, config):
    """What a sample gives depends on neither the others nor how many there are."""
    net = make(network, config)
    x, t, s, y, w, _ = inputs()
    F = net(x, t, s, y, w)
    one = slice(1, 2)
    close(net(x[one], t[one], s[one], y[one], w[one]), F[one], 1e-12)
    twice = [torch.cat([a, a.flip(0)]) for a in (x, t, s, y, w)]
    close(net(*twice)[: len(x)], F, 1e-12)


@every_network
def test_all_weights_are_trained(network, config):
    """The loss's last backward reaches each of them, as DDP needs it."""
    net = make(network, config)
    x0, noise, t, s, y, w = random_inputs()

    def forget(part):
        backward(part)
        net.zero_grad()

    loss = TrainingLoss(net, make(network, config).requires_grad_(False))
    drop = torch.tensor([False, True, False])
    rest, _ = loss(x0, y, noise, t, s, s, w, drop, backward_part=forget)
    backward(rest)
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name


@every_network
def test_it_is_made_again_from_a_checkpoint(network, config):
    """As load_model does it: from its config as JSON, on no device, with the tensors of a file."""
    net = make(network, config)
    x, t, s, y, w, _ = inputs()
    read = type(config)(**json.loads(json.dumps(vars(net.config))))
    assert read == config
    with torch.device("meta"):
        again = network(read)
    again.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(again(x, t, s, y, w), net(x, t, s, y, w))
