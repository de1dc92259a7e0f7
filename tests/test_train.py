"""..."""
import ast
import functools
import glob
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import matplotlib.axes
import numpy as np
import pytest
import torch
from helpers import (
    HERE,
    SMALL,
    SMALL_FID,
    log_lines,
    make_checkpoint,
    randn,
    run_script,
    said,
    same_end,
    seeded_inception,
    state,
    steps_done,
    torchrun,
    train_config,
    until,
    weights,
    write_picture,
)
from PIL import Image

import checkpoint as ckpt
import dataset
import fid
import files
import model as m
import prepare
import sample as s
import scores
from device import all_reduce
from loss import TVM
from model import DiT, DiTConfig


def test_train_end_to_end(folder, capsys):
    """Files, logs, EMAs against their closed form, and a run in three pieces that equals one in one piece."""
    states = []
    for steps in (1, 2, 4):
        assert run_script("train.py", "--name=pieces", f"--steps={steps}", *SMALL) is None
        states.append(state("pieces"))
    assert "from step 2" in capsys.readouterr().out
    os.replace("out/pieces/samples_4.png", "drawn.png")               # as if the run had been stopped between state and picture
    assert run_script("train.py", "--name=pieces", "--steps=4", *SMALL) is None
    assert (np.asarray(Image.open("out/pieces/samples_4.png")) == np.asarray(Image.open("drawn.png"))).all()
    assert run_script("train.py", "--name=whole", "--steps=4", *SMALL) is None
    for key, value in state("whole").items():
        assert (value == states[-1][key]).all(), key

    torch.manual_seed(0)
    start = DiT(DiTConfig.named("tiny", hidden_size=32, depth=1, input_size=8, in_channels=1, num_classes=10))
    parameters = {key: p.detach().double() for key, p in start.named_parameters() if p.requires_grad}
    for kind, rate in (("target", 0.99), ("eval", 0.995)):
        for key, theta0 in parameters.items():
            theta1, theta2 = (states[i][f"model.{key}"].double() for i in (0, 1))
            expected = rate ** 2 * theta0 + (1 - rate) * (rate * theta1 + theta2)
            assert (states[1][f"{kind}.{key}"].double() - expected).abs().max() < 1e-6, key
    shipped = ckpt.load_tensors("out/whole/ckpt.safetensors")[0]
    assert all((shipped[key] == value).all() for key, value in weights(states[-1], "eval").items())

    lines = [json.loads(line) for line in open("out/whole/log.jsonl")]
    assert lines[0]["config"]["batch_size"] == 8 and lines[0]["commit"]
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3, 4] and all(len(line["terminal_by_t"]) == 4 for line in losses)
    assert [line["nfe"] for line in lines if "nfe" in line] == ["real", 1, 2, 4]
    for name in ("samples_4.png", "curve.png"):
        assert Image.open(f"out/whole/{name}").size[0] > 300
    about = m.load_model("out/whole/ckpt.safetensors")[1]
    assert about["step"] == 4 and about["data"]["name"] == "digits" and about["guidance"]["w"] == 1.25
    assert run_script("sample.py", "out/whole/ckpt.safetensors") is None

    assert "beyond steps 3" in run_script("train.py", "--name=whole", "--steps=3", *SMALL)
    assert "lr 0.002 -> 0.1" in run_script("train.py", "--name=whole", "--steps=4", *SMALL, "--lr=0.1")
    assert run_script("train.py", "--name=from", "--steps=1", *SMALL, "--init_from=out/whole/ckpt.safetensors") is None
    assert "init_from" in run_script("train.py", "--name=no", *SMALL, "--depth=2", "--init_from=out/whole/ckpt.safetensors")
    assert "scaled True -> False" in run_script("train.py", "--name=no", *SMALL, "--scaled=False", "--init_from=out/whole/ckpt.safetensors")
    with open("out/from/log.jsonl", "a") as f:
        f.write('{"step": 3, "lo')                                    # a crash in the middle of a line
    assert run_script("train.py", "--name=from", "--steps=2", *SMALL, "--init_from=out/whole/ckpt.safetensors") is None
    torn = [line for line in open("out/from/log.jsonl") if not line.endswith("}\n")]
    assert torn == ['{"step": 3, "lo\n'] and json.loads(open("out/from/log.jsonl").readlines()[-1])["nfe"] == 4
    os.replace("out/from/ckpt.safetensors", "out/from/state_2.safetensors")
    assert "is not the state of a run" in run_script("train.py", "--name=from", "--steps=2", *SMALL)


