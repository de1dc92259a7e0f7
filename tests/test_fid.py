"""..."""
import contextlib
import copy
import glob
import hashlib
import io
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import zlib

import inception
import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from helpers import (
    F64,
    GREEDY,
    HERE,
    SMALL_FID,
    close,
    gpu,
    randn,
    seeded_inception,
    torchrun,
    write_picture,
)
from PIL import Image

import fid
import images
import inception
import scores
import shapes


def covariance(D, rank, seed):
    A = randn(D, rank, seed=seed)
    return A @ A.T / rank


def test_frechet_distance_closed_forms():
    D, eye = 6, torch.eye(6, dtype=F64)
    mu, sigma = randn(D), covariance(D, D, 0)
    assert abs(fid.frechet_distance(mu, sigma, mu, sigma)) < 1e-12
    assert abs(fid.frechet_distance(mu, sigma, mu + 2, sigma) - 4 * D) < 1e-12
    assert abs(fid.frechet_distance(mu, sigma, mu, 9 * sigma) - 4 * sigma.trace()) < 1e-12
    a, b = torch.arange(D, dtype=F64), torch.arange(D, dtype=F64).flip(0)       # commuting and singular
    Q = torch.linalg.qr(randn(D, D))[0]
    assert abs(fid.frechet_distance(mu, Q * a @ Q.T, mu, Q * b @ Q.T) - (a.sqrt() - b.sqrt()).square().sum()) < 1e-12
    assert abs(fid.frechet_distance(mu, 0 * eye, mu, eye) - D) < 1e-12


def test_frechet_distance_against_scipy():
    a, b, D = covariance(64, 100, 0), covariance(64, 100, 1), 64
    expected = (a + b).trace().item() - 2 * np.trace(scipy.linalg.sqrtm((a @ b).numpy()).real)
    assert abs(fid.frechet_distance(torch.zeros(D), a, torch.zeros(D), b) - expected) < 1e-9
    low = covariance(D, 10, 2)                                        # rank 10: the square root is A A^T's own
    assert abs(fid.frechet_distance(torch.zeros(D), low, torch.zeros(D), low)) < 1e-12
    A, B = randn(D, 10, seed=2), randn(D, 10, seed=3)
    expected = (low.trace() + covariance(D, 10, 3).trace() - 2 * torch.linalg.svdvals(A.T @ B).sum() / 10).item()
    assert abs(fid.frechet_distance(torch.zeros(D), low, torch.zeros(D), covariance(D, 10, 3)) - expected) < 1e-9
    for wrong in (torch.zeros(3), torch.full((D,), math.nan)):
        with pytest.raises(ValueError, match="frechet_distance"):
            fid.frechet_distance(wrong, low, torch.zeros(D), low)


def test_moments():
    x = randn(50, 2, 3)
    mu, sigma = scores.moments(x)
    assert np.allclose(mu, x.flatten(1).numpy().mean(0)) and np.allclose(sigma, np.cov(x.flatten(1).numpy().T))
    mu, sigma = scores.moments(randn(4000, 5, seed=8))
    assert fid.frechet_distance(mu, sigma, torch.zeros(5), torch.eye(5)) < 5 * 2 * 5 / 4000


def test_small_data_scores():
    a, b, far = (randn(600, 4, seed=i, dtype=torch.float32) for i in range(3))
    far = far + 100
    assert scores.two_sample_accuracy(a, a.clone()) == 0                 # every image's nearest is its copy
    assert scores.two_sample_accuracy(a, far) == 1
    assert abs(scores.two_sample_accuracy(a, b) - 0.5) < 4 * 0.5 / math.sqrt(1200)
    assert scores.nearest_ratio(a, b, a) == 0                            # memorized
    assert scores.nearest_ratio(b, b, a) == 1
    assert abs(scores.nearest_ratio(a[:300], b[:300], torch.cat([b[300:], a[300:]])) - 1) < 0.15
    labels = (a[:, 0] > 0).long()
    assert scores.label_accuracy(a, labels, a, labels) == 1 and scores.label_accuracy(a, 1 - labels, a, labels) == 0
    assert scores.label_accuracy(a, labels, a, labels, leave_out=torch.arange(600)) < 1
    assert scores.nearest_ratio(a, b, a, leave_out=torch.arange(600)) > 0.8
    d, i = scores.nearest_neighbours(b, a, rows=77)
    brute = np.linalg.norm(b.numpy()[:, None] - a.numpy()[None], axis=2)
    assert np.allclose(d, brute.min(1), atol=1e-5) and (i.numpy() == brute.argmin(1)).all()
    with pytest.raises(ValueError, match="one size"):
        scores.two_sample_accuracy(a, b[:5])


