"""The distance against closed forms and scipy, moments of batches, statistics files."""

import math
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import F64, GREEDY, Calling, full_disk, randn

import fid
import statistics_files
from frechet import Moments, frechet_distance
from statistics_files import read_statistics, write_npz


def covariance(D, rank, seed):
    """A random covariance (D, D) of this rank."""
    A = randn(D, rank, seed=seed)
    return A @ A.T / rank


def by_scipy(mu1, sigma1, mu2, sigma2):
    """The Frechet distance by its formula, with scipy's root of a matrix."""
    root = scipy.linalg.sqrtm((sigma1 @ sigma2).numpy()).real
    return ((mu1 - mu2).square().sum() + (sigma1 + sigma2).trace()).item() - 2 * np.trace(root)


# ---- the distance --------------------------------------------------------------------------------


def test_closed_forms():
    D = 6
    mu = randn(D)
    sigma = covariance(D, D, 0)
    eye = torch.eye(D, dtype=F64)
    assert abs(frechet_distance(mu, sigma, mu, sigma)) < 1e-12
    assert abs(frechet_distance(mu, sigma, mu + 2, sigma) - 4 * D) < 1e-12
    assert abs(frechet_distance(mu, sigma, mu, 9 * sigma) - 4 * sigma.trace()) < 1e-12
    assert abs(frechet_distance(mu, 0 * eye, mu, eye) - D) < 1e-12
    # Two that commute and are singular, each with one eigenvalue of zero.
    a = torch.arange(D, dtype=F64)
    b = a.flip(0)
    Q = torch.linalg.qr(randn(D, D))[0]
    expected = (a.sqrt() - b.sqrt()).square().sum()
    assert abs(frechet_distance(mu, Q * a @ Q.T, mu, Q * b @ Q.T) - expected) < 1e-12


def test_never_below_zero_by_rounding():
    """-0.0000 was printed for the distance of something from itself."""
    for D in range(2, 40):
        for rank in (D, D // 2 + 1):
            mu = randn(D)
            sigma = covariance(D, rank, 0)
            distance = frechet_distance(mu, sigma, mu, sigma)
            assert distance >= 0 and not f"{distance:.4f}".startswith("-")
            assert distance < 1e-5


def test_against_scipy():
    D = 64
    zero = torch.zeros(D, dtype=F64)
    a = covariance(D, 100, 0)
    b = covariance(D, 100, 1)
    assert abs(frechet_distance(zero, a, zero, b) - by_scipy(zero, a, zero, b)) < 1e-9


def test_low_rank():
    """Two covariances of rank 10, with factors A and B that give the distance. Then only one."""
    D = 64
    zero = torch.zeros(D, dtype=F64)
    eye = torch.eye(D, dtype=F64)
    A = randn(D, 10, seed=2)
    B = randn(D, 10, seed=3)
    low = covariance(D, 10, 2)  # A A^T / 10
    other = covariance(D, 10, 3)  # B B^T / 10
    assert abs(frechet_distance(zero, low, zero, low)) < 1e-12
    expected = (low + other).trace() - 2 * torch.linalg.svdvals(A.T @ B).sum() / 10
    assert abs(frechet_distance(zero, low, zero, other) - expected) < 1e-9
    expected = low.trace() + D - 2 * torch.linalg.svdvals(A).sum() / math.sqrt(10)
    assert abs(frechet_distance(zero, low, zero, eye) - expected) < 1e-9


def test_spectra_of_many_scales():
    """Standard deviations from 1 to 1e-6, as of smooth images. In the eigenvalues of A^T sigma2 A,
    down to 1e-24, the small ones are lost."""
    D = 128
    zero = torch.zeros(D, dtype=F64)
    scales = torch.logspace(0, -6, D, dtype=F64)
    A, B = randn(D, D, seed=2) * scales, randn(D, D, seed=3) * scales
    sigma, other = A @ A.T, B @ B.T
    assert frechet_distance(zero, sigma, zero, sigma) < 1e-11 * sigma.trace()
    expected = sigma.trace() * (math.sqrt(1.02) - 1) ** 2
    distance = frechet_distance(zero, sigma, zero, 1.02 * sigma)
    assert distance == pytest.approx(expected.item(), rel=1e-6)
    expected = (sigma + other).trace() - 2 * torch.linalg.svdvals(A.T @ B).sum()
    assert frechet_distance(zero, sigma, zero, other) == pytest.approx(expected.item(), rel=1e-10)


def test_512_dimensions():
    D = 512
    mu = randn(D)
    zero = torch.zeros(D, dtype=F64)
    eye = torch.eye(D, dtype=F64)
    a = covariance(D, 2000, 0) * torch.logspace(0, -4, D, dtype=F64)
    a = (a + a.T) / 2 + eye
    b = covariance(D, 2000, 1)
    low = covariance(D, 100, 2)
    assert abs(frechet_distance(mu, a, zero, b) / by_scipy(mu, a, zero, b) - 1) < 1e-6
    assert abs(frechet_distance(mu, low, mu, b) / by_scipy(mu, low, mu, b) - 1) < 1e-6
    expected = low.trace() + D - 2 * (torch.linalg.svdvals(randn(D, 100, seed=2)) / 10).sum()
    assert abs(frechet_distance(mu, low, mu, eye) / expected - 1) < 1e-6
    assert abs(frechet_distance(mu, eye, mu, low) / expected - 1) < 1e-6


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.full((64,), math.nan)])
def test_refuses(wrong):
    sigma = covariance(64, 10, 2)
    with pytest.raises(ValueError, match="frechet_distance"):
        frechet_distance(wrong, sigma, torch.zeros(64), sigma)


