"""
A published TVM snapshot -> a checkpoint, without running anything from it.

    python convert.py network-snapshot.pkl ckpt.safetensors --w 2 [--labels data/im256]

--w is the guidance weight that the model was trained at, which a snapshot does not say. The
published four:
    ImageNet-256: 2, 1.75        ImageNet-512: 2.5 (the unscaled one), 2.25
Published scores draw labels as often as the training set has them, and a snapshot does not say how
often that is. --labels takes it from the header of a folder that prepare.py made; without it each
class is drawn as often as any other.

A snapshot is a pickle, which is a program: it names functions and calls them; one of those
executes source text that lies in the file. Here nothing of it is imported or executed. Classes
become inert Stubs, which keep what they are given. Six functions have replacements below. Any other
name ends the conversion.
"""

import io
import math
import os
from zipfile import ZIP_STORED, ZipFile

import torch
from tqdm import tqdm

from checkpoint import save_tensors
from files import CheckpointError, UserError, check_writable
from header import load_header
from model import DiT, DiTConfig
from options import Parser, run
from pickles import RestrictedUnpickler, check_pickle, mapped
from vae import PUBLISHED, SD_VAE

# Everything in these modules becomes a Stub ...
STUB_MODULES = (
    "torch.nn.",
    "torch._dynamo.",
    "torch._inductor.",
    "timm.",
    "dnnlib.",
    "torch_utils.",
    "training.",
    "omegaconf.",
    "numpy.",
)
# ... and so do these names in other modules.
STUB_NAMES = {
    "torch": {
        "device",
        "Size",
        "_TorchCompileInductorWrapper",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "int64",
        "bool",
    },
    "builtins": {
        "dict",
        "list",
        "tuple",
        "set",
        "frozenset",
        "int",
        "float",
        "bool",
        "str",
        "object",
    },
    "copyreg": {"_reconstructor"},
    "collections": {"OrderedDict", "defaultdict"},
    "typing": {"Any"},
    "contextlib": {"nullcontext"},
}
MOST_WRAPPERS = 9  # of torch.compile around one module


# ---- what objects of a file become ---------------------------------------------------------------


class Stub(dict):
    """What an object of the file becomes: it keeps what it is given, and does nothing.

    It has items, as a dict; `args`, what it was called with; `state`, its attributes; and `tensor`,
    where it stands for a tensor.
    """

    tensor = None

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.args = args
        self.state = {}
        return self

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, tuple):  # attributes, and those in slots
            state = state[0]
        self.state = state

    def __call__(self, *args, **kwargs):
        return Stub()

    def __bool__(self):  # an empty dict would be False
        return True

    def __hash__(self):
        return id(self)

    # What pickle calls for the items of a set or a list.
    def add(self, item):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass

    def named(self, kind):
        """Of a module: its _parameters, _buffers or _modules, by name."""
        return self.state.get(kind, {})


def stub_of_tensor(tensor):
    stub = Stub()
    stub.tensor = tensor
    return stub


# ---- replacements of functions -------------------------------------------------------------------


def rebuild_tensor(flat, offset, size, stride, *_):
    """A tensor in a flat storage. as_strided raises where it does not lie within."""
    if math.prod(size) > flat.tensor.numel():  # it would overlap itself, to ask for memory
        raise CheckpointError(f"a tensor of {tuple(size)} in a storage of {flat.tensor.numel()}")
    return stub_of_tensor(flat.tensor.as_strided(size, stride, offset))


def first_argument(data, *_):
    """A parameter is its tensor; whether it has a gradient does not matter."""
    return data


def persistent_object(meta):
    """An object that carries its own source text, which is left where it is."""
    stub = Stub()
    stub.state = meta["state"]
    return stub


def attribute(thing, name):
    """getattr, as objects of torch.compile use it: of a Stub, and nothing comes of it."""
    if not isinstance(thing, (Stub, type)):  # the types in here are those of Stubs
        raise CheckpointError(
            "it calls for builtins.getattr, of something that is no part of a module"
        )
    return Stub()


