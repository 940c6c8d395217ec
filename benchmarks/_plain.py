"""The job of the ceiling as a plain loop: no engine, no threads, nothing that somebody in a hurry would leave out.

For each shard: read the tar of images, decode each, make twelve values, encode them with the engine's codecs, append
each to the tar of its modality, which is hashed on its way to the disk; then sync and rename every tar and write its
record, as durably as the engine does.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from benchmarks._null import MODALITIES, values_of
from dataengine import codecs, modalities


class Cell:
    """One tar on its way to the disk, under another name until it is whole; `commit` gives it its name and a record."""

    def __init__(self, out: Path, modality: str, shard: int) -> None:
        self._out, self._modality, self._shard = out, modality, shard
        self._path = out / modality / f"shard-{shard:05d}.tar"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path.with_suffix(".partial"), "wb", buffering=1 << 20)  # noqa: SIM115
        self._hash, self._keys, self._num_bytes = hashlib.sha256(), [], 0
        self._tar = tarfile.open(fileobj=self, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def write(self, data: bytes) -> int:
        """What tarfile writes goes to the file and into the hash."""
        self._hash.update(data)
        self._num_bytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Where tarfile stands."""
        return self._num_bytes

    def add(self, key: str, suffix: str, data: bytes | memoryview) -> None:
        """One more member, with the engine's owner, mode and time."""
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size, info.mode, info.mtime = len(data), 0o444, 0
        info.uname = info.gname = "root"
        self._tar.addfile(info, io.BytesIO(data))
        self._keys.append(key)

    def commit(self) -> None:
        """Close, sync and rename the tar, then its record."""
        self._tar.close()
        _finish(self._file, self._path)
        record = {
            "modality": self._modality,
            "shard": self._shard,
            "file": str(self._path.relative_to(self._out)),
            "num_bytes": self._num_bytes,
            "sha256": self._hash.hexdigest(),
            "num_samples": len(self._keys),
            "keys_sha256": hashlib.sha256("\n".join(self._keys).encode()).hexdigest(),
        }
        path = self._out / "commits" / self._modality / f"shard-{self._shard:05d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".partial").open("wb")
        file.write(json.dumps(record, sort_keys=True, indent=1).encode())
        _finish(file, path)


def _finish(file: io.BufferedWriter, path: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.rename(file.name, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def encoded(stream: IO[bytes]) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """For each image of a tar its key, and for each of `MODALITIES` the suffix and the bytes of its label."""
    kinds = [modalities.load(m) for m in MODALITIES]
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for info in tar:
            key = info.name.partition(".")[0]
            member = tar.extractfile(info)
            assert member is not None
            height, width = codecs.decode_rgb(member.read()).shape[:2]
            values = values_of(key, (height, width))
            yield key, [(kind.suffix, kind.encode(values[kind.name])) for kind in kinds]


def run(root: Path, out: Path, shards: Sequence[int]) -> None:
    """The whole job, shard after shard."""
    for shard in shards:
        cells = [Cell(out, m, shard) for m in MODALITIES]
        with (root / "rgb" / f"shard-{shard:05d}.tar").open("rb") as stream:
            for key, labels in encoded(stream):
                for cell, (suffix, data) in zip(cells, labels, strict=True):
                    cell.add(key, suffix, data)
        for cell in cells:
            cell.commit()
