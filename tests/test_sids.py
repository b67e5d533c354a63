"""Residual k-means and SidTable: planted trees, brute force, hand-computed reports, published tables."""

import gzip
import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from sidlab.sids import residual_kmeans
from sidlab.sids.residual_kmeans import ResidualKMeans
from sidlab.sids.table import PAD, SidTable


def planted_tree(widths, scales, seed, n=400, dim=32, noise=0.01):
    """codes [n, L], all codes of a level equally likely, and embeddings: the sum of an orthonormal vector per level."""
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, width, n) for width in widths], axis=1)
    x = rng.normal(0, noise, (n, dim))
    for level, (width, scale) in enumerate(zip(widths, scales)):
        x += scale * np.linalg.qr(rng.normal(size=(dim, width)))[0].T[codes[:, level]]
    return codes, x.astype(np.float32)


def embeddings_of(n=60, dim=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


# --- residual k-means ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_tree_is_recovered_up_to_the_names_of_the_codes(seed):
    widths = (12, 6, 4)
    truth, x = planted_tree(widths, (1.0, 0.6, 0.35), seed)
    encoder = ResidualKMeans(levels=3, width=widths, seed=seed).fit(x)
    codes = encoder.encode(x)
    for level, width in enumerate(widths):
        pairs = set(zip(codes[:, level].tolist(), truth[:, level].tolist()))
        assert len(pairs) == width == len({a for a, _ in pairs}) == len({b for _, b in pairs})  # a bijection
    assert np.abs(encoder.decode(codes) - x).max() < 0.12  # the noise is 0.01 and the level means are estimated


def test_encode_picks_the_nearest_centroid_of_each_residual_and_decode_sums_them():
    encoder = ResidualKMeans(levels=3, width=(8, 5, 3), seed=1).fit(embeddings_of(200))
    x = embeddings_of(50, seed=2)
    codes = encoder.encode(x)
    assert codes.dtype == np.int64 and codes.shape == (50, 3)
    for row, code in zip(x.astype(np.float64), codes):
        residual, total = row.copy(), np.zeros(5)
        for level, book in enumerate(encoder.codebooks_):
            distance = ((residual - book) ** 2).sum(axis=1)
            assert distance[code[level]] <= distance.min() + 1e-6
            residual, total = residual - book[code[level]], total + book[code[level]]
            prefix = encoder.decode(code[None, : level + 1])
            assert prefix.dtype == np.float32
            np.testing.assert_allclose(prefix[0], total, atol=1e-6)


def test_equal_seeds_give_equal_codebooks_and_chunks_do_not_show(monkeypatch):
    x = embeddings_of(300)
    first, second = (ResidualKMeans(levels=2, width=16, seed=3).fit(x) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first.codebooks_, second.codebooks_))
    whole = first.encode(x)
    monkeypatch.setattr(residual_kmeans, "CHUNK", 7)
    assert np.array_equal(first.encode(x), whole)


def test_a_common_offset_changes_nothing():
    truth, x = planted_tree((6, 4), (1.0, 0.4), seed=0)
    codes = ResidualKMeans(levels=2, width=(6, 4)).fit(x + np.float32(300)).encode(x + np.float32(300))
    for level, width in enumerate((6, 4)):
        assert len(set(zip(codes[:, level].tolist(), truth[:, level].tolist()))) == width


@pytest.mark.parametrize("wide", [4, 20])
def test_a_wide_level_without_a_wards_start_still_fits(wide, monkeypatch):
    monkeypatch.setattr(residual_kmeans, "WARD_WIDTH", 3)
    x = embeddings_of(200)
    encoder = ResidualKMeans(levels=1, width=wide).fit(x)
    assert len(np.unique(encoder.encode(x))) == wide
    assert ((x - encoder.decode(encoder.encode(x))) ** 2).sum() < ((x - x.mean(axis=0)) ** 2).sum()


