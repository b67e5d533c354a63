"""Catalogues: what is checked, what a folder may get wrong, and what the text embeddings are."""

import dataclasses
import gzip
import importlib.machinery
import json
import sys
import types
import warnings

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import tokenizers
import torch
import transformers
from conftest import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.feature_extraction.text import TfidfVectorizer

from sidlab.data import load
from sidlab.data.catalogue import WEIGHTS, Catalogue, compose_text, text_parts
from sidlab.data.embeddings import as_embeddings
from sidlab.data.folder import read_folder, save_catalogue
from sidlab.data.load import load_catalogue
from sidlab.data.text import text_embeddings
from sidlab.sids.residual_kmeans import ResidualKMeans
from sidlab.sids.table import SidTable

ITEMS = [
    {"item_id": 1, "title": "Red lacquer", "brand": "OPI", "categories": ["Beauty", "Nails"]},
    {"item_id": 2, "text": "a blue brush"},
    {"item_id": 3},
]
SEQUENCES = ["u1 1 2 3", "u2 3 1"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SIDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SIDLAB_DATA", raising=False)


def write(folder, items=ITEMS, sequences=SEQUENCES):
    """Items may be dicts or raw lines."""
    folder.mkdir(exist_ok=True)
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    (folder / "items.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "sequences.txt").write_text("".join(line + "\n" for line in sequences))
    return folder


def frame(texts):
    return pd.DataFrame(
        {
            "item_id": range(1, len(texts) + 1),
            "title": None,
            "brand": None,
            "categories": [[] for _ in texts],
            "text": texts,
        }
    )


def catalogue(texts=("red", "blue brush", None), histories=((1, 2), (3,)), **options):
    users = [f"u{row}" for row in range(len(histories))]
    return Catalogue(
        "small", frame(list(texts)), [np.array(history) for history in histories], users, **options
    )


# --- the catalogue ---


def test_a_catalogue_holds_what_it_was_given():
    small = catalogue()
    assert (
        small.n_items == 3
        and small.user_ids == ["u0", "u1"]
        and small.truth is None
        and small.dirty == {}
    )
    assert [history.tolist() for history in small.histories] == [[1, 2], [3]]
    assert all(history.dtype == np.int64 for history in small.histories)
    assert small.items["text"].tolist() == [
        "red",
        "blue brush",
        None,
    ], "missing texts are None, not NaN"


@pytest.mark.parametrize(
    "histories, message",
    [
        (((0, 1),), "1..3"),
        (((1, 4),), "1..3"),
        (((),), "non-empty"),
        (((1.0, 2.0),), "integer"),
        ((((1, 2), (2, 3)),), "one-dimensional"),
    ],
)
def test_bad_histories_are_refused(histories, message):
    with pytest.raises(ValueError, match=message):
        catalogue(histories=histories)


def test_bad_items_users_and_embeddings_are_refused():
    with pytest.raises(ValueError, match="positions"):
        Catalogue("x", frame(["a", "b"]).assign(item_id=[1, 3]), [np.array([1])], ["u"])
    with pytest.raises(ValueError, match="missing columns .'text'"):
        Catalogue("x", frame(["a"]).drop(columns="text"), [np.array([1])], ["u"])
    with pytest.raises(ValueError, match="user_ids"):
        Catalogue("x", frame(["a"]), [np.array([1]), np.array([1])], ["u", "u"])
    with pytest.raises(ValueError, match=r"padding row with embeddings\[1:\]"):
        catalogue(embeddings=np.zeros((4, 2)))
    with pytest.raises(ValueError, match="item 2 is not"):
        catalogue(embeddings=[[1, 2], [np.nan, 0], [0, 0]])
    with pytest.raises(TypeError, match="items must be a DataFrame .*, got a list"):
        Catalogue("x", frame(["a"]).to_dict("records"), [np.array([1])], ["u"])
    for column, wrong, right in (
        ("title", 5, "a str or None"),
        ("text", 5, "a str or None"),
        ("categories", "a", "a list of str"),
        ("categories", [5], "a list of str"),
        ("categories", None, "a list of str"),
    ):
        with pytest.raises(ValueError, match=rf"items.{column} must be {right} .* for item 2"):
            Catalogue(
                "x",
                frame(["a", "b"]).assign(**{column: [*frame(["a"])[column], wrong]}),
                [np.array([1])],
                ["u"],
            )


def test_categories_may_be_arrays_and_tuples(tmp_path):
    items = frame(["a", "b"]).assign(categories=[np.array(["A", "B"]), ("C",)])
    save_catalogue(Catalogue("x", items, [np.array([1])], ["u"]), tmp_path)
    assert read_folder(tmp_path).items["categories"].tolist() == [["A", "B"], ["C"]]


def test_embeddings_are_the_given_ones_or_those_of_the_text():
    given_ones = catalogue(embeddings=np.arange(6).reshape(3, 2))
    assert given_ones.embeddings.dtype == np.float32 and given_ones.embeddings.tolist() == [
        [0, 1],
        [2, 3],
        [4, 5],
    ]
    late = catalogue()
    np.testing.assert_array_equal(late.embeddings, text_embeddings(["red", "blue brush", None]))
    assert late.embeddings is late.embeddings, "computed once"
    with pytest.raises(ValueError, match="embeddings.npy"):
        catalogue(texts=(None, None, None)).embeddings  # noqa: B018


def test_fingerprint_changes_with_what_training_sees_and_with_nothing_else():
    base = catalogue()
    same = catalogue(dirty={"x": {}}, truth="known")
    assert same.embeddings.any(), "computed late: not part of the data"
    assert base.fingerprint() == same.fingerprint()
    different = [
        catalogue(histories=((1,), (2, 3))),
        catalogue(histories=((2, 1), (3,))),
        catalogue(texts=("a", "b", None)),
        catalogue(texts=("red", "blue brush", "")),
        catalogue(embeddings=np.zeros((3, 2))),
        catalogue(embeddings=np.ones((3, 2))),
    ]
    assert len({small.fingerprint() for small in [base, *different]}) == 1 + len(different)


def test_compose_text():
    assert compose_text("Red", "OPI", ["A", "B"]) == "Title: Red; Brand: OPI; Categories: A > B"
    assert compose_text(None, "OPI", []) == "Brand: OPI" and compose_text(None, None, []) is None


# --- names and folders ---


def test_names_and_folders_find_their_catalogue(monkeypatch, tmp_path):
    write(tmp_path / "mine")
    assert load_catalogue(str(tmp_path / "mine")).name == "mine"
    with pytest.raises(ValueError, match="SIDLAB_DATA.*None"):
        load_catalogue("mine")
    monkeypatch.setenv("SIDLAB_DATA", str(tmp_path))
    assert load_catalogue("mine", embeddings=np.ones((3, 2))).embeddings.shape == (3, 2)
    with pytest.raises(ValueError, match=f"neither 'planted' nor a file or folder.*{tmp_path}"):
        load_catalogue("absent")
    with pytest.raises(ValueError, match="n_items"):
        load_catalogue("mine", n_items=3)


def test_a_catalogue_prints_itself_in_a_line():
    assert repr(load_catalogue("planted", n_users=20)).startswith(
        "Catalogue('planted': 160 items, 20 users, "
    )


def test_planted_gets_its_options(monkeypatch):
    monkeypatch.setattr(
        load, "planted_catalogue", lambda n: catalogue(texts=["a word"] * n, truth="known")
    )
    assert load_catalogue("planted", n=4).n_items == 4
    replaced = load_catalogue("planted", n=3, embeddings=np.eye(3))
    assert replaced.truth == "known" and replaced.embeddings.tolist() == np.eye(3).tolist()


def test_a_clean_folder_is_read_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_folder(write(tmp_path / "clean"))
    composed = "Title: Red lacquer; Brand: OPI; Categories: Beauty > Nails"
    assert read.items["text"].tolist() == [composed, "a blue brush", None]
    assert read.items["categories"].tolist() == [["Beauty", "Nails"], [], []]
    assert [history.tolist() for history in read.histories] == [
        [1, 2, 3],
        [3, 1],
    ] and read.user_ids == ["u1", "u2"]


DIRTY_ITEMS = {
    "unparsable JSON": [*ITEMS, '{"item_id": 4, "ti'],
    "no integer item_id": [*ITEMS, {"title": "who am I"}],
    "duplicate item_id": [*ITEMS, {"item_id": 3, "title": "again"}],
    "item_id out of order": [ITEMS[0], ITEMS[2], ITEMS[1]],
    "title is not a text": [*ITEMS[:2], {"item_id": 3, "title": 5}],
    "categories are not a list of texts": [*ITEMS[:2], {"item_id": 3, "categories": [["A", "B"]]}],
}
DIRTY_SEQUENCES = {
    "an id that is no integer": [*SEQUENCES, "u3 1_2 3"],  # 12 to Python
    "an item outside 1..3": [*SEQUENCES, "u3 1 4"],
    "empty sequence": [*SEQUENCES, "u3"],
    "duplicate user": [*SEQUENCES, "u1 1 1"],
}


@pytest.mark.parametrize("kind", [*DIRTY_ITEMS, *DIRTY_SEQUENCES])
def test_dirty_lines_are_counted_named_and_skipped_or_stop_the_reader(tmp_path, kind):
    folder = write(
        tmp_path / "dirty", DIRTY_ITEMS.get(kind, ITEMS), DIRTY_SEQUENCES.get(kind, SEQUENCES)
    )
    name = "items.jsonl" if kind in DIRTY_ITEMS else "sequences.txt"
    with pytest.warns(UserWarning, match=f"{kind}: 1 .first: {name} line [34]") as caught:
        read = load_catalogue(folder)
    assert len(caught) == 1 and read.dirty[kind]["count"] == 1
    assert read.n_items == 3 and [history.tolist() for history in read.histories] == [
        [1, 2, 3],
        [3, 1],
    ]
    assert read.items["text"].tolist()[1:] == [
        "a blue brush",
        None,
    ], "every item stands in its place"
    with pytest.raises(ValueError, match=f"{kind}.*{name} line [34]"):
        load_catalogue(folder, on_dirty="raise")


def test_dirty_kinds_are_counted_apart_and_the_first_is_named(tmp_path):
    folder = write(tmp_path / "dirty", sequences=["", "a 9", "b 1", "c 8", "d"])
    (folder / "sequences.txt").open("ab").write(b"e 1 \xe9\n")
    with pytest.warns(UserWarning):
        read = read_folder(folder)
    assert {kind: found["count"] for kind, found in read.dirty.items()} == {
        "empty sequence": 2,
        "an item outside 1..3": 2,
        "not UTF-8": 1,
    }
    assert read.dirty["an item outside 1..3"][
        "first"
    ] == "sequences.txt line 2: 'a 9'" and read.user_ids == ["b"]
    with pytest.raises(ValueError, match="on_dirty"):
        read_folder(folder, on_dirty="ignore")


@pytest.mark.parametrize(
    "items, missing",
    [
        ([ITEMS[0], "{broken", ITEMS[2]], "without a gap.*first missing id 2.*unparsable JSON: 1"),
        ([], "holds no item"),
        ([{"item_id": 0}, ITEMS[0]], "seem to start at 0"),
        ([ITEMS[1], ITEMS[2]], "without a gap.*first missing id 1"),
    ],
)
def test_a_gap_in_the_item_ids_is_an_error(tmp_path, items, missing):
    with pytest.raises(ValueError, match=missing):
        read_folder(write(tmp_path / "gap", items))


def test_missing_doubled_and_damaged_files_are_named(tmp_path):
    folder = write(tmp_path / "broken")
    packed = gzip.compress(json.dumps(ITEMS[0]).encode() * 100)
    (folder / "items.jsonl.gz").write_bytes(packed[:-9])
    with pytest.raises(ValueError, match="either items.jsonl.gz or items.jsonl"):
        read_folder(folder)
    (folder / "items.jsonl").unlink()
    with pytest.raises(ValueError, match="items.jsonl.gz is damaged"):
        read_folder(folder)
    (folder / "items.jsonl.gz").unlink()
    with pytest.raises(ValueError, match=r"found \[\]; there are \['sequences.txt'\]"):
        read_folder(folder)
    write(folder)
    for content in (b"", b"junk", b"PK\x03\x04"):
        (folder / "embeddings.npy").write_bytes(content)
        with pytest.raises(ValueError, match="embeddings.npy can't be read as an array"):
            read_folder(folder)
    (folder / "sequences.txt").unlink()
    (folder / "sequences.txt.gz").touch()
    with pytest.raises(ValueError, match="sequences.txt.gz holds no history"):
        read_folder(folder, embeddings=np.zeros((3, 2)))


@settings(max_examples=30)
@given(data=st.data(), n_items=st.integers(1, 6), with_embeddings=st.booleans())
def test_saving_and_reading_gives_the_same_catalogue(
    tmp_path_factory, data, n_items, with_embeddings
):
    word = st.none() | st.text(st.characters(codec="utf-8"), min_size=1) | st.just("&amp;lt; &")
    rows = [
        (data.draw(word), data.draw(word), data.draw(st.lists(st.text()))) for _ in range(n_items)
    ]
    items = pd.DataFrame(
        [(*row, data.draw(word) or compose_text(*row)) for row in rows],
        columns=["title", "brand", "categories", "text"],
    ).assign(item_id=range(1, n_items + 1))
    histories = data.draw(st.lists(st.lists(st.integers(1, n_items), min_size=1), max_size=4))
    users = [f"ü{row}" for row in range(len(histories))]
    embeddings = np.random.default_rng(0).normal(size=(n_items, 3)) if with_embeddings else None
    before = Catalogue("saved", items, histories, users, embeddings=embeddings)
    folder = tmp_path_factory.mktemp("round") / "saved"
    save_catalogue(before, folder)
    after = read_folder(folder, on_dirty="raise")
    assert (
        after.fingerprint() == before.fingerprint()
        and after.name == "saved"
        and after.user_ids == users
    )
    assert after.items.to_dict("records") == before.items.to_dict("records")
    assert (after.given_embeddings is not None) == with_embeddings


def test_saving_again_replaces_all_and_bad_user_ids_are_refused(tmp_path):
    save_catalogue(catalogue(embeddings=np.eye(3)), tmp_path)
    save_catalogue(catalogue(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "items.jsonl.gz",
        "sequences.txt.gz",
    ]
    with pytest.raises(ValueError, match="tabs.*'a\\\\tb'"):
        save_catalogue(Catalogue("x", frame(["a"]), [np.array([1])], ["a\tb"]), tmp_path)


# --- text ---

TEXTS = ["red nail polish", "dark red nail polish", "steel bolt", "steel screw and bolt", None, ""]


def cosines(*parts, weights=(1,)):
    """[n, n]: of the weighted sum of the TF-IDF of `parts`, lists of n texts, words and 0.7 × runs
    of characters side by side.
    """
    whole = [" ".join(of_item) for of_item in zip(*parts)]
    blocks = []
    for kind, size in (
        ({"ngram_range": (1, 2)}, 1),
        ({"analyzer": "char_wb", "ngram_range": (2, 4)}, 0.7),
    ):
        tf_idf = TfidfVectorizer(**kind, sublinear_tf=True, max_df=len(whole) - 1).fit(whole)
        blocks.append(
            size
            * sum(weight * tf_idf.transform(part).toarray() for weight, part in zip(weights, parts))
        )
    rows = np.hstack(blocks)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def test_text_embeddings_of_full_rank_have_the_cosines_of_tf_idf():
    embeddings = text_embeddings(TEXTS)
    assert embeddings.shape == (6, 4) and embeddings.dtype == np.float32, (
        "4 texts span at most 4 dimensions"
    )
    np.testing.assert_allclose((embeddings @ embeddings.T)[:4, :4], cosines(TEXTS[:4]), atol=1e-5)
    assert not embeddings[4:].any(), "no text, no direction"


def test_text_embeddings_shrink_and_have_unit_rows():
    assert text_embeddings(TEXTS, dim=2).shape == (6, 2)
    assert abs(text_embeddings(["two words"])).tolist() == [[1]], "one text, one dimension"
    np.testing.assert_allclose(
        np.linalg.norm(text_embeddings(TEXTS, dim=2)[:4], axis=1), 1, rtol=1e-5
    )
    for texts in ([None, ""], ["! ?"]):
        with pytest.raises(ValueError, match="words"):
            text_embeddings(texts)
    with pytest.raises(ValueError, match="dim"):
        text_embeddings(TEXTS, dim=0)


def test_parts_of_texts_are_weighed():
    titles = TEXTS[:4]
    paths = ["beauty nails", "beauty nails", "tools", "tools fasteners"]
    weights = (1.0, 0.25)
    embeddings = text_embeddings(list(zip(titles, paths)), weights=weights)
    np.testing.assert_allclose(
        embeddings @ embeddings.T, cosines(titles, paths, weights=weights), atol=1e-5
    )
    whole = text_embeddings([(title, None) for title in titles], weights=weights)
    np.testing.assert_allclose(abs(whole), abs(text_embeddings(titles)), atol=1e-5)
    for bad in ((1.0,), (1.0, -1.0), (1.0, np.nan)):
        with pytest.raises(ValueError, match="weights must hold"):
            text_embeddings(list(zip(titles, paths)), weights=bad)
    with pytest.raises(ValueError, match="leave them out"):
        text_embeddings(list(zip(titles, paths)), weights=weights, encoder="any")


def test_what_all_texts_or_one_of_many_alone_have_says_nothing():
    for texts in (["word", None, "word"], ["Word!", "word"]):
        with pytest.raises(ValueError, match=r"2 non-empty ones \(1 distinct\)"):
            text_embeddings(texts)
    many = [f"shared {chr(0x4E00 + row)}" for row in range(1200)]  # a sign of its own each
    with pytest.raises(ValueError, match=r"1200 non-empty ones \(1200 distinct\)"):
        text_embeddings(many)
    known = text_embeddings([*many, "shared word", "shared word"])
    assert not known[:1200].any() and known[1200:].any(axis=1).all(), (
        "from 1,000 texts on a term must occur twice"
    )


SCRIPTS = {  # twelve colours and twelve things
    "Chinese": (
        "红绿蓝黑白黄紫灰金银橙粉",
        [
            "电饭煲",
            "洗衣机",
            "吹风机",
            "台灯",
            "水杯",
            "书包",
            "雨伞",
            "手表",
            "耳机",
            "键盘",
            "枕头",
            "毛巾",
        ],
        "色的",
    ),
    "Devanagari": (
        [
            "लाल",
            "हरा",
            "नीला",
            "काला",
            "सफेद",
            "पीला",
            "बैंगनी",
            "भूरा",
            "सुनहरा",
            "चांदी",
            "नारंगी",
            "गुलाबी",
        ],
        [
            "कुर्सी",
            "मेज",
            "दीपक",
            "घड़ी",
            "थैला",
            "छाता",
            "तकिया",
            "तौलिया",
            "किताब",
            "कलम",
            "जूता",
            "टोपी",
        ],
        " ",
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_titles_in_any_script_tell_items_apart_and_likeness_is_that_of_their_words(script):
    colours, things, between = SCRIPTS[script]
    names = [(colour, thing) for colour in colours for thing in things]
    # Eight of each: 1,152 titles, from which on rare terms are left out
    number = [str(n) for n in range(8)]
    items = pd.DataFrame(
        [
            (f"{colour}{between}{thing} {n}", None, [], None)
            for colour, thing in names
            for n in number
        ],
        columns=["title", "brand", "categories", "text"],
    )
    items["text"] = [compose_text(title, None, []) for title in items["title"]]
    shop = Catalogue(
        "shop", items.assign(item_id=range(1, len(items) + 1)), [np.array([1, 2])], ["u"]
    )
    x = shop.embeddings
    assert x.any(axis=1).all() and len(np.unique(x.round(4), axis=0)) == len(x)
    thing = np.repeat(np.tile(np.arange(12), 12), 8)
    near = np.argsort(-(x @ x.T), axis=1)[:, 1:6]
    assert (thing[near] == thing[:, None]).mean() > 0.9
    codes = ResidualKMeans(levels=3, width=32).fit(x).encode(x)
    assert SidTable(codes, 32).report()["collision_rate"] < 0.5


def test_the_parts_of_a_text_have_no_labels_and_no_root_that_all_share():
    rows = [
        ("Red lacquer", "OPI", ["Beauty", "Nails"], "; Price: 5"),
        ("Title: a film", None, ["Beauty", "Hair", "Care"], "; Description: soft; Brand: new"),
        (None, None, [], "a text of its own; Title: not ours"),
        ("Blue", None, [], None),
        (None, None, [], None),
    ]
    items = frame([None] * 5).assign(
        title=[row[0] for row in rows],
        brand=[row[1] for row in rows],
        categories=[row[2] for row in rows],
    )
    items["text"] = [(compose_text(*row[:3]) or "") + (row[3] or "") or None for row in rows]
    shop = Catalogue("shop", items, [np.array([1, 2])], ["u"])
    assert text_parts(shop.items) == [
        ("Red lacquer", "OPI", "Nails", "5"),
        ("Title: a film", None, "Hair Care", "soft; Brand: new"),
        ("a text of its own; Title: not ours", None, None, None),
        ("Blue", None, "", ""),
        (None, None, None, None),
    ]
    np.testing.assert_array_equal(
        shop.embeddings, text_embeddings(text_parts(shop.items), weights=WEIGHTS.values())
    )
    assert not shop.embeddings[4].any() and shop.embeddings[:4].any(axis=1).all()


def test_text_embeddings_come_from_the_cache_unless_it_is_unreadable(monkeypatch, tmp_path):
    first = text_embeddings(TEXTS)
    (cached,) = (tmp_path / "cache").iterdir()
    text_embeddings(TEXTS, dim=2)
    text_embeddings(TEXTS[::-1])
    assert len(list((tmp_path / "cache").iterdir())) == 3, "other settings or texts, another entry"
    with monkeypatch.context() as patch:
        patch.setattr(
            "sklearn.feature_extraction.text.TfidfVectorizer", None
        )  # computing would fail
        np.testing.assert_array_equal(text_embeddings(TEXTS), first)
        with pytest.raises(TypeError):
            text_embeddings(TEXTS, cache=False)
    cached.write_bytes(cached.read_bytes()[:50])
    with pytest.warns(UserWarning, match="recomputing"):
        np.testing.assert_array_equal(text_embeddings(TEXTS), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text_embeddings(TEXTS)  # the entry was replaced
    monkeypatch.setenv("SIDLAB_CACHE", str(cached))  # a file: nothing can be written below it
    with pytest.warns(UserWarning, match="not cached"):
        np.testing.assert_array_equal(text_embeddings(TEXTS), first)


# --- text encoders by name ---

WORDS = ["[PAD]", "[UNK]", "red", "dark", "nail", "polish", "steel", "bolt", "and"]
SIZES = {"vocab_size": len(WORDS), "pad_token_id": 0}
LONG = [
    "red",
    None,
    "dark red nail polish and steel bolt",
    "steel bolt",
    "",
    "what is this and that",
] * 20 + ["red " * 40]


def save_encoder(folder, kind, seed=0):
    """A tiny random model in `folder`, with a tokenizer of whole words."""
    torch.manual_seed(seed)
    if kind == "bert":
        small = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        }
        model = transformers.BertModel(
            transformers.BertConfig(**SIZES, **small, max_position_embeddings=24)
        )
    elif kind == "t5":
        small = {
            "d_model": 16,
            "d_kv": 8,
            "num_heads": 2,
            "d_ff": 16,
            "num_layers": 2,
            "decoder_start_token_id": 0,
        }
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES, **small))
    else:  # an encoder-decoder that has no class for its encoder alone
        small = {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "decoder_start_token_id": 0,
            "forced_eos_token_id": 0,
        }
        model = transformers.BartModel(
            transformers.BartConfig(**SIZES, **small, max_position_embeddings=48)
        )
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", padding_side="left"
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["bert", "t5", "bart"])
def test_a_text_encoder_gives_the_mean_over_real_tokens(kind, tmp_path):
    model = save_encoder(tmp_path / "model", kind)
    encoder, longest = (model, 24) if kind == "bert" else (model.get_encoder(), 48)
    state = torch.random.get_rng_state()
    embeddings = text_embeddings(LONG, encoder=tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert embeddings.shape == (121, 16) and embeddings.dtype == np.float32
    for row, text in zip(embeddings, LONG):
        if not text:
            assert not row.any()
            continue
        ids = [WORDS.index(word) if word in WORDS else 1 for word in text.split()][:longest]
        with torch.no_grad():
            # Alone, so nothing is padded
            hidden = encoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
        np.testing.assert_allclose(row, sum(hidden) / len(ids), atol=1e-5)


def test_text_embeddings_by_an_encoder_are_cached_until_its_files_change(monkeypatch, tmp_path):
    save_encoder(tmp_path / "model", "bert")
    first = text_embeddings(TEXTS, encoder=str(tmp_path / "model"))
    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModel, "from_pretrained", None)  # computing would fail
        np.testing.assert_array_equal(
            text_embeddings(TEXTS, encoder=str(tmp_path / "model")), first
        )
        with pytest.raises(TypeError):
            text_embeddings(TEXTS[:4], encoder=str(tmp_path / "model"))
    save_encoder(tmp_path / "model", "bert", seed=1)
    assert np.abs(text_embeddings(TEXTS, encoder=str(tmp_path / "model")) - first).max() > 0.1


def test_a_model_of_sentence_transformers_pools_by_itself_or_says_that_it_does_not(
    monkeypatch, tmp_path
):
    save_encoder(tmp_path / "model", "bert")
    plain = text_embeddings(TEXTS, encoder=tmp_path / "model", cache=False)
    (tmp_path / "model" / "modules.json").write_text("[]")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as if it were not installed
    with pytest.warns(UserWarning, match="mean pooling is used .* install sentence-transformers"):
        np.testing.assert_array_equal(text_embeddings(TEXTS, encoder=tmp_path / "model"), plain)

    class SentenceTransformer:
        def __init__(self, folder):
            assert folder == str(tmp_path / "model")

        def encode(self, texts, batch_size):
            return np.array([[len(text), 1] for text in texts], np.float32)

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer
    module.__spec__ = importlib.machinery.ModuleSpec("sentence_transformers", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = text_embeddings(TEXTS, encoder=tmp_path / "model")
    assert own.tolist() == [[len(text), 1] if text else [0, 0] for text in TEXTS], (
        "and not what the cache has of mean pooling"
    )


def test_a_text_encoder_that_is_not_there_is_named_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text('{"model_type": "bert"}')
    for name in (
        "nobody/has-this-model",
        tmp_path / "missing",
        tmp_path / "empty",
        tmp_path / "half",
    ):
        with pytest.raises(
            ValueError,
            match=r"text encoder '.*' can't be loaded(.|\n)*local folder(.|\n)*hf download",
        ) as error:
            text_embeddings(TEXTS, encoder=name)
        assert repr(str(name)) in str(error.value)
    with pytest.raises(ValueError, match="words"):
        text_embeddings([None, ""], encoder=tmp_path / "half")


def test_a_catalogue_embeds_its_texts_with_the_encoder_it_is_given(tmp_path):
    write(tmp_path / "shop")
    np.save(tmp_path / "shop" / "embeddings.npy", np.ones((3, 2), np.float32))
    save_encoder(tmp_path / "model", "t5")
    shop = load_catalogue(tmp_path / "shop", text_encoder=tmp_path / "model")
    wanted = text_embeddings(shop.items["text"], encoder=tmp_path / "model")
    np.testing.assert_array_equal(shop.embeddings, wanted)
    assert shop.given_embeddings is None and shop.embeddings.shape == (3, 16)
    assert shop.fingerprint() != load_catalogue(tmp_path / "shop").fingerprint()
    with pytest.raises(ValueError, match="give one of them"):
        load_catalogue(
            tmp_path / "shop", text_encoder=tmp_path / "model", embeddings=np.ones((3, 2))
        )


# --- real data: the table of shared/data/README.md ---


@needs_shared
@pytest.mark.parametrize(
    "name, users, items, interactions, shortest, longest",
    [
        ("amazon-beauty", 22363, 12101, 198502, 5, 204),
        ("amazon-sports", 35598, 18357, 296337, 5, 296),
        ("amazon-scientific", 8317, 4344, 58492, 5, 78),
        ("ciao", 7375, 105114, 282650, 4, 1543),
        ("epinions", 22164, 296277, 912441, 1, 5337),
    ],
)
def test_real_catalogues_have_the_published_counts(
    monkeypatch, name, users, items, interactions, shortest, longest
):
    monkeypatch.setenv("SIDLAB_DATA", str(SHARED))
    read = load_catalogue(name, on_dirty="raise")
    lengths = [len(history) for history in read.histories]
    assert (len(lengths), read.n_items, sum(lengths)) == (users, items, interactions)
    assert (min(lengths), max(lengths)) == (shortest, longest)
    assert read.items["text"].map(type).eq(str).all(), (
        "where there is no text, it is composed of the categories"
    )


@needs_shared
def test_text_neighbours_of_real_items_share_their_category():
    read = load_catalogue(SHARED / "amazon-beauty").items[:1000]
    leaves = np.array([categories[-1] for categories in read["categories"]])
    embeddings = text_embeddings(read["text"], dim=64)
    similar = embeddings @ embeddings.T - 2 * np.eye(len(embeddings))
    by_chance = np.mean(leaves[:, None] == leaves)
    assert np.mean(leaves[similar.argmax(axis=1)] == leaves) > 0.7 > 10 * by_chance


def test_ids_stay_when_other_parts_are_replaced(tmp_path):
    plain = catalogue()
    assert list(plain.item_ids) == [1, 2, 3]
    more = dataclasses.replace(plain, items=frame(["a", "b", "c", "d"]), embeddings=np.eye(4))
    assert list(more.item_ids) == [1, 2, 3, 4]
    save_catalogue(plain, tmp_path)
    assert "source_id" not in gzip.decompress((tmp_path / "items.jsonl.gz").read_bytes()).decode()
    named = dataclasses.replace(plain, item_ids=["x", "y", "z"], embeddings=None)
    assert dataclasses.replace(named, embeddings=None).item_ids == ["x", "y", "z"]
    with pytest.raises(ValueError, match="item_ids must name each of the 4 items once, got 3"):
        dataclasses.replace(named, items=frame(["a", "b", "c", "d"]), embeddings=None)


# --- embeddings ---

VECTORS = np.arange(6, dtype=np.float32).reshape(3, 2)
NAMES = ["B1", 7, "B3"]
BY_ID = {"B3": VECTORS[2], "7": VECTORS[1], "B1": VECTORS[0], "other": VECTORS[0]}


def saved(path, **arrays):
    """The path of a file of these arrays, or of one alone named "only"."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return path
    tensors = {name: torch.tensor(one) for name, one in arrays.items()}
    if path.suffix == ".npy":
        np.save(path, arrays["only"])
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors.get("only", tensors), path)
    return path


EMBEDDINGS = {
    "float64": lambda folder: VECTORS.astype(np.float64),
    "float16": lambda folder: VECTORS.astype(np.float16),
    "integers": lambda folder: VECTORS.astype(np.int8),
    "Fortran": lambda folder: np.asfortranarray(VECTORS),
    "lists": lambda folder: VECTORS.tolist(),
    "bfloat16": lambda folder: torch.from_numpy(VECTORS).bfloat16().requires_grad_(),
    "by id": lambda folder: BY_ID,
    "tensors by id": lambda folder: {name: torch.tensor(one) for name, one in BY_ID.items()},
    "frame": lambda folder: pd.DataFrame(VECTORS),
    "frame by id": lambda folder: pd.DataFrame(
        [(name, *vector) for name, vector in BY_ID.items()], columns=["item_id", "x", "y"]
    ),
    "frame by float ids": lambda folder: pd.DataFrame(
        [(name, *vector) for name, vector in zip(["B1", 7.0, "B3"], VECTORS)],
        columns=["movieId", "x", "y"],
    ),
    "lists by id": lambda folder: pd.DataFrame(
        {"asin": list(BY_ID), "vector": [list(one) for one in BY_ID.values()]}
    ),
    ".npy": lambda folder: saved(folder / "a.npy", only=VECTORS),
    ".npz": lambda folder: saved(folder / "a.npz", only=VECTORS),
    ".npz by id": lambda folder: saved(folder / "a.npz", **BY_ID),
    ".npz, two": lambda folder: saved(
        folder / "a.npz", ids=np.array(list(BY_ID)), vectors=np.stack(list(BY_ID.values()))
    ),
    ".safetensors": lambda folder: saved(folder / "a.safetensors", only=VECTORS),
    ".safetensors by id": lambda folder: saved(folder / "a.safetensors", **BY_ID),
    ".pt": lambda folder: saved(folder / "a.pt", only=VECTORS.astype(np.float16)),
    ".pt by id": lambda folder: str(saved(folder / "a.pt", **BY_ID)),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings_of_every_kind_are_put_in_the_items_order(tmp_path, kind):
    made = Catalogue(
        "x",
        frame(["a", "b", "c"]),
        [np.array([1])],
        ["u"],
        embeddings=EMBEDDINGS[kind](tmp_path),
        item_ids=NAMES,
    )
    assert made.embeddings.dtype == np.float32 and made.embeddings.tolist() == VECTORS.tolist()


def test_embeddings_in_parquet(tmp_path):
    EMBEDDINGS["lists by id"](tmp_path).to_parquet(tmp_path / "a.parquet")
    found = as_embeddings(tmp_path / "a.parquet", NAMES)
    assert found.tolist() == VECTORS.tolist()


@pytest.mark.parametrize(
    "given, message",
    [
        (VECTORS.T, r"shape \[3, d\], got \[2, 3\] .one column an item.*embeddings.T"),
        (np.zeros((4, 2)), r"one row too many.*embeddings\[1:\]"),
        (np.zeros(3), r"shape \[3, d\], got \[3\]"),
        ({"B1": [1, 2], "B3": [1, 2]}, "no row for 1 of 3 items, the first is '7'"),
        ({"ids": ["B1"], "vectors": VECTORS}, "1 ids in 'ids' for 3 vectors"),
        (pd.DataFrame({"id": ["B1", "B1"], "x": [1, 2]}), "two rows for id='B1'"),
        (BY_ID | {"7": [1]}, "vectors of one length.*the item '7'"),
        (np.array([[1, 2], [np.nan, 1], [1, 2]]), "finite; item 7 is not"),
        ([["a", "b"]] * 3, "must be numbers"),
        ("absent.npy", "embeddings='absent.npy' is no file"),
        (__file__, "must be a file of the kinds .npy"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_embeddings_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message) as error:
        as_embeddings(given, NAMES)
    assert len(str(error.value)) < 400


def test_embeddings_beside_the_items_are_read_or_named(tmp_path):
    folder = write(tmp_path / "shop")
    saved(folder / "embeddings.safetensors", only=VECTORS)
    assert read_folder(folder).embeddings.tolist() == VECTORS.tolist()
    saved(folder / "embeddings.pt", only=VECTORS)
    with pytest.raises(ValueError, match="one file of embeddings, found"):
        read_folder(folder)
    for path in folder.glob("embeddings.*"):
        path.unlink()
    saved(folder / "sasrec_emb.npy", only=VECTORS)
    with pytest.warns(UserWarning, match="not read is sasrec_emb.npy; give embeddings="):
        read_folder(folder)
    again = load_catalogue(folder, embeddings=folder / "sasrec_emb.npy")
    assert again.embeddings.tolist() == VECTORS.tolist()
