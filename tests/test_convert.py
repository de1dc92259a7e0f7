"""..."""
import contextlib
import copy
import functools
import io
import math
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from helpers import GREEDY, LATENT, randn, random_model, run_script

import convert
import dual
import model as m
import sample as s


@pytest.fixture
def snapshot(folder, monkeypatch):
    """Makes snapshots as NVIDIA's persistence and torch.compile pickle them, from classes in modules of their names."""
    def place(module, name, thing):
        for i, _ in enumerate(parts := module.split(".")):
            if (at := ".".join(parts[:i + 1])) not in sys.modules:
                monkeypatch.setitem(sys.modules, at, types.ModuleType(at))
        setattr(sys.modules[module], name, thing)
        thing.__module__, thing.__name__, thing.__qualname__ = module, name, name
        return thing
    run_the_source = place("torch_utils.persistence", "_reconstruct_persistent_obj", lambda meta: exec(meta["module_src"]))
    persistent = dict(__reduce__=lambda self: (run_the_source, (dict(
        type="class", version=6, module_src="open('ran', 'w').close()", class_name=type(self).__name__, state=self.__dict__),), None))
    layer = lambda module, name, body={}: place(module, name, type(name, (torch.nn.Module,), dict(body)))
    wrapper, NCHW = layer("training.wrapper", "TVMWrapper", persistent), place("timm.layers.format", "Format", type("Format", (str,), {}))("NCHW")
    easy = place("dnnlib.util", "EasyDict", type("EasyDict", (dict,), {}))
    named = {m.DiT: layer("training.dit", "DiT_XL_2_18h", persistent), m.Block: layer("training.dit", "DiTBlock", persistent),
             m.Final: layer("training.dit", "FinalLayer", persistent), m.Embedder: layer("training.dit", "TimestepEmbedder", persistent),
             m.Labels: layer("training.dit", "LabelEmbedder", persistent), m.Attention: layer("training.dit", "Attention"),
             m.MLP: layer("timm.layers.mlp", "Mlp"), m.Patches: layer("timm.layers.patch_embed", "PatchEmbed"), m.Scale: torch.nn.RMSNorm}

    def make(net, compiled, key):
        tree = copy.deepcopy(net)
        for part in list(tree.modules()):
            if isinstance(part, m.Block):
                part.norm1, part.do_mod_norm = (torch.nn.RMSNorm if part.norm is dual.rms_norm else torch.nn.LayerNorm)(8, elementwise_affine=False), part.mod_norm
            if isinstance(part, m.Patches):
                part.output_fmt, part.img_size = NCHW, (32, 32)
            part.__class__ = named.get(type(part), type(part))
            part.__dict__ = {name: value for name, value in part.__dict__.items() if not getattr(type(value), "__module__", "").startswith("model")
                             and not callable(value)}
        tree.num_heads = net.config.num_heads
        top = wrapper()
        top.model, top.do_scale_param, top.dtype, top._init_kwargs = tree, net.config.scaled, torch.bfloat16, easy(compile=compiled)
        top = torch.compile(top, mode="reduce-overhead") if compiled else top
        return pickle.dumps({key: top, "dataset_kwargs": easy(resolution=np.float32(256), shape=np.ones(2))})
    return make


@pytest.mark.parametrize("compiled, key, half, options", [
    (True, "net", False, {}), (False, "ema", True, dict(scaled=False, rms_norm=False, qk_norm=False, mod_norm=False))])
def test_convert(folder, snapshot, compiled, key, half, options):
    """The same function, bit by bit; nothing of the file's source ran, which an ordinary reader would have run."""
    net = random_model(torch.float32, **LATENT, **options)
    content = snapshot(net.bfloat16() if half else net, compiled, key)
    net.float()
    with open("s.pkl", "wb") as f:
        f.write(content)
    assert run_script("convert.py", "s.pkl", "c.safetensors", "--w", 1.75) is None and sorted(os.listdir()) == ["c.safetensors", "s.pkl"]
    loaded, about = m.load_model("c.safetensors")
    assert loaded.config == net.config and about["guidance"] == dict(sampler="constant", w=1.75, w_min=1.75, w_max=1.75)
    assert about["data"]["mean"][0] == 0.86488 and about["data"]["std"][0] == 4.85503674 and about["data"]["vae"] == "stabilityai/sd-vae-ft-ema" and about["data"]["class_counts"] == [1, 1, 1]
    assert all(p.dtype == torch.float32 and torch.equal(p, net.state_dict()[name]) for name, p in loaded.state_dict().items())
    noise, y, w = randn(3, 4, 32, 32, dtype=torch.float32), torch.arange(3), torch.full((3,), 1.75)
    assert torch.equal(s.sample(loaded, noise, y, w, 2), s.sample(net, noise, y, w, 2))
    with contextlib.suppress(Exception):
        pickle.loads(content)
    assert os.path.exists("ran")                                              # so the source was one that does something


def calling(function, *arguments):
    """Something whose pickle is a call."""
    return type("Call", (), {"__reduce__": lambda self: (function, arguments), "__call__": None})()


