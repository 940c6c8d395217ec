"""The final report against runs whose truth is known; the monitor that makes it; and the commands that show it."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import timeit
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from dataengine import local
from dataengine.eventlog import events, to_line
from dataengine.events import Event
from dataengine.plan import plan_labels
from dataengine.schedule import Stage
from dataengine.storage import Store
from dataengine.work import CellReport, LabelGroup, Report, Task
from pipelines.live import Prices, RunState
from pipelines.monitor import Monitor
from pipelines.report import build, examples_of
from pipelines.report_text import printed
from tests.fakes import Inverted, Threshold, ingested
from tests.simulated import T0, declared, reported, simulate, steady

ROOT = Path(__file__).parents[1]
RUN = "20260101T090000-label-7"


def shown(thing: Any, width: int = 100) -> str:
    with open(os.devnull, "w") as nowhere:
        console = Console(width=width, record=True, file=nowhere)
        console.print(thing)
        return console.export_text()


def test_the_figures_of_a_steady_run() -> None:
    log = [*steady(tasks=20), Event(T0 + 110, "end", values={"what": "label"})]
    made = build(RunState.of(log), T0 + 999, light={"depth": 6.25}, prices=Prices(3.6, 0.36), run_id=RUN)
    assert (made["run"], made["what"], made["finished"], made["complete"]) == (RUN, "label", True, True)
    assert (made["images"], made["seconds"]) == (2000, pytest.approx(110))
    assert made["images_per_second"] == pytest.approx(2000 / 110)
    (stage,) = made["stages"]
    assert stage["images_per_second"] == pytest.approx(20.0)
    assert (stage["workers"], stage["light_per_worker"]) == pytest.approx((4.0, 6.25))
    assert stage["efficiency"] == pytest.approx(5 / 6.25)
    assert made["light"] == {"seconds": pytest.approx(80.0), "share": pytest.approx(80 / 110), "not_measured": []}
    # Four workers for 110 s, ten of them to start; half a GPU and two cores each.
    assert stage["worker_seconds"] == pytest.approx(440)
    expected = {"start": 40, "read": 8, "decode": 120, "label:depth": 360}
    assert made["time"] == {name: pytest.approx(seconds / 440) for name, seconds in expected.items()}
    assert made["gpu_hours"] == pytest.approx(220 / 3600)
    assert made["cpu_hours"] == pytest.approx(880 / 3600)
    assert made["cost"] == pytest.approx(0.22 + 0.088)
    cells = sum(1000 + shard for shard in range(20))
    assert made["modalities"] == {
        "depth": {"cells": 20, "samples": 2000, "failed": 0, "bytes": cells, "wanted": 20, "missing": 0}
    }
    assert made["missing"] == {"cells": 0, "by_modality": {}}
    json.dumps(made, allow_nan=False)


def test_a_stage_of_several_labelers_has_their_common_speed_and_what_is_not_measured_is_said() -> None:
    log = steady(tasks=20)
    log[1] = declared("depth", 20, labelers=["depth", "normal"])
    state = RunState.of(log)
    both = build(state, T0 + 110, light={"depth": 10.0, "normal": 15.0})["stages"][0]
    assert both["light_per_worker"] == pytest.approx(6.0)
    one = build(state, T0 + 110, light={"depth": 10.0})
    assert (one["stages"][0]["efficiency"], one["light"]["share"]) == (None, None)
    assert one["light"]["not_measured"] == ["normal"]
    assert one["cost"] is None
    assert "speed of light not measured (normal)" in shown(printed(one))
    assert "cost" not in shown(printed(one))


def test_idle_lost_and_unexplained_time() -> None:
    log = [declared("depth", 3), Event(T0, "worker-up", "depth", "w", "n0", values={"seconds": 5.0})]
    log += [Event(T0 + 10, "start", "depth", "w", "n0", 0)]
    log += [Event(T0 + 40, "lost", "depth", "w", "n0", 0, None, {"cause": "OutOfMemoryError: x"})]
    log += [Event(T0 + 50, "start", "depth", "w", "n0", 0)]
    made = {"shard": 0, "cells": [], "seconds": 20.0, "spent": {"label:depth": 12.0, "commit": 2.0}}
    log += [Event(T0 + 70, "report", "depth", "w", "n0", 0, None, made), Event(T0 + 100, "end")]
    found = build(RunState.of(log), T0 + 100)
    assert found["stages"][0]["seconds_by"] == {
        "start": 5.0, "label:depth": 12.0, "commit": 2.0, "other": 6.0, "lost": 30.0, "idle": 50.0
    }  # fmt: skip
    assert found["complete"] is False
    assert found["missing"] == {"cells": 2, "by_modality": {"depth": 2}}


def test_a_worker_that_stays_after_its_stage_does_not_make_the_stage_slow() -> None:
    log = [*steady(tasks=20), Event(T0 + 1110, "end")]
    (stage,) = build(RunState.of(log), T0 + 1110, light={"depth": 5.0})["stages"]
    assert (stage["workers"], stage["efficiency"]) == pytest.approx((4.0, 1.0))
    assert stage["seconds_by"]["idle"] == pytest.approx(4000)


@pytest.mark.parametrize("seed", range(5))
def test_a_rough_run_is_reported_as_it_was(seed: int) -> None:
    log, truth = simulate(seed, tasks=20)
    made = build(RunState.of(log), log[-1].time)
    failed = sum(truth.failed.values())
    assert made["complete"] is (failed == 0)
    assert made["missing"]["cells"] == made["num_given_up"] == failed == len(made["given_up"])
    assert {g["cause"] for g in made["given_up"]} <= {"killed 3 workers"}
    assert made["attempts_lost"].get("WorkerCrashedError", 0) == sum(truth.lost.values())
    assert sum(made["workers_lost"].values()) == truth.workers_lost
    assert made["bytes"] == sum(truth.num_bytes.values())
    assert made["labels_failed"] == sum(truth.bad.values()) == sum(f["labels"] for f in made["failures"])
    for stage in made["stages"]:
        seconds = stage["seconds_by"]
        assert stage["images"] == truth.images[stage["stage"]]
        assert seconds[f"label:{stage['stage']}"] == pytest.approx(truth.label_seconds[stage["stage"]])
        main = [n for name, n in seconds.items() if name not in ("read", "decode")]
        assert sum(main) <= stage["worker_seconds"] * 1.0001
    text = shown(printed(made), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert ("all that was wanted is committed" in text) is made["complete"]
    assert ("missing" in text.splitlines()[-2] + text.splitlines()[-1]) is (failed > 0)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_the_report_of_any_prefix_adds_up(seed: int, share: float) -> None:
    log, _ = simulate(seed, tasks=6)
    log = log[: int(share * len(log))]
    state = RunState.of(log)
    made = build(state, state.time, light={"depth": 5.0, "edges": 4.0}, prices=Prices(1.0, 1.0))
    tasks = {s["stage"]: s["tasks"] for s in made["stages"]}
    for name, row in made["modalities"].items():
        assert row["cells"] + row["missing"] == row["wanted"] == sum(tasks[name].values())
    for stage in made["stages"]:
        assert min([0.0, *stage["seconds_by"].values(), stage["efficiency"] or 0.0, stage["workers"]]) == 0.0
    assert min(made["cost"], made["images_per_second"], made["light"]["share"] or 0.0) >= 0
    assert shown(printed(json.loads(json.dumps(made, allow_nan=False))))


def test_failures_come_with_keys_from_the_commit_records(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    keys = [key for shard in range(3) for key in dataset.keys(shard)]
    bad = (keys[0], keys[5], keys[6])
    plan = plan_labels(dataset, ["canny_edge"], (Threshold(fail_on=bad),))
    state = RunState()
    state.apply(declared("edges", 3, modalities=["canny_edge"]))

    def on_report(made: Any) -> None:
        state.apply(reported(T0 + made.shard, "edges", "w", made))

    local.run(plan.group(dataset.store.url), plan.tasks, workers=1, device="cpu", on_report=on_report)
    (failure,) = build(state, T0 + 5, examples=examples_of(dataset))["failures"]
    assert failure["labels"] == 3
    assert (failure["modality"], failure["kind"]) == ("canny_edge", "RuntimeError")
    assert failure["reason"] == "RuntimeError: cannot label this"
    assert failure["shards"] == [shard for shard in range(3) if set(bad) & set(dataset.keys(shard))]
    assert failure["keys"] == list(bad)


# -- the monitor ------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = T0

    def __call__(self) -> float:
        return self.now


def followed(monitor: Monitor, clock: Clock, log: list[Event]) -> None:
    for event in log:
        clock.now = max(clock.now, event.time)
        monitor.on_event(event)
        monitor.tick(clock.now)


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def logged(store: Store) -> list[str]:
    return [to_line(e, 0) for e in events(store, RUN)]


def quiet() -> Console:
    import io

    return Console(file=io.StringIO(), width=200)


def test_a_monitor_leaves_log_status_and_report(tmp_path: Path) -> None:
    store, clock, console = Store(tmp_path), Clock(), quiet()
    log = [*steady(tasks=20), Event(T0 + 110, "end", values={"what": "label"})]
    with Monitor(store, RUN, console, prices=Prices(1.0), light={"depth": 6.25}, clock=clock, beat=None) as monitor:
        followed(monitor, clock, log[:60])
        status = json.loads(store.read(f"runs/{RUN}/status.json"))
        assert status["time"] > clock.now - 5
        assert logged(store) == [to_line(e, 0) for e in log[:60]]
        followed(monitor, clock, log[60:])
    assert logged(store) == [to_line(e, 0) for e in log]
    assert monitor.report["complete"]
    assert monitor.report["light"]["share"] == pytest.approx(80 / 110)
    assert json.loads(store.read(f"runs/{RUN}/report.json")) == json.loads(json.dumps(monitor.report))
    assert json.loads(store.read(f"runs/{RUN}/status.json"))["ended"] == T0 + 110
    # One line each half minute, no more: this console is not a terminal.
    assert len(lines(console)) == 3
    assert all(line.startswith("label ") and "left" in line for line in lines(console))


def test_the_log_does_not_fill_with_how_busy_nodes_are(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with Monitor(store, RUN, quiet(), clock=Clock(), beat=None) as monitor:
        for second, node in itertools.product(range(0, 200, 2), ("n0", "n1")):
            monitor.on_event(Event(T0 + second, "usage", node=node, values={"cpu": second / 200}))
        assert [n["cpu"] for n in monitor.status(T0)["nodes"]] == [0.99, 0.99]
    found = [(e.time - T0, e.node) for e in events(store, RUN) if e.kind == "usage"]
    assert found == [(second, node) for second in (0, 60, 120, 180) for node in ("n0", "n1")]


def test_a_run_that_fails_has_an_end_and_a_reason(tmp_path: Path) -> None:
    clock = Clock()
    monitor = Monitor(Store(tmp_path), RUN, quiet(), clock=clock, beat=None)

    def run() -> None:
        with monitor:
            followed(monitor, clock, steady())
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        run()
    *_, last = events(Store(tmp_path), RUN)
    assert (last.kind, last.values) == ("end", {"error": "RuntimeError: disk on fire"})
    assert (monitor.report["finished"], monitor.report["complete"]) == (True, False)
    assert "RuntimeError: disk on fire" in shown(printed(monitor.report))
    # Whoever runs it may have said the end already: the reason is in the report all the same.
    again = Monitor(Store(tmp_path), "20260101T090001-label-7", quiet(), clock=clock, beat=None)
    again.on_event(Event(T0, "end", values={"what": "label"}))
    again.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert again.report["summary"] == {"what": "label", "error": "KeyboardInterrupt: "}


def test_no_secret_of_a_url_is_written_or_shown(tmp_path: Path) -> None:
    secret = "hunter2"
    url = f"https://me:{secret}@host/models?sig={secret}"
    cell = CellReport("depth", 1, 1, 1, 1.0, {f"OSError: cannot read {url}": 1})
    made = Report(0, (cell,), 1.0, notes=(f"retried {url}",))
    with Monitor(Store(tmp_path), RUN, quiet(), clock=Clock(), beat=None) as monitor:
        monitor.on_event(Event(T0, "run", values={"what": "label", "recipe": [{"checkpoint": url}]}))
        monitor.on_event(declared("depth", 2))
        monitor.on_event(Event(T0, "report", "depth", "w", "", 0, None, vars(made)))
        monitor.on_event(Event(T0, "failed", "depth", "w", "", 1, None, {"cause": f"OSError: {url}"}))
        monitor.tick(T0)
    files = {p.name: p.read_text() for p in (tmp_path / "runs" / RUN).iterdir()}
    assert set(files) == {"events.jsonl", "status.json", "report.json"}
    for name, text in files.items():
        assert secret not in text, name
        assert "https://***@host/models?sig=***" in text, name
    assert secret not in shown(printed(monitor.report), 200)


def test_nothing_that_looks_on_can_break_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no space left on device")

    class BadMeters:
        def update(self, values: object) -> None:
            raise ConnectionError("no cluster")

    monkeypatch.setattr(Store, "append", broken)
    monkeypatch.setattr(Store, "put", broken)
    clock = Clock()
    with Monitor(Store(tmp_path), RUN, quiet(), meters=BadMeters(), clock=clock, beat=None) as monitor:
        followed(monitor, clock, steady())
        monitor.on_event(Event(T0 + 111, "report", "depth", "w", "n", 33, None, {"cells": [{"modality": "x"}]}))
        monitor.on_event(Event(T0 + 111, "report", "depth", "w", "n", 34, None, {"cells": 7}))
    notes = [n["note"] for n in monitor.report["notes"]]
    for start in ("events are not being written", "status.json is not being written", "metrics have stopped"):
        assert sum(note.startswith(start) for note in notes) == 1, notes
    assert sum(note.startswith("a report event could not be read") for note in notes) == 2
    assert monitor.report["images"] == 2000
    assert list(tmp_path.iterdir()) == []


def test_events_may_come_from_many_threads_while_the_monitor_beats(tmp_path: Path) -> None:
    meters: list[int] = []

    class Kept:
        def update(self, values: Any) -> None:
            meters.append(len(list(values)))

    log = steady(workers=4, tasks=200, rounds=50)
    with Monitor(Store(tmp_path), RUN, quiet(), meters=Kept(), beat=0.001) as monitor:
        monitor.on_event(log[0])
        threads = [
            threading.Thread(target=lambda i=i: [monitor.on_event(e) for e in log[1 + i :: 4]]) for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert monitor.report["images"] == 20_000
    assert len(list(events(Store(tmp_path), RUN))) == len(log) + 1
    assert meters[-1] > 5


def test_the_cost_of_an_event_is_small(tmp_path: Path) -> None:
    log = simulate(1, tasks=200)[0]
    monitor = Monitor(Store(tmp_path), RUN, quiet(), beat=None)

    def feed() -> None:
        for event in log:
            monitor.on_event(event)
        monitor.tick(T0)

    each = timeit.timeit(feed, number=1) / len(log)
    print(f"{1e3 * each:.3f} ms an event, with its line in the log")
    assert each < 0.01


IN_TERMINAL = """
from rich.console import Console
from dataengine.storage import Store
from pipelines.monitor import Monitor
from tests.simulated import T0, steady
import sys, time
with Monitor(Store(sys.argv[1]), "20260101T090000-label-7", Console(stderr=True, soft_wrap=True), beat=0.05) as monitor:
    for event in steady(tasks=20):
        monitor.on_event(event)
    sys.stdin.readline()