def test_refuses_covariances_that_are_none():
    """Of these the formula gives -14."""
    mu = torch.zeros(2)
    sigma = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    with pytest.raises(fid.FidError, match="not positive semi-definite"):
        frechet_distance(mu, sigma, mu, 4 * sigma)


# ---- moments -------------------------------------------------------------------------------------


def test_moments_of_batches():
    x = randn(1000, 6, seed=5) * torch.arange(1, 7) + 1e5
    one, parts, first, rest = (Moments(6) for _ in range(4))
    one.add(x)
    for part in x.split([1, 0, 300, 2, 697]):
        parts.add(part)
    first.add(x[:400])
    as_in_a_file = {key: np.array(value) for key, value in first.state().items()}
    rest.merge(**as_in_a_file)
    rest.add(x[400:])
    for moments in (one, parts, rest):
        mean, sigma = moments.mean_and_covariance()
        assert np.allclose(mean, x.numpy().mean(0), rtol=1e-14)
        assert np.allclose(sigma, np.cov(x.numpy().T), rtol=1e-11, atol=1e-9)


def test_moments_say_when_images_are_few():
    wide = Moments(2048)
    wide.n = 2048
    assert wide.remark_on_few() == " (too few images: 2048 <= 2048)"
    wide.n = 2049
    assert wide.remark_on_few() == ""
    narrow = Moments(6)
    narrow.add(randn(3, 6))
    assert narrow.remark_on_few() == ""


def test_moments_refuse():
    with pytest.raises(fid.FidError, match="at least 2"):
        Moments(6).mean_and_covariance()
    with pytest.raises(fid.FidError, match=r"\(B, 6\)"):
        Moments(6).add(randn(1000, 5))


# ---- statistics files ----------------------------------------------------------------------------

MU = randn(5).numpy()
SIGMA = covariance(5, 9, 0).numpy()
GOOD = {
    "fid": {"mu": MU, "sigma": np.asfortranarray(SIGMA)},
    "fd_dinov2": {"mu": MU[:2]},
    "n": np.float64(3),
}


def write(name, content):
    """Bytes as they are, a dict for an .npz as arrays, anything else as a pickle."""
    if name.endswith(".npz") and isinstance(content, dict):
        np.savez(name, **content)
        return
    if not isinstance(content, bytes):
        content = pickle.dumps(content, 4)
    with open(name, "wb") as f:
        f.write(content)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.npz", {"mu": MU, "sigma": SIGMA, "mu_s": MU}),
        ("nested.pkl", GOOD),
        ("flat.pkl", pickle.dumps(GOOD["fid"], 3)),
        ("numpy1.pkl", pickle.dumps(GOOD, 3).replace(b"numpy._core.multi", b"numpy.core.multi")),
        ("protocol5.pkl", pickle.dumps(GOOD, 5)),
        ("protocol0.pkl", pickle.dumps(GOOD, 0)),
        ("of another name", pickle.dumps(GOOD, 4)),
        ("mean.npz", {"mean": MU, "cov": SIGMA}),
        ("mean.pkl", {"mean": MU, "cov": SIGMA}),
        ("unnamed.npz", {"arr_0": MU, "arr_1": SIGMA}),
    ],
)
def test_statistics(folder, name, content):
    write(name, content)
    mu, sigma, notes = read_statistics(name)
    assert (mu == MU).all() and mu.dtype == np.float64
    assert (sigma == SIGMA).all() and sigma.dtype == np.float64
    assert notes == ""


def test_statistics_of_other_numbers(folder):
    write("float32.npz", {"mu": MU.astype(np.float32), "sigma": SIGMA.astype(np.float32)})
    assert np.allclose(read_statistics("float32.npz")[1], SIGMA, rtol=1e-6)
    write("whole.pkl", pickle.dumps({"mu": np.arange(5), "sigma": SIGMA}, 5))
    assert (read_statistics("whole.pkl")[0] == np.arange(5)).all()


