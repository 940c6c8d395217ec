"""How fast the loader makes masked batches, how much memory it takes and how soon it begins, beside ml-4m's own.

python -m benchmarks.loader [--quick] [--reference DIR] [--json]

One dataset of the 4M-21 mixture, every value synthetic (`_loader_data`), is written as ml-4m's tars and converted by
`pack --from-ml4m`. Batches have 256 input and 256 target tokens, masked; every sample is used 4 times in a row, as
ml-4m configures it. Ours in three ways: `images`, RGB decoded from stored images; `pixels`, RGB stored at crop
size; `tokens`, all but RGB. With `--reference`, a checkout of apple/ml-4m, its get_train_dataloader and
build_mixture_dataloader go through the tars of the same samples; its packages (einops, albumentations 1.4.0 with
qudida) are found on PYTHONPATH.

Each measurement is a process of its own, on one thread, sides in turn. `one_process` loads where its batches are used,
`one_worker` in a worker process. `ratios` are of samples a second of processor time; those of the clock are beside
them. `first_batch` is of processes that nothing is warm in. `memory` is a worker's over many batches, small ones lest
it take half an hour; its ratio is of workers that make batches of full size. `private` of it is what one more worker
takes, the rest are libraries, which it shares with the process that it was forked from.
`feeding` is how many samples a second a GPU takes that trains the base size at 45 % of an H200's peak, counted on real
tokens, and how many cores make as many. `--quick` has few samples, little shuffling in the reference (whose memory then
says nothing), a worker alone, and 200 batches for memory in place of 10,000.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as numbers
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _fresh, _loader_data, _loader_timing, _report
from model.batches import PackedDataset, TokenBatches, spec_of
from model.feeding import Feed
from model.flops import flops
from model.fourm import FourMConfig
from model.masking import MaskingConfig
from model.tokenizers import text
from pipelines.recipes import _fourm
from pipelines.sources import shards

GOALS = {
    "images_ratio": 10.0, "tokens_ratio": 20.0, "pixels_ratio": 20.0, "first_batch_s": 2.0, "memory_ratio": 0.2,
}  # fmt: skip
CASES = {"images": "images", "pixels": "pixels", "tokens": "pixels"}
"""What is measured, and the packing that it reads."""
BUDGET = (256, 256)
REPEATS = 4
PEAK = 989e12
"""Dense bfloat16 operations a second of an H200, of its data sheet."""
MFU = 0.45
PLACES = {"one_worker": 1, "one_process": 0}


@dataclass(frozen=True)
class Amount:
    """How much is measured: samples in shards, a batch, samples a measurement and before it, batches for memory."""

    num_shards: int
    shard_size: int
    batch_size: int
    count: int
    warm: int
    reference_count: int
    reference_warm: int
    buffers: int
    rounds: int
    memory_batches: int
    memory_batch_size: int
    places: tuple[str, ...] = tuple(PLACES)


FULL = Amount(num_shards=8, shard_size=125, batch_size=64, count=6400, warm=1280, reference_count=1280,
              reference_warm=1920, buffers=1000, rounds=3, memory_batches=10_000, memory_batch_size=8)  # fmt: skip
QUICK = Amount(num_shards=1, shard_size=24, batch_size=16, count=480, warm=96, reference_count=96, reference_warm=64,
               buffers=16, rounds=1, memory_batches=200, memory_batch_size=8, places=("one_worker",))  # fmt: skip


def measure(quick: bool, reference: Path | None) -> dict[str, Any]:
    """Samples a second, processor time, memory and the time to the first batch, of ours and of the reference."""
    amount = QUICK if quick else FULL
    say = _report.console.print
    with tempfile.TemporaryDirectory(prefix="loader-") as name:
        folder = Path(name)
        say(f"{amount.num_shards * amount.shard_size} samples as tars ...")
        tars = _loader_data.tars(folder / "tars", amount.num_shards, amount.shard_size)
        source = _loader_data.pattern(folder / "tars", amount.num_shards)
        tokenizer = _text_tokenizer(folder, reference)
        sizes = {}
        for kind in _loader_data.KINDS:
            say(f"packed with {kind} ...")
            total = _loader_data.packed(source, folder / kind, kind, tokenizer)
            sizes[kind] = total / amount.num_shards / amount.shard_size
        packages = _packages(folder)
        found: dict[str, Any] = {
            "benchmark": "loader",
            "batch_size": amount.batch_size,
            "samples": amount.num_shards * amount.shard_size,
            "kilobytes_a_sample": {"tars": sum(tars.values()), "packed": sizes, "tars_of_each": tars},
            "ours": {case: {} for case in CASES},
        }
        rates: dict[tuple[str, str], list[Any]] = {}
        for number in range(amount.rounds):
            for place in amount.places:
                workers = PLACES[place]
                if reference is not None:
                    say(f"reference, {place}, round {number + 1} ...")
                    asked = _asked(amount, reference, source, workers)
                    one = _fresh.call("_loader_reference", "theirs", asked, packages)
                    rates.setdefault(("reference", place), []).append(one)
                for case, kind in CASES.items():
                    say(f"{case}, {place}, round {number + 1} ...")
                    some = {"root": str(folder / kind), "case": case, "batch_size": amount.batch_size}
                    asked = {**some, "warm": amount.warm, "count": amount.count, "workers": workers}
                    rates.setdefault((case, place), []).append(_fresh.call("loader", "rate", asked, packages))
        for (case, place), rounds in rates.items():
            side = found.setdefault("reference", {}) if case == "reference" else found["ours"][case]
            side[place] = _loader_timing.summary(rounds)
        say("the first batch ...")
        found["first_batch"] = _first(folder, amount, packages)
        say(f"{amount.memory_batches} batches for memory ...")
        some = {"root": str(folder / "images"), "case": "images"}
        asked = {**some, "batch_size": amount.memory_batch_size, "batches": amount.memory_batches}
        found["memory"] = _fresh.call("loader", "memory", asked, packages)
        say("profile and operations ...")
        asked = {**some, "batch_size": amount.batch_size, "count": amount.count}
        found |= _fresh.call("loader", "details", asked, packages)
    found["feeding"]["cores"] = {
        case: found["feeding"]["samples_per_second"] / side["one_worker"]["samples_per_cpu_second"]
        for case, side in found["ours"].items()
    }
    if reference is not None:
        found["ratios"] = _ratios(found)
    return {**found, "goals": GOALS}


def _ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Ours over the reference: samples a second of processor and of the clock; memory of a worker."""
    theirs = found["reference"]
    out: dict[str, Any] = {}
    for case, sides in found["ours"].items():
        out[case] = {
            place: {name: side[name] / theirs[place][name] for name in ("samples_per_cpu_second", "samples_per_second")}
            for place, side in sides.items()
        }
    ours, held = (side["one_worker"]["worker_memory"] for side in (found["ours"]["images"], theirs))
    out["memory"] = {name: ours[name] / held[name] for name in held}
    return out


