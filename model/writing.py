"""Sequences written id by id: keys and values of what was read and written are kept, not computed again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.attention import attend
from model.fourm import Context, FourM
from model.spec import ModalitySpec

# B samples, C sequences of each, T all sequences, M keys of a sample, H heads, K head width, V vocabulary


class Writer:
    """Several sequences of each sample of a context, all written as far; those of a sample are neighbours.

    What it says is what `FourM.decode` says of all that was written, at the last id. `most` ids can be written.
    """

    def __init__(self, model: FourM, spec: ModalitySpec, context: Context, *, copies: int, most: int) -> None:
        self._model, self._spec, self._context = model, spec, context.tokens
        self._layers = [(_Past(most), _Read(context.lengths, copies)) for _ in model.decoder]
        self._written = 0

    def scores(self, ids_T: Tensor) -> Tensor:
        """Scores (T, V) of what follows when each sequence has gone on with its id (T,)."""
        spec = self._spec
        place = self._written if self._written < (spec.max_positions or spec.max_tokens) else 0
        y_TD = self._model.embed_target(spec.name, ids_T, torch.full_like(ids_T, place))
        for block, (past, read) in zip(self._model.decoder, self._layers, strict=True):
            y_TD = block(y_TD, self._context, past, read)
        self._written += 1
        self._context = self._context[:0]  # it was read
        return self._model.logits(self._model.decoder_norm(y_TD), spec.name)


class _Past:
    """Attention of each sequence's newest token to all of its tokens."""

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0
        self._held: list[Tensor] = []

    def __call__(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """(T, H, K)."""
        if not self._held:
            self._held = [x.new_empty(*x.shape[:2], self._most, x.shape[2]) for x in (k_THK, v_THK)]
        for held, new in zip(self._held, (k_THK, v_THK), strict=True):
            held[:, :, self._count] = new
        self._count += 1
        k_THNK, v_THNK = (held[:, :, : self._count] for held in self._held)
        return attend(q_THK[:, :, None], k_THNK, v_THNK)[:, :, 0]


class _Read:
    """Attention to a context whose keys and values come with the first call, and with later ones none."""

    def __init__(self, lengths: Sequence[int], copies: int) -> None:
        self._lengths, self._copies = list(lengths), copies
        self._held: list[Tensor] = []
        self._mask: Tensor | None = None

    def __call__(self, q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor) -> Tensor:
        """(T, H, K)."""
        if not self._held:
            parts = (x.split(self._lengths) for x in (k_SHK, v_SHK))
            self._held = [pad_sequence(list(x), batch_first=True).transpose(1, 2) for x in parts]
            if len(set(self._lengths)) > 1:
                ends = torch.tensor(self._lengths, device=q_THK.device)
                places = torch.arange(max(self._lengths), device=q_THK.device)
                self._mask = (places < ends[:, None])[:, None, None]
        k_BHMK, v_BHMK = self._held
        q_BHCK = q_THK.unflatten(0, (-1, self._copies)).transpose(1, 2)
        return attend(q_BHCK, k_BHMK, v_BHMK, self._mask).transpose(1, 2).flatten(0, 1)