BAD = {
    "os.pkl": (Calling(os.system, "touch ran"), "system"),
    "eval.pkl": (Calling(eval, "open('ran', 'w')"), "builtins.eval"),
    "within.pkl": (
        {"fid": {"mu": MU, "sigma": SIGMA, "x": Calling(np.fromfile, "a.npz")}},
        "fromfile",
    ),
    "torch.pkl": (torch.zeros(1), "torch"),
    "list.pkl": ([1, 2], "cannot read list.pkl"),
    "text.pkl": ({"fid": {"mu": "a"}}, "cannot read text.pkl"),
    "letters.pkl": ({"mu": "a", "sigma": "b"}, "cannot read letters.pkl"),
    "object.pkl": ({"mu": np.array([None]), "sigma": SIGMA}, "cannot read object.pkl"),
    "complex.pkl": (
        pickle.dumps({"mu": MU * 1j, "sigma": SIGMA}, 5),
        "cannot read complex.pkl: an array of 'c16'",
    ),
    "stylegan.pkl": (
        {"raw_mean": MU, "raw_cov": SIGMA, "num_items": 9},
        "statistics are mu .* it holds raw_mean, raw_cov, num_items",
    ),
    "other.npz": (
        {"average": MU, "spread": SIGMA},
        "statistics are mu .* it holds average, spread",
    ),
    "empty.npz": ({}, "empty.npz"),
    "notes.txt": (b"hello", "cannot read notes.txt: fid.py takes"),
    "text.npz": (b"hello", "cannot read text.npz: fid.py takes"),
    "no.npz": ({"a": MU}, "no.npz"),
    "nan.npz": ({"mu": MU * np.nan, "sigma": SIGMA}, "nan.npz"),
    "inf.npz": ({"mu": MU, "sigma": np.diag([1, 2, 3, 4, np.inf])}, "inf.npz"),
    "askew.npz": ({"mu": MU, "sigma": SIGMA + np.triu(SIGMA)}, "askew.npz"),
    "minus.npz": ({"mu": MU, "sigma": -np.eye(5)}, "minus.npz"),
    "small.npz": ({"mu": MU, "sigma": SIGMA[:4]}, "small.npz"),
    "of nothing.npz": ({"mu": MU[:0], "sigma": SIGMA[:0, :0]}, "are not a mean and a covariance"),
    "images.npz": (
        {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(2, int)},
        "images.npz holds images: python fid.py --save-stats images.npz",
    ),
    "object.npz": ({"mu": np.array([None]), "sigma": SIGMA}, "real numbers, not object"),
    "letters.npz": ({"mu": MU, "sigma": SIGMA.astype(str)}, "real numbers, not <U"),
    "complex.npz": (
        {"mu": MU, "sigma": SIGMA * 1j},
        "cannot read complex.npz: mu and sigma must be real numbers, not complex128",
    ),
}
for word, content in GREEDY.items():
    BAD[f"greedy{len(BAD)}.pkl"] = content, re.escape(word)


@pytest.mark.parametrize("name", BAD)
def test_bad_statistics(folder, name):
    content, word = BAD[name]
    write(name, content)
    with pytest.raises(fid.FidError, match=word) as error:
        read_statistics(name)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert os.listdir() == [name]


def test_statistics_that_are_cut_off_or_gone(folder):
    write("a.npz", {"mu": MU, "sigma": SIGMA})
    write("a.pkl", GOOD)
    for name in ("a.npz", "a.pkl"):
        with open(name, "rb") as f:
            start = f.read(300)
        write("cut" + name, start)
    for name in ("cuta.npz", "cuta.pkl", "gone.npz", "gone.pkl"):
        with pytest.raises(fid.FidError, match=f"cannot read {name}"):
            read_statistics(name)


def test_statistics_that_unpack_to_too_much(folder, monkeypatch):
    np.savez_compressed("s.npz", mu=np.zeros(20), sigma=np.zeros((20, 20)))
    read_statistics("s.npz")
    monkeypatch.setattr(statistics_files, "LARGEST", 2**10)
    with pytest.raises(fid.FidError, match="unpack to more"):
        read_statistics("s.npz")


def test_statistics_of_formats_3_and_9(folder):
    with zipfile.ZipFile("s.npz", "w") as archive:
        for name, array in (("mu", MU), ("sigma", SIGMA)):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, version=(3, 0))
    assert (read_statistics("s.npz")[1] == SIGMA).all()
    with zipfile.ZipFile("later.npz", "w") as archive:
        archive.writestr("mu.npy", b"\x93NUMPY\x09\x01")
    with pytest.raises(fid.FidError, match="cannot read later.npz: .* 3.0, not 9.1"):
        read_statistics("later.npz")


def test_a_full_disk_is_told_with_the_file(folder):
    write_npz("s.npz", mu=MU, sigma=SIGMA, notes="")
    with full_disk(4096), pytest.raises(OSError, match="File too large: 's.npz'"):
        write_npz("s.npz", mu=np.zeros(9999))
    assert os.listdir() == ["s.npz"]
    assert (read_statistics("s.npz")[0] == MU).all()
    with pytest.raises(FileNotFoundError, match="gone"):  # names the file by itself
        write_npz("gone/s.npz", mu=MU)
