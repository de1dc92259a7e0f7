"""
Which files are images, and how one is read. prepare.py and fid.py both go by this file.

    found = find_images("photos")            # all images below a folder or in a .zip, sorted
    read_whole(found.files[0]).pixels        # uint8 (H, W, 3), upright, on white
    read_square(found.files[0], 64).pixels   # cropped and resized, uint8 (3, 64, 64)

In this order: what counts, finding, reading, cropping, all cores at work. Labels are in labels.py.

An image is a file with one of the SUFFIXES, in any case, at any depth. Links to files and folders
are followed. Hidden entries (a leading dot) and those of operating systems never count. Whatever is
left out is returned by name, with the reason. The order is that of the paths, compared folder by
folder, by code points: "Z" comes before "a", and "a/b" before "a.b".
"""

import contextlib
import ctypes
import errno
import functools
import io
import os
import signal
import sys
import threading
import unicodedata
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from files import UserError

# ---- what counts ---------------------------------------------------------------------------------

SUFFIXES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # no other: PostScript, say, is a program
OF_SYSTEMS = {"__macosx", "thumbs.db", "desktop.ini"}
LABELS_FILE = "dataset.json"  # of EDM and StyleGAN, at the top of a folder or a .zip
MAX_MEMBER = 2**30  # bytes of an image in a .zip, which is read into memory

# Faults of a disk, a network or a full machine. They say nothing about the image. (Pillow's own
# errors about what it decodes have no errno.) ENOENT: it was there when the files were listed.
FAULTS = """
    EIO ESTALE ETIMEDOUT EMFILE ENFILE ENOMEM ENOENT ENODEV ENXIO ENOTCONN ECONNRESET ECONNABORTED
    ENETDOWN ENETUNREACH EHOSTDOWN EHOSTUNREACH EREMOTEIO
"""
TRANSIENT = {getattr(errno, name) for name in FAULTS.split() if hasattr(errno, name)}

# What Pillow says about files that it reads all the same: EXIF with a fault, very many pixels.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(UserError, ValueError):
    """Why an image, or a folder of them, is not read, in one line. Names in it are printable."""

    def __init__(self, reason):
        super().__init__(printable(reason))


def suffix_of(name):
    return os.path.splitext(name)[1].lower()


def never_counts(name):
    """Why an entry of this name never counts, whatever it is; or None."""
    if name.startswith("."):
        return "hidden"
    if name.lower() in OF_SYSTEMS:
        return "of the operating system"
    return None


def printable(text):
    """The text with escapes for what no terminal shows: line ends and bytes that are no UTF-8."""
    letters = []
    for letter in text:
        if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp"):
            letter = letter.encode("unicode_escape").decode()
        letters.append(letter)
    return "".join(letters)


# ---- finding -------------------------------------------------------------------------------------


class Member(NamedTuple):
    """An image in a .zip, which is read without extracting it."""

    archive: str
    name: str  # with "/" between folders

    def __str__(self):
        return f"{self.archive}/{self.name}"


class Found(NamedTuple):
    names: list  # paths of the images below the folder, with "/", sorted
    files: list  # what read_whole and read_square take, one for each name
    left_out: list  # (name, reason), sorted; a folder that never counts is one entry
    folders: list  # the folders directly in it that count, sorted


def find_images(path, top=""):
    """All images below a folder, or in a .zip, as Found.

    top: of a .zip only what is in this folder, such as "photos/"; all names are then those below
    it. Raises ImageError where there is no such folder or .zip. The file of labels counts neither
    as an image nor as left out.
    """
    if os.path.isdir(path):
        images, left_out, folders = walk_folder(path)
    elif os.path.isfile(path) and suffix_of(path) == ".zip":
        images, left_out, folders = walk_zip(path, top)
    else:
        raise ImageError(f"no folder and no .zip {path}")
    images.sort()
    left_out.sort()
    names = ["/".join(parts) for parts in images]
    reasons = [("/".join(parts), reason) for parts, reason in left_out]
    return Found(
        names=names,
        files=files_at(path, [top + name for name in names]),
        left_out=[(name, reason) for name, reason in reasons if name != LABELS_FILE],
        folders=sorted(folders),
    )


