"""files.py: files that appear whole, and folders that one process holds."""

import errno
import os
import stat
import subprocess
import sys
import threading

import pytest
from helpers import HERE, SMALL, full_disk, run_script, until

import files

links = pytest.mark.skipif(sys.platform != "linux", reason="links as Linux has them")

# A process that writes half of the file x, says so, and goes on when it is told to.
SLOW_WRITER = """
from files import written

with written("x") as f:
    f.write(b"first")
    f.flush()
    print("begun", flush=True)
    input()
    f.write(b", whole")
"""

# A process that writes the file x often, and passes over the turns that another one has.
EAGER_WRITER = """
import sys
from files import written

letter = sys.argv[1].encode()
done = 0
while done < 60:
    try:
        with written("x") as f:
            for _ in range(10):
                f.write(letter * 100)
                f.flush()
    except BlockingIOError:
        continue
    done += 1
"""


def start_python(code, *arguments):
    """Python code in a process of its own, which finds files.py."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": HERE},
    )


@pytest.fixture
def slow_writer(folder):
    process = start_python(SLOW_WRITER)
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.communicate()


def write(path, content):
    with files.written(path) as f:
        f.write(content)


def read(path):
    with open(path, "rb") as f:
        return f.read()


# ---- written -------------------------------------------------------------------------------------


def test_written_is_synced_before_it_is_renamed(folder, monkeypatch):
    calls = []
    replace = os.replace

    def fsync(descriptor):
        status = os.fstat(descriptor)
        is_folder = status.st_mode & 0o40000
        calls.append("folder" if is_folder else status.st_size)

    def spied_replace(old, new):
        calls.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", spied_replace)
    write("x", b"123")
    assert calls == [3, "rename", "folder"]


def test_a_second_writer_gets_one_line(slow_writer):
    """The second one is told before it has written a byte. The first one's file is whole."""
    with pytest.raises(OSError, match="another process is writing it: 'x'"):
        write("x", b"second")
    assert not os.path.exists("x")
    slow_writer.communicate("go on\n")
    assert slow_writer.returncode == 0
    assert read("x") == b"first, whole"
    assert os.listdir() == ["x"]


def test_a_killed_writer_leaves_nothing_that_stays(slow_writer):
    slow_writer.kill()
    slow_writer.wait()
    assert read("x.tvm-partial") == b"first"
    write("x", b"new")
    assert read("x") == b"new"
    assert os.listdir() == ["x"]


def test_a_failed_write_leaves_what_was_there(folder):
    write("x", b"old")
    with pytest.raises(ZeroDivisionError), files.written("x") as f:
        f.write(b"new")
        raise ZeroDivisionError
    assert read("x") == b"old"
    assert os.listdir() == ["x"]


def test_files_of_other_names_stay(folder):
    """What a user calls NAME.partial is neither overwritten nor taken for a save that was cut."""
    write("x.partial", b"mine")
    write("x", b"new")
    files.hold(".").close()
    assert read("x.partial") == b"mine"
    assert sorted(os.listdir()) == ["lock", "x", "x.partial"]


@pytest.mark.parametrize("size", [200, 1_000_000])
def test_a_full_disk_is_told_with_the_name(folder, size):
    """Whether that shows in the middle of a file, or only when its last bytes are flushed."""
    write("x", b"old")
    with full_disk(100), pytest.raises(OSError, match="File too large: 'x'"):
        write("x", bytes(size))
    assert read("x") == b"old"
    assert os.listdir() == ["x"]


def test_an_error_of_another_file_keeps_its_name(folder):
    with pytest.raises(FileNotFoundError, match="'gone'"), files.written("x"):
        read("gone")
    with pytest.raises(OSError, match="^no VAE$"), files.written("x"):
        raise OSError("no VAE")
    assert os.listdir() == []


