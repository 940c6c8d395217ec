"""Pack: the tokens, texts, embeddings and pixels of a shard into one Arrow file a trainer can map."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image

from dataengine import _tars, modalities, packed, shards, stored, stored_images
from dataengine._tars import Buffer
from dataengine.geometry import Crop, crops_of
from dataengine.manifest import Commit, Dataset
from dataengine.modalities import Modality, TextLike
from dataengine.modalities.t5_caption import MAX_TOKENS, T5Caption
from dataengine.packed import Column
from dataengine.shards import shard_name
from dataengine.work import CellReport, Report, Task, Work

CELL = "tokens"
"""The name under which packed shards are committed."""

Encode = Callable[[str], list[int]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Pack:
    """The packing worker; `text_tokenizer` is "" where no column is text."""

    root: str
    text_tokenizer: str
    columns: tuple[Column, ...]

    def start(self, device: str) -> Work:
        """Load the text tokenizer."""
        dataset, encode = Dataset(self.root), encoder(self.text_tokenizer)
        return lambda task: _pack_shard(dataset, self.columns, encode, task)


def prepare(
    dataset: Dataset,
    text_tokenizer: str,
    pixels: int,
    columns: Sequence[str] = (),
    among: Collection[int] | None = None,
    *,
    encoded: bool = False,
) -> tuple[Pack, list[Task]]:
    """What there is to pack: every complete, meaningful token, text and embedding column, or those named, by shard.

    `pixels` is the side of the images the model reads beside their tokens, 0 for none; `encoded`: they are packed as
    they are stored, to be decoded when they are read. A version (`tok_depth@224@v2`) is packed where it is named, under
    its own name: a model otherwise reads one column of a modality. Columns that come from random weights are left out:
    nothing is trained on them. ValueError when a named one cannot be packed.

    `among` are the shards to be packed, for which the columns must be complete; all where it is None.
    """
    ingested = set(dataset.committed("rgb") if among is None else among)
    wanted = [m for m in dataset.modalities() if m in columns or (m != CELL and not modalities.split(m)[1])]
    there = [m for m in wanted if can_be_packed(m)]
    names = [m for m in there if set(dataset.committed(m)) >= ingested and not is_random(dataset, m)]
    for name in columns:
        if name not in names:
            why = "is not complete or comes from random weights" if name in there else "is no column that can be packed"
            raise ValueError(f"{name} {why}; there is: {', '.join(names) or 'none'}")
    names = [m for m in names if not columns or m in columns]
    texts = [m for m in names if isinstance(modalities.load(m), TextLike)]
    vocabulary = Vocabulary.of(text_tokenizer) if texts else Vocabulary()
    made = [_column(dataset, m, vocabulary) for m in names]
    made = _with_draws(dataset, made)
    made[:0] = image_columns(pixels, encoded)
    check_names(made)
    tasks = []
    for shard in sorted(ingested):
        inputs = json.dumps([(m, _record(dataset, m, shard).sha256) for m in [*names, *(["rgb"] if pixels else [])]])
        task = task_of(dataset, shard, made, inputs)
        tasks += [task] if task else []
    return Pack(dataset.store.url, text_tokenizer if texts else "", tuple(made)), tasks


def task_of(dataset: Dataset, shard: int, columns: Sequence[Column], inputs: str) -> Task | None:
    """The task that packs a shard from what `inputs` identifies, None when that is done; what is stale is forgotten."""
    identity = json.dumps([packed.FORMAT, [vars(c) for c in columns]], sort_keys=True)
    spec = hashlib.sha256((identity + inputs).encode()).hexdigest()
    there = dataset.commit(CELL, shard)
    if there is not None and there.spec == spec:
        return None
    dataset.uncommit(CELL, shard)  # it is derived and quick to make: a stale one is made anew
    return Task(shard, {CELL: spec})


def is_random(dataset: Dataset, modality: str) -> bool:
    """Whether a column was computed, directly or through its inputs, by a network with random weights."""
    return any(_record(dataset, modality, s).provenance.get("random", False) for s in dataset.committed(modality)[:1])


@dataclass(frozen=True)
class Vocabulary:
    """What the ids of text are ids of: how many there are, and the sha256 of the tokenizer's file."""

    size: int = 0
    sha256: str = ""

    @classmethod
    def of(cls, path: str) -> Vocabulary:
        """That of a WordPiece JSON file."""
        from model.tokenizers.text import TextTokenizer

        return cls(TextTokenizer.load(Path(path)).vocab_size, hashlib.sha256(Path(path).read_bytes()).hexdigest())


