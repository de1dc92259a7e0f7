"""
A checkpoint -> images.

    python sample.py assets/digits.safetensors                     # one step; a grid with every class, samples.png
    python sample.py ckpt.safetensors --nfe 4 --classes 3,7 --n 64 # four steps, 64 images of classes 3 and 7
    python sample.py ckpt.safetensors --n 50000 --out samples.npz  # arr_0, uint8 NHWC, labels by the training histogram
    torchrun --nproc_per_node=8 -- sample.py ckpt.safetensors --n 50000 --out samples.npz   # its --n needs the --

A checkpoint that was trained on latents names its VAE, which decodes them (--vae FOLDER: where it lies).
The noise and the label of image i depend on the seed and i alone: not on the batch size, the ranks or
the other images.
"""
import itertools
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from model import CheckpointError, load_model, widest
from prepare import Parser
from vae import VAEError, decode, load_vae


@torch.no_grad()
def sample(model, x1, y, w, nfe):
    """Noise x1 (B, C, H, W) -> x0, in nfe steps of one network call each: x += (t_next - t) k F(x, t, t_next).

    y (B,) int64, w (B,) the guidance weight. The state is float64 between steps (float32 where the
    device has no float64), the network is fed in its parameters' dtype."""
    if nfe < 1:
        raise ValueError(f"nfe must be at least 1, not {nfe}")
    dtype, wide = next(model.parameters()).dtype, widest(x1.device)
    times = torch.linspace(1, 0, nfe + 1, dtype=wide, device=x1.device)
    k = w.to(wide).view(-1, 1, 1, 1) if model.config.scaled else 1
    x, w = x1.to(wide), w.to(dtype)
    for t, t_next in itertools.pairwise(times):
        F = model(x.to(dtype), t.to(dtype).expand(len(x)), t_next.to(dtype).expand(len(x)), y, w)
        x = x + (t_next - t) * k * F.to(wide)
    return x


def draw(seed, indices, shape, class_counts=None):
    """The noise (n, *shape) float32 and the labels (n,) int64 of images `indices`. Labels follow
    class_counts; without them all are 0, which is "no class" where there are no classes."""
    share = np.cumsum(class_counts, dtype=np.float64) / np.sum(class_counts) if class_counts else np.ones(1)
    noise, labels = np.empty((len(indices), *shape), np.float32), np.empty(len(indices), np.int64)
    for row, i in enumerate(indices):
        rng = np.random.Generator(np.random.Philox(key=[seed, i]))
        labels[row] = np.searchsorted(share, rng.random(), side="right")
        rng.standard_normal(dtype=np.float32, out=noise[row])
    return torch.from_numpy(noise), torch.from_numpy(labels)


def find_vae(header, device, where=None):
    """The VAE that a data header names, from `where` or from the hub: in float16 on a GPU, as published. None for pixels."""
    if "vae" in header:
        half = torch.float16 if device.type == "cuda" else torch.float32
        return load_vae(where or header["vae"], device, half, header.get("vae_crc32"))[0]
    if where:
        raise VAEError("this model makes pixels: it has no VAE that could lie elsewhere")


