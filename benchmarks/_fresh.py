"""A measurement in a process of its own, on the `dataengine` of any checkout: nothing is warm, nothing is left over."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
_PROGRAM = "import sys; from benchmarks import _fresh; _fresh.answer(*sys.argv[1:])"


def packages(base: Path, checkout: Path = HERE) -> Path:
    """A new folder to import from: the `dataengine` of a checkout, and these benchmarks."""
    base.mkdir(parents=True)
    (base / "dataengine").symlink_to(checkout.resolve() / "dataengine")
    (base / "benchmarks").symlink_to(HERE / "benchmarks")
    return base


def call(module: str, function: str, arguments: Mapping[str, Any], where: Path) -> Any:
    """What `benchmarks.<module>.<function>(**arguments)` returns in a fresh process that imports from a folder.

    Arguments and result are plain values; RuntimeError with what it wrote when it fails.
    """
    # What was written before must not be waited for by what is measured now.
    os.sync()
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, module, function, json.dumps(arguments)],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(where), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{module}.{function} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(module: str, function: str, arguments: str) -> None:
    """The other end of `call`: the result is the last line of standard output."""
    found = getattr(importlib.import_module(f"benchmarks.{module}"), function)(**json.loads(arguments))
    print("\n" + json.dumps(found), flush=True)
