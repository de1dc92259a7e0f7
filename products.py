"""
Linear layers in bfloat16 whose weights are rounded once a step, with gradients in float32.

    copies = RoundedCopies([model, target])
    copies.refresh_if_changed()
    with copies.in_use():
        ...  # forward and backward: the layers are computed by product() below

Autocast rounds a float32 weight to bfloat16 in each pass that uses it. It computes the weight's
gradient in bfloat16, too, and then makes float32 of that. Here each weight has a copy in bfloat16,
which is written when the weight is updated, and the product that makes its gradient writes float32.
Products are made by cublas.py.
"""

import contextlib

import torch
from torch import nn

import cublas
import fused

# The gradient of a weight is the sum of two products: of the value's gradient and of the tangent's.
# Where the tangent's rows follow the value's in memory, one product over both makes the sum, and
# writes it once. Where they do not, up to so many rows (modulation has one an image) are copied
# together first.
FEW_ROWS = 1024


class RoundedCopies:
    """bfloat16 copies of the weights and biases of networks' linear layers.

    These layers have none, and are left to autocast: one without a bias, one that is not float32,
    one of a subclass of nn.Linear, and one whose weight or bias an earlier layer has.
    """

    def __init__(self, nets):
        """nets: networks, or none. One that has side_by_side(), as DiT has, says there which layers
        are computed as one product. Their copies lie one below the other."""
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
        self.versions = None  # of the weights when their copies were made; None: refresh them first

    @torch.inference_mode(False)  # else nobody could write to the copies later
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
        for layer, weight_copy, bias_copy in zip(layers, weight_rows, bias_rows, strict=True):
            self.attributes.append((layer, "originals", (layer.weight, layer.bias)))
            self.attributes.append((layer, "copies", (weight_copy, bias_copy)))
            self.layers.append(layer)
            self.weights += [layer.weight, layer.bias]
            self.copies += [weight_copy, bias_copy]

    def refresh_if_changed(self):
        """Copy all weights again, if PyTorch has written to one since (as load_state_dict does).

        It does not notice writes through .data and writes by others' kernels. A layer that is given
        another tensor (by load_state_dict with assign=True, or by torch.func.functional_call) is
        left to autocast as long as it has that.
        """
        if self.versions != versions_of(self.weights):
            self.refresh()

    @torch.no_grad()
    def refresh(self):
        if self.copies:  # it takes no empty lists
            torch._foreach_copy_(self.copies, self.weights)
        self.are_fresh()

    def are_fresh(self):
        """Call this after writing to the weights and to their copies."""
        self.versions = versions_of(self.weights)

    @contextlib.contextmanager
    def in_use(self, writer=None):
        """Within this context the layers use their copies wherever autocast would round weights.

        Go backward inside it, too: checkpointed blocks run again there. writer: a GradientWriter,
        which makes the gradients of the layers' weights within its backward().
        """
        attributes = [(layer, "gradient_writer", writer) for layer in self.layers]
        attributes += self.attributes
        for layer, name, value in attributes:
            setattr(layer, name, value)
        try:
            yield
        finally:
            for layer, name, _ in attributes:
                vars(layer).pop(name, None)


def versions_of(tensors):
    """How often PyTorch has written to each. (It does not count for tensors of inference mode.)"""
    return [None if t.is_inference() else t._version for t in tensors]


