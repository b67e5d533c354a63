"""The raw Amazon files: what is read from them, which events the 5-core keeps, and downloads that
break off.
"""

import gzip
import http.server
import json
import re
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidlab.data import amazon
from sidlab.data.amazon import fetch_amazon, k_core, read_amazon
from sidlab.data.folder import read_folder, save_catalogue
from sidlab.data.load import load_catalogue

DAY = 86400


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SIDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("SIDLAB_DATA", raising=False)


def review(user, asin, day=0):
    return json.dumps(
        {
            "reviewerID": user,
            "asin": asin,
            "reviewerName": 'O\'Neill "x"',
            "helpful": [0, 1],
            "reviewText": "ok\n",
            "overall": 5.0,
            "summary": "é",
            "unixReviewTime": day * DAY,
            "reviewTime": "01 30, 2014",
        }
    )


def metadata(asin, **fields):
    others = {
        "imUrl": "http://x/y.jpg",
        "related": {"also_bought": ["i0", "zz"]},
        "salesRank": {"Beauty": 7},
    }
    return ascii({"asin": asin, "description": 'It\'s a "thing"', **fields, **others})


# The smallest 5-core: everybody has everything, all on one day but for u1, who had i3 a day before.
REVIEWS = [
    review(f"u{user}", f"i{item}", day=2 - (user == 1 and item == 3))
    for item in range(5)
    for user in range(5)
]
META = [metadata(f"i{item}", title=f"Title {item}", categories=[["Beauty"]]) for item in range(5)]


def packed(lines):
    return gzip.compress(
        b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    )


def write(folder, reviews=REVIEWS, meta=META, category="Beauty", core="_5"):
    folder.mkdir(exist_ok=True)
    (folder / f"reviews_{category}{core}.json.gz").write_bytes(packed(reviews))
    (folder / f"meta_{category}.json.gz").write_bytes(packed(meta))
    return folder


def sequences(catalogue):
    return {
        user: history.tolist()
        for user, history in zip(catalogue.user_ids, catalogue.histories, strict=True)
    }


# --- reading ---


