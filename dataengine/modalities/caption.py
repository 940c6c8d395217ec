"""Sentences about the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop
from dataengine.modalities import Kind, Picture, Piece, TextLike
from dataengine.modalities._text import SPECIAL, quoted, until_end


class Caption(TextLike):
    """A list of strings, empty where there is none, as JSON. Any one of them is the caption, under every crop.

    ml-4m's other forms are read too: one string, one `{"caption": ...}`, a list of those.
    """

    kind: ClassVar[Kind] = "text"
    suffix: ClassVar[str] = "json"
    choice: ClassVar[Literal["crop", "any"]] = "any"
    max_tokens: ClassVar[int] = 256

    def encode(self, value: list[str]) -> bytes:
        """Compact JSON."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> list[str]:
        """The list of strings."""
        value = codecs.decode_json(data)
        entries = value if isinstance(value, list) else [value]
        captions = [entry.get("caption") if isinstance(entry, dict) else entry for entry in entries]
        strings = [caption for caption in captions if isinstance(caption, str)]
        if len(strings) != len(captions):
            raise ValueError(f"{self.name}: expected strings, got {value!r:.80}")
        return strings

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """A list of strings that UTF-8 can say."""
        if not isinstance(value, list) or not all(isinstance(caption, str) for caption in value):
            raise ValueError(f"{self.name}: expected a list of strings, got {value!r:.80}")
        for caption in value:
            if any("\ud800" <= letter <= "\udfff" for letter in caption):
                raise ValueError(f"{self.name}: expected Unicode text, got lone surrogates in {caption!r:.80}")

    def placeholder(self, size: tuple[int, int]) -> list[str]:
        """No caption."""
        return []

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> list[str]:
        """Two captions."""
        count = int(rng.integers(2, 100))
        return [f"a flock of {count} birds over the sea", f"{count} gulls, süß"]

    def crop(self, value: list[str], crop: Crop, size: tuple[int, int], side: int) -> list[str]:
        """Unchanged: what a crop cuts off, and the left and right of a mirrored one, stay in the words."""
        return value

    def variants(self, value: list[str], crops: Sequence[Crop], size: tuple[int, int]) -> list[list[Piece]]:
        """One piece a caption, unmodified."""
        return [[caption] for caption in value]

    def parse(self, text: str) -> tuple[list[str], list[str]]:
        """One caption, without the words of other grammars; each of those is a complaint, and so is an empty text."""
        said = until_end(text)
        foreign = SPECIAL.findall(said)
        caption = " ".join(SPECIAL.sub(" ", said).split()) if foreign else said
        complaints = [f"{quoted(word)} is no word of a caption" for word in foreign]
        return ([caption], complaints) if caption else ([], [*complaints, "expected words, got none"])

    def picture(self, value: list[str], rgb: np.ndarray) -> Picture:
        """One line a caption."""
        return Picture(text="\n".join(" ".join(caption.split()) for caption in value))
