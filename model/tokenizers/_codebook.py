"""Codebooks learned by moving averages (van den Oord et al. 2017), on the unit sphere (Yu et al. 2022) or not.

With the formulas, the order of random draws and the buffer names of ml-4m's `quantize_lucid.py`.
N vectors, V codes, L latent width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.tokenizers import _sync
from model.tokenizers._nearest import largest_product, smallest_distance

Replacement = Literal["batch_random", "linde_buzo_gray"]

_KMEANS_STEPS = 10
_SMOOTHING = 1e-5
_SPLIT = 1e-10


class Codebook(nn.Module):
    """Codes (V, L) compared by cosine, and their running counts.

    A code drifts below unit length, because averaging unit vectors shortens them: `embed` holds the codes as the
    decoder sees them. Replaced codes keep their counts, so they are drawn again until the average passes the
    threshold. In a run of several processes all see the same codebook, that of one process with the joined batch.
    """

    initted: Tensor
    cluster_size: Tensor
    embed: Tensor

    def __init__(
        self,
        codebook_size: int,
        latent_dim: int,
        decay: float,
        dead_threshold: float,
        seed: int,
        *,
        replacement: Replacement = "batch_random",
        kmeans_init: bool = False,
    ) -> None:
        super().__init__()
        if replacement not in ("batch_random", "linde_buzo_gray"):
            raise ValueError(f"code_replacement_policy {replacement!r}, expected batch_random or linde_buzo_gray")
        self.decay = decay
        self.dead_threshold = dead_threshold
        self.replacement = replacement
        self.kmeans_init = kmeans_init
        # On the CPU whatever the device, so that a seed means the same codes everywhere.
        self.generator = torch.Generator().manual_seed(seed)
        embed = torch.zeros(codebook_size, latent_dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed, generator=self.generator)
        self.register_buffer("initted", torch.tensor([0.0 if kmeans_init else 1.0]))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed", self._placed(embed))

    def _placed(self, x: Tensor) -> Tensor:
        """Vectors as this codebook compares them: here on the unit sphere."""
        return F.normalize(x, dim=-1)

    def _unit(self, z_NL: Tensor) -> Tensor:
        """Compared vectors at unit length, which they have here."""
        return z_NL

    def _closest(self, z_NL: Tensor, codes_VL: Tensor) -> Tensor:
        return largest_product(z_NL, codes_VL)

    def assign(self, x_NL: Tensor) -> tuple[Tensor, Tensor]:
        """The ids (N,) of the nearest codes, the first of equals, and the vectors as they were compared (N, L).

        In training the first batch makes the codes where k-means is asked for.
        """
        z_NL = self._placed(x_NL)
        if self.kmeans_init and not bool(self.initted):
            if not self.training:
                raise ValueError("kmeans_init without a first batch, expected a training step or loaded weights before")
            self._start(z_NL)
        return self._closest(z_NL, self._placed(self.embed)), z_NL

    def nearest(self, x_NL: Tensor) -> Tensor:
        """The ids (N,) of `assign`."""
        return self.assign(x_NL)[0]

    @torch.no_grad()
    def update(self, z_NL: Tensor, ids_N: Tensor) -> None:
        """Move every used code towards the mean direction of its unit vectors, then replace the dead codes."""
        counts_V, sums_VL = self._sums(z_NL, ids_N)
        self.cluster_size.mul_(self.decay).add_(counts_V, alpha=1 - self.decay)
        mean_VL = F.normalize(sums_VL / counts_V.clamp(min=1)[:, None], dim=-1)
        target_VL = torch.where(counts_V[:, None] > 0, mean_VL, F.normalize(self.embed, dim=-1))
        self.embed.mul_(self.decay).add_(target_VL, alpha=1 - self.decay)
        self._replace_dead(z_NL)

    def _sums(self, z_NL: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """Counts (V,) and sums (V, L) of the vectors of each code, over all processes."""
        counts_V = torch.bincount(ids_N, minlength=len(self.embed)).to(z_NL.dtype)
        sums_VL = torch.zeros_like(self.embed).index_add_(0, ids_N, z_NL)
        return _sync.total(counts_V), _sync.total(sums_VL)

    def _replace_dead(self, z_NL: Tensor) -> None:
        """Set codes used less than the threshold to unit vectors of the batch, or to copies of the most used codes."""
        dead = (self.cluster_size < self.dead_threshold).nonzero().flatten()
        if not len(dead):
            return
        if self.replacement == "batch_random":
            drawn = _sync.sample(self._unit(z_NL), len(dead), self.generator)
        else:
            # Stable, so that equals are the same everywhere; ml-4m leaves their order to the processor.
            used = self.cluster_size.argsort(descending=True, stable=True)[: len(dead)]
            noise = torch.randn(len(used), self.embed.shape[1], generator=self.generator).to(used.device)
            drawn = _sync.of_first(F.normalize(self.embed[used] + _SPLIT * noise, dim=-1))
        self.embed[dead] = drawn

    @torch.no_grad()
    def _start(self, z_NL: Tensor) -> None:
        """Lloyd's k-means from random vectors of the batch; empty clusters keep their centre."""
        self.embed.copy_(_sync.sample(z_NL, len(self.embed), self.generator))
        for _ in range(_KMEANS_STEPS):
            counts_V, sums_VL = self._sums(z_NL, self._closest(z_NL, self.embed))
            mean_VL = self._placed(sums_VL / counts_V.clamp(min=1)[:, None])
            self.embed.copy_(torch.where(counts_V[:, None] > 0, mean_VL, self.embed))
        self.cluster_size.copy_(counts_V)
        self.initted.fill_(1)


class EuclideanCodebook(Codebook):
    """Codes (V, L) compared by distance: running sums over smoothed running counts.

    As in ml-4m a replaced code is a unit vector whatever the length of the latents, and its running sum stays, so the
    next step moves it back unless latents chose it.
    """

    embed_avg: Tensor

    def __init__(
        self,
        codebook_size: int,
        latent_dim: int,
        decay: float,
        dead_threshold: float,
        seed: int,
        *,
        replacement: Replacement = "batch_random",
        kmeans_init: bool = False,
    ) -> None:
        super().__init__(
            codebook_size, latent_dim, decay, dead_threshold, seed, replacement=replacement, kmeans_init=kmeans_init
        )
        self.register_buffer("embed_avg", self.embed.clone())

    def _placed(self, x: Tensor) -> Tensor:
        return x

    def _unit(self, z_NL: Tensor) -> Tensor:
        return F.normalize(z_NL, dim=-1)

    def _closest(self, z_NL: Tensor, codes_VL: Tensor) -> Tensor:
        return smallest_distance(z_NL, codes_VL)

    @torch.no_grad()
    def update(self, z_NL: Tensor, ids_N: Tensor) -> None:
        """Set the codes to the averages of their vectors (Laplace-smoothed counts), then replace the dead codes."""
        counts_V, sums_VL = self._sums(z_NL, ids_N)
        self.cluster_size.mul_(self.decay).add_(counts_V, alpha=1 - self.decay)
        self.embed_avg.mul_(self.decay).add_(sums_VL, alpha=1 - self.decay)
        num = self.cluster_size.sum()
        smoothed_V = (self.cluster_size + _SMOOTHING) / (num + len(self.embed) * _SMOOTHING) * num
        self.embed.copy_(self.embed_avg / smoothed_V[:, None])
        self._replace_dead(z_NL)

    def _start(self, z_NL: Tensor) -> None:
        super()._start(z_NL)
        self.embed_avg.copy_(self.embed)
