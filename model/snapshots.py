"""Weights on disk: safetensors files of the same bytes each time, and the checkpoints of a training run."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, distribute_tensor

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
    """Put a whole file under its name at once, making its folder; several processes may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
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


def partial(folder: Path, step: int) -> Path:
    """Where the parts of a checkpoint lie until it is whole."""
    return folder / f".partial-{step}"


def begin(folder: Path, step: int) -> Path:
    """An empty folder for the parts of a checkpoint, invisible to readers until `publish`."""
    made = partial(folder, step)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    return made


def write(partial: Path, weights: Weights, rest: dict[str, Any]) -> None:
    """`<name>.safetensors` for each set of weights that is not empty, and state.pt for the rest."""
    for name, tensors in weights.items():
        if tensors:
            save_file(_apart(tensors), partial / f"{name}.safetensors")
    torch.save(rest, partial / "state.pt")


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, tied ones too, each in its own memory and whole, without copying those that are so already."""
    seen: set[int] = set()
    out = {}
    for name, value in tensors.items():
        value = value.detach().contiguous()
        sharded = isinstance(value, DTensor)
        storage = (value.to_local() if isinstance(value, DTensor) else value).untyped_storage()
        # A shard may lie in a larger piece of memory: it is written as its writer finds it.
        if storage.data_ptr() in seen or not (sharded or storage.nbytes() == value.nbytes):
            value = value.clone()
        seen.add(storage.data_ptr())
        out[name] = value
    return out


def write_shards(partial: Path, weights: Weights, group: ProcessGroup | None = None) -> None:
    """A folder `<name>` for each set of weights, where every process of the run writes the parts it holds.

    `group` is of all processes; None is the one of all.
    """
    import torch.distributed.checkpoint as dcp

    for name, tensors in weights.items():
        writer = dcp.HuggingFaceStorageWriter(str(partial / name), save_distributed=True)
        dcp.save(_apart(tensors), storage_writer=writer, process_group=group)


def publish(folder: Path, step: int) -> None:
    """Give a checkpoint its name, by one rename."""
    final = path(folder, step)
    if final.exists():
        shutil.rmtree(final)
    partial(folder, step).rename(final)


def read(folder: Path, step: int, device: str) -> tuple[Weights, dict[str, Any]]:
    """What `write` was given; the weights on `device`, the rest on the CPU."""
    source = path(folder, step)
    weights = {file.stem: load_file(file, device=device) for file in source.glob("*.safetensors")}
    return weights, rest(folder, step)


def rest(folder: Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds beside weights."""
    found: dict[str, Any] = torch.load(path(folder, step) / "state.pt", map_location="cpu", weights_only=True)
    return found


@torch.no_grad()
def fill(folder: Path, step: int, name: str, tensors: dict[str, Tensor]) -> None:
    """Copy a checkpoint's set of weights into tensors, whole or sharded ones, whichever way they were written.

    Nothing is asked of other processes. ValueError names tensors that only one side has, or of another shape.
    """
    import torch.distributed.checkpoint as dcp

    source = path(folder, step) / name
    if source.is_dir():
        reader = dcp.HuggingFaceStorageReader(str(source))
        found = reader.read_metadata().state_dict_metadata
        shapes = {
            key: entry.size for key, entry in found.items() if isinstance(entry, dcp.metadata.TensorStorageMetadata)
        }
        _same_names(source, shapes, tensors)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        return
    loaded = load_file(source.with_name(f"{name}.safetensors"), device="cpu")
    _same_names(source, {key: value.shape for key, value in loaded.items()}, tensors)
    for key, value in tensors.items():
        if isinstance(value, DTensor):
            # Each process cuts out its own part of the whole, which all of them have read.
            part = distribute_tensor(
                loaded[key].to(value.device), value.device_mesh, value.placements, src_data_rank=None
            )
            value.copy_(part)
        else:
            value.copy_(loaded[key])


def _same_names(source: Path, found: dict[str, torch.Size], expected: dict[str, Tensor]) -> None:
    wrong = sorted(found.keys() ^ expected.keys())
    wrong += [key for key in found.keys() & expected.keys() if found[key] != expected[key].shape]
    if wrong:
        raise ValueError(
            f"{source} does not fit the model, which differs in {', '.join(wrong[:5])} ({len(wrong)} tensors)"
        )


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what an interrupted `write` left."""
    for step in steps(folder)[:-keep]:
        shutil.rmtree(path(folder, step))
    for left in folder.glob(".partial-*"):
        shutil.rmtree(left)
