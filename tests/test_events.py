"""Tables of events as people have them: five public layouts in miniature, from the file to
recommendations in the caller's ids, and what is left out, refused and kept.
"""

import collections
import datetime
import gzip
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sidlab
from sidlab import catalogue_from_events, load_catalogue, save_catalogue
from sidlab.data.events import find_events, k_core
from sidlab.data.lines import DataIssues
from sidlab.data.tables import Table

# (user, item, time), not in the order of time: four users, five items, five events each
EVENTS = [
    (f"U{user}", f"B0{(user + step) % 5}", 100 + 10 * ((3 * step + user) % 5))
    for step in range(5)
    for user in range(4)
]
ITEMS = [f"B0{item}" for item in range(5)]
WHOLE = {"min_interactions": 4}


def expected(events=EVENTS):
    """{user: ids in order of time}; ties as in the table."""
    histories = collections.defaultdict(list)
    for row, (user, item, time) in enumerate(events):
        histories[user].append((time, row, item))
    return {user: [item for _, _, item in sorted(rows)] for user, rows in histories.items()}


def histories_of(catalogue):
    """{user: the caller's ids}."""
    return {
        user: catalogue.ids_of(history).tolist()
        for user, history in zip(catalogue.user_ids, catalogue.histories, strict=True)
    }


def text(path, rows, names=None, separator=",", encoding="utf-8"):
    lines = ([separator.join(names)] if names else []) + [
        separator.join(map(str, row)) for row in rows
    ]
    content = ("\n".join(lines) + "\n").encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def lines(path, records):
    text(path, [[json.dumps(record)] for record in records])


def number(text):
    """MovieLens and RecBole number users and items."""
    return int(text[1:]) + 1


# --- five public layouts: {name: (write into a folder, titles of the first item, ids are numbers)}


def recbole(folder):
    text(
        folder / "ml.inter",
        [(number(user), number(item), 5, f"{time}.0") for user, item, time in EVENTS],
        ["user_id:token", "item_id:token", "rating:float", "timestamp:float"],
        "\t",
    )
    text(
        folder / "ml.item",
        [(number(item), f"Film {item}", "Comedy Crime") for item in ITEMS],
        ["item_id:token", "movie_title:token_seq", "class:token_seq"],
        "\t",
    )
    text(folder / "ml.user", [(1, 24)], ["user_id:token", "age:token"], "\t")


def movielens_latest(folder):
    rows = [(number(user), number(item), 4.5, time) for user, item, time in EVENTS]
    text(folder / "ratings.csv", rows, ["userId", "movieId", "rating", "timestamp"])
    films = [(number(item), f'"Film {item}, The"', "Comedy|Crime") for item in ITEMS]
    text(folder / "movies.csv", films, ["movieId", "title", "genres"])
    tags = [(number(user), number(item), "fun", time) for user, item, time in EVENTS[:3]]
    text(folder / "tags.csv", tags, ["userId", "movieId", "tag", "timestamp"])


def movielens_1m(folder):
    rows = [(number(user), number(item), 5, time) for user, item, time in EVENTS]
    text(folder / "ratings.dat", rows, separator="::")
    films = [(number(item), f"Café {item}", "Comedy|Crime") for item in ITEMS]
    text(folder / "movies.dat", films, separator="::", encoding="latin-1")


def movielens_100k(folder):
    rows = [(number(user), number(item), 5, time) for user, item, time in EVENTS]
    text(folder / "u.data", rows, separator="\t")
    flags = [int(genre in (5, 6)) for genre in range(19)]
    films = [(number(item), f"Café {item}", "1995", "", "http://x", *flags) for item in ITEMS]
    text(folder / "u.item", films, separator="|", encoding="latin-1")


def amazon_2018(folder):
    lines(
        folder / "Beauty_5.json.gz",
        [
            {"reviewerID": user, "asin": item, "unixReviewTime": time, "reviewText": "x"}
            for user, item, time in EVENTS
        ],
    )
    lines(
        folder / "meta_Beauty.json.gz",
        [
            {
                "asin": item,
                "title": f"Soap &amp; {item}",
                "brand": None,
                "category": ["Beauty", "Soap"],
                "price": "$1.50",
            }
            for item in ITEMS
        ],
    )