def files_at(path, names):
    """The images of these names below a folder or in a .zip, as read_whole takes them."""
    if os.path.isdir(path):
        return [os.path.join(path, name.replace("/", os.sep)) for name in names]
    return [Member(path, name) for name in names]


def walk_folder(top):
    """Returns images [parts], what is left out [(parts, reason)], and the folders at the top.

    parts: a path as the tuple of its names.
    """
    images, left_out, folders = [], [], []
    waiting = [((), [identity(top)])]  # folders to enter, each with the identities of those above
    while waiting:
        parts, above = waiting.pop()
        try:
            with os.scandir(os.path.join(top, *parts)) as entries:
                entries = list(entries)
        except OSError as error:
            if is_transient(error):
                raise
            left_out.append((parts, f"a folder that cannot be opened: {error.strerror}"))
            continue
        if parts and not entries:
            left_out.append((parts, "an empty folder"))
        for entry in entries:
            path = (*parts, entry.name)
            reason = why_left_out(entry, above)
            if reason:
                left_out.append((path, reason))
            elif entry.is_dir():
                waiting.append((path, [*above, identity(entry.path)]))
                if not parts:
                    folders.append(entry.name)
            else:
                images.append(path)
    return images, left_out, folders


def identity(folder):
    """What two paths of one folder have in common."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def why_left_out(entry, above):
    """Why an entry of a folder is neither an image nor a folder to enter; or None."""
    reason = never_counts(entry.name)
    if reason:
        return reason
    try:
        if entry.is_dir():
            is_loop = identity(entry.path) in above
            return "a link to a folder that it lies in" if is_loop else None
        if entry.is_symlink():
            os.stat(entry.path)  # raises where the link leads to nothing
        if not entry.is_file():
            return "not a file"
    except FileNotFoundError:
        return "a link to nothing"
    except OSError as error:  # a link to itself, a folder that may not be entered
        if is_transient(error):
            raise
        return f"cannot be opened: {error.strerror}"
    return why_no_image(entry.name)


def why_no_image(name):
    if name == LABELS_FILE:
        return "it counts only at the top"
    if suffix_of(name) not in SUFFIXES:
        return "its name is not that of an image"
    return None


def walk_zip(path, top):
    """As walk_folder, of the members of a .zip in its folder `top`."""
    try:
        members = open_zip(path)[1]
    except ImageError:
        raise
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ImageError(f"cannot read {path}: {error}") from None
    inside = [name[len(top) :] for name in members if name.startswith(top) and name != top]
    images, left_out, folders = set(), {}, set()
    for member in inside:
        parts = tuple(member.rstrip("/").split("/"))
        reasons = [never_counts(part) for part in parts]
        if any(part in ("", ".", "..") for part in parts):
            left_out[parts] = "its path is not a plain one"
            continue
        if any(reasons):
            first = next(place for place, reason in enumerate(reasons) if reason)
            left_out[parts[: first + 1]] = reasons[first]
            continue
        is_folder = member.endswith("/")
        if is_folder or len(parts) > 1:
            folders.add(parts[0])
        if not is_folder:
            reason = why_no_image(parts[-1])
            if reason:
                left_out[parts] = reason
            else:
                images.add(parts)
    return list(images), list(left_out.items()), list(folders)


def open_zip(path):
    """A .zip, which stays open until another one is asked for: its ZipFile, and {name: ZipInfo}.

    The names have "/" between folders, where some programs write a backslash. Raises ImageError
    where two files have one name.
    """
    status = os.stat(path)
    return open_zip_once(path, status.st_ino, status.st_mtime_ns, os.getpid())


@functools.lru_cache(maxsize=1)
def open_zip_once(path, file_number, time, process):
    """Each process opens its own: after a fork, parent and child would share one file offset."""
    archive = zipfile.ZipFile(path)
    members = {}
    for member in archive.infolist():
        name = member.filename.replace("\\", "/")
        if name in members and not name.endswith("/"):
            raise ImageError(f"{path} holds two files {name}")
        members[name] = member
    return archive, members


def tell_left_out(left_out, file=None, most=10):
    """Print what was left out, (name, reason) each, to stderr: the first few by name.

    file: where all of them are written.
    """
    if not left_out:
        return
    print(f"left out: {len(left_out)}", file=sys.stderr)
    for name, reason in left_out[:most]:
        print(f"    {printable(name)}: {printable(reason)}", file=sys.stderr)
    if len(left_out) > most:
        where = f" (all in {printable(file)})" if file else ""
        print(f"    and {len(left_out) - most} more{where}", file=sys.stderr)


# ---- reading -------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """An image that was read."""

    pixels: np.ndarray  # uint8
    kind: str  # its format, one of FORMATS, whatever its name says


class Attempt(NamedTuple):
    """What came of reading one of many images: a picture, or the reason why there is none."""

    picture: Picture | None
    reason: str = ""


def read_whole(file):
    """An image as it is: pixels (H, W, 3), upright, and on white where it is transparent.

    file: a path, or one of Found.files. Raises ImageError, or OSError for a transient fault.
    """
    with as_image_errors(file):
        image, kind = decode_file(file, upright=True)
        return Picture(np.asarray(image), kind)


def read_square(file, size, upright=True, gray=False):
    """The middle of an image, resized: pixels (3, size, size), or (1, size, size) if `gray`.

    upright: turned as its EXIF orientation says. ADM's ImageNet ignores EXIF, and so does
    upright=False. (Pillow turns a TIFF either way.) Raises ImageError, or OSError for a transient
    fault.
    """
    with as_image_errors(file):
        image, kind = decode_file(file, upright)
        if max(image.size) > 100 * min(image.size):  # the crop would make it gigabytes long
            raise ImageError(f"{image.width}x{image.height} is too long and thin")
        if gray:
            image = image.convert("L")
        pixels = np.asarray(centre_crop(image, size))
        return Picture(pixels.reshape(size, size, -1).transpose(2, 0, 1), kind)


def try_square(file, size, upright=True, gray=False):
    """read_square as an Attempt, so that one bad image does not end all the work.

    Raises OSError for a transient fault, which should end it: the image may be a good one.
    """
    try:
        return Attempt(read_square(file, size, upright, gray))
    except ImageError as error:
        return Attempt(None, str(error))


class Remarks:
    """What is to be said about many images: which cannot be read, and which are misnamed."""

    def __init__(self):
        self.unreadable = []  # (name, reason)
        self.misnamed = {}  # {name: format}

    def note(self, name, attempt):
        """Note what there is to say about one attempt."""
        if attempt.picture is None:
            self.unreadable.append((name, attempt.reason))
        else:
            self.note_kind(name, attempt.picture.kind)

    def note_kind(self, name, kind):
        """Note an image whose name has the suffix of another format."""
        if SUFFIXES.get(suffix_of(name), kind) != kind:
            self.misnamed[name] = kind

    def tell_misnamed(self):
        """Print how many images are misnamed, and one of them, to stderr."""
        if self.misnamed:
            name, kind = min(self.misnamed.items())
            print(
                f"{len(self.misnamed)} of another format than the name says, "
                f"read as what they are: {printable(name)} is {kind}",
                file=sys.stderr,
            )


def readable(names, attempts, remarks):
    """Yield (place, pixels) of each image that was read, and note the others in `remarks`.

    names: of the images. attempts: what came of them, an iterable in the same order.
    """
    for place, (name, attempt) in enumerate(zip(names, attempts, strict=True)):
        remarks.note(name, attempt)
        if attempt.picture is not None:
            yield place, attempt.picture.pixels


@contextlib.contextmanager
def as_image_errors(file):
    """Whatever Pillow raises about a file becomes an ImageError. It raises many kinds.

    A transient fault becomes an OSError that names the file.
    """
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            "it is none of JPEG, PNG, WebP, BMP and TIFF, or its start is damaged"
        ) from None
    except Image.DecompressionBombError:
        most = round(2 * Image.MAX_IMAGE_PIXELS / 1e6)
        raise ImageError(f"it has more than {most} million pixels") from None
    except Exception as error:
        if is_transient(error):
            number = getattr(error, "errno", errno.ENOMEM)
            raise OSError(number, os.strerror(number), printable(str(file))) from None
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ImageError(first_line) from None


def is_transient(error):
    """Whether an error says nothing about the image: the same image may be read another time."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in TRANSIENT


