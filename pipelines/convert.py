"""Convert: ml-4m's tars of tokens and labels into packed shards, as `pack` makes them of a dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from dataengine import ml4m, modalities, packed, storage, stored
from dataengine.geometry import Crop, crops_of
from dataengine.manifest import Conflict, Dataset
from dataengine.ml4m import COLUMNS, Tars
from dataengine.modalities import TextLike
from dataengine.packed import Column
from dataengine.shards import Member
from dataengine.work import Report, Task, Work
from pipelines import pack
from pipelines.pack import Encode, Vocabulary

PLACED = ("det", "human_poses")
"""What is cut to a crop while it is packed, for which the crops and the size of the image must be known."""


@dataclass(frozen=True)
class Convert:
    """The converting worker: one shard of tars a task, `shards` by number."""

    root: str
    shards: tuple[Tars, ...]
    names: tuple[tuple[str, str], ...]
    text_tokenizer: str
    columns: tuple[Column, ...]
    num_crops: int
    aligned: bool

    def start(self, device: str) -> Work:
        """Load the text tokenizer."""
        encode = pack.encoder(self.text_tokenizer)
        return lambda task: _convert_shard(self, encode, task)


def prepare(
    out: Dataset,
    pattern: str,
    *,
    text_tokenizer: str,
    tokenizers: str = "",
    pixels: int = 0,
    encoded: bool = False,
    names: Mapping[str, str] | None = None,
    aligned: bool = False,
) -> tuple[Convert, list[Task]]:
    """What there is to convert of the shards that a path of ml-4m names; the first shard says what they hold.

    `tokenizers` is a folder of `<modality>.safetensors`, of the tokenizers that made the ids; without it the sizes of
    the published vocabularies are taken, and which file made the ids stays unknown. `names` renames folders. `aligned`:
    a caption belongs to the crop of its number (ml-4m's aligned_captions), else any one of them is taken.
    """
    if out.planned:
        raise Conflict(f"{out.store.name} is a dataset of its own: convert into another folder")
    tars = ml4m.expand(pattern)
    _, members = ml4m.read(tars[0], names)
    worker = worker_of(
        out.store.url,
        tars,
        {m: column[0] for m, column in members.items()},
        text_tokenizer=text_tokenizer,
        tokenizers=tokenizers,
        pixels=pixels,
        encoded=encoded,
        names=names,
        aligned=aligned,
    )
    tasks = []
    for number, shard in enumerate(tars):
        inputs = [[folder, storage.redacted(url), storage.tag(url)] for folder, url in shard.urls]
        task = pack.task_of(out, number, worker.columns, json.dumps([inputs, worker.names, worker.num_crops]))
        tasks += [task] if task else []
    return worker, tasks


def worker_of(
    root: str,
    tars: Sequence[Tars],
    first: Mapping[str, Member],
    *,
    text_tokenizer: str,
    tokenizers: str = "",
    pixels: int = 0,
    encoded: bool = False,
    names: Mapping[str, str] | None = None,
    aligned: bool = False,
) -> Convert:
    """What makes packed rows of tars, by the members of the first sample; the options are those of `prepare`."""
    unknown = [m for m in first if not m.startswith("tok_") and m not in (*ml4m.TEXTS, *ml4m.OTHERS)]
    if unknown or not first:
        raise ValueError(
            f"{tars[0].name}: {', '.join(unknown) or 'nothing'} to be packed, expected tok_* and "
            f"{', '.join((*ml4m.TEXTS, *ml4m.OTHERS))}: leave the others out of the path"
        )
    found = {m: ml4m.decode(m, member) for m, member in first.items()}
    texts = [m for m in found if m in ml4m.TEXTS]
    vocabulary = Vocabulary.of(text_tokenizer) if texts else Vocabulary()
    columns = [_column(m, v, vocabulary, tokenizers) for m, v in found.items() if m not in ("rgb", "crop_settings")]
    columns = [_chosen(c, aligned, {"caption", "t5_caption"} <= set(found)) for c in columns]
    columns[:0] = pack.image_columns(pixels, encoded)
    if pixels and not {"rgb", "crop_settings"} <= set(found):
        raise ValueError(f"{tars[0].name}: pixels need the folders rgb and crop_settings in the path")
    pack.check_names(columns)
    return Convert(
        root,
        tuple(tars),
        tuple(sorted((names or {}).items())),
        text_tokenizer if texts else "",
        tuple(columns),
        _num_crops(found),
        aligned,
    )


def _num_crops(found: Mapping[str, Any]) -> int:
    """That all of a sample agree on."""
    counts = {m: len(v) for m, v in found.items() if m.startswith("tok_") or m == "crop_settings"}
    counts |= {m: len(v["crops"]) for m, v in found.items() if m == "sam_instance"}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the first sample has different numbers of crops: {counts}")
    return next(iter(counts.values()), 1)


def _column(modality: str, value: Any, vocabulary: Vocabulary, tokenizers: str) -> Column:
    codec = modalities.load(COLUMNS.get(modality, modality))
    if modality == "t5_caption":
        return pack.embedding_column(modality, value["emb"].shape[2])
    if isinstance(codec, TextLike):
        return pack.text_column(codec, vocabulary)
    num_tokens = value.shape[1]
    if not tokenizers:
        if ml4m.TOKENS.get(modality, (0, 0))[1] != num_tokens:
            raise ValueError(
                f"{modality} with {num_tokens} tokens is not among the published ones: name the folder of its "
                "tokenizer (--tokenizers), which knows the size of its vocabulary"
            )
        return pack.token_column(modality, ml4m.TOKENS[modality][0], num_tokens, (), "")
    from model import tokenizers as loaded

    stem = modality.removeprefix("tok_").partition("@")[0]
    bare = stem.removesuffix("_global")
    own = next((own for own, theirs in ml4m.FEATURES.items() if theirs == bare), bare)
    tried = list(dict.fromkeys((stem, stem.replace(bare, own).replace("_global", "-global"))))
    files = [Path(tokenizers, f"{name}.safetensors") for name in tried]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise ValueError(f"{modality}: no tokenizer {' or '.join(map(str, files))}")
    tokenizer = loaded.read(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return pack.token_column(modality, tokenizer.vocab_size, num_tokens, tokenizer.grid, digest)


def _chosen(column: Column, aligned: bool, both: bool) -> Column:
    if column.name not in ("caption", "t5_caption"):
        return column
    return replace(column, choice="crop") if aligned else replace(column, draw="caption" if both else "")


def _convert_shard(worker: Convert, encode: Encode, task: Task) -> Report:
    began = perf_counter()
    tars = worker.shards[task.shard]
    keys, members = ml4m.read(tars, dict(worker.names))
    try:
        rows = values_of(worker, keys, members, encode)
        batch = packed.build(worker.columns, worker.num_crops, keys, rows)
        packed.check(batch)
    except ValueError as error:
        raise ValueError(f"{tars.name}: {error}") from error
    of = {"ml4m": tars.name, stored.ABOUT: stored.about(worker.columns, worker.num_crops)}
    return pack.publish(Dataset(worker.root), worker.columns, task, keys, packed.pieces(batch), of, began)


def values_of(
    worker: Convert, keys: Sequence[str], members: dict[str, list[Member]], encode: Encode, only: int | None = None
) -> dict[str, Iterator[Any]]:
    """What `packed.build` takes, made when it is asked for; members are taken away as they are used.

    `only`: of this crop alone, as if there were no other.
    """
    with_pixels = any(c.kind in pack.IMAGES for c in worker.columns)
    images = [m.data for m in members.get("rgb", [])]
    placed = bool(set(members) & set(PLACED)) or with_pixels
    if placed and not {"rgb", "crop_settings"} <= set(members):
        raise ValueError(f"{' and '.join(set(members) & set(PLACED))} need rgb and crop_settings in the path")
    sizes = [pack.size_of(image) for image in images] if placed else [(1, 1)] * len(keys)
    anywhere = [Crop(0, 0, 1, 1)] * worker.num_crops
    crops = [crops_of(ml4m.decode("crop_settings", m)) for m in members.get("crop_settings", [])]
    crops = crops or [anywhere] * len(keys)
    for key, here in zip(keys, crops, strict=True):
        if len(here) != worker.num_crops:
            raise ValueError(f"crop_settings of {key}: {len(here)} crops, expected {worker.num_crops}")
    crops = crops if only is None else [here[only : only + 1] for here in crops]
    members.pop("rgb", None)
    if not with_pixels:
        images.clear()
    rows: dict[str, Iterator[Any]] = {}
    for column in worker.columns:
        if column.kind in pack.IMAGES:
            rows[column.name] = pack.IMAGES[column.kind](images, crops, column.side)
            continue
        if column.name not in members:
            raise ValueError(f"no {column.name}, which the first shard has")
        rows[column.name] = _values(worker, column, members.pop(column.name), crops, sizes, encode, only)
    return rows


def _values(
    worker: Convert,
    column: Column,
    members: list[Member],
    crops: Sequence[Sequence[Crop]],
    sizes: Sequence[tuple[int, int]],
    encode: Encode,
    only: int | None,
) -> Iterator[Any]:
    codec = modalities.load(column.codec or column.name)
    for m, c, size in zip(pack.taken(members), crops, sizes, strict=True):
        value = ml4m.decode(column.name, m)
        if only is not None:
            value = _under(column, value, worker.num_crops, only, m.key)
        found = _by_crop(column, pack.row(column, codec, m.key, value, c, size, encode), worker, m.key)
        yield found[only : only + 1] if only is not None and _aligned(column, worker) and found else found


def _under(column: Column, value: Any, num_crops: int, only: int, key: str) -> Any:
    """A value that was made crop by crop, of one crop."""
    if column.kind != "tokens" and column.name != "sam_instance":
        return value
    rows = value if column.kind == "tokens" else value["crops"]
    if len(rows) != num_crops:
        raise ValueError(f"{column.name} of {key}: {len(rows)} crops, expected {num_crops}")
    return rows[only : only + 1] if column.kind == "tokens" else {**value, "crops": rows[only : only + 1]}


def _aligned(column: Column, worker: Convert) -> bool:
    return worker.aligned and column.name in ("caption", "t5_caption")


def _by_crop(column: Column, variants: Any, worker: Convert, key: str) -> Any:
    """Captions and embeddings one a crop, where they are aligned; one alone is that of every crop."""
    if not _aligned(column, worker) or variants is None:
        return variants
    if len(variants) == 1:
        return list(variants) * worker.num_crops
    if len(variants) < worker.num_crops:
        raise ValueError(f"{column.name} of {key}: {len(variants)} for {worker.num_crops} crops, but one or as many")
    return variants[: worker.num_crops]
