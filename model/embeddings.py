"""One encoder and one decoder embedding per kind of modality; parameter names are those of ml-4m's checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.spec import PAD, ModalitySpec

# T kept tokens of one modality over the whole batch, D width

NUM_SEQUENCE_POSITIONS = 512


def sincos_1d(num: int, dim: int) -> Tensor:
    """Fixed positions (1, num, dim): [sin(n w) | cos(n w)], w_i = 10000**(-2i/dim) (Vaswani et al. 2017)."""
    angles = torch.arange(num, dtype=torch.float32)[:, None] * _frequencies(dim // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[None]


def sincos_2d(side: int, dim: int) -> Tensor:
    """Fixed positions (1, side*side, dim) of a square raster: sin and cos of the row, then of the column."""
    omega = _frequencies(dim // 4)
    line = torch.arange(side, dtype=torch.float32)
    rows, columns = line.repeat_interleave(side)[:, None] * omega, line.repeat(side)[:, None] * omega
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=1)[None]


def _frequencies(num: int) -> Tensor:
    return 1.0 / (10000.0 ** (torch.arange(num, dtype=torch.float32) / num))


class Embedding(nn.Module):
    """Where a token stands and of which modality it is; subclasses add what it holds."""

    pos_emb: Tensor

    def __init__(self, spec: ModalitySpec, dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.mod_emb = nn.Parameter(torch.zeros(1, 1, dim))
        if spec.learned_positions:
            self.pos_emb = nn.Parameter(torch.zeros(1, spec.max_tokens, dim))
        elif spec.is_grid:
            self.register_buffer("pos_emb", sincos_2d(spec.side, dim))
        else:
            self.register_buffer("pos_emb", sincos_1d(max(NUM_SEQUENCE_POSITIONS, spec.max_tokens), dim))

    def place(self, positions_T: Tensor) -> Tensor:
        """Positional plus modality embedding, (T, D)."""
        return self.pos_emb[0].index_select(0, positions_T) + self.mod_emb[0]


class IdEmbedding(Embedding):
    """A table of ids: tokens and sequences in the encoder."""

    def __init__(self, spec: ModalitySpec, dim: int) -> None:
        super().__init__(spec, dim)
        # PAD keeps whatever row it got and takes no gradient, as in ml-4m.
        self.token_emb = nn.Embedding(spec.vocab_size, dim, padding_idx=PAD if spec.kind == "sequence" else None)

    def content(self, ids_T: Tensor) -> Tensor:
        """(T, D)."""
        return self.token_emb(ids_T)


class TargetEmbedding(IdEmbedding):
    """A table of ids and the projection back onto it: tokens and sequences in the decoder."""

    def __init__(self, spec: ModalitySpec, dim: int, *, tied: bool) -> None:
        super().__init__(spec, dim)
        self.to_logits = nn.Linear(dim, spec.vocab_size, bias=False)
        if tied:
            self.to_logits.weight = self.token_emb.weight


class PixelEmbedding(Embedding):
    """A linear map of patches, flattened as row, column, channel."""

    def __init__(self, spec: ModalitySpec, dim: int) -> None:
        super().__init__(spec, dim)
        self.proj = nn.Linear(spec.channels * spec.patch_size**2, dim, bias=False)

    def content(self, pixels: Tensor, samples_T: Tensor, positions_T: Tensor) -> Tensor:
        """(T, D) of the named patches of `pixels` (B, C, H, W); no other patch is touched."""
        size, side = self.spec.patch_size, self.spec.side
        batch, channels = pixels.shape[:2]
        grid = pixels.reshape(batch, channels, side, size, side, size).permute(0, 2, 4, 3, 5, 1)
        patches = grid[samples_T, positions_T // side, positions_T % side]
        return self.proj(patches.reshape(len(samples_T), -1))


class VectorEmbedding(Embedding):
    """A linear map of given vectors, such as T5 embeddings of a caption; a masked span is the zero vector."""

    def __init__(self, spec: ModalitySpec, dim: int) -> None:
        super().__init__(spec, dim)
        self.emb_proj = nn.Linear(spec.dim_in, dim)

    def content(self, vectors: Tensor, samples_T: Tensor, rows_T: Tensor) -> Tensor:
        """(T, D) of the named rows of `vectors` (B, L, dim_in); row -1 is a masked span."""
        chosen = vectors[samples_T, rows_T.clamp(min=0)]
        return self.emb_proj(chosen * (rows_T >= 0)[:, None])


def encoder_embedding(spec: ModalitySpec, dim: int) -> Embedding:
    """The encoder embedding of a kind."""
    kinds = {"pixels": PixelEmbedding, "tokens": IdEmbedding, "sequence": IdEmbedding, "embeddings": VectorEmbedding}
    return kinds[spec.kind](spec, dim)
