"""SidQwen against the library's own Qwen3, and against itself where two ways must give the same."""

import dataclasses
import itertools
import sys
import unittest.mock

import numpy as np
import pytest
import test_t5
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sidlab.config import TrainConfig
from sidlab.data.load import load_catalogue
from sidlab.decoding import beam_search, encode_histories, items_of_leaves, recommend, score_items
from sidlab.fast.scored_attention import attention_path, fused_attention
from sidlab.map_loss import MapConfig
from sidlab.model_building import build_model
from sidlab.models.qwen import SidQwen, SidQwenConfig
from sidlab.pruning import PruningConfig, kept_count
from sidlab.sids.table import BOS, SEP, SidTable
from sidlab.training import train
from sidlab.windows import history_tokens, pad_histories

WIDTHS = (6, 5, 4)
ALL_CODES = list(itertools.product(*map(range, WIDTHS)))
TABLE = SidTable(np.random.default_rng(0).permutation(ALL_CODES)[:50], WIDTHS)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
HISTORIES = [np.random.default_rng(n).integers(1, 51, n) for n in (8, 3, 1, 6)]
LABELS = TABLE.item_tokens[[4, 18, 33, 50]]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WAYS = {
    "none": None,
    "rastp": PruningConfig(keep=0.4),
    "visible": PruningConfig(keep=0.4, scorer="rastp-visible"),
    "first layer": PruningConfig(after_layer=1, keep=0.3),
    "items": PruningConfig(keep=0.5, unit="item"),
    "separators": PruningConfig(keep=0.4, protect_separators=True),
    "compact": PruningConfig(keep=0.4, positions="compact"),
    "pool": PruningConfig(keep=0.4, reduce="pool"),
    "training only": PruningConfig(keep=0.4, at_inference=False),
    "last layer": PruningConfig(after_layer=4, keep=0.4),
}


def build(pruning=None, map_config=None, *, seed=0, table=TABLE, **changes):
    torch.manual_seed(seed)
    fields = {
        "pruning": pruning and pruning.to_dict(),
        "map": map_config and dataclasses.asdict(map_config),
    }
    return SidQwen(
        SidQwenConfig(**{"widths": table.widths, "max_items": 8} | SIZES | fields | changes), table
    ).eval()


def batch(histories=HISTORIES, side="right"):
    tokens = history_tokens(pad_histories(histories, 8, 50), TABLE)
    if side == "left":
        tokens = torch.stack([row.roll(int((row == 0).sum())) for row in tokens])
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}


def on_level(logits):
    return logits > -torch.inf


def library_model(model):
    theirs = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=model.config.vocab_size, tie_word_embeddings=True, **SIZES)
    )
    theirs.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.endswith("token_level")}, strict=True
    )
    return theirs.eval()


def library_logits(theirs, history, labels, front=()):
    """The logits that predict `labels`, of one history without any padding."""
    row = torch.cat(
        [
            torch.tensor(front, dtype=torch.long),
            history[history > 0],
            torch.tensor([BOS]),
            labels[:-1],
        ]
    )
    return theirs(input_ids=row[None]).logits[0, -len(labels) :]


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- Against the library


@pytest.mark.parametrize("side", ("right", "left"))
def test_without_pruning_it_is_the_librarys_qwen3(side):
    model = build()
    out = model(**batch(side=side), labels=LABELS)
    theirs = library_model(model)
    for logits, tokens, labels in zip(out.logits, batch()["input_ids"], LABELS):
        expected = library_logits(theirs, tokens, labels)
        torch.testing.assert_close(logits[on_level(logits)], expected[on_level(logits)], **CLOSE)
    assert (on_level(out.logits).sum(-1) == torch.tensor(WIDTHS)).all()
    torch.testing.assert_close(
        out.loss, F.cross_entropy(out.logits.transpose(1, 2), LABELS), **CLOSE
    )


def test_gradients_are_the_librarys():
    model = build()
    theirs = library_model(model)
    model.train()
    found = gradients(model, batch() | {"labels": LABELS})
    level = torch.stack([model.model.token_level == position for position in range(3)])  # [L, V]
    losses = [
        F.cross_entropy(
            library_logits(theirs, tokens, labels).masked_fill(~level, -torch.inf), labels
        )
        for tokens, labels in zip(batch()["input_ids"], LABELS)
    ]
    torch.stack(losses).mean().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            found[name], parameter.grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_weights_start_as_the_library_starts_them():
    ours = build(embedding_init=0.02).state_dict()
    theirs = Qwen3ForCausalLM(Qwen3Config(vocab_size=TABLE.vocab_size, **SIZES)).state_dict()
    for name, weight in theirs.items():
        tolerance = 6 / (2 * weight.numel()) ** 0.5
        torch.testing.assert_close(ours[name].std(), weight.std(), rtol=tolerance, atol=1e-6)


