"""Teachers of features: the plain call of the library, one image at a time in float32, beside ours in batches.

Both have the same random weights and the real architectures (on a CPU of ViT-H only two of its 32 blocks), the same
photographs, squeezed and normalised alike, and end with float16 arrays in memory. The plain call is what the library's
readme shows: Pillow image, its preprocessing, a batch of one. ImageBind's own package is not among our dependencies,
so open_clip's tower stands for it; both have the same layers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks._null import photograph
from dataengine.labeler import Labeler, Staged
from dataengine.sample import Sample
from labelers import _checkpoints, _images, _openclip, dinov2_b14, imagebind_h14
from labelers.clip_b16 import ClipB16
from labelers.dinov2_b14 import DinoV2
from labelers.dinov3 import DinoV3
from labelers.imagebind_h14 import ImageBindH14
from labelers.openclip_h14 import KIND, OpenClipH14
from labelers.siglip2 import SigLip2

SIDE = 224
THREADS = 4
"""That prepare images for ours, as the engine's do."""
H14_LAYERS = 32
H14_LAYERS_CPU = 2

Plain = Callable[[Image.Image], Any]
"""A script's work on one image: tokens (1, n, c) on its device."""


@dataclass(frozen=True)
class Case:
    """A labeler, its checkpoint written, and the plain call with the same weights."""

    labeler: Any
    plain: Plain


def measure(quick: bool) -> dict[str, Any]:
    """By labeler the images a second of the plain call and of ours, their ratio, and how far their features differ.

    On a GPU ours runs in its default precision, in float32, and, unless quick, compiled.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = {("cpu", True): 2, ("cpu", False): 16, ("cuda", True): 64, ("cuda", False): 512}[device, quick]
    images = [photograph(i) for i in range(count)]
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "images": count}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder), device):
            figures[case.labeler.name] = _compared(case, images, device, quick)
            Path(case.labeler.checkpoint).unlink()
            if device == "cuda":
                torch.cuda.empty_cache()
    return figures


def _compared(case: Case, images: Sequence[np.ndarray], device: str, quick: bool) -> dict[str, Any]:
    plainly, expected = _plain_rate(case.plain, images, device)
    out: dict[str, Any] = {"plain": plainly}
    variants = {"ours": case.labeler}
    if device == "cuda":
        variants["ours_float32"] = replace(case.labeler, precision="float32")
        if not quick:
            variants["ours_compiled"] = replace(case.labeler, compiled=True)
    for name, labeler in variants.items():
        rate, found = _our_rate(labeler, images, device)
        out[name] = rate
        out[f"{name}_ratio"] = rate / plainly
        out[f"{name}_difference"] = _difference(found, expected)
    return out


def _plain_rate(plain: Plain, images: Sequence[np.ndarray], device: str) -> tuple[float, list[np.ndarray]]:
    import torch

    with torch.inference_mode():
        for _ in range(3 if device == "cuda" else 1):
            plain(Image.fromarray(images[0]))
        _wait(device)
        began = time.perf_counter()
        out = [plain(Image.fromarray(rgb))[0].half().cpu().numpy() for rgb in images]
        return len(images) / (time.perf_counter() - began), out


def _our_rate(labeler: Labeler, images: Sequence[np.ndarray], device: str) -> tuple[float, list[np.ndarray]]:
    loaded = labeler.load(device)
    assert isinstance(loaded, Staged)
    samples = [Sample(str(i), {"rgb": rgb}) for i, rgb in enumerate(images)]
    size = labeler.batch_size
    for _ in range(3 if device == "cuda" else 1):  # a whole batch, for what a GPU compiles or chooses by its shape
        loaded(samples[: size if device == "cuda" else 1])
    _wait(device)
    with ThreadPoolExecutor(THREADS) as threads:
        began = time.perf_counter()
        prepared = [threads.submit(loaded.prepare, sample) for sample in samples]
        out = []
        for start in range(0, len(samples), size):
            labels = loaded.label([future.result() for future in prepared[start : start + size]])
            out += [value[labeler.emits[0]] for value in labels]
        seconds = time.perf_counter() - began
    return len(images) / seconds, [value.reshape(-1, value.shape[-1]) for value in out]


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest difference by the largest value."""
    ours, theirs = (np.stack(list(values)).astype(np.float32) for values in (found, expected))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def cases(folder: Path, device: str) -> Iterator[Case]:
    """Each teacher, one after the other, so that one network is in memory at a time."""
    yield _clip(folder, device)
    yield _dinov2(folder, device)
    layers = H14_LAYERS if device == "cuda" else H14_LAYERS_CPU
    shape = _openclip.Shape(side=SIDE, patch=14, width=1280, layers=layers, mlp=5120, out=1024)
    yield _imagebind(folder, device, shape)
    yield _openclip_h14(folder, device, shape)
    yield _siglip2(folder, device)
    yield _dinov3(folder, device)


