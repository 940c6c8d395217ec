"""The benchmarks of the engine run to their end, on next to nothing, and end with one line of JSON."""

from __future__ import annotations

import json
import os
import sys
from types import ModuleType
from typing import Any

import pytest

from benchmarks import _report, engine_ceiling, engine_efficiency


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
