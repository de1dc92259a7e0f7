"""
Scores for data too small for FID.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from fid import Moments, frechet_distance


def moments(features):
    """(N, ...) -> the mean (D,) and the covariance (D, D), float64."""
    total = Moments(int(np.prod(features.shape[1:])))
    total.add(flat(features))
    return total.mean_and_covariance()


def small_data_scores(images, y, held_out, train, labels, leave_out=None, judge=None):
    """The scores of images (N, C, H, W) uint8 of which classes y (N,) were asked for, against as many held_out ones and the
    training images `train` with their labels. leave_out: where images are training images, which. judge: what says the class
    instead of the nearest training image. nan is a score that says nothing: one class, pixel covariances of large images."""
    small, label = images[0].size <= 4096, float("nan")
    if judge:
        label = (classify(judge, images) == torch.as_tensor(y)).double().mean().item()
    elif labels.max() > 0:
        label = label_accuracy(images, y, train, labels, leave_out)
    pixels = frechet_distance(*moments(images / 255), *moments(held_out / 255)) if small else float("nan")
    return {"two_sample": two_sample_accuracy(images, held_out), "label": label,
            "nearest_ratio": nearest_ratio(images, held_out, train, leave_out), "frechet_pixels": pixels}


def two_sample_accuracies(a, b):
    """The accuracy of the leave-one-out nearest-neighbour classifier that tells a (N, ...) from b (N, ...), on a and on b.
    Their mean is 0.5 where both come from one distribution, 1 where they differ plainly, 0 where a copies b."""
    if len(a) != len(b):
        raise ValueError(f"two_sample_accuracy: {len(a)} images against {len(b)}; the sets must be of one size")
    both, rows = torch.cat([flat(a), flat(b)]), torch.arange(2 * len(a))
    nearest = nearest_neighbours(both, both, leave_out=rows)[1]
    return ((nearest >= len(a)) == (rows >= len(a))).double().view(2, -1).mean(1).tolist()


def two_sample_accuracy(a, b):
    return sum(two_sample_accuracies(a, b)) / 2


def label_accuracy(samples, y, images, labels, leave_out=None):
    """The share of samples (N, ...) whose nearest image (M, ...) has the label (M,) that was asked for, y (N,)."""
    nearest = nearest_neighbours(samples, images, leave_out)[1]
    return (torch.as_tensor(labels)[nearest] == torch.as_tensor(y)).double().mean().item()


def nearest_ratio(samples, held_out, images, leave_out=None):
    """The mean distance of samples to the nearest training image, over that of held-out images: well under 1, memorized."""
    return (nearest_neighbours(samples, images, leave_out)[0].mean() / nearest_neighbours(held_out, images)[0].mean()).item()


def nearest_neighbours(a, b, leave_out=None, rows=4096):
    """Distances (N,) and indices (N,) of the images of b (M, ...) nearest to those of a (N, ...), but for b[leave_out[i]] to a[i]. In
    float64 by matrix products, exact for whole-number pixels; in parts of b, which may be mapped from a file; on a GPU if any."""
    a = flat(a).to("cuda" if torch.cuda.is_available() else "cpu")
    best, index = a.new_full((len(a),), torch.inf), torch.zeros(len(a), dtype=torch.long, device=a.device)
    for first in range(0, len(b), rows):
        d = torch.cdist(a, flat(b[first:first + rows]).to(a.device), compute_mode="use_mm_for_euclid_dist")
        if leave_out is not None:
            inside = torch.nonzero((leave_out >= first) & (leave_out < first + d.shape[1])).flatten()
            d[inside, leave_out[inside] - first] = torch.inf
        nearest, at = d.min(dim=1)
        index, best = torch.where(nearest < best, at + first, index), torch.minimum(nearest, best)
    return best.cpu(), index.cpu()


def flat(images):
    """(N, ...) -> (N, D) float64 on the CPU."""
    return torch.as_tensor(images if torch.is_tensor(images) else np.array(images)).cpu().double().flatten(1)


def classifier(channels, num_classes, width=64):
    """A small network where nearest neighbours say little: pixels in [-1, 1] -> logits, of features by all but its last layer."""
    layer = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(layer(channels, width), layer(width, width), nn.MaxPool2d(2),
                         layer(width, 2 * width), layer(2 * width, 2 * width), nn.MaxPool2d(2), layer(2 * width, 4 * width),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes))


def train_classifier(images, labels, num_classes, device, epochs=6, batch=256, seed=0):
    """A classifier of images (N, C, H, W) uint8 and labels (N,), in eval mode."""
    torch.manual_seed(seed)
    net = classifier(images.shape[1], num_classes).to(device)
    images, labels = (torch.from_numpy(np.array(a)).to(device) for a in (images, labels))
    batch = min(batch, len(images))
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    order = torch.cat([torch.randperm(len(images))[:len(images) // batch * batch] for _ in range(epochs)])
    for rows in tqdm(order.view(steps, batch).to(device), desc="classifier", unit="step"):
        F.cross_entropy(net(images[rows].float() / 127.5 - 1), labels[rows]).backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    return net.eval()


@torch.no_grad()
def classify(net, images, batch=1000):
    """uint8 (N, C, H, W) -> the class of each, (N,) int64 on the CPU."""
    device, parts = next(net.parameters()).device, torch.from_numpy(np.array(images)).split(batch)
    return torch.cat([net(part.to(device).float() / 127.5 - 1).argmax(1).cpu() for part in parts])
