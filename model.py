"""
The network F(x, t, s, y, w): a diffusion transformer (DiT) with semi-Lipschitz control,
written once for values and for forward-mode derivatives.

    model = DiT(DiTConfig.named("XL/2", input_size=32, in_channels=4, num_classes=1000))
    F     = model(x, t, s, y, w)
    F, dF = model.jvp(x, t, s, y, w, ds=torch.ones_like(s))    # dF/ds, itself differentiable

The derivative: every function below takes tensors or Duals (value, tangent) and has one rule for
each, so the same forward pass moves either through the network. Duals are ordinary tensors to
autograd: backward, checkpointing and torch.compile need nothing special.

Semi-Lipschitz control (arXiv 2511.19797, section 4): RMS norms without weights instead of layer
norms, RMS norms on queries and keys, and RMS norms on the modulation vectors.
"""
import dataclasses
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from checkpoint import CheckpointError, load_tensors
from dual import (
    Dual,
    at_least_float32,
    attend,
    gelu,
    layer_norm,
    linear,
    linear_map,
    modulate,
    rms_norm,
    silu,
    split,
    widest,
)

FREQUENCIES = 128      # cosines, and as many sines, of a time embedding

SIZES = {
    "tiny": dict(hidden_size=32, depth=2, num_heads=2, patch_size=2),
    "S/2": dict(hidden_size=384, depth=12, num_heads=6, patch_size=2),
    "B/2": dict(hidden_size=768, depth=12, num_heads=12, patch_size=2),
    "L/2": dict(hidden_size=1024, depth=24, num_heads=16, patch_size=2),
    "XL/2": dict(hidden_size=1152, depth=28, num_heads=18, patch_size=2),
}


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    input_size: int = 32          # height and width of x
    in_channels: int = 4
    patch_size: int = 2
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 18
    mlp_ratio: float = 4.0
    num_classes: int = 1000       # 0: unlabelled data, and y is 0 throughout
    scaled: bool = True           # displacement (s-t) w F and velocity w F, instead of (s-t) F and F
    rms_norm: bool = True         # False: LayerNorm
    qk_norm: bool = True
    mod_norm: bool = True
    time_init: str = "spectral"   # "spectral" or "normal" (N(0, 0.02)) weights of the time MLPs

    def __post_init__(self):
        for name in ("input_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for whole, part in (("input_size", "patch_size"), ("hidden_size", "num_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole} {getattr(self, whole)} is not divisible by {part} {getattr(self, part)}")
        for name in ("scaled", "rms_norm", "qk_norm", "mod_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by 4 (2D sine-cosine positions)")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be 0 (unlabelled) or more, not {self.num_classes}")
        if self.time_init not in ("spectral", "normal"):
            raise ValueError(f'time_init must be "spectral" or "normal", not {self.time_init!r}')

    @classmethod
    def named(cls, size, semi_lipschitz=True, **kwargs):
        """A size of SIZES; semi_lipschitz=False is the plain DiT of the paper's comparison."""
        if size not in SIZES:
            raise ValueError(f"no size {size!r}: there are {', '.join(SIZES)}")
        switches = {} if semi_lipschitz else dict(rms_norm=False, qk_norm=False, mod_norm=False)
        return cls(**{**SIZES[size], **switches, **kwargs})


# ---- values and tangents -------------------------------------------------------------------------

























# ---- the network ---------------------------------------------------------------------------------

class Embedder(nn.Module):
    """A number in [0, 1] -> (B, hidden): sines and cosines of the raw value, then an MLP."""

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, a):                                                             # (B,)
        x = linear_map(lambda features: features.to(self.mlp[0].weight.dtype), self.features(a))   # (B, 256)
        return linear(self.mlp[2], silu(linear(self.mlp[0], x)))                      # (B, D)

    @staticmethod
    def features(a):
        value = a.value if isinstance(a, Dual) else a
        wide = widest(value.device)
        frequencies = 10000.0 ** (-torch.arange(FREQUENCIES, dtype=wide, device=value.device) / FREQUENCIES)
        angles = value.to(wide)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        if not isinstance(a, Dual):
            return torch.cat([cos, sin], dim=1)
        dangles = a.tangent.to(wide)[:, None] * frequencies
        return Dual(torch.cat([cos, sin], dim=1), torch.cat([-sin * dangles, cos * dangles], dim=1))


