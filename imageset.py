"""
The images that fid.py is given: a folder, a .zip, an .npz or an .npy file, or data/NAME. A class
for each kind.

    images = open_images(path)
    len(images), images[3]      # image 3 is uint8 (H, W, 3)
    images.image_size           # "64x48": W and H of all of them

images.py has the rules of which files of a folder or .zip are images, and how one is read. An array
is uint8 (N, H, W, 3), or (N, H, W, 1), whose gray images are given as RGB. Of data/NAME, which
prepare.py makes, the training images count. Images are read one at a time, because 50,000 of
256 x 256 pixels take 10 GB.
"""

import hashlib
import os
import sys
import zipfile

import numpy as np
from tqdm import tqdm

from dataset import load_dataset
from device import ranks_of_torchrun
from files import FidError, UserError, reading
from images import (
    Remarks,
    as_rgb,
    find_images,
    printable,
    read_whole,
    tell_left_out,
    try_square,
)
from pictures import unlike_pictures

WANTED = (
    "fid.py takes a folder or .zip of images, an .npz or .npy of uint8 images (N, H, W, 3), the "
    "data/NAME of prepare.py, or statistics, an .npz or .pkl of mu (D,) and sigma (D, D)"
)
TRAIN_IMAGES = "train_images.npy"  # of data/NAME
READERS_OF_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,  # differs in the letters of fields' names alone
}


def kind_of(path):
    """What a path is: "data", "folder" (or a .zip of images), "npz", "npy", "pickle" or "other".

    "data" is a folder that prepare.py made. A file is told by its first bytes. Raises OSError.
    """
    if os.path.isdir(path):
        made_by_prepare = [os.path.join(path, name) for name in ("header.json", TRAIN_IMAGES)]
        return "data" if all(map(os.path.exists, made_by_prepare)) else "folder"
    with open(path, "rb") as file:
        start = file.read(6)
    name = path.lower()
    if start.startswith(b"PK"):
        return "folder" if name.endswith(".zip") else "npz"
    if start == b"\x93NUMPY":
        return "npy"
    if start.startswith(b"\x80") or name.endswith((".pkl", ".pickle")):
        return "pickle"
    return "other"


def open_images(path, size=0):
    """The images of a folder, an .npz, an .npy or data/NAME. Raises FidError.

    size: of a folder's images, which are then cut as prepare.py imagenet does; 0 leaves them as
    they are.
    """
    with reading(path):
        kind = kind_of(path)
        if kind == "folder":
            return FolderImages(path, size)
        if kind == "data":
            return DataImages(path)
        if kind == "npz":
            return NpzImages(path)
        if kind == "npy":
            return NpyImages(path)
    raise FidError(f"{path}: {WANTED}")


def tell(message):
    """Print a remark, once for all ranks."""
    if ranks_of_torchrun()[0] == 0:
        print(message, file=sys.stderr)


def fingerprint(thing):
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:16]


def size_and_time(file):
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


# ---- a folder or a .zip --------------------------------------------------------------------------


class FolderImages:
    """The images of a folder or a .zip, at any depth, in the order of their paths.

    All must be of one size; with `size` they are made so, and [i] is None where an image cannot be
    read, as prepare.py leaves it out. Without `size` such a file is an error: a score of fewer
    images than are there would be wrong without a word.
    """

    def __init__(self, path, size=0):
        self.path = path
        self.size = size
        self.remarks = Remarks()
        found = find_images(path)
        self.files = found.files
        if found.left_out and ranks_of_torchrun()[0] == 0:
            tell(f"{printable(path)}: {len(self.files)} images")
            tell_left_out(found.left_out)
        if not self.files:
            raise FidError(f"no images in {path}")
        self.first_shape = None
        if not size:
            self.first_shape = self[0].shape
        self.image_size = as_size(self.first_shape or (size, size))
        stamps = [(name, *size_and_time(self.on_disk(name))) for name in found.names]
        self.about = f"{len(self)} images of {os.path.abspath(path)}, {fingerprint((stamps, size))}"
        self.threads = min(16, os.cpu_count() or 1)

    def on_disk(self, name):
        return os.path.join(self.path, name) if os.path.isdir(self.path) else self.path

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        file = self.files[i]
        if self.size:
            return self.cut(file)
        with reading(printable(str(file))):
            picture = read_whole(file)
        self.remarks.note_kind(str(file), picture.kind)
        image = picture.pixels
        if self.first_shape and image.shape != self.first_shape:
            raise FidError(
                f"{printable(str(file))} is {as_size(image.shape)}: all must be of one size, "
                f"that of {self.files[0]}, {as_size(self.first_shape)} (--save-stats has --size)"
            )
        return image

    def cut(self, file):
        attempt = try_square(file, self.size, upright=False)
        self.remarks.note(str(file), attempt)
        if attempt.picture is None:
            tqdm.write(f"skipped {printable(str(file))}: {attempt.reason}", file=sys.stderr)
            return None
        return attempt.picture.pixels.transpose(1, 2, 0)


def as_size(shape):
    """(H, W, ...) -> "WxH"."""
    return f"{shape[1]}x{shape[0]}"


# ---- arrays --------------------------------------------------------------------------------------


