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
import mmap
import os
import pickle
import pickletools
import sys
import time
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

TF32 = False             # True: convolutions in TensorFloat-32 on a GPU; bench.py fid says what that gives and costs
SAVE_SECONDS = 60        # between two saves of --state
LARGEST = 2 ** 30        # bytes of statistics
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


class FidError(ValueError):
    """Something about images, statistics or weights, in one line for the user."""


@contextmanager
def reading(path):
    """Whatever goes wrong with a file becomes one line."""
    try:
        yield
    except Exception as error:                  # zipfile, zlib, numpy, Pillow, pickle and torch raise many kinds
        text = str(error) if isinstance(error, FidError) else f"cannot read {path}: {type(error).__name__}: {error}"
        raise FidError("".join(filter(str.isprintable, text.strip().splitlines()[0]))[:500]) from None    # with words of a stranger's


# TensorFlow's Inception of 2015-12-05. Its blocks: input channels, pool, and convolutions, each name:channels:kernel/stride.
POOLS = {"average": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
         "largest": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1), "halve": partial(F.max_pool2d, kernel_size=3, stride=2)}
A = "{} average 1x1:64:1 5x5_1:48:1 5x5_2:64:5 3x3dbl_1:64:1 3x3dbl_2:96:3 3x3dbl_3:96:3 _pool:{}:1"
C = ("768 average 1x1:192:1 7x7_1:{0}:1 7x7_2:{0}:1x7 7x7_3:192:7x1 7x7dbl_1:{0}:1 7x7dbl_2:{0}:7x1 7x7dbl_3:{0}:1x7 7x7dbl_4:{0}:7x1 "
     "7x7dbl_5:192:1x7 _pool:192:1")
E = ("{} {} 1x1:320:1 3x3_1:384:1 3x3_2a:384:1x3 3x3_2b:384:3x1 3x3dbl_1:448:1 3x3dbl_2:384:3 3x3dbl_3a:384:1x3 3x3dbl_3b:384:3x1 "
     "_pool:192:1")
MIXED = {"5b": A.format(192, 32), "5c": A.format(256, 64), "5d": A.format(288, 64),
         "6a": "288 halve 3x3:384:3/2 3x3dbl_1:64:1 3x3dbl_2:96:3 3x3dbl_3:96:3/2",
         "6b": C.format(128), "6c": C.format(160), "6d": C.format(160), "6e": C.format(192),
         "7a": "768 halve 3x3_1:192:1 3x3_2:320:3/2 7x7x3_1:192:1 7x7x3_2:192:1x7 7x7x3_3:192:7x1 7x7x3_4:192:3/2",
         "7b": E.format(1280, "average"), "7c": E.format(2048, "largest")}


class Product(nn.Conv2d):
    """A 1x1 convolution of channels-last images as the matrix product that it is, which is faster in float32."""

    def forward(self, x):
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def convolution(inputs, outputs, kernel, same=True):
    """With batch norm and ReLU. kernel: "3", "1x7" or, of stride 2, "3/2"; same: at stride 1 the padding keeps the size."""
    kernel, _, stride = kernel.partition("/")
    size, padding = [int(k) for k in (kernel.split("x") * 2)[:2]], "same" if same and not stride else 0
    conv = (Product if kernel == "1" and not stride else nn.Conv2d)(inputs, outputs, size, int(stride or 1), padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs, eps=1e-3), relu=nn.ReLU(inplace=True)))


class Mixed(nn.Module):
    """Branches side by side; a and b take the same input. What the pool gives goes through branch_pool or, without one, stands."""

    def __init__(self, inputs, pool, *layers):
        super().__init__()
        self.pool = POOLS[pool]
        for name, outputs, kernel in (layer.split(":") for layer in layers):
            if name[-1] != "b":
                before = inputs if name.partition("_")[2] in ("", "1", "pool") else width
            width = outputs
            self.add_module("branch" + name, convolution(int(before), int(width), kernel))

    def forward(self, x):
        out = []
        for name, layer in self.named_children():
            place = name.partition("_")[2]
            if name[-1] != "b":
                before = self.pool(x) if place == "pool" else x if place in ("", "1") else out.pop()
            out.append(layer(before))
        return torch.cat(out if place == "pool" else [*out, self.pool(x)], dim=1)