class Reader(RestrictedUnpickler):
    """The unpickler of a snapshot. progress: a tqdm of bytes."""

    def __init__(self, file, progress):
        super().__init__(file)
        self.progress = progress

    def stand_in(self, module, name):
        replacements = {
            "torch.storage._load_from_bytes": self.load_storage,
            "torch._utils._rebuild_tensor_v2": rebuild_tensor,
            "torch._utils._rebuild_parameter": first_argument,
            "torch._utils._rebuild_parameter_with_state": first_argument,
            "torch_utils.persistence._reconstruct_persistent_obj": persistent_object,
            "builtins.getattr": attribute,
        }
        if f"{module}.{name}" in replacements:
            return replacements[f"{module}.{name}"]
        if name in STUB_NAMES.get(module, ()) or f"{module}.".startswith(STUB_MODULES):
            return type(name, (Stub,), {})
        return None

    def load_storage(self, content):
        """A storage, which is a file of torch.save in itself -> a flat tensor of all of it."""
        self.progress.update(len(content))
        if is_compressed(content):  # torch.save never does that: a small file could fill the memory
            raise CheckpointError("a tensor in it is compressed")
        try:
            storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
        except Exception as error:  # torch's own reader raises many kinds
            reason = in_one_line(error, 120)
            raise CheckpointError(f"a tensor in it is no plain storage: {reason}") from None
        return stub_of_tensor(flat)


def is_compressed(content):
    """Whether bytes are a zip archive with a compressed member."""
    try:
        with ZipFile(io.BytesIO(content)) as archive:
            return any(member.compress_type != ZIP_STORED for member in archive.infolist())
    except Exception:  # no zip: torch reads other formats, or says what is wrong
        return False


def in_one_line(error, longest):
    """All lines of an error's text as one printable line. (Which weights are missing stands in the
    later ones.) A stranger's file may put anything into it."""
    line = " ".join(str(error).split())
    return "".join(filter(str.isprintable, line))[:longest]


def read_snapshot(path):
    """A snapshot's outermost dict, of plain values and Stubs. Raises CheckpointError, OSError."""
    size = os.path.getsize(path)
    with tqdm(total=size, desc="reading", unit="B", unit_scale=True) as progress:
        try:
            with mapped(path) as content:
                check_pickle(content)
                content.seek(0)
                return Reader(content, progress).load()
        except UserError as error:
            reason = in_one_line(error, 250)
        except Exception as error:  # whatever the bytes of a stranger lead to
            reason = in_one_line(f"not whole, or no pickle: {type(error).__name__}: {error}", 250)
    raise CheckpointError(f"{path} is refused: {reason}")


# ---- the network ---------------------------------------------------------------------------------


def network(data):
    """The DiT of a snapshot.

    Its config is read off the shapes of its weights, and off the attributes that lie beside them.
    Raises errors of many kinds where `data` holds something else.
    """
    wrapper = unwrapped(data["ema" if "ema" in data else "net"])
    dit = unwrapped(wrapper.named("_modules")["model"])
    tensors = weights(dit)
    for tensor in tensors.values():
        if not tensor.isfinite().all():
            raise ValueError("weights that are not finite")
    with torch.device("meta"):
        model = DiT(config_of(wrapper, dit, tensors))
    model.load_state_dict(tensors, assign=True)
    return model


def config_of(wrapper, dit, tensors):
    _, tokens, hidden_size = tensors["pos_embed"].shape
    _, channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    mlp_width = len(tensors["blocks.0.mlp.fc1.weight"])
    rows_of_labels = len(tensors["y_embedder.embedding_table.weight"])  # one is for "no class"
    block_names = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    block = unwrapped(dit.named("_modules")["blocks"].named("_modules")["0"])
    norm = type(block.named("_modules").get("norm1")).__name__
    q_norm = tensors.get("blocks.0.attn.q_norm.weight")  # (head size,)
    if q_norm is None:
        num_heads = dit.state["num_heads"]
    else:
        num_heads = hidden_size // len(q_norm)
    mlp_ratio = mlp_width / hidden_size
    if int(hidden_size * mlp_ratio) < mlp_width:  # the division has rounded down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    scaled = wrapper.state["do_scale_param"]
    mod_norm = block.state.get("do_mod_norm", True)
    if not isinstance(scaled, bool) or not isinstance(mod_norm, bool):
        raise ValueError("a do_scale_param or do_mod_norm that is neither True nor False")
    return DiTConfig(
        input_size=math.isqrt(tokens) * patch_size,
        in_channels=channels,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=len(block_names),
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        num_classes=rows_of_labels - 1,
        scaled=scaled,
        mod_norm=mod_norm,
        qk_norm=q_norm is not None,
        rms_norm=norm != "LayerNorm",
    )


