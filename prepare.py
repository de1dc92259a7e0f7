"""
Raw images -> data/NAME/, the memory-mapped arrays that train.py reads.

    python prepare.py digits                          # 1,797 real 8x8 scans, in this repository
    python prepare.py shapes [--size 32] [--n 60000]  # drawn here: 10 classes of coloured shapes
    python prepare.py folder SRC --size 64            # JPEG or PNG, one folder a class (or flat: no labels)
    python prepare.py cifar10 cifar-10-binary.tar.gz  # the binary version, from its authors' page
    python prepare.py imagenet SRC [DST] --size 256   # a folder of class folders -> latents of a VAE, in data/im256
    torchrun --nproc_per_node=8 prepare.py imagenet SRC --size 512   # the same command again goes on where it was
    python prepare.py check NAME [--src SRC]          # is data/NAME, or the folder NAME, what it should be? with a picture

Common options: --name NAME (data/NAME), --seed N. A folder of data holds
    header.json                             what it is and how it was made
    train_images.npy, test_images.npy       (N, C, H, W) uint8
    train_labels.npy, test_labels.npy       (N,) int64; all 0 where there are no classes
and a network's input is (image - mean) / std with the header's mean and std, one a channel. Latents (kind "latents",
with the VAE's name) are stored as posteriors, (N, 2C, h, w) float16, C means and C standard deviations, with
train_files.txt, the file of each row; the image in that formula is then mean + standard deviation * noise.
"""
import argparse
import ctypes
import json
import os
import shutil
import signal
import sys
import tarfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial

import numpy as np
from numpy.lib.format import open_memmap
from PIL import Image
from tqdm import tqdm

FORMAT = "tvm-data-1"
SD_VAE = "stabilityai/sd-vae-ft-ema"
HERE = os.path.dirname(os.path.abspath(__file__))
KEYS = ("format", "name", "shape", "dtype", "count", "num_classes", "class_counts", "mean", "std")   # of a header, at least


class DataError(Exception):
    """Something about the data, in one line for the user."""


class Parser(argparse.ArgumentParser):
    """Complains in one line, and takes no abbreviated options."""

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter})

    def error(self, message):
        sys.exit(f"{self.prog.split()[0]}: {' '.join(message.split())} (--help lists the options)")


# ---- the format ----------------------------------------------------------------------------------

def load_dataset(path):
    """The folder that this file wrote -> (header, {"train_images": ..., ...}), images memory-mapped.
    Raises DataError where the folder is missing, incomplete or not what its header says."""
    try:
        with open(os.path.join(path, "header.json")) as f:
            header = json.load(f)
    except FileNotFoundError:
        raise DataError(f"no data in {path}: python prepare.py makes it (see the top of prepare.py)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}/header.json: {error}") from None
    missing = [key for key in KEYS if not isinstance(header, dict) or key not in header]
    if missing or header["format"] != FORMAT:
        raise DataError(f"{path}/header.json is not a {FORMAT} header" + f": no {', '.join(missing)}" * bool(missing))
    numbers = lambda a, n, least: isinstance(a, list) and len(a) == n and all(type(x) in (int, float) and least <= x < np.inf for x in a)
    channels = header["shape"][0] if numbers(header["shape"], 3, 1) else None
    for key, right in (("shape", channels), ("mean", numbers(header["mean"], channels, -np.inf)), ("std", numbers(header["std"], channels, 1e-30)),
                       ("count", isinstance(header["count"], dict) and numbers([header["count"].get(split) for split in ("train", "test")], 2, 0)),
                       ("class_counts", numbers(header["class_counts"], header["num_classes"], 0))):
        if not right:
            raise DataError(f"{path}/header.json: {key} {header[key]!r} does not belong to {FORMAT} data")
    arrays = {}
    for split in ("train", "test"):
        n = header["count"][split]
        rows = n + header.get("skipped", 0) * ("vae" in header and split == "train")     # the skipped ones' are at the end
        expected = {"images": (rows, channels * (1 + ("vae" in header)), *header["shape"][1:]), "labels": (rows,)}
        for kind, shape in expected.items():
            name = f"{split}_{kind}"
            file = os.path.join(path, name + ".npy")
            try:
                a = np.load(file, mmap_mode="r" if kind == "images" else None, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"cannot read {file}: {error}") from None
            dtype = header["dtype"] if kind == "images" else "int64"
            if a.shape != shape or a.dtype != dtype:
                raise DataError(f"{file} holds {a.dtype} {a.shape}, but its header says {dtype} {shape}")
            arrays[name] = a[:n]
        labels, top = arrays[f"{split}_labels"], max(1, header["num_classes"])
        if len(labels) and not 0 <= labels.min() <= labels.max() < top:
            raise DataError(f"{path}/{split}_labels.npy: a label outside 0 to {top - 1}")
    return header, arrays


