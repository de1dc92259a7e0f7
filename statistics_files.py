"""
The files of a mean and a covariance, which stand for a reference in FID.

    write_npz("stats.npz", mu=mu, sigma=sigma, notes="how they were made")
    mu, sigma, notes = read_statistics("stats.npz")        # or a .pkl, whose pickle is not run
"""

import zipfile

import numpy as np

from files import FidError, reading, written
from imageset import WANTED, arrays_in, images_in, kind_of
from pickles import load_arrays, mapped

LARGEST = 2**30  # bytes of statistics

# What files call mean and covariance. The last pair is of np.savez(path, mu, sigma).
PAIRS_OF_NAMES = (("mu", "sigma"), ("mean", "cov"), ("mu", "cov"), ("m", "s"), ("arr_0", "arr_1"))


def read_statistics(path):
    """mu (D,) and sigma (D, D), float64, and how --save-stats made them, or "". Raises FidError."""
    with reading(path):
        kind = kind_of(path)
        if kind == "pickle":
            found = pickled_statistics(path)
        elif kind == "npz":
            found = npz_statistics(path)
        elif kind == "other":
            raise FidError(f"cannot read {path}: {WANTED}")
        else:
            refuse_images(path)
        mu = np.asarray(found["mu"])
        sigma = np.asarray(found["sigma"])
        refuse_unless_real(path, mu.dtype, sigma.dtype)
        mu = mu.astype(np.float64)
        sigma = sigma.astype(np.float64)
        finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
        symmetric = sigma.shape == (mu.size, mu.size) and np.allclose(sigma, sigma.T)
        is_covariance = symmetric and sigma.size > 0 and sigma.diagonal().min() >= 0
        if mu.ndim != 1 or not finite or not is_covariance:
            raise FidError(
                f"{path}: mu {mu.shape} and sigma {sigma.shape} are not a mean and a covariance"
            )
    return mu, sigma, str(found.get("notes", ""))


def refuse_images(path):
    raise FidError(
        f"{path} holds images: python fid.py --save-stats {path} stats.npz makes statistics"
    )


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
    mu, sigma = names_in(path, found)
    return {"mu": found[mu], "sigma": found[sigma]}


def npz_statistics(path):
    with np.load(path, allow_pickle=False) as archive:
        arrays = arrays_in(archive.zip)  # {name: (shape, by columns, dtype)}
        if images_in(arrays) and not statistics_in(arrays):
            refuse_images(path)
        mu, sigma = names_in(path, arrays)
        # Before they are read: numpy's own message about an array of objects speaks of pickles.
        refuse_unless_real(path, arrays[mu][2], arrays[sigma][2])
        members = {f"{name}.npy" for name in (mu, sigma, "notes")}
        sizes = [part.file_size for part in archive.zip.infolist() if part.filename in members]
        if sum(sizes) > LARGEST:
            raise FidError(f"{path}: its statistics unpack to more than {LARGEST} bytes")
        notes = archive["notes"] if "notes" in arrays else ""
        return {"mu": archive[mu], "sigma": archive[sigma], "notes": notes}


def statistics_in(arrays):
    """Whether the arrays of an .npz are statistics. arrays: of imageset.arrays_in."""
    pairs = [(mu, sigma) for mu, sigma in PAIRS_OF_NAMES if mu in arrays and sigma in arrays]
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


def names_in(path, names):
    for pair in PAIRS_OF_NAMES:
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
