"""
Terminal Velocity Matching: the objective, and the samplers of its times and guidance weights.
Zhou, Parger, Haque, Song, arXiv 2511.19797; equation numbers are the paper's.

Conventions, everywhere in this project:
    x0 data, x1 noise ~ N(0, I), x_t = (1-t) x0 + t x1, v = x1 - x0
    t = 1 is noise, t = 0 is data, 0 <= s <= t <= 1
    F(x, t, s, y, w)  the network; y a class (num_classes = no class), w the guidance weight
    k = w in the scaled parameterization (config.scaled), else 1
    f(x, t, s) = (s-t) k F(x, t, s)   displacement from time t to time s
    u(x, s)    = k F(x, s, s)         velocity at time s

The loss of one sample, with F* the target network (an EMA of the trained weights, rate 0.99):
    terminal = || d/ds f(x_t, t, s) - k F*(x_t + f, s, s, y, w) ||^2 / w^2                      (12, 14)
               where d/ds f = k (F + (s-t) dF/ds); zero where t = s
    fm       = || k F(x_s', s', s', y, w) - [w v + (1-w) F*(x_s', s', s', none, 1)] ||^2 / w^2      (15)
with || ||^2 the mean over the elements. Gradients flow through d/ds f, dF/ds included; the point
x_t + f and everything of F* are constants.

For comparison, on the same network: flow matching, which is fm alone and samples by Euler steps F(x, t, t), and
MeanFlow (Geng et al., arXiv 2505.13447), below.
"""
import torch
from torch import nn

from dual import at_least_float32, widest


def sample_times(n, device="cpu", sampler="gap*", mu=-0.8, sigma=1.0, mu_s=-0.4, sigma_s=1.0, p_equal=0.0,
                 generator=None):
    """Times t, s, s_fm, each (n,) float32 in [0, 1] with s <= t (Table 3, Figure 9). With LN a
    logit-normal, and mu, sigma the parameters of the gap g (gap, gap*) or of t (trunc, clamp):

    gap    g ~ LN(mu, sigma), s ~ LN(mu_s, sigma_s) truncated to s <= 1-g, t = s + g; s_fm = s
    gap*   the same, with s_fm ~ LN(mu_s, sigma_s) drawn on its own
    trunc  t ~ LN(mu, sigma), s ~ LN(mu_s, sigma_s) truncated to s <= t; s_fm = s
    clamp  t ~ LN(mu, sigma), s ~ LN(mu_s, sigma_s), replaced by t where larger; s_fm = s
    two    t the larger and s the smaller of two draws of LN(mu_s, sigma_s); s_fm = s (MeanFlow's)

    Then t becomes s with probability p_equal; with two, s becomes t. Raises ValueError for arguments out of range.
    """
    if sigma <= 0 or sigma_s <= 0 or not 0 <= p_equal <= 1:
        raise ValueError(f"sigma and sigma_s must be above 0 and p_equal in [0, 1], not {sigma:g}, {sigma_s:g}, {p_equal:g}")
    if sampler not in ("gap*", "gap", "trunc", "clamp", "two"):
        raise ValueError(f'times must be "gap*", "gap", "trunc", "clamp" or "two", not {sampler!r}')
    wide = widest(device)
    normal = lambda: torch.randn(n, dtype=wide, device=device, generator=generator)
    uniform = lambda: torch.rand(n, dtype=wide, device=device, generator=generator)

    if sampler == "two":
        s, t = torch.sigmoid(mu_s + sigma_s * torch.stack([normal(), normal()])).sort(0).values.float()
        s = torch.where(uniform() < p_equal, t, s)
        return t, s, s
    first = torch.sigmoid(mu + sigma * normal())                        # g or t
    if sampler == "clamp":
        t, s = first, torch.minimum(first, torch.sigmoid(mu_s + sigma_s * normal()))
    else:
        top = first if sampler == "trunc" else 1 - first
        below = torch.special.ndtr((torch.logit(top) - mu_s) / sigma_s)         # P(LN <= top)
        s = torch.sigmoid(mu_s + sigma_s * torch.special.ndtri(uniform() * below))
        s = torch.minimum(s, top)                                       # where rounding went above it
        t = first if sampler == "trunc" else (s + first).clamp(max=1)
    s_fm = torch.sigmoid(mu_s + sigma_s * normal()) if sampler == "gap*" else s
    t = torch.where(uniform() < p_equal, s, t)
    return t.float(), s.float(), s_fm.float()


