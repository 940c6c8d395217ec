"""How a run looks in a terminal: a table drawn from its JSON form, and the same in one plain line."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelines.live import Prices, RunState, as_json
from pipelines.visible import visible

MAX_NODES, MAX_NOTES = 6, 3
SILENT = 30.0
"""Seconds without news after which a view says so."""
WIDE = 92
"""Columns from which the table shows all it has."""


def table(state: RunState, now: float, prices: Prices | None = None, run_id: str = "") -> View:
    """The live table of a run."""
    return View(as_json(state, now, prices, run_id))


class View:
    """A run's JSON form as a table for people; it fits the width it is given, from 80 columns."""

    def __init__(self, status: Mapping[str, Any], silent: float = 0.0) -> None:
        self._status = readable(status)
        self._silent = silent

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= WIDE
        parts = [*_head(self._status, self._silent, options.max_width), "", _stages(self._status["stages"], wide)]
        rows = [*_failures(self._status), *_lost(self._status), *_nodes(self._status), *_notes(self._status)]
        if rows:
            details = Table.grid(padding=(0, 2))
            details.add_column(style="dim", no_wrap=True)
            details.add_column()
            for label, text in rows:
                details.add_row(label, _cut(text))
            parts += ["", details]
        yield Padding(Group(*parts), (0, 1))


def _head(s: Mapping[str, Any], silent: float, width: int) -> Iterable[Any]:
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True, overflow="ellipsis")
    line.add_column(justify="right", no_wrap=True)
    title = Text(str(s.get("what") or "run"), style="bold")
    title.append(f"  {s['run']}" if s.get("run") else "", style="not bold dim")
    status = "finished" if s["ended"] else "running"
    if not s["ended"] and silent > SILENT:
        status = f"no news for {duration(silent)}"
    money = "" if s["cost"] is None else f"   cost {s['cost']:,.2f}"
    line.add_row(title, Text(status, style="bold yellow" if silent > SILENT and not s["ended"] else "bold"))
    yield line
    bar = Table.grid(expand=True, padding=(0, 2, 0, 0))
    bar.add_column(ratio=1)
    bar.add_column(justify="right", no_wrap=True)
    when = f"   elapsed {duration(s['elapsed'])}"
    if not s["ended"]:
        when += f"   left {duration(s['eta'])}"
        if s["eta"] and width >= WIDE:
            when += f" (till {_clock(s['time'] + s['eta'], s['time'])})"
    progress = ProgressBar(total=1.0, completed=s["progress"], complete_style="cyan", finished_style="green")
    bar.add_row(progress, Text(f"{percent(s['progress'])}{when}{money}"))
    yield bar


def _stages(stages: Iterable[Mapping[str, Any]], wide: bool) -> Table:
    gap = 2 if wide else 1
    found = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    # Only the names give way when it gets narrow: every figure stays whole.
    found.add_column("stage", min_width=20)
    for name in ("wait", "run", "done", "fail", "images/s" if wide else "img/s", "left"):
        found.add_column(name, justify="right", no_wrap=True)
    for name in ("workers", "busy", "bad", "lost") if wide else ("wkrs", "busy", "bad", "lost"):
        found.add_column(name, justify="right", no_wrap=True)
    for s in stages:
        tasks = s["tasks"]
        over = tasks["waiting"] + tasks["running"] == 0
        pace = s["images_per_second_overall"] if over else s["images_per_second"]
        left = "over" if tasks["failed"] else "done"
        if not over:
            left = "waits" if s["eta"] is None and not s["workers"] else duration(s["eta"])
        found.add_row(
            _cut(Text(s["stage"])),
            number(tasks["waiting"]),
            number(tasks["running"], "cyan"),
            number(tasks["done"], "green" if over and not tasks["failed"] else ""),
            number(tasks["failed"], "bold red"),
            Text(rate(pace), style="dim" if over or not pace else "bold"),
            Text(left, style="dim" if over or left in ("waits", "-") else ""),
            number(s["workers"]),
            Text(percent(s["device_busy"])),
            number(s["failed_labels"], "yellow"),
            number(sum(s["attempts_lost"].values()), "yellow"),
        )
    return found


