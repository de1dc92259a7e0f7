"""train.py: a whole run, what it survives, its ranks, and what it refuses."""

import glob
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import (
    HERE,
    SAY_WHAT_IS_LEFT,
    SMALL,
    gpu,
    log_lines,
    logged_losses,
    make_checkpoint,
    rel,
    run_script,
    said,
    same_end,
    state,
    steps_done,
    torchrun,
    until,
    weights,
    write_dataset,
    write_picture,
)
from PIL import Image

import checkpoint as ckpt
import dataset
import files
import model as m
from batches import Batches
from loss import TrainingLoss
from model import DiT, DiTConfig
from muon import Muon

TINY_NETWORK = SMALL[:3]
linux = pytest.mark.skipif(sys.platform != "linux", reason="stops, kills and limits as Linux does")


def train(*arguments):
    return run_script("train.py", *SMALL, *arguments)


def loss_lines(name):
    return [line for line in log_lines(name) if "loss" in line]


def read_picture(path):
    return np.asarray(Image.open(path))


def edited_train(folder, old, new):
    """A copy of train.py in which the line `old` has become `new`. Returns its path."""
    with open(os.path.join(HERE, "train.py")) as f:
        script = f.read()
    assert script.count(old) == 1
    path = folder / "train.py"
    path.write_text(script.replace(old, new))
    return str(path)


# ---- a whole run ---------------------------------------------------------------------------------


def test_train_end_to_end(folder, capsys):
    """Files, logs, EMAs against their closed form, and a run in three pieces that equals one in one
    piece."""
    states = []
    for steps in (1, 2, 4):
        assert train("--name=pieces", f"--steps={steps}") is None
        states.append(state("pieces"))
    assert "from step 2" in capsys.readouterr().out
    # As if the run had been stopped between state and picture:
    os.replace("out/pieces/samples_4.png", "drawn.png")
    assert train("--name=pieces", "--steps=4") is None
    assert (read_picture("out/pieces/samples_4.png") == read_picture("drawn.png")).all()
    assert train("--name=whole", "--steps=4") is None
    for key, value in state("whole").items():
        assert (value == states[-1][key]).all(), key

    torch.manual_seed(0)
    data = dict(input_size=8, in_channels=1, num_classes=10)
    start = DiT(DiTConfig.named("tiny", hidden_size=32, depth=1, **data))
    parameters = {}
    for key, p in start.named_parameters():
        if p.requires_grad:
            parameters[key] = p.detach().double()
    for kind, rate in (("target", 0.99), ("eval", 0.995)):
        for key, theta0 in parameters.items():
            theta1 = states[0][f"model.{key}"].double()
            theta2 = states[1][f"model.{key}"].double()
            expected = rate**2 * theta0 + (1 - rate) * (rate * theta1 + theta2)
            assert (states[1][f"{kind}.{key}"].double() - expected).abs().max() < 1e-6, key
    shipped = ckpt.load_tensors("out/whole/ckpt.safetensors")[0]
    evaluated = weights(states[-1], "eval")
    assert all((shipped[key] == value).all() for key, value in evaluated.items())

    with open("out/whole/log.jsonl") as f:
        lines = [json.loads(line) for line in f]
    assert lines[0]["config"]["batch_size"] == 8
    assert lines[0]["commit"]
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3, 4]
    assert all(len(line["terminal_by_time"]) == 4 for line in losses)
    assert all(len(line["fm_by_time"]) == 4 for line in losses)
    assert [line["nfe"] for line in lines if "nfe" in line] == ["real", 1, 2, 4]
    for name in ("samples_4.png", "curve.png"):
        assert Image.open(f"out/whole/{name}").size[0] > 300
    about = m.load_model("out/whole/ckpt.safetensors")[1]
    assert about["step"] == 4
    assert about["data"]["name"] == "digits"
    assert about["guidance"]["w"] == 1.25
    assert run_script("sample.py", "out/whole/ckpt.safetensors") is None

    # A network cannot be continued as another one:
    complaint = train("--name=whole", "--hidden_size=64", "--change=hidden_size")
    assert "is of another network" in complaint
    assert "--init_partly=True" in complaint

    # A crash in the middle of a line of the log:
    with open("out/whole/log.jsonl", "a") as f:
        f.write('{"step": 3, "lo')
    assert train("--name=whole", "--steps=5") is None
    with open("out/whole/log.jsonl") as f:
        lines = f.readlines()
    assert [line for line in lines if not line.endswith("}\n")] == ['{"step": 3, "lo\n']
    assert json.loads(lines[-1])["nfe"] == 4


