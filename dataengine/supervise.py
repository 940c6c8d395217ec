"""A worker in a process of its own, watched: one that dies or hangs is replaced, and what it died on is isolated.

The watcher hands tasks to the child over a socket and reads from a small file (pulse.py) what the child is doing. When
the child ends, or is in one step for too long and is ended, the watcher starts another and hands it the same tasks with
the death written on them; the labelling loop then cuts the step in halves until the row that kills is alone and given
up. Finished batches are in a spool folder of this machine: the next child takes them up and runs none of them again.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from dataengine import pulse
from dataengine.pulse import Death, Step
from dataengine.work import Report, Task, Worker

MAX_STARTS = 3
"""Children in a row that may end before one has started its worker."""

MAX_IDLE_DEATHS = 3
"""Children that may end in the middle of a task but in no step of it before the task is given up."""

_POLL = 0.2
_PREFIX = "dataengine-worker-"
_ENTRY = "from dataengine import supervise; supervise._main()"


class WorkerDies(RuntimeError):
    """The worker's process ends again and again, and no sample is to blame."""


@dataclass
class _Running:
    task: Task
    done: Future[Report]
    idle_deaths: int = 0


class Supervised:
    """A started worker in a child process: call it with tasks, from several threads if they are to overlap.

    `batch_seconds` is how long one step may take before its process counts as hung; `start_seconds` how long loading
    may. Exceptions that the worker raises are raised here.
    """

    def __init__(
        self, worker: Worker, device: str, *, batch_seconds: float = 300.0, start_seconds: float = 3600.0
    ) -> None:
        _sweep()
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # Held while this process lives, however it ends: a folder that can be locked belongs to nobody.
        self._claim = os.open(self._folder / "claim", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._claim, fcntl.LOCK_EX)
        (self._folder / "spool").mkdir()
        if hasattr(worker, "spool"):
            worker = replace(worker, spool=str(self._folder / "spool"))  # type: ignore[type-var]
        self._worker, self._device = worker, device
        self._batch_seconds, self._start_seconds = batch_seconds, start_seconds
        self._ids = itertools.count()
        self._running: dict[int, _Running] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._draining = False
        self._over = False
        self._notes: list[str] = []
        self._child: _Child | None = None
        self._started: Future[None] = Future()
        # One thread starts every child and outlives them: the kernel ends a child with the thread that made it.
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def wait_started(self) -> None:
        """Wait until the worker is ready; raises what kept it from starting."""
        self._started.result()

    def __call__(self, task: Task) -> Report:
        """Run one task."""
        running = _Running(task, Future())
        with self._lock:
            if self._over:
                raise WorkerDies("the worker has ended for good")
            number = next(self._ids)
            self._running[number] = running
            if self._child is not None and self._child.ready:
                self._child.send(("run", number, task))
        try:
            report = running.done.result()
        finally:
            with self._lock:
                self._running.pop(number, None)
        with self._lock:
            notes, self._notes = tuple(self._notes), []
        return replace(report, notes=report.notes + notes)

    def drain(self) -> None:
        """Let the batches at hand finish and leave the rest; running calls return reports that say `drained`."""
        self._draining = True
        with self._lock:
            if self._child is not None:
                self._child.send(("drain",))

    def step(self) -> tuple[Step, float] | None:
        """The step that the child is in, and since when (seconds since the epoch); None between steps."""
        child = self._child
        return None if child is None else pulse.read(child.mark)

    def close(self) -> None:
        """End the child."""
        self._closing = True
        with self._lock:
            if self._child is not None:
                self._child.end()
        self._thread.join()

    # -- the watching thread ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        failures = 0
        try:
            while not self._closing:
                child = _Child(self._folder, self._worker, self._device)
                with self._lock:
                    self._child = child
                how = self._follow(child)
                if self._closing:
                    return
                failures = 0 if child.ready else failures + 1
                if failures >= MAX_STARTS:
                    self._fail(WorkerDies(f"the worker's process ended {failures} times while it started ({how})"))
                    return
                self._mourn(child, how)
        except BaseException as error:
            self._fail(error if isinstance(error, Exception) else WorkerDies(f"the watching thread ended: {error!r}"))
            raise
        finally:
            if self._child is not None:
                self._child.end()
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._claim)
            with self._lock:
                self._over = True
            self._fail(WorkerDies("the worker was closed"))

    def _follow(self, child: _Child) -> str:
        """Pass messages on until the child is gone; returns how it ended."""
        awake = time.time()
        while True:
            try:
                while child.connection.poll(_POLL):
                    self._receive(child, *child.connection.recv())
            except (EOFError, OSError):
                return child.wait()
            limit = self._batch_seconds if child.ready else self._start_seconds
            now = pulse.read(child.mark)
            awake = awake if child.stopped() else time.time()
            since = child.began if not child.ready else now[1] if now is not None else awake
            if time.time() - since > limit:
                child.end()
                return f"hung for more than {limit:g} s"

    def _receive(self, child: _Child, kind: str, number: int | None, value: Any) -> None:
        if kind == "ready":
            with self._lock:
                child.ready = True
                if self._draining:
                    child.send(("drain",))
                for waiting, running in self._running.items():
                    child.send(("run", waiting, running.task))
            if not self._started.done():
                self._started.set_result(None)
        elif kind == "unready":
            self._closing = True
            self._fail(value)
        else:
            asked = self._running.get(number if number is not None else -1)
            if asked is not None and not asked.done.done():
                (asked.done.set_result if kind == "report" else asked.done.set_exception)(value)

    def _mourn(self, child: _Child, how: str) -> None:
        """Write a death on the task whose step it was; one in no step counts against every task under way."""
        last = pulse.read(child.mark)
        step = last[0] if last is not None else None
        with self._lock:
            self._notes.append(_obituary(step, how))
            for running in self._running.values():
                if step is not None and step.shard == running.task.shard:
                    running.task = replace(running.task, deaths=(*running.task.deaths, Death(step, how)))
                elif step is None and child.ready:
                    running.idle_deaths += 1
                    if running.idle_deaths >= MAX_IDLE_DEATHS and not running.done.done():
                        running.done.set_exception(
                            WorkerDies(f"shard {running.task.shard} ended {running.idle_deaths} processes ({how})")
                        )

    def _fail(self, error: BaseException) -> None:
        if not self._started.done():
            self._started.set_exception(error)
        with self._lock:
            for running in self._running.values():
                if not running.done.done():
                    running.done.set_exception(error)


