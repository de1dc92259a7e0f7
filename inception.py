"""
The network that FID is measured with: TensorFlow's Inception of 2015-12-05.

    net = load_inception(None, "cuda")     # the published weights, downloaded once
    features = net(images)                 # uint8 (N, 3, H, W) -> float32 (N, 2048)

Images are resized to 299 x 299, go through five convolutions and eleven blocks, and the mean over
the last 8 x 8 places is their feature. The names of all parts are those of pytorch-fid's file,
which are torchvision's. FID's variant differs from torchvision's network in how it pools, and has
1008 classes.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from device import ranks_of_torchrun
from files import FidError, reading

# True: convolutions in TensorFloat-32 on a GPU. `bench.py fid` says what that gives and costs.
TF32 = False

SIDE = 299  # of the images that the network takes
URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


# ---- parts ---------------------------------------------------------------------------------------


def average_pool(x):
    """Means over 3 x 3 places. At an edge only the places that are there count."""
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)


def halving_pool(x):
    return F.max_pool2d(x, kernel_size=3, stride=2)


class Product(nn.Conv2d):
    """A 1x1 convolution of channels-last images as a matrix product: faster in float32."""

    def forward(self, x):
        y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return y.permute(0, 3, 1, 2)


class Convolution(nn.Module):
    """A convolution without bias, its batch norm, and ReLU."""

    def __init__(self, inputs, outputs, kernel, stride=1, padding="same"):
        super().__init__()
        kind = Product if kernel == 1 else nn.Conv2d
        self.conv = kind(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


def halving(inputs, outputs):
    """A convolution of stride 2 without padding: (N, C, H, W) -> about half of H and W."""
    return Convolution(inputs, outputs, 3, stride=2, padding=0)


# ---- blocks: a few branches side by side, whose channels are joined ------------------------------


class InceptionA(nn.Module):
    def __init__(self, inputs, pool_outputs):
        super().__init__()
        self.branch1x1 = Convolution(inputs, 64, 1)
        self.branch5x5_1 = Convolution(inputs, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5)
        self.branch3x3dbl_1 = Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3)
        self.branch_pool = Convolution(inputs, pool_outputs, 1)

    def forward(self, x):
        one = self.branch1x1(x)
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pool = self.branch_pool(average_pool(x))
        return torch.cat([one, five, double, pool], dim=1)


class InceptionB(nn.Module):
    """Halves height and width."""

    def __init__(self, inputs):
        super().__init__()
        self.branch3x3 = halving(inputs, 384)
        self.branch3x3dbl_1 = Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = halving(96, 96)

    def forward(self, x):
        three = self.branch3x3(x)
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([three, double, halving_pool(x)], dim=1)


class InceptionC(nn.Module):
    """Convolutions of 7 x 7 as rows (1 x 7) and columns (7 x 1), of `width` channels."""

    def __init__(self, width):
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Convolution(768, 192, 1)
        self.branch7x7_1 = Convolution(768, width, 1)
        self.branch7x7_2 = Convolution(width, width, row)
        self.branch7x7_3 = Convolution(width, 192, column)
        self.branch7x7dbl_1 = Convolution(768, width, 1)
        self.branch7x7dbl_2 = Convolution(width, width, column)
        self.branch7x7dbl_3 = Convolution(width, width, row)
        self.branch7x7dbl_4 = Convolution(width, width, column)
        self.branch7x7dbl_5 = Convolution(width, 192, row)
        self.branch_pool = Convolution(768, 192, 1)

    def forward(self, x):
        one = self.branch1x1(x)
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        pool = self.branch_pool(average_pool(x))
        return torch.cat([one, seven, double, pool], dim=1)


class InceptionD(nn.Module):
    """Halves height and width."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Convolution(768, 192, 1)
        self.branch3x3_2 = halving(192, 320)
        self.branch7x7x3_1 = Convolution(768, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = halving(192, 192)

    def forward(self, x):
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        seven = self.branch7x7x3_4(seven)
        return torch.cat([three, seven, halving_pool(x)], dim=1)


class InceptionE(nn.Module):
    """Two branches fork: their last convolutions a and b take the same input."""

    def __init__(self, inputs, pool):
        super().__init__()
        row, column = (1, 3), (3, 1)
        self.pool = pool
        self.branch1x1 = Convolution(inputs, 320, 1)
        self.branch3x3_1 = Convolution(inputs, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, row)
        self.branch3x3_2b = Convolution(384, 384, column)
        self.branch3x3dbl_1 = Convolution(inputs, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3)
        self.branch3x3dbl_3a = Convolution(384, 384, row)
        self.branch3x3dbl_3b = Convolution(384, 384, column)
        self.branch_pool = Convolution(inputs, 192, 1)

    def forward(self, x):
        one = self.branch1x1(x)
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            one,
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(branches, dim=1)


# ---- the network ---------------------------------------------------------------------------------


class InceptionV3(nn.Module):
    """The network of FID. It is made for evaluation: eval mode, no gradients.

    load_inception gives it its weights, and `digest`, the SHA-256 of their file.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = halving(3, 32)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padding=0)
        self.Mixed_5b = InceptionA(192, pool_outputs=32)
        self.Mixed_5c = InceptionA(256, pool_outputs=64)
        self.Mixed_5d = InceptionA(288, pool_outputs=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(width=128)
        self.Mixed_6c = InceptionC(width=160)
        self.Mixed_6d = InceptionC(width=160)
        self.Mixed_6e = InceptionC(width=192)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b = InceptionE(1280, average_pool)
        self.Mixed_7c = InceptionE(2048, max_pool)  # TensorFlow's own slip, which FID keeps
        self.fc = nn.Linear(2048, 1008)
        self.eval()
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def fold(self):
        """Move batch norm into the convolutions: the same function, faster. Returns the network.

        The names of its weights are no longer those of the file.
        """
        for layer in self.modules():
            if isinstance(layer, Convolution):
                layer.conv = fuse_conv_bn_eval(layer.conv, layer.bn)
                layer.bn = nn.Identity()
        self.requires_grad_(False)
        return self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images, resize="tf1"):
        """uint8 images (N, 3, H, W) -> features (N, 2048), float32.

        resize: "tf1" or "torch", see `resized`. Raises FidError.
        """
        right_images = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
        if not right_images or resize not in ("tf1", "torch"):
            raise FidError(
                "Inception takes uint8 (N, 3, H, W), tf1 or torch, "
                f"not {images.dtype} {tuple(images.shape)}, {resize}"
            )
        with gpu_precision(), torch.autocast(images.device.type, enabled=False):
            return self.features(resized(images, resize))

    def logits_of(self, features):
        """Features (N, 2048) -> logits (N, 1008), float64, on the features' device.

        They leave out the bias of fc, as published Inception Scores do.
        """
        return features.double() @ self.fc.weight.to(features.device).double().T

    def features(self, x):
        x = x.contiguous(memory_format=torch.channels_last)  # (N, 3, 299, 299)
        x = self.Conv2d_1a_3x3(x)  # (N, 32, 149, 149)
        x = self.Conv2d_2a_3x3(x)  # (N, 32, 147, 147)
        x = self.Conv2d_2b_3x3(x)  # (N, 64, 147, 147)
        x = halving_pool(x)  # (N, 64, 73, 73)
        x = self.Conv2d_3b_1x1(x)  # (N, 80, 73, 73)
        x = self.Conv2d_4a_3x3(x)  # (N, 192, 71, 71)
        x = halving_pool(x)  # (N, 192, 35, 35)
        x = self.Mixed_5b(x)  # (N, 256, 35, 35)
        x = self.Mixed_5c(x)  # (N, 288, 35, 35)
        x = self.Mixed_5d(x)  # (N, 288, 35, 35)
        x = self.Mixed_6a(x)  # (N, 768, 17, 17)
        x = self.Mixed_6b(x)  # (N, 768, 17, 17)
        x = self.Mixed_6c(x)  # (N, 768, 17, 17)
        x = self.Mixed_6d(x)  # (N, 768, 17, 17)
        x = self.Mixed_6e(x)  # (N, 768, 17, 17)
        x = self.Mixed_7a(x)  # (N, 1280, 8, 8)
        x = self.Mixed_7b(x)  # (N, 2048, 8, 8)
        x = self.Mixed_7c(x)  # (N, 2048, 8, 8)
        return x.mean((2, 3))  # (N, 2048)


@contextlib.contextmanager
def gpu_precision():
    """Within it GPUs convolve in float32, or in TensorFloat-32 where TF32 says so."""
    cudnn = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision
    precision = "tf32" if TF32 else "ieee"
    try:
        cudnn.benchmark = True
        cudnn.conv.fp32_precision = precision
        matmul.fp32_precision = precision
        yield
    finally:
        cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision = before


def resized(images, resize):
    """uint8 (N, 3, H, W) -> float32 (N, 3, 299, 299) in [-1, 1].

    "tf1" is TensorFlow 1's ResizeBilinear, which the papers' numbers are made with: pixel i
    lies at i H / 299 of the input, computed in float32 as there. "torch" is pytorch-fid's way.
    """
    x = images.float()
    if resize == "torch":
        x = F.interpolate(x / 255, (SIDE, SIDE), mode="bilinear", align_corners=False)
        return x * 2 - 1
    x = resized_as_tf1(x, dim=3)
    x = resized_as_tf1(x, dim=2)
    return (x - 128) / 128


def resized_as_tf1(x, dim):
    """(N, 3, H, W) with one dimension resized to 299. A pixel is interpolated linearly between the
    two input pixels beside its place."""
    size = x.shape[dim]
    scale = float(np.float32(size) / np.float32(SIDE))
    place = torch.arange(SIDE, device=x.device, dtype=torch.float32) * scale
    index = place.long()
    share = place - place.floor()
    if dim == 2:
        share = share[:, None]  # (299, 1), beside (N, 3, 299, W)
    before = x.index_select(dim, index)
    after = x.index_select(dim, (index + 1).clamp(max=size - 1))
    return before + (after - before) * share


# ---- weights -------------------------------------------------------------------------------------


def load_inception(path=None, device="cpu"):
    """InceptionV3 with the weights of a file, folded; without a path with the published ones.

    Those are downloaded once into torch.hub's folder. Under torchrun the first rank of a machine
    downloads while its others wait, so all ranks must call this. Names, shapes and dtypes in the
    file must be right. Raises FidError.
    """
    file = path or download()
    with reading(file):
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        if not path and digest != SHA256:
            raise FidError(f"{file} is not the published file, its SHA-256 is {digest}: delete it")
        net = InceptionV3()
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        check_names(file, tensors, net.state_dict())
        net.load_state_dict(tensors, strict=False)
    net.digest = digest
    return net.fold().to(device)


def download():
    """The path of the published weights, which are fetched unless they are there. FidError."""
    file = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(URL))
    first = ranks_of_torchrun()[2] == 0
    together = dist.is_initialized()
    with reading(f"{URL} into {os.path.dirname(file)}"):
        if together and not first:
            dist.barrier()
        try:
            if not os.path.exists(file):
                os.makedirs(os.path.dirname(file), exist_ok=True)
                # It is written aside and renamed when its hash is right.
                torch.hub.download_url_to_file(URL, file, SHA256)
        finally:
            if together and first:
                dist.barrier()
    return file


def check_names(file, tensors, needed):
    """Raise FidError where the tensors of a file are not those that the network needs."""
    in_file = descriptions(tensors)
    in_network = descriptions(needed)
    different = sorted(in_file ^ in_network)
    if different:
        owner = "file" if different[0] in in_file else "network"
        raise FidError(f"{file} does not fit this network: only the {owner} has {different[0]}")


def descriptions(tensors):
    """Name, shape and dtype of each. Counts of batches, which no evaluation needs, are left out."""
    return {
        f"{name} {list(t.shape)} {t.dtype}"
        for name, t in tensors.items()
        if not name.endswith("num_batches_tracked")
    }
