"""What made a cell: the labeler, its settings, its weights, and the versions of the libraries it ran on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from typing import Any

from dataengine.labeler import Labeler

_LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "torch", "transformers", "open_clip_torch", "timm")


def of_labeler(labeler: Labeler) -> dict[str, Any]:
    """The provenance of a labeler's cells. Settings that are paths stay out: content decides, never a path."""
    weights = labeler.weights()
    return {
        **labeler.identity(),
        **labeler.facts(),
        "inputs": list(labeler.inputs),
        "weights": None if weights is None else dataclasses.asdict(weights),
        "libraries": versions(),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of the libraries that can change a label."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def spec(identity: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The identity of a cell: sha256 over what computes it and the specs of the cells it is computed from."""
    return specs(identity)(inputs)


def specs(identity: Mapping[str, Any]) -> Callable[[Mapping[str, str]], str]:
    """`spec` for many cells of one identity, which is written out and hashed once."""
    # The JSON text of {"identity": identity, "inputs": inputs} with sorted keys, in two parts.
    head = hashlib.sha256(f'{{"identity": {json.dumps(identity, sort_keys=True)}, "inputs": '.encode())

    def of(inputs: Mapping[str, str]) -> str:
        digest = head.copy()
        digest.update((json.dumps(inputs, sort_keys=True) + "}").encode())
        return digest.hexdigest()

    return of
