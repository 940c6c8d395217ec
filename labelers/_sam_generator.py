"""Masks of everything in many images at once: what Segment Anything's automatic mask generator keeps, in less work.

The package asks for one image at a time, 64 points at a time, and brings all three masks of every point to the size of
the image before it looks at their scores. Here the images of a batch are encoded together and their points decoded
together; a mask is drawn only when its score passes, brought to the size of the image only when it can pass, and its
run lengths are made only when it survived the suppression of duplicates. Every test that decides is made on the same
values, at the same resolution and in the same order as the package's, so that in float32 the same masks remain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from labelers import _networks
from labelers._sam_decoder import Decoder, Shared

if TYPE_CHECKING:
    from torch import Tensor

PIXELS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""How many pixels of masks there are at a time at the size of an image: on a CPU what fits its caches."""
MARGIN = 1e-5
"""How far, relatively, an interpolated value may exceed all it is made of by rounding; in truth some 1e-7."""


@dataclass(frozen=True)
class Settings:
    """Those of the package's generator, by their names."""

    points_per_side: int
    points_per_batch: int
    pred_iou_thresh: float
    stability_score_thresh: float
    stability_score_offset: float
    box_nms_thresh: float


@dataclass(frozen=True)
class Prepared:
    """An image as its network takes it, uint8 (h, w, 3), and its size (h, w) before."""

    pixels: np.ndarray
    size: tuple[int, int]


class Network(Protocol):
    """What differs between Segment Anything 1 and 2."""

    decoder: Decoder
    device: str
    side: int

    def prepare(self, rgb: np.ndarray) -> Prepared:
        """An image uint8 (h, w, 3) as the network takes it."""

    def encode(self, batch: Sequence[Prepared]) -> Shared:
        """Run the image encoder."""

    def places(self, points: np.ndarray, image: Prepared) -> np.ndarray:
        """Points float64 (P, 2), x and y in pixels of the original, in 0..1 of the network's square input."""

    def code(self, places: Tensor) -> Tensor:
        """The position codes (B, P, C) of places (B, P, 2) in 0..1."""

    def enlarge(self, logits: Tensor, image: Prepared) -> Tensor:
        """Logits (n, s, s) of the decoder at the size of the original image, (n, h, w)."""


@dataclass(frozen=True)
class Found:
    """Masks that passed: logits (n, s, s), and of each its score, stability, box (x0, y0, x1, y1), point, image."""

    logits: Tensor
    scores: Tensor
    stability: Tensor
    boxes: Tensor
    points: Tensor
    images: Tensor

    def __getitem__(self, index: Any) -> Found:
        return Found(**{name: value[index] for name, value in vars(self).items()})


def point_grid(side: int) -> np.ndarray:
    """float64 (side * side, 2): x, y in 0..1, row by row, the centres of side x side cells."""
    along = np.linspace(1 / (2 * side), 1 - 1 / (2 * side), side)
    x, y = np.meshgrid(along, along)
    return np.stack([x.ravel(), y.ravel()], axis=1)


