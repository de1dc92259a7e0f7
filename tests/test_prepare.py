"""..."""
import io
import json
import math
import os
import tarfile

import numpy as np
import pytest
from helpers import HERE, run_script, write_picture
from PIL import Image

import dataset
import images
import shapes


def test_digits(folder):
    assert run_script("prepare.py", "digits") is None
    header, data = dataset.load_dataset("data/digits")
    assert header["count"] == {"train": 1437, "test": 360} and header["shape"] == [1, 8, 8] and "CC BY" in header["license"]
    assert header["class_counts"] == np.bincount(data["train_labels"]).tolist()
    with np.load(os.path.join(HERE, "assets", "digits.npz"), allow_pickle=False) as f:
        ink = lambda images: sorted(np.round(images.reshape(-1, 64) / 255 * 16).sum(1))
        assert ink(np.concatenate([data["train_images"], data["test_images"]])) == sorted(f["images"].reshape(-1, 64).sum(1))
        assert os.path.getsize(f.fid.name if hasattr(f.fid, "name") else f.zip.filename) < 100_000


def test_shapes(folder):
    assert run_script("prepare.py", "shapes", "--n", 60, "--size", 16, "--name", "a") is None
    header, data = dataset.load_dataset("data/a")
    assert header["count"] == {"train": 60, "test": 10} and header["num_classes"] == 10
    assert (data["train_images"][13] == shapes.draw_shape(13, 16)).all() and (data["train_labels"] == np.arange(60) % 10).all()
    assert (data["test_images"][4] == shapes.draw_shape(64, 16)).all()
    assert (shapes.draw_shape(13, 16) != shapes.draw_shape(13, 16, seed=1)).any()


def test_folder(folder, capsys):
    for i in range(5):
        write_picture(folder / "src" / "cats" / f"{i}.png")
        write_picture(folder / "src" / "dogs" / f"{i}.jpg", (37, 50), (0, 250, 0))
    (folder / "src" / "cats" / "broken.png").write_bytes((folder / "src" / "cats" / "0.png").read_bytes()[:40])
    assert run_script("prepare.py", "folder", "src", "--size", 8, "--name", "pets", "--held-out", 0.2) is None
    said = capsys.readouterr()
    assert "broken.png" in said.err and "1 of 11" in said.out
    header, data = dataset.load_dataset("data/pets")
    assert header["count"] == {"train": 8, "test": 2} and header["class_names"] == ["cats", "dogs"] and header["skipped"] == 1
    green = data["train_images"][:, 1].mean((1, 2)) > 128
    assert (green == data["train_labels"]).all() and 0 < green.sum() < 8
    for i in range(3):
        write_picture(folder / "flat" / f"{i}.png")
    assert run_script("prepare.py", "folder", "flat", "--size", 8, "--name", "flat") is None
    assert dataset.load_dataset("data/flat")[0]["num_classes"] == 0
    assert os.listdir("data") and not [name for name in os.listdir("data") if "raw" in name or "partial" in name]
    assert "no folder" in run_script("prepare.py", "folder", "nowhere", "--size", 8)
    complain = lambda *a: run_script("prepare.py", *a)
    assert "names a folder" in complain("digits", "--name", "../photos")
    assert "[0, 1)" in complain("folder", "flat", "--size", 8, "--held-out", 1.5)
    assert "unrecognized" in complain("digits", "--sise", 3) and "--seed" in complain("digits", "--seed", -1)
    os.mkdir("data/mine")
    assert "not a dataset" in complain("digits", "--name", "mine") and os.path.isdir("data/mine")
    os.mkdir("empty")
    assert "no .jpg" in run_script("prepare.py", "folder", "empty", "--size", 8)


def test_sixteen_bit_gray(folder):
    Image.fromarray(np.full((9, 9), 30000, np.uint16)).save("deep.png")
    assert (images.read_image("deep.png", 8) == round(30000 / 257)).all()


def test_centre_crop():
    picture = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (8, 1)))   # 40 wide, 8 high: a ramp
    assert np.asarray(images.centre_crop(picture, 8)).tolist() == [[6 * x for x in range(16, 24)]] * 8
    assert images.centre_crop(Image.new("RGB", (33, 70)), 16).size == (16, 16)


def test_cifar10(folder):
    rng, names = np.random.default_rng(0), [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    records = {name: rng.integers(0, 10, (4, 3073), dtype=np.uint8) for name in names}
    with tarfile.open("c.tar.gz", "w:gz") as tar:
        for name, content in [("batches.meta.txt", "\n".join("abcdefghij").encode())] + [(n, r.tobytes()) for n, r in records.items()]:
            info = tarfile.TarInfo("cifar-10-batches-bin/" + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert run_script("prepare.py", "cifar10", "c.tar.gz") is None
    header, data = dataset.load_dataset("data/cifar10")
    assert header["count"] == {"train": 20, "test": 4} and header["class_names"] == list("abcdefghij")
    assert (data["train_images"][5].reshape(-1) == records["data_batch_2.bin"][1, 1:]).all()
    assert data["test_labels"].tolist() == records["test_batch.bin"][:, 0].tolist()
    with open("c.tar.gz", "rb") as f, open("cut.tar.gz", "wb") as g:
        g.write(f.read()[:3000])
    assert "cut.tar.gz" in run_script("prepare.py", "cifar10", "cut.tar.gz")
    assert "gone.tar.gz" in run_script("prepare.py", "cifar10", "gone.tar.gz")


def test_crops_and_shapes_by_hand(folder):
    a = np.random.default_rng(0).integers(256, size=(16, 16), dtype=np.uint8)
    assert np.abs(np.asarray(images.centre_crop(Image.fromarray(a), 8)) - a.reshape(8, 2, 8, 2).mean((1, 3))).max() <= 1
    for i in range(0, 100, 10):                                       # disks are round: what turns a shape does not shear it
        small, large = np.linalg.eigvalsh(np.cov(np.argwhere(shapes.draw_shape(i, 64)[0] > 0.475 * 255).T))
        assert large < 1.1 * small
    write_picture(folder / "mix" / "cats" / "0.png"), write_picture(folder / "mix" / "1.png")
    assert "beside its class folders" in run_script("prepare.py", "folder", "mix", "--size", 8)


def test_one_writer_a_dataset(folder):
    writer = dataset.Writer("data/digits", (1, 8, 8), {"train": 2, "test": 0})
    writer.set(0, np.ones((1, 8, 8), np.uint8), 0)
    assert f"process {os.getpid()}" in run_script("prepare.py", "digits") and not os.path.exists("data/digits")
    writer.finish("digits", ["0"])
    assert dataset.load_dataset("data/digits")[1]["train_images"][0].all() and "lock" not in os.listdir("data/digits")
    assert run_script("prepare.py", "digits") is None and len(dataset.load_dataset("data/digits")[1]["train_images"]) == 1437


@pytest.mark.parametrize("key, value", [("count", {"train": "2", "test": 0}), ("std", ["a"]), ("std", [0]), ("mean", None), ("mean", ["a"]),
                                        ("mean", [math.nan]), ("shape", [0, 8, 8]), ("class_counts", ["x"]), ("class_counts", [-1])])
def test_headers_that_cannot_be(folder, key, value):
    dataset.Writer("data/one", (1, 8, 8), {"train": 2, "test": 0}).finish("one", ["0"])
    with open("data/one/header.json") as f:
        header = json.load(f) | {key: value}
    with open("data/one/header.json", "w") as f:
        json.dump(header, f)
    with pytest.raises(dataset.DataError, match=f"header.json: {key} "):
        dataset.load_dataset("data/one")
