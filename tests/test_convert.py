"""convert.py: the network of a snapshot, bit by bit, and nothing of the snapshot runs."""

import contextlib
import copy
import functools
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from helpers import GREEDY, LATENT, Calling, randn, random_model, run_script, write_dataset

import convert
import dual
import files
import model as m
import sample as s
from header import load_header

# ---- snapshots as they are published -------------------------------------------------------------


@pytest.fixture
def place(monkeypatch):
    """Puts a class or function into a module of any name, so that a pickle names it so."""

    def place(module, name, thing):
        parts = module.split(".")
        for i in range(len(parts)):
            path = ".".join(parts[: i + 1])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        setattr(sys.modules[module], name, thing)
        thing.__module__ = module
        thing.__name__ = name
        thing.__qualname__ = name
        return thing

    return place


@pytest.fixture
def snapshot(folder, place):
    """Makes snapshots as NVIDIA's persistence and torch.compile pickle them."""

    def run_the_source(meta):
        exec(meta["module_src"])

    place("torch_utils.persistence", "_reconstruct_persistent_obj", run_the_source)

    def reduce_with_source(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": "open('ran', 'w').close()",
            "class_name": type(self).__name__,
            "state": self.__dict__,
        }
        return run_the_source, (meta,), None

    def layer(module, name, persistent=True):
        body = {"__reduce__": reduce_with_source} if persistent else {}
        return place(module, name, type(name, (torch.nn.Module,), body))

    wrapper = layer("training.wrapper", "TVMWrapper")
    data_format = place("timm.layers.format", "Format", type("Format", (str,), {}))
    easy_dict = place("dnnlib.util", "EasyDict", type("EasyDict", (dict,), {}))
    published = {
        m.DiT: layer("training.dit", "DiT_XL_2_18h"),
        m.Block: layer("training.dit", "DiTBlock"),
        m.FinalLayer: layer("training.dit", "FinalLayer"),
        m.Embedder: layer("training.dit", "TimestepEmbedder"),
        m.LabelEmbedder: layer("training.dit", "LabelEmbedder"),
        m.Attention: layer("training.dit", "Attention", persistent=False),
        m.MLP: layer("timm.layers.mlp", "Mlp", persistent=False),
        m.PatchEmbed: layer("timm.layers.patch_embed", "PatchEmbed", persistent=False),
        m.Scale: torch.nn.RMSNorm,
    }

    def rename(part):
        """One module of ours becomes the published one, with what lies beside its weights."""
        if isinstance(part, m.Block):
            is_rms = part.norm is dual.rms_norm
            norm = torch.nn.RMSNorm if is_rms else torch.nn.LayerNorm
            part.norm1 = norm(8, elementwise_affine=False)
            part.do_mod_norm = part.mod_norm
        if isinstance(part, m.PatchEmbed):
            part.output_fmt = data_format("NCHW")
            part.img_size = (32, 32)
        part.__class__ = published.get(type(part), type(part))
        for name, value in list(part.__dict__.items()):
            of_model = getattr(type(value), "__module__", "").startswith("model")
            if of_model or callable(value):
                del part.__dict__[name]

    def make(net, compiled, key):
        tree = copy.deepcopy(net)
        for part in list(tree.modules()):
            rename(part)
        tree.num_heads = net.config.num_heads
        top = wrapper()
        top.model = tree
        top.do_scale_param = net.config.scaled
        top.dtype = torch.bfloat16
        top._init_kwargs = easy_dict(compile=compiled)
        if compiled:
            top = torch.compile(top, mode="reduce-overhead")
        data = easy_dict(resolution=np.float32(256), shape=np.ones(2))
        return pickle.dumps({key: top, "dataset_kwargs": data})

    return make


def write(path, content):
    with open(path, "wb") as f:
        f.write(content)


def convert_it(path="s.pkl", *options):
    """The one line of complaint, or None."""
    return run_script("convert.py", path, "c.safetensors", "--w", 2, *options)


# ---- what comes out ------------------------------------------------------------------------------

UNSCALED = {"scaled": False, "rms_norm": False, "qk_norm": False, "mod_norm": False}


