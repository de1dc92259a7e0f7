"""cublas.py beside torch's own products."""

import ctypes
import functools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import gpu
from torch.autograd import forward_ad
from torch.nn import functional

import cublas
from dual import Dual, linear
from products import RoundedCopies

ROWS, COLUMNS, DEPTH = 8192, 768, 1024  # 12.9 GFLOP


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
    found = cublas.linear_gelu(x, weight, bias)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert cublas.why_not(x, weight.t(), bias) == "not all tensors are bfloat16 on one CUDA device"
    for wrong in (weight, weight.t()[..., None], torch.randn(16)):
        assert cublas.why_not(x, wrong) == "the shapes do not fit"
    assert cublas.why_not(torch.tensor(1.0), weight) == "the shapes do not fit"


def test_sizes_of_structures():
    """As cublasLt.h declares them."""
    assert ctypes.sizeof(cublas.Algorithm) == 64
    assert ctypes.sizeof(cublas.Suggestion) == 96


def test_the_fastest_with_the_same_bits_wins(monkeypatch):
    """An algorithm that fails, or that rounds otherwise, does not win, however fast it is."""
    out = torch.empty(6, 4, dtype=torch.bfloat16)
    ones = torch.ones(6, 4)
    last_row = torch.tensor([1, 1, 1, 1, 1, 1.0078125])[:, None]
    # name: (what it writes, None for nothing; whether it succeeds; its milliseconds)
    algorithms = {
        "first": (ones, True, 5.0),
        "fails": (ones, False, 1.0),
        "writes nothing": (None, True, 1.0),
        "fast": (ones, True, 2.0),
        "slow": (ones, True, 9.0),
        "other bits in one row": (last_row, True, 1.0),
        "not a number": (ones * torch.nan, True, 1.0),
    }

    def run(name):
        numbers, succeeds, _ = algorithms[name]
        if numbers is not None:
            out.copy_(numbers)
        return succeeds

    monkeypatch.setattr(cublas, "time_of", lambda run, name, ms: algorithms[name][2])
    assert cublas.winner_of(list(algorithms), run, out) == "fast"
    assert cublas.winner_of(["slow", "first", "other bits in one row"], run, out) == "first"
    monkeypatch.setattr(cublas, "COMPARED", 8)  # of 24 numbers: every third row
    assert cublas.winner_of(list(algorithms), run, out) == "other bits in one row"
    algorithms["first"] = ones * torch.nan, True, 5.0  # bits are compared, not numbers
    assert cublas.winner_of(list(algorithms), run, out) == "not a number"


def test_a_narrow_win_does_not_count(monkeypatch):
    """A winner must be 5% faster than the faster one of the first two, if that has the bits."""
    out = torch.zeros(6, 4, dtype=torch.bfloat16)
    others = {f"other {i}": 1.0 + i for i in range(8)}  # enough to drop the usual ones
    asked = []

    def winner(torch, suggestion, has_bits=True):
        times = {"torch": torch, "suggestion": suggestion, **others}
        asked.clear()

        def run(name):
            out.fill_(0 if has_bits or name != "suggestion" else 1)
            return True

        def time_of(run, name, ms):
            asked.append(name)
            return times[name]

        monkeypatch.setattr(cublas, "time_of", time_of)
        return cublas.winner_of(list(times), run, out)

    assert winner(torch=20.0, suggestion=1.05) == "suggestion"
    assert winner(torch=1.05, suggestion=20.0) == "torch"
    assert winner(torch=1.055, suggestion=1.056) == "other 0"
    assert winner(torch=20.0, suggestion=30.0) == "other 0"
    # 30 ms to warm up; then two times in each round, in which 10, 6 and 3 take part, and both usual
    assert asked.count("other 0") == asked.count("suggestion") == asked.count("torch") - 1 == 6
    assert (asked.count("other 2"), asked.count("other 5"), asked.count("other 7")) == (6, 4, 2)
    # The second one with these bits is not a usual one.
    assert winner(torch=1.04, suggestion=0.9, has_bits=False) == "torch"
    others["other 1"] = 1.03
    assert winner(torch=1.07, suggestion=0.9, has_bits=False) == "other 0"


