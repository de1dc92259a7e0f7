"""
A checkpoint -> images.

    python sample.py assets/digits.safetensors                       # samples.png: a grid, one step
    python sample.py ckpt.safetensors --nfe 4 --classes cat,dog      # four steps, two classes
    python sample.py ckpt.safetensors --n 50000 --out samples.npz    # uint8 NHWC, and its labels
    python sample.py ckpt.safetensors --nfe 4 --fid reference.npz    # the FID of 50,000 images
    torchrun --nproc_per_node=8 -- sample.py ckpt.safetensors --n 50000 --out samples.npz

(torchrun would take --n for an abbreviation of its own options; the -- before sample.py ends them.)

The sampler stands first: `sample`. Then come the noise, and the command: its options, the classes,
what is made (`Plan`), the score, and `main`, which has all steps in their order.

The noise and the label of image i depend on the seed and i alone: not on the batch size, the ranks
or the other images. Finished batches wait in OUT.parts/, with --fid in CKPT-...-fid.parts/. After a
kill the same command goes on from them, on any number of ranks, and ends with the same images;
another command with this OUT is refused, and so is the same one when code was edited. OUT appears
whole or not at all; what is there already is replaced with --overwrite only, but for the default
samples.png. A state of a run (state_STEP.safetensors) is sampled as its ckpt.safetensors is: by its
evaluation network.
"""

import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import fid
from batches import conditions
from checkpoint import raw_bytes
from device import (
    abilities,
    find_device,
    from_rank_0,
    join_ranks,
    on_rank_0,
    ranks_of_torchrun,
)
from dual import column, widest
from files import HERE, UserError, follow_link, refuse_long_name
from header import classes_with_images
from imageset import as_size
from loss import EULER
from model import load_model
from options import Parser, run
from parts import Parts
from pictures import (
    find_vae,
    form_of_images,
    output_kind,
    refuse_taken,
    rgb,
    to_images,
    unlike_pictures,
    write_images,
)
from products import RoundedCopies

SHOWN = 10  # class names that are printed
MOST_BATCHES = 10**7  # of which a list is kept


# ---- the sampler ---------------------------------------------------------------------------------


@torch.no_grad()
def sample(model, x1, y, w, nfe, euler=False):
    """Noise x1 (B, C, H, W) -> x0 (B, C, H, W), in nfe steps of one network call each.

    A step goes from time t to the next one: x += (t_next - t) k F(x, t, t_next), with k of loss.py.
    With euler, for a network that was trained by flow matching, it takes F(x, t, t).

    y: the network's conditions, here classes (B,) int64. w (B,): guidance weights. The network
    works in its parameters' dtype. Between steps x is float64, so that rounding does not add up
    (float32 where the device has no float64), and so is the result.
    """
    if nfe < 1:
        raise ValueError(f"nfe must be at least 1, not {nfe}")
    dtype = next(model.parameters()).dtype
    wide = widest(x1.device)
    times = torch.linspace(1, 0, nfe + 1, dtype=wide, device=x1.device)
    k = column(w.to(wide), x1) if model.config.scaled else 1
    w = w.to(dtype)
    x = x1.to(wide)
    for t, t_next in itertools.pairwise(times):
        s = t if euler else t_next
        F = model(x.to(dtype), t.to(dtype).expand(len(x)), s.to(dtype).expand(len(x)), y, w)
        x = x + (t_next - t) * k * F.to(wide)
    return x


