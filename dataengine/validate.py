"""Read a dataset back and hold it to its commit records and its modalities, at the speed of the disk."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from multiprocessing import get_context
from typing import TypeAlias

from dataengine import modalities, packed, shards
from dataengine.index import record_path
from dataengine.manifest import Commit, Dataset, Quarantined
from dataengine.shards import shard_name

_RECORD = re.compile(r"shard-(\d{5,})\.json")
_NOT_CELLS = ("runs/", "staging/", "leases/", "quarantine/")
"""What a run leaves beside the cells, on purpose."""
_PACKED = "tokens"
_AHEAD = 2
"""Shards in the hands of each process, so that it never waits for the next one."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as its commit record or its modality says: the file, the key if it is of one, and what."""

    file: str
    key: str
    problem: str


@dataclass(frozen=True)
class Checked:
    """What became of the cells of one shard; small, so that it may cross a process border."""

    shard: int
    num_cells: int
    num_bytes: int
    num_decoded: int
    files: tuple[str, ...]
    """What the records name: all that is to be found."""
    problems: tuple[Problem, ...]


Cells: TypeAlias = tuple[str, int, tuple[str, ...], float]
"""Root, shard, columns, and the fraction of samples to decode."""


def verify(dataset: Dataset, *, workers: int = 1, sample: float = 1.0) -> list[Problem]:
    """Every problem of a dataset, at once; `checks` gives them as they are found."""
    found = [p for checked in checks(dataset, workers=workers, sample=sample) for p in checked.problems]
    return found + list(others(dataset))


def cells(dataset: Dataset) -> dict[int, list[str]]:
    """The columns of each shard that have a commit record, rgb first, by what is listed and not by a cache."""
    found: dict[int, list[str]] = {}
    names = dataset.store.folders("commits")
    for modality in [m for m in ("rgb",) if m in names] + [m for m in names if m != "rgb"]:
        for name in dataset.store.files(f"commits/{modality}"):
            match = _RECORD.fullmatch(name)
            if match is not None:
                found.setdefault(int(match[1]), []).append(modality)
    return dict(sorted(found.items()))


def checks(dataset: Dataset, *, workers: int = 1, sample: float = 1.0) -> Iterator[Checked]:
    """Read every cell again, one shard after another, in `workers` processes if there are several.

    Each tar is read once: hashed, taken apart, its keys held to the record and to the rgb record, and the values of a
    fraction of `sample` of the keys (the same in every column and every run) decoded and held to their modality.
    """
    if not 0 <= sample <= 1:
        raise ValueError(f"sample is {sample}, expected a fraction of 0 to 1")
    work = [(dataset.store.url, shard, tuple(columns), sample) for shard, columns in cells(dataset).items()]
    if workers <= 1 or len(work) <= 1:
        yield from (_check(*each) for each in work)
        return
    yield from _spread(work, min(workers, len(work)), _check)


def _spread(work: Sequence[Cells], workers: int, check: Callable[..., Checked]) -> Iterator[Checked]:
    """The shards in several processes; one that ends its process is tried again alone, and is then a problem."""
    waiting = deque(work)
    while waiting:
        running: deque[tuple[Cells, Future[Checked]]] = deque()
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < workers * _AHEAD:
                        running.append((waiting[0], pool.submit(check, *waiting[0])))
                        waiting.popleft()
                    yield running[0][1].result()
                    running.popleft()
                return
            except BrokenProcessPool:
                suspects = [each for each, _ in running]
        for each in suspects:
            yield _alone(each, check)


def _alone(each: Cells, check: Callable[..., Checked]) -> Checked:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(check, *each).result()
        except BrokenProcessPool:
            problem = Problem(f"{shard_name(each[1])} of every column", "", "ends the process that reads it")
            return Checked(each[1], 0, 0, 0, (), (problem,))


@functools.cache
def _open(root: str) -> Dataset:
    return Dataset(root)


def _check(root: str, shard: int, columns: tuple[str, ...], sample: float) -> Checked:
    """All cells of one shard, rgb first: it says which keys there are and how large their images."""
    shown = _Shard(_open(root), shard, sample)
    for modality in columns:
        shown.cell(modality)
    if "rgb" not in columns:
        shown.problems.append(Problem(record_path("rgb", shard), "", f"is missing, and {', '.join(columns)} are not"))
    return Checked(
        shard, len(columns), shown.num_bytes, shown.num_decoded, tuple(shown.files), tuple(shown.problems)
    )  # fmt: skip