class FakeLibrary:
    """The functions of cuBLASLt that cublas.py calls, for memory of the CPU, by their reference.

    Algorithm i is suggested as number i. Number 3 fails, and so do variants with an odd option.
    """

    def __init__(self):
        self.objects = [None]
        self.ran = []  # the algorithms, as (number, tile, option)

    def new(self, where, thing):
        self.objects.append(thing)
        where._obj.value = len(self.objects) - 1
        return 0

    def cublasLtMatrixLayoutCreate(self, where, dtype, rows, columns, stride):
        assert dtype == 14
        return self.new(where, (rows, columns, stride))

    def cublasLtMatmulDescCreate(self, where, compute, scale):
        assert (compute, scale) == (68, 0)
        return self.new(where, {})

    def cublasLtMatmulDescSetAttribute(self, of, attribute, value, size):
        assert size == {3: 4, 7: 4, 8: 8}[attribute]
        self.objects[of.value][attribute] = value._obj.value
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments):
        *_, count, found, returned = arguments
        for i in range(count):
            found[i].algorithm.data[0] = i + 1
        returned._obj.value = count
        return 0

    def cublasLtMatmulAlgoConfigSetAttribute(self, of, attribute, value, size):
        assert size == 4
        of._obj.data[{1: 1, 5: 2}[attribute]] = value._obj.value
        return 0

    def matrix(self, address, layout):
        rows, columns, stride = self.objects[layout.value]
        raw = bytearray(ctypes.string_at(address, 2 * columns * stride))
        return torch.frombuffer(raw, dtype=torch.bfloat16).view(columns, stride)[:, :rows].t()

    def cublasLtMatmul(self, *arguments):
        _, of, alpha, a, a_layout, b, b_layout, beta, c, _, d, d_layout, algorithm, *_ = arguments
        assert (alpha._obj.value, beta._obj.value, c) == (1, 0, d)
        number, tile, option = list(algorithm._obj.data)[:3]
        self.ran.append((number, tile, option))
        if number == 3 or option % 2 == 1:
            return 15
        settings = self.objects[of.value]
        a = self.matrix(a, a_layout).double()
        out = (a.t() if settings[3] else a) @ self.matrix(b, b_layout).double()
        if settings[7] & 4:
            raw = bytearray(ctypes.string_at(settings[8], 2 * len(out)))
            out += torch.frombuffer(raw, dtype=torch.bfloat16)[:, None]
        if settings[7] & 32:
            out = functional.gelu(out, approximate="tanh")
        rows, columns, stride = self.objects[d_layout.value]
        assert out.shape == (rows, columns) and stride == rows
        written = out.t().bfloat16().contiguous()
        ctypes.memmove(d, written.data_ptr(), 2 * written.numel())
        return 0


@pytest.fixture
def fake_library(monkeypatch):
    library = FakeLibrary()
    monkeypatch.setattr(cublas, "library", lambda: library)
    monkeypatch.setattr(cublas, "handle", lambda device: ctypes.c_void_p(0))
    monkeypatch.setattr(cublas, "preference", lambda: ctypes.c_void_p(0))
    monkeypatch.setattr(cublas, "winners", {})
    monkeypatch.setattr(cublas, "torch_product", reference_product)
    monkeypatch.setattr(cublas, "time_of", fake_time)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return library


def reference_product(x, matrix, bias, gelu, out):
    wanted = x.view(-1, x.size(-1)).double() @ matrix.double()
    wanted = wanted if bias is None else wanted + bias.double()
    wanted = functional.gelu(wanted, approximate="tanh") if gelu else wanted
    out.view(-1, out.size(-1)).copy_(wanted)


def fake_time(run, algorithm, ms):
    """Variants with option 2 are the fastest, with tile 29 above all. The slowest is torch."""
    if algorithm is cublas.TORCH:
        return 100
    number, tile, option = list(algorithm.data)[:3]
    return number - option - tile / 100


