"""..."""
import glob
import math
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
from helpers import (
    F64,
    HERE,
    GaussianFlow,
    close,
    images_in,
    make_checkpoint,
    randn,
    random_inputs,
    random_model,
    run_script,
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
import sample as s
import scores


@pytest.mark.parametrize("scaled", [False, True])
def test_sampler_against_a_hand_loop(scaled):
    net = random_model(scaled=scaled)
    x1, _, _, _, y, w = random_inputs()
    x, times = x1, [1, 0.75, 0.5, 0.25, 0]
    for t, t_next in zip(times, times[1:]):
        full = lambda a: torch.full((3,), a, dtype=F64)
        x = x + (t_next - t) * (w.view(3, 1, 1, 1) if scaled else 1) * net(x, full(t), full(t_next), y, w)
    close(s.sample(net, x1, y, w, 4), x, 1e-13)
    with pytest.raises(ValueError, match="nfe"):
        s.sample(net, x1, y, w, 0)


def test_exact_flow_samples_in_one_step():
    flow = GaussianFlow(0.3, 0.5, False)
    flow.parameters = lambda: iter([torch.zeros((), dtype=F64)])
    x1, y, w = randn(5, 1, 2, 2), torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=F64)
    for nfe in (1, 3):
        close(s.sample(flow, x1, y, w, nfe), 0.3 + 0.5 * x1, 1e-13)


def test_draws_depend_on_seed_and_index_alone():
    noise, labels = s.draw(3, range(10), (1, 2, 2), [1, 0, 3])
    part, part_labels = s.draw(3, [7, 4], (1, 2, 2), [1, 0, 3])
    assert (noise[[7, 4]] == part).all() and (labels[[7, 4]] == part_labels).all()
    noise, labels = s.draw(0, range(4000), (5,), [1, 0, 3])
    assert scipy.stats.kstest(noise.flatten(), "norm").pvalue > 1e-3
    assert abs((labels == 2).double().mean() - 0.75) < 4 * math.sqrt(0.19 / 4000) and not (labels == 1).any()
    assert not s.draw(0, range(5), (1,))[1].any()


def test_checkpoint_round_trip(folder):
    net = make_checkpoint("c.safetensors")
    loaded, about = m.load_model("c.safetensors")
    assert loaded.config == net.config and all((a == b).all() for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))
    assert os.listdir() == ["c.safetensors"]


def test_sample_outputs(folder):
    make_checkpoint("c.safetensors")
    assert run_script("sample.py", "c.safetensors", "--n", 7, "--out", "a.npz", "--seed", 4) is None
    a = np.load("a.npz", allow_pickle=False)["arr_0"]
    assert a.shape == (7, 8, 8, 1) and a.dtype == np.uint8 and a.std() > 0
    assert run_script("sample.py", "c.safetensors", "--n", 7, "--out", "b.npz", "--seed", 4, "--batch", 3) is None
    assert np.abs(a.astype(int) - np.load("b.npz", allow_pickle=False)["arr_0"]).max() <= 1
    assert run_script("sample.py", "c.safetensors", "--n", 7, "--out", "pngs/", "--seed", 4) is None
    assert len(os.listdir("pngs")) == 7 and (np.asarray(Image.open("pngs/000003.png")) == a[3, ..., 0]).all()
    assert run_script("sample.py", "c.safetensors", "--classes", "3,5", "--nfe", 2) is None
    assert Image.open("samples.png").size[0] >= 700
    make_checkpoint("u.safetensors", num_classes=0)
    assert run_script("sample.py", "u.safetensors", "--n", 3, "--out", "u.npz") is None


def test_sampling_on_two_ranks(folder):
    make_checkpoint("c.safetensors")
    assert run_script("sample.py", "c.safetensors", "--n", 7, "--out", "one.npz") is None
    torchrun("sample.py", "c.safetensors", "--n", 7, "--out", "two.npz")
    one, two = (np.load(f"{name}.npz", allow_pickle=False)["arr_0"] for name in ("one", "two"))
    assert one.shape == two.shape and np.abs(one.astype(int) - two).max() <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="kills a process by what Linux says of it")
