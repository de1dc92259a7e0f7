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
import os
import sys
import tarfile
import zlib
from functools import partial

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from dataset import DataError, Writer, need_room
from files import HERE
from images import list_images, parallel, read_image
from latents import SD_VAE, check, imagenet
from options import Parser
from shapes import SHAPES, draw_shape

# ---- the format ----------------------------------------------------------------------------------









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






# ---- latents -------------------------------------------------------------------------------------









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
