"""
What this process runs on: its device, its rank, its CUDA graph.
"""
import os
from importlib.util import find_spec

import torch
import torch.distributed as dist

from files import CheckpointError


def all_reduce(tensors, limit=2 ** 26):
    """Sums contiguous tensors over all ranks, in place, in messages of at most `limit` numbers, or of one tensor."""
    parts, room = [], -1
    for t in tensors:
        if t.numel() > room:
            parts.append([])
            room = limit
        parts[-1].append(t.view(-1))
        room -= t.numel()
    for part in parts:
        message = torch.cat(part)
        dist.all_reduce(message)
        torch._foreach_copy_(part, list(message.split([t.numel() for t in part])))


class Graph:
    """A function of CUDA tensors as one CUDA graph, without the host's time between its kernels, which is most of a small
    network's step. Its inputs and outputs stay where they are: a call overwrites them. Making it runs the function three times."""

    def __init__(self, function, inputs):
        self.inputs, stream = [a.clone() for a in inputs], torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):                                          # what is compiled and allocated once
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):       # others may pin memory meanwhile
            self.outputs = function(*self.inputs)
        torch.cuda.empty_cache()                                        # gradients of the trial runs, on their stream

    def __call__(self, *inputs):
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        return self.outputs


def find_device(name=""):
    """The device of a name; by default a GPU where there is one, this rank's. Raises CheckpointError."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise CheckpointError(f"no device {name!r}: there are cpu, cuda and mps")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"no device {name!r} here: {str(error).splitlines()[0]}") from None
    return device


def abilities(device):
    """Whether a device computes in bfloat16, and whether torch.compile works for it. Only CUDA devices are asked."""
    cuda = device.type == "cuda"
    return (cuda and torch.cuda.is_bf16_supported(including_emulation=False),
            cuda and find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0))
