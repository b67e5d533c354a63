"""SASRec: what each slot sees, which windows it predicts, and that it learns a rule."""

from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidlab.metrics import rank_of_target, summary
from sidlab.research.sasrec import SASRec, SASRecModel, rows_of
from sidlab.windows import Windows

N_ITEMS = 12
TINY = dict(d_model=16, layers=2, heads=2, max_items=6, batch_windows=64)


def walks(users, length, seed=0):
    """Every item has one successor; all users walk."""
    rng = np.random.default_rng(seed)
    successor = np.roll(rng.permutation(N_ITEMS), 1)
    items = [rng.integers(0, N_ITEMS, users)]
    for _ in range(length - 1):
        items.append(successor[items[-1]])
    return list(np.stack(items, axis=1).astype(np.int64) + 1)


def random_histories(users, seed=0, longest=9):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, N_ITEMS + 1, rng.integers(2, longest + 1)) for _ in range(users)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SASRecModel(N_ITEMS, d_model=16, layers=2, heads=2, max_items=6, dropout=0.3).eval()


@pytest.fixture(scope="module")
def fitted():
    return SASRec(**TINY, epochs=1).fit(random_histories(30), N_ITEMS)


# Evaluation without gradients takes torch's fused blocks, training its plain ones: both have to be
# causal.
@pytest.mark.parametrize("gradients", [False, True])
def test_a_later_item_never_changes_an_earlier_slot(model, gradients):
    items = torch.randint(1, N_ITEMS + 1, (4, 6))
    for place in range(1, 6):
        other = items.clone()
        other[:, place:] = items[:, place:] % N_ITEMS + 1
        with torch.set_grad_enabled(gradients):
            before = model.scores(model(items))
            after = model.scores(model(other))
        torch.testing.assert_close(before[:, :place], after[:, :place], rtol=0, atol=1e-6)
        # And the later ones do change
        assert (before[:, place:] - after[:, place:]).abs().amax(dim=-1).min() > 1e-4


def test_evaluation_and_training_blocks_agree(model):
    items = torch.randint(1, N_ITEMS + 1, (4, 6))
    with torch.no_grad():
        fused = model(items)
    torch.testing.assert_close(fused, model(items), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_history_alone_and_in_a_batch_are_scored_alike(model):
    histories = random_histories(5, longest=6)
    batch = torch.zeros(5, 6, dtype=torch.long)
    for row, history in zip(batch, histories):
        row[: len(history)] = torch.from_numpy(history)
    together = model(batch)
    for row, history in zip(together, histories):
        torch.testing.assert_close(
            row[: len(history)], model(torch.from_numpy(history)[None])[0], rtol=0, atol=1e-5
        )


def test_recommendations_do_not_depend_on_the_batch(fitted):
    histories = random_histories(600, seed=1)
    together = fitted.recommend(histories, k=5)
    assert together.shape == (600, 5) and together.dtype == np.int64
    alone = np.concatenate([fitted.recommend([h], k=5) for h in histories[::20]])
    np.testing.assert_array_equal(together[::20], alone)
    # Only the last max_items count.
    np.testing.assert_array_equal(together, fitted.recommend([h[-6:] for h in histories], k=5))
    assert fitted.recommend([], k=5).shape == (0, 5)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 7))
def test_every_window_is_predicted_exactly_once(sizes, max_items):
    bounds = np.cumsum([0, *sizes])
    # All ids differ, so an id is a place
    histories = [np.arange(a, b) + 1 for a, b in pairwise(bounds)]
    if max(sizes) < 2:
        return
    windows = Windows(histories, max_items)
    rows = rows_of(windows)
    assert rows[:, 1].max() <= max_items and (rows[:, 2] <= rows[:, 1]).all()
    seen = [
        (tuple(windows.items[s : s + place + 1]), windows.items[s + place + 1])
        for s, n, c in rows
        for place in range(n - c, n)
    ]
    expected = [
        (tuple(windows.items[a:b]), windows.items[b]) for a, b in zip(windows.start, windows.target)
    ]
    assert sorted(seen) == sorted(expected)


def test_fit_trains_on_exactly_these_windows(monkeypatch):
    """As above, but with what really reaches the loss."""
    histories = [np.arange(1, 10), np.array([10, 11]), np.array([12])]
    targets = []
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        "sidlab.research.sasrec.F.cross_entropy",
        lambda s, t, **kw: targets.append(t.tolist()) or real(s, t, **kw),
    )
    SASRec(**TINY, epochs=1).fit(histories, N_ITEMS)
    assert sorted(chain(*targets)) == [2, 3, 4, 5, 6, 7, 8, 9, 11]


