"""
Checkpoints: safetensors files with JSON in them and a checksum. Loading one executes nothing.

    save_tensors(path, tensors, about)                 # whole or not at all
    tensors, about = load_tensors(path)                # raises Damaged where bytes have changed
    tensors, about = load_checkpoint(path)             # of a state, its evaluation network
    save_state(folder, step, tensors, about, keep)     # then deletes older states
    path, tensors, about = load_newest(folder)         # the newest state that is whole

`about` is JSON: the network's config, the guidance it was trained with and the header of its data.
train.py adds the objective, the step, the commit and all constants of the run.
"""

import contextlib
import errno
import json
import math
import os
import re
import sys
import zlib

import torch
from safetensors import SafetensorError, safe_open

from files import CheckpointError, written
from header import IMAGE_DTYPES
from loss import GUIDANCE, OBJECTIVES

# The file begins with the length of its header, and the header with these bytes. Then comes the
# crc32 of the whole file, as eight hexadecimal digits; it is taken with eight zeros in its place.
START = b'{"__metadata__": {"crc32": "'
NO_CRC = b"00000000"

DTYPES = {  # what safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# What `about` must have for a network to be rebuilt and sampled.
NEEDED = {
    "config": (),
    "guidance": ("sampler", "w", "w_min", "w_max"),
    "data": ("class_counts", "mean", "std"),
}


class Damaged(CheckpointError):
    """A file that is not what was written: cut off, or with other bytes."""


def save_tensors(path, tensors, about):
    """Write tensors by name, and `about` (anything of JSON), as safetensors.

    The library's own writer wants all tensors on the host at once, leaves a file of a random name
    behind when it is killed, and has no checksum. The format is simple, so it is written out here.
    Raises OSError, and ValueError for a tensor of a dtype that is not in DTYPES.
    """
    entries = {}
    end = 0
    for name, t in tensors.items():
        if t.dtype not in DTYPES:
            raise ValueError(f"the tensor {name!r} is {t.dtype}, which is not among DTYPES")
        offsets = [end, end + t.nbytes]
        entries[name] = dict(dtype=DTYPES[t.dtype], shape=list(t.shape), data_offsets=offsets)
        end += t.nbytes
    metadata = {"crc32": NO_CRC.decode(), "tvm": json.dumps(about)}
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-len(header) % 8)  # aligns the tensors
    start = len(header).to_bytes(8, "little") + header
    with written(path) as f:
        f.write(start)
        crc = zlib.crc32(start)
        for t in tensors.values():
            part = raw_bytes(t)
            f.write(part)
            crc = zlib.crc32(part, crc)
        f.seek(8 + len(START))
        f.write(b"%08x" % crc)


def raw_bytes(t):
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def load_tensors(path, device="cpu", needs_about=True, copy=torch.clone):
    """What save_tensors wrote -> (tensors, about). A file of another maker may have no checksum.

    needs_about=False takes any safetensors file; `about` is None where it has none.
    copy(tensor): what to keep of each tensor. It must copy: the file's memory may be replaced.
    Raises CheckpointError, and its kind Damaged where the file is not what was written.
    """
    try:
        check_crc(path)
        refuse_other_encoding(path)
        with safe_open(path, "pt", device=str(device)) as f:
            about = json.loads((f.metadata() or {}).get("tvm", "null"))
            tensors = {name: copy(f.get_tensor(name)) for name in f.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {path}") from None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not a whole safetensors file: {error}") from None
    except OSError as error:
        if error.errno == errno.EIO:  # a bad sector stays bad; other errors may be gone tomorrow
            raise Damaged(f"cannot read {path}: {error}") from None
        raise CheckpointError(f"cannot read {path}: {error}") from None
    missing = missing_parts(about)
    if missing and needs_about:
        raise CheckpointError(
            f"{path} is a safetensors file, but not a checkpoint of this project: "
            f"no whole {', '.join(missing)} in it"
        )
    return tensors, about


def check_crc(path):
    """Raises Damaged where a file that has a checksum does not have its own."""
    with open(path, "rb") as f:
        start = f.read(8 + len(START) + len(NO_CRC))
        if start[8 : 8 + len(START)] != START:
            return
        stated = start[-len(NO_CRC) :]
        crc = zlib.crc32(start[: -len(NO_CRC)] + NO_CRC)
        while part := f.read(1 << 24):
            crc = zlib.crc32(part, crc)
    if stated != b"%08x" % crc:
        raise Damaged(f"{path} is damaged: it is cut off, or has other bytes than were written")


