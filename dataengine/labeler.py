"""What the engine can run: a labeler is its settings; its weights are loaded later, in the worker."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataengine.sample import Sample
from dataengine.weights import Weights

Loaded = Callable[[Sequence[Sample]], list[dict[str, Any]]]
"""A labeler with its weights in memory: samples in, one dict of values by emitted modality for each, same order.

Images of one batch may differ in size. An exception fails the batch: the engine then retries its samples one by one.
A value that is an `attempt.Failed` fails that column of its sample and nothing else.
"""


@dataclass(frozen=True)
class Staged:
    """A loaded labeler in two steps, so that a network does not wait for its preprocessing.

    `prepare` turns one sample into what the network takes of it, on the CPU, in other threads, ahead of time; `label`
    gets a batch of that. It must depend on its sample alone, and release the GIL where it computes.
    """

    prepare: Callable[[Sample], Any]
    label: Callable[[Sequence[Any]], list[dict[str, Any]]]

    def __call__(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """Label a batch, preparing what has not been prepared."""
        return self.label([self.prepare(s) if s.prepared is None else s.prepared for s in samples])


@dataclass(frozen=True, kw_only=True)
class Labeler(ABC):
    """Settings of something that turns input modalities into output modalities.

    Frozen, picklable, importable without torch. Subclasses set `inputs` and `emits` as plain class attributes and raise
    `version` when the same settings would give other values. A field named `checkpoint` says where weights come from;
    it is not part of the identity, the sha256 of the weights is. Of several that emit a modality the one that is no
    `alternative` makes it, unless a recipe or a setting (`det=dfine`) names another.
    """

    version = 1
    batch_size = 8
    gpus = 0.0
    alternative = False
    gate = ""
    """What a user must do before the published weights may be downloaded: accept terms, and where."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """The modalities it reads."""

    @property
    @abstractmethod
    def emits(self) -> tuple[str, ...]:
        """The modalities it writes."""

    @abstractmethod
    def load(self, device: str) -> Loaded:
        """Load the weights onto a torch device ("cpu", "cuda:0"): heavy imports live in here."""

    def weights(self) -> Weights | None:
        """What the weights are (hash, licence, random or not), without loading them; None for an algorithm."""
        return None

    def tiny(self, folder: Path) -> Labeler:
        """The same code path on a few-kilobyte random checkpoint that is written to `folder` in the real format."""
        return self

    def facts(self) -> dict[str, Any]:
        """More that a reader of its cells must know, for their provenance: the vocabulary of a tokenizer, say."""
        return {}

    def adapted(self, available: Collection[str]) -> Labeler:
        """The labeler as it should run when these modalities exist or are being made; most do not care."""
        return self

    def of_column(self, column: str) -> Labeler:
        """The labeler that decides what is in one of its columns: itself, unless it runs several for what they share.

        Identity, provenance, weights and inputs of a cell are that one's.
        """
        return self

    @property
    def name(self) -> str:
        """The plugin name, which is the file name."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @property
    def random(self) -> bool:
        """Whether its weights are random, so that what it computes means nothing."""
        weights = self.weights()
        return weights is not None and weights.random

    def identity(self) -> dict[str, Any]:
        """What decides the output bytes: name, version, settings, weights. Equal identity, equal output."""
        weights = self.weights()
        settings = dataclasses.asdict(self)
        if weights is not None:
            settings.pop("checkpoint", None)
        return {
            "labeler": self.name,
            "version": self.version,
            "settings": settings,
            "weights": None if weights is None else weights.sha256,
        }
