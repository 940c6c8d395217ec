"""How fast a training runs: samples, tokens and operations a second, waiting for data, memory.

Nothing here waits for the device: the loop waits for it once a step, and times are taken around that.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

PREFIX = "run/"
"""Of the names of measured figures, which differ from run to run."""

# Dense operations a second, by the start of the device's name as torch gives it: bfloat16 and float16 with sums in
# float32, and float32 without TF32; of NVIDIA's data sheets. The longest start counts.
_PEAKS = {
    "NVIDIA A100": (312e12, 19.5e12),
    "NVIDIA H100": (989.4e12, 66.9e12),
    "NVIDIA H100 PCIe": (756e12, 51e12),
    "NVIDIA H100 NVL": (835e12, 60e12),
    "NVIDIA H200": (989.4e12, 66.9e12),
    "NVIDIA H200 NVL": (835e12, 60e12),
    "NVIDIA B200": (2250e12, 75e12),
    "NVIDIA L40S": (362e12, 91.6e12),
    "NVIDIA GeForce RTX 4090": (165.2e12, 82.6e12),
}


class Work(NamedTuple):
    """What a batch is: samples, real tokens, tokens as budgets count them, operations of forward and backward."""

    samples: int
    tokens: int
    slots: int
    flops: float


WorkOf = Callable[[Any], Work]


def peak_flops(device: str, dtype: torch.dtype) -> float | None:
    """Dense operations a second that a device of that name can do at most, None where that is not known."""
    found = [name for name in _PEAKS if device.startswith(name)]
    if not found:
        return None
    half, single = _PEAKS[max(found, key=len)]
    return single if dtype == torch.float32 else half


class Taken(NamedTuple):
    """What one process did since the last log line, in seconds and the sums of `Work`; and its peak memory, bytes."""

    seconds: float
    waited: float
    work: Work | None
    memory: int


@dataclass
class Meter:
    """Measures the steps of one process; what is between steps (evaluation, checkpoints) does not count."""

    device: torch.device
    dtype: torch.dtype
    peak: float | None = None

    def __post_init__(self) -> None:
        if self.peak is None and self.device.type == "cuda":
            self.peak = peak_flops(torch.cuda.get_device_name(self.device), self.dtype)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._seconds = self._waited = 0.0
        self._work: list[Work] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around all of a step, waiting for its batches included."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for batches."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def add(self, batches: Sequence[Work | None]) -> None:
        """Count what the batches of a step are."""
        self._work += [work for work in batches if work is not None]

    def take(self) -> Taken:
        """What was measured since the last call."""
        work = Work(*(sum(column) for column in zip(*self._work, strict=True))) if self._work else None
        taken = Taken(self._seconds, self._waited, work, self._memory())
        self._seconds = self._waited = 0.0
        self._work = []
        return taken

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def figures(self, taken: Sequence[Taken]) -> dict[str, float]:
        """The figures of a log line from what all processes did.

        samples, tokens (real ones), slots (as budgets count them) and flops a second, all processes together; mfu: the
        share of what the devices could do at most; data_wait: the share of the time that the process that waited most
        waited for batches; memory_gb: the peak of the process with the most, on the device, or of a CPU's process.
        """
        seconds = max(part.seconds for part in taken)
        if not seconds:
            return {}
        out = {
            "data_wait": max(part.waited / part.seconds for part in taken if part.seconds),
            "memory_gb": max(part.memory for part in taken) / 1e9,
        }
        work = [part.work for part in taken if part.work is not None]
        if work:
            samples, tokens, slots, flops = (sum(column) / seconds for column in zip(*work, strict=True))
            out |= {"samples_per_s": samples, "tokens_per_s": tokens, "slots_per_s": slots}
            if flops:
                out["tflops_per_s"] = flops / 1e12
                if self.peak is not None:
                    out["mfu"] = flops / (self.peak * len(taken))
        return {PREFIX + name: float(f"{value:.4g}") for name, value in out.items()}
