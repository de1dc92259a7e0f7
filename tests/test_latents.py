"""vae.py, latents.py, check.py: the VAE against its parts; images -> latents; prepare.py check."""

import errno
import gc
import json
import math
import os
import shutil
import sys
import types

import numpy as np
import pytest
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
    torchrun,
    write_picture,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint as ckpt
import dataset
import header
import images
import latents
import pictures
import sample as s
import vae as v


def complain(*arguments):
    """What prepare.py says where it fails; None where it does not."""
    return run_script("prepare.py", *arguments)


# ---- the VAE -------------------------------------------------------------------------------------


@torch.no_grad()
def test_vae_against_its_parts(folder):
    """Means, clamped log-variances and pixels from the VAE's own layers, the rest by numpy."""
    net = tiny_vae("vae")
    net.quant_conv.bias += torch.tensor([0.0, 0, 0, 0, 0, 100, -100, 1])  # beyond [-30, 20]
    net.decoder.conv_out.weight *= 3  # pixels beyond [-1, 1]
    net.save_pretrained("vae")
    vae = v.load_vae("vae")

    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 24), dtype=np.uint8)
    stored = v.encode(vae, pixels)
    parts = net.quant_conv(net.encoder(torch.from_numpy(pixels / 127.5 - 1).float()))
    mean, logvar = parts.chunk(2, dim=1)
    assert stored.dtype == np.float16 and stored.shape == (5, 8, 8, 6)
    expected = torch.cat([mean, torch.exp(logvar.clamp(-30, 20) / 2)], dim=1).numpy()
    half_a_unit = 2**-11  # of float16; and float32's own error
    assert np.allclose(stored, expected, rtol=half_a_unit + 1e-6, atol=1e-5)
    assert (stored[:, 5] == np.float16(math.exp(10))).all()
    assert (stored[:, 6] == np.float16(math.exp(-15))).all()

    z = 3 * torch.randn(5, 4, 8, 6, dtype=F64)
    decoded = net.decoder(net.post_quant_conv(z.float())).permute(0, 2, 3, 1).numpy()
    levels = (decoded * 0.5 + 0.5).clip(0, 1) * np.float32(255)
    got = v.decode(vae, z)
    assert got.dtype == np.uint8 and got.shape == (5, 32, 24, 3) and {0, 255} <= set(got.flat)
    # Where the last bits of a level cannot change the whole number below it.
    sure = (np.abs(levels - levels.round()) > 1e-3) | (levels % 255 == 0)
    assert sure.mean() > 0.9 and (got == np.floor(levels))[sure].all()
    with pytest.raises(v.VAEError, match="not finite"):
        v.decode(vae, math.inf * z)


# How files of 2022 name attention's weights.
NAMES_OF_2022 = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_vae_files(folder):
    """Old names are read; other weights and missing ones are refused."""
    tiny_vae("vae")
    v.load_vae.cache_clear()  # it may know another folder of this name
    crc32 = v.load_vae("vae").crc32
    path = "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)

    def load(content):
        save_file(content, path)
        v.load_vae.cache_clear()
        return v.load_vae("vae", crc32=crc32)

    renamed = {}
    for name, weight in weights.items():
        for new, old in NAMES_OF_2022.items():
            name = name.replace(new, old)
        renamed[name] = weight
    assert len(set(renamed) - set(weights)) == 16
    assert load(renamed).crc32 == crc32
    bias = weights["encoder.conv_in.bias"]
    with pytest.raises(v.VAEError, match="has other weights"):
        load({**weights, "encoder.conv_in.bias": bias + 1})
    del weights["encoder.conv_in.bias"]
    with pytest.raises(v.VAEError, match="lacks encoder.conv_in.bias"):
        load(weights)


