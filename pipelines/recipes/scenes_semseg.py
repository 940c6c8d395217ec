"""The demo's semseg tokenizer: `dataengine train-tokenizer scenes_semseg`, a minute on a core."""

from __future__ import annotations

from dataengine.corpora.scenes import CLASS_IDS
from model import domains
from pipelines.recipes._scenes import tokenizer
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """The fifteen COCO panoptic classes that scenes are made of.

    mIoU 0.86 on held-out scenes (best constant 0.07), 92 % of the codes in use.
    """
    domain = domains.Semseg(classes=tuple(sorted(CLASS_IDS.values())))
    return tokenizer("semseg", domain, channels=8, labels=domain.num_labels, codes=512)
