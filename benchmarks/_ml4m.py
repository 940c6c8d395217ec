"""ml-4m's model beside ours: loaded from a checkout, built for the same specs, given the same weights and batches.

Nothing of the checkout is changed. It needs einops. Two things are done outside its files: modality_transforms, which
needs albumentations and of which its table of modalities takes nothing but names, is an empty stand-in; and
random.sample, which since Python 3.11 refuses the items of a dict, keeps the order of the modalities.
"""

from __future__ import annotations

import importlib
import sys
import types
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.fourm import FourMConfig
from model.masking import MaskedBatch
from model.spec import ModalitySpec

PRESETS = tuple(
    f"fm_{size}_{depth}_{variant}"
    for variant in ("gelu", "swiglu_nobias", "swiglu_qknorm_nobias")
    for size, depth in (("tiny", "6e_6d"), ("small", "8e_8d"), ("base", "12e_12d"), ("large", "24e_24d"),
                        ("xlarge", "24e_24d"))
    if variant != "swiglu_qknorm_nobias" or size not in ("tiny", "small")
)  # fmt: skip
MODALITIES = (
    "caption", "color_palette", "det", "human_poses", "metadata", "rgb@224", "sam_instance", "t5_caption",
    "tok_canny_edge@224", "tok_clip@224", "tok_depth@224", "tok_dinov2@224", "tok_dinov2_global",
    "tok_imagebind@224", "tok_imagebind_global", "tok_normal@224", "tok_rgb@224", "tok_sam_edge@224",
    "tok_semseg@224",
)  # fmt: skip
"""What the models of 4M-21 take and give."""

_KINDS = {"pixels": "img", "tokens": "img", "sequence": "seq", "embeddings": "seq_emb"}


@dataclass(frozen=True)
class Reference:
    """Modules of a checkout: the model, its view as a vision transformer, its embeddings, its trainer's parts."""

    fm: Any
    vit: Any
    encoder: Any
    decoder: Any
    utils: Any

    def preset(self, name: str) -> dict[str, Any]:
        """The settings that the preset of a name has."""
        whole = self.fm.FourM
        self.fm.FourM = lambda **settings: settings
        try:
            found = getattr(self.fm, name)(encoder_embeddings={}, decoder_embeddings={})
        finally:
            self.fm.FourM = whole
        return {key: value for key, value in found.items() if not key.endswith("embeddings")}

    def settings(self, config: FourMConfig) -> dict[str, Any]:
        """The settings of a configuration of ours."""
        same = ("dim encoder_depth decoder_depth num_heads mlp_ratio gated_mlp qkv_bias proj_bias mlp_bias qk_norm "
                "num_register_tokens decoder_causal_mask decoder_sep_mask share_modality_embeddings")  # fmt: skip
        norm = partial(self.fm.LayerNorm, eps=1e-6, bias=config.norm_bias)
        found = {name: getattr(config, name) for name in same.split()}
        return {**found, "act_layer": getattr(nn, config.act), "norm_layer": norm}

    def model(
        self, settings: dict[str, Any], specs_in: list[ModalitySpec], specs_out: list[ModalitySpec], *, tied: bool
    ) -> nn.Module:
        """A FourM for our specs."""
        enc, dec = {}, {}
        for s in specs_in:
            grid = {"patch_size": s.patch_size, "image_size": s.side * s.patch_size}
            if s.kind == "pixels":
                enc[s.name] = self.encoder.ImageEncoderEmbedding(s.channels, **grid)
            elif s.kind == "embeddings":
                enc[s.name] = self.encoder.SequenceEmbEncoderEmbedding(s.max_tokens, orig_emb_dim=s.dim_in)
            elif s.kind == "tokens":
                kind = self.encoder.ImageTokenEncoderEmbedding
                enc[s.name] = kind(s.vocab_size, **grid, sincos_pos_emb=not s.learned_positions)
            else:
                enc[s.name] = self.encoder.SequenceEncoderEmbedding(s.vocab_size, s.max_positions or s.max_tokens)
        for s in specs_out:
            grid = {"patch_size": s.patch_size, "image_size": s.side * s.patch_size}
            if s.kind == "tokens":
                kind = self.decoder.ImageTokenDecoderEmbedding
                placed = {"sincos_pos_emb": not s.learned_positions, "share_embedding": tied}
                dec[s.name] = kind(s.vocab_size, **grid, **placed)
            else:
                length = s.max_positions or s.max_tokens
                dec[s.name] = self.decoder.SequenceDecoderEmbedding(s.vocab_size, length, share_embedding=tied)
        names = sorted({s.name: s for s in (*specs_in, *specs_out)}.values(), key=lambda s: s.name)
        info = {s.name: {"id": i, "type": _KINDS[s.kind], "max_tokens": s.max_tokens} for i, s in enumerate(names)}
        return self.fm.FourM(enc, dec, info, **settings)

    def on_meta(self, settings: dict[str, Any], *specs: list[ModalitySpec]) -> nn.Module:
        """The same without memory for its weights."""
        real = self.fm.torch
        # It reads the values of a linspace while it is built.
        self.fm.torch = _Instead(real, linspace=partial(torch.linspace, device="cpu"))
        try:
            with torch.device("meta"):
                return self.model(settings, *specs, tied=True)
        finally:
            self.fm.torch = real


