"""products.GradientWriter: gradients of weights that are made on a second CUDA stream.

On a CPU a stream is put in its place that is as late as it may be: its work is done only when the
current stream waits for it. Whoever reads a gradient before finds NaN. On a GPU the bits are those
of one stream.
"""

import contextlib
import copy
import weakref

import pytest
import torch
from helpers import gpu, random_model, rel
from test_products import LIMIT
from torch import nn
from torch.utils.checkpoint import checkpoint

import products
from device import Graph, graph_stream
from loss import Term, TrainingLoss
from products import GradientWriter, RoundedCopies, product
from step import TrainingStep


class LateStream:
    def __init__(self):
        self.work = []
        self.has_joined = False  # as a stream must, before another one may wait for it
        self.has_waited = False  # for the current stream, since the last piece of work

    def wait_stream(self, other):
        """The current stream's work is done at once."""
        self.has_joined = True
        self.has_waited = True

    def add(self, work):
        assert self.has_waited, "it may begin before the current stream has made what it reads"
        self.has_waited = False
        self.work.append(work)

    def record_event(self):
        return len(self.work)


class CurrentStream:
    def __init__(self, late):
        self.late = late
        self.done = 0

    def wait_event(self, end):
        while self.done < end:
            with torch.autocast("cpu", enabled=False):
                self.late.work[self.done]()
            self.done += 1

    def wait_stream(self, late):
        assert late.has_joined
        self.wait_event(len(late.work))


@pytest.fixture
def late(monkeypatch):
    """A LateStream, as if a CUDA graph was being recorded."""
    late = LateStream()
    current = CurrentStream(late)
    is_late = False
    make = products.weight_gradients

    @contextlib.contextmanager
    def on(stream):
        nonlocal is_late
        before, is_late = is_late, stream is late
        yield
        is_late = before

    @torch.no_grad()
    def weight_gradients(factors, destinations):
        if not is_late:
            return make(factors, destinations)
        # It holds no factors: whoever frees one before its work is done would give its memory away.
        held = [[weakref.ref(t) for t in pair] for pair in factors]
        destinations = list(destinations)

        def work():
            found = [[t() for t in pair] for pair in held]
            assert all(t is not None for pair in found for t in pair), "a factor is freed"
            make(found, destinations)

        late.add(work)
        return [gradient for gradient, _ in destinations]

    monkeypatch.setattr(products, "weight_gradients", weight_gradients)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, torch.nan))
    return late


class Chain(nn.Module):
    """Linear layers, each with a residual around it, and their copies."""

    def __init__(self, depth=4, width=8, device="cpu"):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, device=device) for _ in range(depth))
        self.copies = RoundedCopies([self])

    def side_by_side(self):
        return [self.layers[2:4]]

    def forward(self, x, f=torch.tanh):
        for layer in self.layers:
            y, _ = product(x, None, [layer], layer.copies)
            x = x + f(y)
        return x.float().square().sum()

    def pair(self, x):
        layers = list(self.layers[2:4])
        y, _ = product(x, None, layers, products.stack_of(layers))
        return self(x) + y.float().square().sum()

    def of_weights(self):
        return sum(layer.weight.square().sum() for layer in self.layers)


def identity(y):
    return y


def along(net, x):
    """The gradient in x, by a backward of its own. The weights' gradients are as before."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(x), x)
    return g


class Nothing(torch.autograd.Function):
    """The identity, whose backward has no gradient to give."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, _):
        return None


def without_gradient(net, x):
    """A layer that autograd calls without a gradient of its result."""
    layer = net.layers[0]
    y, _ = product(x, None, [layer], layer.copies)
    return Nothing.apply(y).float().sum()


# What a step goes backward through, one after the other.
TERMS = {
    "two terms": [lambda net, x: net(x), lambda net, x: net(x + 1)],
    "a layer runs twice": [lambda net, x: net(x) + net(x + 1)],
    "and once more": [lambda net, x: net(x) + net(x + 1), lambda net, x: net(x + 2)],
    "and then twice": [lambda net, x: net(x), lambda net, x: net(x + 1) + net(x + 2)],
    "three times": [lambda net, x: net(x) + net(x + 1) + net(x + 2)],
    "first the weights alone": [lambda net, x: net.of_weights(), lambda net, x: net(x)],
    "then the weights alone": [lambda net, x: net(x), lambda net, x: net.of_weights()],
    "a residual, whose gradient goes two ways": [lambda net, x: net(x, identity)],
    "layers side by side": [lambda net, x: net.pair(x), lambda net, x: net.pair(x + 1)],
    "side by side, twice": [lambda net, x: net.pair(x) + net.pair(x + 1)],
    "a derivative in the forward": [
        lambda net, x: net(x),
        lambda net, x: net(x + along(net, x)),
    ],
    "the same, checkpointed": [
        lambda net, x: net(x),
        lambda net, x: checkpoint(lambda x: net(x + along(net, x)), x, use_reentrant=False),
    ],
    "a part without a gradient": [lambda net, x: net(x) + without_gradient(net, x)],
    "reads .grad": [
        lambda net, x: net(x),
        lambda net, x: net(x) * net.layers[0].weight.grad.norm().detach(),
    ],
}
REFUSED = {
    "the weights": [lambda net, x: net(x) + net.of_weights()],
    "the weights, early": [lambda net, x: net(x) + net.of_weights(), lambda net, x: net(x)],
    "the weights, twice": [lambda net, x: net(x) + net(x + 1) + net.of_weights()],
}


