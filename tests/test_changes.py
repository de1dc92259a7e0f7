"""
The diffs of docs/changes.md apply to the present files, and what they make runs.

A section has a block ```diff and the commands that try it, lines that begin with four spaces and
"python ". Every diff is applied alone, to a copy of the files, beside a folder of captioned photos.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import HERE, SMALL, write_picture


def sections():
    """[(title, diff, commands)] of the page."""
    with open(os.path.join(HERE, "docs", "changes.md"), encoding="utf-8") as f:
        page = f.read()
    found = []
    for text in page.split("\n## ")[1:]:
        title = text.split("\n")[0]
        diff = re.search(r"```diff\n(.*?)```", text, re.DOTALL)
        if diff is None:  # lines for another place, which test_readme.py tries
            continue
        diff = diff[1]
        commands = re.findall(r"^    python (.*)$", text, re.MULTILINE)
        found.append(pytest.param(title, diff, commands, id=title))
    return found


def added_lines(diff):
    lines = diff.split("\n")
    return [line for line in lines if line.startswith("+") and not line.startswith("+++")]


def small(command):
    """The words of a command; train.py gets a small network and two steps in place of 30."""
    words = []
    for word in shlex.split(command):
        if word.startswith("--steps="):
            steps = int(word.removeprefix("--steps="))
            word = f"--steps={steps // 15}"
        words.append(word)
    if words[0] == "train.py":
        words += SMALL
    return words


def write_photos(folder):
    """40 pictures in a folder "photos", and a dataset.json that gives each its own caption."""
    labels = []
    for i in range(40):
        write_picture(folder / "photos" / f"{i}.png", colour=(5 * i, 100, 200))
        labels.append([f"{i}.png", f"a square, number {i}"])
    (folder / "photos" / "dataset.json").write_text(json.dumps({"labels": labels}))


def check_captions(folder):
    """Each picture is of a class of its own, and some are held out all the same."""
    header = json.loads((folder / "data" / "captioned" / "header.json").read_text())
    assert sorted(header["class_names"]) == sorted(f"a square, number {i}" for i in range(40))
    assert header["count"] == {"train": 36, "test": 4}
    log = (folder / "out" / "captioned" / "log.jsonl").read_text()
    assert "two_sample" in log


def check_resumed(folder):
    lines = (folder / "out" / "conv" / "log.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if "loss" in line]
    assert steps == [1, 2, 3, 4]


CHECKS = {"Captions instead of labels": check_captions, "Your own network": check_resumed}


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
@pytest.mark.parametrize("title, diff, commands", sections())
def test_changes(folder, title, diff, commands):
    """They are small, they apply, and their commands end well."""
    assert commands
    assert len(added_lines(diff)) <= 40
    for file in os.listdir(HERE):
        if file.endswith(".py"):
            shutil.copy(os.path.join(HERE, file), folder)
    shutil.copytree(os.path.join(HERE, "assets"), folder / "assets")
    write_photos(folder)
    apply = ["git", "apply", "--unsafe-paths", "-"]
    subprocess.run(apply, input=diff, text=True, check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in commands:
        subprocess.run([sys.executable, *small(command)], check=True, env=environment)
    if title in CHECKS:
        CHECKS[title](folder)


def test_checks_are_of_sections():
    titles = [section.values[0] for section in sections()]
    assert set(CHECKS) <= set(titles)
