"""ml-4m's save_vq_tokens.py, restated step by step, on its own tokenizers or on ours made to compute as those do."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dataengine.geometry import Crop, crops_of
from labelers import _images, dinov2_b14
from labelers.dinov2_b14 import DinoV2
from model.tokenizers._vit import Attention, vit_size
from model.tokenizers.vqvae import VQVAE

BATCH = 64
SIDE = 224
DENSE, GLOBAL = "DINOv2-B14", "DINOv2-B14-global"


class Theirs:
    """save_vq_tokens.py, for every tokenizer in turn."""

    def __init__(self, files: Path, teacher: DinoV2, names: Sequence[str], reference: Path | None) -> None:
        self.kind = "restated" if reference is None else "ml-4m"
        size = vit_size(VQVAE.load(files / f"{names[0]}.safetensors").config.enc_type, "enc")
        vqvae = None if reference is None else imported(reference, size)
        self.models = {name: _theirs(files / f"{name}.safetensors", vqvae) for name in names}
        trunk = dinov2_b14.network(torch.load(teacher.checkpoint, weights_only=True), SIDE)
        self.teacher = trunk

    @torch.no_grad()
    def run(self, files: Path, out: Path) -> None:
        """One pass for each tokenizer."""
        for name in self.models:
            task = "rgb" if name in (DENSE, GLOBAL) else name
            (out / name).mkdir(parents=True)
            paths = sorted((files / task).iterdir())
            for start in range(0, len(paths), BATCH):
                part = paths[start : start + BATCH]
                crops = [self.crops(name, task, path, files) for path in part]
                ids = torch.cat([self.tokens(name, batch) for batch in torch.cat(crops).split(BATCH)])
                rows = ids.numpy().astype(np.int16).reshape(len(part), len(crops[0]), -1)
                for path, row in zip(part, rows, strict=True):
                    np.save(out / name / f"{path.stem}.npy", row)

    def crops(self, name: str, task: str, path: Path, files: Path) -> Tensor:
        """Network input (crops, ...) of one image: each crop from a copy of it, by Pillow, then as floats."""
        image = Image.open(path)
        image = image.convert("RGB") if task in ("rgb", "normal") else image
        settings = np.load(files / "crop_settings" / f"{path.stem}.npy")
        return torch.stack([network_input(name, task, image.copy(), crop) for crop in crops_of(settings)])

    @torch.no_grad()
    def tokens(self, name: str, x: Tensor) -> Tensor:
        """Ids (n, tokens)."""
        if name in (DENSE, GLOBAL):
            features = self.teacher(x)
            x = features[:, 1:].transpose(1, 2).unflatten(2, (SIDE // 14, -1)) if name == DENSE else features[:, :1]
            x = x if name == DENSE else x.transpose(1, 2).unsqueeze(3)
        ids: Tensor = self.models[name].tokenize(x)
        return ids.flatten(1)


def network_input(name: str, task: str, image: Image.Image, crop: Crop) -> Tensor:
    """One crop as ml-4m's transforms make it."""
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    how = Image.Resampling.NEAREST if task == "semseg" else Image.Resampling.BICUBIC
    image = image.crop(box).resize((SIDE, SIDE), how)
    if crop.hflip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.array(image)
    if task == "semseg":
        return torch.from_numpy((pixels + np.uint8(1)).astype(np.int64))
    if task == "depth":
        depth = torch.Tensor(pixels / 65535.0)[None]
        kept = depth.reshape(-1).sort()[0]
        kept = kept[int(0.1 * len(kept)) : int(0.9 * len(kept))]
        return (depth - kept.mean()) / torch.sqrt(kept.var() + 1e-6)
    if task == "normal" and crop.hflip:
        pixels[:, :, 0] = 255 - pixels[:, :, 0]
    x = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1).contiguous().float() / 255
    mean, std = _images.IMAGENET if name in (DENSE, GLOBAL) else ((0.5,) * len(x), (0.5,) * len(x))
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _theirs(file: Path, vqvae: Any) -> Any:
    own = VQVAE.load(file)
    if vqvae is None:
        return restated(own)
    c = own.config
    names = ("image_size", "n_channels", "n_labels", "enc_type", "patch_proj", "post_mlp", "patch_size", "quant_type")
    names += ("codebook_size", "num_codebooks", "latent_dim", "norm_codes", "norm_latents")
    model = vqvae.VQ(**{name: getattr(c, name) for name in names}, sync_codebook=False)
    halves = ("encoder.", "quant_proj.", "quantize.", "cls_emb.")
    model.load_state_dict({k: v for k, v in own.state_dict().items() if k.startswith(halves)})
    return model.eval()


def restated(model: VQVAE) -> VQVAE:
    """Our modules with ml-4m's attention, the softmax of a whole product, and its quantizer of one-hot codes."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.forward = types.MethodType(_attention, module)
    if hasattr(model.quantize, "_codebook"):
        model.quantize.forward = types.MethodType(_one_hot, model.quantize)
    return model.eval()


def _attention(self: Attention, x: Tensor) -> Tensor:
    b, n, d = x.shape
    q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((q @ k.transpose(-2, -1)) * (d // self.heads) ** -0.5).softmax(dim=-1)
    return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


def _one_hot(self: nn.Module, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = latents.permute(0, 2, 3, 1)
    codebook: Any = self._codebook
    flat = F.normalize(x.reshape(-1, x.shape[-1]), dim=-1)
    ids = (flat @ F.normalize(codebook.embed, dim=-1).t()).argmax(dim=-1)
    F.one_hot(ids, len(codebook.embed)).type(x.dtype)  # made in evaluation, too, and used in training alone
    ids = ids.view(x.shape[:-1])
    return F.embedding(ids, codebook.embed).permute(0, 3, 1, 2), latents.new_zeros(()), ids


class _Empty(types.ModuleType):
    """Stands for what a tokenizer's encoder does not need."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def imported(checkout: Path, size: tuple[int, int, int]) -> Any:
    """ml-4m's module of tokenizers without its diffusion decoders and its data, and with one more size of ViT."""
    sys.path.insert(0, str(checkout))
    empty = ("diffusers", "diffusers.schedulers", "diffusers.schedulers.scheduling_utils", "fourm.data",
             "fourm.utils.generation_datasets", "fourm.vq.scheduling", "fourm.vq.models.uvit",
             "fourm.vq.models.controlnet", "fourm.vq.models.unet", "fourm.vq.models.unet.unet")  # fmt: skip
    sys.modules |= {name: _Empty(name) for name in empty}
    module = importlib.import_module("fourm.vq.vqvae")
    vit_models = importlib.import_module("fourm.vq.models.vit_models")
    width, depth, heads = size
    for half, kind in (("enc", vit_models.ViTEncoder), ("dec", vit_models.ViTDecoder)):
        made = functools.partial(kind, dim_tokens=width, depth=depth, num_heads=heads, qkv_bias=True)
        setattr(vit_models, f"vit_{width}x{depth}x{heads}_{half}", made)
    return module
