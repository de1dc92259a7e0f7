"""
Theorem 1, where everything is known.
"""
import copy
import json
import os
import sys
import time

import torch
from tqdm import tqdm

from loss import TVM
from model import DiTConfig

THEORY = {"width 64": (64, 3e-3), "width 16": (16, 3e-3), "lr x 4": (64, 1.2e-2)}         # width, learning rate


COLUMNS = dict(model="", step="", D=".3f", e1=".3f", e2=".3f", int_L_path=".2f", int_L_box=".2f", int_L_upper=".1f", int_M_box=".2f",
               W2_coupled=".4f", W2_fresh=".4f", D2=".4f", printed=".3g", path=".3g", corrected=".3g", upper=".2g", one_sided=".3g")


class Mixture:
    """Data: isotropic Gaussians of one sigma (a float) around means (K, D) float64, with weights (K,)."""

    def __init__(self, means, sigma, weights):
        self.means, self.sigma, self.weights = means, sigma, weights / weights.sum()

    def sample(self, n, generator):
        k = torch.multinomial(self.weights, n, True, generator=generator)
        return self.means[k] + self.sigma * torch.randn(n, self.means.size(1), dtype=torch.float64, generator=generator)

    def velocity(self, x, s):
        """E[v | x_s = x], (N, D) for x (N, D) float64 and a number s: a mean over the posterior of the component."""
        variance, d = (1 - s) ** 2 * self.sigma ** 2 + s * s, x[:, None] - (1 - s) * self.means         # (N, K, D)
        posterior = (self.weights.log() - d.square().sum(-1) / (2 * variance)).softmax(1)
        return torch.einsum("nk,nkd->nd", posterior, (s - (1 - s) * self.sigma ** 2) / variance * d - self.means)

    def path(self, x, times):
        """Exact flow of noise x (N, D) from s = 1 to times (T,), falling to 0: (T, N, D), both float64."""
        from scipy.integrate import solve_ivp
        slope = lambda s, z: self.velocity(torch.from_numpy(z).view_as(x), s).flatten().numpy()
        z = solve_ivp(slope, (1, 0), x.flatten().numpy(), "DOP853", times.numpy(), rtol=1e-10, atol=1e-10).y
        return torch.from_numpy(z.T.copy()).view(-1, *x.shape)


class PlaneNet(torch.nn.Module):
    """F for x (B, 2, 1, 1): an MLP that times enter by shifts, a gain and a slope, so that spectral norms bound its Jacobian in x."""
    config = DiTConfig(scaled=False, num_classes=0)       # what loss.py asks for

    def __init__(self, width):
        super().__init__()
        Linear, self.sizes = torch.nn.Linear, [width, width, width, 2, 1]
        self.times = torch.nn.Sequential(Linear(2, width), torch.nn.SiLU(), Linear(width, width), torch.nn.SiLU(), Linear(width, sum(self.sizes)))
        self.first, self.second, self.last = Linear(2, width), Linear(width, width), Linear(width, 2, bias=False)

    def forward(self, x, t, s, y=None, w=None):
        shift1, shift2, gain, offset, slope = self.times(torch.stack([t, t - s], dim=1)).split(self.sizes, dim=1)
        h = (self.second((self.first(x.flatten(1)) + shift1).tanh()) + shift2).tanh()       # (B, width)
        return (self.last(h * (1 + gain)) + slope * x.flatten(1) + offset).view_as(x)

    def jvp(self, x, t, s, y, w, ds):
        return torch.func.jvp(lambda s: self(x, t, s), (s,), (ds,))

    def lipschitz(self, s):
        """At least the spectral norm of the Jacobian of u(., s), wherever: tanh has slopes in [0, 1]. s (1,)."""
        *_, gain, _, slope = self.times(torch.stack([s, s - s], dim=1)).split(self.sizes, dim=1)
        weights = self.first.weight, self.second.weight, self.last.weight * (1 + gain)
        return slope.abs().item() + torch.stack([torch.linalg.matrix_norm(A, ord=2) for A in weights]).prod().item()


