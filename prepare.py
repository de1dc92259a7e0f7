"""
Raw images -> data/NAME/, the memory-mapped arrays that train.py reads.

    python prepare.py digits                          # 1,797 real 8x8 scans, in this repository
    python prepare.py shapes --size 32 --n 60000      # drawn here: 10 classes of coloured shapes
    python prepare.py folder SRC --size 64            # images of your own: one folder a class
    python prepare.py emoji emoji-datasource-*.tgz    # of npm packages: emoji.py says which
    python prepare.py cifar10 cifar-10-python.tar.gz  # from its authors' page; or the binary one
    python prepare.py imagenet SRC --size 256         # images -> latents of a VAE, in data/im256
    torchrun --nproc_per_node=8 prepare.py imagenet SRC --size 512
    python prepare.py check NAME [--src SRC]          # is data/NAME what it should be? a picture

`python prepare.py folder --help` lists the options of `folder`, and so on. SRC is a folder or a
.zip. images.py says what counts as an image, and how one is read; labels.py, which label it has.
A folder without class folders gives data without labels. An imagenet command that was interrupted
goes on where it was when it is given again.

A folder of data holds
    header.json                             what it is and how it was made
    train_images.npy, test_images.npy       (N, C, H, W) uint8
    train_labels.npy, test_labels.npy       (N,) int64; all 0 where there are no classes
and a network's input is (image - mean) / std with the header's mean and std, one a channel.

Latents (kind "latents", with the VAE's name) are stored as posteriors, (N, 2C, h, w) float16:
C means and C standard deviations. The image in that formula is then mean + standard deviation *
noise. train_files.txt holds the file of each row. left_out.txt says which files were left out.

Each command is one function below, with its options above it. A dataset of your own is one more.
"""

import argparse
import io
import os
import sys
import tarfile
import zlib
from functools import partial

import numpy as np
from tqdm import tqdm

from dataset import (
    LEFT_OUT,
    DataError,
    Writer,
    claim,
    clean_up_after,
    need_room,
    new_memory_map,
    write_left_out,
)
from emoji import read_package, to_pixels
from files import HERE
from images import Remarks, parallel, printable, readable, tell_left_out, try_square
from labels import choose_held_out, find_labelled, tell_notes
from options import Parser, run
from pickles import RefusedPickle, load_arrays
from shapes import SHAPES, draw_shape

# ---- commands ------------------------------------------------------------------------------------

COMMANDS = {}


def command(function):
    """Decorator: a function of args becomes a command of this script."""
    COMMANDS[function.__name__] = function
    return function


def argument(*names, **about):
    """Decorator: an argument of a command, as argparse's add_argument takes it."""

    def declare(function):
        declared = getattr(function, "arguments", [])
        function.arguments = [(names, about), *declared]  # decorators are applied from below
        return function

    return declare


def new_dataset(function):
    """Decorator: a command that makes args.path, which is data/NAME, and has the usual options."""
    name = argument("--name", default=function.__name__, help="what it makes is data/NAME")
    overwrite = argument("--overwrite", action="store_true", help="replace a dataset of this name")
    return command(name(overwrite(function)))


def seed(text):
    if text.isdecimal() and int(text) < 2**63:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number from 0, below 2**63, not {text}")


with_seed = argument("--seed", type=seed, default=0, help="of all that is drawn at random")
with_held_out = argument(
    "--held-out", type=float, default=0.1, help="the share of each class that is held out"
)


def check_held_out(share):
    if not 0 <= share < 1:
        raise DataError(f"--held-out must be in [0, 1), not {share:g}")


def data_path(name):
    """data/NAME. Raises DataError where no dataset can have this name."""
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise DataError(f"--name names a folder in data/, which {name!r} does not")
    if name != printable(name):
        raise DataError(f"--name must have no line ends and no control characters, not {name!r}")
    if name.lower().endswith((".partial", ".replaced")):
        raise DataError(f"--name must not end in .partial or .replaced, as {name!r} does")
    return os.path.join("data", name)


# ---- digits and shapes ---------------------------------------------------------------------------


