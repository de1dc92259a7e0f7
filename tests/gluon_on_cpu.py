"""Runs Gluon kernels on the CPU, which Triton itself does not: an interpreter for tests.

    module = load_module("attention_hopper.py")  # with this interpreter in place of Gluon
    module.rows(...)  # its launches run here, on CPU tensors

A program's partitions are Python threads. Tiles are tensors, shared memory is NaN until it is
written, and barriers count arrivals and bytes as those of the GPU do, so that a kernel that waits
for the wrong phase stops with an error. Layouts mean nothing here, and whatever is asynchronous on
the GPU is done at once: a missing wait is not found.
"""

import importlib.util
import itertools
import math
import sys
import threading
import types
from unittest import mock

import torch

PATIENCE = 20  # seconds that a barrier is waited for

here = threading.local()  # the program that a thread belongs to: `place` and `grid`


class Kernel:
    """What gluon.jit makes of a function: called by kernels, or launched as kernel[grid](...)."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments, **how):
        return self.function(*arguments, **how)

    def __getitem__(self, grid):
        grid = (*grid, 1, 1)[:3]

        def launch(*arguments, num_warps, maxnreg, enable_fp_fusion, **how):
            arguments = [Pointer.of(x) if torch.is_tensor(x) else x for x in arguments]
            for z, y, x in itertools.product(*(range(n) for n in reversed(grid))):
                here.place, here.grid = (x, y, z), grid
                self.function(*arguments, **how)

        return launch


class Pointer:
    """A pointer into a tensor's storage, or a tensor of them."""

    def __init__(self, elements, offset=0):
        self.elements = elements
        self.offset = offset
        self.dtype = types.SimpleNamespace(element_ty=elements.dtype)

    @classmethod
    def of(cls, x):
        count = x.untyped_storage().size() // x.element_size() - x.storage_offset()
        return cls(torch.as_strided(x, (count,), (1,)))

    def __add__(self, offset):
        return Pointer(self.elements, self.offset + offset)


def load(pointer, mask=None, other=0.0):
    at = pointer.offset
    if mask is None:
        return pointer.elements[at]
    return torch.where(mask, pointer.elements[torch.where(mask, at, 0)], other)


def store(pointer, x, mask=None):
    if mask is None:
        mask = torch.tensor(True)
    mask = mask.expand(pointer.offset.shape)
    pointer.elements[pointer.offset[mask]] = x[mask]


class Descriptor:
    """What TMA copies from."""

    def __init__(self, x, block, layout):
        self.x = x
        self.dtype = x.dtype
        self.layout = layout
        nbytes = math.prod(block) * x.element_size()
        self.block_type = types.SimpleNamespace(shape=block, nbytes=nbytes)

    from_tensor = classmethod(lambda cls, x, block, layout: cls(x, block, layout))


class Memory:
    """A buffer in shared memory, or a part of one."""

    def __init__(self, data):
        self.data = data
        self.dtype = data.dtype
        self.shape = list(data.shape)

    def index(self, i):
        return Memory(self.data[int(i)])

    def reshape(self, shape):
        return Memory(self.data.view(shape))

    def permute(self, order):
        return Memory(self.data.permute(order))

    def slice(self, start, length, dim=0):
        return Memory(self.data.narrow(dim, start, length))

    def load(self, layout):
        return self.data.clone()

    def store(self, x):
        assert x.dtype == self.dtype
        self.data.copy_(x)


class Barrier:
    """An mbarrier."""

    def __init__(self):
        self.changed = threading.Condition()

    def start(self, count):
        self.count = count
        self.arrivals = 0
        self.bytes = 0
        self.phase = 0

    def add(self, arrivals, nbytes):
        with self.changed:
            self.arrivals += arrivals
            self.bytes += nbytes
            assert self.arrivals <= self.count, "more arrivals than the barrier counts"
            if self.arrivals == self.count and self.bytes == 0:
                self.arrivals = 0
                self.phase ^= 1
                self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase != parity, PATIENCE)
        assert done, "a barrier that is waited for in vain"


class Barriers:
    """Barriers in shared memory: one, or an array of them."""

    def __init__(self, count):
        self.items = [Barrier() for _ in range(count)]

    def index(self, i):
        return self.items[int(i)]


