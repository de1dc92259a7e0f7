"""
Train a TVM model. The constants below are the default run, real handwritten digits on a CPU.

    python train.py                                              # about four minutes on two cores
    python train.py --preset=shapes                              # one GPU
    torchrun --nproc_per_node=8 train.py --preset=shapes         # eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py --preset=shapes                                 # two machines, on each of them

The presets im256_* and im512_* are DiT-XL/2 on ImageNet latents (docs/imagenet.md).

Edit the constants in place; a flag such as --lr=1e-3 overrides one. Output, in out/NAME/:
    ckpt.safetensors        the evaluation network, with everything that sample.py needs
    state_STEP.safetensors  weights, both EMAs, optimizer: the same command again goes on from here
    log.jsonl               constants and commit, then losses and scores
    samples_STEP.png        rows: 1, 2, 4 steps; columns: ten images, of the classes in turn
    curve.png               the loss
    lock                    held by the process that trains NAME
SIGTERM, SIGINT (Ctrl-C) and SIGHUP end a run after its step and a save. A second signal, more than
two seconds after the first, ends it at once.

In this file: constants, ranks and device, data, networks, saving and resuming, the loop.
"""

import atexit
import copy
import gc
import math
import os
import subprocess
import sys
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import fused
from batches import Batches, why_not_train
from checkpoint import (
    check_about,
    check_run,
    initialize_from,
    load_newest,
    optimizer_state,
    save_state,
    save_tensors,
    states,
    strip_prefix,
    what_is_saved,
)
from dataset import load_dataset, refuse_wrong_counts
from device import (
    StopRequest,
    abilities,
    find_device,
    from_all_ranks,
    join_ranks,
    leave_ranks,
    on_rank_0,
    ranks_agree,
    ranks_of_torchrun,
    without_torchrun,
)
from files import HERE, CheckpointError, UserError, hold, wait_for
from header import same_data
from loss import (
    GUIDANCE,
    MEANFLOW_CONSTANTS,
    MEANFLOWS,
    OBJECTIVES,
    TIMES,
    TrainingLoss,
    check_objective,
)
from model import SIZES, DiT, DiTConfig, compile_blocks
from muon import Muon, matrices_of_blocks
from options import (
    Option,
    check_change,
    configure,
    differences,
    fail,
    options_of,
    refuse_idle_flags,
    set_up_streams,
)
from report import Losses, Report, git_commit
from shard import all_finite, gather, own_part, shard_weights
from step import TrainingStep
from vae import SD_VAE

