"""Finished rows of unfinished cells: what a dead worker had done is taken up by whoever gets its shard next."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dataengine import shards
from dataengine.shards import Member, shard_name
from dataengine.storage import Store

_REASONS = Member("", "invalid.json", b"")
"""The last member of every part: reason by key. No sample has an empty key."""


@dataclass(frozen=True)
class Row:
    """One encoded label, and why it is only a placeholder, if it is."""

    member: Member
    invalid: str | None = None


class Rows(Protocol):
    """Where finished rows can be left and found again."""

    def save(self, column: str, shard: int, spec: str, rows: Mapping[int, Row]) -> None:
        """Leave some rows of a cell, by their index in the shard."""

    def load(self, column: str, shard: int, spec: str) -> dict[int, Row]:
        """All rows that were left for a cell of this identity."""

    def clear(self, column: str, shard: int) -> None:
        """Forget a cell's rows: it is committed."""


class Staging:
    """Rows under `staging/` of a store, in parts of contiguous rows.

    A part is named by its rows and the sha256 of its bytes, so that one which was cut by a power failure, or written
    by another identity, is never taken for good.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def save(self, column: str, shard: int, spec: str, rows: Mapping[int, Row]) -> None:
        """Write every run of contiguous rows as one part."""
        for start, stop in runs(rows):
            members = [rows[i].member for i in range(start, stop)]
            why = {rows[i].member.key: rows[i].invalid for i in range(start, stop) if rows[i].invalid is not None}
            reasons = Member(_REASONS.key, _REASONS.suffix, json.dumps(why, sort_keys=True).encode())
            data = shards.build_tar([*members, reasons])
            name = f"{start:06d}-{stop:06d}-{shards.sha256(data)[:16]}.tar"
            self._store.put(f"{_folder(column, shard)}/{spec[:16]}/{name}", data)

    def load(self, column: str, shard: int, spec: str) -> dict[int, Row]:
        """All rows of intact parts; a damaged part is as good as none."""
        folder = f"{_folder(column, shard)}/{spec[:16]}"
        found: dict[int, Row] = {}
        for name in self._store.files(folder):
            try:
                start, stop, digest = name.removesuffix(".tar").split("-")
                data = self._store.read(f"{folder}/{name}")
                if shards.sha256(data)[:16] != digest:
                    continue
                *members, reasons = shards.read_tar(data)
                why = json.loads(reasons.data)
            except (ValueError, FileNotFoundError, tarfile.ReadError):
                continue
            for row, member in zip(range(int(start), int(stop)), members, strict=True):
                found[row] = Row(member, why.get(member.key))
        return found

    def clear(self, column: str, shard: int) -> None:
        """Delete the parts of a cell, of whatever identity: none of them can be wanted once it is committed."""
        folder = _folder(column, shard)
        for spec in self._store.folders(folder):
            for name in self._store.files(f"{folder}/{spec}"):
                try:
                    self._store.remove(f"{folder}/{spec}/{name}")
                except FileNotFoundError:
                    continue  # another worker cleared it, too


class Spool:
    """Rows in a folder of this machine, for the process that replaces a dead one: appended, never synced or hashed.

    One file for each cell; a row is one line of JSON (row, key, suffix, reason, size) and its bytes. What a process
    was in the middle of writing when it died is cut off, and not taken up.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, column: str, shard: int) -> Path:
        return self._folder / f"{column}-{shard}"

    def save(self, column: str, shard: int, spec: str, rows: Mapping[int, Row]) -> None:
        """Append the rows in one write."""
        parts = []
        for i, row in rows.items():
            data = row.member.data
            head = [spec, i, row.member.key, row.member.suffix, row.invalid, len(data)]
            parts += [json.dumps(head).encode() + b"\n", data]
        with self._file(column, shard).open("ab", buffering=0) as stream:
            stream.write(b"".join(parts))

    def load(self, column: str, shard: int, spec: str) -> dict[int, Row]:
        """All whole rows of this identity."""
        found: dict[int, Row] = {}
        try:
            data = self._file(column, shard).read_bytes()
        except FileNotFoundError:
            return found
        at = 0
        while (end := data.find(b"\n", at)) >= 0:
            made, i, key, suffix, invalid, size = json.loads(data[at:end])
            at = end + 1 + size
            if at > len(data):
                break
            if made == spec:
                found[i] = Row(Member(key, suffix, data[end + 1 : at]), invalid)
        return found

    def clear(self, column: str, shard: int) -> None:
        """Delete the rows of a cell."""
        self._file(column, shard).unlink(missing_ok=True)


def runs(rows: Iterable[int]) -> list[tuple[int, int]]:
    """Maximal ranges start..stop of contiguous indices, ascending."""
    out: list[tuple[int, int]] = []
    for i in sorted(rows):
        if out and out[-1][1] == i:
            out[-1] = (out[-1][0], i + 1)
        else:
            out.append((i, i + 1))
    return out


def _folder(column: str, shard: int) -> str:
    return f"staging/{column}/{shard_name(shard)}"