def test_sampling_goes_on_after_a_kill(folder, capsys):
    """Rank 0 of two is killed: all end, no file appears, and one process goes on to the images of an undisturbed run."""
    make_checkpoint("c.safetensors")
    arguments = ["c.safetensors", "--n", 1500, "--batch", 5]
    assert run_script("sample.py", *arguments, "--out", "whole.npz") is None
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", os.path.join(HERE, "sample.py")]
    with open("said", "w") as f:
        run = subprocess.Popen([*command, *map(str, arguments), "--out", "a.npz"], stdout=f, stderr=f,
                               env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})   # sums in the same order
    try:
        until(lambda: len(glob.glob("a.npz.parts/*.npy")) > 20, "twenty batches")
        os.kill(int(re.search(r"process (\d+)", open("a.npz.parts/lock").read())[1]), signal.SIGKILL)
        assert run.wait(60) != 0
    finally:
        run.kill()
    done = len(glob.glob("a.npz.parts/*.npy"))
    assert 20 < done < 300 and not os.path.exists("a.npz")
    capsys.readouterr()
    assert run_script("sample.py", *arguments, "--out", "a.npz") is None
    assert f"going on from {done} of 300" in capsys.readouterr().err
    assert open("a.npz", "rb").read() == open("whole.npz", "rb").read() and not os.path.exists("a.npz.parts")


def test_partial_samples_are_of_one_run(folder, capsys, monkeypatch):
    """Batches of another seed, nfe, guidance, batch or checkpoint are not used, and that is said; a lock keeps others out."""
    make_checkpoint("c.safetensors", guidance=dict(sampler="inverse", w=1.0, w_min=1.0, w_max=2.0))
    make_checkpoint("other.safetensors", seed=1, guidance=dict(sampler="inverse", w=1.0, w_min=1.0, w_max=2.0))
    base = {"--n": 6, "--batch": 2, "--out": "a.npz"}
    command = lambda change, path="c.safetensors": [path, *(word for pair in {**base, **change}.items() for word in pair)]
    with monkeypatch.context() as patch:
        patch.setattr(Image, "fromarray", None)                               # an end at the last moment
        assert "NoneType" in str(pytest.raises(TypeError, run_script, "sample.py", *command({"--out": "a.png"})).value)
    assert len(glob.glob("a.png.parts/*.npy")) == 3 and not os.path.exists("a.png")
    for change, path in (({"--seed": 3}, "c.safetensors"), ({"--nfe": 2}, "c.safetensors"), ({"--guidance": 1.5}, "c.safetensors"),
                         ({"--classes": "2"}, "c.safetensors"), ({}, "other.safetensors")):
        assert run_script("sample.py", *command(change, path)) is None
        fresh = images_in("a.npz")
        os.makedirs("a.npz.parts")
        for name in os.listdir("a.png.parts"):
            with open(f"a.png.parts/{name}", "rb") as f, open(f"a.npz.parts/{name}", "wb") as g:
                g.write(f.read())
        capsys.readouterr()
        assert run_script("sample.py", *command(change, path)) is None
        assert "starting over" in capsys.readouterr().err and (images_in("a.npz") == fresh).all() and not os.path.exists("a.npz.parts")
    assert run_script("sample.py", *command({"--out": "a.png"})) is None and "going on from 3 of 3" in capsys.readouterr().err
    lock = files.hold("a.npz.parts", 0)
    monkeypatch.setattr(ckpt, "hold", lambda path, seconds, hold=files.hold: hold(path, 0))
    assert "is at work in" in run_script("sample.py", *command({}))
    lock.close()


