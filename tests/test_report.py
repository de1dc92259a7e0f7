"""report.py: the log, the pictures, FID and the scores of a run, none of which may end it."""

import glob
import math
import os
import shutil
import subprocess
import sys
import types

import matplotlib.axes
import numpy as np
import pytest
import torch
from helpers import (
    HERE,
    SMALL,
    SMALL_FID,
    log_lines,
    logged_losses,
    run_script,
    seeded_inception,
    write_dataset,
)
from PIL import Image

import checkpoint as ckpt
import fid
import report
import scores
from loss import IN_THE_LOG, Term

PLAIN = ("--w=1", "--patch_size=2", "--sample_every=1")


def train(*arguments):
    return run_script("train.py", *SMALL, *arguments)


def warnings(capsys):
    """What train.py has said to go on without."""
    errors = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [line for line in errors if "could not write" in line]


# ---- pictures and scores -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "channels, mode, classifier", [(2, "L", "1-nn"), (4, "RGB", "1-nn"), (5, "RGB", "cnn")]
)
def test_any_number_of_channels(folder, capsys, channels, mode, classifier):
    """A picture shows the first three channels or the first; all of them are scored."""
    write_dataset("odd", (channels, 8, 8))
    flags = ("--dataset=odd", "--steps=2", f"--classifier={classifier}", *PLAIN)
    assert train(*flags) is None
    assert not warnings(capsys)
    for step in (1, 2):
        assert Image.open(f"out/odd/samples_{step}.png").mode == mode
    assert [line["nfe"] for line in log_lines("odd") if "nfe" in line] == ["real", 1, 2, 4]


def test_images_that_are_not_square(folder, capsys):
    """They are trained on, drawn and scored, and a run with them goes on as if it had not ended."""
    write_dataset("wide", (1, 4, 8))
    flags = ("--dataset=wide", *PLAIN)
    assert train("--steps=1", *flags) is None
    assert train("--steps=2", *flags) is None
    assert "from step 1" in capsys.readouterr().out
    assert train("--steps=2", "--name=whole", *flags) is None
    one, other = (ckpt.load_newest(f"out/{name}") for name in ("wide", "whole"))
    assert all(torch.equal(one[1][key], value) for key, value in other[1].items())
    picture = Image.open("out/wide/samples_2.png")
    # Three rows and ten columns of images that are twice as wide as high, with gaps of 2 pixels.
    assert (picture.width - 18) / 10 == 2 * (picture.height - 4) / 3
    source = "--init_from=out/wide/ckpt.safetensors"
    assert train("--steps=1", "--name=from", source, *flags) is None


@pytest.mark.parametrize(
    "counts, columns",
    [
        ([], [0] * 10),
        ([5, 4, 9], [0, 1, 2] * 3 + [0]),
        ([5, 0, 4, 9], [0, 2, 3] * 3 + [0]),
    ],
    ids=len,
)
def test_columns_of_a_picture(folder, counts, columns):
    """Ten, of the classes in turn that have images, also where there are fewer."""
    asked = []

    def images_of(network, indices, nfe, classes):
        asked.append((network, list(indices), nfe, classes))
        return np.zeros((len(indices), 8, 8, 1), np.uint8), None

    header = dict(class_counts=counts, shape=[1, 8, 8], dtype="uint8")
    self = types.SimpleNamespace(
        header=header, images_of=images_of, picture_path=lambda step: "x.png"
    )
    report.Report.draw_samples(self, "network", 3)
    assert asked == [("network", list(range(10)), nfe, columns) for nfe in (1, 2, 4)]
    assert Image.open("x.png").size == (10 * 80 + 9 * 2, 3 * 80 + 2 * 2)


@pytest.mark.parametrize(
    "shape, dtype, these",
    [
        ([1, 64], "uint8", r"uint8 \(1, 64\)"),
        ([3, 4, 8, 8], "uint8", r"uint8 \(3, 4, 8, 8\)"),
        ([1, 8, 8], "float32", r"float32 \(1, 8, 8\)"),
    ],
)
def test_data_that_are_no_pictures(shape, dtype, these):
    self = types.SimpleNamespace(header=dict(num_classes=0, shape=shape, dtype=dtype))
    with pytest.raises(ValueError, match=f"pictures are of uint8 .*, and these data are {these}"):
        report.Report.draw_samples(self, "network", 3)


