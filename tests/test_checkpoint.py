"""checkpoint.py: files that notice damage, the states of a run, weights to begin with."""

import json
import os
import random
import shutil
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import (
    SMALL,
    make_checkpoint,
    randn,
    random_model,
    run_script,
    state,
    train_config,
    weights,
    write_dataset,
)

import checkpoint as ckpt
import files
import model
from header import load_header
from model import DiT, DiTConfig, positions

ABOUT = dict(
    config={},
    guidance=dict(sampler="constant", w=1, w_min=1, w_max=1),
    data=dict(class_counts=[], mean=[], std=[]),
)


def train(*arguments):
    return run_script("train.py", *SMALL, *arguments)


def write(path, content):
    with open(path, "wb") as f:
        f.write(content)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- one file ------------------------------------------------------------------------------------


def test_checkpoints_notice_damage(folder):
    """Whatever bit is flipped, wherever the file ends: what is loaded is what was written, or
    nothing is."""
    tensors = {
        "a": randn(3, 5),
        "b": torch.tensor(7.0),
        "half": randn(2, 2).bfloat16(),
        "c": randn(4, 3).t(),
        "none": torch.zeros(0, 2),
    }
    ckpt.save_tensors("x", tensors, ABOUT)
    with open("x", "rb") as f:
        whole = f.read()
    for loaded in (ckpt.load_tensors("x")[0], safetensors.torch.load_file("x")):
        assert equal(loaded, tensors)

    dice = random.Random(0)
    damaged = 0
    for place in range(len(whole)):
        flipped = whole[place] ^ (1 << dice.randrange(8))
        write("x", whole[:place] + bytes([flipped]) + whole[place + 1 :])
        try:
            loaded, about = ckpt.load_tensors("x")
        except ckpt.Damaged:
            damaged += 1
        else:
            assert about == ABOUT
            assert all(torch.equal(loaded[key], value) for key, value in tensors.items())
    # A file may have no checksum: its first bytes may be others.
    assert damaged >= len(whole) - len(ckpt.START)

    for size in range(0, len(whole), 7):
        write("x", whole[:size])
        with pytest.raises(ckpt.Damaged):
            ckpt.load_tensors("x")


def test_dtypes(folder):
    """Those of whole numbers, too. A tensor of another dtype is named, and nothing is written."""
    tensors = {}
    for dtype in ckpt.DTYPES:
        tensors[str(dtype)] = torch.tensor([[0, 1], [1, 1]], dtype=dtype)
    ckpt.save_tensors("x", tensors, ABOUT)
    for loaded in (ckpt.load_tensors("x")[0], safetensors.torch.load_file("x")):
        assert equal(loaded, tensors)
        assert all(loaded[key].dtype == t.dtype for key, t in tensors.items())
    with pytest.raises(ValueError, match="the tensor 'a' is torch.complex64"):
        ckpt.save_tensors("y", {"a": torch.zeros(2, dtype=torch.complex64)}, ABOUT)
    assert os.listdir() == ["x"]


def test_headers_that_nobody_wrote(folder):
    """Each is one line, whatever stands in the file."""
    tensors = {"a": torch.zeros(2)}
    for tvm, words in (
        ("[" * 10**5, "not a whole safetensors file"),
        ("{", "not a whole safetensors file"),
        ("[1]", "no whole config, guidance, data"),
        ('{"config": 3}', "no whole config, guidance, data"),
        ('{"config": {}, "guidance": {"w": 1}, "data": []}', "no whole guidance, data"),
    ):
        safetensors.torch.save_file(tensors, "x", metadata={"tvm": tvm})
        with pytest.raises(files.CheckpointError, match=words):
            ckpt.load_tensors("x")
    for path, words in (("nowhere", "no checkpoint nowhere"), (".", "cannot read .")):
        with pytest.raises(files.CheckpointError, match=words):
            ckpt.load_tensors(path)


