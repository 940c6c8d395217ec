"""Real Ray with several nodes: they go and come in the middle of a run, and the bytes are those of a calm one."""

from __future__ import annotations

import inspect
import os
import re
import signal
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import psutil
import pytest
import ray
import ray.exceptions
from ray._private import worker
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from rich.console import Console

from dataengine import actors, local, verdicts
from dataengine.events import Event
from dataengine.manifest import Dataset
from dataengine.plan import plan_labels
from dataengine.schedule import Stage
from dataengine.work import LabelGroup
from pipelines.live import RunState
from pipelines.table import table
from tests.fakes import Threshold, ingested, tree
from tests.faulty import Faulty, called

# Ray's test cluster leaves sockets to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROOT = Path(__file__).parents[1]


def test_every_way_for_ray_to_end_a_task_has_a_verdict_of_its_own() -> None:
    theirs = {
        name
        for name, kind in vars(ray.exceptions).items()
        if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == ray.exceptions.__name__
    }
    assert theirs - verdicts.VERDICTS.keys() == set()

    class Died(ray.exceptions.ActorDiedError):
        def __init__(self, text: str) -> None:
            self.text = text

        def __str__(self) -> str:
            return self.text

    assert verdicts.of(Died("The actor died because its node has died.")) == "node"
    assert verdicts.of(Died("killed by SIGKILL")) == "worker"
    assert verdicts.of(ValueError("no")) == "task"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without room for the device stage, and two nodes with a device each (GPUs in name only)."""
    # A dead raylet is noticed at once and not after half a minute.
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_failure_threshold": 2}
    head = {"num_cpus": 1, "num_gpus": 0, "dashboard_port": None, "_system_config": quick}
    made = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        made.add_node(num_cpus=1, num_gpus=1)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(address=made.address, log_to_driver=False, runtime_env={"env_vars": environment})
    yield made
    ray.shutdown()
    made.shutdown()


def stages(dataset: Dataset, calls: Path, seconds: float = 0.25) -> list[Stage]:
    """Depth needs a device, edges a core: two stages that scale by themselves."""
    rows = {s: len(dataset.keys(s)) for s in dataset.committed("rgb")}
    made = []
    for labeler, gpus in ((Faulty(seconds=seconds, calls=str(calls)), 1.0), (Threshold(seconds=0.05), 0.0)):
        plan = plan_labels(dataset, labeler.emits, [labeler])
        group = LabelGroup(dataset.store.url, plan.labelers, lease_seconds=5.0)
        made.append(
            Stage(
                name=labeler.emits[0],
                worker=group,
                tasks=plan.tasks,
                num_rows=rows,
                window=labeler.batch_size,
                num_cpus=0.5,
                num_gpus=gpus,
                max_workers=None if gpus else 1,
            )
        )
    return made


@pytest.mark.ray
def test_a_node_goes_and_another_comes_while_two_stages_run(tmp_path: Path, cluster: Cluster) -> None:
    calm = ingested(tmp_path, 96, shard_size=4, name="calm")
    local.run_stages(stages(calm, tmp_path / "calm-calls", seconds=0.0))
    dataset = ingested(tmp_path, 96, shard_size=4)
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        done = sum(e.kind == "report" and e.stage == "depth" for e in events)
        if event.kind == "report" and event.stage == "depth" and done in (2, 5):
            if done == 2:
                doomed = next(n for n in cluster.list_all_nodes() if n.node_id == event.node)
                os.kill(doomed.all_processes["raylet"][0].process.pid, signal.SIGKILL)
            else:
                cluster.add_node(num_cpus=1, num_gpus=1)

    # Slow enough for the new node to be there before the end.
    actors.run_stages(stages(dataset, tmp_path / "calls", seconds=0.8), on_event=on_event)
    assert tree(tmp_path / "root") == tree(tmp_path / "calm")
    kinds = [e.kind for e in events]
    assert kinds.count("node-up") == 4
    assert kinds.count("node-down") == 1
    assert kinds.count("failed") == 0
    gone = next(e.node for e in events if e.kind == "node-down")
    came = [e.node for e in events if e.kind == "node-up"][-1]
    assert any(e.kind == "worker-down" and e.node == gone for e in events)
    assert any(e.kind == "report" and e.node == came for e in events)
    shown = Console(width=120, record=True, file=StringIO())
    state = RunState()
    for event in events:
        state.apply(event)
    shown.print(table(state, events[-1].time))
    text = shown.export_text()
    assert re.search(r"depth +.*24", text), text
    assert re.search(r"canny_edge +.*24", text), text
    assert state.nodes_joined == 4
    up = {e.stage: sum(x.kind == "worker-up" and x.stage == e.stage for x in events) for e in events if e.stage}
    assert up["depth"] >= 3
    assert up["canny_edge"] >= 1


@pytest.mark.ray
def test_a_killed_actor_is_replaced_and_its_child_is_gone(tmp_path: Path, cluster: Cluster) -> None:
    calm = ingested(tmp_path, 48, shard_size=16, name="calm")
    local.run_stages(stages(calm, tmp_path / "calm-calls"))
    dataset = ingested(tmp_path, 48, shard_size=16)
    killed: list[psutil.Process] = []
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if event.kind == "start" and event.stage == "depth" and not killed:
            children = [
                p for p in psutil.process_iter(["cmdline"]) if "supervise._main" in " ".join(p.info["cmdline"] or [])
            ]
            killed.extend(children)
            for parent in {c.ppid() for c in children}:
                os.kill(parent, signal.SIGKILL)

    actors.run_stages(stages(dataset, tmp_path / "calls"), on_event=on_event)
    assert killed
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in killed)
    assert any(e.kind == "lost" for e in events)
    assert tree(tmp_path / "root") == tree(tmp_path / "calm")


@pytest.mark.ray
def test_a_node_that_announces_its_end_is_left_in_good_order(tmp_path: Path, cluster: Cluster) -> None:
    calm = ingested(tmp_path, 160, shard_size=80, name="calm")
    local.run_stages(stages(calm, tmp_path / "calm-calls", seconds=0.0)[:1])
    dataset = ingested(tmp_path, 160, shard_size=80)
    events: list[Event] = []
    accepted: list[bool] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if event.kind == "start" and sum(e.kind == "start" for e in events) == 2:
            # As deploy/drain.py does when a spot machine is told to go.
            until = int((time.time() + 60) * 1000)
            preempted = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            accepted.append(worker.global_worker.gcs_client.drain_node(event.node, preempted, "spot", until)[0])

    actors.run_stages(stages(dataset, tmp_path / "calls", seconds=1.0)[:1], on_event=on_event)
    assert accepted == [True]
    assert tree(tmp_path / "root") == tree(tmp_path / "calm")
    (leaving,) = (e for e in events if e.kind == "node-draining")
    gone = [e for e in events if e.kind == "worker-down" and e.node == leaving.node]
    assert [(e.values["cause"], e.values["planned"]) for e in gone] == [("its node announced its end", True)]
    assert any(e.kind == "lost" and e.values["cause"] == "drained" for e in events)
    # What the leaving worker had finished was taken up, not made again: at most the batch at hand is met twice.
    assert sum(called(tmp_path / "calls").values()) <= 160 + 8
