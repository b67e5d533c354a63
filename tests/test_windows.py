"""Split, windows, batches and collator against plain loops over users."""

import gzip
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import SHARED, needs_shared
from hypothesis import given
from hypothesis import strategies as st

from sidlab.batches import LengthBatches, StratifiedBatches, UserBatches
from sidlab.data.planted import planted_catalogue
from sidlab.map_loss import MapConfig
from sidlab.sids.table import PAD, SEP, SidTable
from sidlab.windows import (
    Collator,
    Windows,
    history_tokens,
    leave_one_out,
    pad_histories,
    truth_tokens,
)

N_ITEMS = 60
TABLE = SidTable(np.array([[i // 16, i // 4 % 4, i % 4] for i in range(N_ITEMS)]), width=4)
ITEM_OF = {tuple(sid): item for item, sid in enumerate(TABLE.item_tokens.tolist()) if item}

# Users whose items all differ, so that an item says whose it is and where it stood.
lengths_of_users = st.lists(st.integers(1, 9), min_size=1, max_size=6).filter(
    lambda sizes: max(sizes) >= 4
)


def users(sizes):
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) + 1 for size, end in zip(sizes, ends)]


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), max_size=6))
def test_leave_one_out(histories):
    usable = [h for h in histories if len(h) >= 3]
    if not usable:
        with pytest.raises(ValueError, match="no user has three items"):
            leave_one_out(histories)
        return
    split = leave_one_out(histories)
    assert split.skipped == len(histories) - len(usable)
    assert [t.tolist() for t in split.train] == [h[:-2] for h in usable]
    for part, cut in (("validation", -2), ("test", -1)):
        seen, targets = split.cases(part)
        assert [h.tolist() for h in seen] == [h[:cut] for h in usable] and targets.tolist() == [
            h[cut] for h in usable
        ]
    with pytest.raises(ValueError, match="part='train' is unknown"):
        split.cases("train")


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=5), st.integers(1, 7))
def test_windows_are_all_prefixes(train, max_items):
    expected = [
        (h[max(0, t - max_items) : t], h[t], h[t:]) for h in train for t in range(1, len(h))
    ]
    if not expected:
        with pytest.raises(ValueError, match="no training window"):
            Windows([np.array(h, np.int64) for h in train], max_items)
        return
    w = Windows([np.array(h, np.int64) for h in train], max_items)
    found = [
        (w.items[s:t].tolist(), w.items[t], w.items[t:e].tolist())
        for s, t, e in zip(w.start, w.target, w.end)
    ]
    assert found == expected
    assert w.lengths.tolist() == [len(h) for h, _, _ in expected]
    assert len(w) == len(expected) and w[len(w) - 1] == len(w) - 1


@given(
    st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=5).filter(
        lambda t: any(len(h) > 1 for h in t)
    ),
    st.integers(1, 7),
)
def test_contiguous_windows_are_all_stretches(train, max_items):
    expected = [
        (user, h[max(s, t - max_items) : t], h[t], h[t:])
        for user, h in enumerate(train)
        for t in range(1, len(h))
        for s in range(t)
    ]
    w = Windows([np.array(h, np.int64) for h in train], max_items, "contiguous")
    owner = np.repeat(np.arange(len(train)), np.diff(w.of_user)).tolist()
    found = [
        (w.items[s:t].tolist(), w.items[t], w.items[t:e].tolist())
        for s, t, e in zip(w.start, w.target, w.end)
    ]
    assert [(u, *f) for u, f in zip(owner, found, strict=True)] == expected
    assert len(w.of_user) == len(train) + 1


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([4, 1000]),
)
def test_an_update_is_a_sample_of_each_group_of_users_cut_by_length(
    sizes, accumulation, group, limit
):
    windows = [np.arange(1, size + 1) for size in sizes]
    if sum(size > 1 for size in sizes) < accumulation:
        with pytest.raises(ValueError):
            UserBatches(Windows(windows, 5, "contiguous"), accumulation)
        return
    windows = Windows(windows, 5, "contiguous")
    owner = np.repeat(np.arange(len(sizes)), np.diff(windows.of_user))
    batches = UserBatches(windows, accumulation, seed=1, users=group, limit=limit)
    seen_users = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        epoch_batches = list(batches)
        assert (
            len(epoch_batches) == len(batches)
            and all(epoch_batches)
            and len(batches) % accumulation == 0
        )
        assert list(batches) == epoch_batches
        drawn = [i for b in epoch_batches for i in b]
        assert len(set(drawn)) == len(drawn)
        users_of_updates = []
        for u in range(0, len(batches), accumulation):
            update = [i for b in epoch_batches[u : u + accumulation] for i in b]
            ends = [
                (windows.lengths[b].min(), windows.lengths[b].max())
                for b in epoch_batches[u : u + accumulation]
            ]
            # By length
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))
            users_of_updates.append(set(owner[update].tolist()))
            assert len(users_of_updates[-1]) <= group * accumulation
            assert len(update) <= accumulation * limit
            if limit == 1000:  # nothing is left out
                assert len(update) == np.isin(owner, list(users_of_updates[-1])).sum()
        # No user twice
        assert sum(map(len, users_of_updates)) == len(set().union(*users_of_updates))
        seen_users.append(users_of_updates)
    if (
        len(batches) == accumulation
        and limit == 1000
        and sum(s > 1 for s in sizes) <= group * accumulation
    ):
        assert seen_users[0] == seen_users[1]


