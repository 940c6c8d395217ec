"""What a labelling task reads: the committed tars of a shard, decoded ahead of the labelers within a limit of bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

from dataengine import modalities, pulse
from dataengine.attempt import Failed
from dataengine.manifest import Dataset, tar_path
from dataengine.pulse import Death, Step
from dataengine.sample import Sample
from dataengine.shards import Member

AHEAD_BYTES = 256 << 20
"""Decoded values that may wait for a labeler: some batches of full-size photographs."""

AHEAD_ROWS = 256
"""Rows that may: small images must not make thousands of futures."""

FIRST_ROWS = 8
"""Rows that may before it is known how large one is that something is prepared of: crops may be ten times the image."""

SWELL = 30
"""What an encoded image grows by when it is decoded, at most usual: a guess until the first is."""


@dataclass(frozen=True)
class Inputs:
    """The members of the input columns of one shard, which of them are only placeholders, and which mean nothing."""

    shard: int
    keys: tuple[str, ...]
    members: Mapping[str, list[Member]]
    invalid: Mapping[str, Mapping[str, str]]
    random: Mapping[str, bool]

    @classmethod
    def read(cls, dataset: Dataset, shard: int, names: Sequence[str], threads: Executor) -> Inputs:
        """Read whole tars side by side, rgb's among them; ValueError when one is not as its record or rgb says."""
        records = {m: dataset.commit(m, shard) for m in names}
        for m, record in records.items():
            if record is None:
                raise ValueError(f"{tar_path(m, shard)} is needed as input and is not committed")
        members = dict(zip(names, threads.map(lambda m: dataset.read(m, shard), names), strict=True))
        there = [r for r in records.values() if r is not None]
        keys = next(r.keys for r in there if r.modality == "rgb")
        for m, column in members.items():
            if tuple(member.key for member in column) != keys:
                raise ValueError(f"{tar_path(m, shard)} does not list the keys of the rgb tar: run `dataengine verify`")
        invalid = {r.modality: r.invalid for r in there}
        return cls(shard, keys, members, invalid, {r.modality: bool(r.provenance.get("random")) for r in there})

    def bad(self, modality: str) -> Mapping[str, str]:
        """The keys whose value of a modality is only a placeholder, with the reason."""
        return self.invalid.get(modality, {})

    def decode(self, row: int) -> dict[str, Any] | Failed:
        """The decoded values of one row, or why they cannot be had."""
        values = {}
        for m, column in self.members.items():
            try:
                values[m] = modalities.load(m).decode(column[row].data)
            except Exception as error:
                return Failed(f"cannot decode {m}: {type(error).__name__}: {error}"[:300])
        return values


def size_of(value: Any) -> int:
    """Bytes of a value with all that it holds: arrays and tensors, in lists, tuples, dicts and objects, each once."""
    seen: set[int] = set()
    todo, total = [value], 0
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        size = getattr(one, "nbytes", None)
        if isinstance(size, int):
            total += size
            continue
        total += sys.getsizeof(one)
        if isinstance(one, dict):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            todo += one
        elif dataclasses.is_dataclass(one) and not isinstance(one, type):
            todo += [getattr(one, field.name, None) for field in dataclasses.fields(one)]
    return total


class Ahead:
    """Decodes rows, and prepares them for labelers, in threads ahead of who asks; with deaths given, only when asked.

    The values of a row hold, beside those of its modalities, under the name of each of `prepares` what that made of it.
    """

    def __init__(
        self,
        inputs: Inputs,
        rows: Sequence[int],
        threads: Executor,
        deaths: Sequence[Death] | None = None,
        prepares: Mapping[str, Callable[[Sample], Any]] | None = None,
    ) -> None:
        self.inputs, self._threads, self._deaths, self._prepares = inputs, threads, deaths, prepares or {}
        self._waiting = list(reversed(rows))
        self._futures: dict[int, Future[dict[str, Any] | Failed]] = {}
        self._values: dict[int, dict[str, Any] | Failed] = {}
        # Of the largest row so far: what a row that is not decoded yet is taken for.
        self._bytes = 0
        self._guess = SWELL * max((len(inputs.members["rgb"][i].data) for i in rows), default=0)
        self._fill()

    def values(self, row: int) -> dict[str, Any] | Failed:
        """The decoded values of a row, waited for if they must be."""
        if row not in self._values:
            self._values[row] = self._carefully(row) if self._deaths is not None else self._next(row)
        return self._values[row]

    def _next(self, row: int) -> dict[str, Any] | Failed:
        if row not in self._futures:
            self._futures[row] = self._threads.submit(self._decode, row)
        found = self._futures.pop(row).result()
        if isinstance(found, dict):
            self._bytes = max(self._bytes, size_of(found))
        self._fill()
        return found

    def _decode(self, row: int) -> dict[str, Any] | Failed:
        values = self.inputs.decode(row)
        if isinstance(values, dict):
            sample = Sample(self.inputs.keys[row], dict(values))
            for name, prepare in self._prepares.items():
                # What cannot be prepared here fails again, and is accounted for, where it is labelled.
                with contextlib.suppress(Exception):
                    values[name] = prepare(sample)
        return values

    def _carefully(self, row: int) -> dict[str, Any] | Failed:
        now = Step(self.inputs.shard, "decode", row, row + 1)
        fate = pulse.fate(self._deaths or (), now)
        if fate != "run":
            return Failed(f"decoding {fate}")
        with pulse.step(self.inputs.shard, "decode", row, row + 1):
            return self.inputs.decode(row)

    def _fill(self) -> None:
        if self._deaths is not None:
            return
        most = FIRST_ROWS if self._prepares and not self._bytes else AHEAD_ROWS
        while self._waiting and len(self._futures) < most:
            if self._futures and (len(self._futures) + len(self._values)) * (self._bytes or self._guess) > AHEAD_BYTES:
                return
            row = self._waiting.pop()
            if row not in self._values:
                self._futures[row] = self._threads.submit(self._decode, row)

    def release(self, before: int) -> None:
        """Forget the rows below `before`: every labeler has seen them."""
        for row in [r for r in self._values if r < before]:
            del self._values[row]
        self._fill()

    def close(self) -> None:
        """Drop what was decoded for nobody."""
        for future in self._futures.values():
            future.cancel()
