"""Which tokens of a batch the budgets of a plan become: places of grids, masked spans of sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.budgets import Ints, MaskingConfig, Plan
from model.dense import Dense, check_image
from model.spans import fit_targets, fitting_keep, mask_inputs, mask_targets
from model.spec import EOS, ModalitySpec

_EMPTY: Ints = np.empty(0, np.int64)


class _Parts:
    """Tokens of one side, modality by modality."""

    def __init__(self, *names: str) -> None:
        self.columns: dict[str, list[Any]] = {name: [_EMPTY] for name in ("row", "mod", *names)}

    def add(self, **columns: Any) -> None:
        for name, values in columns.items():
            self.columns[name].append(values)

    def joined(self) -> dict[str, Ints]:
        return {name: np.concatenate(values).astype(np.int64, copy=False) for name, values in self.columns.items()}


class _Sequences:
    """Ids of sequences and rows of embeddings of all modalities, one sequence after the other.

    units: of each sequence; lengths: ids of each unit, which is kept or masked whole; counts: ids of each sequence.
    """

    def __init__(self) -> None:
        self.ids, self.lengths, self.units, self.counts = [_EMPTY], [_EMPTY], [_EMPTY], [_EMPTY]
        self.rows, self.mods, self.num_in, self.num_out = [_EMPTY], [_EMPTY], [_EMPTY], [_EMPTY]
        self.shares: list[NDArray[np.float64]] = [np.empty(0)]

    def add(
        self, spec: ModalitySpec, m: int, rows: Ints, values: Sequence[Any], num_in: Ints, num_out: Ints, shares: Any
    ) -> None:
        ids, lengths, units, counts = flattened(spec, values)
        self.ids.append(ids)
        self.lengths.append(lengths)
        self.units.append(units)
        self.counts.append(counts)
        self.rows.append(rows)
        self.mods.append(np.full(len(rows), m))
        self.num_in.append(num_in)
        self.num_out.append(num_out)
        self.shares.append(shares)


def select(
    rng: np.random.Generator,
    plan: Plan,
    samples: Sequence[Mapping[str, Any]],
    specs: Sequence[ModalitySpec],
    config: MaskingConfig,
) -> tuple[Ints, Ints, dict[str, Ints], Dense]:
    """Rows of encoder and decoder tokens, their columns in the order of rows, and what is read whole.

    The columns have the names of `model.masking.MaskedSample`.
    """
    encoder, decoder = _Parts("pos", "ids"), _Parts("pos", "ids", "targets")
    sequences = _Sequences()
    dense: Dense = {}
    needs = plan.needs(specs)
    for m, spec in enumerate(specs):
        rows: list[int] = np.flatnonzero(needs[:, m]).tolist()
        if not rows:
            continue
        values: list[Any] = [samples[b].get(spec.name) for b in rows]
        for b, value in zip(rows, values, strict=True):
            if value is None:
                raise ValueError(f"{spec.name} of sample {b} has a budget and no value")
        num_in, num_out = plan.inputs[rows, m], plan.targets[rows, m]
        if spec.is_grid:
            _grids(rng, spec, m, np.array(rows), values, num_in, num_out, encoder, decoder)
        else:
            keeps = [component.keep.get(spec.name, "random") for component in config.components]
            shares = _shares(rng, np.array(keeps)[plan.components[rows]])
            if config.count_predictions:
                num_out = num_out + (num_out > 0)
            sequences.add(spec, m, np.array(rows), values, num_in, num_out, shares)
        if not spec.is_target:
            whole = [(b, value) for b, value in zip(rows, values, strict=True) if len(value)]
            dense |= {spec.name: whole} if whole else {}

    _mask(rng, sequences, specs, encoder, decoder)
    taken = encoder.joined()
    order = _sorted(taken["row"] * len(specs) + taken["mod"], len(samples) * len(specs))
    flat = {f"enc_{name}": column[order] for name, column in taken.items() if name != "row"}
    enc_row = taken["row"][order]

    # ml-4m shuffles the modalities of the decoder.
    taken = decoder.joined()
    ranks = rng.permuted(np.tile(np.arange(len(specs)), (len(samples), 1)), axis=1)
    block = taken["row"] * len(specs) + ranks[taken["row"], taken["mod"]]
    order = _sorted(block, ranks.size)
    flat |= {f"dec_{name}": column[order] for name, column in taken.items() if name != "row"}
    dec_row = taken["row"][order]
    sizes = np.bincount(block, minlength=ranks.size)
    ends = np.cumsum(sizes.reshape(ranks.shape), axis=1).reshape(-1)[block[order]]
    # A grid is one block that sees itself whole; a sequence is causal.
    is_grid = np.array([spec.is_grid for spec in specs], bool)[flat["dec_mod"]]
    column = within(np.bincount(dec_row, minlength=len(samples)))
    flat["dec_reach"] = np.where(is_grid, ends, column + 1)
    return enc_row, dec_row, flat, dense


def _grids(
    rng: np.random.Generator,
    spec: ModalitySpec,
    m: int,
    rows: Ints,
    values: Sequence[Any],
    num_in: Ints,
    num_out: Ints,
    encoder: _Parts,
    decoder: _Parts,
) -> None:
    """Disjoint, uniformly drawn places of pixels or tokens of all rows of the batch that have some."""
    block = _stack_tokens(spec, values) if spec.kind == "tokens" else _check_pixels(spec, values)
    ranks = rng.permuted(np.tile(np.arange(spec.max_tokens, dtype=np.int32), (len(rows), 1)), axis=1)
    first, last = num_in[:, None], (num_in + num_out)[:, None]
    row, pos = np.nonzero(ranks < first)
    encoder.add(row=rows[row], mod=np.full(len(row), m), pos=pos, ids=block[row, pos])
    if spec.kind == "tokens":
        row, pos = np.nonzero((ranks >= first) & (ranks < last))
        mod, ids = np.full((2, len(pos)), [[m], [-1]])
        decoder.add(row=rows[row], mod=mod, pos=pos, ids=ids, targets=block[row, pos])


def _stack_tokens(spec: ModalitySpec, values: Sequence[Any]) -> NDArray[Any]:
    for value in values:
        if np.size(value) != spec.max_tokens:
            raise ValueError(f"{spec.name}: {np.size(value)} tokens, expected {spec.max_tokens}")
    return np.concatenate(values, axis=None).reshape(len(values), -1)


def _check_pixels(spec: ModalitySpec, values: Sequence[Any]) -> NDArray[Any]:
    for value in values:
        check_image(spec, value)
    return np.broadcast_to(np.int64(0), (len(values), spec.max_tokens))


def flattened(spec: ModalitySpec, values: Sequence[Any]) -> tuple[Ints, Ints, Ints, Ints]:
    """Ids with EOS (numbers of rows for embeddings), cut, as `_Sequences` holds them: ids, lengths, units, counts."""
    most = spec.max_tokens
    if spec.kind == "embeddings":
        counts = np.minimum(np.array([len(value) for value in values], np.int64), most)
        return within(counts), np.ones(counts.sum(), np.int16), counts, counts
    ids: list[int] = []
    sizes: list[int] = []
    if not spec.chunked:
        for value in values:
            ids += value[:most]
            if len(value) < most:
                ids.append(EOS)
        counts = np.minimum(np.array([len(value) + 1 for value in values], np.int64), most)
        return np.array(ids, np.int64), np.ones(len(ids), np.int16), counts, counts
    ends, units = [0], [0]
    for value in values:
        last = len(ids) + most
        for chunk in (*value, (EOS,)):
            if len(ids) + len(chunk) > last:
                break
            if len(chunk):
                ids += chunk
                sizes.append(len(chunk))
        ends.append(len(ids))
        units.append(len(sizes))
    return np.array(ids, np.int64), np.array(sizes, np.int16), np.diff(units), np.diff(ends)


def _shares(rng: np.random.Generator, keeps: NDArray[np.str_]) -> NDArray[np.float64]:
    """The share of each sequence that is kept if it fits."""
    # It is uniform; ml-4m's docstring says cosine, its code and its checkpoints do not.
    shares = rng.random(len(keeps))
    return np.where(keeps == "all", 1.0, np.where(keeps == "binary", shares < 0.5, shares))


def _mask(
    rng: np.random.Generator,
    sequences: _Sequences,
    specs: Sequence[ModalitySpec],
    encoder: _Parts,
    decoder: _Parts,
) -> None:
    """Input ids within `num_in` and target ids within `num_out`; embeddings: rows (-1 a masked span) and no target."""
    ids, lengths, units, counts, rows, mods, num_in, num_out = (
        np.concatenate(getattr(sequences, name))
        for name in ("ids", "lengths", "units", "counts", "rows", "mods", "num_in", "num_out")
    )
    if not len(rows):
        return
    kept = np.repeat(fitting_keep(rng, units, lengths, num_in, np.concatenate(sequences.shares)), lengths)
    owner = np.repeat(np.arange(len(counts)), counts)
    shown, left = mask_inputs(ids, kept, counts)
    is_vector = np.array([spec.kind == "embeddings" for spec in specs], bool)[mods]
    shown = np.where(is_vector[owner] & ~kept, -1, shown)
    left &= (num_in > 0)[owner]
    sizes = np.bincount(owner[left], minlength=len(counts))
    encoder.add(row=rows[owner[left]], mod=mods[owner[left]], pos=within(sizes), ids=shown[left])

    # A target of one id predicts nothing, for it is only an input of the decoder.
    predicted = np.array([spec.is_target for spec in specs], bool)[mods] & (num_out > 1)
    (some,), part = np.nonzero(predicted), predicted[owner]
    targets = mask_targets(ids[part], kept[part], counts[some])
    first, size = fit_targets(rng, targets, num_out[some])
    owner = np.repeat(np.arange(len(some)), np.where(size > 1, size - 1, 0))
    pos = within(np.bincount(owner, minlength=len(some)))
    places = (np.cumsum(targets.counts) - targets.counts + first)[owner] + pos
    wrapped = np.array([spec.max_positions or spec.max_tokens for spec in specs])[mods[some]][owner]
    decoder.add(
        row=rows[some][owner],
        mod=mods[some][owner],
        pos=np.where(pos < wrapped, pos, 0),
        ids=targets.ids[places],
        targets=targets.ids[places + 1],
    )


def _sorted(keys: Ints, most: int) -> Ints:
    """The stable order of keys below `most`; those of 16 bits are sorted by digits, in a tenth of the time."""
    return np.argsort(keys.astype(np.uint16) if most <= 1 << 16 else keys, kind="stable")


def within(counts: Ints) -> Ints:
    """0, 1, ... within each of consecutive groups of the given sizes."""
    ends = np.cumsum(counts)
    places: Ints = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
    return places