def test_published_updates_hold_at_most_512_windows_a_group_and_little_padding():
    windows = Windows(
        leave_one_out(planted_catalogue(n_users=1500).histories).train, 17, "contiguous"
    )
    batches = UserBatches(windows, 16)
    drawn = list(batches)
    assert len(drawn) == 32  # two whole updates of 16 × 32 users
    assert [len([i for b in drawn[u : u + 16] for i in b]) for u in (0, 16)] == [16 * 512] * 2
    slots = [windows.lengths[b].max() * len(b) for b in drawn]
    assert sum(windows.lengths[b].sum() for b in drawn) / sum(slots) > 0.95
    assert max(slots) < 3 * np.mean(slots)


@given(
    lengths_of_users,
    st.integers(1, 8),
    st.integers(1, 4),
    st.sampled_from(["item", "token"]),
    st.booleans(),
    st.booleans(),
)
def test_collator_agrees_with_a_loop_and_hides_the_held_out_items(
    sizes, max_items, steps, unit, separators, fixed
):
    histories = users(sizes)
    split = leave_one_out(histories)
    windows = Windows(split.train, max_items)
    collate = Collator(
        windows,
        TABLE,
        separators=separators,
        max_items=max_items,
        fixed_slots=fixed,
        map_config=MapConfig(steps=steps, unit=unit),
    )
    batch = collate(list(range(len(windows))))
    expected = []
    for user, train in enumerate(split.train):
        for t in range(1, len(train)):
            row = {"input_ids": [], "map_labels": []}
            for item in train[max(0, t - max_items) : t]:
                row["input_ids"] += TABLE.item_tokens[item].tolist() + [SEP] * separators
            row["labels"] = TABLE.item_tokens[train[t]].tolist()
            for s in range(1, steps + 1):
                after = row["labels"][s:] if unit == "token" else []
                if unit == "item" and t + s < len(train):
                    after = TABLE.item_tokens[train[t + s]].tolist()
                row["map_labels"].append(after + [-100] * (3 - len(after)))
            expected.append((user, row))
    slots = (3 + separators) * (max_items if fixed else int(windows.lengths.max()))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(windows), slots)
    for b, (user, row) in enumerate(expected):
        ids = row["input_ids"] + [PAD] * (slots - len(row["input_ids"]))
        assert batch["input_ids"][b].tolist() == ids
        assert batch["attention_mask"][b].tolist() == [int(i != PAD) for i in ids]
        assert batch["labels"][b].tolist() == row["labels"]
        assert batch["map_labels"][b].tolist() == row["map_labels"]
        labels = [batch["labels"][b]] + (
            [l for l in batch["map_labels"][b] if l[0] != -100] if unit == "item" else []
        )
        held_out = set(
            histories[[i for i, h in enumerate(histories) if len(h) >= 3][user]][-2:].tolist()
        )
        assert not held_out & {ITEM_OF[tuple(label.tolist())] for label in labels}
    assert all(t.dtype == torch.long for t in batch.values())


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=60),
    st.integers(1, 5),
    st.integers(0, 40),
    st.integers(0, 3),
)
def test_every_window_once_an_epoch_within_the_budget(lengths, per_item, spare, seed):
    lengths = np.array(lengths)
    budget = int(lengths.max()) * per_item + spare
    batches = LengthBatches(lengths, per_item, budget, seed)
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        epoch_batches = list(batches)
        assert len(epoch_batches) == len(batches)
        assert sorted(i for b in epoch_batches for i in b) == list(range(len(lengths)))
        assert all(0 < len(b) * lengths[b].max() * per_item <= budget for b in epoch_batches)
        by_length = sorted(sorted(lengths[b].tolist()) for b in epoch_batches)
        # Batches are intervals of the lengths
        assert [n for batch in by_length for n in batch] == sorted(lengths)
        again = LengthBatches(lengths, per_item, budget, seed)
        again.set_epoch(epoch)
        assert list(again) == epoch_batches


