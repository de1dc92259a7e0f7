"""..."""
import ctypes
import functools
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import HERE, close, gpu, plain_attention, randn, rel
from torch.autograd import forward_ad as fwAD
from torch.utils.checkpoint import checkpoint

import attention_jvp as A
from attention_jvp import attention, attention_jvp


def attention_inputs(Sq=5, Sk=7, D=6):
    shapes = [(2, 3, Sq, D), (2, 3, Sk, D), (2, 3, Sk, D)]
    return [randn(*shape, seed=i) for i, shape in enumerate(shapes + shapes)]


@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_jvp_is_the_derivative(scale):
    *primals, tq, tk, tv = inputs = attention_inputs()
    o, to = attention_jvp(*inputs, scale=scale)
    reference = torch.func.jvp(lambda *a: plain_attention(*a, scale or 6 ** -0.5), tuple(primals), (tq, tk, tv))
    close(o, reference[0], 1e-14), close(to, reference[1], 1e-14)
    close(attention(*primals, scale=scale), reference[0], 1e-14)


def test_attention_jvp_gradients():
    assert torch.autograd.gradcheck(attention_jvp, [a.requires_grad_() for a in attention_inputs(3, 2, 4)])


def test_attention_under_forward_ad():
    q, k, v, tq, tk, tv = inputs = attention_inputs()
    o, to = attention_jvp(*inputs)
    for got in torch.func.jvp(attention, (q, k, v), (tq, tk, tv)), dual_level(attention, (q, k, v), (tq, tk, tv)):
        close(got[0], o, 1e-14), close(got[1], to, 1e-14)
    q.requires_grad_()
    gradient, = torch.autograd.grad(torch.func.jvp(attention, (q, k, v), (tq, tk, tv))[1].sum(), q)
    reference, = torch.autograd.grad(attention_jvp(*inputs)[1].sum(), q)
    close(gradient, reference, 1e-13)


def dual_level(f, primals, tangents):
    with fwAD.dual_level():
        return fwAD.unpack_dual(f(*map(fwAD.make_dual, primals, tangents)))


def six(B, H, Sq, Sk, D, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator(device).manual_seed(seed)
    return [torch.randn(B, H, S, D, generator=g, device=device).to(dtype) for S in (Sq, Sk, Sk) * 2]


def errors(x, scale=None, use=(True, True), need=(True,) * 6, fn=A.attention_jvp):
    """Relative L2 errors of (o, to) and the needed gradients against float64; use: which of dO, dtO arrive."""
    x = [t.detach().requires_grad_(n) for t, n in zip(x, need)]
    y = [t.detach().double().requires_grad_(n) for t, n in zip(x, need)]
    g = torch.Generator(x[0].device).manual_seed(9)
    d = [torch.randn(x[0].shape, generator=g, device=x[0].device).to(x[0].dtype) for _ in range(2)]
    o, r = fn(*x, scale=scale), A.attention_jvp_reference(*y, scale=scale)
    pick = [i for i in (0, 1) if use[i] and r[i].requires_grad]
    args = [t for t in x if t.requires_grad], [t for t in y if t.requires_grad]
    gx = torch.autograd.grad([o[i] for i in pick], args[0], [d[i] for i in pick], allow_unused=True)
    gy = torch.autograd.grad([r[i] for i in pick], args[1], [d[i].double() for i in pick], allow_unused=True)
    assert o[0].dtype == x[0].dtype and o[0].shape == x[0].shape
    out = [rel(a, b) for a, b in zip(o, r)]
    for a, b in zip(gx, gy):
        if a is None or b is None or b.norm() < 1e-12:  # the gradient of a tangent without dtO, of scores with one key
            assert all(t is None or t.abs().max() < 1e-5 for t in (a, b))
        else:
            out.append(rel(a, b))
    return out


def tiny_net(attend, w, x, heads=2):
    q, k, v = ((x @ m).unflatten(-1, (heads, -1)).transpose(1, 2) for m in w[:3])
    return torch.tanh(attend(q, k, v).transpose(1, 2).flatten(2) @ w[3])


def plain(q, k, v):
    return plain_attention(q, k, v, q.size(-1) ** -0.5)


@pytest.mark.parametrize("capability, kilobytes, dtype", [(80, 163, "bf16"), (86, 99, "bf16"), (89, 99, "bf16"), (90, 227, "bf16"), (100, 227, "bf16"),
                                                          (120, 99, "bf16"), (120, 99, "fp32")])
def test_kernels_fit(capability, kilobytes, dtype, monkeypatch):
    """The kernels compile for GPUs that are not here, into what shared memory (and on Blackwell tensor memory) they have."""
    compiler, backend = pytest.importorskip("triton.compiler"), pytest.importorskip("triton.backends.compiler")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
    cases = [("forward", 128), ("row", 128), ("primal", 128), ("tangent", 128)] + [("column", 64)] * (capability == 90)
    for name, D in cases:
        BM, BN, num_warps, num_stages, _, pair = A._tiles(name, D, dict(bf16=torch.bfloat16, fp32=torch.float32)[dtype], torch.device("cuda"))
        kernel = {"forward": A.forward_kernel, "row": A.row_kernel}.get(name, A.column_kernel)
        constants = dict(W=(8, D, *A._chunks(D)), BM=BM, BN=BN, EVEN=False, FULL=False, SAME=True, FLAT=False, TMA=False, HAS_LO=dtype == "bf16", HAS_DTO=True,
                         PRIMAL=name != "tangent", TANGENT=name != "primal", PAIR=bool(pair) and name != "tangent", PREC="tf32x3")
        kinds = dict(scale="fp32", H="i32", Sq="i32", Sk="i32", LO="*i32", **dict.fromkeys(("LSE", "MU", "S1", "S2"), "*fp32"))
        signature = {n: "constexpr" if n in constants else kinds.get(n, ("i32",) * 3 if n.startswith("st") else "*" + dtype) for n in kernel.arg_names}
        pointers = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n][0] == "*"}
        source = compiler.ASTSource(kernel, signature, {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}, pointers)
        options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
        made = compiler.compile(source, target=backend.GPUTarget("cuda", capability, 32), options=options)
        assert 0 < made.metadata.shared <= kilobytes * 1024 and not (getattr(made.metadata, "tmem_size", 0) or 0), (name, D)


