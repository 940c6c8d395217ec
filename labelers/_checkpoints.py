"""Reading checkpoints without running what is in them, and writing random ones in the same format."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def read(file: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch file, of the names under `prefix` and without it.

    ValueError when there are none, or when the file is a TorchScript archive: reading one runs its code.
    """
    import torch
    from safetensors import safe_open

    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as stream:
            state = {name: stream.get_tensor(name) for name in stream.keys() if name.startswith(prefix)}  # noqa: SIM118
    elif _is_torchscript(file):
        raise ValueError(
            f"{file.name} is a TorchScript archive, which can only be read by running its code: "
            "use the safetensors file of the same weights"
        )
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not state:
        raise ValueError(f"{file.name}: expected tensors named {prefix or 'anything'}*, found none")
    return state


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered blocks there are under a prefix (`blocks.`): one more than the largest number."""
    numbers = {int(name.removeprefix(prefix).split(".", 1)[0]) for name in state if name.startswith(prefix)}
    if numbers != set(range(len(numbers))) or not numbers:
        raise ValueError(f"checkpoint: expected {prefix}0, {prefix}1, ..., found {sorted(numbers)}")
    return len(numbers)


def randomised(state: Mapping[str, Tensor], seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Seeded random tensors of the same names and shapes, scaled so that activations keep their size.

    Matrices are normal with variance scale^2 / fan-in; vectors that multiply are near 1, vectors that add near 0.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, value in sorted(state.items()):
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim < 2:
            out[name] = 0.1 * noise + float(name.endswith(("weight", "gamma")))
        else:
            out[name] = noise * (scale / value[0].numel() ** 0.5)
    return out
