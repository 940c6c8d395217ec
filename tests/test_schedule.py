"""The schedule, run against simulated workers: everything done once and in order, nobody idle while there is work."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataengine.schedule import MIN_SECONDS, Schedule, Stage
from dataengine.work import LabelGroup, Task


def stage(name: str, rows: Mapping[int, int], seconds: float = 1.0, **settings: object) -> Stage:
    tasks = tuple(Task(shard, {name: "spec"}) for shard in rows)
    defaults: dict[str, object] = {"window": 8}
    return Stage(
        name=name, worker=LabelGroup("root", ()), tasks=tasks, num_rows=rows, seconds_per_row=seconds,
        **(defaults | settings),  # type: ignore[arg-type]
    )  # fmt: skip


@dataclass
class Run:
    """What simulated workers did: (end, stage, task) in order, and when the last of them was done."""

    ended: list[tuple[float, str, Task]] = field(default_factory=list)
    started: list[tuple[float, str, Task]] = field(default_factory=list)
    rows: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    makespan: float = 0.0


def simulate(stages: Sequence[Stage], workers: Mapping[str, int], lose: Sequence[int] = ()) -> Run:
    """Fixed numbers of workers with the expected speed; the attempts whose numbers are in `lose` come back undone."""
    schedule, run = Schedule(stages), Run()
    free = dict(workers)
    clock, busy, numbers = 0.0, list[tuple[float, int, str, Task]](), itertools.count()
    while not schedule.finished:
        for name in free:
            while free[name] and (task := schedule.take(name, workers[name])) is not None:
                count = 0
                if task.rows is not None:
                    count = task.rows[1] - task.rows[0]
                elif (name, task.shard) not in run.rows:
                    count = schedule.stages[name].num_rows[task.shard]
                free[name] -= 1
                run.started.append((clock, name, task))
                number = next(numbers)
                heapq.heappush(busy, (clock + count * schedule.stages[name].seconds_per_row, number, name, task))
        assert busy, "nothing runs and nothing is finished"
        clock, number, name, task = heapq.heappop(busy)
        free[name] += 1
        if number in lose:
            schedule.again(name, task, later=number % 2 == 0)
            continue
        if task.rows is not None:
            run.rows.setdefault((name, task.shard), []).extend(range(*task.rows))
        schedule.done(name, task)
        run.ended.append((clock, name, task))
    run.makespan = clock
    return run


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    workers=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seconds=st.tuples(st.floats(0.01, 3.0), st.floats(0.01, 3.0)),
    lose=st.lists(st.integers(0, 30), max_size=8),
)
def test_every_shard_is_committed_once_after_all_its_rows_and_what_it_needs(
    rows: list[int], workers: tuple[int, int], seconds: tuple[float, float], lose: list[int]
) -> None:
    by_shard = dict(enumerate(rows))
    stages = [stage("sam", by_shard, seconds[0]), stage("edges", by_shard, seconds[1], needs=("sam",), window=3)]
    run = simulate(stages, dict(zip(("sam", "edges"), workers, strict=True)), lose)
    for name in ("sam", "edges"):
        whole = [task.shard for _, n, task in run.ended if n == name and task.rows is None]
        assert sorted(whole) == sorted(by_shard)
    for (name, shard), done in run.rows.items():
        assert sorted(done) == list(range(by_shard[shard]))
        window = 8 if name == "sam" else 3
        ranges = [t.rows for _, n, t in run.ended if (n, t.shard) == (name, shard) and t.rows is not None]
        assert all(a % window == 0 and (b % window == 0 or b == by_shard[shard]) for a, b in ranges)
        last = max(end for end, n, t in run.ended if (n, t.shard) == (name, shard) and t.rows is not None)
        whole_starts = [t for t, n, task in run.started if (n, task.shard, task.rows) == (name, shard, None)]
        assert whole_starts[-1] >= last  # an attempt before the split may have been lost
    committed = {task.shard: end for end, n, task in run.ended if n == "sam" and task.rows is None}
    assert all(start >= committed[task.shard] for start, n, task in run.started if n == "edges")


def test_the_longest_shard_comes_first_and_a_lost_one_before_all() -> None:
    schedule = Schedule([stage("sam", {0: 10, 1: 30, 2: 20})])
    first = schedule.take("sam", 1)
    assert first is not None
    assert first.shard == 1
    schedule.again("sam", first)
    assert [t.shard for t in iter(lambda: schedule.take("sam", 1), None)] == [1, 2, 0]


def test_the_tail_is_split_so_that_all_workers_end_together() -> None:
    run = simulate([stage("sam", dict.fromkeys(range(9), 1000), 1.0)], {"sam": 8})
    # Whole shards only: the ninth would be alone for 1,000 s, and the end come at 2,000 s.
    assert run.makespan < 1.03 * 9 * 1000 / 8


def test_short_work_is_not_split() -> None:
    seconds = MIN_SECONDS / 2000
    run = simulate([stage("canny", dict.fromkeys(range(5), 1000), seconds)], {"canny": 4})
    assert all(task.rows is None for _, _, task in run.ended)


def test_a_second_task_waits_on_a_worker_only_while_there_is_plenty() -> None:
    schedule = Schedule([stage("sam", dict.fromkeys(range(5), 100), 0.001)])
    assert schedule.take("sam", 2) is not None
    assert schedule.take("sam", 2) is not None
    assert schedule.take("sam", 2, ahead=True) is not None
    assert schedule.take("sam", 2, ahead=True) is None
    assert schedule.take("sam", 2) is not None


def test_workers_go_where_the_run_would_end_last_and_leave_what_has_run_dry() -> None:
    stages = [stage("sam", dict.fromkeys(range(50), 100), 3.0), stage("depth", dict.fromkeys(range(50), 100), 1.0)]
    schedule = Schedule(stages)
    room = {"CPU": 8.0, "GPU": 0.0}
    assert schedule.num_workers(room, {}) == {"sam": 6, "depth": 2}
    for _ in range(50):
        task = schedule.take("sam", 1)
        assert task is not None
        schedule.done("sam", task)
    assert schedule.num_workers(room, {"sam": 6, "depth": 2}) == {"sam": 0, "depth": 8}


def test_workers_respect_gpus_and_limits_and_a_stage_that_must_wait_has_none() -> None:
    rows = dict.fromkeys(range(50), 100)
    stages = [
        stage("sam", rows, 3.0, num_gpus=0.5),
        stage("canny", rows, 1.0, max_workers=2),
        stage("edges", rows, 9.0, needs=("sam",)),
    ]
    wanted = Schedule(stages).num_workers({"CPU": 16.0, "GPU": 1.0}, {})
    assert wanted == {"sam": 2, "canny": 2, "edges": 0}


def test_a_shard_that_is_given_up_is_missing_downstream_too_and_the_rest_goes_on() -> None:
    schedule = Schedule([stage("sam", {0: 8, 1: 8}), stage("edges", {0: 8, 1: 8}, needs=("sam",))])
    task = schedule.take("sam", 1)
    assert task is not None
    assert schedule.give_up("sam", task, "no luck") == [("sam", 0), ("edges", 0)]
    other = schedule.take("sam", 1)
    assert other is not None
    schedule.done("sam", other)
    last = schedule.take("edges", 1)
    assert last is not None
    assert last.shard == 1
    schedule.done("edges", last)
    assert schedule.finished
    assert schedule.failed["edges", 0] == "needs sam, which failed: no luck"


def test_a_range_of_a_shard_that_was_given_up_changes_nothing_when_it_ends() -> None:
    schedule = Schedule([stage("sam", {0: 100, 1: 100}, 10.0)])
    taken = [schedule.take("sam", 4) for _ in range(3)]
    assert all(t is not None and t.rows is not None for t in taken)
    first, second, third = (t for t in taken if t is not None)
    schedule.give_up("sam", first, "poison")
    schedule.done("sam", second)
    schedule.again("sam", third)
    assert all(t.shard == 1 for t in iter(lambda: schedule.take("sam", 1), None))


def test_stages_must_have_their_own_names_and_known_needs() -> None:
    with pytest.raises(ValueError, match="unique"):
        Schedule([stage("sam", {0: 1}), stage("sam", {0: 1})])
    with pytest.raises(ValueError, match="needed but not there"):
        Schedule([stage("sam", {0: 1}, needs=("depth",))])