# ---- constants -----------------------------------------------------------------------------------
# One line each: the default, what it is, the values that it may have. later=True: a resumed run may
# have another value. --help shows all of it, and the comment above each group.
# fmt: off
# the run and its data
preset         = Option("",         "a group of constants, below", later=True)
name           = Option("",         "out/NAME; default: the preset's or dataset's name", later=True)
dataset        = Option("digits",   "data/NAME; digits and shapes are made when missing")
vae            = Option("",         "the VAE that the data must be latents of; default: any")
vae_files      = Option("",         "where the VAE lies; default: Hugging Face hub", later=True)
device         = Option("",         "cpu, cuda or mps; default: a GPU if any", later=True)
graph          = Option(True,       "on a GPU: a step is a CUDA graph", later=True)
compile        = Option(False,      "on a GPU: torch.compile the blocks", later=True)
seed           = Option(0,          "seed of all random numbers", least=0, below=2**63)
init_from      = Option("",         "a checkpoint to take the first weights from", later=True)
init_partly    = Option(False,      "take trained tensors that fit, print others", later=True)
change         = Option("",         "what a resumed run changes on purpose: lr,beta2", later=True)
# network (its input size, channels and classes are the data's)
hidden_size    = Option(64,         "width", least=1)
depth          = Option(4,          "blocks", least=1)
num_heads      = Option(4,          "attention heads", least=1)
patch_size     = Option(2,          "pixels on the side of a token", least=1)
semi_lipschitz = Option(True,       "False: LayerNorm, no QK norm, plain modulation")
checkpoint_blocks = Option(0,       "blocks that recompute activations", least=0, later=True)
time_init      = Option("spectral", "first weights of t, w MLPs", choices=("spectral", "normal"))
scaled         = Option(True,       "displacement (s-t) w F instead of (s-t) F")
# objective
objective      = Option("tvm",      "what is trained: loss.py has the formulas", choices=OBJECTIVES)
kappa          = Option(0.5,        "MeanFlow: share of class velocity in target", least=0, below=1)
alpha_min      = Option(0.05,       "alpha-Flow: the last value of alpha", least=1e-4, most=1)
times          = Option("gap*",     "how times are drawn: loss.py has the formulas", choices=TIMES)
mu             = Option(-0.8,       "mean of logit(gap); of logit(t) for trunc, clamp (paper: 1)")
sigma          = Option(1.0,        "standard deviation of that logit", above=0)
mu_s           = Option(-0.4,       "mean of logit(s)")
sigma_s        = Option(1.0,        "standard deviation of that logit", above=0)
p_equal        = Option(0.0,        "the probability of t = s", least=0, most=1)
p_noise        = Option(0.0,        "the probability of t = 1; p_equal acts later", least=0, most=1)
guidance       = Option("constant", "how w is drawn; constant: w itself", choices=GUIDANCE)
w              = Option(1.25,       "guidance weight, if constant; 1: none", least=1e-3, below=1e6)
w_min          = Option(1.0,        "the smallest weight, if it is drawn", least=1e-3, below=1e6)
w_max          = Option(1.0,        "the largest weight, if it is drawn", least=1e-3, below=1e6)
label_dropout  = Option(0.1,        "share of samples that lose their label", least=0, below=1)
detach_jvp     = Option(False,      "no gradient through dF/ds: faster, biased")
# optimization (AdamW, and Muon with momentum 0.95 where muon_lr is above 0)
steps          = Option(1600,       "optimizer steps", least=1, later=True)
batch_size     = Option(64,         "images a step, of all ranks together", least=1)
micro_batch    = Option(0,          "images at once; 0: batch_size / ranks", least=0, later=True)
bfloat16_sums  = Option(False,      "gradients travel between ranks as bfloat16", later=True)
shard          = Option(False,      "each rank keeps a part of all weights (FSDP2)", later=True)
lr             = Option(3e-3,       "AdamW's learning rate", least=0)
muon_lr        = Option(2e-3,       "Muon's, for blocks' matrices; 0: AdamW trains all", least=0)
warmup         = Option(0,          "steps in which both learning rates rise", least=0)
beta1          = Option(0.9,        "AdamW's decay of the first moment", least=0, below=1)
beta2          = Option(0.95,       "AdamW's decay of the second moment", least=0, below=1)
eps            = Option(1e-8,       "AdamW's epsilon", least=0)
weight_decay   = Option(0.0,        "decoupled", least=0)
grad_clip      = Option(0.0,        "largest gradient norm; 0: no clipping", least=0)
ema_target     = Option(0.99,       "decay of F*, the loss's target network", least=0, below=1)
ema_eval       = Option(0.995,      "decay of the network that is sampled", least=0, below=1)
# reports
log_every      = Option(50,         "steps from line to line of the log", least=1, later=True)
sample_every   = Option(500,        "steps from picture to picture", least=1, later=True)
save_every     = Option(500,        "steps from save to save", least=1, later=True)
keep           = Option(2,          "how many of the newest states stay", least=1, later=True)
lock_wait      = Option(30,         "seconds to wait for another process", least=0, later=True)
score_images   = Option(2000,       "score at most so many samples; 0: none", least=0, later=True)
fid_reference  = Option("",         "statistics file: FID every sample_every steps", later=True)
fid_images     = Option(10000,      "one-step samples for that FID", least=2, later=True)
inception      = Option("",         "weights for that FID; default: downloaded once", later=True)
classifier     = Option("1-nn",     "says a sample's class", choices=("1-nn", "cnn"), later=True)

