"""The planted world: its filter against enumeration of everything hidden, its users against its
filter.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidlab.data.load import load_catalogue
from sidlab.data.planted import PlantedTruth, planted_catalogue
from sidlab.sids.residual_kmeans import ResidualKMeans
from sidlab.sids.table import SidTable

D = 3
S = 2
V = 2  # departments, brands, kinds


@pytest.fixture(scope="module")
def small():
    """A world of 12 real and 8 noise items whose every probability is drawn, so that none is
    special.
    """
    rng = np.random.default_rng(3)
    real = list(itertools.product(range(D), range(S), range(V)))
    noise = list(itertools.product((D, D + 1), (S, S + 1), range(V)))
    popularity = np.concatenate([np.zeros(len(real)), rng.dirichlet(np.ones(len(noise)))])
    return PlantedTruth(
        np.array(real + noise),
        rng.dirichlet(np.ones(D), D),
        rng.dirichlet(np.ones(S), D),
        rng.dirichlet(np.ones(V), D),
        popularity,
        loyalty=0.8,
        noise=0.3,
    )


def joint(truth, items):
    """p(items): the sum over all favourite brands of the probability of the whole walk."""
    total = 0.0
    for favourites in itertools.product(range(S), repeat=D):
        p = np.prod([truth.brand_prior[g, favourites[g]] for g in range(D)])
        here = None
        for item in items:
            d, s, v = truth.tree[item - 1]
            if d >= D:
                p *= truth.noise * truth.noise_popularity[item - 1]
                continue
            p *= (1 - truth.noise) * (1 / D if here is None else truth.step[here, d])
            p *= truth.loyalty if s == favourites[d] else (1 - truth.loyalty) / (S - 1)
            p *= truth.kind_popularity[d, v]
            here = d
        total += p
    return total


def next_by_hand(truth, worlds):
    """p(next | the history is one of `worlds`), with the probabilities of the process."""
    return np.array(
        [sum(joint(truth, [*w, i]) for w in worlds) for i in range(1, len(truth.tree) + 1)]
    ) / sum(joint(truth, w) for w in worlds)


def information_by_hand(truth, items, place, level):
    others = [m for m in range(3) if m != level]
    same = [
        i
        for i in range(1, len(truth.tree) + 1)
        if (truth.tree[i - 1, others] == truth.tree[items[place] - 1, others]).all()
    ]
    known = next_by_hand(truth, [items])
    unknown = next_by_hand(truth, [[*items[:place], i, *items[place + 1 :]] for i in same])
    return (known * np.log(known / unknown)).sum()


# Real items are 1..12 and noise 13..20. First clicks, last clicks, returns, noise before, between,
# after and alone.
HISTORIES = [
    [1, 2],
    [5, 17, 1],
    [14, 9, 3, 10],
    [1, 6, 13, 3, 20],
    [2, 4, 1, 2, 11],
    [13, 18],
    [19, 7],
    [7, 13],
]


def test_next_item_agrees_with_enumeration(small):
    histories = [np.array(h) for h in [*HISTORIES, []]]
    found = small.next_item(histories)
    np.testing.assert_allclose(
        found, [next_by_hand(small, [list(h)]) for h in histories], atol=1e-12
    )
    np.testing.assert_allclose(found.sum(axis=1), 1)


@given(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=4), min_size=1, max_size=2))
@settings(max_examples=15)
def test_any_histories_agree_with_enumeration(small, histories):
    np.testing.assert_allclose(
        small.next_item(histories), [next_by_hand(small, [h]) for h in histories], atol=1e-12
    )


def test_information_agrees_with_enumeration_and_is_there_where_it_is_said_to_be(small):
    found = small.information(HISTORIES)
    informative = small.informative(HISTORIES)
    assert found.shape == informative.shape == (len(HISTORIES), 5, 3)
    for u, history in enumerate(HISTORIES):
        expected = np.zeros((5, 3))
        for place, level in itertools.product(range(len(history)), range(3)):
            expected[place, level] = information_by_hand(small, history, place, level)
        np.testing.assert_allclose(found[u], expected, atol=1e-12)
        assert np.array_equal(informative[u], expected > 1e-9)


def test_no_real_click_no_information(small):
    assert (small.information([[13], [20, 14, 14]]) == 0).all() and not small.informative(
        [[13], [20, 14, 14]]
    ).any()


def test_recommend_and_recall_are_those_of_the_distribution(small):
    p = small.next_item(HISTORIES)
    items = small.recommend(HISTORIES, k=4)
    for row, best in zip(p, items):
        assert best.tolist() == sorted(range(1, 21), key=lambda i: -row[i - 1])[:4]
    np.testing.assert_allclose(
        small.bayes_recall(HISTORIES, k=4), np.take_along_axis(p, items - 1, 1).sum(axis=1)
    )
    many = [HISTORIES[i % len(HISTORIES)] for i in range(150)]  # more than are looked at together
    assert small.recommend(many, k=4).tolist() == [
        items[i % len(HISTORIES)].tolist() for i in range(150)
    ]
    assert small.recommend([], k=4).shape == (0, 4) and small.bayes_recall([], k=4).shape == (0,)


def test_thousands_of_clicks_on_one_brand_are_still_numbers(small):
    few, many = small.next_item([[1] * 60, [1] * 5000])
    np.testing.assert_allclose(many.sum(), 1)
    np.testing.assert_allclose(few, many, atol=1e-9)  # the favourite is certain by then


@pytest.fixture(scope="module")
def world():
    return planted_catalogue(3000, seed=5)


def test_users_behave_as_the_filter_says(world):
    truth = world.truth
    rng = np.random.default_rng(0)
    cut = [int(rng.integers(0, len(h))) for h in world.histories]
    p = truth.next_item([h[:c] for h, c in zip(world.histories, cut)])
    target = np.array([h[c] for h, c in zip(world.histories, cut)]) - 1
    users = np.arange(len(target))
    # The mean log-probability of what came is minus the mean entropy only if the probabilities are
    # the true ones.
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)
    surprise = -np.log(p[users, target])
    assert abs((surprise - entropy).mean()) < 4 * (surprise - entropy).std() / np.sqrt(len(users))
    hit = (
        truth.recommend([h[:c] for h, c in zip(world.histories, cut)], 10) == target[:, None] + 1
    ).any(axis=1)
    expected = truth.bayes_recall([h[:c] for h, c in zip(world.histories, cut)], 10)
    assert abs((hit - expected).mean()) < 4 * (hit - expected).std() / np.sqrt(len(users))
    # And item by item: counts of what came against the sums of what was expected.
    count = np.bincount(target, minlength=len(p[0]))
    mean = p.sum(axis=0)
    variance = (p * (1 - p)).sum(axis=0)
    assert (np.abs(count - mean) < 5 * np.sqrt(variance) + 3).all()


def test_every_department_has_its_own_favourites(world):
    truth = world.truth
    n_dep, n_brand = truth.brand_prior.shape
    firsts = np.zeros((n_dep, n_brand))
    pairs = []
    for history in world.histories:
        first = {}
        for d, s, _ in truth.tree[history - 1].tolist():
            if d < n_dep:
                first.setdefault(d, s)
        for d, s in first.items():
            firsts[d, s] += 1
        if 0 in first and 1 in first:
            pairs.append(first[0] == first[1])
    other = (1 - truth.loyalty) / (n_brand - 1)
    p = other + (truth.loyalty - other) * truth.brand_prior
    n = firsts.sum(axis=1, keepdims=True)
    assert (np.abs(firsts - n * p) < 5 * np.sqrt(n * p * (1 - p))).all()
    alike = (p[0] * p[1]).sum()  # of brands that have nothing to do with each other
    assert abs(np.mean(pairs) - alike) < 5 * np.sqrt(alike * (1 - alike) / len(pairs))


def test_what_decides_is_far_back(world):
    truth = world.truth
    histories = [h[:-1] for h in world.histories]
    p = truth.next_item(histories)
    recent = truth.recommend([h[-max(1, -(-len(h) // 3)) :] for h in histories], 10) - 1
    for k in (5, 10):
        with_recent_only = np.take_along_axis(p, recent[:, :k], 1).sum(axis=1).mean()
        assert with_recent_only <= 0.8 * truth.bayes_recall(histories, k).mean()


def test_residual_kmeans_finds_the_tree_without_a_collision(world):
    tree = world.truth.tree
    widths = tuple((tree.max(axis=0) + 1).tolist())
    codes = ResidualKMeans(3, widths, seed=0).fit(world.embeddings).encode(world.embeddings)
    for level in range(3):  # one name for one name
        assert (
            len(set(zip(codes[:, level], tree[:, level])))
            == len(set(codes[:, level]))
            == widths[level]
        )
    assert SidTable(codes, widths).levels == 3


def test_every_item_has_its_place_and_its_words(world):
    tree = world.truth.tree
    assert (
        len(np.unique(tree, axis=0)) == len(tree) == world.n_items == world.items["text"].nunique()
    )
    assert (world.truth.noise_popularity > 0).tolist() == (
        tree[:, 0] >= len(world.truth.step)
    ).tolist()
    for name in ("step", "brand_prior", "kind_popularity", "noise_popularity"):
        np.testing.assert_allclose(getattr(world.truth, name).sum(axis=-1), 1)


def test_a_seed_is_a_world():
    one, same, other = (planted_catalogue(20, seed=s, shortest=4, longest=6) for s in (1, 1, 2))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert np.array_equal(one.embeddings, same.embeddings) and not np.array_equal(
        one.embeddings, other.embeddings
    )
    assert {len(h) for h in one.histories} == {4, 5, 6} and len(one.histories) == 20
    assert (
        load_catalogue("planted", n_users=20, seed=1, shortest=4, longest=6).fingerprint()
        == one.fingerprint()
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loyalty": 1.0}, "loyalty must lie between 0 and 1, got 1.0"),
        ({"noise": 0}, "noise must lie between 0 and 1, got 0"),
        ({"shortest": 2}, "3 <= shortest <= longest, got 2"),
        ({"shortest": 9, "longest": 8}, "got 9 and 8"),
        ({"n_users": 0}, "n_users must be at least 1, got 0"),
        ({"dim": 5}, "dim must be at least .* got 5"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        planted_catalogue(**{"n_users": 4} | options)


def test_a_large_world_is_the_same_world_with_more_kinds():
    catalogue = planted_catalogue(50, kinds=30)
    assert catalogue.n_items == 40 * 30 and catalogue.items.title.is_unique
    truth = catalogue.truth
    assert truth.kind_popularity.shape == (6, 30) and np.allclose(truth.kind_popularity.sum(1), 1)
    histories = [h[:-1] for h in catalogue.histories]
    assert np.allclose(truth.next_item(histories).sum(1), 1)
    names = catalogue.items.title[truth.tree[:, 2] < 4].tolist()
    assert sorted(names) == sorted(planted_catalogue(1).items.title)
    with pytest.raises(ValueError, match="kinds must be at least 2, got 1"):
        planted_catalogue(5, kinds=1)
