"""
Mean, covariance and the Frechet distance, which FID is made of; the files that keep the first two.

    moments = Moments(2048)
    moments.add(features)                                  # (B, 2048), as often as need be
    mu, sigma = moments.mean_and_covariance()
    mu_ref, sigma_ref, notes = read_statistics("stats.npz")
    distance = frechet_distance(mu, sigma, mu_ref, sigma_ref)
"""

import zipfile

import numpy as np
import torch
import torch.distributed as dist

from files import written
from imageset import WANTED, arrays_in, kind_of
from inception import FidError, reading
from pickles import load_arrays, mapped

LARGEST = 2**30  # bytes of statistics
FEATURES = 2048  # dimensions of an image's features

# What files call mean and covariance. The last pair is of np.savez(path, mu, sigma).
NAMES = (("mu", "sigma"), ("mean", "cov"), ("mu", "cov"), ("m", "s"), ("arr_0", "arr_1"))


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
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, self.state())
        total = Moments(len(self.mean))
        for state in states:
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
        """What to print beside an FID of too few images, or None.

        The covariance of n images has rank n - 1, which must reach the number of dimensions.
        """
        if len(self.mean) == FEATURES and self.n <= FEATURES:
            return f"too few images: {self.n} <= {FEATURES}"
        return None

    def mean_and_covariance(self):
        """(dim,) and, unbiased, (dim, dim): float64 arrays. Raises FidError for fewer than 2."""
        if self.n < 2:
            raise FidError(f"a covariance needs at least 2 images, not {self.n}")
        return self.mean.cpu().numpy(), (self.scatter / (self.n - 1)).cpu().numpy()


# ---- their distance ------------------------------------------------------------------------------


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float.

    mu: (D,), sigma: (D, D), symmetric positive semi-definite, singular ones included.
    The trace of the root is tr (A^T sigma2 A)^(1/2) with A A^T = sigma1, in float64.
    Raises FidError for other shapes, or values that are not finite.
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
    A, singular = torch.linalg.cholesky_ex(sigma1)
    if singular:  # the factor of the other covariance does as well
        sigma1, sigma2 = sigma2, sigma1
        A, singular = torch.linalg.cholesky_ex(sigma1)
    if singular:  # both are: the eigenvectors' way, which takes longer
        values, vectors = torch.linalg.eigh(sigma1)
        A = vectors * roots(values)
    M = A.T @ sigma2 @ A
    trace_of_root = roots(torch.linalg.eigvalsh((M + M.T) / 2)).sum()
    traces = sigma1.trace() + sigma2.trace()
    distance = ((mu1 - mu2).square().sum() + traces - 2 * trace_of_root).item()
    if -1e-6 * traces <= distance < 0:  # by rounding alone
        return 0.0
    return distance


def roots(eigenvalues):
    """Square roots. What is zero but for rounding does not have a small root."""
    D = len(eigenvalues)
    rounding = D * torch.finfo(torch.float64).eps * eigenvalues.abs().max()
    return eigenvalues.where(eigenvalues > rounding, 0).sqrt()


# ---- statistics files ----------------------------------------------------------------------------


def read_statistics(path):
    """mu (D,) and sigma (D, D), float64, and how --save-stats made them, or "". Raises FidError."""
    with reading(path):
        kind = kind_of(path)
        if kind == "pickle":
            found = pickled_statistics(path)
        elif kind == "npz":
            found = npz_statistics(path)
        else:
            raise FidError(f"cannot read {path}: {WANTED}")
        mu = np.asarray(found["mu"])
        sigma = np.asarray(found["sigma"])
        refuse_unless_real(path, mu.dtype, sigma.dtype)
        mu = mu.astype(np.float64)
        sigma = sigma.astype(np.float64)
        finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
        symmetric = sigma.shape == (mu.size, mu.size) and np.allclose(sigma, sigma.T)
        if mu.ndim != 1 or not finite or not symmetric or sigma.diagonal().min() < 0:
            raise FidError(
                f"{path}: mu {mu.shape} and sigma {sigma.shape} are not a mean and a covariance"
            )
    return mu, sigma, str(found.get("notes", ""))


def refuse_unless_real(path, *dtypes):
    for dtype in dtypes:
        if dtype.kind not in "biuf":
            raise FidError(f"cannot read {path}: mu and sigma must be real numbers, not {dtype}")


def pickled_statistics(path):
    with mapped(path) as content:
        found = load_arrays(content)
    if isinstance(found, dict) and isinstance(found.get("fid"), dict):
        found = found["fid"]
    if not isinstance(found, dict):
        raise FidError(f"cannot read {path}: it holds no dict of mu and sigma")
    mu, sigma = names_of_statistics(path, found)
    return {"mu": found[mu], "sigma": found[sigma]}


def npz_statistics(path):
    with np.load(path, allow_pickle=False) as archive:
        arrays = arrays_in(archive.zip)  # {name: (shape, by columns, dtype)}
        mu, sigma = names_of_statistics(path, arrays)
        # Here, because numpy refuses objects with a word about pickles.
        refuse_unless_real(path, arrays[mu][2], arrays[sigma][2])
        members = {f"{name}.npy" for name in (mu, sigma, "notes")}
        sizes = [part.file_size for part in archive.zip.infolist() if part.filename in members]
        if sum(sizes) > LARGEST:
            raise FidError(f"{path}: its statistics unpack to more than {LARGEST} bytes")
        notes = archive["notes"] if "notes" in arrays else ""
        return {"mu": archive[mu], "sigma": archive[sigma], "notes": notes}


def statistics_in(arrays):
    """Whether the arrays of an .npz are statistics. arrays: of imageset.arrays_in."""
    pairs = [(mu, sigma) for mu, sigma in NAMES if mu in arrays and sigma in arrays]
    return any(len(arrays[mu][0]) == 1 for mu, _ in pairs)  # (D,)


def is_of_save_stats(path):
    """Whether a file is statistics that --save-stats has written, and nothing else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(arrays_in(archive))
        read_statistics(path)
    except Exception:  # zipfile, zlib and numpy raise many kinds
        return False
    return names == {"mu", "sigma", "notes"}


def names_of_statistics(path, names):
    for pair in NAMES:
        if pair[0] in names and pair[1] in names:
            return pair
    there = ", ".join(map(str, list(names)[:10])) or "nothing"
    raise FidError(
        f"cannot read {path}: statistics are mu (D,) and sigma (D, D), and it holds {there}"
    )


def write_npz(path, **arrays):
    """Write an .npz, whole or not at all. Raises OSError, with the file's name."""
    with written(path) as file:
        np.savez(file, **arrays)
