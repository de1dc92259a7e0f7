"""
Scores for data too small for FID, from distances between pixels, and a classifier to judge samples.

    small_data_scores(images, y, held_out, train, labels, device="cuda")    # all scores, as a dict

Images are (N, C, H, W) uint8 with any number of channels C, or (N, ...) features of any dtype;
arrays, memory maps or tensors. Distances are Euclidean over all elements of an image. They are
computed on `device`, which is the CPU unless another one is given.

two_sample      how well a nearest-neighbour classifier tells samples from held-out images: 0.5 best
of_samples, of_held_out
                its accuracies, of which two_sample is the mean. If they are not both near 0.5,
                the sets differ: blurred samples go to 1 and 0, noise goes to 0 and 1
label           the share of samples that look like the class that was asked for, where there are
                classes
nearest_ratio   how near samples are to training images: well under 1 means memorized
frechet_pixels  the Frechet distance of pixels, for images of at most MOST_ELEMENTS numbers
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from frechet import Moments, frechet_distance

MOST_ELEMENTS = 4096  # C x H x W of an image: of more the covariance says nothing


def small_data_scores(
    images, y, held_out, train, labels, leave_out=None, classifier=None, device="cpu"
):
    """The scores of images (N, C, H, W), uint8 or floats, for which the classes y (N,) were asked.

    held_out: as many images that were not trained on. train, labels: the training images (M, ...)
    and their classes (M,). leave_out: (N,), the row of `train` that each image is, when training
    images themselves are scored (else each would find itself). classifier: of train_classifier,
    which says the class instead of the nearest training image.

    A score that says nothing is nan: `label` where the training images have one class or no
    labels, and `frechet_pixels` where an image has more than MOST_ELEMENTS numbers.
    """
    label = math.nan
    if classifier is not None:
        label = share_equal(classify(classifier, images), y)
    elif labels.max() > 0:
        label = label_accuracy(images, y, train, labels, leave_out, device)
    frechet_pixels = math.nan
    if math.prod(images.shape[1:]) <= MOST_ELEMENTS:
        # uint8 pixels are compared in [0, 1]; both sets are of one kind.
        scale = 255 if as_tensor(held_out[:1]).dtype == torch.uint8 else 1
        frechet_pixels = frechet_distance(
            *moments(flat(images) / scale), *moments(flat(held_out) / scale)
        )
    of_samples, of_held_out = two_sample_accuracies(images, held_out, device)
    return {
        "two_sample": (of_samples + of_held_out) / 2,
        "of_samples": of_samples,
        "of_held_out": of_held_out,
        "label": label,
        "nearest_ratio": nearest_ratio(images, held_out, train, leave_out, device),
        "frechet_pixels": frechet_pixels,
    }


def moments(features):
    """(N, ...) -> the mean (D,) and the covariance (D, D), float64."""
    rows = flat(features)
    total = Moments(rows.shape[1])
    total.add(rows)
    return total.mean_and_covariance()


# ---- nearest neighbours --------------------------------------------------------------------------


def two_sample_accuracies(a, b, device="cpu"):
    """How well the nearest neighbour tells a (N, ...) from b (N, ...): its accuracy on a, and on b.

    The classifier says that an image is of the set of its nearest neighbour among all others. A tie
    between the sets counts as half right. Both accuracies are 0.5 where both sets come from one
    distribution, 1 where they lie apart, and 0 where a copies b. Noise is nearer to b than to other
    noise, so for noise they go to 0 and 1. Raises ValueError for sets of two sizes.
    """
    n = len(a)
    if n != len(b):
        raise ValueError(
            f"two_sample_accuracies: {n} images against {len(b)}; the sets must be of one size"
        )
    itself = torch.arange(n)
    accuracies = []
    for own, other in ((a, b), (b, a)):
        to_own, _ = nearest_neighbours(own, own, leave_out=itself, device=device)
        to_other, _ = nearest_neighbours(own, other, device=device)
        right = (to_own < to_other).double() + (to_own == to_other).double() / 2
        accuracies.append(right.mean().item())
    return accuracies


def label_accuracy(samples, y, images, labels, leave_out=None, device="cpu"):
    """The share of samples (N, ...) whose nearest image (M, ...) has the label asked for.

    y: (N,), the labels asked for; labels: (M,), those of the images.
    """
    _, nearest = nearest_neighbours(samples, images, leave_out, device)
    return share_equal(torch.as_tensor(labels)[nearest], y)


def share_equal(found, wanted):
    return (torch.as_tensor(found) == torch.as_tensor(wanted)).double().mean().item()


def nearest_ratio(samples, held_out, images, leave_out=None, device="cpu"):
    """How far samples are from training images on average, over how far held-out images are.

    The distance of an image is that to the nearest training image. All are (N, ...).
    """
    of_samples, _ = nearest_neighbours(samples, images, leave_out, device)
    of_held_out, _ = nearest_neighbours(held_out, images, device=device)
    return (of_samples.mean() / of_held_out.mean()).item()


def nearest_neighbours(a, b, leave_out=None, device="cpu", rows=4096):
    """For each image of a (N, ...) the distance (N,) and the index (N,) of the nearest one of b.

    b: (M, ...), which may be mapped from a file; it is read `rows` images at a time.
    leave_out: (N,) int64, an array or a tensor: the index in b that a[i] may not have. Distances
    are float64, by matrix products: exact for whole-number pixels. Both results are on the CPU.
    """
    if torch.device(device).type == "mps":  # Apple's GPUs have no float64
        device = "cpu"
    a = flat(a).to(device)
    best = a.new_full((len(a),), torch.inf)
    index = torch.zeros(len(a), dtype=torch.long, device=device)
    if leave_out is not None:
        leave_out = as_tensor(leave_out).cpu()
    for first in range(0, len(b), rows):
        part = flat(b[first : first + rows]).to(device)
        distances = torch.cdist(a, part, compute_mode="use_mm_for_euclid_dist")  # (N, rows)
        if leave_out is not None:
            in_part = (leave_out >= first) & (leave_out < first + len(part))
            i = torch.nonzero(in_part).flatten()
            distances[i, leave_out[i] - first] = torch.inf
        nearest, at = distances.min(dim=1)
        index = torch.where(nearest < best, at + first, index)
        best = torch.minimum(nearest, best)
    return best.cpu(), index.cpu()


def flat(images):
    """(N, ...) -> (N, D), float64 on the CPU."""
    return as_tensor(images).cpu().double().flatten(1)


def as_tensor(array):
    """A tensor as it is. An array or a memory map is copied: torch takes none that is read-only."""
    return array if torch.is_tensor(array) else torch.from_numpy(np.array(array))


# ---- a classifier, where the nearest image says little -------------------------------------------


def new_classifier(channels, num_classes, width=64):
    """A small network: pixels in [-1, 1], (N, C, H, W) -> logits (N, num_classes).

    All but its last layer make the features, (N, 4 width).
    """
    return nn.Sequential(
        convolution(channels, width),
        convolution(width, width),
        nn.MaxPool2d(2),
        convolution(width, 2 * width),
        convolution(2 * width, 2 * width),
        nn.MaxPool2d(2),
        convolution(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


def convolution(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def train_classifier(images, labels, num_classes, device, epochs=6, batch=256, seed=0):
    """A classifier of images (N, C, H, W) uint8 with labels (N,), in eval mode."""
    batch = min(batch, len(images))
    steps_an_epoch = len(images) // batch
    steps = epochs * steps_an_epoch
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.default_generator.manual_seed(seed)
        net = new_classifier(images.shape[1], num_classes).to(device)
        orders = [torch.randperm(len(images))[: steps_an_epoch * batch] for _ in range(epochs)]
    order = torch.cat(orders).view(steps, batch).to(device)
    images = as_tensor(images).to(device)
    labels = as_tensor(labels).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for rows in tqdm(order, desc="classifier", unit="step"):
        logits = net(to_network(images[rows]))
        F.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return net.eval()


@torch.no_grad()
def classify(net, images, batch=1000):
    """uint8 (N, C, H, W) -> the class of each, (N,) int64 on the CPU."""
    device = next(net.parameters()).device
    classes = []
    for part in as_tensor(images).split(batch):
        logits = net(to_network(part.to(device)))
        classes.append(logits.argmax(1).cpu())
    return torch.cat(classes)


def to_network(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
