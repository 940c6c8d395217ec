"""Writing id by id says what decoding the whole sequence says, for any context and several sequences of a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.fourm import Context, FourM, FourMConfig
from model.masking import MaskedBatch
from model.spec import ModalitySpec
from model.writing import Writer

WORDS = ModalitySpec(name="words", kind="sequence", max_tokens=9, vocab_size=220, max_positions=7)
OTHER = ModalitySpec(name="tok_a", kind="tokens", max_tokens=4, vocab_size=6)
BIASED: dict[str, Any] = {"gated_mlp": False, "act": "GELU", "qkv_bias": True, "proj_bias": True, "norm_bias": True}


def whole(model: FourM, context: Context, ids: torch.Tensor) -> torch.Tensor:
    """Scores (T, n, V) of one pass over all ids (T, n)."""
    places = torch.arange(ids.shape[1]).expand_as(ids)
    none = torch.empty(len(ids), 0, dtype=torch.int64)
    batch = MaskedBatch(
        modalities=("words", "tok_a"), enc_ids=none, enc_mod=none, enc_pos=none, dec_ids=ids,
        dec_mod=torch.zeros_like(ids), dec_pos=places.masked_fill(places >= 7, 0), dec_targets=ids,
        dec_reach=places + 1, pixels={}, embeddings={},
    )  # fmt: skip
    return model.logits(model.decode(batch, context), "words")


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, BIASED, {"decoder_causal_mask": True}])
@pytest.mark.parametrize(("lengths", "copies"), [((3, 3), 1), ((1, 5, 2), 3)])
@torch.inference_mode()
def test_each_id_is_scored_as_in_one_pass(options: dict[str, Any], lengths: tuple[int, ...], copies: int) -> None:
    config = FourMConfig(dim=32, encoder_depth=1, decoder_depth=3, num_heads=2, **options)
    model = FourM(config, (WORDS, OTHER), (WORDS, OTHER), seed=1).eval()
    rng = torch.Generator().manual_seed(0)
    context = Context(torch.randn(sum(lengths), 32, generator=rng), lengths)
    ids = torch.randint(204, 220, (len(lengths) * copies, 9), generator=rng)
    writer = Writer(model, WORDS, context, copies=copies, most=9)
    written = torch.stack([writer.scores(column) for column in ids.unbind(1)], dim=1)
    parts = context.tokens.split(lengths)
    each = Context(torch.cat([part for part in parts for _ in range(copies)]), tuple(np.repeat(lengths, copies)))
    torch.testing.assert_close(written, whole(model, each, ids), rtol=1e-4, atol=1e-6)
