"""Drive a run: hand tasks to workers, replace what dies, use what comes, tell what happens. Knows nothing of Ray.

The driver holds no state that must outlive it: what is done is in the commit records, what is half done in staging.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dataengine import verdicts
from dataengine.cluster import Cluster
from dataengine.events import Event
from dataengine.manifest import Conflict
from dataengine.schedule import Schedule, Stage
from dataengine.supervise import WorkerDies
from dataengine.work import Report, Stopped, Task, Unfinished

MAX_TRIES = 4
"""How often a task may fail, or lose its worker, before it is given up. Deaths of nodes do not count."""

MAX_BEYOND = 8
"""Workers asked for beyond the cluster's present room, so that an autoscaler sees demand, when so many are allowed."""

SILENT_SECONDS = 60.0
"""A worker that answers nothing for so long is taken for lost."""

DRAIN_SECONDS = 25.0
"""How long workers may take to leave their batches when the run is told to stop: less than the usual grace of 30 s."""

CLOSE_SECONDS = 5.0
"""How long a worker may take to clear up behind it."""

BUSY_SECONDS, MAX_BUSY_SECONDS = 1.0, 30.0
"""When to ask again for a shard that another run holds: twice as late every time."""

LOOK_SECONDS = 2.0
REBALANCE_SECONDS = 60.0


@dataclass(eq=False)
class _Handle:
    """A worker as the driver sees it."""

    name: str
    stage: Stage
    actor: Any
    asked: float
    node: str = ""
    ready: Any = None
    up: bool = False
    leaving: str = ""
    tasks: dict[Any, Task] = field(default_factory=dict)
    question: Any = None
    answered: float = 0.0


