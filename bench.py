"""
Every speed, measured.

    python bench.py attention [--quick]     # attention_jvp on one GPU, beside plain attention: speed, memory, error
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python bench.py sanitize     # or racecheck

Times are medians of triton.testing.do_bench in milliseconds (cold L2), bfloat16. "plain" is
F.scaled_dot_product_attention as torch dispatches it, without any derivative in forward mode; "maths" the same formulas
in PyTorch operations. Useful products: 6 forward, 15 backward, each 2 B H S S D operations.
"""
import sys

import torch
import torch.nn.functional as F

import attention_jvp as A

SHAPES = [(32, 18, 256, 64), (8, 18, 1024, 64), (32, 16, 256, 72), (1, 24, 4096, 128), (1, 24, 8192, 128)]


def torch_maths(q, k, v, tq, tk, tv):
    a = q.size(-1) ** -0.5
    P = (q @ k.mT * a).softmax(-1)
    tS = (tq @ k.mT + q @ tk.mT) * a
    PN = P * (tS - (P * tS).sum(-1, keepdim=True, dtype=torch.float32).to(P.dtype))
    return P @ v, PN @ v + P @ tv


def inputs(shape, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    x = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=g) for _ in range(8)]
    return [t.requires_grad_() for t in x[:6]], x[6:]


def attention_times(fn, x, d, quick=False, graph=False):
    """Median milliseconds of fn(*x) and of its backward from d."""
    from triton.testing import do_bench, do_bench_cudagraph
    if graph:  # leaves of its own: a capture must not meet autograd nodes of another stream
        with torch.cuda.stream(torch.cuda.Stream()):
            x = [t.detach().clone().requires_grad_() for t in x]
            fwd = do_bench_cudagraph(lambda: fn(*x), rep=50, return_mode="median")
            both = do_bench_cudagraph(lambda: torch.autograd.grad(fn(*x), x, d), rep=50, return_mode="median")
        return fwd, both - fwd
    o = fn(*x)
    o, d = ((o,), d[:1]) if torch.is_tensor(o) else (o, d)
    rep = dict(warmup=10, rep=40) if quick else dict(warmup=50, rep=200)
    return (do_bench(lambda: fn(*x), return_mode="median", **rep),
            do_bench(lambda: torch.autograd.grad(o, x, d, retain_graph=True), return_mode="median", **rep))


def attention_errors(x, d, heads=2):
    """Relative L2 errors against float64 of o, to and the six gradients, on some heads of the whole call's result."""
    o = A.attention_jvp(*x)
    got = (*o, *torch.autograd.grad(o, x, d))
    y = [t.detach()[:1, :heads].double().requires_grad_() for t in x]
    r = A.attention_jvp_reference(*y)
    want = (*r, *torch.autograd.grad(r, y, [t[:1, :heads].double() for t in d]))
    return [((a[:1, :heads].double() - b).norm() / b.norm()).item() for a, b in zip(got, want)]


