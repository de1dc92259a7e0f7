"""
One training step: forward and backward, then the optimizers and the averages of the weights.

    step = TrainingStep(loss, [adamw], [(target, 0.99), (evaluated, 0.9999)], device)
    terms = step.gradients(x0, y, *loss.draw(x0, seed))  # the gradient is in .grad now
    norm = step.gradient_norm()
    step.update()

train.py's loop calls it, and bench.py and study.py time it. With graphs=True, on a GPU, gradients()
and update() are CUDA graphs: recorded once, and then replayed without Python.
"""

import weakref
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist

import one_pass
from device import DDP_WARM_UPS, Graph, data_parallel, side_stream
from loss import backward
from products import GradientWriter, RoundedCopies
from shard import shard_loss, whole

# While a CUDA graph is recorded, the gradients of weights are computed on a second stream. Nothing
# else in the backward waits for them. So they can run on multiprocessors that short kernels, and
# the last thread blocks of long ones, leave idle. False: all is on one stream.
TWO_STREAMS = True


class TrainingStep:
    """The networks, the optimizers and the CUDA graphs of a step."""

    def __init__(
        self,
        loss,
        optimizers,
        averages,
        device,
        micro_batches=1,
        graphs=False,
        bfloat16=False,
        shard=False,
        bfloat16_sums=False,
        alone=False,
        two_streams=None,
    ):
        """Under torchrun the gradient is the mean over the ranks.

        loss           a TrainingLoss, or a module like it, with model and networks(). The weights
                       of loss.model that require a gradient are trained.
        optimizers     of these weights; the first one is AdamW
        averages       [(network, decay)] of the exponential moving averages; exactly two where
                       one_pass.py makes them, in a graph with AdamW alone
        device         with graphs, the current CUDA device
        micro_batches  calls of gradients() in a step
        graphs         whether to record CUDA graphs; learning rates must then be tensors
        bfloat16       the networks run under autocast
        shard          by FSDP2, for networks that went through shard_weights; else by DDP
        bfloat16_sums  DDP sends gradients as bfloat16
        alone          each rank keeps its own gradient, as if it were the only one
        two_streams    in CUDA graphs, gradients of weights are made on a second stream
                       (products.GradientWriter); None: as TWO_STREAMS says

        Raises ValueError for graphs on a device that is not the current one; and, with AdamW alone,
        for weights in another order than the model's, and for other than two averages.
        """
        self.model = loss.model
        self.optimizers = optimizers
        self.micro_batches = micro_batches
        self.device = device
        self.bfloat16 = bfloat16
        self.uses_ddp = dist.is_initialized() and not shard and not alone
        self.use_graphs = graphs
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.weights = [self.model.get_parameter(name) for name in trained]
        self.averages = []  # (its weights, its decay)
        for net, decay in averages:
            self.averages.append(([net.get_parameter(name) for name in trained], decay))
        if graphs:
            self.check_for_graphs()
        # bfloat16 copies of the weights of all networks that the loss runs. FSDP2 gathers weights
        # in bfloat16 itself. On AMD's GPUs products of bfloat16 that give float32 are not tried.
        has_copies = bfloat16 and not shard and torch.version.hip is None
        self.copies = RoundedCopies(loss.networks() if has_copies else [])
        two_streams = TWO_STREAMS if two_streams is None else two_streams
        self.gradient_stream = side_stream() if has_copies and graphs and two_streams else None
        if shard:
            self.wrapped_loss = shard_loss(loss)
        elif self.uses_ddp:
            self.wrapped_loss = data_parallel(loss, bfloat16_sums, for_graph=graphs)
        else:
            self.wrapped_loss = loss
        if micro_batches > 1:  # gradients add up in .grad
            for p in self.weights:
                p.grad = torch.zeros_like(p)
        self.recorded = {}  # graphs: "last", "earlier" and "update"
        # NCCL cannot close its links while a graph holds them. Where nobody calls close(), as in a
        # run that fails, the graphs go when this step is collected, or at exit.
        weakref.finalize(self, self.recorded.clear)

    def close(self):
        """Let go of the graphs and of DDP, which hold the process group. No step can follow."""
        self.recorded.clear()
        self.wrapped_loss = None

    def check_for_graphs(self):
        if self.device.type == "cuda":
            current = torch.cuda.current_device()
            if self.device.index not in (None, current):
                raise ValueError(f"for graphs, torch.cuda.set_device({self.device.index}) first")
        if len(self.optimizers) == 1:  # one_pass.py takes weights and averages in one order
            groups = self.optimizers[0].param_groups
            optimized = [id(p) for group in groups for p in group["params"]]
            if optimized != [id(p) for p in self.weights]:
                raise ValueError("for graphs, give AdamW the weights in the model's order")
            if len(self.averages) != 2:
                raise ValueError(f"for graphs, there are two averages, not {len(self.averages)}")

    def gradients(self, *inputs, is_first=True, is_last=True):
        """Forward and backward of a micro-batch. Returns the terms of the loss, {name: Term}.

        inputs: what the loss takes. is_first, is_last: of the micro-batches of a step. After the
        last one .grad is the gradient of the step, the mean over the ranks.
        """
        self.copies.refresh_if_changed()
        if self.use_graphs and not self.recorded:
            self.record_gradients(inputs)
        if is_first and self.micro_batches > 1:
            self.model.zero_grad(set_to_none=False)
        if self.use_graphs:
            return self.recorded["last" if is_last else "earlier"](*inputs)
        return self.forward_and_backward(*inputs, is_last=is_last)

    def forward_and_backward(self, *inputs, is_last):
        """Forward and backward. A single micro-batch replaces .grad; of several, each adds its
        share to .grad.

        With DDP the last backward of the last micro-batch makes .grad the mean over the ranks.
        (With shard every backward adds a mean.) For a single micro-batch, and without `old`,
        `writer` and `copies`, which save time and memory (products.py), it would be

            self.model.zero_grad()
            with torch.autocast(...):
                rest, terms = self.wrapped_loss(*inputs, backward_part=backward)
            backward(rest)

        The loss itself goes backward through its early terms, by backward_part.
        """
        old = self.take_gradients() if self.micro_batches == 1 else {}
        writer = GradientWriter(old, self.gradient_stream)

        def backward_part(part):
            with writer.backward():
                backward(part, share=1 / self.micro_batches)

        sync = nullcontext()
        if self.uses_ddp and not is_last:
            sync = self.wrapped_loss.no_sync()  # DDP then only adds to .grad and sends nothing
        with sync, self.copies.in_use(writer):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                rest, terms = self.wrapped_loss(*inputs, backward_part=backward_part)
            if self.uses_ddp and is_last:
                writer.leave_stream()  # DDP reads gradients while this backward makes them
            backward_part(rest)
        return terms

    def take_gradients(self):
        """Take .grad from all weights, so that the next gradient replaces it.

        Without DDP that frees its memory for the forward. With DDP the memory is part of a bucket
        and cannot be freed. Then this returns {id of a weight: its former .grad}, and the next
        gradient is written there, which saves a copy into the bucket.
        """
        old = {}
        if self.uses_ddp:
            old = {id(p): p.grad for p in self.weights if p.grad is not None}
        self.model.zero_grad()
        return old

    def record_gradients(self, inputs):
        """Graphs of forward_and_backward: for the last micro-batch, and for those before it.

        With DDP these differ: the earlier ones send nothing. Their graph needs no warm-up, since
        all its kernels have run in the other.
        """
        warm_ups = DDP_WARM_UPS if self.uses_ddp else 3
        clean = None
        if self.micro_batches == 1 and not self.uses_ddp:  # DDP's buckets hold the gradient
            clean = self.model.zero_grad
        last = Graph(
            partial(self.forward_and_backward, is_last=True), inputs, warm_ups, clean=clean
        )
        self.recorded["last"] = self.recorded["earlier"] = last
        if self.uses_ddp and self.micro_batches > 1:
            earlier = partial(self.forward_and_backward, is_last=False)
            self.recorded["earlier"] = Graph(earlier, inputs, warm_ups=0, twin=last)

    def gradient_norm(self):
        """The norm of the whole gradient, a tensor."""
        grads = [p.grad for p in self.weights if p.grad is not None]
        return whole(torch.nn.utils.get_total_norm(grads))

    def update(self):
        """A step of the optimizers and of the averages.

        With graphs the first call runs and is then recorded; later ones replay the recording. It
        holds Python's numbers as constants. So what changes from step to step must be a tensor,
        like the learning rate.
        """
        if "update" in self.recorded:
            self.recorded["update"]()
        else:
            self.update_weights()
            if self.use_graphs:  # its kernels are compiled now; recording runs nothing
                self.recorded["update"] = Graph(self.update_weights, warm_ups=0)
        if self.use_graphs:
            # PyTorch does not see writes by CUDA graphs and by one_pass.py. They are counted here,
            # so that other copies of these weights are refreshed.
            for written in (self.weights, *(average for average, _ in self.averages)):
                torch.autograd.graph.increment_version(written)
            self.copies.are_fresh()

    @torch.no_grad()
    def update_weights(self):
        """What update() does, and records: optimizers, averages and bfloat16 copies."""
        if self.use_graphs and len(self.optimizers) == 1:
            # One kernel a weight does all that stands below. To change the optimizer or an EMA,
            # delete these lines.
            one_pass.step(self.optimizers[0], self.averages, self.copies.copy_of)
            return
        for optimizer in self.optimizers:
            optimizer.step()
        for average, decay in self.averages:
            torch._foreach_lerp_(average, self.weights, 1 - decay)
        self.copies.refresh()