def test_draws_of_latents():
    """Rows depend on the seed and their own index alone. Their moments are the posterior's, and
    those of all are latent_moments'."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(600, 3, 2, 2)) * [[[2]], [[1]], [[5]]] + 1
    stds = rng.uniform(0.1, 2, (600, 3, 2, 2))
    stored = np.concatenate([means, stds], axis=1).astype(np.float16)
    z = v.draw_latents(stored, 3, range(600))
    assert z.dtype == np.float32 and z.shape == (600, 3, 2, 2)
    assert (v.draw_latents(stored[7:9], 3, [7, 8]) == z[7:9]).all()
    assert (v.draw_latents(stored[7:8], 4, [7]) != z[7]).all()
    assert (v.draw_latents(stored[7:8], 3, [8]) != z[7]).all()

    noise = (z - stored[:, :3]) / stored[:, 3:]
    assert abs(noise.mean()) < 5 / noise.size**0.5
    assert abs(noise.var() - 1) < 5 * (2 / noise.size) ** 0.5
    of_sampler = s.noise_and_labels(3, [0], (3, 2, 2))[0][0, 0, 0, 0]
    assert abs(noise[0, 0, 0, 0] - of_sampler) > 1e-3
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 1e-3

    draws = np.concatenate([v.draw_latents(stored, seed, range(600)) for seed in range(200)])
    mean, std = v.latent_moments(stored)
    numbers = 200 * 2400
    assert np.abs((draws.mean((0, 2, 3)) - mean) / std).max() < 5 / numbers**0.5
    assert np.abs(draws.std((0, 2, 3)) / std - 1).max() < 5 / (2 * numbers) ** 0.5


# ---- images -> latents ---------------------------------------------------------------------------


def test_imagenet(folder, source, capsys):
    """Rows, labels and file names against the files, and what the header says."""
    assert encode_all(source, "--name", "a") is None
    said = capsys.readouterr()
    assert "n01/25.JPEG" in said.err and "1 of 200 images could not be read" in said.out
    assert said.err.count("EXIF orientation is not applied") == 1
    header, data = dataset.load_dataset("data/a")
    files = open("data/a/train_files.txt").read().split()
    assert header["count"] == {"train": 199, "test": 0} and header["shape"] == [4, 8, 8]
    assert header["class_counts"] == [50, 49, 50, 50]
    assert header["kind"] == "latents" and header["dtype"] == "float16"
    assert header["vae"] == "tiny" and header["normalization"] == "measured"
    assert header["skipped"] == 1 and header["image_size"] == 32
    whole = [f"n0{i // 50}/{i % 50:02}.JPEG" for i in range(200) if i != 75]
    assert sorted(files) == sorted(whole) and files[:75] == sorted(files)[:75]
    assert [f"n0{label}" for label in data["train_labels"]] == [f.split("/")[0] for f in files]

    vae = v.load_vae(str(source / "vae"))
    pick = [0, 74, 75, 76, 198]
    pixels = [images.read_square(source / "src" / files[i], 32).pixels for i in pick]
    again = v.encode(vae, np.stack(pixels))  # in another batch than before
    assert np.allclose(data["train_images"][pick], again, rtol=2**-9, atol=1e-3)
    assert header["vae_crc32"] == vae.crc32
    kept = open("data/a/left_out.txt", encoding="utf-8").read()
    assert kept.startswith("n01/25.JPEG\tOSError: ") and kept.count("\n") == 1
    assert sorted(os.listdir("data/a")) == [
        "header.json",
        "left_out.txt",
        "test_images.npy",
        "test_labels.npy",
        "train_files.txt",
        "train_images.npy",
        "train_labels.npy",
    ]
    assert "there already" in encode_all(source, "--name", "a")


def test_what_imagenet_refuses(folder, source, monkeypatch):
    with_vae = ("--vae", source / "vae")
    src = source / "src"
    assert "multiple of 4" in complain("imagenet", src, "--size", 30, *with_vae)
    assert "--batch" in complain("imagenet", src, "--size", 32, "--batch", -1, *with_vae)
    assert "no folder" in complain("imagenet", "gone", "--size", 32, *with_vae)
    for arguments in (["x.partial"], ["--name", "x.replaced"], ["x.partial", "--name", "x"]):
        said = complain("imagenet", src, *arguments, "--size", 32, *with_vae)
        assert "must not end in .partial or .replaced" in said
    os.makedirs("hollow")
    said = complain("imagenet", src, "--size", 32, "--vae", "hollow")
    assert "cannot load the VAE hollow" in said
    full_disk = types.SimpleNamespace(free=200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full_disk)
    assert "data/full takes 204.8 kB" in encode_all(source, "--name", "full")
    assert not os.path.exists("data") or os.listdir("data") == []
    monkeypatch.setitem(sys.modules, "diffusers", None)
    v.load_vae.cache_clear()
    assert "pip install diffusers" in complain("imagenet", src, "--size", 32, *with_vae)


def test_imagenet_keeps_the_orientation_that_is_stored(folder, source, capsys):
    """As ADM does: a photograph lies on its side, and `check --src` compares with the same. A name
    that lies about the format is told."""
    picture = Image.new("RGB", (40, 40), (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    os.makedirs("src/c")
    picture.save("src/c/0.png")
    picture.save("src/c/1.png", "WEBP", lossless=True, exif=exif)
    upright = [images.read_square(f"src/c/{i}.png", 32).pixels for i in (0, 1)]
    assert (upright[0] != upright[1]).any()
    with_vae = ("--vae", source / "vae")
    assert complain("imagenet", "src", "--size", 32, "--name", "a", *with_vae) is None
    assert "1 of another format than the name says" in capsys.readouterr().err
    stored = dataset.load_dataset("data/a")[1]["train_images"]
    assert (stored[0] == stored[1]).all()
    complain("check", "a", "--src", "src", *with_vae)
    sheet = np.asarray(Image.open("data/a/check.png"))
    assert (sheet[:32, :32] == sheet[:32, 32:64]).all()


def test_imagenet_of_a_zip(folder, source, capsys):
    """The same latents as of the folder."""
    os.makedirs("src")
    for name in ("n00", "n02"):
        shutil.copytree(source / "src" / name, folder / "src" / name)
    shutil.make_archive("src", "zip", "src")
    for name, src in (("folder", "src"), ("zip", "src.zip")):
        arguments = ("--size", 32, "--name", name, "--vae", source / "vae", "--batch", 16)
        assert complain("imagenet", src, *arguments) is None
    for file in os.listdir("data/zip"):
        if file != "header.json":
            one = open(f"data/zip/{file}", "rb").read()
            assert one == open(f"data/folder/{file}", "rb").read(), file
    capsys.readouterr()
    assert complain("check", "zip", "--src", "src.zip", "--vae", source / "vae") is None
    assert "originals over decoded examples" in capsys.readouterr().out

    shutil.make_archive("top", "zip", ".", "src")  # with src/ before all names
    arguments = ("--size", 32, "--name", "top", "--vae", source / "vae", "--batch", 16)
    assert complain("imagenet", "top.zip", *arguments) is None
    assert "top.zip: taken from the one folder in it, src" in capsys.readouterr().err
    assert open("data/top/train_files.txt").readline() == "src/n00/00.JPEG\n"
    labels = [dataset.load_dataset(f"data/{name}")[1]["train_labels"] for name in ("zip", "top")]
    assert (labels[0] == labels[1]).all()
    assert complain("check", "top", "--src", "top.zip", "--vae", source / "vae") is None


def test_imagenet_with_a_class_that_cannot_be_read(folder, source, capsys):
    """It is named; and when its files are mended the same command goes on."""
    (folder / "src" / "dogs").mkdir(parents=True)
    for i in range(3):
        write_picture(folder / "src" / "cats" / f"{i}.png", colour=(80 * i, 9, 9))
    for i in range(12):
        (folder / "src" / "dogs" / f"{i}.png").write_bytes(b"")
        (folder / "src" / "dogs" / f"{i}.txt").write_bytes(b"")
    command = ("imagenet", "src", "--size", 32, "--name", "a", "--vae", source / "vae")
    assert "no image of class 'dogs'" in complain(*command, "--batch", 2)
    said = capsys.readouterr().err
    assert "left out: 12\n    dogs/0.txt: its name is not that of an image\n" in said
    assert all(f"    dogs/{i}.png: the file is empty\n" in said for i in range(12))
    assert "left_out.txt" not in said  # there is none
    assert os.listdir("data") == ["a.partial"]
    assert "interrupted" in complain("digits", "--name", "a")  # which must not remove it
    write_picture(folder / "src" / "dogs" / "1.png")
    assert complain(*command, "--batch", 2) is None
    assert dataset.load_dataset("data/a")[0]["class_counts"] == [3, 1]


def test_what_an_interrupted_run_does_not_go_on_with(folder, source):
    """Other labels of the same files, which would stay the old ones; and what is damaged."""
    rows = [[f"{i}.png", i % 2] for i in range(4)]
    for name, _ in rows:
        write_picture(folder / "src" / name)
        (folder / "src" / name).write_bytes(b"")

    def encode(labels):
        (folder / "src" / "dataset.json").write_text(json.dumps({"labels": labels}))
        command = ("imagenet", "src", "--size", 32, "--name", "a", "--vae", source / "vae")
        return complain(*command)

    assert "none of the 4 images" in encode(rows)  # so it stays as it was begun
    assert "none of the 4 images" in encode(rows)
    rows[0][1] = 1
    assert "begun with another set of labels: delete it" in encode(rows)
    rows[0][1] = 0
    os.truncate("data/a.partial/train_images.npy", 200)
    said = encode(rows)
    assert "cannot write data/a: mmap length" in said and "delete data/a.partial" in said
    os.truncate("data/a.partial/train_images.npy", 0)
    said = encode(rows)
    assert "cannot write data/a: No data left" in said and "delete data/a.partial" in said
    for content in ("[]", "{", "3"):
        (folder / "data" / "a.partial" / "plan.json").write_text(content)
        assert "plan.json is damaged: delete data/a.partial" in encode(rows)


def test_a_message_says_how_plans_differ():
    labelled = types.SimpleNamespace(names=["a.png", "b.png"], labels=[0, 1], classes=["a", "b"])
    plan = latents.make_plan(labelled, 256, 64, "mine", "0a0b0c0d", False)
    assert set(latents.WORDS_OF_PLAN) == set(plan)
    assert latents.differences(plan, plan) == []
    assert latents.differences({}, plan) == []
    other = latents.make_plan(labelled, 512, 16, "other", "01020304", False)
    assert latents.differences(other, plan) == [
        "another --size (512, not 256)",
        "another batch size (16, not 64)",
        "another VAE (other, not mine)",
        "other weights of the VAE",
    ]


def test_a_plan_from_before_measure_was_an_option(folder, source):
    write_picture(folder / "src" / "0.png")
    (folder / "src" / "0.png").write_bytes(b"")
    command = ("imagenet", "src", "--size", 32, "--name", "a", "--vae", source / "vae")
    assert "none of the 1 images" in complain(*command)
    file = folder / "data" / "a.partial" / "plan.json"
    plan = json.loads(file.read_text())
    assert plan["measure"] is False
    assert "begun with another setting of --measure: delete it" in complain(*command, "--measure")
    del plan["measure"]
    file.write_text(json.dumps(plan))
    assert "none of the 1 images" in complain(*command, "--measure")


def test_imagenet_goes_on_after_a_fault_of_the_disk(folder, source, monkeypatch):
    """It ends in one line, without a traceback of a worker; no image is left out for it."""
    for i in range(4):
        write_picture(folder / "src" / f"{i}.png", colour=(60 * i, 9, 9))
    command = ("imagenet", "src", "--size", 32, "--name", "a", "--vae", source / "vae")

    def fail(self):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as disk:
        disk.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
        said = complain(*command)
    assert said == f"prepare.py: [Errno {errno.EIO}] Input/output error: 'src/0.png'"
    assert os.listdir("data") == ["a.partial"]
    gc.collect()  # the error, and with it the lock
    assert complain(*command) is None
    assert dataset.load_dataset("data/a")[0]["count"]["train"] == 4


def test_imagenet_of_files_that_were_mended(folder, source):
    """Where none could be read, all are read again."""
    write_picture(folder / "src" / "0.png")
    whole = (folder / "src" / "0.png").read_bytes()
    (folder / "src" / "0.png").write_bytes(b"")
    command = ("imagenet", "src", "--size", 32, "--name", "a", "--vae", source / "vae")
    assert "none of the 1 images" in complain(*command)
    (folder / "src" / "0.png").write_bytes(whole)
    assert complain(*command) is None
    assert dataset.load_dataset("data/a")[0]["count"]["train"] == 1


def test_two_ranks_remark_once(folder, source):
    """On images of another format than their names say, of both ranks together."""
    (folder / "src").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 14), (60 * i, 9, 9)).save(f"src/{i}.jpg", "PNG")
    (folder / "src" / "4.jpg").write_bytes(b"")
    command = ("imagenet", "src", "--size=32", "--name=a", f"--vae={source}/vae", "--batch=1")
    said = torchrun("prepare.py", *command).stderr.decode()
    assert said.count("of another format than the name says") == 1
    assert "4 of another format" in said and "0.jpg is PNG" in said
    assert said.count("left out: 1\n") == 1 and said.count("4.jpg: the file is empty") == 1


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_imagenet_refuses_names_with_a_line_end(folder, source, end):
    write_picture(folder / "src" / f"a{end}b.png")
    said = complain("imagenet", "src", "--size", 32, "--vae", source / "vae")
    assert said.endswith(
        f"src/a{end!r}b.png: a file name holds a line end: rename it".replace("'", "")
    )
    assert not os.path.exists("data")


def test_published_latents(folder, source, capsys):
    """With the published VAE's name its published numbers, and the presets that go with them."""
    for i in range(4):
        path = folder / "src" / f"c{i % 2}" / f"{i}.jpg"
        write_picture(path, size=(300, 260), colour=(60 * i, 200, 9))
    vae = source / "vae"
    named = ("--vae", vae, "--vae-name", v.SD_VAE)
    assert complain("imagenet", "src", "--size", 256, *named) is None
    assert complain("imagenet", "src", "data/im512/", "--size", 512, *named) is None
    for size, mean in ((256, 0.86488), (512, 1.56)):
        header = dataset.load_dataset(f"data/im{size}")[0]
        assert header["normalization"] == "published" and header["mean"][0] == mean
        assert header["vae"] == v.SD_VAE
    said = complain("check", "im256", "--vae", vae)
    assert "not about 0 and 1" in said and "prepare.py imagenet --measure" in said
    assert capsys.readouterr().out.count("normalization: published\n") == 2

    mine = ("--name", "mine", "--measure")
    assert complain("imagenet", "src", "--size", 256, *named, *mine) is None
    assert "normalization: measured\n" in capsys.readouterr().out
    header, data = dataset.load_dataset("data/mine")
    assert header["normalization"] == "measured" and "measure" not in header
    assert header["made_by"].endswith(" --measure")
    assert (header["mean"], header["std"]) == v.latent_moments(data["train_images"])
    assert complain("check", "mine", "--vae", vae) is None

    small = ("--hidden_size=32", "--depth=1", "--num_heads=2", "--patch_size=16")
    short = ("--batch_size=4", "--micro_batch=4", "--steps=1", f"--vae_files={vae}")
    assert run_script("train.py", "--preset=im256_w2", *small, *short) is None
    capsys.readouterr()
    checkpoint = "out/im256_w2/ckpt.safetensors"
    about = ckpt.load_tensors(checkpoint)[1]
    assert about["data"] == dataset.load_dataset("data/im256")[0]
    assert about["train"]["vae"] == v.SD_VAE
    two = (checkpoint, "--n", 2)
    assert run_script("sample.py", *two, "--out", "two.npz", "--vae", vae) is None
    assert np.load("two.npz")["arr_0"].shape == (2, 256, 256, 3)
    assert "cannot load the VAE" in run_script("sample.py", *two, "--vae", "src")


