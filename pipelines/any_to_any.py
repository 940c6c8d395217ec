"""Every input modality to every output modality: a trained model against the constant predictor, cell by cell.

In which cells there is anything to be known is decided without the model: the outputs of the training samples whose
inputs are nearest must predict held-out samples better than the constant does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataengine.labeler import Labeler
from dataengine.sample import Sample
from model.fourm import FourM
from model.generate import Step, generate_each
from model.tokenizers._vq import VQ
from pipelines.evaluate import apart
from pipelines.measures import Counts, Measure, of_domain
from pipelines.sample import Samples, Tokenizers, conditions
from pipelines.text_measures import MEASURES, PALETTE
from pipelines.tokens import modality_of

SURE = 0.975
"""Share of resamplings in which a predictor must be better than the constant to count as better."""


@dataclass(frozen=True, kw_only=True)
class AnyToAny:
    """A trained model and held-out samples; `train_samples` of `train_root` give constants and neighbours.

    `draws` of each prediction are generated (more where the measure says so), and the value that predicts them best is
    scored, as the constant is the one that predicts the training samples best: the mean of images, the median of
    depths. A text ends after `text_tokens` ids. `makers` make the features that are no label. `shown` samples are kept
    for the page.
    """

    model: str
    tokenizers: str
    root: str
    train_root: str
    makers: tuple[Labeler, ...] = ()
    samples: int = 100
    train_samples: int = 2000
    draws: int = 32
    text_tokens: int = 64
    neighbours: int = 32
    resamples: int = 1000
    batch: int = 50
    side: int = 64
    seed: int = 0
    shown: int = 4


@dataclass(frozen=True)
class Cell:
    """One input and one output; `neighbours` is the score of what the nearest training samples have.

    `informed` and `better` are the shares of resamplings of the samples in which the neighbours, or the model, were
    better than the constant.
    """

    source: str
    target: str
    model: float
    constant: float
    neighbours: float
    informed: float
    better: float
    beats: bool

    @property
    def has_information(self) -> bool:
        """Whether the neighbours are better than the constant for sure."""
        return self.informed >= SURE


@dataclass(frozen=True)
class Target:
    """One output modality: its metric, and what its tokenizer alone would score (None for text)."""

    name: str
    metric: str
    larger_is_better: bool
    constant: float
    tokenizer: float | None


@dataclass(frozen=True)
class AnyTable:
    """All cells; seconds of what took how long, and `shown`: by input and output, predictions of the first samples."""

    cells: tuple[Cell, ...]
    targets: tuple[Target, ...]
    sources: tuple[str, ...]
    samples: int
    train_samples: int
    seconds: dict[str, float]
    random: bool
    shown: dict[tuple[str, str], list[Any]]
    truth: dict[str, list[Any]]
    keys: tuple[str, ...]

    def cell(self, source: str, target: str) -> Cell | None:
        """The cell of two columns; None on the diagonal."""
        return next((c for c in self.cells if (c.source, c.target) == (source, target)), None)

    def counts(self) -> dict[str, int]:
        """How many cells there are, have information, and of these and of the others are better than the constant."""
        informed = [c for c in self.cells if c.has_information]
        others = [c for c in self.cells if not c.has_information]
        return {
            "cells": len(self.cells),
            "informed": len(informed),
            "informed_and_better": sum(c.beats for c in informed),
            "informed_and_surely_better": sum(c.better >= SURE for c in informed),
            "other_and_better": sum(c.beats for c in others),
        }

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the predictions."""
        return {
            **self.counts(),
            "samples": self.samples,
            "train_samples": self.train_samples,
            "random_weights": self.random,
            "seconds": self.seconds,
            "targets": [asdict(t) for t in self.targets],
            "table": [asdict(c) | {"has_information": c.has_information} for c in self.cells],
        }


def label_of(column: str) -> str:
    """What a column is called in the table: `rgb (pixels)`, `depth`, `caption`."""
    return "rgb (pixels)" if column.startswith("rgb@") else modality_of(column)[0]


