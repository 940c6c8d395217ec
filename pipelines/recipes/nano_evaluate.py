"""The demo's score: `dataengine evaluate nano_evaluate`, depth, normals and segments from RGB alone on 200 scenes."""

from __future__ import annotations

from model.generate import Step
from pipelines.evaluate import Evaluate
from pipelines.recipes._scenes import OUT, SIDE
from pipelines.recipes.nano import DENSE, PIXELS


def recipe() -> Evaluate:
    """One pass for each target (ROAR with one step), the likeliest token at each place."""
    return Evaluate(
        model=f"{OUT}/fourm/model",
        tokenizers=f"{OUT}/tokenizers",
        root=f"{OUT}/scenes_heldout",
        train_root=f"{OUT}/scenes",
        given=(PIXELS,),
        steps=tuple(Step(target=m, scheme="roar", num_steps=1, temperature=0.0) for m in DENSE),
        samples=200,
        side=SIDE,
    )
