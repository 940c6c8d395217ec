"""Files of FourM that ours writes and ml-4m loads, and the other way: strictly, and what is computed afterwards."""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import _ml4m
from model.checkpoint import ml4m_config, ml4m_spec
from model.fourm import FourM, FourMConfig
from model.masking import MaskedBatch, MaskingConfig, MixtureComponent, collate, mask_sample
from model.spec import ModalitySpec
from model.vit import ViT

NAMES = ("color_palette", "human_poses", "metadata", "rgb@224", "t5_caption", "tok_depth@224", "tok_dinov2_global")
FEWER = ("color_palette", "rgb@224", "tok_depth@224")  # for models of full size
SPECS = [ml4m_spec(name) for name in NAMES]
SPECS_OUT = [spec for spec in SPECS if spec.is_target]


def measure(theirs: _ml4m.Reference, folder: Path) -> dict[str, dict[str, float]]:
    """By family, the largest relative difference of a loss or a feature after each way a file can go."""
    batch = _batch(SPECS)
    found = {}
    for variant in ("gelu", "swiglu_nobias", "swiglu_qknorm_nobias"):
        place = folder / variant
        place.mkdir()
        found[variant] = {
            **_from_ours(theirs, variant, batch, place),
            **_to_ours(theirs, variant, batch, place),
            "trainer's .pth to ours": _trained(theirs, variant, place),
        }
    return found


def _small(variant: str, **changes: Any) -> FourM:
    settings = vars(FourMConfig.preset("nano", variant))
    sizes = {"dim": 32, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 2}
    return FourM(FourMConfig(**{**settings, **sizes, **changes}), SPECS, SPECS_OUT).eval()


def _from_ours(theirs: _ml4m.Reference, variant: str, batch: MaskedBatch, place: Path) -> dict[str, float]:
    found = {}
    for tied in (True, False):
        model = _small(variant, tie_embeddings=tied, num_register_tokens=0 if tied else 2)
        _ml4m.draw(model, tied=tied)
        said = "ours" if tied else "ours, untied, with registers"
        model.save_pretrained(place / said)
        state, config = theirs.utils.load_safetensors(place / said / "model.safetensors")
        loaded = theirs.fm.FM(config=config)
        loaded.load_state_dict(state, strict=True)
        found[f"{said} to FM"] = _difference(model, loaded, batch)
        hub = theirs.fm.FM.from_pretrained(str(place / said))
        found[f"{said} to FM.from_pretrained"] = _difference(model, hub, batch)
        if tied:
            images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                wanted = theirs.vit.FMViT.from_pretrained(str(place / said)).eval()(images)
                features = ViT.from_pretrained(place / said)(images)
            found["ours to FMViT.from_pretrained"] = _relative(features, wanted)
    return found


def _to_ours(theirs: _ml4m.Reference, variant: str, batch: MaskedBatch, place: Path) -> dict[str, float]:
    config = ml4m_config(_small(variant))
    model = theirs.fm.FM(config=config)
    _ml4m.draw(model, tied=False)
    model.save_pretrained(str(place / "hub"))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, place / "fm.safetensors", metadata={name: str(value) for name, value in config.items()})
    return {
        "FM.save_pretrained to ours": _difference(FourM.from_pretrained(place / "hub"), model, batch),
        "FM to ours": _difference(FourM.from_pretrained(place / "fm.safetensors"), model, batch),
    }


def _trained(theirs: _ml4m.Reference, variant: str, place: Path) -> float:
    """A preset at its size, one step of its optimizer, and what its trainer saves then."""
    size, depth = ("base", 12) if "qknorm" in variant else ("tiny", 6)
    name = f"fm_{size}_{depth}e_{depth}d_{variant}"
    specs = [ml4m_spec(name) for name in FEWER]
    specs_out, batch = [spec for spec in specs if spec.is_target], _batch(specs)
    model = theirs.model(theirs.preset(name), specs, specs_out, tied=True)
    args = argparse.Namespace(
        model=name, in_domains=list(FEWER), out_domains=[s.name for s in specs_out], all_domains=list(FEWER),
        num_register_tokens=0, patch_size=16, input_size=224, output_dir=str(place), opt="adamw", lr=1e-4,
        weight_decay=0.05, opt_eps=1e-8, opt_betas=[0.9, 0.95], data_config=None, resume="",
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the names of all parameters
        optimizer = theirs.utils.create_optimizer(args, model)
        rates = theirs.utils.cosine_scheduler(1e-4, 0.0, 1, 10, warmup_steps=2)
    for group in optimizer.param_groups:
        group["lr"] = rates[3] * group["lr_scale"]
    loss, _ = model(_ml4m.as_reference(batch, specs), batch.enc_mod.shape[1], batch.dec_mod.shape[1])
    scaler = theirs.utils.NativeScalerWithGradNormCount(enabled=False)
    scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
    theirs.utils.save_model(args, 0, model, model, optimizer, scaler, ckpt_name="final")
    return _difference(FourM.from_pretrained(place / "checkpoint-final.pth"), model, batch)


def _difference(ours: FourM, theirs: nn.Module, batch: MaskedBatch) -> float:
    lengths = batch.enc_mod.shape[1], batch.dec_mod.shape[1]
    with torch.no_grad():
        out = ours(batch)
        _, losses = theirs.eval()(_ml4m.as_reference(batch, [ml4m_spec(name) for name in batch.modalities]), *lengths)
    return max(_relative(out.losses[name], loss.squeeze()) for name, loss in losses.items() if float(loss))


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def _batch(specs: list[ModalitySpec]) -> MaskedBatch:
    rng = np.random.default_rng(3)
    component = MixtureComponent(
        input_alphas={spec.name: 1.0 for spec in specs},
        target_alphas={spec.name: 1.0 for spec in specs if spec.is_target},
    )
    config = MaskingConfig(components=(component,), input_tokens=(60, 60), target_tokens=(60, 60))
    samples = []
    for _ in range(3):
        sample = {
            "color_palette": rng.integers(204, 30_000, 20).tolist(),
            "human_poses": rng.integers(204, 30_000, 100).tolist(),
            "metadata": rng.integers(204, 30_000, (12, 2)).tolist(),
            "rgb@224": rng.standard_normal((3, 224, 224), np.float32),
            "t5_caption": rng.standard_normal((20, 4096), np.float32),
            "tok_depth@224": rng.integers(0, 8192, 196),
            "tok_dinov2_global": rng.integers(0, 8192, 16),
        }
        samples.append(mask_sample(rng, {spec.name: sample[spec.name] for spec in specs}, specs, config))
    return collate(samples, specs, 60, 60)
