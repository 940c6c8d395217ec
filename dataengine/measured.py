"""What a labeler was seen to cost on one kind of device: plain numbers, kept as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

WORTH = 1.05
"""A larger batch must raise the throughput by this factor to be worth its memory."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Steady batches of one size: seconds for the whole batch, bytes of device memory above the weights."""

    size: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int = 0

    @property
    def images_per_second(self) -> float:
        """Throughput of the labeler alone."""
        return self.size / self.seconds


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One labeler on one device, alone in one process: `batches` ascend in size and are at least one.

    Bytes are of the GPU, or of the process's resident memory on a CPU, where they are rough. `pixels` is the mean size
    of the images it was measured on. `busy` is the share of a steady batch in which the GPU computed, None on a CPU.
    `full_at` is the batch size at which memory ran out, None when it never did.
    """

    labeler: str
    device: str
    load_seconds: float
    warmup_seconds: float
    weights_bytes: int
    device_bytes: int
    batches: tuple[Batch, ...]
    pixels: float
    gpu: bool = False
    encode_seconds: float = 0.0
    """CPU seconds an image to encode what it emits."""
    decode_seconds: float = 0.0
    """Seconds an image to decode what it reads."""
    bytes_out: Mapping[str, float] = field(default_factory=dict)
    """Encoded bytes an image, by modality."""
    busy: float | None = None
    full_at: int | None = None

    def __post_init__(self) -> None:
        sizes = [b.size for b in self.batches]
        if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1:
            raise ValueError(f"{self.labeler}: expected batch sizes that ascend, got {sizes}")

    def at(self, batch: int) -> Batch:
        """What a batch of this size costs: measured, or scaled from the nearest size that was."""
        near = max((b for b in self.batches if b.size <= batch), key=lambda b: b.size, default=self.batches[0])
        scale = batch / near.size
        return Batch(
            size=batch,
            seconds=near.seconds * scale,
            cpu_seconds=near.cpu_seconds * scale,
            peak_bytes=round(near.peak_bytes * scale),
        )

    def best_batch(self, default: int) -> int:
        """The labeler's own batch size, unless a larger one was seen to be faster or its own not to fit in memory."""
        if self.full_at is not None and self.full_at <= default:
            return self.batches[-1].size
        larger = [b for b in self.batches if b.size > default]
        fastest = max((b.images_per_second for b in larger), default=0.0)
        if fastest < WORTH * self.at(default).images_per_second:
            return default
        # The smallest one that is about as fast as the fastest: memory is what several labelers share.
        return next(b.size for b in larger if b.images_per_second * WORTH >= fastest)

    def as_json(self) -> str:
        """The numbers as text, for a cache or a wire."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def from_json(text: str) -> Measured:
    """The numbers that `as_json` wrote; ValueError when the text is anything else."""
    try:
        values = json.loads(text)
        return Measured(**{**values, "batches": tuple(Batch(**b) for b in values["batches"])})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"expected the record of a measurement, got {text[:80]!r}: {error}") from error
