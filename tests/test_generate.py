"""Generation: schedules, sampling, and a model that has learned a small world."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from model.fourm import FourM, FourMConfig
from model.generate import Step, generate, generate_each, sample
from model.masking import MaskingConfig, MixtureComponent, collate, mask_sample
from model.schedules import cosine_counts, linear_counts, temperatures
from model.spec import ModalitySpec

A = ModalitySpec(name="tok_a", kind="tokens", max_tokens=4, vocab_size=6)
B = ModalitySpec(name="tok_b", kind="tokens", max_tokens=4, vocab_size=7)
WORDS = ModalitySpec(name="words", kind="sequence", max_tokens=6, vocab_size=220)
SPECS = (A, B, WORDS)
CONFIG = FourMConfig(dim=32, encoder_depth=1, decoder_depth=1, num_heads=2)


def world(rng):
    """tok_b is tok_a shifted by one; the words spell the first tokens of tok_a, as many as the first one says."""
    a = rng.integers(0, 6, 4)
    return {"tok_a": a, "tok_b": a + 1, "words": (204 + a[: 1 + a[0] % 3]).tolist()}


@pytest.fixture(scope="module")
def learned():
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    names = ["tok_a", "tok_b", "words"]
    even = MixtureComponent(input_alphas=dict.fromkeys(names, 0.3), target_alphas=dict.fromkeys(names, 0.5))
    masking = MaskingConfig(components=(even,), input_tokens=(4, 10), target_tokens=(12, 12), redistribute=True)
    pool = [mask_sample(rng, world(rng), SPECS, masking) for _ in range(8000)]
    model = FourM(dataclasses.replace(CONFIG, dim=64), SPECS, SPECS)
    steps = 500
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        batch = collate([pool[i] for i in rng.integers(0, len(pool), 48)], SPECS, 16, 16)
        model(batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def untrained(**changes):
    return FourM(dataclasses.replace(CONFIG, **changes), SPECS, SPECS).eval()


def test_counts_of_the_reference_schedules():
    assert cosine_counts(8, 784).tolist() == [30, 85, 127, 150, 150, 127, 85, 30]
    assert linear_counts(8, 196).tolist() == [25, 25, 25, 25, 24, 24, 24, 24]
    assert linear_counts(8, 3).tolist() == [1, 1, 1]
    assert cosine_counts(1, 5).tolist() == [5]


def test_temperatures_of_the_reference_schedules():
    counts = linear_counts(8, 196)
    onex = [2.681, 1.978, 1.537, 1.221, 0.984, 0.794, 0.635, 0.5]
    np.testing.assert_allclose(temperatures("onex:0.5:0.5", 3.0, counts), onex, atol=6e-4)
    np.testing.assert_allclose(temperatures("constant", 2.0, counts), 2.0)
    linear = temperatures("linear", 2.0, np.array([1, 1, 2]))
    np.testing.assert_allclose(linear, [2.0, 1.5, 1.0])
    with pytest.raises(ValueError, match="temperature schedule 'cosine'"):
        temperatures("cosine", 1.0, counts)


def test_sampling_follows_the_distribution():
    weights = torch.tensor([0.5, 0.25, 0.15, 0.1])
    uniform = (torch.arange(2000) + 0.5)[None] / 2000
    ids, probability = sample(weights.log().expand(1, 2000, 4), uniform, 1.0)
    np.testing.assert_allclose(np.bincount(ids[0]) / 2000, weights, atol=1e-3)
    torch.testing.assert_close(probability, weights[ids])


@pytest.mark.parametrize(
    ("options", "possible"),
    [({"top_k": 2}, {0, 1}), ({"top_k": 0.5}, {0, 1}), ({"top_p": 0.7}, {0, 1}), ({"top_p": 0.8}, {0, 1, 2})],
)
def test_top_k_and_top_p_act_before_the_temperature(options, possible):
    weights = torch.tensor([0.5, 0.25, 0.15, 0.1])
    uniform = (torch.arange(500) + 0.5)[None] / 500
    ids, _ = sample(weights.log().expand(1, 500, 4), uniform, 5.0, **options)
    assert set(ids[0].tolist()) == possible


def test_temperature_zero_is_the_argmax_and_extreme_draws_stay_inside():
    scores = torch.tensor([[[1.0, 3.0, 2.0, -torch.inf]]])
    assert sample(scores, torch.tensor([[0.3]]), 0.0)[0].item() == 1
    assert sample(scores, torch.tensor([[1.0]]), 1.0)[0].item() == 2
    assert sample(scores, torch.tensor([[0.0]]), 1.0)[0].item() == 0


@pytest.mark.parametrize("scheme", ["maskgit", "roar"])
@pytest.mark.parametrize("cfg_scale", [1, 2.0])
def test_a_learned_grid_is_generated(learned, scheme, cfg_scale):
    a = torch.tensor([[0, 1, 2, 3], [5, 5, 0, 2], [4, 0, 4, 0]])
    step = Step(target="tok_b", scheme=scheme, num_steps=3, temperature=0.1, cfg_scale=cfg_scale)
    out = generate(learned, {"tok_a": a}, [step], seed=0)
    assert out["tok_b"].tolist() == (a + 1).tolist()


def test_a_learned_chain_of_modalities_of_different_lengths(learned):
    b = torch.tensor([[1, 2, 3, 4], [6, 6, 1, 3], [3, 1, 5, 1]])
    steps = [
        Step(target="tok_a", scheme="roar", num_steps=2, temperature=0.01),
        Step(target="words", scheme="autoregressive", temperature=0.01, top_p=0.8),
    ]
    out = generate(learned, {"tok_b": b}, steps, seed=0)
    assert out["tok_a"].tolist() == (b - 1).tolist()
    assert out["words"] == [[204], [209, 209, 204], [206, 204, 208]]


@pytest.mark.parametrize("registers", [0, 2])
def test_a_sample_depends_on_its_seed_and_not_on_its_batch(registers):
    model = untrained(num_register_tokens=registers)
    conditions = {"tok_a": torch.tensor([[0, 1, 2, 3], [5, 4, 3, 2]]), "words": [[204], [205, 206, 207]]}
    steps = [
        Step(target="tok_b", scheme="maskgit", num_steps=2, cfg_scale=2, top_p=0.9),
    ]
    both = generate(model, conditions, steps, seed=[11, 12])
    again = generate(model, conditions, steps, seed=[11, 12])
    assert both["tok_b"].tolist() == again["tok_b"].tolist()
    for i in range(2):
        alone = {name: value[i : i + 1] for name, value in conditions.items()}
        assert generate(model, alone, steps, seed=[11 + i])["tok_b"].tolist() == both["tok_b"][i : i + 1].tolist()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generate(model, conditions, steps, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_hidden_tokens_and_absent_sequences_are_unconditional():
    model = untrained()
    step = Step(target="tok_b", scheme="roar", num_steps=2)
    nothing = generate(model, {"tok_a": torch.full((1, 4), -1), "words": [None]}, [step], seed=3)
    also = generate(model, {"words": [None]}, [step], seed=3)
    assert nothing["tok_b"].tolist() == also["tok_b"].tolist()


def test_guidance_by_one_changes_nothing_and_guided_sequences_run():
    model = untrained()
    a = torch.tensor([[0, 1, 2, 3]])
    for scheme, target in (("roar", "tok_b"), ("autoregressive", "words")):
        plain, near = (
            generate(model, {"tok_a": a}, [Step(target=target, scheme=scheme, cfg_scale=w)], seed=2)[target]
            for w in (1, 1 + 1e-9)
        )
        assert (plain == near) if isinstance(plain, list) else torch.equal(plain, near)


def test_wrong_requests_are_named():
    model = untrained()
    a = {"tok_a": torch.zeros(1, 4, dtype=torch.int64)}
    with pytest.raises(ValueError, match="'maskgit' cannot generate sequence"):
        generate(model, a, [Step(target="words", scheme="maskgit")], seed=0)
    with pytest.raises(ValueError, match="tok_a: already given"):
        generate(model, a, [Step(target="tok_a", scheme="roar")], seed=0)
    with pytest.raises(ValueError, match="depth: not an input"):
        generate(model, {"depth": [1]}, [], seed=0)
    with pytest.raises(ValueError, match="2 seeds, expected 1"):
        generate(model, a, [], seed=[1, 2])


def test_each_target_by_itself_follows_from_the_conditions_alone(learned):
    a = torch.tensor([[0, 1, 2, 3], [5, 5, 0, 2], [4, 0, 4, 0]])
    steps = [
        Step(target="tok_b", scheme="roar", num_steps=1, temperature=0.1),
        Step(target="words", scheme="autoregressive", temperature=0.01),
    ]
    made = generate_each(learned, {"tok_a": a}, steps, draws=2, seed=0)
    assert [ids.tolist() for ids in made["tok_b"]] == [(a + 1).tolist()] * 2
    assert made["words"] == [[[204], [209, 209, 204], [208, 204]]] * 2
    alone = generate_each(learned, {"tok_a": a}, steps[:1], draws=1, seed=0)
    assert alone["tok_b"][0].tolist() == (a + 1).tolist()


def test_draws_differ_and_come_again_with_their_seed():
    model = untrained()
    step = Step(target="tok_b", scheme="roar", num_steps=1)
    conditions = {"tok_a": torch.tensor([[0, 1, 2, 3]] * 2)}
    first, again, other = (
        [ids.tolist() for ids in generate_each(model, conditions, [step], draws=3, seed=seed)["tok_b"]]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len({str(ids) for draw in first for ids in draw}) > 1


def test_a_sequence_begins_with_its_prefix(learned):
    a = torch.tensor([[0, 1, 2, 3], [5, 5, 0, 2]])
    step = Step(target="words", scheme="autoregressive", temperature=0.01, prefix=(209,), max_tokens=3)
    assert all(ids[0] == 209 and len(ids) <= 3 for ids in generate(learned, {"tok_a": a}, [step], seed=0)["words"])
    each = generate_each(learned, {"tok_a": a}, [step], draws=2, seed=0)["words"]
    assert all(ids[0] == 209 for draw in each for ids in draw)


def test_each_target_by_itself_takes_one_pass():
    a = {"tok_a": torch.zeros(1, 4, dtype=torch.int64)}
    for step in (Step(target="tok_b", scheme="roar"), Step(target="words", scheme="autoregressive", cfg_scale=2)):
        with pytest.raises(ValueError, match="several passes or guidance"):
            generate_each(untrained(), a, [step], draws=1, seed=0)
