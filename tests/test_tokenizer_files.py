"""Tokenizers in files of every form: ml-4m's and ours, strictly, and nothing of them run."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import domains, tokenizers
from model.tokenizers._vq import EncoderOnly
from model.tokenizers.vqvae import VQVAE, VQVAEConfig
from tests.golden import make_tokenizers as golden


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(name: str, **changes: Any) -> VQVAE:
    model = VQVAE(VQVAEConfig(**golden.SMALL[name][0] | changes))
    model.load_state_dict(golden.random_state(model.state_dict()))
    return model.eval()


def tokens(model: Any, name: str) -> torch.Tensor:
    with torch.inference_mode():
        return model.tokenize(golden.inputs(name, golden.SMALL[name][1][0]))


def as_4m_reads(header: dict[str, str]) -> dict[str, Any]:
    return {name: yaml.safe_load(text.replace("None", "null")) for name, text in header.items()}


@pytest.mark.parametrize("name", golden.SMALL)
def test_every_kind_survives_a_file_and_a_folder(name: str, tmp_path: Path) -> None:
    model = small(name)
    model.save(tmp_path / "one.safetensors")
    model.save_pretrained(tmp_path / "folder")
    for source in ("one.safetensors", "folder", "folder/model.safetensors"):
        found = tokenizers.read(tmp_path / source)
        assert isinstance(found, VQVAE)
        assert found.config == model.config
        assert not found.training
        assert torch.equal(tokens(found, name), tokens(model, name))
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.state_dict().items())


@pytest.mark.parametrize("name", golden.SMALL)
def test_the_header_is_what_4ms_loader_needs(name: str, tmp_path: Path) -> None:
    small(name, threshold_ema_dead_code=1e-5).save(tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        header = as_4m_reads(file.metadata())
    for setting, value in golden.SMALL[name][0].items():
        assert header[setting] == value
    assert header["threshold_ema_dead_code"] == 1e-5
    assert header["sync_codebook"] is False
    assert header["image_size_enc"] == golden.SMALL[name][0].get("image_size_enc")
    assert "format" not in header


def test_a_folder_of_the_hub_may_nest_its_settings_and_leave_defaults_out(tmp_path: Path) -> None:
    model = small("clip")
    model.save_pretrained(tmp_path)
    values = golden.SMALL["clip"][0] | {"ema_decay": None, "ckpt_path": None, "ignore_keys": ["decoder"]}
    for described in (values, {"config": values}):
        (tmp_path / "config.json").write_text(json.dumps(described))
        found = tokenizers.read(tmp_path)
        assert found.config == model.config
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object of settings"):
        tokenizers.read(tmp_path)


def test_a_repository_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    small("rgb").save_pretrained(tmp_path)

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = tokenizers.read("EPFL-VILAB/4M_tokenizers_rgb_16k_224-448")
    assert isinstance(found, VQVAE)
    assert asked == [("EPFL-VILAB/4M_tokenizers_rgb_16k_224-448", ["config.json", "model.safetensors"])]
    for missing in ("out/nothing.safetensors", tmp_path / "nothing", "nothing"):
        with pytest.raises(FileNotFoundError, match="no such file or folder, nor an id"):
            tokenizers.read(missing)
    assert len(asked) == 1


def test_settings_in_json_bring_their_domain(tmp_path: Path) -> None:
    domain = domains.Semseg(num_classes=20, classes=(1, 4, 9))
    model = small("semseg", n_labels=4, domain=domain)
    model.save_pretrained(tmp_path)
    found = tokenizers.read(tmp_path)
    assert found.domain == domain
    other = domains.Semseg(num_classes=3)
    assert tokenizers.read(tmp_path, other).domain == other


# Strictness.


def test_weights_too_few_too_many_and_of_another_shape_are_named(tmp_path: Path) -> None:
    model = small("rgb")
    model.save(tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        header = file.metadata()
    state = load_file(tmp_path / "file")
    del state["decoder.out_proj.bias"]
    state["decoder.extra.weight"] = torch.zeros(1)
    state["quant_proj.bias"] = torch.zeros(9)
    save_file(state, tmp_path / "file", metadata=header)
    with pytest.raises(ValueError, match="weights that are not those of a VQVAE") as raised:
        tokenizers.read(tmp_path / "file")
    assert "1 missing: decoder.out_proj.bias" in str(raised.value)
    assert "1 unexpected: decoder.extra.weight" in str(raised.value)
    assert r"1 of another shape: quant_proj.bias (9,) for (8,)" in str(raised.value)


def test_files_without_settings_and_other_files_are_refused(tmp_path: Path) -> None:
    save_file(small("rgb").state_dict(), tmp_path / "bare", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no configuration in the header"):
        tokenizers.read(tmp_path / "bare")
    (tmp_path / "other").write_bytes(b"\x80\x04 not this")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        tokenizers.read(tmp_path / "other")
    small("rgb").save(tmp_path / "file")
    with pytest.raises(ValueError, match="averaged weights were asked for"):
        tokenizers.read(tmp_path / "file", ema=True)


@pytest.mark.parametrize("text", ["[" * 5000, "9" * 20_000, "__import__('os').abort()", "(lambda: 1)()"])
def test_a_header_is_never_run_and_never_too_deep(text: str, tmp_path: Path) -> None:
    model = small("rgb")
    model.save(tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        header = file.metadata()
    save_file(model.state_dict(), tmp_path / "file", metadata=header | {"codebook_size": text})
    with pytest.raises(ValueError, match=r"codebook_size ['\"].*, expected <class 'int'>"):
        tokenizers.read(tmp_path / "file")


# Without the decoder.


def test_the_encoder_alone_tokenises_and_says_what_it_cannot(tmp_path: Path) -> None:
    model = small("rgb", domain=domains.Rgb())
    model.save(tmp_path / "whole")
    found = tokenizers.read(tmp_path / "whole", encoder_only=True)
    assert isinstance(found, EncoderOnly)
    assert torch.equal(tokens(found, "rgb"), tokens(model, "rgb"))
    assert not [name for name in found.state_dict() if "decoder" in name or "post_quant" in name]
    with pytest.raises(ValueError, match="read without its decoder"):
        found.decode_batch(tokens(found, "rgb").numpy())
    found.save(tmp_path / "half")
    again = tokenizers.read(tmp_path / "half")
    assert isinstance(again, EncoderOnly)
    assert again.config == found.config
    with pytest.raises(ValueError, match="holds a EncoderOnly, expected a VQVAE"):
        VQVAE.load(tmp_path / "half")


def test_an_encoder_is_read_out_of_a_tokenizer_whose_decoder_is_not_all_there(tmp_path: Path) -> None:
    model = small("rgb")
    model.save(tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        header = file.metadata()
    state = load_file(tmp_path / "file") | {"vae.weight": torch.zeros(1)}
    save_file(state, tmp_path / "file", metadata=header | {"sd_path": "some/model", "sd_size": "tiny"})
    with pytest.raises(ValueError, match=r"VQControlNet of its settings|unknown tokenizer .controlnet"):
        tokenizers.read(tmp_path / "file")
    found = tokenizers.read(tmp_path / "file", encoder_only=True)
    assert torch.equal(tokens(found, "rgb"), tokens(model, "rgb"))


# What ml-4m's trainers leave.


def trained(model: VQVAE, **more: Any) -> dict[str, Any]:
    """A checkpoint as ml-4m's trainer writes it, with arguments under its names."""
    config = model.config
    args = {
        "quantizer_type": config.quant_type,
        "encoder_type": config.enc_type,
        "decoder_type": config.dec_type,
        "input_size_min": config.image_size,
        "input_size_max": config.image_size,
        "input_size_enc": config.image_size_enc,
        "input_size_dec": config.image_size_dec,
        "quantizer_ema_decay": 0.98,
        "opt_betas": [0.9, 0.99],
        "output_dir": "output/auto",
        **{
            name: getattr(config, name)
            for name in ("post_mlp", "patch_size", "codebook_size", "num_codebooks", "latent_dim", "norm_codes")
        },
        **{name: getattr(config, name) for name in ("out_conv", "undo_std")},
        **more,
    }
    groups = [{"lr": np.float64(1e-4), "betas": (0.9, 0.99)}]  # its schedule is an array of numpy
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": groups}
    average = {
        name: value + 1 if name == "post_quant_proj.bias" else value for name, value in model.state_dict().items()
    }
    return {
        "model": model.state_dict(), "model_ema": average, "epoch": 3, "args": argparse.Namespace(**args),
        "scaler": {"scale": 1.0}, "optimizer": optimizer,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "domain", "expected"),
    [
        ("clip", "CLIP-B16", domains.Features(channels=20)),
        ("dinov2", "DINOv2-B14", domains.Features(channels=24)),
        ("imagebind", "ImageBind-H14", domains.Features(channels=40)),
        ("rgb", "rgb", domains.Rgb()),
        ("rgb", "canny_edge", domains.Edges(channels=3, criterion="smooth_l1")),
        ("dinov2_global", "DINOv2-B14-global", domains.Vector(channels=24)),
        ("human_poses", "human_poses", domains.Poses()),
        ("semseg", "semseg_coco", None),  # 12 labels, where ml-4m's has 134
        ("rgb", "depth", None),  # three channels
        ("rgb", "thermal", None),
    ],
)
def test_a_checkpoint_of_4ms_trainer_is_read(name: str, domain: str, expected: Any, tmp_path: Path) -> None:
    model = small(name)
    torch.save(trained(model, domain=domain), tmp_path / "checkpoint.pth")
    found = tokenizers.read(tmp_path / "checkpoint.pth")
    assert found.config.domain == expected
    assert found.config.ema_decay == 0.98
    assert torch.equal(tokens(found, name), tokens(model, name))
    assert found.config.image_size == model.config.image_size
    averaged = tokenizers.read(tmp_path / "checkpoint.pth", ema=True)
    moved = averaged.state_dict()["post_quant_proj.bias"] - model.state_dict()["post_quant_proj.bias"]
    assert torch.allclose(moved, torch.ones(()))
    half = tokenizers.read(tmp_path / "checkpoint.pth", encoder_only=True)
    assert torch.equal(tokens(half, name), tokens(model, name))


