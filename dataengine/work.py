"""The unit of work: one group of labelers over one shard. Reads, labels and writes; only a small report comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from dataengine.labeler import Labeler
from dataengine.pulse import Death


@dataclass(frozen=True)
class Task:
    """What a worker is asked to do: the wanted cells of one shard, and the identity each will be committed under."""

    shard: int
    specs: dict[str, str]
    rows: tuple[int, int] | None = None
    """None: the whole shard, committed at the end; else only rows start..stop, left in staging for who commits."""
    deaths: tuple[Death, ...] = ()
    """The processes that earlier attempts at it have ended, and on what."""


@dataclass(frozen=True)
class CellReport:
    """What became of one cell."""

    modality: str
    num_samples: int
    num_invalid: int
    num_bytes: int
    seconds: float
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What became of one task: small, the only thing that crosses a process border."""

    shard: int
    cells: tuple[CellReport, ...]
    seconds: float
    num_refused: int = 0
    rows: tuple[int, int] | None = None
    outcome: Literal["done", "busy", "drained"] = "done"
    """`busy`: another run holds the shard, nothing was done; `drained`: told to stop, finished rows are in staging."""
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds by what they went to: `read`, `decode`, `label:<labeler>`, `encode`, `commit`, `wait`."""
    notes: tuple[str, ...] = ()
    """What an operator should know: a batch that had to shrink, a process that died and on what."""

    @staticmethod
    def of(values: Mapping[str, Any]) -> Report:
        """The report whose fields these are, as an event carries them."""
        cells = tuple(c if isinstance(c, CellReport) else CellReport(**c) for c in values["cells"])
        return Report(**{**values, "cells": cells})


class Unfinished(RuntimeError):
    """Some tasks could not be done; all others are. `failed` maps (stage, shard) to the reason."""

    def __init__(self, failed: Mapping[tuple[str, int], str]) -> None:
        super().__init__(dict(failed))
        self.failed = dict(failed)

    def __str__(self) -> str:
        """How many, and the first few by name."""
        shown = "; ".join(f"{stage} of shard {shard}: {why}" for (stage, shard), why in list(self.failed.items())[:3])
        return f"{len(self.failed)} tasks could not be done: {shown}"


class Stopped(RuntimeError):
    """A signal stopped the run in good order."""


Work = Callable[[Task], Report]


class Worker(Protocol):
    """Something that can be started in any process and then runs tasks; it travels there as a pickle."""

    def start(self, device: str) -> Work:
        """Load what is needed onto a device and return the function that runs one task."""
        ...


@dataclass(frozen=True)
class LabelGroup:
    """Labelers that share a process, in an order in which each finds its inputs; their images are decoded once."""

    root: str
    labelers: tuple[Labeler, ...]
    batches: Mapping[str, int] = field(default_factory=dict)
    """Batch sizes by labeler name; a labeler that is not named keeps its own."""
    threads: int = 2
    """Threads that decode and encode beside the labelers."""
    lease_seconds: float = 60.0
    """Silence after which another worker may take a shard over."""
    flush_seconds: float = 20.0
    """How often finished rows are left in staging: what a worker that disappears loses at most, with one batch."""
    spool: str = ""
    """A folder of this machine where every finished batch is left at once, for the process that replaces this one."""

    def start(self, device: str) -> Work:
        """Load every labeler of the group."""
        from dataengine.labelling import Labelling

        return Labelling(
            self.root,
            self.labelers,
            self.batches,
            device,
            threads=self.threads,
            lease_seconds=self.lease_seconds,
            flush_seconds=self.flush_seconds,
            spool=self.spool,
        )
