"""mode="reference" repeats the published code: against a plain rendering of it on the library's T5,
and effect by effect.
"""

import pytest
import torch
from test_t5 import CLOSE, LABELS, SIZES, batch, build, library_model

from sidlab import TrainConfig
from sidlab.decoding import encode_histories, recommend
from sidlab.pruning import PruningConfig

SLOTS = 32  # max_items 8 × (3 codes + a separator)
KEPT = 10  # of 32 slots a third, rounded down
REFERENCE = PruningConfig(mode="reference")
CORRECTED = PruningConfig()
LENGTHS = torch.tensor([32, 12, 4, 24])  # of HISTORIES, in tokens


def published_encoder(model, input_ids, mask, after_layer=2, keep=1 / 3):
    """RASTP's encoder as published, written down plainly around the library's own blocks."""
    stack = library_model(model, attn_implementation="eager").encoder
    hidden = stack.embed_tokens(input_ids)
    additive = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
    bias = None
    for number, block in enumerate(stack.block, start=1):
        attention = block.layer[0].SelfAttention
        b, n, _ = hidden.shape
        if number == 1:
            bias = attention.compute_bias(n, n)
        elif number == after_layer + 1:
            bias = torch.zeros(1, SIZES["num_heads"], n, n)  # no block but the first owns one
        normed = block.layer[0].layer_norm(hidden)
        q, k, v = (
            f(normed).view(b, n, -1, SIZES["d_kv"]).transpose(1, 2)
            for f in (attention.q, attention.k, attention.v)
        )
        weights = torch.softmax(q @ k.mT + bias + additive[..., :n], dim=-1)
        hidden = hidden + attention.o((weights @ v).transpose(1, 2).reshape(b, n, -1))
        hidden = block.layer[1](hidden)
        if number == after_layer:
            importance = weights.sum(dim=(1, 2)) * hidden.abs().sum(-1)
            chosen = importance.topk(int(n * keep), dim=1).indices.sort(dim=1).values
            hidden = hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1]))
    return stack.final_layer_norm(hidden), chosen


@pytest.mark.parametrize("after_layer", [1, 2, 3])
def test_it_is_the_published_encoder(after_layer):
    model = build(PruningConfig(mode="reference", after_layer=after_layer))
    inputs = batch()
    expected, chosen = published_encoder(
        model, inputs["input_ids"], inputs["attention_mask"], after_layer
    )
    found = model.encoder(**inputs)
    real = found.attention_mask.bool()
    assert real.any(1).all() and torch.equal(found.positions[real], chosen[real])
    torch.testing.assert_close(found.last_hidden_state[real], expected[real], **CLOSE)


def test_1_it_keeps_a_share_of_the_padded_length():
    kept = build(REFERENCE).encoder(**batch()).attention_mask.sum(1)
    # Four tokens of a short history: none is pruned
    assert kept.tolist() == LENGTHS.clamp_max(KEPT).tolist()
    corrected = build(CORRECTED).encoder(**batch()).attention_mask.sum(1)
    assert corrected.tolist() == [11, 4, 2, 8]


def test_2_no_position_bias_behind_the_pruner():
    biases = {}
    for name, config in (("reference", REFERENCE), ("corrected", CORRECTED)):
        model = build(config, position_init=4.0)
        model.encoder.block[2].register_forward_pre_hook(
            lambda module, args, name=name: biases.update({name: args[2]})
        )
        model.encoder(**batch())
    assert not biases["reference"].any() and biases["corrected"].any()


def test_3_the_mask_of_the_first_slots_is_wrong_with_padding_on_the_left():
    def spread(config):
        model = build(config)
        right, left = (
            model(**batch(side=side), labels=LABELS).logits for side in ("right", "left")
        )
        return (right - left)[right.isfinite()].abs().max()

    assert spread(CORRECTED) < 1e-4 and spread(REFERENCE) > 0.01
    encoded = build(REFERENCE).encoder(**batch(side="left"))
    assert torch.equal(encoded.attention_mask, batch(side="left")["attention_mask"][:, :KEPT])


def test_4_padded_queries_vote():
    heads = SIZES["num_heads"]
    reference, corrected = (
        build(c).encoder(**batch()).centrality.sum(1) for c in (REFERENCE, CORRECTED)
    )
    torch.testing.assert_close(reference, torch.full((4,), float(heads * SLOTS)))
    torch.testing.assert_close(corrected, heads * LENGTHS.float())


def test_5_dropout_shakes_the_scores():
    def mass(config):
        model = build(config, dropout=0.3).train()
        return model.encoder(**batch()).centrality.sum(1)

    # Every query gives away 1
    torch.testing.assert_close(mass(CORRECTED), SIZES["num_heads"] * LENGTHS.float())
    assert (mass(REFERENCE) - SIZES["num_heads"] * SLOTS).abs().max() > 0.1


def test_6_separators_compete_and_items_are_split():
    separator = torch.arange(SLOTS) % 4 == 3
    encoded = build(REFERENCE).encoder(**batch())
    assert separator[encoded.positions[0]].sum() < 8  # not all of the eight
    safe = build(PruningConfig(protect_separators=True)).encoder(**batch())
    assert separator[safe.positions[0][safe.attention_mask[0] == 1]].sum() == 8


def test_7_no_attention_is_fused(monkeypatch):
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: calls.append(1) or fused(*a, **k),
    )
    build(REFERENCE)(**batch(), labels=LABELS)
    assert not calls
    build(CORRECTED)(**batch(), labels=LABELS)
    # Every block but the scoring one; self- and cross-attention of the decoder
    assert len(calls) == 3 + 2 * 2


def test_it_asks_for_the_published_padding(tmp_path):
    with pytest.raises(
        ValueError,
        match=r'mode="reference" .* to 32 slots \(TrainConfig\(padding="fixed"\)\), got 8',
    ):
        build(REFERENCE).encoder(input_ids=batch()["input_ids"][:, :8])
    with pytest.raises(ValueError, match='needs padding="fixed"'):
        TrainConfig.preset("smoke", pruning=REFERENCE)
    TrainConfig.preset("smoke", pruning=REFERENCE, padding="fixed")
    histories = [[1, 2], [3]]  # recommending pads by itself
    model = build(REFERENCE)
    assert encode_histories(model, histories).last_hidden_state.shape[1] == KEPT
    items, _ = recommend(model, histories, k=3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(recommend(again, histories, k=3)[0], items)
    assert again.encoder.block[0].layer[0].SelfAttention.config._attn_implementation == "eager"


@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_everything_is_pooling_nothing(side):
    inputs = batch(side=side) | {"labels": LABELS}
    pooled = build(PruningConfig(reduce="pool", keep=1.0))
    plain = build()
    torch.testing.assert_close(pooled(**inputs).logits, plain(**inputs).logits, **CLOSE)
    half = build(PruningConfig(reduce="pool", keep=0.5))
    torch.testing.assert_close(
        half(**inputs).logits, half(**batch(), labels=LABELS).logits, **CLOSE
    )
    encoded = half.encoder(**batch())
    assert (
        encoded.attention_mask.sum(1).tolist() == (LENGTHS // 2).tolist()
        and encoded.importance is None
    )