class Generator:
    """Makes the masks of batches of prepared images; `work` counts what it took."""

    def __init__(self, network: Network, settings: Settings) -> None:
        self.network = network
        self.settings = settings
        self.pixels = PIXELS["cuda" if network.device.startswith("cuda") else "cpu"]
        self.work: Counter[str] = Counter()

    def __call__(self, batch: Sequence[Prepared]) -> list[list[dict[str, Any]]]:
        """For every image its masks, as the package's generator gives them with `output_mode="coco_rle"`."""
        import torch
        from torchvision.ops import batched_nms

        grid = point_grid(self.settings.points_per_side)
        points = [grid * image.size[::-1] for image in batch]
        found = list(self._candidates(batch, points))
        if not found:
            return [[] for _ in batch]
        every = Found(*(torch.cat(values) for values in zip(*(vars(f).values() for f in found), strict=True)))
        kept = batched_nms(every.boxes.float(), every.scores, every.images, self.settings.box_nms_thresh)
        self.work["masks_kept"] += len(kept)
        every = every[kept]
        owners = every.images.cpu()
        out = []
        for i, image in enumerate(batch):
            mine = every[(owners == i).nonzero()[:, 0].to(every.images.device)]
            out.append(self._records(mine, image, points[i]))
        return out

    def _candidates(self, batch: Sequence[Prepared], points: Sequence[np.ndarray]) -> Iterator[Found]:
        import torch

        network, settings = self.network, self.settings
        shared = network.encode(batch)
        places = torch.from_numpy(np.stack([network.places(p, i) for p, i in zip(points, batch, strict=True)]))
        codes = network.code(places.float().to(network.device))
        num_images, num_points = codes.shape[:2]
        across = min(num_points, settings.points_per_batch)
        down = max(settings.points_per_batch // across, 1)
        for i in range(0, num_images, down):
            part = _slice(shared, slice(i, i + down))
            for p in range(0, num_points, across):
                asked = codes[i : i + down, p : p + across]
                for found in self._ask(part, asked, batch[i : i + down]):
                    yield replace(found, points=found.points + p, images=found.images + i)

    def _ask(self, shared: Shared, codes: Tensor, batch: Sequence[Prepared]) -> Iterator[Found]:
        """The masks that pass of some points of some images, numbered from the first of each."""
        settings, decoder = self.settings, self.network.decoder
        scores, hyper, image = decoder.attend(shared, codes)
        _networks.finite(scores, "sam")  # what is not a number passes no threshold
        self.work["decoder_calls"] += 1
        self.work["points"] += len(scores)
        passed = scores > settings.pred_iou_thresh if settings.pred_iou_thresh > 0 else scores == scores
        drawn = passed.any(dim=1).nonzero()[:, 0]
        self.work["points_drawn"] += len(drawn)
        if not len(drawn):
            return
        owners = drawn // codes.shape[1]
        logits = decoder.draw(image[drawn], hyper[drawn], tuple(x[owners] for x in shared.high))[passed[drawn]]
        which = passed.nonzero()[:, 0]
        scores = scores[passed]
        if settings.stability_score_thresh > 0:
            # No pixel above the upper threshold: nothing of the mask is stable. Interpolation only averages, so that
            # this holds at the size of the image if it holds here.
            above = settings.stability_score_offset
            possible = logits.amax(dim=(1, 2)) > above - MARGIN * abs(above)
            logits, which, scores = logits[possible], which[possible], scores[possible]
        images, points = which // codes.shape[1], which % codes.shape[1]
        owners = images.cpu()
        for i, prepared in enumerate(batch):
            mine = (owners == i).nonzero()[:, 0].to(logits.device)
            if not len(mine):
                continue
            stability, boxes = self._measure(logits[mine], prepared)
            found = Found(logits[mine], scores[mine], stability, boxes, points[mine], images[mine])
            # Not a number, of nothing by nothing, is not stable either.
            stable = stability >= settings.stability_score_thresh if settings.stability_score_thresh > 0 else ...
            passed_all = found[stable]
            self.work["masks_passed"] += len(passed_all.scores)
            yield passed_all

    def _enlarged(self, logits: Tensor, image: Prepared) -> Iterator[Tensor]:
        # Masks are enlarged to the network's side before they are to the image's.
        step = max(self.pixels // max(image.size[0] * image.size[1], self.network.side**2), 1)
        self.work["masks_upsampled"] += len(logits)
        for i in range(0, len(logits), step):
            yield self.network.enlarge(logits[i : i + step], image)

    def _measure(self, logits: Tensor, image: Prepared) -> tuple[Tensor, Tensor]:
        """Stability (n,) and boxes int64 (n, 4) at the size of the image."""
        import torch

        offset = self.settings.stability_score_offset
        stability, boxes = [], []
        for large in self._enlarged(logits, image):
            inner = torch.count_nonzero(large > offset, dim=(1, 2))
            outer = torch.count_nonzero(large > -offset, dim=(1, 2))
            stability.append(inner / outer)
            boxes.append(_boxes(large > 0))
        return torch.cat(stability), torch.cat(boxes)

    def _records(self, found: Found, image: Prepared, points: np.ndarray) -> list[dict[str, Any]]:
        from pycocotools import mask as coco_mask

        lengths = [counts for large in self._enlarged(found.logits, image) for counts in run_lengths(large > 0)]
        h, w = image.size
        columns = (found.scores, found.stability, found.boxes, found.points)
        out = []
        for counts, score, stability, box, point in zip(lengths, *(x.tolist() for x in columns), strict=True):
            encoded = coco_mask.frPyObjects({"size": [h, w], "counts": counts.tolist()}, h, w)
            out.append(
                {
                    "segmentation": {"size": [h, w], "counts": encoded["counts"].decode()},
                    "area": int(counts[1::2].sum()),
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "predicted_iou": score,
                    "point_coords": [points[point].tolist()],
                    "stability_score": stability,
                    "crop_box": [0, 0, w, h],
                }
            )
        return out


def run_lengths(masks: Tensor) -> list[np.ndarray]:
    """For masks bool (n, h, w) the lengths of their runs, column by column, the first of zeros (perhaps of none)."""
    n, h, w = masks.shape
    flat = masks.transpose(1, 2).reshape(n, h * w)
    changes = (flat[:, 1:] != flat[:, :-1]).nonzero().cpu().numpy()
    starts_set = flat[:, 0].cpu().numpy()
    bounds = np.searchsorted(changes[:, 0], np.arange(n + 1))
    out = []
    for i in range(n):
        inside = changes[bounds[i] : bounds[i + 1], 1] + 1
        edges = np.concatenate([[0, 0] if starts_set[i] else [0], inside, [h * w]])
        out.append(np.diff(edges))
    return out


def _boxes(masks: Tensor) -> Tensor:
    """int64 (n, 4): the first and the last column and row, x0 y0 x1 y1, of masks bool (n, h, w); 0 of an empty one."""
    import torch

    spans = []
    for some in (masks.any(dim=1), masks.any(dim=2)):
        length = some.shape[1]
        places = torch.arange(length, device=masks.device)
        first = torch.where(some, places, length).amin(dim=1)
        last = torch.where(some, places, -1).amax(dim=1)
        spans.append((first, last))
    (x0, x1), (y0, y1) = spans
    return torch.stack([x0, y0, x1, y1], dim=1) * (x1 >= 0)[:, None]


def _slice(shared: Shared, part: slice) -> Shared:
    values = {name: value[part] for name, value in vars(shared).items() if name != "high"}
    return Shared(**values, high=tuple(x[part] for x in shared.high))
