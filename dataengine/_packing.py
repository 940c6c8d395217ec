"""Arrow arrays of packed columns, each built in one piece of memory while its values are made, for `packed`.

What a shard takes while it is packed is little more than its file: values are freed one by one, and the buffers that
grow here (a growing large one is moved by the system, not copied) are those that are written.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from dataengine.packed import Column

_MOST = 2**31 - 1  # Arrow's offsets are int32, and readers map them as they are


class Pieces:
    """A file to be written that keeps what it is given, as it is."""

    closed = False

    def __init__(self) -> None:
        self.parts: list[memoryview] = []

    def write(self, data: Any) -> int:
        """Keep a view of some bytes."""
        self.parts.append(memoryview(data).cast("B"))
        return len(self.parts[-1])

    def flush(self) -> None:
        """All is there already."""


def array_of(column: Column, kind: pa.DataType, num_crops: int, keys: Sequence[str], values: Iterable[Any]) -> pa.Array:
    """The values of a column, one or None for each key, as an array of that type; ValueError when one does not fit."""
    if column.kind in ("tokens", "pixels"):
        return _dense(column, kind, num_crops, len(keys), values)
    if column.kind == "images":
        return _images(column, kind, num_crops, keys, values)
    missing: list[bool] = []
    variants, ends, flat = array("i", [0]), array("i", [0]), array("H")
    pieces, numbers = array("i", [0]), bytearray()
    for key, value in zip(keys, values, strict=True):
        missing.append(value is None)
        if value is not None and column.choice == "crop" and len(value) != num_crops:
            raise ValueError(
                f"{column.name} of {key}: {len(value)} variants, expected one for each of {num_crops} crops"
            )
        for variant in value or ():
            if column.kind == "embeddings":
                if variant.dtype != np.float16 or variant.shape[1:] != (column.dim,):
                    expected = f"float16 (rows, {column.dim})"
                    raise ValueError(f"{column.name} of {key}: {variant.dtype} {variant.shape}, expected {expected}")
                numbers += variant.tobytes()
                pieces.append(_offset(column, pieces[-1] + len(variant)))
                continue
            for piece in variant:
                try:
                    flat.extend(piece)
                except (OverflowError, ValueError, TypeError) as error:
                    raise ValueError(f"{column.name} of {key}: expected numbers 0..65535, {error}") from error
                ends.append(_offset(column, len(flat)))
            pieces.append(_offset(column, len(ends) - 1))
        variants.append(_offset(column, len(pieces) - 1))
    if column.kind == "embeddings":
        inner: pa.Array = pa.FixedSizeListArray.from_arrays(_wrapped(numbers, 2, pa.float16()), column.dim)
    else:
        inner = pa.ListArray.from_arrays(_wrapped(ends, 1, pa.int32()), _wrapped(flat, 1, pa.uint16()))
    outer = pa.ListArray.from_arrays(_wrapped(pieces, 1, pa.int32()), inner)
    return pa.ListArray.from_arrays(_wrapped(variants, 1, pa.int32()), outer, mask=pa.array(missing, pa.bool_()))


def _images(
    column: Column, kind: pa.DataType, num_crops: int, keys: Sequence[str], values: Iterable[Any]
) -> pa.StructArray:
    """Of pairs of an encoded image and its crops, integers (n_crops, 5)."""
    data, ends, missing = bytearray(), array("q", [0]), []
    crops = np.zeros((len(keys), num_crops, 5), np.int32)
    for row, key, value in zip(crops, keys, values, strict=True):
        missing.append(value is None)
        if value is not None:
            image, here = value
            if np.shape(here) != row.shape or not np.array_equal(np.asarray(here).astype(np.int32), here):
                raise ValueError(f"{column.name} of {key}: crops {here!r:.100}, expected int32 {row.shape}")
            row[...] = here
            data += image
        ends.append(len(data))
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(data)]
    images = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(keys), buffers)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(crops.reshape(-1)), type=kind.field("crops").type)
    return pa.StructArray.from_arrays([images, flat], fields=list(kind), mask=pa.array(missing, pa.bool_()))


def _offset(column: Column, place: int) -> int:
    if place > _MOST:
        raise ValueError(
            f"{column.name}: more than {_MOST} numbers, rows or pieces in one packed shard, which is all that its "
            "offsets can count: make smaller shards (`dataengine ingest` with a smaller --shard-size)"
        )
    return place


def _wrapped(numbers: array[int] | bytearray, width: int, kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(numbers) // width, [None, pa.py_buffer(numbers)])


def _dense(column: Column, kind: pa.DataType, num_crops: int, count: int, values: Iterable[Any]) -> pa.Array:
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    shape = (num_crops, column.max_tokens) if column.kind == "tokens" else (num_crops, column.side, column.side, 3)
    # A null keeps its place in the values, so that they can be viewed as one dense array.
    flat, missing = np.zeros((count, *shape), dtype), []
    for row, value in zip(flat, values, strict=True):
        missing.append(value is None)
        if value is not None:
            if value.shape != shape:
                raise ValueError(f"{column.name}: expected {shape}, got {value.shape}")
            row[...] = value
    mask = pa.array(missing, pa.bool_())
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), type=kind, mask=mask)
