"""
What the network makes -> images, and the files that hold them.

    images = to_images(x0, header, vae)          # network units -> uint8 (B, H, W, C)
    grid(images, columns).save("grid.png")       # one picture of many
    kind = output_kind("samples.npz")            # "npz", "png" (a grid) or "folder" (PNGs)
    refuse_taken("samples.npz", kind)            # before the work
    write_images("samples.npz", kind, batches, n, labels, columns)

An .npz holds images of any number of channels, and floats. A PNG holds uint8, 1 or 3 channels.
"""

import contextlib
import itertools
import json
import os
import re
from zipfile import ZipFile

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from files import PARTIAL, UserError, others_in, remove_ours, sync_folder, written
from images import as_rgb
from vae import VAEError, decode, load_vae

# Suffixes of files that are not written here. Other names with a dot may be folders.
OTHER_FILES = (
    *(".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg", ".pdf", ".mp4"),
    *(".npy", ".h5", ".hdf5", ".zip", ".tar", ".gz", ".pkl", ".pt", ".pth", ".safetensors"),
)

# The names of the files that write_pngs makes. Nothing else in a folder is ever removed.
OURS = re.compile(r"\d{6,}\.png|dataset\.json")


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


def are_floats(header):
    """Whether the images of a model are floats, from the header of its data."""
    return "vae" not in header and header.get("dtype", "uint8").startswith("float")


def to_images(x0, header, vae=None):
    """Network units (B, C, H, W) -> images (B, H, W, C): uint8, or float32 where data are floats.

    The data's header has the mean and the standard deviation of each channel. Latents go through
    `vae`, of find_vae.
    """
    x0 = x0 * per_channel(header["std"], x0) + per_channel(header["mean"], x0)
    if "vae" in header:
        return decode(vae, x0)
    if are_floats(header):
        return x0.float().movedim(1, -1).cpu().numpy()
    pixels = x0.round().clamp(0, 255).to(torch.uint8)
    return pixels.movedim(1, -1).cpu().numpy()


def form_of_images(shape, header, vae=None):
    """((H, W, C), dtype) of each image that to_images makes of noise of a shape (C, H, W)."""
    channels, *sides = shape
    if vae:
        channels = 3
        sides = [side * vae.shrinks for side in sides]
    return (*sides, channels), np.float32 if are_floats(header) else np.uint8


def per_channel(values, like):
    """One number a channel -> a tensor that multiplies `like` (B, C, ...)."""
    values = torch.tensor(values, dtype=like.dtype, device=like.device)
    ones = [1] * (like.ndim - 2)
    return values.view(-1, *ones)  # (C, 1, ...)


# ---- from images to pictures ---------------------------------------------------------------------


def unlike_pictures(header, shape):
    """What keeps the images of a model from being PNGs, in a few words, or None.

    header: of its data. shape: of one image of noise, (C, H, W).
    """
    if "vae" in header:
        return None
    if are_floats(header):
        return "floats"
    if len(shape) != 3:
        return f"arrays of shape {tuple(shape)}"
    if shape[0] not in (1, 3):
        return f"{shape[0]} channels"
    return None


def visible(images):
    """The channels that a grid shows, (..., C) -> (..., 3) or (..., 1): the first three, or one."""
    channels = images.shape[-1]
    return images[..., :3] if channels >= 3 else images[..., :1]


def rgb(images):
    """Images of 1 or 3 channels -> (N, H, W, 3), as Inception takes them. Raises ValueError."""
    channels = images.shape[-1]
    if channels not in (1, 3):
        raise ValueError(f"FID is for images of 1 or 3 channels, not {channels}")
    return as_rgb(images)


def as_pil(image):
    """uint8 (H, W, 1) or (H, W, 3) -> a PIL image."""
    if image.shape[-1] == 1:
        return Image.fromarray(image[..., 0])
    return Image.fromarray(image)