def open_bytes(file):
    """An image's file, or member of a .zip, as a binary file."""
    if isinstance(file, Member):
        archive, members = open_zip(file.archive)
        member = members[file.name]
        if member.file_size > MAX_MEMBER:
            raise ImageError(f"it takes more than {MAX_MEMBER >> 20} MB")
        return io.BytesIO(archive.read(member))
    return open(file, "rb")


def decode_file(file, upright):
    """An image of Pillow's, in RGB, and its format. Of several frames the first."""
    with open_bytes(file) as content:
        if not content.read(1):
            raise ImageError("the file is empty")
        content.seek(0)
        with Image.open(content, formats=FORMATS) as image:
            # "MPO" is a JPEG with more pictures behind the first, as some phones make them.
            kind = "JPEG" if image.format == "MPO" else image.format
            image.load()
            depth = depth_of_tiff(image) if kind == "TIFF" else (16, False)
            if upright:
                image = turn_upright(image)
            return to_rgb(image, kind, *depth), kind


def turn_upright(image):
    """Turn an image as its EXIF orientation says. EXIF that cannot be read says nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return image if orientation == 1 else ImageOps.exif_transpose(image)
    except Exception as error:
        if is_transient(error):
            raise
        return image


def to_rgb(image, kind, bits=16, is_inverted=False):
    """Any mode of Pillow's to 8-bit RGB; what is transparent shows white.

    kind: the format of its file. bits: of gray that has more than 8. is_inverted: 0 is white in it.
    """
    # Before version 11, Pillow opens a PNG of 16-bit gray as mode "I".
    if image.mode == "I" and kind != "PNG":
        raise ImageError("its pixels are 32-bit numbers, whose range nobody knows")
    if image.mode.startswith("I"):  # more than 8 bits, which Pillow would clip
        values = np.asarray(image) * (255 / (2**bits - 1))
        values = 255 - values if is_inverted else values
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ImageError("its pixels are floating-point numbers, whose range nobody knows")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if kind == "BMP" and image.getchannel("A").getextrema() == (0, 0):
            image.putalpha(255)  # such a file has four bytes a pixel, and no transparency
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def depth_of_tiff(image):
    """Bits of a pixel of a gray TIFF, and whether 0 is white, which Pillow leaves to us."""
    bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, 16)
    bits = bits[0] if isinstance(bits, tuple) else bits
    return bits, image.tag_v2.get(ExifTags.Base.PhotometricInterpretation, 1) == 0


def as_rgb(images):
    """Images with 1 or 3 channels at the end, (..., 1 or 3) -> (..., 3)."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


