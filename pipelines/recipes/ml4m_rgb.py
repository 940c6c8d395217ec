"""4M-21's tokenizer of images: `dataengine train-tokenizer ml4m_rgb`."""

from __future__ import annotations

from pipelines.recipes import _tokenizers
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """16,384 codes and a UNet that denoises."""
    return _tokenizers.first("rgb", "rgb_16k_224", batch_size=64, epochs=50, dtype="float16", ema_decay=0.9999)


def adapted() -> TrainTokenizer:
    """The second stage, at every size that its name says."""
    return _tokenizers.adapted(
        recipe(), "rgb_16k_224-448", epochs=5, warmup_steps=_tokenizers.EPOCH // (_tokenizers.GPUS * 16), side_step=32
    )
