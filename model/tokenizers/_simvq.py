"""SimVQ (Zhu et al. 2024): a codebook that stays as it was drawn, moved as a whole by one learned linear layer.

A gradient step moves every code, also those that no latent chose, so none dies and none is replaced.
N vectors, V codes, L latent width, h w the token grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.tokenizers._nearest import smallest_distance


class SimVQ(nn.Module):
    """Latents (B, L, h, w) to the nearest codes, ids (B, h, w), and the loss that pulls both together (a scalar)."""

    codes: Tensor

    def __init__(self, codebook_size: int, latent_dim: int, *, commitment_weight: float, seed: int) -> None:
        super().__init__()
        self.vocab_size = codebook_size
        self.heads = 1
        self.commitment_weight = commitment_weight
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randn(codebook_size, latent_dim, generator=generator) * latent_dim**-0.5
        self.register_buffer("codes", codes)
        self.proj = nn.Linear(latent_dim, latent_dim)

    def lookup(self, ids: Tensor) -> Tensor:
        """The codes (B, L, h, w) of ids (B, h, w)."""
        with torch.autocast(ids.device.type, enabled=False):
            return self.proj(F.embedding(ids, self.codes)).permute(0, 3, 1, 2)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In float32 throughout; in training the gradient passes the codes unchanged."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            z_NL = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
            ids_N = smallest_distance(z_NL, self.proj(self.codes).detach())
            ids = ids_N.view(latents.shape[0], *latents.shape[2:])
            # Again only the chosen rows: their gradient is all there is, and (N, L) is far less than (V, L).
            codes = self.lookup(ids)
            if not self.training:
                return codes, latents.new_zeros(()), ids
            loss = F.mse_loss(codes, latents.detach()) + self.commitment_weight * F.mse_loss(latents, codes.detach())
            return latents + (codes - latents).detach(), loss, ids