def to_images(x0, header, vae=None):
    """Network units (B, C, H, W) -> uint8 (B, H, W, C), by the mean and std of the data's header and, of latents, by its VAE."""
    per_channel = lambda name: torch.tensor(header[name], dtype=x0.dtype, device=x0.device).view(-1, 1, 1)
    x0 = x0 * per_channel("std") + per_channel("mean")
    if "vae" in header:
        return decode(vae or find_vae(header, x0.device), x0)
    return x0.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid(images, columns, least=800):
    """uint8 (N, H, W, C) -> one PIL image, row by row, enlarged by whole pixels to about `least` wide."""
    n, H, W, C = images.shape
    rows = -(-n // columns)
    zoom = max(1, least // (columns * W))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    H, W, gap = H * zoom, W * zoom, 2
    sheet = np.full((rows * (H + gap) - gap, columns * (W + gap) - gap, C), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (H + gap), i % columns * (W + gap)
        sheet[top:top + H, left:left + W] = image
    return as_pil(sheet)


def as_pil(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def write_images(out, images, columns):
    """A .png: one grid. A .npz: arr_0. Both appear whole or not at all. Else: a folder of PNGs."""
    if out.endswith((".png", ".npz")):
        with open(out + ".partial", "wb") as f:
            grid(images, columns).save(f, "PNG") if out.endswith(".png") else np.savez(f, arr_0=images)
        os.replace(out + ".partial", out)
    else:
        os.makedirs(out, exist_ok=True)
        for i, image in enumerate(tqdm(images, desc="writing", unit="img")):
            as_pil(image).save(os.path.join(out, f"{i:06d}.png"))


def guidance_weight(asked, trained):
    """The w to sample with: the one asked for, where the model was trained with it, or the trained one."""
    if trained["sampler"] == "constant":
        if asked is not None and asked != trained["w"]:
            raise CheckpointError(f"this model was trained at guidance {trained['w']:g} only, not {asked:g}")
        return trained["w"]
    low, high = trained["w_min"], trained["w_max"]
    asked = (low * high) ** 0.5 if asked is None else asked
    if not low <= asked <= high:
        raise CheckpointError(f"this model was trained with guidance from {low:g} to {high:g}, not {asked:g}")
    return asked


def parse(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--nfe", type=int, default=1, help="steps, one network call each (default 1)")
    parser.add_argument("--n", type=int, help="how many images (default: a grid that shows every class)")
    parser.add_argument("--classes", help="comma-separated class numbers, taken in turn (default: every class in a "
                                          "grid; with --n, drawn from the training histogram)")
    parser.add_argument("--guidance", type=float, help="the weight w (default: the trained one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="samples.png", help="a .png grid, an .npz, or a folder for PNGs")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--vae", help="where the checkpoint's VAE lies (default: on the Hugging Face hub, under its name)")
    parser.add_argument("--device", help="default: a GPU where there is one")
    args = parser.parse_args(argv)
    if args.nfe < 1:
        raise CheckpointError(f"--nfe must be at least 1, not {args.nfe}")
    if args.n is not None and args.n < 1 or args.batch < 1 or not 0 <= args.seed < 2 ** 63:
        raise CheckpointError("--n and --batch must be at least 1, --seed at least 0 and below 2**63")
    if os.path.splitext(args.out)[1] not in (".png", ".npz", ""):
        raise CheckpointError(f"--out takes a .png, an .npz or a folder, not {args.out!r}")
    if os.path.isdir(args.out) and os.listdir(args.out):
        raise CheckpointError(f"--out: {args.out} is a folder with files in it already")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)          # complain before the work, not after it
    return args


def chosen_classes(args, num_classes):
    """The classes that --classes asks for, or that a grid shows; None: by the training histogram."""
    if args.classes is not None:
        if not num_classes:
            raise CheckpointError("--classes: this model was trained without classes")
        try:
            classes = [int(c) for c in args.classes.split(",")]
        except ValueError:
            raise CheckpointError(f"--classes takes numbers such as 0,3,7, not {args.classes!r}") from None
        for c in classes:
            if not 0 <= c < num_classes:
                raise CheckpointError(f"--classes: {c} is not a class; this model knows 0 to {num_classes - 1}")
        return classes
    return list(range(num_classes)) if args.n is None and num_classes else None


def main():
    args = parse()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(args.device)
    model, about = load_model(args.checkpoint, device)
    config, header = model.config, about["data"]
    vae = find_vae(header, device, args.vae)
    w = guidance_weight(args.guidance, about["guidance"])
    classes = chosen_classes(args, config.num_classes)
    columns = min(len(classes), 32) if classes else 10
    n = args.n or (len(classes) * max(1, 80 // len(classes)) if classes else 80)

    mine = range(n * rank // ranks, n * (rank + 1) // ranks)
    images, seconds = [], 0.0
    for first in tqdm(range(mine.start, mine.stop, args.batch), desc="sampling", unit="batch", disable=rank > 0):
        indices = range(first, min(first + args.batch, mine.stop))
        x1, y = draw(args.seed, indices, (config.in_channels, config.input_size, config.input_size), header["class_counts"])
        if classes:
            y = torch.tensor([classes[i % len(classes)] for i in indices])
        start = time.perf_counter()
        x0 = sample(model, x1.to(device), y.to(device), torch.full((len(y),), w, device=device), args.nfe)
        images.append(to_images(x0, header, vae))                             # waits for the device
        seconds += time.perf_counter() - start
    images = np.concatenate(images) if images else np.empty((0, config.input_size, config.input_size, config.in_channels), np.uint8)
    if ranks > 1:
        dist.init_process_group("gloo")
        parts = [None] * ranks if rank == 0 else None
        dist.gather_object((images, seconds), parts)
        dist.destroy_process_group()
        if rank == 0:
            images, seconds = np.concatenate([part for part, _ in parts]), max(seconds for _, seconds in parts)
    if rank == 0:
        write_images(args.out, images, columns)
        print(f"{args.out}: {n} images in {args.nfe} step{'s' * (args.nfe > 1)} at guidance {w:g}, "
              f"{n / seconds:.0f} images/s on {ranks} x {device.type}")


def find_device(name=""):
    """The device of a name; by default a GPU where there is one, this rank's. Raises CheckpointError."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise CheckpointError(f"no device {name!r}: there are cpu, cuda and mps")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"no device {name!r} here: {str(error).splitlines()[0]}") from None
    return device


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, OSError, RuntimeError) as error:
        sys.exit(f"sample.py: {' '.join(str(error).split())}")
