"""
What several test files share: small networks and inputs, comparisons, scripts, runs.

First the numbers: how two tensors are compared, and seeded tensors. Then networks that are small
and whole. Then the scripts: in this process, in one that starts fast, under torchrun. Then what a
run of train.py leaves behind.
"""

import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import math
import os
import re
import runpy
import subprocess
import sys
import time
import traceback
import types

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint as ckpt
import dataset
import inception
from dual import column
from model import DiT, DiTConfig
from options import end_for

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
F64 = torch.float64

TINY = dict(input_size=4, in_channels=2, num_classes=3)
LATENT = dict(input_size=32, patch_size=8, in_channels=4, num_classes=3)
SMALL = (
    "--hidden_size=32",
    "--depth=1",
    "--num_heads=2",
    "--batch_size=8",
    "--muon_lr=0",
    "--log_every=1",
    "--score_images=20",
)

# `pytest -k gpu` runs all of these: each has "gpu" in its name.
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# ---- numbers -------------------------------------------------------------------------------------


def close(a, b, tolerance):
    """The relative L2 error is at most `tolerance`. No NaN passes."""
    error = ((a - b).norm() / b.norm()).item()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def rel(a, b):
    """The relative L2 error; infinity instead of NaN, which max() would pass over."""
    a, b = a.detach().double(), b.detach().double()
    error = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
    return math.inf if math.isnan(error) else error


def randn(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=dtype, generator=generator)


def plain_attention(q, k, v, scale):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    return torch.einsum("bhij,bhjd->bhid", torch.softmax(scores, -1), v)


# ---- networks ------------------------------------------------------------------------------------


def random_model(dtype=F64, seed=0, **kwargs):
    """A tiny DiT with no weight left at zero."""
    torch.manual_seed(seed)
    config = DiTConfig.named("tiny", **{**TINY, **kwargs})
    net = DiT(config).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net


def random_inputs(B=3, num_classes=3, dtype=F64, shape=(2, 4, 4)):
    """x (B, *shape), noise like x, t, s, y and w (B,), with s <= t and every class in y.

    Among the classes is "no class".
    """
    x = randn(B, *shape, seed=1)
    noise = randn(B, *shape, seed=2)
    times = torch.rand(2, B, dtype=F64, generator=torch.Generator().manual_seed(3))
    s, t = times.sort(0).values
    y = torch.arange(B) % (num_classes + 1)
    w = torch.linspace(1, 2.5, B, dtype=F64)
    return [a.to(dtype) if a.is_floating_point() else a for a in (x, noise, t, s, y, w)]


class GaussianFlow:
    """The exact F for data N(mean, c^2 I): displacement (s-t) k F and velocity k F.

    It has one class, which is like "no class".
    """

    def __init__(self, mean, c, scaled):
        self.mean = mean
        self.c2 = c * c
        self.config = types.SimpleNamespace(scaled=scaled, num_classes=1)

    def no_condition(self, y):
        return torch.ones_like(y)

    def variance(self, t):
        """Of x_t."""
        return (1 - t) ** 2 * self.c2 + t**2

    def __call__(self, x, t, s, y, w):
        k = column(w, x) if self.config.scaled else 1
        t = column(t, x)
        s = column(s, x)
        v_t = self.variance(t)
        v_s = self.variance(s)
        slope = ((s + t) - self.c2 * (2 - s - t)) / (v_t + (v_s * v_t).sqrt())
        return (slope * (x - (1 - t) * self.mean) - self.mean) / k

    def jvp(self, x, t, s, y, w, dx=None, dt=None, ds=None):
        def at(x, t, s):
            return self(x, t, s, y, w)

        return jvp_of(at, (x, t, s), (dx, dt, ds))


def jvp_of(function, values, tangents):
    """PyTorch's own forward mode. A tangent that is None is zero."""
    whole = []
    for value, tangent in zip(values, tangents, strict=True):
        whole.append(torch.zeros_like(value) if tangent is None else tangent)
    return torch.func.jvp(function, tuple(values), tuple(whole))


