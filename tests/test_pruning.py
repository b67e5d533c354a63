"""The pruning layer against a plain Python oracle, over random shapes, masks and ties."""

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidlab.pruning import PruningConfig, TokenPruner, kept_count, pool_tokens, reference_choice


@st.composite
def rows(draw):
    """A batch: items of `per` tokens, padded on a random side, scores from a small set so that ties
    are common.
    """
    b = draw(st.integers(1, 4))
    items = draw(st.integers(1, 5))
    per = draw(st.integers(1, 4))
    n = items * per
    left = draw(st.booleans())
    mask = []
    index = []
    score = []
    protect = []
    for _ in range(b):
        own = draw(st.integers(0, items))
        real = [1] * (own * per) + [0] * (n - own * per)
        place = [i // per for i in range(own * per)] + [0] * (n - own * per)
        if left:
            real = real[::-1]
            place = [0] * (n - own * per) + [i // per for i in range(own * per)]
        mask.append(real)
        index.append(place)
        score.append(
            draw(
                st.lists(st.sampled_from([0.0, 0.5, 1.0, -1.0, -math.inf]), min_size=n, max_size=n)
            )
        )
        protect.append(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    return (torch.tensor(mask), torch.tensor(score), torch.tensor(index), torch.tensor(protect))


def _count(n, keep):
    return max(1, math.ceil(keep * n - 1e-6)) if n else 0


def _oracle(mask, score, keep, unit, index, protect):
    """Which positions each row keeps, by sorting Python lists."""
    out = []
    for real, s, item, safe in zip(mask.tolist(), score.tolist(), index.tolist(), protect.tolist()):
        valid = [i for i, r in enumerate(real) if r]
        safe = {i for i in valid if safe[i]}
        if unit == "token":
            free = sorted((i for i in valid if i not in safe), key=lambda i: (-s[i], i))
            kept = set(free[: _count(len(valid), keep)])
        else:
            totals = {}
            for i in valid:
                totals[item[i]] = totals.get(item[i], 0.0) + (
                    0.0 if i in safe else max(s[i], -1e30)
                )
            best = sorted(totals, key=lambda j: (-totals[j], j))[: _count(len(totals), keep)]
            kept = {i for i in valid if item[i] in best}
        out.append(sorted(kept | safe))
    return out


@given(
    rows(),
    st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0]),
    st.sampled_from(["token", "item"]),
    st.booleans(),
)
def test_keeps_exactly_what_the_oracle_keeps(batch, keep, unit, with_protect):
    mask, score, index, protect = batch
    score = score.clamp_min(-1e30) if unit == "item" else score  # sums of −inf are not ordered
    if not with_protect:
        protect = torch.zeros_like(protect)
    hidden = torch.randn(*mask.shape, 3)
    pruned = TokenPruner(keep, unit)(
        hidden, mask, score, protect=protect if with_protect else None, item_index=index
    )
    expected = _oracle(mask, score, keep, unit, index, protect)
    for b, positions in enumerate(expected):
        used = pruned.mask[b].bool()
        assert pruned.positions[b][used].tolist() == positions
        assert used.tolist() == [True] * len(positions) + [False] * (len(used) - len(positions))
        assert torch.equal(pruned.hidden[b][used], hidden[b, positions])
    assert (pruned.positions[pruned.mask == 0] == 0).all()
    assert torch.equal(pruned.importance, score)


@given(st.integers(1, 200), st.floats(0.01, 1.0))
def test_slots_come_from_the_shape_in_token_mode(n, keep):
    pruned = TokenPruner(keep)(torch.zeros(2, n, 1), torch.ones(2, n), torch.rand(2, n))
    assert pruned.hidden.shape[1] == pruned.mask.sum(1).max() == max(1, math.ceil(keep * n - 1e-6))


@pytest.mark.parametrize(
    "n, keep, expected",
    [(30, 1 / 3, 10), (31, 1 / 3, 11), (1, 0.01, 1), (0, 0.5, 0), (7, 1.0, 7), (10, 0.3, 3)],
)
def test_kept_count(n, keep, expected):
    assert kept_count(torch.tensor([n]), keep).item() == expected


def test_a_share_of_any_number_type_is_written_as_json():
    assert PruningConfig(keep=Fraction(1, 3)) == PruningConfig(keep=1 / 3)
    assert json.loads(json.dumps(PruningConfig(keep=Fraction(1, 2)).to_dict()))["keep"] == 0.5


@pytest.mark.parametrize("unit", ["token", "item"])
def test_too_few_slots_are_refused(unit):
    """Half of 8 tokens are 4, and so are half of 4 items of 2 tokens."""
    hidden = torch.randn(2, 8, 4)
    mask = torch.ones(2, 8, dtype=torch.long)
    item_index = torch.arange(8).repeat(2, 1) // 2
    pruner = TokenPruner(0.5, unit)
    needed = 4
    arguments = {"item_index": item_index} if unit == "item" else {}
    importance = torch.rand(2, 8)
    assert pruner(hidden, mask, importance, slots=needed, **arguments).mask.sum() == 2 * needed
    with pytest.raises(
        ValueError,
        match=f"slots={needed - 1} would drop tokens that are kept; give at least {needed}",
    ):
        pruner(hidden, mask, importance, slots=needed - 1, **arguments)


def test_equal_scores_keep_the_lowest_positions():
    assert TokenPruner(0.5)(
        torch.zeros(1, 6, 1), torch.ones(1, 6), torch.ones(1, 6)
    ).positions.tolist() == [[0, 1, 2]]


def test_gradients_flow_through_kept_tokens_only():
    hidden = torch.randn(1, 4, 2, requires_grad=True)
    TokenPruner(0.5)(
        hidden, torch.ones(1, 4), torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    ).hidden.sum().backward()
    assert hidden.grad[0, :, 0].tolist() == [0, 1, 0, 1]


def prune(unit="token", **arguments):
    return TokenPruner(0.5, unit)(
        torch.zeros(1, 4, 1), torch.ones(1, 4), torch.ones(1, 4), **arguments
    )


@pytest.mark.parametrize("unit", ["token", "item"])
def test_of_no_rows_nothing_is_kept(unit):
    none = torch.zeros(0, 4)
    pruned = TokenPruner(0.5, unit)(torch.zeros(0, 4, 3), none, none, item_index=none.long())
    assert (
        pruned.hidden.shape[::2] == (0, 3)
        and pruned.mask.shape == pruned.positions.shape == pruned.hidden.shape[:2]
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TokenPruner(0), r"keep .* \(0, 1\], got 0"),
        (lambda: TokenPruner(1.5), "got 1.5"),
        (lambda: TokenPruner(0.5, "word"), "unit='word' is unknown; use one of 'token', 'item'"),
        (lambda: PruningConfig(scorer="l1"), "scorer='l1' is unknown; use one of 'rastp'"),
        (lambda: PruningConfig(after_layer=0), "after_layer must be at least 1, got 0"),
        (
            lambda: PruningConfig(mode="published"),
            "mode='published' is unknown; use one of 'corrected', 'reference'",
        ),
        (
            lambda: PruningConfig(mode="reference", unit="item"),
            """mode="reference" knows no unit='item'; leave it out""",
        ),
        (
            lambda: PruningConfig(mode="reference", protect_separators=True),
            "knows no protect_separators=True",
        ),
        (lambda: PruningConfig(mode="reference", reduce="pool"), "knows no reduce='pool'"),
        (
            lambda: PruningConfig(reduce="pool", unit="item"),
            """reduce="pool" knows no unit='item'""",
        ),
        (lambda: PruningConfig(reduce="merge"), "reduce='merge' is unknown"),
        (
            lambda: reference_choice(
                torch.zeros(1, 2, 4), torch.ones(1, 2), torch.ones(1, 2), 1 / 3
            ),
            "of 2 slots leaves none",
        ),
        (
            lambda: TokenPruner(0.5, "item")(
                torch.zeros(1, 4, 1), torch.ones(1, 4), torch.ones(1, 4)
            ),
            "needs item_index",
        ),
        (
            lambda: TokenPruner(0.5)(torch.zeros(1, 4, 1), torch.ones(1, 3), torch.ones(1, 4)),
            r"\(1, 4, 1\), \(1, 3\) and \(1, 4\)",
        ),
        (
            lambda: prune(protect=torch.ones(1, 3)),
            r"protect must be \[B, N\] like the mask, \(1, 4\), got \(1, 3\)",
        ),
        (
            lambda: prune("item", item_index=torch.zeros(1, 3).long()),
            r"item_index must be .* got \(1, 3\)",
        ),
        (lambda: prune(slots=-1), "slots must be at least 0, got -1"),
        *(
            (
                lambda cls=cls, mass=mass: cls(mass=mass),
                rf"mass .* in \(0, 1\] .* got mass={mass!r}",
            )
            for cls in (TokenPruner, PruningConfig)
            for mass in (5, -1, math.nan, "1")
        ),
        *(
            (
                lambda cls=cls: cls(unit="item", mass=0.5),
                """needs unit="token", got mass=0.5 and unit='item'""",
            )
            for cls in (TokenPruner, PruningConfig)
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(rows(), st.sampled_from([0.1, 1 / 3, 0.5, 0.8, 1.0]))
def test_pooling_averages_even_bins_of_neighbours(case, keep):
    mask = case[0]
    hidden = torch.randn(*mask.shape, 3, generator=torch.Generator().manual_seed(0))
    pruned = pool_tokens(hidden, mask, keep)
    assert (
        pruned.hidden.shape[1] == max(1, math.ceil(keep * mask.shape[1] - 1e-6))
        and pruned.importance is None
    )
    for b, real in enumerate(mask.bool()):
        slots = real.nonzero().flatten().tolist()
        bins = _count(len(slots), keep)
        members = [
            [s for rank, s in enumerate(slots) if rank * bins // len(slots) == i]
            for i in range(bins)
        ]
        assert pruned.mask[b].tolist() == [1] * bins + [0] * (pruned.mask.shape[1] - bins)
        assert pruned.positions[b, :bins].tolist() == [m[0] for m in members]
        assert not members or max(map(len, members)) - min(map(len, members)) <= 1
        for i, m in enumerate(members):
            torch.testing.assert_close(pruned.hidden[b, i], hidden[b, m].mean(0))
    if keep == 1.0:
        torch.testing.assert_close(pruned.hidden[pruned.mask.bool()], hidden[mask.bool()])


def test_a_token_without_a_number_is_the_first_to_go():
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    importance = torch.tensor([[1.0, torch.nan, 5.0, -torch.inf, torch.nan]])
    for keep, expected in ((0.25, [2]), (0.5, [0, 2]), (0.75, [0, 1, 2])):
        pruned = TokenPruner(keep)(torch.zeros(1, 5, 2), mask, importance)
        assert pruned.positions[pruned.mask.bool()].tolist() == expected