# --- Against itself


def test_keeping_everything_equals_no_pruning_and_so_do_gradients():
    plain = build()
    forced = build(PruningConfig(keep=1.0))
    inputs = batch() | {"labels": LABELS}
    torch.testing.assert_close(forced(**inputs).logits, plain(**inputs).logits, **CLOSE)
    found = gradients(forced.train(), inputs)
    expected = gradients(plain.train(), inputs)
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("way", WAYS)
def test_padding_on_either_side_and_company_change_nothing(way):
    model = build(WAYS[way])
    together = model(**batch(), labels=LABELS).logits
    torch.testing.assert_close(model(**batch(side="left"), labels=LABELS).logits, together, **CLOSE)
    for i, history in enumerate(HISTORIES):
        alone = model(**batch([history]), labels=LABELS[i : i + 1]).logits
        torch.testing.assert_close(alone[0], together[i], **CLOSE)


def test_a_weightless_map_head_changes_nothing_and_leaves_the_random_numbers():
    plain = build(PruningConfig())
    with_head = build(PruningConfig(), MapConfig(weight=0))
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, with_head.state_dict()[name])
    inputs = batch() | {"labels": LABELS}
    later = TABLE.item_tokens[torch.randint(1, 51, (4, 2))]
    ours = with_head(**inputs, map_labels=later)
    theirs = plain(**inputs)
    assert torch.equal(ours.loss, theirs.loss) and ours.map_loss > 0 and theirs.map_loss is None


@pytest.mark.parametrize("unit", ("item", "token"))
def test_map_reaches_every_weight_and_its_labels_are_predicted_by_level(unit):
    model = build(map_config=MapConfig(unit=unit, weight=1.0)).train()
    later = TABLE.item_tokens[
        torch.randint(1, 51, (4, 2), generator=torch.Generator().manual_seed(0))
    ]
    if unit == "token":
        later[:, 0] = torch.cat([LABELS[:, 1:], torch.full((4, 1), -100)], 1)
        later[:, 1] = torch.cat([LABELS[:, 2:], torch.full((4, 2), -100)], 1)
    out = model(**batch(), labels=LABELS, map_labels=later)
    torch.testing.assert_close(out.loss, out.main_loss + out.map_loss)
    out.map_loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    hidden = model.model(**batch(), tail=model.shifted(LABELS)).last_hidden_state[:, -3:]
    states = model.map_head(hidden)
    by_hand = []
    for step in range(2):
        of_step = []
        for position in range(3):
            level = position if unit == "item" else position + step + 1
            if level < 3:
                logits = (
                    states[:, step, position]
                    @ model.lm_head.weight[
                        TABLE.offsets[level] : TABLE.offsets[level] + WIDTHS[level]
                    ].T
                )
                of_step.append(
                    F.cross_entropy(logits, later[:, step, position] - TABLE.offsets[level])
                )
        by_hand.append(torch.stack(of_step).mean())
    torch.testing.assert_close(out.map_loss, torch.stack(by_hand).mean())


# --- What is kept


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=5),
    st.sampled_from((0.01, 0.2, 1 / 3, 0.7)),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_the_first_token_stays_and_the_share_comes_on_top(lengths, keep, layer, seed):
    rng = np.random.default_rng(seed)
    model = build(PruningConfig(after_layer=layer, keep=keep))
    inputs = batch([rng.integers(1, 51, n) for n in lengths])
    out = model.encode(**inputs)
    assert (
        out.attention_mask.shape[1] <= int(np.ceil(keep * inputs["input_ids"].shape[1] - 1e-6)) + 1
    )
    for row, mask, positions, importance in zip(
        inputs["attention_mask"], out.attention_mask, out.positions, out.importance
    ):
        n = int(row.sum())
        kept = positions[mask.bool()].tolist()
        best = importance[:n].clone()
        best[0] = torch.inf
        count = min(int(kept_count(torch.tensor(n), keep)) + 1, n)
        assert kept[0] == 0 and len(kept) == count
        assert kept == sorted(best.argsort(descending=True, stable=True)[:count].tolist())