class GradientWriter:
    """Makes the gradients of linear layers' weights, and writes each where .grad is to be.

        writer = GradientWriter(destinations, stream)
        with copies.in_use(writer):
            ...  # forward of a term of the loss
            with writer.backward():
                loss.backward()

    That saves a copy into DDP's buckets. If a weight has a .grad, the product adds to that, which
    saves an addition. In a CUDA graph the products may run on a second stream, beside the rest of
    the backward.

    Within backward() call loss.backward() and nothing else: torch.autograd.grad, or
    backward(inputs=...), would lose .grad. Outside of it both work as usual. The second stream has
    one more rule: in one backward, a weight's gradient comes from its linear layer only. (The layer
    may run several times.) So a penalty on weights is an early term, which has a backward of its
    own.
    """

    def __init__(self, destinations=None, stream=None):
        """destinations: {id of a weight: float32 tensor like it}. If a weight has no .grad, its
        first gradient is written there. Its entry is removed then: a second gradient must not
        overwrite the first.

        stream: a CUDA stream, which is used while a graph is recorded. The gradients of a backward
        are complete at the end of backward(); whoever reads one before must wait for the stream.
        """
        self.is_writing = False
        self.destinations = {} if destinations is None else destinations
        self.stream = stream
        self.made = {}  # {id of a weight: (it, its gradient)}, in this backward and on the stream
        self.last = None  # the last product on the stream: (the event of its end, its factors)
        if self.uses_stream():  # it joins the recording, so that finish() can wait for it
            stream.wait_stream(torch.cuda.current_stream())

    @contextlib.contextmanager
    def backward(self):
        """Within this context gradients are written, as above. Raises as finish() does."""
        self.is_writing = True
        try:
            yield
        finally:
            self.is_writing = False
        self.finish()

    def uses_stream(self):
        return self.stream is not None and torch.cuda.is_current_stream_capturing()

    def gradients(self, factors, weights):
        """What autograd is given as the gradients of the weights of layers side by side.

        factors: as in weight_gradients.
        """
        if self.uses_stream() and not any(is_left_to_autograd(weight) for weight in weights):
            return self.gradients_on_stream(factors, weights)
        gradients = weight_gradients(factors, self.take_destinations(weights))
        return [alias(gradient) for gradient in gradients]

    def gradients_on_stream(self, factors, weights):
        current = torch.cuda.current_stream()
        destinations = []
        for_autograd = []
        for weight, (gradient, adds) in zip(weights, self.take_destinations(weights), strict=True):
            if gradient is None and id(weight) in self.made:
                # Its layer ran before in this backward. Autograd has that gradient, and this one is
                # added to it.
                _, gradient = self.made[id(weight)]
                destinations.append((gradient, True))
                for_autograd.append(None)
                continue
            if gradient is None:  # in memory of the current stream, which will free it
                gradient = torch.empty_like(weight)
            self.made[id(weight)] = weight, gradient
            destinations.append((gradient, adds))
            for_autograd.append(alias(gradient))
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            weight_gradients(factors, destinations)
            end = self.stream.record_event()
        # Autograd may drop the factors as soon as this returns, and the current stream would use
        # their memory again while the product reads it. So they are kept until the next call, which
        # makes the current stream wait for this product.
        if self.last is not None:
            last_end, _ = self.last
            current.wait_event(last_end)
        self.last = end, factors
        return for_autograd

    def take_destinations(self, weights):
        """Take .grad from weights. For each, where its gradient goes: (tensor, whether to add to
        it), or (None, False) for a new tensor.

        Without .grad, autograd stores the gradient that it is given, and does not add it.
        """
        destinations = []
        for weight in weights:
            gradient = None
            adds = False
            if not is_left_to_autograd(weight):
                adds = weight.grad is not None
                gradient = weight.grad if adds else self.destinations.pop(id(weight), None)
                weight.grad = None
            destinations.append((gradient, adds))
        return destinations

    def finish(self):
        """Wait for the stream.

        Raises RuntimeError where autograd has added something to a gradient that was made on the
        stream. It did so on the current stream, and may have read the gradient too early. It goes
        unnoticed where loss.backward() was called twice within one backward().
        """
        if not self.uses_stream():
            return
        torch.cuda.current_stream().wait_stream(self.stream)
        self.last = None
        made, self.made = self.made, {}
        for weight, gradient in made.values():
            if weight.grad is None or weight.grad.data_ptr() != gradient.data_ptr():
                raise RuntimeError(
                    f"in one backward, a weight of shape {tuple(weight.shape)} got a gradient from "
                    "its linear layer and one from something else, such as a penalty or a layer "
                    "that shares it: yield a penalty as an early term of its own, share the whole "
                    "layer, or set TWO_STREAMS = False in step.py"
                )

    def leave_stream(self):
        """From here on all gradients are made on the current stream."""
        self.finish()
        self.stream = None


def is_left_to_autograd(weight):
    """Whether autograd must store a weight's gradient itself: the weight has a hook, which must see
    this gradient alone, and complete; or it is not trained. (Hooks of AccumulateGrad nodes are not
    found.)"""
    has_hook = weight._backward_hooks or weight._post_accumulate_grad_hooks
    return bool(has_hook) or not weight.requires_grad


