"""The work of a block between its matrix products, in Triton kernels that touch each tensor once.

This file needs torch and triton only. dual.py calls these kernels where they can run. It also has
each rule as a plain formula: the reference, and what runs on other devices and in torch.compile.
The kernels' backward cannot be differentiated again; for that, set FUSED = False.

    x_out, low_out, dx_out, h, dh = add_norm(
        x, dx, y, dy, gate, dgate, shift, dshift, scale, dscale
    )
    out, dout = gelu(u, du)
    q, k, v, dq, dk, dv = qk_norm(qkv, dqkv, q_weight, k_weight, heads)
    sums = column_sums(x)

A d before a name is its tangent. Without tangents they are None, and the results' are None too. x
may come as two numbers of 16 bits, x + low, and goes out as x_out + low_out.

The maths
---------
mean is over a row of D numbers. Forward of add_norm:

    x_out = x + gate y                       dx_out = dx + dgate y + gate dy
    r = rsqrt(mean(x_out^2) + EPS)           m  = mean(n dx_out)
    n = r x_out                              dn = r (dx_out - m n)
    h = n (1 + scale) + shift                dh = dn (1 + scale) + n dscale + dshift

Backward. gX is the gradient of the loss with respect to X, and sum is over the tokens of an image:

    gn    = gh (1 + scale) + gdh dscale      gdn  = gdh (1 + scale)
    alpha = mean(n gdn)                      beta = mean(n gn + dn gdn)
    gdx = gdx_out + r (gdn - alpha n)
    gx  = gx_out + r (gn - r m gdn - r alpha dx_out - (beta - 2 r alpha m) n)
    gdy = gate gdx                           gy  = gate gx + dgate gdx
    gshift  = sum(gh)     gscale  = sum(n gh + dn gdh)     ggate  = sum(y gx + dy gdx)
    gdshift = sum(gdh)    gdscale = sum(n gdh)             gdgate = sum(y gdx)

qk_norm has the same norms with these differences: the row is a head of size d, x_out is a query or
key, and a weight stands in place of 1 + scale. There is no y and no shift.

gelu is the tanh form, u s with s = sigmoid(z). f_u is the derivative of f in u, f_uu the second:

    C1 = 2 sqrt(2 / pi)        C3 = 0.044715 C1          e = s (1 - s)
    z = C1 u + C3 u^3          z_u = C1 + 3 C3 u^2       z_uu = 6 C3 u
                               s_u = e z_u               s_uu = e ((1 - 2 s) z_u^2 + z_uu)
    slope = s + u s_u          slope_u = 2 s_u + u s_uu
    out = u s                  gu = slope gout + slope_u du gdout
    dout = slope du            gdu = slope gdout

The linear layer before gelu or qk_norm adds its bias as a constant. gelu and qk_norm take the bias
for one purpose: they return its gradient. It is the sum of gu or gqkv over all tokens, and their
backward makes this sum while it has the tokens in registers.

All sums are made in one order: first within blocks of tokens, then over the blocks. There are no
atomic additions, so that two runs give the same bits.
"""

import contextlib
import math
import os

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # without Triton dual.py takes its formulas
    triton = None

FUSED = True  # False: dual.py takes its formulas always
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # kernels on CPU tensors, for tests
EPS = 1e-6  # of every norm
DTYPES = (torch.float32, torch.bfloat16)  # that the kernels take
MAX_WIDTH = 2048  # of a row: it must fit into the registers of one program
MAX_ROWS = 32 * 65535  # a grid's second axis ends at 65,535 programs, here of 32 rows

# (tokens of a program, warps), measured on an H200 with XL/2's shapes.
NORM_FORWARD = (1, 4)
# By whether there are tangents. The third number is num_stages of the loop over tokens: with 3, two
# tokens more are being loaded, into shared memory.
NORM_BACKWARD = {False: (16, 4, 1), True: (32, 4, 3)}
GELU_BACKWARD = (32, 4)
QK_NORM_FORWARD = (32, 4)
QK_NORM_BACKWARD = (256, 4)
COLUMN_SUMS = (128, 4)
COLUMN_SUMS_TILE = 4096  # numbers that a program loads at a time
# Tokens that a program loads at a time.
GELU_TILE = 2
QK_NORM_TILE = 32


def why_not(x):
    """Why the kernels cannot take a tensor like x, or None where they can."""
    if not FUSED:
        return "FUSED is False"
    if torch.compiler.is_compiling():
        return "torch.compile makes kernels of the formulas"
    if triton is None:
        return "Triton is not installed"
    if x.size(-1) > MAX_WIDTH:
        return f"rows of {x.size(-1)} numbers are longer than {MAX_WIDTH}"
    if x.numel() > MAX_ROWS * x.size(-1):
        return f"there are more than {MAX_ROWS} rows"
    if x.device.type == "cpu" and INTERPRET:
        if x.dtype != torch.float32:
            return f"Triton's interpreter is wrong in {x.dtype}"
    elif not x.is_cuda or torch.version.hip is not None:
        return "the kernels run on NVIDIA GPUs"
    elif x.dtype not in DTYPES:
        return f"the kernels do not take {x.dtype}"
    elif torch.cuda.get_device_properties(x.device).major < 8:
        return "the kernels need compute capability 8.0"
    if transformed():
        return "a transform of torch.func, or forward AD, is at work"
    return None


