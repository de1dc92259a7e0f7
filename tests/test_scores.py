"""scores.py: against closed forms and distances that are written out."""

import math

import numpy as np
import pytest
import torch
from helpers import randn

import fid
import scores
import shapes


def brute_distances(a, b):
    """(N, D) and (M, D) -> (N, M)."""
    return np.linalg.norm(np.asarray(a)[:, None] - np.asarray(b)[None], axis=2)


@pytest.fixture(scope="module")
def points():
    """Two sets of 600 points in 4 dimensions, of one distribution."""
    return [randn(600, 4, seed=i, dtype=torch.float32) for i in range(2)]


def test_moments():
    x = randn(50, 2, 3)
    mu, sigma = scores.moments(x)
    assert np.allclose(mu, x.flatten(1).numpy().mean(0))
    assert np.allclose(sigma, np.cov(x.flatten(1).numpy().T))
    mu, sigma = scores.moments(randn(4000, 5, seed=8))
    assert fid.frechet_distance(mu, sigma, torch.zeros(5), torch.eye(5)) < 5 * 2 * 5 / 4000


def two_sample_accuracy(*sets, **options):
    return np.mean(scores.two_sample_accuracies(*sets, **options))


def test_two_sample_accuracy(points):
    a, b = points
    assert two_sample_accuracy(a, a.clone()) == 0  # every image's nearest is its copy
    assert two_sample_accuracy(a, a + 100) == 1
    assert abs(two_sample_accuracy(a, b) - 0.5) < 4 * 0.5 / math.sqrt(1200)
    far = randn(600, 4, seed=2, dtype=torch.float32) + 100
    assert two_sample_accuracy(a, far) == 1
    few = randn(10, 4)[torch.arange(600) % 10]  # each of ten images, many times
    assert scores.two_sample_accuracies(few, few.flip(0)) == [0.5, 0.5]
    clean = randn(100, 500)  # noise: the nearest image of anything is a clean one
    noisy = randn(100, 500, seed=1) + 3 * randn(100, 500, seed=2)
    assert scores.two_sample_accuracies(noisy, clean) == [0, 1]
    with pytest.raises(ValueError, match="one size"):
        two_sample_accuracy(a, b[:5])


def test_nearest_ratio(points):
    a, b = points
    assert scores.nearest_ratio(a, b, a) == 0  # memorized
    assert scores.nearest_ratio(b, b, a) == 1
    mixed = torch.cat([b[300:], a[300:]])
    assert abs(scores.nearest_ratio(a[:300], b[:300], mixed) - 1) < 0.15
    of_tensor = scores.nearest_ratio(a, b, a, leave_out=torch.arange(600))
    assert of_tensor > 0.8
    assert scores.nearest_ratio(a, b, a, leave_out=np.arange(600)) == of_tensor


def test_label_accuracy(points):
    a, _ = points
    labels = (a[:, 0] > 0).long()
    assert scores.label_accuracy(a, labels, a, labels) == 1
    assert scores.label_accuracy(a, 1 - labels, a, labels) == 0
    assert scores.label_accuracy(a, labels, a, labels, leave_out=torch.arange(600)) < 1


def test_nearest_neighbours_in_parts(points):
    a, b = points
    distance, index = scores.nearest_neighbours(b, a, rows=77)
    brute = brute_distances(b, a)
    assert np.allclose(distance, brute.min(1), atol=1e-5)
    assert (index.numpy() == brute.argmin(1)).all()


def test_nearest_neighbours_that_leave_one_out():
    a = randn(600, 4)
    distance, index = scores.nearest_neighbours(a, a, leave_out=torch.arange(600), rows=77)
    brute = brute_distances(a, a) + np.diag(np.full(600, np.inf))
    assert np.allclose(distance, brute.min(1), atol=1e-5)
    assert (index.numpy() == brute.argmin(1)).all()


def test_scores_are_computed_on_the_device_that_is_given(points):
    """By default that is the CPU, also where there is a GPU. "meta" computes nothing."""
    a, _ = points
    distance, index = scores.nearest_neighbours(a, a)
    assert distance.device.type == index.device.type == "cpu"
    labels = (a[:, 0] > 0).long()
    for function, arguments in (
        (two_sample_accuracy, (a, a)),
        (scores.label_accuracy, (a, labels, a, labels)),
        (scores.nearest_ratio, (a, a, a)),
        (scores.small_data_scores, (a, labels, a, a, labels)),
    ):
        with pytest.raises(NotImplementedError, match="meta"):
            function(*arguments, device="meta")


