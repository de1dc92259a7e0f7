"""emoji.py and `prepare.py emoji`, on small archives that are made here."""

import gzip
import io
import json
import lzma
import os
import tarfile

import numpy as np
import pytest
from helpers import run_script
from PIL import Image

import emoji
from dataset import load_dataset

TONES = ("1F3FB", "1F3FF")
CATEGORIES = ("Food & Drink", "People & Body")


def png(number, tone):
    """A red square on transparent ground. Its green tells the emoji, its blue the skin tone."""
    image = Image.new("RGBA", (64, 64), (0, 0, 255, 0))
    image.paste((200, number, tone, 255), (16, 16, 48, 48))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def entry(number, categories=CATEGORIES):
    """An emoji of emoji.json. Every second one is of people, and has two skin tones."""
    category = categories[number % 2]
    about = dict(unified=f"{number:04X}", image=f"{number:04x}.png", category=category)
    if number % 2:
        about["skin_variations"] = {
            tone: dict(image=f"{number:04x}-{tone.lower()}.png") for tone in TONES
        }
    return about


def write_package(path, vendor, count=20, categories=CATEGORIES, **changes):
    """An archive as `npm pack` makes it: `count` emoji, a patch of skin, one without a picture."""
    entries = [entry(number, categories) for number in range(count)]
    skin = dict(unified="1F3FB", image="1f3fb.png", category="Component")
    absent = dict(unified="FFFF", image="ffff.png", category=CATEGORIES[0])
    contents = {
        "package.json": json.dumps(dict(name=f"emoji-datasource-{vendor}", version="1.2.3")),
        "emoji.json": json.dumps([skin, *entries, absent]),
        "README.md": "what it is",
        f"img/{vendor}/64/1f3fb.png": png(255, 0),
        f"img/{vendor}/sheets/64.png": png(254, 0),
    }
    for number, about in enumerate(entries):
        contents[f"img/{vendor}/64/{about['image']}"] = png(number, 0)
        for place, tone in enumerate(about.get("skin_variations", {}).values()):
            contents[f"img/{vendor}/64/{tone['image']}"] = png(number, 100 + place)
    contents.update(changes)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_package(tmp_path):
    """Names, groups and categories; and all that is left out is named."""
    path = tmp_path / "twitter.tgz"
    write_package(path, "twitter", count=3)
    package = emoji.read_package(path)
    assert package.title == "emoji-datasource-twitter 1.2.3"
    assert package.license == "CC BY 4.0"
    of_name = {os.path.basename(e.name): (e.group, e.category) for e in package.emoji}
    assert of_name == {
        "0000.png": ("0000", "Food & Drink"),
        "0001.png": ("0001", "People & Body"),
        "0001-1f3fb.png": ("0001", "People & Body"),
        "0001-1f3ff.png": ("0001", "People & Body"),
        "0002.png": ("0002", "Food & Drink"),
    }
    reasons = {os.path.basename(name): reason for name, reason in package.left_out}
    assert set(reasons) == {"1f3fb.png", "ffff.png"}
    assert "no picture" in reasons["ffff.png"]


def test_prepare_emoji(folder):
    """On white, with the category as label, and no emoji on both sides of the split."""
    for vendor in ("twitter", "google"):
        write_package(f"{vendor}.tgz", vendor)
    arguments = ("emoji", "twitter.tgz", "google.tgz", "--held-out", 0.3)
    assert run_script("prepare.py", *arguments) is None
    header, data = load_dataset("data/emoji")
    assert header["class_names"] == list(CATEGORIES)
    assert header["count"] == {"train": 2 * 7 * 4, "test": 2 * 3 * 4}  # 1 or 3 of 2 vendors each
    assert header["license"] == (
        "emoji-datasource-twitter 1.2.3: CC BY 4.0; emoji-datasource-google 1.2.3: Apache 2.0"
    )
    groups = {}
    for part in ("train", "test"):
        images, labels = data[f"{part}_images"], data[f"{part}_labels"]
        assert images.shape[1:] == (3, 32, 32)
        assert (images[:, :, 0, 0] == 255).all()  # the ground is white, not its hidden blue
        red, number, _ = images[:, :, 16, 16].T
        assert (red == 200).all()
        assert (number % 2 == labels).all()
        groups[part] = set(number.tolist())
    assert groups["train"] | groups["test"] == set(range(20))
    assert not groups["train"] & groups["test"]
    with open("data/emoji/left_out.txt") as f:
        assert len(f.readlines()) == 4
    assert run_script("prepare.py", "check", "emoji") is None


