"""How large packed shards are, and how fast a sample is read from them, beside the same values in ml-4m's tars.

python -m benchmarks.packed [--quick] [--reference DIR] [--json]

One shard of the inputs of 4M-21, every value synthetic: ten crops, 20 instances of SAM a crop, one person in every
second image, 6 boxes, one caption and its 20 embeddings of width 4096. The tars are what `dataengine export --ml4m`
writes. Ids are uniform, which no tokenizer's are: what compression would save of them is a lower bound.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from benchmarks import _report
from dataengine import ml4m, modalities, packed, shards
from dataengine.geometry import crop_settings, crops_of
from dataengine.packed import Column, Packed
from dataengine.shards import Member
from model.tokenizers import text
from pipelines import pack

CROPS = 10
SIZE = (384, 512)
TOKENS = tuple(name for name in ml4m.TOKENS if not name.endswith("@448"))
TEXTS = ("caption", "det", "metadata", "color_palette", "human_poses_tokens", "sam_instance_tokens")
WORDS = ("point polygon none human pose global camera shape a the dog cat red blue ball on floor of two sitting "
         "standing beside small large house tree").split()  # fmt: skip
_WITH_T5 = 50
SUMS = ("tokens", "texts", "tokens_and_texts", "everything")
GOALS = {"times_smaller": 4.0, "open_ms": 10.0, "row_us": 50.0}


def measure(quick: bool, reference: Path | None) -> dict[str, Any]:
    """Bytes, opening and reading of one shard, packed and as tars."""
    if reference is not None:
        raise ValueError("packed: there is no other checkout to compare with, expected no --reference")
    found = figures(100, 2_000) if quick else figures(1_000, 20_000)
    # What a corpus without augmentation has: headers weigh more.
    alone = figures(100, 200, crops=1)["bytes_a_sample"]
    return {**found, "times_smaller_at_one_crop": {name: alone[name]["times_smaller"] for name in SUMS}}


def figures(count: int, rounds: int, crops: int = CROPS) -> dict[str, Any]:
    """The same of a shard of `count` samples, of which `rounds` are read of each set of modalities."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="packed-") as name:
        folder = Path(name)
        tokenizer = text.train([" ".join(WORDS)] * 9, 4400, folder / "text.json")
        _report.console.print(f"{count} samples ...")
        keys = [f"{i:08d}" for i in range(count)]
        columns, rows, tars = [], {}, {}
        for modality in (*TOKENS, *TEXTS, "t5_caption"):
            few = keys[:_WITH_T5] if modality == "t5_caption" else keys
            column, values, members = _made(rng, modality, few, tokenizer, crops)
            path = folder / ml4m.Reader().folder(modality) / "shard-00000.tar"
            path.parent.mkdir()
            path.write_bytes(shards.build_tar(members))
            columns.append(column)
            rows[column.name] = [*values, *[None] * (count - len(few))]
            tars[column.name] = (path, len(few))
        file = folder / "shard-00000.arrow"
        file.write_bytes(packed.write(columns, crops, keys, rows))
        _report.console.print("sizes ...")
        sizes = _sizes(file, columns, tars)
        _report.console.print("reading ...")
        return {
            "benchmark": "packed",
            "samples": count,
            "crops": crops,
            "bytes_a_sample": sizes,
            "tokens_otherwise": _otherwise(file, columns),
            "open_ms": _open(file),
            "row_us": _rows(file, columns, rounds),
            "webdataset_us": _webdataset({n: path for n, (path, _) in tars.items() if n != "t5_caption"}, count),
            "goals": GOALS,
        }


def _made(
    rng: np.random.Generator, modality: str, keys: Sequence[str], tokenizer: Any, num_crops: int
) -> tuple[Column, list[Any], list[Member]]:
    """The packed column of a modality, its packed values, and the members that ml-4m reads."""
    codec = modalities.load(modality)
    values = [_value(rng, modality, num_crops) for _ in keys]
    form = ml4m.Reader().form(modality, num_crops)
    members = [form(Member(k, codec.suffix, codec.encode(v))) for k, v in zip(keys, values, strict=True)]
    if modality in TOKENS:
        vocab_size, num_tokens = ml4m.TOKENS[modality]
        return pack.token_column(modality, vocab_size, num_tokens, (), ""), values, members
    if modality == "t5_caption":
        return pack.embedding_column(modality, 4096), [codec.rows(v) for v in values], members
    column = pack.text_column(codec, pack.Vocabulary(tokenizer.vocab_size))
    out = []
    for key, value in zip(keys, values, strict=True):
        crops = crops_of(crop_settings(rng, *SIZE, num_crops, 0.8))
        out.append(pack.row(column, codec, key, value, crops, SIZE, tokenizer.encode))
    return column, out, members


def _value(rng: np.random.Generator, modality: str, num_crops: int) -> Any:
    if modality in TOKENS:
        vocab_size, num_tokens = ml4m.TOKENS[modality]
        return rng.integers(0, vocab_size, (num_crops, num_tokens)).astype(np.uint16)
    codec = modalities.load(modality)
    if modality == "caption":
        return [" ".join(rng.choice(WORDS[8:], 12))]
    if modality == "det":
        return {"instances": [codec.example(rng, SIZE)["instances"][i % 2] for i in range(6)]}
    if modality == "sam_instance_tokens":
        return {"side": 224, "crops": [[_instance(rng) for _ in range(20)] for _ in range(num_crops)]}
    if modality == "human_poses_tokens" and rng.random() < 0.5:
        return []
    if modality == "human_poses_tokens":
        two = codec.example(rng, SIZE)
        params = {k: v[:1] for k, v in two["pred_smpl_params"].items()}
        return {**{k: v[:1] for k, v in two.items() if k != "pred_smpl_params"}, "pred_smpl_params": params}
    if modality == "t5_caption":
        emb = rng.standard_normal((1, 20, 4096)).astype(np.float16)
        return {"emb": emb, "mask_valid": np.ones((1, 20), np.bool_)}
    return codec.example(rng, SIZE)


