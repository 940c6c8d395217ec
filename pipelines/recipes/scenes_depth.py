"""The demo's depth tokenizer: `dataengine train-tokenizer scenes_depth`, a minute on a core."""

from __future__ import annotations

from model import domains
from pipelines.recipes._scenes import tokenizer
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """Metric depth, through an invertible log map; an absolute error of it is a relative error of depth.

    abs-rel 0.029 on held-out scenes (best constant 0.282), 96 % of the codes in use.
    """
    return tokenizer("depth", domains.Depth(smooth_at=0.1), channels=1, codes=512, steps=2300)
