"""The final report of a run as people read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipelines.table import duration, number, percent, rate, readable

MAX_SHOWN = 8


def printed(report: Mapping[str, Any]) -> Padding:
    """The report, to be printed on a console of 80 columns or more."""
    report = readable(report)
    parts: list[Any] = [_verdict(report), "", _stages(report)]
    if report["time"]:
        parts += ["", _time(report)]
    if report["modalities"]:
        parts += ["", _modalities(report)]
    details = Table.grid(padding=(0, 2))
    details.add_column(style="dim", no_wrap=True)
    details.add_column(overflow="fold")
    for label, text in _details(report):
        details.add_row(label, text)
    return Padding(Group(*parts, "", details), (0, 1))


def _verdict(r: Mapping[str, Any]) -> Text:
    if r["complete"]:
        text = Text("all that was wanted is committed", style="bold green")
    else:
        text = Text("not finished" if not r["finished"] else "incomplete", style="bold red")
    head = Text(f"{r['what'] or 'run'}  ", style="bold").append(text)
    if r["run"]:
        head.append(f"  {r['run']}", style="not bold dim")
    pace = f"{r['images']:,} images in {duration(r['seconds'])}, {rate(r['images_per_second'])} images/s"
    light = r["light"]
    if light["share"] is not None:
        pace += f", {percent(light['share'])} of the speed of light"
    else:
        of = f" ({', '.join(light['not_measured'])})" if light["not_measured"] else ""
        pace += f"; speed of light not measured{of}"
    return head.append(f"\n{pace}", style="not bold default")


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(names[0], overflow="ellipsis", min_width=16)
    for name in names[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _stages(r: Mapping[str, Any]) -> Table:
    table = _table("stage", "images", "images/s", "workers", "light", "reached", "busy", "lost")
    for s in r["stages"]:
        light = None if s["light_per_worker"] is None else s["light_per_worker"] * s["workers"]
        table.add_row(
            Text(s["stage"]),
            number(s["images"]),
            Text(rate(s["images_per_second"]), style="bold"),
            f"{s['workers']:.1f}",
            "-" if light is None else rate(light),
            percent(s["efficiency"]),
            percent(s["device_busy"]),
            number(sum(s["attempts_lost"].values()), "yellow"),
        )
    return table


def _time(r: Mapping[str, Any]) -> Table:
    """Shares of the workers' time, a row for each thing it went to, a column for each stage."""
    stages = [s for s in r["stages"] if s["worker_seconds"]][:5]
    table = _table("where the time went", "all", *(_short(s["stage"]) for s in stages if len(stages) > 1))
    order = ["start", "read", "decode", "label", "encode", "commit", "wait", "other", "lost", "idle"]

    def place(name: str) -> tuple[int, str]:
        head = name.split(":")[0]
        return (order.index(head) if head in order else order.index("other"), name)

    for name in sorted(r["time"], key=place):
        shares = [s["seconds_by"].get(name, 0.0) / s["worker_seconds"] for s in stages]
        cells = [
            f"{100 * x:.1f} %" if x else ""
            for x in ([r["time"][name], *shares] if len(stages) > 1 else [r["time"][name]])
        ]
        table.add_row(Text(name.replace(":", " ")), *cells)
    return table


def _modalities(r: Mapping[str, Any]) -> Table:
    table = _table("modality", "cells", "missing", "samples", "failed", "MB")
    for name, c in r["modalities"].items():
        table.add_row(
            Text(name),
            number(c["cells"]),
            number(c["missing"], "bold red"),
            number(c["samples"]),
            number(c["failed"], "yellow"),
            f"{c['bytes'] / 1e6:,.1f}",
        )
    return table


def _details(r: Mapping[str, Any]) -> Iterable[tuple[str, Text]]:
    for i, f in enumerate(r["failures"][:MAX_SHOWN]):
        text = Text().append(f"{f['labels']:,} x ", style="yellow").append(f"{f['modality']}: {f['reason']}")
        if f["keys"]:
            text.append(f"  ({', '.join(f['keys'])})", style="dim")
        yield ("failures" if i == 0 else "", text)
    if (rest := r["num_reasons"] - MAX_SHOWN) > 0:
        yield "", Text(f"and {rest} more reasons in report.json", style="dim")
    if r["refused"]:
        yield "refused", Text(f"{r['refused']:,} items, the reasons are in quarantine/")
    for i, g in enumerate(r["given_up"][:MAX_SHOWN]):
        yield ("given up" if i == 0 else "", Text(f"{g['stage']}, shard {g['shard']}: {g['cause']}", style="red"))
    if (rest := r["num_given_up"] - MAX_SHOWN) > 0:
        yield "", Text(f"and {rest} more tasks in report.json", style="dim")
    for label, causes in (
        ("attempts lost", r["attempts_lost"]),
        ("workers lost", r["workers_lost"]),
        ("nodes lost", r["nodes_lost"]),
    ):
        if causes:
            yield label, Text(", ".join(f"{n:,} x {cause}" for cause, n in Counter(causes).most_common()))
    if error := r["summary"].get("error"):
        yield "ended by", Text(error, style="red")
    joined = _several(r["workers_joined"], "worker")
    joined += f" on {_several(r['nodes_joined'], 'node')}" if r["nodes_joined"] else ""
    hours = f"{_hours(r['gpu_hours'])} GPU-hours, {_hours(r['cpu_hours'])} CPU-hours"
    yield "used", Text(f"{joined}, {hours}, {r['bytes'] / 1e6:,.1f} MB written")
    if r["cost"] is not None:
        at = [
            f"{r['prices'][k]:g} a {n}-hour"
            for k, n in (("gpu_hour", "GPU"), ("cpu_hour", "CPU"))
            if r["prices"][k] is not None
        ]
        yield "cost", Text(f"{r['cost']:,.2f} at {' and '.join(at)}")
    if r["missing"]["cells"]:
        names = ", ".join(f"{n:,} of {m}" for m, n in r["missing"]["by_modality"].items())
        yield "missing", Text(f"{r['missing']['cells']:,} cells: {names}", style="bold red")


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 1 or not hours else f"{hours:.2g}"


def _several(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"
