"""Pack: the token columns, the text-like columns and the pixels of a shard into one Arrow file a trainer can map."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from dataengine import modalities, packed, shards
from dataengine.geometry import crops_of
from dataengine.manifest import Commit, Dataset
from dataengine.modalities import TextLike
from dataengine.packed import Column
from dataengine.shards import shard_name
from dataengine.work import CellReport, Report, Task, Work

CELL = "tokens"
"""The name under which packed shards are committed."""


@dataclass(frozen=True)
class Pack:
    """The packing worker. `pixels` is the side of the images the model reads beside their tokens, 0 for none."""

    root: str
    text_tokenizer: str
    columns: tuple[Column, ...]
    pixels: int

    def start(self, device: str) -> Work:
        """Load the text tokenizer."""
        from model.tokenizers.text import TextTokenizer

        dataset, text = Dataset(self.root), TextTokenizer.load(Path(self.text_tokenizer))
        return lambda task: _pack_shard(dataset, self.columns, text, task)


def prepare(dataset: Dataset, text_tokenizer: str, pixels: int) -> tuple[Pack, list[Task]]:
    """What there is to pack: every complete, meaningful token and text column of the dataset, by shard.

    Columns that come from random weights are left out: nothing is trained on them. So are versions (`depth@v2`): a
    model reads one column of a modality; `dataengine rename` says which.
    """
    digest = hashlib.sha256(Path(text_tokenizer).read_bytes()).hexdigest()
    ingested = set(dataset.committed("rgb"))
    names = [
        m
        for m in dataset.modalities()
        if set(dataset.committed(m)) >= ingested
        and not is_random(dataset, m)
        and m != CELL
        and not modalities.split(m)[1]
    ]
    columns = [c for m in names for c in _columns(dataset, m, digest, text_tokenizer, pixels)]
    tasks = []
    for shard in sorted(ingested):
        identity = json.dumps([vars(c) for c in columns], sort_keys=True)
        inputs = json.dumps([(m, _record(dataset, m, shard).sha256) for m in names])
        spec = hashlib.sha256((identity + inputs).encode()).hexdigest()
        there = dataset.commit(CELL, shard)
        if there is not None and there.spec != spec:
            dataset.uncommit(CELL, shard)  # it is derived and quick to make: a stale one is made anew
        if there is None or there.spec != spec:
            tasks.append(Task(shard, {CELL: spec}))
    return Pack(dataset.store.url, text_tokenizer, tuple(columns), pixels), tasks


def is_random(dataset: Dataset, modality: str) -> bool:
    """Whether a column was computed, directly or through its inputs, by a network with random weights."""
    return any(_record(dataset, modality, s).provenance.get("random", False) for s in dataset.committed(modality)[:1])


def _columns(dataset: Dataset, modality: str, text_sha: str, text_tokenizer: str, pixels: int) -> list[Column]:
    from model.tokenizers.text import TextTokenizer

    if modality == "rgb" and pixels:
        return [Column(name=f"rgb@{pixels}", kind="pixels", max_tokens=pixels**2, side=pixels)]
    codec = modalities.load(modality)
    if isinstance(codec, TextLike):
        return [
            Column(
                name=modality,
                kind="sequence",
                max_tokens=codec.max_tokens,
                vocab_size=TextTokenizer.load(Path(text_tokenizer)).vocab_size,
                choice=codec.choice,
                shuffle=codec.shuffle,
                chunked=codec.chunked,
                tokenizer=text_sha,
            )
        ]
    if codec.kind == "tokens":
        made_by = _record(dataset, modality, dataset.committed(modality)[0]).provenance
        vocab = made_by["vocab_size"]
        tokens = made_by["num_tokens"]
        return [
            Column(
                name=modality,
                kind="tokens",
                max_tokens=tokens,
                vocab_size=vocab,
                tokenizer=made_by["weights"]["sha256"],
            )
        ]
    return []


def _record(dataset: Dataset, modality: str, shard: int) -> Commit:
    record = dataset.commit(modality, shard)
    assert record is not None
    return record


def _pack_shard(dataset: Dataset, columns: Sequence[Column], text: Any, task: Task) -> Report:
    began = perf_counter()
    keys = dataset.keys(task.shard)
    images = [modalities.load("rgb").decode(m.data) for m in dataset.read("rgb", task.shard)]
    crops = [
        crops_of(modalities.load("crop_settings").decode(m.data)) for m in dataset.read("crop_settings", task.shard)
    ]
    rows: dict[str, list[Any]] = {}
    for column in columns:
        if column.kind == "pixels":
            codec = modalities.load("rgb")
            rows[column.name] = [
                np.stack([codec.crop(image, crop, image.shape[:2], column.side) for crop in crops[i]])
                for i, image in enumerate(images)
            ]
            continue
        codec = modalities.load(column.name)
        invalid = _record(dataset, column.name, task.shard).invalid
        values = [codec.decode(m.data) for m in dataset.read(column.name, task.shard)]
        rows[column.name] = [
            None if key in invalid else _row(codec, column, value, crops[i], images[i].shape[:2], text)
            for i, (key, value) in enumerate(zip(keys, values, strict=True))
        ]
    data = packed.write(columns, dataset.plan.num_crops, keys, rows)
    record = Commit(
        modality=CELL,
        shard=task.shard,
        spec=task.specs[CELL],
        file=f"{CELL}/{shard_name(task.shard)}.arrow",
        num_bytes=len(data),
        sha256=shards.sha256(data),
        num_samples=len(keys),
        keys_sha256=shards.keys_sha256(keys),
        provenance={"columns": [c.name for c in columns]},
    )
    dataset.publish(record, data)
    seconds = perf_counter() - began
    return Report(task.shard, (CellReport(CELL, len(keys), 0, len(data), seconds),), seconds)


def _row(codec: Any, column: Column, value: Any, crops: Any, size: tuple[int, int], text: Any) -> Any:
    if column.kind == "tokens":
        return value
    variants = codec.variants(value, crops, size)
    # An empty text (no caption, no box) is a valid label only where its grammar has a word for "nothing".
    return [[text.encode(p) if isinstance(p, str) else p for p in pieces] for pieces in variants] or None
