"""The page of the demo: photographs, scenes, training curves, and predictions beside the truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataengine import modalities
from dataengine.manifest import Dataset
from dataengine.modalities import Picture
from model.generate import Step
from pipelines import look
from pipelines.evaluate import Score
from pipelines.page import Cell, Column, Curve, Grid, Page, Plot, Row, Section, Table, render
from pipelines.recipes import _scenes
from pipelines.sample import Samples, Tokenizers, predict

SHOWN = 12
SIDE = _scenes.SIDE


def write(
    out: Path, photo: Dataset, scenes: Dataset, heldout: Dataset, scores: Sequence[Score], maps: dict[str, list[Any]]
) -> None:
    """Write `<out>/index.html` from the committed data, the training logs and the predictions."""
    from model import checkpoint

    model = checkpoint.from_pretrained(out / "fourm" / "model")
    tokenizers, samples = Tokenizers(str(out / "tokenizers")), Samples(heldout.store.url)
    truth = {m: samples.truth(m, SIDE, SHOWN) for m in ("rgb", *maps)}
    sections: list[Section] = [
        _score_table(scores),
        _predictions(truth, maps, samples.rows([], SHOWN)),
        _generated(model, tokenizers, samples, truth, "caption", f"tok_semseg@{SIDE}"),
        _generated(model, tokenizers, samples, truth, f"tok_depth@{SIDE}", f"tok_rgb@{SIDE}"),
        _generated(model, tokenizers, samples, truth, f"rgb@{SIDE}", "caption"),
        *_curves(out),
        *look.sections(photo, 20, "Photographs: "),
        *look.sections(scenes, SHOWN, "Scenes: "),
    ]
    facts = tuple((f"{s.modality}, model over constant", f"{s.ratio:.2f} x") for s in scores)
    page = Page(
        "From photographs to an any-to-any model",
        "Real photographs and rendered scenes, their aligned labels and tokens, and a nano model trained on them.",
        facts,
        tuple(sections),
    )
    (out / "index.html").write_text(render(page))


def _score_table(scores: Sequence[Score]) -> Table:
    rows = tuple(
        (s.modality, s.metric, f"{s.model:.4f}", f"{s.constant:.4f}", f"{s.ratio:.3f}", f"{s.tokenizer:.4f}")
        for s in scores
    )
    text = (
        f"From RGB alone, on {scores[0].num_samples} scenes the model never saw. The constant is the best one for each "
        "pixel on the training scenes; the tokenizer's column is what a perfect model could reach with these tokens."
    )
    header = ("modality", "metric", "model", "best constant", "ratio", "tokenizer alone")
    return Table("Scores", text, header, rows)


def _picture(modality: str, value: Any, rgb: np.ndarray) -> Picture:
    return modalities.load(modality).picture(value, rgb)


def _predictions(truth: dict[str, list[Any]], maps: dict[str, list[Any]], rows: Sequence[dict[str, Any]]) -> Grid:
    names = list(maps)
    columns = [Column("rgb", "input")]
    for m in names:
        columns += [Column(m, "prediction"), Column(m, "truth")]
    out = []
    for i, row in enumerate(rows):
        rgb = truth["rgb"][i]
        cells = [Cell("rgb", _picture("rgb", rgb, rgb))]
        for m in names:
            cells += [Cell(m, _picture(m, maps[m][i], rgb)), Cell(m, _picture(m, truth[m][i], rgb))]
        out.append(Row(row["key"], tuple(cells)))
    text = "Each prediction is one pass of the model over the image; the truth is exact."
    return Grid("RGB to depth, normals and segments", text, tuple(columns), tuple(out))


def _generated(
    model: Any, tokenizers: Tokenizers, samples: Samples, truth: dict[str, list[Any]], given: str, target: str
) -> Grid:
    """A grid of given, generated and true values of the shown samples."""
    rows = samples.rows([given, target], SHOWN)
    if target.startswith("tok_"):
        step = Step(target=target, scheme="maskgit", num_steps=8, temperature=1.0, top_p=0.9)
    else:
        step = Step(target=target, scheme="autoregressive", temperature=0.3, top_p=0.8, max_tokens=32)
    made = tokenizers.values(target, predict(model, rows, (given,), (step,), seed=0)[target])
    name_in, name_out = (n.removeprefix("tok_").split("@")[0] for n in (given, target))
    true_in = truth[name_in] if name_in in truth else samples.truth(name_in, SIDE, SHOWN)
    true_out = truth[name_out] if name_out in truth else samples.truth(name_out, SIDE, SHOWN)
    out = []
    for i, row in enumerate(rows):
        rgb = truth["rgb"][i]
        # A generated text comes with what was wrong in it, if anything was.
        value, complaints = made[i] if not target.startswith("tok_") else (made[i], [])
        cells = (
            Cell(name_in, _picture(name_in, true_in[i], rgb)),
            Cell(name_out, _picture(name_out, value, rgb), note="; ".join(complaints)),
            Cell(name_out, _picture(name_out, true_out[i], rgb)),
        )
        out.append(Row(row["key"], cells))
    columns = (Column(name_in, "given"), Column(name_out, "generated"), Column(name_out, "truth"))
    how = "MaskGIT in 8 steps" if step.scheme == "maskgit" else "one word piece after another"
    text = f"Generated from {name_in} alone ({how}); many answers are right, the truth is one of them."
    return Grid(f"{name_in} to {name_out}", text, columns, tuple(out))


def _curves(out: Path) -> list[Plot]:
    """The loss curves of the model, by modality, and of the tokenizers."""
    model = _log(out / "fourm" / "log.jsonl")
    names = sorted({k for line in model for k in line if k.startswith("loss/")})
    by_modality = tuple(_curve(name.removeprefix("loss/"), name, model) for name in names)
    tokenizers = tuple(
        _curve(path.parent.name, "reconstruction", _log(path)) for path in sorted(out.glob("tokenizers/*/log.jsonl"))
    )
    return [
        Plot("Model: loss", "step", "nats a token", (_curve("all", "loss", model),)),
        Plot("Model: loss by modality", "step", "nats a token", by_modality),
        Plot("Tokenizers: reconstruction loss", "step", "loss", tokenizers, log_y=True),
    ]


def _log(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _curve(name: str, key: str, log: Sequence[dict[str, float]]) -> Curve:
    lines = [line for line in log if key in line]
    return Curve(name, tuple(line["step"] for line in lines), tuple(line[key] for line in lines))
