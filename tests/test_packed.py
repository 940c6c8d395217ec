"""Packed shards: what is written is what is read, under the crop that was asked for."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dataengine import packed
from dataengine.packed import Column, Packed

COLUMNS = (
    Column(name="tok_depth@16", kind="tokens", max_tokens=4, vocab_size=100, tokenizer="a" * 64),
    Column(name="rgb@16", kind="pixels", max_tokens=256, side=16),
    Column(name="metadata", kind="sequence", max_tokens=40, vocab_size=5000, choice="any", shuffle=True, chunked=True),
    Column(name="det", kind="sequence", max_tokens=40, vocab_size=5000, choice="crop"),
)


def written(tmp_path: Path) -> tuple[Packed, dict[str, list[object]]]:
    rng = np.random.default_rng(0)
    rows: dict[str, list[object]] = {
        "tok_depth@16": [rng.integers(0, 100, (2, 4)).astype(np.uint16), None, np.zeros((2, 4), np.uint16)],
        "rgb@16": list(rng.integers(0, 256, (3, 2, 16, 16, 3), np.uint8)),
        "metadata": [[[[1, 2], [3, 4], [5, 6]]], [[[7, 8]]], None],
        "det": [[[[10, 11]], [[12]]], [[[]], [[13]]], [[[14]], [[15]]]],
    }
    path = tmp_path / "shard.arrow"
    path.write_bytes(packed.write(COLUMNS, 2, ["a", "b", "c"], rows))
    return Packed(path), rows


def test_rows_come_back_under_the_crop_asked_for(tmp_path: Path) -> None:
    shard, rows = written(tmp_path)
    rng = np.random.default_rng(1)
    names = [c.name for c in COLUMNS]
    assert shard.keys == ["a", "b", "c"]
    for crop in (0, 1):
        row = shard.row(0, rng, names, crop=crop)
        assert np.array_equal(row["tok_depth@16"], rows["tok_depth@16"][0][crop])  # type: ignore[index]
        assert np.array_equal(row["rgb@16"], rows["rgb@16"][0][crop])  # type: ignore[index]
        assert row["det"] == [[10, 11], [12]][crop]
    assert shard.row(1, rng, names, crop=0)["tok_depth@16"] is None
    assert shard.row(2, rng, names, crop=0)["metadata"] is None
    assert shard.row(1, rng, ["det"], crop=0)["det"] == []


def test_shuffled_pieces_are_all_there_in_every_order(tmp_path: Path) -> None:
    shard, _ = written(tmp_path)
    rng = np.random.default_rng(2)
    seen = {tuple(map(tuple, shard.row(0, rng, ["metadata"])["metadata"])) for _ in range(60)}
    assert len(seen) == 6
    assert all(sorted(order) == [(1, 2), (3, 4), (5, 6)] for order in seen)


def test_equal_rows_are_equal_bytes_and_a_shard_travels_by_its_path(tmp_path: Path) -> None:
    shard, rows = written(tmp_path)
    assert packed.write(COLUMNS, 2, ["a", "b", "c"], rows) == Path(shard.path).read_bytes()
    again = pickle.loads(pickle.dumps(shard))
    assert len(again) == 3
    assert again.columns == {c.name: c for c in COLUMNS}


def test_wrong_shapes_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tok_depth@16: expected \(2, 4\), got \(1, 4\)"):
        packed.write(COLUMNS[:1], 2, ["a"], {"tok_depth@16": [np.zeros((1, 4), np.uint16)]})
    path = tmp_path / "other.arrow"
    table = pa.table({"x": [1]})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="token format None, expected 1"):
        Packed(path)