def interpreted(function):
    """Runs a function of this file in a process where Triton interprets its kernels on the CPU."""
    triton = pytest.importorskip("triton")
    p = subprocess.run([sys.executable, "-W", "ignore", "-c", f"import test_attention as t; t.{function}()"], cwd=os.path.join(HERE, "tests"),
                       env={**os.environ, "PYTHONPATH": HERE, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                       capture_output=True, text=True)
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    if old and "only 0-dimensional arrays can be converted to Python scalars" in p.stderr:
        pytest.skip(f"the interpreter of triton {triton.__version__} fails with numpy {np.__version__} on loop bounds")
    assert p.returncode == 0, p.stderr[-3000:]


def in_float64(x, d, **scale):
    """(o, to) of the reference, and their six gradients from d."""
    y = [t.double().requires_grad_() for t in x]
    outputs = A.attention_jvp_reference(*y, **scale)
    return outputs, torch.autograd.grad(outputs, y, [t.double() for t in d])


def low_bits_keep_small_values():
    """Float16 gradients where float16 keeps little or nothing of tO, whose low bits are then no continuation, and of ties."""
    for size in (1.0, 1e-4, 1e-8, 0.0):
        x = [t.half() for t in six(1, 2, 33, 33, 16)]
        x[3:] = [(t * size).half() for t in x[3:]]
        d = [t.half() for t in six(1, 2, 33, 33, 16, seed=1)[:2]]
        got = A._backward_now(*d, *x, *A._forward_now(*x, 0.25, True), 0.25, [True] * 4)
        assert max(rel(a, b) for a, b in zip(got, in_float64(x, d, scale=0.25)[1])) < 1e-3, size
    x, d = [t.half() for t in six(1, 2, 33, 1, 16)], [t.half() for t in six(1, 2, 33, 33, 16, seed=1)[:2]]
    got = A._backward_now(*d, *x, *A._forward_now(*x, 0.25, True), 0.25, [True] * 4)
    assert all(got[i].abs().max() < 1e-5 for i in (0, 1, 3, 4))       # of one key: what float16 holds exactly has no low bits
    for D in (16, 64, 72):                                            # two keys of equal scores: half of tO are ties
        x, d = [t.half() for t in six(1, 1, 33, 2, D)], [t.half() for t in six(1, 1, 33, 33, D, seed=1)[:2]]
        x[0], x[3], x[5] = 0 * x[0], 0 * x[3], x[5] + 64
        got = A._backward_now(*d, *x, *A._forward_now(*x, D ** -0.5, True), D ** -0.5, [True] * 4)
        assert rel(got[0], in_float64(x, d)[1][0]) < 2e-3, D


def low_bits_for_all_widths():
    """Where tV has an offset, dQ and dK of float16 need the low bits of tO."""
    for D in (8, 24, 40, 64, 72, 128):
        x, scale = [t.half() for t in six(1, 1, 33, 33, D)], D ** -0.5
        x[5] += 8
        d = [t.half() for t in six(1, 1, 33, 33, D, seed=1)[:2]]
        o, to, lo, lse, mu = A._forward_now(*x, scale, True)
        assert lo.nbytes <= to.nbytes
        with_low, without = (A._backward_now(*d, *x, o, to, low, lse, mu, scale, [True] * 4) for low in (lo, lo[..., :0]))
        want = in_float64(x, d)[1]
        assert max(rel(a, b) for a, b in zip(with_low, want)) < 1e-3 and rel(without[0], want[0]) > 1.5 * rel(with_low[0], want[0]), D


def offsets_of_tk_cancel():
    """What centres scores' tangents, and takes the mean of tK off dQ: without either, float16 errs by 1e-2 here."""
    for D in (16, 64):
        x, d = [t.half() for t in six(1, 1, 33, 45, D)], [t.half() for t in six(1, 1, 33, 45, D, seed=1)[::3]]
        x[4] += 64
        o, to, *saved = A._forward_now(*x, D ** -0.5, True)
        got = A._backward_now(*d, *x, o, to, *saved, D ** -0.5, [True] * 4)
        outputs, gradients = in_float64(x, d)
        assert max(rel(a, b) for a, b in zip((to, *got), (outputs[1], *gradients))) < 6e-4, D


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
def test_kernels_stay_inside():
    interpreted("kernels_stay_inside")
    with pytest.raises(AssertionError):                                # so the page behind does guard
        interpreted("step_outside")


def test_low_bits_for_all_widths():
    interpreted("low_bits_for_all_widths")


def test_low_bits():
    interpreted("low_bits_keep_small_values")


def test_offsets_of_tk():
    interpreted("offsets_of_tk_cancel")


def kernels_match_float64():
    assert A.INTERPRET and A._fused(torch.zeros(1, 1, 1, 8))
    for shape in [(2, 2, 37, 50, 64), (1, 2, 64, 64, 32), (1, 1, 33, 70, 72), (2, 1, 1, 1, 8), (1, 1, 5, 1, 16),
                  (1, 1, 1, 33, 24), (1, 1, 34, 33, 128), (1, 1, 20, 40, 100), (1, 1, 9, 9, 13)]:
        assert max(errors(six(*shape))) < 2e-6, shape
    x = six(1, 1, 40, 33, 16)
    assert max(errors(x, scale=0.7)) < 2e-6
    for use in ((True, False), (False, True)):
        assert max(errors(x, use=use)) < 2e-6, use
    for need in ((1, 1, 1, 0, 0, 0), (1, 0, 0, 1, 0, 0), (0, 1, 0, 0, 0, 1), (0, 0, 0, 1, 1, 1), (0, 0, 1, 0, 0, 0), (0, 0, 0, 0, 1, 0)):
        assert max(errors(x, need=[bool(n) for n in need])) < 2e-6, need
    assert all((t == 0).all() for t in A.attention_jvp(*six(1, 1, 5, 0, 16)))                  # no keys
    # views of a qkv projection; a tangent that is a broadcast row; a last dimension that is not contiguous
    q, k, v = torch.randn(2, 37, 3, 2, 16).permute(2, 0, 3, 1, 4)
    tq, tk, tv = torch.randn(3, 2, 2, 37, 16)
    assert max(errors([q, k, v, tq, tk, tv])) < 2e-6
    assert max(errors([q, k, v, tq, tk[:, :, :1].expand_as(k), tv.mT.contiguous().mT])) < 2e-6
    # descriptors, and tiles loaded in pairs
    tiles, A._tiles, A.TMA_FROM = A._tiles, lambda *_: (32, 32, 4, 1, 1, 1), 0
    A._plan.cache_clear()
    for shape in [(2, 2, 37, 50, 64), (1, 2, 33, 20, 40), (1, 1, 33, 20, 72)]:
        assert max(errors(six(*shape))) < 2e-6, shape
    assert max(errors([q, k, v, tq, tk, tv])) < 2e-6
    A._tiles, A.MAX_GRID = tiles, 1                                   # all programs along one axis
    A._plan.cache_clear()
    assert max(errors(six(2, 3, 37, 50, 16))) < 2e-6
    A.MAX_ROW = 40                                                    # and o's heads one after the other, where 24 x 2 are too wide
    A._plan.cache_clear()
    assert A.attention_jvp(*six(1, 2, 5, 5, 24))[0].is_contiguous() and not A.attention_jvp(*six(1, 2, 5, 5, 16))[0].is_contiguous()
    assert max(errors(six(2, 2, 37, 50, 24))) < 2e-6 and max(errors(six(2, 2, 37, 50, 24), use=(True, False))) < 2e-6


def guarded(t):
    """A copy of a dense tensor, behind whose last byte lies a page that nobody may read or write."""
    size = -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes).as_strided(t.shape, t.stride()).copy_(t)


