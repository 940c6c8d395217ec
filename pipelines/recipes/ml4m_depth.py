"""4M-21's tokenizer of depth: `dataengine train-tokenizer ml4m_depth`."""

from __future__ import annotations

from pipelines.recipes import _tokenizers
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """Depth standardised crop by crop, 8,192 codes, and a UNet that denoises."""
    return _tokenizers.first("depth", "depth_8k_224", batch_size=64, epochs=20, dtype="float16", ema_decay=0.9999)


def adapted() -> TrainTokenizer:
    """The second stage, at every size that its name says."""
    return _tokenizers.adapted(recipe(), "depth_8k_224-448", blr=1e-4, side_step=32)
