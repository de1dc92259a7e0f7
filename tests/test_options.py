"""options.py: the table of constants in train.py, its flags and its presets."""

import ast
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from helpers import HERE, SMALL, run_script, steps_done, train_config, until

import checkpoint as ckpt
import options
from files import UserError
from options import Option, configure, differences, headings_of, options_of, out_of_range

OPTIONS = dict(
    preset=Option("", "a group of constants"),
    name=Option("", "a folder", later=True),
    steps=Option(10, "optimizer steps", least=1, later=True),
    lr=Option(1e-3, "learning rate", least=0, below=1),
    mode=Option("gap", "how times are drawn", choices=("gap", "two")),
    scaled=Option(True, "whether F is scaled"),
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full, sh and signals as of Linux")
PRESETS = {"large": dict(steps=1000, lr=1e-4), "unlike": dict(mode="two", scaled=False, lr=0)}


def values(*arguments, options=OPTIONS, presets=PRESETS):
    return configure(options, presets, "What this is for.", arguments=list(arguments))


def complaint(*arguments, options=OPTIONS, presets=PRESETS):
    """The one line with which wrong arguments end a script."""
    with pytest.raises(SystemExit) as stop:
        values(*arguments, options=options, presets=presets)
    assert "\n" not in stop.value.code
    return stop.value.code


def train_complains(*arguments):
    return run_script("train.py", *arguments)


# ---- the table -----------------------------------------------------------------------------------


def test_defaults_presets_and_flags():
    """A preset beats the defaults, and a flag beats both. Of two flags the later one counts."""
    assert values() == dict(preset="", name="", steps=10, lr=1e-3, mode="gap", scaled=True)
    assert values("--preset=large")["steps"] == 1000
    found = values("--lr=0.5", "--preset=large", "--steps=3", "--steps=4")
    assert (found["lr"], found["steps"], found["mode"]) == (0.5, 4, "gap")
    assert values("--preset=unlike")["scaled"] is False


def test_the_type_of_a_default_is_the_type_of_its_values():
    """A default that is edited into a whole number takes whole numbers only, and says why."""
    for text in ("1.5", "many", "True", "1e3", "[", "{[]: 1}", "(" * 500, "9" * 5000):
        assert "--steps takes a whole number, as its default is, not" in complaint(
            f"--steps={text}"
        )
    for text in ("nan", "inf", "1e999", "-", "'1'", "True", "1" + 400 * "0"):
        assert "--lr takes a number" in complaint(f"--lr={text}")
    for text in ("1", "yes", "true", ""):
        assert "--scaled takes True or False" in complaint(f"--scaled={text}")
    whole = values("--lr=0")["lr"]
    assert type(whole) is float
    assert type(values("--steps=7")["steps"]) is int
    assert values("--name=1")["name"] == "1"

    edited = dict(OPTIONS, lr=Option(10, "learning rate", least=0))
    assert values(options=edited)["lr"] == 10
    assert type(values(options=edited)["lr"]) is int
    assert "--lr takes a whole number, as its default is" in complaint("--lr=0.5", options=edited)


def test_ranges_and_choices():
    assert complaint("--steps=0").endswith("steps must be at least 1, not 0")
    assert complaint("--lr=1").endswith("lr must be at least 0 and below 1, not 1.0")
    assert complaint("--mode=no").endswith("mode must be one of gap, two, not 'no'")
    assert values("--lr=0", "--mode=two", "--steps=1")["mode"] == "two"
    assert out_of_range("lr", float("nan"), OPTIONS["lr"])
    sigma = Option(1.0, "a deviation", above=0)
    share = Option(0.5, "a share", least=0, most=1)
    for option, inside, outside, words in (
        (sigma, (1e-300, 1e300), (0.0, -1.0), "x must be above 0, not "),
        (share, (0.0, 1.0), (-1e-9, 1.001), "x must be at least 0 and at most 1, not "),
        (Option(1, "a place", above=0, below=3), (1, 2), (0, 3), "x must be above 0 and below 3"),
    ):
        assert not any(out_of_range("x", value, option) for value in inside)
        for value in outside:
            assert out_of_range("x", value, option).startswith(words)
    edited = dict(OPTIONS, steps=Option(0, "optimizer steps", least=1))
    assert "steps must be at least 1, not 0" in complaint(options=edited)


def test_names_that_are_not_there():
    assert complaint("--step=3").endswith("there is no option 'step'; did you mean steps?")
    assert complaint("--xyz=3").endswith("there is no option 'xyz'; --help lists them")
    assert complaint("--preset=larg").endswith("there is no preset 'larg'; did you mean large?")
    assert complaint("--preset=xyz").endswith("there is no preset 'xyz'; there are large, unlike")
    for flag in ("--steps", "steps=3", "-steps=3", "steps"):
        assert "steps" in complaint(flag)
    assert "write --steps=VALUE, not '--steps'" in complaint("--steps")


def test_wrong_presets():
    """A preset is edited by hand, too: its names and types are those of the table."""
    for preset, words in (
        (dict(step=3), "preset mine: there is no option 'step'; did you mean steps?"),
        (dict(steps=1.5), "preset mine: steps takes a whole number, as its default is, not '1.5'"),
        (dict(scaled=1), "preset mine: scaled takes True or False, not '1'"),
        (dict(lr="fast"), "preset mine: lr takes a number, not 'fast'"),
        (dict(lr=2), "lr must be at least 0 and below 1, not 2.0"),
    ):
        assert complaint("--preset=mine", presets=dict(mine=preset)).endswith(words)
    lr = values("--preset=unlike")["lr"]
    assert (lr, type(lr)) == (0.0, float)


def test_help_says_what_each_constant_is(capsys):
    with pytest.raises(SystemExit) as stop:
        values("--preset=large", "--help")
    assert stop.value.code is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "What this is for.",
        "[later]: a resumed run may have another value.",
    ]
    assert "    --steps=1000      optimizer steps (at least 1) [later]" in lines
    assert "    --lr=0.0001       learning rate (at least 0 and below 1)" in lines
    assert "    --name=''         a folder [later]" in lines
    assert lines[lines.index("    --mode='gap'      how times are drawn") + 1].endswith(
        "one of gap, two"
    )
    assert lines[3].endswith("one of large, unlike")
    assert len(lines) == 2 + len(OPTIONS) + 2


