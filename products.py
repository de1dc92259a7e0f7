"""
Linear layers in bfloat16 whose weights are rounded once a step, with gradients in float32.

    copies = RoundedCopies([model, target])
    copies.refresh_if_changed()
    with copies.in_use():
        ...  # forward and backward: the layers are computed by product() below

In a compiled program autocast rounds a float32 weight wherever it is used: five times in a step of
TVM, in forward and backward of its two passes and in the target's forward. It rounds the gradient
of a weight as well, and then makes float32 of it again. Here each weight has a copy in bfloat16,
which is written when the weight is updated, and the product that makes its gradient writes float32.
"""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional

# A gradient of a weight is a sum of two products, of the value's gradient and of the tangent's. Up
# to so many rows (of modulation, images) it is one product of both below each other: it then takes
# as long as to write the result, which is once and not twice.
FEW_ROWS = 1024


class RoundedCopies:
    """bfloat16 copies of the weights and biases of networks' linear layers.

    A layer with hooks, without a bias, or of a subclass of nn.Linear is left to autocast, and so is
    one that shares its weight with another.
    """

    def __init__(self, nets):
        """nets: networks of float32 weights. One that has side_by_side(), as DiT has, says there
        which layers are computed as one product. Their copies lie one below the other."""
        self.weights = []
        self.copies = []
        self.attributes = []  # (layer, name, value): what is set while the copies are in use
        seen = set()  # weights
        for module in [module for net in nets for module in net.modules()]:
            groups = module.side_by_side() if hasattr(module, "side_by_side") else []
            for layers in groups:
                self.add(layers, seen)
            self.add([module], seen)
        self.copy_of = {id(p): copy for p, copy in zip(self.weights, self.copies, strict=True)}
        self.versions = None  # of the weights when their copies were made

    @torch.no_grad()
    def add(self, layers, seen):
        """Copies of one layer, or of several whose weights are rows of one matrix."""
        if not all(type(layer) is nn.Linear and layer.bias is not None for layer in layers):
            return
        weights = [layer.weight for layer in layers]
        ids = {id(p) for p in weights}
        if ids & seen or len(ids) < len(layers) or len({p.shape for p in weights}) > 1:
            return
        seen |= ids
        biases = [layer.bias for layer in layers]
        stack = torch.cat(weights).bfloat16(), torch.cat(biases).bfloat16()
        if len(layers) > 1:
            self.attributes.append((layers[0], "stack", (len(layers), *stack)))
        rows = zip(*(t.chunk(len(layers)) for t in stack), strict=True)
        for layer, copies in zip(layers, rows, strict=True):
            self.attributes.append((layer, "copies", copies))
            self.weights += [layer.weight, layer.bias]
            self.copies += copies

    def refresh_if_changed(self):
        """Copy all weights again, if PyTorch has written to one since (as load_state_dict does).

        It does not notice writes through .data and by kernels of other libraries.
        """
        if self.versions != [p._version for p in self.weights]:
            self.refresh()

    @torch.no_grad()
    def refresh(self):
        torch._foreach_copy_(self.copies, self.weights)
        self.are_fresh()

    def are_fresh(self):
        """To be called by who has written to weights and to their copies."""
        self.versions = [p._version for p in self.weights]

    @contextlib.contextmanager
    def in_use(self):
        """Within this context the layers are computed with their copies, where autocast would.

        Go backward inside it, too: checkpointed blocks run again there.
        """
        for layer, name, value in self.attributes:
            setattr(layer, name, value)
        try:
            yield
        finally:
            for layer, name, _ in self.attributes:
                vars(layer).pop(name, None)


def product(x, dx, layers, copies, bias_gradient=True):
    """x W^T + b (..., N), and dx W^T, in bfloat16.

    x (..., D) and its tangent dx, which may be None; then the second result is None. layers: one or
    more nn.Linear, whose weights one below the other are W. copies: W (N, D) and b (N,) in
    bfloat16. bias_gradient=False: b is a constant. The gradients of the layers' weights and biases
    are float32.
    """
    x = x.to(torch.bfloat16)
    dx = None if dx is None else dx.to(torch.bfloat16)
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers] if bias_gradient else []
    out = _product(x, dx, *copies, len(weights), *weights, *biases)
    return (out, None) if dx is None else out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dx, weight, bias, count, *parameters):
        """weight, bias: the copies. parameters: `count` float32 weights, and then their biases."""
        ctx.save_for_backward(x, dx, weight)
        ctx.count = count
        ctx.set_materialize_grads(False)
        y = functional.linear(x, weight, bias)
        if dx is None:
            return y
        return y, functional.linear(dx, weight)

    @staticmethod
    def backward(ctx, gy, gdy=None):
        x, dx, weight = ctx.saved_tensors
        needs_x, needs_dx, _, _, _, *needs_parameters = ctx.needs_input_grad
        needs_weights = any(needs_parameters[: ctx.count])
        needs_biases = any(needs_parameters[ctx.count :])
        gx = gy @ weight if needs_x and gy is not None else None
        gdx = gdy @ weight if needs_dx and gdy is not None else None
        gweights = [None] * ctx.count
        gbiases = [None] * (len(needs_parameters) - ctx.count)
        pairs = [(g, a) for g, a in ((gy, x), (gdy, dx)) if g is not None]
        if needs_weights and pairs:
            (g, a), (dg, da) = [*pairs, (None, None)][:2]
            gweights = weight_gradient(g, a, dg, da).chunk(ctx.count)
        if needs_biases and gy is not None:
            gbiases = gy.flatten(0, -2).sum(0, dtype=torch.float32).chunk(ctx.count)
        return gx, gdx, None, None, None, *gweights, *gbiases


@torch.compiler.allow_in_graph  # Dynamo's own tracing would replace missing gradients by zeros
def _product(*arguments):
    return _Product.apply(*arguments)


@torch.library.custom_op("products::weight_gradient", mutates_args=())
def weight_gradient(gy: Tensor, x: Tensor, gdy: Tensor | None, dx: Tensor | None) -> Tensor:
    """gy^T x + gdy^T dx over all rows, float32 (N, D)."""
    gy, x = gy.flatten(0, -2), x.flatten(0, -2)
    if gdy is None:
        return float32_product(gy.t(), x)
    gdy, dx = gdy.flatten(0, -2), dx.flatten(0, -2)
    if len(x) <= FEW_ROWS:
        return float32_product(torch.cat([gy, gdy]).t(), torch.cat([x, dx]))
    return float32_product(gdy.t(), dx, add_to=float32_product(gy.t(), x))


@weight_gradient.register_fake
def _(gy, x, gdy, dx):
    return gy.new_empty(gy.size(-1), x.size(-1), dtype=torch.float32)


def float32_product(a, b, add_to=None):
    """a b of bfloat16 matrices in float32, added in place to a matrix if that is given."""
    if not a.is_cuda:  # only there a product has a dtype of its own
        out = a.float() @ b.float()
        return out if add_to is None else add_to.add_(out)
    if add_to is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(add_to, a, b, out_dtype=torch.float32, out=add_to)
