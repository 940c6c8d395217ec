"""How many tokens a decoding step writes and at which temperature; the formulas of ml-4m's generation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def cosine_counts(num_steps: int, num_tokens: int) -> Counts:
    """Tokens of each step along (1 + cos) / 2, few at the ends and many in the middle; they sum to `num_tokens`."""
    level = (1 + np.cos(np.pi * np.arange(num_steps) / num_steps)) / 2
    counts = np.round(num_tokens * -np.diff(level)).astype(np.int64)
    return np.append(counts, num_tokens - counts.sum())


def linear_counts(num_steps: int, num_tokens: int) -> Counts:
    """Equal steps, larger ones first; steps that would write nothing are dropped."""
    ends = np.linspace(0, num_tokens, num_steps + 1).astype(np.int64)
    counts: Counts = np.sort(ends[1:] - ends[:-1])[::-1]
    return counts[counts > 0]


def temperatures(schedule: str, start: float, counts: Counts) -> NDArray[np.float64]:
    """One temperature a step: "constant", "linear" (falls with what is left), or "onex:<min>:<power>" (1 / x**power).

    onex reads its curve at the step's number and not at the share of tokens written, as ml-4m's published settings
    expect: the first temperature is below `start`.
    """
    total = counts.sum()
    written = counts.cumsum() / total
    kind, *parameters = schedule.split(":")
    if kind == "constant" and not parameters:
        return np.full(len(counts), float(start))
    if kind == "linear" and not parameters:
        return np.maximum(np.concatenate([[start], start * (1 - written[:-1])]), 1e-9)
    if kind == "onex" and len(parameters) == 2:
        lowest, power = map(float, parameters)
        curve = np.linspace(1, 100, int(total)) ** -power
        span = curve[0] - curve[-1]
        curve = (curve - curve[-1]) / (span if span > 0 else 1.0)
        return np.maximum(lowest + (start - lowest) * curve[: len(counts)] * (1 - written), 1e-9)
    raise ValueError(f"temperature schedule {schedule!r}, expected constant, linear or onex:<min>:<power>")
