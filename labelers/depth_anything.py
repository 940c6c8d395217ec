"""Relative depth by Depth Anything V2 (Yang et al. 2024), by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.sample import Sample
from dataengine.weights import Weights
from labelers import _huggingface, _images, _maps, _networks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DepthAnythingForDepthEstimation

CELL = 14
LICENCES = {"Small": "Apache-2.0", "Base": "CC-BY-NC-4.0", "Large": "CC-BY-NC-4.0"}


@dataclass(frozen=True, kw_only=True)
class DepthAnything(Labeler):
    """Depth without a unit: float32 (h, w) from 0, the nearest of the image, to 1, the farthest; 0 where all is alike.

    The network answers with disparity of an unknown scale, large is near. With `x` the share of the largest disparity
    of the image, depth is 1 / (x + epsilon), stretched to 0..1 over the image: epsilon * (1 - x) / (x + epsilon) when
    the farthest is at disparity 0. `epsilon` says beyond which distance all is called far: with 0.05, beyond some
    20 times that of the nearest. Without it, one pixel of sky would press all the rest to 0.

    The whole image is looked at, its shorter side at `side`, the 518 pixels of the training, the longer one at the
    nearest multiple of 14 that keeps the aspect ratio, at most four times `side`. V2-Small is Apache-2.0, Base and
    Large are CC-BY-NC-4.0. Checkpoints for depth in metres are refused.
    """

    inputs = ("rgb",)
    emits = ("depth",)
    batch_size = 16
    gpus = 0.2
    alternative = True

    checkpoint: str = "depth-anything/Depth-Anything-V2-Small-hf"
    side: int = 518
    epsilon: float = 0.05
    # Eleven bits: bfloat16's eight would show as steps in a map of 65536. The last layer is float32.
    precision: _networks.Precision = "float16"
    compiled: bool = False  # anew for each size of network: for corpora of few aspect ratios

    def __post_init__(self) -> None:
        if self.side < CELL or self.side % CELL:
            raise ValueError(f"depth_anything: expected a side that is a multiple of {CELL} pixels, got {self.side}")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"depth_anything: expected 0 < epsilon < 1, got {self.epsilon}")

    def weights(self) -> Weights:
        """The published weights, whose licence goes by their size."""
        licence = next((found for size, found in LICENCES.items() if f"-{size}-" in self.checkpoint), "unknown")
        return _huggingface.describe(self.checkpoint, licence)

    def load(self, device: str) -> Loaded:
        """Read the network and put it on the device."""
        import torch

        placed = _networks.placed(network(self.checkpoint), device, self.precision, compiled=self.compiled)
        _maps.in_float32(placed.head.conv3)
        dtype = _networks.dtype_on(device, self.precision)

        def run(images: list[_maps.Fitted]) -> Tensor:
            pixels = _images.normalised([image.rgb for image in images], _images.IMAGENET, device)
            disparity: Tensor = placed(pixels.to(dtype)).predicted_depth
            return disparity[:, None]

        def label(images: Sequence[_maps.Fitted]) -> list[dict[str, Any]]:
            with torch.inference_mode():
                maps = _maps.answered(images, run, lambda one: depth(one[0], self.epsilon))
            return [{"depth": found} for found in maps]

        def prepare(sample: Sample) -> _maps.Fitted:
            shape = _maps.shape_for(sample.size, self.side, CELL)
            return _maps.fitted(sample.rgb, shape, sample.key, Image.Resampling.BICUBIC)

        return Staged(prepare, label)

    def tiny(self, folder: Path) -> DepthAnything:
        """A random network of width 16, for 56 pixels, in the published format."""
        from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

        sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 1, "mlp_ratio": 2}
        images = {"image_size": 56, "patch_size": CELL, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
        backbone = Dinov2Config.from_dict({**sizes, **images})
        config = DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=16,
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
            head_hidden_size=8,
        )
        model = DepthAnythingForDepthEstimation(config)
        file = _huggingface.save_tiny(model, folder / "depth_anything", seed=7)
        return replace(self, checkpoint=str(file), side=56)


def network(checkpoint: str) -> DepthAnythingForDepthEstimation:
    """The network of a checkpoint in transformers' layout, float32, on the CPU; ValueError for one of metres."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    config = _huggingface.config(checkpoint, DepthAnythingConfig)
    if config.depth_estimation_type != "relative":
        raise ValueError(
            f"depth_anything: expected a checkpoint of relative depth, {checkpoint} is one of "
            f"{config.depth_estimation_type} depth"
        )
    return _huggingface.network(checkpoint, DepthAnythingForDepthEstimation, "depth_anything", configuration=config)


def depth(disparity: Tensor, epsilon: float) -> Tensor:
    """Depth (h, w) in 0..1, small is near, of disparity (h, w) of 0 or more in any unit (see `DepthAnything`)."""
    share = disparity.float() / disparity.amax().float().clamp_min(1e-12)
    distance = 1 / (share + epsilon)
    low, high = distance.amin(), distance.amax()
    return ((distance - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
