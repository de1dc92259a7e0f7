"""
Every speed, measured, on a CUDA GPU.

    python bench.py attention [--quick] [--hopper] [--plot=attention.png]
    python bench.py step [--size=XL/2] [--input_size=32] [--batch=32] [--modes=graph,...]
    torchrun --nproc_per_node=4 bench.py step --modes=alone,graph    # --batch on each GPU
    torchrun --nproc_per_node=4 bench.py step --modes=alone,graph --micro_batches=8    # in a step
    torchrun --nproc_per_node=2 bench.py step --modes=sharded --size=G/2 --batch=8    # FSDP2
    python bench.py trainer [--preset=im256_w2] [--input_size=32] [--batch=64]
    python bench.py sample [--size=XL/2] [--input_size=32] [--batch=250]
    python bench.py fid [--batch=128]
    compute-sanitizer --tool memcheck python bench.py sanitize [--hopper]    # or racecheck

attention: speed, memory and error of attention_jvp beside plain attention (bench_attention.py).
step: whole training steps on random latents, by the wall clock. trainer: train.py itself, data wait
and all. sample: images a second, latents only. fid: Inception's speed, and what TensorFloat-32
makes of FID. sanitize: attention's kernels on small odd shapes, for compute-sanitizer to watch,
with PYTORCH_NO_CUDA_MEMORY_CACHING=1 in the environment. --hopper: with the kernels of
attention_hopper.py.
"""

import functools
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

import bench_attention
import cublas
import inception
from dataset import Writer
from device import (
    find_device,
    from_all_ranks,
    from_rank_0,
    join_ranks,
    leave_ranks,
    ranks_of_torchrun,
)
from files import HERE, UserError
from frechet import FEATURES, Moments, frechet_distance
from model import SIZES, DiT, DiTConfig
from options import Parser, run
from sample import make_sampler
from timing import RandomStep, milliseconds
from vae import SD_VAE

WARM_UP_SECONDS = 10  # before a step is timed: a GPU that has worked for a while is slower
# Of a step, {mode: (options of RandomStep, to how many forward passes its products amount)}. The
# option `tuned` sets cublas.TUNED instead.
MODES = {
    "graph": ({}, 11),  # as train.py has it: fused.py's kernels in a CUDA graph
    "one_stream": (dict(two_streams=False), 11),  # gradients of weights on the same stream
    "eager": (dict(graphs=False), 11),
    "untuned": (dict(tuned=False), 11),  # products by torch, instead of cublas.py
    "compiled": (dict(compiled=True), 11),  # kernels of torch.compile instead of fused.py's
    "checkpointed": (dict(checkpoint=True), 11),
    "detach_jvp": (dict(detach_jvp=True), 9),
    "flow_matching": (dict(flow=True), 3),
    "muon": (dict(muon=True), 11),  # Muon's own products, some 7 TFLOP for XL/2, do not count
    "bfloat16_sums": (dict(bfloat16_sums=True), 11),
    "alone": (dict(alone=True), 11),  # each rank for itself
    "sharded": (dict(shard=True), 11),  # weights divided over the ranks
    "sharded_eager": (dict(shard=True, graphs=False), 11),
    "sharded_checkpointed": (dict(shard=True, checkpoint=True), 11),
    "sharded_compiled": (dict(shard=True, compiled=True), 11),
}
OPTIONS_OF_RANKS = {"bfloat16_sums", "alone", "shard"}  # they need torchrun
KERNELS = {  # kinds of GPU kernels by what their names hold; the first kind that fits
    "fused": (
        "add_norm_",
        "qk_norm_",
        "gelu_forward_kernel",
        "gelu_backward_kernel",
        "column_sums_kernel",
    ),
    "attention": ("forward_kernel", "row_kernel", "column_kernel", "flash", "fmha", "sdpa"),
    "AdamW": ("Adam", "adamw_kernel", "Lerp"),  # and the averages
    "ranks": ("nccl", "barrier_kernel", "mean_kernel", "PtoP"),  # the mean over them, and waiting
    "products": ("nvjet", "gemm", "cutlass", "cublas", "xmma", "splitK"),
}
OTHER = "other"
# Tensors (B, T, D) in bfloat16 that fused.py must read or write in a block, in a micro-batch:
# value and tangent forward and backward, the target network at both points, and the value alone
# forward and backward. docs/performance.md has the table. (The target's GELU is in its product.)
# add_norm, twice a block, reads x, low, dx, y, dy and writes as many. Its backward reads 8 and
# writes 4, and sums of 6 vectors for each 32 tokens. The value alone: 3 and 3, and 4 and 2.
TENSORS_OF_ADD_NORM = 20 + 25.5 + 24 + 12 + 13.5
# Four times as wide: u, du, out, dout; backward gout, gdout, u, du, gu, gdu.
TENSORS_OF_GELU = 16 + 24 + 0 + 8 + 12
TENSORS_OF_QK_NORM = 8 + 16 + 8 + 4 + 8
TENSORS_OF_COLUMN_SUMS = 2 + 2
# Of a weight: it, two moments and two averages read and written, its gradient read, and two copies
# in bfloat16 written.
BYTES_OF_UPDATE = 48


