"""
Linear layers in bfloat16 whose weights are rounded once a step, with gradients in float32.

    copies = RoundedCopies([model, target])
    copies.refresh_if_changed()
    with copies.in_use():
        ...  # forward and backward: the layers are computed by product() below

Autocast rounds a float32 weight in each pass that uses it, and it rounds the gradient of a weight
as well, of which it then makes float32 again. Here each weight has a copy in bfloat16, which is
written when the weight is updated, and the product that makes its gradient writes float32.
"""

import contextlib

import torch
from torch import nn
from torch.nn import functional

import fused

# The gradient of a weight is the sum of two products: of the value's gradient and of the tangent's.
# Where the tangent's rows lie behind the value's in memory, they are one product, which writes the
# sum once. Up to so many rows (modulation has one an image) they are copied there.
FEW_ROWS = 1024


class RoundedCopies:
    """bfloat16 copies of the weights and biases of networks' linear layers.

    These layers have none, and are left to autocast: one without a bias, one that is not float32,
    one of a subclass of nn.Linear, and one whose weight or bias an earlier layer has.
    """

    def __init__(self, nets):
        """nets: networks. One that has side_by_side(), as DiT has, says there which layers are
        computed as one product. Their copies lie one below the other."""
        self.layers = []
        self.weights = []
        self.copies = []
        self.attributes = []  # (layer, name, value): what is set while the copies are in use
        seen = set()  # ids of weights and biases
        for net in nets:
            for module in net.modules():
                if hasattr(module, "side_by_side"):
                    for layers in module.side_by_side():
                        self.add(layers, seen)
                self.add([module], seen)
        self.copy_of = {id(p): copy for p, copy in zip(self.weights, self.copies, strict=True)}
        self.versions = None  # of the weights when their copies were made

    @torch.no_grad()
    def add(self, layers, seen):
        """Copies of one layer, or of several whose weights are rows of one matrix."""
        if not all(is_plain(layer) for layer in layers):
            return
        weights = [layer.weight for layer in layers]
        biases = [layer.bias for layer in layers]
        parameters = weights + biases
        ids = {id(p) for p in parameters}
        if ids & seen or len(ids) < len(parameters) or len({p.shape for p in weights}) > 1:
            return
        if any(p.dtype != torch.float32 for p in parameters):
            return
        seen |= ids
        weight = torch.cat(weights).bfloat16()
        bias = torch.cat(biases).bfloat16()
        if len(layers) > 1:
            self.attributes.append((layers[0], "stack", (layers, (weight, bias))))
        weight_rows, bias_rows = weight.chunk(len(layers)), bias.chunk(len(layers))
        for layer, *copies in zip(layers, weight_rows, bias_rows, strict=True):
            self.attributes.append((layer, "copies", tuple(copies)))
            self.layers.append(layer)
            self.weights += [layer.weight, layer.bias]
            self.copies += copies

    def refresh_if_changed(self):
        """Copy all weights again, if PyTorch has written to one since (as load_state_dict does).

        It does not notice writes through .data, writes by others' kernels, and a layer that is
        given another tensor (as load_state_dict does with assign=True).
        """
        if self.versions != [p._version for p in self.weights]:
            self.refresh()

    @torch.no_grad()
    def refresh(self):
        torch._foreach_copy_(self.copies, self.weights)
        self.are_fresh()

    def are_fresh(self):
        """Call this after writing to the weights and to their copies."""
        self.versions = [p._version for p in self.weights]

    @contextlib.contextmanager
    def in_use(self, add_to_grad=False, places=None):
        """Within this context the layers are computed with their copies, where autocast would.

        Go backward inside it, too: checkpointed blocks run again there.
        add_to_grad: where a weight has a .grad, the product that makes its gradient adds to that.
        Then go backward by loss.backward() alone. torch.autograd.grad, or a backward that does not
        reach all weights, would take .grad away.
        places: {id of a weight: float32 tensor like it}, with add_to_grad. If a weight has no
        .grad, its first gradient is written there. Its entry is removed then: a second gradient
        must not overwrite the first.
        """
        attributes = [(layer, "add_to_grad", add_to_grad) for layer in self.layers]
        attributes += [(layer, "places", places or {}) for layer in self.layers]
        attributes += self.attributes
        for layer, name, value in attributes:
            setattr(layer, name, value)
        try:
            yield
        finally:
            for layer, name, _ in attributes:
                vars(layer).pop(name, None)


def is_plain(layer):
    """Whether a layer is W x + b, and nothing more that a subclass may add."""
    return type(layer) is nn.Linear and layer.bias is not None


