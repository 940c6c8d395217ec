"""Dense features of scenes: `dataengine train-tokenizer scenes_hog`, TIME."""

from __future__ import annotations

from dataclasses import replace

from model import domains
from pipelines.recipes._hog import CHANNELS, Hog
from pipelines.recipes._scenes import tokenizer
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """Histograms of gradients, made of each crop on the way as those of CLIP would be."""
    domain = domains.Features(channels=CHANNELS)
    made = tokenizer("HOG", domain, channels=CHANNELS, codes=512, patch_proj=False)
    return replace(made, teacher=Hog(), min_crop_scale=0.5)
