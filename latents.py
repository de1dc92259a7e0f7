"""
Images -> latents of a VAE (prepare.py imagenet), and a look at a folder of data (prepare.py check).

`imagenet` can be killed and given again, and several ranks of one machine can share the work. The
result is the same, because the plan is: file i, in sorted order, becomes row i of the arrays in
NAME.partial, and batches are always the same files. There done.npy says which rows are there (1)
and which never can be (2), and plan.json says what was begun. The steps:

    make_plan      what is to be done; on every rank
    begin          claim the name; make the arrays, or go on with those that are there; rank 0
    encode_rows    each rank its own batches
    finish         drop the rows that cannot be read, write the header, rename; rank 0
"""

import json
import os
import sys
import zlib
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from claims import LEFT_OUT, claim, clean_up_after, remove_files, unfinished
from dataset import Writer, load_dataset, write_left_out
from device import from_all_ranks, from_rank_0, join_ranks, ranks_of_torchrun
from files import UserError, written
from header import DataError, describe_classes, describe_gaps, kind_of_data, names_of_classes
from images import (
    ImageError,
    Remarks,
    end_with_parent,
    files_at,
    printable,
    read_square,
    readable,
    tell_left_out,
    try_square,
)
from labels import find_labelled, tell_notes
from pictures import visible
from vae import PUBLISHED, decode, encode, latent_moments, load_vae

SD_VAE = "stabilityai/sd-vae-ft-ema"

FILE_NAME_ENCODING = dict(encoding="utf-8", errors="surrogateescape")  # of train_files.txt

# The values of done.npy.
TO_DO = 0
ENCODED = 1
UNREADABLE = 2

# How a message calls each value of a plan that differs.
WORDS_OF_PLAN = {
    "image_size": "another --size",
    "batch": "another batch size",
    "vae": "another VAE",
    "vae_crc32": "other weights of the VAE",
    "class_names": "other class names",
    "files_crc32": "another list of files",
    "labels_crc32": "another set of labels",
    "measure": "another setting of --measure",
}
SHOWN_OF_PLAN = ("image_size", "batch", "vae")  # both values are shown