def step_outside():
    t = guarded(torch.zeros(7))
    ctypes.string_at(t.data_ptr() + t.nbytes, 1)


def kernels_stay_inside():
    """Every tensor of a forward and a backward ends where memory does."""
    like, outputs, empty_like = A._like, A._empty_outputs, torch.empty_like
    A._like = lambda x, dtype=None: guarded(like(x, dtype))
    A._empty_outputs = lambda q, save: tuple(guarded(t) if t.numel() else t for t in outputs(q, save))
    torch.empty_like = lambda t: guarded(empty_like(t))               # the rows s1 and s2
    for dtype in (torch.float32, torch.float16):
        for B, H, Sq, Sk, D in ((1, 2, 33, 20, 64), (2, 1, 20, 34, 72), (1, 1, 1, 1, 8), (1, 1, 65, 33, 100)):
            x, d = [guarded(t.to(dtype)) for t in six(B, H, Sq, Sk, D)], [guarded(t.to(dtype)) for t in six(B, H, Sq, Sk, D, seed=1)[::3]]
            A._backward_now(*d, *x, *A._forward_now(*x, D ** -0.5, True), D ** -0.5, [True] * 4)


def kernels_survive_extremes():
    q, k, v, tq, tk, tv = six(1, 2, 40, 45, 16)
    for x in ([q * 1e4, k, v, tq, tk, tv], [-q * 1e4, k, v, tq, tk, tv], [q, k * 0 + 1, v, tq, tk, tv],
              [q, k, v, tq * 0, tk * 0, tv * 0], [q * 0, k, v, tq, tk, tv]):
        x = [t.clone().requires_grad_() for t in x]
        o = A.attention_jvp(*x)
        grads = torch.autograd.grad(o, x, [torch.ones_like(t) for t in o])
        assert all(t.isfinite().all() for t in (*o, *grads))
        assert max(rel(a, b) for a, b in zip(o, A.attention_jvp_reference(*(t.double() for t in x)))) < 2e-3
    # a common offset in tK or tV costs little accuracy (bfloat16 is where it would: see the GPU tests)
    assert max(errors([q, k, v, tq, tk + 8, tv])) < 4e-6 and max(errors([q, k, v, tq, tk, tv + 8])) < 8e-6