@pytest.mark.parametrize("distinct", [1, 3, 8])
def test_fewer_distinct_embeddings_than_codes_are_kept_exactly(distinct):
    x = np.repeat(embeddings_of(distinct), 10, axis=0)[np.random.default_rng(0).permutation(10 * distinct)]
    encoder = ResidualKMeans(levels=3, width=8).fit(x)
    codes = encoder.encode(x)
    assert len(np.unique(codes[:, 0])) == distinct
    assert not codes[:, 1:].any()  # every residual is zero: always the first of the equal centroids
    np.testing.assert_array_equal(encoder.decode(codes), x)


def test_many_equal_embeddings_among_few_others_do_not_break_the_start():
    x = np.concatenate([np.zeros((5000, 4), np.float32), embeddings_of(40, 4)])
    encoder = ResidualKMeans(levels=2, width=32).fit(x)
    codes = encoder.encode(x)
    assert len(np.unique(codes[:5000], axis=0)) == 1 and np.isfinite(encoder.decode(codes)).all()


def test_save_and_load_give_the_same_codes(tmp_path):
    x = embeddings_of()
    encoder = ResidualKMeans(levels=2, width=(8, 4), seed=5, iterations=7).fit(x)
    encoder.save(tmp_path / "new" / "encoder")
    loaded = ResidualKMeans.load(tmp_path / "new" / "encoder")
    names = sorted(p.name for p in (tmp_path / "new" / "encoder").iterdir())
    assert names == ["residual_kmeans.json", "residual_kmeans.safetensors"]  # nothing left beside them
    assert (loaded.levels, loaded.widths, loaded.seed, loaded.iterations) == (2, (8, 4), 5, 7)
    assert all(np.array_equal(a, b) for a, b in zip(loaded.codebooks_, encoder.codebooks_))
    assert np.array_equal(loaded.encode(x), encoder.encode(x))


def test_encoder_errors_say_what_is_wrong():
    x = embeddings_of()
    with pytest.raises(RuntimeError, match="call fit"):
        ResidualKMeans().encode(x)
    with pytest.raises(RuntimeError, match="call fit"):
        ResidualKMeans().decode(np.zeros((1, 1), int))
    with pytest.raises(ValueError, match="width 61 needs .* got 60"):
        ResidualKMeans(levels=2, width=(4, 61)).fit(x)
    for bad in (np.nan, np.inf):
        broken = x.copy()
        broken[7, 1] = bad
        with pytest.raises(ValueError, match="1 rows are not, the first is row 7"):
            ResidualKMeans(levels=1, width=4).fit(broken)
    encoder = ResidualKMeans(levels=2, width=4).fit(x)
    with pytest.raises(ValueError, match="first is row 0"):
        encoder.encode(np.full((2, 5), np.nan))
    with pytest.raises(ValueError, match=r"shape \[n, 5\], got \[60, 4\]"):
        encoder.encode(x[:, :4])
    with pytest.raises(ValueError, match=r"\[m, 1..2\], got \[3, 3\]"):
        encoder.decode(np.zeros((3, 3), int))
    with pytest.raises(ValueError, match="code 4 at level 2"):
        encoder.decode(np.array([[0, 4]]))
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        ResidualKMeans(levels=0)


# --- the table -------------------------------------------------------------------------------------------------

CODES = np.array([[0, 1], [2, 1], [0, 1], [0, 0], [0, 1], [2, 1]])  # groups: items 1 3 5, items 2 6, item 4


def test_extend_numbers_each_group_by_item_id():
    table = SidTable(CODES, width=(3, 2))
    assert table.codes.tolist() == [[0, 1, 0], [2, 1, 0], [0, 1, 1], [0, 0, 0], [0, 1, 2], [2, 1, 1]]
    assert (table.widths, table.levels, table.base_levels, table.n_items) == ((3, 2, 3), 3, 2, 6)
    assert table.offsets == (3, 6, 8) and table.vocab_size == 3 + 3 + 2 + 3
    assert table.item_tokens.dtype == torch.int64
    assert table.item_tokens.tolist() == [[PAD] * 3, [3, 7, 8], [5, 7, 8], [3, 7, 9], [3, 6, 8], [3, 7, 10], [5, 7, 9]]
    assert table.items_of([0, 1, 2]) == [5] and table.items_of([0, 0, 1]) == []


