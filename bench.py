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
from tqdm import tqdm

import attention_jvp as A
import fid
from loss import TVM, Graph, all_reduce, backward
from model import DiT, DiTConfig, compile_blocks
from prepare import HERE, SD_VAE, Writer
from sample import fast, sample

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
