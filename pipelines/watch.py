"""Commands that look at runs from anywhere: `watch` follows one that goes on, `report` prints how one went."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from dataengine.eventlog import events, runs
from dataengine.manifest import Dataset
from dataengine.storage import Store
from pipelines import report as reports
from pipelines.cli import Json, Root, app, exits
from pipelines.live import Prices, RunState, as_json
from pipelines.report_text import printed
from pipelines.table import View, plain
from pipelines.visible import SafeConsole

LOOK_SECONDS = 2.0
LINE_SECONDS = 30.0

Run = Annotated[str, typer.Option("--run", help="Which run, by its id; without it the latest one.")]
GpuPrice = Annotated[float | None, typer.Option(min=0.0, help="Price of a GPU-hour, in any currency.")]
CpuPrice = Annotated[float | None, typer.Option(min=0.0, help="Price of a CPU-hour.")]


@app.command()
@exits
def watch(
    root: Root,
    run: Run = "",
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now and leave.")] = False,
    as_json: Json = False,
) -> None:
    """The live table of a run, from any terminal that can read the dataset; Ctrl-C leaves, and the run goes on."""
    store = Store(root)
    run = pick(store, run)
    console = SafeConsole()
    live = console.is_terminal and not console.is_dumb_terminal and not once and not as_json
    try:
        if live:
            with Live(console=console, refresh_per_second=4) as view:
                _follow(store, run, lambda s, silent: view.update(View(s, silent)), LOOK_SECONDS)
        elif once:
            status, silent = _now(store, run)
            _say(console, status, silent, as_json, table=True)
        else:
            every = LOOK_SECONDS if as_json else LINE_SECONDS
            _follow(store, run, lambda s, silent: _say(console, s, silent, as_json), every)
    except KeyboardInterrupt:
        return


@app.command()
@exits
def report(
    root: Root,
    run: Run = "",
    price_gpu_hour: GpuPrice = None,
    price_cpu_hour: CpuPrice = None,
    as_json: Json = False,
) -> None:
    """How a run went: speed, where the time went, what failed and why, hours and cost, and what is missing."""
    store = Store(root)
    found = load_report(store, pick(store, run))
    if price_gpu_hour is not None or price_cpu_hour is not None:
        found = reports.priced(found, Prices(price_gpu_hour, price_cpu_hour))
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        SafeConsole().print(printed(found))


def pick(store: Store, run: str) -> str:
    """The id of a run of this root: the one asked for, or the latest; FileNotFoundError when there is none."""
    there = runs(store)
    if not there:
        raise FileNotFoundError(f"no runs under {store.name}/runs: nothing has been run on this dataset yet")
    if run and run not in there:
        raise ValueError(f"no run {run!r} under {store.name}; the latest are {', '.join(there[:5])}")
    return run or there[0]


def load_status(store: Store, run: str) -> dict[str, Any]:
    """The latest `status.json` of a run; where there is none that can be read, the same made from its events."""
    try:
        found = json.loads(store.read(f"runs/{run}/status.json"))
        if isinstance(found, dict) and "stages" in found:
            return found
    except (FileNotFoundError, ValueError):
        pass
    state = RunState.of(events(store, run))
    return as_json(state, state.time, run_id=run)


def load_report(store: Store, run: str) -> dict[str, Any]:
    """The report of a run; of one that goes on, or whose driver was killed, the same made from its events so far."""
    try:
        found: dict[str, Any] = json.loads(store.read(f"runs/{run}/report.json"))
        return found
    except (FileNotFoundError, ValueError):
        state = RunState.of(events(store, run))
        return reports.build(state, state.time, run_id=run, examples=reports.examples_of(Dataset(store.url)))


def _now(store: Store, run: str) -> tuple[dict[str, Any], float]:
    status = load_status(store, run)
    return status, max(0.0, time.time() - status["time"])


def _follow(store: Store, run: str, show: Any, every: float) -> None:
    """Show a run again and again until it has ended. What is silent is told by this machine's own clock."""
    status, silent = _now(store, run)
    changed = time.monotonic() - silent
    while True:
        show(status, time.monotonic() - changed)
        if status["ended"]:
            return
        time.sleep(every)
        before, status = status, load_status(store, run)
        if status["time"] != before["time"]:
            changed = time.monotonic()


def _say(console: Console, status: dict[str, Any], silent: float, as_json: bool, table: bool = False) -> None:
    if as_json:
        sys.stdout.write(json.dumps(status) + "\n")
        sys.stdout.flush()
    elif table:
        console.print(View(status, silent))
    else:
        console.print(plain(status, silent), markup=False, highlight=False, soft_wrap=True)
