"""Masking: budgets, spans and the flat batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.dense import patches
from model.embeddings import RGB_MEAN, RGB_STD, PixelEmbedding
from model.masking import MaskingConfig, MixtureComponent, collate, dirichlet, mask_sample, token_budget
from model.spans import fit_targets, mask_inputs, mask_targets, merge_spans
from model.spec import EOS, ModalitySpec

RGB = ModalitySpec(name="rgb@64", kind="pixels", max_tokens=16, patch_size=16)
DEPTH = ModalitySpec(name="tok_depth@64", kind="tokens", max_tokens=16, vocab_size=50)
CAPTION = ModalitySpec(name="caption", kind="sequence", max_tokens=20, vocab_size=300)
METADATA = ModalitySpec(name="metadata", kind="sequence", max_tokens=20, vocab_size=300, chunked=True)
T5 = ModalitySpec(name="t5", kind="embeddings", max_tokens=6, dim_in=4)
SPECS = (CAPTION, METADATA, RGB, T5, DEPTH)
NAMES = [spec.name for spec in SPECS]


def even(alpha=1.0, **kwargs):
    inputs = dict.fromkeys(NAMES, alpha)
    targets = {spec.name: alpha for spec in SPECS if spec.is_target}
    component = MixtureComponent(input_alphas=inputs, target_alphas=targets)
    return MaskingConfig(**{"components": (component,), "input_tokens": (8, 24), "target_tokens": (8, 24), **kwargs})


def example(rng):
    return {
        "rgb@64": rng.standard_normal((3, 64, 64)).astype(np.float32),
        "tok_depth@64": rng.integers(0, 50, 16),
        "caption": rng.integers(204, 300, 11).tolist(),
        "metadata": rng.integers(204, 300, (5, 2)).tolist(),
        "t5": rng.standard_normal((5, 4)).astype(np.float32),
    }


def mask_spans(ids, keep):
    """Input ids, target ids and where the targets' sentinels are, of one sequence."""
    counts = np.array([len(ids)])
    shown, left = mask_inputs(ids, keep, counts)
    targets = mask_targets(ids, keep, counts)
    return shown[left], targets.ids, np.append(targets.sentinels, len(targets.ids) - 1)


def test_span_masking_of_the_documented_example():
    words = ["a", "small", "brown", "dog", "runs", "on", "the", "wet", "sand"]
    ids = np.array([300 + i for i in range(len(words))] + [EOS])
    keep = np.array([w == "runs" for w in words] + [False])
    inputs, targets, _ = mask_spans(ids, keep)
    assert inputs.tolist() == [5, 304, 6]
    assert targets.tolist() == [5, 300, 301, 302, 303, 6, 305, 306, 307, 308, EOS, 7]


def test_an_unmasked_sequence_has_only_the_closing_sentinel_as_target():
    inputs, targets, sentinels = mask_spans(np.array([300, 301]), np.array([True, True]))
    assert (inputs.tolist(), targets.tolist(), sentinels.tolist()) == ([300, 301], [5], [0])


@given(st.lists(st.tuples(st.integers(204, 999), st.booleans()), max_size=60))
def test_merging_undoes_span_masking(tokens):
    ids = np.array([t for t, _ in tokens], np.int64)
    inputs, targets, sentinels = mask_spans(ids, np.array([k for _, k in tokens], bool))
    assert merge_spans(inputs.tolist(), targets.tolist()) == ids.tolist()
    assert all(5 + n == targets[s] for n, s in enumerate(sentinels))


SEQUENCES = st.lists(st.tuples(st.lists(st.booleans(), max_size=40), st.integers(0, 50)), min_size=1, max_size=5)


@given(SEQUENCES, st.integers(0, 2**32))
def test_a_fitted_target_starts_at_a_sentinel_and_wastes_nothing_it_could_hold(sequences, seed):
    keeps, budgets = [np.array(keep, bool) for keep, _ in sequences], np.array([budget for _, budget in sequences])
    ids = [1000 * i + 300 + np.arange(len(keep)) for i, keep in enumerate(keeps)]
    counts = np.array([len(keep) for keep in keeps])
    targets = mask_targets(np.concatenate(ids), np.concatenate(keeps), counts)
    first, size = fit_targets(np.random.default_rng(seed), targets, budgets)
    begins = np.cumsum(targets.counts) - targets.counts
    for i, budget in enumerate(budgets):
        _, whole, sentinels = mask_spans(ids[i], keeps[i])
        # Of several sequences at once, each is as if it were alone.
        assert targets.ids[begins[i] : begins[i] + targets.counts[i]].tolist() == whole.tolist()
        if len(whole) <= budget:
            assert (first[i], size[i]) == (0, len(whole))
        elif budget:
            assert first[i] in sentinels
            assert size[i] == budget or len(whole) - first[i] == size[i] == max(
                n for n in len(whole) - sentinels if n <= budget
            )
        else:
            assert size[i] == 0


