"""study.py and record.py: which runs they make, all of it at toy size, and what they refuse."""

import ast
import glob
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest
from helpers import HERE, run_script, until
from PIL import Image
from tqdm import tqdm

import record
import record_report
import study
from files import hold
from study_report import mean_distance

LOG = "out/study-tiny/log.jsonl"


def line_with(distance):
    """A run whose Frechet distance is the same at all step counts."""
    return {"scores": {nfe: {"features": distance} for nfe in (1, 2)}}


def test_study_rates():
    """Twice the largest rate is tried where that was best. The other seeds wait for this."""
    done = {}
    for method in study.METHODS:
        for rate in (0.0005, 0.001):
            done[f"{method}-{rate}-0"] = line_with(3)

    def planned():
        """What is to be run next, ablations aside."""
        runs = study.plan_runs(study.FULL, done)
        return {run for run in runs if run not in done and not run.startswith("ablation")}

    def other_seeds(*best):
        return {f"{method}-{seed}" for method in best for seed in (1, 2)}

    runs = study.plan_runs(study.FULL, done)
    rates = {run.split("-")[1] for run in runs if run.startswith("tvm")}
    assert rates == {"0.0005", "0.001", "0.002"}

    done["tvm-0.002-0"] = line_with(4)
    done["meanflow-0.002-0"] = line_with(1)
    done["flow_matching-0.002-0"] = {"failed": "not finite"}
    assert planned() == {"meanflow-0.004-0"}
    done["meanflow-0.004-0"] = line_with(2)
    assert planned() == other_seeds("tvm-0.0005", "meanflow-0.002", "flow_matching-0.0005")
    done["meanflow-0.004-0"] = line_with(0.5)
    done["tvm-0.001-0"] = line_with(2)
    assert planned() == other_seeds("tvm-0.001", "meanflow-0.004", "flow_matching-0.0005")


def test_mean_distance():
    scores = {1: {"features": 1.0}, 2: {"features": 100.0}}
    assert mean_distance({"scores": scores}) == pytest.approx(10)


def log_lines():
    if not os.path.exists(LOG):
        return []
    with open(LOG) as f:
        return f.read().splitlines()


def text_of(path):
    with open(path) as f:
        return f.read()


@pytest.fixture
def tiny_study(folder):
    """Start it: returns a process."""
    processes = []

    def start(stdout):
        command = [sys.executable, os.path.join(HERE, "study.py"), "--tiny"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=stdout, stderr=stdout, env=environment)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


def test_study(tiny_study, capsys):
    """Ended in the middle and begun again. The report comes from the log alone."""
    first = tiny_study(subprocess.DEVNULL)

    def one_run_is_done():
        time.sleep(0.1)  # the study needs the processor
        return len(log_lines()) > 1 or first.poll() is not None

    until(one_run_is_done, "the first run", 300)
    first.terminate()
    assert first.wait() == 143
    some = log_lines()
    with open("said", "w") as said:
        assert tiny_study(said).wait() == 0, text_of("said")
    runs = [json.loads(line)["run"] for line in log_lines()[1:]]
    assert log_lines()[: len(some)] == some
    assert len(runs) == len(set(runs)) == 10
    assert {"tvm-0.002-0", "ablation-gap"} < set(runs)
    (sheet,) = glob.glob("out/study-tiny/study-tiny-tvm-*-1.png")
    assert Image.open(sheet).size[0] > 300

    os.makedirs("elsewhere")
    os.replace(LOG, "elsewhere/log.jsonl")
    capsys.readouterr()
    assert run_script("study.py", "--report", "--log=elsewhere/log.jsonl") is None
    again = capsys.readouterr()
    assert "no samples.png" in again.err
    assert again.out == text_of("out/study-tiny/study-tables.md")
    assert again.out == text_of("elsewhere/study-tables.md")
    assert Image.open("elsewhere/study.png").size[0] > 300


@pytest.mark.parametrize(
    "script, name, flags", [("study.py", "study", ()), ("record.py", "record", ("--round=1",))]
)
def test_two_at_once(folder, script, name, flags):
    """They would make all runs twice."""
    at = os.path.join("out", f"{name}-tiny")
    with hold(at):
        said = run_script(script, "--tiny", *flags)
        assert f"is at work in {at}" in said
        assert os.listdir(at) == ["lock"]
        assert not os.path.exists("data")


