"""AL-GR's tables: the real sample, dirty lines, and the way from generated files to a trained
model's hit rate.
"""

import csv
import gzip
import itertools
import re
import warnings

import numpy as np
import pytest
import torch
from conftest import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from sidlab.config import TrainConfig
from sidlab.data import algr
from sidlab.decoding import recommend
from sidlab.metrics import rank_of_target
from sidlab.training import train
from sidlab.windows import leave_one_out


def table(path, header, *rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def sid(a, b, c, width=8192):
    return f"C{a}C{b + width}C{c + 2 * width}"


ROWS = ("system", "user", "answer")
ITEMS = ("base62_string", "codebook_lv1", "codebook_lv2", "codebook_lv3")


@needs_shared
def test_the_real_sample_reads_whole():
    rows = list(algr.read_rows(SHARED / "al-gr-sample" / "train_sample.tsv.gz", on_dirty="raise"))
    assert len(rows) == 10
    assert [len(history) for history, _ in rows] == [99, 99, 69, 11, 60, 73, 99, 100, 100, 98]
    assert rows[0][0][0].tolist() == [1989, 14585 - 8192, 22548 - 16384]
    assert rows[0][1].tolist() == [1442, 14117 - 8192, 19114 - 16384]
    for history, answer in rows:
        assert history.min() >= 0 and history.max() < 8192 and answer.shape == (3,)


@settings(max_examples=30)
@given(
    st.lists(
        st.lists(st.tuples(*[st.integers(0, 8191)] * 3), min_size=2, max_size=12),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(",\t"),
)
def test_rows_come_back_as_they_were_written(tmp_path_factory, sequences, delimiter):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    text = [
        (algr.SYSTEM, algr.USER.format("".join(sid(*item) for item in s[:-1])), sid(*s[-1]))
        for s in sequences
    ]
    table(path, ROWS, *text, delimiter=delimiter)
    found = list(algr.read_rows(path, on_dirty="raise"))
    assert [
        [*map(tuple, history.tolist()), tuple(answer.tolist())] for history, answer in found
    ] == sequences


DIRTY = [
    (("s", "no history", sid(1, 2, 3)), "user: no SID"),
    (("s", sid(1, 2, 3) + "C5", sid(1, 2, 3)), "user: 3 codes an item expected"),
    (("s", sid(1, 2, 3), "C1C2C3"), "answer: a code outside its level's 8192"),
    (("s", sid(1, 2, 8192), sid(1, 2, 3)), "user: a code outside its level's 8192"),
    (("s", sid(1, 2, 3), sid(1, 2, 3) * 2), "answer: not one SID"),
    (("s", sid(1, 2, 3)), "other than 3 fields"),
    (("s", sid(1, 2, 3), sid(4, 5, 6) + "Cnan"), "answer: something else among the codes"),
    (("s", f"C{'9' * 30}C8193C16385", sid(4, 5, 6)), "user: a code outside its level's 8192"),
]


@pytest.mark.parametrize("row, kind", DIRTY)
def test_a_dirty_row_is_named_and_left_out_or_stops(tmp_path, row, kind):
    good = ("s", sid(1, 2, 3), sid(4, 5, 6))
    path = table(tmp_path / "rows.csv", ROWS, good, row, good)
    with pytest.warns(UserWarning, match=rf"{kind}: 1 \(first: rows.csv line 3"):
        assert len(list(algr.read_rows(path))) == 2
    with pytest.raises(ValueError, match=kind):
        list(algr.read_rows(path, on_dirty="raise"))


def test_dirty_items_and_raw_rows_are_named(tmp_path):
    rows = [
        ("a", 1, 2, 3),
        ("b", 1, "", 3),
        ("a", 4, 5, 6),
        ("c", 1, 9000, 3),
        ("d", "7.0", 8, 9),
        ("", 1, 1, 1),
    ]
    path = table(tmp_path / "items.csv", ITEMS, *rows)
    with pytest.warns(UserWarning) as warned:
        ids, codes = algr.read_items(path)
    assert ids == ["a", "d"] and codes.tolist() == [[1, 2, 3], [7, 8, 9]]
    for kind in (
        "a code is missing: 1",
        "duplicate item: 1",
        r"a code outside 0..8191: 1",
        "no item id: 1",
    ):
        assert kind in str(warned[0].message)
    raw = table(tmp_path / "raw.csv", ("user_history", "target_item"), ("x;y;z", "u;v"), ("", "u"))
    with pytest.warns(UserWarning, match="no history or no target: 1"):
        assert list(algr.read_raw_rows(raw)) == [(["x", "y", "z"], ["u", "v"])]
    with pytest.raises(ValueError, match="has no column answer; its header is 'system,user"):
        list(algr.read_rows(table(tmp_path / "odd.csv", ("system", "user"))))
    with pytest.raises(ValueError, match="holds no item"):
        algr.read_items(table(tmp_path / "none.csv", ITEMS))
    whole = gzip.compress(path.read_bytes() * 50)
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or cut off"):
        algr.read_items(tmp_path / "cut.csv.gz")


def test_rows_are_streamed(tmp_path):
    """The first row is there before the second is looked at."""
    path = table(
        tmp_path / "rows.csv", ROWS, ("s", sid(1, 2, 3), sid(4, 5, 6)), ("s", "broken", "")
    )
    stream = algr.read_rows(path, on_dirty="raise")
    assert next(stream)[1].tolist() == [4, 5, 6]
    with pytest.raises(ValueError, match="user: no SID"):
        next(stream)


# --- Generator, reader, training, hit rate


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("algr")
    algr.write_algr(folder, n_rows=400, n_items=120, width=64, longest=20, seed=3)
    return folder


def test_generated_files_agree_with_one_another(written):
    ids, codes = algr.read_items(written / "items.csv.gz", width=64, on_dirty="raise")
    rows = list(algr.read_rows(written / "rows.csv.gz", width=64, on_dirty="raise"))
    raw = list(algr.read_raw_rows(written / "raw.csv.gz", on_dirty="raise"))
    assert (len(ids), len(rows), len(raw)) == (120, 400, 400) and len(set(ids)) == 120
    number = {item: i for i, item in enumerate(ids)}
    for (history, answer), (items, targets) in zip(rows, raw):
        assert np.array_equal(history, codes[[number[item] for item in items]])
        assert np.array_equal(answer, codes[number[targets[0]]]) and len(targets) == 1
    assert len(np.unique(codes, axis=0)) < 120  # some share a SID
    lengths = [len(history) for history, _ in rows]
    assert 1 <= min(lengths) and max(lengths) <= 20 and 13 < np.mean(lengths) < 18


def test_a_generated_file_reads_like_the_sample(written):
    with gzip.open(written / "rows.csv.gz", "rt", encoding="utf-8") as file:
        header = next(csv.reader([next(file)]))
        first = next(csv.reader([next(file)]))
    assert header == ["system", "user", "answer"]
    assert (
        first[0] == algr.SYSTEM
        and first[1].startswith("当前用户的历史行为如下：C")
        and first[1].endswith("后续行为的语义编码")
    )
    if SHARED.is_dir():
        with gzip.open(
            SHARED / "al-gr-sample" / "train_sample.tsv.gz", "rt", encoding="utf-8"
        ) as file:
            real = list(file)[1].rstrip("\n").split("\t")
        assert real[1] == algr.SYSTEM
        assert algr._SID.sub("", real[2]) == algr._SID.sub("", first[1])


@pytest.mark.parametrize("arch", ("qwen", "t5"))
def test_from_generated_files_to_a_hit_rate(written, arch):
    catalogue, table = algr.algr_catalogue(
        written / "rows.csv.gz", written / "items.csv.gz", width=64
    )
    assert (
        table.collisions == "share"
        and table.levels == 3
        and catalogue.n_items == 120
        and not catalogue.dirty
    )
    config = TrainConfig.preset(
        "smoke",
        arch=arch,
        max_updates=150,
        eval_every=150,
        learning_rate=5e-3,
        max_items=20,
        position_init=None,
        separators=False,
    )
    result = train(config, catalogue, table, progress=False)
    histories, targets = leave_one_out(catalogue.histories).cases("test")
    items, _ = recommend(result.model, histories, k=40)
    leaves, _ = table.trie.find(table.codes[targets - 1])
    sharers = [row[valid].numpy() for row, valid in zip(*table.trie.leaf_items(leaves))]
    rates = algr.hit_rate(items, sharers, ks=(5, 20, 40))
    rng = np.random.default_rng(0)
    chance = algr.hit_rate(
        np.stack([rng.permutation(120)[:40] + 1 for _ in targets]), sharers, ks=(5, 20, 40)
    )
    assert chance[5] == pytest.approx(5 / 120, abs=0.02)
    assert chance[5] * 2.5 < rates[5] < rates[20] < rates[40]


DAMAGED_ITEMS = (
    "C-1C-1C-1",
    "CnanCnanCnan",
    "c5c8199c16390",
    "C1.0C8193.0C16385.0",
    "CNoneCNoneCNone",
    "C" + "9" * 30,
    "C\ufffd1C2C3",
)
DAMAGED_CODES = ("inf", "-inf", "nan", "7.5", "-0.5", "1e3", "1_0", "-1", "", "9" * 30)
READ = {
    "rows.csv.gz": lambda path: [
        (history.tolist(), answer.tolist()) for history, answer in algr.read_rows(path, width=64)
    ],
    "raw.csv.gz": lambda path: list(algr.read_raw_rows(path)),
    "items.csv.gz": lambda path: [
        (item, codes.tolist()) for item, codes in zip(*algr.read_items(path, width=64))
    ],
}


@settings(max_examples=150)
@given(st.data())
def test_one_dirty_line_anywhere_costs_itself_alone_and_is_named(written, tmp_path_factory, data):
    """A damaged item before, between or behind the others of a history or an answer, a damaged
    code, a quote anywhere, a line cut off.
    """

    def draw(*options):
        return data.draw(st.sampled_from(options))

    name = draw(*READ)
    lines = gzip.decompress((written / name).read_bytes()).decode().splitlines(keepends=True)
    line = draw(*lines[1:20]).rstrip()
    damage = draw("own", "quote", "cut")
    if damage == "cut":
        line = line[: data.draw(st.integers(0, line.rindex(",")))]
    elif damage == "quote":
        at = data.draw(st.integers(0, len(line)))
        line = line[:at] + '"' + line[at:]
    elif name == "rows.csv.gz":
        at = draw(
            *(place for found in re.finditer(r"C\d+C\d+C\d+", line) for place in found.span())
        )
        line = line[:at] + draw(*DAMAGED_ITEMS) + line[at:]
    elif name == "raw.csv.gz":
        line = draw(
            line.replace(",", ";;0,"),
            line + ";;0",
            "," + line.split(",")[1],
            line.split(",")[0] + ",",
        )
    else:
        fields = line.split(",")
        fields[draw(1, 2, 3)] = draw(*DAMAGED_CODES)
        line = ",".join(["new", *fields[1:]])
    at = data.draw(st.integers(1, len(lines)))
    path = tmp_path_factory.mktemp("dirty") / name.removesuffix(".gz")
    path.write_bytes("".join([*lines[:at], line + "\r\n", *lines[at:]]).encode())
    with pytest.warns(UserWarning, match=rf": 1 \(first: {path.name} line {at + 1}: ") as warned:
        found = READ[name](path)
    assert len(warned) == 1 and str(warned[0].message).count("(first: ") == 1
    assert found == READ[name](written / name)


@pytest.mark.parametrize(
    "prompt",
    (
        "{}",
        algr.USER,
        "共3件Apple商品：{}。",
        "History (oldest first): {}. What is next?",
        "user={}",
    ),
)
@pytest.mark.parametrize("separator", ("", " ", ", ", "，"))
def test_prose_around_the_codes_is_read_and_damaged_codes_are_no_prose(tmp_path, prompt, separator):
    def row(*items):
        return table(
            tmp_path / "rows.csv",
            ROWS,
            ("s", prompt.format(separator.join(items)), prompt.format(sid(7, 8, 9))),
        )

    [(history, answer)] = algr.read_rows(row(sid(1, 2, 3), sid(4, 5, 6)), on_dirty="raise")
    assert history.tolist() == [[1, 2, 3], [4, 5, 6]] and answer.tolist() == [7, 8, 9]
    for damaged in ("CnanCnanCnan", "C-1C-1C-1", "c5c8199c16390"):
        for items in (
            (damaged, sid(1, 2, 3)),
            (sid(1, 2, 3), damaged),
            (sid(1, 2, 3), damaged, sid(1, 2, 3)),
        ):
            with pytest.raises(ValueError, match="user: something else among the codes: .*line 2"):
                list(algr.read_rows(row(*items), on_dirty="raise"))


def test_a_stray_quote_costs_no_row_but_its_own_and_csv_quoting_is_none(tmp_path):
    path = tmp_path / "rows.csv"
    good = f"s,{sid(1, 2, 3)},{sid(4, 5, 6)}\n"
    # More than csv takes for one field
    path.write_text("system,user,answer\n" + good * 3 + good.replace(",", ',"', 1) + good * 20_000)
    with pytest.warns(UserWarning, match=r"a stray quote: 1 \(first: rows.csv line 5"):
        assert sum(1 for _ in algr.read_rows(path)) == 20_003
    path.write_text(
        'system,"user",answer\ns,"say ""hi"", then'
        f' {sid(1, 2, 3)}",{sid(4, 5, 6)}\n"s"s,{sid(1, 2, 3)},{sid(4, 5, 6)}\n'
    )
    with pytest.warns(UserWarning, match=r"not a row of CSV: 1 \(first: rows.csv line 3"):
        assert len(list(algr.read_rows(path))) == 1


@pytest.mark.parametrize(
    "read, header, good, bad",
    [
        (algr.read_rows, ROWS, ("s", sid(1, 2, 3), sid(4, 5, 6)), ("s", "x", "y")),
        (algr.read_raw_rows, algr.RAW_COLUMNS, ("x;y", "z"), ("", "z")),
    ],
)
def test_a_consumer_that_stops_early_hears_of_the_dirt_so_far(tmp_path, read, header, good, bad):
    path = table(tmp_path / "table.csv", header, bad, good, good, bad)
    with pytest.warns(UserWarning, match=r": 1 \(first: table.csv line 2"):
        assert len(list(itertools.islice(read(path), 1))) == 1
    stream = read(path)
    next(stream)
    with pytest.warns(UserWarning, match=r": 1 \(first: table.csv line 2"):
        stream.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(path).close()  # which read nothing
        assert len(list(itertools.islice(read(table(path, header, good, bad)), 1))) == 1


def test_hit_rate_counts_what_is_found_of_what_is_true():
    items = torch.tensor([[5, 6, 7, 8], [1, 2, 0, 0]])
    assert algr.hit_rate(items, [[6, 8], [2]], ks=(1, 2, 4)) == {1: 0.0, 2: 0.75, 4: 1.0}
    ranks = rank_of_target(items.numpy(), np.array([7, 3]))
    assert algr.hit_rate(items, [7, 3], ks=(2, 3)) == {
        k: float(((ranks > 0) & (ranks <= k)).mean()) for k in (2, 3)
    }
    with pytest.raises(ValueError, match="K at least 1000"):
        algr.hit_rate(items, [7, 3])


def test_rows_with_unknown_sids_are_dirty_and_a_limit_cuts(tmp_path):
    table(tmp_path / "items.csv", ITEMS, ("a", 1, 2, 3), ("b", 1, 2, 3), ("c", 4, 5, 6))
    good = ("s", sid(1, 2, 3) + sid(4, 5, 6), sid(1, 2, 3))
    bad = ("s", sid(1, 2, 4), sid(1, 2, 3))
    path = table(tmp_path / "rows.csv", ROWS, good, bad, good, good)
    with pytest.warns(
        UserWarning, match=r"a SID that no item has: 1 \(first: rows.csv line 3: 's,"
    ):
        catalogue, sids = algr.algr_catalogue(path, tmp_path / "items.csv")
    # The first item of each SID
    assert [h.tolist() for h in catalogue.histories] == [[1, 3, 1]] * 3
    assert catalogue.items.title.tolist() == ["a", "b", "c"] and sids.items_of([[1, 2, 3]]) == [
        [1, 2]
    ]
    assert len(algr.algr_catalogue(path, tmp_path / "items.csv", limit=1)[0].histories) == 1
    for limit in (0, -1):
        with pytest.raises(
            ValueError, match=f"limit must be at least 1, or None for all rows, got {limit}"
        ):
            algr.algr_catalogue(path, tmp_path / "items.csv", limit=limit)


def test_all_dirt_of_both_tables_is_told_once_and_kept(tmp_path):
    table(tmp_path / "items.csv", ITEMS, ("a", 1, 2, 3), ("b", 1, "", 3))
    good, unknown, broken = (
        ("s", sid(1, 2, 3), end) for end in (sid(1, 2, 3), sid(1, 2, 4), "none")
    )
    path = table(tmp_path / "rows.csv", ROWS, broken, good, good, unknown, good, broken)
    with pytest.warns(UserWarning) as warned:
        # Which the last row lies behind
        catalogue, _ = algr.algr_catalogue(path, tmp_path / "items.csv", limit=3)
    assert len(warned) == 1
    first = {
        kind: (found["count"], found["first"].split(":")[0])
        for kind, found in catalogue.dirty.items()
    }
    assert first == {
        "a code is missing": (1, "items.csv line 3"),
        "answer: no SID": (1, "rows.csv line 2"),
        "a SID that no item has": (1, "rows.csv line 5"),
    }


def test_raw_rows_make_histories_of_the_items_themselves(written, tmp_path):
    catalogue, _ = algr.algr_catalogue(written / "raw.csv.gz", written / "items.csv.gz", width=64)
    ids = catalogue.items.title.tolist()
    raw = list(algr.read_raw_rows(written / "raw.csv.gz"))
    assert [[ids[item - 1] for item in history] for history in catalogue.histories] == [
        [*history, target] for history, [target] in raw
    ]
    table(tmp_path / "items.csv", ITEMS, ("a", 1, 2, 3), ("b", 1, 2, 3))
    path = table(tmp_path / "raw.csv", algr.RAW_COLUMNS, ("b;a", "b;a"), ("b;x", "a"))
    with pytest.warns(UserWarning, match=r"an id that no item has: 1 \(first: raw.csv line 3"):
        catalogue, _ = algr.algr_catalogue(path, tmp_path / "items.csv")
    assert [history.tolist() for history in catalogue.histories] == [[2, 1, 2]]


def test_bad_sizes_and_an_absent_network_say_so(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="n_items, width at least 2, got 1, 5, 1, 8192"):
        algr.write_algr(tmp_path, 1, 1, longest=5)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match=(
            "(?s)can't be downloaded.*take the file from"
            " https://huggingface.co/datasets/AL-GR/AL-GR-Tiny"
        ),
    ):
        algr.fetch_algr("train_data/s1_tiny.csv")
