"""
Files that outlive a kill, a power cut, a full disk and a second process.
"""
import contextlib
import os
import socket
import time

HERE = os.path.dirname(os.path.abspath(__file__))


class CheckpointError(Exception):
    """Something about a checkpoint, in one line for the user."""


@contextlib.contextmanager
def written(path):
    """A binary file to write, which is `path` at the end: written aside, synced, renamed. Raises OSError (a full disk),
    after which `path` is what it was."""
    aside = f"{path}.partial"
    try:
        with open(aside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except OSError:
        if os.path.exists(aside):
            os.remove(aside)                                                      # it holds space that others need
        raise
    if os.name == "posix":                                                        # or a power cut may undo the renaming
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def hold(folder, seconds):
    """Make the folder this process's own until it ends, however it ends, by the system's lock on folder/lock; returns
    the file, to be kept. Waits for a process that is about to end; raises OSError where it does not."""
    os.makedirs(folder, exist_ok=True)
    file, deadline = open(os.path.join(folder, "lock"), "a+"), time.monotonic() + seconds
    while os.name == "posix":
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                raise OSError(f"{file.read().strip() or 'another process'} is at work in {folder}") from None
            time.sleep(0.1)
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    for name in os.listdir(folder):
        if name.endswith(".partial"):                                             # of a save that was cut off
            os.remove(os.path.join(folder, name))
    return file
