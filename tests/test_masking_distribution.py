"""Masking against ml-4m: the same with the same draws, and the same distribution with draws of its own.

tests/golden/masking.npz holds histograms of 20,000 samples of ml-4m for each component of the 4M-21 mixture.
"""

from __future__ import annotations

import math
from functools import cache
from unittest import mock

import numpy as np
import pytest

from model import budgets
from model.masking import MaskingConfig, MixtureComponent, apply, draw, lengths, mask_sample, present
from model.spans import fit_targets, fitting_keep, mask_inputs, mask_targets
from model.spec import NUM_SENTINELS, SENTINEL_0
from tests.golden import make_masking as golden

DRAWS = 4000
BATCH = 500
COMPONENTS = range(len(golden.WEIGHTS))


@cache
def stored():
    with np.load(golden.FILE, allow_pickle=False) as file:
        return dict(file)


def config(*components, **switches):
    chosen = []
    for c in components:
        inputs, targets, keep = golden.tables()[c]
        chosen.append(MixtureComponent(weight=golden.WEIGHTS[c], input_alphas=inputs, target_alphas=targets, keep=keep))
    ranges = {"input_tokens": golden.INPUT_TOKENS, "target_tokens": golden.TARGET_TOKENS}
    return MaskingConfig(components=tuple(chosen), **ranges, **switches)


def is_sentinel(ids):
    return (ids >= SENTINEL_0) & (ids < SENTINEL_0 + NUM_SENTINELS)


