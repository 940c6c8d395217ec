"""Packing: which labelers share a process and how many there are; numbers in, numbers out."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataengine import local, packing
from dataengine.groups import Cost, Group, Node, Packing, cost, names
from dataengine.measured import Batch, Measured, from_json
from dataengine.packing import HEADROOM, pack, stages
from dataengine.plan import plan_labels
from tests.fakes import Inverted, Threshold, ingested

GB = 1 << 30
H200 = Node(cpus=16, gpus=1, gpu_bytes=139 * GB, memory_bytes=128 * GB)
CORES = Node(cpus=8, memory_bytes=32 * GB)


RGB = ("rgb",)


def on_gpu(name: str, seconds: float, gb: float = 4.0, *, inputs: tuple[str, ...] = RGB, busy: float = 1.0) -> Cost:
    memory = {"weights_bytes": int(gb * GB * 0.75), "peak_bytes": int(gb * GB * 0.25)}
    kind = {"labeler": name, "inputs": inputs, "emits": (f"{name}-out",)}
    return Cost(**kind, seconds=seconds, cpu_seconds=seconds / 4, gpu=True, busy=busy, batch=8, **memory)


def on_cpu(name: str, seconds: float, *, inputs: tuple[str, ...] = RGB, gb: float = 0.1) -> Cost:
    kind = {"labeler": name, "inputs": inputs, "emits": (f"{name}-out",)}
    return Cost(**kind, seconds=seconds, cpu_seconds=seconds, weights_bytes=int(gb * GB))


def groups_of(packed: Packing) -> list[set[str]]:
    return [set(g.labelers) for g in packed.groups]


# -- which labelers share a process --------------------------------------------------------------------------------


def test_without_gpus_one_group_decodes_once_and_has_a_worker_a_core() -> None:
    made = pack([on_cpu("canny", 0.01), on_cpu("sam", 2.0), on_cpu("edges", 0.1, inputs=("sam-out",))], [CORES])
    (group,) = made.groups
    assert (group.labelers, group.workers, group.num_cpus, group.num_gpus) == (("canny", "sam", "edges"), 8, 1.0, 0.0)
    assert made.images_per_second == pytest.approx(8 / 2.11)


def test_without_gpus_a_labeler_that_asks_for_one_runs_on_the_cpu() -> None:
    (group,) = pack([on_gpu("sam", 1.0, gb=1.0), on_cpu("canny", 0.1)], [CORES]).groups
    assert (group.num_gpus, group.workers) == (0.0, 8)


def test_memory_that_holds_few_heavy_workers_leaves_the_other_cores_to_light_labelers() -> None:
    heavy, light = on_cpu("heavy", 1.0, gb=10.0), on_cpu("light", 1.0)
    together = pack([heavy, light], [replace(CORES, memory_bytes=128 * GB)])
    assert groups_of(together) == [{"heavy", "light"}]
    assert together.groups[0].workers == 8
    apart = pack([heavy, light], [CORES])
    assert groups_of(apart) == [{"heavy"}, {"light"}]
    by_name = {g.name: g.workers for g in apart.groups}
    assert by_name == {"heavy": 2, "light": 2}
    assert "memory" in apart.groups[0].reason


def test_networks_that_fit_share_the_gpu_and_others_are_split_into_as_few_groups_as_memory_needs() -> None:
    four = [on_gpu(name, 0.1, gb=30.0) for name in "abcd"]
    fits = pack(four, [H200])
    assert groups_of(fits) == [{"a", "b", "c", "d"}]
    assert (fits.groups[0].num_gpus, fits.groups[0].workers) == (1.0, 1)
    assert "fit on one GPU together" in fits.groups[0].reason
    small = [replace(H200, gpu_bytes=80 * GB)] * 2
    split = pack(four, small)
    assert sorted(map(len, groups_of(split))) == [2, 2]
    assert all(g.memory_bytes < HEADROOM * 80 * GB and g.workers == 1 for g in split.groups)
    assert split.at_once


def test_cpu_labelers_get_cores_to_spare_and_else_ride_along() -> None:
    costs = [on_gpu("sam", 0.5), on_cpu("canny", 0.5), on_cpu("edges", 0.5, inputs=("sam-out",))]
    roomy = pack(costs, [H200])
    assert groups_of(roomy) == [{"sam"}, {"canny", "edges"}]
    assert roomy.groups[1].needs == ("sam",)
    assert roomy.groups[1].workers == 2
    tight = pack(costs, [replace(H200, cpus=1)])
    assert groups_of(tight) == [{"sam", "canny", "edges"}]


def test_a_cpu_labeler_between_two_gpu_labelers_never_makes_groups_wait_for_one_another() -> None:
    first, middle = on_gpu("first", 0.1), on_cpu("middle", 0.1, inputs=("first-out",))
    last = on_gpu("last", 0.1, inputs=("middle-out",))
    assert groups_of(pack([first, middle, last], [H200])) == [{"first", "middle", "last"}]


def test_a_network_that_leaves_the_gpu_idle_gets_several_processes_on_it() -> None:
    (group,) = pack([on_gpu("sam", 0.4, gb=8.0, busy=0.3)], [H200]).groups
    assert (group.num_gpus, group.workers) == (0.33, 3)
    (full,) = pack([on_gpu("sam", 0.4, gb=100.0, busy=0.3)], [H200]).groups
    assert (full.num_gpus, full.workers) == (1.0, 1)


def test_groups_that_do_not_fit_at_once_take_turns_and_one_that_never_fits_says_so() -> None:
    made = pack([on_gpu("a", 0.1, gb=100.0), on_gpu("b", 0.3, gb=100.0)], [H200])
    assert not made.at_once
    assert made.images_per_second == pytest.approx(1 / 0.4)
    assert "take turns" in made.groups[0].reason
    huge = pack([on_gpu("huge", 0.1, gb=200.0)], [H200])
    assert "batches will have to shrink" in huge.groups[0].reason
    with pytest.raises(ValueError, match=r"sam, which asks for 1 CPUs and 2 GPUs: the nodes have 16 CPUs and 1 GPUs"):
        pack([on_gpu("sam", 0.1)], [H200], pins=[Group(labelers=("sam",), num_gpus=2.0)])


# -- what a recipe fixes ---------------------------------------------------------------------------------------------


def test_pins_are_kept_and_the_rest_is_packed_around_them() -> None:
    pin = Group(labelers=("sam", "nobody"), num_gpus=0.5, num_cpus=2.0, max_workers=1, batches={"sam": 2})
    made = pack([on_gpu("sam", 1.0), on_gpu("clip", 0.1), on_cpu("canny", 0.01)], [H200], pins=[pin])
    fixed = next(g for g in made.groups if g.labelers == ("sam",))
    assert (fixed.num_gpus, fixed.num_cpus, fixed.workers, fixed.max_workers) == (0.5, 2.0, 1, 1)
    assert fixed.batches == {"sam": 2}
    assert "recipe" in fixed.reason
    (laptop,) = pack([on_gpu("sam", 1.0)], [CORES], pins=[pin]).groups
    assert (laptop.num_gpus, laptop.num_cpus, laptop.workers) == (0.0, 2.0, 1)


def test_pins_that_contradict_themselves_are_refused() -> None:
    a, b = on_cpu("a", 1.0), on_cpu("b", 1.0, inputs=("a-out",))
    c = on_cpu("c", 1.0, inputs=("b-out",))
    with pytest.raises(ValueError, match="a is named twice"):
        pack([a, b], [CORES], pins=[Group(labelers=("a",)), Group(labelers=("a", "b"))])
    with pytest.raises(ValueError, match=r"wait for one another: a\+c"):
        pack([a, b, c], [CORES], pins=[Group(labelers=("a", "c"))])


# -- how many workers ------------------------------------------------------------------------------------------------

SECONDS = st.floats(0.01, 5.0)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(SECONDS, min_size=1, max_size=3), st.integers(1, 7), st.integers(1, 9))
def test_the_slowest_group_is_as_fast_as_any_numbers_of_workers_could_make_it(
    seconds: list[float], cpus: int, limit: int
) -> None:
    costs = [on_cpu(f"l{i}", s) for i, s in enumerate(seconds)]
    pins = [Group(labelers=(c.labeler,)) for c in costs]
    made = pack(costs, [Node(cpus=cpus)], pins=pins, limit=limit)
    room = min(cpus, limit)
    if len(seconds) > room:
        assert not made.at_once
        return
    every = itertools.product(range(1, room + 1), repeat=len(seconds))
    best = max(min(n / s for n, s in zip(counts, seconds, strict=True)) for counts in every if sum(counts) <= room)
    assert made.images_per_second == pytest.approx(best)
    assert sum(g.workers for g in made.groups) <= room


@st.composite
def _costs(draw: st.DrawFn) -> list[Cost]:
    out: list[Cost] = []
    for i in range(draw(st.integers(1, 6))):
        earlier = st.sets(st.integers(0, i - 1), max_size=2) if i else st.just(set())
        inputs = ("rgb", *(f"l{j}-out" for j in sorted(draw(earlier))))
        gb = draw(st.floats(0.1, 60.0))
        if draw(st.booleans()):
            out.append(on_gpu(f"l{i}", draw(SECONDS), gb, inputs=inputs, busy=draw(st.floats(0.05, 1.0))))
        else:
            out.append(on_cpu(f"l{i}", draw(SECONDS), inputs=inputs, gb=min(gb, 4.0)))
    return out


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    _costs(),
    st.lists(
        st.builds(
            Node,
            cpus=st.integers(1, 32),
            gpus=st.sampled_from([0, 1, 2, 8]),
            gpu_bytes=st.sampled_from([0, 24 * GB, 80 * GB]),
            memory_bytes=st.sampled_from([0, 64 * GB]),
        ),
        min_size=1,
        max_size=3,
    ),
    st.floats(0.0, 0.1),
)
def test_whatever_is_packed_is_complete_in_order_and_fits(costs: list[Cost], nodes: list[Node], decode: float) -> None:
    made = pack(costs, nodes, decode_seconds=decode)
    assert sorted(name for g in made.groups for name in g.labelers) == sorted(c.labeler for c in costs)
    assert len({g.name for g in made.groups}) == len(made.groups)
    maker = {m: g.name for g in made.groups for c in costs if c.labeler in g.labelers for m in c.emits}
    earlier: set[str] = set()
    for g in made.groups:
        inputs = {m for c in costs if c.labeler in g.labelers for m in c.inputs}
        assert set(g.needs) == {maker[m] for m in inputs if m in maker} - {g.name}
        assert set(g.needs) <= earlier
        earlier.add(g.name)
        assert g.workers >= 1
        assert g.num_cpus > 0
        assert g.reason
        positions = [[c.labeler for c in costs].index(name) for name in g.labelers]
        assert positions == sorted(positions)
    at_once = [made.groups] if made.at_once else [(g,) for g in made.groups]
    for present in at_once:
        assert sum(g.num_cpus * g.workers for g in present) <= sum(n.cpus for n in nodes) + 1e-6
        assert sum(g.num_gpus * g.workers for g in present) <= sum(n.gpus for n in nodes) + 1e-6
    assert math.isfinite(made.images_per_second)
    assert made == pack(costs, nodes, decode_seconds=decode)


# -- measurements ----------------------------------------------------------------------------------------------------


def measured(seconds: dict[int, float], **changes: object) -> Measured:
    batches = tuple(Batch(size=n, seconds=s, cpu_seconds=s, peak_bytes=n * 1000) for n, s in seconds.items())
    values = {"load_seconds": 1.0, "warmup_seconds": 0.5, "weights_bytes": 7, "device_bytes": 0, "pixels": 1e5}
    return Measured(**{"labeler": "threshold", "device": "cpu", "batches": batches, **values, **changes})


def test_a_measurement_survives_json_and_anything_else_is_refused() -> None:
    seen = measured({1: 0.1, 2: 0.15}, bytes_out={"depth": 12.5}, busy=0.7, full_at=4)
    assert from_json(seen.as_json()) == seen
    for text in ("", "[]", "{}", '{"batches": 3}', seen.as_json().replace("size", "sise")):
        with pytest.raises(ValueError):  # noqa: PT011  json's own error is one, too
            from_json(text)
    with pytest.raises(ValueError, match="batch sizes that ascend"):
        measured({2: 0.1, 1: 0.1})


def test_the_own_batch_size_stays_unless_a_larger_one_is_faster_or_it_does_not_fit() -> None:
    assert measured({1: 0.1, 2: 0.2}).best_batch(8) == 8
    assert measured({1: 0.1, 2: 0.1, 4: 0.1, 8: 0.1, 16: 0.199}).best_batch(2) == 8
    assert measured({1: 0.1, 2: 0.1, 4: 0.199}).best_batch(2) == 2
    assert measured({1: 0.1, 2: 0.1}, full_at=4).best_batch(8) == 2
    at = measured({1: 0.1, 4: 0.2}).at(8)
    assert (at.seconds, at.peak_bytes) == (pytest.approx(0.4), 8000)


def test_a_cost_is_what_was_measured_at_the_batch_size_or_a_marked_guess() -> None:
    labeler = Threshold()
    seen = measured({1: 0.1, 4: 0.2}, encode_seconds=0.01)
    at = cost("threshold", labeler, seen, 4, gpu=False)
    assert (at.seconds, at.peak_bytes, at.measured) == (pytest.approx(0.06), 4000, True)
    guess = cost("threshold", labeler, None, 4, gpu=False)
    assert not guess.measured
    (group,) = pack([guess], [CORES]).groups
    assert "not measured: threshold" in group.reason


# -- groups as stages ------------------------------------------------------------------------------------------------


def test_stages_split_the_tasks_of_a_plan_and_label_it_whole(tmp_path: Path) -> None:
    dataset = ingested(tmp_path, count=10, shard_size=4)
    plan = plan_labels(dataset, ["canny_edge", "sam_edge"], [Threshold(), Inverted()])
    own = names(plan.labelers)
    costs = [cost(n, x, None, x.batch_size, gpu=False) for n, x in zip(own, plan.labelers, strict=True)]
    costs[0] = replace(costs[0], batch=2)
    made = pack(costs, [CORES], pins=[Group(labelers=(name,)) for name in own])
    first, second = stages(made, plan, dataset.store.url)
    assert (first.needs, second.needs) == ((), (first.name,))
    assert (first.window, second.window) == (2, 8)
    assert first.num_rows == {shard: len(dataset.keys(shard)) for shard in (0, 1, 2)}
    assert [t.specs.keys() for t in first.tasks] == [{"canny_edge"}] * 3
    for stage in (first, second):
        local.run(stage.worker, stage.tasks, workers=1, device="cpu", on_report=lambda report: None)
    again = plan_labels(dataset, ["canny_edge", "sam_edge"], [Threshold(), Inverted()])
    assert (again.num_cells, again.num_done) == (0, 6)
    assert stages(made, again, dataset.store.url) == ()


def test_a_stage_without_cells_is_left_out_and_nobody_waits_for_it(tmp_path: Path) -> None:
    dataset = ingested(tmp_path, count=4, shard_size=4)
    done = plan_labels(dataset, ["canny_edge"], [Threshold()])
    local.run(done.group(dataset.store.url), done.tasks, workers=1, device="cpu", on_report=lambda report: None)
    plan = plan_labels(dataset, ["canny_edge", "sam_edge"], [Threshold(), Inverted()])
    own = names(plan.labelers)
    costs = [cost(n, x, None, x.batch_size, gpu=False) for n, x in zip(own, plan.labelers, strict=True)]
    made = pack(costs, [CORES], pins=[Group(labelers=(name,)) for name in own])
    (stage,) = stages(made, plan, dataset.store.url, num_rows={0: 4})
    assert (stage.needs, set(stage.tasks[0].specs)) == ((), {"sam_edge"})


def test_labelers_of_one_name_are_told_apart() -> None:
    labelers = [Threshold(), Inverted(), Threshold(level=3)]
    own = names(labelers)
    assert len(set(own)) == 3
    assert own[2].endswith("#3")
    assert packing.pack([], [CORES]) == Packing(())