def test_many_writers_of_one_file(folder):
    """Each file is of one writer alone, and each writer only ever meets the error of a lock."""
    writers = [start_python(EAGER_WRITER, letter) for letter in "abc"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if os.path.exists("x"):
            content = read("x")
            assert len(content) == 1000
            seen.update(set(content))
            assert len(set(content)) == 1
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert seen
    assert os.listdir() == ["x"]


def test_disks_without_locks(folder, monkeypatch):
    """Some network disks have none: files are written, without protection against a second one."""
    fcntl = pytest.importorskip("fcntl")

    def no_lock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    write("x", b"123")
    assert read("x") == b"123"
    files.hold("out").close()
    assert os.listdir("out") == ["lock"]


def is_folder(descriptor):
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_disks_that_cannot_sync_a_folder(folder, monkeypatch, code):
    """Some of FUSE and CIFS: the file is whole, so that is no failure."""

    def no_sync_of_folders(descriptor):
        if is_folder(descriptor):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", no_sync_of_folders)
    write("x", b"123")
    assert read("x") == b"123"


@pytest.mark.parametrize("fails_for", ["file", "folder"])
def test_a_broken_disk_is_told(folder, monkeypatch, fails_for):
    def failing_sync(descriptor):
        if is_folder(descriptor) == (fails_for == "folder"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing_sync)
    with pytest.raises(OSError, match="Input/output error: 'x'"):
        write("x", b"123")


def test_a_folder_that_may_be_written_but_not_read(folder, monkeypatch):
    """As if it were: root may read any folder."""
    open_any = os.open

    def open_no_folder(path, flags, *mode):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return open_any(path, flags, *mode)

    monkeypatch.setattr(os, "open", open_no_folder)
    write("x", b"123")
    assert read("x") == b"123"


# ---- links that lead nowhere ---------------------------------------------------------------------


@links
@pytest.mark.parametrize("link", ["out", "out/digits", "out/digits/lock"])
def test_a_link_to_nowhere_is_named(folder, link):
    """Wherever it is on the way to a folder to be held, or to a file to be written."""
    os.makedirs(os.path.dirname(link) or ".", exist_ok=True)
    os.symlink(folder / "gone" / "far", link)
    complaint = f"^{link} is a link to {folder}/gone/far, which is not there$"
    with pytest.raises(FileNotFoundError, match=complaint):
        files.hold("out/digits")
    if link != "out/digits/lock":
        with pytest.raises(FileNotFoundError, match=complaint):
            write("out/digits/x", b"123")
    assert not os.path.exists("gone")


@links
def test_scripts_name_a_link_to_nowhere(folder):
    assert run_script("prepare.py", "digits") is None
    os.symlink("gone", "out")
    complaint = run_script("train.py", *SMALL)
    assert complaint.startswith("train.py: cannot train in out/digits: out is a link to ")
    assert complaint.endswith("/gone, which is not there")
    os.rename("data", "moved")
    os.symlink("gone", "data")
    assert run_script("prepare.py", "digits").startswith("prepare.py: data is a link to ")


# ---- hold ----------------------------------------------------------------------------------------


def test_locks_name_their_holder(folder):
    open("state_7.safetensors.tvm-partial", "w").close()
    with open("lock", "w") as f:
        f.write("process 1 on a machine of long ago, with a long name\n")
    lock = files.hold(".", 0)
    with pytest.raises(OSError, match=f"^process {os.getpid()} on"):
        files.hold(".", 0)
    lock.close()
    assert os.listdir(".") == ["lock"]


@pytest.mark.parametrize("content", [b"", b"caf\xe9"])
def test_a_holder_without_a_name(folder, content):
    lock = files.hold("out")
    with open("out/lock", "wb") as f:
        f.write(content)
    with pytest.raises(OSError, match="^another process is at work in out$"):
        files.hold("out")
    lock.close()


def test_one_process_a_run(folder):
    lock = files.hold("out/digits", 0)
    complaint = run_script("train.py", "--lock_wait=0", *SMALL)
    assert f"cannot train in out/digits: process {os.getpid()} on" in complaint
    lock.close()
    assert run_script("train.py", "--lock_wait=0", "--steps=1", *SMALL) is None


def test_hold_spares_what_is_being_written(slow_writer):
    """Only leftovers of processes that are gone are removed."""
    open("gone.tvm-partial", "w").close()
    os.mkdir("folder.tvm-partial")
    lock = files.hold(".")
    assert sorted(os.listdir()) == ["folder.tvm-partial", "lock", "x.tvm-partial"]
    slow_writer.communicate("go on\n")
    assert read("x") == b"first, whole"
    lock.close()


def remove_lock():
    os.remove("out/lock")


def rename_lock():
    os.rename("out/lock", "out/old lock")


def rename_folder():
    os.rename("out", "finished")


def remove_and_lock_again():
    """A third process is faster than the one that waits, and is done soon."""
    os.remove("out/lock")
    third = files.hold("out")
    threading.Timer(0.3, third.close).start()


@pytest.mark.parametrize("end", [remove_lock, rename_lock, rename_folder, remove_and_lock_again])
def test_a_lock_that_goes_while_another_waits(folder, end):
    """Whoever waits gets the file that then has the name, so that no two hold the folder."""
    lock = files.hold("out")
    found = []

    def wait():
        found.append(files.hold("out", 10))

    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(0.15)  # it has opened the old file
    assert not found
    end()
    lock.close()
    waiting.join(10)
    assert files.is_still_at(found[0], "out/lock")
    with pytest.raises(OSError, match="is at work in out"):
        files.hold("out")
    found[0].close()
    files.hold("out").close()


def test_a_killed_holder_lets_go(folder):
    process = start_python(
        "import files; lock = files.hold('out'); print('held', flush=True); input()"
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(OSError, match=f"^process {process.pid} on"):
        files.hold("out")
    process.kill()
    process.communicate()
    until(lambda: files.hold("out"), "the lock", seconds=5).close()


def test_a_file_in_place_of_the_folder(folder):
    open("out", "w").close()
    assert "cannot train in out" in run_script("train.py", *SMALL)
