"""Dense features of scenes: `dataengine train-tokenizer scenes_hog`, 40 s on a core."""

from __future__ import annotations

from dataclasses import replace

from model import domains
from pipelines.recipes._hog import CHANNELS, Hog
from pipelines.recipes._scenes import tokenizer
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """Histograms of gradients, made of each crop on the way as those of CLIP would be.

    Cosine 0.95 on held-out scenes (best constant 0.84), 77 % of the ten nearest images stay, all codes but two in use.
    """
    domain = domains.Features(channels=CHANNELS)
    made = tokenizer("HOG", domain, channels=CHANNELS, codes=512, patch_proj=False)
    return replace(made, teacher=Hog(), min_crop_scale=0.5)