def test_unlabelled_data(folder):
    for i in range(12):
        write_picture(folder / "src" / f"{i}.png", colour=(20 * i, 100, 0))
    prepare = ("folder", "src", "--size", 8, "--name", "plain", "--held-out", 0.25)
    assert run_script("prepare.py", *prepare) is None
    assert train("--dataset=plain", "--steps=2", "--w=1") is None
    assert run_script("sample.py", "out/plain/ckpt.safetensors") is None
    assert "nothing to guide" in train("--dataset=plain", "--w=2", "--name=w")


def test_batches(folder, monkeypatch):
    """Images and labels are those of one seeded permutation an epoch, wherever a run was cut."""
    seen = []

    class Spy(TrainingLoss):
        def forward(self, x0, y, *draws, **options):
            seen.append((x0, y))
            return super().forward(x0, y, *draws, **options)

    monkeypatch.setattr("loss.TrainingLoss", Spy)
    flags = (*TINY_NETWORK, "--batch_size=600", "--micro_batch=300", "--score_images=2")
    for steps in (2, 5):
        assert run_script("train.py", f"--steps={steps}", *flags) is None
    data = dataset.load_dataset("data/digits")[1]
    epochs = [np.random.default_rng([0, epoch]).permutation(1437) for epoch in range(3)]
    order = np.concatenate(epochs)[:3000]
    x0 = torch.cat([images for images, _ in seen])
    y = torch.cat([labels for _, labels in seen])
    assert torch.equal(y, torch.from_numpy(data["train_labels"][order]))
    expected = torch.from_numpy(data["train_images"][order])
    assert torch.equal(x0, (expected - torch.tensor(127.5)) / 127.5)
    assert isinstance(data["train_images"], np.memmap)


def test_batches_come_in_order(folder):
    """From any step on. Another step than the next one is an error, not another step's batch."""
    assert run_script("prepare.py", "digits") is None
    header, data = dataset.load_dataset("data/digits")
    batches = Batches(header, data, 0, 4, steps=7, device=torch.device("cpu"), rank=0, ranks=1)
    x0, y = batches.get(2)
    assert (x0.dtype, x0.shape, y.dtype, y.shape) == (torch.uint8, (4, 1, 8, 8), torch.int64, (4,))
    for wrong in (2, 7, 0):
        with pytest.raises(ValueError, match=f"step {wrong} of 7 is not the next one, 3"):
            batches.get(wrong)
    for step in (3, 4, 5, 6):
        x0, _ = batches.get(step)
        assert torch.equal(x0, torch.from_numpy(data["train_images"][batches.indices(step)]))
    with pytest.raises(ValueError, match="step 7 of 7 is not the next one"):
        batches.get(7)


class SlowImages:
    """Training images on a disk that takes a second for each batch, and breaks at the sixth.

    It waits until the steps before the batch are in the log, except for the first three batches,
    which are read ahead of a slow first step.
    """

    def __init__(self, images):
        self.images = images
        self.reads = 0

    def __getitem__(self, rows):
        self.reads += 1
        if self.reads > 3:
            until(lambda: len(log_lines("digits")) >= self.reads, "the step before")
        time.sleep(1)
        if self.reads > 5:
            raise OSError("the disk is gone")
        return self.images[rows]


def test_slow_and_broken_data(folder, monkeypatch):
    """The time spent waiting is in the log. What goes wrong in the thread that reads is raised in
    the loop."""
    load_dataset = dataset.load_dataset

    def load_slow(path):
        header, data = load_dataset(path)
        return header, {**data, "train_images": SlowImages(data["train_images"])}

    monkeypatch.setattr(dataset, "load_dataset", load_slow)
    assert "the disk is gone" in train()
    waits = [line["data_wait"] for line in loss_lines("digits")]
    assert len(waits) == 5
    assert all(0.3 < wait < 1 for wait in waits[3:])


# ---- the constants -------------------------------------------------------------------------------


