"""
A published TVM snapshot -> our checkpoint, without running anything from it.

    python convert.py network-snapshot.pkl ckpt.safetensors --w 2 [--labels data/im256]

--w is the guidance weight that the model was trained at, which a snapshot does not say. The published four:
    ImageNet-256: 2, 1.75        ImageNet-512: 2.5 (the unscaled one), 2.25
Published scores draw labels as often as the training set has them. A snapshot does not say that either: without
--labels, a folder of prepare.py whose header does, each class is drawn as often as any other.

A snapshot is a pickle, which is a program: it names functions and calls them; one of those executes source text that
lies in the file. Here nothing of it is imported or executed. Names of classes stand for inert Stubs, which keep what
they are given; six functions have replacements below; any other name ends the conversion.
"""
import io
import math
import os
import pickle
import sys

import torch
from tqdm import tqdm

from checkpoint import save_tensors
from dataset import DataError, load_dataset
from files import CheckpointError
from latents import SD_VAE
from model import DiT, DiTConfig
from options import Parser
from pickles import check_pickle
from vae import PUBLISHED

# All that is in these modules, and these names in others, become Stubs.
MODULES = ("torch.nn.", "torch._dynamo.", "torch._inductor.", "timm.", "dnnlib.", "torch_utils.", "training.", "omegaconf.", "numpy.")
NAMES = {"torch": {"device", "Size", "_TorchCompileInductorWrapper", "float16", "bfloat16", "float32", "float64", "int64", "bool"},
         "builtins": {"dict", "list", "tuple", "set", "frozenset", "int", "float", "bool", "str", "object"}, "copyreg": {"_reconstructor"},
         "collections": {"OrderedDict", "defaultdict"}, "typing": {"Any"}, "contextlib": {"nullcontext"}}
LATENTS = {size // 8: dict(name=f"im{size}", mean=mean, std=std) for size, (mean, std) in PUBLISHED.items()}    # by their height


class Stub(dict):
    """What an object of the file becomes. It has items, arguments, a state, perhaps a tensor, and does nothing."""
    state, tensor = {}, None

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.args = args
        return self

    def __setstate__(self, state):
        self.state = state[0] if isinstance(state, tuple) else state             # (dict, slots)

    part = lambda self, kind: self.state.get(kind, {})                           # of a module: _parameters, _buffers, _modules
    __init__ = add = append = extend = lambda self, *args, **kwargs: None
    __call__ = lambda self, *args, **kwargs: Stub()
    __bool__ = lambda self: True
    __hash__ = object.__hash__


def holding(**what):
    stub = Stub()
    vars(stub).update(what)
    return stub


def rebuilt(flat, at, size, stride, *_):
    if math.prod(size) > flat.tensor.numel():                                    # overlapping itself, to ask for memory
        raise CheckpointError(f"a tensor of {tuple(size)} in a storage of {flat.tensor.numel()}")
    return holding(tensor=flat.tensor.as_strided(size, stride, at))              # which keeps within the storage, or raises


class Reader(pickle.Unpickler):
    def find_class(self, module, name):
        known = {"torch.storage._load_from_bytes": self.storage, "builtins.getattr": self.attribute,
                 "torch._utils._rebuild_parameter": (first := lambda data, *_: data), "torch._utils._rebuild_parameter_with_state": first,
                 "torch._utils._rebuild_tensor_v2": rebuilt,
                 "torch_utils.persistence._reconstruct_persistent_obj": lambda meta: holding(state=meta["state"])}   # not its source
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)      # as old protocols have them
        if f"{module}.{name}" in known:
            return known[f"{module}.{name}"]
        if name in NAMES.get(module, ()) or f"{module}.".startswith(MODULES):
            return type(name, (Stub,), {})
        raise CheckpointError(f"it calls for {module}.{name}, which is not on the list in convert.py")

    def storage(self, content):
        self.progress.update(len(content))
        try:
            storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)         # a TypedStorage
            return holding(tensor=torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage))      # all of it, flat
        except Exception as error:                                               # of torch's own reader: many kinds
            raise CheckpointError(f"a tensor in it is no plain storage: {' '.join(str(error).split())[:120]}") from None

    def attribute(self, thing, name):
        """getattr, as objects of torch.compile use it: of a Stub, and nothing comes of it."""
        if not isinstance(thing, (Stub, type)):                                  # the types in here are Stubs' alone
            raise CheckpointError("it calls for builtins.getattr, of something that is no part of a module")
        return Stub()


def read_snapshot(path):
    """A snapshot's outermost dict, of plain values and Stubs. Raises CheckpointError, OSError."""
    with open(path, "rb") as f, tqdm(total=os.path.getsize(path), desc="reading", unit="B", unit_scale=True) as progress:
        try:
            check_pickle(f)
            reader = Reader(f)
            reader.progress = progress
            return reader.load()
        except Exception as error:                                               # whatever the bytes of a stranger lead to
            kind = "" if isinstance(error, CheckpointError) else f"not whole, or no pickle: {type(error).__name__}: "
            raise CheckpointError(f"{path} is refused: {kind}{' '.join(str(error).split())[:200]}") from None


