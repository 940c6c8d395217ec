"""FourM checkpoints in ml-4m's format, both ways: safetensors with the configuration in the header, and config.json.

A folder written here holds model.safetensors, config.json (both as ml-4m reads them) and modalities.json, which gives
the modalities ml-4m does not know.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.fourm import FourM, FourMConfig
from model.spec import ModalitySpec

_TEXT_VOCABULARY = 30_000
_TOKEN_VOCABULARIES = {"rgb": 16384, "depth": 8192, "normal": 8192, "semseg": 4096, "clip": 8192}
_TOKEN_VOCABULARIES |= {"canny_edge": 8192, "sam_edge": 8192, "dinov2": 8192, "imagebind": 8192}
_SEQUENCE_LENGTHS = {"caption": 256, "det": 256, "metadata": 40, "human_poses": 275, "color_palette": 23}
_SEQUENCE_LENGTHS |= {"sam_instance": 290}

# Keys of an ml-4m configuration that are ours under the same name.
_SAME_NAMES = (
    "dim", "encoder_depth", "decoder_depth", "num_heads", "mlp_ratio", "gated_mlp", "qkv_bias", "proj_bias", "mlp_bias",
    "norm_bias", "qk_norm", "num_register_tokens", "decoder_causal_mask", "decoder_sep_mask",
    "share_modality_embeddings",
)  # fmt: skip
# Those ml-4m leaves out mean its own defaults, which are not ours.
_ML4M_DEFAULTS: dict[str, Any] = {
    "dim": 768, "encoder_depth": 12, "decoder_depth": 12, "num_heads": 12, "gated_mlp": False, "qkv_bias": True,
    "proj_bias": True, "mlp_bias": True,
}  # fmt: skip
_NO_EFFECT = {
    "domains_in",
    "domains_out",
    "image_size",
    "patch_size",
    "act_layer",
    "shared_drop_path",
    "use_act_checkpoint",
}


def ml4m_spec(name: str) -> ModalitySpec:
    """The spec of a modality of ml-4m's table, by its name such as tok_depth@224."""
    base, _, resolution = name.partition("@")
    if base in _SEQUENCE_LENGTHS:
        length = _SEQUENCE_LENGTHS[base]
        # Poses are longer than ml-4m's table of decoder positions; the rest falls on position 0.
        positions = 263 if base == "human_poses" else 0
        return ModalitySpec(
            name=name, kind="sequence", max_tokens=length, vocab_size=_TEXT_VOCABULARY, max_positions=positions,
            chunked=base == "metadata",
        )  # fmt: skip
    if base == "t5_caption":
        return ModalitySpec(name=name, kind="embeddings", max_tokens=77, dim_in=4096)
    if base in ("tok_dinov2_global", "tok_imagebind_global"):
        return ModalitySpec(
            name=name, kind="tokens", max_tokens=16, vocab_size=8192, patch_size=56, learned_positions=True
        )
    if resolution.isdigit():
        patch = 14 if base in ("tok_dinov2", "tok_imagebind") else 16
        num = (int(resolution) // patch) ** 2
        if base == "rgb":
            return ModalitySpec(name=name, kind="pixels", max_tokens=num, patch_size=patch)
        vocabulary = _TOKEN_VOCABULARIES.get(base.removeprefix("tok_"))
        if base.startswith("tok_") and vocabulary:
            return ModalitySpec(name=name, kind="tokens", max_tokens=num, vocab_size=vocabulary, patch_size=patch)
    raise ValueError(f"{name}: not a modality of ml-4m; give its spec, or a folder with modalities.json")


def ml4m_config(model: FourM) -> dict[str, Any]:
    """The configuration ml-4m's FM class needs to build the same model."""
    grids = [spec for spec in (*model.specs_in, *model.specs_out) if spec.is_grid and not spec.learned_positions]
    patch_size = grids[0].patch_size if grids else 16
    return {
        "domains_in": [spec.name for spec in model.specs_in],
        "domains_out": [spec.name for spec in model.specs_out],
        "image_size": grids[0].side * patch_size if grids else 224,
        "patch_size": patch_size,
        "act_layer": model.config.act,
        **{name: getattr(model.config, name) for name in _SAME_NAMES},
    }


def config_from_ml4m(config: dict[str, Any], *, tied: bool) -> FourMConfig:
    """Our configuration from ml-4m's; a setting that would change the function and that we lack is a ValueError."""
    dropped = {name: config[name] for name in ("drop_path_rate_encoder", "drop_path_rate_decoder") if config.get(name)}
    unknown = {name: value for name, value in config.items() if name not in {*_SAME_NAMES, *_NO_EFFECT}}
    unknown = {name: value for name, value in unknown.items() if not name.startswith("drop_path_rate_")} | dropped
    if unknown:
        raise ValueError(f"settings {unknown}, expected only {sorted({*_SAME_NAMES, *_NO_EFFECT})}")
    same = _ML4M_DEFAULTS | {name: config[name] for name in _SAME_NAMES if name in config}
    return FourMConfig(**same, act=config["act_layer"], tie_embeddings=tied)


def save_safetensors(model: FourM, path: str | os.PathLike[str]) -> None:
    """One file that ml-4m's load_safetensors reads: every tensor under every name, the configuration in the header."""
    path = Path(path)
    # Shared parameters are written under both names, which strict loading asks for; safetensors refuses shared memory.
    state = {name: tensor.detach().cpu().float().clone().contiguous() for name, tensor in model.state_dict().items()}
    partial = path.with_name(f".{path.name}.partial")
    save_file(state, partial, metadata={name: str(value) for name, value in ml4m_config(model).items()})
    partial.replace(path)


def load_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file and the configuration in its header (empty if it has none)."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata.pop("format", None)  # added by Hugging Face's writers
    return state, {name: yaml.safe_load(value.replace("None", "null")) for name, value in metadata.items()}


def save_pretrained(model: FourM, folder: str | os.PathLike[str]) -> None:
    """A folder that `from_pretrained`, here and in ml-4m, reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modalities = {spec.name: asdict(spec) for spec in (*model.specs_in, *model.specs_out)}
    _write_json(folder / "modalities.json", modalities)
    _write_json(folder / "config.json", ml4m_config(model))
    save_safetensors(model, folder / "model.safetensors")


def from_pretrained(source: str | os.PathLike[str], *, tie_embeddings: bool | None = None) -> FourM:
    """The model of a folder, a .safetensors file or a Hugging Face repository, strictly loaded, in evaluation mode.

    Logits share the decoder's tables if they are equal in the checkpoint, unless `tie_embeddings` says otherwise.
    """
    path = Path(source)
    if not path.exists():
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "model.safetensors"]
        path = Path(snapshot_download(str(source), allow_patterns=patterns))
    folder, file = (path.parent, path) if path.is_file() else (path, path / "model.safetensors")
    state, config = load_safetensors(file)
    if (folder / "config.json").exists() and path.is_dir():
        config = json.loads((folder / "config.json").read_text())
    if not config:
        raise ValueError(f"{source}: no configuration in the header of {file.name}, expected one, or a config.json")
    described: dict[str, Any] = {}
    if (folder / "modalities.json").exists():
        described = json.loads((folder / "modalities.json").read_text())
    specs = {name: ModalitySpec(**value) for name, value in described.items()}
    specs_in, specs_out = ([specs.get(n) or ml4m_spec(n) for n in config[key]] for key in ("domains_in", "domains_out"))
    # An input-only modality such as rgb may be listed as an output; ml-4m gives it no decoder.
    specs_out = [spec for spec in specs_out if spec.is_target]
    tied = _is_tied(state, [spec.name for spec in specs_out]) if tie_embeddings is None else tie_embeddings
    model = FourM(config_from_ml4m(config, tied=tied), specs_in, specs_out)
    load_state(model, state)
    return model.eval()


def load_state(model: FourM, state: dict[str, Tensor]) -> None:
    """Strictly load a state; names of shared parameters that a de-duplicated file leaves out are filled in."""
    aliases: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        aliases[id(tensor)].append(name)
    filled = dict(state)
    for names in aliases.values():
        present = [name for name in names if name in state]
        filled |= {name: state[present[0]] for name in names if present and name not in state}
    model.load_state_dict(filled, strict=True)


def _is_tied(state: dict[str, Tensor], outputs: list[str]) -> bool:
    for name in outputs:
        table = state.get(f"decoder_embeddings.{name}.token_emb.weight")
        scores = state.get(f"decoder_embeddings.{name}.to_logits.weight")
        if table is not None and scores is not None and not torch.equal(table, scores):
            return False
    return True


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)