@pytest.mark.skipif(sys.platform != "linux", reason="stops, kills and limits processes as Linux does")
def test_torture(start):
    """Ten kills, some inside a save, a flipped byte, a truncated file and a full disk against an undisturbed run."""
    import resource
    every, partial = 10, "out/hurt/*.partial"
    arguments = (*SMALL, "--steps=280", f"--save_every={every}")
    run_script("prepare.py", "digits")
    whole = start("--name=whole", *arguments)
    whole.join()
    assert whole.exitcode == 0, said()

    dice, inside = random.Random(0), 0
    newest = lambda: list(ckpt.states("out/hurt").items())[-1] if os.path.exists("out/hurt") and ckpt.states("out/hurt") else (0, None)

    def inside_a_save(process):
        while True:
            until(lambda: glob.glob(partial), "a save")
            os.kill(process.pid, signal.SIGSTOP)
            until(lambda: open(f"/proc/{process.pid}/stat").read().rsplit(")")[-1].split()[0] == "T", "a stop")
            if glob.glob(partial):
                return 1
            os.kill(process.pid, signal.SIGCONT)

    for kill in range(10):
        at, process = newest()[0], start("--name=hurt", *arguments)
        if kill in (4, 6):                                                    # after which the newest state is damaged
            until(lambda: len(ckpt.states("out/hurt")) == 2, "two states")
        if kill == 8:                                                         # for the next save there is no space
            until(lambda: newest()[0] > at, "a save")
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
            until(lambda: "could not write the checkpoint" in said(), "a full disk")
            before = newest()
            assert ckpt.load_tensors(before[1]) and not glob.glob(partial)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            until(lambda: newest()[0] > before[0], "a save after the full disk")
        if kill % 3 == 0:
            until(lambda: newest()[0] >= at + every * dice.randrange(2), "a state")
            inside += inside_a_save(process)
        else:
            goal, moment = at + dice.randrange(5, 30), time.monotonic() + (60 if kill % 3 == 1 else dice.random())
            until(lambda: steps_done("hurt") >= goal or time.monotonic() > moment, "steps")
            time.sleep(0.02 * dice.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, said()
        if kill in (4, 6):
            with open(newest()[1], "rb+") as f:
                size = f.seek(0, os.SEEK_END)
                if kill == 4:
                    f.seek(place := dice.randrange(size))
                    byte = f.read(1)[0]
                    f.seek(place), f.write(bytes([byte ^ 1 << dice.randrange(8)]))
                else:
                    f.truncate(dice.randrange(size))
    last = start("--name=hurt", *arguments)
    last.join()
    assert last.exitcode == 0, said()

    same_end("hurt", "whole")
    assert inside == 4 and said().count("is damaged") >= 2 and not glob.glob(partial)
    repeated, last = [], 0
    for line in log_lines("hurt"):
        if "config" in line:
            repeated.append(last - line["step"])
            last = line["step"]
        last = line["step"] if "loss" in line else last
    assert max(repeated) <= 2 * every and sum(n > every for n in repeated) <= 2, f"{repeated}"
    print(f"steps repeated at each start: {repeated}")


def test_checkpoints_notice_damage(folder):
    """Whatever bit is flipped, wherever the file ends: what is loaded is what was written, or nothing is."""
    import safetensors.torch
    about = dict(config={}, guidance=dict(sampler="constant", w=1, w_min=1, w_max=1), data=dict(class_counts=[], mean=[], std=[]))
    tensors = {"a": randn(3, 5), "b": torch.tensor(7.0), "half": randn(2, 2).bfloat16(), "c": randn(4, 3).t(), "none": torch.zeros(0, 2)}
    ckpt.save_tensors("x", tensors, about)
    whole = open("x", "rb").read()
    for loaded in (ckpt.load_tensors("x")[0], safetensors.torch.load_file("x")):
        assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[key], value) for key, value in tensors.items())
    dice, damaged = random.Random(0), 0
    for place in range(len(whole)):
        with open("x", "wb") as f:
            f.write(whole[:place] + bytes([whole[place] ^ 1 << dice.randrange(8)]) + whole[place + 1:])
        try:
            loaded = ckpt.load_tensors("x")
            assert loaded[1] == about and all(torch.equal(loaded[0][key], value) for key, value in tensors.items())
        except ckpt.Damaged:
            damaged += 1
    assert damaged >= len(whole) - len(ckpt.START)                            # a file may have no checksum
    for size in range(0, len(whole), 7):
        with open("x", "wb") as f:
            f.write(whole[:size])
        with pytest.raises(ckpt.Damaged):
            ckpt.load_tensors("x")


