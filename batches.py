"""
The batches of a run: which images a step trains on, and their way to the device.

    batches = Batches(header, data, seed, batch_size, rank, ranks, device)
    for step in range(first_step, steps):
        x0, y = batches.get(step, steps)

The order is an endless sequence of seeded permutations, one an epoch. It is a function of the seed
and the step alone, so it does not depend on the ranks or on interruptions. To train on a stream of
data write another `fetch`; to train on captions, other `conditions`.
"""

import functools
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from vae import draw_latents

AHEAD = 3  # batches that are read while the device computes


def conditions(labels, header):
    """What the network is given as y, for labels (n,) int64: a tensor (n, ...).

    Here the labels themselves. Training, sampling and scores all ask this function.
    """
    return labels


class Batches:
    def __init__(self, header, data, seed, batch_size, rank, ranks, device):
        """header and data: of dataset.load_dataset. batch_size: of all ranks together."""
        self.header = header
        self.data = data
        self.seed = seed
        self.batch_size = batch_size
        self.device = device
        self.local_batch = batch_size // ranks
        self.first_row = rank * self.local_batch
        self.waited = 0.0  # seconds that `get` has waited for data; the log sets it back to 0
        self.pool = ThreadPoolExecutor(1)
        self.fetched = deque()  # of this step and the next ones
        self.epoch_order = functools.lru_cache(maxsize=2)(self.epoch_order)

    def get(self, step, steps):
        """This rank's rows of a step's batch: images (n, C, H, W) and y (n, ...) on the host.

        Steps must be asked for in order. What fetch raises is raised here.
        """
        if not self.fetched:
            for later in range(step, min(step + AHEAD, steps)):
                self.fetched.append(self.pool.submit(self.fetch, later))
        start = time.perf_counter()
        batch = self.fetched.popleft().result()
        self.waited += time.perf_counter() - start
        if step + AHEAD < steps:
            self.fetched.append(self.pool.submit(self.fetch, step + AHEAD))
        return batch

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
            parts.append(self.epoch_order(epoch)[places[epochs == epoch]])
        return np.concatenate(parts)

    def epoch_order(self, epoch):
        count = self.header["count"]["train"]
        return np.random.default_rng([self.seed, epoch]).permutation(count)
