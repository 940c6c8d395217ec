"""What masking a sample costs beside ml-4m, on the 4M-21 mixture: 19 modalities, texts that fit, that do not, and none.

python -m benchmarks.masking [--quick] [--reference DIR] [--json]

`ours` is milliseconds of processor time a sample, on one thread: `batch` in two steps for whole batches, of which
`draw` is the budgets; `one_by_one` sample by sample, collated; and `grids`, `sequences` and `embeddings` alone.
With `--reference`, a checkout of apple/ml-4m, its UnifiedMasking does the same, from the same values, its texts given
as ids in digits: without the time that its tokenizer takes. `ratios` is its time over ours.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _report
from model.masking import MaskingConfig, MixtureComponent, Plan, apply, collate, draw, mask_sample, present
from model.spec import ModalitySpec
from tests.golden import make_masking as golden

BATCH = 256
RANGES: dict[str, tuple[int, int]] = {"input_tokens": golden.INPUT_TOKENS, "target_tokens": golden.TARGET_TOKENS}
KINDS = {"grids": "image_mask", "sequences": "sequence_mask", "embeddings": "sequence_emb_mask_span"}
"""Ways to mask, and the methods of ml-4m for them; grids are tokens and pixels."""


def measure(quick: bool, reference: Path | None) -> dict[str, Any]:
    """Milliseconds a sample of ours, by kind, and of the reference where there is one."""
    rounds = 3 if quick else 15
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"benchmark": "masking", "batch_size": BATCH, "rounds": rounds, "ours": ours(rounds)}
    if reference is not None:
        figures["reference"] = theirs(reference, 100 if quick else 1000, rounds)
        figures["ratios"] = {name: ms / figures["ours"][name] for name, ms in figures["reference"].items()}
    return figures


def ours(rounds: int) -> dict[str, float]:
    """Whole batches, sample by sample, and by kind."""
    samples = golden.samples()
    batch = [samples[i % len(samples)] for i in range(BATCH)]
    specs = golden.specs()
    rng = np.random.default_rng(0)
    config = _config(specs)
    there = present(specs, batch)

    def one_by_one() -> None:
        collate([mask_sample(rng, sample, specs, config) for sample in batch], specs, 256, 256)

    out = {
        "batch": _milliseconds(
            lambda: apply(rng, draw(rng, specs, config, there), batch, specs, config), rounds, BATCH
        ),
        "draw": _milliseconds(lambda: draw(rng, specs, config, there), rounds, BATCH),
        "one_by_one": _milliseconds(one_by_one, rounds, BATCH),
    }
    plans = [draw(rng, specs, config, there) for _ in range(rounds)]
    for kind in KINDS:
        # The budgets of the whole mixture, applied to those of one kind.
        chosen = np.array([kind == ("grids" if spec.is_grid else spec.kind.removesuffix("s") + "s") for spec in specs])
        turns = itertools.cycle([Plan(p.components, p.inputs * chosen, p.targets * chosen) for p in plans])
        out[kind] = _milliseconds(lambda turns=turns: apply(rng, next(turns), batch, specs, config), rounds, BATCH)
    return out


def theirs(checkout: Path, number: int, rounds: int) -> dict[str, float]:
    """ml-4m: a call, without collating; and the parts of it by kind, as its own methods do them with those budgets."""
    values = [golden.as_ml4m(sample) for sample in golden.samples()]
    masking = golden.masker(golden.reference(checkout), range(len(golden.WEIGHTS)))
    spent: dict[str, float] = dict.fromkeys(KINDS, 0.0)

    def call() -> None:
        for i in range(number):
            masking(values[i % len(values)])

    out = {"batch": _milliseconds(call, rounds, number)}
    for kind, method in KINDS.items():
        setattr(masking, method, _timed(getattr(masking, method), spent, kind))
    for i in range(number):
        masking(values[i % len(values)])
    return out | {kind: seconds / number * 1e3 for kind, seconds in spent.items()}


def _timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        start = time.process_time()
        out = function(*args)
        spent[name] += time.process_time() - start
        return out

    return timed


def _config(specs: Sequence[ModalitySpec]) -> MaskingConfig:
    components = []
    for weight, (inputs, targets, keep) in zip(golden.WEIGHTS, golden.tables(), strict=True):
        keeps: Mapping[str, Any] = keep
        components.append(MixtureComponent(weight=weight, input_alphas=inputs, target_alphas=targets, keep=keeps))
    return MaskingConfig(components=tuple(components), **RANGES)


def _milliseconds(function: Callable[[], Any], rounds: int, samples: int) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times) / samples * 1e3


if __name__ == "__main__":
    _report.main(measure)
