"""
The batches of a run: which images a step trains on, and their way to the device.

    batches = Batches(header, data, seed, batch_size, steps, device, rank, ranks)
    for step in range(first_step, steps):
        images, y = batches.get(step)    # images as they are stored: train.py makes x0 of them

The order is an endless sequence of seeded permutations, one an epoch. It is a function of the seed
and the step alone, so it does not depend on the ranks or on interruptions. To train on a stream of
data write another `fetch`; to train on captions, other `conditions`.

Before that, `why_not_train` tells what is wrong with training on a dataset with a run's constants.
"""

import functools
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pictures import are_floats
from vae import draw_latents

AHEAD = 3  # batches that are read while the device computes


def why_not_train(header, path, config):
    """What keeps a run with these constants from training on these data, in one line, or None."""
    if not header["count"]["train"]:
        return f"{path} holds no training images"
    vae = config["vae"]
    if vae and vae != header.get("vae"):
        holds = f"latents of {header['vae']!r}" if "vae" in header else "pixels"
        return f"vae is {vae!r}, but {path} holds {holds}"
    if config["vae_files"] and "vae" not in header:
        return f"vae_files is for latents, and {path} holds pixels"
    shape = header["shape"]
    if config["classifier"] == "cnn" and len(shape) != 3:
        return f'classifier "cnn" takes images (C, H, W), not {tuple(shape)}'
    side = min(shape[1:])
    if config["classifier"] == "cnn" and side < 4:
        return f'classifier "cnn" takes images of at least 4 pixels, not {side}'
    if config["classifier"] == "cnn" and are_floats(header):
        return 'classifier "cnn" takes uint8 images, not floats'
    if config["guidance"] == "constant":
        guided = config["w"] != 1
    elif config["w_min"] == config["w_max"]:
        return (
            f"guidance {config['guidance']!r} draws w between w_min and w_max, which are both "
            f"{config['w_max']:g}"
        )
    else:
        guided = True
    if guided and not header["num_classes"]:
        return f"{path} has no classes, so there is nothing to guide: --guidance=constant --w=1"
    if guided and config["label_dropout"] == 0:
        return (
            "guidance needs a network that knows no class too: "
            "label_dropout must be above 0 where w is not 1"
        )
    return None


def conditions(labels, header):
    """What the network is given as y, for labels (n,) int64: a tensor (n, ...).

    A fixed function, the same in every process: what is trained belongs in DiT's y_embedder.
    Here the labels themselves. Training, sampling and scores all ask this function.
    """
    return labels


class Batches:
    def __init__(self, header, data, seed, batch_size, steps, device, rank, ranks):
        """header and data: of dataset.load_dataset. batch_size: of all ranks together.

        steps: where the run ends, beyond which nothing is read ahead.
        """
        self.header = header
        self.data = data
        self.seed = seed
        self.batch_size = batch_size
        self.steps = steps
        self.device = device
        self.local_batch = batch_size // ranks
        self.first_row = rank * self.local_batch
        self.waited = 0.0  # seconds that `get` has waited for data; the log sets it back to 0
        self.pool = ThreadPoolExecutor(1)
        self.fetched = deque()  # (step, future) of this step and the next ones

    def get(self, step):
        """This rank's rows of a step's batch, as tensors on the host: images and y.

        images  (n, C, H, W) of the dtype of the data, uint8 or floats; latents are float32
        y       (n, ...), what `conditions` makes of the labels: (n,) int64

        Steps must be asked for in order. Raises ValueError for another step than the next one, and
        what fetch has raised.
        """
        if not self.fetched:
            for later in range(step, min(step + AHEAD, self.steps)):
                self.read_ahead(later)
        next_step = self.fetched[0][0] if self.fetched else None
        if step != next_step:
            raise ValueError(f"step {step} of {self.steps} is not the next one, {next_step}")
        _, future = self.fetched.popleft()
        start = time.perf_counter()
        batch = future.result()
        self.waited += time.perf_counter() - start
        if step + AHEAD < self.steps:
            self.read_ahead(step + AHEAD)
        return batch

    def read_ahead(self, step):
        self.fetched.append((step, self.pool.submit(self.fetch, step)))

    def fetch(self, step):
        """Read this rank's rows of a step's batch. Runs in a thread of its own.

        Images are as they lie on disk, or drawn from the posteriors that lie there.
        """
        rows = self.indices(step)[self.first_row : self.first_row + self.local_batch]
        images = self.data["train_images"][rows]
        labels = self.data["train_labels"][rows]
        if "vae" in self.header:  # drawn anew in each epoch
            first = step * self.batch_size + self.first_row
            images = draw_latents(images, self.seed, range(first, first + self.local_batch))
        labels = conditions(torch.from_numpy(labels), self.header)
        batch = [torch.from_numpy(images), labels]
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a thread starts on GPU 0
            batch = [a.pin_memory() for a in batch]
        return batch

    def indices(self, step):
        """The images of the global batch of a step, (batch_size,)."""
        count = self.header["count"]["train"]
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(places, count)
        parts = []
        for epoch in np.unique(epochs):
            order = epoch_order(self.seed, int(epoch), count)
            parts.append(order[places[epochs == epoch]])
        return np.concatenate(parts)


@functools.lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
def epoch_order(seed, epoch, count):
    """The order of `count` images in an epoch, (count,)."""
    return np.random.default_rng([seed, epoch]).permutation(count)
