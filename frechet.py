"""
Mean, covariance and the Frechet distance, which FID is made of. statistics_files.py keeps the first
two.

    moments = Moments(2048)
    moments.add(features)                                  # (B, 2048), as often as need be
    mu, sigma = moments.mean_and_covariance()
    distance = frechet_distance(mu, sigma, mu_ref, sigma_ref)
"""

import torch

from device import from_all_ranks
from files import FidError

FEATURES = 2048  # dimensions of an image's features


# ---- mean and covariance -------------------------------------------------------------------------


class Moments:
    """Mean and covariance of features (B, dim) that come in batches, in float64.

    Batches are merged about their own means (Chan et al.), on the features' device and without
    waiting for it. merge(**other.state()) adds another's, all_reduce() those of all ranks.
    """

    def __init__(self, dim):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    def add(self, features):
        dim = len(self.mean)
        if features.ndim != 2 or features.shape[1] != dim:
            raise FidError(f"Moments takes features (B, {dim}), not {tuple(features.shape)}")
        x = features.detach()
        if x.device.type == "mps":  # Apple's GPUs have no float64
            x = x.cpu()
        x = x.double()
        mean = x.mean(0)
        self.merge(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, n, mean, scatter):
        """Add n features with this mean (dim,) and scatter (dim, dim), tensors or arrays."""
        n = int(n)
        if n == 0:
            return
        mean = torch.as_tensor(mean)
        scatter = torch.as_tensor(scatter)
        own_mean = self.mean.to(mean.device)
        own_scatter = self.scatter.to(mean.device)
        total = self.n + n
        delta = mean - own_mean
        self.scatter = own_scatter + scatter + torch.outer(delta, delta) * (self.n * n / total)
        self.mean = own_mean + delta * (n / total)
        self.n = total

    def all_reduce(self):
        """Every rank calls this, and then has the moments of all."""
        total = Moments(len(self.mean))
        for state in from_all_ranks(self.state()):
            total.merge(**state)
        self.n = total.n
        self.mean = total.mean
        self.scatter = total.scatter

    def state(self):
        """What `merge` takes, as a number and two arrays on the CPU."""
        return {
            "n": self.n,
            "mean": self.mean.cpu().numpy(),
            "scatter": self.scatter.cpu().numpy(),
        }

    def remark_on_few(self):
        """What to print behind an FID of too few images, or "".

        The covariance of n images has rank n - 1, which must reach the number of dimensions.
        """
        if len(self.mean) == FEATURES and self.n <= FEATURES:
            return f" (too few images: {self.n} <= {FEATURES})"
        return ""

    def mean_and_covariance(self):
        """(dim,) and, unbiased, (dim, dim): float64 arrays. Raises FidError for fewer than 2, and
        for features that are not finite."""
        if self.n < 2:
            raise FidError(f"a covariance needs at least 2 images, not {self.n}")
        if not self.scatter.isfinite().all():
            raise FidError("some features are not finite")
        return self.mean.cpu().numpy(), (self.scatter / (self.n - 1)).cpu().numpy()


# ---- their distance ------------------------------------------------------------------------------


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float.

    mu: (D,), sigma: (D, D), symmetric positive semi-definite, singular ones included.
    The trace of the root is the sum of the singular values of A^T B, with A A^T = sigma1 and
    B B^T = sigma2. (Their squares are the eigenvalues of A^T sigma2 A. Small ones of these would be
    lost in rounding, and the root of what is lost need not be small.) In float64.
    Raises FidError for other shapes, values that are not finite, or a distance below 0, which
    covariances that are not semi-definite can have.
    """
    given = (mu1, sigma1, mu2, sigma2)
    given = [torch.as_tensor(a, dtype=torch.float64, device="cpu") for a in given]
    mu1, sigma1, mu2, sigma2 = given
    D = mu1.numel()
    shapes = [tuple(a.shape) for a in given]
    finite = all(a.isfinite().all() for a in given)
    if shapes != [(D,), (D, D), (D,), (D, D)] or not finite:
        raise FidError(
            f"frechet_distance: shapes {shapes} do not belong together, "
            "or a mean or covariance is not finite"
        )
    trace_of_root = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    traces = sigma1.trace() + sigma2.trace()
    distance = ((mu1 - mu2).square().sum() + traces - 2 * trace_of_root).item()
    if distance < -1e-6 * traces:  # more than rounding
        raise FidError("frechet_distance: a covariance is not positive semi-definite")
    return max(distance, 0.0)


def factor(sigma):
    """A (D, D) with A A^T = sigma, which is symmetric and positive semi-definite."""
    A, is_singular = torch.linalg.cholesky_ex(sigma)
    if is_singular:  # the eigenvectors' way, which takes longer
        values, vectors = torch.linalg.eigh(sigma)
        A = vectors * roots(values)
    return A


def roots(eigenvalues):
    """Square roots. Eigenvalues below the rounding error count as 0: the root of 1e-16 would be
    1e-8, and 2,048 of these add up."""
    D = len(eigenvalues)
    rounding = D * torch.finfo(torch.float64).eps * eigenvalues.abs().max()
    return eigenvalues.where(eigenvalues > rounding, 0).sqrt()