def test_constants_reach_their_places(folder, monkeypatch):
    """The objective's and the optimizer's. Terms are logged by quarters of their own times. Noise
    differs by seed, step and micro-batch."""
    objectives = []
    targets = []
    optimizers = []
    noises = []
    terms = []
    AdamW = torch.optim.AdamW

    class Spy(TrainingLoss):
        def __init__(self, model, target, **options):
            objectives.append(options)
            targets.append(target)
            super().__init__(model, target, **options)

        def forward(self, x0, y, noise, *draws, **options):
            noises.append(noise)
            loss, found = super().forward(x0, y, noise, *draws, **options)
            terms.append(found)
            return loss, found

    def spied_adamw(parameters, lr, betas, eps, weight_decay=0.01, **options):
        optimizers.append((lr, betas, eps, weight_decay))
        return AdamW(parameters, lr, betas, eps, weight_decay, **options)

    monkeypatch.setattr("loss.TrainingLoss", Spy)
    monkeypatch.setattr(torch.optim, "AdamW", spied_adamw)
    flags = (*TINY_NETWORK, "--batch_size=600", "--micro_batch=300", "--score_images=2")
    flags += ("--detach_jvp=True", "--label_dropout=0.3", "--lr=0.001")
    flags += ("--beta1=0.8", "--beta2=0.7", "--eps=1e-6", "--weight_decay=0.5")
    assert run_script("train.py", "--steps=2", *flags) is None
    assert optimizers[0] == (1e-3, (0.8, 0.7), 1e-6, 0.5)
    expected = dict(label_dropout=0.3, detach_jvp=True, objective="tvm")
    assert expected.items() <= objectives[0].items()
    # The average is no function of the weights to autograd, which would keep all steps in memory.
    assert not any(p.requires_grad for p in targets[0].parameters())
    line = loss_lines("digits")[-1]
    for name in ("terminal", "fm"):
        error = torch.cat([found[name].error for found in terms]).double()
        where = torch.cat([found[name].time for found in terms]).double()
        quarters = (where * 4).long().clamp(max=3)
        for quarter, mean in enumerate(line[f"{name}_by_time"]):
            assert abs(error[quarters == quarter].mean() / mean - 1) < 1e-5
    assert run_script("train.py", "--steps=1", "--name=other", "--seed=1", *flags) is None
    assert len({noise[0].sum().item() for noise in noises}) == 6
    for objective, name in (("meanflow", "kappa"), ("alpha_flow", "alpha_min")):
        flags = (f"--objective={objective}", f"--{name}=0.25", f"--name={objective}")
        assert train("--steps=1", "--score_images=2", *flags) is None
        assert objectives[-1][name] == 0.25


def test_warmup(folder, monkeypatch):
    """The learning rate rises in equal steps to lr, also where a run is cut, and then stays."""
    rates = []

    class Spy(torch.optim.AdamW):
        def step(self):
            rates.extend(group["lr"] for group in self.param_groups)
            return super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    for steps in (3, 6):
        assert train(f"--steps={steps}", "--warmup=4", "--lr=0.008") is None
    assert rates == [0.002, 0.004, 0.006, 0.008, 0.008, 0.008]
    rates.clear()
    assert train("--name=without", "--steps=2", "--lr=0.008") is None
    assert rates == [0.008, 0.008]


def test_warmup_with_muon(folder, monkeypatch):
    """Each optimizer's rate rises to its own, also where a run is cut, and then stays."""
    rates = {torch.optim.AdamW: [], Muon: []}

    def spied(optimizer):
        class Spy(optimizer):
            def step(self):
                rates[optimizer].extend(group["lr"] for group in self.param_groups)
                return super().step()

        return Spy

    monkeypatch.setattr(torch.optim, "AdamW", spied(torch.optim.AdamW))
    monkeypatch.setattr("muon.Muon", spied(Muon))
    for steps in (3, 6):
        assert train(f"--steps={steps}", "--warmup=4", "--lr=0.008", "--muon_lr=0.08") is None
    adamw, muon = rates.values()
    shares = [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]
    assert adamw == pytest.approx([0.008 * share for share in shares], rel=1e-12)
    assert muon == pytest.approx([0.08 * share for share in shares], rel=1e-12)


def run_in_two(name, *flags):
    """A run of four steps, and one that goes on from the second step's state: the same end."""
    flags = (*flags, "--steps=4", "--save_every=2", "--score_images=2")
    assert train(f"--name={name}", *flags) is None
    os.makedirs(f"out/{name}-cut")
    shutil.copy(f"out/{name}/state_2.safetensors", f"out/{name}-cut")
    assert train(f"--name={name}-cut", *flags) is None
    assert log_lines(f"{name}-cut")[0]["step"] == 2
    ends = [ckpt.load_newest(f"out/{folder}") for folder in (name, f"{name}-cut")]
    (_, one, _), (_, other, _) = ends
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    return one


