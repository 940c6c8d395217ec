"""Judging a tokenizer: each metric against a closed form, and the command on a file and a dataset."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dataengine import local, weights
from dataengine.ingest import IngestSettings, prepare
from dataengine.manifest import Dataset
from dataengine.modalities import human_poses
from model import domains, perceptual
from model.tokenizers.vqvae import VQVAE, VQVAEConfig
from pipelines import commands, evaluate_tokenizer, reconstruction
from pipelines.reconstruction import constant, figures, neighbours_kept, usage

RNG = np.random.default_rng(0)
SIDE = 32


def test_rgb_psnr_is_of_each_image() -> None:
    true = RNG.integers(50, 200, (2, 16, 16, 3), dtype=np.uint8)
    made = [true[0] + 10, true[1] + 20]
    found = figures(domains.Rgb(), made, list(true))
    wanted = [10 * math.log10(255**2 / d**2) for d in (10, 20)]
    assert found["PSNR, dB"] == pytest.approx(sum(wanted) / 2, rel=1e-5)
    assert 0 < found["SSIM"] < 1
    assert ("LPIPS (vgg)" in found) == perceptual.lpips_weights("vgg").exists()


def test_depth_normals_and_classes() -> None:
    depth = [np.full((4, 4), 0.5, np.float32)] * 2
    off = [np.full((4, 4), 0.55, np.float32), np.full((4, 4), 0.75, np.float32)]
    assert figures(domains.Depth(), off, depth) == {"abs-rel": pytest.approx(0.3), "δ1": 0.5}
    standardised = domains.Depth(mapping="standardised")
    assert figures(standardised, off, depth) == {"standardised L1": pytest.approx(0.15)}
    up, aside = np.zeros((1, 2, 2, 3), np.float32), np.zeros((1, 2, 2, 3), np.float32)
    up[..., 2], aside[..., 0] = 1, 1
    assert figures(domains.Normal(), aside, up) == {"mean angle, degrees": pytest.approx(90)}
    classes = np.array([[[0, 0], [5, 255]]], np.uint8)
    assert figures(domains.Semseg(), classes, classes) == {"mIoU": 1.0, "pixel accuracy": 1.0}
    assert figures(domains.Semseg(), classes * 0, classes)["mIoU"] == pytest.approx(0.5 / 3)


def test_edges_and_masks() -> None:
    edges = np.zeros((1, 4, 4), np.uint8)
    edges[0, 0] = 255
    half = edges.copy()
    half[0, 0, 2:] = 0
    assert figures(domains.Edges(), half, edges) == {"F1": pytest.approx(2 / 3)}
    assert figures(domains.SamMask(), list(half > 0), list(edges > 0)) == {"mask IoU": pytest.approx(0.5)}
    # Half on is better than nothing on, which scores no F1 at all.
    both = [edges[0], edges[0][:, ::-1].copy(), np.zeros_like(edges[0])]
    np.testing.assert_array_equal(constant(domains.Edges(), both), edges[0])


def test_features_keep_their_neighbours_or_do_not() -> None:
    true = RNG.normal(size=(40, 3, 3, 8))
    assert neighbours_kept(true * 3, true) == 1.0
    assert neighbours_kept(RNG.normal(size=true.shape), true) < 0.5
    features = domains.Features(channels=8)
    found = figures(features, list(2 * true), list(true))
    assert found == {"cosine": pytest.approx(1.0), "kNN agreement": 1.0}
    assert figures(features, list(-true), list(true))["cosine"] == pytest.approx(-1.0)


def test_a_bent_knee_moves_the_joints_below_it() -> None:
    rest = np.tile(np.eye(3, dtype=np.float32), (23, 1, 1))
    bent = rest.copy()
    bent[3] = [[1, 0, 0], [0, 0, -1], [0, 1, 0]]  # the left knee, by a right angle
    found = figures(domains.Poses(), [bent.ravel()], [rest.ravel()])["mean joint error, m"]
    joints = [human_poses.joint_positions(np.concatenate([np.eye(3)[None], p])) for p in (bent, rest)]
    moved = np.linalg.norm(joints[0] - joints[1], axis=1)
    assert set(np.flatnonzero(moved > 1e-9)) == {7, 10}  # ankle and foot
    assert found == pytest.approx(moved.mean())
    assert constant(domains.Poses(), [rest.ravel()] * 2) == pytest.approx(rest.ravel(), abs=1e-6)


def test_usage_of_one_codebook_and_of_several() -> None:
    one = np.array([[[0, 1], [2, 3]]])
    found = usage(one, 8)
    assert (found.used, found.entries, found.share) == (4, 8, 0.5)
    assert found.perplexity == pytest.approx(4)
    heads = np.array([[[[0]], [[0]]], [[[0]], [[1]]]])
    found = usage(heads, 2, heads=2)
    assert (found.used, found.entries) == (3, 4)
    assert found.perplexity == pytest.approx((1 + 2) / 2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("judged") / "scenes"
    worker, tasks = prepare(Dataset(root), f"scenes:10?size={SIDE}&seed=3", IngestSettings(shard_size=8))
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda r: None)
    return root


def tokenizer(folder: Path, name: str, domain: Any, **changes: Any) -> Path:
    config = VQVAEConfig(
        domain=domain, image_size=64 if name == "sam_mask" else SIDE, patch_size=8,
        n_channels=domain.num_channels or 4, codebook_size=32,
        enc_type="vit_32x1x2_enc", dec_type="vit_32x1x2_dec", latent_dim=8, **changes,
    )  # fmt: skip
    path = folder / f"{name}.safetensors"
    VQVAE(config).save(path)
    return path


CASES = {
    "rgb": domains.Rgb(), "depth": domains.Depth(), "normal": domains.Normal(), "semseg": domains.Semseg(),
    "sam_edge": domains.Edges(), "sam_mask": domains.SamMask(),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_command_scores_and_shows_what_came_back(name: str, scenes: Path, tmp_path: Path) -> None:
    domain = CASES[name]
    changes = {"n_labels": domain.num_labels} if isinstance(domain, domains.Semseg) else {}
    file = tokenizer(tmp_path, name, domain, **changes)
    page = tmp_path / "page.html"
    run = CliRunner().invoke(
        commands.app, ["evaluate", "tokenizer", str(file), str(scenes), "--samples", "9", "--out", str(page), "--json"]
    )
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert (found["modality"], found["samples"], found["kind"]) == (name, 9, "VQVAE")
    tokens = 64 if name == "sam_mask" else 16
    assert (found["tokens"], found["bits"]) == (tokens, tokens * 5)
    assert 0 <= found["entropy_bits"] <= found["bits"]
    assert 0 < found["usage"] == found["codes_used"] / 32
    for score in found["scores"]:
        assert score["constant"] is not None
        if score["metric"] in ("mIoU", "F1", "mask IoU", "PSNR, dB", "SSIM"):
            assert score["larger_is_better"]
    text = page.read_text()
    assert text.count("data:image/") >= 9
    assert found["sha256"] in text
    assert not re.search(r'(src|href)="http', text)


def test_a_tokenizer_that_gives_everything_back_scores_best(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, held = tokenizer(tmp_path, "depth", domains.Depth()), []

    def encoded(model: VQVAE, values: list[np.ndarray]) -> np.ndarray:
        held.extend(values)
        return np.arange(len(values) * 16).reshape(-1, 4, 4) % 32

    monkeypatch.setattr(evaluate_tokenizer, "encoded", encoded)
    monkeypatch.setattr(evaluate_tokenizer, "decoded", lambda model, ids, steps: held)
    judged, _, pairs = evaluate_tokenizer.evaluate(str(file), str(scenes), samples=5)
    assert {s.metric: s.value for s in judged.scores} == {"abs-rel": 0.0, "δ1": 1.0}
    assert judged.scores[0].constant > 0.05
    assert judged.usage == 1.0
    assert judged.perplexity == pytest.approx(80 / np.exp(0) / 2.5, rel=0.05)
    assert [p.example.key for p in pairs] == list(Dataset(scenes).keys(0)[:5])


def test_what_cannot_judge_is_refused(scenes: Path, tmp_path: Path) -> None:
    file = tokenizer(tmp_path, "mystery", domains.Features(channels=3), patch_proj=False)
    with pytest.raises(ValueError, match="expected --modality"):
        evaluate_tokenizer.evaluate(str(file), str(scenes))
    with pytest.raises(ValueError, match="no labeler makes CLIP-B16"):
        evaluate_tokenizer.evaluate(str(file), str(scenes), modality="CLIP-B16", makers=[])
    with pytest.raises(ValueError, match="no valid human_poses"):
        evaluate_tokenizer.evaluate(
            str(tokenizer(tmp_path, "poses", domains.Rgb())), str(scenes), modality="human_poses"
        )


def test_random_weights_are_called_random(scenes: Path, tmp_path: Path) -> None:
    file = tokenizer(tmp_path, "depth", domains.Depth())
    weights.mark_random(file, seed=0)
    judged, domain, pairs = evaluate_tokenizer.evaluate(str(file), str(scenes), samples=3)
    assert judged.random
    from pipelines import tokenizer_page

    assert "random weights" in tokenizer_page.page(judged, domain, pairs).title
    assert any("too few" in note for note in replace(judged).notes)


def test_a_recipe_is_still_a_model() -> None:
    run = CliRunner().invoke(commands.app, ["evaluate", "no_such_recipe"])
    assert run.exit_code == 2
    assert "no_such_recipe" in run.output


def test_pictures_are_of_every_domain() -> None:
    rgb = RNG.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    rest = np.tile(np.eye(3, dtype=np.float32), (23, 1, 1)).ravel()
    for modality, domain, value in (
        ("human_poses", domains.Poses(), rest),
        ("DINOv2-B14", domains.Features(channels=8), RNG.normal(size=(4, 4, 8)).astype(np.float32)),
        ("DINOv2-B14-global", domains.Vector(channels=8), RNG.normal(size=8).astype(np.float32)),
        ("depth", domains.Depth(mapping="standardised"), RNG.normal(size=(SIDE, SIDE)).astype(np.float32)),
        ("sam_mask", domains.SamMask(), torch.eye(64).bool().numpy()),
    ):
        shown = reconstruction.picture(modality, domain, value, rgb)
        assert shown.dtype == np.uint8
        assert shown.shape[2] == 3
        assert shown.std() > 0
    near, far = np.full((2, SIDE, SIDE), 0.3, np.float32)
    near[0], far[0], far[1] = 0.1, 0.1, 0.9
    alone = reconstruction.picture("depth", domains.Depth(), near, rgb)
    beside = reconstruction.picture("depth", domains.Depth(), near, rgb, far)
    assert alone.shape == beside.shape
    # 0.3 is the far end of one map, and rather near in the range of both.
    assert (beside[-1, -1] == reconstruction.picture("depth", domains.Depth(), far, rgb, near)[-1, -1]).all()
    assert (alone[-1, -1] != beside[-1, -1]).any()
