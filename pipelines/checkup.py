"""A checkup of labelers on this machine: weights, licence, load time, size, memory, images/s, and whether what they
give is valid and what it was before."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dataengine import modalities, plugins
from dataengine.labeler import Labeler, Loaded
from dataengine.measured import Measured
from dataengine.replay import arrays
from dataengine.sample import Sample
from pipelines.doctor import no_downloads
from pipelines.measure import measure_and_label, memory_of
from pipelines.running import console

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
"""Those of scikit-image that it is done on: 512 x 512, 400 x 600, 300 x 451 and 427 x 640 pixels."""
UNKNOWN = "no golden output known"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of one labeler. `detail` says what is wrong, and what to do about it."""

    labeler: str
    emits: tuple[str, ...]
    outcome: Literal["ready", "no weights", "failed"] = "ready"
    detail: str = ""
    gate: str = ""
    source: str = ""
    """Of the weights; empty for an algorithm."""
    sha256: str = ""
    licence: str = ""
    random: bool = False
    parameters: int = 0
    gflop: float | None = None
    """Of one image of those it was done on: two operations a multiplication with addition; None where not counted."""
    host_bytes: int = 0
    """The most memory that the process held while it loaded and labelled one image at a time."""
    num_valid: int = 0
    num_images: int = 0
    golden: str = UNKNOWN
    measured: Measured | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the images a second by batch."""
        speeds = {} if self.measured is None else {b.size: b.images_per_second for b in self.measured.batches}
        return {**asdict(self), "images_per_second": speeds}


@dataclass
class _Inside:
    """What is looked at in the process of a loaded labeler."""

    sample: Sample
    parameters: int = 0
    gflop: float | None = None
    host_bytes: int = 0
    before: int = field(default_factory=lambda: _parameters())

    def __call__(self, call: Loaded) -> None:
        self.parameters = _parameters() - self.before
        self.host_bytes = memory_of("cpu").peak()
        self.gflop = _gflop(call, self.sample)


def _parameters() -> int:
    """The values of all parameters of networks that this process holds."""
    import gc

    torch: Any = sys.modules.get("torch")
    if torch is None:
        return 0
    gc.collect()  # what is not in use any more must not be counted once and then not
    return sum(p.numel() for p in gc.get_objects() if issubclass(type(p), torch.nn.Parameter))


def _gflop(call: Loaded, sample: Sample) -> float | None:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    from torch.utils.flop_counter import FlopCounterMode

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer, which no counter looks into
    try:
        with FlopCounterMode(display=False) as counter:
            call([sample])
    except Exception:
        # A compiled network, or one with operators of its own, cannot be watched; it works all the same.
        return None
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 1e9


def photographs(inputs: Sequence[str]) -> list[Sample]:
    """Photographs of different sizes; what a labeler reads besides the image is made up, the same every time."""
    import skimage.data

    rng, out = np.random.default_rng(0), []
    for name in PHOTOGRAPHS:
        rgb = np.ascontiguousarray(getattr(skimage.data, name)())
        others = {m: modalities.load(m).example(rng, rgb.shape[:2]) for m in inputs if m != "rgb"}
        out.append(Sample(name, {"rgb": rgb, **others}))
    return out


def examine(labeler: Labeler, device: str, golden: Path | None = None) -> Finding:
    """Load a labeler in this process, measure it and check what it gives; nothing that it throws gets out."""
    found = Finding(labeler=labeler.name, emits=labeler.emits, gate=labeler.gate)
    try:
        weights = labeler.weights()
    except FileNotFoundError as error:
        return replace(found, outcome="no weights", detail=str(error))
    except Exception as error:
        return _failed(found, error)
    if weights is not None:
        licence, source = weights.licence, weights.source
        found = replace(found, source=source, sha256=weights.sha256, licence=licence, random=weights.random)
    samples = photographs(labeler.inputs)
    inside = _Inside(samples[0])
    try:
        measured, outputs = measure_and_label(labeler, samples, device, loaded=inside)
        return replace(
            found,
            parameters=inside.parameters,
            gflop=inside.gflop,
            host_bytes=inside.host_bytes,
            num_valid=sum(map(bool, outputs)),
            num_images=len(samples),
            golden=UNKNOWN if golden is None else _compared(labeler, samples, outputs, golden),
            measured=measured,
        )
    except FileNotFoundError as error:
        return replace(found, outcome="no weights", detail=str(error))
    except Exception as error:
        return _failed(found, error)


def _failed(found: Finding, error: BaseException) -> Finding:
    # Whatever a network or a library throws is what the checkup is there to find.
    said = str(error) if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: {error}"
    return replace(found, outcome="failed", detail=said[:1000])


def _compared(labeler: Labeler, samples: Sequence[Sample], outputs: Sequence[dict[str, Any]], golden: Path) -> str:
    """How the outputs differ from those kept for a labeler of this identity; they are kept when there are none."""
    identity = json.dumps(labeler.identity(), sort_keys=True, default=str)
    folder = golden / f"{labeler.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    kept, numbers, differ, largest = 0, 0, 0, 0.0
    for sample, output in zip(samples, outputs, strict=True):
        for name, value in output.items():
            codec = modalities.load(name)
            file, data = folder / f"{sample.key}.{name}.{codec.suffix}", codec.encode(value)
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
                kept += 1
                continue
            numbers += 1
            there = file.read_bytes()
            if there != data:
                differ += 1
                for a, b in arrays(codec.decode(there), codec.decode(data)):
                    apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
                    largest = max(largest, float(np.nanmax(apart, initial=0.0)))
    if kept:
        return f"kept {kept} outputs as golden"
    return f"{differ} of {numbers} differ, by at most {largest:.3g}" if differ else f"the same: {numbers} of {numbers}"


def checkups(
    names: Sequence[str], device: str, *, tiny: bool = False, download: bool = False, golden: Path | None = None
) -> Iterator[Finding]:
    """A finding for each labeler (all when none is named), each in a process of its own that a crash may end.

    `tiny` takes random checkpoints of a few kilobytes instead of the published ones. ValueError for an unknown name.
    """
    chosen = [plugins.load("labelers", name, Labeler)() for name in names or plugins.names("labelers")]
    with tempfile.TemporaryDirectory(prefix="checkup-") as folder, nullcontext() if download else no_downloads():
        for labeler in chosen:
            own = Path(folder) / labeler.name
            own.mkdir(exist_ok=True)
            with console.status(f"{labeler.name} ..."):
                yield _alone(labeler.tiny(own) if tiny else labeler, device, golden)


def _alone(labeler: Labeler, device: str, golden: Path | None) -> Finding:
    # A fresh process: what loading costs is seen, and a labeler that crashes costs its own finding alone.
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(examine, labeler, device, golden).result()
        except BrokenProcessPool as error:
            return _failed(Finding(labeler=labeler.name, emits=labeler.emits, gate=labeler.gate), error)


def lines(found: Finding) -> list[str]:
    """A finding in words: a headline, and what belongs to it."""
    emits, random = ", ".join(found.emits), ", RANDOM WEIGHTS: its labels mean nothing" if found.random else ""
    out = [f"{found.labeler} ({emits}): {found.outcome}{random}"]
    if found.detail:
        out.append(found.detail)
    if found.gate and found.outcome == "no weights":
        out.append(found.gate)
    if found.outcome == "no weights":
        out.append(f"to fetch them now: dataengine doctor labelers {found.labeler} --download")
    if found.sha256:
        out.append(f"weights {found.source}, sha256 {found.sha256[:16]}; licence {found.licence}")
    if found.measured is not None:
        seen = found.measured
        peak = (seen.weights_bytes + max(b.peak_bytes for b in seen.batches)) / 1e9
        host = f"{found.host_bytes / 1e9:.2f} GB of the machine's memory"
        size = [
            f"loaded in {seen.load_seconds:.1f} s",
            f"{peak:.2f} GB of the GPU's memory, {host}" if seen.gpu else host,
        ]
        if found.parameters:
            size.insert(1, f"{found.parameters / 1e6:,.3g} M parameters")
        if found.gflop:
            size.insert(2, f"{found.gflop:,.3g} GFLOP an image")
        speed = ", ".join(f"{b.size}: {b.images_per_second:.3g}" for b in seen.batches)
        full = "" if seen.full_at is None else f"; out of memory with {seen.full_at}"
        out += ["; ".join(size), f"images/s by batch on {seen.device}: {speed}{full}"]
        out.append(f"outputs: {found.num_valid} of {found.num_images} are valid; {found.golden}")
    return out


def show(found: Finding) -> None:
    """Print a finding, as soon as there is one: the next may take minutes."""
    first, *rest = lines(found)
    style = (
        "red" if found.outcome == "failed" else "yellow" if found.random or found.outcome == "no weights" else "green"
    )
    console.print(first, style=style, markup=False, highlight=False)
    for line in rest:
        console.print(f"  {line}", markup=False, highlight=False)