def transforms_match_float64():
    torch.manual_seed(0)
    W = [torch.randn(32, 32) * 0.3 for _ in range(4)]
    x, tx, g, h = torch.randn(4, 1, 17, 32)

    def loss_of(y, ty, c):
        return (y * c(g)).sum() + (ty * c(h)).sum()

    def backward(attend, w, c):
        y, ty = torch.func.jvp(lambda z: tiny_net(attend, w, z), (c(x),), (c(tx),))
        return y, ty, *torch.autograd.grad(loss_of(y, ty, c), w)

    def parameter_tangents(attend, w, c):
        y, ty = torch.func.jvp(lambda m: tiny_net(attend, [w[0], m, *w[2:]], c(x)), (w[1],), (w[3],))
        return y, ty, *torch.autograd.grad(loss_of(y, ty, c), w)

    def dual_level(attend, w, c):
        if attend is plain:  # its softmax has an in-place operation that this mode rejects
            return backward(attend, w, c)
        with fwAD.dual_level():
            y, ty = fwAD.unpack_dual(tiny_net(attend, w, fwAD.make_dual(c(x), c(tx))))
            return y, ty, *torch.autograd.grad(loss_of(y, ty, c), w)

    def grad_of_jvp(attend, w, c):
        return torch.func.grad(lambda w: loss_of(*torch.func.jvp(lambda z: tiny_net(attend, w, z), (c(x),), (c(tx),)), c))(
            [m.detach() for m in w])

    def jvp_of_grad(attend, w, c):
        f = lambda z: torch.func.grad(lambda w: (tiny_net(attend, w, z) * c(g)).sum())([m.detach() for m in w])
        y, ty = torch.func.jvp(f, (c(x),), (c(tx),))
        return *y, *ty

    def jvp_of_jvp(attend, w, c):
        f = lambda z: torch.func.jvp(lambda u: tiny_net(attend, w, u), (z,), (c(h),))[1]
        y, ty = torch.func.jvp(f, (c(x),), (c(tx),))
        return y, ty, *torch.autograd.grad(loss_of(y, ty, c), w)

    def vmap_of_jvp(attend, w, c):
        X = torch.stack([c(x), c(tx)])
        f = lambda z, t: torch.func.jvp(lambda u: tiny_net(attend, w, u), (z,), (t,))
        y, ty = torch.func.vmap(f)(X, X.flip(0))
        return y, ty, *torch.autograd.grad(loss_of(y, ty, c), w)

    def jvp_of_vmap(attend, w, c):
        X = torch.stack([c(x), c(tx)])
        return torch.func.jvp(torch.func.vmap(lambda u: tiny_net(attend, w, u)), (X,), (X.flip(0),))

    def no_tangent(attend, w, c):
        y = tiny_net(attend, w, c(x))
        return y, *torch.autograd.grad((y * c(g)).sum(), w)

    for mode in (backward, parameter_tangents, dual_level, grad_of_jvp, jvp_of_grad, jvp_of_jvp, vmap_of_jvp, jvp_of_vmap,
                 no_tangent):
        a = mode(A.attention, [m.clone().requires_grad_() for m in W], lambda t: t)
        b = mode(plain, [m.double().requires_grad_() for m in W], lambda t: t.double())
        assert max(rel(s, t) for s, t in zip(a, b)) < 1e-5, mode.__name__
    # detach_jvp: the tangent is a constant, and only dO comes back
    w = [m.clone().requires_grad_() for m in W]
    y, ty = torch.func.jvp(lambda z: tiny_net(A.attention, w, z), (x,), (tx,))
    a = torch.autograd.grad(((y - ty.detach()) ** 2).sum(), w)
    v = [m.double().requires_grad_() for m in W]
    b = torch.autograd.grad(((tiny_net(plain, v, x.double()) - ty.detach().double()) ** 2).sum(), v)
    assert max(rel(s, t) for s, t in zip(a, b)) < 1e-5
    # a second backward has no kernel: it says so
    y, ty = torch.func.jvp(lambda z: tiny_net(A.attention, w, z), (x,), (tx,))
    grads = torch.autograd.grad(ty.sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_jvp_reference"):
        torch.autograd.grad(sum(t.sum() for t in grads), w)


def operators_are_sound():
    x = six(1, 2, 17, 9, 16)
    o = A._forward(*x, 0.25, True)
    torch.library.opcheck(A._forward, (*(t.clone().requires_grad_() for t in x), 0.25, True))
    for do, dto, need in ((x[0], x[3], [True] * 4), (x[0], None, [True, True, False, False]), (None, x[3], [False, True] * 2)):
        torch.library.opcheck(A._backward, (do, dto, *x, *o, 0.25, need),
                              test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))

    def grads(fn):
        y = [t.clone().requires_grad_() for t in x]
        o, to = fn(*y)
        (o.sin().sum() + to.cos().sum()).backward()
        return [t.grad for t in y]

    f = lambda *y: [2 * t for t in A.attention_jvp(*(t.sin() for t in y))]
    for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), lambda *y: checkpoint(f, *y, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(grads(f), grads(g)))
    assert rel(torch.compile(A.attention, fullgraph=True, backend="aot_eager")(*x[:3]), plain(*x[:3])) < 1e-6


