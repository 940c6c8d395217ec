"""How much of its devices' time the engine uses: labelers that hold a device for a fixed time per batch.

python -m benchmarks.engine_efficiency [--quick] [--reference DIR] [--json]

Two stages, on one node and on three (raylets of this machine, each with one GPU that is only a number): `slow` holds
its device for 240 ms per batch of 8, `fast` for 80 ms; neither waits for the other, and each node has one worker of
each. Reading, decoding, checking, encoding and committing photographs has to hide behind that. The labelers note every
hold themselves, and commits are read from the disk: nothing is taken from the engine's own accounts.

- `throughput_share`: images/s from the moment when every device of the stage has begun to the last commit of the stage,
  over what its devices alone would do (8 images / 240 ms on each). The tail and the last commits are in it.
- `idle`: the share of its time between its first and its last batch that a device was not held for, over all devices
  of a stage. A hold counts with its nominal time: a sleep that oversleeps is not work.
- `tail_seconds`: from the end of the first slow device to run out to the last commit.

Starting Ray, the workers and their labelers is not in any of them.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import _fresh, _null, _report

SIZE = (192, 256)
SHARD_SIZE = 32
STAGES = {"slow": (_null.Masks, 0.24), "fast": (_null.Features, 0.08)}
NODES = (1, 3)
QUICK, FULL = 8, 40
"""Shards for each node."""


def run(*, root: str, logs: str, num_nodes: int, num_shards: int) -> None:
    """Label the shards on a cluster of raylets on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    from dataengine import actors
    from dataengine.manifest import Dataset
    from dataengine.plan import plan_labels
    from dataengine.schedule import Stage
    from dataengine.work import LabelGroup

    dataset = Dataset(root)
    stages = []
    for name, (kind, seconds) in STAGES.items():
        plan = plan_labels(dataset, kind.emits, [kind(stage=name, seconds=seconds, size=SIZE, logs=logs)])
        tasks = plan.tasks[:num_shards]
        stages.append(
            Stage(
                name=name,
                worker=LabelGroup(dataset.store.url, plan.labelers),
                tasks=tasks,
                num_rows={task.shard: SHARD_SIZE for task in tasks},
                window=kind.batch_size,
                seconds_per_row=seconds / kind.batch_size,
                num_gpus=0.5,
                max_workers=num_nodes,
            )
        )
    node = {"num_cpus": len(STAGES), "num_gpus": 1, "object_store_memory": 128 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(num_nodes - 1):
        cluster.add_node(**node)
    settings = {"PYTHONPATH": os.environ["PYTHONPATH"], "OMP_NUM_THREADS": "1"}
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": settings},
    )
    try:
        cluster.wait_for_nodes()
        actors.run_stages(stages, on_event=lambda event: None, device="cpu")
    finally:
        ray.shutdown()
        cluster.shutdown()


def holds(logs: Path, stage: str) -> list[list[tuple[float, float, int]]]:
    """(begin, end, rows) of each batch, in order, by device."""
    devices = []
    for path in sorted(logs.glob(f"{stage}-*")):
        lines = [line.split() for line in path.read_text().splitlines()]
        if lines:
            devices.append(sorted((float(begin), float(end), int(rows)) for begin, end, rows in lines))
    return devices


def figures(root: Path, logs: Path, num_nodes: int, num_shards: int) -> dict[str, Any]:
    """What the labelers noted and the disk shows of one run."""
    out: dict[str, Any] = {}
    for stage, (kind, seconds) in STAGES.items():
        devices = holds(logs, stage)
        images = sum(rows for device in devices for _, _, rows in device)
        if images != num_shards * SHARD_SIZE or len(devices) != num_nodes:
            raise RuntimeError(f"{stage}: {images} images on {len(devices)} devices, not each image once on each node")
        windows = [device[-1][1] - device[0][0] for device in devices]
        held = [seconds * len(device) for device in devices]
        records = [root / "commits" / m / f"shard-{s:05d}.json" for m in kind.emits for s in range(num_shards)]
        first, last = max(device[0][0] for device in devices), max(path.stat().st_mtime for path in records)
        # Of a batch that was under way at the first moment, the part after it.
        after = sum(r * (e - max(b, first)) / (e - b) for device in devices for b, e, r in device if e > first)
        alone = num_nodes * kind.batch_size / seconds
        out[stage] = {
            "devices": len(devices),
            "images": images,
            "images_per_second": after / (last - first),
            "images_per_second_alone": alone,
            "throughput_share": after / (last - first) / alone,
            "idle": 1 - sum(held) / sum(windows),
            "idle_of_each": [1 - h / w for h, w in zip(held, windows, strict=True)],
            "seconds": last - first,
            "tail_seconds": last - min(device[-1][1] for device in devices),
            "mean_hold_seconds": statistics.mean(end - begin for device in devices for begin, end, _ in device),
        }
    return out


def measure(quick: bool, reference: Path | None) -> dict[str, Any]:
    """How much of its devices' time the engine uses, on one node and on three."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="efficiency-") as folder:
        base = Path(folder)
        engines = {"": _fresh.packages(base / "here")}
        if reference is not None:
            engines["reference_"] = _fresh.packages(base / "there", reference)
        for prefix, where in engines.items():
            for num_nodes in NODES:
                title = f"{prefix}nodes_{num_nodes}"
                _report.console.print(f"{title} ...")
                num_shards = (QUICK if quick else FULL) * num_nodes
                root, logs = base / title / "root", base / title / "logs"
                logs.mkdir(parents=True)
                _null.corpus(base / title, num_shards * SHARD_SIZE, SHARD_SIZE, SIZE)
                job = {"root": str(root), "logs": str(logs), "num_nodes": num_nodes, "num_shards": num_shards}
                began = time.perf_counter()
                _fresh.call("engine_efficiency", "run", job, where)
                found[title] = figures(root, logs, num_nodes, num_shards)
                found[title]["seconds_with_start"] = time.perf_counter() - began
    return {
        "benchmark": "engine_efficiency",
        **found,
        "ratios": {f"{t}_throughput_share": f["slow"]["throughput_share"] for t, f in found.items()}
        | {f"{t}_idle": f["slow"]["idle"] for t, f in found.items()},
        "targets": {"throughput_share": 0.95, "idle": 0.05},
    }


if __name__ == "__main__":
    _report.main(measure)
