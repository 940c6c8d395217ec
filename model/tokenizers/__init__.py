"""Tokenizers: one value of a modality to discrete ids and back; the file name is the tokenizer's name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataengine import plugins


class Tokenizer(ABC):
    """Turns one value into ids in [0, vocab_size) and ids back into a value of the same kind."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of ids."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, ...]:
        """The shape of the ids of one value at the size the tokenizer was made for; () where the length varies."""

    @abstractmethod
    def encode(self, value: Any) -> Any:
        """The ids of one value: int64 (h, w) for a map, a list of int for a text."""

    @abstractmethod
    def decode(self, ids: Any) -> Any:
        """The value that `ids` stand for, in the format that `encode` takes."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write everything that `load` needs into one file."""

    @classmethod
    @abstractmethod
    def load(cls, path: Path) -> Tokenizer:
        """The tokenizer that `save` wrote."""

    @classmethod
    @abstractmethod
    def tiny(cls) -> Tokenizer:
        """A small one with the same code path, for tests."""

    @abstractmethod
    def examples(self) -> Sequence[Any]:
        """Four different values that `encode` takes, always the same."""


def names() -> list[str]:
    """The names of all tokenizers, sorted."""
    return plugins.names(__name__)


def load(name: str) -> type[Tokenizer]:
    """The tokenizer class in the file `<name>.py`; ValueError for an unknown name."""
    return plugins.load(__name__, name, Tokenizer)
