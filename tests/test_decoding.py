"""Constrained beam search against exact scoring of every item, and against the library's own
search.
"""

import dataclasses
import itertools
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidlab.data.planted import planted_catalogue
from sidlab.decoding import beam_search, encode_histories, items_of_leaves, recommend, score_items
from sidlab.metrics import ndcg_at, recall_at
from sidlab.models.t5 import SidT5, SidT5Config
from sidlab.pruning import PruningConfig
from sidlab.sids.table import SidTable
from sidlab.sids.trie import Trie
from sidlab.training import evaluate
from sidlab.windows import history_tokens, pad_histories

SMALL = {
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 2,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
}
N = 40
# 40 items on 5 × 4 × 3 codes: many prefixes are not valid, and some items share a SID.
CODES = np.random.default_rng(1).integers(0, [5, 4, 3], (N, 3))
HISTORIES = [np.random.default_rng(n).integers(1, N + 1, n) for n in (5, 1, 9, 3, 5)]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def build(table, pruning=None, seed=0, **changes):
    torch.manual_seed(seed)
    fields = {"max_items": 6, "pruning": pruning and dataclasses.asdict(pruning)}
    return SidT5(
        SidT5Config(widths=table.widths, dropout_rate=0.0, **SMALL | fields | changes), table
    ).eval()


@pytest.fixture(scope="module", params=["extend", "share"])
def model(request):
    table = SidTable(CODES, (5, 4, 3), collisions=request.param)
    assert table.report()["largest_group"] > 1
    return build(table, PruningConfig(after_layer=1, keep=0.5))


def assert_ranking(items, scores, exact, k, without=()):
    """The k best of `exact` [n], each once and in order; equal scores (sharers) by id."""
    items = items.tolist()
    scores = scores.tolist()
    allowed = [i for i in range(1, len(exact) + 1) if i not in without]
    best = sorted((exact[i - 1].item() for i in allowed), reverse=True)[:k]
    found = [i for i in items if i]
    assert found == items[: len(found)] and len(found) == len(set(found)) == len(best)
    assert set(found) <= set(allowed)
    np.testing.assert_allclose(scores[: len(found)], best, **CLOSE)
    np.testing.assert_allclose(scores[: len(found)], [exact[i - 1] for i in found], **CLOSE)
    assert scores[len(found) :] == [-np.inf] * (k - len(found))


@pytest.mark.parametrize("k", [1, 7, N, N + 5])
def test_a_wide_beam_equals_exact_scoring(model, k):
    exact = score_items(model, HISTORIES, chunk=7)
    assert exact.shape == (len(HISTORIES), N)
    items, scores = recommend(model, HISTORIES, k=k, beam=N)
    assert items.shape == scores.shape == (len(HISTORIES), k)
    for row in range(len(HISTORIES)):
        assert_ranking(items[row], scores[row], exact[row], k)


def test_exact_scores_are_a_probability_of_each_sid(model):
    # Every code of a level can follow, valid or not, so the valid SIDs together have less than 1.
    mass = score_items(model, HISTORIES).double().exp()
    first = [
        [j for j in range(i) if (model.table.codes[j] == model.table.codes[i]).all()] == []
        for i in range(N)
    ]
    total = mass[:, first].sum(dim=1)
    assert (total > 0).all() and (total < 1).all()
    # By hand, for one history and one item: one decoder step a level, no cache.
    encoded = encode_histories(model, HISTORIES[:1])
    tokens = [1]
    expected = 0.0
    for start, width, token in zip(
        model.table.offsets, model.table.widths, model.table.item_tokens[17].tolist()
    ):
        out = model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([tokens]))
        expected += out.logits[0, -1, start : start + width].log_softmax(-1)[token - start].item()
        tokens.append(token)
    assert score_items(model, HISTORIES)[0, 16].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("beam", [1, 2, 3, 6])
def test_a_narrow_beam_gives_true_scores_and_never_better_ones(model, beam):
    exact = score_items(model, HISTORIES)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "beam=. is too narrow")
        items, scores = recommend(model, HISTORIES, k=6, beam=beam)
    best = exact.sort(dim=1, descending=True).values[:, :6]
    for row in range(len(HISTORIES)):
        found = items[row][items[row] > 0]
        assert len(found) >= min(beam, 6) and len(found) == len(set(found.tolist()))
        torch.testing.assert_close(scores[row, : len(found)], exact[row, found - 1], **CLOSE)
        assert (scores[row] <= best[row] + 1e-5).all() and (
            scores[row].diff().nan_to_num(0) <= 0
        ).all()


