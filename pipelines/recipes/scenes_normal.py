"""The demo's normal tokenizer: `dataengine train-tokenizer scenes_normal`, half a minute on a core."""

from __future__ import annotations

from model import domains
from pipelines.recipes._scenes import tokenizer
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """Surface normals."""
    return tokenizer("normal", domains.Normal(), channels=3, codes=512)