def test_states(folder, capsys):
    """The last ones are kept, a damaged one is passed over and then replaced, and it takes one whole one to go on."""
    about = dict(config={}, guidance=dict(sampler="constant", w=1, w_min=1, w_max=1), data=dict(class_counts=[], mean=[], std=[]))
    assert ckpt.load_newest(".") is None
    for step in (5, 90, 100):
        ckpt.save_state(".", step, {"a": torch.full((9,), float(step))}, about, keep=2)
    assert list(ckpt.states(".")) == [90, 100] and ckpt.load_newest(".")[2]["step"] == 100
    with open("state_100.safetensors", "rb+") as f:
        f.truncate(200)
    path, tensors, _ = ckpt.load_newest(".")
    assert path == "./state_90.safetensors" and (tensors["a"] == 90).all()
    assert capsys.readouterr().err.count("\n") == 1
    ckpt.save_state(".", 95, tensors, about, keep=2)
    assert list(ckpt.states(".")) == [90, 95]
    for path in ckpt.states(".").values():
        open(path, "w").close()
    with pytest.raises(files.CheckpointError, match="no state in . is whole"):
        ckpt.load_newest(".")


def test_full_disk(folder, capsys):
    """Warnings and a run that goes on; at its end an error, and the state before it."""
    resource = pytest.importorskip("resource")
    assert run_script("train.py", "--steps=1", *SMALL) is None
    before, limits = open("out/digits/state_1.safetensors", "rb").read(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        complaint = run_script("train.py", "--steps=4", "--save_every=2", *SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert complaint == "train.py: the save of step 4 failed; the last good checkpoint is out/digits/state_1.safetensors"
    warnings = [line for line in capsys.readouterr().err.splitlines() if "could not write the checkpoint of step" in line]
    assert len(warnings) == 2 and "File too large" in warnings[0]
    assert open("out/digits/state_1.safetensors", "rb").read() == before and not glob.glob("out/digits/*.partial")
    assert run_script("train.py", "--steps=4", *SMALL) is None and list(ckpt.states("out/digits")) == [1, 4]


def test_one_process_a_run(folder):
    lock = files.hold("out/digits", 0)
    complaint = run_script("train.py", "--lock_wait=0", *SMALL)
    assert f"cannot train in out/digits: process {os.getpid()} on" in complaint
    lock.close()
    assert run_script("train.py", "--lock_wait=0", "--steps=1", *SMALL) is None


def test_batches(folder, monkeypatch):
    """Images and labels are those of one seeded permutation an epoch, wherever a run was cut, and for every rank's share."""
    seen = []

    class Spy(TVM):
        def forward(self, x0, y, *draws, **options):
            seen.append((x0, y))
            return super().forward(x0, y, *draws, **options)
    monkeypatch.setattr("loss.TVM", Spy)
    arguments = ("--hidden_size=32", "--depth=1", "--num_heads=2", "--batch_size=600", "--micro_batch=300", "--score_images=2")
    for steps in (2, 5):
        assert run_script("train.py", f"--steps={steps}", *arguments) is None
    data = dataset.load_dataset("data/digits")[1]
    order = np.concatenate([np.random.default_rng([0, epoch]).permutation(1437) for epoch in range(3)])[:3000]
    x0, y = (torch.cat(parts) for parts in zip(*seen))
    assert torch.equal(y, torch.from_numpy(data["train_labels"][order]))
    assert torch.equal(x0, (torch.from_numpy(data["train_images"][order]) - torch.tensor(127.5)) / 127.5)
    assert isinstance(data["train_images"], np.memmap)


def test_slow_and_broken_data(folder, monkeypatch):
    """The time spent waiting is in the log; what goes wrong in the thread that reads is raised in the loop."""
    class Slow:
        def __init__(self, array):
            self.array, self.reads = array, 0

        def __getitem__(self, rows):
            self.reads += 1
            if self.reads > 3:                                                # not before the steps until then, and the config, are in the log
                until(lambda: len(log_lines("digits")) >= self.reads, "the step before")
            time.sleep(1)
            if self.reads > 5:
                raise OSError("the disk is gone")
            return self.array[rows]
    load = dataset.load_dataset
    monkeypatch.setattr(prepare, "load_dataset", lambda path: (lambda header, data: (header, {**data, "train_images": Slow(data["train_images"])}))(*load(path)))
    with pytest.raises(OSError, match="the disk is gone"):
        run_script("train.py", *SMALL)
    waits = [line["data_wait"] for line in log_lines("digits") if "loss" in line]
    assert len(waits) == 5 and all(0.3 < wait < 1 for wait in waits[3:])      # the first three are fetched during a slow first step


def test_signals(start):
    """The first ends the run after its step and a save, also where it comes twice at once; a later one ends it now."""
    run_script("prepare.py", "digits")
    whole, arguments = start("--name=whole", "--steps=40", *SMALL), (*SMALL, "--steps=40", "--name=asked")
    whole.join()
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process, at = start(*arguments), steps_done("asked")
        until(lambda: steps_done("asked") > at + 3, "steps")
        os.kill(process.pid, number), os.kill(process.pid, number)
        process.join()
        stopped = steps_done("asked")
        assert process.exitcode == code and at < stopped < 40 and f"stopped after step {stopped}," in said()
        assert list(ckpt.states("out/asked"))[-1] == stopped
    process = start(*arguments)
    process.join()
    assert process.exitcode == 0
    same_end("asked", "whole")

    process = start("--name=now", "--hidden_size=32", "--depth=1", "--num_heads=2", "--batch_size=16384", "--micro_batch=16")
    until(lambda: log_lines("now"), "a start")
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(2.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(5)
    assert process.exitcode == 143 and not ckpt.states("out/now")


def test_train_logs_fid(folder, monkeypatch):
    """With a stand-in for Inception: the number is that of the same samples by sample.py."""
    class Inception:
        fc, digest = torch.nn.Linear(2, 1), "0123456789"

        def __call__(self, images, resize="tf1"):
            assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 8)
            return images[:, 0].double().mean((1, 2))[:, None] ** torch.arange(1, 3)

    inception = Inception()
    monkeypatch.setattr(fid, "load_inception", lambda path=None, device="cpu": inception)
    monkeypatch.setattr(fid, "Moments", functools.partial(lambda kind, dim: kind(2 if dim == 2048 else dim), fid.Moments))
    np.savez("ref.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez("other.npz", mu=np.zeros(2), sigma=np.eye(2), notes="resize torch, weights 01234567")
    np.savez("wide.npz", mu=np.zeros(3), sigma=np.eye(3))
    for name, word in (("gone.npz", "gone.npz"), ("other.npz", "does not compare"), ("wide.npz", "3 dimensions")):
        assert word in run_script("train.py", *SMALL, f"--fid_reference={name}")
    assert run_script("train.py", *SMALL, "--steps=2", "--sample_every=2", "--fid_reference=ref.npz", "--fid_images=30") is None
    (line,) = [line for line in log_lines("digits") if "fid" in line]
    assert run_script("sample.py", "out/digits/ckpt.safetensors", "--n", 30, "--out", "a.npz") is None
    images = torch.from_numpy(np.load("a.npz")["arr_0"].transpose(0, 3, 1, 2)).expand(-1, 3, -1, -1)
    want = fid.frechet_distance(*scores.moments(inception(images)), np.zeros(2), np.eye(2))
    assert line["step"] == 2 and line["images"] == 30 and abs(line["fid"] / want - 1) < 1e-4


def test_all_reduce_in_several_messages(monkeypatch):
    tensors, messages = [torch.full((n,), float(n)).view(1, n) for n in (3, 4, 5, 9, 2)], []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda message: messages.append(len(message)) or message.mul_(2))
    all_reduce(tensors, limit=8)
    assert messages == [7, 5, 9, 2] and all((t == 2 * t.numel()).all() for t in tensors)


def test_two_ranks_have_the_gradients_of_one(folder):
    """After one step of AdamW its first moment is (1 - beta1) times the gradient."""
    make_checkpoint("start.safetensors", depth=1)
    arguments = (*SMALL, "--steps=1", "--init_from=start.safetensors", "--beta1=0.0")
    assert run_script("train.py", "--name=one", *arguments) is None
    assert run_script("train.py", "--name=micro", "--micro_batch=2", *arguments) is None
    torchrun("train.py", "--name=two", *arguments)
    one = state("one")
    keys = [key for key in one if key.endswith("exp_avg")]
    whole = torch.cat([one[key].flatten() for key in keys]).norm()
    assert len(keys) > 20 and whole > 0
    assert run_script("train.py", "--name=clipped", "--micro_batch=2", f"--grad_clip={whole / 2}", *arguments) is None
    clipped = state("clipped")
    assert all((2 * clipped[key] - one[key]).norm() <= 1e-5 * one[key].norm() + 1e-6 * whole for key in keys)
    for other in map(state, ("micro", "two")):
        for key in keys:
            assert (other[key] - one[key]).norm() <= 1e-5 * one[key].norm() + 1e-7 * whole, key
    assert (state("two")["target.final_layer.linear.weight"] - one["target.final_layer.linear.weight"]).norm() < 1e-6


def test_two_ranks_have_the_losses_of_one(folder, monkeypatch):
    """In float32, with a loss that is not finite in one sample on the last rank: all ranks skip that step, and say so."""
    make_checkpoint("start.safetensors", depth=1)
    script, spot = open(os.path.join(HERE, "train.py")).read(), 'return loss_module(*inputs, backward=partial(backward, share=micro_batch / batch_size))\n'
    assert spot in script
    with open("train.py", "w") as f:
        f.write(script.replace(spot, f"terms = {spot[7:]}        terms['fm'][-1] *= math.inf if (step, rank, first + micro_batch) == (3, ranks - 1, local_batch) "
                                     "else 1\n        return terms\n"))
    monkeypatch.setenv("PYTHONPATH", HERE)
    arguments = (*SMALL, "--steps=8", "--init_from=start.safetensors")
    assert run_script(str(folder / "train.py"), "--name=one", "--micro_batch=4", *arguments) is None
    for micro_batch in (0, 2):
        torchrun(str(folder / "train.py"), f"--name=two-{micro_batch}", f"--micro_batch={micro_batch}", *arguments)
        one, two = ([line for line in log_lines(name) if "loss" in line] for name in ("one", f"two-{micro_batch}"))
        assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3, 5, 6, 7, 8]
        assert all(abs(a["loss"] / b["loss"] - 1) < 1e-6 for a, b in zip(one, two)) and one[-1]["skipped"] == two[-1]["skipped"] == 1


def test_ranks_that_come_apart_are_noticed(folder, monkeypatch):
    script, spot = open(os.path.join(HERE, "train.py")).read(), "    step_sums.zero_()\n"
    assert spot in script
    with open("train.py", "w") as f:
        f.write(script.replace(spot, spot + "    weight = parameters['blocks.0.attn.qkv.weight'].data\n"
                                     "    weight += 1e-3 * rank * (step == 2) * weight.std() * torch.randn_like(weight)\n"
                                     "    waited += 1000 * rank\n"))
    monkeypatch.setenv("PYTHONPATH", HERE)
    with pytest.raises(subprocess.CalledProcessError) as error:
        torchrun(str(folder / "train.py"), *SMALL, "--steps=8")
    assert b"the ranks' weights have come apart before step 3" in error.value.stderr
    lines = [line for line in log_lines("digits") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2] and all(line["data_wait"] > 1 for line in lines)      # the slowest rank's


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_end_together(folder):
    """A killed rank: torchrun starts all of them again, and without restarts left ends with an error. A killed torchrun:
    the ranks, left alone, save at one step and end, which lets go of the lock."""
    def launch(restarts):
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max_restarts={restarts}",
                                 os.path.join(HERE, "train.py"), *SMALL, "--steps=100000", "--save_every=10"], stdout=open("said", "a"),
                                stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})

    starts = lambda: [line["step"] for line in log_lines("digits") if "config" in line]
    ranks_of = lambda process: [int(pid) for pid in open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()]
    process = launch(restarts=1)
    try:
        until(lambda: steps_done("digits") > 12, "steps")
        os.kill(ranks_of(process)[-1], signal.SIGKILL)
        until(lambda: len(starts()) == 2, "a restart")
        until(lambda: steps_done("digits") > starts()[1] + 2, "steps")
        process.kill()
        process.wait()
        files.hold("out/digits", 20).close()                                   # waits for it
        stopped = steps_done("digits")
        assert list(ckpt.states("out/digits"))[-1] == stopped and f"stopped after step {stopped}," in said()

        process = launch(restarts=0)
        until(lambda: steps_done("digits") > stopped + 2, "steps")
        os.kill(ranks_of(process)[-1], signal.SIGKILL)
        assert process.wait(20) != 0 and "Signal 9 (SIGKILL)" in said()
        assert starts()[0] == 0 and starts()[1] >= 10 and starts()[1] % 10 == 0 and starts()[2] == stopped
    finally:
        process.terminate()
        process.wait()


