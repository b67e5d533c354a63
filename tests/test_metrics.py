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


@pytest.mark.parametrize("n_seeds", [2, 3, 10])
def test_interval_over_seeds_alone_is_students(n_seeds):
    of_seed = np.random.default_rng(n_seeds).normal(0.3, 0.05, n_seeds)
    expected = scipy.stats.t.interval(0.95, n_seeds - 1, of_seed.mean(), scipy.stats.sem(of_seed))
    found = metrics.bootstrap_interval(np.repeat(of_seed[:, None], 40, axis=1), resamples=100_000)
    assert found == pytest.approx(expected, abs=0.04 * (expected[1] - expected[0]))


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
@pytest.mark.parametrize(
    "of_users, of_seeds, of_both",
    [(0.3, 0.04, 0.1), (0.3, 0.0, 0.3), (0.0, 0.06, 0.3), (0.0, 0.0, 0.3)],
    ids=["all differ", "users and noise", "seeds and noise, as in differences", "only noise"],
)
def test_interval_over_seeds_and_users_holds_the_mean_as_often_as_it_says(
    n_seeds, of_users, of_seeds, of_both
):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        users = rng.normal(0, of_users, 100)
        seeds = rng.normal(0, of_seeds, (n_seeds, 1))
        low, high = metrics.bootstrap_interval(
            users + seeds + rng.normal(0, of_both, (n_seeds, 100))
        )
        held += low <= 0 <= high
    assert held >= 0.92 * 400, held / 400  # of two seeds it may hold more


def two_way_noise(rng, n_settings, n_seeds, shared, own):
    return rng.normal(0, shared, (1, n_seeds)) + rng.normal(0, own, (n_settings, n_seeds))


def test_noise_of_one_setting_and_of_two_is_that_of_students_tests():
    rng = np.random.default_rng(0)
    one = rng.normal(0.3, 0.05, (1, 4))
    both, _ = metrics.pooled_seed_noise(one)
    assert both == pytest.approx((one.std(ddof=1), 3))
    two = rng.normal(0.3, 0.05, (2, 4))
    _, own = metrics.pooled_seed_noise(two)
    assert own == pytest.approx(((two[0] - two[1]).std(ddof=1) / 2**0.5, 3))


@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 10**6))
def test_pooled_noise_is_the_mean_variance_and_the_residual_of_least_squares(
    n_settings, n_seeds, seed
):
    means = (
        two_way_noise(np.random.default_rng(seed), n_settings, n_seeds, 0.02, 0.03)
        + np.arange(n_settings)[:, None]
    )
    both, own = metrics.pooled_seed_noise(means)
    assert both.deviation == pytest.approx(means.var(axis=1, ddof=1).mean() ** 0.5)
    assert n_seeds - 1 - 1e-9 <= both.freedom <= n_settings * (n_seeds - 1) + 1e-9
    setting, of_seed = np.indices(means.shape).reshape(2, -1)
    design = np.hstack([np.eye(n_settings)[setting], np.eye(n_seeds)[of_seed]])
    left = means.ravel() - design @ np.linalg.lstsq(design, means.ravel(), rcond=None)[0]
    assert own == pytest.approx(
        ((left @ left / own.freedom) ** 0.5, len(left) - np.linalg.matrix_rank(design))
    )
    moved = metrics.pooled_seed_noise(
        means + np.random.default_rng(seed).normal(0, 1, (1, n_seeds))
    )[1]
    assert moved == pytest.approx(own), "what all settings share is in no difference"


def test_equal_seeds_have_no_noise():
    both, own = metrics.pooled_seed_noise(np.full((3, 2), 0.25))
    assert both == (0, 1) and own == (0, 2)
    values = np.tile(some_values(200), (2, 1))
    assert metrics.bootstrap_interval(values, noise=both) == metrics.bootstrap_interval(values)


@pytest.mark.parametrize(
    "shared, own, least", [(0.0, 0.03, 0.93), (0.03, 0.03, 0.92), (0.1, 0.01, 0.88)]
)
def test_intervals_with_pooled_noise_hold_the_mean_as_often_as_they_say(shared, own, least):
    """`least`, for a setting's own: where seeds move all settings together, two of them tell too
    little.
    """
    rng = np.random.default_rng(1)
    held = np.zeros(2)
    widths = np.zeros((2, 2))
    for _ in range(400):
        seeds = two_way_noise(rng, 12, 2, shared, own)
        # Two of the settings: [2, S, U]
        values = rng.normal(0, 0.2, 100) + seeds[:2, :, None] + rng.normal(0, 0.2, (2, 2, 100))
        means = np.vstack([values.mean(axis=2), seeds[2:] + rng.normal(0, 0.02, (10, 2))])
        both, noise = metrics.pooled_seed_noise(means)
        noise = metrics.SeedNoise(2**0.5 * noise.deviation, noise.freedom)
        for place, (of, told) in enumerate([(values[0], both), (values[0] - values[1], noise)]):
            pooled = metrics.bootstrap_interval(of, noise=told)
            alone = metrics.bootstrap_interval(of)
            held[place] += pooled[0] <= 0 <= pooled[1]
            widths[place] += pooled[1] - pooled[0], alone[1] - alone[0]
    assert held[0] >= least * 400 and 0.93 * 400 <= held[1] <= 0.98 * 400, held / 400
    assert widths[1, 0] < widths[1, 1] / 2  # of two seeds alone a difference is hardly known


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
    one_seed_off = b + np.array([[3.0], [0.0], [0.0]])  # all of the difference comes from one seed
    found = metrics.paired_test(one_seed_off, b)
    assert found.p_value < 0.001 and found.interval[0] <= 0 < found.interval[1], (
        "the interval doubts the seeds"
    )
    assert metrics.paired_test(a, a) == (0.0, (0.0, 0.0), 1.0)


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
        (lambda: metrics.pooled_seed_noise([[0.1], [0.2]]), "two seeds"),
        (
            lambda: metrics.bootstrap_interval(
                [[0.1], [0.2]], noise=metrics.pooled_seed_noise([[0.1, 0.2]])[1]
            ),
            "no degree of freedom",
        ),
        (lambda: metrics.pooled_seed_noise([0.1, 0.2]), "shape"),
        (lambda: metrics.paired_test([1, 2], [1, 2, 3]), "same users"),
        (lambda: metrics.paired_test(np.ones((2, 3)), np.ones((3, 3))), "seeds"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
