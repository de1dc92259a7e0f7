"""prepare.py and dataset.py: what becomes of raw images, whose a name is, and what is refused."""

import errno
import gzip
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import zlib
from typing import NamedTuple

import numpy as np
import pytest
from helpers import HERE, run_script, torchrun, until, write_picture
from PIL import Image

import claims
import dataset
import header as header_json
import labels as image_labels
import shapes

RED, GREEN, BLUE = (200, 30, 40), (0, 250, 0), (20, 30, 220)

linux = pytest.mark.skipif(sys.platform != "linux", reason="links, locks and signals as of Linux")


def complain(*arguments):
    """What prepare.py says where it fails; None where it does not."""
    return run_script("prepare.py", *arguments)


def start(*arguments, **options):
    """prepare.py in a process of its own. options: of subprocess.Popen."""
    return subprocess.Popen(
        [sys.executable, os.path.join(HERE, "prepare.py"), *map(str, arguments)],
        **options,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def write_pictures(path, n, colour=RED):
    for i in range(n):
        write_picture(path / f"{i:03}.png", colour=colour)


def colours(name):
    """The mean colour of each training image of data/NAME, (N, 3)."""
    return dataset.load_dataset(f"data/{name}")[1]["train_images"].mean((2, 3))


# ---- digits and shapes ---------------------------------------------------------------------------


def ink(images):
    """The sorted sums of 17 levels of ink."""
    return sorted(np.round(images.reshape(-1, 64) / 255 * 16).sum(1))


def test_digits(folder):
    assert complain("digits") is None
    header, data = dataset.load_dataset("data/digits")
    assert header["count"] == {"train": 1437, "test": 360}
    assert header["shape"] == [1, 8, 8] and "CC BY" in header["license"]
    assert header["class_counts"] == np.bincount(data["train_labels"]).tolist()
    file = os.path.join(HERE, "assets", "digits.npz")
    with np.load(file, allow_pickle=False) as f:
        original = sorted(f["images"].reshape(-1, 64).sum(1))
    assert ink(np.concatenate([data["train_images"], data["test_images"]])) == original
    assert os.path.getsize(file) < 100_000


def test_shapes(folder):
    assert complain("shapes", "--n", 60, "--size", 16, "--name", "a") is None
    header, data = dataset.load_dataset("data/a")
    assert header["count"] == {"train": 60, "test": 10} and header["num_classes"] == 10
    assert (data["train_images"][13] == shapes.draw_shape(13, 16)).all()
    assert (data["train_labels"] == np.arange(60) % 10).all()
    assert (data["test_images"][4] == shapes.draw_shape(64, 16)).all()
    assert (shapes.draw_shape(13, 16) != shapes.draw_shape(13, 16, seed=1)).any()


def test_disks_are_round():
    """What turns a shape does not shear it."""
    for i in range(0, 100, 10):
        places = np.argwhere(shapes.draw_shape(i, 64)[0] > 0.475 * 255)
        small, large = np.linalg.eigvalsh(np.cov(places.T))
        assert large < 1.1 * small


# ---- a folder of images --------------------------------------------------------------------------


def test_folder(folder, capsys):
    for i in range(5):
        write_picture(folder / "src" / "cats" / f"{i}.png")
        write_picture(folder / "src" / "dogs" / f"{i}.jpg", (37, 50), GREEN)
    whole = (folder / "src" / "cats" / "0.png").read_bytes()
    (folder / "src" / "cats" / "broken.png").write_bytes(whole[:40])
    arguments = ("folder", "src", "--size", 8, "--name", "pets", "--held-out", 0.2)
    assert complain(*arguments) is None
    said = capsys.readouterr()
    assert "broken.png" in said.err and "1 of 11" in said.out
    assert "2 classes: cats, dogs" in said.out
    header, data = dataset.load_dataset("data/pets")
    assert header["count"] == {"train": 8, "test": 2} and header["skipped"] == 1
    assert header["class_names"] == ["cats", "dogs"]
    green = data["train_images"][:, 1].mean((1, 2)) > 128
    assert (green == data["train_labels"]).all() and 0 < green.sum() < 8

    write_pictures(folder / "flat", 3)
    assert complain("folder", "flat", "--size", 8, "--name", "flat") is None
    assert dataset.load_dataset("data/flat")[0]["num_classes"] == 0
    assert sorted(os.listdir("data")) == ["flat", "pets"]
    assert sorted([*os.listdir("data/flat"), "left_out.txt"]) == sorted(os.listdir("data/pets"))
    assert len(os.listdir("data/flat")) == 5  # the header and four arrays


def test_what_folder_refuses(folder):
    write_pictures(folder / "flat", 1)
    assert "no folder" in complain("folder", "nowhere", "--size", 8)
    for name in "../photos", ".":
        said = complain("digits", "--name", name)
        assert said.endswith(f"{name!r} cannot be a dataset's name: it must be a plain folder name")
    assert "name must have a value" in complain("folder", "flat", "--size", 16, "--name=--")
    for letter in "\n", "\r", "\x1b", "\u2028", "\udce9":
        assert "no control characters" in complain("digits", "--name", f"a{letter}b")
    for name in "mine.partial", "mine.replaced", "Mine.PARTIAL":
        assert "must not end in .partial or .replaced" in complain("digits", "--name", name)
    assert "[0, 1)" in complain("folder", "flat", "--size", 8, "--held-out", 1.5)
    assert "at least 1" in complain("folder", "flat", "--size", 0)
    assert "its disk has" in complain("folder", "flat", "--size", 10**12)
    assert "its disk has" in complain("shapes", "--n", 10**20)
    assert "unrecognized" in complain("digits", "--sise", 3)
    assert "--seed" in complain("digits", "--seed", -1)
    os.makedirs("data/mine")
    assert "not a dataset" in complain("digits", "--name", "mine") and os.path.isdir("data/mine")
    assert "not a dataset" in complain("digits", "--name", "mine", "--overwrite")
    os.mkdir("empty")
    assert "no .jpg" in complain("folder", "empty", "--size", 8)
    write_picture(folder / "mix" / "cats" / "0.png")
    write_picture(folder / "mix" / "1.png")
    assert "beside its class folders" in complain("folder", "mix", "--size", 8)
    write_picture(folder / "splits" / "train" / "cats" / "0.png")
    write_picture(folder / "splits" / "val" / "cats" / "0.png")
    assert "give splits/train" in complain("folder", "splits", "--size", 8)
    assert os.listdir("data") == ["mine"]


@linux
def test_odd_files_are_all_accounted_for(folder, capsys):
    """Read + left out = all, by name."""
    src = folder / "src"
    picture = Image.new("RGB", (20, 14), RED)
    write_picture(src / "plain.png")
    picture.convert("CMYK").save(src / "cmyk.jpg")
    Image.new("I;16", (20, 14), 30000).save(src / "deep.png")
    picture.quantize(4).save(src / "palette.png")
    Image.new("RGBA", (20, 14), (*RED, 0)).save(src / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(src / "exif.jpg", exif=exif)
    picture.save(src / "webp.jpg", "WEBP", lossless=True)
    picture.save(src / "x.bmp")
    picture.save(src / "x.TIFF")
    picture.save(os.fsencode(src) + b"/caf\xe9.png")
    picture.save(src / "two\nlines.png")
    read = 11
    noise = Image.effect_noise((64, 64), 50)
    noise.save(src / "truncated.png")
    os.truncate(src / "truncated.png", 900)
    (src / "empty.png").write_bytes(b"")
    (src / "text.jpg").write_text("hello")
    os.symlink("gone", src / "dangling.png")
    (src / "folder.jpg").mkdir()
    (src / "notes.txt").write_text("hello")
    picture.save(src / "hidden.png")
    os.rename(src / "hidden.png", src / ".hidden.png")
    (src / "._plain.png").write_bytes(b"\0\5\x16\7")
    (src / "Thumbs.db").write_bytes(b"\0")
    left_out = {
        "truncated.png": "OSError: image file is truncated",
        "empty.png": "the file is empty",
        "text.jpg": "it is none of JPEG, PNG, WebP, BMP and TIFF",
        "dangling.png": "a link to nothing",
        "folder.jpg": "an empty folder",
        "notes.txt": "its name is not that of an image",
        ".hidden.png": "hidden",
        "._plain.png": "hidden",
        "Thumbs.db": "of the operating system",
    }
    assert read + len(left_out) == len(os.listdir(src))
    assert complain("folder", "src", "--size", 8, "--held-out", 0) is None
    said = capsys.readouterr()
    header, data = dataset.load_dataset("data/folder")
    assert header["count"] == {"train": read, "test": 0} and header["skipped"] == 3
    lines = said.err[said.err.index("left out:") :].splitlines()
    assert lines[0] == f"left out: {len(left_out)}"
    for name, reason in left_out.items():
        assert any(line.startswith(f"    {name}: {reason}") for line in lines), name
    assert "1 of another format than the name says, read as what they are: webp.jpg" in said.err
    middles = data["train_images"][:, :, 4, 4].astype(int)
    of_red = (np.abs(middles - RED).max(1) <= 12).sum()
    of_gray = (np.abs(middles - 117).max(1) == 0).sum()
    white = (middles == 255).all(1).sum()
    assert (of_red, of_gray, white) == (9, 1, 1)


def test_all_that_is_left_out_is_kept(folder, capsys):
    """A line each, however many there are and whatever their names hold."""
    write_pictures(folder / "src", 3)
    (folder / "src" / "empty.png").write_bytes(b"")
    for i in range(12):
        (folder / "src" / f"n\t{i:02}.txt").write_text("hello")
    assert complain("folder", "src", "--size", 8) is None
    assert "    and 3 more (all in data/folder/left_out.txt)\n" in capsys.readouterr().err
    with open("data/folder/left_out.txt", encoding="utf-8") as f:
        lines = f.read().splitlines()
    reason = "its name is not that of an image"
    assert lines == ["empty.png\tthe file is empty"] + [
        f"n\\t{i:02}.txt\t{reason}" for i in range(12)
    ]


def test_what_a_user_may_not_expect(folder, capsys):
    """Classes without an image, and no image that is held out, are said in one line each."""
    write_pictures(folder / "src", 9)
    rows = [[f"{i:03}.png", 7] for i in range(9)]
    (folder / "src" / "dataset.json").write_text(json.dumps({"labels": rows}))
    assert complain("folder", "src", "--size", 8) is None
    said = capsys.readouterr().err
    assert "7 of the 8 classes have no image: 0, 1, 2, 3, 4, ...\n" in said
    assert "--held-out 0.1 of 9 images holds out none\n" in said
    assert complain("folder", "src", "--size", 8, "--held-out", 0, "--overwrite") is None
    assert "holds out none" not in capsys.readouterr().err


@linux
def test_a_terminal_of_ascii(folder):
    """It shows class names as escapes; the header keeps them."""
    write_picture(folder / "src" / "caf\u00e9" / "0.png")
    command = [sys.executable, os.path.join(HERE, "prepare.py"), "folder", "src", "--size", "8"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1 class: caf\\xe9" in done.stdout
    assert dataset.load_dataset("data/folder")[0]["class_names"] == ["caf\u00e9"]


@linux
def test_class_names_that_are_no_text(folder, capsys):
    """They are kept in a form that every terminal shows."""
    write_picture(folder / "src" / "a b" / "0.png")
    os.mkdir(os.fsencode(folder / "src") + b"/caf\xe9")
    Image.new("RGB", (9, 9), RED).save(os.fsencode(folder / "src") + b"/caf\xe9/0.png")
    assert complain("folder", "src", "--size", 8) is None
    assert dataset.load_dataset("data/folder")[0]["class_names"] == ["a b", "caf\\udce9"]
    assert "2 classes: a b, caf\\udce9" in capsys.readouterr().out


def test_a_class_that_cannot_be_read(folder, capsys):
    """It must not stay as an empty class; the reasons are all printed; and nothing is left."""
    write_pictures(folder / "src" / "cats", 2)
    (folder / "src" / "dogs").mkdir()
    for i in range(12):
        (folder / "src" / "dogs" / f"{i:02}.png").write_bytes(b"")
    assert "no image of class 'dogs'" in complain("folder", "src", "--size", 8)
    said = capsys.readouterr().err
    assert "    dogs/11.png: the file is empty\n" in said and "left_out.txt" not in said
    for i in range(12):
        (folder / "src" / "dogs" / f"{i:02}.png").unlink()
    assert "src/dogs looks like a class" in complain("folder", "src", "--size", 8)
    (folder / "flat").mkdir()
    (folder / "flat" / "0.png").write_bytes(b"")
    assert "none of the 1 images" in complain("folder", "flat", "--size", 8)
    assert os.listdir("data") == []


def test_photographs_of_phones_stand_upright(folder):
    picture = Image.new("RGB", (40, 40), (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 20, 40))  # the left half, which is the top
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "src").mkdir()
    picture.save("src/0.jpg", exif=exif)
    assert complain("folder", "src", "--size", 8, "--held-out", 0) is None
    image = dataset.load_dataset("data/folder")[1]["train_images"][0]
    assert image[:, :3].min() > 200 and image[:, 5:].max() < 50


def test_gray(folder, capsys):
    for i in range(4):
        write_picture(folder / "src" / f"{i}.png", colour=(60 * i, 60 * i, 60 * i))
    assert complain("folder", "src", "--size", 8, "--name", "three") is None
    assert "--gray" in capsys.readouterr().err
    assert complain("folder", "src", "--size", 8, "--name", "one", "--gray") is None
    assert "--gray" not in capsys.readouterr().err
    header, one = dataset.load_dataset("data/one")
    assert header["shape"] == [1, 8, 8] and header["mean"] == [127.5]
    assert header["made_by"].endswith("--gray")
    three = dataset.load_dataset("data/three")[1]
    assert (three["train_images"] == one["train_images"]).all()
    write_picture(folder / "src" / "4.png", colour=RED)
    assert complain("folder", "src", "--size", 8, "--name", "colour") is None
    assert "--gray" not in capsys.readouterr().err


def test_folder_with_labels_of_a_dataset_json(folder, capsys):
    """EDM's folders: 00000 and 00001 are no classes."""
    rows = [[f"0000{i % 2}/img{i}.png", 2 * (i % 3 == 0)] for i in range(12)]
    for name, label in rows:
        write_picture(folder / "edm" / name, colour=RED if label else BLUE)
    (folder / "edm" / "dataset.json").write_text(json.dumps({"labels": rows}))
    assert complain("folder", "edm", "--size", 8) is None
    header, data = dataset.load_dataset("data/folder")
    assert header["class_names"] == ["0", "1", "2"] and header["class_counts"][1] == 0
    is_red = data["train_images"].mean((2, 3))[:, 0] > 128
    assert (data["train_labels"] == 2 * is_red).all()
    said = capsys.readouterr()
    assert "3 classes: 0, 1, 2" in said.out and "left out" not in said.err


# ---- the held-out split --------------------------------------------------------------------------


def held_out(labels, share, seed=0):
    return image_labels.choose_held_out(np.array(labels), share, np.random.default_rng(seed))


def test_split_is_stratified():
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [100, 40, 20]))
    chosen = held_out(labels, 0.1)
    assert np.bincount(labels[chosen]).tolist() == [10, 4, 2]
    uneven = np.repeat([0, 1, 2], [7, 7, 6])  # 1.4, 1.4 and 1.2: four together
    assert sorted(np.bincount(uneven[held_out(uneven, 0.2)], minlength=3)) == [1, 1, 2]
    assert held_out(uneven, 0).sum() == 0
    hundred = np.zeros(100, int)
    of_100 = [held_out(hundred, percent / 100).sum() for percent in range(100)]
    assert of_100 == list(range(100))  # 0.29 * 100 is a little below 29


