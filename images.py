"""
Which files are images, and how one is read.
"""
import ctypes
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset import DataError


def end_with_parent(_):
    """In a loader's worker: what kills a rank kills its workers, which would else block on what they cannot hand over."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)                         # PR_SET_PDEATHSIG


def parallel(f, items, what):
    """f over items in all cores, in order, with a progress bar."""
    workers = min(61, os.cpu_count() or 1)                                 # as many as Windows takes
    chunk = max(1, min(256, len(items) // (4 * workers)))
    with ProcessPoolExecutor(workers, initializer=end_with_parent, initargs=(0,)) as pool:
        yield from tqdm(pool.map(f, items, chunksize=chunk), total=len(items), desc=what, unit="img")


def list_images(src):
    """The images in a folder -> (class names, [(file, label)]), both sorted; no class names where the folder is flat."""
    if not os.path.isdir(src):
        raise DataError(f"no folder {src}")
    is_image = lambda file: file.lower().endswith((".jpg", ".jpeg", ".png"))
    below = lambda folder: [os.path.join(at, file) for at, _, names in sorted(os.walk(folder)) for file in sorted(names) if is_image(file)]
    classes = {d.name: files for d in sorted(os.scandir(src), key=lambda d: d.name) if d.is_dir() and (files := below(d.path))}
    files = [(file, label) for label, files in enumerate(classes.values()) for file in files]
    flat = [os.path.join(src, file) for file in sorted(os.listdir(src)) if is_image(file)]
    if files and flat:
        raise DataError(f"{src} holds images beside its class folders: which label should they have?")
    if not files and not flat:
        raise DataError(f"no .jpg, .jpeg or .png file in {src}")
    return list(classes), files or [(file, 0) for file in flat]


def read_image(file, size):
    """The middle of an image, (3, size, size) uint8; or, where it cannot be read, the reason as a string."""
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:           # of others, PostScript is a program, which would run
            if max(image.size) > 100 * min(image.size):                    # which the crop would first make gigabytes long
                return f"{image.width}x{image.height} is too long and thin"
            if image.mode.startswith("I"):                                 # 16-bit gray, which Pillow would clip
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            return np.asarray(centre_crop(image.convert("RGB"), size)).transpose(2, 0, 1)
    except Exception as error:                                             # Pillow raises many kinds
        return f"{type(error).__name__}: {error}".splitlines()[0]


def centre_crop(image, size):
    """The usual crop for ImageNet (ADM's): halve with a box filter while twice too large, resize the
    short side to `size` with a bicubic one, and take the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_batch(files, size):
    return [read_image(file, size) for file in files]
