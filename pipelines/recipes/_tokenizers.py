"""What the recipes of 4M-21's tokenizers share: ml-4m's settings of both stages, for eight GPUs or what divides them.

First stage: 224 pixels from scratch. Second: `adapted`, every step at another size up to the largest, from the first
stage's weights. Datasets are `data/train` and `data/val`; an epoch counts as ten million images, about what of CC12M
can still be downloaded: with another number set `loop.steps`.

    torchrun --nproc-per-node=8 -m pipelines train-tokenizer ml4m_depth roots='[data/train]'
"""

from __future__ import annotations

from dataclasses import replace

from dataengine.labeler import Labeler
from model.loop import LoopConfig
from model.settings import DType
from model.tokenizers._published import published
from model.tokenizers._vq import VQConfig
from pipelines.train_tokenizer import TrainTokenizer

GPUS = 8
EPOCH = 10_000_000
IMAGES, FEATURES = 0.8, 0.2
"""The least share of an image that a crop has."""


def first(
    modality: str,
    name: str,
    *,
    batch_size: int,
    epochs: int,
    warmup_epochs: int = 5,
    blr: float = 1e-4,
    dtype: DType = "bfloat16",
    ema_decay: float | None = 0.99,
    min_crop_scale: float | None = IMAGES,
    teacher: Labeler | None = None,
) -> TrainTokenizer:
    """The first stage of the published tokenizer of that name; `batch_size` is that of a GPU."""
    return of(
        modality,
        published()[name],
        batch_size=batch_size,
        epochs=epochs,
        warmup_steps=warmup_epochs * EPOCH // (GPUS * batch_size),
        blr=blr,
        dtype=dtype,
        ema_decay=ema_decay,
        min_crop_scale=min_crop_scale,
        teacher=teacher,
    )


def of(
    modality: str,
    model: VQConfig,
    *,
    batch_size: int,
    epochs: int,
    warmup_steps: int,
    blr: float,
    dtype: DType,
    ema_decay: float | None,
    min_crop_scale: float | None,
    teacher: Labeler | None = None,
) -> TrainTokenizer:
    """A recipe with the learning rate blr * images a step / 256, and what all of ml-4m's have in common."""
    together = GPUS * batch_size
    return TrainTokenizer(
        roots=("data/train",),
        heldout=("data/val",),
        modality=modality,
        model=model,
        batch_size=batch_size,
        loop=LoopConfig(
            steps=epochs * EPOCH // together,
            lr=blr * together / 256,
            warmup_steps=warmup_steps,
            weight_decay=0.05,
            betas=(0.9, 0.99),
            clip_grad=1.0,
            batches_per_step=GPUS,
            dtype=dtype,
            ema_decay=ema_decay,
            log_every=100,
            evaluate_every=5000,
            pictures_every=5000,
            checkpoint_every=5000,
        ),
        out="tokenizers",
        min_crop_scale=min_crop_scale,
        teacher=teacher,
        dead_code_share=32.0 if model.quant_type == "lucid" else None,
    )


def adapted(
    first_stage: TrainTokenizer,
    name: str,
    *,
    batch_size: int = 16,
    epochs: int = 1,
    warmup_steps: int = 5000,
    blr: float = 5e-5,
    side_step: int = 16,
) -> TrainTokenizer:
    """The second stage: from `tokenizers/<modality>.safetensors` to `tokenizers_448/<modality>.safetensors`."""
    made = of(
        first_stage.modality,
        published()[name],
        batch_size=batch_size,
        epochs=epochs,
        warmup_steps=warmup_steps,
        blr=blr,
        dtype=first_stage.loop.dtype,
        ema_decay=first_stage.loop.ema_decay,
        min_crop_scale=first_stage.min_crop_scale,
        teacher=first_stage.teacher,
    )
    return replace(
        made,
        out="tokenizers_448",
        init_from=f"tokenizers/{first_stage.modality}.safetensors",
        smallest_side=224,
        side_step=side_step,
        perceptual=first_stage.perceptual,
    )
