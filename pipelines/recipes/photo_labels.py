"""The demo's labelers for photographs: `dataengine label out/demo/photos --recipe photo_labels`.

The networks are tiny and RANDOM: loading code and file formats are those of the published checkpoints, the labels
mean nothing. With weights at hand, leave the recipe out, and the published checkpoints are used.
"""

from __future__ import annotations

from pathlib import Path

from dataengine import plugins
from dataengine.labeler import Labeler
from pipelines.label import LabelRun
from pipelines.recipes._scenes import OUT

ALGORITHMS = ("canny_edge", "color_palette", "metadata", "opencv_persons")
RANDOM_NETWORKS = ("sam", "clip_b16", "dinov2_b14")


def recipe() -> LabelRun:
    """Exact algorithms, OpenCV's detectors, and random networks whose checkpoints are written first."""
    return labels(Path(OUT) / "random_weights")


def labels(checkpoints: Path) -> LabelRun:
    """The same with the random checkpoints in another folder."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    made = {name: plugins.load("labelers", name, Labeler)() for name in (*ALGORITHMS, *RANDOM_NETWORKS, "sam_edge")}
    random = {name: made[name].tiny(checkpoints) for name in RANDOM_NETWORKS}
    return LabelRun(labelers=tuple((made | random).values()))
