"""FourM checkpoints in ml-4m's format, both ways: safetensors with the configuration in the header, and config.json.

A folder written here holds model.safetensors, config.json (both as ml-4m reads them) and modalities.json, which gives
the modalities ml-4m does not know. The `.pth` files of its trainer are read, too.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import trainer_files
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
# Those that only the whole model knows are left out where they are ml-4m's defaults: its FMViT refuses them.
_OF_THE_WHOLE: dict[str, Any] = {"num_register_tokens": 0, "decoder_causal_mask": False, "decoder_sep_mask": True}
_NO_EFFECT = {
    "domains_in", "domains_out", "image_size", "patch_size", "act_layer", "shared_drop_path", "use_act_checkpoint"
}  # fmt: skip
_TRAINED = re.compile(r"fm_(tiny|small|base|large|xlarge)_\d+e_\d+d_(gelu|swiglu_nobias|swiglu_qknorm_nobias)")


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
    """The configuration ml-4m's FM class, and its FMViT if there are images, needs to build the same model."""
    grids = [spec for spec in (*model.specs_in, *model.specs_out) if spec.is_grid and not spec.learned_positions]
    grids.sort(key=lambda spec: spec.kind != "pixels")  # FMViT takes the size for that of its images
    patch_size = grids[0].patch_size if grids else 16
    same = {name: getattr(model.config, name) for name in _SAME_NAMES}
    return {
        "domains_in": [spec.name for spec in model.specs_in],
        "domains_out": [spec.name for spec in model.specs_out],
        "image_size": grids[0].side * patch_size if grids else 224,
        "patch_size": patch_size,
        "act_layer": model.config.act,
        **{name: value for name, value in same.items() if _OF_THE_WHOLE.get(name) != value},
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


def from_pretrained(source: str | os.PathLike[str], *, tie_embeddings: bool | None = None, ema: bool = False) -> FourM:
    """The model of a folder, a .safetensors file, a Hugging Face repository or a .pth of ml-4m's trainer.

    Strictly loaded, in evaluation mode. Logits share the decoder's tables if they are equal in the checkpoint, unless
    `tie_embeddings` says otherwise. `ema` takes the averaged weights of a .pth.
    """
    state, config, specs_in, specs_out = read(source, ema=ema)
    tied = _is_tied(state, [spec.name for spec in specs_out]) if tie_embeddings is None else tie_embeddings
    model = FourM(replace(config, tie_embeddings=tied), specs_in, specs_out)
    load_state(model, state)
    return model.eval()


Read = tuple[dict[str, Tensor], FourMConfig, list[ModalitySpec], list[ModalitySpec]]


def read(source: str | os.PathLike[str], *, ema: bool = False) -> Read:
    """Weights, configuration, inputs and outputs of what `from_pretrained` takes."""
    path = Path(source)
    if path.suffix == ".pth":
        return _of_trainer(path, "model_ema" if ema else "model")
    if ema:
        raise ValueError(f"{source}: ema is for the .pth of a trainer, which may hold averaged weights as well")
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
    known = {name: ModalitySpec(**value) for name, value in described.items()}
    specs_in, specs_out = _specs(config["domains_in"], config["domains_out"], known)
    return state, config_from_ml4m(config, tied=False), specs_in, specs_out


def _of_trainer(path: Path, wanted: str) -> Read:
    args, state = trainer_files.read(path, wanted)
    name = str(args.get("model"))
    found = _TRAINED.fullmatch(name)
    if not found:
        raise ValueError(f"{path}: model {name!r}, expected a name such as fm_base_12e_12d_swiglu_nobias")
    config = replace(FourMConfig.preset(*found.groups()), num_register_tokens=int(args.get("num_register_tokens", 0)))
    names_in, names_out = args.get("in_domains"), args.get("out_domains")
    if not isinstance(names_in, list) or not isinstance(names_out, list):
        raise ValueError(f"{path}: in_domains {names_in} and out_domains {names_out}, expected lists of names")
    return state, config, *_specs(names_in, names_out, {})


def _specs(
    names_in: Iterable[str], names_out: Iterable[str], known: Mapping[str, ModalitySpec]
) -> tuple[list[ModalitySpec], list[ModalitySpec]]:
    specs_in, specs_out = ([known.get(name) or ml4m_spec(name) for name in names] for names in (names_in, names_out))
    # An input-only modality such as rgb may be listed as an output; ml-4m gives it no decoder.
    return specs_in, [spec for spec in specs_out if spec.is_target]


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
