"""
Matrix products in bfloat16 by cuBLAS, each with the fastest of its kernels.

    y = linear(x, weight, bias)             # x W^T + b
    y = linear(x, weight, bias, gelu=True)  # GELU of that
    gx = matmul(gy, weight)                 # gy W

cuBLAS has many kernels for one product. PyTorch runs the one that cuBLAS suggests first, which is
not always the fastest: on an H200 at its limit of power, others make the products of XL/2 up to 30%
faster. Here the first product of a size is a race between suggested kernels and variants of them.
Later products of that size are made by the winner. Only kernels that give the same bits as the
first suggestion may win, so results do not depend on who does.

Small products, other dtypes and other devices are left to torch. Nothing here is differentiable:
products.py calls it, forward and backward.
"""

import ctypes
import functools
from ctypes import c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p

import torch
from torch import nn
from torch.nn import functional

TUNED = True  # False: all products are torch's
MIN_FLOPS = 5e9  # of a product that is worth a race

# Who races: the first suggestions, and the very first one with these tiles of the result and these
# options. cuBLAS does not say what its options are (the order of the tiles is among them).
SUGGESTIONS = 8
TILES = (20, 29)  # CUBLASLT_MATMUL_TILE_128x128 and _128x160
OPTIONS = range(4)
# Rounds of a race: for how many ms each kernel runs, and how many kernels go on.
ROUNDS = ((4, 6), (10, 3), (20, 1))
ROW_STEP = 61  # the results of two kernels are compared in every so many rows


def linear(x, weight, bias=None, gelu=False):
    """x (..., K) W^T + b, for weight (N, K) and bias (N,) or None -> (..., N), in x's dtype.

    gelu: GELU in its tanh form of that, with a bias. On a CUDA device, in bfloat16, the product is
    not rounded before its GELU.
    """
    columns, depth = weight.shape
    product = find_product(x, weight, bias, columns, depth, True, gelu)
    if product is not None:
        return product(x, weight, bias)
    if not gelu:
        return functional.linear(x, weight, bias)
    if not x.is_cuda:
        return functional.gelu(functional.linear(x, weight, bias), approximate="tanh")
    out = torch._addmm_activation(bias, x.reshape(-1, depth), weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], columns)


def matmul(x, weight):
    """x (..., N) W, for weight (N, K) -> (..., K), in x's dtype."""
    depth, columns = weight.shape
    product = find_product(x, weight, None, columns, depth, False, False)
    return x @ weight if product is None else product(x, weight, None)


def find_product(x, weight, bias, columns, depth, transposed, gelu):
    """A Product for tensors like these; None where it is left to torch."""
    if why_not(x, weight, bias) is not None:
        return None
    rows = x.numel() // depth
    return make_product(rows, columns, depth, transposed, bias is not None, gelu, x.device)


def why_not(x, weight, bias=None):
    """Why a product is left to torch, in words; None if it is not."""
    if not TUNED:
        return "TUNED is False"
    if torch.compiler.is_compiling():
        return "torch.compile does not see into it"
    tensors = [x, weight] if bias is None else [x, weight, bias]
    for t in tensors:
        if type(t) not in (torch.Tensor, nn.Parameter):
            return f"a {type(t).__name__} is no plain tensor"
        if not t.is_cuda or t.dtype != torch.bfloat16 or t.device != x.device:
            return "it takes bfloat16 on one CUDA device"
        if not t.is_contiguous() or t.data_ptr() % 16 != 0:
            return "a tensor is not contiguous, or does not begin at 16 bytes"
    if weight.size(0) % 8 != 0 or weight.size(1) % 8 != 0:
        return "sizes are no multiples of 8"
    if 2 * x.numel() * weight.numel() < MIN_FLOPS * x.size(-1):
        return "it is small"
    return why_no_library()


@functools.cache
def why_no_library():
    """Why cuBLAS cannot be called, in words; None if it can."""
    if torch.version.cuda is None:
        return "PyTorch has no CUDA"
    try:
        library()
    except (OSError, AttributeError) as error:
        return str(error)
    return None


