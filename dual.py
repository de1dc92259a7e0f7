"""
Values and tangents: how a derivative moves through a network, one rule for each operation.

A Dual is a value x and its tangent dx, its derivative along a direction: x + eps dx with
eps^2 = 0. Every function below takes tensors or Duals. A forward pass that is written with them
once therefore gives the value alone or the value and its forward-mode derivative.

To autograd a Dual is two ordinary tensors. Backward, checkpointing and torch.compile work on it
as they are.

What a block does between its products has kernels for GPUs in fused.py. The functions that call
them come last.
"""

import math

import torch
from torch import nn
from torch.nn import functional

import fused
from attention_jvp import attention, attention_jvp

EPS = fused.EPS  # of every norm


class Dual:
    """A value and its tangent, two tensors of one shape. It has +, - and *.

    Any other operation needs a rule below.
    """

    def __init__(self, value, tangent):
        self.value = value
        self.tangent = tangent

    def __add__(self, other):
        if isinstance(other, Dual):
            return Dual(self.value + other.value, self.tangent + other.tangent)
        value = self.value + other
        return Dual(value, self.tangent.to(value.dtype).expand_as(value))

    def __mul__(self, other):
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
    return x.value if isinstance(x, Dual) else x


def tangent_of(x):
    """The tangent of a Dual; None of a tensor."""
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
    """The tensors or Duals that a linear f takes x apart into (f returns several tensors)."""
    if isinstance(x, Dual):
        parts = zip(f(x.value), f(x.tangent), strict=True)
        return [Dual(value, tangent) for value, tangent in parts]
    return f(x)


def cat(parts, dim):
    """torch.cat of tensors and Duals. A tensor among Duals is a constant."""
    if not any(isinstance(part, Dual) for part in parts):
        return torch.cat(parts, dim)
    tangents = []
    for part in parts:
        tangents.append(part.tangent if isinstance(part, Dual) else torch.zeros_like(part))
    return Dual(torch.cat([value_of(part) for part in parts], dim), torch.cat(tangents, dim))


def linear(layer, x):
    """W x + b, and W dx. Another kind of layer (LoRA, for example) needs a rule of its own."""
    if isinstance(x, Dual):
        if type(layer) is not nn.Linear:
            raise TypeError(f"there is no rule for the tangent of a {type(layer).__name__}")
        return Dual(layer(x.value), functional.linear(x.tangent, layer.weight))
    return layer(x)


def silu(x):
    """x g with g = sigmoid(x)."""
    if not isinstance(x, Dual):
        return functional.silu(x)
    g = torch.sigmoid(x.value)
    return Dual(x.value * g, g * (1 + x.value * (1 - g)) * x.tangent)


def gelu(x):
    """The tanh form, x g with g = sigmoid(z), z = 2 sqrt(2/pi) (x + 0.044715 x^3)."""
    if not isinstance(x, Dual):
        return functional.gelu(x, approximate="tanh")
    x, dx = x.value, x.tangent
    c = 2 * math.sqrt(2 / math.pi)
    x2 = x * x
    g = torch.sigmoid(x * (c + (c * 0.044715) * x2))
    slope = c + (3 * c * 0.044715) * x2  # dz/dx
    return Dual(x * g, g * (1 + x * (1 - g) * slope) * dx)


def rms_norm(x, weight=None):
    """x / rms(x) over the last dimension, times weight. The result is at least float32."""
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
    return rms_norm(linear_map(without_mean, x))


def without_mean(x):
    return x - x.mean(-1, keepdim=True)


def attend(q, k, v, mask=None):
    """Attention of q (B, H, T, d) to k and v (B, H, S, d). Queries and keys are cast to v's dtype.

    mask: as torch's scaled_dot_product_attention takes it, for example (B, 1, 1, S) bool, False at
    padding.
    """
    dtype = value_of(v).dtype
    q = linear_map(lambda x: x.to(dtype), q)
    k = linear_map(lambda x: x.to(dtype), k)
    if not isinstance(v, Dual):
        return attention(q, k, v, mask)
    o, do = attention_jvp(q.value, k.value, v.value, q.tangent, k.tangent, v.tangent, mask)
    return Dual(o, do)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


