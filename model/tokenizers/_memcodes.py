"""ml-4m's quantizer "memcodes": codes chosen by attention, taught by gradients through a hard Gumbel softmax.

Jang et al. 2017 and Maddison et al. 2017 for the Gumbel softmax. B batch, H heads, N vectors, V codes, K head width,
h w the token grid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.tokenizers._nearest import largest_product


class _PerHead(nn.Module):
    """A square matrix for each head, without bias; (H, V, K) to (H, V, K)."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        bound = math.sqrt(3 / width)  # keeps the variance
        self.weight = nn.Parameter(torch.empty(heads, width, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Each head by its own matrix."""
        return x @ self.weight


class Memcodes(nn.Module):
    """Latents (B, L, h, w) to values (B, L, h, w) of codes, and ids (B, h, w), or (B, H, h, w) of several heads.

    Each head sees its share of the channels and has codes of its own. The loss is 0: only the reconstruction teaches.
    In training the choice is random, by Gumbel noise from torch's own generator.
    """

    def __init__(self, codebook_size: int, latent_dim: int, *, heads: int = 1, temperature: float = 1.0) -> None:
        super().__init__()
        if latent_dim % heads:
            raise ValueError(f"latent_dim {latent_dim}, expected a multiple of the {heads} codebooks")
        self.vocab_size = codebook_size
        self.heads = heads
        self.temperature = temperature
        self.codes = nn.Parameter(torch.randn(heads, codebook_size, latent_dim // heads))
        self.to_k = _PerHead(heads, latent_dim // heads)
        self.to_v = _PerHead(heads, latent_dim // heads)

    def lookup(self, ids: Tensor) -> Tensor:
        """The values (B, L, h, w) of ids (B, h, w) or (B, H, h, w)."""
        with torch.autocast(ids.device.type, enabled=False):
            return self._values(ids if self.heads > 1 else ids[:, None], self.to_v(self.codes))

    def _values(self, ids_BHhw: Tensor, values_HVK: Tensor) -> Tensor:
        rows = [F.embedding(ids_BHhw[:, head], values_HVK[head]) for head in range(self.heads)]
        return torch.cat(rows, dim=-1).permute(0, 3, 1, 2)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In float32 throughout; in evaluation the largest logit chooses."""
        with torch.autocast(latents.device.type, enabled=False):
            B, L, h, w = latents.shape
            queries_BHNK = latents.float().reshape(B, self.heads, L // self.heads, h * w).transpose(2, 3)
            queries_BHNK = queries_BHNK * (L // self.heads) ** -0.5
            keys_HVK, values_HVK = self.to_k(self.codes), self.to_v(self.codes)
            if self.training:
                logits_BHNV = queries_BHNK @ keys_HVK.transpose(1, 2)
                chosen_BHNV = F.gumbel_softmax(logits_BHNV, tau=self.temperature, dim=-1, hard=True)
                ids_BHhw = chosen_BHNV.argmax(dim=-1).view(B, self.heads, h, w)
                out = (chosen_BHNV @ values_HVK).transpose(2, 3).reshape(B, L, h, w)
            else:
                parts = [
                    largest_product(queries_BHNK[:, head].flatten(0, 1), keys_HVK[head]) for head in range(self.heads)
                ]
                ids_BHhw = torch.stack([ids_N.view(B, h, w) for ids_N in parts], dim=1)
                out = self._values(ids_BHhw, values_HVK)
            ids = ids_BHhw if self.heads > 1 else ids_BHhw[:, 0]
            return out, latents.new_zeros((), dtype=torch.float32), ids