def sample_guidance(n, device="cpu", sampler="constant", w=1.0, w_min=1.0, w_max=1.0, generator=None):
    """Guidance weights (n,) float32: "constant" w; "inverse", 1/w uniform on [1/w_max, 1/w_min] (the
    paper); or "uniform" on [w_min, w_max] (the authors' release). Raises ValueError for arguments out
    of range."""
    if min(w, w_min) <= 0 or w_max < w_min:
        raise ValueError(f"guidance weights must be above 0, and w_min at most w_max, not {w:g}, {w_min:g}, {w_max:g}")
    if sampler == "constant":
        return torch.full((n,), float(w), device=device)
    if sampler not in ("inverse", "uniform"):
        raise ValueError(f'guidance must be "constant", "inverse" or "uniform", not {sampler!r}')
    r = torch.rand(n, device=device, generator=generator)
    if sampler == "inverse":
        return 1 / (1 / w_max + r * (1 / w_min - 1 / w_max))
    return w_min + r * (w_max - w_min)


def column(a):
    """(B,) -> (B, 1, 1, 1), for products with images."""
    return a.view(-1, 1, 1, 1)


def tvm_loss(model, target, x0, noise, y, w, t, s, s_fm, detach_jvp=False):
    """Yields the two terms of each sample, ("terminal", (B,)) and ("fm", (B,)), functions of the arguments alone; dict() of it
    has both. Who goes backward through the first before asking for the second does with less memory.

    model and target: __call__ and jvp as DiT's, config.scaled and config.num_classes. x0, noise
    (B, C, H, W); y (B,) int64; w, t, s, s_fm (B,). detach_jvp cuts the gradient of dF/ds: faster, biased.
    """
    k = w if model.config.scaled else torch.ones_like(w)
    v = noise - x0
    x_t = x0 + column(t) * v                                            # one noise for both points
    x_fm = x0 + column(s_fm) * v

    F, dF = map(at_least_float32, model.jvp(x_t, t, s, y, w, ds=torch.ones_like(s)))
    dF = dF.detach() if detach_jvp else dF
    df = column(k) * (F + column(s - t) * dF)                           # d/ds f

    with torch.no_grad():                                               # the target, at both points at once
        x_s = x_t + column((s - t) * k) * F
        times, one = torch.cat([s, s_fm]), torch.ones_like(w)
        none = torch.full_like(y, model.config.num_classes)
        F_target = target(torch.cat([x_s, x_fm]), times, times, torch.cat([y, none]), torch.cat([w, one]))
        F_s, F_none = at_least_float32(F_target).chunk(2)
        u_s, u_fm = column(k) * F_s, column(w) * v + column(1 - w) * F_none

    square = lambda x: x.square().mean((1, 2, 3)) / w.square()
    yield "terminal", square(df - u_s) * (t != s)
    F_fm = at_least_float32(model(x_fm, s_fm, s_fm, y, w))
    yield "fm", square(column(k) * F_fm - u_fm)


def flow_matching_loss(model, target, x0, noise, y, w, s_fm):
    """tvm_loss, of the same arguments, without its terminal term."""
    k, one, v = w if model.config.scaled else torch.ones_like(w), torch.ones_like(w), noise - x0
    x_fm = x0 + column(s_fm) * v
    with torch.no_grad():
        F_none = at_least_float32(target(x_fm, s_fm, s_fm, torch.full_like(y, model.config.num_classes), one))
        u_fm = column(w) * v + column(1 - w) * F_none
    F_fm = at_least_float32(model(x_fm, s_fm, s_fm, y, w))
    yield "fm", (column(k) * F_fm - u_fm).square().mean((1, 2, 3)) / w.square()


def meanflow_loss(model, x0, noise, y, w, t, s, kappa=0.5, c=1e-3, p=1.0):
    """MeanFlow in the symbols above, arguments and k as tvm_loss's: k F is the mean velocity from t to s,

        loss = || k F - [v~ + (s-t) k (v~ dF/dx + dF/dt)] ||^2,   the bracket a constant, times a constant 1/(|| ||^2 + c)^p
        v~   = omega v + kappa k F(x_t, t, t, y) + (1-omega-kappa) k F(x_t, t, t, none)

    with F the trained network throughout and omega = w (1-kappa), which makes the guidance weight w as in fm; v~ = v where
    y is no class or w = 1. w is one constant. Returns {"loss": (B,), "error": (B,), || ||^2 detached}."""
    k, v, none = column(w) if model.config.scaled else 1, noise - x0, torch.full_like(y, model.config.num_classes)
    x_t = x0 + column(t) * v
    with torch.no_grad():
        two_t = torch.cat([t, t])
        u, u_none = at_least_float32(model(torch.cat([x_t, x_t]), two_t, two_t, torch.cat([y, none]), torch.cat([w, w]))).chunk(2)
        guided = (1 - kappa) * (column(w) * v + (1 - column(w)) * k * u_none) + kappa * k * u
        v = torch.where(column((y != none) & (w != 1)), guided, v)
    F, dF = map(at_least_float32, model.jvp(x_t, t, s, y, w, dx=v, dt=torch.ones_like(t)))
    error = (k * F - (v + column(s - t) * k * dF).detach()).square().mean((1, 2, 3))
    return {"loss": error / (error.detach() + c) ** p, "error": error.detach()}


