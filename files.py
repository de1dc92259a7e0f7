"""
Files that outlive what may end a run: a kill, a power cut, a full disk, a second process.

    with written(path) as f: ...    # `path` appears whole or not at all, one writer at a time
    lock = hold(folder, seconds)    # the folder is this process's own until it ends
    with reading(path): ...         # whatever goes wrong in it is one line that names `path`

Every script turns a UserError into one line and a non-zero exit.
"""

import contextlib
import errno
import lzma
import os
import socket
import tarfile
import time
import zlib
from pathlib import Path

HERE = os.path.dirname(os.path.abspath(__file__))

# The suffix of a file or folder while it is being written. A leftover with this suffix is
# overwritten or removed, so do not name your own files so.
PARTIAL = ".tvm-partial"

# What reading a damaged .tar raises; a ValueError comes from numbers in a header.
ERRORS_OF_TAR = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError)

# How some network disks answer what they cannot do: to lock a file, or to sync a folder.
NOT_SUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class UserError(Exception):
    """What the user must know or mend, in one line."""


class CheckpointError(UserError):
    """Something about a checkpoint, in one line."""


class FidError(UserError, ValueError):
    """Something about images, statistics or weights, in one line."""


def first_line(error, longest=500):
    """The first line of an error's text, printable: a stranger's file may put anything into it."""
    lines = str(error).strip().splitlines() or [""]
    return "".join(filter(str.isprintable, lines[0]))[:longest]


@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong with a file becomes one line that names it: a FidError."""
    try:
        yield
    except FidError as error:
        raise FidError(first_line(error)) from None
    except UserError as error:
        raise FidError(first_line(f"cannot read {path}: {error}")) from None
    except Exception as error:  # zipfile, zlib, numpy, Pillow and torch raise many kinds
        raise FidError(first_line(f"cannot read {path}: {type(error).__name__}: {error}")) from None


# ---- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def written(path):
    """Give a binary file to write. At the end it is synced and renamed to `path`.

    Until then the bytes lie in `path`.tvm-partial, which is locked. Raises OSError, with the name
    `path`, where the disk is full or another process is writing `path`. What was at `path` then
    stays as it was. An OSError from the body that names another file passes unchanged; one without
    a file name is taken for a failed write to `path`.
    """
    aside = f"{path}{PARTIAL}"
    with errors_named(path, aside):
        file = open_locked(aside)
        try:
            file.truncate(0)  # of a writer that was killed
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name != "posix":
                file.close()  # Windows does not rename an open file
            os.replace(aside, path)
        except BaseException:
            remove_locked(file, aside)  # it takes room that others need
            raise
        file.close()
        if os.name == "posix":
            sync_folder(os.path.dirname(path) or ".")


@contextlib.contextmanager
def errors_named(path, aside):
    """An OSError without a file name, or about the file `aside`, becomes one about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, aside):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def follow_link(path):
    """Where to write what is to be at `path`: of a link, the place that it points to.

    A link to a larger disk then stays, and what is written lies on that disk.
    """
    return os.path.realpath(path) if os.path.islink(path) else path


def check_writable(path):
    """Make the folder of a file. Raises OSError where files.written could not write it there."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    aside = path + PARTIAL
    with errors_named(path, aside):
        remove_locked(open_locked(aside), aside)


def refuse_long_name(path):
    """Raise OSError where PATH.tvm-partial is too long a name, which lstat says without a file."""
    aside = path + PARTIAL
    with errors_named(path, aside), contextlib.suppress(FileNotFoundError):
        os.lstat(aside)


def others_in(folder, is_ours):
    """The names in a folder that are not ours, sorted. is_ours(name): whether we write such one."""
    return sorted(name for name in os.listdir(folder) if not is_ours(name))


def remove_ours(folder, is_ours):
    """Remove the files of a folder that are ours. Those of others stay, and so does the folder."""
    for name in os.listdir(folder):
        if is_ours(name):
            os.remove(os.path.join(folder, name))


def sync_folder(folder):
    """Make a renaming in a folder outlive a power cut, where the disk can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder may be writable and not readable
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def wait_for(path, seconds):
    """Whether a path is there, or comes within so many seconds."""
    end = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


# ---- locks ---------------------------------------------------------------------------------------


def hold(folder, seconds=0):
    """Make a folder this process's own until it ends, however it ends. Makes the folder if need be.

    Returns the locked file folder/lock, which must be kept: closing it gives the folder back.
    Waits `seconds` for a process that is about to end. Raises OSError, with the holder's name,
    where it does not. Files *.tvm-partial in the folder that nobody is writing are of a save that
    was cut off: they are removed.
    """
    path = os.path.join(folder, "lock")
    try:
        lock = open_locked(path, seconds, make_folder=True)
    except BlockingIOError:
        raise OSError(f"{holder_of(path)} is at work in {folder}") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    lock.flush()
    for name in os.listdir(folder):
        leftover = os.path.join(folder, name)
        if name.endswith(PARTIAL) and os.path.isfile(leftover):
            remove_unless_locked(leftover)
    return lock


def remove_unless_locked(path):
    file = open(path, "r+b")
    if take_lock(file):
        remove_locked(file, path)
    file.close()


def remove_locked(file, path):
    """Remove a file and then let go of its lock. Before that nobody else can begin to write it."""
    if os.name != "posix":
        with contextlib.suppress(OSError):
            file.close()  # Windows does not remove an open file
    with contextlib.suppress(OSError):
        os.remove(path)
    with contextlib.suppress(OSError):  # on a full disk the last bytes fail once more
        file.close()


def holder_of(path):
    """Who holds a lock, in the words that the holder has written into its file."""
    try:
        with open(path) as file:
            return file.read(200).strip() or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


def open_locked(path, seconds=0, make_folder=False):
    """Open the file at `path`, which is made when missing, and lock it until it is closed.

    Returns a binary file to read and write. Raises BlockingIOError where another process has the
    lock for longer than `seconds`, and FileNotFoundError where a folder of `path` is a link that
    leads nowhere. Where the system or the disk has no locks there is none.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            if make_folder:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            file = open(path, "r+b", opener=open_or_create)
        except (FileExistsError, FileNotFoundError):
            refuse_broken_link(path)
            raise
        if take_lock(file):
            if is_still_at(file, path):
                return file
            file.close()  # the holder before has renamed or removed it: open the new one
            continue
        file.close()
        if time.monotonic() >= deadline:
            raise BlockingIOError(errno.EAGAIN, "another process is writing it", path)
        time.sleep(0.1)


def refuse_broken_link(path):
    """Raise FileNotFoundError where `path`, or a folder above it, is a link that leads nowhere."""
    for place in (path, *Path(path).parents):
        if os.path.islink(place) and not os.path.exists(place):
            target = os.path.realpath(place)
            raise FileNotFoundError(f"{place} is a link to {target}, which is not there")


def open_or_create(path, flags):
    return os.open(path, flags | os.O_CREAT, 0o666)


def take_lock(file):
    """Lock an open file, without waiting. Returns whether that worked."""
    if os.name != "posix":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    return True


def is_still_at(file, path):
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
