"""Omnidata's depth and normals: the same function as the reference computes, from the same files."""

from __future__ import annotations

import collections
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch.nn import functional as F

from dataengine.labeler import Labeler
from dataengine.sample import Sample
from labelers import _maps, _omnidata
from labelers._omnidata import Shape
from labelers.omnidata_depth import OmnidataDepth
from labelers.omnidata_normal import OmnidataNormal

# What golden/omnidata.npz was made of: golden/make_omnidata.py imports these from here.
SMALL: dict[str, Any] = {
    "stem": 16,
    "stages": (64, 128, 192),
    "blocks": (1, 2, 1),
    "width": 128,
    "mlp": 192,
    "depth": 4,
    "grid": 24,
    "neck": (48, 40),
    "fusion": 32,
}
SEEDS = {1: 11, 3: 13}
SIZES = ((384, 384), (384, 512))
KEPT = (slice(3, None, 8), slice(5, None, 8))
"""Of each map every eighth pixel both ways is kept."""
GOLDEN = Path(__file__).parent / "golden" / "omnidata.npz"


def pixels(size: tuple[int, int], seed: int) -> torch.Tensor:
    """Float32 (1, 3, h, w) in 0..1: blots of 16 pixels with noise over them."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.random((3, size[0] // 16, size[1] // 16)), np.ones((1, 16, 16)))
    image = np.rint(255 * np.clip(coarse + 0.1 * rng.standard_normal(coarse.shape), 0, 1)).astype(np.uint8)
    return torch.from_numpy(image[None]).float() / 255


@pytest.mark.parametrize("channels", [1, 3])
def test_the_network_computes_what_the_reference_does(channels: int) -> None:
    golden = np.load(GOLDEN)
    network = _omnidata.network(
        _omnidata.random_state(Shape(channels=channels, **SMALL), SEEDS[channels]), channels, "t"
    )
    for seed, size in enumerate(SIZES):
        x = pixels(size, seed)
        with torch.inference_mode():
            ours = network(x * 2 - 1 if channels == 1 else x)[0].numpy()[(slice(None), *KEPT)]
        theirs = golden[f"{channels}_{size[0]}x{size[1]}"]
        assert theirs.std() > 0.02
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_every_tensor_of_the_published_files_is_used_or_left_out_by_name() -> None:
    published = {
        name: tuple(map(int, shape)) for name, *shape in (str(line).split(" ") for line in np.load(GOLDEN)["keys"])
    }
    assert published == _omnidata.shapes(Shape())
    for channels in (1, 3):
        with torch.device("meta"):
            state = {name: torch.empty(shape) for name, shape in _omnidata.shapes(Shape(channels=channels)).items()}
            network = _omnidata._build(_omnidata.shape_of(state, "t"))
        renamed = _omnidata.renamed(state)
        assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in network.state_dict().items()}
        # 24 tensors become 72, and the classifier of the trunk is dropped.
        assert len(renamed) == len(state) - 2 + 2 * 24
        assert network.dpt.encoder.layer[0].attention.attention.num_attention_heads == 12
    assert Shape().groups == 32


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((384, 384), (384, 384)),
        ((480, 640), (384, 512)),
        ((640, 480), (512, 384)),
        ((1080, 1920), (384, 672)),
        ((100, 150), (384, 576)),
        ((401, 400), (384, 384)),
        ((100, 3000), (384, 1536)),
        ((3000, 100), (1536, 384)),
    ],
)
def test_the_sides_are_the_closest_multiples_of_32(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert _maps.shape_for(size, 384, 32) == expected


def photographs() -> list[Sample]:
    pictures = {"coffee": (90, 140), "chelsea": (130, 70), "rocket": (90, 135), "astronaut": (64, 64)}
    return [
        Sample(name, {"rgb": np.asarray(Image.fromarray(getattr(skimage.data, name)()).resize((w, h)))})
        for name, (h, w) in pictures.items()
    ]


def test_depth_is_that_of_the_whole_image_at_its_own_size(tmp_path: Path) -> None:
    labeler = OmnidataDepth().tiny(tmp_path)
    network = _omnidata.load(Path(labeler.checkpoint), 1, "t")
    samples = photographs()
    for sample, labels in zip(samples, labeler.load("cpu")(samples), strict=True):
        height, width = sample.size
        image = Image.fromarray(sample.rgb).resize(_maps.shape_for((height, width), 64, 32)[::-1], Image.BILINEAR)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            maps = network((x - 0.5) / 0.5).clamp(0, 1)
            back = F.interpolate(maps, (height, width), mode="bilinear", antialias=True)[0, 0]
        assert labels["depth"].std() > 1e-3
        np.testing.assert_allclose(labels["depth"], back.numpy(), atol=1e-5)


def test_normals_see_pixels_in_0_to_1_and_are_of_unit_length(tmp_path: Path) -> None:
    labeler = OmnidataNormal().tiny(tmp_path)
    network = _omnidata.load(Path(labeler.checkpoint), 3, "t")
    rgb = np.asarray(Image.fromarray(skimage.data.astronaut()).resize((64, 64)))
    with torch.inference_mode():
        maps = network(torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float() / 255)[0].clamp(0, 1) * 2 - 1
    expected = (maps / maps.norm(dim=0)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(labeler.load("cpu")([Sample("a", {"rgb": rgb})])[0]["normal"], expected, atol=1e-5)


@pytest.mark.parametrize("kind", [OmnidataDepth, OmnidataNormal])
def test_a_neighbour_changes_nothing(kind: type[Labeler], tmp_path: Path) -> None:
    (name,) = kind().emits
    loaded, samples = kind().tiny(tmp_path).load("cpu"), photographs()
    together = [labels[name] for labels in loaded(samples)]
    for sample, value in zip(samples, together, strict=True):
        np.testing.assert_allclose(loaded([sample])[0][name], value, atol=2e-5)


def checkpoint(folder: Path, channels: int = 1, **changes: Any) -> tuple[dict[str, torch.Tensor], Path]:
    _omnidata.save_tiny(folder / "published.ckpt", channels, seed=0)
    state = torch.load(folder / "published.ckpt", weights_only=True)["state_dict"] | changes
    return {n: t for n, t in state.items() if t is not None}, folder / "other.ckpt"


def test_lightning_files_and_bare_tensors_are_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, file = checkpoint(tmp_path)
    samples = photographs()[:1]
    first = OmnidataDepth(checkpoint=str(tmp_path / "published.ckpt"), side=64).load("cpu")(samples)[0]["depth"]
    torch.save({name.removeprefix("model."): value for name, value in state.items()}, file)
    np.testing.assert_array_equal(OmnidataDepth(checkpoint=str(file), side=64).load("cpu")(samples)[0]["depth"], first)
    # Lightning 1.x keys the state of a callback by its class and keeps the settings in a class of its own.
    for module, name, base in (
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint", object),
        ("pytorch_lightning.utilities.parsing", "AttributeDict", dict),
    ):
        kind = type(name, (base,), {"__module__": module})
        made = types.ModuleType(module)
        setattr(made, name, kind)
        for parent in ("pytorch_lightning", module.rpartition(".")[0]):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, module, made)
    callbacks = {sys.modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint: {"best_model_path": ""}}
    settings = sys.modules["pytorch_lightning.utilities.parsing"].AttributeDict(lr=1e-5)
    torch.save({"state_dict": state, "callbacks": callbacks, "hyper_parameters": settings}, file)
    np.testing.assert_array_equal(OmnidataDepth(checkpoint=str(file), side=64).load("cpu")(samples)[0]["depth"], first)


def test_other_files_are_refused_by_what_they_lack(tmp_path: Path) -> None:
    state, file = checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"omnidata_normal: expected 3 output channels \(normals\).* has 1 \(depth\)"):
        OmnidataNormal(checkpoint=str(tmp_path / "published.ckpt")).load("cpu")
    broken = {
        "unexpected: extra": state | {"model.extra": torch.ones(1)},
        r"missing: .*projection\.weight": {n: t for n, t in state.items() if "refinenet4.out_conv.weight" not in n},
        r"expected the tensors of Omnidata's DPT-hybrid, there is no .*conv3": {
            n: t for n, t in state.items() if "stages.1.blocks.0.conv3" not in n
        },
        r"expected tensors named model\.\*, found loss\.weight": state | {"loss.weight": torch.ones(1)},
    }
    for message, tensors in broken.items():
        torch.save({"state_dict": collections.OrderedDict(tensors)}, file)
        with pytest.raises(ValueError, match=message):
            OmnidataDepth(checkpoint=str(file)).load("cpu")
    for kind in (OmnidataDepth, OmnidataNormal):
        with pytest.raises(ValueError, match="multiple of 32 pixels, got 390"):
            kind(side=390)
