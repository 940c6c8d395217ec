"""What a dataset root holds: its plan, its cells and their commit records, its quarantine."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from dataengine import shards
from dataengine._tars import Buffer
from dataengine.canonical import Limits
from dataengine.index import Index, record_path
from dataengine.shards import Member, shard_name
from dataengine.storage import Store

FORMAT = 1
"""Version of the layout that docs/shard-format.md describes."""

INGESTED = ("rgb", "caption", "crop_settings")
"""The columns that ingest writes for every corpus; a corpus with exact labels adds its own."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was decided at ingest, once: `plan.json`. `fingerprint` is the sha256 of the list of splits."""

    corpus: str
    shard_size: int
    num_crops: int
    min_crop_scale: float
    seed: int
    limits: Limits
    num_shards: int
    num_items: int
    fingerprint: str
    ingested: tuple[str, ...]
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The record that makes a cell exist; deterministic, so that equal trees have equal records (times are in `runs/`).

    `spec` is the identity of what made it; `invalid` maps a key whose label failed to the reason (its member is a
    placeholder). The record of the rgb column also carries the ordered keys and where they came from.
    """

    modality: str
    shard: int
    spec: str
    file: str
    num_bytes: int
    sha256: str
    num_samples: int
    keys_sha256: str
    invalid: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    format: int = FORMAT

    @classmethod
    def parse(cls, data: bytes, modality: str, shard: int) -> Commit:
        """The record of a cell; ValueError when the bytes are not what is written for it, edited by hand perhaps.

        A file outside of the root is refused: whoever may write a record would choose what is read, or deleted.
        """
        path = record_path(modality, shard)
        try:
            record = json.loads(data)
            made = cls(**{**record, "keys": tuple(record["keys"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} is no commit record: {type(error).__name__}: {error}") from error
        for name, value in vars(made).items():
            kind = _FIELDS[name]
            if type(value) is not kind or (name in _TEXTS and not all(type(v) is str for v in _texts(value))):
                raise ValueError(f"{path}: {name} is {value!r:.80}, expected {_TEXTS.get(name, kind.__name__)}")
        if (made.modality, made.shard, made.format) != (modality, shard, FORMAT):
            found = f"{made.modality}/{shard_name(made.shard)} in format {made.format}"
            raise ValueError(f"{path} is the record of {found}, expected its own cell in format {FORMAT}")
        if made.file.startswith("/") or {"", ".", ".."} & set(made.file.split("/")) or "\0" in made.file:
            raise ValueError(f"{path}: file is {made.file!r}, expected a path below the root")
        return made


_FIELDS: dict[str, type] = {
    **dict.fromkeys(("modality", "spec", "file", "sha256", "keys_sha256"), str),
    **dict.fromkeys(("shard", "num_bytes", "num_samples", "format"), int),
    **dict.fromkeys(("invalid", "provenance"), dict),
    "keys": tuple,
}
_TEXTS = {"keys": "a list of texts", "invalid": "an object of texts"}


def _texts(value: Any) -> Iterable[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else value


@dataclass(frozen=True)
class Quarantined:
    """One item that was refused at ingest, or a whole item of a corpus that could not be read."""

    key: str
    source: str
    stage: str
    reason: str
    detail: str


class NotADataset(ValueError):
    """There is no readable dataset at a root."""


class Conflict(ValueError):
    """A cell is already committed with other content or another identity; nothing was changed."""


class Published(Enum):
    """What became of a cell that was to be published."""

    NEW = "new"
    SAME = "same"
    """It was there, with the same identity and the same bytes."""
    DIFFERS = "differs"
    """It was there with the same identity and other bytes, and was kept: what made it is not deterministic."""


class Dataset:
    """A dataset root. Only commit records are trusted: a tar without one does not exist."""

    def __init__(self, root: str | Path) -> None:
        self.store = Store(root)

    # -- plan ---------------------------------------------------------------------------------------------------------

    @property
    def planned(self) -> bool:
        """Whether there is a plan, so whether this is a dataset at all."""
        return self.store.exists("plan.json")

    @property
    def plan(self) -> Plan:
        """The plan; NotADataset when there is none or it is of another format."""
        try:
            record = json.loads(self.store.read("plan.json"))
        except FileNotFoundError:
            raise NotADataset(f"{self.store.name} holds no plan.json: `dataengine ingest` makes one") from None
        if record["format"] != FORMAT:
            raise NotADataset(f"{self.store.name} has format {record['format']}, this program reads {FORMAT}")
        limits = Limits(**record.pop("limits"))
        return Plan(**{**record, "limits": limits, "ingested": tuple(record["ingested"])})

    def write_plan(self, plan: Plan) -> None:
        """Write the plan once; Conflict when another one is there."""
        if not self.store.publish("plan.json", _json(dataclasses.asdict(plan))) and self.plan != plan:
            changed = [
                f"{f.name}: {getattr(self.plan, f.name)!r} there, {getattr(plan, f.name)!r} asked"
                for f in dataclasses.fields(Plan)
                if getattr(self.plan, f.name) != getattr(plan, f.name)
            ]
            raise Conflict(f"{self.store.name} was planned otherwise ({'; '.join(changed)}); use another root")

    # -- cells --------------------------------------------------------------------------------------------------------

    def modalities(self) -> list[str]:
        """The modalities with at least one commit record, the ingested ones first."""
        return ingested_first(m for m in self.store.folders("commits") if self.committed(m))

    def committed(self, modality: str) -> list[int]:
        """The shards of a modality that are committed, ascending."""
        return [int(n[6:-5]) for n in self.store.files(f"commits/{modality}") if n.endswith(".json")]

    def commit(self, modality: str, shard: int) -> Commit | None:
        """The commit record of a cell, or None when it is not committed; ValueError when it is none."""
        try:
            data = self.store.read(record_path(modality, shard))
        except FileNotFoundError:
            return None
        return Commit.parse(data, modality, shard)

    def keys(self, shard: int) -> tuple[str, ...]:
        """The ordered keys of a shard, as its rgb commit record lists them."""
        record = self.commit("rgb", shard)
        if record is None:
            raise NotADataset(f"{shard_name(shard)} of {self.store.name} is not ingested")
        return record.keys

    def read(self, modality: str, shard: int) -> list[Member]:
        """The members of a committed tar; ValueError when its bytes are not the committed ones."""
        record = self.commit(modality, shard)
        if record is None:
            raise NotADataset(f"{modality}/{shard_name(shard)} of {self.store.name} is not committed")
        data = self.store.read(record.file)
        if shards.sha256(data) != record.sha256:
            raise ValueError(f"{record.file} does not have the sha256 of its commit record {record.sha256}")
        try:
            return list(shards.read_tar(data))
        except tarfile.ReadError as error:
            raise ValueError(f"{record.file} is no tar: {error}") from error

    def publish(self, record: Commit, data: bytes | Sequence[Buffer]) -> Published:
        """Publish a cell: its file, then its record. Conflict when it was committed under another identity.

        A file without a record is what an interrupted attempt left, or is not finished with: adopted when its bytes
        are the same, else replaced. Should its writer then be the first with a record, it gets its bytes back.
        """
        displaced = []
        while not self.store.publish(record.file, data):
            if self.commit(record.modality, record.shard) is not None or self._sha256(record.file) == record.sha256:
                break
            displaced.append(self.store.take(record.file))
        try:
            return self.record(record)
        finally:
            if displaced:
                self._put_back(record.modality, record.shard, displaced)

    def record(self, record: Commit) -> Published:
        """Publish the record of a cell whose file is in place: the second half of `publish`, with its outcomes."""
        if self.store.publish(record_path(record.modality, record.shard), _json(dataclasses.asdict(record))):
            return Published.NEW
        there = self.commit(record.modality, record.shard)
        if there is None or there.spec != record.spec:
            raise Conflict(
                f"{record.file} was committed by another run with other settings, weights or inputs (identity "
                f"{there.spec[:12] if there else 'gone'}, here {record.spec[:12]}); the one that came first is kept"
            )
        return Published.SAME if there.sha256 == record.sha256 else Published.DIFFERS

    def _put_back(self, modality: str, shard: int, displaced: Iterable[bytes | None]) -> None:
        """Give a committed cell its bytes again, if they are among those that were taken from under its name."""
        record = self.commit(modality, shard)
        if record is None:
            return
        for data in displaced:
            if data is not None and shards.sha256(data) == record.sha256:
                while self._sha256(record.file) != record.sha256:
                    self.store.take(record.file)
                    self.store.publish(record.file, data)

    def _sha256(self, path: str) -> str | None:
        try:
            return shards.sha256(self.store.read(path))
        except FileNotFoundError:
            return None

    def uncommit(self, modality: str, shard: int) -> None:
        """Forget a cell: its record first, so that no reader sees a record without its file."""
        record = self.commit(modality, shard)
        if record is not None:
            self.store.remove(record_path(modality, shard))
            self.store.remove(record.file)

    def orphans(self, exclude: Callable[[str], bool] = lambda path: False) -> list[str]:
        """Files of the layout that no commit record names, and staging leftovers: what `gc` may delete.

        `exclude` says of a path that somebody is at work on it: the file of a cell appears before its record does.
        """
        # Listed before the records are: a cell that is committed meanwhile is kept.
        found = list(self.store.find())
        kept = {"plan.json", "README.md", *Index.open(self.store).files()}
        return [p for p in found if p not in kept and not p.startswith(("runs/", "quarantine/")) and not exclude(p)]

    # -- quarantine ---------------------------------------------------------------------------------------------------

    def write_quarantine(self, shard: int, items: list[Quarantined]) -> None:
        """Write what a shard refused; nothing when it refused nothing."""
        if items:
            lines = "".join(json.dumps(dataclasses.asdict(i), sort_keys=True) + "\n" for i in items)
            self.store.publish(f"quarantine/{shard_name(shard)}.jsonl", lines.encode())

    def quarantine(self) -> list[Quarantined]:
        """All that was refused, in shard order."""
        return [Quarantined(**json.loads(line)) for lines in self._quarantine() for line in lines]

    def num_quarantined(self) -> int:
        """How much was refused."""
        return sum(len(lines) for lines in self._quarantine())

    def _quarantine(self) -> Iterator[list[str]]:
        """The lines of each shard that refused anything."""
        paths = [f"quarantine/{name}" for name in self.store.files("quarantine")]
        for _, data in self.store.read_many(paths):
            yield (data or b"").decode().splitlines()


def ingested_first(modalities: Iterable[str]) -> list[str]:
    """Modalities in the order people read them: those of every corpus first, the others by name."""
    found = set(modalities)
    return [m for m in INGESTED if m in found] + sorted(found - set(INGESTED))


def tar_path(modality: str, shard: int) -> str:
    """Where the tar of a cell lies."""
    return f"{modality}/{shard_name(shard)}.tar"


def _json(value: Any) -> bytes:
    # A name that is not UTF-8 has lone surrogates in Python; a backslash and their number is what JSON says for them.
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
