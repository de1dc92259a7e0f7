"""
Every speed, measured; and Theorem 1's bound beside what it bounds.

    python bench.py attention [--quick] [--plot=attention.png]    # attention_jvp beside plain attention: speed, memory, error
    python bench.py step [--size=XL/2] [--input_size=32] [--batch=32] [--modes=compiled,...]   # a whole training step
    torchrun --nproc_per_node=4 bench.py step --modes=compiled      # the same on several GPUs, --batch on each
    python bench.py trainer [--preset=im256_w2] [--input_size=32] [--batch=64]       # train.py itself, data wait and all
    python bench.py sample [--size=XL/2] [--input_size=32] [--batch=64]
    python bench.py fid [--batch=128]                               # Inception's speed, and what TensorFloat-32 makes of FID
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python bench.py sanitize     # or racecheck
    python bench.py theory [--quick] [--report] [--plot=assets/theory.png]      # on a CPU; --report: from the last run's log

Attention: medians of events on the GPU (cold L2), bfloat16, of five rounds in turns with plain attention's; sampling: of
triton.testing.do_bench; a step: by the wall clock. "plain" is F.scaled_dot_product_attention as torch dispatches it, without any
derivative in forward mode; "maths" the same formulas in PyTorch operations. Useful products: 6 forward, 15 backward, each 2 B H S S D operations.
"""
import copy
import functools
import gc
import inspect
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import attention_jvp as A
import fid
from dataset import Writer
from device import Graph, all_reduce
from files import HERE
from latents import SD_VAE
from loss import TVM, backward
from model import DiT, DiTConfig, compile_blocks
from sample import fast, sample
from theory import theory

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


def timed(function, calls):
    """Median milliseconds of a function on the GPU, each time after 256 MB of zeros, so that L2 is cold; after ten times as
    many where it takes under a millisecond, so that the host, which may need half of one, is ahead of the GPU."""
    def run(calls, repeats):
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in marks:
            for _ in range(repeats):
                flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in marks]

    flush = torch.empty(2 ** 28, dtype=torch.int8, device="cuda")
    return np.median(run(calls, 10 if min(run(3, 10)) < 1 else 1))


def attention_times(fn, x, d, quick=False, graph=False):
    """Median milliseconds of fn(*x) and of its backward from d."""
    if graph:  # leaves of its own: a capture must not meet autograd nodes of another stream
        from triton.testing import do_bench_cudagraph
        with torch.cuda.stream(torch.cuda.Stream()):
            x = [t.detach().clone().requires_grad_() for t in x]
            fwd = do_bench_cudagraph(lambda: fn(*x), rep=50, return_mode="median")
            both = do_bench_cudagraph(lambda: torch.autograd.grad(fn(*x), x, d), rep=50, return_mode="median")
        return fwd, both - fwd
    o = fn(*x)
    o, d = ((o,), d[:1]) if torch.is_tensor(o) else (o, d)
    calls = 10 if quick else 30
    return timed(lambda: fn(*x), calls), timed(lambda: torch.autograd.grad(o, x, d, retain_graph=True), calls)


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


def attention_table(quick=False, plot="attention.png"):
    """Prints the table and, where `plot` names a file, writes the plot."""
    os.makedirs(os.path.dirname(plot) or ".", exist_ok=True)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"{'B,H,S,D':>16} | {'fwd':>7} {'plain':>6} {'x':>4} {'TF/s':>4} | {'bwd':>7} {'plain':>6} {'x':>4} {'TF/s':>4} | "
          f"{'maths fwd/bwd':>15} {'compiled':>15} | {'peak MB':>7} {'needed':>6} | {'error':>7} | graph fwd/bwd, plain")
    for B, H, S, D in SHAPES:
        x, d = inputs((B, H, S, D))
        rounds = [(*attention_times(A.attention_jvp, x, d, quick), *attention_times(F.scaled_dot_product_attention, x[:3], d, quick))
                  for _ in range(1 if quick else 5)]                    # in turns, for clocks drift
        fwd, bwd, plain_fwd, plain_bwd = np.median(rounds, axis=0)
        maths = compiled = graph = plain_graph = "-"
        pair = lambda *args, **how: "/".join(f"{t:.3f}" for t in attention_times(*args, **how))
        if not quick or S <= 1024:
            maths = pair(torch_maths, x, d, quick=True)
            torch._dynamo.reset()
            compiled = pair(torch.compile(torch_maths), x, d, quick=True)
        if S <= 256:
            graph = pair(A.attention_jvp, x, d, graph=True)
            plain_graph = pair(F.scaled_dot_product_attention, x[:3], d[:1], graph=True)
        peak, needed = attention_memory(x, d)
        product = 2 * B * H * S * S * D * 1e-9  # TFLOP per ms
        print(f"{f'{B},{H},{S},{D}':>16} | {fwd:7.3f} {plain_fwd:6.3f} {fwd / plain_fwd:4.2f} {6 * product / fwd:4.0f} | "
              f"{bwd:7.3f} {plain_bwd:6.3f} {bwd / plain_bwd:4.2f} {15 * product / bwd:4.0f} | {maths:>15} {compiled:>15} | "
              f"{peak / 1e6:7.1f} {needed / 1e6:6.1f} | {np.max(attention_errors(x, d)):.1e} | {graph} {plain_graph}", flush=True)
        del x, d
    if plot:
        attention_plot(plot, quick)


