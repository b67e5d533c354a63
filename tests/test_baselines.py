"""Baselines against a plain dictionary in exact fractions, and against the numbers printed in
PAPERS.md.
"""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from conftest import SHARED, needs_shared
from hypothesis import example, given
from hypothesis import strategies as st

from sidlab.data.load import load_catalogue
from sidlab.metrics import rank_of_target, summary
from sidlab.research.baselines import NeighbourTable, Popularity

N_ITEMS = 7
histories_of = st.lists(st.lists(st.integers(1, N_ITEMS), max_size=8), max_size=6)


def by_hand(train, history, k, exclude_seen, with_table):
    """Ranked items. Dictionaries keep the order in which keys came, and `sorted` keeps it among
    equals.
    """
    table = {}
    for past in train:
        for a, b in pairwise(past):
            for source, target, weight in ((a, b, Fraction(1)), (b, a, Fraction(1, 2))):
                row = table.setdefault(source, {})
                row[target] = row.get(target, 0) + weight
    scores = {}
    for back, item in enumerate(reversed(history) if with_table else []):
        for neighbour, weight in table.get(item, {}).items():
            scores[neighbour] = scores.get(neighbour, 0) + weight / (1 + back)
    counts = Counter(item for past in train for item in past)
    ranked = sorted(scores, key=lambda item: -scores[item])
    ranked += sorted(
        set(range(1, N_ITEMS + 1)) - set(ranked), key=lambda item: (-counts[item], item)
    )
    ranked = [item for item in ranked if not (exclude_seen and item in history)]
    return (ranked + [0] * k)[:k]


@given(histories_of, histories_of, st.integers(1, 9), st.booleans())
@example([[1, 2, 3], [1, 3]], [[1], [], [1, 1]], 3, True)
@example([[1, 2], [1, 2], [2, 1], [1, 3], [4], [4], [4], [4]], [[2, 1]], 1, True)
def test_both_agree_with_dictionaries(train, histories, k, exclude_seen):
    arrays = [np.array(history, dtype=np.int64) for history in histories]
    for model, with_table in ((Popularity(), False), (NeighbourTable(), True)):
        model.fit([np.array(past, dtype=np.int64) for past in train], N_ITEMS)
        items = model.recommend(arrays, k, exclude_seen)
        assert items.shape == (len(histories), k) and items.dtype == np.int64
        expected = [by_hand(train, history, k, exclude_seen, with_table) for history in histories]
        assert items.tolist() == expected


def test_a_generator_of_histories_is_read_once():
    train = [np.array([5, 1, 2]), np.array([1, 2])]
    history = [np.array([5])]
    once, often = (
        NeighbourTable().fit(given, 5).recommend(history, 3) for given in (iter(train), train)
    )
    assert once.tolist() == often.tolist() == [[1, 2, 5]]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="1..3, got int64 in 0..2"):
        Popularity().fit([np.array([0, 2])], 3)
    fitted = NeighbourTable().fit([np.array([1, 2])], 3)
    with pytest.raises(ValueError, match="1..3"):
        fitted.recommend([np.array([4])])
    with pytest.raises(ValueError, match="float64"):
        fitted.recommend([np.array([1.5])])
    with pytest.raises(ValueError, match="k must be"):
        fitted.recommend([np.array([1])], k=0)


# What the printed numbers rest on: the test history is all but the last item, not cut at 30 items;
# popularity is that of the training part; ties as in NeighbourTable (no sequence here repeats an
# item). With ties by popularity it would be .0469/.0686 and .0536/.0742 on Beauty, .0313/.0431 and
# .0333/.0458 on Sports.
@needs_shared
@pytest.mark.parametrize(
    "name, plain, unseen, popular",
    [
        ("amazon-beauty", (0.0481, 0.0682), (0.0536, 0.0735), 0.0114),
        ("amazon-sports", (0.0311, 0.0422), (0.0331, 0.0447), None),
    ],
)
def test_the_printed_numbers_are_reproduced(name, plain, unseen, popular):
    catalogue = load_catalogue(SHARED / name)
    train = [history[:-2] for history in catalogue.histories]
    tests = [history[:-1] for history in catalogue.histories]
    targets = np.array([history[-1] for history in catalogue.histories])

    def recalls(model, exclude_seen=False):
        found = summary(rank_of_target(model.recommend(tests, 10, exclude_seen), targets))
        return found["recall@5"], found["recall@10"]

    table = NeighbourTable().fit(train, catalogue.n_items)
    assert recalls(table) == pytest.approx(plain, abs=5e-4)
    assert recalls(table, exclude_seen=True) == pytest.approx(unseen, abs=5e-4)
    if popular:
        assert recalls(Popularity().fit(train, catalogue.n_items))[1] == pytest.approx(
            popular, abs=5e-5
        )