@pytest.mark.parametrize("way", ("rastp", "visible", "items", "separators", "first layer"))
def test_labels_never_influence_what_is_kept(way):
    model = build(WAYS[way], MapConfig())
    for training in (False, True):
        model.train(training)
        kept = [
            model.model(**batch(), tail=model.shifted(labels))
            for labels in (LABELS, LABELS.flip(0))
        ]
        alone = model.model(**batch())
        for out in kept:
            assert torch.equal(out.positions, alone.positions) and torch.equal(
                out.importance, alone.importance
            )
        assert torch.equal(
            model(**batch(), labels=LABELS).encoder_attention_mask, alone.attention_mask
        )


def test_only_history_queries_vote_and_visible_divides_by_those_that_see_a_token():
    model = build(PruningConfig(after_layer=2))
    theirs = library_model(model)
    theirs.set_attn_implementation("eager")
    tokens = batch()["input_ids"]
    out = model.model(**batch(), tail=model.shifted(LABELS))
    for row, importance, centrality in zip(tokens, out.importance, out.centrality):
        n = int((row > 0).sum())
        full = theirs(input_ids=row[None, :n], output_attentions=True, output_hidden_states=True)
        received = full.attentions[1][0].sum((0, 1))  # [n]
        torch.testing.assert_close(centrality[:n], received, **CLOSE)
        size = full.hidden_states[2][0].abs().sum(-1)
        torch.testing.assert_close(importance[:n], received * size, **CLOSE)
        # Each query of each head hands out 1
        assert received.sum().item() == pytest.approx(4 * n, rel=1e-5)
    model.set_scorer("rastp-visible")
    visible = model.model(**batch()).importance
    n = (tokens > 0).sum(1, keepdim=True)
    seen_by = (n - torch.arange(tokens.shape[1])).clamp_min(1)
    torch.testing.assert_close(visible * seen_by, out.importance, **CLOSE)


def test_causal_attention_favours_early_tokens_and_visible_does_so_less():
    """With equal attention to all that is visible, the first of n tokens gets n times the harmonic
    number H_n of the last one; divided by the queries that can see a token, H_n times.
    """
    model = build(PruningConfig(after_layer=1))
    attention = model.model.layers[0].self_attn
    attention.q_norm.weight.data.zero_()
    long = batch([np.arange(1, 9)])
    plain = model.encode(**long).centrality[0]
    assert (plain.diff() < 0).all()
    n = len(plain)
    even = torch.tensor([sum(1 / (q + 1) for q in range(k, n)) for k in range(n)]) * 4
    torch.testing.assert_close(plain, even.float(), **CLOSE)
    visible, rastp = (
        model.encode(**long).importance[0]
        for _ in map(model.set_scorer, ("rastp-visible", "rastp"))
    )
    harmonic = sum(1 / q for q in range(1, n + 1))
    size = rastp / plain
    for importance, times in ((visible, harmonic), (rastp, n * harmonic)):
        assert (importance / size)[0] / (importance / size)[-1] == pytest.approx(times, rel=1e-4)


def test_kept_tokens_keep_the_rotation_of_their_places():
    """After the pruner the model is the library's own layers on the kept states at their places."""
    model = build(PruningConfig(after_layer=2, keep=0.4))
    tokens = batch([HISTORIES[0]])
    tail = model.shifted(LABELS[:1])
    out = model.model(**tokens, tail=tail)
    theirs = library_model(build())
    states = theirs.model(
        input_ids=torch.cat([tokens["input_ids"], tail], 1), output_hidden_states=True
    ).hidden_states[2]
    n = tokens["input_ids"].shape[1]
    places = torch.cat([out.positions[0], torch.arange(n, n + 3)])
    hidden = states[:, places]
    for layer in theirs.model.layers[2:]:
        hidden = layer(
            hidden,
            position_embeddings=theirs.model.rotary_emb(hidden, places[None]),
            attention_mask=None,
        )
    torch.testing.assert_close(out.last_hidden_state, theirs.model.norm(hidden), **CLOSE)
    model.set_pruning(dataclasses.replace(model.pruning, positions="compact"))
    compact = model.model(**tokens, tail=tail).last_hidden_state
    assert (compact - out.last_hidden_state).abs().max() > 1e-3