def _instance(rng: np.random.Generator) -> dict[str, Any]:
    """An ellipse of a random place and size as OpenCV outlines it."""
    mask = np.zeros((224, 224), np.uint8)
    centre, axes = rng.integers(20, 204, 2), rng.integers(6, 60, 2)
    cv2.ellipse(mask, tuple(map(int, centre)), tuple(map(int, axes)), float(rng.integers(180)), 0, 360, 1, -1)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    points = contours[0][:, 0]
    bbox = [*points.min(axis=0)[::-1].tolist(), *points.max(axis=0)[::-1].tolist()]
    return {"polygon": points.tolist(), "bbox": bbox, "tokens": rng.integers(0, 1024, 16).tolist()}


def _sizes(file: Path, columns: Sequence[Column], tars: Mapping[str, tuple[Path, int]]) -> dict[str, Any]:
    """Bytes of a sample in its tars and packed, and how many times smaller that is, by modality and in sums."""
    batch = pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)
    each = {
        c.name: (tars[c.name][0].stat().st_size / tars[c.name][1], _column_bytes(batch, c, tars[c.name][1]))
        for c in columns
    }
    groups = {
        "tokens": [c.name for c in columns if c.kind == "tokens"],
        "texts": [c.name for c in columns if c.kind == "sequence"],
        "tokens_and_texts": [c.name for c in columns if c.kind != "embeddings"],
        "everything": [c.name for c in columns],
    }
    sums = {g: (sum(each[n][0] for n in names), sum(each[n][1] for n in names)) for g, names in groups.items()}
    return {n: {"tar": a, "packed": b, "times_smaller": a / b} for n, (a, b) in {**each, **sums}.items()}


def _column_bytes(batch: pa.RecordBatch, column: Column, valid: int) -> float:
    values = batch.column(column.name)
    return float(values.nbytes) / (valid if column.kind == "embeddings" else len(values))


def _otherwise(file: Path, columns: Sequence[Column]) -> dict[str, float]:
    """Bytes of a sample's tokens in other forms, none of which can be read without a copy."""
    shard = Packed(file)
    batch = pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)
    out = dict.fromkeys(("uint16", "bits", "zstd", "lz4"), 0.0)
    for column in columns:
        if column.kind != "tokens":
            continue
        ids = batch.column(column.name).values.to_numpy()
        out["uint16"] += ids.nbytes
        out["bits"] += ids.size * int(column.vocab_size - 1).bit_length() / 8
        for codec in ("zstd", "lz4"):
            out[codec] += len(pa.compress(ids.tobytes(), codec=codec, asbytes=True))
    return {name: total / len(shard) for name, total in out.items()}


def _open(file: Path) -> float:
    """Milliseconds to open, the median; the codecs are imported once in a process, and before."""
    Packed(file)
    taken = []
    for _ in range(50):
        began = time.thread_time()
        Packed(file)
        taken.append(time.thread_time() - began)
    return float(np.median(taken)) * 1e3


def _rows(file: Path, columns: Sequence[Column], rounds: int) -> dict[str, float]:
    """Microseconds to read a random row under a random crop, with everything that is drawn, the median of rounds.

    Processor time, for nothing is waited for: the file is in memory, and others may be at work on this machine.
    """
    shard, rng = Packed(file), np.random.default_rng(1)
    names = [c.name for c in columns]
    sets = {n: [n] for n in names} | {
        "tokens": [c.name for c in columns if c.kind == "tokens"],
        "all_but_sam_instance": [n for n in names if n != "sam_instance"],
        "all": names,
    }

    def timed(chosen: Sequence[str], indices: Sequence[int]) -> float:
        for i in indices[:50]:
            shard.row(i, rng, chosen)
        parts = []
        for start in range(0, len(indices), 200):
            some = indices[start : start + 200]
            began = time.thread_time()
            for i in some:
                shard.row(i, rng, chosen)
            parts.append((time.thread_time() - began) / len(some))
        return float(np.median(parts)) * 1e6

    everywhere = rng.integers(len(shard), size=rounds).tolist()
    # Few samples have embeddings here, lest the shard be of gigabytes.
    with_t5 = rng.integers(min(_WITH_T5, len(shard)), size=rounds).tolist()
    return {label: timed(chosen, with_t5 if "t5_caption" in chosen else everywhere) for label, chosen in sets.items()}


def _webdataset(tars: Mapping[str, Path], count: int) -> dict[str, float]:
    """Microseconds a sample to read the tars in step, one after the other, and to decode them as ml-4m does too."""
    import webdataset as wds

    def decoded(key: str, data: bytes) -> Any:
        return np.load(io.BytesIO(data), allow_pickle=True) if key.endswith("npy") else None

    def timed(make: Callable[[str], Any]) -> float:
        began = time.thread_time()
        seen = sum(1 for _ in zip(*(make(str(path)) for path in tars.values()), strict=True))
        assert seen == count
        return (time.thread_time() - began) / count * 1e6

    def plain(path: str) -> Any:
        return wds.WebDataset(path, shardshuffle=False)

    timed(plain)
    return {"read": timed(plain), "read_and_decode": timed(lambda path: plain(path).decode(decoded))}


if __name__ == "__main__":
    _report.main(measure)
