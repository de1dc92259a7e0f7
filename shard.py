"""
Networks divided over the ranks, by torch's FSDP2: for networks whose training state (weights,
gradient, two moments, two averages: 24 bytes a weight) does not fit one GPU. Sampling still holds a
whole network on each: 4 bytes a weight for train.py's pictures, and 6 in sample.py.

    shard_weights(nets, device)          # each rank keeps its part of every weight
    parallel = shard_loss(loss)          # its backward takes the mean over the ranks
    tensors = gather(net.state_dict())   # whole, for a file
    network = whole_network(net)         # whole, to be sampled

A rank keeps 1/ranks of every weight, cut along the first dimension. The weight is then a DTensor,
and so are its gradient and AdamW's moments. Before a block runs, forward or backward, all ranks
gather its weights, and free them after it. A backward leaves each rank its part of the mean
gradient. All ranks must call whatever runs a network, and gather, all_finite and whole_network, at
the same time.
"""

import functools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from device import from_all_ranks
from dual import Dual, Residual
from model import Block, DiT

# FSDP2 has hooks on the tensors that a block takes and returns, so it must find those in Duals.
# torch 2.13 looks into any dataclass, 2.11 into those that are registered.
for kind in (Dual, Residual):
    torch.export.register_dataclass(kind)


def shard_weights(nets, device, bfloat16=False, bfloat16_sums=False):
    """Divide the weights of DiTs over the ranks, in place.

    nets: DiTs of float32 weights. They may lie on the CPU: one block after another goes to the
    device, where this rank's part of it stays.

    bfloat16: the weights of blocks are gathered as bfloat16, for a forward under autocast. Autocast
    rounds the linear weights to bfloat16 anyway. The weights of query and key norms it would not:
    here they are rounded too, a small difference from a run without shard. bfloat16_sums: gradients
    are summed over the ranks as bfloat16, otherwise as float32.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    sums = torch.bfloat16 if bfloat16_sums else torch.float32
    # Inputs stay as they are: autocast sees to them, and bfloat16 is too coarse for times.
    exact = MixedPrecisionPolicy(reduce_dtype=sums, cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=sums, cast_forward_inputs=False
    )
    for net in nets:
        for block in net.blocks:
            fully_shard(block, mesh=mesh, mp_policy=rounded if bfloat16 else exact)
        # The rest of the network is small. It is whole while the network runs, in float32.
        fully_shard(net, mesh=mesh, mp_policy=exact, reshard_after_forward=True)


def shard_loss(loss):
    """Wrap a TrainingLoss whose networks went through shard_weights. Call it after compile_blocks.

    Backward then leaves each rank its part of the mean gradient. Every backward sums over the
    ranks, also that of an early term, and that of a micro-batch before the last. Summing once, in
    the last one, would need memory for a whole gradient on each rank until then.
    """
    for net in loss.children():
        # FSDP2 gathers weights in hooks of a block, so a block must be called, not its forward.
        for block in net.blocks:
            block.forward = functools.partial(net.run_block, block)
        net.run_block = Block.__call__
        net.make_vectors = None  # each block makes its own, with the weights gathered for it
    return fully_shard(loss, mesh=next(loss.parameters()).device_mesh)


# ---- whole tensors and their parts ---------------------------------------------------------------


def whole(t):
    """The full tensor of a DTensor; any other tensor as it is. All ranks call this."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def own_part(t, mesh):
    """A whole tensor, which every rank has -> a DTensor of it. It holds a copy of this rank's part.

    mesh: the device_mesh of a divided weight. A tensor without dimensions is copied as it is.
    """
    if t.ndim == 0:  # AdamW's count of steps
        return t.clone()
    return distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None).clone()


def gather(tensors):
    """{name: tensor} -> the same with each DTensor replaced by its full tensor, on the CPU.

    Only rank 0 gets these: the other ranks get None in their place. One tensor is gathered at a
    time, so that the GPU need not hold the whole network. All ranks call this.
    """
    found = {}
    for name, t in tensors.items():
        if isinstance(t, DTensor):
            t = t.full_tensor()
            t = t.cpu() if dist.get_rank() == 0 else None
        found[name] = t
    return found


def all_finite(tensors):
    """Whether all numbers are finite, of all ranks' tensors or parts. All ranks call this."""
    own = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return all(from_all_ranks(all(t.isfinite().all().item() for t in own)))


def whole_network(net):
    """A whole copy of a network that went through shard_weights, on this rank's device.

    Any other network is returned as it is. All ranks call this. Raises MemoryError on all of them
    where one has no memory for the copy.
    """
    if not isinstance(net, FSDPModule):
        return net
    tensors = net.state_dict()
    device = next(net.parameters()).device
    with torch.device("meta"):  # nothing to initialize
        copy = DiT(net.config)
    # A rank that ran out of memory while the others gather would leave them waiting. So each makes
    # room first, also for the tensor that is just gathered, which torch holds twice.
    largest = max(t.numel() for t in tensors.values())
    has_room = torch.ones((), device=device)
    try:
        copy.to_empty(device=device)
        torch.empty(2 * largest, device=device)
    except RuntimeError:  # torch.OutOfMemoryError; on a CPU a plain RuntimeError
        has_room.zero_()
    dist.all_reduce(has_room, dist.ReduceOp.MIN)
    if not has_room:
        raise MemoryError("a rank has no memory for a whole network")
    for name, t in copy.state_dict().items():
        t.copy_(whole(tensors[name]))
    return copy.eval().requires_grad_(False)
