"""Words of the grammars: coordinate tokens `v<axis>=<bin>` with bins 0..999, as ml-4m's text tokenizer has them."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUM_BINS = 1000
INT = r"(0|[1-9]\d{0,2})"
"""A bin as its token spells it: 0..999 without leading zeros."""

SPECIAL = re.compile(r"v[0-3]=\S*|\[(?:PAD|UNK|SOS|EOS|S_\d+)\]")
BOX = re.compile(rf"v0={INT} v1={INT} v2={INT} v3={INT}")

_HALF = 512
_ID = re.compile(r"v([01])=(0|[1-9]\d{0,2})")
_FLAT = 1e-3


def until_end(text: str) -> str:
    """What stands before the first [EOS], with [PAD] left out and outer white space gone."""
    return text.split("[EOS]", 1)[0].replace("[PAD]", "").strip()


def quoted(text: str) -> str:
    """A piece of a model's output for a message, cut to a readable length."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def chunks(words: Sequence[str], start: str) -> tuple[list[str], list[list[str]]]:
    """The words before the first `start`, and those after each, up to the next."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == start:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts[0], parts[1:]


def unbinned(bins: Sequence[int]) -> list[float]:
    """Corners x0 y0 x1 y1 in 0..1 of a box's bins.

    One that rounding has made flat is a thousandth of a bin thick to either side: it had an area, and its bins stay.
    """
    low, high = [float(v) for v in bins[:2]], [float(v) for v in bins[2:]]
    for axis in range(2):
        if low[axis] == high[axis]:
            low[axis], high[axis] = max(low[axis] - _FLAT, 0.0), min(high[axis] + _FLAT, NUM_BINS - 1.0)
    return [v / (NUM_BINS - 1) for v in (*low, *high)]


def spelled(ids: Sequence[int]) -> list[str]:
    """Ids 0..1023 of another tokenizer as words: `v0=<id>`, and `v1=<id - 512>` from 512 on."""
    return [f"v0={i}" if i < _HALF else f"v1={i - _HALF}" for i in ids]


def unspelled(words: Sequence[str], count: int) -> list[int]:
    """The `count` ids of as many words; ValueError, saying what was expected, if these are not that."""
    matches = [_ID.fullmatch(word) for word in words]
    ids = [int(m[2]) + _HALF * int(m[1]) for m in matches if m and int(m[2]) < _HALF]
    if len(words) != count or len(ids) != count:
        raise ValueError(f"expected {count} of v0=0 to v1={_HALF - 1}, got {quoted(' '.join(words))}")
    return ids
