"""
attention_jvp beside plain attention: speed, memory, error. Run as `python bench.py attention`.

It prints two tables in Markdown, to be pasted into docs/attention.md. Two numbers are forward and
backward. "plain" is F.scaled_dot_product_attention as torch dispatches it, without any derivative
in forward mode, and "x plain" is the full call in units of it. "formulas" are the same formulas in
bfloat16 PyTorch operations, as they are and in torch.compile. Times are medians of events on the
GPU, in milliseconds, bfloat16, each after L2 was overwritten. Those of the full call, of plain
attention and of the variants are of rounds in turns, because clocks drift. TFLOP/s count useful
products: 6 forward and 15 backward, each 2 B H S S D operations. "error" is the largest relative L2
error against float64 of the two outputs and the six gradients.

The second table has variants, as parts of the time of the full call on the same inputs:
    padding   a quarter of the keys is hidden by a mask (B, 1, 1, S)
    all true  the same mask, which hides none
    causal    is_causal
    grouped   half as many heads of keys and values
    only tq   tk = tv = None
    dO only   no gradient arrives at the tangent, as in MeanFlow and sCM, which detach it

Kernels are compiled first, by several processes at once: one after the other takes minutes.
--quick makes two rounds of eight calls instead of five of thirty, and times the formulas up to
1,024 tokens and above head size 128 only. It takes about three minutes on an H200.
"""

import concurrent.futures
import multiprocessing
import os
import time

import numpy as np
import torch
import torch.nn.functional as F

import attention_jvp as A
from files import UserError
from pictures import new_figure, save_figure

SHAPES = [  # B, H, S, D
    (32, 18, 256, 64),
    (8, 18, 1024, 64),
    (32, 16, 256, 72),
    (1, 24, 4096, 128),
    (1, 24, 8192, 128),
    (1, 12, 4096, 256),
]
ODD_SHAPES = [  # B, H, Sq, Sk, D, small, for compute-sanitizer
    (1, 2, 65, 33, 64),
    (2, 1, 33, 130, 72),
    (1, 1, 129, 70, 128),
    (2, 1, 132, 70, 128),  # for attention_hopper.py, too
    (1, 1, 1, 1, 8),
]
FORMULAS_UP_TO = 1024  # tokens up to which --quick times the formulas (above head size 128: all)
COMPILERS = 12  # processes that compile at once, where there are so many cores
VARIANTS = ("padding", "all true", "causal", "grouped", "only tq", "dO only")


# ---- what is timed -------------------------------------------------------------------------------


def formulas(q, k, v, tq, tk, tv):
    """The formulas at the top of attention_jvp.py, in bfloat16 operations."""
    scale = q.size(-1) ** -0.5
    P = (q @ k.mT * scale).softmax(-1)
    tS = (tq @ k.mT + q @ tk.mT) * scale
    mean = (P * tS).sum(-1, keepdim=True, dtype=torch.float32).to(P.dtype)
    PN = P * (tS - mean)
    return P @ v, PN @ v + P @ tv


def make_inputs(shape, seed=0):
    """q, k, v, tq, tk, tv, which want gradients, and the gradients of o and to."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = []
    for _ in range(8):
        x.append(torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator))
    return [t.requires_grad_() for t in x[:6]], x[6:]


def padding_mask(x, hidden):
    """(B, 1, 1, S) bool: the last `hidden` keys are not seen."""
    B, _, S, _ = x.shape
    mask = torch.ones(B, 1, 1, S, dtype=torch.bool, device=x.device)
    mask[..., S - hidden :] = False
    return mask


def variants(x):
    """{name: (function, its inputs)} of what attention_jvp takes beside full attention."""
    q, k, v, tq, tk, tv = x
    padding = padding_mask(q, q.size(2) // 4)
    all_true = padding_mask(q, 0)
    constants = [t.detach() for t in (tq, tk, tv)]
    half = k.size(1) // 2
    few = [t.detach()[:, :half].contiguous().requires_grad_() for t in (k, v, tk, tv)]

    def padded(*x):
        return A.attention_jvp(*x, attn_mask=padding)

    def with_all_true(*x):
        return A.attention_jvp(*x, attn_mask=all_true)

    def causal(*x):
        return A.attention_jvp(*x, is_causal=True)

    def grouped(*x):
        return A.attention_jvp(*x, enable_gqa=True)

    def only_tq(q, k, v, tq):
        return A.attention_jvp(q, k, v, tq, None, None)

    def value(q, k, v):
        return A.attention_jvp(q, k, v, *constants)[0]

    return {
        "padding": (padded, x),
        "all true": (with_all_true, x),
        "causal": (causal, x),
        "grouped": (grouped, [q, few[0], few[1], tq, few[2], few[3]]),
        "only tq": (only_tq, [q, k, v, tq]),
        "dO only": (value, [q, k, v]),
    }


def compiled_formulas():
    """The formulas in torch.compile."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # for a backward that is made repeatedly
    return torch.compile(formulas)


