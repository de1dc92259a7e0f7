"""..."""
import functools
import json
import math
import os
import shutil
import sys
import types

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
from helpers import (
    F64,
    SMALL,
    close,
    encode_all,
    gpu,
    make_checkpoint,
    run_script,
    tiny_vae,
    write_picture,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint as ckpt
import dataset
import images
import latents
import sample as s
import vae as v


@torch.no_grad()
def test_vae_against_its_parts(folder):
    """Means, clamped log-variances and pixels from the VAE's own layers, the rest by numpy."""
    net = tiny_vae("vae")
    with torch.no_grad():
        net.quant_conv.bias += torch.tensor([0., 0, 0, 0, 0, 100, -100, 1])                      # log-variances out of [-30, 20]
        net.decoder.conv_out.weight *= 3                                                         # pixels out of [-1, 1]
    net.save_pretrained("vae")
    vae = v.load_vae("vae")
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 24), dtype=np.uint8)
    stored = v.encode(vae, images)
    mean, logvar = net.quant_conv(net.encoder(torch.from_numpy(images / 127.5 - 1).float())).chunk(2, dim=1)
    assert stored.dtype == np.float16 and stored.shape == (5, 8, 8, 6)
    expected = torch.cat([mean, torch.exp(logvar.clamp(-30, 20) / 2)], dim=1).numpy()
    assert np.allclose(stored, expected, rtol=2 ** -11 + 1e-6, atol=1e-5)                        # half a unit of float16, float32's error
    assert (stored[:, 5] == np.float16(math.exp(10))).all() and (stored[:, 6] == np.float16(math.exp(-15))).all()
    z = 3 * torch.randn(5, 4, 8, 6, dtype=F64)
    pixels = net.decoder(net.post_quant_conv(z.float())).permute(0, 2, 3, 1).numpy()
    levels, got = (pixels * 0.5 + 0.5).clip(0, 1) * np.float32(255), v.decode(vae, z)
    assert got.dtype == np.uint8 and got.shape == (5, 32, 24, 3) and {0, 255} <= set(got.flat)
    sure = (np.abs(levels - levels.round()) > 1e-3) | (levels % 255 == 0)                        # where the last bits cannot matter
    assert sure.mean() > 0.9 and (got == np.floor(levels))[sure].all()

    path = "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}              # as files of 2022 name them
    renamed = {functools.reduce(lambda key, item: key.replace(*item), old.items(), key): weight for key, weight in weights.items()}
    assert len(set(renamed) - set(weights)) == 16
    for content, complaint in ((renamed, None), ({**weights, "encoder.conv_in.bias": weights["encoder.conv_in.bias"] + 1}, "has other weights"),
                               ({key: weight for key, weight in weights.items() if key != "encoder.conv_in.bias"}, "lacks encoder.conv_in.bias")):
        save_file(content, path)
        v.load_vae.cache_clear()
        if complaint:
            with pytest.raises(v.VAEError, match=complaint):
                v.load_vae("vae", crc32=vae.crc32)
        else:
            assert v.load_vae("vae", crc32=vae.crc32).crc32 == vae.crc32
    with pytest.raises(v.VAEError, match="not finite"):
        v.decode(vae, math.inf * z)


