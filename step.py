"""
One training step on random data, to be timed by bench.py and study.py.

It is a copy of train.py's step without micro-batches, clipping, the learning-rate schedule, the
log's sums, and the ranks' agreement on whether all is finite. Change both.

    step = TrainingStep(DiTConfig.named("XL/2"), batch=32)
    times = milliseconds(step, 20)

Under torchrun, with the process group joined, `batch` is that of each rank, and the gradient is the
mean over the ranks.
"""

import copy
import itertools
import time

import torch
import torch.distributed as dist
from torch import nn

import one_pass
from batches import conditions
from device import DDP_WARM_UPS, Graph, data_parallel
from dual import column
from loss import Term, TrainingLoss, backward
from model import DiT, compile_blocks
from muon import Muon, matrices_of_blocks
from shard import shard_loss, shard_weights, whole

BATCHES = 64  # of random data, taken in turn


class FlowMatching(nn.Module):
    """Plain flow matching with the same network, without guidance: what a step costs at least."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def draw(self, x0, seed, first=0, total=None):
        """Noise like x0 and times (B,). seed, first and total are ignored: each call draws anew."""
        return torch.randn_like(x0), torch.rand(len(x0), device=x0.device)

    def forward(self, x0, y, x1, t, backward_part=None):
        v = x1 - x0
        u = self.model(x0 + column(t, x0) * v, t, t, y, torch.ones_like(t))
        error = (u - v).square().mean((1, 2, 3))
        return error.mean(), {"fm": Term("fm", error.detach(), error.detach(), t)}


class TrainingStep:
    """step(n) makes step n: bfloat16 on a GPU, a check that all is finite, AdamW, two EMAs."""

    def __init__(
        self,
        config,
        batch,
        compiled=True,
        shard=False,
        checkpoint=False,
        detach_jvp=False,
        flow=False,
        objective="tvm",
        muon=False,
        bfloat16_sums=False,
        device="cuda",
    ):
        """config: a DiTConfig. batch: images a step of this rank.

        compiled: the blocks, and on a GPU the step as a CUDA graph. shard: weights divided over
        the ranks of torchrun, without a graph. checkpoint: all blocks are recomputed in the
        backward of the pass with a derivative, and half of them in that of the others.
        detach_jvp: no gradient through dF/ds. flow: FlowMatching above, instead of `objective`,
        which is one of loss.OBJECTIVES. muon: the blocks' matrices are trained by Muon.
        bfloat16_sums: the ranks of torchrun send their gradients as bfloat16.
        """
        torch.manual_seed(0)
        torch._dynamo.reset()
        self.batch = batch
        self.device = device
        self.distributed = dist.is_initialized()
        self.ranks = dist.get_world_size() if self.distributed else 1
        self.rank = dist.get_rank() if self.distributed else 0
        self.uses_ddp = self.distributed and not shard
        with torch.device("meta" if shard else device):
            self.model = DiT(config)
        target = copy.deepcopy(self.model).requires_grad_(False)
        evaluated = copy.deepcopy(self.model).requires_grad_(False)
        if shard:
            nets = (self.model, target, evaluated)
            shard_weights(nets, torch.device(device), bfloat16=device == "cuda")
            for net in nets:
                net.to_empty(device=device)  # only now is there memory, for this rank's part
                for p in net.parameters():
                    torch.nn.init.normal_(p.to_local(), std=0.02)  # these do for a speed
        if checkpoint:
            self.model.checkpoint_blocks = len(self.model.blocks)
        if flow:
            self.loss = FlowMatching(self.model)
            detaches_jvp = False
        else:
            guidance = dict(w=2.0)
            self.loss = TrainingLoss(
                self.model, target, guidance=guidance, detach_jvp=detach_jvp, objective=objective
            )
            detaches_jvp = self.loss.detaches_jvp
        if compiled:
            compile_blocks(self.model, target, detach_jvp=detaches_jvp)

        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.weights = [self.model.get_parameter(name) for name in trained]
        self.averages = []  # (weights of an EMA, its rate)
        for net, rate in ((target, 0.99), (evaluated, 0.9999)):
            self.averages.append(([net.get_parameter(name) for name in trained], rate))
        self.use_graphs = compiled and device == "cuda" and not shard
        lr = torch.tensor(1e-4, device=device) if self.use_graphs else 1e-4
        parameters = dict(zip(trained, self.weights, strict=True))
        matrices = matrices_of_blocks(parameters) if muon else {}
        others = [p for name, p in parameters.items() if name not in matrices]
        self.adamw = torch.optim.AdamW(
            others, lr, (0.9, 0.95), fused=True, capturable=self.use_graphs
        )
        self.muon = Muon(matrices.values(), lr) if muon else None
        self.gradients_graph = None
        self.update_graph = None
        self.parallel = self.loss
        if shard:
            self.parallel = shard_loss(self.loss)
        elif self.uses_ddp:
            self.parallel = data_parallel(self.loss, bfloat16_sums, for_graph=self.use_graphs)

        shape = (config.in_channels, *config.height_and_width)
        self.images = torch.randn(BATCHES, batch, *shape)
        names = dict(class_names=[str(label) for label in range(config.num_classes)])
        labels = torch.randint(config.num_classes, (BATCHES * batch,))
        self.labels = conditions(labels, names).unflatten(0, (BATCHES, batch))
        if device == "cuda":
            self.images = self.images.pin_memory()
            self.labels = self.labels.pin_memory()

    def gradients(self, *inputs):
        """Forward and backward. Returns the loss."""
        self.model.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss, _ = self.parallel(*inputs, backward_part=backward)
        backward(loss)
        return loss.detach()

    @torch.no_grad()
    def update(self):
        if self.use_graphs and not self.muon:
            one_pass.step(self.adamw, self.averages)
            return
        self.adamw.step()
        if self.muon:
            self.muon.step()
        for average, rate in self.averages:
            torch._foreach_lerp_(average, self.weights, 1 - rate)

    def __call__(self, n):
        x0 = self.images[n % BATCHES].to(self.device, non_blocking=True)
        y = self.labels[n % BATCHES].to(self.device, non_blocking=True)
        drawn = self.loss.draw(x0, n, self.rank * self.batch, self.ranks * self.batch)
        inputs = [x0, y, *drawn]
        if self.use_graphs and self.gradients_graph is None:
            warm_ups = DDP_WARM_UPS if self.distributed else 3
            self.gradients_graph = Graph(self.gradients, inputs, warm_ups)
        loss = (self.gradients_graph or self.gradients)(*inputs)
        grads = [p.grad for p in self.weights if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(grads))
        if torch.stack([norm, loss]).isfinite().all().item():
            if self.update_graph is not None:
                self.update_graph()
            else:
                self.update()
                if self.use_graphs:  # its kernels are compiled now; recording runs nothing
                    self.update_graph = Graph(self.update, warm_ups=0)


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
