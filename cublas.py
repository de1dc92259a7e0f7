"""
Matrix products in bfloat16 by cuBLAS, each with an algorithm that has won a race.

    y = linear(x, weight, bias)       # x W^T + b
    y = linear_gelu(x, weight, bias)  # GELU of that
    gx = matmul(gy, weight)           # gy W

cuBLAS has many kernels for one product, and settings for each: a kernel with its settings is
called an algorithm. PyTorch leaves the choice to cuBLAS, which does not always take the fastest:
on an H200 at its limit of power others take at least 3% less time for most products of XL/2 that
sum 1,152 numbers, and at least 11% less with GELU. So when a product first occurs, algorithms
race: torch's, those that cuBLAS suggests, and variants of its first suggestion. The winner
computes that product from then on.

A narrow win does not count (LEAD). In a training at the limit of power, the more power a product
takes, the lower the clock. A race is too short for the clock to follow. So an algorithm that was a
little faster there, since it kept more of the GPU busy, can take longer in the training.

Only algorithms that give torch's bits, for random numbers, may win. The winner also computes the
product with other numbers of rows, up to the same power of two. Neither its time nor its bits are
compared there.

Small products, other dtypes and other devices are left to torch, and so is what autograd must
differentiate. products.py calls this, forward and backward.
"""

import ctypes
import functools
import itertools
import threading
from ctypes import c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p

import torch
from torch import nn
from torch.nn import functional

import fused

TUNED = True  # False: all products are torch's
MIN_FLOPS = 1e10  # smaller products are torch's: to launch one takes almost as long as to run it
ALIGNMENT = 256  # bytes: what cuBLAS assumes of an address, unless it is told otherwise

# Beside torch's product these race: cuBLAS's first suggestions, and its very first one with each of
# these tiles and each of these values of its custom option. What that means is not documented. A
# value that an algorithm cannot have makes it fail.
SUGGESTIONS = 8
TILES = (20, 29)  # CUBLASLT_MATMUL_TILE_128x128 and _128x160: of the result, for a thread block
OPTIONS = range(4)
WARM_UP = 30  # ms before a race: a GPU that has worked for a while is slower
# Rounds of a race: (ms for which each algorithm runs, how many go on besides the usual ones).
ROUNDS = ((4, 6), (10, 3), (20, 1))
# The usual algorithms are torch's and cuBLAS's first suggestion. Another wins only if it takes less
# time than the faster one of them by this share.
LEAD = 0.05
COMPARED = 2**22  # about so many numbers of a result are compared, in rows spread over it
TORCH = "torch"  # in place of an algorithm: torch's product


def linear(x, weight, bias=None):
    """x (..., K) W^T + b, for weight (N, K) and bias (N,) or None -> (..., N), in x's dtype."""
    y = tuned_product(x, weight.t(), bias)
    return functional.linear(x, weight, bias) if y is None else y


def linear_gelu(x, weight, bias):
    """GELU in its tanh form of x (..., K) W^T + b, for weight (N, K) and bias (N,) -> (..., N).

    In bfloat16, on a CUDA device, under no_grad, the product is not rounded before its GELU.
    """
    y = tuned_product(x, weight.t(), bias, gelu=True)
    if y is not None:
        return y
    # cuBLAS's GELU has no derivative, and in float32 it is wrong by 2e-6.
    if torch.is_grad_enabled() or not x.is_cuda or x.dtype != torch.bfloat16:
        return functional.gelu(functional.linear(x, weight, bias), approximate="tanh")
    rows = x.reshape(-1, x.size(-1))
    y = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
    return y.view(*x.shape[:-1], -1)


def matmul(x, matrix):
    """x (..., K) times a matrix (K, N) -> (..., N), in x's dtype."""
    y = tuned_product(x, matrix)
    return x @ matrix if y is None else y


def tuned_product(x, matrix, bias=None, gelu=False):
    """x times a matrix, plus a bias, through GELU, by the winner of a race; None: see why_not."""
    if why_not(x, matrix, bias) is not None:
        return None
    depth, columns = matrix.shape
    rows = x.numel() // depth
    by_columns = not matrix.is_contiguous()
    product = make_product(rows, columns, depth, by_columns, bias is not None, gelu, x.device)
    return product(x, matrix, bias)


