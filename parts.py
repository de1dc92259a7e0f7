"""
The finished batches of a run of sample.py, kept until all are there.

    parts = Parts(folder, key, batches)
    parts.check_room(shape, dtype)     # rank 0: the disk has room for them
    parts.hold()                       # rank 0: the folder is this run's own
    missing = parts.missing()          # rank 0 tells the other ranks
    parts.save(batch, array)           # each rank, for its share of the missing ones
    for array in parts.load(): ...     # rank 0, when all have made theirs
    parts.remove()

After a kill the next run finds what is there and makes the rest, on any number of ranks.
"""

import contextlib
import os
import re
import sys

import numpy as np
from tqdm import tqdm

from dataset import need_room
from files import PARTIAL, UserError, hold, remove_locked, remove_ours, written

# The names of the files that are made here. Nothing else in the folder is ever removed.
OURS = re.compile(r"[0-9a-f]{16}-\d{9}\.npy" + f"({re.escape(PARTIAL)})?")


class Parts:
    """One file for each batch, in a folder that is there until the end.

    key: 16 hexadecimal digits that stand for all that the batches depend on. The files' names begin
    with it, so that those of another checkpoint, seed or the like are never taken for these.
    batches: ranges of indices.
    """

    def __init__(self, folder, key, batches):
        self.folder = folder
        self.key = key
        self.batches = batches
        self.lock = None

    def path(self, batch):
        return os.path.join(self.folder, f"{self.key}-{batch.start:09d}.npy")

    def check_room(self, shape, dtype, and_whole=False):
        """Raise DataError where the disk has no room for the batches that are missing.

        shape, dtype: of one image's entry. and_whole: count the final file, too, which is written
        before the batches are removed.
        """
        missing = self.missing()
        if not missing:
            return
        count = sum(len(batch) for batch in missing)
        if and_whole:
            count += sum(len(batch) for batch in self.batches)
        need_room(self.folder, count, shape, dtype)

    def hold(self):
        """Make the folder this run's own, and say how many of its batches are there.

        Raises OSError where another process holds it, and UserError where it has batches of another
        run, which may be the work of hours.
        """
        self.lock = hold(self.folder, seconds=10)
        of_this_run = {self.path(batch) for batch in self.batches}
        # Without those that a process of the run before may still be writing.
        found = {path for path in self.files() if not path.endswith(PARTIAL)}
        others = found - of_this_run
        if others:
            raise UserError(
                f"{self.folder} holds {len(others)} finished batches of another checkpoint, seed, "
                "nfe or the like, or of other code: give that command again, delete the folder, or "
                "name another --out"
            )
        if found:
            done = f"going on from {len(found)} of {len(self.batches)} batches"
            print(f"sample.py: {self.folder}: {done}", file=sys.stderr)

    def files(self):
        """The paths of all files that sample.py has made in the folder, but for its lock."""
        names = [name for name in os.listdir(self.folder) if OURS.fullmatch(name)]
        return [os.path.join(self.folder, name) for name in names]

    def missing(self):
        """The batches that are still to be made."""
        return [batch for batch in self.batches if not os.path.exists(self.path(batch))]

    def save(self, batch, array):
        with written(self.path(batch)) as f:
            np.save(f, array)

    def load(self):
        """The arrays of all batches, in their order, one at a time."""
        for batch in tqdm(self.batches, desc="collecting", unit="batch"):
            path = self.path(batch)
            try:
                array = np.load(path, allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise UserError(
                    f"{path} is damaged: delete it and give the same command again ({error})"
                ) from None
            yield array

    def remove(self):
        """Remove the batches and the lock. The folder stays where others have put files there."""
        remove_ours(self.folder, OURS.fullmatch)
        remove_locked(self.lock, os.path.join(self.folder, "lock"))
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)