def test_a_folder_whose_name_is_not_utf_8(folder):
    """safetensors does not open it. That is said, and not that the file is damaged."""
    os.makedirs("caf\udce9")
    path = "caf\udce9/x.safetensors"
    ckpt.save_tensors(path, {"a": torch.zeros(2)}, ABOUT)
    with pytest.raises(files.CheckpointError, match="is not UTF-8, and safetensors opens") as error:
        ckpt.load_tensors(path)
    assert not isinstance(error.value, ckpt.Damaged)
    assert "is not UTF-8" in run_script("sample.py", path, "--n", 2)
    with pytest.raises(files.CheckpointError, match="no checkpoint"):
        ckpt.load_tensors("caf\udce9/y.safetensors")


# ---- states --------------------------------------------------------------------------------------


def test_states(folder, capsys):
    """The last ones are kept, a damaged one is passed over and then replaced, and it takes one
    whole one to go on."""
    assert ckpt.load_newest(".") is None
    assert ckpt.what_is_saved(".", 0) == "no state was saved yet"
    for step in (5, 90, 100):
        ckpt.save_state(".", step, {"a": torch.full((9,), float(step))}, ABOUT, keep=2)
    assert list(ckpt.states(".")) == [90, 100]
    assert ckpt.load_newest(".")[2]["step"] == 100
    with open("state_100.safetensors", "rb+") as f:
        f.truncate(200)
    path, tensors, _ = ckpt.load_newest(".")
    assert path == "./state_90.safetensors"
    assert (tensors["a"] == 90).all()
    assert capsys.readouterr().err.count("\n") == 1
    # What is left of a run that has loaded this state, and has not saved another.
    assert ckpt.what_is_saved(".", 90) == "the last state is ./state_90.safetensors"
    assert ckpt.what_is_saved(".", 0) == "no state was saved yet"
    ckpt.save_state(".", 95, tensors, ABOUT, keep=2)
    assert list(ckpt.states(".")) == [90, 95]
    assert ckpt.what_is_saved(".", 95).endswith("./state_95.safetensors")
    for path in ckpt.states(".").values():
        open(path, "w").close()
    with pytest.raises(files.CheckpointError, match="no state in . is whole"):
        ckpt.load_newest(".")


def test_a_state_stands_for_its_evaluation_network(folder):
    tensors = {"model.a": randn(1), "eval.a": randn(2), "eval.b.c": randn(3), "x": randn(4)}
    ckpt.save_tensors("x", tensors, ABOUT)
    found, about = ckpt.load_checkpoint("x")
    assert equal(found, {"a": tensors["eval.a"], "b.c": tensors["eval.b.c"]})
    assert about == ABOUT


def test_a_state_has_all_networks():
    """Whatever the tensors of a network are called."""
    nets = ("model", "target", "eval")
    tensors = {"model.a": randn(1), "target.a": randn(1), "eval.a": randn(1)}
    about = {**ABOUT, "train": {}, "step": 3}
    path = "state_3.safetensors"
    ckpt.check_run(path, tensors, about, nets)
    network = {"model.a": randn(1), "modelling": randn(1), "eval": randn(1)}  # a part named "model"
    with pytest.raises(files.CheckpointError, match=r"no target\.\*, eval\.\* in it"):
        ckpt.check_run(path, network, about, nets)
    for kind in nets:
        others = {name: t for name, t in tensors.items() if not name.startswith(kind)}
        with pytest.raises(files.CheckpointError, match=rf"no {kind}\.\* in it"):
            ckpt.check_run(path, others, about, nets)


