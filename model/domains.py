"""What a map looks like as network input, per kind of map, and back: the ranges and losses a VQ-VAE is trained with.

A domain is its settings; they are saved with the tokenizer. B batch, C channels, H W pixels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Map = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Domain(ABC):
    """Between numpy maps of one kind and network tensors."""

    name: ClassVar[str]

    @abstractmethod
    def to_network(self, values: Sequence[Map]) -> Tensor:
        """Maps of one size as float32 (B, C, H, W), or int64 (B, H, W) classes."""

    @abstractmethod
    def from_network(self, out: Tensor) -> list[Map]:
        """Maps from a network's output (B, C, H, W)."""

    @abstractmethod
    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """The mean reconstruction loss of a network's output (B, C, H, W) against `to_network`'s tensor."""

    def settings(self) -> dict[str, Any]:
        """Everything that `named` needs to make this domain again, beside its name."""
        return asdict(self)


def _stacked(values: Sequence[Map], dtype: type, channels: int | None, what: str) -> Tensor:
    """Maps (H, W) or (H, W, C) of the given dtype as one tensor with the batch first."""
    if len(values) == 0:
        raise ValueError(f"{what}: no maps, expected at least one")
    shape = values[0].shape
    for value in values:
        if value.dtype != dtype or value.shape != shape or value.shape[2:] != ((channels,) if channels else ()):
            expected = f"{np.dtype(dtype)} (h, w{f', {channels}' if channels else ''}) maps of one size"
            raise ValueError(f"{what}: expected {expected}, got {value.dtype} {value.shape}")
    return torch.from_numpy(np.stack(values))


@dataclass(frozen=True, kw_only=True)
class Rgb(Domain):
    """Images, uint8 (H, W, 3), as [-1, 1]; squared error."""

    name: ClassVar[str] = "rgb"

    def to_network(self, values: Sequence[Map]) -> Tensor:
        """0..255 to [-1, 1]."""
        return _stacked(values, np.uint8, 3, self.name).permute(0, 3, 1, 2).float() / 127.5 - 1

    def from_network(self, out: Tensor) -> list[Map]:
        """Clipped and rounded to 0..255."""
        pixels = ((out.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return list(pixels.permute(0, 2, 3, 1).cpu().numpy())

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """Mean squared error in [-1, 1]."""
        return F.mse_loss(out.float(), target)


@dataclass(frozen=True, kw_only=True)
class Normal(Domain):
    """Surface normals, unit vectors float32 (H, W, 3), as they are; squared error."""

    name: ClassVar[str] = "normal"

    def to_network(self, values: Sequence[Map]) -> Tensor:
        """Unchanged but for the layout."""
        return _stacked(values, np.float32, 3, self.name).permute(0, 3, 1, 2).contiguous()

    def from_network(self, out: Tensor) -> list[Map]:
        """Scaled to unit length."""
        return list(F.normalize(out.float(), dim=1).permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of the vectors, which is what pulls the mean angle down."""
        return F.mse_loss(out.float(), target)


@dataclass(frozen=True, kw_only=True)
class Depth(Domain):
    """Depth, float32 (H, W) in [0, 1] of the full range; near is 0.

    "standardised" is ml-4m's map: each crop by its own trimmed mean and deviation, so scale is lost and
    `from_network` gives standardised values. "fixed" is invertible: log depth from `nearest`..1 to [-1, 1], because
    equal errors of log depth are equal relative errors; depths below `nearest` come back as `nearest`.
    """

    name: ClassVar[str] = "depth"
    mapping: Literal["fixed", "standardised"] = "fixed"
    nearest: float = 0.02  # of the full range: 0.4 m of 20 m
    smooth_at: float = 1.0  # where the loss turns from squared to absolute error

    def __post_init__(self) -> None:
        if self.mapping not in ("fixed", "standardised"):
            raise ValueError(f"depth mapping {self.mapping!r}, expected fixed or standardised")
        if not 0 < self.nearest < 1:
            raise ValueError(f"nearest depth {self.nearest}, expected a share of the full range in (0, 1)")

    def to_network(self, values: Sequence[Map]) -> Tensor:
        """One channel, by the mapping."""
        depth = _stacked(values, np.float32, None, self.name)[:, None]
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
        """Smooth L1."""
        return F.smooth_l1_loss(out.float(), target, beta=self.smooth_at)


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
    num_classes: int = 133  # COCO panoptic
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= 255:
            raise ValueError(f"num_classes {self.num_classes}, expected 1..255")
        if tuple(sorted({c for c in self.classes if 0 <= c < self.num_classes})) != self.classes:
            raise ValueError(f"classes {self.classes}, expected ascending ids in 0..{self.num_classes - 1}")

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
        stored = _stacked(values, np.uint8, None, self.name)
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
        return F.cross_entropy(out.float(), target)


@dataclass(frozen=True, kw_only=True)
class Edges(Domain):
    """Binary edges, uint8 (H, W) of 0 and 255, as one channel of -1 and 1; an output above 0 is an edge."""

    name: ClassVar[str] = "edges"
    criterion: Literal["mse", "bce"] = "mse"  # on thin edges squared error gave F1 0.72, cross entropy 0.70

    def to_network(self, values: Sequence[Map]) -> Tensor:
        """0 to -1, 255 to 1."""
        return _stacked(values, np.uint8, None, self.name)[:, None].float() / 127.5 - 1

    def from_network(self, out: Tensor) -> list[Map]:
        """255 where the output is above 0."""
        return list(((out[:, 0] > 0).to(torch.uint8) * 255).cpu().numpy())

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """Squared error in [-1, 1], or binary cross entropy on logits."""
        if self.criterion == "mse":
            return F.mse_loss(out.float(), target)
        return F.binary_cross_entropy_with_logits(out.float(), (target + 1) / 2)


@dataclass(frozen=True, kw_only=True)
class Features(Domain):
    """Dense features, float32 (h, w, channels) or float16 as they are stored, as they are; smooth L1."""

    name: ClassVar[str] = "features"
    channels: int

    def to_network(self, values: Sequence[Map]) -> Tensor:
        """Unchanged but for the layout."""
        values = [v.astype(np.float32) if v.dtype == np.float16 else v for v in values]
        return _stacked(values, np.float32, self.channels, self.name).permute(0, 3, 1, 2).contiguous()

    def from_network(self, out: Tensor) -> list[Map]:
        """Unchanged but for the layout."""
        return list(out.float().permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """Smooth L1."""
        return F.smooth_l1_loss(out.float(), target)


_DOMAINS: dict[str, type[Domain]] = {d.name: d for d in (Rgb, Normal, Depth, Semseg, Edges, Features)}


def named(name: str, settings: dict[str, Any] | None = None) -> Domain:
    """The domain of that name with the given settings; ValueError for a name or a setting it does not have."""
    if name not in _DOMAINS:
        raise ValueError(f"domain {name!r}, expected one of {', '.join(_DOMAINS)}")
    unknown = set(settings or {}) - {f.name for f in fields(_DOMAINS[name])}
    if unknown:
        raise ValueError(f"domain {name}: unknown settings {sorted(unknown)}")
    return _DOMAINS[name](**(settings or {}))
