"""Training tokenizers from raw labels: what is drawn, what is frozen, what is logged, and that a cut run goes on."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataengine import local, modalities, plugins, weights
from dataengine.geometry import Crop, crops_of
from dataengine.ingest import IngestSettings, prepare
from dataengine.labeler import Labeler, Loaded
from dataengine.manifest import Dataset
from dataengine.modalities import human_poses
from dataengine.sample import Sample
from dataengine.weights import Weights
from model import domains, tokenizers
from model.loop import LoopConfig
from model.tokenizers._published import published
from model.tokenizers.divae import DiVAEConfig
from model.tokenizers.vqvae import VQVAEConfig
from pipelines import config, train_tokenizer
from pipelines.label_batches import Draw, LabelBatches, Maps, source_of
from pipelines.recipes._hog import Hog
from pipelines.tokenizer_loss import AdversarialLoss, PerceptualLoss
from pipelines.train_tokenizer import TrainTokenizer, sides, tokenizer_file, train

SIDE = 32
SMALL: dict[str, Any] = {
    "image_size": SIDE, "patch_size": 8, "enc_type": "vit_32x1x2_enc", "codebook_size": 32, "latent_dim": 8
}  # fmt: skip
VIT = VQVAEConfig(domain=domains.Depth(), n_channels=1, dec_type="vit_32x1x2_dec", **SMALL)
LOOP = LoopConfig(
    steps=8, lr=1e-3, warmup_steps=2, log_every=1, evaluate_every=4, pictures_every=8, checkpoint_every=4, threads=1,
    progress=False, ema_decay=0.9,
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty training scenes in three shards of two crops, and six held out."""
    base = tmp_path_factory.mktemp("tokenizers")
    for name, corpus in (("scenes", f"scenes:20?size={SIDE}&seed=3"), ("heldout", f"scenes:6?size={SIDE}&seed=500")):
        worker, tasks = prepare(Dataset(base / name), corpus, IngestSettings(shard_size=8, num_crops=2))
        local.run(worker, tasks, workers=1, device="cpu", on_report=lambda r: None)
    return base


def recipe(scenes: Path, out: Path, **changes: Any) -> TrainTokenizer:
    run = TrainTokenizer(
        roots=(str(scenes / "scenes"),), modality="depth", model=VIT, loop=LOOP, batch_size=4, out=str(out)
    )
    return replace(run, **changes)


def lines(run: TrainTokenizer) -> list[dict[str, float]]:
    path = Path(run.out) / run.modality / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def batches(scenes: Path, modality: str = "depth", **changes: Any) -> LabelBatches:
    datasets = (Dataset(scenes / "scenes"),)
    made = LabelBatches(
        datasets=datasets, source=source_of(modality, datasets, None), domain=domains.Depth(), sides=(SIDE,),
        batch_size=4, seed=0,
    )  # fmt: skip
    return replace(made, **changes)


def test_every_sample_is_seen_in_every_epoch_and_batches_are_full(scenes: Path) -> None:
    made = batches(scenes, domain=domains.Depth(), batch_size=5)
    stored = np.stack([e.value for e in batches(scenes).examples(100)])
    for epoch in range(2):
        seen = set()
        # Shards of 8, 8 and 4 scenes: two, two and one batches.
        for number in range(5 * epoch, 5 * epoch + 5):
            drawn = made._drawn(number, SIDE)
            assert len(drawn) == 5
            for value in drawn:
                seen.add(int(np.abs(stored - value).mean(axis=(1, 2)).argmin()))
        assert len(seen) > 14  # a random crop may look like another scene's centre


