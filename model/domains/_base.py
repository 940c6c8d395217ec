"""What every domain has, and the losses that domains choose from. B batch, C channels, H W pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Map = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Domain(ABC):
    """Between numpy maps (or vectors) of one kind and network tensors."""

    name: ClassVar[str]
    criteria: ClassVar[tuple[str, ...]]  # what `criterion` may be, the default first

    criterion: str  # one of CRITERIA

    def __post_init__(self) -> None:
        if self.criterion not in self.criteria:
            raise ValueError(f"{self.name} criterion {self.criterion!r}, expected one of {', '.join(self.criteria)}")

    @property
    @abstractmethod
    def num_channels(self) -> int | None:
        """C of `to_network`'s tensor; None for classes, which a tokenizer embeds."""

    @abstractmethod
    def to_network(self, values: Sequence[Map]) -> Tensor:
        """Maps of one size as float32 (B, C, H, W), or int64 (B, H, W) classes; vectors as float32 (B, C, 1, 1)."""

    @abstractmethod
    def from_network(self, out: Tensor) -> list[Map]:
        """Maps from a network's output (B, C, H, W)."""

    @abstractmethod
    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """The mean reconstruction loss of a network's output (B, C, H, W) against `to_network`'s tensor."""

    def settings(self) -> dict[str, Any]:
        """Everything that `named` needs to make this domain again, beside its name."""
        return asdict(self)


def stacked(values: Sequence[Map], dtype: type, channels: int | None, what: str) -> Tensor:
    """Maps (H, W) or (H, W, C) of the given dtype as one tensor with the batch first."""
    if len(values) == 0:
        raise ValueError(f"{what}: no maps, expected at least one")
    shape = values[0].shape
    for value in values:
        if value.dtype != dtype or value.shape != shape or value.shape[2:] != ((channels,) if channels else ()):
            expected = f"{np.dtype(dtype)} (h, w{f', {channels}' if channels else ''}) maps of one size"
            raise ValueError(f"{what}: expected {expected}, got {value.dtype} {value.shape}")
    return torch.from_numpy(np.stack(values))


def _cosine_1d(out: Tensor, target: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(out.flatten(2), target.flatten(2), dim=1).mean()


def _cosine(out: Tensor, target: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(out.flatten(2), target.flatten(2), dim=2).mean()


def _bce(out: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(out, target)


def _two_class_softmax(out: Tensor, target: Tensor) -> Tensor:
    p = out.sigmoid()
    return F.cross_entropy(torch.cat([p, 1 - p], dim=1), torch.cat([target, 1 - target], dim=1))


CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "cosine_1d": _cosine_1d,
    "cosine": _cosine,
    "cross_entropy": F.cross_entropy,
    "bce": _bce,
    "binary_cross_entropy": _two_class_softmax,
}
"""Losses of (out, target) by ml-4m's names, and `bce`, which is not among them.

`cosine_1d` compares the vectors of places, `cosine` the maps of channels. `binary_cross_entropy` is what ml-4m calls
so: the cross entropy of a softmax over the probabilities of both classes, as if they were logits. It stops at
log(1 + 1/e) = 0.313 for a perfect output. `bce` is the binary cross entropy of logits.
"""


def measured(criterion: str, out: Tensor, target: Tensor) -> Tensor:
    """A loss of `CRITERIA`, in float32."""
    return CRITERIA[criterion](out.float(), target)
