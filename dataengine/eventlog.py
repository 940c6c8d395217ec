"""The events of a run as JSON lines under `runs/<id>/`: written while it goes on, read by watchers and reports.

On a local disk they are lines of one file, `events.jsonl`. Object stores cannot append, so there they lie in numbered
objects, `events-00001.jsonl` and so on, each of some seconds. Nothing in them is needed for correctness, and a log that
cannot be written never stops a run.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from dataengine.events import Event
from dataengine.storage import Store, redacted

MAX_WAITING = 100_000
"""Lines kept for a store that does not take them; beyond it the oldest are dropped."""

MAX_SECONDS = 300.0
"""Time after which lines go to an object store, however long the run."""

_RUN_ID = re.compile(r"\d{8}T\d{6}-.+")


def to_line(event: Event, number: int) -> str:
    """One event as a line of JSON; `number` counts the events of a run from 1, and tells repeats and gaps."""
    return json.dumps({"n": number, **_fields(event)}, default=_plain, separators=(",", ":"))


def from_line(line: str | bytes) -> tuple[int, Event]:
    """The number and the event of a line that `to_line` wrote; ValueError for any other text."""
    try:
        record = json.loads(line)
        number = int(record.pop("n"))
        record["time"], record["kind"] = float(record["time"]), str(record["kind"])
        if record.get("rows") is not None:
            start, stop = record["rows"]
            record["rows"] = (int(start), int(stop))
        if not isinstance(record.get("values", {}), dict):
            raise TypeError("values")
        return number, Event(**record)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a line of an event log: {str(line)[:80]!r}") from error


def without_secrets(event: Event) -> Event:
    """The event with the secrets of URLs in its texts hidden: errors and settings quote what they were given."""
    return dataclasses.replace(event, values=_hidden(event.values))


def _hidden(value: Any) -> Any:
    if isinstance(value, str):
        # Few texts hold what every secret is written with, and most events are told many times a second.
        return redacted(value) if "=" in value or ":" in value else value
    if isinstance(value, dict):
        return {_hidden(key): _hidden(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hidden(inner) for inner in value]
    return _hidden(vars(value)) if dataclasses.is_dataclass(value) else value


def _fields(event: Event) -> dict[str, Any]:
    """The fields that say something."""
    found = {"time": round(event.time, 3), "kind": event.kind}
    return found | {name: v for name, v in vars(event).items() if name not in found and v not in ("", None, {})}


def _plain(value: Any) -> Any:
    """What JSON has no word for: a record becomes its fields, a set a list, anything else its text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


class EventLog:
    """Writes the events of one run. `add` only keeps a line; `flush` writes what is due; neither ever raises.

    `problem` is what the store last said while it refused lines, else empty; `on_problem` is told it once.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        *,
        every: float = 10.0,
        lines: int = 1000,
        on_problem: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._store, self._folder = store, f"runs/{run_id}"
        self._every, self._lines, self._on_problem = every, lines, on_problem
        # Two threads: one adds to the first, the other moves lines to the second and from there to the store.
        self._waiting: deque[str] = deque(maxlen=MAX_WAITING)
        self._held: deque[str] = deque(maxlen=MAX_WAITING)
        self._numbers = 0
        self._chunks = 0
        self._began: float | None = None
        self._written = 0.0
        self._told = False
        self.problem = ""

    def add(self, event: Event) -> None:
        """Take one event into the log, as it is now."""
        self._numbers += 1
        try:
            line = to_line(event, self._numbers)
        except (TypeError, ValueError) as error:
            line = to_line(Event(event.time, event.kind, event.stage, values={"unwritable": str(error)}), self._numbers)
        self._waiting.append(line)

    def flush(self, now: float) -> None:
        """Write what is kept: at once on a local disk; on an object store after `every` seconds or `lines` lines.

        The time grows with the age of the run to a hundredth of it, so that weeks do not leave a hundred thousand
        objects.
        """
        if self._began is None:
            self._began = self._written = now
        every = max(self._every, min((now - self._began) / 100, MAX_SECONDS))
        many = self._store.local or len(self._waiting) >= self._lines
        if now - self._written >= every or (many and not self.problem):
            self._written = now
            self.close()

    def close(self) -> None:
        """Write all that is left."""
        while self._waiting:
            self._held.append(self._waiting.popleft())
        if not self._held:
            return
        try:
            self._write("\n".join(self._held))
        except Exception as error:
            # Whatever a store throws: a run is worth more than its log. The lines stay, and are tried again.
            self.problem = f"{type(error).__name__}: {error}"[:300]
            if not self._told:
                self._told = True
                self._on_problem(f"events are not being written: {self.problem}")
        else:
            self.problem = ""
            self._held.clear()

    def _write(self, text: str) -> None:
        if self._store.local:
            # After a write that broke off, its half line must end before the next one begins.
            self._store.append(f"{self._folder}/events.jsonl", ("\n" if self.problem else "") + text)
            return
        # Every attempt has its own name: one that failed may have arrived all the same. Readers drop what is twice.
        self._chunks += 1
        self._store.publish(f"{self._folder}/events-{self._chunks:05d}.jsonl", f"{text}\n".encode())


def events(store: Store, run_id: str) -> Iterator[Event]:
    """The events of a run in order, each once; a line that broke off (a killed driver, a full disk) is left out."""
    last = 0
    for path in _files(store, run_id):
        for line in io.BytesIO(store.read(path)):
            try:
                number, event = from_line(line)
            except ValueError:
                continue
            # A write that failed half way is repeated as a whole: what was there already has a number seen before.
            if number > last:
                last = number
                yield event


def _files(store: Store, run_id: str) -> list[str]:
    names = [n for n in store.files(f"runs/{run_id}") if re.fullmatch(r"events(-\d+)?\.jsonl", n)]
    return [f"runs/{run_id}/{n}" for n in sorted(names, key=lambda n: (len(n), n))]


def runs(store: Store) -> list[str]:
    """The ids of the runs that left something under `runs/`, newest first."""
    return sorted((name for name in store.folders("runs") if _RUN_ID.fullmatch(name)), reverse=True)