def _randomised(network: Any, device: str) -> dict[str, Any]:
    """Random weights, in the network and returned."""
    state = _checkpoints.randomised(network.state_dict(), seed=0)
    network.load_state_dict(state)
    network.eval().requires_grad_(False).to(device)
    return state


def _saved(state: dict[str, Any], file: Path, prefix: str = "") -> str:
    from safetensors.torch import save_file

    save_file({f"{prefix}{name}": value.contiguous() for name, value in state.items()}, file)
    return str(file)


def _transform(statistics: _images.Statistics, device: str, bilinear: bool = False) -> Callable[[Image.Image], Any]:
    from torchvision import transforms

    mode = transforms.InterpolationMode.BILINEAR if bilinear else transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize((SIDE, SIDE), mode), transforms.ToTensor(), transforms.Normalize(*statistics)]
    preprocess = transforms.Compose(steps)
    return lambda image: preprocess(image)[None].to(device)


def _clip(folder: Path, device: str) -> Case:
    import open_clip

    config = open_clip.get_model_config("ViT-B-16-quickgelu")
    visual: Any = open_clip.CLIP(**config | {"text_cfg": config["text_cfg"] | {"layers": 1}}).visual
    visual.output_tokens = True
    preprocess = _transform(_images.CLIP, device)
    checkpoint = _saved(_randomised(visual, device), folder / "clip.safetensors", _openclip.PREFIX)
    labeler = ClipB16(checkpoint=checkpoint, normalisation="native")
    return Case(labeler, lambda image: visual(preprocess(image))[1] @ visual.proj)


def _dinov2(folder: Path, device: str) -> Case:
    import timm
    import torch

    model: Any = timm.create_model("vit_base_patch14_dinov2", pretrained=False, num_classes=0, img_size=SIDE)
    positions = {"pos_embed": torch.empty(1, 1 + 37 * 37, 768)}  # published for 518 pixels
    state = _checkpoints.randomised(model.state_dict() | positions, seed=0)
    torch.save(state, folder / "dinov2.pth")
    model.load_state_dict(state | {"pos_embed": dinov2_b14.positions(state["pos_embed"], SIDE // 14)})
    model.eval().requires_grad_(False).to(device)
    preprocess = _transform(_images.IMAGENET, device)
    labeler = DinoV2(checkpoint=str(folder / "dinov2.pth"))
    return Case(labeler, lambda image: model.forward_features(preprocess(image))[:, 1:])


def _imagebind(folder: Path, device: str, shape: _openclip.Shape) -> Case:
    import torch

    state = imagebind_h14.random_state(shape, seed=0)
    torch.save(state, folder / "imagebind.pth")
    tower = imagebind_h14.network(state).to(device)
    preprocess = _transform(_images.CLIP, device)
    labeler = ImageBindH14(checkpoint=str(folder / "imagebind.pth"), normalisation="native")
    return Case(labeler, lambda image: tower(preprocess(image))[1])


def _openclip_h14(folder: Path, device: str, shape: _openclip.Shape) -> Case:
    tower = _openclip.blank(shape, KIND).to_empty(device="cpu")
    checkpoint = _saved(_randomised(tower, device), folder / "openclip.safetensors", _openclip.PREFIX)
    preprocess = _transform(_images.CLIP, device)
    labeler = OpenClipH14(checkpoint=checkpoint, normalisation="native")
    return Case(labeler, lambda image: tower(preprocess(image))[1])


def _siglip2(folder: Path, device: str) -> Case:
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    model: Any = SiglipVisionModel(SiglipVisionConfig())
    processor: Any = SiglipImageProcessorPil(resample=Image.Resampling.BILINEAR)
    checkpoint = _saved(_randomised(model, device), folder / "siglip2.safetensors", "vision_model.")

    def plain(image: Image.Image) -> Any:
        return model(**processor(images=image, return_tensors="pt").to(device)).last_hidden_state

    return Case(SigLip2(checkpoint=checkpoint), plain)


def _dinov3(folder: Path, device: str) -> Case:
    import timm

    model: Any = timm.create_model("vit_base_patch16_dinov3", pretrained=False, num_classes=0)
    checkpoint = _saved(_randomised(model, device), folder / "dinov3.safetensors")
    preprocess = _transform(_images.IMAGENET, device, bilinear=True)
    labeler = DinoV3(checkpoint=checkpoint)
    return Case(labeler, lambda image: model.forward_features(preprocess(image))[:, model.num_prefix_tokens :])
