"""
Images -> latents of a VAE, for `prepare.py imagenet`.

The command can be killed and given again, and several ranks of one machine can share the work. The
result is the same, because the work is fixed beforehand: file i, in sorted order, becomes row i of
the arrays in NAME.partial, and a batch always holds the same files. Two more files lie there.
done.npy says of each row whether it is encoded (1), could not be read (2) or is still to do (0).
plan.json says what was begun. The steps:

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
from torch.utils.data import DataLoader
from tqdm import tqdm

from claims import LEFT_OUT, claim, clean_up_after, remove_files, unfinished
from dataset import Writer, write_left_out
from device import from_all_ranks, from_rank_0, join_ranks, on_rank_0, ranks_of_torchrun
from files import written
from header import DataError
from images import (
    Remarks,
    ctrl_c_later,
    follow_parent,
    printable,
    readable,
    tell_left_out,
    try_square,
)
from labels import find_labelled, tell_notes
from vae import PUBLISHED, SD_VAE, encode, latent_moments, load_vae

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
    measure: normalize with the latents' own mean and std, even where others are published.
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
    if rank == 0:
        tell_notes(labelled)
        tell_left_out(labelled.left_out)
        print("EXIF orientation is not applied, as in ADM's ImageNet", file=sys.stderr)
    writer = on_rank_0(begin_or_say_why, path, plan, labelled, shape)
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


def begin_or_say_why(path, *arguments):
    """`begin`, where an OSError becomes a DataError."""
    try:
        return begin(path, *arguments)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from None


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
        worker_init_fn=follow_parent,
    )
    with ctrl_c_later():
        read = iter(loader)  # starts the workers
    remarks = Remarks()
    bar = tqdm(
        total=len(done),
        initial=np.count_nonzero(done),
        desc="encoding",
        unit="img",
        disable=rank > 0,
    )
    with bar:
        for rows, attempts in zip(batches, read):
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