def unwrapped(module):
    """The module within torch.compile's wrapper; None where there is none."""
    for _ in range(9):
        if not isinstance(module, Stub) or type(module).__name__ != "OptimizedModule" and "_orig_mod" not in module.part("_modules"):
            break
        module = module.part("_modules").get("_orig_mod") or next(iter(module.args), None)
    return module if isinstance(module, Stub) else None


def weights(module, prefix="", seen=None):
    """The tensors in a module, by their state_dict names, in float32. One that is in it again is passed over: a file may
    name a few modules so often that this would never end."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return {}
    seen.add(id(module))
    own = {**module.part("_parameters"), **module.part("_buffers")}
    found = {prefix + name: p.tensor.float() for name, p in own.items() if isinstance(p, Stub) and p.tensor is not None}
    for name, child in module.part("_modules").items():
        if (child := unwrapped(child)) is not None:
            found |= weights(child, f"{prefix}{name}.", seen)
    return found


def network(data):
    """The DiT of a snapshot, its config read off the shapes of its weights and off what lies beside them."""
    wrapper = unwrapped(data["ema" if "ema" in data else "net"])
    tensors = weights(stub := unwrapped(wrapper.part("_modules")["model"]))
    (_, tokens, hidden), (_, channels, patch, _) = tensors["pos_embed"].shape, tensors["x_embedder.proj.weight"].shape
    block, q_norm = unwrapped(stub.part("_modules")["blocks"].part("_modules")["0"]), tensors.get("blocks.0.attn.q_norm.weight")
    flags = dict(scaled=wrapper.state["do_scale_param"], mod_norm=block.state.get("do_mod_norm", True))
    if not all(isinstance(flag, bool) for flag in flags.values()) or not all(t.isfinite().all() for t in tensors.values()):
        raise ValueError("weights that are not finite, or a do_scale_param that is neither True nor False")
    config = DiTConfig(
        **flags, input_size=math.isqrt(tokens) * patch, in_channels=channels, patch_size=patch, hidden_size=hidden,
        depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        num_heads=stub.state["num_heads"] if q_norm is None else hidden // len(q_norm),
        mlp_ratio=len(tensors["blocks.0.mlp.fc1.weight"]) / hidden, num_classes=len(tensors["y_embedder.embedding_table.weight"]) - 1,
        qk_norm=q_norm is not None, rms_norm=type(block.part("_modules").get("norm1")).__name__ != "LayerNorm")
    with torch.device("meta"):
        model = DiT(config)
    model.load_state_dict(tensors, assign=True)
    return model


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("snapshot")
    parser.add_argument("checkpoint")
    parser.add_argument("--w", type=float, required=True, help="the guidance weight: 2, 1.75, 2.5 or 2.25 of the published models")
    parser.add_argument("--labels", metavar="data/NAME", help="draw labels as this training set has them (default: all alike)")
    args = parser.parse_args()
    if not 0 < args.w < math.inf:
        raise CheckpointError(f"--w must be above 0 and finite, not {args.w:g}")
    data = read_snapshot(args.snapshot)
    try:
        model = network(data)
    except Exception as error:                                                   # of a stranger's names, shapes and values
        error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(f"{args.snapshot} does not hold a TVMWrapper with its DiT under ema or net: {error}") from None
    config, side = model.config, model.config.input_size
    if config.in_channels != 4 or side not in LATENTS:
        raise CheckpointError(f"{args.snapshot} is of {config.in_channels}x{side}x{side} data, whose mean and std are not published")
    counts = load_dataset(args.labels)[0]["class_counts"] if args.labels else [1] * config.num_classes
    if len(counts) != config.num_classes:
        raise CheckpointError(f"{args.labels} has {len(counts)} classes, and {args.snapshot} {config.num_classes}")
    header = dict(LATENTS[side], kind="latents", vae=SD_VAE, shape=[4, side, side], num_classes=len(counts), class_counts=counts)
    guidance = dict(sampler="constant", w=args.w, w_min=args.w, w_max=args.w)
    about = dict(config=vars(config), guidance=guidance, data=header, source=os.path.basename(args.snapshot))
    save_tensors(args.checkpoint, model.state_dict(), about)
    print(f"{args.checkpoint}: {config}, guidance {args.w:g}, classes drawn {'as in ' + args.labels if args.labels else 'all alike'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (CheckpointError, DataError, OSError) as error:
        sys.exit("convert.py: " + "".join(filter(str.isprintable, " ".join(str(error).split()))))      # with names of a stranger's
