"""Writes tests/golden/huggingface.npz: what an older transformers makes of the networks of `labelers/`.

    PYTHONPATH=. python tests/golden/make_huggingface.py FOLDER              # tiny networks, by what is installed
    PYTHONPATH=OLD:. python tests/golden/make_huggingface.py FOLDER golden   # the same networks, by the older version

Reference: transformers 4.56.2 (with huggingface_hub 0.34.4 and tokenizers 0.22.0), which names and computes as the
published checkpoints were saved; `pip install --no-deps --target OLD` of the three. For each network the file holds
the names and shapes of all tensors of the published size, and what a tiny one of the same format computes, in float64:
random networks magnify float32's own rounding to 1e-5, which would hide a difference of that size.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"mask2former": (96, 64), "eomt": (64, 64), "dfine": (640, 640)}
"""Heights and widths of the images that the tiny networks get."""


def pixels(name: str) -> np.ndarray:
    """A batch of two random images, float32 (2, 3, h, w)."""
    shape = (2, 3, *SIZES[name])
    return np.random.default_rng(7).random(shape, dtype=np.float32)


def tiny(folder: Path) -> None:
    """The tiny checkpoints that both versions read."""
    from labelers.dfine import DFine
    from labelers.eomt import Eomt
    from labelers.mask2former import Mask2Former

    for labeler in (Mask2Former(), Eomt(), DFine()):
        labeler.tiny(folder)


def golden(folder: Path) -> None:
    """What the older version makes of the published sizes and of the tiny checkpoints."""
    import torch

    # Packages of the newer installation that the older one would trip over.
    find = importlib.util.find_spec
    absent = ("datasets", "accelerate", "peft", "diffusers")
    importlib.util.find_spec = lambda name, *rest: None if name in absent else find(name, *rest)  # type: ignore[assignment]
    import transformers
    from safetensors.torch import load_file

    assert transformers.__version__ == "4.56.2", transformers.__version__
    out: dict[str, Any] = {
        "note": f"transformers {transformers.__version__}, torch {torch.__version__}; "
        "inputs of default_rng(7) of the sizes in make_huggingface.py, tiny networks of seeds 4, 5 and 6"
    }
    for name, (kind, config) in _published().items():
        with torch.device("meta"):
            state = kind(config).state_dict()
        out[f"{name}.config"] = json.dumps({**config.to_diff_dict(), "model_type": config.model_type})
        out[f"{name}.names"] = np.array(list(state))
        out[f"{name}.shapes"] = np.array(["x".join(map(str, value.shape)) for value in state.values()])
        network = kind(type(config).from_pretrained(folder / name, local_files_only=True)).eval()
        # Not from_pretrained: it would leave buffers that the file lacks uninitialised.
        left = network.load_state_dict(load_file(folder / name / "model.safetensors"), strict=False)
        assert not left.unexpected_keys, left
        print(name, "not in the file:", left.missing_keys)
        with torch.no_grad():
            found = network.double()(pixel_values=torch.from_numpy(pixels(name)).double())
        for field in ("masks_queries_logits", "class_queries_logits", "logits", "pred_boxes"):
            if field in found:
                out[f"{name}.{field}"] = found[field].float().numpy()
    np.savez_compressed(Path(__file__).with_name("huggingface.npz"), **out)


def _published() -> dict[str, tuple[Any, Any]]:
    import transformers as t

    swin = t.SwinConfig(
        image_size=384,
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=12,
        drop_path_rate=0.3,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    mask2former = t.Mask2FormerConfig(backbone_config=swin, num_labels=133)
    eomt = t.EomtConfig(num_labels=133)
    # As the library's own conversion script has it for dfine_x_obj2coco.
    backbone = t.HGNetV2Config(
        embedding_size=32,
        hidden_sizes=[256, 512, 1024, 2048],
        stem_channels=[3, 32, 64],
        stage_in_channels=[64, 128, 512, 1024],
        stage_mid_channels=[64, 128, 256, 512],
        stage_out_channels=[128, 512, 1024, 2048],
        stage_num_blocks=[1, 2, 5, 2],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        stage_numb_of_layers=[6, 6, 6, 6],
        out_indices=[2, 3, 4],
    )
    dfine = t.DFineConfig(
        backbone_config=backbone,
        num_labels=80,
        encoder_in_channels=[512, 1024, 2048],
        encoder_hidden_dim=384,
        encoder_ffn_dim=2048,
        decoder_n_points=[3, 6, 3],
        decoder_in_channels=[384, 384, 384],
    )
    return {
        "mask2former": (t.Mask2FormerForUniversalSegmentation, mask2former),
        "eomt": (t.EomtForUniversalSegmentation, eomt),
        "dfine": (t.DFineForObjectDetection, dfine),
    }


if __name__ == "__main__":
    (golden if sys.argv[2:] == ["golden"] else tiny)(Path(sys.argv[1]))
