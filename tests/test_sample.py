"""sample.py: the sampler, the command, its files. pictures.py and parts.py with it."""

import glob
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import (
    F64,
    HERE,
    GaussianFlow,
    close,
    full_disk,
    images_in,
    make_checkpoint,
    randn,
    random_inputs,
    random_model,
    run_script,
    tiny_vae,
    torchrun,
    until,
)
from PIL import Image
from safetensors.torch import save_file

import checkpoint as ckpt
import dataset
import fid
import files
import model as m
import parts
import pictures
import sample as s
import scores

RANGE_OF_WEIGHTS = dict(sampler="inverse", w=1.0, w_min=1.0, w_max=2.0)


def run(*arguments):
    """sample.py in this process: its one line of complaint, or None."""
    return run_script("sample.py", *arguments)


def change_data(path, **changes):
    """Change the data's header in a checkpoint."""
    tensors, about = ckpt.load_tensors(path)
    about["data"].update(changes)
    ckpt.save_tensors(path, tensors, about)


def equal_to_a_level(a, b):
    """Whether two arrays of images are the same but for rounding."""
    return np.abs(a.astype(int) - b).max() <= 1


def break_pictures(patch):
    """Let a run end at its last moment, when it makes its picture."""
    patch.setattr(Image, "fromarray", None)


def break_network(patch):
    """Let the test fail where the network is called."""
    patch.setattr(m.DiT, "forward", None)


# ---- the sampler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
def test_sampler_against_a_hand_loop(scaled):
    net = random_model(scaled=scaled)
    x1, _, _, _, y, w = random_inputs()
    k = w.view(3, 1, 1, 1) if scaled else 1
    x = x1
    for t, t_next in ((1, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0)):
        F = net(x, torch.full((3,), t, dtype=F64), torch.full((3,), t_next, dtype=F64), y, w)
        x = x + (t_next - t) * k * F
    close(s.sample(net, x1, y, w, 4), x, 1e-13)
    with pytest.raises(ValueError, match="nfe"):
        s.sample(net, x1, y, w, 0)


def test_exact_flow_samples_in_one_step():
    flow = GaussianFlow(0.3, 0.5, False)
    flow.parameters = lambda: iter([torch.zeros((), dtype=F64)])
    x1 = randn(5, 1, 2, 2)
    y = torch.zeros(5, dtype=torch.long)
    w = torch.ones(5, dtype=F64)
    for nfe in (1, 3):
        close(s.sample(flow, x1, y, w, nfe), 0.3 + 0.5 * x1, 1e-13)


def test_draws_depend_on_seed_and_index_alone():
    noise, labels = s.noise_and_labels(3, range(10), (1, 2, 2), [1, 0, 3])
    part, part_labels = s.noise_and_labels(3, [7, 4], (1, 2, 2), [1, 0, 3])
    assert (noise[[7, 4]] == part).all()
    assert (labels[[7, 4]] == part_labels).all()
    assert (s.noise_and_labels(3, range(10), (0,), [1, 0, 3])[1] == labels).all()

    noise, labels = s.noise_and_labels(0, range(4000), (5,), [1, 0, 3])
    assert scipy.stats.kstest(noise.flatten(), "norm").pvalue > 1e-3
    assert abs((labels == 2).double().mean() - 0.75) < 4 * math.sqrt(0.19 / 4000)
    assert not (labels == 1).any()
    assert not s.noise_and_labels(0, range(5), (1,))[1].any()


# ---- what it makes -------------------------------------------------------------------------------


def test_checkpoint_round_trip(folder):
    net = make_checkpoint("c.safetensors")
    loaded, _ = m.load_model("c.safetensors")
    assert loaded.config == net.config
    for a, b in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True):
        assert (a == b).all()
    assert os.listdir() == ["c.safetensors"]


def test_sample_outputs(folder):
    make_checkpoint("c.safetensors")
    seven = ("c.safetensors", "--n", 7, "--seed", 4, "--out")
    assert run(*seven, "a.npz") is None
    a = images_in("a.npz")
    assert a.shape == (7, 8, 8, 1)
    assert a.dtype == np.uint8
    assert a.std() > 0
    assert run(*seven, "b.npz", "--batch", 3) is None
    assert equal_to_a_level(a, images_in("b.npz"))

    assert run(*seven, "pngs/") is None
    assert sorted(os.listdir("pngs")) == [*(f"00000{i}.png" for i in range(7)), "dataset.json"]
    assert (np.asarray(Image.open("pngs/000003.png")) == a[3, ..., 0]).all()

    assert run("c.safetensors", "--classes", "3,5", "--nfe", 2) is None
    assert Image.open("samples.png").size[0] >= 700


