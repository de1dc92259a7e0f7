"""
The finished batches of a run of sample.py, kept until all are there.

    parts = Parts(folder, key, batches)
    parts.hold()                            # rank 0; now others may look
    for batch in parts.missing(rank, ranks):
        parts.save(batch, array)
    for array in parts.load(): ...          # rank 0, when all have made theirs
    parts.remove()

After a kill the next run finds what is there and makes the rest, on any number of ranks.
"""

import os
import shutil
import sys

import numpy as np
from tqdm import tqdm

from files import hold, written


class Parts:
    """One file for each batch, in a folder that is there until the end.

    key: a few letters that stand for all that the batches depend on. The files' names begin with
    it, so that those of another checkpoint, seed or the like are never taken for these.
    batches: ranges of indices.
    """

    def __init__(self, folder, key, batches):
        self.folder = folder
        self.key = key
        self.batches = batches
        self.lock = None

    def path(self, batch):
        return os.path.join(self.folder, f"{self.key}-{batch.start:09d}.npy")

    def hold(self):
        """Make the folder this run's own, remove what other runs left there, and say so.

        Raises OSError where another process holds it.
        """
        self.lock = hold(self.folder, seconds=10)
        known = {self.path(batch) for batch in self.batches}
        found = set()
        for name in os.listdir(self.folder):
            if name.endswith(".npy"):
                found.add(os.path.join(self.folder, name))
        for other in found - known:
            os.remove(other)
        if found - known:
            told = "of another checkpoint, seed, nfe or the like, so starting over"
        else:
            told = f"going on from {len(found)} of {len(self.batches)} batches"
        if found:
            print(f"sample.py: {self.folder}: {told}", file=sys.stderr)

    def missing(self, rank, ranks):
        """The batches that this rank has to make."""
        mine = self.batches[rank::ranks]
        return [batch for batch in mine if not os.path.exists(self.path(batch))]

    def save(self, batch, array):
        with written(self.path(batch)) as f:
            np.save(f, array)

    def load(self):
        """The arrays of all batches, in their order, one at a time."""
        for batch in tqdm(self.batches, desc="collecting", unit="batch"):
            yield np.load(self.path(batch), allow_pickle=False)

    def remove(self):
        self.lock.close()  # or Windows would not delete it
        shutil.rmtree(self.folder)
