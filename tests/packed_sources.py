"""Small packed datasets, written directly: what a trainer reads, without the labels it would be made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dataengine import packed, shards
from dataengine.manifest import Commit, Dataset
from dataengine.packed import Column
from model.fourm import FourMConfig
from model.loop import LoopConfig
from model.masking import MaskingConfig, MixtureComponent
from pipelines.pack import CELL
from pipelines.train import Source, TrainFourM

DEPTH = Column(
    name="tok_depth@64", kind="tokens", max_tokens=16, vocab_size=32, side=64, grid=(4, 4), tokenizer="a" * 64
)
SEMSEG = replace(DEPTH, name="tok_semseg@64", vocab_size=24, tokenizer="b" * 64)
GLOBAL = Column(name="tok_dinov2_global", kind="tokens", max_tokens=4, vocab_size=16, grid=(4,), tokenizer="c" * 64)
CAPTION = Column(name="caption", kind="sequence", max_tokens=12, vocab_size=240, tokenizer="d" * 64)
COLUMNS = (DEPTH, SEMSEG, GLOBAL, CAPTION)
ROWS = 24


def values(columns: Sequence[Column], rows: int = ROWS, seed: int = 0) -> dict[str, list[Any]]:
    """For each row a number 0..3, which every modality tells: tokens are it and the place, a text is its word."""
    kinds = np.random.default_rng(seed).integers(0, 4, rows).tolist()
    out: dict[str, list[Any]] = {}
    for column in columns:
        if column.kind == "tokens":
            places = np.arange(column.max_tokens)
            out[column.name] = [
                ((places // 2 + kind * 3) % column.vocab_size).astype(np.uint16)[None] for kind in kinds
            ]
        else:
            out[column.name] = [[[[210 + kind, 214 + kind, 218 + kind]]] for kind in kinds]
    return out


def write(
    root: Path, columns: Sequence[Column] = COLUMNS, rows: Mapping[str, Sequence[Any]] | None = None, shard: int = 0
) -> Path:
    """Commit a packed shard; its rows are `values` unless given."""
    held = values(columns, seed=shard) if rows is None else rows
    keys = [f"{shard:03}-{i:03}" for i in range(len(next(iter(held.values()))))]
    data = packed.write(columns, 1, keys, held)
    return publish(root, data, keys, shard)


def publish(root: Path, data: bytes, keys: Sequence[str], shard: int = 0) -> Path:
    """Commit the bytes of a packed shard."""
    dataset, file = Dataset(root), f"{CELL}/shard-{shard:05}.arrow"
    record = Commit(
        modality=CELL, shard=shard, spec="0" * 64, file=file, num_bytes=len(data), sha256=shards.sha256(data),
        num_samples=len(keys), keys_sha256=shards.keys_sha256(keys),
    )  # fmt: skip
    dataset.publish(record, data)
    return root / file


def run(
    root: Path, out: Path, names: Sequence[str] = tuple(c.name for c in COLUMNS), steps: int = 12, **changes: Any
) -> TrainFourM:
    """A tiny model that goes from any of these modalities to any."""
    alphas = dict.fromkeys(names, 1.0)
    recipe = TrainFourM(
        data=(Source(root=str(root)),), inputs=tuple(names), outputs=tuple(names), batch_size=4, out=str(out),
        model=replace(FourMConfig.preset("nano"), dim=32, encoder_depth=1, decoder_depth=1, num_heads=2),
        masking=MaskingConfig(
            components=(MixtureComponent(input_alphas=alphas, target_alphas=alphas),),
            input_tokens=(12, 12), target_tokens=(12, 12),
        ),
        loop=LoopConfig(
            steps=steps, lr=1e-2, warmup_steps=2, log_every=4, checkpoint_every=20, threads=1, progress=False
        ),
    )  # fmt: skip
    return replace(recipe, **changes)