class InceptionV3(nn.Module):
    """The network of FID, under the names of pytorch-fid's weights (which are torchvision's)."""

    def __init__(self):
        super().__init__()
        for name, *how in (("1a_3x3", 3, 32, "3/2"), ("2a_3x3", 32, 32, "3", False), ("2b_3x3", 32, 64, "3"),
                           ("3b_1x1", 64, 80, "1"), ("4a_3x3", 80, 192, "3", False)):
            self.add_module("Conv2d_" + name, convolution(*how))
        for name, text in MIXED.items():
            self.add_module("Mixed_" + name, Mixed(*text.split()))
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def fold(self):
        """The same function with batch norm inside the convolutions: faster, and without the file's names. Returns itself."""
        for layer in self.modules():
            if hasattr(layer, "bn"):
                layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
        return self.requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images, resize="tf1", logits=False):
        """uint8 (N, 3, H, W) -> features (N, 2048), float32; logits=True: also (N, 1008), without fc's bias, which published
        Inception Scores leave out. resize as in resized."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or resize not in ("tf1", "torch"):
            raise FidError(f"Inception takes uint8 (N, 3, H, W), tf1 or torch, not {images.dtype} {tuple(images.shape)}, {resize}")
        cudnn, matmul, precision = torch.backends.cudnn, torch.backends.cuda.matmul, "tf32" if TF32 else "ieee"
        before = cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision
        try:
            cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision = True, precision, precision
            with torch.autocast(images.device.type, enabled=False):
                x = resized(images, resize).contiguous(memory_format=torch.channels_last)
                for name, layer in list(self.named_children())[:-1]:
                    x = POOLS["halve"](layer(x)) if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3") else layer(x)
                x = x.mean((2, 3))                                      # (N, 2048), of 8 x 8 places
        finally:
            cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision = before
        return (x, (x.double() @ self.fc.weight.double().T).float()) if logits else x


def resized(images, resize):
    """uint8 (N, 3, H, W) -> float32 (N, 3, 299, 299) in [-1, 1]. "tf1": TensorFlow 1's ResizeBilinear, which the papers'
    numbers are made with: place i takes pixel i H / 299, rounded as there. "torch": as pytorch-fid has it."""
    x = images.float()
    if resize == "torch":
        return F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    for dim in (3, 2):
        at = torch.arange(299, device=x.device, dtype=torch.float32) * float(np.float32(x.shape[dim]) / np.float32(299))
        low, share = at.long(), (at - at.floor()).view(-1, *[1] * (3 - dim))
        x, after = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=x.shape[dim] - 1))
        x = x + (after - x) * share
    return (x - 128) / 128


def load_inception(path=None, device="cpu"):
    """InceptionV3 with a file's weights, or the published ones, downloaded once into torch.hub's folder. Names, shapes and
    dtypes must be right; num_batches_tracked, which the published file has, may be missing. Raises FidError. Without a path a
    machine's first rank downloads for its others, so all call this (which fail for themselves where it could not)."""
    later, together = os.environ.get("LOCAL_RANK", "0") != "0", not path and dist.is_initialized()
    file = path or os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(URL))
    with reading(file if path else URL):
        if together and later:
            dist.barrier()
        try:
            if not path and not os.path.exists(file):
                os.makedirs(os.path.dirname(file), exist_ok=True)
                torch.hub.download_url_to_file(URL, file, SHA256)       # aside, and renamed when its hash is right
        finally:
            if together and not later:
                dist.barrier()
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        if not path and digest != SHA256:
            raise FidError(f"{file} is not the published file, its SHA-256 is {digest}: delete it")
        net, state = InceptionV3(), torch.load(file, map_location="cpu", weights_only=True)
        found, needed = ({f"{name} {list(t.shape)} {t.dtype}" for name, t in tensors.items() if not name.endswith("tracked")}
                         for tensors in (state, net.state_dict()))
        for odd in sorted(found ^ needed)[:1]:
            raise FidError(f"{file} does not fit this network: only the {'file' if odd in found else 'network'} has {odd}")
        net.load_state_dict(state, strict=False)
        net.digest = digest
    return net.fold().to(device)


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


class Held(list):
    """Stands in a pickle for an array, its type or their makers: keeps what it is given, and does nothing."""
    __init__, __setstate__ = lambda self, *args: list.__init__(self, args), list.extend


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        known = f"{module}.{name}".replace("._core.", ".core.")
        if known == "numpy.core.numeric._frombuffer":                  # protocol 5's: the same parts in another order
            return lambda raw, dtype, shape, order: Held(shape, dtype, order == "F", raw)
        if known not in ("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar"):
            raise FidError(f"a pickle that asks for {module}.{name}, which no statistics need, is refused")
        return Held