IMAGENET = dict(
    SIZES["XL/2"], vae=SD_VAE, steps=300_000, batch_size=2048, micro_batch=32,
    lr=1e-4, muon_lr=0.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0,
    ema_target=0.99, ema_eval=0.9999,
    times="gap*", mu=-0.8, sigma=1.0, mu_s=-0.4, sigma_s=1.0, label_dropout=0.1,
    guidance="constant", scaled=True, time_init="spectral", grad_clip=0.0,
    log_every=100, sample_every=10_000, save_every=5_000,
)
PRESETS = {
    "shapes": dict(
        dataset="shapes", hidden_size=384, depth=8, num_heads=6, patch_size=4,
        steps=3000, batch_size=256, lr=1e-3, muon_lr=0.0, w=2.0, ema_eval=0.999, classifier="cnn",
        mu_s=0.4,  # flat colours stay visible up to later times than latents do
        log_every=100, sample_every=1000, save_every=1000,
    ),
    "emoji": dict(
        dataset="emoji", hidden_size=384, depth=8, num_heads=6, patch_size=4,
        steps=3100, batch_size=256, lr=1e-3, muon_lr=0.0, w=2.0, ema_eval=0.998, classifier="cnn",
        mu_s=0.4,  # flat colours, as in shapes
        log_every=100, sample_every=1000, save_every=1000,
    ),
    "cifar10": dict(
        dataset="cifar10", hidden_size=384, depth=12, num_heads=6, patch_size=2,
        steps=200_000, batch_size=256, lr=2e-4, muon_lr=2e-4, w=1.5, ema_eval=0.9999,
        p_noise=0.5, classifier="cnn",
        log_every=100, sample_every=10_000, save_every=5_000,
    ),
    "im256_w2":    dict(IMAGENET, dataset="im256", w=2.0),
    "im256_w1p75": dict(IMAGENET, dataset="im256", w=1.75, time_init="normal"),
    "im512_w2p5":  dict(
        IMAGENET, dataset="im512", w=2.5, time_init="normal", scaled=False, grad_clip=1.0
    ),
    "im512_w2p25": dict(IMAGENET, dataset="im512", w=2.25, grad_clip=1.0),
    "im256_short": dict(IMAGENET, dataset="im256", w=2.0, steps=200_000, batch_size=1024),
    "im256_record": dict(  # not the paper's: what docs/record.md found on small images
        IMAGENET, dataset="im256", w=2.0, muon_lr=1e-4, p_noise=0.5
    ),
}
# fmt: on

set_up_streams(errors_in_one_line=True)  # from here on a UserError ends this script in one line
OPTIONS = options_of(globals())
config = configure(OPTIONS, PRESETS, __doc__, __file__)
config["name"] = config["name"] or config["preset"] or config["dataset"]
globals().update(config)  # from here on lr is a number, not an Option
if name != os.path.basename(name) or name in (".", ".."):
    fail(f'the run\'s name {name!r} must be a plain folder name without "/": give --name=NAME')
if not name.isprintable():  # not UTF-8, for example: safetensors would not open its files
    fail(f"the run's name {name!r} has characters that cannot be printed")
out = os.path.join("out", name)
check_change(change, OPTIONS)
times_config = dict(
    sampler=times,
    mu=mu,
    sigma=sigma,
    mu_s=mu_s,
    sigma_s=sigma_s,
    p_equal=p_equal,
    p_noise=p_noise,
)
guidance_config = dict(sampler=guidance, w=w, w_min=w_min, w_max=w_max)
try:
    check_objective(objective, times_config, guidance_config, detach_jvp, kappa, alpha_min)
except ValueError as error:
    fail(error)
# When each constant has an effect: a flag without one is a mistake.
draws_by_mu = times != "two" and (objective, times) != ("flow_matching", "gap*")
refuse_idle_flags(
    w=guidance == "constant",
    w_min=guidance != "constant",
    w_max=guidance != "constant",
    mu=draws_by_mu,
    sigma=draws_by_mu,
    p_equal=objective != "flow_matching" or times == "two",
    p_noise=objective != "flow_matching" or (times == "two" and p_equal > 0),
    ema_target=objective not in MEANFLOWS,
    kappa=objective == "meanflow",
    alpha_min=objective == "alpha_flow",
    init_partly=init_from != "" or not init_partly,
    fid_images=fid_reference != "",
    inception=fid_reference != "",
)

# ---- ranks and device ----------------------------------------------------------------------------
rank, ranks, _ = ranks_of_torchrun()
device = find_device(device)
if device.type == "cuda":
    torch.cuda.set_device(device)
# A rank that dies ends the others at once, through torchrun or its closed connections. This is for
# a machine that falls silent. All ranks wait for a save, so a save must take less.
patience = timedelta(minutes=10)
join_ranks("nccl" if device.type == "cuda" else "gloo", patience)
distributed = dist.is_initialized()  # True under torchrun, also with one rank
if batch_size % ranks:
    fail(f"batch_size {batch_size} is not divisible by {ranks} ranks")
