"""The benchmarks of the engine run to their end, on next to nothing, and end with one line of JSON."""

from __future__ import annotations

import importlib
import json
import os
import sys
from types import ModuleType
from typing import Any

import pytest

from benchmarks import _published, _report, engine_ceiling, engine_efficiency, labelers, loader, train_step
from dataengine import plugins
from dataengine.measured import Batch, Measured
from pipelines import checkup


def quick(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [benchmark.__name__, "--quick", "--json"])
    with pytest.raises(SystemExit) as ended:
        _report.main(benchmark.measure)
    assert ended.value.code in (0, None)
    (line,) = capsys.readouterr().out.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert found["benchmark"] == benchmark.__name__.rsplit(".", 1)[-1]
    return found


@pytest.mark.ray
def test_ceiling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    amount = engine_ceiling.Amount(shard_size=4, per_core=1, rounds=1)
    monkeypatch.setattr(engine_ceiling, "QUICK", amount)
    monkeypatch.setattr(engine_ceiling, "MOST_CORES", 2)
    # The other way by Ray Data takes the same parts, and seconds to start.
    monkeypatch.delitem(engine_ceiling.WAYS, "raydata_queue")
    found = quick(engine_ceiling, monkeypatch, capsys)
    # That all ways write the same bytes is checked by the benchmark itself.
    assert set(found["figures"]) == set(engine_ceiling.WAYS)
    for way, figures in found["figures"].items():
        alone = engine_ceiling.WAYS[way][1] == 1
        assert figures["images"] == 4 * (1 if alone else min(found["cores"], 2))
        assert figures["images_per_second_per_core"] > 0
        assert figures["cpu_seconds_per_image"] >= 0
    assert all(found["ratios"][f"{ours}_over_plain"] > 0 for ours in engine_ceiling.BESIDE)


@pytest.mark.ray
def test_efficiency(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(engine_efficiency, "QUICK", 2)
    monkeypatch.setattr(engine_efficiency, "NODES", (1,))
    stages = engine_efficiency.measure(True, None)["nodes_1"]
    assert [stages[s]["images"] for s in engine_efficiency.STAGES] == [2 * engine_efficiency.SHARD_SIZE] * 2
    for stage in engine_efficiency.STAGES:
        assert stages[stage]["devices"] == 1
        assert 0 <= stages[stage]["idle"] < 1
        assert 0 < stages[stage]["throughput_share"] <= 1


def test_idle_and_share_are_those_of_the_noted_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Two devices of which one begins a batch later and waits once for a batch's time."""
    monkeypatch.setattr(engine_efficiency, "STAGES", {"slow": (engine_efficiency.STAGES["slow"][0], 1.0)})
    monkeypatch.setattr(engine_efficiency, "SHARD_SIZE", 28)
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "slow-1").write_text("".join(f"{t} {t + 1} 8\n" for t in (0.0, 1.0, 2.0, 3.0)))
    (logs / "slow-2").write_text("".join(f"{t} {t + 1} 8\n" for t in (1.0, 3.0)) + "4.0 5.0 8\n")
    for m in engine_efficiency.STAGES["slow"][0].emits:
        for shard in range(2):
            record = tmp_path / "commits" / m / f"shard-{shard:05d}.json"
            record.parent.mkdir(parents=True, exist_ok=True)
            record.touch()
            os.utime(record, (6.0, 6.0))
    found = engine_efficiency.figures(tmp_path, logs, 2, 2)["slow"]
    assert found["idle_of_each"] == [0.0, pytest.approx(0.25)]
    assert found["idle"] == pytest.approx(1 / 8)
    assert found["throughput_share"] == pytest.approx((56 - 8) / 5 / 16)
    assert found["tail_seconds"] == pytest.approx(2.0)


