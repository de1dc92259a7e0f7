"""products.py beside float64, and a training step that uses it beside autocast's."""

import copy

import pytest
import torch
from helpers import gpu, random_model, rel
from torch import nn

import products
from dual import Dual, linear, linear_side_by_side
from loss import TrainingLoss
from model import Block, block_vectors
from products import GradientWriter, RoundedCopies, product, stack_of
from step import TrainingStep

# Relative, of a weight's gradient: a sum in float32, on a GPU in tensor cores, whose adders drop a
# few bits (9.1e-6 for 8,192 rows on an H200, at any shape). A gradient in bfloat16 has 1e-3.
LIMIT = {"cpu": 1e-6, "cuda": 2e-5}
# With few rows the gradients of value and tangent are one product, with more they are two.
ROWS = (5, products.FEW_ROWS + 3)
CASES = [
    "value",
    "float32",
    "both",
    "value's gradient alone",
    "tangent's gradient alone",
    "constant bias",
]


def layers_of(count, device):
    layers = nn.ModuleList(nn.Linear(16, 8) for _ in range(count)).to(device)
    for p in layers.parameters():
        nn.init.normal_(p)
    return list(layers)


def check_product(case, rows, count, device):
    """Values, tangents and all gradients. What is not float32 is exact in bfloat16."""
    torch.manual_seed(0)
    layers = layers_of(count, device)
    weight = torch.cat([layer.weight for layer in layers]).detach().bfloat16()
    bias = torch.cat([layer.bias for layer in layers]).detach().bfloat16()
    x, dx = torch.randn(2, 1, rows, 16, device=device).bfloat16()
    gy, gdy = torch.randn(2, 1, rows, 8 * count, device=device).bfloat16()
    if case == "value":
        dx = None
    if case == "float32":  # it is rounded
        x, dx = x.float(), dx.float()

    inputs = [None if t is None else t.clone().requires_grad_() for t in (x, dx)]
    y, dy = product(*inputs, layers, (weight, bias), bias_gradient=case != "constant bias")
    wide = [None if t is None else t.double().requires_grad_() for t in (x, dx, weight, bias)]
    wide_x, wide_dx, wide_weight, wide_bias = wide
    wide_y = wide_x @ wide_weight.T + wide_bias
    assert rel(y, wide_y) < 2**-8
    found, wanted = [y], [wide_y]
    gradients = [gy]
    if case == "value":
        assert dy is None
    else:
        wide_dy = wide_dx @ wide_weight.T
        assert rel(dy, wide_dy) < 2**-8
        found.append(dy)
        wanted.append(wide_dy)
        gradients.append(gdy)
    if case == "value's gradient alone":
        found, wanted, gradients = found[:1], wanted[:1], gradients[:1]
    if case == "tangent's gradient alone":
        found, wanted, gradients = found[1:], wanted[1:], gradients[1:]
    torch.autograd.backward(found, gradients)
    torch.autograd.backward(wanted, [g.double() for g in gradients])

    for a, b in zip(inputs, (wide_x, wide_dx), strict=True):
        if a is not None and b.grad is not None:
            assert rel(a.grad, b.grad) < 2**-8
    for layer, rows_of_it in zip(layers, wide_weight.grad.chunk(count), strict=True):
        assert layer.weight.grad.dtype == torch.float32
        assert rel(layer.weight.grad, rows_of_it) < LIMIT[device]
    if case in ("constant bias", "tangent's gradient alone"):
        assert all(layer.bias.grad is None for layer in layers)
        return
    for layer, rows_of_it in zip(layers, wide_bias.grad.chunk(count), strict=True):
        assert rel(layer.bias.grad, rows_of_it) < 1e-6


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES)
def test_product(case, rows, count):
    check_product(case, rows, count, "cpu")


@gpu
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES)
def test_gpu_product(case, rows):
    check_product(case, rows, 3, "cuda")


