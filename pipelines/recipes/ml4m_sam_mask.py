"""4M-21's tokenizer of SAM's masks: `dataengine train-tokenizer ml4m_sam_mask`."""

from __future__ import annotations

from pipelines.recipes import _tokenizers
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """Sixteen ids of 1,024 codes for the mask of a thing in its box, ViT to ViT."""
    return _tokenizers.first(
        "sam_mask", "sam-instance_1k_64", batch_size=384, epochs=24, dtype="float16", ema_decay=None
    )
