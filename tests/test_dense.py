"""Dense supervision: one pass that teaches every item gives the losses of its targets one by one;
the layout and the mask it needs.
"""

import itertools
import json

import numpy as np
import pytest
import test_qwen
import test_t5
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sidlab.config import TrainConfig
from sidlab.data.load import load_catalogue
from sidlab.decoding import recommend, score_items
from sidlab.map_loss import MapConfig
from sidlab.model_building import build_model, weights_digest
from sidlab.pruning import PruningConfig, kept_count
from sidlab.sids.table import BOS, PAD, SidTable
from sidlab.training import train
from sidlab.windows import (
    Collator,
    StretchCollator,
    Stretches,
    Windows,
    history_tokens,
    leave_one_out,
)

TABLE = test_qwen.TABLE
LABELS = test_qwen.LABELS
HISTORIES = test_qwen.HISTORIES
CLOSE = test_qwen.CLOSE
LEVERS = {"level_embeddings": True, "embedding_norm": True, "label_smoothing": 0.1}


def qwen(pruning=None, map_config=None, **changes):
    return test_qwen.build(pruning, map_config, **{"layout": "stream"} | changes)


def t5(pruning=None, map_config=None, **changes):
    model = test_t5.build(pruning, map_config, **{"encoder_mask": "items"} | changes)
    if model.cross_bias is not None:  # it starts at zero, which would hide where it goes
        torch.nn.init.normal_(model.cross_bias.weight)
    return model


MODELS = {
    "qwen": qwen,
    "qwen, levers": lambda *a, **k: qwen(
        *a, tie_word_embeddings=False, residual_dropout=0.2, **LEVERS, **k
    ),
    "t5": t5,
    "t5, cross bias": lambda *a, **k: t5(*a, cross_bias=True, **k),
    "t5, levers": lambda *a, **k: t5(
        *a, cross_bias=True, qk_norm=True, tie_embeddings=False, **LEVERS, **k
    ),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


# --- The equivalence


def token_losses(logits, labels):
    """Cross-entropy of each label, 0 at −100: [..., L, V] and [..., L] → [..., L]."""
    return F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="none"
    ).view(labels.shape)


@pytest.mark.parametrize("separators", (True, False))
@pytest.mark.parametrize("plain", (False, True))
@each_model
def test_one_pass_over_all_targets_is_its_targets_one_by_one(build, separators, plain):
    rng = np.random.default_rng(0)
    train_parts = [rng.integers(1, 51, n) for n in (9, 2, 5, 3, 1)]
    map_config = MapConfig(steps=2, weight=0.5)
    model = build(None, map_config, separators=separators)
    if plain:
        model.set_attn_implementation("eager")
    stretches = Stretches(train_parts, 8)
    windows = Windows(train_parts, 8)
    dense = StretchCollator(stretches, TABLE, separators=separators, map_config=map_config)(
        list(range(len(stretches)))
    )
    one = Collator(windows, TABLE, separators=separators, max_items=8, map_config=map_config)(
        list(range(len(windows)))
    )
    all_at_once = model(**dense)
    one_by_one = model(**one)
    taught = dense["labels"][..., 0] != -100  # [B, T]
    torch.testing.assert_close(
        token_losses(all_at_once.logits, dense["labels"])[taught],
        token_losses(one_by_one.logits, one["labels"]),
        **CLOSE,
    )
    torch.testing.assert_close(dense["map_labels"][taught], one["map_labels"])
    torch.testing.assert_close(all_at_once.loss, one_by_one.loss, **CLOSE)
    found, expected = (
        {name: p.grad for name, p in _with_gradients(model, batch)} for batch in (dense, one)
    )
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name],
            expected[name],
            rtol=1e-4,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def _with_gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return [(name, p) for name, p in model.named_parameters() if p.grad is not None]