def test_muon_goes_on(folder):
    """Bit by bit. The blocks' matrices have a momentum, all other weights AdamW's moments."""
    kept = weights(run_in_two("muon", "--muon_lr=0.01"), "optimizer")
    momenta = [key for key in kept if key.endswith(".momentum_buffer")]
    assert len(momenta) == 5
    for key in momenta:
        assert key.startswith("blocks.0.")
        assert key.replace("momentum_buffer", "exp_avg") not in kept
    assert "blocks.0.attn.qkv.bias.exp_avg" in kept
    without = train("--name=muon", "--steps=6", "--change=muon_lr")
    assert "was trained by Muon: go on with --muon_lr=0.01" in without


def test_alpha_flow_goes_on(folder, monkeypatch):
    """alpha is a function of the share of the steps that is over, and of nothing else."""
    progresses = []

    class Spy(TrainingLoss):
        def draw(self, x0, seed, first, total, progress):
            progresses.append(progress)
            return super().draw(x0, seed, first, total, progress)

    monkeypatch.setattr("loss.TrainingLoss", Spy)
    flags = ("--objective=alpha_flow", "--times=two", "--scaled=False", "--p_equal=0.25")
    run_in_two("alpha", *flags, "--alpha_min=0.1")
    assert progresses == [0, 0.25, 0.5, 0.75, 0.5, 0.75]
    assert loss_lines("alpha")[0]["loss"] == loss_lines("alpha")[0]["alpha_flow"]


def test_meanflow_with_other_constants_warns(folder, capsys):
    own = ("--times=two", "--p_equal=0.75", "--scaled=False")
    for name in ("meanflow", "improved_meanflow"):
        assert train(f"--objective={name}", f"--name={name}", "--steps=1") is None
        said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert said == [
            "warning: MeanFlow's own constants are --times=two --p_equal=0.75 --scaled=False, "
            "not --times=gap* --p_equal=0.0 --scaled=True"
        ]
    for name, flags in (("b", ("--objective=meanflow", *own)), ("c", ("--objective=tvm",))):
        assert train(f"--name={name}", "--steps=1", *flags) is None
        assert "warning" not in capsys.readouterr().err
    # The terms of an objective are logged by its names.
    (line,) = loss_lines("b")
    assert line["loss"] == line["meanflow"]
    assert len(line["meanflow_by_time"]) == 4
    assert "fm" not in line


def test_a_run_that_blows_up_stops(folder):
    """The first update puts the weights near +-1e30. From then on no gradient is finite, and
    nothing is updated."""
    complaint = train("--steps=20", "--save_every=2", "--lr=1e30")
    assert "not finite in 10 steps in a row" in complaint
    assert "no state was saved yet" in complaint  # and nothing bad either
    assert all(math.isfinite(loss) for loss in logged_losses("digits"))
    assert not ckpt.states("out/digits")
    # The end of a run is saved all the same.
    assert train("--name=short", "--steps=8", "--lr=1e30", "--score_images=2") is None
    assert all(value.isfinite().all() for value in state("short").values())
    # A state that is not finite is never saved.
    complaint = train("--name=big", "--steps=8", "--save_every=1", "--lr=1e38")
    assert "the state of step 1 is not finite; no state was saved yet" in complaint


def test_a_run_that_only_skips(folder):
    """It says so, in its log too, and its exit code is not 0."""
    assert train("--name=a", "--steps=1") is None
    tensors, about = ckpt.load_tensors("out/a/ckpt.safetensors")
    ckpt.save_tensors("large.safetensors", {name: 1e30 * t for name, t in tensors.items()}, about)
    complaint = train("--name=b", "--steps=4", "--init_from=large.safetensors")
    assert "nothing was learned: the loss or its gradient was not finite in all 4 step" in complaint
    with open("out/b/log.jsonl") as f:
        skipped = [line["skipped"] for line in map(json.loads, f) if "skipped" in line]
    assert skipped == [1, 2, 3, 4]
    assert not ckpt.states("out/b")  # the same command does not take it for a run that went well


# ---- what is refused -----------------------------------------------------------------------------


