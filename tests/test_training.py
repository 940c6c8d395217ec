"""From labels to a model: tokens of the right tokenizer, training that resumes, generation and scores that are real."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dataengine import local
from dataengine.ingest import IngestSettings, prepare
from dataengine.manifest import Dataset
from dataengine.packed import Packed
from dataengine.plan import plan_labels
from model import domains
from model.fourm import FourMConfig
from model.generate import Step
from model.loop import LoopConfig
from model.masking import MaskingConfig, MixtureComponent
from model.tokenizers import text
from model.tokenizers.vqvae import VQVAEConfig
from pipelines import evaluate, generate, pack, tokenize, train, train_tokenizer
from tests.fakes import Inverted, Threshold

SIDE = 32


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four scenes, tokenised and packed, with a depth and a semseg tokenizer trained for a few steps."""
    base = tmp_path_factory.mktemp("training")
    dataset, heldout = Dataset(base / "scenes"), Dataset(base / "heldout")
    for root, corpus in ((dataset, f"scenes:24?size={SIDE}&seed=3"), (heldout, f"scenes:6?size={SIDE}&seed=500")):
        worker, tasks = prepare(root, corpus, IngestSettings(shard_size=10, num_crops=2))
        local.run(worker, tasks, workers=1, device="cpu", on_report=lambda r: None)
    for modality, domain, channels, labels in (
        ("depth", domains.Depth(), 1, None),
        ("semseg", domains.Semseg(), 4, domains.Semseg().num_labels),
    ):
        recipe = train_tokenizer.TrainTokenizer(
            roots=(str(base / "scenes"),), modality=modality, batch_size=4, out=str(base / "tokenizers"),
            model=VQVAEConfig(
                domain=domain, image_size=SIDE, patch_size=8, n_channels=channels, n_labels=labels,
                enc_type="vit_32x1x2_enc", dec_type="vit_32x1x2_dec", codebook_size=32, latent_dim=8,
            ),
            loop=LoopConfig(
                steps=12, lr=1e-3, warmup_steps=2, log_every=4, checkpoint_every=6, threads=1, progress=False
            ),
        )  # fmt: skip
        assert train_tokenizer.train(recipe).finished
    text.train(["a red ball on grass", "two people on sand"], 4400, base / "tokenizers" / "text.json")
    made = tokenize.labelers(base / "tokenizers", [])
    for root in (dataset, heldout):
        run(root, made)
        packed(root, base)
    return base


def run(dataset: Dataset, made: Sequence[tokenize.Tokenize]) -> None:
    plan = plan_labels(dataset, [m for t in made for m in t.emits], made)
    local.run(plan.group(dataset.store.url), plan.tasks, workers=1, device="cpu", on_report=lambda r: None)


def packed(dataset: Dataset, base: Path) -> list[str]:
    worker, tasks = pack.prepare(dataset, str(base / "tokenizers" / "text.json"), SIDE)
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda r: None)
    return [c.name for c in worker.columns]


def recipe(base: Path, out: Path, steps: int = 16) -> train.TrainFourM:
    inputs = (f"rgb@{SIDE}", f"tok_depth@{SIDE}", f"tok_semseg@{SIDE}", "caption", "det")
    return train.TrainFourM(
        data=(train.Source(root=str(base / "scenes")),),
        inputs=inputs, outputs=inputs[1:], batch_size=4, out=str(out), patch_size=8, per_token=True,
        model=replace(FourMConfig.preset("nano"), dim=32, encoder_depth=1, decoder_depth=1, num_heads=2),
        masking=MaskingConfig(
            components=(
                MixtureComponent(input_alphas=dict.fromkeys(inputs, 1.0), target_alphas=dict.fromkeys(inputs[1:], 1.0)),
            ),
            input_tokens=(16, 16), target_tokens=(16, 16),
        ),
        loop=LoopConfig(
            steps=steps, lr=1e-2, warmup_steps=2, log_every=1, checkpoint_every=8, threads=1, progress=False
        ),
    )  # fmt: skip


def test_tokens_are_those_of_the_tokenizer_under_every_crop(scenes: Path) -> None:
    dataset = Dataset(scenes / "scenes")
    record = dataset.commit(f"tok_depth@{SIDE}", 0)
    assert record is not None
    assert record.provenance["vocab_size"] == 32
    shard = Packed(scenes / "scenes" / "tokens" / "shard-00000.arrow")
    assert shard.columns[f"tok_depth@{SIDE}"].tokenizer == record.provenance["weights"]["sha256"]
    samples = evaluate.Samples(str(scenes / "scenes"))
    own = evaluate.Tokenizers(str(scenes / "tokenizers")).maps["depth"]
    rows = samples.rows([f"tok_depth@{SIDE}"], 3)
    truth = samples.truth("depth", SIDE, 3)
    for row, depth in zip(rows, truth, strict=True):
        assert np.array_equal(row[f"tok_depth@{SIDE}"], own.encode(depth).reshape(-1))
    rng = np.random.default_rng(0)
    rows_of_crops = [shard.row(0, rng, [f"tok_depth@{SIDE}"], crop=c)[f"tok_depth@{SIDE}"] for c in (0, 1)]
    assert not np.array_equal(*rows_of_crops)


