"""4M-21's tokenizer of human poses: `dataengine train-tokenizer ml4m_human_poses`."""

from __future__ import annotations

from pipelines.recipes import _tokenizers
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """Eight ids of 1,024 codes each for the pose of a person, MLP to MLP."""
    return _tokenizers.first(
        "human_poses", "human-poses_1k_8", batch_size=64, epochs=15, warmup_epochs=1, min_crop_scale=None
    )
