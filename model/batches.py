"""Packed shards to masked batches: a weighted mixture of datasets, each batch a pure function of (seed, step)."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dataengine.packed import Column
from dataengine.stored import Shard
from model.embeddings import RGB_MEAN, RGB_STD
from model.masking import MaskedBatch, MaskingConfig, collate, mask_sample
from model.spec import ModalitySpec


def normalised(pixels: np.ndarray) -> np.ndarray:
    """uint8 (..., h, w, 3) to float32 (..., 3, h, w) with ImageNet's mean and deviation."""
    scaled = (pixels.astype(np.float32) / 255 - np.array(RGB_MEAN, np.float32)) / np.array(RGB_STD, np.float32)
    return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))


def spec_of(column: Column, patch_size: int) -> ModalitySpec:
    """The model's view of a packed column; `patch_size` is used for pixels."""
    if column.kind == "pixels" or column.kind == "images":
        side, rest = divmod(column.side, patch_size)
        if rest:
            raise ValueError(f"{column.name}: {column.side} pixels are no multiple of the patch size {patch_size}")
        return ModalitySpec(name=column.name, kind="pixels", max_tokens=side**2, patch_size=patch_size)
    if column.kind == "embeddings":
        return ModalitySpec(name=column.name, kind="embeddings", max_tokens=column.max_tokens, dim_in=column.dim)
    return ModalitySpec(
        name=column.name,
        kind=column.kind,
        max_tokens=column.max_tokens,
        vocab_size=column.vocab_size,
        chunked=column.chunked,
        # Tokens of a vector lie on no grid, and neither does what is no square.
        learned_positions=column.kind == "tokens" and (not column.side or len(set(column.grid)) > 1),
    )


@dataclass(frozen=True)
class PackedDataset:
    """The packed shards of one dataset, and how often a sample is drawn from it."""

    shards: tuple[Shard, ...]
    weight: float = 1.0

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @cached_property
    def ends(self) -> list[int]:
        """Where each shard ends in the rows of all."""
        return list(itertools.accumulate(len(s) for s in self.shards))


def merged_columns(datasets: Sequence[PackedDataset]) -> dict[str, Column]:
    """The columns of all datasets by name; ValueError when two hold ids of different tokenizers under one name."""
    merged: dict[str, Column] = {}
    for dataset in datasets:
        for shard in dataset.shards:
            for name, column in shard.columns.items():
                known = merged.setdefault(name, column)
                if known != column:
                    other = [field for field, value in vars(column).items() if value != getattr(known, field)]
                    said = "; ".join(f"{f} {getattr(column, f)!r:.20}, not {getattr(known, f)!r:.20}" for f in other)
                    raise ValueError(
                        f"{name} of {shard.path} was made by another tokenizer or layout than {name} elsewhere "
                        f"({said}): tokenise and pack both with the same one"
                    )
    return merged


@dataclass(frozen=True, kw_only=True)
class TokenBatches:
    """Called with a step, the masked batch of that step; samples are drawn with replacement, as ml-4m's shards are.

    A modality that a dataset lacks, or that is not valid for a sample, is absent: it takes no token budget.
    """

    datasets: tuple[PackedDataset, ...]
    specs: tuple[ModalitySpec, ...]
    masking: MaskingConfig
    batch_size: int
    seed: int

    def __call__(self, step: int) -> MaskedBatch:
        """The batch of a step."""
        rng = np.random.default_rng([self.seed, step])
        weights = np.array([d.weight for d in self.datasets])
        chosen = rng.choice(len(self.datasets), self.batch_size, p=weights / weights.sum())
        samples = [mask_sample(rng, self._sample(self.datasets[d], rng), self.specs, self.masking) for d in chosen]
        return collate(samples, self.specs, self.masking.input_tokens[1], self.masking.target_tokens[1])

    def _sample(self, dataset: PackedDataset, rng: np.random.Generator) -> dict[str, Any]:
        ends = dataset.ends
        index = int(rng.integers(ends[-1]))
        place = bisect.bisect_right(ends, index)
        shard = dataset.shards[place]
        names = [s.name for s in self.specs if s.name in shard.columns]
        row = shard.row(index - (ends[place] - len(shard)), rng, names)
        return {
            name: normalised(value) if value is not None and shard.columns[name].kind in ("pixels", "images") else value
            for name, value in row.items()
        }
