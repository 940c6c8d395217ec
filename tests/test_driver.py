"""The driver against a cluster made up for the occasion: what it asks for, and what it does when things go wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dataengine import driver
from dataengine.events import Event
from dataengine.schedule import Stage
from dataengine.work import LabelGroup, Report, Task, Unfinished


class Answer:
    """Something that was asked; `act` makes the answer when it is fetched."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act


class Imagined:
    """A cluster whose workers do at once what `work` says; no more than `room` of them start."""

    def __init__(self, room: int, work: Callable[[Task], Report], elastic: bool = False) -> None:
        self.room, self.work, self.elastic = room, work, elastic
        self.started: list[Stage] = []
        self.killed: list[int] = []

    def start(self, stage: Stage, device: str, batch_seconds: float) -> int:
        self.started.append(stage)
        return len(self.started) - 1

    def ask(self, worker: int, what: str, *arguments: Any) -> Answer:
        if what == "ready":
            return Answer(lambda: "node") if worker < self.room else Answer(None)  # type: ignore[arg-type]
        return Answer(lambda: self.work(*arguments)) if what == "run" else Answer(dict)

    def wait(self, answers: list[Any], seconds: float) -> list[Any]:
        return [a for a in answers if a.act is not None][:1]

    def get(self, answer: Answer) -> Any:
        return answer.act()

    def kill(self, worker: int) -> None:
        self.killed.append(worker)

    def nodes(self) -> dict[str, dict[str, float]]:
        return {"node": {"CPU": float(self.room), "GPU": 0.0}}

    def draining(self) -> dict[str, int]:
        return {}


def stage(count: int) -> Stage:
    tasks = tuple(Task(shard, {"depth": "spec"}) for shard in range(count))
    return Stage(
        name="depth", worker=LabelGroup("root", ()), tasks=tasks, num_rows=dict.fromkeys(range(count), 100), window=100
    )


def run(cluster: Imagined, stages: list[Stage], max_workers: int | None = None) -> list[Event]:
    events: list[Event] = []
    driver.Driver(cluster, stages, events.append, "cpu", max_workers, 60.0).run()
    return events


def done(task: Task) -> Report:
    return Report(task.shard, (), 0.1, rows=task.rows)


class ActorDiedError(Exception):
    """Named as Ray's, for it is by their names that the driver knows them."""


def test_every_task_is_done_and_every_worker_ended() -> None:
    cluster = Imagined(2, done)
    events = run(cluster, [stage(20)])
    assert sorted(e.shard for e in events if e.kind == "report" and e.shard is not None) == list(range(20))
    assert sorted(cluster.killed) == list(range(len(cluster.started))) == [0, 1]


def test_a_task_that_kills_its_workers_is_given_up_and_the_others_are_done() -> None:
    def work(task: Task) -> Report:
        if task.shard == 3:
            raise ActorDiedError("gone")
        return done(task)

    cluster = Imagined(100, work)
    with pytest.raises(Unfinished, match="1 tasks could not be done: depth of shard 3: ActorDiedError: gone") as caught:
        run(cluster, [stage(5)], max_workers=1)
    assert caught.value.failed == {("depth", 3): "ActorDiedError: gone"}
    assert len(cluster.started) == driver.MAX_TRIES + 1


def test_a_run_in_which_nothing_works_stops_early() -> None:
    def work(task: Task) -> Report:
        raise ValueError("misaligned")

    with pytest.raises(Unfinished, match="misaligned"):
        run(Imagined(1, work), [stage(1000)])


def test_a_shard_that_another_run_holds_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "BUSY_SECONDS", 0.01)
    asked: list[int] = []

    def work(task: Task) -> Report:
        asked.append(task.shard)
        return done(task) if asked.count(task.shard) > 2 else Report(task.shard, (), 0.0, outcome="busy")

    events = run(Imagined(1, work), [stage(2)])
    assert (asked.count(0), asked.count(1)) == (3, 3)
    assert [e.values["cause"] for e in events if e.kind == "lost"] == ["busy"] * 4


def test_an_autoscaler_is_shown_a_few_more_workers_than_there_is_room_for() -> None:
    cluster = Imagined(2, done, elastic=True)
    run(cluster, [stage(200)], max_workers=40)
    assert 2 + driver.MAX_BEYOND <= len(cluster.started) <= 40
    fixed = Imagined(2, done)
    run(fixed, [stage(200)], max_workers=40)
    assert len(fixed.started) == 2


def test_no_room_for_any_worker_is_said_and_not_waited_for() -> None:
    with pytest.raises(ValueError, match="no room for a worker"):
        run(Imagined(0, done), [stage(2)])


def test_a_worker_that_was_told_to_end_by_its_machine_is_replaced_and_not_asked_again() -> None:
    cluster: Imagined
    asked: list[tuple[int, int]] = []

    def work(task: Task) -> Report:
        asked.append((len(cluster.started), task.shard))
        return Report(task.shard, (), 0.0, outcome="drained") if len(cluster.started) == 1 else done(task)

    cluster = Imagined(100, work)
    events = run(cluster, [stage(3)], max_workers=1)
    assert [e.values["cause"] for e in events if e.kind == "worker-down"] == ["it was told to end"]
    assert len([1 for workers, _ in asked if workers == 1]) <= 2  # the two tasks it had
    assert sorted(e.shard for e in events if e.kind == "report" and e.shard is not None) == [0, 1, 2]
