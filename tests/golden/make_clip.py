"""Makes clip.npz with apple/ml-4m's copy of OpenAI's CLIP, whose dense features its tokenizers were trained on.

PYTHONPATH=.:CHECKOUT_OF_ML_4M python tests/golden/make_clip.py

The one file of it that is needed, `fourm/utils/clip/model.py`, is loaded alone.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import skimage.data
import torch

from labelers import _checkpoints, _openclip

SHAPE = _openclip.Shape(side=224, patch=16, width=128, layers=2, mlp=512, out=24)
HEADS = 2
SEED = 13


def photos() -> list[np.ndarray]:
    """512 x 512 and 300 x 451 pixels."""
    return [skimage.data.astronaut(), skimage.data.chelsea()]


def random_state() -> dict[str, torch.Tensor]:
    """Random tensors of a small CLIP under the published names."""
    return _checkpoints.randomised(_openclip.blank(SHAPE, _openclip.Kind()).state_dict(), SEED)


def main() -> None:
    """Run the reference on both photographs."""
    from torchvision import transforms

    (file,) = (p for folder in sys.path if (p := Path(folder) / "fourm" / "utils" / "clip" / "model.py").is_file())
    spec = importlib.util.spec_from_file_location("clip_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.VisionTransformer(SHAPE.side, SHAPE.patch, SHAPE.width, SHAPE.layers, HEADS, SHAPE.out).eval()
    model.load_state_dict(random_state())
    preprocess = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.Resize((224, 224), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    with torch.inference_mode():
        batch = torch.stack([preprocess(photo) for photo in photos()])
        dense = model(batch, return_final_tokens_no_cls=True)
    np.savez_compressed(
        Path(__file__).with_name("clip.npz"),
        dense=dense.numpy(),
        note=f"apple/ml-4m fourm/utils/clip/model.py, torch {torch.__version__}, {SHAPE}, seed {SEED}, two photographs",
    )


if __name__ == "__main__":
    main()