def test_share_leaves_the_codes_and_expands_a_hit():
    table = SidTable(CODES, width=(3, 2), collisions="share")
    assert table.codes.tolist() == CODES.tolist() and table.widths == (3, 2)
    assert table.items_of([[[0, 1], [2, 1]], [[0, 0], [1, 1]]]) == [[[1, 3, 5], [2, 6]], [[4], []]]
    assert table.items_of(torch.tensor([9, 1])) == []


def test_without_collisions_no_level_is_added():
    table = SidTable(CODES[[0, 1, 3]], width=4)
    assert table.levels == 2 and table.widths == (4, 4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=40),
    st.sampled_from(["extend", "share"]),
)
def test_items_and_sids_are_one_to_one_or_shared_as_said(rows, collisions):
    table = SidTable(np.array(rows), width=(4, 3), collisions=collisions)
    groups = defaultdict(list)
    for item, row in enumerate(rows, start=1):
        groups[row].append(item)
    if collisions == "share":
        assert table.items_of(table.codes) == [groups[row] for row in rows]
    else:
        assert table.items_of(table.codes) == [[item] for item in range(1, len(rows) + 1)]
        if table.levels == 3:
            assert table.codes[:, 2].tolist() == [groups[row].index(item) for item, row in enumerate(rows, start=1)]
            assert table.widths[2] == max(map(len, groups.values()))
    tokens = table.item_tokens[1:].numpy()
    assert np.array_equal(tokens - np.array(table.offsets), table.codes)
    for level, (offset, width) in enumerate(zip(table.offsets, table.widths)):
        assert ((tokens[:, level] >= offset) & (tokens[:, level] < offset + width)).all()


def test_the_report_equals_numbers_worked_out_by_hand():
    report = SidTable(CODES, width=(3, 2)).report()
    assert json.loads(json.dumps(report)) == report  # plain values only
    assert (report["n_items"], report["levels"], report["unique_sids"], report["largest_group"]) == (6, 3, 3, 3)
    assert report["collision_rate"] == pytest.approx(5 / 6)
    first, second, added = report["per_level"]
    entropy = -(4 / 6 * math.log(4 / 6) + 2 / 6 * math.log(2 / 6))  # code 0 four times, code 2 twice
    assert first == {
        "level": 1,
        "width": 3,
        "used": 2,
        "utilisation": pytest.approx(2 / 3),
        "prefixes": 2,
        "perplexity": pytest.approx(math.exp(entropy)),
        "mean_group": 3.0,
        "largest_group": 4,
    }
    assert (second["used"], second["prefixes"], second["mean_group"], second["largest_group"]) == (2, 3, 2.0, 3)
    assert (added["width"], added["used"], added["prefixes"], added["largest_group"]) == (3, 3, 6, 1)
    text = str(report)
    assert "83.3%" in text and "perplexity" in text and "<table" in report._repr_html_()
    assert report.frame().loc[2, "prefixes"] == 3


def test_the_report_measures_reconstruction_by_level():
    x = np.repeat(embeddings_of(30), 2, axis=0)  # every item twice: the table adds a level
    encoder = ResidualKMeans(levels=2, width=(4, 8)).fit(x)
    codes = encoder.encode(x)
    rows = SidTable(codes, width=encoder.widths).report(encoder, x)["per_level"]
    rest = x.astype(np.float64).copy()
    for level in range(2):
        rest -= encoder.codebooks_[level][codes[:, level]]
        want = np.square(rest).sum() / np.square(x).sum()
        assert rows[level]["reconstruction_error"] == pytest.approx(want, rel=1e-5)
    assert 0 < rows[1]["reconstruction_error"] < rows[0]["reconstruction_error"] < 1
    assert rows[2]["reconstruction_error"] is None
    with pytest.raises(ValueError, match="only one"):
        SidTable(codes, width=encoder.widths).report(encoder)
    with pytest.raises(ValueError, match=r"one row per item \(60\), got 59"):
        SidTable(codes, width=encoder.widths).report(encoder, x[:59])


