"""
Images -> latents of a VAE.
"""
import json
import os
import shutil
import sys
import zlib
from datetime import timedelta
from functools import partial

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset import DataError, Writer, load_dataset
from images import end_with_parent, list_images, read_batch

SD_VAE = "stabilityai/sd-vae-ft-ema"


def imagenet(args):
    """File i of SRC, in sorted order, becomes row i of the arrays in DST.partial; done.npy says which rows are there
    (1) or cannot be (2). So ranks share the work, and a killed run goes on. Batches are always the same, hence the result."""
    import torch.distributed as dist
    from torch.cuda import is_available
    from torch.utils.data import DataLoader

    from files import hold, written
    from vae import PUBLISHED, encode, latent_moments, load_vae
    rank, ranks, local = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if ranks != int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        raise DataError("imagenet takes the GPUs of one machine: its ranks write into one memory map")
    if os.path.exists(args.path):
        raise DataError(f"{args.path} is there already: move it away to make it again")
    vae = load_vae(args.vae, f"cuda:{local}" if is_available() else "cpu")
    if args.size < 1 or args.size % vae.shrinks or args.batch < 0:
        raise DataError(f"--size must be a multiple of {vae.shrinks}, as this VAE shrinks, and --batch at least 1, not {args.size} and {args.batch}")
    C, side, batch = vae.config.latent_channels, args.size // vae.shrinks, args.batch or max(1, 2 ** 22 // args.size ** 2)
    classes, files = list_images(args.src)
    names = [file[len(args.src):].lstrip(os.sep) for file, _ in files]
    plan = dict(image_size=args.size, batch=batch, vae=args.vae_name or args.vae, vae_crc32=vae.crc32, class_names=classes,
                files_crc32=f"{zlib.crc32(os.fsencode(chr(10).join(names))):08x}")
    at = lambda file: os.path.join(args.path + ".partial", file)
    barrier = dist.barrier if ranks > 1 else lambda: None
    if ranks > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))         # torchrun ends all ranks when one of them ends
    complaint = [None]
    if rank == 0:
        try:
            lock, begun = hold(at(""), 10), json.load(open(at("plan.json"))) if os.path.exists(at("plan.json")) else {}
            if os.path.exists(args.path):                                  # since the look above
                if not begun:
                    shutil.rmtree(at(""))                                  # hold made it
                raise DataError(f"{args.path} is there already: another run made it")
            if differ := [key for key in plan if begun.get(key, plan[key]) != plan[key]]:
                raise DataError(f"{at('')} was begun with another {' and another '.join(differ)}: delete it to start over")
            writer = Writer(args.path, (2 * C, side, side), {"train": len(files), "test": 0}, np.float16, bool(begun), lock)
            if not begun:
                writer.arrays["train_labels"][:] = [label for _, label in files]
                writer.arrays["train_labels"].flush()
                with written(at("done.npy")) as f:
                    np.save(f, np.zeros(len(files), np.uint8))
                with written(at("plan.json")) as f:                        # last: with it, all of them are there
                    f.write(json.dumps(plan).encode())
        except (DataError, OSError, ValueError, AttributeError) as error:
            complaint = [str(error) if isinstance(error, DataError) else f"cannot write {args.path}: {error}"]
    if ranks > 1:
        dist.broadcast_object_list(complaint)
    if complaint[0]:
        raise DataError(complaint[0])
    stored, done = (np.load(at(file), mmap_mode="r+") for file in ("train_images.npy", "done.npy"))
    mine = [np.arange(first, min(first + batch, len(files))) for first in range(rank * batch, len(files), ranks * batch)]
    mine = [rows for rows in mine if not done[rows].all()]
    loader = DataLoader([file for file, _ in files], batch_sampler=mine, collate_fn=partial(read_batch, size=args.size),
                        num_workers=max(1, (os.cpu_count() or 1) // ranks), worker_init_fn=end_with_parent)
    with tqdm(total=len(files), initial=np.count_nonzero(done), desc="encoding", unit="img", disable=rank > 0) as bar:
        for rows, images in zip(mine, loader):
            whole = np.array([not isinstance(image, str) for image in images])
            for i in np.flatnonzero(~whole):
                tqdm.write(f"skipped {names[rows[i]]}: {images[i]}", file=sys.stderr)
            if whole.any():
                stored[rows[whole]] = encode(vae, np.stack([images[i] for i in np.flatnonzero(whole)]))
                stored.flush()
            done[rows] = np.where(whole, 1, 2)
            bar.update(np.count_nonzero(done) - bar.n)
    barrier()
    if rank > 0:
        return

    # Rows from the end take the places of those that cannot be: again with the same result, should it end here.
    n = writer.count["train"] = int(np.count_nonzero(done == 1))
    if not n:
        raise DataError(f"none of the {len(files)} images in {args.src} can be read")
    to, source, names = np.flatnonzero(done[:n] == 2), n + np.flatnonzero(done[n:] == 1), np.array(names, object)
    for a in (stored, writer.arrays["train_labels"], names):
        a[to] = a[source]
    with open(at("train_files.txt"), "w", encoding="utf-8", errors="surrogateescape") as f:
        f.writelines(f"{name}\n" for name in names[:n])
    known = plan["vae"] == SD_VAE and args.size in PUBLISHED
    mean, std = PUBLISHED[args.size] if known else latent_moments(stored[:n])
    del stored, done, a                                                    # or Windows would not rename
    writer.finish(args.name, **plan, kind="latents", shape=[C, side, side], mean=mean, std=std, skipped=len(files) - n,
                  normalization="published" if known else "measured", license="yours", source="a folder of images",
                  made_by=f"prepare.py imagenet --size {args.size} --batch {batch}")
    for name in ("done.npy", "plan.json"):
        os.remove(os.path.join(args.path, name))


def check(args):
    """Prints what a folder of data holds and draws eight of its images; raises DataError where something is wrong."""
    from torch import from_numpy

    from vae import decode, latent_moments, load_vae
    header, data = load_dataset(args.path)
    stored, latent, classes, wrong = data["train_images"], "vae" in header, header["num_classes"], []
    counts = np.bincount(data["train_labels"], minlength=classes)[:classes]
    print(f"{args.path}: {len(stored)} {header.get('kind', 'images')}, {'x'.join(map(str, header['shape']))}, "
          + (f"{classes} classes of {counts.min()} to {counts.max()}" if classes else "no classes"))
    if counts.tolist() != header["class_counts"] or 0 in counts:
        wrong.append("a class is empty, or the header's class_counts are not those of the labels")
    rows = np.random.default_rng(args.seed).permutation(len(stored))[:max(8, 2 ** 27 // stored[0].size)]
    x = np.float32(stored[np.sort(rows)])
    if flat := np.count_nonzero(np.ptp(x.reshape(len(x), -1), axis=1) == 0):
        wrong.append(f"{flat} of {len(x)} images have one value everywhere")
    moments = latent_moments(x) if latent else [f(x, axis=(0, 2, 3), dtype=np.float64) for f in (np.mean, np.std)]
    for c, (mean, std, m, sd) in enumerate(zip(*moments, header["mean"], header["std"])):
        mean, std = (mean - m) / sd, std / sd
        print(f"channel {c}, normalized: mean {mean:.3f}, std {std:.3f}")
        if not (abs(mean) < 0.1 and abs(std - 1) < 0.1 if latent else std > 0.01):
            wrong.append(f"channel {c} has mean {mean:.3g} and std {std:.3g}" + ", not about 0 and 1" * latent)
    sheet = [stored[rows[:8]].transpose(0, 2, 3, 1)]
    if latent:
        vae = load_vae(args.vae or header["vae"], crc32=header.get("vae_crc32"))
        sheet = [decode(vae, from_numpy(stored[rows[:8], :header["shape"][0]]))]
    if latent and args.src:
        with open(os.path.join(args.path, "train_files.txt"), encoding="utf-8", errors="surrogateescape") as f:
            files = f.read().split("\n")
        if len(files) != len(stored) + 1 or "image_size" not in header:
            raise DataError(f"{args.path}/train_files.txt is not whole, or header.json lacks its image_size")
        originals = read_batch([os.path.join(args.src, files[row]) for row in rows[:8]], header["image_size"])
        if lost := [image for image in originals if isinstance(image, str)]:
            raise DataError(f"an original in {args.src} cannot be read: {lost[0]}")
        sheet.insert(0, np.stack(originals).transpose(0, 2, 3, 1))
        print(f"decoded images differ from their originals by {np.abs(np.float32(sheet[0]) - sheet[1]).mean():.1f} of 255 levels in the mean")
    sheet = np.concatenate([np.concatenate(images, axis=1) for images in sheet])
    Image.fromarray(np.broadcast_to(sheet, (*sheet.shape[:2], 3))).save(os.path.join(args.path, "check.png"))
    print(f"{args.path}/check.png: {'originals over ' * bool(latent and args.src)}{'decoded ' * latent}examples")
    if wrong:
        raise DataError(f"{args.path}: {'; '.join(wrong)}")
