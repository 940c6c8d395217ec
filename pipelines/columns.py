"""The commands that change a finished dataset or hand it on: drop, rename, export, merge, split, card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from dataengine.manifest import Dataset
from pipelines.cli import Json, Root, app, exits, say
from pipelines.running import console

Columns = Annotated[list[str], typer.Argument(help="Columns: modalities, or versions of one (depth@v2).")]
Chosen = Annotated[str, typer.Option("--columns", help="Only these, separated by commas.")]
Out = Annotated[str, typer.Argument(help="Where to write: a folder or any fsspec URL.")]


@app.command()
@exits
def drop(
    root: Root,
    columns: Columns,
    force: Annotated[list[str] | None, typer.Option(help="Drop this column though others were made from it.")] = None,
    as_json: Json = False,
) -> None:
    """Forget columns: records first, then tars, then unfinished rows. What was ingested stays."""
    from dataengine import evolve

    dropped = evolve.drop(Dataset(root), columns, force or [])
    for d in dropped:
        line = f"{d.column}: {d.num_cells} cells forgotten, {d.num_files} files deleted"
        say(None, False, line if d.num_cells or d.num_files else f"{d.column}: nothing was there")
    if as_json:
        say([vars(d) for d in dropped], True, "")


@app.command()
@exits
def rename(
    root: Root,
    old: Annotated[str, typer.Argument(help="A column (depth@v2).")],
    new: Annotated[str, typer.Argument(help="Its new name (depth), under which nothing is committed.")],
    force: Annotated[bool, typer.Option(help="Though others were made from it, or its identity is lost.")] = False,
    as_json: Json = False,
) -> None:
    """Give a column another name of the same modality; labelling it again under that name does nothing."""
    from dataengine import evolve

    cells = evolve.rename(Dataset(root), old, new, force)
    said = f"{old} is now {new}: {cells} cells" if cells else f"{old} is {new} already"
    say({"old": old, "new": new, "cells": cells}, as_json, said)


@app.command()
@exits
def export(
    root: Root,
    out: Out,
    columns: Chosen = "",
    drop_invalid: Annotated[
        bool, typer.Option(help="Leave out of all columns what is invalid in any, for readers that know no validity.")
    ] = False,
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="Samples a shard; the dataset's shards if none.")
    ] = None,
    for_ml4m: Annotated[
        bool, typer.Option("--ml4m", help="What ml-4m trains 4M on, as its loader needs it; valid samples alone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write columns as plain tars, `OUT/<modality>/shard-00000.tar`, for ml-4m, webdataset and other readers."""
    from dataengine import export as exporting
    from dataengine import ml4m

    dataset = Dataset(root)
    dataset.plan  # noqa: B018  raises when this is no dataset
    if for_ml4m:
        planned, reader = ml4m.layout(dataset, names(columns), shard_size), ml4m.Reader()
    else:
        planned, reader = exporting.layout(dataset, names(columns), drop_invalid, shard_size), None
    for column, why in planned.skipped.items():
        console.print(f"{column} is left out: it {why}", markup=False)
    with Progress(console=console) as bar:
        task = bar.add_task("export", total=len(planned.columns) * len(planned.pieces))
        made = exporting.export(dataset, out, planned, lambda path: bar.advance(task), reader)
    invalid = ", ".join(f"{n} {m}" for m, n in made["invalid"].items())
    say(
        {k: v for k, v in made.items() if k != "tars"},
        as_json,
        f"exported {made['num_samples']} samples, {len(made['columns'])} columns, {len(made['shards'])} shards; "
        f"{made['num_dropped']} invalid samples left out"
        + (f"; PLACEHOLDERS for failed labels are among them: {invalid}" if invalid else ""),
    )


@app.command()
@exits
def merge(
    out: Annotated[str, typer.Argument(help="The root to make.")],
    roots: Annotated[list[str], typer.Argument(help="Two or more dataset roots, in the order of their shards.")],
    columns: Chosen = "",
    as_json: Json = False,
) -> None:
    """Make one dataset root of several: shards renumbered, tars as they are, columns that are complete in all."""
    from dataengine import combine

    sources = [Dataset(root) for root in roots]
    with Progress(console=console) as bar:
        task = bar.add_task("merge", total=sum(s.plan.num_shards for s in sources))
        made = combine.merge(Dataset(out), sources, names(columns), lambda number: bar.advance(task))
    for column, why in made.left_out.items():
        console.print(f"{column} is left out: it {why}", markup=False)
    say(vars(made), as_json, f"merged {len(roots)} roots: {made.num_shards} shards of {', '.join(made.columns)}")


@app.command()
@exits
def split(
    out_a: Annotated[str, typer.Argument(help="The first root to make.")],
    out_b: Annotated[str, typer.Argument(help="The second one, with the other shards.")],
    root: Root,
    fraction: Annotated[float | None, typer.Option(help="Of the shards, spread evenly, to the first root.")] = None,
    shards: Annotated[str, typer.Option(help="The shards of the first root, as 0-99,120.")] = "",
    as_json: Json = False,
) -> None:
    """Make two dataset roots of one, by shards; --fraction or --shards says which go to the first."""
    from dataengine import combine

    dataset = Dataset(root)
    if (fraction is None) == (not shards):
        raise ValueError("split: expected either --fraction or --shards")
    of = dataset.plan.num_shards
    first = combine.ranges(shards) if fraction is None else combine.evenly(fraction, of)
    with Progress(console=console) as bar:
        task = bar.add_task("split", total=of)
        made = combine.split((Dataset(out_a), Dataset(out_b)), dataset, first, lambda shard: bar.advance(task))
    counts = [part.num_shards for part in made]
    say(
        {"shards": counts, "columns": made[0].columns},
        as_json,
        f"{counts[0]} shards to {out_a}, {counts[1]} to {out_b}",
    )


@app.command()
@exits
def card(
    root: Root,
    out: Annotated[Path, typer.Option(help="The Markdown file to write.")] = Path("README.md"),
    name: Annotated[str, typer.Option(help="The dataset's name; the root's last folder if none.")] = "",
    licence: Annotated[str, typer.Option(help="The licence of the images, which no record states.")] = "",
    as_json: Json = False,
) -> None:
    """Write the dataset card (Hugging Face format) from the commit records: sources, labelers, failures, licences."""
    from pipelines import card as cards

    dataset = Dataset(root)
    dataset.plan  # noqa: B018  raises when this is no dataset
    found = cards.facts(dataset, licence)
    cards.write(out, cards.render(found, name))
    say(found, as_json, f"wrote {out}; {found['licence_summary']}")


def names(columns: str) -> list[str]:
    """The names of a comma-separated list, none twice."""
    return list(dict.fromkeys(name for name in columns.split(",") if name))
