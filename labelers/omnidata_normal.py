"""Surface normals by Omnidata's dense prediction transformer (Eftekhar et al. 2021, version 2 of 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from dataengine import weights
from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.weights import Weights
from labelers import _axes, _images, _maps, _networks

PLAIN: _images.Statistics = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CELL = 32


@dataclass(frozen=True, kw_only=True)
class OmnidataNormal(Labeler):
    """Unit vectors float32 (h, w, 3) out of the surface, x right, y down, z forward.

    These are the axes in which the network answers, as colours (n + 1) / 2 clipped to 0..1 (see `labelers/_axes.py`).
    Pixels are in 0..1, without mean and deviation, unlike those of its twin for depth. The whole image is looked at:
    the shorter side is `side`, the 384 pixels of the training, the longer one the nearest multiple of 32 that keeps the
    aspect ratio, at most four times `side`; the answer is resized back (bilinear) and made of length 1 again.
    """

    inputs = ("rgb",)
    emits = ("normal",)
    batch_size = 16
    gpus = 0.2

    checkpoint: str = "https://zenodo.org/records/10447888/files/omnidata_dpt_normal_v2.ckpt"
    side: int = 384
    precision: _networks.Precision = "float16"
    compiled: bool = False  # anew for each size of network: for corpora of few aspect ratios

    def __post_init__(self) -> None:
        if self.side < CELL or self.side % CELL:
            raise ValueError(f"{self.name}: expected a side that is a multiple of {CELL} pixels, got {self.side}")

    def weights(self) -> Weights:
        """The published weights, for non-commercial research (clause 9 of the repository's licence)."""
        return weights.describe(self.checkpoint, licence="Omnidata EULA (non-commercial research)")

    def load(self, device: str) -> Loaded:
        """Read the network and put it on the device."""
        import torch

        from labelers import _omnidata

        network = _omnidata.load(weights.resolve(self.checkpoint), 3, self.name)
        placed = _networks.placed(network, device, self.precision, compiled=self.compiled)

        def run(images: list[_maps.Fitted]) -> torch.Tensor:
            colours = placed(_images.normalised([image.rgb for image in images], PLAIN, device))
            return _networks.finite(colours, self.name).clamp(0, 1) * 2 - 1

        def label(images: Sequence[_maps.Fitted]) -> list[dict[str, Any]]:
            with torch.inference_mode():
                maps = _maps.answered(images, run, lambda one: _axes.unit(one, _axes.OPENCV))
            return [{"normal": normal} for normal in maps]

        def prepare(sample: Any) -> _maps.Fitted:
            shape = _maps.shape_for(sample.size, self.side, CELL)
            return _maps.fitted(sample.rgb, shape, sample.key, Image.Resampling.BILINEAR)

        return Staged(prepare, label)

    def tiny(self, folder: Path) -> OmnidataNormal:
        """A random network of width 16, for 64 pixels, as Lightning saves it."""
        file = folder / "omnidata_dpt_normal.ckpt"
        if not file.exists():
            from labelers import _omnidata

            _omnidata.save_tiny(file, channels=3, seed=1)
            weights.mark_random(file, seed=1)
        return replace(self, checkpoint=str(file), side=64)