def alias(t):
    """The same memory as a new tensor. Autograd stores a tensor as .grad without a copy only if
    nobody else holds it."""
    return t.detach()


def is_plain(layer):
    """Whether a layer is W x + b, and nothing more that a subclass may add."""
    return type(layer) is nn.Linear and layer.bias is not None


def copies_of(layer):
    """A layer's weight and bias in bfloat16, where RoundedCopies are in use.

    None where there are none, in torch.compile, where autocast would not compute this layer, and
    where the layer has another weight or bias now.
    """
    copies = getattr(layer, "copies", None)
    if copies is None or must_be_called(layer) or torch.compiler.is_compiling():
        return None
    weight, bias = layer.originals
    if layer.weight is not weight or layer.bias is not bias:
        return None
    if not torch.is_autocast_enabled(copies[0].device.type):
        return None
    return None if fused.transformed() else copies


def must_be_called(layer):
    """Whether a layer must be called: it has hooks, or a forward of its own."""
    if "forward" in vars(layer):  # as libraries set that move weights between devices
        return True
    hooks = len(layer._forward_pre_hooks) + len(layer._forward_hooks)
    hooks += len(layer._backward_pre_hooks) + len(layer._backward_hooks)
    return hooks > 0


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
    writer = getattr(layers[0], "gradient_writer", None)
    return _Product.apply(x, dx, *copies, len(weights), writer, *weights, *biases)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dx, weight, bias, count, writer, *parameters):
        """weight, bias: the copies. parameters: `count` float32 weights, and then their biases.
        writer: a GradientWriter, or None."""
        ctx.save_for_backward(x, dx, weight)
        ctx.count = count
        ctx.weights = parameters[:count]
        # Within writer.backward() a forward means that a checkpointed block is computed again. The
        # backward takes only saved tensors from that, and goes through the nodes of the first run.
        # So only an autograd.grad inside the block uses this node, and that must not write .grad.
        ctx.writer = None if writer and writer.is_writing else writer
        ctx.set_materialize_grads(False)
        y = cublas.linear(x, weight, bias)
        return y, None if dx is None else cublas.linear(dx, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable  # the copies have no gradient
    def backward(ctx, gy, gdy):
        x, dx, weight = ctx.saved_tensors
        count = ctx.count
        needs_x, needs_dx, _, _, _, _, *needs_parameters = ctx.needs_input_grad
        # The gradients of inputs are launched first. Those of weights start after them also on a
        # second stream: two large products at a time are slower than one after the other.
        gx = cublas.matmul(gy, weight) if needs_x and gy is not None else None
        gdx = cublas.matmul(gdy, weight) if needs_dx and gdy is not None else None
        gweights = [None] * count
        gbiases = [None] * (len(needs_parameters) - count)
        # Autograd calls this also where neither result has a gradient.
        if any(needs_parameters[:count]) and not (gy is None and gdy is None):
            factors = [(rows_of(g), rows_of(a)) for g, a in ((gy, x), (gdy, dx)) if g is not None]
            if len(factors) == 2:
                factors = joined(*factors)
            if ctx.writer and ctx.writer.is_writing:
                gweights = ctx.writer.gradients(factors, ctx.weights)
            else:
                gweights = weight_gradients(factors, [(None, False)] * count)
        if any(needs_parameters[count:]) and gy is not None:
            gbiases = column_sums(gy).chunk(count)
        return gx, gdx, None, None, None, None, *gweights, *gbiases


def weight_gradients(factors, destinations):
    """The gradients of the weights of layers side by side: sums of g^T a, a list of float32 (N, D).

    factors: one or two pairs g (rows, layers N), a (rows, D) in bfloat16. destinations: a pair for
    each layer, a tensor and whether to add to it; (None, False): a new one is made.
    """
    gradients = []
    for i, (gradient, adds) in enumerate(destinations):
        for g, a in factors:
            g = g.chunk(len(destinations), 1)[i]  # this layer's columns
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
    """a b of bfloat16 matrices in float32. It is written into out, or added to it.

    By torch: no algorithm was found that is faster (docs/performance.md).
    """
    if not a.is_cuda:  # out_dtype is for CUDA alone
        product = a.float() @ b.float()
        if out is None:
            return product
        return out.add_(product) if adds else out.copy_(product)
    if adds:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)