def test_a_whole_network_is_handed_on(monkeypatch):
    """The report keeps the network that it has, which may be divided over the ranks."""
    monkeypatch.setattr(report, "whole_network", lambda network: "whole " + network)
    self = types.SimpleNamespace(network="network")
    assert report.Report.gather_network(self, "the scores") == "whole network"
    assert self.network == "network"


def test_no_scores(folder, capsys):
    """None are wanted, which needs no word; or there are too few images, and that is said."""
    assert train("--steps=1", "--score_images=0", "--name=none") is None
    assert "no scores" not in capsys.readouterr().out
    assert not [line for line in log_lines("none") if "nfe" in line]
    assert train("--steps=1", "--score_images=1", "--name=one") is None
    assert (
        "no scores, which take two images at least: there are 360 held-out and 1437 training "
        "images, and score_images is 1\n"
    ) in capsys.readouterr().out


def test_scores_that_say_nothing(capsys):
    """They are "-" in the table, in their columns, and null in the log."""
    logged = []
    self = types.SimpleNamespace(log=lambda **line: logged.append(line))
    found = dict(two_sample=0.5, of_samples=0.0, of_held_out=1.0, nearest_ratio=1.0)
    found.update(label=math.nan, frechet_pixels=math.nan)
    report.Report.tell_scores(self, 7, "real", 20, found)
    report.Report.tell_scores(self, 7, 4, 20, dict(found, label=0.25, frechet_pixels=1.5))
    assert capsys.readouterr().out.splitlines() == [
        " real     0.500 (0.00 1.00)       -     1.00        -",
        "    4     0.500 (0.00 1.00)   0.250     1.00    1.500",
    ]
    assert (logged[0]["label"], logged[0]["frechet_pixels"]) == (None, None)
    assert (logged[1]["label"], logged[1]["two_sample"]) == (0.25, 0.5)


class Broken(ValueError):
    """An error of a library."""


def broken(*arguments, **options):
    raise Broken("it is\nbroken")


def full(*arguments, **options):
    raise OSError("no room")


def test_a_picture_that_fails_is_said_once(folder, capsys, monkeypatch):
    monkeypatch.setattr("report.grid", broken)
    assert train("--steps=3", *PLAIN) is None
    (warning,) = warnings(capsys)
    assert warning == (
        "train.py: could not write samples_1.png, and go on without it: Broken: it is broken"
    )
    assert len(logged_losses("digits")) == 3
    assert ckpt.load_tensors("out/digits/ckpt.safetensors")[1]["step"] == 3
    assert not glob.glob("out/digits/*.p[na]*g")[1:]  # only curve.png
    assert train("--steps=4", *PLAIN) is None  # and not at each restart


def test_scores_that_fail(folder, capsys, monkeypatch):
    monkeypatch.setattr("report.small_data_scores", broken)
    monkeypatch.setattr("report.Report.draw_curve", broken)
    assert train("--steps=1") is None
    assert [line.split(",")[0] for line in warnings(capsys)] == [
        "train.py: could not write the scores",
        "train.py: could not write curve.png",
    ]
    assert os.path.exists("out/digits/ckpt.safetensors")


def test_a_full_disk_is_said_each_time(folder, capsys, monkeypatch):
    """It may have had room in between."""
    monkeypatch.setattr("report.grid", full)
    assert train("--steps=2", *PLAIN) is None
    assert [line.split(",")[0] for line in warnings(capsys)] == [
        "train.py: could not write samples_1.png",
        "train.py: could not write samples_2.png",
    ]


def test_full_disk(folder, capsys):
    """Warnings and a run that goes on; at its end an error, and the state before it."""
    resource = pytest.importorskip("resource")
    assert train("--steps=1") is None
    with open("out/digits/state_1.safetensors", "rb") as f:
        before = f.read()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        complaint = train("--steps=4", "--save_every=2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert complaint == (
        "train.py: could not save the state of step 4; "
        "the last state is out/digits/state_1.safetensors"
    )
    said = warnings(capsys)
    for step in (2, 4):
        (warning,) = [line for line in said if f"write state_{step}.safetensors" in line]
        assert "File too large" in warning
    with open("out/digits/state_1.safetensors", "rb") as f:
        assert f.read() == before
    assert not glob.glob("out/digits/*.tvm-partial")
    assert train("--steps=4") is None
    assert list(ckpt.states("out/digits")) == [1, 4]


