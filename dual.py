"""
Values and tangents: how a derivative moves through a network, one rule for each operation.

A Dual is a value x and its tangent dx, its derivative along a direction: x + eps dx with
eps^2 = 0. Every function below takes tensors or Duals. A forward pass that is written with them
once therefore gives the value alone or the value and its forward-mode derivative.

To autograd a Dual is two ordinary tensors. Backward, checkpointing and torch.compile work on it
as they are.

Residual sums, norms, modulation and GELU have kernels for GPUs in fused.py. The functions that call
them come last. There an addition may wait for a kernel that does it (class Residual). total(x) does
it now, and returns tensors and Duals as they are: on a first reading, skip it.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

import cublas
import fused
from attention_jvp import attention, attention_jvp
from products import copies_of, is_plain, must_be_called, product

EPS = fused.EPS  # of every norm


@dataclasses.dataclass(eq=False)
class Dual:
    """A value and its tangent, two tensors of one shape and dtype.

    It has +, - and * with numbers, tensors, Duals and Residuals on either side. A number or tensor
    is a constant. Any other operation needs a rule below.

    torch.compile (2.13) refuses these operators between a Dual and a tensor, but not between Duals.
    For dual * a in a compiled block, write linear_map(lambda x: x * a, dual), and for dual + a
    write Dual(dual.value + a, dual.tangent).
    """

    value: Tensor
    tangent: Tensor

    def __add__(self, other):
        other = total(other)
        if isinstance(other, Dual):
            return Dual(self.value + other.value, self.tangent + other.tangent)
        value = self.value + other
        return Dual(value, self.tangent.to(value.dtype).expand_as(value))

    def __mul__(self, other):
        other = total(other)
        if isinstance(other, Dual):
            tangent = self.tangent * other.value + self.value * other.tangent
            return Dual(self.value * other.value, tangent)
        return Dual(self.value * other, self.tangent * other)

    def __sub__(self, other):
        return self + other * -1

    def __rsub__(self, other):
        return self * -1 + other

    __radd__ = __add__
    __rmul__ = __mul__


def value_of(x):
    """The value of a Dual; a tensor itself."""
    x = total(x)
    return x.value if isinstance(x, Dual) else x


def tangent_of(x):
    """The tangent of a Dual; None for a tensor."""
    x = total(x)
    return x.tangent if isinstance(x, Dual) else None


def pair(value, tangent):
    """The Dual, or the value where there is no tangent."""
    return value if tangent is None else Dual(value, tangent)


def linear_map(f, x):
    """f(x) for a function f that is linear in x: a view, a cast, a slice, a sum."""
    x = total(x)
    if isinstance(x, Dual):
        return Dual(f(x.value), f(x.tangent))
    return f(x)


def split(f, x):
    """f(x) as a list of tensors or Duals, for a linear f that returns several tensors."""
    x = total(x)
    if isinstance(x, Dual):
        parts = zip(f(x.value), f(x.tangent), strict=True)
        return [Dual(value, tangent) for value, tangent in parts]
    return f(x)


def cat(parts, dim):
    """torch.cat of tensors and Duals. A tensor among Duals is a constant."""
    parts = [total(part) for part in parts]
    if not any(isinstance(part, Dual) for part in parts):
        return torch.cat(parts, dim)
    tangents = []
    for part in parts:
        tangents.append(part.tangent if isinstance(part, Dual) else torch.zeros_like(part))
    return Dual(torch.cat([value_of(part) for part in parts], dim), torch.cat(tangents, dim))


def linear(layer, x):
    """W x + b, and W dx. Another kind of layer (LoRA, for example) needs a rule of its own.

    Forward hooks may change a layer's input and result: the tangent is the derivative of that.
    """
    x = total(x)
    copies = copies_of(layer)  # its weights in bfloat16, where products.RoundedCopies are in use
    if copies is not None:
        return pair(*product(value_of(x), tangent_of(x), [layer], copies))
    if not isinstance(x, Dual):
        return layer(x)
    if type(layer) is not nn.Linear:
        raise TypeError(f"there is no rule for the tangent of a {type(layer).__name__}")
    if layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer):
        if layer._backward_pre_hooks or layer._backward_hooks:  # these have no forward mode
            raise TypeError(
                "no tangent of a layer that has backward hooks, and forward hooks or a forward "
                "of its own"
            )
        return call_with_tangent(layer, x)
    return Dual(layer(x.value), functional.linear(x.tangent, layer.weight))


def call_with_tangent(layer, x):
    """layer(x), by PyTorch's forward mode, which torch.inference_mode() does not have."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "a layer with hooks, or a forward of its own, needs torch.no_grad() instead of "
            "inference_mode()"
        )
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x.value, x.tangent))
        value, tangent = forward_ad.unpack_dual(y)
    return Dual(value, torch.zeros_like(value) if tangent is None else tangent)


def linear_side_by_side(layers, x, stack=None):
    """The results of several layers for one x (B, D), side by side: (B, sum of their outputs).

    stack: their copies as one matrix, of products.stack_of.
    """
    x = total(x)
    if stack is not None and all(copies_of(layer) is not None for layer in layers):
        return pair(*product(value_of(x), tangent_of(x), layers, stack))
    return cat([linear(layer, x) for layer in layers], -1)