# --- Recommending


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("beam", (3, 60))
def test_a_search_equals_teacher_forcing(way, beam):
    """A beam as wide as the catalogue gives exact scores; a narrow one a search that is written out
    by hand.
    """
    model = build(WAYS[way])
    exact = score_items(model, HISTORIES)
    # the oracle itself: one forward pass for each item
    for item in (1, 17, 50):
        logits = model(**batch(), labels=TABLE.item_tokens[[item] * 4]).logits.log_softmax(-1)
        by_hand = logits.gather(-1, TABLE.item_tokens[[item] * 4].unsqueeze(-1)).sum((1, 2))
        torch.testing.assert_close(exact[:, item - 1], by_hand, **CLOSE)
    items, scores = recommend(model, HISTORIES, k=3, beam=beam)
    if beam == 60:
        best = exact.sort(dim=1, descending=True, stable=True)
        assert torch.equal(items, best.indices[:, :3] + 1)
        torch.testing.assert_close(scores, best.values[:, :3], **CLOSE)
    for row, history in enumerate(HISTORIES):
        beams = [((), 0.0)]
        for level in range(3):
            grown = []
            for codes, score in beams:
                labels = torch.tensor([*codes, *[0] * (3 - len(codes))]) + torch.tensor(
                    TABLE.offsets
                )
                log_p = (
                    model(**batch([history]), labels=labels[None]).logits[0, level].log_softmax(-1)
                )
                following = {
                    tuple(c[: level + 1]) for c in TABLE.codes.tolist() if tuple(c[:level]) == codes
                }
                grown += [
                    (codes + (c[-1],), score + log_p[TABLE.offsets[level] + c[-1]].item())
                    for c in following
                ]
            beams = sorted(grown, key=lambda g: -g[1])[:beam]
        assert scores[row].tolist() == pytest.approx([score for _, score in beams[:3]], abs=1e-5)


def test_layers_behind_the_pruner_cache_only_what_was_kept():
    model = build(PruningConfig(after_layer=2, keep=0.4))
    encoded = encode_histories(model, HISTORIES)
    n = 8 * 4
    k = int(np.ceil(0.4 * 32)) + 1
    assert [layer.keys.shape[2] for layer in encoded.past_key_values.layers] == [n, n, k, k]
    first = beam_search(model, encoded, 5)
    # A search leaves it as it was
    assert [layer.keys.shape[2] for layer in encoded.past_key_values.layers] == [n, n, k, k]
    second = beam_search(model, encoded, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("way", ("none", "rastp", "compact", "pool"))
def test_generate_of_the_library_works_unchanged(way):
    model = build(WAYS[way])
    inputs = {k: F.pad(v, (0, 1), value=1) for k, v in batch(side="left").items()}  # BOS
    found = model.generate(
        **inputs, do_sample=False, num_beams=120, num_return_sequences=120, length_penalty=0.0
    )
    sids = found[:, -3:].view(4, 120, 3)
    leaves, exists = TABLE.trie.find(sids - torch.tensor(TABLE.offsets))
    items, _ = recommend(model, HISTORIES, k=10, beam=60)
    for row in range(4):  # all 120 SIDs are in its beam, so those of items come in our order
        valid = leaves[row][exists[row]][None]
        theirs, _ = items_of_leaves(
            TABLE.trie, valid, torch.zeros_like(valid, dtype=torch.float), 10
        )
        assert theirs[0].tolist() == items[row].tolist()


# --- A pretrained checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    words = {word: i for i, word in enumerate(["[UNK]", "recommend", "the", "next", "item"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    torch.manual_seed(3)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=5, tie_word_embeddings=True, **SIZES)).save_pretrained(
        tmp_path
    )
    return tmp_path


