"""Write tests/golden/omnidata.npz: what Omnidata's own code computes with seeded random weights.

Reference: EPFL-VILAB/omnidata at f69ff3a, folder omnidata_tools/torch on PYTHONPATH (the modules `modules.midas.*`),
which runs on the timm of constraints.txt. Nothing else is to be installed.

    PYTHONPATH=omnidata/omnidata_tools/torch:. python tests/golden/make_omnidata.py [--full]

The small network is built by the reference's own functions, with fewer channels; the names and shapes are those of the
published architecture. `--full` compares that one too (twice 123 M parameters, a minute or two), and writes nothing.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from modules.midas import blocks, dpt_depth, vit  # type: ignore[import-not-found]
from timm.layers import GroupNormAct, HybridEmbed, StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer

from labelers import _omnidata
from labelers._omnidata import HEAD_WIDTH, PATCH, Shape
from tests.test_omnidata import KEPT, SEEDS, SIZES, SMALL, pixels


def reference(shape: Shape) -> torch.nn.Module:
    """The reference's network of these sizes, put together by its own functions."""

    def encoder(*_: Any, **__: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
        backbone = ResNetV2(
            shape.blocks,
            channels=shape.stages,
            num_classes=0,
            global_pool="",
            preact=False,
            stem_chs=shape.stem,
            stem_type="same",
            conv_layer=partial(StdConv2dSame, eps=1e-8),
            norm_layer=partial(GroupNormAct, num_groups=shape.groups),
        )
        trunk = VisionTransformer(
            img_size=PATCH * shape.grid,
            patch_size=1,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.width // HEAD_WIDTH,
            mlp_ratio=shape.mlp / shape.width,
            num_classes=1000,
            embed_layer=partial(HybridEmbed, backbone=backbone, proj=True),
        )
        features = [*shape.stages[:2], *shape.neck]
        hooks = [0, 1, shape.depth * 3 // 4 - 1, shape.depth - 1]
        pretrained = vit._make_vit_b_rn50_backbone(
            trunk, features=features, hooks=hooks, vit_features=shape.width, use_readout="project"
        )
        return pretrained, blocks._make_scratch(features, shape.fusion)

    dpt_depth._make_encoder = encoder
    return dpt_depth.DPTDepthModel(num_channels=shape.channels, features=shape.fusion).eval()


def published(channels: int) -> torch.nn.Module:
    """The published architecture as the reference's demo builds it, without downloading the trunk's weights."""
    create = timm.create_model
    vit.timm.create_model = lambda name, pretrained: create(name.replace("resnet50", "r50_s16"), pretrained=False)
    dpt_depth._make_encoder = blocks._make_encoder
    return dpt_depth.DPTDepthModel(backbone="vitb_rn50_384", num_channels=channels).eval()


def answers(network: torch.nn.Module, channels: int) -> dict[str, np.ndarray]:
    out = {}
    for seed, size in enumerate(SIZES):
        x = pixels(size, seed)
        with torch.inference_mode():
            maps = network(x * 2 - 1 if channels == 1 else x)
        out[f"{channels}_{size[0]}x{size[1]}"] = maps.reshape(channels, *size).numpy()
    return out


def main() -> None:
    torch.set_num_threads(1)
    if "--full" in sys.argv:
        for channels, seed in SEEDS.items():
            network = published(channels)
            state = _omnidata.random_state(Shape(channels=channels), seed)
            network.load_state_dict(state)
            theirs, ours = answers(network, channels), answers(_omnidata.network(state, channels, "full"), channels)
            for name, there in theirs.items():
                error = np.abs(ours[name] - there).max() / np.abs(there).max()
                print(f"{name}: {there.min():.3g}..{there.max():.3g}, relative error {error:.2g}")
        return
    found: dict[str, np.ndarray] = {}
    for channels, seed in SEEDS.items():
        shape = Shape(channels=channels, **SMALL)
        network = reference(shape)
        network.load_state_dict(_omnidata.random_state(shape, seed))
        found |= {name: maps[(slice(None), *KEPT)] for name, maps in answers(network, channels).items()}
        for name, maps in found.items():
            print(name, maps.shape, maps.min(), maps.max())
    with torch.device("meta"):
        state = published(1).state_dict()
    found["keys"] = np.array([f"{name} {' '.join(map(str, value.shape))}".strip() for name, value in state.items()])
    found["note"] = np.array(
        f"EPFL-VILAB/omnidata f69ff3a, timm {timm.__version__}, torch {torch.__version__}; depth (1 channel) and "
        f"normals (3) of random weights, seeds {SEEDS}, network {SMALL}, images {SIZES}, every 8th pixel"
    )
    np.savez_compressed(Path(__file__).with_name("omnidata.npz"), **found)


if __name__ == "__main__":
    main()
