"""Networks of transformers, built from a config and tensors alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DFineForObjectDetection,
    EomtForUniversalSegmentation,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
    SwinModel,
    ViTConfig,
)

from dataengine import weights
from labelers import _huggingface, mask2former
from labelers.dfine import DFine
from labelers.eomt import Eomt
from labelers.mask2former import Mask2Former
from tests.golden import make_huggingface

TINY = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return _huggingface.save_tiny(SwinModel(SwinConfig(**TINY)), tmp_path, seed=3)


def read(checkpoint: Path | str, **more: Any) -> SwinModel:
    return _huggingface.network(str(checkpoint), SwinModel, "swin", **more)


def changed(file: Path, **settings: Any) -> None:
    config = file.parent / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))


def test_a_folder_a_file_and_urls_of_both_give_what_transformers_reads(file: Path) -> None:
    wanted = SwinModel.from_pretrained(file.parent, local_files_only=True).state_dict()
    for checkpoint in (file, file.parent, f"file://{file}", f"file://{file.parent}/"):
        found = read(checkpoint).state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert weights.describe(str(file.parent), _huggingface.FILE, licence="MIT").random
    url = weights.describe(f"file://{file.parent}/", _huggingface.FILE, licence="MIT")
    assert url.sha256 == weights.describe(str(file), licence="MIT").sha256


def test_a_checkpoint_is_the_file_that_was_named_and_no_other(file: Path) -> None:
    tuned = file.with_name("finetuned.safetensors")
    save_file({name: value + 1 for name, value in load_file(file).items()}, tuned)
    base, other = (_huggingface.describe(str(f), "MIT") for f in (file, tuned))
    assert base.sha256 != other.sha256
    assert (base.random, other.random) == (True, False)
    file.unlink()
    assert _huggingface.describe(str(tuned), "MIT") == other


def test_the_file_has_the_names_of_published_checkpoints(file: Path) -> None:
    assert "encoder.layers.0.blocks.0.attention.self.query.weight" in load_file(file)


def test_a_checkpoint_that_fits_only_in_part_is_refused(file: Path) -> None:
    state = load_file(file)
    name = "embeddings.patch_embeddings.projection.bias"
    save_file({k: v for k, v in state.items() if k != name} | {"classifier.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=rf"swin: .* 1 tensors missing: {name}; 1 tensors unexpected: classifier"):
        read(file)
    save_file({**state, name: torch.zeros(5)}, file)
    with pytest.raises(ValueError, match=rf"of another shape: {name} is \(5,\), expected \(8,\)"):
        read(file)


def test_what_is_left_out_on_purpose_is_named(file: Path) -> None:
    save_file({**load_file(file), "classifier.weight": torch.zeros(2)}, file)
    assert read(file, unused=(r"^classifier\.",)).training is False


def test_another_architecture_and_quantised_weights_are_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="expected model_type 'vit', found 'swin'"):
        _huggingface.config(str(file), ViTConfig)
    changed(file, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match="quantised weights are not read"):
        read(file)


def test_a_config_that_names_code_gets_none_of_it(file: Path) -> None:
    changed(
        file, attn_implementation="somebody/kernel", auto_map={"AutoModel": "evil.Model"}, _attn_implementation="flash"
    )
    found = _huggingface.config(str(file), SwinConfig)
    assert found._attn_implementation is None
    assert not hasattr(found, "auto_map")
    assert read(file).config._attn_implementation in ("sdpa", "eager")


def test_a_damaged_config_and_a_missing_one_are_told(file: Path) -> None:
    (file.parent / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json of .*: expected a JSON object, found \[1\]"):
        read(file)
    (file.parent / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read(file)


def test_no_network_is_said_with_the_file_and_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        FileNotFoundError, match=r"nobody/nothing has none of .*model.safetensors.* and downloads are off"
    ):
        read("nobody/nothing")


@pytest.fixture(scope="module")
def golden() -> Any:
    with np.load(Path(__file__).parent / "golden" / "huggingface.npz", allow_pickle=False) as values:
        return dict(values)


PUBLISHED = {
    "mask2former": (Mask2Former, Mask2FormerForUniversalSegmentation, mask2former.NOT_NEEDED, mask2former.IDLE),
    "eomt": (Eomt, EomtForUniversalSegmentation, (), ()),
    "dfine": (DFine, DFineForObjectDetection, (), ()),
}
PARAMETERS = {"mask2former": 106.9, "eomt": 316.7, "dfine": 62.6}
"""In millions, as published."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_published_size_is_used(name: str, golden: Any, tmp_path: Path) -> None:
    _, kind, unused, idle = PUBLISHED[name]
    shapes = [[int(side) for side in shape.split("x") if side] for shape in golden[f"{name}.shapes"]]
    # One number in memory, whatever the shape.
    state = {key: torch.zeros(()).expand(shape) for key, shape in zip(golden[f"{name}.names"], shapes, strict=True)}
    (tmp_path / "config.json").write_text(str(golden[f"{name}.config"]))
    config = _huggingface.config(str(tmp_path), kind.config_class)
    network = _huggingface.filled(kind, config, state, name, unused=unused, idle=idle)
    assert round(sum(value.numel() for value in network.parameters()) / 1e6, 1) == PARAMETERS[name]
    lost = next(key for key in reversed(state) if key.endswith("proj.weight"))
    other = {key: value for key, value in state.items() if key != lost} | {"another": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 tensors missing: .*proj\.weight; 1 tensors unexpected: another$"):
        _huggingface.filled(kind, config, other, name, unused=unused, idle=idle)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_version_that_published_them_computes_the_same(name: str, golden: Any, tmp_path: Path) -> None:
    labeler, kind, unused, idle = PUBLISHED[name]
    checkpoint = labeler().tiny(tmp_path).checkpoint
    network = _huggingface.network(checkpoint, kind, name, unused=unused, idle=idle)
    with torch.no_grad():
        found = network.double()(pixel_values=torch.from_numpy(make_huggingface.pixels(name)).double())
    compared = [key.partition(".")[2] for key in golden if key.startswith(f"{name}.") and golden[key].ndim > 2]
    assert len(compared) == 2
    for field in compared:
        wanted = golden[f"{name}.{field}"]
        assert np.abs(found[field].numpy() - wanted).max() <= 1e-6 * np.abs(wanted).max()