def in_rows(images):
    """uint8 (N, ...) -> (N, D), in units of 255."""
    return images.reshape(len(images), -1) / 255


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_all_scores_by_hand(channels):
    """The first 30 of 60 training images as samples, each leaving itself out."""
    rng = np.random.default_rng(0)
    train = rng.integers(256, size=(60, channels, 2, 2), dtype=np.uint8)
    held_out = rng.integers(256, size=(30, channels, 2, 2), dtype=np.uint8)
    labels = rng.integers(3, size=60)
    samples = train[:30]
    y = torch.from_numpy(labels[:30])
    itself = torch.arange(30)
    got = scores.small_data_scores(samples, y, held_out, train, labels, itself)

    to_train = brute_distances(in_rows(samples), in_rows(train))
    to_train[itself, itself] = np.inf
    from_held_out = brute_distances(in_rows(held_out), in_rows(train))
    assert got["label"] == (labels[to_train.argmin(1)] == labels[:30]).mean()
    expected = to_train.min(1).mean() / from_held_out.min(1).mean()
    assert got["nearest_ratio"] == pytest.approx(expected)
    moments = []
    for images in (samples, held_out):
        moments += [in_rows(images).mean(0), np.cov(in_rows(images).T)]
    assert got["frechet_pixels"] == pytest.approx(fid.frechet_distance(*moments))
    assert got["two_sample"] == two_sample_accuracy(samples, held_out)
    of_both = [got["of_samples"], got["of_held_out"]]
    assert of_both == scores.two_sample_accuracies(samples, held_out)

    tensors = [torch.as_tensor(a) for a in (samples, y, held_out, train, labels)]
    assert scores.small_data_scores(*tensors, itself) == got


def test_floats_are_not_scaled():
    """Pixels go from 0 to 255 and are scored from 0 to 1. Floats are scored as they are."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 1, 2, 2), dtype=np.uint8)
    labels = np.zeros(30, np.int64)
    distances = []
    for images, held_out, train in (pixels, (pixels / 255).astype(np.float32)):
        found = scores.small_data_scores(images, labels, held_out, train, labels)
        distances.append(found["frechet_pixels"])
    assert distances[0] > 0
    assert distances[1] == pytest.approx(distances[0], rel=1e-4)


def test_scores_that_say_nothing_are_nan():
    rng = np.random.default_rng(0)
    large = rng.integers(256, size=(8, 1, 65, 64), dtype=np.uint8)
    one_class = np.zeros(8, dtype=np.int64)
    got = scores.small_data_scores(large[:4], one_class[:4], large[4:], large, one_class)
    assert math.isnan(got["label"]) and math.isnan(got["frechet_pixels"])
    assert 0 <= got["two_sample"] <= 1


def test_classifier_learns():
    """Disks and bars. Small_data_scores says the same with it."""
    images = [shapes.draw_shape(10 * (i // 2) + 5 * (i % 2), size=12) for i in range(300)]
    images = np.stack(images)
    labels = np.arange(300) % 2
    net = scores.train_classifier(images[:200], labels[:200], 2, "cpu", epochs=8, batch=50)
    right = (scores.classify(net, images[200:]).numpy() == labels[200:]).mean()
    assert right > 0.9
    found = scores.small_data_scores(
        images[200:], labels[200:], images[:100], images[:200], labels[:200], classifier=net
    )
    assert found["label"] == right


def test_classifier_is_a_function_of_its_seed():
    """Its training leaves the random numbers of others as they are."""
    images = np.random.default_rng(0).integers(256, size=(20, 1, 8, 8), dtype=np.uint8)
    labels = np.arange(20) % 2

    def weights(seed, outer_seed):
        torch.manual_seed(outer_seed)
        net = scores.train_classifier(images, labels, 2, "cpu", epochs=1, seed=seed)
        drawn = torch.rand(3)
        torch.manual_seed(outer_seed)
        assert (torch.rand(3) == drawn).all()
        return net[0][0].weight

    assert (weights(0, 1) == weights(0, 2)).all()
    assert (weights(0, 1) != weights(1, 1)).any()
