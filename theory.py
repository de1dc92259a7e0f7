"""
Theorem 1 beside what it bounds, where everything is known: five Gaussians in the plane.

    python theory.py                          # trains, five minutes on two cores; table and plot
    python theory.py --quick                  # the same in seconds; its numbers mean little
    python theory.py --report [--plot=FILE]   # table and plot, from the log of the last run

The velocity of such data is a formula and the exact flow an ODE, so the distance of one-step
samples from the data, the errors that the loss trains and every bound can be computed. Small
networks are trained with loss.py. `measure` takes the errors along exact paths, and `bounds` makes
of them what is to be compared. The log is out/theory/log.jsonl (with --quick quick.jsonl).

For noise x1, and times s from 1 down to 0:
    Z_s   the exact flow's points from x1; Z_0 is data
    Y_s   x1 + f(x1, 1, s), the network's points; Y_0 are its one-step samples
    D     the root mean square of Y_s - Z_s over x1
    e1    that of d/ds f - u'(Y_s, s), the terminal velocity's error; u' is the network's velocity
    e2    that of u'(Z_s, s) - u(Z_s, s), flow matching's error; u is the exact velocity
    L     a Lipschitz constant of u'(., s), and M one for separation alone (see `stretching`)
With lambda(s) = exp of the integral of L from 0 to s, and integrals over s from 0 to 1,
    W2^2 <= D_0^2 <= (int lambda (e1 + e2))^2 <= 2 (int lambda) (int lambda (e1^2 + e2^2))
The last one is "corrected", the third with M in place of L "one-sided". The paper prints
int lambda (e1^2 + e2^2).
"""

import copy
import json
import os
import time

import torch
from tqdm import tqdm

from files import UserError, written
from loss import TrainingLoss
from model import DiTConfig
from options import Parser, run
from pictures import new_figure, save_figure

F64 = torch.float64

MODELS = {  # width of the network, learning rate
    "width 64": (64, 3e-3),
    "width 16": (16, 3e-3),
    "lr x 4": (64, 1.2e-2),
}
LIPSCHITZ = ("L_path", "L_box", "M_box", "L_upper")

COLUMNS = {  # of the table, with their formats
    "model": "",
    "step": "",
    "D": ".3f",
    "e1": ".3f",
    "e2": ".3f",
    "int_L_path": ".2f",
    "int_L_box": ".2f",
    "int_L_upper": ".1f",
    "int_M_box": ".2f",
    "W2_coupled": ".4f",
    "W2_fresh": ".4f",
    "D2": ".4f",
    "printed": ".3g",
    "path": ".3g",
    "corrected": ".3g",
    "upper": ".2g",
    "one_sided": ".3g",
}


# ---- data whose velocity is known ----------------------------------------------------------------


class Mixture:
    """Isotropic Gaussians of one sigma (a number) around means (K, D) float64; weights (K,)."""

    def __init__(self, means, sigma, weights):
        self.means = means
        self.sigma = sigma
        self.weights = weights / weights.sum()

    def sample(self, n, generator):
        """(n, D) float64."""
        k = torch.multinomial(self.weights, n, True, generator=generator)
        noise = torch.randn(n, self.means.size(1), dtype=F64, generator=generator)
        return self.means[k] + self.sigma * noise

    def velocity(self, x, s):
        """u(x, s) = E[v | x_s = x], (N, D), for x (N, D) float64 and a number s.

        It is the mean of the components' velocities, by their posterior probabilities.
        """
        variance = (1 - s) ** 2 * self.sigma**2 + s * s
        d = x[:, None] - (1 - s) * self.means  # (N, K, D)
        log_likelihood = -d.square().sum(-1) / (2 * variance)
        posterior = (self.weights.log() + log_likelihood).softmax(1)  # (N, K)
        velocities = (s - (1 - s) * self.sigma**2) / variance * d - self.means
        return torch.einsum("nk,nkd->nd", posterior, velocities)

    def path(self, x, times):
        """The exact flow of noise x (N, D) from s = 1 to times (T,), which fall to 0: (T, N, D)."""
        from scipy.integrate import solve_ivp

        def slope(s, z):
            return self.velocity(torch.from_numpy(z).view_as(x), s).flatten().numpy()

        start = x.flatten().numpy()
        z = solve_ivp(slope, (1, 0), start, "DOP853", times.numpy(), rtol=1e-10, atol=1e-10).y
        return torch.from_numpy(z.T.copy()).view(-1, *x.shape)


