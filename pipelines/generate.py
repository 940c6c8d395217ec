"""Generate modalities from others with a trained model, and show input, prediction and truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataengine import modalities
from model.generate import Step
from pipelines.page import Cell, Column, Grid, Page, Row, render
from pipelines.sample import Samples, Tokenizers, predict


@dataclass(frozen=True, kw_only=True)
class Generate:
    """A trained model, the samples to take conditions from, and the chain of targets."""

    model: str
    tokenizers: str
    root: str
    given: tuple[str, ...]
    steps: tuple[Step, ...]
    out: str
    samples: int = 16
    side: int = 64
    seed: int = 0


def write_page(run: Generate) -> Path:
    """Generate the targets for the first samples and write one page: given, generated, truth."""
    from model import checkpoint

    model, tokenizers, samples = checkpoint.from_pretrained(run.model), Tokenizers(run.tokenizers), Samples(run.root)
    rows = samples.rows(run.given, run.samples)
    ids = predict(model, rows, run.given, run.steps, run.seed)
    made = {target: tokenizers.values(target, values) for target, values in ids.items()}
    rgb = samples.truth("rgb", run.side, len(rows))
    columns, cells = [], [list[Cell]() for _ in rows]

    def add(name: str, role: str, values: list[Any]) -> None:
        columns.append(Column(name, role))
        for row, value, image in zip(cells, values, rgb, strict=True):
            row.append(Cell(name, modalities.load(name).picture(value, image)))

    for column in run.given:
        name = _modality(column)
        add(name, "given", samples.truth(name, run.side, len(rows)))
    for step in run.steps:
        name = _modality(step.target)
        is_map = step.target.startswith("tok_")
        add(name, "generated", [v if is_map else v[0] for v in made[step.target]])
        add(name, "truth", samples.truth(name, run.side, len(rows)))
    shown = tuple(Row(row["key"], tuple(c)) for row, c in zip(rows, cells, strict=True))
    title = f"{', '.join(map(_modality, run.given))} to {', '.join(_modality(s.target) for s in run.steps)}"
    grid = Grid(title, "Targets are generated in the order of their columns.", tuple(columns), shown)
    path = Path(run.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(Page(title, run.model, (), (grid,))))
    return path


def _modality(column: str) -> str:
    return column.removeprefix("tok_").split("@")[0]
