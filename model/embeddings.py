"""One encoder and one decoder embedding per kind of modality; parameter names are those of ml-4m's checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.spec import PAD, ModalitySpec

# T kept tokens of one modality over the whole batch, D width

NUM_SEQUENCE_POSITIONS = 512


# ImageNet statistics of images in 0..1: what ml-4m feeds the model with.
RGB_MEAN = (0.485, 0.456, 0.406)
RGB_STD = (0.229, 0.224, 0.225)


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

    def content_and_table(self, ids_T: Tensor) -> tuple[Tensor, Tensor | None]:
        """Content (T, D), and the table (V, D) to make logits with if that is the same: both get one gradient."""
        plain = type(self.token_emb) is nn.Embedding and type(self.to_logits) is nn.Linear  # no adapter in between
        table = self.to_logits.weight
        if plain and table is self.token_emb.weight and not torch.compiler.is_compiling():
            return _Lookup.apply(table, ids_T, self.token_emb.padding_idx)
        return self.content(ids_T), None


class _Lookup(torch.autograd.Function):
    """Rows of a table, and the table itself for further use, whose gradient takes those of the rows in place.

    Autograd would make a second gradient as large as the table, zero but for a few rows, and add the two.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids_T: Tensor, unmoved: int | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids_T)
        ctx.unmoved = unmoved
        return F.embedding(ids_T, table), table.view_as(table)

    @staticmethod
    def backward(ctx: Any, rows_TD: Tensor, table_VD: Tensor) -> tuple[Tensor, None, None]:
        (ids_T,) = ctx.saved_tensors
        if ctx.unmoved is not None:
            rows_TD = rows_TD.masked_fill((ids_T == ctx.unmoved)[:, None], 0)
        return table_VD.index_add_(0, ids_T, rows_TD), None, None


class PixelEmbedding(Embedding):
    """A linear map of patches, flattened as row, column, channel; uint8 are normalised with ImageNet's statistics."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModalitySpec, dim: int) -> None:
        super().__init__(spec, dim)
        for name, values in (("mean", RGB_MEAN), ("std", RGB_STD)):
            self.register_buffer(name, 255 * torch.tensor(values).repeat(spec.patch_size**2), persistent=False)
        self.proj = nn.Linear(spec.channels * spec.patch_size**2, dim, bias=False)

    def content(self, patches: Tensor, rows_T: Tensor) -> Tensor:
        """(T, D) of the named rows of `patches` (K, p*p*C): uint8, or float that is normalised already."""
        chosen = patches.index_select(0, rows_T)
        if chosen.dtype == torch.uint8:
            chosen = (chosen - self.mean) / self.std
        return self.proj(chosen)


class VectorEmbedding(Embedding):
    """A linear map of given vectors, such as T5 embeddings of a caption; a masked span is the zero vector."""

    def __init__(self, spec: ModalitySpec, dim: int) -> None:
        super().__init__(spec, dim)
        self.emb_proj = nn.Linear(spec.dim_in, dim)

    def content(self, vectors: Tensor, rows_T: Tensor) -> Tensor:
        """(T, D) of the named rows of `vectors` (K, dim_in); row -1 is a masked span."""
        mapped = self.emb_proj(vectors.to(self.emb_proj.weight.dtype))
        masked = self.emb_proj.bias[None].to(mapped.dtype)  # what the zero vector is mapped to
        return torch.cat([masked, mapped]).index_select(0, rows_T + 1)


def encoder_embedding(spec: ModalitySpec, dim: int) -> Embedding:
    """The encoder embedding of a kind."""
    kinds = {"pixels": PixelEmbedding, "tokens": IdEmbedding, "sequence": IdEmbedding, "embeddings": VectorEmbedding}
    return kinds[spec.kind](spec, dim)