def test_no_batch_could_have_taken_one_window_more():
    lengths = np.random.default_rng(0).integers(1, 20, 500)
    batches = LengthBatches(lengths, 4, 400)
    ordered = np.sort(lengths) * 4
    for begin, end in zip(batches.cuts[:-1], batches.cuts[1:]):
        assert end == len(lengths) or (end - begin + 1) * ordered[end] > 400


def test_epochs_and_seeds_shuffle_anew():
    lengths = np.random.default_rng(0).integers(1, 10, 300)

    def order(seed, epoch):
        batches = LengthBatches(lengths, 4, 200, seed)
        batches.set_epoch(epoch)
        return list(batches)

    first = order(0, 0)
    for other in (order(0, 1), order(1, 0)):
        assert len(other) == len(first) and other != first
        # Not only the batches move: windows of equal length change places between them.
        assert {frozenset(b) for b in other} != {frozenset(b) for b in first}
    # Lengths do not come in order, or an update would see one length only.
    means = [lengths[b].mean() for b in first]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5


def epoch_of(batches, epoch=0):
    """Its updates, each a list of batches."""
    batches.set_epoch(epoch)
    found = list(batches)
    assert len(found) == len(batches) and len(found) % batches.accumulation == 0
    return [
        found[begin : begin + batches.accumulation]
        for begin in range(0, len(found), batches.accumulation)
    ]


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=60),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 400),
    st.integers(0, 3),
)
def test_every_update_has_all_lengths_in_proportion(lengths, per_item, accumulation, budget, seed):
    lengths = np.array(lengths)
    if len(lengths) < accumulation:
        with pytest.raises(
            ValueError, match=f"accumulation={accumulation} .* as many windows, got {len(lengths)}"
        ):
            StratifiedBatches(lengths, per_item, budget, seed, accumulation)
        return
    budget = max(budget, lengths.max() * per_item)  # which is said to be enough
    batches = StratifiedBatches(lengths, per_item, budget, seed, accumulation)
    size = batches.size
    epochs = []
    for epoch in (0, 1):
        updates = epoch_of(batches, epoch)
        assert updates == epoch_of(
            StratifiedBatches(lengths, per_item, budget, seed, accumulation), epoch
        )
        drawn = [i for update in updates for batch in update for i in batch]
        # At most once, and all that fill an update
        assert len(set(drawn)) == len(drawn) == size * len(updates) > len(lengths) - size
        for update in updates:
            assert sum(map(len, update)) == size and all(update)
            assert (
                sum(len(batch) * lengths[batch].max() * per_item for batch in update)
                <= accumulation * budget
            )
            of_update = lengths[[i for batch in update for i in batch]]
            for longest in range(1, 13):
                share = size * (lengths <= longest).sum() / len(lengths)
                assert (
                    math.floor(share + 1e-9)
                    <= (of_update <= longest).sum()
                    <= math.ceil(share - 1e-9)
                )
        epochs.append([list(map(len, update)) for update in updates])
    assert len({tuple(sizes) for updates in epochs for sizes in updates}) == 1