local_batch = batch_size // ranks
micro_batch = min(micro_batch or local_batch, local_batch)
if local_batch % micro_batch:
    fail(
        f"a rank's share of the batch, {local_batch}, is not divisible by micro_batch {micro_batch}"
    )
if bfloat16_sums and device.type != "cuda":
    fail("bfloat16_sums is for GPUs")
if shard and not distributed:
    fail("shard divides weights over the ranks of torchrun, and this is not started by torchrun")
if shard and muon_lr:
    fail("Muon takes whole matrices, and shard divides them: add --muon_lr=0, or leave shard out")
uses_ddp = distributed and not shard
has_bfloat16, has_triton = abilities(device)
if compile and not has_triton:
    fail("compile is for GPUs that run Triton")

# ---- data ----------------------------------------------------------------------------------------
data_path = os.path.join("data", dataset)
if rank == 0 and dataset in ("digits", "shapes") and not os.path.exists(data_path):
    command = [sys.executable, os.path.join(HERE, "prepare.py"), dataset]
    made = subprocess.run(command, env=without_torchrun())
    if made.returncode:  # perhaps because another run makes them just now, or has made them
        seconds = lock_wait if os.path.exists(f"{data_path}.partial") else 0
        if not wait_for(data_path, seconds):
            fail(f"python prepare.py {dataset} failed")
if distributed:
    dist.barrier()
header, data = load_dataset(data_path)
refuse_wrong_counts(data_path, header, data)
complaint = why_not_train(header, data_path, config)
if complaint:
    fail(complaint)
batches = Batches(header, data, seed, batch_size, steps, device, rank, ranks)
per_channel = (-1, *[1] * (len(header["shape"]) - 1))  # (C, 1, 1) for images
mean = torch.tensor(header["mean"], device=device).view(per_channel)
std = torch.tensor(header["std"], device=device).view(per_channel)

# ---- networks, loss, optimizer -------------------------------------------------------------------
try:
    model_config = DiTConfig(
        input_size=tuple(header["shape"][1:]),
        in_channels=header["shape"][0],
        num_classes=header["num_classes"],
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        patch_size=patch_size,
        scaled=scaled,
        time_init=time_init,
        rms_norm=semi_lipschitz,
        qk_norm=semi_lipschitz,
        mod_norm=semi_lipschitz,
    )
except ValueError as error:
    fail(error)
torch.manual_seed(seed)
model = DiT(model_config).to("cpu" if shard else device)
if init_from and states(out):  # a run that has a state goes on from that
    if rank == 0:
        print(f"init_from: not used, since {out} has a state to go on from")
elif init_from:
    try:
        left_out = initialize_from(init_from, model, header, partly=init_partly)
    except (CheckpointError, RuntimeError, TypeError, ValueError) as error:
        fail(f"init_from: {error}")
    if rank == 0:
        for line in left_out:
            print(f"init_from: not taken: {line}")
# Weights that are not to be trained: call requires_grad_(False) of them here.
target = copy.deepcopy(model).eval().requires_grad_(False)  # F*: an EMA of the model, in the loss
evaluated = copy.deepcopy(model).eval().requires_grad_(False)  # a slower EMA: sampled and kept
nets = {"model": model, "target": target, "eval": evaluated}
if shard:
    shard_weights(nets.values(), device, bfloat16=has_bfloat16, bfloat16_sums=bfloat16_sums)
model.checkpoint_blocks = checkpoint_blocks
parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
weights = list(parameters.values())
use_graphs = graph and has_triton  # Triton, for one_pass.py
matrices = matrices_of_blocks(parameters) if muon_lr else {}  # Muon's; the others are AdamW's
if muon_lr and not matrices:
    fail("Muon trains the blocks' matrices, and this network has none: give --muon_lr=0")
