"""
Values and tangents: the Dual, and one rule for each operation.
"""
import math

import torch
import torch.nn.functional as F

from attention_jvp import attention, attention_jvp

EPS = 1e-6             # of every norm


class Dual:
    """A value and its tangent, tensors of one shape: x + eps dx with eps^2 = 0."""

    def __init__(self, value, tangent):
        self.value, self.tangent = value, tangent

    def __add__(self, other):
        if isinstance(other, Dual):
            return Dual(self.value + other.value, self.tangent + other.tangent)
        return Dual(self.value + other, self.tangent)

    def __mul__(self, other):
        if isinstance(other, Dual):
            return Dual(self.value * other.value, self.tangent * other.value + self.value * other.tangent)
        return Dual(self.value * other, self.tangent * other)

    def __sub__(self, other):
        return self + other * -1

    __radd__ = __add__
    __rmul__ = __mul__


def linear_map(f, x):
    """f(x) for an f that is linear in x (a view, a cast, a sum ...)."""
    return Dual(f(x.value), f(x.tangent)) if isinstance(x, Dual) else f(x)


def split(f, x):
    """The tensors that a linear f takes x apart into, as tensors or as Duals."""
    return [Dual(v, d) for v, d in zip(f(x.value), f(x.tangent))] if isinstance(x, Dual) else f(x)


def linear(layer, x):
    if isinstance(x, Dual):
        return Dual(layer(x.value), F.linear(x.tangent, layer.weight))
    return layer(x)


def silu(x):
    if not isinstance(x, Dual):
        return F.silu(x)
    g = torch.sigmoid(x.value)
    return Dual(x.value * g, g * (1 + x.value * (1 - g)) * x.tangent)


def gelu(x):
    """The tanh form, which is x sigmoid(z) with z = 2 sqrt(2/pi) (x + 0.044715 x^3)."""
    if not isinstance(x, Dual):
        return F.gelu(x, approximate="tanh")
    x, dx = x.value, x.tangent
    c = 2 * math.sqrt(2 / math.pi)
    x2 = x * x
    g = torch.sigmoid(x * (c + (c * 0.044715) * x2))
    dz = c + (3 * c * 0.044715) * x2
    return Dual(x * g, g * (1 + x * (1 - g) * dz) * dx)


def rms_norm(x, weight=None):
    """x / rms(x) over the last dimension, times weight; computed and returned in at least float32."""
    if not isinstance(x, Dual):
        return F.rms_norm(at_least_float32(x), x.shape[-1:], weight, EPS)
    x, dx = at_least_float32(x.value), at_least_float32(x.tangent)
    r = torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)
    y = x * r
    dy = r * (dx - y * (y * dx).mean(-1, keepdim=True))
    return Dual(y, dy) if weight is None else Dual(y * weight, dy * weight)


def layer_norm(x):
    return rms_norm(linear_map(lambda x: x - x.mean(-1, keepdim=True), x))


def attend(q, k, v):
    """Attention with queries and keys cast to v's dtype; (B, H, T, d) each."""
    q, k = (linear_map(lambda x: x.to(v.dtype if not isinstance(v, Dual) else v.value.dtype), x) for x in (q, k))
    if not isinstance(v, Dual):
        return attention(q, k, v)
    return Dual(*attention_jvp(q.value, k.value, v.value, q.tangent, k.tangent, v.tangent))


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def widest(device):
    """float64 where the device has it; Apple's GPUs stop at float32."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
