"""ml-4m's tars of labels and tokens (apple/ml-4m 1.0.0): reading them aligned, and writing ours as its loader needs.

One folder a modality, one tar a shard under the same name in each: `root/[caption,tok_rgb@224]/shard-{000..099}.tar`
(fourm/data/unified_datasets.py). Two modalities are named otherwise here: see `COLUMNS`.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import braceexpand
import numpy as np

from dataengine import _pickled, _tars, codecs, export, modalities, storage
from dataengine.manifest import Dataset
from dataengine.modalities.sam_instance_tokens import NUM_TOKENS, SIDE
from dataengine.shards import Member

COLUMNS = {"human_poses": "human_poses_tokens", "sam_instance": "sam_instance_tokens"}
"""ml-4m's modalities whose values, tokens included, are those of another column here."""

FEATURES = {"CLIP-B16": "clip", "DINOv2-B14": "dinov2", "ImageBind-H14": "imagebind"}
"""What ml-4m calls the tokens of features: `tok_clip@224`, and `tok_dinov2_global` of a vector."""

TEXTS = ("caption", "det", "metadata", "color_palette", "human_poses", "sam_instance")
OTHERS = ("rgb", "crop_settings", "t5_caption")

# fourm/data/modality_info.py: size of the codebook and number of tokens.
_CODEBOOKS = {"rgb": 16384, "depth": 8192, "normal": 8192, "semseg": 4096, "clip": 8192}
TOKENS: dict[str, tuple[int, int]] = {
    **{f"tok_{name}@224": (size, 196) for name, size in _CODEBOOKS.items()},
    **{f"tok_{name}@448": (size, 784) for name, size in _CODEBOOKS.items()},
    **{f"tok_{name}@224": (8192, 196) for name in ("canny_edge", "sam_edge")},
    **{f"tok_{name}@224": (8192, 256) for name in ("dinov2", "imagebind")},
    **{f"tok_{name}_global": (8192, 16) for name in ("dinov2", "imagebind")},
}
"""Size of the vocabulary and number of tokens of the published tokenizers."""

_IGNORED = ("file_name", "class_name", "class_idx")
_MAX_UNPACKED = 64 << 20
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # webdataset's: up to the first dot of the file's name


@dataclass(frozen=True)
class Tars:
    """One shard: (folder, URL) of each of its tars; the folder is "" where the path names none."""

    name: str
    urls: tuple[tuple[str, str], ...]


def expand(pattern: str) -> list[Tars]:
    """The shards of a path with brace ranges and, if it has several tars a shard, one `[folder,folder]`."""
    out = []
    for part in pattern.split("::"):
        for name in braceexpand.braceexpand(part):
            head, opened, rest = name.partition("[")
            folders, closed, tail = rest.partition("]")
            if bool(opened) != bool(closed) or "[" in tail:
                raise ValueError(f"{storage.redacted(pattern)}: expected one [folder,folder] at most")
            names = folders.split(",") if opened else [""]
            if opened and (not all(names) or len(set(names)) < len(names)):
                raise ValueError(f"{storage.redacted(pattern)}: expected different folders in [{folders}]")
            out.append(Tars(storage.redacted(name), tuple((n, f"{head}{n}{tail}") for n in names)))
    if len({tars.urls for tars in out}) < len(out):
        raise ValueError(f"{storage.redacted(pattern)} names a shard twice")
    return out


def read(tars: Tars, names: Mapping[str, str] | None = None) -> tuple[list[str], dict[str, list[Member]]]:
    """The keys of a shard, and the members of each modality in their order, whose suffix is the extension alone.

    `names` renames folders (ml-4m's `modality_name_map`). Where ml-4m drops the rest of a shard without an error, this
    does not: ValueError names the tar, the position and the keys when tars do not list the same keys in the same order.
    """

    def groups(url: str) -> Groups[bytes]:
        with storage.open_url(url) as stream:
            data = stream.read()
        return grouped(url, _tars.in_memory(data), lambda h: data[h.offset : h.offset + h.size])

    keys, columns = aligned(tars, groups, names)
    return keys, {
        modality: [member(key, suffix, data) for key, (suffix, data) in zip(keys, column, strict=True)]
        for modality, column in columns.items()
    }


