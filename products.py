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
# While a CUDA graph is recorded, the gradients of weights are made on a stream of their own, beside
# the rest of the backward, which has no use for them. So short kernels, and the last programs of
# long ones, leave fewer multiprocessors idle. False: all is on one stream.
SIDE_STREAM = True


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
    def in_use(self, in_place=None):
        """Within this context the layers are computed with their copies, where autocast would.

        Go backward inside it, too: checkpointed blocks run again there. in_place: a
        GradientsInPlace, which then makes the gradients of the layers' weights.
        """
        attributes = [(layer, "in_place", in_place) for layer in self.layers]
        attributes += self.attributes
        for layer, name, value in attributes:
            setattr(layer, name, value)
        try:
            with in_place or contextlib.nullcontext():
                yield
        finally:
            for layer, name, _ in attributes:
                vars(layer).pop(name, None)


class GradientsInPlace:
    """Makes gradients of weights where they stay; in a CUDA graph, on a stream of their own.

        with GradientsInPlace(places, stream):
            ...  # forward and backward of one step

    If a weight has a .grad, the product that makes its next gradient adds to that. So go backward
    by loss.backward() alone. torch.autograd.grad, or a backward that does not reach all weights,
    would take .grad away.
    """

    def __init__(self, places=None, stream=None):
        """places: {id of a weight: float32 tensor like it}. If a weight has no .grad, its first
        gradient is written there. Its entry is removed then: a second gradient must not overwrite
        the first.

        stream: a CUDA stream, which is used while a graph is recorded. All gradients are complete
        when the context ends; whoever reads one before must wait for the stream.
        """
        self.places = {} if places is None else places
        self.stream = stream
        self.made = {}  # {id of a weight: (weight, gradient)}, of those made on the stream
        self.last = None  # the last product on the stream: (the event of its end, what it reads)

    def uses_stream(self):
        return self.stream is not None and torch.cuda.is_current_stream_capturing()

    def __enter__(self):
        if self.uses_stream():
            self.stream.wait_stream(torch.cuda.current_stream())

    def __exit__(self, error, *_):
        """Raises RuntimeError where autograd has added to a gradient that was made on the stream.
        It did that on the current stream, perhaps before the gradient was there."""
        if not self.uses_stream():
            return
        torch.cuda.current_stream().wait_stream(self.stream)
        self.last = None
        for weight, gradient in self.made.values():
            if not error and gradient is not None and weight.grad.data_ptr() != gradient.data_ptr():
                raise RuntimeError(
                    f"a weight of shape {tuple(weight.shape)} is used by more than its linear "
                    "layer: set SIDE_STREAM = False in products.py"
                )

    def gradients(self, factors, weights):
        """What autograd is given as gradients of the weights of layers side by side.

        factors: as in weight_gradients.
        """
        outs = [self.take(weight) for weight in weights]
        if not self.uses_stream() or any(is_left_to_autograd(weight) for weight in weights):
            return aliases(weight_gradients(factors, outs))

        here = torch.cuda.current_stream()
        pairs = list(zip(weights, outs, strict=True))
        if any(out is None and id(weight) in self.made for weight, (out, _) in pairs):
            # A layer that ran twice. Autograd adds up its gradients, on the current stream.
            here.wait_stream(self.stream)
            self.made |= {id(weight): (weight, None) for weight in weights}
            return aliases(weight_gradients(factors, outs))

        for i, (weight, (out, adds)) in enumerate(pairs):
            if out is None:
                out = torch.empty_like(weight)  # in the memory of the current stream
            outs[i] = out, adds
            self.made[id(weight)] = weight, out
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            gradients = weight_gradients(factors, outs)
            event = self.stream.record_event()
        # Autograd may now drop the factors, and the current stream use their memory again. So they
        # are kept until that has waited for this product.
        before = self.last
        self.last = event, factors
        if before is not None:
            here.wait_event(before[0])
        return aliases(gradients)

    def take(self, weight):
        """(tensor, whether to add to it) for a weight's gradient; (None, False) for a new tensor.

        .grad becomes None, so that autograd stores the alias that it is given, without a copy.
        """
        if is_left_to_autograd(weight):
            return None, False
        gradient = weight.grad
        weight.grad = None
        if gradient is not None:
            return gradient, True
        return self.places.pop(id(weight), None), False


def is_left_to_autograd(weight):
    """A weight with a hook, which must see its gradient, and one that is not trained."""
    has_hook = weight._backward_hooks or weight._post_accumulate_grad_hooks
    return bool(has_hook) or not weight.requires_grad


def aliases(tensors):
    return [t.detach() for t in tensors]


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
    in_place = getattr(layers[0], "in_place", None)
    return _Product.apply(x, dx, *copies, len(weights), in_place, *weights, *biases)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dx, weight, bias, count, in_place, *parameters):
        """weight, bias: the copies. parameters: `count` float32 weights, and then their biases.
        in_place: a GradientsInPlace, or None."""
        ctx.save_for_backward(x, dx, weight)
        ctx.count = count
        ctx.weights = parameters[:count]
        ctx.in_place = in_place
        ctx.set_materialize_grads(False)
        y = functional.linear(x, weight, bias)
        return y, None if dx is None else functional.linear(dx, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable  # the copies have no gradient
    def backward(ctx, gy, gdy):
        x, dx, weight = ctx.saved_tensors
        count = ctx.count
        needs_x, needs_dx, _, _, _, _, *needs_parameters = ctx.needs_input_grad
        # These come first. On its stream the gradient of a weight would otherwise be made beside
        # them, and two large products at a time are slower.
        gx = gy @ weight if needs_x and gy is not None else None
        gdx = gdy @ weight if needs_dx and gdy is not None else None
        gweights = [None] * count
        gbiases = [None] * (len(needs_parameters) - count)
        if any(needs_parameters[:count]):
            factors = [(rows_of(g), rows_of(a)) for g, a in ((gy, x), (gdy, dx)) if g is not None]
            if len(factors) == 2:
                factors = joined(*factors)
            if ctx.in_place:
                gweights = ctx.in_place.gradients(factors, ctx.weights)
            else:
                gweights = weight_gradients(factors, [(None, False)] * count)
        if any(needs_parameters[count:]) and gy is not None:
            gbiases = column_sums(gy).chunk(count)
        return gx, gdx, None, None, None, None, *gweights, *gbiases


def weight_gradients(factors, outs):
    """The gradients of the weights of layers side by side: sums of g^T a, a list of float32 (N, D).

    factors: one or two pairs g (rows, layers N), a (rows, D) in bfloat16. outs: a pair for each
    layer, a tensor and whether to add to it; (None, False): a new one is made.
    """
    gradients = []
    for i, (gradient, adds) in enumerate(outs):
        for g, a in factors:
            g = g.chunk(len(outs), 1)[i]  # this layer's columns
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
