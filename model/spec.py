"""What the model needs to know about a modality, and the reserved ids of the text vocabulary."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["pixels", "tokens", "sequence", "embeddings"]

# The first ids of the 4M WordPiece vocabulary; sentinel [S_k] is SENTINEL_0 + k and k runs to NUM_SENTINELS - 1.
PAD, UNK, SOS, EOS, SENTINEL_0 = 0, 1, 2, 3, 4
NUM_SENTINELS = 200


@dataclass(frozen=True, kw_only=True)
class ModalitySpec:
    """The model's view of one modality; `max_tokens` is the grid h*w for pixels and tokens.

    pixels: images, one token a patch, input only. tokens: a grid of codebook ids. sequence: text ids, masked in spans.
    embeddings: rows of `dim_in` numbers, input only. `max_positions` is where a decoder's sequence positions wrap to 0
    (0 means `max_tokens`); ml-4m has one modality, human_poses, where the two differ.
    """

    name: str
    kind: Kind
    max_tokens: int
    vocab_size: int = 0
    patch_size: int = 16
    channels: int = 3
    chunked: bool = False
    learned_positions: bool = False
    dim_in: int = 4096
    max_positions: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("pixels", "tokens", "sequence", "embeddings"):
            raise ValueError(f"{self.name}: kind {self.kind!r}, expected pixels, tokens, sequence or embeddings")
        if self.max_tokens < 1:
            raise ValueError(f"{self.name}: max_tokens {self.max_tokens}, expected at least 1")
        if self.is_target and self.vocab_size < 1:
            raise ValueError(f"{self.name}: vocab_size {self.vocab_size}, expected at least 1")
        if self.is_grid and not self.learned_positions and math.isqrt(self.max_tokens) ** 2 != self.max_tokens:
            raise ValueError(f"{self.name}: max_tokens {self.max_tokens}, expected a square grid for fixed positions")
        # Alternating kept and masked tokens give the most spans, and one more sentinel closes the target.
        if self.kind == "sequence" and (self.max_tokens + 1) // 2 + 1 > NUM_SENTINELS - 1:
            raise ValueError(f"{self.name}: max_tokens {self.max_tokens}, expected at most 396 for 200 sentinels")

    @property
    def is_target(self) -> bool:
        """Whether the decoder can predict it: tokens and sequences."""
        return self.kind in ("tokens", "sequence")

    @property
    def is_grid(self) -> bool:
        """Whether positions are absolute places of a grid: pixels and tokens."""
        return self.kind in ("pixels", "tokens")

    @property
    def side(self) -> int:
        """Rows (and columns) of the grid."""
        return math.isqrt(self.max_tokens)

    @property
    def id(self) -> int:
        """The 15-bit number ml-4m gives a name: SHA-256 modulo 2**15."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 2**15


def union(specs_in: Iterable[ModalitySpec], specs_out: Iterable[ModalitySpec]) -> tuple[ModalitySpec, ...]:
    """Every modality of both sides once, sorted by name; two specs of one name must be equal."""
    merged: dict[str, ModalitySpec] = {}
    for spec in (*specs_in, *specs_out):
        if merged.setdefault(spec.name, spec) != spec:
            raise ValueError(f"{spec.name}: two different specs, {merged[spec.name]} and {spec}")
    return tuple(merged[name] for name in sorted(merged))
