"""Any-to-any with the demo's model: `dataengine generate nano_generate`, a caption to segments, depth and an image."""

from __future__ import annotations

from model.generate import Step
from pipelines.generate import Generate
from pipelines.recipes._scenes import OUT, SIDE


def recipe() -> Generate:
    """A chain: each target is also a condition of the ones after it."""
    chain = (f"tok_semseg@{SIDE}", f"tok_depth@{SIDE}", f"tok_rgb@{SIDE}")
    return Generate(
        model=f"{OUT}/fourm/model",
        tokenizers=f"{OUT}/tokenizers",
        root=f"{OUT}/scenes_heldout",
        given=("caption",),
        steps=tuple(Step(target=m, scheme="maskgit", num_steps=8, temperature=1.0, top_p=0.9) for m in chain),
        out=f"{OUT}/generated.html",
        side=SIDE,
    )