def test_all_zero_concentrations_split_evenly_as_in_ml4m():
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(dirichlet(rng, np.zeros(4)), 0.25)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 10.0])
def test_dirichlet_marginal_is_a_beta(alpha):
    from scipy import stats

    draws = dirichlet(np.random.default_rng(1), np.full((4000, 5), alpha))
    np.testing.assert_allclose(draws.sum(axis=1), 1, rtol=1e-5)
    assert stats.kstest(draws[:, 2].astype(np.float64), stats.beta(alpha, 4 * alpha).cdf).pvalue > 1e-3


@given(
    st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.01, 1.0, 1000.0]), st.integers(0, 40)), min_size=1, max_size=8),
    st.integers(0, 60),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_budgets_hold_their_caps_and_redistribution_loses_nothing_there_is_room_for(parts, total, redistribute, seed):
    alphas, caps = (np.array(column) for column in zip(*parts, strict=True))
    budget = token_budget(np.random.default_rng(seed), alphas.astype(float), total, caps, redistribute)
    assert (budget >= 0).all()
    assert (budget <= caps).all()
    assert (budget[alphas < 0] == 0).all()
    room = int(caps[alphas >= 0].sum())
    assert budget.sum() == min(total, room) if redistribute else budget.sum() <= total


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.booleans())
def test_masked_sample_is_what_the_model_needs(seed, redistribute):
    rng = np.random.default_rng(seed)
    sample = example(rng)
    masked = mask_sample(rng, sample, SPECS, even(redistribute=redistribute))
    assert len(masked.enc_ids) <= 24
    assert len(masked.dec_ids) <= 24
    depth_in = masked.enc_pos[masked.enc_mod == 4]
    depth_out = masked.dec_pos[masked.dec_mod == 4]
    assert not set(depth_in) & set(depth_out)
    assert (masked.enc_ids[masked.enc_mod == 4] == sample["tok_depth@64"][depth_in]).all()
    assert (masked.dec_targets[masked.dec_mod == 4] == sample["tok_depth@64"][depth_out]).all()
    assert (masked.dec_ids[masked.dec_mod == 4] == -1).all()
    for m in (0, 1):
        inputs, targets = masked.dec_ids[masked.dec_mod == m], masked.dec_targets[masked.dec_mod == m]
        assert (inputs[1:] == targets[:-1]).all()
        assert masked.dec_pos[masked.dec_mod == m].tolist() == list(range(len(inputs)))
        assert masked.enc_pos[masked.enc_mod == m].tolist() == list(range((masked.enc_mod == m).sum()))
    t5_rows = masked.enc_ids[masked.enc_mod == 3]
    assert ((t5_rows >= -1) & (t5_rows < 5)).all()


def test_reach_is_a_block_for_grids_and_causal_for_sequences():
    rng = np.random.default_rng(3)
    masked = mask_sample(rng, example(rng), SPECS, even(10.0, target_tokens=(24, 24)))
    for m in np.unique(masked.dec_mod):
        (where,) = np.nonzero(masked.dec_mod == m)
        assert (np.diff(where) == 1).all()
        wanted = np.full(len(where), where[-1] + 1) if SPECS[m].is_grid else where + 1
        assert masked.dec_reach[where].tolist() == wanted.tolist()


def test_absent_modalities_take_no_budget():
    rng = np.random.default_rng(0)
    sample = {**example(rng), "caption": None, "t5": None}
    for _ in range(50):
        masked = mask_sample(rng, sample, SPECS, even(redistribute=True, input_tokens=(16, 16)))
        assert not set(masked.enc_mod) & {0, 3}
        assert not set(masked.dec_mod) & {0, 3}


def test_chunks_are_masked_whole():
    rng = np.random.default_rng(0)
    component = MixtureComponent(input_alphas={"metadata": 1.0}, target_alphas={})
    config = MaskingConfig(components=(component,), input_tokens=(20, 20), target_tokens=(0, 0))
    pairs = [[210 + 2 * i, 211 + 2 * i] for i in range(6)]
    for _ in range(50):
        kept = mask_sample(rng, {"metadata": pairs}, SPECS, config).enc_ids
        kept = set(kept[kept >= 204].tolist())
        assert all((a in kept) == (b in kept) for a, b in pairs)


def test_keep_all_and_binary():
    rng = np.random.default_rng(0)
    seen = set()
    for keep, wanted in (("all", {12}), ("binary", {1, 12})):
        component = MixtureComponent(input_alphas={"caption": 1.0}, target_alphas={}, keep={"caption": keep})
        config = MaskingConfig(components=(component,), input_tokens=(20, 20), target_tokens=(0, 0))
        seen = {len(mask_sample(rng, example(rng), SPECS, config).enc_ids) for _ in range(40)}
        assert seen == wanted