@new_dataset
@with_seed
def digits(args):
    """The digits of this repository, 8x8 gray."""
    with np.load(os.path.join(HERE, "assets", "digits.npz"), allow_pickle=False) as f:
        ink = f["images"]  # (1797, 8, 8), 0 to 16
        labels = f["labels"].astype(np.int64)
    images = np.round(ink[:, None] * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(args.seed).permutation(len(images))
    count = {"train": 1437, "test": 360}
    source = "UCI Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak), test set"
    with Writer(args.path, (1, 8, 8), count, overwrite=args.overwrite) as writer:
        for place, i in enumerate(order):
            writer.set(place, images[i], labels[i])
        writer.finish(
            args.name,
            [str(digit) for digit in range(10)],
            license="CC BY 4.0",
            source=source,
            made_by=f"prepare.py digits --seed {args.seed}",
        )


@new_dataset
@with_seed
@argument("--size", type=int, default=32, help="pixels of a side")
@argument("--n", type=int, default=60000, help="training images; a sixth as many are held out")
def shapes(args):
    """Ten classes of coloured shapes, drawn here."""
    if args.n < 10 or args.size < 8:
        raise DataError(
            f"shapes: at least 10 images of at least 8 pixels, not {args.n} of {args.size}"
        )
    count = {"train": args.n, "test": min(10000, args.n // 6)}
    shape = (3, args.size, args.size)
    image_of = partial(draw_shape, size=args.size, seed=args.seed)
    with Writer(args.path, shape, count, overwrite=args.overwrite) as writer:
        images = parallel(image_of, range(sum(count.values())), "shapes")
        for i, image in enumerate(images):
            writer.set(i, image, i % 10)
        writer.finish(
            args.name,
            list(SHAPES),
            license="none needed",
            source="drawn by prepare.py",
            made_by=f"prepare.py shapes --size {args.size} --n {args.n} --seed {args.seed}",
        )


# ---- a folder of images --------------------------------------------------------------------------


@new_dataset
@with_seed
@argument("src", help="a folder or a .zip; one folder in it is one class")
@argument("--size", type=int, required=True, help="pixels of a side; images are cut square")
@with_held_out
@argument("--gray", action="store_true", help="one channel instead of three")
def folder(args):
    """Images of your own, cropped and resized."""
    if args.size < 1:
        raise DataError(f"--size must be at least 1, not {args.size}")
    check_held_out(args.held_out)
    labelled = find_labelled(args.src)
    tell_notes(labelled)
    lock = claim(args.path, args.overwrite)
    try:
        write_folder(args, labelled, lock)
    except BaseException as error:
        clean_up_after(error, args.path, lock)
        raise


def write_folder(args, labelled, lock):
    """Read the images, split them, and write both parts.

    Which images can be read is known only once they are, and how many a part has must be known
    before it is written. So they go into one array first, in a seeded order.
    """
    channels = 1 if args.gray else 3
    shape = (channels, args.size, args.size)
    total = len(labelled.files)
    scratch = os.path.join(args.path + ".partial", "scratch.npy")
    need_room(args.path, 2 * total, shape)
    images = new_memory_map(scratch, (total, *shape), np.uint8)
    rng = np.random.default_rng(args.seed)
    order = rng.permutation(total)
    labels, unreadable = read_into(images, args, labelled, order)
    left_out = unreadable + labelled.left_out
    tell_left_out(left_out, os.path.join(args.path, LEFT_OUT))
    refuse_empty_classes(args.src, labelled, labels, unreadable)
    write_left_out(args.path + ".partial", left_out)

    held_out = choose_held_out(labels, args.held_out, rng)
    if args.held_out and not held_out.any():
        print(
            f"--held-out {args.held_out:g} of {len(labels)} images holds out none",
            file=sys.stderr,
        )
    count = {"train": int((~held_out).sum()), "test": int(held_out.sum())}
    writer = Writer(args.path, shape, count, lock=lock, overwrite=args.overwrite)
    rows = np.concatenate([np.flatnonzero(~held_out), np.flatnonzero(held_out)])
    for place, row in enumerate(rows):
        writer.set(place, images[row], labels[row])
    del images  # or Windows would not remove its file
    os.remove(scratch)
    how = f"--size {args.size} --held-out {args.held_out} --seed {args.seed}"
    if args.gray:
        how += " --gray"
    writer.finish(
        args.name,
        labelled.classes,
        license="yours",
        source="a folder of images",
        skipped=len(unreadable),
        made_by=f"prepare.py folder {how}",
    )


def read_into(images, args, labelled, order):
    """Read the files in this order into the first rows of `images`.

    Returns the labels of those rows, an array, and what cannot be read, [(name, reason)]. Says what
    a user may not expect: names that lie about the format, colour images that are gray.
    """
    read = partial(try_square, size=args.size, gray=args.gray)
    names = [labelled.names[i] for i in order]
    files = [labelled.files[i] for i in order]
    labels = []
    all_gray = True
    remarks = Remarks()
    attempts = parallel(read, files, "images")
    for place, pixels in readable(names, attempts, remarks):
        all_gray = all_gray and (pixels == pixels[:1]).all()
        images[len(labels)] = pixels
        labels.append(labelled.labels[order[place]])
    remarks.tell_misnamed()
    if labels and all_gray and not args.gray:
        print("all images are gray: --gray keeps one channel instead of three", file=sys.stderr)
    return np.array(labels, np.int64), sorted(remarks.unreadable)


def refuse_empty_classes(src, labelled, labels, unreadable):
    """Raise DataError where all images of a class cannot be read."""
    if not len(labels):
        raise DataError(f"none of the {len(unreadable)} images in {src} can be read")
    lost = sorted(set(labelled.labels) - set(labels.tolist()))
    if lost:
        name = labelled.classes[lost[0]]
        raise DataError(f"no image of class {name!r} in {src} can be read")


# ---- emoji ---------------------------------------------------------------------------------------


@new_dataset
@with_seed
@argument("files", nargs="+", help="emoji-datasource-VENDOR-VERSION.tgz, as npm pack leaves them")
@argument("--size", type=int, default=32, help="pixels of a side, at most 64")
@with_held_out
def emoji(args):
    """Emoji of npm packages, on white; a class is a category."""
    if not 1 <= args.size <= 64:
        raise DataError(f"--size must be at least 1 and at most 64, not {args.size}")
    check_held_out(args.held_out)
    packages = [read_package(file) for file in args.files]
    titles = [package.title for package in packages]
    if len(set(titles)) < len(titles):
        raise DataError("the same package is given twice")
    pictures = [picture for package in packages for picture in package.emoji]
    left_out = [file for package in packages for file in package.left_out]

    category_of = {picture.group: picture.category for picture in pictures}
    classes = sorted(set(category_of.values()))
    rng = np.random.default_rng(args.seed)
    groups = rng.permutation(sorted(category_of))
    labels = np.array([classes.index(category_of[group]) for group in groups])
    held_out = set(groups[choose_held_out(labels, args.held_out, rng)])
    train = [picture for picture in pictures if picture.group not in held_out]
    test = [picture for picture in pictures if picture.group in held_out]

    count = {"train": len(train), "test": len(test)}
    shape = (3, args.size, args.size)
    with Writer(args.path, shape, count, overwrite=args.overwrite) as writer:
        for place, picture in enumerate(tqdm(train + test, desc="emoji", unit="image")):
            writer.set(place, to_pixels(picture, args.size), classes.index(picture.category))
        tell_left_out(left_out, os.path.join(args.path, LEFT_OUT))
        write_left_out(args.path + ".partial", left_out)
        how = f"--size {args.size} --held-out {args.held_out} --seed {args.seed}"
        writer.finish(
            args.name,
            classes,
            license="; ".join(f"{package.title}: {package.license}" for package in packages),
            source="npm packages " + ", ".join(titles),
            made_by=f"prepare.py emoji {how}",
        )


# ---- CIFAR-10 ------------------------------------------------------------------------------------


@new_dataset
@argument("file", help="cifar-10-python.tar.gz or cifar-10-binary.tar.gz")
def cifar10(args):
    """CIFAR-10, from its authors' archive."""
    names, batches = read_cifar10(args.file)
    count = {"train": sum(len(labels) for _, labels in batches[:5]), "test": len(batches[5][1])}
    images = np.concatenate([images for images, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    source = "CIFAR-10 (A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009)"
    with Writer(args.path, (3, 32, 32), count, overwrite=args.overwrite) as writer:
        for i, (image, label) in enumerate(zip(images, labels)):
            writer.set(i, image, label)
        writer.finish(
            args.name,
            names,
            license="see the source",
            source=source,
            made_by="prepare.py cifar10",
        )


def read_cifar10(file):
    """The class names, and six batches (images (n, 3, 32, 32) uint8, labels (n,)): five to train
    on, then the test batch. Raises DataError."""
    try:
        with tarfile.open(file) as tar:
            members = {}
            for member in tar:
                if member.isfile() and member.size < 2**28:
                    members[os.path.basename(member.name)] = member
            is_python = "batches.meta" in members
            suffix = "" if is_python else ".bin"
            batch_names = [f"data_batch_{number}{suffix}" for number in range(1, 6)]
            batch_names.append(f"test_batch{suffix}")

            def content(name):
                return tar.extractfile(members[name]).read()

            if is_python:
                names = parse_python_names(content("batches.meta"))
                batches = [parse_python_batch(name, content(name)) for name in batch_names]
            else:
                names = content("batches.meta.txt").decode().split()
                batches = [parse_binary_batch(name, content(name)) for name in batch_names]
    except KeyError as error:
        raise DataError(
            f"{file}: no {error.args[0]} in it; is it cifar-10-python.tar.gz or "
            "cifar-10-binary.tar.gz?"
        ) from None
    except (DataError, RefusedPickle) as error:
        raise DataError(f"{file}: {error}") from None
    except (OSError, tarfile.TarError, zlib.error, EOFError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from None
    for batch_name, (_, labels) in zip(batch_names, batches):
        if labels.max() >= len(names):
            raise DataError(f"{file}: {batch_name} has a label {labels.max()} of {len(names)}")
    return names, batches


def parse_binary_batch(name, content):
    """Each image is one byte of label, then 3,072 bytes of pixels."""
    raw = np.frombuffer(content, np.uint8)
    if not len(raw) or len(raw) % 3073:
        raise DataError(f"{name} holds {len(raw)} bytes, not a multiple of 3,073")
    raw = raw.reshape(-1, 3073)
    return raw[:, 1:].reshape(-1, 3, 32, 32), raw[:, 0].astype(np.int64)


def parse_python_batch(name, content):
    """A pickle of Python 2, read without running it: a dict of pixels (n, 3072) and labels."""
    batch = load_arrays(content, encoding="bytes")
    is_batch = isinstance(batch, dict) and isinstance(batch.get(b"labels"), list)
    images = batch.get(b"data") if is_batch else None
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2:
        raise DataError(f"{name} is not a batch of CIFAR-10")
    labels = batch[b"labels"]
    if images.shape[1] != 3072 or len(labels) != len(images) or not labels:
        raise DataError(f"{name} holds pixels {images.shape} and {len(labels)} labels")
    if not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise DataError(f"{name} holds labels that are not whole numbers from 0")
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def parse_python_names(content):
    meta = load_arrays(content, encoding="bytes")
    names = meta.get(b"label_names") if isinstance(meta, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise DataError("batches.meta holds no label_names")
    return [name.decode(errors="replace") for name in names]


# ---- latents, and a look at what is there --------------------------------------------------------


@command
@argument("src", help="a folder or a .zip; one folder in it is one class")
@argument("dst", nargs="?", help="where to write (default: data/im256 for --size 256)")
@argument("--size", type=int, required=True, help="pixels of a side; images are cut square")
@argument("--name", help="what it is called (default: as the folder)")
@argument("--vae", help="a name on the Hugging Face hub, or a folder of that VAE's files")
@argument("--vae-name", help="what the header calls it (default: as --vae does)")
@argument(
    "--batch",
    type=int,
    default=0,
    help="of the VAE (default: 64 images of 256 x 256, fewer larger ones)",
)
@argument(
    "--measure",
    action="store_true",
    help="normalize with these latents' own mean and std, not ImageNet's published ones",
)
def imagenet(args):
    """Images -> latents of a VAE, on the GPUs of one machine."""
    import latents  # with torch, which takes seconds to import

    path = args.dst or data_path(args.name or f"im{args.size}")
    path = os.path.normpath(path)  # FOLDER/ is FOLDER
    name = args.name or os.path.basename(path)
    data_path(name)  # raises where it is no name
    data_path(os.path.basename(path))
    vae = args.vae or latents.SD_VAE
    latents.encode_images(
        args.src, path, name, args.size, vae, args.vae_name or vae, args.batch, args.measure
    )


@command
@argument("name", help="data/NAME, or a folder of data")
@argument("--src", help="where the images were that became latents, for a look at both")
@argument("--vae", help="where the VAE is (default: where the header says)")
@with_seed
def check(args):
    """Print what a folder of data holds, and draw some of it."""
    import latents  # with torch, which takes seconds to import

    is_path = os.sep in args.name or os.path.exists(os.path.join(args.name, "header.json"))
    path = os.path.normpath(args.name) if is_path else data_path(args.name)
    latents.check_dataset(path, args.src, args.vae, args.seed)


def refuse_ranks(command):
    """Raise UserError on all ranks of torchrun but the first, and where the environment has only a
    part of what torchrun sets."""
    if os.environ.get("WORLD_SIZE", "1") == "1" and os.environ.get("RANK", "0") == "0":
        return
    from device import ranks_of_torchrun  # with torch, which takes seconds to import

    rank = ranks_of_torchrun()[0]
    if rank:
        raise DataError(f"{command} takes one process: run it without torchrun")


def refuse_no_value(args):
    """Raise DataError where an option is given as --name=--, of which argparse makes []."""
    for name, value in vars(args).items():
        if value == []:
            option = name.replace("_", "-")
            raise DataError(f"--{option} must have a value, which is not --")


def main():
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a class name that it cannot show
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        about = (function.__doc__ or name).splitlines()[0]
        command_parser = commands.add_parser(name, help=about, description=about)
        for names, options in getattr(function, "arguments", []):
            command_parser.add_argument(*names, **options)
    args = parser.parse_args()
    function = COMMANDS[args.command]
    refuse_no_value(args)
    if function is not imagenet:
        refuse_ranks(args.command)
    if hasattr(args, "overwrite"):
        args.path = data_path(args.name)
    function(args)


if __name__ == "__main__":
    run(main)
