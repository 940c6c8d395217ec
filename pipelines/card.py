"""The dataset card in the Hugging Face hub's format, written from commit records alone."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dataengine import modalities
from dataengine.evolve import PACKED, existing, records
from dataengine.index import Index
from dataengine.manifest import Dataset, ingested_first
from dataengine.shards import shard_name
from dataengine.storage import redacted
from pipelines.licences import STRICTNESS, conditions, terms

_TASKS = {
    "caption": "image-to-text",
    "depth": "depth-estimation",
    "semseg": "image-segmentation",
    "det": "object-detection",
    "sam_instance": "mask-generation",
    "CLIP-B16": "image-feature-extraction",
    "DINOv2-B14": "image-feature-extraction",
}
"""The hub's task of a modality, where it has one."""

_HUB_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0"),
    *("cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "unlicense", "isc"),
)
_COMMERCIAL = {
    "free": "yes",
    "conditional": "under conditions",
    "inherited": "as its training data",
    "unknown": "not known",
    "forbidden": "NO",
}
_OURS = ("commercial", "kind", "suffix", "project_version")
"""Words of this module, which need no escaping."""

_MOST_SHARDS = 32
_MOST_REASONS = 10


def facts(dataset: Dataset, images_licence: str = "") -> dict[str, Any]:
    """What the card says, as plain values, not yet escaped for Markdown; holds no credentials.

    Read are the index of the commit records, the rgb records one by one, of the others the first and those with failed
    labels, and the quarantine file by file.
    """
    index, plan = Index.open(dataset.store), dataset.plan
    names = ingested_first(index.modalities())
    firsts = {m: existing(dataset, m, index.shards(m)[0]).provenance for m in names}
    columns = []
    for m in names:
        t = index.totals(m)
        columns.append(
            {
                "name": m,
                "kind": "packed" if m == PACKED else modalities.load(m).kind,
                "suffix": "arrow" if m == PACKED else _suffix(m),
                "shards": t.num_cells,
                "samples": t.num_samples,
                "failed": t.num_invalid,
                "num_bytes": t.num_bytes,
                "maker": t.maker,
                "random": t.random,
            }
        )
    labels = [m for m in names if m not in plan.ingested]
    samples = index.num_samples("rgb")
    sources, converted = _sources(dataset, samples)
    failures, per_shard = _failures(dataset, index, labels)
    labelers = [_labeler(m, firsts[m]) for m in labels if "labeler" in firsts[m]]
    libraries = {f"{name} {version}" for made in firsts.values() for name, version in made.get("libraries", {}).items()}
    found: dict[str, Any] = {
        "name": dataset.store.name.rstrip("/").rsplit("/", 1)[-1],
        "num_images": sum(samples.values()),
        "num_shards": plan.num_shards,
        "num_crops": plan.num_crops,
        "min_crop_scale": plan.min_crop_scale,
        "seed": plan.seed,
        "columns": columns,
        "labels": labels,
        "random": [c["name"] for c in columns if c["random"]],
        "smallest": min(samples.values(), default=0),
        "largest": max(samples.values(), default=0),
        "shards": [
            {"name": shard_name(s), "samples": n, "failed": [per_shard[m, s] for m in labels]}
            for s, n in (samples.items() if len(samples) <= _MOST_SHARDS else ())
        ],
        "sources": sources,
        "converted": converted,
        "labelers": labelers,
        "failures": failures,
        "quarantine": _quarantine(dataset),
        "libraries": sorted(libraries),
        "project_version": importlib.metadata.version("m21-dataengine"),
    }
    return _redacted(found | _licences(labelers, images_licence))


def _suffix(column: str) -> str:
    return "jpg, png" if column == "rgb" else modalities.load(column).suffix


def _sources(dataset: Dataset, shards: Iterable[int]) -> tuple[list[dict[str, Any]], list[tuple[str, int]]]:
    """Images taken and refused by corpus, and how many images had which conversion."""
    taken: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    converted: Counter[str] = Counter()
    for record in records(dataset, "rgb", shards):
        corpus = str(record.provenance.get("ingest", "not recorded"))
        taken[corpus] += record.num_samples
        refused[corpus] += int(record.provenance.get("num_refused", 0))
        for names in record.provenance.get("converted", {}).values():
            converted.update(names)
    sources = [{"corpus": c, "images": n, "refused": refused[c]} for c, n in sorted(taken.items())]
    return sources, sorted(converted.items())


def _failures(
    dataset: Dataset, index: Index, columns: Sequence[str]
) -> tuple[list[dict[str, Any]], Counter[tuple[str, int]]]:
    """The commonest reasons of failed labels by column, and how many there are in each cell."""
    rows: list[dict[str, Any]] = []
    cells: Counter[tuple[str, int]] = Counter()
    for column in columns:
        reasons: Counter[str] = Counter()
        for record in records(dataset, column, index.failed(column)):
            cells[column, record.shard] = len(record.invalid)
            reasons.update(record.invalid.values())
        ranked = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
        rows += [{"column": column, "reason": r, "count": n} for r, n in ranked[:_MOST_REASONS]]
        if rest := ranked[_MOST_REASONS:]:
            reason = f"{len(rest)} other reasons"
            rows.append({"column": column, "reason": reason, "count": sum(n for _, n in rest)})
    return rows, cells


