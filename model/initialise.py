"""Begin from a trained FourM whose modalities are fewer, more or others: shared parameters are copied, new ones drawn.

Unlike ml-4m's `--finetune`, which drops every table of positions, learned tables (those of global tokens) are copied.
Fixed ones follow from the modality's shape and are computed anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from model.checkpoint import from_pretrained
from model.fourm import FourM, FourMConfig
from model.spec import ModalitySpec

# Settings that change what attention sees, and no parameter.
_FREE = ("decoder_causal_mask", "decoder_sep_mask", "tie_embeddings")


@dataclass(frozen=True)
class Changes:
    """What became of modalities, as "input NAME" and "output NAME": taken over, drawn anew, or left behind."""

    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    def line(self) -> str:
        """One line for people."""
        parts = (("taken over", self.kept), ("new", self.new), ("left out", self.dropped))
        return "; ".join(f"{said}: {', '.join(names)}" for said, names in parts if names)


def folder_of(source: str) -> Path:
    """The local folder or file of a checkpoint; a Hugging Face repository is downloaded."""
    path = Path(source)
    if path.exists():
        return path
    if source.startswith(("/", ".")) or source.count("/") != 1:
        raise ValueError(f"{source}: no such folder or file, and no name of a Hugging Face repository (owner/name)")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.json", "model.safetensors"]))


def read(source: str) -> FourM:
    """The model of a checkpoint, ours or ml-4m's: a folder, a file or a Hugging Face repository."""
    return from_pretrained(folder_of(source))


def adopted(spec: ModalitySpec, source: FourM) -> ModalitySpec:
    """The spec with where the checkpoint's positions wrap, which data cannot say (ml-4m's human_poses)."""
    for known in (*source.specs_in, *source.specs_out):
        if known.name == spec.name and known.max_positions:
            return replace(spec, max_positions=known.max_positions)
    return spec


def problems(
    source: FourM, config: FourMConfig, specs_in: Sequence[ModalitySpec], specs_out: Sequence[ModalitySpec]
) -> list[str]:
    """Everything that keeps a model from beginning with the weights of `source`; empty when nothing does."""
    found = []
    for field in fields(config):
        before, now = getattr(source.config, field.name), getattr(config, field.name)
        if field.name not in _FREE and before != now:
            found.append(f"model.{field.name} {now!r}, the checkpoint has {before!r}")
    if config.tie_embeddings and not source.config.tie_embeddings:
        found.append("model.tie_embeddings true, the checkpoint has other logits than tables: expected false")
    # Of both sides at once: a modality of both is wrong on both in the same way.
    unlike: dict[str, None] = {}
    shared = False
    for specs, known in ((specs_in, source.specs_in), (specs_out, source.specs_out)):
        held = {spec.name: spec for spec in known}
        for spec in specs:
            if spec.name in held:
                shared = True
                unlike |= dict.fromkeys(f"{spec.name}: {said}" for said in _unlike(held[spec.name], spec))
    if not shared:
        names = sorted({spec.name for spec in (*source.specs_in, *source.specs_out)})
        found.append(f"the checkpoint has none of the run's modalities, but {', '.join(names)}")
    return [*found, *unlike]


def _unlike(before: ModalitySpec, now: ModalitySpec) -> list[str]:
    """In what parameters of two specs differ."""
    if before.kind != now.kind:
        return [f"{now.kind} in the data, {before.kind} in the checkpoint"]
    found = []
    if before.vocab_size != now.vocab_size:
        small = ", too small for them" if before.vocab_size < now.vocab_size else ""
        found.append(
            f"ids of {now.vocab_size} in the data, a vocabulary of {before.vocab_size} in the checkpoint{small}"
        )
    if now.kind == "embeddings" and before.dim_in != now.dim_in:
        found.append(f"vectors of {now.dim_in} in the data, of {before.dim_in} in the checkpoint")
    if now.kind == "pixels" and (before.patch_size, before.channels) != (now.patch_size, now.channels):
        found.append(
            f"patches of {now.patch_size} pixels and {now.channels} channels in the run, "
            f"of {before.patch_size} and {before.channels} in the checkpoint"
        )
    learned = before.learned_positions, now.learned_positions
    if learned[0] != learned[1] or (all(learned) and before.max_tokens != now.max_tokens):
        said = [f"{s.max_tokens} {'learned' if s.learned_positions else 'fixed'} positions" for s in (now, before)]
        found.append(f"{said[0]} in the data, {said[1]} in the checkpoint")
    return found


def token_problems(known: Mapping[str, Mapping[str, str]], columns: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Modalities whose tokens or numbers were made by other networks than those the checkpoint was trained on.

    Both give {"tokenizer": sha256, "network": sha256} for a modality; what either does not know is no problem.
    """
    found = []
    for name in sorted(known.keys() & columns.keys()):
        for what in ("tokenizer", "network"):
            before, now = known[name].get(what, ""), columns[name].get(what, "")
            if before and now and before != now:
                found.append(f"{name}: made by {what} {now[:12]}, the checkpoint was trained on those of {before[:12]}")
    return found


def initialised(
    source: FourM,
    config: FourMConfig,
    specs_in: Sequence[ModalitySpec],
    specs_out: Sequence[ModalitySpec],
    *,
    seed: int,
) -> tuple[FourM, Changes]:
    """A new model with the parameters of `source` where both have them, the others drawn from `seed`.

    Inputs and outputs are told apart: a modality that was an input only gets a new decoder table, and keeps the
    embedding of its name. ValueError lists `problems`.
    """
    wrong = problems(source, config, specs_in, specs_out)
    if wrong:
        raise ValueError("the checkpoint does not fit: " + "; ".join(wrong))
    model = FourM(config, specs_in, specs_out, seed=seed)
    given = source.state_dict()
    parameters = {name: value for name, value in model.named_parameters(remove_duplicate=False) if name in given}
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(given[name])
    before = [f"input {s.name}" for s in source.specs_in] + [f"output {s.name}" for s in source.specs_out]
    now = [f"input {s.name}" for s in specs_in] + [f"output {s.name}" for s in specs_out]
    return model, Changes(
        kept=tuple(name for name in now if name in before),
        new=tuple(name for name in now if name not in before),
        dropped=tuple(name for name in before if name not in now),
    )
