"""
The network F(x, t, s, y, w): a diffusion transformer (DiT) with semi-Lipschitz control.

    model = DiT(DiTConfig.named("XL/2", input_size=32, in_channels=4, num_classes=1000))
    F = model(x, t, s, y, w)
    F, dF = model.jvp(x, t, s, y, w, ds=torch.ones_like(s))  # dF/ds, itself differentiable

The forward pass is written once, with the operations of dual.py. They take tensors, or Duals
(a value and its tangent), so the same lines give F and its forward-mode derivative.

Semi-Lipschitz control (arXiv 2511.19797, section 4) is: RMS norms without weights instead of layer
norms, RMS norms on queries and keys, and RMS norms on the modulation vectors.

Shapes: B images, T tokens, D = hidden_size, H heads of size d, patches of p x p, C channels.
"""

import contextlib
import dataclasses
import itertools

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from checkpoint import check_about, load_checkpoint, refuse_infinite
from dual import (
    Dual,
    add_gated,
    at_least_float32,
    attend,
    detach_tangent,
    layer_norm,
    linear,
    linear_gelu,
    linear_map,
    linear_qkv,
    linear_side_by_side,
    norm_modulate,
    rms_norm,
    silu,
    split,
    value_of,
    widest,
)
from files import CheckpointError
from products import stack_of

FREQUENCIES = 128  # cosines, and as many sines, of a time embedding
TOGETHER = 4  # blocks whose modulation vectors are made by one product

