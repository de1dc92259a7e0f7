"""..."""
import glob
import json
import os
import subprocess
import sys

import pytest
from helpers import HERE, until
from PIL import Image

import study


def test_study_rates():
    """Twice the largest rate is tried where the largest was best, and the other seeds wait for that."""
    line = lambda distance: {"scores": {nfe: {"features": distance} for nfe in (1, 2)}}
    new = lambda: {run for run in study.plan(done) if run not in done and not run.startswith("ablation")}
    done = {f"{method}-{rate}-0": line(3) for method in study.METHODS for rate in (0.0005, 0.001)}
    assert {run.split("-")[1] for run in study.plan(done) if run.startswith("tvm")} == {"0.0005", "0.001", "0.002"}
    done |= {"tvm-0.002-0": line(4), "meanflow-0.002-0": line(1), "flow_matching-0.002-0": {"failed": "not finite"}}
    assert new() == {"meanflow-0.004-0"}
    done["meanflow-0.004-0"] = line(2)
    assert new() == {f"{method}-{seed}" for method in ("tvm-0.0005", "meanflow-0.002", "flow_matching-0.0005") for seed in (1, 2)}
    done |= {"meanflow-0.004-0": line(0.5), "tvm-0.001-0": line(2)}
    assert new() == {f"{method}-{seed}" for method in ("tvm-0.001", "meanflow-0.004", "flow_matching-0.0005") for seed in (1, 2)}


def test_study(folder):
    """The whole study at toy size, ended in the middle and begun again; its report comes from the log alone."""
    command = [sys.executable, os.path.join(HERE, "study.py")]
    lines = lambda: open("out/study-tiny/log.jsonl").read().splitlines() if os.path.exists("out/study-tiny/log.jsonl") else []
    first = subprocess.Popen([*command, "--tiny"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until(lambda: len(lines()) > 1, "the first run", 300)
    first.terminate()
    assert first.wait() == 143
    some = lines()
    done = subprocess.run([*command, "--tiny"], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line)["run"] for line in lines()[1:]]
    assert lines()[:len(some)] == some and len(runs) == len(set(runs)) == 10 and {"tvm-0.002-0", "ablation-gap"} < set(runs)
    os.makedirs("elsewhere")
    os.replace("out/study-tiny/log.jsonl", "elsewhere/log.jsonl")
    again = subprocess.run([*command, "--report", "--log=elsewhere/log.jsonl"], capture_output=True, text=True)
    assert "no samples.png" in again.stderr
    assert again.stdout == open("out/study-tiny/tables.md").read() == open("elsewhere/tables.md").read()
    assert Image.open("elsewhere/study.png").size[0] > 300 and Image.open(glob.glob("out/study-tiny/study-tiny-tvm-*-1.png")[0]).size[0] > 300
    for arguments, word in ((["--secs=3"], "no option"), (["--report", "--log=no"], "is not the log of a study"), (["--seconds=0"], "above 0")):
        refused = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert refused.returncode == 1 and word in refused.stderr and refused.stderr.count("\n") == 1


def test_study_spread():
    assert study.spread({"scores": {1: {"features": 1.0}, 2: {"features": 100.0}}}) == pytest.approx(10)
