"""Span masking of token ids with sentinels, as T5 and 4M do it, of many sequences at once; and its inverse.

K sequences lie one after the other in flat arrays; `counts` (K,) says how many elements each has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.spec import NUM_SENTINELS, SENTINEL_0

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_DECAY = 0.9  # of the keep probability, each time a masked sequence does not fit its budget
_TRIES = 8  # at a time, at most


def fitting_keep(rng: np.random.Generator, counts: Ints, lengths: Ints, budgets: Ints, shares: NDArray[Any]) -> Bools:
    """Which units are kept, each unit of a sequence with its probability, such that kept ids and sentinels fit.

    counts: units of each sequence; a unit, of so many ids as `lengths` says, is kept or masked whole. Where a sequence
    does not fit its budget the probability decays and all of it is drawn again. Tries are drawn several at a time, for
    each is as likely as if drawn alone. Nothing is kept where the budget is 0.
    """
    kept = np.zeros(len(lengths), bool)
    firsts = np.cumsum(counts) - counts
    (left,) = np.nonzero((counts > 0) & (budgets > 0))
    shares, tries = shares.astype(np.float64), 1
    while len(left):
        sizes = np.repeat(counts[left], tries)
        begins = np.cumsum(sizes) - sizes
        places = np.repeat(np.repeat(firsts[left], tries) - begins, sizes) + np.arange(sizes.sum())
        chances = (shares[left][:, None] * _DECAY ** np.arange(tries)).astype(np.float32).reshape(-1)
        drawn = rng.random(len(places), np.float32) < np.repeat(chances, sizes)
        used = np.add.reduceat(drawn * lengths[places] + span_starts(drawn, begins), begins)
        fits = used.reshape(-1, tries) <= budgets[left][:, None]
        first_fit = fits & (np.cumsum(fits, axis=1) == 1)
        chosen = np.repeat(first_fit.reshape(-1), sizes)
        kept[places[chosen]] = drawn[chosen]
        shares[left] *= _DECAY**tries
        left, tries = left[~fits.any(axis=1)], min(_TRIES, 2 * tries)
    return kept


def span_starts(keep: Bools, firsts: Ints) -> Bools:
    """True at the first masked id of each run of masked ids; `firsts` are the places where sequences begin."""
    follows = np.empty_like(keep)
    follows[1:] = keep[:-1]
    follows[firsts[firsts < len(keep)]] = True
    starts: Bools = follows & ~keep
    return starts


def mask_inputs(ids: Ints, keep: Bools, counts: Ints) -> tuple[Ints, Bools]:
    """Ids, each run of masked ones as a sentinel, counted from [S_1] in each sequence; and which are left of them."""
    firsts = np.cumsum(counts) - counts
    starts = span_starts(keep, firsts)
    before = np.append(0, np.cumsum(starts))
    number = before[1:] - np.repeat(before[firsts], counts)
    return np.where(keep, ids, SENTINEL_0 + number), keep | starts


class Targets(NamedTuple):
    """Target ids of K sequences, [S_1] span [S_2] span ... and a closing sentinel: flat, `counts` (K,) of each.

    sentinels: places, within their sequence, of those that are not the closing one; `spans` (K,) of each.
    """

    ids: Ints
    counts: Ints
    sentinels: Ints
    spans: Ints


def mask_targets(ids: Ints, keep: Bools, counts: Ints) -> Targets:
    """The targets that go with `mask_inputs`."""
    firsts = np.cumsum(counts) - counts
    (masked,) = np.nonzero(~keep)
    starts = span_starts(keep, firsts)[masked]
    owner = np.repeat(np.arange(len(counts)), counts)[masked]
    spans = np.bincount(owner[starts], minlength=len(counts))
    sizes = np.bincount(owner, minlength=len(counts)) + spans + 1
    ends = np.cumsum(sizes)
    # Before each masked id lie those of its sequence, the sentinels so far, and all sequences before with theirs.
    places = np.arange(len(masked)) + np.cumsum(starts) + owner
    number = np.cumsum(starts) - (np.cumsum(spans) - spans)[owner]
    out = np.empty(sizes.sum(), np.int64)
    out[places] = ids[masked]
    out[places[starts] - 1] = SENTINEL_0 + number[starts]
    out[ends - 1] = SENTINEL_0 + 1 + spans
    return Targets(out, sizes, places[starts] - 1 - (ends - sizes)[owner[starts]], spans)


def fit_targets(rng: np.random.Generator, targets: Targets, budgets: Ints) -> tuple[Ints, Ints]:
    """(first, size) of the part of each target that is within its budget, (K,) each.

    Cut ones start at a sentinel and waste as little as the spans allow.
    """
    first, size = np.zeros_like(budgets), np.minimum(targets.counts, budgets)
    (over,) = np.nonzero((targets.counts > budgets) & (budgets > 0))
    if not len(over):
        return first, size
    begins = np.cumsum(targets.spans) - targets.spans
    # Never the closing one, if there is another; one that is too long to fit has another.
    start = targets.sentinels[begins[over] + rng.integers(0, np.maximum(1, targets.spans[over]))]
    owner = np.repeat(np.arange(len(budgets)), targets.spans)
    too_early = (targets.counts - budgets)[owner] > targets.sentinels
    index = np.bincount(owner[too_early], minlength=len(budgets))[over]
    closing = index == targets.spans[over]
    earliest = np.where(closing, targets.counts[over] - 1, np.append(targets.sentinels, 0)[begins[over] + index])
    first[over] = np.where(targets.counts[over] - start < budgets[over], earliest, start)
    return first, np.minimum(targets.counts - first, budgets)


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
