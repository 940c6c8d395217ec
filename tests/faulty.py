"""A labeler that fails in every way a network can, on the keys it is told to; and how often it was called on which."""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataengine.labeler import Labeler, Loaded
from dataengine.sample import Sample

KINDS = ("raises", "nan", "wrong-shape", "missing", "wrong-count", "hangs", "segfaults", "cuda")


@dataclass(frozen=True, kw_only=True)
class Faulty(Labeler):
    """Depth that is the green channel; `kind` says what happens on a batch with one of `keys` in it.

    Every call leaves a line with its keys in the file `calls`. Above `fits` images it is out of memory.
    """

    inputs = ("rgb",)
    emits = ("depth",)
    batch_size = 8

    kind: str = ""
    keys: tuple[str, ...] = ()
    fits: int = 1 << 30
    calls: str = ""
    seconds: float = 0.0

    def identity(self) -> dict[str, Any]:
        # The same whatever fails, so that trees with and without faults can be compared.
        return {"labeler": self.name, "version": self.version, "settings": {}, "weights": None}

    def load(self, device: str) -> Loaded:
        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            if self.calls:
                with Path(self.calls).open("a") as stream:
                    stream.write(" ".join(s.key for s in samples) + "\n")
            time.sleep(self.seconds)
            if len(samples) > self.fits:
                raise MemoryError(f"{len(samples)} images do not fit")
            hit = [s.key in self.keys for s in samples]
            if any(hit):
                self._fail()
            outputs = [{"depth": s.rgb[..., 1].astype(np.float32) / 255} for s in samples]
            return [self._spoil(o) if h else o for o, h in zip(outputs, hit, strict=True)][
                : -1 if any(hit) and self.kind == "wrong-count" else None
            ]

        return run

    def _fail(self) -> None:
        if self.kind == "raises":
            raise RuntimeError("cannot label this")
        if self.kind == "hangs":
            time.sleep(3600)
        if self.kind == "segfaults":
            ctypes.string_at(0)
        if self.kind == "cuda":
            raise RuntimeError("CUDA error: device-side assert triggered")

    def _spoil(self, output: dict[str, Any]) -> dict[str, Any]:
        if self.kind == "nan":
            return {"depth": np.full_like(output["depth"], np.nan)}
        if self.kind == "wrong-shape":
            return {"depth": output["depth"][:3]}
        return {} if self.kind == "missing" else output


def called(path: Path) -> Counter[str]:
    """How often each key was in a call."""
    return Counter(key for line in path.read_text().splitlines() for key in line.split())
