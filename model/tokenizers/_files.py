"""Tokenizers from files and into them: ml-4m's settings and weights, the class that they ask for, strictly loaded.

A safetensors file has its settings in the header, str(value) under each name; a folder, as on the Hugging Face hub,
has them in config.json; a `.pth` of ml-4m's trainer has the arguments of its command line (`_legacy`).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model import domains, snapshots
from model.domains import Domain
from model.tokenizers import _legacy

if TYPE_CHECKING:
    from model.tokenizers._vq import VQ, VQConfig

C = TypeVar("C", bound="VQConfig")

_LONGEST = 10_000
"""Characters of a setting in a header that are parsed; ml-4m's limit."""

_DECODERS = ("decoder.", "post_quant_proj.", "vae.")


def read(source: str | Path, domain: Domain | None, *, ema: bool = False, encoder_only: bool = False) -> VQ:
    """The tokenizer of a file, a folder or a repository of the Hugging Face hub, in evaluation mode.

    `ema` asks a `.pth` for the averaged weights; `encoder_only` leaves the decoder unread.
    """
    path = _located(source)
    pickled = path.suffix in (".pth", ".pt")
    if ema and not pickled:
        raise ValueError(
            f"{path}: averaged weights were asked for, which only ml-4m's .pth files hold beside the others"
        )
    if pickled:
        values, tensors = _legacy.read(path, ema=ema)
        tensors = {name: tensor for name, tensor in tensors.items() if not (encoder_only and _is_decoder(name))}
    else:
        values, tensors = _read_safetensors(path, encoder_only)
    if not values:
        raise ValueError(f"{path}: no configuration in the header of the file, expected ml-4m's VQVAE settings")
    kind = _kind(values, encoder_only)
    model = kind(to_config(kind.Config, values, domain))
    load_strictly(model, tensors, str(path))
    return model.eval()


def save(model: VQ, path: Path) -> None:
    """One safetensors file that `read` and ml-4m's `load_safetensors` read."""
    snapshots.write_file(path, snapshots.safetensors_bytes(model.state_dict(), header(model)))


def save_pretrained(model: VQ, folder: Path) -> None:
    """model.safetensors as by `save`, then config.json."""
    save(model, folder / "model.safetensors")
    snapshots.write_file(folder / "config.json", (json.dumps(settings(model), indent=2) + "\n").encode())


def settings(model: VQ) -> dict[str, Any]:
    """A model's settings under ml-4m's names, and those that ml-4m passes over: domain, domain_settings, seed."""
    from model.tokenizers._vq import EncoderOnly

    config = model.config
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "domain"}
    values |= {"sync_codebook": False}  # True, ml-4m's default, fails in one process
    if isinstance(model, EncoderOnly):
        values |= {"encoder_only": True}
    if config.domain is not None:
        values |= {"domain": config.domain.name, "domain_settings": config.domain.settings()}
    return values


def header(model: VQ) -> dict[str, str]:
    """`settings` as ml-4m writes them into a file: str(value) under each name."""
    return {name: _text(value) for name, value in settings(model).items()}


def parsed(header: Mapping[str, str]) -> dict[str, Any]:
    """The settings in a header: a text that is a Python literal as its value, any other as it is."""
    # Hugging Face's writers add a format, which is no setting.
    return {name: _literal(text) for name, text in header.items() if name != "format"}


def to_config(kind: type[C], values: Mapping[str, Any], domain: Domain | None) -> C:
    """The configuration that settings say; names that only ml-4m's trainer needs are passed over.

    Without a domain it is that of the settings: ours, or that of ml-4m's name for it. ValueError for a value of a
    wrong type.
    """
    if domain is None and "domain_settings" in values:
        described = values["domain_settings"]
        if not isinstance(described, dict):
            raise ValueError(f"domain_settings {described!r}, expected a dict")
        # JSON has no tuples.
        described = {name: tuple(v) if isinstance(v, list) else v for name, v in described.items()}
        domain = domains.named(str(values.get("domain")), described)
    elif domain is None:
        domain = _legacy.domain(values)
    hints = get_type_hints(kind)
    chosen = {f.name: values[f.name] for f in fields(kind) if f.name != "domain" and f.name in values}
    for name, value in list(chosen.items()):
        kinds = get_args(hints[name]) or (hints[name],)
        if value is None and type(None) not in kinds:
            del chosen[name]  # what the command line of a trainer did not have, and means the default
            continue
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
        if not fits or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{name} {value!r}, expected {hints[name]}")
    return kind(domain=domain, **chosen)


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load every tensor of a model; ValueError that names what is missing, left over or of another shape."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    other = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    if missing or unexpected or other:
        said = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"{source}: weights that are not those of a {type(model).__name__} of its settings: {said}")
    model.load_state_dict(dict(tensors))


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _located(source: str | Path) -> Path:
    """The file or folder itself, or the downloaded repository that an id `owner/name` stands for."""
    path = Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) or path.suffix in (".safetensors", ".pth", ".pt"):
        raise FileNotFoundError(f"{source}: no such file or folder, nor an id owner/name on the Hugging Face hub")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), allow_patterns=["config.json", "model.safetensors"]))


def _read_safetensors(path: Path, encoder_only: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the tensors of a file or of a folder, whose config.json counts more than its file's header."""
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        with safe_open(file, framework="pt") as opened:
            values = parsed(opened.metadata() or {})
            names = [name for name in opened.keys() if not (encoder_only and _is_decoder(name))]  # noqa: SIM118
            tensors = {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, or a .pth of ml-4m's trainer: {error}") from error
    described = path / "config.json"
    if path.is_dir() and described.exists():
        values = json.loads(described.read_text())
        if not isinstance(values, dict) or not isinstance(values.get("config", {}), dict):
            raise ValueError(f"{described}: expected an object of settings, or one in 'config'")
        return values.get("config", values), tensors
    return values, tensors


def _is_decoder(name: str) -> bool:
    return name.startswith(_DECODERS)


def _kind(values: Mapping[str, Any], encoder_only: bool) -> type[VQ]:
    """The class whose settings these are."""
    from model import tokenizers
    from model.tokenizers._vq import VQ, EncoderOnly

    if encoder_only or values.get("encoder_only") is True:
        return EncoderOnly
    name = "vqvae"
    if "sd_path" in values or values.get("image_size_sd") is not None:
        name = "controlnet"
    elif "beta_schedule" in values or str(values.get("dec_type", "")).startswith(("unet", "uvit")):
        name = "divae"
    kind = tokenizers.load(name)
    assert issubclass(kind, VQ)
    return kind


def _text(value: Any) -> str:
    # YAML 1.1, which ml-4m reads this with, takes 1e-05 for a string.
    return np.format_float_positional(value, trim="0") if isinstance(value, float) else str(value)


def _literal(text: str) -> Any:
    """The Python literal that a text is, or the text itself."""
    if len(text) > _LONGEST:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