def one(barrier):
    return barrier.items[0] if isinstance(barrier, Barriers) else barrier


def allocate_shared_memory(dtype, shape, layout):
    if dtype == torch.int64:
        return Barriers(shape[0])
    return Memory(torch.full(shape, math.nan, dtype=dtype))


def copy(descriptor, at, barrier, to):
    """What TMA does: rows and columns outside of the tensor become zeros."""
    block = descriptor.block_type.shape
    assert to.shape == block
    inside = [slice(int(i), int(i) + n) for i, n in zip(at, block, strict=True)]
    part = descriptor.x[tuple(inside)]
    to.data.zero_()
    to.data[tuple(slice(0, n) for n in part.shape)] = part
    one(barrier).add(0, -descriptor.block_type.nbytes)


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    a = a.data if isinstance(a, Memory) else a
    product = a.float() @ b.data.float()
    assert product.shape == acc.shape
    return acc + product if use_acc else product


def warpgroup_mma_wait(outstanding, values):
    return values[0] if len(values) == 1 else tuple(values)


def warp_specialize(partitions, warps, registers):
    failures = []
    place, grid = here.place, here.grid

    def run(function, arguments):
        here.place, here.grid = place, grid
        try:
            function(*arguments)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def nothing(*_, **__):
    """A layout, a fence."""


def language():
    """triton.experimental.gluon.language."""
    gl = types.ModuleType("gluon.language")
    gl.constexpr = lambda x: x
    gl.static_range = range
    for name in ("float32", "float16", "bfloat16", "int64"):
        setattr(gl, name, getattr(torch, name))
    for name in (
        "BlockedLayout",
        "DotOperandLayout",
        "NVMMADistributedLayout",
        "SharedLinearLayout",
        "SliceLayout",
        "thread_barrier",
    ):
        setattr(gl, name, nothing)
    gl.NVMMASharedLayout = types.SimpleNamespace(get_default_for=nothing)
    gl.program_id = lambda axis: torch.tensor(here.place[axis])
    gl.num_programs = lambda axis: here.grid[axis]
    gl.full = lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype)
    gl.arange = lambda start, end, layout: torch.arange(start, end)
    gl.cast = lambda x, dtype: torch.as_tensor(x).to(dtype)
    gl.exp2 = torch.exp2
    gl.minimum = min
    gl.maximum = max
    gl.where = torch.where
    gl.sum = torch.sum
    gl.convert_layout = lambda x, layout: x
    gl.load = load
    gl.store = store
    gl.allocate_shared_memory = allocate_shared_memory
    gl.warp_specialize = warp_specialize
    return gl


def load_module(path):
    """The file at `path` as a module that has this interpreter in place of Gluon."""
    gluon = types.ModuleType("gluon")
    gluon.jit = Kernel
    gluon.constexpr_function = lambda function: function
    gluon.language = language()
    hopper = types.ModuleType("gluon.language.nvidia.hopper")
    hopper.fence_async_shared = nothing
    hopper.warpgroup_mma = warpgroup_mma
    hopper.warpgroup_mma_wait = warpgroup_mma_wait
    hopper.tma = types.SimpleNamespace(async_copy_global_to_shared=copy)
    hopper.mbarrier = types.SimpleNamespace(
        MBarrierLayout=nothing,
        init=lambda barrier, count: one(barrier).start(count),
        expect=lambda barrier, nbytes: one(barrier).add(1, nbytes),
        arrive=lambda barrier: one(barrier).add(1, 0),
        wait=lambda barrier, parity: one(barrier).wait(int(parity)),
    )
    host = types.ModuleType("gluon.nvidia.hopper")
    host.TensorDescriptor = Descriptor
    experimental = types.ModuleType("triton.experimental")
    experimental.gluon = gluon
    prefix = "triton.experimental"
    replaced = {
        prefix: experimental,
        f"{prefix}.gluon": gluon,
        f"{prefix}.gluon.language": gluon.language,
        f"{prefix}.gluon.language.nvidia.hopper": hopper,
        f"{prefix}.gluon.nvidia.hopper": host,
    }
    importlib.import_module("triton")  # a library cannot be loaded again, after it was left out
    spec = importlib.util.spec_from_file_location("gluon_on_cpu_module", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, replaced):
        spec.loader.exec_module(module)
    return module
