"""Writes tokenizers.npz: tokens and reconstructions of small tokenizers of every non-diffusion kind, by ml-4m; and the
names and shapes of all weights of the published ones.

The reference is https://github.com/apple/ml-4m at commit COMMIT below; beside this project's own packages it needs
einops. From the root of this repository, with the reference checked out at DIR:

    PYTHONPATH=. python tests/golden/make_tokenizers.py DIR

What the reference imports for its diffusion decoders and its data is replaced by empty modules. It knows three sizes
of ViT by name; the small one of `SMALL` is put beside them.
"""

from __future__ import annotations

import sys
import types
import warnings
import zlib
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from torch import Tensor

COMMIT = "cda590faa3b9f022c28537193d3e1650527646a3"
SEED = 5
BATCH = 2
EVERY = 17
"""Of a reconstruction every seventeenth number is kept."""

_VIT = {"enc_type": "vit_48x2x3_enc", "dec_type": "vit_48x2x3_dec", "post_mlp": True, "codebook_size": 96}
_VIT |= {"latent_dim": 8}
_MLP = {"enc_type": "BottleneckMLP/B_2-Wi_48", "dec_type": "BottleneckMLP/B_2-Wi_48", "quant_type": "memcodes"}
_MLP |= {"codebook_size": 40, "latent_dim": 48}

SMALL: dict[str, tuple[dict[str, Any], tuple[tuple[int, ...], ...]]] = {
    "semseg": ({**_VIT, "image_size": 32, "patch_size": 8, "n_channels": 6, "n_labels": 12}, ((32, 32), (48, 40))),
    "clip": ({**_VIT, "image_size": 64, "patch_size": 16, "n_channels": 20, "patch_proj": False}, ((4, 4), (6, 5))),
    "dinov2": ({**_VIT, "image_size": 56, "patch_size": 14, "n_channels": 24, "patch_proj": False}, ((4, 4), (8, 8))),
    "imagebind": (
        {**_VIT, "image_size": 70, "patch_size": 14, "n_channels": 40, "patch_proj": False}, ((5, 5), (4, 7))
    ),
    "sam": (
        {**_VIT, "image_size": 16, "patch_size": 4, "n_channels": 1, "latent_dim": 64, "out_conv": True}, ((16, 16),)
    ),
    "rgb": ({**_VIT, "image_size": 32, "patch_size": 8}, ((32, 32), (64, 64))),
    "rgb_sizes": (
        {
            **_VIT, "post_mlp": False, "image_size": 32, "image_size_enc": 48, "image_size_dec": 20, "patch_size": 8,
            "patch_size_dec": 4, "norm_codes": False, "undo_std": True,
        },
        ((32, 32),),
    ),
    "dinov2_global": ({**_MLP, "n_channels": 24, "num_codebooks": 16}, ((1, 1),)),
    "imagebind_global": ({**_MLP, "n_channels": 40, "num_codebooks": 16}, ((1, 1),)),
    "human_poses": ({**_MLP, "n_channels": 207, "num_codebooks": 8}, ((1, 1),)),
}  # fmt: skip
"""Settings under ml-4m's names by kind, and the (height, width) of inputs, the first that of the settings."""

RECIPES = {
    "semseg_4k": "semseg_coco/ViTB-ViTB_4k",
    "CLIP-B16_8k": "CLIP-B16/ViTB-ViTB_8k",
    "DINOv2-B14_8k": "DINOv2-B14/ViTB-ViTB_8k",
    "ImageBind-H14_8k": "ImageBind-H14/ViTB-ViTB_8k",
    "rgb_1k": "rgb/ViTB-ViTB_1k",
}
LONE_RECIPES = {
    "sam-instance_1k_64": "sam_instance/ViTB-ViTB_1k_224_64",
    "DINOv2-B14-global_8k_16_224": "DINOv2-B14-global/BMLP1024-BMLP1024_8k_224",
    "ImageBind-H14-global_8k_16_224": "ImageBind-H14-global/BMLP1024-BMLP1024_8k_224",
    "human-poses_1k_8": "human_poses/BMLP1024-BMLP1024_1k_224",
}
"""The published tokenizers and the recipes of ml-4m that train them."""

CHANNELS = {"semseg_coco": 64, "CLIP-B16": 512, "DINOv2-B14": 768, "ImageBind-H14": 1280, "rgb": 3, "sam_mask": 1}
CHANNELS |= {"DINOv2-B14-global": 768, "ImageBind-H14-global": 1280, "human_poses": 207}
"""num_channels of ml-4m's MODALITY_INFO."""


def inputs(name: str, size: tuple[int, int]) -> Tensor:
    """Seeded network input (BATCH, C, *size), or classes int64 (BATCH, *size)."""
    settings = SMALL[name][0]
    rng = np.random.default_rng((SEED, zlib.crc32(f"{name} {size}".encode())))
    if "n_labels" in settings:
        return torch.from_numpy(rng.integers(0, settings["n_labels"], (BATCH, *size)))
    if name == "sam":
        return torch.from_numpy((rng.uniform(size=(BATCH, 1, *size)) < 0.5).astype(np.float32))
    return torch.from_numpy(rng.normal(size=(BATCH, settings.get("n_channels", 3), *size)).astype(np.float32))


