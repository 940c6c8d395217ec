"""What a value must be: each function passes or raises ValueError with what was found and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np


def array(name: str, value: Any, dtype: type[np.generic], shape: Sequence[int | str]) -> None:
    """An array of a dtype and a shape; a word in `shape` stands for any length of at least one."""
    if isinstance(value, np.ndarray):
        fits = len(shape) == value.ndim and all(
            found == wanted if isinstance(wanted, int) else found > 0
            for found, wanted in zip(value.shape, shape, strict=True)
        )
        if value.dtype == dtype and fits:
            return
    expected = f"{np.dtype(dtype)} ({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    got = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
    raise ValueError(f"{name}: expected {expected}, got {got}")


def finite(name: str, value: np.ndarray) -> None:
    """No nan and no infinity."""
    if not _is_finite(value):
        raise ValueError(f"{name}: expected finite values, got {value.size - int(np.isfinite(value).sum())} others")


def _is_finite(value: np.ndarray) -> bool:
    if value.dtype == np.float16 and value.size:
        # By their bits: eight times as fast as numpy, which widens each value. All ones in the exponent is inf or nan.
        return int((value.view(np.uint16) & 0x7FFF).max()) < 0x7C00
    return bool(np.isfinite(value).all())


def ids(name: str, value: np.ndarray, largest: int, words: str) -> None:
    """All values of an array uint8 in 0..largest, or 255; `words` name them in the message."""
    # 255 wraps to 0, so that one maximum tells.
    if value.size and (value + np.uint8(1)).max() > largest + 1:
        strange = np.unique(value[(value > largest) & (value < 255)])
        raise ValueError(f"{name}: expected {words}, got {strange[:5].tolist()}")


def within(name: str, value: np.ndarray, low: float, high: float) -> None:
    """All values in low..high, and so none of them nan."""
    if value.size and not (low <= value.min() and value.max() <= high):
        finite(name, value)
        raise ValueError(f"{name}: expected values in {low}..{high}, got {value.min():g}..{value.max():g}")


def dictionary(name: str, value: Any, keys: Sequence[str]) -> None:
    """A dict that has these keys (and perhaps others)."""
    if not isinstance(value, dict) or not set(keys) <= set(value):
        found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{name}: expected a dict with {', '.join(keys)}, got {found}")


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a finite int or float, as JSON can say it."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def numbers(name: str, value: Any, count: int, low: float, high: float) -> None:
    """A list of `count` finite numbers in low..high."""
    good = isinstance(value, list) and len(value) == count and all(is_number(v) and low <= v <= high for v in value)
    if not good:
        raise ValueError(f"{name}: expected {count} numbers in {low:g}..{high:g}, got {value!r:.80}")