def test_a_batch_depends_on_its_number_alone(scenes: Path) -> None:
    once, again = batches(scenes, sides=(16, 24, 32)), batches(scenes, sides=(16, 24, 32), cached_bytes=0)
    expected = [once(n) for n in range(8)]
    for n in (5, 0, 7, 2):
        torch.testing.assert_close(again(n), expected[n], rtol=0, atol=0)
    assert len(again._cache) == 1
    assert {batch.shape[-1] for batch in expected} == {16, 24, 32}
    together = batches(scenes, sides=(16, 24, 32), batches_per_step=4)
    for step in range(4):
        assert len({together(n).shape[-1] for n in range(4 * step, 4 * step + 4)}) == 1


def test_crops_follow_the_geometry_of_the_modality(scenes: Path) -> None:
    dataset, source = Dataset(scenes / "scenes"), Maps("normal")
    cells = {m: dataset.read(m, 0)[0].data for m in source.columns}
    whole = modalities.load("normal").decode(cells["normal"])
    rows = crops_of(modalities.load("crop_settings").decode(cells["crop_settings"]))
    np.testing.assert_allclose(source.values(cells, Draw(None), SIDE)[0], whole, atol=1e-6)
    mirrored = 0
    for seed in range(6):
        stored = source.values(cells, Draw(np.random.default_rng(seed)), SIDE)[0]
        known = [modalities.load("normal").crop(whole, row, (SIDE, SIDE), SIDE) for row in rows]
        assert any(np.array_equal(stored, one) for one in known)
        draw = Draw(np.random.default_rng(seed), 1.0)
        crop = Draw(np.random.default_rng(seed), 1.0).crop(cells["crop_settings"], lambda: (SIDE, SIDE))
        value = source.values(cells, draw, SIDE)[0]
        if crop == Crop(0, 0, SIDE, SIDE, True):
            mirrored += 1
            np.testing.assert_allclose(value, whole[:, ::-1] * [-1, 1, 1], atol=1e-6)
    assert mirrored


def test_a_run_that_was_cut_goes_on_with_the_same_losses(scenes: Path, tmp_path: Path) -> None:
    heldout = (str(scenes / "heldout"),)
    common = {"heldout": heldout, "min_crop_scale": 0.8, "smallest_side": 16, "side_step": 8, "dead_code_share": 8.0}
    whole = recipe(scenes, tmp_path / "whole", **common)
    assert train(whole).finished
    half = recipe(scenes, tmp_path / "half", **common)
    shutil.copytree(tmp_path / "whole" / "depth", tmp_path / "half" / "depth")
    shutil.rmtree(tmp_path / "half" / "depth" / "checkpoint" / "step-8")
    assert train(half).finished
    ours, theirs = lines(half), lines(whole)
    assert len(ours) == 8
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(
            abs(a[k] - b[k]) <= 1e-6 * max(1.0, abs(b[k])) for k in a if k != "seconds" and not k.startswith("run/")
        )
    assert tokenizer_file(half).read_bytes() == tokenizer_file(whole).read_bytes()
    assert {"heldout/usage", "heldout/dead", "heldout/perplexity", "heldout/abs-rel"} <= theirs[3].keys()
    tokenizer = tokenizers.read(tokenizer_file(whole))
    assert tokenizer.config.threshold_ema_dead_code == pytest.approx(4 * 3**2 / 32 / 8)
    events = list((tmp_path / "whole" / "depth" / "tensorboard").glob("events*"))
    assert any(b"heldout/depth" in event.read_bytes() for event in events)


def test_sides_must_fit_the_patches(scenes: Path, tmp_path: Path) -> None:
    assert sides(recipe(scenes, tmp_path, smallest_side=16, side_step=16)) == (16, 32)
    for smallest, step in ((16, 4), (24, 16), (64, 8)):
        with pytest.raises(ValueError, match="expected multiples of the patch size"):
            sides(recipe(scenes, tmp_path, smallest_side=smallest, side_step=step))