def random_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random weights of the same names and shapes, each by its name; tables of positions stay as they are."""
    found = {}
    for name, value in state.items():
        rng = np.random.default_rng((SEED, zlib.crc32(name.encode())))
        draw = rng.normal(size=tuple(value.shape)).astype(np.float32)
        if name.endswith(("pos_emb", "initted")):
            found[name] = value
            continue
        if value.ndim == 1:
            draw = 0.2 * draw + (name.endswith(("weight", "gamma", "cluster_size")) or 0.0)
        elif not name.startswith("quantize") and name != "cls_emb.weight":
            draw *= 1.5 / np.sqrt(np.prod(value.shape[1:]))
        found[name] = torch.from_numpy(draw.astype(np.float32))
    if "quantize._codebook.embed" in found:
        embed = found["quantize._codebook.embed"]
        found["quantize._codebook.embed"] = embed / embed.norm(dim=-1, keepdim=True)
    return found


def layout(state: dict[str, Tensor]) -> str:
    """Name and shape of every tensor, one a line, sorted."""
    return "\n".join(sorted(f"{name} {' '.join(map(str, value.shape))}" for name, value in state.items()))


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def reference(folder: Path) -> types.ModuleType:
    """The reference's `fourm.vq.vqvae`, with the small ViT of `SMALL` among its sizes."""
    empty = ["diffusers", "diffusers.schedulers", "diffusers.schedulers.scheduling_utils", "fourm.data"]
    empty += ["fourm.utils.generation_datasets", "fourm.vq.scheduling", "fourm.vq.models.uvit"]
    empty += ["fourm.vq.models.controlnet", "fourm.vq.models.unet", "fourm.vq.models.unet.unet"]
    sys.modules |= {name: _Empty(name) for name in empty}
    sys.path.insert(0, str(folder))
    from fourm.vq import vqvae
    from fourm.vq.models import vit_models

    size = {"dim_tokens": 48, "depth": 2, "num_heads": 3, "qkv_bias": True}
    vit_models.vit_48x2x3_enc = partial(vit_models.ViTEncoder, **size)
    vit_models.vit_48x2x3_dec = partial(vit_models.ViTDecoder, **size)
    return vqvae


def recipe(folder: Path, name: str) -> dict[str, Any]:
    """The constructor's settings that ml-4m's trainer makes of a recipe, as its `get_model` and argument parser do."""
    args = {"post_mlp": True, "norm_codes": True, "out_conv": False, "patch_size": 16, "num_codebooks": 1}
    args |= yaml.safe_load((folder / "cfgs/default/tokenization/vqvae" / f"{name}.yaml").read_text())
    domain = args["domain"]
    names = ("post_mlp", "patch_size", "codebook_size", "num_codebooks", "latent_dim", "norm_codes", "out_conv")
    return {
        **{key: args[key] for key in names},
        "image_size": args["mask_size"] if domain == "sam_mask" else args.get("input_size_max", 512),
        "n_channels": CHANNELS[domain],
        "n_labels": 134 if domain == "semseg_coco" else None,
        "enc_type": args["encoder_type"],
        "dec_type": args["decoder_type"],
        "patch_proj": not domain.startswith(("CLIP", "DINO", "ImageBind")),
        "quant_type": args["quantizer_type"],
        "sync_codebook": False,
    }


def published(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings of every published tokenizer without a diffusion decoder; 4M has 16 ids of a global feature."""
    found = {f"{name}_{size}": f"{path}_{size}" for name, path in RECIPES.items() for size in ("224", "224-448")}
    found = {name: f"{path}_CLIPB16-5.0" if name.startswith("rgb") else path for name, path in found.items()}
    settings = {name: recipe(folder, path) for name, path in (found | LONE_RECIPES).items()}
    for name in settings:
        if "-global" in name:
            settings[name]["num_codebooks"] = 16
    return settings


def main(folder: Path) -> None:
    """Write the file beside this one."""
    warnings.simplefilter("ignore")  # of deprecated names in the reference
    module = reference(folder)
    arrays: dict[str, np.ndarray] = {}
    for name, (settings, sizes) in SMALL.items():
        model = module.VQVAE(**settings, sync_codebook=False).eval()
        model.load_state_dict(random_state(model.state_dict()))
        for size in sizes:
            with torch.no_grad():
                ids = model.tokenize(inputs(name, size))
                out = model.decode_tokens(ids)
            key = f"{name} {size[0]}x{size[1]}"
            print(f"{key}: ids {tuple(ids.shape)}, {len(ids.unique())} different; out {tuple(out.shape)}")
            arrays[f"{key} ids"] = ids.numpy().astype(np.int16)
            arrays[f"{key} out"] = out.flatten()[::EVERY].numpy()
            arrays[f"{key} shape"] = np.array(out.shape)
    for name, settings in published(folder).items():
        # The rates of its DropPath are read as numbers, which meta tensors have not.
        with torch.device("meta"), mock.patch.object(torch, "linspace", partial(torch.linspace, device="cpu")):
            state = module.VQVAE(**settings).state_dict()
        arrays[f"layout {name}"] = np.frombuffer(layout(state).encode(), np.uint8)
    arrays["note"] = np.array(
        f"apple/ml-4m {COMMIT}, fourm.vq.VQVAE with random weights (seed {SEED}): ids and every {EVERY}th number of "
        "the reconstruction of seeded input, by kind and input size; layouts of the published settings as text"
    )
    path = Path(__file__).with_name("tokenizers.npz")
    np.savez_compressed(path, **arrays)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
