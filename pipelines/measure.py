"""What one labeler costs on one device: loaded, warmed up, and given steady batches of growing size."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil
from threadpoolctl import threadpool_limits

from dataengine import modalities
from dataengine.attempt import free_memory, out_of_memory
from dataengine.labeler import Labeler, Loaded
from dataengine.measured import WORTH, Batch, Measured
from dataengine.sample import Sample

MAX_BATCH = 256
MAX_MEMORY = 0.8
"""Growing ends when a batch takes this part of the device's memory, or this many seconds."""
MAX_SECONDS = 10.0
STEADY_SECONDS = 0.5
"""Batches of one size go on this long, or for three batches, whichever ends first."""


class Memory(Protocol):
    """The memory of a device, in bytes."""

    total: int

    def used(self) -> int:
        """What this process holds now, once all that was asked of the device is done."""
        ...

    def restart(self) -> None:
        """Forget the peak so far."""
        ...

    def peak(self) -> int:
        """The most it held since `restart`."""
        ...


class _Host:
    """Resident memory of this process: rough, since what a library frees may stay resident."""

    def __init__(self) -> None:
        self.total = int(psutil.virtual_memory().total)

    def used(self) -> int:
        return int(psutil.Process().memory_info().rss)

    def restart(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # The peak is then that of the whole process, an upper bound.

    def peak(self) -> int:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return self.used()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


class _Gpu:
    """What torch holds of one GPU; a labeler that does not use torch has no GPU memory that could be seen."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.total = int(self._cuda().get_device_properties(device).total_memory)

    def _cuda(self) -> Any:
        import torch

        return torch.cuda

    def used(self) -> int:
        self._cuda().synchronize(self._device)
        return int(self._cuda().memory_allocated(self._device))

    def restart(self) -> None:
        # From empty caches on, what the allocator reserves is what batches of this size need, gaps included.
        free_memory()
        self._cuda().reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        self._cuda().synchronize(self._device)
        return int(self._cuda().max_memory_reserved(self._device))


def memory_of(device: str) -> Memory:
    """The memory that labelers on a torch device take."""
    return _Gpu(device) if device.startswith("cuda") else _Host()


@functools.cache
def device_name(device: str) -> str:
    """The kind of a torch device: the name of the GPU, or the processor's model and how many of it there are."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} threads"


def measure(labeler: Labeler, samples: Sequence[Sample], device: str) -> Measured:
    """What a labeler costs on these images, in this process; running out of memory ends the growth of its batches.

    ValueError when it can label none of the images, or when one alone does not fit in memory.
    """
    return measure_and_label(labeler, samples, device)[0]


def measure_and_label(
    labeler: Labeler,
    samples: Sequence[Sample],
    device: str,
    memory: Memory | None = None,
    loaded: Callable[[Loaded], None] | None = None,
) -> tuple[Measured, list[dict[str, Any]]]:
    """The measurement, and the outputs for the samples; an empty dict for one that could not be labelled.

    `loaded` gets to see the loaded labeler once it is warm, before its batches are measured.
    """
    memory = memory or memory_of(device)
    before, began = memory.used(), time.perf_counter()
    with threadpool_limits(limits=1):
        call = labeler.load(device)
        weights, load_seconds = max(memory.used() - before, 0), time.perf_counter() - began
        began = time.perf_counter()
        outputs = _outputs(labeler, call, samples)
        good = [s for s, output in zip(samples, outputs, strict=True) if output]
        warmup = (time.perf_counter() - began) / len(samples)
        if loaded is not None:
            loaded(call)
        batches, full_at = _grow(call, good, memory)
        busy = _busy(call, _batch(good, batches[-1].size), batches[-1].seconds, device)
        sizes, encode_seconds = _encoded(labeler, [o for o in outputs if o])
    seen = Measured(
        labeler=labeler.name,
        device=device_name(device),
        load_seconds=load_seconds,
        warmup_seconds=warmup,
        weights_bytes=weights,
        device_bytes=memory.total,
        batches=tuple(batches),
        pixels=pixels(samples),
        gpu=device.startswith("cuda"),
        encode_seconds=encode_seconds,
        bytes_out=sizes,
        busy=busy,
        full_at=full_at,
    )
    return seen, outputs


def _outputs(labeler: Labeler, call: Loaded, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One call a sample, which warms up and tells which can be labelled; ValueError when none can."""
    outputs: list[dict[str, Any]] = []
    why = ""
    for sample in samples:
        try:
            output = call([sample])[0]
            for m in labeler.emits:
                modalities.load(m).check(output[m], sample.size)
        except Exception as error:
            # Labelers fail on some images; the run records them, the measurement goes on with the others.
            output, why = {}, f"{type(error).__name__}: {error}"
        outputs.append(output)
    if not any(outputs):
        raise ValueError(f"{labeler.name}: none of {len(samples)} images could be labelled: {why}")
    return outputs


def _grow(call: Loaded, samples: Sequence[Sample], memory: Memory) -> tuple[list[Batch], int | None]:
    """Batches of 1, 2, 4 ... images, and the size at which memory ran out, if it did."""
    found: list[Batch] = []
    size, full_at = 1, None
    while size <= MAX_BATCH:
        batch = _batch(samples, size)
        memory.restart()
        before = memory.used()
        try:
            steady = _steady(call, batch)
        except _Full as error:
            if not found:
                raise ValueError(f"out of memory with one image: {error}") from error
            full_at = size
            free_memory()
            break
        peak = max(memory.peak() - before, 0)
        found.append(dataclasses.replace(steady, peak_bytes=peak))
        slower = len(found) > 1 and steady.images_per_second < WORTH * found[-2].images_per_second
        if slower or before + peak > MAX_MEMORY * memory.total or 2 * steady.seconds > MAX_SECONDS:
            break
        size *= 2
    return found, full_at


def _batch(samples: Sequence[Sample], size: int) -> list[Sample]:
    return [samples[i % len(samples)] for i in range(size)]


def _steady(call: Loaded, batch: Sequence[Sample]) -> Batch:
    """The mean of some batches after one that does not count (it shapes caches and chooses algorithms)."""
    began = time.perf_counter()
    _tolerant(call, batch)
    # A batch that takes seconds owes none of them to warming up.
    once = time.perf_counter() - began < MAX_SECONDS / 4
    count, cpu, began = 0, time.process_time(), time.perf_counter()
    while count < 1 or (once and count < 3 and time.perf_counter() - began < STEADY_SECONDS):
        _tolerant(call, batch)
        count += 1
    spent = max(time.perf_counter() - began, 1e-9) / count
    return Batch(size=len(batch), seconds=spent, cpu_seconds=(time.process_time() - cpu) / count)


class _Full(Exception):
    """Memory has run out."""


def _tolerant(call: Loaded, batch: Sequence[Sample]) -> None:
    try:
        call(batch)
    except Exception as error:
        # Anything else that a labeler throws now and then is the run's to record, and costs about as much time.
        if out_of_memory(error):
            raise _Full(str(error)) from error


def _busy(call: Loaded, batch: Sequence[Sample], seconds: float, device: str) -> float | None:
    """The share of a steady batch in which the GPU computes: its kernels' time as the profiler sees it."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda"):
        return None
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call(batch)
            torch.cuda.synchronize(device)
        events = profile.key_averages()
    except RuntimeError:
        return None  # A machine that does not let its GPU be profiled.
    kernels = sum(e.self_device_time_total for e in events if str(e.device_type).endswith("CUDA"))
    return min(kernels * 1e-6 / seconds, 1.0) if kernels else None


def _encoded(labeler: Labeler, outputs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], float]:
    """Encoded bytes an image by modality, and the CPU seconds an image that encoding takes."""
    began = time.thread_time()
    sizes = {
        m: sum(len(modalities.load(m).encode(o[m])) for o in outputs if m in o) / len(outputs) for m in labeler.emits
    }
    return sizes, (time.thread_time() - began) / len(outputs)


def pixels(samples: Sequence[Sample]) -> float:
    """Mean pixels of an image."""
    return sum(s.size[0] * s.size[1] for s in samples) / max(len(samples), 1)