def check_sum_with_grad(device, count, rows, side_by_side):
    """A second backward adds to .grad in place, and leaves the .grad of frozen weights alone."""
    torch.manual_seed(0)
    layers = layers_of(count, device)
    frozen = layers[-1].weight.requires_grad_(count == 1)
    weight = torch.cat([layer.weight for layer in layers]).detach().bfloat16()
    bias = torch.cat([layer.bias for layer in layers]).detach().bfloat16()
    x, dx = torch.randn(2, rows, 16, device=device).bfloat16()
    gy, gdy = torch.randn(2, rows, 8 * count, device=device).bfloat16()
    if not side_by_side:
        dx, gdy = dx.clone(), gdy.clone()
    wanted = gy.double().T @ x.double() + gdy.double().T @ dx.double()
    for layer in layers:
        layer.weight.grad = torch.ones_like(layer.weight)
    places = [layer.weight.grad.data_ptr() for layer in layers]

    writer = GradientWriter()
    for layer in layers:
        layer.gradient_writer = writer
    results = product(x, dx, layers, (weight, bias))
    with writer.backward():
        torch.autograd.backward(results, [gy, gdy])
    assert [layer.weight.grad.data_ptr() for layer in layers] == places
    for layer, rows_of_it in zip(layers, wanted.chunk(count), strict=True):
        if layer.weight.requires_grad:
            assert rel(layer.weight.grad, 1 + rows_of_it) < LIMIT[device]
    assert frozen.requires_grad or torch.equal(frozen.grad, torch.ones_like(frozen))


def test_grad_stays_in_other_backwards():
    """Unless it is asked, a product leaves .grad to autograd; and hooks see the gradient alone."""
    (layer,) = layers_of(1, "cpu")
    copies = layer.weight.detach().bfloat16(), layer.bias.detach().bfloat16()
    x = torch.randn(4, 16, requires_grad=True)
    layer.weight.grad = torch.ones_like(layer.weight)
    y, _ = product(x, None, [layer], copies)
    torch.autograd.grad(y.sum(), x)
    assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))
    layer.gradient_writer = GradientWriter()
    y, _ = product(x, None, [layer], copies)
    torch.autograd.grad(y.sum(), x)  # outside of writer.backward()
    assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))
    seen = []
    layer.weight.register_hook(seen.append)
    y, _ = product(x, None, [layer], copies)
    with layer.gradient_writer.backward():
        y.sum().backward()
    assert torch.equal(layer.weight.grad, seen[0] + 1)


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("count", [1, 3])
def test_sum_with_grad(count, rows, side_by_side):
    check_sum_with_grad("cpu", count, rows, side_by_side)


@gpu
@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_gpu_sum_with_grad(rows, side_by_side):
    check_sum_with_grad("cuda", 3, rows, side_by_side)


def check_places(device):
    """A first gradient is written into the tensor that is given for it, whatever that held; in a
    layer that runs twice, only one of the two."""
    torch.manual_seed(0)
    once, twice = layers_of(2, device)
    x = torch.randn(2, 5, 16, device=device).bfloat16()
    exact = x.double().sum(1)[:, None].expand(2, 8, 16)  # of the sum of all results
    net = nn.ModuleList([once, twice])
    copies = RoundedCopies([net])
    places = {id(layer.weight): torch.full_like(layer.weight, torch.nan) for layer in net}
    held = [t.data_ptr() for t in places.values()]
    writer = GradientWriter(places)
    with copies.in_use(writer):
        for total in (1, 2):
            first, _ = product(x[0], None, [once], once.copies)
            second, _ = product(x[0], None, [twice], twice.copies)
            third, _ = product(x[1], None, [twice], twice.copies)
            with writer.backward():
                (first.sum() + second.sum() + third.sum()).backward()
            assert not places
            assert rel(once.weight.grad, total * exact[0]) < LIMIT[device]
            assert rel(twice.weight.grad, total * exact.sum(0)) < LIMIT[device]
            assert once.weight.grad.data_ptr() == held[0]


def test_places():
    check_places("cpu")


@gpu
def test_gpu_places():
    check_places("cuda")


def test_gradients_stay_in_buckets(group_of_one, monkeypatch):
    """With DDP a step's gradient replaces that of the step before, in the memory of DDP's buckets.
    Products write it there.

    It is the same as without DDP. A layer that is not computed by product() is no exception.
    """
    float32_product = products.float32_product
    written = set()  # addresses to which products write a first gradient

    def noted(a, b, out=None, adds=False):
        if out is not None and not adds:
            written.add(out.data_ptr())
        return float32_product(a, b, out, adds)

    monkeypatch.setattr(products, "float32_product", noted)
    net, target = two_networks()
    net.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)  # so it is called
    twin = copy.deepcopy(net)
    cpu = torch.device("cpu")
    loss = TrainingLoss(net, target, guidance=dict(w=2.0))
    step = TrainingStep(loss, [], [], cpu, bfloat16=True)
    assert step.uses_ddp
    plain_loss = TrainingLoss(twin, target, guidance=dict(w=2.0))
    plain = TrainingStep(plain_loss, [], [], cpu, bfloat16=True, alone=True)
    assert not plain.uses_ddp
    held = None
    for n in range(4):
        written.clear()
        x0 = torch.randn(4, 2, 4, 4)
        inputs = (x0, torch.arange(4) % 3, *loss.draw(x0, n))
        step.gradients(*inputs)
        plain.gradients(*inputs)
        for p, q in zip(step.weights, plain.weights, strict=True):
            assert torch.equal(p.grad, q.grad)
        if n == 1:  # DDP arranges its buckets anew after the first step
            held = [p.grad.data_ptr() for p in step.weights]
    assert [p.grad.data_ptr() for p in step.weights] == held
    layers = [layer for layer in linear_layers(net) if not layer._forward_hooks]
    assert written == {layer.weight.grad.data_ptr() for layer in layers}