adamw = torch.optim.AdamW(
    [p for key, p in parameters.items() if key not in matrices],
    lr=torch.tensor(lr, device=device) if use_graphs else lr,  # a tensor can change under a graph
    betas=(beta1, beta2),
    eps=eps,
    weight_decay=weight_decay,
    fused=device.type != "mps",
    capturable=use_graphs,
)
optimizers = [(adamw, lr)]  # with their learning rates
optimizer_of = dict.fromkeys(parameters, adamw)
if muon_lr:
    muon_rate = torch.tensor(muon_lr, device=device) if use_graphs else muon_lr
    muon = Muon(matrices.values(), muon_rate, weight_decay=weight_decay)
    optimizers.append((muon, muon_lr))
    optimizer_of.update(dict.fromkeys(matrices, muon))
loss = TrainingLoss(
    model,
    target,
    times=times_config,
    guidance=guidance_config,
    label_dropout=label_dropout,
    detach_jvp=detach_jvp,
    objective=objective,
    kappa=kappa,
    alpha_min=alpha_min,
)
unusual = [name for name, value in MEANFLOW_CONSTANTS.items() if config[name] != value]
if objective in MEANFLOWS and unusual and rank == 0:
    usual = " ".join(f"--{name}={value}" for name, value in MEANFLOW_CONSTANTS.items())
    given = " ".join(f"--{name}={config[name]}" for name in MEANFLOW_CONSTANTS)
    print(f"warning: MeanFlow's own constants are {usual}, not {given}", file=sys.stderr)
why_no_kernels = fused.why_not(torch.empty(0, 1, hidden_size, device=device))
if not semi_lipschitz:
    why_no_kernels = "fused.py has no kernel for LayerNorm"
if compile:
    compile_blocks(model, target, detach_jvp=loss.detaches_jvp)
elif has_triton and why_no_kernels and rank == 0:
    print(f"{why_no_kernels}; --compile=True may be faster", file=sys.stderr)


