"""Corpus to dataset: every split becomes one shard of rgb, caption, crop settings and the corpus's own exact labels."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dataengine import corpora, geometry, modalities, provenance, shards
from dataengine.canonical import Canonical, Limits, Refused, canonicalise, encode_exact
from dataengine.corpora import RawSample, Split
from dataengine.manifest import INGESTED, Commit, Dataset, Plan, Quarantined, tar_path
from dataengine.shards import Member
from dataengine.work import CellReport, Report, Task, Work

MAX_SHARD_BYTES = 1 << 34
"""Bytes of the images of one shard, which is built in memory; an image that would not fit is refused."""

_AHEAD = 8  # encoded images that are read while two are decoded


@dataclass(frozen=True, kw_only=True)
class IngestSettings:
    """How a corpus is taken in; recorded in the plan."""

    shard_size: int = 1000
    num_crops: int = 1
    min_crop_scale: float = 0.8
    seed: int = 0
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Ingest:
    """The ingest worker: it reads a split and writes the shard's ingested cells."""

    root: str
    corpus: str
    splits: tuple[Split, ...]

    def start(self, device: str) -> Work:
        """Open the corpus and the dataset."""
        dataset, corpus = Dataset(self.root), corpora.load(self.corpus)
        plan = dataset.plan
        return lambda task: _ingest_shard(dataset, corpus, self.splits[task.shard], plan, task)


def prepare(dataset: Dataset, corpus: str, settings: IngestSettings) -> tuple[Ingest, list[Task]]:
    """Write the plan (or find the same one) and list the shards to ingest; Conflict when corpus or settings changed."""
    source = corpora.load(corpus)
    splits = tuple(source.splits(settings.shard_size))
    if not splits:
        raise ValueError(f"{corpora.shown(corpus)} holds no images")
    listed = json.dumps([asdict(s) for s in splits]).encode()
    plan = Plan(
        corpus=corpora.shown(corpus),
        num_shards=len(splits),
        num_items=sum(s.stop - s.start for s in splits),
        fingerprint=hashlib.sha256(listed).hexdigest(),
        ingested=INGESTED + tuple(source.emits),
        **{name: getattr(settings, name) for name in settings.__dataclass_fields__},
    )
    dataset.write_plan(plan)
    done = {m: set(dataset.committed(m)) for m in plan.ingested}
    todo = [i for i in range(len(splits)) if any(i not in done[m] for m in plan.ingested)]
    return Ingest(dataset.store.url, corpus, splits), [Task(i, {m: "" for m in plan.ingested}) for i in todo]


@dataclass(frozen=True)
class _Taken:
    """An item that was accepted: its image, and the members it gives to each column."""

    members: dict[str, Member]
    conversions: tuple[str, ...]


def _ingest_shard(dataset: Dataset, corpus: corpora.Corpus, split: Split, plan: Plan, task: Task) -> Report:
    began = time.perf_counter()
    taken: dict[str, _Taken] = {}
    refused: list[Quarantined] = []
    size = 0
    for key, source, result in _taken(corpus.read(split), plan):
        if isinstance(result, Quarantined):
            refused.append(result)
        elif key in taken:
            refused.append(Quarantined(key, source, "ingest", "duplicate-key", "an earlier item has this key"))
        elif size + len(result.members["rgb"].data) > MAX_SHARD_BYTES:
            detail = f"the images before it in the shard have {size} bytes, at most {MAX_SHARD_BYTES} are taken"
            refused.append(Quarantined(key, source, "ingest", "shard-full", detail))
        else:
            taken[key] = result
            size += len(result.members["rgb"].data)
    dataset.write_quarantine(task.shard, refused)
    # The rgb cell is committed last: while it is missing, the shard is not there for any reader.
    order = [m for m in plan.ingested if m != "rgb"] + ["rgb"]
    cells = [_commit(dataset, plan, split, m, task.shard, taken, len(refused)) for m in order]
    return Report(task.shard, tuple(cells), time.perf_counter() - began, num_refused=len(refused))


def _taken(raws: Iterator[RawSample], plan: Plan) -> Iterator[tuple[str, str, _Taken | Quarantined]]:
    """(key, source, what became of it) of each item in order, with few encoded images in memory that are not taken."""
    with ThreadPoolExecutor(max_workers=2) as threads:
        ahead: deque[tuple[str, str, Future[_Taken | Quarantined]]] = deque()
        for raw in raws:
            ahead.append((raw.key, raw.source, threads.submit(_take, raw, plan)))
            if len(ahead) == _AHEAD:
                key, source, future = ahead.popleft()
                yield key, source, future.result()
        for key, source, future in ahead:
            yield key, source, future.result()


def _take(raw: RawSample, plan: Plan) -> _Taken | Quarantined:
    """Canonicalise one item and encode its columns, or say why it is refused."""
    if raw.error is not None:
        return Quarantined(raw.key, raw.source, "read", "unreadable", raw.error)
    try:
        canonical = encode_exact(raw.values["rgb"]) if "rgb" in raw.values else canonicalise(raw.image, plan.limits)
        members = {m: Member(raw.key, s, data) for m, s, data in _columns(raw, canonical, plan)}
    except Refused as refusal:
        return Quarantined(raw.key, raw.source, "ingest", refusal.reason, refusal.detail)
    except ValueError as error:
        return Quarantined(raw.key, raw.source, "ingest", "bad-value", str(error))
    return _Taken(members, canonical.conversions)


def _columns(raw: RawSample, canonical: Canonical, plan: Plan) -> Sequence[tuple[str, str, bytes]]:
    height, width = canonical.image.shape[:2]
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{plan.seed} {raw.key}".encode()).digest()[:8], "big"))
    values: dict[str, Any] = {
        "caption": list(raw.captions),
        "crop_settings": geometry.crop_settings(rng, height, width, plan.num_crops, plan.min_crop_scale),
        **{m: raw.values[m] for m in plan.ingested if m not in INGESTED},
    }
    out = [("rgb", canonical.suffix, canonical.encoded)]
    for name, value in values.items():
        codec = modalities.load(name)
        codec.check(value, (height, width))
        out.append((name, codec.suffix, codec.encode(value)))
    return out


def _commit(
    dataset: Dataset, plan: Plan, split: Split, modality: str, shard: int, taken: dict[str, _Taken], num_refused: int
) -> CellReport:
    began = time.perf_counter()
    keys = tuple(taken)
    data = shards.build_tar(t.members[modality] for t in taken.values())
    origin: dict[str, Any] = {"ingest": plan.corpus, "libraries": provenance.versions()}
    if modality == "rgb":
        converted = {k: list(t.conversions) for k, t in taken.items() if t.conversions}
        origin |= {"split": asdict(split), "num_refused": num_refused, "converted": converted}
    digest = shards.sha256(data)
    record = Commit(
        modality=modality,
        shard=shard,
        spec=digest,
        file=tar_path(modality, shard),
        num_bytes=len(data),
        sha256=digest,
        num_samples=len(keys),
        keys_sha256=shards.keys_sha256(keys),
        provenance=origin,
        keys=keys if modality == "rgb" else (),
    )
    dataset.publish(record, data)
    return CellReport(modality, len(keys), len(record.invalid), len(data), time.perf_counter() - began)
