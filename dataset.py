"""
The format of data/NAME: how it is read, and how it is written.

    header, data = load_dataset("data/digits")
    images, labels = data["train_images"], data["train_labels"]

    with Writer("data/mine", (3, 64, 64), {"train": 900, "test": 100}) as writer:
        writer.set(0, image, label)              # ... and so on, for 1,000 images
        writer.finish("mine", ["cats", "dogs"])  # only now is there a folder data/mine

A folder of data holds header.json and four arrays: {train,test}_images.npy (N, C, H, W) and
{train,test}_labels.npy (N,) int64. The top of prepare.py says more. While it is written it is
called data/mine.partial, which one process holds from before its first byte.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import sys
import zipfile

import numpy as np
from numpy.lib.format import open_memmap

from files import PARTIAL, UserError, hold, is_still_at, sync_folder, written
from images import printable

FORMAT = "tvm-data-1"
SPLITS = ("train", "test")
LEFT_OUT = "left_out.txt"

# All that prepare.py writes in NAME.partial or NAME. Nothing else is ever removed from the former.
OURS = {
    "lock",
    "header.json",
    "train_images.npy",
    "train_labels.npy",
    "test_images.npy",
    "test_labels.npy",
    "scratch.npy",
    "done.npy",
    "plan.json",
    "train_files.txt",
    LEFT_OUT,
    "check.png",
}


class DataError(UserError):
    """Something about the data, in one line for the user. Names in it are printable."""

    def __init__(self, reason):
        super().__init__(printable(reason))


# ---- reading -------------------------------------------------------------------------------------


def is_numbers(value, length, least=-np.inf, kinds=(int, float)):
    """Whether a header's value is a list of so many finite numbers, none smaller than `least`."""
    if not isinstance(value, list) or len(value) != length:
        return False
    return all(type(number) in kinds and least <= number < np.inf for number in value)


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
            rows += header.get("skipped", 0)  # their rows are at the end
        image_shape = (rows, stored_channels, *sides)
        images = load_array(path, f"{split}_images", image_shape, header["dtype"], mmap_mode="r")
        labels = load_array(path, f"{split}_labels", (rows,), "int64")
        arrays[f"{split}_images"] = images[:count]
        arrays[f"{split}_labels"] = labels = labels[:count]
        if count and not 0 <= labels.min() <= labels.max() < num_labels:
            raise DataError(f"{path}/{split}_labels.npy: a label outside 0 to {num_labels - 1}")
    return header, arrays


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


def claim(path, overwrite=False, keep=False, seconds=0):
    """Make the name of a dataset this process's own, before anything is written.

    First refuse a `path` that is there already (unless it is a dataset and `overwrite` is given)
    and files of others in path.partial or path.replaced. Then lock path.partial, waiting `seconds`
    for another process that writes there. Then finish or undo a replacement that a kill has cut in
    two, and refuse a `path` that another run has made meanwhile. Then remove what a killed run has
    left in path.partial, but refuse what an imagenet run has left; with `keep` both stay, for the
    caller to go on with.

    Returns the lock, for Writer. Raises DataError where something is refused, and OSError where
    another process still holds path.partial.
    """
    refuse_existing(path, overwrite)
    partial = path + ".partial"
    refuse_strangers(partial)
    refuse_replaced(path)
    lock = hold(partial, seconds)
    leftovers = set(os.listdir(partial)) - {"lock"}
    put_back(path)
    if os.path.exists(path) and not overwrite:
        if leftovers:
            lock.close()
        else:
            remove_partial(path, lock)  # hold has made it
        raise DataError(f"{path} is there already: another run made it")
    if not keep:
        if "plan.json" in leftovers:
            raise DataError(
                f"{partial} is of an imagenet run that was interrupted: "
                "give that command again, or delete it"
            )
        remove_files(path)
    return lock


def is_ours(name):
    """Whether prepare.py writes a file of this name in NAME.partial or NAME."""
    return name.removesuffix(PARTIAL) in OURS


def refuse_strangers(partial):
    """Raise DataError where NAME.partial holds what prepare.py has not written."""
    try:
        names = os.listdir(partial)
    except FileNotFoundError:
        return
    strangers = [name for name in sorted(names) if not is_ours(name)]
    if "header.json" in names and "lock" not in names:
        strangers.append("header.json")  # somebody's dataset that is called so
    if strangers:
        raise DataError(
            f"{os.path.join(partial, strangers[0])} is not of an interrupted run: "
            f"move it away, since {partial} is needed"
        )


def remove_files(path):
    """Remove the files that prepare.py has written in path.partial, all but the lock."""
    partial = path + ".partial"
    for name in os.listdir(partial):
        if name != "lock" and is_ours(name):
            os.remove(os.path.join(partial, name))


def clean_up_after(error, path, lock):
    """After an error: remove path.partial, if `lock` still holds it.

    The caller then raises the error again. An OSError that names no file is raised here, as a
    DataError that names the path.
    """
    if not lock.closed and is_still_at(lock, os.path.join(path + ".partial", "lock")):
        remove_partial(path, lock)
    if isinstance(error, OSError) and error.strerror and not error.filename:
        raise DataError(f"cannot write {path}: {error.strerror}") from None


def remove_partial(path, lock):
    """Remove path.partial, whose lock the caller holds. If others have put files there, those and
    the folder stay."""
    if os.name != "posix":
        lock.close()  # Windows does not remove an open file
    remove_files(path)
    os.remove(os.path.join(path + ".partial", "lock"))
    with contextlib.suppress(OSError):
        os.rmdir(path + ".partial")
    lock.close()


