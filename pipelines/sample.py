"""Samples as a trained model sees them, and what it generates as values again: the two ends of generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataengine import modalities
from dataengine.manifest import Dataset
from dataengine.modalities import TextLike
from dataengine.stored import Shard
from model import tokenizers
from model.batches import normalised
from model.fourm import FourM
from model.generate import Step, generate
from model.tokenizers._vq import VQ
from model.tokenizers.text import TextTokenizer
from pipelines.tokenize import tokenizers_in
from pipelines.tokens import modality_of
from pipelines.train import packed_shards


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of a folder: `text.json` and one `<modality>.safetensors` a map, loaded when first used."""

    folder: str

    @cached_property
    def text(self) -> TextTokenizer:
        """The text tokenizer."""
        return TextTokenizer.load(Path(self.folder) / "text.json")

    @cached_property
    def maps(self) -> dict[str, VQ]:
        """The map tokenizers by modality."""
        return {name: tokenizers.read(path) for name, path in tokenizers_in(self.folder).items()}

    def of(self, column: str) -> VQ:
        """The tokenizer of a token column such as `tok_depth@64`."""
        return self.maps[modality_of(column)[0]]

    def values(self, column: str, ids: Any) -> list[Any]:
        """The values of generated ids: maps for a token column, (value, complaints) for text."""
        if column.startswith("tok_"):
            tokenizer = self.of(column)
            return list(tokenizer.decode_batch(np.asarray(ids).reshape(-1, *tokenizer.grid)))
        codec = modalities.load(column)
        if not isinstance(codec, TextLike):
            raise ValueError(f"{column}: neither tokens nor text")
        return [codec.parse(self.text.decode(sequence)) for sequence in ids]


@dataclass(frozen=True)
class Samples:
    """Samples of a packed dataset under their centre crop, and their true values at the model's resolution."""

    root: str
    shards: tuple[Shard, ...] = field(default=())

    @cached_property
    def _packed(self) -> tuple[Shard, ...]:
        return self.shards or packed_shards(self.root)

    def rows(self, names: Sequence[str], count: int) -> list[dict[str, Any]]:
        """The first `count` samples: raw packed values by name, plus their `key`."""
        rng = np.random.default_rng(0)
        out: list[dict[str, Any]] = []
        for shard in self._packed:
            for i in range(min(len(shard), count - len(out))):
                out.append({"key": shard.keys[i], **shard.row(i, rng, names, crop=0)})
        return out

    def truth(self, modality: str, side: int, count: int) -> list[Any]:
        """The stored labels of the same samples under the same crop: maps (side, side), other values as they are."""
        dataset = Dataset(self.root)
        codec, image = modalities.load(modality), modalities.load("rgb")
        settings = modalities.load("crop_settings")
        out: list[Any] = []
        from dataengine.geometry import crops_of

        for shard in dataset.committed("tokens"):
            columns = (dataset.read(m, shard) for m in (modality, "rgb", "crop_settings"))
            for value, rgb, rows in zip(*columns, strict=True):
                if len(out) == count:
                    return out
                size = image.decode(rgb.data).shape[:2]
                crop = crops_of(settings.decode(rows.data))[0]
                out.append(codec.crop(codec.decode(value.data), crop, size, side))
        return out


def conditions(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Packed rows as the conditions of a batch: pixels normalised, tokens stacked, sequences as lists of ids."""
    out: dict[str, Any] = {}
    for name in names:
        values = [row[name] for row in rows]
        if name.startswith("tok_"):
            out[name] = torch.from_numpy(np.stack(values))
        elif name.startswith("rgb@"):
            out[name] = torch.from_numpy(normalised(np.stack(values)))
        else:
            flat = [v if not v or isinstance(v[0], int) else [i for piece in v for i in piece] for v in values]
            out[name] = flat
    return out


def predict(
    model: FourM,
    rows: Sequence[dict[str, Any]],
    given: Sequence[str],
    steps: Sequence[Step],
    seed: int,
    batch: int = 50,
) -> dict[str, list[Any]]:
    """Generate the targets of `steps` for every row from the given modalities, batch by batch: ids by target."""
    out: dict[str, list[Any]] = {step.target: [] for step in steps}
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        made = generate(model, conditions(part, given), steps, seed=seed + start)
        for name, values in made.items():
            out[name] += list(values) if isinstance(values, list) else list(values.cpu().numpy())
    return out
