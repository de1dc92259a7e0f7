"""
A checkpoint -> images.

    python sample.py assets/digits.safetensors                     # one step; a grid with every class, samples.png
    python sample.py ckpt.safetensors --nfe 4 --classes 3,7 --n 64 # four steps, 64 images of classes 3 and 7
    python sample.py ckpt.safetensors --n 50000 --out samples.npz  # arr_0, uint8 NHWC, labels by the training histogram
    python sample.py ckpt.safetensors --nfe 4 --fid ref.npz        # the FID of 50,000 images, which are not kept
    torchrun --nproc_per_node=8 -- sample.py ckpt.safetensors --n 50000 --out samples.npz   # its --n needs the --

A checkpoint that was trained on latents names its VAE, which decodes them (--vae FOLDER: where it lies).
The noise and the label of image i depend on the seed and i alone: not on the batch size, the ranks or
the other images. Finished batches wait in OUT.parts/: after a kill the same command goes on from them, on any number
of ranks if each has a whole --batch to make, and ends with the same images. OUT appears whole or not at all.
"""
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from datetime import timedelta
from zipfile import ZipFile

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from checkpoint import raw_bytes
from device import abilities, find_device
from dual import widest
from files import CheckpointError, hold, written
from model import Block, compile_blocks, load_model
from options import Parser
from vae import VAEError, decode, load_vae

COMPILE_FROM = 1000      # images: for fewer, up to a minute of torch.compile does not pay


@torch.no_grad()
def sample(model, x1, y, w, nfe, euler=False):
    """Noise x1 (B, C, H, W) -> x0, in nfe steps of one network call each: x += (t_next - t) k F(x, t, t_next);
    with euler, for a network that was trained by flow matching, F(x, t, t).

    y (B,) int64, w (B,) the guidance weight. The state is float64 between steps (float32 where the
    device has no float64), the network is fed in its parameters' dtype."""
    if nfe < 1:
        raise ValueError(f"nfe must be at least 1, not {nfe}")
    dtype, wide = next(model.parameters()).dtype, widest(x1.device)
    times = torch.linspace(1, 0, nfe + 1, dtype=wide, device=x1.device)
    k = w.to(wide).view(-1, 1, 1, 1) if model.config.scaled else 1
    x, w = x1.to(wide), w.to(dtype)
    for t, t_next in itertools.pairwise(times):
        s = t if euler else t_next
        F = model(x.to(dtype), t.to(dtype).expand(len(x)), s.to(dtype).expand(len(x)), y, w)
        x = x + (t_next - t) * k * F.to(wide)
    return x