@pytest.mark.parametrize("script", ["study.py", "record.py"])
def test_figures_in_a_notebook_of_another_environment(folder, script):
    """Its backend of matplotlib is not known here."""
    name = script.removesuffix(".py")
    shutil.copy(os.path.join(HERE, "assets", f"{name}.jsonl"), "log.jsonl")
    command = [sys.executable, os.path.join(HERE, script), "--report", "--log=log.jsonl"]
    environment = {**os.environ, "MPLBACKEND": "unknown", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(f"{name}.png").size[0] > 300


def test_train_does_not_score():
    """The judge does."""
    assert "--score_images=0" in study.command_of(study.FULL, "a", {}, 3)


def test_study_refuses(folder):
    assert "unrecognized arguments: --secs=3" in run_script("study.py", "--secs=3")
    assert "is not the log of a study" in run_script("study.py", "--report", "--log=no")
    with open("log.jsonl", "w") as f:
        f.write('{"step": 0}\n')  # of train.py
    assert "is not the log of a study" in run_script("study.py", "--report", "--log=log.jsonl")
    for seconds in ("0", "nan", "inf"):
        assert "above 0" in run_script("study.py", f"--seconds={seconds}")


def test_the_study_in_the_repository(folder, capsys):
    """Its log gives the table that the docs show."""
    log = os.path.join(HERE, "assets", "study.jsonl")
    os.symlink(log, "study.jsonl")
    assert run_script("study.py", "--report", "--log=study.jsonl") is None
    text = capsys.readouterr().out
    tvm = "| tvm (2990 training steps, 16.7 ms, lr 0.001, 3 seeds)"
    flow = "| flow_matching (7257 training steps, 6.9 ms, lr 0.002, 3 seeds)"
    assert f"{tvm} | 1 | 1.160 ± 0.298 |" in text
    assert f"{flow} | 50 | 0.116 ±" in text


# ---- the record ----------------------------------------------------------------------------------


def test_record(folder, capsys):
    """A round of two runs. The report comes from the log alone."""
    command = [sys.executable, os.path.join(HERE, "record.py"), "--tiny", "--round=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open("said", "w") as said:
        ended = subprocess.run(command, stdout=said, stderr=said, env=environment)
    assert ended.returncode == 0, text_of("said")
    log = "out/record-tiny/log.jsonl"
    first, *lines = [json.loads(line) for line in text_of(log).splitlines()]
    assert first["settings"]["nfes"] == [1, 2, 4, 50]
    step_ms = json.loads(text_of("out/record-tiny/steps.json"))
    assert set(step_ms) == {"TVM", "detach_jvp=True"}
    lines = {line["idea"]: line for line in lines}
    assert set(lines) == {"TVM", "detach_jvp"}
    for line in lines.values():
        assert line["seconds"] == 0.1 and line["seed"] == 0 and line["commit"]
        assert line["steps"] == max(1, round(100 / step_ms[line["step"]]))
        assert set(line["scores"]) == {"1", "2", "4", "50"}
    assert Image.open("out/record-tiny/samples.png").size[0] > 300

    os.makedirs("elsewhere")
    os.replace(log, "elsewhere/log.jsonl")
    with open("page.md", "w") as f:
        f.write(f"# Before\n\n{record_report.MARKER}what was there\n")
    capsys.readouterr()
    flags = ("--report", "--log=elsewhere/log.jsonl", "--page=page.md")
    assert run_script("record.py", *flags) is None
    again = capsys.readouterr()
    assert "no samples.png" in again.err
    assert again.out == text_of("out/record-tiny/record-tables.md")
    assert text_of("page.md") == f"# Before\n\n{record_report.MARKER}\n{again.out}"
    assert Image.open("elsewhere/record.png").size[0] > 300


def record_line(idea, seed, distance=None, averages=None):
    """A line of the record's log, with one score; without any where the run diverged."""
    line = dict(idea=idea, seed=seed, change={}, step="TVM", step_ms=2.0, steps=3)
    line["commit"] = "0123456789"
    if distance is None:
        return dict(line, failed="not finite")
    line["scores"] = {"1": {"features": distance}}
    if averages:
        line["averages"] = {rate: {"1": {"features": d}} for rate, d in averages.items()}
    return line


def test_table_of_ideas():
    """TVM has 1, 2, 3: 2 with a deviation of 1. Intervals that touch overlap."""
    lines = [record_line("TVM", seed, seed + 1, {"0.5": 4}) for seed in range(3)]
    lines += [record_line("near", 0, 1.0), record_line("far", 0, 0.5), record_line("bad", 0)]
    lines += [record_line("worse", 0, 2.5), record_line("worse", 1, 4.5), record_line("worse", 2)]
    groups = record_report.groups_of(lines)
    table = record_report.table_of_ideas(groups, record.IDEAS, ["1"])
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table[2:]]
    assert {len(row) for row in rows} == {table[0].count("|") - 1}
    found = {row[0]: (*row[3:6],) for row in rows}
    assert found == {
        "TVM": ("3", "2.000 ± 1.000", ""),
        "TVM, average 0.5": ("3", "4.000 ± 0.000", "0.50, apart"),
        "near": ("1", "1.000", "2.00, one seed"),
        "far": ("1", "0.500", "4.00, one seed"),
        "bad": ("0, 1 diverged", "", ""),
        "worse": ("2, 1 diverged", "3.500 ± 1.414", "0.57, overlap"),
    }
    assert record_report.best_group(groups, ["1"]).name() == "far"
    assert record_report.shared_timings(groups) == [
        "- One timing for: TVM; near; far; worse.",
        "",
    ]


def test_rounds_of_the_record():
    """The ideas are there, and the last round's constants are train.py's. Equal steps share a time.

    Switches that did not win may be gone from the code; their ideas stay in the file.
    """
    for a_round in record.ROUNDS.values():
        assert set(a_round.seeds) <= set(record.IDEAS)
        runs = record.members_of(a_round)
        assert len(runs) == sum(map(len, a_round.seeds.values()))
    assert set(record.METHODS) <= set(record.ROUNDS[2].seeds)

    constants = set()
    for node in ast.parse(text_of(os.path.join(HERE, "train.py"))).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Option("):
            constants.add(node.targets[0].id)
    for idea in record.ROUNDS[2].seeds:
        assert set(record.IDEAS[idea].change) <= constants, idea

    assert record.step_of(dict(lr=1.0, seed=3, ema_also="0.9")) == "TVM"
    assert record.step_of(dict(lr=1.0, detach_jvp=True)) == "detach_jvp=True"
    assert (
        record.costs_of(dict(muon_lr=0.1)) == record.costs_of(dict(muon_lr=0.2)) == {"muon": True}
    )
    with pytest.raises(TypeError, match="no_such"):
        study.time_step(record.TINY, dict(no_such=1))


@pytest.mark.parametrize(
    "last, diverged",
    [
        ("the loss or its gradient was not finite in 10 steps in a row, so", True),
        ("the weights at step 30 are not finite; out/a has no good state", True),
        ("no room on the disk", False),
    ],
)
def test_divergence_is_a_result(folder, last, diverged):
    """A run that diverged goes to the log. Another failure does not, so that it is tried again."""
    os.makedirs(study.TINY.folder)
    runs = object.__new__(study.Runs)
    runs.protocol = study.TINY
    runs.log = "log.jsonl"
    runs.done = {}
    runs.failed = {}
    runs.judge = Future()
    runs.judge.set_result(None)
    runs.bar = tqdm(disable=True)
    with open(runs.output_path("a"), "w") as f:
        f.write(f"some steps\r{last}\n")
    job = study.Job(30, None, None)
    runs.active = {"a": job}
    runs.note_failure("a", job)
    assert runs.active == {}
    if diverged:
        assert json.loads(text_of("log.jsonl")) == dict(run="a", steps=30, failed=last)
        assert not runs.failed
    else:
        assert runs.failed == {"a": last}
        assert not os.path.exists("log.jsonl")


def test_least_busy_gpu():
    """Runs that are being scored do not count."""
    runs = object.__new__(study.Runs)
    runs.gpus = ["1", "0"]
    runs.active = {}
    for name, gpu, scores in (("a", "1", None), ("b", "0", None), ("c", "1", "soon")):
        assert runs.least_busy_gpu() == ("1" if name == "a" else "0" if name == "b" else "1")
        runs.active[name] = study.Job(1, gpu, None, scores)
    assert runs.least_busy_gpu() == "1"


def test_record_refuses(folder):
    assert "give --round=1, 2 or 3, or --report" in run_script("record.py")
    assert "is not the log of a study" in run_script("record.py", "--report", "--log=no")
    with open(os.path.join(HERE, "assets", "record.jsonl")) as f:
        first = f.readline()
    with open("log.jsonl", "w") as f:
        f.write(first)
    said = run_script("record.py", "--report", "--log=log.jsonl")
    assert "log.jsonl has no run with scores yet" in said
    with open("page.md", "w") as f:
        f.write("# A page\n")
    with pytest.raises(record.UserError, match="page.md has no line"):
        record_report.put_into_page("tables", "page.md")
    assert text_of("page.md") == "# A page\n"
    os.makedirs("out/record-tiny")
    shutil.copy("log.jsonl", "out/record-tiny/log.jsonl")
    assert "has other settings" in run_script("record.py", "--tiny", "--round=1")


def test_damaged_files_of_the_record(folder):
    """A line that a kill cut off makes room for the next one. Other damage is told in one line."""
    study.append_line("log.jsonl", dict(run=1))
    with open("log.jsonl", "a") as f:
        f.write('{"run": {"cut": 2}')
    study.append_line("log.jsonl", dict(run=3))
    assert text_of("log.jsonl") == '{"run": 1}\n{"run": 3}\n'
    for text in ("", "[]", '{"TVM": "fast"}', '{"TVM": 0}', '{"TVM": -5}', '{"TVM": NaN}'):
        with open("steps.json", "w") as f:
            f.write(text)
        with pytest.raises(record.UserError, match="steps.json is damaged: delete it"):
            record.read_steps("steps.json")
    for script, log in (("record.py", "study.jsonl"), ("study.py", "record.jsonl")):
        shutil.copy(os.path.join(HERE, "assets", log), log)
        said = run_script(script, "--report", f"--log={log}")
        assert f"{log} is not a log of {script}" in said
    lines = text_of("study.jsonl").splitlines(keepends=True)
    lines[3] = lines[3][:200] + "\n"  # no kill leaves that
    with open("study.jsonl", "w") as f:
        f.writelines(lines)
    assert "is not the log of a study" in run_script("study.py", "--report", "--log=study.jsonl")


@pytest.mark.parametrize("script", ["study.py", "record.py"])
def test_logs_that_lack_something(folder, script):
    """One line each, and the tables of what is whole."""
    with open(os.path.join(HERE, "assets", script.replace(".py", ".jsonl"))) as f:
        lines = [json.loads(line) for line in f]
    scored = next(i for i, line in enumerate(lines) if "scores" in line)
    changes = [(0, "settings", {}), (0, "settings", 3), (0, "real", {}), (0, "date", 5)]
    changes += [(scored, "scores", {}), (scored, "steps", "9")]
    changes += [(0, "settings", {**lines[0]["settings"], "nfes": []})]
    no_distance = {nfe: dict(s, features=0.0) for nfe, s in lines[scored]["scores"].items()}
    changes += [(scored, "scores", no_distance), (scored, "run", 5), (0, "step_ms", {"tvm": 0})]
    if script == "record.py":
        changes += [(scored, "idea", ["x"]), (scored, "seed", "0")]
    for i, key, value in changes:
        damaged = [dict(line) for line in lines]
        damaged[i][key] = value
        with open("log.jsonl", "w") as f:
            f.writelines(json.dumps(line) + "\n" for line in damaged)
        said = run_script(script, "--report", "--log=log.jsonl")
        assert (
            f"log.jsonl is not a log of {script}: " in said or "not the log of a study" in said
        ), key


def test_the_record_in_the_repository(folder):
    """Its log gives the tables that the page shows."""
    shutil.copy(os.path.join(HERE, "assets", "record.jsonl"), "record.jsonl")
    shutil.copy(os.path.join(HERE, "docs", "record.md"), "page.md")
    flags = ("--report", "--log=record.jsonl", "--page=page.md")
    assert run_script("record.py", *flags) is None
    assert text_of("page.md") == text_of(os.path.join(HERE, "docs", "record.md"))


def test_the_second_run_in_the_repository():
    """The page has the distances of its log."""
    page = " ".join(text_of(os.path.join(HERE, "docs", "record.md")).split())
    _, *lines = text_of(os.path.join(HERE, "assets", "record-second.jsonl")).splitlines()
    runs = {line["idea"]: line for line in map(json.loads, lines)}
    distance = {idea: f"{run['scores']['1']['features']:.1f}" for idea, run in runs.items()}
    assert distance == {"TVM": "23.8", "Muon": "4.9", "Muon, 5e-4": "8.0", "Muon, 2e-3": "22.1"}
    assert (
        f"record-second.jsonl): {distance['Muon']} at 1e-3, {distance['Muon, 5e-4']} at 5e-4, "
        f"{distance['Muon, 2e-3']} at 2e-3, and TVM {distance['TVM']} "
    ) in page
