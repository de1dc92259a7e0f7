"""
How good are images? FID, Inception Score, precision and recall, of Inception's features.

    python fid.py SAMPLES REFERENCE                  # where both are images: precision, recall too
    python fid.py --save-stats IMAGES stats.npz      # the statistics of a reference, once
    python fid.py --save-stats IMAGES stats.npz --size 256    # of images cut to this size
    torchrun --nproc_per_node=8 fid.py SAMPLES REFERENCE --state=progress    # can be continued

Images: a folder or .zip of image files, at any depth (images.py says which); an .npz or .npy of
uint8 (N, H, W, 3 or 1); or a data/NAME of prepare.py, whose training images are taken. Statistics:
an .npz of mu and sigma, as --save-stats and pytorch-fid write it (with pytorch-fid's compare by
--resize=torch), or a .pkl of {"fid": {"mu", "sigma"}}, read without running the pickle. ADM's
reference batches hold images and statistics. As REFERENCE, FID uses their statistics, and precision
and recall use their images. As SAMPLES, only their images count. With --size images are cut as
prepare.py imagenet does.

In this file: the features of many images; the scores; the command. frechet.py has the distance,
statistics_files.py the files of statistics, imageset.py the images, inception.py the network.
"""

import os
import re
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from dataset import need_room
from device import find_device, from_all_ranks, join_ranks, ranks_of_torchrun
from files import FidError, check_writable, follow_link, reading
from frechet import FEATURES, Moments, frechet_distance
from imageset import arrays_in, images_in, kind_of, open_images, tell
from inception import load_inception
from options import Parser, run
from statistics_files import is_of_save_stats, read_statistics, statistics_in, write_npz

SAVE_SECONDS = 60  # between two saves of --state
NEAREST = 3  # neighbours, of precision and recall


# ---- features of many images ---------------------------------------------------------------------


def features_of(images, net, resize="tf1", batch=128, keep=True, state=None):
    """Moments of the features of all ranks' images and, on rank 0, the features (n, 2048).

    images: of imageset.open_images; each rank takes its share. keep=False: without the features,
    (0, 2048). state: files STATE-RANK.npz keep what is done, and the next run continues from them.
    Where one cannot be written, a message says so, and the work goes on.
    """
    rank, ranks = 0, 1
    if dist.is_initialized():
        rank = dist.get_rank()
        ranks = dist.get_world_size()
    begin = len(images) * rank // ranks
    last = len(images) * (rank + 1) // ranks
    about = f"{images.about}, {begin} to {last}, {resize}, weights {net.digest}, {keep}"
    file = state_file(state, rank) if state else None
    moments = Moments(FEATURES)
    kept = [torch.empty(0, FEATURES)]
    if file and os.path.exists(file):
        begin = load_state(file, about, moments, kept)  # moments and kept are filled in place
    saved = time.monotonic()
    starts = tqdm(range(begin, last, batch), desc=images.path, unit="batch", disable=rank > 0)
    # CUDA runs `net` asynchronously: while it computes, the loop is already reading the next batch,
    # on several threads.
    with ThreadPoolExecutor(images.threads) as pool:
        for start in starts:
            end = min(start + batch, last)
            pixels = [x for x in pool.map(images.__getitem__, range(start, end)) if x is not None]
            if pixels:
                pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)  # (B, 3, H, W)
                features = net(pixels.to(net.fc.weight.device), resize)
                moments.add(features)
                if keep:
                    kept.append(features)
            if file and (time.monotonic() > saved + SAVE_SECONDS or end == last):
                kept = [on_cpu(kept)]
                try:
                    write_npz(file, about=about, kept=kept[0], next=end, **moments.state())
                except OSError as error:  # a full disk, perhaps: the score needs no state
                    tqdm.write(f"fid.py: could not save --state: {error}", file=sys.stderr)
                saved = time.monotonic()
    for other in from_all_ranks(images.remarks.misnamed):
        images.remarks.misnamed.update(other)
    if rank == 0:
        images.remarks.tell_misnamed()
    if ranks == 1:
        return moments, on_cpu(kept)
    return gather(moments, on_cpu(kept))


def state_file(state, rank):
    return f"{state}-{rank}.npz"


def gather(moments, features):
    """Every rank calls this with its own: the moments of all and, on rank 0, all features."""
    moments.all_reduce()
    if dist.get_rank() > 0:
        dist.gather_object(features)
        return moments, None
    features_of_ranks = [None] * dist.get_world_size()
    dist.gather_object(features, features_of_ranks)
    return moments, torch.cat(features_of_ranks)