@settings(max_examples=100)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 12))
def test_every_item_but_the_first_is_taught_once_after_its_own_past(lengths, max_items):
    parts = []
    begin = 1
    for n in lengths:  # no item twice, so that it tells where it stood
        parts.append(np.arange(begin, begin + n))
        begin += n
    if not any(n >= 2 for n in lengths):
        with pytest.raises(ValueError, match="nothing to teach"):
            Stretches(parts, max_items)
        return
    stretches = Stretches(parts, max_items)
    taught = []
    for start, stop, first in zip(stretches.start, stretches.stop, stretches.taught):
        assert start < first < stop <= start + max_items + 1
        items = stretches.items[start:stop]
        assert (np.diff(items) == 1).all()  # one user's, in order
        own = next(part for part in parts if items[0] in part)
        assert first - start >= min(
            max(max_items // 2, 1), int(np.flatnonzero(own == stretches.items[first])[0])
        )
        taught += stretches.items[first:stop].tolist()
    assert sorted(taught) == sorted(itertools.chain.from_iterable(part[1:] for part in parts))


def test_a_stretch_that_goes_on_teaches_what_is_new_and_maps_within_the_training_part():
    history = np.arange(1, 13)
    stretches = Stretches([history], 4)
    batch = StretchCollator(stretches, TABLE, separators=True, map_config=MapConfig(steps=1))(
        list(range(len(stretches)))
    )
    item_of = {tuple(codes.tolist()): item for item, codes in enumerate(TABLE.item_tokens)}
    seen = []
    for labels, later in zip(batch["labels"], batch["map_labels"]):
        for target, after in zip(labels, later[:, 0]):
            if target[0] != -100:
                item = item_of[tuple(target.tolist())]
                seen.append(item)
                assert (
                    (item_of[tuple(after.tolist())] == item + 1)
                    if item < 12
                    else (after == -100).all()
                )
            else:
                assert (after == -100).all()
    assert seen == list(range(2, 13))


# --- The layout and the mask


WAYS = test_qwen.WAYS


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", (qwen, MODELS["t5, cross bias"]), ids=("qwen", "t5"))
def test_padding_on_either_side_and_company_change_nothing(build, way):
    model = build(WAYS[way])
    together = model(**test_qwen.batch(), labels=LABELS).logits
    torch.testing.assert_close(
        model(**test_qwen.batch(side="left"), labels=LABELS).logits, together, **CLOSE
    )
    for i, history in enumerate(HISTORIES):
        alone = model(**test_qwen.batch([history]), labels=LABELS[i : i + 1]).logits
        torch.testing.assert_close(alone[0], together[i], **CLOSE)
        unpadded = model(
            **test_qwen.batch([history]), labels=LABELS[i : i + 1], padded=False
        ).logits
        torch.testing.assert_close(unpadded[0], together[i], **CLOSE)


@pytest.mark.parametrize("build", (qwen, MODELS["t5, cross bias"]), ids=("qwen", "t5"))
@pytest.mark.parametrize("unit", ("token", "item"))
def test_keeping_everything_equals_no_pruning(build, unit):
    inputs = test_qwen.batch() | {"labels": LABELS}
    torch.testing.assert_close(
        build(PruningConfig(keep=1.0, unit=unit))(**inputs).logits,
        build()(**inputs).logits,
        **CLOSE,
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", (qwen, MODELS["t5, cross bias"]), ids=("qwen", "t5"))
def test_a_wide_beam_is_exact_scoring(build, way):
    model = build(WAYS[way])
    exact = score_items(model, HISTORIES)
    items, scores = recommend(model, HISTORIES, k=50, beam=150)
    torch.testing.assert_close(scores, exact.gather(1, items - 1), **CLOSE)
    assert (items.sort(1).values == torch.arange(1, 51)).all()


@pytest.mark.parametrize("separators", (True, False))
@pytest.mark.parametrize("keep", (0.5, 1 / 3))
def test_pooling_a_stream_needs_no_padding_to_be_right(keep, separators):
    model = qwen(PruningConfig(keep=keep, reduce="pool"), separators=separators)
    for n in range(1, 9):
        tokens = history_tokens(np.arange(1, n + 1)[None], TABLE, separators)
        inputs = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "labels": LABELS[:1],
        }
        torch.testing.assert_close(
            model(**inputs, padded=False).loss, model(**inputs, padded=True).loss, **CLOSE
        )


def test_a_stretch_may_be_padded_on_the_left():
    tokens = history_tokens(np.array([[5, 9, 2, 30], [7, 3, 0, 0]]), TABLE)
    labels = TABLE.item_tokens[torch.tensor([[9, 2, 30], [3, 0, 0]])]
    labels[1, 1:] = -100
    left = tokens.clone()
    left_labels = labels.clone()
    left[1] = tokens[1].roll(8)
    left_labels[1] = labels[1].roll(2, 0)
    for build in MODELS.values():
        model = build()
        right = model(input_ids=tokens, labels=labels)
        moved = model(input_ids=left, labels=left_labels)
        torch.testing.assert_close(moved.logits[1, 2], right.logits[1, 0], **CLOSE)
        torch.testing.assert_close(moved.loss, right.loss, **CLOSE)


@pytest.mark.parametrize("way", ("none", "rastp", "pool", "items"))
def test_generate_finds_the_first_of_the_beam(way):
    model = qwen(WAYS[way])
    tokens = test_qwen.batch(side="left")["input_ids"]
    begins = (tokens != PAD).int().argmax(1)
    inputs = F.pad(tokens, (1, 0))
    inputs[torch.arange(len(inputs)), begins] = BOS
    found = model.generate(
        inputs,
        attention_mask=(inputs != PAD).long(),
        do_sample=False,
        num_beams=20,
        num_return_sequences=20,
    )
    # The library's beam knows no trie: its best sequence that is an item is ours.
    of_item = {tuple(codes.tolist()): item for item, codes in enumerate(TABLE.item_tokens)}
    best = recommend(model, HISTORIES, k=1, beam=150)[0][:, 0].tolist()
    for row, item in zip(found.unflatten(0, (len(inputs), 20)), best):
        keys = [tuple(sequence[-3:].tolist()) for sequence in row]
        assert next(of_item[key] for key in keys if key in of_item) == item


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=5),
    st.sampled_from((0.01, 0.2, 1 / 3, 0.7)),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_the_last_token_stays_and_the_share_comes_on_top(lengths, keep, layer, seed):
    rng = np.random.default_rng(seed)
    model = qwen(PruningConfig(after_layer=layer, keep=keep))
    inputs = test_qwen.batch([rng.integers(1, 51, n) for n in lengths])
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
        best[n - 1] = torch.inf
        count = min(int(kept_count(torch.tensor(n), keep)) + 1, n)
        assert kept[-1] == n - 1 and kept == sorted(
            best.argsort(descending=True, stable=True)[:count].tolist()
        )