def describe_network(size, input_size):
    return f"{size}, {input_size}x{input_size}x4"


def network_config(size, input_size):
    return DiTConfig.named(size, input_size=input_size, in_channels=4, num_classes=1000)


def forward_tflop(config, batch):
    """TFLOP of one forward pass: the blocks' products and attention, which are nearly all of it."""
    T = config.grid[0] * config.grid[1]
    D = config.hidden_size
    products = T * D * D * (4 + 2 * config.mlp_ratio) + 6 * D * D
    attention = 2 * T * T * D
    return 2 * batch * config.depth * (products + attention) * 1e-12


def bytes_of_step(config, batch, micro_batches):
    """{kind of kernel: bytes that it must move} in a step, of those that move most."""
    tokens = config.grid[0] * config.grid[1]
    tensor_bytes = 2 * batch * tokens * config.hidden_size
    tensors = TENSORS_OF_ADD_NORM + TENSORS_OF_GELU + TENSORS_OF_QK_NORM + TENSORS_OF_COLUMN_SUMS
    with torch.device("meta"):
        weights = sum(p.numel() for p in DiT(config).parameters() if p.requires_grad)
    return {
        "fused": micro_batches * config.depth * tensors * tensor_bytes,
        "AdamW": BYTES_OF_UPDATE * weights,
    }


# ---- a training step -----------------------------------------------------------------------------


def step_table(size, input_size, batch, micro_batches, modes):
    rank, ranks, _ = ranks_of_torchrun()
    device = find_device("cuda")
    torch.cuda.set_device(device)
    join_ranks("nccl", timedelta(minutes=10))
    config = network_config(size, input_size)

    def show(text):
        if rank == 0:
            print(text, flush=True)

    rate = product_rate()
    under = " under torchrun" if dist.is_initialized() else ""
    times = f", {micro_batches} times a step" if micro_batches > 1 else ""
    show(
        f"{ranks} x {torch.cuda.get_device_name()}{under}, torch {torch.__version__}, "
        f"{describe_network(size, input_size)}, batch {batch} a GPU{times}; "
        f"8192^3 bfloat16 product {rate:.0f} TFLOP/s"
    )
    show(
        f"{'mode':>20} | {'ms':>6} {'img/s':>6} {'TF/s':>4} {'of it':>5} {'peak GB':>7} "
        f"{'start s':>7} | GPU ms: {', '.join([*KERNELS, OTHER])}"
    )
    tuned = cublas.TUNED
    for mode in modes:
        options, passes = MODES[mode]
        options = dict(options)
        cublas.TUNED = options.pop("tuned", True) and tuned
        if options.keys() & OPTIONS_OF_RANKS and not dist.is_initialized():
            show(f"{mode:>20} | needs torchrun")
            continue
        try:
            ms, peak, start, kinds = measure_step(config, batch, micro_batches, options)
        except torch.OutOfMemoryError:
            if ranks > 1:  # the others would wait for this one
                raise
            show(f"{mode:>20} | out of memory")
            continue
        each_ms = from_all_ranks(ms)
        ms = max(each_ms)  # of the slowest rank; memory and kernels are rank 0's
        images = micro_batches * batch
        tflops = passes * forward_tflop(config, images) / ms * 1e3
        each = ", ".join(f"{part:.1f}" for part in kinds.values())
        show(
            f"{mode:>20} | {ms:6.1f} {ranks * images / ms * 1e3:6.0f} {tflops:4.0f} "
            f"{tflops / rate:5.0%} {peak / 1e9:7.1f} {start:7.1f} | {each}"
        )
        if ranks > 1:
            show(f"{'':>20} | ms of each rank: {', '.join(f'{ms:.1f}' for ms in each_ms)}")
        if mode == "one_stream":  # else kernels that run at the same time share the memory's rate
            show_bytes(bytes_of_step(config, batch, micro_batches), kinds, show)
    leave_ranks()


