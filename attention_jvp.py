"""
Softmax attention and its forward-mode derivative, differentiable in every input.

    from attention_jvp import attention, attention_jvp
    o     = attention(q, k, v)                       # (B, H, S, D), as F.scaled_dot_product_attention
    o, to = attention_jvp(q, k, v, tq, tk, tv)       # and its derivative along the tangents tq, tk, tv

With a = scale, row-wise over the keys j:

    S  = a Q K^T,              P  = softmax(S),      O  = P V
    tS = a (tQ K^T + Q tK^T),  mu = sum_j P tS,      tO = (P * (tS - mu)) V + P tV
"""
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad


def attention(q, k, v, scale=None):
    """Softmax attention.

    q (B, H, Sq, D), k and v (B, H, Sk, D): floating, one dtype. scale defaults to D**-0.5.
    Returns o (B, H, Sq, D). Also works under torch.func.jvp and torch.autograd.forward_ad.
    """
    if _inside_forward_ad():
        # PyTorch's flash kernels have no forward-mode rule; these few operations all have one.
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return torch.softmax(q @ k.mT * scale, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def attention_jvp(q, k, v, tq, tk, tv, scale=None):
    """Softmax attention and its derivative along the tangents (tq, tk, tv).

    q, tq (B, H, Sq, D), k, tk, v, tv (B, H, Sk, D): floating, one dtype. scale defaults to D**-0.5.
    Returns o, to, both (B, H, Sq, D) in the inputs' dtype; softmax and row sums are at least float32.
    """
    for name, x, like in (("tq", tq, q), ("tk", tk, k), ("tv", tv, v)):
        if x.shape != like.shape:
            raise ValueError(f"attention_jvp: {name} has shape {tuple(x.shape)}, not {tuple(like.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact = torch.promote_types(v.dtype, torch.float32)
    S = (q @ k.mT).to(exact) * scale                                   # (B, H, Sq, Sk)
    tS = (tq @ k.mT).to(exact).add((q @ tk.mT).to(exact)) * scale      # (B, H, Sq, Sk)
    P = torch.softmax(S, dim=-1)
    N = tS - (P * tS).sum(-1, keepdim=True)
    PN, P = (P * N).to(v.dtype), P.to(v.dtype)
    return P @ v, PN @ v + P @ tv


def _inside_forward_ad():
    return forward_ad._current_level >= 0