# fmt: off
SIZES = {
    "tiny": dict(hidden_size=32,   depth=2,  num_heads=2,  patch_size=2),
    "S/2":  dict(hidden_size=384,  depth=12, num_heads=6,  patch_size=2),
    "B/2":  dict(hidden_size=768,  depth=12, num_heads=12, patch_size=2),
    "L/2":  dict(hidden_size=1024, depth=24, num_heads=16, patch_size=2),
    "XL/2": dict(hidden_size=1152, depth=28, num_heads=18, patch_size=2),
    "G/2":  dict(hidden_size=1728, depth=48, num_heads=27, patch_size=2),
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    input_size: int | tuple[int, int] = 32  # side of x, or (height, width)
    in_channels: int = 4
    patch_size: int = 2
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 18
    mlp_ratio: float = 4.0
    num_classes: int = 1000  # 0: unlabelled data, and y is 0 throughout
    scaled: bool = True  # displacement (s-t) w F and velocity w F, instead of (s-t) F and F
    rms_norm: bool = True  # False: LayerNorm
    qk_norm: bool = True
    mod_norm: bool = True
    time_init: str = "spectral"  # MLPs of t, t - s and 1/w: "spectral" or "normal" (N(0, 0.02))

    def __post_init__(self):
        """Raises ValueError for values that no network has."""
        if isinstance(self.input_size, (list, tuple)):
            sides = tuple(self.input_size)
            is_square = len(sides) == 2 and sides[0] == sides[1]
            object.__setattr__(self, "input_size", sides[0] if is_square else sides)
        for name in ("in_channels", "patch_size", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        p = self.patch_size
        if len(self.height_and_width) != 2:
            raise ValueError(f"input_size must be one side or two, not {self.input_size}")
        for side in self.height_and_width:
            if side < 1:
                raise ValueError(f"input_size must be at least 1, not {self.input_size}")
            if side % p:
                raise ValueError(f"input_size {side} is not divisible by patch_size {p}")
        D = self.hidden_size
        if D % self.num_heads:
            raise ValueError(f"hidden_size {D} is not divisible by num_heads {self.num_heads}")
        if D % 4:
            raise ValueError(f"hidden_size {D} is not divisible by 4 (2D sine-cosine positions)")
        if int(D * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves no hidden unit")
        for name in ("scaled", "rms_norm", "qk_norm", "mod_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be 0 (unlabelled) or more, not {self.num_classes}")
        if self.time_init not in ("spectral", "normal"):
            raise ValueError(f'time_init must be "spectral" or "normal", not {self.time_init!r}')

    @property
    def height_and_width(self):
        if isinstance(self.input_size, tuple):
            return self.input_size
        return self.input_size, self.input_size

    @property
    def grid(self):
        """Patches from top to bottom, and from left to right."""
        height, width = self.height_and_width
        return height // self.patch_size, width // self.patch_size

    @classmethod
    def named(cls, size, semi_lipschitz=True, **kwargs):
        """A size of SIZES. semi_lipschitz=False is the plain DiT of the paper's comparison."""
        if size not in SIZES:
            raise ValueError(f"no size {size!r}: there are {', '.join(SIZES)}")
        options = dict(SIZES[size])
        if not semi_lipschitz:
            options.update(rms_norm=False, qk_norm=False, mod_norm=False)
        options.update(kwargs)
        return cls(**options)


# ---- what goes in: times, patches, labels --------------------------------------------------------


class Embedder(nn.Module):
    """Numbers (B,) -> (B, D): sines and cosines, then an MLP.

    It embeds t itself. The original DiT embeds 1000 t, which would multiply dF/ds by 1000.
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, hidden_size),
            nn.SiLU(),  # never called: it keeps the published names
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, a):  # (B,)
        dtype = self.mlp[0].weight.dtype
        x = linear_map(lambda features: features.to(dtype), self.features(a))  # (B, 256)
        return linear(self.mlp[2], silu(linear(self.mlp[0], x)))  # (B, D)

    @staticmethod
    def features(a):
        """(B,) -> (B, 256) in float64, where the device has it: [cos, sin] of 128 frequencies."""
        value = value_of(a)
        wide = widest(value.device)
        powers = torch.arange(FREQUENCIES, dtype=wide, device=value.device) / FREQUENCIES
        frequencies = 10000.0**-powers
        angles = value.to(wide)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        features = torch.cat([cos, sin], dim=1)
        if not isinstance(a, Dual):
            return features
        dangles = a.tangent.to(wide)[:, None] * frequencies
        return Dual(features, torch.cat([-sin * dangles, cos * dangles], dim=1))


class PatchEmbed(nn.Module):
    """Images (B, C, height, width), a tensor or a Dual, -> tokens (B, T, D), row by row."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(
            config.in_channels, config.hidden_size, config.patch_size, config.patch_size
        )

    def forward(self, x):  # (B, C, height, width)
        # A convolution whose stride is its size is a linear layer of each patch. self.proj keeps
        # the published names and shapes, and is never called: its hooks do not fire.
        weight, bias = self.proj.weight.flatten(1), self.proj.bias  # (D, C p p), (D,)
        x = linear_map(self.patches, x)  # (B, T, C p p)
        if not isinstance(x, Dual):
            return functional.linear(x, weight, bias)  # (B, T, D)
        return Dual(functional.linear(x.value, weight, bias), functional.linear(x.tangent, weight))

    def patches(self, x):
        p, q = self.proj.kernel_size
        return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)


class LabelEmbedder(nn.Module):
    """Classes (B,) int64 -> (B, D)."""

    def __init__(self, config):
        super().__init__()
        rows = config.num_classes + 1  # the last is "no class"
        self.embedding_table = nn.Embedding(rows, config.hidden_size)

    def forward(self, y):  # (B,) int64
        return self.embedding_table(y)  # (B, D)


# ---- a block -------------------------------------------------------------------------------------


class Scale(nn.Module):
    """The weight of a query or key norm: a module, for the published name q_norm.weight."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """Self-attention with RMS norms on queries and keys: (B, T, D) -> (B, T, D).

    mask: as in dual.attend.
    """

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.q_norm = Scale(D // config.num_heads) if config.qk_norm else None
        self.k_norm = Scale(D // config.num_heads) if config.qk_norm else None

    def forward(self, x, mask=None):  # (B, T, D)
        weights = (None, None)
        if self.q_norm is not None:
            weights = self.q_norm.weight, self.k_norm.weight
        q, k, v = linear_qkv(self.qkv, x, self.num_heads, *weights)  # (B, T, H, d) each
        q, k, v = (linear_map(lambda x: x.transpose(1, 2), x) for x in (q, k, v))  # (B, H, T, d)
        x = attend(q, k, v, mask)  # (B, H, T, d)
        x = linear_map(lambda x: rearrange(x, "b h t d -> b t (h d)"), x)  # (B, T, D)
        return linear(self.proj, x)  # (B, T, D)


class MLP(nn.Module):
    """Two linear layers with a GELU between them: (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        inner = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, inner)
        self.fc2 = nn.Linear(inner, config.hidden_size)

    def forward(self, x):  # (B, T, D)
        return linear(self.fc2, linear_gelu(self.fc1, x))  # (B, T, D)


class Modulated(nn.Module):
    """What a block and the final layer share: a norm, and vectors made of the condition."""

    def __init__(self, config, num_vectors):
        super().__init__()
        self.norm = rms_norm if config.rms_norm else layer_norm
        self.mod_norm = config.mod_norm
        self.num_vectors = num_vectors
        # The SiLU is never called: embed() applies it once, for all blocks. It gives the weights
        # their published names.
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.hidden_size, num_vectors * config.hidden_size)
        )

    def modulation(self, c):
        """c (B, D) -> num_vectors vectors (B, 1, D)."""
        x = linear(self.adaLN_modulation[1], c)
        x = linear_map(lambda x: x.unflatten(1, (self.num_vectors, 1, -1)), x)
        return split(lambda x: x.unbind(1), self.normed(x))

    def normed(self, x):
        """The norm of vectors (..., D), in at least float32."""
        return rms_norm(x) if self.mod_norm else linear_map(at_least_float32, x)


