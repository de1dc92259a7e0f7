"""
How good are images? FID and the other scores of Inception's features, and scores for data too small for them.

    python fid.py SAMPLES REFERENCE                  # FID, Inception Score; precision and recall where both are images
    python fid.py --save-stats IMAGES stats.npz      # the statistics of a reference, once; --size 256: of images cut as prepare.py does
    torchrun --nproc_per_node=8 fid.py SAMPLES REFERENCE --state=progress    # the same again continues

Images: a folder of PNG and JPEG files, at any depth, or an .npz (arr_0, uint8 (N, H, W, 3)). Statistics: an .npz of mu and
sigma (pytorch-fid's, --save-stats), or a .pkl of {"fid": {"mu", "sigma"}}, of which arrays are made and nothing else. ADM's
reference batches are both: FID takes their mu and sigma, precision and recall their images.
"""
import argparse
import hashlib
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from inception import load_inception
from pickles import FidError, Unpickler, check_pickle, reading

SAVE_SECONDS = 60        # between two saves of --state
LARGEST = 2 ** 30        # bytes of statistics




















def made_with(net, resize="tf1"):
    """What statistics of this network note, and must share to be compared."""
    return f"resize {resize}, weights {net.digest[:8]}"


def read_reference(path, net, resize="tf1"):
    """read_statistics, of what features of net(images, resize) can be compared with. Raises FidError."""
    mu, sigma, notes = read_statistics(path, notes=True)
    if len(mu) != net.fc.in_features:
        raise FidError(f"{path}: statistics of {len(mu)} dimensions, where Inception's features have {net.fc.in_features}")
    if notes and notes != made_with(net, resize):
        raise FidError(f"{path} was made with {notes}, which does not compare with {made_with(net, resize)}")
    return mu, sigma


class Moments:
    """Mean and covariance of features (B, dim) that come in batches, in float64, merged about their own means (Chan et al.): on the
    features' device, without waiting for it. merge(**other.state()) adds another's, all_reduce() all ranks'."""

    def __init__(self, dim):
        self.n, self.mean, self.scatter = 0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features):
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise FidError(f"Moments takes features (B, {len(self.mean)}), not {tuple(features.shape)}")
        x = features.detach().to("cpu" if features.device.type == "mps" else features.device).double()       # Apple's GPUs have no float64
        self.merge(len(x), x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)))

    def merge(self, n, mean, scatter):
        n, mean, scatter = int(n), torch.as_tensor(mean), torch.as_tensor(scatter)
        if n:
            delta, total = mean - self.mean.to(mean.device), self.n + n
            self.scatter = self.scatter.to(mean.device) + scatter + torch.outer(delta, delta) * (self.n * n / total)
            self.n, self.mean = total, self.mean.to(mean.device) + delta * (n / total)

    def all_reduce(self):
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self.state())
        self.__init__(len(self.mean))
        for part in parts:
            self.merge(**part)

    def state(self):
        return {"n": self.n, "mean": self.mean.cpu().numpy(), "scatter": self.scatter.cpu().numpy()}

    def few(self):
        """What an FID says beside its number where n images, whose covariance is of rank n - 1, are too few; or ""."""
        return f" (too few images: {self.n} <= 2048)" if self.n <= 2048 == len(self.mean) else ""

    def mean_and_covariance(self):
        """(dim,) and, unbiased, (dim, dim): float64 arrays."""
        if self.n < 2:
            raise FidError(f"a covariance needs at least 2 images, not {self.n}")
        if self.few() and os.environ.get("RANK", "0") == "0":
            print(f"fid.py: {self.n} images for 2048 dimensions: the covariance is rank deficient, FID biased upward", file=sys.stderr)
        return self.mean.cpu().numpy(), (self.scatter / (self.n - 1)).cpu().numpy()








