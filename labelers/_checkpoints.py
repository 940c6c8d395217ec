"""Reading checkpoints without running what is in them, and writing random ones in the same format."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


STATES = ("state_dict", "model")
"""Under which names trainers (Lightning, detectron2) keep the tensors in what they save."""


class State(dict[str, "Tensor"]):
    """The tensors of a file by name. To ask for one that it lacks is a ValueError: the file is another network's."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        super().__init__(tensors)
        self.source = source

    def __missing__(self, name: str) -> Tensor:
        found = ", ".join(list(self)[:5]) + (", ..." if len(self) > 5 else "")
        raise ValueError(
            f"{self.source}: expected a tensor {name}, found {found}: this is another network's checkpoint"
        )


def read(file: Path, prefix: str = "", *, stubs: Sequence[str] = ()) -> State:
    """The tensors of a safetensors file, a torch file or a detectron2 pickle, of the names under `prefix` without it.

    Nothing in a file is ever run: a torch file is read with `weights_only`, a pickle by a reader that knows arrays
    alone. `stubs` names classes ("yacs.config.CfgNode") that lie in a file beside its tensors and are read as mere
    dicts. ValueError when it is damaged, is something else, or has no such tensors.
    """
    if file.suffix == ".safetensors":
        state = _safetensors(file, prefix)
    elif file.suffix == ".pkl":
        state = _arrays(file)
    else:
        state = _torch(file, stubs)
    for name in STATES:
        if isinstance(state.get(name), dict):
            state = state[name]
    import torch

    found = {
        n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix) and isinstance(v, torch.Tensor)
    }
    if not found:
        raise ValueError(
            f"{file.name}: expected tensors named {prefix or 'anything'}*, found {', '.join(list(state)[:5]) or 'none'}"
        )
    return State(found, file.name)


def _safetensors(file: Path, prefix: str) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys() if name.startswith(prefix)}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(_damaged(file, "a safetensors file", error)) from error


def _torch(file: Path, stubs: Sequence[str]) -> dict[str, Any]:
    import torch

    if _is_torchscript(file):
        raise ValueError(
            f"{file.name} is a TorchScript archive, which can only be read by running its code: "
            "use the safetensors file of the same weights"
        )
    known: list[Any] = [(_Inert, name) for name in stubs]
    try:
        with torch.serialization.safe_globals(known):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(file):
            raise ValueError(_damaged(file, "a torch file of tensors alone (weights_only)", error)) from error
        others = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file))) - set(stubs)
        raise ValueError(
            f"{file.name} holds more than tensors and is not read (weights_only): {', '.join(sorted(others))}; if you "
            "trust it, save its state_dict alone as safetensors and name that file as checkpoint"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(_damaged(file, "a torch file", error)) from error
    if not isinstance(state, dict):
        raise ValueError(f"{file.name}: expected a dict of tensors, found {type(state).__name__}")
    return state


class _Inert:
    """What stands for a class that is not wanted: it takes whatever that was saved with, and does nothing with it."""

    def __new__(cls, *_: Any) -> Any:
        """An empty dict, which takes items and attributes."""
        return OrderedDict()


class _Arrays(pickle.Unpickler):
    """Reads dicts, lists, strings, numbers and numpy arrays; anything else in a pickle is refused unbuilt."""

    _KNOWN = frozenset(
        (module, name)
        for package in ("numpy.core.multiarray", "numpy._core.multiarray")
        for module, name in ((package, "_reconstruct"), (package, "scalar"))
    ) | {("numpy", "ndarray"), ("numpy", "dtype"), ("collections", "OrderedDict"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        """The few that arrays are made of."""
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is not among what a file of arrays needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _arrays(file: Path) -> dict[str, Any]:
    import numpy as np
    import torch

    try:
        with file.open("rb") as stream:
            state = _Arrays(stream, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(_damaged(file, "a pickle of arrays", error)) from error
    state = state.get("model", state) if isinstance(state, dict) else {}
    return {n: torch.from_numpy(v) for n, v in state.items() if isinstance(v, np.ndarray) and v.dtype != object}


def _damaged(file: Path, what: str, error: Exception) -> str:
    with file.open("rb") as stream:
        head = stream.read(64).lstrip().lower()
    size = file.stat().st_size
    if head.startswith((b"<!doctype", b"<html", b"version https://git-lfs")):
        return f"{file.name} ({size} bytes) is a web page or a Git LFS pointer, not {what}: download the file itself"
    first = str(error).strip().partition("\n")[0]
    return f"{file.name} ({size} bytes) is cut short, damaged or not {what}: {first[:200]}; fetch it again"


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered blocks there are under a prefix (`blocks.`): one more than the largest number."""
    found = {name.removeprefix(prefix).split(".", 1)[0] for name in state if name.startswith(prefix)}
    if found != {str(i) for i in range(len(found))} or not found:
        where = state.source if isinstance(state, State) else "checkpoint"
        have = ", ".join(sorted(prefix + n for n in found) or list(state)[:5])
        raise ValueError(f"{where}: expected {prefix}0, {prefix}1, ..., found {have}")
    return len(found)


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
