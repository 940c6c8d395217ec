"""The any-to-any table: on a model with random weights, and what it takes for information."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from dataengine import local, plugins
from dataengine.ingest import IngestSettings, prepare
from dataengine.labeler import Labeler
from dataengine.manifest import Dataset
from model import checkpoint, domains
from model.batches import merged_columns, spec_of
from model.fourm import FourM, FourMConfig
from model.tokenizers.vqvae import VQVAE, VQVAEConfig
from pipelines import any_to_any, any_to_any_page, commands, judging, pack, tokenize, train_text
from pipelines.any_to_any import AnyToAny
from pipelines.measures import Measure, mean_counts
from pipelines.recipes._hog import CHANNELS, Hog
from pipelines.sample import Tokenizers
from pipelines.train import PackedDataset, packed_shards

SIDE = 32
TEXTS = ("caption", "det", "metadata", "color_palette")


def run_all(dataset: Dataset, labelers: list) -> None:
    plan = tokenize.plan_of(dataset, labelers)
    local.run(plan.group(dataset.store.url), plan.tasks, workers=1, device="cpu", on_report=lambda report: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> AnyToAny:
    """Scenes with their labels and the tokens of random tokenizers, and a model with random weights."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("any")
    files, hog = folder / "tokenizers", Hog(side=SIDE)
    files.mkdir()
    for name, domain in {"rgb": domains.Rgb(), "depth": domains.Depth(), "HOG": domains.Features(channels=36)}.items():
        config = VQVAEConfig(
            domain=domain, image_size=SIDE, patch_size=8, n_channels=domain.num_channels or 3, codebook_size=16,
            enc_type="vit_32x1x2_enc", dec_type="vit_32x1x2_dec", latent_dim=8, patch_proj=name != "HOG",
        )  # fmt: skip
        VQVAE(config).save(files / f"{name}.safetensors")
    datasets = [Dataset(folder / name) for name in ("train", "heldout")]
    for dataset, count, seed in zip(datasets, (10, 6), (0, 1_000_000), strict=True):
        worker, tasks = prepare(dataset, f"scenes:{count}?size={SIDE}&seed={seed}", IngestSettings(shard_size=8))
        local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
        run_all(dataset, [plugins.load("labelers", name, Labeler)() for name in ("color_palette", "metadata")])
        run_all(dataset, tokenize.labelers(files, ["rgb", "depth", "HOG"], [hog]))
    train_text.train(datasets, files / "text.json", 4500)
    for dataset in datasets:
        worker, tasks = pack.prepare(dataset, str(files / "text.json"), SIDE)
        local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    columns = merged_columns([PackedDataset(packed_shards(str(datasets[0].store.url)))])
    specs = [spec_of(column, 8) for column in columns.values()]
    size = FourMConfig(dim=16, encoder_depth=1, decoder_depth=1, num_heads=2)
    checkpoint.save_pretrained(FourM(size, specs, [s for s in specs if s.is_target]), folder / "model")
    return AnyToAny(
        model=str(folder / "model"), tokenizers=str(files), root=str(folder / "heldout"),
        train_root=str(folder / "train"), makers=(hog,), samples=5, train_samples=9, draws=2,
        neighbours=3, resamples=50, batch=3, side=SIDE, shown=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(made: AnyToAny) -> any_to_any.AnyTable:
    return replace(any_to_any.evaluate(made), random=True)


def test_every_input_meets_every_other_output(found: any_to_any.AnyTable) -> None:
    maps = ("tok_rgb@32", "tok_depth@32", "tok_HOG@32")
    assert {t.name for t in found.targets} == {*maps, *TEXTS}
    assert set(found.sources) == {"rgb@32", *maps, *TEXTS}
    assert len(found.cells) == 8 * 7 - 7
    assert found.cell("tok_depth@32", "tok_depth@32") is None
    assert all(np.isfinite([c.model, c.constant, c.neighbours]).all() for c in found.cells)
    assert {t.name for t in found.targets if t.tokenizer is not None} == set(maps)
    for target in found.targets:
        assert {c.constant for c in found.cells if c.target == target.name} == {target.constant}
    json.dumps(found.as_json(), allow_nan=False)
    assert (found.samples, found.train_samples) == (5, 9)


def test_a_seed_gives_one_table(made: AnyToAny, found: any_to_any.AnyTable) -> None:
    from pipelines.sample import Samples

    again = any_to_any.table(made, checkpoint.from_pretrained(made.model).eval(), Tokenizers(made.tokenizers))
    assert again.cells == found.cells
    assert list(again.keys) == [row["key"] for row in Samples(made.root).rows(["caption"], made.shown)]


def test_pictures_and_the_printed_table_call_random_weights_random(
    made: AnyToAny, found: any_to_any.AnyTable, tmp_path: Path
) -> None:
    any_to_any_page.write(tmp_path / "index.html", made, found)
    text = (tmp_path / "index.html").read_text()
    assert "random weights" in text
    assert "To HOG" in text
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(any_to_any_page.terminal(found))
    printed = console.export_text()
    assert printed.startswith("RANDOM WEIGHTS: it means nothing")
    assert "…" not in printed
    assert printed.count("rgb (pixels)") == 2  # of four outputs and of three
    assert any_to_any_page.summary(found).endswith("5 held-out samples")


def test_training_samples_are_refused(made: AnyToAny) -> None:
    with pytest.raises(ValueError, match="a score needs samples that were not trained on"):
        any_to_any.evaluate(replace(made, root=made.train_root))


def test_the_command_prints_one_json_object(
    made: AnyToAny, found: any_to_any.AnyTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(any_to_any, "evaluate", lambda run: replace(found, samples=run.samples))
    result = CliRunner().invoke(
        commands.app,
        ["evaluate", "any-to-any", "scenes_any_to_any_table", "samples=7", "--json"],
    )
    assert judging.any_to_any is not None
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["samples"] == 7


class Number(Measure):
    metric = "error"
    larger_is_better = False

    def counts(self, made, true):
        return mean_counts(np.abs(np.array(made) - np.array(true)))

    def constant(self, values):
        return float(np.median(values))

    def vector(self, value):
        return np.array([value], np.float32)


def test_information_is_what_neighbours_know() -> None:
    rng, measure = np.random.default_rng(0), Number()
    train, held = rng.normal(size=400), rng.normal(size=60)
    weights = any_to_any.resampled(60, 200, 0)
    assert weights.sum(axis=1).tolist() == [60] * 200
    near = any_to_any.nearest(measure, held, train, 8)
    np.testing.assert_array_equal(near[:, 0], np.abs(held[:, None] - train[None]).argmin(axis=1))
    for of, low, high in ((lambda x: 2 * x, 1.0, 1.0), (lambda x: rng.normal(size=len(x)), 0.0, 0.9)):
        outputs, true = of(train), of(held)
        alone = measure.counts([measure.constant(outputs)] * 60, true)
        local_counts = measure.counts([measure.constant(outputs[i]) for i in near], true)
        assert low <= any_to_any.share_better(measure, local_counts, alone, weights) <= high


def test_hog_has_as_many_channels_as_its_tokenizer() -> None:
    assert CHANNELS == 36