class TVM(nn.Module):
    """The whole training loss as one module: loss(x0, y, *loss.draw(x0, seed)).
    All that is random is drawn for the global batch, of which a caller keeps its rows, so that the numbers depend on the
    seed and a sample's place in the batch, not on the ranks."""

    def __init__(self, model, target, times={}, guidance={}, label_dropout=0.1, detach_jvp=False, objective="tvm", kappa=0.5):
        """times and guidance: keyword arguments of sample_times and sample_guidance. objective: "tvm", "meanflow" (with
        its kappa) or "flow_matching". Raises ValueError for arguments out of range."""
        super().__init__()
        if objective not in ("tvm", "meanflow", "flow_matching"):
            raise ValueError(f'objective must be "tvm", "meanflow" or "flow_matching", not {objective!r}')
        if objective == "meanflow" and (guidance.get("sampler", "constant") != "constant" or not 0 <= kappa < 1):
            raise ValueError(f'meanflow takes guidance "constant" and kappa at least 0 and below 1, not {kappa:g}')
        sample_times(1, **times), sample_guidance(1, **guidance)         # complain now rather than in a step
        self.model, self.target, self.times, self.guidance = model, target, times, guidance
        self.label_dropout, self.detach_jvp, self.objective, self.kappa = label_dropout, detach_jvp, objective, kappa

    def draw(self, x0, seed, first=0, total=None):
        """Noise like x0 (B, C, H, W), and t, s, s_fm, w (B,) and drop (B,) bool, for rows first to first + B of a global
        batch of `total` (default B)."""
        B, total = len(x0), len(x0) if total is None else total
        source = x0.device if x0.device.type == "cuda" else torch.device("cpu")      # Apple's GPUs lack some of these
        g = torch.Generator(source).manual_seed(seed)
        rows = lambda a: a[first:first + B].to(x0.device)
        options = dict(device=source, generator=g)
        noise = rows(torch.randn(total, *x0.shape[1:], **options))
        t, s, s_fm = map(rows, sample_times(total, **self.times, **options))
        w = rows(sample_guidance(total, **self.guidance, **options))
        return noise, t, s, s_fm, w, rows(torch.rand(total, **options)) < self.label_dropout

    def forward(self, x0, y, noise, t, s, s_fm, w, drop, backward=lambda part: part):
        """x0 (B, C, H, W), y (B,) and what was drawn -> {"loss": what is to be minimized, "terminal", "fm", "t", "s_fm":
        (B,), detached}. backward is given each part of the loss before the next is computed; "loss" is the sum of what it returns."""
        y, w_drop = y.masked_fill(drop, self.model.config.num_classes), w.masked_fill(drop, 1.0)

        if self.objective == "meanflow":                                # logged by where t = s, which is fm, and where not
            terms = meanflow_loss(self.model, x0, noise, y, w, t, s, self.kappa)
            loss, error = backward(terms["loss"].mean()), terms["error"]
            terms = {"terminal": error * (t != s), "fm": error * (t == s)}
        else:
            both, loss, terms = (self.model, self.target, x0, noise, y, w_drop), 0, {"terminal": torch.zeros_like(w)}
            for name, term in (flow_matching_loss(*both, s_fm) if self.objective == "flow_matching" else
                               tvm_loss(*both, t, s, s_fm, self.detach_jvp)):
                loss, terms[name] = loss + backward(term.mean()), term.detach()
        return {"loss": loss, **terms, "t": t, "s_fm": s_fm}


def backward(part, share=1.0):
    """Backward through a share of a part of the loss, as autocast wants it, after its forward; returns the part, detached."""
    with torch.autocast(part.device.type, enabled=False):
        (part * share).backward()
    return part.detach()