class Patches(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, x):                                                             # (B, C, H, W)
        if isinstance(x, Dual):
            dx = F.conv2d(x.tangent, self.proj.weight, stride=self.proj.stride)
            return linear_map(self.tokens, Dual(self.proj(x.value), dx))
        return self.tokens(self.proj(x))

    @staticmethod
    def tokens(x):
        return rearrange(x, "b d h w -> b (h w) d").contiguous()


class Labels(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)   # the last: no class

    def forward(self, y):
        return self.embedding_table(y)


class Scale(nn.Module):
    """The weight of a query or key norm."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, self.num_heads = config.hidden_size, config.num_heads
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.q_norm, self.k_norm = [Scale(D // config.num_heads) if config.qk_norm else None for _ in range(2)]

    def forward(self, x):                                                             # (B, T, D)
        # Taken apart as (b t three h d), so that the gradients lie together as the product of the backward wants them.
        heads = lambda x: x.unflatten(-1, (3, self.num_heads, -1))
        q, k, v = split(lambda x: heads(x).unbind(2), linear(self.qkv, x))            # (B, T, H, d) each
        if self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm.weight), rms_norm(k, self.k_norm.weight)
        q, k, v = (linear_map(lambda x: x.transpose(1, 2), x) for x in (q, k, v))     # (B, H, T, d)
        x = linear_map(lambda x: rearrange(x, "b h t d -> b t (h d)"), attend(q, k, v))
        return linear(self.proj, x)                                                   # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = int(config.hidden_size * config.mlp_ratio)
        self.fc1, self.fc2 = nn.Linear(config.hidden_size, inner), nn.Linear(inner, config.hidden_size)

    def forward(self, x):
        return linear(self.fc2, gelu(linear(self.fc1, x)))


class Modulated(nn.Module):
    """What a block and the final layer share: a norm, and vectors made of the condition."""

    def __init__(self, config, vectors):
        super().__init__()
        self.norm = rms_norm if config.rms_norm else layer_norm
        self.mod_norm, self.vectors = config.mod_norm, vectors
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, vectors * config.hidden_size))

    def modulation(self, c):
        """c: (B, D), after its SiLU, which is the same for all blocks. Returns `vectors` times (B, 1, D)."""
        vectors = linear_map(lambda x: x.unflatten(1, (self.vectors, 1, -1)), linear(self.adaLN_modulation[1], c))
        vectors = rms_norm(vectors) if self.mod_norm else linear_map(at_least_float32, vectors)
        return split(lambda x: x.unbind(1), vectors)


class Block(Modulated):
    def __init__(self, config):
        super().__init__(config, vectors=6)
        self.attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x, c):                                                          # (B, T, D), (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)             # (B, 1, D) each
        x = x + gate1 * self.attn(modulate(self.norm(x), shift1, scale1))
        x = x + gate2 * self.mlp(modulate(self.norm(x), shift2, scale2))
        return x                                                                      # (B, T, D)

    def forward_detached(self, x, c):
        """forward, its tangent without a gradient: what a compiled block must know, or it does the work for nothing."""
        x = self.forward(x, c)
        return Dual(x.value, x.tangent.detach()) if isinstance(x, Dual) else x


class Final(Modulated):
    def __init__(self, config):
        super().__init__(config, vectors=2)
        self.linear = nn.Linear(config.hidden_size, config.patch_size ** 2 * config.in_channels)

    def forward(self, x, c):
        shift, scale = self.modulation(c)
        return linear(self.linear, modulate(self.norm(x), shift, scale))              # (B, T, p p C)


class DiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        grid = config.input_size // config.patch_size
        self.pos_embed = nn.Parameter(positions(grid, config.hidden_size), requires_grad=False)   # (1, T, D)
        self.x_embedder = Patches(config)
        self.t_embedder = Embedder(config.hidden_size)           # of t
        self.s_embedder = Embedder(config.hidden_size)           # of t - s
        self.guidance_embedder = Embedder(config.hidden_size)    # of 1 / w
        self.y_embedder = Labels(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = Final(config)
        self.run_block = Block.forward    # or what compile_blocks puts here
        # In a pass with a derivative so many blocks keep only their input for the backward, and run again there. (Passes
        # without one go backward on their own and keep two thirds as much, so half of the blocks does.)
        self.checkpoint_blocks = 0
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.zeros_(module.bias)
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                elif isinstance(module, nn.Conv2d):
                    nn.init.xavier_normal_(module.weight.view(len(module.weight), -1))
                elif self.config.time_init == "normal" and ".mlp." in name and "embedder" in name:
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_normal_(module.weight)
                    module.weight /= spectral_norm(module.weight)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)

    def forward(self, x, t, s, y, w):
        """F at x (B, C, H, W), from times t to s (B,) in [0, 1], classes y (B,) int64 (num_classes = no
        class) and guidance weights w (B,). Returns (B, C, H, W), in the parameters' dtype or autocast's.
        x, t and s may be Duals, and F then is one."""
        c = self.t_embedder(t) + self.s_embedder(t - s) + self.guidance_embedder(1 / w) + self.y_embedder(y)   # (B, D)
        c = silu(c)
        x = self.x_embedder(x) + self.pos_embed                                       # (B, T, D)
        for i, block in enumerate(self.blocks):
            kept = i >= (self.checkpoint_blocks if isinstance(c, Dual) else self.checkpoint_blocks // 2)
            if torch.is_grad_enabled() and not kept:
                x = checkpoint(self.run_block, block, x, c, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.run_block(block, x, c)
        x = self.final_layer(x, c)                                                    # (B, T, p p C)
        grid, p = self.config.input_size // self.config.patch_size, self.config.patch_size
        return linear_map(lambda x: rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=grid, p=p, q=p), x)

    def jvp(self, x, t, s, y, w, dx=None, dt=None, ds=None):
        """F and its derivative along the tangents dx (B, C, H, W), dt (B,), ds (B,); None is zero.
        Returns (F, dF), both (B, C, H, W) and both differentiable by backward."""
        duals = [Dual(v, torch.zeros_like(v) if d is None else d) for v, d in ((x, dx), (t, dt), (s, ds))]
        out = self(*duals, y, w)
        return out.value, out.tangent


def compile_blocks(*models, detached=False):
    """Compiles the blocks of models, one function for all, once for each shape of a batch. detached: for a loss that does
    not ask for the gradient of a tangent."""
    compiled = torch.compile(Block.forward_detached if detached else Block.forward, fullgraph=True, dynamic=False)
    for model in models:
        model.run_block = compiled


def spectral_norm(weight):
    """The largest singular value, by the product with the transpose in float64. On one thread: with more, LAPACK takes
    minutes while another process is at work on the same cores."""
    weight, threads = (weight if weight.size(0) < weight.size(1) else weight.T).double(), torch.get_num_threads()
    torch.set_num_threads(1)
    norm = torch.linalg.eigvalsh(weight @ weight.T)[-1].sqrt()
    torch.set_num_threads(threads)
    return norm


def positions(grid, dim):
    """Fixed 2D positions (1, grid * grid, dim): [sin, cos] of the column, then [sin, cos] of the row."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    one = torch.cat([angles.sin(), angles.cos()], dim=1)                              # (grid, dim / 2)
    column, row = one[None].expand(grid, -1, -1), one[:, None].expand(-1, grid, -1)   # of token (row, column)
    return torch.cat([column, row], dim=-1).reshape(1, grid * grid, dim).float()