def learning_rate(step, peak):
    """The rate of a step; steps count from 0. peak: lr or muon_lr. For a schedule, change this."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak


def set_learning_rates(step):
    for optimizer, peak in optimizers:
        value = learning_rate(step, peak)
        for group in optimizer.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(value)
            else:
                group["lr"] = value


# ---- saving and resuming -------------------------------------------------------------------------
about = dict(
    config=vars(model_config),  # the network's
    objective=objective,
    guidance=guidance_config,
    times=times_config,
    train=config,  # the constants above; log.jsonl calls these "config"
    data=header,
    commit=git_commit(),
)
try:
    check_about(model_config, about)  # or sample.py would refuse what is trained here
except ValueError as error:
    fail(f"these constants and {data_path} make a checkpoint with {error}")


def save(step):
    """Save a state to resume from, then the evaluation network for sample.py.

    All ranks call this. Returns whether each was saved, which rank 0 alone knows. Exits if a value
    is not finite.
    """
    state = {}
    for kind, net in nets.items():
        for key, t in net.state_dict().items():
            state[f"{kind}.{key}"] = t
    for key, p in parameters.items():
        for kind, t in optimizer_of[key].state[p].items():
            state[f"optimizer.{key}.{kind}"] = t
    if not all_finite(state.values()):
        fail(f"the state of step {step} is not finite; {what_is_saved(out, saved_step)}")
    state = gather(state)
    path = f"state_{step}.safetensors"
    if not report.attempt(path, write_state, step, state, errors=OSError):
        return False, False  # a run refuses to begin beside a network without a state
    tensors = strip_prefix(state, "eval.")
    has_ckpt = report.attempt("ckpt.safetensors", write_evaluated, step, tensors, errors=OSError)
    return True, has_ckpt


def write_state(step, state):
    save_state(out, step, state, about, keep)


def write_evaluated(step, tensors):
    save_tensors(os.path.join(out, "ckpt.safetensors"), tensors, {**about, "step": step})


def resume():
    """Load the newest whole state, where there is one. Returns the step to go on from."""
    copy_of = torch.clone
    if shard:
        copy_of = partial(own_part, mesh=weights[0].device_mesh)  # this rank's part
    found = load_newest(out, device, quiet=rank > 0, copy=copy_of)
    if not found:
        if os.path.exists(os.path.join(out, "ckpt.safetensors")):
            fail(
                f"{out} holds a trained network, ckpt.safetensors, and no state to go on from: "
                "give this run another --name, or move that file away"
            )
        return 0
    path, state, was = found
    check_run(path, state, was, nets)
    was_muon_lr = was["train"].get("muon_lr", 0.0)
    if (was_muon_lr != 0) != (muon_lr != 0):
        by = "AdamW alone" if was_muon_lr == 0 else "Muon"
        fail(f"{path} was trained by {by}: go on with --muon_lr={was_muon_lr}")
    wrong, new, gone = differences(was["train"], config, OPTIONS, change)
    if wrong:
        fail(
            f"{path} is of another config ({', '.join(wrong)}): give this run another --name, "
            f"delete {out}, or allow the change with --change=NAME,... (not of the network's shape)"
        )
    if gone and rank == 0:
        print(f"{path} had these constants, which are no more: {', '.join(gone)}")
    if new and rank == 0:
        print(f"{path} is from before these constants, which have today's value: {', '.join(new)}")
    was_steps = was["train"].get("steps")
    if objective == "alpha_flow" and was_steps != steps and rank == 0:
        print(f"alpha falls over {steps} steps now, and fell over {was_steps} before")
    if not same_data(was["data"], header):
        fail(
            f"{path} was trained on other data than {data_path} holds now: "
            f"give this run another --name, or delete {out}"
        )
    for kind, net in nets.items():
        try:
            net.load_state_dict(strip_prefix(state, f"{kind}."))
        except RuntimeError:
            fail(
                f"{path} is of another network than these constants make. To begin with what fits "
                f"of it: --init_from={path} --init_partly=True --name=ANOTHER"
            )
    begin_anew = []  # weights whose optimizer has kept nothing
    for key, p in parameters.items():
        kinds = ("momentum_buffer",) if key in matrices else ("step", "exp_avg", "exp_avg_sq")
        optimizer_of[key].state[p] = optimizer_state(path, state, key, p, kinds)
        if not optimizer_of[key].state[p]:
            begin_anew.append(key)
    if begin_anew and rank == 0:
        names = f"{len(begin_anew)} of {len(parameters)} weights, the first {begin_anew[0]}"
        print(f"{path} has no state of the optimizer for {names}: it begins with zeros there")
    return was["step"]


report = Report(out, config, header, data, evaluated, device, rank, ranks)
try:
    report.load()  # complain now rather than in a day
except (UserError, OSError, ValueError) as error:
    fail(error)
try:
    lock = on_rank_0(hold, out, lock_wait)  # out/NAME is this process's own until it ends
except UserError as error:
    fail(f"cannot train in {out}: {error}")
first_step = resume()
first_steps = from_all_ranks(first_step)
sees_folder = from_all_ranks(os.path.isdir(out))
if not all(sees_folder) or len(set(first_steps)) > 1:
    fail(
        f"{out} must be one folder that all ranks see; the steps that they would go on from are "
        f"{first_steps}"
    )
if uses_ddp:
    for net in nets.values():
        for t in net.state_dict().values():
            dist.broadcast(t, 0)  # so that they cannot differ
if device.type == "cuda":
    torch.cuda.empty_cache()  # gives back the memory that held the loaded state
if first_step > steps:
    fail(f"{out} has come to step {first_step} already, beyond steps {steps}")
saved_step = first_step  # of the last state that was loaded or saved; 0: there is none

precision = "bfloat16" if has_bfloat16 else "float32"
how = precision
if compile:
    how += ", compiled blocks"
if use_graphs:
    how += ", a CUDA graph"
report.log_start(first_step, about, how)
has_ckpt = True
if first_step > 0:
    # A stop may have come between the state and what follows it: the picture, ckpt.safetensors.
    if report.lacks_samples(first_step, steps):
        report.save_samples(first_step)
    tensors = gather(evaluated.state_dict())
    has_ckpt = report.attempt(
        "ckpt.safetensors", write_evaluated, first_step, tensors, errors=OSError
    )


# ---- the loop ------------------------------------------------------------------------------------
training = TrainingStep(
    loss,
    [optimizer for optimizer, _ in optimizers],
    [(target, ema_target), (evaluated, ema_eval)],
    device,
    micro_batches=local_batch // micro_batch,
    graphs=use_graphs,
    bfloat16=has_bfloat16,
    shard=shard,
    bfloat16_sums=bfloat16_sums,
)
losses = Losses(device)  # since the last line of the log
skipped = skipped_in_a_row = 0
stop = False
done = first_step
stop_request = StopRequest()
bar = tqdm(
    range(first_step, steps),
    initial=first_step,
    total=steps,
    desc=name,
    disable=rank > 0,
    unit="step",
    mininterval=1,
)
for step in bar:
    images, conditions = batches.get(step)
    # Seeds all that is drawn in this step, so that a resumed run needs no generator's state.
    step_seed = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])
    losses.begin_step()
    for first in range(0, local_batch, micro_batch):
        x0 = images[first : first + micro_batch].to(device, non_blocking=True)
        y = conditions[first : first + micro_batch].to(device, non_blocking=True)
        x0 = (x0 - mean) / std  # (B, C, H, W)
        # draw() draws the whole global batch from this seed and returns these rows of it. So
        # micro-batches differ, and neither their size nor the number of ranks changes a number.
        row = rank * local_batch + first
        drawn = loss.draw(x0, step_seed, row, total=batch_size, progress=step / steps)
        is_last = first + micro_batch == local_batch
        terms = training.gradients(x0, y, *drawn, is_first=first == 0, is_last=is_last)
        losses.add(terms)

    # .grad is complete here: the mean over all micro-batches and ranks. (A hook of a weight is
    # called in the backward of each term, and never where a CUDA graph is replayed.)
    norm = training.gradient_norm()
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(weights, grad_clip, norm)
    # All ranks must agree on these three numbers: one reduction, and one copy to the host.
    common = torch.stack([norm, losses.step_total(), torch.full_like(norm, stop_request.asked())])
    if distributed:
        dist.all_reduce(common)
    norm, total, share_that_asks = (common / ranks).tolist()
    stop = share_that_asks > 0

    if math.isfinite(norm) and math.isfinite(total):
        set_learning_rates(step)
        training.update()
        losses.end_step(norm)
        skipped_in_a_row = 0
    else:
        skipped += 1
        skipped_in_a_row += 1
        if skipped_in_a_row == 10:
            fail(
                "the loss or its gradient was not finite in 10 steps in a row, "
                f"the last of them {step}; {what_is_saved(out, saved_step)}"
            )
    if step == first_step:
        gc.collect()
        gc.freeze()  # what is alive now stays: the collector need not walk it again
        atexit.register(gc.unfreeze)  # their destructors run at exit, too

    done = step + 1
    if done % log_every == 0 or done == steps:
        if uses_ddp and not ranks_agree(weights):
            fail(
                f"the ranks' weights have come apart before step {done}; "
                f"{what_is_saved(out, saved_step)}"
            )
        shown = report.log_losses(done, losses, batches, skipped)
        bar.set_postfix_str(shown)
    at_end = done == steps or stop
    if done == steps and skipped == done - first_step:
        fail(f"nothing was learned: the loss or its gradient was not finite in all {skipped} steps")
    # Do not save while steps are being skipped, except at the end.
    if (done % save_every == 0 and not skipped_in_a_row) or at_end:
        has_state, has_ckpt = save(done)
        if has_state:
            saved_step = done
    if stop:
        break
    if done % sample_every == 0 or done == steps:
        report.save_samples(done)

# ---- the end -------------------------------------------------------------------------------------
stop_request.restore()
network = None  # a whole one, of which rank 0 alone makes the scores
if not stop and score_images > 0:
    network = report.gather_network("the scores")
if distributed:
    # Where a rank fails torchrun ends the others: none may fail before rank 0 has saved.
    dist.barrier()
    training.close()
    leave_ranks()  # so that no rank waits while rank 0 makes the scores
if saved_step < done:
    fail(f"could not save the state of step {done}; {what_is_saved(out, saved_step)}")
if not has_ckpt:
    fail(f"could not save ckpt.safetensors of step {done}; {what_is_saved(out, saved_step)}")
if stop or stop_request.asked():
    # The exit code is not 0: a scheduler or && must know that training or its scores are missing.
    if rank == 0:
        print(
            f"train.py: stopped after step {done}, which is saved; the same command goes on there",
            file=sys.stderr,
        )
    sys.exit(stop_request.exit_code())
if rank == 0:
    if network is not None:
        report.log_scores(network, steps)
    report.save_curve()
    if skipped:
        print(f"{skipped} steps were skipped: the loss or its gradient was not finite")
    print(
        f"{out}: ckpt.safetensors, samples_{steps}.png, curve.png, log.jsonl. "
        f"More images: python sample.py {out}/ckpt.safetensors"
    )
