"""
The format of data/NAME: how it is read, and how it is written.

    header, data = load_dataset("data/digits")
    images, labels = data["train_images"], data["train_labels"]

    with Writer("data/mine", (3, 64, 64), {"train": 900, "test": 100}) as writer:
        writer.set(0, image, label)              # ... and so on, for 1,000 images
        writer.finish("mine", ["cats", "dogs"])  # only now is there a folder data/mine

A folder of data holds header.json and four arrays: {train,test}_images.npy (N, C, H, W) and
{train,test}_labels.npy (N,) int64. The top of prepare.py says more. header.py has the header, and
claims.py says whose data/mine is while it is written.
"""

import errno
import json
import math
import operator
import os
import shutil
import zipfile
import zlib

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from claims import LEFT_OUT, claim, clean_up_after, take_name, unfinished
from files import written
from header import FORMAT, SPLITS, DataError, describe, load_header, refuse_wrong_values
from images import printable

# ---- reading -------------------------------------------------------------------------------------


def load_dataset(path):
    """A folder of data -> (header, {"train_images": ..., "train_labels": ..., "test_...": ...}).

    Images are memory-mapped, (N, C, H, W); posteriors of latents have 2C channels. Labels are
    (N,) int64. Raises DataError where the folder is missing or not what its header says.
    """
    header = load_header(path)
    is_latent = "vae" in header
    channels, *sides = header["shape"]
    stored_channels = 2 * channels if is_latent else channels
    num_labels = max(1, header["num_classes"])
    arrays = {}
    for split in SPLITS:
        count = header["count"][split]
        rows = count
        if is_latent and split == "train":
            rows += header.get("skipped", 0)  # skipped images keep their rows, at the end
        image_shape = (rows, stored_channels, *sides)
        images = load_array(path, f"{split}_images", image_shape, header["dtype"], mmap_mode="r")
        labels = load_array(path, f"{split}_labels", (rows,), "int64")
        arrays[f"{split}_images"] = images[:count]
        arrays[f"{split}_labels"] = labels = labels[:count]
        if count and not 0 <= labels.min() <= labels.max() < num_labels:
            raise DataError(f"{path}/{split}_labels.npy: a label outside 0 to {num_labels - 1}")
    return header, arrays


def refuse_wrong_counts(path, header, data):
    """Raise DataError where a header says other counts of the classes than the labels have."""
    counts = np.bincount(data["train_labels"], minlength=header["num_classes"])
    if header["num_classes"] and counts.tolist() != header["class_counts"]:
        raise DataError(f"{path}: its header's class_counts are not those of train_labels.npy")


def load_array(path, name, shape, dtype, mmap_mode=None):
    """One of the arrays of a folder of data, of this shape and dtype or a DataError."""
    file = os.path.join(path, name + ".npy")
    try:
        array = np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {file}: {error}") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"cannot read {file}: it is an .npz file, whatever its name says")
    if array.shape != shape or array.dtype != dtype:
        raise DataError(
            f"{file} holds {array.dtype} {array.shape}, but its header says {dtype} {shape}"
        )
    return array


# ---- writing -------------------------------------------------------------------------------------


