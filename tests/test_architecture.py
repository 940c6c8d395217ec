"""The shape of the project: who may be imported by whom at import time, sizes, and what a wheel holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dataengine", "labelers", "model", "pipelines")
MAX_LINES = 400


def test_no_file_is_too_long() -> None:
    lengths = {p: len(p.read_text().splitlines()) for name in PACKAGES for p in (ROOT / name).rglob("*.py")}
    assert len(lengths) > 40
    assert {str(p): n for p, n in lengths.items() if n > MAX_LINES} == {}


@pytest.mark.parametrize("package", ["dataengine", "labelers"])
def test_importing_every_module_loads_no_network_library(package: str) -> None:
    # The networks of labelers are in private modules, which a labeler imports when it loads its weights.
    code = f"""
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, {package!r} + "."):
    if module.name != "dataengine.actors" and not module.name.startswith("labelers._"):
        importlib.import_module(module.name)
networks = {{"torch", "ray", "transformers", "open_clip", "timm", "segment_anything", "datasets"}}
heavy = sorted(set(sys.modules) & networks)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_its_door_imports_ray_and_fsspec() -> None:
    doors = {
        # Ray Train starts processes that torch connects, which the engine must not know.
        "ray": ["dataengine/_ray_metrics.py", "dataengine/actors.py", "pipelines/cluster_train.py"],
        "fsspec": ["dataengine/storage.py"],
    }
    found: dict[str, list[str]] = {name: [] for name in doors}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            words = [line.split() for line in path.read_text().splitlines()]
            for name in doors:
                if any(w[:1] in (["import"], ["from"]) and w[1].split(".")[0] == name for w in words if len(w) > 1):
                    found[name].append(str(path.relative_to(ROOT)))
    assert {name: sorted(paths) for name, paths in found.items()} == doors


def test_a_wheel_holds_exactly_the_four_packages_and_their_data(tmp_path: Path) -> None:
    import zipfile

    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == set(PACKAGES)
    assert {"pipelines/photos.json", "pipelines/page.html.j2"} <= set(names)
