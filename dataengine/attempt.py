"""One loaded labeler and what it takes to get labels out of it: batches that shrink, rows that are given up."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dataengine import pulse
from dataengine.labeler import Labeler, Loaded
from dataengine.pulse import Death, Step
from dataengine.sample import Sample
from dataengine.storage import redacted

PATIENCE = 32
"""Batches in a row that must fit before a batch that had to shrink is doubled; doubled itself each time it fails."""


BROKEN = 70
"""Exit code of a process that has lost its device."""


class DeviceBroken(RuntimeError):
    """The process has lost its device: whatever it computes from now on fails, so it must be replaced."""


class Failed(Exception):
    """A label that could not be made; the message is the reason."""


@dataclass
class Attempt:
    """A loaded labeler with its batch size. What it does with a batch depends on the batch, not on its history, unless
    memory ran out: then later batches are cut in halves too, until they have fitted for a while."""

    labeler: Labeler
    call: Loaded
    batch_size: int
    limit: int = 0
    notes: list[str] = field(default_factory=list)
    _fitted: int = 0
    _patience: int = PATIENCE
    _trying: bool = False

    def __post_init__(self) -> None:
        self.limit = self.limit or self.batch_size

    def label(
        self, shard: int, start: int, samples: Sequence[Sample | Failed], deaths: Sequence[Death]
    ) -> list[dict[str, Any] | Failed]:
        """The outputs for rows start.. of a shard, in order; a row that is Failed already stays so, uncalled."""
        now = Step(shard, self.who, start, start + len(samples))
        todo = [s for s in samples if isinstance(s, Sample)]
        if not todo:
            return [s for s in samples if isinstance(s, Failed)]
        fate = pulse.fate(deaths, now)
        if fate == "split" or len(samples) > self.limit:
            return self._halves(shard, start, samples, deaths)
        if fate != "run":
            return [Failed(fate)]
        try:
            with pulse.step(shard, self.who, start, start + len(samples)):
                outputs = self._call(todo)
        except DeviceBroken:
            raise
        except Exception as error:
            # Whatever a network throws (a bad shape, a bug on one odd image) costs the samples that cause it alone.
            if out_of_memory(error):
                return self._shrink(shard, start, samples, deaths, error)
            if len(samples) > 1:
                return self._halves(shard, start, samples, deaths)
            return self._once_more(samples[0], error)
        self._grow()
        made = iter(outputs)
        return [next(made) if isinstance(s, Sample) else s for s in samples]

    @property
    def who(self) -> str:
        """What tells it from every other labeler of a group in the record of its steps."""
        return f"{self.labeler.name} {','.join(self.labeler.emits)}"

    def _call(self, samples: list[Sample]) -> list[dict[str, Any] | Failed]:
        try:
            outputs = self.call(samples)
        except Exception as error:
            if not device_broken(error):
                raise
            if pulse.watched():
                # Still inside the step, so that whoever replaces this process knows on what it lost its device.
                os._exit(BROKEN)
            raise DeviceBroken(f"{self.labeler.name}: {error}") from error
        if len(outputs) != len(samples):
            raise ValueError(f"gave {len(outputs)} outputs for {len(samples)} samples")
        return list(outputs)

    def _halves(
        self, shard: int, start: int, samples: Sequence[Sample | Failed], deaths: Sequence[Death]
    ) -> list[dict[str, Any] | Failed]:
        half = len(samples) // 2
        first = self.label(shard, start, samples[:half], deaths)
        return first + self.label(shard, start + half, samples[half:], deaths)

    def _once_more(self, sample: Sample | Failed, error: Exception) -> list[dict[str, Any] | Failed]:
        """A single sample gets a second chance: a device or a library may fail once and not again."""
        if isinstance(sample, Sample):
            try:
                return self._call([sample])
            except DeviceBroken:
                raise
            except Exception as again:
                error = again
        return [Failed(redacted(f"{type(error).__name__}: {error}")[:300])]

    def _shrink(
        self,
        shard: int,
        start: int,
        samples: Sequence[Sample | Failed],
        deaths: Sequence[Death],
        error: Exception,
    ) -> list[dict[str, Any] | Failed]:
        if self._trying:
            self._patience *= 2  # it had just been allowed to grow: wait longer next time
        self.limit, self._fitted, self._trying = max(1, len(samples) // 2), 0, False
        self.notes.append(f"{self.labeler.name}: out of memory with {len(samples)} images, going on with {self.limit}")
        error.__traceback__ = None  # its frames hold the tensors that did not fit
        free_memory()
        if len(samples) > 1:
            return self._halves(shard, start, samples, deaths)
        return self._once_more(samples[0], error)

    def _grow(self) -> None:
        self._trying = False
        if self.limit < self.batch_size:
            self._fitted += 1
            if self._fitted >= self._patience:
                self.limit, self._fitted, self._trying = min(2 * self.limit, self.batch_size), 0, True
                self.notes.append(f"{self.labeler.name}: trying {self.limit} images at once again")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device and in any library."""
    return isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "out of memory" in str(error)


def device_broken(error: BaseException) -> bool:
    """Whether an exception means that the process cannot use its device any more."""
    if out_of_memory(error):
        return False
    text = str(error)
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in text or "CUBLAS_STATUS_NOT_INIT" in text


def free_memory() -> None:
    """Give back what the caches of libraries hold: only of those that are loaded."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