class NpyImages:
    """The images of an .npy file, mapped."""

    threads = 1

    def __init__(self, path):
        self.path = path
        self.remarks = Remarks()
        with open(path, "rb") as file:
            shape, _, dtype = read_header(file)
        if not may_be_images(shape, dtype):
            raise FidError(f"{path}: images must be uint8 (N, H, W, 3), not {dtype} {shape}")
        if shape[0] == 0:
            raise FidError(f"no images in {path}")
        self.array = np.load(path, mmap_mode="r", allow_pickle=False)
        self.image_size = as_size(shape[1:])
        self.about = f"{len(self)} images of {os.path.abspath(path)}, {size_and_time(path)}"

    def __len__(self):
        return len(self.array)

    def __getitem__(self, i):
        return as_rgb(np.array(self.array[i]))


class DataImages:
    """The training images of data/NAME, mapped."""

    threads = 1

    def __init__(self, path):
        self.path = path
        self.remarks = Remarks()
        header, data = load_dataset(path)
        unlike = "latents" if "vae" in header else unlike_pictures(header, header["shape"])
        if unlike:
            raise FidError(f"{path}: images must be uint8 of 1 or 3 channels, not {unlike}")
        self.array = data["train_images"]  # (N, C, H, W)
        if not len(self.array):
            raise FidError(f"no training images in {path}")
        self.image_size = as_size(self.array.shape[2:])
        stamp = size_and_time(os.path.join(path, TRAIN_IMAGES))
        self.about = f"{len(self)} images of {os.path.abspath(path)}, {stamp}"

    def __len__(self):
        return len(self.array)

    def __getitem__(self, i):
        return as_rgb(self.array[i].transpose(1, 2, 0))


class NpzImages:
    """The images of an .npz: of its arr_0, or of its only array that can be images."""

    threads = 1  # all reads share one seek position

    def __init__(self, path):
        self.path = path
        self.remarks = Remarks()
        archive = zipfile.ZipFile(path)
        arrays = arrays_in(archive)  # {name: (shape, by columns, dtype)}
        name = name_of_images(path, arrays)
        shape, by_columns, _ = arrays[name]
        self.n, *self.shape = shape
        self.image_size = as_size(self.shape)
        self.about = f"{self.n} images {name} of {os.path.abspath(path)}, {size_and_time(path)}"
        self.array = None
        if by_columns:  # no image lies in one piece
            with np.load(path, allow_pickle=False) as content:
                self.array = content[name]
            return
        self.file = archive.open(f"{name}.npy")
        read_header(self.file)
        self.start = self.file.tell()
        self.bytes_each = int(np.prod(self.shape))

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if self.array is not None:
            return as_rgb(self.array[i])
        with reading(self.path):
            self.file.seek(self.start + i * self.bytes_each)
            raw = self.file.read(self.bytes_each)
            return as_rgb(np.frombuffer(raw, np.uint8).reshape(self.shape))


def read_header(file):
    """(shape, whether it is in Fortran's order, dtype) of an .npy file, up to the array itself.

    Raises UserError for a format that is not known, ValueError for a header that cannot be read.
    """
    version = np.lib.format.read_magic(file)
    if version not in READERS_OF_HEADERS:
        major, minor = version
        raise UserError(f"an array must be of .npy's format 1.0, 2.0 or 3.0, not {major}.{minor}")
    return READERS_OF_HEADERS[version](file)


def arrays_in(archive):
    """{name: (shape, by columns, dtype)} of a zip file of .npy files. Raises FidError."""
    arrays = {}
    for member in archive.infolist():
        name, suffix = os.path.splitext(member.filename)
        if suffix != ".npy":
            continue
        with archive.open(member) as file:
            shape, by_columns, dtype = read_header(file)
            size = int(np.prod(shape, dtype=object)) * dtype.itemsize
            if not dtype.hasobject and size != member.file_size - file.tell():
                raise FidError(f"{archive.filename}: {name} is not whole")
        arrays[name] = (shape, by_columns, dtype)
    return arrays


def images_in(arrays):
    """The names of the arrays that may be images. arrays: of arrays_in."""
    return [name for name, (shape, _, dtype) in arrays.items() if may_be_images(shape, dtype)]


def may_be_images(shape, dtype):
    return dtype == np.uint8 and len(shape) == 4 and min(shape[1:]) > 0 and shape[3] in (1, 3)


def name_of_images(path, arrays):
    """The name of the array of images. Raises FidError where there is none, or a choice."""
    names = images_in(arrays)
    if not names:
        raise FidError(
            f"{path}: images must be uint8 (N, H, W, 3), and statistics mu (D,) and sigma (D, D); "
            f"it holds {listing(arrays)}{hint(arrays)}"
        )
    if "arr_0" in names:
        name = "arr_0"
    elif len(names) == 1:
        name = names[0]
        tell(f"{path}: its array {name} is taken, the only one of images")
    else:
        raise FidError(f"{path}: which are the images, {' or '.join(names)}? Name them arr_0")
    if arrays[name][0][0] == 0:
        raise FidError(f"no images in {path}")
    return name


def listing(arrays):
    """The arrays of an .npz, in words."""
    words = [f"{name} {dtype} {shape}" for name, (shape, _, dtype) in list(arrays.items())[:5]]
    if len(arrays) > 5:
        words.append(f"and {len(arrays) - 5} more")
    return ", ".join(words) or "no array"


def hint(arrays):
    for shape, _, dtype in arrays.values():
        if dtype == np.uint8 and len(shape) == 4 and shape[1] in (1, 3):
            return ". Move the axis of colours to the end: np.moveaxis(array, 1, -1)"
    return ""