class _Labels:
    """The true values of a dataset's first samples, by modality."""

    def __init__(self, run: AnyToAny, root: str, count: int) -> None:
        self._run, self._samples, self._count = run, Samples(root), count
        self._known: dict[str, list[Any]] = {}

    def __getitem__(self, modality: str) -> list[Any]:
        if modality not in self._known:
            maker = next((m for m in self._run.makers if modality in m.emits), None)
            if maker is None:
                self._known[modality] = self._samples.truth(modality, self._run.side, self._count)
            else:
                images = [Sample(str(i), {"rgb": rgb}) for i, rgb in enumerate(self["rgb"])]
                made = maker.load("cpu")(images)
                self._known |= {m: [values[m] for values in made] for m in maker.emits}
        return self._known[modality]


def evaluate(run: AnyToAny) -> AnyTable:
    """The table of a model over all its inputs and outputs. ValueError when held-out samples were trained on."""
    from model import checkpoint

    apart(run.root, run.train_root)
    model, tokenizers = checkpoint.from_pretrained(run.model).eval(), Tokenizers(run.tokenizers)
    return table(run, model, tokenizers)


def table(run: AnyToAny, model: FourM, tokenizers: Tokenizers, *, random: bool = False) -> AnyTable:
    """The table of a model; `random` says that it was never trained."""
    clock = {"labels": time.monotonic()}
    sources, targets = (tuple(s.name for s in specs) for specs in (model.specs_in, model.specs_out))
    rows = Samples(run.root).rows([*dict.fromkeys((*sources, *targets))], run.samples)
    held, train = _Labels(run, run.root, len(rows)), _Labels(run, run.train_root, run.train_samples)
    of = {name: modality_of(name)[0] for name in (*sources, *targets)}
    measures = {m: _measure(m, name, tokenizers) for name, m in of.items()}
    true, known = ({m: [measures[m].ready(v) for v in labels[m]] for m in measures} for labels in (held, train))
    for m, measure in measures.items():
        measure.fit(known[m])
    weights = resampled(len(rows), run.resamples, run.seed)
    constants = {m: measures[m].constant(known[m]) for m in {of[t] for t in targets}}
    alone = {t: measures[of[t]].counts([constants[of[t]]] * len(rows), true[of[t]]) for t in targets}
    clock["neighbours"] = time.monotonic()
    near = {s: nearest(measures[of[s]], true[of[s]], known[of[s]], run.neighbours) for s in sources}
    cells, shown = [], {}
    for source in sources:
        clock.setdefault("model", time.monotonic())
        made, kept = _predicted(run, model, tokenizers, rows, source, [t for t in targets if t != source], measures)
        for target, values in made.items():
            measure, m = measures[of[target]], of[target]
            local = measure.best([[known[m][i] for i in indices] for indices in near[source]])
            counts = [measure.counts(v, true[m]) for v in (values, local)]
            cells.append(_cell(measure, source, target, counts[0], counts[1], alone[target], weights))
            shown[source, target] = kept[target]
    clock["end"] = time.monotonic()
    names = list(clock)
    return AnyTable(
        cells=tuple(cells),
        targets=tuple(_target(t, measures[of[t]], alone[t], rows, true[of[t]], tokenizers) for t in targets),
        sources=sources,
        samples=len(rows),
        train_samples=len(next(iter(known.values()))),
        seconds={a: round(clock[b] - clock[a], 1) for a, b in itertools.pairwise(names)},
        random=random,
        shown=shown,
        truth={m: held[m][: run.shown] for m in {"rgb", *of.values()}},
        keys=tuple(row["key"] for row in rows[: run.shown]),
    )


def _measure(modality: str, column: str, tokenizers: Tokenizers) -> Measure:
    if modality in MEASURES:
        return MEASURES[modality]()
    if column.startswith("rgb@"):
        column = "tok_" + column
    return of_domain(tokenizer_of(tokenizers, column).domain)


def tokenizer_of(tokenizers: Tokenizers, column: str) -> VQ:
    """The tokenizer of a token column; that of canny edges is that of SAM's, too, where that has none of its own."""
    name = modality_of(column)[0]
    return tokenizers.maps["canny_edge" if name == "sam_edge" and name not in tokenizers.maps else name]


def _target(
    column: str, measure: Measure, alone: Counts, rows: Sequence[Mapping[str, Any]], true: Any, tokenizers: Tokenizers
) -> Target:
    own = None
    if column.startswith("tok_"):
        made = _decoded(tokenizers, column, np.stack([row[column] for row in rows]))
        own = measure.score([measure.said(v) for v in made], true)
    constant = float(measure.total(alone.sum(axis=0)))
    return Target(column, measure.metric, measure.larger_is_better, constant, own)