def fast(model, half=True, compiled=True):
    """Make a model sample as it trains, as far as its device is able to: its blocks compiled, once for each shape of a
    batch; and returns the context to call `sample` in, bfloat16 autocast. (The state between steps stays wide.)"""
    can_half, can_compile = abilities(model.pos_embed.device)
    model.run_block = Block.forward
    if compiled and can_compile:
        compile_blocks(model)
    return torch.autocast(model.pos_embed.device.type, torch.bfloat16, enabled=half and can_half)


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
        return load_vae(where or header["vae"], device, half, header.get("vae_crc32"))
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
    zoom, gap = max(1, least // (columns * images.shape[2])), 2
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    images = np.pad(images, ((0, -len(images) % columns), (0, gap), (0, gap), (0, 0)), constant_values=255)
    return as_pil(rearrange(images, "(row column) h w c -> (row h) (column w) c", column=columns)[:-gap, :-gap])


def as_pil(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def write_images(out, batches, n, columns):
    """n images, uint8 (B, H, W, C) at a time. A .png: one grid. A .npz: arr_0. Else: a folder of PNGs. Whole or not at all."""
    if out.endswith(".png"):
        with written(out) as f:
            grid(np.concatenate([*batches]), columns).save(f, "PNG")
    elif out.endswith(".npz"):
        first = next(batches)
        with written(out) as f, ZipFile(f, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, dict(descr="|u1", fortran_order=False, shape=(n, *first.shape[1:])))
            for images in itertools.chain([first], batches):
                array.write(images.tobytes())
    else:
        shutil.rmtree(out + ".partial", ignore_errors=True)              # of a run that was cut off
        os.makedirs(out + ".partial")
        for i, image in enumerate(itertools.chain.from_iterable(batches)):
            as_pil(image).save(os.path.join(out + ".partial", f"{i:06d}.png"))
        if os.path.isdir(out):
            os.rmdir(out)                                                # an empty one, as parse has seen
        os.replace(out + ".partial", out)


def guidance_weight(asked, trained):
    """The w to sample with: the one asked for, where the model was trained with it, or the trained one."""
    low, high = (trained["w"], trained["w"]) if trained["sampler"] == "constant" else (trained["w_min"], trained["w_max"])
    if asked is not None and not low <= asked <= high:
        span = f"from {low:g} to {high:g}" if low < high else f"{low:g} only"
        raise CheckpointError(f"this model was trained with guidance {span}, not {asked:g}")
    return asked if asked is not None else low if low == high else (low * high) ** 0.5


def parse(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--nfe", type=int, default=1, help="steps, one network call each (default 1)")
    parser.add_argument("--n", type=int, help="how many images (default: a grid that shows every class; with --fid, 50000)")
    parser.add_argument("--classes", help="comma-separated class numbers, taken in turn (default: every class in a "
                                          "grid; with --n, drawn from the training histogram)")
    parser.add_argument("--guidance", type=float, help="the weight w (default: the trained one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="a .png grid (default: samples.png), an .npz, or a folder for PNGs")
    parser.add_argument("--fid", metavar="REF", help="no images, but their FID against these statistics, by fid.py")
    parser.add_argument("--inception", metavar="PATH", help="the Inception weights for --fid, where fid.py is to find them")
    parser.add_argument("--vae", help="where the checkpoint's VAE lies (default: on the Hugging Face hub, under its name)")
    parser.add_argument("--batch", type=int, default=250, help="images of one network call (default 250)")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), help="of the network (default: bfloat16 on a CUDA device that has "
                        f"it, else float32); bfloat16 compiles too, up to a minute, from {COMPILE_FROM} images on")
    parser.add_argument("--device", help="default: a GPU where there is one")
    args = parser.parse_args(argv)
    if args.fid and args.out or args.inception and not args.fid:
        raise CheckpointError("--fid keeps no images, so it goes without --out; --inception goes with --fid only")
    name = f"{args.checkpoint.replace(os.sep, '-')}-nfe{args.nfe}-fid" if args.fid else "samples.png"
    args.out = os.path.normpath(args.out or name)                         # FOLDER/ is FOLDER
    args.n = 50_000 if args.fid and args.n is None else args.n
    if min(args.nfe, args.batch, 1 if args.n is None else args.n) < 1 or not 0 <= args.seed < 2 ** 63:
        raise CheckpointError("--nfe, --n and --batch must be at least 1, --seed at least 0 and below 2**63")
    if not args.fid and os.path.splitext(args.out)[1] not in (".png", ".npz", ""):
        raise CheckpointError(f"--out takes a .png, an .npz or a folder, not {args.out!r}")
    if os.path.isdir(args.out) and os.listdir(args.out):
        raise CheckpointError(f"--out: {args.out} is a folder with files in it already")
    if os.path.exists(args.out) and os.path.isdir(args.out) == bool(os.path.splitext(args.out)[1]) and not args.fid:
        raise CheckpointError(f"--out: {args.out} is there already, as a {'folder' if os.path.isdir(args.out) else 'file'}")
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
        if wrong := [c for c in classes if not 0 <= c < num_classes]:
            raise CheckpointError(f"--classes: {wrong[0]} is not a class; this model knows 0 to {num_classes - 1}")
        return classes
    return list(range(num_classes)) if args.n is None and num_classes else None


@torch.no_grad()
def main():
    args = parse()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))       # a rank that dies ends all; a slow one may be slow
    half, compiled = abilities(device)
    if args.precision == "bfloat16" and not half:
        raise CheckpointError(f"--precision bfloat16 takes a CUDA device that has it, which {device} is not")
    model, about = load_model(args.checkpoint, device)
    config, header = model.config, about["data"]
    vae = find_vae(header, device, args.vae)
    w = guidance_weight(args.guidance, about["guidance"])
    classes = chosen_classes(args, config.num_classes)
    n = args.n or (len(classes) * max(1, 80 // len(classes)) if classes else 80)
    if args.fid:
        import fid
        inception = fid.load_inception(args.inception, device)
        reference = fid.read_reference(args.fid, inception)

    half = half and args.precision != "float32"
    compiled = compiled and half and n >= COMPILE_FROM                   # then one shape of batch, which compiles once
    batch, folder = min(args.batch, -(-n // ranks)), args.out + ".parts"
    key = [about, n, args.nfe, w, args.seed, classes, batch, half, compiled, device.type, args.fid and inception.digest, vae and vae.crc32]
    key = hashlib.sha256(json.dumps(key).encode())
    for t in model.state_dict().values():
        key.update(raw_bytes(t))
    parts = [range(first, min(first + batch, n)) for first in range(0, n, batch)]
    path = lambda part: os.path.join(folder, f"{key.hexdigest()[:16]}-{part.start:09d}.npy")
    barrier = dist.barrier if ranks > 1 else lambda: None
    if rank == 0:
        lock, here = hold(folder, 10), {os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".npy")}
        for other in (others := here - set(map(path, parts))):
            os.remove(other)
        if here:
            print(f"sample.py: {folder}: " + ("of another checkpoint, seed, nfe or the like, so starting over" if others else
                  f"going on from {len(here)} of {len(parts)} batches"), file=sys.stderr)
    barrier()
    mine, start = [part for part in parts[rank::ranks] if not os.path.exists(path(part))], time.perf_counter()
    context = fast(model, half, compiled)
    for part in tqdm(mine, desc="sampling", unit="batch", disable=rank > 0):
        indices = range(part.start, part.start + batch) if compiled else part
        x1, y = draw(args.seed, indices, (config.in_channels, config.input_size, config.input_size), header["class_counts"])
        y = torch.tensor([classes[i % len(classes)] for i in indices]) if classes else y
        with context:
            x0 = sample(model, x1.to(device), y.to(device), torch.full((len(y),), w, device=device), args.nfe,
                        about.get("objective") == "flow_matching")
        images = to_images(x0, header, vae)[:len(part)]
        if args.fid:                                                     # of gray images three times
            images = torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).to(device)
            images = inception(images, resize="tf1").cpu().numpy()
        with written(path(part)) as f:
            np.save(f, images)
    seconds = time.perf_counter() - start
    barrier()
    if rank > 0:
        return
    batches = (np.load(path(part), allow_pickle=False) for part in tqdm(parts, desc="collecting", unit="batch"))
    if args.fid:
        moments = fid.Moments(2048)
        for part in batches:
            moments.add(torch.from_numpy(part))
        result = f"FID {fid.frechet_distance(*moments.mean_and_covariance(), *reference):.4f}{moments.few()} against {args.fid}"
    else:
        write_images(args.out, batches, n, min(len(classes), 32) if classes else 10)
        result = args.out
    lock.close()                                                         # or Windows would not delete it
    shutil.rmtree(folder)
    print(f"{result}: {n} images in {args.nfe} step{'s' * (args.nfe > 1)} at guidance {w:g}, "
          f"{sum(map(len, mine)) * ranks / seconds:.0f} images/s on {ranks} x {device.type}")




if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (CheckpointError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"sample.py: {' '.join(str(error).split())}")
