"""The saliency scorer against loops written out by hand."""

import dataclasses

import pytest
import torch

from sidlab.saliency import (
    SCORERS,
    Signals,
    attention_centrality,
    own_source,
    semantic_saliency,
    token_importance,
)


def _signals(seed=0, b=3, n=7, d=5):
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(b, n, dtype=torch.long)
    mask[1, 4:] = 0
    mask[2, :3] = 0
    return Signals(
        hidden=torch.randn(b, n, d, generator=g),
        centrality=torch.rand(b, n, generator=g),
        mask=mask,
        positions=(mask.cumsum(1) - 1).clamp_min(0),
        truth=torch.rand(b, n, generator=g),
        generator=g,
    )


def test_centrality_is_attention_received_from_real_queries_only():
    attention = torch.rand(2, 3, 4, 4).softmax(-1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = torch.zeros(2, 4)
    for b in range(2):
        for h in range(3):
            for query in range(4):
                for key in range(4):
                    if mask[b, query] and mask[b, key]:
                        expected[b, key] += attention[b, h, query, key]
    torch.testing.assert_close(attention_centrality(attention, mask), expected)


def test_centrality_is_float32_under_autocast_and_padded_queries_may_hold_anything():
    attention = torch.rand(2, 3, 40, 40).softmax(-1)
    mask = torch.ones(2, 40).long()
    mask[1, :9] = 0
    expected = attention_centrality(attention, mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_centrality(attention, mask)
        half = attention_centrality(attention.bfloat16(), mask)
    assert torch.equal(found, expected) and half.dtype == torch.float32
    torch.testing.assert_close(half, attention_centrality(attention.bfloat16().float(), mask))
    attention[1, :, :9] = torch.nan
    assert torch.equal(attention_centrality(attention, mask), expected)
    assert attention_centrality(attention, mask, padding_votes=True)[1, 9:].isnan().all()


def test_centrality_of_all_tokens_sums_to_heads_times_queries():
    # Each real query hands out exactly 1 per head if it attends to real tokens only.
    mask = torch.tensor([[1, 1, 1, 0]])
    scores = torch.randn(1, 2, 4, 4).masked_fill(mask[:, None, None] == 0, -torch.inf)
    assert attention_centrality(scores.softmax(-1), mask).sum().item() == pytest.approx(2 * 3)


@pytest.mark.parametrize("p", [1, 2])
def test_saliency_is_the_p_norm(p):
    hidden = torch.randn(2, 3, 4)
    expected = torch.tensor(
        [[sum(abs(x) ** p for x in token) ** (1 / p) for token in row] for row in hidden.tolist()]
    )
    torch.testing.assert_close(semantic_saliency(hidden, p), expected)


def test_rastp_is_the_product_of_its_factors():
    s = _signals()
    expected = (s.centrality * semantic_saliency(s.hidden)).masked_fill(s.mask == 0, -torch.inf)
    torch.testing.assert_close(token_importance(s, "rastp"), expected)


@pytest.mark.parametrize("scorer", [*SCORERS, lambda s: s.centrality.double()])
def test_every_scorer_gives_float32_and_minus_infinity_at_padding(scorer):
    s = _signals()
    importance = token_importance(s, scorer)
    assert importance.dtype == torch.float32
    assert torch.equal(importance == -torch.inf, s.mask == 0)


def test_recent_rises_with_the_position_whatever_the_padding():
    importance = token_importance(_signals(), "recent")
    assert importance[1, :4].tolist() == [0, 1, 2, 3] and importance[2, 3:].tolist() == [0, 1, 2, 3]


def test_random_draws_by_generator_and_alike_for_either_padding():
    def draw(positions):
        s = Signals(
            torch.zeros(1, 4, 2),
            None,
            torch.ones(1, 4),
            positions=positions,
            generator=torch.Generator().manual_seed(5),
        )
        return token_importance(s, "random")

    assert torch.equal(draw(torch.tensor([[0, 1, 2, 3]])), draw(torch.tensor([[0, 1, 2, 3]])))
    assert torch.equal(
        draw(torch.tensor([[0, 1, 2, 3]]))[0, :2], draw(torch.tensor([[0, 0, 0, 1]]))[0, 2:]
    )


def test_random_by_row_seed_is_uniform_and_knows_no_other_row():
    def draw(seeds, n=500):
        rows = len(seeds)
        s = Signals(
            torch.zeros(rows, n, 1),
            None,
            torch.ones(rows, n),
            torch.arange(n).expand(rows, n),
            seed=torch.tensor(seeds),
        )
        return token_importance(s, "random")

    several = draw([3, 4, -5, 2**62])
    assert torch.equal(several[1:2], draw([4]))
    assert 0 <= several.min() and several.max() < 1
    flat = several.flatten().sort().values
    # Kolmogorov–Smirnov, 2,000 draws: p < 1e-4 beyond
    assert (flat - torch.linspace(0, 1, len(flat))).abs().max() < 0.05
    assert torch.corrcoef(several).fill_diagonal_(0).abs().max() < 0.2


@dataclasses.dataclass
class Mix:
    """A scorer with a parameter, which has no hash."""

    weight: float

    def __call__(self, signals):
        return self.weight * signals.centrality


def test_an_own_scorer_has_a_name_and_a_source(tmp_path, monkeypatch):
    text = (
        "from sidlab.saliency import SCORERS\n\n\ndef twice(s):\n    return 2 *"
        " SCORERS['norm'](s)\n"
    )
    (tmp_path / "scorers_of_a_test.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    s = _signals()
    assert torch.equal(
        token_importance(s, "scorers_of_a_test:twice"), 2 * token_importance(s, "norm")
    )
    assert own_source("scorers_of_a_test:twice") == text and own_source("rastp") is None
    assert own_source(_signals).startswith("def _signals") and own_source(len) is None
    assert torch.equal(
        token_importance(s, Mix(0.5)), (0.5 * s.centrality).masked_fill(s.mask == 0, -torch.inf)
    )
    with pytest.raises(ValueError, match="NaN"):
        token_importance(
            dataclasses.replace(s, hidden=s.hidden * float("nan")), "scorers_of_a_test:twice"
        )


@pytest.mark.parametrize(
    "scorer, message",
    [
        ("saliency", "unknown; use one of rastp"),
        (
            "nowhere:score",
            (
                "scorer='nowhere:score': No module named 'nowhere'; the module's file must lie in"
                " this folder"
            ),
        ),
        ("builtins:id", "got int"),
        ("oracle", "only the planted catalogue"),
        (lambda s: s.hidden, r"shape \(3, 7\)"),
        (lambda s: s.centrality * float("nan"), "NaN"),
        (lambda s: 3, "got int"),
    ],
)
def test_bad_scorers_are_named(scorer, message):
    s = _signals()
    s.truth = None
    with pytest.raises(ValueError, match=message):
        token_importance(s, scorer)


def test_scores_carry_no_gradient():
    s = _signals()
    s.hidden.requires_grad_()
    assert not token_importance(s, "rastp").requires_grad
