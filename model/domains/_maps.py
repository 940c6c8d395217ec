"""Domains of maps of pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.domains._base import Domain, Map, measured, stacked


@dataclass(frozen=True, kw_only=True)
class Rgb(Domain):
    """Images, uint8 (H, W, 3), as [-1, 1]; squared error."""

    name: ClassVar[str] = "rgb"
    criteria: ClassVar[tuple[str, ...]] = ("mse", "l1", "smooth_l1")
    criterion: str = "mse"

    @property
    def num_channels(self) -> int:
        """Red, green and blue."""
        return 3

    def to_network(self, values: Sequence[Map]) -> Tensor:
        """0..255 to [-1, 1]."""
        return stacked(values, np.uint8, 3, self.name).permute(0, 3, 1, 2).float() / 127.5 - 1

    def from_network(self, out: Tensor) -> list[Map]:
        """Clipped and rounded to 0..255."""
        pixels = ((out.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return list(pixels.permute(0, 2, 3, 1).cpu().numpy())

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """By the criterion, in [-1, 1]."""
        return measured(self.criterion, out, target)


@dataclass(frozen=True, kw_only=True)
class Normal(Domain):
    """Surface normals, unit vectors float32 (H, W, 3), as they are; squared error."""

    name: ClassVar[str] = "normal"
    criteria: ClassVar[tuple[str, ...]] = ("mse", "l1", "smooth_l1", "cosine_1d")
    criterion: str = "mse"

    @property
    def num_channels(self) -> int:
        """x, y and z."""
        return 3

    def to_network(self, values: Sequence[Map]) -> Tensor:
        """Unchanged but for the layout."""
        return stacked(values, np.float32, 3, self.name).permute(0, 3, 1, 2).contiguous()

    def from_network(self, out: Tensor) -> list[Map]:
        """Scaled to unit length."""
        return list(F.normalize(out.float(), dim=1).permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """By the criterion; the squared error of unit vectors is what pulls the mean angle down."""
        return measured(self.criterion, out, target)


@dataclass(frozen=True, kw_only=True)
class Depth(Domain):
    """Depth, float32 (H, W) in [0, 1] of the full range; near is 0.

    "standardised" is ml-4m's map: each crop by its own trimmed mean and deviation, so scale is lost and
    `from_network` gives standardised values. "fixed" is invertible: log depth from `nearest`..1 to [-1, 1], because
    equal errors of log depth are equal relative errors; depths below `nearest` come back as `nearest`.
    """

    name: ClassVar[str] = "depth"
    criteria: ClassVar[tuple[str, ...]] = ("smooth_l1", "mse", "l1")
    criterion: str = "smooth_l1"
    mapping: Literal["fixed", "standardised"] = "fixed"
    nearest: float = 0.02  # of the full range: 0.4 m of 20 m
    smooth_at: float = 1.0  # where smooth L1 turns from squared to absolute error

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mapping not in ("fixed", "standardised"):
            raise ValueError(f"depth mapping {self.mapping!r}, expected fixed or standardised")
        if not 0 < self.nearest < 1:
            raise ValueError(f"nearest depth {self.nearest}, expected a share of the full range in (0, 1)")

    @property
    def num_channels(self) -> int:
        """One."""
        return 1

    def to_network(self, values: Sequence[Map]) -> Tensor:
        """One channel, by the mapping."""
        depth = stacked(values, np.float32, None, self.name)[:, None]
        if self.mapping == "standardised":
            return _standardised(depth)
        return 1 - 2 * depth.clamp(self.nearest, 1).log() / math.log(self.nearest)

    def from_network(self, out: Tensor) -> list[Map]:
        """Depth in [nearest, 1], or standardised depth under that mapping."""
        value = out[:, 0].float()
        if self.mapping == "fixed":
            value = ((1 - value) / 2 * math.log(self.nearest)).exp().clamp(self.nearest, 1)
        return list(value.cpu().numpy())

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """By the criterion."""
        if self.criterion == "smooth_l1":
            return F.smooth_l1_loss(out.float(), target, beta=self.smooth_at)
        return measured(self.criterion, out, target)


def _standardised(depth: Tensor) -> Tensor:
    """Each map (B, 1, H, W) by mean and unbiased variance of its values without the lowest and highest tenth."""
    flat = depth.flatten(1).sort(dim=1).values
    cut = int(0.1 * flat.shape[1])
    kept = flat[:, cut : flat.shape[1] - cut]
    mean, var = kept.mean(dim=1)[:, None, None, None], kept.var(dim=1)[:, None, None, None]
    return (depth - mean) / (var + 1e-6).sqrt()


@dataclass(frozen=True, kw_only=True)
class Semseg(Domain):
    """Classes, uint8 (H, W) in 0..num_classes-1 and 255 for unlabelled, as index + 1 with 0 for unlabelled.

    `classes` narrows this to the ids that a corpus has, ascending, which a small tokenizer learns far faster: the
    index is then that in `classes`. () takes them all, which is ml-4m's numbering.
    """

    name: ClassVar[str] = "semseg"
    criteria: ClassVar[tuple[str, ...]] = ("cross_entropy",)
    criterion: str = "cross_entropy"
    num_classes: int = 133  # COCO panoptic
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_classes <= 255:
            raise ValueError(f"num_classes {self.num_classes}, expected 1..255")
        if tuple(sorted({c for c in self.classes if 0 <= c < self.num_classes})) != self.classes:
            raise ValueError(f"classes {self.classes}, expected ascending ids in 0..{self.num_classes - 1}")

    @property
    def num_channels(self) -> None:
        """None: classes, of which there are `num_labels`."""
        return None

    @property
    def num_labels(self) -> int:
        """The number of network classes, unlabelled included."""
        return 1 + (len(self.classes) or self.num_classes)

    def _ids(self) -> NDArray[np.uint8]:
        """The stored id of each network class."""
        return np.array([255, *(self.classes or range(self.num_classes))], dtype=np.uint8)

    def to_network(self, values: Sequence[Map]) -> Tensor:
        """int64 (B, H, W) in 0..num_labels-1."""
        table = np.full(256, -1)
        table[self._ids()] = np.arange(self.num_labels)
        stored = stacked(values, np.uint8, None, self.name)
        out = torch.from_numpy(table)[stored.long()]
        if int(out.min()) < 0:
            expected = f"one of {self.classes}" if self.classes else f"0..{self.num_classes - 1}"
            raise ValueError(f"semseg: class {int(stored[out < 0][0])}, expected {expected} or 255")
        return out

    def from_network(self, out: Tensor) -> list[Map]:
        """The class with the largest of (B, num_labels, H, W) logits."""
        return list(self._ids()[out.argmax(dim=1).cpu().numpy()])

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """Cross entropy per pixel."""
        return measured(self.criterion, out, target)


@dataclass(frozen=True, kw_only=True)
class Edges(Domain):
    """Binary edges, uint8 (H, W) of 0 and 255, as -1 and 1; an output above 0 is an edge.

    `channels` 3 is the same map three times, as ml-4m's loader of edges gives it; the mean of an output's counts.
    """

    name: ClassVar[str] = "edges"
    # On thin edges squared error gave F1 0.72, cross entropy 0.70. ml-4m takes smooth_l1.
    criteria: ClassVar[tuple[str, ...]] = ("mse", "l1", "smooth_l1", "bce")
    criterion: str = "mse"
    channels: Literal[1, 3] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels not in (1, 3):
            raise ValueError(f"edges: {self.channels} channels, expected 1 or 3")

    @property
    def num_channels(self) -> int:
        """As the setting."""
        return self.channels

    def to_network(self, values: Sequence[Map]) -> Tensor:
        """0 to -1, 255 to 1."""
        edges = stacked(values, np.uint8, None, self.name)[:, None].float() / 127.5 - 1
        return edges.repeat(1, self.channels, 1, 1)

    def from_network(self, out: Tensor) -> list[Map]:
        """255 where the output is above 0."""
        return list(((out.float().mean(dim=1) > 0).to(torch.uint8) * 255).cpu().numpy())

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """By the criterion, in [-1, 1]; `bce` takes the output for logits."""
        return measured(self.criterion, out, (target + 1) / 2 if self.criterion == "bce" else target)


@dataclass(frozen=True, kw_only=True)
class SamMask(Domain):
    """Masks of single things in their boxes, bool or uint8 0/1 (H, W), as one channel of 0 and 1; outputs are logits.

    `criterion="binary_cross_entropy"` is ml-4m's loss of that name, which is another than the name says: see
    `CRITERIA`. Its outputs are logits all the same.
    """

    name: ClassVar[str] = "sam_mask"
    criteria: ClassVar[tuple[str, ...]] = ("bce", "binary_cross_entropy")
    criterion: str = "bce"

    @property
    def num_channels(self) -> int:
        """One."""
        return 1

    def to_network(self, values: Sequence[Map]) -> Tensor:
        """0 and 1."""
        masks = [v.view(np.uint8) if v.dtype == np.bool_ else v for v in values]
        out = stacked(masks, np.uint8, None, self.name)[:, None]
        if int(out.max()) > 1:
            raise ValueError(f"{self.name}: value {int(out.max())}, expected 0 and 1 alone")
        return out.float()

    def from_network(self, out: Tensor) -> list[Map]:
        """Bool (H, W), true where the logit is above 0."""
        return list((out[:, 0] > 0).cpu().numpy())

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """By the criterion."""
        return measured(self.criterion, out, target)
