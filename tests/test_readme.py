"""
The pages, README.md and docs/*.md, say what is so.

    python -m pytest -q tests/test_readme.py
    python tests/test_readme.py --fix          # after code has moved: rewrite the numbers of lines

A place in the code is written [`loss.py:12`](loss.py#L12) `code`. The line has that code in it, and
is the first one of the file that does. So its number can be found again when lines have moved.
"""

import ast
import copy
import functools
import importlib.util
import os
import re
import sys
import types

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

PLACE = re.compile(r"\[`([\w/]+\.py):(\d+)`\]\(([^)#]+)#L(\d+)\)(\s+)`([^`\n]+)`")
FILE = re.compile(r"(?<![\w/.-])((?:assets|docs|tests)/[\w./-]+\w|\w+\.(?:py|md|toml))(?![\w/])")
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*)")


@functools.lru_cache
def read(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as f:
        return f.read()


def pages():
    """{name: text} of README.md and docs/*.md."""
    names = ["README.md"]
    for file in sorted(os.listdir(os.path.join(HERE, "docs"))):
        if file.endswith(".md"):
            names.append(f"docs/{file}")
    return {name: read(name) for name in names}


def without_blocks(text):
    """A page without its fenced blocks, which are Python or diffs."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def rooms():
    """The .py files at the top."""
    return sorted(name for name in os.listdir(HERE) if name.endswith(".py"))


# ---- form ----------------------------------------------------------------------------------------


def test_length():
    assert len(read("README.md").splitlines()) <= 250


def test_width():
    """100 columns, without the targets of links. Tables and code do not wrap."""
    for page, text in pages().items():
        fenced = False
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith("```"):
                fenced = not fenced
            if fenced or line.startswith(("|", "    ")):
                continue
            shown = re.sub(r"\]\([^)]*\)", "]", line)
            assert len(shown) <= 100, f"{page}:{number} has {len(shown)} columns"


def test_first_line_of_tests():
    """.ci/run takes the first line with pytest in it, and runs it."""
    lines = read("README.md").splitlines()
    first = next(line for line in lines if "pytest" in line)
    assert first.startswith("    pip install -r requirements.txt")
    assert "pytest-xdist" in read("requirements.txt")


# ---- places, links, files ------------------------------------------------------------------------


def line_of(file, code):
    """The number of the first line that has this code in it."""
    for number, line in enumerate(read(file).splitlines(), 1):
        if code in line:
            return number
    raise AssertionError(f"{file} has no line with {code!r} in it")


def test_places():
    """Each `file.py:LINE` is the line that has the code beside it."""
    for page, text in pages().items():
        found = PLACE.findall(text)
        assert len(found) == len(re.findall(r"\w\.py:\d", text)), f"{page}: a place without code"
        for file, shown, target, anchor, _, code in found:
            line = line_of(file, code)
            right = int(shown) == int(anchor) == line
            assert right, (
                f"{page}: {code!r} is at {file}:{line} (tests/test_readme.py --fix mends all)"
            )
            assert os.path.normpath(os.path.join(os.path.dirname(page), target)) == file


def test_the_important_places_are_in_the_readme():
    """What a newcomer looks for stands there with file and line."""
    places = [code for *_, code in PLACE.findall(read("README.md"))]
    wanted = {
        "dF/ds": "F, dF = model.jvp(",
        "the target's average": "_foreach_lerp_(average",
        "guidance": "u_fm = ",
        "the time sampler": "def sample_times(",
        "the loop": "for step in bar:",
        "resume": "def resume(",
        "the sampler": "def sample(",
    }
    for what, code in wanted.items():
        assert any(code in place for place in places), f"no place for {what}"


def fix(text):
    """The text with the right numbers of lines."""

    def right(match):
        file, _, target, _, space, code = match.groups()
        line = line_of(file, code)
        return f"[`{file}:{line}`]({target}#L{line}){space}`{code}`"

    return PLACE.sub(right, text)


def anchors(text):
    """What GitHub calls the headings of a page."""
    names = []
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        names.append(kept.replace(" ", "-"))
    return names


def test_links():
    """Each link to a file, and to a heading in one, leads somewhere."""
    for page, text in pages().items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if link.startswith("https://"):
                continue
            path, _, anchor = link.partition("#")
            file = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
            assert os.path.exists(os.path.join(HERE, file)), f"{page}: {link}"
            if anchor and file.endswith(".md"):
                assert anchor in anchors(read(file)), f"{page}: {link}"


def test_files():
    """Each file that is named is there, or made by a diff on the page."""
    for page, text in pages().items():
        of_diffs = set(re.findall(r"^\+\+\+ b/(\S+)", text, re.MULTILINE))
        for file in set(FILE.findall(without_blocks(text))) - of_diffs:
            near = [file, os.path.join("docs", file), os.path.join("tests", file)]
            there = [os.path.exists(os.path.join(HERE, path)) for path in near]
            assert any(there), f"{page} names {file}"


def imports_of(file):
    """The files at the top that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(read(file))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {f"{name}.py" for name in names} & set(rooms())


def test_rooms():
    """The README's table has all files, and their imports go one way."""
    table = read("README.md").split("## The files")[1].split("\n## ")[0]
    for file in rooms():
        if file not in ("conftest.py", "test_all.py"):
            assert f"`{file}`" in table, f"the README's table of files lacks {file}"

    left = {file: imports_of(file) for file in rooms()}
    assert not any("train.py" in imported for imported in left.values())
    while left:
        ready = [file for file, imported in left.items() if not imported & set(left)]
        assert ready, f"imports go in a circle among {sorted(left)}"
        for file in ready:
            del left[file]
    assert "attention_jvp.py" in imports_of("dual.py")
    for room in ("model.py", "loss.py"):
        assert "dual.py" in imports_of(room)
        assert room in imports_of("train.py")


# ---- commands ------------------------------------------------------------------------------------


def code_of(text):
    """The pieces of code of a page: spans, and the lines of indented blocks."""
    text = without_blocks(text)
    pieces = re.findall(r"`([^`\n]+)`", text)
    pieces += re.findall(r"^    (.*)$", text, re.MULTILINE)
    return [part for piece in pieces for part in re.split(r"&&|\s#|;", piece)]


@functools.lru_cache
def options_of_train():
    """The names of train.py's constants."""
    names = set()
    for node in ast.parse(read("train.py")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Option("):
            names.add(node.targets[0].id)
    return names


@functools.lru_cache
def text_and_about(script):
    """A script's text, and its docstring."""
    text = read(script)
    return text, ast.get_docstring(ast.parse(text)) or ""


def knows(script, flag):
    """Whether a script takes --flag."""
    if script == "train.py":
        return flag in options_of_train() | {"help"}
    text, about = text_and_about(script)
    return flag == "help" or f'"--{flag}"' in text or f"--{flag}" in about


def test_flags():
    """Each --flag is known to the script it is given to; one that stands alone, to any script."""
    of_others = {"nproc_per_node", "max_restarts"}  # torchrun's
    for page, text in pages().items():
        for piece in code_of(text):
            script = re.search(r"\b([a-z_]+\.py)\b", piece)
            if script and script[1] in rooms():
                for flag in FLAG.findall(piece[script.end() :]):
                    assert knows(script[1], flag), f"{page}: {script[1]} has no --{flag}"
            elif piece.startswith("--"):
                for flag in set(FLAG.findall(piece)) - of_others:
                    known = [name for name in rooms() if knows(name, flag)]
                    assert known, f"{page}: no script has --{flag}"


def test_presets():
    source = read("train.py")
    for page, text in pages().items():
        for preset in re.findall(r"--preset=([a-z]\w*)", text):
            assert f'"{preset}":' in source, f"{page}: there is no preset {preset}"


# ---- what others are told to write ---------------------------------------------------------------


def snippets_of_attention():
    """The blocks of Python in docs/attention.md, after the first, which is two signatures."""
    blocks = re.findall(r"```python\n(.*?)```", read("docs/attention.md"), re.DOTALL)
    assert blocks[0].startswith("from attention_jvp import attention, attention_jvp\n")
    return blocks[1:]


def test_snippets_of_attention():
    """MeanFlow and TVM run, the derivative is the finite difference, gradients reach everything."""
    import torch
    from helpers import close

    snippets = [snippet for snippet in snippets_of_attention() if "loss.backward()" in snippet]
    assert len(snippets) == 2
    torch.manual_seed(0)
    names = {}
    for snippet, tangent in zip(snippets, ("xt", "s")):
        exec(snippet, names)
        net = names["net"]
        assert names["loss"].isfinite()
        assert all(p.grad.abs().sum() > 0 for p in net.parameters())
        z, r, t, v, du = (names[key].detach().double() for key in ("z", "r", "t", "v", "du"))
        twin = copy.deepcopy(net).double()

        def along(h, twin=twin, tangent=tangent, z=z, r=r, t=t, v=v):
            if tangent == "xt":
                return twin(z + h * v, r, t + h)
            return twin(z, r + h, t)

        h = 1e-6
        close(du, (along(h) - along(-h)) / (2 * h), 1e-5)
        net.zero_grad()


def test_all_snippets_of_attention():
    """Each of them runs, after those before it, on tensors of the names that it uses."""
    import torch

    from attention_jvp import attention_jvp

    def heads(number, tokens):
        return torch.randn(2, number, tokens, 8)

    names = {"attention_jvp": attention_jvp, "tokens": 5, "lengths": torch.tensor([3, 0])}
    for name in ("q", "tq", "k", "tk", "v", "tv"):
        names[name] = heads(4, 6)
    for name in ("k_text", "v_text"):
        names[name] = heads(4, 5)
    for name in ("q16", "tq16"):
        names[name] = heads(16, 6)
    for name in ("k4", "tk4", "v4", "tv4"):
        names[name] = heads(4, 6)
    of_heads = dict(names)
    for snippet in snippets_of_attention():
        if "attention_jvp(q" in snippet:
            names.update(of_heads)  # the recipes of networks use the name v, too
        exec(snippet, names)
        for result in ("loss", "dF", "to"):
            if result in names:
                assert names[result].isfinite().all()


def test_lines_for_wandb(tmp_path, monkeypatch):
    """The lines of docs/changes.md, in the place of Report.log, send on the numbers of the log."""
    import torch

    lines = re.search(r"```python\n(    def log.*?)```", read("docs/changes.md"), re.DOTALL)[1]
    source = read("report.py")
    begin = source.index("    def log(self, **line):")
    end = source.index("    def append(self, line):")
    path = tmp_path / "report_with_wandb.py"
    path.write_text(f"import wandb\n{source[:begin]}{lines}\n{source[end:]}")

    sent = []
    wandb = types.ModuleType("wandb")
    wandb.run = None

    def init(**about):
        wandb.run = about

    wandb.init = init
    wandb.log = lambda numbers, step: sent.append((step, numbers))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    spec = importlib.util.spec_from_file_location("report_with_wandb", path)
    report_with_wandb = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report_with_wandb)

    out = tmp_path / "out"
    out.mkdir()
    config = dict(name="a-run", guidance="constant", w=1.0, w_min=1.0, w_max=1.0)
    report = report_with_wandb.Report(
        str(out), config, {}, {}, None, torch.device("cpu"), rank=0, ranks=1
    )
    report.log(step=3, loss=0.5, fm_by_time=[0.1, None])
    report.log(step=3, nfe=4, label=0.25)
    assert wandb.run["name"] == wandb.run["id"] == "a-run"
    assert sent == [(3, {"loss": 0.5, "fm_by_time/0": 0.1}), (3, {"nfe_4/label": 0.25})]
    assert (out / "log.jsonl").read_text().count("\n") == 2


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit(__doc__.strip())
    fixed = {page: fix(text) for page, text in pages().items()}
    for page, text in fixed.items():
        with open(os.path.join(HERE, page), "w", encoding="utf-8") as f:
            f.write(text)
