# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the contributors. MIT License: https://opensource.org/license/mit
"""The backward of attention_jvp.py on Hopper GPUs, in Gluon: optional, and faster at head size 128.

With HOPPER_KERNELS = True attention_jvp.py calls it where `why_not` allows. Otherwise, and without
this file, it takes its own kernels, which run on every GPU. The maths and its names are at the top
of attention_jvp.py. Results have the same errors, except under a key mask where some of the first
16 keys have little weight and far larger tangents than the others (see mean_kernel).

Why it is faster
----------------
Plain Triton waits for every product whose result the same turn of the loop uses. Gluon, Triton's
lower level, says when to wait. So tensor cores work on while other warps compute exponentials:

1. A program has two groups of four warps with 240 registers a thread, and one more warp, which does
   nothing but copy tiles to shared memory (TMA), a block or two ahead.
2. `row_kernel` (dQ, dtQ; 9 products): each group has 64 queries of its own.
3. `column_kernel` (dK, dV, dtK, dtV; 12 products): both groups have the same 64 keys. One makes P
   and N and sums up dV and dtV. It sends P and N through shared memory to the other, which makes
   G and Gt and sums up dK and dtK. Four sums would not fit into the registers of one group, so
   plain Triton needs two passes over the scores, with 14 products.

One warp hands blocks of rows to the others through stages of shared memory. Each stage has two
barriers: `ready` says that it is filled, `free` that both groups are done with it. To wait for a
barrier one names the parity of its phase, which changes each time that the stage is used.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

HEAD_SIZES = (128,)
TRITON = "3.6"  # other versions compile these kernels, but keep registers in memory
LEAST_SCORES = 2**26  # B H Sq Sk, below which the launches take the host longer than the GPU

# Later versions of Triton have other names for these: a copy by TMA, and what waits for all warps
# of a group.
copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
LOG2E = gl.constexpr(1.4426950408889634)


# ---- layouts -------------------------------------------------------------------------------------


@gluon.constexpr_function
def mma_layout(columns):
    """Of an accumulator of 64 rows, in the registers of a group."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )


@gluon.constexpr_function
def by_thread_layout(columns, vector):
    """Of a (64, columns) accumulator in shared memory: `vector` consecutive elements of a thread,
    then of the next thread. So threads of two groups exchange it without bank conflicts."""
    registers = [[0, 1], [8, 0]]  # the steps to a thread's other elements, as (row, column)
    step = 8
    while step < columns:
        registers.append([0, step])
        step *= 2
    threads = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0]]
    at_once = vector.bit_length() - 1
    return gl.SharedLinearLayout(registers[:at_once] + threads + registers[at_once:])


@gluon.jit
def tile(buffer):
    """A (1, 1, rows, D) buffer as (rows, D)."""
    return buffer.reshape([buffer.shape[2], buffer.shape[3]])