def test_exclude_seen_leaves_out_the_whole_history_and_nothing_else(model):
    exact = score_items(model, HISTORIES)
    for beam in (None, N):  # the default makes room for the seen ones
        items, scores = recommend(model, HISTORIES, k=5, exclude_seen=True, beam=beam)
        for row, history in enumerate(HISTORIES):
            assert not set(items[row].tolist()) & set(history.tolist())
            if beam:
                assert_ranking(
                    items[row], scores[row], exact[row], 5, without=set(history.tolist())
                )
            assert (items[row] > 0).all()
    three_left = [np.setdiff1d(np.arange(1, N + 1), [7, 20, 33])]
    assert sorted(recommend(model, three_left, k=5, exclude_seen=True)[0][0].tolist()) == [
        0,
        0,
        7,
        20,
        33,
    ]
    every = [np.arange(1, N + 1)]
    assert (recommend(model, every, k=3, exclude_seen=True, beam=N)[0] == 0).all()


def test_a_beam_too_narrow_for_what_is_excluded_is_told():
    model = build(SidTable(CODES, (5, 4, 3)))
    wide = recommend(model, HISTORIES, k=20)[0]
    # The best ones: a beam of 6 finds no others
    seen = [wide[row, :number].numpy() for row, number in enumerate((6, 1, 0, 0, 3))]
    histories = [np.concatenate([best, HISTORIES[row]]) for row, best in enumerate(seen)]
    with pytest.warns(
        UserWarning, match=r"beam=6 is too narrow for k=6: (\d+) of 5 histories .* give (\d+)"
    ) as told:
        items, _ = recommend(model, histories, k=6, exclude_seen=True, beam=6)
    short, enough = map(
        int, re.search(r": (\d+) of 5 .* give (\d+)", str(told[0].message)).groups()
    )
    assert short == ((items > 0).sum(1) < 6).sum() > 0 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for beam in (enough, None):  # the remedies
            assert (recommend(model, histories, k=6, exclude_seen=True, beam=beam)[0] > 0).all()
        nearly_all = [np.arange(1, N)]  # there is no more, so nothing that a wider beam would find
        assert recommend(model, nearly_all, k=6, exclude_seen=True, beam=N)[0].tolist() == [
            [N, 0, 0, 0, 0, 0]
        ]


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_ranks_of_sharers_are_expectations_over_random_orders(exclude_seen):
    """Against exact scoring of every item: the mean over all orders of those that share a SID."""
    table = SidTable(CODES, (5, 4, 3), collisions="share")
    model = build(table)
    exact = score_items(model, HISTORIES).double().numpy()
    for target in range(1, N + 1):
        ranks = evaluate(
            model, HISTORIES, np.full(len(HISTORIES), target), exclude_seen=exclude_seen, beam=N
        )
        for row, history in enumerate(HISTORIES):
            allowed = [i for i in range(1, N + 1) if not (exclude_seen and i in history)]
            mates = [i for i in allowed if (CODES[i - 1] == CODES[target - 1]).all()]
            recall = ndcg = 0.0
            if target in allowed:
                above = sum(
                    exact[row, i - 1] > exact[row, target - 1] for i in allowed if i not in mates
                )
                drawn = [
                    above + 1 + list(order).index(target) for order in itertools.permutations(mates)
                ]
                recall = np.mean([p <= 10 for p in drawn])
                ndcg = np.mean([(p <= 10) / np.log2(1 + p) for p in drawn])
            assert recall_at(ranks, 10)[row] == pytest.approx(recall) and ndcg_at(ranks, 10)[
                row
            ] == pytest.approx(ndcg)


def test_sharers_follow_one_another_by_id():
    table = SidTable(CODES, (5, 4, 3), collisions="share")
    model = build(table)
    items, scores = recommend(model, HISTORIES, k=N, beam=N)
    for row, score in zip(items, scores):
        groups = [table.codes[i - 1].tolist() for i in row.tolist()]
        changes = sum(a != b for a, b in itertools.pairwise(groups))
        assert changes == len(np.unique(CODES, axis=0)) - 1  # each group once, in one piece
        for i in range(N - 1):
            if groups[i] == groups[i + 1]:
                assert row[i] < row[i + 1] and score[i] == score[i + 1]