def test_matrices_side_by_side():
    """A value and its tangent are one matrix only where they lie so in memory."""
    both = torch.randn(3, 4, 5)
    assert products.is_next(both[1], both[0])
    assert torch.equal(products.twice_as_long(both[0]), both[:2].reshape(8, 5))
    assert not products.is_next(both[2], both[0])
    assert not products.is_next(both[0], both[1])
    assert not products.is_next(both[1].clone(), both[0])
    assert not products.is_next(both[1], both[0][:2])
    assert not products.is_next(both[1].T, both[0].T)


def two_networks():
    """(network, target) with the same random weights."""
    net = random_model(torch.float32)
    return net, copy.deepcopy(net).requires_grad_(False)


def linear_layers(*nets):
    return [layer for net in nets for layer in net.modules() if type(layer) is nn.Linear]


def test_copies():
    """They are the rounded weights, in use within the context alone, and made anew when needed."""
    nets = two_networks()
    copies = RoundedCopies(nets)
    layers = linear_layers(*nets)
    assert len(copies.copies) == 2 * len(layers)

    def check():
        copies.refresh_if_changed()
        with copies.in_use():
            for layer in layers:
                weight, bias = layer.copies
                assert torch.equal(weight, layer.weight.bfloat16())
                assert torch.equal(bias, layer.bias.bfloat16())
            (group,) = nets[0].side_by_side()
            assert len(group) == 2
            weight, bias = stack_of(group)
            assert torch.equal(weight, torch.cat([layer.weight for layer in group]).bfloat16())
            assert torch.equal(bias, torch.cat([layer.bias for layer in group]).bfloat16())
            assert stack_of(group[::-1]) is None
            assert stack_of(group[:1]) is None
        assert stack_of(group) is None

    check()
    versions = copies.versions
    copies.refresh_if_changed()
    assert copies.versions is versions  # nothing was done
    nets[0].load_state_dict({name: 2 * t for name, t in nets[0].state_dict().items()})
    check()
    with torch.no_grad():
        layers[0].bias.add_(1)
    check()
    with pytest.raises(ZeroDivisionError), copies.in_use():
        raise ZeroDivisionError
    names = ("copies", "stack", "gradient_writer")
    assert not any(hasattr(layer, name) for layer in layers for name in names)


class OtherLinear(nn.Linear):
    pass


def test_layers_without_copies():
    """Those that autocast must compute: without bias, float64, of a subclass, with another's
    weight or bias."""
    net, _ = two_networks()
    twins = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    twins[1].bias = twins[0].bias
    copies = RoundedCopies([twins, nn.Linear(3, 3).double()])
    assert len(copies.copies) == len(copies.copy_of) == 2
    first, second = net.blocks
    first.mlp.fc1 = OtherLinear(32, 128)
    first.mlp.fc2.bias = None
    second.attn.proj.weight = first.attn.proj.weight
    second.adaLN_modulation[1] = OtherLinear(32, 6 * 32)
    copies = RoundedCopies([net])
    with copies.in_use():
        for layer in (first.mlp.fc1, first.mlp.fc2, second.attn.proj, second.adaLN_modulation[1]):
            assert not hasattr(layer, "copies")
        for layer in (first.attn.proj, first.adaLN_modulation[1], second.mlp.fc1):
            assert hasattr(layer, "copies")
        assert not hasattr(first.adaLN_modulation[1], "stack")
    one_for_all = copy.deepcopy(net)
    for block in one_for_all.blocks:
        block.adaLN_modulation = one_for_all.blocks[0].adaLN_modulation
    RoundedCopies([one_for_all, net])


