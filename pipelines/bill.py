"""What `dataengine plan` says: the cells to do and the groups they will run in; with an estimate, the bill."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dataengine import groups
from dataengine.groups import Group, Packing
from dataengine.manifest import Dataset
from dataengine.measured import Measured
from dataengine.plan import LabelPlan
from pipelines import planning
from pipelines.estimate import Estimate
from pipelines.rehearsal import tasks_of


def described(
    dataset: Dataset, plan: LabelPlan, pins: Sequence[Group], *, device: str, workers: int | None
) -> dict[str, Any]:
    """A plan as plain values, with what was measured of its labelers before; nothing is measured, nothing written."""
    labelers = planning.active(plan)
    measured = planning.kept(labelers, device) if labelers else {}
    batches = planning.chosen_batches(dataset, labelers, measured, planning.pinned(pins), record=False)
    packed = planning.pack(labelers, measured, batches, pins, device=device, workers=workers)
    return {
        "cells": plan.num_cells,
        "done": plan.num_done,
        "labelers": [
            _labeler(plan, x, name, packed, measured) for name, x in zip(groups.names(labelers), labelers, strict=True)
        ],
        "groups": [{"name": g.name, **dataclasses.asdict(g)} for g in packed.groups],
        "at_once": packed.at_once,
    }


def _labeler(
    plan: LabelPlan, labeler: Any, name: str, packed: Packing, measured: Mapping[str, Measured]
) -> dict[str, Any]:
    tasks = tasks_of(plan, labeler.emits)
    group = next(g for g in packed.groups if name in g.labelers)
    seen = measured.get(name)
    return {
        "labeler": name,
        "emits": list(labeler.emits),
        "inputs": list(labeler.inputs),
        "group": group.name,
        "batch_size": group.batches[name],
        "cells": sum(m in t.specs for t in tasks for m in labeler.emits),
        "images": sum(plan.num_rows[t.shard] for t in tasks),
        "seconds_per_image": None if seen is None else seen.at(group.batches[name]).seconds / group.batches[name],
        "weights_bytes": None if seen is None else seen.weights_bytes,
    }


def as_json(made: Estimate) -> dict[str, Any]:
    """An estimate as plain values, its sums included."""
    hours = {"seconds": made.seconds, "hours": made.seconds / 3600, "num_bytes": made.num_bytes}
    return {**dataclasses.asdict(made), **hours}


def show_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """The cells to do and the groups, for people."""
    title = f"{plan['cells']} cells to do, {plan['done']} committed already"
    if not plan["labelers"]:
        console.print(title, highlight=False)
        return
    table = Table(
        "labeler", "makes", "batch", "cells", "images", "s/image alone",
        title=title,
    )  # fmt: skip
    for x in plan["labelers"]:
        each = "-" if x["seconds_per_image"] is None else f"{x['seconds_per_image']:.4f}"
        counts = (str(x["batch_size"]), str(x["cells"]), str(x["images"]))
        table.add_row(x["labeler"], ", ".join(x["emits"]), *counts, each)
    console.print(table)
    for g in plan["groups"]:
        after = f", after {', '.join(g['needs'])}" if g["needs"] else ""
        share = f"{g['num_cpus']:g} CPUs" + (f" and {g['num_gpus']:g} GPUs" if g["num_gpus"] else "")
        text = f"group {g['name']}{after}: {', '.join(g['labelers'])}; {g['workers']} workers of {share}; {g['reason']}"
        console.print(text, markup=False, highlight=False)


def show_estimate(console: Console, made: Estimate) -> None:
    """The bill, for people."""
    money = ("cost",) if made.cost is not None else ()
    labelers = Table("labeler", "group", "images", "s/image here", "GPU hours", "CPU hours", *money)
    for x in made.labelers:
        values = (str(x.images), f"{x.seconds_per_image:.4f}", f"{x.gpu_hours:.4f}", f"{x.cpu_hours:.4f}")
        labelers.add_row(x.labeler, x.group, *values, *_money(x.cost))
    columns = Table("modality", "by", "cells", "images", "MB out", "GPU hours", "CPU hours", *money)
    for c in made.columns:
        hours = (f"{c.gpu_hours:.4f}", f"{c.cpu_hours:.4f}")
        columns.add_row(
            c.modality, c.labeler, str(c.cells), str(c.images), f"{c.num_bytes / 1e6:.1f}", *hours, *_money(c.cost)
        )
    console.print(labelers, columns)
    cost = "".join(f", cost {amount}" for amount in _money(made.cost))
    console.print(
        f"about {clock(made.seconds)} of wall time: {clock(made.starting)} until the first images are labelled, "
        f"{clock(made.labelling)} labelling, {clock(made.ending)} to end; {made.gpu_hours:.3f} GPU hours and "
        f"{made.cpu_hours:.3f} CPU hours reserved, {made.num_bytes / 1e6:.1f} MB out{cost}",
        highlight=False,
    )
    console.print(
        f"measured in {clock(made.measuring)}, rehearsed on {made.rehearsed} images, in a copy that is gone",
        highlight=False,
    )


def _money(cost: float | None) -> list[str]:
    return [] if cost is None else [f"{cost:.2f}"]


def clock(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 5 h 10 min."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