def test_labels_lie_beside_samples(folder):
    """As arr_1 in an .npz, where ADM has them; beside PNGs in EDM's dataset.json."""
    make_checkpoint("c.safetensors")
    counts = [1, 0, 0, 3, 0, 0, 0, 0, 0, 1]
    change_data("c.safetensors", class_counts=counts)
    assert run("c.safetensors", "--out", "grid.npz") is None
    with np.load("grid.npz", allow_pickle=False) as f:  # of classes that have images
        assert set(f["arr_1"].tolist()) == {0, 3, 9}
    assert run("c.safetensors", "--n", 9, "--batch", 4, "--out", "a.npz") is None
    drawn = s.noise_and_labels(0, range(9), (1, 8, 8), counts)[1].numpy()
    with np.load("a.npz", allow_pickle=False) as f:
        assert f.files == ["arr_0", "arr_1"]
        assert f["arr_1"].dtype == np.int64
        assert (f["arr_1"] == drawn).all()

    assert run("c.safetensors", "--n", 5, "--classes", "3,5", "--out", "turns.npz") is None
    with np.load("turns.npz", allow_pickle=False) as f:
        assert f["arr_1"].tolist() == [3, 5, 3, 5, 3]
    assert run("c.safetensors", "--n", 2, "--classes", "3,5", "--out", "pngs") is None
    with open("pngs/dataset.json") as f:
        assert json.load(f) == {"labels": [["000000.png", 3], ["000001.png", 5]]}

    make_checkpoint("u.safetensors", num_classes=0)
    assert run("u.safetensors", "--n", 3, "--out", "u.npz") is None
    with np.load("u.npz", allow_pickle=False) as f:
        assert f.files == ["arr_0"]
    assert run("u.safetensors", "--n", 3, "--out", "u") is None
    assert len(os.listdir("u")) == 3


def test_classes_by_name(folder, capsys):
    """A name may have commas, or be another class's number; what is drawn is told."""
    make_checkpoint("c.safetensors")
    names = ["1", "10", "2", "cat", "sea lion, eared", "x", "y", "z", "7", "9"]
    change_data("c.safetensors", class_names=names)
    for text, classes in (
        ("1", [0]),  # the class that is named so
        ("10", [1]),
        ("9", [9]),
        ("8", [8]),  # a number that is no name
        ("cat,3", [3, 3]),
        ("x, sea lion, eared,1", [5, 4, 0]),
    ):
        capsys.readouterr()
        out = f"{text}.npz"
        assert run("c.safetensors", "--n", 6, "--classes", text, "--out", out) is None
        with np.load(out, allow_pickle=False) as f:
            assert f["arr_1"].tolist() == (6 * classes)[:6]
        said = capsys.readouterr().out
        for c in classes:
            assert f"{c} {names[c]!r}" in said or names[c] == str(c) and names[c] in said
    assert "did you mean" not in run("c.safetensors", "--classes", "11")
    complaint = run("c.safetensors", "--classes", "cta")
    assert "'cta' is not a class" in complaint and "'cat'" in complaint


def test_classes_in_a_locale_without_utf_8():
    """Python then reads each byte of a name as a letter of its own."""
    as_ascii = "猫,1".encode().decode("ascii", errors="surrogateescape")
    assert s.find_classes(as_ascii, ["dog", "x", "猫"], 3) == [2, 1]
    assert s.find_classes("猫", ["dog", "x", "猫"], 3) == [2]


def test_images_that_are_not_square(folder):
    make_checkpoint("c.safetensors", input_size=(8, 12), in_channels=3)
    assert run("c.safetensors", "--n", 2, "--out", "a.npz") is None
    assert images_in("a.npz").shape == (2, 8, 12, 3)
    assert run("c.safetensors", "--n", 2, "--out", "pngs") is None
    assert Image.open("pngs/000000.png").size == (12, 8)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_images_of_other_channels(folder, monkeypatch, channels):
    """An .npz has them all. A PNG would drop some: that is refused before any work."""
    make_checkpoint("c.safetensors", in_channels=channels)
    assert run("c.safetensors", "--n", 2, "--out", "a.npz") is None
    assert images_in("a.npz").shape == (2, 8, 8, channels)
    break_network(monkeypatch)
    for arguments in ((), ("--out", "grid.png"), ("--n", 2, "--out", "pngs")):
        complaint = run("c.safetensors", *arguments)
        assert f"this model makes {channels} channels" in complaint
        assert "--out samples.npz" in complaint
    complaint = run("c.safetensors", "--fid", "ref.npz", "--inception", "gone.pth")
    assert f"1 or 3 channels, not {channels}" in complaint
    assert sorted(os.listdir()) == ["a.npz", "c.safetensors"]


def test_images_of_floats(folder, monkeypatch):
    """Of data that are floats: an .npz has them as float32, and nothing else takes them."""
    make_checkpoint("c.safetensors")
    change_data("c.safetensors", dtype="float32", mean=[0.25], std=[0.5])
    assert run("c.safetensors", "--n", 2, "--out", "a.npz") is None
    images = images_in("a.npz")
    assert images.shape == (2, 8, 8, 1)
    assert images.dtype == np.float32
    assert (images != images.round()).any()
    break_network(monkeypatch)
    for arguments in ((), ("--n", 2, "--out", "pngs"), ("--fid", "ref.npz")):
        assert "floats" in run("c.safetensors", *arguments)
    assert sorted(os.listdir()) == ["a.npz", "c.safetensors"]