def test_masking_is_deterministic():
    first, second = (
        mask_sample(np.random.default_rng(9), example(np.random.default_rng(1)), SPECS, even()) for _ in range(2)
    )
    assert first.enc_ids.tobytes() == second.enc_ids.tobytes()
    assert first.dec_reach.tobytes() == second.dec_reach.tobytes()


def test_collate_pads_trims_and_cuts():
    rng = np.random.default_rng(0)
    samples = [mask_sample(rng, example(rng), SPECS, even()) for _ in range(4)]
    longest = max(len(s.enc_ids) for s in samples)
    batch = collate(samples, SPECS, 64, 64)
    assert batch.enc_ids.shape == (4, longest)
    assert batch.enc_ids.dtype == torch.int64
    assert (batch.enc_mod >= 0).sum(1).tolist() == [len(s.enc_ids) for s in samples]
    for m, kind, spec in ((2, batch.pixels, RGB), (3, batch.embeddings, T5)):
        ids = batch.enc_ids[batch.enc_mod == m]
        width = 3 * 16**2 if spec is RGB else 4
        assert kind[spec.name].shape == ((ids >= 0).sum(), width)
        assert ids[ids >= 0].tolist() == list(range(len(kind[spec.name])))
    static = collate(samples, SPECS, 64, 5, trim=False)
    assert (static.enc_ids.shape, static.dec_ids.shape) == ((4, 64), (4, 5))
    assert (static.dec_reach[static.dec_mod < 0] == 5).all()
    assert batch.to("cpu").modalities == tuple(NAMES)


def test_inputs_hold_their_own_rows_of_pixels_and_vectors():
    """Whole images and vectors, indexed by the place of each token, give what the batch holds."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(6)]
    vectors = [rng.standard_normal((5, 4)).astype(np.float16) for _ in range(6)]
    samples = [{**example(rng), "rgb@64": image, "t5": rows} for image, rows in zip(images, vectors, strict=True)]
    masked = [mask_sample(rng, sample, SPECS, even()) for sample in samples]
    batch = collate(masked, SPECS, 20, 24)  # some are cut
    assert batch.pixels["rgb@64"].dtype == torch.uint8
    assert batch.embeddings["t5"].dtype == torch.float16
    for i, j in (batch.enc_mod == 2).nonzero().tolist():
        row, column = divmod(int(batch.enc_pos[i, j]), 4)
        wanted = images[i][16 * row : 16 * row + 16, 16 * column : 16 * column + 16].reshape(-1)
        assert (batch.pixels["rgb@64"][batch.enc_ids[i, j]].numpy() == wanted).all()
        floats = patches(RGB, images[i].astype(np.float32).transpose(2, 0, 1), np.array([4 * row + column]))
        assert (floats[0] == wanted).all()
    spans = 0
    for i, j in (batch.enc_mod == 3).nonzero().tolist():
        own, row = masked[i].enc_ids[j], int(batch.enc_ids[i, j])
        assert (own < 0) == (row < 0)
        spans += row < 0
        assert row < 0 or (batch.embeddings["t5"][row].numpy() == vectors[i][own]).all()
    assert spans


def test_raw_pixels_are_normalised_by_the_embedding():
    raw = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    embedding = PixelEmbedding(RGB, 8)
    places, rows = np.array([0, 5, 15]), torch.tensor([2, 0, 1])
    values = ((raw / 255 - RGB_MEAN) / RGB_STD).transpose(2, 0, 1).astype(np.float32)
    own, ready = (embedding.content(torch.from_numpy(patches(RGB, image, places)), rows) for image in (raw, values))
    torch.testing.assert_close(own, ready, atol=1e-5, rtol=1e-5)


def test_wrong_values_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="tok_depth@64: 15 tokens, expected 16"):
        mask_sample(rng, {"tok_depth@64": np.zeros(15, int)}, SPECS, even())
    with pytest.raises(ValueError, match=r"pixels \(3, 32, 32\) of float32, expected \(3, 64, 64\)"):
        mask_sample(rng, {"rgb@64": np.zeros((3, 32, 32), np.float32)}, SPECS, even())
    with pytest.raises(ValueError, match=r"pixels \(3, 64, 64\) of uint8, expected \(64, 64, 3\)"):
        mask_sample(rng, {"rgb@64": np.zeros((3, 64, 64), np.uint8)}, SPECS, even())
    with pytest.raises(ValueError, match="keep 'some'"):
        MixtureComponent(input_alphas={}, target_alphas={}, keep={"caption": "some"})
    with pytest.raises(ValueError, match="square grid"):
        ModalitySpec(name="x", kind="tokens", max_tokens=15, vocab_size=2)


def test_ids_are_ml4ms_hash():
    assert ModalitySpec(name="caption", kind="sequence", max_tokens=8, vocab_size=9).id == 32652
    assert ModalitySpec(name="tok_depth@224", kind="tokens", max_tokens=196, vocab_size=9).id == 20063