def test_a_run_that_blows_up_stops(folder):
    """The first update puts the weights near +-1e30; from then on no gradient is finite, and nothing is updated."""
    complaint = run_script("train.py", *SMALL, "--steps=20", "--save_every=2", "--lr=1e30")
    assert "not finite in 10 steps in a row" in complaint and "nothing was saved yet" in complaint     # and nothing bad either
    lines = [json.loads(line) for line in open("out/digits/log.jsonl")]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert not ckpt.states("out/digits")
    assert run_script("train.py", *SMALL, "--name=short", "--steps=8", "--lr=1e30", "--score_images=2") is None      # its end is saved
    assert all(value.isfinite().all() for value in state("short").values())


def test_presets_and_flags(folder):
    """Preset group, else the constant in the file, edited or not; a flag beats both."""
    assert run_script("prepare.py", "shapes", "--n", 60, "--size", 8) is None
    script = open(os.path.join(HERE, "train.py")).read()
    edited = script.replace("beta1, beta2, eps = 0.9, 0.95, 1e-8", "beta1, beta2, eps = 0.9, 0.9, 1e-8").replace("lr = 2e-3", "lr = 9").replace("sigma_s = -0.4, 1.0", "sigma_s = -0.4, 1")
    assert edited != script
    with open("train.py", "w") as f:
        f.write(edited)
    subprocess.run([sys.executable, "train.py", "--preset=shapes", "--steps=1", "--hidden_size=48", "--depth=1", "--batch_size=4",
                    "--micro_batch=2", "--classifier=1-nn", "--sigma_s=0.5"], check=True, env={**os.environ, "PYTHONPATH": HERE}, capture_output=True)
    config = train_config("shapes")
    assert [config[key] for key in ("dataset", "mu_s", "hidden_size", "beta2", "weight_decay")] == ["shapes", 0.4, 48, 0.9, 0.0]
    assert config["lr"] != 9.0 and config["sigma_s"] == 0.5


