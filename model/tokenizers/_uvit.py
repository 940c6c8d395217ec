"""The UViT that decodes tokens by denoising, with the parameter names of ml-4m's checkpoints.

Convolutions at high and a transformer at low resolution (Hoogeboom et al. 2023, simple diffusion), on patches of
4 x 4 pixels. B batch, C channels, D width of the transformer, E time width, N tokens of the transformer, H W pixels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.tokenizers._unet import GROUPS, PATCH, sinusoids
from model.tokenizers._vit import Attention, Mlp, _initialise, sincos_2d

_NAMED = {"b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}
_POSITIONS = 32  # the side of the table of positions, which is resized to the transformer's grid
_RES_BLOCKS = 2  # per resolution on the way down, one more on the way up


@dataclass(frozen=True)
class UViTSize:
    """Widths of the convolutions, one per resolution, and the transformer: width, blocks, heads.

    `shrink` halves the resolution once more before the transformer. With `long_skip` each block of the second half
    also sees the output of its counterpart in the first (Bao et al. 2022); there is then one block in the middle.
    """

    channels: tuple[int, ...]
    dim: int
    depth: int
    heads: int
    shrink: bool
    long_skip: bool

    @property
    def multiple(self) -> int:
        """Pixels per token of the transformer, which divide the sides of a map."""
        return PATCH * 2 ** (len(self.channels) - 1 + self.shrink)


def uvit_size(name: str) -> UViTSize:
    """What `uvit_{b,l,h}_p4_f{8,16}[_longskip|_extraconv]` says: f is the pixels per token of the transformer.

    For sizes of one's own, `uvit_<channels>-<width>x<blocks>x<heads>_p4_f16` and so on.
    """
    found = re.fullmatch(r"uvit_(?:([blh])|(\d+)-(\d+)x(\d+)x(\d+))_p4_f(8|16)(_longskip|_extraconv)?", name)
    if not found or found[6] + (found[7] or "") == "8_extraconv":
        expected = "uvit_b_p4_f16, uvit_l_p4_f8_longskip, uvit_<channels>-<width>x<blocks>x<heads>_p4_f16 or the like"
        raise ValueError(f"{name!r}, expected {expected}")
    if found[1]:
        channels, (dim, depth, heads) = 128, _NAMED[found[1]]
    else:
        channels, dim, depth, heads = (int(part) for part in found.group(2, 3, 4, 5))
    if channels == 0 or channels % GROUPS or dim % 4 or heads == 0 or dim % heads:
        expected = f"channels in multiples of {GROUPS}, a width that is a multiple of 4 and of the number of heads"
        raise ValueError(f"{name!r}, expected {expected}")
    size = UViTSize((channels, 2 * channels), dim, depth, heads, shrink=found[6] == "16", long_skip=False)
    if found[7] == "_extraconv":
        return replace(size, channels=(channels, 2 * channels, 4 * channels), shrink=False)
    return replace(size, depth=depth + 1 - depth % 2, long_skip=True) if found[7] else size


class ResBlock(nn.Module):
    """Two convolutions with the time added between them, beside a shortcut; (B, C, H, W), (B, E) to (B, out, H, W)."""

    def __init__(self, channels: int, time_width: int, out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out)
        self.norm2 = nn.GroupNorm(GROUPS, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """The shortcut plus the block's own contribution, which starts at zero."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Halve(nn.Module):
    """Half the resolution, by a strided convolution; (B, C, H, W) to (B, C, H / 2, W / 2)."""

    def __init__(self, channels: int, two_names: bool = False) -> None:
        super().__init__()
        if two_names:  # as diffusers names the one before the transformer
            self.Conv2d_0 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
            self.conv = self.Conv2d_0
        else:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Every second place."""
        return self.conv(x)


class Double(nn.Module):
    """Twice the resolution, by repeating, then a convolution; (B, C, H, W) to (B, C, 2 H, 2 W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Each place four times."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class DownLevel(nn.Module):
    """The residual blocks of one resolution on the way down, then half of it, but for the last."""

    def __init__(self, channels: int, time_width: int, out: int, halve: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(out if i else channels, time_width, out) for i in range(_RES_BLOCKS))
        self.downsamplers = nn.ModuleList([Halve(out)] if halve else [])

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What comes out, and all that the way up will see."""
        kept = []
        for block in self.resnets:
            x = block(x, time)
            kept.append(x)
        for halve in self.downsamplers:
            x = halve(x)
            kept.append(x)
        return x, kept


class UpLevel(nn.Module):
    """The residual blocks of one resolution on the way up, each beside one output of the way down."""

    def __init__(self, channels: int, time_width: int, out: int, kept: list[int], double: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock((out if i else channels) + kept[i], time_width, out) for i in range(_RES_BLOCKS + 1)
        )
        self.upsamplers = nn.ModuleList([Double(out)] if double else [])

    def forward(self, x: Tensor, time: Tensor, kept: list[Tensor]) -> Tensor:
        """Takes the last of `kept`, last first."""
        for block in self.resnets:
            x = block(torch.cat([x, kept.pop()], dim=1), time)
        for double in self.upsamplers:
            x = double(x)
        return x


class CrossAttention(nn.Module):
    """Attention of (B, N, D) to the codes (B, M, L) of the tokens."""

    def __init__(self, dim: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, codes: Tensor, masked: Tensor | None) -> Tensor:
        """Codes where `masked` (B, M) is true are not seen; where all are, ml-4m averages them all, and so do we."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(codes).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None
        if masked is not None:
            bias = torch.zeros(masked.shape, dtype=q.dtype, device=q.device)
            bias = bias.masked_fill(masked, torch.finfo(q.dtype).min)[:, None, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block that the time shifts, scales and gates (Peebles and Xie 2022, DiT); (B, N, D) kept.

    With the width of a `context` it also attends to the codes.
    """

    def __init__(
        self, dim: int, heads: int, time_width: int, dropout: float, context: int | None, long_skip: bool
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = Mlp(dim, nn.GELU())
        self.drop = nn.Dropout(dropout)
        self.crosses = context is not None
        branches = 2
        if context is None:
            self.attn = Attention(dim, heads)
        else:
            self.self_attn = Attention(dim, heads)
            self.cross_attn = CrossAttention(dim, context, heads)
            self.query_norm, self.context_norm = nn.LayerNorm(dim), nn.LayerNorm(context)
            branches = 3
        self.adaLN_modulation = nn.Linear(time_width, 2 * branches * dim)
        self.adaLN_gate = nn.Linear(time_width, branches * dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if long_skip else None

    def forward(self, x: Tensor, time: Tensor, codes: Tensor, masked: Tensor | None, earlier: Tensor | None) -> Tensor:
        """`time` (B, 1, E) already activated; `earlier` is what a long skip brings."""
        if self.skip_linear is not None and earlier is not None:
            x = self.skip_linear(torch.cat([x, earlier], dim=-1))
        gates = list(self.adaLN_gate(time).chunk(3 if self.crosses else 2, dim=-1))
        changes = list(self.adaLN_modulation(time).chunk(6 if self.crosses else 4, dim=-1))

        def modulated(norm: nn.Module) -> Tensor:
            shift, scale = changes.pop(0), changes.pop(0)
            return norm(x) * (1 + scale) + shift

        attention = self.self_attn if self.crosses else self.attn
        x = x + gates.pop(0) * self.drop(attention(modulated(self.norm1)))
        if self.crosses:
            seen = self.cross_attn(modulated(self.query_norm), self.context_norm(codes), masked)
            x = x + gates.pop(0) * self.drop(seen)
        return x + gates.pop(0) * self.drop(self.mlp(modulated(self.norm2)))


class Transformer(nn.Module):
    """The low-resolution middle: (B, C, h, w) kept, with the codes added ("concat") or attended to ("xattn")."""

    def __init__(
        self, channels: int, latent_dim: int, size: UViTSize, time_width: int, conditioning: str, dropout: float
    ) -> None:
        super().__init__()
        if conditioning not in ("concat", "xattn"):
            raise ValueError(f"conditioning {conditioning!r}, expected concat or xattn")
        self.adds = conditioning == "concat"
        self.mid_pos_emb = nn.Parameter(sincos_2d(_POSITIONS, _POSITIONS, size.dim), requires_grad=False)
        context = None if self.adds else latent_dim
        self.num_early = size.depth // 2 if size.long_skip else 0
        self.mid_block = nn.ModuleList(
            Block(size.dim, size.heads, time_width, dropout, context, size.long_skip and i > self.num_early)
            for i in range(size.depth)
        )
        self.mid_proj_in = nn.Linear(channels, size.dim)
        self.mid_proj_out = nn.Linear(size.dim, channels)
        if self.adds:
            self.mid_cond_proj = nn.Linear(latent_dim, size.dim)
            self.mask_token = nn.Parameter(torch.zeros(size.dim))

    def forward(self, x: Tensor, time: Tensor, codes: Tensor, masked: Tensor | None) -> Tensor:
        """`codes` (B, L, h', w') on any grid, of which `masked` (B, h', w') is not seen."""
        grid = x.shape[-2:]
        tokens = self.mid_proj_in(x.flatten(2).transpose(1, 2))
        if self.adds:
            codes = self.mid_cond_proj(F.interpolate(codes, grid, mode="nearest").flatten(2).transpose(1, 2))
            if masked is not None:
                hidden = F.interpolate(masked[:, None].float(), grid, mode="nearest").flatten(2).transpose(1, 2) > 0.5
                codes = torch.where(hidden, self.mask_token, codes)
            tokens = tokens + codes
            positions = F.interpolate(self.mid_pos_emb, grid, mode="bicubic", align_corners=False)
        else:
            codes = codes.flatten(2).transpose(1, 2)
            masked = None if masked is None else masked.flatten(1)
            # As in ml-4m, where only the other way of conditioning smooths them.
            positions = F.interpolate(self.mid_pos_emb, grid, mode="nearest")
        tokens = tokens + positions.flatten(2).transpose(1, 2)
        time = F.silu(time)[:, None]
        earlier: list[Tensor] = []
        for i, block in enumerate(self.mid_block):
            tokens = block(tokens, time, codes, masked, earlier.pop() if earlier and i > self.num_early else None)
            if i < self.num_early:
                earlier.append(tokens)
        return self.mid_proj_out(tokens).transpose(1, 2).unflatten(2, grid)


class TimeEmbedding(nn.Module):
    """Two linear layers on the sinusoids of the timestep; (B, C) to (B, E)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        """Not activated: every user does that."""
        return self.linear_2(F.silu(self.linear_1(x)))


class UViT(nn.Module):
    """Noisy maps (B, C, H, W), their timesteps and the codes (B, L, h, w) of their tokens to one more map each.

    Height and width are multiples of `multiple` pixels.
    """

    def __init__(self, channels: int, latent_dim: int, size: UViTSize, conditioning: str, dropout: float) -> None:
        super().__init__()
        widths, time_width = size.channels, 4 * size.channels[0]
        self.width, self.multiple = widths[0], size.multiple
        self.conv_in = nn.Conv2d(channels, widths[0], PATCH, stride=PATCH)
        self.time_embedding = TimeEmbedding(widths[0], time_width)
        self.down_blocks = nn.ModuleList()
        before, kept = widths[0], [widths[0]]
        for i, out in enumerate(widths):
            halve = i + 1 < len(widths)
            self.down_blocks.append(DownLevel(before, time_width, out, halve))
            before, kept = out, [*kept, *[out] * (_RES_BLOCKS + halve)]
        self.downsample_mid = Halve(before, two_names=True) if size.shrink else nn.Identity()
        self.mid_block = Transformer(before, latent_dim, size, time_width, conditioning, dropout)
        self.upsample_mid = Double(before) if size.shrink else nn.Identity()
        self.up_blocks = nn.ModuleList()
        for i, out in reversed(list(enumerate(widths))):
            beside = [kept.pop() for _ in range(_RES_BLOCKS + 1)]
            self.up_blocks.append(UpLevel(before, time_width, out, beside, double=i > 0))
            before = out
        self.conv_norm_out = nn.GroupNorm(GROUPS, before)
        self.conv_out = nn.ConvTranspose2d(before, channels, PATCH, stride=PATCH)
        _initialise(self)
        for name, layer in self.named_modules():
            if name.endswith(".kv"):  # k and v each as a layer of its own
                bound = (6.0 / (layer.weight.shape[0] // 2 + layer.weight.shape[1])) ** 0.5
                nn.init.uniform_(layer.weight, -bound, bound)
            if name.endswith(("adaLN_gate", "conv2")):  # branches that begin as nothing
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, noisy: Tensor, timesteps: Tensor, codes: Tensor, masked: Tensor | None = None) -> Tensor:
        """Timesteps int64 (B,); where `masked` (B, h, w) is true, the decoder does not see the code."""
        time = self.time_embedding(sinusoids(timesteps, self.width))
        x = self.conv_in(noisy)
        kept = [x]
        for level in self.down_blocks:
            x, more = level(x, time)
            kept += more
        x = self.upsample_mid(self.mid_block(self.downsample_mid(x), time, codes, masked))
        for level in self.up_blocks:
            x = level(x, time, kept)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