def test_attention_kernels():
    interpreted("kernels_match_float64")


def test_attention_extremes():
    interpreted("kernels_survive_extremes")


def test_attention_transforms():
    interpreted("transforms_match_float64")


def test_attention_operators():
    interpreted("operators_are_sound")


def test_attention_reference():
    x = six(1, 2, 4, 3, 8, torch.float64)
    q, k, v = x[:3]
    o, to = A.attention_jvp(*x)
    r, tr = torch.func.jvp(plain, (q, k, v), tuple(x[3:]))
    assert rel(o, r) < 1e-14 and rel(to, tr) < 1e-14
    x = [t.requires_grad_() for t in x]
    assert torch.autograd.gradcheck(A.attention_jvp, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(A.attention_jvp, x)
    assert max(errors(six(1, 2, 40, 30, 32, torch.bfloat16))) < 8e-3
    assert max(errors(six(1, 1, 9, 7, 160))) < 2e-6  # D > 128
    assert rel(A.attention_reference(*x[:3]), r) < 1e-14


def test_attention_without_interpreter_takes_any_transform():
    q, k, v, tq, tk, tv = six(1, 2, 6, 5, 8, torch.float64)
    o, to = torch.func.jvp(A.attention, (q, k, v), (tq, tk, tv))
    assert rel(to, A.attention_jvp_reference(q, k, v, tq, tk, tv)[1]) < 1e-14
    f = lambda q: torch.func.jvp(lambda q: A.attention(q, k, v), (q,), (tq,))[1].square().sum()
    r = lambda q: torch.func.jvp(lambda q: plain(q, k, v), (q,), (tq,))[1].square().sum()
    assert rel(torch.func.hessian(f)(q), torch.func.hessian(r)(q)) < 1e-12


def test_attention_autocast_and_errors():
    x = six(1, 2, 6, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        o, to = A.attention_jvp(*(t.requires_grad_() for t in x))
    assert o.dtype == to.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad([o, to], x, [o, to]))
    q, k, v, tq, tk, tv = x
    for bad in ((q, k, v, tq, tk, tv[:, :, :2]), (q[0], k, v, tq, tk, tv), (q, k, v, tq.double(), tk, tv),
                (q, k[..., :4], v, tq, tk, tv), (q.long(),) * 6):
        with pytest.raises(ValueError, match="attention_jvp wants"):
            A.attention_jvp(*bad)
    with pytest.raises(ValueError, match="scale > 0"):
        A.attention_jvp(*x, scale=-1.0)
    assert A.attention_jvp(*(t[:, :, :0] for t in (q, k, v, tq, tk, tv)))[1].shape == (1, 2, 0, 8)


def test_attention_takes_its_scale_along():
    q, k, v, tq, tk, tv = attention_inputs()
    scaled = lambda *x: attention(*x, scale=0.7)
    one = lambda q, k, v: scaled(q[None], k[None], v[None])[0]
    o, to = attention_jvp(q, k, v, tq, tk, tv, scale=0.7)
    for got in (torch.func.jvp(scaled, (q, k, v), (tq, tk, tv)), dual_level(scaled, (q, k, v), (tq, tk, tv)),
                torch.func.jvp(torch.func.vmap(one), (q, k, v), (tq, tk, tv))):
        close(got[0], o, 1e-14), close(got[1], to, 1e-14)


def test_attention_refuses_other_heads_and_sizes():
    q, k, v, tq, tk, tv = six(1, 2, 6, 5, 8)
    for other in (lambda t: t[:, :1], lambda t: t[..., :4]):
        with pytest.raises(ValueError, match="attention_jvp wants"):
            attention_jvp(q, other(k), other(v), tq, other(tk), other(tv))
    with pytest.raises(ValueError, match="attention_jvp wants"):
        attention_jvp(q, k, v, tq[:, :, :1], tk, tv)


def test_grids_of_many_heads(monkeypatch):
    monkeypatch.setattr(A, "MAX_GRID", 1)
    A._plan.cache_clear()
    for B, H in ((1, 2), (2, 1), (1, 1)):
        grid, meta, *_ = A._plan("forward", (B, H, 37, 16), torch.float32, torch.device("cpu"), (1,), 50, ((592, 592, 16, 1),) * 7)
        assert meta["FLAT"] == (B * H > 1) and grid[1:] == (1, 1)
    A._plan.cache_clear()


@gpu
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 3e-3), (torch.float16, 1e-3), (torch.float32, 2e-6)])
@pytest.mark.parametrize("shape", [(2, 3, 256, 256, 64), (2, 3, 256, 256, 72), (1, 2, 300, 77, 128), (4, 8, 1, 1, 64),
                                   (2, 2, 65, 130, 40), (4, 8, 33, 70, 8), (8, 8, 1, 200, 96), (1, 2, 100, 100, 100),
                                   (1, 1, 1, 1, 64), (2, 2, 33, 70, 8), (1, 1, 1, 200, 96), (1, 2, 192, 192, 128), (2, 2, 160, 96, 64)])
