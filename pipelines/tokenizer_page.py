"""The page of `dataengine evaluate tokenizer`: scores, the codebook, and originals beside what came back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from dataengine.modalities import Picture
from model import domains
from model.domains import Domain
from pipelines import reconstruction
from pipelines.evaluate_tokenizer import Judgement, Pair
from pipelines.page import Cell, Column, Grid, Page, Row, Table, render

SHOWN = 24
_SMALLEST = 256
"""Pixels that small maps are enlarged to, pixel by pixel, so that the browser does not blur them."""


def write(path: Path, judged: Judgement, domain: Domain, pairs: Sequence[Pair]) -> None:
    """Write one self-contained HTML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(page(judged, domain, pairs)))


def page(judged: Judgement, domain: Domain, pairs: Sequence[Pair]) -> Page:
    """The scores, what is to be known, and the first values one by one with their own score."""
    own = judged.scores[0]
    facts = (
        (own.metric, number(own.value)),
        ("best constant", number(own.constant)),
        ("tokens of one value", str(judged.tokens)),
        ("bits of one value", f"{judged.bits:.0f}"),
        ("codes used", f"{judged.usage:.0%}"),
        ("perplexity", f"{judged.perplexity:.0f}"),
    )
    subtitle = f"{judged.kind} of {judged.modality}, {judged.samples} values of {judged.root} at {judged.side} pixels"
    title = f"Tokenizer {Path(judged.file).name}" + (" (random weights: it means nothing)" if judged.random else "")
    return Page(title, subtitle, facts, (_scores(judged), _codebook(judged), _pairs(judged, domain, pairs)))


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _scores(judged: Judgement) -> Table:
    rows = tuple(
        (
            s.metric,
            "larger" if s.larger_is_better else "smaller",
            number(s.value),
            number(s.constant),
            number(s.paper),
            s.paper_data,
        )
        for s in judged.scores
    )
    text = (
        "The constant is the best one for each place of these very values. 4M-21's column is the tokenizer bound of "
        "its table 1 (Bachmann et al. 2024): other images, at 224 pixels, to be compared in kind only."
    )
    return Table("Scores", text, ("metric", "better", "tokenizer", "best constant", "4M-21", "on"), rows)


def _codebook(judged: Judgement) -> Table:
    rows = (
        ("codes", str(judged.codes)),
        ("codes used", f"{judged.codes_used} ({judged.usage:.1%})"),
        ("codes not used", str(judged.codes - judged.codes_used)),
        ("perplexity", f"{judged.perplexity:.1f} of {judged.vocab_size}"),
        ("tokens of one value", str(judged.tokens)),
        ("bits of one value", f"{judged.bits:.0f}"),
        ("bits by the codes' frequencies", f"{judged.entropy_bits:.0f}"),
        ("file", judged.file),
        ("sha256", judged.sha256),
        *(("note", note) for note in judged.notes),
    )
    return Table("Codebook", "Over all values that were tokenised.", ("what", "value"), rows)


def _pairs(judged: Judgement, domain: Domain, pairs: Sequence[Pair]) -> Grid:
    metric = judged.scores[0].metric
    things = isinstance(domain, (domains.SamMask, domains.Poses))
    first = [Column("rgb", "image")] if judged.modality != "rgb" else []
    columns = (*first, Column(judged.modality, "original"), Column(judged.modality, "reconstruction"))
    rows = []
    for i, pair in enumerate(pairs[:SHOWN]):
        value, rgb = pair.example.value, pair.example.rgb
        score = reconstruction.figures(domain, [pair.made], [value])[metric]
        cells = [Cell("rgb", Picture(_enlarged(rgb)))] if first else []
        for shown, text in ((value, ""), (pair.made, f"{metric} {number(score)}")):
            drawn = reconstruction.picture(judged.modality, domain, shown, rgb, pair.made if shown is value else value)
            cells.append(Cell(judged.modality, Picture(_enlarged(drawn), text=text)))
        key = f"{pair.example.key}, thing {i}" if things else pair.example.key
        rows.append(Row(key, tuple(cells)))
    text = f"The first {len(rows)} of {judged.samples} values, each with its own {metric}."
    return Grid("Originals and reconstructions", text, columns, tuple(rows))


def _enlarged(image: np.ndarray) -> np.ndarray:
    factor = max(1, _SMALLEST // max(image.shape[:2]))
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST_EXACT)
