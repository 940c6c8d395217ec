"""Kill a run at random instants, on disk and on S3, and compare what comes out with the tree of an undisturbed run.

Fifty instants each for the driver, a worker (the Ray actor or the process it watches) and the raylet of a second node.
A killed driver is started again; a killed raylet is followed by a new node; a run that ends before all instants are
used up is compared, and begun again. In the end, and whenever a run ends: the tree must be byte-identical to the calm
one; no cell that was committed may have been labelled again or written again; and after `gc` nothing may be left that
no commit record names. Any difference is an error and not a figure.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from benchmarks import _report
from benchmarks._null import corpus
from dataengine.manifest import Dataset
from dataengine.storage import Store
from tests.faulty_s3 import FaultyS3

Target = Literal["driver", "worker", "raylet"]
TARGETS: tuple[Target, ...] = ("driver", "worker", "raylet")
PROJECT = Path(__file__).parents[1]
WANTED = ("canny_edge", "color_palette", "sam_edge")
IMAGES, SHARD = 64, 8
FAULTS = 0.01
"""Requests to S3 that fail: reset, refused or cut, before or after the store has done what they asked."""
LONGEST = 300.0
"""Seconds that a run may go on after the last kill."""


@contextmanager
def cluster() -> Iterator[Any]:
    """A Ray head with one core and a second node with two, in processes of their own."""
    from ray.cluster_utils import Cluster

    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "dashboard_port": None, "_system_config": quick}
    )
    made.add_node(num_cpus=2)
    try:
        yield made
    finally:
        made.shutdown()


@contextmanager
def s3() -> Iterator[str]:
    """A bucket on an S3 API server in a process of its own, behind a proxy.

    The proxy makes conditional puts one step, which this server does not do by itself, and lets one request in a
    hundred fail in some way, so that kills meet a store that has a bad day.
    """
    import socket

    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    proxy = FaultyS3(f"http://127.0.0.1:{port}", chance=FAULTS)
    settings = {
        "AWS_ENDPOINT_URL": proxy.__enter__(),
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        for _ in range(100):
            try:
                client.create_bucket(Bucket="sweep")
                break
            except Exception:
                time.sleep(0.2)
        yield "s3://sweep"
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        proxy.__exit__()
        server.kill()
        server.wait()


def tree(store: Store) -> dict[str, bytes]:
    """Every object of a root with its bytes, but for the logs of its runs."""
    return {p: store.read(p) for p in store.find() if not p.startswith("runs/")}


def stamps(store: Store) -> dict[str, str]:
    """The change tag of every commit record; on a disk it changes even when the same bytes are written again."""
    return {f"commits/{c}/{entry.name}": entry.tag for c in WANTED for entry in store.entries(f"commits/{c}")}


def _is_worker(process: psutil.Process) -> bool:
    """Whether a process is an actor, or what one watches."""
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "supervise._main" in line or line.startswith("ray::_Actor")


@dataclass
class Sweep:
    """One root under fire."""

    root: str
    calm: Mapping[str, bytes]
    ingested: Mapping[str, bytes]
    folder: Path
    cluster: Any
    rng: random.Random
    horizon: float = 0.0
    """Seconds that a calm run takes here, its start included: a kill comes at a random instant of as many."""
    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    driver: subprocess.Popen[bytes] | None = None
    seen: dict[str, str] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    """When each commit record was first seen: its cell must not be labelled after that."""

    def __post_init__(self) -> None:
        self.store = Store(self.root)
        self.calls = self.folder / "calls"
        self.log = (self.folder / "driver.log").open("ab")
        recipe = "from benchmarks import _kill\ndef recipe():\n    return _kill.run({!r})\n"
        self.recipe = self.folder / "recipe.py"
        self.recipe.write_text(recipe.format(str(self.calls)))

    def begin(self) -> None:
        """Put the root back to how ingest left it."""
        self.store.remove_many([p for p in self.store.find()])
        for path, data in self.ingested.items():
            self.store.publish(path, data)
        self.calls.write_text("")
        self.seen, self.first = {}, {}

    def start(self) -> None:
        """Start a driver."""
        command = [sys.executable, "-m", "pipelines", "label", self.root, *WANTED, "--recipe", str(self.recipe)]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "RAY_ADDRESS": self.cluster.address}
        self.driver = subprocess.Popen(
            command, cwd=PROJECT, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def sweep(self, targets: Sequence[Target]) -> None:
        """Kill these, one after another, at random instants; AssertionError when anything is not as it must be."""
        self.begin()
        began = time.monotonic()
        self.start()
        assert self.driver is not None
        self.driver.wait(LONGEST)
        self.ended()
        self.horizon = time.monotonic() - began
        self.begin()
        self.start()
        for target in targets:
            until = time.monotonic() + self.rng.uniform(0.0, self.horizon)
            while True:
                self.check_committed()
                assert self.driver is not None
                if self.driver.poll() is not None:
                    self.ended()
                    self.begin()
                    self.start()
                if time.monotonic() >= until and self.kill(target):
                    break
                time.sleep(0.05)
        assert self.driver is not None
        until = time.monotonic() + LONGEST
        while self.driver.poll() is None:
            self.check_committed()
            time.sleep(0.2)
            assert time.monotonic() < until, f"the run does not end: {Path(self.log.name).read_text()[-2000:]}"
        self.ended()

    def kill(self, target: Target) -> bool:
        """Kill -9 one process; False when there is none to kill just now."""
        assert self.driver is not None
        if target == "driver":
            os.killpg(self.driver.pid, signal.SIGKILL)
            self.driver.wait()
            self.kills[target] += 1
            self.start()
            return True
        if target == "raylet":
            node = self.rng.choice(list(self.cluster.worker_nodes))
            os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
            self.cluster.remove_node(node, allow_graceful=False)
            self.cluster.add_node(num_cpus=2)
            self.kills[target] += 1
            return True
        nodes = [psutil.Process(n.all_processes["raylet"][0].process.pid) for n in self.cluster.list_all_nodes()]
        found = [p for node in nodes for p in node.children(recursive=True) if _is_worker(p)]
        if not found:
            return False
        self.rng.choice(found).kill()
        self.kills[target] += 1
        return True

    def check_committed(self) -> None:
        """A record that is there stays as it is."""
        now = stamps(self.store)
        changed = [p for p, stamp in self.seen.items() if now.get(p) != stamp]
        assert not changed, f"committed cells were written again: {changed}"
        self.seen = now
        for path in now:
            self.first.setdefault(path, time.time())

    def ended(self) -> None:
        """Hold a run that has ended to what was promised."""
        assert self.driver is not None
        tail = Path(self.log.name).read_text(errors="replace")[-2000:]
        assert self.driver.returncode == 0, f"the driver ended with {self.driver.returncode}: {tail}"
        self.check_committed()
        committed = {}
        for shard in range(IMAGES // SHARD):
            at = self.first[f"commits/sam_edge/shard-{shard:05d}.json"]
            committed |= dict.fromkeys(Dataset(self.root).keys(shard), at)
        for line in self.calls.read_text().splitlines():
            when, *keys = line.split()
            late = [k for k in keys if float(when) > committed[k]]
            assert not late, f"labelled again after their cell was committed: {late}"
        left = Dataset(self.root).orphans()
        self.store.remove_many(left)
        now = tree(self.store)
        wrong = sorted(p for p in now.keys() | self.calm.keys() if now.get(p) != self.calm.get(p))
        assert not wrong, f"not as in a calm run: {wrong}"
        self.runs += 1


def fire(
    store: str, folder: Path, targets: Sequence[Target], seed: int, made: Any, calm: Mapping[str, bytes], base: Path
) -> Sweep:
    """One sweep on a store; `calm` is the tree of an undisturbed run and `base` an ingested root."""
    folder.mkdir(parents=True)
    ingested = tree(Store(base))
    sweep = Sweep(store, calm, ingested, folder, made, random.Random(seed))
    try:
        sweep.sweep(targets)
    finally:
        if sweep.driver is not None and sweep.driver.poll() is None:
            os.killpg(sweep.driver.pid, signal.SIGKILL)
        sweep.log.close()
    return sweep


def calm_tree(folder: Path) -> tuple[Path, dict[str, bytes]]:
    """An ingested root, and what an undisturbed run in one process makes of it."""
    from benchmarks import _kill
    from pipelines import label

    base = Path(corpus(folder / "corpus", IMAGES, SHARD, size=(96, 128)).store.url)
    calm = folder / "calm"
    shutil.copytree(base, calm)
    run = _kill.run("")
    dataset = Dataset(calm)
    made = label.plan(dataset, WANTED, run)
    label.execute(dataset, made, run.groups, runner="local", workers=1, device="cpu", max_bad_fraction=0.0)
    return base, tree(dataset.store)


def measure(quick: bool, reference: Path | None) -> dict[str, Any]:
    """Kill driver, workers and raylets at random instants on disk and on S3; compare with an undisturbed run."""
    instants = 1 if quick else 50
    found: dict[str, Any] = {"instants": instants, "images": IMAGES, "shards": IMAGES // SHARD}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="engine-kill-")))
        base, calm = calm_tree(folder)
        stores = {"disk": str(folder / "disk" / "root")}
        if not quick:
            stores["s3"] = f"{stack.enter_context(s3())}/root"
        made = stack.enter_context(cluster())  # after the store: its nodes inherit the way to it
        for name, root in stores.items():
            for i, target in enumerate(TARGETS):
                began = time.monotonic()
                sweep = fire(f"{root}-{target}", folder / name / target, [target] * instants, i, made, calm, base)
                seconds = round(time.monotonic() - began, 1)
                found[f"{name}.{target}"] = {
                    "kills": sweep.kills[target], "runs_compared": sweep.runs, "identical": True, "seconds": seconds
                }  # fmt: skip
                _report.console.print(
                    f"{name} {target}: {sweep.kills[target]} kills, {sweep.runs} runs identical in {seconds} s"
                )
    return found


if __name__ == "__main__":
    _report.main(measure)