def test_fid_of_samples(folder, capsys, monkeypatch):
    """--fid is the distance of the features of the same images from the reference, and leaves nothing behind."""
    class Inception:
        digest = "a"

        def __call__(self, images, resize):
            assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 8) and resize == "tf1"
            return images.float().flatten(2).mean(1)[:, ::8]

    Moments = fid.Moments
    reference = np.arange(8.0), np.eye(8)
    for name, stub in (("load_inception", lambda path, device: Inception()), ("Moments", lambda dim: Moments(8)), ("FidError", files.CheckpointError),
                       ("read_reference", lambda path, net: reference)):
        monkeypatch.setattr(fid, name, stub, raising=False)
    make_checkpoint("c.safetensors")
    assert run_script("sample.py", "c.safetensors", "--n", 50, "--out", "a.npz") is None
    features = torch.from_numpy(images_in("a.npz")[..., 0]).float().flatten(1)[:, ::8]
    expected = fid.frechet_distance(*scores.moments(features), *reference)
    capsys.readouterr()
    assert run_script("sample.py", "c.safetensors", "--n", 50, "--fid", "ref.npz", "--batch", 20) is None
    assert abs(float(re.search(r"FID (\S+) against ref.npz", capsys.readouterr().out)[1]) - expected) < 1e-4 * expected + 1e-4
    assert sorted(os.listdir()) == ["a.npz", "c.safetensors"]
    assert "without --out" in run_script("sample.py", "c.safetensors", "--fid", "ref.npz", "--out", "b.npz")
    with monkeypatch.context() as patch:
        patch.setattr(fid, "frechet_distance", None)                          # an end at the last moment
        pytest.raises(TypeError, run_script, "sample.py", "c.safetensors", "--n", 50, "--fid", "ref.npz", "--inception", "w.pth")
    Inception.digest = "b"                                                    # other weights in the same file
    assert run_script("sample.py", "c.safetensors", "--n", 50, "--fid", "ref.npz", "--inception", "w.pth") is None
    assert "starting over" in capsys.readouterr().err