def show_bytes(sizes, kinds, show):
    memory = memory_rate()
    show(f"a copy reads and writes {memory / 1e12:.2f} TB/s; what must be moved:")
    for kind, size in sizes.items():
        if kinds[kind] == 0:  # its kernels are switched off
            continue
        ms = size / memory * 1e3
        show(f"{kind:>13} | {size / 1e9:.1f} GB, {ms:.1f} ms: {ms / kinds[kind]:.0%} of that rate")


def measure_step(config, batch, micro_batches, options):
    """Median milliseconds of 20 steps (5 or more with micro-batches) on a warm GPU, peak bytes that
    PyTorch took from the device, seconds of the first five steps, and GPU milliseconds by kind of
    kernel."""
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = RandomStep(config, batch, micro_batches, **options)
    began = time.perf_counter()
    for n in range(5):
        step(n)
    torch.cuda.synchronize()
    start = time.perf_counter() - began
    gc.collect()
    gc.freeze()  # as train.py does: the collector need not walk what stays
    warm_up(step)
    ms = statistics.median(milliseconds(step, max(5, 20 // micro_batches)))
    peak = torch.cuda.max_memory_reserved()
    kinds = kernel_times(step)
    step.step.close()
    return ms, peak, start, kinds


def warm_up(step):
    """Steps for WARM_UP_SECONDS, as many on each rank."""
    each = milliseconds(step, 1)[0] / 1e3
    for n in range(from_rank_0(math.ceil(WARM_UP_SECONDS / each))):
        step(n)


def kernel_times(step):
    """{kind: milliseconds on the GPU} of one step. Kernels on two streams can run at the same time;
    each then takes longer, and their sum can exceed the step."""
    kinds = dict.fromkeys([*KERNELS, OTHER], 0.0)

    def add_up(profile):
        for event in profile.key_averages():
            if not event.key.startswith("ProfilerStep"):  # the name of the whole step
                kinds[kind_of_kernel(event.key)] += event.device_time_total / 1e3

    # The profiler does not start at the same time on all ranks. The first two steps, which are not
    # counted, bring them together again.
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA],
        schedule=torch.profiler.schedule(wait=0, warmup=2, active=1, repeat=1),
        on_trace_ready=add_up,
    ) as profile:
        for n in range(3):
            step(n)
            torch.cuda.synchronize()
            profile.step()
    return kinds


def kind_of_kernel(name):
    for kind, words in KERNELS.items():
        if any(word in name for word in words):
            return kind
    return OTHER


def product_rate(n=8192):
    """TFLOP/s of an n x n x n bfloat16 matrix product."""
    from triton.testing import do_bench

    a, b = torch.randn(2, n, n, device="cuda", dtype=torch.bfloat16)
    return 2 * n**3 / do_bench(lambda: a @ b, return_mode="median") * 1e-9


def memory_rate(size=2**31):
    """Bytes a second that a copy of so many bytes reads and writes."""
    from triton.testing import do_bench

    a = torch.empty(size, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * size / do_bench(lambda: b.copy_(a), return_mode="median") * 1e3


# ---- train.py itself -----------------------------------------------------------------------------


def trainer_table(preset, input_size, batch):
    """Its speed and its waits for data, after the first quarter of 100 steps, by its own log."""
    name = "bench-trainer"
    write_random_latents(name, input_size)
    shutil.rmtree(f"out/{name}", ignore_errors=True)
    flags = [f"--preset={preset}", f"--dataset={name}", f"--name={name}"]
    flags += [f"--batch_size={batch}", "--steps=100", "--log_every=25"]
    if subprocess.run([sys.executable, os.path.join(HERE, "train.py"), *flags]).returncode:
        raise UserError("train.py failed")
    with open(f"out/{name}/log.jsonl") as f:
        lines = [line for line in map(json.loads, f) if "loss" in line]
    lines = lines[1:]
    rate = len(lines) / sum(1 / line["images_per_second"] for line in lines)
    wait = sum(line["data_wait"] for line in lines) / len(lines)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, train.py --preset={preset}, "
        f"{input_size}x{input_size}x4, batch {batch}: {rate:.0f} images/s, "
        f"{batch / rate * 1e3:.1f} ms a step, data wait {wait:.2%}"
    )


def write_random_latents(name, input_size):
    """A memory map of random latents, as large as that of 16,384 images of 32 x 32."""
    rng = np.random.default_rng(0)
    shape = (8, input_size, input_size)  # four means and four deviations
    noise = rng.standard_normal((1024, *shape)).astype(np.float16)
    count = {"train": 2**24 // input_size**2, "test": 0}
    writer = Writer(f"data/{name}", shape, count, np.float16, overwrite=True)
    for i in range(count["train"]):
        writer.set(i, noise[i % 1024], i % 1000)
    writer.finish(
        name,
        [""] * 1000,
        kind="latents",
        shape=[4, input_size, input_size],
        mean=[0.0] * 4,
        std=[1.0] * 4,
        vae=SD_VAE,
    )


# ---- sampling ------------------------------------------------------------------------------------


@torch.no_grad()
def sample_table(size, input_size, batch):
    """Images a second of one- and four-step sampling, latents only."""
    from triton.testing import do_bench

    config = network_config(size, input_size)
    with torch.device("cuda"):
        model = DiT(config).eval()
        x1 = torch.randn(batch, 4, input_size, input_size)
        y = torch.randint(1000, (batch,))
        w = torch.full((batch,), 2.0)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"{describe_network(size, input_size)}, batch {batch}"
    )
    for name, half in (("bfloat16", True), ("float32", False)):
        for nfe in (1, 4):
            sampler = make_sampler(model, nfe, bfloat16=half)
            sampler = functools.partial(sampler, x1, y, w)
            ms = do_bench(sampler, warmup=300, rep=500, return_mode="median")
            tflops = nfe * forward_tflop(config, batch) / ms * 1e3
            steps = "1 step" if nfe == 1 else f"{nfe} steps"
            images = batch / ms * 1e3
            print(f"{name:>10}, {steps}: {images:6.0f} images/s, {tflops:.0f} TFLOP/s", flush=True)


# ---- FID -----------------------------------------------------------------------------------------


def fid_table(batch):
    """Images a second of Inception on 256x256 images, with seeded weights.

    With TensorFloat-32 and without it, and the Frechet distance of two synthetic sets with each.
    """
    from triton.testing import do_bench

    torch.manual_seed(0)
    net = inception.InceptionV3().cuda()
    for p in net.parameters():
        if p.ndim == 4:
            torch.nn.init.kaiming_normal_(p)
    net.fold()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"cuDNN {torch.backends.cudnn.version()}, 256x256, batch {batch}"
    )
    for tf32 in (False, True):
        inception.TF32 = tf32
        distance = distance_of_blurs(net, batch)
        images = blurred_noise(batch, 16)
        rates = []
        for resize in ("tf1", "torch"):
            run = functools.partial(net, images, resize)
            ms = do_bench(run, warmup=500, rep=2000, return_mode="median")
            rates.append(batch / ms * 1e3)
        print(
            f"TF32 {tf32!s:>5}: {rates[0]:.0f} images/s (resize torch: {rates[1]:.0f}), "
            f"Frechet distance of {64 * batch} images each {distance:.6g}",
            flush=True,
        )