# ---- the race ------------------------------------------------------------------------------------


def fastest(kernels, run, out):
    """The kernel that takes the least time, of those that give the first one's bits.

    run(kernel) writes its product into out (..., N), and returns whether it could.
    """
    sample = out.view(-1, out.size(-1))[::ROW_STEP].view(torch.int16)
    run(kernels[0])
    first = sample.clone()
    alike = []
    for kernel in kernels:
        out.zero_()
        if run(kernel) and torch.equal(sample, first):
            alike.append(kernel)
    if not alike:  # not even the first one gives the same twice
        return kernels[0]
    for ms, survivors in ROUNDS:
        times = [time_of(run, kernel, ms) for kernel in alike]
        order = sorted(range(len(alike)), key=times.__getitem__)
        alike = [alike[i] for i in order[:survivors]]
    return alike[0]


def time_of(run, kernel, ms):
    """Milliseconds of a kernel, which is repeated for about `ms` milliseconds."""
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    start.record()
    run(kernel)
    middle.record()
    middle.synchronize()
    repeats = max(3, round(ms / start.elapsed_time(middle)))
    middle.record()
    for _ in range(repeats):
        run(kernel)
    end.record()
    end.synchronize()
    return middle.elapsed_time(end) / repeats


# ---- the library ---------------------------------------------------------------------------------
# cuBLASLt, called through ctypes, since torch has no function that takes a kernel. Its reference is
# https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api, and the numbers are of its header,
# cublasLt.h. cuBLAS calls a kernel with its settings an algorithm.

FLOAT32, BFLOAT16 = 0, 14  # CUDA_R_32F, CUDA_R_16BF
COMPUTE_FLOAT32 = 68  # CUBLAS_COMPUTE_32F
TRANSPOSE_A, EPILOGUE, BIAS_POINTER = 3, 7, 8  # CUBLASLT_MATMUL_DESC_...
NOTHING, ADD_BIAS, GELU_OF_SUM = 1, 4, 36  # CUBLASLT_EPILOGUE_DEFAULT, _BIAS, _GELU_BIAS
TILE, OPTION = 1, 5  # CUBLASLT_ALGO_CONFIG_TILE_ID, _CUSTOM_OPTION


