"""
Muon, an optimizer for matrices: a step along the momentum, made nearly orthogonal.
Jordan et al., https://kellerjordan.github.io/posts/muon/; the scale is that of Liu et al.,
arXiv 2502.16982, with which a learning rate means what it does for AdamW.

    matrices = matrices_of_blocks(dict(model.named_parameters()))
    optimizer = Muon(matrices.values(), lr=1e-3)

torch.optim.Muon makes the same step, one matrix after the other, and a CUDA graph would freeze its
learning rate. Here all matrices of one shape go through together, and the learning rate may be a
tensor.
"""

import math

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial, from Jordan's page
ITERATIONS = 5


def matrices_of_blocks(parameters):
    """Those of {name: parameter} that Muon trains: the blocks' weights of two dimensions.

    In DiT these are, for a width D: attn.qkv (3D x D, as one matrix), attn.proj, mlp.fc1, mlp.fc2
    and adaLN_modulation (6D x D, which is zero at first).
    """
    matrices = {}
    for name, p in parameters.items():
        if name.startswith("blocks.") and p.ndim == 2:
            matrices[name] = p
    return matrices


class Muon(torch.optim.Optimizer):
    """For G the gradient of a matrix W (rows, columns), and B its momentum, zero at first:

    B <- momentum B + (1 - momentum) G
    W <- W - lr weight_decay W - lr 0.2 sqrt(max(rows, columns)) O
    where O is orthogonalize(momentum B + (1 - momentum) G): Nesterov's momentum
    """

    def __init__(self, weights, lr, momentum=0.95, weight_decay=0.0):
        """weights: matrices. lr: a number, or a tensor of one.

        momentum: its default is Jordan's, and train.py has no constant for it.
        """
        super().__init__(weights, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            of_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    of_shape.setdefault(p.shape, []).append(p)
            for matrices in of_shape.values():
                self.step_together(matrices, group)

    def step_together(self, matrices, group):
        """One step of n matrices of one shape."""
        lr = group["lr"]
        momentum = group["momentum"]
        buffers = []
        for p in matrices:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state["momentum_buffer"])
        grads = [p.grad for p in matrices]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        ahead = torch.stack(torch._foreach_lerp(grads, buffers, momentum))  # (n, rows, columns)
        scale = 0.2 * math.sqrt(max(ahead.shape[1:]))
        steps = orthogonalize(ahead).to(ahead.dtype) * (lr * scale)
        if group["weight_decay"]:
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(matrices, steps.unbind())


def orthogonalize(matrices, dtype=torch.bfloat16):
    """(n, rows, columns) -> the same in dtype: each singular value is brought near 1.

    Newton-Schulz: x is divided by its Frobenius norm, and then ITERATIONS times
        x <- a x + b (x x^T) x + c (x x^T)^2 x
    which leaves the singular vectors as they are. Values from 0.01 on end between 0.68 and 1.14,
    smaller ones below 1.21.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.to(dtype)
    if is_tall:
        x = x.mT  # the product with its transpose is then the smaller one
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x