def test_headings(folder):
    """The comment on the line above an option is the heading of a group."""
    (folder / "table.py").write_text(
        "# not this one\n\n# fmt: off\n# the run\nsteps = Option(3, 'x')\nlr = Option(0.1, 'x')\n"
        "# network (small)\nwidth = Option(3, 'x')  # no heading\ndepth = Option(3, 'x')\n"
    )
    assert headings_of("table.py") == dict(steps="the run", width="network (small)")


def test_help_of_train(capsys, folder):
    """Every constant stands there with its comment, and no other name does."""
    assert run_script("train.py", "--help") is None
    printed = capsys.readouterr().out
    with open(os.path.join(HERE, "train.py")) as f:
        names = [line.split()[0] for line in f if " = Option(" in line]
    assert len(names) > 50
    flags = [line for line in printed.splitlines() if line.startswith("    --")]
    assert [flag.strip()[2:].split("=")[0] for flag in flags] == names
    assert "--warmup=0" in printed
    assert "steps in which both learning rates rise" in printed
    lines = printed.splitlines()
    for heading, first in (
        ("the run and its data", "preset"),
        ("network (its input size, channels and classes are the data's)", "hidden_size"),
        ("objective", "objective"),
        ("reports", "log_every"),
    ):
        assert lines[lines.index(heading) + 1].startswith(f"    --{first}=")


