"""Surface normals by Marigold (Ke et al. 2024), a diffusion model, by diffusers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from PIL import Image

from dataengine import weights
from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.sample import Sample
from dataengine.weights import Weights
from labelers import _axes, _images, _maps, _marigold, _networks

if TYPE_CHECKING:
    from torch import Tensor

PLAIN: _images.Statistics = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
LATENT = 4

Variant = Literal["", "fp16"]


@dataclass(frozen=True, kw_only=True)
class MarigoldNormal(Labeler):
    """Unit vectors float32 (h, w, 3) out of the surface, x right, y down, z forward.

    The network's own y is up and its z points to the observer: both are negated. It starts from noise, which `seed` and
    the key of the image decide and nothing else, so that an image gets the same normals in any batch; `steps` are those
    of the published settings. The whole image is looked at, its longer side at `side`, the 768 pixels of the published
    settings. `variant` "fp16" reads the published files of half the size.

    `checkpoint` is a hub id or a folder in diffusers' layout; of it safetensors and JSON are read, and nothing is run.
    """

    inputs = ("rgb",)
    emits = ("normal",)
    batch_size = 4
    gpus = 0.5
    alternative = True

    checkpoint: str = "prs-eth/marigold-normals-v1-1"
    variant: Variant = ""
    side: int = 768
    steps: int = 4
    seed: int = 0
    precision: _networks.Precision = "float16"  # as it is published; its autoencoder loses detail in bfloat16

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"marigold_normal: expected variant fp16 or none, got {self.variant!r}")
        if self.side < 64 or self.side % _marigold.CELL:
            raise ValueError(f"marigold_normal: expected a side of 64, 72, ... pixels, got {self.side}")
        if self.steps < 1:
            raise ValueError(f"marigold_normal: expected at least one step, got {self.steps}")

    def weights(self) -> Weights:
        """All files of the published folder that are read, as one; RAIL++-M."""
        return weights.describe_folder(self.checkpoint, _marigold.files(self.variant), licence="RAIL++-M")

    def load(self, device: str) -> Loaded:
        """Read the networks and put them on the device."""
        import torch

        network = _marigold.network(
            self.checkpoint, self.variant, "marigold_normal", device, self.precision, self.steps
        )

        def run(images: list[_maps.Fitted]) -> Tensor:
            pixels = _images.normalised([image.rgb for image in images], PLAIN, device)
            drawn = torch.stack([noise(self.seed, image.key, image.rgb.shape[:2]) for image in images])
            return network(pixels, drawn.to(device))

        def label(images: Sequence[_maps.Fitted]) -> list[dict[str, Any]]:
            with torch.inference_mode():
                maps = _maps.answered(images, run, lambda one: _axes.unit(one, _axes.OPENGL))
            return [{"normal": normal} for normal in maps]

        def prepare(sample: Sample) -> _maps.Fitted:
            return _maps.fitted(sample.rgb, _shape(sample.size, self.side), sample.key, Image.Resampling.BILINEAR)

        return Staged(prepare, label)

    def tiny(self, folder: Path) -> MarigoldNormal:
        """Random networks of width 8 in the published layout, and two steps at 64 pixels."""
        own = folder / "marigold_normal"
        if not own.exists():
            _marigold.save_tiny(own, seed=5)
        return replace(self, checkpoint=str(own), side=64, steps=2)


def noise(seed: int, key: str, shape: tuple[int, ...]) -> Tensor:
    """The noise (4, h / 8, w / 8) that an image of (height, width) starts from, sides rounded up."""
    import torch

    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    rows, cols = (-(-side // _marigold.CELL) for side in shape)
    return torch.randn((LATENT, rows, cols), generator=generator)


def _shape(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) for the network: the longer side is `side`, the other as the pipeline rounds it, at least a
    quarter. The pipeline pads to multiples of 8 by repeating the border, and cuts that off again."""
    height, width = (max(one * side // max(size), side // _maps.LONGEST) for one in size)
    return height, width
