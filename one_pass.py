"""
AdamW and the averages of the weights, in one pass over their memory, for a CUDA device.

    step(optimizer, averages)  # for a graph: capturable=True, and a tensor as learning rate
    step(optimizer, averages, copy_of)  # writes bfloat16 copies, too

PyTorch's AdamW passes over weights, gradients and moments, and each average then passes over the
weights again. Here one Triton kernel a tensor reads and writes each of them once: 44 bytes a
weight, with two averages, and 2 more for each copy. It allocates next to nothing and never waits
for the host, so it can be recorded as a CUDA graph. Results are those of PyTorch within the
rounding of float32.

AdamW (Loshchilov and Hutter, arXiv 1711.05101), with gradient g, moments m and v, and step n:

    m = m + (1 - beta1) (g - m)        v = v + (1 - beta2) (g^2 - v)
    p = (1 - lr weight_decay) p - lr (m / (1 - beta1^n)) / (sqrt(v / (1 - beta2^n)) + eps)

Then each average a, of decay d: a = a + (1 - d) (p - a).
"""

import contextlib

import torch
from torch.distributed.tensor import DTensor

try:
    import triton
    import triton.language as tl
except ImportError:  # without Triton nobody calls step
    triton = None

BLOCK = 1024  # weights per Triton program


def state_of(optimizer, p):
    """A weight's count of steps and its moments, which AdamW makes in its first step."""
    state = optimizer.state[p]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        state["exp_avg"] = torch.zeros_like(p)
        state["exp_avg_sq"] = torch.zeros_like(p)
    return state


def local(t):
    """This rank's part of a DTensor; any other tensor as it is."""
    return t.to_local() if isinstance(t, DTensor) else t


@torch.no_grad()
def step(optimizer, averages, copy_of=None):
    """optimizer.step(), then the averages, then the copies.

    optimizer: torch.optim.AdamW of one group of float32 weights; its learning rate may be a tensor.
    averages: two of (tensors, decay), each with a tensor for each weight, in the same order.
    copy_of: {id(tensor): its copy in bfloat16}, of some of the weights and averages.
    A weight without a gradient stays as it is, and so do its averages. Of weights that are divided
    over the ranks (FSDP2), each rank updates its part. Hooks of optimizer.step do not run. Raises
    ValueError for other optimizers, options and numbers of averages; for tensors that are not
    contiguous, float32, on one device and as large as their weight; and for copies that are not
    like their tensor in bfloat16.
    """
    check_options(optimizer)
    (group,) = optimizer.param_groups
    if len(averages) != 2:
        raise ValueError(f"one_pass.step wants two averages, not {len(averages)}")
    (first, first_decay), (second, second_decay) = averages
    beta1, beta2 = group["betas"]
    copy_of = copy_of or {}
    if not len(group["params"]) == len(first) == len(second):
        raise ValueError(
            f"the optimizer has {len(group['params'])} weights, the averages {len(first)} and "
            f"{len(second)}"
        )
    rows = []  # what the kernel is given of each weight
    counts = []
    for p, a, b in zip(group["params"], first, second, strict=True):
        if p.grad is not None:
            state = state_of(optimizer, p)
            tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"], a, b)
            copies = [copy_of.get(id(t)) for t in (p, a, b)]
            rows.append((*map(local, tensors), *copies))
            counts.append(state["step"])
    check(rows)
    if not rows:
        return

    torch._foreach_add_(counts, 1)
    n = torch.stack(counts).double()
    lr = torch.as_tensor(group["lr"], device=n.device)
    shrink = 1 - lr * group["weight_decay"]
    step_size = lr / (1 - beta1**n)
    scale = (1 - beta2**n).rsqrt()
    # Three numbers a weight, and a fourth that makes 16 bytes. For rows that do not begin at
    # multiples of that, Triton would compile the kernel once more.
    numbers = torch.stack([shrink.expand_as(n), step_size, scale, scale], 1).float()
    rates = (1 - beta1, 1 - beta2, group["eps"], 1 - first_decay, 1 - second_decay)
    # Triton launches on the current device.
    with torch.cuda.device(n.device) if n.is_cuda else contextlib.nullcontext():
        for row, own_numbers in zip(rows, numbers, strict=True):
            size = row[0].numel()
            if size == 0:  # this rank's part of a weight of few rows
                continue
            adamw_kernel[(triton.cdiv(size, BLOCK),)](*row, own_numbers, size, *rates, BLOCK)


def check_options(optimizer):
    if not isinstance(optimizer, torch.optim.AdamW):
        raise ValueError(f"one_pass.step wants AdamW, not {type(optimizer).__name__}")
    if len(optimizer.param_groups) != 1:
        groups = len(optimizer.param_groups)
        raise ValueError(f"one_pass.step wants one group of weights, not {groups}")
    for option in ("amsgrad", "maximize"):
        if optimizer.param_groups[0][option]:
            raise ValueError(f"one_pass.step wants AdamW without {option}")


def check(rows):
    for row in rows:
        p = row[0]
        for t in row[:6]:
            if not t.is_contiguous() or t.dtype != torch.float32:
                raise ValueError(
                    "weights, gradients, moments and averages must be contiguous and float32, "
                    f"not {t.dtype} with strides {t.stride()}"
                )
            if t.shape != p.shape or t.device != p.device:
                raise ValueError(
                    f"a weight {tuple(p.shape)} on {p.device} has a gradient, moment or average "
                    f"{tuple(t.shape)} on {t.device}"
                )
        wanted = (p.shape, torch.bfloat16, p.device)
        for copy in row[6:]:
            if copy is None:
                continue
            if (copy.shape, copy.dtype, copy.device) != wanted or not copy.is_contiguous():
                raise ValueError(
                    f"a copy of a weight {tuple(p.shape)} must be bfloat16, contiguous and like "
                    f"it, not {copy.dtype} {tuple(copy.shape)} on {copy.device}"
                )
        if p.device != rows[0][0].device:
            raise ValueError(f"weights on {rows[0][0].device} and on {p.device}")


if triton:

    @triton.jit(do_not_specialize=["rate_m", "rate_v", "eps", "rate_a", "rate_b"])
    def adamw_kernel(P, G, M, V, A, B, P_COPY, A_COPY, B_COPY, NUMBERS, size,
                     rate_m, rate_v, eps, rate_a, rate_b, BLOCK: tl.constexpr):  # fmt: skip
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        shrink = tl.load(NUMBERS)  # 1 - lr weight_decay
        step_size = tl.load(NUMBERS + 1)  # lr / (1 - beta1^n)
        scale = tl.load(NUMBERS + 2)  # 1 / sqrt(1 - beta2^n)

        p = tl.load(P + i, inside)
        g = tl.load(G + i, inside)
        m = tl.load(M + i, inside)
        v = tl.load(V + i, inside)
        a = tl.load(A + i, inside)
        b = tl.load(B + i, inside)

        m += rate_m * (g - m)
        v += rate_v * (g * g - v)
        p = shrink * p - step_size * m / (tl.sqrt(v) * scale + eps)
        a += rate_a * (p - a)
        b += rate_b * (p - b)

        tl.store(P + i, p, inside)
        tl.store(M + i, m, inside)
        tl.store(V + i, v, inside)
        tl.store(A + i, a, inside)
        tl.store(B + i, b, inside)
        if P_COPY is not None:
            tl.store(P_COPY + i, p.to(tl.bfloat16), inside)
        if A_COPY is not None:
            tl.store(A_COPY + i, a.to(tl.bfloat16), inside)
        if B_COPY is not None:
            tl.store(B_COPY + i, b.to(tl.bfloat16), inside)
