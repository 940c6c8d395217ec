"""Captions: what people or networks said of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop
from dataengine.modalities import Picture, TextLike


class Caption(TextLike):
    """A list of strings as JSON, which may be empty; a trainer reads any one of them. A crop changes nothing."""

    kind = "text"
    suffix = "json"

    def encode(self, value: list[str]) -> bytes:
        """A JSON list."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> list[str]:
        """A list of strings."""
        value = codecs.decode_json(data)
        self.check(value, (0, 0))
        captions: list[str] = value
        return captions

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """A list of strings."""
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ValueError(f"caption: expected a list of strings, got {value!r:.100}")

    def placeholder(self, size: tuple[int, int]) -> list[str]:
        """No caption."""
        return []

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> list[str]:
        """Two captions of random words."""
        words = ("a", "red", "dog", "on", "the", "beach", "Ünïcode", "two")
        return [" ".join(rng.choice(words, 5)) for _ in range(2)]

    def crop(self, value: list[str], crop: Crop, size: tuple[int, int], side: int) -> list[str]:
        """Unchanged."""
        return value

    def picture(self, value: list[str], rgb: np.ndarray) -> Picture:
        """The captions, one a line."""
        return Picture(text="\n".join(value))

    def variants(self, value: list[str], crops: Sequence[Crop], size: tuple[int, int]) -> list[list[str]]:
        """Each caption, as it is."""
        return [[caption] for caption in value]

    def parse(self, text: str) -> tuple[list[str], list[str]]:
        """The text is the caption; nothing can be wrong with it but that it is empty."""
        caption = text.replace("[EOS]", "").strip()
        return [caption], [] if caption else ["empty"]