class _Instead:
    """A module with some of its names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.module, self.names = module, names

    def __getattr__(self, name: str) -> Any:
        return self.names[name] if name in self.names else getattr(self.module, name)


def load(checkout: Path) -> Reference:
    """The modules of a checkout of apple/ml-4m."""
    sys.path.insert(0, str(checkout.resolve()))
    data, transforms, datasets = (
        types.ModuleType(name)
        for name in ("fourm.data", "fourm.data.modality_transforms", "fourm.utils.generation_datasets")
    )
    data.__path__ = [str(checkout.resolve() / "fourm" / "data")]

    def stand_in(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_args, **_settings: None

    transforms.__getattr__ = stand_in  # type: ignore[method-assign]
    sys.modules |= {module.__name__: module for module in (data, transforms, datasets)}
    names = ("models.fm", "models.fm_vit", "models.encoder_embeddings", "models.decoder_embeddings", "utils")
    found = Reference(*(importlib.import_module(f"fourm.{name}") for name in names))
    found.fm.random = types.SimpleNamespace(sample=lambda items, _num: list(items))
    return found


def weight(name: str, shape: tuple[int, ...], tables: float = 0.3) -> np.ndarray:
    """A value for a parameter that depends on its name alone, and leaves activations about as large as they were.

    `tables` is the deviation of embeddings and free tokens.
    """
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if "norm" in name.rsplit(".", 2)[-2 if "." in name else 0] and name.endswith("weight"):
        return 1 + np.float32(0.2) * drawn
    if name.endswith(".bias"):
        return np.float32(0.1) * drawn
    if name.endswith(("token_emb.weight", "to_logits.weight", "_emb", "_token", "_tokens")):
        return np.float32(tables) * drawn
    return drawn * np.float32(shape[-1] ** -0.5)


def draw(model: nn.Module, *, tied: bool = True, shared: bool = True, tables: float = 0.3) -> None:
    """`weight` of every parameter; what one side shares under two names is one name here."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if tied:
                name = name.replace("to_logits", "token_emb")
            if shared and name.endswith("mod_emb"):
                name = name.replace("decoder_embeddings", "encoder_embeddings")
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape), tables)))


def as_reference(batch: MaskedBatch, specs: list[ModalitySpec], *, whole: bool = False) -> dict[str, dict[str, Tensor]]:
    """The same inputs and targets as tensors and masks by modality; pixels must be normalised.

    With `whole` each is as long as ml-4m's loader makes it, without as long as need be.
    """
    return {spec.name: _modality(batch, m, spec, whole) for m, spec in enumerate(specs)}


def _modality(batch: MaskedBatch, m: int, spec: ModalitySpec, whole: bool) -> dict[str, Tensor]:
    size = len(batch.enc_mod)
    rows = [((batch.enc_mod[i] == m).nonzero()[:, 0], (batch.dec_mod[i] == m).nonzero()[:, 0]) for i in range(size)]
    first = max(len(enc) for enc, _ in rows)  # where a sequence's targets begin
    length = first + max(len(dec) for _, dec in rows) + 2
    if whole and spec.kind == "sequence":
        length = 2 * (spec.max_tokens + 1)
    elif whole or spec.is_grid:
        length = spec.max_tokens
    tensor = torch.zeros((size, length), dtype=torch.int64)
    if spec.kind == "embeddings":
        tensor = torch.zeros((size, length, spec.dim_in))
    elif spec.kind == "pixels":
        tensor = torch.zeros((size, length, spec.patch_size**2 * spec.channels))
    inputs, targets = torch.ones(2, size, length, dtype=torch.bool).unbind(0)
    reach = torch.zeros(size, length, dtype=torch.int64)
    for i, (enc, dec) in enumerate(rows):
        ids, at = batch.enc_ids[i, enc], batch.enc_pos[i, enc] if spec.is_grid else torch.arange(len(enc))
        inputs[i, at] = False
        if spec.kind == "pixels" and len(enc):
            tensor[i, at] = batch.pixels[spec.name][ids]
        elif spec.kind == "embeddings":
            real = ids >= 0
            tensor[i, at[real]] = batch.embeddings[spec.name][ids[real]].float() if real.any() else 0.0
        elif spec.is_target:
            tensor[i, at] = ids
        if not len(dec):
            continue
        ids, at = batch.dec_targets[i, dec], batch.dec_pos[i, dec]
        reach[i, at[:1]] = len(dec)
        if not spec.is_grid:
            ids = torch.cat([batch.dec_ids[i, dec[:1]], ids])
            at = first + torch.arange(len(ids))
            reach[i] = 0
            reach[i, at] = 1
        targets[i, at] = False
        tensor[i, at] = ids
    if spec.kind == "pixels":
        side, patch = spec.side, spec.patch_size
        tensor = tensor.view(size, side, side, patch, patch, spec.channels).permute(0, 5, 1, 3, 2, 4)
        tensor = tensor.reshape(size, spec.channels, side * patch, side * patch)
    return {"tensor": tensor, "input_mask": inputs, "target_mask": targets, "decoder_attention_mask": reach}