def test_what_of_a_save_has_failed(folder, capsys, monkeypatch):
    """The last line tells: the state, or the network for sample.py. Where the state has failed the
    network is not saved either, so that the same command can go on."""
    assert train("--name=a", "--steps=1") is None
    os.remove("out/a/ckpt.safetensors")
    os.makedirs("out/a/ckpt.safetensors")
    assert train("--name=a", "--steps=2") == (
        "train.py: could not save ckpt.safetensors of step 2; "
        "the last state is out/a/state_2.safetensors"
    )
    assert [line for line in warnings(capsys) if "write state" in line] == []
    os.rmdir("out/a/ckpt.safetensors")
    assert train("--name=a", "--steps=2") is None
    assert ckpt.load_tensors("out/a/ckpt.safetensors")[1]["step"] == 2

    assert train("--name=b", "--steps=2") is None
    with monkeypatch.context() as patch:
        patch.setattr("checkpoint.save_state", full)
        assert train("--name=b", "--steps=4") == (
            "train.py: could not save the state of step 4; "
            "the last state is out/b/state_2.safetensors"
        )
        assert ckpt.load_tensors("out/b/ckpt.safetensors")[1]["step"] == 2
        complaint = train("--name=c", "--steps=2")
        assert "could not save the state of step 2; no state was saved yet" in complaint
    assert train("--name=c", "--steps=2") is None


def test_small_things_of_a_run(folder, monkeypatch):
    """A range of weights is sampled at its geometric mean, and real images leave themselves out."""
    asked = []

    def spied_sample(net, x1, y, w, *rest):
        asked.append(w)
        return sample(net, x1, y, w, *rest)

    sample = report.sample
    monkeypatch.setattr(report, "sample", spied_sample)
    assert train("--steps=1", "--guidance=inverse", "--w_max=4") is None
    assert asked
    assert all((w == 2).all() for w in asked)
    (line,) = [line for line in log_lines("digits") if line.get("nfe") == "real"]
    assert 0.5 < line["nearest_ratio"] < 2


def test_what_a_stop_has_cost(folder, monkeypatch):
    """An evaluation network that was not saved with the last state is written by the next run. The
    curve does not run backwards."""
    drawn = []
    plot = matplotlib.axes.Axes.plot

    def spied_plot(axes, x, y, **how):
        drawn.append(x)
        return plot(axes, x, y, **how)

    assert train("--steps=1") is None
    os.replace("out/digits/ckpt.safetensors", "was.safetensors")
    with open("out/digits/log.jsonl", "a") as f:
        f.write('{"step": 0, "loss": 2, "fm": 1, "terminal": 1}\n')
    monkeypatch.setattr("matplotlib.axes.Axes.plot", spied_plot)
    assert train("--steps=1") is None
    assert drawn == [[0, 1]] * 2
    again, about = ckpt.load_tensors("out/digits/ckpt.safetensors")
    before, _ = ckpt.load_tensors("was.safetensors")
    assert about["step"] == 1
    assert all((again[key] == t).all() for key, t in before.items())


FOREIGN = (b"5", b"null", b"[]", b'{"loss": 1}', b'{"step": 1, "loss": "x"}', b"\xff", b"[" * 10**5)


def test_a_curve_of_a_log_with_foreign_lines(folder, capsys):
    """They are passed over. A name may be what matplotlib would take for mathematics."""
    flags = ("--name=q$1_$", "--score_images=0")
    assert train("--steps=1", *flags) is None
    with open("out/q$1_$/log.jsonl", "ab") as f:
        f.writelines(line + b"\n" for line in FOREIGN)
    os.remove("out/q$1_$/curve.png")
    assert train("--steps=2", *flags) is None
    assert not warnings(capsys)
    assert Image.open("out/q$1_$/curve.png").size[0] > 300
    self = types.SimpleNamespace(out="out/q$1_$")
    assert list(report.Report.logged_losses(self)) == [1, 2]