def test_other_latents_are_refused(folder, source):
    assert encode_all(source, "--name", "im256b") is None
    complaint = "vae is 'stabilityai/sd-vae-ft-ema', but data/im256b holds latents of 'tiny'"
    flags = ("--preset=im256_w2", "--dataset=im256b", "--name=b")
    assert complaint in run_script("train.py", *flags)
    assert "holds pixels" in run_script("train.py", "--vae=tiny", *SMALL)
    make_checkpoint("pixels.safetensors")
    complaint = run_script("sample.py", "pixels.safetensors", "--vae", source / "vae")
    assert "this model makes pixels" in complaint


# ---- check ---------------------------------------------------------------------------------------


def test_check_of_latents(folder, source, capsys):
    assert encode_all(source, "--name", "a") is None
    header, data = dataset.load_dataset("data/a")
    vae = v.load_vae(str(source / "vae"))
    capsys.readouterr()

    def check(*arguments):
        return complain("check", *arguments, "--vae", source / "vae")

    def rewrite(**changes):
        with open("data/a/header.json", "w") as f:
            json.dump({**header, **changes}, f)

    assert check("a", "--src", source / "src") is None and check("data/a") is None
    said = capsys.readouterr().out
    assert "4 classes of 49 to 50" in said and said.count("std 1.000") == 8
    sheet = np.asarray(Image.open("data/a/check.png"))
    assert sheet.shape == (32, 8 * 32, 3)
    rows = np.random.default_rng(0).permutation(199)[:8]
    means = torch.from_numpy(data["train_images"][rows[1:2], :4])
    assert (sheet[:, 32:64] == v.decode(vae, means)[0]).all()

    rewrite(std=[1, 1, 1, 5])
    assert "channel 3 has mean" in check("a") and "channel 0" not in check("a")
    rewrite(class_counts=[49, 50, 50, 50])
    assert "class_counts are not those" in check("a")
    assert "no picture" not in check("a")
    said = complain("check", "a", "--vae", "gone")  # what was found before is told all the same
    assert "class_counts are not those" in said and "no picture: cannot load the VAE gone" in said
    rewrite(vae_crc32="00000000")
    assert "other weights" in check("a")
    rewrite()
    stored = np.load("data/a/train_images.npy")
    np.save("data/a/train_images.npy", np.concatenate([stored[:190], 0 * stored[190:]]))
    capsys.readouterr()
    assert "their checksum differs" in check("a")
    assert "9 of 199 images have one value" in capsys.readouterr().out
    np.save("data/a/train_images.npy", 0 * stored)
    assert "all images have one value" in check("a")
    np.save("data/a/train_images.npy", stored[:199])
    assert "its header says float16 (200, 8, 8, 8)" in check("a")


