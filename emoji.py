"""
The emoji of npm packages: pictures of 64x64 with a category each, for `prepare.py emoji`.

    npm pack emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0   # some 140 MB
    python prepare.py emoji emoji-datasource-*.tgz --size 32

emoji-datasource-twitter draws them as Twitter does (CC BY 4.0), emoji-datasource-google as Google
does (Apache 2.0). A package has emoji.json, which says what each picture is, and the pictures in
img/VENDOR/64/. Archives are read where they lie: nothing is unpacked, and nothing in them runs.

One emoji comes several times: from several vendors, and in several skin tones. All of these have
one `group`, so that a split by groups never holds out a picture whose twin is trained on.
"""

import io
import json
import os
import tarfile
from typing import NamedTuple

import numpy as np
from PIL import Image

from files import ERRORS_OF_TAR
from header import DataError
from images import ImageError, as_image_errors, centre_crop, printable, to_rgb

NO_CLASS = "Component"  # a category of five patches of skin, which are no emoji
LICENSES = {"twitter": "CC BY 4.0", "google": "Apache 2.0"}
MOST_BYTES = 2**26  # of one file in an archive; emoji.json has a few million


class Emoji(NamedTuple):
    name: str  # of its file in the archive
    group: str  # the code points of the emoji, without a skin tone
    category: str
    png: bytes


class Package(NamedTuple):
    title: str  # "emoji-datasource-twitter 16.0.0"
    license: str  # of the pictures
    emoji: list[Emoji]
    left_out: list[tuple[str, str]]  # (name, reason)


def read_package(file):
    """A package's archive -> a Package, its emoji in the order of emoji.json. Raises DataError."""
    try:
        members = read_members(file)
    except ERRORS_OF_TAR as error:
        raise DataError(f"cannot read {printable(file)}: {error}") from None
    try:
        about = json.loads(members["package.json"])
        entries = json.loads(members["emoji.json"])
        title = f"{about['name']} {about['version']}"
        vendor = about["name"].removeprefix("emoji-datasource-")
        listed = [picture for entry in entries for picture in pictures_of(entry)]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise DataError(f"{printable(file)} is not an archive of emoji-datasource-VENDOR") from None
    emoji, left_out = [], []
    for image, group, category in listed:
        name = f"img/{vendor}/64/{image}"
        if name not in members:
            left_out.append((name, f"{vendor} has no picture of it"))
        elif category == NO_CLASS:
            left_out.append((name, "it is a patch of skin"))
        else:
            emoji.append(Emoji(name, group, category, members[name]))
    if not emoji:
        raise DataError(f"no pictures in img/{printable(vendor)}/64 of {printable(file)}")
    license = LICENSES.get(vendor, "see the README.md of the package")
    return Package(printable(title), license, emoji, left_out)


def read_members(file):
    """{name: bytes} of the two JSON files and the pictures of 64x64 in a package's archive."""
    members = {}
    with tarfile.open(file) as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            is_picture = name.startswith("img/") and os.path.dirname(name).endswith("/64")
            is_wanted = is_picture or name in ("package.json", "emoji.json")
            if is_wanted and member.isfile() and member.size < MOST_BYTES:
                members[name] = archive.extractfile(member).read()
        # tarfile stops at a damaged header. Only at the file's end does gzip compare its checksum.
        while archive.fileobj.read(2**20):
            pass
    return members


def pictures_of(entry):
    """(file name, group, category) of an entry of emoji.json and of its skin tones.

    Raises KeyError, AttributeError and TypeError where the entry is not of this form.
    """
    names = [entry["image"]]
    names += [tone["image"] for tone in entry.get("skin_variations", {}).values()]
    group = entry["unified"]
    category = entry["category"]
    for text in (*names, group, category):
        if not isinstance(text, str):
            raise TypeError("names, groups and categories are text")
    return [(name, group, category) for name in names]


def to_pixels(emoji, size):
    """An Emoji on white, (3, size, size) uint8. Raises DataError."""
    try:
        with as_image_errors(emoji.name):
            image = Image.open(io.BytesIO(emoji.png), formats=["PNG"])
            pixels = np.asarray(centre_crop(to_rgb(image, "PNG"), size))
    except ImageError as error:
        raise DataError(f"{printable(emoji.name)}: {error}") from None
    return pixels.transpose(2, 0, 1)