def test_attention_gpu_accuracy(shape, dtype, bound):
    assert max(errors(six(*shape, dtype, "cuda"))) < bound


@gpu
@pytest.mark.parametrize("shape", [(2, 3, 256, 256, 64), (1, 2, 300, 77, 64), (1, 2, 1000, 1030, 32), (1, 1, 1, 1, 64), (1, 2, 700, 513, 128)])
def test_attention_gpu_descriptors(shape, monkeypatch):
    """Loads by descriptors and by pointers are the same to the bit."""
    x, results = [t.requires_grad_() for t in six(*shape, torch.bfloat16, "cuda")], []
    made, descriptor = [], A.TensorDescriptor
    monkeypatch.setattr(A, "TensorDescriptor", lambda *arguments: made.append(limit) or descriptor(*arguments))
    for limit in (0, 2 ** 60):
        monkeypatch.setattr(A, "TMA_FROM", limit)
        A._plan.cache_clear()
        o = A.attention_jvp(*x)
        results.append((*o, *torch.autograd.grad(o, x, [t.detach() for t in o])))
    monkeypatch.undo()
    A._plan.cache_clear()
    assert set(made) == {0}
    assert all(torch.equal(a, b) for a, b in zip(*results)) and max(errors(six(*shape, torch.bfloat16, "cuda"))) < 3e-3


