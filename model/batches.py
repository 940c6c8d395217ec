"""Packed shards to masked batches: a weighted mixture of datasets, each batch a pure function of (seed, number)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from dataengine.packed import Column
from dataengine.stored import Shard
from model import masking, mixture, order
from model.embeddings import RGB_MEAN, RGB_STD
from model.masking import MaskedBatch, MaskingConfig
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
    """The packed shards of one dataset, and how its samples are drawn.

    `weight` is its part in the samples of a mixture. `masking` is its own mixture of alphas (None: that of the run).
    A sample is drawn `repeats` times in a row, with another crop (if there is one) and masked anew. `window` shards are
    mixed together at a time (0: all; what is read of an epoch is spread over as many files).
    """

    shards: tuple[Shard, ...]
    weight: float = 1.0
    masking: MaskingConfig | None = None
    repeats: int = 1
    window: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight {self.weight} of {self.name}, expected a number above 0")
        if self.repeats < 1 or self.window < 0:
            raise ValueError(
                f"repeats {self.repeats}, window {self.window} of {self.name}, expected at least 1 and at least 0"
            )

    @property
    def name(self) -> str:
        """Where it lies, for people."""
        return f"the dataset of {self.shards[0].path}" if self.shards else "a dataset without shards"

    def __len__(self) -> int:
        return sum(map(len, self.shards))


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
    """Called with its number, a masked batch: a pure function of the seed and the number, in whatever process.

    Batch n has samples n * batch_size and on of the mixture. Each dataset is gone through in epochs, in an order of its
    own (`model.order`). Budgets are drawn first, and only what they select is read and decoded. A modality that a
    dataset lacks, or that is not valid for a sample, is absent: it takes no token budget.

    ValueError when there is a dataset without samples, or a mixture that selects nothing (`model.mixture.problems`).
    """

    datasets: tuple[PackedDataset, ...]
    specs: tuple[ModalitySpec, ...]
    masking: MaskingConfig
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size}, expected at least 1")
        problems = mixture.problems(self.datasets, self.specs, self.masking)
        if problems:
            raise ValueError("; ".join(problems))
        _ = self._mixture  # says at once what cannot be mixed

    def __getstate__(self) -> dict[str, Any]:
        # What a process knows of an epoch is quickly made again: workers are sent what was given alone.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _mixture(self) -> mixture.Mixture:
        return mixture.Mixture(self.datasets, self.specs, self.masking, self.seed)

    def __call__(self, number: int) -> MaskedBatch:
        """Batch `number`, counted from 0."""
        rng = np.random.default_rng(order.batch_seeds(self.seed, number))
        rows = self._mixture.rows(number * self.batch_size, self.batch_size)
        values: list[dict[str, Any]] = [{} for _ in range(self.batch_size)]
        lengths = None
        whole = np.zeros(len(self.specs), bool)
        if self._mixture.masking.redistribute:
            # How long a text is knows only who reads it: texts and embeddings are read before their budgets are drawn.
            whole = np.array([not spec.is_grid for spec in self.specs])
            rows.read(rng, rows.present & whole, values)
            lengths = masking.lengths(self.specs, values)
        plan = self._mixture.plan(rng, rows, lengths)
        rows.read(rng, plan.needs(self.specs) & ~whole, values)
        return masking.apply(rng, plan, values, self.specs, self._mixture.masking)
