"""The command line: `dataengine <command>`, each command a thin shell around one module."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from dataengine.manifest import Dataset
from pipelines import running
from pipelines.cli import Bad, Json, Modalities, Recipe, Root, RunnerOption, Workers, app, exits, say
from pipelines.running import console


@app.command()
@exits
def ingest(
    corpus: Annotated[str, typer.Argument(help="folder:PATH, webdataset:URL, parquet:URL, hf:NAME or scenes:COUNT.")],
    root: Root,
    shard_size: Annotated[int, typer.Option(min=1, help="Images a shard.")] = 1000,
    num_crops: Annotated[
        int, typer.Option(min=1, help="Crops drawn for each image; the first is the centre crop.")
    ] = 1,
    min_crop_scale: Annotated[float, typer.Option(min=0.01, max=1.0, help="Smallest area of a random crop.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the crops.")] = 0,
    max_pixels: Annotated[int | None, typer.Option(help="Refuse images that declare more pixels.")] = None,
    runner: RunnerOption = "ray",
    workers: Workers = 2,
    max_bad_fraction: Bad = 1.0,
    as_json: Json = False,
) -> None:
    """Take a corpus in: canonical images, captions and crop settings, in shards; what is refused goes to quarantine."""
    from dataengine.canonical import Limits
    from dataengine.ingest import IngestSettings, prepare

    dataset = Dataset(root)
    limits = Limits() if max_pixels is None else Limits(max_pixels=max_pixels)
    settings = IngestSettings(
        shard_size=shard_size, num_crops=num_crops, min_crop_scale=min_crop_scale, seed=seed, limits=limits
    )
    worker, tasks = prepare(dataset, corpus, settings)
    summary = running.execute(
        dataset,
        worker,
        tasks,
        what="ingest",
        runner=runner,
        workers=workers,
        device="cpu",
        max_bad_fraction=max_bad_fraction,
    )
    shards = dataset.plan.num_shards
    say(
        {**summary.as_json(), "shards": shards},
        as_json,
        f"ingested {summary.num_samples} images, refused {summary.num_refused}: {len(tasks)} of {shards} shards to do",
    )


@app.command()
@exits
def plan(
    root: Root, modalities: Modalities = None, recipe: Recipe = None, workers: Workers = 2, as_json: Json = False
) -> None:
    """The cells to do, in order, and what they will cost, measured on a few images here; nothing is written."""
    from pipelines import estimate, label

    dataset = Dataset(root)
    names, settings = _split(modalities)
    made = label.plan(dataset, names, recipe, settings)
    lines = estimate.estimate(dataset, made)
    hours = sum(line.seconds for line in lines) / workers / 3600
    if as_json:
        say(
            {"cells": made.num_cells, "done": made.num_done, "hours": hours, "labelers": [vars(x) for x in lines]},
            True,
            "",
        )
        return
    table = Table(
        "labeler", "makes", "cells to do", "images", "s/image here", "core hours", title=f"{made.num_cells} cells to do"
    )
    for x in lines:
        each = "-" if x.seconds_per_image is None else f"{x.seconds_per_image:.3f}"
        table.add_row(x.labeler, ", ".join(x.emits), str(x.cells), str(x.images), each, f"{x.seconds / 3600:.3f}")
    console.print(table)
    console.print(f"{made.num_done} cells are committed already; about {hours:.2f} h with {workers} workers")


@app.command()
@exits
def label(
    root: Root,
    modalities: Modalities = None,
    recipe: Recipe = None,
    runner: RunnerOption = "ray",
    workers: Workers = 2,
    device: Annotated[str, typer.Option(help="torch device of the networks: cpu, cuda, or auto.")] = "auto",
    replace: Annotated[list[str] | None, typer.Option(help="Make this column anew, whatever is committed.")] = None,
    max_bad_fraction: Bad = 0.05,
    as_json: Json = False,
) -> None:
    """Label a dataset: make the wanted cells that are not committed yet. Run it again to resume."""
    from pipelines import label as labelling

    dataset = Dataset(root)
    names, settings = _split(modalities)
    made = labelling.plan(dataset, names, recipe, settings, replace or [])
    labelling.replace(dataset, replace or [])
    for labeler in made.labelers:
        if labeler.random:
            console.print(f"{labeler.name}: RANDOM WEIGHTS, its labels mean nothing", style="bold yellow")
    summary = running.execute(
        dataset,
        made.group(dataset.store.url),
        made.tasks,
        what="label",
        runner=runner,
        workers=workers,
        device=labelling.pick_device(device),
        max_bad_fraction=max_bad_fraction,
        recipe=[{**x.identity(), "random": x.random} for x in made.labelers],
    )
    failed = sum(summary.invalid.values())
    say(
        {**summary.as_json(), "already_committed": made.num_done},
        as_json,
        f"committed {made.num_cells} cells, {made.num_done} were committed already; {failed} labels failed",
    )


def _split(arguments: list[str] | None) -> tuple[list[str], list[str]]:
    """Modality names and `labeler.field=value` settings, told apart by the equals sign."""
    given = arguments or []
    return [a for a in given if "=" not in a], [a for a in given if "=" in a]


@app.command()
@exits
def status(root: Root, as_json: Json = False) -> None:
    """What is committed, by modality: shards, labels that failed, bytes, and who made it."""
    from pipelines import look

    dataset = Dataset(root)
    rows = look.status(dataset)
    if as_json:
        say([vars(r) for r in rows], True, "")
        return
    table = Table("modality", "shards", "samples", "failed", "MB", "made by", title=dataset.store.url)
    for r in rows:
        who = f"{r.labeler} (RANDOM WEIGHTS)" if r.random else r.labeler
        table.add_row(r.modality, f"{r.shards}/{r.of}", str(r.samples), str(r.invalid), f"{r.num_bytes / 1e6:.1f}", who)
    console.print(table)
    console.print(f"{len(dataset.quarantine())} items in quarantine")


@app.command()
@exits
def verify(root: Root, as_json: Json = False) -> None:
    """Re-read everything: hashes, alignment, decodability, the schema of each modality, crops in range."""
    from rich.progress import Progress

    from dataengine import validate

    dataset = Dataset(root)
    dataset.plan  # noqa: B018  raises when this is no dataset
    cells = sum(len(dataset.committed(m)) for m in dataset.modalities())
    with Progress(console=console) as bar:
        task = bar.add_task("verify", total=cells)
        problems = validate.verify(dataset, lambda modality, shard: bar.advance(task))
    for p in problems:
        console.print(f"{p.file} {p.key}: {p.problem}", markup=False)
    say([vars(p) for p in problems], as_json, f"{cells} cells read, {len(problems)} problems")
    if problems:
        raise typer.Exit(4)


@app.command()
@exits
def gc(
    root: Root,
    delete: Annotated[bool, typer.Option(help="Delete them; without it they are only listed.")] = False,
    as_json: Json = False,
) -> None:
    """List what no commit record names (left by interrupted runs), and delete it when told to."""
    dataset = Dataset(root)
    dataset.plan  # noqa: B018  raises when this is no dataset
    orphans = dataset.orphans()
    for path in orphans:
        if not as_json:
            console.print(path, markup=False)
        if delete:
            dataset.store.remove(path)
    say(orphans, as_json, f"{len(orphans)} orphans {'deleted' if delete else 'found'}")


@app.command()
@exits
def retry(
    root: Root,
    modalities: Modalities = None,
    reason: Annotated[str, typer.Option(help="Only cells with a failure whose reason holds this text.")] = "",
    recipe: Recipe = None,
    runner: RunnerOption = "ray",
    workers: Workers = 2,
    max_bad_fraction: Bad = 0.05,
) -> None:
    """Make cells with failed labels again: forget them, then label. Samples refused at ingest are in no cell."""
    from pipelines import label as labelling

    dataset = Dataset(root)
    names, settings = _split(modalities)
    ingested = dataset.plan.ingested
    failed = [
        (m, shard)
        for m in names or [m for m in dataset.modalities() if m not in ingested and not m.startswith("tok")]
        for shard in dataset.committed(m)
        if any(reason in why for why in getattr(dataset.commit(m, shard), "invalid", {}).values())
    ]
    again = sorted({m for m, _ in failed})
    console.print(f"{len(failed)} cells to make again: {', '.join(again) or 'none'}")
    if not again:
        return
    # Planned before anything is forgotten: a mistyped setting or recipe loses nothing.
    labelling.plan(dataset, again, recipe, settings, failed)
    for m, shard in failed:
        dataset.uncommit(m, shard)
    label(root, [*again, *settings], recipe, runner, workers, "auto", None, max_bad_fraction, False)


@app.command()
@exits
def inspect(
    root: Root,
    out: Annotated[str, typer.Option(help="The HTML file to write.")] = "inspect.html",
    samples: Annotated[int, typer.Option(min=1, help="How many samples to show.")] = 24,
) -> None:
    """Write one self-contained HTML page: samples x modalities, commits, quarantine, provenance."""
    from pathlib import Path

    from pipelines import look, page

    dataset = Dataset(root)
    dataset.plan  # noqa: B018  raises when this is no dataset
    Path(out).write_text(page.render(look.page(dataset, samples)))
    console.print(f"wrote {out}")


@app.command()
@exits
def doctor(as_json: Json = False) -> None:
    """What this machine can run: Ray, GPUs, weights found, licences, rival packages."""
    from pipelines import doctor as doctors

    report = doctors.examine()
    if as_json:
        say(report, True, "")
        return
    for section, rows in report.items():
        table = Table("what", "finding", title=section)
        for name, finding in rows.items():
            table.add_row(name, str(finding))
        console.print(table)


def main() -> None:
    """Entry point of the console script."""
    from pipelines import columns, commands, watch  # noqa: F401  the other commands register themselves

    app()


if __name__ == "__main__":
    main()