def times_formulas(shape, quick):
    """Whether the formulas are timed at a shape."""
    _, _, S, D = shape
    return not quick or S <= FORMULAS_UP_TO or D > 128


# ---- compiling -----------------------------------------------------------------------------------


def compile_all(quick):
    """Compiles what is timed, in several processes, which leave it in the caches on disk.

    An attempt that fails changes nothing: the call is then compiled where it is timed."""
    jobs = []
    for shape in SHAPES:
        jobs += [(shape, name) for name in ("full", *VARIANTS) if name != "all true"]
        if times_formulas(shape, quick):
            jobs.append((shape, "formulas"))
    workers = min(COMPILERS, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        concurrent.futures.wait([pool.submit(compile_one, *job) for job in jobs])


def compile_one(shape, name):
    """Runs one call and its backward once."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    x, d = make_inputs(shape)
    if name == "formulas":
        function = compiled_formulas()
    elif name == "full":
        function = A.attention_jvp
    else:
        function, x = variants(x)[name]
    backward_of(function(*x), x, d)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


# ---- timing --------------------------------------------------------------------------------------


def timed(function, calls):
    """Median milliseconds of a function on the GPU, each time after L2 was overwritten.

    For that 256 MB of zeros are written; ten times as many where the function takes under a
    millisecond, so that the host, which may need half of one, is ahead of the GPU.
    """
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")

    def run(calls, repeats):
        marks = []
        for _ in range(calls):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            for _ in range(repeats):
                flush.zero_()
            start.record()
            function()
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in marks]

    repeats = 10 if min(run(3, 10)) < 1 else 1
    return np.median(run(calls, repeats))


def backward_of(outputs, x, d, **how):
    """Gradients of x. outputs: o and to, or o alone, which takes the first of d."""
    if torch.is_tensor(outputs):
        outputs, d = (outputs,), d[:1]
    return torch.autograd.grad(outputs, x, d, **how)


def times(function, x, d, calls):
    """Median milliseconds of function(*x), and of its backward from d."""
    outputs = function(*x)
    forward = timed(lambda: function(*x), calls)
    backward = timed(lambda: backward_of(outputs, x, d, retain_graph=True), calls)
    return forward, backward


def times_in_a_graph(function, x, d):
    """The same as a CUDA graph, with inputs in L2."""
    from triton.testing import do_bench_cudagraph

    def both():
        return torch.autograd.grad(function(*x), x, d)

    with torch.cuda.stream(torch.cuda.Stream()):
        # Leaves of its own: a capture must not meet autograd nodes of another stream.
        x = [t.detach().clone().requires_grad_() for t in x]
        forward = do_bench_cudagraph(lambda: function(*x), rep=50, return_mode="median")
        total = do_bench_cudagraph(both, rep=50, return_mode="median")
    return forward, total - forward


def in_turns(functions, d, rounds, calls):
    """{name: (forward, backward)}, medians over the rounds. functions: {name: (function, x)}."""
    measured = {name: [] for name in functions}
    for _ in range(rounds):
        for name, (function, x) in functions.items():
            measured[name].append(times(function, x, d, calls))
    return {name: np.median(results, axis=0) for name, results in measured.items()}


# ---- memory and error ----------------------------------------------------------------------------


def memory(x, d):
    """Peak bytes above inputs and incoming gradients, and the bytes of what is needed: the eight
    results and four float32 rows."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = A.attention_jvp(*x)
    torch.autograd.grad(outputs, x, d)
    B, H, S, _ = x[0].shape
    needed = 8 * x[0].numel() * 2 + 4 * B * H * S * 4
    return torch.cuda.max_memory_allocated() - before, needed


def largest_error(x, d, heads=2):
    """The largest relative L2 error of o, to and the six gradients, against float64.

    It is measured on some heads of the whole call's result.
    """
    outputs = A.attention_jvp(*x)
    got = [*outputs, *torch.autograd.grad(outputs, x, d)]
    y = [t.detach()[:1, :heads].double().requires_grad_() for t in x]
    outputs = A.attention_jvp_reference(*y)
    want = [*outputs, *torch.autograd.grad(outputs, y, [t[:1, :heads].double() for t in d])]
    errors = []
    for a, b in zip(got, want, strict=True):
        errors.append(((a[:1, :heads].double() - b).norm() / b.norm()).item())
    return max(errors) if all(map(np.isfinite, errors)) else np.nan


# ---- the tables and the plot ---------------------------------------------------------------------


def pair(forward_and_backward, digits=3):
    forward, backward = forward_and_backward
    return f"{forward:.{digits}f} / {backward:.{digits}f}"


def table_rows(shape, quick):
    """Rows of one shape, {title: text} each, in the order of the columns: of the first table, of
    the same as a CUDA graph or None, and of the table of variants."""
    B, H, S, D = shape
    x, d = make_inputs(shape)
    plain = F.scaled_dot_product_attention
    functions = {"full": (A.attention_jvp, x), "plain": (plain, x[:3]), **variants(x)}
    rounds, calls = (2, 8) if quick else (5, 30)
    found = in_turns(functions, d, rounds, calls)
    full = found["full"]
    title = "batch, heads, tokens, head size"
    name = f"{B}, {H}, {S}, {D}"
    useful = 2 * B * H * S * S * D * 1e-9 * np.array([6, 15])  # GFLOP; over ms TFLOP/s
    row = {
        title: name,
        "full": pair(full),
        "plain": pair(found["plain"]),
        "x plain": pair(full / found["plain"], 2),
        "TFLOP/s": pair(useful / full, 0),
        "formulas": "",
        "formulas, compiled": "",
    }
    if times_formulas(shape, quick):
        row["formulas"] = pair(times(formulas, x, d, 10))
        row["formulas, compiled"] = pair(times(compiled_formulas(), x, d, 10))
    peak, needed = memory(x, d)
    row["peak MB (needed)"] = f"{peak / 1e6:.1f} ({needed / 1e6:.1f})"
    row["error"] = f"{largest_error(x, d):.1e}"

    graph_row = None
    if S <= 256:
        graph = np.array(times_in_a_graph(A.attention_jvp, x, d))
        plain_graph = np.array(times_in_a_graph(plain, x[:3], d[:1]))
        graph_row = dict.fromkeys(row, "")
        graph_row[title] = "as a CUDA graph, inputs in L2"
        graph_row["full"] = pair(graph)
        graph_row["plain"] = pair(plain_graph)
        graph_row["x plain"] = pair(graph / plain_graph, 2)

    parts = {title: name}
    for variant in VARIANTS:
        parts[variant] = pair(found[variant] / full, 2)
    return row, graph_row, parts


def line_of(cells):
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def head_of(row):
    """The first two lines of a table in Markdown, with the titles of a row."""
    return f"{line_of(row)}\n{'|---' * len(row)}|"


def use_hopper_kernels(least_scores=None):
    """Have attention_hopper.py's kernels run wherever they can, from so many scores on. Raises
    UserError where they cannot run here."""
    hopper, reason = A._import_hopper_kernels()
    reason = reason or hopper.wrong_triton()
    if reason:
        raise UserError(f"--hopper: {reason}")
    A.HOPPER_KERNELS = True
    if least_scores is not None:
        hopper.LEAST_SCORES = least_scores


def table(quick=False, plot="attention.png", hopper=False):
    """Print the two tables and, where `plot` names a file, draw the plot.

    hopper: with attention_hopper.py's kernels.
    """
    if hopper:
        use_hopper_kernels()
    os.makedirs(os.path.dirname(plot) or ".", exist_ok=True)
    began = time.monotonic()
    compile_all(quick)
    compiled = time.monotonic()
    versions = f"torch {torch.__version__}, triton {A.triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}, {time.strftime('%Y-%m-%d')}, ", end="")
    print("two rounds of eight calls" if quick else "five rounds of thirty calls")
    print("Milliseconds, forward / backward.\n")
    variant_rows = []
    for shape in SHAPES:
        row, graph_row, parts = table_rows(shape, quick)
        if not variant_rows:
            print(head_of(row))
        variant_rows.append(parts)
        print(line_of(row.values()), flush=True)
        if graph_row is not None:
            print(line_of(graph_row.values()), flush=True)
        torch.cuda.empty_cache()
    print("\nParts of the time of the full call, forward / backward.\n")
    print(head_of(variant_rows[0]))
    for parts in variant_rows:
        print(line_of(parts.values()))
    if plot:
        draw_plot(plot, quick)
    took = f"{compiled - began:.0f} s to compile, {time.monotonic() - compiled:.0f} s to time"
    print(f"\n{took}", flush=True)


