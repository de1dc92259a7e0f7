"""
The VAE between images and latents, diffusers' AutoencoderKL. diffusers is imported here alone, when one is loaded.

    vae = load_vae("stabilityai/sd-vae-ft-ema", device)   # a name on the Hugging Face hub, or a folder
    stored = encode(vae, images)                          # uint8 -> posteriors, which prepare.py keeps
    z = draw_latents(stored, seed, indices)               # what train.py trains on, a new draw in every epoch
    images = decode(vae, z)                               # latents -> uint8
"""
import functools
import zlib

import numpy as np
import torch

# Of ImageNet's latents under stabilityai/sd-vae-ft-ema, by image size: mean and standard deviation, one a channel.
PUBLISHED = {256: ([0.86488, -0.27787343, 0.21616915, 0.3738409], [4.85503674, 5.31922414, 3.93725398, 3.9870003]),
             512: ([1.56, -0.695, 0.483, 0.729], [5.27, 5.91, 4.21, 4.31])}


class VAEError(OSError):
    """Something about a VAE, in one line for the user."""


@functools.lru_cache(maxsize=1)
def load_vae(where, device="cpu", dtype=torch.float32, crc32=None):
    """The module, without gradients; its .crc32 is that of its weights in float32, eight hexadecimal digits, and
    .shrinks the ratio of sides, image to latent. Raises VAEError where it cannot be had whole, or has another crc32."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise VAEError("latents need a VAE, and the VAE needs diffusers: pip install diffusers") from None
    try:                                                          # safetensors: the other kind of file can execute
        vae, report = AutoencoderKL.from_pretrained(where, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True)
    except Exception as error:                                    # of the hub, the format, the config: many kinds
        raise VAEError(f"cannot load the VAE {where}: {' '.join(str(error).split())[:200]}") from None
    if lost := [*report["missing_keys"], *report["mismatched_keys"]]:          # diffusers would go on with random ones
        raise VAEError(f"the VAE {where} is not whole: it lacks {lost[0]}" + f" and {len(lost) - 1} more weights" * (len(lost) > 1))
    vae.shrinks = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.crc32 = f"{functools.reduce(lambda crc, item: zlib.crc32(item[1].numpy(), crc), sorted(vae.state_dict().items()), 0):08x}"
    if crc32 not in (None, vae.crc32):
        raise VAEError(f"the VAE {where} has other weights (crc32 {vae.crc32}) than the one that made the latents ({crc32})")
    return torch.nn.Module.to(vae.requires_grad_(False).eval(), device, dtype)          # diffusers' own `to` would warn


def encode(vae, images):
    """Images (n, 3, H, W) uint8 -> posteriors (n, 2C, h, w) float16: C means, then C standard deviations."""
    posterior = vae.encode(torch.from_numpy(images).to(vae.device, vae.dtype) / 127.5 - 1).latent_dist
    stored = torch.cat([posterior.mean, posterior.std], dim=1).half()
    if not stored.isfinite().all():
        raise VAEError("this VAE's latents are not finite in float16")
    return stored.cpu().numpy()


def decode(vae, z):
    """Latents z (n, C, h, w) as the VAE makes them -> images (n, H, W, 3) uint8, *truncated* as the published are."""
    images, most = [], max(1, 2 ** 22 // (z.shape[2] * z.shape[3] * vae.shrinks ** 2))           # 64 of 256 x 256
    for part in z.to(vae.device, vae.dtype).split(most):
        pixels = vae.decode(part).sample.float()
        if not pixels.isfinite().all():
            raise VAEError(f"this VAE's images are not finite in {vae.dtype}")
        images.append(((pixels * 0.5 + 0.5).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(images)


def draw_latents(stored, seed, indices):
    """Posteriors (n, 2C, h, w) -> latents (n, C, h, w) float32; row i's noise is a function of (seed, indices[i]) alone."""
    mean, std = np.split(np.float32(stored), 2, axis=1)
    for row, i in enumerate(indices):                                      # the counter: another stream than sample.py's
        rng = np.random.Generator(np.random.Philox(key=[seed, i], counter=[0, 0, 0, 1]))
        mean[row] += std[row] * rng.standard_normal(std.shape[1:], np.float32)
    return mean


def latent_moments(stored):
    """The mean and standard deviation, one a channel, of all latents that posteriors (N, 2C, h, w) can give."""
    sums = 0
    for first in range(0, len(stored), 256):
        mean, std = np.split(np.float64(stored[first:first + 256]), 2, axis=1)
        sums = sums + np.stack([a.mean((2, 3)).sum(0) for a in (mean, mean ** 2 + std ** 2)])
    mean, square = sums / len(stored)
    return mean.tolist(), np.sqrt(square - mean ** 2).tolist()
