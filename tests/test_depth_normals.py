"""Depth and normals: axes, direction and alignment, proved with oracles that answer as a network would."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from dataengine import modalities
from dataengine.corpora.scenes import CLASS_IDS, MAX_DEPTH_M, render
from dataengine.labeler import Labeler
from dataengine.sample import Sample
from labelers import _axes, _images, _maps, _marigold, _networks, _omnidata, depth_anything, marigold_normal
from labelers.depth_anything import DepthAnything
from labelers.marigold_normal import MarigoldNormal
from labelers.omnidata_depth import OmnidataDepth
from labelers.omnidata_normal import OmnidataNormal

INDOORS = (25, 52)
"""Scenes with a wall in front and one on the left, both in full view."""


class Answer(torch.nn.Module):
    """Stands where a network would, and computes a stated function of the pixels."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.head = torch.nn.ModuleDict({"conv3": torch.nn.Conv2d(1, 1, 1)})

    def forward(self, pixels: torch.Tensor) -> Any:
        return self.function(pixels)


@pytest.fixture(params=["omnidata", "marigold"])
def normals_of_colours(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Labeler:
    """A labeler whose network knows the truth: the pixels are it, as (n + 1) / 2 of right, up and to the observer."""

    def seen(pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(pixels * 2 - 1, dim=1)  # right, up, to the observer

    def omnidata(pixels: torch.Tensor) -> torch.Tensor:
        right, up, near = seen(pixels).unbind(1)
        # Red is right, green is down, blue is away from the observer: its published pictures, see `_axes`.
        return (torch.stack([right, -up, -near], dim=1) + 1) / 2

    if request.param == "omnidata":
        labeler: Labeler = OmnidataNormal().tiny(tmp_path)
        monkeypatch.setattr(_omnidata, "load", lambda *_: Answer(omnidata))
    else:
        labeler = MarigoldNormal().tiny(tmp_path)
        monkeypatch.setattr(_marigold, "network", lambda *_: lambda pixels, noise: seen(pixels))
    return labeler


@pytest.mark.parametrize("seed", INDOORS)
def test_walls_and_floors_of_a_scene_look_where_they_should(normals_of_colours: Labeler, seed: int) -> None:
    scene = render(seed, 96)  # its normals are right, up, to the observer
    rgb = np.rint((scene.normal + 1) * 127.5).astype(np.uint8)
    got = normals_of_colours.load("cpu")([Sample("scene", {"rgb": rgb})])[0]["normal"]
    modalities.load("normal").check(got, (96, 96))
    is_wall = np.isin(scene.semseg, [CLASS_IDS[name] for name in CLASS_IDS if name.startswith("wall-")])
    floor = np.isin(scene.semseg, [CLASS_IDS[name] for name in CLASS_IDS if name.startswith("floor-")])
    left = is_wall & (np.arange(96) < 20)
    front = is_wall & (scene.normal[..., 2] > 0.9)
    assert min(left.sum(), front.sum(), floor.sum()) > 400
    np.testing.assert_allclose(np.median(got[left], axis=0), [1, 0, 0], atol=0.05)
    # The camera looks down by ten degrees.
    tilt = np.deg2rad(10)
    np.testing.assert_allclose(np.median(got[front], axis=0), [0, np.sin(tilt), -np.cos(tilt)], atol=0.05)
    np.testing.assert_allclose(np.median(got[floor], axis=0), [0, -np.cos(tilt), -np.sin(tilt)], atol=0.05)
    assert _axes.faces_camera(got[front])
    assert not _axes.faces_camera(-got[front])
    truth = scene.normal * [1, -1, -1]
    assert np.mean((got * truth).sum(axis=2) > 0.99) > 0.85  # all but outlines, which resizing mixes


def test_axes_of_known_networks_become_opencvs() -> None:
    def turned(vector: tuple[float, ...], signs: _axes.Signs) -> list[float]:
        return _axes.unit(torch.tensor(vector).view(3, 1, 1), signs)[0, 0].tolist()

    wall = [0, 0, -1]
    assert turned((0, 0, -2), _axes.OPENCV) == wall
    assert turned((0, 0, 1), _axes.OPENGL) == wall
    assert turned((0, 0, 1), _axes.OUTWARD) == wall
    floor = [0, -1, 0]
    assert (
        turned((0, -1, 0), _axes.OPENCV) == turned((0, 3, 0), _axes.OPENGL) == turned((0, 1, 0), _axes.OUTWARD) == floor
    )
    assert turned((1, 0, 0), _axes.OPENGL) == [1, 0, 0]
    assert turned((0, 0, 0), _axes.OPENGL) == wall  # opposite normals may cancel out
    for wrong in (np.zeros((0, 3)), np.zeros((4, 4))):
        with pytest.raises(ValueError, match="expected normals"):
            _axes.faces_camera(wrong)


@pytest.fixture(params=["omnidata", "depth_anything"])
def depth_of_grey(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Labeler:
    """A labeler whose network knows the truth: how bright a pixel is, so far away is it."""

    def disparity(pixels: torch.Tensor) -> Any:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in _images.IMAGENET)
        return SimpleNamespace(predicted_depth=1 / (pixels * std + mean).mean(dim=1).clamp_min(0.02))

    if request.param == "omnidata":
        labeler: Labeler = OmnidataDepth().tiny(tmp_path)
        monkeypatch.setattr(_omnidata, "load", lambda *_: Answer(lambda pixels: (pixels[:, :1] + 1) / 2))
    else:
        labeler = DepthAnything(epsilon=1e-3).tiny(tmp_path)
        monkeypatch.setattr(depth_anything, "network", lambda *_: Answer(disparity))
    return labeler


@pytest.mark.parametrize("seed", INDOORS)
def test_near_is_small_and_far_is_large(depth_of_grey: Labeler, seed: int) -> None:
    metres = render(seed, 96).depth
    assert metres.max() < MAX_DEPTH_M
    grey = np.rint(np.repeat((metres / metres.max() * 255)[..., None], 3, axis=2)).astype(np.uint8)
    got = depth_of_grey.load("cpu")([Sample("scene", {"rgb": grey})])[0]["depth"]
    modalities.load("depth").check(got, (96, 96))
    order = np.corrcoef(metres.ravel(), got.ravel())[0, 1]
    assert order > 0.98
    if isinstance(depth_of_grey, DepthAnything):
        assert got.min() == 0
        assert got.max() == 1
    else:
        assert np.abs(got - metres / metres.max()).mean() < 0.02


@pytest.mark.parametrize("size", [(256, 640), (640, 256), (17, 41)])
def test_what_comes_back_lies_where_it_was(depth_of_grey: Labeler, size: tuple[int, int]) -> None:
    rows, cols = (side * 5 // 8 for side in size)
    upright, level = np.full((2, *size, 3), 120, np.uint8)
    upright[:, cols:], level[rows:] = 136, 136
    samples = [Sample("upright", {"rgb": upright}), Sample("level", {"rgb": level})]
    one, other = (labels["depth"] for labels in depth_of_grey.load("cpu")(samples))
    # Where a profile crosses the middle, between pixel centres; half a pixel of the network would be 2 pixels off.
    for profile, place in ((one.mean(axis=0), cols), (other.mean(axis=1), rows)):
        middle = (profile.min() + profile.max()) / 2
        first = int(np.argmax(profile > middle))
        crossing = first - (profile[first] - middle) / (profile[first] - profile[first - 1])
        assert abs(crossing + 0.5 - place) < 0.8


def test_depth_of_disparity_is_inverted_and_stretched() -> None:
    got = depth_anything.depth(torch.tensor([[8.0, 4.0, 0.0]]), 0.05)
    np.testing.assert_allclose(got.numpy(), [[0, 0.05 * 0.5 / 0.55, 1]], atol=1e-6)
    scaled = depth_anything.depth(torch.tensor([[8e3, 4e3, 0.0]]), 0.05)
    torch.testing.assert_close(got, scaled)
    for flat in (0.0, 3.0):
        assert depth_anything.depth(torch.full((2, 2), flat), 0.05).tolist() == [[0, 0], [0, 0]]


def photographs() -> list[Sample]:
    pictures = {"coffee": (90, 140), "chelsea": (70, 100), "rocket": (90, 141), "astronaut": (64, 64)}
    return [
        Sample(name, {"rgb": np.asarray(Image.fromarray(getattr(skimage.data, name)()).resize((w, h)))})
        for name, (h, w) in pictures.items()
    ]


def test_depth_anything_is_transformers_network_on_each_image_alone(tmp_path: Path) -> None:
    labeler = DepthAnything().tiny(tmp_path)
    network = depth_anything.network(labeler.checkpoint)
    samples = photographs()
    for sample, labels in zip(samples, labeler.load("cpu")(samples), strict=True):
        shape = _maps.shape_for(sample.size, 56, 14)
        assert shape[0] % 14 == shape[1] % 14 == 0
        assert min(shape) == 56
        image = Image.fromarray(sample.rgb).resize(shape[::-1], Image.Resampling.BICUBIC)
        pixels = _images.normalised([np.asarray(image)], _images.IMAGENET, "cpu")
        with torch.inference_mode():
            disparity = network(pixels).predicted_depth[None]
            back = F.interpolate(disparity, sample.size, mode="bilinear", antialias=True)[0, 0]
        assert back.std() > 1e-3 * back.max()
        np.testing.assert_allclose(labels["depth"], depth_anything.depth(back, 0.05).numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", [OmnidataDepth, OmnidataNormal, DepthAnything, MarigoldNormal])
def test_a_network_may_compute_in_another_precision(
    kind: type[Labeler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where it is half: here it is double, so that what mixes precisions raises and the rest agrees."""
    labeler, samples = kind().tiny(tmp_path), photographs()
    single = labeler.load("cpu")(samples)
    monkeypatch.setattr(_networks, "dtype_on", lambda device, precision: torch.float64)
    for one, other in zip(single, labeler.load("cpu")(samples), strict=True):
        for name, value in one.items():
            assert other[name].dtype == np.float32
            np.testing.assert_allclose(other[name], value, atol=1e-3)


def test_depth_in_metres_is_not_taken_for_disparity(tmp_path: Path) -> None:
    labeler = DepthAnything().tiny(tmp_path)
    config = Path(labeler.checkpoint).with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"depth_estimation_type": "metric", "max_depth": 20}))
    with pytest.raises(ValueError, match=r"expected a checkpoint of relative depth, .* is one of metric depth"):
        labeler.load("cpu")
    for setting, message in (({"side": 512}, "multiple of 14"), ({"epsilon": 0.0}, "0 < epsilon < 1")):
        with pytest.raises(ValueError, match=message):
            DepthAnything(**setting)  # type: ignore[arg-type]
    assert "NC" in depth_anything.LICENCES["Large"]


def test_marigold_is_diffusers_own_pipeline(tmp_path: Path) -> None:
    from diffusers import MarigoldNormalsPipeline

    folder = MarigoldNormal().tiny(tmp_path).checkpoint
    reference = MarigoldNormalsPipeline.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    reference.set_progress_bar_config(disable=True)
    ours = _marigold.network(folder, "", "t", "cpu", "float32", 3)
    generator = torch.Generator().manual_seed(0)
    for height, width in ((64, 64), (44, 100)):
        pixels = torch.rand((2, 3, height, width), generator=generator)
        noise = torch.randn((2, 4, -(-height // 8), -(-width // 8)), generator=generator)
        settings = {"num_inference_steps": 3, "processing_resolution": 0, "output_type": "pt", "batch_size": 2}
        theirs = reference(pixels, latents=noise, **settings).prediction
        with torch.inference_mode():
            found = ours(pixels, noise)
        assert theirs.std() > 0.05
        assert (found - theirs).abs().max() <= 1e-5


def test_noise_goes_by_the_key_and_not_by_the_place_in_a_batch(tmp_path: Path) -> None:
    labeler, samples = MarigoldNormal().tiny(tmp_path), photographs()
    loaded = labeler.load("cpu")
    first = [labels["normal"] for labels in loaded(samples)]
    for order in (samples[::-1], samples[1:], samples[:1]):
        for sample, labels in zip(order, loaded(order), strict=True):
            np.testing.assert_allclose(labels["normal"], first[samples.index(sample)], atol=1e-4)
    renamed = loaded([Sample("other", samples[0].values)])[0]["normal"]
    assert np.abs(renamed - first[0]).max() > 0.01
    assert not torch.equal(marigold_normal.noise(0, "a", (64, 64)), marigold_normal.noise(1, "a", (64, 64)))
    assert marigold_normal.noise(0, "a", (61, 100)).shape == (4, 8, 13)


def test_marigold_takes_a_folder_as_it_was_published_and_no_other(tmp_path: Path) -> None:
    labeler = MarigoldNormal().tiny(tmp_path)
    whole = Path(labeler.checkpoint)
    assert sum(file.stat().st_size for file in whole.rglob("*") if file.is_file()) < 300_000
    sample = photographs()[:1]
    expected = labeler.load("cpu")(sample)[0]["normal"]

    def copied(name: str, change: Callable[[Path], None]) -> MarigoldNormal:
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        change(folder)
        return MarigoldNormal(checkpoint=str(folder), side=64, steps=2)

    def older(folder: Path) -> None:
        new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        file = folder / "vae/diffusion_pytorch_model.safetensors"
        state = load_file(file)
        for now, then in new.items():
            state = {n.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): v for n, v in state.items()}
        assert any(".query." in name for name in state)
        save_file(state, file)

    def without(name: str, part: str) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            state = load_file(folder / name)
            save_file({n: v for n, v in state.items() if part not in n}, folder / name)

        return change

    def written(name: str, **values: Any) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

        return change

    old = copied("older", older)
    np.testing.assert_array_equal(old.load("cpu")(sample)[0]["normal"], expected)
    assert old.weights().sha256 != labeler.weights().sha256
    unet, encoder = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
    for number, (change, message) in enumerate(
        {
            without(unet, "conv_in.bias"): r"marigold_normal \(unet.*1 tensors missing: conv_in\.bias",
            without(encoder, "final_layer_norm.bias"): r"marigold_normal \(text_encoder.*1 tensors missing",
            written(
                "model_index.json", _class_name="MarigoldDepthPipeline"
            ): "expected .* of a MarigoldNormalsPipeline",
            written("scheduler/scheduler_config.json", _class_name="LCMScheduler"): "expected a DDIMScheduler",
            written("unet/config.json", _class_name="Evil"): "expected unet/config.json of a UNet2DConditionModel",
            lambda folder: (folder / "tokenizer/vocab.json").write_text('{"a": 1}'): "startoftext.* in tokenizer/vocab",
        }.items()
    ):
        with pytest.raises(ValueError, match=message):
            copied(f"broken{number}", change).load("cpu")
    with pytest.raises(FileNotFoundError, match="fp16"):
        MarigoldNormal(checkpoint=str(whole), variant="fp16").weights()


def test_marigold_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labeler = MarigoldNormal().tiny(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"marigold_normal needs diffusers: pip install '\.\[diffusion\]'"):
        labeler.load("cpu")
    for setting in ({"variant": "bf16"}, {"side": 60}, {"steps": 0}):
        with pytest.raises(ValueError, match="marigold_normal: expected"):
            MarigoldNormal(**setting)  # type: ignore[arg-type]