def test_masks_have_a_size_of_their_own_and_their_loss(tmp_path: Path) -> None:
    model = small("sam")
    args = {"domain": "sam_mask", "mask_size": 16, "input_size_max": 224, "loss_fn": "binary_cross_entropy"}
    torch.save(trained(model, **args), tmp_path / "checkpoint.pth")
    found = tokenizers.read(tmp_path / "checkpoint.pth")
    assert found.config.image_size == 16
    assert found.domain == domains.SamMask(criterion="binary_cross_entropy")
    assert torch.equal(tokens(found, "sam"), tokens(model, "sam"))


def test_images_standardised_for_classifiers_have_no_domain(tmp_path: Path) -> None:
    torch.save(trained(small("rgb"), domain="rgb", imagenet_default_mean_and_std=True), tmp_path / "checkpoint.pth")
    assert tokenizers.read(tmp_path / "checkpoint.pth").config.domain is None


class Hostile:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["args", "inside", "model"])
def test_a_pickle_that_does_things_is_refused_and_does_nothing(zipped: bool, where: str, tmp_path: Path) -> None:
    victim = tmp_path / "made by a pickle"
    hostile = Hostile(os.mkdir, str(victim))
    whole = trained(small("rgb"), domain="rgb")
    if where == "args":
        whole["args"] = hostile
    elif where == "inside":
        whole["args"].output_dir = hostile
    else:
        whole["model"]["quant_proj.bias"] = hostile
    torch.save(whole, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"expected tensors, numbers, texts and an argparse\.Namespace alone"):
        tokenizers.read(tmp_path / "checkpoint.pth")
    assert not victim.exists()
    torch.load(tmp_path / "checkpoint.pth", weights_only=False)  # it would have
    assert victim.exists()


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        ({"model": {}}, "found .'model'., expected 'model' and 'args'"),
        ([1, 2], "found list, expected"),
        ({"model": {"a": 1}, "args": argparse.Namespace()}, "expected tensors in 'model', got .'int'."),
        ({"model": {"a": torch.zeros(1)}, "args": argparse.Namespace()}, "no encoder.proj.weight"),
        ({"model": {}, "args": 3}, "expected weights and arguments by name"),
    ],
)
def test_other_checkpoints_are_refused_by_what_they_hold(whole: Any, message: str, tmp_path: Path) -> None:
    torch.save(whole, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=message):
        tokenizers.read(tmp_path / "checkpoint.pth")
    (tmp_path / "checkpoint.pth").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="is not read"):
        tokenizers.read(tmp_path / "checkpoint.pth")