def refuse_other_encoding(path):
    """Raises CheckpointError for a path that safe_open cannot open."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise CheckpointError(
            f"cannot read {path}: its name, or that of a folder in it, is not UTF-8, and "
            "safetensors opens no such file: rename it"
        ) from None


def missing_parts(about):
    if not isinstance(about, dict):
        return list(NEEDED)
    missing = []
    for key, parts in NEEDED.items():
        value = about.get(key)
        if not isinstance(value, dict) or not set(parts) <= set(value):
            missing.append(key)
    return missing


def check_about(config, about):
    """Raises ValueError where the objective, the header or the guidance does not fit the network.

    config: the network's. Published snapshots name no objective: theirs is "tvm".
    """
    objective = about.get("objective", "tvm")
    if objective not in OBJECTIVES:  # nor is it known how its network is sampled
        raise ValueError(f"the objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    data = about["data"]
    counts = data["class_counts"]
    weights = [about["guidance"][key] for key in ("w", "w_min", "w_max")]
    for name in ("name", "vae", "dtype"):
        if not isinstance(data.get(name, ""), str):
            raise ValueError(f"a {name} that is no text: {data[name]!r}")
    if data.get("dtype", "uint8") not in IMAGE_DTYPES:
        raise ValueError(f"images of dtype {data['dtype']!r}")
    sampler = about["guidance"].get("sampler", "constant")
    if sampler not in GUIDANCE:
        raise ValueError(f"the guidance {sampler!r} is none of {', '.join(GUIDANCE)}")
    if not isinstance(about.get("train", {}), dict):
        raise ValueError("constants that are no dict")
    network_shape = [config.in_channels, *getattr(config, "height_and_width", ())]
    shape = data.get("shape", network_shape)
    is_shape = len(shape) >= 2 and all(type(n) is int and n > 0 for n in shape)
    if not is_shape or math.prod(shape) > 2**31:
        raise ValueError(f"images of shape {shape}")
    # A fork may have data of other dimensions, or a config without sides.
    if len(shape) == len(network_shape) == 3 and list(shape) != network_shape:
        raise ValueError(f"images of shape {shape}, and a network for {network_shape}")
    if len(counts) != config.num_classes:
        raise ValueError(f"{len(counts)} class counts for {config.num_classes} classes")
    for name in ("mean", "std"):
        if len(data[name]) != config.in_channels:
            raise ValueError(
                f"{len(data[name])} values of {name} for {config.in_channels} channels"
            )
    if not all(math.isfinite(x) for x in (*counts, *weights, *data["mean"], *data["std"])):
        raise ValueError("a class count, guidance weight, mean or std that is not finite")
    if not 0 < min(weights) <= max(weights) < 1e6:
        raise ValueError("a guidance weight that is not above 0 and below a million")
    if min(data["std"]) <= 0:
        raise ValueError("a std that is not above 0")
    if counts and (min(counts) < 0 or sum(counts) == 0 or sum(counts) >= 2**63):
        raise ValueError("class counts that are negative, all 0, or too large")


def load_checkpoint(path, device="cpu", needs_about=True):
    """The network of a file -> (its tensors, about). Of a state it is the evaluation network."""
    tensors, about = load_tensors(path, device, needs_about)
    # A module has a method eval, so no part of a network is called that.
    evaluated = strip_prefix(tensors, "eval.")
    return evaluated or tensors, about


def strip_prefix(tensors, prefix):
    """The tensors whose names begin with a prefix, without it."""
    chosen = {}
    for name, t in tensors.items():
        if name.startswith(prefix):
            chosen[name.removeprefix(prefix)] = t
    return chosen


def refuse_infinite(path, tensors):
    """Raise CheckpointError where a tensor has a number that is not finite."""
    for name, t in tensors.items():
        if t.is_floating_point() and not t.isfinite().all():
            raise CheckpointError(f"{path}: {name} has numbers that are not finite")


def initialize_from(path, model, header, partly):
    """Take a model's first weights from a checkpoint. Returns lines about what was not taken.

    It must be of the same network, and of data in the same units. partly: it may be of another
    network, or of another maker (any safetensors file): what is trained and fits by name and shape
    is taken, and the lines say where configs and units differ.
    Raises CheckpointError, RuntimeError, or what the network's config raises for a wrong one.
    """
    device = next(model.parameters()).device
    tensors, was = load_checkpoint(path, device, needs_about=not partly)
    refuse_infinite(path, tensors)
    if partly:
        left_out = take_weights(path, model, tensors)
        differ = []
        if not missing_parts(was):
            with contextlib.suppress(TypeError, ValueError, OverflowError):  # of another fork
                differ += changes(config_of(was, model), vars(model.config))
            differ += changes(units(was["data"]), units(header))
        for key, before, now in differ:
            left_out.append(f"{key} (the file's is {before!r}, here it is {now!r})")
        return left_out
    differ = changes(config_of(was, model), vars(model.config))
    differ += changes(units(was["data"]), units(header))
    differ = [f"{key} {before!r} -> {now!r}" for key, before, now in differ]
    if differ:
        raise CheckpointError(
            f"{path} is of another config ({', '.join(differ)}); --init_partly=True takes what fits"
        )
    model.load_state_dict(tensors)
    return []


def config_of(was, model):
    """The network's config that a checkpoint says, as a dict. Raises what its class raises."""
    return vars(type(model.config)(**was["config"]))


