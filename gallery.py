"""
One network's samples below another's, or each row of samples above its nearest training images.

    python gallery.py out/emoji/ckpt.safetensors out/emoji_flow/ckpt.safetensors --out both.png
    python gallery.py out/emoji/ckpt.safetensors --nearest --out nearest.png

Columns are classes. All networks start from the same noise and take one step, unless --nfe gives
each its own number. The images are those that `sample.py --precision=float32` makes of the same
classes and seed: no image is hand-picked.

With --nearest a row of training images stands below each row of samples: of all training images
the one that is nearest to the sample, in pixels (the sum of the squared differences).

In this file: the options, the samples, the nearest images, the drawing, and `main`.
"""

import os
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from batches import conditions
from dataset import load_dataset
from device import find_device
from files import UserError, check_writable, follow_link, written
from header import classes_with_images, same_data
from loss import EULER
from model import load_model
from options import Parser, run
from pictures import (
    find_vae,
    grid,
    output_kind,
    refuse_taken,
    to_images,
    unlike_pictures,
)
from sample import (
    class_names,
    find_classes,
    guidance_weight,
    noise_and_labels,
    noise_shape,
    sample,
)
from scores import nearest_neighbours

TITLES = {
    "tvm": "TVM",
    "meanflow": "MeanFlow",
    "improved_meanflow": "improved MeanFlow",
    "alpha_flow": "alpha-Flow",
    "flow_matching": "flow matching",
}
MOST_COLUMNS = 10  # where --classes does not name them
MOST_ROWS = 50  # of each network
WIDTH = 960  # pixels of all columns up to which small images are enlarged
SPACE = 10  # pixels between the blocks of a picture
FONT_SIZE = 15


# ---- options -------------------------------------------------------------------------------------


def parse(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="checkpoint", help="of networks of one dataset")
    add("--out", required=True, help="the .png to write")
    add("--overwrite", action="store_true", help="replace the .png that is there already")
    add("--nfe", default="1", help="steps: one number, or one for each network: 1,1,50 (default 1)")
    add("--rows", type=int, default=3, help="rows of samples of each network (default 3)")
    add(
        "--classes",
        help="names or numbers, with commas between (default: the first ten that have images)",
    )
    add("--seed", type=int, default=0, help="of the noise (default 0)")
    add("--nearest", action="store_true", help="show the nearest training images below samples")
    add("--data", help="where these lie (default: data/NAME, as the checkpoint has the name)")
    add("--vae", help="where the VAE of latents lies (default: on the Hugging Face hub)")
    add("--device", help="default: a GPU where there is one")
    args = parser.parse_args(argv)
    if not 1 <= args.rows <= MOST_ROWS:
        raise UserError(f"--rows must be from 1 to {MOST_ROWS}, not {args.rows}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be at least 0 and below 2**63, not {args.seed}")
    if args.data and not args.nearest:
        raise UserError("--data goes with --nearest only")
    args.nfe = numbers_of_steps(args.nfe, len(args.checkpoints))
    if output_kind(args.out) != "png":
        raise UserError(f"--out takes a .png, not {args.out!r}")
    args.out = follow_link(args.out)
    refuse_taken(args.out, "png", args.overwrite)
    check_writable(args.out)
    return args


def numbers_of_steps(text, networks):
    """ "1" or "1,1,50" -> a number of steps for each network."""
    words = text.split(",")
    if not all(word.isdecimal() and len(word) < 7 and int(word) > 0 for word in words):
        raise UserError(f"--nfe takes whole numbers from 1 to 999999, not {text[:40]!r}")
    if len(words) == 1:
        words = words * networks
    if len(words) != networks:
        raise UserError(f"--nfe has {len(words)} numbers for {networks} networks")
    return [int(word) for word in words]


# ---- samples -------------------------------------------------------------------------------------


def load_models(paths, device):
    """Checkpoints -> a list of (model, about). Raises UserError where their data differ."""
    models = [load_model(path, device) for path in paths]
    header = models[0][1]["data"]
    for path, (_, about) in zip(paths, models, strict=True):
        if not same_data(about["data"], header):
            raise UserError(f"{paths[0]} and {path} were trained on different data")
    return models


def choose_classes(text, header, num_classes):
    """The class of each column. Without classes there are ten columns, of 0, "no class"."""
    if text is not None:
        return find_classes(text, class_names(header), num_classes)
    if not num_classes:
        return [0] * MOST_COLUMNS
    return classes_with_images(header)[:MOST_COLUMNS]


@torch.no_grad()
def make_images(model, about, classes, rows, nfe, seed, vae=None):
    """Samples row by row, a column a class: uint8 (rows * columns, H, W, C)."""
    header = about["data"]
    device = next(model.parameters()).device
    n = rows * len(classes)
    x1, _ = noise_and_labels(seed, range(n), noise_shape(model.config, header))
    y = conditions(torch.tensor(classes * rows), header).to(device)
    w = torch.full((n,), guidance_weight(None, about["guidance"]), device=device)
    euler = about.get("objective") in EULER
    x0 = sample(model, x1.to(device), y, w, nfe, euler)
    return to_images(x0, header, vae)


