"""Any modality of a scene from any other: `dataengine train scenes_any_to_any` (docs/any-to-any.md)."""

from __future__ import annotations

from dataclasses import replace

from model.fourm import FourMConfig
from model.loop import LoopConfig
from model.masking import MaskingConfig, MixtureComponent
from pipelines.recipes._scenes import OUT, PATCH, SIDE
from pipelines.train import Source, TrainFourM

PIXELS = f"rgb@{SIDE}"
MAPS = tuple(f"tok_{m}@{SIDE}" for m in ("rgb", "depth", "normal", "semseg", "canny_edge", "sam_edge", "HOG"))
TEXTS = ("caption", "det", "metadata", "color_palette")
OUTPUTS = (*MAPS, "tok_HOG_global", *TEXTS)
INPUTS = (PIXELS, *OUTPUTS)


def recipe() -> TrainFourM:
    """On 12,000 scenes (docs/any-to-any.md tells how to make them); 50 minutes on two cores.

    Three quarters of the samples see one modality whole, pixels twice as often; the others parts of several.
    Targets are of one or two modalities (concentration 0.1) or of many (1).
    """
    single = [
        MixtureComponent(
            weight=2.0 if name == PIXELS else 1.0,
            input_alphas={name: 1.0},
            target_alphas=dict.fromkeys(OUTPUTS, alpha),
            keep=dict.fromkeys(TEXTS, "all"),
        )
        for name in INPUTS
        for alpha in (0.1, 1.0)
    ]
    several = [
        MixtureComponent(
            weight=len(INPUTS) / 3,
            input_alphas=dict.fromkeys(INPUTS, alpha),
            target_alphas=dict.fromkeys(OUTPUTS, alpha),
        )
        for alpha in (0.05, 0.5)
    ]
    return TrainFourM(
        data=(Source(root=f"{OUT}/scenes_many"),),
        inputs=INPUTS,
        outputs=OUTPUTS,
        model=replace(FourMConfig.preset("nano"), decoder_depth=2),
        masking=MaskingConfig(
            components=(*single, *several),
            input_tokens=(64, 64),
            target_tokens=(96, 96),
            redistribute=True,
        ),
        loop=LoopConfig(
            steps=8000,
            lr=1e-3,
            min_lr=1e-5,
            warmup_steps=100,
            betas=(0.9, 0.95),
            dtype="float32",
            ema_decay=0.99,
            log_every=20,
            checkpoint_every=250,
        ),
        batch_size=32,
        out=f"{OUT}/any_to_any",
        patch_size=PATCH,
        per_token=True,
    )
