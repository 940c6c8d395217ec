"""Reading the columns of a packed shard row by row, for `packed`, and what is known of rows without reading them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dataengine.modalities import TextLike
from dataengine.stored_images import StoredImage, crop_of

if TYPE_CHECKING:
    from dataengine.packed import Column

Draws = dict[str, float]
"""Uniform numbers in 0..1 that columns of one `draw` share, within one read of one row."""

Reader = Callable[[int, int, np.random.Generator, Draws], Any]
"""(row, crop, generator, what was drawn for this row) to a value, None where there is none."""


_ALWAYS_AS_MANY = ("tokens", "pixels", "images")


def reader(column: Column, values: pa.Array, num_crops: int) -> Reader:
    """The reader of a column."""
    make = {"tokens": _dense, "pixels": _dense, "images": _images}.get(column.kind, _variants)
    read = make(column, values, num_crops)
    if not values.null_count:
        return read
    valid: list[bool] = values.is_valid().to_pylist()
    return lambda index, crop, rng, draws: read(index, crop, rng, draws) if valid[index] else None


def present(column: Column, values: pa.Array) -> np.ndarray:
    """bool (rows,): where there is a value."""
    valid: np.ndarray = values.is_valid().to_numpy(zero_copy_only=False)
    if column.kind in _ALWAYS_AS_MANY:
        return valid
    first, last = _ends(values)
    if column.kind == "embeddings":
        # Of captions without any rows there is nothing to read.
        pieces = _array(values.values)
        first, last = pieces[first], pieces[last]
    return valid & (last > first)


def lengths(column: Column, values: pa.Array) -> np.ndarray:
    """int32 (rows,): the most that a row gives."""
    there = present(column, values)
    own = column.kind == "sequence" and type(column.source).assemble is not TextLike.assemble
    if column.kind in _ALWAYS_AS_MANY or own:
        return np.where(there, column.max_tokens, 0)
    pieces = _array(values.values)
    if column.kind == "sequence":
        pieces = _array(values.values.values)[pieces]
    # One more than there is, lest `reduceat` be asked for the variants of a last row that has none.
    each, (first, last) = np.append(np.diff(pieces), 0), _ends(values)
    longest = np.maximum.reduceat(each, first) if len(first) else first
    # A row without variants is given the length of another's by `reduceat`.
    longest = np.where(there & (last > first), longest, 0)
    return longest if column.chunked else np.minimum(longest, column.max_tokens)


def _array(lists: pa.ListArray) -> np.ndarray:
    """int32 (lists + 1,): where each begins, and the last one ends."""
    buffer = lists.buffers()[1]
    return np.frombuffer(buffer, np.int32, len(lists) + 1) if buffer and len(buffer) else np.zeros(1, np.int32)


def _ends(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    ends = _array(lists)
    return ends[:-1], ends[1:]


def _dense(column: Column, values: pa.FixedSizeListArray, num_crops: int) -> Reader:
    shape = (-1,) if column.kind == "tokens" else (column.side, column.side, 3)
    view = values.values.to_numpy(zero_copy_only=True).reshape(len(values), num_crops, *shape)
    if column.kind == "tokens":
        return lambda index, crop, rng, draws: view[index, crop].astype(np.int64)
    return lambda index, crop, rng, draws: view[index, crop]


def _images(column: Column, values: pa.StructArray, num_crops: int) -> Reader:
    read = images(column, values, num_crops)

    def reader(index: int, crop: int, rng: np.random.Generator, draws: Draws) -> StoredImage:
        data, crops = read(index)
        return StoredImage(data, crop_of(crops[crop]), column.side)

    return reader


def images(column: Column, values: pa.StructArray, num_crops: int) -> Callable[[int], tuple[bytes, np.ndarray]]:
    """The function of a row to its image and its crops int32 (n_crops, 5)."""
    data, crops = values.field("image"), values.field("crops")
    ends, flat = _view(data.buffers()[1], "q"), memoryview(data.buffers()[2] or b"")
    view = crops.values.to_numpy(zero_copy_only=True).reshape(len(values), num_crops, 5)
    return lambda index: (bytes(flat[ends[index] : ends[index + 1]]), view[index])


def _variants(column: Column, values: pa.ListArray, num_crops: int) -> Reader:
    variants, pieces = _offsets(values), _offsets(values.values)
    read = (_rows if column.kind == "embeddings" else _pieces)(column, values.values.values)
    by_crop, shared = column.choice == "crop", column.draw

    def reader(index: int, crop: int, rng: np.random.Generator, draws: Draws) -> Any:
        first = variants[index]
        count = variants[index + 1] - first
        if not count:
            return None
        if by_crop:
            if crop >= count:
                raise ValueError(f"{column.name}: {count} variants in row {index}, expected {num_crops}")
            place = first + crop
        elif not shared:
            place = first + int(rng.random() * count)
        else:
            if shared not in draws:
                draws[shared] = rng.random()
            place = first + int(draws[shared] * count)
        return read(pieces[place], pieces[place + 1], rng)

    return reader


def _rows(column: Column, rows: pa.FixedSizeListArray) -> Callable[[int, int, np.random.Generator], Any]:
    view = rows.values.to_numpy(zero_copy_only=True).reshape(-1, column.dim)
    return lambda start, stop, rng: view[start:stop] if stop > start else None


def _pieces(column: Column, lists: pa.ListArray) -> Callable[[int, int, np.random.Generator], Any]:
    ends, flat = _offsets(lists), _view(lists.values.buffers()[1], "H")
    codec, chunked, most = column.source, column.chunked, column.max_tokens
    assemble = codec.assemble
    if not chunked and not codec.shuffle and type(codec).assemble is TextLike.assemble:
        # Nothing to draw: the pieces of a variant lie one after the other as they are read.
        return lambda start, stop, rng: flat[ends[start] : ends[stop]][:most].tolist()

    def read(start: int, stop: int, rng: np.random.Generator) -> list[Any]:
        # Views of pieces, not lists of them: what is not read, and what is only reckoned with, costs nothing.
        parts = assemble([flat[a:b] for a, b in pairwise(ends[start : stop + 1].tolist())], rng)
        lists = [part.tolist() if type(part) is memoryview else list(part) for part in parts]
        return lists if chunked else list(islice(chain.from_iterable(lists), most))

    return read


def _offsets(lists: pa.ListArray) -> memoryview:
    # Not `.offsets`, and not numpy: the items of a view of memory are Python's own, at a third of the time.
    return _view(lists.buffers()[1], "i")


def _view(buffer: pa.Buffer | None, kind: str) -> memoryview:
    return memoryview(buffer or b"").cast("B").cast(kind)  # type: ignore[call-overload]
