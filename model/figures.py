"""What a loss measures beside itself: figures that stay on the device until they are logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Figure = float | Tensor
"""A number, a scalar tensor, or a tensor (2,) of a total and a weight, whose mean over batches is total / weight."""

Figures = Mapping[str, Figure]
Read = dict[str, tuple[float, float]]
"""Figures on the host, each a total and a weight."""


def detached(figures: Figures) -> dict[str, Figure]:
    """The same figures without the graph they were computed in."""
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in figures.items()}


def read(batches: Sequence[Figures]) -> list[Read]:
    """The figures of each batch on the host; of all tensors together, one wait for the device."""
    tensors = [value for figures in batches for value in figures.values() if isinstance(value, Tensor)]
    wrong = [tuple(value.shape) for value in tensors if value.numel() != 1 and value.shape != (2,)]
    if wrong:
        raise ValueError(f"a figure of shape {wrong[0]}, expected a scalar, or (2,): total and weight")
    flat = iter(torch.cat([value.detach().reshape(-1).float() for value in tensors]).tolist() if tensors else ())
    out: list[Read] = []
    for figures in batches:
        held: Read = {}
        for name, value in figures.items():
            if isinstance(value, Tensor):
                total = next(flat)
                held[name] = (total, next(flat) if value.shape == (2,) else 1.0)
            else:
                held[name] = (float(value), 1.0)
        out.append(held)
    return out


def means(batches: Sequence[Read]) -> dict[str, float]:
    """The mean of each figure over the batches that have it, by their weights; none where those add up to 0."""
    out = {}
    for name in dict.fromkeys(name for held in batches for name in held):
        pairs = [held[name] for held in batches if name in held and held[name][1]]
        if pairs:
            out[name] = sum(total for total, _ in pairs) / sum(weight for _, weight in pairs)
    return out


def not_finite(batch: Read) -> list[str]:
    """The names of the figures of a batch that are infinite or no number."""
    return [name for name, (total, weight) in batch.items() if weight and not math.isfinite(total)]
