"""SidT5 against the library's own T5, and against itself where two ways must give the same."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5Config, T5ForConditionalGeneration

from sidlab.decoding import recommend
from sidlab.map_loss import MapConfig, map_loss
from sidlab.models.t5 import SidT5, SidT5Config
from sidlab.pruning import PruningConfig, kept_count
from sidlab.sids.table import SEP, SidTable
from sidlab.windows import history_tokens, pad_histories

WIDTHS = (6, 5, 4)
ALL_CODES = list(itertools.product(*map(range, WIDTHS)))
TABLE = SidTable(np.random.default_rng(0).permutation(ALL_CODES)[:50], WIDTHS)
SIZES = {
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 2,
    "d_ff": 64,
    "num_layers": 4,
    "num_decoder_layers": 2,
}
SMALL = SIZES | {"max_items": 8}
HISTORIES = [np.random.default_rng(n).integers(1, 51, n) for n in (8, 3, 1, 6)]
LABELS = TABLE.item_tokens[[4, 18, 33, 50]]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def build(pruning=None, map_config=None, *, seed=0, dropout=0.0, table=TABLE, **changes):
    torch.manual_seed(seed)
    fields = {
        "pruning": pruning and dataclasses.asdict(pruning),
        "map": map_config and dataclasses.asdict(map_config),
    }
    return SidT5(
        SidT5Config(widths=table.widths, dropout_rate=dropout, **SMALL | fields | changes), table
    ).eval()


def batch(histories=HISTORIES, side="right", extra=0, separators=True):
    """`input_ids` and `attention_mask` of histories, padded on a side, `extra` slots more than
    needed.
    """
    tokens = F.pad(history_tokens(pad_histories(histories, 8, 50), TABLE, separators), (0, extra))
    if side == "left":
        tokens = torch.stack([row.roll(int((row == 0).sum())) for row in tokens])
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}


def off_level():
    """bool [L, V]: True off each position's own codes."""
    off = torch.ones(3, TABLE.vocab_size, dtype=torch.bool)
    for level, (start, width) in enumerate(zip(TABLE.offsets, WIDTHS)):
        off[level, start : start + width] = False
    return off


def library_model(model, **options):
    """The library's T5 with the weights of `model`; its output head is set free from the
    embeddings, as ours is.
    """
    config = T5Config(
        vocab_size=TABLE.vocab_size,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=None,
        decoder_start_token_id=1,
        tie_word_embeddings=False,
        **SIZES,
        **options,
    )
    theirs = T5ForConditionalGeneration(config)
    theirs.lm_head = torch.nn.Linear(32, TABLE.vocab_size, bias=False)
    ours = {k: v for k, v in model.state_dict().items() if k != "encoder.token_level"}
    theirs.load_state_dict(ours, strict=True)
    return theirs.eval()


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- Against the library


def test_without_pruning_it_is_the_librarys_t5():
    model = build()
    inputs = batch() | {"labels": LABELS, "output_hidden_states": True}
    ours = model(**inputs)
    theirs = library_model(model)(**inputs)
    torch.testing.assert_close(
        ours.logits, theirs.logits.masked_fill(off_level(), -torch.inf), **CLOSE
    )
    real = batch()["attention_mask"].bool()
    torch.testing.assert_close(
        ours.encoder_last_hidden_state[real], theirs.encoder_last_hidden_state[real], **CLOSE
    )
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        assert len(getattr(ours, name)) == len(getattr(theirs, name))
    for one, other in zip(ours.decoder_hidden_states, theirs.decoder_hidden_states):
        torch.testing.assert_close(one, other, **CLOSE)
    expected = F.cross_entropy(ours.logits.transpose(1, 2), LABELS)
    torch.testing.assert_close(ours.loss, expected, **CLOSE)
    assert torch.equal(ours.encoder_attention_mask, batch()["attention_mask"])


