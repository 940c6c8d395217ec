"""The backbone of ViTDet (Li et al. 2022): a plain vision transformer and the feature pyramid made of its last map.

Modules and parameters are named as in the published checkpoints (`backbone.*`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelers import _checkpoints, _grid_attention

EPS = 1e-6
"""Of every layer norm: torch's own default is ten times as large."""


class Attention(nn.Module):
    """Self-attention over a square grid, with a bias by how far apart two cells are in rows and in columns.

    The bias of a pair is `q . rel_pos_h[dy] + q . rel_pos_w[dx]`, with the query as it is before it is scaled.
    """

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        """(n, side, side, width) to the same."""
        n, side, _, width = x.shape
        q, k, v = self.qkv(x).view(n, side * side, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        places = _grid_attention.places(side, side, x.device).to(x.dtype)
        out = _grid_attention.attend(q, k, v, self.rel_pos_h, self.rel_pos_w, places)
        return self.proj(out.transpose(1, 2).reshape(n, side, side, width))


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A transformer block that attends within windows of `side` cells, or over the whole grid if that is its side."""

    def __init__(self, width: int, heads: int, hidden: int, side: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads, side)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(n, rows, cols, width) to the same."""
        rows, side = x.shape[1], self.attn.side
        normed = self.norm1(x)
        x = x + (self.attn(normed) if side == rows else _joined(self.attn(_windows(normed, side)), rows))
        return x + self.mlp(self.norm2(x))


def _windows(x: Tensor, side: int) -> Tensor:
    """(n, rows, rows, c) cut into (n * windows, side, side, c), with zeros beyond the right and lower border."""
    n, rows, _, width = x.shape
    beyond = -rows % side
    x = F.pad(x, (0, 0, 0, beyond, 0, beyond))
    across = (rows + beyond) // side
    return x.view(n, across, side, across, side, width).transpose(2, 3).reshape(-1, side, side, width)


def _joined(windows: Tensor, rows: int) -> Tensor:
    """The grid (n, rows, rows, c) that these windows were cut from."""
    side, width = windows.shape[1], windows.shape[3]
    across = -(-rows // side)
    x = windows.view(-1, across, across, side, side, width).transpose(2, 3)
    return x.reshape(-1, across * side, across * side, width)[:, :rows, :rows]


class PatchEmbed(nn.Module):
    """Patches of pixels as vectors."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, h / patch, w / patch, width)."""
        return self.proj(x).permute(0, 2, 3, 1)


class Transformer(nn.Module):
    """A plain vision transformer without a class token and without a norm at its end.

    `pos_embed` is (1, grid, grid, width): `resized_positions` makes it of the (1, 1 + n * n, width) of a checkpoint.
    """

    def __init__(self, width: int, heads: int, hidden: int, patch: int, grid: int, sides: list[int]) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(width, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, side) for side in sides))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, side, side) to (n, width, grid, grid), channels last in memory."""
        return self.blocks(self.patch_embed(x) + self.pos_embed).permute(0, 3, 1, 2)


def resized_positions(positions: Tensor, grid: int) -> Tensor:
    """Positions (1, 1 + n * n, width), of which the first is a class token's, as (1, grid, grid, width): bicubic."""
    cells = positions[:, 1:].float()
    side = round(cells.shape[1] ** 0.5)
    if side * side != cells.shape[1]:
        raise ValueError(f"vitdet: expected positions of a square and a class token, got {tuple(positions.shape)}")
    cells = cells.unflatten(1, (side, side))
    if side == grid:
        return cells
    return F.interpolate(cells.permute(0, 3, 1, 2), (grid, grid), mode="bicubic").permute(0, 2, 3, 1).contiguous()


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of maps (n, channels, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Maps to maps."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormedConv(nn.Conv2d):
    """A convolution without a bias that keeps the size, and a norm of its channels, as `norm` within it."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2, bias=False)
        self.norm = ChannelNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h, w)."""
        return self.norm(super().forward(x))


class Backbone(nn.Module):
    """The transformer (`net`) and maps at 1/4, 1/8, 1/16, 1/32 and 1/64 of the image."""

    def __init__(self, net: Transformer, channels: int) -> None:
        super().__init__()
        self.net = net
        width = net.pos_embed.shape[-1]
        self.simfp_2 = nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, 2, stride=2),
            ChannelNorm(width // 2),
            nn.GELU(),
            nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
            *_lateral(width // 4, channels),
        )
        self.simfp_3 = nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, 2, stride=2), *_lateral(width // 2, channels)
        )
        self.simfp_4 = nn.Sequential(*_lateral(width, channels))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(2), *_lateral(width, channels))

    @property
    def side(self) -> int:
        """Height and width of its input in pixels."""
        size: int = self.net.pos_embed.shape[1] * self.net.patch_embed.proj.kernel_size[0]
        return size

    def forward(self, x: Tensor) -> list[Tensor]:
        """(n, 3, side, side) to five maps (n, channels, side / stride, side / stride), finest first."""
        last = self.net(x)
        maps = [stage(last) for stage in (self.simfp_2, self.simfp_3, self.simfp_4, self.simfp_5)]
        return [*maps, maps[-1][:, :, ::2, ::2]]


def _lateral(inputs: int, channels: int) -> tuple[NormedConv, NormedConv]:
    return NormedConv(inputs, channels, 1), NormedConv(channels, channels, 3)


def backbone(state: Mapping[str, Tensor]) -> Backbone:
    """An unfilled backbone of the shape that these tensors (named without `backbone.`) are for.

    A block attends over as many cells as its table of relative positions is long; the longest is that of the whole
    grid, which gives the size of the input.
    """
    depth = _checkpoints.count(state, "net.blocks.")
    sides = [(state[f"net.blocks.{i}.attn.rel_pos_h"].shape[0] + 1) // 2 for i in range(depth)]
    width, _, _, patch = state["net.patch_embed.proj.weight"].shape
    net = Transformer(
        width=width,
        heads=width // state["net.blocks.0.attn.rel_pos_h"].shape[1],
        hidden=state["net.blocks.0.mlp.fc1.weight"].shape[0],
        patch=patch,
        grid=max(sides),
        sides=sides,
    )
    return Backbone(net, state["simfp_4.0.weight"].shape[0])