def test_what_is_unlike_pictures():
    pixels = dict(dtype="uint8")
    assert pictures.unlike_pictures(pixels, [3, 8, 8]) is None
    assert pictures.unlike_pictures({}, [1, 8, 8]) is None
    assert pictures.unlike_pictures(dict(vae="name", dtype="float16"), [4, 8, 8]) is None
    assert pictures.unlike_pictures(pixels, [4, 8, 8]) == "4 channels"
    assert pictures.unlike_pictures(dict(dtype="float32"), [1, 8, 8]) == "floats"
    assert pictures.unlike_pictures(pixels, [1, 64]) == "arrays of shape (1, 64)"


def test_grid():
    values = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    images = values * np.ones((1, 4, 4, 1), np.uint8)
    sheet = np.asarray(pictures.grid(images, 3, width=1))
    assert sheet.shape == (4 * 2 + 2, 4 * 3 + 2 * 2)
    assert sheet[0, 6] == 1
    assert sheet[6, 6] == 4
    assert sheet[6, 12] == 255


@pytest.mark.parametrize("classes, columns", [([3], 10), ([3, 5], 10), ([0, 1, 2], 9), ([], 10)])
def test_grids_of_few_classes(classes, columns):
    """No thin strip, and each column shows one class."""
    plan = s.Plan(80, 1, 1.0, 0, [1], [1] * 10, classes or None, False, 80, False)
    assert plan.columns() == columns
    if classes:
        assert columns % len(classes) == 0
    assert s.Plan(**{**vars(plan), "classes": list(range(40))}).columns() == 32


@pytest.mark.parametrize("channels, shown", [(2, 1), (4, 3), (5, 3)])
def test_grid_of_other_channels(channels, shown):
    """The pictures of train.py show the first channel, or the first three."""
    images = np.random.default_rng(0).integers(256, size=(2, 8, 8, channels), dtype=np.uint8)
    sheet = np.asarray(pictures.grid(images, 1, width=1)).reshape(18, 8, shown)
    assert (sheet[10:] == images[1, ..., :shown]).all()


def test_to_images():
    x = torch.tensor([-9, 0.4, 0.6, 300.0]).view(1, 1, 2, 2).expand(1, 2, 2, 2)
    images = pictures.to_images(x, dict(mean=[0.0, 1.0], std=[1.0, 2.0]))
    assert images.tolist() == [[[[0, 0], [0, 2]], [[1, 2], [255, 255]]]]


def test_rgb():
    gray = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    assert pictures.rgb(gray)[0, 1, 0].tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="channels, not 4"):
        pictures.rgb(np.zeros((1, 2, 2, 4), np.uint8))


def test_the_shipped_checkpoint(folder):
    """Small, whole, and in one step as good as the README says: the class asked for, no copies."""
    path = os.path.join(HERE, "assets", "digits.safetensors")
    assert os.path.getsize(path) < 1_500_000
    assert run_script("prepare.py", "digits") is None
    assert run(path, "--n", 300, "--out", "a.npz") is None
    _, data = dataset.load_dataset("data/digits")
    _, about = m.load_model(path)
    images = images_in("a.npz").transpose(0, 3, 1, 2)
    _, y = s.noise_and_labels(0, range(300), (1, 8, 8), about["data"]["class_counts"])
    train, test = data["train_images"], data["test_images"]
    assert scores.label_accuracy(images, y, train, data["train_labels"]) >= 0.93
    assert scores.nearest_ratio(images, test, train) >= 0.9
    assert np.mean(scores.two_sample_accuracies(images, test[:300])) <= 0.72


def test_a_state_of_a_run(folder):
    """Its evaluation network is sampled, as it is from ckpt.safetensors."""
    trained = random_model(torch.float32, 1, in_channels=1, input_size=8, num_classes=10)
    make_checkpoint("ckpt.safetensors")
    tensors, about = ckpt.load_tensors("ckpt.safetensors")
    state = {f"eval.{name}": t for name, t in tensors.items()}
    for kind in ("model", "target"):
        state.update({f"{kind}.{name}": t for name, t in trained.state_dict().items()})
    ckpt.save_state(".", 7, state, about, keep=1)
    assert run("ckpt.safetensors", "--n", 3, "--out", "a.npz") is None
    assert run("state_7.safetensors", "--n", 3, "--out", "b.npz") is None
    assert (images_in("a.npz") == images_in("b.npz")).all()


# ---- batches, ranks, kills -----------------------------------------------------------------------


def test_sampling_on_two_ranks(folder):
    make_checkpoint("c.safetensors")
    seven = ("c.safetensors", "--n", 7, "--batch", 2, "--out")
    assert run(*seven, "one.npz") is None
    torchrun("sample.py", *seven, "two.npz")
    one, two = images_in("one.npz"), images_in("two.npz")
    assert one.shape == two.shape
    assert equal_to_a_level(one, two)


def test_another_number_of_ranks_goes_on(folder, capsys):
    """Batches are the same on any number of ranks, if there are fewer images than a --batch too."""
    make_checkpoint("c.safetensors")
    seven = ("c.safetensors", "--n", 7, "--out", "a.npz")
    os.mkdir("a.npz" + files.PARTIAL)  # where the file would be written: it ends at its last moment
    with pytest.raises(subprocess.CalledProcessError):
        torchrun("sample.py", *seven)
    os.rmdir("a.npz" + files.PARTIAL)
    capsys.readouterr()
    assert run(*seven) is None
    said = capsys.readouterr()
    assert "going on from 1 of 1 batches" in said.err
    assert "a.npz: 7 images in 1 step at w = 1, all from an earlier run" in said.out