@given(st.permutations(range(5)), st.integers(1, 6))
@settings(max_examples=6, derandomize=True)
def test_order_and_batch_size_do_not_matter(order, batch_size):
    model = build(SidTable(CODES, (5, 4, 3)), PruningConfig(after_layer=1))
    items, scores = recommend(model, HISTORIES, k=8)
    again, again_scores = recommend(
        model, [HISTORIES[i] for i in order], k=8, batch_size=batch_size
    )
    assert torch.equal(again, items[list(order)])
    torch.testing.assert_close(again_scores, scores[list(order)], **CLOSE)


def test_company_changes_nothing_where_seen_items_are_left_out():
    codes = np.random.default_rng(1).permutation(
        list(itertools.product(range(30), range(8), range(8)))
    )[:1500]
    table = SidTable(codes, (30, 8, 8))
    for seed in range(3):
        model = build(table, seed=seed, embedding_init=1.0, max_items=8)
        # A wider beam finds what a narrow one leaves behind: later levels decide
        with torch.no_grad():
            model.shared.weight[33:].mul_(2.5), model.shared.weight[3:33].mul_(0.2)
        alone, together = (
            recommend(model, rows, exclude_seen=True)[0][0]
            for rows in ([[5, 6]], [[5, 6], np.arange(1, 41)])
        )
        assert torch.equal(alone, together)


def test_only_the_last_items_count_and_the_rest_may_be_anything_iterable(model):
    long = [np.arange(1, 20)]
    items, scores = recommend(model, long, k=5)
    same, same_scores = recommend(model, [list(range(14, 20))], k=5)
    assert torch.equal(items, same) and torch.equal(scores, same_scores)
    empty, no_scores = recommend(model, [], k=3)
    assert empty.shape == no_scores.shape == (0, 3)


def test_the_model_is_left_as_it_was(model):
    before = torch.random.get_rng_state()
    for training in (True, False):
        model.train(training)
        recommend(model, HISTORIES, k=2)
        exact = score_items(model, HISTORIES)
        with pytest.raises(ValueError, match="item ids"):
            recommend(model, [[1], []])
        assert model.training == training
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(score_items(model.train(), HISTORIES), exact)
    model.eval()


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(0, 6), st.randoms(use_true_random=False))
def test_of_many_that_share_a_sid_the_first_unseen_ones_are_taken(k, seen_count, random):
    codes = np.array([[random.randrange(2), random.randrange(2)] for _ in range(30)])
    trie = SidTable(codes, (2, 2), collisions="share").trie
    leaves = torch.tensor(
        [random.sample(range(trie.n_nodes[-1]), trie.n_nodes[-1]) for _ in range(2)]
    )
    scores = torch.sort(torch.rand(leaves.shape), dim=1, descending=True).values
    scores[1, -1] = -torch.inf
    seen = (
        np.array([[random.randrange(31) for _ in range(seen_count)] for _ in range(2)], np.int64)
        if seen_count
        else None
    )
    items, found = items_of_leaves(trie, leaves, scores, k, seen)
    for row in range(2):
        expected = []
        for leaf, score in zip(leaves[row], scores[row]):
            of_leaf, valid = trie.leaf_items(leaf)
            expected += [
                (item, score)
                for item in of_leaf[valid].tolist()
                if score > -torch.inf and (seen is None or item not in seen[row])
            ]
        expected = (expected + [(0, torch.tensor(-torch.inf))] * k)[:k]
        assert items[row].tolist() == [item for item, _ in expected] and found[row].tolist() == [
            float(score) for _, score in expected
        ]


@pytest.mark.parametrize("pruning", [None, PruningConfig(after_layer=1, unit="item")])
@pytest.mark.parametrize("beam", [1, 4, 9])
def test_beam_search_is_the_librarys_where_every_code_is_valid(pruning, beam):
    # A full trie
    table = SidTable(np.array(list(itertools.product(range(3), range(4), range(2)))), (3, 4, 2))
    model = build(table, pruning, seed=beam)
    histories = [h.clip(max=24) for h in HISTORIES]
    leaves, scores = beam_search(model, encode_histories(model, histories), beam)
    items, _ = table.trie.leaf_items(leaves)
    tokens = history_tokens(pad_histories(histories, 6, 24), table)
    out = model.generate(
        input_ids=tokens,
        attention_mask=(tokens > 0).long(),
        num_beams=beam,
        length_penalty=0.0,
        num_return_sequences=beam,
        output_scores=True,
        return_dict_in_generate=True,
    )
    theirs = out.sequences[:, 1:].view(len(histories), beam, 3)
    assert torch.equal(table.item_tokens[items[..., 0]], theirs)
    if beam > 1:  # greedy search reports no score
        torch.testing.assert_close(scores, out.sequences_scores.view(len(histories), beam), **CLOSE)