def test_a_new_constant_is_one_line(folder):
    """A whole number of a fork keeps its type, its range, and its place in log and checkpoint."""
    with open(os.path.join(HERE, "train.py")) as f:
        script = f.read()
    line = "warmup         = Option(0, "
    assert script.count(line) == 1
    new = 'horizon        = Option(10,         "frames at once", least=1)\n'
    with open("train.py", "w") as f:
        f.write(script.replace(line, new + line))
    mine = str(folder / "train.py")
    assert "horizon takes a whole number" in run_script(mine, "--horizon=2.5")
    assert "horizon must be at least 1" in run_script(mine, "--horizon=0")


def test_options_of_a_module():
    names = dict(OPTIONS, __name__="train", os=os)
    assert options_of(names) == OPTIONS


# ---- continuations -------------------------------------------------------------------------------


def test_differences():
    """What may not change, what may, what is new, what is gone, and what changes on purpose."""
    now = values()
    assert differences(now, now, OPTIONS) == ([], [], [])
    old = dict(now, lr=0.5, steps=3, gone=7)
    assert differences(old, now, OPTIONS) == (["lr 0.5 -> 0.001"], [], ["gone=7"])
    assert differences(old, now, OPTIONS, "lr") == ([], [], ["gone=7"])
    del old["mode"]
    assert differences(old, now, OPTIONS, "scaled, lr,") == ([], ["mode='gap'"], ["gone=7"])
    options.check_change("scaled, lr,", OPTIONS)
    with pytest.raises(SystemExit, match="change names 'lrr', which is no option; did you mean lr"):
        options.check_change("lrr", OPTIONS)


# ---- how scripts end -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, words",
    [
        (UserError("no such\nthing"), "no such thing"),
        (OSError(28, "No space left on device", "x"), "No space left on device"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "CUDA out of memory. Tried"),
        (RuntimeError("[pair.cc:547] Connection closed by peer [::1]"), "closed by peer"),
        (BrokenProcessPool("A process in the pool was terminated"), "was terminated"),
    ],
)
def test_outer_faults_are_one_line(error, words):
    def main():
        raise error

    with pytest.raises(SystemExit, match=words) as stop:
        options.run(main)
    assert "\n" not in stop.value.code


def test_more_memory_than_the_host_has():
    """As torch says it, for a CPU in a plain RuntimeError."""
    with pytest.raises(SystemExit, match="can't allocate memory: you tried to allocate"):
        options.run(lambda: torch.empty(10**15))


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, ValueError, KeyError])
def test_mistakes_in_the_code_keep_their_traceback(error):
    def main():
        raise error("size mismatch")

    with pytest.raises(error, match="size mismatch"):
        options.run(main)


