"""Packed tokens: one Arrow file a shard, memory-mapped, one row a key; see docs/token-format.md.

Every random choice of ml-4m's serialisation (crop, palette size, order of metadata) is left to the reader's generator.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

FORMAT = 1
_METADATA = b"dataengine.tokens"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One modality of a packed shard.

    tokens: uint16 (n_crops, max_tokens) a row. pixels: uint8 (n_crops, side, side, 3). sequence: variants x pieces of
    uint16 ids, `choice` saying whether a variant belongs to a crop or any will do. `tokenizer` is the sha256 of what
    made the ids: a trainer refuses to mix two.
    """

    name: str
    kind: Literal["tokens", "pixels", "sequence"]
    max_tokens: int
    vocab_size: int = 0
    side: int = 0
    choice: Literal["crop", "any"] = "crop"
    shuffle: bool = False
    chunked: bool = False
    tokenizer: str = ""


def write(columns: Sequence[Column], num_crops: int, keys: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> bytes:
    """An Arrow IPC file of the rows, in key order; `rows[column]` has a value or None (no valid label) for each key."""
    arrays = [pa.array(keys, pa.string()), *(_array(c, num_crops, rows[c.name]) for c in columns)]
    fields = [pa.field("key", pa.string()), *(pa.field(c.name, _arrow_type(c, num_crops)) for c in columns)]
    about = {"format": FORMAT, "num_crops": num_crops, "columns": [dataclasses.asdict(c) for c in columns]}
    schema = pa.schema(fields, metadata={_METADATA: json.dumps(about, sort_keys=True).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _arrow_type(column: Column, num_crops: int) -> pa.DataType:
    if column.kind == "tokens":
        return pa.list_(pa.uint16(), num_crops * column.max_tokens)
    if column.kind == "pixels":
        return pa.list_(pa.uint8(), num_crops * column.side**2 * 3)
    return pa.list_(pa.list_(pa.list_(pa.uint16())))


def _array(column: Column, num_crops: int, values: Sequence[Any]) -> pa.Array:
    kind = _arrow_type(column, num_crops)
    if column.kind == "sequence":
        return pa.array(values, kind)
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    shape = (num_crops, column.max_tokens) if column.kind == "tokens" else (num_crops, column.side, column.side, 3)
    # A null keeps its place in the values, so that they can be viewed as one dense array.
    flat = np.zeros((len(values), *shape), dtype)
    for row, value in zip(flat, values, strict=True):
        if value is not None:
            if value.shape != shape:
                raise ValueError(f"{column.name}: expected {shape}, got {value.shape}")
            row[...] = value
    missing = pa.array([value is None for value in values], pa.bool_())
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), type=kind, mask=missing)


def check(data: bytes | memoryview) -> tuple[str, ...]:
    """The keys of a packed shard in memory; ValueError when it is not what `write` makes, or an id has no word.

    `Packed` trusts its file for the sake of speed: what others have made is held to this first.
    """
    try:
        with pa.ipc.open_file(pa.BufferReader(data)) as reader:
            if reader.num_record_batches != 1:
                raise ValueError(f"{reader.num_record_batches} record batches, expected 1")
            batch = reader.get_batch(0)
        batch.validate(full=True)
        about = json.loads((batch.schema.metadata or {}).get(_METADATA, b"{}"))
        if about.get("format") != FORMAT:
            raise ValueError(f"token format {about.get('format')}, expected {FORMAT}")
        columns = [Column(**c) for c in about["columns"]]
        fields = [pa.field(c.name, _arrow_type(c, int(about["num_crops"]))) for c in columns]
    except (pa.ArrowException, OSError, TypeError, KeyError) as error:
        raise ValueError(f"no packed shard: {type(error).__name__}: {error}") from error
    expected = pa.schema([pa.field("key", pa.string()), *fields])
    if not batch.schema.equals(expected):
        raise ValueError(f"columns {batch.schema.to_string()!r:.300}, expected {expected.to_string()!r:.300}")
    for column in columns:
        ids = batch.column(column.name).flatten()
        if column.kind == "sequence":
            ids = ids.flatten().flatten()
        largest = pc.max(ids).as_py()
        if column.kind != "pixels" and column.vocab_size and largest is not None and largest >= column.vocab_size:
            raise ValueError(f"{column.name}: id {largest}, expected less than {column.vocab_size}")
    return tuple(map(str, batch.column("key").to_pylist()))


class Packed:
    """A packed shard, memory-mapped: random access to rows without reading the others."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        about = json.loads((self._table.schema.metadata or {}).get(_METADATA, b"{}"))
        if about.get("format") != FORMAT:
            raise ValueError(f"{path}: token format {about.get('format')}, expected {FORMAT}")
        self.num_crops = int(about["num_crops"])
        self.columns = {c["name"]: Column(**c) for c in about["columns"]}

    def __reduce__(self) -> tuple[type[Packed], tuple[str]]:
        return Packed, (self.path,)

    @cached_property
    def _table(self) -> pa.RecordBatch:
        return pa.ipc.open_file(pa.memory_map(self.path)).get_batch(0)

    @cached_property
    def _dense(self) -> dict[str, np.ndarray]:
        """Zero-copy views of the fixed-size columns: (rows, n_crops, ...)."""
        views = {}
        for column in self.columns.values():
            if column.kind != "sequence":
                array = self._table.column(column.name)
                flat = array.values.to_numpy(zero_copy_only=True)
                shape = (-1,) if column.kind == "tokens" else (column.side, column.side, 3)
                views[column.name] = flat.reshape(len(self), self.num_crops, *shape)
        return views

    @cached_property
    def _valid(self) -> dict[str, np.ndarray]:
        return {name: self._table.column(name).is_valid().to_numpy(zero_copy_only=False) for name in self.columns}

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @cached_property
    def keys(self) -> list[str]:
        """The keys, in order."""
        keys: list[str] = self._table.column("key").to_pylist()
        return keys

    def row(
        self, index: int, rng: np.random.Generator, names: Sequence[str], crop: int | None = None
    ) -> dict[str, Any]:
        """The named modalities of a row under one crop (drawn unless given): None where there is no valid label.

        tokens: int64 (max_tokens,); pixels: uint8 (side, side, 3); sequence: list of ids, or of pieces when chunked.
        """
        chosen = int(rng.integers(self.num_crops)) if crop is None else crop
        out: dict[str, Any] = {}
        for name in names:
            column = self.columns[name]
            if not self._valid[name][index]:
                out[name] = None
            elif column.kind == "tokens":
                out[name] = self._dense[name][index, chosen].astype(np.int64)
            elif column.kind == "pixels":
                out[name] = self._dense[name][index, chosen]
            else:
                out[name] = self._sequence(column, index, chosen, rng)
        return out

    def _sequence(self, column: Column, index: int, crop: int, rng: np.random.Generator) -> list[Any] | None:
        variants: list[list[list[int]]] = self._table.column(column.name)[index].as_py()
        if not variants:
            return None
        pieces = variants[crop if column.choice == "crop" else int(rng.integers(len(variants)))]
        if column.shuffle:
            pieces = [pieces[i] for i in rng.permutation(len(pieces))]
        return pieces if column.chunked else [i for piece in pieces for i in piece]
