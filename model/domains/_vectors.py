"""Domains of features, of vectors and of poses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from model.domains._base import Domain, Map, measured, stacked


def _single(values: Sequence[Map]) -> list[Map]:
    """float16, as features are stored, as float32."""
    return [v.astype(np.float32) if v.dtype == np.float16 else v for v in values]


def _columns(values: Sequence[Map], width: int, what: str) -> Tensor:
    """Vectors float32 (C,) as (B, C, 1, 1)."""
    if len(values) == 0:
        raise ValueError(f"{what}: no vectors, expected at least one")
    for value in values:
        if value.dtype != np.float32 or value.shape != (width,):
            raise ValueError(f"{what}: expected float32 ({width},), got {value.dtype} {value.shape}")
    return torch.from_numpy(np.stack(values))[:, :, None, None]


@dataclass(frozen=True, kw_only=True)
class Features(Domain):
    """Dense features, float32 (h, w, channels) or float16 as they are stored, as they are; smooth L1."""

    name: ClassVar[str] = "features"
    criteria: ClassVar[tuple[str, ...]] = ("smooth_l1", "mse", "l1", "cosine_1d", "cosine")
    criterion: str = "smooth_l1"
    channels: int

    @property
    def num_channels(self) -> int:
        """As the setting."""
        return self.channels

    def to_network(self, values: Sequence[Map]) -> Tensor:
        """Unchanged but for the layout."""
        return stacked(_single(values), np.float32, self.channels, self.name).permute(0, 3, 1, 2).contiguous()

    def from_network(self, out: Tensor) -> list[Map]:
        """Unchanged but for the layout."""
        return list(out.float().permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """By the criterion."""
        return measured(self.criterion, out, target)


@dataclass(frozen=True, kw_only=True)
class Vector(Domain):
    """One feature of a whole image, float32 or float16 (channels,), as it is; the cosine of the angle."""

    name: ClassVar[str] = "vector"
    criteria: ClassVar[tuple[str, ...]] = ("cosine_1d", "smooth_l1", "mse", "l1")
    criterion: str = "cosine_1d"
    channels: int

    @property
    def num_channels(self) -> int:
        """As the setting."""
        return self.channels

    def to_network(self, values: Sequence[Map]) -> Tensor:
        """float32 (B, channels, 1, 1)."""
        return _columns(_single(values), self.channels, self.name)

    def from_network(self, out: Tensor) -> list[Map]:
        """float32 (channels,); of a length that `cosine_1d` leaves open."""
        return list(out.float().flatten(1).cpu().numpy())

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """By the criterion."""
        return measured(self.criterion, out, target)


@dataclass(frozen=True, kw_only=True)
class Poses(Domain):
    """The pose of one person: 23 rotation matrices of SMPL's joints row by row, float32 (207,); smooth L1.

    With `rotations`, what comes back is the rotation that is nearest to each matrix that the network gives (Umeyama
    1991); without it, ml-4m's way, the matrices themselves, which are not quite orthogonal.
    """

    name: ClassVar[str] = "poses"
    criteria: ClassVar[tuple[str, ...]] = ("smooth_l1", "mse", "l1")
    criterion: str = "smooth_l1"
    joints: int = 23
    rotations: bool = True

    @property
    def num_channels(self) -> int:
        """Nine numbers a joint."""
        return 9 * self.joints

    def to_network(self, values: Sequence[Map]) -> Tensor:
        """float32 (B, 9 joints, 1, 1)."""
        return _columns(values, self.num_channels, self.name)

    def from_network(self, out: Tensor) -> list[Map]:
        """float32 (9 joints,)."""
        matrices = out.float().reshape(-1, self.joints, 3, 3)
        if self.rotations:
            matrices = _nearest_rotations(matrices)
        return list(matrices.flatten(1).cpu().numpy())

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """By the criterion."""
        return measured(self.criterion, out, target)


def _nearest_rotations(matrices: Tensor) -> Tensor:
    """The rotations (..., 3, 3) with the least squared difference to matrices: U diag(1, 1, det UV') V'."""
    u, _, vh = torch.linalg.svd(matrices)
    turn = torch.ones_like(matrices[..., 0])
    turn[..., 2] = torch.det(u @ vh).sign()
    return u @ (turn[..., None] * vh)
