"""
What a run tells: log.jsonl, pictures of samples, the loss curve, scores, FID.

Each of these is worth less than the run: where one fails, a message says so, and training goes on.
Report.load alone, which is called before training, may end a run.

Every number goes through `Report.log`, and on rank 0 through `Report.append`. docs/changes.md shows
how to send the numbers elsewhere, too.

In this file: the sums of the loss, then Report: its log, its pictures, its FID, its scores.
"""

import json
import math
import os
import re
import subprocess
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import fid
from batches import conditions
from device import from_rank_0
from files import HERE, UserError, written
from header import classes_with_images, is_numbers
from imageset import as_size
from loss import EULER
from options import one_line
from pictures import (
    are_floats,
    find_vae,
    form_of_images,
    grid,
    new_figure,
    save_figure,
    to_images,
    unlike_pictures,
)
from sample import guidance_weight, noise_and_labels, sample
from scores import classify, small_data_scores, train_classifier
from shard import whole_network

BATCH = 250  # images of one network call


class Losses:
    """The terms of the loss since the last line of the log, by quarters of their times.

    A step's terms count only when it ends well: begin_step, add for each micro-batch, end_step.
    """

    def __init__(self, device):
        self.device = device
        self.clear()

    def clear(self):
        self.sums = {}  # {term: (4, 2)}: a row for each quarter of time: sum of errors, samples
        self.norms = []  # of gradients
        self.since = time.perf_counter()

    def begin_step(self):
        self.step_sums = {}

    def add(self, terms):
        """Add the terms of a micro-batch, {name: loss.Term}."""
        for term in terms.values():
            quarter = (term.time * 4).long().clamp(0, 3)
            pairs = torch.stack([term.error, torch.ones_like(term.error)], dim=1)
            if term.name not in self.step_sums:
                self.step_sums[term.name] = torch.zeros(4, 2, device=self.device)
            self.step_sums[term.name].index_add_(0, quarter, pairs)

    def step_total(self):
        """The sum of this rank's errors in this step, a tensor."""
        return torch.stack(list(self.step_sums.values()))[..., 0].sum()

    def end_step(self, norm):
        for name, sums in self.step_sums.items():
            self.sums[name] = self.sums[name] + sums if name in self.sums else sums
        self.norms.append(norm)