# ---- between the products of a block -------------------------------------------------------------
# Each function has its formula, and calls a kernel of fused.py where that can run. The formula is
# what the kernel is tested against.


class Stream:
    """The residual stream between two kernels. It stands for the sum x + low + gate * y.

    The kernel of the next norm makes the sum while it reads x and y, which saves a pass over
    memory. x and y (B, T, D) are tensors or Duals, gate is (B, 1, D); low, gate and y may be None.

    Under autocast x has 16 bits. low is then what the sum's value lost when it was rounded. It has
    no gradient. So the value stays as precise as 16 bits of mantissa are, while the tangent, all
    gradients, and what is saved for the backward take half of float32's memory.
    """

    def __init__(self, x, low=None, gate=None, y=None):
        self.x = x
        self.low = low
        self.gate = gate
        self.y = y


def total(x):
    """The sum that a Stream stands for. Anything else comes back as it is."""
    if not isinstance(x, Stream):
        return x
    sum = x.x
    if x.low is not None:
        sum = linear_map(at_least_float32, sum) + x.low
    if x.y is not None:
        sum = sum + x.gate * x.y
    return sum


def detach_tangent(x):
    """x, with no gradient through its tangent."""
    if isinstance(x, Stream):
        return Stream(detach_tangent(x.x), x.low, detach_tangent(x.gate), detach_tangent(x.y))
    return Dual(x.value, x.tangent.detach()) if isinstance(x, Dual) else x


def has_kernels(x, layer=None):
    """Whether fused.py can take x (and the bias of the layer that made it)."""
    x = x.x if isinstance(x, Stream) else x
    if layer is not None and (type(layer) is not nn.Linear or layer.bias is None):
        return False
    return fused.why_not(value_of(x)) is None


def add_gated(x, gate, y):
    """x + gate * y, for gate (B, 1, D). With kernels the sum is left to the next norm."""
    if not has_kernels(x):
        return total(x) + gate * y
    gate = linear_map(lambda gate: gate.contiguous(), gate)
    if isinstance(x, Stream):
        return Stream(x.x, x.low, gate, y)
    return Stream(x, None, gate, y)


def norm_modulate(x, shift, scale):
    """x, and its RMS norm times 1 + scale plus shift, (B, 1, D) each. x may be a Stream."""
    if not has_kernels(x):
        x = total(x)
        return x, modulate(rms_norm(x), shift, scale)
    if not isinstance(x, Stream):
        x = Stream(x)
    parts = values_and_tangents(x.x, x.y, x.gate, shift, scale)
    dtype = product_dtype(parts[0])
    x, low, dx, h, dh = fused.add_norm(*parts, low=x.low, dtype=dtype)
    return Stream(pair(x, dx), low), pair(h, dh)


def linear_gelu(layer, x):
    """gelu(linear(layer, x))."""
    if not has_kernels(x, layer):
        return gelu(linear(layer, x))
    u = linear_constant_bias(layer, x)
    return pair(*fused.gelu(value_of(u), tangent_of(u), layer.bias))


def linear_heads(layer, x, heads, q_weight=None, k_weight=None):
    """x (B, T, D) -> queries, keys and values (B, T, heads, d), q and k through an RMS norm.

    Without weights there are no norms.
    """
    if q_weight is not None and has_kernels(x, layer):
        qkv = linear_constant_bias(layer, x)
        parts = fused.qk_norm(value_of(qkv), tangent_of(qkv), q_weight, k_weight, heads, layer.bias)
        return [pair(*part) for part in zip(parts[:3], parts[3:], strict=True)]

    def take_apart(x):
        # Taken apart here and transposed later, the gradients of q, k and v lie side by side, so
        # that the backward of the layer is one product without a copy.
        return x.unflatten(-1, (3, heads, -1)).unbind(2)

    q, k, v = split(take_apart, linear(layer, x))
    if q_weight is not None:
        q = rms_norm(q, q_weight)
        k = rms_norm(k, k_weight)
    return q, k, v


def linear_constant_bias(layer, x):
    """linear(layer, x) with no gradient for the bias, which the next kernel makes in its pass."""
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
