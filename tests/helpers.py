"""..."""
import contextlib
import functools
import gc
import json
import math
import os
import runpy
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import types
from PIL import Image

import checkpoint as ckpt
import inception
from model import DiT, DiTConfig

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


TINY = dict(input_size=4, in_channels=2, num_classes=3)


F64 = torch.float64


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def close(a, b, tolerance):
    """Relative L2 error, which no NaN passes."""
    error = ((a - b).norm() / b.norm()).item()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def random_model(dtype=F64, seed=0, **kwargs):
    """A tiny DiT with no weight left at zero."""
    torch.manual_seed(seed)
    net = DiT(DiTConfig.named("tiny", **{**TINY, **kwargs})).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net


def random_inputs(B=3, num_classes=3, dtype=F64):
    x, noise = randn(B, 2, 4, 4, seed=1), randn(B, 2, 4, 4, seed=2)
    s_, t = torch.rand(2, B, dtype=F64, generator=torch.Generator().manual_seed(3)).sort(0).values
    y = torch.arange(B) % (num_classes + 1)
    w = torch.linspace(1, 2.5, B, dtype=F64)
    return [a.to(dtype) if a.is_floating_point() else a for a in (x, noise, t, s_, y, w)]


def plain_attention(q, k, v, scale):
    return torch.einsum("bhij,bhjd->bhid", torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * scale, -1), v)


def rel(a, b):
    a, b = a.detach().double(), b.detach().double()
    error = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
    return math.inf if math.isnan(error) else error                  # max() passes over nan


