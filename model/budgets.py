"""How many tokens of each modality are inputs and targets: Dirichlet mixtures over a whole batch at once.

Budgets need no data: which modalities are there suffices, and to repair clamping how long they are. So a loader draws
them first and reads only what they select. Distribution of ml-4m's UnifiedMasking (Bachmann et al. 2024, 4M-21).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.spec import ModalitySpec

Keep = Literal["random", "all", "binary"]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


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

    The switches are off by default, as in ml-4m. `redistribute` hands what a modality cannot hold to those with room
    (off, that part is lost). `only_targets` gives no target budget to what can never be a target, such as embeddings
    (off, that part is lost too; `redistribute` implies it). `count_predictions` makes a target budget of k ids of a
    sequence k predictions (off, it is k - 1, for the first id is only an input).
    """

    components: tuple[MixtureComponent, ...]
    input_tokens: tuple[int, int]
    target_tokens: tuple[int, int]
    redistribute: bool = False
    only_targets: bool = False
    count_predictions: bool = False

    def __post_init__(self) -> None:
        if not self.components:
            raise ValueError("components is empty, expected at least one")
        for name, (low, high) in (("input_tokens", self.input_tokens), ("target_tokens", self.target_tokens)):
            if not 0 <= low <= high:
                raise ValueError(f"{name} {(low, high)}, expected 0 <= low <= high")


@dataclass(frozen=True)
class Plan:
    """What B samples were given over M modalities (in the order of the specs).

    components: int64 (B,), index into those of the config. inputs, targets: int64 (B, M), tokens at most.
    """

    components: Ints
    inputs: Ints
    targets: Ints

    def needs(self, specs: Sequence[ModalitySpec]) -> Bools:
        """(B, M): whose value is looked at; all others need not be read."""
        is_target = np.array([spec.is_target for spec in specs], bool)
        needed: Bools = (self.inputs > 0) | ((self.targets > 0) & is_target)
        return needed


def draw(
    rng: np.random.Generator,
    specs: Sequence[ModalitySpec],
    config: MaskingConfig,
    present: Bools,
    lengths: Ints | None = None,
) -> Plan:
    """Draw components and budgets of B samples.

    present: (B, M), which modalities each sample has; the others get nothing. lengths: (B, M), what sequences (with
    EOS, cut as they are for masking: `model.masking.lengths`) and embeddings hold, looked at with `redistribute` only;
    ValueError if it is missing then. Without it ml-4m's budgets depend on no length: they are clamped to `max_tokens`.
    """
    if present.ndim != 2 or present.shape[1] != len(specs):
        raise ValueError(f"present {present.shape}, expected (samples, {len(specs)})")
    if config.redistribute and lengths is None:
        raise ValueError("redistribute needs the lengths of sequences and embeddings, got none")
    rows = len(present)
    weights = np.cumsum([component.weight for component in config.components])
    components = np.searchsorted(weights, rng.random(rows) * weights[-1], side="right").astype(np.int64)
    num_inputs = rng.integers(config.input_tokens[0], config.input_tokens[1] + 1, rows)
    num_targets = rng.integers(config.target_tokens[0], config.target_tokens[1] + 1, rows)

    is_grid = np.array([spec.is_grid for spec in specs], bool)
    is_target = np.array([spec.is_target for spec in specs], bool)
    most = np.broadcast_to(np.array([spec.max_tokens for spec in specs], np.int64), present.shape)
    caps = most
    if config.redistribute and lengths is not None:
        caps = np.where(is_grid, most, np.minimum(lengths, most))
    alphas = _table(specs, [component.input_alphas for component in config.components])[components]
    inputs = token_budgets(rng, np.where(present, alphas, -1.0), num_inputs, caps, config.redistribute)

    # A sequence can be input and target at once, a place of a grid cannot.
    caps = np.where(is_grid, most - inputs, most)
    if config.redistribute and lengths is not None:
        longest = lengths + (1 if config.count_predictions else 2)  # opened and closed by a sentinel
        caps = np.where(is_target, np.where(is_grid, caps, np.minimum(caps, longest)), 0)
    alphas = _table(specs, [component.target_alphas for component in config.components])[components]
    if config.only_targets:
        alphas = np.where(is_target, alphas, -1.0)
    targets = token_budgets(rng, np.where(present, alphas, -1.0), num_targets, caps, config.redistribute)
    return Plan(components, inputs, targets)