def silu(x):
    """x g with g = sigmoid(x)."""
    x = total(x)
    if not isinstance(x, Dual):
        return functional.silu(x)
    g = torch.sigmoid(x.value)
    return Dual(x.value * g, g * (1 + x.value * (1 - g)) * x.tangent)


def gelu(x):
    """The tanh form, x g with g = sigmoid(z), z = 2 sqrt(2/pi) (x + 0.044715 x^3)."""
    x = total(x)
    if not isinstance(x, Dual):
        return functional.gelu(x, approximate="tanh")
    x, dx = x.value, x.tangent
    c = 2 * math.sqrt(2 / math.pi)
    x2 = x * x
    g = torch.sigmoid(x * (c + (c * 0.044715) * x2))
    dz_dx = c + (3 * c * 0.044715) * x2
    return Dual(x * g, g * (1 + x * (1 - g) * dz_dx) * dx)


def rms_norm(x, weight=None):
    """x / rms(x) over the last dimension, times weight. The result is at least float32."""
    x = total(x)
    if not isinstance(x, Dual):
        return functional.rms_norm(at_least_float32(x), x.shape[-1:], weight, EPS)
    x, dx = at_least_float32(x.value), at_least_float32(x.tangent)
    r = torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)
    y = x * r
    dy = r * (dx - y * (y * dx).mean(-1, keepdim=True))
    if weight is None:
        return Dual(y, dy)
    return Dual(y * weight, dy * weight)


def layer_norm(x):
    """rms_norm of x less its mean over the last dimension."""
    return rms_norm(linear_map(lambda x: x - x.mean(-1, keepdim=True), x))


def attend(q, k, v, mask=None):
    """Attention of q (B, H, T, d) to k and v (B, H, S, d). Queries and keys are cast to v's dtype.

    mask: as torch's scaled_dot_product_attention takes it, for example (B, 1, 1, S) bool, False at
    padding.
    """
    dtype = value_of(v).dtype
    q = linear_map(lambda x: x.to(dtype), q)
    k = linear_map(lambda x: x.to(dtype), k)
    if not any(isinstance(x, Dual) for x in (q, k, v)):
        return attention(q, k, v, mask)
    # A tensor among Duals is a constant: its tangent is None, and costs nothing.
    values = [value_of(x) for x in (q, k, v)]
    tangents = [tangent_of(x) for x in (q, k, v)]
    return Dual(*attention_jvp(*values, *tangents, mask))


def modulate(x, shift, scale):
    """x (B, T, D) times 1 + scale, plus shift, (B, 1, D) each."""
    return x * (1 + scale) + shift


# ---- what has kernels ----------------------------------------------------------------------------
# Each function has its formula, and calls a kernel of fused.py where that can run. The formula is
# what the kernel is tested against.


@dataclasses.dataclass(eq=False)
class Residual:
    """The residual stream with a sum that is not made yet: high + low + gate * branch.

    The kernel of the next norm makes the sum while it reads these, which saves a pass over memory.
    +, - and *, with a Residual on either side, make it first, and so do the rules above. Other code
    that needs the tensor or Dual calls total(x). Residuals arise only where kernels run, so a
    forgotten total() fails on a GPU and not on a CPU.

    Under autocast the value is two numbers of 16 bits: high, and low, which is what rounding to
    high lost (no gradient goes through it). The tangent and all gradients are one number of 16 bits
    each. With fused.FUSED = False they are float32.

    high and branch (B, T, D) and gate (B, 1, D) are tensors or Duals; low (B, T, D) is a tensor.
    All but high may be None.
    """

    high: Tensor | Dual
    low: Tensor | None = None
    gate: Tensor | Dual | None = None
    branch: Tensor | Dual | None = None

    def __add__(self, other):
        return total(self) + total(other)

    def __sub__(self, other):
        return total(self) - total(other)

    def __rsub__(self, other):
        return total(other) - total(self)

    def __mul__(self, other):
        return total(self) * total(other)

    __radd__ = __add__
    __rmul__ = __mul__


def total(x):
    """The sum that a Residual stands for. Anything else comes back as it is."""
    if not isinstance(x, Residual):
        return x
    result = x.high
    if x.low is not None:
        result = linear_map(at_least_float32, result) + x.low
    if x.branch is not None:
        result = result + x.gate * x.branch
    return result


def detach_tangent(x):
    """x, with no gradient through its tangent."""
    if isinstance(x, Residual):
        parts = (x.high, x.low, x.gate, x.branch)
        return Residual(*(detach_tangent(part) for part in parts))
    return Dual(x.value, x.tangent.detach()) if isinstance(x, Dual) else x


