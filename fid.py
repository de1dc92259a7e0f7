"""
How good are images? The Frechet distance, and scores for data too small for FID.

    frechet_distance(mu1, sigma1, mu2, sigma2)          distance of two Gaussians; FID, on Inception's features
    two_sample_accuracy(samples, held_out)              0.5: cannot be told apart; 1: always can
    label_accuracy(samples, y, images, labels)          does the nearest training image have the class asked for?
    nearest_ratio(samples, held_out, images)            well under 1: memorized

Images are (N, ...) arrays or tensors; distances are Euclidean over all elements.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float.

    mu (D,), sigma (D, D) symmetric positive semi-definite, singular ones included. The trace of the
    root is taken as tr (A sigma2 A)^(1/2) with A = sigma1^(1/2), symmetric eigenvalue problems in
    float64. Raises ValueError for other shapes or values that are not finite."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, dtype=torch.float64, device="cpu") for a in (mu1, sigma1, mu2, sigma2))
    D = mu1.shape[0] if mu1.ndim == 1 else -1
    if mu2.shape != (D,) or sigma1.shape != (D, D) or sigma2.shape != (D, D):
        raise ValueError(f"frechet_distance: means {tuple(mu1.shape)}, {tuple(mu2.shape)} and covariances "
                         f"{tuple(sigma1.shape)}, {tuple(sigma2.shape)} do not belong together")
    if not all(a.isfinite().all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("frechet_distance: a mean or covariance is not finite")

    def clean(values):         # eigenvalues that are zero but for rounding, whose roots would not be small
        return values.where(values > D * torch.finfo(torch.float64).eps * values.abs().max(), 0)

    values, vectors = torch.linalg.eigh(sigma1)
    A = (vectors * clean(values).sqrt()) @ vectors.T
    M = A @ sigma2 @ A
    root = clean(torch.linalg.eigvalsh((M + M.T) / 2)).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root).item()


def moments(features):
    """(N, ...) -> the mean (D,) and the covariance (D, D), float64."""
    x = flat(features)
    if len(x) < 2:
        raise ValueError(f"moments: a covariance needs at least 2 images, not {len(x)}")
    return x.mean(0), torch.cov(x.T, correction=1).reshape(x.shape[1], x.shape[1])


def small_data_scores(images, y, held_out, train, labels, leave_out=None, judge=None):
    """The scores of images (N, C, H, W) uint8 of which classes y (N,) were asked for, against as many
    held_out ones and the training images `train` with their labels. leave_out: where images are training
    images, which. judge: a Classifier that says the class instead of the nearest training image.
    Returns floats {two_sample, label, nearest_ratio, frechet_pixels}; nan where a score says nothing:
    labels where there is one class, pixel covariances of large images."""
    small, label = images[0].size <= 4096, float("nan")
    if judge:
        label = (classify(judge, images) == torch.as_tensor(y)).double().mean().item()
    elif labels.max() > 0:
        label = label_accuracy(images, y, train, labels, leave_out)
    return {"two_sample": two_sample_accuracy(images, held_out),
            "label": label,
            "nearest_ratio": nearest_ratio(images, held_out, train, leave_out),
            "frechet_pixels": frechet_distance(*moments(images / 255), *moments(held_out / 255)) if small else float("nan")}


def two_sample_accuracy(a, b):
    """The accuracy of the leave-one-out nearest-neighbour classifier that tells a (N, ...) from b (N, ...):
    0.5 where both come from one distribution, 1 where they differ plainly, 0 where a copies b."""
    if len(a) != len(b):
        raise ValueError(f"two_sample_accuracy: {len(a)} images against {len(b)}; the sets must be of one size")
    both = torch.cat([flat(a), flat(b)])
    of_b = torch.arange(len(both)) >= len(a)
    _, nearest = nearest_neighbours(both, both, leave_out=torch.arange(len(both)))
    return (of_b[nearest] == of_b).double().mean().item()


def label_accuracy(samples, y, images, labels, leave_out=None):
    """The share of samples (N, ...) whose nearest image (M, ...) has the label (M,) that was asked for, y (N,)."""
    _, nearest = nearest_neighbours(samples, images, leave_out)
    return (torch.as_tensor(labels)[nearest] == torch.as_tensor(y)).double().mean().item()


def nearest_ratio(samples, held_out, images, leave_out=None):
    """The mean distance of samples to the nearest training image, over that of held-out images."""
    samples, held_out = nearest_neighbours(samples, images, leave_out)[0], nearest_neighbours(held_out, images)[0]
    return (samples.mean() / held_out.mean()).item()


def nearest_neighbours(a, b, leave_out=None, rows=4096):
    """Distances (N,) and indices (N,) of the images of b (M, ...) nearest to those of a (N, ...), passing
    over image leave_out[i] of b for image i. In float64 by matrix products, which is exact for
    whole-number pixels; in parts of b, which may be mapped from a file; on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = flat(a).to(device)
    best, index = torch.full((len(a),), torch.inf, dtype=torch.float64, device=device), torch.zeros(len(a), dtype=torch.long, device=device)
    for first in range(0, len(b), rows):
        d = torch.cdist(a, flat(b[first:first + rows]).to(device), compute_mode="use_mm_for_euclid_dist")
        if leave_out is not None:
            inside = torch.nonzero((leave_out >= first) & (leave_out < first + d.shape[1])).flatten()
            d[inside, leave_out[inside] - first] = torch.inf
        nearest, at = d.min(dim=1)
        index = torch.where(nearest < best, at + first, index)
        best = torch.minimum(nearest, best)
    return best.cpu(), index.cpu()


def flat(images):
    """(N, ...) -> (N, D) float64 on the CPU."""
    return torch.as_tensor(images if torch.is_tensor(images) else np.array(images)).cpu().double().flatten(1)


class Classifier(nn.Module):
    """A small convolutional network for data on which nearest neighbours say little."""

    def __init__(self, channels, num_classes, width=64):
        super().__init__()
        layer = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        self.features = nn.Sequential(
            layer(channels, width), layer(width, width), nn.MaxPool2d(2),
            layer(width, 2 * width), layer(2 * width, 2 * width), nn.MaxPool2d(2),
            layer(2 * width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images):
        """uint8 (N, C, H, W) -> logits (N, num_classes)."""
        return self.head(self.features(images.float() / 127.5 - 1))


def train_classifier(images, labels, num_classes, device, epochs=6, batch=256, seed=0):
    """A Classifier of images (N, C, H, W) uint8 and labels (N,), in eval mode."""
    torch.manual_seed(seed)
    net = Classifier(images.shape[1], num_classes).to(device)
    images, labels = torch.from_numpy(np.array(images)).to(device), torch.from_numpy(np.array(labels)).to(device)
    batch = min(batch, len(images))
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    order = torch.cat([torch.randperm(len(images))[:len(images) // batch * batch] for _ in range(epochs)])
    for rows in tqdm(order.view(steps, batch).to(device), desc="classifier", unit="step"):
        F.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    return net.eval()


@torch.no_grad()
def classify(net, images, batch=1000):
    """uint8 (N, C, H, W) -> the class of each, (N,) int64 on the CPU."""
    device = net.head.weight.device
    parts = torch.from_numpy(np.array(images)).split(batch)
    return torch.cat([net(part.to(device)).argmax(1).cpu() for part in parts])