def amazon_2023(folder):
    lines(
        folder / "Beauty.jsonl",
        [
            {
                "user_id": user,
                "asin": "B0variant",
                "parent_asin": item,
                "timestamp": time,
                "title": "Five stars",
                "text": "good",
            }
            for user, item, time in EVENTS
        ],
    )
    lines(
        folder / "meta_Beauty.jsonl",
        [
            {
                "parent_asin": item,
                "title": f"Soap &amp; {item}",
                "store": "Acme",
                "categories": ["Beauty", "Soap"],
                "price": None,
            }
            for item in ITEMS
        ],
    )


LAYOUTS = {
    "RecBole": (recbole, "Title: Film B00; Categories: Comedy Crime", True),
    "MovieLens latest": (
        movielens_latest,
        "Title: Film B00, The; Categories: Comedy > Crime",
        True,
    ),
    "MovieLens 1M": (movielens_1m, "Title: Café B00; Categories: Comedy > Crime", True),
    "MovieLens 100K": (movielens_100k, "Title: Café B00; Categories: Comedy > Crime", True),
    "Amazon 2018": (
        amazon_2018,
        "Title: Soap & B00; Categories: Beauty > Soap; Price: $1.50",
        False,
    ),
    "Amazon 2023": (
        amazon_2023,
        "Title: Soap & B00; Brand: Acme; Categories: Beauty > Soap",
        False,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_layouts_are_recognised_by_their_folder(tmp_path, layout, recwarn):
    write, first, numbers = LAYOUTS[layout]
    write(tmp_path)
    catalogue = load_catalogue(tmp_path, **WHOLE)
    assert not recwarn.list and catalogue.dirty == {}
    wanted = expected()
    if numbers:
        wanted = {
            str(number(user)): [str(number(item)) for item in items]
            for user, items in wanted.items()
        }
    assert histories_of(catalogue) == wanted
    item = catalogue.items_of(["1" if numbers else "B00"])[0]
    assert catalogue.items["text"][item - 1] == first
    # The path of the file gives the same
    events = find_events(tmp_path)
    assert load_catalogue(events, **WHOLE).fingerprint() == catalogue.fingerprint()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_a_public_layout_to_recommendations_in_the_callers_ids(tmp_path, layout):
    write, _, numbers = LAYOUTS[layout]
    write(tmp_path)
    save_catalogue(load_catalogue(tmp_path, **WHOLE), tmp_path / "kept")
    catalogue = load_catalogue(tmp_path / "kept")
    table, _ = sidlab.sid_tables.sid_table(catalogue, tmp_path, {"levels": 2, "width": 3})
    config = sidlab.TrainConfig.preset("smoke", max_updates=2, eval_every=2)
    model = sidlab.train(config, catalogue, table, progress=False).model
    items, _ = sidlab.recommend(model, catalogue.histories, k=3, exclude_seen=False)
    ids = catalogue.ids_of(items)
    known = {str(number(item)) for item in ITEMS} if numbers else set(ITEMS)
    assert ids.shape == (4, 3) and set(ids.ravel()) <= known


# --- ids, order, what is left out


@pytest.mark.parametrize("kind", ["csv", "tsv", "semicolons", "parquet", "jsonl", "list", "frame"])
def test_formats_agree(tmp_path, kind):
    frame = pd.DataFrame(EVENTS, columns=["visitor", "sku", "at"])
    path = tmp_path / "shop"
    if kind in ("csv", "tsv", "semicolons"):
        path = path.with_suffix(".tsv" if kind == "tsv" else ".csv")
        separator = {"csv": ",", "tsv": "\t", "semicolons": ";"}[kind]
        # As Windows writes it
        frame.to_csv(path, sep=separator, index=False, encoding="utf-8-sig", lineterminator="\r\n")
        path.write_bytes(path.read_bytes() + b"\r\n\r\n")
    elif kind == "parquet":
        frame.to_parquet(path := path.with_suffix(".parquet"))
    elif kind in ("jsonl", "list"):
        path = path.with_suffix(".json")
        frame.to_json(path, orient="records", lines=kind == "jsonl")
    source = frame if kind == "frame" else path
    read = catalogue_from_events(source, user="visitor", time="at", **WHOLE)
    assert histories_of(read) == expected() and read.dirty == {}
    assert read.name == ("events" if kind == "frame" else "shop")
    loaded = read if kind == "frame" else load_catalogue(path, user="visitor", time="at", **WHOLE)
    assert loaded.fingerprint() == read.fingerprint()


@pytest.mark.parametrize(
    "ids, kept",
    [
        ([10, 20, 30], [10, 20, 30]),
        ([1.0, 2.0, 3.5], [1, 2, "3.5"]),
        (["1", "007", " a b "], ["1", "007", "a b"]),
        (np.array([3, 1, 2], np.uint8), [3, 1, 2]),
        (pd.Series([1, 2, 3], dtype="Int64"), [1, 2, 3]),
        (pd.Categorical(["x", "y", "z"]), ["x", "y", "z"]),
    ],
    ids=str,
)
def test_ids_are_kept_as_the_caller_has_them(tmp_path, ids, kept):
    frame = pd.DataFrame({"user": ["u v", "u v", "w"], "item": ids})
    read = catalogue_from_events(frame, min_interactions=1)
    assert read.item_ids == kept and read.user_ids == ["u v", "w"]
    assert [type(one) for one in read.item_ids] == [type(one) for one in kept]
    assert read.ids_of(np.array([[2, 0], [1, 3]])).tolist() == [[kept[1], None], [kept[0], kept[2]]]
    assert read.items_of(kept[::-1]).tolist() == [3, 2, 1]
    save_catalogue(read, tmp_path)
    again = load_catalogue(tmp_path)
    assert again.item_ids == kept and again.user_ids == read.user_ids
    with pytest.raises(ValueError, match="ids must be among.*'unknown' and 0 more"):
        read.items_of([kept[0], "unknown"])
    with pytest.raises(ValueError, match=r"item ids 0..3, got .4"):
        read.ids_of([4])


def test_rows_without_an_id_are_left_out():
    nothing = [None, float("nan"), pd.NA, pd.NaT, "", " "]
    frame = pd.DataFrame({"user": "u", "item": ["a", *nothing]}, dtype=object)
    with pytest.warns(UserWarning, match="no item: 6"):
        assert catalogue_from_events(frame, min_interactions=1).item_ids == ["a"]


def test_text_and_number_are_one_id():
    frame = pd.DataFrame({"user": ["a", "a", 1], "item": ["1", 1.0, 1]}, dtype=object)
    read = catalogue_from_events(frame, min_interactions=1)
    assert read.item_ids == ["1"] and [len(history) for history in read.histories] == [2, 1]


TIMES = {
    "seconds": [3, 1, 2],
    "parts of a second": [1.75, 1.25, 1.5],
    "texts": ["3", "1", "2"],
    "texts, some with parts of a second": ["3", "1.5", "2"],
    "with exponents": ["3e9", "1e9", "2.5e9"],
    "nanoseconds": [10**18 + 3, 10**18 + 1, 10**18 + 2],
    "dates": ["2024-05-03", "2023-05-03T10:00:00Z", "2024-05-01 23:59"],
    "datetimes": [
        datetime.datetime(2024, 1, 3),
        datetime.date(2024, 1, 1),
        pd.Timestamp(2024, 1, 2),
    ],
}


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
def test_times_of_every_kind_give_the_order(times):
    frame = pd.DataFrame(
        {"user": "u", "item": ["c", "a", "b"], "time": pd.Series(times, dtype=object)}
    )
    assert histories_of(catalogue_from_events(frame, min_interactions=1)) == {"u": ["a", "b", "c"]}


def test_without_times_the_rows_are_the_order_and_ties_stay():
    rows = [("u", item, 5) for item in "cab"]
    frame = pd.DataFrame(rows, columns=["user", "item", "time"])
    assert histories_of(catalogue_from_events(frame, min_interactions=1)) == {"u": list("cab")}
    assert histories_of(catalogue_from_events(frame.drop(columns="time"), min_interactions=1)) == {
        "u": list("cab")
    }


def test_what_is_left_out_is_counted_and_named(tmp_path):
    path = tmp_path / "shop.csv"
    rows = [*EVENTS, EVENTS[3], ("lone", "B00", 7), ("U0", "rare", 8)]
    text(path, rows, ["user", "item", "timestamp"])
    dirty = [b"U0,,5", b"U0,B01", b"U0,B01,soon", b"U\xe9,B01,5"]
    path.write_bytes(path.read_bytes() + b"\n".join(dirty) + b"\n")
    with pytest.warns(UserWarning, match="dirty lines in .*shop.csv") as caught:
        read = catalogue_from_events(path, **WHOLE)
    assert len(caught) == 1 and histories_of(read) == expected()
    assert {kind: found["count"] for kind, found in read.dirty.items()} == {
        "rows that were there before": 1,
        "users with fewer than 4 interactions": 1,
        "items with fewer than 4 interactions": 1,
        "no item": 1,
        "2 fields in place of 3": 1,
        "a time that can't be read": 1,
        "not UTF-8": 1,
    }
    assert read.dirty["no item"]["first"] == "shop.csv line 25: 'U0,,5'"
    assert read.dirty["users with fewer than 4 interactions"]["first"] == "'lone'"
    with pytest.raises(ValueError, match="no item: .*shop.csv line 25"):
        catalogue_from_events(path, on_dirty="raise", **WHOLE)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), min_size=1),
    st.integers(1, 3),
)
def test_any_table_equals_brute_force(rows, k):
    frame = pd.DataFrame(rows, columns=["user", "item", "time"])
    left = list(dict.fromkeys(rows))  # equal rows count once
    while True:
        users = collections.Counter(user for user, _, _ in left)
        items = collections.Counter(item for _, item, _ in left)
        kept = [row for row in left if users[row[0]] >= k and items[row[1]] >= k]
        if len(kept) == len(left):
            break
        left = kept
    if not left:
        with pytest.raises(ValueError, match=f"min_interactions={k} leaves nothing"):
            catalogue_from_events(frame, min_interactions=k)
        return
    read = catalogue_from_events(frame, min_interactions=k)
    wanted = expected([(str(user), item, time) for user, item, time in left])
    assert histories_of(read) == wanted
    # In the order of first appearance
    assert read.user_ids == list(wanted)
    first = dict.fromkeys(item for history in wanted.values() for item in history)
    assert read.item_ids == list(first)


