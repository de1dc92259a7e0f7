"""
A training step on random data, to be timed by bench.py and study.py.

    step = RandomStep(DiTConfig.named("XL/2"), batch=32)
    times = milliseconds(step, 20)

Under torchrun, with the process group joined, `batch` is that of each rank's micro-batch.
"""

import copy
import itertools
import time

import torch
import torch.distributed as dist
from torch import nn

from batches import conditions
from device import abilities
from dual import column
from loss import Term, TrainingLoss, mean_square
from model import DiT, compile_blocks
from muon import Muon, matrices_of_blocks
from shard import shard_weights
from step import TrainingStep

BATCHES = 64  # micro-batches of random data, taken in turn


class FlowMatching(nn.Module):
    """Plain flow matching with the same network, without guidance: what a step costs at least."""

    detaches_jvp = False

    def __init__(self, model):
        super().__init__()
        self.model = model

    def networks(self):
        return [self.model]

    def draw(self, x0, seed, first=0, total=None):
        """Noise like x0 and times (B,). seed, first and total are ignored: each call draws anew."""
        return torch.randn_like(x0), torch.rand(len(x0), device=x0.device)

    def forward(self, x0, y, x1, t, backward_part=None):
        v = x1 - x0
        u = self.model(x0 + column(t, x0) * v, t, t, y, torch.ones_like(t))
        error = mean_square(u - v)
        return error.mean(), {"fm": Term("fm", error.detach(), error.detach(), t)}


class RandomStep:
    """step(n) makes step n of a training: train.py's TrainingStep, with a check that all is finite.

    It has no clipping and no schedule, and keeps no sums for a log.
    """

    def __init__(
        self,
        config,
        batch,
        micro_batches=1,
        graphs=True,
        compiled=False,
        shard=False,
        checkpoint=False,
        detach_jvp=False,
        flow=False,
        objective="tvm",
        muon=False,
        bfloat16_sums=False,
        alone=False,
        two_streams=None,
        device="cuda",
    ):
        """config: a DiTConfig. batch: images in a rank's micro-batch. micro_batches: of one step.

        graphs: on a GPU, the step as CUDA graphs. compiled: the blocks, by torch.compile. shard:
        weights divided over the ranks of torchrun. checkpoint: all blocks are recomputed in the
        backward of the pass with a derivative, and half of them in that of the others. detach_jvp:
        no gradient through dF/ds. flow: FlowMatching above, instead of `objective`, which is one of
        loss.OBJECTIVES. muon: the blocks' matrices are trained by Muon. bfloat16_sums: the ranks of
        torchrun send their gradients as bfloat16. alone: they send none, and each trains a network
        of its own. two_streams: as in TrainingStep.
        """
        torch.manual_seed(0)
        self.batch = batch
        self.micro_batches = micro_batches
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        where = torch.device("meta") if shard else self.device
        with where:
            model = DiT(config)
        target = copy.deepcopy(model).requires_grad_(False)
        evaluated = copy.deepcopy(model).requires_grad_(False)
        if shard:
            nets = (model, target, evaluated)
            shard_weights(nets, self.device, bfloat16=on_gpu)
            for net in nets:
                net.to_empty(device=self.device)  # only now is there memory, for this rank's part
                for p in net.parameters():
                    torch.nn.init.normal_(p.to_local(), std=0.02)  # any will do to time a step
        if checkpoint:
            model.checkpoint_blocks = len(model.blocks)
        if flow:
            self.loss = FlowMatching(model)
        else:
            guidance = dict(w=2.0)
            self.loss = TrainingLoss(
                model, target, guidance=guidance, detach_jvp=detach_jvp, objective=objective
            )
        if compiled:
            torch._dynamo.reset()
            compile_blocks(model, target, detach_jvp=self.loss.detaches_jvp)

        graphs = graphs and on_gpu
        lr = torch.tensor(1e-4, device=self.device) if graphs else 1e-4
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = matrices_of_blocks(parameters) if muon else {}
        others = [p for name, p in parameters.items() if name not in matrices]
        optimizers = [torch.optim.AdamW(others, lr, (0.9, 0.95), fused=True, capturable=graphs)]
        if muon:
            optimizers.append(Muon(matrices.values(), lr))
        self.step = TrainingStep(
            self.loss,
            optimizers,
            [(target, 0.99), (evaluated, 0.9999)],
            self.device,
            micro_batches=micro_batches,
            graphs=graphs,
            bfloat16=abilities(self.device)[0],
            shard=shard,
            bfloat16_sums=bfloat16_sums,
            alone=alone,
            two_streams=two_streams,
        )

        shape = (config.in_channels, *config.height_and_width)
        # The standard deviation of the latents of `bench.py trainer`. From noise of deviation 1,
        # like the loss's own, a network learns less. Then the same kernels take less energy, and a
        # step of XL/2, at the limit of power, 1 to 3% less time.
        self.images = 2**0.5 * torch.randn(BATCHES, batch, *shape)
        names = dict(class_names=[str(label) for label in range(config.num_classes)])
        labels = torch.randint(config.num_classes, (BATCHES * batch,))
        self.labels = conditions(labels, names).unflatten(0, (BATCHES, batch))
        if on_gpu:
            self.images = self.images.pin_memory()
            self.labels = self.labels.pin_memory()

    def __call__(self, n):
        totals = []
        for i in range(self.micro_batches):
            k = n * self.micro_batches + i
            x0 = self.images[k % BATCHES].to(self.device, non_blocking=True)
            y = self.labels[k % BATCHES].to(self.device, non_blocking=True)
            drawn = self.loss.draw(x0, k, self.rank * self.batch, self.ranks * self.batch)
            is_last = i == self.micro_batches - 1
            terms = self.step.gradients(x0, y, *drawn, is_first=i == 0, is_last=is_last)
            totals.append(torch.stack([term.loss.sum() for term in terms.values()]).sum())
        if torch.stack([self.step.gradient_norm(), *totals]).isfinite().all().item():
            self.step.update()


def milliseconds(step, steps):
    """The milliseconds of each of `steps` steps, by the wall clock, from return to return.

    A step waits for its gradients, as train.py's does. Its update runs while the host prepares the
    next step.
    """
    step(steps)
    ends = [time.perf_counter()]
    for n in range(steps):
        step(n)
        ends.append(time.perf_counter())
    return [(end - start) * 1e3 for start, end in itertools.pairwise(ends)]