def _sweep() -> None:
    """Delete what workers that were killed have left on this machine."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            claim = os.open(folder / "claim", os.O_RDWR)
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(claim)


def _obituary(step: Step | None, how: str) -> str:
    if step is None:
        return f"a process ended in no step: {how}"
    return f"a process ended on {step.who.split()[0]}, rows {step.start}..{step.stop} of shard {step.shard}: {how}"


class _Child:
    """One child process and the line to it."""

    def __init__(self, folder: Path, worker: Worker, device: str) -> None:
        self.mark = folder / "step"
        self.mark.unlink(missing_ok=True)
        self.ready = False
        self.began = time.time()
        self._sending = threading.Lock()
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:  # closed here: what is left of the line is the child's, and ends with it
            self.process = subprocess.Popen(
                [sys.executable, "-c", _ENTRY, str(theirs.fileno()), str(self.mark)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        self.send(("start", worker, device))

    def send(self, message: tuple[Any, ...]) -> None:
        """Send; a child that is gone is noticed by who reads."""
        with self._sending, contextlib.suppress(OSError):
            self.connection.send(message)

    def wait(self) -> str:
        """How it ended, once it has."""
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.end()
            return "closed its line"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def stopped(self) -> bool:
        """Whether it is frozen (SIGSTOP) or being so."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        return False

    def end(self) -> None:
        """Kill it and wait until it is gone, so that its memory, a GPU's too, is free."""
        self.process.kill()
        self.process.wait()


# -- the child --------------------------------------------------------------------------------------------------------


def _main() -> None:
    """Entry point of the child: load the worker, then run what comes over the line until it closes."""
    line, mark = sys.argv[1:3]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the watcher
    with Connection(int(line)) as connection:
        _serve(connection, Path(mark))
    os._exit(0)  # threads may be in the middle of what nobody waits for any more


@dataclass
class _Line:
    connection: Connection
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, *message: Any) -> None:
        with self.lock, contextlib.suppress(OSError):
            self.connection.send(message)


def _serve(connection: Connection, mark: Path) -> None:
    line = _Line(connection)
    _, worker, device = connection.recv()
    try:
        work = worker.start(device)
    except Exception as error:
        line.send("unready", None, _portable(error))
        return
    pulse.leave_in(mark)
    drain: Callable[[], None] = getattr(work, "drain", lambda: None)
    signal.signal(signal.SIGTERM, lambda *_: drain())
    line.send("ready", None, None)

    def run(number: int, task: Task) -> None:
        try:
            line.send("report", number, work(task))
        except Exception as error:
            line.send("error", number, _portable(error))

    with ThreadPoolExecutor(8) as threads:
        while True:
            try:
                message = connection.recv()
            except EOFError:
                os._exit(0)
            if message[0] == "drain":
                drain()
            else:
                threads.submit(run, *message[1:])


def _portable(error: Exception) -> Exception:
    """The exception, or one that says the same when it cannot travel."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
