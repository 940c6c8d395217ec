"""Weights of others: what is no checkpoint, is damaged, or is another network's is refused by name, and never run."""

from __future__ import annotations

import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from labelers import _checkpoints, _networks


def state() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


def test_what_trainers_save_is_read_from_where_they_keep_it(tmp_path: Path) -> None:
    torch.save({"state_dict": {f"model.{n}": t for n, t in state().items()}, "epoch": 3}, tmp_path / "lightning.ckpt")
    torch.save(state(), tmp_path / "bare.pth", _use_new_zipfile_serialization=False)
    save_file(state(), tmp_path / "hub.safetensors")
    arrays = {n: t.numpy() for n, t in state().items()}
    (tmp_path / "detectron2.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    for name, prefix in (
        ("lightning.ckpt", "model."),
        ("bare.pth", ""),
        ("hub.safetensors", ""),
        ("detectron2.pkl", ""),
    ):
        found = _checkpoints.read(tmp_path / name, prefix)
        assert {n: t.tolist() for n, t in found.items()} == {n: t.tolist() for n, t in state().items()}, name


class Config(dict[str, object]):
    """As yacs has it: a dictionary with attributes of its own."""


def test_classes_beside_the_tensors_are_read_as_empty_ones_when_they_are_named(tmp_path: Path) -> None:
    config = Config(lr=1)
    config.frozen = True  # type: ignore[attr-defined]
    torch.save({"state_dict": state(), "hyper_parameters": {"cfg": config}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt holds more than tensors.*Config"):
        _checkpoints.read(tmp_path / "a.ckpt")
    found = _checkpoints.read(tmp_path / "a.ckpt", stubs=(f"{Config.__module__}.Config",))
    assert found["bias"].tolist() == [1, 1]


def test_settings_as_hydra_and_lightning_save_them_are_passed_over(tmp_path: Path) -> None:
    saved = {"state_dict": state(), "hyper_parameters": {"cfg": Config(lr=1), "types": Any, "by": defaultdict(dict)}}
    torch.save(saved, tmp_path / "a.ckpt")
    stubs = (f"{Config.__module__}.Config", "typing.Any", "collections.defaultdict", "builtins.dict")
    assert _checkpoints.read(tmp_path / "a.ckpt", stubs=stubs)["bias"].tolist() == [1, 1]
    with pytest.raises(
        ValueError, match=r"\(weights_only\): builtins.dict, collections.defaultdict; if you trust it, save"
    ):
        _checkpoints.read(tmp_path / "a.ckpt", stubs=stubs[:2])


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pkl"])
@pytest.mark.parametrize("what", ["cut", "page", "junk", "empty"])
def test_a_damaged_file_is_called_so(tmp_path: Path, suffix: str, what: str) -> None:
    file = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(state(), file)
    elif suffix == "pth":
        torch.save(state(), file)
    else:
        file.write_bytes(pickle.dumps({n: t.numpy() for n, t in state().items()}))
    whole = file.read_bytes()
    page = b"<!DOCTYPE html><html>Not found</html>"
    file.write_bytes({"cut": whole[: len(whole) // 2], "page": page, "junk": bytes(range(256)), "empty": b""}[what])
    with pytest.raises(ValueError, match=rf"weights\.{suffix}.*(cut short|web page|holds more|expected)"):
        _checkpoints.read(file)


def test_a_pickle_of_anything_but_arrays_is_refused_unbuilt(tmp_path: Path) -> None:
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": {"weight": Path("x")}}))
    with pytest.raises(ValueError, match=r"evil\.pkl.*pathlib.*not among"):
        _checkpoints.read(tmp_path / "evil.pkl")


def test_a_network_takes_its_own_tensors_and_no_others() -> None:
    layer = nn.Linear(3, 2)
    _networks.fill(layer, state(), "it")
    np.testing.assert_array_equal(layer.weight.detach(), state()["weight"])
    with pytest.raises(ValueError, match=r"it: .*1 tensors missing: bias; 1 tensors unexpected: scale"):
        _networks.fill(layer, {"weight": torch.ones(2, 3), "scale": torch.ones(2)}, "it")
    with pytest.raises(ValueError, match=r"of another shape: weight is \(3, 2\), expected \(2, 3\)"):
        _networks.fill(layer, {"weight": torch.ones(3, 2), "bias": torch.ones(2)}, "it")


def test_half_precision_is_for_gpus() -> None:
    assert _networks.dtype_on("cpu", "bfloat16") == torch.float32
    assert _networks.dtype_on("cuda:0", "bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match="got 'fp8'"):
        _networks.dtype_on("cuda:0", "fp8")  # type: ignore[arg-type]


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    with pytest.raises(ImportError, match=r"marigold needs no_such_package: pip install '\.\[diffusion\]'"):
        _networks.require("marigold", "no_such_package", "diffusion")
