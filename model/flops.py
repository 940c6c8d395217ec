"""The operations that a step of FourM takes at least: of real tokens only, padding is nobody's work.

Of a matrix product (n, k) x (k, m) there are 2nkm operations; all else (norms, activations, softmax, tables, the
optimizer) is left out, as is usual (Chowdhery et al. 2022, PaLM, appendix B). With D the width, H the hidden width of
the MLP (three matrices if gated, else two), n_b and m_b the real encoder tokens (registers included) and decoder tokens
of sample b, m_bg those of one modality g of it, and V_g the size of its vocabulary, a forward pass takes

    encoder  layers * (sum_b n_b * (8 D^2 + mlp) + sum_b 4 D n_b^2)             mlp = 2 * (3 or 2) * D * H
    between  sum_b n_b * 2 D^2                                                  the projection of the context
    decoder  layers * (sum_b m_b * (12 D^2 + mlp) + sum_b n_b * 4 D^2           projections of queries, keys and values
                       + sum_bg 4 D m_bg^2 + sum_b 4 D n_b m_b)                 scores of self- and cross-attention
    inputs   sum over tokens of pixels and vectors, 2 D * (their size)
    logits   sum_bg m_bg * 2 D V_g

A group that is causal counts as if all of it were seen, again as is usual; without `decoder_sep_mask` the groups are
the samples. Backward takes twice the forward pass, so a step takes three times; what is computed a second time to save
memory is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.fourm import FourM, FourMConfig
from model.masking import MaskedBatch
from model.measuring import Work
from model.spec import ModalitySpec

_BACKWARD = 2
"""Backward passes for one forward pass, by their operations."""


def flops(
    config: FourMConfig, specs_in: Sequence[ModalitySpec], specs_out: Sequence[ModalitySpec], batch: MaskedBatch
) -> float:
    """The operations of a forward pass on a batch on the CPU, by the formula above."""
    enc_mod, dec_mod = batch.enc_mod.numpy(), batch.dec_mod.numpy()
    names = batch.modalities
    n = (enc_mod >= 0).sum(axis=1, dtype=np.float64) + config.num_register_tokens
    # Targets of each sample and modality, padding counted in the last column and dropped.
    slot = np.arange(len(dec_mod))[:, None] * (len(names) + 1) + np.where(dec_mod < 0, len(names), dec_mod)
    counts = np.bincount(slot.ravel(), minlength=len(dec_mod) * (len(names) + 1)).reshape(len(dec_mod), -1)[:, :-1]
    m = counts.sum(axis=1, dtype=np.float64)
    groups = counts.astype(np.float64) if config.decoder_sep_mask else m[:, None]

    d = config.dim
    hidden = int(d * config.mlp_ratio)
    mlp = 6 * d * int(2 * hidden / 3) if config.gated_mlp else 4 * d * hidden
    encoder = n.sum() * (8 * d**2 + mlp) + 4 * d * (n**2).sum()
    decoder = m.sum() * (12 * d**2 + mlp) + n.sum() * 4 * d**2 + 4 * d * ((groups**2).sum() + (n * m).sum())
    total = config.encoder_depth * encoder + n.sum() * 2 * d**2 + config.decoder_depth * decoder

    inputs = np.bincount(enc_mod[enc_mod >= 0], minlength=len(names))
    sizes = {s.name: s.channels * s.patch_size**2 if s.kind == "pixels" else s.dim_in for s in specs_in}
    projected = {s.name for s in specs_in if s.kind in ("pixels", "embeddings")}
    total += sum(
        int(count) * 2 * d * sizes[name] for name, count in zip(names, inputs, strict=True) if name in projected
    )
    vocabularies = {s.name: s.vocab_size for s in specs_out}
    targets = counts.sum(axis=0)
    total += sum(int(count) * 2 * d * vocabularies[name] for name, count in zip(names, targets, strict=True) if count)
    return float(total)


@dataclass(frozen=True)
class FourMWork:
    """The `work` of `fit` for FourM; `slots` are the input and target tokens that the largest budgets give a sample."""

    config: FourMConfig
    specs_in: tuple[ModalitySpec, ...]
    specs_out: tuple[ModalitySpec, ...]
    slots: int

    @classmethod
    def of(cls, model: FourM, slots: int) -> FourMWork:
        """That of a model."""
        return cls(model.config, model.specs_in, model.specs_out, slots)

    def __call__(self, batch: MaskedBatch) -> Work:
        """What a batch is, counted on the CPU before it moves."""
        tokens = int((batch.enc_mod >= 0).sum() + (batch.dec_mod >= 0).sum())
        operations = (1 + _BACKWARD) * flops(self.config, self.specs_in, self.specs_out, batch)
        return Work(len(batch.enc_mod), tokens, len(batch.enc_mod) * self.slots, operations)
