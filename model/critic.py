"""A critic of patches, for `model.adversary` (PatchGAN: Isola et al. 2017; as VQGAN uses it, Esser et al. 2021)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

_WIDEST = 8


class PatchCritic(nn.Module):
    """Maps (B, C, H, W) to one number for each of their overlapping patches, large for what it takes for real.

    `layers` halve the resolution: 3 see patches of 70 pixels. Norms are of groups and not of batches: a critic that
    judges real and made maps apart must not tell them by the company they are in, and has no statistics to synchronise.
    """

    def __init__(self, channels: int, *, width: int = 64, layers: int = 3, seed: int = 0) -> None:
        super().__init__()
        if layers < 1 or width < 4:
            raise ValueError(f"a critic of {layers} layers and {width} channels, expected at least 1 and 4")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
            before = width
            for i in range(1, layers + 1):
                after = width * min(2**i, _WIDEST)
                stride = 2 if i < layers else 1
                parts += [nn.Conv2d(before, after, 4, stride, 1), nn.GroupNorm(4, after), nn.LeakyReLU(0.2)]
                before = after
            parts.append(nn.Conv2d(before, 1, 4, 1, 1))
            self.net = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (B, 1, h, w)."""
        # oneDNN's bfloat16 convolutions return wrong values on CPUs with AMX (seen with torch 2.15).
        with torch.autocast("cpu", enabled=False) if x.device.type == "cpu" else nullcontext():
            judged: Tensor = self.net(x.float() if x.device.type == "cpu" else x)
        return judged.float()