def blurred_noise(batch, side):
    """uint8 (batch, 3, 256, 256): noise of side x side, enlarged."""
    noise = torch.rand(batch, 3, side, side, device="cuda") * 256
    return functional.interpolate(noise, 256, mode="bicubic").clamp(0, 255).byte()


def distance_of_blurs(net, batch):
    """The Frechet distance of 64 batches of coarse blurs from 64 of finer ones."""
    coarse, fine = Moments(FEATURES), Moments(FEATURES)
    for i in range(128):
        torch.manual_seed(i)
        moments, side = (coarse, 16) if i % 2 == 0 else (fine, 24)
        moments.add(net(blurred_noise(batch, side)))
    return frechet_distance(*coarse.mean_and_covariance(), *fine.mean_and_covariance())


# ---- the command ---------------------------------------------------------------------------------


def parse():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)

    def command(name, batch=None, network=False):
        added = commands.add_parser(name)
        if batch:
            added.add_argument("--batch", type=int, default=batch)
        if network:
            added.add_argument("--input_size", type=int, default=32)
        return added

    attention = command("attention")
    attention.add_argument("--quick", action="store_true")
    attention.add_argument("--plot", default="attention.png")
    attention.add_argument("--hopper", action="store_true")
    step = command("step", batch=32, network=True)
    step.add_argument("--size", default="XL/2", choices=SIZES)
    step.add_argument("--micro_batches", type=int, default=1)
    step.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES))
    trainer = command("trainer", batch=64, network=True)
    trainer.add_argument("--preset", default="im256_w2")
    sampling = command("sample", batch=250, network=True)
    sampling.add_argument("--size", default="XL/2", choices=SIZES)
    command("fid", batch=128)
    command("sanitize").add_argument("--hopper", action="store_true")
    args = parser.parse_args()
    check(args)
    return args


