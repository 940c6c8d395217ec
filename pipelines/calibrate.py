"""The command that fits one detector's scores to another's, on a dataset that both have labelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from dataengine import modalities
from dataengine.evolve import existing
from dataengine.manifest import Dataset
from pipelines.cli import Json, Root, app, exits, say

Column = Annotated[str, typer.Argument(help="A column of boxes: det, or a version of it (det@dfine).")]


@app.command()
@exits
def calibrate(
    root: Root,
    own: Column,
    reference: Annotated[str, typer.Argument(help="The column whose scores are to be met: det, made by ViTDet-H.")],
    out: Annotated[str, typer.Option(help="Where to write the calibration, a JSON file.")] = "calibration.json",
    truth: Annotated[str, typer.Option(help="A column of true boxes; without, scores are matched by counts.")] = "",
    as_json: Json = False,
) -> None:
    """Fit one detector's scores to another's, so that one threshold (ml-4m's 0.6) means the same of both.

    Then: `dataengine label OTHER det=dfine dfine.calibration=calibration.json`.
    """
    from labelers import _calibration

    dataset = Dataset(root)
    columns = [own, reference, *([truth] if truth else [])]
    values = [_values(dataset, column, columns) for column in columns]
    knots = _calibration.fit(*values)
    num_images = len(values[0])
    how = f"against the truth of {truth}" if truth else "by counts"
    _calibration.write(out, knots, f"{own} as {reference}, {how}, {num_images} images")
    at = float(_calibration.apply(knots, np.array([0.6]))[0])
    say(
        {"out": str(Path(out)), "images": num_images, "knots": knots},
        as_json,
        f"wrote {out}: {num_images} images, {how}; a score of 0.6 of {own} is {at:.3f} of {reference}",
    )


def _values(dataset: Dataset, column: str, all_of_them: Sequence[str]) -> list[Any]:
    """The boxes of every image, of the shards that all columns have, in one order; ValueError for random weights."""
    if modalities.split(column)[0] != "det":
        raise ValueError(f"{column}: expected a column of boxes, det or a version of it")
    common = sorted(set.intersection(*(set(dataset.committed(c)) for c in all_of_them)))
    if not common:
        raise ValueError(f"no shard has all of {', '.join(all_of_them)}: label them first")
    if existing(dataset, column, common[0]).provenance.get("random"):
        raise ValueError(f"{column} comes from random weights: its scores mean nothing")
    modality = modalities.load(column)
    return [modality.decode(member.data) for shard in common for member in dataset.read(column, shard)]
