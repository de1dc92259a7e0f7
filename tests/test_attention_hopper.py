"""Tests of attention_hopper.py.

    python -m pytest tests/test_attention_hopper.py

Its kernels run on the CPU by gluon_on_cpu.py; then they are compiled for a GPU that need not be
here; then they run on a Hopper GPU, where there is one. The truth is autograd in float64.
"""

import functools
import math
import os
import shutil
import subprocess
import sys

import gluon_on_cpu
import pytest
import torch
from helpers import HERE, gpu, rel, stack_of

import attention_jvp as A

PATH = os.path.join(HERE, "attention_hopper.py")


def inputs(B, H, Sq, Sk, D, dtype, offset=0.0, device="cpu"):
    """q, k, v, tq, tk, tv, do and dto."""
    g = torch.Generator(device).manual_seed(0)
    sizes = (Sq, Sk, Sk, Sq, Sk, Sk, Sq, Sq)
    x = [torch.randn(B, H, S, D, generator=g, device=device) for S in sizes]
    x[4] += offset
    x[5] += offset
    return [t.to(dtype) for t in x]


def key_masks(Sk, device="cpu"):
    """One sample of each kind, (5, 1, 1, Sk): all keys seen, padding at the end, padding at the
    beginning, gaps, no key seen."""
    masks = torch.ones(5, 1, 1, Sk, dtype=torch.bool, device=device)
    masks[1, ..., Sk // 2 + 3 :] = False
    masks[2, ..., : Sk // 2 + 3] = False
    masks[3, ..., 5::3] = False
    masks[3, ..., Sk // 4 : Sk // 2] = False
    masks[4] = False
    return masks


def exact(x, mask=None):
    """The gradients of q, k, v, tq, tk and tv, and the rows lse (base 2), mu, s1 and s2."""
    y = [t.double().requires_grad_() for t in x[:6]]
    do, dto = (t.double() for t in x[6:])
    o, to = A.attention_jvp_reference(*y, attn_mask=mask)
    gradients = torch.autograd.grad((o, to), y, (do, dto))
    q, k, _, tq, tk, _ = (t.detach() for t in y)
    scale = q.size(3) ** -0.5
    S = q @ k.mT * scale
    if mask is not None:
        S = S.masked_fill(~mask, -math.inf)
    tS = (tq @ k.mT + q @ tk.mT) * scale
    lse = S.logsumexp(-1) / math.log(2)
    lse = lse.masked_fill(lse == -math.inf, math.inf)  # what the forward writes for no key
    mu = (S.softmax(-1).nan_to_num(0) * tS).sum(-1)
    s1 = (dto * o.detach()).sum(-1)
    s2 = (dto * to.detach()).sum(-1) + (do * o.detach()).sum(-1)
    return gradients, [t.float() for t in (lse, mu, s1, s2)]


def seen_of(mask):
    """What the forward finds in key masks: the first key that is hidden, the first that is seen,
    and the one after the last that is seen, (B, 3)."""
    numbers = []
    for keys in mask[:, 0, 0].tolist():
        seen = [j for j, is_seen in enumerate(keys) if is_seen]
        hidden = [j for j, is_seen in enumerate(keys) if not is_seen]
        first_hidden = min(hidden, default=2**30)
        first_seen = min(seen, default=2**30)
        numbers.append((first_hidden, first_seen, max(seen, default=-1) + 1))
    return torch.tensor(numbers, dtype=torch.int32)


def gradients_of(module, x, rows, mask=None):
    """What a module's kernels make of the inputs, in attention_jvp's layout."""
    dq, dk, dv, dtq, dtk, dtv = (A._like(t).fill_(math.nan) for t in x[:6])
    scale = x[0].size(3) ** -0.5
    masked = (None, None)
    if mask is not None:
        masked = (A._kernel_mask(mask, x[0], x[1]).tensor, seen_of(mask))
    module.rows(*x, *rows, dq, dtq, scale, *masked)
    module.columns(*x, *rows, dk, dv, dtk, dtv, scale, *masked)
    return dq, dk, dv, dtq, dtk, dtv


@functools.cache
def interpreted():
    pytest.importorskip("triton")
    return gluon_on_cpu.load_module(PATH)


@pytest.mark.parametrize(
    "shape, dtype, offset, most",
    [
        ((1, 1, 256, 256), torch.bfloat16, 0.0, 3e-3),
        ((2, 1, 196, 130), torch.bfloat16, 0.0, 3e-3),
        ((1, 2, 68, 200), torch.float16, 0.0, 4e-4),
        ((1, 1, 128, 256), torch.bfloat16, 8.0, 3e-3),
        ((1, 1, 4, 1), torch.bfloat16, 0.0, 4e-3),
    ],
)
def test_interpreted(shape, dtype, offset, most):
    """Against float64, also where blocks are not full and tK and tV have a large common part."""
    x = inputs(*shape, 128, dtype, offset)
    want, rows = exact(x)
    got = gradients_of(interpreted(), x, rows)
    for a, b in zip(got, want, strict=True):
        assert torch.isfinite(a).all()
        assert rel(a, b) < most or b.norm() < 1e-6


@pytest.mark.parametrize(
    "Sk, offset, step, dtype, most",
    [
        (256, 0.0, 1, torch.bfloat16, 3e-3),
        (256, 8.0, 1, torch.bfloat16, 3e-3),
        (201, 0.0, 3, torch.bfloat16, 3e-3),
        (201, 0.0, 1, torch.float16, 4e-4),
    ],
)
def test_key_masks(Sk, offset, step, dtype, most):
    """Against float64, with hidden keys that are unlike those that are seen. `step` is the stride
    of the masks."""
    x = inputs(5, 1, 132, Sk, 128, dtype, offset)
    mask = torch.zeros(5, 1, 1, Sk, step, dtype=torch.bool)[..., 0].copy_(key_masks(Sk))
    hidden = ~mask[:, 0, 0]
    for i, t in enumerate(x):
        if i in (1, 2):  # their scores, far beyond the logsumexp, overflow
            t.transpose(1, 2)[hidden] *= 60
        if i in (4, 5):
            t.transpose(1, 2)[hidden] = 1e3 * (t.transpose(1, 2)[hidden] - offset)
    want, rows = exact(x, mask)
    got = gradients_of(interpreted(), x, rows, mask)
    for a, b in zip(got, want, strict=True):
        for n in range(4):
            assert rel(a[n], b[n]) < most
        assert (a[4] == 0).all()
        if a.size(2) == Sk:
            assert (a.transpose(1, 2)[hidden] == 0).all()


def test_one_mask_for_all_samples():
    x = inputs(2, 1, 64, 128, 128, torch.bfloat16)
    mask = key_masks(128)[3:4]
    want, rows = exact(x, mask)
    got = gradients_of(interpreted(), x, rows, mask.expand(2, 1, 1, 128))
    for a, b in zip(got, want, strict=True):
        assert rel(a, b) < 3e-3


def compiled(kernel, D, dtype, constants, masked=False):
    """A kernel, compiled for Hopper."""
    compiler = pytest.importorskip("triton.compiler")
    backend = pytest.importorskip("triton.backends.compiler")
    runtime = pytest.importorskip("triton.experimental.gluon._runtime")
    from triton.experimental.gluon import language as gl

    def descriptor(block, kind, element):
        layout = gl.NVMMASharedLayout.get_default_for(block, element)
        return f"tensordesc<{kind}{block},{layout!r}>"

    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    blocks = {}
    if "BM" in constants:
        blocks.update(dict.fromkeys(("Q", "TQ", "DO", "DTO"), constants["BM"]))
        blocks.update(dict.fromkeys(("K", "V", "TK", "TV"), constants["BN"]))
    signature = dict(st=("i32",) * 3, Sq="i32", Sk="i32", scale="fp32", MEAN="*fp32")
    signature.update(MASK="*u8", SEEN="*i32", mask_stride="i32", TK="*" + kind)
    for name, rows in blocks.items():
        signature[name] = descriptor([1, 1, rows, D], kind, gl.float16)
    for name in ("LSE", "MU", "S1", "S2"):
        signature[name] = "*fp32"
        if "SHIFT" in constants:
            signature[name] = descriptor([1, constants["BM"]], "fp32", gl.float32)
    for name in ("DQ", "DK", "DV", "DTQ", "DTK", "DTV"):
        signature[name] = "*" + kind
    constants = dict(constants, D=D)
    if not masked:
        constants.update(MASK=None, SEEN=None, mask_stride=None)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    signature = {name: signature[name] for name in kernel.arg_names}
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {}
    for i, name in enumerate(kernel.arg_names):
        if signature[name][0] == "*":
            aligned[(i,)] = [["tt.divisibility", 16]]
        if name == "st":
            aligned.update({(i, j): [["tt.divisibility", 16]] for j in range(3)})
    source = runtime.GluonASTSource(kernel, signature, fixed, aligned)
    target = backend.GPUTarget("cuda", 90, 32)
    return compiler.compile(source, target=target, options=dict(num_warps=4, maxnreg=168))


@pytest.mark.parametrize(
    "name, masked, dtype",
    [
        ("mean", True, torch.bfloat16),
        ("row", False, torch.bfloat16),
        ("row", True, torch.bfloat16),
        ("odd row", False, torch.bfloat16),
        ("column", False, torch.bfloat16),
        ("column", True, torch.bfloat16),
        ("column", True, torch.float16),  # which exchanges P in float32
    ],
)
def test_compiles(name, masked, dtype, tmp_path):
    """For Hopper, without a GPU: it fits, and registers do not spill where that matters."""
    triton = pytest.importorskip("triton")
    import attention_hopper

    if name == "mean":
        kernel = attention_hopper.mean_kernel
        constants = {}
    elif name == "column":
        kernel = attention_hopper.column_kernel
        shift = 14 if dtype == torch.bfloat16 else 0
        constants = dict(BM=64, BN=64, STAGES=2, SHIFT=shift)
    else:
        kernel = attention_hopper.row_kernel
        constants = dict(BM=64, BN=32, STAGES=3, EVEN=name == "row")
    made = compiled(kernel, 128, dtype, constants, masked)
    assert made.metadata.shared <= 227 * 1024
    if triton.__version__.startswith(attention_hopper.TRITON + "."):
        assert stack_of(made, tmp_path) == 0


def test_it_is_said_why_they_are_not_used(capsys):
    pytest.importorskip("triton")
    x = inputs(1, 1, 4, 4, 64, torch.bfloat16)
    lse = torch.zeros(1, 1, 4)
    for _ in range(2):
        assert A._hopper_kernels([True] * 4, *x, lse, None, False) is None
    assert A._hopper_kernels([True, False, True, True], *x, lse, None, False) is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2  # each reason once
    assert all(line.startswith("attention_jvp: HOPPER_KERNELS are not used: ") for line in said)


def test_versions_of_triton(monkeypatch):
    triton = pytest.importorskip("triton")
    import attention_hopper

    right, wrong = ("3.6.0", "3.6.0.post1"), ("3.60.0", "3.9.0")
    for version in (*right, *wrong):
        monkeypatch.setattr(triton, "__version__", version)
        assert (attention_hopper.wrong_triton() is None) == (version in right), version


def test_both_files_in_a_package(tmp_path):
    pytest.importorskip("triton")
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("attention_jvp.py", "attention_hopper.py"):
        shutil.copy(os.path.join(HERE, name), package)
    program = "import mine.attention_jvp as A; print(A._import_hopper_kernels()[0].__name__)"
    made = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True)
    assert made.stdout.split() == [b"mine.attention_hopper"], made.stderr


def check_on_the_gpu(x, mask, monkeypatch):
    """Called by attention_jvp; errors are those of its own kernels."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU is not a Hopper one")
    import attention_hopper

    monkeypatch.setattr(attention_hopper, "LEAST_SCORES", 0)
    calls = []
    columns = attention_hopper.columns
    monkeypatch.setattr(attention_hopper, "columns", lambda *x: (calls.append(1), columns(*x)))
    want, rows = exact(x, mask)
    errors = {}
    for ours in (True, False):
        monkeypatch.setattr(A, "HOPPER_KERNELS", ours)
        y = [t.detach().requires_grad_() for t in x[:6]]
        got = torch.autograd.grad(A.attention_jvp(*y, attn_mask=mask), y, x[6:])
        errors[ours] = max(rel(a, b) for a, b in zip(got, want, strict=True))
    if attention_hopper.why_not(*x, rows[0], mask, False) is None:
        assert len(calls) == 1
    assert errors[True] < 1.1 * errors[False]


@gpu
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 256, 256), (2, 3, 196, 324), (1, 2, 512, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_the_gpu(shape, dtype, swapped, monkeypatch):
    x = inputs(*shape, 128, dtype, device="cuda")
    if swapped:
        x = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x]
    check_on_the_gpu(x, None, monkeypatch)


@gpu
@pytest.mark.parametrize("shape", [(5, 2, 256, 512), (5, 3, 196, 324)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_key_masks_on_the_gpu(shape, dtype, monkeypatch):
    x = inputs(*shape, 128, dtype, device="cuda")
    check_on_the_gpu(x, key_masks(shape[3], "cuda"), monkeypatch)
