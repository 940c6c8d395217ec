"""Semantic segmentation by Mask2Former with a Swin-B backbone (Cheng et al. 2022), trained on COCO panoptic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dataengine import coco
from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.sample import Sample
from dataengine.weights import Weights
from labelers import _huggingface, _images, _networks, _panoptic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MULTIPLE = 32
"""Images are padded to multiples of this many pixels."""

NOT_NEEDED = (r"\.relative_position_index$",)
"""Tensors of the published file that follow from the window size."""

IDLE = (r"\.swin\.layernorm\.",)
"""Of the backbone's last hidden state, which nothing reads; the published file has none."""


@dataclass(frozen=True, kw_only=True)
class Mask2Former(Labeler):
    """The class of every pixel, uint8 (h, w): 0..132 as in `coco.NAMES`, never 255, for there is no class "nothing".

    What detectron2's predictor computes: the image at `shortest_edge` pixels or, where the other side would be longer
    than `longest_edge`, at that (Pillow's bilinear), ImageNet's statistics, padded at the bottom and right to multiples
    of 32; masks are resized to the padded input, cut, resized to the image, and summed into classes there.

    The network has no padding mask: padding changes what it computes. So only images of the same padded size share a
    batch, and each is labelled as it would be alone. 928 GFLOP for an image of 3 : 4.
    """

    inputs = ("rgb",)
    emits = ("semseg",)
    batch_size = 8
    gpus = 0.5

    checkpoint: str = "facebook/mask2former-swin-base-coco-panoptic"
    shortest_edge: int = 800
    longest_edge: int = 1333
    precision: _networks.Precision = "float16"  # it was trained in it, and it rounds an eighth as much as bfloat16

    def __post_init__(self) -> None:
        if not 0 < self.shortest_edge <= self.longest_edge:
            edges = f"{self.shortest_edge} and {self.longest_edge}"
            raise ValueError(f"mask2former: expected 0 < shortest_edge <= longest_edge, got {edges}")

    def weights(self) -> Weights:
        """The published weights, for non-commercial use only."""
        return _huggingface.describe(self.checkpoint, "CC-BY-NC-4.0")

    def load(self, device: str) -> Loaded:
        """Read the network and put it on the device."""
        import torch

        model = network(self.checkpoint)
        places = _panoptic.order(model.config.id2label, "mask2former")
        _networks.placed(model, device)

        def label(batch: Sequence[tuple[np.ndarray, _panoptic.Size]]) -> list[dict[str, Any]]:
            groups = defaultdict(list)
            for i, (image, _) in enumerate(batch):
                groups[tuple(-(-side // MULTIPLE) * MULTIPLE for side in image.shape[:2])].append(i)
            found: dict[int, Any] = {}
            with torch.inference_mode():
                for (height, width), members in groups.items():
                    images = [batch[i][0] for i in members]
                    pixels = _panoptic.padded(images, (height, width), device, _images.IMAGENET, "mean")
                    with _networks.autocast(device, self.precision):
                        out = model(pixel_values=pixels)
                    for i, masks, classes in zip(
                        members, out.masks_queries_logits, out.class_queries_logits, strict=True
                    ):
                        image, size = batch[i]
                        found[i] = _panoptic.semantic(masks, classes, places, (height, width), image.shape[:2], size)
                return [{"semseg": found[i].cpu().numpy()} for i in range(len(batch))]

        return Staged(self._prepared, label)

    def _prepared(self, sample: Sample) -> tuple[np.ndarray, _panoptic.Size]:
        height, width = sample.rgb.shape[:2]
        new_height, new_width = fitted(height, width, self.shortest_edge, self.longest_edge)
        image = Image.fromarray(sample.rgb).resize((new_width, new_height), Image.Resampling.BILINEAR)
        return np.asarray(image), (height, width)

    def tiny(self, folder: Path) -> Mask2Former:
        """A random network of four narrow stages in the published format, for images of about 64 pixels."""
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

        stages: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
        swin = SwinConfig(
            image_size=64, embed_dim=4, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, **stages
        )
        config = Mask2FormerConfig(
            backbone_config=swin,
            feature_size=32,
            mask_feature_size=8,
            hidden_dim=32,
            encoder_feedforward_dim=8,
            dim_feedforward=8,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=12,
            id2label=dict(enumerate(coco.NAMES)),
            label2id={name: i for i, name in enumerate(coco.NAMES)},
        )
        model = Mask2FormerForUniversalSegmentation(config)
        file = _huggingface.save_tiny(model, folder / "mask2former", seed=4, scale=2.0, idle=IDLE)
        return replace(self, checkpoint=str(file), shortest_edge=64, longest_edge=107)


def network(checkpoint: str) -> PreTrainedModel:
    """The network of a checkpoint in transformers' layout, float32, on the CPU."""
    from transformers import Mask2FormerForUniversalSegmentation

    return _huggingface.network(
        checkpoint, Mask2FormerForUniversalSegmentation, "mask2former", unused=NOT_NEEDED, idle=IDLE
    )


def fitted(height: int, width: int, shortest: int, longest: int) -> _panoptic.Size:
    """Height and width so that the shorter side is `shortest`, or the longer one `longest` if it would exceed that."""
    scale = shortest / min(height, width)
    new_height, new_width = (shortest, scale * width) if height < width else (scale * height, shortest)
    if max(new_height, new_width) > longest:
        smaller = longest / max(new_height, new_width)
        new_height, new_width = new_height * smaller, new_width * smaller
    return int(new_height + 0.5), int(new_width + 0.5)