def gradients(terms, stream, kept, hook=None):
    """Of one step. kept: with memory that is given for each gradient."""
    torch.manual_seed(0)
    net = Chain()
    if hook:
        hook(net.layers[1].weight)
    places = {id(p): torch.full_like(p, torch.nan) for p in net.parameters() if kept and p.ndim > 1}
    writer = GradientWriter(places, stream)
    x = torch.randn(16, 8)
    with net.copies.in_use(writer):
        for term in terms:
            loss = term(net, x)
            with writer.backward():
                loss.backward()
    return torch.stack([layer.weight.grad for layer in net.layers])


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("case", TERMS)
def test_a_late_stream(case, kept, late):
    wanted = gradients(TERMS[case], None, kept)
    found = gradients(TERMS[case], late, kept)
    assert late.work
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_a_late_stream_refuses(case, kept, late):
    """A part of a gradient that no product made: autograd adds it before the rest is there."""
    with pytest.raises(RuntimeError, match="TWO_STREAMS"):
        gradients(REFUSED[case], late, kept)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_late_stream_and_hooks(kind, late):
    """A hook sees a gradient that is complete."""
    seen = []

    def keep(t):
        seen.append((t if t.grad is None else t.grad).clone())

    for stream in (None, late):
        gradients(TERMS["two terms"], stream, False, lambda weight: getattr(weight, kind)(keep))
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_a_late_stream_and_a_hook_of_one_layer_of_a_group(late):
    seen = []
    for stream in (None, late):
        torch.manual_seed(0)
        net = Chain()
        net.layers[3].weight.register_hook(lambda g: seen.append(g.clone()))
        x = torch.randn(16, 8)
        writer = GradientWriter(stream=stream)
        with net.copies.in_use(writer):
            layers = list(net.layers[2:])
            y, _ = product(x, None, layers, products.stack_of(layers))
            loss = y.float().square().sum()
            with writer.backward():
                loss.backward()
    assert torch.equal(*seen)


def send(_, bucket):
    """A communication hook: what it reads must be there."""
    assert bucket.buffer().isfinite().all()
    future = torch.futures.Future()
    future.set_result(bucket.buffer().mul_(4))
    return future


def data_parallel(module, *_, **__):
    options = dict(gradient_as_bucket_view=True, bucket_cap_mb=0.02)
    parallel = torch.nn.parallel.DistributedDataParallel(module, **options)
    parallel.register_comm_hook(None, send)
    return parallel


class Penalized(TrainingLoss):
    """TVM, and a penalty on the weights as a term of its own, early or not."""

    early = True

    def terms(self, x0, y, x1, t, *drawn):
        squares = [p.square().sum() for p in self.model.parameters() if p.requires_grad]
        penalty = torch.stack(squares).sum().expand(len(x0))
        yield Term("penalty", penalty, penalty, t, self.early)
        yield from super().terms(x0, y, x1, t, *drawn)


@pytest.mark.parametrize("kind", [TrainingLoss, Penalized])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("alone", [True, False])
def test_a_late_stream_in_a_step(kind, micro_batches, alone, late, monkeypatch, group_of_one):
    """Whole steps: the first term's backward, micro-batches, and DDP, which sends the last one."""
    monkeypatch.setattr("step.side_stream", lambda: late)
    monkeypatch.setattr("step.data_parallel", data_parallel)
    net = random_model(torch.float32, hidden_size=32, num_heads=2, depth=2)
    loss = kind(net, copy.deepcopy(net).requires_grad_(False), guidance=dict(w=2.0))
    x0 = torch.randn(4, 2, 4, 4)
    inputs = (x0, torch.arange(4) % 3, *loss.draw(x0, 0))

    def gradients(two_streams):
        net.zero_grad()
        options = dict(graphs=True, bfloat16=True, alone=alone, two_streams=two_streams)
        step = TrainingStep(loss, [], [], torch.device("cpu"), micro_batches, **options)
        step.use_graphs = False  # a CPU has none
        for recording in (False, False, False, True):  # DDP makes its buckets in the first ones
            monkeypatch.setattr(
                torch.cuda, "is_current_stream_capturing", lambda now=recording: now
            )
            if recording and micro_batches == 1:
                for p in step.weights:
                    p.grad.fill_(torch.nan)
            for i in range(micro_batches):
                step.gradients(*inputs, is_first=i == 0, is_last=i == micro_batches - 1)
        return [p.grad.clone() for p in step.weights]

    wanted = gradients(False)
    assert not late.work
    found = gradients(True)
    assert late.work
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    if kind is Penalized and alone:
        # Now it goes backward together with the last term of TVM.
        monkeypatch.setattr(Penalized, "early", False)
        with pytest.raises(RuntimeError, match="yield a penalty as an early term of its own"):
            gradients(True)


