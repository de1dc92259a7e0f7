"""
What the network makes -> pictures, and the files that hold them.

    images = to_images(x0, header, vae)      # network units -> uint8 (B, H, W, C)
    grid(images, columns).save("grid.png")   # one picture of many
    write_images(out, "npz", batches, n, labels, columns)   # or "png": a grid; "folder": PNGs

Images are uint8 (N, H, W, C). A picture shows 1 or 3 channels, so of 2 it shows the first, and of
more than 3 the first three. An .npz holds all of them.
"""

import itertools
import json
import os
import shutil
from zipfile import ZipFile

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from files import written
from vae import VAEError, decode, load_vae

# ---- from the network to images ------------------------------------------------------------------


def find_vae(header, device, where=None):
    """The VAE that a data header names, from `where` or the Hugging Face hub. None for pixels.

    On a GPU it is float16, as it is published. Raises VAEError.
    """
    if "vae" not in header:
        if where:
            raise VAEError("this model makes pixels: it has no VAE that could lie elsewhere")
        return None
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return load_vae(where or header["vae"], device, dtype, header.get("vae_crc32"))


def to_images(x0, header, vae=None):
    """Network units (B, C, H, W) -> images, uint8 (B, H, W, C).

    The data's header has the mean and the standard deviation of each channel. Latents go through
    the VAE that it names. Data of floats stay floats.
    """
    x0 = x0 * per_channel(header["std"], x0) + per_channel(header["mean"], x0)
    if "vae" in header:
        return decode(vae or find_vae(header, x0.device), x0)
    if header.get("dtype", "uint8").startswith("float"):
        return x0.float().movedim(1, -1).cpu().numpy()
    pixels = x0.round().clamp(0, 255).to(torch.uint8)
    return pixels.movedim(1, -1).cpu().numpy()


def per_channel(values, like):
    """One number a channel -> a tensor that multiplies `like` (B, C, ...)."""
    values = torch.tensor(values, dtype=like.dtype, device=like.device)
    return values.view(-1, *[1] * (like.ndim - 2))


# ---- from images to pictures ---------------------------------------------------------------------


def visible(images):
    """The channels that a picture shows: (..., C) -> (..., 3) or (..., 1)."""
    channels = images.shape[-1]
    return images[..., :3] if channels >= 3 else images[..., :1]


def rgb(images):
    """Images of 1 or 3 channels -> (N, H, W, 3), as Inception takes them. Raises ValueError."""
    channels = images.shape[-1]
    if channels not in (1, 3):
        raise ValueError(f"FID is for images of 1 or 3 channels, not {channels}")
    return np.repeat(images, 3, axis=-1) if channels == 1 else images


def as_pil(image):
    """uint8 (H, W, C) -> a PIL image."""
    image = visible(image)
    if image.shape[-1] == 1:
        return Image.fromarray(image[..., 0])
    return Image.fromarray(image)


def grid(images, columns, least=800):
    """Images (N, H, W, C) -> one PIL image of all of them, row by row.

    They are enlarged by a whole number, to about `least` pixels of width.
    """
    images = visible(images)
    zoom = max(1, least // (columns * images.shape[2]))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    gap = 2
    missing = -len(images) % columns  # in the last row
    padding = ((0, missing), (0, gap), (0, gap), (0, 0))
    images = np.pad(images, padding, constant_values=255)
    sheet = rearrange(images, "(row column) h w c -> (row h) (column w) c", column=columns)
    return as_pil(sheet[:-gap, :-gap])


# ---- from images to files ------------------------------------------------------------------------


def write_images(out, kind, batches, n, labels, columns):
    """Write n images, which come as an iterator of batches (B, H, W, C). All of them or nothing.

    kind: "png": one grid of so many columns. "npz": arr_0 has the images, uint8 (n, H, W, C), and
    arr_1 the labels, int64 (n,). "folder": 000000.png, 000001.png, ..., and their labels in
    dataset.json. labels: (n,) int64, or None, and then nothing is written about them.
    """
    if kind == "png":
        picture = grid(np.concatenate(list(batches)), columns)
        with written(out) as f:
            picture.save(f, "PNG")
    elif kind == "npz":
        write_npz(out, batches, n, labels)
    else:
        write_folder(out, batches, labels)


def write_npz(out, batches, n, labels):
    """Batch by batch, because 50,000 images of 256 x 256 are 10 GB."""
    first = next(batches)
    about = dict(descr=first.dtype.str, fortran_order=False, shape=(n, *first.shape[1:]))
    with written(out) as f, ZipFile(f, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, about)
            for images in itertools.chain([first], batches):
                array.write(images.tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as array:
                np.lib.format.write_array(array, labels, allow_pickle=False)


def write_folder(out, batches, labels):
    """PNGs. dataset.json has the form that `prepare.py folder` reads, which is EDM's."""
    partial = out + ".tvm-partial"  # a name that nobody else gives to a folder
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was cut off
    os.makedirs(partial)
    names = []
    for image in itertools.chain.from_iterable(batches):
        names.append(f"{len(names):06d}.png")
        as_pil(image).save(os.path.join(partial, names[-1]))
    if labels is not None:
        pairs = [[name, int(label)] for name, label in zip(names, labels, strict=True)]
        with open(os.path.join(partial, "dataset.json"), "w") as f:
            json.dump({"labels": pairs}, f)
    if os.path.isdir(out):
        os.rmdir(out)  # an empty one, as the caller has seen
    os.replace(partial, out)
