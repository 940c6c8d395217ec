"""`dataengine evaluate any-to-any`: the table of every input modality to every output modality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines import config
from pipelines.cli import Json, Settings, exits, say
from pipelines.commands import Name, judging
from pipelines.running import console


@judging.command(name="any-to-any")
@exits
def any_to_any(
    recipe: Name,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Folder for table.json and index.html, with predictions.")] = None,
    as_json: Json = False,
) -> None:
    """Score a model from every input modality to every output modality, against the best constant of each."""
    from pipelines import any_to_any as table
    from pipelines import any_to_any_page as shown

    run = config.override(config.load(recipe, table.AnyToAny), settings or [])
    found = table.evaluate(run)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.json").write_text(json.dumps(found.as_json(), indent=1) + "\n")
        shown.write(out / "index.html", run, found)
    if not as_json:
        console.print(shown.terminal(found))
    say(found.as_json(), as_json, shown.summary(found))
    if out is not None and not as_json:
        console.print(f"wrote {out / 'index.html'} and {out / 'table.json'}", markup=False, highlight=False)