def _cut(text: Text) -> Text:
    """Text that ends in an ellipsis where there is no room, and never takes a second line."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _failures(s: Mapping[str, Any]) -> Iterable[tuple[str, Text]]:
    for i, f in enumerate(s["failures"]):
        text = Text(f"{f['labels']:,} x ", style="yellow").append(f"{f['modality']}: {f['reason']}", style="default")
        yield ("failures" if i == 0 else "", text)


def _lost(s: Mapping[str, Any]) -> Iterable[tuple[str, Text]]:
    for label, key in (("lost", "attempts_lost"), ("workers lost", "workers_lost")):
        causes: dict[str, int] = {}
        for stage in s["stages"]:
            for cause, n in stage[key].items():
                causes[cause] = causes.get(cause, 0) + n
        if causes:
            yield label, Text(", ".join(f"{n:,} x {c}" for c, n in sorted(causes.items(), key=lambda x: -x[1])))


def _nodes(s: Mapping[str, Any]) -> Iterable[tuple[str, Text]]:
    nodes = s["nodes"]
    name = max((len(_short(n["node"])) for n in nodes[:MAX_NODES]), default=0)
    for i, n in enumerate(nodes[:MAX_NODES]):
        text = Text(f"{_short(n['node']):<{name}}  {n['workers']:>3} workers   cpu {percent(n['cpu']):>5}")
        if n["draining"]:
            text.append(f"   ending {_clock(n['draining'], s['time'])}", style="yellow")
        if n["gpus"]:
            text.append("   gpu " + " ".join(f"{100 * g:3.0f}" for g in n["gpus"]) + " %")
        if n["memory"]:
            text.append(f"   {n['memory'] / 1e9:,.0f} GB")
        yield ("nodes" if i == 0 else "", text)
    if rest := nodes[MAX_NODES:]:
        gpus = [g for n in rest for g in n["gpus"]]
        busy = f", gpu {percent(sum(gpus) / len(gpus))}" if gpus else ""
        cpus = [n["cpu"] for n in rest if n["cpu"] is not None]
        busy = (f", cpu {percent(sum(cpus) / len(cpus))}" if cpus else "") + busy
        yield "", Text(f"and {len(rest)} more: {sum(n['workers'] for n in rest)} workers{busy}", style="dim")
    if s["nodes_lost"]:
        yield "nodes lost", Text(", ".join(f"{n:,} x {c}" for c, n in s["nodes_lost"].items()), style="yellow")


def _short(node: str) -> str:
    """Ray's ids of nodes are 56 hexadecimal digits."""
    return node[:12] if len(node) > 40 else node


def _notes(s: Mapping[str, Any]) -> Iterable[tuple[str, Text]]:
    for i, note in enumerate(s["notes"][-MAX_NOTES:]):
        yield ("notes" if i == 0 else "", Text(f"{_clock(note['time'], s['time'])}  {note['note']}"))


def plain(s: Mapping[str, Any], silent: float = 0.0) -> str:
    """The run in one line, for logs and pipes."""
    s = readable(s)
    tasks, total = s["tasks"], sum(s["tasks"].values())
    parts = [f"{s.get('what') or 'run'} {percent(s['progress'])}", f"{tasks['done']}/{total} tasks"]
    moving = [x for x in s["stages"] if x["images_per_second"]]
    parts += [f"{x['stage']} {rate(x['images_per_second'])} images/s" for x in moving[:3]]
    for name, n in (
        ("running", tasks["running"]),
        ("failed", tasks["failed"]),
        ("bad labels", sum(x["failed_labels"] for x in s["stages"])),
        ("refused", sum(x["refused"] for x in s["stages"])),
        ("attempts lost", sum(n for x in s["stages"] for n in x["attempts_lost"].values())),
    ):
        parts += [f"{n:,} {name}"] if n else []
    parts.append(f"elapsed {duration(s['elapsed'])}")
    parts.append("finished" if s["ended"] else f"left {duration(s['eta'])}")
    parts += [f"cost {s['cost']:,.2f}"] if s["cost"] is not None else []
    parts += [f"no news for {duration(silent)}"] if silent > SILENT and not s["ended"] else []
    return ", ".join(parts)


def readable(value: Any) -> Any:
    """The same values with every text safe to print in a row: reasons, causes and names are other people's words."""
    if isinstance(value, str):
        return visible(value.replace("\n", " ").replace("\t", " "))
    if isinstance(value, Mapping):
        return {readable(key): readable(inner) for key, inner in value.items()}
    return [readable(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def duration(seconds: float | None) -> str:
    """A time span as people read it: `41 s`, `3:05 min`, `2:41 h`, `1 d 4 h`; a dash for None."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    if whole < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _clock(at: float, now: float) -> str:
    """Time of day here, with the date when it is not within a day of `now`."""
    return time.strftime("%H:%M" if abs(at - now) < 86400 else "%d %b %H:%M", time.localtime(at))


def percent(share: float | None) -> str:
    """A share in whole percent, rounded down: "100 %" is said only of what is complete; a dash for None."""
    return "-" if share is None else f"{int(100 * share + 1e-9)} %"


def rate(per_second: float) -> str:
    """A rate, with a decimal where it matters."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"


def number(n: int, style: str = "") -> Text:
    """A count; a zero stays in the background."""
    return Text(f"{n:,}", style=style) if n else Text("0", style="dim")
