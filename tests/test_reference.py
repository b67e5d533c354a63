"""mode="reference" repeats the published code: bit for bit against a rendering of it in plain
PyTorch, and effect by effect.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_t5 import CLOSE, LABELS, SIZES, TABLE, batch, build

from sidlab import TrainConfig
from sidlab.decoding import encode_histories, recommend
from sidlab.pruning import PruningConfig
from sidlab.sids.table import SEP
from sidlab.windows import history_tokens, pad_histories

SLOTS = 32  # max_items 8 × (3 codes + a separator)
KEPT = 10  # of 32 slots a third, rounded down
REFERENCE = PruningConfig(mode="reference")
CORRECTED = PruningConfig()
LENGTHS = torch.tensor([32, 12, 4, 24])  # of HISTORIES, in tokens


# --- The published model, written down from what is known of it, without the kit or the library


class Published:
    """RASTP's T5 in plain PyTorch. `weights`: those of the kit's model, by name; `items`: to which
    histories are padded; `dropout`: of a model in training, 0 in evaluation.
    """

    def __init__(self, weights, *, items, heads, widths, after_layer, dropout=0.0):
        self.weights = weights
        self.items = items
        self.heads = heads
        self.first = torch.tensor([sum(widths[:level]) for level in range(len(widths))])
        self.after_layer = after_layer
        self.dropout = dropout
        # The kit's ids: padding, beginning, separator, then the codes level by level
        self.codes = weights["shared.weight"][3:]
        self.separator = weights["shared.weight"][2]
        self.beginning = weights["shared.weight"][1]

    def drop(self, x):
        return F.dropout(x, self.dropout, training=self.dropout > 0)

    def linear(self, name, x):
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def norm(self, name, x):
        return self.weights[name + ".weight"] * (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        )

    def distances(self, stack, n, both_ways):
        """The bias by distance of the first block, which alone owns one: [1, H, N, N]."""
        away = torch.arange(n)[None, :] - torch.arange(n)[:, None]  # key - query
        bucket = torch.zeros_like(away)
        buckets = 32
        if both_ways:
            buckets = 16
            bucket = bucket + (away > 0) * buckets
            away = away.abs()
        else:
            away = -away.clamp(max=0)
        exact = buckets // 2
        far = exact + (
            torch.log(away.float() / exact) / math.log(128 / exact) * (buckets - exact)
        ).long().clamp(max=buckets - exact - 1)
        bucket = bucket + torch.where(away < exact, away, far)
        table = self.weights[
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ]
        return table[bucket].permute(2, 0, 1)[None]

    def attention(self, name, x, of, bias):
        """`bias` [.., N, M] with the mask in it. Gives what is added, and the weights."""

        def split(states):
            return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query = split(self.linear(name + ".q", x))
        key = split(self.linear(name + ".k", of))
        value = split(self.linear(name + ".v", of))
        weights = self.drop(torch.softmax(query @ key.transpose(2, 3) + bias, dim=-1))
        out = (weights @ value).transpose(1, 2).flatten(2)
        return self.drop(self.linear(name + ".o", out)), weights

    def feed_forward(self, name, x):
        hidden = self.norm(name + ".layer_norm", x)
        hidden = self.linear(name + ".DenseReluDense.wi", hidden).relu()
        hidden = self.linear(name + ".DenseReluDense.hidden.0", hidden).relu()
        out = self.drop(self.linear(name + ".DenseReluDense.wo", self.drop(hidden)))
        return x + self.drop(out)

    def embed(self, sids, side):
        """`sids`: the codes of each history, int64 [n, L]. Codes are shifted by level, then padded
        with 0, which by now is the first level's code 0; a separator follows every item, a padded
        one, too. Returns float [B, N, d] and the mask [B, N].
        """
        rows = []
        masks = []
        levels = len(self.first)
        for codes in sids:
            empty = self.items - len(codes)
            parts = [codes + self.first, torch.zeros(empty, levels, dtype=torch.long)]
            real = [torch.ones(len(codes), levels + 1), torch.zeros(empty, levels + 1)]
            if side == "left":
                parts.reverse()
                real.reverse()
            embedded = self.codes[torch.cat(parts)]  # [items, L, d]
            separators = self.separator.expand(self.items, 1, -1)
            rows.append(torch.cat([embedded, separators], dim=1).flatten(0, 1))
            masks.append(torch.cat(real).flatten())
        return torch.stack(rows), torch.stack(masks)

    def encode(self, hidden, mask):
        n = hidden.shape[1]
        bias = self.distances("encoder", n, both_ways=True) + hidden_from(mask)
        hidden = self.drop(hidden)
        block = 0
        while f"encoder.block.{block}.layer.0.layer_norm.weight" in self.weights:
            name = f"encoder.block.{block}.layer"
            normed = self.norm(name + ".0.layer_norm", hidden)
            added, weights = self.attention(name + ".0.SelfAttention", normed, normed, bias)
            hidden = self.feed_forward(name + ".1", hidden + added)
            block += 1
            if block == self.after_layer:
                importance = weights.sum(1).sum(1) * hidden.abs().sum(-1)
                positions = importance.topk(n // 3, dim=1).indices.sort(dim=1).values
                hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
                bias = hidden_from(mask.gather(1, positions))  # and no distances
        return self.drop(self.norm("encoder.final_layer_norm", hidden)), positions

    def decode(self, memory, mask, target):
        """Logits of the codes of each level: [B, L, tokens], of the target's codes [B, L]."""
        start = self.beginning.expand(len(target), 1, -1)
        hidden = self.drop(torch.cat([start, self.codes[(target + self.first)[:, :-1]]], dim=1))
        n = hidden.shape[1]
        causal = hidden_from(torch.ones(n, n).tril()).transpose(0, 2)  # [1, 1, n, n]
        bias = self.distances("decoder", n, both_ways=False) + causal
        cross = hidden_from(mask[:, : memory.shape[1]])  # cut, not gathered
        block = 0
        while f"decoder.block.{block}.layer.0.layer_norm.weight" in self.weights:
            name = f"decoder.block.{block}.layer"
            normed = self.norm(name + ".0.layer_norm", hidden)
            hidden = hidden + self.attention(name + ".0.SelfAttention", normed, normed, bias)[0]
            normed = self.norm(name + ".1.layer_norm", hidden)
            hidden = hidden + self.attention(name + ".1.EncDecAttention", normed, memory, cross)[0]
            hidden = self.feed_forward(name + ".2", hidden)
            block += 1
        hidden = self.drop(self.norm("decoder.final_layer_norm", hidden))
        return self.linear("lm_head", hidden)


