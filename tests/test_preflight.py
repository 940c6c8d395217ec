"""Preflight and planning: what is measured, what is kept of it, and which batch sizes a root keeps to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataengine import local
from dataengine.groups import Group
from dataengine.labeler import Labeler, Loaded
from dataengine.manifest import Conflict, Dataset
from dataengine.measured import Batch, Measured
from dataengine.plan import plan_labels
from dataengine.sample import Sample
from dataengine.work import Task
from pipelines import planning, preflight
from pipelines.measure import device_name, measure, measure_and_label
from tests.fakes import Inverted, Threshold, ingested

IMAGES = [Sample(f"k{i}", {"rgb": np.full((20, 30, 3), 20 * i, np.uint8)}) for i in range(4)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/dataengine/preflight"


@dataclass(frozen=True, kw_only=True)
class Scripted(Labeler):
    """Takes a fixed time a call and some a sample, and fails in ways that it is told."""

    inputs = ("rgb",)
    emits = ("canny_edge",)
    batch_size = 2

    per_call: float = 0.0
    per_sample: float = 0.0
    full_at: int = 1000
    bad_keys: tuple[str, ...] = ()

    def load(self, device: str) -> Loaded:
        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            if len(samples) >= self.full_at:
                raise MemoryError("out of memory")
            if any(s.key in self.bad_keys for s in samples):
                raise RuntimeError("cannot label this")
            time.sleep(self.per_call + self.per_sample * len(samples))
            return [{"canny_edge": np.zeros(s.size, np.uint8)} for s in samples]

        return run


class FakeGpu:
    """A device of which a batch of n images takes n kilobytes."""

    def __init__(self, total: int) -> None:
        self.total, self.held, self.most = total, 0, 0

    def used(self) -> int:
        return self.held

    def restart(self) -> None:
        self.most = self.held

    def peak(self) -> int:
        return self.most

    def watched(self, labeler: Labeler) -> Labeler:
        return _Watched(inner=labeler, touch=self._touch)

    def _touch(self, size: int) -> None:
        self.most = max(self.most, self.held + 1000 * size)


@dataclass(frozen=True, kw_only=True)
class _Watched(Labeler):
    inputs = ("rgb",)
    emits = ("canny_edge",)
    inner: Labeler
    touch: Callable[[int], None]

    def load(self, device: str) -> Loaded:
        call = self.inner.load(device)

        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            self.touch(len(samples))
            return call(samples)

        return run


# -- one labeler -------------------------------------------------------------------------------------------------------


def test_batches_grow_while_that_makes_a_labeler_faster() -> None:
    seen = measure(Scripted(per_call=0.02), IMAGES, "cpu")
    sizes = [b.size for b in seen.batches]
    assert sizes == [2**i for i in range(len(sizes))]
    assert len(sizes) > 3
    assert seen.batches[2].images_per_second > 2 * seen.batches[0].images_per_second
    assert seen.best_batch(2) > 2
    flat = measure(Scripted(per_sample=0.02), IMAGES, "cpu")
    assert len(flat.batches) < len(seen.batches)
    assert flat.batches[0].seconds == pytest.approx(0.02, rel=0.8)
    assert flat.best_batch(8) == 8
    assert flat.bytes_out["canny_edge"] > 20
    assert (flat.labeler, flat.device, flat.pixels) == ("test_preflight", device_name("cpu"), 600)
    assert flat.busy is None


def test_running_out_of_memory_ends_the_growth_and_one_image_too_many_says_so() -> None:
    seen = measure(Scripted(per_call=0.01, full_at=4), IMAGES, "cpu")
    assert ([b.size for b in seen.batches], seen.full_at) == ([1, 2], 4)
    assert seen.best_batch(8) == 2
    with pytest.raises(ValueError, match="none of 4 images could be labelled: MemoryError: out of memory"):
        measure(Scripted(full_at=1), IMAGES, "cpu")


def test_growing_ends_when_the_memory_of_the_device_is_nearly_full() -> None:
    device = FakeGpu(total=9_000)
    seen, _ = measure_and_label(device.watched(Scripted(per_call=0.01)), IMAGES, "cpu", device)
    assert [(b.size, b.peak_bytes) for b in seen.batches] == [(1, 1000), (2, 2000), (4, 4000), (8, 8000)]


def test_images_that_cannot_be_labelled_are_left_out_unless_all_are() -> None:
    labeler = Scripted(bad_keys=("k1", "k3"))
    _, outputs = measure_and_label(labeler, IMAGES, "cpu")
    assert [bool(o) for o in outputs] == [True, False, True, False]
    with pytest.raises(ValueError, match="none of 4 images could be labelled: RuntimeError: cannot label this"):
        measure(replace(labeler, bad_keys=tuple(s.key for s in IMAGES)), IMAGES, "cpu")


def test_a_slow_labeler_is_called_as_rarely_as_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.measure.MAX_SECONDS", 0.2)
    calls: list[int] = []
    labeler = _Watched(inner=Scripted(per_sample=0.15), touch=calls.append)
    assert [b.size for b in measure(labeler, IMAGES[:1], "cpu").batches] == [1]
    # One to see that it works, one to warm up, one that counts.
    assert calls == [1, 1, 1]


# -- the labelers of a dataset ---------------------------------------------------------------------------------------


def test_labelers_are_measured_in_a_process_of_their_own_and_not_twice(tmp_path: Path, cache: Path) -> None:
    dataset = ingested(tmp_path)
    chain = (Threshold(), Inverted())
    seen = preflight.preflight(dataset, chain, "cpu")
    assert list(seen) == ["fakes", "fakes#2"]
    assert list(seen["fakes#2"].bytes_out) == ["sam_edge"]
    assert all(m.decode_seconds > 0 for m in seen.values())
    assert dataset.modalities() == ["rgb", "caption", "crop_settings"]
    assert len(list(cache.iterdir())) == 2
    assert preflight.preflight(dataset, chain, "cpu") == seen
    assert planning.kept(chain, "cpu") == seen


def test_what_is_kept_is_measured_again_when_asked_when_damaged_and_for_other_images(
    tmp_path: Path, cache: Path
) -> None:
    dataset = ingested(tmp_path)

    def examined(again: bool = False) -> list[Measured]:
        return preflight.examine(dataset, [Threshold(seconds=0.001), Inverted()], 0, "cpu", again=again)

    first = examined()
    assert examined() == first
    assert examined(again=True) != first
    files = {p: p.read_text() for p in cache.iterdir()}
    path = next(p for p, text in files.items() if "canny_edge" in text)
    path.write_text(files[path][:50])
    second = examined()
    # The labeler that was damaged is measured, the one that reads its labels is not.
    assert [len(second), second[1]] == [2, preflight.kept(Inverted(), device_name("cpu"))]
    assert path.read_text() == second[0].as_json() + "\n"
    kept = preflight.kept(Threshold(seconds=0.001), device_name("cpu"))
    assert kept is not None
    preflight.keep(Threshold(seconds=0.001), replace(kept, pixels=1e7))
    assert examined()[0].pixels < 1e4


def test_preflight_is_a_worker_that_can_be_sent_elsewhere(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    reports = []
    worker = preflight.Preflight(dataset.store.url, (Inverted(), Threshold())[::-1])
    local.run(worker, [Task(0, {})], workers=1, device="cpu", on_report=reports.append)
    (report,) = reports
    assert [json.loads(note)["labeler"] for note in report.notes] == ["fakes", "fakes"]
    assert report.cells == ()


@pytest.mark.ray
def test_labelers_are_measured_on_a_worker_of_ray(tmp_path: Path, cache: Path) -> None:
    dataset = ingested(tmp_path)
    seen = preflight.preflight(dataset, [Threshold(seconds=0.01)], "cpu", on_ray=True)
    assert seen["fakes"].batches[0].seconds >= 0.01
    assert planning.kept([Threshold(seconds=0.01)], "cpu") == seen


def test_a_driver_without_gpus_takes_what_was_measured_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_gpus", list)
    on_gpu = replace(faster_with_16(), device="Imaginary GPU", gpu=True, device_bytes=8 << 30)
    preflight.keep(Threshold(), on_gpu)
    assert planning.kept([Threshold()], "cuda") == {"fakes": on_gpu}
    assert planning.kept([Threshold()], "cpu") == {}


# -- batch sizes -------------------------------------------------------------------------------------------------------


def faster_with_16() -> Measured:
    batches = tuple(Batch(size=n, seconds=1.0, cpu_seconds=1.0) for n in (1, 2, 4, 8, 16))
    zero = {"load_seconds": 0.0, "warmup_seconds": 0.0, "weights_bytes": 0, "device_bytes": 0, "pixels": 1.0}
    return Measured(labeler="fakes", device="cpu", batches=batches, **zero)


def test_a_root_keeps_to_the_batch_size_of_its_first_run(tmp_path: Path) -> None:
    dataset, labeler = ingested(tmp_path), Threshold()
    seen = {"fakes": faster_with_16()}
    assert planning.chosen_batches(dataset, [labeler], seen, {}, record=False) == {"fakes": 16}
    assert dataset.store.folders("runs") == []
    assert planning.chosen_batches(dataset, [labeler], seen, {}) == {"fakes": 16}
    assert planning.chosen_batches(dataset, [labeler], {}, {}) == {"fakes": 16}
    assert planning.chosen_batches(dataset, [labeler], {}, {"fakes": 16}) == {"fakes": 16}
    with pytest.raises(Conflict, match=r"fixes batches of 4 for fakes.*batches of 16.*--replace canny_edge"):
        planning.chosen_batches(dataset, [labeler], {}, {"fakes": 4})
    assert planning.chosen_batches(dataset, [labeler], {}, {"fakes": 4}, replace=["canny_edge"]) == {"fakes": 4}
    assert planning.chosen_batches(dataset, [labeler], seen, {}) == {"fakes": 4}
    # Other settings are another labeler.
    assert planning.chosen_batches(dataset, [Threshold(level=9)], {}, {}) == {"fakes": 3}


def test_a_column_from_before_sizes_were_recorded_keeps_the_labelers_own(tmp_path: Path) -> None:
    dataset, labeler = ingested(tmp_path), Threshold()
    plan = plan_labels(dataset, ["canny_edge"], [labeler])
    local.run(plan.group(dataset.store.url), plan.tasks[:1], workers=1, device="cpu", on_report=lambda report: None)
    with pytest.raises(Conflict):
        planning.chosen_batches(dataset, [labeler], {}, {"fakes": 5}, record=False)
    assert planning.chosen_batches(dataset, [labeler], {"fakes": faster_with_16()}, {}) == {"fakes": 3}


def test_stages_of_a_run_carry_the_chosen_batches_and_the_pins(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    plan = plan_labels(dataset, ["canny_edge"], [Threshold()])
    pins = [Group(labelers=("fakes",), max_workers=1, batches={"fakes": 2})]
    (stage,) = planning.stages(dataset, plan, pins, device="cpu")
    assert (stage.window, stage.max_workers, len(stage.tasks)) == (2, 1, 3)
    assert dict(stage.worker.batches) == {"fakes": 2}  # type: ignore[attr-defined]
    assert planning.stages(Dataset(dataset.store.url), plan, device="cpu")[0].window == 2