@pytest.fixture
def one_thread():
    """In this process, as in those of torchrun: sums then have the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="kills a process by what Linux says of it")
def test_sampling_goes_on_after_a_kill(folder, capsys, one_thread):
    """Rank 0 of two is killed: all end and no file appears. One process then goes on from there.

    It ends with the images of a run that nobody disturbed.
    """
    make_checkpoint("c.safetensors")
    arguments = ["c.safetensors", "--n", 1500, "--batch", 5]
    assert run(*arguments, "--out", "whole.npz") is None

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--", os.path.join(HERE, "sample.py"), *map(str, arguments), "--out", "a.npz"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open("said", "w") as f:
        ranks = subprocess.Popen(command, stdout=f, stderr=f, env=environment)
    try:
        until(lambda: len(glob.glob("a.npz.parts/*.npy")) > 20, "twenty batches")
        with open("a.npz.parts/lock") as f:
            rank_0 = int(re.search(r"process (\d+)", f.read())[1])
        os.kill(rank_0, signal.SIGKILL)
        assert ranks.wait(60) != 0
    finally:
        ranks.kill()
    done = len(glob.glob("a.npz.parts/*.npy"))
    assert 20 < done < 300
    assert not os.path.exists("a.npz")

    capsys.readouterr()
    assert run(*arguments, "--out", "a.npz") is None
    assert f"going on from {done} of 300" in capsys.readouterr().err
    with open("a.npz", "rb") as a, open("whole.npz", "rb") as whole:
        assert a.read() == whole.read()
    assert not os.path.exists("a.npz.parts")


def test_batches_of_another_run_stay(folder, capsys, monkeypatch):
    """Those of another seed, nfe, guidance, class, batch or checkpoint are refused, not removed."""
    make_checkpoint("c.safetensors", guidance=RANGE_OF_WEIGHTS)
    make_checkpoint("other.safetensors", seed=1, guidance=RANGE_OF_WEIGHTS)
    six = ("--n", 6, "--batch", 2, "--out", "a.png")
    with monkeypatch.context() as patch:
        break_pictures(patch)
        with pytest.raises(TypeError, match="NoneType"):
            run("c.safetensors", *six)
    assert not os.path.exists("a.png")
    batches = glob.glob("a.png.parts/*.npy")
    assert len(batches) == 3

    with monkeypatch.context() as patch:
        break_network(patch)
        for arguments in (
            ("c.safetensors", *six, "--seed", 3),
            ("c.safetensors", *six, "--nfe", 2),
            ("c.safetensors", *six, "--w", 1.5),
            ("c.safetensors", *six, "--classes", "2"),
            ("c.safetensors", *six, "--batch", 3),
            ("c.safetensors", *six, "--n", 7),
            ("c.safetensors", *six, "--seed", 3, "--overwrite"),
            ("other.safetensors", *six),
        ):
            complaint = run(*arguments)
            assert "a.png.parts holds 3 finished batches of another checkpoint, seed" in complaint
            assert "delete the folder, or name another --out" in complaint
            assert glob.glob("a.png.parts/*.npy") == batches
    os.rename(batches[0], "kept.npy")
    open(batches[0], "w").close()
    assert f"{batches[0]} is damaged: delete it" in run("c.safetensors", *six)
    os.replace("kept.npy", batches[0])
    capsys.readouterr()
    assert run("c.safetensors", *six) is None
    assert "going on from 3 of 3" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["a.png", "c.safetensors", "other.safetensors"]


def test_files_of_others_among_the_batches_stay(folder):
    make_checkpoint("c.safetensors")
    others = ["0123456789abcdef-000000000.npy.txt", "mine.npy", "mine.tvm", "notes"]
    os.mkdir("a.npz.parts")
    for name in others:
        open(f"a.npz.parts/{name}", "w").close()
    # A batch of another run that was never whole.
    open(f"a.npz.parts/0123456789abcdef-000000000.npy{files.PARTIAL}", "w").close()
    assert run("c.safetensors", "--n", 2, "--out", "a.npz") is None
    assert sorted(os.listdir("a.npz.parts")) == others


def test_batches_of_edited_code(folder, monkeypatch):
    """A sampler that was changed does not go on from what the former one has made."""
    make_checkpoint("c.safetensors")
    command = ("c.safetensors", "--n", 4, "--batch", 2, "--out", "a.npz")
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "write_images", None)  # ends at the last moment
        with pytest.raises(TypeError):
            run(*command)
    for name in ("batches.py", "sample.py"):
        os.makedirs("code", exist_ok=True)
        for file in glob.glob(os.path.join(HERE, "*.py")):
            shutil.copy(file, "code")
        with open(f"code/{name}", "a") as f:
            f.write("# edited\n")
        with monkeypatch.context() as patch:
            patch.setattr(files, "HERE", "code")
            assert "2 finished batches of another checkpoint" in run(*command)
    assert run(*command) is None


def test_one_run_an_output(folder, monkeypatch):
    make_checkpoint("c.safetensors")
    lock = files.hold("a.npz.parts", 0)
    hold = files.hold
    monkeypatch.setattr("parts.hold", lambda path, seconds: hold(path, 0))  # without the wait
    assert "is at work in" in run("c.safetensors", "--n", 2, "--out", "a.npz")
    lock.close()


def test_batches_do_not_show(folder):
    """Noise and classes go by the image's number, not by its place in a batch."""
    make_checkpoint("c.safetensors")

    def seven(batch, out, *more):
        return run("c.safetensors", "--n", 7, "--batch", batch, "--out", out, *more)

    assert seven(2, "2.npz") is None
    assert seven(3, "3.npz") is None
    assert equal_to_a_level(images_in("2.npz"), images_in("3.npz"))

    assert seven(3, "b.npz", "--classes", "3,5") is None
    assert seven(7, "c.npz", "--classes", "3,5") is None
    assert equal_to_a_level(images_in("b.npz"), images_in("c.npz"))