def transformed():
    """Whether a transform of torch.func or forward AD is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# ---- kernels -------------------------------------------------------------------------------------
# add_norm holds a row of D numbers in two chunks whose sizes are powers of two: 1152 = 1024 + 128.
# One chunk of 2048 would leave almost half of the threads without work. A 1 or 2 at the end of a
# name is the first or the second chunk. Names in capitals are pointers, and constants of a program.
#
# A product reads faster what the kernel before it has left in the L2 cache. What the product does
# not read is therefore the first to leave that cache ("evict_first"): the tokens that a kernel
# loads, and those that it stores for a later norm or for the backward.


def row_chunks(D):
    """-> sizes of the two chunks of a row: powers of two, at least 16. There are always two."""
    first = max(16, 1 << (max(D - 1, 1).bit_length() - 1))
    second = max(16, 1 << (max(D - first, 1) - 1).bit_length())
    return first, second


if triton is not None:

    @triton.jit
    def load_once(P, at, inside):
        """P[at] in float32, 0 outside. For what no other program loads soon."""
        x = tl.load(P + at, mask=inside, other=0.0, eviction_policy="evict_first")
        return x.to(tl.float32)

    @triton.jit
    def load_row(P, row, c1, c2, D: tl.constexpr):
        """P[row : row + D] in float32, as two chunks."""
        first = tl.load(P + row + c1, mask=c1 < D, other=0.0)
        second = tl.load(P + row + c2, mask=c2 < D, other=0.0)
        return first.to(tl.float32), second.to(tl.float32)

    @triton.jit
    def load_row_once(P, row, c1, c2, D: tl.constexpr):
        """load_row, for what no other program loads soon."""
        return load_once(P, row + c1, c1 < D), load_once(P, row + c2, c2 < D)

    @triton.jit
    def store_row(P, row, c1, c2, first, second, D: tl.constexpr):
        """P[row : row + D] = the two chunks, rounded to P's dtype."""
        tl.store(P + row + c1, first.to(P.dtype.element_ty), mask=c1 < D)
        tl.store(P + row + c2, second.to(P.dtype.element_ty), mask=c2 < D)

    @triton.jit
    def store_row_for_later(P, row, c1, c2, first, second, D: tl.constexpr):
        """store_row, for what the next kernel does not load."""
        first = first.to(P.dtype.element_ty)
        second = second.to(P.dtype.element_ty)
        tl.store(P + row + c1, first, mask=c1 < D, eviction_policy="evict_first")
        tl.store(P + row + c2, second, mask=c2 < D, eviction_policy="evict_first")

    @triton.jit
    def add_pairs(p, q, more_p, more_q):
        return p + more_p, q + more_q

    @triton.jit
    def fold(first, second):
        """The first chunk, added up to the size of the second, plus the second."""
        SECOND: tl.constexpr = second.shape[0]
        RATIO: tl.constexpr = first.shape[0] // SECOND
        return tl.sum(tl.reshape(first, [SECOND, RATIO]), 1) + second

    @triton.jit
    def row_sum(p1, p2):
        return tl.sum(fold(p1, p2), 0)

    @triton.jit
    def row_sums(p1, p2, q1, q2):
        """The sums over two rows p and q, in one exchange between the warps."""
        return tl.reduce((fold(p1, p2), fold(q1, q2)), 0, add_pairs)

    @triton.jit
    def rounded(x, P):
        """x as it is read back from P."""
        return x.to(P.dtype.element_ty).to(tl.float32)

    @triton.jit
    def place(T, ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
        """This program's image and first token, and the columns of the two chunks of a row."""
        blocks = (T + ROWS - 1) // ROWS
        b = (tl.program_id(0) // blocks).to(tl.int64)
        start = (tl.program_id(0) % blocks) * ROWS
        c1 = tl.arange(0, FIRST)
        c2 = FIRST + tl.arange(0, SECOND)
        return b, start, c1, c2

    # fmt: off
    @triton.jit
    def add_norm_forward_kernel(
        X, LOW, DX, Y, DY, GATE, DGATE, SHIFT, DSHIFT, SCALE, DSCALE,
        X_OUT, LOW_OUT, DX_OUT, H, DH, R, M,
        gate_stride, shift_stride, scale_stride, T,
        D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr,
        EPS: tl.constexpr,
    ):
        # fmt: on
        """One program: ROWS tokens of an image. Without Y it writes no X_OUT, LOW_OUT and DX_OUT.

        X and LOW add up to x, and X_OUT and LOW_OUT to x_out. LOW and LOW_OUT may be None.
        """
        DUAL: tl.constexpr = DX is not None
        ADD: tl.constexpr = Y is not None
        b, start, c1, c2 = place(T, ROWS, FIRST, SECOND)
        shift1, shift2 = load_row(SHIFT, b * shift_stride, c1, c2, D)
        scale1, scale2 = load_row(SCALE, b * scale_stride, c1, c2, D)
        if ADD:
            gate1, gate2 = load_row(GATE, b * gate_stride, c1, c2, D)
        if DUAL:
            dshift1, dshift2 = load_row(DSHIFT, b * shift_stride, c1, c2, D)
            dscale1, dscale2 = load_row(DSCALE, b * scale_stride, c1, c2, D)
            if ADD:
                dgate1, dgate2 = load_row(DGATE, b * gate_stride, c1, c2, D)
        for t in range(start, tl.minimum(start + ROWS, T)):
            token = b * T + t
            row = token * D
            x1, x2 = load_row_once(X, row, c1, c2, D)
            if LOW is not None:
                low1, low2 = load_row_once(LOW, row, c1, c2, D)
                x1 += low1
                x2 += low2
            if DUAL:
                dx1, dx2 = load_row_once(DX, row, c1, c2, D)
            if ADD:
                y1, y2 = load_row_once(Y, row, c1, c2, D)
                # from here on x is x_out, and below dx is dx_out
                x1 += gate1 * y1
                x2 += gate2 * y2
                store_row_for_later(X_OUT, row, c1, c2, x1, x2, D)
                if LOW_OUT is not None:
                    low1 = x1 - rounded(x1, X_OUT)
                    low2 = x2 - rounded(x2, X_OUT)
                    store_row_for_later(LOW_OUT, row, c1, c2, low1, low2, D)
                else:
                    x1 = rounded(x1, X_OUT)
                    x2 = rounded(x2, X_OUT)
                if DUAL:
                    dy1, dy2 = load_row_once(DY, row, c1, c2, D)
                    dx1 = rounded(dx1 + dgate1 * y1 + gate1 * dy1, DX_OUT)
                    dx2 = rounded(dx2 + dgate2 * y2 + gate2 * dy2, DX_OUT)
                    store_row_for_later(DX_OUT, row, c1, c2, dx1, dx2, D)
            if DUAL:
                square, product = row_sums(x1 * x1, x2 * x2, x1 * dx1, x2 * dx2)
            else:
                square = row_sum(x1 * x1, x2 * x2)
            r = tl.rsqrt(square / D + EPS)
            n1 = r * x1
            n2 = r * x2
            h1 = n1 * (1 + scale1) + shift1
            h2 = n2 * (1 + scale2) + shift2
            store_row(H, row, c1, c2, h1, h2, D)
            tl.store(R + token, r)
            if DUAL:
                m = r * product / D
                dh1 = r * (dx1 - m * n1) * (1 + scale1) + n1 * dscale1 + dshift1
                dh2 = r * (dx2 - m * n2) * (1 + scale2) + n2 * dscale2 + dshift2
                store_row(DH, row, c1, c2, dh1, dh2, D)
                tl.store(M + token, m)

    # fmt: off
    @triton.jit
    def add_norm_backward_kernel(
        GX_OUT, GDX_OUT, GH, GDH, X_OUT, DX_OUT, Y, DY, GATE, DGATE, SCALE, DSCALE, R, M,
        GX, GDX, GY, GDY, SUMS,
        gate_stride, scale_stride, T,
        D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        # fmt: on
        """One program: ROWS tokens of an image. GX_OUT and GDX_OUT are None where they are zero.

        X_OUT is x_out without its low part, an error of one rounding in the gradient alone.
        SUMS (programs, 3 or 6, D): gradients of shift, scale, gate, dshift, dscale, dgate, summed
        over the tokens of a program.
        """
        DUAL: tl.constexpr = GDH is not None
        ADD: tl.constexpr = Y is not None
        b, start, c1, c2 = place(T, ROWS, FIRST, SECOND)
        scale1, scale2 = load_row(SCALE, b * scale_stride, c1, c2, D)
        shift_sum1 = tl.zeros([FIRST], tl.float32)
        shift_sum2 = tl.zeros([SECOND], tl.float32)
        scale_sum1 = shift_sum1
        scale_sum2 = shift_sum2
        if ADD:
            gate1, gate2 = load_row(GATE, b * gate_stride, c1, c2, D)
            gate_sum1 = shift_sum1
            gate_sum2 = shift_sum2
        if DUAL:
            dscale1, dscale2 = load_row(DSCALE, b * scale_stride, c1, c2, D)
            dshift_sum1 = shift_sum1
            dshift_sum2 = shift_sum2
            dscale_sum1 = shift_sum1
            dscale_sum2 = shift_sum2
            if ADD:
                dgate1, dgate2 = load_row(DGATE, b * gate_stride, c1, c2, D)
                dgate_sum1 = shift_sum1
                dgate_sum2 = shift_sum2
        for t in tl.range(start, tl.minimum(start + ROWS, T), num_stages=STAGES):
            token = b * T + t
            row = token * D
            # All loads stand together, so that they are in flight at the same time.
            x_out1, x_out2 = load_row_once(X_OUT, row, c1, c2, D)
            gh1, gh2 = load_row_once(GH, row, c1, c2, D)
            r = tl.load(R + token)
            if DUAL:
                dx_out1, dx_out2 = load_row_once(DX_OUT, row, c1, c2, D)
                gdh1, gdh2 = load_row_once(GDH, row, c1, c2, D)
                m = tl.load(M + token)
            if GX_OUT is not None:
                gx_out1, gx_out2 = load_row_once(GX_OUT, row, c1, c2, D)
                if DUAL:
                    gdx_out1, gdx_out2 = load_row_once(GDX_OUT, row, c1, c2, D)
            if ADD:
                y1, y2 = load_row_once(Y, row, c1, c2, D)
                if DUAL:
                    dy1, dy2 = load_row_once(DY, row, c1, c2, D)

            n1 = r * x_out1
            n2 = r * x_out2
            gn1 = gh1 * (1 + scale1)
            gn2 = gh2 * (1 + scale2)
            shift_sum1 += gh1
            shift_sum2 += gh2
            scale_sum1 += n1 * gh1
            scale_sum2 += n2 * gh2
            if DUAL:
                dn1 = r * (dx_out1 - m * n1)
                dn2 = r * (dx_out2 - m * n2)
                gn1 += gdh1 * dscale1
                gn2 += gdh2 * dscale2
                gdn1 = gdh1 * (1 + scale1)
                gdn2 = gdh2 * (1 + scale2)
                scale_sum1 += dn1 * gdh1
                scale_sum2 += dn2 * gdh2
                dshift_sum1 += gdh1
                dshift_sum2 += gdh2
                dscale_sum1 += n1 * gdh1
                dscale_sum2 += n2 * gdh2
                beta1 = n1 * gn1 + dn1 * gdn1
                beta2 = n2 * gn2 + dn2 * gdn2
                alpha, beta = row_sums(n1 * gdn1, n2 * gdn2, beta1, beta2)
                alpha = alpha / D
                along_n = beta / D - 2 * r * alpha * m
                gx1 = r * (gn1 - r * m * gdn1 - r * alpha * dx_out1 - along_n * n1)
                gx2 = r * (gn2 - r * m * gdn2 - r * alpha * dx_out2 - along_n * n2)
                gdx1 = r * (gdn1 - alpha * n1)
                gdx2 = r * (gdn2 - alpha * n2)
                if GX_OUT is not None:
                    gdx1 += gdx_out1
                    gdx2 += gdx_out2
                store_row_for_later(GDX, row, c1, c2, gdx1, gdx2, D)
            else:
                beta = row_sum(n1 * gn1, n2 * gn2) / D
                gx1 = r * (gn1 - beta * n1)
                gx2 = r * (gn2 - beta * n2)
            if GX_OUT is not None:
                gx1 += gx_out1
                gx2 += gx_out2
            store_row_for_later(GX, row, c1, c2, gx1, gx2, D)
            if ADD:
                gy1 = gate1 * gx1
                gy2 = gate2 * gx2
                gate_sum1 += y1 * gx1
                gate_sum2 += y2 * gx2
                if DUAL:
                    gy1 += dgate1 * gdx1
                    gy2 += dgate2 * gdx2
                    gate_sum1 += dy1 * gdx1
                    gate_sum2 += dy2 * gdx2
                    dgate_sum1 += y1 * gdx1
                    dgate_sum2 += y2 * gdx2
                    store_row(GDY, row, c1, c2, gate1 * gdx1, gate2 * gdx2, D)
                store_row(GY, row, c1, c2, gy1, gy2, D)

        vectors: tl.constexpr = 6 if DUAL else 3
        SUMS += tl.program_id(0).to(tl.int64) * vectors * D
        store_row(SUMS, 0, c1, c2, shift_sum1, shift_sum2, D)
        store_row(SUMS, D, c1, c2, scale_sum1, scale_sum2, D)
        if ADD:
            store_row(SUMS, 2 * D, c1, c2, gate_sum1, gate_sum2, D)
        if DUAL:
            store_row(SUMS, 3 * D, c1, c2, dshift_sum1, dshift_sum2, D)
            store_row(SUMS, 4 * D, c1, c2, dscale_sum1, dscale_sum2, D)
            if ADD:
                store_row(SUMS, 5 * D, c1, c2, dgate_sum1, dgate_sum2, D)

    # fmt: off
    @triton.jit
    def column_sums_kernel(
        X, SUMS, N, D, rows, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    ):
        # fmt: on
        """One program: COLUMNS columns (axis 1) of `rows` rows (axis 0) of X (N, D).

        SUMS (programs of axis 0, D): X, summed over the rows of a program.
        """
        c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        start = tl.program_id(0) * rows
        end = tl.minimum(start + rows, N)
        sums = tl.zeros([TILE, COLUMNS], tl.float32)
        for first in range(start, end, TILE):
            row = first + tl.arange(0, TILE)[:, None]
            at = row.to(tl.int64) * D + c
            sums += tl.load(X + at, mask=(row < end) & (c < D), other=0.0).to(tl.float32)
        sums = tl.sum(sums, 0)[None, :]
        tl.store(SUMS + tl.program_id(0).to(tl.int64) * D + c, sums, mask=c < D)

    C1 = tl.constexpr(2 * math.sqrt(2 / math.pi))
    C3 = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)

    @triton.jit
    def gelu_terms(u):
        """-> s, slope, e and z_u of the formulas at the top."""
        u2 = u * u
        s = 1 / (1 + tl.exp(-u * (C1 + C3 * u2)))
        z_u = C1 + 3 * C3 * u2
        e = s * (1 - s)
        return s, s + u * e * z_u, e, z_u

    @triton.jit
    def gelu_forward_kernel(U, DU, OUT, DOUT, numel, BLOCK: tl.constexpr):
        """One program: BLOCK numbers of numel."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        u = load_once(U, at, at < numel)
        s, slope, _, _ = gelu_terms(u)
        tl.store(OUT + at, (u * s).to(OUT.dtype.element_ty), mask=at < numel)
        if DU is not None:
            du = load_once(DU, at, at < numel)
            tl.store(DOUT + at, (slope * du).to(DOUT.dtype.element_ty), mask=at < numel)

    # fmt: off
    @triton.jit
    def gelu_backward_kernel(
        GOUT, GDOUT, U, DU, GU, GDU, SUMS, N, D,
        ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    ):
        # fmt: on
        """One program: COLUMNS columns (axis 0) of ROWS rows (axis 1). U and the others are (N, D).

        SUMS (programs of axis 1, D): GU, summed over the rows of a program.
        """
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        start = tl.program_id(1) * ROWS
        sums = tl.zeros([TILE, COLUMNS], tl.float32)
        for i in range(0, ROWS, TILE):
            row = start + i + tl.arange(0, TILE)[:, None]
            inside = (row < N) & (c < D)
            at = row.to(tl.int64) * D + c
            u = load_once(U, at, inside)
            gout = load_once(GOUT, at, inside)
            s, slope, e, z_u = gelu_terms(u)
            gu = slope * gout
            if GDOUT is not None:
                du = load_once(DU, at, inside)
                gdout = load_once(GDOUT, at, inside)
                s_uu = e * ((1 - 2 * s) * z_u * z_u + 6 * C3 * u)
                slope_u = 2 * e * z_u + u * s_uu
                gu += slope_u * du * gdout
                tl.store(GDU + at, (slope * gdout).to(GDU.dtype.element_ty), mask=inside)
            tl.store(GU + at, gu.to(GU.dtype.element_ty), mask=inside)
            sums += gu
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(SUMS + tl.program_id(1).to(tl.int64) * D + c, tl.sum(sums, 0), mask=c < D)

    # fmt: off
    @triton.jit
    def qk_norm_forward_kernel(
        QKV, DQKV, Q_WEIGHT, K_WEIGHT, Q, K, DQ, DK, N, heads,
        d: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
        EPS: tl.constexpr,
    ):
        # fmt: on
        """One program: a head (axis 0) of ROWS tokens (axis 1), its query and then its key.

        QKV (N, 3, heads, d), Q and K (N, heads, d). WIDTH: d, rounded up to a power of two.
        """
        head = tl.program_id(0)
        c = tl.arange(0, WIDTH)[None, :]
        for part in tl.static_range(2):
            if part == 0:
                weight = tl.load(Q_WEIGHT + c, mask=c < d, other=0.0).to(tl.float32)
            else:
                weight = tl.load(K_WEIGHT + c, mask=c < d, other=0.0).to(tl.float32)
            for i in range(0, ROWS, TILE):
                token = (tl.program_id(1) * ROWS + i + tl.arange(0, TILE)[:, None]).to(tl.int64)
                inside = (token < N) & (c < d)
                at = ((token * 3 + part) * heads + head) * d + c
                to = (token * heads + head) * d + c
                x = load_once(QKV, at, inside)
                r = tl.rsqrt(tl.sum(x * x, 1)[:, None] / d + EPS)
                n = r * x
                if part == 0:
                    tl.store(Q + to, (n * weight).to(Q.dtype.element_ty), mask=inside)
                else:
                    tl.store(K + to, (n * weight).to(K.dtype.element_ty), mask=inside)
                if DQKV is not None:
                    dx = load_once(DQKV, at, inside)
                    m = tl.sum(n * dx, 1)[:, None] / d
                    dout = r * (dx - n * m) * weight
                    if part == 0:
                        tl.store(DQ + to, dout.to(DQ.dtype.element_ty), mask=inside)
                    else:
                        tl.store(DK + to, dout.to(DK.dtype.element_ty), mask=inside)

    # fmt: off
    @triton.jit
    def qk_norm_gradient(
        GOUT, GDOUT, QKV, DQKV, WEIGHT, GQKV, GDQKV, SUMS, N, heads, part,
        d: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
        NORM: tl.constexpr, DUAL: tl.constexpr, EPS: tl.constexpr,
    ):
        # fmt: on
        """Gradients of the queries (part 0), keys (1) or values (2) of one head.

        GOUT and GDOUT (N, heads, d) are those of the results. Values have no norm (NORM is False).
        """
        head = tl.program_id(0)
        c = tl.arange(0, WIDTH)[None, :]
        bias_sum = tl.zeros([TILE, WIDTH], tl.float32)
        weight_sum = bias_sum
        if NORM:
            weight = tl.load(WEIGHT + c, mask=c < d, other=0.0).to(tl.float32)
        for i in range(0, ROWS, TILE):
            token = (tl.program_id(1) * ROWS + i + tl.arange(0, TILE)[:, None]).to(tl.int64)
            inside = (token < N) & (c < d)
            at = ((token * 3 + part) * heads + head) * d + c
            to = (token * heads + head) * d + c
            gx = load_once(GOUT, to, inside)
            if DUAL:
                gdx = load_once(GDOUT, to, inside)
            if NORM:  # gx and gdx are still the gradients of the results
                x = load_once(QKV, at, inside)
                r = tl.rsqrt(tl.sum(x * x, 1)[:, None] / d + EPS)
                n = r * x
                weight_sum += gx * n
                gn = gx * weight
                if DUAL:
                    dx = load_once(DQKV, at, inside)
                    m = tl.sum(n * dx, 1)[:, None] / d
                    dn = r * (dx - m * n)
                    weight_sum += gdx * dn
                    gdn = gdx * weight
                    alpha = tl.sum(n * gdn, 1)[:, None] / d
                    beta = tl.sum(n * gn + dn * gdn, 1)[:, None] / d
                    along_n = beta - 2 * r * alpha * m
                    gx = r * (gn - r * m * gdn - r * alpha * dx - along_n * n)
                    gdx = r * (gdn - alpha * n)
                else:
                    beta = tl.sum(n * gn, 1)[:, None] / d
                    gx = r * (gn - beta * n)
            bias_sum += gx
            tl.store(GQKV + at, gx.to(GQKV.dtype.element_ty), mask=inside)
            if DUAL:
                tl.store(GDQKV + at, gdx.to(GDQKV.dtype.element_ty), mask=inside)
        c = tl.arange(0, WIDTH)
        SUMS += ((tl.program_id(1).to(tl.int64) * 5 + part) * heads + head) * d
        tl.store(SUMS + c, tl.sum(bias_sum, 0), mask=c < d)
        if NORM:
            tl.store(SUMS + 3 * heads * d + c, tl.sum(weight_sum, 0), mask=c < d)

    # fmt: off
    @triton.jit
    def qk_norm_backward_kernel(
        GQ, GK, GV, GDQ, GDK, GDV, QKV, DQKV, Q_WEIGHT, K_WEIGHT, GQKV, GDQKV, SUMS, N, heads,
        d: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
        EPS: tl.constexpr,
    ):
        """One program: a head (axis 0) of ROWS tokens (axis 1), queries, keys or values (axis 2).

        SUMS (programs of axis 1, 5, heads, d): gradients of the biases of q, k and v and of the
        weights of q and k, summed over the tokens of a program.
        """
        DUAL: tl.constexpr = DQKV is not None
        if tl.program_id(2) == 0:
            qk_norm_gradient(GQ, GDQ, QKV, DQKV, Q_WEIGHT, GQKV, GDQKV, SUMS, N, heads, 0,
                             d, WIDTH, ROWS, TILE, True, DUAL, EPS)
        elif tl.program_id(2) == 1:
            qk_norm_gradient(GK, GDK, QKV, DQKV, K_WEIGHT, GQKV, GDQKV, SUMS, N, heads, 1,
                             d, WIDTH, ROWS, TILE, True, DUAL, EPS)
        else:
            qk_norm_gradient(GV, GDV, QKV, DQKV, Q_WEIGHT, GQKV, GDQKV, SUMS, N, heads, 2,
                             d, WIDTH, ROWS, TILE, False, DUAL, EPS)
    # fmt: on


def _on(x):
    """Makes x's device the current one, where Triton launches."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _dense(x):
    return None if x is None else x.contiguous()


def _empty_pair(like, shape, dtype, has_tangent):
    """Memory for a value and its tangent (None without one), on the device of `like`.

    They lie side by side, so that products.py can take both as one matrix. So neither may be
    changed in place, and who keeps one keeps the memory of both.
    """
    both = like.new_empty((1 + has_tangent, *shape), dtype=dtype)
    return both[0], both[1] if has_tangent else None


def _vectors(value, tangent):
    """Modulation vectors (B, 1, D) with one stride from image to image, and that stride."""
    if value is None:
        return None, None, 0
    stride = value.stride(0)
    same = tangent is None or tangent.stride(0) == stride and tangent.stride(2) == 1
    if value.stride(2) != 1 or not same:
        value, tangent = value.contiguous(), _dense(tangent)
        stride = value.stride(0)
    return value, tangent, stride


# The kernels trust the shapes that they are given, so each call is checked first, but for the
# limits of why_not. A CUDA graph has none of these checks.


def _check_shape(function, name, found, wanted):
    """Raises ValueError unless a tensor is None or has the shape `wanted`."""
    if found is not None and found.shape != wanted:
        raise ValueError(f"{function} wants {name} of {tuple(wanted)}, got {tuple(found.shape)}")


def _check_dtypes(function, dtypes, **tensors):
    """Raises ValueError unless tensors are None or of one of these dtypes."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{function} wants {name} in {wanted}, not {tensor.dtype}")


def _check_together(function, **tensors):
    """Raises ValueError where some tensors are None and others are not."""
    missing = [name for name, tensor in tensors.items() if tensor is None]
    if missing and len(missing) < len(tensors):
        raise ValueError(
            f"{function} takes all or none of {', '.join(tensors)}, got no {', '.join(missing)}"
        )


# ---- x + gate y, norm, scale and shift -----------------------------------------------------------


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, dx, y, dy, gate, dgate, shift, dshift, scale, dscale, dtype):
        """-> x_out, low_out, dx_out, h, dh in `dtype`, as add_norm; without y the first three are
        None."""
        ctx.dtypes = x.dtype, x.dtype if dx is None else dx.dtype
        B, T, D = x.shape
        x, low, dx, y, dy = _dense(x), _dense(low), _dense(dx), _dense(y), _dense(dy)
        gate, dgate, gate_stride = _vectors(gate, dgate)
        shift, dshift, shift_stride = _vectors(shift, dshift)
        scale, dscale, scale_stride = _vectors(scale, dscale)
        dual = dx is not None
        x_out, low_out, dx_out = None, None, None
        if y is not None:
            x_out, dx_out = _empty_pair(x, x.shape, dtype, dual)
            low_out = torch.empty_like(x, dtype=dtype) if dtype.itemsize == 2 else None
        h, dh = _empty_pair(x, x.shape, dtype, dual)
        r, m = _empty_pair(x, (B, T), torch.float32, dual)
        rows, warps = NORM_FORWARD
        with _on(x):
            # fmt: off
            add_norm_forward_kernel[(B * -(-T // rows),)](
                x, low, dx, y, dy, gate, dgate, shift, dshift, scale, dscale,
                x_out, low_out, dx_out, h, dh, r, m,
                gate_stride, shift_stride, scale_stride, T,
                D, *row_chunks(D), rows, EPS, num_warps=warps,
            )
            # fmt: on
        of_sum = (x, dx) if y is None else (x_out, dx_out)
        ctx.save_for_backward(*of_sum, y, dy, gate, dgate, scale, dscale, r, m)
        ctx.set_materialize_grads(False)
        if low_out is not None:
            ctx.mark_non_differentiable(low_out)
        return x_out, low_out, dx_out, h, dh

    @staticmethod
    @once_differentiable
    def backward(ctx, gx_out, _, gdx_out, gh, gdh):
        # Autograd gives None for a result that the loss does not use. Without a gradient of either
        # tangent this is the backward of the value alone. gx_out and gdx_out may both stay None,
        # for zero. Any other one that is missing becomes zeros.
        x_out, dx_out, y, dy, gate, dgate, scale, dscale, r, m = ctx.saved_tensors
        dual = gdx_out is not None or gdh is not None
        if not dual and gx_out is None and gh is None:
            return (None,) * 12
        if not dual:  # no gradient comes through the tangent
            dx_out, dy, dgate, dscale = None, None, None, None
        if gx_out is not None or gdx_out is not None:
            gx_out = torch.zeros_like(x_out) if gx_out is None else gx_out
            gdx_out = torch.zeros_like(dx_out) if gdx_out is None and dual else gdx_out
        if gh is None:
            gh = torch.zeros_like(x_out, dtype=x_out.dtype if y is None else y.dtype)
        if gdh is None and dual:
            gdh = torch.zeros_like(gh)
        gx, gdx, gy, gdy, sums = _add_norm_gradients(
            gx_out, gdx_out, gh, gdh, x_out, dx_out, y, dy, gate, dgate, scale, dscale, r, m,
            *ctx.dtypes,
        )  # fmt: skip

        B, _, vectors, D = sums.shape
        sums = _sum_over_blocks(sums.flatten(2))
        sums = sums.view(B, vectors, 1, D)  # float32; autograd casts each gradient
        gshift, gscale, ggate = sums[:, :3].unbind(1)
        gdshift, gdscale, gdgate = sums[:, 3:].unbind(1) if dual else (None, None, None)
        if y is None:
            ggate, gdgate = None, None
        of_vectors = ggate, gdgate, gshift, gdshift, gscale, gdscale
        return gx, None, gdx, gy, gdy, *of_vectors, None


def _add_norm_gradients(
    gx_out, gdx_out, gh, gdh, x_out, dx_out, y, dy, gate, dgate, scale, dscale, r, m,
    x_dtype, dx_dtype,
):  # fmt: skip
    """-> gradients of x, dx, y, dy, and sums (B, blocks, 3 or 6, D) as the kernel has them."""
    B, T, D = x_out.shape
    dual = gdh is not None
    rows, warps, stages = NORM_BACKWARD[dual]
    if D > 1280:  # else a thread has too few registers for its part of the row
        warps *= 2
    loaded = (gx_out, gdx_out, gh, gdh, x_out, dx_out, y, dy)
    token_bytes = sum(D * t.element_size() for t in loaded if t is not None)
    if token_bytes > 2**15:  # two tokens that are loaded ahead must fit into shared memory
        stages = 1
    gx_out, gdx_out, gh, gdh = _dense(gx_out), _dense(gdx_out), _dense(gh), _dense(gdh)
    gate, dgate, gate_stride = _vectors(gate, dgate)
    scale, dscale, scale_stride = _vectors(scale, dscale)
    gx = torch.empty_like(x_out, dtype=x_dtype)
    gdx = torch.empty_like(x_out, dtype=dx_dtype) if dual else None
    gy, gdy = (None, None) if y is None else _empty_pair(y, y.shape, y.dtype, dual)
    sums = x_out.new_empty(B, -(-T // rows), 6 if dual else 3, D, dtype=torch.float32)
    with _on(x_out):
        # fmt: off
        add_norm_backward_kernel[(B * -(-T // rows),)](
            gx_out, gdx_out, gh, gdh, x_out, dx_out, y, dy, gate, dgate, scale, dscale, r, m,
            gx, gdx, gy, gdy, sums,
            gate_stride, scale_stride, T,
            D, *row_chunks(D), rows, stages, num_warps=warps,
        )
        # fmt: on
    return gx, gdx, gy, gdy, sums


def add_norm(
    x,
    dx,
    y,
    dy,
    gate,
    dgate,
    shift,
    dshift,
    scale,
    dscale,
    low=None,
    dtype=None,
):
    """x_out = x + gate y, h = rms_norm(x_out) (1 + scale) + shift, and their tangents.

    x, y, dx, dy (B, T, D); gate, shift, scale and their tangents (B, 1, D); float32 or bfloat16,
    in any mixture. Sums and products are made in float32. The tangents are all there, or all None.
    y and gate are both there, or both None, and then x_out = x.

    low (B, T, D): the value of x is x + low. It has no tangent and gets no gradient.
    dtype: of all results; x's where it is None.

    Returns (x_out, low_out, dx_out, h, dh), each (B, T, D). low_out is what x_out lost when it was
    rounded to a dtype of 16 bits; it is None for other dtypes. Without y the first three are x, low
    and dx themselves. Without tangents dx_out and dh are None. Raises ValueError for other shapes
    or dtypes.
    """
    if x.dim() != 3:
        raise ValueError(f"add_norm wants x of (B, T, D), got {tuple(x.shape)}")
    B, _, D = x.shape
    for name, tokens in dict(dx=dx, y=y, dy=dy, low=low).items():
        _check_shape("add_norm", name, tokens, x.shape)
    vectors = dict(
        gate=gate,
        dgate=dgate,
        shift=shift,
        dshift=dshift,
        scale=scale,
        dscale=dscale,
    )
    for name, vector in vectors.items():
        _check_shape("add_norm", name, vector, (B, 1, D))
    _check_dtypes("add_norm", DTYPES, x=x, dx=dx, y=y, dy=dy, low=low, **vectors)
    _check_together("add_norm", y=y, gate=gate)
    if y is None:
        _check_together("add_norm", dx=dx, dshift=dshift, dscale=dscale)
    else:
        _check_together("add_norm", dx=dx, dy=dy, dgate=dgate, dshift=dshift, dscale=dscale)

    dtype = dtype or x.dtype
    x_out, low_out, dx_out, h, dh = _AddNorm.apply(
        x, low, dx, y, dy, gate, dgate, shift, dshift, scale, dscale, dtype
    )
    if y is None:
        x_out, low_out, dx_out = x, low, dx
    return x_out, low_out, dx_out, h, dh


# ---- sums over rows ------------------------------------------------------------------------------


def column_sums(x):
    """The sum of x (..., D) over all dimensions but the last: float32 (D,). It has no gradient."""
    _check_dtypes("column_sums", DTYPES, x=x)
    x = x.detach().contiguous().view(-1, x.size(-1))
    rows, _ = COLUMN_SUMS
    return _sum_over_blocks(_block_sums(x, rows)[None])[0]


def _sum_over_blocks(sums):
    """float32 (A, blocks, D) -> (A, D)"""
    A, blocks, D = sums.shape
    if sums.numel() == 0 or blocks == 1:
        return sums.sum(1)
    return _block_sums(sums.view(A * blocks, D), blocks)


def _block_sums(x, rows):
    """The sums over blocks of `rows` rows of x (N, D), which is contiguous: float32 (blocks, D)."""
    N, D = x.shape
    # A tile has at least 128 bytes of a row, and more of it where there are few rows.
    tile = min(COLUMN_SUMS_TILE * x.element_size() // 128, triton.next_power_of_2(rows))
    columns = COLUMN_SUMS_TILE // tile
    _, warps = COLUMN_SUMS
    sums = x.new_empty(-(-N // rows), D, dtype=torch.float32)
    with _on(x):
        column_sums_kernel[(len(sums), -(-D // columns))](
            x, sums, N, D, rows, tile, columns, num_warps=warps
        )
    return sums


# ---- GELU ----------------------------------------------------------------------------------------


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, du, bias):
        u, du = _dense(u), _dense(du)
        ctx.save_for_backward(u, du)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        out, dout = _empty_pair(u, u.shape, u.dtype, du is not None)
        block = 1024
        grid = (-(-u.numel() // block),)
        with _on(u):
            gelu_forward_kernel[grid](u, du, out, dout, u.numel(), block, num_warps=4)
        return out, dout

    @staticmethod
    @once_differentiable
    def backward(ctx, gout, gdout):
        u, du = ctx.saved_tensors
        if gout is None and gdout is None:
            return None, None, None
        gout = torch.zeros_like(u) if gout is None else _dense(gout)
        gdout = _dense(gdout)
        if gdout is None:  # no gradient comes through the tangent
            du = None
        D = u.size(-1)
        N = u.numel() // D
        rows, warps = GELU_BACKWARD
        gu, gdu = _empty_pair(u, u.shape, u.dtype, gdout is not None)
        sums = u.new_empty(-(-N // rows), D, dtype=torch.float32)  # of gu, over blocks of rows
        columns = min(512, triton.next_power_of_2(D))
        with _on(u):
            gelu_backward_kernel[(-(-D // columns), len(sums))](
                gout, gdout, u, du, gu, gdu, sums, N, D, rows, GELU_TILE, columns, num_warps=warps
            )
        gbias = None
        if ctx.bias_dtype is not None:
            gbias = _sum_over_blocks(sums[None])[0].to(ctx.bias_dtype)
        return gu, gdu, gbias


def gelu(u, du, bias=None):
    """The tanh form of GELU and its tangent: (out, dout), in u's shape and dtype.

    u (..., D) in float32 or bfloat16. du: of u's shape, in either dtype, or None; then dout is
    None. bias (D,), or None: u holds this bias already, as a constant. It is not added here, and
    is given for its gradient alone. Raises ValueError for other shapes or dtypes.
    """
    _check_dtypes("gelu", DTYPES, u=u, du=du)
    _check_shape("gelu", "du", du, u.shape)
    _check_shape("gelu", "bias", bias, u.shape[-1:])
    return _Gelu.apply(u, du, bias)


# ---- norms of queries and keys -------------------------------------------------------------------


def _width_and_tile(d):
    """-> d, rounded up to a power of two, and how many tokens of a head are loaded at a time."""
    width = max(16, triton.next_power_of_2(d))
    return width, min(QK_NORM_TILE, max(1, 4096 // width))  # more would not fit into registers


class _QKNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, dqkv, q_weight, k_weight, bias, heads):
        """Returns v beside q and k, so that the gradients of all three arrive together."""
        qkv, dqkv, q_weight, k_weight = (_dense(t) for t in (qkv, dqkv, q_weight, k_weight))
        ctx.save_for_backward(qkv, dqkv, q_weight, k_weight)
        ctx.heads = heads
        ctx.set_materialize_grads(False)
        B, T, D3 = qkv.shape
        d = D3 // (3 * heads)
        q, dq = _empty_pair(qkv, (B, T, heads, d), qkv.dtype, dqkv is not None)
        k, dk = _empty_pair(qkv, (B, T, heads, d), qkv.dtype, dqkv is not None)
        rows, warps = QK_NORM_FORWARD
        width, tile = _width_and_tile(d)
        with _on(qkv):
            qk_norm_forward_kernel[(heads, -(-B * T // rows))](
                qkv, dqkv, q_weight, k_weight, q, k, dq, dk, B * T, heads,
                d, width, rows, tile, EPS, num_warps=warps,
            )  # fmt: skip
        v = qkv.unflatten(-1, (3, heads, -1))[:, :, 2]
        dv = None if dqkv is None else dqkv.unflatten(-1, (3, heads, -1))[:, :, 2]
        return q, k, v, dq, dk, dv

    @staticmethod
    @once_differentiable
    def backward(ctx, gq, gk, gv, gdq, gdk, gdv):
        qkv, dqkv, q_weight, k_weight = ctx.saved_tensors
        gq, gk, gv = _all_or_none(gq, gk, gv)
        gdq, gdk, gdv = _all_or_none(gdq, gdk, gdv)
        if gdq is None:  # no gradient comes through the tangent
            dqkv = None
        if gq is None and gdq is None:
            return (None,) * 6
        if gq is None:
            gq, gk, gv = (torch.zeros_like(g) for g in (gdq, gdk, gdv))
        gq, gk, gv, gdq, gdk, gdv = (_dense(g) for g in (gq, gk, gv, gdq, gdk, gdv))
        N = qkv.size(0) * qkv.size(1)
        heads, d = gq.shape[2:]
        rows, warps = QK_NORM_BACKWARD
        width, tile = _width_and_tile(d)
        gqkv, gdqkv = _empty_pair(qkv, qkv.shape, qkv.dtype, dqkv is not None)
        sums = qkv.new_empty(-(-N // rows), 5, heads, d, dtype=torch.float32)
        with _on(qkv):
            qk_norm_backward_kernel[(heads, len(sums), 3)](
                gq, gk, gv, gdq, gdk, gdv, qkv, dqkv, q_weight, k_weight, gqkv, gdqkv, sums, N,
                heads, d, width, rows, tile, EPS, num_warps=warps,
            )  # fmt: skip
        sums = _sum_over_blocks(sums.flatten(1)[None]).view(5, heads, d)
        gq_weight, gk_weight = _sum_over_blocks(sums[3:])
        return (
            gqkv,
            gdqkv,
            gq_weight.to(q_weight.dtype),
            gk_weight.to(k_weight.dtype),
            sums[:3].flatten() if ctx.needs_input_grad[4] else None,
            None,
        )


def _all_or_none(*gradients):
    """Zeros for gradients that are missing, if others are there."""
    given = [g for g in gradients if g is not None]
    if not given:
        return gradients
    return [torch.zeros_like(given[0]) if g is None else g for g in gradients]


def qk_norm(qkv, dqkv, q_weight, k_weight, heads, bias=None):
    """Queries, keys and values (q, k, v, dq, dk, dv), each (B, T, heads, d) in qkv's dtype.

    q and k go through an RMS norm and are multiplied by their weights. v and dv are views of qkv
    and dqkv.

    qkv (B, T, 3 D) with D = heads d, in float32 or bfloat16. dqkv: of qkv's shape and dtype, or
    None; then dq, dk and dv are None. q_weight, k_weight (d,), float32 or bfloat16. bias (3 D,), or
    None: qkv holds this bias already, as a constant. It is not added here, and is given for its
    gradient alone. Raises ValueError for other shapes or dtypes.
    """
    if qkv.dim() != 3 or heads < 1 or qkv.size(-1) % (3 * heads):
        raise ValueError(f"qk_norm wants qkv of (B, T, 3 {heads} d), got {tuple(qkv.shape)}")
    weights = dict(q_weight=q_weight, k_weight=k_weight)
    _check_dtypes("qk_norm", DTYPES, qkv=qkv, dqkv=dqkv, **weights)
    d = qkv.size(-1) // (3 * heads)
    _check_shape("qk_norm", "dqkv", dqkv, qkv.shape)
    _check_shape("qk_norm", "q_weight", q_weight, (d,))
    _check_shape("qk_norm", "k_weight", k_weight, (d,))
    _check_shape("qk_norm", "bias", bias, qkv.shape[-1:])
    return _QKNorm.apply(qkv, dqkv, q_weight, k_weight, bias, heads)
