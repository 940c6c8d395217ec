"""How planning, a resume with nothing to do and `status` grow with the dataset: 21 columns, up to 12,000 shards.

    python -m benchmarks.engine_scale [--quick] [--reference DIR] [--json]

The dataset is made of commit records alone, a thousand keys a shard; its tars are not there, and nothing asks for
them. Every figure is of a process of its own, from its start to its end: wall time, and its largest resident memory.
`cold` is without the cache of `runs/`, as on the first call after the cache was lost.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import _report
from dataengine import provenance, shards
from dataengine.canonical import Limits
from dataengine.labeler import Labeler, Loaded
from dataengine.manifest import INGESTED, Commit, Dataset, Plan, tar_path
from dataengine.plan import order

ROOT = Path(__file__).resolve().parents[1]
NUM_SHARDS = (1_000, 4_000, 12_000)
QUICK = (200, 500, 1_000)
NUM_KEYS = 1_000
SETTLE_SECONDS = 3.0
"""The youngest records are read again by every call, until no change can hide in the resolution of a file's times."""
LIMIT_SECONDS, LIMIT_MIB, LIMIT_MS_PER_CELL = 30.0, 1024.0, 2.0

COLUMNS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("depth",): ("rgb",),
    ("normal",): ("rgb",),
    ("semseg",): ("rgb",),
    ("canny_edge",): ("rgb",),
    ("sam_instance",): ("rgb",),
    ("sam_edge",): ("sam_instance",),
    ("det",): ("rgb",),
    ("CLIP-B16",): ("rgb",),
    ("DINOv2-B14", "DINOv2-B14-global"): ("rgb",),
    ("color_palette",): ("rgb",),
    ("metadata",): ("rgb", "semseg", "det", "depth", "sam_instance"),
    **{(f"tok_{m}@224",): ("crop_settings", m) for m in ("rgb", "depth", "normal", "semseg", "canny_edge", "CLIP-B16")},
}
"""What each labeler makes, and from what: 18 columns beside the three of every corpus."""


@dataclass(frozen=True, kw_only=True)
class Recorded(Labeler):
    """A labeler that is planned and never run."""

    makes: tuple[str, ...]
    reads: tuple[str, ...]

    @property
    def emits(self) -> tuple[str, ...]:
        return self.makes

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.reads

    @property
    def name(self) -> str:
        return self.makes[0]

    def load(self, device: str) -> Loaded:
        raise NotImplementedError("there are no images here to label")


def labelers() -> tuple[Recorded, ...]:
    return tuple(Recorded(makes=makes, reads=reads) for makes, reads in COLUMNS.items())


def names() -> list[str]:
    return [m for makes in COLUMNS for m in makes]


# -- the dataset ------------------------------------------------------------------------------------------------------


class Synthetic:
    """A dataset of commit records, written straight to a local disk."""

    def __init__(self, root: Path, num_shards: int) -> None:
        self.root, self.num_shards = root, num_shards
        self.specs: list[dict[str, str]] = [{} for _ in range(num_shards)]
        Dataset(root).write_plan(
            Plan(
                corpus="folder:photographs",
                shard_size=NUM_KEYS,
                num_crops=1,
                min_crop_scale=0.8,
                seed=0,
                limits=Limits(),
                num_shards=num_shards,
                num_items=num_shards * NUM_KEYS,
                fingerprint="0" * 64,
                ingested=INGESTED,
            )
        )
        (root / "runs").mkdir()
        self.recipe = root / "runs" / "recipe.py"
        self.recipe.write_text(
            "from benchmarks.engine_scale import labelers\nfrom pipelines.label import LabelRun\n"
            "def recipe():\n    return LabelRun(labelers=labelers())\n"
        )

    def ingest(self) -> None:
        for m in INGESTED:
            made: dict[str, Any] = {"ingest": "folder:photographs", "libraries": provenance.versions()}
            if m == "rgb":
                made |= {"split": {"source": "photographs", "start": 0, "stop": NUM_KEYS}, "num_refused": 0}
            self._write(m, made, [_digest(m, shard) for shard in range(self.num_shards)])

    def label(self) -> None:
        for labeler in order(names(), labelers(), INGESTED):
            made = provenance.of_labeler(labeler) | {"random": False}
            inputs = sorted({"rgb", *labeler.inputs})
            for m in labeler.emits:
                identity = {**labeler.identity(), "emits": m}
                specs = [provenance.spec(identity, {i: known[i] for i in inputs}) for known in self.specs]
                self._write(m, made, specs)

    def _write(self, modality: str, made: Mapping[str, Any], specs: Sequence[str]) -> None:
        folder = self.root / "commits" / modality
        folder.mkdir(parents=True)
        for shard, spec in enumerate(specs):
            self.specs[shard][modality] = spec
            keys = tuple(f"photographs-{shard:05d}-{i:06d}" for i in range(NUM_KEYS)) if modality == "rgb" else ()
            record = Commit(
                modality=modality,
                shard=shard,
                spec=spec,
                file=tar_path(modality, shard),
                num_bytes=12_345_678,
                sha256=_digest(modality, shard),
                num_samples=NUM_KEYS,
                keys_sha256=_digest("keys", shard),
                provenance=dict(made),
                keys=keys,
            )
            text = json.dumps(vars(record), sort_keys=True, indent=1, ensure_ascii=False)
            (folder / f"{shards.shard_name(shard)}.json").write_text(text + "\n")


