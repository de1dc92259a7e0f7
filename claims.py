"""
Who may write data/NAME. One process writes a dataset aside, and gives it its name when it is whole.

    lock = claim("data/mine")                   # the name is this process's own
    ...                                         # Writer of dataset.py fills data/mine.partial
    take_name("data/mine", lock)                # it becomes data/mine
    clean_up_after(error, "data/mine", lock)    # where something went wrong instead: it is removed

data/NAME             a whole dataset, or nothing
data/NAME.partial     being written. The file `lock` in it is held by the process that writes. At
                      the end it becomes data/NAME
data/NAME.replaced    the old data/NAME, only while --overwrite puts the new one in its place

Files that prepare.py does not write are never removed: where some lie in one of these folders,
nothing is written at all.
"""

import contextlib
import os
import sys

from files import PARTIAL, hold, is_still_at, others_in, remove_ours, sync_folder
from header import DataError, load_header

LEFT_OUT = "left_out.txt"

# All that prepare.py writes in NAME.partial or NAME. Nothing else is ever removed from either.
OURS = {
    "lock",
    "header.json",
    "train_images.npy",
    "train_labels.npy",
    "test_images.npy",
    "test_labels.npy",
    "scratch.npy",
    "done.npy",
    "plan.json",
    "train_files.txt",
    LEFT_OUT,
    "check.png",
    # what file managers leave in any folder that is looked at
    ".DS_Store",
    "Thumbs.db",
}


# ---- claiming ------------------------------------------------------------------------------------


def unfinished(path):
    """Where the dataset `path` is written until it is whole."""
    return path + ".partial"


def claim(path, overwrite=False, keep=False, seconds=0):
    """Make the name of a dataset this process's own, before anything is written.

    overwrite: a dataset of this name may be there; it stays until take_name. keep: what a killed
    run has left in path.partial stays, too, for the caller to go on with. seconds: to wait for
    another process that writes there.

    Returns the lock, for Writer. Raises DataError where something is refused, and OSError where
    another process still holds path.partial.
    """
    partial = unfinished(path)
    if os.path.islink(path):  # perhaps to a larger disk, on which the new one would not lie
        raise DataError(f"{path} is a link to {os.path.realpath(path)}: remove the link first")
    # 1. Refuse a name that is taken, and files of others where ours would go.
    refuse_existing(path, overwrite)
    refuse_partial(partial)
    refuse_replaced(path)

    # 2. Lock path.partial.
    lock = hold(partial, seconds)
    leftovers = set(os.listdir(partial)) - {"lock"}

    # 3. Finish or undo a replacement that a kill has cut in two.
    came_back = put_back(path)

    # 4. Look again: `path` may have come back, or another run may have made it before step 2.
    if os.path.exists(path) and not overwrite:
        if leftovers:
            lock.close()
        else:
            remove_partial(path, lock)  # hold has made it
        reason = "another run made it"
        if came_back:
            reason = "an interrupted --overwrite had set it aside, and it was put back"
        raise DataError(f"{path} is there already: {reason}")

    # 5. Remove what a killed run has left in path.partial; but the work of hours is not removed.
    if not keep:
        if "plan.json" in leftovers:
            raise DataError(
                f"{partial} is of an imagenet run that was interrupted: "
                "give that command again, or delete it"
            )
        remove_files(path)
    return lock


def is_ours(name):
    """Whether prepare.py writes a file of this name in NAME.partial or NAME."""
    return name.removesuffix(PARTIAL) in OURS


def refuse_strangers(folder, kind, need):
    """Raise DataError where a folder holds a file that prepare.py does not write.

    kind, need: what the file is not, and why it is in the way, for the message.
    """
    strangers = others_in(folder, is_ours)
    if strangers:
        complain_of(os.path.join(folder, strangers[0]), kind, need)


def complain_of(file, kind, need):
    raise DataError(f"{file} is not {kind}: move it away, since {need}")


def refuse_partial(partial):
    """Raise DataError where NAME.partial holds what prepare.py has not written."""
    kind, need = "of an interrupted run", f"{partial} is needed"
    try:
        refuse_strangers(partial, kind, need)
    except FileNotFoundError:
        return
    header = os.path.join(partial, "header.json")
    if os.path.exists(header) and not os.path.exists(os.path.join(partial, "lock")):
        complain_of(header, kind, need)  # somebody's dataset that is called so


