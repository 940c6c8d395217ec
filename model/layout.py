"""Where the real tokens of a masked batch lie: in its padded slots, modality by modality, and in the row of all.

Computed once for a batch with numpy, outside of anything that is compiled; what a layer needs of it are tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.attention import Group
from model.masking import MaskedBatch

# B batch, N and M slots of a sample, S and T real tokens of the batch in encoder and decoder, R registers

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """The real tokens of one side of a batch, all int64.

    names, sizes: the modalities that occur and their numbers of tokens. slots (sum of sizes,): their places in the
    flattened batch, modality by modality.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    slots: Tensor


@dataclass(frozen=True)
class Inputs(Tokens):
    """The encoder's tokens. `rows` (S,) says what each is: 0 nothing, 1 to R the registers, then what `slots` name.

    S counts each sample's registers, or one token of nothing for a sample without any. lengths: tokens of a sample.
    """

    rows: Tensor
    lengths: tuple[int, ...]

    @property
    def groups(self) -> list[Group]:
        """Each sample sees itself."""
        return [Group(length, length) for length in self.lengths]


@dataclass(frozen=True)
class Targets(Tokens):
    """The decoder's tokens, which lie sample by sample and group by group.

    rows (T,): which of `slots` each is. places (T,): the same in the flattened batch. scored (T,): where in the row
    each of `slots` is. lengths: tokens of a sample. groups: who sees whom.
    """

    rows: Tensor
    places: Tensor
    scored: Tensor
    lengths: tuple[int, ...]
    groups: list[Group]


def inputs(batch: MaskedBatch, registers: int) -> Inputs:
    """Where the encoder's tokens lie."""
    modality = batch.enc_mod.cpu().numpy()
    names, sizes, slots = _by_modality(modality, batch.modalities)
    rows: Ints = np.zeros(modality.shape, np.int64)
    rows.reshape(-1)[slots] = np.arange(1 + registers, 1 + registers + len(slots))
    real = modality >= 0
    if registers:
        own = np.tile(np.arange(1, registers + 1), (len(rows), 1))
        rows, real = np.concatenate([own, rows], axis=1), np.concatenate([own > 0, real], axis=1)
    else:
        real[:, :1] |= ~real.any(axis=1, keepdims=True)
    device = batch.enc_mod.device
    return Inputs(names, sizes, _on(slots, device), _on(rows[real], device), tuple(real.sum(axis=1).tolist()))


def targets(batch: MaskedBatch, *, causal: bool, separate: bool) -> Targets:
    """Where the decoder's tokens lie, and which of their sample (and if `separate` their modality) each one sees."""
    modality, reach = batch.dec_mod.cpu().numpy(), batch.dec_reach.cpu().numpy()
    names, sizes, slots = _by_modality(modality, batch.modalities)
    found, groups, lengths = [np.empty(0, np.int64)], [], []
    for sample, (mods, reaches) in enumerate(zip(modality, reach, strict=True)):
        (real,) = np.nonzero(mods >= 0)
        lengths.append(len(real))
        parts = [real[mods[real] == m] for m in dict.fromkeys(mods[real].tolist())] if separate else [real]
        for part in parts:
            limit = part + 1 if causal else reaches[part]
            groups.append(Group.by_reach(np.searchsorted(part, limit), len(part)))
            found.append(sample * len(mods) + part)
    places = np.concatenate(found)
    rows = np.empty(modality.size, np.int64)
    rows[slots] = np.arange(len(slots))
    rows = rows[places]
    device = batch.dec_mod.device
    by_modality, which, where, scored = (_on(array, device) for array in (slots, rows, places, np.argsort(rows)))
    return Targets(names, sizes, by_modality, which, where, scored, tuple(lengths), groups)


def _by_modality(modality: Ints, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...], Ints]:
    flat = modality.ravel()
    sizes = np.bincount(flat[flat >= 0], minlength=len(names))
    slots = np.argsort(flat, kind="stable")[flat.size - sizes.sum() :]
    there = np.flatnonzero(sizes).tolist()
    return tuple(names[m] for m in there), tuple(sizes[there].tolist()), slots


def _on(array: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
