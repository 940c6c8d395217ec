"""The labelling loop of a worker: read a shard, decode ahead, run every labeler of the group, encode behind, commit.

The thread that runs a task does nothing but call the labelers; decoding runs ahead of it and encoding behind it in
other threads, and the next task reads and decodes while this one labels, or labels while this one is committed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from threadpoolctl import ThreadpoolController

from dataengine import modalities, provenance, pulse, shards
from dataengine.attempt import Attempt, Failed
from dataengine.inputs import Ahead, Inputs
from dataengine.labeler import Labeler, Staged
from dataengine.leases import LeaseLost, Leases
from dataengine.manifest import Commit, Conflict, Dataset, Published, tar_path
from dataengine.sample import Sample
from dataengine.staging import Row, Rows, Spool, Staging
from dataengine.work import CellReport, Report, Task

BEHIND = 2
"""Batches of one labeler that may be waiting to be encoded: what a dead process loses, and what bounds memory."""


class Labelling:
    """The labelers of a group with their weights loaded; runs tasks, two at a time if asked to."""

    def __init__(
        self,
        root: str,
        labelers: Sequence[Labeler],
        batches: Mapping[str, int],
        device: str,
        *,
        threads: int,
        lease_seconds: float,
        flush_seconds: float,
        spool: str,
    ) -> None:
        self.dataset = Dataset(root)
        self.attempts = [Attempt(x, x.load(device), batches.get(x.name, x.batch_size)) for x in labelers]
        # Once: to know its weights, a labeler may hash gigabytes.
        parts = {c: a.labeler.of_column(c) for a in self.attempts for c in a.labeler.emits}
        self.origins = {c: provenance.of_labeler(part) for c, part in parts.items()}
        self.random = {c: part.random for c, part in parts.items()}
        self.one_thread = _OneThread()
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="codec", initializer=self.one_thread)
        self.leases = Leases(self.dataset.store, lease_seconds)
        self.staging = Staging(self.dataset.store)
        self.spool: Rows | None = Spool(Path(spool)) if spool else None
        self.flush_seconds = flush_seconds
        self.device = threading.Lock()
        self.draining = threading.Event()

    def __call__(self, task: Task) -> Report:
        """Run one task; its cells are committed, or its rows are in staging, when this returns `done`."""
        self.one_thread()
        began = time.perf_counter()
        if self.draining.is_set():
            return Report(task.shard, (), 0.0, rows=task.rows, outcome="drained")
        lease = self.leases.take(task.shard, task.specs, task.rows)
        if lease is None:
            return Report(task.shard, (), time.perf_counter() - began, rows=task.rows, outcome="busy")
        with lease:
            try:
                return _Shard(self, task, lease.check).run(began)
            except LeaseLost as lost:
                return Report(task.shard, (), time.perf_counter() - began, 0, task.rows, "busy", notes=(str(lost),))

    def drain(self) -> None:
        """Finish the batches at hand, leave what is done in staging, release the leases; tasks end as `drained`."""
        self.draining.set()


class _OneThread:
    """Computation with one thread, in every thread that calls this.

    Sums that a matrix product splits over threads round differently, and the bytes must not depend on how many cores
    a machine has. OpenMP keeps the number for each thread, so each must say it; once, for finding the libraries takes
    milliseconds. Made after the labelers, and so their libraries, are loaded.
    """

    def __init__(self) -> None:
        self._libraries = ThreadpoolController()
        self._said = threading.local()

    def __call__(self) -> None:
        if not getattr(self._said, "one", False):
            self._libraries.limit(limits=1)
            self._said.one = True


@dataclass
class _Column:
    """A cell in the making: the rows that are encoded, and those that are not in staging yet."""

    attempt: Attempt
    rows: dict[int, Row] = field(default_factory=dict)
    unsaved: dict[int, Row] = field(default_factory=dict)
    seconds: float = 0.0


class _Shard:
    """One task under way."""

    def __init__(self, group: Labelling, task: Task, still_ours: Callable[[], None]) -> None:
        self.group, self.task, self.still_ours = group, task, still_ours
        self.dataset = group.dataset
        self.spent: dict[str, float] = {}
        self.notes: list[str] = []
        self.saved = False
        self.behind: deque[tuple[str, Future[dict[int, Row]]]] = deque()
        self.saved_at = time.monotonic()

    def run(self, began: float) -> Report:
        task = self.task
        # Somebody else may have committed cells since this task was planned.
        specs = {c: s for c, s in task.specs.items() if not self._committed(c, s)}
        active = [a for a in self.group.attempts if set(a.labeler.emits) & set(specs)]
        columns = {c: _Column(a) for a in active for c in a.labeler.emits if c in specs}
        notes = [(a, len(a.notes)) for a in active]
        drained = staged = False
        if active:
            with self._timed("read"):
                names = sorted({"rgb", *(m for a in active for m in a.labeler.inputs)} - set(columns))
                inputs = Inputs.read(self.dataset, task.shard, names, self.group.threads)
                start, stop = _rows(task, len(inputs.keys), [a.batch_size for a in active])
                staged = self._take_up(columns, specs, start, stop)
            drained = not self._label(active, columns, inputs, start, stop)
        if drained or task.rows is not None:
            self._save(columns)
            reports = tuple(self._counted(c, column, 0) for c, column in columns.items())
        else:
            self.still_ours()
            with self._timed("commit"):
                reports = self._commit(active, columns, specs, inputs.random if active else {})
            if staged or self.saved:
                for c in columns:
                    self.group.staging.clear(c, task.shard)
        return Report(
            task.shard,
            reports,
            time.perf_counter() - began,
            rows=task.rows,
            outcome="drained" if drained else "done",
            spent={k: round(v, 6) for k, v in self.spent.items()},
            notes=(*self.notes, *(note for a, seen in notes for note in a.notes[seen:])),
        )

    def _committed(self, column: str, spec: str) -> bool:
        there = self.dataset.commit(column, self.task.shard)
        if there is not None and there.spec != spec:
            raise Conflict(f"{there.file} was committed with another identity since this run was planned")
        return there is not None

    def _take_up(self, columns: Mapping[str, _Column], specs: Mapping[str, str], start: int, stop: int) -> bool:
        """Take up the rows that an earlier attempt, or a worker with other rows of this shard, has finished.

        Whether there were any in staging, which must then be cleared.
        """
        asked = [(store, c) for store in (self.group.staging, self.group.spool) if store is not None for c in columns]
        loads = self.group.threads.map(lambda a: a[0].load(a[1], self.task.shard, specs[a[1]]), asked)
        staged = False
        for (store, c), found in zip(asked, loads, strict=True):
            columns[c].rows |= {i: row for i, row in found.items() if start <= i < stop}
            staged |= bool(found) and store is self.group.staging
        return staged

    # -- labelling ----------------------------------------------------------------------------------------------------

    def _label(
        self, active: Sequence[Attempt], columns: dict[str, _Column], inputs: Inputs, start: int, stop: int
    ) -> bool:
        """Run every labeler over the rows that are not done; False when told to drain before the end."""
        todo = {a.who: self._undone(a, columns, start, stop) for a in active}
        rows = sorted({i for batches in todo.values() for a, b in batches for i in range(a, b)})
        cautious = any(d.step.shard == self.task.shard for d in self.task.deaths)
        prepares = {
            a.who: a.call.prepare
            for a in active
            if isinstance(a.call, Staged) and not set(a.labeler.inputs) & set(columns)
        }
        ahead = Ahead(inputs, rows, self.group.threads, self.task.deaths if cautious else None, prepares)
        reach = max(a.batch_size for a in active)
        with self._timed("wait"):
            self.group.device.acquire()
        try:
            for end in [*range(start + reach, stop, reach), stop]:
                for a in active:
                    batches, makers = todo[a.who], [b for b in active if set(b.labeler.emits) & set(a.labeler.inputs)]
                    made = min((todo[b.who][0][0] for b in makers if todo[b.who]), default=stop)
                    # Each labeler is fed its own batches, counted from the start of the shard, whoever else is in the
                    # group: a batch of other images may round differently, and a resumed shard must give the same.
                    while batches and batches[0][1] <= min(end, made):
                        if self.group.draining.is_set():
                            return False
                        self._batch(a, columns, ahead, *batches.popleft(), cautious)
                ahead.release(min([b[0][0] for b in todo.values() if b], default=stop))
                if time.monotonic() - self.saved_at > self.group.flush_seconds:
                    self._save(columns)
        finally:
            self.group.device.release()
            ahead.close()
        with self._timed("encode"):
            self._settle(columns, 0)
        return True

    def _undone(
        self, attempt: Attempt, columns: Mapping[str, _Column], start: int, stop: int
    ) -> deque[tuple[int, int]]:
        """The batches of a labeler of which some row of some column is not done."""
        size, made = attempt.batch_size, [columns[c].rows for c in attempt.labeler.emits if c in columns]
        ranges = ((i, min(i + size, stop)) for i in range(start - start % size, stop, size))
        return deque((a, b) for a, b in ranges if any(i not in rows for rows in made for i in range(a, b)))

    def _batch(
        self,
        attempt: Attempt,
        columns: dict[str, _Column],
        ahead: Ahead,
        start: int,
        stop: int,
        cautious: bool,
    ) -> None:
        labeler = attempt.labeler
        began = time.perf_counter()
        with self._timed("decode"):
            values = [ahead.values(i) for i in range(start, stop)]
        with self._timed("encode"):
            samples = [
                self._sample(attempt, columns, ahead, i, v) for i, v in zip(range(start, stop), values, strict=True)
            ]
        with self._timed(f"label:{labeler.name}"):
            outputs = attempt.label(self.task.shard, start, samples, self.task.deaths)
        sizes = [v["rgb"].shape[:2] if isinstance(v, dict) else (1, 1) for v in values]
        emitted = [c for c in labeler.emits if c in columns]
        for c in emitted:
            job = self.group.threads.submit(
                self._encode, c, start, [ahead.inputs.keys[i] for i in range(start, stop)], outputs, sizes
            )
            self.behind.append((c, job))
            if cautious:
                # After a death nothing runs beside the labeler: the step that is blamed must be the one that did it.
                with pulse.step(self.task.shard, attempt.who, start, stop):
                    job.result()
        with self._timed("encode"):
            self._settle(columns, BEHIND * max(len(emitted), 1))
        for c in emitted:
            columns[c].seconds += (time.perf_counter() - began) / len(emitted)

    def _sample(
        self, attempt: Attempt, columns: Mapping[str, _Column], ahead: Ahead, row: int, values: dict[str, Any] | Failed
    ) -> Sample | Failed:
        """What a labeler gets to see of a row, or why it cannot be labelled."""
        if isinstance(values, Failed):
            return values
        key, labeler = ahead.inputs.keys[row], attempt.labeler
        made = {m: columns[m] for m in labeler.inputs if m in columns}
        if made:
            self._settle(columns, 0)
        bad = [m for m in labeler.inputs if (m in made and made[m].rows[row].invalid) or key in ahead.inputs.bad(m)]
        if bad:
            # The same words as when the input failed in an earlier run: the bytes of the record must not tell.
            return Failed(f"input {bad[0]} is not valid")
        # The next labeler of the group must see what a later run would read back from the tar.
        fresh = {m: modalities.load(m).decode(column.rows[row].member.data) for m, column in made.items()}
        seen = {m: fresh.get(m, values.get(m)) for m in {"rgb", *labeler.inputs}}
        return Sample(key, seen, values.get(attempt.who))

    # -- encoding -----------------------------------------------------------------------------------------------------

    def _encode(
        self,
        column: str,
        start: int,
        keys: Sequence[str],
        outputs: Sequence[dict[str, Any] | Failed],
        sizes: Sequence[tuple[int, int]],
    ) -> dict[int, Row]:
        """Check and encode one column of a batch, in an encoder thread; and leave it where it outlives the process."""
        codec = modalities.load(column)
        rows = {}
        for i, (key, output, size) in enumerate(zip(keys, outputs, sizes, strict=True)):
            value = _checked(codec, column, output, size)
            why = str(value) if isinstance(value, Failed) else None
            data = codec.encode(codec.placeholder(size) if isinstance(value, Failed) else value)
            rows[start + i] = Row(shards.Member(key, codec.suffix, data), why)
        if self.group.spool is not None:
            self.group.spool.save(column, self.task.shard, self.task.specs[column], rows)
        return rows

    def _settle(self, columns: Mapping[str, _Column], left: int) -> None:
        """Take in what the encoders have finished, until no more than `left` jobs are under way."""
        while len(self.behind) > left or (self.behind and self.behind[0][1].done()):
            c, job = self.behind.popleft()
            for i, row in job.result().items():
                if i not in columns[c].rows:
                    columns[c].rows[i] = columns[c].unsaved[i] = row

    def _save(self, columns: Mapping[str, _Column]) -> None:
        """Leave in staging what is finished and not there yet: a worker that dies now loses nothing before this."""
        with self._timed("stage"):
            self._settle(columns, 0)
            for c, column in columns.items():
                self.group.staging.save(c, self.task.shard, self.task.specs[c], column.unsaved)
                column.unsaved = {}
        self.saved, self.saved_at = True, time.monotonic()

    # -- committing ---------------------------------------------------------------------------------------------------

    def _commit(
        self,
        active: Sequence[Attempt],
        columns: Mapping[str, _Column],
        specs: Mapping[str, str],
        random: Mapping[str, bool],
    ) -> tuple[CellReport, ...]:
        found = dict(random)
        for a in active:
            made = any(found[m] for m in a.labeler.inputs if m in found)
            found |= {c: made or self.group.random[c] for c in a.labeler.emits}
        reports = list(
            self.group.threads.map(lambda c: self._publish(c, columns[c], specs[c], found[c]), list(columns))
        )
        if self.group.spool is not None:
            for c in columns:
                self.group.spool.clear(c, self.task.shard)
        return tuple(reports)

    def _publish(self, name: str, column: _Column, spec: str, random: bool) -> CellReport:
        ordered = [column.rows[i] for i in sorted(column.rows)]
        data = shards.tar_parts(row.member for row in ordered)
        invalid = {row.member.key: row.invalid for row in ordered if row.invalid is not None}
        record = Commit(
            modality=name,
            shard=self.task.shard,
            spec=spec,
            file=tar_path(name, self.task.shard),
            num_bytes=sum(map(len, data)),
            sha256=shards.sha256(data),
            num_samples=len(ordered),
            keys_sha256=shards.keys_sha256(row.member.key for row in ordered),
            invalid=dict(sorted(invalid.items())),
            provenance=self.group.origins[name] | {"random": random},
        )
        if self.dataset.publish(record, data) is Published.DIFFERS:
            self.notes.append(f"{name}: another run committed other bytes of the same identity, which are kept")
        return self._counted(name, column, record.num_bytes)

    def _counted(self, name: str, column: _Column, num_bytes: int) -> CellReport:
        reasons: dict[str, int] = {}
        for row in column.rows.values():
            if row.invalid is not None:
                reasons[row.invalid] = reasons.get(row.invalid, 0) + 1
        return CellReport(name, len(column.rows), sum(reasons.values()), num_bytes, column.seconds, reasons)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - began


def _rows(task: Task, count: int, sizes: Sequence[int]) -> tuple[int, int]:
    """The rows of a task; ValueError when they would cut a batch, for then other bytes could come out."""
    start, stop = task.rows or (0, count)
    if not 0 <= start <= stop <= count or any(start % size or (stop % size and stop != count) for size in sizes):
        raise ValueError(f"rows {start}..{stop} of {count} in shard {task.shard}: they cut batches of {sizes}")
    return start, stop


def _checked(codec: modalities.Modality, column: str, output: dict[str, Any] | Failed, size: tuple[int, int]) -> Any:
    """The value of one column, or the failure that it is: missing, or not what its modality allows."""
    if isinstance(output, Failed):
        return output
    if column not in output:
        return Failed(f"gave no {column}")
    if isinstance(output[column], Failed):
        return output[column]
    try:
        codec.check(output[column], size)
    except ValueError as error:
        return Failed(f"invalid value: {error}"[:300])
    return output[column]