class Block(Modulated):
    """Attention and an MLP, each with a modulated norm before it and a gate behind it."""

    def __init__(self, config):
        super().__init__(config, num_vectors=6)
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, c, mask=None):
        """x (B, T, D) -> (B, T, D).

        c: the condition (B, D), or the tuple of six vectors that block_vectors has made of it for
        several blocks at once. mask: as in dual.attend.
        """
        vectors = c if isinstance(c, tuple) else self.modulation(c)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors  # (B, 1, D) each
        # x = x + gate1 * attn(norm(x) * (1 + scale1) + shift1), and the same with the MLP. Where
        # fused.py has kernels, x is a dual.Residual from here on, whose sum the next norm makes.
        x, h = norm_modulate(x, shift1, scale1, self.norm)
        x = add_gated(x, gate1, self.attn(h, mask))
        x, h = norm_modulate(x, shift2, scale2, self.norm)
        x = add_gated(x, gate2, self.mlp(h))
        return x  # (B, T, D)

    def forward_detach_jvp(self, x, c, *more):
        """forward, with no gradient through the tangent.

        torch.compile plans the backward when it compiles the forward. Since the detach is inside
        the block, it keeps nothing for the backward of a tangent.
        """
        return detach_tangent(self.forward(x, c, *more))


def block_vectors(blocks, c, stack=None):
    """c (B, D) -> the modulation vectors of several blocks, in order: (B, 6 len(blocks), 1, D).

    They are one product and one norm. One by one, the blocks would need many kernels of a few rows
    each, which take longer to start than to run. stack: as in dual.linear_side_by_side.
    """
    x = linear_side_by_side(modulation_layers(blocks), c, stack)
    num_vectors = sum(block.num_vectors for block in blocks)
    x = linear_map(lambda x: x.unflatten(1, (num_vectors, 1, -1)), x)
    return blocks[0].normed(x)


def block_vectors_detach_jvp(blocks, c, stack=None):
    """block_vectors, with no gradient through the tangent (as Block.forward_detach_jvp)."""
    return detach_tangent(block_vectors(blocks, c, stack))


def modulation_layers(blocks):
    return [block.adaLN_modulation[1] for block in blocks]


class FinalLayer(Modulated):
    """Tokens (B, T, D) and the condition c (B, D) -> the pixels of each patch, (B, T, p p C)."""

    def __init__(self, config):
        super().__init__(config, num_vectors=2)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.in_channels)

    def forward(self, x, c):
        shift, scale = self.modulation(c)
        _, h = norm_modulate(x, shift, scale, self.norm)
        return linear(self.linear, h)  # (B, T, p p C)


# ---- the network ---------------------------------------------------------------------------------


class DiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        table = positions(*config.grid, config.hidden_size)  # (1, T, D)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = Embedder(config.hidden_size)  # of t
        self.s_embedder = Embedder(config.hidden_size)  # of t - s, under its published name
        self.guidance_embedder = Embedder(config.hidden_size)  # of 1 / w
        self.y_embedder = LabelEmbedder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        # compile_blocks and shard_loss replace these two functions. The first is called instead of
        # the block itself, so hooks of blocks fire under shard_loss only. Where the second is None,
        # each block makes its vectors itself.
        self.run_block = Block.forward
        self.make_vectors = block_vectors
        # Activation checkpointing: this many blocks are computed twice, the second time in the
        # backward. A pass without tangents needs less memory: there it is half of this number.
        self.checkpoint_blocks = 0
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """The first weights. Biases are zero. Weights are:

            zero             layers of modulation, and the output layer
            Xavier's normal  the patches
            N(0, 0.02)       classes; the MLPs of times and of w if time_init is "normal"
            spectral norm 1  all other linear layers: Xavier's normal, divided by its spectral norm

        Frozen Linear and Conv2d layers stay as they are.
        """
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Linear, nn.Conv2d)) or not module.weight.requires_grad:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            is_embedder_mlp = "embedder.mlp." in name
            if "adaLN_modulation" in name or name == "final_layer.linear":
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight.view(len(module.weight), -1))
            elif is_embedder_mlp and self.config.time_init == "normal":
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_normal_(module.weight)
                module.weight /= spectral_norm(module.weight)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)

    def forward(self, x, t, s, y, w):
        """F at x (B, C, height, width), from times t to s (B,) in [0, 1].

        y (B,) int64: classes, or num_classes for "no class". w (B,): guidance weights.
        Returns (B, C, height, width), in the parameters' dtype or autocast's. Weights of 16 bits
        need autocast. x, t and s may be Duals, and F then is one.
        """
        x, c, *more = self.embed(x, t, s, y, w)
        checkpointed = self.checkpoint_blocks
        if not any(isinstance(a, Dual) for a in (x, c)):
            checkpointed = checkpointed // 2
        for i, (block, condition) in enumerate(self.blocks_with_vectors(c)):
            if torch.is_grad_enabled() and i < checkpointed:
                x = checkpoint(
                    self.run_block,
                    block,
                    x,
                    condition,
                    *more,
                    use_reentrant=False,
                    preserve_rng_state=False,  # nothing here is random
                )
            else:
                x = self.run_block(block, x, condition, *more)
        x = self.final_layer(x, c)  # (B, T, p p C)
        return linear_map(self.unpatchify, x)  # (B, C, height, width)

    def embed(self, x, t, s, y, w):
        """The tokens (B, T, D), and the condition c (B, D), of which blocks make their vectors.

        This is the place for other conditions. What it returns after c goes to Block.forward as
        it is, for example a mask of padding.
        """
        c = (
            self.t_embedder(t)
            + self.s_embedder(t - s)
            + self.guidance_embedder(1 / w)
            + self.y_embedder(y)
        )
        x = self.x_embedder(x) + self.pos_embed
        return x, silu(c)

    def no_condition(self, y):
        """Conditions like y that mean "no class". The loss needs them for guidance and dropout."""
        return torch.full_like(y, self.config.num_classes)

    def blocks_with_vectors(self, c):
        """Yields (block, what it is given as its condition).

        A group's vectors are made just before its first block is run. So their gradients come when
        those of the group do, and DDP can send them.
        """
        for blocks in self.groups():
            yield from zip(blocks, self.vectors_of(blocks, c), strict=True)

    def vectors_of(self, blocks, c):
        """What each of these blocks is given as its condition: a tuple of its vectors, or c where
        it makes them itself."""
        if self.make_vectors is None:
            return [c] * len(blocks)
        x = self.make_vectors(blocks, c, stack_of(modulation_layers(blocks)))
        vectors = iter(split(lambda x: x.unbind(1), x))
        return [tuple(itertools.islice(vectors, block.num_vectors)) for block in blocks]

    def groups(self):
        """The blocks whose vectors are made together."""
        blocks = list(self.blocks)
        return [blocks[i : i + TOGETHER] for i in range(0, len(blocks), TOGETHER)]

    def side_by_side(self):
        """Groups of layers that are computed as one product (for products.py)."""
        return [modulation_layers(blocks) for blocks in self.groups()]

    def unpatchify(self, x):
        height, p = self.config.grid[0], self.config.patch_size
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=p, q=p)

    def jvp(self, x, t, s, y, w, dx=None, dt=None, ds=None):
        """F and its derivative along the tangents dx (B, C, height, width), dt (B,), ds (B,).

        A tangent that is None is zero. Returns (F, dF), both like x, both differentiable by
        backward.
        """
        # A tangent of None becomes zeros. So every block takes Duals, and torch.compile makes one
        # program for all. Zeros for x cost one product in PatchEmbed and nothing more: the tangents
        # of t and s come in by the modulation, so x has a tangent from the first block on anyway.
        duals = []
        for value, tangent in ((x, dx), (t, dt), (s, ds)):
            duals.append(Dual(value, torch.zeros_like(value) if tangent is None else tangent))
        out = self(*duals, y, w)
        return out.value, out.tangent


