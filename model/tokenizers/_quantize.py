"""A codebook on the unit sphere, learned by moving averages (van den Oord et al. 2017; ViT-VQGAN, Yu et al. 2022).

N vectors, V codes, L latent width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Usage(NamedTuple):
    """How a codebook is used: the number of codes seen, and exp of the entropy of their frequencies."""

    codes: int
    perplexity: float


def usage(ids: Iterable[Tensor], codebook_size: int) -> Usage:
    """Statistics of tensors of ids in [0, codebook_size)."""
    counts = torch.zeros(codebook_size)
    for part in ids:
        counts += torch.bincount(part.flatten().cpu(), minlength=codebook_size)
    p = counts / counts.sum().clamp(min=1)
    entropy = -(p * p.clamp(min=1e-12).log()).sum()
    return Usage(int((counts > 0).sum()), float(entropy.exp()))


class Codebook(nn.Module):
    """The codes (V, L) and their running counts; buffers named as in ml-4m's checkpoints."""

    initted: Tensor
    cluster_size: Tensor
    embed: Tensor

    def __init__(self, codebook_size: int, latent_dim: int, decay: float, dead_threshold: float, seed: int) -> None:
        super().__init__()
        self.decay = decay
        self.dead_threshold = dead_threshold
        # On the CPU whatever the device, so that a seed means the same codes everywhere.
        self.generator = torch.Generator().manual_seed(seed)
        embed = torch.empty(codebook_size, latent_dim)
        nn.init.kaiming_uniform_(embed, generator=self.generator)
        self.register_buffer("initted", torch.ones(1))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed", F.normalize(embed, dim=-1))

    def nearest(self, z_NL: Tensor) -> Tensor:
        """The ids (N,) of the codes with the largest cosine to unit vectors; the first of equals."""
        return (z_NL @ F.normalize(self.embed, dim=-1).T).argmax(dim=-1)

    @torch.no_grad()
    def update(self, z_NL: Tensor, ids_N: Tensor) -> None:
        """Move every used code towards the mean direction of its unit vectors, then replace the dead codes."""
        counts_V = torch.bincount(ids_N, minlength=len(self.embed)).to(z_NL.dtype)
        self.cluster_size.mul_(self.decay).add_(counts_V, alpha=1 - self.decay)
        sums_VL = torch.zeros_like(self.embed).index_add_(0, ids_N, z_NL)
        mean_VL = F.normalize(sums_VL / counts_V.clamp(min=1)[:, None], dim=-1)
        target_VL = torch.where(counts_V[:, None] > 0, mean_VL, F.normalize(self.embed, dim=-1))
        self.embed.mul_(self.decay).add_(target_VL, alpha=1 - self.decay)
        self._replace_dead(z_NL)

    def _replace_dead(self, z_NL: Tensor) -> None:
        """Set codes used less than the threshold to random vectors of the batch; their counts stay, as in ml-4m."""
        dead = (self.cluster_size < self.dead_threshold).nonzero().flatten()
        if not len(dead):
            return
        if len(z_NL) >= len(dead):
            rows = torch.randperm(len(z_NL), generator=self.generator)[: len(dead)]
        else:
            rows = torch.randint(0, len(z_NL), (len(dead),), generator=self.generator)
        self.embed[dead] = z_NL[rows.to(z_NL.device)]


class Quantizer(nn.Module):
    """Latents (B, L, h, w) to the nearest codes, their ids (B, h, w) and the commitment loss (a scalar)."""

    def __init__(
        self,
        codebook_size: int,
        latent_dim: int,
        *,
        decay: float,
        dead_threshold: float,
        commitment_weight: float,
        norm_latents: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.commitment_weight = commitment_weight
        self.norm_latents = norm_latents
        self._codebook = Codebook(codebook_size, latent_dim, decay, dead_threshold, seed)

    def lookup(self, ids: Tensor) -> Tensor:
        """The codes (B, L, h, w) of ids (B, h, w); stored rows, at most of length 1 because averaging shortens them."""
        return F.embedding(ids, self._codebook.embed).permute(0, 3, 1, 2)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In float32 throughout; in training the gradient passes the codes unchanged and the codebook learns."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            if self.norm_latents:
                latents = F.normalize(latents, dim=1)
            z_NL = F.normalize(latents.detach().permute(0, 2, 3, 1).flatten(0, 2), dim=-1)
            ids_N = self._codebook.nearest(z_NL)
            ids = ids_N.view(latents.shape[0], *latents.shape[2:])
            codes = self.lookup(ids)
            if not self.training:
                return codes, latents.new_zeros(()), ids
            # Looked up before the update: the loss belongs to the codes that the decoder sees.
            commitment = self.commitment_weight * F.mse_loss(latents, codes)
            self._codebook.update(z_NL, ids_N)
            return latents + (codes - latents).detach(), commitment, ids
