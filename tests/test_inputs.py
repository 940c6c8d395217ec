"""Reading ahead of the labelers: within a limit of bytes, whatever decoding and preparing made."""

from __future__ import annotations

import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from dataengine import inputs, modalities
from dataengine.inputs import Ahead, Inputs, size_of
from dataengine.sample import Sample
from dataengine.shards import Member


@dataclass(frozen=True)
class Crops:
    images: list[np.ndarray]


class Slotted:
    nbytes = 5000


Pair = namedtuple("Pair", "first second")


def test_the_size_of_a_value_is_that_of_all_it_holds() -> None:
    array = np.zeros(1000, np.uint8)
    for value in ([array], (array,), {"a": array}, Crops([array]), Pair(array, 1), [{"a": (Crops([array]),)}]):
        assert 1000 <= size_of(value) < 2000
    assert 3000 <= size_of([np.zeros(1000, np.uint8) for _ in range(3)]) < 3500
    assert size_of([array] * 3) < 1500
    assert size_of([Slotted()]) > 5000
    assert 1000 <= size_of(["a" * 1000, Crops]) < 4000
    endless: list[Any] = [array]
    endless.append(endless)
    assert 1000 <= size_of(endless) < 2000
    deep: list[Any] = [array]
    for _ in range(10_000):
        deep = [deep]
    assert size_of(deep) > 1000


def test_what_was_prepared_counts_for_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    rgb = modalities.load("rgb").encode(np.zeros((8, 8, 3), np.uint8))
    keys = tuple(f"{i:03d}" for i in range(64))
    given = Inputs(0, keys, {"rgb": [Member(k, "png", rgb) for k in keys]}, {}, {})
    made: set[str] = set()
    lock = threading.Lock()

    def prepare(sample: Sample) -> list[Crops]:
        with lock:
            made.add(sample.key)
        return [Crops([np.zeros(1 << 18, np.uint8) for _ in range(2)]) for _ in range(2)]

    monkeypatch.setattr(inputs, "AHEAD_BYTES", 10 << 20)
    with ThreadPoolExecutor(4) as threads:
        ahead = Ahead(given, range(64), threads, prepares={"crops": prepare})
        for row in range(64):
            values = ahead.values(row)
            assert isinstance(values, dict)
            assert len(values["crops"]) == 2
            waiting = set(ahead._futures) | set(ahead._values)
            assert len(waiting) <= 11  # of 1 MiB each, and the one that is asked for
            ahead.release(row)
        ahead.close()
    assert len(made) == 64