def draw_plot(path, quick, H=24, D=128):
    """Time over sequence length, both logarithmic, of one batch of H heads."""
    sizes = [256, 512, 1024, 2048, 4096, 8192, 16384]
    if quick:
        sizes = sizes[1:5]
    figure = new_figure(figsize=(6, 4.5), layout="tight")
    axes = figure.add_subplot()
    for name, function, tensors, color in (
        ("attention_jvp", A.attention_jvp, 6, "C0"),
        ("plain attention", F.scaled_dot_product_attention, 3, "C1"),
        ("formulas in PyTorch", formulas, 6, "C2"),
    ):
        at, forward, backward = [], [], []
        for S in sizes:
            if function is formulas and S > 4096:
                continue  # its matrices would take too much memory
            x, d = make_inputs((1, H, S, D))
            f, b = times(function, x[:tensors], d, 10)
            at.append(S)
            forward.append(f)
            backward.append(b)
        how = dict(color=color, marker="o", ms=3, base=2)
        axes.loglog(at, forward, "-", label=f"{name}, forward", **how)
        axes.loglog(at, backward, "--", label=f"{name}, backward", **how)
    axes.set(xlabel="sequence length", ylabel="milliseconds")
    axes.set_xticks(sizes, map(str, sizes))
    title = f"{torch.cuda.get_device_name()}, bfloat16, {H} heads of {D}"
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path, dpi=150)


def sanitize(hopper=False):
    """Small odd shapes, forward and backward, for compute-sanitizer to watch."""
    if hopper:
        use_hopper_kernels(least_scores=0)
    for B, H, Sq, Sk, D in ODD_SHAPES:
        x = []
        for S in (Sq, Sk, Sk, Sq, Sk, Sk):
            t = torch.randn(B, H, S, D, device="cuda", dtype=torch.bfloat16)
            x.append(t.requires_grad_())
        key_mask = torch.ones(B, 1, 1, Sk, dtype=torch.bool, device="cuda")
        key_mask[..., Sk // 2 :] = False
        dense_mask = torch.rand(B, H, Sq, Sk, device="cuda") > 0.5
        for how in (
            {},
            dict(attn_mask=key_mask),
            dict(attn_mask=dense_mask),
            dict(is_causal=True),
        ):
            o, to = A.attention_jvp(*x, **how)
            grads = torch.randn_like(o), torch.randn_like(to)
            torch.autograd.grad((o, to), x, grads, retain_graph=True)
            torch.autograd.grad(o, x[:3], torch.randn_like(o))
    torch.cuda.synchronize()
