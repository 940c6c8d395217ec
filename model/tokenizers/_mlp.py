"""The bottleneck MLP of tokenizers of vectors (Bachmann et al. 2023, Scaling MLPs), with ml-4m's parameter names.

B batch, C channels, D width, h w places.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

_NAME = re.compile(r"BottleneckMLP/B_(\d+)-Wi_(\d+)(?:-[A-Za-z]+_(\d+))?")


def is_mlp(name: str) -> bool:
    """Whether an `enc_type` or `dec_type` asks for an MLP, as ml-4m tells."""
    return "MLP" in name


def mlp_size(name: str) -> tuple[int, int, int]:
    """Number of blocks, width and expansion of `BottleneckMLP/B_<blocks>-Wi_<width>[-E_<expansion, else 4>]`."""
    found = _NAME.fullmatch(name)
    if not found or not all(int(part) for part in found.groups() if part):
        raise ValueError(f"{name!r}, expected BottleneckMLP/B_<blocks>-Wi_<width>, such as BottleneckMLP/B_6-Wi_1024")
    return int(found[1]), int(found[2]), int(found[3] or 4)


class _Wide(nn.Module):
    """Two linear layers with a wide middle."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class BottleneckMLP(nn.Module):
    """Pre-norm residual blocks between two linear layers, every place alone: (B, C, h, w) to as many other channels.

    Its norms have torch's epsilon 1e-5, unlike those of the ViT. Sums are of the norms' precision: float32 under
    autocast, where what a layer adds is rounded and what it is added to is not.
    """

    def __init__(self, channels_in: int, channels_out: int, size: tuple[int, int, int]) -> None:
        super().__init__()
        depth, dim, expansion = size
        self.linear_in = nn.Linear(channels_in, dim)
        self.linear_out = nn.Linear(dim, channels_out)
        self.blocks = nn.ModuleList(_Wide(dim, expansion * dim) for _ in range(depth))
        self.layernorms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        h, w = x.shape[-2:]
        x_BND = self.linear_in(x.flatten(2).transpose(1, 2)).to(self.layernorms[0].weight.dtype)
        for block, norm in zip(self.blocks, self.layernorms, strict=True):
            x_BND = x_BND + block(norm(x_BND))
        return self.linear_out(x_BND).transpose(1, 2).unflatten(2, (h, w))