def grid(images, columns, width=800):
    """Images (N, H, W, C) uint8 -> one PIL image of all of them, row by row.

    They are enlarged by the largest whole number that keeps the picture within `width` pixels. If
    it is wider than that already, they keep their size. Of 2 channels the first is shown, of
    more than 3 the first three.
    """
    images = visible(images)
    zoom = max(1, width // (columns * images.shape[2]))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    gap = 2
    missing = -len(images) % columns  # in the last row
    padding = ((0, missing), (0, gap), (0, gap), (0, 0))
    images = np.pad(images, padding, constant_values=255)
    sheet = rearrange(images, "(row column) h w c -> (row h) (column w) c", column=columns)
    return as_pil(sheet[:-gap, :-gap])


# ---- the names of files --------------------------------------------------------------------------


def output_kind(out):
    """What a name stands for: "png" (a grid), "npz" or "folder". Raises UserError for other files.

    A folder may have any name that ends in /, or that is a folder already.
    """
    suffix = os.path.splitext(out)[1].lower()  # none where a / stands at the end
    if suffix in (".png", ".npz"):
        return suffix[1:]
    if suffix in OTHER_FILES and not os.path.isdir(out):
        raise UserError(f"--out takes a .png, an .npz or a folder, not {out!r}")
    return "folder"


def refuse_taken(out, kind, overwrite=False):
    """Raise UserError where something is at `out` that images must not replace.

    overwrite: a file may be replaced. A folder must be new or empty, because another one, which is
    made aside, takes its place.
    """
    if os.path.basename(out) in (".", ".."):
        raise UserError(f"--out: {out} cannot be made, as it is there; name a new folder")
    if os.path.isdir(out):
        if os.listdir(out):
            raise UserError(f"--out: {out} is a folder with files in it already; name a new one")
        if kind != "folder":
            raise UserError(f"--out: {out} is there already, as a folder; name a new file")
        if os.path.ismount(out):
            raise UserError(f"--out: {out} is where a disk is mounted; name a new folder in it")
    elif os.path.lexists(out):
        if kind == "folder":
            raise UserError(f"--out: {out} is there already, as a file; name a new folder")
        if not overwrite:
            raise UserError(
                f"{out} is there already: --overwrite replaces it, --out names another file"
            )
    if kind == "folder":
        refuse_strangers(out + PARTIAL)


def refuse_strangers(aside):
    """Raise UserError where the folder that PNGs are written to first holds files of others."""
    if not os.path.lexists(aside):
        return
    strangers = others_in(aside, OURS.fullmatch)
    if strangers:
        file = os.path.join(aside, strangers[0])
        raise UserError(f"--out: {file} is not of an interrupted run: move it away")


def remove_unfinished(aside):
    """Remove a folder of PNGs that was not finished. Raises OSError where files of others stay."""
    if not os.path.isdir(aside):
        return
    remove_ours(aside, OURS.fullmatch)
    os.rmdir(aside)


# ---- from images to files ------------------------------------------------------------------------


def write_images(out, kind, batches, n, labels, columns):
    """Write n images, which come as an iterator of batches (B, H, W, C). All of them or nothing.

    kind: "png": one grid of so many columns. "npz": arr_0 has the images, (n, H, W, C), and arr_1
    the labels, int64 (n,). "folder": 000000.png, 000001.png, ..., and their labels in
    dataset.json. labels: (n,) int64, or None, and then nothing is written about them.
    Raises OSError, with the name `out`, where the disk is full.
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
    """PNGs in a folder that is made aside, filled and renamed. `out` is new, or an empty folder."""
    aside = out + PARTIAL
    remove_unfinished(aside)  # of a run that was cut off
    os.makedirs(aside)
    try:
        write_pngs(aside, batches, labels)
        if os.path.isdir(out):
            os.rmdir(out)  # or Windows would not rename
        os.replace(aside, out)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove_unfinished(aside)  # it takes room that others need
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror, out) from error
        raise
    if os.name == "posix":
        sync_folder(os.path.dirname(out) or ".")


def write_pngs(folder, batches, labels):
    """000000.png and so on. dataset.json has the form that `prepare.py folder` reads, EDM's."""
    names = []
    for image in itertools.chain.from_iterable(batches):
        names.append(f"{len(names):06d}.png")
        as_pil(image).save(os.path.join(folder, names[-1]))
    if labels is not None:
        pairs = [[name, int(label)] for name, label in zip(names, labels, strict=True)]
        with open(os.path.join(folder, "dataset.json"), "w") as f:
            json.dump({"labels": pairs}, f)
    if hasattr(os, "sync"):
        os.sync()  # all files at once, which is faster than one by one


# ---- plots ---------------------------------------------------------------------------------------


def new_figure(**options):
    """A figure of matplotlib, which is imported only here."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook names one that may not be installed here
    from matplotlib.figure import Figure

    return Figure(**options)


def save_figure(figure, path, dpi=120):
    """Write a figure as a PNG, which appears whole or not at all."""
    with written(path) as f:
        figure.savefig(f, format="png", dpi=dpi)
