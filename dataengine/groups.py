"""Labelers that share a process: what they cost, what a recipe may fix about them, and how they will run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dataengine.labeler import Labeler
from dataengine.measured import Measured

GUESS_SECONDS = 0.05
"""Per image, of a labeler that was not measured."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Labelers that a recipe wants in one process of their own; what is None is the engine's to choose."""

    labelers: tuple[str, ...]
    num_gpus: float | None = None
    num_cpus: float | None = None
    max_workers: int | None = None
    batches: Mapping[str, int] = field(default_factory=dict)
    """Batch sizes by labeler, where they are not the labeler's own."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine: its cores, its GPUs, the bytes of each GPU and of its own memory (0: not known)."""

    cpus: float
    gpus: float = 0.0
    gpu_bytes: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What packing must know of a labeler, at the batch size it will run with; seconds are per image."""

    labeler: str
    inputs: tuple[str, ...]
    emits: tuple[str, ...]
    seconds: float
    """Of one worker: the network, and on a CPU the encoding too."""
    cpu_seconds: float
    gpu: bool = False
    busy: float = 1.0
    """Share of `seconds` in which the GPU computes."""
    weights_bytes: int = 0
    peak_bytes: int = 0
    batch: int = 1
    measured: bool = True


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One group as it will run, and why: what each worker asks for, and how many workers there are at first."""

    labelers: tuple[str, ...]
    num_cpus: float
    num_gpus: float
    workers: int
    seconds: float
    """Per image, of one worker."""
    memory_bytes: int
    """Of the GPU (of the machine, without one), of one worker."""
    batches: Mapping[str, int]
    needs: tuple[str, ...] = ()
    """Groups whose cells of a shard must be there first."""
    max_workers: int | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """The first labeler, and how many more there are: unique, as no labeler is in two groups."""
        return self.labelers[0] + (f"+{len(self.labelers) - 1}" if len(self.labelers) > 1 else "")

    @property
    def images_per_second(self) -> float:
        """Of all its workers."""
        return self.workers / self.seconds


@dataclass(frozen=True)
class Packing:
    """Groups in an order in which each comes after those it needs. `at_once`: whether all of them fit together."""

    groups: tuple[Packed, ...]
    at_once: bool = True

    @property
    def images_per_second(self) -> float:
        """Of the whole: the slowest group's, or that of groups which take turns."""
        if not self.groups:
            return 0.0
        if self.at_once:
            return min(g.images_per_second for g in self.groups)
        return 1 / sum(1 / g.images_per_second for g in self.groups)


def names(labelers: Sequence[Labeler]) -> tuple[str, ...]:
    """A name for each labeler: its own, numbered where the same one is there with other settings."""
    out: list[str] = []
    for labeler in labelers:
        same = sum(other.partition("#")[0] == labeler.name for other in out)
        out.append(f"{labeler.name}#{same + 1}" if same else labeler.name)
    return tuple(out)


def cost(name: str, labeler: Labeler, seen: Measured | None, batch: int, gpu: bool) -> Cost:
    """What a labeler costs, as it was measured (see `Measured`), else a guess that only says that it is there."""
    own = Cost(
        labeler=name,
        inputs=labeler.inputs,
        emits=labeler.emits,
        seconds=GUESS_SECONDS,
        cpu_seconds=GUESS_SECONDS,
        gpu=gpu and labeler.gpus > 0,
        batch=batch,
        measured=False,
    )
    if seen is None:
        return own
    steady = seen.at(batch)
    return replace(
        own,
        seconds=steady.seconds / batch + (0.0 if own.gpu else seen.encode_seconds),
        cpu_seconds=steady.cpu_seconds / batch + seen.encode_seconds,
        busy=1.0 if seen.busy is None else seen.busy,
        weights_bytes=seen.weights_bytes,
        peak_bytes=steady.peak_bytes,
        measured=True,
    )