def changes(before, now):
    """Where two dicts differ: [(key, before, now)]."""
    keys = [key for key in now if key != "time_init"]  # which says only how weights start
    return [(key, before[key], now[key]) for key in keys if before[key] != now[key]]


def units(header):
    """What a network's numbers mean: the data's normalization and VAE."""
    return {key: header.get(key) for key in ("mean", "std", "vae")}


def take_weights(path, model, tensors):
    """Copy the tensors that fit into a model. Returns the names of those that do not, with why.

    Those of frozen parameters are not copied: positions of 4 x 4 patches would fit 2 x 8.
    Raises CheckpointError where none of them fits.
    """
    own = model.state_dict()
    named = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, p in named if not p.requires_grad}
    left_out = []
    taken = 0
    for name, t in tensors.items():
        if name not in own:
            left_out.append(f"{name} (the network has no such tensor)")
        elif t.shape != own[name].shape:
            shapes = f"{tuple(t.shape)}, the network's {tuple(own[name].shape)}"
            left_out.append(f"{name} (the file's is {shapes})")
        elif name in frozen:
            if not torch.equal(t, own[name]):
                left_out.append(f"{name} (is not trained, stays as the network has it)")
        else:
            own[name].copy_(t)
            taken += 1
    if taken == 0:
        why = ", ".join(left_out[:3]) or "what it holds is not trained"
        raise CheckpointError(f"nothing in {path} fits this network: {why}")
    for name in own:
        if name not in tensors:
            left_out.append(f"{name} (not in the file, stays as it was initialized)")
    return left_out


# ---- the states of a run -------------------------------------------------------------------------


def states(folder):
    """{step: path} of the states in a folder, the newest last."""
    found = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        match = re.fullmatch(r"state_(\d+)\.safetensors", name)
        if match:
            found[int(match[1])] = os.path.join(folder, name)
    return dict(sorted(found.items()))


def save_state(folder, step, tensors, about, keep):
    """Save a state. Then delete all states but the last `keep` up to this step.

    Later ones are deleted too: train.py saves below a state only when load_newest has found that
    state damaged.
    """
    path = os.path.join(folder, f"state_{step}.safetensors")
    save_tensors(path, tensors, {**about, "step": step})
    saved = states(folder)
    kept = [other for other in saved if other <= step][-keep:]
    for other, old_path in saved.items():
        if other not in kept:
            with contextlib.suppress(OSError):  # the new one is whole, which is what counts
                os.remove(old_path)


def check_run(path, tensors, about, nets):
    """Raises CheckpointError where what load_tensors gave is not the state of a run.

    nets: the names of its networks.
    """
    missing = [f"{kind}.*" for kind in nets if not strip_prefix(tensors, f"{kind}.")]
    if not isinstance(about.get("train"), dict):
        missing.append("constants")
    step = about.get("step")
    if type(step) is not int or step < 0:
        missing.append("step")
    if missing:
        raise CheckpointError(f"{path} is not the state of a run: no {', '.join(missing)} in it")
    name = os.path.basename(path)
    if name != f"state_{step}.safetensors":
        raise CheckpointError(f"{path} is the state of step {step}: delete it, or name it so")


def optimizer_state(path, tensors, name, weight, kinds):
    """What a run's state has of the optimizer of one weight: {kind: tensor}, or nothing.

    kinds: what that optimizer keeps. Each is float32 and shaped as the weight, but for "step",
    which is a number. Raises CheckpointError where something is missing, or shaped otherwise.
    """
    found = strip_prefix(tensors, f"optimizer.{name}.")
    if found and set(found) != set(kinds):
        raise CheckpointError(
            f"{path} has {', '.join(sorted(found))} of {name}'s optimizer, not {', '.join(kinds)}"
        )
    for kind, t in found.items():
        shape = () if kind == "step" else tuple(weight.shape)
        if tuple(t.shape) != shape or t.dtype != torch.float32:
            raise CheckpointError(
                f"{path} has a {kind} of {name} that is {t.dtype} {tuple(t.shape)}, "
                f"not torch.float32 {shape}"
            )
    return found


def load_newest(folder, device="cpu", quiet=False, copy=torch.clone):
    """(path, tensors, about) of the newest whole state; None where there is no state at all.

    copy: as in load_tensors. Says which states are damaged. Raises CheckpointError where all of
    them are.
    """
    saved = states(folder)
    for path in reversed(saved.values()):
        try:
            tensors, about = load_tensors(path, device, copy=copy)
        except Damaged as error:
            if not quiet:
                print(f"{error}; trying the state before it", file=sys.stderr)
            continue
        return path, tensors, about
    if saved:
        raise CheckpointError(f"no state in {folder} is whole: delete them to start over")
    return None


def what_is_saved(folder, step):
    """One sentence about the state that a run which ends here leaves behind.

    step: of the last state that this run has loaded or saved, 0 where there is none. A state of a
    later step is damaged: load_newest has passed over it.
    """
    paths = [path for other, path in states(folder).items() if other <= step]
    return f"the last state is {paths[-1]}" if paths else "no state was saved yet"