class Driver:
    """One run over some stages."""

    def __init__(
        self,
        cluster: Cluster,
        stages: Sequence[Stage],
        on_event: Callable[[Event], None],
        device: str,
        max_workers: int | None,
        batch_seconds: float,
    ) -> None:
        self.cluster, self.schedule = cluster, Schedule(stages)
        self.on_event, self.device, self.max_workers, self.batch_seconds = on_event, device, max_workers, batch_seconds
        self.workers: dict[str, list[_Handle]] = {s.name: [] for s in stages}
        self.tries: dict[tuple[str, int, tuple[int, int] | None], int] = {}
        self.later: list[tuple[float, str, Task]] = []
        self.busy: Counter[tuple[str, int]] = Counter()
        self.nodes: dict[str, dict[str, float]] = {}
        self.draining: set[str] = set()
        self.counter = 0
        self.looked, self.rebalanced = 0.0, time.monotonic()
        self.any_done = False
        self.signal = ""

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Turn the first SIGTERM or SIGINT into an orderly stop; the second acts as always."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

        def stop(number: int, frame: Any) -> None:
            self.signal = signal.Signals(number).name
            for s, handler in before.items():
                signal.signal(s, handler)

        for s in before:
            signal.signal(s, stop)
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def run(self) -> None:
        """Run until everything is done or given up; Unfinished, Stopped, or what no second attempt would cure."""
        for stage in self.schedule.stages.values():
            self._tell("stage", stage.name, **stage.described())
        try:
            while not self.schedule.finished and not self.signal:
                self._look()
                self._scale()
                self._dispatch()
                self._collect(0.5)
            if self.signal:
                self._stop()
                raise Stopped(
                    f"{self.signal}: finished rows are in staging, run the same command again to go on from there"
                )
        finally:
            self._close(self._handles())
        if self.schedule.failed:
            raise Unfinished(self.schedule.failed)

    # -- the cluster --------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Notice nodes that come, go, or announce their end, and workers that fell silent."""
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return
        self.looked = now
        alive = self.cluster.nodes()
        for node in alive.keys() - self.nodes.keys():
            self._tell("node-up", node=node, resources={k: v for k, v in alive[node].items() if ":" not in k})
        for node in self.nodes.keys() - alive.keys():
            self._tell("node-down", node=node, cause="the node is gone")
        self.nodes = alive
        for node, deadline in self.cluster.draining().items():
            if node in alive and node not in self.draining:
                self.draining.add(node)
                self._tell("node-draining", node=node, deadline=deadline)
                for handle in self._handles():
                    if handle.node == node:
                        self._send_away(handle, "its node announced its end")
        for handle in self._handles():
            self._ask(handle, now)

    def _ask(self, handle: _Handle, now: float) -> None:
        if not handle.up:
            return
        if handle.question is None:
            handle.question, handle.answered = self.cluster.ask(handle.actor, "usage"), now
        elif self.cluster.wait([handle.question], 0.0):
            # A worker that has died says so by its tasks.
            with contextlib.suppress(Exception):
                self._tell("usage", handle.stage.name, handle, **self.cluster.get(handle.question))
            handle.question = None
        elif now - handle.answered > SILENT_SECONDS:
            self._lose(handle, f"silent for {SILENT_SECONDS:g} s", planned=False)

    def _room(self) -> dict[str, float]:
        """CPUs and GPUs of the nodes that stay."""
        room = {"CPU": 0.0, "GPU": 0.0}
        for node, resources in self.nodes.items():
            if node not in self.draining:
                for name in room:
                    room[name] += resources.get(name, 0.0)
        return room

    def _scale(self) -> None:
        """Start the workers that are wanted, and let those go that others need more."""
        room = self._room()
        now = {name: len([h for h in hs if not h.leaving]) for name, hs in self.workers.items()}
        wanted = self.schedule.num_workers(room, now)
        if self.max_workers is not None:
            wanted = self._bounded(wanted, now)
        if not any(wanted.values()) and not any(now.values()) and any(map(self.schedule.can_start, self.workers)):
            needed = {n: (s.num_cpus, s.num_gpus) for n, s in self.schedule.stages.items()}
            if self.nodes:
                raise ValueError(f"no room for a worker: the cluster has {room}, the stages need (CPU, GPU) {needed}")
        starved = [n for n in wanted if wanted[n] and not now[n]]
        due = any(wanted[n] > now[n] for n in wanted) and time.monotonic() - self.rebalanced > REBALANCE_SECONDS
        for name, handles in self.workers.items():
            surplus = now[name] - wanted[name]
            if surplus > 0 and (starved or due or not self.schedule.open(name)):
                for handle in sorted(handles, key=lambda h: (len(h.tasks), -h.asked))[:surplus]:
                    handle.leaving = handle.leaving or "others need its place"
                self.rebalanced = time.monotonic()
            for handle in [h for h in handles if h.leaving and not h.tasks]:
                self._lose(handle, handle.leaving, planned=True)
            for _ in range(wanted[name] - now[name]):
                self._spawn(self.schedule.stages[name])

    def _bounded(self, wanted: dict[str, int], now: dict[str, int]) -> dict[str, int]:
        """The wanted numbers within `max_workers`; beyond the room only a few, for an autoscaler to see."""
        assert self.max_workers is not None
        few = min(self.max_workers, sum(now.values()) + MAX_BEYOND)
        if sum(wanted.values()) < few and self.nodes and self.cluster.elastic:
            stages = self.schedule.stages.values()
            larger = {"CPU": few * max(s.num_cpus for s in stages), "GPU": few * max(s.num_gpus for s in stages)}
            wanted = {n: max(wanted[n], k) for n, k in self.schedule.num_workers(larger, now).items()}
        while sum(wanted.values()) > self.max_workers:
            wanted[max(wanted, key=lambda n: wanted[n])] -= 1
        return wanted

    def _spawn(self, stage: Stage) -> None:
        self.counter += 1
        actor = self.cluster.start(stage, self._device(stage), self.batch_seconds)
        handle = _Handle(f"{stage.name}-{self.counter}", stage, actor, time.monotonic())
        handle.ready = self.cluster.ask(actor, "ready")
        self.workers[stage.name].append(handle)

    def _device(self, stage: Stage) -> str:
        return self.device if stage.num_gpus or not self.device.startswith("cuda") else "cpu"

    def _send_away(self, handle: _Handle, why: str) -> None:
        """Let a worker leave its batch and its finished rows to others."""
        if not handle.leaving:
            handle.leaving = why
            self.cluster.ask(handle.actor, "drain")

    def _lose(self, handle: _Handle, why: str, planned: bool) -> None:
        """Forget a worker; what it had at hand goes to others."""
        if handle not in self.workers[handle.stage.name]:
            return
        self.workers[handle.stage.name].remove(handle)
        if planned:
            self._close([handle])
        else:
            self.cluster.kill(handle.actor)
        self._tell("worker-down", handle.stage.name, handle, cause=why, planned=planned)
        for task in handle.tasks.values():
            self._tell("lost", handle.stage.name, handle, task, cause=why)
            self.schedule.again(handle.stage.name, task)
        handle.tasks = {}

    def _close(self, handles: Sequence[_Handle]) -> None:
        """Let workers clear up behind them, and end those that do not."""
        up = [self.cluster.ask(h.actor, "close") for h in handles if h.up]
        until = time.monotonic() + CLOSE_SECONDS
        while up and time.monotonic() < until:
            done = self.cluster.wait(up, until - time.monotonic())
            up = [answer for answer in up if answer not in done]
        for handle in handles:
            self.cluster.kill(handle.actor)

    # -- tasks --------------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Give every free worker a task, then every one a second that reads and decodes behind the first."""
        now = time.monotonic()
        for due, name, task in [x for x in self.later if x[0] <= now]:
            self.later.remove((due, name, task))
            self.schedule.again(name, task, later=True)
        for depth in (0, 1):
            for name, handles in self.workers.items():
                able = [h for h in handles if h.up and not h.leaving]
                for handle in able:
                    if len(handle.tasks) != depth:
                        continue
                    next_task = self.schedule.take(name, len(able), ahead=depth > 0)
                    if next_task is None:
                        break
                    handle.tasks[self.cluster.ask(handle.actor, "run", next_task)] = next_task
                    attempt = self.tries.get((name, next_task.shard, next_task.rows), 0) + 1
                    self._tell("start", name, handle, next_task, attempt=attempt)

    def _collect(self, seconds: float) -> None:
        """Wait for something to end, and take in all that has."""
        refs: dict[Any, _Handle] = {}
        for handle in self._handles():
            refs |= dict.fromkeys(handle.tasks, handle)
            if not handle.up:
                refs[handle.ready] = handle
        if not refs:
            time.sleep(min(seconds, 0.1))
            return
        for ref in self.cluster.wait(list(refs), seconds):
            handle = refs[ref]
            if handle not in self.workers[handle.stage.name]:
                continue  # lost a moment ago, with this task
            if ref is handle.ready:
                self._started(handle)
            else:
                self._ended(handle, ref, handle.tasks.pop(ref))

    def _started(self, handle: _Handle) -> None:
        try:
            handle.node = self.cluster.get(handle.ready)
        except Exception as error:
            verdict = verdicts.of(error)
            if verdict in ("task", "start", "run"):
                raise getattr(error, "cause", None) or error from error
            key = (handle.stage.name, -1, None)
            self.tries[key] = self.tries.get(key, 0) + (verdict != "node")
            if self.tries[key] >= MAX_TRIES:
                raise RuntimeError(f"workers of {handle.stage.name} die while they start: {error}") from error
            self._lose(handle, verdicts.cause(error), planned=False)
            return
        handle.up = True
        self._tell("worker-up", handle.stage.name, handle, seconds=round(time.monotonic() - handle.asked, 3))
        if handle.node in self.draining:
            self._send_away(handle, "its node announced its end")

    def _ended(self, handle: _Handle, ref: Any, task: Task) -> None:
        name = handle.stage.name
        try:
            report: Report = self.cluster.get(ref)
        except Exception as error:
            self._went_wrong(handle, task, error)
            return
        if report.outcome == "done":
            self.any_done = True
            self._tell("report", name, handle, task, **asdict(report))
            self.schedule.done(name, task)
        else:
            self._tell("lost", name, handle, task, cause=report.outcome)
            if report.outcome == "busy":
                self.busy[name, task.shard] += 1
                wait = min(BUSY_SECONDS * 2 ** min(self.busy[name, task.shard], 10), MAX_BUSY_SECONDS)
                self.later.append((time.monotonic() + wait, name, task))
            else:
                # Drained, perhaps by a signal that only its own machine got: it would drain whatever it is handed.
                self._send_away(handle, "it was told to end")
                self.schedule.again(name, task)

    def _went_wrong(self, handle: _Handle, task: Task, error: Exception) -> None:
        """The one place where an error that ended a task is turned into what happens next."""
        name, verdict, cause = handle.stage.name, verdicts.of(error), verdicts.cause(error)
        inner = getattr(error, "cause", None) or error
        if isinstance(inner, WorkerDies):
            verdict = "worker"  # its watcher lives, and has given it up
        if verdict in ("start", "run") or isinstance(inner, Conflict):
            raise inner from error
        key = (name, task.shard, task.rows)
        self.tries[key] = self.tries.get(key, 0) + (verdict in ("task", "worker"))
        if self.tries[key] >= MAX_TRIES or (verdict == "task" and isinstance(inner, ValueError)):
            for stage, shard in self.schedule.give_up(name, task, f"{type(inner).__name__}: {inner}"):
                self._tell("failed", stage, handle, Task(shard, {}), cause=self.schedule.failed[stage, shard])
            if not self.any_done and len(self.schedule.failed) >= MAX_TRIES:
                raise Unfinished(self.schedule.failed) from error
        else:
            self._tell("lost", name, handle, task, cause=cause)
            self.schedule.again(name, task)
        if verdict in ("worker", "node"):
            self._lose(handle, cause, planned=False)

    def _stop(self) -> None:
        """Have every worker leave its batch, and wait for it as long as a preempted machine would be given."""
        for handle in self._handles():
            self._send_away(handle, self.signal)
        until = time.monotonic() + DRAIN_SECONDS
        while any(h.tasks for h in self._handles()) and time.monotonic() < until:
            self._collect(0.5)

    def _handles(self) -> list[_Handle]:
        return [h for handles in self.workers.values() for h in handles]

    def _tell(
        self, kind: str, stage: str = "", handle: _Handle | None = None, task: Task | None = None, **values: Any
    ) -> None:
        node = values.pop("node", handle.node if handle is not None else "")
        self.on_event(
            Event(
                time=time.time(),
                kind=kind,
                stage=stage,
                worker=handle.name if handle is not None else "",
                node=node,
                shard=task.shard if task is not None else None,
                rows=task.rows if task is not None else None,
                values=values,
            )
        )
