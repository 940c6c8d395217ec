"""The order of samples: permutations by number alone, epochs, and blocks of a mixture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from model.order import BLOCK, Mixture, Stream, permuted, seeds


def keys(*place):
    return seeds(1, *place).generate_state(12, np.uint64)


@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_a_permutation_takes_each_place_once(size, seed):
    assert sorted(permuted(np.arange(size), size, keys(seed)).tolist()) == list(range(size))


def test_a_permutation_of_trillions_is_found_place_by_place():
    size = 10**12 + 7
    places = np.random.default_rng(0).integers(0, size, 5000)
    found = permuted(places, size, keys(0))
    assert len(set(found.tolist())) == len(set(places.tolist()))
    assert stats.kstest(found / size, "uniform").pvalue > 1e-3
    assert [permuted(places[i : i + 1], size, keys(0))[0] for i in range(5)] == found[:5].tolist()


@pytest.mark.parametrize("size", [4, 13, 60])
def test_permutations_are_uniform_and_neighbours_independent(size):
    first, step = np.zeros((size, size)), np.zeros(size)
    for draw in range(1500):
        found = permuted(np.arange(size), size, keys(size, draw))
        first[np.arange(size), found] += 1
        step[(found[1] - found[0]) % size] += 1
    expected = 1500 / size
    assert stats.chi2((size - 1) ** 2).sf(((first - expected) ** 2 / expected).sum()) > 1e-3
    assert stats.chisquare(step[1:]).pvalue > 1e-3


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 9), st.integers(1, 4), st.integers(0, 99))
def test_a_stream_is_epochs_of_all_rows_wherever_it_is_entered(sizes, window, repeats, seed):
    sizes = [*sizes, 1]
    stream = Stream(sizes, seed, 0, window=window, repeats=repeats)
    total = sum(sizes)
    drawn = stream.at(np.arange(3 * total * repeats))
    places = np.stack([drawn.shards, drawn.rows], axis=1)[::repeats]
    everything = [[s, r] for s, n in enumerate(sizes) for r in range(n)]
    for epoch in places.reshape(3, total, 2).tolist():
        assert sorted(epoch) == everything
    other = Stream(sizes, seed, 0, window=window, repeats=repeats).at(np.array([2 * total * repeats, 1, 0]))
    for all_of_it, some in zip(drawn, other, strict=True):
        assert all_of_it[[2 * total * repeats, 1, 0]].tolist() == some.tolist()


def test_the_shards_that_come_next_are_known():
    stream = Stream([5] * 10, 0, 0, window=4)
    now, following = stream.shards_from(0)
    drawn = stream.at(np.arange(100)).shards
    assert set(drawn[:20].tolist()) == set(now)
    assert set(drawn[20:40].tolist()) == set(following)
    last, first = stream.shards_from(45)
    assert set(drawn[40:50].tolist()) == set(last)
    assert set(drawn[50:70].tolist()) == set(first)
    assert stream.window(45) == (0, 2)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6), st.integers(0, 10**9))
def test_quotas_follow_the_weights_exactly(weights, blocks):
    mixture = Mixture(weights, 0)
    before, after = mixture.taken(blocks * BLOCK), mixture.taken((blocks + 1) * BLOCK)
    assert sum(after) == (blocks + 1) * BLOCK
    assert all(a <= b for a, b in zip(before, after, strict=True))
    for count, weight in zip(after, weights, strict=True):
        exact = (blocks + 1) * BLOCK * weight / sum(weights)
        assert abs(count - exact) <= len(weights) + 1e-6 * exact


def test_a_mixture_is_the_same_wherever_it_is_entered():
    whole = Mixture([1.0, 2.0, 4.0], 7).at(0, 3 * BLOCK)
    part = Mixture([1.0, 2.0, 4.0], 7).at(BLOCK - 100, 300)
    for all_of_it, some in zip(whole, part, strict=True):
        assert all_of_it[BLOCK - 100 : BLOCK + 200].tolist() == some.tolist()
    for dataset in range(3):
        positions = whole[1][whole[0] == dataset]
        assert positions.tolist() == list(range(len(positions)))
