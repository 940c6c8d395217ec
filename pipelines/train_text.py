"""Train the text tokenizer on all that datasets say in words, and measure what it makes of captions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

from dataengine import modalities
from dataengine.geometry import Crop, crops_of
from dataengine.manifest import Commit, Conflict, Dataset
from dataengine.modalities import TextLike
from model.tokenizers import text
from model.tokenizers.text import TextTokenizer
from pipelines.pack import CELL, size_of
from pipelines.running import console

LARGEST = 1 << 16
"""Ids are packed as uint16."""


@dataclass(kw_only=True)
class Trained:
    """What a text tokenizer learned from: so many texts (pieces of serialised labels), and the words in them.

    A word with a fixed id (a coordinate, a class name) is not among those counted. `pieces_per_caption` is the mean
    number of ids of a caption, None without captions. `left_out` are the columns with labels of random weights.
    """

    file: str
    columns: list[str]
    left_out: list[str]
    num_texts: int = 0
    num_words: int = 0
    vocab_size: int = 0
    num_captions: int = 0
    pieces_per_caption: float | None = None

    def line(self) -> str:
        """The figures, for people."""
        captions = "no captions"
        if self.pieces_per_caption is not None:
            captions = f"{self.pieces_per_caption:.1f} pieces in each of {self.num_captions} captions"
        read = f"{self.num_texts} texts, {self.num_words} words of {', '.join(self.columns)}"
        return f"{self.file}: {self.vocab_size} ids from {read}; {captions}"


@dataclass(frozen=True)
class _Cell:
    """A column of a shard, of which `record` says what is valid."""

    dataset: Dataset
    record: Commit


def train(datasets: Sequence[Dataset], path: Path, vocab_size: int, columns: Sequence[str] = ()) -> Trained:
    """Learn word pieces from every text-like column of the datasets, or the named ones, and write the tokenizer.

    Versions of columns are read where they are named. Only valid labels are, and no column that random weights had a
    part in, in any shard. The same labels give the same bytes, in whatever order. ValueError without a word to learn
    from, or when a named column cannot be read; Conflict when another tokenizer lies at `path`, which is kept.
    """
    if vocab_size > LARGEST:
        raise ValueError(f"vocab_size {vocab_size}, expected at most {LARGEST}: ids are packed in 16 bits")
    cells, left_out = _cells(datasets, columns)
    names = sorted({c.record.modality for c in cells})
    made = Trained(file=str(path), columns=names, left_out=sorted(left_out))
    for column in columns:
        if column in left_out or column not in names:
            why = "comes from random weights" if column in left_out else "is no text-like column"
            raise ValueError(f"{column} {why}; there is: {', '.join(names) or 'none'}")
    tokenizer = _learned(cells, path, vocab_size, made)
    made.vocab_size = tokenizer.vocab_size
    lengths = [
        len(tokenizer.encode(caption))
        for cell in cells
        if modalities.split(cell.record.modality)[0] == "caption"
        for caption in _texts(cell)
    ]
    if lengths:
        made.num_captions, made.pieces_per_caption = len(lengths), sum(lengths) / len(lengths)
    return made


def _cells(datasets: Sequence[Dataset], columns: Sequence[str]) -> tuple[list[_Cell], set[str]]:
    """What there is to read, and the columns that are left out of all datasets' because random weights made them."""
    cells: list[_Cell] = []
    random = set()
    for dataset in datasets:
        dataset.plan  # noqa: B018  raises when this is no dataset
        for column in dataset.modalities():
            asked = column in columns if columns else not modalities.split(column)[1]
            if column == CELL or not asked or not isinstance(modalities.load(column), TextLike):
                continue
            records = [r for shard in dataset.committed(column) if (r := dataset.commit(column, shard)) is not None]
            if any(r.provenance.get("random", False) for r in records):
                random.add(column)
            else:
                cells += [_Cell(dataset, r) for r in records]
    return cells, random


def _learned(cells: Sequence[_Cell], path: Path, vocab_size: int, made: Trained) -> TextTokenizer:
    """Train, and write the file unless it is there already; `made` counts what was read."""

    def lines() -> Iterator[str]:
        for cell in track(cells, "read texts", console=console):
            texts = _texts(cell)
            made.num_texts += len(texts)
            for found in text.words(texts):
                made.num_words += len(found)
                if found:
                    yield " ".join(found)
        if not made.num_words:
            raise ValueError(f"no words in {made.num_texts} texts of {', '.join(made.columns) or 'no column'}")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "text.json")
        tokenizer = text.train(lines(), vocab_size, file)
        if not path.exists():
            tokenizer.save(path)
        elif path.read_bytes() != file.read_bytes():
            raise Conflict(f"{path} is another text tokenizer, of which packed shards may be: choose another file")
    return tokenizer


def _texts(cell: _Cell) -> list[str]:
    """The pieces of all valid labels that are text; of what goes by crops, under every crop."""
    dataset, column, shard = cell.dataset, cell.record.modality, cell.record.shard
    codec = modalities.load(column)
    assert isinstance(codec, TextLike)
    members = dataset.read(column, shard)
    crops: list[list[Crop]] = [[]] * len(members)
    sizes = [(1, 1)] * len(members)
    if codec.choice == "crop":  # only then does where something lies decide on what is said of it
        settings = modalities.load("crop_settings")
        crops = [crops_of(settings.decode(m.data)) for m in dataset.read("crop_settings", shard)]
        sizes = [size_of(m.data) for m in dataset.read("rgb", shard)]
    texts = []
    for member, here, size in zip(members, crops, sizes, strict=True):
        if member.key in cell.record.invalid:
            continue
        try:
            variants = codec.variants(codec.decode(member.data), here, size)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{column} of {member.key}: {type(error).__name__}: {error}") from error
        texts += [piece for pieces in variants for piece in pieces if isinstance(piece, str)]
    return texts
