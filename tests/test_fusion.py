"""Dense features on the way to their tokens: computed, never stored, and the same tokens as if they had been."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from dataengine import local, modalities
from dataengine.geometry import Crop, crops_of, cut
from dataengine.ingest import IngestSettings, prepare
from dataengine.labeler import Labeler, Loaded
from dataengine.manifest import Conflict, Dataset
from dataengine.plan import LabelPlan, plan_labels
from dataengine.sample import Sample
from dataengine.work import Task
from labelers.clip_b16 import ClipB16
from model.domains import Features
from model.tokenizers.vqvae import VQVAE, VQVAEConfig
from pipelines import commands, tokenize  # noqa: F401  the command registers itself
from pipelines.__main__ import app
from tests.fakes import tree

TOKENS = "tok_CLIP-B16@224"
SIZES = ((40, 40), (64, 64), (33, 33), (48, 48), (40, 40))
"""Of square images the centre crop is the whole."""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipB16:
    return ClipB16().tiny(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained tokenizer of 14 x 14 features."""
    folder = tmp_path_factory.mktemp("tokenizers")
    config = VQVAEConfig(
        domain=Features(channels=16), image_size=224, patch_size=16, patch_proj=False, n_channels=16,
        enc_type="vit_32x1x2_enc", dec_type="vit_32x1x2_dec", codebook_size=64, latent_dim=8, seed=3,
    )  # fmt: skip
    VQVAE(config).save(folder / "CLIP-B16.safetensors")
    return folder


def dataset_of(root: Path, sizes: Sequence[tuple[int, int]], num_crops: int = 1) -> Dataset:
    """Smooth random images of these (h, w), three a shard."""
    rng, folder = np.random.default_rng(0), root.with_name(root.name + "-images")
    folder.mkdir(parents=True)
    for i, (h, w) in enumerate(sizes):
        rgb = cv2.resize(rng.integers(0, 256, (6, 6, 3), np.uint8), (w, h), interpolation=cv2.INTER_CUBIC)
        assert cv2.imwrite(str(folder / f"{i}.png"), rgb)
    dataset = Dataset(root)
    worker, tasks = prepare(dataset, f"folder:{folder}", IngestSettings(shard_size=3, num_crops=num_crops))
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    return dataset


def make(dataset: Dataset, labelers: Sequence[Labeler]) -> LabelPlan:
    plan = plan_labels(dataset, [m for x in labelers for m in x.emits], labelers)
    local.run(plan.group(dataset.store.url), plan.tasks, workers=1, device="cpu", on_report=lambda report: None)
    return plan


def values(dataset: Dataset, column: str) -> list[Any]:
    codec = modalities.load(column)
    return [codec.decode(m.data) for shard in dataset.committed(column) for m in dataset.read(column, shard)]


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_only_tokens_reach_the_disk_and_they_are_those_of_stored_features(
    tmp_path: Path, clip: ClipB16, tokenizers: Path
) -> None:
    fused, stored = dataset_of(tmp_path / "fused", SIZES), dataset_of(tmp_path / "stored", SIZES)
    setting = f"clip_b16.checkpoint={clip.checkpoint}"
    run("tokenize", fused.store.url, "CLIP-B16", setting, "--tokenizers", tokenizers, "--runner", "local")
    assert not [path for path in tree(tmp_path / "fused") if "CLIP-B16" in path and TOKENS not in path]
    (own,) = [
        tokenize.Tokenize(modality="CLIP-B16", checkpoint=str(f), side=224) for f in tokenizers.glob("*.safetensors")
    ]
    make(stored, [clip, own])
    assert [v.shape for v in values(stored, "CLIP-B16")] == [(14, 14, 16)] * 5
    found = values(fused, TOKENS)
    assert [v.shape for v in found] == [(1, 196)] * 5
    assert len({int(i) for v in found for i in v.flat}) > 5
    for shard in (0, 1):
        assert fused.read(TOKENS, shard) == stored.read(TOKENS, shard)
    record = fused.commit(TOKENS, 0)
    assert record is not None
    assert record.provenance["random"]
    assert record.provenance["features"]["weights"]["sha256"] == clip.weights().sha256
    assert (record.provenance["vocab_size"], record.provenance["num_tokens"]) == (64, 196)