print("after")
"""


def test_in_a_terminal_the_table_is_live_and_leaves_no_trace(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, str(tmp_path)], cwd=ROOT, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while b"20260101T090000-label-7" not in seen or b"depth" not in seen:
        assert select.select([ours], [], [], 30)[0], seen
        seen += os.read(ours, 65536)
    out, _ = process.communicate(b"\n", timeout=30)
    while select.select([ours], [], [], 0.1)[0]:
        try:
            seen += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert (process.returncode, out) == (0, b"after\n")
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", seen).decode()
    assert re.search(r"depth +0 +0 +20 +0 +20\.0 +done +4 +90 %", text), text
    assert seen.rstrip().endswith(b"\x1b[2K"), "the last thing is to wipe the table"


@pytest.mark.parametrize("runner", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_real_run_is_reported_as_its_commit_records_say(tmp_path: Path, runner: str) -> None:
    dataset = ingested(tmp_path, 12)
    bad = dataset.keys(1)[0]
    edges, inverted = Threshold(fail_on=(bad,), seconds=0.05), Inverted()
    rows = {shard: len(dataset.keys(shard)) for shard in range(3)}
    stages = []
    for name, modality, labeler in (("edges", "canny_edge", edges), ("inverted", "sam_edge", inverted)):
        tasks = tuple(Task(shard, {modality: modality}) for shard in range(3))
        worker = LabelGroup(dataset.store.url, (labeler,))
        needs = ("edges",) if name == "inverted" else ()
        stages.append(Stage(name=name, worker=worker, tasks=tasks, num_rows=rows, window=3, needs=needs))
    with Monitor(dataset.store, RUN, quiet(), beat=0.1) as monitor:
        if runner == "ray":
            from dataengine import actors

            actors.run_stages(stages, on_event=monitor.on_event, max_workers=2)
        else:
            local.run_stages(stages, on_event=monitor.on_event)
    made = monitor.report
    assert (made["complete"], made["images"], made["labels"], made["labels_failed"]) == (True, 12, 24, 2)
    for modality in ("canny_edge", "sam_edge"):
        records = [dataset.commit(modality, shard) for shard in range(3)]
        row = made["modalities"][modality]
        assert (row["cells"], row["wanted"], row["missing"], row["failed"]) == (3, 3, 0, 1)
        assert row["bytes"] == sum(r.num_bytes for r in records if r is not None)
    assert {(f["modality"], f["kind"], tuple(f["keys"])) for f in made["failures"]} == {
        ("canny_edge", "RuntimeError", (bad,)), ("sam_edge", "input not valid", (bad,))
    }  # fmt: skip
    for stage in made["stages"]:
        assert stage["tasks"] == {"waiting": 0, "running": 0, "done": 3, "failed": 0}
        assert stage["images"] == 12
        # However it is cut, labelling and the rest of what a worker does one after another fits into the time held.
        parts = {name.split(":")[0]: n for name, n in stage["seconds_by"].items()}
        assert 0 < sum(parts.get(k, 0.0) for k in ("start", "label", "commit", "idle")) < 1.01 * stage["worker_seconds"]
    assert monitor.state.stages["inverted"].needs == ("edges",)
    assert monitor.state.stages["edges"].wanted == {"canny_edge": 3}
    assert made["nodes_joined"] == (1 if runner == "ray" else 0)


# -- the commands -----------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    from pipelines import watch  # noqa: F401  the commands register themselves
    from pipelines.cli import app

    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "100"})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two runs: one that is complete, and a later one whose driver was killed."""
    for run, log in ((RUN, [*steady(tasks=20), Event(T0 + 110, "end")]), ("20260102T090000-label-8", steady())):
        clock = Clock()
        monitor = Monitor(Store(tmp_path), run, quiet(), light={"depth": 6.25}, clock=clock, beat=None)
        followed(monitor, clock, log)
        monitor.tick(clock.now + 10)
        if run == RUN:
            monitor.__exit__(None, None, None)
    return tmp_path