def test_split_keeps_every_class_in_training():
    labels = np.repeat(np.arange(6), [1, 1, 1, 2, 2, 50])
    for seed in range(20):
        chosen = held_out(labels, 0.5, seed)
        assert set(labels[~chosen]) == set(range(6))
    assert held_out([0, 1, 2], 0.9).sum() == 0
    assert held_out([0], 0.9).sum() == 0


def test_split_depends_on_the_seed_alone():
    """And which of many small classes give one is not always the first ones."""
    labels = np.repeat(np.arange(50), 5)
    one, again, other = (held_out(labels, 0.1, seed) for seed in (0, 0, 1))
    assert (one == again).all() and (one != other).any()
    assert one.sum() == 25 and np.bincount(labels[one]).max() == 1


def test_split_of_a_folder(folder):
    for name, n in (("cats", 20), ("dogs", 10), ("rare", 1)):
        write_pictures(folder / "src" / name, n)
    for name in ("a", "b"):
        assert complain("folder", "src", "--size", 4, "--name", name, "--held-out", 0.2) is None
    header, data = dataset.load_dataset("data/a")
    assert header["class_counts"] == [16, 8, 1] and data["test_labels"].tolist().count(0) == 4
    assert len(data["test_labels"]) == 6
    for file in ("train_labels", "test_labels", "train_images", "test_images"):
        assert (data[file] == dataset.load_dataset("data/b")[1][file]).all()
    assert (np.diff(data["train_labels"]) < 0).any()  # in a drawn order


