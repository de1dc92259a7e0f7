"""images.py and labels.py: which files are images, their labels, and how each kind is read."""

import errno
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
from helpers import HERE, run_script, write_picture
from PIL import Image

import images
import labels

RED = (200, 30, 40)

linux = pytest.mark.skipif(sys.platform != "linux", reason="links and names as Linux has them")


def touch(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def colour_of(file):
    """The middle pixel of an image of one colour."""
    pixels = images.read_whole(file).pixels
    return tuple(pixels[len(pixels) // 2, pixels.shape[1] // 2].tolist())


def nearly(colour, other, levels=6):
    return max(abs(a - b) for a, b in zip(colour, other)) <= levels


# ---- finding -------------------------------------------------------------------------------------


@linux
def test_one_rule_at_every_level(folder):
    """The same odd entries in a folder, in one below, and in one below that."""
    src = folder / "src"
    write_picture(folder / "elsewhere" / "deep" / "far.png")
    write_picture(folder / "other.png")
    names, left_out = set(), {}
    for level in ("", "a/", "a/b/"):
        at = src / level
        for suffix in ("jpg", "JPEG", "jpe", "jfif", "png", "WebP", "bmp", "tif", "TIFF"):
            touch(at / f"x.{suffix}")
            names.add(f"{level}x.{suffix}")
        for name in (".hidden.png", "._x.png", ".ipynb_checkpoints", ".DS_Store"):
            left_out[level + name] = "hidden"
        for name in ("__MACOSX", "Thumbs.db", "desktop.ini"):
            left_out[level + name] = "of the operating system"
        for name in (".hidden.png", "._x.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
            touch(at / name)
        write_picture(at / ".ipynb_checkpoints" / "x.png")
        write_picture(at / "__MACOSX" / "x.png")
        for name in ("notes.txt", "x.gif", "x.ps", "png"):
            touch(at / name)
            left_out[level + name] = "its name is not that of an image"
        os.symlink(folder / "other.png", at / "link.png")
        os.symlink(folder / "elsewhere", at / "linked")
        names |= {f"{level}link.png", f"{level}linked/deep/far.png"}
        os.symlink(folder / "gone.png", at / "dangling.png")
        left_out[f"{level}dangling.png"] = "a link to nothing"
        os.symlink(src, at / "loop")
        left_out[f"{level}loop"] = "a link to a folder that it lies in"
        os.symlink("self.png", at / "self.png")
        left_out[f"{level}self.png"] = "cannot be opened: Too many levels of symbolic links"
        os.mkfifo(at / "pipe.png")
        left_out[f"{level}pipe.png"] = "not a file"
        (at / "folder.jpg").mkdir()
        left_out[f"{level}folder.jpg"] = "an empty folder"
        write_picture(at / "full.jpg" / "in.png")
        names.add(f"{level}full.jpg/in.png")
    found = images.find_images(str(src))
    assert set(found.names) == names
    assert dict(found.left_out) == left_out
    assert found.files == [os.path.join(src, name) for name in found.names]
    assert found.folders == ["a", "folder.jpg", "full.jpg", "linked"]


def test_order(folder):
    """Compared folder by folder, by the numbers of their letters."""
    for name in ("b.png", "a.b/0.png", "a/9.png", "a/10.png", "Z.png", "a-b/0.png", "a/b/0.png"):
        touch(folder / "src" / name)
    expected = ["Z.png", "a/10.png", "a/9.png", "a/b/0.png", "a-b/0.png", "a.b/0.png", "b.png"]
    assert images.find_images("src").names == expected


def test_no_folder(folder):
    touch(folder / "a.png")
    touch(folder / "broken.zip")
    for path, complaint in (("gone", "no folder"), ("a.png", "no folder"), ("broken.zip", "zip")):
        with pytest.raises(images.ImageError, match=complaint):
            images.find_images(path)


@linux
def test_a_folder_that_may_not_be_entered(folder, monkeypatch):
    """It is named. (Tests may run as root, who may enter any: so the system's answer is made.)"""
    write_picture(folder / "src" / "a.png")
    write_picture(folder / "src" / "shut" / "b.png")
    scandir = os.scandir

    def refuse(path):
        if path.endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(images.os, "scandir", refuse)
    found = images.find_images("src")
    assert found.names == ["a.png"]
    assert found.left_out == [("shut", "a folder that cannot be opened: Permission denied")]


# ---- labels --------------------------------------------------------------------------------------


def test_hidden_and_system_folders_are_no_classes(folder):
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/cats/._0.png", "cats/0.png", "dogs/0.png"):
        write_picture(folder / "src" / name)
    labelled = labels.find_labelled("src")
    assert labelled.classes == ["cats", "dogs"]
    assert labelled.names == ["cats/0.png", "dogs/0.png"] and labelled.labels == [0, 1]
    assert [name for name, _ in labelled.left_out] == [".ipynb_checkpoints", "__MACOSX"]


def test_every_suffix_is_a_class(folder):
    """A class of .webp must not vanish and shift the next one's number."""
    for label, suffix in enumerate(images.SUFFIXES):
        touch(folder / "src" / f"class{label}" / f"x{suffix}")
    labelled = labels.find_labelled("src")
    assert labelled.labels == list(range(len(images.SUFFIXES)))


@pytest.mark.parametrize("content", ["notes.txt", ".hidden.png", "deeper/x.gif", None])
def test_a_class_without_images_is_named(folder, content):
    write_picture(folder / "src" / "cats" / "0.png")
    (folder / "src" / "dogs").mkdir()
    if content:
        touch(folder / "src" / "dogs" / content)
    with pytest.raises(images.ImageError, match="src/dogs looks like a class and holds no image"):
        labels.find_labelled("src")


def test_images_beside_classes(folder):
    write_picture(folder / "src" / "cats" / "0.png")
    write_picture(folder / "src" / "0.png")
    with pytest.raises(images.ImageError, match="beside its class folders"):
        labels.find_labelled("src")


@pytest.mark.parametrize(
    "names",
    [
        ["train/cats/0.png", "train/dogs/0.png", "val/cats/0.png"],
        ["train/0.png", "test/0.png"],
        ["Train/0.png"],
        ["training/cats/0.png", "extra/0.png", "more/0.png"],
        ["cats/0.png", "dogs/0.png", "train/0.png", "valid/0.png"],
    ],
)
def test_splits_are_no_classes(folder, names):
    for name in names:
        write_picture(folder / "src" / name)
    with pytest.raises(images.ImageError, match="not classes: give src/[Tt]rain"):
        labels.find_labelled("src")


def test_a_class_may_be_called_train(folder):
    """As in CIFAR-100 and COCO: one folder with images among other classes."""
    for name in ("bus", "car", "train"):
        write_picture(folder / "src" / name / "0.png")
    assert labels.find_labelled("src").classes == ["bus", "car", "train"]


@pytest.mark.parametrize("names", [["red/a/0.png", "red/b/0.png"], ["red/a/b/0.png"]])
def test_a_folder_that_is_one_level_too_high(folder, names):
    """Else all images would be one class."""
    for name in names:
        write_picture(folder / "src" / name)
    with pytest.raises(images.ImageError, match="one level lower: give src/red$"):
        labels.find_labelled("src")
    write_picture(folder / "src" / "red" / "0.png")
    assert labels.find_labelled("src").classes == ["red"]


def test_a_dataset_json_below_the_top(folder):
    """It is never passed over: here its folder must be given, there it must be moved."""
    write_picture(folder / "src" / "edm" / "0.png")
    touch(folder / "src" / "edm" / "dataset.json", b'{"labels": [["0.png", 1]]}')
    with pytest.raises(images.ImageError, match="one level lower: give src/edm$"):
        labels.find_labelled("src")
    write_picture(folder / "src" / "more" / "0.png")
    with pytest.raises(images.ImageError, match="only at the top of src: move edm/dataset.json"):
        labels.find_labelled("src")
    touch(folder / "src" / "dataset.json", b'{"labels": [["edm/0.png", 0]]}')
    left_out = dict(labels.find_labelled("src").left_out)
    assert left_out["edm/dataset.json"] == "it counts only at the top"


def test_class_names_that_differ_by_blanks(folder):
    with zipfile.ZipFile("src.zip", "w") as archive:
        for name in ("cat/0.png", "cat /0.png", "dog/0.png"):
            archive.writestr(name, b"x")
    with pytest.raises(images.ImageError, match="'cat' and 'cat ' look the same"):
        labels.find_labelled("src.zip")
    with zipfile.ZipFile("accents.zip", "w") as archive:
        for name in ("caf\u00e9/0.png", "cafe\u0301/0.png"):
            archive.writestr(name, b"x")
    with pytest.raises(images.ImageError, match="look the same"):
        labels.find_labelled("accents.zip")


def test_folders_around_folders(folder):
    with zipfile.ZipFile("deep.zip", "w") as archive:
        archive.writestr("a/" * 3000 + "0.png", b"x")
    with pytest.raises(images.ImageError, match="more than 50 folders deep"):
        labels.find_labelled("deep.zip")


EDM = {"labels": [["00000/img0.png", 3], ["00000/img1.png", 0], ["00001/img2.png", 3]]}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_labels_of_a_dataset_json(folder, kind):
    for row, (name, label) in enumerate(EDM["labels"]):
        write_picture(folder / "edm" / name, colour=(60 * row, 9, label))
    touch(folder / "edm" / "dataset.json", json.dumps(EDM).encode())
    src = "edm"
    if kind == "zip":
        src = "edm.zip"
        pack("edm", src)
    labelled = labels.find_labelled(src)
    assert labelled.classes == ["0", "1", "2", "3"] and labelled.labels == [3, 0, 3]
    assert labelled.names == [name for name, _ in EDM["labels"]] and labelled.left_out == []
    for row, (file, label) in enumerate(zip(labelled.files, labelled.labels)):
        assert colour_of(file) == (60 * row, 9, label)


def pack(source, path, top="", separator="/"):
    """A folder as a .zip, all names below `top`."""
    with zipfile.ZipFile(path, "w") as archive:
        for at, _, names in os.walk(source):
            for name in names:
                file = os.path.join(at, name)
                member = top + os.path.relpath(file, source).replace(os.sep, separator)
                archive.write(file, member)
                archive.infolist()[-1].filename = member  # as it is, on Windows too


def test_a_zip_of_splits(folder):
    write_picture(folder / "src" / "train" / "a" / "0.png")
    write_picture(folder / "src" / "val" / "a" / "0.png")
    pack("src", "src.zip", "top/")
    with pytest.raises(images.ImageError, match="unpack it, and give its folder train"):
        labels.find_labelled("src.zip")


@pytest.mark.parametrize("top", ["red/", "outer/red/"])
def test_a_zip_with_one_top_folder(folder, top):
    """As "Compress" makes it: its labels are those of the folder in it, and that is said."""
    write_picture(folder / "src" / "a" / "0.png")
    write_picture(folder / "src" / "b" / "1.png")
    touch(folder / "src" / "b" / "notes.txt")
    touch(folder / "src" / "c.txt")
    pack("src", "red.zip", top)
    with zipfile.ZipFile("red.zip", "a") as archive:
        archive.writestr("__MACOSX/red/._a", b"x")
    labelled = labels.find_labelled("red.zip")
    assert labelled.classes == ["a", "b"] and labelled.labels == [0, 1]
    assert labelled.names == [f"{top}a/0.png", f"{top}b/1.png"]
    assert [file.name for file in labelled.files] == labelled.names
    assert colour_of(labelled.files[1]) == RED
    left_out = ["__MACOSX", f"{top}b/notes.txt", f"{top}c.txt"]
    assert sorted(name for name, _ in labelled.left_out) == left_out
    assert labelled.notes[-1] == f"red.zip: taken from the one folder in it, {top[:-1]}"


def test_a_zip_with_a_dataset_json_in_its_top_folder(folder):
    for name, _ in EDM["labels"]:
        write_picture(folder / "edm" / name)
    touch(folder / "edm" / "dataset.json", json.dumps(EDM).encode())
    pack("edm", "edm.zip", "edm/")
    labelled = labels.find_labelled("edm.zip")
    assert labelled.labels == [3, 0, 3] and labelled.left_out == []
    assert labelled.notes[1] == "2 of the 4 classes have no image: 1, 2"
    assert colour_of(labelled.files[0]) == RED


def test_a_zip_in_a_zip(folder):
    """It is left out by name, as in a folder."""
    for name in ("cats/0.png", "dogs/0.png"):
        write_picture(folder / "src" / name)
    pack("src", "inner.zip")
    os.rename("inner.zip", "src/inner.zip")
    pack("src", "OUTER.ZIP")
    for src in ("src", "OUTER.ZIP"):
        labelled = labels.find_labelled(src)
        assert labelled.names == ["cats/0.png", "dogs/0.png"]
        assert labelled.left_out == [("inner.zip", "its name is not that of an image")]


def test_zips_without_an_image(folder):
    with zipfile.ZipFile("hollow.zip", "w"):
        pass
    (folder / "zero.zip").write_bytes(b"")
    with zipfile.ZipFile("nested.zip", "w") as archive:
        archive.write("hollow.zip")
    for src, complaint in (
        ("hollow.zip", "no .jpg, .* file in hollow.zip$"),
        ("zero.zip", "cannot read zero.zip: File is not a zip file"),
        ("nested.zip", r"file in nested.zip \(hollow.zip: its name is not that of an image\)"),
    ):
        with pytest.raises(images.ImageError, match=complaint):
            labels.find_labelled(src)


@linux
def test_folders_that_link_to_one_another(folder):
    for name in ("x/0.png", "y/0.png"):
        write_picture(folder / "src" / name)
    os.symlink("../y", "src/x/to_y")
    os.symlink("../x", "src/y/to_x")
    found = images.find_images("src")
    assert found.names == ["x/0.png", "x/to_y/0.png", "y/0.png", "y/to_x/0.png"]
    reason = "a link to a folder that it lies in"
    assert found.left_out == [("x/to_y/to_x", reason), ("y/to_x/to_y", reason)]


def test_a_zip_with_backslashes(folder):
    """Some programs of Windows write them between folders."""
    write_picture(folder / "src" / "a" / "0.png")
    write_picture(folder / "src" / "b" / "1.png")
    pack("src", "src.zip", separator="\\")
    labelled = labels.find_labelled("src.zip")
    assert labelled.classes == ["a", "b"] and labelled.names == ["a/0.png", "b/1.png"]
    assert colour_of(labelled.files[1]) == RED


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("twin", ["a/0.png", "a\\0.png"])
def test_a_zip_with_two_files_of_one_name(folder, twin):
    with zipfile.ZipFile("src.zip", "w") as archive:
        archive.writestr("a/0.png", b"x")
        archive.writestr(twin, b"y")
    with pytest.raises(images.ImageError, match="src.zip holds two files a/0.png"):
        labels.find_labelled("src.zip")


def test_a_dataset_json_that_names_a_file_twice(folder):
    write_picture(folder / "edm" / "a" / "0.png")
    rows = [["a/0.png", 1], ["a\\0.png", 1]]
    touch(folder / "edm" / "dataset.json", json.dumps({"labels": rows}).encode())
    assert labels.find_labelled("edm").labels == [1]
    rows[1][1] = 2
    touch(folder / "edm" / "dataset.json", json.dumps({"labels": rows}).encode())
    with pytest.raises(images.ImageError, match="gives a/0.png two labels, 1 and 2"):
        labels.find_labelled("edm")


def test_dataset_json_without_labels(folder):
    write_picture(folder / "edm" / "00000" / "img0.png")
    touch(folder / "edm" / "dataset.json", b'{"labels": null}')
    labelled = labels.find_labelled("edm")
    assert labelled.classes == [] and labelled.labels == [0]


def test_dataset_json_and_the_files_differ(folder):
    """Images without a label and labels without an image are named; nothing outside is opened."""
    write_picture(folder / "secret.png")
    write_picture(folder / "edm" / "a.png")
    write_picture(folder / "edm" / "b.png")
    rows = [["a.png", 1], ["../secret.png", 0], [str(folder / "secret.png"), 0], ["gone.png", 0]]
    touch(folder / "edm" / "dataset.json", json.dumps({"labels": rows}).encode())
    labelled = labels.find_labelled("edm")
    assert labelled.names == ["a.png"] and labelled.labels == [1]
    left_out = dict(labelled.left_out)
    assert left_out.pop("b.png") == "it has no label in dataset.json"
    assert set(left_out) == {"../secret.png", str(folder / "secret.png"), "gone.png"}


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[" * 100_000,
        b"[]",
        b'{"a": 1}',
        b'{"labels": 3}',
        b'{"labels": [["a.png"]]}',
        b'{"labels": [["a.png", -1]]}',
        b'{"labels": [["a.png", true]]}',
        b'{"labels": [["a.png", [0.5, 1]]]}',
        b'{"labels": [["a.png", 1e99]]}',
        b'{"labels": [["b.png", 0]]}',
    ],
    ids=range(11),
)
def test_dataset_json_that_cannot_be(folder, content):
    write_picture(folder / "edm" / "a.png")
    touch(folder / "edm" / "dataset.json", content)
    with pytest.raises(images.ImageError, match="dataset.json"):
        labels.find_labelled("edm")


@pytest.mark.parametrize("fault", ["deflated", "cut off", "encrypted", "unknown method"])
def test_a_dataset_json_in_a_zip_that_cannot_be_read(folder, fault):
    picture = io.BytesIO()
    Image.new("RGB", (9, 9), RED).save(picture, "PNG")
    packing = zipfile.ZIP_STORED if fault == "cut off" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile("a.zip", "w", packing) as archive:
        archive.writestr("dataset.json", b'{"labels": [["a.png", 0]]}')
        archive.writestr("a.png", picture.getvalue())
    content = bytearray((folder / "a.zip").read_bytes())
    local, central = 0, content.index(b"PK\x01\x02")  # two headers of dataset.json
    if fault == "deflated":
        start = 30 + len("dataset.json")
        content[start : start + 4] = b"\xff\xff\xff\xff"
    elif fault == "cut off":  # more bytes than are there
        content[central + 20 : central + 28] = struct.pack("<II", 10**6, 10**6)
    elif fault == "encrypted":
        content[local + 6] |= 1
        content[central + 8] |= 1
    else:
        content[local + 8] = content[central + 10] = 77
    (folder / "a.zip").write_bytes(content)
    with pytest.raises(images.ImageError, match="cannot read a.zip/dataset.json: ") as caught:
        labels.find_labelled("a.zip")
    assert "\n" not in str(caught.value)


def test_a_zip_of_class_folders(folder):
    """The rules are those of a folder; nothing is written, inside or outside."""
    picture = io.BytesIO()
    Image.new("RGB", (9, 9), RED).save(picture, "PNG")
    with zipfile.ZipFile("pets.zip", "w") as archive:
        for name in ("dogs/0.png", "cats/deep/1.PNG", "cats/0.png", "__MACOSX/cats/._0.png"):
            archive.writestr(name, picture.getvalue())
        for name in ("cats/.hidden.png", "cats/a.txt", "../out.png", "/root.png"):
            archive.writestr(name, picture.getvalue())
    labelled = labels.find_labelled("pets.zip")
    assert labelled.classes == ["cats", "dogs"] and labelled.labels == [0, 0, 1]
    assert labelled.names == ["cats/0.png", "cats/deep/1.PNG", "dogs/0.png"]
    assert dict(labelled.left_out) == {
        "__MACOSX": "of the operating system",
        "cats/.hidden.png": "hidden",
        "cats/a.txt": "its name is not that of an image",
        "../out.png": "its path is not a plain one",
        "/root.png": "its path is not a plain one",
    }
    assert all(colour_of(file) == RED for file in labelled.files)
    assert os.listdir() == ["pets.zip"]


def test_zips_that_cannot_be(folder, monkeypatch):
    """Damaged or too large: the image is named, and its neighbours are read."""
    picture = io.BytesIO()
    Image.new("RGB", (9, 9), RED).save(picture, "PNG")
    for name in ("a.zip", "b.zip"):
        with zipfile.ZipFile(name, "w") as archive:
            archive.writestr("0.png", picture.getvalue())
            archive.writestr("1.png", picture.getvalue() + bytes(1000))
    content = bytearray((folder / "b.zip").read_bytes())
    content[content.index(b"PNG") + 5] ^= 255  # so its checksum is wrong
    (folder / "b.zip").write_bytes(content)
    first, second = images.find_images("b.zip").files
    with pytest.raises(images.ImageError, match="Bad CRC-32"):
        images.read_whole(first)
    assert colour_of(second) == RED
    monkeypatch.setattr(images, "MAX_MEMBER", 500)
    with pytest.raises(images.ImageError, match="it takes more than"):
        images.read_whole(images.find_images("a.zip").files[1])
    assert colour_of(images.find_images("a.zip").files[0]) == RED


def test_what_is_left_out_is_told(capsys):
    images.tell_left_out([])
    assert capsys.readouterr().err == ""
    images.tell_left_out([(f"{i}\n.gif", "its name") for i in range(13)])
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "left out: 13" and said[1] == "    0\\n.gif: its name"
    assert said[-1] == "    and 3 more" and len(said) == 12


# ---- reading -------------------------------------------------------------------------------------


MODES = {
    "JPEG": ["RGB", "CMYK", "YCbCr"],
    "PNG": ["RGB", "RGBA", "P"],
    "WEBP": ["RGB", "RGBA", "P"],
    "BMP": ["RGB", "RGBA", "P"],
    "TIFF": ["RGB", "RGBA", "P", "CMYK", "YCbCr"],
}
COMBINATIONS = [(suffix, mode) for suffix, kind in images.SUFFIXES.items() for mode in MODES[kind]]


@pytest.mark.parametrize("suffix, mode", COMBINATIONS)
def test_formats_and_modes(folder, suffix, mode):
    """Each format in each colour mode that it can have is read with its colour."""
    file = "x" + suffix
    picture = Image.new("RGB", (20, 14), RED)
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    picture.save(file)
    pixels = images.read_whole(file).pixels
    assert pixels.shape == (14, 20, 3) and pixels.dtype == np.uint8
    assert nearly(colour_of(file), RED, levels=12)


def test_gray_modes(folder):
    for mode, value, level in (("1", 1, 255), ("L", 77, 77), ("I;16", 30000, 117)):
        Image.new(mode, (9, 9), value).save("x.png")
        assert (images.read_whole("x.png").pixels == level).all()
        assert (images.read_square("x.png", 4, gray=True).pixels == level).all()
    Image.new("I;16", (9, 9), 65535).save("deep.tif")
    assert (images.read_whole("deep.tif").pixels == 255).all()


def test_pixels_of_unknown_range(folder):
    Image.new("F", (9, 9), 0.5).save("f.tif")
    Image.new("I", (9, 9), 2**20).save("i.tif")
    Image.new("I", (9, 9), 200).save("low.tif")  # of 255, or of 65535?
    for file in ("f.tif", "i.tif", "low.tif"):
        with pytest.raises(images.ImageError, match="whose range nobody knows"):
            images.read_whole(file)


def test_gray_tiffs_of_many_bits(folder):
    """12 of 16 bits, and 0 for white: Pillow hands on the numbers as they are."""
    for bits, photometric, levels in ((16, 1, (0, 128, 255)), (16, 0, (255, 127, 0))):
        top = 2**bits - 1
        values = np.array([[0, top // 2 + 1, top]], np.uint16)
        Image.fromarray(values).save("a.tif", tiffinfo={262: photometric})
        found = images.read_whole("a.tif").pixels
        assert found[..., 0].ravel().tolist() == list(levels)
    values = Image.fromarray(np.array([[0, 2048, 4095]], np.uint16))
    assert np.asarray(images.to_rgb(values, "TIFF", bits=12))[0, :, 0].tolist() == [0, 128, 255]


def test_a_bitmap_with_four_bytes_a_pixel(folder):
    """Its fourth byte is 0 throughout, and is no transparency."""
    picture = Image.new("RGBA", (2, 2), (200, 100, 10, 0))
    assert np.asarray(images.to_rgb(picture, "BMP"))[0, 0].tolist() == [200, 100, 10]
    assert np.asarray(images.to_rgb(picture, "PNG"))[0, 0].tolist() == [255, 255, 255]


def test_mode_i_is_sixteen_bit_gray_of_a_png():
    """So Pillow opens it before version 11."""
    picture = Image.new("I", (9, 9), 30000)
    assert (np.asarray(images.to_rgb(picture, "PNG")) == 117).all()
    with pytest.raises(images.ImageError, match="32-bit numbers"):
        images.to_rgb(picture, "TIFF")


def test_transparency_shows_white(folder):
    """A hidden colour is not seen, and half of it half."""
    palette = Image.new("RGB", (9, 9), RED).quantize(2)
    palette.save("p.png", transparency=palette.getpixel((0, 0)))
    Image.new("RGB", (9, 9), RED).save("key.png", transparency=RED)
    Image.new("L", (9, 9), 7).save("gray.png", transparency=7)
    Image.new("LA", (9, 9), (0, 0)).save("la.png")
    for name in ("rgba.png", "rgba.webp", "rgba.tif"):
        Image.new("RGBA", (9, 9), (*RED, 0)).save(name)
    for name in os.listdir():
        assert colour_of(name) == (255, 255, 255), name
    Image.new("RGBA", (9, 9), (0, 0, 0, 128)).save("half.png")
    assert nearly(colour_of("half.png"), (127, 127, 127), levels=1)
    whole = images.read_whole("half.png").pixels
    assert (images.read_square("half.png", 8).pixels == whole[0, 0, 0]).all()


def turned(file, orientation):
    """A 40 x 20 picture, its left half bright, with an EXIF orientation."""
    picture = Image.new("L", (40, 20), 0)
    picture.paste(255, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.convert("RGB").save(file, exif=exif)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(folder, suffix):
    """6: the camera was held upright, so the left side of what it stored is the top."""
    file = f"phone.{suffix}"
    turned(file, 6)
    pixels = images.read_whole(file).pixels
    assert pixels.shape == (40, 20, 3) and pixels[5].min() > 200 and pixels[-5].max() < 50
    upright = images.read_square(file, 8).pixels
    assert upright[:, :3].min() > 200 and upright[:, 5:].max() < 50
    if suffix == "tif":  # Pillow itself turns these
        return
    as_stored = images.read_square(file, 8, upright=False).pixels
    assert as_stored[:, :, :3].min() > 200 and as_stored[:, :, 5:].max() < 50


def test_exif_that_is_broken(folder):
    Image.new("RGB", (9, 9), RED).save("x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\xff\xff\xff")
    assert nearly(colour_of("x.jpg"), RED)


def test_the_content_counts_and_not_the_name(folder):
    Image.new("RGB", (9, 9), RED).save("webp.jpg", "WEBP", lossless=True)
    assert colour_of("webp.jpg") == RED
    assert images.read_whole("webp.jpg").kind == "WEBP"
    remarks = images.Remarks()
    for name, kind in (("webp.jpg", "WEBP"), ("a.JPE", "JPEG"), ("a.png", "PNG")):
        remarks.note_kind(name, kind)
    assert remarks.misnamed == {"webp.jpg": "WEBP"}


def test_no_program_is_opened(folder):
    """PostScript is one; and formats that nobody asked for have decoders with faults of theirs."""
    Image.new("RGB", (9, 9), RED).save("gif.png", "GIF")
    touch(folder / "ps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    for file in ("gif.png", "ps.png"):
        with pytest.raises(images.ImageError, match="it is none of JPEG, PNG, WebP"):
            images.read_whole(file)


def png_of_zeros(width, height):
    """A PNG of black pixels, 1 bit each, which Pillow would take minutes to make."""
    row = bytes(1 + width // 8)
    packer = zlib.compressobj()
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, chunk in ((b"IHDR", head), (b"IDAT", packed), (b"IEND", b"")):
        checksum = zlib.crc32(kind + chunk)
        content += struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", checksum)
    return content


def test_images_of_very_many_pixels(folder):
    """Up to a limit they are read, and without a word. (Pillow warns of half as many.)"""
    touch(folder / "large.png", png_of_zeros(10_000, 9_000))
    touch(folder / "bomb.png", png_of_zeros(20_000, 9_000))
    program = """import images
for file in ("large.png", "bomb.png"):
    print(images.try_square(file, 8).reason)"""
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": HERE}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "\nit has more than 179 million pixels\n" and done.stderr == ""


def test_reasons_are_one_line(folder):
    Image.effect_noise((64, 64), 50).save("whole.png")
    touch(folder / "cut.png", (folder / "whole.png").read_bytes()[:900])
    touch(folder / "empty.png", b"")
    touch(folder / "text\n.png", b"hello")
    os.mkdir("folder.png")
    for file, reason in (
        ("cut.png", "truncated"),
        ("empty.png", "the file is empty"),
        ("text\n.png", "it is none of JPEG, PNG, WebP, BMP and TIFF"),
        ("folder.png", "IsADirectoryError"),
    ):
        with pytest.raises(images.ImageError, match=reason) as caught:
            images.read_whole(file)
        assert "\n" not in str(caught.value)
        assert images.try_square(file, 8) == (None, str(caught.value))
    for read in (images.read_whole, lambda file: images.try_square(file, 8)):
        with pytest.raises(FileNotFoundError, match="gone.png"):  # it was there when it was listed
            read("gone.png")


def test_faults_of_networks_are_transient():
    """Those of a network's disk that is gone, too. A damaged file can cause EINVAL, by a seek."""
    for number in (errno.ENOTCONN, errno.EHOSTDOWN, errno.ENODEV, errno.EREMOTEIO, errno.ENOENT):
        assert images.is_transient(OSError(number, ""))
    assert not images.is_transient(OSError(errno.EINVAL, ""))
    assert not images.is_transient(OSError("image file is truncated"))


@linux
@pytest.mark.parametrize("name", ["scandir", "stat"])
def test_a_disk_that_fails_while_files_are_listed(folder, monkeypatch, name):
    """Else a folder of good images would be left out."""
    write_picture(folder / "other.png")
    write_picture(folder / "src" / "a" / "0.png")
    os.symlink(folder / "other.png", folder / "src" / "a" / "1.png")
    real = getattr(os, name)

    def fail(path, **options):
        if str(path).endswith(("src/a", "1.png")):
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), path)
        return real(path, **options)

    with monkeypatch.context() as disk, pytest.raises(OSError, match="not connected"):
        disk.setattr(images.os, name, fail)
        images.find_images("src")


TRANSIENT_FAULTS = [
    *(OSError(number, os.strerror(number)) for number in sorted(images.TRANSIENT)),
    MemoryError(),
]


@pytest.mark.parametrize("fault", TRANSIENT_FAULTS, ids=repr)
@pytest.mark.parametrize("place", ["load", "getexif"])
def test_transient_faults_are_not_the_images(folder, monkeypatch, fault, place):
    """They end the work, in one line with the file's name."""
    Image.new("RGB", (9, 9), RED).save("a.png")

    def fail(self):
        raise fault

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile." + place, fail)
    number = getattr(fault, "errno", errno.ENOMEM)
    for read in (images.read_whole, lambda file: images.try_square(file, 8)):
        with pytest.raises(OSError) as caught:
            read("a.png")
        assert caught.value.errno == number and caught.value.filename == "a.png"
    said = run_script("prepare.py", "folder", ".", "--size", 8)
    assert said == f"prepare.py: [Errno {number}] {os.strerror(number)}: './a.png'"
    assert os.listdir("data") == []


def test_first_of_several_frames(folder):
    frames = [Image.new("RGB", (9, 9), colour) for colour in (RED, (0, 0, 255))]
    frames[0].save("x.gif", save_all=True, append_images=frames[1:])
    os.rename("x.gif", "gif.png")
    assert images.try_square("gif.png", 8).picture is None  # no GIF is read, whatever its name
    for file in ("x.webp", "x.tif", "x.png"):
        frames[0].save(file, save_all=True, append_images=frames[1:])
        assert nearly(colour_of(file), RED)


# ---- cropping ------------------------------------------------------------------------------------


def test_sixteen_bit_gray(folder):
    Image.fromarray(np.full((9, 9), 30000, np.uint16)).save("deep.png")
    assert (images.read_square("deep.png", 8).pixels == round(30000 / 257)).all()


def test_centre_crop():
    """40 wide and 8 high: a ramp."""
    ramp = np.tile(np.arange(40, dtype=np.uint8) * 6, (8, 1))
    cropped = np.asarray(images.centre_crop(Image.fromarray(ramp), 8))
    assert cropped.tolist() == [[6 * x for x in range(16, 24)]] * 8
    assert images.centre_crop(Image.new("RGB", (33, 70)), 16).size == (16, 16)


def test_centre_crop_halves_with_a_box():
    pixels = np.random.default_rng(0).integers(256, size=(16, 16), dtype=np.uint8)
    halved = np.asarray(images.centre_crop(Image.fromarray(pixels), 8))
    assert np.abs(halved - pixels.reshape(8, 2, 8, 2).mean((1, 3))).max() <= 1


def test_read_square_is_the_middle_in_three_channels(folder):
    write_picture(folder / "a.png", size=(30, 20), colour=RED)
    pixels = images.read_square("a.png", 8).pixels
    assert pixels.shape == (3, 8, 8) and pixels[:, 4, 4].tolist() == list(RED)
    gray = images.read_square("a.png", 8, gray=True).pixels
    assert gray.shape == (1, 8, 8)
    assert gray[0, 4, 4] == np.asarray(Image.new("RGB", (1, 1), RED).convert("L"))[0, 0]


# ---- all cores at work ---------------------------------------------------------------------------


def interrupted(i):
    os.kill(os.getpid(), signal.SIGINT)
    return i


def test_ctrl_c_is_not_the_workers(folder):
    """A terminal sends it to all processes. What they do then is their parent's to say."""
    assert list(images.parallel(interrupted, range(4), "")) == [0, 1, 2, 3]


def test_ctrl_c_while_workers_start(monkeypatch):
    """It is neither lost nor left to the workers, which end."""
    workers = []

    class Pool(images.ProcessPoolExecutor):
        def map(self, *arguments, **options):
            signal.raise_signal(signal.SIGINT)
            results = super().map(*arguments, **options)
            workers.extend(self._processes.values())
            return results

    monkeypatch.setattr(images, "ProcessPoolExecutor", Pool)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        next(images.parallel(abs, range(10), ""))
    assert workers and not any(worker.is_alive() for worker in workers)
    assert signal.getsignal(signal.SIGINT) == before