def test_an_item_sees_itself_and_what_came_before():
    model = t5()
    tokens = history_tokens(np.array([[5, 9, 2, 30]]), TABLE)
    before = model.encoder(
        input_ids=tokens, attention_mask=torch.ones_like(tokens)
    ).last_hidden_state
    changed = tokens.clone()
    # A code of item 3
    changed[0, 9] = (
        TABLE.item_tokens[7, 1]
        if TABLE.item_tokens[7, 1] != tokens[0, 9]
        else TABLE.item_tokens[8, 1]
    )
    after = model.encoder(
        input_ids=changed, attention_mask=torch.ones_like(tokens)
    ).last_hidden_state
    moved = (before != after).any(-1)[0]
    assert not moved[:8].any() and moved[8:].all()


@pytest.mark.parametrize("build", (qwen, t5), ids=("qwen", "t5"))
def test_vectors_of_levels_start_as_small_as_those_of_tokens(build):
    weights = build(level_embeddings=True, embedding_init=0.03).get_input_embeddings()
    assert weights.level.weight.std().item() == pytest.approx(0.03, rel=0.3)
    assert weights.weight.std().item() == pytest.approx(0.03, rel=0.1)


@pytest.mark.parametrize("build", (qwen, t5, test_t5.build), ids=("qwen", "items", "full"))
@pytest.mark.parametrize("side", ("right", "left"))
def test_visible_is_how_many_of_its_history_look_at_a_token(build, side):
    """Against the attention weights themselves: whose row gives a token any."""
    model = build(PruningConfig(after_layer=1, keep=1.0))
    seen = {}
    inputs = test_qwen.batch(side=side)

    def scorer(signals):
        seen["visible"] = signals.visible.expand(signals.mask.shape)
        return signals.positions.float()

    model.set_scorer(scorer)
    model.encode(**inputs)
    record = {}
    attention = model.stack.attentions[0]
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: kwargs["record"].update(keep_attention=True), with_kwargs=True
    )
    attention.register_forward_hook(
        lambda module, args, kwargs, out: record.update(kwargs["record"]), with_kwargs=True
    )
    model.encode(**inputs)
    mask = inputs["attention_mask"].bool()
    weights = record["attention"][:, 0]  # [B, P + N, P + N]; of a stream BOS stands first
    weights = weights[:, -mask.shape[1] :, -mask.shape[1] :]
    expected = ((weights > 1e-9) & mask.unsqueeze(2)).sum(1)
    assert torch.equal(seen["visible"][mask], expected[mask])