def read_statistics(path, notes=False):
    """mu (D,) and sigma (D, D), float64, of an .npz or .pkl; notes=True: also how --save-stats made them. Raises FidError."""
    with reading(path):
        if path.endswith(".pkl"):
            with open(path, "rb") as f:
                check_pickle(f)
                found = Unpickler(f).load()
            found = {key: value for key, value in found.get("fid", found).items() if key in ("mu", "sigma")}
            for key, (*_, shape, dtype, by_columns, raw) in found.items():
                found[key] = np.frombuffer(raw, dtype[4] + {"f4": "f4", "f8": "f8"}[dtype[0]]).reshape(shape, order="CF"[by_columns])
        else:
            with np.load(path, allow_pickle=False) as f:
                if sum(part.file_size for part in f.zip.infolist() if part.filename in ("mu.npy", "sigma.npy", "notes.npy")) > LARGEST:
                    raise FidError(f"{path}: its statistics unpack to more than {LARGEST} bytes")
                found = {key: f[key] for key in ("mu", "sigma", "notes") if key in f.files}
        mu, sigma = (found[key].astype(np.float64, casting="same_kind") for key in ("mu", "sigma"))
        symmetric = sigma.shape == (mu.size, mu.size) and np.allclose(sigma, sigma.T)
        if mu.ndim != 1 or not symmetric or not np.isfinite(mu).all() or sigma.diagonal().min() < 0:
            raise FidError(f"{path}: mu {mu.shape} and sigma {sigma.shape} are not a mean and a covariance")
    return (mu, sigma, str(found.get("notes", ""))) if notes else (mu, sigma)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float, of mu (D,), sigma (D, D) symmetric positive
    semi-definite, singular ones included. The trace of the root is tr (A^T sigma2 A)^(1/2) with A A^T = sigma1, in
    float64. Raises FidError for other shapes or values that are not finite."""
    mu1, sigma1, mu2, sigma2 = given = [torch.as_tensor(a, dtype=torch.float64, device="cpu") for a in (mu1, sigma1, mu2, sigma2)]
    D, shapes = mu1.numel(), [tuple(a.shape) for a in given]
    if shapes != [(D,), (D, D)] * 2 or not all(a.isfinite().all() for a in given):
        raise FidError(f"frechet_distance: shapes {shapes} do not belong together, or a mean or covariance is not finite")
    # Eigenvalues that are zero but for rounding do not have small roots.
    clean = lambda values: values.where(values > D * torch.finfo(torch.float64).eps * values.abs().max(), 0)
    A, singular = torch.linalg.cholesky_ex(sigma1)
    if singular:                                                       # the other's factor does as well, and is cheaper
        sigma1, sigma2 = sigma2, sigma1
        A, singular = torch.linalg.cholesky_ex(sigma1)
    if singular:
        values, vectors = torch.linalg.eigh(sigma1)
        A = vectors * clean(values).sqrt()
    M = A.T @ sigma2 @ A
    root = clean(torch.linalg.eigvalsh((M + M.T) / 2)).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root).item()


def inception_score(logits, splits=10, seed=0):
    """Mean and standard deviation of exp E KL(p(y|x), p(y)) over parts of logits (N, 1008), shuffled with the seed."""
    order = np.random.default_rng(seed).permutation(len(logits))
    parts = [logits[rows].double().softmax(1) for rows in np.array_split(order, splits) if len(rows)]
    scores = [(torch.xlogy(p, p).sum(1).mean() - torch.xlogy(p.mean(0), p.mean(0)).sum()).exp().item() for p in parts]
    return np.mean(scores), np.std(scores)


def precision_recall(samples, reference, k=3, size=2 ** 25):
    """The share of samples (N, D) that lie near the reference (M, D), and the other way round: in a ball to a point's k-th
    nearest of its own kind (Kynkaanniemi et al., 2019). About `size` float64 distances are in memory at a time."""
    if min(len(samples), len(reference)) <= k:
        raise FidError(f"precision and recall need more than {k} images of each kind, not {len(samples)} and {len(reference)}")
    a, b = (x.to("cuda" if torch.cuda.is_available() else "cpu", torch.float64) for x in (samples, reference))
    parts = lambda x, y: tqdm(x.split(max(1, size // len(y))), desc="precision, recall", unit="part", leave=False)
    distances = lambda x, y: torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")
    radius_a, radius_b = (torch.cat([distances(part, x).topk(k + 1, largest=False).values[:, k] for part in parts(x, x)]) for x in (a, b))
    near, covered = [], torch.zeros_like(radius_b, dtype=torch.bool)
    for part, radius in zip(parts(a, b), radius_a.split(max(1, size // len(b)))):
        d = distances(part, b)
        near, covered = [*near, (d <= radius_b).any(1)], covered | (d <= radius[:, None]).any(0)
    return torch.cat(near).double().mean().item(), covered.double().mean().item()


class Images:
    """The n images of a folder, in the order of their paths, or of an .npz: [i] is image i, uint8 (H, W, 3). side: of a folder's, as
    prepare.py cuts and resizes them; those that it would skip are None."""

    def __init__(self, path, side=0):
        self.path, self.file, self.shape, self.side = path, None, None, side
        with reading(path):
            if os.path.isdir(path):
                if side:
                    from prepare import list_images
                    self.files, self.shape = [file for file, _ in list_images(path)[1]], [side, side, 3]
                else:                                    # links to folders are entered where they lie in the folder itself
                    tops = [path, *(d.path for d in os.scandir(path) if d.is_symlink() and d.is_dir())]
                    self.files = sorted(os.path.join(at, file) for top in tops for at, _, files in os.walk(top) for file in files
                                        if file.lower().endswith((".png", ".jpg", ".jpeg")))
                self.n, stamp = len(self.files), [(file, (found := os.stat(file)).st_size, found.st_mtime_ns) for file in self.files]
            else:
                self.file, stamp = zipfile.ZipFile(path).open("arr_0.npy"), os.stat(path).st_mtime_ns
                header = getattr(np.lib.format, f"read_array_header_{np.lib.format.read_magic(self.file)[0]}_0")
                (self.n, *self.shape), by_columns, dtype = header(self.file)
                self.start, self.size = self.file.tell(), int(np.prod(self.shape))
                if dtype != np.uint8 or len(self.shape) != 3 or self.shape[2] != 3 or by_columns or min(self.n + 1, *self.shape) < 1:
                    raise FidError(f"{path}: arr_0 must be uint8 (N, H, W, 3), not {dtype} {(self.n, *self.shape)}")
        if not self.n:
            raise FidError(f"no images in {path}")
        self.shape = self.shape or self[0].shape
        self.about = f"{self.n} images of {os.path.abspath(path)}, {hashlib.sha256(repr((stamp, side)).encode()).hexdigest()[:16]}"

    def __getitem__(self, i):
        if self.file:                                    # not held in memory: 50,000 of 256 x 256 are 10 GB
            with reading(self.path):
                self.file.seek(self.start + i * self.size)
                return np.frombuffer(self.file.read(self.size), np.uint8).reshape(self.shape)
        if self.side:
            from prepare import read_image
            if isinstance(image := read_image(self.files[i], self.side), str):
                return tqdm.write(f"skipped {self.files[i]}: {image}", file=sys.stderr)         # None
            return image.transpose(1, 2, 0)
        with reading(self.files[i]), open(self.files[i], "rb") as file:
            depth, image = file.read(25)[24:], Image.open(file, formats=("JPEG", "PNG"))      # of a PNG: Pillow would cut 16 bits to 8
            deep = image.format == "PNG" and depth == b"\x10"
            if deep or image.mode != "RGB" or self.shape and image.size != self.shape[1::-1]:
                raise FidError(f"{self.files[i]} is {'16-bit ' * deep}{image.mode}, {image.size}: all must be 8-bit RGB and of one size, that of {self.files[0]}")
            return np.asarray(image)


def write_npz(path, **arrays):
    with open(path + ".partial", "wb") as f:
        np.savez(f, **arrays)
        f.flush(), os.fsync(f.fileno())
    os.replace(path + ".partial", path)


def measure(images, net, resize="tf1", batch=128, keep=True, state=None):
    """Images -> Moments of all ranks' features and, where `keep`, on rank 0 the features (n, 2048). state: see --state."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first, last = images.n * rank // ranks, images.n * (rank + 1) // ranks
    moments, kept, saved, begin = Moments(2048), [torch.empty(0, 2048)], time.monotonic(), first
    about, state = f"{images.about}, {first} to {last}, {resize}, weights {net.digest}, {keep}", state and f"{state}-{rank}.npz"
    if state and os.path.exists(state):
        with reading(state), np.load(state, allow_pickle=False) as f:
            if str(f["about"]) != about:
                raise FidError(f"{state} belongs to another run: delete it, or give another --state")
            moments.merge(f["n"], f["mean"], f["scatter"])
            kept, begin = [torch.from_numpy(f["kept"])], int(f["next"])
    with ThreadPoolExecutor(1 if images.file else min(16, os.cpu_count() or 1)) as pool:   # a GPU computes meanwhile
        for at in tqdm(range(begin, last, batch), desc=images.path, unit="batch", disable=rank > 0):
            if pixels := [x for x in pool.map(images.__getitem__, range(at, min(at + batch, last))) if x is not None]:
                features = net(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(net.fc.weight.device), resize)
                moments.add(features)
                kept += [features] * keep
            if state and (time.monotonic() > saved + SAVE_SECONDS or at + batch >= last):
                kept, saved = [torch.cat([part.cpu() for part in kept])], time.monotonic()
                write_npz(state, about=about, kept=kept[0], next=min(at + batch, last), **moments.state())
    kept = [torch.cat([part.cpu() for part in kept])]
    if ranks > 1:
        moments.all_reduce()
        parts = [None] * ranks if rank == 0 else None
        dist.gather_object(kept[0], parts)
    return moments, torch.cat(parts if ranks > 1 and rank == 0 else kept)