def stretching(field, x):
    """Over points x (N, 2): largest singular value of the field's Jacobian J (2 x 2), largest eigenvalue of -(J + J^T) / 2."""
    (a, c), (b, d) = (torch.func.jvp(field, (x,), (e.expand_as(x),))[1].T for e in torch.eye(2, dtype=x.dtype))
    p, q = torch.hypot(a - d, b + c), torch.hypot(a + d, b - c)
    return ((p + q) / 2).max().item(), ((p - a - d) / 2).max().item()


def w2_squared(a, b):
    """Exact squared 2-Wasserstein distance of two samples of one size, (N, D) each."""
    from scipy.optimize import linear_sum_assignment
    cost = torch.cdist(a, b).square().numpy()
    return cost[linear_sum_assignment(cost)].mean().item()


@torch.no_grad()
def theory_row(net, data, exact, fresh):
    """Errors of a float64 network along exact paths Z, (T, N, 2) from Mixture.path at even times, and Lipschitz constants of its
    velocity: lists over s = 0 ... 1. L_path: at ends and middles of the segments from Y to Z; L_box, M_box: there and on a grid
    over the bounding box of all of them; L_upper: a product of norms. fresh: N samples of the data."""
    rms, image, points = lambda x: x.square().sum(-1).mean().sqrt().item(), lambda x: x.view(-1, 2, 1, 1), lambda x: x.view(-1, 2)
    one, x1, curves = exact.new_ones(exact.size(1)), exact[0], []
    for s, z in zip(torch.linspace(1, 0, len(exact), dtype=torch.float64), exact):
        u = lambda x: points(net(image(x), s.expand(len(x)), s.expand(len(x)), None, one[:1].expand(len(x))))
        F, dF = map(points, net.jvp(image(x1), one, s * one, None, one, ds=one))
        y = x1 + (s - 1) * F
        path, (low, high) = torch.cat([y, (y + z) / 2, z]), torch.cat([y, z]).aminmax(dim=0)
        box = torch.cartesian_prod(*(low + (high - low) * torch.linspace(0, 1, 61, dtype=torch.float64)[:, None]).T)
        curves.append((rms(y - z), rms(F + (s - 1) * dF - u(y)), rms(u(z) - data.velocity(z, s)), stretching(u, path)[0],
                       *stretching(u, torch.cat([path, box])), net.lipschitz(s.view(1))))
    return dict(zip(("D", "e1", "e2", "L_path", "L_box", "M_box", "L_upper"), map(list, zip(*curves[::-1])))) | dict(
        W2_coupled=w2_squared(y, z), W2_fresh=w2_squared(y, fresh))


def theory_bounds(row):
    """A row of the log, with the table's numbers in place of lists and beside them: integrals over s, and the bounds of W2^2."""
    a = {key: torch.tensor(value, dtype=torch.float64) for key, value in row.items() if isinstance(value, list)}
    dx, errors = 1 / (len(a["e1"]) - 1), a["e1"] ** 2 + a["e2"] ** 2
    integral = lambda f: torch.trapezoid(f, dx=dx).item()
    weight = {L: torch.cat([a[L][:1] * 0, torch.cumulative_trapezoid(a[L], dx=dx)]).exp() for L in a if "_" in L}      # lambda
    corrected = {L: 2 * integral(w) * integral(w * errors) for L, w in weight.items()}
    return row | dict(D=row["D"][0], D2=row["D"][0] ** 2, e1=integral(a["e1"] ** 2) ** 0.5, e2=integral(a["e2"] ** 2) ** 0.5,
                      printed=integral(weight["L_box"] * errors), path=corrected["L_path"], corrected=corrected["L_box"],
                      upper=corrected["L_upper"], one_sided=integral(weight["M_box"] * (a["e1"] + a["e2"])) ** 2,
                      **{f"int_{L}": integral(a[L]) for L in weight})


