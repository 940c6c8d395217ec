"""Writes hmr2.npz: what 4D-Humans itself computes of seeded random weights and of photographs.

The reference is https://github.com/shubham-goel/4D-Humans at commit 6ec7965; beside this project's own packages it
needs einops and yacs. From the root of this repository, with the reference checked out at DIR:

    PYTHONPATH=. python tests/golden/make_hmr2.py DIR

Only its vision transformer, its SMPL decoder head and its ViTDetDataset are imported: the rest wants a renderer and the
body model.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import skimage.data
import torch
from yacs.config import CfgNode

from labelers import _hmr2

SEED = 11
SMALL = _hmr2.Shape(width=160, depth=2, mlp=320, decoder=96, decoder_depth=2, decoder_mlp=64, decoder_inner=128)
"""Two attention heads of the published widths in both halves."""
PIXELS = (3, 3, 256, 256)
STEP = 8
"""Every so many rows and columns of a crop are kept."""


def photographs() -> list[tuple[np.ndarray, list[list[float]]]]:
    """Images uint8 (h, w, 3), none of them square, and boxes x0 y0 x1 y1 in pixels: small, large, cut, wide."""
    large = np.repeat(np.repeat(skimage.data.coffee(), 3, axis=0), 3, axis=1)
    return [
        (skimage.data.coffee(), [[210.3, 40.7, 270.9, 190.2], [5.5, 2.25, 580.75, 395.5]]),
        (skimage.data.chelsea(), [[0.0, 0.0, 120.5, 300.0]]),
        (large, [[300.2, 20.8, 800.6, 1190.4], [12.0, 100.0, 1790.0, 1100.0], [900.0, 500.0, 990.0, 700.0]]),
    ]


def reference(folder: Path) -> types.SimpleNamespace:
    """The parts of the reference, imported without what its packages would import besides."""
    for name in ("", ".utils", ".models", ".models.heads", ".models.backbones", ".models.components", ".datasets"):
        module = types.ModuleType("hmr2" + name)
        module.__path__ = [str(folder / "hmr2" / name.replace(".", "/").strip("/"))]
        sys.modules["hmr2" + name] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return types.SimpleNamespace(
            vit=importlib.import_module("hmr2.models.backbones.vit"),
            head=importlib.import_module("hmr2.models.heads.smpl_head"),
            dataset=importlib.import_module("hmr2.datasets.vitdet_dataset"),
        )


def settings(folder: Path, shape: _hmr2.Shape) -> CfgNode:
    """What the reference reads of its configuration, as published but for the sizes."""
    mean = folder / "mean.npz"
    np.savez(mean, pose=np.zeros(144), shape=np.zeros(10), cam=np.zeros(3))
    decoder = {"dim": shape.decoder, "depth": shape.decoder_depth, "heads": shape.decoder_inner // 64, "dim_head": 64}
    decoder |= {"mlp_dim": shape.decoder_mlp, "dropout": 0.0, "emb_dropout": 0.0, "norm": "layer"}
    decoder |= {"context_dim": shape.width}
    model = {"IMAGE_SIZE": 256, "IMAGE_MEAN": [0.485, 0.456, 0.406], "IMAGE_STD": [0.229, 0.224, 0.225]}
    model |= {"BBOX_SHAPE": [192, 256], "SMPL_HEAD": {"TYPE": "transformer_decoder", "TRANSFORMER_DECODER": decoder}}
    return CfgNode({"MODEL": model, "SMPL": {"NUM_BODY_JOINTS": 23, "MEAN_PARAMS": str(mean)}})


def network(ref: types.SimpleNamespace, cfg: CfgNode, shape: _hmr2.Shape) -> torch.nn.ModuleDict:
    """The reference's trunk and head."""
    trunk = ref.vit.ViT(
        img_size=(256, 192),
        patch_size=16,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.width // 80,
        ratio=1,
        mlp_ratio=shape.mlp / shape.width,
        qkv_bias=True,
        drop_path_rate=0.55,
    )
    return torch.nn.ModuleDict({"backbone": trunk, "smpl_head": ref.head.SMPLTransformerDecoderHead(cfg)}).eval()


def main() -> None:
    """Run the reference and write the file."""
    import tempfile

    folder = Path(sys.argv[1])
    ref = reference(folder)
    out: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        cfg = settings(Path(scratch), SMALL)
        made = network(ref, cfg, SMALL)
        made.load_state_dict(_hmr2.kept(_hmr2.random_state(SMALL, SEED)))

        def bodies(pixels: torch.Tensor) -> dict[str, np.ndarray]:
            params, camera, _ = made["smpl_head"](made["backbone"](pixels[:, :, :, 32:-32]))
            rotations = torch.cat([params["global_orient"], params["body_pose"]], dim=1)
            return {"rotations": rotations.numpy(), "betas": params["betas"].numpy(), "cameras": camera.numpy()}

        noise = torch.randn(PIXELS, generator=torch.Generator().manual_seed(SEED))
        out |= {f"noise/{name}": value for name, value in bodies(noise).items()}
        crops = []
        for image, boxes in photographs():
            dataset = ref.dataset.ViTDetDataset(cfg, image[:, :, ::-1], np.array(boxes))
            crops += [torch.from_numpy(dataset[i]["img"]) for i in range(len(boxes))]
        out |= {f"photographs/{name}": value for name, value in bodies(torch.stack(crops)).items()}
        out["photographs/crops"] = np.stack([c[:, ::STEP, 32:-32:STEP].numpy() for c in crops])
        full = _hmr2.Shape()
        whole = network(ref, settings(Path(scratch), full), full)
    keys = {name: list(value.shape) for name, value in whole.state_dict().items()}
    note = (
        f"shubham-goel/4D-Humans 6ec7965: ViT, SMPLTransformerDecoderHead, ViTDetDataset; torch {torch.__version__}; "
        f"seed {SEED}; {SMALL}; noise {PIXELS}; crops every {STEP}th row and column of the seen 256 x 192"
    )
    target = Path(__file__).with_name("hmr2.npz")
    np.savez_compressed(target, note=np.array(note), keys=np.array(json.dumps(keys)), **out)
    print(note, f"{target.stat().st_size} bytes", sep="\n")


if __name__ == "__main__":
    main()