def test_check_of_pixels(folder, capsys):
    assert complain("digits") is None and complain("check", "digits") is None
    assert "for which --src and --vae are" in complain("check", "digits", "--src", "gone")
    os.rename("data/digits", "moved")
    assert complain("check", "moved") is None
    assert "no data in data/digits" in complain("check", "digits")
    labels = np.load("moved/train_labels.npy")
    np.save("moved/train_labels.npy", labels[::-1])  # as many of each class
    assert "their checksum differs" in complain("check", "moved")
    with open("moved/header.json") as f:
        older = json.load(f)
    del older["train_crc32"]
    with open("moved/header.json", "w") as f:
        json.dump(older, f)
    assert complain("check", "moved") is None
    assert "has no checksum" in capsys.readouterr().out
    dataset.Writer("data/none", (1, 8, 8), {"train": 0, "test": 0}).finish("none", [])
    assert "no training images" in complain("check", "none")


@pytest.mark.parametrize("channels, shown", [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_check_draws_any_number_of_channels(folder, channels, shown):
    """The first three, or the first; and images that are not square."""
    shape = (channels, 6, 9)
    stored = np.random.default_rng(0).integers(0, 256, (8, *shape), dtype=np.uint8)
    writer = dataset.Writer("data/a", shape, {"train": 8, "test": 0})
    for i, image in enumerate(stored):
        writer.set(i, image, 0)
    writer.finish("a", [])
    assert complain("check", "a") is None
    sheet = np.asarray(Image.open("data/a/check.png"))
    first = np.random.default_rng(0).permutation(8)[0]
    assert sheet.shape == (6, 8 * 9, 3)
    assert (sheet[:, :9] == stored[first][shown].transpose(1, 2, 0)).all()


@pytest.mark.parametrize("dtype", [np.float64, np.int16])
def test_other_numbers_are_refused(folder, dtype):
    """Samples are uint8 or float32, which holds float16, too."""
    with pytest.raises(header.DataError, match=f"dtype '{np.dtype(dtype).name}'"):
        dataset.Writer("data/a", (3, 6, 9), {"train": 8, "test": 0}, dtype)
    assert not os.path.exists("data/a.partial")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_check_draws_floats(folder, dtype):
    """The smallest is black, the largest white; whatever is not finite is counted."""
    shape = (3, 6, 9)
    stored = np.random.default_rng(0).integers(-300, 300, (8, *shape)).astype(dtype)

    def write(name, images):
        writer = dataset.Writer(f"data/{name}", shape, {"train": 8, "test": 0}, dtype)
        for i, image in enumerate(images):
            writer.set(i, image, 0)
        writer.finish(name, [], mean=[0.0] * 3, std=[1.0] * 3)

    write("a", stored)
    assert complain("check", "a") is None
    sheet = np.asarray(Image.open("data/a/check.png")).astype(float)
    order = np.random.default_rng(0).permutation(8)
    drawn = np.concatenate(stored[order], axis=2).transpose(1, 2, 0).astype(float)
    levels = (drawn - drawn.min()) / np.ptp(drawn) * 255
    assert np.abs(sheet - levels).max() <= 0.5
    stored[2, 0, 0, 0] = np.nan
    stored[5, 0, 0, 0] = np.inf
    write("b", stored)
    assert "2 of 8 images hold numbers that are not finite" in complain("check", "b")
    assert os.path.exists("data/b/check.png")


def test_check_takes_what_folder_makes_of_unused_labels(folder, capsys):
    """A dataset.json may leave labels out. Both say so, and neither refuses it."""
    (folder / "src").mkdir()
    rows = []
    for i in range(12):
        Image.effect_noise((9, 9), 50).save(folder / "src" / f"{i}.png")
        rows.append([f"{i}.png", 2 * (i % 2)])
    (folder / "src" / "dataset.json").write_text(json.dumps({"labels": rows}))
    said_so = "1 of the 3 classes have no image: 1\n"
    assert complain("folder", "src", "--size", 8) is None
    assert said_so in capsys.readouterr().err
    assert complain("check", "folder") is None
    assert said_so in capsys.readouterr().out


def test_check_of_sequences(folder, capsys):
    """Their moments are printed, and nothing is drawn."""
    writer = dataset.Writer("data/a", (2, 50), {"train": 8, "test": 0}, np.float32)
    for i, sequence in enumerate(np.random.default_rng(0).standard_normal((8, 2, 50), np.float32)):
        writer.set(i, sequence, 0)
    writer.finish("a", [], mean=[0.0, 0.0], std=[1.0, 1.0])
    assert complain("check", "a") is None
    assert "8 images, 2x50" in capsys.readouterr().out
    assert not os.path.exists("data/a/check.png")


@gpu
def test_gpu_vae(folder):
    """Posteriors in float32 (TensorFloat-32 in convolutions), images in float16, against the
    CPU's."""
    tiny_vae("vae")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    reference, got = (
        np.float32(v.encode(v.load_vae("vae", device), pixels)) for device in ("cpu", "cuda")
    )
    close(torch.from_numpy(got), torch.from_numpy(reference), 3e-3)
    header = dict(mean=[0.1] * 4, std=[2.0] * 4, vae="vae")
    x0 = torch.randn(5, 4, 8, 8, dtype=F64)
    images_on = {}
    for device in ("cpu", "cuda"):
        vae = pictures.find_vae(header, torch.device(device))
        images_on[device] = pictures.to_images(x0.to(device), header, vae).astype(int)
    reference, got = images_on["cpu"], images_on["cuda"]
    assert np.abs(got - reference).max() <= 3 and np.abs(got - reference).mean() < 0.3