def test_prepare_emoji_of_two_versions(folder):
    """An old package calls a category otherwise: one emoji has one label all the same."""
    write_package("old.tgz", "twitter", categories=("Food & Drink", "Smileys & People"))
    write_package("new.tgz", "google")
    assert run_script("prepare.py", "emoji", "old.tgz", "new.tgz") is None
    header, data = load_dataset("data/emoji")
    assert header["class_names"] == list(CATEGORIES)
    number = data["train_images"][:, 1, 16, 16]
    assert (number % 2 == data["train_labels"]).all()


def test_prepare_emoji_is_a_function_of_the_seed(folder):
    write_package("a.tgz", "twitter")
    parts = []
    for seed in (0, 0, 1):
        arguments = ("emoji", "a.tgz", "--size", 8, "--seed", seed, "--overwrite")
        assert run_script("prepare.py", *arguments) is None
        parts.append(np.array(load_dataset("data/emoji")[1]["test_images"]))
    assert np.array_equal(parts[0], parts[1])
    assert not np.array_equal(parts[0], parts[2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"package.json": "{}"}, "is not an archive of emoji-datasource-VENDOR"),
        ({"emoji.json": "[1, 2]"}, "is not an archive of emoji-datasource-VENDOR"),
        ({"emoji.json": "[" * 100_000}, "is not an archive of emoji-datasource-VENDOR"),
        (
            {"emoji.json": '[{"image": "0000.png", "unified": ["1"], "category": "A"}]'},
            "is not an archive of emoji-datasource-VENDOR",
        ),
        ({"emoji.json": "[]"}, "no pictures in img/twitter/64"),
        ({"img/twitter/64/0000.png": b"no picture"}, "img/twitter/64/0000.png"),
    ],
)
def test_prepare_emoji_refuses(folder, changes, words):
    write_package("a.tgz", "twitter", **changes)
    assert words in run_script("prepare.py", "emoji", "a.tgz")
    assert not os.path.exists("data/emoji")


def test_prepare_emoji_refuses_damaged_archives(folder):
    """A broken header in the middle, where tarfile stops without a word; and a damaged .xz."""
    write_package("whole.tgz", "twitter")
    with gzip.open("whole.tgz") as f:
        content = f.read()
    stored = gzip.compress(content, 0)
    name = b"package/img/twitter/64/0012.png"
    assert stored.count(name) == 1
    with open("a.tgz", "wb") as f:
        f.write(stored.replace(name, name[:-1] + b"x"))
    packed = bytearray(lzma.compress(content))
    packed[len(packed) // 2] ^= 255
    with open("a.tar.xz", "wb") as f:
        f.write(packed)
    assert "cannot read a.tgz: CRC check failed" in run_script("prepare.py", "emoji", "a.tgz")
    assert "cannot read a.tar.xz" in run_script("prepare.py", "emoji", "a.tar.xz")
    with tarfile.open("sparse.tgz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("package/package.json")
        member.pax_headers = {"GNU.sparse.map": "a,b"}
        archive.addfile(member)
    assert "cannot read sparse.tgz" in run_script("prepare.py", "emoji", "sparse.tgz")
    assert not os.path.exists("data/emoji")


def test_prepare_emoji_refuses_other_files(folder):
    write_package("a.tgz", "twitter")
    assert "given twice" in run_script("prepare.py", "emoji", "a.tgz", "a.tgz")
    assert "at most 64" in run_script("prepare.py", "emoji", "a.tgz", "--size", 65)
    assert "cannot read nowhere.tgz" in run_script("prepare.py", "emoji", "nowhere.tgz")
    with open("a.tgz", "r+b") as f:
        f.truncate(1000)
    assert "cannot read a.tgz" in run_script("prepare.py", "emoji", "a.tgz")
