"""
The VAE between images and latents: diffusers' AutoencoderKL. diffusers is imported here alone, and
only when a VAE is loaded.

    vae = load_vae(SD_VAE, device)               # a name on the Hugging Face hub, or a folder
    stored = encode(vae, images)                 # uint8 -> posteriors, which prepare.py keeps
    z = draw_latents(stored, seed, indices)      # what train.py trains on, anew each epoch
    images = decode(vae, z)                      # latents -> uint8

A posterior is a normal distribution for each latent. It is stored as (2C, h, w): C channels of
means, then C channels of standard deviations.
"""

import functools
import zlib

import numpy as np
import torch

from files import UserError

SD_VAE = "stabilityai/sd-vae-ft-ema"  # the default, a name on the Hugging Face hub

# Mean and standard deviation of ImageNet's latents under SD_VAE, one a channel, by the size of the
# images.
PUBLISHED = {
    256: (
        [0.86488, -0.27787343, 0.21616915, 0.3738409],
        [4.85503674, 5.31922414, 3.93725398, 3.9870003],
    ),
    512: (
        [1.56, -0.695, 0.483, 0.729],
        [5.27, 5.91, 4.21, 4.31],
    ),
}

PIXELS_AT_ONCE = 2**22  # that are decoded together: 64 images of 256 x 256


class VAEError(UserError):
    """Something about a VAE, in one line for the user."""


@functools.lru_cache(maxsize=1)
def load_vae(where, device="cpu", dtype=torch.float32, crc32=None):
    """The VAE's module, without gradients.

    Its .shrinks is the ratio of sides, image to latent. Its .crc32 is that of its weights in
    float32, as eight hexadecimal digits. Raises VAEError where it cannot be loaded whole, or has
    another crc32 than the given one.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise VAEError(
            "latents need a VAE, and the VAE needs diffusers: pip install diffusers"
        ) from None
    try:
        vae, report = AutoencoderKL.from_pretrained(
            where,
            use_safetensors=True,  # the other kind of file can execute code
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # of the hub, the format, the config: many kinds
        reason = " ".join(str(error).split())[:200]
        raise VAEError(f"cannot load the VAE {where}: {reason}") from None
    lost = [*report["missing_keys"], *report["mismatched_keys"]]
    if lost:  # diffusers would go on with random weights in their place
        more = f" and {len(lost) - 1} more weights" if len(lost) > 1 else ""
        raise VAEError(f"the VAE {where} is not whole: it lacks {lost[0]}{more}")
    vae.shrinks = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.crc32 = crc32_of(vae.state_dict())
    if crc32 not in (None, vae.crc32):
        raise VAEError(
            f"the VAE {where} has other weights (crc32 {vae.crc32}) than the one that made "
            f"the latents ({crc32})"
        )
    vae.requires_grad_(False).eval()
    return torch.nn.Module.to(vae, device, dtype)  # diffusers' own `to` would warn


def crc32_of(weights):
    """The checksum of weights {name: tensor}, in the order of their names."""
    crc = 0
    for name in sorted(weights):
        crc = zlib.crc32(weights[name].numpy(), crc)
    return f"{crc:08x}"


def encode(vae, images):
    """Images (n, 3, H, W) uint8 -> posteriors (n, 2C, h, w) float16. Raises VAEError."""
    x = torch.from_numpy(images).to(vae.device, vae.dtype) / 127.5 - 1  # (n, 3, H, W), -1 to 1
    posterior = vae.encode(x).latent_dist
    stored = torch.cat([posterior.mean, posterior.std], dim=1).half()  # (n, 2C, h, w)
    if not stored.isfinite().all():
        raise VAEError("this VAE's latents are not finite in float16")
    return stored.cpu().numpy()


def decode(vae, z):
    """Latents z (n, C, h, w), as the VAE makes them -> images (n, H, W, 3) uint8.

    Levels are truncated to whole numbers, not rounded, as those of the published models are. Raises
    VAEError.
    """
    height, width = z.shape[2] * vae.shrinks, z.shape[3] * vae.shrinks
    images = []
    for part in z.to(vae.device, vae.dtype).split(max(1, PIXELS_AT_ONCE // (height * width))):
        pixels = vae.decode(part).sample.float()  # (n, 3, H, W), about -1 to 1
        if not pixels.isfinite().all():
            raise VAEError(f"this VAE's images are not finite in {vae.dtype}")
        levels = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).byte()
        images.append(levels.permute(0, 2, 3, 1).cpu().numpy())  # (n, H, W, 3)
    return np.concatenate(images)


def draw_latents(stored, seed, indices):
    """Posteriors (n, 2C, h, w) -> latents (n, C, h, w) float32, one draw of each.

    Row i's noise is a function of (seed, indices[i]) alone.
    """
    mean, std = np.split(np.float32(stored), 2, axis=1)
    for row, index in enumerate(indices):
        # With this counter it is another stream than sample.py's.
        bits = np.random.Philox(key=[seed, index], counter=[0, 0, 0, 1])
        noise = np.random.Generator(bits).standard_normal(std.shape[1:], np.float32)
        mean[row] += std[row] * noise
    return mean


def latent_moments(stored):
    """Mean and standard deviation, one a channel, of latents drawn from posteriors (N, 2C, h, w).

    For z = mu + sigma * noise, E z = E mu and E z^2 = E(mu^2 + sigma^2). Returns two lists of C
    numbers.
    """
    sums = 0
    for first in range(0, len(stored), 256):
        mean, std = np.split(np.float64(stored[first : first + 256]), 2, axis=1)
        square = mean**2 + std**2  # E z^2
        sums = sums + np.stack([a.mean((2, 3)).sum(0) for a in (mean, square)])
    mean, square = sums / len(stored)
    return mean.tolist(), np.sqrt(square - mean**2).tolist()