def test_draws_of_latents():
    """Rows depend on the seed and their own index alone; their moments are the posterior's, and latent_moments' those of all."""
    rng = np.random.default_rng(0)
    stored = np.concatenate([rng.normal(size=(600, 3, 2, 2)) * [[[2]], [[1]], [[5]]] + 1, rng.uniform(0.1, 2, (600, 3, 2, 2))], axis=1).astype(np.float16)
    z = v.draw_latents(stored, 3, range(600))
    assert z.dtype == np.float32 and z.shape == (600, 3, 2, 2)
    assert (v.draw_latents(stored[7:9], 3, [7, 8]) == z[7:9]).all()
    assert (v.draw_latents(stored[7:8], 4, [7]) != z[7]).all() and (v.draw_latents(stored[7:8], 3, [8]) != z[7]).all()
    noise = (z - stored[:, :3]) / stored[:, 3:]
    assert abs(noise.mean()) < 5 / noise.size ** 0.5 and abs(noise.var() - 1) < 5 * (2 / noise.size) ** 0.5 and abs(noise[0, 0, 0, 0] - s.draw(3, [0], (3, 2, 2))[0][0, 0, 0, 0]) > 1e-3
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    draws = np.concatenate([v.draw_latents(stored, seed, range(600)) for seed in range(200)])
    mean, std = v.latent_moments(stored)
    assert np.abs((draws.mean((0, 2, 3)) - mean) / std).max() < 5 / (200 * 2400) ** 0.5 and np.abs(draws.std((0, 2, 3)) / std - 1).max() < 5 / (2 * 200 * 2400) ** 0.5


def test_imagenet(folder, source, capsys, monkeypatch):
    """Rows, labels and file names against the files; what the header says; check; and what is refused."""
    assert encode_all(source, "--name", "a") is None
    said = capsys.readouterr()
    assert "n01/25.JPEG" in said.err and "1 of 200 images could not be read" in said.out
    header, data = dataset.load_dataset("data/a")
    files = open("data/a/train_files.txt").read().split()
    assert header["count"] == {"train": 199, "test": 0} and header["shape"] == [4, 8, 8] and header["class_counts"] == [50, 49, 50, 50]
    assert [header[key] for key in ("kind", "dtype", "vae", "skipped", "normalization", "image_size")] == ["latents", "float16", "tiny", 1, "measured", 32]
    assert sorted(files) == sorted(f"n0{i // 50}/{i % 50:02}.JPEG" for i in range(200) if i != 75) and files[:75] == sorted(files)[:75]
    assert [f"n0{label}" for label in data["train_labels"]] == [file.split("/")[0] for file in files]
    vae = v.load_vae(str(source / "vae"))
    pick = [0, 74, 75, 76, 198]
    again = v.encode(vae, np.stack([images.read_image(source / "src" / files[i], 32) for i in pick]))
    assert np.allclose(data["train_images"][pick], again, rtol=2 ** -9, atol=1e-3) and header["vae_crc32"] == vae.crc32     # of another batch
    assert sorted(os.listdir("data/a")) == ["header.json", "test_images.npy", "test_labels.npy", "train_files.txt", "train_images.npy", "train_labels.npy"]
    assert "there already" in encode_all(source, "--name", "a")

    check = lambda *a: run_script("prepare.py", "check", *a, "--vae", source / "vae")
    assert check("a", "--src", source / "src") is None and check("data/a") is None
    said = capsys.readouterr().out
    assert "4 classes of 49 to 50" in said and said.count("std 1.000") == 8
    sheet = np.asarray(Image.open("data/a/check.png"))
    assert sheet.shape == (32, 8 * 32, 3)
    rows = np.random.default_rng(0).permutation(199)[:8]
    assert (sheet[:, 32:64] == v.decode(vae, torch.from_numpy(data["train_images"][rows[1:2], :4]))[0]).all()
    json.dump({**header, "std": [1, 1, 1, 5]}, open("data/a/header.json", "w"))
    assert "channel 3 has mean" in check("a") and "channel 0" not in check("a")
    json.dump({**header, "class_counts": [49, 50, 50, 50]}, open("data/a/header.json", "w"))
    assert "class_counts are not those" in check("a")
    json.dump({**header, "vae_crc32": "00000000"}, open("data/a/header.json", "w"))
    assert "other weights" in check("a")
    json.dump(header, open("data/a/header.json", "w"))
    stored = np.load("data/a/train_images.npy")
    np.save("data/a/train_images.npy", np.concatenate([stored[:190], 0 * stored[190:]]))
    assert "9 of 199 images have one value" in check("a")
    np.save("data/a/train_images.npy", stored[:199])
    assert "its header says float16 (200, 8, 8, 8)" in check("a")
    assert run_script("prepare.py", "digits") is None and run_script("prepare.py", "check", "digits") is None
    os.rename("data/digits", "moved")
    assert run_script("prepare.py", "check", "moved") is None and "no data in data/digits" in run_script("prepare.py", "check", "digits")

    refuse = lambda *a: run_script("prepare.py", "imagenet", source / "src", *a)
    assert "multiple of 4" in refuse("--size", 30, "--vae", source / "vae")
    assert "no folder" in run_script("prepare.py", "imagenet", "gone", "--size", 32, "--vae", source / "vae")
    os.makedirs("hollow")
    assert "cannot load the VAE hollow" in refuse("--size", 32, "--vae", "hollow")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=200_000))
    assert "data/full takes 0.0 GB" in encode_all(source, "--name", "full")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    v.load_vae.cache_clear()
    assert "pip install diffusers" in refuse("--size", 32, "--vae", source / "vae")