def check(args):
    """Raises UserError for values that nothing can be measured with."""
    given = vars(args)
    for name in ("batch", "micro_batches"):
        if given.get(name, 1) < 1:
            raise UserError(f"--{name} must be at least 1, not {given[name]}")
    for mode in given.get("modes", []):
        if mode not in MODES:
            raise UserError(f"there is no mode {mode!r}: there are {', '.join(MODES)}")
    try:
        network_config(given.get("size", "XL/2"), given.get("input_size", 32))
    except ValueError as error:
        raise UserError(error) from None
    if not torch.cuda.is_available():
        raise UserError("no CUDA device here")
    if ranks_of_torchrun()[1] > 1 and args.what != "step":
        raise UserError(f"{args.what} is of one process, not of torchrun's")


def main():
    args = parse()
    if args.what == "attention":
        bench_attention.table(args.quick, args.plot, args.hopper)
    elif args.what == "step":
        step_table(args.size, args.input_size, args.batch, args.micro_batches, args.modes)
    elif args.what == "trainer":
        trainer_table(args.preset, args.input_size, args.batch)
    elif args.what == "sample":
        sample_table(args.size, args.input_size, args.batch)
    elif args.what == "fid":
        fid_table(args.batch)
    elif args.what == "sanitize":
        bench_attention.sanitize(args.hopper)


if __name__ == "__main__":
    run(main)