T = TypeVar("T")
Groups: TypeAlias = tuple[list[str], list[list[tuple[str, T]]]]
"""The keys of a tar, and (suffix, what was taken) of the members of each."""


def aligned(
    tars: Tars, groups: Callable[[str], Groups[T]], names: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, list[tuple[str, T]]]]:
    """The keys of a shard, and (suffix, what was taken) of the member of each key, by modality.

    `groups` is what `grouped` gives of a URL; see `read` for the errors.
    """
    keys: list[str] | None = None
    first = ""
    columns: dict[str, list[tuple[str, T]]] = {}
    having: dict[str, list[str]] = {}
    for folder, url in tars.urls:
        found, of_each = groups(url)
        if keys is None:
            keys, first = found, url
        _check_aligned(first, keys, url, found)
        for key, members in zip(found, of_each, strict=True):
            here = {_modality(folder, suffix, len(members) == 1, names or {}): (suffix, v) for suffix, v in members}
            for modality, one in here.items():
                if modality not in _IGNORED:
                    columns.setdefault(modality, []).append(one)
                    having.setdefault(modality, []).append(key)
    assert keys is not None
    for modality, column in columns.items():
        if len(column) != len(keys):
            have = set(having[modality])
            lacks = next((k for k in keys if k not in have), "none")
            raise ValueError(
                f"{tars.name}: {len(column)} members of {modality} for {len(keys)} keys; the first without one is "
                f"{lacks!r}"
            )
    return keys, columns


def member(key: str, suffix: str, data: bytes) -> Member:
    """A member as it lies in a tar, unpacked if it is .gz, by its extension alone."""
    return Member(key, _extension(suffix), _unpacked(suffix, data))


def grouped(url: str, headers: Iterable[_tars.Header], take: Callable[[_tars.Header], T]) -> Groups[T]:
    """The keys of a tar, and (suffix, what is taken of it) of the members of each, which must be neighbours."""
    keys: list[str] = []
    groups: list[list[tuple[str, T]]] = []
    try:
        for header in headers:
            match = _NAME.fullmatch(header.name)
            if header.kind != "file" or match is None:
                continue
            key, suffix = match[1], match[2].lower()
            if not keys or keys[-1] != key:
                keys.append(key)
                groups.append([])
            if suffix in (s for s, _ in groups[-1]):
                raise ValueError(f"{header.name!r} is there twice")
            groups[-1].append((suffix, take(header)))
    except ValueError as error:
        raise ValueError(f"{storage.redacted(url)}: {error}") from error
    if len(set(keys)) < len(keys):
        again = next(k for k, times in Counter(keys).items() if times > 1)
        raise ValueError(f"{storage.redacted(url)}: members of {again!r} stand apart, or are there twice")
    return keys, groups


def _check_aligned(first: str, keys: Sequence[str], url: str, found: Sequence[str]) -> None:
    if keys == found:
        return
    at = next((i for i, (a, b) in enumerate(zip(keys, found, strict=False)) if a != b), min(len(keys), len(found)))
    here, there = (repr(k[at]) if at < len(k) else f"the end of {len(k)} keys" for k in (found, keys))
    raise ValueError(
        f"{storage.redacted(url)} is not aligned: at position {at} it has {here}, and {storage.redacted(first)} has "
        f"{there}. ml-4m would train on the {at} samples before and silently drop the rest"
    )


def _modality(folder: str, suffix: str, alone: bool, names: Mapping[str, str]) -> str:
    bare = suffix.removesuffix(".gz")
    if folder and alone and "." not in bare:
        return names.get(folder, folder)
    modality = bare.rpartition(".")[0]
    if not modality:
        raise ValueError(f"a member KEY.{suffix} in a tar of several modalities, expected KEY.<modality>.{suffix}")
    return names.get(modality, modality)


