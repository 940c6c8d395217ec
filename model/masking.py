"""Random inputs and targets of samples: which tokens, masked spans, and the flat batch the model reads.

Pure functions of a numpy Generator, in the distribution of ml-4m's UnifiedMasking (Bachmann et al. 2024, 4M-21), in
two steps, so that a loader reads only what is used:

    plan = draw(rng, specs, config, present)      # from what is there alone (model.budgets)
    values = ...                                  # read what plan.needs(specs) says
    batch = apply(rng, plan, values, specs, config)

`mask_sample` and `collate` do the same sample by sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.budgets import (
    Bools,
    Ints,
    Keep,
    MaskingConfig,
    MixtureComponent,
    Plan,
    dirichlet,
    draw,
    token_budget,
)
from model.dense import Dense, gather
from model.selection import flattened, select, within
from model.spec import ModalitySpec

__all__ = [
    "Keep",
    "MaskedBatch",
    "MaskedSample",
    "MaskingConfig",
    "MixtureComponent",
    "Plan",
    "apply",
    "collate",
    "dirichlet",
    "draw",
    "lengths",
    "mask_sample",
    "present",
    "token_budget",
]

_ENCODER: tuple[str, ...] = ("enc_ids", "enc_mod", "enc_pos")
_DECODER: tuple[str, ...] = ("dec_ids", "dec_mod", "dec_pos", "dec_targets", "dec_reach")


@dataclass(frozen=True)
class MaskedSample:
    """The kept tokens of one sample, flat; see `MaskedBatch` for the meaning of each.

    `dense` has the whole values of pixels and embeddings; enc_ids are rows of its embeddings, unused for pixels.
    """

    enc_ids: Ints
    enc_mod: Ints
    enc_pos: Ints
    dec_ids: Ints
    dec_mod: Ints
    dec_pos: Ints
    dec_targets: Ints
    dec_reach: Ints
    dense: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class MaskedBatch:
    """Kept tokens of B samples, flat over modalities: N encoder and M decoder tokens, padded at the end.

    enc_mod, dec_mod: index into `modalities`, -1 is padding. enc_ids: token id; row of `pixels` or `embeddings`, where
    -1 is a masked span. enc_pos, dec_pos: place on the grid, or rank in the masked sequence. dec_ids: input id, -1 is
    the mask token. dec_targets: id to predict. dec_reach: query i sees key j of its modality iff j < reach[i].
    pixels[m]: (K, p*p*C), the K patches that are inputs, flattened as row, column, channel: uint8, or float32 already
    normalised with ImageNet's statistics. embeddings[m]: float32 or float16 (K, dim_in), the K vectors that are inputs.
    All other tensors int64.
    """

    modalities: tuple[str, ...]
    enc_ids: torch.Tensor
    enc_mod: torch.Tensor
    enc_pos: torch.Tensor
    dec_ids: torch.Tensor
    dec_mod: torch.Tensor
    dec_pos: torch.Tensor
    dec_targets: torch.Tensor
    dec_reach: torch.Tensor
    pixels: dict[str, torch.Tensor] = field(default_factory=dict)
    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskedBatch:
        """The same batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MaskedBatch:
        """The same batch in page-locked memory (a DataLoader calls this)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> MaskedBatch:
        changed: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor):
                changed[f.name] = function(value)
            elif isinstance(value, dict):
                changed[f.name] = {name: function(tensor) for name, tensor in value.items()}
            else:
                changed[f.name] = value
        return MaskedBatch(**changed)


def present(specs: Sequence[ModalitySpec], samples: Sequence[Mapping[str, Any]]) -> Bools:
    """(B, M): which modalities samples have a value of; None or missing is absent."""
    return np.array([[sample.get(spec.name) is not None for spec in specs] for sample in samples], bool)


def lengths(specs: Sequence[ModalitySpec], samples: Sequence[Mapping[str, Any]]) -> Ints:
    """(B, M): ids of sequences, with EOS, and rows of embeddings, both cut to what is masked; 0 for all else."""
    out = np.zeros((len(samples), len(specs)), np.int64)
    for m, spec in enumerate(specs):
        if not spec.is_grid:
            rows = [b for b, sample in enumerate(samples) if sample.get(spec.name) is not None]
            out[rows, m] = flattened(spec, [samples[b][spec.name] for b in rows])[3]
    return out


def mask_sample(
    rng: np.random.Generator,
    sample: Mapping[str, Any],
    specs: Sequence[ModalitySpec],
    config: MaskingConfig,
) -> MaskedSample:
    """Draw budgets, then which tokens of `sample` are inputs and which are targets.

    sample[name]: tokens int (n,); sequence list of ids without EOS, or list of lists if chunked; pixels uint8 (H, W, C)
    or float32 (C, H, W), normalised; embeddings float (rows, dim_in). None or missing: absent, it takes no budget.
    """
    sizes = lengths(specs, [sample]) if config.redistribute else None
    plan = draw(rng, specs, config, present(specs, [sample]), sizes)
    _, _, flat, dense = select(rng, plan, [sample], specs, config)
    return MaskedSample(**flat, dense={name: value for name, [(_, value)] in dense.items()})


def apply(
    rng: np.random.Generator,
    plan: Plan,
    samples: Sequence[Mapping[str, Any]],
    specs: Sequence[ModalitySpec],
    config: MaskingConfig,
    *,
    trim: bool = True,
) -> MaskedBatch:
    """Choose the tokens of the budgets of a plan, for the whole batch at once.

    samples: as for `mask_sample`, tokens of any integer type; only what `plan.needs` names is looked at, ValueError
    where that is missing. Padding as `collate`; no sample has more tokens than the config's ranges allow.
    """
    enc_row, dec_row, flat, dense = select(rng, plan, samples, specs, config)
    num_encoder, num_decoder = config.input_tokens[1], config.target_tokens[1]
    return _batch(len(samples), enc_row, dec_row, flat, dense, specs, num_encoder, num_decoder, trim)


def collate(
    samples: Sequence[MaskedSample],
    specs: Sequence[ModalitySpec],
    num_encoder: int,
    num_decoder: int,
    *,
    trim: bool = True,
) -> MaskedBatch:
    """Stack samples; at most `num_encoder` and `num_decoder` tokens each, later modalities are cut.

    Padding goes to the longest sample of the batch (`trim`), or to the full counts where one static shape is wanted.
    """
    rows = np.arange(len(samples))
    enc_row = np.repeat(rows, [len(sample.enc_ids) for sample in samples])
    dec_row = np.repeat(rows, [len(sample.dec_ids) for sample in samples])
    flat = {name: np.concatenate([getattr(s, name) for s in samples]) for name in (*_ENCODER, *_DECODER)}
    dense: Dense = {}
    for b, sample in enumerate(samples):
        for name, value in sample.dense.items():
            dense.setdefault(name, []).append((b, value))
    return _batch(len(samples), enc_row, dec_row, flat, dense, specs, num_encoder, num_decoder, trim)


def _batch(
    size: int,
    enc_row: Ints,
    dec_row: Ints,
    flat: Mapping[str, Ints],
    dense: Dense,
    specs: Sequence[ModalitySpec],
    num_encoder: int,
    num_decoder: int,
    trim: bool,
) -> MaskedBatch:
    padded: dict[str, Ints] = {}
    for columns, row, length in ((_ENCODER, enc_row, num_encoder), (_DECODER, dec_row, num_decoder)):
        counts = np.bincount(row, minlength=size)
        if trim:
            length = max(1, min(length, int(counts.max())))
        column = within(counts)
        fits = column < length
        place = (row * length + column)[fits]
        for name in columns:
            # Padding sees padding (reach = length), so that no row of an attention mask is empty.
            fill = {"enc_mod": -1, "dec_mod": -1, "dec_reach": length}.get(name, 0)
            rows = np.full(size * length, fill, np.int64)
            rows[place] = flat[name][fits]
            padded[name] = rows.reshape(size, length)
    held: dict[str, dict[str, torch.Tensor]] = {"pixels": {}, "embeddings": {}}
    for m, spec in enumerate(specs):
        if spec.name in dense:
            where = np.nonzero(padded["enc_mod"] == m)
            found, padded["enc_ids"][where] = gather(
                spec, dense[spec.name], where[0], padded["enc_pos"][where], padded["enc_ids"][where]
            )
            held[spec.kind][spec.name] = torch.from_numpy(found)
    tensors = {name: torch.from_numpy(values) for name, values in padded.items()}
    names = tuple(spec.name for spec in specs)
    return MaskedBatch(modalities=names, pixels=held["pixels"], embeddings=held["embeddings"], **tensors)
