"""The demo's depth tokenizer: `dataengine train-tokenizer scenes_depth`, half a minute on a core."""

from __future__ import annotations

from model import domains
from pipelines.recipes._scenes import tokenizer
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """Metric depth, through an invertible log map."""
    return tokenizer("depth", domains.Depth(), channels=1, codes=512)
