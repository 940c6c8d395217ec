"""The patched UNet that decodes tokens by denoising, with the parameter names of ml-4m's checkpoints.

The UNet of ADM (Dhariwal and Nichol 2021) on patches of 4 x 4 pixels (Luhman and Luhman 2022), with the codes of the
tokens, each as large as its token, concatenated to its input. B batch, C channels, D width, E time width, H W pixels.
"""

from __future__ import annotations

import math
import re
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attend

M = TypeVar("M", bound=nn.Module)

PATCH = 4  # pixels
GROUPS = 32  # of every group norm; each width is a multiple of it
_MULTIPLES = (1, 2, 2, 2)  # the width of each resolution over the first one's
_ATTENDING = (4, 8)  # downsamplings, counted in patches, after which patches attend to each other


def unet_size(name: str) -> tuple[int, int]:
    """Width and residual blocks per resolution of `unet_patched` or `unet_patched_<width>x<blocks>`."""
    if name == "unet_patched":
        return 256, 3
    custom = re.fullmatch(r"unet_patched_(\d+)x(\d+)", name)
    if not custom:
        raise ValueError(f"{name!r}, expected unet_patched or unet_patched_<width>x<blocks>")
    width, blocks = int(custom[1]), int(custom[2])
    if width == 0 or width % GROUPS or blocks == 0:
        raise ValueError(f"{name!r}: width {width}, {blocks} blocks, expected a multiple of {GROUPS} and at least 1")
    return width, blocks


def sinusoids(timesteps: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of timesteps (B,) at falling frequencies (Vaswani et al. 2017): float32 (B, width)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """Two convolutions with the time added between them, beside a shortcut; (B, C, H, W), (B, E) to (B, D, H, W)."""

    def __init__(self, channels: int, time_width: int, out: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, out))
        # Position 2 is the dropout of ADM, which ml-4m never uses but which counts in the names.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Identity(), _zeroed(nn.Conv2d(out, out, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """The shortcut plus the block's own contribution, which starts at zero."""
        h = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class SpatialAttention(nn.Module):
    """Every place attends to every place, by one head; (B, D, H, W) kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The input plus what it attends to, which starts at zero."""
        qkv = self.qkv(self.norm(x).flatten(2)).transpose(1, 2)
        q, k, v = (part[:, None] for part in qkv.chunk(3, dim=-1))
        return x + self.proj_out(attend(q, k, v)[:, 0].transpose(1, 2)).view_as(x)


class Downsample(nn.Module):
    """Half the resolution, by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) to (B, D, H / 2, W / 2)."""
        return self.op(x)


class Upsample(nn.Module):
    """Twice the resolution, by repeating, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) to (B, D, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.ModuleList):
    """Layers in a row, of which the residual blocks also see the time."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, C, H, W) and (B, E) to what the last layer gives."""
        for layer in self:
            x = layer(x, time) if isinstance(layer, ResBlock) else layer(x)
        return x


class PatchedUNet(nn.Module):
    """Noisy maps (B, C, H, W), their timesteps and the codes (B, L, h, w) of their tokens to one more map each.

    What it predicts, the clean map, the noise or a velocity, is the training's choice. Height and width are multiples
    of `multiple` pixels.
    """

    multiple = PATCH * 2 ** (len(_MULTIPLES) - 1)

    def __init__(self, channels: int, latent_dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        width, num_blocks = size
        time_width = 4 * width
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        widths = [width * more for more in _MULTIPLES]
        first = Stage([nn.Conv2d(channels * PATCH**2 + latent_dim, widths[0], 3, padding=1)])
        down, skipped, before = [first], [widths[0]], widths[0]
        for level, out in enumerate(widths):
            for _ in range(num_blocks):
                down.append(_stage(before, time_width, out, 2**level))
                skipped.append(out)
                before = out
            if level + 1 < len(widths):
                down.append(Stage([Downsample(out)]))
                skipped.append(out)
        self.input_blocks = nn.ModuleList(down)
        self.middle_block = Stage(
            [ResBlock(before, time_width, before), SpatialAttention(before), ResBlock(before, time_width, before)]
        )
        up = []
        for level, out in reversed(list(enumerate(widths))):
            for i in range(num_blocks + 1):
                stage = _stage(before + skipped.pop(), time_width, out, 2**level)
                if level and i == num_blocks:
                    stage.append(Upsample(out))
                up.append(stage)
                before = out
        self.output_blocks = nn.ModuleList(up)
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, before), nn.SiLU(), _zeroed(nn.Conv2d(before, channels * PATCH**2, 3, padding=1))
        )

    def forward(self, noisy: Tensor, timesteps: Tensor, codes: Tensor, masked: Tensor | None = None) -> Tensor:
        """Timesteps int64 (B,); where `masked` (B, h, w) is true, the decoder does not see the code."""
        if masked is not None:
            codes = codes.masked_fill(masked[:, None], 0.0)
        time = self.time_embed(sinusoids(timesteps, self.width))
        # Channel, row, column within a patch is pixel_shuffle's order.
        x = F.pixel_unshuffle(noisy, PATCH)
        x = torch.cat([x, F.interpolate(codes, x.shape[-2:], mode="nearest")], dim=1)
        kept = []
        for block in self.input_blocks:
            x = block(x, time)
            kept.append(x)
        x = self.middle_block(x, time)
        for block in self.output_blocks:
            x = block(torch.cat([x, kept.pop()], dim=1), time)
        return F.pixel_shuffle(self.out(x), PATCH)


def _stage(channels: int, time_width: int, out: int, downsampled: int) -> Stage:
    block = ResBlock(channels, time_width, out)
    return Stage([block, SpatialAttention(out)]) if downsampled in _ATTENDING else Stage([block])


def _zeroed(layer: M) -> M:
    """The layer with all weights zero, so that its branch begins as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
