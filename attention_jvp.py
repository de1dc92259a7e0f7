# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the contributors. MIT License: https://opensource.org/license/mit
#
# ruff: noqa: RET505, SIM102
# In kernels, code after an early return is compiled all the same, so `else` stays. An `if` that the
# compiler decides stays apart from one that the running program decides.
"""Softmax attention together with its derivative along a direction, in fused Triton kernels.

One file that needs torch and triton only: copy it, with the two lines of its licence above. The
page docs/attention.md has recipes.

    from attention_jvp import attention, attention_jvp
    o, to = attention_jvp(q, k, v, tq, tk, tv)     # value and tangent, (B, H, S, D) each
    o = attention(q, k, v)                         # plain; under torch.func.jvp it does the above

Both take the further arguments of F.scaled_dot_product_attention (masks, causal, scale, grouped
queries), and backward goes through value and tangent at once.

The maths
---------
a is the scale, i runs over queries, j over keys, and tX is the tangent of X. Forward:

    S  = a Q K^T         P  = softmax(S)             O  = P V
    tS = a (tQ K^T + Q tK^T)
    mu = rowsum(P tS)    N  = tS - mu                tO = (P N) V + P tV

Backward, from dO and dtO together. The row sums s1 and s2 come from the saved outputs, so no extra
pass over the (Sq, Sk) scores prepares them:

    A  = dtO V^T                  s1 = rowsum(dtO O)
    B  = dO V^T + dtO tV^T        s2 = rowsum(dtO tO) + rowsum(dO O)
    Gt = P (A - s1)                            the gradient of tS
    G  = P (B - s2 + (A - s1) N)               the gradient of S
    dQ  = a (G K + Gt tK)         dK  = a (G^T Q + Gt^T tQ)      dV  = P^T dO + (P N)^T dtO
    dtQ = a Gt K                  dtK = a Gt^T Q                 dtV = P^T dtO

The file, in order
------------------
1. Switches and limits.
2. The formulas in plain PyTorch: `attention_reference`, `attention_jvp_reference`.
3. Three kernels: `forward_kernel` (6 products, online softmax), `row_kernel` (s1, s2, dQ, dtQ;
   9 products) and `column_kernel` (dK, dV, dtK, dtV; 12 products). Products take the dtype of the
   inputs and accumulate in float32; everything else is float32.
4. Tiles: a measured table for Hopper, and tuning on first use for other GPUs.
5. Launching, and the operators that torch.compile and autograd see.
6. The two public functions and their checks.

Saved for the backward: inputs, outputs, two float32 rows, three numbers a sample of a key mask, and
four more bits of tO than its dtype holds (see `low_bits`; a quarter of tO's size for powers of two
from 16 on, at most half for other head sizes from 8 on).
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import re
import sys
import threading
import time
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def _need(name, version, least):
    """Raises an ImportError of one line where a library is older than `least`, (major, minor)."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < least:
        needed = f"{name} {least[0]}.{least[1]} or newer"
        raise ImportError(f"attention_jvp needs {needed}, and this is {name} {version}")


_need("torch", torch.__version__, (2, 11))
NO_TRITON = "Triton is not installed"  # or another reason, where `triton` is None
try:
    import triton

    _need("triton", triton.__version__, (3, 6))
    import triton.language as tl
    from triton.language.extra.cuda import libdevice
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:  # without Triton every call takes the PyTorch path
    if error.name != "triton":
        NO_TRITON = str(error)
    triton = None

# ---------------------------------------------------------------------------------------------
# 1. Switches and limits. Set a switch on the module (`import attention_jvp as kernels`, then
# `kernels.FUSED = ...`): `from attention_jvp import attention_jvp` gives the function.

FUSED = True  # False: the PyTorch path always; "require": an error where the kernels cannot run
HOPPER_KERNELS = False  # True: those of attention_hopper.py, an optional file, where they can run
TUNE = True  # False: GPUs without a table of tiles take small ones, and nothing is timed
CACHE = os.environ.get("ATTENTION_JVP_CACHE", "~/.cache/attention_jvp")  # where tuning is kept

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # kernels on CPU tensors, for tests
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_HEAD_SIZE = 256
FLOAT32_UP_TO = 160  # the largest head size in float32 where a program has 99 KB of shared memory
MAX_GRID = 65535  # programs along the second and third axis of a launch
MAX_ROW = 2**24  # elements from row to row, so that offsets inside a tile fit in int32
TMA_FROM = 2**25  # scores; making descriptors takes the host 10 us, too long for smaller calls
# An additive mask of this or less hides the key, as -inf does. People hide keys with -1e6, which
# bfloat16 rounds up to -999424.
MASKED_BELOW = -999424.0
MOST_READY = 4096  # compiled launches that a process remembers, of calls of different shapes

# The operators have this module's name, so that two copies of it in one process are apart.
NAMESPACE = re.sub("^(?=[0-9])|[^0-9A-Za-z_]", "_", __name__)


# ---------------------------------------------------------------------------------------------
# 2. PyTorch: any device, any dtype, differentiable to any order, memory quadratic in S


