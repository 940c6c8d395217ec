"""A dataset of the 4M-21 mixture as ml-4m's tars, every value synthetic, and what our `pack --from-ml4m` makes of it.

As in docs of ml-4m's speed: ten crops a sample, 20 instances of SAM a crop, one caption with 20 T5 embeddings padded to
77, 6 boxes, a person in every second image; 0.74 MB a sample, of which T5 is 0.62.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from dataengine import codecs, local, ml4m, modalities, shards
from dataengine.geometry import crop_settings
from dataengine.manifest import Dataset
from dataengine.shards import Member
from pipelines import convert

CROPS = 10
SIZE = (384, 512)
WORDS = ("a the dog cat red blue ball on floor of two sitting standing beside small large house tree near under man "
         "woman holding white street car with green grass sky table photo").split()  # fmt: skip
TOKENS = tuple(name for name in ml4m.TOKENS if not name.endswith("@448"))
TEXTS = ("caption", "det", "metadata", "color_palette", "human_poses_tokens", "sam_instance_tokens")
FOLDERS = ("rgb", "crop_settings", "caption", "det", "metadata", "color_palette", "human_poses", "sam_instance",
           "t5_caption", *TOKENS)  # fmt: skip
KINDS = ("images", "pixels")


def tars(folder: Path, num_shards: int, shard_size: int) -> dict[str, float]:
    """Write them, one folder a modality; kilobytes a sample of each."""
    totals: dict[str, float] = {}
    for number in range(num_shards):
        rng = np.random.default_rng(number)
        members: dict[str, list[Member]] = {}
        for i in range(shard_size):
            for name, member in _sample(rng, f"{number:04d}{i:06d}"):
                members.setdefault(name, []).append(member)
        for name, of_name in members.items():
            path = folder / name / f"shard-{number:05d}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(shards.build_tar(of_name))
            totals[name] = totals.get(name, 0.0) + path.stat().st_size
    return {name: total / num_shards / shard_size / 1e3 for name, total in totals.items()}


def pattern(folder: Path, num_shards: int) -> str:
    """ml-4m's path of the tars."""
    return f"{folder}/[{','.join(FOLDERS)}]/shard-{{00000..{num_shards - 1:05d}}}.tar"


def packed(source: str, out: Path, kind: str, text_tokenizer: Path) -> float:
    """Convert them, with images as they are stored or `pixels` of each crop; kilobytes in all."""
    dataset = Dataset(out)
    worker, tasks = convert.prepare(
        dataset, source, text_tokenizer=str(text_tokenizer), pixels=224, encoded=kind == "images"
    )
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    return sum(path.stat().st_size for path in out.rglob("*.arrow")) / 1e3


def _sample(rng: np.random.Generator, key: str) -> Iterable[tuple[str, Member]]:
    reader = ml4m.Reader()
    yield "rgb", Member(key, "jpg", _photograph(rng))
    yield "crop_settings", Member(key, "npy", codecs.encode_npy(crop_settings(rng, *SIZE, CROPS, 0.8)))
    for name in (*TEXTS, "t5_caption", *TOKENS):
        codec = modalities.load(name)
        member = Member(key, codec.suffix, codec.encode(_value(rng, name)))
        yield reader.folder(name), reader.form(name, CROPS)(member)


def _photograph(rng: np.random.Generator) -> bytes:
    """Smooth colours with grain and an edge or two: as many bytes as a photograph of this size."""
    coarse = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), SIZE[::-1], interpolation=cv2.INTER_CUBIC)
    fine = cv2.resize(rng.normal(0, 14, (96, 128, 3)), SIZE[::-1], interpolation=cv2.INTER_CUBIC)
    image = np.clip(coarse + fine, 0, 255).astype(np.uint8)
    for _ in range(6):
        corner, extent = rng.integers(0, 400, 2), rng.integers(20, 200, 2)
        colour = tuple(map(int, rng.integers(0, 256, 3)))
        cv2.ellipse(image, (corner.tolist(), extent.tolist(), float(rng.integers(180))), colour, -1)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=80)
    return stream.getvalue()


def _value(rng: np.random.Generator, name: str) -> Any:
    if name in TOKENS:
        vocab_size, num_tokens = ml4m.TOKENS[name]
        return rng.integers(0, vocab_size, (CROPS, num_tokens)).astype(np.uint16)
    codec = modalities.load(name)
    if name == "caption":
        return [" ".join(rng.choice(WORDS, 14))]
    if name == "t5_caption":
        emb = np.zeros((1, 77, 4096), np.float16)
        emb[:, :20] = rng.standard_normal((20, 4096), np.float32)
        return {"emb": emb, "mask_valid": np.arange(77)[None] < 20}
    if name == "det":
        return {"instances": [codec.example(rng, SIZE)["instances"][i % 2] for i in range(6)]}
    if name == "sam_instance_tokens":
        return {"side": 224, "crops": [[_instance(rng) for _ in range(20)] for _ in range(CROPS)]}
    if name == "human_poses_tokens":
        if rng.random() < 0.5:
            return []
        two = codec.example(rng, SIZE)
        params = {k: v[:1] for k, v in two["pred_smpl_params"].items()}
        return {**{k: v[:1] for k, v in two.items() if k != "pred_smpl_params"}, "pred_smpl_params": params}
    return codec.example(rng, SIZE)


def _instance(rng: np.random.Generator) -> dict[str, Any]:
    """The outline of an ellipse of a random place and size, of 21 corners."""
    centre, axes = rng.integers(20, 204, 2).tolist(), rng.integers(6, 60, 2).tolist()
    points = np.clip(cv2.ellipse2Poly(centre, axes, int(rng.integers(180)), 0, 360, 18), 0, 223)
    bbox = [*points.min(axis=0)[::-1].tolist(), *points.max(axis=0)[::-1].tolist()]
    return {"polygon": points.tolist(), "bbox": bbox, "tokens": rng.integers(0, 1024, 16).tolist()}
