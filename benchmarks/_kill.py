"""What the kill sweep runs: two stages of labelers, the second slow enough to be met at work, as a recipe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataengine.groups import Group
from dataengine.labeler import Labeler, Loaded
from dataengine.sample import Sample
from labelers.canny_edge import Canny
from labelers.color_palette import Palette
from pipelines.label import LabelRun


@dataclass(frozen=True, kw_only=True)
class Paced(Labeler):
    """SAM edges that are Canny edges inverted, `seconds` a batch; each call leaves its time and keys in `calls`."""

    inputs = ("canny_edge",)
    emits = ("sam_edge",)
    batch_size = 4

    seconds: float = 0.3
    calls: str = ""

    def identity(self) -> dict[str, Any]:
        # Neither the pace nor the log changes what comes out.
        return {"labeler": self.name, "version": self.version, "settings": {}, "weights": None}

    def load(self, device: str) -> Loaded:
        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            if self.calls:
                with Path(self.calls).open("a") as stream:
                    stream.write(f"{time.time()} {' '.join(s.key for s in samples)}\n")
            time.sleep(self.seconds)
            return [{"sam_edge": (255 - s.values["canny_edge"]).astype(np.uint8)} for s in samples]

        return run


def run(calls: str) -> LabelRun:
    """The recipe, with its log of calls."""
    pins = (Group(labelers=("canny_edge", "color_palette"), num_cpus=1.0), Group(labelers=("_kill",), num_cpus=1.0))
    return LabelRun(labelers=(Canny(), Palette(), Paced(calls=calls)), groups=pins)
