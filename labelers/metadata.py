"""Numbers that describe an image, computed from the image and from other labels (the metadata of 4M-21)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dataengine.labeler import Labeler, Loaded
from dataengine.sample import Sample
from labelers import _statistics as stats

KINDS: dict[str, tuple[str, Callable[[Any], int | float]]] = {
    "original_width": ("rgb", stats.original_width),
    "original_height": ("rgb", stats.original_height),
    "caption_n_chars": ("caption", stats.caption_n_chars),
    "caption_n_words": ("caption", stats.caption_n_words),
    "caption_n_sentences": ("caption", stats.caption_n_sentences),
    "n_humans": ("det", stats.n_humans),
    "n_sam_instances": ("sam_instance", stats.n_sam_instances),
    "n_coco_instances": ("det", stats.n_coco_instances),
    "coco_instance_diversity": ("det", stats.coco_instance_diversity),
    "colorfulness": ("rgb", stats.colorfulness),
    "brightness": ("rgb", stats.brightness),
    "contrast": ("rgb", stats.contrast),
    "saturation": ("rgb", stats.saturation),
    "entropy": ("rgb", stats.entropy),
    "walkability": ("semseg", stats.walkability),
    "objectness": ("semseg", stats.objectness),
    "semantic_diversity": ("semseg", stats.semantic_diversity),
    "geometric_complexity": ("normal", stats.geometric_complexity),
    "occlusion_score": ("depth", stats.occlusion_score),
}
"""Each kind of ml-4m's metadata, in its order there: the modality it needs, and the function of that one's value."""


@dataclass(frozen=True, kw_only=True)
class Metadata(Labeler):
    """A flat dict of numbers by ml-4m's metadata keys: the kinds whose modality is among `from_modalities`.

    Counts and sizes are ints, the other kinds floats in the units that `labelers/_statistics.py` states. A setting, and
    not what happens to lie there, decides the kinds, so that all samples of a dataset have the same.
    """

    emits = ("metadata",)
    batch_size = 32

    from_modalities: tuple[str, ...] = ("rgb", "caption")

    def __post_init__(self) -> None:
        known = sorted({modality for modality, _ in KINDS.values()})
        unknown = [name for name in self.from_modalities if name not in known]
        if unknown or not self.from_modalities:
            raise ValueError(f"metadata: expected some of {known}, got {list(self.from_modalities)}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The modalities that the setting names."""
        return self.from_modalities

    def load(self, device: str) -> Loaded:
        """Nothing to load; the device is not used."""
        wanted = {kind: entry for kind, entry in KINDS.items() if entry[0] in self.from_modalities}

        def label(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            return [
                {"metadata": {kind: compute(sample.values[source]) for kind, (source, compute) in wanted.items()}}
                for sample in samples
            ]

        return label