def attention_reference(
    q,
    k,
    v,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """`attention` in plain PyTorch operations, which every transform can follow. They compute in
    float32 at least; under autocast the inputs are cast before, as those of `attention` are."""
    name = "attention_reference"
    checked = _checked(
        name, q, k, v, None, None, None, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    return _reference(*checked.tensors, checked.mask, is_causal, checked.scale)[0]


def attention_jvp_reference(
    q,
    k,
    v,
    tq,
    tk,
    tv,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """`attention_jvp` in plain PyTorch operations, as `attention_reference`."""
    name = "attention_jvp_reference"
    checked = _checked(
        name, q, k, v, tq, tk, tv, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    return _reference(*checked.tensors, checked.mask, is_causal, checked.scale)


def _without_autocast(device_type):
    if device_type == "meta":  # has none
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _reference(q, k, v, tq, tk, tv, mask, causal, scale):
    """(o, to) by the formulas at the top; to is None where all tangents are. The arguments have
    been through `_checked`.

    All of it is computed in float32 (float64 for float64) and rounded once, at the end: in half
    precision the scores overflow or lose the digits that softmax needs.
    """
    dtype = v.dtype
    exact = torch.promote_types(dtype, torch.float32)
    groups = q.size(1) // max(1, k.size(1))

    def prepared(x, repeat):
        if x is None:
            return None
        x = x.to(exact)
        return x.repeat_interleave(groups, dim=1) if repeat and groups > 1 else x

    q, tq = prepared(q, False), prepared(tq, False)
    k, tk = prepared(k, True), prepared(tk, True)
    v, tv = prepared(v, True), prepared(tv, True)
    with _without_autocast(q.device.type):  # which would round the products again
        S = (q @ k.mT) * scale
        hidden = None  # True where a query may not see a key
        if mask is not None and mask.dtype == torch.bool:
            hidden = ~mask
        elif mask is not None:
            hidden = mask <= MASKED_BELOW
            S = S + mask.to(exact).masked_fill(hidden, 0)
        if causal:
            future = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).triu(1)
            hidden = future if hidden is None else hidden | future
        if hidden is None:
            P = S.softmax(-1)
        else:  # rows where every key is hidden become zeros, and so do their gradients
            empty = hidden.all(-1, keepdim=True)
            P = S.masked_fill(hidden & ~empty, -math.inf).softmax(-1).masked_fill(hidden, 0)
        tS = None
        if tq is not None:
            tS = tq @ k.mT
        if tk is not None:
            product = q @ tk.mT
            tS = product if tS is None else tS + product
        if tS is not None:
            tS = tS * scale
            N = tS - (P * tS).sum(-1, keepdim=True)
            PN = P * N

        # The outputs come last. Autograd adds gradients in the opposite order of the forward, so
        # another order here would change the last bits of gradients.
        o = P @ v
        to = None
        if tS is not None:
            to = PN @ v
        if tv is not None:
            product = P @ tv
            to = product if to is None else to + product
    return o.to(dtype), None if to is None else to.to(dtype)


# ---------------------------------------------------------------------------------------------
# 3. Kernels
#
# A tile of rows, (rows, D), is a tuple of one or two chunks of columns. The widths of the chunks
# are powers of two: a head size of 72 is 64 + 16, not 128. BM counts queries and BN keys.


class Widths(NamedTuple):
    """What the kernels know about a row of the tensors."""

    unit: int  # strides are given in multiples of this, so that the compiler sees aligned rows
    size: int  # the head size D
    first: int  # columns of the first chunk
    second: int  # columns of the second chunk, or 0


def chunk_widths(D):
    """Head size -> widths of its one or two chunks: powers of two, at least 16, little padding."""
    first = max(16, 1 << (D.bit_length() - 1))
    if first >= D:
        return first, 0
    second = max(16, 1 << (D - first - 1).bit_length())
    if second < first:
        return first, second
    return 2 * first, 0


if triton is not None:
    LOG2E = tl.constexpr(math.log2(math.e))
    INTERPRETED = tl.constexpr(INTERPRET)
    HIDDEN = tl.constexpr(MASKED_BELOW)
    NO_MASK = tl.constexpr(0)
    KEY_MASK = tl.constexpr(1)  # one row for all queries and heads: (B, 1, 1, Sk)
    DENSE_MASK = tl.constexpr(2)
    SPAN = tl.constexpr(512)  # keys of a key mask that are looked at together

    @triton.jit
    def offset(b, h, row, st):
        """Where X[b, h, row] begins, in units of the strides; in int64, for large tensors."""
        at = tl.cast(b, tl.int64) * st[0]
        at += tl.cast(h, tl.int64) * st[1]
        return at + tl.cast(row, tl.int64) * st[2]

    # fmt: off
    @triton.jit
    def load(X, b, h, row, end, st, W: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
             TMA: tl.constexpr):
        # fmt: on
        """X[b, h, row : row + ROWS] as a tile, zero from row `end` on. X is a descriptor (TMA)
        or a pointer. EVEN: all of these rows exist."""
        if TMA:
            return (tl.reshape(X.load([b, h, row, 0]), [ROWS, W.first]),)
        else:
            X += offset(b, h, row, st) * W.unit
            r = tl.arange(0, ROWS)[:, None]
            c = tl.arange(0, W.first)[None, :]
            if EVEN and W.first <= W.size:
                x = tl.load(X + r * (st[2] * W.unit) + c)
            else:
                inside = (row + r < end) & (c < W.size)
                x = tl.load(X + r * (st[2] * W.unit) + c, mask=inside, other=0.0)
            if W.second == 0:
                return (x,)
            else:
                c = W.first + tl.arange(0, W.second)[None, :]
                inside = (row + r < end) & (c < W.size)
                return (x, tl.load(X + r * (st[2] * W.unit) + c, mask=inside, other=0.0))

    @triton.jit
    def load_pair(X, Y, b, h, row, end, stx, sty, W: tl.constexpr, ROWS: tl.constexpr):
        """The tiles of X and of Y below each other, (2 ROWS, D), so that one product serves both
        and the program waits once. The addresses of X and Y differ by a multiple of W.unit."""
        i = tl.arange(0, 2 * ROWS)
        r = i % ROWS
        to_x = offset(b, h, row, stx)
        to_y = offset(b, h, row, sty)
        bytes_per_unit = W.unit * (X.dtype.element_ty.primitive_bitwidth // 8)
        to_y += (Y.to(tl.int64) - X.to(tl.int64)) // bytes_per_unit
        X += (tl.where(i < ROWS, to_x + r * stx[2], to_y + r * sty[2]) * W.unit)[:, None]
        c = tl.arange(0, W.first)[None, :]
        x = tl.load(X + c, mask=(row + r < end)[:, None] & (c < W.size), other=0.0)
        if W.second == 0:
            return (x,)
        else:
            c = W.first + tl.arange(0, W.second)[None, :]
            return (x, tl.load(X + c, mask=(row + r < end)[:, None] & (c < W.size), other=0.0))

    @triton.jit
    def halves(x):
        """The upper and the lower half of the rows."""
        x = tl.reshape(x, (2, x.shape[0] // 2, x.shape[1]))
        return tl.split(tl.permute(x, (1, 2, 0)))

    @triton.jit
    def store(X, x, b, h, row, end, st, W: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr):
        """Writes a tile to X[b, h, row : row + ROWS], in X's dtype."""
        X += offset(b, h, row, st) * W.unit
        r = tl.arange(0, ROWS)[:, None]
        for n in tl.static_range(len(x)):
            c = n * x[0].shape[1] + tl.arange(0, x[n].shape[1])[None, :]
            to = X + r * (st[2] * W.unit) + c
            if EVEN and (n + 1) * x[0].shape[1] <= W.size:
                tl.store(to, x[n].to(X.dtype.element_ty))
            else:
                inside = (row + r < end) & (c < W.size)
                tl.store(to, x[n].to(X.dtype.element_ty), mask=inside)

    @triton.jit
    def zeros(ROWS: tl.constexpr, W: tl.constexpr):
        """A tile of float32 zeros."""
        if W.second == 0:
            return (tl.full((ROWS, W.first), 0.0, tl.float32),)
        else:
            x = tl.full((ROWS, W.first), 0.0, tl.float32)
            return (x, tl.full((ROWS, W.second), 0.0, tl.float32))

    @triton.jit
    def dot_t(x, y, acc, PREC: tl.constexpr):
        """x y^T + acc: a product over the head dimension. acc may be None."""
        for n in tl.static_range(len(x)):
            acc = tl.dot(x[n], tl.trans(y[n]), acc, input_precision=PREC)
        return acc

    @triton.jit
    def dot(p, x, acc, PREC: tl.constexpr):
        """p x + acc: scores or their like, times a tile."""
        out = ()
        for n in tl.static_range(len(x)):
            out = out + (tl.dot(p, x[n], acc[n], input_precision=PREC),)
        return out

    @triton.jit
    def times(x, r):
        """x r, for a factor a row or one for all."""
        out = ()
        for n in tl.static_range(len(x)):
            out = out + (x[n] * r,)
        return out

    @triton.jit
    def plus(x, r, y):
        """x + r y, where the tile y may have a single row."""
        out = ()
        for n in tl.static_range(len(x)):
            out = out + (x[n] + r * y[n].to(tl.float32),)
        return out

    @triton.jit
    def where(condition, x):
        """x in the rows where the condition, a column, holds, and zeros in the others."""
        out = ()
        for n in tl.static_range(len(x)):
            out = out + (tl.where(condition, x[n], 0.0),)
        return out

    @triton.jit
    def row_sums(x, y):
        """The sums of x y over the head dimension, in float32."""
        total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
        if len(x) == 2:
            total += tl.sum(x[1].to(tl.float32) * y[1].to(tl.float32), 1)
        return total

    @triton.jit
    def column_sums(x):
        """The sum of a tile's rows, as a tile of one row."""
        out = ()
        for n in tl.static_range(len(x)):
            out = out + (tl.sum(x[n].to(tl.float32), 0)[None, :],)
        return out

    @triton.jit
    def log2(x):
        """One instruction with an error of 2^-22; tl.log2 takes forty."""
        if INTERPRETED:
            return tl.log2(x)
        else:
            return libdevice.fast_log2f(x)

    # The low bits of tO. The backward forms rowsum(dtO tO), and where tV has a large common part
    # this sum cancels: a tO rounded to 16 bits has then lost the digits that count. So the forward
    # also saves the first four bits that the rounding drops (L), and the backward puts them back.
    #
    #     a float32 of tO    s eeeeeeee mmmmmmm LLLL xxxxxxxxxxxx       bfloat16: L = bits 15 to 12
    #                        s eeeeeeee mmmmmmmmmm LLLL xxxxxxxxx       float16:  L = bits 12 to 9
    #                        <--- kept in TO ---> <LO>
    #
    # Eight columns share an int32 word. They are 8 apart, because one thread holds those: of every
    # 64 columns, word w (0 to 7) has
    #
    #     bit      31..28   27..24   23..20   19..16   15..12   11..8    7..4     3..0
    #     column   w + 56   w + 48   w + 40   w + 32   w + 24   w + 16   w + 8    w
    #
    # Chunks of 32 and 16 columns have 8 words as well, of four or two columns each. All words of LO
    # have one dtype, that of the first chunk: int32, int16 where it has 32 columns, int8 where 16.

    @triton.jit
    def bits_of(x):
        return x.to(tl.float32).to(tl.int32, bitcast=True)

    @triton.constexpr_function
    def low_words(width):
        """Words of low bits for a chunk of this many columns."""
        if width == 0:
            return 0
        return max(8, width // 8)

    @triton.constexpr_function
    def low_widths(W):
        """The Widths of LO's rows."""
        first = low_words(W.first)
        second = low_words(W.second)
        return Widths(first + second, first + second, first, second)

    @triton.jit
    def odd(x):
        """Float32 tiles with their last bit set. No value is then a tie between two neighbours of
        16 bits; a tie rounded down to even would come back from its low bits one unit too low."""
        out = ()
        for n in tl.static_range(len(x)):
            out = out + ((bits_of(x[n]) | 1).to(tl.float32, bitcast=True),)
        return out

    @triton.jit
    def chunk_low_bits(x, dtype: tl.constexpr):
        """Words of the four bits after those that dtype keeps, of one `odd` float32 chunk."""
        SHIFT: tl.constexpr = 12 if dtype == tl.bfloat16 else 9
        GROUPS: tl.constexpr = low_words(x.shape[1]) // 8
        PER_WORD: tl.constexpr = x.shape[1] // (8 * GROUPS)
        lo = bits_of(x) >> SHIFT & 15
        lo = tl.reshape(lo, (x.shape[0], GROUPS, PER_WORD, 8))
        lo = lo << (4 * tl.arange(0, PER_WORD))[None, None, :, None]
        return tl.reshape(tl.sum(lo, 2), (x.shape[0], 8 * GROUPS))

    @triton.jit
    def low_bits(x, dtype: tl.constexpr):
        out = ()
        for n in tl.static_range(len(x)):
            out = out + (chunk_low_bits(x[n], dtype),)
        return out

    @triton.jit
    def chunk_with_low_bits(x, lo):
        """One float32 chunk again, from what was rounded and its low bits."""
        SHIFT: tl.constexpr = 12 if x.dtype == tl.bfloat16 else 9
        GROUPS: tl.constexpr = lo.shape[1] // 8
        PER_WORD: tl.constexpr = x.shape[1] // (8 * GROUPS)
        # Four bits as a signed number, -8 to 7: negative where rounding went up.
        y = tl.reshape(lo.to(tl.int32), (x.shape[0], GROUPS, 1, 8))
        y = y << (28 - 4 * tl.arange(0, PER_WORD))[None, None, :, None] >> 28
        y = tl.reshape(y, x.shape)
        y = (bits_of(x) + (y << SHIFT)).to(tl.float32, bitcast=True)
        if x.dtype == tl.float16:  # below 2^-14 it keeps other bits than those
            rounded = x.to(tl.float32)
            y = tl.where(tl.abs(rounded) >= 2**-14, y, rounded)
        return y

    @triton.jit
    def with_low_bits(x, lo):
        out = ()
        for n in tl.static_range(len(x)):
            out = out + (chunk_with_low_bits(x[n], lo[n]),)
        return out

    @triton.jit
    def load_row(X, i, end, ROWS: tl.constexpr, EVEN: tl.constexpr, other: tl.constexpr):
        """X[i : i + ROWS], `other` from `end` on."""
        X += i
        r = tl.arange(0, ROWS)
        if EVEN:
            return tl.load(X + r)
        else:
            return tl.load(X + r, mask=i + r < end, other=other)

    @triton.jit
    def block_of(rows, H, BLOCK: tl.constexpr, FLAT: tl.constexpr, LAST_FIRST: tl.constexpr):
        """Which rows this program takes: b H + h, b, h, first row. Blocks of one head are
        neighbours and share the L2 cache. FLAT: all programs lie along the first axis of the grid,
        because the others end at 65,535. LAST_FIRST: the last rows, which under a causal mask have
        the most work, start first."""
        blocks = tl.cdiv(rows, BLOCK)
        if FLAT:
            bh = tl.program_id(0) // blocks
            b = bh // H
            h = bh % H
            block = tl.program_id(0) % blocks
        else:
            b = tl.program_id(2)
            h = tl.program_id(1)
            bh = b * H + h
            block = tl.program_id(0)
        if LAST_FIRST:
            block = blocks - 1 - block
        return bh, b, h, block * BLOCK

    # fmt: off
    @triton.jit
    def hide(S, MASK, st, b, h, i, j, Sq, Sk, scale, MASKED: tl.constexpr, CAUSAL: tl.constexpr):
        # fmt: on
        """Scores S (not yet scaled) with -inf where query i may not see key j, and with an additive
        mask added. i and j are index rows or columns that broadcast to S's shape."""
        if CAUSAL:
            S = tl.where(j <= i, S, float("-inf"))
        if MASKED != NO_MASK:
            MASK += tl.cast(b, tl.int64) * st[0]
            at = tl.cast(j, tl.int64) * st[3]
            inside = j < Sk
            if MASKED == DENSE_MASK:
                MASK += tl.cast(h, tl.int64) * st[1]
                at = at + tl.cast(i, tl.int64) * st[2]
                inside = inside & (i < Sq)
            mask = tl.load(MASK + at, mask=inside, other=0)
            if MASK.dtype.element_ty == tl.uint8:
                S = tl.where(mask != 0, S, float("-inf"))
            else:
                mask = mask.to(tl.float32)
                S = tl.where(inside & ~(mask <= HIDDEN), S + mask * (1 / scale), float("-inf"))
        return S

    @triton.jit
    def key_mask(MASK, st, b, j, Sk):
        """Of the keys j: what a key mask adds to their scores, and whether they are seen."""
        inside = j < Sk
        at = tl.cast(b, tl.int64) * st[0] + tl.cast(j, tl.int64) * st[3]
        mask = tl.load(MASK + at, mask=inside, other=0)
        if MASK.dtype.element_ty == tl.uint8:
            return tl.zeros_like(mask).to(tl.float32), inside & (mask != 0)
        else:
            mask = mask.to(tl.float32)
            return mask, inside & ~(mask <= HIDDEN)  # NaN is seen, and makes NaN

    @triton.jit
    def extremes(a, b, c, x, y, z):
        """How `tl.reduce` finds two minima and a maximum at once."""
        return tl.minimum(a, x), tl.minimum(b, y), tl.maximum(c, z)

    @triton.jit
    def extremes_of_span(MASK, st, b, n0, Sk):
        """For each key j of the SPAN keys from n0 on: j where a key mask changes its scores, else
        2**30; j where it is seen, else 2**30; and j + 1 where it is seen, else 0."""
        j = n0 + tl.arange(0, SPAN)
        added, seen = key_mask(MASK, st, b, j, Sk)
        untouched = (seen & (added == 0)) | (j >= Sk)
        return tl.where(untouched, 2**30, j), tl.where(seen, j, 2**30), tl.where(seen, j + 1, 0)

    @triton.jit
    def seen_keys(mask_from, seen_from, seen_to, MASK, st, b, Sk):
        """Of a key mask: the first key whose scores it changes, the first key that is seen, and the
        one after the last that is seen. The first three arguments: `extremes_of_span` of the first
        SPAN keys. Where no key is seen, the second is 2**30 and the third 0."""
        for n0 in range(SPAN, Sk, SPAN):
            next_mask_from, next_seen_from, next_seen_to = extremes_of_span(MASK, st, b, n0, Sk)
            mask_from = tl.minimum(mask_from, next_mask_from)
            seen_from = tl.minimum(seen_from, next_seen_from)
            seen_to = tl.maximum(seen_to, next_seen_to)
        return tl.reduce((mask_from, seen_from, seen_to), 0, extremes)

    @triton.constexpr_function
    def skips(MASKED, CAUSAL, W):
        """Whether blocks of keys before `mask_from`, which need no mask, branch around it. In long
        rows the branch of a causal mask takes too many registers."""
        return KEY_MASK.value == MASKED or (CAUSAL and W.first + W.second <= 64)

    @triton.jit
    def load_seen(SEEN, b):
        """What `seen_keys` found: keys before `mask_from` need no mask, and all that are seen lie
        from `seen_from` up to `seen_to`."""
        SEEN += 3 * b
        return tl.load(SEEN), tl.load(SEEN + 1), tl.load(SEEN + 2)

    @triton.jit
    def centred(P, tS, centre, sum_P, sum_PC):
        """PC = P (tS - centre), and the row sums of P and of PC added to sum_P and sum_PC, which
        hold eight partial sums a row."""
        BM: tl.constexpr = P.shape[0]
        BN: tl.constexpr = P.shape[1]
        PC = P * (tS - centre[:, None])
        sum_P += tl.sum(tl.reshape(P, (BM, BN // 8, 8)), 1)
        sum_PC += tl.sum(tl.reshape(PC, (BM, BN // 8, 8)), 1)
        return PC, sum_P, sum_PC

    # What the three kernels have in common:
    #   A tensor that is None does not exist: a tangent is then zero, an output is not wanted. The
    #   compiler drops all work for it. MASKED is one of the kinds of masks above, CAUSAL hides the
    #   keys after the query, and GROUP queries' heads share one head of keys. EVEN: the rows that
    #   the loop reads fill its blocks. SAME: what the loop reads has the same strides.
    #   SCORES_MOVE: there is a tQ or a tK, so tS is not zero.
    #   stX: the first three strides of X (B, H, S, D), in units of W.unit. sto: those of a kernel's
    #   outputs, and of O and TO where it reads these. stmask: four strides, in elements.
    #
    # Names are those of the formulas at the top, and these:
    #   S, tS   are multiplied by the scale where they are used, not where they are made.
    #   PC      P (tS - centre). mu is known only after the last key. So the forward subtracts an
    #           estimate of it, the centre, and corrects at the end:
    #           tO = (sum of PC V + P tV) / sum of P - (mu - centre) O.
    #   A_s1    A - s1, so that Gt = P A_s1.
    #   G_by_P  B - s2 + (A - s1) N, so that G = P G_by_P.

    # fmt: off
    @triton.jit
    def forward_kernel(Q, K, V, TQ, TK, TV, O, TO, LO, LSE, MU, MASK, SEEN,
                       stq, stk, stv, sttq, sttk, sttv, sto, stmask, H, Sq, Sk, scale,
                       MASKED: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
                       W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
                       FULL: tl.constexpr, TMA: tl.constexpr, SAME: tl.constexpr,
                       FLAT: tl.constexpr, PREC: tl.constexpr):
        # fmt: on
        """O, TO, its low bits LO, the logsumexp LSE (in base 2) and MU of a block of queries; SEEN
        of a key mask. FULL: the queries fill their blocks."""
        SCORES_MOVE: tl.constexpr = TQ is not None or TK is not None
        # Where PC is not first, it is made while P's own products run: 2% faster at a head size of
        # 64, 3% slower at 128.
        PC_FIRST: tl.constexpr = W.first >= 128
        # With small heads a few keys often have most of P. The mean under P is then nearer to mu
        # than the plain mean.
        CENTRE_BY_P: tl.constexpr = W.first < 64
        ADDS: tl.constexpr = MASKED == KEY_MASK and MASK.dtype.element_ty != tl.uint8
        # Under these masks the keys that have most of a query's weight may begin in any block.
        RECENTRES: tl.constexpr = MASKED == DENSE_MASK or ADDS
        SKIPS: tl.constexpr = skips(MASKED, CAUSAL, W)
        if SAME:
            stv = stk
            sttk = stk
            sttv = stk
        bh, b, h, m0 = block_of(Sq, H, BM, FLAT, CAUSAL)
        hk = h
        if GROUP > 1:
            hk = h // GROUP
        if MASKED == KEY_MASK:  # loaded first, because the loop's length depends on it
            mask_from, seen_from, end = extremes_of_span(MASK, stmask, b, 0, Sk)
        q = load(Q, b, h, m0, Sq, stq, W, BM, FULL, False)
        if TQ is not None:
            tq = load(TQ, b, h, m0, Sq, sttq, W, BM, FULL, False)
        centre = tl.full((BM,), 0.0, tl.float32)
        m = tl.full((BM,), float("-inf"), tl.float32)  # running maximum, in units of log2
        sum_P = tl.full((BM, 8), 0.0, tl.float32)
        sum_PC = tl.full((BM, 8), 0.0, tl.float32)
        o = zeros(BM, W)
        to = zeros(BM, W)
        scale2 = scale * LOG2E
        if MASKED == KEY_MASK:
            # The backward takes these numbers from SEEN.
            mask_from, seen_from, end = seen_keys(mask_from, seen_from, end, MASK, stmask, b, Sk)
            if SEEN is not None:
                if m0 == 0 and h == 0:
                    tl.store(SEEN + 3 * b, mask_from)
                    tl.store(SEEN + 3 * b + 1, seen_from)
                    tl.store(SEEN + 3 * b + 2, end)
            start = seen_from // BN * BN
        else:
            start = 0
            end = Sk
            if CAUSAL:
                end = tl.minimum(Sk, m0 + BM)
                mask_from = m0
        for n0 in range(start, end, BN):
            k = load(K, b, hk, n0, Sk, stk, W, BN, EVEN, TMA)
            if TK is not None:
                tk = load(TK, b, hk, n0, Sk, sttk, W, BN, EVEN, TMA)
            S = dot_t(q, k, None, PREC)
            if SKIPS:
                # Before the products of tS, which then run while the maximum of S is found. (Where
                # every block hides keys that takes too many registers.)
                if n0 + BN > mask_from:
                    i = (m0 + tl.arange(0, BM))[:, None]
                    j = (n0 + tl.arange(0, BN))[None, :]
                    S = hide(S, MASK, stmask, b, h, i, j, Sq, Sk, scale, MASKED, CAUSAL)
            tS = None
            if TQ is not None:
                tS = dot_t(tq, k, tS, PREC)
            if TK is not None:
                tS = dot_t(q, tk, tS, PREC)
            j = (n0 + tl.arange(0, BN))[None, :]
            if not EVEN:
                S = tl.where(j < Sk, S, float("-inf"))
            if (CAUSAL or MASKED == DENSE_MASK) and not SKIPS:
                i = (m0 + tl.arange(0, BM))[:, None]
                S = hide(S, MASK, stmask, b, h, i, j, Sq, Sk, scale, MASKED, CAUSAL)
            m_new = tl.maximum(m, tl.max(S, 1) * scale2)
            shift = m_new
            if MASKED == DENSE_MASK:
                # No key seen yet: any finite shift leaves P = 0.
                shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            P = tl.exp2(S * scale2 - shift[:, None])
            if SCORES_MOVE and not RECENTRES:
                # Centred on a mean over the first keys, PC keeps its digits where tK has a large
                # common part. Hidden keys may lack that part, so they must not count.
                if n0 == start:
                    if CENTRE_BY_P or CAUSAL or MASKED == KEY_MASK:
                        centre = tl.sum(P * tS, 1) / tl.sum(P, 1) * scale
                    else:
                        centre = tl.sum(tS, 1) * (scale / tl.minimum(BN, Sk))
            alpha = tl.exp2(m - shift)
            sum_P = sum_P * alpha[:, None]
            sum_PC = sum_PC * alpha[:, None]
            o = times(o, alpha[:, None])
            to = times(to, alpha[:, None])
            if SCORES_MOVE and RECENTRES:
                # Keys before may be hidden, or have next to no weight, and their tK be far from the
                # common part. So where this block has far more weight, it gives the centre.
                mean = tl.sum(P * tS, 1) / tl.maximum(tl.sum(P, 1), 1e-30) * scale
                moved = tl.where(alpha < 2**-8, centre - mean, 0.0)
                centre -= moved
                sum_PC += moved[:, None] * sum_P
                to = plus(to, moved[:, None], o)
            m = m_new
            if SCORES_MOVE and PC_FIRST:
                PC, sum_P, sum_PC = centred(P, tS * scale, centre, sum_P, sum_PC)
            v = load(V, b, hk, n0, Sk, stv, W, BN, EVEN, TMA)
            if TV is not None:
                tv = load(TV, b, hk, n0, Sk, sttv, W, BN, EVEN, TMA)
            P_rounded = P.to(v[0].dtype)
            o = dot(P_rounded, v, o, PREC)
            if SCORES_MOVE and PC_FIRST:
                to = dot(PC.to(v[0].dtype), v, to, PREC)
            if TV is not None:
                to = dot(P_rounded, tv, to, PREC)
            if SCORES_MOVE and not PC_FIRST:
                PC, sum_P, sum_PC = centred(P, tS * scale, centre, sum_P, sum_PC)
                to = dot(PC.to(v[0].dtype), v, to, PREC)
            if not SCORES_MOVE:
                sum_P += tl.sum(tl.reshape(P, (BM, BN // 8, 8)), 1)
        total = tl.sum(sum_P, 1)
        if MASKED != NO_MASK:  # a query that sees no key: O = TO = 0
            total = tl.where(total == 0, 1.0, total)
        rest_of_mu = tl.sum(sum_PC, 1) / total  # mu - centre
        o = times(o, (1 / total)[:, None])
        store(O, o, b, h, m0, Sq, sto, W, BM, FULL)
        to = plus(times(to, (1 / total)[:, None]), -rest_of_mu[:, None], o)
        if TO.dtype.element_ty != tl.float32:
            to = odd(to)
        store(TO, to, b, h, m0, Sq, sto, W, BM, FULL)
        if LO is not None:
            lo = low_bits(to, TO.dtype.element_ty)
            store(LO, lo, b, h, m0, Sq, (H * Sq, Sq, 1), low_widths(W), BM, FULL)
        lse = m + log2(total)
        if MASKED != NO_MASK:  # so the backward finds P = exp2(S - lse) = 0
            lse = tl.where(m == float("-inf"), float("inf"), lse)
        i = m0 + tl.arange(0, BM)
        tl.store(LSE + tl.cast(bh, tl.int64) * Sq + i, lse, mask=i < Sq)
        tl.store(MU + tl.cast(bh, tl.int64) * Sq + i, rest_of_mu + centre, mask=i < Sq)

    # fmt: off
    @triton.jit
    def row_kernel(Q, K, V, TQ, TK, TV, DO, DTO, O, TO, LO, LSE, MU, MASK, SEEN,
                   S1, S2, DQ, DTQ, K0, TK0,
                   stq, stk, stv, sttq, sttk, sttv, stdo, stdto, sto, stmask, H, Sq, Sk, scale,
                   MASKED: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
                   W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
                   TMA: tl.constexpr, SAME: tl.constexpr, FLAT: tl.constexpr, PREC: tl.constexpr):
        # fmt: on
        """S1 and S2 of a block of queries; DQ and DTQ where they are wanted. K0 and TK0 are K and
        TK once more, always as pointers: a descriptor loads BN rows, and in the end 16 are needed.
        K0 is None without a mask, where it is not needed."""
        PRIMAL: tl.constexpr = DQ is not None
        TANGENT: tl.constexpr = DTQ is not None
        SCORES_MOVE: tl.constexpr = TQ is not None or TK is not None
        HIDES: tl.constexpr = CAUSAL or MASKED != NO_MASK
        SKIPS: tl.constexpr = skips(MASKED, CAUSAL, W)
        if SAME:
            stv = stk
            sttk = stk
            sttv = stk
        bh, b, h, m0 = block_of(Sq, H, BM, FLAT, CAUSAL)
        hk = h
        if GROUP > 1:
            hk = h // GROUP
        i = m0 + tl.arange(0, BM)
        row = tl.cast(bh, tl.int64) * Sq + i
        if MASKED == KEY_MASK:
            mask_from, seen_from, end = load_seen(SEEN, b)
            start = seen_from // BN * BN
        else:
            start = 0
            seen_from = 0
            end = Sk
            mask_from = m0
        o = load(O, b, h, m0, Sq, sto, W, BM, False, False)
        do = load(DO, b, h, m0, Sq, stdo, W, BM, False, False)
        if DTO is not None:
            dto = load(DTO, b, h, m0, Sq, stdto, W, BM, False, False)
            to = load(TO, b, h, m0, Sq, sto, W, BM, False, False)
            if LO is not None:
                words: tl.constexpr = low_widths(W)
                lo = load(LO, b, h, m0, Sq, (H * Sq, Sq, 1), words, BM, False, False)
        if PRIMAL or TANGENT:
            q = load(Q, b, h, m0, Sq, stq, W, BM, False, False)
            lse = tl.load(LSE + row, mask=i < Sq, other=0.0)
            if SCORES_MOVE:
                if TQ is not None:
                    tq = load(TQ, b, h, m0, Sq, sttq, W, BM, False, False)
                mu = tl.load(MU + row, mask=i < Sq, other=0.0)
        s2 = row_sums(do, o)
        if DTO is not None:
            s1 = row_sums(dto, o)
            if LO is not None:
                to = with_low_bits(to, lo)
            s2 += row_sums(dto, to)
        if PRIMAL or TANGENT:
            dq = zeros(BM, W)
            if SCORES_MOVE:
                dtq = zeros(BM, W)
                # Row sums of Gt by the tensor cores, whose least width is 8.
                delta = tl.full((BM, 8), 0.0, tl.float32)
                ones = tl.full((BN, 8), 1.0, q[0].dtype)
            last = end
            if CAUSAL:
                last = tl.minimum(Sk, m0 + BM)
            for n0 in range(start, last, BN):
                k = load(K, b, hk, n0, Sk, stk, W, BN, EVEN, TMA)
                v = load(V, b, hk, n0, Sk, stv, W, BN, EVEN, TMA)
                # P multiplies everything and comes last: few tiles are alive before, which saves
                # registers.
                if SCORES_MOVE:
                    A_s1 = dot_t(dto, v, None, PREC) - s1[:, None]
                if PRIMAL:
                    if TK is not None:
                        tk = load(TK, b, hk, n0, Sk, sttk, W, BN, EVEN, TMA)
                    if TV is not None:
                        tv = load(TV, b, hk, n0, Sk, sttv, W, BN, EVEN, TMA)
                    G_by_P = None
                    if SCORES_MOVE:
                        tS = None
                        if TQ is not None:
                            tS = dot_t(tq, k, tS, PREC)
                        if TK is not None:
                            tS = dot_t(q, tk, tS, PREC)
                        N = tS * scale - mu[:, None]
                        G_by_P = A_s1 * N - s2[:, None]
                    if TV is not None:
                        G_by_P = dot_t(dto, tv, G_by_P, PREC)
                    G_by_P = dot_t(do, v, G_by_P, PREC)
                    if not SCORES_MOVE:
                        G_by_P = G_by_P - s2[:, None]
                S = dot_t(q, k, None, PREC)
                j = (n0 + tl.arange(0, BN))[None, :]
                if HIDES:
                    if not SKIPS or n0 + BN > mask_from:
                        qi = i[:, None]
                        S = hide(S, MASK, stmask, b, h, qi, j, Sq, Sk, scale, MASKED, CAUSAL)
                P = tl.exp2(S * (scale * LOG2E) - lse[:, None])
                if not EVEN:
                    P = tl.where(j < Sk, P, 0.0)
                if SCORES_MOVE:
                    Gt = (P * A_s1).to(k[0].dtype)
                    if PRIMAL and TK is not None:
                        dq = dot(Gt, tk, dq, PREC)
                        delta = tl.dot(Gt, ones, delta, input_precision=PREC)
                    if TANGENT:
                        dtq = dot(Gt, k, dtq, PREC)
                if PRIMAL:  # last: it waits for the other product into dq
                    dq = dot((P * G_by_P).to(k[0].dtype), k, dq, PREC)
            if PRIMAL:
                # Rows of Gt sum to zero before they are rounded. What rounding leaves of the sum,
                # delta, was multiplied by a common part of tK, which may be large. So delta times a
                # mean of tK is taken off, of keys that the query sees.
                if TK is not None and MASKED == NO_MASK:
                    # The mean of the first rows, under a causal mask of those that all queries of
                    # the block see.
                    shared_end = end
                    if CAUSAL:
                        shared_end = tl.minimum(Sk, m0 + 1)
                    first_rows = load(TK0, b, hk, seen_from, shared_end, sttk, W, 16, False, False)
                    count = tl.minimum(shared_end - seen_from, 16)
                    count = tl.maximum(count, 1)  # where no key is seen
                    share = tl.sum(delta, 1)[:, None] / (-8 * count)
                    dq = plus(dq, share, column_sums(first_rows))
                elif TK is not None:
                    # The mean under P of the first 16 keys, as far as the query sees them: keys of
                    # little weight may be far from the common part. Where all have little, they
                    # count alike.
                    k = load(K0, b, hk, seen_from, end, stk, W, 16, False, False)
                    tk = load(TK0, b, hk, seen_from, end, sttk, W, 16, False, False)
                    j = (seen_from + tl.arange(0, 16))[None, :]
                    S = dot_t(q, k, None, PREC)
                    qi = i[:, None]
                    S = hide(S, MASK, stmask, b, h, qi, j, Sq, Sk, scale, MASKED, CAUSAL)
                    P = tl.exp2(S * (scale * LOG2E) - lse[:, None])
                    P = tl.where(j < end, P, 0.0)
                    weight = P + tl.where(P > 2**-40, 2**-20, 0.0)
                    share = tl.sum(delta, 1) / (-8 * tl.maximum(tl.sum(weight, 1), 2**-20))
                    dq = dot((weight * share[:, None]).to(tk[0].dtype), tk, dq, PREC)
                store(DQ, times(dq, scale), b, h, m0, Sq, sto, W, BM, False)
            if TANGENT:
                store(DTQ, times(dtq, scale), b, h, m0, Sq, sto, W, BM, False)
        if DTO is not None:
            tl.store(S1 + row, s1, mask=i < Sq)
        tl.store(S2 + row, s2, mask=i < Sq)

    # fmt: off
    @triton.jit
    def column_kernel(Q, K, V, TQ, TK, TV, DO, DTO, LSE, MU, MASK, SEEN, S1, S2, DK, DV, DTK, DTV,
                      stq, stk, stv, sttq, sttk, sttv, stdo, stdto, sto, stmask,
                      H, Sq, Sk, scale,
                      MASKED: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
                      W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
                      TMA: tl.constexpr, SAME: tl.constexpr, FLAT: tl.constexpr,
                      PAIR: tl.constexpr, PREC: tl.constexpr):
        # fmt: on
        """Of a block of keys: DK, DV, DTK and DTV where they are wanted. H counts heads of keys.
        Tiles of scores are (BN, BM). PAIR: K and TK, and V and TV, are loaded in pairs."""
        PRIMAL: tl.constexpr = DK is not None or DV is not None
        SCORES_MOVE: tl.constexpr = TQ is not None or TK is not None
        HIDES_IN_LOOP: tl.constexpr = CAUSAL or MASKED == DENSE_MASK
        ADDS: tl.constexpr = MASKED == KEY_MASK and MASK.dtype.element_ty != tl.uint8
        if SAME:
            sttq = stq
            stdo = stq
            stdto = stq
        bh, b, hk, n0 = block_of(Sk, H, BN, FLAT, False)
        j = (n0 + tl.arange(0, BN))[:, None]
        if MASKED == KEY_MASK:
            mask_from, seen_from, seen_to = load_seen(SEEN, b)
        if ADDS:
            added, seen = key_mask(MASK, stmask, b, j, Sk)
        k = load(K, b, hk, n0, Sk, stk, W, BN, False, False)
        v = load(V, b, hk, n0, Sk, stv, W, BN, False, False)
        if DK is not None:
            dk = zeros(BN, W)
        if DV is not None:
            dv = zeros(BN, W)
        if PAIR:  # only where all of these exist
            k_tk = load_pair(K, TK, b, hk, n0, Sk, stk, sttk, W, BN)
            v_tv = load_pair(V, TV, b, hk, n0, Sk, stv, sttv, W, BN)
        elif PRIMAL:
            if TK is not None:
                tk = load(TK, b, hk, n0, Sk, sttk, W, BN, False, False)
            if TV is not None:
                tv = load(TV, b, hk, n0, Sk, sttv, W, BN, False, False)
        if DTK is not None:
            dtk = zeros(BN, W)
        if DTV is not None:
            dtv = zeros(BN, W)
        start = 0
        if CAUSAL:  # queries before these keys see none of them
            start = n0 // BM * BM
        end = Sq
        if GROUP > 1:  # one loop over the queries of all heads that share these keys
            span = tl.cdiv(Sq, BM) * BM - start
            end = start + GROUP * span
        if MASKED == KEY_MASK:  # zeros for keys that no query sees
            end = tl.where((n0 + BN <= seen_from) | (n0 >= seen_to), start, end)
        for at in range(start, end, BM):
            m0 = at
            h = hk
            bh_of_q = bh
            if GROUP > 1:
                g = (at - start) // span
                m0 = at - g * span
                h = hk * GROUP + g
                bh_of_q = bh * GROUP + g
            row = tl.cast(bh_of_q, tl.int64) * Sq
            q = load(Q, b, h, m0, Sq, stq, W, BM, EVEN, TMA)
            lse = load_row(LSE + row, m0, Sq, BM, EVEN, float("inf"))  # P = 0 in rows beyond Sq
            s2 = load_row(S2 + row, m0, Sq, BM, EVEN, 0.0)
            if PRIMAL:
                do = load(DO, b, h, m0, Sq, stdo, W, BM, EVEN, TMA)
            if DTO is not None:
                dto = load(DTO, b, h, m0, Sq, stdto, W, BM, EVEN, TMA)
            if SCORES_MOVE:
                s1 = load_row(S1 + row, m0, Sq, BM, EVEN, 0.0)
                if PRIMAL:
                    if TQ is not None:
                        tq = load(TQ, b, h, m0, Sq, sttq, W, BM, EVEN, TMA)
                    mu = load_row(MU + row, m0, Sq, BM, EVEN, 0.0)
            if PAIR:
                A, B = halves(dot_t(v_tv, dto, None, PREC))
                S, tS = halves(dot_t(k_tk, q, None, PREC))
                A_s1 = A - s1[None, :]
                if TQ is not None:
                    tS = dot_t(k, tq, tS, PREC)
                N = tS * scale - mu[None, :]
                G_by_P = dot_t(v, do, B, PREC) + (A_s1 * N - s2[None, :])
            else:
                if SCORES_MOVE:
                    A_s1 = dot_t(v, dto, None, PREC) - s1[None, :]
                if PRIMAL:
                    G_by_P = None
                    if SCORES_MOVE:
                        tS = None
                        if TQ is not None:
                            tS = dot_t(k, tq, tS, PREC)
                        if TK is not None:
                            tS = dot_t(tk, q, tS, PREC)
                        N = tS * scale - mu[None, :]
                        G_by_P = A_s1 * N - s2[None, :]
                    if TV is not None:
                        G_by_P = dot_t(tv, dto, G_by_P, PREC)
                    G_by_P = dot_t(v, do, G_by_P, PREC)
                    if not SCORES_MOVE:
                        G_by_P = G_by_P - s2[None, :]
                S = dot_t(k, q, None, PREC)
            if HIDES_IN_LOOP:
                i = (m0 + tl.arange(0, BM))[None, :]
                S = hide(S, MASK, stmask, b, h, i, j, Sq, Sk, scale, MASKED, CAUSAL)
            if ADDS:
                S += added * (1 / scale)
            P = tl.exp2(S * (scale * LOG2E) - lse[None, :])
            # Products into different accumulators follow each other, so that few wait for the one
            # before.
            P_rounded = P.to(q[0].dtype)
            if DV is not None:
                dv = dot(P_rounded, do, dv, PREC)
            if SCORES_MOVE:
                Gt = (P * A_s1).to(q[0].dtype)
                if DK is not None and TQ is not None:
                    dk = dot(Gt, tq, dk, PREC)
            if DTV is not None:
                dtv = dot(P_rounded, dto, dtv, PREC)
            if DTK is not None:
                dtk = dot(Gt, q, dtk, PREC)
            if DV is not None and SCORES_MOVE:
                dv = dot((P * N).to(q[0].dtype), dto, dv, PREC)
            if DK is not None:
                dk = dot((P * G_by_P).to(q[0].dtype), q, dk, PREC)
        if MASKED == KEY_MASK:
            # A row here belongs to one key, so that a hidden key spoils its own row alone: it
            # becomes zeros here, once. The mask is loaded again to keep registers free.
            if n0 + BN > mask_from:
                added, seen = key_mask(MASK, stmask, b, j, Sk)
                if DV is not None:
                    dv = where(seen, dv)
                if DK is not None:
                    dk = where(seen, dk)
                if DTV is not None:
                    dtv = where(seen, dtv)
                if DTK is not None:
                    dtk = where(seen, dtk)
        if DV is not None:
            store(DV, dv, b, hk, n0, Sk, sto, W, BN, False)
        if DK is not None:
            store(DK, times(dk, scale), b, hk, n0, Sk, sto, W, BN, False)
        if DTV is not None:
            store(DTV, dtv, b, hk, n0, Sk, sto, W, BN, False)
        if DTK is not None:
            store(DTK, times(dtk, scale), b, hk, n0, Sk, sto, W, BN, False)


# ---------------------------------------------------------------------------------------------
# 4. Tiles


class Tile(NamedTuple):
    """How a kernel is cut into programs."""

    queries: int  # BM
    keys: int  # BN
    warps: int
    stages: int  # num_stages: the block of the loop that is in use, and those loaded ahead
    tma: bool = False  # what the loop reads comes by tensor descriptors, on large inputs
    pair: bool = False  # K and TK, V and TV are loaded in pairs (column kernel)


# Measured on one H200, by kernel and padded head size. A thread has at most 255 registers, so two
# programs of 4 warps share a multiprocessor, or one of 8 has it alone.
HOPPER = {
    # Head sizes of two chunks (72, 96) have no descriptors; at D = 128 pointers were faster.
    "forward": {
        64: Tile(64, 64, 4, 3, tma=True),
        96: Tile(64, 64, 4, 2),
        128: Tile(128, 64, 8, 2),
        192: Tile(128, 32, 8, 2),
        256: Tile(32, 32, 4, 2),
    },
    # Fewer than 512 keys: a short loop mostly waits at its ends, where three programs a
    # multiprocessor beat two.
    "short": {64: Tile(64, 32, 4, 3)},
    # Four tiles of scores are alive at once, so there are half as many keys as in the forward. At
    # D = 64 as many just fit.
    "row": {
        64: Tile(64, 64, 4, 2, tma=True),
        96: Tile(64, 32, 4, 3),
        128: Tile(128, 32, 8, 3),
    },
    # All four gradients in one pass, where their accumulators fit; else "primal" and "tangent".
    "column": {64: Tile(32, 64, 4, 3, tma=True, pair=True)},
    # dK and dV, 10 products; pairs where shared memory has room for them.
    "primal": {
        64: Tile(32, 64, 4, 3, pair=True),
        96: Tile(32, 64, 4, 3),
        128: Tile(32, 128, 8, 3),
    },
    # dtK and dtV, 4 products: few tiles are alive, which leaves room for more rows or stages.
    "tangent": {
        64: Tile(32, 64, 4, 3),
        96: Tile(64, 64, 4, 3),
        128: Tile(64, 64, 4, 2, tma=True),
        192: Tile(32, 64, 4, 2),
        256: Tile(64, 64, 8, 2),
    },
    # Above 128 the accumulators of two gradients do not fit: each has a pass of its own.
    "dq": {192: Tile(64, 16, 4, 2), 256: Tile(64, 16, 4, 2)},
    "dtq": {192: Tile(128, 32, 8, 2), 256: Tile(128, 32, 8, 3)},
    "dk": {192: Tile(16, 64, 4, 2), 256: Tile(16, 64, 4, 3)},
    "dv": {192: Tile(32, 64, 4, 2), 256: Tile(32, 128, 8, 1)},
}
TABLES = {9: HOPPER}  # by the major number of the compute capability

# Tiles that fit into every GPU's shared memory (8.6, 8.9 and 12.0 have least: 99 KB), but for
# float32 above FLOAT32_UP_TO.
SMALL_TILE = Tile(32, 32, 4, 2)  # for 16 bits: at most 67 KB up to D = 128
TINY_TILE = Tile(16, 16, 4, 1)  # above that; and for float32, whose products are three of TF32 each
WIDTHS = (64, 96, 128, 192, 256)  # padded head sizes that have entries of their own

# What GPUs without a table choose from: (queries, keys, warps, stages), by kernel and padded head
# size, the likeliest first. The compiler says what spills or needs too much shared memory, which
# differs (8.0: 163 KB, 8.6, 8.9 and 12.0: 99 KB, 10.0: 227 KB), so there is one list for all.
# fmt: off
CANDIDATES = {
    "forward": {
        64:  ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2)),
        96:  ((128, 32, 8, 2), (64, 32, 4, 2), (64, 64, 4, 2), (32, 32, 4, 2)),
        128: ((128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2), (128, 64, 8, 2), (32, 32, 4, 2)),
        192: ((32, 32, 4, 2), (64, 32, 8, 2), (128, 32, 8, 2), (32, 32, 8, 2)),
        256: ((32, 32, 8, 2), (64, 16, 8, 2), (64, 32, 8, 2), (32, 16, 4, 2)),
    },
    "row": {
        64:  ((64, 32, 4, 2), (128, 32, 8, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
        96:  ((64, 32, 8, 2), (64, 16, 4, 2), (128, 32, 8, 2), (32, 16, 4, 2)),
        128: ((32, 32, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2), (32, 16, 4, 2), (128, 32, 8, 2)),
    },
    "column": {
        64:  ((32, 32, 4, 2), (32, 64, 8, 2)),
    },
    "primal": {
        64:  ((32, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
        96:  ((16, 64, 8, 2), (16, 32, 4, 2), (32, 64, 8, 2), (32, 64, 4, 2)),
        128: ((32, 32, 8, 2), (16, 32, 4, 2), (32, 32, 4, 2), (32, 128, 8, 2)),
    },
    "tangent": {
        64:  ((64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 3)),
        96:  ((32, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2)),
        128: ((64, 64, 8, 2), (32, 64, 4, 2), (64, 128, 8, 2), (64, 64, 4, 2)),
        192: ((32, 32, 4, 2), (32, 64, 8, 2), (64, 64, 8, 2)),
        256: ((32, 32, 4, 2), (32, 64, 8, 2)),
    },
    "dq": {
        192: ((16, 16, 4, 2), (32, 16, 4, 2), (32, 32, 4, 2), (64, 16, 8, 2), (64, 32, 8, 2)),
        256: ((16, 16, 4, 2), (32, 16, 4, 2), (64, 16, 4, 2), (64, 16, 8, 2), (32, 32, 4, 2)),
    },
    "dtq": {
        192: ((32, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2)),
        256: ((32, 32, 4, 2), (64, 32, 8, 2)),
    },
    "dk": {
        192: ((16, 16, 4, 2), (16, 64, 4, 2), (32, 32, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2)),
        256: ((16, 16, 4, 2), (16, 64, 4, 2), (32, 32, 8, 2), (16, 64, 8, 2)),
    },
    "dv": {
        192: ((32, 32, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2), (32, 128, 8, 2)),
        256: ((32, 32, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2)),
    },
}
# fmt: on


@functools.cache
def width_of(D):
    """The entry in tables that serves a head size."""
    padded = sum(chunk_widths(D))
    return min(width for width in WIDTHS if width >= padded)


def safe_tile(D, dtype):
    """A tile that fits everywhere, for calls that nobody has timed."""
    if dtype == torch.float32 or width_of(D) > 128:
        return TINY_TILE
    return SMALL_TILE


@functools.cache
def capability_of(device):
    """(major, minor) of a GPU; asking the driver takes as long as a small launch."""
    return torch.cuda.get_device_capability(device)


def table_of(device):
    """The table of tiles for a device, or None. (The interpreter takes Hopper's.)"""
    if device.type != "cuda":
        return HOPPER
    return TABLES.get(capability_of(device)[0])


def table_tile(name, D, device):
    """A measured tile, or None."""
    table = table_of(device)
    return None if table is None else table[name].get(width_of(D))


# Tuning. A GPU without a table times some tiles the first time that it meets a kernel with a head
# size: those in CANDIDATES that fit into its memory and do not spill registers. What it finds is
# kept in a file, so that this happens once for a GPU, a version of Triton and a version of this
# file; of several processes on one machine one does it and the others read the file. The file is
# JSON, from a description to [*Tile, milliseconds], or to whether one pass over the keys is faster
# than two. That no tile could be built is not kept there: a later process may have more memory.

LOCK_WAIT = 120  # seconds for which a process waits for another's tuning
ONE_PASS = "one pass: "  # how descriptions of the other kind of entry begin
SPILLS_ALLOWED = 32  # registers a thread that may live in memory without much harm
_tuned = {}  # path of a file -> its entries, and None by the description of what failed here
_said = set()


def _say(text):
    """Tells something once in a process."""
    if text not in _said:
        _said.add(text)
        print(f"attention_jvp: {text}", file=sys.stderr, flush=True)


@functools.cache
def _tuning_file(gpu):
    """Where the tiles for this GPU are kept."""
    with open(__file__, "rb") as f:
        source = hashlib.sha256(f.read()).hexdigest()[:12]
    gpu = "".join(c if c.isalnum() else "-" for c in gpu)
    folder = os.path.expanduser(CACHE)
    return os.path.join(folder, f"{gpu}_triton-{triton.__version__}_{source}.json")


def _read_tuning(path):
    """The entries of a tuning file, without what is no entry; none where it cannot be read."""
    try:
        with open(path) as f:
            entries = json.load(f)
        return {key: entry for key, entry in entries.items() if _is_entry(key, entry)}
    except (OSError, ValueError, AttributeError):
        return {}


def _is_entry(key, entry):
    if key.startswith(ONE_PASS):
        return isinstance(entry, bool)
    if not isinstance(entry, list) or len(entry) != 7:
        return False
    return all(isinstance(n, (int, float)) for n in entry) and entry[-1] > 0


def _write_tuning(path, entries):
    """Written aside and renamed, so that nobody ever reads half a file. Failures stay out of it."""
    found = {key: entry for key, entry in entries.items() if entry is not None}
    aside = f"{path}.{os.getpid()}.tvm-partial"
    with open(aside, "w") as f:
        json.dump(found, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


@contextlib.contextmanager
def _alone(path):
    """Waits until no other process of this machine is tuning for the same file.

    After LOCK_WAIT seconds it goes on all the same: tuning twice is better than waiting for ever.
    """
    if fcntl is None:
        yield
        return
    with open(path + ".lock", "w") as f:
        give_up = time.monotonic() + LOCK_WAIT
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    _say(f"{path}.lock was held for {LOCK_WAIT} s: tuning without it")
                    break
            time.sleep(0.05)
        try:
            yield
        finally:
            # Said outright, because a process forked meanwhile has the file open as well.
            fcntl.flock(f, fcntl.LOCK_UN)


def _fastest(tiles, build, measure):
    """The fastest of some tiles and its milliseconds, or None where none can be built.

    build(tile) compiles and returns the registers that spill and a function that launches; it
    raises where the tile does not fit. measure(launch) returns milliseconds."""

    def attempt(tile):
        try:
            return tile, *build(tile)
        except Exception:  # whatever keeps a tile from compiling or loading, another one may do
            return None

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        built = [found for found in pool.map(attempt, tiles) if found is not None]
    if not built:
        return None
    limit = max(SPILLS_ALLOWED, min(spills for _, spills, _ in built))
    times = [(measure(launch), tile) for tile, spills, launch in built if spills <= limit]
    milliseconds, tile = min(times)
    return tile, milliseconds


def _known(gpu):
    """Path and entries of a GPU's tuning file, which is read once."""
    path = _tuning_file(gpu)
    if path not in _tuned:
        _tuned[path] = _read_tuning(path)
    return path, _tuned[path]


def tuned_tile(description, gpu, tiles, build, measure):
    """The fastest tile and its milliseconds: as found before, or found now and kept.

    None where no tile can be built or timed. This process then does not try again; the next one
    does."""

    def tune():
        _say(f"choosing tiles for {gpu} on first use: some seconds a kernel, kept in {path}")
        try:
            found = _fastest(tiles, build, measure)
        except torch.OutOfMemoryError:
            _say("too little memory to time tiles: this process takes small ones")
            found = None
        if found is None:
            return None
        tile, milliseconds = found
        return [*(int(n) for n in tile), milliseconds]

    path = _tuning_file(gpu)
    entry = _found_once(description, gpu, tune)
    if entry is None:
        return None
    *tile, milliseconds = entry
    tile = Tile(*(int(n) for n in tile[:4]), *(bool(n) for n in tile[4:]))
    return tile, milliseconds


def _found_once(description, gpu, find):
    """An entry of the tuning file: as it was found before, or find() now, which is kept.

    find returns None where it fails, which this process alone remembers."""
    path, known = _known(gpu)
    if description in known:
        return known[description]
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _alone(path):
            known.update(_read_tuning(path))  # perhaps another process has just done it
            if description not in known:
                known[description] = find()
                if known[description] is not None:
                    _write_tuning(path, known)
    except OSError as error:
        _say(f"tiles cannot be kept in {path} ({error}), so every process will tune again")
        if description not in known:
            known[description] = find()
    return known[description]


# ---------------------------------------------------------------------------------------------
# 5. Launching


# The kernels' first arguments are these tensors, in this order, and their strides begin in the same
# order. (The forward has no DO and DTO.)
LARGE = ("Q", "K", "V", "TQ", "TK", "TV", "DO", "DTO")
OVER_KEYS = tuple(LARGE.index(name) for name in ("K", "V", "TK", "TV"))  # a loop over keys reads
OVER_QUERIES = tuple(LARGE.index(name) for name in ("Q", "TQ", "DO", "DTO"))
PAIRS = ((LARGE.index("K"), LARGE.index("TK")), (LARGE.index("V"), LARGE.index("TV")))


class Call(NamedTuple):
    """All that a launch depends on, except addresses, `sizes` and the precision of products."""

    name: str  # of the kernel, or of a pass of it, as in the tables of tiles
    shape: tuple  # of the tensor whose blocks the programs take: Q, or K for the column kernel
    steps: int  # rows that the loop of a program reads: Sk, or Sq for the column kernel
    group: int  # heads of queries to a head of keys
    dtype: torch.dtype
    device: torch.device
    exists: tuple  # which of the kernel's tensors do, the mask among them
    strides: tuple  # of the kernel's large tensors, in elements
    masked: int  # 0, or one of the kinds of masks
    mask_dtype: torch.dtype | None
    mask_strides: tuple | None
    causal: bool


class Plan(NamedTuple):
    """A Call cut into programs."""

    grid: tuple
    constants: dict
    options: dict
    strides: list  # in units, as the kernels take them
    block: list | None  # of the tensor descriptors, where there are any


@functools.lru_cache(MOST_READY)
def _plan(call, tile, streamed, tma, together):
    """streamed: which of the kernel's tensors its loop reads. tma: addresses allow for descriptors.
    together: addresses allow for loads in pairs."""
    B, H, S, D = call.shape
    first, second = chunk_widths(D)
    over_queries = call.name in ("forward", "row", "dq", "dtq")
    own = tile.queries if over_queries else tile.keys
    other = tile.keys if over_queries else tile.queries
    assert max(own, other) * MAX_ROW <= 2**31
    unit = 8 if all(s % 8 == 0 for st in call.strides for s in st[:3]) else 1
    loop_strides = {call.strides[i] for i in streamed}
    # Descriptors want strides in multiples of 16 bytes, rows that do not overlap, and one chunk.
    tma = tma and tile.tma and unit == 8 and second == 0 and not any(0 in st for st in loop_strides)
    tma = tma and B * H * S * call.steps >= TMA_FROM
    flat = max(B, H) > MAX_GRID
    constants = dict(
        MASKED=call.masked,
        CAUSAL=call.causal,
        GROUP=call.group,
        W=Widths(unit, D, first, second),
        BM=tile.queries,
        BN=tile.keys,
        EVEN=call.steps % other == 0,
        TMA=tma,
        SAME=len(loop_strides) == 1,  # the compiler then keeps one set of offsets, not four
        FLAT=flat,
    )
    if call.name == "forward":  # the others, short of registers, were slower with this
        constants["FULL"] = S % own == 0
    if not over_queries:
        constants["PAIR"] = tile.pair and together
    # enable_fp_fusion: Triton 3.10 has it off by default.
    options = dict(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)
    strides = [tuple(s // unit for s in st[:3]) for st in call.strides]
    strides.append(call.mask_strides)
    blocks = -(-S // own)
    grid = (blocks * H * B, 1, 1) if flat else (blocks, H, B)
    return Plan(grid, constants, options, strides, [1, 1, other, first] if tma else None)


def _precision():
    """How products of float32 inputs are made."""
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3"  # three TF32 products: float32 accuracy


def _candidates(call):
    """The tiles to time for a call on a GPU without a table."""
    width = width_of(call.shape[3])
    tiles = [Tile(*tile) for tile in CANDIDATES[call.name].get(width, ())]
    if capability_of(call.device)[0] >= 9:
        # These GPUs have descriptors, so Hopper's own tiles are worth a try.
        names = (call.name, "short") if call.name == "forward" else (call.name,)
        tiles += [HOPPER[name][width] for name in names if width in HOPPER[name]]
    return list(dict.fromkeys(tiles))


def _describe(call):
    """What a tuned tile is good for, as a line of text."""
    words = [call.name, f"head size {call.shape[3]}", str(call.dtype).removeprefix("torch.")]
    words.append("under 512 steps" if call.steps < 512 else "512 steps or more")
    words += ["causal"] if call.causal else []
    if call.masked:
        kind = ("", "key mask", "dense mask")[call.masked]
        words.append(kind if call.mask_dtype == torch.uint8 else f"additive {kind}")
    words += ["grouped"] if call.group > 1 else []
    words.append("tensors " + "".join("x" if x else "-" for x in call.exists))
    return ", ".join(words)


def _choose_tile(call, build):
    """-> tile, its milliseconds if it was tuned, and whether that is the last word."""
    D = call.shape[3]
    safe = safe_tile(D, call.dtype)
    if call.dtype == torch.float32:
        return safe, None, True
    if table_of(call.device) is not None:
        short = call.name == "forward" and chunk_widths(D) == (64, 0) and call.steps < 512
        tile = table_tile("short" if short else call.name, D, call.device)
        if call.masked == DENSE_MASK.value:  # whose tiles take shared memory, too
            tile = tile._replace(stages=min(tile.stages, 2))
        return tile, None, True
    if not TUNE:
        return safe, None, True
    gpu = torch.cuda.get_device_name(call.device)
    description = _describe(call)
    if torch.cuda.is_current_stream_capturing() and description not in _known(gpu)[1]:
        _say("captured in a CUDA graph before its tiles were tuned: run it once before the capture")
        return safe, None, False
    found = tuned_tile(description, gpu, _candidates(call), build, _milliseconds)
    return (safe, None, True) if found is None else (*found, True)


def _milliseconds(launch):
    """Of one launch, with a cold L2 cache."""
    return triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median")


# Programs that are compiled already, by call, the last MOST_READY that came. Triton's own launch
# sorts some sixty arguments, which takes longer than a small call's work on the GPU.
_ready = {}
_ready_lock = threading.Lock()


def _remember(key, start, milliseconds):
    with _ready_lock:  # backward runs in a thread of its own
        while len(_ready) >= MOST_READY:
            del _ready[next(iter(_ready))]
        _ready[key] = start, milliseconds


def _launch(kernel, call, tensors, streamed, sizes, pairs=()):
    """Runs a kernel. tensors: in the order of its arguments, None where one does not exist.
    streamed: which of them its loop reads. sizes: heads, Sq, Sk, scale. pairs: which tensors could
    be loaded in pairs. Returns the milliseconds that tuning found, None without tuning."""
    address = [None if t is None else t.data_ptr() for t in tensors]
    aligned = not any(a is not None and a % 16 for a in address)
    precision = _precision()
    apart = 8 * call.dtype.itemsize
    together = all((address[i] - address[j]) % apart == 0 for i, j in pairs) and len(pairs) > 0
    key = call, sizes, precision, together, TUNE
    ready = _ready.get(key) if aligned else None
    if ready is not None:
        start, milliseconds = ready
        start(tensors, address)
        return milliseconds

    def planned(tile):
        """-> the plan, and the kernel's arguments by position and by name."""
        plan = _plan(call, tile, streamed, aligned, together)
        values = _with_descriptors(tensors, tensors, streamed, plan.block)
        constants = {**plan.constants, "PREC": precision}
        return plan, [*values, *plan.strides, *sizes], constants

    def build(tile):
        plan, arguments, constants = planned(tile)
        with torch.cuda.device(call.device):  # another thread than the caller's
            made = kernel.warmup(*arguments, **constants, **plan.options, grid=plan.grid)
            made[plan.grid]  # loads it
        launch = functools.partial(kernel[plan.grid], *arguments, **constants, **plan.options)
        return made.n_spills, launch

    tile, milliseconds, final = _choose_tile(call, build)
    plan, arguments, constants = planned(tile)
    program = kernel[plan.grid](*arguments, **constants, **plan.options)
    # A compiled program takes for granted that addresses are multiples of 16, and what Triton has
    # built in of sizes and strides, which are part of the call.
    if aligned and final and not INTERPRET:
        run = program[plan.grid]
        fixed = [constants[name] for name in kernel.arg_names if name in constants]

        def start(tensors, address):
            # Triton asks the driver about every tensor's address, and takes a number as it is.
            values = _with_descriptors(address, tensors, streamed, plan.block)
            run(*values, *plan.strides, *sizes, *fixed)

        _remember(key, start, milliseconds)
    return milliseconds


def _with_descriptors(values, tensors, streamed, block):
    """The tensors or addresses, with those that a loop reads replaced by descriptors of these
    blocks; as they are where block is None."""
    if block is None:
        return values
    values = list(values)
    for i in streamed:
        if tensors[i] is not None:
            x = tensors[i]
            values[i] = TensorDescriptor(x, x.shape, x.stride(), block)
    return values


def _rows(x):
    """The kernels take any strides, but 1 in the last dimension and less than MAX_ROW before."""
    if x is None or (x.stride(3) == 1 and x.stride(2) < MAX_ROW):
        return x
    return x.contiguous()


def _order(x):
    """Strides of a (B, H, S, D) tensor laid out as (B, S, H, D), so that the reshape to (B, S, H D)
    that usually follows is free."""
    _, H, S, D = x.shape
    if H * D < MAX_ROW:
        return (S * H * D, D, H * D, 1)
    return (H * S * D, S * D, D, 1)


def _like(x):
    """An empty tensor of x's shape and dtype, in that layout."""
    return torch.empty_strided(x.shape, _order(x), dtype=x.dtype, device=x.device)


def _on(x):
    """Makes x's device the current one, where Triton launches."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


class Mask(NamedTuple):
    """A mask as the kernels take it."""

    tensor: Tensor | None  # uint8 or floating, (B, H, Sq, Sk) by strides of zero
    kind: int
    strides: tuple | None


def _by_key(mask):
    """Whether a mask is a key mask, one row for all queries and heads."""
    return mask.size(1) == 1 and mask.size(2) == 1


def _kernel_mask(mask, q, k):
    if mask is None:
        return Mask(None, 0, None)
    B, H, Sq, _ = q.shape
    kind = KEY_MASK if _by_key(mask) else DENSE_MASK
    mask = mask.expand(B, H, Sq, k.size(2))
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    return Mask(mask, kind.value, mask.stride())


def _forward_now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> o, to, the low bits of to, logsumexp (base 2), mu, and what `seen_keys` finds in the mask.

    Logsumexp and mu are (B, H, Sq) in float32. The low bits are an empty tensor for float32, and
    where not `save`. The last is (B, 3) in int32, empty where not `save` and for other masks than
    key masks. mask: (B or 1, H or 1, Sq or 1, Sk or 1)."""
    q, k, v, tq, tk, tv = (_rows(x) for x in (q, k, v, tq, tk, tv))
    outputs = _empty_outputs(q, mask, save)
    o, to, lo, lse, mu, seen = outputs
    lo = lo if lo.numel() > 0 else None
    seen = seen if seen.numel() > 0 else None
    kernel_mask = _kernel_mask(mask, q, k)
    tensors = (q, k, v, tq, tk, tv, o, to, lo, lse, mu, kernel_mask.tensor, seen)
    call = Call(
        name="forward",
        shape=q.shape,
        steps=k.size(2),
        group=q.size(1) // k.size(1),
        dtype=q.dtype,
        device=q.device,
        exists=tuple(x is not None for x in tensors),
        strides=_strides(q, k, v, tq, tk, tv, o),
        masked=kernel_mask.kind,
        mask_dtype=None if kernel_mask.tensor is None else kernel_mask.tensor.dtype,
        mask_strides=kernel_mask.strides,
        causal=causal,
    )
    with _on(q):
        sizes = (q.size(1), q.size(2), k.size(2), scale)
        _launch(forward_kernel, call, tensors, OVER_KEYS, sizes)
    return outputs


def _strides(q, k, v, tq, tk, tv, *others):
    """Strides of the large tensors. Those that do not exist take the ones of their value."""
    tq = q if tq is None else tq
    tk = k if tk is None else tk
    tv = v if tv is None else tv
    return tuple(x.stride() for x in (q, k, v, tq, tk, tv, *others))


@functools.cache
def _low_bits_layout(D):
    """How many words of low bits a row of tO has, and of which dtype."""
    first, second = chunk_widths(D)
    # The dtype that the words of the first chunk fill. Those of a narrower second one leave bits.
    dtype = {16: torch.int8, 32: torch.int16}.get(first, torch.int32)
    return low_words(first) + low_words(second), dtype


def _empty_outputs(q, mask, save):
    words, word = _low_bits_layout(int(q.size(3)))
    if not save or q.dtype == torch.float32:
        words = 0
    low_bits_of_to = q.new_empty((*q.shape[:3], words), dtype=word)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    mu = q.new_empty(q.shape[:3], dtype=torch.float32)
    key_masks = q.size(0) if save and mask is not None and _by_key(mask) else 0
    seen = q.new_empty((key_masks, 3), dtype=torch.int32)
    return _like(q), _like(q), low_bits_of_to, lse, mu, seen


_forward = torch.library.custom_op(f"{NAMESPACE}::forward", _forward_now, mutates_args=())


@_forward.register_fake
def _(q, k, v, tq, tk, tv, mask, scale, causal, save):
    return _empty_outputs(q, mask, save)


def _backward_now(
    do: Tensor | None,
    dto: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    mask: Tensor | None,
    o: Tensor,
    to: Tensor,
    lo: Tensor,
    lse: Tensor,
    mu: Tensor,
    seen: Tensor,
    scale: float,
    causal: bool,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, dtq, dtk, dtv; an empty tensor for each that is not wanted.

    need: is dq wanted, are dk and dv, is dtq, are dtk and dtv. do or dto may be missing, not both;
    without dto the last two cannot be wanted."""
    if do is None:
        do = q.new_zeros(q.size(3)).expand_as(q)
    q, k, v, tq, tk, tv, do, dto = (_rows(x) for x in (q, k, v, tq, tk, tv, do, dto))
    grads = _empty_grads(q, k, v, tq, tk, tv, need)
    if dto is None:  # nothing then depends on the tangents
        tq, tk, tv = None, None, None
    dq, dk, dv, dtq, dtk, dtv = (x if x.numel() > 0 else None for x in grads)
    s1 = torch.empty_like(lse)
    s2 = torch.empty_like(lse)
    like_q = _order(q)
    o, to = (x if x.stride() == like_q else _like(x).copy_(x) for x in (o, to))
    lo = lo if dto is not None and lo.numel() > 0 else None
    seen = seen if seen.numel() > 0 else None
    kernel_mask = _kernel_mask(mask, q, k)
    incoming = (do, do if dto is None else dto)

    call = Call(
        name="row",
        shape=q.shape,
        steps=k.size(2),
        group=q.size(1) // k.size(1),
        dtype=q.dtype,
        device=q.device,
        # _one_pass reads this; each pass below has its own
        exists=tuple(x is not None for x in (tq, tk, tv, dtk, dtv)),
        strides=(*_strides(q, k, v, tq, tk, tv, *incoming), like_q),
        masked=kernel_mask.kind,
        mask_dtype=None if kernel_mask.tensor is None else kernel_mask.tensor.dtype,
        mask_strides=kernel_mask.strides,
        causal=causal,
    )

    def rows(name, dq, dtq):
        """One pass of the row kernel."""
        saved = (o, to, lo, lse, mu, kernel_mask.tensor, seen)
        k0 = None if mask is None else k
        tensors = (q, k, v, tq, tk, tv, do, dto, *saved, s1, s2, dq, dtq, k0, tk)
        row_call = call._replace(name=name, exists=tuple(x is not None for x in tensors))
        sizes = (q.size(1), q.size(2), k.size(2), scale)
        return _launch(row_kernel, row_call, tensors, OVER_KEYS, sizes)

    def columns(name, dk, dv, dtk, dtv):
        """One pass of the column kernel."""
        saved = (lse, mu, kernel_mask.tensor, seen)
        tensors = (q, k, v, tq, tk, tv, do, dto, *saved, s1, s2, dk, dv, dtk, dtv)
        column_call = call._replace(
            name=name,
            shape=k.shape,
            steps=q.size(2),
            exists=tuple(x is not None for x in tensors),
            strides=(*call.strides[:-1], _order(k)),
        )
        pairs = ()
        if dk is not None and all(x is not None for x in (dto, tk, tv)):
            pairs = PAIRS
        sizes = (k.size(1), q.size(2), k.size(2), scale)
        return _launch(column_kernel, column_call, tensors, OVER_QUERIES, sizes, pairs)

    primal = dk is not None
    tangent = dtk is not None or dtv is not None
    large = (q, k, v, tq, tk, tv, do, dto)
    hopper = _hopper_kernels(need, *large, lse, mask, causal) if HOPPER_KERNELS else None
    with _on(q):
        if hopper is not None:
            rows("row", None, None)  # s1 and s2
            inputs = (*large, lse, mu, s1, s2)
            masked = (kernel_mask.tensor, seen)
            hopper.rows(*inputs, dq, dtq, scale, *masked)
            hopper.columns(*inputs, dk, dv, dtk, dtv, scale, *masked)
            return grads
        if width_of(q.size(3)) > 128:  # the accumulators of two gradients do not fit
            rows("dq", dq, None)
            if dtq is not None:
                rows("dtq", None, dtq)
            if primal:
                columns("dk", dk, None, None, None)
                columns("dv", None, dv, None, None)
            if tangent:
                columns("tangent", None, None, dtk, dtv)
            return grads

        rows("row", dq, dtq)
        one_pass = primal and tangent and _one_pass(call)
        if one_pass is None:  # on first use tuning times both ways; their results are the same
            one = columns("column", dk, dv, dtk, dtv)
            two = columns("primal", dk, dv, None, None), columns("tangent", None, None, dtk, dtv)
            _keep_one_pass(call, one, two)
        elif one_pass:
            columns("column", dk, dv, dtk, dtv)
        else:
            if primal:
                columns("primal", dk, dv, None, None)
            if tangent:
                columns("tangent", None, None, dtk, dtv)
    return grads


def _hopper_kernels(need, *call):
    """The module attention_hopper, for a call that it takes. Otherwise None, and it is said why."""
    module, reason = _import_hopper_kernels()
    if module is not None:
        reason = module.why_not(*call) if all(need) else "a gradient is not wanted"
    if reason is not None:
        _say(f"HOPPER_KERNELS are not used: {reason}")
        return None
    return module


@functools.cache
def _import_hopper_kernels():
    """-> the module, or None and why not. It lies beside this file, in a package as well."""
    name = f"{__package__}.attention_hopper" if __package__ else "attention_hopper"
    try:
        return importlib.import_module(name), None
    except (ImportError, AttributeError) as error:  # some versions of Triton lack what it takes
        return None, str(error)


def _one_pass(call):
    """Whether one pass makes all gradients of keys and values; None where this is to be timed."""
    if call.dtype == torch.float32 or width_of(call.shape[3]) > 64:
        return False
    table = table_of(call.device)
    if table is not None:
        return width_of(call.shape[3]) in table["column"]
    if not TUNE:
        return False
    _, known = _known(torch.cuda.get_device_name(call.device))
    description = ONE_PASS + _describe(call)
    if description in known:
        return known[description] is True  # and two passes where a tile could not be timed
    return False if torch.cuda.is_current_stream_capturing() else None


def _keep_one_pass(call, one, two):
    """Keeps which way was faster, from the milliseconds of one pass and of each of the two; None
    are those of a kernel that tuning could not time."""
    timed = one is not None and None not in two
    answer = one <= sum(two) if timed else None
    gpu = torch.cuda.get_device_name(call.device)
    _found_once(ONE_PASS + _describe(call), gpu, lambda: answer)


def _empty_grads(q, k, v, tq, tk, tv, need):
    wanted = (
        (q, need[0]),
        (k, need[1]),
        (v, need[1]),
        (q, need[2]),
        (k, need[3] and tk is not None),
        (v, need[3] and tv is not None),
    )
    return tuple(_like(x) if want else x.new_empty(0) for x, want in wanted)


_backward = torch.library.custom_op(f"{NAMESPACE}::backward", _backward_now, mutates_args=())


@_backward.register_fake
def _(do, dto, q, k, v, tq, tk, tv, mask, o, to, lo, lse, mu, seen, scale, causal, need):
    return _empty_grads(q, k, v, tq, tk, tv, need)


def _only_autograd(tensors):
    """Whether nothing but autograd watches: no compiler, transform, dispatch mode or subclass."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    for x in tensors:
        if x is None:
            continue
        if type(x) not in (Tensor, torch.nn.Parameter):
            return False
        if torch._C._functorch.is_legacy_batchedtensor(x):
            return False
        if x.is_neg() or x._is_zerotensor():  # lazy views, which the dispatcher makes real
            return False
    return True


def _transforms():
    """Names of the torch.func transforms at work, outermost first."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return []
    return [str(i.key()).split(".")[-1] for i in torch._C._functorch.get_interpreter_stack()]


def _save(ctx, inputs, output):
    *tensors, scale, causal, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale
    ctx.causal = causal
    ctx.set_materialize_grads(False)  # a missing gradient stays None, and makes no work


def _gradients(ctx, do, dto, *_):
    """Of the ten inputs of the forward."""
    if do is None and dto is None:
        return (None,) * 10
    need_q, need_k, need_v, need_tq, need_tk, need_tv = ctx.needs_input_grad[:6]
    has_dto = dto is not None
    wanted = (need_q, need_k, need_v, need_tq and has_dto, need_tk and has_dto, need_tv and has_dto)
    need = [wanted[0], wanted[1] or wanted[2], wanted[3], wanted[4] or wanted[5]]
    saved = ctx.saved_tensors
    direct = _only_autograd((do, dto, *saved)) and not torch.is_grad_enabled()
    backward = _backward_now if direct else _backward
    grads = backward(do, dto, *saved, ctx.scale, ctx.causal, need)
    return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), *(None,) * 4)


def _no_more(ctx, *_):
    raise RuntimeError(
        "attention_jvp: the fused backward has no derivative of its own; for gradients of "
        "gradients call attention_jvp_reference"
    )


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_no_more)


class _Eager(torch.autograd.Function):
    """The operators for plain tensors, without the dispatcher, which takes longer than a small
    call's work on the GPU."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward_now(*inputs)
        _save(ctx, inputs, output)
        return output[:2]

    @staticmethod
    def backward(ctx, do, dto):
        return _gradients(ctx, do, dto)


# ---------------------------------------------------------------------------------------------
# 6. Public


def _tangents_are_hidden(tensors):
    """Whether vmap inside forward AD keeps the tangents of these tensors out of reach."""
    if fwAD._current_level < 0 or torch.compiler.is_compiling():
        return False
    if _transforms()[-1:] == ["Vmap"]:
        return True
    is_batched = torch._C._functorch.is_legacy_batchedtensor  # of torch.autograd.functional's vmap
    for x in tensors:
        if x is not None and is_batched(x):
            return True
        tangent = None if x is None else fwAD.unpack_dual(x).tangent
        if tangent is not None and is_batched(tangent):
            return True
    return False


def _tangent_of(x):
    """The tangent that forward AD carries for a tensor; None where there is none to be seen."""
    if x is None or fwAD._current_level < 0 or _tangents_are_hidden((x,)):
        return None
    return fwAD.unpack_dual(x).tangent


def why_not_nested(tensors):
    """Why the operators would not see through the transforms at work, or None where they do:
    torch.func.jvp alone, vmap outside it, and backward through either."""
    active = _transforms()
    if "Grad" in active:
        return "torch.func.grad or vjp is at work: take gradients by backward"
    if active.count("Jvp") > 1:
        return "a torch.func.jvp is inside another"
    if _tangents_are_hidden(tensors):
        return "vmap inside torch.func.jvp hides the tangents: put vmap outside"
    if any(_tangent_of(x) is not None for x in tensors):
        return "attention_jvp itself is inside torch.func.jvp or forward AD"
    return None


def why_not_fused(q, k, v):
    """Why the kernels cannot take tensors like these, or None where they can. It does not look at
    the transforms around the call, as `why_not_nested` does."""
    D = q.size(-1)
    if FUSED not in (True, False, "require"):
        raise ValueError(f'FUSED is True, False or "require", not {FUSED!r}')
    if triton is None:
        return NO_TRITON
    if not FUSED:
        return "FUSED is False"
    if D > MAX_HEAD_SIZE:
        return f"the head size {D} is over {MAX_HEAD_SIZE}"
    if v.size(-1) != D:
        return f"values have head size {v.size(-1)} and queries {D}"
    if q.device.type == "cpu" and INTERPRET:
        if q.dtype != torch.float32:
            return f"Triton's interpreter is wrong in {q.dtype}"
        return None
    if not q.is_cuda or torch.version.hip is not None:
        name = "ROCm" if torch.version.hip is not None else q.device.type
        return f"the kernels run on NVIDIA GPUs, not on {name}"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels do not take {q.dtype}"
    gpu = torch.cuda.get_device_properties(q.device)  # which torch.compile can trace
    if gpu.major < 8:
        return f"the GPU has compute capability {gpu.major}.{gpu.minor}, the kernels need 8.0"
    small_memory = (gpu.major, gpu.minor) in ((8, 6), (8, 9)) or gpu.major == 12
    if q.dtype == torch.float32 and D > FLOAT32_UP_TO and small_memory:
        return f"the GPU has too little shared memory for head size {D} in float32"
    return None


def _required(reason):
    """Stops a call that would take the quadratic path where FUSED is "require"."""
    if FUSED == "require" and reason is not None:
        raise RuntimeError(f'attention_jvp: FUSED is "require", but {reason}')


class _Checked(NamedTuple):
    """Arguments that have been checked and cast."""

    tensors: tuple  # q, k, v, tq, tk, tv
    mask: Tensor | None  # four-dimensional
    scale: float


# fmt: off
def _checked(name, q, k, v, tq, tk, tv, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    # fmt: on
    """One set of checks for both functions, with and without tangents."""
    for x in (q, k, v):
        if not torch.is_tensor(x):
            raise ValueError(f"{name} wants q, k and v as tensors, got {type(x).__name__}")
    for x in (tq, tk, tv):
        if x is not None and not torch.is_tensor(x):
            raise ValueError(f"{name} wants tangents as tensors or None, got {type(x).__name__}")
    if _autocast_at_work(q.device.type) and q.dtype != torch.float64:
        _check_dtypes(name, (q, k, v, tq, tk, tv), same=False)
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, tq, tk, tv = (None if x is None else x.to(dtype) for x in (q, k, v, tq, tk, tv))
    _check_dtypes(name, (q, k, v, tq, tk, tv), same=True)
    _check_shapes(name, q, k, v, tq, tk, tv, enable_gqa)
    if dropout_p != 0:
        raise ValueError(f"{name} has no dropout: dropout_p must be 0.0, got {dropout_p}")
    if torch.is_tensor(scale):  # its gradient and tangent would be lost
        raise ValueError(f"{name} wants scale as a number: multiply q by a learned one")
    scale = q.size(3) ** -0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"{name} wants a finite scale > 0, got {scale}")
    if attn_mask is not None:
        if is_causal:
            raise ValueError(f"{name} takes attn_mask or is_causal, not both")
        attn_mask = _checked_mask(name, attn_mask, q, k)
    return _Checked((q, k, v, tq, tk, tv), attn_mask, scale)


def _autocast_at_work(device_type):
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _check_dtypes(name, tensors, same):
    """Floating tensors on one device, and of one dtype where `same`."""
    device = tensors[0].device
    dtype = tensors[0].dtype
    good = dtype in FLOATS
    for x in tensors:
        if x is not None:
            right = x.dtype == dtype if same else x.dtype in FLOATS
            good = good and right and x.device == device
    if not good:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in tensors if x is not None)
        raise ValueError(f"{name} wants tensors of one floating dtype on one device, got {kinds}")


def _check_shapes(name, q, k, v, tq, tk, tv, enable_gqa):
    def wrong(text=""):
        # Text that torch.compile can trace.
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        if tq is not None or tk is not None or tv is not None:
            for x in (tq, tk, tv):
                shapes += ", None" if x is None else f", {tuple(x.shape)}"
        return ValueError(
            f"{name} wants q, tq (B, H, Sq, D), k, tk (B, H, Sk, D) and v, tv (B, H, Sk, Dv)"
            f"{text}, got {shapes}"
        )

    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise wrong()
    for x, tangent in ((q, tq), (k, tk), (v, tv)):
        if tangent is not None and tangent.shape != x.shape:
            raise wrong(", and tangents shaped as their values")
    if k.shape[:3] != v.shape[:3] or q.size(0) != k.size(0) or q.size(3) != k.size(3):
        raise wrong()
    if q.size(3) == 0 or v.size(3) == 0:
        raise wrong(", with head sizes of at least 1")
    if q.size(1) != k.size(1):
        if not enable_gqa:
            raise wrong(", or enable_gqa=True for fewer heads in k and v")
        if not 0 < k.size(1) <= q.size(1) or q.size(1) % k.size(1) != 0:
            raise wrong(", the heads of q being a multiple of those of k and v")


def _checked_mask(name, mask, q, k):
    """The mask with four dimensions."""
    if not torch.is_tensor(mask):
        raise ValueError(f"{name} wants attn_mask to be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        raise ValueError(f"{name} wants attn_mask to be boolean or floating, got {mask.dtype}")
    if mask.device != q.device:
        raise ValueError(f"{name} wants attn_mask on {q.device}, got {mask.device}")
    scores = (*q.shape[:3], k.size(2))
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(sizes) != 4 or any(n not in (1, m) for n, m in zip(sizes, scores, strict=True)):
        raise ValueError(
            f"{name} wants attn_mask to broadcast to (B, H, Sq, Sk) = {scores}, "
            f"got {tuple(mask.shape)}"
        )
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} gives attn_mask no gradient: detach it")
    if _tangent_of(mask) is not None:
        raise ValueError(f"{name} wants attn_mask without a tangent")
    return mask.view(sizes)


def attention_jvp(
    q,
    k,
    v,
    tq,
    tk,
    tv,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """softmax(scale q k^T + mask) v and its derivative along (tq, tk, tv).

    q, tq: (B, H, Sq, D); k, tk: (B, H, Sk, D); v, tv: (B, H, Sk, Dv); one floating dtype, one
    device, any strides. Returns (o, to), both (B, H, Sq, Dv), differentiable in all six by
    backward. A tangent that is None is zero and costs nothing; where all three are, to is None.

    The other arguments are those of F.scaled_dot_product_attention:
    attn_mask  broadcasts to (B, H, Sq, Sk). Boolean: True where a query sees a key. Floating: added
               to the scores, and -1e6 or less hides a key. It has no tangent and gets no gradient.
               A query that sees no key gets zeros, and so do its gradients.
    dropout_p  0.0.
    is_causal  query i sees the keys up to i (not together with attn_mask).
    scale      above 0; D ** -0.5 where it is None.
    enable_gqa allows k and v to have fewer heads: H / n consecutive heads of q share one of n.

    The kernels take bfloat16, float16 and float32 on NVIDIA GPUs from compute capability 8.0 on,
    with Dv = D <= 256. Everything else takes `attention_jvp_reference`, whose memory is quadratic
    in S (or is an error, where FUSED = "require"). So do torch.func.grad, vjp and a jvp of a jvp:
    take gradients by backward. Under autocast all six are cast as F.scaled_dot_product_attention
    casts its own. Raises ValueError for other arguments.
    """
    checked = _checked(
        "attention_jvp", q, k, v, tq, tk, tv, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    return _attention_jvp(checked, is_causal)


def _attention_jvp(checked, causal):
    q, k, v, tq, tk, tv = checked.tensors
    mask, scale = checked.mask, checked.scale
    if tq is None and tk is None and tv is None:
        return _plain_attention(q, k, v, mask, causal, scale), None
    empty = q.numel() == 0 or k.numel() == 0
    if not empty:
        reason = why_not_fused(q, k, v) or why_not_nested(checked.tensors)
        _required(reason)
    if empty or reason is not None:
        return _reference(*checked.tensors, mask, causal, scale)
    needs_grad = any(x is not None and x.requires_grad for x in checked.tensors)
    save = torch.is_grad_enabled() and (needs_grad or len(_transforms()) > 0)
    inputs = (*checked.tensors, mask, scale, causal)
    if not _only_autograd((*checked.tensors, mask)):
        return _forward(*inputs, save)[:2]
    if save:
        return _Eager.apply(*inputs, True)
    return _forward_now(*inputs, False)[:2]


def attention(
    q,
    k,
    v,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """F.scaled_dot_product_attention, and under forward AD value and tangent by `attention_jvp`.

    q: (B, H, Sq, D), k: (B, H, Sk, D), v: (B, H, Sk, Dv). Where torch.func.jvp or
    torch.autograd.forward_ad carries tangents, the result has one too, and backward goes through
    both. The arguments, the checks and the errors are those of `attention_jvp`, with and without
    tangents; a query that sees no key gets zeros either way.
    """
    checked = _checked(
        "attention", q, k, v, None, None, None, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    q, k, v = checked.tensors[:3]
    if fwAD._current_level < 0:
        return _plain_attention(q, k, v, checked.mask, is_causal, checked.scale)
    if _tangents_are_hidden((q, k, v)):
        _required(why_not_nested((q, k, v)))
        return _reference(*checked.tensors, checked.mask, is_causal, checked.scale)[0]
    (q, tq), (k, tk), (v, tv) = (fwAD.unpack_dual(x) for x in (q, k, v))
    if tq is None and tk is None and tv is None:
        reason = why_not_nested(())
        if reason is not None:  # an outer transform may still have tangents
            _required(reason)
            return _reference(*checked.tensors, checked.mask, is_causal, checked.scale)[0]
        return _plain_attention(q, k, v, checked.mask, is_causal, checked.scale)
    reason = why_not_fused(q, k, v)
    if reason is not None and q.numel() > 0 and k.numel() > 0:
        # PyTorch's own forward mode, which also goes through a backward
        _required(reason)
        return _reference(*checked.tensors, checked.mask, is_causal, checked.scale)[0]
    o, to = _attention_jvp(checked._replace(tensors=(q, k, v, tq, tk, tv)), is_causal)
    return fwAD.make_dual(o, to)


def _plain_attention(q, k, v, mask, causal, scale):
    """F.scaled_dot_product_attention, with zeros for queries that see no key.

    Its backends differ in what they give there, NaN among it. So such a query sees every key, and
    its output is replaced."""
    if q.numel() == 0 or k.numel() == 0:
        return _reference(q, k, v, None, None, None, mask, causal, scale)[0]
    grouped = q.size(1) != k.size(1)
    if mask is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    hidden = ~mask if mask.dtype == torch.bool else mask <= MASKED_BELOW
    empty = hidden.all(-1, keepdim=True)
    if mask.dtype == torch.bool:
        mask = mask | empty
    else:  # within q's dtype, where a larger number would become infinite
        most = torch.finfo(q.dtype).max
        dtype = torch.promote_types(mask.dtype, q.dtype)  # it has numbers as near to `most` as q's
        mask = mask.to(dtype).clamp(-most, most).masked_fill(hidden, -math.inf)
        mask = mask.masked_fill(empty, 0).to(q.dtype)
    if grouped:  # no backend with linear memory takes a mask and groups together
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return o.masked_fill(empty, 0)
