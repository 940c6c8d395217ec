"""How planning, a resume with nothing to do and `status` grow with the dataset: 21 columns, up to 12,000 shards.

    python -m benchmarks.engine_scale [--quick] [--reference DIR] [--json]

The dataset is made of commit records alone, a thousand keys a shard; its tars are not there, and nothing asks for
them. Every figure is of a process of its own, from its start to its end: wall time, and its largest resident memory.
`cold` is without the cache of `runs/`, as on the first call after the cache was lost. `coordinator` plans everything
and drives a run of it, with monitor and log, on workers that take no time: its processor time is what a cell costs.
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

from rich.console import Console

from benchmarks import _report
from benchmarks._recorded import labelers, names
from dataengine import provenance, shards
from dataengine.canonical import Limits
from dataengine.driver import Driver
from dataengine.manifest import INGESTED, Commit, Dataset, Plan, tar_path
from dataengine.plan import LabelPlan, order
from dataengine.schedule import Stage
from dataengine.work import CellReport, LabelGroup, Report, Task
from pipelines.monitor import Monitor

ROOT = Path(__file__).resolve().parents[1]
NUM_SHARDS = (1_000, 4_000, 12_000)
QUICK = (200, 500, 1_000)
NUM_KEYS = 1_000
NUM_WORKERS = 40
LIMIT_SECONDS, LIMIT_MIB, LIMIT_MS_PER_CELL = 30.0, 1024.0, 2.0


# -- the dataset ------------------------------------------------------------------------------------------------------


class Synthetic:
    """A dataset of commit records, written straight to a local disk."""

    def __init__(self, root: Path, num_shards: int) -> None:
        self.root, self.num_shards, self.began = root, num_shards, time.time() - 60
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
            "from benchmarks._recorded import labelers\nfrom pipelines.label import LabelRun\n"
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
            path = folder / f"{shards.shard_name(shard)}.json"
            path.write_text(text + "\n")
            # As old as any but those of the last seconds, which every call reads again.
            os.utime(path, (self.began, self.began))


def _digest(*words: object) -> str:
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()


# -- a run without work -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Asked:
    """A question to a worker, and its answer."""

    worker: str
    what: str
    arguments: tuple[Any, ...]


class Instant:
    """A cluster of workers that are done at once. It tells of one end at a time, as a real one does: what remains is
    what the coordinator itself does for each task."""

    elastic = False

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers

    def start(self, stage: Stage, device: str, batch_seconds: float) -> str:
        return stage.name

    def ask(self, worker: str, what: str, *arguments: Any) -> Asked:
        return Asked(worker, what, arguments)

    def wait(self, answers: list[Any], seconds: float) -> list[Any]:
        return answers[:1]

    def get(self, answer: Asked) -> Any:
        if answer.what == "ready":
            return "node"
        if answer.what != "run":
            return {"cpu": 1.0, "gpus": [], "memory": 0}
        (task,) = answer.arguments
        cells = tuple(CellReport(m, NUM_KEYS, 0, 12_345_678, 1.0) for m in task.specs if task.rows is None)
        return Report(task.shard, cells, 1.0, rows=task.rows, spent={"read": 0.1, f"label:{answer.worker}": 0.9})

    def kill(self, worker: str) -> None:
        return

    def nodes(self) -> dict[str, dict[str, float]]:
        return {"node": {"CPU": float(self._num_workers)}}

    def draining(self) -> dict[str, int]:
        return {}


def stages(made: LabelPlan) -> list[Stage]:
    """The plan in four groups: the labelers in three, and the tokens of what they make."""
    groups: list[set[str]] = [set(), set(), set()]
    for i, labeler in enumerate(labelers()[:-6]):
        groups[2 if len(labeler.inputs) > 1 else i % 2] |= set(labeler.emits)
    groups.append({m for m in names() if m.startswith("tok_")})
    out: list[Stage] = []
    for i, group in enumerate(groups):
        tasks = tuple(Task(t.shard, {m: s for m, s in t.specs.items() if m in group}) for t in made.tasks)
        needs = tuple(s.name for s in out[:2])
        worker = LabelGroup("nowhere", ())
        out.append(Stage(name=f"group{i}", worker=worker, tasks=tasks, num_rows=made.num_rows, window=32, needs=needs))
    return out


def coordinate(root: str, recipe: str) -> None:
    """Plan everything and run it on workers that take no time, watched as any run is; print what this process did."""
    from pipelines import label

    began = time.process_time()
    dataset = Dataset(root)
    made = label.plan(dataset, names(), recipe)
    planned = time.process_time()
    with Monitor(dataset.store, "benchmark", Console(stderr=True)) as monitor:
        Driver(Instant(NUM_WORKERS), stages(made), monitor.on_event, "cpu", None, 60.0).run()
    spent = {"plan": planned - began, "run": time.process_time() - planned}
    print(json.dumps({"cells": made.num_cells, "tasks": 4 * len(made.tasks), "seconds": spent}))


# -- the figures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """What one process took; `said` is what it printed."""

    seconds: float
    cpu_seconds: float
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
        return Figure(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, out.read())


def plan(data: Synthetic) -> tuple[Figure, int]:
    """`dataengine plan` of all columns; how many cells are to do."""
    figure = measured(["-m", "pipelines", "plan", data.root, *names(), "--recipe", data.recipe, "--json"])
    said = json.loads(figure.said)
    assert said["cells"] + said["done"] == data.num_shards * len(names()), figure.said
    return figure, int(said["cells"])


COORDINATE = "import sys; from benchmarks.engine_scale import coordinate; coordinate(*sys.argv[1:])"


def coordinator(data: Synthetic) -> tuple[Figure, dict[str, float]]:
    """Plan and drive a run of everything that is to do; processor time of the coordinator, in milliseconds a cell."""
    figure = measured(["-c", COORDINATE, data.root, data.recipe])
    said = json.loads(figure.said)
    assert said["cells"] == data.num_shards * len(names()), figure.said
    return figure, {f"{name}_ms_per_cell": 1000 * t / said["cells"] for name, t in said["seconds"].items()}


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
        found = {"plan_cold": plan(data)[0]}
        found["plan"], todo = plan(data)
        assert todo == num_shards * len(names())
        found["coordinator"], per_cell = coordinator(data)
        data.label()
        found["status_cold"] = status(data)
        found["status"] = status(data)
        found["resume"] = resume(data)
        out = {name: {"seconds": f.seconds, "cpu_seconds": f.cpu_seconds, "mib": f.mib} for name, f in found.items()}
        out["coordinator"] |= per_cell
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
        sizes[str(n)] = size(n, reference)
    draw(sizes)
    largest = sizes[str(counts[-1])]
    per_cell = sum(largest["coordinator"][f"{name}_ms_per_cell"] for name in ("plan", "run"))
    limited = [largest[name] for name in ("plan", "resume", "status")]
    return {
        "columns": len(INGESTED) + len(names()),
        "keys_per_shard": NUM_KEYS,
        "sizes": sizes,
        "growth": {name: growth(sizes, name) for name in largest},
        "coordinator_ms_per_cell": per_cell,
        "limits": {"seconds": LIMIT_SECONDS, "mib": LIMIT_MIB, "ms_per_cell": LIMIT_MS_PER_CELL},
        "within_limits": per_cell < LIMIT_MS_PER_CELL
        and all(f["seconds"] < LIMIT_SECONDS and f["mib"] < LIMIT_MIB for f in limited),
    }


def growth(sizes: Mapping[str, Any], name: str) -> float:
    """The exponent p of processor seconds ~ shards ** p between the smallest and the largest size: 1 is linear."""
    (n0, first), *_, (n1, last) = ((int(n), figures[name]["cpu_seconds"]) for n, figures in sizes.items())
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
