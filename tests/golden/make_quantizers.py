"""Writes quantizers.npz: what the quantizers of ml-4m do in twenty training steps from seeded random states.

The reference is https://github.com/apple/ml-4m at commit COMMIT below; beside this project's own packages it needs
einops. From the root of this repository, with the reference checked out at DIR:

    PYTHONPATH=. python tests/golden/make_quantizers.py DIR

The reference draws from torch's own generator, which is seeded before the first step; ours from its codebook's, seeded
alike. Gumbel noise depends on how torch was built, so numpy draws it for both.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

COMMIT = "cda590faa3b9f022c28537193d3e1650527646a3"
STEPS = 20
SEED = 23
SHAPE = (2, 8, 4, 5)
"""Of the latents of a step: batch, width, rows, columns."""


@dataclass(frozen=True)
class Case:
    """Settings under ml-4m's names."""

    quant_type: str = "lucid"
    codebook_size: int = 48
    latent_dim: int = SHAPE[1]
    num_codebooks: int = 1
    norm_codes: bool = True
    norm_latents: bool = False
    ema_decay: float = 0.9
    threshold_ema_dead_code: float = 0.15
    code_replacement_policy: str = "batch_random"
    commitment_weight: float = 0.7
    kmeans_init: bool = False
    seed: int = 0


CASES = {
    "cosine": Case(),
    "cosine_few": Case(codebook_size=12, norm_latents=True, threshold_ema_dead_code=1.0),
    "cosine_many_dead": Case(codebook_size=96, threshold_ema_dead_code=0.5),
    "cosine_lbg": Case(code_replacement_policy="linde_buzo_gray"),
    "cosine_kmeans": Case(kmeans_init=True),
    "cosine_heads": Case(num_codebooks=2),
    "euclid": Case(norm_codes=False),
    "euclid_lbg": Case(norm_codes=False, code_replacement_policy="linde_buzo_gray"),
    "euclid_kmeans": Case(norm_codes=False, kmeans_init=True),
    "memcodes": Case(quant_type="memcodes", num_codebooks=4),
    "memcodes_one": Case(quant_type="memcodes"),
}


def latents(step: int) -> Tensor:
    """Float32 of `SHAPE`: noise around twelve directions, some far commoner than others."""
    rng = np.random.default_rng([SEED, step])
    centres = np.random.default_rng(SEED).normal(size=(12, SHAPE[1])) * 2
    chosen = centres[rng.geometric(0.2, size=(SHAPE[0], *SHAPE[2:])) % 12]
    x = chosen + 0.3 * rng.normal(size=chosen.shape)
    return torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32).copy())


def random_state(module: nn.Module) -> dict[str, Tensor]:
    """Seeded values for everything that a case's module holds, except for what k-means will make.

    The counts differ, because ml-4m sorts them for its replacement by the most used codes, and not stably.
    """
    rng = np.random.default_rng(SEED + 1)
    state = module.state_dict()
    kmeans = float(state.get("_codebook.initted", torch.ones(1))) == 0
    found = {}
    for name in sorted(state):
        value = rng.normal(size=tuple(state[name].shape)).astype(np.float32)
        found[name] = state[name] if name.startswith("_codebook") else torch.from_numpy(value * 0.5)
        if name == "_codebook.embed" and not kmeans:
            found[name] = nn.functional.normalize(torch.from_numpy(value), dim=-1)
        if name == "_codebook.cluster_size" and not kmeans:
            found[name] = torch.from_numpy(rng.uniform(0, 0.5, size=value.shape).astype(np.float32))
    if "_codebook.embed_avg" in found and not kmeans:
        found["_codebook.embed_avg"] = found["_codebook.embed"].clone()
    return found