def stack_of(layers):
    """The copies of these layers as one matrix and one vector of biases; None where they are none.

    They are one where copies are in use and these are the layers of a group, in its order.
    """
    group, stack = getattr(layers[0], "stack", ((), None))
    is_group = len(group) == len(layers) and all(a is b for a, b in zip(group, layers, strict=True))
    return stack if is_group else None


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
    places = None
    if all(getattr(layer, "add_to_grad", False) for layer in layers):
        places = getattr(layers[0], "places", {})
    return _Product.apply(x, dx, *copies, len(weights), places, *weights, *biases)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dx, weight, bias, count, places, *parameters):
        """weight, bias: the copies. parameters: `count` float32 weights, and then their biases.
        places: of in_use(add_to_grad=True), else None."""
        ctx.save_for_backward(x, dx, weight)
        ctx.count = count
        ctx.weights = parameters[:count]
        ctx.places = places
        ctx.set_materialize_grads(False)
        y = functional.linear(x, weight, bias)
        return y, None if dx is None else functional.linear(dx, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable  # the copies have no gradient
    def backward(ctx, gy, gdy):
        x, dx, weight = ctx.saved_tensors
        count = ctx.count
        needs_x, needs_dx, _, _, _, _, *needs_parameters = ctx.needs_input_grad
        gx = gy @ weight if needs_x and gy is not None else None
        gdx = gdy @ weight if needs_dx and gdy is not None else None
        gweights = [None] * count
        gbiases = [None] * (len(needs_parameters) - count)
        if any(needs_parameters[:count]):
            factors = [(rows_of(g), rows_of(a)) for g, a in ((gy, x), (gdy, dx)) if g is not None]
            gweights = weight_gradients(factors, ctx.weights, ctx.places)
        if any(needs_parameters[count:]) and gy is not None:
            gbiases = column_sums(gy).chunk(count)
        return gx, gdx, None, None, None, None, *gweights, *gbiases


def weight_gradients(factors, weights, places):
    """The gradients of the weights of layers side by side: sums of g^T a, a list of float32 (N, D).

    factors: one or two pairs g (rows, layers N), a (rows, D) in bfloat16.
    places: None, and .grad is left alone; or in_use's dictionary. With that, a weight's gradient is
    added to its .grad in place, or, if it has none, written to its place. Autograd gets that same
    tensor and stores it as .grad.
    """
    if len(factors) == 2:
        factors = joined(*factors)
    gradients = []
    for i, weight in enumerate(weights):
        gradient = None
        adds = False
        # A weight with a hook is left to autograd: the hook must see this gradient alone.
        if places is not None and weight.requires_grad and not weight._backward_hooks:
            adds = weight.grad is not None
            gradient = weight.grad if adds else places.pop(id(weight), None)
            weight.grad = None
        if gradient is not None:
            gradient = gradient.detach()  # an alias, which autograd need not copy
        for g, a in factors:
            g = g.chunk(len(weights), 1)[i]  # this layer's columns
            gradient = float32_product(g.t(), a, gradient, adds)
            adds = True
        gradients.append(gradient)
    return gradients


def joined(value_factors, tangent_factors):
    """Both pairs as one, whose product is the sum of theirs, if that needs no large copy."""
    pairs = list(zip(value_factors, tangent_factors, strict=True))
    if all(is_next(tangent, value) for value, tangent in pairs):
        return [[twice_as_long(value) for value, _ in pairs]]
    if len(value_factors[0]) <= FEW_ROWS:
        return [[torch.cat(pair) for pair in pairs]]
    return [value_factors, tangent_factors]


def twice_as_long(matrix):
    """(rows, N) and the matrix that lies behind it in memory, as one (2 rows, N)."""
    return matrix.as_strided((2 * matrix.size(0), matrix.size(1)), matrix.stride())


def is_next(second, first):
    """Whether a matrix lies just behind another one like it (as fused.py makes them)."""
    if not (first.is_contiguous() and second.is_contiguous() and first.shape == second.shape):
        return False
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return False
    return second.storage_offset() == first.storage_offset() + first.numel()


def column_sums(x):
    """The sum of x (..., D) over all rows: float32 (D,)."""
    if fused.why_not(x) is None:
        return fused.column_sums(x)
    return rows_of(x).sum(0, dtype=torch.float32)


def rows_of(x):
    """(..., D) -> (rows, D)"""
    return x.reshape(-1, x.size(-1))


def float32_product(a, b, out=None, adds=False):
    """a b of bfloat16 matrices in float32. It is written into out, or added to it."""
    if not a.is_cuda:  # only there a product has a dtype of its own
        product = a.float() @ b.float()
        if out is None:
            return product
        return out.add_(product) if adds else out.copy_(product)
    if adds:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)
