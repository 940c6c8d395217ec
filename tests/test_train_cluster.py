"""Training in two workers of a real Ray cluster, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from pipelines import (
    cluster_train,
    commands,  # noqa: F401  registers `train`
    train,
)
from pipelines.cli import app
from pipelines.train import TrainFourM
from tests import packed_sources as sources

STEPS = 30


def recipe(data: Path, out: Path) -> TrainFourM:
    run = sources.run(data, out, steps=STEPS)
    return replace(run, batch_size=2, loop=replace(run.loop, batches_per_step=2, log_every=1, checkpoint_every=4))


def lines(out: Path) -> list[dict[str, float]]:
    file = out / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def kill_a_worker(out: Path, after: int, killed: list[int]) -> None:
    """SIGKILL for the second of the training processes that this test started, once some steps are done."""
    while len(lines(out)) < after:
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in "".join(process.cmdline()[:1]):
            os.kill(process.pid, signal.SIGKILL)
            killed += [process.pid, len(lines(out))]
            return


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of its own settings, set by itself
def test_a_killed_worker_changes_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sources.write(tmp_path / "data")
    alone = train.train(recipe(tmp_path / "data", tmp_path / "alone"))

    killed: list[int] = []
    watch = threading.Thread(target=kill_a_worker, args=(tmp_path / "ray", 6, killed), daemon=True)
    watch.start()
    # The folder is relative: workers work where this process does.
    monkeypatch.chdir(tmp_path)
    run = replace(recipe(Path("data"), Path("ray")))
    result = cluster_train.train(run, num_workers=2, use_gpu=False)

    assert len(killed) == 2
    assert killed[1] < STEPS
    assert (result.finished, result.steps) == (True, STEPS)
    together, undisturbed = lines(tmp_path / "ray"), lines(tmp_path / "alone")
    assert [line["step"] for line in together] == [line["step"] for line in undisturbed] == [*range(1, STEPS + 1)]
    for one, other in zip(together, undisturbed, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert result.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-6)
    assert (tmp_path / "ray/model/model.safetensors").exists()
    assert result.checkpoint == Path("ray/checkpoint") / alone.checkpoint.name


def test_what_is_wrong_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*args, **kwargs):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster_train.actors, "connected", started)
    sources.write(tmp_path / "data")
    run = recipe(tmp_path / "data", tmp_path / "out")
    with pytest.raises(ValueError, match="no dataset holds rgb@64"):
        cluster_train.train(replace(run, inputs=(*run.inputs, "rgb@64")))
    assert not (tmp_path / "out").exists()


def test_options_of_ray_need_ray() -> None:
    said = CliRunner().invoke(app, ["train", "nano", "--num-workers", "2"])
    assert said.exit_code == 2
