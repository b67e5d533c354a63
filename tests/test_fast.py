"""The CPU's dropout and attention against plain renderings of both: its distribution by
counting, its gradients by autograd.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_t5 import CLOSE, LABELS, batch, build, gradients
from torch import nn
from torch.autograd.gradcheck import gradcheck

from sidlab.fast import cpu_layers
from sidlab.pruning import PruningConfig

SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=4)
DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float64))
RATES = st.sampled_from((1 / 256, 0.1, 0.15, 0.5, 0.9, 255 / 256))


def bound(n, p):
    """Six standard deviations of a binomial share: one run in a billion lies beyond."""
    return 6 * math.sqrt(p * (1 - p) / n)


@given(SHAPES, DTYPES, RATES, st.integers(0, 9))
def test_an_element_is_zero_or_rescaled_and_so_is_its_gradient(shape, dtype, p, seed):
    x = (torch.rand(shape, dtype=torch.float64) + 1).to(dtype).requires_grad_()
    torch.manual_seed(seed)
    out = cpu_layers.dropout(x, p)
    kept = out != 0
    scaled = x.detach() * (1 / (1 - cpu_layers.realised(p)))
    torch.testing.assert_close(out, torch.where(kept, scaled, 0.0))
    out.sum().backward()
    torch.testing.assert_close(
        x.grad, torch.where(kept, torch.full_like(x, 1 / (1 - cpu_layers.realised(p))), 0.0)
    )
    torch.manual_seed(seed)
    assert torch.equal(cpu_layers.dropout(x, p), out), "the seed repeats it"
    torch.manual_seed(seed)
    shifted = x.detach() - 1.5
    assert torch.equal(cpu_layers.relu_dropout(shifted, p) != 0, kept & (shifted > 0)), (
        "the same draw behind a ReLU"
    )


@pytest.mark.parametrize("p", [0.02, 0.15, 0.5])
def test_every_byte_of_a_word_drops_at_the_realised_rate(p):
    torch.manual_seed(0)
    zero = cpu_layers.dropout(torch.ones(1_000_000, 8), p) == 0
    assert abs(cpu_layers.realised(p) - p) <= 1 / 512
    assert (zero.double().mean(0) - cpu_layers.realised(p)).abs().max() < bound(
        1_000_000, cpu_layers.realised(p)
    )


def test_the_mean_stays_and_neighbours_are_independent():
    torch.manual_seed(1)
    q = cpu_layers.realised(0.15)
    n = 4_000_000
    out = cpu_layers.dropout(torch.ones(n), 0.15)
    assert abs(out.double().mean() - 1) < bound(n, q) / (1 - q)
    zero = (out == 0).double() - q
    for lag in (1, 2, 3, 7, 8, 9, 64, 312, 624):  # 312 words are the generator's state
        correlation = (zero[lag:] * zero[:-lag]).mean() / (q * (1 - q))
        assert abs(correlation) < 6 / math.sqrt(n), lag
    again = (cpu_layers.dropout(torch.ones(n), 0.15) == 0).double() - q
    assert abs((zero * again).mean() / (q * (1 - q))) < 6 / math.sqrt(n)
    counts = torch.bincount((out.view(-1, 8) == 0).sum(1), minlength=9).double() / (n // 8)
    binomial = torch.tensor(
        [math.comb(8, k) * q**k * (1 - q) ** (8 - k) for k in range(9)], dtype=torch.float64
    )
    assert ((counts - binomial).abs() <= 6 * (binomial * (1 - binomial) / (n // 8)).sqrt()).all()


@pytest.mark.parametrize("function", [cpu_layers.dropout, cpu_layers.relu_dropout])
def test_gradients_are_those_of_finite_differences(function):
    def drawn(x):
        torch.manual_seed(3)
        return function(x, 0.3)

    x = torch.randn(5, 7, dtype=torch.float64)
    x = torch.where(x.abs() < 0.1, 0.5, x).requires_grad_()  # no kink within the step
    assert gradcheck(drawn, x)
    assert gradcheck(lambda y: drawn(y.transpose(0, 1)), x), "not contiguous"


@pytest.mark.parametrize("p", [0.0, 1.0, 0.001, 0.9995])
def test_rates_that_no_byte_can_hold_are_pytorchs_own(p):
    x = torch.randn(1000, requires_grad=True)
    for ours, theirs in (
        (cpu_layers.dropout, F.dropout),
        (cpu_layers.relu_dropout, lambda x, p: F.dropout(F.relu(x), p)),
    ):
        found = []
        for function in (ours, theirs):
            torch.manual_seed(5)
            out = function(x, p)
            found.append((out, *torch.autograd.grad(out.sum(), x)))
        for one, other in zip(*found):
            torch.testing.assert_close(one, other)
    assert torch.equal(cpu_layers.dropout(x, 0.5, training=False), x)
    assert torch.equal(cpu_layers.relu_dropout(x, 0.5, training=False), F.relu(x))
    with pytest.raises(ValueError, match="between 0 and 1"):
        cpu_layers.dropout(x, 1.5)


# --- Inside the model


@pytest.mark.parametrize(
    "pruning",
    [
        None,
        PruningConfig(),
        PruningConfig(positions="none"),
        PruningConfig(after_layer=1, unit="item"),
    ],
)
@pytest.mark.parametrize("hidden", [1, 2])
def test_the_written_out_path_is_the_librarys(monkeypatch, pruning, hidden):
    """With the noise held at 1, training with dropout is the library's attention and feed-forward
    without it.
    """
    inputs = batch(extra=3) | {"labels": LABELS}
    model = build(pruning, dropout=0.25, ffn_hidden_layers=hidden).train()
    ones = torch.ones
    monkeypatch.setattr(cpu_layers, "_kept", lambda x, p: ones(x.shape, dtype=torch.uint8))
    monkeypatch.setattr(cpu_layers, "realised", lambda p: 0.0 if p == 0.25 else 1.0)
    monkeypatch.setattr(cpu_layers, "_by_byte", lambda x, p: True)
    plain = build(pruning, dropout=0.0, ffn_hidden_layers=hidden).train()
    torch.testing.assert_close(model(**inputs).loss, plain(**inputs).loss, **CLOSE)
    ours = gradients(model, inputs)
    theirs = gradients(plain, inputs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **CLOSE)


def test_the_decoder_sees_no_later_token_while_dropout_is_on():
    model = build(dropout=0.2).train()
    inputs = batch()
    hidden = []
    for ids in (torch.tensor([[1, 4, 10]] * 4), torch.tensor([[1, 4, 12]] * 4)):
        torch.manual_seed(0)
        hidden.append(
            model(**inputs, decoder_input_ids=ids, output_hidden_states=True).decoder_hidden_states[
                -1
            ]
        )
    torch.testing.assert_close(hidden[0][:, :2], hidden[1][:, :2])
    assert (hidden[0][:, 2] - hidden[1][:, 2]).abs().max() > 1e-3


def test_the_published_mode_keeps_pytorchs_own():
    reference = build(PruningConfig(mode="reference"), dropout=0.2)
    corrected = build(PruningConfig(), dropout=0.2)
    kinds = [
        {type(m) for m in model.modules() if isinstance(m, nn.Dropout)}
        for model in (reference, corrected)
    ]
    assert kinds == [{nn.Dropout}, {cpu_layers.Dropout}]
    assert {
        m.config._attn_implementation
        for m in reference.modules()
        if hasattr(m, "relative_attention_num_buckets")
    } == {"eager", "sidlab_scored"}


def test_dropout_of_the_model_repeats_with_the_seed_and_differs_without():
    model = build(PruningConfig(), dropout=0.2).train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(**batch(), labels=LABELS).loss.item())
    assert losses[0] == losses[1] != losses[2]