class Report:
    def __init__(self, out, config, header, data, network, device, rank, ranks):
        """out: the folder. config: the constants. header, data: of dataset.load_dataset.

        network: the evaluation network, an EMA of the model. Where it is divided over the ranks
        (shard.py), gather_network makes a whole one for what samples. Only rank 0 writes.
        """
        self.out = out
        self.config = config
        self.header = header
        self.data = data
        self.network = network
        self.device = device
        self.rank = rank
        self.ranks = ranks
        self.failed = set()  # what has been said to fail
        self.inception = None
        self.reference = None
        trained = dict(
            sampler=config["guidance"],
            w=config["w"],
            w_min=config["w_min"],
            w_max=config["w_max"],
        )
        self.w = guidance_weight(None, trained)

    def attempt(self, what, function, *arguments, errors=Exception):
        """Run a function, on rank 0. Returns success. An error is said, and training goes on."""
        if self.rank > 0:
            return True
        try:
            function(*arguments)
        except errors as error:
            self.say_failure(what, error)
            return False
        return True

    def say_failure(self, what, error):
        """Say that something could not be made. The same thing of a later step is not said again.

        Errors of the disk are said each time: it may have been cleared and have filled again.
        """
        kind = re.sub(r"\d+", "", what)  # without the step
        if kind not in self.failed:
            reason = one_line(f"{type(error).__name__}: {error}")
            message = f"train.py: could not write {what}, and go on without it: {reason}"
            tqdm.write(message, file=sys.stderr)
        if not isinstance(error, OSError):
            self.failed.add(kind)

    # ---- the log ---------------------------------------------------------------------------------

    def log_start(self, step, about, how):
        """Print and log what this run is: its constants, network, data, device and commit.

        about: what its checkpoints say of it. how: "bfloat16, a CUDA graph", for people.
        """
        if self.rank == 0:
            numbers = sum(p.numel() for p in self.network.parameters())
            images = self.header["count"]["train"]
            print(*(f"{key}={value!r}" for key, value in self.config.items()))
            print(
                f"{numbers:,} parameters, {images:,} images, {self.ranks} x {self.device.type}, "
                f"{how}, commit {about['commit']}, from step {step}"
            )
        is_gpu = self.device.type == "cuda"
        self.log(
            step=step,
            config=self.config,
            model=about["config"],
            data=self.header["name"],
            commit=about["commit"],
            torch=torch.__version__,
            ranks=self.ranks,
            device=torch.cuda.get_device_name() if is_gpu else self.device.type,
        )

    def log(self, **line):
        """Append a line to log.jsonl."""
        self.attempt("a line of log.jsonl", self.append, line)

    def append(self, line):
        """Append a line to log.jsonl, after the end of one that a crash has cut off."""
        with open(os.path.join(self.out, "log.jsonl"), "a+b") as f:
            if f.tell() > 0:
                f.seek(-1, os.SEEK_END)
                last = f.read()
                if last != b"\n":
                    f.write(b"\n")
            f.write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def log_losses(self, step, losses, batches, skipped):
        """Log the means since the last line. Returns them as text. All ranks call this.

        images_per_second is by the wall clock since the last line: saves, pictures and, in the
        first line, compiling are in it.
        """
        if not losses.norms:  # every step was skipped
            self.log(step=step, skipped=skipped)
            losses.clear()
            batches.waited = 0.0
            return f"{skipped} skipped"
        names = list(losses.sums)
        bins = torch.stack([losses.sums[name] for name in names])  # (terms, 4, 2)
        waited = torch.tensor(batches.waited, device=self.device)
        if self.ranks > 1:
            dist.all_reduce(bins)
            dist.all_reduce(waited, dist.ReduceOp.MAX)  # the slowest rank's
        bins = bins.cpu().double()
        seconds = time.perf_counter() - losses.since
        means, by_time = {}, {}
        for name, quarters in zip(names, bins):
            errors, counts = quarters.unbind(1)
            means[name] = (errors.sum() / counts.sum()).item()
            each = (errors / counts).tolist()
            by_time[f"{name}_by_time"] = [x if math.isfinite(x) else None for x in each]
        rate = bins[0, :, 1].sum().item() / seconds
        data_wait = waited.item() / seconds
        memory = {}
        if self.device.type == "cuda":
            memory["peak_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 1)
        self.log(
            step=step,
            loss=sum(means.values()),  # before the weight that MeanFlow gives its error
            **means,
            **by_time,
            grad_norm=float(np.mean(losses.norms)),
            images_per_second=round(rate, 1),
            data_wait=round(data_wait, 4),
            skipped=skipped,
            **memory,
        )
        losses.clear()
        batches.waited = 0.0
        text = " ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        text += f" {rate:.0f} img/s, {data_wait:.1%} data wait"
        return f"{text}, {skipped} skipped" if skipped else text

    def save_curve(self):
        """Draw the loss over the steps, from log.jsonl, as curve.png."""
        self.attempt("curve.png", self.draw_curve)

    def draw_curve(self):
        by_step = self.logged_losses()
        steps = sorted(by_step)
        figure = new_figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        ends = "_by_time"  # of the keys that every term of the loss has
        keys = {key for line in by_step.values() for key in line if key.endswith(ends)}
        terms = sorted(key.removesuffix(ends) for key in keys)
        for name in terms:
            axes.plot(steps, [by_step[step].get(name, math.nan) for step in steps], label=name)
        title = f"{self.config['name']}, seed {self.config['seed']}"
        axes.set(xlabel="step", ylabel="loss term, mean per element", yscale="log")
        axes.set_title(title, parse_math=False)  # a name may have a $
        if terms:
            axes.legend()
        axes.grid(alpha=0.3)
        save_figure(figure, os.path.join(self.out, "curve.png"))

    def logged_losses(self):
        """{step: line}; of a step that was done again after a restart, the later line.

        Lines that are not of this file's making are passed over.
        """
        by_step = {}
        with open(os.path.join(self.out, "log.jsonl"), errors="replace") as f:
            for text in f:
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):  # a crash has cut off the line, for example
                    continue
                if not isinstance(line, dict):
                    continue
                if is_numbers([line.get("step"), line.get("loss")], 2):
                    by_step[line["step"]] = line
        return by_step

    # ---- pictures --------------------------------------------------------------------------------

    def images_of(self, network, indices, nfe, classes=None):
        """Images `indices` of a whole network, uint8 (n, H, W, C), and their labels (n,).

        They are those that sample.py --precision=float32 draws from ckpt.safetensors with this
        seed. classes: one for each image, instead of labels drawn as often as in the data.
        """
        images, labels = [], []
        euler = self.config["objective"] in EULER
        vae = find_vae(self.header, self.device, self.config["vae_files"])
        for first in range(0, len(indices), BATCH):
            part = indices[first : first + BATCH]
            seed, counts = self.config["seed"], self.header["class_counts"]
            x1, y = noise_and_labels(seed, part, self.header["shape"], counts)
            if classes is not None:
                y = torch.tensor(classes[first : first + BATCH])
            w = torch.full((len(part),), self.w, device=self.device)
            condition = conditions(y, self.header).to(self.device)
            x0 = sample(network, x1.to(self.device), condition, w, nfe, euler)
            images.append(to_images(x0, self.header, vae))
            labels.append(y)
        return np.concatenate(images), torch.cat(labels)

    def picture_path(self, step):
        return os.path.join(self.out, f"samples_{step}.png")

    def lacks_samples(self, step, steps):
        """Whether a stop has come between the state of a step and its picture. On all ranks."""
        due = step % self.config["sample_every"] == 0 or step == steps
        return from_rank_0(due and not os.path.exists(self.picture_path(step)))

    def save_samples(self, step):
        """The picture of a step, and where there is a reference its FID. All ranks call this."""
        network = self.gather_network(f"samples_{step}.png")
        if network is None:
            return
        self.attempt(f"samples_{step}.png", self.draw_samples, network, step)
        if self.reference is not None:
            self.log_fid(network, step)

    def gather_network(self, what):
        """The evaluation network, whole where it is divided over the ranks (shard.py).

        All ranks call this. Where there is no memory for it, all of them get None, and rank 0 says
        that there will be no `what`.
        """
        try:
            return whole_network(self.network)
        except MemoryError as error:
            if self.rank == 0:
                self.say_failure(what, error)
            return None

    def draw_samples(self, network, step):
        """Rows: 1, 2 and 4 steps. Columns: ten images, of the classes in turn that
        have training images."""
        shape = tuple(self.header["shape"])
        if len(shape) != 3 or are_floats(self.header):
            dtype = self.header["dtype"]
            raise ValueError(f"pictures are of uint8 (C, H, W), and these data are {dtype} {shape}")
        shown = classes_with_images(self.header) or [0]
        classes = [shown[i % len(shown)] for i in range(10)]
        rows = []
        for nfe in (1, 2, 4):
            images, _ = self.images_of(network, range(len(classes)), nfe, classes)
            rows.append(images)
        with written(self.picture_path(step)) as f:
            grid(np.concatenate(rows), len(classes)).save(f, "PNG")

    # ---- FID -------------------------------------------------------------------------------------

    def load(self):
        """Load the VAE, Inception and the reference, before training.

        Raises UserError where FID is asked for and cannot be. A VAE that is missing is only said.
        """
        if not self.config["fid_reference"]:
            self.attempt("pictures", find_vae, self.header, self.device, self.config["vae_files"])
            return
        unlike = unlike_pictures(self.header, self.header["shape"])
        if unlike:
            raise UserError(f"fid_reference is for uint8 images of 1 or 3 channels, not {unlike}")
        self.inception = fid.load_inception(self.config["inception"] or None, self.device)
        vae = find_vae(self.header, self.device, self.config["vae_files"])
        shape, _ = form_of_images(self.header["shape"], self.header, vae)
        self.reference = fid.read_reference(
            self.config["fid_reference"], self.inception, image_size=as_size(shape)
        )

    def log_fid(self, network, step):
        """Log the FID of one-step samples, made by all ranks together."""
        moments = None
        try:
            moments = self.moments_of_samples(network)
        except Exception as error:
            self.say_failure(f"the FID of step {step}", error)
        failures = torch.tensor(float(moments is None), device=self.device)
        if self.ranks > 1:
            dist.all_reduce(failures)
        if failures > 0:
            return
        if self.ranks > 1:
            moments.all_reduce()
        self.attempt(f"the FID of step {step}", self.finish_fid, step, moments)

    def moments_of_samples(self, network):
        """fid.Moments of the Inception features of this rank's share of the samples."""
        n = self.config["fid_images"]
        mine = range(n * self.rank // self.ranks, n * (self.rank + 1) // self.ranks)
        moments = fid.Moments(fid.FEATURES)
        for first in range(0, len(mine), BATCH):
            images, _ = self.images_of(network, mine[first : first + BATCH], 1)
            images = torch.from_numpy(np.moveaxis(images, -1, 1)).to(self.device)
            moments.add(self.inception(images.expand(-1, 3, -1, -1)))
        return moments

    def finish_fid(self, step, moments):
        mean, covariance = moments.mean_and_covariance()
        score = fid.frechet_distance(mean, covariance, *self.reference)
        n = self.config["fid_images"]
        self.log(step=step, nfe=1, fid=score, images=n, reference=self.config["fid_reference"])
        few = moments.remark_on_few()
        tqdm.write(f"step {step}: FID {score:.3f} of {n} one-step samples{few}")

    # ---- scores ----------------------------------------------------------------------------------

    def log_scores(self, network, step):
        """Print and log the scores of 1, 2 and 4 steps against held-out images."""
        self.attempt("the scores", self.score, network, step)

    def score(self, network, step):
        count = self.header["count"]
        n = min(self.config["score_images"], count["test"], count["train"] // 2)
        if n < 2:
            print(
                "no scores, which take two images at least: there are "
                f"{count['test']} held-out and {count['train']} training images, "
                f"and score_images is {self.config['score_images']}"
            )
            return
        real = self.choose(count["train"], n, 0)
        chosen = self.choose(count["test"], n, 1)
        train, labels = self.data["train_images"], self.data["train_labels"]
        held_out = self.data["test_images"][chosen]
        held_out_labels = self.data["test_labels"][chosen]
        classifier = None
        if self.config["classifier"] == "cnn" and self.header["num_classes"]:
            others = np.setdiff1d(np.arange(len(train)), real)
            classifier = self.train_label_classifier(step, others, held_out, held_out_labels)
        print(
            f"{n} samples of the evaluation network against {n} held-out images "
            "(real: training images in their place)"
        )
        print(f"{'steps':>5} {'two-sample (each)':>21} {'label':>7} {'nearest':>8} {'Frechet':>8}")
        against = dict(
            held_out=held_out,
            train=train,
            labels=labels,
            classifier=classifier,
            device=self.device,
        )
        y = torch.from_numpy(labels[real])
        leave_out = torch.from_numpy(real)  # no image is its own nearest neighbour
        found = small_data_scores(train[real], y, leave_out=leave_out, **against)
        self.tell_scores(step, "real", n, found)
        for nfe in (1, 2, 4):
            images, y = self.images_of(network, range(n), nfe)
            found = small_data_scores(np.moveaxis(images, -1, 1), y, **against)
            self.tell_scores(step, nfe, n, found)
        print(
            "two-sample: how often the nearest neighbour tells samples from held-out images (each: "
            "of samples, of held-out images). All near 0.5: they cannot be told apart. label: the "
            "share that shows the class asked for. nearest: the distance to the nearest training "
            "image, over that of held-out images; well under 1: memorized. Frechet: the distance "
            "in pixels, less is better."
        )

    def train_label_classifier(self, step, rows, held_out, held_out_labels):
        """Train a classifier on training images `rows`. Says how it does on held-out images."""
        images, labels = self.data["train_images"][rows], self.data["train_labels"][rows]
        classifier = train_classifier(images, labels, self.header["num_classes"], self.device)
        right = (classify(classifier, held_out).numpy() == held_out_labels).mean()
        print(f"the classifier names {right:.1%} of held-out images rightly")
        self.log(step=step, classifier_held_out=right)
        return classifier

    def tell_scores(self, step, nfe, n, found):
        """Print and log a row of the table. nfe: 1, 2, 4 or "real".

        A score that says nothing (small_data_scores has when) is "-" there, and null in the log.
        """
        columns = (("label", 7, 3), ("nearest_ratio", 8, 2), ("frechet_pixels", 8, 3))
        of_both = f"({found['of_samples']:.2f} {found['of_held_out']:.2f})"
        row = [f"{nfe:>5} {found['two_sample']:>9.3f} {of_both}"]
        for key, width, digits in columns:
            shown = f"{found[key]:.{digits}f}" if math.isfinite(found[key]) else "-"
            row.append(f"{shown:>{width}}")
        print(*row)
        finite = {key: x if math.isfinite(x) else None for key, x in found.items()}
        self.log(step=step, checkpoint="ckpt.safetensors", nfe=nfe, images=n, **finite)

    def choose(self, count, n, stream):
        """n of `count` rows, sorted, by the seed and the number of the stream."""
        order = np.random.default_rng([self.config["seed"], stream]).permutation(count)
        return np.sort(order[:n])


def git_commit():
    """The commit of these files, with "-edited" where they differ from it.

    "unknown" where git does not have them. They may lie in a folder of another project, whose
    commit says nothing of them.
    """
    try:
        if not run_git("ls-files", "train.py"):
            return "unknown"
        commit = run_git("rev-parse", "--short=12", "HEAD")
        edited = run_git("status", "--porcelain", "-uno")
    except OSError:  # there is no git here
        return "unknown"
    if not commit:
        return "unknown"
    return f"{commit}-edited" if edited else commit


def run_git(*arguments):
    # A hook of another project, for example, sets these to its own.
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    here = {key: value for key, value in os.environ.items() if key not in elsewhere}
    done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, env=here)
    return done.stdout.strip()