def test_labelers_runs_its_parts_and_adds_up_the_bill(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One part that compares and one that breaks, in place of those that take minutes."""

    def child(module: str, function: str, arguments: dict[str, Any], where: Any) -> Any:
        assert (where / "labelers" / "sam.py").exists()
        if function == "table":
            return labelers.table(**arguments) | {"clip_b16": {"mfu": 0.2}}
        if arguments["part"] == "_labelers_bad":
            raise RuntimeError("it broke")
        return {"sam": {"ours": 6.0, "plain": 2.0, "ours_ratio": 3.0}, "images": 4}

    expected = {"omnidata_depth": 255, "dinov2_b14": 46, "clip_b16": 35, "hmr2": 251, "t5": 222}
    monkeypatch.setattr(_published, "COUNTS", {name: _published.COUNTS[name] for name in expected})
    monkeypatch.setattr(labelers, "parts", lambda: ["_labelers_bad", "_labelers_good"])
    monkeypatch.setattr(labelers._fresh, "call", child)
    found = quick(labelers, monkeypatch, capsys)
    assert found["ratios"] == {"good.sam.ours_ratio": 3.0}
    assert found["failed"] == {"bad": "it broke"}
    bill = found["bill"]
    assert bill["measured"] == ["clip_b16"]
    gflop = found["published"]["gflop"]
    # Ten million images, the peak of an A100, and the part of it that was measured or is planned for.
    assert bill["a100_hours_of_each"]["clip_b16"] == pytest.approx(gflop["clip_b16"] * 1e16 / 312e12 / 0.2 / 3600)
    assert bill["a100_hours_of_each"]["t5"] == pytest.approx(gflop["t5"] * 1e16 / 312e12 / 0.4 / 3600)
    assert bill["a100_hours"] == pytest.approx(sum(bill["a100_hours_of_each"].values()))
    # As counted on the reference implementations.
    assert {name: round(each) for name, each in gflop.items()} == expected
    assert set(gflop) <= set(plugins.names("labelers"))
    assert round(found["published"]["million_parameters"]["t5"]) == 4762


def test_the_parts_of_labelers_are_found_by_their_names() -> None:
    for part in labelers.parts():
        assert callable(importlib.import_module(f"benchmarks.{part}").measure)


def test_a_row_of_the_table_is_of_the_fastest_batch() -> None:
    batches = (
        Batch(size=1, seconds=0.1, cpu_seconds=0.1),
        Batch(size=4, seconds=0.2, cpu_seconds=0.1, peak_bytes=10**9),
    )
    seen = Measured(
        labeler="x", device="NVIDIA A100-SXM4-80GB", load_seconds=1, warmup_seconds=1, weights_bytes=10**9,
        device_bytes=80 * 10**9, batches=batches, pixels=1.0, gpu=True,
    )  # fmt: skip
    found = labelers.row(checkup.Finding(labeler="x", emits=("depth",), gflop=3120.0, measured=seen))
    assert (found["batch"], found["images_per_second"], found["gigabytes"]) == (4, 20.0, 2.0)
    assert found["mfu"] == pytest.approx(0.2)
    assert found["gpu_hours"] == pytest.approx(1e7 / 20 / 3600)


def test_train_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A step of the smallest size on one modality of each kind, in this process."""

    def child(_module: str, function: str, arguments: dict[str, Any], where: Any) -> Any:
        assert (where / "model" / "fourm.py").exists()
        return getattr(train_step, function)(**arguments)

    monkeypatch.setattr(train_step, "QUICK", (("nano",), 1, 1, 1))
    monkeypatch.setattr(train_step, "NAMES", ("rgb@224", "t5_caption", "color_palette", "tok_depth@224"))
    monkeypatch.setattr(train_step._fresh, "call", child)
    ours = quick(train_step, monkeypatch, capsys)["sizes"]["nano"]["float32"]["ours"]
    assert ours["samples_per_s"] == pytest.approx(1 / ours["step_s"])
    assert 0 < ours["first_loss"] < 20
    assert 0 < ours["real"]["enc"] <= 1
    assert ours["peak_mb"] > 0


def test_loader_measures_every_case_and_compares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours really, on next to nothing and in this process; in place of the reference, what it would have said."""
    amount = loader.Amount(num_shards=2, shard_size=2, batch_size=2, count=200, warm=2, reference_count=4,
                           reference_warm=2, buffers=1, rounds=1, memory_batches=5, memory_batch_size=1)  # fmt: skip
    theirs = {"samples_per_cpu_second": 10.0, "samples_per_second": 8.0, "cpu_ms_per_sample": 100.0}
    held = {"resident_mb": 1000.0, "own_mb": 900.0, "private_mb": 800.0}
    called = []

    def call(module: str, function: str, arguments: dict[str, Any], where: Any) -> Any:
        assert (where / "pipelines" / "recipes" / "_fourm.py").exists()
        called.append(function)
        if function == "theirs":
            assert arguments["reference"][0] == str(loader._fresh.HERE)
            return {**theirs, "worker_memory": held}
        return getattr(loader, function)(**arguments)

    monkeypatch.setattr(loader, "QUICK", amount)
    monkeypatch.setattr(loader._fresh, "call", call)
    trained = loader._text_tokenizer
    monkeypatch.setattr(loader, "_text_tokenizer", lambda folder, reference: trained(folder, None))
    found = json.loads(json.dumps(loader.measure(True, loader._fresh.HERE)))
    assert called.count("theirs") == called.count("first") == 2
    assert set(found["ours"]) == {"images", "pixels", "tokens"}
    for case, sides in found["ours"].items():
        for place in ("one_process", "one_worker"):
            assert sides[place]["samples"] == 200
            assert sides[place]["samples_per_second"] > 0
            ratio = found["ratios"][case][place]["samples_per_cpu_second"]
            assert ratio == pytest.approx(sides[place]["samples_per_cpu_second"] / 10)
    sizes = found["kilobytes_a_sample"]
    assert 600 < sizes["tars"] < 900  # ml-4m's data set of 741
    assert sizes["packed"]["images"] < sizes["tars"] / 2 < sizes["packed"]["pixels"]
    assert [each["batches"] for each in found["memory"]["over_time"]] == [2, 3, 4, 5]
    own = found["ours"]["images"]["one_worker"]["worker_memory"]["own_mb"]
    assert found["ratios"]["memory"]["own_mb"] == pytest.approx(own / 900)
    # 228 GFLOP for a forward and backward pass on the 348 real tokens of the mean sample.
    assert 100 < found["feeding"]["gflop_per_sample"] < 400
    rate = found["feeding"]["samples_per_second"]
    assert rate == pytest.approx(0.45 * 989e3 / found["feeding"]["gflop_per_sample"])
    assert found["feeding"]["cores"]["images"] > 0
    assert "batches.py:__call__" in found["profile"]["with_callees_ms"]