def encode_images(src, path, name, size, vae_files, vae_name, batch=0, measure=False):
    """Encode the images of `src` into the folder of data `path`, on all ranks of torchrun.

    size: of the square images. vae_files: a folder, or a name on the hub. vae_name: what the header
    calls it. batch: images that are encoded at a time; 0: as many as fill 64 images of 256 x 256.
    measure: normalize with the latents' own mean and std, where others are published, too.
    Raises UserError and OSError.
    """
    rank, ranks, local_rank = ranks_of_torchrun()
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != str(ranks):
        raise DataError("imagenet takes the GPUs of one machine: its ranks write one memory map")
    if os.path.exists(path):
        raise DataError(f"{path} is there already: move it away to make it again")
    if batch < 0:
        raise DataError(f"--batch must be at least 1, or 0 for the default, not {batch}")
    device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    vae = load_vae(vae_files, device)
    if size < 1 or size % vae.shrinks:
        raise DataError(f"--size must be a multiple of {vae.shrinks} (this VAE's), not {size}")
    batch = batch or max(1, 2**22 // size**2)
    labelled = find_labelled(src)
    refuse_line_ends(src, labelled)
    plan = make_plan(labelled, size, batch, vae_name, vae.crc32, measure)
    side = size // vae.shrinks
    shape = (vae.config.latent_channels, side, side)

    join_ranks("gloo", timedelta(days=7))  # torchrun ends all ranks when one of them ends
    writer = None
    complaint = None
    if rank == 0:
        tell_notes(labelled)
        tell_left_out(labelled.left_out)
        print("EXIF orientation is not applied, as in ADM's ImageNet", file=sys.stderr)
        try:
            writer = begin(path, plan, labelled, shape)
        except DataError as error:
            complaint = str(error)
        except OSError as error:
            complaint = f"cannot write {path}: {error}"
    complaint = from_rank_0(complaint)
    if complaint:
        raise DataError(complaint)
    if from_rank_0(plan) != plan:
        raise DataError(f"rank {rank} finds other files in {src} than rank 0")
    encode_rows(path, plan, labelled, vae, rank, ranks)
    if ranks > 1:
        dist.barrier()
    if rank == 0:
        finish(writer, plan, labelled, src, name, shape)


def refuse_line_ends(src, labelled):
    """Raise DataError where a name would take two lines of train_files.txt."""
    for name in labelled.names:
        if "\n" in name or "\r" in name:
            raise DataError(f"{src}/{name}: a file name holds a line end: rename it")


def make_plan(labelled, size, batch, vae_name, vae_crc32, measure):
    """The settings that a resumed run must share with the interrupted one."""
    names = "\n".join(labelled.names)
    labels = np.array(labelled.labels, np.int64)
    return dict(
        image_size=size,
        batch=batch,
        vae=vae_name,
        vae_crc32=vae_crc32,
        class_names=[printable(name) for name in labelled.classes],
        files_crc32=f"{zlib.crc32(os.fsencode(names)):08x}",
        labels_crc32=f"{zlib.crc32(labels):08x}",
        measure=measure,
    )


def begin(path, plan, labelled, shape):
    """Claim the name, and make the arrays in path.partial or go on with those that are there.

    Returns their Writer. Raises DataError where the name is taken or another plan was begun.
    """
    lock = claim(path, keep=True, seconds=10)
    begun = read_plan(path)
    differing = differences(begun, plan) if begun else []
    if differing:
        raise DataError(
            f"{unfinished(path)} was begun with {' and '.join(differing)}: delete it to start over"
        )
    channels, height, width = shape
    stored_shape = (2 * channels, height, width)
    count = {"train": len(labelled.files), "test": 0}
    if begun:
        try:
            return Writer(path, stored_shape, count, np.float16, begun=True, lock=lock)
        except (ValueError, EOFError) as error:  # numpy's, about an array that is not whole
            raise DataError(
                f"cannot write {path}: {error}; delete {unfinished(path)} to start over"
            ) from None
    try:
        remove_files(path)
        writer = Writer(path, stored_shape, count, np.float16, lock=lock)
        writer.arrays["train_labels"][:] = labelled.labels
        writer.arrays["train_labels"].flush()
        with written(os.path.join(unfinished(path), "done.npy")) as f:
            np.save(f, np.full(count["train"], TO_DO, np.uint8))
        # The plan comes last: where it is, all the others are.
        with written(os.path.join(unfinished(path), "plan.json")) as f:
            f.write(json.dumps(plan).encode())
    except (DataError, OSError) as error:
        clean_up_after(error, path, lock)
        raise
    return writer


def read_plan(path):
    """The plan of the run that was interrupted, or None where none was. Raises DataError."""
    file = os.path.join(unfinished(path), "plan.json")
    try:
        with open(file) as f:
            plan = json.load(f)
    except FileNotFoundError:
        return None
    except ValueError:
        plan = None
    if not isinstance(plan, dict):
        raise DataError(f"{file} is damaged: delete {unfinished(path)} to start over")
    return plan


def differences(begun, plan):
    """What a plan that was begun does not share with this one, as a list of text."""
    differing = []
    for key, words in WORDS_OF_PLAN.items():
        # A plan from before an option was there lacks its key, and may go on with any value of it.
        if key not in begun or begun[key] == plan[key]:
            continue
        if key in SHOWN_OF_PLAN:
            words += f" ({begun[key]}, not {plan[key]})"
        differing.append(words)
    return differing


def encode_rows(path, plan, labelled, vae, rank, ranks):
    """Encode this rank's share of the rows that are not done yet."""
    stored = np.load(os.path.join(unfinished(path), "train_images.npy"), mmap_mode="r+")
    done = np.load(os.path.join(unfinished(path), "done.npy"), mmap_mode="r+")
    batches = batches_to_do(done, plan["batch"], rank, ranks)
    loader = DataLoader(
        labelled.files,
        batch_sampler=batches,
        collate_fn=partial(read_batch, size=plan["image_size"]),
        num_workers=max(1, (os.cpu_count() or 1) // ranks),
        worker_init_fn=end_with_parent,
    )
    remarks = Remarks()
    bar = tqdm(
        total=len(done),
        initial=np.count_nonzero(done),
        desc="encoding",
        unit="img",
        disable=rank > 0,
    )
    with bar:
        for rows, attempts in zip(batches, loader):
            if isinstance(attempts, OSError):  # see read_batch
                raise attempts
            names = [labelled.names[row] for row in rows]
            found = dict(readable(names, attempts, remarks))  # {place in the batch: pixels}
            read_rows = rows[list(found)]
            if found:
                stored[read_rows] = encode(vae, np.stack(list(found.values())))
                stored.flush()
            done[np.setdiff1d(rows, read_rows)] = UNREADABLE
            done[read_rows] = ENCODED
            bar.update(np.count_nonzero(done) - bar.n)  # of all ranks
    for other in from_all_ranks(remarks.misnamed):
        remarks.misnamed.update(other)
    if rank == 0:
        remarks.tell_misnamed()


def read_batch(files, size):
    """A list of Attempts, at squares that are not turned upright.

    An OSError is returned: if it were raised, the DataLoader would hand on a traceback as its text.
    """
    try:
        return [try_square(file, size, upright=False) for file in files]
    except OSError as error:
        return error


def batches_to_do(done, batch, rank, ranks):
    """This rank's batches of rows, each an array of row numbers, without those that are done."""
    batches = []
    for first in range(rank * batch, len(done), ranks * batch):
        rows = np.arange(first, min(first + batch, len(done)))
        if not done[rows].all():
            batches.append(rows)
    return batches


def finish(writer, plan, labelled, src, name, shape):
    """Drop the rows that cannot be read, write the header, and rename path.partial to path."""
    done = np.load(os.path.join(writer.partial, "done.npy"), mmap_mode="r+")
    labels = writer.arrays["train_labels"]
    unreadable = find_reasons(labelled, np.flatnonzero(done == UNREADABLE), plan["image_size"])
    lost = classes_without_an_image(done, labels)
    if lost:
        tell_left_out(unreadable, most=len(unreadable))  # no file will say it
        let_them_be_read_again(done, labels, lost)
        refuse_lost_classes(lost, done, labelled, src)
    tell_left_out(unreadable, os.path.join(writer.path, LEFT_OUT))
    write_left_out(writer.partial, unreadable + labelled.left_out)

    names = fill_gaps(writer.arrays, labelled.names, done)
    file = os.path.join(writer.partial, "train_files.txt")
    with open(file, "w", newline="\n", **FILE_NAME_ENCODING) as f:
        f.writelines(f"{file_name}\n" for file_name in names)
    skipped = len(done) - len(names)
    del done, labels  # or Windows would not rename

    writer.is_set[:] = True  # encode_rows has set the rows, in all ranks
    writer.count["train"] = len(names)
    mean, std, kind = normalization(plan, writer.arrays["train_images"][: len(names)])
    made_by = f"prepare.py imagenet --size {plan['image_size']} --batch {plan['batch']}"
    if plan["measure"]:
        made_by += " --measure"
    writer.finish(
        name,
        plan["class_names"],
        kind="latents",
        shape=list(shape),
        mean=mean,
        std=std,
        normalization=kind,
        skipped=skipped,
        image_size=plan["image_size"],
        batch=plan["batch"],
        vae=plan["vae"],
        vae_crc32=plan["vae_crc32"],
        files_crc32=plan["files_crc32"],
        labels_crc32=plan["labels_crc32"],
        license="yours",
        source="a folder of images",
        made_by=made_by,
    )
    print(f"normalization: {kind}")
    for file in ("done.npy", "plan.json"):
        os.remove(os.path.join(writer.path, file))


def fill_gaps(arrays, names, done):
    """Move rows from the end to the places of those that cannot be read.

    Returns the file names of the rows that are left, from the first one on. If a run ends within
    this function, the next run does it again with the same result.
    """
    count = int(np.count_nonzero(done == ENCODED))
    empty_rows = np.flatnonzero(done[:count] == UNREADABLE)
    last_rows = count + np.flatnonzero(done[count:] == ENCODED)
    names = np.array(names, object)
    for array in (arrays["train_images"], arrays["train_labels"], names):
        array[empty_rows] = array[last_rows]
    return names[:count].tolist()


def normalization(plan, stored):
    """The mean and std of latents, one a channel, and whether they are "published" or "measured".

    Published ones are known of the default VAE's latents of ImageNet. stored: (N, 2C, h, w).
    """
    is_published = plan["vae"] == SD_VAE and plan["image_size"] in PUBLISHED
    if is_published and not plan["measure"]:
        mean, std = PUBLISHED[plan["image_size"]]
        return mean, std, "published"
    mean, std = latent_moments(stored)
    return mean, std, "measured"


def find_reasons(labelled, rows, size):
    """Why these rows could not be read, [(name, reason)]. Other ranks and earlier runs have read
    some of them, so all are read once more."""
    reasons = []
    for row in rows:
        attempt = try_square(labelled.files[row], size, upright=False)
        reasons.append((labelled.names[row], attempt.reason or "it could not be read before"))
    return reasons


def classes_without_an_image(done, labels):
    """The labels, sorted, of the classes of which no image can be read."""
    return sorted(set(labels.tolist()) - set(labels[done == ENCODED].tolist()))


def let_them_be_read_again(done, labels, lost):
    """Let the next run read the images of these classes again.

    So the user can mend those files, under the same names, and lose nothing of the other work.
    """
    done[np.isin(labels, lost)] = TO_DO
    done.flush()


def refuse_lost_classes(lost, done, labelled, src):
    """Raise DataError about the classes of which no image can be read."""
    if not (done == ENCODED).any():
        raise DataError(f"none of the {len(done)} images in {src} can be read")
    raise DataError(
        f"no image of class {printable(labelled.classes[lost[0]])!r} in {src} can be read: "
        "mend its files under the same names, and give the command again"
    )


# ---- a look at what is there ---------------------------------------------------------------------


def check_dataset(path, src=None, vae_files=None, seed=0):
    """Print what a folder of data holds, and draw eight of its images into path/check.png.

    Data that are no images, such as sequences (C, L), are not drawn. src: where the images were
    that became latents, which are then drawn above them. Raises one DataError that names all that
    is wrong, a picture that cannot be drawn included.
    """
    header, data = load_dataset(path)
    stored = data["train_images"]
    if not len(stored):
        raise DataError(f"{path} holds no training images")
    wrong = check_counts(path, header, data["train_labels"])
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


def draw_examples(path, header, stored, rows, src, vae_files):
    """Draw these rows into path/check.png; latents under their originals if `src` is given.

    Of numbers that are not uint8 the smallest is drawn black, and the largest white.
    """
    is_latent = "vae" in header
    if is_latent:
        vae = load_vae(vae_files or header["vae"], crc32=header.get("vae_crc32"))
        means = stored[rows, : header["shape"][0]]
        lines = [decode(vae, torch.from_numpy(means))]  # of the picture: (8, H, W, C) each
        shown = "decoded examples"
    else:
        lines = [as_levels(stored[rows]).transpose(0, 2, 3, 1)]
        shown = "examples"
    if is_latent and src:
        originals = read_originals(path, header, src, rows, len(stored))
        lines.insert(0, originals)
        difference = np.abs(np.float32(originals) - lines[1]).mean()
        print(f"decoded images differ from their originals by {difference:.1f} of 255 levels")
        shown = "originals over decoded examples"
    draw_sheet(lines, os.path.join(path, "check.png"))
    print(f"{path}/check.png: {shown}")


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
    """Numbers of any kind -> uint8: the smallest becomes 0, and the largest 255."""
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
    Image.fromarray(picture).save(path)
