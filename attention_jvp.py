"""Softmax attention together with its derivative along a direction (forward mode), fused in Triton, and the
backward of both at once. One file, no dependency but torch and triton: copy it.

    from attention_jvp import attention, attention_jvp
    o, to = attention_jvp(q, k, v, tq, tk, tv)           # value and tangent, all (B, H, S, D)
    o = attention(q, k, v)                               # plain; inside torch.func.jvp it is the line above

With a = scale, rows i over queries and j over keys, tX the tangent of X:

    S = a Q K^T        P = softmax(S)      tS = a (tQ K^T + Q tK^T)      mu = rowsum(P tS)      N = tS - mu
    O = P V            tO = (P N) V + P tV

Backward, from dO and dtO together. The row sums need saved outputs only, so no pass over S x S prepares them:

    A   = dtO V^T                s1  = rowsum(dtO O)                     Gt  = P (A - s1)                   d / d tS
    B   = dO V^T + dtO tV^T      s2  = rowsum(dtO tO) + rowsum(dO O)     G   = P (B - s2 + (A - s1) N)      d / d S
    dQ  = a (G K + Gt tK)        dK  = a (G^T Q + Gt^T tQ)               dV  = P^T dO + (P N)^T dtO
    dtQ = a Gt K                 dtK = a Gt^T Q                          dtV = P^T dtO

Three kernels: `forward_kernel` (6 products, online softmax), `row_kernel` (s1, s2, dQ, dtQ; 9 products) and
`column_kernel` (dK, dV, dtK, dtV; 12). Products take the input dtype and accumulate in float32; the rest is float32.
Saved for the backward: inputs, outputs, two float32 rows, and the next four bits of tO (a quarter of its size for
powers of two from 16 on, at most half for other head sizes from 8 on).
"""
import contextlib
import functools
import math
import os

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import libdevice
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton: every call takes the PyTorch path
    triton = None

FUSED = True  # False: CUDA tensors, too, take PyTorch's path
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # kernels on CPU tensors, for tests
MAX_HEAD_DIM = 128
MAX_GRID = 65535  # programs along the second and third axis
MAX_ROW = 2 ** 24  # elements from row to row: those of a tile then lie within int32 of each other
TMA_FROM = 2 ** 25  # scores; a tensor's descriptor takes the host some 10 us, which a smaller call does not repay

# ----------------------------------------------------------------------------------------------------------------
# PyTorch: any device, any dtype, differentiable to any order, memory quadratic in S


def attention_reference(q, k, v, scale=None):
    """Softmax attention in plain PyTorch operations, which every transform can follow."""
    scale = q.size(-1) ** -0.5 if scale is None else scale
    exact = torch.promote_types(v.dtype, torch.float32)
    return ((q @ k.mT).to(exact) * scale).softmax(-1).to(v.dtype) @ v


def attention_jvp_reference(q, k, v, tq, tk, tv, scale=None):
    """`attention_jvp` in plain PyTorch operations. Products take and return the dtype of the inputs; softmax and row
    sums are in float32 (float64 for float64)."""
    scale = q.size(-1) ** -0.5 if scale is None else scale
    exact = torch.promote_types(v.dtype, torch.float32)
    P = ((q @ k.mT).to(exact) * scale).softmax(-1)
    tS = ((tq @ k.mT).to(exact) + (q @ tk.mT).to(exact)) * scale
    N = tS - (P * tS).sum(-1, keepdim=True)
    PN, P = (P * N).to(v.dtype), P.to(v.dtype)
    return P @ v, PN @ v + P @ tv


# ----------------------------------------------------------------------------------------------------------------
# Kernels. A (rows, D) tile is a tuple of one or two column chunks, D0 + D1 wide: D = 72 is 64 + 16, not 128. Everywhere
# W = (U, D, D0, D1), and strides are counted in units of U elements, so that the compiler sees aligned rows.

