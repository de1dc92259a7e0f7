"""shard.py, and train.py with --shard=True: two ranks that keep half of each weight."""

import copy
import os

import pytest
import torch
from helpers import (
    HERE,
    SMALL,
    close,
    gpu,
    log_lines,
    logged_losses,
    make_checkpoint,
    random_model,
    rel,
    run_script,
    said,
    state,
    torchrun,
    weights,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

import checkpoint as ckpt
import shard
from dual import Dual, Residual, value_of
from loss import TrainingLoss, backward
from model import Block, DiT, DiTConfig
from timing import RandomStep

RUN = (*SMALL, "--depth=2", "--device=cpu")


def train(*arguments):
    return run_script("train.py", *RUN, *arguments)


def same_run(one, other, tolerance=1e-5):
    """Losses to 1e-6; weights, averages and first moments to a relative error of `tolerance`."""
    pairs = list(zip(logged_losses(one), logged_losses(other), strict=True))
    assert max(abs(a / b - 1) for a, b in pairs) < 1e-6
    a, b = state(one), state(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape
        if not name.endswith("exp_avg_sq"):
            assert rel(b[name], a[name]) < tolerance, name


# ---- train.py ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ("--micro_batch=2",),
        ("--grad_clip=0.5", "--checkpoint_blocks=2"),
        ("--objective=meanflow", "--micro_batch=2"),
    ],
)
def test_two_ranks_learn_what_one_process_learns(folder, two_ranks, flags):
    make_checkpoint("start.safetensors", depth=2)
    flags = (*flags, "--steps=5", "--init_from=start.safetensors", "--eps=1e-4")
    assert train("--name=one", *flags) is None
    assert two_ranks("train.py", *RUN, *flags, "--name=two", "--shard=True") == [0, 0], said()
    same_run("one", "two")
    one, two = (log_lines(name) for name in ("one", "two"))
    norms = [[line["grad_norm"] for line in lines if "loss" in line] for lines in (one, two)]
    assert all(abs(a / b - 1) < 1e-5 for a, b in zip(*norms, strict=True))
    if "--grad_clip=0.5" in flags:
        assert min(norms[0]) > 0.5
    # The network that is sampled, and scored, is whole.
    scores = [[line["frechet_pixels"] for line in lines if "nfe" in line] for lines in (one, two)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_first_weights_and_resuming(folder, two_ranks):
    """The first weights are those of the seed. A state has one format: two ranks that divide the
    weights go on from one process, and one process from them."""
    flags = ("--steps=3", "--eps=1e-4")
    assert train("--name=whole", "--steps=6", "--eps=1e-4") is None
    assert two_ranks("train.py", *RUN, *flags, "--name=a", "--shard=True") == [0, 0], said()
    assert train("--name=b", *flags) is None
    same_run("a", "b")
    flags = ("--steps=6", "--eps=1e-4")
    assert train("--name=a", *flags) is None
    assert two_ranks("train.py", *RUN, *flags, "--name=b", "--shard=True") == [0, 0], said()
    assert "from step 3" in said()
    same_run("whole", "a")
    same_run("whole", "b")
    assert run_script("sample.py", "out/b/ckpt.safetensors") is None
    wrong = (*flags, "--hidden_size=64", "--change=hidden_size", "--name=b", "--shard=True")
    assert two_ranks("train.py", *RUN, *wrong) == [1, 1]
    assert "is of another network" in said()


def test_weights_that_are_not_finite(folder, two_ranks):
    """All ranks skip a step together, and the last weights are looked at on all of them."""
    flags = ("--steps=8", "--lr=1e30", "--score_images=2", "--shard=True")
    assert two_ranks("train.py", *RUN, *flags) == [0, 0], said()
    assert all(value.isfinite().all() for value in state("digits").values())
    assert log_lines("digits")[-1]["step"] == 8


WITHOUT_ROOM = """
import shard

def to_empty(self, device):
    raise torch.OutOfMemoryError("CUDA out of memory")

if rank == 1:
    shard.DiT.to_empty = to_empty
"""


def test_a_rank_without_room_for_a_whole_network(folder, two_ranks):
    """The other one does not wait for it: both go on without pictures and without scores."""
    with open(os.path.join(HERE, "train.py")) as f:
        script = f.read()
    old = "\n# ---- the loop ---"
    assert script.count(old) == 1
    (folder / "train.py").write_text(script.replace(old, WITHOUT_ROOM + old))
    flags = ("--steps=3", "--sample_every=1", "--shard=True")
    assert two_ranks(folder / "train.py", *RUN, *flags) == [0, 0], said()
    failures = [line for line in said().splitlines() if "could not write" in line]
    assert [line.split("train.py: ")[1] for line in failures] == [
        f"could not write {what}, and go on without it: "
        "MemoryError: a rank has no memory for a whole network"
        for what in ("samples_1.png", "the scores")
    ]
    assert list(ckpt.states("out/digits")) == [3]
    assert not any("nfe" in line for line in log_lines("digits"))
    assert os.path.exists("out/digits/curve.png")
    assert not os.path.exists("out/digits/samples_3.png")


def test_train_refuses_shard_alone(folder):
    assert "not started by torchrun" in train("--shard=True")


# ---- shard.py, on one rank -----------------------------------------------------------------------


def loss_of(net, target):
    return TrainingLoss(net, target, guidance=dict(w=2.0))


def gradients(loss, parallel, dtype=torch.float32):
    """{name: gradient} of one step, whole."""
    x0 = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        value, _ = parallel(x0, torch.arange(8) % 3, *loss.draw(x0, 0), backward_part=backward)
    backward(value)
    return {name: shard.whole(p.grad) for name, p in loss.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["eager", "compiled", "checkpointed", "bfloat16"])
def test_gradients(group_of_one, kind):
    """Those of the same networks undivided."""
    net = random_model(torch.float32, depth=3)
    target = random_model(torch.float32, seed=1, depth=3).requires_grad_(False)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    loss = loss_of(net, target)
    divided = copy.deepcopy(loss)
    device = torch.device("cpu")
    shard.shard_weights(divided.children(), device, bfloat16=kind == "bfloat16")
    assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in divided.parameters())
    if kind == "compiled":
        torch._dynamo.reset()
        for one in divided.children():
            one.run_block = torch.compile(Block.forward, fullgraph=True, backend="aot_eager")
    if kind == "checkpointed":
        divided.model.checkpoint_blocks = 3
    parallel = shard.shard_loss(divided)
    wanted = gradients(loss, loss, dtype)
    for _ in range(2):  # what the first has compiled or left behind must do for the second
        parallel.zero_grad()
        found = gradients(divided, parallel, dtype)
        for name, gradient in wanted.items():
            assert found[name].dtype == torch.float32
            close(found[name], gradient, 0.02 if kind == "bfloat16" else 2e-5)