@gluon.jit
def load_vector(buffer, layout: gl.constexpr):
    """A (1, N) buffer as a row of factors for the N columns of an accumulator."""
    return buffer.reshape([buffer.shape[1]]).load(gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def is_seen(MASK, j, end):
    """Whether keys j are seen. Those from `end` on are not. MASK points to a sample's key mask."""
    return gl.load(MASK + j, mask=j < end, other=0) != 0


@gluon.jit
def store_tile(X, x, b, h, row, end, st, layout: gl.constexpr, MASK=None):
    """Writes an accumulator to X[b, h, row : row + 64], up to row `end`; zeros for hidden keys."""
    r = row + gl.arange(0, x.shape[0], gl.SliceLayout(1, layout))
    c = gl.arange(0, x.shape[1], gl.SliceLayout(0, layout))
    if MASK is not None:
        x = gl.where(is_seen(MASK, r, end)[:, None], x, 0.0)
    X += gl.cast(b, gl.int64) * st[0] + gl.cast(h, gl.int64) * st[1]
    at = r.to(gl.int64)[:, None] * st[2] + c[None, :]
    gl.store(X + at, x.to(X.dtype.element_ty), mask=(r < end)[:, None])


@gluon.jit
def load_seen(SEEN, b):
    """Of a sample's key mask: keys before the first number are all seen, and those that are seen
    lie from the second up to the third. 2**30 and 0 where there are none."""
    SEEN += 3 * b
    return gl.load(SEEN), gl.load(SEEN + 1), gl.load(SEEN + 2)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


# ---- rows: dQ and dtQ ----------------------------------------------------------------------------


@gluon.jit
def mean_kernel(TK, MEAN, st, MASK, SEEN, mask_stride, Sk, D: gl.constexpr):
    """MEAN[b, h] is the mean of TK over 16 keys, from the first that is seen on; hidden ones do not
    count. (Under a key mask row_kernel of attention_jvp.py weights them by P. Here all are alike.)
    """
    b = gl.program_id(1)
    h = gl.program_id(0)
    start = 0
    end = Sk
    if MASK is not None:
        _, start, end = load_seen(SEEN, b)
    layout: gl.constexpr = gl.BlockedLayout([16, 1], [1, 32], [1, 4], [1, 0])
    r = start + gl.arange(0, 16, gl.SliceLayout(1, layout))
    c = gl.arange(0, D, gl.SliceLayout(0, layout))
    TK += gl.cast(b, gl.int64) * st[0] + gl.cast(h, gl.int64) * st[1]
    at = r.to(gl.int64)[:, None] * st[2] + c[None, :]
    seen = r < end
    if MASK is not None:
        seen = is_seen(MASK + gl.cast(b, gl.int64) * mask_stride, r, end)
    tk = gl.load(TK + at, mask=seen[:, None], other=0.0).to(gl.float32)
    count = gl.maximum(gl.sum(seen.to(gl.float32), 0), 1.0)  # where no key is seen, the mean is 0
    gl.store(MEAN + (b * gl.num_programs(0) + h) * D + c, gl.sum(tk, 0) / count)


# fmt: off
@gluon.jit
def row_copies(tensors, rows, keys, rows_ready, ready, free, start, end,
               BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr):
    # fmt: on
    """One warp copies: both groups' queries once, then block after block of keys."""
    Q, K, V, TQ, TK, TV, DO, DTO = tensors
    b = gl.program_id(2)
    h = gl.program_id(1)
    for g in gl.static_range(2):
        m0 = gl.program_id(0) * (2 * BM) + g * BM
        full = rows_ready.index(g)
        mbarrier.expect(full, 4 * Q.block_type.nbytes)
        copy(Q, [b, h, m0, 0], full, rows.index(4 * g))
        copy(TQ, [b, h, m0, 0], full, rows.index(4 * g + 1))
        copy(DO, [b, h, m0, 0], full, rows.index(4 * g + 2))
        copy(DTO, [b, h, m0, 0], full, rows.index(4 * g + 3))
    stage = 0
    phase = 1  # the first use of a stage waits for nothing
    for n0 in range(start, end, BN):
        mbarrier.wait(free.index(stage), phase)
        full = ready.index(stage)
        mbarrier.expect(full, 4 * K.block_type.nbytes)
        copy(K, [b, h, n0, 0], full, keys.index(4 * stage))
        copy(TK, [b, h, n0, 0], full, keys.index(4 * stage + 1))
        copy(V, [b, h, n0, 0], full, keys.index(4 * stage + 2))
        copy(TV, [b, h, n0, 0], full, keys.index(4 * stage + 3))
        stage, phase = next_stage(stage, phase, STAGES)


# fmt: off
@gluon.jit
def row_group(buffers, vectors, MEAN, DQ, DTQ, st, MASK, mask_from, start, end, Sq, Sk,
              scale, g: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
              STAGES: gl.constexpr, EVEN: gl.constexpr):
    # fmt: on
    """Group g: dQ and dtQ of BM queries."""
    rows, keys, ones, rows_ready, ready, free = buffers
    LSE, MU, S1, S2 = vectors
    dtype: gl.constexpr = keys.dtype
    SCORES: gl.constexpr = mma_layout(BN)
    SUMS: gl.constexpr = mma_layout(D)
    NARROW: gl.constexpr = mma_layout(8)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)  # of a left factor in registers
    ONE_EACH: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])  # key a thread
    b = gl.program_id(2)
    h = gl.program_id(1)
    m0 = gl.program_id(0) * (2 * BM) + g * BM
    i = m0 + gl.arange(0, BM, gl.SliceLayout(1, SCORES))
    row = gl.cast(b * gl.num_programs(1) + h, gl.int64) * Sq + i
    lse = gl.load(LSE + row, mask=i < Sq, other=0.0)[:, None]
    mu = gl.load(MU + row, mask=i < Sq, other=0.0)[:, None]
    s1 = gl.load(S1 + row, mask=i < Sq, other=0.0)[:, None]
    s2 = gl.load(S2 + row, mask=i < Sq, other=0.0)[:, None]
    dq = gl.full([BM, D], 0.0, gl.float32, SUMS)
    dtq = gl.full([BM, D], 0.0, gl.float32, SUMS)
    delta = gl.full([BM, 8], 0.0, gl.float32, NARROW)
    nothing = gl.full([BM, BN], 0.0, gl.float32, SCORES)
    mbarrier.wait(rows_ready.index(g), 0)
    # A product of BN = 32 columns reads its left factor from shared memory slower than it computes.
    # Half of Q is all that the registers have room for.
    HALF: gl.constexpr = D // 2
    q_right = tile(rows.index(4 * g)).slice(HALF, HALF, 1)
    q_right = q_right.load(gl.DotOperandLayout(0, SCORES, 2))
    stage = 0
    phase = 0
    for n0 in range(start, end, BN):
        # Always 0. The compiler, which does not know, then makes addresses of tiles where they are
        # used; otherwise it keeps them in registers through the loop, and there are too few.
        zero = n0 >> 30
        q_left = tile(rows.index(4 * g + zero)).slice(0, HALF, 1)
        tq = tile(rows.index(4 * g + 1 + zero))
        do = tile(rows.index(4 * g + 2 + zero))
        dto = tile(rows.index(4 * g + 3 + zero))
        k = tile(keys.index(4 * stage))
        tk = tile(keys.index(4 * stage + 1))
        v = tile(keys.index(4 * stage + 2))
        tv = tile(keys.index(4 * stage + 3))
        kT = k.permute((1, 0))
        tkT = tk.permute((1, 0))
        vT = v.permute((1, 0))
        tvT = tv.permute((1, 0))
        mbarrier.wait(ready.index(stage), phase)
        A = warpgroup_mma(dto, vT, nothing, use_acc=False, is_async=True)
        tS = warpgroup_mma(
            q_left, tkT.slice(0, HALF, 0), nothing, use_acc=False, is_async=True
        )
        tS = warpgroup_mma(q_right, tkT.slice(HALF, HALF, 0), tS, is_async=True)
        tS = warpgroup_mma(tq, kT, tS, is_async=True)
        S = warpgroup_mma(q_left, kT.slice(0, HALF, 0), nothing, use_acc=False, is_async=True)
        S = warpgroup_mma(q_right, kT.slice(HALF, HALF, 0), S, is_async=True)
        A, tS = warpgroup_mma_wait(2, [A, tS])  # all but the last two, which are S
        A_s1 = A - s1
        G_by_P = A_s1 * (tS * scale - mu) - s2
        G_by_P = warpgroup_mma(dto, tvT, G_by_P, is_async=True)
        G_by_P = warpgroup_mma(do, vT, G_by_P, is_async=True)
        S = warpgroup_mma_wait(2, [S])
        P = gl.exp2(S * (scale * LOG2E) - lse)
        if MASK is not None:
            if n0 + BN > mask_from:
                j = n0 + gl.arange(0, BN, gl.SliceLayout(0, ONE_EACH))
                seen = is_seen(MASK, j, end)
                seen = gl.convert_layout(seen, gl.SliceLayout(0, SCORES))
                P = gl.where(seen[None, :], P, 0.0)
        elif not EVEN:
            j = n0 + gl.arange(0, BN, gl.SliceLayout(0, SCORES))
            P = gl.where((j < Sk)[None, :], P, 0.0)
        Gt = gl.convert_layout((P * A_s1).to(dtype), LEFT)
        dtq = warpgroup_mma(Gt, k, dtq, is_async=True)
        dq = warpgroup_mma(Gt, tk, dq, is_async=True)
        delta = warpgroup_mma(Gt, ones.permute((1, 0)), delta, is_async=True)
        G_by_P = warpgroup_mma_wait(3, [G_by_P])
        G = gl.convert_layout((P * G_by_P).to(dtype), LEFT)
        dq = warpgroup_mma(G, k, dq, is_async=True)
        # Gt and G are named, so that their registers are not used again before.
        dq, dtq, delta, Gt, G = warpgroup_mma_wait(0, [dq, dtq, delta, Gt, G])
        barrier()
        mbarrier.arrive(free.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
    # What rounding leaves of the row sums of Gt, times a common part of tK: see row_kernel in
    # attention_jvp.py.
    share = gl.convert_layout(gl.sum(delta, 1), gl.SliceLayout(1, SUMS)) * (-1 / 8)
    c = gl.arange(0, D, gl.SliceLayout(0, SUMS))
    mean = gl.load(MEAN + (b * gl.num_programs(1) + h) * D + c)
    store_tile(DQ, (dq + share[:, None] * mean[None, :]) * scale, b, h, m0, Sq, st, SUMS)
    store_tile(DTQ, dtq * scale, b, h, m0, Sq, st, SUMS)


# fmt: off
@gluon.jit
def row_kernel(Q, K, V, TQ, TK, TV, DO, DTO, LSE, MU, S1, S2, MEAN, DQ, DTQ, st,
               MASK, SEEN, mask_stride, Sq, Sk, scale,
               BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
               EVEN: gl.constexpr):
    # fmt: on
    """DQ and DTQ of 2 BM queries. MEAN: see `mean_kernel`. EVEN: Sk is a multiple of BN. Blocks of
    keys before the first that is seen and after the last are left out."""
    start = 0
    end = Sk
    mask_from = Sk
    if MASK is not None:
        b = gl.program_id(2)
        MASK += gl.cast(b, gl.int64) * mask_stride
        mask_from, start, end = load_seen(SEEN, b)
        mask_from = gl.minimum(mask_from, end)  # keys from `end` on are hidden
        start = start // BN * BN
    dtype: gl.constexpr = Q.dtype
    rows = gl.allocate_shared_memory(dtype, [8, 1, 1, BM, D], Q.layout)
    keys = gl.allocate_shared_memory(dtype, [4 * STAGES, 1, 1, BN, D], K.layout)
    ones = gl.allocate_shared_memory(
        dtype, [8, BN], gl.NVMMASharedLayout.get_default_for([8, BN], dtype)
    )
    ones.store(gl.full([8, BN], 1.0, dtype, gl.BlockedLayout([1, 8], [8, 4], [1, 4], [1, 0])))
    rows_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for g in gl.static_range(2):
        mbarrier.init(rows_ready.index(g), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(free.index(s), count=2)
    fence_async_shared()
    tensors = (Q, K, V, TQ, TK, TV, DO, DTO)
    buffers = (rows, keys, ones, rows_ready, ready, free)
    vectors = (LSE, MU, S1, S2)
    # fmt: off
    gl.warp_specialize(
        [
            (row_group, (buffers, vectors, MEAN, DQ, DTQ, st, MASK, mask_from,
                         start, end, Sq, Sk, scale, 0, BM, BN, D, STAGES, EVEN)),
            (row_group, (buffers, vectors, MEAN, DQ, DTQ, st, MASK, mask_from,
                         start, end, Sq, Sk, scale, 1, BM, BN, D, STAGES, EVEN)),
            (row_copies, (tensors, rows, keys, rows_ready, ready, free, start, end,
                          BM, BN, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
    # fmt: on


# ---- columns: dK, dV, dtK and dtV ----------------------------------------------------------------


# fmt: off
@gluon.jit
def column_copies(tensors, sums, keys, rows, vectors, keys_ready, ready, free, start, Sq,
                  BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr):
    # fmt: on
    """One warp copies: the keys once, then block after block of queries."""
    Q, K, V, TQ, TK, TV, DO, DTO = tensors
    LSE, MU, S1, S2 = sums
    b = gl.program_id(2)
    h = gl.program_id(1)
    bh = b * gl.num_programs(1) + h
    n0 = gl.program_id(0) * BN
    mbarrier.expect(keys_ready, 4 * K.block_type.nbytes)
    copy(K, [b, h, n0, 0], keys_ready, keys.index(0))
    copy(TK, [b, h, n0, 0], keys_ready, keys.index(1))
    copy(V, [b, h, n0, 0], keys_ready, keys.index(2))
    copy(TV, [b, h, n0, 0], keys_ready, keys.index(3))
    stage = 0
    phase = 1  # the first use of a stage waits for nothing
    for m0 in range(start, Sq, BM):
        mbarrier.wait(free.index(stage), phase)
        full = ready.index(stage)
        mbarrier.expect(full, 4 * Q.block_type.nbytes + 4 * LSE.block_type.nbytes)
        copy(Q, [b, h, m0, 0], full, rows.index(4 * stage))
        copy(TQ, [b, h, m0, 0], full, rows.index(4 * stage + 1))
        copy(DO, [b, h, m0, 0], full, rows.index(4 * stage + 2))
        copy(DTO, [b, h, m0, 0], full, rows.index(4 * stage + 3))
        copy(LSE, [bh, m0], full, vectors.index(4 * stage))
        copy(MU, [bh, m0], full, vectors.index(4 * stage + 1))
        copy(S1, [bh, m0], full, vectors.index(4 * stage + 2))
        copy(S2, [bh, m0], full, vectors.index(4 * stage + 3))
        stage, phase = next_stage(stage, phase, STAGES)


# fmt: off
@gluon.jit
def value_group(buffers, DV, DTV, st, MASK, start, Sq, Sk, scale, BM: gl.constexpr,
                BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SHIFT: gl.constexpr):
    # fmt: on
    """The first group: P and N, which it sends to the other, then dV and dtV. `P` holds
    2**SHIFT times P."""
    keys, rows, vectors, sent_P, sent_N, keys_ready, ready, free, sent_ready, sent_free = buffers
    dtype: gl.constexpr = keys.dtype
    SCORES: gl.constexpr = mma_layout(BM)
    SUMS: gl.constexpr = mma_layout(D)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)  # of a left factor in registers
    dv = gl.full([BN, D], 0.0, gl.float32, SUMS)
    dtv = gl.full([BN, D], 0.0, gl.float32, SUMS)
    nothing = gl.full([BN, BM], 0.0, gl.float32, SCORES)
    mbarrier.wait(keys_ready, 0)
    stage = 0
    phase = 0
    sent_phase = 1
    for m0 in range(start, Sq, BM):
        zero = m0 >> 30  # see row_group
        k = tile(keys.index(zero))
        tk = tile(keys.index(1 + zero))
        qT = tile(rows.index(4 * stage)).permute((1, 0))
        tqT = tile(rows.index(4 * stage + 1)).permute((1, 0))
        do = tile(rows.index(4 * stage + 2))
        dto = tile(rows.index(4 * stage + 3))
        mbarrier.wait(ready.index(stage), phase)
        S = warpgroup_mma(k, qT, nothing, use_acc=False, is_async=True)
        tS = warpgroup_mma(k, tqT, nothing, use_acc=False, is_async=True)
        tS = warpgroup_mma(tk, qT, tS, is_async=True)
        lse = load_vector(vectors.index(4 * stage), SCORES) - SHIFT
        mu = load_vector(vectors.index(4 * stage + 1), SCORES)
        S = warpgroup_mma_wait(2, [S])
        P = gl.exp2(S * (scale * LOG2E) - lse)
        mbarrier.wait(sent_free, sent_phase)
        sent_P.store(P.to(sent_P.dtype))
        P_rounded = gl.convert_layout(P.to(dtype), LEFT)
        dv = warpgroup_mma(P_rounded, do, dv, is_async=True)
        dtv = warpgroup_mma(P_rounded, dto, dtv, is_async=True)
        tS = warpgroup_mma_wait(2, [tS])
        N = tS * scale - mu
        sent_N.store(N)
        barrier()
        mbarrier.arrive(sent_ready)
        PN = gl.convert_layout((P * N).to(dtype), LEFT)
        dv = warpgroup_mma(PN, dto, dv, is_async=True)
        dv, dtv, P_rounded, PN = warpgroup_mma_wait(0, [dv, dtv, P_rounded, PN])
        barrier()
        mbarrier.arrive(free.index(stage))
        sent_phase ^= 1
        stage, phase = next_stage(stage, phase, STAGES)
    b = gl.program_id(2)
    h = gl.program_id(1)
    n0 = gl.program_id(0) * BN
    store_tile(DV, dv * 2.0**-SHIFT, b, h, n0, Sk, st, SUMS, MASK)
    store_tile(DTV, dtv * 2.0**-SHIFT, b, h, n0, Sk, st, SUMS, MASK)


# fmt: off
@gluon.jit
def key_group(buffers, DK, DTK, st, MASK, start, Sq, Sk, scale, BM: gl.constexpr,
              BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SHIFT: gl.constexpr):
    # fmt: on
    """The second group: G and Gt, from the first one's P and N, then dK and dtK."""
    keys, rows, vectors, sent_P, sent_N, keys_ready, ready, free, sent_ready, sent_free = buffers
    dtype: gl.constexpr = keys.dtype
    SCORES: gl.constexpr = mma_layout(BM)
    SUMS: gl.constexpr = mma_layout(D)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)  # of a left factor in registers
    dk = gl.full([BN, D], 0.0, gl.float32, SUMS)
    dtk = gl.full([BN, D], 0.0, gl.float32, SUMS)
    nothing = gl.full([BN, BM], 0.0, gl.float32, SCORES)
    mbarrier.wait(keys_ready, 0)
    stage = 0
    phase = 0
    sent_phase = 0
    for m0 in range(start, Sq, BM):
        zero = m0 >> 30  # see row_group
        v = tile(keys.index(2 + zero))
        tv = tile(keys.index(3 + zero))
        q = tile(rows.index(4 * stage))
        tq = tile(rows.index(4 * stage + 1))
        doT = tile(rows.index(4 * stage + 2)).permute((1, 0))
        dtoT = tile(rows.index(4 * stage + 3)).permute((1, 0))
        mbarrier.wait(ready.index(stage), phase)
        A = warpgroup_mma(v, dtoT, nothing, use_acc=False, is_async=True)
        B = warpgroup_mma(tv, dtoT, nothing, use_acc=False, is_async=True)
        B = warpgroup_mma(v, doT, B, is_async=True)
        s1 = load_vector(vectors.index(4 * stage + 2), SCORES)
        A = warpgroup_mma_wait(2, [A])
        A_s1 = A - s1
        mbarrier.wait(sent_ready, sent_phase)
        P = sent_P.load(SCORES).to(gl.float32)
        Gt = gl.convert_layout((P * A_s1).to(dtype), LEFT)
        dk = warpgroup_mma(Gt, tq, dk, is_async=True)
        dtk = warpgroup_mma(Gt, q, dtk, is_async=True)
        B = warpgroup_mma_wait(2, [B])
        s2 = load_vector(vectors.index(4 * stage + 3), SCORES)
        G_by_P = B - s2 + A_s1 * sent_N.load(SCORES)
        P = sent_P.load(SCORES).to(gl.float32)  # again, because registers are short
        G = gl.convert_layout((P * G_by_P).to(dtype), LEFT)
        barrier()
        mbarrier.arrive(sent_free)
        dk = warpgroup_mma(G, q, dk, is_async=True)
        dk, dtk, Gt, G = warpgroup_mma_wait(0, [dk, dtk, Gt, G])
        barrier()
        mbarrier.arrive(free.index(stage))
        sent_phase ^= 1
        stage, phase = next_stage(stage, phase, STAGES)
    b = gl.program_id(2)
    h = gl.program_id(1)
    n0 = gl.program_id(0) * BN
    factor = scale * 2.0**-SHIFT
    store_tile(DK, dk * factor, b, h, n0, Sk, st, SUMS, MASK)
    store_tile(DTK, dtk * factor, b, h, n0, Sk, st, SUMS, MASK)


# fmt: off
@gluon.jit
def column_kernel(Q, K, V, TQ, TK, TV, DO, DTO, LSE, MU, S1, S2, DK, DV, DTK, DTV, st,
                  MASK, SEEN, mask_stride, Sq, Sk, scale,
                  BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
                  SHIFT: gl.constexpr):
    # fmt: on
    """DK, DV, DTK and DTV of BN keys. Rows of zeros, which TMA puts beyond Sq and Sk, add nothing.

    The groups exchange 2**SHIFT P. For bfloat16 SHIFT is 14, and that fits in float16 without a
    loss that counts: P is at most 1, and what is under 2**-28 has too little weight. For float16
    SHIFT is 0, and P is exchanged as float32.

    A key mask changes nothing in the loop: a row here belongs to one key, so that a hidden key
    spoils its own row alone, which becomes zeros in the end."""
    start = 0
    if MASK is not None:
        b = gl.program_id(2)
        MASK += gl.cast(b, gl.int64) * mask_stride
        n0 = gl.program_id(0) * BN
        _, seen_from, seen_to = load_seen(SEEN, b)
        if (n0 + BN <= seen_from) | (n0 >= seen_to):  # zeros, without a loop
            start = Sq
    dtype: gl.constexpr = Q.dtype
    keys = gl.allocate_shared_memory(dtype, [4, 1, 1, BN, D], K.layout)
    rows = gl.allocate_shared_memory(dtype, [4 * STAGES, 1, 1, BM, D], Q.layout)
    vectors = gl.allocate_shared_memory(gl.float32, [4 * STAGES, 1, BM], LSE.layout)
    if SHIFT > 0:
        sent_P = gl.allocate_shared_memory(gl.float16, [BN, BM], by_thread_layout(BM, 8))
    else:
        sent_P = gl.allocate_shared_memory(gl.float32, [BN, BM], by_thread_layout(BM, 4))
    sent_N = gl.allocate_shared_memory(gl.float32, [BN, BM], by_thread_layout(BM, 4))
    keys_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    sent_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    sent_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(keys_ready, count=1)
    mbarrier.init(sent_ready, count=1)
    mbarrier.init(sent_free, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(free.index(s), count=2)
    fence_async_shared()
    tensors = (Q, K, V, TQ, TK, TV, DO, DTO)
    sums = (LSE, MU, S1, S2)
    buffers = (keys, rows, vectors, sent_P, sent_N, keys_ready, ready, free, sent_ready, sent_free)
    # fmt: off
    gl.warp_specialize(
        [
            (value_group, (buffers, DV, DTV, st, MASK, start, Sq, Sk, scale,
                           BM, BN, D, STAGES, SHIFT)),
            (key_group, (buffers, DK, DTK, st, MASK, start, Sq, Sk, scale,
                         BM, BN, D, STAGES, SHIFT)),
            (column_copies, (tensors, sums, keys, rows, vectors, keys_ready, ready, free,
                             start, Sq, BM, BN, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
    # fmt: on


# ---- launching -----------------------------------------------------------------------------------


def tiles_of(x, rows):
    """How TMA finds tiles of this many rows of x, (B, H, S, D)."""
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    block = [1, 1, rows, x.size(3)]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor.from_tensor(x, block, layout)


def vectors_of(x, rows):
    """The same of x, (B, H, S) in float32."""
    x = x.view(-1, x.size(2))
    layout = gl.NVMMASharedLayout.get_default_for([1, rows], gl.float32)
    return TensorDescriptor.from_tensor(x, [1, rows], layout)


def wrong_triton():
    """Why this Triton will not do, or None."""
    if not triton.__version__.startswith(TRITON + "."):
        return f"Triton is not {TRITON}"
    return None


def why_not(q, k, v, tq, tk, tv, do, dto, lse, mask, causal):
    """Why these kernels cannot take such a call, or None where they can: the eight large tensors,
    none of which may be missing, one of the float32 rows, and attention_jvp's mask or None."""
    large = (q, k, v, tq, tk, tv, do, dto)
    if wrong_triton():
        return wrong_triton()
    if any(x is None for x in large):
        return "a tangent or a gradient is missing"
    if q.dtype not in (torch.bfloat16, torch.float16) or q.size(3) not in HEAD_SIZES:
        return f"head size {q.size(3)} in {q.dtype}"
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "the GPU is not a Hopper one"
    if q.size(1) != k.size(1):
        return "grouped queries"
    if causal:
        return "a causal mask"
    if mask is not None and (mask.dtype != torch.bool or mask.size(1) * mask.size(2) != 1):
        return "a mask that is not a boolean one of keys"
    if lse.numel() * k.size(2) < LEAST_SCORES or max(q.shape[:2]) > 65535:
        return "a small or a very large grid"
    # What TMA asks for: addresses and strides in multiples of 16 bytes, and no row twice.
    if q.size(2) % 4 != 0:
        return "a number of queries that is no multiple of 4"
    if any(x.data_ptr() % 16 != 0 for x in large):
        return "addresses"
    if any(s % 8 != 0 or s == 0 for x in large for s in x.stride()[:3]):
        return "strides"
    return None


# Nine warps, which count as twelve: 12 x 168 registers a thread are 8 x 240 + 4 x 24.
OPTIONS = dict(num_warps=4, maxnreg=168, enable_fp_fusion=True)


def arguments_of(mask, seen):
    """A key mask as the kernels take it: uint8, and its samples' stride."""
    if mask is None:
        return None, None, None
    mask = mask[:, 0, 0]
    if mask.stride(1) != 1:
        mask = mask.contiguous()
    return mask, seen, mask.stride(0)


# fmt: off
def rows(q, k, v, tq, tk, tv, do, dto, lse, mu, s1, s2, dq, dtq, scale, mask=None, seen=None):
    # fmt: on
    """Writes dq and dtq, which have the same strides. mask: a key mask as uint8, (B, H, Sq, Sk) by
    strides of zero. seen: what attention_jvp's forward found in it, (B, 3) in int32."""
    B, H, Sq, D = q.shape
    Sk = k.size(2)
    BM, BN = 64, 32
    mean = lse.new_empty((B, H, D))
    masked = arguments_of(mask, seen)
    mean_kernel[(H, B)](tk, mean, tk.stride()[:3], *masked, Sk, D=D, **OPTIONS)
    heights = (BM, BN, BN, BM, BN, BN, BM, BM)
    tensors = [tiles_of(x, n) for x, n in zip((q, k, v, tq, tk, tv, do, dto), heights)]
    grid = (triton.cdiv(Sq, 2 * BM), H, B)
    return row_kernel[grid](
        *tensors, lse, mu, s1, s2, mean, dq, dtq, dq.stride()[:3], *masked,
        Sq, Sk, scale, BM=BM, BN=BN, D=D, STAGES=3, EVEN=Sk % BN == 0, **OPTIONS,
    )


# fmt: off
def columns(q, k, v, tq, tk, tv, do, dto, lse, mu, s1, s2, dk, dv, dtk, dtv, scale,
            mask=None, seen=None):
    # fmt: on
    """Writes dk, dv, dtk and dtv, which have the same strides."""
    B, H, Sk, D = k.shape
    BM, BN = 64, 64
    tensors = [tiles_of(x, BM) for x in (q, k, v, tq, tk, tv, do, dto)]
    vectors = [vectors_of(x, BM) for x in (lse, mu, s1, s2)]
    grid = (triton.cdiv(Sk, BN), H, B)
    return column_kernel[grid](
        *tensors, *vectors, dk, dv, dtk, dtv, dk.stride()[:3], *arguments_of(mask, seen),
        q.size(2), Sk, scale, BM=BM, BN=BN, D=D, STAGES=2,
        SHIFT=14 if q.dtype == torch.bfloat16 else 0, **OPTIONS,
    )