def fid_of(batches, net, reference, resize="tf1", all_ranks=False):
    """FID of an iterator of uint8 (N, 3, H, W) by load_inception's network, against (mu, sigma) of read_reference; all_ranks:
    every rank calls this with its share."""
    moments = Moments(2048)
    for images in batches:
        moments.add(net(images.to(net.fc.weight.device), resize))
    if all_ranks:
        moments.all_reduce()
    return frechet_distance(*moments.mean_and_covariance(), *reference)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"fid.py: {' '.join(message.split())} (--help lists the options)")
    parser.add_argument("samples", help="images, or statistics")
    parser.add_argument("reference", help="images or statistics; with --save-stats the .npz to write")
    parser.add_argument("--save-stats", action="store_true", help="write the statistics of the images")
    parser.add_argument("--size", type=int, default=0, help="of a folder's images, cut as prepare.py does for --save-stats")
    parser.add_argument("--inception", help="weights with the names of pytorch-fid's file (default: that file, downloaded once)")
    parser.add_argument("--resize", choices=("tf1", "torch"), default="tf1", help="TensorFlow 1's, as in papers, or pytorch-fid's")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--state", help="keep progress in files whose names begin so, and continue from them")
    args = parser.parse_args(argv)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch < 1 or args.save_stats and (not args.reference.endswith(".npz") or os.path.isdir(args.reference)):
        raise FidError(f"--batch is at least 1 and --save-stats writes an .npz, not {args.batch} and {args.reference}")
    if args.size and (args.size < 0 or not args.save_stats or not os.path.isdir(args.samples)):
        raise FidError(f"--size is at least 1 and goes with --save-stats of a folder, not {args.size} and {args.samples}")
    for file in [args.reference] * args.save_stats + [args.state] * bool(args.state):
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)             # complain before the work, not after it
    images, found = [], []
    for path in (args.samples, args.reference)[:2 - args.save_stats]:
        with reading(path):
            names = zipfile.ZipFile(path).namelist() if path.endswith(".npz") else []
        images.append(Images(path, args.size) if os.path.isdir(path) or "arr_0.npy" in names else None)
        found.append(None if images[-1] and (len(images) == 1 or "mu.npy" not in names) else read_statistics(path, notes=True))
    if ranks > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))           # another rank may be slow
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    net = load_inception(args.inception, device) if any(images) else None
    notes = made_with(net, args.resize) if net else ""
    if len(all_notes := sorted({notes, *(other[2] for other in found if other)} - {""})) > 1:
        raise FidError(f"what is made with {' does not compare with what is made with '.join(all_notes)}")
    state = lambda i: args.state and f"{args.state}-{i}"
    results = [measure(x, net, args.resize, args.batch, not args.save_stats, state(i)) if x else (None, None) for i, x in enumerate(images)]
    if rank > 0:
        return
    gaussians = [other[:2] if other else moments.mean_and_covariance() for other, (moments, _) in zip(found, results)]
    if args.save_stats:
        return write_npz(args.reference, mu=gaussians[0][0], sigma=gaussians[0][1], notes=notes)
    few = "".join(moments.few() for other, (moments, _) in zip(found, results) if not other)
    print(f"FID {frechet_distance(*gaussians[0], *gaussians[1]):.4f}{notes and f' ({notes})'}{few}")
    features, reference = (kept for _, kept in results)
    if images[0]:
        mean, std = inception_score(features.double() @ net.fc.weight.cpu().double().T)
        few = f"; too few images: {len(features)} <= 10 x 1008 classes" * (len(features) <= 10080)      # or a part cannot have them all
        print(f"Inception Score {mean:.3f} +- {std:.3f} (10 parts of an order drawn with seed 0{few})")
    if all(images):
        precision, recall = precision_recall(features, reference)
        print(f"precision {precision:.4f}, recall {recall:.4f} (3 nearest neighbours)")


# Scores for data too small for FID. Images are (N, ...) arrays or tensors; distances are Euclidean over all elements.























if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (FidError, OSError, RuntimeError) as error:
        sys.exit(f"fid.py: {' '.join(str(error).split())}")