def need_room(path, count, shape, dtype=np.uint8):
    """Raises DataError where the disk lacks room for so many arrays: a memory map would end the process, without a word."""
    need, free = count * int(np.prod(shape)) * np.dtype(dtype).itemsize, shutil.disk_usage(os.path.dirname(path) or ".").free
    if need > free:
        raise DataError(f"{path} takes {need / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB left")


class Writer:
    """Arrays of a known count into NAME.partial, which becomes NAME when all of them are there."""

    def __init__(self, path, shape, count, dtype=np.uint8, begun=False, lock=None):
        """shape: (C, H, W) of an image as it is stored. count: {"train": N, "test": M}. begun: go on with NAME.partial. lock: that
        of NAME.partial, where the caller holds it."""
        from checkpoint import hold
        self.path, self.partial, self.count, self.shape, self.dtype = path, path + ".partial", count, shape, np.dtype(dtype)
        if os.path.exists(path) and not os.path.exists(os.path.join(path, "header.json")):
            raise DataError(f"{path} exists and is not a dataset of prepare.py: move it away, or choose another --name")
        self.lock = lock or hold(self.partial, 0)
        if not begun:
            for name in set(os.listdir(self.partial)) - {"lock"}:          # what an interrupted run left
                os.remove(os.path.join(self.partial, name))
            need_room(path, sum(count.values()), shape, dtype)
        self.arrays = {}
        for split, n in count.items():
            for kind, kind_dtype, item in (("images", dtype, shape), ("labels", np.int64, ())):
                file = os.path.join(self.partial, f"{split}_{kind}.npy")
                if n:
                    if begun:                                              # raises where the file was cut off, which "r+" would fill up
                        np.load(file, mmap_mode="r")
                    self.arrays[f"{split}_{kind}"] = open_memmap(file, "r+" if begun else "w+", kind_dtype, (n, *item))
                else:                                                      # a memory map cannot be empty
                    np.save(file, np.zeros((0, *item), kind_dtype))

    def set(self, i, image, label):
        """Image i (C, H, W) of the whole set: the train split first, then the test split."""
        split, i = ("train", i) if i < self.count["train"] else ("test", i - self.count["train"])
        self.arrays[f"{split}_images"][i], self.arrays[f"{split}_labels"][i] = image, label

    def finish(self, name, class_names, **about):
        num_classes = len(class_names)
        counts = np.bincount(self.arrays["train_labels"][:self.count["train"]], minlength=num_classes)[:num_classes]
        header = dict(format=FORMAT, name=name, kind="images", shape=list(self.shape), dtype=self.dtype.name, count=self.count,
                      num_classes=num_classes, class_names=list(class_names), class_counts=counts.tolist(),
                      mean=[127.5] * self.shape[0], std=[127.5] * self.shape[0]) | about
        for name in list(self.arrays):
            self.arrays.pop(name).flush()                                  # and closed, or Windows would not rename
        with open(os.path.join(self.partial, "header.json"), "w") as f:
            json.dump(header, f, indent=1)
        if os.path.exists(self.path):
            shutil.rmtree(self.path)
        self.lock.close(), os.remove(self.lock.name)
        os.rename(self.partial, self.path)
        print(f"{self.path}: {self.count['train']} training and {self.count['test']} held-out {header['kind']}, "
              f"{'x'.join(map(str, header['shape']))}, {num_classes or 'no'} classes")
        if skipped := header.get("skipped"):
            print(f"{skipped} of {sum(self.count.values()) + skipped} images could not be read and were skipped")