def why_not(x, matrix, bias=None):
    """Why x times a matrix, plus a bias, is left to torch, in words; None if it is not."""
    if not TUNED:
        return "TUNED is False"
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace it"
    if fused.transformed():
        return "a transform of torch.func, or forward AD, is at work"
    if matrix.dim() != 2 or x.dim() == 0 or x.size(-1) != matrix.size(0):
        return "the shapes do not fit"  # torch says how
    tensors = [x, matrix] if bias is None else [x, matrix, bias]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "autograd needs its derivative"
    for t in tensors:
        if type(t) not in (torch.Tensor, nn.Parameter):
            return f"{type(t).__name__} is a subclass of Tensor"
        if torch._C._functorch.is_legacy_batchedtensor(t):
            return "a tensor is batched, as by is_grads_batched"
        if not t.is_cuda or t.dtype != torch.bfloat16 or t.device != x.device:
            return "not all tensors are bfloat16 on one CUDA device"
        if not (t.is_contiguous() or t is matrix and t.t().is_contiguous()):
            return "a tensor is not contiguous"
        if t.data_ptr() % ALIGNMENT != 0:
            return f"a tensor is not aligned to {ALIGNMENT} bytes"
    depth, columns = matrix.shape
    if bias is not None and bias.shape != (columns,):
        return "the bias does not fit"
    if depth % 8 != 0 or columns % 8 != 0:
        return "the matrix's sizes are not multiples of 8"
    if 2 * x.numel() * columns < MIN_FLOPS:
        return "the product is small"
    return why_no_library()


@functools.cache
def why_no_library():
    """Why cuBLASLt cannot be called, in words; None if it can."""
    if torch.version.cuda is None:
        return "PyTorch has no CUDA"
    try:
        library()
    except (OSError, AttributeError) as error:
        return str(error)
    return None


# ---- a product -----------------------------------------------------------------------------------


@functools.cache
def make_product(*arguments):
    return TunedProduct(*arguments)


# {key of a product: the algorithm that has won, or TORCH}. In a key the number of rows is rounded
# up to a power of two, so that there are few races where it varies.
winners = {}
lock = threading.Lock()  # held for a race, and while a product's description has a bias's address