def titles_of(abouts, steps):
    """What stands beside each network's images: objective, steps, and the run if they repeat."""
    titles = []
    for about, nfe in zip(abouts, steps, strict=True):
        objective = about.get("objective", "tvm")
        count = "1 step" if nfe == 1 else f"{nfe} steps"
        titles.append(f"{TITLES.get(objective, objective)},\n{count}")
    if len(set(titles)) < len(titles):
        names = [about.get("train", {}).get("name", "") for about in abouts]
        titles = [f"{name}\n{title}" for name, title in zip(names, titles, strict=True)]
    return titles


# ---- the nearest training images -----------------------------------------------------------------


def load_training_images(path, header):
    """The training images (M, C, H, W) that a network with this data header has seen."""
    if "vae" in header:
        raise UserError("--nearest compares pixels, and these networks were trained on latents")
    if not path and "name" not in header:
        raise UserError("the checkpoint does not name its data: give --data")
    path = path or os.path.join("data", header["name"])
    found, data = load_dataset(path)
    if not same_data(found, header):
        raise UserError(f"{path} holds other data than these networks were trained on")
    return data["train_images"]


def nearest_images(images, train, device):
    """For each image of (N, H, W, C) the nearest one of train (M, C, H, W), as (N, H, W, C)."""
    _, index = nearest_neighbours(np.moveaxis(images, -1, 1), train, device=device)
    return np.moveaxis(train[index.numpy()], 1, -1)


# ---- drawing -------------------------------------------------------------------------------------


def can_draw(text):
    """Whether the font has all letters of a text. One that it lacks would be drawn as a box."""
    font = ImageFont.load_default(FONT_SIZE)
    box = bytes(font.getmask("\uffff"))  # no font has this one
    return all(bytes(font.getmask(letter)) != box for letter in text)


def pairs_of_rows(title, images, nearest, columns):
    """A block for each row of samples, with the row of their nearest images below it."""
    blocks = []
    for first in range(0, len(images), columns):
        row = slice(first, first + columns)
        both = np.concatenate([images[row], nearest[row]])
        blocks.append((f"{title},\nand nearest\nin training", both))
    return blocks


def draw(blocks, names):
    """Blocks, each (title, images (N, H, W, C)), one below the other -> a PIL image.

    names: what stands above the columns. The title stands on the left of its block.
    """
    columns = len(names)
    sheets = [grid(images, columns, WIDTH) for _, images in blocks]
    font = ImageFont.load_default(FONT_SIZE)
    column_width = sheets[0].width / columns
    letters = max(1, int(column_width / (0.55 * FONT_SIZE)))  # that fit above a column
    heads = ["\n".join(textwrap.wrap(name, letters)) for name in names]

    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [ruler.multiline_textbbox((0, 0), title, font) for title, _ in blocks]
    left = 2 * SPACE + int(max(box[2] for box in boxes))
    boxes = [ruler.multiline_textbbox((0, 0), head, font) for head in heads]
    top = 2 * SPACE + int(max(box[3] for box in boxes))
    height = top + sum(sheet.height + SPACE for sheet in sheets)

    picture = Image.new("RGB", (left + sheets[0].width + SPACE, height), "white")
    pen = ImageDraw.Draw(picture)
    for column, head in enumerate(heads):
        middle = left + (column + 0.5) * column_width
        place = (middle, top - SPACE)
        pen.multiline_text(place, head, "black", font, anchor="md", align="center")
    y = top
    for (title, _), sheet in zip(blocks, sheets, strict=True):
        place = (left - SPACE, y + sheet.height / 2)
        pen.multiline_text(place, title, "black", font, anchor="rm", align="right")
        picture.paste(sheet, (left, y))
        y += sheet.height + SPACE
    return picture


# ---- the command ---------------------------------------------------------------------------------


def main():
    args = parse()
    device = find_device(args.device)
    models = load_models(args.checkpoints, device)
    first_model, first_about = models[0]
    header = first_about["data"]
    unlike = unlike_pictures(header, noise_shape(first_model.config, header))
    if unlike:
        raise UserError(f"pictures are of 1 or 3 channels of uint8, and these are {unlike}")
    train = load_training_images(args.data, header) if args.nearest else None
    num_classes = first_model.config.num_classes
    classes = choose_classes(args.classes, header, num_classes)
    names = [""] * len(classes)
    if num_classes:
        known = class_names(header) or [str(c) for c in range(num_classes)]
        names = [known[c] if can_draw(known[c]) else str(c) for c in classes]
    vae = find_vae(header, device, args.vae)

    blocks = []
    titles = titles_of([about for _, about in models], args.nfe)
    for (model, about), nfe, title in zip(models, args.nfe, titles, strict=True):
        images = make_images(model, about, classes, args.rows, nfe, args.seed, vae)
        if args.nearest:
            nearest = nearest_images(images, train, device)
            blocks += pairs_of_rows(title, images, nearest, len(classes))
        else:
            blocks.append((title, images))
    with written(args.out) as f:
        draw(blocks, names).save(f, "PNG")
    print(f"{args.out}: {len(classes)} columns, {args.rows} rows of each network")


if __name__ == "__main__":
    run(main)
