"""Golden values of ml-4m's presets, options, files and training for tests/test_fourm_presets.py and its neighbours.

Run in the root of this project with a checkout of apple/ml-4m (version 1.0.0) and the path of einops, which it needs:

    PYTHONPATH=.:<einops> python tests/golden/make_fourm_presets.py <checkout>

fourm_presets.npz has, for `benchmarks.parity.hard_batch(0)` (its tensors are kept, too), for every preset of ml-4m at
small width and for every option of `benchmarks.parity.OPTIONS`: losses, a digest of logits and of gradients (`digest`),
the names of parameters that have gradients, and, of the options, attention masks and ml-4m's "token" loss; the names
and shapes of every preset's whole state for the modalities of 4M-21; features of FMViT. Weights are
`benchmarks._ml4m.weight` of each name. fourm_training.npz has the losses of `benchmarks._parity_training`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _ml4m, _parity_training, parity
from model.checkpoint import ml4m_spec

HERE = Path(__file__).parent
PRESETS, TRAINING = HERE / "fourm_presets.npz", HERE / "fourm_training.npz"
VARIANTS = ("gelu", "swiglu_nobias", "swiglu_qknorm_nobias")
FIELDS = ("enc_ids", "enc_mod", "enc_pos", "dec_ids", "dec_mod", "dec_pos", "dec_targets", "dec_reach")


def digest(values: Any) -> np.ndarray:
    """Norm, largest entry, two projections on random directions, three entries: float32 (7,)."""
    flat = np.asarray(values, np.float64).reshape(-1)
    rng = np.random.default_rng(flat.size)
    directions = rng.standard_normal((2, flat.size))
    projected = directions @ flat / np.linalg.norm(directions, axis=1)
    chosen = flat[rng.integers(0, flat.size, 3)]
    return np.float32([np.linalg.norm(flat), np.abs(flat).max(), *projected, *chosen])


def text(value: Any) -> np.ndarray:
    """JSON as bytes."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def images(side: int) -> torch.Tensor:
    """Two normalised images (2, 3, side, side)."""
    drawn = np.random.default_rng(side).standard_normal((2, 3, side, side), np.float32)
    return torch.from_numpy(drawn)


def _results(model: torch.nn.Module, batch: Any) -> dict[str, np.ndarray]:
    found = parity.run_reference(model, batch, parity.SPECS)
    gradients = {name: g for name, g in found["gradients"].items() if g.abs().max()}
    names = [spec.name for spec in parity.SPECS_OUT]
    return {
        "losses": np.float32([found["losses"][name].item() for name in names]),
        "loss": found["loss"].numpy(),
        "logits": np.stack([digest(found["logits"][n]) for n in names if len(found["logits"][n])]),
        "gradients": np.stack([digest(g) for g in gradients.values()]),
        "names": text(list(gradients)),
    }


def _vit(theirs: _ml4m.Reference, variant: str) -> np.ndarray:
    """Features of ml-4m's FMViT of the small size in that variant, its blocks those of parity.SMALL."""
    model = theirs.vit.FMViT(config={
        "image_size": 224, "patch_size": 16, "act_layer": "GELU" if variant == "gelu" else "SiLU",
        "norm_bias": variant == "gelu", "dim": 32, "encoder_depth": 2, "num_heads": 2, "mlp_ratio": 4.0,
        "qkv_bias": variant == "gelu", "proj_bias": variant == "gelu", "mlp_bias": variant == "gelu",
        "gated_mlp": variant != "gelu", "qk_norm": "qknorm" in variant,
    }).eval()  # fmt: skip
    _ml4m.draw(model)
    with torch.no_grad():
        return model(images(224)).numpy()


def main(checkout: str) -> None:
    """Write both files."""
    torch.set_num_threads(1)
    theirs, batch = _ml4m.load(Path(checkout)), parity.hard_batch(0)
    note = f"apple/ml-4m 1.0.0, torch {torch.__version__}, float32, benchmarks.parity.hard_batch(0)"
    arrays: dict[str, Any] = {"note": note}
    arrays |= {f"batch/{name}": getattr(batch, name).numpy().astype(np.int16) for name in FIELDS}
    arrays |= {f"batch/pixels/{n}": v.numpy().astype(np.float16) for n, v in batch.pixels.items()}
    arrays |= {f"batch/embeddings/{n}": v.numpy() for n, v in batch.embeddings.items()}
    batch = replace(batch, pixels={n: v.half().float() for n, v in batch.pixels.items()})
    whole = [ml4m_spec(name) for name in _ml4m.MODALITIES]
    specs, specs_out = list(parity.SPECS), list(parity.SPECS_OUT)
    for name in _ml4m.PRESETS:
        config, width = parity.small_preset(name)
        model = theirs.model({**theirs.preset(name), "dim": width}, specs, specs_out, tied=True)
        _ml4m.draw(model)
        arrays |= {f"{name}/{key}": value for key, value in _results(model, parity.with_inputs(batch)).items()}
        state = theirs.on_meta(theirs.preset(name), whole, [s for s in whole if s.is_target]).state_dict()
        arrays[f"{name}/state"] = text({key: list(value.shape) for key, value in state.items()})
    for name, changes in parity.OPTIONS.items():
        config = replace(parity.SMALL, **changes)
        model = theirs.model(theirs.settings(config), specs, specs_out, tied=config.tie_embeddings)
        _ml4m.draw(model, tied=config.tie_embeddings, shared=config.share_modality_embeddings)
        arrays |= {f"{name}/{key}": value for key, value in _results(model, batch).items()}
        encoder, decoder = parity.reference_masks(model, batch, parity.SPECS)
        arrays |= {f"{name}/encoder": encoder, f"{name}/decoder": np.packbits(decoder, axis=-1)}
        lengths = batch.enc_mod.shape[1], batch.dec_mod.shape[1]
        with torch.no_grad():
            token, _ = model(_ml4m.as_reference(batch, specs), *lengths, loss_type="token")
        arrays[f"{name}/token"] = token.numpy()
    for variant in VARIANTS:
        arrays[f"vit/{variant}"] = np.stack([digest(f) for f in _vit(theirs, variant).reshape(-1, 32)[::7]])
    np.savez_compressed(PRESETS, **arrays)
    batches = [_parity_training.batch_at(number) for number in range(200)]
    losses = np.float64(_parity_training.losses_of_reference(theirs, batches))
    packed = {name: np.stack([getattr(b, name).numpy() for b in batches]).astype(np.int16) for name in FIELDS}
    rows = np.concatenate([b.pixels["rgb@64"].numpy()[:, 0] for b in batches if "rgb@64" in b.pixels])
    np.savez_compressed(TRAINING, note=note, losses=losses, first_pixels=rows.astype(np.float32), **packed)
    for path in (PRESETS, TRAINING):
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main(sys.argv[1])