# ---- cropping ------------------------------------------------------------------------------------


def centre_crop(image, size):
    """The usual crop for ImageNet (ADM's): (size, size) of an image of Pillow's.

    Halve with a box filter while the image is twice too large, resize its short side to `size` with
    a bicubic filter, and take the middle.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ---- all cores at work ---------------------------------------------------------------------------


def parallel(function, items, what):
    """Yield function(item) for each item, in order, computed on all cores. what: for the bar."""
    workers = min(61, os.cpu_count() or 1)  # Windows takes no more than 61
    chunk = max(1, min(256, len(items) // (4 * workers)))
    pool = ProcessPoolExecutor(workers, initializer=follow_parent)
    try:
        with ctrl_c_later():
            results = pool.map(function, items, chunksize=chunk)  # starts the workers
        yield from tqdm(results, total=len(items), desc=what, unit="img")
    finally:
        pool.shutdown(cancel_futures=True)  # an error, or Ctrl-C, does not wait for the rest


@contextlib.contextmanager
def ctrl_c_later():
    """Ctrl-C within this context takes effect at its end: Python may lose it while it forks."""
    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    asked = []
    before = signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        signal.raise_signal(signal.SIGINT)


def follow_parent(worker=None):
    """Called in a worker: it ignores Ctrl-C, which is its parent's, and ends when its parent ends.

    A killed parent's workers would wait for ever to hand over what they have read. So the system
    ends them (Linux). worker: its number, which DataLoader passes; not used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
