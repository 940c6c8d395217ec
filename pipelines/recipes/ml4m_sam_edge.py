"""4M-21's tokenizer of the edges of SAM's masks: `dataengine train-tokenizer ml4m_sam_edge`."""

from __future__ import annotations

from pipelines.recipes import _tokenizers
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """8,192 codes and a UNet that denoises. 4M-21 has one tokenizer for both kinds of edges."""
    return _tokenizers.first(
        "sam_edge", "edge_8k_224", batch_size=64, epochs=50, blr=5e-5, dtype="float16", ema_decay=0.9999
    )


def adapted() -> TrainTokenizer:
    """The second stage, at every size that its name says."""
    return _tokenizers.adapted(recipe(), "edge_8k_224-512", batch_size=64, warmup_steps=0, side_step=32)
