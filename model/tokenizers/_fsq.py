"""Finite scalar quantization (Mentzer et al. 2023): each channel is rounded to a few levels; there is no codebook.

B batch, L latent width, D quantized channels, h w the token grid.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

_MOST_LEVELS, _FEWEST_LEVELS = 8, 5


def levels_of(codebook_size: int) -> tuple[int, ...]:
    """Numbers of levels, 5 to 8 each as the paper advises, with the largest product up to `codebook_size`.

    Among equals those with the fewest channels, then the largest first: (8, 5, 5, 5) for 1024. A size up to 8 is one
    channel.
    """
    if codebook_size < 2:
        raise ValueError(f"codebook_size {codebook_size}, expected at least 2")
    if codebook_size <= _MOST_LEVELS:
        return (codebook_size,)
    most = int(math.log(codebook_size, _FEWEST_LEVELS) + 1e-9)
    every = range(_MOST_LEVELS, _FEWEST_LEVELS - 1, -1)
    found = [c for d in range(1, most + 1) for c in itertools.combinations_with_replacement(every, d)]
    return max((c for c in found if math.prod(c) <= codebook_size), key=math.prod)


class FSQ(nn.Module):
    """Latents (B, L, h, w) to rounded codes (B, L, h, w), ids (B, h, w) and a loss of 0.

    A linear layer takes the L channels to the D quantized ones and another takes them back, unless L is D. The
    vocabulary is the product of the levels, a little under the size asked for. The least significant digit of an id is
    the first channel.
    """

    counts: Tensor

    def __init__(self, codebook_size: int, latent_dim: int) -> None:
        super().__init__()
        self.levels = levels_of(codebook_size)
        self.vocab_size = math.prod(self.levels)
        self.heads = 1
        own = latent_dim == len(self.levels)
        self.project_in = nn.Identity() if own else nn.Linear(latent_dim, len(self.levels))
        self.project_out = nn.Identity() if own else nn.Linear(len(self.levels), latent_dim)
        self.radix = tuple(math.prod(self.levels[:i]) for i in range(len(self.levels)))
        # Not of whole numbers: a moving average of the weights takes the buffers along, and would round them down.
        self.register_buffer("counts", torch.tensor(self.levels, dtype=torch.float32), persistent=False)

    def lookup(self, ids: Tensor) -> Tensor:
        """The codes (B, L, h, w) of ids (B, h, w)."""
        digits = [ids // radix % count - count // 2 for radix, count in zip(self.radix, self.levels, strict=True)]
        with torch.autocast(ids.device.type, enabled=False):
            return self._merged(torch.stack(digits, dim=-1).float())

    def _merged(self, steps_BhwD: Tensor) -> Tensor:
        """Steps from the middle level, -(counts // 2) and up, as codes in [-1, 1] through the last layer."""
        return self.project_out(steps_BhwD / (self.counts // 2)).permute(0, 3, 1, 2)

    def _bounded(self, z_BhwD: Tensor) -> Tensor:
        """Squashed so that rounding gives exactly the levels; 0 stays 0."""
        half = (self.counts - 1) * (1 - 1e-3) / 2
        offset = torch.where(self.counts % 2 == 0, 0.5, 0.0)
        return torch.tanh(z_BhwD + torch.atanh(offset / half)) * half - offset

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In float32 throughout; the gradient passes the rounding unchanged."""
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self._bounded(self.project_in(latents.float().permute(0, 2, 3, 1)))
            steps = bounded + (bounded.round() - bounded).detach()
            digits = (steps.detach().round() + self.counts // 2).long().unbind(dim=-1)
            ids = torch.stack([radix * digit for radix, digit in zip(self.radix, digits, strict=True)]).sum(dim=0)
            return self._merged(steps), latents.new_zeros((), dtype=torch.float32), ids
