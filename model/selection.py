"""Which tokens of a batch the budgets of a plan become: places of grids, masked spans of sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.budgets import Ints, Keep, MaskingConfig, Plan
from model.dense import Dense, check_image
from model.spans import fit_target, fitting_keep, mask_inputs, mask_targets, span_starts
from model.spec import EOS, ModalitySpec

_EMPTY: Ints = np.empty(0, np.int64)


class _Parts:
    """Tokens of one side, modality by modality."""

    def __init__(self, *names: str) -> None:
        self.columns: dict[str, list[Any]] = {name: [_EMPTY] for name in ("row", "mod", *names)}

    def add(self, row: Ints, mod: int, **columns: Any) -> None:
        for name, values in (("row", row), ("mod", np.full(len(row), mod)), *columns.items()):
            self.columns[name].append(values)

    def joined(self) -> dict[str, Ints]:
        return {name: np.concatenate(values).astype(np.int64, copy=False) for name, values in self.columns.items()}


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
            keeps = [config.components[c].keep.get(spec.name, "random") for c in plan.components[rows]]
            if config.count_predictions:
                num_out = num_out + (num_out > 0)
            _sequences(rng, spec, m, np.array(rows), values, num_in.tolist(), num_out.tolist(), keeps, encoder, decoder)
        if not spec.is_target:
            whole = [(b, value) for b, value in zip(rows, values, strict=True) if len(value)]
            dense |= {spec.name: whole} if whole else {}

    taken = encoder.joined()
    order = np.argsort(taken["row"], kind="stable")
    flat = {f"enc_{name}": column[order] for name, column in taken.items() if name != "row"}
    enc_row = taken["row"][order]

    # ml-4m shuffles the modalities of the decoder.
    taken = decoder.joined()
    ranks = rng.permuted(np.tile(np.arange(len(specs)), (len(samples), 1)), axis=1)
    block = taken["row"] * len(specs) + ranks[taken["row"], taken["mod"]]
    order = np.argsort(block, kind="stable")
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
    encoder.add(rows[row], m, pos=pos, ids=block[row, pos])
    if spec.kind == "tokens":
        row, pos = np.nonzero((ranks >= first) & (ranks < last))
        decoder.add(rows[row], m, pos=pos, ids=np.full(len(pos), -1), targets=block[row, pos])


def _stack_tokens(spec: ModalitySpec, values: Sequence[Any]) -> NDArray[Any]:
    flat = [np.asarray(value).reshape(-1) for value in values]
    for ids in flat:
        if len(ids) != spec.max_tokens:
            raise ValueError(f"{spec.name}: {len(ids)} tokens, expected {spec.max_tokens}")
    return np.stack(flat)


def _check_pixels(spec: ModalitySpec, values: Sequence[Any]) -> NDArray[Any]:
    for value in values:
        check_image(spec, value)
    return np.broadcast_to(np.int64(0), (len(values), spec.max_tokens))


def prepared(spec: ModalitySpec, value: Any) -> tuple[Ints, Ints | None]:
    """Ids with EOS (numbers of rows for embeddings), cut; and ids of each chunk, None where each stands alone."""
    if spec.kind == "embeddings":
        return np.arange(min(len(value), spec.max_tokens)), None
    if not spec.chunked:
        ids = np.full(min(len(value) + 1, spec.max_tokens), EOS, np.int64)
        ids[: len(value)] = value[: len(ids)]
        return ids, None
    chunks = [*(chunk for chunk in value if len(chunk)), [EOS]]
    sizes = np.array([len(chunk) for chunk in chunks], np.int64)
    sizes = sizes[np.cumsum(sizes) <= spec.max_tokens]
    return np.array([token for chunk in chunks[: len(sizes)] for token in chunk], np.int64), sizes


def _sequences(
    rng: np.random.Generator,
    spec: ModalitySpec,
    m: int,
    rows: Ints,
    values: Sequence[Any],
    num_in: Sequence[int],
    num_out: Sequence[int],
    keeps: Sequence[Keep],
    encoder: _Parts,
    decoder: _Parts,
) -> None:
    """Input ids within `num_in` and target ids within `num_out`; embeddings: rows (-1 a masked span) and no target."""
    inputs, targets = [_EMPTY] * len(rows), [_EMPTY] * len(rows)
    for k, (value, most_in, most_out, keep) in enumerate(zip(values, num_in, num_out, keeps, strict=True)):
        ids, sizes = prepared(spec, value)
        kept = np.zeros(len(ids), bool)
        if most_in:
            # The kept share is uniform; ml-4m's docstring says cosine, its code and its checkpoints do not.
            share = 1.0 if keep == "all" else float(rng.integers(2)) if keep == "binary" else rng.random()
            kept = fitting_keep(rng, len(ids) if sizes is None else len(sizes), sizes, most_in, share)
            if spec.kind == "embeddings":
                inputs[k] = np.where(kept, ids, -1)[kept | span_starts(kept)]
            else:
                inputs[k] = mask_inputs(ids, kept)
        # A target of one id predicts nothing, for it is only an input of the decoder.
        if spec.is_target and most_out > 1:
            whole, sentinels = mask_targets(ids, kept)
            found = fit_target(rng, whole, sentinels, most_out)
            targets[k] = found if len(found) > 1 else _EMPTY
    counts = np.array([len(ids) for ids in inputs])
    encoder.add(np.repeat(rows, counts), m, pos=within(counts), ids=np.concatenate(inputs))
    counts = np.array([max(0, len(ids) - 1) for ids in targets])
    pos = within(counts)
    pos[pos >= (spec.max_positions or spec.max_tokens)] = 0
    shown, predicted = (np.concatenate([ids[part] for ids in targets]) for part in (slice(-1), slice(1, None)))
    decoder.add(np.repeat(rows, counts), m, pos=pos, ids=shown, targets=predicted)


def within(counts: Ints) -> Ints:
    """0, 1, ... within each of consecutive groups of the given sizes."""
    ends = np.cumsum(counts)
    places: Ints = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
    return places