def test_classifier_learns():
    images = np.stack([shapes.draw_shape(10 * (i // 2) + 5 * (i % 2), size=16) for i in range(400)])   # disks and bars
    labels = np.arange(400) % 2
    net = scores.train_classifier(images[:300], labels[:300], 2, "cpu", epochs=12, batch=50)
    assert (scores.classify(net, images[300:]).numpy() == labels[300:]).mean() > 0.9


def test_inception_has_the_published_names_and_shapes():
    shapes = {"Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3), "Conv2d_2b_3x3": (64, 32, 3, 3),
              "Conv2d_3b_1x1": (80, 64, 1, 1), "Conv2d_4a_3x3": (192, 80, 3, 3)}
    add = lambda block, **convolutions: shapes.update({f"{block}.branch{name}": shape for name, shape in convolutions.items()})
    for block, i, pool in ("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64):
        add(block, **{"1x1": (64, i, 1, 1), "5x5_1": (48, i, 1, 1), "5x5_2": (64, 48, 5, 5), "3x3dbl_1": (64, i, 1, 1),
                      "3x3dbl_2": (96, 64, 3, 3), "3x3dbl_3": (96, 96, 3, 3), "_pool": (pool, i, 1, 1)})
    add("Mixed_6a", **{"3x3": (384, 288, 3, 3), "3x3dbl_1": (64, 288, 1, 1), "3x3dbl_2": (96, 64, 3, 3), "3x3dbl_3": (96, 96, 3, 3)})
    for block, c in ("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192):
        add(block, **{"1x1": (192, 768, 1, 1), "7x7_1": (c, 768, 1, 1), "7x7_2": (c, c, 1, 7), "7x7_3": (192, c, 7, 1),
                      "7x7dbl_1": (c, 768, 1, 1), "7x7dbl_2": (c, c, 7, 1), "7x7dbl_3": (c, c, 1, 7), "7x7dbl_4": (c, c, 7, 1),
                      "7x7dbl_5": (192, c, 1, 7), "_pool": (192, 768, 1, 1)})
    add("Mixed_7a", **{"3x3_1": (192, 768, 1, 1), "3x3_2": (320, 192, 3, 3), "7x7x3_1": (192, 768, 1, 1), "7x7x3_2": (192, 192, 1, 7),
                       "7x7x3_3": (192, 192, 7, 1), "7x7x3_4": (192, 192, 3, 3)})
    for block, i in ("Mixed_7b", 1280), ("Mixed_7c", 2048):
        add(block, **{"1x1": (320, i, 1, 1), "3x3_1": (384, i, 1, 1), "3x3_2a": (384, 384, 1, 3), "3x3_2b": (384, 384, 3, 1),
                      "3x3dbl_1": (448, i, 1, 1), "3x3dbl_2": (384, 448, 3, 3), "3x3dbl_3a": (384, 384, 1, 3),
                      "3x3dbl_3b": (384, 384, 3, 1), "_pool": (192, i, 1, 1)})
    expected = {f"{name}.conv.weight": shape for name, shape in shapes.items()} | {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in shapes.items():
        expected |= {f"{name}.bn.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")}
        expected[f"{name}.bn.num_batches_tracked"] = ()
    net = inception.InceptionV3()
    assert {name: tuple(t.shape) for name, t in net.state_dict().items()} == expected and len(shapes) == 94
    assert sum(p.numel() for p in net.parameters()) == 23_850_960     # torchvision's 23,834,568 without auxiliary head, 8 more classes


def inception_by_hand(net, name, x, *, stride=1, padding=(0, 0)):
    """One convolution, its batch norm written out."""
    w = {key: t.view(-1, 1, 1) if t.ndim == 1 else t for key, t in net.get_submodule(name).state_dict().items()}
    y = F.conv2d(x, w["conv.weight"], stride=stride, padding=padding)
    return ((y - w["bn.running_mean"]) / (w["bn.running_var"] + 1e-3).sqrt() * w["bn.weight"] + w["bn.bias"]).clamp(min=0)


def test_inception_blocks():
    net = copy.deepcopy(seeded_inception()).double()
    x = {n: torch.rand(2, n, 9, 9, dtype=F64) for n in (192, 288, 768, 1280, 2048)}
    ones = torch.ones(1, 1, 9, 9, dtype=F64)
    window = lambda x: F.unfold(x, 3, padding=1).view(len(x), x.shape[1], 9, *x.shape[2:])
    average = lambda x: window(x).sum(2) / window(ones).sum(2)                    # of the pixels that are there
    largest = lambda x: window(x + 9).amax(2) - 9                                 # all of them are above -9
    thirds = lambda x: x.unfold(2, 3, 2).unfold(3, 3, 2).amax((-1, -2))
    c = lambda name, x, **kw: inception_by_hand(net, name, x, **kw)
    b = "Mixed_5b.branch"
    close(net.Mixed_5b(x[192]), torch.cat([
        c(b + "1x1", x[192]), c(b + "5x5_2", c(b + "5x5_1", x[192]), padding=2),
        c(b + "3x3dbl_3", c(b + "3x3dbl_2", c(b + "3x3dbl_1", x[192]), padding=1), padding=1), c(b + "_pool", average(x[192]))], 1), 1e-12)
    b = "Mixed_6a.branch"
    close(net.Mixed_6a(x[288]), torch.cat([
        c(b + "3x3", x[288], stride=2), c(b + "3x3dbl_3", c(b + "3x3dbl_2", c(b + "3x3dbl_1", x[288]), padding=1), stride=2),
        thirds(x[288])], 1), 1e-12)
    b, wide, tall = "Mixed_6c.branch", dict(padding=(0, 3)), dict(padding=(3, 0))
    y = c(b + "7x7dbl_3", c(b + "7x7dbl_2", c(b + "7x7dbl_1", x[768]), **tall), **wide)
    close(net.Mixed_6c(x[768]), torch.cat([
        c(b + "1x1", x[768]), c(b + "7x7_3", c(b + "7x7_2", c(b + "7x7_1", x[768]), **wide), **tall),
        c(b + "7x7dbl_5", c(b + "7x7dbl_4", y, **tall), **wide), c(b + "_pool", average(x[768]))], 1), 1e-12)
    b = "Mixed_7a.branch"
    y = c(b + "7x7x3_3", c(b + "7x7x3_2", c(b + "7x7x3_1", x[768]), **wide), **tall)
    close(net.Mixed_7a(x[768]), torch.cat([c(b + "3x3_2", c(b + "3x3_1", x[768]), stride=2), c(b + "7x7x3_4", y, stride=2), thirds(x[768])], 1), 1e-12)
    for block, n, pool in (net.Mixed_7b, 1280, average), (net.Mixed_7c, 2048, largest):
        b, wide, tall = f"Mixed_7{'bc'[n == 2048]}.branch", dict(padding=(0, 1)), dict(padding=(1, 0))
        one, two = c(b + "3x3_1", x[n]), c(b + "3x3dbl_2", c(b + "3x3dbl_1", x[n]), padding=1)
        close(block(x[n]), torch.cat([
            c(b + "1x1", x[n]), c(b + "3x3_2a", one, **wide), c(b + "3x3_2b", one, **tall), c(b + "3x3dbl_3a", two, **wide),
            c(b + "3x3dbl_3b", two, **tall), c(b + "_pool", pool(x[n]))], 1), 1e-12)


def test_inception_as_a_whole():
    net, images = seeded_inception(), torch.randint(256, (1, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = inception.resized(images, "tf1")
    x = inception_by_hand(net, "Conv2d_2a_3x3", inception_by_hand(net, "Conv2d_1a_3x3", x, stride=2))
    x = F.max_pool2d(inception_by_hand(net, "Conv2d_2b_3x3", x, padding=1), 3, 2)
    x = F.max_pool2d(inception_by_hand(net, "Conv2d_4a_3x3", inception_by_hand(net, "Conv2d_3b_1x1", x)), 3, 2)
    for block in "5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split():
        x = net.get_submodule("Mixed_" + block)(x)
    assert x.shape == (1, 2048, 8, 8)
    features, logits = net(images, logits=True)
    close(features, x.sum((2, 3)) / 64, 1e-5), close(logits, features @ net.fc.weight.T, 1e-5)
    for wrong in (images.float(), images[:, :1], images[0]):
        with pytest.raises(fid.FidError, match="uint8"):
            net(wrong)
    with pytest.raises(fid.FidError, match="tf1 or torch"):
        net(images, "bicubic")


def test_resizes():
    images = torch.randint(256, (1, 3, 5, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    a, f32 = images[0].numpy().astype(np.float32), np.float32
    rows, columns = (np.arange(299, dtype=f32) * (f32(n) / f32(299)) for n in (5, 400))
    expected = np.empty((3, 299, 299), f32)
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            top, left = int(r), int(c)
            bottom, right, down, along = min(top + 1, 4), min(left + 1, 399), r - f32(top), c - f32(left)
            above, below = (a[:, row, left] + (a[:, row, right] - a[:, row, left]) * along for row in (top, bottom))
            expected[:, i, j] = above + (below - above) * down
    assert torch.equal(inception.resized(images, "tf1")[0], torch.from_numpy((expected - 128) / 128))       # to the last bit
    ramp = (40 * torch.arange(6, dtype=torch.uint8)).view(1, 1, 6, 1).expand(2, 3, 6, 4)
    expected = 40 * (torch.arange(299, dtype=F64) * 6 / 299).clamp(max=5)         # straight, and flat at the end
    close(inception.resized(ramp, "tf1")[1, 2, :, 7].double() * 128 + 128, expected, 1e-6)
    expected = 40 * ((torch.arange(299, dtype=F64) + 0.5) * 6 / 299 - 0.5).clamp(0, 5)                # pixels' centres
    close((inception.resized(ramp, "torch")[1, 2, :, 7].double() + 1) * 127.5, expected, 1e-6)
    same = torch.randint(256, (1, 3, 299, 299), dtype=torch.uint8)
    assert torch.equal(inception.resized(same, "tf1"), (same.float() - 128) / 128)
    close(inception.resized(same, "torch"), same.float() / 255 * 2 - 1, 1e-6)


def test_moments_of_batches():
    x = randn(1000, 6, seed=5) * torch.arange(1, 7) + 1e5
    mean, sigma = x.numpy().mean(0), np.cov(x.numpy().T)
    one, parts, again = fid.Moments(6), fid.Moments(6), fid.Moments(6)
    one.add(x)
    for part in x.split([1, 0, 300, 2, 697]):
        parts.add(part)
    again.add(x[:400])
    rest = fid.Moments(6)
    rest.merge(**{key: np.array(value) for key, value in again.state().items()})           # as a file would give it
    rest.add(x[400:])
    for m_ in (one, parts, rest):
        assert np.allclose(m_.mean_and_covariance()[0], mean, rtol=1e-14) and np.allclose(m_.mean_and_covariance()[1], sigma, rtol=1e-11, atol=1e-9)
    wide = fid.Moments(2048)
    for wide.n, word in (2048, " (too few images: 2048 <= 2048)"), (2049, ""):
        assert wide.few() == word and one.few() == ""
    with pytest.raises(fid.FidError, match="at least 2"):
        fid.Moments(6).mean_and_covariance()
    with pytest.raises(fid.FidError, match=r"\(B, 6\)"):
        one.add(x[:, :5])


def test_frechet_distance_at_512_dimensions(monkeypatch):
    D = 512
    a, b = covariance(D, 2000, 0) * torch.logspace(0, -4, D, dtype=F64), covariance(D, 2000, 1)
    a = (a + a.T) / 2 + torch.eye(D, dtype=F64)
    mu = randn(D)
    expected = mu.square().sum() + (a + b).trace() - 2 * np.trace(scipy.linalg.sqrtm((a @ b).numpy()).real)
    assert abs(fid.frechet_distance(mu, a, torch.zeros(D), b) / expected - 1) < 1e-6
    low = covariance(D, 100, 2)                                                            # rank 100, and one of full rank
    expected = low.trace() + D - 2 * (torch.linalg.svdvals(randn(D, 100, seed=2)) / 10).sum()
    monkeypatch.setattr(torch.linalg, "eigh", None)                                        # slow, and not needed: one has a Cholesky factor
    assert abs(fid.frechet_distance(mu, low, mu, torch.eye(D)) / expected - 1) < 1e-6
    assert abs(fid.frechet_distance(mu, torch.eye(D), mu, low) / expected - 1) < 1e-6
    expected = (low + b).trace() - 2 * np.trace(scipy.linalg.sqrtm((low @ b).numpy()).real)
    assert abs(fid.frechet_distance(mu, low, mu, b) / expected - 1) < 1e-6


def test_inception_score():
    sure = 1e3 * F.one_hot(torch.arange(1000) % 20, 1008)
    assert np.allclose(fid.inception_score(sure, splits=1), (20, 0)) and np.allclose(fid.inception_score(torch.zeros(50, 1008)), (1, 0))
    logits = randn(95, 1008)
    order, p, scores = np.random.default_rng(0).permutation(95), scipy.special.softmax(logits.numpy(), 1), []
    for rows in np.array_split(order, 10):
        scores.append(np.exp(np.mean([scipy.stats.entropy(p[i], p[rows].mean(0)) for i in rows])))
    assert np.allclose(fid.inception_score(logits), (np.mean(scores), np.std(scores)))


def test_precision_and_recall():
    a, b = randn(60, 3, seed=1).numpy(), 1.5 * randn(45, 3, seed=2).numpy() + 0.5
    distance = lambda x, y: np.linalg.norm(x[:, None] - y[None], axis=2)
    inside = lambda x, y: (distance(x, y) <= np.sort(distance(y, y), 1)[:, 3]).any(1).mean()          # the first is itself
    for size in (2 ** 25, 100):
        assert fid.precision_recall(torch.tensor(a), torch.tensor(b), size=size) == pytest.approx((inside(a, b), inside(b, a)))
    assert 0 < inside(b, a) < 1
    a = torch.tensor(a)
    assert fid.precision_recall(a, a) == (1, 1) and fid.precision_recall(a, a + 100) == (0, 0)
    with pytest.raises(fid.FidError, match="more than 3"):
        fid.precision_recall(a, a[:3])


class Malicious:
    def __init__(self, what, *arguments):
        self.what = what, arguments

    def __reduce__(self):
        return self.what




def test_statistics(folder):
    mu, sigma = randn(5).numpy(), covariance(5, 9, 0).numpy()
    np.savez("a.npz", mu=mu, sigma=sigma, mu_s=mu)
    good = {"fid": {"mu": mu, "sigma": np.asfortranarray(sigma)}, "fd_dinov2": {"mu": mu[:2]}, "n": np.float64(3)}
    for name, content in {"a.pkl": pickle.dumps(good, 4), "b.pkl": pickle.dumps(good["fid"], 3),
                          "c.pkl": pickle.dumps(good, 3).replace(b"numpy._core.multi", b"numpy.core.multi"), "d.pkl": pickle.dumps(good, 5)}.items():
        with open(name, "wb") as f:
            f.write(content)
    for name in ("a.npz", "a.pkl", "b.pkl", "c.pkl", "d.pkl"):
        got = fid.read_statistics(name)
        assert all((g == w).all() and g.dtype == np.float64 for g, w in zip(got, (mu, sigma))), name
    np.savez("float32.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))
    assert np.allclose(fid.read_statistics("float32.npz")[1], sigma, rtol=1e-6)

    bad = {"os.pkl": (Malicious(os.system, "touch ran"), "system"), "eval.pkl": (Malicious(eval, "open('ran', 'w')"), "builtins.eval"),
           "in.pkl": ({"fid": {"mu": mu, "sigma": sigma, "x": Malicious(np.fromfile, "a.npz")}}, "fromfile"),
           "torch.pkl": (torch.zeros(1), "torch"), "list.pkl": ([1, 2], "cannot read list.pkl"), "text.pkl": ({"fid": {"mu": "a"}}, "cannot read text.pkl"),
           "object.pkl": ({"mu": np.array([None]), "sigma": sigma}, "cannot read object.pkl"),
           "int5.pkl": (pickle.dumps({"mu": np.arange(5), "sigma": sigma}, 5), "cannot read int5.pkl: KeyError: 'i8'"),
           **{f"{i}.pkl": (content, re.escape(word)) for i, (word, content) in enumerate(GREEDY.items())}}
    for name, (content, word) in bad.items():
        with open(name, "wb") as f:
            f.write(content if isinstance(content, bytes) else pickle.dumps(content, 4))
        with pytest.raises(fid.FidError, match=word) as error:
            fid.read_statistics(name)
        assert "\n" not in str(error.value) and not os.path.exists("ran"), name
    for name, content in {"cut.npz": open("a.npz", "rb").read()[:300], "cut.pkl": open("a.pkl", "rb").read()[:300], "text.npz": b"hello"}.items():
        with open(name, "wb") as f:
            f.write(content)
    for name, arrays in {"no.npz": dict(a=mu), "nan.npz": dict(mu=mu * np.nan, sigma=sigma), "askew.npz": dict(mu=mu, sigma=sigma + np.triu(sigma)), "minus.npz": dict(mu=mu, sigma=-np.eye(5)),
                         "small.npz": dict(mu=mu, sigma=sigma[:4]), "object.npz": dict(mu=np.array([None]), sigma=sigma),
                         "text2.npz": dict(mu=mu, sigma=sigma.astype(str))}.items():
        np.savez(name, **arrays)
    for name in ("cut.npz", "cut.pkl", "text.npz", "no.npz", "nan.npz", "askew.npz", "minus.npz", "small.npz", "object.npz", "text2.npz", "gone.npz", "gone.pkl"):
        with pytest.raises(fid.FidError, match=name):
            fid.read_statistics(name)


def test_inception_weights(folder, monkeypatch):
    net = seeded_inception()
    state = net.state_dict()
    torch.save({name: t for name, t in state.items() if not name.endswith("tracked")}, "w.pth")
    loaded = inception.load_inception("w.pth")
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    close(loaded(images), net(images), 1e-5)                                                   # batch norm is in the convolutions
    assert not loaded.training and not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in loaded.modules())
    first = "Conv2d_1a_3x3.conv.weight"
    for change, word in (({first: None}, "only the network has " + first), ({"AuxLogits.fc.weight": torch.zeros(1)}, "only the file has Aux"),
                         ({first: state[first][:, :1]}, first), ({first: state[first].half()}, first)):
        torch.save({name: t for name, t in {**state, **change}.items() if t is not None}, "bad.pth")
        with pytest.raises(fid.FidError, match=word):
            inception.load_inception("bad.pth")
    torch.save({"a": Malicious(os.system, "touch ran")}, "os.pth")
    for bad in ("os.pth", "gone.pth"):
        with pytest.raises(fid.FidError, match="cannot read " + bad) as error:
            inception.load_inception(bad)
        assert "\n" not in str(error.value) and not os.path.exists("ran")
    # the download, from here
    monkeypatch.setattr(torch.hub, "get_dir", lambda: os.path.join(folder, "hub"))
    monkeypatch.setattr(fid, "URL", "file://" + os.path.abspath("w.pth"))
    with pytest.raises(fid.FidError, match="invalid hash"):
        inception.load_inception()
    assert os.listdir("hub/checkpoints") == []
    monkeypatch.setattr(fid, "SHA256", hashlib.sha256(open("w.pth", "rb").read()).hexdigest())
    assert inception.load_inception().digest == inception.SHA256 and os.listdir("hub/checkpoints") == ["w.pth"]
    monkeypatch.setattr(fid, "URL", "file:///nowhere/w.pth")
    inception.load_inception()                                                                   # from the folder
    with open("hub/checkpoints/w.pth", "ab") as f:
        f.write(b"x")
    with pytest.raises(fid.FidError, match="delete it"):
        inception.load_inception()




@pytest.fixture
def small_fid(folder, monkeypatch):
    """Weights, two sets of images, a network of one layer, and a distance that takes no minute at 2048 dimensions."""
    for owner, name in ((inception.InceptionV3, "forward"), (fid, "frechet_distance"), (fid, "load_inception")):
        monkeypatch.setattr(owner, name, getattr(owner, name))                             # put back afterwards
    exec(SMALL_FID, {})
    torch.save(seeded_inception().state_dict(), "w.pth")
    images = np.random.default_rng(0).integers(256, size=(22, 20, 24, 3), dtype=np.uint8)
    os.makedirs("a/below")
    for i in range(12):
        Image.fromarray(images[i]).save(f"a/{'below/' * (i > 8)}{i:02}.png")
    np.savez("a.npz", arr_0=images[:12])
    np.savez_compressed("b.npz", arr_0=images[12:])
    return images


def fid_main(*arguments):
    """What it prints; its one line of complaint."""
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            fid.main([*map(str, arguments), "--inception=w.pth", "--batch=5"])
        return out.getvalue()
    except (fid.FidError, SystemExit) as error:
        assert "\n" not in str(error)
        return str(error)


def test_fid_command(small_fid, capfd):
    numbers = lambda text: [float(x) for x in re.findall(r"(?:FID|Score|precision|recall) ([-\d.e]+)", text)]
    of_folder, of_npz = fid_main("a", "b.npz"), fid_main("a.npz", "b.npz")
    assert numbers(of_folder) == pytest.approx(numbers(of_npz), rel=1e-5) and len(numbers(of_npz)) == 4, of_npz
    assert "12 images for 2048 dimensions: the covariance is rank deficient" in capfd.readouterr().err
    assert " (too few images: 12 <= 2048) (too few images: 10 <= 2048)\n" in of_npz and "seed 0; too few images: 12 <= 10 x" in of_npz
    images = torch.from_numpy(small_fid).permute(0, 3, 1, 2)
    features = inception.load_inception("w.pth")(images)
    moments = [(x.numpy().mean(0), np.cov(x.numpy().T)) for x in features.double().split([12, 10])]
    assert numbers(of_npz)[0] == pytest.approx(fid.frechet_distance(*moments[0], *moments[1]), rel=1e-4)
    assert numbers(of_npz)[2:] == pytest.approx(fid.precision_recall(features[:12], features[12:]), abs=1e-4)

    assert fid_main("--save-stats", "b.npz", "stats.npz") == ""
    assert np.allclose(fid.read_statistics("stats.npz")[1], moments[1][1], atol=1e-5 * moments[1][1].max())
    assert numbers(fid_main("a", "stats.npz")) == pytest.approx(numbers(of_npz)[:2], rel=1e-5)         # no precision, no recall
    assert "12 <= 2048)\n" in fid_main("a", "stats.npz") and "too few" not in fid_main("stats.npz", "stats.npz")
    assert numbers(fid_main("stats.npz", "stats.npz")) == [0]
    with open("stats.pkl", "wb") as f:
        pickle.dump({"fid": dict(zip(("mu", "sigma"), fid.read_statistics("stats.npz")))}, f)
    assert fid_main("a", "stats.pkl") == fid_main("a", "stats.npz")
    np.savez("adm.npz", arr_0=small_fid[12:], mu=moments[0][0], sigma=moments[0][1])                  # statistics of others
    assert numbers(fid_main("a", "adm.npz")) == pytest.approx([0, *numbers(of_npz)[1:]], rel=1e-3, abs=2e-3)
    assert "does not compare with what is made with" in fid_main("a", "stats.npz", "--resize=torch")
    live = fid.fid_of(images[:12].split(7), net := inception.load_inception("w.pth"), fid.read_reference("stats.npz", net))
    assert live == pytest.approx(numbers(of_npz)[0], rel=1e-4)

    os.makedirs("mixed")                                                                               # of many sizes, as ImageNet's
    for i, (mode, *size) in enumerate((("RGB", 30, 20), ("L", 19, 40), ("CMYK", 70, 50))):
        Image.fromarray(small_fid[i]).convert(mode).resize(size).save(f"mixed/{i}.JPEG")
    np.savez("cut.npz", arr_0=[images.read_image(f"mixed/{i}.JPEG", 16).transpose(1, 2, 0) for i in range(3)])
    assert fid_main("--save-stats", "mixed", "m.npz", "--size=16", "--state=m") == fid_main("--save-stats", "cut.npz", "c.npz") == ""
    assert all((a == b).all() for a, b in zip(fid.read_statistics("m.npz"), fid.read_statistics("c.npz")))
    assert "another run" in fid_main("--save-stats", "mixed", "m.npz", "--size=8", "--state=m")
    for wrong in (("mixed", "m.npz"), ("--save-stats", "cut.npz", "m.npz")):
        assert "--size is at least 1 and goes with --save-stats of a folder" in fid_main(*wrong, "--size=16")
    with open("mixed/3.JPEG", "wb") as f:
        f.write(open("mixed/2.JPEG", "rb").read()[:300])
    os.makedirs("linked/b"), os.symlink("../mixed", "linked/a")                                       # one image in a folder, four in a link
    os.rename("mixed/1.JPEG", "linked/b/1.JPEG")
    for path in ("linked", "linked", "mixed"):                                                        # skipped like prepare.py; the state ends after it
        assert fid_main("--save-stats", path, f"new/{path}.npz", "--size=16", f"--state=newer/{path}") == ""
    assert "skipped linked/a/3.JPEG: " in (said := capfd.readouterr().err) and said.count("skipped") == 2, said
    assert np.allclose(fid.read_statistics("new/linked.npz")[1], fid.read_statistics("m.npz")[1], rtol=1e-10, atol=1e-12)
    with np.load("newer/mixed-0-0.npz") as f:
        assert f["n"] == 2 and f["next"] == 3
    os.makedirs("folder.npz"), os.makedirs("links"), os.symlink("../a", "links/a")
    assert "folder.npz" in fid_main("--save-stats", "a", "folder.npz") and fid.Images("links").n == 12

    [os.makedirs(name) for name in ("gray", "empty", "one", "clear", "deep")]
    Image.fromarray(small_fid[0, ..., 0]).save("gray/1.png")
    np.savez("gray.npz", arr_0=small_fid[:4, ..., :1])
    Image.fromarray(small_fid[0]).save("one/1.png")
    Image.fromarray(np.dstack([small_fid[0], small_fid[0, ..., 0]])).save("clear/1.png")
    chunk = lambda kind, content: struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    with open("deep/1.png", "wb") as f:                                                                # Pillow writes none
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(26))) + chunk(b"IEND", b""))
    np.savez("float.npz", arr_0=small_fid / 255)
    np.savez("planes.npz", arr_0=small_fid.transpose(0, 3, 1, 2))
    for a, word in (("empty", "no images"), ("one", "at least 2"), ("clear", "is RGBA"), ("deep", "is 16-bit RGB, (2, 2)"), ("gray", "is L"), ("gray.npz", "must be uint8"), ("float.npz", "must be uint8"),
                    ("planes.npz", "must be uint8"), ("gone", "gone"), ("w.pth", "w.pth")):
        assert word in fid_main(a, "stats.npz"), a
    Image.fromarray(small_fid[0, :9]).save("one/2.png")
    assert "one size" in fid_main("one", "stats.npz")
    with open("one/2.png", "wb") as f:
        f.write(open("one/1.png", "rb").read()[:500])
    assert "cannot read one" in fid_main("one", "stats.npz")
    assert "--bach" in fid_main("a", "b.npz", "--bach", 3) and "invalid choice" in fid_main("a", "b.npz", "--resize=tf2")
    done = subprocess.run([sys.executable, os.path.join(HERE, "fid.py"), "gone", "b.npz"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("fid.py: cannot read gone") and done.stderr.count("\n") == 1


def test_fid_continues(small_fid, monkeypatch):
    whole, again = fid_main("a", "b.npz"), "state-0-0.npz"
    monkeypatch.setattr(fid, "SAVE_SECONDS", -1)
    broken, good = sorted(glob.glob("a/below/*"))[-1], open("a/below/11.png", "rb").read()
    with open(broken, "r+b") as f:
        f.seek(900), f.write(b"\0" * 300)
    assert "cannot read a/below/11.png" in fid_main("a", "b.npz", "--state=state") and os.path.exists(again)
    before = os.stat(broken).st_mtime_ns
    with open(broken, "wb") as f:
        f.write(good)
    assert "another run" in fid_main("a", "b.npz", "--state=state")                       # as many bytes, but others
    os.utime(broken, ns=(before, before))                                                 # only reading had failed
    counted, read = [], fid.Images.__getitem__
    monkeypatch.setattr(fid.Images, "__getitem__", lambda self, i: (counted.append((self.path, i)), read(self, i))[1])
    assert fid_main("a", "b.npz", "--state=state") == whole
    assert sorted(i for path, i in counted if path == "a") == [0, 10, 11]                  # 0: its size is that of all
    counted.clear()
    assert fid_main("a", "b.npz", "--state=state") == whole and counted == [("a", 0)]     # all was done
    assert "another run" in fid_main("a", "b.npz", "--state=state", "--resize=torch")
    with open(again, "r+b") as f:
        f.truncate(1000)
    assert "cannot read " + again in fid_main("a", "b.npz", "--state=state")


def test_fid_on_two_ranks(small_fid):
    whole = fid_main("a", "b.npz")
    with open("two.py", "w") as f:
        f.write(f"import sys; sys.path.insert(0, {HERE!r})" + SMALL_FID + """
import os, numpy as np, torch, torch.distributed as dist
rank, x = int(os.environ["RANK"]), torch.from_numpy(np.random.default_rng(0).normal(1e3, 1, (101, 4)))
dist.init_process_group("gloo", init_method="file://" + os.path.abspath("meeting"), rank=rank, world_size=2)
moments = fid.Moments(4)
moments.add(x[:30] if rank == 0 else x[30:])
moments.all_reduce()
np.savez(f"moments{rank}.npz", **moments.state())
real, torch.hub.get_dir, inception.URL = torch.hub.download_url_to_file, lambda: "hub", "file:///nowhere/w.pth"
try:
    inception.load_inception()
except fid.FidError as error:
    open(f"error{rank}", "w").write(str(error))
torch.hub.download_url_to_file = lambda *what: (open(f"downloaded{rank}", "w").close(), real(*what))
inception.URL, inception.SHA256 = "file://" + os.path.abspath("w.pth"), fid.hashlib.sha256(open("w.pth", "rb").read()).hexdigest()
assert inception.load_inception().digest == inception.SHA256
dist.destroy_process_group()
init = dist.init_process_group
dist.init_process_group = lambda backend, timeout: init(backend, timeout=timeout / timeout.days)      # a day or more
sys.stdout = open(f"out{rank}", "w")
fid.main(["a", "b.npz", "--inception=w.pth", "--batch=5", "--state=two"])
""")
    torchrun(os.path.abspath("two.py"))
    x = np.random.default_rng(0).normal(1e3, 1, (101, 4))
    for rank in range(2):
        with np.load(f"moments{rank}.npz") as f:
            assert f["n"] == 101 and np.allclose(f["mean"], x.mean(0), rtol=1e-14) and np.allclose(f["scatter"] / 100, np.cov(x.T), atol=1e-11)
        assert open(f"error{rank}").read().startswith("cannot read file:///nowhere/w.pth")           # no rank waits for what failed
    assert glob.glob("downloaded*") == ["downloaded0"]
    got, want = ([float(n) for n in re.findall(r"\d+\.\d+", text)] for text in (open("out0").read(), whole))
    assert got == pytest.approx(want, rel=1e-4, abs=2e-4) and open("out1").read() == "" and os.path.exists("two-0-1.npz")


def test_small_data_scores_by_hand():
    rng, rows = np.random.default_rng(0), torch.arange(30)
    train, held_out = (rng.integers(256, size=(n, 1, 2, 2), dtype=np.uint8) for n in (60, 30))
    labels, flat = rng.integers(3, size=60), lambda a: a.reshape(len(a), -1) / 255
    distances = lambda a: np.linalg.norm(flat(a)[:, None] - flat(train), axis=2)
    d = distances(train[:30])
    d[rows, rows] = np.inf
    line = scores.small_data_scores(train[:30], torch.from_numpy(labels[:30]), held_out, train, labels, rows)
    assert line["label"] == (labels[d.argmin(1)] == labels[:30]).mean()
    assert line["nearest_ratio"] == pytest.approx(d.min(1).mean() / distances(held_out).min(1).mean())
    (m1, s1), (m2, s2) = ((p.mean(0), np.cov(p.T)) for p in (flat(train[:30]), flat(held_out)))
    assert line["frechet_pixels"] == pytest.approx(fid.frechet_distance(m1, s1, m2, s2))
    a = randn(600, 4)                                                 # in parts, each leaving its own out
    d, i = scores.nearest_neighbours(a, a, leave_out=torch.arange(600), rows=77)
    brute = np.linalg.norm(a.numpy()[:, None] - a.numpy()[None], axis=2) + np.diag(np.full(600, np.inf))
    assert np.allclose(d, brute.min(1), atol=1e-5) and (i.numpy() == brute.argmin(1)).all()


def test_frechet_distance_of_low_rank():
    low = covariance(64, 10, 2)
    expected = (low.trace() + 64 - 2 * torch.linalg.svdvals(randn(64, 10, seed=2)).sum() / math.sqrt(10)).item()
    assert abs(fid.frechet_distance(torch.zeros(64), low, torch.zeros(64), torch.eye(64, dtype=F64)) - expected) < 1e-9


def test_only_pictures_are_opened(folder, monkeypatch):
    """A file of another kind under a picture's name: PostScript, say, is a program, which Pillow would have run."""
    write_picture(folder / "src" / "0.png")
    with open("src/1.png", "wb") as f:
        f.write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    monkeypatch.setattr("PIL.EpsImagePlugin.EpsImageFile._open", lambda self: 1 / 0)
    assert "UnidentifiedImageError" in images.read_image("src/1.png", 8) and images.read_image("src/0.png", 8).shape == (3, 8, 8)
    with pytest.raises(fid.FidError, match="1.png"):
        fid.Images("src")[1]
    Image.new("RGB", (1, 4000)).save("long.png")
    assert "1x4000 is too long and thin" == images.read_image("long.png", 256)


def test_statistics_that_unpack_to_too_much(folder, monkeypatch):
    np.savez_compressed("s.npz", mu=np.zeros(20), sigma=np.zeros((20, 20)))
    fid.read_statistics("s.npz")
    monkeypatch.setattr(fid, "LARGEST", 2 ** 10)
    with pytest.raises(fid.FidError, match="unpack to more"):
        fid.read_statistics("s.npz")


@gpu
@pytest.mark.parametrize("resize", ["tf1", "torch"])
def test_inception_on_a_gpu_is_the_cpus(resize):
    net, images = seeded_inception(), torch.randint(256, (4, 3, 64, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = lambda: (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.benchmark)
    expected, before = net(images, resize, logits=True), settings()
    for net in (copy.deepcopy(net).cuda(), copy.deepcopy(net).fold().cuda()):
        for got, want in zip(net(images.cuda(), resize, logits=True), expected):
            close(got.cpu(), want, 1e-5)
    assert settings() == before
    moments = fid.Moments(2048)
    moments.add(net(images.cuda(), resize))
    moments.add(expected[0].cuda()), moments.add(expected[0].cuda())
    assert moments.scatter.is_cuda and np.allclose(moments.mean_and_covariance()[0], expected[0].double().mean(0), atol=1e-4)