@functools.cache
def seeded_inception():
    """Weights that keep the size of what goes through; not to be changed."""
    net, seeded = inception.InceptionV3(), torch.Generator().manual_seed(0)
    for name, p in net.state_dict().items():
        if p.is_floating_point():
            p.normal_(generator=seeded).mul_((2 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1).add_(name.endswith(("bn.weight", "var")) * 1.0)
            p.abs_() if name.endswith("var") else p
    return net


def run_script(script, *arguments):
    """A script in this process; returns its one line of complaint, or None where it ended well."""
    argv, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        runpy.run_path(os.path.join(HERE, script), run_name="__main__")
    except SystemExit as stop:
        if stop.code in (None, 0) and "--help" in arguments:
            return None
        assert stop.code not in (None, 0), "it ended early"
        assert isinstance(stop.code, str) and "\n" not in stop.code and stop.code.startswith(script)
        return stop.code
    finally:
        sys.argv = argv
        if os.path.exists("out"):
            gc.unfreeze(), gc.collect()                                       # the script's globals, its lock among them


def write_picture(path, size=(20, 14), colour=(200, 30, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def make_checkpoint(path, seed=0, guidance=dict(sampler="constant", w=1.0, w_min=1.0, w_max=1.0), **kwargs):
    net = random_model(torch.float32, seed, **{**dict(in_channels=1, input_size=8, num_classes=10), **kwargs})
    header = dict(class_counts=[1] * net.config.num_classes, mean=[127.5] * net.config.in_channels, std=[127.5] * net.config.in_channels)
    ckpt.save_tensors(str(path), net.state_dict(), dict(config=vars(net.config), guidance=guidance, data=header))
    return net


def torchrun(script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", os.path.join(HERE, script), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})


def images_in(path):
    return np.load(path, allow_pickle=False)["arr_0"]


LATENT = dict(input_size=32, patch_size=8, in_channels=4, num_classes=3)


SMALL = ("--hidden_size=32", "--depth=1", "--num_heads=2", "--batch_size=8", "--log_every=1", "--score_images=20")


def state(name):
    return ckpt.load_newest(f"out/{name}")[1]


def weights(state, kind):
    return {key.removeprefix(kind + "."): value for key, value in state.items() if key.startswith(kind + ".")}


def train_here(folder, arguments):
    os.chdir(folder)
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    torch.set_num_threads(1)
    sys.argv = ["train.py", *arguments]
    runpy.run_path(os.path.join(HERE, "train.py"), run_name="__main__")


def until(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s" + (": " + open("said").read() if os.path.exists("said") else "")
        time.sleep(0.001)
    return found


def log_lines(name):
    """The whole lines of a log that may be in the middle of being written."""
    path = f"out/{name}/log.jsonl"
    texts = open(path).read().split("\n")[:-1] if os.path.exists(path) else []
    return [json.loads(text) for text in texts if text.endswith("}")]


def steps_done(name):
    """Of the last process that has begun."""
    return ([0] + [line["step"] for line in log_lines(name) if "loss" in line or "config" in line])[-1]


def said():
    return open("said").read()


def same_end(one, other):
    """Bitwise: weights, EMAs and optimizer, the file for sample.py, and every loss."""
    for a, b in ((state(one), state(other)), *[[ckpt.load_tensors(f"out/{name}/ckpt.safetensors")[0] for name in (one, other)]]):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    losses = [{line["step"]: line["loss"] for line in log_lines(name) if "loss" in line} for name in (one, other)]
    assert losses[0] == losses[1]


def train_config(name):
    return json.loads(open(f"out/{name}/log.jsonl").readline())["config"]


def tiny_vae(path, **kwargs):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    down, up = (f"{way}EncoderBlock2D" if way == "Down" else f"{way}DecoderBlock2D" for way in ("Down", "Up"))
    options = dict(block_out_channels=(8, 16, 16), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=32, **kwargs)
    vae = diffusers.AutoencoderKL(down_block_types=3 * (down,), up_block_types=3 * (up,), **options)
    vae.save_pretrained(path)
    return vae.eval()


def encode_all(source, *arguments):
    return run_script("prepare.py", "imagenet", source / "src", *arguments, "--size", 32, "--vae", source / "vae", "--vae-name", "tiny", "--batch", 16)


def running(pid):
    with contextlib.suppress(OSError):
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"


class GaussianFlow:
    """The exact F for data N(mean, c^2 I): displacement (s-t) k F and velocity k F."""

    def __init__(self, mean, c, scaled):
        self.mean, self.c2 = mean, c * c
        self.config = types.SimpleNamespace(scaled=scaled, num_classes=1)

    def __call__(self, x, t, s_, y, w):
        t, s_ = (a.view(-1, 1, 1, 1) for a in (t, s_))
        variance = lambda t: (1 - t) ** 2 * self.c2 + t ** 2
        slope = ((s_ + t) - self.c2 * (2 - s_ - t)) / (variance(t) + (variance(s_) * variance(t)).sqrt())
        k = w.view(-1, 1, 1, 1) if self.config.scaled else 1
        return (slope * (x - (1 - t) * self.mean) - self.mean) / k

    def jvp(self, x, t, s_, y, w, **tangents):
        of = {"dx": x, "dt": t, "ds": s_}
        zeros = {key: torch.zeros_like(a) for key, a in of.items()}
        return torch.func.jvp(lambda x, t, s_: self(x, t, s_, y, w), tuple(of.values()), tuple({**zeros, **tangents}.values()))


# Pickles that ask for memory which they do not fill, and one that would colour the terminal.
GREEDY = {"LONG_BINPUT of 16777215": b"Nr\xff\xff\xff\0.", " PUT of 9999999": b"(p9999999\nt.", "FRAME of 1099511627776": b"\x80\4\x95\0\0\0\0\0\1\0\0N.",
          "expected 1099511627776 bytes": b"\x80\4\x8e\0\0\0\0\0\1\0\0.", "os.[31mred": b"cos\n\x1b[31mred\n."}


SMALL_FID = """
import fid, inception, functools, torch, torch.nn.functional as F
W = torch.randn(48, 2048, generator=torch.Generator().manual_seed(0)) / 400
inception.InceptionV3.forward = lambda self, images, resize="tf1": (F.adaptive_avg_pool2d(images.float(), 4).flatten(1) @ W).cos()
fid.frechet_distance = lambda mu1, sigma1, mu2, sigma2: ((mu1 - mu2) ** 2).sum() + ((sigma1 - sigma2) ** 2).sum() ** 0.5
fid.load_inception = inception.load_inception = functools.cache(inception.load_inception)
"""
