"""The form of every benchmark: its options, a table of its figures for people, and one last line of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

console = Console(stderr=True, soft_wrap=True)
"""Where a benchmark says what it is doing: beside the figures, never among them."""

Measure = Callable[[bool, Path | None], Mapping[str, Any]]
"""(quick, reference checkout) to figures: plain values, or mappings and lists of them."""


def main(measure: Measure) -> None:
    """Run a benchmark as `python -m benchmarks.NAME [--quick] [--reference DIR] [--json]`."""

    def command(
        quick: Annotated[bool, typer.Option("--quick", help="Less of it: within a minute on two cores.")] = False,
        reference: Annotated[Path | None, typer.Option(help="A checkout to measure side by side.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON on standard output.")] = False,
    ) -> None:
        figures = measure(quick, reference)
        table = Table("figure", "value")
        for name, value in _flat("", figures):
            table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value))
        console.print(table)
        if as_json:
            typer.echo(json.dumps(figures))

    command.__doc__ = measure.__doc__
    typer.run(command)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), inner)
    elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        for i, inner in enumerate(value):
            yield from _flat(f"{prefix}[{i}]", inner)
    else:
        yield prefix, value
