"""What a run shows: counts, rates and times of streams whose truth is known, and the table they are drawn in."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dataengine.eventlog import from_line, to_line
from dataengine.events import KINDS, Event
from dataengine.work import CellReport, Report
from pipelines.live import Prices, RunState, as_json, kind_of
from pipelines.report import build
from pipelines.report_text import printed
from pipelines.table import View, duration, plain, table
from tests.simulated import ROWS, T0, declared, report, reported, simulate, steady


def test_rates_and_times_of_a_steady_run() -> None:
    state, now = RunState.of(steady()), T0 + 110
    found = as_json(state, now)
    (stage,) = found["stages"]
    assert stage["tasks"] == {"waiting": 20, "running": 0, "done": 20, "failed": 0}
    assert stage["images"] == 2000
    assert stage["images_per_second_overall"] == pytest.approx(20.0)
    assert stage["images_per_second"] == pytest.approx(20.0)
    assert stage["eta"] == found["eta"] == pytest.approx(100.0)
    assert stage["device_busy"] == pytest.approx(0.9)
    assert found["progress"] == pytest.approx(0.5)
    # Four workers, 10 s to start and 100 s up, each half a GPU and two cores.
    assert found["gpu_hours"] == pytest.approx(4 * 110 * 0.5 / 3600)
    assert found["cpu_hours"] == pytest.approx(4 * 110 * 2 / 3600)
    assert found["cost"] is None
    assert as_json(state, now, Prices(3.0, 0.1))["cost"] == pytest.approx(
        (4 * 110 * 0.5 * 3 + 4 * 110 * 2 * 0.1) / 3600
    )
    assert as_json(state, now, Prices(cpu_hour=0.1))["cost"] == pytest.approx(4 * 110 * 2 * 0.1 / 3600)


def test_tasks_in_progress_count_by_the_time_they_have_had() -> None:
    log = steady()
    log += [Event(T0 + 110, "start", "depth", f"w{i}", "n0", 20 + i) for i in range(4)]
    found = as_json(RunState.of(log), T0 + 120)
    assert found["stages"][0]["tasks"] == {"waiting": 16, "running": 4, "done": 20, "failed": 0}
    # Ten of their twenty seconds have passed: 1,800 rows are left; the rate of late counts none of them yet.
    assert found["eta"] == pytest.approx(1800 / found["stages"][0]["images_per_second"])
    assert 85 < found["eta"] < 105


def test_the_slowest_stage_and_what_it_waits_for_decide() -> None:
    log = steady()
    log.insert(1, declared("edges", 40, seconds_per_row=0.25, needs=["depth"]))
    state = RunState.of(log)
    # Measured: depth takes 0.2 s a row where 1.0 was said, so edges, said to take 0.25, is taken to need 0.05 s.
    run, each = state.eta(T0 + 110)
    assert each == {"depth": pytest.approx(100.0), "edges": None}, "no worker of edges is up: nothing to tell it from"
    assert run == pytest.approx((2000 * 0.2 + 4000 * 0.05) / 4), "all the work that is left on the workers there are"
    state.apply(Event(T0 + 110, "worker-up", "edges", "e0", "n0", values={"seconds": 1.0}))
    state.apply(Event(T0 + 110, "worker-up", "edges", "e1", "n0", values={"seconds": 1.0}))
    run, each = state.eta(T0 + 110)
    assert each["edges"] == pytest.approx(105.0), "its own 4,000 rows at 40 a second, or one task after depth"
    assert run == pytest.approx(105.0)


def test_nothing_is_promised_before_something_is_measured() -> None:
    found = as_json(RunState.of(steady(rounds=0)), T0 + 60)
    assert (found["eta"], found["stages"][0]["eta"], found["stages"][0]["device_busy"]) == (None, None, None)
    assert found["stages"][0]["images_per_second"] == 0.0
    empty = as_json(RunState(), 5.0)
    assert (empty["stages"], empty["progress"], empty["elapsed"]) == ([], 0.0, 0.0)


def test_a_task_that_waits_behind_another_has_had_no_time() -> None:
    log = [declared("depth", 10), Event(T0, "worker-up", "depth", "w", "n0")]
    log += [Event(T0, "start", "depth", "w", "n0", shard) for shard in (0, 1)]
    log.append(reported(T0 + 20, "depth", "w", report(0, "depth", "depth", 20.0)))
    log.append(Event(T0 + 20, "start", "depth", "w", "n0", 2))
    log.append(reported(T0 + 40, "depth", "w", report(1, "depth", "depth", 40.0)))
    state = RunState.of(log)
    assert state.stages["depth"].seconds_per_row() == pytest.approx(0.2)
    assert state.stages["depth"].remaining(T0 + 50, 0.2, state.workers) == pytest.approx(750.0)
    # The worker goes with two tasks at hand: the ten seconds of the one under way are lost, once.
    state.apply(Event(T0 + 50, "start", "depth", "w", "n0", 3))
    state.apply(Event(T0 + 50, "worker-down", "depth", "w", "n0", values={"cause": "silent", "planned": False}))
    for shard in (2, 3):
        state.apply(Event(T0 + 50, "lost", "depth", "w", "n0", shard, None, {"cause": "silent"}))
    stage = state.stages["depth"]
    assert (stage.worker_seconds, stage.task_seconds, stage.lost_seconds) == pytest.approx((50, 40, 10))
    assert stage.counts() == {"waiting": 8, "running": 0, "done": 2, "failed": 0}
    assert stage.lost == {"silent": 2}


def test_a_process_that_serves_two_stages_is_one_worker() -> None:
    log = [declared("depth", 2), declared("edges", 2)]
    for k, (shard, name) in enumerate(itertools.product(range(2), ("depth", "edges"))):
        at = T0 + 10 * k
        log += [Event(at + 2, "worker-up", name, "local", values={"seconds": 2.0})] if shard == 0 else []
        log += [Event(at + 2, "start", name, "local", "", shard)]
        log += [reported(at + 10, name, "local", report(shard, name, name, 8.0))]
    found = as_json(RunState.of([*log, Event(T0 + 40, "end")]), T0 + 40)
    assert found["cpu_hours"] == pytest.approx(40 / 3600)
    assert [s["images"] for s in found["stages"]] == [200, 200]
    assert found["tasks"] == {"waiting": 0, "running": 0, "done": 4, "failed": 0}


def test_a_shard_in_the_hands_of_another_run_is_no_loss_and_a_drained_one_no_waste() -> None:
    log = [declared("depth", 2), Event(T0, "worker-up", "depth", "w", "n0")]
    for i, cause in enumerate(["busy", "busy", "drained"]):
        log.append(Event(T0 + 10 * i, "start", "depth", "w", "n0", 0))
        log.append(Event(T0 + 10 * i + 5, "lost", "depth", "w", "n0", 0, None, {"cause": cause}))
    state = RunState.of(log)
    assert (state.stages["depth"].held, state.stages["depth"].lost) == (2, {"drained": 1})
    assert (state.stages["depth"].task_seconds, state.stages["depth"].lost_seconds) == (5.0, 0.0)


def test_a_node_that_is_gone_stays_gone() -> None:
    log = [Event(T0, "node-up", node="n0", values={"resources": {"CPU": 4.0}})]
    log.append(Event(T0 + 1, "node-draining", node="n0", values={"deadline": (T0 + 31) * 1000}))
    assert as_json(RunState.of(log), T0 + 1)["nodes"][0]["draining"] == pytest.approx(T0 + 31)
    log.append(Event(T0 + 2, "node-down", node="n0", values={"cause": "preempted"}))
    log.append(Event(T0 + 3, "usage", node="n0", values={"cpu": 0.5}))
    found = as_json(RunState.of(log), T0 + 3)
    assert (found["nodes"], found["nodes_joined"], found["nodes_lost"]) == ([], 1, {"preempted": 1})


@pytest.mark.parametrize("seed", range(5))
def test_the_counts_of_a_rough_run_are_its_truth(seed: int) -> None:
    log, truth = simulate(seed)
    state = RunState.of(log)
    found = as_json(state, state.time)
    for stage in found["stages"]:
        name = stage["stage"]
        assert stage["tasks"] == {"waiting": 0, "running": 0, "done": truth.done[name], "failed": truth.failed[name]}
        assert stage["images"] == truth.images[name]
        assert sum(stage["attempts_lost"].values()) == truth.lost[name]
        assert set(stage["attempts_lost"]) <= {"WorkerCrashedError"}
        assert stage["failed_labels"] == truth.bad[name]
        assert stage["workers"] == 0
        column = found["modalities"].get(name, {"cells": 0, "bytes": 0, "failed_by_reason": {}})
        assert (column["cells"], column["bytes"]) == (truth.cells[name], truth.num_bytes[name])
        assert column["failed_by_reason"] == ({"OutOfMemoryError": truth.bad[name]} if truth.bad[name] else {})
        assert sum(state.stages[name].spent[k] for k in state.stages[name].spent if k.startswith("label:")) == (
            pytest.approx(truth.label_seconds[name])
        )
    assert sum(n for s in found["stages"] for n in s["workers_lost"].values()) == truth.workers_lost
    assert found["progress"] == pytest.approx(1.0)
    assert found["ended"] == state.time


def test_a_log_read_back_gives_the_same_state() -> None:
    log = [dataclasses.replace(e, time=round(e.time, 3)) for e in simulate(7)[0]]
    again = [from_line(to_line(e, i))[1] for i, e in enumerate(log)]
    assert as_json(RunState.of(log), T0 + 500) == as_json(RunState.of(again), T0 + 500)


NAMES = st.sampled_from(["a", "b", ""])
CELL = st.builds(
    CellReport,
    modality=NAMES,
    num_samples=st.integers(0, 9),
    num_invalid=st.integers(0, 9),
    num_bytes=st.integers(0, 9),
    seconds=st.floats(0, 9),
    reasons=st.dictionaries(st.text(max_size=5), st.integers(1, 3), max_size=2),
)
ROWS_OR_NONE = st.none() | st.sampled_from([(0, 4), (4, 8)])
REPORT = st.builds(
    Report,
    shard=st.integers(0, 5),
    cells=st.lists(CELL, max_size=2).map(tuple),
    seconds=st.floats(0, 100),
    num_refused=st.integers(0, 3),
    outcome=st.sampled_from(["done", "busy", "drained"]),
    spent=st.dictionaries(st.sampled_from(["read", "label:a", "wait"]), st.floats(0, 100), max_size=2),
    notes=st.lists(st.text(max_size=5), max_size=1).map(tuple),
)
VALUES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "report": REPORT.map(vars),
    "stage": st.fixed_dictionaries({"tasks": st.integers(0, 6), "rows": st.integers(0, 48)}),
    "worker-up": st.fixed_dictionaries({"seconds": st.floats(0, 9)}),
    "worker-down": st.fixed_dictionaries({"cause": st.text(max_size=5), "planned": st.booleans()}),
    "node-draining": st.fixed_dictionaries({"deadline": st.none() | st.floats(0, 2e9)}),
    "usage": st.fixed_dictionaries({"cpu": st.floats(0, 1), "gpus": st.lists(st.floats(0, 1), max_size=2)}),
}
EVENT = st.sampled_from(sorted(KINDS)).flatmap(
    lambda kind: st.builds(
        Event,
        time=st.floats(0, 1000).map(lambda t: T0 + t),
        kind=st.just(kind),
        stage=NAMES,
        worker=NAMES,
        node=NAMES,
        shard=st.integers(0, 5),
        rows=ROWS_OR_NONE,
        values=VALUES.get(kind, st.just({})),
    )
)


def consistent(state: RunState) -> None:
    """Counts add up, shares are shares, and nothing is negative."""
    found = as_json(state, state.time, Prices(1.0, 1.0))
    for stage in found["stages"]:
        kept = state.stages[stage["stage"]]
        assert sum(stage["tasks"].values()) == max(
            kept.tasks, stage["tasks"]["running"] + stage["tasks"]["done"] + stage["tasks"]["failed"]
        )
        assert sum(stage["tasks"].values()) == kept.counts()["waiting"] + sum(
            kept.counts()[k] for k in ("running", "done", "failed")
        )
        numbers = [
            stage[k] for k in ("images", "images_per_second", "workers", "failed_labels", "gpu_hours", "refused")
        ]
        assert min([*stage["tasks"].values(), *numbers, stage["eta"] or 0.0]) >= 0
        assert 0 <= (stage["device_busy"] or 0.0) <= 1
    assert 0 <= found["progress"] <= 1
    assert found["elapsed"] >= 0
    assert sum(s["workers"] for s in found["stages"]) == len(state.workers)
    assert sum(sum(c.reasons.values()) for c in state.modalities.values()) >= sum(
        c.failed for c in state.modalities.values()
    )
    json.dumps(found, allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(st.lists(EVENT, max_size=20))
def test_any_events_in_any_order_leave_a_consistent_state(log: list[Event]) -> None:
    state = RunState()
    for event in log:
        state.apply(event)
        consistent(state)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6))
def test_every_prefix_of_a_run_is_consistent_and_never_goes_back(seed: int) -> None:
    log, _ = simulate(seed, tasks=6)
    state, before = RunState(), None
    for event in log:
        state.apply(event)
        consistent(state)
        found = as_json(state, event.time)
        after = (found["tasks"]["done"], sum(s["images"] for s in found["stages"]))
        assert before is None or all(a >= b for a, b in zip(after, before, strict=True))
        before = after


def test_the_work_for_an_event_and_the_memory_do_not_grow() -> None:
    import timeit
    import tracemalloc

    tracemalloc.start()
    state = RunState()
    state.apply(declared("depth", 2_000))
    for shard in range(2_000):
        at = T0 + shard * 0.5
        state.apply(Event(at, "start", "depth", f"w{shard % 50}", "n0", shard))
        made = report(shard, "depth", "depth", 20.0, bad=shard % 3)
        state.apply(reported(at + 0.25, "depth", f"w{shard % 50}", made))
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 1_000_000, "what is kept of a shard that is done is its number"
    assert len(state.modalities["depth"].texts) <= 201
    assert state.modalities["depth"].reasons == {"OutOfMemoryError": sum(s % 3 for s in range(2_000))}
    event = reported(T0 + 7000, "depth", "w1", report(1, "depth", "depth", 20.0))
    print(f"{1e3 * timeit.timeit(lambda: state.apply(event), number=2000) / 2000:.4f} ms for a report")
    print(f"{1e3 * timeit.timeit(lambda: as_json(state, T0 + 7000), number=20) / 20:.2f} ms for the JSON form")


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB", "OutOfMemoryError"),
        ("RuntimeError: cannot label this", "RuntimeError"),
        ("input sam_instance is not valid", "input not valid"),
        ("gave no depth", "gave no value"),
        ("invalid value: expected (3, 4), got (4, 3)", "invalid value"),
        ("gave 3 outputs for 4 samples", "gave # outputs for # samples"),
        ("", "unknown"),
        ("x" * 99, "x" * 40),
    ],
)
def test_reasons_have_a_short_kind(reason: str, kind: str) -> None:
    assert kind_of(reason) == kind


def drawn(thing: Any, width: int) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(thing)
    console.file.close()
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table_fits_and_shows_every_figure(width: int) -> None:
    log = steady()
    log += [
        Event(T0 + 1, "node-up", node="gpu-node-1", values={"resources": {"GPU": 4.0}}),
        Event(T0 + 1, "node-up", node="gpu-node-2", values={}),
        declared("a_stage_with_a_very_long_name+another+a_third_one", 12_345),
        Event(T0 + 100, "usage", node="gpu-node-1", values={"cpu": 0.7, "gpus": [0.97, 1.0], "memory": 12 * 10**9}),
        Event(T0 + 109, "start", "depth", "w0", "n0", 20),
        Event(T0 + 110, "worker-down", "depth", "w0", "n0", values={"cause": "node died", "planned": False}),
        Event(T0 + 110, "lost", "depth", "w0", "n0", 20, None, {"cause": "NodeDiedError: x"}),
        Event(T0 + 110, "node-down", node="gpu-node-2", values={"cause": "preempted"}),
        reported(T0 + 110, "depth", "w1", report(21, "depth", "depth", 20.0, bad=7)),
    ]
    state = RunState.of(sorted(log, key=lambda e: e.time))
    lines = drawn(table(state, T0 + 111, Prices(2.0), "20260101T000000-label-1"), width)
    assert max(map(len, lines)) <= width
    shown = "\n".join(lines)
    for text in (
        "label  20260101T000000-label-1",
        "running",
        "elapsed 1:51 min",
        "left",
        "12,345",
        "waits",
        "cost 0.1",
    ):
        assert text in shown
    for text in ("7 x depth: OutOfMemoryError", "1 x NodeDiedError", "1 x node died", "preempted", "97 100 %", "70 %"):
        assert text in shown
    depth = next(line for line in lines if line.lstrip().startswith("depth"))
    counts = [w for w in depth.split() if w.isdigit()]
    assert counts[:4] == ["19", "0", "21", "0"], "waiting, running, done, failed"
    assert counts[-2:] == ["7", "1"], "failed labels, attempts lost"
    line = plain(as_json(state, T0 + 111))
    assert line.startswith("label ")
    assert "\n" not in line
    assert "7 bad labels, 1 attempts lost, elapsed 1:51 min, left" in line


def test_a_view_says_when_the_news_stop() -> None:
    status = as_json(RunState.of(steady()), T0 + 110)
    assert "no news for 5:00 min" in "\n".join(drawn(View(status, silent=300.0), 100))
    assert plain(status, silent=300.0).endswith("no news for 5:00 min")
    over = as_json(RunState.of([*steady(), Event(T0 + 110, "end")]), T0 + 900)
    assert over["elapsed"] == pytest.approx(110.0)
    assert "finished" in "\n".join(drawn(View(over, silent=9000.0), 100))


def test_text_from_outside_is_shown_as_it_is() -> None:
    log = [Event(T0, "run", values={"what": "[red]x[/red]"}), declared("[bold]", 1)]
    log.append(Event(T0 + 1, "failed", "[bold]", "w", "n", 0, None, {"cause": "[link=http://x]click[/link]"}))
    hostile = "Bad\x1b]0;owned\x07Error: \x1b[2J\nreboot"
    cell = CellReport("depth\x1b[1m", 1, 1, 1, 1.0, {hostile: 1})
    log.append(reported(T0 + 1, "[bold]", "w", Report(0, (cell,), 1.0, notes=(hostile,))))
    state = RunState.of(log)
    shown = "\n".join(drawn(table(state, T0 + 2), 140))
    for text in ("[red]x[/red]", "[bold]", "[link=http://x]click[/link]", r"depth\x1b[1m: Bad\x1b]#;owned\x07Error"):
        assert text in shown
    shown += plain(as_json(state, T0 + 2)) + "\n".join(drawn(printed(build(state, T0 + 2)), 140))
    assert r"Bad\x1b]0;owned\x07Error: \x1b[2J reboot" in shown
    assert not set(shown) & {"\x1b", "\x07"}


def test_durations_read_well() -> None:
    spans = [(None, "-"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (3599, "59:59 min"), (9660, "2:41 h")]
    assert [duration(s) for s, _ in spans] == [text for _, text in spans]
    assert duration(100_800) == "1 d 4 h"
    assert ROWS == 100
