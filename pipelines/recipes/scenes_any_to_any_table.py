"""The table of `scenes_any_to_any`: `dataengine evaluate any-to-any scenes_any_to_any_table` (docs/any-to-any.md)."""

from __future__ import annotations

from pipelines.any_to_any import AnyToAny
from pipelines.recipes._hog import Hog
from pipelines.recipes._scenes import OUT, SIDE


def recipe() -> AnyToAny:
    """On scenes that were not trained on."""
    return AnyToAny(
        model=f"{OUT}/any_to_any/model",
        tokenizers=f"{OUT}/tokenizers",
        root=f"{OUT}/scenes_heldout",
        train_root=f"{OUT}/scenes_many",
        makers=(Hog(),),
        side=SIDE,
    )