# ---- the score -----------------------------------------------------------------------------------


class SmallInception:
    """In Inception's place: eight mean colours of an 8 x 8 image."""

    digest = "a"

    def __call__(self, images, resize):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 8, 8)
        assert resize == "tf1"
        return images.float().flatten(2).mean(1)[:, ::8]


def use_small_features(monkeypatch):
    """Eight features instead of Inception's 2048. Returns the reference, (mu, sigma)."""
    moments = fid.Moments
    reference = np.arange(8.0), np.eye(8)
    monkeypatch.setattr(fid, "load_inception", lambda path, device: SmallInception())
    monkeypatch.setattr(fid, "read_reference", lambda path, net, image_size: reference)
    monkeypatch.setattr(fid, "Moments", lambda dim: moments(8))
    return reference


def test_fid_of_samples(folder, capsys, monkeypatch):
    """--fid: of the same images, the features' distance from the reference. It leaves nothing."""
    reference = use_small_features(monkeypatch)
    make_checkpoint("c.safetensors")
    fifty = ("c.safetensors", "--n", 50)
    assert run(*fifty, "--out", "a.npz") is None
    features = torch.from_numpy(images_in("a.npz")[..., 0]).float().flatten(1)[:, ::8]
    expected = fid.frechet_distance(*scores.moments(features), *reference)

    capsys.readouterr()
    assert run(*fifty, "--fid", "ref.npz", "--batch", 20) is None
    found = float(re.search(r"FID (\S+) against ref.npz", capsys.readouterr().out)[1])
    assert abs(found - expected) < 1e-4 * expected + 1e-4
    assert sorted(os.listdir()) == ["a.npz", "c.safetensors"]

    assert "without --out" in run("c.safetensors", "--fid", "ref.npz", "--out", "b.npz")


def test_runs_with_fid_side_by_side(folder, capsys, monkeypatch):
    """Each seed, and each network of features, has its own folder of batches."""
    use_small_features(monkeypatch)
    make_checkpoint("c.safetensors")
    fifty = ("c.safetensors", "--n", 50, "--fid", "ref.npz", "--inception", "w.pth")
    with monkeypatch.context() as patch:
        patch.setattr(fid, "frechet_distance", None)  # ends at the last moment
        with pytest.raises(TypeError):
            run(*fifty)
    first = sorted(os.listdir())
    (parts_of_first,) = glob.glob("c.safetensors-*-fid.parts")
    lock = files.hold(parts_of_first)  # as if it were still at work

    assert run(*fifty, "--seed", 1) is None
    with monkeypatch.context() as patch:
        patch.setattr(SmallInception, "digest", "b")  # other weights in the same file
        assert run(*fifty) is None
    assert "going on" not in capsys.readouterr().err
    assert sorted(os.listdir()) == first

    lock.close()
    assert run(*fifty) is None
    assert "going on from 1 of 1" in capsys.readouterr().err
    assert os.listdir() == ["c.safetensors"]


def test_fid_against_images_of_another_size(folder, capfd, monkeypatch):
    """It is told, where --save-stats has noted the size, and the score is given."""
    moments = fid.Moments
    monkeypatch.setattr(fid, "load_inception", lambda path, device: SmallInception())
    monkeypatch.setattr(fid, "Moments", lambda dim: moments(8))
    monkeypatch.setattr(SmallInception, "fc", torch.nn.Linear(8, 1), raising=False)
    make_checkpoint("c.safetensors")
    made = "resize tf1, weights a"
    for notes in ("", made, f"{made}, images 8x8", f"{made}, images 64x48"):
        np.savez("ref.npz", mu=np.arange(8.0), sigma=np.eye(8), notes=notes)
        assert run("c.safetensors", "--n", 50, "--fid", "ref.npz") is None
        said = capfd.readouterr()
        assert "FID " in said.out
        remark = "ref.npz: its images are 64x48 and the samples 8x8"
        assert (remark in said.err) == ("64x48" in notes)


# ---- what it refuses, and what it must not -------------------------------------------------------


