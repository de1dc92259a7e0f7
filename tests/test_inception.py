"""inception.py: the network against one written by hand, its resizing, its weights."""

import copy
import hashlib
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import F64, Calling, close, gpu, seeded_inception

import inception
from fid import FidError, Moments


def random_images(*shape):
    seeded = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, dtype=torch.uint8, generator=seeded)


# ---- names and shapes ----------------------------------------------------------------------------


def shapes_of_a(inputs, pool):
    return {
        "1x1": (64, inputs, 1, 1),
        "5x5_1": (48, inputs, 1, 1),
        "5x5_2": (64, 48, 5, 5),
        "3x3dbl_1": (64, inputs, 1, 1),
        "3x3dbl_2": (96, 64, 3, 3),
        "3x3dbl_3": (96, 96, 3, 3),
        "_pool": (pool, inputs, 1, 1),
    }


def shapes_of_c(width):
    return {
        "1x1": (192, 768, 1, 1),
        "7x7_1": (width, 768, 1, 1),
        "7x7_2": (width, width, 1, 7),
        "7x7_3": (192, width, 7, 1),
        "7x7dbl_1": (width, 768, 1, 1),
        "7x7dbl_2": (width, width, 7, 1),
        "7x7dbl_3": (width, width, 1, 7),
        "7x7dbl_4": (width, width, 7, 1),
        "7x7dbl_5": (192, width, 1, 7),
        "_pool": (192, 768, 1, 1),
    }


def shapes_of_e(inputs):
    return {
        "1x1": (320, inputs, 1, 1),
        "3x3_1": (384, inputs, 1, 1),
        "3x3_2a": (384, 384, 1, 3),
        "3x3_2b": (384, 384, 3, 1),
        "3x3dbl_1": (448, inputs, 1, 1),
        "3x3dbl_2": (384, 448, 3, 3),
        "3x3dbl_3a": (384, 384, 1, 3),
        "3x3dbl_3b": (384, 384, 3, 1),
        "_pool": (192, inputs, 1, 1),
    }


BLOCKS = {
    "Mixed_5b": shapes_of_a(192, 32),
    "Mixed_5c": shapes_of_a(256, 64),
    "Mixed_5d": shapes_of_a(288, 64),
    "Mixed_6a": {
        "3x3": (384, 288, 3, 3),
        "3x3dbl_1": (64, 288, 1, 1),
        "3x3dbl_2": (96, 64, 3, 3),
        "3x3dbl_3": (96, 96, 3, 3),
    },
    "Mixed_6b": shapes_of_c(128),
    "Mixed_6c": shapes_of_c(160),
    "Mixed_6d": shapes_of_c(160),
    "Mixed_6e": shapes_of_c(192),
    "Mixed_7a": {
        "3x3_1": (192, 768, 1, 1),
        "3x3_2": (320, 192, 3, 3),
        "7x7x3_1": (192, 768, 1, 1),
        "7x7x3_2": (192, 192, 1, 7),
        "7x7x3_3": (192, 192, 7, 1),
        "7x7x3_4": (192, 192, 3, 3),
    },
    "Mixed_7b": shapes_of_e(1280),
    "Mixed_7c": shapes_of_e(2048),
}


def test_the_published_names_and_shapes():
    shapes = {
        "Conv2d_1a_3x3": (32, 3, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3),
    }
    for block, convolutions in BLOCKS.items():
        for name, shape in convolutions.items():
            shapes[f"{block}.branch{name}"] = shape
    assert len(shapes) == 94
    expected = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in shapes.items():
        expected[f"{name}.conv.weight"] = shape
        expected[f"{name}.bn.num_batches_tracked"] = ()
        for part in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{name}.bn.{part}"] = shape[:1]
    net = inception.InceptionV3()
    assert {name: tuple(t.shape) for name, t in net.state_dict().items()} == expected
    # torchvision's has 23,834,568 without its auxiliary head, and 8 classes fewer.
    assert sum(p.numel() for p in net.parameters()) == 23_850_960


