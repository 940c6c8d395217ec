"""Recipes of 4M-7 and 4M-21: ml-4m's mixtures, hyper-parameters, schedules and sizes."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataengine import plugins
from model import optim
from model.checkpoint import ml4m_spec
from model.fourm import FourM
from model.masking import MaskingConfig, MixtureComponent
from pipelines import config
from pipelines.recipes import _fourm
from pipelines.train import TrainFourM

FILE = {
    "fourm7": "4m-b_mod7_500b", "fourm7.large": "4m-l_mod7_500b", "fourm7.xlarge": "4m-xl_mod7_500b",
    "fourm21": "4m-b_mod21_500b", "fourm21.large": "4m-l_mod21_500b", "fourm21.xlarge": "4m-xl_mod21_500b",
    "fourm7_text2im": "4m-b_mod7_500b--spec_text2im_100b", "fourm7_text2im.large": "4m-l_mod7_500b--spec_text2im_100b",
    "fourm7_text2im.xlarge": "4m-xl_mod7_500b--spec_text2im_100b", "fourm7_sr448": "4m-l_mod7_500b--sr_448_100b",
}  # fmt: skip
GPUS = {
    "fourm7": 64, "fourm7.large": 128, "fourm7.xlarge": 128, "fourm21": 64, "fourm21.large": 64, "fourm21.xlarge": 128,
    "fourm7_text2im": 32, "fourm7_text2im.large": 128, "fourm7_text2im.xlarge": 128, "fourm7_sr448": 128,
}  # fmt: skip
"""Of the comments in ml-4m's files, or its README's for those that have none."""

# Parameters without those of embeddings, in millions: 4M-21's table of sizes, and the numbers that make it.
SIZES = {"b": (198.8, 768, 12, 2048), "l": (705.7, 1024, 24, 2730), "xl": (2823.0, 2048, 24, 5461)}


@cache
def golden(part: str) -> Any:
    with np.load(Path(__file__).parent / "golden" / "fourm_recipes.npz", allow_pickle=False) as held:
        return json.loads(str(held[part]))


def size_of(name: str) -> str:
    return FILE[name].split("_")[0].removeprefix("4m-")


def load(name: str) -> TrainFourM:
    return config.load(name, TrainFourM)


def test_every_recipe_of_fourm_is_checked_here() -> None:
    found = []
    for file in plugins.names("pipelines.recipes"):
        if file.startswith("fourm"):
            module = importlib.import_module(f"pipelines.recipes.{file}")
            found += [file if f == "recipe" else f"{file}.{f}" for f in config.recipes_of(module)]
    assert sorted(found) == sorted(FILE)


@pytest.mark.parametrize("name", FILE)
def test_hyperparameters_are_ml4ms(name: str) -> None:
    run, cfg, loop = load(name), golden("models")[FILE[name]], load(name).loop
    total = cfg["batch_size"] * GPUS[name]
    said = [line for line in golden("comments")[FILE[name]] if "batch size" in line]
    assert all(f"{GPUS[name]} GPUs for batch size = {total}" in line for line in said)
    assert (run.batch_size, loop.batches_per_step) == (cfg["batch_size"], GPUS[name])
    assert loop.lr == pytest.approx(cfg["blr"] * total / 256, rel=1e-12)
    assert (loop.min_lr, loop.schedule, loop.weight_decay, loop.betas) == (0.0, "ml4m-cosine", 0.05, (0.9, 0.95))
    assert loop.clip_grad == cfg.get("clip_grad")
    assert (loop.dtype, run.per_token, loop.ema_decay) == (cfg["dtype"], cfg["loss_type"] == "token", None)
    assert loop.recompute == cfg.get("use_act_checkpoint", False)
    assert loop.parallel == ("fsdp" if "skip_nan_grad" in cfg else "auto")
    if loop.parallel == "fsdp":  # ml-4m's SHARD_GRAD_OP and MixedPrecision(reduce_dtype=torch.bfloat16)
        assert (loop.reshard, loop.reduce_dtype, loop.gather_dtype) == (False, "bfloat16", "float32")
    inputs = (cfg.get("min_input_tokens", cfg["num_input_tokens"]), cfg["num_input_tokens"])
    targets = (cfg.get("min_target_tokens", cfg["num_target_tokens"]), cfg["num_target_tokens"])
    for masking in (run.masking, *(s.masking for s in run.data if s.masking is not None)):
        assert (masking.input_tokens, masking.target_tokens) == (inputs, targets)
        assert (masking.redistribute, masking.only_targets, masking.count_predictions) == (False, False, False)
    assert bool(run.init_from) == ("finetune" in cfg)


@pytest.mark.parametrize("name", FILE)
def test_steps_are_those_of_ml4ms_formula(name: str) -> None:
    cfg, loop = golden("models")[FILE[name]], load(name).loop
    samples = cfg["batch_size"] * GPUS[name]
    tokens = cfg["num_input_tokens"] + cfg["num_target_tokens"]
    epochs = math.ceil(cfg["total_tokens"] * 1e9 / (tokens * cfg["epoch_size"]))
    assert loop.steps == epochs * (cfg["epoch_size"] // samples)
    assert loop.warmup_steps == math.ceil(cfg["warmup_tokens"] * 1e9 / (tokens * samples))
    assert loop.evaluate_every == loop.checkpoint_every == cfg["epoch_size"] // samples
    assert loop.steps * samples * tokens == pytest.approx(cfg["total_tokens"] * 1e9, rel=0.04)


def test_steps_of_the_published_models_in_numbers() -> None:
    assert (load("fourm7").loop.steps, load("fourm7").loop.warmup_steps) == (239_120, 4769)
    assert (load("fourm21").loop.steps, load("fourm21").loop.warmup_steps) == (239_218, 4769)
    assert load("fourm21").loop.lr == pytest.approx(1.6e-3)
    loop = load("fourm7").loop
    first, peak = (
        optim.rate(loop.schedule, step, steps=loop.steps, lr=loop.lr, warmup_steps=loop.warmup_steps)
        for step in (0, loop.warmup_steps - 1)
    )
    assert (first, peak) == (0.0, pytest.approx(3.2e-3))


def same_table(components: tuple[MixtureComponent, ...], dataset: dict[str, Any]) -> None:
    """Both sides' concentrations, the shares and how sequences are kept are those of ml-4m's dataset."""
    table = {name: entry for name, entry in dataset["table"].items()}
    shares = dataset["weights"] or [1.0] * len(components)
    assert [c.weight for c in components] == shares
    for i, component in enumerate(components):
        # A name that a table here has and the dataset lacks is absent from its samples.
        for side, found in (("input_alphas", component.input_alphas), ("target_alphas", component.target_alphas)):
            assert {name: found.get(name, 0.0) for name in table} == {n: e[side][i] for n, e in table.items()}
        kept = {name: entry["keep"][i] for name, entry in table.items() if "keep" in entry}
        assert {name: component.keep.get(name, "random") for name in kept} == kept
        assert set(component.keep) <= set(kept)


@pytest.mark.parametrize("name", FILE)
def test_mixtures_are_ml4ms(name: str) -> None:
    run = load(name)
    datasets = golden("data")[golden("models")[FILE[name]]["data_config"]]
    assert [Path(s.root).name for s in run.data] == [d["name"] for d in datasets]
    assert [s.weight for s in run.data] == [d["share"] for d in datasets]
    assert [s.repeats for s in run.data] == [d["repeats"] or 1 for d in datasets]
    for source, dataset in zip(run.data, datasets, strict=True):
        same_table((source.masking or run.masking).components, dataset)
    assert sorted(run.inputs) == sorted({m for d in datasets for m in d["inputs"]})
    assert sorted(run.outputs) == sorted({m for d in datasets for m in d["outputs"]})


def test_the_mixtures_that_no_recipe_uses_are_ml4ms_too() -> None:
    (dataset,) = golden("data")["cfgs/default/4m/data/cc12m/main/mix_mod7_all2all_rgb2dense_a0.5.yaml"]
    same_table(_fourm.mod7_dense(), dataset)


@pytest.mark.parametrize("name", FILE)
def test_models_build_with_the_published_numbers_of_parameters(name: str) -> None:
    run = load(name)
    with torch.device("meta"):
        model = FourM(run.model, [ml4m_spec(m) for m in run.inputs], [ml4m_spec(m) for m in run.outputs])
    sizes = {p: v.numel() for p, v in model.named_parameters() if "embeddings." not in p}
    millions, dim, depth, hidden = SIZES[size_of(name)]
    assert sum(sizes.values()) / 1e6 == pytest.approx(millions, abs=0.05 if millions < 1000 else 0.5)
    # Attention, gated MLP and norms of each block; the projection of the context, both last norms, the mask token.
    encoder, decoder = 4 * dim**2 + 3 * dim * hidden + 2 * dim, 8 * dim**2 + 3 * dim * hidden + 4 * dim
    assert sum(sizes.values()) == depth * (encoder + decoder) + dim**2 + dim + 2 * dim + dim
    assert [len(model.encoder_embeddings), len(model.decoder_embeddings)] == [len(run.inputs), len(run.outputs)]


@pytest.mark.parametrize("name", FILE)
def test_every_concentration_of_a_target_is_of_an_output(name: str) -> None:
    """Nothing is drawn that the model cannot take or predict: what a trainer would refuse."""
    run = load(name)
    for masking in (run.masking, *(s.masking for s in run.data if s.masking is not None)):
        assert isinstance(masking, MaskingConfig)
        for component in masking.components:
            drawn = {m for m, alpha in component.target_alphas.items() if alpha > 0 and ml4m_spec(m).is_target}
            assert drawn <= set(run.outputs)
            assert {m for m, alpha in component.input_alphas.items() if alpha > 0} <= set(run.inputs)


def test_a_variant_is_found_by_its_name() -> None:
    with pytest.raises(ValueError, match="recipe fourm7 has no 'xl', expected recipe or large or xlarge"):
        load("fourm7.xl")
    with pytest.raises(ValueError, match="unknown recipe 'fourm8'"):
        load("fourm8.large")


def test_data_is_set_on_the_command_line() -> None:
    run = config.override(load("fourm21"), ["heldout=[]", "data=[{root: mine, repeats: 2}, {root: c4, weight: 0.5}]"])
    assert run.heldout == ()
    assert [(s.root, s.weight, s.repeats, s.masking) for s in run.data] == [("mine", 1, 2, None), ("c4", 0.5, 1, None)]


def test_a_run_that_is_older_than_a_setting_had_its_default(tmp_path: Path) -> None:
    run = load("fourm7")
    config.keep(run, tmp_path)
    (tmp_path / "checkpoint").mkdir()
    record = json.loads((tmp_path / "recipe.json").read_text())
    del record["heldout"], record["init_from"], record["data"][0]["window"], record["masking"]["only_targets"]
    (tmp_path / "recipe.json").write_text(json.dumps(record))
    config.keep(run, tmp_path, free=("heldout",))
    with pytest.raises(ValueError, match="init_from '' -> 'other'"):
        config.keep(replace(run, init_from="other"), tmp_path, free=("heldout",))
