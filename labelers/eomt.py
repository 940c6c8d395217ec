"""Semantic segmentation by EoMT, a plain ViT-L (Kerssies et al. 2025), trained on COCO panoptic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataengine import coco
from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.sample import Sample
from dataengine.weights import Weights
from labelers import _huggingface, _images, _networks, _panoptic

if TYPE_CHECKING:
    from transformers import EomtForUniversalSegmentation


@dataclass(frozen=True, kw_only=True)
class Eomt(Labeler):
    """The class of every pixel, uint8 (h, w): 0..132 as in `coco.NAMES`, never 255, for there is no class "nothing".

    The image is fitted into the network's square (640 x 640) in the top left corner, the rest black, as the
    checkpoint's own image processor does it; masks are resized to the square, cut, resized to the image, and summed
    into classes there. Classes are told by their names in the checkpoint's config, whatever their order.

    A permissive stand-in for Mask2Former, of much the same quality (56.0 PQ). 1,336 GFLOP an image are half as many
    again, but all of them in a plain ViT, and as every image is of one size a batch is always full.
    """

    inputs = ("rgb",)
    emits = ("semseg",)
    batch_size = 16
    gpus = 0.5
    alternative = True

    checkpoint: str = "tue-mps/coco_panoptic_eomt_large_640"
    precision: _networks.Precision = "float16"  # it was trained in it
    compiled: bool = False

    def weights(self) -> Weights:
        """The published weights, MIT."""
        return _huggingface.describe(self.checkpoint, "MIT")

    def load(self, device: str) -> Loaded:
        """Read the network and put it on the device."""
        import torch
        from transformers.image_transforms import get_size_with_aspect_ratio

        model = network(self.checkpoint)
        side = int(model.config.image_size)  # type: ignore[arg-type]
        places = _panoptic.order(model.config.id2label, "eomt")
        shortest, longest, resample, statistics = geometry(self.checkpoint, side)
        _networks.placed(model, device, compiled=self.compiled)

        def prepare(sample: Sample) -> tuple[np.ndarray, _panoptic.Size]:
            size = sample.rgb.shape[:2]
            return _huggingface.resized(
                sample.rgb, *get_size_with_aspect_ratio(size, shortest, longest), resample
            ), size

        def label(batch: Sequence[tuple[np.ndarray, _panoptic.Size]]) -> list[dict[str, Any]]:
            with torch.inference_mode():
                pixels = _panoptic.padded([image for image, _ in batch], (side, side), device, statistics, "black")
                with _networks.autocast(device, self.precision):
                    out = model(pixel_values=pixels)
                found = [
                    _panoptic.semantic(masks, classes, places, (side, side), image.shape[:2], size)
                    for (image, size), masks, classes in zip(
                        batch, out.masks_queries_logits, out.class_queries_logits, strict=True
                    )
                ]
                return [{"semseg": one.cpu().numpy()} for one in found]

        return Staged(prepare, label)

    def tiny(self, folder: Path) -> Eomt:
        """A random network of three narrow blocks in the published format, for 64 x 64 pixels."""
        import json

        import torch
        from transformers import EomtConfig, EomtForUniversalSegmentation

        names = coco.NAMES[::-1]  # not detectron2's order, so that ids must be told by name
        config = EomtConfig(
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=64,
            num_blocks=2,
            num_queries=12,
            num_register_tokens=1,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
        model = EomtForUniversalSegmentation(config)
        torch.nn.init.zeros_(model.attn_mask_probs)  # as at the end of training
        file = _huggingface.save_tiny(model, folder / "eomt", seed=5, scale=2.0)
        processor = {"size": {"shortest_edge": 64, "longest_edge": 64}, "do_pad": True, "do_split_image": False}
        (file.parent / _huggingface.PREPROCESSOR).write_text(json.dumps(processor) + "\n")
        return replace(self, checkpoint=str(file))


def network(checkpoint: str) -> EomtForUniversalSegmentation:
    """The network of a checkpoint in transformers' layout, float32, on the CPU.

    ValueError when its masked attention had not been phased out: such a network draws random numbers as it runs.
    """
    from transformers import EomtForUniversalSegmentation

    model = _huggingface.network(checkpoint, EomtForUniversalSegmentation, "eomt")
    if model.attn_mask_probs.any():
        left = ", ".join(f"{value:.3g}" for value in model.attn_mask_probs.tolist())
        raise ValueError(
            f"eomt: expected a network whose attn_mask_probs have come down to 0 in training, found {left}"
        )
    return model


def geometry(checkpoint: str, side: int) -> tuple[int, int, int, _images.Statistics]:
    """Shortest edge, longest edge, Pillow's number of the filter, mean and standard deviation of a checkpoint's images.

    From its `preprocessor_config.json`; without one the image is fitted into the network's square, bilinear, with
    ImageNet's statistics. ValueError when the image would not be in one square: such a checkpoint cuts it in pieces.
    """
    try:
        found = _huggingface.document(checkpoint, _huggingface.PREPROCESSOR)
    except FileNotFoundError:
        found = {}
    size = found.get("size", {"shortest_edge": side, "longest_edge": side})
    edges = size.get("shortest_edge"), size.get("longest_edge")
    if edges != (side, side) or found.get("do_split_image"):
        raise ValueError(
            f"eomt: expected images fitted into {side} x {side} by {_huggingface.PREPROCESSOR}, found {size}"
            + (" and do_split_image" if found.get("do_split_image") else "")
        )
    mean, std = (
        tuple(found.get(name, default))
        for name, default in zip(("image_mean", "image_std"), _images.IMAGENET, strict=True)
    )
    return side, side, int(found.get("resample", 2)), (mean, std)