def test_histories_are_in_time_with_ties_as_in_the_file_and_items_numbered_as_met(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = load_catalogue(write(tmp_path / "mine"))
    assert read.name == "mine" and read.dirty == {}
    others = {f"u{user}": [1, 2, 3, 4, 5] for user in (0, 2, 3, 4)}
    assert sequences(read) == {**others, "u1": [4, 1, 2, 3, 5]} and read.user_ids == [
        "u0",
        "u1",
        "u2",
        "u3",
        "u4",
    ]
    assert read.items["title"].tolist() == [f"Title {item}" for item in range(5)]
    reversed_ties = read_amazon(write(tmp_path / "reversed", REVIEWS[::-1]))
    assert reversed_ties.user_ids == ["u4", "u3", "u2", "u1", "u0"]
    assert sequences(reversed_ties)["u1"] == [
        2,
        1,
        3,
        4,
        5,
    ], "i3 first, then i4 (item 1), i2, i1, i0"
    assert reversed_ties.items["title"].tolist() == [f"Title {item}" for item in (4, 3, 2, 1, 0)]


def test_texts_are_python_literals_with_entities_decoded_and_missing_parts_left_out(tmp_path):
    meta = [
        (
            r"""{'asin': 'i0', 'title': 'Caf\xe9 \u2013 "Cr&egrave;me" &amp;  brush\n', """
            r"""'price': 9.99, 'brand': "L'Or&#233;al", """
            r"""'categories': [['Beauty', 'Tools &amp; Accessories'], ['Home']], """
            r"""'related': {'also_viewed': ['i1']}}"""
        ),
        '{"brand": "", "title": "O\'Neill", u"asin": u"i1", "categories": [[]]}',
        "{'asin': 'i2', 'price': 12, 'title': None, 'categories': []}",
        "{'title': 'says \\'asin\\': \\'i9\\'', 'asin': 'i3', 'price': 0.0}",
        "{'asin': 'i4'}",
        "{'asin': 'i9', not read, since nobody bought it",
    ]
    read = read_amazon(write(tmp_path / "mine", meta=meta), on_dirty="raise")
    first = (
        'Title: Café – "Crème" & brush; Brand: L\'Oréal; Categories: Beauty > Tools & Accessories;'
        " Price: 9.99"
    )
    third = "Title: says 'asin': 'i9'"
    assert read.items["text"].tolist() == [first, "Title: O'Neill", "Price: 12", third, None]
    assert read.items["categories"].tolist() == [["Beauty", "Tools & Accessories"], [], [], [], []]
    assert read.items["brand"].tolist() == ["L'Oréal", None, None, None, None]
    save_catalogue(read, tmp_path / "saved")
    assert read_folder(tmp_path / "saved").fingerprint() == read.fingerprint()


def test_metadata_is_never_run(tmp_path):
    ran = tmp_path / "ran"
    attack = f"{{'asin': 'i0', 'title': __import__('pathlib').Path({str(ran)!r}).touch()}}"
    eval(attack)  # the line is what it is said to be
    ran.unlink()
    with pytest.warns(
        UserWarning, match="no dict with an asin: 1 .first: meta_Beauty.json.gz line 6"
    ):
        read = read_amazon(write(tmp_path / "mine", meta=[*META, attack]))
    assert not ran.exists() and read.items["title"][0] == "Title 0"


NO_REVIEW = "no review with reviewerID, asin and unixReviewTime"
NO_DICT = "no dict with an asin"
DIRTY_REVIEWS = {
    '{"reviewerID": "u1", "as': NO_REVIEW,
    "[1, 2]": NO_REVIEW,
    "[" * 10_000: NO_REVIEW,
    b'{"reviewerID": "\xff"}': NO_REVIEW,
    '{"reviewerID": "u1", "asin": "i1"}': NO_REVIEW,
    '{"reviewerID": ["u1"], "asin": "i1", "unixReviewTime": 1}': NO_REVIEW,
    '{"reviewerID": "u1", "asin": "i1", "unixReviewTime": "1"}': NO_REVIEW,
    '{"reviewerID": "u1", "asin": "i1", "unixReviewTime": 1e9}': NO_REVIEW,
    f'{{"reviewerID": "u1", "asin": "i1", "unixReviewTime": {2**63}}}': NO_REVIEW,
}
DIRTY_META = {
    "{'asin': 'i4', 'title": NO_DICT,
    "garbage": NO_DICT,
    b"{'asin': 'i4\xff'}": NO_DICT,
    "('asin', 'i4')": NO_DICT,
    "{'title': 'who am I'}": NO_DICT,
    "{'asin': 4}": NO_DICT,
    "{[]: 'asin'}": NO_DICT,
    "(" * 10_000: NO_DICT,
    "-" * 10_000 + "1": NO_DICT,
    META[4]: "duplicate asin",
}


@pytest.mark.parametrize(
    "where, line, kind",
    [
        *(("reviews", *pair) for pair in DIRTY_REVIEWS.items()),
        *(("meta", *pair) for pair in DIRTY_META.items()),
    ],
    ids=lambda value: str(value[:30]),
)
def test_dirty_lines_are_counted_named_and_skipped_or_stop_the_reader(tmp_path, where, line, kind):
    lines = {"reviews": REVIEWS, "meta": META}[where]
    folder = write(tmp_path / "dirty", **{where: [*lines, line]})
    name = re.escape(f"{where}_Beauty{'_5' * (where == 'reviews')}.json.gz line {len(lines) + 1}")
    with pytest.warns(UserWarning, match=f"{kind}: 1 .first: {name}") as caught:
        read = load_catalogue(folder)
    assert len(caught) == 1 and list(read.dirty) == [kind]
    assert read.fingerprint() == read_amazon(write(tmp_path / "clean")).fingerprint()
    with pytest.raises(ValueError, match=f"{kind}.*{name}"):
        load_catalogue(folder, on_dirty="raise")


@pytest.mark.parametrize(
    "field, value",
    [
        ("title", 5),
        ("brand", ["x"]),
        ("price", "9"),
        ("categories", "Beauty"),
        ("categories", ["A"]),
        ("categories", [["A", 5]]),
        ("categories", {"A": 1}),
    ],
)
def test_a_field_of_the_wrong_type_is_left_out(tmp_path, field, value):
    rest = {"title": "T", "brand": "B", "price": 1.5, "categories": [["C"]]} | {field: value}
    folder = write(tmp_path / "dirty", meta=[*META[:4], metadata("i4", **rest)])
    with pytest.warns(
        UserWarning, match=f"{field} of the wrong type: 1 .first: meta_Beauty.json.gz line 5"
    ):
        read = read_amazon(folder)
    whole = {
        "title": "Title: T",
        "brand": "Brand: B",
        "categories": "Categories: C",
        "price": "Price: 1.5",
    }
    assert read.items["text"][4] == "; ".join(text for name, text in whole.items() if name != field)


def test_items_without_metadata_stay_without_a_text_and_are_counted(tmp_path):
    folder = write(tmp_path / "some", meta=META[:3])
    with pytest.warns(UserWarning, match="item without metadata: 2"):
        read = read_amazon(folder)
    assert read.dirty == {
        "item without metadata": {"count": 2, "first": "reviews_Beauty_5.json.gz line 16: 'i3'"}
    }
    assert read.items["text"].tolist()[3:] == [None, None] and read.items["categories"].tolist()[
        3:
    ] == [[], []]
    with pytest.raises(ValueError, match="item without metadata.*line 16"):
        read_amazon(folder, on_dirty="raise")


def test_missing_doubled_damaged_and_empty_files_are_named(tmp_path):
    folder = write(tmp_path / "two")
    write(folder, category="Toys_and_Games")
    with pytest.raises(ValueError, match="one category.*'Beauty', 'Toys_and_Games'"):
        load_catalogue(folder)
    folder = write(tmp_path / "one")
    (folder / "meta_Beauty.json.gz").rename(folder / "meta_Toys.json.gz")
    with pytest.raises(ValueError, match="either meta_Beauty.json.gz or meta_Beauty.json, found"):
        load_catalogue(folder)
    whole = (folder / "reviews_Beauty_5.json.gz").read_bytes()
    middle = len(whole) // 2
    (folder / "meta_Toys.json.gz").rename(folder / "meta_Beauty.json.gz")
    for damaged in (whole[:-9], whole[:middle] + bytes(20) + whole[middle + 20 :], b"<html>"):
        (folder / "reviews_Beauty_5.json.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match="reviews_Beauty_5.json.gz is damaged"):
            load_catalogue(folder)
    with pytest.raises(ValueError, match="no 5-core in .*_5.json.gz"):
        read_amazon(write(tmp_path / "thin", REVIEWS[1:]))
    with pytest.raises(ValueError, match="no 5-core.*no review.*: 1"):
        read_amazon(write(tmp_path / "empty", ["?"]))


def test_names_forms_and_folders_that_are_recognised(monkeypatch, tmp_path):
    plain = tmp_path / "amazon-2014-plain"
    plain.mkdir()
    (plain / "reviews_Office_Products_5.json").write_text("".join(line + "\n" for line in REVIEWS))
    (plain / "meta_Office_Products.json").write_text("".join(line + "\n" for line in META))
    (plain / "reviews_Office_Products.json.gz").write_bytes(
        b"the unfiltered file is not read where there is a filtered one"
    )
    (plain / "reviews_Beauty_5.json.gz.part").write_bytes(b"nor is what is not yet whole")
    assert load_catalogue(str(plain)).n_items == 5
    monkeypatch.setenv("SIDLAB_DATA", str(tmp_path))
    assert load_catalogue("amazon-2014-plain", embeddings=np.eye(5)).embeddings.shape == (5, 5)
    save_catalogue(load_catalogue(plain), plain)
    (plain / "reviews_Office_Products_5.json").write_text("no more read")
    assert load_catalogue(plain).n_items == 5, "the open format is read first"
    with pytest.raises(ValueError, match="amazon-2014-beauty"):
        load_catalogue("amazon-2014")


# --- the 5-core ---


def brute_force_core(events, k):
    """Remove one event after the other, the first that must go."""
    events = list(events)
    while True:
        users = [user for user, _ in events]
        items = [item for _, item in events]
        for row, (user, item) in enumerate(events):
            if users.count(user) < k or items.count(item) < k:
                del events[row]
                break
        else:
            return events


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40), st.integers(1, 4))
def test_k_core_is_what_one_by_one_removal_leaves_and_stays(events, k):
    users, items = np.array(events, dtype=np.int64).reshape(-1, 2).T
    keep = k_core(users, items, k)
    assert [event for event, kept in zip(events, keep, strict=True) if kept] == brute_force_core(
        events, k
    )
    assert k_core(users[keep], items[keep], k).all(), "nothing more to remove"


