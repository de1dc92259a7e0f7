"""
Train a TVM model. The constants below are the default run, real handwritten digits on a CPU.

    python train.py                                              # about five minutes on two cores
    python train.py --preset=shapes                              # one GPU
    torchrun --nproc_per_node=8 train.py --preset=shapes         # eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --preset=shapes

The presets im256_* and im512_* are DiT-XL/2 on ImageNet latents, from `prepare.py imagenet` (README.md, ImageNet).

Edit the constants in place; --name=value overrides one. A preset replaces a group of them: preset,
else the edited constant, and a flag beats both. Output, in out/NAME/:
    ckpt.safetensors        the evaluation EMA, with everything that sample.py needs
    state_STEP.safetensors  weights, both EMAs, optimizer: the same command again continues from the newest whole one
    log.jsonl               config and commit, then losses and scores
    samples_STEP.png        rows: 1, 2, 4 steps; columns: classes
    curve.png               the loss
    lock                    held by the process that trains NAME
SIGTERM and SIGINT (Ctrl-C) end a run after its step and a save; a second one, seconds later, at once.
"""
import ast
import atexit
import copy
import difflib
import functools
import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import fid
import scores as small
from checkpoint import load_newest, load_tensors, save_state, save_tensors, states
from dataset import DataError, load_dataset
from device import Graph, abilities, all_reduce, find_device
from files import HERE, CheckpointError, hold, written
from latents import SD_VAE
from loss import TVM, backward
from model import SIZES, DiT, DiTConfig, compile_blocks
from sample import draw, find_vae, grid, sample, to_images
from vae import VAEError, draw_latents

# ---- constants -----------------------------------------------------------------------------------
preset = ""              # a group of PRESETS below, or none
name = ""                # out/NAME; default: the preset's or the dataset's name
dataset = "digits"       # data/NAME, made by prepare.py (digits and shapes are made here when missing)
vae = ""                 # the VAE that the data must be latents of; default: whatever the data is
vae_files = ""           # where that VAE lies, for the pictures; default: the Hugging Face hub, under its name
device = ""              # "cpu", "cuda", "mps"; default: a GPU where there is one
compile = True           # torch.compile on a CUDA device: up to a minute once, then a faster step
seed = 0                 # of weights, data order, noise and times
init_from = ""           # a checkpoint to take the weights from, before step 0
# network (its input size, channels and classes are the data's)
hidden_size = 64
depth = 4
num_heads = 4
patch_size = 2
semi_lipschitz = True    # False: LayerNorm, no QK norm, plain modulation
checkpoint_blocks = 0    # so many blocks (in passes without a derivative half as many) keep only their input: less memory, a fifth more time
time_init = "spectral"   # of the time MLPs: "spectral" or "normal"
scaled = True            # displacement (s-t) w F instead of (s-t) F
# objective
objective = "tvm"        # or, to compare: "flow_matching"; "meanflow", whose own are times "two", p_equal 0.75, scaled False
kappa = 0.5              # meanflow's; its omega is w (1-kappa)
times = "gap*"           # "gap*", "gap", "trunc", "clamp", "two"
mu, sigma = -0.8, 1.0    # logit-normal of the gap (gap, gap*) or of t (trunc, clamp)
mu_s, sigma_s = -0.4, 1.0
p_equal = 0.0            # the probability of t = s
guidance = "constant"    # "constant" w; "inverse" or "uniform" between w_min and w_max
w = 1.25
w_min, w_max = 1.0, 1.0
label_dropout = 0.1
detach_jvp = False       # no gradient through dF/ds: faster, biased
# optimization
steps = 1900
batch_size = 64          # of all ranks together
micro_batch = 0          # of one forward and backward on one rank; 0: batch_size / ranks
lr = 2e-3
beta1, beta2, eps = 0.9, 0.95, 1e-8
weight_decay = 0.0
grad_clip = 0.0          # largest gradient norm; 0: no clipping
ema_target = 0.99        # the network in the loss's targets
ema_eval = 0.995         # the network that is sampled and kept
# reports
log_every = 50
sample_every = 500
save_every = 500
keep = 2                 # so many of the last states stay
lock_wait = 30           # seconds that a new process gives an old one to let go of out/NAME
score_images = 2000      # at most so many samples against as many held-out images, at the end
fid_reference = ""       # statistics (fid.py reads them): FID of one-step samples every sample_every steps; "": none
fid_images = 10000       # so many of them
inception = ""           # weights for it; default: downloaded once
classifier = "1-nn"      # who judges labels: "1-nn" in pixels, or "cnn", trained at the end

