"""Any-to-any generation: MaskGIT, random order (ROAR) and autoregression, chained over target modalities."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model.fourm import Context, FourM
from model.masking import MaskedBatch
from model.schedules import cosine_counts, linear_counts, temperatures
from model.spec import EOS, NUM_SENTINELS, PAD, SENTINEL_0, SOS, ModalitySpec, union
from model.writing import Writer

# B samples, n positions, V vocabulary

Generated = dict[str, Tensor | list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """How to generate one target modality, given the conditions and all targets before it.

    Grids of tokens: "maskgit" (keep the surest of all open positions) or "roar" (fill random positions). Sequences:
    "autoregressive". `top_k` is a count, or a share of the vocabulary if a float; `top_p` keeps the smallest set
    reaching that probability; both act before the temperature. `cfg_scale` w guides by l_u + w (l_c - l_u), where the
    unconditional pass lacks the conditions and, with `cfg_grow`, the targets generated before. `prefix` are ids that a
    sequence begins with.
    """

    target: str
    scheme: Literal["maskgit", "roar", "autoregressive"]
    num_steps: int = 8
    schedule: Literal["cosine", "linear"] = "cosine"
    temperature: float = 1.0
    temperature_schedule: str = "constant"
    top_k: int | float = 0
    top_p: float = 0.0
    cfg_scale: float = 1.0
    cfg_grow: bool = True
    max_tokens: int | None = None
    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.scheme not in ("maskgit", "roar", "autoregressive"):
            raise ValueError(f"{self.target}: scheme {self.scheme!r}, expected maskgit, roar or autoregressive")
        if self.schedule not in ("cosine", "linear"):
            raise ValueError(f"{self.target}: schedule {self.schedule!r}, expected cosine or linear")
        if self.num_steps < 1:
            raise ValueError(f"{self.target}: num_steps {self.num_steps}, expected at least 1")
        if self.temperature < 0 or not 0 <= self.top_p <= 1 or self.top_k < 0:
            values = (self.temperature, self.top_p, self.top_k)
            raise ValueError(f"{self.target}: temperature, top_p, top_k {values}, expected >= 0, 0..1, >= 0")


@torch.inference_mode()
def generate(
    model: FourM, conditions: Mapping[str, Any], steps: Sequence[Step], *, seed: int | Sequence[int]
) -> Generated:
    """Generate the targets of `steps` in order; tokens come back int64 (B, n), sequences as lists of ids.

    conditions[name]: tokens (B, n), -1 where a token is not given; sequence: B lists of ids (None: not given), no EOS;
    pixels float32 (B, C, H, W), normalised; embeddings float32 (B, L, dim_in). Every sample has a random stream of its
    own, made from `seed` and its index (or from its own seed, if one is given for each): the batch around it has no
    influence.
    """
    state = _State(model, conditions)
    seeds = [_mix(seed, i) for i in range(state.size)] if isinstance(seed, int) else list(seed)
    if len(seeds) != state.size:
        raise ValueError(f"{len(seeds)} seeds, expected {state.size}, one a sample")
    given = frozenset(conditions)
    for number, step in enumerate(steps):
        spec = _checked(model, state, step)
        streams = [torch.Generator().manual_seed(_mix(own, number)) for own in seeds]
        if step.cfg_scale == 1:
            dropped: frozenset[str] | None = None
        else:
            dropped = frozenset(state.values) if step.cfg_grow else given
        if spec.kind == "tokens":
            state.values[spec.name] = _fill_grid(state, spec, step, streams, dropped)
        else:
            state.values[spec.name] = _write_sequences(state, spec, step, streams, state.contexts(spec, dropped))
    return {step.target: state.values[step.target] for step in steps}


@torch.inference_mode()
def generate_each(
    model: FourM, conditions: Mapping[str, Any], steps: Sequence[Step], *, draws: int, seed: int
) -> dict[str, list[Any]]:
    """Generate each target from the conditions alone, `draws` times: a list of draws, each as from `generate`.

    The encoder runs once for all of it. It is not shown that a sequence is to be written, as in training it is not
    where masking gives that sequence no input. All tokens of a grid are drawn from one pass, each by itself.
    """
    state = _State(model, conditions)
    seeds = [_mix(_mix(seed, draw), i) for i in range(state.size) for draw in range(draws)]
    given = dict(state.values)
    context: Context | None = None
    made = dict[str, list[Any]]()
    for number, step in enumerate(steps):
        state.values = dict(given)
        spec = _checked(model, state, step)
        if step.cfg_scale != 1 or (spec.is_grid and step.num_steps != 1):
            raise ValueError(f"{step.target}: several passes or guidance, expected neither where each is by itself")
        context = state.context(spec, spanned=False) if context is None else context
        streams = [torch.Generator().manual_seed(_mix(own, number)) for own in seeds]
        if spec.is_grid:
            places = torch.arange(spec.max_tokens, device=state.device).expand(state.size, -1)
            hidden = state.decode(spec, [context], places)[0]
            scores = model.logits(hidden, spec.name)
            drawn = _uniform(streams, spec.max_tokens).to(state.device).view(state.size, draws, -1).unbind(1)
            made[step.target] = [sample(scores, u, step.temperature, step.top_k, step.top_p)[0] for u in drawn]
        else:
            written = _write_sequences(state, spec, step, streams, [context], draws)
            made[step.target] = [written[draw::draws] for draw in range(draws)]
    return made


class _State:
    """What is known of each sample, and the encoder's view of it."""

    def __init__(self, model: FourM, conditions: Mapping[str, Any]) -> None:
        self.model = model
        self.specs = union(model.specs_in, model.specs_out)
        self.device = model.mask_token.device
        inputs = {spec.name: spec for spec in model.specs_in}
        sizes = {name: len(value) for name, value in conditions.items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise ValueError(f"conditions of {sizes} samples, expected at least one condition and equal counts")
        self.size = next(iter(sizes.values()))
        self.values: dict[str, Any] = {}
        for name, value in conditions.items():
            if name not in inputs:
                raise ValueError(f"{name}: not an input of the model, expected one of {sorted(inputs)}")
            self.values[name] = self._checked_value(inputs[name], value)

    def _checked_value(self, spec: ModalitySpec, value: Any) -> Any:
        if spec.kind == "sequence":
            return [None if ids is None else [int(i) for i in ids] for ids in value]
        if spec.kind == "tokens":
            tokens = torch.as_tensor(value, dtype=torch.int64, device=self.device).reshape(self.size, -1)
            if tokens.shape[1] != spec.max_tokens:
                raise ValueError(f"{spec.name}: {tokens.shape[1]} tokens, expected {spec.max_tokens}")
            return tokens
        dense = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        if spec.kind == "embeddings":
            return dense.flatten(0, 1)
        size, side = spec.patch_size, spec.side
        grid = dense.reshape(self.size, spec.channels, side, size, side, size).permute(0, 2, 4, 3, 5, 1)
        return grid.reshape(self.size * spec.max_tokens, -1)

    def context(self, opened: ModalitySpec, dropped: frozenset[str] = frozenset(), *, spanned: bool = True) -> Context:
        """Encode everything but `dropped`; a sequence that is dropped or being written shows as one masked span.

        Unless `spanned` is False: then the one that is being written does not show.
        """
        empty = torch.empty(self.size, 0, dtype=torch.int64, device=self.device)
        ids, modality, positions = [empty], [empty], [empty]
        for m, spec in enumerate(self.specs):
            if spec.name not in self.model.encoder_embeddings:
                continue
            part = self._part(spec, spanned and spec.name == opened.name, spec.name in dropped)
            if part is None:
                continue
            part_ids, real = part
            ids.append(part_ids)
            modality.append(torch.where(real, m, -1))
            positions.append(torch.arange(part_ids.shape[1], device=self.device).expand_as(part_ids))
        return self.model.encode(self._encoder_batch(*(torch.cat(x, dim=1) for x in (ids, modality, positions))))

    def _part(self, spec: ModalitySpec, opened: bool, dropped: bool) -> tuple[Tensor, Tensor] | None:
        """Ids (B, n) of a modality's inputs and which of them are real."""
        value = self.values.get(spec.name)
        if spec.kind == "sequence":
            span = [SENTINEL_0 + 1]
            if opened or (dropped and value is not None):
                return self._padded([span] * self.size)
            if value is None:
                return None
            return self._padded([[] if s is None else [*s, EOS][: spec.max_tokens] for s in value])
        if value is None or dropped:
            return None
        if spec.kind == "tokens":
            return value.clamp(min=0), value >= 0
        rows = torch.arange(len(value), device=self.device).view(self.size, -1)
        return rows, torch.ones_like(rows, dtype=torch.bool)

    def _padded(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(len(s) for s in sequences)
        ids = torch.tensor([s + [PAD] * (longest - len(s)) for s in sequences], dtype=torch.int64)
        lengths = torch.tensor([len(s) for s in sequences])
        real = torch.arange(longest) < lengths[:, None]
        return ids.reshape(self.size, longest).to(self.device), real.to(self.device)

    def _encoder_batch(self, ids: Tensor, modality: Tensor, positions: Tensor) -> MaskedBatch:
        # Real tokens first, in order, then as much padding as the longest sample needs.
        length = max(1, int((modality >= 0).sum(dim=1).max())) if modality.shape[1] else 1
        if modality.shape[1] == 0:
            ids, positions = ids.new_zeros(self.size, 1), positions.new_zeros(self.size, 1)
            modality = modality.new_full((self.size, 1), -1)
        order = torch.argsort((modality < 0).to(torch.int8), dim=1, stable=True)[:, :length]
        gathered = [x.gather(1, order) for x in (ids, modality, positions)]
        return self._batch(enc=gathered)

    def decode(self, spec: ModalitySpec, contexts: Sequence[Context], positions: Tensor) -> list[Tensor]:
        """Hidden states (B, n, D) for each context of the open positions (B, n) of a grid, which all see each other."""
        modality = torch.full_like(positions, self.specs.index(spec))
        reach = torch.full_like(positions, positions.shape[1])
        batch = self._batch(dec=[torch.full_like(positions, -1), modality, positions, reach])
        return [self.model.decode(batch, context) for context in contexts]

    def _batch(self, enc: Sequence[Tensor] = (), dec: Sequence[Tensor] = ()) -> MaskedBatch:
        none = torch.empty(self.size, 0, dtype=torch.int64, device=self.device)
        enc_ids, enc_mod, enc_pos = enc or (none,) * 3
        dec_ids, dec_mod, dec_pos, dec_reach = dec or (none,) * 4
        held = {spec.name: spec.kind for spec in self.specs if spec.name in self.values}
        return MaskedBatch(
            modalities=tuple(spec.name for spec in self.specs),
            enc_ids=enc_ids, enc_mod=enc_mod, enc_pos=enc_pos,
            dec_ids=dec_ids, dec_mod=dec_mod, dec_pos=dec_pos, dec_targets=dec_ids, dec_reach=dec_reach,
            pixels={name: self.values[name] for name, kind in held.items() if kind == "pixels"},
            embeddings={name: self.values[name] for name, kind in held.items() if kind == "embeddings"},
        )  # fmt: skip

    def contexts(self, opened: ModalitySpec, dropped: frozenset[str] | None) -> list[Context]:
        """The conditional context, and with guidance the unconditional one."""
        return [self.context(opened)] + ([] if dropped is None else [self.context(opened, dropped)])


def _fill_grid(
    state: _State, spec: ModalitySpec, step: Step, streams: list[torch.Generator], dropped: frozenset[str] | None
) -> Tensor:
    """All tokens of a grid, (B, n)."""
    num, device = spec.max_tokens, state.device
    cosine = step.scheme == "maskgit" and step.schedule == "cosine"
    counts = (cosine_counts if cosine else linear_counts)(step.num_steps, num)
    # Open positions: in random order for roar, which takes them from the front.
    open_positions = torch.arange(num, device=device).expand(state.size, num)
    if step.scheme == "roar":
        open_positions = torch.stack([torch.randperm(num, generator=g) for g in streams]).to(device)
    tokens = state.values[spec.name] = torch.full((state.size, num), -1, device=device)
    heat = temperatures(step.temperature_schedule, step.temperature, counts)
    for count, temperature in zip(counts.tolist(), heat.tolist(), strict=True):
        if count == 0:
            continue
        positions = open_positions[:, :count] if step.scheme == "roar" else open_positions
        hidden = state.decode(spec, state.contexts(spec, dropped), positions)
        scores = _guided([state.model.logits(h, spec.name) for h in hidden], step.cfg_scale)
        drawn = _uniform(streams, positions.shape[1]).to(device)
        sampled, probability = sample(scores, drawn, temperature, step.top_k, step.top_p)
        if step.scheme == "roar":
            tokens.scatter_(1, positions, sampled)
            open_positions = open_positions[:, count:]
        else:
            order = torch.argsort(probability, dim=1, descending=True, stable=True)
            surest, rest = order[:, :count], order[:, count:].sort(dim=1).values
            tokens.scatter_(1, positions.gather(1, surest), sampled.gather(1, surest))
            open_positions = positions.gather(1, rest)
    return tokens


def _write_sequences(
    state: _State,
    spec: ModalitySpec,
    step: Step,
    streams: list[torch.Generator],
    contexts: Sequence[Context],
    copies: int = 1,
) -> list[list[int]]:
    """Ids of so many sequences of each sample, one after the other, each up to its end token or sentinel."""
    most = min(step.max_tokens or spec.max_tokens, spec.max_tokens)
    writers = [Writer(state.model, spec, context, copies=copies, most=most) for context in contexts]
    begun = [SENTINEL_0 + 1, *step.prefix]
    written = torch.tensor([begun] * len(streams), device=state.device)
    done = torch.zeros(len(streams), dtype=torch.bool, device=state.device)
    for place in range(most):
        scores = _guided([writer.scores(written[:, place]) for writer in writers], step.cfg_scale)
        if place + 1 < len(begun):
            continue
        drawn = _uniform(streams, 1).to(state.device)
        token = sample(scores[:, None], drawn, step.temperature, step.top_k, step.top_p)[0]
        token = token.masked_fill(done[:, None], PAD)
        done |= ((token == EOS) | ((token >= SENTINEL_0) & (token < SENTINEL_0 + NUM_SENTINELS)))[:, 0]
        written = torch.cat([written, token], dim=1)
        if bool(done.all()):
            break
    return [_until_end(row) for row in written[:, 1:].tolist()]


def sample(
    scores: Tensor, uniform: Tensor, temperature: float, top_k: int | float = 0, top_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Draw ids (B, n) and their probabilities from logits (B, n, V), by inverting the distribution at `uniform`.

    Temperature 0 is the argmax, ranked by its untempered probability.
    """
    scores = scores.float()
    if temperature <= 1e-10:
        probability, ids = scores.softmax(dim=-1).max(dim=-1)
        return ids, probability
    size = scores.shape[-1]
    ranked: Tensor | None = None
    if top_k or top_p:
        kept = min(size, max(1, int(top_k * size) if isinstance(top_k, float) else top_k)) if top_k else size
        scores, ranked = scores.sort(dim=-1, descending=True) if kept == size else scores.topk(kept, dim=-1)
        if top_p:
            probabilities = scores.softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            before[..., 0] = 0
            scores = scores.masked_fill(before > top_p, float("-inf"))
    probabilities = (scores / temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    wanted = uniform[..., None].to(cumulative) * cumulative[..., -1:]
    # Rounding may point past the last possible id, never below the first.
    index = torch.searchsorted(cumulative, wanted, right=True).clamp(max=scores.shape[-1] - 1)
    last = (probabilities > 0).flip(-1).int().argmax(dim=-1, keepdim=True)
    index = torch.minimum(index, scores.shape[-1] - 1 - last)
    probability = probabilities.gather(-1, index)[..., 0]
    ids = index if ranked is None else ranked.gather(-1, index)
    return ids[..., 0], probability


def _guided(scores: list[Tensor], scale: float) -> Tensor:
    if len(scores) == 1:
        return scores[0]
    conditional, unconditional = scores
    return unconditional + scale * (conditional - unconditional)


def _uniform(streams: list[torch.Generator], count: int) -> Tensor:
    return torch.stack([torch.rand(count, generator=g) for g in streams])


def _until_end(row: list[int]) -> list[int]:
    ids: list[int] = []
    for token in row:
        if token == EOS or SENTINEL_0 <= token < SENTINEL_0 + NUM_SENTINELS:
            break
        if token not in (PAD, SOS):
            ids.append(token)
    return ids


def _checked(model: FourM, state: _State, step: Step) -> ModalitySpec:
    specs = {spec.name: spec for spec in model.specs_out}
    if step.target not in specs:
        raise ValueError(f"{step.target}: not an output of the model, expected one of {sorted(specs)}")
    if step.target in state.values:
        raise ValueError(f"{step.target}: already given or generated, expected a new target")
    spec = specs[step.target]
    if (spec.kind == "sequence") != (step.scheme == "autoregressive"):
        raise ValueError(f"{step.target}: scheme {step.scheme!r} cannot generate {spec.kind}")
    return spec


def _mix(seed: int, number: int) -> int:
    return int(hashlib.sha256(f"{seed} {number}".encode()).hexdigest(), 16) % 2**63