# ---- its file ------------------------------------------------------------------------------------

def load_model(path, device="cpu"):
    """A checkpoint -> (DiT in eval mode with its weights in float32, about). Raises CheckpointError."""
    tensors, about = load_tensors(path, device)
    data, guidance = about["data"], about["guidance"]
    try:
        config, blocks = DiTConfig(**about["config"]), {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
        if config.depth != len(blocks):                                           # before it takes the memory of a billion
            raise ValueError(f"a depth of {config.depth} and {len(blocks)} blocks")
        with torch.device("meta"):                                                # nothing to initialize
            model = DiT(config)
        model.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
        counts, weights, channels = data["class_counts"], [guidance[key] for key in ("w", "w_min", "w_max")], [*data["mean"], *data["std"]]
        if len(counts) != config.num_classes or len(data["mean"]) != config.in_channels or len(channels) != 2 * config.in_channels:
            raise ValueError(f"{len(counts)} class counts for {config.num_classes} classes, or other than one mean and std a channel")
        if not all(math.isfinite(x) for x in (*counts, *weights, *channels)) or min(weights) <= 0 or counts and not min(counts) >= 0 < sum(counts):
            raise ValueError("a class count, guidance weight, mean or std that cannot be")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} does not fit its own config: {' '.join(str(error).split())[:300]}") from None
    return model.eval().requires_grad_(False), about