class WithTable(DiT):
    """A network that has whole numbers among its tensors."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("table", torch.zeros(3, dtype=torch.int64))


def test_dtypes_of_a_network(folder, monkeypatch):
    """Floats become float32, and whole numbers stay what they are."""
    make_checkpoint("x.safetensors")
    tensors, about = ckpt.load_tensors("x.safetensors")
    tensors = {name: t.bfloat16() for name, t in tensors.items()}
    tensors["table"] = torch.tensor([1, 2, 2**60 + 1])
    ckpt.save_tensors("x.safetensors", tensors, about)
    monkeypatch.setattr(model, "DiT", WithTable)
    loaded = model.load_model("x.safetensors")[0].state_dict()
    assert torch.equal(loaded.pop("table"), tensors.pop("table"))
    assert equal(loaded, {name: t.float() for name, t in tensors.items()})
    assert all(t.dtype == torch.float32 for t in loaded.values())


def test_numbers_that_are_not_finite(folder):
    """No file of weights is used that has one."""
    make_checkpoint("x.safetensors")
    tensors, about = ckpt.load_tensors("x.safetensors")
    tensors["final_layer.linear.bias"][0] = float("nan")
    ckpt.save_tensors("nan.safetensors", tensors, about)
    wanted = "nan.safetensors: final_layer.linear.bias has numbers that are not finite"
    assert wanted in run_script("sample.py", "nan.safetensors", "--n", 2)
    assert wanted in train("--init_from=nan.safetensors", "--init_partly=True")


def test_images_of_another_shape_than_the_networks(folder):
    make_checkpoint("x.safetensors")
    tensors, about = ckpt.load_tensors("x.safetensors")
    about["data"]["shape"] = [3, 8, 8]
    ckpt.save_tensors("x.safetensors", tensors, about)
    complaint = run_script("sample.py", "x.safetensors", "--n", 2)
    assert "images of shape [3, 8, 8], and a network for [1, 8, 8]" in complaint
    without_sides = types.SimpleNamespace(in_channels=1, num_classes=10)
    about["data"]["shape"] = [1, 64]
    ckpt.check_about(without_sides, about)  # a fork's config, and its data


@pytest.mark.parametrize("objective", ["other", "", None, 3, ["tvm"]])
def test_an_objective_that_is_not_known(folder, objective):
    """How its network is sampled is not known either."""
    make_checkpoint("x.safetensors")
    tensors, about = ckpt.load_tensors("x.safetensors")
    assert "objective" not in about  # as in published snapshots
    assert run_script("sample.py", "x.safetensors", "--n", 2, "--out", "x.npz") is None
    about["objective"] = objective
    ckpt.save_tensors("x.safetensors", tensors, about)
    complaint = run_script("sample.py", "x.safetensors", "--n", 2)
    assert f"the objective {objective!r} is none of tvm, meanflow, " in complaint


@pytest.mark.parametrize("sides", [[8, 8, 8], [4, 8, 8], [8], []])
def test_images_have_two_sides(folder, sides):
    make_checkpoint("x.safetensors")
    tensors, about = ckpt.load_tensors("x.safetensors")
    about["config"]["input_size"] = sides
    ckpt.save_tensors("x.safetensors", tensors, about)
    complaint = run_script("sample.py", "x.safetensors", "--n", 2)
    assert f"input_size must be one side or two, not {tuple(sides)}" in complaint
    assert DiTConfig(input_size=(8, 8)).input_size == 8


# ---- continuing a run ----------------------------------------------------------------------------


def test_a_run_from_before_a_constant(folder, capsys):
    """What the old state does not know has today's value. What today's train.py does not know is
    gone. Both are said."""
    assert train("--steps=1") is None
    path = "out/digits/state_1.safetensors"
    tensors, about = ckpt.load_tensors(path)
    del about["train"]["warmup"]
    del about["train"]["kappa"]
    about["train"]["gone"] = 3
    ckpt.save_tensors(path, tensors, about)
    capsys.readouterr()
    assert train("--steps=2") is None
    said = capsys.readouterr().out
    assert f"{path} had these constants, which are no more: gone=3\n" in said
    lines = [line for line in said.splitlines() if "from before" in line]
    assert lines == [
        f"{path} is from before these constants, which have today's value: kappa=0.5, warmup=0"
    ]
    assert train("--steps=3") is None  # by now it knows them
    assert "from before" not in capsys.readouterr().out


def test_a_renamed_run(folder, capsys):
    assert train("--name=a", "--steps=1") is None
    os.rename("out/a", "out/b")
    assert train("--name=b", "--steps=2") is None
    assert "from step 1" in capsys.readouterr().out
    assert list(ckpt.states("out/b")) == [1, 2]


def test_a_preset_that_is_spelled_out(folder, capsys):
    """A run that began with --preset goes on with the same constants as flags, and back."""
    assert run_script("prepare.py", "shapes", "--n", 60, "--size", 8) is None
    common = (*SMALL, "--batch_size=4", "--classifier=1-nn", "--ema_eval=0.9")
    begun = ("--preset=shapes", "--name=x", "--steps=1")
    assert run_script("train.py", *begun, *common) is None
    flags = ("--dataset=shapes", "--name=x", "--steps=2", "--patch_size=4", "--lr=1e-3", "--w=2.0")
    flags += ("--mu_s=0.4",)
    assert run_script("train.py", *flags, *common) is None
    assert run_script("train.py", "--preset=shapes", "--name=x", "--steps=3", *common) is None
    assert "from step 2" in capsys.readouterr().out


def test_changes_on_purpose(folder, capsys):
    """--change allows what it names, once; the state then has the new value."""
    assert train("--steps=1") is None
    refused = train("--steps=2", "--lr=0.1", "--beta2=0.9")
    assert "beta2 0.95 -> 0.9" in refused
    assert "lr 0.003 -> 0.1" in refused
    assert "--change=" in refused
    refused = train("--steps=2", "--lr=0.1", "--beta2=0.9", "--change=lr")
    assert "beta2 0.95 -> 0.9" in refused
    assert "lr 0.003" not in refused
    assert "did you mean lr" in train("--steps=2", "--lr=0.1", "--change=lrr")
    before = state("digits")
    assert train("--steps=2", "--lr=0.1", "--weight_decay=0.5", "--change=lr,weight_decay") is None
    assert "from step 1" in capsys.readouterr().out
    assert train_config("digits")["lr"] == 0.003  # of the first line of the log
    after = state("digits")

    # AdamW by hand: what the new learning rate and weight decay make of the first state.
    name = "final_layer.linear.bias"
    first, second = (after[f"optimizer.{name}.exp_avg{kind}"] for kind in ("", "_sq"))
    direction = (first / (1 - 0.9**2)) / ((second / (1 - 0.95**2)).sqrt() + 1e-8)
    expected = before[f"model.{name}"] * (1 - 0.1 * 0.5) - 0.1 * direction
    assert (after[f"model.{name}"] - expected).abs().max() < 1e-5

    assert "lr 0.1 -> 0.003" in train("--steps=3", "--weight_decay=0.5")
    assert train("--steps=3", "--lr=0.1", "--weight_decay=0.5") is None


def test_runs_that_do_not_go_on(folder):
    assert train("--steps=2") is None
    assert "beyond steps 1" in train("--steps=1")
    assert "lr 0.003 -> 0.1" in train("--steps=2", "--lr=0.1")
    os.replace("out/digits/ckpt.safetensors", "out/digits/state_3.safetensors")
    assert "is not the state of a run" in train("--steps=4")
    os.remove("out/digits/state_3.safetensors")
    assert run_script("prepare.py", "digits", "--seed", 1, "--overwrite") is None
    assert "was trained on other data" in train("--steps=3")


def test_data_that_were_replaced(folder):
    """By other images, of which the header says the same but for their checksum; by the same ones;
    by the same ones as an older prepare.py has left them."""

    def write_images(seed):
        shutil.rmtree("data", ignore_errors=True)
        images = np.random.default_rng(seed).integers(0, 256, (32, 1, 8, 8), dtype=np.uint8)
        write_dataset("mm", (1, 8, 8), images=images)

    flags = ("--dataset=mm", "--score_images=0")
    write_images(0)
    assert train("--steps=1", *flags) is None
    write_images(1)
    assert "was trained on other data than data/mm holds now" in train("--steps=2", *flags)
    source = "--init_from=out/mm/ckpt.safetensors"
    assert train("--steps=1", "--name=tuned", source, *flags) is None
    write_images(0)
    assert train("--steps=2", *flags) is None
    header = load_header("data/mm")
    assert header.pop("train_crc32")
    with open("data/mm/header.json", "w") as f:
        json.dump(header, f)
    assert train("--steps=3", *flags) is None  # the state has a checksum, the data have none
    write_images(0)
    assert train("--steps=4", *flags) is None  # and the reverse


BIAS = "optimizer.final_layer.linear.bias."


@pytest.mark.parametrize(
    "key, value, words",
    [
        (f"{BIAS}exp_avg", torch.zeros(1), "exp_avg of final_layer.linear.bias that is"),
        (f"{BIAS}exp_avg", "float64", "that is torch.float64"),
        (f"{BIAS}step", torch.zeros(4), "a step of final_layer.linear.bias that is"),
        (f"{BIAS}exp_avg_sq", None, "has exp_avg, step of final_layer.linear.bias's optimizer"),
        ("train", 7, "no constants in it"),
        ("step", "2", "no step in it"),
        ("step", -3, "no step in it"),
        ("step", 3, "is the state of step 3"),
    ],
)
def test_states_that_cannot_be(folder, key, value, words):
    """One line each, before anything is trained."""
    assert train("--steps=2") is None
    path = "out/digits/state_2.safetensors"
    tensors, about = ckpt.load_tensors(path)
    if key in about:
        about[key] = value
    elif value is None:
        del tensors[key]
    else:
        tensors[key] = tensors[key].double() if value == "float64" else value
    ckpt.save_tensors(path, tensors, about)
    assert words in train("--steps=3")
    assert list(ckpt.states("out/digits")) == [2]


def test_a_state_without_an_optimizer(folder, capsys):
    """It is told, and the optimizer begins anew."""
    assert train("--steps=2") is None
    path = "out/digits/state_2.safetensors"
    tensors, about = ckpt.load_tensors(path)
    tensors = {name: t for name, t in tensors.items() if not name.startswith("optimizer.")}
    ckpt.save_tensors(path, tensors, about)
    assert train("--steps=3") is None
    assert f"{path} has no state of the optimizer for" in capsys.readouterr().out
    assert state("digits")[f"{BIAS}step"] == 1


# ---- init_from -----------------------------------------------------------------------------------


def test_init_from(folder, capsys):
    """A checkpoint or the state of a run begins another run; a network that is other is refused."""
    assert train("--name=first", "--steps=2", "--ema_eval=0.5") is None
    sampled = ckpt.load_tensors("out/first/ckpt.safetensors")[0]
    for name, path in (("a", "ckpt"), ("b", "state_2")):
        source = f"--init_from=out/first/{path}.safetensors"
        assert train(f"--name={name}", "--steps=1", "--lr=0.0", source) is None
        begun = state(name)
        for kind in ("model", "target", "eval"):
            assert equal(weights(begun, kind), sampled)
        refused = train("--name=no", "--depth=2", source)
        assert "init_from" in refused
        assert "depth 1 -> 2" in refused
        assert "--init_partly=True" in refused
        assert "scaled True -> False" in train("--name=no", "--scaled=False", source)
    assert "not taken" not in capsys.readouterr().out
    assert not os.path.exists("out/no")
    assert "no checkpoint nowhere" in train("--name=no", "--init_from=nowhere")


def test_init_from_is_read_once(folder, capsys):
    """A run that has a state goes on from that: the file may be gone, or be another one."""
    make_checkpoint("x.safetensors", depth=2)
    source = ("--init_from=x.safetensors", "--init_partly=True")
    assert train("--steps=1", *source) is None
    assert "not taken" in capsys.readouterr().out
    assert train("--steps=2", *source) is None
    said = capsys.readouterr().out
    assert "not taken" not in said
    assert "from step 1" in said
    os.remove("x.safetensors")
    assert train("--steps=3", *source) is None
    assert "from step 2" in capsys.readouterr().out
    assert "no checkpoint x.safetensors" in train("--name=other", *source)


def test_init_from_other_units(folder):
    """Weights are of normalized data: other means and deviations are other inputs."""
    make_checkpoint("x.safetensors", depth=1)
    tensors, about = ckpt.load_tensors("x.safetensors")
    about["data"]["std"] = [64.0]
    ckpt.save_tensors("x.safetensors", tensors, about)
    assert "std [64.0] -> [127.5]" in train("--init_from=x.safetensors")
    about["config"]["unknown"] = 3
    ckpt.save_tensors("x.safetensors", tensors, about)
    assert "init_from" in train("--init_from=x.safetensors")


def test_init_partly(folder, capsys):
    """Another number of classes and blocks: what fits is taken, the rest is named, each once.

    Positions are not taken, though they fit: those of 4 x 4 tokens would fit 2 x 8.
    """
    net = make_checkpoint("x.safetensors", depth=2, num_classes=3)
    flags = ("--steps=1", "--lr=0.0", "--init_partly=True", "--init_from=x.safetensors")
    assert train(*flags) is None
    lines = capsys.readouterr().out.splitlines()
    named = [line.split()[3] for line in lines if line.startswith("init_from: not taken:")]
    theirs = net.state_dict()
    own = weights(state("digits"), "model")
    expected = {key for key in theirs if key not in own or theirs[key].shape != own[key].shape}
    expected.add("pos_embed")  # make_checkpoint's is random
    assert set(named) == expected | {"depth", "num_classes"}
    assert len(named) == len(expected) + 2
    assert any(key.startswith("blocks.1.") for key in named)
    tables = [key for key in expected if not key.startswith("blocks.1.")]
    assert len(tables) == 2
    assert any("the file's is (4, 32), the network's (11, 32)" in line for line in lines)
    assert "init_from: not taken: depth (the file's is 2, here it is 1)" in lines
    assert torch.equal(own["pos_embed"], positions(4, 4, 32))
    taken = theirs.keys() & own.keys() - expected
    assert len(taken) > 10
    assert all(torch.equal(own[key], theirs[key]) for key in taken)


def test_init_partly_from_another_maker(folder, capsys):
    """A safetensors file without anything of this project in it, or with nothing that fits."""
    net = random_model(torch.float32, depth=1, in_channels=1, input_size=8, num_classes=10)
    theirs = dict(net.state_dict())
    del theirs["final_layer.linear.bias"]
    theirs["extra"] = torch.zeros(3)
    theirs["pos_embed"] = theirs["pos_embed"].clone()
    safetensors.torch.save_file(theirs, "x.safetensors")
    flags = ("--steps=1", "--lr=0.0", "--init_from=x.safetensors")
    assert "not a checkpoint of this project" in train(*flags)
    assert train("--init_partly=True", *flags) is None
    lines = [line for line in capsys.readouterr().out.splitlines() if "not taken" in line]
    assert lines == [
        "init_from: not taken: extra (the network has no such tensor)",
        "init_from: not taken: pos_embed (is not trained, stays as the network has it)",
        "init_from: not taken: final_layer.linear.bias "
        "(not in the file, stays as it was initialized)",
    ]
    own = weights(state("digits"), "model")
    theirs = {key: t for key, t in theirs.items() if key not in ("extra", "pos_embed")}
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)

    safetensors.torch.save_file({"pos_embed": own["pos_embed"]}, "x.safetensors")
    refused = train("--name=no", "--init_partly=True", *flags)
    assert "nothing in x.safetensors fits this network" in refused

    safetensors.torch.save_file({"extra": torch.zeros(3)}, "x.safetensors")
    refused = train("--name=no", "--init_partly=True", *flags)
    assert "nothing in x.safetensors fits this network: extra (the network has no" in refused
    np.save("x.safetensors", np.zeros(3))
    os.replace("x.safetensors.npy", "x.safetensors")
    assert "not a whole safetensors file" in train("--name=no", "--init_partly=True", *flags)