# ---- train.py ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement, code, words",
    [
        ("raise KeyboardInterrupt", 130, []),
        ("raise options.UserError('no such\\nfile')", 1, ["-c: no such file"]),
        ("raise MemoryError", 1, ["-c: out of memory"]),
        ("raise ValueError('a mistake')", 1, ["Traceback", "a mistake"]),
        ("print('a\\udcff')", 0, []),
    ],
)
def test_a_script_without_main(statement, code, words):
    """It ends as those with one do."""
    script = f"import options\noptions.set_up_streams(errors_in_one_line=True)\n{statement}"
    environment = {**os.environ, "PYTHONPATH": HERE, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    said = done.stderr.decode()
    assert done.returncode == code
    assert all(text in said for text in words)
    assert said.count("\n") == len(words) or "Traceback" in words


# ---- streams that cannot be written --------------------------------------------------------------

SPEAKER = """
import sys
import options

def main():
    repeats = int(sys.argv[1])
    print("result" * repeats)
    print("remark" * repeats, file=sys.stderr)
    open("made", "w").close()
"""
WITH_MAIN = f"{SPEAKER}\noptions.run(main)"
WITHOUT_MAIN = f"{SPEAKER}\noptions.set_up_streams(errors_in_one_line=True)\nmain()"


def run_redirected(code, redirection, repeats=1):
    """Run Python code under a shell's redirection, such as 2>&-."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {repeats} {redirection}', sys.executable, code]
    environment = {**os.environ, "PYTHONPATH": HERE}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@linux
@pytest.mark.parametrize("code", [WITH_MAIN, WITHOUT_MAIN])
@pytest.mark.parametrize(
    "redirection, result, remark",
    [(">&-", "", "remark\n"), ("2>&-", "result\n", ""), (">&- 2>&-", "", "")],
)
def test_closed_streams(folder, code, redirection, result, remark):
    """What is printed there goes nowhere, and the script does its work."""
    done = run_redirected(code, redirection)
    assert (done.returncode, done.stdout, done.stderr) == (0, result, remark)
    assert os.path.exists("made")


@linux
@pytest.mark.parametrize("repeats", [1, 100_000])
@pytest.mark.parametrize("redirection", [">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full"])
def test_train_does_not_end_where_it_cannot_print(folder, redirection, repeats):
    """As on a disk that is full, with text that is longer than Python's buffers, too."""
    done = run_redirected(WITHOUT_MAIN, redirection, repeats)
    assert done.returncode == 0
    assert os.path.exists("made")
    if "2>" not in redirection:
        assert done.stderr == "remark" * repeats + "\n"


@linux
def test_other_scripts_end_where_they_cannot_print(folder):
    """What they print may be all that they make."""
    done = run_redirected(WITH_MAIN, ">/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "-c: [Errno 28] No space left on device"


@linux
def test_train_outlives_who_reads_its_output(folder):
    """Ctrl-C ends `tee` before the run that is piped into it. The run saves its step all the same.

    The same is true of `| head`, and of a terminal that is gone.
    """
    assert run_script("prepare.py", "digits") is None
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, os.path.join(HERE, "train.py"), "--steps=4000", *SMALL]
    process = subprocess.Popen(command, stdout=writer, stderr=writer)
    os.close(writer)
    try:
        until(lambda: steps_done("digits") > 2 or process.poll() is not None, "steps")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    assert list(ckpt.states("out/digits")) == [steps_done("digits")]


# ---- flags and constants of train.py -------------------------------------------------------------


def test_train_refuses_flags(folder):
    assert "did you mean batch_size" in train_complains("--batchsize=3")
    assert "whole number" in train_complains("--steps=1.5")
    assert "whole number" in train_complains("--steps=many")
    assert "True or False" in train_complains("--scaled=1")
    assert "a number" in train_complains("--lr=nan")
    assert "did you mean shapes" in train_complains("--preset=shape")
    assert "write --steps=VALUE" in train_complains("--steps")
    assert "times must be" in train_complains("--times=no")
    assert "guidance must be" in train_complains("--guidance=no")
    assert "takes a number" in train_complains("--lr=1" + 400 * "0")
    assert "steps must be at least 1" in train_complains("--steps=0")
    for flag in (
        "--ema_eval=2",
        "--ema_target=1",
        "--beta2=1.0",
        "--seed=99999999999999999999",
        "--micro_batch=-2",
        "--grad_clip=-1",
        "--lr=-1",
        "--beta1=1.5",
        "--seed=-1",
        "--warmup=-1",
        "--label_dropout=1",
        "--w=0.0",
        "--w_min=1e-9",
        "--alpha_min=1e-30",
    ):
        name = flag[2:].split("=")[0]
        assert f"{name} must be at least" in train_complains(flag)
    for flag in ("--sigma=0.0", "--sigma_s=-1.0"):
        name = flag[2:].split("=")[0]
        assert f"{name} must be above 0" in train_complains(flag)
    assert "p_equal must be at least 0 and at most 1, not 2.0" in train_complains("--p_equal=2")
    assert "kappa must be at least 0 and below 1, not 1.0" in train_complains("--kappa=1")
    assert "w_min at most w_max" in train_complains("--w_min=2")
    drawn = ("--guidance=inverse", "--w_max=2")
    assert "meanflow takes guidance" in train_complains("--objective=meanflow", *drawn)
    assert not os.path.exists("data")  # nothing has been made
    command = [sys.executable, os.path.join(HERE, "train.py"), "--stepz=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "train.py: there is no option 'stepz'; did you mean steps?\n"


def test_edited_constants(folder):
    """Preset, else the constant in the file, edited or not; a flag beats both."""
    assert run_script("prepare.py", "shapes", "--n", 60, "--size", 8) is None
    with open(os.path.join(HERE, "train.py")) as f:
        script = f.read()
    for old, new in (
        ("beta2          = Option(0.95,", "beta2          = Option(0.9,"),
        ("lr             = Option(3e-3,", "lr             = Option(9,"),
        ("sigma_s        = Option(1.0,", "sigma_s        = Option(2.0,"),
    ):
        assert script.count(old) == 1
        script = script.replace(old, new)
    with open("train.py", "w") as f:
        f.write(script)
    mine = str(folder / "train.py")
    flags = ("--preset=shapes", "--steps=1", "--hidden_size=48", "--depth=1", "--batch_size=4")
    flags += ("--micro_batch=2", "--classifier=1-nn", "--sigma_s=0.5", "--score_images=20")
    # The preset's lr is 1e-3, and lr has been edited into a whole number.
    assert "preset shapes: lr takes a whole number" in run_script(mine, *flags)
    with open("train.py", "w") as f:
        f.write(script.replace("Option(9,", "Option(9.0,"))
    assert run_script(mine, *flags) is None
    config = train_config("shapes")
    expected = dict(dataset="shapes", mu_s=0.4, hidden_size=48, beta2=0.9, weight_decay=0.0)
    assert {key: config[key] for key in expected} == expected
    assert config["lr"] == 1e-3
    assert config["lr"] != 9.0
    assert config["sigma_s"] == 0.5


def test_published_presets(capsys, folder):
    """Table 6 of the paper."""
    table = {
        "im256_w2": dict(w=2.0, scaled=True, time_init="spectral", grad_clip=0.0),
        "im256_w1p75": dict(w=1.75, scaled=True, time_init="normal", grad_clip=0.0),
        "im512_w2p5": dict(w=2.5, scaled=False, time_init="normal", grad_clip=1.0),
        "im512_w2p25": dict(w=2.25, scaled=True, time_init="spectral", grad_clip=1.0),
    }
    common = dict(
        **dict(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0),
        **dict(batch_size=2048, steps=300_000, ema_target=0.99, ema_eval=0.9999),
        **dict(label_dropout=0.1, times="gap*", mu=-0.8, sigma=1.0, mu_s=-0.4, sigma_s=1.0),
        **dict(hidden_size=1152, depth=28, num_heads=18),
    )
    for name, row in table.items():
        config = helped_config(capsys, f"--preset={name}")
        expected = {**common, **row}
        assert {key: config[key] for key in expected} == expected
    short = helped_config(capsys, "--preset=im256_short")
    assert short["batch_size"] == 1024
    assert short["steps"] == 200_000
    w2 = helped_config(capsys, "--preset=im256_w2")
    record = helped_config(capsys, "--preset=im256_record")
    assert record == {**w2, "preset": "im256_record", "muon_lr": 1e-4, "p_noise": 0.5}


def helped_config(capsys, *arguments):
    """The values that --help prints."""
    assert run_script("train.py", *arguments, "--help") is None
    config = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("    --"):
            flag = line.strip()[2:].split("  ")[0]
            name, value = flag.split("=", 1)
            config[name] = ast.literal_eval(value)
    return config


def test_flags_without_effect():
    flags = ["--w=2", "--kappa=0.1"]
    options.refuse_idle_flags(flags, w=True, kappa=True, mu=False)
    with pytest.raises(SystemExit, match="--kappa has no effect with these constants"):
        options.refuse_idle_flags(flags, w=True, kappa=False)
