"""
The format of data/NAME.
"""
import json
import os
import shutil

import numpy as np
from numpy.lib.format import open_memmap

FORMAT = "tvm-data-1"


KEYS = ("format", "name", "shape", "dtype", "count", "num_classes", "class_counts", "mean", "std")   # of a header, at least


class DataError(Exception):
    """Something about the data, in one line for the user."""


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
        from files import hold
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
