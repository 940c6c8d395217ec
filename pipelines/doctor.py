"""What this machine can run: hardware, Ray, weights, licences, and packages that would shadow ours."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import psutil

from dataengine import plugins, provenance
from dataengine.labeler import Labeler

OUR_NAMES = ("dataengine", "labelers", "model", "pipelines")


def examine() -> dict[str, dict[str, str]]:
    """Findings by section: machine, packages, labelers."""
    return {"machine": _machine(), "packages": _packages(), "labelers": _labelers()}


def _machine() -> dict[str, str]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "cpu cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpus": ", ".join(gpus) or "none: networks run on the CPU",
        "bf16 on the CPU": "yes" if torch.backends.mkldnn.is_available() and _has_bf16() else "not in hardware",
        "ray cluster": os.environ.get("RAY_ADDRESS", "none named by RAY_ADDRESS: one is started here for each run"),
    }


def _has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo") as stream:
            return "avx512_bf16" in stream.read()
    except OSError:
        return False


def _packages() -> dict[str, str]:
    out = {"rivals": rivals() or "none: no other distribution owns one of our package names"}
    for name in ("ray", "torch", "transformers", "open_clip_torch", "segment-anything", "pyarrow", "webdataset"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = f"MISSING: pip install {name}"
    return out | {f"lib {k}": v for k, v in provenance.versions().items() if k not in out}


def rivals() -> str:
    """Other distributions that own one of our top-level names, with how to remove them; empty when there are none."""
    owners = importlib.metadata.packages_distributions()
    found = [
        f"{name} also comes with {owner}: pip uninstall {owner}"
        for name in OUR_NAMES
        for owner in sorted(set(owners.get(name, [])))
        if owner != "m21-dataengine"
    ]
    return "; ".join(found)


def _labelers() -> dict[str, str]:
    out = {}
    for name in plugins.names("labelers"):
        labeler = plugins.load("labelers", name, Labeler)()
        if not any(f.name == "checkpoint" for f in fields(labeler)):
            out[name] = f"ready (an algorithm): {', '.join(labeler.emits)}"
            continue
        out[name] = _weights(labeler)
    return out


def _weights(labeler: Labeler) -> str:
    """Whether the published weights are on this machine; nothing is downloaded to find out."""
    try:
        with no_downloads():
            weights = labeler.weights()
    except FileNotFoundError as error:
        return "; ".join(["weights not found", str(error), *([labeler.gate] if labeler.gate else [])])
    assert weights is not None
    return f"{weights.source}, {weights.licence}, sha256 {weights.sha256[:16]}"


@contextmanager
def no_downloads() -> Iterator[None]:
    """Nothing is fetched within it: what is not on this machine is not found."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
