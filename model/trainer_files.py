"""The `.pth` files of ml-4m's trainers: weights and the arguments of a command line, read without running anything."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The trainers set learning rates from an array, so that the optimizer's settings are scalars of numpy: a constructor of
# numbers, of a type that is among these. numpy 1 and numpy 2 name it differently.
_SCALAR: Any = np.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
]


def read(path: Path, wanted: str = "model") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments, and the weights under the key `wanted` ("model", or "model_ema" for averaged ones).

    Nothing of a file is run: it is unpickled with weights_only, which here knows besides argparse.Namespace and numbers
    of numpy. ValueError where it holds anything else.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_NUMBERS]):
            whole = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError, TypeError, IndexError) as error:
        expected = "expected tensors, numbers, texts and an argparse.Namespace alone"
        raise ValueError(f"{path} is not read: {expected} (weights_only): {error}") from error
    keys = sorted(map(str, whole)) if isinstance(whole, dict) else type(whole).__name__
    if not isinstance(whole, dict) or not {wanted, "args"} <= whole.keys():
        raise ValueError(f"{path}: found {keys}, expected {wanted!r} and 'args', as ml-4m's trainer writes them")
    tensors, args = whole[wanted], whole["args"]
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if not isinstance(args, Mapping) or not isinstance(tensors, Mapping):
        raise ValueError(f"{path}: expected weights and arguments by name, got {type(tensors)} and {type(args)}")
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(
            f"{path}: expected tensors in {wanted!r}, got {sorted({type(v).__name__ for v in tensors.values()})}"
        )
    return dict(args), dict(tensors)
