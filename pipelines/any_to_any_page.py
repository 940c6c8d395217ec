"""The any-to-any table for people: in a terminal, and as a page with the predictions of some scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table as Terminal
from rich.text import Text

from dataengine import modalities
from dataengine.modalities import Picture
from model.domains import Domain
from pipelines import reconstruction
from pipelines.any_to_any import SURE, AnyTable, AnyToAny, Cell, Target, label_of, tokenizer_of
from pipelines.page import Cell as Shown
from pipelines.page import Column, Grid, Page, Row, Section, Table, render
from pipelines.sample import Tokenizers
from pipelines.tokenizer_page import number
from pipelines.tokens import modality_of

_SMALLEST = 128
_ACROSS = 4

RULE = (
    "In parentheses: the outputs of the nearest training samples do not predict this output surely better than the "
    "constant, so no information is found. An exclamation mark: not better than the constant."
)
"""How a cell is read."""


def said(cell: Cell | None) -> str:
    """A cell of the table: `0.074`, `(0.29)` without information, with `!` where it does not beat the constant."""
    if cell is None:
        return "-"
    text = f"{cell.model:.3g}" + ("" if cell.beats else "!")
    return text if cell.has_information else f"({text})"


def terminal(found: AnyTable) -> Group:
    """Inputs down and outputs across, a few outputs to a table so that each fits a terminal."""
    parts = [Text("RANDOM WEIGHTS: it means nothing", style="bold yellow")] if found.random else []
    starts = range(0, len(found.targets), _ACROSS)
    return Group(*parts, *(_part(found, found.targets[i : i + _ACROSS]) for i in starts), Text(RULE, style="dim"))


def _part(found: AnyTable, targets: Sequence[Target]) -> Terminal:
    out = Terminal(box=SIMPLE_HEAD, padding=(0, 1))
    out.add_column("from \\ to", no_wrap=True)
    for target in targets:
        better = "larger" if target.larger_is_better else "smaller"
        out.add_column(f"{label_of(target.name)}\n{target.metric}\n({better})", justify="right", max_width=13)
    for name, values in _references(targets):
        out.add_row(name, *values, style="dim")
    out.add_section()
    for source in found.sources:
        cells = [found.cell(source, t.name) for t in targets]
        out.add_row(label_of(source), *(Text(said(c), style=_style(c), no_wrap=True) for c in cells))
    return out


def summary(found: AnyTable) -> str:
    """One sentence of counts."""
    n = found.counts()
    return (
        f"better than the constant in {n['informed_and_better']} of {n['informed']} cells where information exists "
        f"(surely in {n['informed_and_surely_better']}), and in {n['other_and_better']} of the other "
        f"{n['cells'] - n['informed']}; {found.samples} held-out samples"
    )


def _references(targets: Sequence[Target]) -> tuple[tuple[str, list[str]], ...]:
    return (
        ("best constant", [number(t.constant) for t in targets]),
        ("tokenizer alone", [number(t.tokenizer) for t in targets]),
    )


def _style(cell: Cell | None) -> str:
    if cell is None or not cell.has_information:
        return "dim"
    return "green" if cell.beats else "bold red"


def write(path: Path, run: AnyToAny, found: AnyTable) -> None:
    """Write one self-contained HTML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(page(run, found, Tokenizers(run.tokenizers))))


def page(run: AnyToAny, found: AnyTable, tokenizers: Tokenizers) -> Page:
    """The table, every cell with its numbers, and predictions of the first samples."""
    n = found.counts()
    facts = (
        ("cells", str(n["cells"])),
        ("with information", str(n["informed"])),
        ("of these better", str(n["informed_and_better"])),
        ("held-out samples", str(found.samples)),
    )
    title = "Any to any" + (" (random weights: it means nothing)" if found.random else "")
    grids = [_grid(found, t.name, tokenizers) for t in found.targets]
    return Page(title, f"{run.model} on {run.root}: {summary(found)}", facts, (_matrix(found), _cells(found), *grids))


def _matrix(found: AnyTable) -> Table:
    header = ("from", *(f"{label_of(t.name)} ({t.metric})" for t in found.targets))
    rows = [(name, *values) for name, values in _references(found.targets)]
    rows += [(label_of(s), *(said(found.cell(s, t.name)) for t in found.targets)) for s in found.sources]
    return Table("Every input to every output", RULE, header, tuple(rows))


def _cells(found: AnyTable) -> Table:
    by_name = {t.name: t for t in found.targets}
    rows = tuple(
        (
            label_of(c.source),
            label_of(c.target),
            by_name[c.target].metric,
            number(c.model),
            number(c.constant),
            number(c.neighbours),
            f"{c.informed:.1%}",
            f"{c.better:.1%}",
        )
        for c in found.cells
    )
    text = (
        "Neighbours: the score of what the nearest training samples have. Informed, better: the shares of resamplings "
        f"in which the neighbours, and the model, are better than the constant; information is from {SURE:.1%} on."
    )
    header = ("from", "to", "metric", "model", "constant", "neighbours", "informed", "better")
    return Table("Cells", text, header, rows)


def _grid(found: AnyTable, target: str, tokenizers: Tokenizers) -> Section:
    name = modality_of(target)[0]
    domain = tokenizer_of(tokenizers, target).domain if target.startswith("tok_") else None
    sources = [s for s in found.sources if s != target]
    columns = (
        Column("rgb", "image"),
        Column(name, "truth"),
        *(Column(name, f"from {label_of(s)}") for s in sources),
    )
    rows = []
    for i, key in enumerate(found.keys):
        rgb, true = found.truth["rgb"][i], found.truth[name][i]
        values = [true, *(found.shown[s, target][i] for s in sources)]
        cells = [Shown("rgb", Picture(image=_enlarged(rgb)))]
        cells += [Shown(name, _picture(name, domain, value, rgb, true)) for value in values]
        rows.append(Row(key, tuple(cells)))
    text = "What predicts the draws best." if domain is not None else "The first draw."
    return Grid(f"To {label_of(target)}", text, columns, tuple(rows))


def _picture(name: str, domain: Domain | None, value: Any, rgb: np.ndarray, true: Any) -> Picture:
    if domain is None:
        return modalities.load(name).picture(value, rgb)
    return Picture(image=_enlarged(reconstruction.picture(name, domain, value, rgb, true)))


def _enlarged(image: np.ndarray) -> np.ndarray:
    factor = max(1, _SMALLEST // max(image.shape[:2]))
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST_EXACT)
