"""
FID's Inception network.
"""
import hashlib
import os
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pickles import FidError, reading

TF32 = False             # True: convolutions in TensorFloat-32 on a GPU; bench.py fid says what that gives and costs


SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


# TensorFlow's Inception of 2015-12-05. Its blocks: input channels, pool, and convolutions, each name:channels:kernel/stride.
POOLS = {"average": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
         "largest": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1), "halve": partial(F.max_pool2d, kernel_size=3, stride=2)}


A = "{} average 1x1:64:1 5x5_1:48:1 5x5_2:64:5 3x3dbl_1:64:1 3x3dbl_2:96:3 3x3dbl_3:96:3 _pool:{}:1"


C = ("768 average 1x1:192:1 7x7_1:{0}:1 7x7_2:{0}:1x7 7x7_3:192:7x1 7x7dbl_1:{0}:1 7x7dbl_2:{0}:7x1 7x7dbl_3:{0}:1x7 7x7dbl_4:{0}:7x1 "
     "7x7dbl_5:192:1x7 _pool:192:1")


E = ("{} {} 1x1:320:1 3x3_1:384:1 3x3_2a:384:1x3 3x3_2b:384:3x1 3x3dbl_1:448:1 3x3dbl_2:384:3 3x3dbl_3a:384:1x3 3x3dbl_3b:384:3x1 "
     "_pool:192:1")


MIXED = {"5b": A.format(192, 32), "5c": A.format(256, 64), "5d": A.format(288, 64),
         "6a": "288 halve 3x3:384:3/2 3x3dbl_1:64:1 3x3dbl_2:96:3 3x3dbl_3:96:3/2",
         "6b": C.format(128), "6c": C.format(160), "6d": C.format(160), "6e": C.format(192),
         "7a": "768 halve 3x3_1:192:1 3x3_2:320:3/2 7x7x3_1:192:1 7x7x3_2:192:1x7 7x7x3_3:192:7x1 7x7x3_4:192:3/2",
         "7b": E.format(1280, "average"), "7c": E.format(2048, "largest")}


class Product(nn.Conv2d):
    """A 1x1 convolution of channels-last images as the matrix product that it is, which is faster in float32."""

    def forward(self, x):
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def convolution(inputs, outputs, kernel, same=True):
    """With batch norm and ReLU. kernel: "3", "1x7" or, of stride 2, "3/2"; same: at stride 1 the padding keeps the size."""
    kernel, _, stride = kernel.partition("/")
    size, padding = [int(k) for k in (kernel.split("x") * 2)[:2]], "same" if same and not stride else 0
    conv = (Product if kernel == "1" and not stride else nn.Conv2d)(inputs, outputs, size, int(stride or 1), padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs, eps=1e-3), relu=nn.ReLU(inplace=True)))


class Mixed(nn.Module):
    """Branches side by side; a and b take the same input. What the pool gives goes through branch_pool or, without one, stands."""

    def __init__(self, inputs, pool, *layers):
        super().__init__()
        self.pool = POOLS[pool]
        for name, outputs, kernel in (layer.split(":") for layer in layers):
            if name[-1] != "b":
                before = inputs if name.partition("_")[2] in ("", "1", "pool") else width
            width = outputs
            self.add_module("branch" + name, convolution(int(before), int(width), kernel))

    def forward(self, x):
        out = []
        for name, layer in self.named_children():
            place = name.partition("_")[2]
            if name[-1] != "b":
                before = self.pool(x) if place == "pool" else x if place in ("", "1") else out.pop()
            out.append(layer(before))
        return torch.cat(out if place == "pool" else [*out, self.pool(x)], dim=1)