def test_train_refuses(folder):
    assert "no data in" in train("--dataset=nowhere")
    assert "not divisible by micro_batch" in train("--batch_size=8", "--micro_batch=3")
    assert "not divisible by patch_size" in train("--patch_size=3")
    assert "at least 0.001" in train("--w=0.0")
    assert "p_equal" in train("--p_equal=1.5")
    for flag in ("--name=../x", "--name=..", "--dataset=a/b"):
        value = flag.split("=")[1]
        refused = f"the run's name '{value}' must be a plain folder name without \"/\""
        assert refused in train(flag)
    assert "label_dropout must be above 0" in train("--label_dropout=0")
    drawn = ("--guidance=inverse", "--w_max=2")
    assert "label_dropout must be above 0" in train("--label_dropout=0", *drawn)
    assert "data/digits holds pixels" in train("--vae=x")
    assert "vae_files is for latents" in train("--vae_files=x")
    assert "which are both 1" in train("--guidance=uniform")
    assert "--w_max has no effect" in train("--w_max=2")
    assert "--mu has no effect" in train("--times=two", "--mu=1")
    assert "bfloat16_sums is for GPUs" in train("--bfloat16_sums=True", "--device=cpu")
    assert "compile is for GPUs" in train("--compile=True", "--device=cpu")
    assert "cannot be printed" in train("--name=caf\udce9")
    write_dataset("video", (1, 4, 8, 8))
    assert "takes images (C, H, W), not (1, 4, 8, 8)" in train(
        "--dataset=video", "--classifier=cnn"
    )
    assert "one side or two, not (4, 8, 8)" in train("--dataset=video")
    write_dataset("cubes", (1, 8, 8, 8))
    assert "one side or two, not (8, 8, 8)" in train("--dataset=cubes")
    assert not os.path.exists("out")


def test_a_trained_network_is_not_replaced(folder):
    """Where its states are gone, nothing goes on from it; but nothing replaces it either."""
    assert train("--steps=1", "--name=kept") is None
    for path in ckpt.states("out/kept").values():
        os.remove(path)
    before = open("out/kept/ckpt.safetensors", "rb").read()
    assert "no state to go on from" in train("--steps=2", "--name=kept")
    assert open("out/kept/ckpt.safetensors", "rb").read() == before


def test_train_refuses_broken_data(folder):
    assert run_script("prepare.py", "digits") is None
    labels = np.load("data/digits/train_labels.npy")
    np.save("data/digits/train_labels.npy", labels + 5)
    assert "a label outside 0 to 9" in train()
    np.save("data/digits/train_labels.npy", labels[:-1])
    assert "its header says" in train()
    np.save("data/digits/train_labels.npy", labels)
    with open("data/digits/train_images.npy", "rb+") as f:
        f.truncate(5000)
    assert "cannot read" in train()
    assert run_script("prepare.py", "digits", "--overwrite") is None
    with open("data/digits/header.json") as f:
        header = json.load(f)
    without = {key: value for key, value in header.items() if key != "count"}
    for wrong, words in (
        (dict(header, format="other"), "not a tvm-data-1 header"),
        (without, "no count"),
        ([1], "not a tvm-data-1 header"),
        (dict(header, dtype="float32"), "its header says float32"),
        (dict(header, shape=[1, 4, 4]), "(1437, 1, 4, 4)"),
        (dict(header, count=dict(train=1438, test=360)), "its header says"),
        (dict(header, count=dict(train=5)), "count"),
        (dict(header, mean=[1, 2]), "mean [1, 2]"),
        (dict(header, std=[0]), "std"),
        (dict(header, class_counts=[1]), "class_counts"),
        (dict(header, shape=[64]), "shape"),
    ):
        with open("data/digits/header.json", "w") as f:
            json.dump(wrong, f)
        assert words in train()
    os.remove("data/digits/header.json")
    assert "no data in" in train()
    assert not os.path.exists("out")


# ---- kills and signals ---------------------------------------------------------------------------


EVERY = 10  # steps from save to save
PARTIAL = "out/hurt/*.tvm-partial"


def newest_state():
    """(step, path) of the run that is hurt; (0, None) where there is none yet."""
    saved = ckpt.states("out/hurt") if os.path.exists("out/hurt") else {}
    return list(saved.items())[-1] if saved else (0, None)


def is_stopped(pid):
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rsplit(")")[-1].split()[0] == "T"


def stop_inside_a_save(process):
    """Stop a process while it writes a file aside."""
    while True:
        until(lambda: glob.glob(PARTIAL), "a save")
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: is_stopped(process.pid), "a stop")
        if glob.glob(PARTIAL):
            return
        os.kill(process.pid, signal.SIGCONT)