@contextlib.contextmanager
def numpy_noise() -> Iterator[None]:
    """`Tensor.exponential_`, the source of Gumbel noise, from numpy."""
    rng = np.random.default_rng(SEED + 2)

    def exponential_(self: Tensor, *args: Any, **named: Any) -> Tensor:
        return self.copy_(torch.from_numpy(rng.exponential(size=tuple(self.shape)).astype(np.float32)))

    with mock.patch.object(Tensor, "exponential_", exponential_):
        yield


def run(module: nn.Module, generator: torch.Generator | None) -> dict[str, np.ndarray]:
    """Twenty steps of training by plain gradient descent and one evaluation; draws start from `SEED`."""
    module.load_state_dict(random_state(module))
    module.train()
    with torch.random.fork_rng(devices=[]):
        (generator.manual_seed if generator else torch.manual_seed)(SEED)
        ids, losses, grads = [], [], {}
        learned = dict(module.named_parameters())
        with numpy_noise():
            for step in range(STEPS):
                x = latents(step).requires_grad_()
                out, loss, found = module(x)
                loss = loss.sum()  # the reference's has one entry
                aim = torch.nn.functional.mse_loss(out, latents(step) / 2) + loss
                wanted = torch.autograd.grad(aim, [x, *learned.values()])
                with torch.no_grad():
                    for parameter, grad in zip(learned.values(), wanted[1:], strict=True):
                        parameter -= 0.5 * grad
                ids.append(found.numpy())
                losses.append(float(loss.detach()))
                if step in (0, STEPS - 1):
                    grads[f"grad_x_{step}"] = wanted[0].numpy()
                    names = (f"grad_{name}_{step}" for name in learned)
                    grads |= {name: g.numpy() for name, g in zip(names, wanted[1:], strict=True)}
    module.eval()
    with torch.no_grad():
        out, _, found = module(latents(STEPS))
    state = {f"state_{name}": value.detach().numpy() for name, value in module.state_dict().items()}
    last = {"out": out.detach().numpy(), "eval_ids": found.numpy()}
    return {"ids": np.stack(ids), "loss": np.array(losses), **grads, **state, **last}


def reference(folder: Path) -> tuple[ModuleType, ModuleType]:
    """The reference's two files, loaded without the rest of its package."""
    found = []
    for name in ("quantize_lucid", "quantize_memcodes"):
        spec = importlib.util.spec_from_file_location(name, folder / "fourm" / "vq" / "quantizers" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(module)
    return found[0], found[1]


def made(case: Case, lucid: ModuleType, memcodes: ModuleType) -> nn.Module:
    """The reference's module of a case, made as its `VQ` makes it."""
    module: nn.Module
    if case.quant_type == "memcodes":
        module = memcodes.Memcodes(dim=case.latent_dim, codebook_size=case.codebook_size, heads=case.num_codebooks)
    else:
        module = lucid.VectorQuantize(
            dim=case.latent_dim,
            codebook_size=case.codebook_size,
            codebook_dim=case.latent_dim,
            heads=case.num_codebooks,
            use_cosine_sim=case.norm_codes,
            threshold_ema_dead_code=case.threshold_ema_dead_code,
            code_replacement_policy=case.code_replacement_policy,
            sync_codebook=False,
            decay=case.ema_decay,
            commitment_weight=case.commitment_weight,
            norm_latents=case.norm_latents,
            kmeans_init=case.kmeans_init,
        )
    return module


def main() -> None:
    """Run every case."""
    files = reference(Path(sys.argv[1]))
    found = {
        f"{name}/{what}": value for name, case in CASES.items() for what, value in run(made(case, *files), None).items()
    }
    small = {name: v.astype(np.int16) if v.dtype == np.int64 else v for name, v in found.items()}
    np.savez_compressed(
        Path(__file__).with_name("quantizers.npz"),
        **small,
        note=f"apple/ml-4m {COMMIT[:7]}, torch {torch.__version__}, {STEPS} steps of latents {SHAPE}, seed {SEED}",
    )


if __name__ == "__main__":
    main()
