"""A dataset that holds all nineteen inputs of 4M-21, every value random: what ml-4m's tars are exported from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataengine import local, modalities, shards
from dataengine.ingest import IngestSettings, prepare
from dataengine.manifest import Commit, Dataset, tar_path
from dataengine.ml4m import TOKENS
from dataengine.shards import Member
from tests.fakes import write_images

TOKEN_COLUMNS = tuple(name for name in TOKENS if not name.endswith("@448"))
TEXT_COLUMNS = ("det", "metadata", "color_palette", "human_poses_tokens", "sam_instance_tokens")
INPUTS = (
    "rgb", "caption", "det", "t5_caption", "metadata", "human_poses", "color_palette", "sam_instance", *TOKEN_COLUMNS,
)  # fmt: skip
"""ml-4m's names of the folders."""

SHA = {"text": "b" * 64, "tokenizer": "c" * 64, "t5": "d" * 64}


def made(folder: Path, *, count: int = 6, shard_size: int = 3, num_crops: int = 3, width: int = 16) -> Dataset:
    """`count` images, each with all inputs; `width` is that of the embeddings of its one caption."""
    images = write_images(folder / "images", count)
    dataset = Dataset(folder / "root")
    worker, tasks = prepare(
        dataset, f"folder:{images}", IngestSettings(shard_size=shard_size, num_crops=num_crops, min_crop_scale=0.5)
    )
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    for number in dataset.committed("rgb"):
        keys = dataset.keys(number)
        sizes = [modalities.load("rgb").decode(m.data).shape[:2] for m in dataset.read("rgb", number)]
        rng = np.random.default_rng(number)
        for name in TOKEN_COLUMNS:
            vocab_size, num_tokens = TOKENS[name]
            facts = {"vocab_size": vocab_size, "num_tokens": num_tokens, "weights": {"sha256": SHA["tokenizer"]}}
            ids = [rng.integers(0, vocab_size, (num_crops, num_tokens)).astype(np.uint16) for _ in keys]
            publish(dataset, name, number, ids, facts)
        for name in TEXT_COLUMNS:
            codec = modalities.load(name)
            values = [codec.example(rng, size) for size in sizes]
            if name == "sam_instance_tokens":
                values = [{"side": 224, "crops": [codec.example(rng, (1, 1))["crops"][0]] * num_crops} for _ in keys]
            publish(dataset, name, number, values, {"weights": {"sha256": SHA["tokenizer"]}})
        emb = [rng.standard_normal((1, 2 + i, width)).astype(np.float16) for i in range(len(keys))]
        values = [{"emb": e, "mask_valid": np.ones(e.shape[:2], np.bool_)} for e in emb]
        publish(dataset, "t5_caption", number, values, {"weights": {"sha256": SHA["t5"]}, "inputs": ["caption"]})
    return dataset


def publish(
    dataset: Dataset, column: str, shard: int, values: Sequence[Any], provenance: dict[str, Any], invalid: str = ""
) -> None:
    """Commit a column of a shard."""
    codec, keys = modalities.load(column), dataset.keys(shard)
    data = shards.build_tar(Member(k, codec.suffix, codec.encode(v)) for k, v in zip(keys, values, strict=True))
    record = Commit(
        modality=column,
        shard=shard,
        spec="s",
        file=tar_path(column, shard),
        num_bytes=len(data),
        sha256=shards.sha256(data),
        num_samples=len(keys),
        keys_sha256=shards.keys_sha256(keys),
        invalid={invalid: "no label"} if invalid else {},
        provenance=provenance,
    )
    dataset.publish(record, data)