class InceptionV3(nn.Module):
    """The network of FID, under the names of pytorch-fid's weights (which are torchvision's)."""

    def __init__(self):
        super().__init__()
        for name, *how in (("1a_3x3", 3, 32, "3/2"), ("2a_3x3", 32, 32, "3", False), ("2b_3x3", 32, 64, "3"),
                           ("3b_1x1", 64, 80, "1"), ("4a_3x3", 80, 192, "3", False)):
            self.add_module("Conv2d_" + name, convolution(*how))
        for name, text in MIXED.items():
            self.add_module("Mixed_" + name, Mixed(*text.split()))
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def fold(self):
        """The same function with batch norm inside the convolutions: faster, and without the file's names. Returns itself."""
        for layer in self.modules():
            if hasattr(layer, "bn"):
                layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
        return self.requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images, resize="tf1", logits=False):
        """uint8 (N, 3, H, W) -> features (N, 2048), float32; logits=True: also (N, 1008), without fc's bias, which published
        Inception Scores leave out. resize as in resized."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or resize not in ("tf1", "torch"):
            raise FidError(f"Inception takes uint8 (N, 3, H, W), tf1 or torch, not {images.dtype} {tuple(images.shape)}, {resize}")
        cudnn, matmul, precision = torch.backends.cudnn, torch.backends.cuda.matmul, "tf32" if TF32 else "ieee"
        before = cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision
        try:
            cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision = True, precision, precision
            with torch.autocast(images.device.type, enabled=False):
                x = resized(images, resize).contiguous(memory_format=torch.channels_last)
                for name, layer in list(self.named_children())[:-1]:
                    x = POOLS["halve"](layer(x)) if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3") else layer(x)
                x = x.mean((2, 3))                                      # (N, 2048), of 8 x 8 places
        finally:
            cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision = before
        return (x, (x.double() @ self.fc.weight.double().T).float()) if logits else x


def resized(images, resize):
    """uint8 (N, 3, H, W) -> float32 (N, 3, 299, 299) in [-1, 1]. "tf1": TensorFlow 1's ResizeBilinear, which the papers'
    numbers are made with: place i takes pixel i H / 299, rounded as there. "torch": as pytorch-fid has it."""
    x = images.float()
    if resize == "torch":
        return F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    for dim in (3, 2):
        at = torch.arange(299, device=x.device, dtype=torch.float32) * float(np.float32(x.shape[dim]) / np.float32(299))
        low, share = at.long(), (at - at.floor()).view(-1, *[1] * (3 - dim))
        x, after = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=x.shape[dim] - 1))
        x = x + (after - x) * share
    return (x - 128) / 128


def load_inception(path=None, device="cpu"):
    """InceptionV3 with a file's weights, or the published ones, downloaded once into torch.hub's folder. Names, shapes and
    dtypes must be right; num_batches_tracked, which the published file has, may be missing. Raises FidError. Without a path a
    machine's first rank downloads for its others, so all call this (which fail for themselves where it could not)."""
    later, together = os.environ.get("LOCAL_RANK", "0") != "0", not path and dist.is_initialized()
    file = path or os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(URL))
    with reading(file if path else URL):
        if together and later:
            dist.barrier()
        try:
            if not path and not os.path.exists(file):
                os.makedirs(os.path.dirname(file), exist_ok=True)
                torch.hub.download_url_to_file(URL, file, SHA256)       # aside, and renamed when its hash is right
        finally:
            if together and not later:
                dist.barrier()
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        if not path and digest != SHA256:
            raise FidError(f"{file} is not the published file, its SHA-256 is {digest}: delete it")
        net, state = InceptionV3(), torch.load(file, map_location="cpu", weights_only=True)
        found, needed = ({f"{name} {list(t.shape)} {t.dtype}" for name, t in tensors.items() if not name.endswith("tracked")}
                         for tensors in (state, net.state_dict()))
        for odd in sorted(found ^ needed)[:1]:
            raise FidError(f"{file} does not fit this network: only the {'file' if odd in found else 'network'} has {odd}")
        net.load_state_dict(state, strict=False)
        net.digest = digest
    return net.fold().to(device)