def test_a_saved_model_keeps_its_layout_and_its_mask(tmp_path):
    for name, build in MODELS.items():
        model = build()
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name)
        expected = recommend(model, HISTORIES)
        found = recommend(loaded, HISTORIES)
        assert torch.equal(expected[0], found[0])
        torch.testing.assert_close(expected[1], found[1])
        assert loaded.state_dict().keys() == model.state_dict().keys()


# --- What does not fit


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"targets": 2}, "targets=2"),
        ({"targets": "all", "pruning": PruningConfig()}, "start_from"),
        ({"targets": "all", "arch": "qwen", "layout": "bos_last"}, "layout='stream'"),
        ({"targets": "all", "encoder_mask": "full"}, "encoder_mask='items'"),
        ({"targets": "all", "windows": "contiguous"}, "windows='contiguous'"),
        ({"targets": "all", "padding": "fixed"}, "padding='fixed'"),
        ({"layout": "stream"}, "arch='qwen'"),
        ({"arch": "qwen", "encoder_mask": "items"}, "arch='t5'"),
        ({"arch": "qwen", "cross_bias": True}, "cross_bias=True belongs to arch='t5'"),
        ({"arch": "qwen", "position_init": 8.0}, "position_init=8.0 belongs to arch='t5'"),
        ({"average_last": 1.0}, "average_last must be from 0 and below 1, got 1.0"),
        (
            {"arch": "qwen", "checkpoint": "x", "level_embeddings": True},
            "level_embeddings=True is for models that start from nothing",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_models_that_do_not_fit_are_refused():
    tokens = history_tokens(np.array([[5, 9, 2]]), TABLE)
    labels = TABLE.item_tokens[[9, 2]].unsqueeze(0)
    for build, message in ((test_qwen.build, "stream"), (test_t5.build, "items")):
        with pytest.raises(ValueError, match=message):
            build()(input_ids=tokens, labels=labels)
    for build in (qwen, t5):
        with pytest.raises(ValueError, match="prunes nothing"):
            build(PruningConfig())(input_ids=tokens, labels=labels)
        with pytest.raises(ValueError, match="one item more"):
            build()(input_ids=tokens[:, :-4], labels=labels)
    with pytest.raises(ValueError, match="BOS"):
        qwen()(input_ids=tokens)
    with pytest.raises(ValueError, match="use_cache=True alone"):
        qwen().generate(F.pad(tokens, (1, 0), value=BOS), use_cache=False)
    with pytest.raises(ValueError, match="cross_bias=True needs encoder_outputs"):
        t5(cross_bias=True)(encoder_outputs=(torch.zeros(1, 4, 32),), labels=LABELS[:1])


# --- Training


@pytest.mark.parametrize("arch", ("qwen", "t5"))
def test_training_teaches_every_item(arch):
    catalogue = load_catalogue("planted", n_users=60, kinds=2)
    tree = catalogue.truth.tree
    table = SidTable(tree, tuple(int(w) + 1 for w in tree.max(0)))
    config = TrainConfig.preset(
        "smoke", arch=arch, targets="all", map=MapConfig(), max_items=8, max_updates=20
    )
    result = train(config, catalogue, table, progress=False)
    losses = [entry["loss"] for entry in result.log if "loss" in entry]
    assert losses[-1] < losses[0]
    parts = leave_one_out(catalogue.histories).train
    an_epoch = sum(len(part) - 1 for part in parts)
    assert 0 < result.timing["windows"] and result.timing["updates"] == 20
    assert result.timing["windows"] <= 20 * an_epoch
    assert result.tokens["kept_token_fraction"] == 1


# --- Continuing from a trained model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trained model of each architecture in a folder, with its catalogue and table."""
    catalogue = load_catalogue("planted", n_users=60, kinds=2)
    table = SidTable(catalogue.truth.tree, tuple(int(w) + 1 for w in catalogue.truth.tree.max(0)))
    folders = {}
    for arch in ("qwen", "t5"):
        config = TrainConfig.preset(
            "smoke", arch=arch, targets="all", level_embeddings=True, max_updates=10
        )
        folders[arch] = tmp_path_factory.mktemp(arch)
        train(config, catalogue, table, progress=False).model.save_pretrained(folders[arch])
    return catalogue, table, folders


def continuing(arch, **changes):
    return TrainConfig.preset(
        "smoke",
        arch=arch,
        **{"level_embeddings": True, "max_updates": 4, "eval_every": 2} | changes,
    )


@pytest.mark.parametrize("arch", ("qwen", "t5"))
def test_training_continues_from_the_weights_of_a_model(base, arch, tmp_path):
    catalogue, table, folders = base
    config = continuing(
        arch,
        learning_rate=0.0,
        muon=None,
        weight_decay=0.0,
        pruning=PruningConfig(),
        map=MapConfig(),
    )
    result = train(
        config,
        catalogue,
        table,
        start_from=folders[arch],
        output_dir=tmp_path / "run",
        progress=False,
    )
    before = type(result.model).from_pretrained(folders[arch])
    after = result.model.state_dict()
    for name, weight in before.state_dict().items():
        assert torch.equal(after[name], weight), name
    assert result.model.pruning == PruningConfig() and result.model.map_head is not None
    kept = {"qwen": ("layout", "stream"), "t5": ("encoder_mask", "items")}[arch]
    assert getattr(result.model.config, kept[0]) == kept[1]


def test_a_head_that_is_missing_is_the_fresh_models_and_one_too_many_is_left_out(base, tmp_path):
    catalogue, table, folders = base
    config = continuing("qwen", learning_rate=0.0, weight_decay=0.0, map=MapConfig())
    with_head = train(config, catalogue, table, start_from=folders["qwen"], progress=False).model
    fresh = build_model(config, table)
    assert torch.equal(with_head.map_head.projection, fresh.map_head.projection)
    with_head.save_pretrained(tmp_path)
    without = train(continuing("qwen"), catalogue, table, start_from=tmp_path, progress=False).model
    assert without.map_head is None


def test_a_run_remembers_what_it_started_from(base, tmp_path):
    catalogue, table, folders = base
    config = continuing("qwen")
    train(config, catalogue, table, start_from=folders["qwen"], output_dir=tmp_path, progress=False)
    assert json.loads((tmp_path / "run.json").read_text())["start_from"] == weights_digest(
        folders["qwen"]
    )
    with pytest.raises(ValueError, match="or start"):
        train(config, catalogue, table, output_dir=tmp_path, progress=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"d_model": 64}, "hidden_size=32"),
        ({"level_embeddings": False}, "level_embeddings=True"),
        ({"arch": "t5"}, "sid_qwen"),
        ({"separators": False}, "separators=True"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(base, changes, message):
    catalogue, table, folders = base
    with pytest.raises(ValueError, match=message):
        train(
            continuing(**{"arch": "qwen"} | changes),
            catalogue,
            table,
            start_from=folders["qwen"],
            progress=False,
        )


def test_a_start_of_other_sids_or_none_is_refused(base, tmp_path):
    catalogue, table, folders = base
    codes = table.codes.copy()
    codes[[0, 1]] = codes[[1, 0]]
    with pytest.raises(ValueError, match="other SIDs"):
        train(
            continuing("qwen"),
            catalogue,
            SidTable(codes, table.widths),
            start_from=folders["qwen"],
            progress=False,
        )
    with pytest.raises(ValueError, match="start_from=.* holds no model: config.json is missing"):
        train(continuing("qwen"), catalogue, table, start_from=tmp_path, progress=False)


def test_a_map_head_of_other_steps_is_refused(base, tmp_path):
    catalogue, table, folders = base
    three = continuing("qwen", max_updates=1, map=MapConfig(steps=3))
    train(
        three, catalogue, table, start_from=folders["qwen"], progress=False
    ).model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="map.steps=3, this configuration of 2"):
        train(
            continuing("qwen", map=MapConfig(steps=2)),
            catalogue,
            table,
            start_from=tmp_path,
            progress=False,
        )


@pytest.mark.parametrize(
    "arch, field, value", (("qwen", "layout", "bos_last"), ("t5", "encoder_mask", "full"))
)
def test_a_continued_preset_keeps_how_its_base_reads_a_row(base, arch, field, value, tmp_path):
    catalogue, table, _ = base
    first = TrainConfig.preset("smoke", arch=arch, max_updates=1)
    train(first, catalogue, table, progress=False).model.save_pretrained(tmp_path)
    then = TrainConfig.preset("smoke", arch=arch, continued=True, max_updates=1)
    after = train(then, catalogue, table, start_from=tmp_path, progress=False)
    assert getattr(after.model.config, field) == value
    older = {"model_type": f"sid_{arch}"}  # as models were saved that had no choice
    assert getattr(then.completed(older), field) == value
    with pytest.raises(ValueError, match=f'targets="all" needs {field}='):
        TrainConfig.preset("smoke", arch=arch, targets="all").completed(older)