@pytest.mark.parametrize("pruning", (None, PruningConfig(keep=0.4)))
def test_a_checkpoint_is_extended_and_keeps_its_text(checkpoint, pruning, tmp_path):
    model = SidQwen.from_checkpoint(
        str(checkpoint),
        TABLE,
        prompt="recommend the next item",
        max_items=8,
        pruning=pruning and pruning.to_dict(),
    ).eval()
    theirs = Qwen3ForCausalLM.from_pretrained(checkpoint)
    first = 3 + sum(WIDTHS)
    assert model.config.prompt == [first + 1, first + 2, first + 3, first + 4]
    assert torch.equal(model.model.embed_tokens.weight[first:], theirs.model.embed_tokens.weight)
    assert torch.equal(
        model.model.layers[2].mlp.up_proj.weight, theirs.model.layers[2].mlp.up_proj.weight
    )
    out = model(**batch(), labels=LABELS)
    if pruning is None:
        extended = library_model_of(model)
        for logits, tokens, labels in zip(out.logits, batch()["input_ids"], LABELS):
            expected = library_logits(extended, tokens, labels, front=model.config.prompt)
            torch.testing.assert_close(
                logits[on_level(logits)], expected[on_level(logits)], **CLOSE
            )
    else:  # the prompt is the sink, and the share is the history's
        assert (
            out.encoder_attention_mask.sum(1).tolist()
            == kept_count(batch()["attention_mask"].sum(1), 0.4).tolist()
        )
    items, _ = recommend(model, HISTORIES, k=5, beam=60)
    best = score_items(model, HISTORIES).sort(dim=1, descending=True, stable=True)
    assert torch.equal(items, best.indices[:, :5] + 1)
    model.save_pretrained(tmp_path / "own")
    again = SidQwen.from_pretrained(tmp_path / "own")
    assert torch.equal(again(**batch(), labels=LABELS).logits, out.logits)


def test_a_checkpoint_in_bfloat16_trains_in_float32_behind_its_prompt(checkpoint, tmp_path):
    Qwen3ForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.bfloat16).save_pretrained(
        checkpoint
    )
    catalogue = load_catalogue("planted", n_users=200)
    table = SidTable(
        catalogue.truth.tree, tuple(catalogue.truth.tree.max(axis=0) + 1), collisions="extend"
    )
    config = TrainConfig.preset(
        "smoke",
        arch="qwen",
        checkpoint=str(checkpoint),
        prompt="the next item",
        max_updates=4,
        eval_every=2,
        learning_rate=1e-5,
        precision="fp32",
    )
    # As it is, where nobody trains it
    assert SidQwen.from_checkpoint(str(checkpoint), table).dtype == torch.bfloat16
    start = build_model(config, table)
    model = train(config, catalogue, table, progress=False).model
    assert model.config.prompt == [3 + sum(table.widths) + word for word in (2, 3, 4)]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    before, after = (m.model.layers[0].mlp.up_proj.weight for m in (start, model))
    assert (before != after).float().mean() > 0.95  # steps of 1e-5 are lost in bfloat16
    with pytest.raises(ValueError, match="prompt='hello' needs a checkpoint"):
        TrainConfig(arch="qwen", prompt="hello")


def library_model_of(model):
    theirs = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=model.config.vocab_size, tie_word_embeddings=True, **SIZES)
    )
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if "token_level" not in k})
    return theirs.eval()


def test_what_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match="(?s)checkpoint='.*nowhere' can't be loaded.*hf download"):
        SidQwen.from_checkpoint(str(tmp_path / "nowhere"), TABLE)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=5,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'qwen2'; SidQwen takes Qwen3"):
        SidQwen.from_checkpoint(str(tmp_path), TABLE)
    library_model(build()).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no tokenizer that reads prompt='next'"):
        SidQwen.from_checkpoint(str(tmp_path / "bare"), TABLE, prompt="next")


# --- Saving, settings, errors


