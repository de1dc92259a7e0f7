"""
What this process runs on: its device, its place among the ranks, and CUDA graphs.

    device = find_device("")                      # a GPU where there is one
    rank, ranks, local_rank = ranks_of_torchrun() # (0, 1, 0) without torchrun
    join_ranks("gloo", timedelta(minutes=10))
    parallel = data_parallel(module)              # its backward takes the mean over the ranks
"""

import atexit
import functools
import os
import platform
import signal
import sys
import time
from importlib.util import find_spec

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported once there is a group, it would hold that to the end
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import peer_mean
from files import UserError


def find_device(name=""):
    """The torch.device of a name: cpu, cuda, cuda:1, mps. By default a GPU where there is one.

    Under torchrun "cuda" is this rank's GPU. Raises UserError where there is no such device.
    """
    if not name:
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"no device {name!r}: there are cpu, cuda and mps")
    if name.startswith("cuda"):
        let_memory_grow()
    full_name = f"cuda:{ranks_of_torchrun()[2]}" if name == "cuda" else name
    try:
        device = torch.device(full_name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if "not supported" in reason:
            reason += "; PYTORCH_ALLOC_CONF=expandable_segments:False may help"
        raise UserError(f"no device {name!r} here: {reason}") from None
    return device


def let_memory_grow():
    """Let PyTorch enlarge its blocks of GPU memory in place, which leaves fewer gaps between them.

    Call it before the process's first CUDA tensor. A value that the user has set stays. Windows has
    none of this, under WSL and on some virtual GPUs the first tensor fails with it, and AMD's GPUs
    are left alone.
    """
    variables = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    is_wsl = "microsoft" in platform.release().lower()
    if sys.platform != "linux" or is_wsl or torch.version.hip is not None:
        return
    if not any(name in os.environ for name in variables):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def abilities(device):
    """(computes in bfloat16, runs Triton kernels) of a device. Both are for CUDA devices alone."""
    if device.type != "cuda":
        return False, False
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    has_triton = find_spec("triton") is not None
    return has_bfloat16, has_triton and torch.cuda.get_device_capability(device) >= (7, 0)


# ---- ranks ---------------------------------------------------------------------------------------


def ranks_of_torchrun():
    """(rank, ranks, local rank), which torchrun gives in the environment; (0, 1, 0) without it.

    Raises UserError where the environment has only a part of what torchrun sets.
    """
    ranks = whole_number("WORLD_SIZE", 1)
    rank = whole_number("RANK", 0)
    local_rank = whole_number("LOCAL_RANK", 0)
    if ranks < 1 or not 0 <= rank < ranks:
        raise UserError(f"the environment has RANK {rank} and WORLD_SIZE {ranks}, which cannot be")
    if local_rank < 0:
        raise UserError(f"the environment's LOCAL_RANK must be at least 0, not {local_rank}")
    if ranks > 1:
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(
                    f"the environment has WORLD_SIZE={ranks} but no {name}: "
                    "start several ranks with torchrun, or unset WORLD_SIZE"
                )
        port = whole_number("MASTER_PORT", 0)
        if not 0 <= port < 2**16:
            raise UserError(f"the environment's MASTER_PORT must be below 65536, not {port}")
    return rank, ranks, local_rank


def without_torchrun():
    """The environment of a process that is started by one rank, and is none itself."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    return {name: value for name, value in os.environ.items() if name not in ranks}


def whole_number(name, default):
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment's {name} must be a whole number, not {text!r}") from None


def join_ranks(backend, patience):
    """Join the process group of all ranks. Does nothing for a single process without torchrun.

    torchrun --nproc_per_node=1 makes a group of one, which runs all that several ranks run.
    patience: a timedelta after which a rank that falls silent ends the others. Restarts by
    torchrun --max_restarts work on one machine, and on several where torchrun's own store is off.
    Raises UserError for --max_restarts on several machines with that store, and where the ranks do
    not find each other.
    """
    rank, ranks, _ = ranks_of_torchrun()
    if ranks == 1 and not dist.is_torchelastic_launched():
        return
    # After a restart torchrun's store still has the addresses of ranks that are gone (PyTorch
    # issue 135712). The count of restarts keeps them apart on one machine. On several machines
    # each torchrun counts for itself, so there the count cannot be used.
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if not one_machine and shared_store and restarts:
        raise UserError(
            "on several machines --max_restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
            "in the environment of every torchrun"
        )
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"
    try:
        store = next(dist.rendezvous("env://", timeout=patience))[0]
        store = dist.PrefixStore(restart, store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=patience)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"rank {rank} cannot join the {ranks} ranks: {reason}") from None
    if backend == "gloo":
        atexit.register(leave_ranks)


def leave_ranks():
    """Leave the process group, where this process is in one.

    Before that, let go of what holds the group: TrainingStep.close does.
    """
    if not dist.is_initialized():
        return
    has_gloo = dist.get_backend() == "gloo"
    dist.destroy_process_group()
    if has_gloo:
        # gloo's threads free the tensors of a sum after it is done. A thread that does so while
        # Python ends aborts the process. The threads end with the group. But FSDP2's networks,
        # and a run that fails, hold the group to the end: there the threads get a moment.
        time.sleep(0.2)


def from_rank_0(value):
    """Rank 0's value, on all ranks. Any object that can be pickled."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_all_ranks(value):
    """The values of all ranks, in their order, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(function, *arguments):
    """A function's value on rank 0, None on the others. All ranks call this.

    Its UserError or OSError is raised on all of them, as a UserError.
    """
    value = None
    complaint = None
    if ranks_of_torchrun()[0] == 0:
        try:
            value = function(*arguments)
        except (UserError, OSError) as error:
            complaint = str(error)
    complaint = from_rank_0(complaint)
    if complaint:
        raise UserError(complaint)
    return value


def data_parallel(module, bfloat16=False, for_graph=False):
    """torch's DistributedDataParallel: a module whose backward takes the mean over the ranks.

    A backward inside forward(), of an early term, or within parallel.no_sync() only adds to .grad.
    The backward after forward() sends what all of them have added, bucket by bucket, while it still
    computes. A weight's .grad is then a view of its bucket. That backward must reach every weight
    that is trained.

    bfloat16, for GPUs: NCCL sends buckets as bfloat16, half the bytes. for_graph: forward and
    backward can be recorded by Graph.
    """
    recording_stream = graph_stream() if for_graph else None
    if recording_stream:
        recording_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(recording_stream):  # None changes nothing
        parallel = DistributedDataParallel(module, gradient_as_bucket_view=True)
        device = next(module.parameters()).device
        if bfloat16:
            parallel.register_comm_hook(None, bf16_compress_hook)
        elif mean := peer_mean_of_all(device):
            parallel.register_comm_hook(mean, peer_mean.PeerMean.hook)
        elif device.type == "cuda":
            parallel.register_comm_hook(None, nccl_mean)
    if recording_stream:
        torch.cuda.current_stream().wait_stream(recording_stream)
    return parallel


def peer_mean_of_all(device):
    """This rank's PeerMean, if all ranks can make one. Else None, and rank 0 says why."""
    devices = from_all_ranks(device)
    if len(devices) == 1 or device.type == "cpu":
        return None
    # Each rank tells the others how each part went: one that fails must not leave them waiting.
    reason, complaint = attempt(peer_mean.why_not, device, devices)
    reasons = from_all_ranks(reason or complaint)
    if not any(reasons):
        box, complaint = attempt(peer_mean.make_box, device)
        reasons = from_all_ranks(complaint)
    if not any(reasons):
        mean, complaint = attempt(peer_mean.PeerMean, box)
        reasons = from_all_ranks(complaint)
    if not any(reasons):
        return mean
    if dist.get_rank() == 0:
        reason = next(filter(None, reasons))
        print(f"NCCL takes the mean of gradients, not copy engines: {reason}", file=sys.stderr)
    return None


def attempt(function, *arguments):
    """(the function's value, None), or (None, why it failed).

    It catches every error, because PyTorch may change symmetric memory, a part that is not public.
    """
    try:
        return function(*arguments), None
    except Exception as error:
        return None, (str(error).splitlines() or [type(error).__name__])[0]


def nccl_mean(_, bucket):
    """A communication hook in which NCCL divides. DDP's own way is a pass over all gradients."""
    mean = dist.ReduceOp.AVG
    if dist.get_world_size() == 1:  # AVG would make NCCL copy the gradient, SUM does nothing
        mean = dist.ReduceOp.SUM
    work = dist.all_reduce(bucket.buffer(), mean, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def ranks_agree(weights):
    """Whether all ranks have the same weights, but for rounding: they compare the sums."""
    sums = torch.stack([p.detach().sum() for p in weights])
    sizes = torch.stack([torch.linalg.vector_norm(p.detach()) for p in weights])
    both = torch.cat([sums, -sums])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    largest, minus_smallest = both.chunk(2)
    return not (largest + minus_smallest > 1e-5 * sizes).any()


# ---- signals -------------------------------------------------------------------------------------


class StopRequest:
    """SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a terminal that is closed, unless the process ignores
    that, as under nohup) ask for a stop after the step; a second one ends the process.

    A scheduler's signal comes twice, from it and through torchrun, so a second one counts only
    when it comes more than 2 seconds later. A torchrun that was killed is a request, too.
    """

    def __init__(self):
        self.signal = None
        self.since = 0.0
        self.parent = os.getppid()
        self.before = {}
        numbers = [signal.SIGTERM, signal.SIGINT]
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
            numbers.append(hangup)
        for number in numbers:
            self.before[number] = signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        if self.signal is None:
            self.signal = number
            self.since = time.monotonic()
        elif time.monotonic() - self.since > 2:
            os._exit(128 + number)

    def asked(self):
        torchrun_is_gone = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent
        return self.signal is not None or torchrun_is_gone

    def restore(self):
        """Give the signals back to their handlers from before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def exit_code(self):
        return 128 + (self.signal or signal.SIGTERM)


# ---- CUDA graphs ---------------------------------------------------------------------------------


DDP_WARM_UPS = 11  # of a Graph with DistributedDataParallel in it, by PyTorch's notes


def graph_stream():
    """The CUDA stream on which graphs are recorded.

    Autograd adds to a weight's .grad on the stream that was current when it made the node for that.
    DistributedDataParallel's constructor makes these nodes, so data_parallel calls it on this
    stream: a recording would otherwise touch another one.
    """
    return streams_of(torch.cuda.current_device())[0]


def side_stream():
    """A second CUDA stream, for work that runs beside that of graph_stream()."""
    return streams_of(torch.cuda.current_device())[1]


@functools.cache
def streams_of(device):
    """Two CUDA streams of a device."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class Graph:
    """A function of CUDA tensors as one CUDA graph.

    A graph runs without the host's time between kernels, which is most of a small network's step.
    Making one runs the function `warm_ups` times; then it is recorded, which computes nothing.
    Inputs and outputs keep their places in memory: clone an output that must outlive the next call.
    warm_ups=0 is for a function that must not run more often than it is called, like an optimizer's
    step. Call it once by hand before.

    twin: a Graph whose memory this one shares. Use one's outputs before you call the other.
    clean: is called between the warm-ups and the recording, to free what the warm-ups left. The
    recording has memory of its own.
    """

    def __init__(self, function, inputs=(), warm_ups=3, twin=None, clean=None):
        self.inputs = [a.clone() for a in inputs]
        stream = graph_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):  # what is compiled and allocated once happens here
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        if clean is not None:
            clean()
        self.graph = torch.cuda.CUDAGraph()
        pool = twin.graph.pool() if twin else None
        # "thread_local": other threads may pin memory meanwhile.
        recording = dict(pool=pool, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.graph(self.graph, **recording):
            self.outputs = function(*self.inputs)
        torch.cuda.empty_cache()  # what the warm-ups allocated

    def __call__(self, *inputs):
        for kept, new in zip(self.inputs, inputs, strict=True):
            if (kept.shape, kept.dtype) != (new.shape, new.dtype):
                wanted = f"{kept.dtype} {tuple(kept.shape)}"
                raise ValueError(f"recorded with {wanted}, given {new.dtype} {tuple(new.shape)}")
        if self.inputs:
            torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        return self.outputs
