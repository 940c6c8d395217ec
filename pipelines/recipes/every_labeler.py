"""Every labeler there is, on tiny RANDOM networks: `dataengine label ROOT --recipe every_labeler`.

Their checkpoints have the format of the published ones, so that all loading and labelling code runs; the labels mean
nothing. An alternative writes a version of the column that another labeler makes: `det@dfine` beside `det`.
"""

from __future__ import annotations

from pathlib import Path

from dataengine.versions import Versioned
from pipelines import label
from pipelines.label import LabelRun
from pipelines.recipes._scenes import OUT


def recipe() -> LabelRun:
    """All labelers of the registry, whose random checkpoints are written first."""
    return labels(Path(OUT) / "random_weights")


def labels(checkpoints: Path) -> LabelRun:
    """The same with the random checkpoints in another folder, one for each labeler."""
    made = []
    for labeler in label.default_labelers():
        folder = checkpoints / labeler.name
        folder.mkdir(parents=True, exist_ok=True)
        tiny = labeler.tiny(folder)
        made.append(Versioned(inner=tiny, column_version=labeler.name) if labeler.alternative else tiny)
    return LabelRun(labelers=tuple(made))