def test_k_core_keeps_all_of_a_core():
    users, items = np.array([[0, 0, 1, 1, 2], [0, 1, 0, 1, 1]])
    assert k_core(users, items, 2).tolist() == [True] * 4 + [False]


def test_a_quote_within_a_field_takes_no_other_row_with_it(tmp_path):
    rows = ['1,"two\nlines",a', '2,5" screen,b', "3,plain,c", '4,7" disc,d', '5,"a ""b""",e']
    (tmp_path / "a.csv").write_text("user,title,item\n" + "\n".join(rows) + "\n")
    found = [
        row for _, _, row in Table(tmp_path / "a.csv").rows(("user", "title"), DataIssues("warn"))
    ]
    assert found == [
        ["1", "two\nlines"],
        ["2", '5" screen'],
        ["3", "plain"],
        ["4", '7" disc'],
        ["5", 'a "b"'],
    ]
    # One that does not end takes no more than the library's limit
    text = '1,"open,a\n' + "2,x,b\n" * 100_000
    (tmp_path / "a.csv").write_text("user,title,item\n" + text)
    issues = DataIssues("warn")
    found = list(Table(tmp_path / "a.csv").rows(("user",), issues))
    assert len(found) > 70_000 and any("field larger" in kind for kind in issues.kinds)


