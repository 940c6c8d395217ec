"""From a label plan to the groups it will run in: batch sizes, kept measurements, machines, packing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace as changed
from pathlib import Path

import psutil

from dataengine import groups, packing
from dataengine.groups import Group, Node, Packing
from dataengine.labeler import Labeler
from dataengine.manifest import Conflict, Dataset
from dataengine.measured import Measured
from dataengine.plan import LabelPlan
from dataengine.schedule import Stage
from pipelines import preflight
from pipelines.label import pick_device
from pipelines.measure import device_name


def stages(
    dataset: Dataset,
    plan: LabelPlan,
    pins: Sequence[Group] = (),
    *,
    device: str,
    workers: int | None = None,
    nodes: Sequence[Node] = (),
    replace: Collection[str] = (),
) -> tuple[Stage, ...]:
    """The stages of a label run, by what is known of its labelers; records the batch sizes that it will use.

    `nodes` are the machines, this one when there are none; `replace` the columns that are made anew. See `pack` and
    `chosen_batches` for the errors.
    """
    labelers = active(plan)
    measured = kept(labelers, device)
    batches = chosen_batches(dataset, labelers, measured, pinned(pins), replace=replace)
    packed = pack(labelers, measured, batches, pins, device=device, workers=workers, nodes=nodes)
    return packing.stages(packed, plan, dataset.store.url, plan.num_rows)


def active(plan: LabelPlan) -> tuple[Labeler, ...]:
    """The labelers with a cell to do, in dependency order."""
    todo = {m for task in plan.tasks for m in task.specs}
    return tuple(labeler for labeler in plan.labelers if set(labeler.emits) & todo)


def kept(labelers: Sequence[Labeler], device: str) -> dict[str, Measured]:
    """What was measured before of these labelers on a device of that kind, this machine's if it has one, by name."""
    name = "cuda" if device.startswith("cuda") and not _gpus() else device_name(device)
    found = zip(groups.names(labelers), (preflight.kept(labeler, name) for labeler in labelers), strict=True)
    return {name: seen for name, seen in found if seen is not None}


def pack(
    labelers: Sequence[Labeler],
    measured: Mapping[str, Measured],
    batches: Mapping[str, int],
    pins: Sequence[Group] = (),
    *,
    device: str,
    workers: int | None = None,
    nodes: Sequence[Node] = (),
) -> Packing:
    """The groups of these labelers on these nodes (this machine, when there are none); see `dataengine.packing`."""
    gpu = device.startswith("cuda")
    costs = [
        groups.cost(name, labeler, measured.get(name), batches.get(labeler.name, labeler.batch_size), gpu)
        for name, labeler in zip(groups.names(labelers), labelers, strict=True)
    ]
    decode = max((seen.decode_seconds for seen in measured.values()), default=0.0)
    # Ray does not tell how much memory a GPU has; the measurement does.
    there = max((seen.device_bytes for seen in measured.values() if seen.gpu), default=0)
    machines = [changed(n, gpu_bytes=n.gpu_bytes or there) for n in nodes or [this_machine(device)]]
    return packing.pack(costs, machines, pins=pins, decode_seconds=decode, limit=workers)


def this_machine(device: str) -> Node:
    """The machine that this process is on; its GPUs only when the device is one."""
    gpus = _gpus() if device.startswith("cuda") else []
    memory = int(psutil.virtual_memory().total)
    return Node(cpus=os.cpu_count() or 1, gpus=len(gpus), gpu_bytes=min(gpus, default=0), memory_bytes=memory)


def likely_device(wanted: str) -> str:
    """The device that `auto` will be, without importing torch where there is no driver of a GPU to be seen."""
    if wanted == "auto" and not any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")):
        return "cpu"
    return pick_device(wanted)


def _gpus() -> list[int]:
    """The bytes of each GPU of this machine."""
    import torch

    return [int(torch.cuda.get_device_properties(i).total_memory) for i in range(torch.cuda.device_count())]


# -- batch sizes -------------------------------------------------------------------------------------------------------


def pinned(pins: Sequence[Group]) -> dict[str, int]:
    """The batch sizes that a recipe fixes, by labeler."""
    return {name: size for pin in pins for name, size in pin.batches.items()}


def chosen_batches(
    dataset: Dataset,
    labelers: Sequence[Labeler],
    measured: Mapping[str, Measured],
    pins: Mapping[str, int],
    *,
    replace: Collection[str] = (),
    record: bool = True,
) -> dict[str, int]:
    """The batch size of each labeler, by name: the same in every run on this root, for it may decide the last bit.

    The first run that labels records it in `runs/batches/`: what a recipe fixes, else the labeler's own or a larger one
    that was measured to be faster. Later runs take the recorded one; Conflict when a recipe fixes another. A labeler
    whose columns are all in `replace` starts afresh. With `record=False` nothing is written.
    """
    chosen: dict[str, int] = {}
    for name, labeler in zip(groups.names(labelers), labelers, strict=True):
        path = _record_path(labeler)
        pin = pins.get(name, pins.get(labeler.name))
        afresh = set(labeler.emits) <= set(replace)
        if afresh and record and dataset.store.exists(path):
            dataset.store.remove(path)
        there = None if afresh else _recorded(dataset, path)
        if there is None:
            # Cells from before sizes were recorded were made with the labeler's own.
            begun = not afresh and any(dataset.committed(m) for m in labeler.emits)
            seen = None if begun else measured.get(name)
            size = labeler.batch_size if seen is None else seen.best_batch(labeler.batch_size)
            if not begun:
                size = pin or size
            if record:
                text = json.dumps({"labeler": labeler.name, "batch_size": size}, sort_keys=True) + "\n"
                dataset.store.publish(path, text.encode())
                there = _recorded(dataset, path)  # another driver's, if that was first
            there = there or size
        if pin is not None and pin != there:
            raise Conflict(
                f"the recipe fixes batches of {pin} for {labeler.name}, and this dataset has it with batches of "
                f"{there}: another size may change the last bit of a label. Leave the recipe's size out, or make its "
                f"columns anew with --replace {' --replace '.join(labeler.emits)}"
            )
        # Two of one name in a process share one size.
        chosen[labeler.name] = min(there, chosen.get(labeler.name, there))
    return chosen


def _recorded(dataset: Dataset, path: str) -> int | None:
    try:
        return int(json.loads(dataset.store.read(path))["batch_size"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} of {dataset.store.name} should hold a batch size: {error!r}") from error


def _record_path(labeler: Labeler) -> str:
    identity = json.dumps(labeler.identity(), sort_keys=True, default=str)
    return f"runs/batches/{labeler.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
