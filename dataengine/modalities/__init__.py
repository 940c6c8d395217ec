"""How one kind of value is stored, checked, cropped and shown: one modality a file."""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from dataengine import plugins
from dataengine.geometry import Crop

Kind = Literal["map", "grid", "vector", "instances", "text", "tokens", "crops"]
"""map: (h, w[, c]) aligned with the image; grid: (rows, cols, c) features; vector: (c,); instances: masks or boxes;
text: something a sequence model reads; tokens: (n_crops, n) ids; crops: the crop settings themselves."""


@dataclass(frozen=True)
class Picture:
    """How a value is shown: an RGB image uint8 (h, w, 3), a text, a table of (name, value), a legend (name, colour)."""

    image: np.ndarray | None = None
    text: str = ""
    table: tuple[tuple[str, str], ...] = ()
    legend: tuple[tuple[str, tuple[int, int, int]], ...] = ()


class Modality(ABC):
    """How one kind of value is stored, checked, cropped and shown. Final subclasses, one a file.

    `name` is the folder on disk (ml-4m's spelling); it is the file's name up to case, `-` and an `@resolution`.
    """

    kind: ClassVar[Kind]
    suffix: ClassVar[str]
    spelling: ClassVar[str] = ""
    """The on-disk name where it differs from the file name (`CLIP-B16` for clip_b16.py)."""
    lossless: ClassVar[bool] = True
    """Whether decode(encode(x)) equals x; else it is close, and the docstring says how close."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def encode(self, value: Any) -> bytes:
        """The member of a tar: the same value always gives the same bytes."""

    @abstractmethod
    def decode(self, data: bytes) -> Any:
        """The value of a member; ValueError when the bytes are not one."""

    @abstractmethod
    def check(self, value: Any, size: tuple[int, int]) -> None:
        """ValueError, naming what was found and what was expected, if this is no value of an image of (h, w) pixels."""

    @abstractmethod
    def placeholder(self, size: tuple[int, int]) -> Any:
        """A schema-valid value that stands for "no label" (it is recorded as invalid and never trained on)."""

    @abstractmethod
    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> Any:
        """A random valid value for an image of (h, w) pixels, for tests."""

    @abstractmethod
    def crop(self, value: Any, crop: Crop, size: tuple[int, int], side: int) -> Any:
        """The value under a crop of an image of (h, w) pixels; maps come out (side, side), whole-image values as is."""

    @abstractmethod
    def picture(self, value: Any, rgb: np.ndarray) -> Picture:
        """How to show the value beside its image."""


Piece = str | Sequence[int]
"""A piece of a serialised value: text, which a text tokenizer turns into ids, or numbers 0..65535 kept as they are."""


class TextLike(Modality):
    """A modality that a sequence model reads as text (ml-4m's grammars): a value becomes variants of pieces.

    `variants` returns lists of pieces: the variant read is that of the crop row (`choice = "crop"`) or any of them
    (`choice = "any"`). Whoever trains draws the rest, every time anew: `assemble` orders the pieces of a variant, whose
    text is by then ids. They are joined, or masked piece by piece when `chunked`.
    """

    choice: ClassVar[Literal["crop", "any"]] = "any"
    shuffle: ClassVar[bool] = False
    chunked: ClassVar[bool] = False
    max_tokens: ClassVar[int] = 256
    packs_as: ClassVar[str] = ""
    """The modality that a model knows it by, where that is not its own name."""

    @abstractmethod
    def variants(self, value: Any, crops: Sequence[Crop], size: tuple[int, int]) -> list[list[Piece]]:
        """The text of a value: variants x pieces, before any random choice."""

    def assemble(self, pieces: Sequence[Sequence[int]], rng: np.random.Generator) -> list[Sequence[int]]:
        """One draw of ml-4m's serialisation: the pieces of a variant, as ids, in the order in which they are read.

        In the order that they are in, or in a random one when `shuffle`.
        """
        return [pieces[i] for i in rng.permutation(len(pieces)).tolist()] if self.shuffle else list(pieces)

    @abstractmethod
    def parse(self, text: str) -> tuple[Any, list[str]]:
        """The value that a text (perhaps written by a model) says, and what in it broke the grammar, in words."""


_NAME = re.compile(r"(?P<stem>[A-Za-z0-9_-]+?)(@(?P<resolution>\d+))?(@(?P<version>[A-Za-z][A-Za-z0-9_-]*))?")


def split(column: str) -> tuple[str, str]:
    """The modality of a column and its version: `depth@v2` is ("depth", "v2"), `tok_depth@224` ("tok_depth@224", "").

    A version begins with a letter, a resolution is a number. ValueError when it is no name of a column.
    """
    match = _NAME.fullmatch(column)
    if match is None:
        raise ValueError(
            f"modality {column!r}: expected letters, digits, '_' or '-', perhaps @RESOLUTION (a number), and perhaps "
            "@VERSION (which begins with a letter)"
        )
    version = match["version"] or ""
    return (column.removesuffix(f"@{version}") if version else column), version


@functools.lru_cache(maxsize=256)
def load(name: str) -> Modality:
    """The modality of an on-disk name: `depth`, `CLIP-B16`, `tok_depth@224`, `depth@v2`.

    ValueError names the nearest known one. A version has the modality's codec under its own name.
    """
    modality, version = split(name)
    stem = modality.partition("@")[0]
    file = "tok" if stem.startswith("tok_") else stem.lower().replace("-", "_")
    kind: type[Modality] = plugins.load(__name__, file, Modality)
    codec = kind(modality if file == "tok" else kind.spelling or stem)
    if version:
        codec.name += f"@{version}"
    return codec


def names() -> list[str]:
    """The on-disk names of all modalities, tokens aside."""
    return sorted(load(file).name for file in plugins.names(__name__) if file != "tok")
