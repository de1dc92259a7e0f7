"""
header.json of a folder of data: what it holds, how it is checked, and what it says in words.

    header = load_header("data/digits")          # a dict, checked
    describe("data/digits", header)              # one line of text
"""

import json
import math

import numpy as np

from files import UserError
from images import printable

FORMAT = "tvm-data-1"
SPLITS = ("train", "test")


class DataError(UserError):
    """Something about the data, in one line for the user. Names in it are printable."""

    def __init__(self, reason):
        super().__init__(printable(reason))


def is_numbers(value, length, least=-math.inf, kinds=(int, float)):
    """Whether a header's value is a list of so many finite numbers, none smaller than `least`."""
    if not isinstance(value, list) or len(value) != length:
        return False
    for number in value:
        if type(number) not in kinds or not math.isfinite(number) or number < least:
            return False
    return True


def right_shape(header):
    shape = header["shape"]
    if not isinstance(shape, list) or len(shape) < 2:
        return False
    return is_numbers(shape, len(shape), least=1, kinds=(int,))


def right_dtype(header):
    try:
        return np.dtype(header["dtype"]).kind in "uif"
    except TypeError:
        return False


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


# What a header holds at least, and how each value is checked, in this order.
CHECKS = {
    "name": None,
    "shape": right_shape,  # [C, H, W]; of other data [C, ...]
    "dtype": right_dtype,
    "count": right_count,  # {"train": N, "test": M}
    "num_classes": right_num_classes,
    "class_counts": right_class_counts,  # of the train split
    "mean": right_mean,  # one a channel
    "std": right_std,
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
    for key, is_right in CHECKS.items():
        if is_right and not is_right(header):
            raise DataError(f"{file}: {key} {header[key]!r} does not belong to {FORMAT} data")
    return header


# ---- in words ------------------------------------------------------------------------------------


def describe(path, header):
    """One line on what a dataset holds."""
    count = header["count"]
    shape = "x".join(map(str, header["shape"]))
    return (
        f"{path}: {count['train']} training and {count['test']} held-out {header['kind']}, "
        f"{shape}, {describe_classes(header['class_names'])}"
    )


def describe_classes(names, most=8):
    """ "3 classes: cats, dogs, mice", or "no classes"."""
    if not names:
        return "no classes"
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'}: {first_few(names, most)}"


def describe_gaps(class_counts, most=5):
    """ "2 of the 4 classes have no image: 1, 2", or "" where each class has one.

    Such gaps are no mistake: a dataset.json may leave labels unused. train.py and sample.py draw
    labels as often as they are there, and so never these.
    """
    empty = [str(label) for label, count in enumerate(class_counts) if count == 0]
    if not empty:
        return ""
    few = first_few(empty, most)
    return f"{len(empty)} of the {len(class_counts)} classes have no image: {few}"


def first_few(names, most):
    shown = ", ".join(names[:most])
    return shown + ", ..." if len(names) > most else shown