def text_column(codec: TextLike, vocabulary: Vocabulary, network: str = "") -> Column:
    """The packed column of a text; `network` is the sha256 of what made the numbers in it, if it quotes any."""
    version = modalities.split(codec.name)[1]
    name = codec.packs_as + (f"@{version}" if version else "") if codec.packs_as else codec.name
    return Column(
        name=name,
        kind="sequence",
        max_tokens=codec.max_tokens,
        vocab_size=vocabulary.size,
        codec="" if name == codec.name else codec.name,
        choice=codec.choice,
        chunked=codec.chunked,
        tokenizer=vocabulary.sha256,
        network=network if codec.packs_as else "",
    )


def token_column(name: str, vocab_size: int, num_tokens: int, grid: Sequence[int], tokenizer: str) -> Column:
    """The packed column of tokens; a grid that is not known is square, or a line."""
    side = modalities.split(name)[0].partition("@")[2]
    root = math.isqrt(num_tokens)
    square = (root, root) if side and root**2 == num_tokens else (num_tokens,)
    return Column(
        name=name,
        kind="tokens",
        max_tokens=num_tokens,
        vocab_size=vocab_size,
        side=int(side or 0),
        grid=tuple(grid) or square,
        tokenizer=tokenizer,
    )


def embedding_column(name: str, dim: int, network: str = "") -> Column:
    """The packed column of embeddings of captions."""
    return Column(name=name, kind="embeddings", max_tokens=MAX_TOKENS, dim=dim, network=network)


def image_columns(side: int, encoded: bool) -> list[Column]:
    """The packed column of images that the model reads with `side` pixels: of each crop, or as they are stored."""
    if encoded and not side:
        raise ValueError("images packed as they are stored need the side that they are read with: --pixels 224")
    kind: Literal["images", "pixels"] = "images" if encoded else "pixels"
    return [Column(name=f"rgb@{side}", kind=kind, max_tokens=side**2, side=side)] if side else []


def check_names(columns: Sequence[Column]) -> None:
    """ValueError when two columns would be one modality of the model."""
    names = [c.name for c in columns]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise ValueError(f"two columns are packed as {', '.join(sorted(twice))}: name those that are wanted")


def can_be_packed(column: str) -> bool:
    """Whether a column is of tokens, of text, or of embeddings of captions."""
    codec = modalities.load(column) if column != CELL else None
    return codec is not None and (isinstance(codec, TextLike | T5Caption) or codec.kind == "tokens")


def _column(dataset: Dataset, name: str, vocabulary: Vocabulary) -> Column:
    codec = modalities.load(name)
    made_by = _record(dataset, name, dataset.committed(name)[0]).provenance
    network = (made_by.get("weights") or {}).get("sha256", "")
    if isinstance(codec, TextLike):
        return text_column(codec, vocabulary, network)
    if isinstance(codec, T5Caption):
        return embedding_column(name, _width(dataset, name, codec), network)
    return token_column(name, made_by["vocab_size"], made_by["num_tokens"], made_by.get("grid", ()), network)


def _width(dataset: Dataset, name: str, codec: T5Caption) -> int:
    """Channels of the first valid embeddings, without reading the others."""
    for shard in dataset.committed(name):
        record = _record(dataset, name, shard)
        with dataset.store.local_path(record.file).open("rb") as stream:
            for header in _tars.in_file(stream):
                if header.name.partition(".")[0] not in record.invalid:
                    stream.seek(header.offset)
                    return int(codec.decode(stream.read(header.size))["emb"].shape[2])
    raise ValueError(f"{name}: no valid embedding")


def _with_draws(dataset: Dataset, columns: Sequence[Column]) -> list[Column]:
    """The same, where embeddings and the captions that they are of take the same caption of a sample."""
    names = {c.name for c in columns if c.kind == "sequence"}
    draws = {}
    for column in columns:
        if column.kind == "embeddings":
            read = _record(dataset, column.name, dataset.committed(column.name)[0]).provenance.get(
                "inputs", ["caption"]
            )
            draws.update({n: source for source in read if source in names for n in (source, column.name)})
    return [replace(c, draw=draws.get(c.name, "")) for c in columns]


def _record(dataset: Dataset, modality: str, shard: int) -> Commit:
    record = dataset.commit(modality, shard)
    assert record is not None
    return record


def _pack_shard(dataset: Dataset, columns: Sequence[Column], encode: Encode, task: Task) -> Report:
    began = perf_counter()
    keys = dataset.keys(task.shard)
    images = [m.data for m in dataset.read("rgb", task.shard)]
    settings = modalities.load("crop_settings")
    crops = [crops_of(settings.decode(m.data)) for m in dataset.read("crop_settings", task.shard)]
    sizes = [size_of(image) for image in images]
    if not any(c.kind in IMAGES for c in columns):
        images.clear()
    rows = {
        c.name: IMAGES[c.kind](images, crops, c.side)
        if c.kind in IMAGES
        else _values(dataset, c, task.shard, crops, sizes, encode)
        for c in columns
    }
    batch = packed.build(columns, dataset.plan.num_crops, keys, rows)
    about = {stored.ABOUT: stored.about(columns, dataset.plan.num_crops)}
    return publish(dataset, columns, task, keys, packed.pieces(batch), about, began)


