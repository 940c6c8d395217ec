"""What tokens are called, here and in ml-4m, and how tokenizers run."""

from __future__ import annotations

from typing import Literal

from dataengine import modalities
from dataengine.ml4m import FEATURES
from pipelines import label

Exact = Literal["float32", "bfloat16", "float16"]
"""What an encoder computes in, wherever it runs; float16 on a GPU alone. A column's identity holds it."""

Precision = Literal["auto", "float32", "bfloat16", "float16"]
"""What may be asked for. auto: bfloat16 on a GPU, float32 on a CPU, as the plan is made (`exact`)."""


def exact(precision: Precision, device: str) -> Exact:
    """What a precision stands for where the networks run on "cpu", "cuda", "cuda:0", ..., or "auto": what is here."""
    if precision != "auto":
        return precision
    return "bfloat16" if label.pick_device(device).startswith("cuda") else "float32"


AT_ONCE = 64
"""Crops that are in a tokenizer at once."""

AT_ONCE_ON_CPU = 4

LARGEST_VOCABULARY = 2**15
"""Ids that a token column can tell apart: as ml-4m's they are int16."""

_GLOBAL = "-global"

INSTANCES = {"human_poses": "human_poses_tokens", "sam_mask": "sam_instance_tokens"}
"""Tokenizers of things in an image, by what they are trained on: the columns that they make."""


def column(modality: str, side: int, *, ml4m: bool = False) -> str:
    """The token column of a modality: `tok_depth@224`, `tok_DINOv2-B14_global`; perhaps in ml-4m's words."""
    if modality in INSTANCES:
        return INSTANCES[modality]
    whole = modality.endswith(_GLOBAL)
    stem = modality.removesuffix(_GLOBAL)
    stem = FEATURES.get(stem, stem) if ml4m else stem
    return f"tok_{stem}_global" if whole else f"tok_{stem}@{side}"


def modality_of(name: str) -> tuple[str, int]:
    """The modality whose tokens a column holds, or that is named itself, and the side, 0 where none is said.

    A version is passed over; ml-4m's names are understood.
    """
    stem, _, side = modalities.split(name)[0].partition("@")
    own = {made: modality for modality, made in INSTANCES.items()} | {"sam_instance": "sam_mask"}
    if stem in own:
        return own[stem], 0
    if stem.startswith("tok_"):
        stem = stem.removeprefix("tok_")
        tail = _GLOBAL if stem.endswith("_global") else ""
        stem = stem.removesuffix("_global")
        stem = next((modality for modality, theirs in FEATURES.items() if theirs == stem), stem) + tail
    return stem, int(side or 0)


LICENCE = "as the data it was trained on"
"""Of a tokenizer about which nothing is stated."""
