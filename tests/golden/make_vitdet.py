"""Write vitdet.npz: what detectron2's own ViTDet computes with the random weights of tests/test_vitdet.py.

The reference is facebookresearch/detectron2 at commit 02b5c4e295e9, its folders detectron2, configs and projects
unpacked somewhere (CHECKOUT); its compiled extension is not needed, as ROIAlign and NMS are torchvision's there too.
Beside this project's own packages:

    pip install fvcore iopath omegaconf hydra-core yacs tabulate portalocker termcolor cloudpickle
    ln -s ../../configs CHECKOUT/detectron2/model_zoo/configs      # what its setup.py does
    PYTHONPATH=CHECKOUT:. python tests/golden/make_vitdet.py CHECKOUT tests/golden/vitdet.npz

It also writes the names and shapes of the published checkpoint: those of its configuration of ViTDet-H.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import ShapeSpec

from labelers import _vitdet_random
from tests.test_vitdet import SEED, SMALL, photographs, sampled

COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"


def configuration(checkout: Path) -> Any:
    file = checkout / "projects/ViTDet/configs/COCO/cascade_mask_rcnn_vitdet_h_75ep.py"
    return LazyConfig.load(str(file)).model


def published(checkout: Path) -> dict[str, str]:
    """Names and shapes of ViTDet-H, as text."""
    linspace = torch.linspace
    on_cpu = mock.patch("torch.linspace", lambda *args: linspace(*args, device="cpu"))
    with torch.device("meta"), on_cpu:
        model = instantiate(configuration(checkout))
    return {name: "x".join(map(str, value.shape)) for name, value in model.state_dict().items()}


def small(checkout: Path) -> Any:
    """The same model in the small shape of the test, without its head for masks."""
    config = configuration(checkout)
    net, heads = config.backbone.net, config.roi_heads
    net.embed_dim, net.num_heads, net.depth = SMALL.width, SMALL.heads, SMALL.depth
    net.mlp_ratio = SMALL.hidden / SMALL.width
    net.window_block_indexes = [i for i in range(SMALL.depth) if (i + 1) % SMALL.every]
    assert (net.window_size, net.img_size, net.patch_size) == (SMALL.window, SMALL.grid * SMALL.patch, SMALL.patch)
    config.backbone.out_channels = config.proposal_generator.head.in_channels = SMALL.channels
    for head, predictor in zip(heads.box_heads, heads.box_predictors, strict=True):
        head.input_shape = ShapeSpec(channels=SMALL.channels, height=7, width=7)
        head.conv_dims = [SMALL.channels] * SMALL.convolutions
        head.fc_dims = [SMALL.full]
        predictor.input_shape = ShapeSpec(channels=SMALL.full)
    heads.mask_in_features = heads.mask_pooler = heads.mask_head = None
    model = instantiate(config)
    state = {n: v for n, v in _vitdet_random.state(SMALL, SEED).items() if "mask_head" not in n}
    model.load_state_dict(state, strict=True)
    return model.eval()


def main() -> None:
    checkout, out = map(Path, sys.argv[1:])
    model = small(checkout)
    resize = ResizeShortestEdge(1024, 1024)
    inputs = []
    for rgb in photographs():
        pixels = resize.get_transform(rgb).apply_image(rgb)
        inputs.append(
            {
                "image": torch.from_numpy(pixels.astype("float32").transpose(2, 0, 1)),
                "height": rgb.shape[0],
                "width": rgb.shape[1],
            }
        )
    golden: dict[str, Any] = {}
    with torch.inference_mode():
        images = model.preprocess_image(inputs)
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, None)
        found = model(inputs)
    for name, values in features.items():
        golden[f"feature_{name}"] = sampled(values)
    for i, (some, one) in enumerate(zip(proposals, found, strict=True)):
        golden[f"proposals_{i}"] = some.proposal_boxes.tensor.numpy()
        golden[f"logits_{i}"] = some.objectness_logits.numpy()
        result = one["instances"]
        golden[f"boxes_{i}"] = result.pred_boxes.tensor.numpy()
        golden[f"scores_{i}"] = result.scores.numpy()
        golden[f"classes_{i}"] = result.pred_classes.numpy().astype(np.uint8)
        print(len(some), "proposals", len(result), "objects of scores", result.scores[[0, -1]])
    sizes = np.random.default_rng(0).integers(1, 5000, (300, 2))
    golden["sizes"] = sizes.astype(np.uint16)
    golden["resized"] = np.array([resize.get_output_shape(*map(int, size), 1024, 1024) for size in sizes], np.uint16)
    shapes = published(checkout)
    golden["published"] = np.array([f"{name} {shape}" for name, shape in shapes.items()])
    golden["note"] = np.array(
        f"facebookresearch/detectron2 {COMMIT}, torch {torch.__version__}; {SMALL}, seed {SEED}; "
        "cascade_mask_rcnn_vitdet_h_75ep.py with these widths, at 1024 x 1024"
    )
    np.savez_compressed(out, **golden)
    print(out.stat().st_size, "bytes;", len(shapes), "published tensors")


if __name__ == "__main__":
    main()
