"""Filling a network with published weights, and putting it where and how it runs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Network = TypeVar("Network", bound=nn.Module)

Precision = Literal["float32", "bfloat16", "float16"]
"""What a network computes in on a GPU. On the CPU it is float32 whatever is asked: its half precision is slower, and
not right everywhere."""


def fill(network: nn.Module, state: Mapping[str, Tensor], who: str) -> None:
    """Load exactly these tensors into a network.

    ValueError names what the network lacks, what it does not know and what has another shape: a file that fits only in
    part is another network's, and what it would compute means nothing.
    """
    wanted = network.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    reshaped = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & state.keys())
        if state[name].shape != wanted[name].shape
    ]
    complaints = [
        f"{len(found)} tensors {what}: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if found
    ]
    if complaints:
        raise ValueError(f"{who}: the checkpoint is not that of this network: {'; '.join(complaints)}")
    network.load_state_dict(dict(state))


def placed(network: Network, device: str, precision: Precision = "float32", *, compiled: bool = False) -> Network:
    """The network for inference on a device, in a precision (see `Precision`); compiled when asked and on a GPU."""
    network.eval().requires_grad_(False)
    network.to(device=device, dtype=dtype_on(device, precision))
    if compiled and device.startswith("cuda"):
        network.compile(dynamic=False)
    return network


def dtype_on(device: str, precision: Precision) -> torch.dtype:
    """The torch dtype that a precision stands for on a device."""
    import torch

    if precision not in get_args(Precision):
        raise ValueError(f"expected precision {', '.join(get_args(Precision))}, got {precision!r}")
    found: torch.dtype = getattr(torch, precision) if device.startswith("cuda") else torch.float32
    return found


def autocast(device: str, precision: Precision) -> AbstractContextManager[None]:
    """Matrix products and convolutions in a precision on a GPU, everything else, coordinates above all, in float32.

    For networks that compute where to look: bfloat16 tells no positions closer than 1/256 of the image apart.
    """
    import torch

    dtype = dtype_on(device, precision)
    return torch.autocast("cuda", dtype=dtype) if dtype != torch.float32 else nullcontext()


def finite(values: Tensor, who: str) -> Tensor:
    """The same values; FloatingPointError when one is not finite.

    Thresholds and maxima would turn such values into labels that look valid: nothing found, or the first class.
    """
    if not values.isfinite().all():
        raise FloatingPointError(
            f"{who}: the network gave values that are not finite, expected finite ones: a precision of more range "
            "(bfloat16 or float32) may help"
        )
    return values


def require(who: str, package: str, extra: str) -> Any:
    """An optional package, imported; ImportError says which extra brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{who} needs {package}: pip install '.[{extra}]' ({error})") from error
