"""Tokenizers from files: settings from the header, the class that they ask for, strictly loaded weights."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

import numpy as np
from safetensors import safe_open

from model import domains
from model.domains import Domain

if TYPE_CHECKING:
    from model.tokenizers._vq import VQ, VQConfig

C = TypeVar("C", bound="VQConfig")

# ml-4m's settings that have one supported value here; a checkpoint that says otherwise is refused.
_FIXED = {"quant_type": "lucid", "num_codebooks": 1, "norm_codes": True, "code_replacement_policy": "batch_random"}


def read(path: Path, domain: Domain | None) -> VQ:
    """The tokenizer of a file, in evaluation mode."""
    from model.tokenizers.vqvae import VQVAE

    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    kind = VQVAE
    model = kind(from_header(kind.Config, header, domain))
    model.load_state_dict(tensors)
    return model.eval()


def to_header(config: VQConfig) -> dict[str, str]:
    """The settings as ml-4m writes them: str(value) under each name."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "domain"}
    values |= {**_FIXED, "sync_codebook": False}
    if config.domain is not None:
        values |= {"domain": config.domain.name, "domain_settings": config.domain.settings()}
    return {name: _text(value) for name, value in values.items()}


def _text(value: Any) -> str:
    # YAML 1.1, which ml-4m reads this with, takes 1e-05 for a string.
    return np.format_float_positional(value, trim="0") if isinstance(value, float) else str(value)


def _literal(text: str) -> Any:
    """The Python literal that a text is, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def from_header(kind: type[C], metadata: Mapping[str, str], domain: Domain | None) -> C:
    """The configuration in a file's header; names that only ml-4m's trainer needs are passed over."""
    values = {name: _literal(text) for name, text in metadata.items()}
    if not values:
        raise ValueError("no configuration in the header of the file, expected ml-4m's VQVAE settings")
    for name, supported in _FIXED.items():
        if values.get(name, supported) != supported:
            raise ValueError(f"{name} {values[name]!r}, expected {supported!r}: the only one implemented")
    if domain is None and "domain_settings" in values:
        domain = domains.named(values["domain"], values["domain_settings"])
    hints = get_type_hints(kind)
    settings = {f.name: values[f.name] for f in fields(kind) if f.name != "domain" and f.name in values}
    for name, value in settings.items():
        kinds = get_args(hints[name]) or (hints[name],)
        if not isinstance(value, (*kinds, int) if float in kinds else kinds):
            raise ValueError(f"{name} {value!r}, expected {hints[name]}")
    return kind(domain=domain, **settings)
