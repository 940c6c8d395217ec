"""Which quantizer reconstructs best at equal bits, and how fast codes are found beside ml-4m.

python -m benchmarks.quantizers [--quick] [--reference DIR] [--json]

`compared` trains the same small ViT VQ-VAE with every quantizer on rendered scenes of 64 pixels, 8 x 8 tokens, and asks
how well it reconstructs scenes it has never seen. Encoder, decoder, batches, steps and bits are the same; `bits` is
what one image costs. Seconds are processor time, on one thread.

`search` times ml-4m's own sizes without any network. With `--reference`, a checkout of apple/ml-4m (whose quantizer
needs einops), its quantizer does the same beside ours, from the same state and the same draws, and `difference` is the
largest one between the two codebooks after twenty training steps.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import _report
from dataengine.corpora._raycast import MAX_DEPTH_M
from dataengine.corpora.scenes import render
from model.domains import Depth, Domain, Rgb
from model.tokenizers import _quantize
from model.tokenizers._quantize import usage
from model.tokenizers.vqvae import VQVAE, VQVAEConfig, dead_code_threshold

SIDE, PATCH, BATCH = 64, 8, 8
HELDOUT_SEED = 1_000_000


@dataclass(frozen=True)
class Amount:
    """How much is trained and measured."""

    steps: int = 1000
    scenes: int = 2000
    heldout: int = 200
    seeds: tuple[int, ...] = (0, 1)
    tasks: tuple[tuple[str, int], ...] = (("rgb", 1024), ("rgb", 4096), ("depth", 1024))
    rounds: int = 7
    search: tuple[int, int, int] = (1568, 16384, 32)
    update: tuple[int, int, int] = (1568, 8192, 32)


QUICK = Amount(steps=30, scenes=64, heldout=16, seeds=(0,), tasks=(("depth", 256),), rounds=2)
VARIANTS: dict[str, dict[str, Any]] = {
    "lucid": {},
    "lucid_kmeans": {"kmeans_init": True},
    "lucid_split": {"code_replacement_policy": "linde_buzo_gray"},
    "lucid_euclid": {"norm_codes": False},
    "memcodes": {"quant_type": "memcodes"},
    "fsq": {"quant_type": "fsq"},
    "simvq": {"quant_type": "simvq", "commitment_weight": 0.25},  # the paper's weight
}


def measure(quick: bool, reference: Path | None) -> dict[str, Any]:
    """Reconstruction at equal bits, and the speed of the search for codes."""
    amount = QUICK if quick else Amount()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"benchmark": "quantizers", "search": search(amount, reference), "compared": {}}
    for task, codes in amount.tasks:
        train, heldout, domain = maps(task, amount)
        for name, settings in VARIANTS.items():
            runs = []
            for seed in amount.seeds:
                config = replace(network(domain, codes, seed), **settings)
                runs.append(trained(train, heldout, domain, config, amount.steps))
                _report.console.print(f"{task}, {codes} codes, {name}, seed {seed}: error {runs[-1]['error']:.4g}")
            found["compared"].setdefault(f"{task}_{codes}", {})[name] = _mean(runs)
    return found


def _mean(runs: list[dict[str, float]]) -> dict[str, Any]:
    """The mean of each figure over the seeds, and the reconstruction of each seed."""
    means: dict[str, Any] = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
    return means | {"by_seed": [run["error"] for run in runs]}


# Reconstruction at equal bits.


def maps(task: str, amount: Amount) -> tuple[list[np.ndarray], list[np.ndarray], Domain]:
    """Maps to train on and others to measure with, and their domain."""
    parts = [(0, amount.scenes), (HELDOUT_SEED, amount.heldout)]
    train, heldout = ([_map(task, first + i) for i in range(num)] for first, num in parts)
    return train, heldout, Rgb() if task == "rgb" else Depth()


def _map(task: str, seed: int) -> np.ndarray:
    scene = render(seed, SIDE)
    return scene.rgb if task == "rgb" else scene.depth / np.float32(MAX_DEPTH_M)  # as its corpus stores it


def network(domain: Domain, codes: int, seed: int) -> VQVAEConfig:
    """The network of the demo's recipes."""
    return VQVAEConfig(
        domain=domain,
        image_size=SIDE,
        patch_size=PATCH,
        n_channels=3 if isinstance(domain, Rgb) else 1,
        enc_type="vit_96x1x3_enc",
        dec_type="vit_96x2x3_dec",
        codebook_size=codes,
        latent_dim=16,
        ema_decay=0.98,
        threshold_ema_dead_code=dead_code_threshold(BATCH * (SIDE // PATCH) ** 2, codes, share=8.0),
        seed=seed,
    )


def trained(
    train: list[np.ndarray], heldout: list[np.ndarray], domain: Domain, config: VQVAEConfig, steps: int
) -> dict[str, float]:
    """Figures of one run: reconstruction, use of the codes, processor seconds a step."""
    model = VQVAE(config).train()
    draws = np.random.default_rng(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_lr(step, steps))
    inputs = domain.to_network(train)
    spent = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for _ in range(steps):
            batch = inputs[torch.from_numpy(draws.integers(0, len(inputs), BATCH))]
            started = time.process_time()
            loss, _ = model.training_loss(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            spent += time.process_time() - started
    ids = torch.from_numpy(model.encode_batch(heldout))
    decoded = model.decode_batch(ids.numpy())
    vocabulary = model.quantize.vocab_size
    used = usage([ids], vocabulary)
    return {
        "error": _error(heldout, decoded, domain),
        "used_share": used.codes / vocabulary,
        "perplexity": used.perplexity,
        "vocabulary": float(vocabulary),
        "bits": (SIDE // PATCH) ** 2 * math.log2(vocabulary),
        "cpu_seconds_per_step": spent / steps,
    }


def _share_of_lr(step: int, steps: int) -> float:
    warm = min(50, steps // 10) or 1
    return (step + 1) / warm if step < warm else 0.01 + 0.99 * (1 + math.cos(math.pi * (step - warm) / steps)) / 2


def _error(values: list[np.ndarray], decoded: list[np.ndarray], domain: Domain) -> float:
    """Of images the root mean square error in grey levels; of depth the mean absolute relative error."""
    a, b = np.stack(values).astype(np.float64), np.stack(decoded).astype(np.float64)
    if isinstance(domain, Rgb):
        return float(np.sqrt(np.mean((a - b) ** 2)))
    return float(np.mean(np.abs(a - b) / np.maximum(a, 1e-6)))


# The search for codes.


def search(amount: Amount, reference: Path | None) -> dict[str, Any]:
    """Milliseconds of one evaluation and of one training step, and ml-4m's beside ours."""
    found: dict[str, Any] = {}
    for name, shape, train in (("evaluation", amount.search, False), ("training", amount.update, True)):
        num, codes, width = shape
        latents = [torch.from_numpy(_latents(step, num, width)) for step in range(20)]
        config = SimpleNamespace(codebook_size=codes, latent_dim=width, threshold_ema_dead_code=num / codes / 32)
        sides: dict[str, nn.Module] = {"ours": _quantize.make(config)}
        if reference is not None:
            sides["reference"] = _theirs(reference, config)
        for module in sides.values():
            module.train(train)
        figures: dict[str, Any] = {"vectors": num, "codes": codes, "width": width}
        if reference is not None:
            figures |= _differences(sides["ours"], sides["reference"], latents if train else latents[:1])
        for side, module in sides.items():
            figures[f"{side}_ms"] = 1000 * _seconds(module, latents, amount.rounds)
        if reference is not None:
            figures["times_faster"] = figures["reference_ms"] / figures["ours_ms"]
        found[name] = figures
    return found


def _latents(step: int, num: int, width: int) -> np.ndarray:
    """Float32 (1, width, num, 1), some directions commoner than others, so that codes die."""
    rng = np.random.default_rng(step)
    centres = np.random.default_rng(99).normal(size=(2000, width))
    chosen = centres[rng.geometric(0.002, size=num) % len(centres)]
    return (chosen + 0.3 * rng.normal(size=(num, width))).T[None, :, :, None].astype(np.float32).copy()


def _seconds(module: nn.Module, latents: list[Tensor], rounds: int) -> float:
    """The fastest of some calls, the first one not counted, in processor time."""
    taken = []
    with torch.no_grad():
        for x in latents[: rounds + 1]:
            started = time.process_time()
            module(x)
            taken.append(time.process_time() - started)
    return min(taken[1:])


def _differences(ours: nn.Module, theirs: nn.Module, latents: list[Tensor]) -> dict[str, float]:
    """The largest difference of the codebooks and the share of other ids, from one state and with the same draws."""
    theirs.load_state_dict(ours.state_dict())
    ours._codebook.generator.manual_seed(5)  # type: ignore[union-attr, operator]
    other, total = 0, 0
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        for x in latents:
            a, b = ours(x)[2], theirs(x)[2]
            other, total = other + int((a != b).sum()), total + a.numel()
    states: list[Mapping[str, Tensor]] = [ours.state_dict(), theirs.state_dict()]
    difference = max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])
    return {"difference": difference, "other_ids": other / total}


def _theirs(reference: Path, config: SimpleNamespace) -> nn.Module:
    """ml-4m's quantizer "lucid" with the same settings."""
    path = reference / "fourm" / "vq" / "quantizers" / "quantize_lucid.py"
    spec = importlib.util.spec_from_file_location("quantize_lucid", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"no {path}, expected a checkout of apple/ml-4m")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind: Callable[..., nn.Module] = module.VectorQuantize
    return kind(
        dim=config.latent_dim,
        codebook_size=config.codebook_size,
        codebook_dim=config.latent_dim,
        use_cosine_sim=True,
        decay=0.99,
        threshold_ema_dead_code=config.threshold_ema_dead_code,
    )


if __name__ == "__main__":
    _report.main(measure)