def _values(
    dataset: Dataset,
    column: Column,
    shard: int,
    crops: Sequence[Sequence[Crop]],
    sizes: Sequence[tuple[int, int]],
    encode: Encode,
) -> Iterator[Any]:
    """What `packed.build` takes of a column, whose tar is read when the first is asked for."""
    name = column.codec or column.name
    codec, invalid = modalities.load(name), _record(dataset, name, shard).invalid
    for m, c, size in zip(taken(dataset.read(name, shard)), crops, sizes, strict=True):
        yield None if m.key in invalid else row(column, codec, m.key, codec.decode(m.data), c, size, encode)


def taken(items: list[Item]) -> Iterator[Item]:
    """The items in their order; the list is emptied, so that each is freed when it has been used."""
    items.reverse()
    while items:
        yield items.pop()


def all_pixels(images: list[bytes], crops: Sequence[Sequence[Crop]], side: int) -> Iterator[np.ndarray]:
    """`pixels` of each stored image, which are taken from the list."""
    for image, here in zip(taken(images), crops, strict=True):
        yield pixels(image, here, side)


def all_encoded(images: list[bytes], crops: Sequence[Sequence[Crop]], side: int) -> Iterator[tuple[bytes, np.ndarray]]:
    """Each stored image, which is taken from the list, without metadata; and its crops int64 (n_crops, 5)."""
    for image, here in zip(taken(images), crops, strict=True):
        yield stored_images.bare(image), np.array([[c.top, c.left, c.height, c.width, c.hflip] for c in here])


IMAGES: Mapping[str, Callable[[list[bytes], Sequence[Sequence[Crop]], int], Iterator[Any]]] = {
    "pixels": all_pixels,
    "images": all_encoded,
}
"""What makes the values of a kind of column from stored images, their crops and the side of the column."""


def publish(
    dataset: Dataset,
    columns: Sequence[Column],
    task: Task,
    keys: Sequence[str],
    data: Sequence[Buffer],
    provenance: dict[str, Any],
    began: float,
) -> Report:
    """Commit a packed shard, given in pieces; `began` is when work on it did, by `perf_counter`."""
    record = Commit(
        modality=CELL,
        shard=task.shard,
        spec=task.specs[CELL],
        file=f"{CELL}/{shard_name(task.shard)}.arrow",
        num_bytes=sum(map(len, data)),
        sha256=shards.sha256(data),
        num_samples=len(keys),
        keys_sha256=shards.keys_sha256(keys),
        provenance={"columns": [c.name for c in columns], **provenance},
    )
    dataset.publish(record, data)
    seconds = perf_counter() - began
    return Report(task.shard, (CellReport(CELL, len(keys), 0, record.num_bytes, seconds),), seconds)


def encoder(text_tokenizer: str) -> Encode:
    """Text to ids; the pieces of metadata and palettes are few, and come again and again."""
    if not text_tokenizer:
        return lambda text: []
    from model.tokenizers.text import TextTokenizer

    return functools.lru_cache(maxsize=1 << 16)(TextTokenizer.load(Path(text_tokenizer)).encode)


def size_of(image: bytes) -> tuple[int, int]:
    """(h, w) of a JPEG, a PNG or a JPEG 2000, by its header."""
    with Image.open(io.BytesIO(image), formats=("JPEG", "PNG", "JPEG2000")) as opened:
        return opened.height, opened.width


def pixels(image: bytes, crops: Sequence[Crop], side: int) -> np.ndarray:
    """uint8 (crops, side, side, 3) of a stored image."""
    codec = modalities.load("rgb")
    rgb = codec.decode(image)
    return np.stack([codec.crop(rgb, crop, rgb.shape[:2], side) for crop in crops])


def row(
    column: Column,
    codec: Modality,
    key: str,
    value: Any,
    crops: Sequence[Crop],
    size: tuple[int, int],
    encode: Encode,
) -> Any:
    """What `packed.build` takes for a value; None where it says nothing and its grammar has no word for that."""
    if column.kind == "tokens":
        return value
    if isinstance(codec, T5Caption):
        rows = codec.rows(value)
        return rows if any(len(r) for r in rows) else None
    assert isinstance(codec, TextLike)
    try:
        variants = codec.variants(value, crops, size)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{column.name} of {key}: {type(error).__name__}: {error}") from error
    return [[encode(p) if isinstance(p, str) else p for p in pieces] for pieces in variants] or None
