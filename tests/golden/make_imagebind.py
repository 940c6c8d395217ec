"""Makes imagebind.npz with facebookresearch/ImageBind, commit 53680b02d7e37b19b124fa37bae4b6c98c38f5be.

    pip install einops iopath portalocker
    PYTHONPATH=.:CHECKOUT_OF_IMAGEBIND python tests/golden/make_imagebind.py

Its package imports pytorchvideo only to read films, so its modules are imported past `imagebind/__init__.py`.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import skimage.data
import torch

from labelers import imagebind_h14
from labelers._openclip import Shape

SHAPE = Shape(side=224, patch=14, width=160, layers=2, mlp=640, out=24)
HEADS = 2
SEED = 7
EVERY = 5
"""Of the 257 tokens every fifth is kept."""
SMALL = {
    f"{modality}_{what}": size
    for modality in ("text", "audio", "depth", "thermal", "imu")
    for what, size in (("embed_dim", 16), ("num_blocks", 1), ("num_heads", 1))
}


def photos() -> list[np.ndarray]:
    """512 x 512 and 300 x 451 pixels."""
    return [skimage.data.astronaut(), skimage.data.chelsea()]


def reference() -> types.ModuleType:
    """The reference's `imagebind.models.imagebind_model`, without its `__init__`."""
    found = importlib.util.find_spec("imagebind")
    assert found is not None
    assert found.submodule_search_locations is not None
    package = types.ModuleType("imagebind")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["imagebind"] = package
    return importlib.import_module("imagebind.models.imagebind_model")


def published_keys(module: types.ModuleType) -> list[str]:
    """Name and shape of every tensor of the published checkpoint, one a line."""
    linspace = torch.linspace
    torch.linspace = lambda *a, **k: linspace(*a, **k, device="cpu")  # its rates of DropPath are read as numbers
    with torch.device("meta"):
        state = module.imagebind_huge().state_dict()
    torch.linspace = linspace
    return [f"{name} {' '.join(map(str, value.shape))}".strip() for name, value in state.items()]


def main() -> None:
    """Run the reference's trunk and head on both photographs."""
    from torchvision import transforms

    module = reference()
    model = module.ImageBindModel(
        vision_embed_dim=SHAPE.width,
        vision_num_blocks=SHAPE.layers,
        vision_num_heads=HEADS,
        out_embed_dim=SHAPE.out,
        **SMALL,
    ).eval()
    state = {n: v for n, v in imagebind_h14.random_state(SHAPE, SEED).items() if ".vision." in n}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if ".vision." in name]
    preprocess = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.Resize((224, 224), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    with torch.inference_mode():
        batch = torch.stack([preprocess(photo) for photo in photos()])
        given = model.modality_preprocessors["vision"](vision=batch)
        tokens = model.modality_trunks["vision"](**given["trunk"])
        normed = model.modality_heads["vision"][0](tokens)
        embedding = model.modality_heads["vision"](tokens)
    np.savez_compressed(
        Path(__file__).with_name("imagebind.npz"),
        tokens=tokens[:, ::EVERY].numpy(),
        normed=normed[:, ::EVERY].numpy(),
        embedding=embedding.numpy(),
        published="\n".join(published_keys(module)),
        note=f"facebookresearch/ImageBind 53680b0, torch {torch.__version__}, {SHAPE}, seed {SEED}, two photographs",
    )


if __name__ == "__main__":
    main()