def test_a_run_that_was_cut_ends_with_the_losses_of_one_that_was_not(scenes: Path, tmp_path: Path) -> None:
    whole = train.train(recipe(scenes, tmp_path / "whole"))
    half = recipe(scenes, tmp_path / "half")
    first = train.train(replace(half, loop=replace(half.loop, max_seconds=1e-9)))
    assert not first.finished
    second = train.train(half)
    assert (second.finished, second.metrics) == (True, whole.metrics)

    def losses(name: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    assert losses("half") == losses("whole")
    assert len(losses("whole")) == 16
    assert losses("whole")[-1] < losses("whole")[0]
    assert list((tmp_path / "whole" / "tensorboard").iterdir())


def test_generation_and_scores_run_from_the_saved_model(scenes: Path, tmp_path: Path) -> None:
    train.train(recipe(scenes, tmp_path / "fm", steps=9))
    steps = tuple(
        Step(target=f"tok_{m}@{SIDE}", scheme="roar", num_steps=2, temperature=0.0) for m in ("depth", "semseg")
    )
    common = {
        "model": str(tmp_path / "fm" / "model"), "tokenizers": str(scenes / "tokenizers"),
        "root": str(scenes / "heldout"), "given": (f"rgb@{SIDE}",), "steps": steps, "samples": 6, "side": SIDE,
    }  # fmt: skip
    scores, maps = evaluate.evaluate(evaluate.Evaluate(**common, train_root=str(scenes / "scenes")))
    assert [s.modality for s in scores] == ["depth", "semseg"]
    assert all(s.num_samples == 6 and s.model > 0 and s.constant > 0 for s in scores)
    with pytest.raises(ValueError, match=r"24 samples of .* are also in"):
        evaluate.evaluate(
            evaluate.Evaluate(**{**common, "root": str(scenes / "scenes")}, train_root=str(scenes / "scenes"))
        )
    assert all(len(maps[m]) == 6 and maps[m][0].shape == (SIDE, SIDE) for m in ("depth", "semseg"))
    chain = (*steps, Step(target="caption", scheme="autoregressive", temperature=0.5, max_tokens=8))
    page = generate.write_page(generate.Generate(**{**common, "steps": chain}, out=str(tmp_path / "page.html")))
    assert page.read_text().count("data:image/") >= 6 * 5


def test_scores_are_zero_error_for_the_truth_and_known_for_known_errors() -> None:
    depth = np.full((2, 4, 4), 0.5, np.float32)
    assert evaluate.abs_rel(depth, depth) == 0
    assert evaluate.abs_rel(depth * 1.5, depth) == pytest.approx(0.5)
    normal = np.broadcast_to(np.array([0, 0, 1], np.float32), (2, 4, 4, 3))
    assert evaluate.mean_angle(normal, normal) == pytest.approx(0, abs=1e-3)
    assert evaluate.mean_angle(np.roll(normal, 1, axis=-1), normal) == pytest.approx(90)
    truth = np.array([[[0, 0, 7, 7]]], np.uint8)
    assert evaluate.mean_iou(truth, truth) == 1
    assert evaluate.mean_iou(np.array([[[0, 0, 0, 255]]], np.uint8), truth) == pytest.approx((2 / 3 + 0) / 2)


def test_random_labels_are_never_packed_or_trained_on(tmp_path: Path, scenes: Path) -> None:
    shutil.copytree(scenes / "scenes", tmp_path / "scenes")
    dataset = Dataset(tmp_path / "scenes")
    for path in (tmp_path / "scenes/commits/depth").iterdir():
        record = json.loads(path.read_text())
        record["provenance"]["random"] = True
        path.write_text(json.dumps(record))
    for shard in dataset.committed(f"tok_depth@{SIDE}"):
        dataset.uncommit(f"tok_depth@{SIDE}", shard)
    run(dataset, tokenize.labelers(scenes / "tokenizers", ["depth"]))
    assert pack.is_random(dataset, f"tok_depth@{SIDE}")
    assert f"tok_depth@{SIDE}" not in packed(dataset, scenes)
    assert f"tok_semseg@{SIDE}" in packed(dataset, scenes)
    mine = train_tokenizer.TrainTokenizer(
        roots=(str(tmp_path / "scenes"),), modality="depth", batch_size=2, out=str(tmp_path / "t"),
        model=VQVAEConfig(domain=domains.Depth(), image_size=SIDE, patch_size=8, n_channels=1),
        loop=LoopConfig(steps=1, lr=1e-3),
    )  # fmt: skip
    with pytest.raises(ValueError, match="random weights: nothing is trained on it"):
        train_tokenizer.train(mine)


def test_two_tokenizers_under_one_name_are_refused(tmp_path: Path, scenes: Path) -> None:
    shutil.copytree(scenes, tmp_path / "other")
    (tmp_path / "other/tokenizers/text.json").unlink()
    text.train(["another text", "of other words"], 4400, tmp_path / "other/tokenizers/text.json")
    packed(Dataset(tmp_path / "other/scenes"), tmp_path / "other")
    both = recipe(scenes, tmp_path / "fm")
    sources = (*both.data, train.Source(root=str(tmp_path / "other/scenes")))
    with pytest.raises(ValueError, match="made by another tokenizer"):
        train.train(replace(both, data=sources))


def test_an_input_labeler_is_not_mistaken_for_a_tokenizer() -> None:
    assert Threshold().facts() == Inverted().facts() == {}
    assert torch.get_num_threads() >= 1
