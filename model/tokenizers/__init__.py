"""Tokenizers: one value of a modality to discrete ids and back; the file name is the tokenizer's name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataengine import plugins

if TYPE_CHECKING:
    from model.domains import Domain
    from model.tokenizers._vq import VQ


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


def read(source: str | Path, domain: Domain | None = None, *, ema: bool = False, encoder_only: bool = False) -> VQ:
    """The network tokenizer of a file, ours or ml-4m's, in evaluation mode: VQVAE, DiVAE or whatever its settings ask.

    `source` is a safetensors file, a folder with config.json and model.safetensors, a repository id of the Hugging
    Face hub, or a `.pth` of ml-4m's trainer. Files of ml-4m that do not name their domain give a tokenizer of tensors
    only, unless it is told here. `ema` asks a `.pth` for its averaged weights; `encoder_only` leaves the decoder out.
    ValueError for settings that are unknown, and for weights too few or too many, by their names.
    """
    from model.tokenizers import _files

    return _files.read(source, domain, ema=ema, encoder_only=encoder_only)