def test_watching_a_past_run_and_one_whose_driver_is_gone(root: Path) -> None:
    done = invoke("watch", root, "--run", RUN)
    assert (done.exit_code, "finished" in done.output, len(done.output.splitlines())) == (0, True, 1)
    latest = invoke("watch", root, "--once")
    assert latest.exit_code == 0
    assert "20260102T090000-label-8" in latest.output
    assert re.search(r"depth +20 +0 +20 +0", latest.output)
    assert "no news for" in latest.output
    status = json.loads(invoke("watch", root, "--once", "--json").output)
    assert status == json.loads((root / "runs/20260102T090000-label-8/status.json").read_text())
    # Torn or lost, the status is made from the events again.
    (root / "runs/20260102T090000-label-8/status.json").write_text('{"stages": [')
    again = json.loads(invoke("watch", root, "--once", "--json").output)
    assert again["tasks"] == {"waiting": 20, "running": 0, "done": 20, "failed": 0}


def test_a_report_is_printed_again_at_other_prices(root: Path) -> None:
    kept = json.loads(invoke("report", root, "--run", RUN, "--json").output)
    assert kept == json.loads((root / "runs" / RUN / "report.json").read_text())
    assert kept["cost"] is None
    dear = json.loads(invoke("report", root, "--run", RUN, "--json", "--price-gpu-hour", 36).output)
    assert dear["cost"] == pytest.approx(2.2)
    text = invoke("report", root, "--run", RUN, "--price-gpu-hour", 36).output
    assert "2.20 at 36 a GPU-hour" in text
    assert "72 % of the speed of light" in text
    killed = json.loads(invoke("report", root, "--json").output)
    assert (killed["finished"], killed["complete"], killed["missing"]["cells"]) == (False, False, 20)
    assert "not finished" in invoke("report", root).output