def refuse_existing(path, overwrite):
    """Raise DataError where `path` is there and must not be replaced."""
    if not os.path.lexists(path):
        return
    if not os.path.exists(os.path.join(path, "header.json")):
        raise DataError(
            f"{path} exists and is not a dataset of prepare.py: "
            "move it away, or choose another --name"
        )
    if not overwrite:
        raise DataError(f"{path} is there already: --overwrite replaces it")
    try:
        load_header(path)
    except DataError as error:
        raise DataError(f"{error}; --overwrite replaces whole datasets: move {path} away") from None
    refuse_strangers(path, "prepare.py's", f"--overwrite removes {path}")


def put_back(path):
    """Finish or undo a replacement that a kill has cut in two: see take_name and refuse_replaced.

    Returns whether the old dataset came back.
    """
    replaced = path + ".replaced"
    if not os.path.exists(replaced):
        return False
    if not os.path.exists(path):
        os.rename(replaced, path)
        return True
    try:
        remove_dataset(replaced)
    except OSError as error:
        raise DataError(f"cannot remove {replaced}, delete it: {error}") from None
    return False


def remove_dataset(path):
    """Remove a folder that holds our files alone. Raises OSError."""
    remove_ours(path, is_ours)
    os.rmdir(path)


def refuse_replaced(path):
    """Raise DataError where path.replaced is there and is no dataset: it must not be touched."""
    replaced = path + ".replaced"
    if not os.path.lexists(replaced):
        return
    if os.path.exists(path) and os.path.isdir(replaced):
        # It will be removed. Of a removal that was cut off some of our files are left.
        refuse_strangers(replaced, "prepare.py's", f"{replaced} is needed")
        return
    try:
        load_header(replaced)
    except DataError:
        raise DataError(
            f"{replaced} is not a dataset of prepare.py: move it away, since its name is needed"
        ) from None


# ---- giving up, or taking the name ---------------------------------------------------------------


def remove_files(path):
    """Remove the files that prepare.py has written in path.partial, all but the lock."""
    remove_ours(unfinished(path), lambda name: name != "lock" and is_ours(name))


def clean_up_after(error, path, lock):
    """After an error: remove path.partial, if `lock` still holds it.

    The caller then raises the error again. An OSError that names no file is raised here, as a
    DataError that names the path.
    """
    if not lock.closed and is_still_at(lock, os.path.join(unfinished(path), "lock")):
        remove_partial(path, lock)
    if isinstance(error, OSError) and error.strerror and not error.filename:
        raise DataError(f"cannot write {path}: {error.strerror}") from None


def remove_partial(path, lock):
    """Remove path.partial, whose lock the caller holds. If others have put files there, those and
    the folder stay."""
    if os.name != "posix":
        lock.close()  # Windows does not remove an open file
    remove_files(path)
    os.remove(os.path.join(unfinished(path), "lock"))
    with contextlib.suppress(OSError):
        os.rmdir(unfinished(path))
    lock.close()


def take_name(path, lock, overwrite=False):
    """NAME.partial becomes NAME.

    The lock is held until then, so that no other run comes between; its file goes last. A dataset
    that is replaced waits in NAME.replaced, and comes back where the new one cannot be renamed.
    Raises DataError where NAME is taken, and OSError.
    """
    refuse_existing(path, overwrite)
    if os.name != "posix":
        lock.close()  # Windows does not rename a folder with an open file
    replaced = path + ".replaced"
    is_replacement = os.path.exists(path)
    if is_replacement:
        os.rename(path, replaced)
    try:
        os.rename(unfinished(path), path)
    except OSError:
        if is_replacement:
            os.rename(replaced, path)
        raise
    os.remove(os.path.join(path, "lock"))
    lock.close()
    if is_replacement:
        try:
            remove_dataset(replaced)
        except OSError as error:  # the new one is whole all the same
            print(f"cannot remove {replaced}: {error}", file=sys.stderr)
    if os.name == "posix":
        sync_folder(os.path.dirname(path) or ".")