def parallel(f, items, what):
    """f over items in all cores, in order, with a progress bar."""
    workers = min(61, os.cpu_count() or 1)                                 # as many as Windows takes
    chunk = max(1, min(256, len(items) // (4 * workers)))
    with ProcessPoolExecutor(workers, initializer=end_with_parent, initargs=(0,)) as pool:
        yield from tqdm(pool.map(f, items, chunksize=chunk), total=len(items), desc=what, unit="img")


# ---- the datasets --------------------------------------------------------------------------------

def digits(args):
    with np.load(os.path.join(HERE, "assets", "digits.npz"), allow_pickle=False) as f:
        images, labels = f["images"], f["labels"].astype(np.int64)
    images = np.round(images[:, None] * (255 / 16)).astype(np.uint8)       # 17 levels of ink
    writer = Writer(args.path, (1, 8, 8), {"train": 1437, "test": 360})
    for place, i in enumerate(np.random.default_rng(args.seed).permutation(len(images))):
        writer.set(place, images[i], labels[i])
    writer.finish(args.name, [str(c) for c in range(10)], license="CC BY 4.0",
                  source="UCI Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak), test set",
                  made_by=f"prepare.py digits --seed {args.seed}")


def shapes(args):
    if args.n < 10 or args.size < 8:
        raise DataError(f"shapes: at least 10 images of at least 8 pixels, not {args.n} of {args.size}")
    held_out = min(10000, args.n // 6)
    writer = Writer(args.path, (3, args.size, args.size), {"train": args.n, "test": held_out})
    for i, image in enumerate(parallel(partial(draw_shape, size=args.size, seed=args.seed), range(args.n + held_out), "shapes")):
        writer.set(i, image, i % 10)
    writer.finish(args.name, SHAPES, license="none needed", source="drawn by prepare.py",
                  made_by=f"prepare.py shapes --size {args.size} --n {args.n} --seed {args.seed}")


def draw_shape(i, size=32, seed=0):
    """Image i, (3, size, size) uint8, of class i % 10: one bright shape of random colour, place, size and
    angle on a background that shades from one dark colour to another. A function of (i, size, seed)."""
    rng = np.random.Generator(np.random.Philox(key=[seed, i]))
    scale, angle = rng.uniform(0.32, 0.44), rng.uniform(-np.pi / 6, np.pi / 6)
    cx, cy = rng.uniform(scale, 1 - scale, 2)
    pixels = (np.arange(size) + 0.5) / size
    X, Y = np.meshgrid(pixels, pixels)
    x, y = (X - cx) / scale, (Y - cy) / scale
    x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    ink = np.clip(0.5 - [*SHAPES.values()][i % 10](x, y) * scale * size, 0, 1)  # one pixel of soft edge

    near, far = rng.uniform(0, 0.45, (2, 3, 1, 1))
    colour, turn = rng.uniform(0.5, 1, (3, 1, 1)), rng.uniform(0, 2 * np.pi)
    slope = np.clip(0.5 + (X - 0.5) * np.cos(turn) + (Y - 0.5) * np.sin(turn), 0, 1)
    background = near * (1 - slope) + far * slope
    return np.round(255 * (background * (1 - ink) + colour * ink)).astype(np.uint8)


def star(x, y):
    """One tip's edge, folded five times."""
    r, a = np.hypot(x, y), np.abs(np.mod(np.arctan2(y, x), 2 * np.pi / 5) - np.pi / 5)      # a: pi/5 at a tip, 0 in a notch
    px, py = r * np.cos(np.pi / 5 - a), r * np.sin(np.pi / 5 - a)
    edge = 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)]) - [1, 0]                 # from the tip to the notch
    return ((px - 1) * edge[1] - py * edge[0]) / np.hypot(*edge)


along = lambda x, y, angle: x * np.cos(angle) + y * np.sin(angle)            # one direction
box = lambda x, y, a, b: np.maximum(np.abs(x) - a, np.abs(y) - b)
SHAPES = {  # about the distance of (x, y) to a shape's edge, negative inside; each shape reaches about 1 from the origin
    "disk": lambda x, y: np.hypot(x, y) - 0.85,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.2,
    "half disk": lambda x, y: np.maximum(np.hypot(x, y + 0.4) - 1, -0.4 - y),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.8 - np.hypot(x - 0.45, y)),
    "square": lambda x, y: box(x, y, 0.75, 0.75),
    "bar": lambda x, y: box(x, y, 1, 0.3),
    "triangle": lambda x, y: np.max([along(x, y, 2 * np.pi * j / 3) for j in range(3)], axis=0) - 0.5,
    "star": star,
    "cross": lambda x, y: np.minimum(box(x, y, 1, 0.28), box(x, y, 0.28, 1)),
    "arrow": lambda x, y: np.minimum(box(x + 0.5, y, 0.5, 0.22), np.maximum(                # its shaft and its head
        -x, np.maximum(along(x, y, np.pi / 4), along(x, y, -np.pi / 4)) - 0.68))}


