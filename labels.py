"""
Which label an image has: that of its folder, or that which a dataset.json gives it. And, by the
labels, which images are held out.

    labelled = find_labelled("photos")     # photos/cats/0.jpg, photos/dogs/0.jpg, ...
    labelled.classes, labelled.labels      # ["cats", "dogs"], [0, ..., 1, ...]

images.py says which files are images, and reads them.
"""

import json
import os
import sys
import unicodedata
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from header import describe_gaps
from images import LABELS_FILE, SUFFIXES, ImageError, find_images, open_zip, printable

MOST_WRAPPERS = 50  # folders around the images of a .zip, one in the other
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}
MAX_LABEL = 10**6


class Labelled(NamedTuple):
    classes: list  # their names; empty where there are no labels
    names: list  # paths of the images below the folder, with "/", sorted
    files: list  # what images.read_whole takes, one for each name
    labels: list  # whole numbers, one for each name; all 0 where there are no labels
    left_out: list  # (name, reason)
    notes: tuple = ()  # what a user may not expect, a line each


def tell_notes(labelled):
    """Print the notes to stderr."""
    for note in labelled.notes:
        print(printable(note), file=sys.stderr)


def find_labelled(src, top=""):
    """The images of a folder or a .zip, with their labels.

    The labels are those of its dataset.json where it has one: {"labels": [["a/0.png", 3], ...]} or
    {"labels": null}, as EDM and StyleGAN write it. Else each folder in it is a class, in sorted
    order. Images that lie in it side by side have no labels. A .zip may hold one folder that holds
    all this: that folder is taken, and `top` names it, such as "photos/". Raises ImageError where
    the labels cannot be told, and where a class has no image.
    """
    found = find_images(src, top)
    content = read_labels_file(src, top)
    if content is not None:
        return label_by_table(src, found, content)
    wrapper = find_wrapper(found)
    if wrapper is None:
        return label_by_folders(src, found)
    if os.path.isdir(src):
        raise ImageError(
            f"the class folders or the {LABELS_FILE} of {src} lie one level lower: "
            f"give {os.path.join(src, wrapper)}"
        )
    below = f"{wrapper}/"
    if top.count("/") >= MOST_WRAPPERS:
        raise ImageError(f"{src}: its images lie more than {MOST_WRAPPERS} folders deep")
    labelled = find_labelled(src, top + below)
    beside = [row for row in found.left_out if not row[0].startswith(below)]
    inside = [(below + name, reason) for name, reason in labelled.left_out]
    return labelled._replace(
        names=[below + name for name in labelled.names],
        left_out=beside + inside,
        notes=(f"{src}: taken from the one folder in it, {top}{wrapper}", *labelled.notes),
    )


def find_wrapper(found):
    """The name of the single top folder, if it is a wrapper and not a class; else None.

    It is a wrapper if it holds dataset.json, or if it holds images only in folders of its own.
    """
    if len(found.folders) != 1 or any("/" not in name for name in found.names):
        return None
    folder = found.folders[0]
    left_out = [name for name, _ in found.left_out]
    has_labels_file = f"{folder}/{LABELS_FILE}" in left_out
    has_images = any(name.count("/") == 1 for name in found.names)
    only_deeper_images = bool(found.names) and not has_images
    return folder if has_labels_file or only_deeper_images else None


def label_by_folders(src, found):
    """Each folder in src is a class."""
    for name, _ in found.left_out:
        if name.endswith("/" + LABELS_FILE):
            raise ImageError(
                f"{LABELS_FILE} counts only at the top of {src}: move {name} there or away"
            )
    tops = [name.partition("/")[0] for name in found.names if "/" in name]
    if len(tops) < len(found.names) and tops:
        raise ImageError(f"{src} holds images beside its class folders: which label do they have?")
    if not found.names:
        raise ImageError(f"no {', '.join(SUFFIXES)} file in {src}{example(found)}")
    if not tops:
        labels = [0] * len(found.names)
        return Labelled([], found.names, found.files, labels, found.left_out)
    refuse_splits(src, found, tops)
    with_images = set(tops)
    barren = [folder for folder in found.folders if folder not in with_images]
    if barren:
        raise ImageError(
            f"{src}/{barren[0]} looks like a class and holds no image{example(found, barren[0])}. "
            "Move it away, or give its name a leading dot"
        )
    refuse_twins(src, found.folders)
    number = {name: place for place, name in enumerate(found.folders)}
    labels = [number[top] for top in tops]
    return Labelled(found.folders, found.names, found.files, labels, found.left_out)


def example(found, folder=""):
    """ " (a.gif: its name ...)" where something in the folder is left out, else nothing."""
    for name, reason in found.left_out:
        if not folder or name == folder or name.startswith(folder + "/"):
            return f" ({name}: {reason})"
    return ""