def test_published_presets(capsys, folder):
    """Table 6 of the paper."""
    table = {"im256_w2": (2.0, True, "spectral", 0.0), "im256_w1p75": (1.75, True, "normal", 0.0),
             "im512_w2p5": (2.5, False, "normal", 1.0), "im512_w2p25": (2.25, True, "spectral", 1.0)}
    for name, row in table.items():
        assert run_script("train.py", f"--preset={name}", "--help") is None
        config = dict(line.strip()[2:].split("=") for line in capsys.readouterr().out.splitlines() if line.startswith("    --"))
        config = {key: ast.literal_eval(value) for key, value in config.items()}
        assert tuple(config[key] for key in ("w", "scaled", "time_init", "grad_clip")) == row
        assert [config[key] for key in ("lr", "beta1", "beta2", "eps", "weight_decay", "batch_size", "steps", "ema_target", "ema_eval")] \
            == [1e-4, 0.9, 0.95, 1e-8, 0.0, 2048, 300_000, 0.99, 0.9999]
        assert [config[key] for key in ("label_dropout", "times", "mu", "sigma", "mu_s", "sigma_s", "hidden_size", "depth", "num_heads")] \
            == [0.1, "gap*", -0.8, 1.0, -0.4, 1.0, 1152, 28, 18]
    assert run_script("train.py", "--preset=im256_short", "--help") is None
    assert "--batch_size=1024" in (said := capsys.readouterr().out) and "--steps=200000" in said