def check_pickle(file):
    """Raises, in one of many kinds, where a number in a pickle would have its reader ask for much more memory than the file fills:
    a size, which the end of a map cuts, or a place to remember something in, which are counted from 0."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for n, (opcode, number, _) in enumerate(pickletools.genops(mapped)):
            if "PUT" in opcode.name and number > n or opcode.name == "FRAME" and number > len(mapped):
                raise pickle.UnpicklingError(f"{opcode.name} of {number}, after {n} opcodes in {len(mapped)} bytes")


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

def moments(features):
    """(N, ...) -> the mean (D,) and the covariance (D, D), float64."""
    total = Moments(int(np.prod(features.shape[1:])))
    total.add(flat(features))
    return total.mean_and_covariance()


def small_data_scores(images, y, held_out, train, labels, leave_out=None, judge=None):
    """The scores of images (N, C, H, W) uint8 of which classes y (N,) were asked for, against as many held_out ones and the
    training images `train` with their labels. leave_out: where images are training images, which. judge: what says the class
    instead of the nearest training image. nan is a score that says nothing: one class, pixel covariances of large images."""
    small, label = images[0].size <= 4096, float("nan")
    if judge:
        label = (classify(judge, images) == torch.as_tensor(y)).double().mean().item()
    elif labels.max() > 0:
        label = label_accuracy(images, y, train, labels, leave_out)
    pixels = frechet_distance(*moments(images / 255), *moments(held_out / 255)) if small else float("nan")
    return {"two_sample": two_sample_accuracy(images, held_out), "label": label,
            "nearest_ratio": nearest_ratio(images, held_out, train, leave_out), "frechet_pixels": pixels}


def two_sample_accuracies(a, b):
    """The accuracy of the leave-one-out nearest-neighbour classifier that tells a (N, ...) from b (N, ...), on a and on b.
    Their mean is 0.5 where both come from one distribution, 1 where they differ plainly, 0 where a copies b."""
    if len(a) != len(b):
        raise ValueError(f"two_sample_accuracy: {len(a)} images against {len(b)}; the sets must be of one size")
    both, rows = torch.cat([flat(a), flat(b)]), torch.arange(2 * len(a))
    nearest = nearest_neighbours(both, both, leave_out=rows)[1]
    return ((nearest >= len(a)) == (rows >= len(a))).double().view(2, -1).mean(1).tolist()


def two_sample_accuracy(a, b):
    return sum(two_sample_accuracies(a, b)) / 2


def label_accuracy(samples, y, images, labels, leave_out=None):
    """The share of samples (N, ...) whose nearest image (M, ...) has the label (M,) that was asked for, y (N,)."""
    nearest = nearest_neighbours(samples, images, leave_out)[1]
    return (torch.as_tensor(labels)[nearest] == torch.as_tensor(y)).double().mean().item()


def nearest_ratio(samples, held_out, images, leave_out=None):
    """The mean distance of samples to the nearest training image, over that of held-out images: well under 1, memorized."""
    return (nearest_neighbours(samples, images, leave_out)[0].mean() / nearest_neighbours(held_out, images)[0].mean()).item()


def nearest_neighbours(a, b, leave_out=None, rows=4096):
    """Distances (N,) and indices (N,) of the images of b (M, ...) nearest to those of a (N, ...), but for b[leave_out[i]] to a[i]. In
    float64 by matrix products, exact for whole-number pixels; in parts of b, which may be mapped from a file; on a GPU if any."""
    a = flat(a).to("cuda" if torch.cuda.is_available() else "cpu")
    best, index = a.new_full((len(a),), torch.inf), torch.zeros(len(a), dtype=torch.long, device=a.device)
    for first in range(0, len(b), rows):
        d = torch.cdist(a, flat(b[first:first + rows]).to(a.device), compute_mode="use_mm_for_euclid_dist")
        if leave_out is not None:
            inside = torch.nonzero((leave_out >= first) & (leave_out < first + d.shape[1])).flatten()
            d[inside, leave_out[inside] - first] = torch.inf
        nearest, at = d.min(dim=1)
        index, best = torch.where(nearest < best, at + first, index), torch.minimum(nearest, best)
    return best.cpu(), index.cpu()


def flat(images):
    """(N, ...) -> (N, D) float64 on the CPU."""
    return torch.as_tensor(images if torch.is_tensor(images) else np.array(images)).cpu().double().flatten(1)


def classifier(channels, num_classes, width=64):
    """A small network where nearest neighbours say little: pixels in [-1, 1] -> logits, of features by all but its last layer."""
    layer = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(layer(channels, width), layer(width, width), nn.MaxPool2d(2),
                         layer(width, 2 * width), layer(2 * width, 2 * width), nn.MaxPool2d(2), layer(2 * width, 4 * width),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes))


def train_classifier(images, labels, num_classes, device, epochs=6, batch=256, seed=0):
    """A classifier of images (N, C, H, W) uint8 and labels (N,), in eval mode."""
    torch.manual_seed(seed)
    net = classifier(images.shape[1], num_classes).to(device)
    images, labels = (torch.from_numpy(np.array(a)).to(device) for a in (images, labels))
    batch = min(batch, len(images))
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    order = torch.cat([torch.randperm(len(images))[:len(images) // batch * batch] for _ in range(epochs)])
    for rows in tqdm(order.view(steps, batch).to(device), desc="classifier", unit="step"):
        F.cross_entropy(net(images[rows].float() / 127.5 - 1), labels[rows]).backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    return net.eval()


@torch.no_grad()
def classify(net, images, batch=1000):
    """uint8 (N, C, H, W) -> the class of each, (N,) int64 on the CPU."""
    device, parts = next(net.parameters()).device, torch.from_numpy(np.array(images)).split(batch)
    return torch.cat([net(part.to(device).float() / 127.5 - 1).argmax(1).cpu() for part in parts])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (FidError, OSError, RuntimeError) as error:
        sys.exit(f"fid.py: {' '.join(str(error).split())}")
