"""Random labels of the text-like modalities, and their ids as whoever trains has them; of more than one test."""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

from dataengine import codecs, modalities
from dataengine.modalities import Piece, TextLike
from dataengine.modalities.sam_instance_tokens import SamInstanceTokens
from model.tokenizers.text import NUM_SPECIAL, TextTokenizer, train

GOLDEN = Path(__file__).parent / "golden"
TEXTS = ("caption", "det", "metadata", "color_palette", "human_poses_tokens", "sam_instance_tokens")


def _maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_serialisers", GOLDEN / "make_serialisers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_serialisers"] = module
    spec.loader.exec_module(module)
    return module


maker = _maker()


@functools.cache
def labels(name: str) -> list[Any]:
    return list(maker.labels(name))


@functools.cache
def small() -> TextTokenizer:
    """A WordPiece of our own, small enough that some keywords are several pieces."""
    texts = [
        "a naïve dog by the sea",
        "human pose global shape camera",
        "polygon none",
        "漢 字 😀 é ß . , ' ! ? - = [ ] #",
    ]
    with tempfile.TemporaryDirectory() as folder:
        return train([*texts, "abcxyz 0123456789 don't point"], NUM_SPECIAL + 110, Path(folder) / "text.json")


class Words:
    """A tokenizer without loss: an id for every word between blanks, coordinates at 4M's ids."""

    def __init__(self) -> None:
        self.words = [*map(str, range(204)), *(f"v{axis}={i}" for axis in range(4) for i in range(1000))]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in text.split(" ") if text else []:
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
            ids.append(self.ids[word])
        return ids

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


def load(name: str) -> TextLike:
    codec = modalities.load(name)
    assert isinstance(codec, TextLike)
    return codec


def pieces_of(codec: TextLike, label: Any) -> list[Piece]:
    """The variant of a label, by way of its bytes."""
    value = codec.decode(codecs.encode_json(label.value))
    codec.check(value, label.size)
    if codec.choice == "any":
        return codec.variants(value, [label.crop], label.size)[label.row if len(value) else 0]
    crops = [label.crop] * (len(value["crops"]) if codec.name == "sam_instance_tokens" else 1)
    return codec.variants(value, crops, label.size)[label.row]


def said(codec: TextLike, label: Any, tokenizer: Any) -> list[int]:
    """The ids of a label as whoever trains has them, for the label's draws."""
    pieces = pieces_of(codec, label)
    ids = [tokenizer.encode(piece) if isinstance(piece, str) else piece for piece in pieces]
    if isinstance(codec, SamInstanceTokens):
        points = maker.query_points(label)
        ordered = codec.say(ids, points, maker.priorities(label, len(points), len(ids) - 5))
    else:
        ordered = codec.assemble(ids, label.draws)
    return [i for piece in ordered for i in piece]