def fill_the_disk(process, resource):
    """Let a save find no room, and the next one room again."""
    everything = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
    until(lambda: "could not write state_" in said(), "a full disk")
    before, path = newest_state()
    assert ckpt.load_tensors(path)
    assert not glob.glob(PARTIAL)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, everything)
    until(lambda: newest_state()[0] > before, "a save after the full disk")


def flip_a_bit(path, dice):
    with open(path, "rb+") as f:
        size = f.seek(0, os.SEEK_END)
        place = dice.randrange(size)
        f.seek(place)
        byte = f.read(1)[0]
        f.seek(place)
        f.write(bytes([byte ^ 1 << dice.randrange(8)]))


def cut_off(path, dice):
    with open(path, "rb+") as f:
        size = f.seek(0, os.SEEK_END)
        f.truncate(dice.randrange(size))


def steps_repeated(name):
    """At each start of a run, how many steps its log has already seen."""
    repeated = []
    last = 0
    for line in log_lines(name):
        if "config" in line:
            repeated.append(last - line["step"])
            last = line["step"]
        elif "loss" in line:
            last = line["step"]
    return repeated


@linux
def test_torture(start):
    """Ten kills, some inside a save, a flipped bit, a truncated file and a full disk against an
    undisturbed run."""
    import resource

    arguments = (*SMALL, "--steps=280", f"--save_every={EVERY}")
    run_script("prepare.py", "digits")
    whole = start("--name=whole", *arguments)
    whole.join()
    assert whole.exitcode == 0, said()

    dice = random.Random(0)
    inside = 0
    for kill in range(10):
        at = newest_state()[0]
        process = start("--name=hurt", *arguments)
        if kill in (4, 6):  # after which the newest state is damaged
            until(lambda: len(ckpt.states("out/hurt")) == 2, "two states")
        if kill == 8:
            until(lambda: newest_state()[0] > at, "a save")  # noqa: B023
            fill_the_disk(process, resource)
        if kill % 3 == 0:
            goal = at + EVERY * dice.randrange(2)
            until(lambda: newest_state()[0] >= goal, "a state")  # noqa: B023
            stop_inside_a_save(process)
            inside += 1
        else:
            goal = at + dice.randrange(5, 30)
            moment = time.monotonic() + (60 if kill % 3 == 1 else dice.random())
            while steps_done("hurt") < goal and time.monotonic() <= moment:
                time.sleep(0.001)
            time.sleep(0.02 * dice.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, said()
        if kill == 4:
            flip_a_bit(newest_state()[1], dice)
        if kill == 6:
            cut_off(newest_state()[1], dice)
    last = start("--name=hurt", *arguments)
    last.join()
    assert last.exitcode == 0, said()

    same_end("hurt", "whole")
    assert inside == 4
    assert said().count("is damaged") >= 2
    assert not glob.glob(PARTIAL)
    repeated = steps_repeated("hurt")
    assert max(repeated) <= 2 * EVERY, f"{repeated}"
    assert sum(n > EVERY for n in repeated) <= 2, f"{repeated}"
    print(f"steps repeated at each start: {repeated}")


@linux
def test_signals(start):
    """The first ends the run after its step and a save, also where it comes twice at once. A later
    one ends it now."""
    run_script("prepare.py", "digits")
    whole = start("--name=whole", "--steps=40", *SMALL)
    whole.join()
    arguments = (*SMALL, "--steps=40", "--name=asked")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)):
        process = start(*arguments)
        at = steps_done("asked")
        until(lambda: steps_done("asked") > at + 3, "steps")  # noqa: B023
        os.kill(process.pid, number)
        os.kill(process.pid, number)
        process.join()
        stopped = steps_done("asked")
        assert process.exitcode == code
        assert at < stopped < 40
        assert f"stopped after step {stopped}," in said()
        assert list(ckpt.states("out/asked"))[-1] == stopped
    process = start(*arguments)
    process.join()
    assert process.exitcode == 0
    same_end("asked", "whole")

    # A step that takes long:
    process = start("--name=now", *TINY_NETWORK, "--batch_size=16384", "--micro_batch=16")
    until(lambda: log_lines("now"), "a start")
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(2.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(5)
    assert process.exitcode == 143
    assert not ckpt.states("out/now")


# ---- ranks ---------------------------------------------------------------------------------------


def test_one_rank_of_torchrun(folder):
    """It runs what several ranks run, and learns what a process without torchrun learns. At the end
    it leaves the group of ranks, and gloo's threads end."""
    old = "distributed = dist.is_initialized()"
    new = "print('distributed:', dist.is_initialized())\n" + SAY_WHAT_IS_LEFT + old
    script = edited_train(folder, old, new)
    arguments = (*SMALL, "--steps=4", "--micro_batch=4", "--device=cpu")
    assert run_script("train.py", "--name=plain", *arguments) is None
    done = torchrun(script, "--name=ranks", *arguments, ranks=1)
    printed = done.stdout.decode()
    assert "distributed: True" in printed
    assert "at exit: False 0" in printed
    same_end("ranks", "plain")


def test_averages_are_in_eval_mode(folder):
    """Dropout, in a fork, is for the model alone: sample.py and pictures have none."""
    old = 'nets = {"model": model, "target": target, "eval": evaluated}\n'
    new = old + "assert [net.training for net in nets.values()] == [True, False, False]\n"
    script = edited_train(folder, old, new)
    after = "stop_request.restore()\n"
    with open(script) as f:
        text = f.read()
    assert text.count(after) == 1
    with open(script, "w") as f:
        f.write(text.replace(after, after + new.removeprefix(old)))
    assert run_script(script, *SMALL, "--steps=2", "--sample_every=1") is None


@gpu
@pytest.mark.parametrize("graph", [False, True])
def test_gpu_ddp_one_rank(folder, graph):
    """The same in float32 on a GPU, with NCCL, and as CUDA graphs."""
    old = "has_bfloat16, has_triton = abilities(device)\n"
    script = edited_train(folder, old, old + "has_bfloat16 = False\n")
    arguments = (*SMALL, "--steps=15", "--micro_batch=2", f"--graph={graph}")
    assert run_script(script, "--name=plain", *arguments) is None
    done = torchrun(script, "--name=ranks", *arguments, ranks=1)
    assert "stream does not match" not in done.stderr.decode()  # as autograd would warn
    pairs = zip(logged_losses("plain"), logged_losses("ranks"), strict=True)
    differences = [abs(a / b - 1) for a, b in pairs]
    assert len(differences) == 15
    plain, ranks = weights(state("plain"), "model"), weights(state("ranks"), "model")
    errors = {name: rel(ranks[name], plain[name]) for name in plain}
    print("largest relative differences: losses", max(differences), "weights", max(errors.values()))
    assert max(differences) < 1e-5
    for name, error in errors.items():
        assert error < 1e-5, name


@gpu
def test_gpu_ddp_bfloat16_sums(folder):
    """In a CUDA graph, gradients that travel as bfloat16 are rounded, and no more."""
    arguments = (*SMALL, "--steps=15", "--micro_batch=2")
    assert run_script("train.py", "--name=plain", *arguments) is None
    torchrun("train.py", "--name=ranks", "--bfloat16_sums=True", *arguments, ranks=1)
    losses, rounded = logged_losses("plain"), logged_losses("ranks")
    assert losses != rounded
    assert max(abs(a / b - 1) for a, b in zip(losses, rounded, strict=True)) < 1e-2


def test_two_ranks_have_the_gradients_of_one(folder, two_ranks):
    """After one step of AdamW its first moment is (1 - beta1) times the gradient."""
    make_checkpoint("start.safetensors", depth=1)
    arguments = ("--steps=1", "--init_from=start.safetensors", "--beta1=0.0")
    assert train("--name=one", *arguments) is None
    assert train("--name=micro", "--micro_batch=2", *arguments) is None
    assert two_ranks("train.py", *SMALL, "--name=two", *arguments) == [0, 0], said()
    one = state("one")
    keys = [key for key in one if key.endswith("exp_avg")]
    whole = torch.cat([one[key].flatten() for key in keys]).norm()
    assert len(keys) > 20
    assert whole > 0
    clip = f"--grad_clip={whole / 2}"
    assert train("--name=clipped", "--micro_batch=2", clip, *arguments) is None
    clipped = state("clipped")
    for key in keys:
        bound = 1e-5 * one[key].norm() + 1e-6 * whole
        assert (2 * clipped[key] - one[key]).norm() <= bound, key
    two = state("two")
    for other in (state("micro"), two):
        for key in keys:
            bound = 1e-5 * one[key].norm() + 1e-7 * whole
            assert (other[key] - one[key]).norm() <= bound, key
    key = "target.final_layer.linear.weight"
    assert (two[key] - one[key]).norm() < 1e-6


def test_muon_on_two_ranks(folder, two_ranks):
    """They stay together, and learn what one process learns but for bfloat16's rounding."""
    arguments = (*SMALL, "--steps=6", "--muon_lr=0.01")
    assert run_script("train.py", "--name=one", *arguments) is None
    assert two_ranks("train.py", "--name=two", *arguments) == [0, 0], said()
    pairs = zip(logged_losses("one"), logged_losses("two"), strict=True)
    assert max(abs(a / b - 1) for a, b in pairs) < 1e-3
    assert two_ranks("train.py", "--name=parts", "--shard=True", *arguments) == [1, 1]
    assert "add --muon_lr=0, or leave shard out" in said()


def test_two_ranks_have_the_losses_of_one(folder, two_ranks):
    """In float32, with a loss that is not finite in one sample on the last rank: all ranks skip
    that step, and say so."""
    make_checkpoint("start.safetensors", depth=1)
    old = "        losses.add(terms)\n"
    new = (
        "        if (step, rank, first + micro_batch) == (3, ranks - 1, local_batch):\n"
        "            terms['fm'].error[-1] = math.inf\n"
    )
    script = edited_train(folder, old, new + old)
    arguments = (*SMALL, "--steps=8", "--init_from=start.safetensors")
    assert run_script(script, "--name=one", "--micro_batch=4", *arguments) is None
    one = loss_lines("one")
    assert [line["step"] for line in one] == [1, 2, 3, 5, 6, 7, 8]
    assert one[-1]["skipped"] == 1
    for micro_batch in (0, 2):
        name = f"two-{micro_batch}"
        flags = (f"--name={name}", f"--micro_batch={micro_batch}")
        assert two_ranks(script, *flags, *arguments) == [0, 0], said()
        two = loss_lines(name)
        assert [line["step"] for line in two] == [1, 2, 3, 5, 6, 7, 8]
        assert all(abs(a["loss"] / b["loss"] - 1) < 1e-6 for a, b in zip(one, two))
        assert two[-1]["skipped"] == 1


def test_ranks_that_come_apart_are_noticed(folder, two_ranks):
    """And the time for which the slowest rank has waited is the one that is logged."""
    old = "    losses.begin_step()\n"
    new = (
        "    weight = parameters['blocks.0.attn.qkv.weight'].data\n"
        "    if step == 2:\n"
        "        weight += 1e-3 * rank * weight.std() * torch.randn_like(weight)\n"
        "    batches.waited += 1000 * rank\n"
    )
    script = edited_train(folder, old, old + new)
    assert two_ranks(script, *SMALL, "--steps=8") == [1, 1]
    assert "the ranks' weights have come apart before step 3" in said()
    lines = loss_lines("digits")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["data_wait"] > 1 for line in lines)