@pytest.mark.parametrize(
    "compiled, key, half, options", [(True, "net", False, {}), (False, "ema", True, UNSCALED)]
)
def test_convert(folder, snapshot, compiled, key, half, options):
    """The same function, bit by bit. An ordinary reader would have run the file's source."""
    net = random_model(torch.float32, **LATENT, **options)
    content = snapshot(net.bfloat16() if half else net, compiled, key)
    net.float()
    write("s.pkl", content)
    assert run_script("convert.py", "s.pkl", "c.safetensors", "--w", 1.75) is None
    assert sorted(os.listdir()) == ["c.safetensors", "s.pkl"]
    loaded, about = m.load_model("c.safetensors")
    assert loaded.config == net.config
    assert about["guidance"] == dict(sampler="constant", w=1.75, w_min=1.75, w_max=1.75)
    data = about["data"]
    assert data["mean"][0] == 0.86488 and data["std"][0] == 4.85503674
    assert data["vae"] == "stabilityai/sd-vae-ft-ema" and data["class_counts"] == [1, 1, 1]
    for name, p in loaded.state_dict().items():
        assert p.dtype == torch.float32 and torch.equal(p, net.state_dict()[name])
    noise = randn(3, 4, 32, 32, dtype=torch.float32)
    y, w = torch.arange(3), torch.full((3,), 1.75)
    assert torch.equal(s.sample(loaded, noise, y, w, 2), s.sample(net, noise, y, w, 2))
    with contextlib.suppress(Exception):
        pickle.loads(content)
    assert os.path.exists("ran")  # so the source was one that does something


# ---- what is refused -----------------------------------------------------------------------------


class Attacker:
    def __init__(self):
        write("ran", b"")


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def compressed(content):
    """The same zip archive, with compressed members."""
    file = io.BytesIO()
    whole = zipfile.ZipFile(io.BytesIO(content))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    return file.getvalue()


RAN = "open('ran', 'w').close()"
load_storage = torch.storage._load_from_bytes
rebuild_tensor = torch._utils._rebuild_tensor_v2


def tensor_of_two(*view):
    """view: offset, size, stride."""
    return Calling(rebuild_tensor, torch.ones(2).storage(), *view, False, {})


def globals_of_a_method():
    method = Calling(getattr, torch.nn.Linear, "__init__")
    return {"ema": Calling(Calling(getattr, method, "__globals__"), "ran", "w")}