def _decoded(tokenizers: Tokenizers, column: str, ids: NDArray[Any]) -> list[Any]:
    tokenizer = tokenizer_of(tokenizers, column)
    return list(tokenizer.decode_batch(ids.reshape(-1, *tokenizer.grid)))


# -- the model's predictions ------------------------------------------------------------------------------------------


def _predicted(
    run: AnyToAny,
    model: FourM,
    tokenizers: Tokenizers,
    rows: Sequence[dict[str, Any]],
    source: str,
    targets: Sequence[str],
    measures: Mapping[str, Measure],
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """What predicts the draws of each target best, as it is compared; for the page values, of text the first draw."""
    sets: dict[str, list[list[Any]]] = {t: [] for t in targets}
    kept: dict[str, list[Any]] = {t: [] for t in targets}
    asked: dict[int, list[Step]] = {}
    for name in targets:
        asked.setdefault(measures[modality_of(name)[0]].times, []).append(_step(run, name, tokenizers))
    for start, (times, steps) in itertools.product(range(0, len(rows), run.batch), asked.items()):
        part = conditions(rows[start : start + run.batch], [source])
        drawn = generate_each(model, part, steps, draws=times * run.draws, seed=run.seed + start)
        for name, ids in drawn.items():
            measure = measures[modality_of(name)[0]]
            values = [_values(tokenizers, name, one) for one in ids]
            for sample in zip(*values, strict=True):
                sets[name].append([measure.said(v) for v in sample])
                kept[name].append(sample[0])
    made = {name: measures[modality_of(name)[0]].best(values) for name, values in sets.items()}
    return made, {name: (made if name.startswith("tok_") else kept)[name][: run.shown] for name in targets}


def _step(run: AnyToAny, column: str, tokenizers: Tokenizers) -> Step:
    if column.startswith("tok_"):
        return Step(target=column, scheme="roar", num_steps=1)
    # Palettes have any number of colours: the one that is compared is asked for.
    prefix = tuple(tokenizers.text.encode(f"v1={PALETTE}")) if column == "color_palette" else ()
    return Step(target=column, scheme="autoregressive", prefix=prefix, max_tokens=run.text_tokens)


def _values(tokenizers: Tokenizers, column: str, ids: Any) -> list[Any]:
    if column.startswith("tok_"):
        return _decoded(tokenizers, column, torch.as_tensor(ids).cpu().numpy())
    return [value for value, _ in tokenizers.values(column, ids)]


# -- what is to be known ----------------------------------------------------------------------------------------------


def nearest(measure: Measure, of: Sequence[Any], among: Sequence[Any], count: int) -> NDArray[np.int64]:
    """(n, count): for each value the nearest ones by their vectors, the nearest first."""
    a, b = (np.stack([measure.vector(v) for v in values]).astype(np.float64) for values in (of, among))
    squares = (b**2).sum(axis=1) - 2 * a @ b.T  # the same as distances, but for what is constant in a row
    return np.argsort(squares, axis=1, kind="stable")[:, :count]


def resampled(num: int, times: int, seed: int) -> Counts:
    """(times, num): how often each sample is in each of so many samples drawn with replacement."""
    return np.random.default_rng(seed).multinomial(num, [1 / num] * num, times).astype(np.float64)


def share_better(measure: Measure, counts: Counts, alone: Counts, weights: Counts) -> float:
    """The share of resamplings in which predictions are better than the constant."""
    ours, theirs = measure.total(weights @ counts), measure.total(weights @ alone)
    return float((ours > theirs if measure.larger_is_better else ours < theirs).mean())


def _cell(
    measure: Measure, source: str, target: str, ours: Counts, local: Counts, alone: Counts, weights: Counts
) -> Cell:
    model, neighbours, constant = (float(measure.total(c.sum(axis=0))) for c in (ours, local, alone))
    return Cell(
        source=source,
        target=target,
        model=model,
        constant=constant,
        neighbours=neighbours,
        informed=share_better(measure, local, alone, weights),
        better=share_better(measure, ours, alone, weights),
        beats=model > constant if measure.larger_is_better else model < constant,
    )
