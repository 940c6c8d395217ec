"""Numbers that describe an image, computed from the image and from other labels (the metadata of 4M-21)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
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
    "n_humans": ("det", stats.n_persons),
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

BETTER: dict[str, tuple[str, Callable[[Any], int | float]]] = {"n_humans": ("human_poses", stats.n_humans)}
"""What a kind is computed from where there is that modality: as 4M-21 has it."""

SOURCES = tuple(dict.fromkeys(source for source, _ in (*KINDS.values(), *BETTER.values())))
"""The modalities that any kind needs."""


@dataclass(frozen=True, kw_only=True)
class Metadata(Labeler):
    """A flat dict of numbers by ml-4m's metadata keys: the kinds whose modality is among `from_modalities`.

    Each kind's formula, and where it comes from, is in `labelers/_statistics.py`. `n_humans` counts `human_poses`, or
    the persons of `det` when there are no poses. Counts and sizes are ints, the other kinds floats. Without the setting
    it is rgb and caption, until a plan adapts it to all that exist: the kinds are the same for all samples.
    """

    emits = ("metadata",)
    batch_size = 32

    from_modalities: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.inputs or not set(self.inputs) <= set(SOURCES):
            raise ValueError(f"metadata: expected some of {list(SOURCES)}, got {list(self.inputs)}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The modalities that the setting names, or rgb and caption."""
        return ("rgb", "caption") if self.from_modalities is None else self.from_modalities

    def adapted(self, available: Collection[str]) -> Metadata:
        """With every kind that the available modalities allow; a setting of one's own stays."""
        if self.from_modalities is not None:
            return self
        return replace(self, from_modalities=tuple(name for name in SOURCES if name == "rgb" or name in available))

    def load(self, device: str) -> Loaded:
        """Nothing to load; the device is not used."""
        better = {kind: entry for kind, entry in BETTER.items() if entry[0] in self.inputs}
        wanted = {kind: entry for kind, entry in KINDS.items() if entry[0] in self.inputs or kind in better} | better

        def label(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            return [
                {"metadata": {kind: compute(sample.values[source]) for kind, (source, compute) in wanted.items()}}
                for sample in samples
            ]

        return label
