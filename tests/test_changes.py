"""
The diffs of docs/changes.md apply to the present files, and what they make runs.

A section has a block ```diff and the commands that try it, lines that begin with four spaces and
"python ". Every diff is applied alone, to a copy of the files.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import HERE, SMALL


def sections():
    """[(title, diff, commands)] of the page."""
    with open(os.path.join(HERE, "docs", "changes.md"), encoding="utf-8") as f:
        page = f.read()
    found = []
    for text in page.split("\n## ")[1:]:
        title = text.split("\n")[0]
        diff = re.search(r"```diff\n(.*?)```", text, re.DOTALL)[1]
        commands = re.findall(r"^    python (.*)$", text, re.MULTILINE)
        found.append(pytest.param(diff, commands, id=title))
    return found


def added_lines(diff):
    lines = diff.split("\n")
    return [line for line in lines if line.startswith("+") and not line.startswith("+++")]


def small(command):
    """The words of a command; train.py gets a small network and two steps."""
    words = command.split()
    if words[0] == "train.py":
        words = [word for word in words if not word.startswith("--steps=")]
        words += [*SMALL, "--steps=2"]
    return words


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
@pytest.mark.parametrize("diff, commands", sections())
def test_changes(folder, diff, commands):
    """They are small, they apply, and their commands end well."""
    assert commands
    assert len(added_lines(diff)) <= 40
    for file in os.listdir(HERE):
        if file.endswith(".py"):
            shutil.copy(os.path.join(HERE, file), folder)
    shutil.copytree(os.path.join(HERE, "assets"), folder / "assets")
    apply = ["git", "apply", "--unsafe-paths", "-"]
    subprocess.run(apply, input=diff, text=True, check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in commands:
        subprocess.run([sys.executable, *small(command)], check=True, env=environment)