def make_sampler(model, nfe, euler=False, bfloat16=True):
    """`sample` as a function of (x1, y, w), in bfloat16 where the device has it.

    Its linear layers then have copies of their weights in bfloat16, beside those in float32. The
    copies are made again when PyTorch has counted a write to a weight. It does not count writes
    through .data, nor any to weights that were made in inference mode.
    """
    device = next(model.parameters()).device
    bfloat16 = bfloat16 and abilities(device)[0]
    copies = RoundedCopies([model] if bfloat16 else [])

    @torch.no_grad()
    def sampler(x1, y, w):
        copies.refresh_if_changed()
        with copies.in_use(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            return sample(model, x1, y, w, nfe, euler)

    return sampler


def noise_and_labels(seed, indices, shape, class_counts=None):
    """The noise (n, *shape) float32 and the labels (n,) int64 of images `indices`.

    Labels come as often as in class_counts. Without these all are 0, which is "no class" of a
    network without classes.
    """
    share = np.ones(1)
    if class_counts:
        share = np.cumsum(class_counts, dtype=np.float64) / np.sum(class_counts)
    noise = np.empty((len(indices), *shape), np.float32)
    labels = np.empty(len(indices), np.int64)
    for row, i in enumerate(indices):
        rng = np.random.Generator(np.random.Philox(key=[seed, i]))
        labels[row] = np.searchsorted(share, rng.random(), side="right")
        rng.standard_normal(dtype=np.float32, out=noise[row])
    return torch.from_numpy(noise), torch.from_numpy(labels)


# ---- options -------------------------------------------------------------------------------------


def parse(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint")
    add("--nfe", type=int, default=1, help="steps, one network call each (default 1)")
    add("--n", type=int, help="images (default: a grid of all classes; with --fid 50000)")
    add(
        "--classes",
        help="names or numbers of classes, separated by commas, taken in turn; a name that is "
        "a number, too, is the name (default: in a grid all that have training images; with --n or "
        "--fid as often as in the training data)",
    )
    add(
        "--w",
        type=float,
        help="the guidance weight (default: the trained one; of a range its geometric mean)",
    )
    add("--seed", type=int, default=0, help="of noise and labels (default 0)")
    add(
        "--out",
        help="a .png for a grid (default: samples.png), an .npz, or a new folder for PNGs; a file "
        "that is there already is refused",
    )
    add("--overwrite", action="store_true", help="replace the .png or .npz that is there already")
    add("--fid", metavar="REF", help="keep no images; print their FID against these statistics")
    add("--inception", metavar="PATH", help="where the Inception weights for --fid lie")
    add("--vae", help="where the VAE of latents lies (default: on the Hugging Face hub)")
    add(
        "--batch",
        type=int,
        default=250,
        help="images of one network call (default 250); each rank takes whole batches",
    )
    add(
        "--precision",
        choices=("bfloat16", "float32"),
        help="of the network (default: bfloat16 on a CUDA device that has it, else float32)",
    )
    add("--device", help="default: a GPU where there is one")
    args = parser.parse_args(argv)
    check_values(args)
    if args.fid:
        prepare_fid(args)
    else:
        prepare_out(args)
    return args


def check_values(args):
    for name in ("nfe", "n", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if (args.n or 0) // args.batch > MOST_BATCHES:
        raise UserError(f"--n {args.n} in batches of {args.batch} are too many: raise --batch")
    for name in ("fid", "out"):
        if getattr(args, name) == "":
            raise UserError(f"--{name} is given without a name")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be at least 0 and below 2**63, not {args.seed}")
    if args.inception and not args.fid:
        raise UserError("--inception goes with --fid only")


def prepare_fid(args):
    """With --fid no images are kept, but for a while their features."""
    if args.out or args.overwrite:
        raise UserError("--fid keeps no images, so it goes without --out and --overwrite")
    if args.n is None:
        args.n = 50_000
    if args.n < 2:
        raise UserError(f"--fid needs at least 2 images, not {args.n}")
    args.kind = None


def prepare_out(args):
    """Find out which kind of output --out names, and complain now rather than after the work."""
    if args.out is None:  # its own file, which the next grid replaces
        args.overwrite = True
    out = args.out or "samples.png"
    args.kind = output_kind(out)
    args.out = follow_link(os.path.normpath(out))
    refuse_taken(args.out, args.kind, args.overwrite)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    refuse_long_name(args.out)


def guidance_weight(asked, trained):
    """The w to sample with: the one asked for, if the network was trained with it.

    By default the trained one; of a range its geometric mean. trained: the checkpoint's guidance.
    """
    if trained["sampler"] == "constant":
        low = high = trained["w"]
    else:
        low, high = trained["w_min"], trained["w_max"]
    if asked is None:
        return low if low == high else (low * high) ** 0.5
    if not low <= asked <= high:
        span = f"= {low:g} only" if low == high else f"from {low:g} to {high:g}"
        raise UserError(f"--w: this model was trained with w {span}, not {asked:g}")
    return asked


# ---- classes -------------------------------------------------------------------------------------


def class_names(header):
    """The names of the classes, from the data's header; [] where it has none."""
    names = header.get("class_names")
    if not isinstance(names, list) or len(names) != len(header["class_counts"]):
        return []
    return [str(name).strip() for name in names]


def find_classes(text, names, num_classes):
    """The numbers of the classes that --classes asks for. Names may have commas in them."""
    if not num_classes:
        raise UserError("--classes: this model was trained without classes")
    # In a locale without UTF-8 Python reads a name that is not English as other letters.
    text = os.fsencode(text).decode(errors="surrogateescape")
    classes = []
    words = text.split(",")
    while words:
        length = len(words)  # of the longest name that begins here, or 1
        while length > 1 and ",".join(words[:length]).strip() not in names:
            length -= 1
        classes.append(find_class(",".join(words[:length]).strip(), names, num_classes))
        words = words[length:]
    return classes


def find_class(word, names, num_classes):
    """The number of a class from its name or number. A name that is a number, too, is the name."""
    if word and word in names:
        return names.index(word)
    if word.isdecimal() and len(word) < 20 and int(word) < num_classes:
        return int(word)
    known = f"numbers from 0 to {num_classes - 1}, such as 0,3,7"
    if any(names):
        examples = difflib.get_close_matches(word, names) or names[:3]
        known += f", and names such as {', '.join(map(repr, examples))}"
    raise UserError(f"--classes: {word!r} is not a class; this model knows {known}")


def tell_classes(classes, names):
    """Print which classes the images are of."""
    if classes is None:
        print("classes: as often as in the training data")
        return
    told = []
    for c in classes[:SHOWN]:
        has_other_name = names and names[c] != str(c)
        told.append(f"{c} {names[c]!r}" if has_other_name else str(c))
    if len(classes) > SHOWN:
        told.append(f"... ({len(classes)} of them)")
    print(f"classes, in turn: {', '.join(told)}")


# ---- what is made --------------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """Everything that the images depend on, but for the network and its data's header."""

    n: int  # images
    nfe: int
    w: float  # guidance weight
    seed: int
    shape: list[int]  # of one image of noise
    class_counts: list[int]
    classes: list[int] | None  # taken in turn; None: drawn from class_counts
    euler: bool  # the network was trained by flow matching
    batch: int
    bfloat16: bool

    def batches(self):
        """The indices of the images, as one range a batch."""
        starts = range(0, self.n, self.batch)
        return [range(first, min(first + self.batch, self.n)) for first in starts]

    def noise_and_labels(self, indices):
        """Noise (B, *shape) float32 and classes (B,) int64."""
        noise, labels = noise_and_labels(self.seed, indices, self.shape, self.class_counts)
        if self.classes:
            turns = [self.classes[i % len(self.classes)] for i in indices]
            labels = torch.tensor(turns)
        return noise, labels

    def labels(self):
        """The classes of all images, (n,) int64; None where there are no classes."""
        if not self.class_counts:
            return None
        without_noise = dataclasses.replace(self, shape=[0])  # noise is what takes time
        _, labels = without_noise.noise_and_labels(range(self.n))
        return labels.numpy()

    def columns(self):
        """How many columns a grid has. Where classes take turns, and there are at most 32, each
        column shows one class. Where they are drawn at random, there are ten columns."""
        if not self.classes:
            return 10
        turns = max(1, 10 // len(self.classes))  # a grid of one or two classes is not a thin strip
        return min(turns * len(self.classes), 32)


def make_plan(args, config, about, device):
    """The plan of this command line, for a network of this config and its checkpoint's `about`."""
    header = about["data"]
    has_bfloat16, _ = abilities(device)
    if args.precision == "bfloat16" and not has_bfloat16:
        raise UserError(
            f"--precision bfloat16 takes a CUDA device that has it, which {device} is not"
        )
    classes = None
    if args.classes is not None:
        classes = find_classes(args.classes, class_names(header), config.num_classes)
    elif args.n is None and config.num_classes:
        classes = classes_with_images(header)
    n = args.n
    if n is None and classes:
        n = len(classes) * max(1, 80 // len(classes))
    elif n is None:
        n = 80
    if n > 10**9:
        raise UserError(f"--n must be at most a billion, not {n}")
    bfloat16 = has_bfloat16 and args.precision != "float32"
    return Plan(
        n=n,
        nfe=args.nfe,
        w=guidance_weight(args.w, about["guidance"]),
        seed=args.seed,
        shape=noise_shape(config, header),
        class_counts=header["class_counts"],
        classes=classes,
        euler=about.get("objective") in EULER,
        batch=min(args.batch, n),
        bfloat16=bfloat16,
    )


def noise_shape(model_config, header):
    """(C, H, W) of the noise. Not every checkpoint has it in its header."""
    return header.get("shape") or [model_config.in_channels, *model_config.height_and_width]


def key_of(plan, about, model, device, vae, score):
    """16 hexadecimal digits of all that the batches depend on, also weights and this code."""
    settings = [dataclasses.asdict(plan), about, device.type]
    settings.append(vae.crc32 if vae else None)
    settings.append(score.inception.digest if score else None)
    digest = hashlib.sha256(json.dumps(settings).encode())
    for t in model.state_dict().values():
        digest.update(raw_bytes(t))
    for name in sorted(os.listdir(HERE)):
        if name.endswith(".py"):
            with open(os.path.join(HERE, name), "rb") as f:
                digest.update(f.read())
    return digest.hexdigest()[:16]


# ---- the score -----------------------------------------------------------------------------------


class Score:
    """The FID of samples against the statistics in a file `reference`.

    image_size: of the samples, such as "64x48". What is kept of a batch are Inception's features.
    """

    def __init__(self, reference, weights, device, image_size):
        self.path = reference
        self.device = device
        self.inception = fid.load_inception(weights, device)
        self.reference = fid.read_reference(reference, self.inception, image_size=image_size)

    def features(self, images):
        """uint8 (B, H, W, C) -> (B, 2048) float32."""
        pixels = torch.from_numpy(rgb(images)).permute(0, 3, 1, 2).to(self.device)
        return self.inception(pixels, resize="tf1").cpu().numpy()

    def result(self, batches):
        """Batches of features -> a text with their FID."""
        moments = fid.Moments(fid.FEATURES)
        for features in batches:
            moments.add(torch.from_numpy(features))
        distance = fid.frechet_distance(*moments.mean_and_covariance(), *self.reference)
        return f"FID {distance:.4f}{moments.remark_on_few()} against {self.path}"


# ---- the command ---------------------------------------------------------------------------------


def sample_batches(batches, plan, model, device, header, vae, show):
    """Yield each batch with its images, uint8 (B, H, W, C). show: with a progress bar."""
    sampler = make_sampler(model, plan.nfe, plan.euler, plan.bfloat16)
    drawn = one_ahead(plan.noise_and_labels, batches)
    for batch in tqdm(batches, desc="sampling", unit="batch", disable=not show):
        x1, labels = next(drawn)
        y = conditions(labels, header).to(device)
        w = torch.full((len(x1),), plan.w, device=device)
        x0 = sampler(x1.to(device), y, w)
        yield batch, to_images(x0, header, vae)


def one_ahead(function, items):
    """function(item) of each item in turn. A thread makes the next while the last is in use."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(function, item)
            if waiting:
                yield waiting.result()
            waiting = following
        if waiting:
            yield waiting.result()


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def check_images_fit(args, header, shape):
    """Raise UserError where the images of this model fit neither --fid nor the kind of --out."""
    unlike = unlike_pictures(header, shape)
    if unlike and args.fid:
        raise UserError(f"--fid is for uint8 images of 1 or 3 channels, not {unlike}")
    if unlike and args.kind != "npz":
        raise UserError(
            f"a PNG has 1 or 3 channels of uint8, and this model makes {unlike}: "
            "--out samples.npz keeps them"
        )


def folder_of_parts(args, key):
    """Where finished batches wait. With --fid each run has its own folder, by its key."""
    if args.fid:
        return f"{os.path.basename(args.checkpoint)}-{key}-fid.parts"
    return args.out + ".parts"


def claim_parts(parts, args, shape, dtype):
    """Make the folder of finished batches this run's own. Returns the batches still to be made.

    shape, dtype: of what is kept of each image. Raises UserError where the disk has no room.
    """
    parts.check_room(shape, dtype, and_whole=args.kind == "npz")
    parts.hold()
    if not args.fid:
        try:
            refuse_taken(args.out, args.kind, args.overwrite)
        except UserError:  # another run has written it while this one waited for the folder
            parts.remove()
            raise
    return parts.missing()


@torch.no_grad()
def main():
    args = parse()
    rank, ranks, _ = ranks_of_torchrun()
    device = find_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # A rank that dies ends the others. The patience is for one that is merely slow.
    join_ranks("gloo", timedelta(days=1))

    # What is to be made.
    model, about = load_model(args.checkpoint, device)
    header = about["data"]
    plan = make_plan(args, model.config, about, device)
    check_images_fit(args, header, plan.shape)
    vae = find_vae(header, device, args.vae)
    shape, dtype = form_of_images(plan.shape, header, vae)
    score = None
    if args.fid:
        score = Score(args.fid, args.inception, device, as_size(shape))
        shape, dtype = (fid.FEATURES,), np.float32  # of an image only this is kept
    key = key_of(plan, about, model, device, vae, score)
    parts = Parts(folder_of_parts(args, key), key, plan.batches())
    missing = from_rank_0(on_rank_0(claim_parts, parts, args, shape, dtype))
    if rank == 0 and plan.class_counts:
        tell_classes(plan.classes, class_names(header))

    # Each rank makes its share of the batches.
    mine = missing[rank::ranks]
    start = time.perf_counter()
    for batch, images in sample_batches(mine, plan, model, device, header, vae, show=rank == 0):
        parts.save(batch, score.features(images) if score else images)
    wait_for_all()
    seconds = time.perf_counter() - start

    # The first one collects them.
    if rank > 0:
        return
    if score:
        result = score.result(parts.load())
    else:
        write_images(args.out, args.kind, parts.load(), plan.n, plan.labels(), plan.columns())
        result = args.out
    parts.remove()
    steps = "1 step" if plan.nfe == 1 else f"{plan.nfe} steps"
    made = sum(len(batch) for batch in missing)
    speed = f"{made / seconds:.0f} images/s on {ranks} x {device.type}"
    if made == 0:
        speed = "all from an earlier run"
    print(f"{result}: {plan.n} images in {steps} at w = {plan.w:g}, {speed}")


if __name__ == "__main__":
    run(main)