def test_sample_refuses(folder):
    make_checkpoint("c.safetensors")
    make_checkpoint("random.safetensors", guidance=dict(sampler="inverse", w=1.0, w_min=1.0, w_max=2.0))
    complain = lambda *a: run_script("sample.py", *a)
    assert "nfe" in complain("c.safetensors", "--nfe", 0)
    assert "0 to 9" in complain("c.safetensors", "--classes", "3,10")
    assert "0,3,7" in complain("c.safetensors", "--classes", "cat")
    assert "guidance 1 only" in complain("c.safetensors", "--guidance", 3)
    assert "from 1 to 2" in complain("random.safetensors", "--guidance", 3)
    assert run_script("sample.py", "random.safetensors", "--guidance", 1.5, "--n", 1) is None
    assert "no checkpoint" in complain("gone.safetensors")
    assert "at least 1" in complain("c.safetensors", "--n", 0)
    assert "unrecognized arguments: --nef" in complain("c.safetensors", "--nef", 2)
    assert "no device" in complain("c.safetensors", "--device", "gpu")
    assert "bfloat16" in complain("c.safetensors", "--device", "cpu", "--precision", "bfloat16")
    assert ".jpg" in complain("c.safetensors", "--out", "x.jpg")
    os.mkdir("full"), open("full/file", "w").close()
    assert "files in it already" in complain("c.safetensors", "--out", "full")
    whole = open("c.safetensors", "rb").read()
    flipped = whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:]
    for name, content, word in (("cut", whole[:len(whole) // 2], "is damaged"), ("flipped", flipped, "is damaged"),
                                ("text", b"hello", "not a whole"), ("empty", b"", "not a whole")):
        with open(name, "wb") as f:
            f.write(content)
        assert word in complain(name)
    save_file({"a": torch.zeros(2)}, "foreign.safetensors")
    assert "not a checkpoint of this project" in complain("foreign.safetensors")
    tensors, about = ckpt.load_tensors("c.safetensors")
    for key in ("data", "guidance"):
        ckpt.save_tensors("part.safetensors", tensors, {**about, key: {}})
        assert f"no whole {key}" in complain("part.safetensors")
    ckpt.save_tensors("part.safetensors", tensors, {**about, "data": {**about["data"], "class_counts": [1] * 11}})
    assert "11 class counts for 10 classes" in complain("part.safetensors")
    ckpt.save_tensors("other.safetensors", tensors, {**about, "config": {**about["config"], "depth": 3}})
    assert "does not fit its own config" in complain("other.safetensors")
    done = subprocess.run([sys.executable, os.path.join(HERE, "sample.py"), "gone"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "sample.py: no checkpoint gone\n"


def test_the_shipped_checkpoint(folder):
    """Small, whole, and as good in one step as the README says: the class asked for, and no copies."""
    path = os.path.join(HERE, "assets", "digits.safetensors")
    assert os.path.getsize(path) < 1_500_000
    assert run_script("prepare.py", "digits") is None
    assert run_script("sample.py", path, "--n", 300, "--out", "a.npz") is None
    data, (net, about) = dataset.load_dataset("data/digits")[1], m.load_model(path)
    images = np.load("a.npz", allow_pickle=False)["arr_0"].transpose(0, 3, 1, 2)
    _, y = s.draw(0, range(300), (1, 8, 8), about["data"]["class_counts"])
    assert scores.label_accuracy(images, y, data["train_images"], data["train_labels"]) >= 0.93
    assert scores.nearest_ratio(images, data["test_images"], data["train_images"]) >= 0.9
    assert scores.two_sample_accuracy(images, data["test_images"][:300]) <= 0.72


def test_grid():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    sheet = np.asarray(s.grid(images, 3, least=1))
    assert sheet.shape == (4 * 2 + 2, 4 * 3 + 2 * 2) and sheet[0, 6] == 1 and sheet[6, 6] == 4 and sheet[6, 12] == 255


def test_to_images():
    x = torch.tensor([-9, 0.4, 0.6, 300.0]).view(1, 1, 2, 2).expand(1, 2, 2, 2)
    assert s.to_images(x, dict(mean=[0.0, 1.0], std=[1.0, 2.0])).tolist() == [[[[0, 0], [0, 2]], [[1, 2], [255, 255]]]]


def test_batches_do_not_show(folder):
    """Parts of another batch size are not taken up, and --classes go by the image, not by its place in a batch."""
    make_checkpoint("c.safetensors")
    run = lambda batch, out, *more: run_script("sample.py", "c.safetensors", "--n", 7, "--batch", batch, "--out", out, *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "fromarray", None)
        pytest.raises(TypeError, run, 2, "a.png")
    os.rename("a.png.parts", "a.npz.parts")
    assert run(3, "a.npz") is None and run(3, "b.npz") is None and (images_in("a.npz") == images_in("b.npz")).all()
    assert run(3, "3.npz", "--classes", "3,5") is None and run(7, "7.npz", "--classes", "3,5") is None
    assert np.abs(images_in("3.npz").astype(int) - images_in("7.npz")).max() <= 1
    os.makedirs("empty.npz")
    assert "is there already, as a folder" in run(3, "empty.npz")
    open("file", "w").close()
    assert "is there already, as a file" in run(3, "file")


@pytest.mark.parametrize("part, key, value", [("config", "depth", 10 ** 9), ("config", "mlp_ratio", math.inf), ("config", "scaled", "False"),
                                              ("data", "mean", None), ("data", "std", [1.0] * 3), ("data", "class_counts", [0] * 10),
                                              ("data", "class_counts", ["1"] * 10), ("guidance", "w", math.nan), ("guidance", "w", 0)])
def test_checkpoints_that_cannot_be(folder, part, key, value):
    make_checkpoint("c.safetensors")
    tensors, about = ckpt.load_tensors("c.safetensors")
    about[part][key] = value
    ckpt.save_tensors("c.safetensors", tensors, about)
    assert "does not fit its own config" in run_script("sample.py", "c.safetensors")