IMAGENET = dict(
    **SIZES["XL/2"], vae=SD_VAE, lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, ema_target=0.99, ema_eval=0.9999,
    batch_size=2048, micro_batch=32, steps=300_000, times="gap*", mu=-0.8, sigma=1.0, mu_s=-0.4, sigma_s=1.0,
    label_dropout=0.1, guidance="constant", log_every=100, sample_every=10_000, save_every=5_000)
PRESETS = {
    "shapes": dict(
        dataset="shapes", hidden_size=384, depth=8, num_heads=6, patch_size=4, batch_size=256, steps=3000, lr=1e-3, w=2.0,
        mu_s=0.4,            # flat colours outlive more noise than latents do: what is decided is decided at later times
        ema_eval=0.999, log_every=100, sample_every=1000, save_every=1000, classifier="cnn"),
    "cifar10": dict(
        dataset="cifar10", hidden_size=384, depth=12, num_heads=6, patch_size=2, batch_size=256, steps=200_000, lr=2e-4,
        w=1.5, ema_eval=0.9999, log_every=100, sample_every=10_000, save_every=5_000, classifier="cnn"),
    "im256_w2": dict(IMAGENET, dataset="im256", w=2.0, scaled=True, time_init="spectral", grad_clip=0.0),
    "im256_w1p75": dict(IMAGENET, dataset="im256", w=1.75, scaled=True, time_init="normal", grad_clip=0.0),
    "im512_w2p5": dict(IMAGENET, dataset="im512", w=2.5, scaled=False, time_init="normal", grad_clip=1.0),
    "im512_w2p25": dict(IMAGENET, dataset="im512", w=2.25, scaled=True, time_init="spectral", grad_clip=1.0),
    "im256_short": dict(IMAGENET, dataset="im256", w=2.0, scaled=True, time_init="spectral", grad_clip=0.0,
                        batch_size=1024, steps=200_000),
}
WHOLE = {"seed", "hidden_size", "depth", "num_heads", "patch_size", "checkpoint_blocks", "steps", "batch_size", "micro_batch", "log_every",
         "sample_every", "save_every", "keep", "lock_wait", "score_images", "fid_images"}   # the whole numbers; other numbers may have fractions
# These may differ between a run and its continuation; all others must not.
MAY_CHANGE = {"device", "compile", "checkpoint_blocks", "steps", "micro_batch", "log_every", "sample_every", "save_every", "keep", "lock_wait", "score_images",
              "classifier", "init_from", "vae_files", "fid_reference", "fid_images", "inception"}

# ---- the constants, as this run has them ---------------------------------------------------------
def fail(message):
    sys.exit(f"train.py: {' '.join(str(message).split())}")


