"""How much faster the labelers are than their references, and what ten million images cost.

python -m benchmarks.labelers [--quick] [--reference DIR] [--json]

Each file `_labelers_*.py` here is a part: its `measure(quick)` compares some labelers with their references, side by
side, and returns figures and ratios. Every part runs in a process of its own, and with `--reference` once more on the
packages of that checkout; one that fails is named in `failed`, and stops no other.

`published` counts parameters and operations of the networks of 4M-21 at their published sizes, and what ten million
images of them cost on an A100 at `planned_mfu`. On a GPU `table` has images/s, memory and the share of the GPU's peak
(MFU) of every labeler whose weights are on this machine, and of those for which a part has `cases(folder, device)`:
objects with a `labeler` on a random checkpoint of the published size.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import _fresh, _report

IMAGES = 10_000_000
A100 = 312e12
PLANNED_MFU = 0.4
"""The part of an A100's peak that planning counts on: published SAM ViT-H encoders reach 0.44."""
GOAL_HOURS = 500
PEAKS = {"A100": A100, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12,
         "4090": 165e12, "5090": 209e12, "V100": 125e12, "T4": 65e12}  # fmt: skip
"""Dense bfloat16 (float16 before Ampere) operations a second of GPUs by what their names hold, the first that fits."""


def parts() -> list[str]:
    """The names of the parts there are."""
    return sorted(path.stem for path in Path(__file__).parent.glob("_labelers_*.py"))


def measure(quick: bool, reference: Path | None) -> dict[str, Any]:
    """Labelers beside their references, what they cost, and what ten million images of them would."""
    found: dict[str, Any] = {"benchmark": "labelers", "parts": {}, "failed": {}}
    with tempfile.TemporaryDirectory(prefix="labelers-") as folder:
        engines = {"": _packages(Path(folder, "here"), _fresh.HERE)}
        if reference is not None:
            engines["reference_"] = _packages(Path(folder, "there"), reference)
        for part in parts():
            for prefix, where in engines.items():
                name = prefix + part.removeprefix("_labelers_")
                _report.console.print(f"{name} ...")
                try:
                    found["parts"][name] = _fresh.call("labelers", "child", {"part": part, "quick": quick}, where)
                except RuntimeError as error:
                    found["failed"][name] = str(error)[-1000:]
        _report.console.print("operations of the published networks ...")
        found["published"] = published()
        found["table"] = _fresh.call("labelers", "table", {"quick": quick}, engines[""])
    found["ratios"] = dict(_ratios(found["parts"], ""))
    found["bill"] = bill(found["published"]["gflop"], found["table"])
    return found


def _packages(base: Path, checkout: Path) -> Path:
    where = _fresh.packages(base, checkout)
    for name in ("labelers", "pipelines", "model"):
        (where / name).symlink_to(checkout.resolve() / name)
    return where


def child(part: str, quick: bool) -> dict[str, Any]:
    """What the fresh process of a part does."""
    figures: dict[str, Any] = importlib.import_module(f"benchmarks.{part}").measure(quick)
    return figures


def _ratios(figures: Mapping[str, Any], path: str) -> Iterator[tuple[str, float]]:
    """Every figure whose name says that it is a ratio, by where it stands."""
    for name, value in figures.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            yield from _ratios(value, where)
        elif isinstance(value, int | float) and ("ratio" in name or "_over_" in name):
            yield where, float(value)


def published() -> dict[str, Any]:
    """Millions of parameters and GFLOP an image of the published networks, and A100 hours for ten million images."""
    from benchmarks import _published

    sizes = _published.sizes()
    gflop = {name: size.flop / 1e9 for name, size in sizes.items()}
    return {
        "million_parameters": {name: size.parameters / 1e6 for name, size in sizes.items()},
        "gflop": gflop,
        "gflop_of_all": sum(gflop.values()),
        "planned_mfu": PLANNED_MFU,
    }


def table(quick: bool) -> dict[str, dict[str, Any]]:
    """Images/s, memory and MFU by labeler; empty without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    from dataengine import plugins
    from dataengine.labeler import Labeler
    from pipelines import checkup
    from pipelines.doctor import no_downloads

    out = {}
    with tempfile.TemporaryDirectory(prefix="labelers-") as folder:
        for part in parts():
            cases = getattr(importlib.import_module(f"benchmarks.{part}"), "cases", None)
            for case in cases(Path(folder), "cuda") if cases is not None else ():
                out[case.labeler.name] = row(checkup.examine(case.labeler, "cuda"))
    with no_downloads():
        for name in plugins.names("labelers"):
            found = checkup.examine(plugins.load("labelers", name, Labeler)(), "cuda")
            if found.outcome != "no weights":
                out[name] = row(found)
    return out


def row(found: Any) -> dict[str, Any]:
    """A line of the table, of a `pipelines.checkup.Finding`."""
    if found.measured is None:
        return {"failed": found.detail}
    best = max(found.measured.batches, key=lambda b: b.images_per_second)
    peak = next((p for name, p in PEAKS.items() if name in found.measured.device), None)
    mfu = None if peak is None or not found.gflop else found.gflop * 1e9 * best.images_per_second / peak
    return {
        "random": found.random,
        "images_per_second": best.images_per_second,
        "images_per_second_alone": found.measured.batches[0].images_per_second,
        "batch": best.size,
        "gigabytes": (found.measured.weights_bytes + best.peak_bytes) / 1e9,
        "gflop": found.gflop,
        "mfu": mfu,
        "gpu_hours": IMAGES / best.images_per_second / 3600 if found.measured.gpu else None,
    }


def bill(gflop: Mapping[str, float], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A100 hours that ten million images cost: by operations, at the measured MFU where there is one."""
    hours = {}
    for name, each in gflop.items():
        mfu = (rows.get(name) or {}).get("mfu") or PLANNED_MFU
        hours[name] = IMAGES * each * 1e9 / (A100 * mfu) / 3600
    return {
        "images": IMAGES,
        "a100_hours": sum(hours.values()),
        "a100_hours_of_each": hours,
        "measured": sorted(name for name in hours if (rows.get(name) or {}).get("mfu")),
        "goal": GOAL_HOURS,
    }


if __name__ == "__main__":
    _report.main(measure)
