"""Labelers that are planned and never run, for 21 columns: what benchmarks of planning plan with, in any checkout."""

from __future__ import annotations

from dataclasses import dataclass

from dataengine.labeler import Labeler, Loaded

COLUMNS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("depth",): ("rgb",),
    ("normal",): ("rgb",),
    ("semseg",): ("rgb",),
    ("canny_edge",): ("rgb",),
    ("sam_instance",): ("rgb",),
    ("sam_edge",): ("sam_instance",),
    ("det",): ("rgb",),
    ("CLIP-B16",): ("rgb",),
    ("DINOv2-B14", "DINOv2-B14-global"): ("rgb",),
    ("color_palette",): ("rgb",),
    ("metadata",): ("rgb", "semseg", "det", "depth", "sam_instance"),
    **{(f"tok_{m}@224",): ("crop_settings", m) for m in ("rgb", "depth", "normal", "semseg", "canny_edge", "CLIP-B16")},
}
"""What each labeler makes, and from what: 18 columns beside the three of every corpus."""


@dataclass(frozen=True, kw_only=True)
class Recorded(Labeler):
    """A labeler that is planned and never run."""

    makes: tuple[str, ...]
    reads: tuple[str, ...]

    @property
    def emits(self) -> tuple[str, ...]:
        return self.makes

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.reads

    @property
    def name(self) -> str:
        return self.makes[0]

    def load(self, device: str) -> Loaded:
        raise NotImplementedError("there are no images here to label")


def labelers() -> tuple[Recorded, ...]:
    return tuple(Recorded(makes=makes, reads=reads) for makes, reads in COLUMNS.items())


def names() -> list[str]:
    return [m for makes in COLUMNS for m in makes]
