"""Instance masks of SAM."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle

from dataengine import codecs
from dataengine.geometry import Crop, crop_map
from dataengine.modalities import Modality, Picture


class SamInstance(Modality):
    """A list of COCO run-length masks as JSON.

    Each has `size` [h, w], `counts` (the compressed string), `bbox` [x, y, w, h] in pixels and `area` in pixels; masks
    of a network also have `predicted_iou`, `stability_score` and `point` [x, y].
    """

    kind = "instances"
    suffix = "json"

    def encode(self, value: list[dict[str, Any]]) -> bytes:
        """JSON."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> list[dict[str, Any]]:
        """The list."""
        value: list[dict[str, Any]] = codecs.decode_json(data)
        return value

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """Masks of the image's size whose runs cover it and whose areas are what they say."""
        if not isinstance(value, list):
            raise ValueError(f"sam_instance: expected a list, got {value!r:.100}")
        for instance in value:
            if not isinstance(instance, dict) or not {"size", "counts", "bbox", "area"} <= set(instance):
                raise ValueError(f"sam_instance: expected size, counts, bbox and area, got {instance!r:.100}")
            if list(instance["size"]) != list(size):
                raise ValueError(f"sam_instance: expected masks of {list(size)}, got {instance['size']}")
            area = int(rle.area(_coded(instance)))
            if area != instance["area"]:
                raise ValueError(f"sam_instance: expected area {area} of the mask, got {instance['area']}")

    def placeholder(self, size: tuple[int, int]) -> list[dict[str, Any]]:
        """No instance."""
        return []

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> list[dict[str, Any]]:
        """Two rectangles."""
        out = []
        for _ in range(2):
            mask = np.zeros(size, np.uint8)
            top, left = int(rng.integers(size[0] // 2)), int(rng.integers(size[1] // 2))
            mask[top : top + size[0] // 2, left : left + size[1] // 2] = 1
            out.append(instance_of(mask))
        return out

    def crop(self, value: list[dict[str, Any]], crop: Crop, size: tuple[int, int], side: int) -> list[dict[str, Any]]:
        """Masks (side, side); those with no pixel in the crop are dropped. Scores stay, points do not."""
        out = []
        for instance in value:
            cut = crop_map(decode_mask(instance), crop, side, nearest=True)
            if cut.any():
                kept = {k: v for k, v in instance.items() if k in ("predicted_iou", "stability_score")}
                out.append({**instance_of(cut), **kept})
        return out

    def picture(self, value: list[dict[str, Any]], rgb: np.ndarray) -> Picture:
        """Translucent masks with outlines, the smaller over the larger."""
        shown = rgb.astype(np.float32)
        for i, instance in enumerate(sorted(value, key=lambda v: -v["area"])):
            mask = decode_mask(instance)
            hue = np.uint8([[[(i * 79) % 180, 200, 255]]])
            colour = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)
            shown[mask > 0] = 0.5 * shown[mask > 0] + 0.5 * colour
            shown[cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0] = colour
        return Picture(image=shown.astype(np.uint8), text=f"{len(value)} masks" if len(value) != 1 else "1 mask")


def instance_of(mask: np.ndarray) -> dict[str, Any]:
    """The run-length entry of a mask uint8 (h, w) of 0 and 1."""
    coded = rle.encode(np.asfortranarray(mask))
    return {
        "size": [int(v) for v in coded["size"]],
        "counts": coded["counts"].decode("ascii"),
        "bbox": [float(v) for v in rle.toBbox(coded)],
        "area": int(mask.sum()),
    }


def decode_mask(instance: dict[str, Any]) -> np.ndarray:
    """uint8 (h, w) of 0 and 1."""
    mask: np.ndarray = rle.decode(_coded(instance))
    return np.ascontiguousarray(mask)


def _coded(instance: dict[str, Any]) -> dict[str, Any]:
    return {"size": instance["size"], "counts": instance["counts"].encode("ascii")}