def test_each_crop_has_the_tokens_of_its_own_features(tmp_path: Path, clip: ClipB16, tokenizers: Path) -> None:
    dataset = dataset_of(tmp_path / "root", [(40, 60), (70, 50), (64, 64)], num_crops=3)
    make(dataset, tokenize.labelers(tokenizers, [], [clip]))
    network, own = clip.load("cpu"), VQVAE.load(tokenizers / "CLIP-B16.safetensors")
    rows = zip(*(values(dataset, m) for m in ("rgb", "crop_settings", TOKENS)), strict=True)
    for rgb, settings, ids in rows:
        assert len(settings) == len(ids) == 3
        for crop, found in zip(crops_of(settings), ids, strict=True):
            pixels = rgb[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
            pixels = pixels[:, ::-1] if crop.hflip else pixels
            (features,) = network([Sample("it", {"rgb": np.ascontiguousarray(pixels)})])
            # Batches of other sizes round differently, which may move a feature to the next code.
            assert np.mean(own.encode(features["CLIP-B16"]).reshape(-1) == found) > 0.98
    assert any(crop.hflip for s in values(dataset, "crop_settings") for crop in crops_of(s))


def test_stored_features_cannot_stand_for_a_part_of_their_image(
    tmp_path: Path, clip: ClipB16, tokenizers: Path
) -> None:
    dataset = dataset_of(tmp_path / "root", [(40, 60), (64, 64)])
    own = tokenize.Tokenize(modality="CLIP-B16", checkpoint=str(tokenizers / "CLIP-B16.safetensors"), side=224)
    make(dataset, [clip, own])
    record = dataset.commit(TOKENS, 0)
    assert record is not None
    (reason,) = record.invalid.values()
    assert "CLIP-B16 is of the whole image, and a crop is less" in reason


def test_what_a_dead_worker_had_done_is_taken_up_and_the_rest_computed(
    tmp_path: Path, clip: ClipB16, tokenizers: Path
) -> None:
    made = tokenize.labelers(tokenizers, [], [Small(inner=clip)])
    roots = [dataset_of(tmp_path / name, SIZES, num_crops=2) for name in ("whole", "cut")]
    make(roots[0], made)
    plan = plan_labels(roots[1], [TOKENS], made)
    work = plan.group(roots[1].store.url).start("cpu")
    first = next(task for task in plan.tasks if plan.num_rows[task.shard] == 3)
    assert work(Task(first.shard, first.specs, rows=(0, 2))).outcome == "done"
    assert roots[1].commit(TOKENS, first.shard) is None
    assert not [path for path in tree(tmp_path / "cut") if "CLIP-B16" in path and TOKENS not in path]
    calls = len(Small.seen)
    again = make(roots[1], made)
    assert again.num_cells == 2
    assert sum(Small.seen[calls:]) == 2 * (5 - 2)
    assert max(Small.seen) <= 2
    for shard in (0, 1):
        assert roots[0].commit(TOKENS, shard) == roots[1].commit(TOKENS, shard)
    assert plan_labels(roots[1], [TOKENS], made).tasks == ()


@dataclass(frozen=True, kw_only=True)
class Small(Labeler):
    """A feature labeler that notes how many images it is given at once."""

    inputs = ("rgb",)
    emits = ("CLIP-B16",)
    batch_size = 2

    inner: ClipB16

    seen = []  # noqa: RUF012  shared by all on purpose

    def identity(self) -> dict[str, Any]:
        return self.inner.identity()

    def weights(self) -> Any:
        return self.inner.weights()

    def load(self, device: str) -> Loaded:
        call = self.inner.load(device)

        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            self.seen.append(len(samples))
            return call(samples)

        return run


def test_other_features_are_other_tokens(tmp_path: Path, clip: ClipB16, tokenizers: Path) -> None:
    dataset = dataset_of(tmp_path / "root", SIZES[:2])
    make(dataset, tokenize.labelers(tokenizers, [], [clip]))
    native = tokenize.labelers(tokenizers, ["CLIP-B16"], [replace(clip, normalisation="native")])
    with pytest.raises(Conflict, match=f"{TOKENS}/shard-00000 was made with other settings"):
        plan_labels(dataset, [TOKENS], native)
    (version,) = tokenize.labelers(tokenizers, ["CLIP-B16@native"], [replace(clip, normalisation="native")])
    make(dataset, [version])
    assert not np.array_equal(values(dataset, TOKENS)[0], values(dataset, f"{TOKENS}@native")[0])


def test_features_that_are_wanted_are_stored_and_the_tokens_can_be_replayed(
    tmp_path: Path, clip: ClipB16, tokenizers: Path
) -> None:
    dataset = dataset_of(tmp_path / "root", SIZES[:2])
    setting = f"clip_b16.checkpoint={clip.checkpoint}"
    run("label", dataset.store.url, "CLIP-B16", setting, "--runner", "local")
    run("tokenize", dataset.store.url, "CLIP-B16", setting, "--tokenizers", tokenizers, "--runner", "local")
    assert set(dataset.modalities()) >= {"CLIP-B16", TOKENS}
    run("verify", dataset.store.url, setting, "--replay", "100%", "--tokenizers", tokenizers)


def test_only_labelers_of_the_image_can_be_fused(tokenizers: Path, clip: ClipB16) -> None:
    with pytest.raises(ValueError, match=r"expected a labeler of DINOv2-B14 from rgb, clip_b16 makes"):
        tokenize.TokenizeFeatures(modality="DINOv2-B14", checkpoint="x", side=224, features=clip)


def test_cutting_keeps_the_pixels() -> None:
    rgb = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(cut(rgb, Crop(1, 0, 2, 3)), rgb[1:3, :3])
    assert np.array_equal(cut(rgb, Crop(1, 0, 2, 3, True)), rgb[1:3, 2::-1])
    padded = cut(rgb, Crop(3, 3, 2, 2))
    assert np.array_equal(padded[0, 0], rgb[3, 3])
    assert padded.sum() == rgb[3, 3].sum()