def test_an_unfiltered_file_and_its_5_core_give_the_same_catalogue(tmp_path):
    rng = np.random.default_rng(0)
    # Pairs recur, too
    events = list(
        zip(rng.integers(0, 40, 400).tolist(), rng.geometric(0.06, 400).tolist(), strict=True)
    )
    days = rng.integers(0, 4, 400).tolist()
    lines = [
        review(f"u{user}", f"i{item}", day) for (user, item), day in zip(events, days, strict=True)
    ]
    meta = [
        metadata(f"i{item}", title=f"Title {item}")
        for item in range(1 + max(item for _, item in events))
    ]
    core = brute_force_core(events, 5)
    assert 0 < len(core) < len(events) and len(set(core)) < len(core)
    kept = [line for line, event in zip(lines, events, strict=True) if event in set(core)]
    assert len(kept) == len(core), "an event stays with its user and its item"
    raw = read_amazon(write(tmp_path / "raw", lines, meta, core=""))
    filtered = read_amazon(write(tmp_path / "core", kept, meta))
    assert raw.fingerprint() == filtered.fingerprint() and raw.user_ids == filtered.user_ids
    counts = len({user for user, _ in core}), len({item for _, item in core}), len(core)
    for read in (raw, filtered):
        assert (len(read.histories), read.n_items, sum(map(len, read.histories))) == counts