@given(st.lists(st.integers(1, 9), min_size=4, max_size=40), st.integers(1, 4), st.integers(9, 30))
def test_no_other_cut_of_an_update_has_less_padding(lengths, accumulation, budget):
    lengths = np.array(lengths)
    batches = StratifiedBatches(lengths, 1, budget, 0, accumulation)
    # The longest that each of an update's windows can be, in order of length, whatever the epoch
    # leaves out
    width = [
        min(n for n in lengths if batches.size * (lengths <= n).sum() // len(lengths) > i)
        for i in range(batches.size)
    ]
    cuts = itertools.combinations(range(1, batches.size), accumulation - 1)
    best = min(
        sum(
            (end - begin) * width[end - 1]
            for begin, end in itertools.pairwise((0, *cut, batches.size))
        )
        for cut in cuts
    )
    assert (
        sum((end - begin) * width[end - 1] for begin, end in itertools.pairwise(batches.cuts))
        == best
    )
    for epoch in range(3):
        for update in epoch_of(batches, epoch):
            ends = np.concatenate([[0], np.cumsum(sorted(map(len, update)))])
            assert sorted(np.diff(ends)) == sorted(np.diff(batches.cuts))
            assert sum(len(batch) * lengths[batch].max() for batch in update) <= best


def test_every_window_is_left_out_equally_often_and_meets_others():
    lengths = np.random.default_rng(0).geometric(0.3, 200)
    batches = StratifiedBatches(lengths, 1, 40, 0, 5)
    seen = np.zeros(200, int)
    beside = np.zeros(200, int)
    epochs = 2000
    for epoch in range(epochs):
        for update in epoch_of(batches, epoch):
            update = np.concatenate(update)
            seen[update] += 1
            beside[update] += 0 in update
    share = batches.size * (200 // batches.size) / 200
    assert 0.7 < share < 0.95
    assert abs(seen / epochs - share).max() < 4.5 * np.sqrt(share * (1 - share) / epochs)
    for length in np.unique(lengths):
        assert seen[lengths == length].mean() / epochs == pytest.approx(share, abs=0.02)
    assert (beside > 0).all()


def real_share(lengths, per_item, batch_tokens, accumulation):
    updates = epoch_of(StratifiedBatches(lengths, per_item, batch_tokens, 0, accumulation))
    drawn = [batch for update in updates for batch in update]
    # Shapes come back
    assert len({(len(batch), lengths[batch].max()) for batch in drawn}) <= 2 * accumulation
    slots = [
        sum(len(batch) * lengths[batch].max() * per_item for batch in update) for update in updates
    ]
    assert (
        0.9 * accumulation * batch_tokens
        < np.mean(slots)
        <= max(slots)
        <= accumulation * batch_tokens
    )
    return sum(lengths[batch].sum() for batch in drawn) * per_item / sum(slots)


@pytest.mark.parametrize("batch_tokens", [256, 2048])
def test_with_16_batches_an_update_at_least_95_percent_of_the_slots_are_real(batch_tokens):
    rng = np.random.default_rng(0)  # as Beauty: from 5 on, mean 8.9, a long tail
    sizes = np.minimum(5 + rng.geometric(1 / 4.9, 4000) - 1, 200)
    train = [rng.integers(1, N_ITEMS, size - 2) for size in sizes]
    assert real_share(Windows(train, 30).lengths, 5, batch_tokens, 16) >= 0.95


@needs_shared
def test_at_least_95_percent_of_the_slots_are_real_on_beauty():
    with gzip.open(SHARED / "amazon-beauty" / "sequences.txt.gz", "rt") as lines:
        histories = [np.array(line.split()[1:], np.int64) for line in lines]
    windows = Windows(leave_one_out(histories).train, 30)
    assert len(windows) == sum(len(h) - 3 for h in histories)
    assert real_share(windows.lengths, 5, 1024, 16) >= 0.95


def test_fixed_slots_hold_the_same_windows_and_only_more_padding():
    windows = Windows([np.arange(1, n) for n in (4, 9, 7, 12, 20)], 8)
    options = {"separators": True, "max_items": 8, "map_config": MapConfig()}
    plain = Collator(windows, TABLE, **options)
    fixed = Collator(windows, TABLE, fixed_slots=True, **options)
    widths = set()
    for batch in LengthBatches(windows.lengths, 4, 64):
        a = plain(batch)
        b = fixed(batch)
        width = a["input_ids"].shape[1]
        widths.add(width)
        assert b["input_ids"].shape[1] == 32
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(a[name], b[name][:, :width]) and (b[name][:, width:] == 0).all()
        for name in ("labels", "map_labels"):
            assert torch.equal(a[name], b[name])
    assert len(widths) > 2


def test_separators_follow_their_items_and_padding_has_none():
    items = np.array([[3, 1], [2, 0]])
    three, one, two = (TABLE.item_tokens[i].tolist() for i in (3, 1, 2))
    assert history_tokens(items, TABLE).tolist() == [
        [*three, SEP, *one, SEP],
        [*two, SEP, 0, 0, 0, 0],
    ]
    assert history_tokens(items, TABLE, separators=False).tolist() == [
        [*three, *one],
        [*two, 0, 0, 0],
    ]


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=7), min_size=1, max_size=4),
    st.integers(1, 5),
    st.booleans(),
)
def test_pad_histories_keeps_the_last_items(histories, max_items, fixed):
    padded = pad_histories(histories, max_items, 9, slots=max_items if fixed else None)
    width = max_items if fixed else max(len(h[-max_items:]) for h in histories)
    assert padded.tolist() == [
        h[-max_items:] + [0] * (width - len(h[-max_items:])) for h in histories
    ]


