"""Multi-step auxiliary prediction against its formula, written as loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidlab.map_loss import MapConfig, MapHead, map_labels, map_loss


@given(
    st.data(),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([1.0, 0.5, 0.1]),
)
def test_loss_is_the_weighted_mean_of_the_steps_that_have_labels(data, b, s, levels, decay):
    losses = torch.rand(b, s, levels, dtype=torch.float64) * 5
    present = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=b * s * levels, max_size=b * s * levels))
    )
    labels = torch.where(present.view(b, s, levels), 7, -100)
    top = bottom = 0.0
    for step in range(s):
        values = [
            losses[i, step, l].item()
            for i in range(b)
            for l in range(levels)
            if labels[i, step, l] != -100
        ]
        if values:
            top += decay**step * sum(values) / len(values)
            bottom += decay**step
    losses[labels == -100] = math.nan  # whatever stands there
    losses.requires_grad_()
    loss = map_loss(losses, labels, decay)
    assert loss.item() == pytest.approx(top / bottom if bottom else 0.0)
    loss.backward()
    assert (losses.grad[labels == -100] == 0).all() and (losses.grad[labels != -100] > 0).all()


def test_no_label_gives_zero_with_a_zero_gradient():
    losses = torch.rand(2, 3, 4, requires_grad=True)
    loss = map_loss(losses, torch.full((2, 3, 4), -100))
    loss.backward()
    assert loss.item() == 0 and torch.equal(losses.grad, torch.zeros(2, 3, 4))


@given(
    st.integers(1, 6),
    st.integers(0, 6),
    st.integers(1, 3),
    st.sampled_from([1.0, 0.5]),
    st.integers(0, 999),
)
def test_with_the_counts_of_an_update_the_parts_of_its_batches_are_its_loss(b, cut, s, decay, seed):
    draw = torch.Generator().manual_seed(seed)
    losses = torch.rand(b, s, 4, dtype=torch.float64, generator=draw)
    labels = torch.where(torch.rand(b, s, 4, generator=draw) < 0.4, 7, -100)
    counts = (labels != -100).sum((0, 2))  # [S]
    parts = [
        map_loss(losses[rows], labels[rows], decay, counts)
        for rows in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(sum(parts), map_loss(losses, labels, decay))


@given(st.data(), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
def test_labels_of_either_unit(data, b, s, levels):
    tokens = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(3, 99), min_size=levels, max_size=levels),
                min_size=b,
                max_size=b,
            )
        )
    )
    after = torch.randint(-100, 99, (b, s, levels))
    assert torch.equal(map_labels(tokens, after, MapConfig(steps=s, unit="item")), after)
    found = map_labels(tokens, after, MapConfig(steps=s, unit="token"))
    for i in range(b):
        for step in range(1, s + 1):
            for level in range(levels):
                expected = tokens[i, level + step] if level + step < levels else -100
                assert found[i, step - 1, level] == expected
    assert found.dtype == torch.long and found.shape == (b, s, levels)


def test_head_is_one_projection_for_all_steps():
    torch.manual_seed(0)
    head = MapHead(8, steps=3)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "norm": (8,),
        "step": (3, 8),
        "projection": (8, 8),
    }
    for p in head.parameters():
        torch.nn.init.normal_(p)
    hidden = torch.randn(2, 4, 8)
    found = head(hidden)  # [B, S, L, d]
    assert found.shape == (2, 3, 4, 8)
    for b in range(2):
        for s in range(3):
            for t in range(4):
                h = hidden[b, t]
                normed = h / (h.pow(2).mean() + 1e-6).sqrt() * head.norm
                torch.testing.assert_close(
                    found[b, s, t], h + head.projection @ (normed + head.step[s])
                )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MapConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda: MapConfig(steps=1.5), "steps must be an integer, got 1.5"),
        (lambda: MapConfig(steps="2"), "steps must be an integer, got '2'"),
        (lambda: MapConfig(weight=-0.1), "got -0.1 and 1.0"),
        (lambda: MapConfig(weight=math.nan), "weight must be >= 0 .* got nan and 1.0"),
        (lambda: MapConfig(weight=math.inf), "weight must be >= 0 and finite .* got inf and 1.0"),
        (lambda: MapConfig(decay=0.0), "got 0.3 and 0.0"),
        (lambda: MapConfig(decay=1.5), "got 0.3 and 1.5"),
        (lambda: MapConfig(unit="level"), "unit='level' is unknown; use one of 'item', 'token'"),
        (
            lambda: map_loss(torch.zeros(2, 3), torch.zeros(2, 3)),
            r"must both be \[B, S, L\], got \(2, 3\) and \(2, 3\)",
        ),
        (
            lambda: map_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 2)),
            r"got \(1, 2, 3\) and \(1, 2, 2\)",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
