"""study.py: which runs it makes, the whole of it at toy size, and what it refuses."""

import glob
import json
import os
import subprocess
import sys
import time

import pytest
from helpers import HERE, run_script, until
from PIL import Image

import study
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
    assert again.out == text_of("out/study-tiny/tables.md") == text_of("elsewhere/tables.md")
    assert Image.open("elsewhere/study.png").size[0] > 300


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