if triton is not None:
    LOG2E = tl.constexpr(math.log2(math.e))
    INTERPRETED = tl.constexpr(INTERPRET)

    @triton.jit
    def load(X, b, h, row, S, st, W: tl.constexpr, R: tl.constexpr, EVEN: tl.constexpr,
             TMA: tl.constexpr):
        """Rows row..row+R of X[b, h], zero outside. X is a tensor descriptor (TMA) or a pointer with strides U st."""
        U: tl.constexpr = W[0]
        D: tl.constexpr = W[1]
        D0: tl.constexpr = W[2]
        D1: tl.constexpr = W[3]
        if TMA:
            return (tl.reshape(X.load([b, h, row, 0]), [R, D0]),)
        else:
            X += (tl.cast(b, tl.int64) * st[0] + tl.cast(h, tl.int64) * st[1] + tl.cast(row, tl.int64) * st[2]) * U
            r = tl.arange(0, R)[:, None]
            c = tl.arange(0, D0)[None, :]
            if EVEN and D0 <= D:
                x = tl.load(X + r * (st[2] * U) + c)
            else:
                x = tl.load(X + r * (st[2] * U) + c, mask=(row + r < S) & (c < D), other=0.0)
            if D1 == 0:
                return (x,)
            else:
                c = D0 + tl.arange(0, D1)[None, :]
                return (x, tl.load(X + r * (st[2] * U) + c, mask=(row + r < S) & (c < D), other=0.0))

    @triton.jit
    def load_pair(X, Y, b, h, row, S, stx, sty, W: tl.constexpr, R: tl.constexpr):
        """The tiles of X and Y below each other, (2 R, D): one product with both costs one wait, not two. It takes the
        two addresses to differ by a multiple of U elements."""
        U: tl.constexpr = W[0]
        D: tl.constexpr = W[1]
        D0: tl.constexpr = W[2]
        D1: tl.constexpr = W[3]
        i = tl.arange(0, 2 * R)
        r = i % R
        x = tl.cast(b, tl.int64) * stx[0] + tl.cast(h, tl.int64) * stx[1] + tl.cast(row, tl.int64) * stx[2]
        y = tl.cast(b, tl.int64) * sty[0] + tl.cast(h, tl.int64) * sty[1] + tl.cast(row, tl.int64) * sty[2]
        y += (Y.to(tl.int64) - X.to(tl.int64)) // (U * (X.dtype.element_ty.primitive_bitwidth // 8))
        X += (tl.where(i < R, x + r * stx[2], y + r * sty[2]) * U)[:, None]
        c = tl.arange(0, D0)[None, :]
        x = tl.load(X + c, mask=(row + r < S)[:, None] & (c < D), other=0.0)
        if D1 == 0:
            return (x,)
        else:
            c = D0 + tl.arange(0, D1)[None, :]
            return (x, tl.load(X + c, mask=(row + r < S)[:, None] & (c < D), other=0.0))

    @triton.jit
    def halves(x):
        """Upper and lower half of the rows."""
        return tl.split(tl.permute(tl.reshape(x, (2, x.shape[0] // 2, x.shape[1])), (1, 2, 0)))

    @triton.jit
    def store(X, x, b, h, row, S, st, W: tl.constexpr, R: tl.constexpr, EVEN: tl.constexpr):
        U: tl.constexpr = W[0]
        D: tl.constexpr = W[1]
        X += (tl.cast(b, tl.int64) * st[0] + tl.cast(h, tl.int64) * st[1] + tl.cast(row, tl.int64) * st[2]) * U
        r = tl.arange(0, R)[:, None]
        for i in tl.static_range(len(x)):
            c = i * x[0].shape[1] + tl.arange(0, x[i].shape[1])[None, :]
            if EVEN and (i + 1) * x[0].shape[1] <= D:
                tl.store(X + r * (st[2] * U) + c, x[i].to(X.dtype.element_ty))
            else:
                tl.store(X + r * (st[2] * U) + c, x[i].to(X.dtype.element_ty), mask=(row + r < S) & (c < D))

    @triton.jit
    def zeros(R: tl.constexpr, W: tl.constexpr):
        D0: tl.constexpr = W[2]
        D1: tl.constexpr = W[3]
        if D1 == 0:
            return (tl.full((R, D0), 0.0, tl.float32),)
        else:
            return (tl.full((R, D0), 0.0, tl.float32), tl.full((R, D1), 0.0, tl.float32))

    @triton.jit
    def dot_t(x, y, acc, PREC: tl.constexpr):
        """x y^T + acc, summed over the head dimension."""
        for i in tl.static_range(len(x)):
            acc = tl.dot(x[i], tl.trans(y[i]), acc, input_precision=PREC)
        return acc

    @triton.jit
    def dot(p, x, acc, PREC: tl.constexpr):
        """p x + acc, the head dimension kept."""
        if len(x) == 1:
            return (tl.dot(p, x[0], acc[0], input_precision=PREC),)
        else:
            return (tl.dot(p, x[0], acc[0], input_precision=PREC), tl.dot(p, x[1], acc[1], input_precision=PREC))

    @triton.jit
    def times(x, r):
        if len(x) == 1:
            return (x[0] * r,)
        else:
            return (x[0] * r, x[1] * r)

    @triton.jit
    def plus(x, r, y):
        """x + r y, the tile y perhaps a single row."""
        if len(x) == 1:
            return (x[0] + r * y[0].to(tl.float32),)
        else:
            return (x[0] + r * y[0].to(tl.float32), x[1] + r * y[1].to(tl.float32))

    @triton.jit
    def log2(x):
        """By the one instruction, to 2^-22, where tl.log2 is forty."""
        if INTERPRETED:
            return tl.log2(x)
        else:
            return libdevice.fast_log2f(x)

    @triton.jit
    def bits(x):
        return x.to(tl.float32).to(tl.int32, bitcast=True)

    @triton.constexpr_function
    def low_words(D):
        """Of a chunk of D columns."""
        return max(8, D // 8) if D else 0

    @triton.constexpr_function
    def low_width(W):
        """W of the rows of LO, words of eight elements, or of four or two where the first chunk has but 32 or 16 columns."""
        w0, w1 = low_words(W[2]), low_words(W[3])
        return w0 + w1, w0 + w1, w0, w1

    @triton.jit
    def odd(x):
        """Float32 tiles with their last bit set: nothing is a tie for the rounding that low_bits is the rest of."""
        if len(x) == 1:
            return ((bits(x[0]) | 1).to(tl.float32, bitcast=True),)
        else:
            return ((bits(x[0]) | 1).to(tl.float32, bitcast=True), odd((x[1],))[0])

    @triton.jit
    def low_bits(x, dtype: tl.constexpr):
        """The first four bits that rounding float32 tiles x to nearest in dtype drops, those of eight columns in a word.
        Its columns are 8 apart: one thread has them all. A tie that goes down to even would come back a whole unit of
        dtype too low: x is `odd`."""
        SHIFT: tl.constexpr = 12 if dtype == tl.bfloat16 else 9
        N: tl.constexpr = low_words(x[0].shape[1]) // 8
        lo = bits(x[0]) >> SHIFT & 15
        lo = tl.reshape(lo, (lo.shape[0], N, lo.shape[1] // (8 * N), 8))
        lo = tl.reshape(tl.sum(lo << (4 * tl.arange(0, lo.shape[2]))[None, None, :, None], 2), (lo.shape[0], 8 * N))
        if len(x) == 1:
            return (lo,)
        else:
            return (lo, low_bits((x[1],), dtype)[0])

    @triton.jit
    def with_low_bits(x, lo):
        """Float32 again, from rounded x."""
        SHIFT: tl.constexpr = 12 if x[0].dtype == tl.bfloat16 else 9
        N: tl.constexpr = lo[0].shape[1] // 8
        J: tl.constexpr = x[0].shape[1] // (8 * N)
        y = tl.reshape(lo[0].to(tl.int32), (lo[0].shape[0], N, 1, 8)) << (28 - 4 * tl.arange(0, J))[None, None, :, None] >> 28
        y = tl.reshape(y, x[0].shape)  # -8 to 7: negative where rounding went up
        y = (bits(x[0]) + (y << SHIFT)).to(tl.float32, bitcast=True)
        if x[0].dtype == tl.float16:  # below 2^-14 it keeps other bits than those
            y = tl.where(tl.abs(x[0].to(tl.float32)) >= 2 ** -14, y, x[0].to(tl.float32))
        if len(x) == 1:
            return (y,)
        else:
            return (y, with_low_bits((x[1],), (lo[1],))[0])

    @triton.jit
    def rowsum(x, y):
        """rowsum(x * y) over the head dimension, in float32."""
        s = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
        if len(x) == 2:
            s += tl.sum(x[1].to(tl.float32) * y[1].to(tl.float32), 1)
        return s

    @triton.jit
    def colsum(x):
        """The sum of a tile's rows, as a tile of one row."""
        if len(x) == 1:
            return (tl.sum(x[0].to(tl.float32), 0)[None, :],)
        else:
            return (tl.sum(x[0].to(tl.float32), 0)[None, :], tl.sum(x[1].to(tl.float32), 0)[None, :])

    @triton.jit
    def load_row(X, i, S, R: tl.constexpr, EVEN: tl.constexpr, other: tl.constexpr):
        """Elements i..i+R of X, `other` from S on."""
        X += i
        r = tl.arange(0, R)
        if EVEN:
            return tl.load(X + r)
        else:
            return tl.load(X + r, mask=i + r < S, other=other)

    @triton.jit
    def block_of(S, H, BLOCK: tl.constexpr, FLAT: tl.constexpr):
        """Blocks of one head are neighbours and share L2. FLAT: all on grid axis 0, for the others end at 65,535."""
        if FLAT:
            blocks = tl.cdiv(S, BLOCK)
            bh = tl.program_id(0) // blocks
            return bh, bh // H, bh % H, (tl.program_id(0) % blocks) * BLOCK
        else:
            b, h = tl.program_id(2), tl.program_id(1)
            return b * H + h, b, h, tl.program_id(0) * BLOCK

    @triton.jit
    def centred(P, tS, c, l, mu):
        """P (tS - c), and the row sums l and mu, eight partial ones of each, with those of P and of it."""
        BM: tl.constexpr = P.shape[0]
        BN: tl.constexpr = P.shape[1]
        PN = P * (tS - c[:, None])
        l += tl.sum(tl.reshape(P, (BM, BN // 8, 8)), 1)
        mu += tl.sum(tl.reshape(PN, (BM, BN // 8, 8)), 1)
        return PN, l, mu

    @triton.jit
    def forward_kernel(Q, K, V, TQ, TK, TV, O, TO, LO, LSE, MU, stq, stk, stv, sttq, sttk, sttv, sto, H, Sq, Sk, scale,
                       HAS_LO: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
                       TMA: tl.constexpr, FULL: tl.constexpr, SAME: tl.constexpr, FLAT: tl.constexpr, PREC: tl.constexpr):
        if SAME:
            stv, sttk, sttv = stk, stk, stk
        bh, b, h, m0 = block_of(Sq, H, BM, FLAT)
        q = load(Q, b, h, m0, Sq, stq, W, BM, FULL, False)
        tq = load(TQ, b, h, m0, Sq, sttq, W, BM, FULL, False)
        c = tl.full((BM,), 0.0, tl.float32)
        m = tl.full((BM,), float("-inf"), tl.float32)  # running maximum, in units of log2
        l = tl.full((BM, 8), 0.0, tl.float32)
        mu = tl.full((BM, 8), 0.0, tl.float32)
        o = zeros(BM, W)
        to = zeros(BM, W)
        scale2 = scale * LOG2E
        for n0 in range(0, Sk, BN):
            k = load(K, b, h, n0, Sk, stk, W, BN, EVEN, TMA)
            tk = load(TK, b, h, n0, Sk, sttk, W, BN, EVEN, TMA)
            S = dot_t(q, k, None, PREC)
            tS = dot_t(q, tk, dot_t(tq, k, None, PREC), PREC)
            if not EVEN:
                S = tl.where((n0 + tl.arange(0, BN) < Sk)[None, :], S, float("-inf"))
            m_new = tl.maximum(m, tl.max(S, 1) * scale2)
            P = tl.exp2(S * scale2 - m_new[:, None])
            if n0 == 0:  # centred on the first keys' mean, P (tS - c) keeps its bits where tK has a common offset
                if W[2] >= 64:
                    c = tl.sum(tS, 1) * (scale / tl.minimum(BN, Sk))
                else:  # scores of few products vary most: P has peaks, where its mean is the better centre
                    c = tl.sum(P * tS, 1) / tl.sum(P, 1) * scale
            alpha = tl.exp2(m - m_new)
            l, mu, o, to = l * alpha[:, None], mu * alpha[:, None], times(o, alpha[:, None]), times(to, alpha[:, None])
            m = m_new
            if W[2] == 128:
                PN, l, mu = centred(P, tS * scale, c, l, mu)
            v = load(V, b, h, n0, Sk, stv, W, BN, EVEN, TMA)
            tv = load(TV, b, h, n0, Sk, sttv, W, BN, EVEN, TMA)
            Pr = P.to(v[0].dtype)
            o = dot(Pr, v, o, PREC)
            if W[2] == 128:
                to = dot(Pr, tv, dot(PN.to(v[0].dtype), v, to, PREC), PREC)
            else:  # P's own products run while PN is made: 2% faster at 64, 3% slower at 128
                to = dot(Pr, tv, to, PREC)
                PN, l, mu = centred(P, tS * scale, c, l, mu)
                to = dot(PN.to(v[0].dtype), v, to, PREC)
        l = tl.sum(l, 1)
        mu = tl.sum(mu, 1) / l
        o = times(o, (1 / l)[:, None])
        store(O, o, b, h, m0, Sq, sto, W, BM, FULL)
        to = plus(times(to, (1 / l)[:, None]), -mu[:, None], o)
        if TO.dtype.element_ty != tl.float32:
            to = odd(to)
        store(TO, to, b, h, m0, Sq, sto, W, BM, FULL)
        if HAS_LO:  # rounding a tO that tV offsets costs s2 its bits: the backward takes these back
            store(LO, low_bits(to, TO.dtype.element_ty), b, h, m0, Sq, (H * Sq, Sq, 1), low_width(W), BM, FULL)
        i = m0 + tl.arange(0, BM)
        tl.store(LSE + tl.cast(bh, tl.int64) * Sq + i, m + log2(l), mask=i < Sq)
        tl.store(MU + tl.cast(bh, tl.int64) * Sq + i, mu + c, mask=i < Sq)

    @triton.jit
    def row_kernel(Q, K, V, TQ, TK, TV, DO, DTO, O, TO, LO, LSE, MU, S1, S2, DQ, DTQ, TK0, stq, stk, stv, sttq, sttk,
                   sttv, stdo, stdto, sto, H, Sq, Sk, scale, HAS_LO: tl.constexpr, HAS_DTO: tl.constexpr,
                   PRIMAL: tl.constexpr, TANGENT: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   EVEN: tl.constexpr, TMA: tl.constexpr, SAME: tl.constexpr, FLAT: tl.constexpr, PREC: tl.constexpr):
        """s1, s2 of a block of rows; dQ if PRIMAL, dtQ if TANGENT (which needs HAS_DTO)."""
        if SAME:
            stv, sttk, sttv = stk, stk, stk
        bh, b, h, m0 = block_of(Sq, H, BM, FLAT)
        i = m0 + tl.arange(0, BM)
        vec = tl.cast(bh, tl.int64) * Sq + i
        o = load(O, b, h, m0, Sq, sto, W, BM, False, False)
        do = load(DO, b, h, m0, Sq, stdo, W, BM, False, False)
        if HAS_DTO:
            dto = load(DTO, b, h, m0, Sq, stdto, W, BM, False, False)
            to = load(TO, b, h, m0, Sq, sto, W, BM, False, False)
            if HAS_LO:
                lo = load(LO, b, h, m0, Sq, (H * Sq, Sq, 1), low_width(W), BM, False, False)
        if PRIMAL or TANGENT:
            q = load(Q, b, h, m0, Sq, stq, W, BM, False, False)
            lse = tl.load(LSE + vec, mask=i < Sq, other=0.0)
            if HAS_DTO:
                tq = load(TQ, b, h, m0, Sq, sttq, W, BM, False, False)
                mu = tl.load(MU + vec, mask=i < Sq, other=0.0)
        s2 = rowsum(do, o)
        if HAS_DTO:
            s1 = rowsum(dto, o)
            if HAS_LO:
                to = with_low_bits(to, lo)
            s2 += rowsum(dto, to)
        if PRIMAL or TANGENT:
            dq = zeros(BM, W)
            if HAS_DTO:
                dtq = zeros(BM, W)
                delta = tl.full((BM, 8), 0.0, tl.float32)  # of width 8, the least that the tensor cores sum
                ones = tl.full((BN, 8), 1.0, q[0].dtype)
            for n0 in range(0, Sk, BN):
                k = load(K, b, h, n0, Sk, stk, W, BN, EVEN, TMA)
                v = load(V, b, h, n0, Sk, stv, W, BN, EVEN, TMA)
                # P comes last and multiplies everything: until then few tiles are alive, which saves registers.
                if HAS_DTO:
                    A = dot_t(dto, v, None, PREC) - s1[:, None]
                if PRIMAL:
                    if HAS_DTO:
                        tk = load(TK, b, h, n0, Sk, sttk, W, BN, EVEN, TMA)
                        tv = load(TV, b, h, n0, Sk, sttv, W, BN, EVEN, TMA)
                        N = dot_t(q, tk, dot_t(tq, k, None, PREC), PREC) * scale - mu[:, None]
                        G = dot_t(dto, tv, A * N - s2[:, None], PREC)
                        G = dot_t(do, v, G, PREC)
                    else:
                        G = dot_t(do, v, None, PREC) - s2[:, None]
                P = tl.exp2(dot_t(q, k, None, PREC) * (scale * LOG2E) - lse[:, None])
                if not EVEN:
                    P = tl.where((n0 + tl.arange(0, BN) < Sk)[None, :], P, 0.0)
                if HAS_DTO:
                    Gt = (P * A).to(k[0].dtype)
                    if PRIMAL:
                        dq = dot(Gt, tk, dq, PREC)
                        delta = tl.dot(Gt, ones, delta, input_precision=PREC)
                    if TANGENT:
                        dtq = dot(Gt, k, dtq, PREC)
                if PRIMAL:  # as far as it can be from the other product into dQ, which it waits for
                    dq = dot((P * G).to(k[0].dtype), k, dq, PREC)
            if PRIMAL:
                if HAS_DTO:
                    # Rows of Gt sum to zero before rounding. Where tK has a common offset, what rounding leaves of
                    # the sum (delta) would meet it: taking the mean of some rows off tK changes nothing else.
                    first = colsum(load(TK0, b, h, 0, Sk, sttk, W, 16, False, False))
                    dq = plus(dq, tl.sum(delta, 1)[:, None] / (-8 * tl.minimum(Sk, 16)), first)
                store(DQ, times(dq, scale), b, h, m0, Sq, sto, W, BM, False)
            if TANGENT:
                store(DTQ, times(dtq, scale), b, h, m0, Sq, sto, W, BM, False)
        if HAS_DTO:
            tl.store(S1 + vec, s1, mask=i < Sq)
        tl.store(S2 + vec, s2, mask=i < Sq)

    @triton.jit
    def column_kernel(Q, K, V, TQ, TK, TV, DO, DTO, LSE, MU, S1, S2, DK, DV, DTK, DTV, stq, stk, stv, sttq, sttk, sttv,
                      stdo, stdto, sto, H, Sq, Sk, scale, HAS_DTO: tl.constexpr, PRIMAL: tl.constexpr,
                      TANGENT: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
                      TMA: tl.constexpr, SAME: tl.constexpr, FLAT: tl.constexpr, PAIR: tl.constexpr, PREC: tl.constexpr):
        """dK and dV if PRIMAL, dtK and dtV if TANGENT (which needs HAS_DTO), of a block of keys. Tiles are (BN, BM)."""
        if SAME:
            sttq, stdo, stdto = stq, stq, stq
        bh, b, h, n0 = block_of(Sk, H, BN, FLAT)
        k = load(K, b, h, n0, Sk, stk, W, BN, False, False)
        v = load(V, b, h, n0, Sk, stv, W, BN, False, False)
        if PRIMAL:
            dk = zeros(BN, W)
            dv = zeros(BN, W)
        if PAIR:  # only with PRIMAL and HAS_DTO
            k_tk = load_pair(K, TK, b, h, n0, Sk, stk, sttk, W, BN)
            v_tv = load_pair(V, TV, b, h, n0, Sk, stv, sttv, W, BN)
        elif PRIMAL and HAS_DTO:
            tk = load(TK, b, h, n0, Sk, sttk, W, BN, False, False)
            tv = load(TV, b, h, n0, Sk, sttv, W, BN, False, False)
        if TANGENT:
            dtk = zeros(BN, W)
            dtv = zeros(BN, W)
        row = tl.cast(bh, tl.int64) * Sq
        for m0 in range(0, Sq, BM):
            q = load(Q, b, h, m0, Sq, stq, W, BM, EVEN, TMA)
            lse = load_row(LSE + row, m0, Sq, BM, EVEN, float("inf"))  # so P = 0 in rows that do not exist
            s2 = load_row(S2 + row, m0, Sq, BM, EVEN, 0.0)
            if PRIMAL:
                do = load(DO, b, h, m0, Sq, stdo, W, BM, EVEN, TMA)
            if HAS_DTO:
                dto = load(DTO, b, h, m0, Sq, stdto, W, BM, EVEN, TMA)
                s1 = load_row(S1 + row, m0, Sq, BM, EVEN, 0.0)
                if PRIMAL:
                    tq = load(TQ, b, h, m0, Sq, sttq, W, BM, EVEN, TMA)
                    mu = load_row(MU + row, m0, Sq, BM, EVEN, 0.0)
            if PAIR:
                A, G = halves(dot_t(v_tv, dto, None, PREC))
                S, N = halves(dot_t(k_tk, q, None, PREC))
                A -= s1[None, :]
                N = dot_t(k, tq, N, PREC) * scale - mu[None, :]
                G = dot_t(v, do, G, PREC) + (A * N - s2[None, :])
            else:
                if HAS_DTO:
                    A = dot_t(v, dto, None, PREC) - s1[None, :]
                if PRIMAL:
                    if HAS_DTO:
                        N = dot_t(tk, q, dot_t(k, tq, None, PREC), PREC) * scale - mu[None, :]
                        G = dot_t(v, do, dot_t(tv, dto, A * N - s2[None, :], PREC), PREC)
                    else:
                        G = dot_t(v, do, None, PREC) - s2[None, :]
                S = dot_t(k, q, None, PREC)
            P = tl.exp2(S * (scale * LOG2E) - lse[None, :])
            # Products into different accumulators follow each other, so that few wait for the one before.
            Pr = P.to(q[0].dtype)
            if PRIMAL:
                dv = dot(Pr, do, dv, PREC)
            if HAS_DTO:
                Gt = (P * A).to(q[0].dtype)
                if PRIMAL:
                    dk = dot(Gt, tq, dk, PREC)
                if TANGENT:
                    dtv = dot(Pr, dto, dtv, PREC)
                    dtk = dot(Gt, q, dtk, PREC)
                if PRIMAL:
                    dv = dot((P * N).to(q[0].dtype), dto, dv, PREC)
            if PRIMAL:
                dk = dot((P * G).to(q[0].dtype), q, dk, PREC)
        if PRIMAL:
            store(DV, dv, b, h, n0, Sk, sto, W, BN, False)
            store(DK, times(dk, scale), b, h, n0, Sk, sto, W, BN, False)
        if TANGENT:
            store(DTV, dtv, b, h, n0, Sk, sto, W, BN, False)
            store(DTK, times(dtk, scale), b, h, n0, Sk, sto, W, BN, False)


# ----------------------------------------------------------------------------------------------------------------
# Launching

# (BM, BN, num_warps, num_stages, TMA, PAIR) by kernel and padded head dimension, measured on one H200, for Hopper. 255 registers a
# thread are the limit everywhere: two programs of 4 warps share a multiprocessor, or one of 8 owns it.
TILES = {
    # Chunks of 16 columns (D = 72) have no descriptor; at D = 128 pointers were faster.
    "forward": {64: (64, 64, 4, 3, 1, 0), 96: (64, 64, 4, 2, 0, 0), 128: (128, 64, 8, 2, 0, 0)},
    # A short loop is mostly waiting at its ends: three programs a multiprocessor then beat two.
    "short": {64: (64, 32, 4, 3, 0, 0)},
    # Four score tiles live at once: half the keys of the forward, but for D = 64, where they just fit.
    "row": {64: (64, 64, 4, 2, 1, 0), 96: (64, 32, 4, 3, 0, 0), 128: (128, 32, 8, 3, 0, 0)},
    # All four gradients in one pass, where their accumulators fit; otherwise "primal" and "tangent".
    "column": {64: (32, 64, 4, 3, 1, 1)},
    # dK and dV, 10 products; pairs where shared memory has room for them.
    "primal": {64: (32, 64, 4, 3, 0, 1), 96: (32, 64, 4, 3, 0, 0), 128: (32, 128, 8, 3, 0, 0)},
    # dtK and dtV, 4 products: few tiles alive, so room for more rows or stages.
    "tangent": {64: (32, 64, 4, 3, 0, 0), 96: (64, 64, 4, 3, 0, 0), 128: (64, 64, 4, 2, 1, 0)},
}
SMALL_TILES = 32, 32, 4, 2, 0, 0  # for other GPUs: 67 KB of shared memory at most, and none of Blackwell's tensor memory
FLOAT32_TILES = 16, 16, 4, 1, 0, 0  # products of three TF32 products each, which fill the registers


def _chunks(D):
    """Head dimension -> widths (D0, D1) of the column chunks: powers of two, 16 at least, with little padding."""
    D0 = max(16, 1 << (D.bit_length() - 1))
    D1 = max(16, 1 << (D - D0 - 1).bit_length()) if D > D0 else 0
    return (D0, D1) if D0 + D1 < 2 * D0 else (2 * D0, 0)


def _tiles(kernel, D, dtype, device):
    """An entry of TILES, or what stands for it; None where the kernel is left to "primal" and "tangent"."""
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9
    if dtype == torch.float32 or not hopper:
        return None if kernel == "column" else FLOAT32_TILES if dtype == torch.float32 else SMALL_TILES
    width = sum(_chunks(D))
    return TILES[kernel].get(64 if width <= 64 else 96 if width <= 96 else 128)


def _rows(x):
    """The kernels take any strides, but 1 in the last dimension and less than MAX_ROW in the one before."""
    return x if x.stride(3) == 1 and x.stride(2) < MAX_ROW else x.contiguous()


def _order(x):
    """Strides of a (B, H, S, D) tensor in the memory order (B, S, H, D): the reshape to (B, S, H D) to come is free."""
    _, H, S, D = x.shape
    return (S * H * D, D, H * D, 1) if H * D < MAX_ROW else (H * S * D, S * D, D, 1)


def _like(x, dtype=None):
    return torch.empty_strided(x.shape, _order(x), dtype=dtype or x.dtype, device=x.device)


@functools.lru_cache(maxsize=None)
def _plan(name, shape, dtype, device, streamed, other_S, strides):
    """All that a launch over the blocks of a tensor of this shape needs but the addresses."""
    B, H, S, D = shape
    D0, D1 = _chunks(D)
    short = name == "forward" and D0 == 64 and D1 == 0 and other_S < 512
    BM, BN, num_warps, num_stages, tma, pair = _tiles("short" if short else name, D, dtype, device)
    own, other = (BM, BN) if name in ("forward", "row") else (BN, BM)
    U = 8 if all(s % 8 == 0 for st in strides for s in st[:3]) else 1
    # Descriptors want strides in multiples of 16 bytes, and rows that do not overlap.
    tma = bool(tma) and B * H * S * other_S >= TMA_FROM and U == 8 and D1 == 0 and all(0 not in strides[i] for i in streamed)
    same = len({strides[i] for i in streamed}) == 1  # the compiler then keeps one set of offsets, not four
    flat = max(B, H) > MAX_GRID
    meta = dict(W=(U, D, D0, D1), BM=BM, BN=BN, EVEN=other_S % other == 0, SAME=same, FLAT=flat)
    if name == "forward":  # the other kernels, short of registers, were slower without the masks
        meta["FULL"] = S % own == 0
    units = [tuple(s // U for s in st[:3]) for st in strides]
    options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)  # of Triton 3.10 on no default
    blocks = -(-S // own)
    return (blocks * H * B, 1, 1) if flat else (blocks, H, B), meta, options, units, tma, bool(pair), [1, 1, other, D0]


_compiled = {}  # Triton's own launch sorts some sixty arguments, which takes longer than a small call's work on the GPU


def _launch(kernel, name, x, streamed, paired, tensors, strides, sizes, **flags):
    """Runs a kernel over the blocks of x (Q or K). streamed: which of tensors it reads block by block; paired: which it
    can load in pairs, None for a kernel that has no pairs."""
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"  # of float32 inputs
    address = [t.data_ptr() for t in tensors]
    aligned = not any(a % 16 for a in address)
    plan = name, x.shape, x.dtype, x.device, streamed, tensors[streamed[0]].size(2), strides
    grid, meta, options, units, tma, pair, block = _plan(*plan)
    flags["TMA"] = tma = tma and aligned
    if paired is not None:
        unit = meta["W"][0] * x.element_size()
        flags["PAIR"] = pair and len(paired) > 0 and all((address[i] - address[j]) % unit == 0 for i, j in paired)
    key = plan, sizes, precision, *flags.values()
    run = _compiled.get(key) if aligned else None
    given = address if run else tensors  # Triton asks the driver about every tensor's address, and takes a number's as it is
    if tma:
        given = [TensorDescriptor(tensors[i], tensors[i].shape, tensors[i].stride(), block) if i in streamed else x
                 for i, x in enumerate(given)]
    if run:
        run(*given, *units, *sizes)
    else:
        constants = {**meta, **flags, "PREC": precision}
        program = kernel[grid](*given, *units, *sizes, **constants, **options)
        if aligned and not INTERPRET:  # of the arguments' values, a compiled program takes only alignment for granted
            constants = [constants[p] for p in kernel.arg_names if p in constants]
            run = program[grid]
            _compiled[key] = lambda *given: run(*given, *constants)


def _on(x):
    """Triton launches on the current device: makes it that of x."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext()


def _forward_now(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor,
                 scale: float, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> o, to; if save, four bits that rounding took from each element of to (eight in an int32, see low_bits; empty for
    float32), else an empty tensor; logsumexp (base 2) and mu, both (B, H, Sq) in float32."""
    x = [_rows(t) for t in (q, k, v, tq, tk, tv)]
    o, to, lo, lse, mu = outputs = _empty_outputs(q, save)
    with _on(q):
        _launch(forward_kernel, "forward", q, (1, 2, 4, 5), None,
                (*x, o, to, lo, lse, mu), tuple(t.stride() for t in (*x, o)),
                (q.size(1), q.size(2), k.size(2), scale), HAS_LO=lo.numel() > 0)
    return outputs


def _empty_outputs(q, save):
    D0, D1 = _chunks(q.size(3))
    words = low_words(D0) + low_words(D1) if save and q.dtype != torch.float32 else 0
    return (_like(q), _like(q), q.new_empty((*q.shape[:3], words), dtype=(torch.int8, torch.int16, torch.int32)[min(D0, 64) // 32]),
            *(q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2)))


_forward = torch.library.custom_op("attention_jvp::forward", _forward_now, mutates_args=())


@_forward.register_fake
def _(q, k, v, tq, tk, tv, scale, save):
    return _empty_outputs(q, save)


def _backward_now(do: Tensor | None, dto: Tensor | None, q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor,
                  tv: Tensor, o: Tensor, to: Tensor, lo: Tensor, lse: Tensor, mu: Tensor, scale: float,
                  need: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, dtq, dtk, dtv; need: is dq, (dk, dv), dtq, (dtk, dtv) wanted; an empty tensor where it is not.
    do or dto may be missing, not both; without dto the last two cannot be needed."""
    do = q.new_zeros(q.size(3)).expand_as(q) if do is None else do
    has_lo, has_dto = dto is not None and lo.numel() > 0, dto is not None
    x = [_rows(t) for t in (q, k, v, tq, tk, tv, do, dto if has_dto else do)]
    grads = dq, dk, dv, dtq, dtk, dtv = _empty_grads(q, k, v, need)
    s1, s2 = torch.empty_like(lse), torch.empty_like(lse)
    like_q, like_k = _order(q), _order(k)
    o, to = (t if t.stride() == like_q else _like(t).copy_(t) for t in (o, to))
    strides, sizes = tuple(t.stride() for t in x), (q.size(1), q.size(2), k.size(2), scale)
    with _on(q):
        _launch(row_kernel, "row", q, (1, 2, 4, 5), None, (*x, o, to, lo, lse, mu, s1, s2, dq, dtq, x[4]),
                (*strides, like_q), sizes, HAS_LO=has_lo, HAS_DTO=has_dto, PRIMAL=need[0], TANGENT=need[2])
        passes = [("primal", need[1], False), ("tangent", False, need[3])]
        if need[1] and need[3] and _tiles("column", k.size(3), k.dtype, k.device):
            passes = [("column", True, True)]
        for name, primal, tangent in passes:
            if primal or tangent:
                _launch(column_kernel, name, k, (0, 3, 6, 7), ((1, 4), (2, 5)) if primal and has_dto else (),
                        (*x, lse, mu, s1, s2, dk, dv, dtk, dtv), (*strides, like_k), sizes, HAS_DTO=has_dto,
                        PRIMAL=primal, TANGENT=tangent)
    return grads


def _empty_grads(q, k, v, need):
    return tuple(_like(x) if n else x.new_empty(0) for x, n in
                 zip((q, k, v, q, k, v), (need[0], need[1], need[1], need[2], need[3], need[3])))


_backward = torch.library.custom_op("attention_jvp::backward", _backward_now, mutates_args=())


@_backward.register_fake
def _(do, dto, q, k, v, tq, tk, tv, o, to, lo, lse, mu, scale, need):
    return _empty_grads(q, k, v, need)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.scale = inputs[6]
    ctx.set_materialize_grads(False)  # a missing gradient stays None, and the work for it is not done


def _gradients(ctx, do, dto, *_):
    if do is None and dto is None:
        return (None,) * 8
    need = ctx.needs_input_grad
    t = dto is not None
    pairs = [need[0], need[1] or need[2], t and need[3], t and (need[4] or need[5])]
    saved = ctx.saved_tensors
    backward = _backward_now if _plain((do, dto, *saved)) and not torch.is_grad_enabled() else _backward
    grads = backward(do, dto, *saved, ctx.scale, pairs)
    return (*(g if n and (i < 3 or t) else None for i, (g, n) in enumerate(zip(grads, need))), None, None)


def _no_more(ctx, *_):
    raise RuntimeError("attention_jvp: the fused backward has no derivative of its own; for gradients of gradients "
                       "call attention_jvp_reference")


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_no_more)


class _Eager(torch.autograd.Function):
    """The operators for plain tensors, without the dispatcher, which takes longer than a small call's work on the GPU."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward_now(*inputs)
        _save(ctx, inputs, output)
        return output[:2]

    @staticmethod
    def backward(ctx, do, dto):
        return _gradients(ctx, do, dto)


# ----------------------------------------------------------------------------------------------------------------
# Public


def _fused(x):
    """Whether the kernels take a call with tensors like x; the PyTorch path takes the others."""
    if triton is None or not 0 < x.size(-1) <= MAX_HEAD_DIM or x.numel() == 0:
        return False
    if x.device.type == "cpu":
        return INTERPRET and x.dtype == torch.float32  # the interpreter's low-precision products are wrong
    return (FUSED and x.is_cuda and torch.version.hip is None and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
            and torch.cuda.get_device_properties(x.device).major >= 8)


def _plain(x):
    """Whether nothing but autograd watches these tensors: no compiler, transform, dispatch mode or subclass."""
    return (not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
            and torch._C._len_torch_dispatch_stack() == 0
            and all(t is None or type(t) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_legacy_batchedtensor(t)
                    for t in x))


def _transforms():
    """Names of the torch.func transforms at work, outermost first."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return []
    return [str(i.key()).split(".")[-1] for i in torch._C._functorch.get_interpreter_stack()]


def _nested(x):
    """Whether a transform is at work that the operators would not see through: a tangent of x itself, torch.func.grad,
    or one torch.func.jvp inside another. (torch.func.jvp alone, vmap, and backward through either are seen.)"""
    active = _transforms()
    return ("Grad" in active or active.count("Jvp") > 1
            or fwAD._current_level >= 0 and any(fwAD.unpack_dual(t).tangent is not None for t in x))


def attention_jvp(q, k, v, tq, tk, tv, scale=None):
    """softmax(scale q k^T) v and its derivative along (tq, tk, tv), differentiable in all six by backward.

    q, tq: (B, H, Sq, D); k, v, tk, tv: (B, H, Sk, D); one floating dtype, one device, any strides. scale > 0, default
    D ** -0.5. Returns (o, to), both like q. The kernels take CUDA tensors (compute capability 8.0 or more) in bfloat16,
    float16 or float32 with D <= 128; everything else takes `attention_jvp_reference`, whose memory is quadratic in S. So do
    torch.func.grad, vjp and a jvp of a jvp: take gradients by backward.
    Under autocast all six are cast as F.scaled_dot_product_attention casts its own. ValueError for other arguments.
    """
    x = (q, k, v, tq, tk, tv)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        x = q, k, v, tq, tk, tv = tuple(t.to(dtype) for t in x)
    if not (q.dim() == k.dim() == 4 and q.shape == tq.shape and k.shape == v.shape == tk.shape == tv.shape
            and q.shape[:2] == k.shape[:2] and q.size(3) == k.size(3)):
        raise ValueError("attention_jvp wants q, tq (B, H, Sq, D) and k, v, tk, tv (B, H, Sk, D), got "
                         + ", ".join(str(tuple(t.shape)) for t in x))
    if any(t.dtype != q.dtype or t.device != q.device for t in x) or not q.is_floating_point():
        raise ValueError("attention_jvp wants six tensors of one floating dtype on one device, got "
                         + ", ".join(f"{t.dtype} on {t.device}" for t in x))
    scale = q.size(3) ** -0.5 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"attention_jvp wants scale > 0, got {scale}")
    if not _fused(q) or k.numel() == 0 or _nested(x):
        return attention_jvp_reference(*x, scale=scale)
    save = torch.is_grad_enabled() and (any(t.requires_grad for t in x) or bool(_transforms()))
    if not _plain(x):
        return _forward(*x, scale, save)[:2]
    return _Eager.apply(*x, scale, True) if save else _forward_now(*x, scale, False)[:2]


def attention(q, k, v, scale=None):
    """F.scaled_dot_product_attention(q, k, v, scale=scale), (B, H, S, D); where torch.func.jvp or forward_ad asks for a
    tangent, `attention_jvp` of values and tangents, which backward can follow."""
    if fwAD._current_level < 0:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if _transforms()[-1:] == ["Vmap"]:  # vmap inside jvp: the tangents are out of reach
        return attention_reference(q, k, v, scale)
    (q, tq), (k, tk), (v, tv) = (fwAD.unpack_dual(x) for x in (q, k, v))
    if tq is None and tk is None and tv is None:  # no tangent here, but perhaps one of an outer transform
        plain = attention_reference if _nested(()) else F.scaled_dot_product_attention
        return plain(q, k, v, scale=scale)
    tq, tk, tv = (x.new_zeros(x.size(-1)).expand_as(x) if t is None else t for x, t in ((q, tq), (k, tk), (v, tv)))
    return fwAD.make_dual(*attention_jvp(q, k, v, tq, tk, tv, scale))