# ---- the function --------------------------------------------------------------------------------


class ByHand:
    """Convolutions of a network, or of one block, with their batch norm written out."""

    def __init__(self, net, block=None):
        self.net = net
        self.prefix = f"{block}.branch" if block else ""

    def __call__(self, name, x, stride=1, padding=(0, 0)):
        state = self.net.get_submodule(self.prefix + name).state_dict()
        y = F.conv2d(x, state["conv.weight"], stride=stride, padding=padding)  # (N, C, H, W)
        mean, variance, weight, bias = (
            state[f"bn.{key}"].view(-1, 1, 1)
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return ((y - mean) / (variance + 1e-3).sqrt() * weight + bias).clamp(min=0)

    def chain(self, x, *steps):
        """steps: (name, keyword arguments), one after the other."""
        for name, options in steps:
            x = self(name, x, **options)
        return x


def windows(x):
    """(N, C, H, W) -> (N, C, 9, H, W): the 3 x 3 places around each, zero beyond the edge."""
    return F.unfold(x, 3, padding=1).view(len(x), x.shape[1], 9, *x.shape[2:])


def average(x):
    """The mean of the pixels that are there."""
    there = windows(torch.ones(1, 1, *x.shape[2:], dtype=x.dtype))
    return windows(x).sum(2) / there.sum(2)


def largest(x):
    return windows(x + 9).amax(2) - 9  # all of them are above -9


def largest_of_every_second(x):
    return x.unfold(2, 3, 2).unfold(3, 3, 2).amax((-1, -2))


@pytest.fixture(scope="module")
def double_net():
    return copy.deepcopy(seeded_inception()).double()


def places(channels):
    return torch.rand(2, channels, 9, 9, dtype=F64, generator=torch.Generator().manual_seed(0))


PLAIN = {}
PADDED = {"padding": 1}
HALVING = {"stride": 2}


def test_block_a(double_net):
    c, x = ByHand(double_net, "Mixed_5b"), places(192)
    branches = [
        c("1x1", x),
        c.chain(x, ("5x5_1", PLAIN), ("5x5_2", {"padding": 2})),
        c.chain(x, ("3x3dbl_1", PLAIN), ("3x3dbl_2", PADDED), ("3x3dbl_3", PADDED)),
        c("_pool", average(x)),
    ]
    close(double_net.Mixed_5b(x), torch.cat(branches, 1), 1e-12)


def test_block_b(double_net):
    c, x = ByHand(double_net, "Mixed_6a"), places(288)
    branches = [
        c("3x3", x, **HALVING),
        c.chain(x, ("3x3dbl_1", PLAIN), ("3x3dbl_2", PADDED), ("3x3dbl_3", HALVING)),
        largest_of_every_second(x),
    ]
    close(double_net.Mixed_6a(x), torch.cat(branches, 1), 1e-12)


def test_block_c(double_net):
    c, x = ByHand(double_net, "Mixed_6c"), places(768)
    row, column = {"padding": (0, 3)}, {"padding": (3, 0)}
    double = c.chain(
        x,
        ("7x7dbl_1", PLAIN),
        ("7x7dbl_2", column),
        ("7x7dbl_3", row),
        ("7x7dbl_4", column),
        ("7x7dbl_5", row),
    )
    branches = [
        c("1x1", x),
        c.chain(x, ("7x7_1", PLAIN), ("7x7_2", row), ("7x7_3", column)),
        double,
        c("_pool", average(x)),
    ]
    close(double_net.Mixed_6c(x), torch.cat(branches, 1), 1e-12)


def test_block_d(double_net):
    c, x = ByHand(double_net, "Mixed_7a"), places(768)
    row, column = {"padding": (0, 3)}, {"padding": (3, 0)}
    branches = [
        c.chain(x, ("3x3_1", PLAIN), ("3x3_2", HALVING)),
        c.chain(x, ("7x7x3_1", PLAIN), ("7x7x3_2", row), ("7x7x3_3", column), ("7x7x3_4", HALVING)),
        largest_of_every_second(x),
    ]
    close(double_net.Mixed_7a(x), torch.cat(branches, 1), 1e-12)


@pytest.mark.parametrize(
    "block, channels, pool", [("Mixed_7b", 1280, average), ("Mixed_7c", 2048, largest)]
)
def test_block_e(double_net, block, channels, pool):
    c, x = ByHand(double_net, block), places(channels)
    row, column = {"padding": (0, 1)}, {"padding": (1, 0)}
    three = c("3x3_1", x)
    double = c.chain(x, ("3x3dbl_1", PLAIN), ("3x3dbl_2", PADDED))
    branches = [
        c("1x1", x),
        c("3x3_2a", three, **row),
        c("3x3_2b", three, **column),
        c("3x3dbl_3a", double, **row),
        c("3x3dbl_3b", double, **column),
        c("_pool", pool(x)),
    ]
    close(double_net.get_submodule(block)(x), torch.cat(branches, 1), 1e-12)


def test_as_a_whole():
    net = seeded_inception()
    c = ByHand(net)
    images = random_images(1, 3, 20, 30)
    x = c("Conv2d_1a_3x3", inception.resized(images, "tf1"), **HALVING)
    x = c("Conv2d_2a_3x3", x)
    x = F.max_pool2d(c("Conv2d_2b_3x3", x, **PADDED), 3, 2)
    x = c("Conv2d_3b_1x1", x)
    x = F.max_pool2d(c("Conv2d_4a_3x3", x), 3, 2)
    for block in BLOCKS:
        x = net.get_submodule(block)(x)
    assert x.shape == (1, 2048, 8, 8)
    features = net(images)
    close(features, x.sum((2, 3)) / 64, 1e-5)
    close(net.logits_of(features), features @ net.fc.weight.T, 1e-5)


def test_refuses_what_are_no_images():
    net, images = seeded_inception(), random_images(1, 3, 20, 30)
    for wrong in (images.float(), images[:, :1], images[0]):
        with pytest.raises(FidError, match="uint8"):
            net(wrong)
    with pytest.raises(FidError, match="tf1 or torch"):
        net(images, "bicubic")


# ---- resizing ------------------------------------------------------------------------------------


def resized_as_tensorflow_1(image):
    """(3, H, W) -> (3, 299, 299), float32, pixel by pixel, each product rounded as there."""
    f32 = np.float32
    _, height, width = image.shape
    expected = np.empty((3, 299, 299), f32)
    rows = np.arange(299, dtype=f32) * (f32(height) / f32(299))
    columns = np.arange(299, dtype=f32) * (f32(width) / f32(299))
    for i, row in enumerate(rows):
        top = int(row)
        bottom = min(top + 1, height - 1)
        for j, column in enumerate(columns):
            left = int(column)
            right = min(left + 1, width - 1)
            along = column - f32(left)
            above = image[:, top, left] + (image[:, top, right] - image[:, top, left]) * along
            below = (
                image[:, bottom, left] + (image[:, bottom, right] - image[:, bottom, left]) * along
            )
            expected[:, i, j] = above + (below - above) * (row - f32(top))
    return expected


def test_tf1_resizing_is_tensorflows_to_the_last_bit():
    images = random_images(1, 3, 5, 400)
    expected = resized_as_tensorflow_1(images[0].numpy().astype(np.float32))
    got = inception.resized(images, "tf1")[0]
    assert torch.equal(got, torch.from_numpy((expected - 128) / 128))


def test_resizing_a_ramp():
    ramp = (40 * torch.arange(6, dtype=torch.uint8)).view(1, 1, 6, 1).expand(2, 3, 6, 4)
    place = torch.arange(299, dtype=F64)
    # tf1: straight, and flat at the end.
    column = inception.resized(ramp, "tf1")[1, 2, :, 7].double()
    close(column * 128 + 128, 40 * (place * 6 / 299).clamp(max=5), 1e-6)
    # torch: between the centres of pixels.
    column = inception.resized(ramp, "torch")[1, 2, :, 7].double()
    close((column + 1) * 127.5, 40 * ((place + 0.5) * 6 / 299 - 0.5).clamp(0, 5), 1e-6)


def test_resizing_to_the_same_size():
    same = random_images(1, 3, 299, 299)
    assert torch.equal(inception.resized(same, "tf1"), (same.float() - 128) / 128)
    close(inception.resized(same, "torch"), same.float() / 255 * 2 - 1, 1e-6)


# ---- weights -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The path of a file of weights, without the counts of batches, as some have them."""
    state = seeded_inception().state_dict()
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save({name: t for name, t in state.items() if not name.endswith("tracked")}, path)
    return str(path)


def test_loading(weights):
    loaded = inception.load_inception(weights)
    images = random_images(2, 3, 40, 40)
    close(loaded(images), seeded_inception()(images), 1e-5)
    # Batch norm is in the convolutions now.
    assert not loaded.training
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in loaded.modules())


