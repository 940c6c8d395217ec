"""Whether the bill is right: what `plan --estimate` says of a run of real labelers, and what the run then takes.

python -m benchmarks.engine_estimate [--quick] [--json]

The corpus is made of crops of the photographs that ship in scikit-image and scikit-learn. The labelers are exact
algorithms and tiny random networks in the real formats. Both commands are run as a user runs them, on Ray, with one
worker a core; nothing that was measured before is used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from benchmarks import _report
from benchmarks._fresh import HERE
from pipelines import photos

COLUMNS = ("canny_edge", "color_palette", "sam_instance", "sam_edge", "CLIP-B16", "metadata")
IMAGES, SHARD = 1000, 100
QUICK_COLUMNS, QUICK_IMAGES, QUICK_SHARD = ("canny_edge", "color_palette", "sam_instance", "sam_edge"), 150, 25
SIDE = 256


def crops(folder: Path, count: int) -> None:
    """Random squares of the bundled photographs, `SIDE` pixels wide."""
    photos.write(folder / "photographs")
    files = [file for file in sorted((folder / "photographs").iterdir()) if file.suffix != ".json"]
    images = [np.asarray(Image.open(file).convert("RGB"))[..., ::-1] for file in files]
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(count):
        image = images[i % len(images)]
        height, width = image.shape[:2]
        side = int(rng.uniform(0.5, 1.0) * min(height, width))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        square = cv2.resize(image[top : top + side, left : left + side], (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / "images" / f"crop{i:05d}.jpg"), square)


def recipe(folder: Path) -> Path:
    """A recipe of the demo's labelers whose random checkpoints lie in a folder."""
    file = folder / "photographs_recipe.py"
    lines = (
        "from pathlib import Path",
        "from pipelines.recipes import photo_labels",
        "def recipe():",
        f"    return photo_labels.labels(Path({str(folder / 'weights')!r}))",
    )
    file.write_text("\n".join(lines) + "\n")
    return file


def command(cache: Path, *arguments: str) -> tuple[dict[str, Any], float]:
    """What a command of the engine says as JSON, and its wall seconds."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    # What was written before must not be waited for by what is measured now.
    os.sync()
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments, "--json"],
        cwd=cache.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    spent = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1]), spent


def measure(quick: bool, reference: Path | None) -> dict[str, Any]:
    """The wall time that `plan --estimate` predicts for a run, beside what the run takes."""
    if reference is not None:
        raise ValueError("--reference: only this checkout can be measured, for no other one predicts")
    columns, count, shard = (QUICK_COLUMNS, QUICK_IMAGES, QUICK_SHARD) if quick else (COLUMNS, IMAGES, SHARD)
    with tempfile.TemporaryDirectory() as base:
        folder, root, cache = Path(base), str(Path(base, "root")), Path(base, "cache")
        crops(folder, count)
        command(cache, "ingest", f"folder:{folder / 'images'}", root, "--shard-size", str(shard), "--runner", "local")
        wanted = (root, *columns, "--recipe", str(recipe(folder)))
        said, planning = command(cache, "plan", *wanted, "--estimate")
        _, actual = command(cache, "label", *wanted)
        found = said["estimate"]
        written = sum(file.stat().st_size for m in columns for file in Path(root, m).glob("*.tar"))
    return {
        "images": count,
        "columns": list(columns),
        "predicted_seconds": found["seconds"],
        "actual_seconds": actual,
        "predicted_to_actual": found["seconds"] / actual,
        "within_20_percent": abs(found["seconds"] / actual - 1) <= 0.2,
        "predicted_starting": found["starting"],
        "predicted_labelling": found["labelling"],
        "predicted_ending": found["ending"],
        "predicted_bytes_to_actual": found["num_bytes"] / written,
        "plan_seconds": planning,
        "measuring_seconds": found["measuring"],
        "rehearsed_images": found["rehearsed"],
    }


if __name__ == "__main__":
    _report.main(measure)
