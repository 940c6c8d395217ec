"""4M-21's tokenizer of global DINOv2-B14 features: `dataengine train-tokenizer ml4m_dinov2_b14_global`."""

from __future__ import annotations

from labelers.dinov2_b14 import DinoV2
from pipelines.recipes import _tokenizers
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """Sixteen ids of 8,192 codes each, as 4M-21 has them (ml-4m's recipe says eight), MLP to MLP."""
    return _tokenizers.first(
        "DINOv2-B14-global",
        "DINOv2-B14-global_8k_16_224",
        batch_size=64,
        epochs=15,
        min_crop_scale=_tokenizers.FEATURES,
        teacher=DinoV2(),
    )
