"""Metrics against scikit-learn, scipy and enumeration."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from sidlab import metrics


@given(st.data())
def test_rank_recall_and_ndcg_agree_with_a_search_by_hand(data):
    n_items = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, 12))
    lists = data.draw(st.lists(st.permutations(range(1, n_items + 1)), min_size=1, max_size=5))
    items = np.zeros((len(lists), k), dtype=np.int64)  # lists shorter than k end in zeros
    for row, ranked in enumerate(lists):
        items[row, : min(k, n_items)] = ranked[:k]
    targets = np.array([data.draw(st.integers(1, n_items)) for _ in lists])
    ranks = metrics.rank_of_target(items, targets)
    assert ranks.dtype == np.int64
    cut = data.draw(st.integers(1, k))
    for row, target in enumerate(targets.tolist()):
        listed = items[row].tolist()
        assert ranks[row] == (listed.index(target) + 1 if target in listed else 0)
        assert metrics.recall_at(ranks, cut)[row] == (target in listed[:cut])


@given(st.integers(2, 20), st.integers(1, 20), st.integers(0, 10**6))
def test_ndcg_agrees_with_scikit_learn(n_items, k, seed):
    scores = np.random.default_rng(seed).permutation(n_items).astype(float)[None]  # [1, n]
    relevance = np.eye(n_items)[[seed % n_items]]
    ranked = 1 + np.argsort(-scores, axis=1)
    ranks = metrics.rank_of_target(ranked, np.array([1 + seed % n_items]))
    assert metrics.ndcg_at(ranks, k)[0] == pytest.approx(ndcg_score(relevance, scores, k=k))


@given(st.integers(1, 5), st.integers(0, 12), st.integers(1, 12))
def test_metrics_of_sharers_are_means_over_all_their_orders(sharers, first, k):
    """Every permutation of a group that begins at `first` (0: not found) in the list; the target is
    its member 0.
    """
    places = [
        first + order.index(0) if first else 0 for order in itertools.permutations(range(sharers))
    ]
    ranks = metrics.shared_ranks([first], [sharers])
    assert metrics.recall_at(ranks, k)[0] == pytest.approx(metrics.recall_at(places, k).mean())
    assert metrics.ndcg_at(ranks, k)[0] == pytest.approx(metrics.ndcg_at(places, k).mean())
    if first:
        assert metrics.recall_at(ranks, k)[0] == pytest.approx(
            np.clip(k - (first - 1), 0, sharers) / sharers
        )


def test_every_member_of_a_group_has_the_same_recall():
    """A group of 30 at the top of the list: not 1 for its ten lowest ids and 0 for the others."""
    found = metrics.summary(metrics.shared_ranks(np.ones(30, int), np.full(30, 30)))
    assert found["recall@10"] == pytest.approx(1 / 3) and found["recall@5"] == pytest.approx(1 / 6)


def test_a_group_of_one_counts_as_without_sharers_bit_for_bit():
    ranks = np.random.default_rng(0).integers(0, 15, (3, 400))
    shared = metrics.shared_ranks(ranks, np.ones_like(ranks))
    for name, values in metrics.per_user(ranks).items():
        assert np.array_equal(metrics.per_user(shared)[name], values)
    by_hand = np.where((ranks >= 1) & (ranks <= 10), 1 / np.log2(1 + np.maximum(ranks, 1)), 0.0)
    assert np.array_equal(metrics.per_user(ranks)["ndcg@10"], by_hand)


def test_stored_ranks_come_back_and_plain_ones_have_no_sharers():
    ranks = np.random.default_rng(0).integers(0, 5, (2, 7))
    sharers = np.random.default_rng(1).integers(1, 4, (2, 7))
    plain = [json.loads(json.dumps(metrics.stored(of_seed))) for of_seed in ranks]
    assert all(one.keys() == {"ranks"} for one in plain) and np.array_equal(
        metrics.ranks_of(plain), ranks
    )
    assert metrics.ranks_of(plain).dtype == np.int64
    shared = metrics.shared_ranks(ranks, sharers)
    files = [json.loads(json.dumps(metrics.stored(of_seed))) for of_seed in shared]
    assert files[1] == {"ranks": ranks[1].tolist(), "sharers": sharers[1].tolist()}
    assert np.array_equal(metrics.ranks_of(files), shared)


def test_summary_is_the_mean_over_users():
    found = metrics.summary(np.array([1, 0, 7, 3]))
    by_hand = {
        "recall@5": 0.5,
        "recall@10": 0.75,
        "ndcg@5": (1 + 0.5) / 4,
        "ndcg@10": (1 + 0.5 + 1 / 3) / 4,
    }
    assert found == pytest.approx(by_hand)


def some_values(n_users, seed=0):
    return metrics.ndcg_at(np.random.default_rng(seed).integers(0, 15, n_users), 10)


@pytest.mark.parametrize("values", [some_values(300), np.random.default_rng(1).normal(size=200)])
def test_interval_over_users_agrees_with_scipy(values):
    options = {"method": "percentile", "confidence_level": 0.9, "n_resamples": 20000}
    oracle = scipy.stats.bootstrap([values], np.mean, rng=3, **options)
    low, high = metrics.bootstrap_interval(values, level=0.9, resamples=20000)
    expected = oracle.confidence_interval
    assert (low, high) == pytest.approx(
        (expected.low, expected.high), abs=0.03 * (expected.high - expected.low)
    )
    assert (low, high) == metrics.bootstrap_interval(values[None], level=0.9, resamples=20000), (
        "one seed is one axis"
    )


def test_interval_over_users_is_that_of_their_means_over_seeds():
    values = np.random.default_rng(0).normal(size=(3, 200)) + np.array([[0.0], [5.0], [-5.0]])
    found = metrics.bootstrap_interval(values)
    expected = metrics.bootstrap_interval(values.mean(axis=0))
    assert found == expected, "how far seeds are apart is not said here"


@pytest.mark.parametrize("n_seeds", [5, 10])
def test_interval_over_seeds_is_that_of_the_paired_t_test(n_seeds):
    a, b = np.random.default_rng(n_seeds).normal(0.3, 0.05, (2, n_seeds))
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    assert metrics.seed_interval(a - b) == pytest.approx(tuple(expected))
    assert metrics.seed_interval((a - b)[:4]) is None, "so few are shown one by one"
    assert metrics.seed_interval(np.full(n_seeds, 0.25)) == (0.25, 0.25)


@given(st.floats(0, 0.1), st.floats(0, 1), st.integers(0, 10**6))
def test_seeds_that_differ_much_widen_the_interval_over_seeds_alone(apart, of_users, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(0, of_users, 60) + apart * np.arange(5.0)[:, None]
    test = metrics.paired_test(values, np.zeros(60), resamples=100)
    low, high = test.seed_interval
    # Student's t of 0, apart, …, 4 · apart, whoever the users are.
    half = scipy.stats.t.ppf(0.975, 4) * apart * np.arange(5).std(ddof=1) / 5**0.5
    assert (high - low) / 2 == pytest.approx(half, abs=1e-6)
    assert test.by_seed == pytest.approx(values.mean(axis=1).tolist())


def test_memory_chunks_do_not_change_the_interval(monkeypatch):
    values = some_values(500)
    whole = metrics.bootstrap_interval(values, resamples=4000)
    monkeypatch.setattr(metrics, "_CELLS", 100)
    assert metrics.bootstrap_interval(values, resamples=4000) == pytest.approx(
        whole, abs=0.1 * (whole[1] - whole[0])
    )


@pytest.mark.parametrize("n_users, shift", [(6, 0.1), (8, 0.3), (10, 0.0)])
def test_p_value_agrees_with_enumerating_all_flips(n_users, shift):
    rng = np.random.default_rng(n_users)
    a = some_values(n_users, 1) + shift
    b = rng.choice([0.0, 0.1, 0.3], n_users)
    differences = a - b
    flipped = np.abs(
        [np.dot(signs, differences) for signs in itertools.product((-1, 1), repeat=n_users)]
    )
    exact = np.mean(flipped >= abs(differences.sum()) - 1e-12)
    found = metrics.paired_test(a, b, resamples=40000)
    assert found.difference == pytest.approx(differences.mean())
    assert found.p_value == pytest.approx(exact, abs=0.012)
    assert found.interval == metrics.bootstrap_interval(differences, resamples=40000)


def test_flips_as_extreme_as_the_data_count_whatever_the_rounding():
    # Sums to more than 6 * 0.3 in floats
    found = metrics.paired_test(np.full(6, 0.3), np.zeros(6), resamples=40000)
    assert found.p_value == pytest.approx(2 / 2**6, abs=0.005)


def test_paired_test_over_seeds():
    rng = np.random.default_rng(0)
    a = rng.random((3, 50))
    b = rng.random((3, 50))
    over_seeds = metrics.paired_test(a, b)
    averaged = metrics.paired_test(a.mean(axis=0), b.mean(axis=0))
    assert (
        over_seeds.difference == pytest.approx(averaged.difference)
        and over_seeds.p_value == averaged.p_value
    )
    assert metrics.paired_test(b, a).p_value == over_seeds.p_value, "two-sided"
    assert metrics.paired_test(a, b[0]).difference == pytest.approx(a.mean() - b[0].mean()), (
        "a baseline has one seed"
    )
    assert over_seeds.by_seed == pytest.approx((a - b).mean(axis=1).tolist())
    assert over_seeds.seed_interval is None, "three seeds say too little of their spread"
    one_seed_off = np.vstack([b, b[:2]])
    one_seed_off[0] += 3.0  # all of the difference comes from one seed
    found = metrics.paired_test(one_seed_off, np.vstack([b, b[:2]]))
    assert found.p_value < 0.001 and found.interval[0] > 0, "these models differ"
    low, high = found.seed_interval
    assert low <= 0 < high, "others may not"
    assert metrics.paired_test(a, a) == (0.0, (0.0, 0.0), 1.0, (0.0, 0.0, 0.0), None)


def test_p_values_are_uniform_when_nothing_differs():
    rng = np.random.default_rng(0)
    p_values = [
        metrics.paired_test(*rng.normal(size=(2, 30)), resamples=200, seed=seed).p_value
        for seed in range(300)
    ]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: metrics.rank_of_target(np.ones((2, 3)), np.ones(3)), r"\(2, 3\) and \(3,\)"),
        (lambda: metrics.rank_of_target(np.ones((2, 3)), np.array([1, 0])), "from 1 on, got 0"),
        (lambda: metrics.recall_at([1, 2], 0), "k must be at least 1, got 0"),
        (lambda: metrics.ndcg_at([-1, 2], 3), "ranks"),
        (lambda: metrics.shared_ranks([1, 2], [1]), r"sharers must be \[U\]"),
        (lambda: metrics.shared_ranks([1, 2], [1, 0]), "at least 1 .* and 0"),
        (lambda: metrics.ndcg_at(metrics.shared_ranks([-1], [2]), 3), "ranks"),
        (lambda: metrics.summary([]), "at least one user"),
        (lambda: metrics.bootstrap_interval([]), "at least one user"),
        (lambda: metrics.bootstrap_interval([1, np.nan]), "finite"),
        (lambda: metrics.bootstrap_interval(np.ones((2, 2, 2))), "shape"),
        (lambda: metrics.bootstrap_interval([1.0], level=95), "level"),
        (lambda: metrics.seed_interval([[0.1], [0.2]]), "shape"),
        (lambda: metrics.seed_interval([0.1, np.nan]), "finite"),
        (lambda: metrics.paired_test([1, 2], [1, 2, 3]), "same users"),
        (lambda: metrics.paired_test(np.ones((2, 3)), np.ones((3, 3))), "seeds"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