def _quarantine(dataset: Dataset) -> list[dict[str, Any]]:
    """Refused items by stage and reason; one file is in memory at a time."""
    found: Counter[tuple[str, str]] = Counter()
    for name in dataset.store.files("quarantine"):
        for line in dataset.store.read(f"quarantine/{name}").decode().splitlines():
            item = json.loads(line)
            found[item["stage"], item["reason"]] += 1
    return [{"stage": s, "reason": r, "count": n} for (s, r), n in sorted(found.items())]


def _labeler(column: str, made: dict[str, Any]) -> dict[str, Any]:
    weights = made.get("weights") or {}
    licence = weights.get("licence", "")
    return {
        "column": column,
        "labeler": made["labeler"],
        "version": made["version"],
        "settings": "; ".join(f"{k}={v}" for k, v in made.get("settings", {}).items()),
        "weights": weights.get("source", "none: an algorithm"),
        "revision": weights.get("revision") or ("not recorded" if weights else ""),
        "sha256": weights.get("sha256", ""),
        "random": bool(weights.get("random")),
        "licence": licence,
        "commercial": _COMMERCIAL[terms(licence)] if weights else "",
    }


def _licences(labelers: Sequence[dict[str, Any]], images: str) -> dict[str, Any]:
    """Every licence that has a part in the dataset, the strictest of them, and a sentence that says so."""
    held = [("the images", images), *((x["column"], x["licence"]) for x in labelers if x["sha256"] and not x["random"])]
    # The images come first, so that they are named where nothing is stricter.
    what, strictest = max(held, key=lambda pair: STRICTNESS.index(terms(pair[1])))
    found = terms(strictest)
    name = strictest or "not stated"
    summary = {
        "free": f"Every licence here allows any use; {name} is one of them.",
        "conditional": f"The most restrictive licence is that of {what}, {name}: {conditions(strictest)}.",
        "inherited": f"The most restrictive is {what}: its licence is that of the data its tokenizer was trained on.",
        "unknown": f"The licence of {what} is not known ({name}): find out before any use.",
        "forbidden": f"NO COMMERCIAL USE: the licence of {what}, {name}, forbids it.",
    }[found]
    return {
        "licence": strictest,
        "licence_terms": found,
        "licence_summary": summary + ("" if images else " No record states the licence of the images: --licence does."),
        "licences": [
            {"what": w, "licence": text or "not stated", "commercial": _COMMERCIAL[terms(text)]} for w, text in held
        ],
    }


def render(found: dict[str, Any], name: str = "") -> str:
    """The card: a YAML header and Markdown, in which no value from the dataset can be anything but text."""
    from huggingface_hub import DatasetCard, DatasetCardData

    real = [c["name"] for c in found["columns"] if not c["random"]]
    pretty = name or found["name"]
    data = DatasetCardData(
        pretty_name=pretty,
        size_categories=[_size_category(found["num_images"])],
        task_categories=sorted({_TASKS[m] for c in real if (m := modalities.split(c)[0]) in _TASKS}),
        tags=["webdataset", "multimodal", "pseudo-labels", *(["random-weights"] if found["random"] else [])],
        **_hub_licence(found["licence"], found["licence_terms"]),
    )
    columns = [
        {
            **_escaped(c),
            "percent": f"{100 * c['failed'] / max(c['samples'], 1):.2f}",
            "megabytes": f"{c['num_bytes'] / 1e6:.1f}",
            "kilobytes": f"{c['num_bytes'] / 1e3 / max(c['samples'], 1):.1f}",
        }
        for c in found["columns"]
    ]
    shown = next((c for c in found["labels"] if c in real and c != PACKED), None)
    texts = {
        **_escaped(found),
        "columns": columns,
        "name": _plain(pretty),
        "snippet_columns": json.dumps(["rgb", "caption", *([shown] if shown else [])]),
        "licence_summary": _plain(found["licence_summary"]),
    }
    card = DatasetCard.from_template(data, template_path=str(Path(__file__).with_name("card.md.j2")), **texts)
    return re.sub(r"\n{3,}", "\n\n", card.content)


def write(path: Path, text: str) -> None:
    """Write a card in place of what is there, at once."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            os.fchmod(handle, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _hub_licence(licence: str, found: str) -> dict[str, Any]:
    name = re.sub(r"[^a-z0-9.+]+", "-", licence.lower()).strip("-")
    if name in _HUB_LICENCES:
        return {"license": name}
    if found == "unknown" and not name:
        return {"license": "unknown"}
    return {"license": "other", "license_name": name or "none"}


def _size_category(count: int) -> str:
    marks = [10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9, 10**10, 10**11, 10**12]
    words = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    at = sum(count >= mark for mark in marks)
    if at == 0:
        return "n<1K"
    return f"{words[at - 1]}<n<{words[at]}" if at < len(words) else "n>1T"


def _redacted(value: Any) -> Any:
    """Every text in it without the secrets of URLs."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {k: _redacted(v) for k, v in value.items()}
    return [_redacted(v) for v in value] if isinstance(value, list | tuple) else value


def _escaped(value: Any) -> Any:
    """Every text in it as a Markdown code span, which nothing in it can end or make a link, a tag or a table cell."""
    if isinstance(value, str):
        text = " ".join(value.split()).replace("`", "'").replace("|", r"\|")
        text = "".join(c if c.isprintable() else "?" for c in text)
        return f"`{text}`" if text else ""
    if isinstance(value, dict):
        return {k: v if k in _OURS else _escaped(v) for k, v in value.items()}
    return [_escaped(v) for v in value] if isinstance(value, list | tuple) else value


def _plain(text: str) -> str:
    """A text for prose: every punctuation mark that Markdown could take for its own is escaped."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~$&@:])", r"\\\1", line)