def _digest(*words: object) -> str:
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()


# -- the figures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """What one process took; `said` is what it printed."""

    seconds: float
    mib: float
    said: str


def measured(arguments: Sequence[object], checkout: Path = ROOT) -> Figure:
    """Run Python on the code of a checkout."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout}:{ROOT}"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=out, stderr=err, text=True)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        for stream in (out, err):
            stream.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {err.read()[-2000:]}")
        return Figure(seconds, usage.ru_maxrss / 1024, out.read())


PLAN = """
import json, sys, time
from dataengine.manifest import Dataset
from pipelines import label
began = time.perf_counter()
made = label.plan(Dataset(sys.argv[1]), sys.argv[3:], sys.argv[2])
print(json.dumps([made.num_cells, made.num_done, time.perf_counter() - began]))
"""


def plan(data: Synthetic, checkout: Path = ROOT) -> tuple[Figure, int]:
    """Plan all columns; how many cells are to do."""
    figure = measured(["-c", PLAN, data.root, data.recipe, *names()], checkout)
    todo, done, _ = json.loads(figure.said)
    assert todo + done == data.num_shards * len(names()), figure.said
    return figure, int(todo)


def resume(data: Synthetic, checkout: Path = ROOT) -> Figure:
    """`dataengine label` where everything is committed."""
    arguments = ["label", data.root, *names(), "--recipe", data.recipe, "--json"]
    figure = measured(["-m", "pipelines", *arguments], checkout)
    assert json.loads(figure.said.splitlines()[-1])["already_committed"] == data.num_shards * len(names()), figure.said
    return figure


def status(data: Synthetic, checkout: Path = ROOT) -> Figure:
    """`dataengine status` of the whole dataset."""
    figure = measured(["-m", "pipelines", "status", data.root, "--json"], checkout)
    rows = json.loads(figure.said)
    assert [r["shards"] for r in rows] == [data.num_shards] * (len(INGESTED) + len(names())), figure.said
    return figure


def size(num_shards: int, reference: Path | None) -> dict[str, Any]:
    """All figures of one size of dataset."""
    with tempfile.TemporaryDirectory() as folder:
        data = Synthetic(Path(folder), num_shards)
        data.ingest()
        time.sleep(SETTLE_SECONDS)
        found = {"plan_cold": plan(data)[0]}
        found["plan"], todo = plan(data)
        assert todo == num_shards * len(names())
        data.label()
        time.sleep(SETTLE_SECONDS)
        found["status_cold"] = status(data)
        found["status"] = status(data)
        found["resume"] = resume(data)
        out = {name: {"seconds": f.seconds, "mib": f.mib} for name, f in found.items()}
        if reference is not None:
            for name, measure in (("resume", resume), ("status", status)):
                there = measure(data, reference.resolve())
                out[name] |= {"reference_seconds": there.seconds, "reference_mib": there.mib}
                out[name]["reference_ratio"] = there.seconds / found[name].seconds
        return out


def measure(quick: bool, reference: Path | None) -> dict[str, Any]:
    """Planning, a resume with nothing to do and status, of 21 columns and ever more shards; how each grows."""
    counts = QUICK if quick else NUM_SHARDS
    sizes: dict[str, Any] = {}
    for n in counts:
        _report.console.print(f"{n:,} shards of {len(INGESTED) + len(names())} columns")
        # A reference that reads every record each time takes minutes at full size: the smallest shows the ratio.
        sizes[str(n)] = size(n, reference if n == counts[0] else None)
    draw(sizes)
    largest = sizes[str(counts[-1])]
    cells = counts[-1] * len(names())
    per_cell = 1000 * largest["plan"]["seconds"] / cells
    return {
        "columns": len(INGESTED) + len(names()),
        "keys_per_shard": NUM_KEYS,
        "sizes": sizes,
        "growth": {name: growth(sizes, name) for name in largest},
        "planning_ms_per_cell": per_cell,
        "limits": {"seconds": LIMIT_SECONDS, "mib": LIMIT_MIB, "ms_per_cell": LIMIT_MS_PER_CELL},
        "within_limits": per_cell < LIMIT_MS_PER_CELL
        and all(f["seconds"] < LIMIT_SECONDS and f["mib"] < LIMIT_MIB for f in largest.values()),
    }


def growth(sizes: Mapping[str, Any], name: str) -> float:
    """The exponent p of seconds ~ shards ** p between the smallest and the largest size: 1 is linear."""
    (n0, first), *_, (n1, last) = ((int(n), figures[name]["seconds"]) for n, figures in sizes.items())
    return math.log(last / first) / math.log(n1 / n0)


def draw(sizes: Mapping[str, Any]) -> None:
    """Seconds and MiB by number of shards, as bars of text."""
    for unit in ("seconds", "mib"):
        top = max(f[unit] for figures in sizes.values() for f in figures.values())
        _report.console.print(f"\n{unit} by number of shards", style="bold")
        for name in next(iter(sizes.values())):
            for n, figures in sizes.items():
                value = figures[name][unit]
                bar = "█" * max(1, round(60 * value / top))
                _report.console.print(f"  {name:<12} {int(n):>6,}  {bar} {value:.1f}", highlight=False)


if __name__ == "__main__":
    _report.main(measure)
