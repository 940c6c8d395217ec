"""Relative depth by Omnidata's dense prediction transformer (Eftekhar et al. 2021, version 2 of 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from dataengine import weights
from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.weights import Weights
from labelers import _images, _maps, _networks

CENTRED: _images.Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CELL = 32


@dataclass(frozen=True, kw_only=True)
class OmnidataDepth(Labeler):
    """Depth without a unit: float32 (h, w) in 0..1, small is near, as the network gives it (clipped, not stretched).

    The network was trained for a scale and a shift of its own in each image, so that only order and ratios of
    differences within an image mean something; 4M trains on standardised depth.

    The whole image is looked at, as EPFL did it for 4M and MultiMAE (sides at the closest multiples of 32, the answer
    resized back, bilinear): the shorter side is `side`, the 384 pixels of the training, the longer one the nearest
    multiple of 32 that keeps the aspect ratio, at most four times `side`. Pixels are (x - 0.5) / 0.5.
    """

    inputs = ("rgb",)
    emits = ("depth",)
    batch_size = 16
    gpus = 0.2

    checkpoint: str = "https://zenodo.org/records/10447888/files/omnidata_dpt_depth_v2.ckpt"
    side: int = 384
    # Eleven bits: bfloat16's eight would show as steps in a map of 65536. The last layer is float32.
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

        network = _omnidata.load(weights.resolve(self.checkpoint), 1, self.name)
        placed = _networks.placed(network, device, self.precision, compiled=self.compiled)

        def run(images: list[_maps.Fitted]) -> torch.Tensor:
            depths = placed(_images.normalised([image.rgb for image in images], CENTRED, device))
            return _networks.finite(depths, self.name).clamp(0, 1)

        def label(images: Sequence[_maps.Fitted]) -> list[dict[str, Any]]:
            with torch.inference_mode():
                maps = _maps.answered(images, run, lambda one: one[0].clamp(0, 1))
            return [{"depth": depth} for depth in maps]

        def prepare(sample: Any) -> _maps.Fitted:
            shape = _maps.shape_for(sample.size, self.side, CELL)
            return _maps.fitted(sample.rgb, shape, sample.key, Image.Resampling.BILINEAR)

        return Staged(prepare, label)

    def tiny(self, folder: Path) -> OmnidataDepth:
        """A random network of width 16, for 64 pixels, as Lightning saves it."""
        file = folder / "omnidata_dpt_depth.ckpt"
        if not file.exists():
            from labelers import _omnidata

            _omnidata.save_tiny(file, channels=1, seed=0)
            weights.mark_random(file, seed=0)
        return replace(self, checkpoint=str(file), side=64)