def _text_tokenizer(folder: Path, reference: Path | None) -> Path:
    if reference is not None:
        from benchmarks._loader_reference import TEXT_TOKENIZER

        return reference.resolve() / TEXT_TOKENIZER
    path = folder / "text.json"
    words = " ".join((*_loader_data.WORDS, "point polygon none human pose global camera shape"))
    text.train([words] * 9, 4400, path)
    return path


def _packages(folder: Path) -> Path:
    where = _fresh.packages(folder / "packages")
    for name in ("model", "pipelines", "labelers"):
        (where / name).symlink_to(_fresh.HERE / name)
    return where


def _asked(amount: Amount, reference: Path, source: str, workers: int) -> dict[str, Any]:
    own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"reference": [str(reference.resolve()), *own], "source": source, "batch_size": amount.batch_size,
            "warm": amount.reference_warm, "count": amount.reference_count, "workers": workers,
            "buffers": amount.buffers}  # fmt: skip


def _first(folder: Path, amount: Amount, packages: Path) -> dict[str, Any]:
    """The medians of fresh processes."""
    out = {}
    for place in amount.places:
        asked = {
            "root": str(folder / "images"),
            "case": "images",
            "batch_size": amount.batch_size,
            "workers": PLACES[place],
        }
        each = [_fresh.call("loader", "first", asked, packages) for _ in range(amount.rounds)]
        out[place] = {name: float(np.median([one[name] for one in each])) for name in each[0]}
    return out