def compile_blocks(*models, detach_jvp=False):
    """Compile the blocks of models: one function for all of them, once for each shape of a batch.

    Their vectors are another function. A depth that is no multiple of TOGETHER has a second program
    of the vectors, for the last blocks. torch.compile makes kernels of its own, and fused.py's are
    not used. That pays for blocks and GPUs for which fused.py has none.

    detach_jvp: for a loss that does not ask for the gradient of a tangent.
    """
    # Dynamo keeps 8 programs of a function and then gives up. A process that works with many
    # shapes or networks needs more. A call looks through them, which takes microseconds.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    torch._dynamo.config.optimize_ddp = False  # True cuts blocks where DDP's buckets end
    limit = torch._dynamo.config.accumulated_recompile_limit
    torch._dynamo.config.accumulated_recompile_limit = max(limit, 1024)
    options = dict(fullgraph=True, dynamic=False)
    run_block = torch.compile(Block.forward_detach_jvp if detach_jvp else Block.forward, **options)
    make_vectors = block_vectors_detach_jvp if detach_jvp else block_vectors
    make_vectors = torch.compile(make_vectors, **options)
    for model in models:
        model.run_block = run_block
        model.make_vectors = make_vectors


def spectral_norm(weight):
    """The largest singular value, by the product with the transpose in float64.

    A large matrix goes to a GPU for it, where there is one: XL/2 has 115 of them. A CPU works on
    one thread: with more, LAPACK takes minutes while another process uses the same cores.
    """
    matrix = weight if weight.size(0) < weight.size(1) else weight.T
    if weight.device.type == "cpu" and min(weight.shape) >= 512 and torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # the GPU may be full, or another's alone
            matrix = matrix.cuda()
    matrix = matrix.double()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    norm = torch.linalg.eigvalsh(matrix @ matrix.T)[-1].sqrt()
    torch.set_num_threads(threads)
    return norm.to(weight.device)


def positions(rows, columns, dim):
    """Fixed 2D positions (1, rows * columns, dim).

    The first half of the features is [sin, cos] of the column, the second half of the row.
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def features(n):
        angles = torch.arange(n, dtype=torch.float64)[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (n, dim / 2)

    of_column = features(columns)[None].expand(rows, -1, -1)
    of_row = features(rows)[:, None].expand(-1, columns, -1)
    both = torch.cat([of_column, of_row], dim=-1)
    return both.reshape(1, rows * columns, dim).float()


# ---- its file ------------------------------------------------------------------------------------


def load_model(path, device="cpu"):
    """A checkpoint -> (DiT in eval mode with float32 weights, about).

    Of a state of a run (state_STEP.safetensors) it takes the evaluation network. Raises
    CheckpointError.
    """
    tensors, about = load_checkpoint(path, device)
    refuse_infinite(path, tensors)
    try:
        config = DiTConfig(**about["config"])
        if config.depth > len(tensors):  # a billion blocks would take all memory
            raise ValueError(f"a depth of {config.depth}, and {len(tensors)} tensors")
        check_about(config, about)
        with torch.device("meta"):  # nothing to initialize
            model = DiT(config)
        for name, t in tensors.items():
            if t.is_floating_point():
                tensors[name] = t.float()
        model.load_state_dict(tensors, assign=True)  # raises if a name or a shape differs
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} does not fit its own config: {reason}") from None
    return model.eval().requires_grad_(False), about
