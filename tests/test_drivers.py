"""Two drivers on one root, and a driver that is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.fakes import tree, write_images
from tests.test_cli import ROOT, command, run

RECIPE = """
from pipelines.label import LabelRun
from tests.faulty import Faulty
def recipe():
    return LabelRun(labelers=(Faulty(seconds=0.2, calls={calls!r}),))
"""


def prepared(tmp_path: Path, *names: str) -> tuple[Path, Path]:
    """Ingested roots of these names, and a recipe whose labeler leaves a line in `calls` for every batch."""
    images = write_images(tmp_path / "images", 32)
    for name in names:
        assert (
            run("ingest", f"folder:{images}", tmp_path / name, "--shard-size", 8, "--runner", "local").returncode == 0
        )
    recipe, calls = tmp_path / "recipe.py", tmp_path / "calls"
    recipe.write_text(RECIPE.format(calls=str(calls)))
    return recipe, calls


def called(calls: Path) -> Counter[str]:
    return Counter(key for line in calls.read_text().splitlines() for key in line.split())


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.Popen(command(*arguments), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_two_drivers_on_one_root_share_the_work_and_do_nothing_twice(tmp_path: Path) -> None:
    recipe, calls = prepared(tmp_path, "calm", "root")
    assert run("label", tmp_path / "calm", "depth", "--recipe", recipe, "--runner", "local").returncode == 0
    calls.write_text("")
    drivers = [start("label", tmp_path / "root", "depth", "--recipe", recipe, "--runner", "local") for _ in range(2)]
    for driver in drivers:
        _, said = driver.communicate(timeout=120)
        assert driver.returncode == 0, said
    assert tree(tmp_path / "root") == tree(tmp_path / "calm")
    assert set(called(calls).values()) == {1}
    assert len(called(calls)) == 32


@pytest.mark.ray
def test_a_driver_that_is_told_to_stop_leaves_its_rows_and_the_next_goes_on(tmp_path: Path) -> None:
    recipe, calls = prepared(tmp_path, "calm", "root")
    assert run("label", tmp_path / "calm", "depth", "--recipe", recipe, "--runner", "local").returncode == 0
    calls.write_text("")
    driver = start("label", tmp_path / "root", "depth", "--recipe", recipe, "--workers", 1)
    while len(calls.read_text().splitlines()) < 2 and driver.poll() is None:
        time.sleep(0.02)
    driver.send_signal(signal.SIGTERM)
    _, said = driver.communicate(timeout=60)
    assert (driver.returncode, "run the same command again" in said) == (7, True), said
    assert not list((tmp_path / "root/leases").rglob("*.json"))
    again = run("label", tmp_path / "root", "depth", "--recipe", recipe, "--runner", "local")
    assert again.returncode == 0, again.stderr
    assert tree(tmp_path / "root") == tree(tmp_path / "calm")
    assert set(called(calls).values()) == {1}