def test_a_decoder_is_trained_on_an_encoder_that_stays_as_it_was(scenes: Path, tmp_path: Path) -> None:
    first = recipe(scenes, tmp_path / "first")
    train(first)
    encoder = tokenizers.read(tokenizer_file(first))
    settings = DiVAEConfig(
        domain=domains.Depth(), n_channels=1, dec_type="unet_patched_32x1", prediction_type="sample",
        beta_schedule="linear", freeze_enc=True, **SMALL,
    )  # fmt: skip
    loop = replace(LOOP, steps=2, warmup_steps=0)
    second = recipe(scenes, tmp_path / "second", model=settings, loop=loop, heldout=(str(scenes / "heldout"),))
    with pytest.raises(ValueError, match="a random encoder would stay random"):
        train(second)
    second = replace(second, init_encoder_from=str(tokenizer_file(first)))
    assert train(second).finished
    trained = tokenizers.read(tokenizer_file(second)).state_dict()
    for name, value in encoder.state_dict().items():
        if not name.startswith(("decoder.", "post_quant_proj.")):
            assert torch.equal(trained[name], value), name
    assert "heldout/abs-rel" in lines(second)[-1]


def test_a_run_starts_from_a_tokenizer_of_another_size(scenes: Path, tmp_path: Path) -> None:
    first = recipe(scenes, tmp_path / "first")
    train(first)
    larger = recipe(
        scenes, tmp_path / "larger", init_from=str(tokenizer_file(first)), model=replace(VIT, image_size=64)
    )
    found, before = train_tokenizer.made(larger).state_dict(), tokenizers.read(tokenizer_file(first)).state_dict()
    assert found["encoder.pos_emb"].shape[-1] == 8
    for name, value in before.items():
        if not name.endswith("pos_emb"):
            assert torch.equal(found[name], value), name
    other = replace(larger, model=replace(VIT, codebook_size=64))
    with pytest.raises(ValueError, match=r"does not fit the model.*quantize"):
        train_tokenizer.made(other)


@pytest.mark.parametrize("modality", ["sam_mask"])
def test_masks_of_things_are_drawn_in_their_boxes(scenes: Path, tmp_path: Path, modality: str) -> None:
    settings = replace(VIT, domain=domains.SamMask(), image_size=64, patch_size=16)
    run = recipe(scenes, tmp_path, modality=modality, model=settings, loop=replace(LOOP, steps=3))
    run = replace(run, heldout=(str(scenes / "heldout"),))
    assert train(run).finished
    assert 0 <= lines(run)[-1]["heldout/mask IoU"] <= 1
    made = batches(scenes, modality, domain=domains.SamMask(), sides=(64,))(0)
    assert made.shape == (4, 1, 64, 64)
    # A thing touches all four sides of its box.
    assert made[:, 0].amax(dim=(1,)).sum() > 0
    assert all(m[0].any() and m[:, 0].any() for m in made[:, 0].bool())


