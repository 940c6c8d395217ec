"""The command line: `dataengine <command>`, each command a thin shell around one module."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dataengine.leases import Leases
from dataengine.manifest import Dataset
from dataengine.schedule import single
from pipelines import running
from pipelines.cli import (
    Bad,
    BatchSeconds,
    CpuPrice,
    GpuPrice,
    Json,
    Modalities,
    Permissive,
    Recipe,
    Root,
    RunnerOption,
    Workers,
    app,
    exits,
    say,
    split_settings,
)
from pipelines.live import Prices
from pipelines.running import console
from pipelines.visible import crash


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
    workers: Workers = None,
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
    rows = {i: split.stop - split.start for i, split in enumerate(worker.splits)}
    summary = running.execute(
        dataset,
        [single(worker, tasks, rows, name="ingest")],
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
    root: Root,
    modalities: Modalities = None,
    recipe: Recipe = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Measure the labelers, rehearse the run on a copy of some images.")
    ] = False,
    price_gpu_hour: GpuPrice = None,
    price_cpu_hour: CpuPrice = None,
    permissive: Permissive = False,
    measure_again: Annotated[bool, typer.Option("--measure-again", help="Measure what was measured before.")] = False,
    runner: RunnerOption = "ray",
    workers: Workers = None,
    device: Annotated[str, typer.Option(help="torch device of the networks: cpu, cuda, or auto.")] = "auto",
    as_json: Json = False,
) -> None:
    """The cells to do and the groups they will run in; with --estimate, time, size and cost. Nothing is labelled."""
    from pipelines import bill, label, planning
    from pipelines import estimate as estimates
    from pipelines.licences import refuse_restricted

    dataset = Dataset(root)
    names, settings = split_settings(modalities)
    made, pins = label.plan(dataset, names, recipe, settings), label.run_of(recipe).groups
    if permissive:
        refuse_restricted(made.labelers, dataset)
    where = planning.likely_device(device)
    prices = Prices(price_gpu_hour, price_cpu_hour)
    found = None
    if estimate:
        found = estimates.estimate(
            dataset, made, pins, device=where, runner=runner, workers=workers, prices=prices, again=measure_again
        )
    said = bill.described(dataset, made, pins, device=where, workers=workers)
    if as_json:
        say(said if found is None else {**said, "estimate": bill.as_json(found)}, True, "")
        return
    bill.show_plan(console, said)
    if found is not None:
        bill.show_estimate(console, found)


@app.command()
@exits
def label(
    root: Root,
    modalities: Modalities = None,
    recipe: Recipe = None,
    runner: RunnerOption = "ray",
    workers: Workers = None,
    device: Annotated[str, typer.Option(help="torch device of the networks: cpu, cuda, or auto.")] = "auto",
    replace: Annotated[list[str] | None, typer.Option(help="Make this column anew, whatever is committed.")] = None,
    permissive: Permissive = False,
    batch_timeout: BatchSeconds = running.BATCH_SECONDS,
    price_gpu_hour: GpuPrice = None,
    price_cpu_hour: CpuPrice = None,
    max_bad_fraction: Bad = 0.05,
    as_json: Json = False,
) -> None:
    """Label a dataset: make the wanted cells that are not committed yet. Run it again to resume."""
    from pipelines import label as labelling
    from pipelines.licences import refuse_restricted
    from pipelines.report_text import printed

    dataset = Dataset(root)
    names, settings = split_settings(modalities)
    made = labelling.plan(dataset, names, recipe, settings, replace or [])
    if permissive:
        refuse_restricted(made.labelers, dataset)
    labelling.replace(dataset, replace or [])
    for labeler in made.labelers:
        if labeler.random:
            console.print(f"{labeler.name}: RANDOM WEIGHTS, its labels mean nothing", style="bold yellow")
    summary = labelling.execute(
        dataset,
        made,
        labelling.run_of(recipe).groups,
        runner=runner,
        workers=workers,
        device=device,
        replace=replace or [],
        max_bad_fraction=max_bad_fraction,
        prices=Prices(price_gpu_hour, price_cpu_hour),
        batch_seconds=batch_timeout,
    )
    if summary.report and not as_json:
        console.print(printed(summary.report))
    failed = sum(summary.invalid.values())
    say(
        {**summary.as_json(), "already_committed": made.num_done},
        as_json,
        f"committed {made.num_cells} cells, {made.num_done} were committed already; {failed} labels failed",
    )


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
    table = Table("modality", "shards", "samples", "failed", "MB", "made by", title=dataset.store.name)
    for r in rows:
        who = f"{r.labeler} (RANDOM WEIGHTS)" if r.random else r.labeler
        table.add_row(r.modality, f"{r.shards}/{r.of}", str(r.samples), str(r.invalid), f"{r.num_bytes / 1e6:.1f}", who)
    console.print(table)
    console.print(f"{dataset.num_quarantined()} items in quarantine")


@app.command()
@exits
def verify(
    root: Root,
    settings: Annotated[
        list[str] | None, typer.Argument(help="For --replay, as labeler.field=value: sam.checkpoint=PATH.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")] = None,
    sample: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Decode this fraction of the samples; everything is hashed.")
    ] = 1.0,
    replay: Annotated[
        str | None, typer.Option(help="Label this part of the cells (1% or 0.01) again, and compare the bytes.")
    ] = None,
    recipe: Recipe = None,
    tokenizers: Annotated[str | None, typer.Option(help="Folder of tokenizers, to replay token columns.")] = None,
    device: Annotated[str, typer.Option(help="torch device of --replay: cpu, cuda, or auto.")] = "auto",
    as_json: Json = False,
) -> None:
    """Re-read everything: hashes, alignment, decodability, the schema of each modality, crops in range.

    Problems are printed as they are found. With --replay, a sample of the labels is made again as well.
    """
    from pipelines import verifying

    dataset = Dataset(root)
    dataset.plan  # noqa: B018  raises when this is no dataset
    part = None if replay is None else verifying.fraction(replay)
    found = verifying.verify(dataset, workers=workers or os.cpu_count() or 1, sample=sample)
    if part is not None:
        verifying.replay(dataset, found, part, device, recipe, settings or [], tokenizers)
    say(found.as_json(), as_json, found.line())
    if found.problems:
        raise typer.Exit(4)


DAY = 86400.0
"""Seconds after which an upload that was begun and never ended is taken for abandoned."""


@app.command()
@exits
def gc(
    root: Root,
    delete: Annotated[bool, typer.Option(help="Delete them; without it they are only listed.")] = False,
    as_json: Json = False,
) -> None:
    """List what no commit record names (left by interrupted runs), and delete it when told to.

    What a live run is at work on is left alone.
    """
    dataset = Dataset(root)
    dataset.plan  # noqa: B018  raises when this is no dataset
    orphans = dataset.orphans(Leases(dataset.store).at_work())
    for path in orphans:
        if not as_json:
            console.print(path, markup=False)
        if delete:
            dataset.store.remove(path)
    if delete:
        dataset.store.abort_uploads(older=DAY)
    say(orphans, as_json, f"{len(orphans)} orphans {'deleted' if delete else 'found'}")


@app.command()
@exits
def retry(
    root: Root,
    modalities: Modalities = None,
    reason: Annotated[str, typer.Option(help="Only cells with a failure whose reason holds this text.")] = "",
    recipe: Recipe = None,
    runner: RunnerOption = "ray",
    workers: Workers = None,
    max_bad_fraction: Bad = 0.05,
) -> None:
    """Make cells with failed labels again: forget them, then label. Samples refused at ingest are in no cell."""
    from dataengine.index import Index
    from pipelines import label as labelling

    dataset = Dataset(root)
    names, settings = split_settings(modalities)
    ingested, index = dataset.plan.ingested, Index.open(dataset.store)
    failed = [
        (m, shard)
        for m in names or [m for m in index.modalities() if m not in ingested and not m.startswith("tok")]
        for shard in index.failed(m)
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
    label(root, [*again, *settings], recipe, runner, workers, max_bad_fraction=max_bad_fraction)


@app.command()
@exits
def inspect(
    root: Root,
    out: Annotated[str, typer.Option(help="The HTML file to write.")] = "inspect.html",
    samples: Annotated[int, typer.Option(min=1, help="How many samples to show.")] = 24,
) -> None:
    """Write one self-contained HTML page: samples x modalities, commits, quarantine, provenance."""
    from pipelines import look, page

    dataset = Dataset(root)
    dataset.plan  # noqa: B018  raises when this is no dataset
    Path(out).write_text(page.render(look.page(dataset, samples)))
    console.print(f"wrote {out}")


@app.command()
@exits
def doctor(
    what: Annotated[str, typer.Argument(help="labelers: load each and measure it; without it, an overview.")] = "",
    names: Annotated[list[str] | None, typer.Argument(help="Which labelers; all when none is named.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="On random checkpoints of a few kilobytes.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch the weights that are not here.")] = False,
    golden: Annotated[
        Path | None, typer.Option(help="Folder of outputs to compare with; those not there yet are kept in it.")
    ] = None,
    device: Annotated[str, typer.Option(help="torch device of the networks: cpu, cuda, or auto.")] = "auto",
    as_json: Json = False,
) -> None:
    """What this machine can run: Ray, GPUs, weights found, licences, rival packages.

    `doctor labelers [NAME ...]` loads each and prints its weights or how to get them, licence, load time, size, memory,
    images/s by batch, and whether its outputs are valid. It ends with 4 when one that is named cannot run.
    """
    from pipelines import checkup, label
    from pipelines import doctor as doctors

    if what == "labelers":
        where, found = label.pick_device(device), []
        for one in checkup.checkups(names or [], where, tiny=tiny, download=download, golden=golden):
            found.append(one)
            if not as_json:
                checkup.show(one)
        if as_json:
            say([f.as_json() for f in found], True, "")
        if any(f.outcome == "failed" or (names and f.outcome != "ready") for f in found):
            raise typer.Exit(4)
        return
    if what:
        raise ValueError(f"doctor {what}: expected `doctor`, or `doctor labelers [NAME ...]`")
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
    from pipelines import calibrate, columns, commands, judging, watch  # noqa: F401  the other commands register themselves

    sys.excepthook = crash
    app()


if __name__ == "__main__":
    main()
