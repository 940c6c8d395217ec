"""Span masking of token ids with sentinels, as T5 and 4M do it, and its inverse."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.spec import NUM_SENTINELS, SENTINEL_0

Ints = NDArray[np.int64]


def mask_spans(ids: Ints, keep: NDArray[np.bool_]) -> tuple[Ints, Ints, Ints]:
    """Replace each run of masked ids by a sentinel, counted from [S_1].

    Returns the input ids, the target ids ([S_1] span [S_2] span ... and a closing sentinel), and where the targets'
    sentinels are.
    """
    starts = span_starts(keep)
    inputs = np.where(keep, ids, SENTINEL_0 + np.cumsum(starts))[keep | starts]
    masked = ~keep
    first = np.flatnonzero(starts[masked])
    sentinels = np.append(first + np.arange(len(first)), masked.sum() + len(first))
    targets = np.empty(int(sentinels[-1]) + 1, np.int64)
    is_sentinel = np.zeros(len(targets), bool)
    is_sentinel[sentinels] = True
    targets[is_sentinel] = SENTINEL_0 + 1 + np.arange(len(sentinels))
    targets[~is_sentinel] = ids[masked]
    return inputs, targets, sentinels


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


def span_starts(keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """True at the first masked id of each run of masked ids."""
    starts = ~keep
    starts[1:] &= keep[:-1]
    return starts