def test_unlabelled_data(folder):
    for i in range(12):
        write_picture(folder / "src" / f"{i}.png", colour=(20 * i, 100, 0))
    assert run_script("prepare.py", "folder", "src", "--size", 8, "--name", "plain", "--held-out", 0.25) is None
    assert run_script("train.py", "--dataset=plain", "--steps=2", "--w=1", *SMALL) is None
    assert run_script("sample.py", "out/plain/ckpt.safetensors") is None
    assert "nothing to guide" in run_script("train.py", "--dataset=plain", "--w=2", "--name=w", *SMALL)


def test_train_refuses(folder):
    complain = lambda *a: run_script("train.py", *a)
    assert "did you mean batch_size" in complain("--batchsize=3")
    assert "whole number" in complain("--steps=1.5")
    assert "whole number" in complain("--steps=many")
    assert "True or False" in complain("--scaled=1")
    assert "a number" in complain("--lr=nan")
    assert "did you mean shapes" in complain("--preset=shape")
    assert "write --steps=VALUE" in complain("--steps")
    assert "no data in" in complain("--dataset=nowhere")
    assert "times must be" in complain("--times=no")
    assert "guidance must be" in complain("--guidance=no")
    assert "not divisible by micro_batch" in complain("--batch_size=8", "--micro_batch=3")
    assert "not divisible by patch_size" in complain("--patch_size=3")
    assert "above 0" in complain("--w=0.0")
    assert "p_equal" in complain("--p_equal=1.5")
    for flag in ("--ema_eval=2", "--ema_target=1", "--beta2=1.0", "--seed=99999999999999999999", "--micro_batch=-2", "--grad_clip=-1", "--lr=-1", "--beta1=1.5", "--seed=-1"):
        assert f"{flag[2:].split('=')[0]} must be at least" in complain(flag)
    assert "no device 'gpu'" in complain("--device=gpu")
    assert "names a folder" in complain("--name=../x")
    assert "label_dropout must be above 0" in complain("--label_dropout=0")
    assert "label_dropout must be above 0" in complain("--label_dropout=0", "--guidance=inverse", "--w_max=2", "--w=1")
    assert "takes a number" in complain("--lr=1" + 400 * "0")
    assert "steps must be at least 1" in complain("--steps=0")
    labels = np.load("data/digits/train_labels.npy")
    np.save("data/digits/train_labels.npy", labels + 5)
    assert "a label outside 0 to 9" in complain()
    np.save("data/digits/train_labels.npy", labels[:-1])
    assert "its header says" in complain()
    np.save("data/digits/train_labels.npy", labels)
    with open("data/digits/train_images.npy", "rb+") as f:
        f.truncate(5000)
    assert "cannot read" in complain()
    assert run_script("prepare.py", "digits") is None
    header = json.load(open("data/digits/header.json"))
    without = {key: value for key, value in header.items() if key != "count"}
    for wrong, word in ((dict(header, format="other"), "not a tvm-data-1 header"), (without, "no count"), ([1], "no format"),
                        (dict(header, dtype="float32"), "its header says float32"), (dict(header, shape=[1, 4, 4]), "(1437, 1, 4, 4)"),
                        (dict(header, count=dict(train=1438, test=360)), "its header says"), (dict(header, count=dict(train=5)), "count"),
                        (dict(header, mean=[1, 2]), "mean [1, 2]"), (dict(header, std=[0]), "std"), (dict(header, class_counts=[1]), "class_counts"),
                        (dict(header, shape=[64]), "shape")):
        json.dump(wrong, open("data/digits/header.json", "w"))
        assert word in complain()
    os.remove("data/digits/header.json")
    assert "no data in" in complain()
    assert not os.path.exists("out")
    done = subprocess.run([sys.executable, os.path.join(HERE, "train.py"), "--stepz=3"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "train.py: there is no option 'stepz'; did you mean steps?\n"


def test_written_is_synced_before_it_is_renamed(folder, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("folder" if os.fstat(fd).st_mode & 0o40000 else os.fstat(fd).st_size))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    with files.written("x") as f:
        f.write(b"123")
    assert calls == [3, "rename", "folder"]


def test_locks_name_their_holder(folder):
    open("state_7.safetensors.partial", "w").close()
    with open("lock", "w") as f:
        f.write("process 1 on a machine of long ago, with a long name\n")
    lock = files.hold(".", 0)
    with pytest.raises(OSError, match=f"^process {os.getpid()} on"):
        files.hold(".", 0)
    lock.close()
    assert os.listdir(".") == ["lock"]


def test_constants_reach_their_places(folder, monkeypatch):
    """The objective's and the optimizer's; terms are logged by quarters of their own times; noise differs by seed, step and micro-batch."""
    seen, noises, terms, AdamW = [], [], [], torch.optim.AdamW

    class Spy(TVM):
        def __init__(self, model, target, *options):
            seen.append(options)
            super().__init__(model, target, *options)

        def forward(self, x0, y, noise, *draws, **options):
            noises.append(noise)
            terms.append(super().forward(x0, y, noise, *draws, **options))
            return terms[-1]

    def spy(parameters, lr, betas, eps, weight_decay=0.01, **options):
        seen.append((lr, betas, eps, weight_decay))
        return AdamW(parameters, lr, betas, eps, weight_decay, **options)

    monkeypatch.setattr("loss.TVM", Spy)
    monkeypatch.setattr(torch.optim, "AdamW", spy)
    flags = (*SMALL[:3], "--batch_size=600", "--micro_batch=300", "--score_images=2", "--detach_jvp=True", "--kappa=0.25", "--label_dropout=0.3",
             "--lr=0.001", "--beta1=0.8", "--beta2=0.7", "--eps=1e-6", "--weight_decay=0.5")
    assert run_script("train.py", "--steps=2", *flags) is None
    assert seen[0] == (1e-3, (0.8, 0.7), 1e-6, 0.5) and seen[1][2:] == (0.3, True, "tvm", 0.25)
    line = [line for line in log_lines("digits") if "loss" in line][-1]
    for key, term, at in (("terminal_by_t", "terminal", "t"), ("fm_by_s", "fm", "s_fm")):
        value, where = (torch.cat([parts[name] for parts in terms]).double() for name in (term, at))
        for quarter, mean in enumerate(line[key]):
            assert abs(value[(where * 4).long().clamp(max=3) == quarter].mean() / mean - 1) < 1e-5
    assert run_script("train.py", "--steps=1", "--name=other", "--seed=1", *flags) is None
    assert len({noise[0].sum().item() for noise in noises}) == 6


def test_small_things_of_a_run(folder, monkeypatch):
    """A range of weights is sampled at its geometric mean; real images leave themselves out; other data is refused; an evaluation
    network that was not saved with the last state is written by the next run; the curve does not run backwards."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(s, "sample", lambda net, x1, y, w, *a, sample=s.sample: asked.append(w) or sample(net, x1, y, w, *a))
        assert run_script("train.py", "--steps=1", "--name=range", "--guidance=inverse", "--w_max=4", *SMALL) is None
    assert asked and all((w == 2).all() for w in asked)
    assert run_script("train.py", "--steps=1", *SMALL) is None
    (line,) = [line for line in log_lines("digits") if line.get("nfe") == "real"]
    assert 0.5 < line["nearest_ratio"] < 2
    os.replace("out/digits/ckpt.safetensors", "was.safetensors")
    with open("out/digits/log.jsonl", "a") as f:
        f.write('{"step": 0, "loss": 2, "fm": 1, "terminal": 1}\n')
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.axes.Axes.plot", lambda axes, x, y, plot=matplotlib.axes.Axes.plot, **how: drawn.append(x) or plot(axes, x, y, **how))
        assert run_script("train.py", "--steps=1", *SMALL) is None
    assert drawn == [[0, 1]] * 2
    again, before = (ckpt.load_tensors(path) for path in ("out/digits/ckpt.safetensors", "was.safetensors"))
    assert again[1]["step"] == 1 and all((again[0][key] == t).all() for key, t in before[0].items())
    assert run_script("prepare.py", "digits", "--seed", 1) is None
    assert "was trained on other data" in run_script("train.py", "--steps=2", *SMALL)


def test_fid_of_all_ranks(folder, monkeypatch):
    torch.save(seeded_inception().state_dict(), "w.pth")
    np.savez("ref.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with open("train.py", "w") as f:
        f.write(SMALL_FID + open(os.path.join(HERE, "train.py")).read())
    monkeypatch.setenv("PYTHONPATH", HERE)
    run = (str(folder / "train.py"), "--steps=1", *SMALL, "--fid_reference=ref.npz", "--fid_images=30", "--inception=w.pth")
    subprocess.run([sys.executable, *run, "--name=one"], check=True, capture_output=True)
    torchrun(*run, "--name=two")
    one, two = ([line["fid"] for line in log_lines(name) if "fid" in line] for name in ("one", "two"))
    assert len(one) == len(two) == 1 and abs(one[0] / two[0] - 1) < 1e-4
