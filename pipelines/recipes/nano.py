"""The demo's any-to-any model: `dataengine train nano`, about twelve minutes on two cores."""

from __future__ import annotations

from dataclasses import replace

from model.fourm import FourMConfig
from model.loop import LoopConfig
from model.masking import MaskingConfig, MixtureComponent
from pipelines.recipes._scenes import OUT, PATCH, SIDE
from pipelines.train import Source, TrainFourM

PIXELS = f"rgb@{SIDE}"
MAPS = tuple(f"tok_{m}@{SIDE}" for m in ("depth", "normal", "semseg", "rgb", "canny_edge"))
TEXTS = ("caption", "det", "metadata", "color_palette")
DENSE = MAPS[:3]


def recipe() -> TrainFourM:
    """Half of the samples learn to see (image to depth, normals, segments), the others any modality from any other."""
    everything = (PIXELS, *MAPS, *TEXTS)
    see = MixtureComponent(weight=5.0, input_alphas={PIXELS: 1.0}, target_alphas=dict.fromkeys(DENSE, 5.0))
    to_text = MixtureComponent(weight=1.0, input_alphas={PIXELS: 1.0}, target_alphas=dict.fromkeys(TEXTS, 1.0))
    any_to_any = MixtureComponent(
        weight=2.0,
        input_alphas=dict.fromkeys(everything, 0.2),
        target_alphas=dict.fromkeys((*MAPS, *TEXTS), 0.2),
    )
    from_caption = MixtureComponent(
        weight=2.0,
        input_alphas={"caption": 1.0},
        target_alphas=dict.fromkeys(MAPS, 0.2),
        keep={"caption": "all"},
    )
    return TrainFourM(
        data=(Source(root=f"{OUT}/scenes"), Source(root=f"{OUT}/photos", weight=0.03)),
        inputs=everything,
        outputs=(*MAPS, *TEXTS),
        model=replace(FourMConfig.preset("nano"), decoder_depth=2),
        masking=MaskingConfig(
            components=(see, to_text, any_to_any, from_caption),
            input_tokens=(64, 64),
            target_tokens=(96, 96),
            redistribute=True,
        ),
        loop=LoopConfig(
            steps=1800,
            lr=1e-3,
            min_lr=1e-5,
            warmup_steps=100,
            betas=(0.9, 0.95),
            dtype="bfloat16",
            ema_decay=0.99,
            log_every=20,
            checkpoint_every=250,
        ),
        batch_size=32,
        out=f"{OUT}/fourm",
        patch_size=PATCH,
        per_token=True,
    )