def test_columns_with_names_of_their_own_are_found_in_a_folder(tmp_path):
    text(tmp_path / "shop.csv", EVENTS, ["who", "what", "when"])
    named = {"user": "who", "item": "what", "time": "when"}
    assert histories_of(load_catalogue(tmp_path, **named, **WHOLE)) == expected()


# --- descriptions


def test_items_come_from_a_frame_a_file_or_the_events_themselves(tmp_path):
    events = pd.DataFrame(EVENTS, columns=["user", "item", "time"])
    about = pd.DataFrame(
        {
            "item": ["B01", "B00", "other", "B00"],
            "name": ["Two", " One\n&lt;1&gt; ", "x", "again"],
            "categories": [["A", "B"], "C > D", [], []],
            "price": [2.5, float("nan"), 1, 1],
        }
    )
    with pytest.warns(UserWarning):
        read = catalogue_from_events(events, items=about, **WHOLE)
    texts = dict(zip(read.item_ids, read.items["text"]))
    assert texts["B01"] == "Title: Two; Categories: A > B; Price: 2.5"
    assert texts["B00"] == "Title: One <1>; Categories: C > D" and texts["B02"] is None
    assert {kind: found["count"] for kind, found in read.dirty.items()} == {
        "an item that was there before": 1,
        "items without a description": 3,
    }
    # Lines of JSON need not have the same keys
    lines(tmp_path / "some.jsonl", [{"item": "B00"}, {"item": "B01", "title": "Two"}])
    with pytest.warns(UserWarning):
        some = catalogue_from_events(events, items=tmp_path / "some.jsonl", **WHOLE)
    assert dict(zip(some.item_ids, some.items["title"]))["B01"] == "Two"
    about.drop(columns="categories").to_csv(tmp_path / "about.csv", index=False)
    with pytest.warns(UserWarning):
        of_file = catalogue_from_events(events, items=tmp_path / "about.csv", **WHOLE)
    assert of_file.items["title"].tolist() == read.items["title"].tolist()
    titled = events.assign(title="A " + events["item"])
    assert catalogue_from_events(titled, **WHOLE).items["title"].tolist() == [
        f"A {one}" for one in catalogue_from_events(titled, **WHOLE).item_ids
    ]
    with pytest.raises(ValueError, match="items=.* needs a column of the items' ids"):
        catalogue_from_events(events, items=pd.DataFrame({"title": ["x"]}), **WHOLE)