def cifar10(args):
    images, labels, count = [], [], {"train": 0, "test": 0}
    try:
        with tarfile.open(args.file) as tar:
            members = {os.path.basename(m.name): m for m in tar if m.isfile() and m.size < 2 ** 28}
            names = tar.extractfile(members["batches.meta.txt"]).read().decode().split()
            for batch in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
                raw = np.frombuffer(tar.extractfile(members[batch]).read(), np.uint8)
                if not len(raw) or len(raw) % 3073:
                    raise DataError(f"{args.file}: {batch} holds {len(raw)} bytes, not a multiple of 3,073")
                raw = raw.reshape(-1, 3073)
                count["test" if batch == "test_batch.bin" else "train"] += len(raw)
                labels.append(raw[:, 0]), images.append(raw[:, 1:].reshape(-1, 3, 32, 32))
    except KeyError as error:
        raise DataError(f"{args.file}: no {error.args[0]} in it; is it the binary version?") from None
    except (OSError, tarfile.TarError, zlib.error, EOFError, ValueError) as error:
        raise DataError(f"cannot read {args.file}: {error}") from None
    writer = Writer(args.path, (3, 32, 32), count)
    for i, (image, label) in enumerate(zip(np.concatenate(images), np.concatenate(labels))):
        writer.set(i, image, label)
    writer.finish(args.name, names, license="see the source", made_by="prepare.py cifar10",
                  source="CIFAR-10 (A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009)")


def list_images(src):
    """The images in a folder -> (class names, [(file, label)]), both sorted; no class names where the folder is flat."""
    if not os.path.isdir(src):
        raise DataError(f"no folder {src}")
    is_image = lambda file: file.lower().endswith((".jpg", ".jpeg", ".png"))
    below = lambda folder: [os.path.join(at, file) for at, _, names in sorted(os.walk(folder)) for file in sorted(names) if is_image(file)]
    classes = {d.name: files for d in sorted(os.scandir(src), key=lambda d: d.name) if d.is_dir() and (files := below(d.path))}
    files = [(file, label) for label, files in enumerate(classes.values()) for file in files]
    flat = [os.path.join(src, file) for file in sorted(os.listdir(src)) if is_image(file)]
    if files and flat:
        raise DataError(f"{src} holds images beside its class folders: which label should they have?")
    if not files and not flat:
        raise DataError(f"no .jpg, .jpeg or .png file in {src}")
    return list(classes), files or [(file, 0) for file in flat]


def folder(args):
    if not 0 <= args.held_out < 1 or args.size < 1:
        raise DataError(f"--size must be at least 1 and --held-out in [0, 1), not {args.size} and {args.held_out:g}")
    classes, files = list_images(args.src)
    files = [files[i] for i in np.random.default_rng(args.seed).permutation(len(files))]

    # Which files are whole is known only once they are read: they go into one array, then into the two splits.
    os.makedirs(os.path.dirname(args.path) or ".", exist_ok=True)
    raw = args.path + ".raw.npy"
    need_room(raw, 2 * len(files), (3, args.size, args.size))              # and as much again for the splits
    everything = open_memmap(raw, "w+", np.uint8, (len(files), 3, args.size, args.size))
    labels = []
    try:
        for image, (file, label) in zip(parallel(partial(read_image, size=args.size), [f for f, _ in files], "images"), files):
            if isinstance(image, str):
                tqdm.write(f"skipped {file}: {image}", file=sys.stderr)
            else:
                everything[len(labels)] = image
                labels.append(label)
        if not labels:
            raise DataError(f"none of the {len(files)} images in {args.src} can be read")
        test = int(len(labels) * args.held_out)
        writer = Writer(args.path, (3, args.size, args.size), {"train": len(labels) - test, "test": test})
        for i, label in enumerate(labels):
            writer.set(i, everything[i], label)
    finally:
        del everything
        os.remove(raw)
    writer.finish(args.name, classes, license="yours", source="a folder of images", skipped=len(files) - len(labels),
                  made_by=f"prepare.py folder --size {args.size} --held-out {args.held_out} --seed {args.seed}")