def attention_plot(path, quick, H=24, D=128):
    """Time over sequence length, log-log, one batch of H heads."""
    from matplotlib.figure import Figure
    sizes = [512, 1024, 2048, 4096] if quick else [256, 512, 1024, 2048, 4096, 8192, 16384]
    figure = Figure(figsize=(6, 4.5), layout="tight")
    axes = figure.add_subplot()
    for name, fn, n, color in (("attention_jvp", A.attention_jvp, 6, "C0"), ("plain attention", F.scaled_dot_product_attention, 3, "C1"),
                               ("PyTorch maths", torch_maths, 6, "C2")):
        at, times = [S for S in sizes if fn is not torch_maths or S <= 4096], []
        for S in at:
            x, d = inputs((1, H, S, D))
            times.append(attention_times(fn, x[:n], d, quick=True))
        for part, style, ms in zip(("forward", "backward"), ("-", "--"), zip(*times)):
            axes.loglog(at, ms, style, color=color, marker="o", ms=3, label=f"{name}, {part}", base=2)
    axes.set(xlabel="sequence length", ylabel="milliseconds", xticks=sizes, xticklabels=map(str, sizes))
    axes.set_title(f"{torch.cuda.get_device_name()}, bfloat16, {H} heads of {D}", fontsize=10)
    axes.grid(alpha=0.3), axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


# ---- a whole step --------------------------------------------------------------------------------

MODES = dict(eager=dict(compiled=False), compiled={}, checkpointed=dict(checkpoint=True), detach_jvp=dict(detach=True),
             flow_matching=dict(flow=True))
KINDS = dict(  # of GPU kernels, by what their names hold, the first that fits
    attention=("forward_kernel", "row_kernel", "column_kernel", "flash", "fmha", "sdpa"), AdamW=("Adam",), EMAs=("Lerp",), NCCL=("nccl",),
    products=("nvjet", "gemm", "cutlass", "cublas", "xmma", "splitK"), other=("",))


class FlowMatching:
    """Plain flow matching with the same network, for comparison."""

    def __init__(self, model):
        self.model = model

    def draw(self, x0, seed, first=0, total=None):
        return torch.randn_like(x0), torch.rand(len(x0), device=x0.device)

    def __call__(self, x0, y, noise, t, backward):
        at = t.view(-1, 1, 1, 1)
        u = self.model(x0 + at * (noise - x0), t, t, y, torch.ones_like(t))
        return {"loss": backward((u - (noise - x0)).square().mean())}