# --- the download ---


class Files(http.server.BaseHTTPRequestHandler):
    """Serves `server.files` with faults: `ranges` honoured or not, `cut` after so many bytes,
    `said` as the length.
    """

    def do_GET(self):
        server = self.server
        name = self.path.rsplit("/", 1)[1]
        server.asked.append((name, self.headers.get("Range")))
        if name not in server.files:
            return self.send_error(404)
        body = server.files[name]
        start = 0
        if server.ranges and self.headers.get("Range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header(
                "Content-Range", server.range or f"bytes {start}-{len(body) - 1}/{len(body)}"
            )
        else:
            self.send_response(200)
        if server.said is not False:
            self.send_header(
                "Content-Length", str(len(body) - start if server.said is None else server.said)
            )
        self.end_headers()
        self.wfile.write(body[start : len(body) if server.cut is None else start + server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.files = {
        "reviews_Beauty_5.json.gz": packed(REVIEWS),
        "meta_Beauty.json.gz": packed(META),
    }
    server.asked = []
    server.ranges = True
    server.range = None
    server.cut = None
    server.said = None
    monkeypatch.setattr(amazon, "ADDRESS", f"http://127.0.0.1:{server.server_port}/files/")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


REVIEWS_FILE = "reviews_Beauty_5.json.gz"
META_FILE = "meta_Beauty.json.gz"


def held(tmp_path):
    return {
        path.name: path.read_bytes()
        for path in (tmp_path / "cache" / "amazon-2014-beauty").glob("*")
    }


def test_a_name_is_downloaded_once(server, tmp_path):
    read = load_catalogue("amazon-2014-beauty")
    assert (
        read.name == "amazon-2014-beauty"
        and read.fingerprint() == read_amazon(write(tmp_path / "local")).fingerprint()
    )
    assert held(tmp_path) == server.files and server.asked == [
        (REVIEWS_FILE, None),
        (META_FILE, None),
    ]
    assert load_catalogue("amazon-2014-beauty").n_items == 5 and len(server.asked) == 2
    server.files = {
        "reviews_Office_Products_5.json.gz": packed(REVIEWS),
        "meta_Office_Products.json.gz": packed(META),
    }
    assert load_catalogue("amazon-2014-Office_Products").n_items == 5
    for category, name in [
        ("sports", "Sports_and_Outdoors"),
        ("toys", "Toys_and_Games"),
        ("Nonsense", "Nonsense"),
    ]:
        with pytest.raises(
            ConnectionError,
            match=f"404.*reviews_{name}_5.json.gz and http.*meta_{name}.json.gz into .*{category}",
        ):
            fetch_amazon(category)
    for category in ("../beauty", "", "a b"):
        with pytest.raises(ValueError, match="Office_Products"):
            fetch_amazon(category)


def test_files_put_there_by_hand_are_not_downloaded(server, tmp_path):
    (tmp_path / "cache").mkdir()
    write(tmp_path / "cache" / "amazon-2014-beauty", core="")
    assert load_catalogue("amazon-2014-beauty").n_items == 5 and server.asked == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_leaves_a_part_and_goes_on_or_starts_again(server, tmp_path, ranges):
    whole = server.files[REVIEWS_FILE]
    server.cut = 100
    server.ranges = ranges
    with pytest.raises(
        ConnectionError, match=f"{REVIEWS_FILE} broke off: 100 of {len(whole)} bytes"
    ):
        fetch_amazon("beauty")
    assert held(tmp_path) == {f"{REVIEWS_FILE}.part": whole[:100]}
    with pytest.raises(
        ConnectionError, match=f"broke off: {200 if ranges else 100} of {len(whole)} bytes"
    ):
        fetch_amazon("beauty")
    assert held(tmp_path) == {f"{REVIEWS_FILE}.part": whole[: 200 if ranges else 100]}
    server.cut = None
    fetch_amazon("beauty")
    assert held(tmp_path) == server.files
    assert [asked for name, asked in server.asked if name == REVIEWS_FILE] == [
        None,
        "bytes=100-",
        "bytes=200-" if ranges else "bytes=100-",
    ]


@pytest.mark.parametrize("extra", [b"", b"too long"])
def test_a_part_with_nothing_left_to_ask_for_is_replaced(server, tmp_path, extra):
    folder = tmp_path / "cache" / "amazon-2014-beauty"
    folder.mkdir(parents=True)
    (folder / f"{META_FILE}.part").write_bytes(server.files[META_FILE] + extra)
    fetch_amazon("beauty")
    assert held(tmp_path) == server.files


def test_a_wrong_length_is_an_error_and_no_length_is_none(server, tmp_path):
    whole = server.files[REVIEWS_FILE]
    server.said = len(whole) + 5
    with pytest.raises(ConnectionError, match=f"broke off: {len(whole)} of {len(whole) + 5} bytes"):
        fetch_amazon("beauty")
    assert list(held(tmp_path)) == [f"{REVIEWS_FILE}.part"]
    (tmp_path / "cache" / "amazon-2014-beauty" / f"{REVIEWS_FILE}.part").unlink()
    server.said = len(whole) - 5
    with pytest.raises(
        ValueError, match=f"{REVIEWS_FILE} was downloaded, but .* damaged or cut off.*starts anew"
    ):
        fetch_amazon("beauty")
    assert held(tmp_path) == {}
    server.said = False
    fetch_amazon("beauty")
    assert held(tmp_path) == server.files


@pytest.mark.parametrize("bad", ["flipped", "page", "other part", "other range"])
def test_a_whole_but_damaged_file_is_named_and_not_kept(server, tmp_path, bad):
    whole = server.files[REVIEWS_FILE]
    folder = tmp_path / "cache" / "amazon-2014-beauty"
    folder.mkdir(parents=True)
    if bad == "flipped":
        server.files[REVIEWS_FILE] = whole[:80] + bytes([whole[80] ^ 255]) + whole[81:]
    elif bad == "page":
        server.files[REVIEWS_FILE] = b"<html>please log in</html>"
    else:
        (folder / f"{REVIEWS_FILE}.part").write_bytes(
            bytes(100) if bad == "other part" else whole[:100]
        )
        server.range = f"bytes 7-{len(whole) - 1}/{len(whole)}" if bad == "other range" else None
    with pytest.raises(
        ValueError,
        match=f"http.*{REVIEWS_FILE} was downloaded, but .*{REVIEWS_FILE}.part is damaged",
    ):
        fetch_amazon("beauty")
    assert held(tmp_path) == {}
    server.files[REVIEWS_FILE] = whole
    assert load_catalogue("amazon-2014-beauty").n_items == 5


def test_without_a_network_the_error_says_what_to_put_where(server, monkeypatch, tmp_path):
    monkeypatch.setattr(amazon, "ADDRESS", "http://127.0.0.1:1/")
    folder = tmp_path / "cache" / "amazon-2014-beauty"
    by_hand = (
        f"put http://127.0.0.1:1/{REVIEWS_FILE} and http://127.0.0.1:1/{META_FILE} into {folder} by"
        " hand"
    )
    with pytest.raises(ConnectionError, match=f"refused.*{re.escape(by_hand)}"):
        load_catalogue("amazon-2014-beauty")
    assert held(tmp_path) == {}
    write(folder)
    assert load_catalogue("amazon-2014-beauty").n_items == 5
    # A file: no folder can be made below it
    monkeypatch.setenv("SIDLAB_CACHE", str(folder / META_FILE))
    with pytest.raises(ConnectionError, match="NotADirectoryError"):
        load_catalogue("amazon-2014-beauty")
