"""
A look at a folder of data, for `prepare.py check`: what it holds, what is wrong, and a picture.

    python prepare.py check digits            # draws data/digits/check.png
    python prepare.py check im256 --src SRC   # of latents: each original above its decoded image

In this file: check_dataset; the counts of images and classes; the checksum; the moments of the
numbers; the picture.
"""

import os

import numpy as np
import torch
from PIL import Image

from dataset import load_dataset, train_crc32
from files import UserError, written
from header import DataError, describe_classes, describe_gaps, kind_of_data, names_of_classes
from images import ImageError, files_at, read_square
from latents import FILE_NAME_ENCODING
from pictures import visible
from vae import decode, latent_moments, load_vae


def check_dataset(path, src=None, vae_files=None, seed=0):
    """Print what a folder of data holds, and draw eight of its images into path/check.png.

    Data that are no images, such as sequences (C, L), are not drawn. src: where the images were
    that became latents, which are then drawn above them. Raises one DataError that names all that
    is wrong, a picture that cannot be drawn included.
    """
    header, data = load_dataset(path)
    if (src or vae_files) and "vae" not in header:
        raise DataError(f"{path} holds no latents, for which --src and --vae are")
    stored = data["train_images"]
    if not len(stored):
        raise DataError(f"{path} holds no training images")
    wrong = check_counts(path, header, data["train_labels"])
    wrong += check_bytes(path, header)
    rows = np.random.default_rng(seed).permutation(len(stored))
    rows = rows[: max(8, 2**27 // stored[0].size)]
    wrong += check_values(header, np.float32(stored[np.sort(rows)]))

    if len(header["shape"]) == 3:
        try:
            draw_examples(path, header, stored, rows[:8], src, vae_files)
        except BrokenPipeError:  # nobody reads what is printed, which is not the picture's fault
            raise
        except (UserError, OSError) as error:
            wrong.append(f"no picture: {error}")
    if wrong:
        raise DataError(f"{path}: {'; '.join(wrong)}")


def check_counts(path, header, labels):
    """Say how many images and classes there are. Returns what is wrong, as a list of text."""
    num_classes = header["num_classes"]
    counts = np.bincount(labels, minlength=num_classes)[:num_classes]
    about = describe_classes(names_of_classes(header))
    if num_classes:
        about = about.replace(":", f" of {counts.min()} to {counts.max()}:", 1)
    shape = "x".join(map(str, header["shape"]))
    print(f"{path}: {len(labels)} {kind_of_data(header)}, {shape}, {about}")
    gaps = describe_gaps(counts)
    if gaps:
        print(gaps)
    if counts.tolist() != header["class_counts"]:
        return ["the header's class_counts are not those of the labels"]
    return []


def check_bytes(path, header):
    """Compare the training data with their checksum. Returns what is wrong, as a list of text."""
    if "train_crc32" not in header:  # older data
        print("header.json has no checksum of the training data, so they are not compared with one")
        return []
    if train_crc32(path) != header["train_crc32"]:
        return ["the training data are not those that were written: their checksum differs"]
    return []


def check_values(header, x):
    """Print each channel's moments. x: (n, C, ...) as stored. Returns what is wrong."""
    wrong = []
    is_latent = "vae" in header
    is_normal = True
    of_an_image = tuple(range(1, x.ndim))
    spoiled = np.count_nonzero(~np.isfinite(x).all(axis=of_an_image))
    if spoiled:
        return [f"{spoiled} of {len(x)} images hold numbers that are not finite"]
    flat = np.count_nonzero(np.ptp(x, axis=of_an_image) == 0)
    if flat:
        print(f"{flat} of {len(x)} images have one value everywhere")
    if flat == len(x):
        wrong.append("all images have one value everywhere")
    if is_latent:
        means, stds = latent_moments(x)
    else:
        all_but_channels = (0, *range(2, x.ndim))
        means = np.mean(x, axis=all_but_channels, dtype=np.float64)
        stds = np.std(x, axis=all_but_channels, dtype=np.float64)
    for channel in range(len(header["mean"])):
        mean = (means[channel] - header["mean"][channel]) / header["std"][channel]
        std = stds[channel] / header["std"][channel]
        print(f"channel {channel}, normalized: mean {mean:.3f}, std {std:.3f}")
        found = f"channel {channel} has mean {mean:.3g} and std {std:.3g}"
        if is_latent and not (abs(mean) < 0.1 and abs(std - 1) < 0.1):
            wrong.append(f"{found}, not about 0 and 1")
            is_normal = False
        elif not std > 0.01:
            wrong.append(found)
    if not is_normal and header.get("normalization") == "published":
        wrong.append("prepare.py imagenet --measure normalizes with these images' own mean and std")
    return wrong


def draw_examples(path, header, stored, rows, src, vae_files):
    """Draw these rows into path/check.png; latents under their originals if `src` is given.

    Of numbers that are not uint8 the smallest is drawn black, and the largest white.
    """
    if "vae" in header:
        vae = load_vae(vae_files or header["vae"], crc32=header.get("vae_crc32"))
        means = stored[rows, : header["shape"][0]]
        lines = [decode(vae, torch.from_numpy(means))]  # of the picture: (8, H, W, C) each
        shown = "decoded examples"
    else:
        lines = [as_levels(stored[rows]).transpose(0, 2, 3, 1)]
        shown = "examples"
    if src:
        originals = read_originals(path, header, src, rows, len(stored))
        lines.insert(0, originals)
        difference = np.abs(np.float32(originals) - lines[1]).mean()
        print(f"decoded images differ from their originals by {difference:.1f} of 255 levels")
        shown = "originals over decoded examples"
    draw_sheet(lines, os.path.join(path, "check.png"))
    print(f"{path}/check.png: {shown}")


def read_originals(path, header, src, rows, count):
    """The images that became these rows, (n, size, size, 3) uint8."""
    with open(f"{path}/train_files.txt", newline="\n", **FILE_NAME_ENCODING) as f:
        names = f.read().split("\n")
    if len(names) != count + 1 or "image_size" not in header:
        raise DataError(f"{path}/train_files.txt is not whole, or header.json lacks its image_size")
    files = files_at(src, [names[row] for row in rows])
    originals = []
    for file in files:
        try:
            picture = read_square(file, header["image_size"], upright=False)
        except (ImageError, OSError) as error:
            raise ImageError(f"an original in {src} cannot be read: {error}") from None
        originals.append(picture.pixels)
    return np.stack(originals).transpose(0, 2, 3, 1)


def as_levels(images):
    """uint8 as it is. Floats -> uint8: the smallest becomes 0, and the largest 255."""
    if images.dtype == np.uint8:
        return images
    images = np.nan_to_num(images.astype(np.float64), posinf=0, neginf=0)
    low, high = images.min(), images.max()
    if high > low:
        images = (images - low) / (high - low)
    return np.round(255 * images.clip(0, 1)).astype(np.uint8)


def draw_sheet(lines, path):
    """Save lines of images, (n, H, W, C) uint8 each, as one picture. Of other numbers of channels
    than 1 and 3 it shows the first three, or the first."""
    picture = np.concatenate([np.concatenate(images, axis=1) for images in lines])
    picture = visible(picture)
    picture = np.broadcast_to(picture, (*picture.shape[:2], 3))
    with written(path) as f:
        Image.fromarray(picture).save(f, "PNG")
