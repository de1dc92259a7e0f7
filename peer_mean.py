"""
The mean of gradients over the GPUs of one host, taken by their copy engines.

    parallel = DistributedDataParallel(module, gradient_as_bucket_view=True)
    if peer_mean.why_not(device) is None:
        parallel.register_comm_hook(PeerMean(device), PeerMean.hook)

NCCL sums on the multiprocessors, which the products of the backward need at the same time: a
product that finds some of them taken runs twice as long. A GPU also has copy engines, which do
nothing else. Here they move the gradients, and only a short kernel adds. Each rank has a box in
memory that all GPUs of the host can reach (torch's symmetric memory). A gradient is cut into as
many parts as there are ranks:

    push    part r of my gradient goes to rank r's box
    mean    of my part, over all ranks
    pull    every other part's mean comes from the box of its rank

So each number is averaged by one rank alone, and all ranks get the same bits.
"""

import os

import torch
import torch.distributed as dist

try:
    import torch.distributed._symmetric_memory as symm_mem
    import triton
    import triton.language as tl
except ImportError:  # a CPU, or Windows
    triton = None

PEER_MEAN = True  # False: NCCL sums
BOX_BYTES = 2**26  # gradients are averaged so many bytes at a time
ALIGNMENT = 16  # parts begin at a multiple of so many numbers, for wide loads
BLOCK = 2048
TIMEOUT = 600_000  # milliseconds for which a rank waits for the others


def why_not(device):
    """Why this rank cannot use PeerMean, in words; None if it can. The process group is joined."""
    ranks = dist.get_world_size()
    if not PEER_MEAN:
        return "PEER_MEAN is False"
    if device.type != "cuda" or torch.version.hip is not None or triton is None:
        return "it is for Nvidia GPUs, with Triton"
    if ranks == 1:
        return "there is one rank"
    if os.environ.get("LOCAL_WORLD_SIZE") != str(ranks):
        return "there are several hosts"
    peers = [r for r in range(ranks) if r != device.index]
    if torch.cuda.device_count() < ranks:
        return "this rank does not see the GPUs of the others"
    if not all(torch.cuda.can_device_access_peer(device.index, peer) for peer in peers):
        return "these GPUs cannot reach each other's memory"
    return None


class PeerMean:
    """A communication hook for DistributedDataParallel. All ranks make one, at the same time."""

    def __init__(self, device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.box = symm_mem.empty(BOX_BYTES, dtype=torch.uint8, device=device)
        self.peers = symm_mem.rendezvous(self.box, dist.group.WORLD)

    def hook(self, bucket):
        """The future of a bucket's mean, which is in the bucket. Recordable in a CUDA graph."""
        gradient = bucket.buffer()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        future = torch.futures.Future(devices=[self.device])
        with torch.cuda.stream(self.stream):
            self.average(gradient)
            future.set_result(gradient)  # ready when this stream has come here
        return future

    def average(self, gradient):
        """Put the mean over the ranks into a tensor (n,), on the current stream."""
        ranks = self.peers.world_size
        row = BOX_BYTES // ranks // gradient.element_size()
        row -= row % ALIGNMENT
        # The box of each rank, with a row for each rank.
        boxes = [self.peers.get_buffer(r, (ranks, row), gradient.dtype) for r in range(ranks)]
        for piece in gradient.split(row * ranks):
            self.average_piece(piece, boxes)

    def average_piece(self, gradient, boxes):
        rank, ranks = self.peers.rank, self.peers.world_size
        others = [(rank + i) % ranks for i in range(1, ranks)]
        n = triton.cdiv(gradient.numel(), ranks)
        parts = gradient.split(triton.cdiv(n, ALIGNMENT) * ALIGNMENT)
        parts += (gradient[:0],) * (ranks - len(parts))  # the last ones may be empty

        for r in others:  # push
            boxes[r][rank, : len(parts[r])].copy_(parts[r])
        self.peers.barrier(timeout_ms=TIMEOUT)
        mine, box = parts[rank], boxes[rank]
        if len(mine) > 0:
            grid = (triton.cdiv(len(mine), BLOCK),)
            mean_kernel[grid](mine, box, len(mine), box.stride(0), rank, ranks, BLOCK)
        self.peers.barrier(timeout_ms=TIMEOUT)
        for r in others:  # pull
            parts[r].copy_(boxes[r][r, : len(parts[r])])
        # A rank that is ahead may push the next piece now. Only rows of this piece's gradients are
        # written then, which nobody reads any more. Means are written after the next barrier, when
        # all ranks have pulled.


if triton:

    @triton.jit
    def mean_kernel(MINE, BOX, size, row_size, RANK: tl.constexpr, RANKS: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
        """Row RANK of the box and MINE become the mean of MINE and of the box's other rows."""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        total = tl.zeros([BLOCK], tl.float32)
        for r in tl.static_range(RANKS):  # in this order on every rank
            if r == RANK:
                total += tl.load(MINE + i, inside)
            else:
                total += tl.load(BOX + r * row_size + i, inside)
        mean = (total / RANKS).to(MINE.dtype.element_ty)
        tl.store(MINE + i, mean, inside)
        tl.store(BOX + RANK * row_size + i, mean, inside)