def test_blocks_are_freed_while_backward_runs(group_of_one):
    """FSDP2 finds the tensors in a block's Duals: a block is whole only while it runs, and its
    gradient is divided before the block below it goes backward."""
    net = random_model(torch.float32, depth=3)
    loss = loss_of(net, copy.deepcopy(net).requires_grad_(False))
    shard.shard_weights(loss.children(), torch.device("cpu"))
    parallel = shard.shard_loss(loss)
    events = []

    def is_divided(block):
        weight = block.attn.qkv.weight
        return isinstance(weight, DTensor), isinstance(weight, DTensor) and weight.grad is not None

    def watch(block, arguments, result):
        events.append([is_divided(other)[0] for other in net.blocks])
        above = net.blocks[2] if block is net.blocks[1] else net.blocks[1]
        if value_of(result).requires_grad:
            value_of(result).register_hook(lambda gradient: events.append(is_divided(above)))

    for block in (net.blocks[0], net.blocks[1]):
        block.register_forward_hook(watch)
    gradients(loss, parallel)
    one_pass = [[True, True, True], [True, True, True], (True, True), (True, True)]
    assert events == 2 * one_pass
    # This is how torch 2.11 looks for them.
    x = torch.zeros(3)
    residual = Residual(Dual(x, x), None, Dual(x, x), Dual(x, x))
    assert len(tree_leaves(((residual, Dual(x, x)), {}))) == 8