@gpu
@pytest.mark.parametrize("D", [40, 64, 72, 128])
def test_attention_gpu_small_tiles(D, monkeypatch):
    """The tiles of GPUs other than Hopper's."""
    monkeypatch.setattr(A, "_tiles", lambda kernel, *_: None if kernel == "column" else A.SMALL_TILES)
    monkeypatch.setattr(A, "_plan", functools.lru_cache(A._plan.__wrapped__))
    monkeypatch.setattr(A, "_compiled", {})
    assert max(errors(six(2, 3, 130, 200, D, torch.bfloat16, "cuda"))) < 3e-3
    assert len(A._compiled) >= 4


@gpu
@pytest.mark.parametrize("D", [64, 72, 128])
def test_attention_gpu_offsets(D):
    q, k, v, tq, tk, tv = six(2, 2, 1024, 1024, D, torch.bfloat16, "cuda")
    assert max(errors([q, k, v, tq, tk + 8, tv])) < 5e-3
    assert max(errors([q, k, v, tq, tk, tv + 8])) < 5e-3
    ties = [q * 0, k[:, :, :2], v[:, :, :2], tq * 0, tk[:, :, :2], tv[:, :, :2] + 8]       # two keys of equal scores: half of tO are
    assert max(errors(ties)) < 5e-3
    for x in ([q * 1e4, k, v, tq, tk, tv], [q, k * 0 + 1, v, tq, tk, tv], [q, k, v, tq * 0, tk * 0, tv * 0]):
        x = [t.requires_grad_() for t in x]
        o = A.attention_jvp(*x)
        assert all(t.isfinite().all() for t in (*o, *torch.autograd.grad(o, x, list(o))))