def refuse_existing(path, overwrite):
    """Raise DataError where `path` is there and must not be replaced."""
    if not os.path.lexists(path):
        return
    if not os.path.exists(os.path.join(path, "header.json")):
        raise DataError(
            f"{path} exists and is not a dataset of prepare.py: "
            "move it away, or choose another --name"
        )
    if not overwrite:
        raise DataError(f"{path} is there already: --overwrite replaces it")


def put_back(path):
    """Undo a replacement that a kill has cut in two. See Writer.rename and refuse_replaced."""
    replaced = path + ".replaced"
    if os.path.exists(replaced):
        if os.path.exists(path):
            try:
                shutil.rmtree(replaced)
            except OSError as error:
                raise DataError(f"cannot remove {replaced}, delete it: {error.strerror}") from None
        else:
            os.rename(replaced, path)


def refuse_replaced(path):
    """Raise DataError where path.replaced is there and no dataset, which may not be touched."""
    replaced = path + ".replaced"
    if not os.path.lexists(replaced):
        return
    # Of a removal that was cut off some of our files are left.
    if os.path.exists(path) and all(is_ours(name) for name in os.listdir(replaced)):
        return
    try:
        load_header(replaced)
    except DataError:
        raise DataError(
            f"{replaced} is not a dataset of prepare.py: move it away, since its name is needed"
        ) from None


def write_left_out(folder, left_out):
    """Write all that was left out, (name, reason) each, to folder/left_out.txt, if anything was."""
    if not left_out:
        return
    with open(os.path.join(folder, LEFT_OUT), "w", encoding="utf-8") as f:
        for name, reason in left_out:
            f.write(f"{printable(name)}\t{printable(reason)}\n")


class Writer:
    """Arrays of a known size, written in NAME.partial, which becomes NAME when they are whole.

    In a `with` statement whatever goes wrong, Ctrl-C too, removes what was written.
    """

    def __init__(self, path, shape, count, dtype=np.uint8, begun=False, lock=None, overwrite=False):
        """path: data/NAME. shape: (C, H, W) of an image as it is stored. count: {"train": N,
        "test": M}. begun: go on with the arrays in NAME.partial. lock: of `claim`, where the caller
        has called it. overwrite: a dataset of this name is replaced, when the new one is whole.
        Raises DataError and OSError, and ValueError where begun arrays are not whole.
        """
        self.path = path
        self.partial = path + ".partial"
        self.shape = shape
        self.count = count
        self.dtype = np.dtype(dtype)
        self.overwrite = overwrite
        self.arrays = {}
        self.lock = lock
        if lock is None:
            self.lock = claim(path, overwrite, keep=begun)
        try:
            if not begun:
                need_room(path, sum(count.values()), shape, dtype)
            for split, rows in count.items():
                images, labels = f"{split}_images", f"{split}_labels"
                self.arrays[images] = self.open_array(images, (rows, *shape), dtype, begun)
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
        if error is not None:
            self.arrays.clear()  # or Windows would not remove their files
            clean_up_after(error, self.path, self.lock)

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
        """Set image i (C, H, W) of the whole set: the train split first, then the test split."""
        split = "train"
        if i >= self.count["train"]:
            split = "test"
            i -= self.count["train"]
        self.arrays[f"{split}_images"][i] = image
        self.arrays[f"{split}_labels"][i] = label

    def finish(self, name, class_names, **about):
        """Write the header, rename NAME.partial to NAME, and say what it holds.

        about: more of the header. It may replace what is set here, as latents do.
        """
        class_names = [printable(class_name) for class_name in class_names]
        num_classes = len(class_names)
        labels = self.arrays["train_labels"][: self.count["train"]]
        class_counts = np.bincount(labels, minlength=num_classes)[:num_classes]
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
        )
        header.update(about)
        self.close_arrays()
        with written(os.path.join(self.partial, "header.json")) as f:
            f.write(json.dumps(header, indent=1).encode())
        self.rename()
        print(describe(self.path, header))
        skipped = header.get("skipped")
        if skipped:
            seen = sum(self.count.values()) + skipped
            print(f"{skipped} of {seen} images could not be read and were skipped")

    def close_arrays(self):
        for name in list(self.arrays):
            array = self.arrays.pop(name)  # closed with its last name, or Windows would not rename
            if isinstance(array, np.memmap):
                array.flush()

    def rename(self):
        """NAME.partial becomes NAME. The lock is held until then, so that no other run comes
        between; its file goes last. A dataset that is replaced waits in NAME.replaced, and comes
        back where the new one cannot be renamed."""
        refuse_existing(self.path, self.overwrite)
        if os.name != "posix":
            self.lock.close()  # Windows does not rename a folder with an open file
        replaced = self.path + ".replaced"
        is_replacement = os.path.exists(self.path)
        if is_replacement:
            os.rename(self.path, replaced)
        try:
            os.rename(self.partial, self.path)
        except OSError:
            if is_replacement:
                os.rename(replaced, self.path)
            raise
        os.remove(os.path.join(self.path, "lock"))
        self.lock.close()
        if is_replacement:
            try:
                shutil.rmtree(replaced)
            except OSError as error:  # the new one is whole all the same
                print(f"cannot remove {replaced}: {error.strerror}", file=sys.stderr)
        if os.name == "posix":
            sync_folder(os.path.dirname(self.path) or ".")


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