@pytest.mark.parametrize("drop_map", (False, True))
def test_it_saves_with_its_table_and_loads(tmp_path, drop_map):
    model = build(PruningConfig(scorer="rastp-visible"), MapConfig())
    model.save_pretrained(tmp_path, drop_map=drop_map)
    loaded = SidQwen.from_pretrained(tmp_path)
    assert (loaded.map_head is None) == drop_map and loaded.pruning == model.pruning
    assert torch.equal(loaded.table.item_tokens, TABLE.item_tokens)
    assert all(
        torch.equal(a, b) for a, b in zip(recommend(loaded, HISTORIES), recommend(model, HISTORIES))
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: build(PruningConfig(after_layer=5)),
            "after_layer=5 lies beyond the last layer; use 1..4",
        ),
        (lambda: build(PruningConfig(mode="reference")), 'mode="reference" belongs to T5'),
        (
            lambda: build().set_pruning(PruningConfig(positions="none")),
            'positions="none" belongs to T5',
        ),
        (lambda: build(prompt=[3]), "prompt must hold ids of text tokens"),
        (
            lambda: build(use_sliding_window=True, max_window_layers=1, sliding_window=4),
            "full attention in every layer",
        ),
        (
            lambda: build()(input_ids=batch()["input_ids"]),
            "input_ids must hold BOS after every history",
        ),
        (lambda: build().set_scorer("norm"), "does not prune"),
        (
            lambda: build()(**batch(), labels=torch.cat([LABELS, LABELS], 1)),
            r"labels must be \[B, 3\].* got \(4, 6\)",
        ),
    ],
)
def test_bad_settings_say_what_is_right(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("keep", [1e-9, 1e-3])
def test_however_little_is_kept_a_token_besides_the_sink_stays(keep):
    encoded = build(PruningConfig(keep=keep)).encode(**batch())
    assert (encoded.attention_mask.sum(1) == 2).all() and (encoded.positions[:, 0] == 0).all()


def test_an_own_scorer_sees_the_history_alone():
    seen = {}

    def newest(signals):
        seen.update(shape=signals.hidden.shape, levels=signals.levels)
        return signals.positions.float()

    model = build(PruningConfig(keep=0.25, scorer=newest))
    model.set_scorer(newest)
    out = model(**batch(), labels=LABELS)
    tokens = batch()["input_ids"]
    assert (
        seen["shape"] == (4, 32, 32)
        and (seen["levels"] == 3).sum() == ((tokens == SEP) | (tokens == 0)).sum()
    )
    assert out.encoder_attention_mask[0].sum() == 9
    assert model.encode(**batch()).positions[0].tolist() == [0, *range(24, 32)]


@pytest.mark.parametrize("start", [0, 2])  # behind a prompt the history begins later
def test_fused_scoring_of_a_grouped_causal_layer_is_the_plain_one(start):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 9, 16) for heads in (4, 2, 2))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 3 + [1] * 2])
    module = build().model.layers[0].self_attn
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None] & mask[:, None, None].bool()
    history = slice(start, 7)
    options = dict(
        dropout=0.0, scaling=0.25, position_bias=None, token_mask=mask, causal=True, history=history
    )
    output, centrality = fused_attention(module, query, key, value, causal, **options)
    weights = (
        (query @ key.repeat_interleave(2, 1).mT * 0.25).masked_fill(~causal, -torch.inf).softmax(-1)
    )
    torch.testing.assert_close(
        output, (weights @ value.repeat_interleave(2, 1)).transpose(1, 2), **CLOSE
    )
    votes = torch.einsum("bhqk,bq->bk", weights[:, :, history, history], mask[:, history].float())
    torch.testing.assert_close(centrality, votes, **CLOSE)
    assert (
        attention_path(build(PruningConfig(after_layer=1)))
        == "layer 1, which scores: plain attention; the others: sdpa"
    )
    assert attention_path(build()) == "all layers: sdpa; none scores"


@pytest.mark.parametrize("prompt", [None, [18, 19, 20]])
def test_both_paths_score_alike_behind_a_prompt(prompt):
    model = build(PruningConfig(), text_vocab=5, prompt=prompt)
    found = {}
    for path in ("plain", "sdpa"):
        model.model.scoring_path = path
        found[path] = model.model(**batch(), tail=model.shifted(LABELS)).centrality
    torch.testing.assert_close(found["sdpa"], found["plain"], **CLOSE)


@pytest.mark.parametrize("arch", [test_t5, sys.modules[__name__]])
@pytest.mark.parametrize(
    "way", [*WAYS.values(), PruningConfig(keep=1, mass=0.5), PruningConfig(1, 0.01, unit="item")]
)
def test_rows_of_one_length_need_no_mask(arch, way):
    rows = [np.random.default_rng(i).integers(1, 51, 5) for i in range(4)]
    model = arch.build(way).train()
    inputs = arch.batch(rows) | {"labels": LABELS}
    torch.testing.assert_close(model(**inputs, padded=False).loss, model(**inputs).loss, **CLOSE)


@pytest.mark.parametrize("arch", [test_t5, sys.modules[__name__]])
def test_what_does_not_prune_does_not_score_and_eager_attention_shows_every_layer(arch):
    model = arch.build(PruningConfig(at_inference=False))
    inputs = arch.batch() | {"labels": LABELS}
    assert attention_path(model) == "all layers: sdpa; none scores"
    with unittest.mock.patch(
        "sidlab.fast.scored_attention.attention_centrality", side_effect=AssertionError("scored")
    ):
        expected = model(**inputs).logits
        model.set_attn_implementation("eager")
        out = model(**inputs, output_attentions=True)
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    assert len(out.encoder_attentions if arch is test_t5 else out.attentions) == 4