@gpu
def test_attention_gpu_layouts():
    qkv = torch.randn(2, 2, 130, 3, 3, 64, device="cuda", dtype=torch.bfloat16)  # value or tangent, B, S, qkv, H, D
    q, k, v, tq, tk, tv = (t for x in qkv for t in x.permute(2, 0, 3, 1, 4))
    assert q.stride(-1) == 1 and not q.is_contiguous()
    assert max(errors([q, k, v, tq, tk, tv])) < 3e-3
    assert max(errors([q, k, v, tq[:, :, :1].expand_as(q), tk, tv])) < 3e-3
    assert max(errors([t[..., 1:] for t in (q, k, v, tq, tk, tv)])) < 3e-3  # addresses that no vector load can use
    assert max(errors(six(70000, 1, 16, 16, 16, torch.bfloat16, "cuda"))) < 3e-3  # more than 65,535 heads


@gpu
@pytest.mark.parametrize("D", [64, 72, 128])
def test_attention_gpu_deterministic_and_lean(D):
    x = [t.requires_grad_() for t in six(2, 8, 512, 512, D, torch.bfloat16, "cuda")]
    d = [torch.randn_like(x[0]) for _ in range(2)]
    first = None
    for _ in range(3):
        o = A.attention_jvp(*x)
        out = (*o, *torch.autograd.grad(o, x, d))
        assert first is None or all(torch.equal(a, b) for a, b in zip(first, out))
        first = out
    del o, out, first
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = A.attention_jvp(*x)
    g = torch.autograd.grad(o, x, d)
    row = 2 * 8 * 512
    assert torch.cuda.max_memory_allocated() - before <= 8.5 * row * D * 2 + 4 * row * 4 + 2 ** 14, len(g)


@gpu
def test_attention_gpu_transforms():
    torch.manual_seed(0)
    w = [(torch.randn(128, 128, device="cuda") * 0.1) for _ in range(4)]
    x, tx = torch.randn(2, 2, 50, 128, device="cuda")
    out = []
    for attend, dtype in ((A.attention, torch.float32), (plain, torch.float64)):
        m = [t.to(dtype).requires_grad_() for t in w]
        y, ty = torch.func.jvp(lambda z: tiny_net(attend, m, z), (x.to(dtype),), (tx.to(dtype),))
        out.append((y, ty, *torch.autograd.grad((y.square().sum() + ty.square().sum()), m)))
    assert max(rel(a, b) for a, b in zip(*out)) < 1e-5
    q, k, v = six(2, 2, 50, 50, 64, torch.bfloat16, "cuda")[:3]
    assert torch.equal(A.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


@gpu
def test_attention_gpu_compile_checkpoint_autocast():
    x = six(2, 3, 100, 100, 64, torch.bfloat16, "cuda")

    def grads(fn):
        y = [t.clone().requires_grad_() for t in x]
        o, to = fn(*y)
        (o.float().sin().sum() + to.float().cos().sum()).backward()
        return [o, to, *(t.grad for t in y)]

    f = lambda *y: [2 * t for t in A.attention_jvp(*(t.sin() for t in y))]
    eager = grads(f)
    assert max(rel(a, b) for a, b in zip(grads(torch.compile(f, fullgraph=True)), eager)) < 5e-3
    assert all(torch.equal(a, b) for a, b in zip(grads(lambda *y: checkpoint(f, *y, use_reentrant=False)), eager))
    with torch.autocast("cuda", torch.bfloat16):
        o = A.attention_jvp(*(t.float() for t in x))
    assert all(torch.equal(a, b) for a, b in zip(o, A.attention_jvp(*x)))
    torch.library.opcheck(A._forward, (*(t.clone().requires_grad_() for t in x), 0.125, True))


@gpu
@pytest.mark.parametrize("D", [64, 128])
def test_attention_gpu_graph(D):
    x = [t.requires_grad_() for t in six(2, 3, 128, 128, D, torch.bfloat16, "cuda")]
    step = lambda: (o := A.attention_jvp(*x), torch.autograd.grad(o, x, [o[0].detach(), o[1].detach()]))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, g = step()
    with torch.no_grad():
        for t in x:
            t.copy_(torch.randn_like(t))
    graph.replay()
    ro, rg = step()
    assert all(torch.equal(a, b) for a, b in zip((*o, *g), (*ro, *rg)))