def unwrapped(module):
    """The module within torch.compile's wrapper; None where there is none."""
    for _ in range(MOST_WRAPPERS):
        if not isinstance(module, Stub):
            return None
        inside = module.named("_modules")
        if type(module).__name__ != "OptimizedModule" and "_orig_mod" not in inside:
            return module
        module = inside.get("_orig_mod") or next(iter(module.args), None)
    return module if isinstance(module, Stub) else None


def weights(module, prefix="", seen=None):
    """The tensors in a module, by their state_dict names, in float32.

    A module that is met again is passed over: a file may name a few of them so often, one within
    another, that this would never end. seen: the ids of those that were met.
    """
    seen = set() if seen is None else seen
    if id(module) in seen:
        return {}
    seen.add(id(module))
    found = {}
    for name, value in {**module.named("_parameters"), **module.named("_buffers")}.items():
        if isinstance(value, Stub) and value.tensor is not None:
            found[prefix + name] = value.tensor.float()
    for name, child in module.named("_modules").items():
        child = unwrapped(child)
        if child is not None:
            found.update(weights(child, f"{prefix}{name}.", seen))
    return found


# ---- the checkpoint ------------------------------------------------------------------------------


def header_of(model, snapshot, labels):
    """What a checkpoint says of its data. labels: a folder of prepare.py, or None."""
    config = model.config
    side = config.input_size
    image_size = 8 * side
    if config.in_channels != 4 or image_size not in PUBLISHED:
        raise CheckpointError(
            f"{snapshot} is of {config.in_channels}x{side}x{side} data, "
            "whose mean and std are not published"
        )
    counts = [1] * config.num_classes
    if labels:
        counts = load_header(labels)["class_counts"]
        if len(counts) != config.num_classes:
            raise CheckpointError(
                f"{labels} has {len(counts)} classes, and {snapshot} {config.num_classes}"
            )
    mean, std = PUBLISHED[image_size]
    return {
        "name": f"im{image_size}",
        "mean": mean,
        "std": std,
        "kind": "latents",
        "vae": SD_VAE,
        "shape": [4, side, side],
        "num_classes": len(counts),
        "class_counts": counts,
    }


def parse():
    parser = Parser(description=__doc__)
    parser.add_argument("snapshot")
    parser.add_argument("checkpoint")
    parser.add_argument(
        "--w",
        type=float,
        required=True,
        help="the guidance weight: 2, 1.75, 2.5 or 2.25 of the published models",
    )
    parser.add_argument(
        "--labels",
        metavar="data/NAME",
        help="draw labels as this training set has them (default: all alike)",
    )
    args = parser.parse_args()
    if not 0 < args.w < math.inf:
        raise CheckpointError(f"--w must be above 0 and finite, not {args.w:g}")
    if os.path.lexists(args.checkpoint):  # it may be the snapshot
        raise CheckpointError(f"{args.checkpoint} is there already: choose another name")
    check_writable(args.checkpoint)  # complain now rather than when the snapshot is read
    return args


def main():
    args = parse()
    data = read_snapshot(args.snapshot)
    try:
        model = network(data)
    except Exception as error:  # of a stranger's names, shapes and values
        reason = f"{type(error).__name__}: {in_one_line(error, 300)}"
        raise CheckpointError(
            f"{args.snapshot} does not hold a TVMWrapper with its DiT under ema or net: {reason}"
        ) from None
    about = {
        "config": vars(model.config),
        "guidance": {"sampler": "constant", "w": args.w, "w_min": args.w, "w_max": args.w},
        "data": header_of(model, args.snapshot, args.labels),
        "source": os.path.basename(args.snapshot),
    }
    save_tensors(args.checkpoint, model.state_dict(), about)
    drawn = f"as in {args.labels}" if args.labels else "all alike"
    print(f"{args.checkpoint}: {model.config}, guidance {args.w:g}, classes drawn {drawn}")


if __name__ == "__main__":
    run(main)