def test_what_is_not_there_is_said(root: Path, tmp_path: Path) -> None:
    unknown = invoke("watch", root, "--run", "20250101T000000-label-1")
    assert unknown.exit_code == 2
    nothing = invoke("report", tmp_path / "empty")
    assert nothing.exit_code == 2


def test_an_endless_watch_follows_until_the_run_ends(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import watch

    store, seen = Store(root), []
    log = [*steady(tasks=20), Event(T0 + 110, "end")]
    monitor = Monitor(store, "20260103T090000-label-9", quiet(), clock=Clock(), beat=None)
    steps = iter([log[:40], log[40:]])
    followed(monitor, Clock(), log[:20])

    def sleep(seconds: float) -> None:
        seen.append(seconds)
        for event in next(steps):
            monitor.on_event(event)
        monitor.tick(log[-1].time + 10 * len(seen))

    monkeypatch.setattr(watch.time, "sleep", sleep)
    done = invoke("watch", root, "--json")
    states = [json.loads(line) for line in done.output.splitlines()]
    assert done.exit_code == 0
    assert seen == [2.0, 2.0]
    assert [s["ended"] for s in states] == [None, None, T0 + 110]
    assert [s["tasks"]["done"] for s in states] == sorted(s["tasks"]["done"] for s in states)
    assert states[-1]["tasks"]["done"] == 20