def histograms(component):
    """What `make_masking.histograms` counts, of ours."""
    rng = np.random.default_rng([golden.SEED, component])
    specs, samples, masking = golden.specs(), golden.samples(), config(component)
    batch = [samples[i % len(samples)] for i in range(BATCH)]
    there = present(specs, batch)
    counts = np.zeros((len(specs), len(golden.FIGURES), 300), np.int64)
    for _ in range(DRAWS // BATCH):
        plan = draw(rng, specs, masking, there)
        masked = apply(rng, plan, batch, specs, masking)
        for m, spec in enumerate(specs):
            enc, dec = masked.enc_mod.numpy() == m, masked.dec_mod.numpy() == m
            found = np.zeros((len(golden.FIGURES), BATCH), np.int64)
            found[0], found[1] = enc.sum(1), dec.sum(1)
            if spec.kind == "embeddings":
                found[2] = (enc & (masked.enc_ids.numpy() < 0)).sum(1)
            if spec.kind == "sequence":
                found[2] = (enc & is_sentinel(masked.enc_ids.numpy())).sum(1)
                # The target's first id, a sentinel, is the first input of the decoder; the rest is what it predicts.
                sentinels = dec & is_sentinel(masked.dec_targets.numpy())
                start, any_left = dec.argmax(1), sentinels.any(1)
                found[3] = sentinels.sum(1) + 1
                found[4] = masked.dec_ids.numpy()[np.arange(BATCH), start] - SENTINEL_0
                found[5] = np.where(any_left, sentinels.argmax(1) - start, found[1])
                found[3:, found[1] == 0] = 0
            for figure, values in enumerate(found):
                counts[m, figure] += np.bincount(values, minlength=300)
    return counts


def distance(first, second):
    """The Kolmogorov-Smirnov statistic of two histograms."""
    one, two = (np.cumsum(counts, axis=-1) / counts.sum(axis=-1, keepdims=True) for counts in (first, second))
    return np.abs(one - two).max(axis=-1)


@pytest.mark.parametrize("component", COMPONENTS)
def test_counts_spans_and_truncation_are_distributed_as_in_ml4m(component):
    theirs = stored()["counts"][component].astype(np.int64)
    ours = histograms(component)
    total = int(theirs[0, 0].sum())
    assert total >= DRAWS
    found = distance(theirs, ours)
    # p of the asymptotic distribution (conservative for whole numbers), for all that is compared together.
    tests = found.size * len(golden.WEIGHTS)
    critical = math.sqrt(-0.5 * math.log(0.01 / tests / 2) * (total + DRAWS) / (total * DRAWS))
    worst = np.unravel_index(found.argmax(), found.shape)
    names = [spec.name for spec in golden.specs()]
    assert found.max() < critical, (names[worst[0]], golden.FIGURES[worst[1]], found.max(), critical)


def test_another_component_is_told_apart():
    theirs = stored()["counts"].astype(np.int64)
    assert distance(theirs[1], theirs[2]).max() > 0.2


def test_budgets_are_ml4ms_on_the_same_draws():
    specs = golden.specs()
    file = stored()
    for first, fresh, (totals, inputs, targets) in zip(
        file["given_first"], file["given_fresh"], file["given_budget"], strict=True
    ):
        winners = np.eye(len(specs), dtype=np.float32)[fresh[fresh >= 0]]
        total = int(totals[0])
        masking = MaskingConfig(
            components=(
                MixtureComponent(
                    input_alphas=dict.fromkeys([s.name for s in specs], 1.0),
                    target_alphas=dict.fromkeys([s.name for s in specs], 1.0),
                ),
            ),
            input_tokens=(total, total),
            target_tokens=(total, total),
        )
        given = [first[None], winners] if len(winners) else [first[None]]
        with mock.patch.object(budgets, "dirichlet", side_effect=(given * 2 if total else [])):
            plan = draw(np.random.default_rng(0), specs, masking, np.ones((1, len(specs)), bool))
        assert plan.inputs[0].tolist() == inputs.tolist()
        assert plan.targets[0].tolist() == targets.tolist()


def test_spans_and_their_truncation_are_ml4ms_on_the_same_draws():
    file = stored()
    truncated = 0
    for ids, (keep, there), (inputs, targets, (budget, chosen, *_)) in zip(
        file["given_ids"], file["given_keep"], file["given_spans"], strict=True
    ):
        n = int(there.sum())
        one = ids[:n].astype(np.int64), keep[:n].astype(bool), np.array([n])
        shown, left = mask_inputs(*one)
        ours_in, whole = shown[left], mask_targets(*one)
        rng = mock.Mock()
        rng.integers.side_effect = lambda low, high, chosen=int(chosen): chosen % high
        (first,), (size,) = fit_targets(rng, whole, np.array([int(budget)]))
        ours_out = whole.ids[first : first + size]
        assert ours_in.tolist() == inputs[inputs > 0].tolist()
        assert ours_out.tolist() == targets[targets > 0].tolist()
        truncated += len(ours_out) < len(whole.ids)
    assert truncated > 10


@pytest.mark.parametrize("switch", [{}, {"redistribute": True}, {"only_targets": True}, {"count_predictions": True}])
def test_a_batch_in_two_steps_is_distributed_as_sample_by_sample(switch):
    from scipy import stats

    specs, samples, masking = golden.specs(), golden.samples(), config(2, 4, **switch)
    rng = np.random.default_rng(5)
    batch = [{**samples[3], "caption": None}] * 400
    sizes = lengths(specs, batch[:1]).repeat(400, axis=0)
    masked = apply(rng, draw(rng, specs, masking, present(specs, batch), sizes), batch, specs, masking)
    one_by_one = [mask_sample(rng, sample, specs, masking) for sample in batch]
    for side in ("enc_mod", "dec_mod"):
        for m in range(len(specs)):
            together = (getattr(masked, side).numpy() == m).sum(1)
            alone = [int((getattr(sample, side) == m).sum()) for sample in one_by_one]
            assert stats.ks_2samp(together, alone).pvalue > 1e-4, (side, specs[m].name)


def test_what_is_not_needed_is_not_looked_at():
    specs, masking = golden.specs(), config(0, 4)
    rng = np.random.default_rng(3)
    whole = [golden.samples()[1]] * 12
    plan = draw(rng, specs, masking, present(specs, whole))
    needs = plan.needs(specs)
    assert 0.05 < needs.mean() < 0.6
    partial = [
        {s.name: sample[s.name] for s, needed in zip(specs, row, strict=True) if needed}
        for sample, row in zip(whole, needs, strict=True)
    ]
    full, less = (apply(np.random.default_rng(1), plan, values, specs, masking) for values in (whole, partial))
    for name in ("enc_ids", "enc_mod", "enc_pos", "dec_ids", "dec_mod", "dec_pos", "dec_targets", "dec_reach"):
        assert getattr(full, name).tolist() == getattr(less, name).tolist()
    b, m = np.argwhere(needs)[0]
    del partial[b][specs[m].name]
    with pytest.raises(ValueError, match=f"{specs[m].name} of sample {b} has a budget and no value"):
        apply(np.random.default_rng(1), plan, partial, specs, masking)


def test_the_switches_repair_what_ml4m_loses():
    specs = golden.specs()
    batch = [golden.samples()[0]] * 300
    there, sizes = present(specs, batch), lengths(specs, batch)
    t5 = [spec.name for spec in specs].index("t5_caption")

    def plan(**switches):
        return draw(np.random.default_rng(8), specs, config(4, **switches), there, sizes)

    faithful, repaired = plan(), plan(redistribute=True)
    assert faithful.inputs.sum(1).max() <= 196
    assert repaired.inputs.sum(1).max() > 250
    assert (repaired.targets.sum(1) >= 128).all()
    assert faithful.targets[:, t5].sum() > 0
    assert plan(only_targets=True).targets[:, t5].sum() == repaired.targets[:, t5].sum() == 0
    with pytest.raises(ValueError, match="redistribute needs the lengths"):
        draw(np.random.default_rng(8), specs, config(4, redistribute=True), there)


def test_a_counted_prediction_is_one_more_id():
    spec = golden.ModalitySpec(name="caption", kind="sequence", max_tokens=200, vocab_size=9000)
    component = MixtureComponent(input_alphas={}, target_alphas={"caption": 1.0})
    for counted in (False, True):
        masking = MaskingConfig(
            components=(component,), input_tokens=(0, 0), target_tokens=(40, 40), count_predictions=counted
        )
        masked = mask_sample(np.random.default_rng(0), {"caption": list(range(300, 400))}, (spec,), masking)
        assert len(masked.dec_ids) == 39 + counted


@pytest.mark.parametrize("chunks", [None, np.array([1, 3, 2, 2, 4, 1])])
def test_keeping_until_it_fits_is_distributed_as_trying_one_by_one(chunks):
    units, budget, share = 13 if chunks is None else len(chunks), 5, 0.9

    def one_by_one(rng):
        p = share
        while True:
            kept = rng.random(units) < p
            kept = kept if chunks is None else np.repeat(kept, chunks)
            if kept.sum() + (~kept & np.append(True, kept[:-1])).sum() <= budget:
                return kept.sum()
            p *= 0.9

    rng = np.random.default_rng(4)
    slow = np.bincount([one_by_one(rng) for _ in range(3000)], minlength=14)
    # Three thousand sequences at once.
    sizes = np.ones(units, np.int16) if chunks is None else chunks
    kept = fitting_keep(rng, *(np.full(3000, units), np.tile(sizes, 3000), np.full(3000, budget), np.full(3000, share)))
    quick = np.bincount(kept.reshape(3000, units) @ sizes, minlength=14)
    assert distance(slow, quick) < math.sqrt(-0.5 * math.log(0.001 / 2) * 2 / 3000)
