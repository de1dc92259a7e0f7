"""
Networks divided over the ranks, by torch's FSDP2: for models larger than one GPU's memory.

    shard_weights(nets, device)          # each rank keeps its part of every weight
    parallel = shard_loss(loss)          # its backward takes the mean over the ranks
    tensors = gather(net.state_dict())   # whole, for a file
    network = whole_network(net)         # whole, to be sampled

A rank keeps 1/ranks of every weight, cut along the first dimension. The weight is then a DTensor,
and so are its gradient and AdamW's moments. Before a block runs, forward or backward, all ranks
gather its weights, and free them after it. A backward leaves each rank its part of the gradient's
mean. All ranks must call whatever runs a network, and gather and whole_network, at the same time.
"""

import functools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dual import Dual, Residual
from model import Block, DiT

# FSDP2 has hooks on the tensors that a block takes and returns, so it must find those in Duals.
# torch 2.13 looks into any dataclass, 2.11 into those that are registered.
for kind in (Dual, Residual):
    torch.export.register_dataclass(kind)


def shard_weights(nets, device, bfloat16=False, bfloat16_sums=False):
    """Divide the weights of DiTs over the ranks, in place.

    They may lie on the CPU: one block after another goes to the device, where this rank's part of
    it stays. bfloat16: the weights of blocks travel as bfloat16, for a forward under autocast. It
    would round them anyway, but for the weights of query and key norms. bfloat16_sums: gradients
    travel as bfloat16, otherwise as float32.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    sums = torch.bfloat16 if bfloat16_sums else torch.float32
    # Inputs stay as they are: autocast sees to them, and bfloat16 is too coarse for times.
    exact = MixedPrecisionPolicy(reduce_dtype=sums, cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(torch.bfloat16, sums, cast_forward_inputs=False)
    for net in nets:
        for block in net.blocks:
            fully_shard(block, mesh=mesh, mp_policy=rounded if bfloat16 else exact)
        # The rest of the network is small. It is whole while the network runs, in float32.
        fully_shard(net, mesh=mesh, mp_policy=exact, reshard_after_forward=True)


def shard_loss(loss):
    """A loss whose networks are divided, after compile_blocks: backward takes the mean over ranks.

    Every backward sums its gradients over the ranks, also that of an early term or of a micro-batch
    that is not the last. Waiting for the last would keep whole gradients, which is what we divide.
    """
    for net in loss.children():
        # FSDP2 gathers weights in hooks of a block, so a block must be called, not its forward.
        for block in net.blocks:
            block.forward = functools.partial(net.run_block, block)
        net.run_block = Block.__call__
    return fully_shard(loss, mesh=next(loss.parameters()).device_mesh)


# ---- whole tensors and their parts ---------------------------------------------------------------


def whole(t):
    """A tensor that is not divided. All ranks call this."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def own_part(t, mesh):
    """This rank's part of a whole tensor that each rank has, in memory of its own.

    mesh: the device_mesh of a divided weight.
    """
    if t.ndim == 0:  # AdamW's count of steps
        return t.clone()
    return distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None).clone()


def gather(tensors):
    """{name: tensor} with whole tensors on the CPU of rank 0, in place of divided ones.

    The other ranks get None for these. One tensor is gathered at a time, so that the GPU need not
    hold the whole network.
    """
    found = {}
    for name, t in tensors.items():
        if isinstance(t, DTensor):
            t = t.full_tensor()
            t = t.cpu() if dist.get_rank() == 0 else None
        found[name] = t
    return found


def whole_network(net):
    """A copy of a divided network for this rank alone, on its device. Another one as it is."""
    if not isinstance(net, FSDPModule):
        return net
    with torch.device("meta"):  # nothing to initialize
        copy = DiT(net.config)
    copy.load_state_dict({name: whole(t) for name, t in net.state_dict().items()}, assign=True)
    return copy.eval().requires_grad_(False)
