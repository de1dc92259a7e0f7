"""cublas.py beside torch's own products."""

import ctypes
import functools

import pytest
import torch
from helpers import gpu
from torch.nn import functional

import cublas

ROWS, COLUMNS, DEPTH = 4096, 768, 1024  # 6.4 GFLOP


def tensors(device):
    torch.manual_seed(0)
    x = torch.randn(4, ROWS // 4, DEPTH, device=device).bfloat16()
    weight = torch.randn(COLUMNS, DEPTH, device=device).bfloat16() / 32
    bias = torch.randn(COLUMNS, device=device).bfloat16()
    return x, weight, bias


def test_other_products_are_torchs():
    """On a CPU, in float32, for small products and for views the results are torch's."""
    x, weight, bias = torch.randn(5, 3, 16), torch.randn(8, 16), torch.randn(8)
    assert torch.equal(cublas.linear(x, weight), functional.linear(x, weight))
    assert torch.equal(cublas.linear(x, weight, bias), functional.linear(x, weight, bias))
    assert torch.equal(cublas.matmul(x[..., :8], weight), x[..., :8] @ weight)
    wanted = functional.gelu(functional.linear(x, weight, bias), approximate="tanh")
    found = cublas.linear(x, weight, bias, gelu=True)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert cublas.why_not(x, weight, bias) == "it takes bfloat16 on one CUDA device"


def test_structures_have_cublass_sizes():
    """As cublasLt.h declares them."""
    assert ctypes.sizeof(cublas.Kernel) == 64
    assert ctypes.sizeof(cublas.Suggestion) == 96


def test_the_fastest_with_the_same_bits_wins(monkeypatch):
    """A kernel that fails, or that rounds otherwise, does not win, however fast it is."""
    out = torch.empty(3 * cublas.ROW_STEP, 4, dtype=torch.bfloat16)
    # name: (what it writes, None if it fails; its milliseconds)
    kernels = {
        "first": (1.0, 5.0),
        "fails": (None, 1.0),
        "fast": (1.0, 2.0),
        "slow": (1.0, 9.0),
        "other bits": (1.0078125, 1.0),
        "not a number": (torch.nan, 1.0),
    }

    def run(name):
        number, _ = kernels[name]
        if number is not None:
            out.fill_(number)
        return number is not None

    monkeypatch.setattr(cublas, "time_of", lambda run, name, ms: kernels[name][1])
    assert cublas.fastest(list(kernels), run, out) == "fast"
    kernels["first"] = torch.nan, 5.0  # bits are compared, not numbers
    assert cublas.fastest(list(kernels), run, out) == "not a number"


@gpu
@pytest.mark.parametrize("case", ["bias", "no bias", "gelu", "matmul"])
def test_gpu_products_have_torchs_bits(case, monkeypatch):
    """Of the first call, which lets kernels race, of the second, and with other rows."""
    x, weight, bias = tensors("cuda")
    run = {
        "bias": functools.partial(cublas.linear, weight=weight, bias=bias),
        "no bias": functools.partial(cublas.linear, weight=weight),
        "gelu": functools.partial(cublas.linear, weight=weight, bias=bias, gelu=True),
        "matmul": functools.partial(cublas.matmul, weight=weight.t().contiguous()),
    }[case]
    # The last two are computed by the kernel that won with all rows, if it takes so many.
    for rows in (x, x, x[:3], x.view(ROWS, DEPTH)[:-8], x.view(ROWS, DEPTH)[:-3]):
        monkeypatch.setattr(cublas, "TUNED", True)
        given = None if case in ("no bias", "matmul") else bias
        reason = cublas.why_not(rows, weight, given)
        assert reason == ("it is small" if rows is not x and rows.ndim == 3 else None)
        found = run(rows)
        monkeypatch.setattr(cublas, "TUNED", False)
        assert torch.equal(found, run(rows))


@gpu
def test_gpu_what_is_left_to_torch():
    x, weight, bias = tensors("cuda")
    assert cublas.why_not(x, weight, bias) is None
    assert cublas.why_not(x.float(), weight) == "it takes bfloat16 on one CUDA device"
    assert cublas.why_not(x, weight.cpu()) == "it takes bfloat16 on one CUDA device"
    assert "contiguous" in cublas.why_not(x.transpose(0, 1), weight)
    assert "contiguous" in cublas.why_not(x, weight, torch.cat([bias, bias])[1:-1])
    assert cublas.why_not(x[:1], weight) == "it is small"
    wide = torch.randn(COLUMNS + 1, DEPTH, device="cuda").bfloat16()
    assert cublas.why_not(x, wide) == "sizes are no multiples of 8"
    for odd in (x.transpose(0, 1), x[:1]):
        assert torch.equal(cublas.linear(odd, weight, bias), functional.linear(odd, weight, bias))


@gpu
def test_gpu_a_winner_that_does_not_take_the_rows(monkeypatch):
    x, weight, bias = tensors("cuda")
    wanted = functional.linear(x, weight, bias)
    cublas.make_product.cache_clear()
    none = cublas.Kernel()  # cuBLAS has no algorithm 0 with these settings
    rows, device = x.numel() // DEPTH, x.device
    size = (rows, COLUMNS, DEPTH, True, True, False, device)
    monkeypatch.setattr(cublas, "winners", {size: none})
    for _ in range(2):
        assert torch.equal(cublas.linear(x, weight, bias), wanted)
    assert cublas.winners == {size: none}
    cublas.make_product.cache_clear()


@gpu
def test_gpu_products_in_a_graph(monkeypatch):
    """A size that first comes while a graph is recorded takes the first suggestion, for then."""
    x, weight, bias = tensors("cuda")
    monkeypatch.setattr(cublas, "winners", {})
    cublas.make_product.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cublas.linear(x, weight, bias)
    assert cublas.winners == {}
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, functional.linear(x, weight, bias))
    cublas.linear(x, weight, bias)
    assert len(cublas.winners) == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cublas.linear(x, weight, bias)
    graph.replay()
    assert torch.equal(out, functional.linear(x, weight, bias))