def read_image(file, size):
    """The middle of an image, (3, size, size) uint8; or, where it cannot be read, the reason as a string."""
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:           # of others, PostScript is a program, which would run
            if max(image.size) > 100 * min(image.size):                    # which the crop would first make gigabytes long
                return f"{image.width}x{image.height} is too long and thin"
            if image.mode.startswith("I"):                                 # 16-bit gray, which Pillow would clip
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            return np.asarray(centre_crop(image.convert("RGB"), size)).transpose(2, 0, 1)
    except Exception as error:                                             # Pillow raises many kinds
        return f"{type(error).__name__}: {error}".splitlines()[0]


def centre_crop(image, size):
    """The usual crop for ImageNet (ADM's): halve with a box filter while twice too large, resize the
    short side to `size` with a bicubic one, and take the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ---- latents -------------------------------------------------------------------------------------

def read_batch(files, size):
    return [read_image(file, size) for file in files]


def end_with_parent(_):
    """In a loader's worker: what kills a rank kills its workers, which would else block on what they cannot hand over."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)                         # PR_SET_PDEATHSIG


def imagenet(args):
    """File i of SRC, in sorted order, becomes row i of the arrays in DST.partial; done.npy says which rows are there
    (1) or cannot be (2). So ranks share the work, and a killed run goes on. Batches are always the same, hence the result."""
    import torch.distributed as dist
    from torch.cuda import is_available
    from torch.utils.data import DataLoader

    from checkpoint import hold, written
    from vae import PUBLISHED, encode, latent_moments, load_vae
    rank, ranks, local = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if ranks != int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        raise DataError("imagenet takes the GPUs of one machine: its ranks write into one memory map")
    if os.path.exists(args.path):
        raise DataError(f"{args.path} is there already: move it away to make it again")
    vae = load_vae(args.vae, f"cuda:{local}" if is_available() else "cpu")
    if args.size < 1 or args.size % vae.shrinks or args.batch < 0:
        raise DataError(f"--size must be a multiple of {vae.shrinks}, as this VAE shrinks, and --batch at least 1, not {args.size} and {args.batch}")
    C, side, batch = vae.config.latent_channels, args.size // vae.shrinks, args.batch or max(1, 2 ** 22 // args.size ** 2)
    classes, files = list_images(args.src)
    names = [file[len(args.src):].lstrip(os.sep) for file, _ in files]
    plan = dict(image_size=args.size, batch=batch, vae=args.vae_name or args.vae, vae_crc32=vae.crc32, class_names=classes,
                files_crc32=f"{zlib.crc32(os.fsencode(chr(10).join(names))):08x}")
    at = lambda file: os.path.join(args.path + ".partial", file)
    barrier = dist.barrier if ranks > 1 else lambda: None
    if ranks > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))         # torchrun ends all ranks when one of them ends
    complaint = [None]
    if rank == 0:
        try:
            lock, begun = hold(at(""), 10), json.load(open(at("plan.json"))) if os.path.exists(at("plan.json")) else {}
            if os.path.exists(args.path):                                  # since the look above
                if not begun:
                    shutil.rmtree(at(""))                                  # hold made it
                raise DataError(f"{args.path} is there already: another run made it")
            if differ := [key for key in plan if begun.get(key, plan[key]) != plan[key]]:
                raise DataError(f"{at('')} was begun with another {' and another '.join(differ)}: delete it to start over")
            writer = Writer(args.path, (2 * C, side, side), {"train": len(files), "test": 0}, np.float16, bool(begun), lock)
            if not begun:
                writer.arrays["train_labels"][:] = [label for _, label in files]
                writer.arrays["train_labels"].flush()
                with written(at("done.npy")) as f:
                    np.save(f, np.zeros(len(files), np.uint8))
                with written(at("plan.json")) as f:                        # last: with it, all of them are there
                    f.write(json.dumps(plan).encode())
        except (DataError, OSError, ValueError, AttributeError) as error:
            complaint = [str(error) if isinstance(error, DataError) else f"cannot write {args.path}: {error}"]
    if ranks > 1:
        dist.broadcast_object_list(complaint)
    if complaint[0]:
        raise DataError(complaint[0])
    stored, done = (np.load(at(file), mmap_mode="r+") for file in ("train_images.npy", "done.npy"))
    mine = [np.arange(first, min(first + batch, len(files))) for first in range(rank * batch, len(files), ranks * batch)]
    mine = [rows for rows in mine if not done[rows].all()]
    loader = DataLoader([file for file, _ in files], batch_sampler=mine, collate_fn=partial(read_batch, size=args.size),
                        num_workers=max(1, (os.cpu_count() or 1) // ranks), worker_init_fn=end_with_parent)
    with tqdm(total=len(files), initial=np.count_nonzero(done), desc="encoding", unit="img", disable=rank > 0) as bar:
        for rows, images in zip(mine, loader):
            whole = np.array([not isinstance(image, str) for image in images])
            for i in np.flatnonzero(~whole):
                tqdm.write(f"skipped {names[rows[i]]}: {images[i]}", file=sys.stderr)
            if whole.any():
                stored[rows[whole]] = encode(vae, np.stack([images[i] for i in np.flatnonzero(whole)]))
                stored.flush()
            done[rows] = np.where(whole, 1, 2)
            bar.update(np.count_nonzero(done) - bar.n)
    barrier()
    if rank > 0:
        return

    # Rows from the end take the places of those that cannot be: again with the same result, should it end here.
    n = writer.count["train"] = int(np.count_nonzero(done == 1))
    if not n:
        raise DataError(f"none of the {len(files)} images in {args.src} can be read")
    to, source, names = np.flatnonzero(done[:n] == 2), n + np.flatnonzero(done[n:] == 1), np.array(names, object)
    for a in (stored, writer.arrays["train_labels"], names):
        a[to] = a[source]
    with open(at("train_files.txt"), "w", encoding="utf-8", errors="surrogateescape") as f:
        f.writelines(f"{name}\n" for name in names[:n])
    known = plan["vae"] == SD_VAE and args.size in PUBLISHED
    mean, std = PUBLISHED[args.size] if known else latent_moments(stored[:n])
    del stored, done, a                                                    # or Windows would not rename
    writer.finish(args.name, **plan, kind="latents", shape=[C, side, side], mean=mean, std=std, skipped=len(files) - n,
                  normalization="published" if known else "measured", license="yours", source="a folder of images",
                  made_by=f"prepare.py imagenet --size {args.size} --batch {batch}")
    for name in ("done.npy", "plan.json"):
        os.remove(os.path.join(args.path, name))


def check(args):
    """Prints what a folder of data holds and draws eight of its images; raises DataError where something is wrong."""
    from torch import from_numpy

    from vae import decode, latent_moments, load_vae
    header, data = load_dataset(args.path)
    stored, latent, classes, wrong = data["train_images"], "vae" in header, header["num_classes"], []
    counts = np.bincount(data["train_labels"], minlength=classes)[:classes]
    print(f"{args.path}: {len(stored)} {header.get('kind', 'images')}, {'x'.join(map(str, header['shape']))}, "
          + (f"{classes} classes of {counts.min()} to {counts.max()}" if classes else "no classes"))
    if counts.tolist() != header["class_counts"] or 0 in counts:
        wrong.append("a class is empty, or the header's class_counts are not those of the labels")
    rows = np.random.default_rng(args.seed).permutation(len(stored))[:max(8, 2 ** 27 // stored[0].size)]
    x = np.float32(stored[np.sort(rows)])
    if flat := np.count_nonzero(np.ptp(x.reshape(len(x), -1), axis=1) == 0):
        wrong.append(f"{flat} of {len(x)} images have one value everywhere")
    moments = latent_moments(x) if latent else [f(x, axis=(0, 2, 3), dtype=np.float64) for f in (np.mean, np.std)]
    for c, (mean, std, m, sd) in enumerate(zip(*moments, header["mean"], header["std"])):
        mean, std = (mean - m) / sd, std / sd
        print(f"channel {c}, normalized: mean {mean:.3f}, std {std:.3f}")
        if not (abs(mean) < 0.1 and abs(std - 1) < 0.1 if latent else std > 0.01):
            wrong.append(f"channel {c} has mean {mean:.3g} and std {std:.3g}" + ", not about 0 and 1" * latent)
    sheet = [stored[rows[:8]].transpose(0, 2, 3, 1)]
    if latent:
        vae = load_vae(args.vae or header["vae"], crc32=header.get("vae_crc32"))
        sheet = [decode(vae, from_numpy(stored[rows[:8], :header["shape"][0]]))]
    if latent and args.src:
        with open(os.path.join(args.path, "train_files.txt"), encoding="utf-8", errors="surrogateescape") as f:
            files = f.read().split("\n")
        if len(files) != len(stored) + 1 or "image_size" not in header:
            raise DataError(f"{args.path}/train_files.txt is not whole, or header.json lacks its image_size")
        originals = read_batch([os.path.join(args.src, files[row]) for row in rows[:8]], header["image_size"])
        if lost := [image for image in originals if isinstance(image, str)]:
            raise DataError(f"an original in {args.src} cannot be read: {lost[0]}")
        sheet.insert(0, np.stack(originals).transpose(0, 2, 3, 1))
        print(f"decoded images differ from their originals by {np.abs(np.float32(sheet[0]) - sheet[1]).mean():.1f} of 255 levels in the mean")
    sheet = np.concatenate([np.concatenate(images, axis=1) for images in sheet])
    Image.fromarray(np.broadcast_to(sheet, (*sheet.shape[:2], 3))).save(os.path.join(args.path, "check.png"))
    print(f"{args.path}/check.png: {'originals over ' * bool(latent and args.src)}{'decoded ' * latent}examples")
    if wrong:
        raise DataError(f"{args.path}: {'; '.join(wrong)}")


def main():
    parser = Parser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for make in (digits, shapes, folder, cifar10, imagenet, check):
        p = kinds.add_parser(make.__name__)
        p.set_defaults(make=make)
        p.add_argument("name" if make is check else "--name", default=None if make is imagenet else make.__name__,
                       help="data/NAME" + ", or a folder of data" * (make is check))
        p.add_argument("--seed", type=int, default=0)
        if make is shapes:
            p.add_argument("--size", type=int, default=32)
            p.add_argument("--n", type=int, default=60000, help="training images; a sixth as many are held out")
        if make in (folder, imagenet):
            p.add_argument("src")
            p.add_argument("--size", type=int, required=True)
        if make is folder:
            p.add_argument("--held-out", type=float, default=0.1, help="the share of images that is held out")
        if make is cifar10:
            p.add_argument("file")
        if make is imagenet:
            p.add_argument("dst", nargs="?", help="where to write (default: data/im256 for --size 256)")
            p.add_argument("--vae-name", help="what the header calls it (default: as --vae does)")
            p.add_argument("--batch", type=int, default=0, help="of the VAE (default: 64 images of 256 x 256, fewer larger ones)")
        if make in (imagenet, check):
            p.add_argument("--vae", help="a name on the Hugging Face hub, or a folder of that VAE's files", default=SD_VAE if make is imagenet else None)
        if make is check:
            p.add_argument("--src", help="where the images were that became latents, for a look at both")
    args = parser.parse_args()
    if args.make is imagenet:
        args.dst = args.dst or os.path.join("data", args.name or f"im{args.size}")
        args.name = args.name or os.path.basename(os.path.normpath(args.dst))
    if args.make is check and (os.sep in args.name or os.path.exists(os.path.join(args.name, "header.json"))):      # made with a DST
        args.dst, args.name = args.name, os.path.basename(os.path.normpath(args.name))
    if args.name != os.path.basename(args.name) or args.name in ("", ".", ".."):
        parser.error(f"--name names a folder in data/, which {args.name!r} does not")
    if not 0 <= args.seed < 2 ** 63:
        parser.error(f"--seed must be at least 0 and below 2**63, not {args.seed}")
    args.path = os.path.normpath(getattr(args, "dst", None) or os.path.join("data", args.name))          # FOLDER/ is FOLDER
    try:
        args.make(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except (DataError, OSError, RuntimeError, ValueError) as error:         # the last two: of torch, of a damaged .npy
        sys.exit(f"prepare.py: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