def _table(specs: Sequence[ModalitySpec], tables: Sequence[Mapping[str, float]]) -> Floats:
    return np.array([[table.get(spec.name, -1.0) for spec in specs] for table in tables], np.float64)


def token_budgets(
    rng: np.random.Generator, alphas: Floats, totals: Ints, caps: Ints, redistribute: bool = False
) -> Ints:
    """Split `totals` (B,) tokens, at most `caps` (B, M), by Dirichlet draws over `alphas` (B, M); -1 is left out."""
    budget = np.zeros(alphas.shape, np.int64)
    members = alphas >= 0
    if redistribute:
        members = members & (caps > 0)
    totals = np.array(totals)
    (rows,) = np.nonzero((totals > 0) & members.any(axis=1))
    while len(rows):
        shares = np.where(members[rows], alphas[rows], -1.0)
        found = budget[rows] + _split(rng, shares, totals[rows])
        budget[rows] = np.minimum(found, caps[rows])
        if not redistribute:
            break
        totals[rows] = np.maximum(found - caps[rows], 0).sum(axis=1)
        members[rows] &= budget[rows] < caps[rows]
        rows = rows[(totals[rows] > 0) & members[rows].any(axis=1)]
    return budget


def token_budget(rng: np.random.Generator, alphas: Floats, total: int, caps: Ints, redistribute: bool = False) -> Ints:
    """`token_budgets` of one sample: alphas and caps are (M,)."""
    return token_budgets(rng, alphas[None], np.array([total]), caps[None], redistribute)[0]


def _split(rng: np.random.Generator, alphas: Floats, totals: Ints) -> Ints:
    """Integer shares that sum to `totals`: floors of one draw, each leftover token to the argmax of a fresh draw."""
    shares = np.floor(dirichlet(rng, alphas) * totals[:, None].astype(np.float32)).astype(np.int64)
    owners = np.repeat(np.arange(len(totals)), np.maximum(totals - shares.sum(axis=1), 0))
    if len(owners):
        winners = dirichlet(rng, alphas[owners]).argmax(axis=-1)
        shares += np.bincount(owners * alphas.shape[1] + winners, minlength=shares.size).reshape(shares.shape)
    return shares


def dirichlet(rng: np.random.Generator, alphas: Floats) -> NDArray[np.float32]:
    """Dirichlet draws in float32 that stay right at tiny concentrations, one for each row of `alphas` (..., k).

    Negative concentrations are left out: their share is 0, and at least one of a row must not be negative.

    Gamma(a) = Gamma(a + 1) * U**(1/a), taken in logarithms. Draws below the smallest double are set to it before
    normalising, as torch's sampler does; that is what makes all-zero concentrations an even split in ml-4m.
    """
    clamped = np.maximum(alphas, 1e-9)
    log_gamma = np.log(rng.standard_gamma(clamped + 1)) + np.log1p(-rng.random(alphas.shape)) / clamped
    gamma = np.exp(np.maximum(log_gamma, np.log(np.finfo(np.float64).tiny)))
    gamma[alphas < 0] = 0
    weights = (gamma / gamma.sum(axis=-1, keepdims=True)).astype(np.float32)
    one = np.float32(1)
    clipped = np.clip(weights, np.finfo(np.float32).tiny, np.nextafter(one, np.float32(0)))
    clipped[alphas < 0] = 0
    return clipped
