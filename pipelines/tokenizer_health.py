"""What a tokenizer in training does with samples it is not trained on: its codebook's use, and reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from model.tokenizers._vq import VQ
from model.tokenizers.divae import DiVAE
from pipelines import reconstruction
from pipelines.label_batches import Example
from pipelines.tokenizer_loss import tokenizer_in

AT_ONCE = 32
SHOWN = 8
SAMPLED = 16
"""Maps that a diffusion decoder makes each time, in `SAMPLING_STEPS` steps: what takes long."""
SAMPLING_STEPS = 10
_PIXELS = 128


class Health:
    """Callables for `model.loop.fit`: `figures` and `pictures` of held-out examples."""

    def __init__(self, modality: str, examples: Sequence[Example]) -> None:
        if not examples:
            raise ValueError(f"no held-out {modality}, expected at least one value")
        self.modality, self.examples = modality, examples

    def figures(self, module: nn.Module, step: int) -> dict[str, float]:
        """`heldout/usage` (share of codes seen), `heldout/dead` (codes not seen), `heldout/perplexity`, and metrics."""
        model = tokenizer_in(module)
        values = [example.value for example in self.examples]
        ids = encoded(model, values)
        seen = reconstruction.usage(ids, model.vocab_size, codebooks(model))
        num = min(len(ids), SAMPLED) if isinstance(model, DiVAE) else len(ids)
        made = decoded(model, ids[:num])
        true = reconstruction.comparable(model.domain, values[:num])
        found = {
            "usage": seen.share,
            "dead": float(seen.entries - seen.used),
            "perplexity": seen.perplexity,
            **reconstruction.figures(model.domain, made, true),
        }
        return {f"heldout/{name}": value for name, value in found.items() if np.isfinite(value)}

    def pictures(self, module: nn.Module, step: int) -> dict[str, Tensor]:
        """`heldout/<modality>`: originals above their reconstructions."""
        model = tokenizer_in(module)
        chosen = self.examples[:SHOWN]
        values = [example.value for example in chosen]
        made = decoded(model, encoded(model, values))
        true = reconstruction.comparable(model.domain, values)
        rows = []
        for shown, other in ((true, made), (made, true)):
            tiles = [
                _tile(reconstruction.picture(self.modality, model.domain, value, example.rgb, like))
                for value, like, example in zip(shown, other, chosen, strict=True)
            ]
            rows.append(np.concatenate(tiles, axis=1))
        return {f"heldout/{self.modality}": torch.from_numpy(np.concatenate(rows)).permute(2, 0, 1)}


def codebooks(model: VQ) -> int:
    """How many codebooks a tokenizer has: the heads of memcodes have one each, those of others share one."""
    return model.config.num_codebooks if model.config.quant_type == "memcodes" else 1


@torch.no_grad()
def encoded(model: VQ, values: Sequence[Any]) -> np.ndarray:
    """Ids int64 (B, *grid) of values, a few at a time; the model is used as it is."""
    device = model.quant_proj.weight.device
    parts = [model.domain.to_network(values[at : at + AT_ONCE]) for at in range(0, len(values), AT_ONCE)]
    return np.concatenate([model.quantized(part.to(device))[2].cpu().numpy() for part in parts])


@torch.no_grad()
def decoded(model: VQ, ids: np.ndarray, steps: int = SAMPLING_STEPS) -> list[Any]:
    """Values from ids; `steps` is for diffusion decoders."""
    device = model.quant_proj.weight.device
    out: list[Any] = []
    for at in range(0, len(ids), AT_ONCE):
        part = torch.from_numpy(ids[at : at + AT_ONCE]).to(device)
        made = model.decode_tokens(part, steps=steps) if isinstance(model, DiVAE) else model.decode_tokens(part)
        out += model.domain.from_network(made)
    return out


def _tile(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (_PIXELS, _PIXELS), interpolation=cv2.INTER_NEAREST_EXACT)