def theory_run(log, quick=False):
    """Trains the networks of THEORY; writes the log: settings, a line for each snapshot, seconds."""
    start, angle = time.perf_counter(), torch.arange(5, dtype=torch.float64) * (2 * torch.pi / 5)
    data = Mixture(1.2 * torch.stack([angle.cos(), angle.sin()], 1), 0.4, torch.tensor([1.0, 2, 3, 2, 2]).double())
    g, (n, intervals, batch) = torch.Generator().manual_seed(2 ** 31), (200, 16, 128) if quick else (2000, 64, 512)
    snapshots = [0, 100] if quick else [0, 30, 100, 300, 1000, 3000]
    exact = data.path(torch.randn(n, 2, dtype=torch.float64, generator=g), torch.linspace(1, 0, intervals + 1, dtype=torch.float64))
    fresh, *others = (data.sample(n, g) for _ in range(4))
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log + ".partial", "w") as f:
        write = lambda **line: print(json.dumps(line), file=f, flush=True)
        write(torch=torch.__version__, date=time.strftime("%Y-%m-%d"), threads=torch.get_num_threads(), n=n, intervals=intervals,
              batch=batch, models=THEORY, floor=[w2_squared(fresh, other) for other in others])
        for name, (width, lr) in list(THEORY.items())[:2 if quick else None]:
            torch.manual_seed(0)
            net, y = PlaneNet(width), torch.zeros(batch, dtype=torch.long)
            target, ema = (copy.deepcopy(net).requires_grad_(False) for _ in range(2))
            objective = TVM(net, target, label_dropout=0.0)
            optimizer = torch.optim.AdamW(net.parameters(), lr, (0.9, 0.95), weight_decay=0)
            for step in tqdm(range(snapshots[-1] + 1), desc=name, unit="step"):
                if step in snapshots:
                    write(model=name, step=step, **theory_row(copy.deepcopy(ema).double(), data, exact, fresh))
                x0 = data.sample(batch, g).float().view(-1, 2, 1, 1)
                objective(x0, y, *objective.draw(x0, step))["loss"].backward()
                optimizer.step(), optimizer.zero_grad()
                for average, rate in ((target, 0.99), (ema, 0.995)):
                    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - rate)
        write(seconds=time.perf_counter() - start)
    os.replace(log + ".partial", log)


def theory_report(log, plot):
    """Prints the log's table and draws it."""
    from matplotlib.figure import Figure
    with open(log) as f:
        about, *rows, end = map(json.loads, f)
    rows = [theory_bounds(row) for row in rows]
    print(f"torch {about['torch']}, {about['threads']} CPU threads, {about['date']}, {end['seconds']:.0f} s; {about['n']} points, "
          f"{about['intervals']} intervals; W2^2 of data to data: {', '.join(f'{w:.4f}' for w in about['floor'])}")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    print("\n".join("| " + " | ".join(f"{row[key]:{form}}" for key, form in COLUMNS.items()) + " |" for row in rows))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    models = list(zip(dict.fromkeys(row["model"] for row in rows), "os^"))
    for name, marker in models:
        for key, color, label in (("corrected", "C0", "corrected bound"), ("one_sided", "C1", "one-sided bound"),
                                  ("printed", "C2", "printed bound"), ("W2_fresh", "C3", "W2² to fresh data")):
            points = zip(*((row["W2_coupled"], row[key]) for row in rows if row["model"] == name))
            axes.plot(*points, marker, color=color, ms=5, label=label if marker == "o" else None)
    axes.axhline(sum(about["floor"]) / len(about["floor"]), color="C3", ls="--", lw=1, label="its floor: data to data")
    axes.axline((1e-2, 1e-2), (1e-1, 1e-1), color="k", lw=1, label="equality")
    for name, marker in models:
        axes.plot([], [], marker, color="0.3", label=name)
    axes.set(xlabel="W2², model to exact flow of the same noise", ylabel="W2² and its bounds", xscale="log", yscale="log")
    axes.set_ylim(min(row["W2_fresh"] for row in rows) / 3), axes.grid(alpha=0.3), figure.legend(loc="outside right upper", fontsize=9)
    os.makedirs(os.path.dirname(plot) or ".", exist_ok=True)
    figure.savefig(plot, dpi=150)


def theory(quick=False, report=False, plot=""):
    """Trains and reports; report: from the log of the last run."""
    log, default = ("out/theory/quick.jsonl", "out/theory/quick.png") if quick else ("out/theory/log.jsonl", "assets/theory.png")
    try:
        if not report:
            theory_run(log, quick)
        theory_report(log, plot or default)
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"bench.py: theory, {log}: {type(error).__name__}: {error}")