@pytest.mark.parametrize("beam", [1, 6, N])
def test_beams_that_share_keys_find_what_beams_with_copies_find(beam):
    table = SidTable(CODES, (5, 4, 3), collisions="share")
    model = build(table, PruningConfig(after_layer=1, keep=0.5))
    shared = beam_search(model, encode_histories(model, HISTORIES), beam)
    model.set_attn_implementation("eager")
    copied = beam_search(model, encode_histories(model, HISTORIES), beam)
    torch.testing.assert_close(shared[1], copied[1], **CLOSE)
    assert torch.equal(shared[0], copied[0])


def test_an_oracle_model_needs_the_truth():
    catalogue = planted_catalogue(4, shortest=5, longest=6)
    tree = catalogue.truth.tree
    model = build(
        SidTable(tree, tuple((tree.max(axis=0) + 1).tolist())),
        PruningConfig(after_layer=1, scorer="oracle"),
    )
    histories = [*catalogue.histories, np.arange(1, 12)]  # one is longer than max_items
    with pytest.raises(ValueError, match="only the planted catalogue knows it"):
        recommend(model, histories)
    items, scores = recommend(model, histories, k=5, beam=400, truth=catalogue.truth)
    exact = score_items(model, histories, truth=catalogue.truth)
    for row in range(len(histories)):
        assert_ranking(items[row], scores[row], exact[row], 5)
    encoded = encode_histories(model, histories[:1], catalogue.truth)
    informative = catalogue.truth.information(histories[:1])[0]
    kept = encoded.positions[0][encoded.attention_mask[0] == 1]
    best = np.sort(np.concatenate([informative, np.zeros((len(informative), 1))], axis=1).ravel())[
        ::-1
    ][: len(kept)]
    np.testing.assert_allclose(np.sort(encoded.importance[0][kept].numpy())[::-1], best, rtol=1e-5)


TABLE = SidTable(CODES, (5, 4, 3))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: recommend(build(TABLE), [[1, 41]]),
            r"item ids in 1..40 and at least one, got \[1, 41\]",
        ),
        (lambda: recommend(build(TABLE), [[1], [0, 2]]), r"got \[0, 2\]"),
        (lambda: recommend(build(TABLE), [[1], []]), r"at least one, got \[\]"),
        (lambda: recommend(build(TABLE), [[1], []], exclude_seen=True), r"at least one, got \[\]"),
        (lambda: recommend(build(TABLE), [[1]], k=0), "k must be at least 1, got 0"),
        (lambda: recommend(build(TABLE), [[1]], k=2.5), "k must be an integer, got 2.5"),
        (lambda: recommend(build(TABLE), [[1]], k="10"), "k must be an integer, got '10'"),
        (lambda: recommend(build(TABLE), [[1]], beam=0), "beam must be at least 1, got 0"),
        (lambda: recommend(build(TABLE), [[1]], beam=2.5), "beam must be an integer, got 2.5"),
        (
            lambda: recommend(build(TABLE), [[1]], batch_size=0),
            "batch_size must be at least 1, got 0",
        ),
        (
            lambda: recommend(build(TABLE), [[1], [1.9, 2.7]]),
            r"histories\[1\] must be .* integer item ids .* float64",
        ),
        (lambda: score_items(build(TABLE), [[1.9, 2.7]]), "integer item ids .* float64"),
        (
            lambda: recommend(SidT5(SidT5Config(widths=(5, 4, 3), **SMALL)), [[1]]),
            r"no SidTable.*model.set_table\(table\)",
        ),
        (lambda: score_items(build(TABLE), [[41]]), r"got \[41\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_the_trie_is_moved_once(model, monkeypatch):
    moved = []
    monkeypatch.setattr(Trie, "to", lambda self, device: moved.append(device) or self)
    model.table._tries.clear()
    for _ in range(2):
        recommend(model, [[1], [2], [3]], k=3, batch_size=2)
    assert moved == [torch.device("cpu")]
