"""Checkpoints of FourM: what ml-4m's trainer left is read, what is written is what ml-4m takes."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch

from model import fourm
from model.checkpoint import ml4m_config, ml4m_spec
from model.fourm import FourM, FourMConfig

NAMES = ("color_palette", "rgb@224", "tok_depth@224")
SPECS = [ml4m_spec(name) for name in NAMES]
SPECS_OUT = [spec for spec in SPECS if spec.is_target]


@pytest.fixture
def tiny(monkeypatch):
    """ml-4m's smallest preset, with less in it."""
    monkeypatch.setitem(fourm._SIZES, "tiny", (16, 1, 2))


def trained(variant, registers=0):
    """A model and its checkpoint as ml-4m's trainer writes it; its schedules are arrays of numpy."""
    config = FourMConfig.preset("tiny", variant)
    model = FourM(FourMConfig(**{**vars(config), "num_register_tokens": registers}), SPECS, SPECS_OUT, seed=3)
    args = argparse.Namespace(
        model=f"fm_tiny_6e_6d_{variant}", in_domains=list(NAMES), out_domains=["color_palette", "tok_depth@224"],
        num_register_tokens=registers, input_size=224, opt_betas=[0.9, 0.95], data_config={"alphas": None}, resume="",
    )  # fmt: skip
    groups = [{"lr": np.float64(1e-4), "lr_scale": 1.0, "weight_decay": np.float64(0.05), "params": [0]}]
    whole = {
        "model": model.state_dict(), "epoch": 7, "args": args, "scaler": {},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": groups},
    }  # fmt: skip
    return model, whole


@pytest.mark.parametrize(("variant", "registers"), [("gelu", 0), ("swiglu_nobias", 2), ("swiglu_nobias", 0)])
def test_a_checkpoint_of_ml4ms_trainer_is_read(tiny, tmp_path, variant, registers):
    model, whole = trained(variant, registers)
    torch.save(whole, tmp_path / "checkpoint-final.pth")
    found = FourM.from_pretrained(tmp_path / "checkpoint-final.pth")
    assert found.config == model.config
    assert found.config.tie_embeddings
    assert (found.specs_in, found.specs_out) == (model.specs_in, model.specs_out)
    assert not found.training
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    whole["model_ema"] = {name: value + 1 for name, value in whole["model"].items()}
    torch.save(whole, tmp_path / "averaged.pth")
    averaged = FourM.from_pretrained(tmp_path / "averaged.pth", ema=True)
    assert torch.equal(averaged.mask_token, model.mask_token + 1)


def test_what_is_no_such_checkpoint_is_refused(tiny, tmp_path):
    path = tmp_path / "checkpoint-0.pth"
    for change, message in (
        ({"model": "fm_tiny_6e_6d_relu"}, "model 'fm_tiny_6e_6d_relu', expected a name such as"),
        ({"in_domains": None}, "in_domains None and out_domains .*, expected lists"),
        ({"out_domains": ["tok_heat@224"]}, "tok_heat@224: not a modality of ml-4m"),
    ):
        _, whole = trained("gelu")
        vars(whole["args"]).update(change)
        torch.save(whole, path)
        with pytest.raises(ValueError, match=message):
            FourM.from_pretrained(path)
    _, whole = trained("gelu")
    del whole["model"]["mask_token"]
    torch.save(whole, path)
    with pytest.raises(RuntimeError, match=r"Missing key.*mask_token"):
        FourM.from_pretrained(path)
    _, whole = trained("gelu")
    whole["args"].hook = print
    torch.save(whole, path)
    with pytest.raises(ValueError, match=r"checkpoint-0\.pth is not read: .*weights_only"):
        FourM.from_pretrained(path)
    with pytest.raises(ValueError, match=r"ema is for the \.pth of a trainer"):
        FourM.from_pretrained(tmp_path, ema=True)


def test_a_configuration_holds_what_ml4ms_vit_takes_where_the_whole_model_adds_nothing():
    # FMViT refuses what only the whole model knows, and takes the size of its images from the configuration.
    sizes = {"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2}
    specs = [ml4m_spec(name) for name in ("tok_dinov2@224", "tok_rgb@448", "rgb@224")]
    config = ml4m_config(FourM(FourMConfig(**sizes), specs, specs[:1]))
    assert (config["image_size"], config["patch_size"]) == (224, 16)
    assert not {"num_register_tokens", "decoder_causal_mask", "decoder_sep_mask"} & config.keys()
    other = FourMConfig(**sizes, num_register_tokens=1, decoder_causal_mask=True, decoder_sep_mask=False)
    config = ml4m_config(FourM(other, specs, specs[:1]))
    assert (config["num_register_tokens"], config["decoder_causal_mask"], config["decoder_sep_mask"]) == (
        1,
        True,
        False,
    )


def test_a_model_saves_and_loads_itself(tmp_path):
    config = FourMConfig(dim=16, encoder_depth=1, decoder_depth=1, num_heads=2, decoder_sep_mask=False)
    model = FourM(config, SPECS, SPECS_OUT, seed=5)
    model.save_pretrained(tmp_path)
    again = FourM.from_pretrained(tmp_path)
    assert again.config == config
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["decoder_sep_mask"] is False
    untied = FourM.from_pretrained(tmp_path, tie_embeddings=False)
    assert untied.decoder_embeddings["tok_depth@224"].to_logits.weight is not untied.get_parameter(
        "decoder_embeddings.tok_depth@224.token_emb.weight"
    )