class _Shard:
    """What is found out about one shard."""

    def __init__(self, dataset: Dataset, shard: int, sample: float) -> None:
        self.dataset, self.shard, self.sample = dataset, shard, sample
        self.keys: tuple[str, ...] | None = None
        self.sizes: dict[str, tuple[int, int]] = {}
        self.files: list[str] = []
        self.problems: list[Problem] = []
        self.num_bytes = self.num_decoded = 0

    def cell(self, modality: str) -> None:
        """Check one cell and add what is wrong with it."""
        try:
            record = self.dataset.commit(modality, self.shard)
        except ValueError as error:
            self.problems.append(Problem(record_path(modality, self.shard), "", str(error)))
            return
        if record is None:  # dropped since it was listed
            return
        if modality == "rgb":
            self.keys = record.keys
        self.files.append(record.file)
        found: list[tuple[str, str]] = []
        try:
            self._content(record, found)
        except FileNotFoundError:
            found.append(("", f"is missing, {record.num_bytes} bytes with sha256 {record.sha256} were committed"))
        except (OSError, ValueError) as error:
            found.append(("", str(error)))
        self.problems += [Problem(record.file, key, problem) for key, problem in found]

    def _content(self, record: Commit, found: list[tuple[str, str]]) -> None:
        data = _read(self.dataset, record.file)
        self.num_bytes += len(data)
        digest = hashlib.sha256(data).hexdigest()
        if len(data) != record.num_bytes:
            found.append(("", f"has {len(data)} bytes, its commit record says {record.num_bytes}"))
        if digest != record.sha256:
            found.append(("", f"does not have the sha256 of its commit record: {digest}, expected {record.sha256}"))
            return
        if record.modality == _PACKED:
            found += [("", problem) for problem in self._alignment(record, packed.check(data))]
            return
        members = list(shards.list_tar(data))
        keys = tuple(key for key, *_ in members)
        found += [("", problem) for problem in self._alignment(record, keys)]
        if keys == self.keys:
            self._values(record, data, members, found)

    def _alignment(self, record: Commit, keys: tuple[str, ...]) -> Iterator[str]:
        if self.keys is not None and keys != self.keys:
            at = next((i for i, (a, b) in enumerate(zip(keys, self.keys, strict=False)) if a != b), None)
            where = f"{len(keys)} keys, expected {len(self.keys)}"
            if at is not None:
                where = f"key {at} is {keys[at]!r}, expected {self.keys[at]!r}"
            yield f"does not list the keys of the rgb tar in their order: {where}"
        elif record.keys_sha256 != shards.keys_sha256(keys):
            yield "does not list the keys that its commit record was made for"
        if record.num_samples != len(keys):
            yield f"holds {len(keys)} samples, its commit record says {record.num_samples}"
        stray = set(record.invalid) - set(keys)
        if stray:
            yield f"the commit record calls {sorted(stray)[0]!r} invalid, which is no key of the shard"

    def _values(
        self,
        record: Commit,
        data: memoryview,
        members: Sequence[tuple[str, str, int, int]],
        found: list[tuple[str, str]],
    ) -> None:
        codec = modalities.load(record.modality)
        suffixes = ("jpg", "png") if record.modality == "rgb" else (codec.suffix,)
        for key, suffix, start, stop in members:
            if suffix not in suffixes:
                found.append((key, f"is a {suffix!r}, expected {' or '.join(suffixes)}"))
            if not _drawn(key, self.sample):
                continue
            self.num_decoded += 1
            try:
                value = codec.decode(bytes(data[start:stop]))
                if record.modality == "rgb":
                    self.sizes[key] = value.shape[:2]
                if key not in self.sizes:
                    continue  # its image is a problem of its own, and without it there is no size to check against
                codec.check(value, self.sizes[key])
            except ValueError as error:
                found.append((key, str(error)))


_buffer = bytearray()


def _read(dataset: Dataset, path: str) -> memoryview:
    """A whole file, until the next one is read: its memory is used again, as new memory costs more than the copy."""
    global _buffer
    if not dataset.store.local:
        return memoryview(dataset.store.read(path))
    with dataset.store.local_path(path).open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size >= len(_buffer):
            _buffer = bytearray(size + 1)
        view, done = memoryview(_buffer), 0
        while count := stream.readinto(view[done:]):
            done += count
            if done == len(view):
                raise ValueError(f"is being written: it had {size} bytes, and now has more")
    return view[:done]


def _drawn(key: str, sample: float) -> bool:
    """Whether a key is in a sample of that fraction: it is or is not, in every column and every run."""
    if sample in (0, 1):
        return bool(sample)
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") < sample * 2.0**64


def others(dataset: Dataset) -> Iterator[Problem]:
    """What is wrong beside the cells: the quarantine, and shards that the plan does not have."""
    for shard in cells(dataset):
        if shard >= dataset.plan.num_shards:
            yield Problem(record_path("rgb", shard), "", f"shard {shard}, the plan has {dataset.plan.num_shards}")
    names = [field.name for field in fields(Quarantined)]
    for name, data in dataset.store.read_many(f"quarantine/{n}" for n in dataset.store.files("quarantine")):
        for number, line in enumerate((data or b"").splitlines(), start=1):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict) or sorted(entry) != sorted(names):
                    raise ValueError(f"expected an object of {', '.join(names)}")
            except ValueError as error:
                yield Problem(name, "", f"line {number}: {error}")


def orphans(dataset: Dataset, files: Iterable[str]) -> list[str]:
    """Files of the layout that no record names (`files` are those that one does): what `gc` may delete."""
    kept = {"plan.json", *files}
    kept |= {record_path(m, shard) for shard, columns in cells(dataset).items() for m in columns}
    return [p for p in dataset.store.find() if p not in kept and not p.startswith(_NOT_CELLS)]
