"""Packed tokens: one Arrow file a shard, memory-mapped, one row a key; see docs/token-format.md.

Every random choice of ml-4m's serialisation (crop, caption, palette, orders, query points) is left to whoever reads.
"""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataengine import _packed_rows, _packing, modalities, stored_images
from dataengine._mapped import Mapped
from dataengine.modalities import TextLike

FORMAT = 2
_KINDS = ("tokens", "pixels", "images", "sequence", "embeddings")
_METADATA = b"dataengine.tokens"
_BLOCK = 1 << 22
_SHA256 = re.compile(r"([0-9a-f]{64})?")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One modality of a packed shard, under the name that a model knows it by.

    tokens: uint16 (n_crops, max_tokens) a row. pixels: uint8 (n_crops, side, side, 3). images: the bytes of a JPEG or a
    PNG and its crops, which give the same pixels when they are read. sequence: variants x pieces of numbers 0..65535,
    which the modality `codec` (the column itself if "") assembles to ids. embeddings: a variant is float16 (rows, dim),
    at most `max_tokens` rows.

    `choice` says whether a variant belongs to a crop or any will do; of columns of one `draw` the same one is taken.
    `tokenizer` is the sha256 of the file that made the ids (of the text tokenizer for a sequence) and `network` that of
    the one that made numbers a text quotes, or the embeddings; "" where there was none or it is not known. A trainer
    refuses to mix two. `grid` is the shape of the tokens of one value, `side` that of a crop in pixels, 0 for a vector.
    """

    name: str
    kind: Literal["tokens", "pixels", "images", "sequence", "embeddings"]
    max_tokens: int
    vocab_size: int = 0
    side: int = 0
    grid: tuple[int, ...] = ()
    dim: int = 0
    codec: str = ""
    choice: Literal["crop", "any"] = "any"
    draw: str = ""
    chunked: bool = False
    tokenizer: str = ""
    network: str = ""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"{self.name}: kind {reprlib.repr(self.kind)}, expected one of {', '.join(_KINDS)}")
        if self.choice not in ("crop", "any"):
            raise ValueError(f"{self.name}: choice {reprlib.repr(self.choice)}, expected crop or any")
        needed = {"pixels": "side", "images": "side", "embeddings": "dim"}.get(self.kind, "max_tokens")
        for field in ("max_tokens", "vocab_size", "side", "dim"):
            value = getattr(self, field)
            if type(value) is not int or value < (1 if field in (needed, "max_tokens") else 0):
                raise ValueError(f"{self.name}: {field} {reprlib.repr(value)}, expected a whole number for {self.kind}")
        if self.grid and (not all(type(n) is int for n in self.grid) or np.prod(self.grid) != self.max_tokens):
            raise ValueError(f"{self.name}: grid {reprlib.repr(self.grid)}, expected {self.max_tokens} tokens")
        for field in ("tokenizer", "network"):
            if _SHA256.fullmatch(getattr(self, field)) is None:
                raise ValueError(f"{self.name}: {field} {reprlib.repr(getattr(self, field))}, expected a sha256")

    @property
    def source(self) -> TextLike:
        """The modality whose pieces a sequence holds; ValueError when there is none."""
        codec = modalities.load(self.codec or self.name)
        if not isinstance(codec, TextLike):
            raise ValueError(f"{self.name}: {codec.name} is no modality that is read as text")
        return codec


def write(columns: Sequence[Column], num_crops: int, keys: Sequence[str], rows: Mapping[str, Iterable[Any]]) -> bytes:
    """The file of `pieces` of `build`, in one piece."""
    return b"".join(pieces(build(columns, num_crops, keys, rows)))


def build(
    columns: Sequence[Column], num_crops: int, keys: Sequence[str], rows: Mapping[str, Iterable[Any]]
) -> pa.RecordBatch:
    """The rows, in key order; `rows[column]` gives a value or None (no valid label) for each key.

    Each is gone through once, in the order of the columns: an iterator need not hold what it gave, nor begin early.
    """
    schema = _schema(columns, num_crops)
    arrays = [
        pa.array(keys, pa.string()),
        *(_packing.array_of(c, _arrow_type(c, num_crops), num_crops, keys, rows[c.name]) for c in columns),
    ]
    return pa.record_batch(arrays, schema=schema)


def pieces(batch: pa.RecordBatch) -> list[memoryview]:
    """The Arrow IPC file of a batch, to be written one by one: what is large are views of the batch, not copies."""
    sink = _packing.Pieces()
    with pa.ipc.new_file(pa.PythonFile(sink, "w"), batch.schema) as writer:
        writer.write_batch(batch)
    return sink.parts


def _schema(columns: Sequence[Column], num_crops: int) -> pa.Schema:
    about = {"format": FORMAT, "num_crops": num_crops, "columns": [dataclasses.asdict(c) for c in columns]}
    fields = [pa.field("key", pa.string()), *(pa.field(c.name, _arrow_type(c, num_crops)) for c in columns)]
    return pa.schema(fields, metadata={_METADATA: json.dumps(about, sort_keys=True).encode()})


def _arrow_type(column: Column, num_crops: int) -> pa.DataType:
    if column.kind == "tokens":
        return pa.list_(pa.uint16(), num_crops * column.max_tokens)
    if column.kind == "pixels":
        return pa.list_(pa.uint8(), num_crops * column.side**2 * 3)
    if column.kind == "images":
        crops = pa.list_(pa.int32(), num_crops * 5)
        return pa.struct([pa.field("image", pa.large_binary()), pa.field("crops", crops)])
    if column.kind == "embeddings":
        return pa.list_(pa.list_(pa.list_(pa.float16(), column.dim)))
    return pa.list_(pa.list_(pa.list_(pa.uint16())))


def columns_of(batch: pa.RecordBatch) -> tuple[int, list[Column]]:
    """(number of crops, columns) that a record batch says it has; ValueError when it has others."""
    try:
        about = json.loads((batch.schema.metadata or {}).get(_METADATA, b"{}"))
        found = about.get("format")
        if found != FORMAT:
            again = ": `dataengine pack` makes it anew" if found == 1 else ""
            raise ValueError(f"token format {reprlib.repr(found)}, expected {FORMAT}{again}")
        columns = [Column(**{**c, "grid": tuple(c["grid"])}) for c in about["columns"]]
        num_crops = about["num_crops"]
        if type(num_crops) is not int or num_crops < 1:
            raise ValueError(f"num_crops {reprlib.repr(num_crops)}, expected at least 1")
        expected = _schema(columns, num_crops)
    except (pa.ArrowException, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"no packed shard: {type(error).__name__}: {error}") from error
    if not batch.schema.equals(expected):
        raise ValueError(f"columns {batch.schema.to_string()!r:.300}, expected {expected.to_string()!r:.300}")
    return num_crops, columns


def check(data: bytes | memoryview | pa.RecordBatch) -> tuple[str, ...]:
    """The keys of a packed shard in memory, a file or its rows; ValueError when it is not what `packed.write` makes.

    An id that has no word is an error too. What modalities draw by an `assemble` of their own is drawn once for each
    variant, for its ids are only known then.
    """
    try:
        batch = data if isinstance(data, pa.RecordBatch) else _only_batch(data)
        batch.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"no packed shard: {type(error).__name__}: {error}") from error
    num_crops, columns = columns_of(batch)
    for column in columns:
        values = batch.column(column.name)
        if column.kind == "tokens":
            _check_ids(column, pc.max(values.flatten()).as_py())
        elif column.kind == "images":
            _check_images(column, values, num_crops, batch.column("key"))
        elif column.kind in ("sequence", "embeddings"):
            _check_variants(column, values, num_crops)
    return tuple(map(str, batch.column("key").to_pylist()))


def _only_batch(data: bytes | memoryview) -> pa.RecordBatch:
    with pa.ipc.open_file(pa.BufferReader(data)) as reader:
        if reader.num_record_batches != 1:
            raise ValueError(f"{reader.num_record_batches} record batches, expected 1")
        return reader.get_batch(0)


def _check_ids(column: Column, largest: int | None) -> None:
    if column.vocab_size and largest is not None and largest >= column.vocab_size:
        raise ValueError(f"{column.name}: id {largest}, expected less than {column.vocab_size}")


def _check_images(column: Column, values: pa.StructArray, num_crops: int, keys: pa.StringArray) -> None:
    read = _packed_rows.images(column, values, num_crops)
    for index, (key, valid) in enumerate(zip(keys.to_pylist(), values.is_valid().to_pylist(), strict=True)):
        try:
            if valid:
                stored_images.check(*read(index))
        except ValueError as error:
            raise ValueError(f"{column.name} of {key}: {error}") from error


def _check_variants(column: Column, values: pa.ListArray, num_crops: int) -> None:
    counts = set(pc.list_value_length(values.drop_null()).to_pylist())
    if column.choice == "crop" and not counts <= {num_crops}:
        raise ValueError(f"{column.name}: {max(counts)} variants in a row, expected one for each of {num_crops} crops")
    variants = values.flatten()
    pieces = variants.flatten()
    if variants.null_count or pieces.null_count or pieces.flatten().null_count:
        raise ValueError(f"{column.name}: a null within a row, expected none")
    if column.kind == "embeddings":
        longest = pc.max(pc.list_value_length(variants)).as_py() or 0
        if longest > column.max_tokens:
            raise ValueError(f"{column.name}: {longest} rows, expected at most {column.max_tokens}")
        numbers = pieces.flatten().to_numpy(zero_copy_only=False)
        if not all(np.isfinite(numbers[i : i + _BLOCK]).all() for i in range(0, len(numbers), _BLOCK)):
            raise ValueError(f"{column.name}: expected finite numbers")
        return
    codec = column.source
    if type(codec).assemble is TextLike.assemble:
        _check_ids(column, pc.max(pieces.flatten()).as_py())
        return
    rng = np.random.default_rng(0)
    for variant in variants:
        try:
            parts = codec.assemble(variant.as_py(), rng)
            largest = max((int(i) for part in parts for i in part), default=None)
            smallest = min((int(i) for part in parts for i in part), default=0)
        except (ValueError, IndexError, TypeError, OverflowError, ZeroDivisionError) as error:
            raise ValueError(f"{column.name}: {codec.name} cannot be assembled: {error}") from error
        _check_ids(column, largest)
        if smallest < 0:
            raise ValueError(f"{column.name}: id {smallest}, expected at least 0")


class Packed:
    """A packed shard, memory-mapped: random access to rows without reading the others; ValueError when it is none."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            self._file = Mapped(self.path)
            self._table = pa.ipc.open_file(pa.BufferReader(self._file.buffer)).get_batch(0)
            self.num_crops, columns = columns_of(self._table)
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        self.columns = {c.name: c for c in columns}
        self._readers: dict[str, _packed_rows.Reader] = {}
        self._tables: dict[tuple[str, ...], np.ndarray] = {}

    def __reduce__(self) -> tuple[type[Packed], tuple[str]]:
        return Packed, (self.path,)

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

        tokens: int64 (max_tokens,); pixels: uint8 (side, side, 3); images: a `StoredImage`, which is that once it is
        read; sequence: list of at most max_tokens ids, or of all pieces when chunked; embeddings: float16 (rows, dim).
        Pixels and embeddings are views of the file.
        """
        # A scalar of `random` takes a tenth of the time of one of `integers`.
        chosen = int(rng.random() * self.num_crops) if crop is None else crop
        if not (0 <= index < self._table.num_rows and 0 <= chosen < self.num_crops):
            raise IndexError(
                f"row {index} under crop {chosen}: {self.path} has {len(self)} rows, {self.num_crops} crops"
            )
        draws: _packed_rows.Draws = {}
        readers = self._readers
        out: dict[str, Any] = {}
        for name in names:
            reader = readers.get(name)
            if reader is None:
                reader = readers[name] = _packed_rows.reader(
                    self.columns[name], self._table.column(name), self.num_crops
                )
            out[name] = reader(index, chosen, rng, draws)
        self._file.note_read()
        return out

    def present(self, names: Sequence[str]) -> np.ndarray:
        """bool (rows, names), read-only: where `row` gives a value, known without reading any.

        Of a row with embeddings of several captions, some of which are empty, an empty one may be drawn all the same.
        """
        return self._known(_packed_rows.present, np.bool_, names)

    def lengths(self, names: Sequence[str]) -> np.ndarray:
        """int32 (rows, names), read-only: what `row` gives at most: ids, rows of embeddings, pixels; 0 where nothing.

        Known without reading values, and exact where a row has one variant (or one a crop of equal lengths) that is
        read as it lies there. What a modality draws by an `assemble` of its own (poses, SAM instances) is only known
        when it is drawn: it counts as `max_tokens`, the most there can be.
        """
        return self._known(_packed_rows.lengths, np.int32, names)

    def _known(self, what: Callable[..., np.ndarray], dtype: type[np.generic], names: Sequence[str]) -> np.ndarray:
        place = (what.__name__, *names)
        if place not in self._tables:
            found = np.empty((len(self), len(names)), dtype)
            for i, name in enumerate(names):
                found[:, i] = what(self.columns[name], self._table.column(name))
            found.flags.writeable = False
            self._tables[place] = found
        return self._tables[place]