@pytest.mark.parametrize("kind", ["", "bias", "bias and GELU"])
@pytest.mark.parametrize("by_columns", [False, True])
def test_products_of_a_fake_library(fake_library, by_columns, kind):
    has_bias, gelu = "bias" in kind, "GELU" in kind
    torch.manual_seed(0)
    x = torch.randn(5, 2, 16).bfloat16()
    matrix = torch.randn(24, 16).bfloat16().t() if by_columns else torch.randn(16, 24).bfloat16()
    product = cublas.TunedProduct(10, 24, 16, by_columns, has_bias, gelu, torch.device("cpu"))
    state = torch.get_rng_state()
    for _ in range(2):
        bias = torch.randn(24).bfloat16() if has_bias else None
        found = product(x, matrix, bias)
        wanted = torch.empty_like(found)
        reference_product(x, matrix, bias, gelu, wanted)
        assert found.shape == (5, 2, 24) and torch.equal(found, wanted)
        assert fake_library.ran[-1] == (1, 29, 2)
    assert list(cublas.winners) == [product.key] and product.key[0] == 16
    if not has_bias:
        assert torch.equal(torch.get_rng_state(), state)  # the race has numbers of its own


def test_who_computes(fake_library, monkeypatch):
    """No race while a graph is recorded; one for several numbers of rows; a winner that fails."""
    matrix = torch.randn(16, 24).bfloat16()

    def run(rows):
        fake_library.ran.clear()
        product = cublas.TunedProduct(rows, 24, 16, False, False, False, torch.device("cpu"))
        x = torch.randn(rows, 16).bfloat16()
        wanted = torch.empty(rows, 24, dtype=torch.bfloat16)
        reference_product(x, matrix, None, False, wanted)
        assert torch.equal(product(x, matrix), wanted)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run(32)
    assert fake_library.ran == [] and cublas.winners == {}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    run(32)
    assert len(fake_library.ran) > 16 and len(cublas.winners) == 1
    run(17)
    assert fake_library.ran == [(1, 29, 2)] and len(cublas.winners) == 1
    cublas.winners[next(iter(cublas.winners))].data[2] = 1  # now it fails
    run(20)
    assert fake_library.ran == [(1, 29, 1)]
    run(16)
    assert len(cublas.winners) == 2
    monkeypatch.setattr(FakeLibrary, "cublasLtMatmulAlgoGetHeuristic", lambda *_: 15)
    run(1000)
    assert fake_library.ran == [] and list(cublas.winners.values())[2] is cublas.TORCH

    def no_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cublas, "winner_of", no_memory)
    run(2000)
    assert fake_library.ran == [] and list(cublas.winners.values())[3] is cublas.TORCH


def test_who_calls_it(monkeypatch):
    """Layers with copies: forward and backward, value and tangent."""
    called = []
    for name in ("linear", "matmul"):
        plain = getattr(cublas, name)
        monkeypatch.setattr(cublas, name, lambda *a, n=name, f=plain: called.append(n) or f(*a))
    layer = torch.nn.Linear(8, 16)
    x = torch.randn(3, 8, requires_grad=True)
    dx = torch.randn(3, 8, requires_grad=True)
    with RoundedCopies([layer]).in_use(), torch.autocast("cpu", torch.bfloat16):
        y = linear(layer, Dual(x, dx))
        (y.value.sum() + y.tangent.sum()).backward()
    assert called == ["linear", "linear", "matmul", "matmul"]


@gpu
@pytest.mark.parametrize("case", ["bias", "no bias", "gelu", "matmul"])
def test_gpu_products_have_torchs_bits(case, monkeypatch):
    """Of the first call, which is a race, of the second, and with other rows."""
    x, weight, bias = tensors("cuda")
    run = {
        "bias": functools.partial(cublas.linear, weight=weight, bias=bias),
        "no bias": functools.partial(cublas.linear, weight=weight),
        "gelu": functools.partial(cublas.linear_gelu, weight=weight, bias=bias),
        "matmul": functools.partial(cublas.matmul, matrix=weight.t().contiguous()),
    }[case]
    rows = x.view(ROWS, DEPTH)
    # The last two are computed by the algorithm that won with all rows, if it takes so many.
    for some in (x, x, rows[:-8], rows[:-3]):
        assert cublas.why_not(some, weight.t(), bias) is None
        monkeypatch.setattr(cublas, "TUNED", True)
        with torch.no_grad():
            found = run(some)
            monkeypatch.setattr(cublas, "TUNED", False)
            assert torch.equal(found, run(some))
        monkeypatch.undo()


