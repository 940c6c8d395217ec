"""The quantizers by the names of ml-4m's settings, and how a codebook is used.

Every quantizer is a module with `forward(latents (B, L, h, w)) -> (codes (B, L, h, w), loss, ids)`,
`lookup(ids) -> codes`, and the numbers `vocab_size` and `heads`. Ids are int64 (B, h, w), or (B, heads, h, w) where
there are several heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.tokenizers._codebook import Codebook
from model.tokenizers._fsq import FSQ
from model.tokenizers._lucid import Quantizer
from model.tokenizers._memcodes import Memcodes
from model.tokenizers._simvq import SimVQ

__all__ = ["FSQ", "NAMES", "Codebook", "Memcodes", "Quantizer", "SimVQ", "Usage", "make", "usage"]

NAMES = ("lucid", "memcodes", "fsq", "simvq")
"""What `quant_type` may be; the first two are ml-4m's."""


def make(config: Any) -> nn.Module:
    """The quantizer of a tokenizer's settings, which have ml-4m's names; settings it lacks have ml-4m's defaults.

    Reads quant_type, codebook_size, num_codebooks, latent_dim, norm_codes, norm_latents, ema_decay,
    threshold_ema_dead_code, code_replacement_policy, commitment_weight, kmeans_init and seed. Layers draw their weights
    from torch's random state, codebooks from `seed`. ValueError for an unknown type, or several codebooks where a
    type has one.
    """
    kind = getattr(config, "quant_type", "lucid")
    size, width, heads = config.codebook_size, config.latent_dim, getattr(config, "num_codebooks", 1)
    if kind not in NAMES:
        raise ValueError(f"quant_type {kind!r}, expected one of {', '.join(NAMES)}")
    if heads < 1 or (heads > 1 and kind not in ("lucid", "memcodes")):
        raise ValueError(f"num_codebooks {heads} of quant_type {kind!r}, expected 1")
    commitment, seed = getattr(config, "commitment_weight", 1.0), getattr(config, "seed", 0)
    if kind == "memcodes":
        return Memcodes(size, width, heads=heads)
    if kind == "fsq":
        return FSQ(size, width)
    if kind == "simvq":
        return SimVQ(size, width, commitment_weight=commitment, seed=seed)
    return Quantizer(
        size,
        width,
        decay=getattr(config, "ema_decay", 0.99),
        dead_threshold=getattr(config, "threshold_ema_dead_code", 0.25),
        commitment_weight=commitment,
        norm_latents=getattr(config, "norm_latents", False),
        seed=seed,
        heads=heads,
        norm_codes=getattr(config, "norm_codes", True),
        replacement=getattr(config, "code_replacement_policy", "batch_random"),
        kmeans_init=getattr(config, "kmeans_init", False),
    )


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
