"""Boxes of objects by D-FINE-X (Peng et al. 2024): a thirtieth of ViTDet-H's cost at a higher score on COCO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataengine import coco
from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.weights import Weights
from labelers import _calibration, _huggingface, _images, _networks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DFineForObjectDetection

PLACES = 5
"""Decimals of what is written: a hundredth of a pixel at 1000."""

_UNCHANGED: _images.Statistics = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class DFine(Labeler):
    """Objects of COCO's 80 classes as `{"instances": [...]}`, best first.

    Each has `boxes` [x0, y0, x1, y1] in 0..1 of the image (x right, y down), `class_name` (COCO's own, by its number:
    the names in configs of this family are not COCO's) and `score` in 0..1. All of at least `min_score` are kept, 300
    at most. The image is squeezed to 640 x 640, in 0..1, without statistics.

    Its scores are sigmoids, one query at a time: 0.6 does not mean what ViTDet's 0.6 means, which ml-4m's threshold is
    for. With `calibration`, a file that `labelers/_calibration.py` has fitted (a path or URL; the setting keeps the
    numbers in it, so they are part of the identity), `score` is the calibrated one and `score_raw` the network's.
    """

    inputs = ("rgb",)
    emits = ("det",)
    batch_size = 32
    gpus = 0.25
    alternative = True

    checkpoint: str = "ustc-community/dfine-xlarge-obj2coco"
    min_score: float = 0.05
    calibration: str | tuple[tuple[float, float], ...] = ()
    precision: _networks.Precision = "float16"  # it was trained in it
    compiled: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_score < 1:
            raise ValueError(f"dfine: expected min_score in 0..1, got {self.min_score}")
        object.__setattr__(self, "calibration", _calibration.read(self.calibration))

    def weights(self) -> Weights:
        """The published weights, Apache-2.0."""
        return _huggingface.describe(self.checkpoint, "Apache-2.0")

    def load(self, device: str) -> Loaded:
        """Read the network and put it on the device."""
        import torch

        model = network(self.checkpoint)
        height, width, resample, statistics = geometry(self.checkpoint)
        knots = _calibration.read(self.calibration)
        _networks.placed(model, device, compiled=self.compiled)

        def label(images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
            with torch.inference_mode():
                pixels = _images.normalised(images, statistics, device)
                with _networks.autocast(device, self.precision):
                    out = model(pixel_values=pixels)
                logits, boxes = (_networks.finite(v.float(), self.name) for v in (out.logits, out.pred_boxes))
                found = [values.cpu().numpy() for values in best(logits, boxes)]
            return [
                {"det": {"instances": _instances(scores, classes, corners, knots, self.min_score)}}
                for scores, classes, corners in zip(*found, strict=True)
            ]

        return Staged(lambda sample: _huggingface.resized(sample.rgb, height, width, resample), label)

    def tiny(self, folder: Path) -> DFine:
        """A random network of narrow stages in the published format; it still takes 640 x 640 pixels."""
        from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

        stages: dict[str, Any] = {"out_indices": [2, 3, 4]}
        # As published: each layer has heads of its own, which are in the file once, although the config says "tied".
        heads: dict[str, Any] = {"num_labels": len(coco.THINGS), "tie_word_embeddings": False}
        backbone = HGNetV2Config(
            embedding_size=8,
            hidden_sizes=[8, 8, 8, 8],
            stem_channels=[3, 4, 8],
            stage_in_channels=[8, 8, 8, 8],
            stage_mid_channels=[4, 4, 4, 4],
            stage_out_channels=[8, 8, 8, 8],
            stage_num_blocks=[1, 1, 1, 1],
            stage_numb_of_layers=[1, 1, 1, 1],
            **stages,
        )
        config = DFineConfig(
            backbone_config=backbone,
            encoder_in_channels=[8, 8, 8],
            encoder_hidden_dim=16,
            encoder_ffn_dim=16,
            encoder_attention_heads=2,
            d_model=16,
            num_queries=6,
            decoder_in_channels=[16, 16, 16],
            decoder_ffn_dim=16,
            decoder_layers=2,
            decoder_attention_heads=2,
            decoder_n_points=[3, 6, 3],
            lqe_hidden_dim=4,
            max_num_bins=8,
            depth_mult=0.34,
            **heads,
        )
        model = DFineForObjectDetection(config)
        model.config.tie_word_embeddings = True
        file = _huggingface.save_tiny(model, folder / "dfine", seed=6, scale=2.0, idle=(r"^(class|bbox)_embed\.",))
        return replace(self, checkpoint=str(file))


def network(checkpoint: str) -> DFineForObjectDetection:
    """The network of a checkpoint in transformers' layout, float32, on the CPU; ValueError when it is not for COCO.

    Where things are it computes in float32 within autocast, too.
    """
    import torch
    from transformers import DFineForObjectDetection

    model = _huggingface.network(checkpoint, DFineForObjectDetection, "dfine")
    if model.config.num_labels != len(coco.THINGS):
        raise ValueError(
            f"dfine: expected weights for COCO's {len(coco.THINGS)} classes, these have {model.config.num_labels}"
        )
    for projection in model.model.decoder_input_proj:
        # transformers makes the anchors, which are positions, in the precision of what this gives.
        projection.register_forward_hook(lambda _layer, _inputs, out: out.float())
    integral = model.model.decoder.integral
    integral.forward = torch.autocast("cuda", enabled=False)(integral.forward)
    return model


def geometry(checkpoint: str) -> tuple[int, int, int, _images.Statistics]:
    """Height, width, Pillow's number of the filter, mean and standard deviation of what the network takes.

    From the checkpoint's `preprocessor_config.json`; without one 640 x 640, bilinear, as it is. ValueError when it asks
    for something else than one size.
    """
    try:
        found = _huggingface.document(checkpoint, _huggingface.PREPROCESSOR)
    except FileNotFoundError:
        found = {}
    size = found.get("size", {"height": 640, "width": 640})
    if not isinstance(size, dict) or not {"height", "width"} <= set(size) or found.get("do_pad"):
        raise ValueError(
            f"dfine: expected a height and a width and no padding in {_huggingface.PREPROCESSOR}, found {size}"
        )
    statistics = _UNCHANGED
    if found.get("do_normalize"):
        mean, std = (
            found.get(name, default)
            for name, default in zip(("image_mean", "image_std"), _images.IMAGENET, strict=True)
        )
        statistics = (tuple(mean), tuple(std))
    return int(size["height"]), int(size["width"]), int(found.get("resample", 2)), statistics


def best(logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of (n, queries, classes) logits and (n, queries, 4) boxes (centre, size) as many of the best pairs as queries.

    Scores (n, k) falling, classes (n, k) and corners (n, k, 4).
    """
    import torch

    queries, classes = logits.shape[1:]
    scores, which = logits.sigmoid().flatten(1).topk(queries, dim=1)
    centre, size = boxes.split(2, dim=-1)
    corners = torch.cat((centre - size / 2, centre + size / 2), dim=-1)
    return scores, which % classes, corners.gather(1, (which // classes)[..., None].expand(-1, -1, 4))


def _instances(
    scores: np.ndarray, classes: np.ndarray, corners: np.ndarray, knots: _calibration.Knots, min_score: float
) -> list[dict[str, Any]]:
    """Instances of at least `min_score` as det has them; those without an area in the image are left out."""
    boxes = np.round(np.clip(corners.astype(np.float64), 0, 1), PLACES)
    meant = np.round(_calibration.apply(knots, scores.astype(np.float64)), PLACES)
    out = []
    for score, raw, name, box in zip(meant.tolist(), scores.tolist(), classes.tolist(), boxes.tolist(), strict=True):
        if score >= min_score and box[0] < box[2] and box[1] < box[3]:
            instance = {"boxes": box, "class_name": coco.THINGS[name], "score": score}
            out.append({**instance, "score_raw": round(raw, PLACES)} if knots else instance)
    return out