@gpu
def test_gpu_what_is_left_to_torch():
    x, weight, bias = tensors("cuda")
    matrix = weight.t()
    assert cublas.why_not(x, matrix, bias) is None
    assert cublas.why_not(x.float(), matrix) == "not all tensors are bfloat16 on one CUDA device"
    assert cublas.why_not(x, matrix.cpu()) == "not all tensors are bfloat16 on one CUDA device"
    assert cublas.why_not(x.transpose(0, 1), matrix) == "a tensor is not contiguous"
    shifted = torch.cat([bias, bias])[1 : COLUMNS + 1]
    assert "256 bytes" in cublas.why_not(x, matrix, shifted)
    assert cublas.why_not(x[:1], matrix) == "the product is small"
    wide = torch.randn(DEPTH, COLUMNS + 1, device="cuda").bfloat16()
    assert cublas.why_not(x, wide) == "the matrix's sizes are not multiples of 8"
    for odd in (x.transpose(0, 1), x[:1]):
        assert torch.equal(cublas.linear(odd, weight, bias), functional.linear(odd, weight, bias))
    for wrong in (dict(bias=bias[:-8]), dict(bias=bias, x=x[..., 8:].contiguous())):
        with pytest.raises(RuntimeError, match="size|shape"):
            cublas.linear(**{**dict(x=x, weight=weight), **wrong})
    with pytest.raises(RuntimeError, match="size|shape"):
        cublas.matmul(x, weight)


@gpu
def test_gpu_derivatives():
    """What autograd and forward AD must see is torch's, also in a backward of many gradients."""
    x, weight, bias = tensors("cuda")
    x.requires_grad_()
    for y in (cublas.linear(x, weight, bias), cublas.linear_gelu(x, weight, bias)):
        assert y.requires_grad
    with forward_ad.dual_level(), torch.no_grad():
        dual_x = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        found = forward_ad.unpack_dual(cublas.linear(dual_x, weight, bias)).tangent
    assert torch.equal(found, functional.linear(torch.ones_like(x), weight))
    layer = torch.nn.Linear(DEPTH, COLUMNS, device="cuda").requires_grad_(False)
    gradients = torch.randn(2, 4, ROWS // 4, COLUMNS, device="cuda").bfloat16()
    with RoundedCopies([layer]).in_use(), torch.autocast("cuda", torch.bfloat16):
        y = linear(layer, x)
        (both,) = torch.autograd.grad(y, x, gradients, is_grads_batched=True, retain_graph=True)
        for found, g in zip(both, gradients, strict=True):
            (wanted,) = torch.autograd.grad(y, x, g, retain_graph=True)
            torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


@gpu
def test_gpu_a_winner_that_does_not_take_the_rows(monkeypatch):
    x, weight, bias = tensors("cuda")
    product = cublas.TunedProduct(ROWS, COLUMNS, DEPTH, True, True, False, x.device)
    none = cublas.Algorithm()  # all zeros
    assert not product.run(none, x, weight.t(), bias, torch.empty_like(x[..., :COLUMNS]))
    monkeypatch.setattr(cublas, "winners", {product.key: none})
    assert torch.equal(cublas.linear(x, weight, bias), functional.linear(x, weight, bias))
    assert cublas.winners == {product.key: none}


@gpu
def test_gpu_products_in_a_graph(monkeypatch):
    """One that first occurs while a graph is recorded is torch's, for this graph. A race leaves
    PyTorch's random numbers as they are."""
    x, weight, bias = tensors("cuda")
    functional.linear(x[:1], weight, bias)  # cuBLAS cannot start while a graph is recorded
    monkeypatch.setattr(cublas, "winners", {})
    state = torch.cuda.get_rng_state()
    for races in (0, 1):
        if races == 1:
            cublas.linear(x, weight, bias)
        assert len(cublas.winners) == races
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cublas.linear(x, weight, bias)
        assert len(cublas.winners) == races
        graph.replay()
        assert torch.equal(out, functional.linear(x, weight, bias))
    assert torch.equal(torch.cuda.get_rng_state(), state)