# ---- whose a name is -----------------------------------------------------------------------------


def start_and_stop(*arguments):
    """prepare.py, stopped by a signal while it holds its name."""
    process = start(*arguments)
    name = arguments[arguments.index("--name") + 1]
    until(lambda: os.path.exists(f"data/{name}.partial/scratch.npy"), "its first bytes")
    process.send_signal(signal.SIGSTOP)
    return process


@linux
def test_two_runs_of_one_name(folder):
    """The second one gets one line, and the first one's dataset is whole."""
    write_pictures(folder / "red", 60, RED)
    write_pictures(folder / "blue", 60, BLUE)
    first = start_and_stop("folder", "red", "--name", "both", "--size", 8)
    for more in ((), ("--overwrite",)):
        second = start("folder", "blue", "--name", "both", "--size", 32, *more)
        said = second.communicate(timeout=60)[1]
        assert second.returncode == 1
        assert said.startswith("prepare.py: process") and "is at work in data/both.partial" in said
        assert said.count("\n") == 1
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0
    header = dataset.load_dataset("data/both")[0]
    assert header["count"] == {"train": 54, "test": 6} and header["shape"] == [3, 8, 8]
    assert np.allclose(colours("both"), RED)
    assert os.listdir("data") == ["both"] and "lock" not in os.listdir("data/both")