def five_gaussians():
    """On a circle, of unequal weights."""
    angles = torch.arange(5, dtype=F64) * (2 * torch.pi / 5)
    means = 1.2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return Mixture(means, 0.4, torch.tensor([1, 2, 3, 2, 2], dtype=F64))


# ---- the network ---------------------------------------------------------------------------------


def as_images(points):
    """(N, 2) -> (N, 2, 1, 1), which loss.py trains on."""
    return points.view(-1, 2, 1, 1)


def as_points(images):
    return images.view(-1, 2)


class PlaneNet(torch.nn.Module):
    """F for x (B, 2, 1, 1): a small MLP in x.

    Times enter it by two shifts, a gain, an offset and a slope, so that the spectral norms of its
    weights bound its Jacobian in x.
    """

    config = DiTConfig(scaled=False, num_classes=0)  # what loss.py asks for

    def __init__(self, width):
        super().__init__()
        self.sizes = [width, width, width, 2, 1]
        self.times = torch.nn.Sequential(
            torch.nn.Linear(2, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, sum(self.sizes)),
        )
        self.first = torch.nn.Linear(2, width)
        self.second = torch.nn.Linear(width, width)
        self.last = torch.nn.Linear(width, 2, bias=False)

    def of_times(self, t, s):
        """shift1, shift2, gain (B, width) each, offset (B, 2) and slope (B, 1)."""
        return self.times(torch.stack([t, t - s], dim=1)).split(self.sizes, dim=1)

    def forward(self, x, t, s, y=None, w=None):
        shift1, shift2, gain, offset, slope = self.of_times(t, s)
        points = as_points(x)
        h = torch.tanh(self.first(points) + shift1)  # (B, width)
        h = torch.tanh(self.second(h) + shift2)
        out = self.last(h * (1 + gain)) + slope * points + offset  # (B, 2)
        return out.view_as(x)

    def jvp(self, x, t, s, y, w, ds):
        return torch.func.jvp(lambda s: self(x, t, s), (s,), (ds,))

    def no_condition(self, y):
        return y

    def lipschitz(self, s):
        """At least the spectral norm of the Jacobian of u'(., s), everywhere. s: (1,).

        It is the product of the weights' norms, because tanh has slopes between 0 and 1.
        """
        _, _, gain, _, slope = self.of_times(s, s)
        product = 1.0
        for weight in (self.first.weight, self.second.weight, self.last.weight * (1 + gain)):
            product *= torch.linalg.matrix_norm(weight, ord=2).item()
        return slope.abs().item() + product


# ---- what is measured ----------------------------------------------------------------------------


def root_mean_square(x):
    """Of the lengths of vectors (N, D)."""
    return x.square().sum(-1).mean().sqrt().item()


def stretching(field, x):
    """Two numbers about a field's Jacobians J (2 x 2) at points x (N, 2), the largest of each.

    The first is J's largest singular value, L. The second is the largest eigenvalue of
    -(J + J^T) / 2, M: how fast the field, followed from s = 1 to 0, can drive two points apart.
    """
    right, up = torch.eye(2, dtype=x.dtype)
    a, c = torch.func.jvp(field, (x,), (right.expand_as(x),))[1].T  # J = [[a, b], [c, d]]
    b, d = torch.func.jvp(field, (x,), (up.expand_as(x),))[1].T
    p = torch.hypot(a - d, b + c)
    q = torch.hypot(a + d, b - c)
    largest_singular_value = (p + q) / 2
    largest_eigenvalue = (p - a - d) / 2
    return largest_singular_value.max().item(), largest_eigenvalue.max().item()


def box_around(points, side=61):
    """A grid (side^2, 2) over the bounding box of points (N, 2)."""
    low, high = points.aminmax(dim=0)
    share = torch.linspace(0, 1, side, dtype=F64)
    first, second = (low + (high - low) * share[:, None]).T
    return torch.cartesian_prod(first, second)