def load_state(file, about, moments, kept):
    """Fill moments and kept with what a run has saved. Returns the next image. Raises FidError."""
    with reading(file), np.load(file, allow_pickle=False) as state:
        if str(state["about"]) != about:
            raise FidError(
                f"{file} is of other images, options or number of processes: "
                "delete it, or give another --state"
            )
        moments.merge(state["n"], state["mean"], state["scatter"])
        kept.append(torch.from_numpy(state["kept"]))
        return int(state["next"])


def on_cpu(kept):
    return torch.cat([part.cpu() for part in kept])


# ---- a reference: statistics of the same network ------------------------------------------------


def made_with(net, resize="tf1"):
    """What --save-stats notes in its file. Statistics compare only where they share it."""
    return f"resize {resize}, weights {net.digest[:8]}"


def split_notes(notes):
    """The notes of --save-stats -> what made_with says, and the size of the images, as "64x48".

    The size is "" where it is not noted.
    """
    found = re.fullmatch(r"(.*), images (\d+x\d+)", notes)
    return found.groups() if found else (notes, "")


def read_reference(path, net, resize="tf1", image_size=""):
    """(mu, sigma) of a file, which features of net(images, resize) compare with.

    image_size: of these images, as "64x48"; "" where it is not known. For sample.py and report.py.
    Raises FidError.
    """
    mu, sigma, notes = read_statistics(path)
    notes, size_of_reference = split_notes(notes)
    dim = net.fc.in_features
    if len(mu) != dim:
        raise FidError(
            f"{path}: statistics of {len(mu)} dimensions, where Inception's features have {dim}"
        )
    refuse_other_notes(path, notes, made_with(net, resize))
    tell_other_size(path, size_of_reference, image_size)
    return mu, sigma


def refuse_other_notes(path, notes, made):
    """Raise FidError where the statistics of a file were made otherwise than `made`."""
    if notes and notes != made:
        raise FidError(
            f"{path} was made with {notes}, which does not compare with what is made with {made}"
        )


def tell_other_size(path, size_of_reference, image_size):
    """Say where a reference is of images of another size. A size is "" where it is not known."""
    if size_of_reference and image_size and size_of_reference != image_size:
        tell(
            f"{path}: its images are {size_of_reference} and the samples {image_size}, "
            "so the FID measures the change of size, too"
        )


# ---- scores --------------------------------------------------------------------------------------


def inception_score(logits, splits=10, seed=0):
    """Mean and standard deviation over parts of exp E KL(p(y|x), p(y)).

    logits: (N, 1008). The parts are of an order that is drawn with the seed.
    """
    order = np.random.default_rng(seed).permutation(len(logits))
    scores = []
    for rows in np.array_split(order, splits):
        if len(rows) == 0:
            continue
        p = logits[rows].double().softmax(1)  # (rows, 1008): p(y|x)
        p_y = p.mean(0)
        kl = torch.xlogy(p, p).sum(1).mean() - torch.xlogy(p_y, p_y).sum()
        scores.append(kl.exp().item())
    return np.mean(scores), np.std(scores)