def _batches(root: str, case: str, batch_size: int) -> TokenBatches:
    """The loader that the recipe of 4M-21 makes for its first dataset."""
    dataset = PackedDataset(shards(root), repeats=REPEATS)
    names = [name for name in _fourm.INPUTS_21 if case != "tokens" or name != _fourm.RGB]
    columns = dataset.shards[0].columns
    components = tuple(c for c in _fourm.mod21() if any(c.input_alphas.get(name, 0.0) for name in names))
    config = MaskingConfig(components=components, input_tokens=BUDGET, target_tokens=BUDGET)
    specs = tuple(spec_of(columns[name], 16) for name in names)
    return TokenBatches(datasets=(dataset,), specs=specs, masking=config, batch_size=batch_size, seed=0)


def _make(root: str, case: str, batch_size: int) -> _loader_timing.Make:
    def make(workers: int) -> Iterator[Any]:
        batches = _batches(root, case, batch_size)
        if not workers:
            yield from map(batches, numbers())
            return
        with Feed(batches, numbers(), workers=workers) as feed:
            yield from feed

    return make


def rate(root: str, case: str, batch_size: int, warm: int, count: int, workers: int) -> dict[str, Any]:
    """One measurement of ours, in a process of its own, as all that follow."""
    torch.set_num_threads(1)
    return _loader_timing.rate(_make(root, case, batch_size), batch_size, warm, count, workers)


def first(root: str, case: str, batch_size: int, workers: int) -> dict[str, float]:
    """Seconds to the first batch, since the shards were looked for and since the process began."""
    torch.set_num_threads(1)
    began, imported = time.perf_counter(), _loader_timing.age()
    next(_make(root, case, batch_size)(workers))
    return {"first_batch_s": time.perf_counter() - began, "imports_s": imported, "in_all_s": _loader_timing.age()}


def memory(root: str, case: str, batch_size: int, batches: int) -> dict[str, Any]:
    """The memory of a worker over many batches."""
    torch.set_num_threads(1)
    return _loader_timing.memory_over(_make(root, case, batch_size), batches, max(batches // 20, 1))


def details(root: str, case: str, batch_size: int, count: int) -> dict[str, Any]:
    """Where the time goes, and what the batches are to a model."""
    return {"profile": profile(root, case, batch_size, count), "feeding": feeding(root, case, batch_size)}


def profile(root: str, case: str, batch_size: int, count: int) -> dict[str, Any]:
    """Milliseconds a sample by function, of their own time and with what they call; the profiler adds to all of it."""
    torch.set_num_threads(1)
    made = _make(root, case, batch_size)(0)
    next(made)
    profiler = cProfile.Profile(time.thread_time)
    rounds = -(-count // batch_size)
    profiler.enable()
    for _ in range(rounds):
        next(made)
    profiler.disable()
    stats: dict[tuple[str, int, str], Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    out: dict[str, Any] = {}
    for what, column in (("own_ms", 2), ("with_callees_ms", 3)):
        longest = sorted(stats.items(), key=lambda item: -item[1][column])[:25]
        out[what] = {
            f"{Path(file).name}:{name}": 1e3 * values[column] / rounds / batch_size
            for (file, _, name), values in longest
        }
    return out


def feeding(root: str, case: str, batch_size: int) -> dict[str, float]:
    """Operations of a step of base on a sample, of the tokens that batches really hold, and what a GPU takes."""
    batches = _batches(root, case, batch_size)
    some = [batches(number) for number in range(8)]
    outputs = [spec for spec in batches.specs if spec.name in _fourm.OUTPUTS_21]
    total = sum(3 * flops(FourMConfig.preset("base"), batches.specs, outputs, batch) for batch in some)
    operations = total / len(some) / batch_size
    return {
        "input_tokens": float(np.mean([(batch.enc_mod >= 0).sum() / batch_size for batch in some])),
        "target_tokens": float(np.mean([(batch.dec_mod >= 0).sum() / batch_size for batch in some])),
        "gflop_per_sample": operations / 1e9,
        "peak_tflops": PEAK / 1e12,
        "mfu": MFU,
        "samples_per_second": MFU * PEAK / operations,
    }


if __name__ == "__main__":
    _report.main(measure)