class Kernel(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = [("data", c_uint64 * 8)]


class Suggestion(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("kernel", Kernel),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


SIGNATURES = {  # each returns a status, which is 0 if it succeeded
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
    for name, types in SIGNATURES.items():
        getattr(found, name).argtypes = types
    return found


def check(status):
    """Raise RuntimeError unless a function of cuBLAS has succeeded."""
    if status != 0:
        raise RuntimeError(f"cuBLAS failed with status {status}")


def make(function, *arguments):
    """The object that one of cuBLAS's functions makes."""
    made = c_void_p()
    check(function(ctypes.byref(made), *arguments))
    return made


def set_attribute(function, of, attribute, value):
    check(function(of, attribute, ctypes.byref(value), ctypes.sizeof(value)))


@functools.cache
def handle(device):
    with torch.cuda.device(device):
        return make(library().cublasLtCreate)


@functools.cache
def preference():
    """Which kernels are suggested: by default those that need no memory of their own."""
    return make(library().cublasLtMatmulPreferenceCreate)


def make_layout(rows, columns):
    """A matrix in bfloat16 that is stored by columns."""
    return make(library().cublasLtMatrixLayoutCreate, BFLOAT16, rows, columns, rows)


def variant(kernel, tile, option):
    """A kernel with another tile and option. Where there is none, it fails to run."""
    changed = Kernel.from_buffer_copy(kernel)
    configure = library().cublasLtMatmulAlgoConfigSetAttribute
    for attribute, number in ((TILE, tile), (OPTION, option)):
        set_attribute(configure, ctypes.byref(changed), attribute, c_uint32(number))
    return changed


# Winners of races, by the size of a product, with its rows rounded up to a power of two. So there
# are few races where the number of rows varies.
winners = {}


@functools.cache
def make_product(*arguments):
    """A Product; None where cuBLAS has no kernel for it."""
    product = Product(*arguments)
    return product if product.suggestions(1) else None


class Product:
    """x (rows, depth) times a weight, plus a bias, through GELU: (rows, columns).

    A matrix that is stored by rows, as torch's are, is to cuBLAS its transpose, stored by columns.
    So what it computes is out^T = W x^T.
    """

    def __init__(self, rows, columns, depth, transposed, has_bias, gelu, device):
        """transposed: the weight is (columns, depth); else it is (depth, columns)."""
        self.device = device
        self.columns = columns
        about_rows = 1 << (rows - 1).bit_length()
        self.size = about_rows, columns, depth, transposed, has_bias, gelu, device
        self.kernel = None
        lib = library()
        self.description = make(lib.cublasLtMatmulDescCreate, COMPUTE_FLOAT32, FLOAT32)
        epilogue = NOTHING
        if has_bias:
            epilogue = GELU_OF_SUM if gelu else ADD_BIAS
        self.describe(TRANSPOSE_A, c_int(transposed))
        self.describe(EPILOGUE, c_uint32(epilogue))
        self.weight_layout = make_layout(*((depth, columns) if transposed else (columns, depth)))
        self.x_layout = make_layout(depth, rows)
        self.out_layout = make_layout(columns, rows)

    def describe(self, attribute, value):
        set_attribute(library().cublasLtMatmulDescSetAttribute, self.description, attribute, value)

    def __call__(self, x, weight, bias):
        out = x.new_empty(*x.shape[:-1], self.columns)
        with torch.cuda.device(self.device):
            if bias is not None:
                self.describe(BIAS_POINTER, c_void_p(bias.data_ptr()))
            kernel = self.find_kernel(x, weight, out)
            if not self.run(x, weight, out, kernel):
                raise RuntimeError(f"cuBLAS could not compute a product of size {self.size}")
        return out

    def find_kernel(self, x, weight, out):
        """The kernel for this product. out is overwritten."""
        if self.kernel is None:
            first = self.suggestions(1)[0]
            if torch.cuda.is_current_stream_capturing():  # nothing can be tried now
                return first
            if self.size not in winners:
                winners[self.size] = self.race(x, weight, out)
            winner = winners[self.size]  # perhaps with other rows, and it may not take these
            self.kernel = winner if self.run(x, weight, out, winner) else first
        return self.kernel

    def run(self, x, weight, out, kernel):
        """Launch a kernel, which writes into out. Returns whether it takes this product."""
        status = library().cublasLtMatmul(
            handle(self.device),
            self.description,
            ctypes.byref(c_float(1)),
            weight.data_ptr(),
            self.weight_layout,
            x.data_ptr(),
            self.x_layout,
            ctypes.byref(c_float(0)),
            out.data_ptr(),
            self.out_layout,
            out.data_ptr(),
            self.out_layout,
            ctypes.byref(kernel),
            None,
            0,
            torch.cuda.current_stream().cuda_stream,
        )
        return status == 0

    def suggestions(self, count):
        """Up to `count` kernels, the fastest first as cuBLAS estimates."""
        found = (Suggestion * count)()
        returned = c_int()
        layouts = self.weight_layout, self.x_layout, self.out_layout, self.out_layout
        library().cublasLtMatmulAlgoGetHeuristic(
            handle(self.device),
            self.description,
            *layouts,
            preference(),
            count,
            found,
            ctypes.byref(returned),
        )
        return [s.kernel for s in found[: returned.value] if s.status == 0]

    def race(self, x, weight, out):
        """The fastest kernel for tensors like these. out is overwritten.

        It races on random numbers: zeros, as tangents are when a training begins, take less power,
        and are the same however they are rounded.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        like = dict(generator=generator, device=self.device, dtype=torch.bfloat16)
        x = torch.randn(x.shape, **like)
        weight = torch.randn(weight.shape, **like)
        kernels = self.suggestions(SUGGESTIONS)
        for tile in TILES:
            for option in OPTIONS:
                kernels.append(variant(kernels[0], tile, option))
        return fastest(kernels, functools.partial(self.run, x, weight, out), out)