def test_where_copies_are_used():
    """Where autocast computes the layer, and not in transforms, hooks or outside of autocast."""
    layer = nn.Linear(16, 8)
    nn.init.normal_(layer.weight)
    x = torch.randn(3, 16)
    copies = RoundedCopies([layer])
    with torch.no_grad():
        for copied in copies.copies:
            copied.zero_()
    autocast = torch.autocast("cpu", torch.bfloat16)
    with copies.in_use():
        assert torch.equal(linear(layer, x), layer(x))
        with autocast:
            assert not linear(layer, x).any()
            _, tangent = torch.func.jvp(lambda x: linear(layer, x), (x,), (x,))
            assert tangent.any()
            hook = layer.register_forward_hook(lambda *_: None)
            assert linear(layer, x).any()
            hook.remove()
            other = dict(weight=torch.ones(8, 16), bias=torch.zeros(8))
            found = torch.func.functional_call(layer, other, x)
            assert found.any()
            with_other = nn.Module()
            with_other.forward = lambda x: linear(layer, x)
            with_other.layer = layer
            other = {f"layer.{name}": t for name, t in other.items()}
            assert torch.equal(torch.func.functional_call(with_other, other, x), found)
            weight, layer.weight = layer.weight, nn.Parameter(torch.ones(8, 16))
            assert linear(layer, x).any()
            layer.weight = weight
            assert not linear(layer, x).any()
            bias, layer.bias = layer.bias, nn.Parameter(torch.ones(8))
            assert linear(layer, x).any()
            layer.bias = bias
    with autocast:
        assert linear(layer, x).any()


def test_copies_and_inference_mode():
    """Copies that are made in inference mode can be refreshed outside of it. A network that is made
    in it has copies, too."""
    with torch.inference_mode():
        inner = nn.Linear(8, 4)
    outer = nn.Linear(8, 4)
    for layer in (inner, outer):
        with torch.inference_mode():
            copies = RoundedCopies([layer])
            assert torch.equal(copies.copies[0], layer.weight.bfloat16())
    with torch.no_grad():
        outer.weight.fill_(3)
    copies.refresh_if_changed()
    assert (copies.copies[0] == 3).all()
    RoundedCopies([inner]).refresh_if_changed()


def test_a_forward_of_the_layers_own():
    """A layer whose forward was replaced is called."""
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: 7 * x
    x, dx = torch.randn(2, 3, 8)
    with RoundedCopies([layer]).in_use(), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(linear(layer, x), 7 * x)
        found = linear(layer, Dual(x, dx))
    assert torch.equal(found.value, 7 * x) and torch.equal(found.tangent, 7 * dx)


def test_a_hook_on_one_layer_of_a_group():
    """Its layers are then computed one by one, and this one is called."""
    net, _ = two_networks()
    (group,) = net.side_by_side()
    c = torch.randn(3, 32)
    copies = RoundedCopies([net])
    with copies.in_use(), torch.autocast("cpu", torch.bfloat16):
        wanted = linear_side_by_side(group, c, stack_of(group))
        calls = []
        group[1].register_forward_hook(lambda *_: calls.append(1))
        found = linear_side_by_side(group, c, stack_of(group))
    assert calls
    assert torch.equal(found, wanted)


def test_what_graphs_refuse(monkeypatch):
    """AdamW's weights in another order, other than two averages, and another device."""
    net, target = two_networks()
    weights = [p for p in net.parameters() if p.requires_grad]
    averages = [(target, 0.9), (copy.deepcopy(target), 0.99)]
    loss = TrainingLoss(net, target)
    options = dict(device=torch.device("cpu"), graphs=True)
    TrainingStep(loss, [torch.optim.AdamW(weights)], averages, **options)
    with pytest.raises(ValueError, match="the model's order"):
        TrainingStep(loss, [torch.optim.AdamW(weights[::-1])], averages, **options)
    with pytest.raises(ValueError, match="two averages, not 1"):
        TrainingStep(loss, [torch.optim.AdamW(weights)], averages[:1], **options)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    options["device"] = torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"torch.cuda.set_device\(1\) first"):
        TrainingStep(loss, [torch.optim.AdamW(weights)], averages, **options)