def effective(constants, arguments):
    """The edited constants, then a preset's group, then the flags."""
    constants = {key: float(value) if type(value) is int and key not in WHOLE else value for key, value in constants.items()}
    flags = {}
    for argument in arguments:
        if argument in ("-h", "--help"):
            continue
        key, equals, text = argument.removeprefix("--").partition("=")
        if key not in constants:
            near = difflib.get_close_matches(key, constants)
            fail(f"there is no option {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else "; --help lists them"))
        if not argument.startswith("--") or not equals:
            fail(f"write --{key}=VALUE, not {argument!r}")
        flags[key] = converted(key, text, type(constants[key]))
    group = flags.get("preset", constants["preset"])
    if group and group not in PRESETS:
        near = difflib.get_close_matches(group, PRESETS) or PRESETS
        fail(f"there is no preset {group!r}; did you mean {' or '.join(near)}?")
    values = {**constants, **(PRESETS[group] if group else {}), **flags}
    if {"-h", "--help"} & set(arguments):                # the values as they would be
        print(__doc__, *(f"    --{key}={value!r}" for key, value in values.items()), sep="\n")
        sys.exit()
    return values


def converted(key, text, kind):
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if kind is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        fail(f"--{key} takes {dict(int='a whole number', float='a number', bool='True or False')[kind.__name__]}, not {text!r}")
    return value


config = effective({key: value for key, value in globals().items()
                    if key.islower() and not key.startswith("_") and type(value) in (str, int, float, bool)}, sys.argv[1:])
config["name"] = config["name"] or config["preset"] or config["dataset"]
globals().update(config)
out = os.path.join("out", name)

# ---- ranks and device ----------------------------------------------------------------------------
rank, ranks, parent = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), os.getppid()
for keys, low, high in ((("steps", "batch_size", "log_every", "sample_every", "save_every", "keep", "score_images"), 1, math.inf), (("fid_images",), 2, math.inf),
                        (("seed",), 0, 2 ** 63), (("micro_batch", "checkpoint_blocks", "lock_wait", "lr", "eps", "weight_decay", "grad_clip"), 0, math.inf),
                        (("label_dropout", "ema_target", "ema_eval", "beta1", "beta2"), 0, 1)):
    for key in keys:
        if not low <= config[key] < high:
            fail(f"{key} must be at least {low}" + f" and below {high}" * (high < math.inf) + f", not {config[key]}")
if batch_size % ranks:
    fail(f"batch_size {batch_size} is not divisible by {ranks} ranks")
local_batch = batch_size // ranks
micro_batch = min(micro_batch or local_batch, local_batch)
if local_batch % micro_batch:
    fail(f"a rank's share of the batch, {local_batch}, is not divisible by micro_batch {micro_batch}")
if classifier not in ("1-nn", "cnn"):
    fail(f'classifier must be "1-nn" or "cnn", not {classifier!r}')
guided = w != 1 if guidance == "constant" else (w_min, w_max) != (1, 1)
if guided and label_dropout == 0:
    fail("guidance needs a network that knows no class too: label_dropout must be above 0 where w is not 1")
if name != os.path.basename(name) or name in (".", ".."):
    fail(f"name names a folder in out/, which {name!r} does not")
try:
    device = find_device(device)
except CheckpointError as error:
    fail(error)
if device.type == "cuda":
    torch.cuda.set_device(device)
if ranks > 1:
    # A rank that dies ends the others at once, through torchrun or its closed connections; the time-out is for a
    # machine that falls silent, and longer than any save, for which all ranks wait.
    patience = timedelta(minutes=10)
    # After a restart torchrun's store still has the addresses of ranks that are gone (PyTorch issue 135712). The count
    # of restarts keeps them apart on one machine; on several, each counts for itself.
    alone, shared = os.environ.get("GROUP_WORLD_SIZE", "1") == "1", os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"
    if not alone and shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        fail("on several machines --max_restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of every torchrun")
    store = next(dist.rendezvous("env://", timeout=patience))[0]
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0", store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=ranks, timeout=patience)
half, can_compile = abilities(device)
compiled = compile and can_compile

# ---- data ----------------------------------------------------------------------------------------
data_path = os.path.join("data", dataset)
if rank == 0 and dataset in ("digits", "shapes") and not os.path.exists(data_path):
    if subprocess.run([sys.executable, os.path.join(HERE, "prepare.py"), dataset]).returncode:
        fail(f"python prepare.py {dataset} failed")
if ranks > 1:
    dist.barrier()
try:
    header, data = load_dataset(data_path)
except DataError as error:
    fail(error)
if not header["count"]["train"] or header["shape"][1] != header["shape"][2]:
    fail(f"{data_path} holds {header['count']['train']} training images of shape {header['shape']}: they must be square, and some")
if vae and vae != header.get("vae"):
    fail(f"vae is {vae!r}, but {data_path} holds {'latents of ' + repr(header['vae']) if 'vae' in header else 'pixels'}")