def test_in_a_notebook_of_another_environment(folder):
    """Its backend of matplotlib, which is not known here, keeps nothing from being drawn."""
    command = [sys.executable, os.path.join(HERE, "train.py"), *SMALL]
    environment = {**os.environ, "MPLBACKEND": "unknown", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--steps=1"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not write" not in done.stderr
    assert Image.open("out/digits/curve.png").size[0] > 300


# ---- the log -------------------------------------------------------------------------------------


def term(name, error, time):
    error = torch.tensor(error)
    return Term(name, 2 * error, error, torch.tensor(time))


def test_losses_by_quarters():
    """Micro-batches add up. A step that was skipped leaves nothing."""
    losses = report.Losses(torch.device("cpu"))
    batches = types.SimpleNamespace(waited=3.0)
    losses.begin_step()
    losses.add({"a": term("a", [9.0], [0.5])})  # is skipped
    losses.begin_step()
    losses.add({"a": term("a", [1.0, 2.0], [0.0, 1.0]), "b": term("b", [4.0, 4.0], [0.3, 0.3])})
    losses.add({"a": term("a", [5.0, 2.0], [0.1, 0.8]), "b": term("b", [8.0, 8.0], [0.3, 0.7])})
    assert losses.step_total() == 34
    losses.end_step(0.5)

    logged = []
    self = types.SimpleNamespace(
        device=torch.device("cpu"), ranks=1, log=lambda **x: logged.append(x)
    )
    shown = report.Report.log_losses(self, 7, losses, batches, skipped=1)
    (line,) = logged
    assert (line["step"], line["a"], line["b"], line["loss"]) == (7, 2.5, 6.0, 8.5)
    assert line["a_by_time"] == [3.0, None, None, 2.0]
    assert line["b_by_time"] == [None, 16 / 3, 8.0, None]
    assert (line["grad_norm"], line["skipped"]) == (0.5, 1)
    others = {key for key in line if key not in ("a", "b") and not key.endswith("_by_time")}
    assert others == set(IN_THE_LOG) - {"peak_gb"}  # that is for GPUs
    assert shown.startswith("a 2.5000 b 6.0000")
    assert shown.endswith(", 1 skipped")
    assert batches.waited == 0

    # Where every step was skipped only that is logged. The time of these steps is forgotten.
    batches.waited = 3.0
    losses.since = 0.0
    assert report.Report.log_losses(self, 8, losses, batches, skipped=2) == "2 skipped"
    assert logged[1:] == [dict(step=8, skipped=2)]
    assert batches.waited == 0
    assert losses.since > 0


def test_a_line_after_a_crash(folder):
    """A line that was cut off stays on its own. Numbers that JSON does not have are refused."""
    self = types.SimpleNamespace(out=".")
    for before, between in (("", ""), ('{"step": 1}\n', ""), ('{"step": 1}\n{"st', "\n")):
        with open("log.jsonl", "w") as f:
            f.write(before)
        report.Report.append(self, {"step": 2})
        with open("log.jsonl") as f:
            assert f.read() == before + between + '{"step": 2}\n'
    with pytest.raises(ValueError, match="JSON"):
        report.Report.append(self, {"step": math.nan})


def git(*arguments):
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", *author, *arguments], check=True, capture_output=True)


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_the_commit_is_of_these_files(folder, monkeypatch):
    """Not of another project, in whose folder they lie or whose hook calls them."""
    for name in ("ours", "theirs"):
        git("init", name)
        git("-C", name, "commit", "--allow-empty", "-m", name)
    monkeypatch.setattr(report, "HERE", str(folder / "ours"))
    (folder / "ours" / "train.py").write_text("")
    assert report.git_commit() == "unknown"
    git("-C", "ours", "add", "train.py")
    git("-C", "ours", "commit", "-m", "train.py")
    commit = report.git_commit()
    assert len(commit) == 12
    monkeypatch.setenv("GIT_DIR", str(folder / "theirs" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(folder / "theirs"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(folder / "theirs" / ".git" / "index"))
    assert report.git_commit() == commit
    (folder / "ours" / "train.py").write_text("edited")
    assert report.git_commit() == f"{commit}-edited"


# ---- FID -----------------------------------------------------------------------------------------


class Inception:
    """Two features: the mean of an image's first channel, and its square."""

    fc = torch.nn.Linear(2, 1)
    digest = "0123456789"

    def __call__(self, images, resize="tf1"):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 8, 8)
        mean = images[:, 0].double().mean((1, 2))
        return mean[:, None] ** torch.arange(1, 3)


@pytest.fixture
def small_inception(monkeypatch, folder):
    inception = Inception()

    def load_inception(path=None, device="cpu"):
        return inception

    monkeypatch.setattr(fid, "load_inception", load_inception)
    monkeypatch.setattr(fid, "FEATURES", 2)
    np.savez("ref.npz", mu=np.zeros(2), sigma=np.eye(2))
    return inception


def test_train_logs_fid(small_inception, capsys):
    """With a stand-in for Inception: the number is that of the same samples by sample.py.

    A reference of images of another size is remarked on.
    """
    other = "resize torch, weights 01234567"
    np.savez("other.npz", mu=np.zeros(2), sigma=np.eye(2), notes=other)
    np.savez("wide.npz", mu=np.zeros(3), sigma=np.eye(3))
    for name, words in (
        ("gone.npz", "gone.npz"),
        ("other.npz", "does not compare"),
        ("wide.npz", "3 dimensions"),
    ):
        assert words in train(f"--fid_reference={name}")
    notes = f"{fid.made_with(small_inception)}, images 64x48"
    np.savez("ref.npz", mu=np.zeros(2), sigma=np.eye(2), notes=notes)
    flags = ("--steps=2", "--sample_every=2", "--fid_reference=ref.npz", "--fid_images=30")
    assert train(*flags) is None
    assert "its images are 64x48 and the samples 8x8" in capsys.readouterr().err
    (line,) = [line for line in log_lines("digits") if "fid" in line]
    command = ("sample.py", "out/digits/ckpt.safetensors", "--n", 30, "--out", "a.npz")
    assert run_script(*command) is None
    with np.load("a.npz") as f:
        images = torch.from_numpy(f["arr_0"].transpose(0, 3, 1, 2)).expand(-1, 3, -1, -1)
    moments = scores.moments(small_inception(images))
    want = fid.frechet_distance(*moments, np.zeros(2), np.eye(2))
    assert line["step"] == 2
    assert line["images"] == 30
    assert abs(line["fid"] / want - 1) < 1e-4


def test_fid_that_fails(small_inception, capsys, monkeypatch):
    """It is said once, and training goes on; a number of channels that it does not take is said
    before training."""
    flags = ("--fid_reference=ref.npz", "--fid_images=30", *PLAIN)
    monkeypatch.setattr(fid, "frechet_distance", broken)
    assert train("--steps=2", *flags) is None
    monkeypatch.setattr(Inception, "__call__", broken)
    assert train("--steps=2", "--name=b", *flags) is None
    assert [line.split(",")[0] for line in warnings(capsys)] == [
        "train.py: could not write the FID of step 1",
        "train.py: could not write the FID of step 1",
    ]
    assert len(logged_losses("digits")) == len(logged_losses("b")) == 2
    write_dataset("odd", (2, 8, 8))
    assert "1 or 3 channels, not 2" in train("--dataset=odd", "--steps=1", *flags)


def test_fid_of_all_ranks(folder, monkeypatch, two_ranks):
    torch.save(seeded_inception().state_dict(), "w.pth")
    np.savez("ref.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with open(os.path.join(HERE, "train.py")) as f:
        script = f.read()
    with open("train.py", "w") as f:
        f.write(SMALL_FID + script)
    mine = str(folder / "train.py")
    flags = (*SMALL, "--steps=1", "--fid_reference=ref.npz", "--fid_images=30", "--inception=w.pth")
    environment = {**os.environ, "PYTHONPATH": HERE}
    command = [sys.executable, mine, *flags, "--name=one"]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert two_ranks(mine, *flags, "--name=two") == [0, 0]
    (one,) = [line["fid"] for line in log_lines("one") if "fid" in line]
    (two,) = [line["fid"] for line in log_lines("two") if "fid" in line]
    assert abs(one / two - 1) < 1e-4