def test_published_latents(folder, source, capsys):
    """With the published VAE's name the published numbers, and then the published presets; other VAEs are refused."""
    for i in range(4):
        write_picture(folder / "src" / f"c{i % 2}" / f"{i}.jpg", size=(300, 260), colour=(60 * i, 200, 9))
    named = ("--vae", source / "vae", "--vae-name", latents.SD_VAE)
    for size, preset, mean in ((256, "im256_w2", 0.86488), (512, "im512_w2p25", 1.56)):
        assert run_script("prepare.py", "imagenet", "src", *[f"data/im{size}/"] * (size > 256), "--size", size, *named) is None
        header = dataset.load_dataset(f"data/im{size}")[0]
        assert header["normalization"] == "published" and header["mean"][0] == mean and header["vae"] == latents.SD_VAE
    assert "not about 0 and 1" in run_script("prepare.py", "check", "im256", "--vae", source / "vae")
    small = ("--hidden_size=32", "--depth=1", "--num_heads=2", "--patch_size=16", "--batch_size=4", "--micro_batch=4", "--steps=1")
    assert run_script("train.py", "--preset=im256_w2", *small, f"--vae_files={source / 'vae'}") is None
    capsys.readouterr()
    about = ckpt.load_tensors("out/im256_w2/ckpt.safetensors")[1]
    assert about["data"] == dataset.load_dataset("data/im256")[0] and about["train"]["vae"] == latents.SD_VAE
    assert run_script("sample.py", "out/im256_w2/ckpt.safetensors", "--n", 2, "--out", "two.npz", "--vae", source / "vae") is None
    assert np.load("two.npz")["arr_0"].shape == (2, 256, 256, 3)
    assert "cannot load the VAE" in run_script("sample.py", "out/im256_w2/ckpt.safetensors", "--n", 2, "--vae", "src")
    assert encode_all(source, "--name", "im256b") is None
    assert "vae is 'stabilityai/sd-vae-ft-ema', but data/im256b holds latents of 'tiny'" in run_script("train.py", "--preset=im256_w2", "--dataset=im256b", "--name=b")
    assert "holds pixels" in run_script("train.py", "--vae=tiny", *SMALL)
    make_checkpoint("pixels.safetensors")
    assert "this model makes pixels" in run_script("sample.py", "pixels.safetensors", "--vae", source / "vae")


@gpu
def test_gpu_vae(folder):
    """Posteriors in float32 (TensorFloat-32 in convolutions), images in float16, against the CPU's."""
    tiny_vae("vae")
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    reference, got = (np.float32(v.encode(v.load_vae("vae", device), images)) for device in ("cpu", "cuda"))
    close(torch.from_numpy(got), torch.from_numpy(reference), 3e-3)
    header = dict(mean=[0.1] * 4, std=[2.0] * 4, vae="vae")
    x0 = torch.randn(5, 4, 8, 8, dtype=F64)
    reference, got = (s.to_images(x0.to(device), header).astype(int) for device in ("cpu", "cuda"))
    assert np.abs(got - reference).max() <= 3 and np.abs(got - reference).mean() < 0.3