def test_whole_and_parts(group_of_one):
    net = random_model(torch.float32)
    divided = copy.deepcopy(net)
    shard.shard_weights([divided], torch.device("cpu"))
    gathered = shard.gather(divided.state_dict())
    again = shard.whole_network(divided)
    mesh = divided.pos_embed.device_mesh
    assert shard.whole_network(net) is net
    for name, t in net.state_dict().items():
        for other in (gathered[name], again.state_dict()[name]):
            assert not isinstance(other, DTensor)
            assert torch.equal(other, t)
        part = shard.own_part(t, mesh)
        assert torch.equal(part.full_tensor(), t)
        assert part.to_local().data_ptr() != t.data_ptr()
    assert shard.own_part(torch.tensor(3.0), mesh).item() == 3


def test_training_step(group_of_one):
    """The step that bench.py times begins with empty weights and trains all of them."""
    config = DiTConfig.named("tiny", input_size=4)
    step = RandomStep(config, batch=4, compiled=False, shard=True, device="cpu")
    before = [shard.whole(p).clone() for p in step.step.weights]
    for n in range(2):
        step(n)
    for old, p in zip(before, step.step.weights, strict=True):
        assert isinstance(p, DTensor)
        new = shard.whole(p)
        assert new.isfinite().all()
        assert not torch.equal(new, old)


def test_size_of_the_largest_network():
    """As docs/performance.md has it."""
    with torch.device("meta"):
        net = DiT(DiTConfig.named("G/2", input_size=32, in_channels=4, num_classes=1000))
    assert net.config.hidden_size // net.config.num_heads == 64
    assert sum(p.numel() for p in net.parameters()) == 2_599_640_464


# ---- GPUs ----------------------------------------------------------------------------------------


def largest_difference(one, other):
    """The largest relative difference of two runs' losses, of 15 steps. That of their weights is
    printed as well."""
    pairs = list(zip(logged_losses(one), logged_losses(other), strict=True))
    assert len(pairs) == 15
    largest = max(abs(a / b - 1) for a, b in pairs)
    a, b = weights(state(one), "model"), weights(state(other), "model")
    print("losses", largest, "weights", max(rel(b[name], a[name]) for name in a))
    return largest


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_shard(folder, compiled):
    """On all GPUs that are there, up to two, in bfloat16: the losses of one process, nearly."""
    ranks = min(2, torch.cuda.device_count())
    flags = ("--steps=15", "--micro_batch=2", f"--compile={compiled}")
    assert run_script("train.py", *SMALL, *flags, "--name=one") is None
    torchrun("train.py", *SMALL, *flags, "--name=shard", "--shard=True", ranks=ranks)
    assert largest_difference("one", "shard") < 1e-2


@gpu
@pytest.mark.parametrize("flags", [("--micro_batch=2",), ("--grad_clip=0.5",)])
def test_gpu_shard_in_a_graph(folder, flags):
    """A step that is a CUDA graph learns what it learns without one."""
    ranks = min(2, torch.cuda.device_count())
    flags = (*flags, "--steps=15", "--shard=True")
    torchrun("train.py", *SMALL, *flags, "--name=graph", ranks=ranks)
    torchrun("train.py", *SMALL, *flags, "--name=eager", "--graph=False", ranks=ranks)
    assert largest_difference("graph", "eager") < 1e-3
