"""
Values and tangents: how a derivative moves through a network, one rule for each operation.

A Dual is a value x and its tangent dx, its derivative along a direction: x + eps dx with
eps^2 = 0. Every function below takes tensors or Duals. A forward pass that is written with them
once therefore gives the value alone or the value and its forward-mode derivative.

To autograd a Dual is two ordinary tensors. Backward, checkpointing and torch.compile work on it
as they are.
"""

import math

import torch
from torch import nn
from torch.nn import functional

from attention_jvp import attention, attention_jvp

EPS = 1e-6  # of every norm


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


def linear_map(f, x):
    """f(x) for a function f that is linear in x: a view, a cast, a slice, a sum."""
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


# ---- shapes and dtypes, for everyone -------------------------------------------------------------


def column(a, like):
    """(B,) -> (B, 1, ..., 1) with as many dimensions as `like`, to be multiplied with it."""
    return a.view(-1, *[1] * (like.ndim - 1))


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def widest(device):
    """float64 where the device has it. Apple's GPUs stop at float32."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