class TunedProduct:
    """x (rows, depth) times a matrix (depth, columns), perhaps plus a bias, perhaps through GELU.

    torch stores a matrix row by row, and cuBLAS column by column. So cuBLAS sees each of torch's
    matrices transposed, and is asked for out^T = matrix^T x^T: the matrix is its A, x its B.
    """

    def __init__(self, rows, columns, depth, by_columns, has_bias, gelu, device):
        """by_columns: how the matrix is stored, as the transpose of a weight is; else by rows."""
        self.columns = columns
        self.gelu = gelu
        self.device = device
        rounded_rows = 1 << (rows - 1).bit_length()
        self.key = rounded_rows, columns, depth, by_columns, has_bias, gelu, device
        self.description = create("cublasLtMatmulDescCreate", COMPUTE_FLOAT32, FLOAT32)
        self.describe(DESC_TRANSA, c_int(by_columns))
        self.describe(DESC_EPILOGUE, c_uint32(EPILOGUES[has_bias, gelu]))
        # Rows and columns as cuBLAS sees them.
        self.a = make_layout(depth, columns) if by_columns else make_layout(columns, depth)
        self.b = make_layout(depth, rows)
        self.out = make_layout(columns, rows)

    def describe(self, attribute, value):
        where, size = ctypes.byref(value), ctypes.sizeof(value)
        call("cublasLtMatmulDescSetAttribute", self.description, attribute, where, size)

    def __call__(self, x, matrix, bias=None):
        out = x.new_empty(*x.shape[:-1], self.columns)
        with lock, torch.cuda.device(self.device):
            # While a graph is recorded nothing can be timed.
            if self.key not in winners and not torch.cuda.is_current_stream_capturing():
                try:
                    winners[self.key] = self.race(x, matrix, bias, out)
                except torch.OutOfMemoryError:
                    winners[self.key] = TORCH
            winner = winners.get(self.key, TORCH)
            if not self.run(winner, x, matrix, bias, out):  # it has won with other rows
                self.run(TORCH, x, matrix, bias, out)
        return out

    def race(self, x, matrix, bias, out):
        """The algorithm that wins, perhaps TORCH, for tensors like these. out is overwritten.

        They race on random numbers: zeros, as tangents are when a training begins, take less power,
        and are the same however they are rounded.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        x = torch.empty_like(x).normal_(generator=generator)
        matrix = torch.empty_like(matrix).normal_(0, len(matrix) ** -0.5, generator=generator)
        if bias is not None:
            bias = torch.empty_like(bias).normal_(generator=generator)
        suggestions = self.suggestions(SUGGESTIONS)
        variants = []
        if suggestions:
            for tile, option in itertools.product(TILES, OPTIONS):
                variants.append(variant(suggestions[0], tile, option))

        def run(algorithm):
            return self.run(algorithm, x, matrix, bias, out)

        return winner_of([TORCH, *suggestions, *variants], run, out)

    def suggestions(self, count):
        """Up to `count` algorithms, the fastest first as cuBLAS estimates."""
        found = (Suggestion * count)()
        returned = c_int()
        library().cublasLtMatmulAlgoGetHeuristic(
            handle(self.device),
            self.description,
            self.a,
            self.b,
            self.out,
            self.out,
            preference(),
            count,
            found,
            ctypes.byref(returned),
        )  # where it fails, it has returned none
        return [s.algorithm for s in found[: returned.value] if s.status == 0]

    def run(self, algorithm, x, matrix, bias, out):
        """Write the product into out. Returns whether the algorithm can compute it."""
        if algorithm is TORCH:
            torch_product(x, matrix, bias, self.gelu, out)
            return True
        if bias is not None:
            self.describe(DESC_BIAS_POINTER, c_void_p(bias.data_ptr()))
        status = library().cublasLtMatmul(
            handle(self.device),
            self.description,
            ctypes.byref(c_float(1)),  # out = 1 a b + 0 c, and c is out
            matrix.data_ptr(),
            self.a,
            x.data_ptr(),
            self.b,
            ctypes.byref(c_float(0)),
            out.data_ptr(),
            self.out,
            out.data_ptr(),
            self.out,
            ctypes.byref(algorithm),
            None,
            0,
            torch.cuda.current_stream().cuda_stream,
        )
        return status == 0


def torch_product(x, matrix, bias, gelu, out):
    """What linear, linear_gelu and matmul leave to torch, written into out."""
    x = x.view(-1, x.size(-1))
    out = out.view(-1, out.size(-1))
    if gelu:
        torch._addmm_activation(bias, x, matrix, use_gelu=True, out=out)
    elif bias is not None:
        torch.addmm(bias, x, matrix, out=out)
    else:
        torch.mm(x, matrix, out=out)


# ---- the race ------------------------------------------------------------------------------------


def winner_of(algorithms, run, out):
    """The fastest of the algorithms that give the first one's bits, or the faster usual one.

    algorithms[:2] are the usual ones, which another must beat by LEAD. run(algorithm) writes a
    product into out (..., N), and returns whether it could.
    """
    step = out.numel() // COMPARED | 1  # odd, so that it meets all rows of a tile
    bits = out.view(-1, out.size(-1))[::step].view(torch.int16)  # of what is in out
    run(algorithms[0])
    wanted = bits.clone()
    racing = [0]  # places in the list of algorithms
    for i in range(1, len(algorithms)):
        out.zero_()  # so that one that writes nothing is found
        if run(algorithms[i]) and torch.equal(bits, wanted):
            racing.append(i)
    if racing == [0]:
        return algorithms[0]
    time_of(run, algorithms[0], WARM_UP)
    for ms, survivors in ROUNDS:
        times = dict.fromkeys(racing, 0.0)
        # Forward and backward through the list, so that a GPU that slows down favours none.
        for i in racing + racing[::-1]:
            times[i] += time_of(run, algorithms[i], ms / 2)
        racing.sort(key=times.get)
        usual = [i for i in racing if i < 2]  # the faster one first
        racing = racing[:survivors] + [i for i in usual if i not in racing[:survivors]]
    best = racing[0]
    if times[best] < (1 - LEAD) * times[usual[0]]:
        return algorithms[best]
    return algorithms[usual[0]]


def time_of(run, algorithm, ms):
    """Milliseconds of an algorithm, which is repeated for about `ms` milliseconds.

    What it reads may stay in the L2 cache, which is less often so in a training. For a product near
    MIN_FLOPS this may be the time that the host takes to launch it.
    """
    begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    begin.record()
    run(algorithm)
    middle.record()
    middle.synchronize()
    repeats = max(2, round(ms / begin.elapsed_time(middle)))
    begin.record()
    for _ in range(repeats):
        run(algorithm)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


# ---- cuBLASLt, through ctypes --------------------------------------------------------------------
# torch has no function that takes an algorithm. (nvmath-python has, but everyone would have to
# install it.) The numbers are those of cublasLt.h. The reference is at
# https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api

FLOAT32, BFLOAT16 = 0, 14  # CUDA_R_32F, CUDA_R_16BF
COMPUTE_FLOAT32 = 68  # CUBLAS_COMPUTE_32F
DESC_TRANSA, DESC_EPILOGUE, DESC_BIAS_POINTER = 3, 7, 8  # CUBLASLT_MATMUL_DESC_...
# CUBLASLT_EPILOGUE_..., by (has a bias, GELU): DEFAULT, BIAS, GELU_BIAS
EPILOGUES = {(False, False): 1, (True, False): 4, (True, True): 36}
CONFIG_TILE_ID, CONFIG_CUSTOM_OPTION = 1, 5  # CUBLASLT_ALGO_CONFIG_...


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = [("data", c_uint64 * 8)]


class Suggestion(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algorithm", Algorithm),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


ARGUMENTS = {  # of functions that return a status: 0 if they succeeded
    "cublasLtCreate": [c_void_p],
    "cublasLtMatrixLayoutCreate": [c_void_p, c_int, c_uint64, c_uint64, c_int64],
    "cublasLtMatmulDescCreate": [c_void_p, c_int, c_int],
    "cublasLtMatmulDescSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatmulPreferenceCreate": [c_void_p],
    # handle, description, layouts of a, b, c and d, preference; how many, found, how many found
    "cublasLtMatmulAlgoGetHeuristic": [c_void_p] * 7 + [c_int, c_void_p, c_void_p],
    "cublasLtMatmulAlgoConfigSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    # handle, description, alpha, a and its layout, b and its layout, beta, c and its layout, d and
    # its layout, algorithm, workspace, bytes of it; stream
    "cublasLtMatmul": [c_void_p] * 14 + [c_size_t, c_void_p],
}


@functools.cache
def library():
    """The cuBLASLt that PyTorch has loaded. Raises OSError or AttributeError if it has none."""
    major = torch.version.cuda.split(".")[0]
    found = ctypes.CDLL(f"libcublasLt.so.{major}")
    for name, types in ARGUMENTS.items():
        getattr(found, name).argtypes = types
    return found


def call(name, *arguments):
    """Call a function. Raises RuntimeError if it fails."""
    status = getattr(library(), name)(*arguments)
    if status != 0:
        raise RuntimeError(f"{name} failed with status {status}")


def create(name, *arguments):
    """The object that a function creates. It lives as long as the process.

    Raises RuntimeError if it fails, as where there is no memory left.
    """
    created = c_void_p()
    call(name, ctypes.byref(created), *arguments)
    return created


@functools.cache
def handle(device):
    with torch.cuda.device(device):
        return create("cublasLtCreate")


@functools.cache
def preference():
    """Which algorithms are suggested: as is the default, those that need no workspace. (Products on
    two streams could not share one.)"""
    return create("cublasLtMatmulPreferenceCreate")


def make_layout(rows, columns):
    """A matrix in bfloat16 that is stored column by column."""
    return create("cublasLtMatrixLayoutCreate", BFLOAT16, rows, columns, rows)


def variant(algorithm, tile, option):
    """An algorithm with another tile and option. Where cuBLAS has none, it fails to run."""
    changed = Algorithm.from_buffer_copy(algorithm)
    for attribute, number in ((CONFIG_TILE_ID, tile), (CONFIG_CUSTOM_OPTION, option)):
        value = c_uint32(number)
        # Where cuBLAS refuses the value, the attribute stays as it was.
        library().cublasLtMatmulAlgoConfigSetAttribute(
            ctypes.byref(changed), attribute, ctypes.byref(value), ctypes.sizeof(value)
        )
    return changed
