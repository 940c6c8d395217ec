"""ml-4m's quantizer "lucid": the nearest code of a codebook that moving averages teach.

B batch, H heads, N vectors, L latent width, h w the token grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.tokenizers._codebook import Codebook, EuclideanCodebook, Replacement


class Quantizer(nn.Module):
    """Latents (B, L, h, w) to the nearest codes, their ids (B, h, w) and the commitment loss (a scalar).

    With several heads a linear layer makes H latents of each one, all heads share the codebook, and the ids are
    (B, H, h, w).
    """

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
        heads: int = 1,
        norm_codes: bool = True,
        replacement: Replacement = "batch_random",
        kmeans_init: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size = codebook_size
        self.heads = heads
        self.commitment_weight = commitment_weight
        self.norm_latents = norm_latents
        many = heads > 1
        self.project_in = nn.Linear(latent_dim, heads * latent_dim) if many else nn.Identity()
        self.project_out = nn.Linear(heads * latent_dim, latent_dim) if many else nn.Identity()
        kind = Codebook if norm_codes else EuclideanCodebook
        self._codebook = kind(
            codebook_size, latent_dim, decay, dead_threshold, seed, replacement=replacement, kmeans_init=kmeans_init
        )

    def lookup(self, ids: Tensor) -> Tensor:
        """The codes (B, L, h, w) of ids (B, h, w) or (B, H, h, w): stored rows, of any length."""
        with torch.autocast(ids.device.type, enabled=False):
            return self._merged(F.embedding(ids if self.heads > 1 else ids[:, None], self._codebook.embed))

    def _merged(self, codes_BHhwL: Tensor) -> Tensor:
        """The heads side by side, through the last linear layer: (B, L, h, w)."""
        return self.project_out(codes_BHhwL.permute(0, 2, 3, 1, 4).flatten(3)).permute(0, 3, 1, 2)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In float32 throughout; in training the gradient passes the codes unchanged and the codebook learns."""
        with torch.autocast(latents.device.type, enabled=False):
            split_BHhwL = self.project_in(latents.float().permute(0, 2, 3, 1)).unflatten(-1, (self.heads, -1))
            x_BHhwL = split_BHhwL.permute(0, 3, 1, 2, 4)
            if self.norm_latents:
                x_BHhwL = F.normalize(x_BHhwL, dim=-1)
            ids_N, z_NL = self._codebook.assign(x_BHhwL.detach().flatten(0, 3))
            ids_BHhw = ids_N.view(x_BHhwL.shape[:4])
            ids = ids_BHhw if self.heads > 1 else ids_BHhw[:, 0]
            if not self.training:
                return self.lookup(ids), latents.new_zeros((), dtype=torch.float32), ids
            # Looked up before the update: the loss belongs to the codes that the decoder sees.
            codes_BHhwL = F.embedding(ids_BHhw, self._codebook.embed)
            commitment = self.commitment_weight * F.mse_loss(x_BHhwL, codes_BHhwL)
            self._codebook.update(z_NL, ids_N)
            return self._merged(x_BHhwL + (codes_BHhwL - x_BHhwL).detach()), commitment, ids