def has_kernels(x, *vectors, layer=None):
    """Whether fused.py has kernels for x (B, T, D) with these vectors, which must be (B, 1, D).

    layer: the linear layer whose product the kernel takes over, or follows.
    """
    x = x.high if isinstance(x, Residual) else x
    x = value_of(x)
    if fused.why_not(x) is not None:
        return False
    if product_dtype(x) == torch.float16:  # the residual stream would overflow in it
        return False
    # The kernels take the layer's weight and bias and do not call it. Others must be called.
    if layer is not None and (not is_plain(layer) or must_be_called(layer)):
        return False
    if vectors and x.ndim != 3:
        return False
    for vector in map(value_of, vectors):
        if getattr(vector, "shape", None) != (x.size(0), 1, x.size(2)):
            return False
        if vector.dtype not in fused.DTYPES:
            return False
    return True


def add_gated(x, gate, branch):
    """x + gate * branch, for gate (B, 1, D). With kernels the sum is left to the next norm."""
    high = x.high if isinstance(x, Residual) else x
    same_shape = getattr(value_of(branch), "shape", None) == value_of(high).shape
    if not same_shape or not has_kernels(x, gate) or not has_kernels(branch):
        return total(x) + gate * branch
    if isinstance(x, Residual) and x.branch is not None:
        x = total(x)  # a Residual holds one sum: this one is made now
    if isinstance(x, Residual):
        return Residual(x.high, x.low, gate, branch)
    return Residual(x, None, gate, branch)


def norm_modulate(x, shift, scale, norm=rms_norm):
    """x, and its norm times 1 + scale plus shift. shift and scale are (B, 1, D).

    x comes back because the norm's kernel has made its sum.
    """
    if norm is not rms_norm or not has_kernels(x, shift, scale):
        x = total(x)
        return x, modulate(norm(x), shift, scale)
    if not isinstance(x, Residual):
        x = Residual(x)
    # The first ten arguments of fused.add_norm: x, branch, gate, shift, scale and their tangents.
    parts = values_and_tangents(x.high, x.branch, x.gate, shift, scale)
    dtype = product_dtype(parts[0])
    high, low, dx, h, dh = fused.add_norm(*parts, low=x.low, dtype=dtype)
    return Residual(pair(high, dx), low), pair(h, dh)


def linear_gelu(layer, x):
    """gelu(linear(layer, x)), x (..., D)."""
    x = total(x)
    if not has_kernels(x, layer=layer):
        return gelu(linear(layer, x))
    dtype = product_dtype(x)
    if not isinstance(x, Dual) and dtype == torch.bfloat16 and not torch.is_grad_enabled():
        weight, bias = copies_of(layer) or (layer.weight, layer.bias)
        return cublas.linear_gelu(x.to(dtype), weight.to(dtype), bias.to(dtype))
    u = linear_detached_bias(layer, x)
    # u has the bias in it. The kernel is given the bias only to return its gradient.
    return pair(*fused.gelu(value_of(u), tangent_of(u), layer.bias))


def linear_qkv(layer, x, heads, q_weight=None, k_weight=None):
    """x (B, T, D) -> queries, keys and values (B, T, heads, d), q and k through an RMS norm.

    Without weights there are no norms.
    """
    x = total(x)
    has_norm = q_weight is not None
    if has_norm and q_weight.ndim == k_weight.ndim == 1 and has_kernels(x, layer=layer):
        qkv = linear_detached_bias(layer, x)
        # qkv has the bias in it, as in linear_gelu.
        parts = fused.qk_norm(value_of(qkv), tangent_of(qkv), q_weight, k_weight, heads, layer.bias)
        return [pair(*part) for part in zip(parts[:3], parts[3:], strict=True)]

    def take_apart(x):
        # q, k and v are transposed after they are taken apart. Their gradients then lie side by
        # side, and the backward of the layer is one product without a copy.
        return x.unflatten(-1, (3, heads, -1)).unbind(2)

    q, k, v = split(take_apart, linear(layer, x))
    if has_norm:
        q = rms_norm(q, q_weight)
        k = rms_norm(k, k_weight)
    return q, k, v


def linear_detached_bias(layer, x):
    """W x + b without the gradient of b: the kernel that follows is given b, and makes that.

    Hooks of the layer do not fire.
    """
    copies = copies_of(layer)
    if copies is not None:
        return pair(*product(value_of(x), tangent_of(x), [layer], copies, bias_gradient=False))
    y = functional.linear(value_of(x), layer.weight, layer.bias.detach())
    if not isinstance(x, Dual):
        return y
    return Dual(y, functional.linear(x.tangent, layer.weight))


def values_and_tangents(*parts):
    """Value, tangent, value, tangent, ... Where some part is a Dual, tensors get a zero tangent."""
    some_dual = any(isinstance(part, Dual) for part in parts)
    found = []
    for part in parts:
        value = value_of(part)
        tangent = tangent_of(part)
        if some_dual and tangent is None and value is not None:
            tangent = torch.zeros_like(value)
        found += [value, tangent]
    return found


def product_dtype(x):
    """The dtype in which a linear layer computes."""
    x = value_of(x)
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


# ---- shapes and dtypes, for everyone -------------------------------------------------------------


def column(a, like):
    """(B,) -> (B, 1, ..., 1) with as many dimensions as `like`, to be multiplied with it."""
    return a.view(-1, *[1] * (like.ndim - 1))


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def widest(device):
    """float64 where the device has it. Apple's GPUs stop at float32."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