def test_no_second_derivative():
    """The copies have no gradient, so a derivative of the backward would miss a part."""
    layer = nn.Linear(16, 8)
    x = torch.randn(3, 16, requires_grad=True)
    copies = RoundedCopies([layer])
    with copies.in_use(), torch.autocast("cpu", torch.bfloat16):
        (g,) = torch.autograd.grad(linear(layer, x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            g.square().sum().backward()


@pytest.mark.parametrize("options", [{}, dict(rms_norm=False, qk_norm=False, mod_norm=False)])
def test_vectors_of_several_blocks(options):
    """DiT's blocks are given the vectors that each makes of the condition alone."""
    net = random_model(depth=5, **options)
    c = torch.randn(5, 32, dtype=torch.float64)
    found = []
    for blocks in net.groups():
        found += net.vectors_of(blocks, c)
    assert len(net.groups()) == 2
    for block, vectors in zip(net.blocks, found, strict=True):
        for a, b in zip(vectors, block.modulation(c), strict=True):
            assert rel(a, b) < 1e-14


def gradients_in(
    net, target, dtype=torch.float32, copies=False, backend=None, checkpointed=0, device="cpu"
):
    """The terms of TVM's loss on one batch, and the gradients; in float32 under autocast."""
    torch._dynamo.reset()
    net = copy.deepcopy(net).to(device, dtype)
    net.checkpoint_blocks = checkpointed
    target = copy.deepcopy(target).to(device, dtype)
    loss = TrainingLoss(net, target, guidance=dict(w=2.0))
    bfloat16 = dtype == torch.float32
    step = TrainingStep(loss, [], [], torch.device(device), bfloat16=bfloat16)
    if not copies:
        step.copies = RoundedCopies([])
    if backend:
        net.run_block = torch.compile(Block.forward, fullgraph=True, backend=backend)
        net.make_vectors = torch.compile(block_vectors, fullgraph=True, backend=backend)
        target.run_block, target.make_vectors = net.run_block, net.make_vectors
    x0 = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    inputs = [x0, torch.arange(8) % 3, *loss.draw(x0, 0)]
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
    terms = step.gradients(*(t.to(device) for t in inputs))
    values = [term.loss for term in terms.values()]
    gradients = [p.grad.flatten().cpu() for p in net.parameters() if p.requires_grad]
    return values, torch.cat(gradients)


def test_gradients_are_as_near_to_float64():
    """As near as autocast's, with the same values; and when compiled."""
    networks = two_networks()
    _, wanted = gradients_in(*networks, torch.float64)
    values, autocast = gradients_in(*networks)
    found_values, found = gradients_in(*networks, copies=True)
    for a, b in zip(found_values, values, strict=True):
        assert torch.equal(a, b)
    assert rel(found, wanted) < 1.05 * rel(autocast, wanted)
    _, checkpointed = gradients_in(*networks, copies=True, checkpointed=2)
    assert torch.equal(checkpointed, found)
    _, compiled = gradients_in(*networks, copies=True, backend="aot_eager")
    assert rel(compiled, wanted) < 1.05 * rel(autocast, wanted)


@gpu
def test_gpu_gradients_are_as_near_to_float64():
    """With the kernels of fused.py, which take the copies of their layers, and compiled."""
    networks = two_networks()
    _, wanted = gradients_in(*networks, torch.float64)
    _, autocast = gradients_in(*networks, device="cuda")
    for backend in (None, "inductor"):
        _, found = gradients_in(*networks, copies=True, device="cuda", backend=backend)
        assert rel(found, wanted) < 1.2 * rel(autocast, wanted)


def test_a_step_refreshes_copies():
    """Also with an optimizer that knows nothing of them. Each step's copies are of its weights."""
    net, target = two_networks()
    weights = [p for p in net.parameters() if p.requires_grad]
    loss = TrainingLoss(net, target, guidance=dict(w=2.0))
    optimizer = torch.optim.SGD(weights, lr=0.1)
    cpu = torch.device("cpu")
    step = TrainingStep(loss, [optimizer], [(target, 0.5)], cpu, bfloat16=True)
    other = RoundedCopies([net])
    other.refresh()
    with torch.no_grad():
        net.blocks[0].mlp.fc1.weight.mul_(2)  # as a checkpoint that is loaded
    x0 = torch.randn(4, 2, 4, 4)
    for n in range(3):
        before = net.blocks[0].mlp.fc1.weight.detach().clone()
        step.gradients(x0, torch.arange(4) % 3, *loss.draw(x0, n))
        weight = net.blocks[0].mlp.fc1.weight
        assert torch.equal(step.copies.copy_of[id(weight)], weight.bfloat16())
        step.update()
        assert not torch.equal(net.blocks[0].mlp.fc1.weight, before)
        for p, copied in zip(step.copies.weights, step.copies.copies, strict=True):
            assert torch.equal(copied, p.bfloat16())
        versions = step.copies.versions
        step.copies.refresh_if_changed()
        assert step.copies.versions is versions  # they are fresh, and known to be
        other.refresh_if_changed()
        assert torch.equal(other.copy_of[id(weight)], weight.bfloat16())
    assert len(step.copies.copies) == 2 * len(linear_layers(net, target))
