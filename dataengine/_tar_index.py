"""Where each member of the aligned tars of a shard lies: looked for once, then kept as a small Arrow file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataengine import _tars, ml4m
from dataengine.ml4m import Tars

FORMAT = 1
_METADATA = b"dataengine.tars"


@dataclass(frozen=True)
class Column:
    """The members of a modality: which of the tars they are in, and of each the suffix, the first byte and the size."""

    tar: int
    suffixes: Sequence[str]
    offsets: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class TarIndex:
    """The keys of a shard in order, and the members of its modalities."""

    keys: list[str]
    columns: Mapping[str, Column]


def made(tars: Tars, handles: Sequence[int], names: Mapping[str, str]) -> TarIndex:
    """By the headers of the tars, open in their order; ValueError when they are damaged or not aligned."""
    numbers = {url: number for number, (_, url) in enumerate(tars.urls)}

    def groups(url: str) -> ml4m.Groups[tuple[int, int, int]]:
        number = numbers[url]
        handle = handles[number]

        def read(position: int, size: int) -> bytes:
            return os.pread(handle, size, position)

        headers = _tars.headers(read, os.fstat(handle).st_size)
        return ml4m.grouped(url, headers, lambda h: (number, h.offset, h.size))

    keys, columns = ml4m.aligned(tars, groups, names)
    out = {}
    for modality, members in columns.items():
        places = np.array([place for _, place in members], np.int64).reshape(-1, 3)
        if len(set(places[:, 0].tolist())) > 1:
            raise ValueError(f"{tars.name}: {modality} is in several tars of the shard")
        out[modality] = Column(int(places[0, 0]), [s for s, _ in members], places[:, 1], places[:, 2])
    return TarIndex(keys, out)


def identity(tars: Tars, tags: Sequence[str], names: Mapping[str, str]) -> str:
    """64 hexadecimal digits that change with whatever an index depends on: the tars, their versions, other names."""
    of = json.dumps([FORMAT, [list(url) for url in tars.urls], list(tags), sorted(names.items())])
    return hashlib.sha256(of.encode()).hexdigest()


def load(path: Path) -> TarIndex | None:
    """The index in a file; None where there is none, or what is there is no index."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            table = reader.get_batch(0)
            table.validate(full=True)
            tars: dict[str, int] = json.loads(table.schema.metadata[_METADATA])
            columns = {
                modality: Column(
                    tar,
                    table.column(f"{modality}/suffix").to_pylist(),
                    np.array(table.column(f"{modality}/offset")),
                    np.array(table.column(f"{modality}/size")),
                )
                for modality, tar in tars.items()
            }
            return TarIndex(table.column("key").to_pylist(), columns)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save(path: Path, index: TarIndex) -> None:
    """Write it, in place of what is there."""
    arrays: dict[str, Any] = {"key": pa.array(index.keys, pa.string())}
    for modality, column in index.columns.items():
        arrays[f"{modality}/suffix"] = pa.array(column.suffixes, pa.string()).dictionary_encode()
        arrays[f"{modality}/offset"] = pa.array(column.offsets, pa.int64())
        arrays[f"{modality}/size"] = pa.array(column.sizes, pa.int64())
    tars = json.dumps({modality: column.tar for modality, column in index.columns.items()})
    batch = pa.record_batch(arrays).replace_schema_metadata({_METADATA: tars.encode()})

    def write(handle: int) -> None:
        with pa.ipc.new_file(pa.PythonFile(os.fdopen(os.dup(handle), "wb")), batch.schema) as writer:
            writer.write_batch(batch)

    _written(path, write)


def save_array(path: Path, values: np.ndarray) -> None:
    """Write an array, in place of what is there."""

    def write(handle: int) -> None:
        with os.fdopen(os.dup(handle), "wb") as stream:
            np.save(stream, values, allow_pickle=False)

    _written(path, write)


def load_array(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray | None:
    """The array in a file; None where there is none of that type and shape."""
    try:
        values: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return values if (values.dtype, values.shape) == (np.dtype(dtype), shape) else None


def _written(path: Path, write: Callable[[int], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        write(handle)
        os.fchmod(handle, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    finally:
        os.close(handle)
