"""theory.py: the data's velocity, the network's Lipschitz constants, the bounds, the command."""

import json
import math
import os

import pytest
import torch
from helpers import F64, GaussianFlow, close, randn, run_script
from PIL import Image

import theory


def random_mixture(K=4, sigma=0.3):
    return theory.Mixture(randn(K, 2), sigma, torch.arange(1.0, K + 1, dtype=F64))


def normal_density(d, variance):
    """Of two-dimensional deviations d (..., 2)."""
    return (-d.square().sum(-1) / (2 * variance)).exp() / (2 * math.pi * variance)


def density(data, x, s):
    """Of x_s at x (N, 2)."""
    variance = (1 - s) ** 2 * data.sigma**2 + s * s
    return normal_density(x[:, None] - (1 - s) * data.means, variance) @ data.weights


@pytest.mark.parametrize("s", [0.15, 0.5, 0.8])
def test_velocity_of_a_mixture_by_bayes_rule(s):
    """On a grid of x0, where the trapezoidal rule is exact to rounding."""
    data = random_mixture()
    x = randn(6, 2, seed=3)
    line = torch.linspace(-6, 6, 601, dtype=F64)
    x0 = torch.cartesian_prod(line, line)
    prior = normal_density(x0[:, None] - data.means, data.sigma**2) @ data.weights
    weights = prior * normal_density(x[:, None] - (1 - s) * x0, s**2)  # (6, grid)
    mean_x0 = weights @ x0 / weights.sum(1, keepdim=True)
    close(data.velocity(x, s), (x - mean_x0) / s, 1e-12)  # v = (x_s - x0) / s


@pytest.mark.parametrize("s", [0.15, 0.5, 0.8])
def test_velocity_of_a_mixture_by_its_density(s):
    """The score's identity u = -(x + s score) / (1 - s), and dp/ds + div (p u) = 0."""
    data = random_mixture()
    x = randn(6, 2, seed=3)
    score = torch.func.grad(lambda x: density(data, x, s).log().sum())(x)
    close(data.velocity(x, s), -(x + s * score) / (1 - s), 1e-12)

    def flux(x):
        return (density(data, x[None], s) * data.velocity(x[None], s))[0]

    time = torch.tensor(s, dtype=F64)
    change = torch.func.jvp(lambda s: density(data, x, s), (time,), (torch.ones_like(time),))[1]
    divergence = torch.stack([torch.func.jacfwd(flux)(row).trace() for row in x])
    close(change, -divergence, 1e-11)


def test_mixture_of_one():
    """One component is the Gaussian flow: its velocity, its map to every time; samples' moments."""
    mean, sigma = 0.7, 0.5
    data = theory.Mixture(torch.full((1, 2), mean, dtype=F64), sigma, torch.ones(1, dtype=F64))
    flow = GaussianFlow(mean, sigma, False)
    x = randn(5, 2)
    times = torch.linspace(1, 0, 5, dtype=F64)
    ones = torch.ones(5, dtype=F64)

    def F(t, s):
        return flow(x.view(5, 2, 1, 1), t.expand(5), s.expand(5), None, ones).view(5, 2)

    for s, z in zip(times, data.path(x, times), strict=True):
        close(data.velocity(x, s), F(s, s), 1e-13)
        close(z, x + (s - 1) * F(times[0], s), 1e-8)

    n = 20000
    z = (data.sample(n, torch.Generator().manual_seed(0)) - mean) / sigma
    covariance = z.T @ z / n
    assert z.mean(0).abs().max() < 4 / n**0.5
    assert (covariance - torch.eye(2)).abs().max() < 4 * (2 / n) ** 0.5


class Shifted:
    """For data N(0, I): a network that is wrong by a known amount.

    Its velocity is the exact one plus `error` along the first axis. Its displacement moves with a
    terminal velocity that is `error` above that.
    """

    def __init__(self, error):
        self.error = error
        self.exact = GaussianFlow(0.0, 1.0, False)

    def __call__(self, x, t, s, y, w):
        F = self.exact(x, t, s, y, w)
        t, s = t.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)
        variance = (1 - s) ** 2 + s**2
        gap = (t - s).clamp(min=1e-12)
        grown = 2 * variance.sqrt() * (self.integral(t) - self.integral(s)) / gap
        shift = torch.where(s < t, grown, 1.0)
        first_axis = torch.tensor([1.0, 0.0], dtype=F64).view(1, 2, 1, 1)
        return F + self.error * shift * first_axis

    @staticmethod
    def integral(r):
        """Of 1 / sqrt(variance), up to a constant."""
        return torch.asinh(2 * r - 1) / 2**0.5

    def jvp(self, x, t, s, y, w, ds):
        return torch.func.jvp(lambda s: self(x, t, s, y, w), (s,), (ds,))

    def lipschitz(self, s):
        return ((2 * s - 1).abs() / ((1 - s) ** 2 + s**2)).item()