def precision_recall(samples, reference, k=NEAREST, size=2**25):
    """Precision and recall of Kynkaanniemi et al. (2019), two floats.

    The share of samples (N, D) that lie near the reference (M, D), and the other way round. Near is
    within the ball around a point that reaches its k-th nearest of its own kind. About `size`
    float64 distances are in memory at a time. Raises FidError for k images or fewer.
    """
    if min(len(samples), len(reference)) <= k:
        raise FidError(
            f"precision and recall need more than {k} images of each kind, "
            f"not {len(samples)} and {len(reference)}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = samples.to(device, torch.float64)
    b = reference.to(device, torch.float64)
    radius_a = radii(a, k, size)  # (N,)
    radius_b = radii(b, k, size)  # (M,)
    rows = max(1, size // len(b))
    near = []
    covered = torch.zeros(len(b), dtype=torch.bool, device=device)
    for part, radius in zip(chunks(a, rows), radius_a.split(rows), strict=True):
        distances = distances_between(part, b)  # (rows, M)
        near.append((distances <= radius_b).any(1))
        covered |= (distances <= radius[:, None]).any(0)
    return torch.cat(near).double().mean().item(), covered.double().mean().item()


def radii(x, k, size):
    """(N, D) -> the distance (N,) of each point to its k-th nearest other."""
    found = []
    for part in chunks(x, max(1, size // len(x))):
        nearest = distances_between(part, x).topk(k + 1, largest=False)  # the point itself is one
        found.append(nearest.values[:, k])
    return torch.cat(found)


def chunks(x, rows):
    """So many rows of x (N, D) at a time, with a progress bar."""
    return tqdm(x.split(rows), desc="precision, recall", unit="part", leave=False)


def distances_between(x, y):
    return torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")


# ---- the command ---------------------------------------------------------------------------------


class Input:
    """What a person names on the command line: images, statistics, or both."""

    def __init__(self, path, size=0, is_reference=False):
        self.path = path
        self.images = None  # of imageset.open_images
        self.gaussian = None  # (mu, sigma), of a file or, after `measure`, of the images
        self.notes = ""  # how --save-stats made the statistics of a file
        self.image_size = ""  # "64x48", where it is known
        self.features = None  # (n, 2048), of the images, after `measure`
        self.few = ""  # after `measure` of too few images: a remark that they are
        has_images, has_statistics = contents(path)
        # ADM's batches hold both. As samples they are measured; as a reference their published mu
        # and sigma count.
        use_file = has_statistics and (is_reference or not has_images)
        if has_images:
            self.images = open_images(path, size)
            self.image_size = self.images.image_size
        if use_file:
            mu, sigma, notes = read_statistics(path)
            self.gaussian = mu, sigma
            self.notes, size_of_statistics = split_notes(notes)
            self.image_size = self.image_size or size_of_statistics

    def dimensions(self):
        return FEATURES if self.gaussian is None else len(self.gaussian[0])

    def measure(self, net, args, state):
        """Called by all ranks. The results are rank 0's."""
        if self.images is None:
            return
        keep = not args.save_stats
        moments, self.features = features_of(self.images, net, args.resize, args.batch, keep, state)
        if self.gaussian is None and ranks_of_torchrun()[0] == 0:
            self.gaussian = moments.mean_and_covariance()
            self.few = moments.remark_on_few()
            if self.few and args.save_stats:  # else it stands beside the FID
                tell(
                    f"{self.path}: {moments.n} images for {FEATURES} dimensions: "
                    "the covariance is rank deficient, FID biased upward"
                )
            if moments.n < len(self.images):
                tell(f"{self.path}: {moments.n} of {len(self.images)} images could be read")


def contents(path):
    """(whether a path has images, whether it has statistics). Raises FidError."""
    with reading(path):
        kind = kind_of(path)
        if kind != "npz":
            has_images = kind in ("folder", "npy", "data")
            return has_images, not has_images
        with zipfile.ZipFile(path) as archive:
            arrays = arrays_in(archive)
        has_statistics = statistics_in(arrays)
        # Where it has neither, open_images says what is wanted.
        return bool(images_in(arrays)) or not has_statistics, has_statistics


def parse(argv):
    parser = Parser(prog="fid.py", description=__doc__)
    parser.add_argument("samples", help="images, or statistics")
    parser.add_argument(
        "reference", help="images or statistics; with --save-stats the .npz to write"
    )
    parser.add_argument(
        "--save-stats", action="store_true", help="write the statistics of the images"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=0,
        help="of a folder's images for --save-stats: cut as prepare.py imagenet does",
    )
    parser.add_argument(
        "--inception",
        help="weights with the names of pytorch-fid's file (default: that file, downloaded once)",
    )
    parser.add_argument(
        "--resize",
        choices=("tf1", "torch"),
        default="tf1",
        help="TensorFlow 1's, as in papers, or pytorch-fid's",
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--state",
        help="keep progress in STATE-0-RANK.npz (samples) and STATE-1-RANK.npz (reference); "
        "continue with the same number of processes",
    )
    args = parser.parse_args(argv)
    check_options(args)
    # Complain before the work, not after it.
    rank = ranks_of_torchrun()[0]
    if args.save_stats:
        args.reference = follow_link(args.reference)
    if args.save_stats and rank == 0:  # which writes the file
        check_writable(args.reference)
        need_room(args.reference, FEATURES + 1, (FEATURES,), np.float64)  # mu and sigma
    if args.state:
        check_writable(state_file(state_of_input(args, 0), rank))
    return args


def check_options(args):
    """Raise FidError where options do not go together."""
    if args.batch < 1:
        raise FidError(f"--batch is at least 1, not {args.batch}")
    if args.save_stats and (not args.reference.endswith(".npz") or os.path.isdir(args.reference)):
        raise FidError(f"--save-stats writes an .npz, not {args.reference}")
    if args.size:
        with reading(args.samples):
            kind = kind_of(args.samples)
        if args.size < 1 or not args.save_stats or kind != "folder":
            raise FidError(
                "--size is at least 1 and goes with --save-stats of a folder of image files, "
                f"not {args.size} and {args.samples}"
            )
    if args.save_stats and os.path.exists(args.reference):
        check_replaced(args.samples, args.reference)


def check_replaced(samples, path):
    """Let --save-stats replace its own kind of file alone. Raises FidError for any other."""
    with reading(samples):
        is_input = os.path.samefile(samples, path)
    if is_input:
        raise FidError(f"--save-stats would replace the images that it is to measure, {path}")
    if not os.path.isfile(path) or not is_of_save_stats(path):
        raise FidError(f"--save-stats replaces no file but its own statistics, and not {path}")
    tell(f"fid.py: the statistics in {path} will be replaced")


def refuse_other_dimensions(inputs):
    """Raises FidError where means and covariances are of different dimensions."""
    if len({one.dimensions() for one in inputs}) > 1:
        each = " and ".join(f"{one.path} has {one.dimensions()}" for one in inputs)
        raise FidError(f"only statistics of the same dimensions compare: {each}")


def common_notes(inputs, net, resize):
    """What all features and statistics were made with. Raises FidError where it differs."""
    made = made_with(net, resize) if net else ""
    for one in inputs:
        made = made or one.notes
        refuse_other_notes(one.path, one.notes, made)
    return made


def main(argv=None):
    args = parse(argv)
    rank = ranks_of_torchrun()[0]
    samples = Input(args.samples, args.size)
    if args.save_stats and samples.images is None:
        raise FidError(f"--save-stats takes images, and {args.samples} holds statistics already")
    inputs = [samples]
    if not args.save_stats:
        reference = Input(args.reference, is_reference=True)
        inputs.append(reference)
        tell_other_size(reference.path, reference.image_size, samples.image_size)
    refuse_other_dimensions(inputs)

    join_ranks("gloo", timedelta(days=1))  # another rank may be slow
    net = None
    if any(one.images is not None for one in inputs):
        # Not Apple's GPUs: the covariance is computed in float64.
        device = find_device("cuda" if torch.cuda.is_available() else "cpu")
        net = load_inception(args.inception, device)
    elif args.state:
        raise FidError("--state is for images, and both inputs are statistics")
    notes = common_notes(inputs, net, args.resize)
    for number, one in enumerate(inputs):
        one.measure(net, args, args.state and state_of_input(args, number))

    if rank > 0:
        return
    if args.save_stats:
        mu, sigma = samples.gaussian
        notes += f", images {samples.image_size}"
        write_npz(args.reference, mu=mu, sigma=sigma, notes=notes)
        return
    print_fid(samples, reference, notes)
    if samples.features is not None:
        print_inception_score(samples.features, net)
    if samples.features is not None and reference.features is not None:
        print_precision_recall(samples.features, reference.features)


def state_of_input(args, number):
    """Where features_of keeps its state: 0 for the samples, 1 for the reference."""
    return f"{args.state}-{number}"


def print_fid(samples, reference, notes):
    distance = frechet_distance(*samples.gaussian, *reference.gaussian)
    in_brackets = f" ({notes})" if notes else ""
    print(f"FID {distance:.4f}{in_brackets}{samples.few}{reference.few}")


def print_inception_score(features, net):
    mean, std = inception_score(net.logits_of(features))
    few = ""
    if len(features) <= 10 * 1008:  # else each of 10 parts may have all classes
        few = f"; too few images: {len(features)} <= 10 x 1008 classes"
    print(f"Inception Score {mean:.3f} +- {std:.3f} (10 parts of an order drawn with seed 0{few})")


def print_precision_recall(samples, reference):
    if min(len(samples), len(reference)) <= NEAREST:
        print(
            f"no precision and recall: they need more than {NEAREST} images of each kind, "
            f"not {len(samples)} and {len(reference)}"
        )
        return
    precision, recall = precision_recall(samples, reference, NEAREST)
    print(f"precision {precision:.4f}, recall {recall:.4f} ({NEAREST} nearest neighbours)")


if __name__ == "__main__":
    run(main)
