"""Weights on disk: safetensors files of the same bytes each time, and the checkpoints of a training run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

Weights = dict[str, dict[str, Tensor]]


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file, the same bytes for the same content; tied tensors are written twice."""
    # Cloned, since safetensors refuses the tied tensors that a strict load wants under both names.
    data = save({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, metadata)
    # The library writes metadata in the order of a randomly seeded hash map, so sort it; offsets count from the
    # header's end, which is padded to a multiple of eight with spaces.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if metadata is not None:
        header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def write_file(path: Path, data: bytes) -> None:
    """Put a whole file under its name at once, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


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
        (partial / f"{name}.safetensors").write_bytes(safetensors_bytes(tensors))
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
