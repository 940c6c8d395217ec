"""What is in a dataset, for people: the status table and the page of `dataengine inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataengine import index, modalities
from dataengine.index import Index
from dataengine.manifest import Commit, Dataset, ingested_first
from dataengine.modalities import Picture
from dataengine.shards import shard_name
from pipelines.page import Cell, Column, Grid, Page, Row, Section, Table


@dataclass(frozen=True)
class Status:
    """One modality of a dataset: how much of it is committed, and by whom."""

    modality: str
    shards: int
    of: int
    samples: int
    invalid: int
    num_bytes: int
    labeler: str
    random: bool


def status(dataset: Dataset) -> list[Status]:
    """One line a modality, the ingested ones first."""
    of = dataset.plan.num_shards
    cells = Index.open(dataset.store)
    out = []
    for modality in ingested_first(cells.modalities()):
        t = cells.totals(modality)
        out.append(Status(modality, t.num_cells, of, t.num_samples, t.num_invalid, t.num_bytes, t.maker, t.random))
    return out


def maker(record: Commit) -> str:
    """Who made a cell: the corpus, a labeler, or the packer."""
    return index.maker(record.provenance)


def _records(dataset: Dataset, modality: str) -> list[Commit]:
    found = (dataset.commit(modality, shard) for shard in dataset.committed(modality))
    return [r for r in found if r is not None]


def page(dataset: Dataset, samples: int, title: str = "Dataset") -> Page:
    """Samples x modalities, commits, quarantine, provenance."""
    rows = status(dataset)
    quarantined = len(dataset.quarantine())
    facts = (
        ("samples", str(next((r.samples for r in rows if r.modality == "rgb"), 0))),
        ("modalities", str(len(rows))),
        ("cells committed", str(sum(r.shards for r in rows))),
        ("in quarantine", str(quarantined)),
    )
    return Page(title, dataset.plan.corpus, facts, sections(dataset, samples))


def sections(dataset: Dataset, samples: int, prefix: str = "") -> tuple[Section, ...]:
    """The sections of one dataset's page; `prefix` tells two datasets on one page apart."""
    return (
        grid(dataset, samples, prefix),
        _commit_table(dataset, prefix),
        _quarantine_table(dataset, prefix),
        _provenance_table(dataset, prefix),
    )


def grid(dataset: Dataset, samples: int, prefix: str = "") -> Grid:
    """The first samples of a dataset, spread over its shards, under every modality that can be shown."""
    rows = sorted((r for r in status(dataset) if r.modality != "tokens"), key=lambda r: r.random)
    columns = tuple(Column(r.modality, r.labeler, r.random) for r in rows)
    names = [r.modality for r in rows]
    shards = dataset.committed("rgb")
    each = -(-samples // max(len(shards), 1))
    out: list[Row] = []
    for shard in shards:
        out += _rows(dataset, shard, names, min(each, samples - len(out)))
    text = (
        f"{len(out)} of {sum(r.samples for r in rows if r.modality == 'rgb')} samples; every column is aligned by key."
    )
    return Grid(f"{prefix}Samples and their labels", text, columns, tuple(out))


def _rows(dataset: Dataset, shard: int, names: Sequence[str], count: int) -> list[Row]:
    keys = dataset.keys(shard)[:count]
    values: dict[str, list[Any]] = {}
    records = {m: dataset.commit(m, shard) for m in names}
    for m in names:
        if records[m] is not None:
            codec = modalities.load(m)
            values[m] = [codec.decode(member.data) for member in dataset.read(m, shard)[:count]]
    return [Row(key, tuple(_cell(m, i, key, values, records[m]) for m in names)) for i, key in enumerate(keys)]


def _cell(name: str, index: int, key: str, values: dict[str, list[Any]], record: Commit | None) -> Cell:
    if record is None:
        return Cell(name, Picture(), valid=False, note="not labelled yet")
    if key in record.invalid:
        return Cell(name, Picture(), valid=False, note=record.invalid[key])
    note = "random weights" if record.provenance.get("random") else ""
    rgb: np.ndarray = values["rgb"][index]
    return Cell(name, modalities.load(name).picture(values[name][index], rgb), note=note)


def _commit_table(dataset: Dataset, prefix: str) -> Table:
    rows = tuple(
        (
            r.modality,
            shard_name(r.shard),
            str(r.num_samples),
            str(len(r.invalid)),
            str(r.num_bytes),
            r.sha256[:16],
            r.spec[:16],
        )
        for m in dataset.modalities()
        for r in _records(dataset, m)
    )
    header = ("modality", "shard", "samples", "failed", "bytes", "sha256", "identity")
    text = "A cell exists when its record does. Same identity, same bytes."
    return Table(f"{prefix}Commits", text, header, rows)


def _quarantine_table(dataset: Dataset, prefix: str) -> Table:
    rows = tuple((q.key, q.source, q.stage, q.reason, q.detail) for q in dataset.quarantine())
    text = "Refused at ingest, so in no modality." if rows else "Nothing was refused at ingest."
    return Table(f"{prefix}Quarantine", text, ("key", "source", "stage", "reason", "detail"), rows)


def _provenance_table(dataset: Dataset, prefix: str) -> Table:
    rows = []
    for m in dataset.modalities():
        made = _records(dataset, m)[0].provenance
        weights = made.get("weights") or {}
        settings = ", ".join(f"{k}={v}" for k, v in made.get("settings", {}).items())
        source = "RANDOM WEIGHTS" if weights.get("random") else weights.get("source", "")
        rows.append(
            (
                m,
                maker(_records(dataset, m)[0]),
                settings,
                source,
                weights.get("sha256", "")[:16],
                weights.get("licence", ""),
            )
        )
    header = ("modality", "made by", "settings", "weights", "sha256", "licence")
    return Table(f"{prefix}Provenance", "What made each column, and under which licence.", header, tuple(rows))
