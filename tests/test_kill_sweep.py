"""Five instants of the kill sweep (benchmarks/engine_kill.py), on an S3 API server and a cluster of two nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import engine_kill

# Ray's test cluster leaves sockets to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.mark.ray
def test_a_run_killed_five_times_leaves_the_tree_of_a_calm_one(tmp_path: Path) -> None:
    base, calm = engine_kill.calm_tree(tmp_path)
    targets: list[engine_kill.Target] = ["worker", "driver", "raylet", "worker", "driver"]
    with engine_kill.s3() as bucket, engine_kill.cluster() as cluster:
        swept = engine_kill.fire(f"{bucket}/root", tmp_path / "sweep", targets, 0, cluster, calm, base)
    assert swept.kills == {"worker": 2, "driver": 2, "raylet": 1}
    assert swept.runs >= 2  # a calm one to learn how long it takes, and those that were disturbed