@pytest.mark.parametrize("kind", ["perceptual", "adversarial", "both"])
def test_losses_on_more_than_pixels(scenes: Path, tmp_path: Path, kind: str) -> None:
    timm = pytest.importorskip("timm")
    random = tmp_path / "random.safetensors"
    network = "vit_tiny_patch16_224"
    torch.save(timm.create_model(network).state_dict(), random.with_suffix(".pth"))
    seeing = PerceptualLoss(
        network=network, layers=("blocks.1", "blocks.3"), checkpoint=str(random.with_suffix(".pth"))
    )
    against = AdversarialLoss(start=1, width=8, layers=2)
    run = recipe(
        scenes, tmp_path, modality="rgb", loop=replace(LOOP, steps=2, warmup_steps=0), batch_size=2,
        model=replace(VIT, domain=domains.Rgb(), n_channels=3),
        perceptual=None if kind == "adversarial" else seeing, adversarial=None if kind == "perceptual" else against,
    )  # fmt: skip
    assert train(run).finished
    last = lines(run)[-1]
    assert ("perceptual" in last) == (kind != "adversarial")
    assert ("critic" in last) == (kind != "perceptual")
    tokenizers.read(tokenizer_file(run))  # neither a critic nor a perceiving network is in the file
    with pytest.raises(ValueError, match="expected of a VQVAE"):
        train(replace(run, out=str(tmp_path / "other"), model=DiVAEConfig(
            domain=domains.Rgb(), dec_type="unet_patched_32x1", **SMALL
        )))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shades(Labeler):
    """A teacher: the mean colour of each patch of 8 pixels of a crop."""

    inputs = ("rgb",)
    emits = ("CLIP-B16",)

    side: int = SIDE
    file: str = ""

    def weights(self) -> Weights | None:
        return weights.describe(self.file, licence="none") if self.file else None

    def load(self, device: str) -> Loaded:
        codec = modalities.load("rgb")

        def label(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            out = []
            for s in samples:
                h, w = s.rgb.shape[:2]
                pixels = codec.crop(s.rgb, Crop(0, 0, h, w), (h, w), self.side) / 255
                means = pixels.reshape(self.side // 8, 8, self.side // 8, 8, 3).mean(axis=(1, 3))
                out.append({"CLIP-B16": means.astype(np.float16)})
            return out

        return label


def test_features_are_made_of_each_crop_at_each_resolution(scenes: Path, tmp_path: Path) -> None:
    settings = replace(VIT, domain=domains.Features(channels=3), n_channels=3, patch_proj=False)
    run = recipe(
        scenes, tmp_path, modality="CLIP-B16", model=settings, teacher=Shades(), smallest_side=16, side_step=16,
        heldout=(str(scenes / "heldout"),),
    )  # fmt: skip
    assert train(run).finished
    assert {"heldout/cosine", "heldout/kNN agreement"} <= lines(run)[-1].keys()
    random = tmp_path / "random.pth"
    torch.save({}, random)
    weights.mark_random(random, seed=0)
    with pytest.raises(ValueError, match="random weights: nothing is trained"):
        train(replace(run, out=str(tmp_path / "other"), teacher=Shades(file=str(random))))


PUBLISHED = {
    "rgb": "rgb_16k", "depth": "depth_8k", "normal": "normal_8k", "canny_edge": "edge_8k", "sam_edge": "edge_8k",
    "semseg": "semseg_4k", "clip_b16": "CLIP-B16_8k", "dinov2_b14": "DINOv2-B14_8k",
    "imagebind_h14": "ImageBind-H14_8k", "dinov2_b14_global": "DINOv2-B14-global_8k_16_224",
    "imagebind_h14_global": "ImageBind-H14-global_8k_16_224", "human_poses": "human-poses_1k_8",
    "sam_mask": "sam-instance_1k_64", "rgb_1k": "rgb_1k",
}  # fmt: skip


def _published_recipes() -> list[tuple[str, str, str]]:
    found = []
    for name, file in PUBLISHED.items():
        module = importlib.import_module(f"pipelines.recipes.ml4m_{name}")
        found.append((name, "recipe", f"{file}_224" if hasattr(module, "adapted") else file))
        if hasattr(module, "adapted"):
            found.append((name, "adapted", f"{file}_224-{512 if file == 'edge_8k' else 448}"))
    return found


@pytest.mark.parametrize(("name", "stage", "file"), _published_recipes())
def test_recipes_are_of_the_published_settings_and_build(name: str, stage: str, file: str) -> None:
    run = getattr(importlib.import_module(f"pipelines.recipes.ml4m_{name}"), stage)()
    assert run.model == published()[file]
    images = run.batch_size * run.loop.batches_per_step
    assert run.loop.betas == (0.9, 0.99)
    assert run.loop.lr * 256 / images in (pytest.approx(1e-4), pytest.approx(5e-5))
    assert 0 <= run.loop.warmup_steps < run.loop.steps
    assert (run.dead_code_share == 32.0) == (run.model.quant_type == "lucid")
    assert max(sides(run)) == run.model.image_size
    assert len(sides(run)) == (1 if stage == "recipe" else (run.model.image_size - 224) // run.side_step + 1)
    assert modalities.load(run.modality).name == run.modality
    assert run.teacher is None or run.modality in run.teacher.emits
    with torch.device("meta"):
        network = train_tokenizer.class_of(run.model)(run.model)
    assert network.quant_proj.weight.is_meta
    assert sum(p.numel() for p in network.parameters()) > 5e7


def test_there_is_a_recipe_for_each_of_the_thirteen_tokenizers() -> None:
    names = {name.removeprefix("ml4m_") for name in plugins.names("pipelines.recipes") if name.startswith("ml4m_")}
    assert names == {*PUBLISHED, "rgb_uvit"}
    assert len({config.load(f"ml4m_{name}", TrainTokenizer).modality for name in names}) == 13


def test_poses_of_persons_are_drawn_one_by_one_and_mirrored_by_a_coin(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "figures")
    worker, tasks = prepare(dataset, "figures:9?size=32", IngestSettings(shard_size=5))
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda r: None)
    settings = VQVAEConfig(
        domain=domains.Poses(), n_channels=207, enc_type="BottleneckMLP/B_1-Wi_32", dec_type="BottleneckMLP/B_1-Wi_32",
        quant_type="memcodes", codebook_size=16, num_codebooks=4, latent_dim=32, image_size=SIDE, patch_size=8,
    )  # fmt: skip
    root = str(dataset.store.url)
    run = TrainTokenizer(
        roots=(root,),
        heldout=(root,),
        modality="human_poses",
        model=settings,
        loop=LOOP,
        batch_size=6,
        out=str(tmp_path),
    )
    assert train(run).finished
    assert {"heldout/mean joint error, m", "heldout/perplexity"} <= lines(run)[-1].keys()
    made = LabelBatches(
        datasets=(dataset,), source=source_of("human_poses", (dataset,), None), domain=domains.Poses(), sides=(SIDE,),
        batch_size=6, seed=0,
    )  # fmt: skip
    stored = np.stack([e.value for e in made.examples()]).reshape(-1, 23, 3, 3)
    both = {False: stored, True: human_poses.mirrored(stored)}
    seen = {False: 0, True: 0}
    for pose in np.concatenate([made(n)[:, :, 0, 0].numpy() for n in range(4)]).reshape(-1, 23, 3, 3):
        distance = {flip: np.abs(known - pose).max(axis=(1, 2, 3)).min() for flip, known in both.items()}
        assert min(distance.values()) < 1e-6
        seen[distance[True] < distance[False]] += 1
    assert min(seen.values()) > 3


def test_the_small_recipes_are_consistent() -> None:
    names = [n for n in plugins.names("pipelines.recipes") if n.startswith(("scenes_", "figures_"))]
    runs = [run for run in (config.load(name, object) for name in names) if isinstance(run, TrainTokenizer)]
    assert len(runs) == 10
    for run in runs:
        network = train_tokenizer.class_of(run.model)(run.model)
        assert sum(p.numel() for p in network.parameters()) < 4e6
        assert run.heldout
        assert not set(run.heldout) & set(run.roots)
        resolved = config.resolved(run)
        assert resolved["modality"] == run.modality


def test_gradients_histograms_lie_where_the_edges_are() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 36:] = 255  # one upright edge, between the fourth and the fifth column of cells
    (made,) = Hog().load("cpu")([Sample("a", {"rgb": image})])
    grid = made["HOG"].astype(np.float32)
    assert grid.shape == (8, 8, 36)
    strength = grid.sum(axis=2)
    assert strength[:, 3:6].min() > 0
    assert strength[:, [0, 1, 7]].max() < 1e-3
    assert made["HOG-global"].shape == (144,)
    (turned,) = Hog().load("cpu")([Sample("a", {"rgb": image.swapaxes(0, 1)})])
    np.testing.assert_array_equal(turned["HOG"].astype(np.float32).sum(axis=2) > 1e-3, strength.T > 1e-3)