@pytest.mark.parametrize("error, intervals", [(0.0, 4), (0.1, 50)])
def test_bounds_of_a_known_error(error, intervals):
    """Both errors a constant 0.1: W2^2 is 0.062.

    The paper's bound 0.029 is below it, the corrected 0.082 above; the one-sided bound is attained.
    Without errors everything is zero.
    """
    data = theory.Mixture(torch.zeros(1, 2, dtype=F64), 1.0, torch.ones(1, dtype=F64))
    exact = data.path(randn(40, 2), torch.linspace(1, 0, intervals + 1, dtype=F64))
    row = theory.measure(Shifted(error), data, exact, fresh=randn(40, 2, seed=1))
    assert row["e1"].pop() < 1e-12  # at s = t the terminal error of any F is 0
    row["e1"].append(error)
    assert all(abs(e - error) < 1e-7 for e in row["e1"] + row["e2"])

    # By hand; half is the integral of 1 / sqrt(variance) over s < 1/2.
    half = math.asinh(1) / 2**0.5
    shift = 2 * error * 2 * half
    weight = half + 2**0.5 * 2 * (2**0.5 / 8 + math.asinh(1) / 8)
    right = dict.fromkeys(("D2", "W2_coupled", "one_sided"), shift**2)
    right["printed"] = 2 * error**2 * weight
    right.update(dict.fromkeys(("corrected", "path", "upper"), 4 * error**2 * weight**2))
    bounds = theory.bounds(row)
    for key, value in right.items():
        assert abs(bounds[key] - value) < 1e-3 * value + 1e-12, key  # the trapezoidal rule's error
    if error:
        shown = [round(bounds[key], 3) for key in ("W2_coupled", "printed", "corrected")]
        assert shown == [0.062, 0.029, 0.082]


def test_lipschitz_constants():
    """Against LAPACK, of Jacobians by autograd. The product of norms is above them."""
    torch.manual_seed(0)
    net = theory.PlaneNet(7).double()
    x = randn(50, 2)
    s = torch.tensor([0.3], dtype=F64)

    def velocity(x):
        times = s.expand(len(x))
        return net(x.view(-1, 2, 1, 1), times, times).view(-1, 2)

    for scale in (1, 3):
        with torch.no_grad():
            for weight in (net.first.weight, net.second.weight, net.last.weight):
                weight *= scale
        jacobian = torch.func.jacrev(lambda x: velocity(x[None])[0])
        J = torch.stack([jacobian(row) for row in x]).detach()
        norm, eigenvalue = theory.stretching(velocity, x)
        assert abs(norm - torch.linalg.matrix_norm(J, ord=2).max().item()) < 1e-12
        largest = torch.linalg.eigvalsh(-(J + J.mT) / 2).max().item()
        assert abs(eigenvalue - largest) < 1e-12
        assert eigenvalue <= norm <= net.lipschitz(s)


def test_w2_of_samples():
    """On a line the sorted samples are matched. Between shifted copies it is the shift."""
    a = randn(30, 1)
    b = 2 * randn(30, 1, seed=1)
    sorted_distance = (a.sort(0).values - b.sort(0).values).square().mean().item()
    assert abs(theory.w2_squared(a, b) - sorted_distance) < 1e-12
    shifted = a.flip(0) + torch.tensor([3.0, 4.0], dtype=F64)
    assert abs(theory.w2_squared(a.expand(-1, 2), shifted) - 25) < 1e-12


def test_theory_command(folder, capsys):
    """In each row of the quick run each bound that is proved holds, and training helps."""
    assert run_script("theory.py", "--quick") is None
    table = capsys.readouterr().out
    with open("out/theory/quick.jsonl") as f:
        about, *rows, end = map(json.loads, f)
    assert len(rows) == 4
    assert len(about["floor"]) == 3
    assert end["seconds"] > 0
    for row in map(theory.bounds, rows):
        assert row["W2_coupled"] <= row["D2"] * (1 + 1e-12)
        assert row["D2"] * (1 + 1e-12) <= row["one_sided"] <= row["corrected"] <= row["upper"]
        assert row["path"] <= row["corrected"]
        assert row["int_M_box"] <= row["int_L_box"]
        assert row["D"] > 0
    for before, after in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert after["D"][0] < 0.9 * before["D"][0]
    assert Image.open("out/theory/quick.png").width > 600

    assert run_script("theory.py", "--quick", "--report", "--plot=again.png") is None
    assert capsys.readouterr().out == table
    assert os.path.exists("again.png")
    assert not os.path.exists("assets")


def test_theory_refuses(folder):
    os.makedirs("out/theory")
    with open("out/theory/quick.jsonl", "w") as f:
        f.write('{"floor": []}\n{"model": "wi')
    assert "quick.jsonl" in run_script("theory.py", "--quick", "--report")
    assert "log.jsonl" in run_script("theory.py", "--report")
    assert "--fast" in run_script("theory.py", "--fast")
    assert "--quick" in run_script("theory.py", "--quick=no")
