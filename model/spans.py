"""Span masking of token ids with sentinels, as T5 and 4M do it, and its inverse."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.spec import NUM_SENTINELS, SENTINEL_0

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_DECAY = 0.9  # of the keep probability, each time a masked sequence does not fit its budget
_TRIES = 16  # at a time


def fitting_keep(rng: np.random.Generator, units: int, lengths: Ints | None, budget: int, probability: float) -> Bools:
    """Which of a sequence's ids are kept, each unit with one probability, such that kept ids and sentinels fit.

    The probability decays until they do. `lengths`: ids of each unit; None: a unit is an id. Tries are drawn several at
    a time, for each is as likely as if drawn alone.
    """
    tries = 1
    while True:
        shares = probability * _DECAY ** np.arange(tries)
        kept = rng.random((tries, units)) < shares[:, None]
        used = span_starts(kept)
        if lengths is not None:
            sizes = kept @ lengths + np.count_nonzero(used, axis=1)
        else:
            sizes = np.count_nonzero(kept, axis=1) + np.count_nonzero(used, axis=1)
        first = int(np.argmax(sizes <= budget))
        if sizes[first] <= budget:
            return kept[first] if lengths is None else np.repeat(kept[first], lengths)
        probability *= _DECAY**tries
        tries = _TRIES


def mask_inputs(ids: Ints, keep: Bools) -> Ints:
    """The input ids of `mask_spans` alone."""
    starts = span_starts(keep)
    return np.where(keep, ids, SENTINEL_0 + np.cumsum(starts))[keep | starts]


def mask_spans(ids: Ints, keep: Bools) -> tuple[Ints, Ints, Ints]:
    """Replace each run of masked ids by a sentinel, counted from [S_1].

    Returns the input ids, the target ids ([S_1] span [S_2] span ... and a closing sentinel), and where the targets'
    sentinels are.
    """
    return mask_inputs(ids, keep), *mask_targets(ids, keep)


def mask_targets(ids: Ints, keep: Bools) -> tuple[Ints, Ints]:
    """The target ids of `mask_spans` alone, and where their sentinels are."""
    masked = np.flatnonzero(~keep)
    # A span begins where a masked id does not follow the one before.
    first = np.flatnonzero(np.diff(masked, prepend=-2) > 1)
    sentinels = np.append(first, len(masked)) + np.arange(len(first) + 1)
    targets = np.empty(len(masked) + len(sentinels), np.int64)
    is_id = np.ones(len(targets), bool)
    is_id[sentinels] = False
    targets[sentinels] = np.arange(SENTINEL_0 + 1, SENTINEL_0 + 1 + len(sentinels))
    targets[is_id] = ids[masked]
    return targets, sentinels


def merge_spans(inputs: Sequence[int], targets: Sequence[int]) -> list[int]:
    """Undo `mask_spans`: the input with each sentinel replaced by the target ids that follow that sentinel."""
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in targets:
        if SENTINEL_0 <= token < SENTINEL_0 + NUM_SENTINELS:
            current = spans.setdefault(int(token), [])
        else:
            current.append(int(token))
    merged: list[int] = []
    for token in inputs:
        if SENTINEL_0 <= token < SENTINEL_0 + NUM_SENTINELS:
            merged.extend(spans.get(int(token), []))
        else:
            merged.append(int(token))
    return merged


def fit_target(rng: np.random.Generator, targets: Ints, sentinels: Ints, budget: int) -> Ints:
    """Cut a target of spans to `budget` ids, starting at a sentinel and wasting as little as the spans allow."""
    if len(targets) <= budget:
        return targets
    if budget <= 0:
        return targets[:0]
    start = int(sentinels[rng.integers(max(1, len(sentinels) - 1))])  # never the closing one, if there is another
    if len(targets) - start < budget:
        start = int(sentinels[np.argmax(len(targets) - sentinels <= budget)])
    return targets[start : start + budget]


def span_starts(keep: Bools) -> Bools:
    """True at the first masked id of each run of masked ids along the last axis."""
    starts = ~keep
    starts[..., 1:] &= keep[..., :-1]
    return starts
