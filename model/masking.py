"""Random inputs and targets of a sample: token budgets, masks, and the flat batch the model reads.

Pure functions of a numpy Generator, in the distribution of ml-4m's UnifiedMasking (Bachmann et al. 2024, 4M-21).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from model.spans import fit_target, mask_spans, span_starts
from model.spec import EOS, ModalitySpec

Keep = Literal["random", "all", "binary"]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_EMPTY: Ints = np.empty(0, np.int64)
_KEEP_DECAY = 0.9  # of the keep probability, each time a masked sequence does not fit its budget


@dataclass(frozen=True, kw_only=True)
class MixtureComponent:
    """Dirichlet concentrations of one way to split the budgets.

    A modality that a table does not name is never drawn on that side; concentration 0 means "as good as never", and
    a table of zeros an even split (ml-4m clamps to 1e-9). `keep` says how the kept share of a sequence is drawn.
    """

    weight: float = 1.0
    input_alphas: Mapping[str, float]
    target_alphas: Mapping[str, float]
    keep: Mapping[str, Keep] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight {self.weight}, expected more than 0")
        for name, alpha in (*self.input_alphas.items(), *self.target_alphas.items()):
            if not alpha >= 0:
                raise ValueError(f"{name}: concentration {alpha}, expected at least 0")
        for name, keep in self.keep.items():
            if keep not in ("random", "all", "binary"):
                raise ValueError(f"{name}: keep {keep!r}, expected random, all or binary")


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """A weighted mixture of splits and the inclusive ranges of the input and target token counts.

    `redistribute` hands what a modality cannot hold to those with room; without it that part is lost, as in ml-4m.
    """

    components: tuple[MixtureComponent, ...]
    input_tokens: tuple[int, int]
    target_tokens: tuple[int, int]
    redistribute: bool = False

    def __post_init__(self) -> None:
        if not self.components:
            raise ValueError("components is empty, expected at least one")
        for name, (low, high) in (("input_tokens", self.input_tokens), ("target_tokens", self.target_tokens)):
            if not 0 <= low <= high:
                raise ValueError(f"{name} {(low, high)}, expected 0 <= low <= high")


@dataclass(frozen=True)
class MaskedSample:
    """The kept tokens of one sample, flat; see `MaskedBatch` for the meaning of each."""

    enc_ids: Ints
    enc_mod: Ints
    enc_pos: Ints
    dec_ids: Ints
    dec_mod: Ints
    dec_pos: Ints
    dec_targets: Ints
    dec_reach: Ints
    dense: dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class MaskedBatch:
    """Kept tokens of B samples, flat over modalities: N encoder and M decoder tokens, padded at the end.

    enc_mod, dec_mod: index into `modalities`, -1 is padding. enc_ids: token id; row of `embeddings`, or -1 for a masked
    span of it; unused for pixels. enc_pos, dec_pos: place on the grid, or rank in the masked sequence. dec_ids: input
    id, -1 is the mask token. dec_targets: id to predict. dec_reach: query i sees key j of its modality iff
    j < reach[i].
    pixels[m]: float32 (B, C, H, W). embeddings[m]: float32 (B, L, dim_in). All other tensors int64.
    """

    modalities: tuple[str, ...]
    enc_ids: torch.Tensor
    enc_mod: torch.Tensor
    enc_pos: torch.Tensor
    dec_ids: torch.Tensor
    dec_mod: torch.Tensor
    dec_pos: torch.Tensor
    dec_targets: torch.Tensor
    dec_reach: torch.Tensor
    pixels: dict[str, torch.Tensor] = field(default_factory=dict)
    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskedBatch:
        """The same batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MaskedBatch:
        """The same batch in page-locked memory (a DataLoader calls this)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> MaskedBatch:
        changed: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor):
                changed[f.name] = function(value)
            elif isinstance(value, dict):
                changed[f.name] = {name: function(tensor) for name, tensor in value.items()}
            else:
                changed[f.name] = value
        return MaskedBatch(**changed)


def mask_sample(
    rng: np.random.Generator,
    sample: Mapping[str, Any],
    specs: Sequence[ModalitySpec],
    config: MaskingConfig,
) -> MaskedSample:
    """Draw budgets, then which tokens of `sample` are inputs and which are targets.

    sample[name]: tokens int (n,); sequence list of ids without EOS, or list of lists if chunked; pixels float32
    (C, H, W); embeddings float32 (rows, dim_in). None or missing: absent, it takes no budget.
    """
    weights = np.array([component.weight for component in config.components], np.float64)
    component = config.components[int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right"))]
    num_inputs = int(rng.integers(config.input_tokens[0], config.input_tokens[1] + 1))
    num_targets = int(rng.integers(config.target_tokens[0], config.target_tokens[1] + 1))
    values = [_prepared(spec, sample.get(spec.name)) for spec in specs]

    caps = _input_caps(specs, values, config.redistribute)
    alphas = _alphas(specs, values, component.input_alphas)
    inputs = token_budget(rng, alphas, num_inputs, caps, config.redistribute)
    caps = _target_caps(specs, values, inputs, config.redistribute)
    alphas = _alphas(specs, values, component.target_alphas)
    targets = token_budget(rng, alphas, num_targets, caps, config.redistribute)

    encoder: list[tuple[Ints, Ints, int]] = []
    decoder: list[tuple[Ints, Ints, Ints, int]] = []
    dense: dict[str, NDArray[np.float32]] = {}
    for m, (spec, value) in enumerate(zip(specs, values, strict=True)):
        num_in, num_out = int(inputs[m]), int(targets[m])
        if value is None or num_in + num_out == 0:
            continue
        if spec.is_grid:
            order = rng.permutation(spec.max_tokens)
            pos_in, pos_out = np.sort(order[:num_in]), np.sort(order[num_in : num_in + num_out])
            ids = value if spec.kind == "tokens" else np.zeros(spec.max_tokens, np.int64)
            encoder.append((ids[pos_in], pos_in, m))
            if spec.kind == "tokens" and num_out:
                decoder.append((np.full(num_out, -1), ids[pos_out], pos_out, m))
        else:
            ids_in, ids_out = _mask_sequence(rng, spec, value, num_in, num_out, component.keep.get(spec.name, "random"))
            encoder.append((ids_in, np.arange(len(ids_in)), m))
            if len(ids_out) > 1:
                pos_out = np.arange(len(ids_out) - 1)
                pos_out[pos_out >= (spec.max_positions or spec.max_tokens)] = 0
                decoder.append((ids_out[:-1], ids_out[1:], pos_out, m))
        if spec.kind in ("pixels", "embeddings") and len(encoder[-1][0]):
            dense[spec.name] = sample[spec.name]
    rng.shuffle(decoder)
    return _flatten(encoder, decoder, dense, specs)


def collate(
    samples: Sequence[MaskedSample],
    specs: Sequence[ModalitySpec],
    num_encoder: int,
    num_decoder: int,
    *,
    trim: bool = True,
) -> MaskedBatch:
    """Stack samples; at most `num_encoder` and `num_decoder` tokens each, later modalities are cut.

    Padding goes to the longest sample of the batch (`trim`), or to the full counts where one static shape is wanted.
    """
    if trim:
        num_encoder = max(1, min(num_encoder, max(len(sample.enc_ids) for sample in samples)))
        num_decoder = max(1, min(num_decoder, max(len(sample.dec_ids) for sample in samples)))
    padded: dict[str, torch.Tensor] = {}
    for name in ("enc_ids", "enc_mod", "enc_pos", "dec_ids", "dec_mod", "dec_pos", "dec_targets", "dec_reach"):
        length = num_encoder if name.startswith("enc") else num_decoder
        # Padding sees padding (reach = length), so that no row of an attention mask is empty.
        fill = {"enc_mod": -1, "dec_mod": -1, "dec_reach": length}.get(name, 0)
        rows = np.full((len(samples), length), fill, np.int64)
        for row, sample in zip(rows, samples, strict=True):
            values = getattr(sample, name)[:length]
            row[: len(values)] = values
        padded[name] = torch.from_numpy(rows)
    pixels: dict[str, torch.Tensor] = {}
    embeddings: dict[str, torch.Tensor] = {}
    for spec in specs:
        if spec.kind in ("pixels", "embeddings") and any(spec.name in sample.dense for sample in samples):
            stacked = torch.from_numpy(_stack_dense(spec, samples))
            (pixels if spec.kind == "pixels" else embeddings)[spec.name] = stacked
    names = tuple(spec.name for spec in specs)
    return MaskedBatch(modalities=names, pixels=pixels, embeddings=embeddings, **padded)


def token_budget(rng: np.random.Generator, alphas: Floats, total: int, caps: Ints, redistribute: bool = False) -> Ints:
    """Split `total` tokens, at most `caps`, by a Dirichlet draw over `alphas`; -1 marks a modality left out."""
    budget = np.zeros(len(alphas), np.int64)
    (members,) = np.nonzero(alphas >= 0)
    if redistribute:
        members = members[caps[members] > 0]
    while total > 0 and len(members):
        budget[members] += _split(rng, alphas[members], total)
        total = int(np.maximum(budget - caps, 0).sum())
        budget = np.minimum(budget, caps)
        if not redistribute:
            break
        members = members[budget[members] < caps[members]]
    return budget


def _split(rng: np.random.Generator, alphas: Floats, total: int) -> Ints:
    """Integer shares that sum to `total`: floors of one draw, each leftover token to the argmax of a fresh draw."""
    shares = np.floor(dirichlet(rng, alphas) * np.float32(total)).astype(np.int64)
    leftover = total - int(shares.sum())
    if leftover > 0:
        winners = dirichlet(rng, alphas, leftover).argmax(axis=-1)
        shares += np.bincount(winners, minlength=len(alphas))
    return shares


def dirichlet(rng: np.random.Generator, alphas: Floats, num: int | None = None) -> NDArray[np.float32]:
    """Dirichlet draws in float32 that stay right at tiny concentrations, (k,) or (num, k).

    Gamma(a) = Gamma(a + 1) * U**(1/a), taken in logarithms. Draws below the smallest double are set to it before
    normalising, as torch's sampler does; that is what makes all-zero concentrations an even split in ml-4m.
    """
    shape = (len(alphas),) if num is None else (num, len(alphas))
    clamped = np.maximum(alphas, 1e-9)
    log_gamma = np.log(rng.standard_gamma(clamped + 1, shape)) + np.log1p(-rng.random(shape)) / clamped
    gamma = np.exp(np.maximum(log_gamma, np.log(np.finfo(np.float64).tiny)))
    weights = (gamma / gamma.sum(axis=-1, keepdims=True)).astype(np.float32)
    one = np.float32(1)
    return np.clip(weights, np.finfo(np.float32).tiny, np.nextafter(one, np.float32(0)))


@dataclass(frozen=True)
class _Sequence:
    ids: Ints  # with EOS, cut to max_tokens
    lengths: Ints | None  # tokens of each chunk; None: every token is masked on its own


def _prepared(spec: ModalitySpec, value: Any) -> Any:
    if value is None:
        return None
    if spec.kind == "tokens":
        ids = np.asarray(value, np.int64).reshape(-1)
        if len(ids) != spec.max_tokens:
            raise ValueError(f"{spec.name}: {len(ids)} tokens, expected {spec.max_tokens}")
        return ids
    if spec.kind == "pixels":
        side = spec.side * spec.patch_size
        if value.shape != (spec.channels, side, side):
            raise ValueError(f"{spec.name}: pixels {value.shape}, expected {(spec.channels, side, side)}")
        return value
    if spec.kind == "embeddings":
        return _Sequence(np.arange(min(len(value), spec.max_tokens)), None)
    if not spec.chunked:
        return _Sequence(np.array([*value, EOS][: spec.max_tokens], np.int64), None)
    chunks = [*(chunk for chunk in value if len(chunk)), [EOS]]
    lengths = np.array([len(chunk) for chunk in chunks], np.int64)
    lengths = lengths[np.cumsum(lengths) <= spec.max_tokens]
    ids = np.array([token for chunk in chunks[: len(lengths)] for token in chunk], np.int64)
    return _Sequence(ids, lengths)


def _alphas(specs: Sequence[ModalitySpec], values: Sequence[Any], table: Mapping[str, float]) -> Floats:
    present = [-1.0 if value is None else table.get(spec.name, -1.0) for spec, value in zip(specs, values, strict=True)]
    return np.array(present, np.float64)


def _input_caps(specs: Sequence[ModalitySpec], values: Sequence[Any], exact: bool) -> Ints:
    caps = [spec.max_tokens for spec in specs]
    if exact:
        caps = [len(v.ids) if isinstance(v, _Sequence) else cap for v, cap in zip(values, caps, strict=True)]
    return np.array(caps, np.int64)


def _target_caps(specs: Sequence[ModalitySpec], values: Sequence[Any], inputs: Ints, exact: bool) -> Ints:
    caps = np.array([spec.max_tokens for spec in specs], np.int64)
    for m, (spec, value) in enumerate(zip(specs, values, strict=True)):
        if spec.is_grid:
            caps[m] -= inputs[m]
        if exact and not spec.is_target:
            caps[m] = 0
        elif exact and isinstance(value, _Sequence):
            caps[m] = min(caps[m], len(value.ids) + 2)  # opened and closed by a sentinel
    return caps


def _mask_sequence(
    rng: np.random.Generator, spec: ModalitySpec, value: _Sequence, num_in: int, num_out: int, keep: Keep
) -> tuple[Ints, Ints]:
    """Input ids within `num_in` and target ids within `num_out`; embeddings: rows (-1 a masked span) and no target."""
    kept = _fitting_keep(rng, value, num_in, keep) if num_in else np.zeros(len(value.ids), bool)
    if spec.kind == "embeddings":
        inputs = np.where(kept, value.ids, -1)[kept | span_starts(kept)]
        return (inputs if num_in else _EMPTY), _EMPTY
    inputs, targets, sentinels = mask_spans(value.ids, kept)
    return (inputs if num_in else _EMPTY), fit_target(rng, targets, sentinels, num_out)


def _fitting_keep(rng: np.random.Generator, value: _Sequence, num_in: int, keep: Keep) -> NDArray[np.bool_]:
    # The kept share is uniform; ml-4m's docstring says cosine, its code and its checkpoints do not.
    if keep == "all":
        probability = 1.0
    elif keep == "binary":
        probability = float(rng.integers(2))
    else:
        probability = float(rng.random())
    units = len(value.ids) if value.lengths is None else len(value.lengths)
    while True:
        kept = rng.random(units) < probability
        if value.lengths is not None:
            kept = np.repeat(kept, value.lengths)
        if int(kept.sum()) + int(span_starts(kept).sum()) <= num_in:
            return kept
        probability *= _KEEP_DECAY


def _flatten(
    encoder: list[tuple[Ints, Ints, int]],
    decoder: list[tuple[Ints, Ints, Ints, int]],
    dense: dict[str, NDArray[np.float32]],
    specs: Sequence[ModalitySpec],
) -> MaskedSample:
    reach, offset = [], 0
    for _, targets, _, m in decoder:
        size = len(targets)
        # A grid is one block that sees itself whole; a sequence is causal.
        inside = np.full(size, size) if specs[m].is_grid else np.arange(1, size + 1)
        reach.append(offset + inside)
        offset += size
    return MaskedSample(
        enc_ids=_concatenated([ids for ids, _, _ in encoder]),
        enc_mod=_concatenated([np.full(len(ids), m) for ids, _, m in encoder]),
        enc_pos=_concatenated([pos for _, pos, _ in encoder]),
        dec_ids=_concatenated([ids for ids, _, _, _ in decoder]),
        dec_mod=_concatenated([np.full(len(ids), m) for ids, _, _, m in decoder]),
        dec_pos=_concatenated([pos for _, _, pos, _ in decoder]),
        dec_targets=_concatenated([targets for _, targets, _, _ in decoder]),
        dec_reach=_concatenated(reach),
        dense=dense,
    )


def _concatenated(parts: list[Ints]) -> Ints:
    return np.concatenate(parts) if parts else _EMPTY


def _stack_dense(spec: ModalitySpec, samples: Sequence[MaskedSample]) -> NDArray[np.float32]:
    if spec.kind == "pixels":
        side = spec.side * spec.patch_size
        stacked = np.zeros((len(samples), spec.channels, side, side), np.float32)
    else:
        stacked = np.zeros((len(samples), spec.max_tokens, spec.dim_in), np.float32)
    for row, sample in zip(stacked, samples, strict=True):
        value = sample.dense.get(spec.name)
        if value is not None:
            rows = value if spec.kind == "pixels" else value[: spec.max_tokens]
            row[: len(rows)] = rows
    return stacked