if not header["num_classes"] and guided:
    fail(f"{data_path} has no classes, so there is nothing to guide: --w=1, not {w:g}")
if classifier == "cnn" and header["shape"][1] < 4:
    fail(f'classifier "cnn" takes images of at least 4 pixels, not {header["shape"][1]}')
mean, std = (torch.tensor(header[key], device=device).view(-1, 1, 1) for key in ("mean", "std"))


@functools.lru_cache(maxsize=2)
def epoch_order(epoch):
    return np.random.default_rng([seed, epoch]).permutation(header["count"]["train"])


def batch_indices(step):
    """The global batch of a step: images of the endless sequence of seeded permutations, one an epoch."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), header["count"]["train"])
    return np.concatenate([epoch_order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)])


def fetch(step):
    """This rank's rows of a step's batch: images (n, C, H, W) as they are on disk, or drawn from the posteriors that are
    there, and labels (n,). Runs on the host in a thread of its own, ahead of the loop: the disk is read, and pages are
    pinned, while the device computes."""
    rows, place = batch_indices(step)[rank * local_batch:(rank + 1) * local_batch], step * batch_size + rank * local_batch
    images, labels = data["train_images"][rows], data["train_labels"][rows]
    if "vae" in header:
        images = draw_latents(images, seed, range(place, place + local_batch))     # another draw in each epoch
    batch = [torch.from_numpy(a) for a in (images, labels)]
    if device.type == "cuda":
        torch.cuda.set_device(device)                    # a thread starts on GPU 0
        batch = [a.pin_memory() for a in batch]
    return batch


# ---- model, target network, evaluation network ---------------------------------------------------
try:
    model_config = DiTConfig(
        input_size=header["shape"][1], in_channels=header["shape"][0], num_classes=header["num_classes"],
        hidden_size=hidden_size, depth=depth, num_heads=num_heads, patch_size=patch_size, scaled=scaled,
        time_init=time_init, rms_norm=semi_lipschitz, qk_norm=semi_lipschitz, mod_norm=semi_lipschitz)
except ValueError as error:
    fail(error)
torch.manual_seed(seed)
model = DiT(model_config).to(device)
if init_from:
    try:
        tensors, was = load_tensors(init_from, device)
        units = lambda data: {key: data.get(key) for key in ("mean", "std", "vae")}
        now, was = {**vars(model_config), **units(header)}, {**was["config"], **units(was["data"]), "time_init": time_init}
        differ = [f"{key} {was.get(key)!r} -> {value!r}" for key, value in now.items() if was.get(key) != value]
        if differ:
            raise CheckpointError(f"{init_from} is of another config ({', '.join(differ)})")
        model.load_state_dict(tensors)
    except (CheckpointError, RuntimeError) as error:
        fail(f"init_from: {error}")
target = copy.deepcopy(model).requires_grad_(False)      # theta*
evaluated = copy.deepcopy(model).requires_grad_(False)   # theta**
model.checkpoint_blocks = checkpoint_blocks
if compiled:
    compile_blocks(model, target, detached=detach_jvp or objective == "meanflow")
parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
emas = {key: [net.get_parameter(p) for p in parameters] for key, net in (("target", target), ("eval", evaluated))}
optimizer = torch.optim.AdamW(parameters.values(), lr, (beta1, beta2), eps, weight_decay, fused=device.type != "mps")
times_config = dict(sampler=times, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, p_equal=p_equal)
guidance_config = dict(sampler=guidance, w=w, w_min=w_min, w_max=w_max)
try:
    loss_module = TVM(model, target, times_config, guidance_config, label_dropout, detach_jvp, objective, kappa)
except ValueError as error:
    fail(error)

# ---- saving and resuming -------------------------------------------------------------------------
def git_commit():
    git = lambda *a: subprocess.run(["git", *a], cwd=HERE, capture_output=True, text=True).stdout
    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + "-edited" * bool(git("status", "--porcelain", "-uno")) or "unknown"
    except OSError:                                      # no git here
        return "unknown"


commit = git_commit()
about = dict(config=vars(model_config), objective=objective, guidance=guidance_config, times=times_config, train=config,
             data=header, commit=commit)


def attempt(what, write, *arguments):
    """Rank 0 writes; a disk that is full or away costs this file and a warning, not the run. Returns success."""
    try:
        if rank == 0:
            write(*arguments)
        return True
    except OSError as error:
        tqdm.write(f"train.py: could not write {what}, and go on without it: {error}", file=sys.stderr)
        return False


def last_good():
    return f"the last good checkpoint is {[*states(out).values()][-1]}" if states(out) else "nothing was saved yet"


def save(step):
    """Everything for a continuation, then the evaluation network for sample.py."""
    state = {f"{kind}.{key}": v for kind, net in nets.items() for key, v in net.state_dict().items()}
    state |= {f"optimizer.{key}.{kind}": v for key, p in parameters.items() for kind, v in optimizer.state[p].items()}
    save_state(out, step, state, about, keep)
    save_evaluated(step)


def save_evaluated(step):
    save_tensors(os.path.join(out, "ckpt.safetensors"), evaluated.state_dict(), {**about, "step": step})


def resume():
    """Everything from the newest whole state, where there is one; returns the step to go on from."""
    found = load_newest(out, device, quiet=rank > 0)
    if not found:
        return 0
    path, state, was = found
    missing = [key for key in ("train", "step") if key not in was] or [f"{kind}.pos_embed" for kind in nets if f"{kind}.pos_embed" not in state]
    if missing:
        fail(f"{path} is not the state of a run: no {', '.join(missing)} in it")
    differ = [key for key in config if key not in MAY_CHANGE and was["train"].get(key) != config[key]]
    if differ:
        changes = ", ".join(f"{key} {was['train'].get(key)!r} -> {config[key]!r}" for key in differ)
        fail(f"{path} is of another config ({changes}): give this run another --name, or delete {out}")
    if was["data"] != header:
        fail(f"{path} was trained on other data than {data_path} holds now: give this run another --name, or delete {out}")
    for kind, net in nets.items():
        net.load_state_dict({key: state[f"{kind}.{key}"] for key in net.state_dict()})
    for key, p in parameters.items():
        prefix = f"optimizer.{key}."
        optimizer.state[p] = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return was["step"]


nets = {"model": model, "target": target, "eval": evaluated}
if fid_reference:
    try:
        inception_net = fid.load_inception(inception or None, device)                   # complain now rather than in a day
        reference = fid.read_reference(fid_reference, inception_net)
        find_vae(header, device, vae_files)
    except (fid.FidError, VAEError) as error:
        fail(error)
try:
    lock, complaint = rank == 0 and hold(out, lock_wait), [None]
except OSError as error:
    complaint = [f"cannot train in {out}: {error}"]
if ranks > 1:
    dist.broadcast_object_list(complaint)
if complaint[0]:
    fail(complaint[0])
try:
    first_step = resume()
except (CheckpointError, KeyError, RuntimeError) as error:
    fail(error)
if ranks > 1:
    first_steps = [None] * ranks
    dist.all_gather_object(first_steps, first_step if os.path.isdir(out) else "nowhere")
    if len(set(first_steps)) > 1:
        fail(f"the ranks would go on from different steps, {first_steps}: {out} must be one folder that all of them see")
    for net in nets.values():
        for t in net.state_dict().values():
            dist.broadcast(t, 0)                         # so that they cannot differ
if device.type == "cuda":
    torch.cuda.empty_cache()                             # what a state was loaded through
if first_step > steps:
    fail(f"{out} has come to step {first_step} already, beyond steps {steps}")

# ---- reports -------------------------------------------------------------------------------------
def log(**line):
    def append():
        with open(os.path.join(out, "log.jsonl"), "a+b") as f:
            if f.tell() and not (f.seek(-1, os.SEEK_END), f.read() == b"\n")[1]:
                f.write(b"\n")                           # a line that a crash cut off
            f.write(json.dumps(line, allow_nan=False).encode() + b"\n")
    attempt("a line of log.jsonl", append)


def images_of(indices, nfe, classes=None):
    """Images `indices` of the evaluation network, uint8 (n, H, W, C), and their labels; those that
    sample.py --precision=float32 draws from ckpt.safetensors with this seed."""
    images, labels = [], []
    for first in range(0, len(indices), 250):
        x1, y = draw(seed, indices[first:first + 250], header["shape"], header["class_counts"])
        y = y if classes is None else torch.tensor(classes[first:first + 250])
        guide = torch.full((len(y),), sampling_w, device=device)
        images.append(to_images(sample(evaluated, x1.to(device), y.to(device), guide, nfe, objective == "flow_matching"), header,
                                find_vae(header, device, vae_files)))
        labels.append(y)
    return np.concatenate(images), torch.cat(labels)


def picture(step):
    classes = list(range(header["num_classes"]))[:10] or [0] * 10
    rows = [images_of(range(len(classes)), nfe, classes)[0] for nfe in (1, 2, 4)]
    with written(os.path.join(out, f"samples_{step}.png")) as f:
        grid(np.concatenate(rows), len(classes)).save(f, "PNG")


def log_fid(step):
    """FID of one-step samples, by all ranks together."""
    mine = range(fid_images * rank // ranks, fid_images * (rank + 1) // ranks)
    parts = (images_of(mine[first:first + 250], 1)[0].transpose(0, 3, 1, 2) for first in range(0, len(mine), 250))
    batches = (torch.from_numpy(part).expand(-1, 3, -1, -1) for part in parts)
    score = fid.fid_of(batches, inception_net, reference, all_ranks=ranks > 1)
    log(step=step, nfe=1, fid=score, images=fid_images, reference=fid_reference)
    if rank == 0:
        tqdm.write(f"step {step}: FID {score:.3f} of {fid_images} one-step samples")


def curve():
    from matplotlib.figure import Figure
    lines = {}
    with open(os.path.join(out, "log.jsonl")) as f:
        for text in f:
            try:
                line = json.loads(text)
            except ValueError:                           # a line that a crash cut off
                continue
            if "loss" in line:
                lines[line["step"]] = line               # after a restart the later one
    lines = dict(sorted(lines.items()))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for term in ("fm", "terminal"):
        axes.plot(list(lines), [line[term] for line in lines.values()], label=term)
    axes.set(xlabel="step", ylabel="loss term, mean per element", yscale="log", title=f"{name}, seed {seed}")
    axes.legend(), axes.grid(alpha=0.3)
    figure.savefig(os.path.join(out, "curve.png"), dpi=120)


def report(step):
    """The picture of a step, and its FID."""
    attempt(f"samples_{step}.png", picture, step)
    if fid_reference:
        log_fid(step)


def scores():
    """1, 2 and 4 steps, and as many training images, against held-out images; printed and logged."""
    n = min(score_images, header["count"]["test"], header["count"]["train"] // 2)
    if n < 2:
        return print("no held-out images: no scores")
    pick = lambda split, k: np.sort(np.random.default_rng([seed, k]).permutation(header["count"][split])[:n])
    real, test = pick("train", 0), pick("test", 1)
    train, labels, held_out = data["train_images"], data["train_labels"], data["test_images"][test]
    judge = None
    if classifier == "cnn" and header["num_classes"]:
        others = np.setdiff1d(np.arange(len(train)), real)
        judge = small.train_classifier(train[others], labels[others], header["num_classes"], device)
        right = (small.classify(judge, held_out).numpy() == data["test_labels"][test]).mean()
        print(f"the classifier names {right:.1%} of held-out images rightly")
        log(step=steps, classifier_held_out=right)
    print(f"{n} samples of the evaluation network against {n} held-out images (real: training images in their place)")
    print(f"{'steps':>5} {'two-sample':>11} {'label':>7} {'nearest':>8} {'Frechet':>8}")
    for nfe in ("real", 1, 2, 4):
        leave_out = None
        if nfe == "real":
            images, y, leave_out = train[real], torch.from_numpy(labels[real]), torch.from_numpy(real)
        else:
            images, y = images_of(range(n), nfe)
            images = images.transpose(0, 3, 1, 2)
        line = small.small_data_scores(images, y, held_out, train, labels, leave_out, judge)
        print(f"{nfe:>5} {line['two_sample']:>11.3f} {line['label']:>7.3f} {line['nearest_ratio']:>8.2f} {line['frechet_pixels']:>8.3f}")
        log(step=steps, checkpoint="ckpt.safetensors", nfe=nfe, images=n, **{key: x if math.isfinite(x) else None for key, x in line.items()})
    print("two-sample 0.5: cannot be told apart. label: the class asked for is found. nearest, well under 1: memorized.")


sampling_w = w if guidance == "constant" else (w_min * w_max) ** 0.5
if rank == 0:
    print(*(f"{key}={value!r}" for key, value in config.items()))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {header['count']['train']:,} images, {ranks} x {device.type}, "
          f"{'bfloat16' if half else 'float32'}, {'compiled' if compiled else 'eager'}, commit {commit}" + f", from step {first_step}" * bool(first_step))
log(step=first_step, config=config, model=about["config"], data=header["name"], commit=commit, torch=torch.__version__, ranks=ranks,
    device=torch.cuda.get_device_name() if device.type == "cuda" else device.type)
missed = [rank == 0 and first_step > 0 and (first_step % sample_every == 0 or first_step == steps)
          and not os.path.exists(os.path.join(out, f"samples_{first_step}.png"))]         # the run was stopped in between
if ranks > 1:
    dist.broadcast_object_list(missed)
if missed[0]:
    report(first_step)
# The state is whole, but was the evaluation network saved after it?
whole, done = first_step == 0 or attempt("ckpt.safetensors", save_evaluated, first_step), first_step

# ---- the loop ------------------------------------------------------------------------------------
# The loss terms by quarter of their times: terminal by t, fm by s'; each their sum and the number of samples.
sums, step_sums = torch.zeros(2, 2, 4, 2, device=device)
skipped = skipped_in_a_row = 0
since, waited, norms, stop = time.perf_counter(), 0.0, [], False
signals = []


def on_signal(number, frame):
    """Ask for a stop; seconds later, end at once. (A scheduler's signal comes twice: from it and through torchrun.)"""
    if signals and time.monotonic() - signals[0][1] > 2:
        os._exit(128 + number)
    signals.append((number, time.monotonic()))


def gradients(*inputs):
    """A micro-batch forward and backward: its terms. Its share of the global batch's gradient is added to what is there; or,
    where it is all that this rank has, replaces it, so that gradients may lie where activations were."""
    if once:
        optimizer.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        return loss_module(*inputs, backward=partial(backward, share=micro_batch / batch_size))


once, graph = micro_batch == local_batch, None
if not once:
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
pool = ThreadPoolExecutor(1)
batches = deque(pool.submit(fetch, step) for step in range(first_step, min(first_step + 3, steps)))
progress = tqdm(range(first_step, steps), initial=first_step, total=steps, desc=name, disable=rank > 0, unit="step", mininterval=1)
for step in progress:
    start = time.perf_counter()
    images, labels = batches.popleft().result()          # what fetch raises is raised here
    waited += time.perf_counter() - start
    if step + 3 < steps:
        batches.append(pool.submit(fetch, step + 3))
    noise_seed = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])
    step_sums.zero_()
    for first in range(0, local_batch, micro_batch):
        x0, y = (a[first:first + micro_batch].to(device, non_blocking=True) for a in (images, labels))
        x0 = (x0 - mean) / std
        inputs = x0, y, *loss_module.draw(x0, noise_seed, rank * local_batch + first, batch_size)
        if compiled and device.type == "cuda":
            graph = graph or Graph(gradients, inputs)
        if first == 0 and not once:
            optimizer.zero_grad(set_to_none=False)       # after the graph, whose trial runs leave theirs
        terms = (graph or gradients)(*inputs)
        for i, (term, at) in enumerate((("terminal", "t"), ("fm", "s_fm"))):
            quarter = (terms[at] * 4).long().clamp(max=3)
            step_sums[i].index_add_(0, quarter, torch.stack([terms[term], torch.ones_like(terms[term])], dim=1))

    grads = [p.grad for p in parameters.values() if p.grad is not None]
    if ranks > 1:
        all_reduce(grads)
    norm = torch.nn.utils.get_total_norm(grads)
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), grad_clip, norm)
    asked = bool(signals) or "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent    # torchrun was killed
    # What all ranks must agree on, in one reduction of three numbers and one copy to the host.
    common = torch.stack([norm, step_sums[..., 0].sum(), torch.full_like(norm, asked)])
    if ranks > 1:
        dist.all_reduce(common)
    norm, loss, stop = (common / ranks).tolist()
    if math.isfinite(norm) and math.isfinite(loss):
        optimizer.step()
        for kind, rate in (("target", ema_target), ("eval", ema_eval)):
            torch._foreach_lerp_(emas[kind], list(parameters.values()), 1 - rate)
        sums += step_sums
        norms.append(norm)
        skipped_in_a_row = 0
    else:
        skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
        if skipped_in_a_row == 10:
            fail(f"the loss or its gradient was not finite in 10 steps in a row, the last of them {step}; {last_good()}")
    if step == first_step:
        gc.collect(), gc.freeze()                        # what is alive now stays: the collector need not walk it again
        atexit.register(gc.unfreeze)

    done = step + 1
    if done % log_every == 0 or done == steps:
        if ranks > 1:
            dist.all_reduce(sums)
            totals, sizes = (torch.stack([f(p.detach()) for p in parameters.values()]) for f in (torch.sum, torch.linalg.vector_norm))
            largest = torch.cat([totals, -totals, totals.new_tensor([waited])])
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            waited = largest[-1].item()                  # the slowest rank's
            if (largest[:-1].view(2, -1).sum(0) > 1e-5 * sizes).any():
                fail(f"the ranks' weights have come apart before step {done}; {last_good()}")
        bins = sums.cpu().double()
        total = bins.sum(1)
        terminal, fm = (total[:, 0] / total[:, 1]).tolist()
        by_quarter = [[value if math.isfinite(value) else None for value in (b[:, 0] / b[:, 1]).tolist()] for b in bins]
        seconds, since = time.perf_counter() - since, time.perf_counter()
        rate = total[1, 1].item() / seconds
        if norms:
            log(step=done, loss=terminal + fm, terminal=terminal, fm=fm, terminal_by_t=by_quarter[0], fm_by_s=by_quarter[1],
                grad_norm=float(np.mean(norms)), images_per_second=round(rate, 1), data_wait=round(waited / seconds, 4), skipped=skipped,
                **({"peak_gb": round(torch.cuda.max_memory_reserved() / 1e9, 1)} if device.type == "cuda" else {}))
        progress.set_postfix_str(f"terminal {terminal:.4f} fm {fm:.4f} {rate:.0f} img/s, {waited / seconds:.1%} data wait"
                                 + f", {skipped} skipped" * bool(skipped))
        sums.zero_(), norms.clear()
        waited = 0.0
    if done % save_every == 0 and not skipped_in_a_row or done == steps or stop:       # a good state stays until steps are good again
        whole = attempt(f"the checkpoint of step {done}", save, done)
    if stop:
        break
    if done % sample_every == 0 or done == steps:
        report(done)

for number, handler in handlers.items():
    signal.signal(number, handler)
if ranks > 1:
    dist.barrier()                                       # a rank that ends has torchrun end the others: not before rank 0 has saved
    dist.destroy_process_group()                         # nobody waits while rank 0 scores
if not whole:
    fail(f"the save of step {done} failed; {last_good()}")
if stop or signals:                                      # not 0: training or its scores are not complete, as a scheduler or && must know
    if rank == 0:
        print(f"train.py: stopped after step {done}, which is saved; the same command goes on from there", file=sys.stderr)
    sys.exit(128 + (signals[0][0] if signals else signal.SIGTERM))
if rank == 0:
    scores()
    attempt("curve.png", curve)
    print(f"{out}: ckpt.safetensors, samples_{steps}.png, curve.png, log.jsonl. More images: python sample.py {out}/ckpt.safetensors")
