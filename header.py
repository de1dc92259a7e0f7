"""
header.json of a folder of data: what it holds, how it is checked, and what it says in words.

    header = load_header("data/digits")          # a dict, checked
    same_data(header, about["data"])             # is it what this checkpoint was trained on?
    describe("data/digits", header)              # one line of text
"""

import json
import math

from files import UserError
from images import printable

FORMAT = "tvm-data-1"
SPLITS = ("train", "test")
IMAGE_DTYPES = ("uint8", "float16", "float32")  # of stored images; samples are uint8 or float32


class DataError(UserError):
    """Something about the data, in one line for the user. Names in it are printable."""

    def __init__(self, reason):
        super().__init__(printable(reason))


def is_numbers(value, length, least=-math.inf, kinds=(int, float)):
    """Whether a header's value is a list of so many finite numbers, none smaller than `least`."""
    if not isinstance(value, list) or len(value) != length:
        return False
    for number in value:
        if type(number) not in kinds or not -1e300 < number < 1e300 or number < least:
            return False
    return True


def right_shape(header):
    shape = header["shape"]
    if not isinstance(shape, list) or len(shape) < 2:
        return False
    return is_numbers(shape, len(shape), least=1, kinds=(int,))


def right_dtype(header):
    return header["dtype"] in IMAGE_DTYPES


def right_count(header):
    count = header["count"]
    if not isinstance(count, dict):
        return False
    return is_numbers([count.get(split) for split in SPLITS], 2, least=0, kinds=(int,))


def right_num_classes(header):
    return type(header["num_classes"]) is int and header["num_classes"] >= 0


def right_class_counts(header):
    return is_numbers(header["class_counts"], header["num_classes"], least=0, kinds=(int,))


def right_mean(header):
    return is_numbers(header["mean"], header["shape"][0])


def right_std(header):
    return is_numbers(header["std"], header["shape"][0], least=1e-30)


def right_class_names(header):
    names = header["class_names"]
    if not isinstance(names, list) or len(names) not in (0, header["num_classes"]):
        return False
    return all(isinstance(name, str) for name in names)


def right_skipped(header):
    return is_numbers([header["skipped"]], 1, least=0, kinds=(int,))


def right_text(key):
    """A check that the value of a key is text."""
    return lambda header: isinstance(header[key], str)


# What a header holds at least, and how each value is checked, in this order.
CHECKS = {
    "name": right_text("name"),
    "shape": right_shape,  # [C, H, W]; of other data [C, ...]
    "dtype": right_dtype,
    "count": right_count,  # {"train": N, "test": M}
    "num_classes": right_num_classes,
    "class_counts": right_class_counts,  # of the train split
    "mean": right_mean,  # one a channel
    "std": right_std,
}

# What it may hold besides, and is checked where it does.
OPTIONAL_CHECKS = {
    "kind": right_text("kind"),  # "images" or "latents"; a word for what the data are
    "vae": right_text("vae"),  # of latents: the VAE's name
    "class_names": right_class_names,  # one a class, or none
    "skipped": right_skipped,  # how many images could not be read
    "train_crc32": right_text("train_crc32"),  # of train_images.npy and then train_labels.npy
}


def load_header(path):
    """The header of a folder of data. Raises DataError where it cannot be."""
    file = f"{path}/header.json"
    try:
        with open(file) as f:
            header = json.load(f)
    except FileNotFoundError:
        raise DataError(
            f"no data in {path}: python prepare.py makes it (see the top of prepare.py)"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {file}: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DataError(f"{file} is not a {FORMAT} header")
    missing = [key for key in CHECKS if key not in header]
    if missing:
        raise DataError(f"{file} is not a {FORMAT} header: no {', '.join(missing)}")
    refuse_wrong_values(file, header)
    return header


def refuse_wrong_values(where, header):
    """Raise DataError for the first value that cannot be. Keys that are missing are passed over."""
    for key, is_right in {**CHECKS, **OPTIONAL_CHECKS}.items():
        if key in header and not is_right(header):
            raise DataError(f"{where}: {key} {header[key]!r} does not belong to {FORMAT} data")


def same_data(one, other):
    """Whether two headers are of the same data.

    Older data, and checkpoints of them, have no train_crc32. Where one header has none, all but
    that is compared.
    """
    if "train_crc32" not in one or "train_crc32" not in other:
        one = {key: value for key, value in one.items() if key != "train_crc32"}
        other = {key: value for key, value in other.items() if key != "train_crc32"}
    return one == other


# ---- in words ------------------------------------------------------------------------------------


def describe(path, header):
    """One line on what a dataset holds."""
    count = header["count"]
    shape = "x".join(map(str, header["shape"]))
    return (
        f"{path}: {count['train']} training and {count['test']} held-out {kind_of_data(header)}, "
        f"{shape}, {describe_classes(names_of_classes(header))}"
    )


def kind_of_data(header):
    return header.get("kind", "images")


def names_of_classes(header):
    """The names of the classes; their numbers where the header has no names."""
    return header.get("class_names") or [str(label) for label in range(header["num_classes"])]


def describe_classes(names, most=8):
    """ "3 classes: cats, dogs, mice", or "no classes"."""
    if not names:
        return "no classes"
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'}: {first_few(names, most)}"


def classes_with_images(header):
    """The classes that have training images. The network has not been trained on the others."""
    return [label for label, count in enumerate(header["class_counts"]) if count > 0]


def describe_gaps(class_counts, most=5):
    """ "2 of the 4 classes have no image: 1, 2", or "" where each class has one.

    Such gaps are no mistake: a dataset.json may leave labels unused. Such a class is sampled only
    where --classes names it.
    """
    empty = [str(label) for label, count in enumerate(class_counts) if count == 0]
    if not empty:
        return ""
    few = first_few(empty, most)
    return f"{len(empty)} of the {len(class_counts)} classes have no image: {few}"


def first_few(names, most):
    shown = ", ".join(names[:most])
    return shown + ", ..." if len(names) > most else shown