def test_weights_that_do_not_fit(folder):
    state = seeded_inception().state_dict()
    first = "Conv2d_1a_3x3.conv.weight"
    without = {name: t for name, t in state.items() if name != first}
    for tensors, word in (
        (without, f"only the network has {first}"),
        ({**state, "AuxLogits.fc.weight": torch.zeros(1)}, "only the file has Aux"),
        ({**state, first: state[first][:, :1]}, first),
        ({**state, first: state[first].half()}, first),
    ):
        torch.save(tensors, "bad.pth")
        with pytest.raises(FidError, match=word):
            inception.load_inception("bad.pth")


def test_files_that_are_no_weights(folder):
    torch.save({"a": Calling(os.system, "touch ran")}, "os.pth")
    for bad in ("os.pth", "gone.pth"):
        with pytest.raises(FidError, match="cannot read " + bad) as error:
            inception.load_inception(bad)
        assert "\n" not in str(error.value)
    assert os.listdir() == ["os.pth"]


def test_the_download(folder, monkeypatch, weights):
    """From a file: URL, into torch.hub's folder."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: os.path.join(folder, "hub"))
    monkeypatch.setattr(inception, "URL", "file://" + weights)
    with pytest.raises(FidError, match="invalid hash"):
        inception.load_inception()
    assert os.listdir("hub/checkpoints") == []
    with open(weights, "rb") as f:
        monkeypatch.setattr(inception, "SHA256", hashlib.sha256(f.read()).hexdigest())
    assert inception.load_inception().digest == inception.SHA256
    assert os.listdir("hub/checkpoints") == ["w.pth"]
    monkeypatch.setattr(inception, "URL", "file:///nowhere/w.pth")
    inception.load_inception()  # from the folder
    with open("hub/checkpoints/w.pth", "ab") as f:
        f.write(b"x")
    with pytest.raises(FidError, match="delete it"):
        inception.load_inception()


# ---- on a GPU ------------------------------------------------------------------------------------


def gpu_settings():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return cudnn.conv.fp32_precision, matmul.fp32_precision, cudnn.benchmark


@gpu
@pytest.mark.parametrize("resize", ["tf1", "torch"])
def test_inception_on_a_gpu_is_the_cpus(resize):
    net, images = seeded_inception(), random_images(4, 3, 64, 80)
    expected = net(images, resize)
    logits = net.logits_of(expected)
    before = gpu_settings()
    for on_gpu in (copy.deepcopy(net).cuda(), copy.deepcopy(net).fold().cuda()):
        got = on_gpu(images.cuda(), resize)
        close(got.cpu(), expected, 1e-5)
        close(on_gpu.logits_of(got).cpu(), logits, 1e-5)
    assert gpu_settings() == before
    moments = Moments(2048)
    moments.add(on_gpu(images.cuda(), resize))
    moments.add(expected.cuda())
    moments.add(expected.cuda())
    assert moments.scatter.is_cuda
    mean, _ = moments.mean_and_covariance()
    assert np.allclose(mean, expected.double().mean(0), atol=1e-4)