@pytest.mark.parametrize("out", ["a.png", "a.npz"])
def test_what_is_there_stays(folder, monkeypatch, out):
    """A file is replaced with --overwrite alone. Without it nothing is done, not even a batch."""
    make_checkpoint("c.safetensors")
    two = ("c.safetensors", "--n", 2, "--out", out)
    with open(out, "w") as f:
        f.write("precious")
    with monkeypatch.context() as patch:
        break_network(patch)
        complaint = run(*two)
    assert f"{out} is there already: --overwrite replaces it, --out names another" in complaint
    with open(out) as f:
        assert f.read() == "precious"
    assert sorted(os.listdir()) == [out, "c.safetensors"]
    assert run(*two, "--overwrite") is None
    with open(out, "rb") as f:
        assert f.read(8) != b"precious"


def test_the_default_grid_is_replaced(folder):
    make_checkpoint("c.safetensors")
    for seed in (0, 1):
        assert run("c.safetensors", "--n", 2, "--seed", seed) is None
    assert sorted(os.listdir()) == ["c.safetensors", "samples.png"]


def test_overwrite_is_for_files(folder):
    """Whole folders are never replaced."""
    make_checkpoint("c.safetensors")
    assert run("c.safetensors", "--n", 1, "--out", "pngs") is None
    assert "files in it already" in run("c.safetensors", "--out", "pngs", "--overwrite")
    assert os.listdir("pngs")
    os.mkdir("a.npz")
    assert "as a folder" in run("c.safetensors", "--out", "a.npz", "--overwrite")
    open("file", "w").close()
    assert "as a file" in run("c.safetensors", "--out", "file", "--overwrite")
    assert "without --out and --overwrite" in run("c.safetensors", "--fid", "r", "--overwrite")


@pytest.mark.parametrize(
    "out, room",
    [("a.png", 100), ("a.npz", 100), ("pngs", 100), ("pngs", 10_000)],
    ids=["in the grid", "in the npz", "in the first PNG", "in dataset.json"],
)
def test_a_full_disk(folder, out, room):
    """It is told with the name of OUT, and nothing stays."""
    n = 500
    pixels = np.random.default_rng(0).integers(256, size=(n, 8, 8, 3), dtype=np.uint8)
    arguments = (n, np.arange(n), 10)
    kind = pictures.output_kind(out)
    with full_disk(room), pytest.raises(OSError, match=f"File too large: '{out}'"):
        pictures.write_images(out, kind, iter([pixels]), *arguments)
    assert os.listdir() == []
    pictures.write_images(out, kind, iter([pixels]), *arguments)
    assert os.listdir() == [out]


def test_a_full_disk_ends_the_command(folder):
    make_checkpoint("c.safetensors")
    command = ("c.safetensors", "--n", 200, "--batch", 50, "--out", "a.npz")
    with full_disk(5000):  # a batch is smaller than this, all images are not
        complaint = run(*command)
    assert complaint == "sample.py: [Errno 27] File too large: 'a.npz'"
    assert sorted(os.listdir()) == ["a.npz.parts", "c.safetensors"]
    assert run(*command) is None
    assert sorted(os.listdir()) == ["a.npz", "c.safetensors"]


def test_any_name_of_an_output(folder):
    """A dot does not make a file of a folder, nor capital letters another kind of a file."""
    make_checkpoint("c.safetensors")
    for out in ("samples_v1.5", "2026.11.28/run.2", "x.jpg/", "with space.", "a.b.c/d.png/"):
        assert run("c.safetensors", "--n", 1, "--out", out) is None
        assert "000000.png" in os.listdir(out)
    os.mkdir("there.zip")
    assert run("c.safetensors", "--n", 1, "--out", "there.zip") is None
    assert run("c.safetensors", "--n", 1, "--out", "A.PNG") is None
    assert Image.open("A.PNG").format == "PNG"
    assert run("c.safetensors", "--n", 1, "--out", "A.Npz") is None
    assert images_in("A.Npz").shape == (1, 8, 8, 1)

    os.makedirs("empty.npz")
    assert "is there already, as a folder" in run("c.safetensors", "--out", "empty.npz")
    open("file", "w").close()
    assert "is there already, as a file" in run("c.safetensors", "--out", "file")
    os.mkdir("full")
    open("full/file", "w").close()
    assert "files in it already" in run("c.safetensors", "--out", "full")
    for out in ("x.jpg", "x.NPY"):
        assert out in run("c.safetensors", "--out", out)
    assert "name a new folder" in run("c.safetensors", "--out", "..")
    before = set(os.listdir())
    for out in (247 * "a" + ".png", 247 * "a"):  # of 255 letters with what is added at first
        assert "File name too long" in run("c.safetensors", "--n", 1, "--out", out)
    assert set(os.listdir()) == before


