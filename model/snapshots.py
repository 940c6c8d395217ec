"""Checkpoints of a training run: one folder per step, which appears whole or not at all."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, dict[str, Tensor]]


def path(folder: Path, step: int) -> Path:
    """The folder of one checkpoint."""
    return folder / f"step-{step}"


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    found = (re.fullmatch(r"step-(\d+)", entry.name) for entry in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def newest(folder: Path) -> int | None:
    """The last step that has a checkpoint."""
    return max(steps(folder), default=None)


def write(folder: Path, step: int, weights: Weights, rest: dict[str, Any]) -> None:
    """`<name>.safetensors` for each set of weights and state.pt for the rest, published by one rename."""
    final, partial = path(folder, step), folder / f".partial-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tensors in weights.items():
        # Cloned, since safetensors refuses the tied tensors that a strict load wants twice.
        save_file(
            {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()},
            partial / f"{name}.safetensors",
        )
    torch.save(rest, partial / "state.pt")
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)


def read(folder: Path, step: int, device: str) -> tuple[Weights, dict[str, Any]]:
    """What `write` was given; the weights on `device`, the rest on the CPU."""
    source = path(folder, step)
    weights = {file.stem: load_file(file, device=device) for file in source.glob("*.safetensors")}
    return weights, torch.load(source / "state.pt", map_location="cpu", weights_only=True)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what an interrupted `write` left."""
    for step in steps(folder)[:-keep]:
        shutil.rmtree(path(folder, step))
    for partial in folder.glob(".partial-*"):
        shutil.rmtree(partial)