def stepper(config, batch, compiled=True, checkpoint=False, detach=False, flow=False, objective="tvm", device="cuda"):
    """A function that makes one step, as train.py does: bfloat16 autocast, AdamW, two EMAs, the check for finite numbers."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    with torch.device(device):
        model = DiT(config)
    emas = [copy.deepcopy(model).requires_grad_(False) for _ in range(2)]
    model.checkpoint_blocks = len(model.blocks) * checkpoint
    if compiled:
        compile_blocks(model, emas[0], detached=detach or objective == "meanflow")
    loss_module = FlowMatching(model) if flow else TVM(model, emas[0], guidance=dict(w=2.0), detach_jvp=detach, objective=objective)
    pairs = [(p, [net.get_parameter(name) for net in emas]) for name, p in model.named_parameters() if p.requires_grad]
    parameters, graph = [p for p, _ in pairs], None
    optimizer = torch.optim.AdamW(parameters, 1e-4, (0.9, 0.95), fused=True)
    data = torch.randn(64, batch, config.in_channels, *[config.input_size] * 2), torch.randint(config.num_classes, (64, batch))
    images, labels = (a.pin_memory() if device == "cuda" else a for a in data)

    def gradients(*inputs):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return loss_module(*inputs, backward=functools.partial(backward, share=1 / ranks))["loss"]

    def step(n):
        nonlocal graph
        x0, y = (a[n % 64].to(device, non_blocking=True) for a in (images, labels))
        inputs = x0, y, *loss_module.draw(x0, n, rank * batch, ranks * batch)
        if compiled and device == "cuda":
            graph = graph or Graph(gradients, inputs)
        loss = (graph or gradients)(*inputs)
        grads = [p.grad for p in parameters if p.grad is not None]
        if ranks > 1:
            all_reduce(grads)
        norm = torch.nn.utils.get_total_norm(grads)
        if torch.stack([norm, loss]).isfinite().all().item():
            optimizer.step()
            for i, rate in enumerate((0.99, 0.9999)):
                torch._foreach_lerp_([ema[i] for _, ema in pairs], parameters, 1 - rate)
    return step


def milliseconds(step, steps):
    """Of each of so many steps, by the wall clock."""
    times = []
    for n in range(steps):
        start = time.perf_counter()
        step(n)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def step_row(mode, size, input_size, batch):
    """Median milliseconds of 20 steps, peak bytes (all that PyTorch took from the device), seconds of the first five, and
    GPU milliseconds by kind of kernel."""
    gc.unfreeze(), gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = stepper(DiTConfig.named(size, input_size=input_size, in_channels=4, num_classes=1000), batch, **MODES[mode])
    warm = sum(milliseconds(step, 5)) / 1e3
    gc.collect(), gc.freeze()
    ms, kinds = sorted(milliseconds(step, 20))[10], dict.fromkeys(KINDS, 0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        milliseconds(step, 1)
    for event in profile.key_averages():
        kinds[next(kind for kind, names in KINDS.items() if any(name in event.key for name in names))] += event.device_time_total / 1e3
    return ms, torch.cuda.max_memory_reserved(), warm, kinds


def product_rate(n=8192):
    """TFLOP/s of an n x n x n bfloat16 matrix product."""
    from triton.testing import do_bench
    a, b = torch.randn(2, n, n, device="cuda", dtype=torch.bfloat16)
    return 2 * n ** 3 / do_bench(lambda: a @ b, return_mode="median") * 1e-9


def forward_tflop(size, input_size, batch):
    """Of one forward pass: blocks' products and attention, which are nearly all of it."""
    c = DiTConfig.named(size, input_size=input_size)
    T, D = (c.input_size // c.patch_size) ** 2, c.hidden_size
    return 2 * batch * c.depth * (T * D * D * (4 + 2 * c.mlp_ratio) + 2 * T * T * D + 6 * D * D) * 1e-12


def step_table(size="XL/2", input_size=32, batch=32, modes=tuple(MODES)):
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    show = functools.partial(print, flush=True) if ranks == 1 or dist.get_rank() == 0 else lambda *a: None
    rate = product_rate()
    show(f"{ranks} x {torch.cuda.get_device_name()}, torch {torch.__version__}, {size}, {input_size}x{input_size}x4, batch {batch} a GPU; "
         f"8192^3 bfloat16 product {rate:.0f} TFLOP/s")
    show(f"{'mode':>13} | {'ms':>6} {'img/s':>6} {'TF/s':>4} {'of it':>5} {'peak GB':>7} {'start s':>7} | GPU ms: " + ", ".join(KINDS))
    for mode in modes:
        try:
            ms, peak, warm, kinds = step_row(mode, size, input_size, batch)
        except torch.OutOfMemoryError:
            if ranks > 1:                                               # the others would wait for this one
                raise
            show(f"{mode:>13} | out of memory")
            continue
        passes = 3 if mode == "flow_matching" else 9 if mode == "detach_jvp" else 11
        tflops = passes * forward_tflop(size, input_size, batch) / ms * 1e3
        show(f"{mode:>13} | {ms:6.1f} {ranks * batch / ms * 1e3:6.0f} {tflops:4.0f} {tflops / rate:5.0%} {peak / 1e9:7.1f} {warm:7.1f} | "
             + ", ".join(f"{part:.1f}" for part in kinds.values()))
    if ranks > 1:
        dist.destroy_process_group()


def trainer_table(preset="im256_w2", input_size=32, batch=64):
    """train.py itself, from a memory map of random latents: its speed and waits after the first quarter, by its log."""
    noise = np.random.default_rng(0).standard_normal((1024, 8, input_size, input_size)).astype(np.float16)
    writer = Writer("data/bench-trainer", noise.shape[1:], {"train": 2 ** 24 // input_size ** 2, "test": 0}, np.float16)
    for i in range(writer.count["train"]):
        writer.set(i, noise[i % 1024], i % 1000)
    writer.finish("bench-trainer", [""] * 1000, kind="latents", shape=[4, *noise.shape[2:]], mean=[0.0] * 4, std=[1.0] * 4, vae=SD_VAE)
    shutil.rmtree("out/bench-trainer", ignore_errors=True)
    options = dict(preset=preset, dataset="bench-trainer", name="bench-trainer", batch_size=batch, steps=40, log_every=10)
    if subprocess.run([sys.executable, os.path.join(HERE, "train.py"), *(f"--{key}={value}" for key, value in options.items())]).returncode:
        sys.exit("bench.py: train.py failed")
    with open("out/bench-trainer/log.jsonl") as f:
        lines = [line for line in map(json.loads, f) if "loss" in line][1:]
    rate, wait = len(lines) / sum(1 / line["images_per_second"] for line in lines), sum(line["data_wait"] for line in lines) / len(lines)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, train.py --preset={preset}, {input_size}x{input_size}x4, batch {batch}: "
          f"{rate:.0f} images/s, {batch / rate * 1e3:.0f} ms a step, data wait {wait:.2%}")


@torch.no_grad()
def sample_table(size="XL/2", input_size=32, batch=64):
    """Images a second of one- and four-step sampling, latents only."""
    from triton.testing import do_bench
    with torch.device("cuda"):
        model = DiT(DiTConfig.named(size, input_size=input_size, in_channels=4, num_classes=1000)).eval()
    x1, y = torch.randn(batch, 4, input_size, input_size, device="cuda"), torch.randint(1000, (batch,), device="cuda")
    w = torch.full((batch,), 2.0, device="cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {size}, {input_size}x{input_size}x4, batch {batch}")
    for name, half, compiled in (("float32, eager", False, False), ("bfloat16, eager", True, False), ("bfloat16, compiled", True, True)):
        context = fast(model, half, compiled)
        for nfe in (1, 4):
            with context:
                ms = do_bench(lambda: sample(model, x1, y, w, nfe), warmup=300, rep=500, return_mode="median")
            tflops = nfe * forward_tflop(size, input_size, batch) / ms * 1e3
            print(f"{name:>20}, {nfe} step{'s' * (nfe > 1)}: {batch / ms * 1e3:6.0f} images/s, {tflops:.0f} TFLOP/s", flush=True)


def fid_table(batch=128):
    """Images a second of fid.py's network on 256x256 images, weights seeded, and the Frechet distance of two synthetic sets."""
    from triton.testing import do_bench
    torch.manual_seed(0)
    net = fid.InceptionV3().cuda()
    for p in net.parameters():
        if p.ndim == 4:
            torch.nn.init.kaiming_normal_(p)
    net.fold()
    draw = lambda n: F.interpolate(torch.rand(batch, 3, n, n, device="cuda") * 256, 256, mode="bicubic").clamp(0, 255).byte()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, 256x256, batch {batch}")
    for fid.TF32 in (False, True):
        moments, images = [fid.Moments(2048) for _ in range(2)], draw(16)
        for i in range(128):
            torch.manual_seed(i)
            moments[i % 2].add(net(draw((16, 24)[i % 2])))
        distance = fid.frechet_distance(*moments[0].mean_and_covariance(), *moments[1].mean_and_covariance())
        ms = [do_bench(lambda: net(images, resize), warmup=500, rep=2000, return_mode="median") for resize in ("tf1", "torch")]
        print(f"TF32 {fid.TF32!s:>5}: {batch / ms[0] * 1e3:.0f} images/s (resize torch: {batch / ms[1] * 1e3:.0f}), "
              f"Frechet distance of {64 * batch} images each {distance:.6g}", flush=True)


# ---- Theorem 1, where everything is known (README.md derives the bounds) --------------------------





















def main():
    """Options are the parameters of what is to be done, of their defaults' types."""
    what, options = "".join(sys.argv[1:2]), dict(o.removeprefix("--").partition("=")[::2] for o in sys.argv[2:])
    tables = dict(attention=attention_table, step=step_table, trainer=trainer_table, sample=sample_table, fid=fid_table,
                  sanitize=attention_sanitize, theory=theory)
    kinds = {bool: {"": True}.__getitem__, int: int, str: str, tuple: lambda value: value.split(",")}
    try:
        known = inspect.signature(tables[what]).parameters
        arguments = {key: kinds[type(known[key].default)](value) for key, value in options.items()}
        DiTConfig.named(arguments.get("size", "XL/2"), input_size=arguments.get("input_size", 32)), [MODES[mode] for mode in arguments.get("modes", ())]
        if arguments.get("batch", 1) < 1:
            raise ValueError
    except (KeyError, ValueError):
        sys.exit("bench.py: " + " ".join(__doc__.split("\n\n")[1].split()))
    if what != "theory" and not torch.cuda.is_available():
        sys.exit("bench.py: no CUDA device here")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and what != "step":
        sys.exit(f"bench.py: {what} is of one process, not of torchrun's")
    try:
        tables[what](**arguments)
    except torch.OutOfMemoryError as error:
        sys.exit(f"bench.py: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    main()