# Each by a word of its refusal. The first five run when an ordinary reader opens them.
EVIL = {
    "posix.system": lambda: Calling(os.system, "touch ran"),
    "builtins.eval": lambda: Calling(eval, RAN),
    "builtins.exec, ": lambda: b'c__builtin__\nexec\n(S"' + RAN.encode() + b'"\ntR.',
    "test_convert.Attacker": lambda: Calling(Attacker),
    "no plain storage: Weights only": lambda: Calling(
        load_storage, pickle.dumps(Calling(exec, RAN))
    ),
    "subprocess.Popen": lambda: Calling(subprocess.Popen, ["touch", "ran"]),
    "functools.partial": lambda: Calling(functools.partial, os.system, "touch ran"),
    "open, which": lambda: Calling(open, "ran", "w"),
    "builtins.getattr, of": lambda: Calling(getattr, "a string", "upper"),
    "no plain storage: 'dict'": lambda: Calling(load_storage, saved({"a": torch.ones(2)})),
    "is compressed": lambda: Calling(load_storage, compressed(saved(torch.zeros(9).storage()))),
    "out of bounds": lambda: tensor_of_two(1, (2,), (1,)),
    "in a storage of 2": lambda: tensor_of_two(0, (10**6,), (0,)),
    "TVMWrapper": globals_of_a_method,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("word", [*EVIL, *GREEDY])
def test_convert_refuses_evil(folder, word):
    content = GREEDY[word] if word in GREEDY else EVIL[word]()
    if not isinstance(content, bytes):
        content = pickle.dumps(content)
    write("s.pkl", content)
    assert word in convert_it()
    assert os.listdir() == ["s.pkl"]
    if word in list(EVIL)[:5]:
        with contextlib.suppress(Exception):
            pickle.loads(content)
        assert os.path.exists("ran")  # as it would have


def test_convert_refuses_what_is_cut_off(folder, snapshot):
    content = snapshot(random_model(torch.float32, **LATENT), False, "ema")
    for n in (0, 1, 40, len(content) // 2, len(content) - 1):
        write("cut.pkl", content[:n])
        assert "refused: not whole" in convert_it("cut.pkl")
    assert "gone.pkl" in convert_it("gone.pkl")
    assert not os.path.exists("c.safetensors")


@pytest.mark.parametrize("thing", [{"ema": 3}, [1], {}])
def test_convert_refuses_other_pickles(folder, thing):
    write("other.pkl", pickle.dumps(thing))
    assert "TVMWrapper" in convert_it("other.pkl")


@pytest.mark.parametrize(
    "options, word", [({"input_size": 16}, "4x16x16"), ({"in_channels": 3}, "3x32x32")]
)
def test_convert_refuses_other_data(folder, snapshot, options, word):
    net = random_model(torch.float32, **{**LATENT, **options})
    write("s.pkl", snapshot(net, False, "ema"))
    assert word in convert_it()


def with_a_nan(net):
    net.blocks[1].mlp.fc1.bias.data.fill_(math.nan)


def without_times(net):
    del net.t_embedder


def without_positions(net):
    del net.pos_embed


@pytest.mark.parametrize(
    "spoil, word",
    [
        (with_a_nan, "not finite"),
        (without_times, "t_embedder.mlp"),
        (without_positions, "pos_embed"),
    ],
)
def test_convert_refuses_broken_networks(folder, snapshot, spoil, word):
    net = random_model(torch.float32, **LATENT)
    spoil(net)
    write("s.pkl", snapshot(net, False, "ema"))
    assert word in convert_it()


def test_convert_refuses_options(folder, snapshot):
    write("s.pkl", snapshot(random_model(torch.float32, **LATENT), False, "ema"))
    assert "--w" in run_script("convert.py", "s.pkl", "c.safetensors")
    assert "above 0" in run_script("convert.py", "s.pkl", "c.safetensors", "--w", 0)
    assert "no data in nowhere" in convert_it("s.pkl", "--labels", "nowhere")
    assert run_script("prepare.py", "digits") is None
    assert "10 classes" in convert_it("s.pkl", "--labels", "data/digits")
    assert not os.path.exists("c.safetensors")
    assert run_script("convert.py", "--help") is None


def test_labels_of_a_header_alone(folder, snapshot):
    """The arrays may lie on another machine: class_counts are in the header."""
    counts = [5, 0, 2]
    write_dataset("d", (1, 8, 8), train=3, classes=3)
    header = load_header("data/d")
    shutil.rmtree("data/d")
    os.makedirs("data/d")
    write("data/d/header.json", json.dumps({**header, "class_counts": counts}).encode())
    write("s.pkl", snapshot(random_model(torch.float32, **LATENT), False, "ema"))
    assert convert_it("s.pkl", "--labels", "data/d") is None
    assert m.load_model("c.safetensors")[1]["data"]["class_counts"] == counts


def test_convert_complains_before_it_reads(folder):
    """Of a folder that is a file, also where there is no snapshot."""
    write("taken", b"")
    said = run_script("convert.py", "gone.pkl", "taken/c.safetensors", "--w", 2)
    assert said.startswith("convert.py: ") and "taken" in said


def test_convert_replaces_nothing(folder, snapshot):
    """Not another file, and not the snapshot itself, whatever it is called."""
    content = snapshot(random_model(torch.float32, **LATENT), False, "ema")
    write("s.pkl", content)
    write("c.safetensors", b"mine")
    os.symlink("s.pkl", "link")
    for checkpoint in ("c.safetensors", "s.pkl", "link"):
        said = run_script("convert.py", "s.pkl", checkpoint, "--w", 2)
        assert said == f"convert.py: {checkpoint} is there already: choose another name"
    assert (folder / "c.safetensors").read_bytes() == b"mine"
    assert (folder / "s.pkl").read_bytes() == content and os.path.islink("link")


def test_one_writer_of_a_checkpoint(folder, snapshot):
    """Two at once would have written into one another's file."""
    write("s.pkl", snapshot(random_model(torch.float32, **LATENT), False, "ema"))
    other = files.open_locked("c.safetensors" + files.PARTIAL)
    assert "another process is writing it" in convert_it()
    other.close()
    assert convert_it() is None


def module(**modules):
    stub = convert.Stub()
    stub.state = {"_modules": modules}
    return stub


def test_snapshots_without_end():
    """Modules that hold themselves, or one another so often that this would take years."""
    loop = module()
    loop.state["_modules"].update(_orig_mod=loop, again=loop)
    chain = module()
    for _ in range(60):
        chain = module(a=chain, b=chain)
    assert convert.unwrapped(loop) is loop
    assert convert.weights(loop) == convert.weights(chain) == {}
