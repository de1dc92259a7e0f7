"""
The files of a run, made to outlive what ends it: a kill, a power cut, a full disk, a bad sector, a second process.

    with written(path) as f: ...                       # whole or not at all
    save_tensors(path, tensors, about)                 # likewise
    tensors, about = load_tensors(path)                # Damaged where the bytes are not those that were written
    save_state(folder, step, tensors, about, keep)     # and only then are older states deleted
    path, tensors, about = load_newest(folder)         # the newest state that is whole
    lock = hold(folder, seconds)                       # one process a folder

Checkpoints are safetensors files with JSON in them: loading one executes nothing.
"""
import contextlib
import errno
import itertools
import json
import os
import re
import sys
import zlib

import torch
from safetensors import SafetensorError, safe_open

from files import CheckpointError, written

# A file begins with the length of its header and these bytes; then comes the crc32, as eight hexadecimal digits, of
# the whole file as it would be with eight zeros there.
START = b'{"__metadata__": {"crc32": "'
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}




class Damaged(CheckpointError):
    """A file that is not what was written: cut off, or with other bytes."""


def save_tensors(path, tensors, about):
    """Tensors by name, and `about` (anything of JSON), as safetensors, by `written`.

    The library's own writer wants all tensors on the host at once, leaves a file of a random name behind when it
    is killed, and knows no checksum; so the format, which is simple, is written out here."""
    entries, end = {}, 0
    for name, t in tensors.items():
        entries[name] = dict(dtype=DTYPES[t.dtype], shape=list(t.shape), data_offsets=[end, end + t.nbytes])
        end += t.nbytes
    header = json.dumps({"__metadata__": {"crc32": 8 * "0", "tvm": json.dumps(about)}, **entries}).encode()
    header += b" " * (-len(header) % 8)                                           # which aligns the tensors
    with written(path) as f:
        crc = 0
        for part in itertools.chain([len(header).to_bytes(8, "little") + header], map(raw_bytes, tensors.values())):
            f.write(part)
            crc = zlib.crc32(part, crc)
        f.seek(8 + len(START))
        f.write(b"%08x" % crc)




def raw_bytes(t):
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def load_tensors(path, device="cpu"):
    """What save_tensors wrote -> (tensors, about). Raises CheckpointError, of the kind Damaged where the file is cut
    off or does not have its checksum; a file of another maker may have none."""
    try:
        with open(path, "rb") as f:
            start = f.read(8 + len(START) + 8)
            if start[8:-8] == START:
                crc = zlib.crc32(start[:-8] + 8 * b"0")
                while part := f.read(1 << 24):
                    crc = zlib.crc32(part, crc)
                if start[-8:] != b"%08x" % crc:
                    raise Damaged(f"{path} is damaged: cut off, or with bytes in it that are not what was written")
        with safe_open(path, "pt", device=str(device)) as f:
            about = json.loads((f.metadata() or {}).get("tvm", "null"))
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()}     # off the file, which may be replaced
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {path}") from None
    except (SafetensorError, ValueError) as error:
        raise Damaged(f"{path} is not a whole safetensors file: {error}") from None
    except OSError as error:                                                      # a bad sector, or what may be better tomorrow
        raise (Damaged if error.errno == errno.EIO else CheckpointError)(f"cannot read {path}: {error}") from None
    needed = {"config": (), "guidance": ("sampler", "w", "w_min", "w_max"), "data": ("class_counts", "mean", "std")}
    missing = [key for key, parts in needed.items() if not isinstance(about, dict) or not isinstance(about.get(key), dict)
               or not set(parts) <= set(about[key])]
    if missing:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of this project: no whole {', '.join(missing)} in it")
    return tensors, about


def states(folder):
    """{step: path} of the states in a folder, the newest last."""
    found = [re.fullmatch(r"state_(\d+)\.safetensors", file) for file in (os.listdir(folder) if os.path.isdir(folder) else ())]
    return {step: os.path.join(folder, file) for step, file in sorted((int(match[1]), match[0]) for match in found if match)}


def save_state(folder, step, tensors, about, keep):
    """A state, and then of all states the last `keep` until this step: a later one is what load_newest passed over."""
    save_tensors(os.path.join(folder, f"state_{step}.safetensors"), tensors, {**about, "step": step})
    kept = [at for at in states(folder) if at <= step][-keep:]
    for at, path in states(folder).items():
        if at not in kept:
            with contextlib.suppress(OSError):                    # the new one is whole, which is what counts
                os.remove(path)


def load_newest(folder, device="cpu", quiet=False):
    """(path, tensors, about) of the newest whole state; None where there is no state at all. Says which are damaged,
    and raises CheckpointError where all are."""
    for path in reversed(states(folder).values()):
        try:
            return path, *load_tensors(path, device)
        except Damaged as error:
            if not quiet:
                print(f"{error}; trying the state before it", file=sys.stderr)
    if states(folder):
        raise CheckpointError(f"no state in {folder} is whole: delete them to start over")