# ---- GPUs ----------------------------------------------------------------------------------------


def two_backwards(chain, stream):
    """Two backwards of a chain, as a step has them."""
    chain.zero_grad()
    width = chain.layers[0].weight.size(1)
    x = torch.linspace(-1, 1, 4096 * width, device="cuda").view(4096, width).bfloat16()
    writer = GradientWriter(stream=stream)
    with chain.copies.in_use(writer):
        for factor in (1, -3):
            loss = factor / x.numel() * chain(x, torch.relu)
            with writer.backward():
                loss.backward()


def gradients_of_graph(chain, stream):
    """Of three replays, between which the gradients are lost."""
    graph = Graph(lambda: two_backwards(chain, stream), clean=chain.zero_grad)
    found = []
    for _ in range(3):
        for p in chain.parameters():
            p.grad.fill_(torch.nan)
        graph()
        found.append([p.grad.clone() for p in chain.parameters()])
    return found


def check_stream(chain):
    two_backwards(chain, None)
    wanted = [p.grad.clone() for p in chain.parameters()]
    for found in gradients_of_graph(chain, torch.cuda.Stream()):
        assert all(map(torch.equal, found, wanted))


@gpu
@pytest.mark.parametrize("width", [512, 1536])
def test_gpu_stream(width):
    """In a graph, where weights' gradients are made on another stream: the same bits."""
    torch.manual_seed(0)
    check_stream(Chain(12, width, "cuda"))


@gpu
def test_gpu_stream_with_layers_that_run_twice():
    """Their products add on the stream, so the same bits as where that is the graph's own stream;
    without a graph autograd adds, and rounds in another way."""
    torch.manual_seed(0)
    chain = Chain(4, 1536, "cuda")
    chain.layers.extend(list(chain.layers))
    two_backwards(chain, None)
    exact = [p.grad.clone() for p in chain.parameters()]
    wanted, *_ = gradients_of_graph(chain, graph_stream())
    for found in gradients_of_graph(chain, torch.cuda.Stream()):
        assert all(map(torch.equal, found, wanted))
        for gradient, g in zip(found, exact, strict=True):
            assert rel(gradient, g) < LIMIT["cuda"]


@gpu
def test_gpu_stream_with_hooks():
    """A hook sees a complete gradient: the same bits."""
    torch.manual_seed(0)
    chain = Chain(4, 1536, "cuda")
    seen = torch.zeros(2, 1536, 1536, device="cuda")

    def keep(gradient):
        seen[0].copy_(gradient)

    def keep_sum(weight):
        seen[1].copy_(weight.grad)

    chain.layers[1].weight.register_hook(keep)
    chain.layers[2].weight.register_post_accumulate_grad_hook(keep_sum)
    two_backwards(chain, None)
    wanted = seen.clone()
    check_stream(chain)
    assert torch.equal(seen, wanted)


@gpu
def test_gpu_stream_refuses_other_uses():
    """A part of a weight's gradient that no product made, which autograd adds too early."""
    layer = nn.Linear(64, 64).cuda()
    copies = RoundedCopies([layer])
    x = torch.randn(32, 64, device="cuda").bfloat16()
    stream = torch.cuda.Stream()

    def step():
        layer.zero_grad()
        writer = GradientWriter(stream=stream)
        with copies.in_use(writer):
            y, _ = product(x, None, [layer], layer.copies)
            loss = y.float().sum() + layer.weight.square().sum()
            with writer.backward():
                loss.backward()

    with pytest.raises(RuntimeError, match="TWO_STREAMS"):
        Graph(step)


@gpu
def test_gpu_stream_and_ddp(monkeypatch):
    """DDP's hook gets a bucket whose gradients are complete. Here it multiplies them by 4. If it
    ran too early, the result would not be 4 times the gradient of one stream without DDP."""
    gpu_0 = torch.device("cuda", 0)

    def four_times(_, bucket):
        future = torch.futures.Future(devices=[gpu_0])
        future.set_result(bucket.buffer().mul_(4))
        return future

    monkeypatch.setattr("device.nccl_mean", four_times)
    net = random_model(torch.float32, hidden_size=1024, num_heads=16, depth=3).to(gpu_0)
    loss = TrainingLoss(net, copy.deepcopy(net).requires_grad_(False), guidance=dict(w=2.0))
    x0 = torch.randn(64, 2, 4, 4, device=gpu_0)
    inputs = (x0, torch.arange(64, device=gpu_0) % 3, *loss.draw(x0, 0))

    def gradients(alone):
        options = dict(graphs=True, bfloat16=True, alone=alone, two_streams=not alone)
        step = TrainingStep(loss, [], [], gpu_0, **options)
        for _ in range(2):
            step.gradients(*inputs)
        found = [p.grad.clone() for p in step.weights]
        step.close()
        net.zero_grad()
        return found

    alone = gradients(True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        ranks = gradients(False)
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(alone, ranks, strict=True):
        assert torch.equal(4 * a, b)