def launch(restarts):
    """train.py under torchrun on two ranks, for as long as it is let."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [f"--max_restarts={restarts}", os.path.join(HERE, "train.py"), *SMALL]
    command += ["--steps=100000", "--save_every=10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open("said", "a") as f:
        return subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=environment)


def ranks_of(torchrun):
    with open(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children") as f:
        return [int(pid) for pid in f.read().split()]


def starts():
    """The steps from which the processes of the run went on."""
    return [line["step"] for line in log_lines("digits") if "config" in line]


@linux
def test_ranks_end_together(folder):
    """A killed rank: torchrun starts all of them again, and without restarts left ends with an
    error. A killed torchrun: the ranks, left alone, save at one step and end, which lets go of the
    lock."""
    process = launch(restarts=1)
    try:
        until(lambda: steps_done("digits") > 12, "steps")
        os.kill(ranks_of(process)[-1], signal.SIGKILL)
        until(lambda: len(starts()) == 2, "a restart")
        until(lambda: steps_done("digits") > starts()[1] + 2, "steps")
        process.kill()
        process.wait()
        files.hold("out/digits", 20).close()  # waits for it
        stopped = steps_done("digits")
        assert list(ckpt.states("out/digits"))[-1] == stopped
        assert f"stopped after step {stopped}," in said()

        process = launch(restarts=0)
        until(lambda: steps_done("digits") > stopped + 2, "steps")
        os.kill(ranks_of(process)[-1], signal.SIGKILL)
        assert process.wait(20) != 0
        assert "Signal 9 (SIGKILL)" in said()
        first, restarted, last = starts()
        assert first == 0
        assert restarted >= 10
        assert restarted % 10 == 0
        assert last == stopped
    finally:
        process.terminate()
        process.wait()
