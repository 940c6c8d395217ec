"""Sample: one key and everything known about it so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One key and its values by modality name, decoded: `values["rgb"]` is uint8 (h, w, 3) RGB."""

    key: str
    values: Mapping[str, Any]
    prepared: Any = None
    """What the labeler's own `prepare` made of it, ahead of time (see `dataengine.labeler.Staged`)."""

    @property
    def rgb(self) -> np.ndarray:
        """The canonical image, uint8 (h, w, 3)."""
        image: np.ndarray = self.values["rgb"]
        return image

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the canonical image in pixels."""
        return self.rgb.shape[0], self.rgb.shape[1]