@linux
def test_two_runs_at_the_same_moment(folder):
    """Whoever wins, one dataset is there, whole, and one run has failed."""
    write_pictures(folder / "red", 30, RED)
    write_pictures(folder / "blue", 30, BLUE)
    runs = [
        start("folder", colour, "--name", "both", "--size", 8, "--held-out", 0)
        for colour in ("red", "blue")
    ]
    said = [run.communicate(timeout=60)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert sorted(codes) == [0, 1]
    loser = codes.index(1)
    assert "is at work" in said[loser] or "is there already" in said[loser]
    assert "Traceback" not in "".join(said)
    assert np.allclose(colours("both"), (RED, BLUE)[1 - loser]) and len(colours("both")) == 30
    assert os.listdir("data") == ["both"]


@linux
def test_a_killed_run_leaves_nothing_that_stays(folder):
    write_pictures(folder / "red", 60)
    killed = start_and_stop("folder", "red", "--name", "a", "--size", 8)
    killed.kill()
    killed.wait()
    (folder / "data" / "a.partial" / "scratch.npy").write_bytes(b"a torn array")
    assert complain("folder", "red", "--name", "a", "--size", 8) is None
    assert os.listdir("data") == ["a"] and len(os.listdir("data/a")) == 5


@linux
def test_two_ranks(folder):
    """Under torchrun no rank works, and each says why; nothing is damaged."""
    write_pictures(folder / "red", 60)
    arguments = ("folder", "red", "--name", "a", "--size", 8)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        torchrun("prepare.py", *arguments)
    said = failed.value.stderr.decode()
    # torchrun may end one rank before it has said it.
    assert said.count("prepare.py: folder takes one process: run it without torchrun") in (1, 2)
    assert not os.path.exists("data")
    assert complain(*arguments) is None
    assert dataset.load_dataset("data/a")[0]["count"] == {"train": 54, "test": 6}
    assert os.listdir("data") == ["a"]


@pytest.mark.parametrize(
    "variables, complaint",
    [
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE=2 but no RANK"),
        ({"RANK": "x"}, "RANK must be a whole number, not 'x'"),
        ({"RANK": "1"}, "has RANK 1 and WORLD_SIZE 1"),
    ],
)
def test_a_part_of_what_torchrun_sets(folder, monkeypatch, variables, complaint):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert complaint in complain("digits")
    assert os.listdir() == []


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_rank_is_refused(folder, monkeypatch, rank):
    """If the first one worked, torchrun would end it because the others have failed."""
    ranks = dict(WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="here", MASTER_PORT="1")
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    said = complain("digits")
    assert said == "prepare.py: digits takes one process: run it without torchrun"
    assert os.listdir() == []


def test_digits_do_without_torch(folder):
    """Its import takes seconds."""
    program = "import sys, prepare; prepare.main(); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", program, "digits"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": HERE})


def test_files_of_others_stay(folder):
    """Where NAME.partial or NAME.replaced holds anything of theirs, it is named and not touched."""
    for name in "notes.txt", "notes.partial", "header.json":
        path = folder / "data" / "a.partial" / name
        path.parent.mkdir(parents=True)
        path.write_text("x")
        for more in ((), ("--overwrite",)):
            said = complain("digits", "--name", "a", *more)
            assert f"data/a.partial/{name} is not of an interrupted run" in said
        assert os.listdir("data/a.partial") == [name]
        path.unlink()
        path.parent.rmdir()

    notes = folder / "data" / "a.replaced" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("x")
    assert "data/a.replaced is not a dataset" in complain("digits", "--name", "a")
    assert os.listdir("data") == ["a.replaced"]
    os.rename("data/a.replaced", "aside")
    assert complain("digits", "--name", "a") is None
    os.rename("aside", "data/a.replaced")
    assert "data/a.replaced/notes.txt is not prepare.py" in complain(
        "digits", "--name", "a", "--overwrite"
    )
    assert os.listdir("data/a.replaced") == ["notes.txt"]

    writer = dataset.Writer("data/b", (1, 8, 8), {"train": 1, "test": 0})
    os.rename("data/a.replaced", "data/b.replaced")  # while it was at work
    (folder / "data" / "b.partial" / "notes.txt").write_text("x")
    claims.remove_partial("data/b", writer.lock)
    assert os.listdir("data/b.partial") == os.listdir("data/b.replaced") == ["notes.txt"]
    os.remove("data/b.partial/notes.txt")
    os.rename("data/b.replaced", "aside")
    writer = dataset.Writer("data/b", (1, 8, 8), {"train": 1, "test": 0})
    os.rename("aside", "data/b.replaced")
    writer.set(0, BLACK, 0)
    writer.finish("b", [])
    assert os.listdir("data/b.replaced") == ["notes.txt"]


def test_a_removal_that_was_cut_off(folder):
    """The old dataset was half gone when the run was killed: the next one goes on."""
    assert complain("digits") is None
    os.mkdir("data/digits.replaced")
    os.rename("data/digits/test_labels.npy", "data/digits.replaced/test_labels.npy")
    assert complain("digits", "--overwrite") is None
    assert os.listdir("data") == ["digits"] and len(os.listdir("data/digits")) == 5


def test_one_writer_a_dataset(folder):
    writer = dataset.Writer("data/digits", (1, 8, 8), {"train": 2, "test": 0})
    writer.set(0, np.ones((1, 8, 8), np.uint8), 0)
    writer.set(1, BLACK, 0)
    assert f"process {os.getpid()}" in complain("digits") and not os.path.exists("data/digits")
    writer.finish("digits", ["0"])
    assert dataset.load_dataset("data/digits")[1]["train_images"][0].all()
    assert "lock" not in os.listdir("data/digits")
    assert "data/digits is there already: --overwrite replaces it" in complain("digits")
    assert complain("digits", "--overwrite") is None
    assert len(dataset.load_dataset("data/digits")[1]["train_images"]) == 1437


def test_an_existing_dataset_is_refused(folder):
    """By every command that makes one, in one line; --overwrite replaces it."""
    write_pictures(folder / "red", 4, RED)
    write_pictures(folder / "blue", 4, BLUE)
    write_cifar10("c.tar.gz", binary_members())
    commands = {
        "digits": (),
        "shapes": ("--n", 20, "--size", 8),
        "cifar10": ("c.tar.gz",),
        "folder": ("red", "--size", 8),
    }
    for name, arguments in commands.items():
        assert complain(name, *arguments) is None
        assert f"data/{name} is there already" in complain(name, *arguments)
        assert complain(name, *arguments, "--overwrite") is None
    assert "is there already" in complain("folder", "blue", "--size", 8)
    assert np.allclose(colours("folder"), RED)
    assert complain("folder", "blue", "--size", 8, "--overwrite") is None
    assert np.allclose(colours("folder"), BLUE)
    assert sorted(os.listdir("data")) == sorted(commands)


def test_a_dataset_is_replaced_only_by_a_whole_one(folder, monkeypatch):
    write_pictures(folder / "red", 4, RED)
    write_pictures(folder / "blue", 4, BLUE)
    assert complain("folder", "red", "--size", 8) is None
    for file in (folder / "blue").iterdir():
        file.write_bytes(b"")
    assert "can be read" in complain("folder", "blue", "--size", 8, "--overwrite")
    assert np.allclose(colours("folder"), RED) and os.listdir("data") == ["folder"]

    os.rename("data/folder", "data/folder.replaced")  # as a kill between two renamings leaves it
    said = complain("folder", "red", "--size", 8)
    assert "data/folder is there already: an interrupted --overwrite had set it aside" in said
    assert "another run" not in said
    assert np.allclose(colours("folder"), RED) and os.listdir("data") == ["folder"]

    writer = dataset.Writer("data/late", (3, 8, 8), {"train": 1, "test": 0})
    writer.set(0, np.zeros((3, 8, 8), np.uint8), 0)
    os.rename("data/folder", "data/late")  # while it was at work
    with pytest.raises(dataset.DataError, match="is there already"):
        writer.finish("late", [])
    assert np.allclose(colours("late"), RED)


def test_a_full_disk(folder, monkeypatch):
    write_pictures(folder / "red", 4)
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda path: Disk(100))
    assert "its disk has 100 bytes left" in complain("folder", "red", "--size", 8)
    assert "its disk has 100 bytes left" in complain("digits")
    assert os.listdir("data") == []
    room = iter([10**9, 100])  # another program fills it while the images are read
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda path: Disk(next(room)))
    assert "its disk has 100 bytes left" in complain("folder", "red", "--size", 8)
    assert os.listdir("data") == []