@functools.cache
def seeded_inception():
    """Weights that keep the size of what goes through; not to be changed."""
    net = inception.InceptionV3()
    seeded = torch.Generator().manual_seed(0)
    for name, p in net.state_dict().items():
        if not p.is_floating_point():
            continue
        p.normal_(generator=seeded)
        p.mul_((2 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1)
        if name.endswith(("bn.weight", "var")):
            p.add_(1)
        if name.endswith("var"):
            p.abs_()
    return net


def tiny_vae(path, **kwargs):
    """A VAE of diffusers with random weights and 4 channels, saved at `path`. It shrinks by 4."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=3 * ("DownEncoderBlock2D",),
        up_block_types=3 * ("UpDecoderBlock2D",),
        block_out_channels=(8, 16, 16),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        **kwargs,
    )
    vae.save_pretrained(path)
    return vae.eval()


CONSTANT = dict(sampler="constant", w=1.0, w_min=1.0, w_max=1.0)


def make_checkpoint(path, seed=0, guidance=CONSTANT, **kwargs):
    """Save a random network of 8x8 images, with what sample.py needs. Returns the network."""
    options = dict(in_channels=1, input_size=8, num_classes=10)
    net = random_model(torch.float32, seed, **{**options, **kwargs})
    header = dict(
        class_counts=[1] * net.config.num_classes,
        mean=[127.5] * net.config.in_channels,
        std=[127.5] * net.config.in_channels,
    )
    about = dict(config=vars(net.config), guidance=guidance, data=header)
    ckpt.save_tensors(str(path), net.state_dict(), about)
    return net


# ---- scripts -------------------------------------------------------------------------------------


def run_script(script, *arguments):
    """A script in this process. Returns its one line of complaint, or None where it ended well."""
    argv = sys.argv
    # What is alive now stays: the collector need not walk it, which takes as long as a short run.
    freeze = gc.freeze
    freeze()
    gc.freeze = do_nothing  # train.py would freeze its own objects, its lock among them
    sys.argv = [script, *map(str, arguments)]
    try:
        run_as_main(script)
    except SystemExit as stop:
        if stop.code in (None, 0) and "--help" in arguments:
            return None
        assert stop.code not in (None, 0), "it ended early"
        assert isinstance(stop.code, str)
        assert "\n" not in stop.code
        assert stop.code.startswith(os.path.basename(script))
        return stop.code
    finally:
        sys.argv = argv
        sys.excepthook = sys.__excepthook__
        gc.freeze = freeze
        if os.path.exists("out"):
            gc.collect()  # the script's globals, its lock among them
    return None


def run_as_main(script):
    """A script, and what train.py's sys.excepthook makes of its errors."""
    try:
        runpy.run_path(os.path.join(HERE, script), run_name="__main__")
    except Exception as error:
        end_for(error)
        raise


def do_nothing():
    pass


def torchrun(script, *arguments, ranks=2):
    """A script on so many ranks. Raises CalledProcessError where it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", "--", os.path.join(HERE, script)]
    command += map(str, arguments)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}
    done = subprocess.run(command, capture_output=True, timeout=100, env=environment)
    if done.returncode:
        print(done.stderr.decode())
    done.check_returncode()
    return done


# For a script: at exit it says whether it is in a process group, and how many of its threads are
# gloo's (0 where there is no /proc). What is registered first with atexit runs last.
SAY_WHAT_IS_LEFT = """
import atexit
import glob
import torch.distributed

def say_what_is_left():
    names = [open(name).read() for name in glob.glob("/proc/self/task/*/comm")]
    threads = sum("gloo" in name for name in names)
    line = f"at exit: {torch.distributed.is_initialized()} {threads}\\n"
    print(line, end="", flush=True)  # in one piece, beside what another rank says

atexit.register(say_what_is_left)
"""


@functools.cache
def interpreter():
    """A process with Triton's interpreter, which runs functions of files of tests."""
    path = os.pathsep.join([HERE, os.path.join(HERE, "tests")])
    changes = dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", "import helpers; helpers.serve()"],
        env={**os.environ, **changes, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def serve():
    """Runs each function that is asked for in a child of its own, so that all share the imports."""
    for line in sys.stdin:
        module, name = line.split()
        importlib.import_module(module)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            code = 0
            try:
                getattr(sys.modules[module], name)()
            except BaseException:
                code = 1
                os.write(write, traceback.format_exc().encode()[-3000:])
            os._exit(code)
        os.close(write)
        with os.fdopen(read, errors="replace") as f:
            text = f.read()
        code = os.waitpid(child, 0)[1]
        print(json.dumps([code, text]), flush=True)


def interpreted_in(module, name):
    """Run a function of a file of tests where Triton interprets its kernels on the CPU."""
    triton = pytest.importorskip("triton")
    process = interpreter()
    print(module, name, file=process.stdin, flush=True)
    code, text = json.loads(process.stdout.readline())
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    if old and "only 0-dimensional arrays can be converted to Python scalars" in text:
        pytest.skip(
            f"the interpreter of triton {triton.__version__} fails with numpy {np.__version__} "
            "on loop bounds"
        )
    assert code == 0, text


def compiled_for_gpu(kernel, signature, constants, aligned, capability, options):
    """A Triton kernel, compiled for a GPU of this capability, which need not be here.

    signature: {argument: type}. constants: {argument: value}. aligned: the arguments that are
    multiples of 16.
    """
    compiler = pytest.importorskip("triton.compiler")
    backend = pytest.importorskip("triton.backends.compiler")
    places = list(enumerate(kernel.arg_names))
    fixed = {(i,): constants[name] for i, name in places if name in constants}
    multiples = {(i,): [["tt.divisibility", 16]] for i, name in places if name in aligned}
    source = compiler.ASTSource(kernel, signature, fixed, multiples)
    target = backend.GPUTarget("cuda", capability, 32)
    return compiler.compile(source, target=target, options=options)


def stack_of(made, folder):
    """Bytes a thread that a compiled kernel keeps in memory, from its machine code."""
    triton = pytest.importorskip("triton")
    tool = os.path.join(triton.__path__[0], "backends", "nvidia", "bin", "cuobjdump")
    path = folder / "kernel.cubin"
    path.write_bytes(made.asm["cubin"])
    said = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True)
    return int(re.search(r"STACK:(\d+)", said.stdout)[1])


def train_here(folder, arguments, script="train.py", environment=None):
    """train.py in a process that the fixture `start` has made; what it says goes to folder/said."""
    os.chdir(folder)
    os.environ.update(environment or {})
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    faulthandler.enable()  # a process that crashes says where
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    run_as_main(script)


def said():
    with open("said") as f:
        return f.read()


def until(condition, what, seconds=60):
    """Wait until condition() is true, and return what it gives. `what` names it in the error."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() >= deadline:
            words = f": {said()}" if os.path.exists("said") else ""
            raise AssertionError(f"{what}: not within {seconds} s{words}")
        time.sleep(0.001)


def running(pid):
    """Whether a process runs. One that has ended and waits for its parent (a zombie) does not."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as f:
        state_letter = f.read().rsplit(")", 1)[1].split()[0]
        return state_letter != "Z"
    return False


def encode_all(source, *arguments):
    """prepare.py imagenet on the fixture `source`."""
    fixed = ["--size", 32, "--vae", source / "vae", "--vae-name", "tiny", "--batch", 16]
    return run_script("prepare.py", "imagenet", source / "src", *arguments, *fixed)


def write_picture(path, size=(20, 14), colour=(200, 30, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def images_in(path):
    return np.load(path, allow_pickle=False)["arr_0"]


@contextlib.contextmanager
def full_disk(room):
    """As if the disk were full: no file can become larger than `room` bytes."""
    resource = pytest.importorskip("resource")  # not on Windows
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---- what a run of train.py leaves ---------------------------------------------------------------


def log_lines(name):
    """The whole lines of a log that may be in the middle of being written."""
    path = f"out/{name}/log.jsonl"
    if not os.path.exists(path):
        return []
    with open(path) as f:
        texts = f.read().split("\n")[:-1]
    return [json.loads(text) for text in texts if text.endswith("}")]


def write_dataset(name, shape, train=24, test=8, classes=2, images=None):
    """Images (N, C, H, W), by default random ones of a shape (C, H, W), as data/NAME.

    Classes are of one size. 0: no labels.
    """
    if images is None:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (train + test, *shape), dtype=np.uint8)
    writer = dataset.Writer(f"data/{name}", shape, {"train": train, "test": test})
    for i in range(train + test):
        writer.set(i, images[i], i % max(1, classes))
    writer.finish(name, [f"class {c}" for c in range(classes)])


def logged_losses(name):
    return [line["loss"] for line in log_lines(name) if "loss" in line]


def steps_done(name):
    """Of the last process that has begun."""
    steps = [line["step"] for line in log_lines(name) if "loss" in line or "config" in line]
    return steps[-1] if steps else 0


def train_config(name):
    with open(f"out/{name}/log.jsonl") as f:
        return json.loads(f.readline())["config"]


def state(name):
    """The tensors of the newest state."""
    return ckpt.load_newest(f"out/{name}")[1]


def weights(state, kind):
    """Those of a state that belong to "model", "target", "eval" or "optimizer"."""
    return ckpt.strip_prefix(state, kind + ".")


def same_end(one, other):
    """Bitwise: weights, EMAs and optimizer, the file for sample.py, and every loss."""
    sampled = [ckpt.load_tensors(f"out/{name}/ckpt.safetensors")[0] for name in (one, other)]
    for a, b in ((state(one), state(other)), sampled):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    losses = []
    for name in (one, other):
        losses.append({line["step"]: line["loss"] for line in log_lines(name) if "loss" in line})
    assert losses[0] == losses[1]


# ---- files and stand-ins -------------------------------------------------------------------------

# Pickles that ask for memory which they do not fill, and one that would colour the terminal. The
# keys are what is said of them.
GREEDY = {
    "LONG_BINPUT of 16777215": b"Nr\xff\xff\xff\0.",
    " PUT of 9999999": b"(p9999999\nt.",
    "FRAME of 1099511627776": b"\x80\4\x95\0\0\0\0\0\1\0\0N.",
    "expected 1099511627776 bytes": b"\x80\4\x8e\0\0\0\0\0\1\0\0.",
    "os.[31mred": b"cos\n\x1b[31mred\n.",
}


class Calling:
    """Something whose pickle is a call of a function, which an ordinary reader makes."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    __call__ = None


# Run before a script: FID with a small linear network for Inception, and a distance to match.
SMALL_FID = """
import functools
import fid, inception, torch
import torch.nn.functional as F

W = torch.randn(48, 2048, generator=torch.Generator().manual_seed(0)) / 400


def features(self, images, resize="tf1"):
    return (F.adaptive_avg_pool2d(images.float(), 4).flatten(1) @ W).cos()


def distance(mu1, sigma1, mu2, sigma2):
    return ((mu1 - mu2) ** 2).sum() + ((sigma1 - sigma2) ** 2).sum() ** 0.5


inception.InceptionV3.forward = features
fid.frechet_distance = distance
inception.load_inception = functools.cache(inception.load_inception)
fid.load_inception = inception.load_inception
"""