@pytest.mark.parametrize(
    "levels, expected", [(3, [1, 2, 3]), (4, [1, 2, 3, 0]), (2, [1, 5]), (1, [6])]
)  # levels beyond the planted hold 0, missing ones add up
@pytest.mark.parametrize("separators", [False, True])
def test_truth_is_laid_out_as_the_tokens_are(levels, expected, separators):
    values = np.zeros((2, 2, 3))
    values[0] = [[1, 2, 3], [10, 20, 30]]
    values[1, 0] = [1, 2, 3]
    row = expected + [0] * separators
    zeros = [0] * len(row)
    found = truth_tokens(values, levels, separators, (2, 3 * len(row)))
    assert (
        found.tolist() == [row + [10 * x for x in row] + zeros, row + zeros + zeros]
        and found.dtype == torch.float32
    )


def test_collated_truth_is_that_of_the_window_alone():
    catalogue = planted_catalogue(4, shortest=6, longest=9)
    tree = catalogue.truth.tree
    table = SidTable(tree, tuple((tree.max(axis=0) + 1).tolist()))
    windows = Windows(leave_one_out(catalogue.histories).train, 3)
    collate = Collator(
        windows, table, separators=True, max_items=3, fixed_slots=True, truth=catalogue.truth
    )
    batch = collate(list(range(len(windows))))
    assert batch["truth"].shape == batch["input_ids"].shape
    for row, begin, end in zip(batch["truth"], windows.start, windows.target):
        nats = catalogue.truth.information([windows.items[begin:end]])[0]  # [M, 3]
        expected = torch.zeros(3, 4)
        expected[: end - begin, :3] = torch.from_numpy(nats)
        torch.testing.assert_close(row, expected.flatten())
    assert (batch["truth"] > 0).any()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Windows([np.array([1, 2])], 0), "max_items must be at least 1, got 0"),
        (lambda: Windows([np.array([1, 2])], 2.5), "max_items must be an integer, got 2.5"),
        (
            lambda: leave_one_out([[1, 2, 3], [1.9, 2.9, 3.9]]),
            r"histories\[1\] must be .* integer item ids .* float64",
        ),
        (lambda: pad_histories([["1"]], 3, 9), "integer item ids .* dtype <U1"),
        (
            lambda: LengthBatches(np.array([2, 6]), 4, 23),
            "batch_tokens=23 is less than one window's 24",
        ),
        (
            lambda: StratifiedBatches(np.array([2, 6]), 4, 23),
            "batch_tokens=23 is less .* use 24, the tokens of the longest",
        ),
        (
            lambda: StratifiedBatches(np.array([2, 6]), 4, 15, accumulation=2),
            "batch_tokens=15 is less .* use 24",
        ),
        (lambda: pad_histories([[1], []], 3, 9), r"item ids in 1..9 and at least one, got \[\]"),
        (lambda: pad_histories([[1, 0]], 3, 9), r"got \[1, 0\]"),
        (lambda: pad_histories([[10]], 3, 9), r"got \[10\]"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_mixed_batches_are_as_many_of_as_many_windows_without_regard_to_length():
    lengths = np.random.default_rng(0).integers(1, 12, 500)
    sorted_ones, mixed = (
        LengthBatches(lengths, 4, 200, seed=1, mixed=mixed) for mixed in (False, True)
    )
    one = list(sorted_ones)
    other = list(mixed)
    assert [len(batch) for batch in one] == [len(batch) for batch in other]
    assert sorted(i for batch in other for i in batch) == list(range(500))
    spread = [np.mean([np.ptp(lengths[batch]) for batch in batches]) for batches in (one, other)]
    assert spread[0] < 0.5 and spread[1] > 5


def test_mixed_updates_are_as_many_of_as_many_windows_without_regard_to_length():
    lengths = np.random.default_rng(0).integers(1, 12, 500)
    one, other = (
        epoch_of(StratifiedBatches(lengths, 4, 200, 1, 4, mixed=mixed)) for mixed in (False, True)
    )
    assert [list(map(len, update)) for update in one] == [
        list(map(len, update)) for update in other
    ]
    drawn = [i for update in other for batch in update for i in batch]
    assert len(set(drawn)) == len(drawn)
    spread = [
        np.mean([np.ptp(lengths[batch]) for update in updates for batch in update])
        for updates in (one, other)
    ]
    assert spread[0] < 3 and spread[1] > 7


@pytest.mark.parametrize("accumulation", (1, 3, 7))
def test_an_epoch_is_whole_updates(accumulation):
    lengths = np.random.default_rng(0).integers(1, 12, 500)
    every = LengthBatches(lengths, 4, 200)
    whole = LengthBatches(lengths, 4, 200, accumulation=accumulation)
    assert len(whole) == len(list(whole)) == len(every) - len(every) % accumulation
    assert all(batch in list(every) for batch in whole)
    assert len(LengthBatches(lengths, 4, 200, accumulation=10**6)) == len(every)