def test_the_first_loss_is_the_mean_over_windows_one_by_one():
    """Rows, masks and batches change nothing: one window at a time gives the same loss (no dropout,
    hardly a learning rate).
    """
    histories = random_histories(20)
    sasrec = SASRec(**TINY, dropout=0, learning_rate=1e-12, epochs=1).fit(histories, N_ITEMS)
    windows = Windows(histories, 6)
    losses = []
    for a, b in zip(windows.start, windows.target):
        items = torch.from_numpy(windows.items[a:b])[None]
        scores = sasrec.model_.scores(sasrec.model_(items)[:, -1])
        losses.append(
            torch.nn.functional.cross_entropy(scores, torch.tensor([windows.items[b]])).item()
        )
    assert sasrec.log_[0]["loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_planted_rule_is_learnt():
    histories = walks(200, 9)
    sasrec = SASRec(**TINY, dropout=0.1, learning_rate=1e-2, epochs=8).fit(
        [h[:-1] for h in histories], N_ITEMS
    )
    found = sasrec.recommend([h[:-1] for h in histories], k=1)[:, 0]
    assert (found == [h[-1] for h in histories]).mean() > 0.99
    assert sasrec.log_[-1]["loss"] < 0.2 and sasrec.log_[0]["loss"] > 1


def test_early_stopping_returns_the_best_weights():
    # Random histories: nothing to learn but the training data, so validation soon gets worse.
    train = random_histories(40)
    cases = (random_histories(200, seed=5), np.random.default_rng(6).integers(1, N_ITEMS + 1, 200))
    arguments = TINY | dict(epochs=30, patience=2, learning_rate=1e-2)
    sasrec = SASRec(**arguments).fit(train, N_ITEMS, cases)
    recalls = [entry["recall@10"] for entry in sasrec.log_]
    best = int(np.argmax(recalls))
    assert len(recalls) == best + 3 < 30
    assert not sasrec.model_.training
    again = summary(rank_of_target(sasrec.recommend(cases[0]), cases[1]))
    assert again == {name: sasrec.log_[best][name] for name in again}
    # Evaluation draws no random number: as many epochs without validation end in the same weights.
    plain = SASRec(**arguments | dict(epochs=best + 1)).fit(train, N_ITEMS)
    for a, b in zip(sasrec.model_.parameters(), plain.model_.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert set(plain.log_[0]) == {"loss"}


def test_the_same_seed_gives_the_same_model_and_leaves_global_random_numbers_alone():
    train = random_histories(30)
    histories = random_histories(50, seed=1)
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    first = SASRec(**TINY, epochs=2, seed=3).fit(train, N_ITEMS)
    assert (
        torch.equal(torch.get_rng_state(), state)
        and (np.random.get_state()[1] == numpy_state).all()
    )
    torch.manual_seed(99)
    second = SASRec(**TINY, epochs=2, seed=3).fit(train, N_ITEMS)
    other = SASRec(**TINY, epochs=2, seed=4).fit(train, N_ITEMS)
    for a, b in zip(first.model_.parameters(), second.model_.parameters()):
        assert torch.equal(a, b)
    np.testing.assert_array_equal(first.recommend(histories), second.recommend(histories))
    assert (first.recommend(histories) != other.recommend(histories)).any()


def test_seen_items_are_left_out(fitted):
    history = np.array([1, 2, 3, 4, 5, 6, 7, 7, 8])  # longer than max_items: all of it was seen
    ranked = fitted.recommend([history, np.array([3])], k=N_ITEMS + 2, exclude_seen=True)
    assert sorted(ranked[0]) == [0] * 10 + [9, 10, 11, 12] and (ranked[0, 4:] == 0).all()
    plain = fitted.recommend([history, np.array([3])], k=N_ITEMS + 2)
    for row, seen, unseen in zip(plain, (history, [3]), ranked):
        assert sorted(row) == [0, 0, *range(1, N_ITEMS + 1)] and (row[-2:] == 0).all()
        # The order stays
        np.testing.assert_array_equal(row[~np.isin(row, seen) & (row > 0)], unseen[unseen > 0])


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(d_model=10, heads=4), "multiple of heads, got d_model=10 and heads=4"),
        (dict(heads=0), "heads=0"),
        (dict(layers=0), "layers must be at least 1, got 0"),
        (dict(max_items=0), "max_items must be at least 1"),
        (dict(epochs=0), "epochs must be at least 1"),
        (dict(patience=0), "patience must be at least 1"),
        (dict(batch_windows=0), "batch_windows must be at least 1"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_parameters_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        SASRec(**TINY | change)


def test_bad_input_is_named(fitted):
    one = [np.array([1, 2, 3])]
    with pytest.raises(ValueError, match="1..2, got int64 in 1..3"):
        SASRec(**TINY).fit(one, 2)
    with pytest.raises(ValueError, match="float64"):
        SASRec(**TINY).fit([np.array([1.5, 2.0])], 3)
    with pytest.raises(ValueError, match="no training window"):
        SASRec(**TINY).fit([np.array([1])], 3)
    with pytest.raises(ValueError, match="a target for each history, got 1 and 2"):
        SASRec(**TINY).fit(one, 3, (one, np.array([1, 2])))
    with pytest.raises(RuntimeError, match="call fit first"):
        SASRec(**TINY).recommend(one)
    with pytest.raises(ValueError, match="1..12"):
        fitted.recommend([np.array([13])])
    with pytest.raises(ValueError, match="at least one"):
        fitted.recommend([np.array([], np.int64)])
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        fitted.recommend(one, k=0)