@linux
@pytest.mark.parametrize(
    "arguments",
    [("folder", "red", "--size", 32), ("digits",), ("shapes", "--n", 100)],
    ids=["folder", "digits", "shapes"],
)
@pytest.mark.parametrize("cause", ["full", "limit"])
def test_a_disk_that_has_no_room_for_an_array(folder, monkeypatch, arguments, cause):
    """One line, and nothing is left. Without room a memory map would end in a bus error."""
    write_pictures(folder / "red", 40)
    if cause == "full":

        def refuse(descriptor, offset, size):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        said = complain(*arguments)
        assert said.endswith(f"cannot write data/{arguments[0]}: No space left on device")
    else:
        import resource

        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        try:
            said = complain(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert said.endswith(f"cannot write data/{arguments[0]}: File too large")
    assert os.listdir("data") == []


@linux
def test_arrays_take_their_room_at_once(folder):
    dataset.new_memory_map("a.npy", (1000, 3, 20, 20), np.uint8)
    assert os.stat("a.npy").st_blocks * 512 >= 1_200_000


@linux
@pytest.mark.parametrize("command", ["folder", "shapes"])
def test_ctrl_c(folder, command):
    """As a terminal sends it, to all processes: nothing is said, and nothing is left."""
    picture = Image.effect_noise((1000, 1000), 50)
    (folder / "src").mkdir()
    for i in range(40):
        picture.save(f"src/{i}.png")
    arguments, first_file = {
        "folder": (("folder", "src", "--size", 8), "scratch.npy"),
        "shapes": (("shapes", "--n", 60000), "train_images.npy"),
    }[command]
    process = start(*arguments, start_new_session=True)
    until(lambda: os.path.exists(f"data/{command}.partial/{first_file}"), "its first bytes")
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in said and "prepare.py" not in said
    assert os.listdir("data") == []


def test_a_replaced_dataset_that_cannot_be_removed(folder, monkeypatch, capsys):
    """The new one is whole all the same; the next run wants the old one away."""
    assert complain("digits") is None

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", "test_labels.npy")

    monkeypatch.setattr(claims, "remove_dataset", refuse)
    assert complain("digits", "--overwrite", "--seed", 1) is None
    assert "cannot remove data/digits.replaced: [Errno 13] Permission" in capsys.readouterr().err
    assert dataset.load_dataset("data/digits")[0]["made_by"].endswith("--seed 1")
    assert "cannot remove data/digits.replaced" in complain("digits", "--overwrite")


def test_overwrite_removes_nothing_of_others(folder):
    """A file of somebody else, a folder whose header.json is somebody else's, and a link."""
    assert complain("digits") is None
    (folder / "data" / "digits" / "notes.txt").write_text("mine")
    assert "notes.txt is not prepare.py's: move it away" in complain("digits", "--overwrite")
    assert (folder / "data" / "digits" / "notes.txt").read_text() == "mine"
    (folder / "data" / "mine").mkdir()
    (folder / "data" / "mine" / "header.json").write_text('{"my": "own"}')
    assert complain("digits", "--name", "mine", "--overwrite") is not None
    assert os.listdir("data/mine") == ["header.json"]
    os.symlink("digits", "data/link")
    assert "data/link is a link to" in complain("digits", "--name", "link", "--overwrite")
    assert sorted(os.listdir("data")) == ["digits", "link", "mine"]


def test_a_dataset_comes_back_where_the_new_one_cannot_be_renamed(folder, monkeypatch):
    assert complain("digits") is None
    rename = os.rename

    def refuse(source, target):
        if str(source).endswith(".partial"):
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        rename(source, target)

    monkeypatch.setattr(dataset.os, "rename", refuse)
    said = complain("digits", "--overwrite", "--seed", 1)
    assert "Permission denied: 'data/digits.partial'" in said
    assert dataset.load_dataset("data/digits")[0]["made_by"].endswith("--seed 0")
    assert os.listdir("data") == ["digits"]


def test_sizes_are_shown_in_their_own_unit():
    sizes = {999: "999 bytes", 1500: "1.5 kB", 2_340_000: "2.3 MB", 5_000_000_000: "5.0 GB"}
    assert [dataset.describe_size(size) for size in sizes] == list(sizes.values())


class Disk(NamedTuple):
    free: int  # bytes


# ---- CIFAR-10 ------------------------------------------------------------------------------------

BATCHES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


def records():
    """Four random images a batch: {name: (4, 3073) uint8}, a label below 10 first."""
    rng = np.random.default_rng(0)
    found = {name: rng.integers(0, 256, (4, 3073), dtype=np.uint8) for name in BATCHES}
    for record in found.values():
        record[:, 0] %= 10
    return found


def binary_members():
    members = {"batches.meta.txt": "\n".join("abcdefghij").encode()}
    for name, record in records().items():
        members[name + ".bin"] = record.tobytes()
    return members


def python_members():
    names = [letter.encode() for letter in "abcdefghij"]
    members = {"batches.meta": pickle.dumps({b"label_names": names}, protocol=2)}
    for name, record in records().items():
        members[name] = pickle_of_python2(record[:, 1:], record[:, 0].tolist())
    return members


def pickle_of_python2(images, labels):
    """A batch as Python 2 pickled it: text is bytes, and numpy's names are the old ones."""
    raw = images.tobytes()
    state = b"(K\x01K" + bytes([len(images)]) + b"M\x00\x0c\x86"  # version, (n, 3072)
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    dtype += b"(K\x03U\x01|NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array += state + dtype + b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    list_of_labels = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + list_of_labels + b"u."


def write_cifar10(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo("cifar-10/" + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("members", [binary_members, python_members])
def test_cifar10(folder, members):
    write_cifar10("c.tar.gz", members())
    assert complain("cifar10", "c.tar.gz") is None
    header, data = dataset.load_dataset("data/cifar10")
    assert header["count"] == {"train": 20, "test": 4}
    assert header["class_names"] == list("abcdefghij")
    expected = records()
    assert (data["train_images"][5].reshape(-1) == expected["data_batch_2"][1, 1:]).all()
    assert data["test_labels"].tolist() == expected["test_batch"][:, 0].tolist()
    train_labels = np.concatenate([expected[name][:, 0] for name in BATCHES[:5]])
    assert (data["train_labels"] == train_labels).all()


def test_archives_that_cannot_be(folder):
    write_cifar10("c.tar.gz", binary_members())
    with open("c.tar.gz", "rb") as f, open("cut.tar.gz", "wb") as g:
        g.write(f.read()[:3000])
    assert "cut.tar.gz" in complain("cifar10", "cut.tar.gz")
    assert "gone.tar.gz" in complain("cifar10", "gone.tar.gz")
    with gzip.open("c.tar.gz") as f:
        stored = gzip.compress(f.read(), 0)
    image = records()["data_batch_2"][1, 1:].tobytes()
    assert stored.count(image) == 1
    with open("damaged.tar.gz", "wb") as f:
        f.write(stored.replace(image, image[::-1]))
    assert "cannot read damaged.tar.gz: CRC check failed" in complain("cifar10", "damaged.tar.gz")
    assert not os.path.exists("data")


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("test_batch", None, "no test_batch in it"),
        ("test_batch", b"cos\nsystem\n(S'touch ran'\ntR.", "os.system"),
        ("test_batch", pickle.dumps([1, 2], protocol=2), "not a batch"),
        ("test_batch", pickle.dumps({b"labels": [1], b"data": 3}, protocol=2), "not a batch"),
        ("test_batch", pickle_of_python2(np.zeros((2, 3072), np.uint8), [1]), "1 labels"),
        ("test_batch", pickle_of_python2(np.zeros((1, 3072), np.uint8), [99]), "a label 99 of 10"),
        ("batches.meta", pickle.dumps({b"label_names": 3}, protocol=2), "no label_names"),
    ],
    ids=["missing", "program", "list", "no array", "too few labels", "large label", "no names"],
)
def test_python_archives_that_cannot_be(folder, name, content, complaint):
    """One line each, and nothing of a pickle is run."""
    members = python_members()
    members[name] = content
    if content is None:
        del members[name]
    write_cifar10("c.tar.gz", members)
    assert complaint in complain("cifar10", "c.tar.gz")
    assert sorted(os.listdir()) == ["c.tar.gz"]


# ---- one more dataset, and the format ------------------------------------------------------------

STRIPES = """
import numpy as np
import prepare
from dataset import Writer
from prepare import new_dataset, with_seed


@new_dataset
@with_seed
def stripes(args):
    rng = np.random.default_rng(args.seed)
    writer = Writer(args.path, (1, 6, 9), {"train": 30, "test": 5}, overwrite=args.overwrite)
    y, x = np.mgrid[:6, :9]
    for i in range(35):
        angle = np.pi / 4 * (i % 4)
        wave = np.sin(x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, 2 * np.pi))
        writer.set(i, np.uint8(127.5 + 127.5 * wave)[None], i % 4)
    writer.finish(args.name, ["0", "45", "90", "135"], source="drawn", license="yours")


prepare.main()
"""


def test_one_more_dataset(folder):
    """It is one function; here of images that are not square."""
    (folder / "stripes.py").write_text(STRIPES)
    environment = {**os.environ, "PYTHONPATH": HERE}
    for more in (["--seed", "1"], ["--overwrite"]):
        command = [sys.executable, "stripes.py", "stripes", *more]
        subprocess.run(command, check=True, env=environment, capture_output=True)
    header, data = dataset.load_dataset("data/stripes")
    assert header["shape"] == [1, 6, 9] and data["test_images"].shape == (5, 1, 6, 9)
    assert header["class_names"] == ["0", "45", "90", "135"]


BLACK = np.zeros((1, 8, 8), np.uint8)


def write_one():
    """data/one: two images of one class."""
    with dataset.Writer("data/one", (1, 8, 8), {"train": 2, "test": 0}) as writer:
        writer.set(0, BLACK, 0)
        writer.set(1, BLACK, 0)
        writer.finish("one", ["0"])


def test_a_checksum_of_what_is_trained_on(folder):
    """Headers are of the same data where it is the same. One that has none is compared without."""
    write_one()
    header = header_json.load_header("data/one")
    content = b""
    for name in ("train_images", "train_labels"):
        with open(f"data/one/{name}.npy", "rb") as f:
            content += f.read()
    assert header["train_crc32"] == f"{zlib.crc32(content):08x}"

    with dataset.Writer("data/one", (1, 8, 8), {"train": 2, "test": 0}, overwrite=True) as writer:
        writer.set(0, BLACK, 0)
        writer.set(1, BLACK + 1, 0)
        writer.finish("one", ["0"])
    other = header_json.load_header("data/one")
    old = {key: value for key, value in header.items() if key != "train_crc32"}
    assert {**other, "train_crc32": header["train_crc32"]} == header
    assert header_json.same_data(header, dict(header))
    assert not header_json.same_data(header, other)
    for a, b in ((old, other), (header, old), (old, dict(old))):
        assert header_json.same_data(a, b)
        assert not header_json.same_data(a, dict(b, mean=[0]))


@pytest.mark.parametrize(
    "image, label, complaint",
    [
        (BLACK[0], 0, r"takes images uint8 \(1, 8, 8\), and image 1 is uint8 \(8, 8\)"),
        (BLACK[:, :1], 0, r"image 1 is uint8 \(1, 1, 8\)"),
        (BLACK / 255, 0, r"image 1 is float64 \(1, 8, 8\)"),
        (BLACK, 0.5, "label of image 1 is 0.5, no whole number"),
        (BLACK, 1, "train labels go from 0 to 1, and those of 1 classes from 0 to 0"),
        (BLACK, -1, "train labels go from -1 to 0"),
        (None, 0, "1 of 2 images were not set, such as image 1"),
    ],
)
def test_a_writer_refuses_what_is_no_dataset(folder, image, label, complaint):
    """And leaves nothing behind."""
    with (
        pytest.raises(dataset.DataError, match=complaint),
        dataset.Writer("data/one", (1, 8, 8), {"train": 2, "test": 0}) as writer,
    ):
        writer.set(0, BLACK, 0)
        if image is not None:
            writer.set(1, image, label)
        writer.finish("one", ["0"])
    assert os.listdir("data") == []


@pytest.mark.parametrize("given", [{}, dict(mean=[0.0]), dict(std=[1.0])])
def test_floats_need_their_mean_and_std(folder, given):
    """Those of uint8, 127.5, would make of floats near 0 a network's input of -1 everywhere."""
    with (
        pytest.raises(dataset.DataError, match="needs mean and std of float32 images"),
        dataset.Writer("data/one", (1, 8, 8), {"train": 1, "test": 0}, np.float32) as writer,
    ):
        writer.set(0, np.float32(BLACK), 0)
        writer.finish("one", ["0"], **given)
    assert os.listdir("data") == []


@pytest.mark.parametrize(
    "shape, count, dtype, complaint",
    [
        ((1, 8, 8), {"train": 2}, np.uint8, "count must be of train and test"),
        ((1, 8, 8), {"train": 2, "test": 0, "val": 1}, np.uint8, "count must be of train and test"),
        ((1, 8, 8), {"train": 2.5, "test": 0}, np.uint8, "its shape, count or dtype cannot be"),
        ((1, 8, 8), {"train": 2, "test": -1}, np.uint8, "count {.*} does not belong"),
        ((1, 8, 8), {"train": 2, "test": 0}, bool, "dtype 'bool' does not belong"),
        ((1, 8, 8), {"train": 2, "test": 0}, ">f4", "dtype '>f4' does not belong"),
        ((1, 8, 8), {"train": 2, "test": 0}, ",", "its shape, count or dtype cannot be"),
        ((5,), {"train": 2, "test": 0}, np.uint8, r"shape \[5\] does not belong"),
    ],
)
def test_a_writer_begins_nothing_that_cannot_be_read(folder, shape, count, dtype, complaint):
    with pytest.raises(dataset.DataError, match=f"data/one: {complaint}"):
        dataset.Writer("data/one", shape, count, dtype)
    assert not os.path.exists("data")


@pytest.mark.parametrize(
    "about, complaint",
    [
        (dict(std=[0]), r"header.json: std \[0\] does not belong"),
        (dict(mean=np.zeros(1)), "its header cannot be JSON"),
        (dict(vae="mine"), r"its header says uint8 \(2, 2, 8, 8\)"),
    ],
)
def test_a_dataset_is_not_replaced_by_one_that_cannot_be_read(folder, about, complaint):
    write_one()
    size, count = (1, 8, 8), {"train": 2, "test": 0}
    with (
        pytest.raises(dataset.DataError, match=complaint),
        dataset.Writer("data/one", size, count, overwrite=True) as writer,
    ):
        writer.set(0, BLACK, 0)
        writer.set(1, BLACK, 0)
        writer.finish("one", ["0"], **about)
    assert os.listdir("data") == ["one"]
    assert dataset.load_dataset("data/one")[0]["std"] == [127.5]


def test_a_writer_takes_whole_numbers_of_numpy(folder):
    size = np.array([1, 8, 8])
    count = dict(zip(("train", "test"), np.array([1, 0])))
    with dataset.Writer("data/one", size, count) as writer:
        writer.set(0, BLACK, np.int64(0))
        writer.finish("one", ["0"])
    header, _ = dataset.load_dataset("data/one")
    assert header["shape"] == [1, 8, 8] and header["count"] == {"train": 1, "test": 0}


def test_a_writer_has_no_other_images_than_its_own(folder):
    for i in (-1, 2):
        with (
            pytest.raises(dataset.DataError, match=f"data/one has 2 images, and no image {i}"),
            dataset.Writer("data/one", (1, 8, 8), {"train": 1, "test": 1}) as writer,
        ):
            writer.set(i, BLACK, 0)


def test_a_writer_must_be_finished(folder):
    with (
        pytest.raises(dataset.DataError, match="data/one was not made: .* without `finish`"),
        dataset.Writer("data/one", (1, 8, 8), {"train": 1, "test": 0}) as writer,
    ):
        writer.set(0, BLACK, 0)
    assert os.listdir("data") == []


@pytest.mark.parametrize(
    "key, value",
    [
        ("count", {"train": "2", "test": 0}),
        ("std", ["a"]),
        ("std", [0]),
        ("mean", None),
        ("mean", ["a"]),
        ("mean", [math.nan]),
        ("mean", [-math.inf]),
        ("shape", [0, 8, 8]),
        ("class_counts", ["x"]),
        ("class_counts", [-1]),
        ("shape", [8]),
        ("dtype", "object"),
        ("dtype", 3),
        ("dtype", ","),
        ("dtype", {}),
        ("dtype", None),
        ("dtype", ">f4"),
        ("kind", None),
        ("class_names", [3]),
        ("class_names", ["a", "b"]),
        ("skipped", "1"),
        ("num_classes", "1"),
        ("train_crc32", 3),
    ],
)
def test_headers_that_cannot_be(folder, key, value):
    write_one()
    with open("data/one/header.json") as f:
        header = json.load(f) | {key: value}
    with open("data/one/header.json", "w") as f:
        json.dump(header, f)
    with pytest.raises(dataset.DataError, match=f"header.json: {key} "):
        dataset.load_dataset("data/one")


@pytest.mark.parametrize("name", ["train_images", "train_labels"])
def test_arrays_of_another_format(folder, name):
    write_one()
    file = f"data/one/{name}.npy"
    with open(file, "wb") as f:
        np.savez(f, a=np.zeros(3))
    with pytest.raises(dataset.DataError, match=f"cannot read {file}: it is an .npz file"):
        dataset.load_dataset("data/one")
    os.truncate(file, 100)
    with pytest.raises(dataset.DataError, match=f"cannot read {file}: "):
        dataset.load_dataset("data/one")


@pytest.mark.parametrize("key", ["format", *header_json.CHECKS])
def test_headers_without_a_key(folder, key):
    write_one()
    with open("data/one/header.json") as f:
        header = json.load(f)
    del header[key]
    with open("data/one/header.json", "w") as f:
        json.dump(header, f)
    with pytest.raises(dataset.DataError, match="is not a tvm-data-1 header"):
        dataset.load_dataset("data/one")


def test_headers_with_no_more_than_they_must_have(folder):
    write_one()
    with open("data/one/header.json") as f:
        header = json.load(f)
    header = {key: header[key] for key in ("format", *header_json.CHECKS)}
    with open("data/one/header.json", "w") as f:
        json.dump(header, f)
    assert dataset.load_dataset("data/one")[0] == header
    said = header_json.describe("data/one", header)
    assert said == "data/one: 2 training and 0 held-out images, 1x8x8, 1 class: 0"