def new_memory_map(file, shape, dtype):
    """A memory map of a new .npy file, whose room on the disk is taken now.

    A map that finds none later would end the process without a word. Raises OSError.
    """
    array = open_memmap(file, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(file, "r+b") as f:
            try:
                os.posix_fallocate(f.fileno(), 0, os.path.getsize(file))
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # of some network disks
                    raise
    return array


def need_room(path, count, shape, dtype=np.uint8):
    """Raise DataError where the disk has no room for `count` arrays of this shape."""
    need = count * math.prod(shape) * np.dtype(dtype).itemsize
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    if need > free:
        raise DataError(
            f"{path} takes {describe_size(need)}, and its disk has {describe_size(free)} left"
        )


def describe_size(count):
    """A number of bytes, as text."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def write_left_out(folder, left_out):
    """Write all that was left out, (name, reason) each, to folder/left_out.txt, if anything was."""
    if not left_out:
        return
    with open(os.path.join(folder, LEFT_OUT), "w", encoding="utf-8") as f:
        for name, reason in left_out:
            f.write(f"{printable(name)}\t{printable(reason)}\n")


def train_crc32(folder):
    """The crc32 of train_images.npy and then train_labels.npy: eight hexadecimal digits.

    A progress bar appears after two seconds.
    """
    files = [os.path.join(folder, name) for name in ("train_images.npy", "train_labels.npy")]
    total = sum(map(os.path.getsize, files))
    crc = 0
    with tqdm(total=total, desc="checksum", unit="B", unit_scale=True, delay=2) as bar:
        for file in files:
            with open(file, "rb") as f:
                while part := f.read(1 << 24):
                    crc = zlib.crc32(part, crc)
                    bar.update(len(part))
    return f"{crc:08x}"


def checked_form(path, shape, count, dtype):
    """Shape, count and dtype of a Writer, as a tuple, a dict and a numpy dtype.

    Raises DataError where load_dataset would refuse them.
    """
    try:
        shape = tuple(operator.index(side) for side in shape)
        count = {split: operator.index(number) for split, number in count.items()}
        dtype = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError, AttributeError) as error:
        raise DataError(f"{path}: its shape, count or dtype cannot be: {error}") from None
    if set(count) != set(SPLITS):
        raise DataError(f"{path}: count must be of {' and '.join(SPLITS)}, not {count}")
    refuse_wrong_values(path, dict(shape=list(shape), dtype=str(dtype), count=count))
    return shape, count, dtype


class Writer:
    """Arrays of a known size, written in NAME.partial, which becomes NAME when they are whole.

    In a `with` statement whatever goes wrong, Ctrl-C too, removes what was written, and leaving it
    without `finish` is an error.
    """

    def __init__(self, path, shape, count, dtype=np.uint8, begun=False, lock=None, overwrite=False):
        """path: data/NAME. shape: (C, H, W) of an image as it is stored. count: {"train": N,
        "test": M}. dtype: uint8, float16 or float32. begun: go on with the arrays in NAME.partial.
        lock: of `claim`, where the caller has called it. overwrite: a dataset of this name is
        replaced, when the new one is whole. Raises DataError and OSError; ValueError or EOFError
        where begun arrays are not whole.
        """
        self.path = path
        self.partial = unfinished(path)
        self.shape, self.count, self.dtype = checked_form(path, shape, count, dtype)
        self.overwrite = overwrite
        self.arrays = {}
        self.is_finished = False
        self.lock = lock
        if lock is None:
            self.lock = claim(path, overwrite, keep=begun)
        try:
            total = sum(self.count.values())
            if not begun:
                need_room(path, total, self.shape, self.dtype)
            self.is_set = np.zeros(total, bool)  # which images were set
            for split, rows in self.count.items():
                images, labels = f"{split}_images", f"{split}_labels"
                images_shape = (rows, *self.shape)
                self.arrays[images] = self.open_array(images, images_shape, self.dtype, begun)
                self.arrays[labels] = self.open_array(labels, (rows,), np.int64, begun)
        except BaseException as error:
            # A `with` statement has not begun yet, so nobody else would clean up. Where the caller
            # has called `claim`, the caller cleans up.
            if lock is None:
                self.__exit__(type(error), error, None)
            raise

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None and self.is_finished:
            return
        self.arrays.clear()  # or Windows would not remove their files
        clean_up_after(error, self.path, self.lock)
        if error is None:
            raise DataError(f"{self.path} was not made: its Writer was left without `finish`")

    def open_array(self, name, shape, dtype, begun):
        """A memory map of NAME.partial/name.npy, which is made unless it is begun."""
        file = os.path.join(self.partial, name + ".npy")
        if not shape[0]:  # a memory map cannot be empty
            array = np.zeros(shape, dtype)
            np.save(file, array)
            return array
        if not begun:
            return new_memory_map(file, shape, dtype)
        np.load(file, mmap_mode="r")  # raises where the file was cut off, which "r+" would fill up
        return open_memmap(file, "r+", dtype, shape)

    def set(self, i, image, label):
        """Set image i (C, H, W) of the whole set: the train split first, then the test split.

        Raises DataError for another shape or dtype than the set's, and for a label that is not a
        whole number.
        """
        if not 0 <= i < len(self.is_set):
            raise DataError(f"{self.path} has {len(self.is_set)} images, and no image {i}")
        image = np.asarray(image)
        if image.shape != self.shape or image.dtype != self.dtype:
            raise DataError(
                f"{self.path} takes images {self.dtype} {self.shape}, "
                f"and image {i} is {image.dtype} {image.shape}"
            )
        try:
            label = operator.index(label)
        except TypeError:
            raise DataError(
                f"{self.path}: the label of image {i} is {label!r}, no whole number"
            ) from None
        self.is_set[i] = True
        split = "train"
        if i >= self.count["train"]:
            split = "test"
            i -= self.count["train"]
        self.arrays[f"{split}_images"][i] = image
        self.arrays[f"{split}_labels"][i] = label

    def finish(self, name, class_names, **about):
        """Write the header, rename NAME.partial to NAME, and say what it holds.

        about: more of the header. It may replace what is set here, as latents do. Images that are
        not uint8 need mean=[...] and std=[...], a number for each channel: a network's input is
        (image - mean) / std. All that was written of the train split is read once more, for its
        checksum. Raises DataError where these are missing, an image was not set, a label is of no
        class, or load_dataset would refuse the whole; and OSError.
        """
        class_names = [printable(class_name) for class_name in class_names]
        num_classes = len(class_names)
        self.refuse_gaps(num_classes)
        if self.dtype != np.uint8 and not ("mean" in about and "std" in about):
            raise DataError(f"{self.path}: finish() needs mean and std of {self.dtype} images")
        labels = self.arrays["train_labels"][: self.count["train"]]
        class_counts = np.bincount(labels, minlength=num_classes)[:num_classes]
        del labels  # or Windows would not rename
        self.close_arrays()
        channels = self.shape[0]
        header = dict(
            format=FORMAT,
            name=name,
            kind="images",
            shape=list(self.shape),
            dtype=self.dtype.name,
            count=self.count,
            num_classes=num_classes,
            class_names=class_names,
            class_counts=class_counts.tolist(),
            mean=[127.5] * channels,
            std=[127.5] * channels,
            train_crc32=train_crc32(self.partial),
        )
        header.update(about)
        try:
            content = json.dumps(header, indent=1)
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.path}: its header cannot be JSON: {error}") from None
        with written(os.path.join(self.partial, "header.json")) as f:
            f.write(content.encode())
        load_dataset(self.partial)  # raises before the new one can replace one that is right
        take_name(self.path, self.lock, self.overwrite)
        self.is_finished = True
        print(describe(self.path, header))
        skipped = header.get("skipped")
        if skipped:
            seen = sum(self.count.values()) + skipped
            print(f"{skipped} of {seen} images could not be read and were skipped")

    def refuse_gaps(self, num_classes):
        """Raise DataError where an image was not set, or a label is not below num_classes.

        Without classes all labels are 0.
        """
        if not self.is_set.all():
            first = np.flatnonzero(~self.is_set)[0]
            raise DataError(
                f"{self.path}: {np.count_nonzero(~self.is_set)} of {len(self.is_set)} images "
                f"were not set, such as image {first}"
            )
        most = max(0, num_classes - 1)
        for split in self.count:
            labels = self.arrays[f"{split}_labels"]
            if len(labels) and not 0 <= labels.min() <= labels.max() <= most:
                raise DataError(
                    f"{self.path}: the {split} labels go from {labels.min()} to {labels.max()}, "
                    f"and those of {num_classes} classes from 0 to {most}"
                )

    def close_arrays(self):
        for name in list(self.arrays):
            array = self.arrays.pop(name)  # closed with its last name, or Windows would not rename
            if isinstance(array, np.memmap):
                array.flush()