# --- refusals


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"when,what\n1,2\n", "no column of .* that of the user.*item.*Name them: user="),
        ("a.csv", b"u1,i1,5,100\nu1,i2,5,101\n", "first line with names is missing.*names="),
        ("a.csv", b"user,item\n", "holds no event"),
        ("a.csv", b"", "no column"),
        ("a.csv", b"user,item,item\n1,2,3\n", "column 'item' twice"),
        ("a.csv", "user,item\n1,2\n".encode("utf-16"), "must be UTF-8, it looks like UTF-16"),
        ("a.csv", "user,item\n1,2\n".encode("utf-16-le"), "must be UTF-8, it looks like UTF-16"),
        ("a.csv", "ué,item\n".encode("latin-1"), "must be UTF-8; line 1 is not"),
        ("a.csv.gz", gzip.compress(b"user,item\n" + b"1,2\n" * 9)[:-9], "damaged or cut off"),
        ("a.json", b'[{"user": 1', "must be JSON, a list of objects"),
        ("a.parquet", b"PAR1junk", "can't be read as Parquet"),
        ("a.csv", b"user,item\n1,2\n", "min_interactions=5 leaves nothing.*1 events of 1 users"),
    ],
)
def test_what_is_wrong_is_said_with_the_remedy(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        catalogue_from_events(tmp_path / name)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 400


def test_columns_that_are_named_must_be_there():
    frame = pd.DataFrame({"user": [1], "item": [1]})
    with pytest.raises(ValueError, match="time='when' is no column of the data frame; there are"):
        catalogue_from_events(frame, time="when")


def test_a_folder_of_another_kind_says_what_is_there_and_what_would_do(tmp_path):
    for name in ("notes.txt", "picture.png"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match="holds notes.txt, picture.png.*RecBole.*read_csv"):
        load_catalogue(tmp_path)
    text(tmp_path / "a.csv", EVENTS, ["user", "item", "time"])
    text(tmp_path / "b.csv", EVENTS, ["user", "item", "time"])
    with pytest.raises(ValueError, match="several tables of events, a.csv, b.csv: give the path"):
        load_catalogue(tmp_path)


def test_folders_with_ids_from_zero_or_an_event_a_line_are_refused(tmp_path):
    lines(tmp_path / "items.jsonl", [{"item_id": item} for item in (1, 2, 3)])
    text(tmp_path / "sequences.txt", [("u", 1, 0, 2)], separator=" ")
    with pytest.raises(ValueError, match="sequences.txt line 1: ids seem to start at 0.*add 1"):
        load_catalogue(tmp_path)
    text(tmp_path / "sequences.txt", [("u", 1), ("u", 2), ("v", 3)], separator=" ")
    with pytest.raises(ValueError, match="an event a line.*catalogue_from_events"):
        load_catalogue(tmp_path)
    lines(tmp_path / "items.jsonl", [{"item_id": item} for item in (0, 1, 2)])
    with pytest.raises(ValueError, match="items.jsonl seem to start at 0"):
        load_catalogue(tmp_path)


def test_marks_line_ends_blank_lines_and_entities_in_a_folder(tmp_path):
    records = [{"item_id": 1, "title": "Soap &amp; more"}, {"item_id": 2}]
    content = "\r\n".join(map(json.dumps, records)) + "\r\n\r\n\n"
    (tmp_path / "items.jsonl").write_bytes(b"\xef\xbb\xbf" + content.encode())
    (tmp_path / "sequences.txt").write_bytes(b"\xef\xbb\xbfu 1 2\r\nv 2 1\r\n\r\n")
    read = load_catalogue(tmp_path, on_dirty="raise")
    assert read.user_ids == ["u", "v"] and read.items["title"].tolist() == ["Soap & more", None]
    (tmp_path / "sequences.txt").write_bytes("u 1 2\n".encode("utf-16"))
    with pytest.raises(ValueError, match="sequences.txt must be UTF-8, it looks like UTF-16"):
        load_catalogue(tmp_path)