def w2_squared(a, b):
    """The exact squared 2-Wasserstein distance of two samples of one size, (N, D) each."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(a, b).square().numpy()
    return cost[linear_sum_assignment(cost)].mean().item()


@torch.no_grad()
def measure(net, data, exact, fresh):
    """The errors of a float64 network along exact paths, and Lipschitz constants of its velocity.

    exact: Z, (T, N, 2), from Mixture.path at even times. fresh: N samples of the data. Returns
    W2_coupled (of Y_0 to Z_0) and W2_fresh (of Y_0 to fresh), and lists over s = 0 ... 1:
        D, e1, e2
        L_path         at the ends and the middles of the segments from Y_s to Z_s
        L_box, M_box   there and on a grid over the box that holds all the segments
        L_upper        a bound that holds everywhere
    """
    x1 = exact[0]
    ones = exact.new_ones(len(x1))
    lists = {name: [] for name in ("D", "e1", "e2", *LIPSCHITZ)}
    for s, z in zip(torch.linspace(1, 0, len(exact), dtype=F64), exact, strict=True):
        F, dF = net.jvp(as_images(x1), ones, s * ones, None, ones, ds=ones)
        F, dF = as_points(F), as_points(dF)
        y = x1 + (s - 1) * F
        df = F + (s - 1) * dF  # d/ds f

        def velocity(x, s=s):
            times = s.expand(len(x))
            weights = ones[:1].expand(len(x))
            return as_points(net(as_images(x), times, times, None, weights))

        segments = torch.cat([y, (y + z) / 2, z])
        box = torch.cat([segments, box_around(torch.cat([y, z]))])
        L_path, _ = stretching(velocity, segments)
        L_box, M_box = stretching(velocity, box)
        lists["D"].append(root_mean_square(y - z))
        lists["e1"].append(root_mean_square(df - velocity(y)))
        lists["e2"].append(root_mean_square(velocity(z) - data.velocity(z, s)))
        lists["L_path"].append(L_path)
        lists["L_box"].append(L_box)
        lists["M_box"].append(M_box)
        lists["L_upper"].append(net.lipschitz(s.view(1)))
    row = {name: values[::-1] for name, values in lists.items()}
    row["W2_coupled"] = w2_squared(y, z)
    row["W2_fresh"] = w2_squared(y, fresh)
    return row


def bounds(row):
    """A row of the log -> the same with numbers in place of the lists, and with the bounds of W2^2.

    D is that of s = 0; e1 and e2 are root mean squares over s; int_L_path and so on are integrals.
    """
    at = {}  # the lists as tensors
    for name in ("e1", "e2", *LIPSCHITZ):
        at[name] = torch.tensor(row[name], dtype=F64)
    dx = 1 / (len(row["e1"]) - 1)
    squares = at["e1"] ** 2 + at["e2"] ** 2

    def integral(f):
        return torch.trapezoid(f, dx=dx).item()

    def stretched(name):
        """lambda(s): what comes in at s is stretched by so much on its way to 0."""
        L = at[name]
        return torch.cat([L.new_zeros(1), torch.cumulative_trapezoid(L, dx=dx)]).exp()

    def corrected(name):
        return 2 * integral(stretched(name)) * integral(stretched(name) * squares)

    numbers = dict(
        D=row["D"][0],
        D2=row["D"][0] ** 2,
        e1=integral(at["e1"] ** 2) ** 0.5,
        e2=integral(at["e2"] ** 2) ** 0.5,
        printed=integral(stretched("L_box") * squares),
        path=corrected("L_path"),
        corrected=corrected("L_box"),
        upper=corrected("L_upper"),
        one_sided=integral(stretched("M_box") * (at["e1"] + at["e2"])) ** 2,
    )
    for name in LIPSCHITZ:
        numbers[f"int_{name}"] = integral(at[name])
    return {**row, **numbers}


# ---- the run -------------------------------------------------------------------------------------


def train_and_measure(log, quick):
    """Train the networks of MODELS and write the log: settings, a line a snapshot, seconds."""
    start = time.perf_counter()
    n, intervals, batch = (200, 16, 128) if quick else (2000, 64, 512)
    snapshots = [0, 100] if quick else [0, 30, 100, 300, 1000, 3000]
    names = list(MODELS)[:2] if quick else list(MODELS)

    generator = torch.Generator().manual_seed(2**31)
    data = five_gaussians()
    noise = torch.randn(n, 2, dtype=F64, generator=generator)
    exact = data.path(noise, torch.linspace(1, 0, intervals + 1, dtype=F64))
    fresh = data.sample(n, generator)
    floor = [w2_squared(fresh, data.sample(n, generator)) for _ in range(3)]

    os.makedirs(os.path.dirname(log), exist_ok=True)
    with written(log) as f:

        def write(**line):
            f.write(json.dumps(line).encode() + b"\n")

        write(
            torch=torch.__version__,
            date=time.strftime("%Y-%m-%d"),
            threads=torch.get_num_threads(),
            n=n,
            intervals=intervals,
            batch=batch,
            models=MODELS,
            floor=floor,
        )
        for name in names:
            for step, net in train(name, data, snapshots, batch, generator):
                write(model=name, step=step, **measure(net, data, exact, fresh))
        write(seconds=time.perf_counter() - start)


def train(name, data, snapshots, batch, generator):
    """Train a network. Yields (step, the average of its weights in float64) at the snapshots."""
    width, lr = MODELS[name]
    torch.manual_seed(0)
    net = PlaneNet(width)
    target = copy.deepcopy(net).requires_grad_(False)
    ema = copy.deepcopy(net).requires_grad_(False)
    objective = TrainingLoss(net, target, label_dropout=0.0)
    optimizer = torch.optim.AdamW(net.parameters(), lr, (0.9, 0.95), weight_decay=0)
    y = torch.zeros(batch, dtype=torch.long)
    for step in tqdm(range(snapshots[-1] + 1), desc=name, unit="step"):
        if step in snapshots:
            yield step, copy.deepcopy(ema).double()
        x0 = as_images(data.sample(batch, generator).float())
        loss, _ = objective(x0, y, *objective.draw(x0, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, rate in ((target, 0.99), (ema, 0.995)):
                parameters = list(net.parameters())
                torch._foreach_lerp_(list(average.parameters()), parameters, 1 - rate)


# ---- the report ----------------------------------------------------------------------------------


def read(log):
    """The log -> (settings, rows with their bounds, seconds). Raises UserError."""
    try:
        with open(log) as f:
            about, *rows, end = map(json.loads, f)
        return about, [bounds(row) for row in rows], end["seconds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{log} is not the whole log of a run: {reason}") from None


def print_table(about, rows, seconds):
    floor = ", ".join(f"{w:.4f}" for w in about["floor"])
    print(
        f"torch {about['torch']}, {about['threads']} CPU threads, {about['date']}, "
        f"{seconds:.0f} s; {about['n']} points, {about['intervals']} intervals; "
        f"W2^2 of data to data: {floor}"
    )
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for row in rows:
        cells = [format(row[name], form) for name, form in COLUMNS.items()]
        print("| " + " | ".join(cells) + " |")


def draw_plot(about, rows, path):
    """The bounds over the distance that they bound, a marker for each network."""
    figure = new_figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    series = (
        ("corrected", "C0", "corrected bound"),
        ("one_sided", "C1", "one-sided bound"),
        ("printed", "C2", "printed bound"),
        ("W2_fresh", "C3", "W2² to fresh data"),
    )
    names = list(dict.fromkeys(row["model"] for row in rows))
    markers = dict(zip(names, "os^", strict=False))
    for name, marker in markers.items():
        for key, color, label in series:
            x = [row["W2_coupled"] for row in rows if row["model"] == name]
            y = [row[key] for row in rows if row["model"] == name]
            once = label if name == names[0] else None
            axes.plot(x, y, marker, color=color, ms=5, label=once)
    floor = sum(about["floor"]) / len(about["floor"])
    axes.axhline(floor, color="C3", ls="--", lw=1, label="its floor: data to data")
    axes.axline((1e-2, 1e-2), (1e-1, 1e-1), color="k", lw=1, label="equality")
    for name, marker in markers.items():
        axes.plot([], [], marker, color="0.3", label=name)
    axes.set(xscale="log", yscale="log", ylabel="W2² and its bounds")
    axes.set_xlabel("W2², model to exact flow of the same noise")
    axes.set_ylim(min(row["W2_fresh"] for row in rows) / 3)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    save_figure(figure, path, dpi=150)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few points, 100 steps, two networks")
    parser.add_argument("--report", action="store_true", help="from the log of the last run alone")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="default: assets/theory.png, with --quick out/theory/quick.png",
    )
    args = parser.parse_args()
    log = "out/theory/quick.jsonl" if args.quick else "out/theory/log.jsonl"
    plot = "out/theory/quick.png" if args.quick else "assets/theory.png"
    if not args.report:
        train_and_measure(log, args.quick)
    about, rows, seconds = read(log)
    print_table(about, rows, seconds)
    draw_plot(about, rows, args.plot or plot)


if __name__ == "__main__":
    run(main)