def test_default_mask_is_what_is_not_padding():
    model = build(PruningConfig())
    inputs = batch()
    with_mask = model(**inputs, labels=LABELS).logits
    torch.testing.assert_close(
        model(input_ids=inputs["input_ids"], labels=LABELS).logits, with_mask, **CLOSE
    )
    embedded = {
        "inputs_embeds": model.shared(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
    }
    torch.testing.assert_close(model(**embedded, labels=LABELS).logits, with_mask, **CLOSE)


@pytest.mark.parametrize("pruning", [None, PruningConfig()])
def test_weights_start_as_the_library_starts_them(pruning):
    size = {"d_model": 64, "d_ff": 96, "d_kv": 16}
    ours = build(pruning, embedding_init=1.0, **size).state_dict()  # T5's own size of embeddings
    theirs = T5ForConditionalGeneration(T5Config(vocab_size=TABLE.vocab_size, **SIZES | size))
    compared = 0
    for name, weight in theirs.state_dict().items():
        assert weight.shape == ours[name].shape
        tolerance = 6 / (2 * weight.numel()) ** 0.5
        torch.testing.assert_close(ours[name].std(), weight.std(), rtol=tolerance, atol=0)
        tolerance = 6 * weight.std().item() / weight.numel() ** 0.5
        torch.testing.assert_close(ours[name].mean(), weight.mean(), rtol=0, atol=tolerance)
        compared += 1
    assert compared == len(ours) - 1  # all but the buffer of levels


def test_the_sizes_of_embeddings_and_position_biases_are_the_configured_ones():
    model = build(embedding_init=0.3, position_init=2.0, d_model=64)
    assert model.shared.weight.std().item() == pytest.approx(0.3, rel=0.15)
    for stack in (model.encoder, model.decoder):
        attention = stack.block[0].layer[0].SelfAttention
        bias = attention.compute_bias(6, 6)[0]  # [H, 6, 6], rows are queries
        for head in range(SIZES["num_heads"]):
            looks_at = bias[head].argmax(-1)[1:].tolist()
            # One token back
            assert (looks_at == [0, 1, 2, 3, 4]) == (head < SIZES["num_heads"] // 2)
            assert (bias[head].max() > 1.5) == (head < SIZES["num_heads"] // 2)
    assert (
        model.lm_head.weight is model.shared.weight
        and model.encoder.embed_tokens.weight is model.shared.weight
    )


def test_a_fresh_model_prefers_no_code_by_much():
    uniform = np.log(WIDTHS).mean()
    for seed in range(3):
        assert abs(build(seed=seed)(**batch(), labels=LABELS).loss.item() - uniform) < 0.7


def test_deep_feed_forward_has_its_extra_layer_and_scale():
    model = build(d_ff=96, ffn_hidden_layers=3)
    plain = build(d_ff=96)
    extra = {k: v for k, v in model.state_dict().items() if k not in plain.state_dict()}
    assert len(extra) == (4 + 2) * 2  # two layers more in each block of encoder and decoder
    for name, weight in extra.items():
        assert "DenseReluDense.hidden" in name and weight.shape == (96, 96)
        assert weight.std().item() == pytest.approx(96**-0.5, rel=0.06)
    feed = model.encoder.block[0].layer[-1].DenseReluDense
    x = torch.randn(3, 32)
    expected = feed.wo(
        (feed.hidden[1].weight @ (feed.hidden[0].weight @ feed.wi(x).relu().T).relu()).relu().T
    )
    torch.testing.assert_close(feed(x), expected, **CLOSE)


# --- Pruning


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("unit", ["token", "item"])
@pytest.mark.parametrize("after_layer", [1, 2, 4])
def test_keeping_all_is_not_pruning(side, unit, after_layer):
    keep_all = build(PruningConfig(after_layer=after_layer, keep=1.0, unit=unit))
    inputs = batch(side=side) | {"labels": LABELS}
    found = keep_all(**inputs)
    expected = build()(**inputs)
    encoded = keep_all.encoder(**batch(side=side))
    assert encoded.positions.shape == inputs["input_ids"].shape  # it did score and gather
    assert torch.equal(encoded.attention_mask.sum(1), inputs["attention_mask"].sum(1))
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    assert_same_gradients(gradients(keep_all, inputs), gradients(build(), inputs))


@given(
    st.lists(st.integers(1, 8), min_size=2, max_size=5),
    st.sampled_from(["rastp", "norm", "centrality", "recent", "random"]),
    st.sampled_from(["token", "item"]),
    st.sampled_from(["original", "compact", "none"]),
    st.booleans(),
    st.sampled_from([0.2, 1 / 3, 0.7]),
    st.integers(0, 9),
)
@settings(max_examples=12, derandomize=True)  # two scores may tie by chance
def test_padding_and_company_change_nothing(sizes, scorer, unit, positions, protect, keep, extra):
    """A row alone, in a batch padded on the right and in one padded on the left: the same choice,
    the same logits.
    """
    histories = [np.random.default_rng(i).integers(1, 51, n) for i, n in enumerate(sizes)]
    model = build(
        PruningConfig(
            scorer=scorer, unit=unit, positions=positions, protect_separators=protect, keep=keep
        )
    )
    labels = TABLE.item_tokens[torch.arange(len(sizes)) + 1]
    right = batch(histories, extra=extra)
    left = batch(histories, "left", extra)
    kept = {}
    for name, inputs in {"right": right, "left": left}.items():
        encoded = model.encoder(**inputs)
        kept[name] = [
            (p[m == 1] - inputs["attention_mask"][b].argmax()).tolist()
            for b, (p, m) in enumerate(zip(encoded.positions, encoded.attention_mask))
        ]
    alone = [model.encoder(**batch([h])) for h in histories]
    assert (
        kept["right"]
        == kept["left"]
        == [a.positions[0][a.attention_mask[0] == 1].tolist() for a in alone]
    )
    logits = model(**right, labels=labels).logits
    torch.testing.assert_close(model(**left, labels=labels).logits, logits, **CLOSE)
    for i, history in enumerate(histories):
        single = model(**batch([history]), labels=labels[i : i + 1]).logits
        torch.testing.assert_close(single, logits[i : i + 1], **CLOSE)


@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_those_of_the_librarys_own_attention(side):
    model = build(PruningConfig(after_layer=2))
    theirs = library_model(model, attn_implementation="eager").encoder
    inputs = batch(side=side)
    seen = theirs(**inputs, output_attentions=True, output_hidden_states=True)
    encoded = model.encoder(**inputs)
    attention = seen.attentions[1]
    real = inputs["attention_mask"].float()
    centrality = torch.einsum("bhqk,bq->bk", attention, real) * real
    saliency = seen.hidden_states[2].abs().sum(-1) * real
    torch.testing.assert_close(encoded.centrality, centrality, **CLOSE)
    torch.testing.assert_close(encoded.saliency, saliency, rtol=1e-5, atol=1e-4)
    expected = (centrality * saliency).masked_fill(real == 0, -torch.inf)
    torch.testing.assert_close(encoded.importance, expected, rtol=1e-5, atol=1e-4)
    for row, positions, mask in zip(expected, encoded.positions, encoded.attention_mask):
        n = int((row > -torch.inf).sum())
        best = row.topk(int(kept_count(torch.tensor(n), 1 / 3))).indices
        assert positions[mask == 1].tolist() == sorted(best.tolist())


def test_scores_are_clean_while_dropout_is_on():
    model = build(PruningConfig(), dropout=0.3).train()
    inputs = batch()
    centrality = model.encoder(**inputs).centrality
    # Of clean attention each real query hands out exactly 1 per head.
    torch.testing.assert_close(centrality.sum(1), 2.0 * inputs["attention_mask"].sum(1), **CLOSE)


@pytest.mark.parametrize("positions", ["original", "compact", "none"])
@pytest.mark.parametrize("after_layer", [1, 2])
def test_position_bias_behind_the_pruner(positions, after_layer):
    model = build(PruningConfig(positions=positions, after_layer=after_layer))
    seen = []
    hook = model.encoder.block[after_layer].register_forward_pre_hook(
        lambda module, args: seen.append(args[2])
    )
    encoded = model.encoder(**batch())
    hook.remove()
    b, slots = encoded.positions.shape
    n = batch()["input_ids"].shape[1]
    full = model.encoder.block[0].layer[0].SelfAttention.compute_bias(n, n)[0]  # [H, N, N]
    found = seen[0].expand(b, -1, -1, -1)
    for i in range(b):
        used = int(encoded.attention_mask[i].sum())
        for q in range(used):
            for k in range(used):
                place = {
                    "original": (encoded.positions[i, q], encoded.positions[i, k]),
                    "compact": (q, k),
                }
                expected = full[:, *place[positions]] if positions in place else torch.zeros(2)
                assert torch.equal(found[i, :, q, k], expected)
    assert slots == -(-n // 3)


def test_original_positions_reach_every_later_layer_and_the_three_ways_differ():
    logits = {
        p: build(PruningConfig(positions=p))(**batch(), labels=LABELS).logits
        for p in ("original", "compact", "none")
    }
    for one, other in itertools.combinations(logits, 2):
        assert (logits[one] - logits[other]).nan_to_num(0).abs().max() > 1e-4
    model = build(PruningConfig())
    seen = []
    for block in model.encoder.block[2:]:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    model.encoder(**batch())
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


def test_separators_are_protected_on_top():
    inputs = batch()
    encoded = build(PruningConfig(protect_separators=True)).encoder(**inputs)
    for ids, positions, mask in zip(inputs["input_ids"], encoded.positions, encoded.attention_mask):
        kept = ids[positions[mask == 1]]
        n = int((ids != 0).sum())
        assert (kept == SEP).sum() == (ids == SEP).sum()
        assert (kept != SEP).sum() == min(
            int(kept_count(torch.tensor(n), 1 / 3)), n - int((ids == SEP).sum())
        )


@pytest.mark.parametrize(
    "way",
    [
        PruningConfig(),
        PruningConfig(unit="item"),
        PruningConfig(protect_separators=True),
        PruningConfig(keep=1, mass=0.5),
        PruningConfig(reduce="pool"),
    ],
)
def test_a_batch_of_nothing_but_padding_comes_through(way):
    inputs = batch() | {"attention_mask": torch.zeros_like(batch()["attention_mask"])}
    out = build(way).encoder(**inputs)
    assert (
        out.attention_mask.shape[1]
        and not out.attention_mask.any()
        and out.last_hidden_state.isfinite().all()
    )


@pytest.mark.parametrize("separators", [True, False])
def test_unit_item_keeps_whole_items(separators):
    inputs = batch(separators=separators)
    encoded = build(PruningConfig(unit="item", keep=0.4), separators=separators).encoder(**inputs)
    per_item = 3 + separators
    for history, positions, mask in zip(HISTORIES, encoded.positions, encoded.attention_mask):
        kept = positions[mask == 1].tolist()
        items = sorted({p // per_item for p in kept})
        assert kept == [i * per_item + j for i in items for j in range(per_item)]
        assert len(items) == int(kept_count(torch.tensor(len(history)), 0.4))


def test_at_inference_off_prunes_in_training_only():
    model = build(PruningConfig(at_inference=False))
    plain = build()
    inputs = batch()
    torch.testing.assert_close(
        model(**inputs, labels=LABELS).logits, plain(**inputs, labels=LABELS).logits, **CLOSE
    )
    assert model.encoder(**inputs).positions is None
    assert model.train().encoder(**inputs).last_hidden_state.shape[1] == -(
        -inputs["input_ids"].shape[1] // 3
    )
    assert build(PruningConfig()).train().encoder(**inputs).positions is not None


@pytest.mark.parametrize("training", [False, True])
def test_labels_never_influence_what_is_kept(training):
    model = build(PruningConfig(), MapConfig()).train(training)
    kept = []
    model.encoder.pruner.register_forward_hook(lambda module, args, pruned: kept.append(pruned))
    for labels in (LABELS, LABELS.flip(0)):
        model(
            **batch(), labels=labels, map_labels=labels.flip(0)[:, None].repeat(1, 2, 1)
        ).loss.backward()
    for one, other in zip(*kept):
        assert torch.equal(one, other)


def test_what_is_pruned_or_masked_has_no_influence():
    model = build(PruningConfig(scorer="recent"))
    inputs = batch()
    encoded = model.encoder(**inputs)
    logits = model(**inputs, labels=LABELS).logits
    kept = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    rows, slots = encoded.attention_mask.bool().nonzero(as_tuple=True)
    kept[rows, encoded.positions[rows, slots]] = True

    def replace(where):
        def hook(module, args, output):
            return (
                torch.where(where.unsqueeze(-1), torch.randn_like(output[0]), output[0]),
                *output[1:],
            )

        handle = model.encoder.block[1].register_forward_hook(hook)  # the state the pruner sees
        changed = model(**inputs, labels=LABELS).logits
        handle.remove()
        return changed

    torch.testing.assert_close(replace(~kept), logits, **CLOSE)
    assert (replace(kept) - logits).nan_to_num(0).abs().max() > 1e-2

    # Nor do the unused slots of the encoder's output, whatever mask the caller still holds.
    unused = encoded.attention_mask == 0
    assert unused.any()
    encoded.last_hidden_state = torch.where(unused.unsqueeze(-1), 100.0, encoded.last_hidden_state)
    again = model(encoder_outputs=encoded, attention_mask=inputs["attention_mask"], labels=LABELS)
    torch.testing.assert_close(again.logits, logits, **CLOSE)
    assert torch.equal(again.encoder_attention_mask, encoded.attention_mask)


def test_eager_attention_gives_the_same_and_shows_every_layer():
    inputs = batch() | {"labels": LABELS}
    model = build(PruningConfig())
    expected = model(**inputs).logits
    model.set_attn_implementation("eager")
    found = model(**inputs, output_attentions=True)
    torch.testing.assert_close(found.logits, expected, **CLOSE)
    n = 32
    k = 11
    assert [tuple(a.shape) for a in found.encoder_attentions] == [(4, 2, n, n)] * 2 + [
        (4, 2, k, k)
    ] * 2
    assert [tuple(a.shape) for a in found.cross_attentions] == [(4, 2, 3, k)] * 2


# --- MAP


def test_map_adds_its_weighted_loss():
    model = build(map_config=MapConfig(steps=2, weight=0.7, decay=0.5))
    after = LABELS.flip(0)
    # [B, S, L]
    labels = torch.stack([after, torch.where(torch.arange(4)[:, None] < 2, after, -100)], dim=1)
    out = model(**batch(), labels=LABELS, map_labels=labels, output_hidden_states=True)
    logits = model.lm_head(model.map_head(out.decoder_hidden_states[-1])).masked_fill(
        off_level(), -torch.inf
    )
    steps = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view(
        labels.shape
    )
    torch.testing.assert_close(out.map_loss, map_loss(steps, labels, 0.5), **CLOSE)
    torch.testing.assert_close(out.loss, out.main_loss + 0.7 * out.map_loss, **CLOSE)
    for wrong in (labels[:, :1], labels[:, :, :2], labels[:3]):
        with pytest.raises(ValueError, match=r"map_labels must be \[4, 2, 3\]"):
            model(**batch(), labels=LABELS, map_labels=wrong)


def test_map_of_the_token_unit_predicts_the_levels_that_follow():
    model = build(map_config=MapConfig(steps=3, unit="token"))
    # [B, S, L]
    labels = torch.stack([F.pad(LABELS[:, s:], (0, s), value=-100) for s in (1, 2, 3)], dim=1)
    out = model(**batch(), labels=LABELS, map_labels=labels, output_hidden_states=True)
    states = model.map_head(out.decoder_hidden_states[-1])
    by_step = []
    for step in (0, 1):  # nothing is three levels on
        losses = []
        for b in range(4):
            for t in range(2 - step):
                level = t + step + 1
                start = TABLE.offsets[level]
                width = WIDTHS[level]
                logits = model.lm_head.weight[start : start + width] @ states[b, step, t]
                losses.append(-logits.log_softmax(-1)[labels[b, step, t] - start])
        by_step.append(torch.stack(losses).mean())
    torch.testing.assert_close(out.map_loss, torch.stack(by_step).mean(), **CLOSE)


def train_a_little(model, inputs, steps=4):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    torch.manual_seed(7)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("pruning", [None, PruningConfig()])
def test_map_with_weight_zero_is_no_map(pruning):
    plain = build(pruning, dropout=0.2)
    silent = build(pruning, MapConfig(weight=0.0), dropout=0.2)
    assert all(torch.equal(v, silent.state_dict()[k]) for k, v in plain.state_dict().items())
    inputs = batch() | {"labels": LABELS}
    with_labels = inputs | {"map_labels": LABELS.flip(0)[:, None].repeat(1, 2, 1)}
    own = gradients(silent, with_labels)
    assert all((own.pop(name) == 0).all() for name in list(own) if name.startswith("map_head"))
    assert_same_gradients(own, gradients(plain, inputs))
    # The tied head sums its gradient in another order, hence not to the last bit.
    assert train_a_little(plain, inputs) == pytest.approx(
        train_a_little(silent, with_labels), abs=1e-5
    )
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(weight, silent.state_dict()[name], **CLOSE)


def test_every_method_starts_from_the_same_weights():
    plain = build().state_dict()
    for options in (
        {"pruning": PruningConfig()},
        {"map_config": MapConfig(steps=5)},
        {"pruning": PruningConfig(unit="item"), "map_config": MapConfig()},
    ):
        other = build(**options)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in plain.items())
    heads = [build(map_config=MapConfig(), seed=seed).map_head for seed in (0, 1)]
    assert not torch.equal(heads[0].projection, heads[1].projection)
    assert heads[0].projection.std().item() == pytest.approx(32**-0.5, rel=0.15)
    assert not torch.equal(build(seed=0).shared.weight, build(seed=1).shared.weight)


def test_a_share_of_an_update_adds_up_to_the_mean_of_all():
    model = build(PruningConfig())
    inputs = batch() | {"labels": LABELS}
    whole = gradients(model, inputs)
    total = {}
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: value[rows] for name, value in inputs.items()} | {
            "num_items_in_batch": torch.tensor(12)
        }
        for name, grad in gradients(model, part).items():
            total[name] = total.get(name, 0) + grad
    assert_same_gradients(total, whole)


# --- Generation and files


@pytest.mark.parametrize(
    "pruning", [None, PruningConfig(), PruningConfig(unit="item", protect_separators=True)]
)
def test_generate_works_unchanged_and_gives_each_level_its_codes(pruning):
    model = build(pruning)
    inputs = batch()
    beams = model.generate(**inputs, num_beams=4, num_return_sequences=4)
    assert beams.shape == (16, 4) and (beams[:, 0] == 1).all()
    for level, (start, width) in enumerate(zip(TABLE.offsets, WIDTHS), start=1):
        assert ((beams[:, level] >= start) & (beams[:, level] < start + width)).all()
    greedy = model.generate(**inputs, do_sample=False)
    by_hand = torch.ones(4, 1, dtype=torch.long)
    for _ in range(3):
        logits = model(**inputs, decoder_input_ids=by_hand).logits[:, -1]
        by_hand = torch.cat([by_hand, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(greedy, by_hand)


@pytest.mark.parametrize("pruning", [None, PruningConfig(scorer="norm", keep=0.5, unit="item")])
@pytest.mark.parametrize("drop_map", [False, True])
def test_saving_and_loading_gives_the_same_recommendations(tmp_path, pruning, drop_map):
    model = build(pruning, MapConfig(steps=3), ffn_hidden_layers=2)
    expected = recommend(model, HISTORIES, k=7)
    model.save_pretrained(tmp_path, drop_map=drop_map)
    # The model at hand keeps its head
    assert model.map_head is not None and model.config.map is not None
    loaded = SidT5.from_pretrained(tmp_path)
    for one, other in zip(recommend(loaded, HISTORIES, k=7), expected):
        assert torch.equal(one, other)
    assert (loaded.map_head is None) == (loaded.config.map is None) == drop_map
    assert loaded.table.fingerprint() == TABLE.fingerprint()
    names = {name for name in model.state_dict() if not (drop_map and name.startswith("map_head"))}
    assert names == set(loaded.state_dict())
    assert all(torch.equal(loaded.state_dict()[name], model.state_dict()[name]) for name in names)
    assert torch.equal(
        loaded.generate(**batch(), num_beams=3), model.generate(**batch(), num_beams=3)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_saved_model_recommends_in_half_precision(dtype, tmp_path):
    model = build(PruningConfig(keep=0.5))
    model.save_pretrained(tmp_path)
    half = SidT5.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    full = recommend(model, HISTORIES, k=50)
    found = recommend(half, HISTORIES, k=50)
    assert (
        torch.corrcoef(
            torch.stack(
                [scores.gather(1, items.argsort(1)).flatten() for items, scores in (full, found)]
            )
        )[0, 1]
        > 0.95
    )


def test_leaving_out_the_map_head_keeps_the_type_and_draws_nothing(tmp_path):
    model = build(map_config=MapConfig()).bfloat16()
    before = torch.random.get_rng_state()
    model.save_pretrained(tmp_path, drop_map=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    model.save_pretrained(
        tmp_path / "given",
        drop_map=True,
        state_dict={k: v * 0 for k, v in model.state_dict().items()},
    )
    loaded = SidT5.from_pretrained(tmp_path)
    zero = SidT5.from_pretrained(tmp_path / "given")
    assert (
        loaded.dtype == torch.bfloat16
        and torch.equal(loaded.shared.weight, model.shared.weight)
        and not zero.shared.weight.any()
    )
    assert (
        model.map_head is not None
        and model.state_dict().keys() - loaded.state_dict().keys()
        == {f"map_head.{name}" for name, _ in model.map_head.named_parameters()}
    )


def test_a_model_without_a_table_takes_the_place_of_one_with_it(tmp_path):
    build().save_pretrained(tmp_path)
    SidT5(SidT5Config(widths=WIDTHS, **SMALL)).save_pretrained(tmp_path)
    assert SidT5.from_pretrained(tmp_path).table is None


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "sids.json", "sids.safetensors"]
)
def test_damaged_files_of_a_model_are_refused(tmp_path, name):
    build().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    with pytest.raises(ValueError, match=str(tmp_path)):
        SidT5.from_pretrained(tmp_path)
    if name != "sids.json":  # without it there is no table
        (tmp_path / name).unlink()
        with pytest.raises(ValueError, match=str(tmp_path)):
            SidT5.from_pretrained(tmp_path)


def test_an_own_scorer_is_called_and_asked_for_after_loading(tmp_path):
    def oldest(signals):
        assert (
            signals.hidden.shape == (4, 32, 32)
            and signals.levels.max() == 3
            and signals.item_index.max() == 7
        )
        return -signals.positions.float()

    model = build(PruningConfig())
    model.set_scorer(oldest)
    encoded = model.encoder(**batch())
    for positions, mask in zip(encoded.positions, encoded.attention_mask):
        assert positions[mask == 1].tolist() == list(range(int(mask.sum())))
    model.save_pretrained(tmp_path)
    loaded = SidT5.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"custom scorer \(own:oldest\), and a saved model imports nothing: give it back with",
    ):
        loaded.encoder(**batch())
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pruning"]["scorer"] == "own:oldest"
    loaded.set_scorer(oldest)
    assert torch.equal(loaded.encoder(**batch()).positions, encoded.positions)


def test_a_saved_model_imports_no_module(tmp_path, monkeypatch):
    """A folder from a stranger whose configuration names a module that writes a file when it is
    imported.
    """
    (tmp_path / "stranger.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\nscore = lambda"
        " signals: signals.positions.float()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    build(PruningConfig()).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    fields = json.loads(path.read_text())
    fields["pruning"]["scorer"] = "stranger:score"
    path.write_text(json.dumps(fields))
    loaded = SidT5.from_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"custom scorer \(stranger:score\), and a saved model imports nothing"
    ):
        loaded.encoder(**batch())
    assert not (tmp_path / "stranger.ran").exists()
    loaded.set_scorer("stranger:score")
    loaded.encoder(**batch())
    assert (tmp_path / "stranger.ran").exists(), "what the caller names is imported"


def test_a_scorer_set_by_name_is_the_one_that_is_saved(tmp_path):
    model = build(PruningConfig(scorer="rastp"))
    before = model.encoder(**batch()).positions
    model.set_scorer("recent")
    after = model.encoder(**batch()).positions
    assert not torch.equal(before, after)
    model.save_pretrained(tmp_path)
    assert torch.equal(SidT5.from_pretrained(tmp_path).encoder(**batch()).positions, after)


OTHER = PruningConfig(
    after_layer=3, keep=0.5, unit="item", positions="compact", protect_separators=True
)


@pytest.mark.parametrize("before", [None, PruningConfig(), PruningConfig(reduce="pool")])
@pytest.mark.parametrize(
    "after", [None, OTHER, PruningConfig(after_layer=1, reduce="pool", keep=0.5)]
)
def test_set_pruning_makes_the_model_that_was_built_so(before, after, tmp_path):
    model = build(before)
    fresh = build(after)
    model.set_pruning(after)
    ours = model(**batch(), labels=LABELS)
    theirs = fresh(**batch(), labels=LABELS)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(
        ours.encoder_attention_mask, theirs.encoder_attention_mask
    )
    model.save_pretrained(tmp_path)
    loaded = SidT5.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch(), labels=LABELS).logits, theirs.logits)
    assert loaded.config.pruning == fresh.config.pruning
    with pytest.raises(
        ValueError, match="after_layer=9 lies beyond the last encoder layer; use 1..4"
    ):
        model.set_pruning(PruningConfig(after_layer=9))
    assert torch.equal(model(**batch(), labels=LABELS).logits, theirs.logits), (
        "a refused change changes nothing"
    )


def test_signals_describe_the_tokens():
    seen = []
    model = build(PruningConfig())
    model.set_scorer(lambda signals: seen.append(signals) or signals.centrality)
    for side in ("right", "left"):
        inputs = batch(side=side)
        model.encoder(**inputs, truth=torch.full(inputs["input_ids"].shape, 0.5))
        for b, history in enumerate(HISTORIES):
            real = inputs["attention_mask"][b] == 1
            n = len(history)
            assert seen[-1].positions[b][real].tolist() == list(range(4 * n))
            assert seen[-1].levels[b][real].tolist() == [0, 1, 2, 3] * n
            assert seen[-1].item_index[b][real].tolist() == [i for i in range(n) for _ in range(4)]
        assert (
            torch.equal(seen[-1].mask, inputs["attention_mask"]) and (seen[-1].truth == 0.5).all()
        )
        assert not seen[-1].hidden.requires_grad and not seen[-1].centrality.requires_grad


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: build(PruningConfig(after_layer=5)),
            "after_layer=5 lies beyond the last encoder layer; use 1..4",
        ),
        (
            lambda: SidT5(SidT5Config(widths=(6, 5), **SMALL), TABLE),
            r"table has widths \(6, 5, 4\), the model \(6, 5\)",
        ),
        (lambda: build().set_table(None), "table must be a SidTable, got None"),
        (
            lambda: build()(**batch(), labels=torch.cat([LABELS, LABELS], 1)),
            r"labels must be \[B, 3\].* got \(4, 6\)",
        ),
        (
            lambda: build()(**batch(), labels=LABELS[:, :2]),
            r"labels must be \[B, 3\].* got \(4, 2\)",
        ),
        (lambda: build().set_scorer("norm"), "this model does not prune"),
        (lambda: build(PruningConfig()).set_scorer("best"), "scorer='best' is unknown"),
        (
            lambda: build(PruningConfig(scorer="oracle")).encoder(**batch()),
            "only the planted catalogue knows it",
        ),
        (lambda: build().encoder(), "either input_ids or inputs_embeds"),
        (
            lambda: build(PruningConfig(unit="item")).encoder(inputs_embeds=torch.zeros(1, 4, 32)),
            "needs item_index",
        ),
        (
            lambda: build(PruningConfig(protect_separators=True)).encoder(
                inputs_embeds=torch.zeros(1, 4, 32)
            ),
            "protect_separators=True needs input_ids",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
