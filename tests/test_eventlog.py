"""The log of a run: every event once and in order, on a disk and on S3, whatever breaks off, and never in the way."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataengine.eventlog import EventLog, events, from_line, runs, to_line
from dataengine.events import KINDS, Event
from dataengine.storage import Store
from dataengine.work import CellReport
from tests.faulty_s3 import s3_server

# botocore and moto still use names that newer Pythons and libraries deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
RUN = "20260101T000000-label-1"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket on an S3 server of this process."""
    with s3_server("watched"):
        yield "s3://watched"


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return Store(tmp_path / "root")
    return Store(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def event(i: int) -> Event:
    return Event(float(i), "report", "edges", f"w{i}", "n0", i, (0, i + 1), {"outcome": "done", "spent": {"read": 0.5}})


def test_what_is_written_is_read_back_in_order(store: Store) -> None:
    log = EventLog(store, RUN, lines=4, every=10.0)
    written = [event(i) for i in range(11)]
    for e in written:
        log.add(e)
        log.flush(now=e.time / 100)
    seen = list(events(store, RUN))
    assert seen == written if store.local else seen == written[:8]
    log.flush(now=50.0)
    assert list(events(store, RUN)) == written
    log.close()
    assert list(events(store, RUN)) == written
    assert len(store.files(f"runs/{RUN}")) == (1 if store.local else 3)
    assert log.problem == ""


def test_a_long_run_leaves_a_bounded_number_of_objects(bucket: str) -> None:
    store, days = Store(f"{bucket}/weeks"), 2
    written: list[float] = []
    log = EventLog(store, RUN)
    log._write = lambda text: written.append(now)  # type: ignore[method-assign]
    for now in range(0, days * 86400, 5):
        log.add(event(0))
        log.flush(float(now))
    assert written[0] == 10.0
    assert max(b - a for a, b in itertools.pairwise(written)) == 300.0
    assert len(written) < days * 86400 / 300 + 500


def test_runs_are_listed_newest_first(store: Store) -> None:
    for run in (RUN, "20260102T000000-label-1", "20260101T235959-ingest-2"):
        log = EventLog(store, run)
        log.add(event(0))
        log.close()
    store.publish("runs/index.d/x.json", b"{}")
    assert runs(store) == ["20260102T000000-label-1", "20260101T235959-ingest-2", RUN]
    assert list(events(store, "20990101T000000-label-1")) == []


def test_a_line_that_broke_off_is_left_out_wherever_it_is(tmp_path: Path) -> None:
    store = Store(tmp_path)
    lines = [to_line(event(i), i + 1) for i in range(4)]
    path = tmp_path / "runs" / RUN / "events.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(f"{lines[0]}\n{lines[1]}\n{lines[2][:40]}\n\n{lines[1]}\n{lines[2]}\n{lines[3][:-9]}".encode())
    assert list(events(store, RUN)) == [event(0), event(1), event(2)]
    path.write_bytes(lines[0].encode() + b"\n\xff\xfe{" + b"\n[1]\n7\nnull\n" + lines[1].encode())
    assert list(events(store, RUN)) == [event(0), event(1)]


def test_a_store_that_fails_is_noted_once_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, noted = Store(tmp_path), []
    log = EventLog(store, RUN, on_problem=noted.append, every=10.0)
    real, calls = Store.append, 0

    def broken(self: Store, path: str, line: str) -> None:
        nonlocal calls
        calls += 1
        real(self, path, line[: len(line) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Store, "append", broken)
    for i in range(5):
        log.add(event(i))
        log.flush(now=float(i))
    assert calls == 1, "a store that fails is given time"
    log.flush(now=11.0)
    assert calls == 2
    assert "no space left" in log.problem
    assert noted == [f"events are not being written: {log.problem}"]
    monkeypatch.setattr(Store, "append", real)
    log.flush(now=30.0)
    log.add(event(5))
    log.close()
    assert list(events(store, RUN)) == [event(i) for i in range(6)]
    assert log.problem == ""
    assert len(noted) == 1


def test_values_that_json_does_not_know_are_kept_as_plain_ones() -> None:
    cell = CellReport("depth", 4, 1, 100, 0.5, {"bad": 1})
    odd: dict[str, Any] = {"cells": (cell,), "path": Path("/a"), "names": {"b", "a"}}
    _, read = from_line(to_line(Event(1.0, "report", values=odd), 1))
    assert read.values["cells"] == [vars(cell)]
    assert (read.values["path"], read.values["names"]) == ("/a", ["a", "b"])
    endless: dict[str, Any] = {}
    endless["self"] = endless
    log = EventLog(Store("/nonexistent"), RUN)
    log.add(Event(1.0, "run", values=endless))


def test_every_line_says_its_number_and_leaves_out_what_is_empty() -> None:
    line = json.loads(to_line(Event(1.25, "worker-up", "edges", "w1"), 7))
    assert line == {"n": 7, "time": 1.25, "kind": "worker-up", "stage": "edges", "worker": "w1"}


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(
    st.builds(
        Event,
        time=st.integers(0, 2**40).map(lambda t: t / 8),
        kind=st.sampled_from(sorted(KINDS)),
        stage=st.text(),
        worker=st.text(),
        node=st.text(),
        shard=st.none() | st.integers(0, 10**6),
        rows=st.none() | st.tuples(st.integers(0, 1000), st.integers(0, 1000)),
        values=st.dictionaries(st.text(), plain),
    )
)
def test_any_event_survives_its_line(made: Event) -> None:
    line = to_line(made, 3)
    assert "\n" not in line
    assert from_line(line) == (3, made)


def test_a_run_on_s3_is_watched_and_reported_from_there(bucket: str) -> None:
    import io

    from rich.console import Console

    from pipelines.monitor import Monitor
    from pipelines.watch import load_report, load_status, pick
    from tests.simulated import T0, steady

    store, log = Store(f"{bucket}/far"), steady(tasks=20)
    now = T0
    with Monitor(store, RUN, Console(file=io.StringIO()), clock=lambda: now, beat=None) as monitor:
        for e in log:
            now = max(now, e.time)
            monitor.on_event(e)
            monitor.tick(now)
        assert pick(store, "") == RUN
        assert load_status(store, RUN)["tasks"]["done"] >= 17
        assert load_report(store, RUN)["finished"] is False
        assert len(store.files(f"runs/{RUN}")) > 5, "a status, and a chunk every ten seconds"
    assert load_status(store, RUN)["ended"] == now
    assert load_report(store, RUN) == json.loads(json.dumps(monitor.report))
    assert monitor.report["complete"]
    assert len(list(events(store, RUN))) == len(log) + 1