def hidden_from(mask):
    """Added to attention scores: 0 where `mask` [B, M] is 1, else the least float: [B, 1, 1, M]."""
    return torch.where(mask > 0, 0.0, torch.finfo(torch.float32).min)[:, None, None]


def published_case(seed, after_layer, side, dropout=0.0):
    """The kit's model and the published one with the same weights, random histories and targets:
    (the kit's model, its inputs, the published one, its embedded histories and mask, the codes).
    """
    model = build(
        PruningConfig(mode="reference", after_layer=after_layer),
        seed=seed,
        dropout=dropout,
        ffn="published",
        ffn_hidden_layers=2,
        tie_embeddings=False,
        embedding_init=1.0,
        padded_items=9,
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which start at 0
            parameter.data.normal_(generator=generator)
    rng = np.random.default_rng(seed)
    histories = [rng.integers(1, 51, n) for n in (8, 1, 5, *rng.integers(1, 9, 5))]
    target = torch.from_numpy(rng.integers(1, 51, len(histories)))
    tokens = history_tokens(pad_histories(histories, 8, 50, slots=9), TABLE)
    if side == "left":
        tokens = torch.stack([row.roll(int((row == 0).sum())) for row in tokens])
    inputs = {
        "input_ids": tokens,
        "attention_mask": (tokens != 0).long(),
        "labels": TABLE.item_tokens[target],
    }
    published = Published(
        dict(model.named_parameters()) | {"shared.weight": model.shared.weight},
        items=9,
        heads=SIZES["num_heads"],
        widths=TABLE.widths,
        after_layer=after_layer,
        dropout=dropout,
    )
    codes = torch.from_numpy(np.asarray(TABLE.codes))
    embedded, mask = published.embed([codes[torch.from_numpy(h) - 1] for h in histories], side)
    return model, inputs, published, embedded, mask, codes[target - 1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("after_layer", [1, 2, 4])
def test_it_is_the_published_model_bit_for_bit(after_layer, side, seed):
    model, inputs, published, embedded, mask, target = published_case(seed, after_layer, side)
    with torch.no_grad():
        memory, positions = published.encode(embedded, mask)
        logits = published.decode(memory, mask, target)
        found = model.encoder(inputs["input_ids"], inputs["attention_mask"])
        out = model(**inputs)
    assert torch.equal(found.positions, positions) and positions.shape[1] == 12
    assert torch.equal(found.last_hidden_state, memory)
    assert torch.equal(out.encoder_attention_mask, mask[:, :12].long())
    possible = out.logits.isfinite()
    assert possible.sum(-1).tolist() == [list(TABLE.widths)] * len(logits)
    assert torch.equal(out.logits[possible], logits[possible])


@pytest.mark.parametrize("side", ["right", "left"])
def test_it_trains_as_the_published_model_bit_for_bit(side):
    model, inputs, published, embedded, mask, target = published_case(0, 2, side, dropout=0.3)
    torch.manual_seed(1)
    memory, _ = published.encode(embedded, mask)
    logits = published.decode(memory, mask, target)
    weights = list(model.parameters())
    loss = torch.stack(
        [
            F.cross_entropy(logits[:, level, first : first + width], target[:, level])
            for level, (first, width) in enumerate(zip(TABLE.offsets, TABLE.widths))
        ]
    ).mean()
    expected = torch.autograd.grad(loss, weights, allow_unused=True)
    torch.manual_seed(1)
    out = model.train()(**inputs)
    assert torch.equal(out.encoder_last_hidden_state, memory)
    torch.testing.assert_close(out.loss, loss)
    found = torch.autograd.grad(out.loss, weights, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_padding_is_the_first_code_and_the_separator():
    inputs = batch()
    seen = {}
    model = build(REFERENCE)
    model.shared.register_forward_hook(lambda module, args, out: seen.update(read=args[0]))
    model.encoder(**inputs)
    real = inputs["attention_mask"].bool()
    assert torch.equal(seen["read"][real], inputs["input_ids"][real])
    assert seen["read"][2].tolist()[4:] == ([TABLE.offsets[0]] * 3 + [SEP]) * 7


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