def attention_memory(x, d):
    """Peak bytes above inputs and incoming gradients, and the bytes of the eight results and four float32 rows."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = A.attention_jvp(*x)
    torch.autograd.grad(o, x, d)
    B, H, S, D = x[0].shape
    return torch.cuda.max_memory_allocated() - before, 8 * x[0].numel() * 2 + 4 * B * H * S * 4


def attention_sanitize():
    """Small odd shapes, once, forward and backward, for compute-sanitizer to watch."""
    for B, H, Sq, Sk, D in [(1, 2, 65, 33, 64), (2, 1, 33, 130, 72), (1, 1, 129, 70, 128), (1, 1, 1, 1, 8)]:
        x = [torch.randn(B, H, S, D, device="cuda", dtype=torch.bfloat16).requires_grad_() for S in (Sq, Sk, Sk) * 2]
        o = A.attention_jvp(*x)
        torch.autograd.grad(o, x, [torch.randn_like(t) for t in o], retain_graph=True)
        torch.autograd.grad(o[0], x[:3], torch.randn_like(o[0]))
    torch.cuda.synchronize()


def attention_table(shapes=SHAPES, quick=False, plot="attention.png", maths=True):
    """Prints the table and writes the plot; returns the rows as dicts. maths: also time the PyTorch formulas."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"{'B,H,S,D':>16} | {'fwd':>7} {'plain':>6} {'x':>4} {'TF/s':>4} | {'bwd':>7} {'plain':>6} {'x':>4} {'TF/s':>4} | "
          f"{'maths fwd/bwd':>15} {'compiled':>15} | {'peak MB':>7} {'needed':>6} | {'error':>7} | graph fwd/bwd, plain")
    rows = []
    for shape in shapes:
        B, H, S, D = shape
        x, d = inputs(shape)
        r = dict(shape=shape)
        r["fwd"], r["bwd"] = attention_times(A.attention_jvp, x, d, quick)
        r["plain_fwd"], r["plain_bwd"] = attention_times(F.scaled_dot_product_attention, x[:3], d, quick)
        if maths and (not quick or S <= 1024):
            r["maths"] = attention_times(torch_maths, x, d, True)
            torch._dynamo.reset()
            r["compiled"] = attention_times(torch.compile(torch_maths), x, d, True)
        if S <= 256:
            r["graph"] = attention_times(A.attention_jvp, x, d, graph=True)
            r["plain_graph"] = attention_times(F.scaled_dot_product_attention, x[:3], d[:1], graph=True)
        r["peak"], r["needed"] = attention_memory(x, d)
        r["errors"] = attention_errors(x, d)
        r["fwd_x"], r["bwd_x"] = r["fwd"] / r["plain_fwd"], r["bwd"] / r["plain_bwd"]
        product = 2 * B * H * S * S * D * 1e-9  # TFLOP per ms
        r["fwd_tflops"], r["bwd_tflops"] = 6 * product / r["fwd"], 15 * product / r["bwd"]
        pair = lambda key: "/".join(f"{t:.3f}" for t in r[key]) if key in r else "-"
        print(f"{','.join(map(str, shape)):>16} | {r['fwd']:7.3f} {r['plain_fwd']:6.3f} {r['fwd_x']:4.2f} {r['fwd_tflops']:4.0f} | "
              f"{r['bwd']:7.3f} {r['plain_bwd']:6.3f} {r['bwd_x']:4.2f} {r['bwd_tflops']:4.0f} | {pair('maths'):>15} "
              f"{pair('compiled'):>15} | {r['peak'] / 1e6:7.1f} {r['needed'] / 1e6:6.1f} | {max(r['errors']):.1e} | {pair('graph')} {pair('plain_graph')}",
              flush=True)
        rows.append(r)
        del x, d
    if plot:
        attention_plot(plot, quick)
    return rows


def attention_plot(path, quick=False, H=24, D=128):
    """Time over sequence length, log-log, one batch of H heads."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    sizes = [512, 1024, 2048, 4096] if quick else [256, 512, 1024, 2048, 4096, 8192, 16384]
    cases = [("attention_jvp", A.attention_jvp, 6, "C0"), ("plain attention", F.scaled_dot_product_attention, 3, "C1"),
             ("PyTorch maths", torch_maths, 6, "C2")]
    plt.figure(figsize=(6, 4.5))
    for name, fn, n, color in cases:
        at = [S for S in sizes if fn is not torch_maths or S <= 4096]
        times = []
        for S in at:
            x, d = inputs((1, H, S, D))
            times.append(attention_times(fn, x[:n], d, quick=True))
        for i, (part, style) in enumerate((("forward", "-"), ("backward", "--"))):
            plt.loglog(at, [t[i] for t in times], style, color=color, marker="o", ms=3, label=f"{name}, {part}", base=2)
    plt.xticks(sizes, [str(s) for s in sizes])
    plt.xlabel("sequence length")
    plt.ylabel("milliseconds")
    plt.title(f"{torch.cuda.get_device_name()}, bfloat16, {H} heads of {D}", fontsize=10)
    plt.grid(alpha=0.3)
    plt.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(path, dpi=150)


def main():
    what, options = sys.argv[1:2], sys.argv[2:]
    if what not in (["attention"], ["sanitize"]) or any(o != "--quick" and not o.startswith("--plot=") for o in options):
        sys.exit("bench.py: python bench.py attention [--quick] [--plot=FILE.png], or python bench.py sanitize")
    if not torch.cuda.is_available():
        sys.exit("bench.py: no CUDA device here")
    if what == ["sanitize"]:
        attention_sanitize()
    else:
        attention_table(quick="--quick" in options, plot=next((o[7:] for o in options if o.startswith("--plot=")), "attention.png"))


if __name__ == "__main__":
    main()