def _extension(suffix: str) -> str:
    return suffix.removesuffix(".gz").rpartition(".")[2]


def _unpacked(suffix: str, data: bytes) -> bytes:
    if not suffix.endswith(".gz"):
        return data
    unzip = zlib.decompressobj(31)
    try:
        out = unzip.decompress(data, _MAX_UNPACKED)
    except zlib.error as error:
        raise ValueError(f"no readable .{suffix}: {error}") from error
    if not unzip.eof:
        raise ValueError(f"a .{suffix} that is cut short or swells to more than {_MAX_UNPACKED} bytes")
    return out


def decode(modality: str, member: Member) -> Any:
    """The value of a member, as this project's modality of it (see `COLUMNS`) has it; ValueError when it is none.

    Tokens: uint16 (n_crops, n_tokens). `rgb`: the bytes of the image.
    """
    try:
        return _decoded(modality, member)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{modality} of {member.key!r}: {reason}") from error


def _decoded(modality: str, member: Member) -> Any:
    data, extension = member.data, member.suffix
    if modality == "rgb":
        return data
    if modality.startswith("tok_"):
        ids = codecs.decode_npy(data)
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size or ids.min() < 0 or ids.max() > 65535:
            raise ValueError(f"expected ids (n_crops, n_tokens) in 0..65535, got {ids.dtype} {ids.shape}")
        return ids.astype(np.uint16)
    if modality == "crop_settings":
        rows = codecs.decode_npy(data)
        if rows.dtype.kind not in "iu" or rows.ndim != 2 or rows.shape[1] != 5:
            raise ValueError(f"expected integers (n_crops, 5), got {rows.dtype} {rows.shape}")
        return rows.astype(np.int64)
    if modality == "caption" and extension == "txt":
        return [data.decode()]
    if modality == "sam_instance":
        return _sam_instances(_pickled.decode(data))
    value = modalities.load(COLUMNS.get(modality, modality)).decode(data)
    if modality in ("metadata", "color_palette"):
        modalities.load(modality).check(value, (1, 1))
    if modality == "human_poses" and isinstance(value, dict) and "pose_tokenized" not in value:
        raise ValueError("no pose_tokenized: these poses have not been tokenised")
    return value


def _sam_instances(crops: list[Any]) -> dict[str, Any]:
    """`{"points": contours, "token_ids": (K, 16), "bbox": (K, 4)}` a crop as `sam_instance_tokens`."""
    out = []
    for crop in crops:
        if not isinstance(crop, dict) or not {"points", "token_ids", "bbox"} <= set(crop):
            raise ValueError(f"expected points, token_ids and bbox of each crop, got {_pickled.brief(crop)}")
        contours = [_pickled.plain(_pickled.plain(one)[0]) for one in _pickled.plain(crop["points"])]
        points = [np.rint(np.asarray(c, np.float64)).astype(np.int64).reshape(-1, 2).tolist() for c in contours]
        ids = np.asarray(_pickled.plain(crop["token_ids"]), np.int64).reshape(len(points), NUM_TOKENS).tolist()
        boxes = np.asarray(_pickled.plain(crop["bbox"]), np.float64).reshape(len(points), 4).tolist()
        out.append([{"polygon": p, "bbox": b, "tokens": t} for p, b, t in zip(points, boxes, ids, strict=True)])
    value = {"side": SIDE, "crops": out}
    modalities.load("sam_instance_tokens").check(value, (SIDE, SIDE))
    return value


# -- writing -----------------------------------------------------------------------------------------------------------


