"""gallery.py: its images are those of sample.py, and the nearest ones are found by hand."""

import os

import numpy as np
import pytest
import torch
from helpers import CONSTANT, images_in, random_model, run_script, write_dataset
from PIL import Image

import checkpoint as ckpt
import gallery
from dataset import load_dataset
from files import PARTIAL

SHAPE = (3, 4, 4)
CLASSES = 2


def write_checkpoint(path, data="mine", objective="tvm", seed=0, **changes):
    """A random network that was trained, as it were, on data/NAME."""
    header, _ = load_dataset(f"data/{data}")
    header.update(changes)
    net = random_model(torch.float32, seed, in_channels=3, num_classes=CLASSES)
    about = dict(config=vars(net.config), guidance=CONSTANT, data=header, objective=objective)
    ckpt.save_tensors(str(path), net.state_dict(), about)


def run(*arguments):
    return run_script("gallery.py", *arguments, "--device", "cpu")


@pytest.fixture
def two_networks(folder):
    """a.safetensors of TVM and b.safetensors of flow matching, both of data/mine."""
    write_dataset("mine", SHAPE, classes=CLASSES)
    write_checkpoint("a.safetensors")
    write_checkpoint("b.safetensors", objective="flow_matching", seed=1)


@pytest.fixture
def blocks_of(two_networks, monkeypatch):
    """blocks_of(...) runs gallery.py and returns what it draws: its blocks, and its columns."""
    drawn = []

    def draw(*arguments):
        drawn.append(arguments)
        return Image.new("RGB", (1, 1))

    def blocks_of(*arguments):
        monkeypatch.setattr(gallery, "draw", draw)
        monkeypatch.setattr("sys.argv", ["gallery.py", *arguments, "--device", "cpu"])
        gallery.main()
        return drawn[-1]

    return blocks_of


def test_images_are_those_of_sample(blocks_of):
    """The same noise and classes; and a network of flow matching is sampled as sample.py does."""
    blocks, names = blocks_of("a.safetensors", "b.safetensors", "--out", "x.png", "--nfe", "1,3")
    assert names == ["class 0", "class 1"]
    assert [title for title, _ in blocks] == ["TVM,\n1 step", "flow matching,\n3 steps"]
    for (_, images), name, nfe in zip(blocks, "ab", (1, 3), strict=True):
        arguments = (f"{name}.safetensors", "--nfe", nfe, "--n", 6, "--classes", "0,1")
        sampled = ("--out", f"{name}.npz", "--device", "cpu")
        assert run_script("sample.py", *arguments, *sampled) is None
        assert np.array_equal(images, images_in(f"{name}.npz"))


def test_nearest(blocks_of):
    """Below each row of samples stand the training images that are nearest to them."""
    blocks, _ = blocks_of("a.safetensors", "--out", "x.png", "--rows", "2", "--nearest")
    train = np.moveaxis(np.array(load_dataset("data/mine")[1]["train_images"]), 1, -1)
    assert len(blocks) == 2
    samples = []
    for title, images in blocks:
        assert title == "TVM,\n1 step,\nand nearest\nin training"
        assert len(images) == 2 * CLASSES
        for image, nearest in zip(images[:CLASSES], images[CLASSES:], strict=True):
            squares = (train.astype(int) - image.astype(int)) ** 2
            assert np.array_equal(nearest, train[squares.sum((1, 2, 3)).argmin()])
            samples.append(image)
    arguments = ("a.safetensors", "--n", 4, "--classes", "0,1", "--device", "cpu")
    assert run_script("sample.py", *arguments, "--out", "a.npz") is None
    assert np.array_equal(samples, images_in("a.npz"))


def test_picture():
    """Every image stands in it, enlarged, below its class and beside its title."""
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    names = ["one", "Smileys & Emotion"]
    picture = np.asarray(gallery.draw([("a", images[:2]), ("two\nlines", images[2:])], names))
    zoom = gallery.WIDTH // (2 * 8)
    assert picture.shape[1] > gallery.WIDTH
    found = []
    for image in images:
        large = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
        same = (picture == large[0, 0]).all(-1)
        at = next(
            (y, x)
            for y, x in np.argwhere(same)
            if np.array_equal(picture[y : y + 8 * zoom, x : x + 8 * zoom], large)
        )
        found.append(at)
    (y, x), below = found[0], found[2]
    assert found[1] == (y, x + 8 * zoom + 2)
    assert below == (y + 8 * zoom + gallery.SPACE, x)
    assert (picture[:y] < 128).any()  # the names of the classes
    assert (picture[y:, :x] < 128).any()  # the titles


def test_names_that_the_font_has_no_letters_for(blocks_of):
    """The class's number stands there instead of boxes."""
    assert gallery.can_draw("Smileys & Emotion, no. 7")
    write_checkpoint("c.safetensors", class_names=["Emoji 🐱", "cat"])
    assert blocks_of("c.safetensors", "--out", "x.png")[1] == ["0", "cat"]
    for name in ("猫", "кот", "🐱"):
        assert not gallery.can_draw(name)


def test_gray_images():
    images = np.zeros((3, 8, 8, 1), np.uint8)
    assert gallery.draw([("gray", images)], ["0", "1", "2"]).mode == "RGB"


def test_the_first_ten_classes():
    header = dict(class_counts=[1] * 12, class_names=[f"c{i}" for i in range(12)])
    assert gallery.choose_classes(None, header, 12) == list(range(10))
    assert gallery.choose_classes("c11,3", header, 12) == [11, 3]
    assert gallery.choose_classes(None, dict(class_counts=[]), 0) == [0] * 10
    header["class_counts"][:4] = [0, 2, 0, 0]  # classes without an image are left out
    assert gallery.choose_classes(None, header, 12) == [1, *range(4, 12)]


def test_what_is_refused(two_networks):
    write_dataset("other", SHAPE, classes=CLASSES, train=30)
    write_checkpoint("other.safetensors", data="other")
    write_checkpoint("lost.safetensors", name="lost")
    write_checkpoint("latents.safetensors", vae="a VAE")
    out = ("--out", "x.png")
    assert "different data" in run("a.safetensors", "other.safetensors", *out)
    assert "data/lost" in run("lost.safetensors", "--nearest", *out)
    assert "other data" in run("a.safetensors", "--nearest", "--data", "data/other", *out)
    assert "latents" in run("latents.safetensors", "--nearest", *out)
    assert "--data goes with" in run("a.safetensors", "--data", "data/other", *out)
    assert "--nfe takes whole numbers" in run("a.safetensors", "--nfe", "1,x", *out)
    assert "2 numbers for 1" in run("a.safetensors", "--nfe", "1,2", *out)
    assert "--rows" in run("a.safetensors", "--rows", 0, *out)
    assert "--out takes a .png" in run("a.safetensors", "--out", "x.npz")
    assert run("a.safetensors", *out) is None
    with Image.open("x.png") as picture:
        assert picture.format == "PNG"
    assert "is there already" in run("a.safetensors", *out)
    assert run("a.safetensors", "--overwrite", *out) is None


def test_where_it_is_written(two_networks, monkeypatch):
    """A link stays. What cannot be written is told before the work."""
    os.mkdir("large")
    os.symlink("large/x.png", "x.png")
    for _ in range(2):
        assert run("a.safetensors", "--overwrite", "--out", "x.png") is None
        assert os.path.islink("x.png")
        assert os.listdir("large") == ["x.png"]
    os.mkdir("y.png" + PARTIAL)
    monkeypatch.setattr("model.load_model", None)
    assert "Is a directory: 'y.png'" in run("a.safetensors", "--out", "y.png")