@pytest.mark.parametrize("collisions", ["extend", "share"])
def test_a_table_survives_saving(tmp_path, collisions):
    table = SidTable(CODES, width=(3, 2), collisions=collisions)
    table.save(tmp_path)
    loaded = SidTable.load(tmp_path)
    assert np.array_equal(loaded.codes, table.codes) and loaded.report() == table.report()
    assert (loaded.widths, loaded.base_levels, loaded.collisions) == (table.widths, 2, collisions)
    assert loaded.fingerprint() == table.fingerprint()
    SidTable(CODES[::-1], width=(3, 2), collisions=collisions).save(tmp_path / "other")
    (tmp_path / "other" / "sids.safetensors").replace(tmp_path / "sids.safetensors")
    with pytest.raises(ValueError, match="does not match sids.json"):
        SidTable.load(tmp_path)


def test_the_fingerprint_changes_with_codes_widths_and_collisions():
    tables = [SidTable(CODES, (3, 2)), SidTable(CODES, (4, 2)), SidTable(CODES, (3, 2), "share")]
    tables.append(SidTable(CODES[::-1], (3, 2)))
    assert len({table.fingerprint() for table in tables}) == 4
    assert SidTable(CODES.astype(np.int32), [3, 2]).fingerprint() == tables[0].fingerprint()


def test_table_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="item 2 has code 2 at level 1"):
        SidTable(CODES, width=2)
    with pytest.raises(ValueError, match='"extend" or "share", got \'drop\''):
        SidTable(CODES, collisions="drop")
    with pytest.raises(ValueError, match=r"shape \[..., 3\], got \[2\]"):
        SidTable(CODES).items_of([0, 1])


# --- published tables ------------------------------------------------------------------------------------------


def test_a_published_table_is_read_in_any_order(tmp_path):
    (tmp_path / "sids.txt").write_text("2 7 1\n1 0 3\n3 7 1\n")
    with gzip.open(tmp_path / "sids.txt.gz", "wt") as out:
        out.write("2 7 1\n1 0 3\n3 7 1\n")
    for name in ("sids.txt", "sids.txt.gz"):
        assert SidTable.from_file(tmp_path / name, width=8).codes.tolist() == [[0, 3, 0], [7, 1, 0], [7, 1, 1]]
        shared = SidTable.from_file(tmp_path / name, width=8, collisions="share")
        assert shared.codes.tolist() == [[0, 3], [7, 1], [7, 1]]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1 2 3\n2 x 3\n", "line 2: expected `item_id c1 c2 …`"),
        ("1 2 3\n\n", "line 2: expected"),
        ("1 2 3\n2\n", "line 2: expected a new item id"),
        ("1 2 3\n1 2 3\n", "line 2: expected a new item id"),
        ("0 2 3\n", "line 1: expected a new item id"),
        ("1 2 3\n2 4\n", "line 2: item 2 has 1 codes, the lines before have 2"),
        ("1 2 3\n4 4 4\n", "2 of the items 1..4 are missing, the first is item 2"),
        ("1 2 3\n2 2 256\n", "item 2 has code 256 at level 2"),
        ("", "no items"),
    ],
)
def test_a_bad_published_table_is_refused_with_its_reason(tmp_path, text, complaint):
    (tmp_path / "sids.txt").write_text(text)
    with pytest.raises(ValueError, match=complaint) as error:
        SidTable.from_file(tmp_path / "sids.txt")
    assert "sids.txt" in str(error.value)


@needs_shared
@pytest.mark.parametrize("variant", ["rkmeans_zcr", "rkmeans_native"])
def test_published_beauty_tables_load(variant):
    path = SHARED / "amazon-beauty" / f"semantic_ids.{variant}.txt.gz"
    table = SidTable.from_file(path)
    with gzip.open(path, "rt") as lines:
        sids = [tuple(map(int, line.split()[1:])) for line in lines]
    report = table.report()
    assert table.n_items == 12101 and table.base_levels == 4 and report["unique_sids"] == len(set(sids))
    assert table.codes[:, :4].tolist() == list(map(list, sids))
    if variant == "rkmeans_zcr":  # collisions were removed at the source
        assert table.levels == 4 and report["unique_sids"] == 12101 and report["collision_rate"] == 0
    else:
        assert table.levels == 5 and report["collision_rate"] > 0
    assert table.items_of(table.codes[:3]) == [[1], [2], [3]]
