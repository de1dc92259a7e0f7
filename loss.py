"""
Terminal Velocity Matching: the objective, and the samplers of its times and guidance weights.
Zhou, Parger, Haque, Song, arXiv 2511.19797; equation numbers are the paper's.

Conventions, everywhere in this project:
    x0 data, x1 noise ~ N(0, I), x_t = (1-t) x0 + t x1, v = x1 - x0
    t = 1 is noise, t = 0 is data, 0 <= s <= t <= 1
    F(x, t, s, y, w)  the network; y (the paper's c) a class, or none; w the guidance weight
    k = w in the scaled parameterization (config.scaled), else 1
    f(x, t, s) = (s-t) k F(x, t, s)   displacement from time t to time s
    u(x, s)    = k F(x, s, s)         velocity at time s

The loss of one sample, with F* the target network (an EMA of the trained weights, decay 0.99) and
|| ||^2 the mean of the squares of the elements:
    terminal = || df/ds - k F*(x_t + f, s, s, y, w) ||^2 / w^2                             (12, 14)
               where df/ds = k (F + (s-t) dF/ds); zero where t = s
    fm       = || k F(x_s', s', s', y, w) - [w v + (1-w) F*(x_s', s', s', none, 1)] ||^2 / w^2  (15)
Gradients flow through df/ds, and so through dF/ds. The point x_t + f and everything of F* are
constants. A sample that loses its label has w = 1 in both terms.

In this file: the samplers, TVM's terms, the module that train.py calls, and last the objectives
that TVM is compared with, on the same network: MeanFlow (Geng et al., arXiv 2505.13447), improved
MeanFlow (Geng et al., arXiv 2512.02012) and alpha-Flow (Zhang et al., arXiv 2510.20771). Flow
matching is fm alone; it is sampled by Euler steps k F(x, t, t).

Data x0 are (B, ...): images, but nothing here depends on that. Conditions y are (B, ...) tensors;
what they mean is the model's business, and model.no_condition(y) is "no class".
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dual import at_least_float32, column

OBJECTIVES = ("tvm", "meanflow", "improved_meanflow", "alpha_flow", "flow_matching")
EULER = ("flow_matching",)  # trained at s = t only: sampled by Euler steps with F(x, t, t)
MEANFLOWS = ("meanflow", "improved_meanflow", "alpha_flow")  # MeanFlow and its relatives
DETACHED_JVP = ("meanflow", "improved_meanflow")  # no gradient goes through their derivative
# The constants of train.py with which MeanFlow and its relatives are trained.
MEANFLOW_CONSTANTS = dict(times="two", p_equal=0.75, scaled=False)
TIMES = ("gap*", "gap", "trunc", "clamp", "two")
GUIDANCE = ("constant", "inverse", "uniform")


# ---- times and guidance weights ------------------------------------------------------------------


def sample_times(
    n,
    device="cpu",
    sampler="gap*",
    mu=-0.8,
    sigma=1.0,
    mu_s=-0.4,
    sigma_s=1.0,
    p_equal=0.0,
    p_noise=0.0,
    generator=None,
):
    """Times t, s, s_fm, each (n,) float32 in [0, 1] with s <= t (Table 3, Figure 9).

    LN is a logit-normal, and g = t - s the gap. mu and sigma are those of g (gap, gap*) or of t:

    gap    g ~ LN(mu, sigma), s ~ LN(mu_s, sigma_s) truncated to s <= 1-g, t = s + g; s_fm = s
    gap*   the same, with s_fm ~ LN(mu_s, sigma_s) drawn on its own
    trunc  t ~ LN(mu, sigma), s ~ LN(mu_s, sigma_s) truncated to s <= t; s_fm = s
    clamp  t ~ LN(mu, sigma), s ~ LN(mu_s, sigma_s), replaced by t where larger; s_fm = s
    two    t the larger and s the smaller of two draws of LN(mu_s, sigma_s); s_fm = s (MeanFlow's)

    Then, with probability p_noise, t becomes 1, where sampling begins. At last, with probability
    p_equal, t becomes s (with "two", s becomes t, also where that is 1).
    Raises ValueError for arguments out of range.
    """
    check_times(sampler, mu, sigma, mu_s, sigma_s, p_equal, p_noise)

    def normal():
        return torch.randn(n, dtype=torch.float64, device=device, generator=generator)

    def uniform():
        return torch.rand(n, dtype=torch.float64, device=device, generator=generator)

    def truncated(top):
        """LN(mu_s, sigma_s) below `top`: its distribution function, drawn uniformly, inverted."""
        z = (torch.logit(top) - mu_s) / sigma_s
        below = 0.5 * torch.special.erfc(-z / 2**0.5)  # P(LN <= top); ndtr loses its far tail
        p = (uniform() * below).clamp(min=torch.finfo(torch.float64).tiny)
        s = torch.sigmoid(mu_s + sigma_s * torch.special.ndtri(p))
        return torch.minimum(s, top)  # where rounding, or the clamp, went above it

    def some_at_noise(t):
        if p_noise == 0:  # draw nothing: the numbers that are drawn later then stay the same
            return t
        return torch.where(uniform() < p_noise, 1.0, t)

    if sampler == "two":
        draws = torch.stack([normal(), normal()])
        s, t = torch.sigmoid(mu_s + sigma_s * draws).sort(0).values.float()
        t = some_at_noise(t)
        s = torch.where(uniform() < p_equal, t, s)
        return t, s, s

    if sampler in ("gap", "gap*"):
        gap = torch.sigmoid(mu + sigma * normal())
        s = truncated(1 - gap)
        t = (s + gap).clamp(max=1)
    elif sampler == "trunc":
        t = torch.sigmoid(mu + sigma * normal())
        s = truncated(t)
    else:  # clamp
        t = torch.sigmoid(mu + sigma * normal())
        s = torch.minimum(t, torch.sigmoid(mu_s + sigma_s * normal()))
    s_fm = torch.sigmoid(mu_s + sigma_s * normal()) if sampler == "gap*" else s
    t = some_at_noise(t)
    t = torch.where(uniform() < p_equal, s, t)
    return t.float(), s.float(), s_fm.float()


def check_times(
    sampler="gap*", mu=-0.8, sigma=1.0, mu_s=-0.4, sigma_s=1.0, p_equal=0.0, p_noise=0.0
):
    """Raises ValueError for arguments of sample_times that are out of range."""
    if sigma <= 0 or sigma_s <= 0:
        raise ValueError(f"sigma and sigma_s must be above 0, not {sigma:g} and {sigma_s:g}")
    for name, share in (("p_equal", p_equal), ("p_noise", p_noise)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], not {share:g}")
    if sampler not in TIMES:
        raise ValueError(f"times must be one of {', '.join(TIMES)}, not {sampler!r}")


def sample_guidance(
    n, device="cpu", sampler="constant", w=1.0, w_min=1.0, w_max=1.0, generator=None
):
    """Guidance weights (n,) float32.

    constant  w
    inverse   1/w uniform on [1/w_max, 1/w_min] (the paper)
    uniform   w uniform on [w_min, w_max] (the authors' release)

    Raises ValueError for arguments out of range.
    """
    check_guidance(sampler, w, w_min, w_max)
    if sampler == "constant":
        return torch.full((n,), float(w), device=device)
    r = torch.rand(n, device=device, generator=generator)
    if sampler == "inverse":
        return 1 / (1 / w_max + r * (1 / w_min - 1 / w_max))
    return w_min + r * (w_max - w_min)


def check_guidance(sampler="constant", w=1.0, w_min=1.0, w_max=1.0):
    """Raises ValueError for arguments of sample_guidance that are out of range."""
    if min(w, w_min) <= 0 or w_max < w_min:
        raise ValueError(
            "guidance weights must be above 0, and w_min at most w_max, "
            f"not {w:g}, {w_min:g}, {w_max:g}"
        )
    if sampler not in GUIDANCE:
        raise ValueError(f"guidance must be one of {', '.join(GUIDANCE)}, not {sampler!r}")


# ---- objectives ----------------------------------------------------------------------------------


class Term(NamedTuple):
    """One term of a loss, with a value for each sample."""

    name: str  # in the log
    loss: Tensor  # (B,), of which the mean is minimized
    error: Tensor  # (B,), what the log shows: the loss without adaptive_weight
    time: Tensor  # (B,) in [0, 1]; the log has the mean error of each quarter of it
    # True: backward runs on this term before the next one is computed, which frees its activations.
    # All other terms go backward together, after the last one. There must be one of these at least,
    # and together they must reach all weights: DDP takes the mean over the ranks in that backward.
    early: bool = False


# Keys of a line of the log, which no term may have as its name.
IN_THE_LOG = ("step", "loss", "grad_norm", "images_per_second", "data_wait", "skipped", "peak_gb")


def check_term(term, earlier, B):
    """Raises ValueError for what an objective must not yield. earlier: the names before it."""
    if not isinstance(term, Term):
        raise ValueError(f"an objective yields Terms, not a {type(term).__name__}")
    if not isinstance(term.name, str) or term.name.endswith("_by_time"):
        raise ValueError(f"a term cannot have the name {term.name!r} in the log")
    if term.name in earlier or term.name in IN_THE_LOG:
        raise ValueError(f"a second {term.name!r} in the log: each term has its own name")
    if any(t.shape != (B,) for t in (term.loss, term.error, term.time)):
        raise ValueError(f"term {term.name!r}: loss, error and time must each be (B,)")


def tvm_loss(model, target, x0, y, x1, t, s, s_fm, w, detach_jvp=False):
    """Yields the terms "terminal" and "fm".

    model has __call__, jvp, no_condition and config.scaled, as DiT; target has __call__. x0 and x1
    (B, ...); y (B, ...); t, s, s_fm, w (B,). detach_jvp cuts the gradient of dF/ds: that is
    faster, and biased.
    """
    w_column = column(w, x0)  # (B, 1, ..., 1), as all columns
    k = w_column if model.config.scaled else 1
    s_minus_t = column(s - t, x0)
    v = x1 - x0
    x_t = x0 + column(t, x0) * v
    x_fm = x0 + column(s_fm, x0) * v  # the same noise for both points

    F, dF = model.jvp(x_t, t, s, y, w, ds=torch.ones_like(s))
    F, dF = at_least_float32(F), at_least_float32(dF)
    if detach_jvp:
        dF = dF.detach()
    df = k * (F + s_minus_t * dF)  # df/ds

    with torch.no_grad():  # the target network, at both points in one call
        x_end = x_t + s_minus_t * k * F  # x_t + f
        both_x = torch.cat([x_end, x_fm])
        both_s = torch.cat([s, s_fm])
        both_y = torch.cat([y, model.no_condition(y)])
        both_w = torch.cat([w, torch.ones_like(w)])
        F_both = target(both_x, both_s, both_s, both_y, both_w)
        F_end, F_none = at_least_float32(F_both).chunk(2)
        u_end = k * F_end
        u_fm = w_column * v + (1 - w_column) * F_none  # without a class w = 1, and so k = 1

    terminal = mean_square(df - u_end) / w.square()
    terminal = terminal * (t != s)  # at t = s fm alone trains the velocity
    yield Term("terminal", terminal, terminal, t, early=True)

    F_fm = at_least_float32(model(x_fm, s_fm, s_fm, y, w))
    fm = mean_square(k * F_fm - u_fm) / w.square()
    yield Term("fm", fm, fm, s_fm)


def flow_matching_loss(model, target, x0, y, x1, s_fm, w):
    """The term fm of tvm_loss alone: flow matching with guidance built in."""
    w_column = column(w, x0)
    k = w_column if model.config.scaled else 1
    v = x1 - x0
    x_fm = x0 + column(s_fm, x0) * v
    with torch.no_grad():
        none = model.no_condition(y)
        F_none = at_least_float32(target(x_fm, s_fm, s_fm, none, torch.ones_like(w)))
        u_fm = w_column * v + (1 - w_column) * F_none
    F_fm = at_least_float32(model(x_fm, s_fm, s_fm, y, w))
    fm = mean_square(k * F_fm - u_fm) / w.square()
    yield Term("fm", fm, fm, s_fm)


def mean_square(x):
    """(B, ...) -> (B,), over all elements of a sample."""
    return x.square().mean(tuple(range(1, x.ndim)))


# ---- the loss of a training step -----------------------------------------------------------------


def check_objective(objective, times, guidance, detach_jvp=False, kappa=0.5, alpha_min=0.05):
    """Raises ValueError for arguments of TrainingLoss that are out of range, or do not go together.

    times and guidance: keyword arguments of sample_times and sample_guidance.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {objective!r}")
    if objective == "meanflow":
        if guidance.get("sampler", "constant") != "constant":
            raise ValueError('meanflow takes guidance "constant"')
        if not 0 <= kappa < 1:
            raise ValueError(f"meanflow takes kappa at least 0 and below 1, not {kappa:g}")
    if objective == "alpha_flow" and not 1e-4 <= alpha_min <= 1:  # less is lost in float32
        raise ValueError(f"alpha_flow takes alpha_min from 1e-4 to 1, not {alpha_min:g}")
    if detach_jvp and objective != "tvm":
        raise ValueError(f"detach_jvp is for the objective tvm, not {objective}")
    check_times(**times)
    check_guidance(**guidance)


class TrainingLoss(nn.Module):
    """The whole training loss as one module: value, terms = loss(x0, y, *loss.draw(x0, seed)).

    `draw` draws for the global batch and returns this rank's rows. So the numbers depend on the
    seed and on a sample's place in the batch, and not on the number of ranks.
    """

    def __init__(
        self,
        model,
        target,
        times=None,
        guidance=None,
        label_dropout=0.1,
        detach_jvp=False,
        objective="tvm",
        kappa=0.5,
        alpha_min=0.05,
    ):
        """times and guidance: keyword arguments of sample_times and sample_guidance.

        objective: one of OBJECTIVES. kappa: meanflow's. alpha_min: alpha_flow's. Raises ValueError
        for arguments out of range.
        """
        super().__init__()
        self.times = times or {}
        self.guidance = guidance or {}
        check_objective(objective, self.times, self.guidance, detach_jvp, kappa, alpha_min)
        self.model = model
        self.target = target
        self.label_dropout = label_dropout
        self.detach_jvp = detach_jvp
        self.objective = objective
        self.kappa = kappa
        self.alpha_min = alpha_min

    @property
    def detaches_jvp(self):
        """Whether no gradient goes through the derivative (for compile_blocks)."""
        return self.detach_jvp or self.objective in DETACHED_JVP

    def networks(self):
        """The networks that the objective runs."""
        if self.objective in MEANFLOWS:  # they do not run the EMA network
            return [self.model]
        return [self.model, self.target]

    def draw(self, x0, seed, first=0, total=None, progress=0.0):
        """What is random in a step, for x0 (B, ...): a list of x1, t, s, s_fm, w, drop.

        x1    (B, ...) float32, the noise
        t, s  (B,) float32, times
        s_fm  (B,) float32, the time of the term fm; for alpha_flow the time r stands in its place
        w     (B,) float32, guidance weights
        drop  (B,) bool, whether a sample loses its label

        All numbers of a global batch of `total` samples (default B) are drawn from `seed`, and
        rows first to first + B are returned, on x0's device. progress: the share of the training
        that is over, in [0, 1].
        """
        B = len(x0)
        total = B if total is None else total
        # Apple's GPUs lack some of these functions: there the CPU draws.
        source = x0.device if x0.device.type == "cuda" else torch.device("cpu")
        generator = torch.Generator(source).manual_seed(seed)
        options = dict(device=source, generator=generator)

        x1 = torch.randn(total, *x0.shape[1:], **options)
        t, s, s_fm = sample_times(total, **self.times, **options)
        if self.objective == "alpha_flow":
            s_fm = t + alpha_at(progress, self.alpha_min) * (s - t)
        w = sample_guidance(total, **self.guidance, **options)
        drop = torch.rand(total, **options) < self.label_dropout
        return [a[first : first + B].to(x0.device) for a in (x1, t, s, s_fm, w, drop)]

    def terms(self, x0, y, x1, t, s, s_fm, w, drop):
        """The terms of the objective: returns a generator of them.

        A new objective is one branch more, which returns a generator of its own. (No `yield` here:
        it would make a generator of this function, whose `return`s then yield nothing.) Train k F,
        because the sampler steps by it (k = w where config.scaled, else 1). Draw random numbers in
        draw() only: PyTorch's global generator gives every rank, and every resumed run, the same
        ones. An early term shares no graph with later ones, because forward() goes backward through
        it before it asks for the next.
        """
        y = torch.where(column(drop, y), self.model.no_condition(y), y)
        w_or_1 = w.masked_fill(drop, 1.0)  # without a class there is nothing to guide
        model, target = self.model, self.target
        if self.objective == "tvm":
            return tvm_loss(model, target, x0, y, x1, t, s, s_fm, w_or_1, self.detach_jvp)
        if self.objective == "flow_matching":
            return flow_matching_loss(model, target, x0, y, x1, s_fm, w_or_1)
        if self.objective == "meanflow":
            # MeanFlow and its relatives take w, not w_or_1: F without a class is trained at the
            # sample's own w, too, and guidance asks for it there.
            return meanflow_loss(model, x0, y, x1, t, s, w, drop, self.kappa)
        if self.objective == "improved_meanflow":
            return improved_meanflow_loss(model, x0, y, x1, t, s, w, drop)
        if self.objective == "alpha_flow":
            r = s_fm  # draw() puts r in its place
            return alpha_flow_loss(model, x0, y, x1, t, s, r, w, drop)
        raise ValueError(f"no branch here for objective {self.objective!r}")

    def forward(self, x0, y, *drawn, backward_part=None):
        """x0 (B, ...), y (B, ...) and what draw() has drawn -> (the loss, {name: Term, detached}).

        DDP takes the mean over the ranks in the backward that follows forward(). So an early term
        goes backward in here: backward_part, if given, is called with its loss. Then go backward
        through the loss that is returned: it holds the rest. Raises ValueError for terms that are
        not as Term says.
        """
        loss = 0
        terms = {}
        for term in self.terms(x0, y, *drawn):
            check_term(term, terms, len(x0))
            part = term.loss.mean()
            if backward_part and term.early:
                backward_part(part)
                part = part.detach()
            loss = loss + part
            terms[term.name] = Term(
                term.name, term.loss.detach(), term.error.detach(), term.time.detach()
            )
        if not terms:
            raise ValueError("an objective yields at least one Term")
        if backward_part and not loss.requires_grad:
            raise ValueError("each term of the loss is early, or has no gradient: none is left")
        return loss, terms


def backward(part, share=1.0):
    """Backward through a share of a part of the loss.

    Autocast is for the forward alone, so it is off here.
    """
    with torch.autocast(part.device.type, enabled=False):
        (part * share).backward()


# ---- for comparison: MeanFlow and its relatives --------------------------------------------------


def meanflow_loss(model, x0, y, x1, t, s, w, drop, kappa=0.5):
    """MeanFlow in the symbols above, where k F is the average velocity from t to s. One term:

        loss = || k F - sg[v~ + (s-t) k (v~ dF/dx + dF/dt)] ||^2
               times a weight 1 / (|| ||^2 + 0.001)
        v~   = (1-kappa) [w v + (1-w) k F(x_t, t, t, none)] + kappa k F(x_t, t, t, y)

    sg[] is a constant, and so is the weight. F is the trained network throughout. The paper's omega
    is w (1-kappa). v~ = v where the class is dropped (drop (B,) bool, y is "no class" there) or
    w = 1. All samples have the same w.
    """
    w_column = column(w, x0)
    k = w_column if model.config.scaled else 1
    v = x1 - x0
    x_t = x0 + column(t, x0) * v
    with torch.no_grad():
        F_class, F_none = with_and_without_class(model, x_t, t, y, w)
        guided = (1 - kappa) * (w_column * v + (1 - w_column) * k * F_none)
        guided = guided + kappa * k * F_class
        v_guided = torch.where(column(~drop & (w != 1), x0), guided, v)  # v~
    F, dF = model.jvp(x_t, t, s, y, w, dx=v_guided, dt=torch.ones_like(t))
    F, dF = at_least_float32(F), at_least_float32(dF)
    error = mean_square(k * F - (v_guided + column(s - t, x0) * k * dF).detach())
    yield Term("meanflow", error * adaptive_weight(error), error, t)


def improved_meanflow_loss(model, x0, y, x1, t, s, w, drop):
    """Improved MeanFlow (arXiv 2512.02012) without its second head. k F is the average velocity.

        loss = || V - v_g ||^2  times a weight 1 / (|| ||^2 + 0.001)
        V    = k F + (t-s) sg[k (u dF/dx + dF/dt)],  u = sg[k F(x_t, t, t, y)]
        v_g  = w v + (1-w) sg[k F(x_t, t, t, none)]

    sg[] is a constant. V estimates the velocity at t from the average velocity, so this is flow
    matching with another network. The derivative goes along the network's own velocity u:
    MeanFlow's goes along that of one pair of data and noise. v_g = v where the class is dropped.
    """
    k = column(w, x0) if model.config.scaled else 1
    v = x1 - x0
    x_t = x0 + column(t, x0) * v
    with torch.no_grad():
        F_class, F_none = with_and_without_class(model, x_t, t, y, w)
        u = k * F_class
        v_g = guided_velocity(v, k * F_none, w, drop)
    F, dF = model.jvp(x_t, t, s, y, w, dx=u, dt=torch.ones_like(t))
    F, dF = at_least_float32(F), at_least_float32(dF)
    V = k * F + column(t - s, x0) * (k * dF).detach()
    error = mean_square(V - v_g)
    yield Term("improved_meanflow", error * adaptive_weight(error), error, t)


def alpha_flow_loss(model, x0, y, x1, t, s, r, w, drop):
    """alpha-Flow (arXiv 2510.20771): MeanFlow without a derivative. k F is the average velocity.

        loss = || k F(x_t, t, s) - sg[alpha v_g + (1-alpha) k F(x_r, r, s)] ||^2
               times a weight 1 / (|| ||^2 + 0.001)
        x_r  = x_t + (r-t) v_g,  alpha = (t-r)/(t-s),  v_g as in improved MeanFlow

    So the way from t to s is a straight piece to the time r, and the network's own way from there.
    alpha = 1 is flow matching, here also where t = s; small ones come near MeanFlow.
    """
    k = column(w, x0) if model.config.scaled else 1
    v = x1 - x0
    x_t = x0 + column(t, x0) * v
    alpha = torch.where(t == s, 1.0, (t - r) / (t - s))
    alpha = column(alpha, x0)
    with torch.no_grad():
        F_none = at_least_float32(model(x_t, t, t, model.no_condition(y), w))
        v_g = guided_velocity(v, k * F_none, w, drop)
        x_r = x_t + column(r - t, x0) * v_g
        F_rest = at_least_float32(model(x_r, r, s, y, w))
        average_velocity = alpha * v_g + (1 - alpha) * k * F_rest
    F = at_least_float32(model(x_t, t, s, y, w))
    error = mean_square(k * F - average_velocity)
    yield Term("alpha_flow", error * adaptive_weight(error), error, t)


def alpha_at(progress, alpha_min):
    """alpha-Flow's alpha, a float: near 1 at first, then along a sigmoid down to alpha_min.

    progress: the share of the training that is over, in [0, 1].
    The published alpha_min is 0.005. With it t and r differ by at most 0.005. Under autocast the
    time MLP can hardly tell them apart: it rounds cos t to bfloat16, whose numbers lie 0.004 apart
    just below 1.
    """
    return max(alpha_min, 1 / (1 + math.exp(25 * (progress - 0.5))))


def with_and_without_class(model, x_t, t, y, w):
    """F(x_t, t, t, y, w) and F(x_t, t, t, none, w), in one call."""
    two_t = torch.cat([t, t])
    two_y = torch.cat([y, model.no_condition(y)])
    F_both = model(torch.cat([x_t, x_t]), two_t, two_t, two_y, torch.cat([w, w]))
    return at_least_float32(F_both).chunk(2)


def guided_velocity(v, u_none, w, drop):
    """w v + (1-w) u_none, and v where the class is dropped. w (B,), drop (B,) bool."""
    w_or_1 = column(w.masked_fill(drop, 1.0), v)
    return w_or_1 * v + (1 - w_or_1) * u_none


def adaptive_weight(error):
    """MeanFlow's weight of a sample, a constant to autograd. Its paper has a power, which is 1."""
    return 1 / (error.detach() + 1e-3)
