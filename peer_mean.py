"""
The mean of gradients over the GPUs of one host, taken by their copy engines.

    parallel = DistributedDataParallel(module, gradient_as_bucket_view=True)
    if peer_mean.why_not(device, devices) is None:
        parallel.register_comm_hook(PeerMean(make_box(device)), PeerMean.hook)

NCCL runs on the multiprocessors, which the products of the backward need at the same time. A
product's programs (thread blocks) fill all of them. If some are taken, the programs left over must
wait for a second round. A GPU also has copy engines, which do nothing else. Here they move the
gradients, and only a short kernel adds. Each rank has a box in memory that all GPUs of the host can
reach (torch's symmetric memory). A gradient is cut into as many parts as there are ranks:

    push    part r of my gradient goes to rank r's box
    mean    of my part, over all ranks
    pull    every other part's mean comes from the box of its rank

So each number is averaged by one rank alone, and all ranks get the same bits. device.data_parallel
asks all ranks whether they can do this, and takes NCCL otherwise.
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

PEER_MEAN = True  # False: NCCL takes the mean
BOX_BYTES = 2**26  # gradients are averaged so many bytes at a time
ALIGNMENT = 16  # parts begin at a multiple of so many numbers, for wide loads
BLOCK = 2048  # numbers of a program
# Milliseconds that a rank waits for the others, as long as train.py's `patience`. Then its kernel
# traps, and the process ends.
TIMEOUT = 600_000


def why_not(device, devices):
    """Why this rank cannot use PeerMean, in words; None if it can. The process group is joined.

    device: this rank's. devices: those of all ranks, in their order.
    """
    ranks = len(devices)
    if not PEER_MEAN:
        return "PEER_MEAN is False"
    if device.type != "cuda" or torch.version.hip is not None or triton is None:
        return "it takes NVIDIA GPUs and Triton"
    local_ranks = os.environ.get("LOCAL_WORLD_SIZE")
    if local_ranks is None:
        return "the environment has no LOCAL_WORLD_SIZE"
    if local_ranks != str(ranks):
        return "there are several hosts"
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return "NCCL_P2P_DISABLE is set"
    if os.environ.get("TORCH_SYMMMEM", "CUDA") != "CUDA":
        return "TORCH_SYMMMEM asks for other symmetric memory than CUDA's"
    if len(set(devices)) < ranks or torch.cuda.device_count() < ranks:
        return "each rank must see the GPUs of all ranks"
    for peer in devices:
        if peer != device and not torch.cuda.can_device_access_peer(device.index, peer.index):
            return f"GPU {device.index} cannot reach the memory of GPU {peer.index}"
    if not has_nvlink(device, devices):
        return "there is no NVLink between the GPUs"
    return None


def has_nvlink(device, devices):
    """Whether NVLink joins a GPU to the others. Symmetric memory's barrier writes to their memory
    by atomic operations, which many PCIe machines do not have."""
    detect = torch._C._distributed_c10d._detect_dma_connectivity
    links = detect(torch._C._autograd.DeviceType.CUDA, "nvlink").matrix
    return all(links[device.index][peer.index] > 0 for peer in devices if peer != device)


def make_box(device):
    """Memory that the other GPUs can reach, once all ranks have met for it."""
    return symm_mem.empty(BOX_BYTES, dtype=torch.uint8, device=device)


class PeerMean:
    """A communication hook for DistributedDataParallel. All ranks make one, at the same time."""

    def __init__(self, box):
        self.device = box.device
        self.stream = torch.cuda.Stream(self.device)
        self.box = box  # kept alive; `peers` has the addresses of all ranks' boxes
        self.peers = symm_mem.rendezvous(box, dist.group.WORLD)

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
        # The box of each rank has a row for each rank. Rows begin at the same bytes in every dtype.
        row_bytes = BOX_BYTES // ranks // 128 * 128
        row = row_bytes // gradient.element_size()
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
        # There is no barrier here: a fast rank may push its next piece while others still pull.
        # - It pushes to row `rank` of others' boxes, which they read before the second barrier.
        # - Row r of rank r's box holds the mean that others pull. Rank r writes it again after the
        #   next piece's first barrier, which a rank enters only when it has pulled.


if triton:

    @triton.jit
    def mean_kernel(MINE, BOX, size, row_size, RANK: tl.constexpr, RANKS: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
        """Row RANK of the box and MINE become the mean of MINE and of the box's other rows."""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        total = tl.zeros([BLOCK], tl.float32)
        for r in tl.static_range(RANKS):  # the same order in every part
            if r == RANK:
                total += tl.load(MINE + i, inside)
            else:
                total += tl.load(BOX + r * row_size + i, inside)
        mean = (total / RANKS).to(MINE.dtype.element_ty)
        tl.store(MINE + i, mean, inside)
        tl.store(BOX + RANK * row_size + i, mean, inside)