def test_sample_refuses(folder):
    make_checkpoint("c.safetensors")
    make_checkpoint("random.safetensors", guidance=RANGE_OF_WEIGHTS)
    assert "nfe" in run("c.safetensors", "--nfe", 0)
    assert "0 to 9" in run("c.safetensors", "--classes", "3,10")
    assert "0,3,7" in run("c.safetensors", "--classes", "cat")
    assert "w = 1 only" in run("c.safetensors", "--w", 3)
    assert "w from 1 to 2" in run("random.safetensors", "--w", 3)
    assert run("random.safetensors", "--w", 1.5, "--n", 1, "--out", "a.png") is None
    assert "no checkpoint" in run("gone.safetensors")
    assert "at least 1" in run("c.safetensors", "--n", 0)
    assert "unrecognized arguments: --nef" in run("c.safetensors", "--nef", 2)
    assert "no device" in run("c.safetensors", "--device", "gpu")
    half_on_a_cpu = ("--device", "cpu", "--precision", "bfloat16")
    assert "bfloat16" in run("c.safetensors", *half_on_a_cpu)
    make_checkpoint("u.safetensors", num_classes=0)
    assert "without classes" in run("u.safetensors", "--classes", "1")
    assert "--fid only" in run("c.safetensors", "--inception", "w.pth")
    assert "--fid is given without a name" in run("c.safetensors", "--fid", "")
    assert "--out is given without a name" in run("c.safetensors", "--out", "")
    assert "raise --batch" in run("c.safetensors", "--n", 10**9, "--batch", 1, "--out", "b.npz")
    assert "at least 2 images" in run("c.safetensors", "--fid", "ref.npz", "--n", 1)
    script = os.path.join(HERE, "sample.py")
    done = subprocess.run([sys.executable, script, "gone"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "sample.py: no checkpoint gone\n"


@pytest.mark.parametrize(
    "environment, word",
    [
        (dict(WORLD_SIZE="2"), "no RANK"),
        (dict(RANK="x"), "RANK"),
        (dict(WORLD_SIZE="two"), "WORLD_SIZE"),
        (dict(RANK="3", WORLD_SIZE="2"), "RANK 3"),
        (dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost"), "no MASTER_PORT"),
        (
            dict(
                RANK="0",
                WORLD_SIZE="2",
                LOCAL_RANK="0",
                MASTER_ADDR="localhost",
                MASTER_PORT="abc",
            ),
            "MASTER_PORT",
        ),
    ],
)
def test_half_an_environment_of_torchrun(folder, monkeypatch, environment, word):
    make_checkpoint("c.safetensors")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    complaint = run("c.safetensors")
    assert "environment" in complaint
    assert word in complaint


def test_files_that_are_no_checkpoints(folder):
    make_checkpoint("c.safetensors")
    with open("c.safetensors", "rb") as f:
        whole = f.read()
    one_bit_flipped = whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:]
    for name, content, word in (
        ("cut", whole[: len(whole) // 2], "is damaged"),
        ("flipped", one_bit_flipped, "is damaged"),
        ("text", b"hello", "not a whole"),
        ("empty", b"", "not a whole"),
    ):
        with open(name, "wb") as f:
            f.write(content)
        assert word in run(name)
    save_file({"a": torch.zeros(2)}, "foreign.safetensors")
    assert "not a checkpoint of this project" in run("foreign.safetensors")

    tensors, about = ckpt.load_tensors("c.safetensors")
    for key in ("data", "guidance"):
        ckpt.save_tensors("part.safetensors", tensors, {**about, key: {}})
        assert f"no whole {key}" in run("part.safetensors")
    deeper = {**about, "config": {**about["config"], "depth": 3}}
    ckpt.save_tensors("other.safetensors", tensors, deeper)
    assert "does not fit its own config" in run("other.safetensors")
    change_data("c.safetensors", class_counts=[1] * 11)
    assert "11 class counts for 10 classes" in run("c.safetensors")


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("config", "depth", 10**9),
        ("config", "mlp_ratio", math.inf),
        ("config", "mlp_ratio", 0),
        ("config", "scaled", "False"),
        ("data", "dtype", 2.5),
        ("data", "shape", 10**25),
        ("data", "shape", [[[]], 8, 8]),
        ("data", "shape", [3, 10**25, 8]),
        ("data", "mean", None),
        ("data", "std", [1.0] * 3),
        ("data", "class_counts", [0] * 10),
        ("data", "class_counts", ["1"] * 10),
        ("guidance", "w", math.nan),
        ("guidance", "w", 0),
        ("guidance", "w", 10**25),
    ],
)
def test_checkpoints_that_cannot_be(folder, part, key, value):
    make_checkpoint("c.safetensors")
    tensors, about = ckpt.load_tensors("c.safetensors")
    about[part][key] = value
    ckpt.save_tensors("c.safetensors", tensors, about)
    assert "does not fit its own config" in run("c.safetensors")


def test_two_runs_of_one_output(folder, monkeypatch):
    """A second run that waited while the first one wrote OUT ends in one line, and OUT stays."""
    make_checkpoint("c.safetensors")
    hold = parts.Parts.hold

    def hold_late(self):
        with open("a.npz", "w") as f:
            f.write("of the first run")
        hold(self)

    monkeypatch.setattr(parts.Parts, "hold", hold_late)
    assert "a.npz is there already" in run("c.safetensors", "--n", 5, "--out", "a.npz")
    with open("a.npz") as f:
        assert f.read() == "of the first run"
    assert not os.path.exists("a.npz.parts")


def test_a_folder_of_another_name_stays(folder):
    """What lies in OUT.partial is the user's."""
    make_checkpoint("c.safetensors")
    os.makedirs("mine.partial")
    with open("mine.partial/x.txt", "w") as f:
        f.write("precious")
    assert run("c.safetensors", "--n", 2, "--out", "mine") is None
    assert os.path.exists("mine.partial/x.txt")
    assert len(os.listdir("mine")) == 3  # two pictures and their labels


def test_files_of_others_in_the_folder_that_is_written_first(folder, monkeypatch):
    """They are refused before the work, and never removed. What an interrupted run left is."""
    make_checkpoint("c.safetensors")
    two = ("c.safetensors", "--n", 2, "--out", "pngs")
    aside = "pngs" + files.PARTIAL
    os.mkdir(aside)
    for name in ("000000.png", "dataset.json", "notes.txt"):
        open(f"{aside}/{name}", "w").close()
    with monkeypatch.context() as patch:
        break_network(patch)
        assert f"{aside}/notes.txt is not of an interrupted run: move it away" in run(*two)
    assert len(os.listdir(aside)) == 3
    batch = np.zeros((2, 8, 8, 1), np.uint8)
    with pytest.raises(OSError, match=f"not empty: '{aside}'"):  # one that comes during the work
        pictures.write_images("pngs", "folder", iter([batch]), 2, None, 2)
    assert os.listdir(aside) == ["notes.txt"]

    os.remove(f"{aside}/notes.txt")
    open(f"{aside}/000007.png", "w").close()
    assert run(*two) is None
    assert sorted(os.listdir()) == ["c.safetensors", "pngs"]
    assert sorted(os.listdir("pngs")) == ["000000.png", "000001.png", "dataset.json"]


def test_links_lead_to_another_disk(folder, monkeypatch):
    """A link stays, and what it points to is written, its batches beside it."""
    make_checkpoint("c.safetensors")
    two = ("c.safetensors", "--n", 2)
    os.makedirs("large/empty")
    os.symlink("large/empty", "pngs")
    os.symlink("large/a.npz", "link.npz")
    os.symlink("large/new/b.png", "link.png")
    with monkeypatch.context() as patch:
        break_pictures(patch)
        with pytest.raises(TypeError):
            run(*two, "--out", "pngs/")
    assert sorted(os.listdir("large")) == ["empty", "empty.parts"]
    assert run(*two, "--out", "pngs/") is None
    assert run(*two, "--out", "link.npz") is None  # which points to nothing yet
    assert run(*two, "--out", "link.png") is None
    assert sorted(os.listdir("large")) == ["a.npz", "empty", "new"]
    assert len(os.listdir("large/empty")) == 3
    assert os.listdir("large/new") == ["b.png"]
    before = images_in("large/a.npz")
    assert "large/a.npz is there already" in run(*two, "--out", "link.npz")
    assert run(*two, "--out", "link.npz", "--seed", 1, "--overwrite") is None
    assert not np.array_equal(before, images_in("large/a.npz"))
    for name in ("pngs", "link.npz", "link.png"):
        assert os.path.islink(name)


def test_a_disk_is_not_replaced(folder, monkeypatch):
    """A mount point cannot be removed, so it is refused before the work."""
    make_checkpoint("c.safetensors")
    os.mkdir("disk")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == "disk")
    with monkeypatch.context() as patch:
        break_network(patch)
        complaint = run("c.safetensors", "--n", 2, "--out", "disk")
    assert "disk is where a disk is mounted; name a new folder in it" in complaint
    assert run("c.safetensors", "--n", 2, "--out", "disk/pngs") is None


def test_a_disk_without_room(folder, monkeypatch, capsys):
    """It is told before the work; an .npz is written while its batches are still there."""
    make_checkpoint("c.safetensors")
    hundred = ("c.safetensors", "--n", 100, "--batch", 50, "--out")  # 64 bytes each
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=10_000))
        with monkeypatch.context() as inner:
            break_network(inner)
            complaint = run(*hundred, "a.npz")
            assert "takes 12.8 kB, and its disk has 10.0 kB left" in complaint
        assert os.listdir() == ["c.safetensors"]
        assert run(*hundred, "pngs") is None

    with monkeypatch.context() as patch:
        break_pictures(patch)
        with pytest.raises(TypeError):
            run(*hundred, "a.png")
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=0))
    assert run(*hundred, "a.png") is None  # all batches are there
    assert "going on from 2 of 2" in capsys.readouterr().err


def test_form_of_images(tmp_path):
    pixels = dict(mean=[0.0] * 3, std=[1.0] * 3)
    floats = dict(pixels, dtype="float32")
    latents = dict(mean=[0.0] * 4, std=[1.0] * 4, vae="tiny")
    vae = tiny_vae(tmp_path)
    vae.shrinks = 4
    for header, shape, decoder in (
        (pixels, (3, 8, 12), None),
        (floats, (3, 8, 12), None),
        (latents, (4, 8, 4), vae),
    ):
        with torch.no_grad():
            images = pictures.to_images(torch.zeros(2, *shape), header, decoder)
        form = pictures.form_of_images(shape, header, decoder)
        assert form == (images.shape[1:], images.dtype)