def layout(dataset: Dataset, columns: Sequence[str] = (), shard_size: int | None = None) -> export.Layout:
    """Plan an export that ml-4m trains on: of the columns that it reads, the samples that are valid in all.

    With none named, all that are complete and meaningful; `skipped` tells which are left out and why.
    """
    for column in columns:
        why = _hindrance(column)
        if why is not None:
            raise ValueError(f"{column} {why}")
    others = {c: why for c in dataset.modalities() if (why := _hindrance(c)) is not None}
    everything = export.layout(dataset, (), True, shard_size).skipped if not columns else {}
    chosen = columns or [c for c in dataset.modalities() if c not in others and c not in everything]
    folders = [Reader().folder(c) for c in chosen]
    if len(set(folders)) < len(folders):
        twice = next(f for f in folders if folders.count(f) > 1)
        both = ", ".join(c for c, f in zip(chosen, folders, strict=True) if f == twice)
        raise ValueError(f"{both} are all {twice} in ml-4m: name the one that is wanted")
    planned = export.layout(dataset, chosen, True, shard_size)
    planned.skipped.update({c: others.get(c) or everything[c] for c in {**others, **everything} if not columns})
    return planned


def _hindrance(column: str) -> str | None:
    """Why ml-4m cannot train 4M on a column."""
    stem, version = modalities.split(column)
    if version:
        return "is a version, which has no name in ml-4m: `dataengine rename` makes it the modality itself"
    if stem in COLUMNS:
        return f"has no tokens, which ml-4m reads with it: they are in {COLUMNS[stem]}"
    known = (*(COLUMNS.get(t, t) for t in TEXTS), *OTHERS)
    if not stem.startswith("tok_") and stem not in known:
        return "is not among what ml-4m trains 4M on"
    return None


class Reader:
    """What ml-4m's loader needs of an export."""

    name = "ml-4m"

    def folder(self, column: str) -> str:
        """ml-4m's name of the modality."""
        for own, theirs in FEATURES.items():
            if column.startswith((f"tok_{own}@", f"tok_{own}_global")):
                return column.replace(own, theirs, 1)
        return next((name for name, own in COLUMNS.items() if own == column), column)

    def form(self, column: str, num_crops: int) -> Callable[[Member], Member]:
        """What becomes of the members of a column.

        ml-4m takes the caption and the embeddings of the number of the crop, so there are as many, in turn; where there
        is no caption there are empty ones. Its file of instances is a pickle, and has none of an unknown outline.
        """
        if column == "caption":
            return lambda m: Member(m.key, "json", codecs.encode_json(_in_turn(_load(column, m) or [""], num_crops)))
        if column == "t5_caption":
            return lambda m: Member(m.key, "npz", _embeddings(_load(column, m), num_crops))
        if column == "sam_instance_tokens":
            return lambda m: Member(m.key, "npy", _instances(_load(column, m)))
        return lambda m: m


def _load(column: str, member: Member) -> Any:
    return modalities.load(column).decode(member.data)


def _in_turn(values: Sequence[Any], count: int) -> list[Any]:
    return [values[i % len(values)] for i in range(count)]


def _embeddings(value: dict[str, np.ndarray], num_crops: int) -> bytes:
    if len(value["emb"]) > 1:
        turn = [i % len(value["emb"]) for i in range(num_crops)]
        value = {name: array[turn] for name, array in value.items()}
    return modalities.load("t5_caption").encode(value)


def _instances(value: dict[str, Any]) -> bytes:
    if value["side"] != SIDE:
        raise ValueError(f"sam_instance_tokens of crops of {value['side']} pixels, ml-4m's are of {SIDE}")
    crops = []
    for instances in value["crops"]:
        known = [i for i in instances if i["polygon"]]
        crops.append(
            {
                # An outline is the first of a list, as OpenCV gives them: int32 (n, 1, 2) of x, y.
                "points": [[np.array(i["polygon"], np.int32)[:, None]] for i in known],
                "token_ids": np.array([i["tokens"] for i in known], np.int16).reshape(len(known), NUM_TOKENS),
                "bbox": np.array([i["bbox"] for i in known], np.float64).reshape(len(known), 4),
            }
        )
    return _pickled.encode(crops)
