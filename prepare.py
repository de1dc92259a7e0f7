"""
Raw images -> data/NAME/, the memory-mapped arrays that train.py reads.

    python prepare.py digits                          # 1,797 real 8x8 scans, in this repository
    python prepare.py shapes --size 32 --n 60000      # drawn here: 10 classes of coloured shapes
    python prepare.py folder SRC --size 64            # images of your own: one folder a class
    python prepare.py emoji emoji-datasource-*.tgz    # from npm packages: emoji.py says which
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
    train_images.npy, test_images.npy       (N, C, H, W) uint8, float16 or float32
    train_labels.npy, test_labels.npy       (N,) int64; all 0 where there are no classes
and a network's input is (image - mean) / std with the header's mean and std, one a channel.

Latents (kind "latents", with the VAE's name): a latent is drawn anew each epoch,
    z = mu + sigma * noise
from its stored posterior, (N, 2C, h, w) float16: C channels of mu, then C of sigma. The network's
input is (z - mean) / std. train_files.txt holds the file of each row.

left_out.txt says which files were left out and why, if any were.

Each command is one function below, with its options above it. A dataset of your own is one more.
"""

import argparse
import os
import sys
from functools import partial

import numpy as np
from tqdm import tqdm

from cifar10 import read_cifar10
from claims import LEFT_OUT, claim, clean_up_after, unfinished
from dataset import Writer, need_room, new_memory_map, write_left_out
from emoji import read_package, to_pixels
from files import HERE
from header import DataError
from images import Remarks, parallel, printable, readable, tell_left_out, try_square
from labels import choose_held_out, find_labelled, tell_notes
from options import Parser, run
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
    function.makes_dataset = True
    name = argument("--name", default=function.__name__, help="what it makes is data/NAME")
    overwrite = argument("--overwrite", action="store_true", help="replace a dataset of this name")
    return command(name(overwrite(function)))


def seed(text):
    if text.isdecimal() and int(text) < 2**63:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number from 0, below 2**63, not {text}")


with_seed = argument("--seed", type=seed, default=0, help="of all that is drawn at random")
with_held_out = argument(
    "--held-out",
    type=float,
    default=0.1,
    help="the share of the images that is held out, about the same of each class",
)


def check_held_out(share):
    if not 0 <= share < 1:
        raise DataError(f"--held-out must be in [0, 1), not {share:g}")


def data_path(name):
    """data/NAME. Raises DataError where no dataset can have this name."""
    if name != os.path.basename(name) or name in ("", ".", ".."):
        wanted = "it must be a plain folder name"
    elif name != printable(name):
        wanted = "it must have no line ends and no control characters"
    elif name.lower().endswith((".partial", ".replaced")):
        wanted = "it must not end in .partial or .replaced"
    else:
        return os.path.join("data", name)
    raise DataError(f"{name!r} cannot be a dataset's name: {wanted}")


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

    This needs twice the disk space of the finished dataset: step 1 keeps all images in scratch.npy.

    1. Read all images into scratch.npy, in a shuffled order. How many can be read is known only
       then, and must be known before the parts are made.
    2. Refuse a class that has lost all its images.
    3. Choose which images are held out.
    4. Copy the rows of the training part, then those of the held-out part.
    """
    channels = 1 if args.gray else 3
    shape = (channels, args.size, args.size)
    total = len(labelled.files)
    scratch = os.path.join(unfinished(args.path), "scratch.npy")
    need_room(args.path, 2 * total, shape)
    images = new_memory_map(scratch, (total, *shape), np.uint8)
    rng = np.random.default_rng(args.seed)
    order = rng.permutation(total)
    labels, unreadable = read_into(images, args, labelled, order)
    refuse_empty_classes(args.src, labelled, labels, unreadable)
    left_out = unreadable + labelled.left_out
    tell_left_out(left_out, os.path.join(args.path, LEFT_OUT))
    write_left_out(unfinished(args.path), left_out)

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
    """Raise DataError where all images of a class cannot be read. First print why, for each image:
    no file will say it."""
    lost = sorted(set(labelled.labels) - set(labels.tolist()))
    if not lost:
        return
    tell_left_out(unreadable, most=len(unreadable))
    if not len(labels):
        raise DataError(f"none of the {len(unreadable)} images in {src} can be read")
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

    # Versions of the packages have other categories. All pictures of an emoji get its last one.
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
            label = classes.index(category_of[picture.group])
            writer.set(place, to_pixels(picture, args.size), label)
        tell_left_out(left_out, os.path.join(args.path, LEFT_OUT))
        write_left_out(unfinished(args.path), left_out)
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


# ---- latents, and a look at what is there --------------------------------------------------------


@command
@argument("src", help="a folder or a .zip; one folder in it is one class")
@argument("dst", nargs="?", help="the folder to make (default: data/NAME)")
@argument("--size", type=int, required=True, help="pixels of a side; images are cut square")
@argument(
    "--name",
    help="what the header calls the dataset "
    "(default: im256 for --size 256, and with dst the last part of it)",
)
@argument(
    "--vae",
    help="the VAE: its name on the Hugging Face hub, or a folder of its files "
    "(default: stabilityai/sd-vae-ft-ema)",
)
@argument(
    "--vae-name",
    help="what the header calls the VAE: its name on the hub, where --vae is a folder "
    "(default: as --vae)",
)
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
    """Images -> latents of a VAE, on the GPUs of one machine.

    It has no --overwrite: what took hours is moved away by hand.
    """
    from latents import encode_images  # with torch, which takes seconds to import
    from vae import SD_VAE

    path = args.dst or data_path(args.name or f"im{args.size}")
    path = os.path.normpath(path)  # FOLDER/ is FOLDER
    name = args.name or os.path.basename(path)
    data_path(name)  # raises where it is no name
    data_path(os.path.basename(path))
    vae = args.vae or SD_VAE
    encode_images(
        args.src, path, name, args.size, vae, args.vae_name or vae, args.batch, args.measure
    )


@command
@argument("name", help="data/NAME, or a folder of data")
@argument("--src", help="where the images were that became latents, for a look at both")
@argument("--vae", help="where the VAE is (default: where the header says)")
@with_seed
def check(args):
    """Print what a folder of data holds, and draw some of it."""
    from check import check_dataset  # with torch, which takes seconds to import

    is_path = os.sep in args.name or os.path.exists(os.path.join(args.name, "header.json"))
    path = os.path.normpath(args.name) if is_path else data_path(args.name)
    check_dataset(path, args.src, args.vae, args.seed)


def refuse_ranks(command):
    """Raise UserError on every rank of several, and where the environment has only a part of what
    torchrun sets.

    All would write the same files. (If the first rank alone went on, torchrun would end it in the
    middle of its work, because the others have failed.)
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" and os.environ.get("RANK", "0") == "0":
        return
    from device import ranks_of_torchrun  # with torch, which takes seconds to import

    ranks = ranks_of_torchrun()[1]
    if ranks > 1:
        raise DataError(f"{command} takes one process: run it without torchrun")


def refuse_no_value(args):
    """Raise DataError where an option is given as --name=--, of which argparse makes []."""
    for name, value in vars(args).items():
        if value == []:
            option = name.replace("_", "-")
            raise DataError(f"--{option} must have a value, which is not --")


def main():
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
    if getattr(function, "makes_dataset", False):
        args.path = data_path(args.name)
    function(args)


if __name__ == "__main__":
    run(main)