def refuse_twins(src, folders):
    """Raise ImageError where two class names look the same: they differ by blanks at their ends,
    or by how Unicode writes an accent."""
    seen = {}
    for folder in folders:
        looks = unicodedata.normalize("NFC", folder).strip()
        twin = seen.setdefault(looks, folder)
        if twin != folder:
            raise ImageError(f"{src}: the classes {ascii(twin)} and {ascii(folder)} look the same")


def refuse_splits(src, found, tops):
    """Raise ImageError where the folders in src are parts of a data set, and not classes.

    One folder `train` with images in it, among other folders, is a class: CIFAR-100 has it.
    """
    splits = [folder for folder in found.folders if folder.lower() in SPLIT_FOLDERS]
    if not splits:
        return
    is_deep = any(name.startswith(splits[0] + "/") and name.count("/") > 1 for name in found.names)
    if len(splits) == 1 and len(set(tops)) > 2 and not is_deep:
        return
    wanted = next((folder for folder in splits if folder.lower().startswith("train")), splits[0])
    hint = f"give {os.path.join(src, wanted)}"
    if not os.path.isdir(src):
        hint = f"unpack it, and give its folder {wanted}"
    raise ImageError(
        f"{' and '.join(splits)} in {src} are parts of a data set, not classes: {hint}"
    )


def read_labels_file(src, top=""):
    """The text of src's dataset.json, as bytes; None where it has none. top: as of find_images."""
    try:
        if not os.path.isdir(src):
            archive, members = open_zip(src)
            return archive.read(members[top + LABELS_FILE])
        with open(os.path.join(src, LABELS_FILE), "rb") as file:
            return file.read()
    except (FileNotFoundError, KeyError):
        return None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        # RuntimeError: it is encrypted, or (NotImplementedError) packed in an unknown way.
        raise ImageError(f"cannot read {src}/{LABELS_FILE}: {error}") from None


def label_by_table(src, found, content):
    """The labels are those of a dataset.json. Only images that were found are ever opened."""
    label_of = parse_labels(src, content)
    if label_of is None:
        labels = [0] * len(found.names)
        return Labelled([], found.names, found.files, labels, found.left_out)
    left_out = list(found.left_out)
    names = []
    for name in found.names:
        if name in label_of:
            names.append(name)
        else:
            left_out.append((name, f"it has no label in {LABELS_FILE}"))
    for name in sorted(set(label_of) - set(names)):
        left_out.append((name, f"it is in {LABELS_FILE}, and not an image that is there"))
    if not names:
        raise ImageError(f"no image in {src} has a label in its {LABELS_FILE}")
    labels = [label_of[name] for name in names]
    file_of = dict(zip(found.names, found.files))
    files = [file_of[name] for name in names]
    classes = [str(label) for label in range(max(labels) + 1)]
    gaps = describe_gaps(np.bincount(labels))
    return Labelled(classes, names, files, labels, left_out, (gaps,) if gaps else ())


def parse_labels(src, content):
    """{name: label} of a dataset.json; None where it says that there are no labels."""
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{src}/{LABELS_FILE} is not JSON: {error}") from None
    form = '{"labels": [["NAME", LABEL], ...]} or {"labels": null}'
    wanted = f"{src}/{LABELS_FILE} must be {form}"
    if not isinstance(table, dict) or "labels" not in table:
        raise ImageError(f"{wanted}; move it away if it is not about labels")
    if table["labels"] is None:
        return None
    if not isinstance(table["labels"], list):
        raise ImageError(wanted)
    label_of = {}
    for row in table["labels"]:
        is_pair = isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)
        if not is_pair or type(row[1]) is not int or not 0 <= row[1] < MAX_LABEL:
            raise ImageError(f"{wanted}, with whole numbers from 0; not {str(row)[:100]}")
        name, label = row[0].replace("\\", "/"), row[1]
        other = label_of.setdefault(name, label)
        if other != label:
            raise ImageError(f"{src}/{LABELS_FILE} gives {name} two labels, {other} and {label}")
    return label_of


# ---- which images are held out -------------------------------------------------------------------


def choose_held_out(labels, share, rng):
    """Which images are held out: a bool (N,).

    This is the largest remainder method. Each class (labels: (N,)) gives floor(share * its size).
    If the total is then below floor(share * N), the classes with the largest remainders give one
    more image each; ties are drawn at random. A class always keeps one image to train on, so the
    total may be less. Of each class its last images are held out.
    """
    total = int(round(len(labels) * share, 6))  # 0.29 * 100 is a little below 29
    classes, sizes = np.unique(labels, return_counts=True)
    wanted = np.round(sizes * share, 6)
    counts = np.minimum(np.floor(wanted).astype(int), sizes - 1)
    remainders = wanted - counts
    drawn = rng.permutation(len(classes))
    by_remainder = drawn[np.argsort(-remainders[drawn], kind="stable")]
    for place in by_remainder:
        if counts.sum() < total and counts[place] < sizes[place] - 1:
            counts[place] += 1
    held_out = np.zeros(len(labels), bool)
    for label, count in zip(classes, counts):
        rows = np.flatnonzero(labels == label)
        held_out[rows[len(rows) - count :]] = True
    return held_out