class Attacker:
    def __init__(self):
        open("ran", "w").close()


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


RAN = "open('ran', 'w').close()"


EVIL = {
    "posix.system": lambda: calling(os.system, "touch ran"),
    "builtins.eval": lambda: calling(eval, RAN),
    "builtins.exec, ": lambda: b"c__builtin__\nexec\n(S\"" + RAN.encode() + b"\"\ntR.",
    "test_convert.Attacker": lambda: calling(Attacker),
    "no plain storage: Weights only": lambda: calling(torch.storage._load_from_bytes, pickle.dumps(calling(exec, RAN))),
    "subprocess.Popen": lambda: calling(subprocess.Popen, ["touch", "ran"]),
    "functools.partial": lambda: calling(functools.partial, os.system, "touch ran"),
    "open, which": lambda: calling(open, "ran", "w"),
    "builtins.getattr, of": lambda: calling(getattr, "a string", "upper"),
    "no plain storage: 'dict'": lambda: calling(torch.storage._load_from_bytes, saved({"a": torch.ones(2)})),
    "out of bounds": lambda: calling(torch._utils._rebuild_tensor_v2, torch.ones(2).storage(), 1, (2,), (1,), False, {}),
    "in a storage of 2": lambda: calling(torch._utils._rebuild_tensor_v2, torch.ones(2).storage(), 0, (10 ** 6,), (0,), False, {}),
    "TVMWrapper": lambda: {"ema": calling(calling(getattr, calling(getattr, torch.nn.Linear, "__init__"), "__globals__"), "ran", "w")},
} | {word: lambda content=content: content for word, content in GREEDY.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("word", EVIL)
def test_convert_refuses_evil(folder, word):
    content = EVIL[word]()
    content = content if isinstance(content, bytes) else pickle.dumps(content)
    with open("s.pkl", "wb") as f:
        f.write(content)
    assert word in run_script("convert.py", "s.pkl", "c.safetensors", "--w", 2) and os.listdir() == ["s.pkl"]
    if list(EVIL).index(word) < 5:
        with contextlib.suppress(Exception):
            pickle.loads(content)
        assert os.path.exists("ran")                                          # as it would have


def test_convert_refuses(folder, snapshot):
    complain = lambda *a: run_script("convert.py", *a)
    content = snapshot(random_model(torch.float32, **LATENT), False, "ema")
    for n in (0, 1, 40, len(content) // 2, len(content) - 1):
        with open("cut.pkl", "wb") as f:
            f.write(content[:n])
        assert "refused: not whole" in complain("cut.pkl", "c.safetensors", "--w", 2)
    for thing, word in (({"ema": 3}, "TVMWrapper"), ([1], "TVMWrapper"), ({}, "TVMWrapper")):
        with open("other.pkl", "wb") as f:
            pickle.dump(thing, f)
        assert word in complain("other.pkl", "c.safetensors", "--w", 2)
    for options, word in ((dict(input_size=16), "4x16x16"), (dict(in_channels=3), "3x32x32")):
        with open("s.pkl", "wb") as f:
            f.write(snapshot(random_model(torch.float32, **{**LATENT, **options}), False, "ema"))
        assert word in complain("s.pkl", "c.safetensors", "--w", 2)
    for spoil, word in ((lambda net: net.blocks[1].mlp.fc1.bias.data.fill_(math.nan), "not finite"),
                        (lambda net: delattr(net, "t_embedder"), "t_embedder.mlp"), (lambda net: delattr(net, "pos_embed"), "pos_embed")):
        broken = random_model(torch.float32, **LATENT)
        spoil(broken)
        with open("s.pkl", "wb") as f:
            f.write(snapshot(broken, False, "ema"))
        assert word in complain("s.pkl", "c.safetensors", "--w", 2)
    with open("s.pkl", "wb") as f:
        f.write(content)
    assert "--w" in complain("s.pkl", "c.safetensors") and "above 0" in complain("s.pkl", "c.safetensors", "--w", 0)
    assert "no data in nowhere" in complain("s.pkl", "c.safetensors", "--w", 2, "--labels", "nowhere")
    assert run_script("prepare.py", "digits") is None
    assert "10 classes" in complain("s.pkl", "c.safetensors", "--w", 2, "--labels", "data/digits")
    assert "gone.pkl" in complain("gone.pkl", "c.safetensors", "--w", 2) and not os.path.exists("c.safetensors")
    assert run_script("convert.py", "--help") is None


def test_snapshots_without_end():
    """Modules that hold themselves, or one another so often that all ways through them would take years."""
    def module(**modules):
        stub = convert.Stub()
        stub.state = {"_modules": modules}
        return stub

    loop = module()
    loop.state["_modules"] |= {"_orig_mod": loop, "again": loop}
    chain = module()
    for _ in range(60):
        chain = module(a=chain, b=chain)
    assert convert.unwrapped(loop) is loop and convert.weights(loop) == convert.weights(chain) == {}
