"""Features of scenes, for their tokens: `dataengine tokenize out/demo/scenes ... --recipe scenes_features`."""

from __future__ import annotations

from pipelines.label import LabelRun
from pipelines.recipes._hog import Hog


def recipe() -> LabelRun:
    """Histograms of oriented gradients, which need no weights."""
    return LabelRun(labelers=(Hog(),))
