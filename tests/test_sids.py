"""The SID encoders and SidTable: planted trees, brute force, the libraries as oracles,
hand-computed reports.
"""

import gzip
import json
import math
import pathlib
import warnings
from collections import defaultdict

import faiss
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sidlab.config import TrainConfig
from sidlab.data.catalogue import Catalogue
from sidlab.decoding import recommend, score_items
from sidlab.research.summary import metrics_of
from sidlab.sids import encoder as encoder_module
from sidlab.sids import residual_kmeans, rqvae
from sidlab.sids import table as table_module
from sidlab.sids.encoder import SidEncoder
from sidlab.sids.opq import OPQ
from sidlab.sids.residual_kmeans import ResidualKMeans
from sidlab.sids.rqvae import RQVAE
from sidlab.sids.table import PAD, SidTable
from sidlab.training import evaluate, train

SMALL = {"hidden": (32,), "latent": 8, "steps": 150}  # an RQ-VAE that fits in a blink
ENCODERS = [ResidualKMeans, RQVAE, OPQ]


def make(cls, levels=2, width=16, seed=0) -> SidEncoder:
    return cls(levels, width, seed, **SMALL if cls is RQVAE else {})


def planted_tree(widths, scales, seed, n=400, dim=32, noise=0.01):
    """codes [n, L], all codes of a level equally likely, and embeddings: the sum of an orthonormal
    vector per level.
    """
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, width, n) for width in widths], axis=1)
    x = rng.normal(0, noise, (n, dim))
    for level, (width, scale) in enumerate(zip(widths, scales)):
        x += scale * np.linalg.qr(rng.normal(size=(dim, width)))[0].T[codes[:, level]]
    return codes, x.astype(np.float32)


def embeddings_of(n=60, dim=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


# --- all encoders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ENCODERS)
def test_codes_are_in_range_and_longer_prefixes_reconstruct_better(cls):
    _, x = planted_tree((12, 6, 4), (1.0, 0.6, 0.35), seed=0)
    encoder = make(cls, levels=4).fit(x)
    assert encoder.widths == (16,) * 4 and len(encoder.codebooks_) == 4
    assert all(book.dtype == np.float32 and len(book) == 16 for book in encoder.codebooks_)
    codes = encoder.encode(x)
    assert (
        codes.dtype == np.int64
        and codes.shape == (400, 4)
        and codes.min() >= 0
        and codes.max() < 16
    )
    assert encoder.dead_codes_ == tuple(16 - len(set(column.tolist())) for column in codes.T)
    assert repr(encoder).endswith(
        f", {sum(encoder.dead_codes_)} of 64 codes dead"
    ) and "width=16" in repr(encoder)
    errors = [np.square(x - x.mean(axis=0)).sum()]
    for length in (1, 2, 3, 4):
        decoded = encoder.decode(codes[:, :length])
        assert decoded.dtype == np.float32 and decoded.shape == x.shape
        errors.append(np.square(x - decoded).sum())
    assert (np.diff(errors) <= 0.01 * errors[0]).all() and errors[4] < 0.5 * errors[0]
    assert np.array_equal(encoder.encode(x[:3].astype(np.float64)), codes[:3])
    assert encoder.encode(x[:0]).shape == (0, 4)


@pytest.mark.parametrize("cls", ENCODERS)
def test_equal_seeds_give_equal_codebooks_and_chunks_do_not_show(cls, monkeypatch):
    x = embeddings_of(300)
    first = make(cls, seed=3).fit(x)
    torch.manual_seed(7)
    np.random.seed(7)
    before = torch.random.get_rng_state(), np.random.get_state()[1]
    second = make(cls, seed=3).fit(x)
    assert (
        torch.equal(torch.random.get_rng_state(), before[0])
        and (np.random.get_state()[1] == before[1]).all()
    )
    assert all(np.array_equal(a, b) for a, b in zip(first.codebooks_, second.codebooks_))
    whole = first.encode(x)
    assert np.array_equal(second.encode(x), whole)
    if cls is not ResidualKMeans:  # Ward's start depends on the seed through its sample only
        assert not np.array_equal(make(cls, seed=4).fit(x).encode(x), whole)
    monkeypatch.setattr(encoder_module, "CHUNK", 7)
    assert np.array_equal(first.encode(x), whole)


@pytest.mark.parametrize("cls", ENCODERS)
@pytest.mark.parametrize("distinct", [2, 3])
def test_equal_embeddings_get_equal_codes_however_many_there_are(cls, distinct):
    rows = np.random.default_rng(0).permutation(10 * distinct + 10) % distinct
    x = embeddings_of(distinct)[rows]
    encoder = make(cls, width=8).fit(x)
    codes = encoder.encode(x)
    assert len({(row, *code) for row, code in zip(rows.tolist(), codes.tolist())}) == distinct
    assert np.isfinite(encoder.decode(codes)).all() and encoder.dead_codes_[0] >= 8 - distinct


@pytest.mark.parametrize("cls", ENCODERS)
def test_save_and_load_give_the_same_codes(cls, tmp_path):
    x = embeddings_of()
    encoder = make(cls, width=(8, 4) if cls is not OPQ else 8, seed=5).fit(x)
    encoder.save(tmp_path / "new" / "encoder")
    loaded = cls.load(tmp_path / "new" / "encoder")
    names = sorted(p.name for p in (tmp_path / "new" / "encoder").iterdir())
    assert names == [f"{cls.stem}.json", f"{cls.stem}.safetensors"]  # nothing left beside them
    assert repr(loaded) == repr(encoder) and loaded.dead_codes_ == encoder.dead_codes_
    assert (loaded.levels, loaded.widths, loaded.seed) == (2, encoder.widths, 5)
    assert all(np.array_equal(a, b) for a, b in zip(loaded.codebooks_, encoder.codebooks_))
    other = embeddings_of(200, seed=1)
    codes = encoder.encode(other)
    assert np.array_equal(loaded.encode(other), codes)
    assert np.array_equal(loaded.decode(codes[:, :1]), encoder.decode(codes[:, :1]))
    meta = tmp_path / "new" / "encoder" / f"{cls.stem}.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"width": [2, 2]}))
    with pytest.raises(ValueError, match=r"says widths \(2, 2\)"):
        cls.load(tmp_path / "new" / "encoder")


@pytest.mark.parametrize("cls", ENCODERS)
def test_embeddings_with_hardly_any_distinct_rows_are_refused_before_anything_is_fitted(
    cls, monkeypatch
):
    monkeypatch.setattr(cls, "_fit", lambda self, x: pytest.fail("fitted"))
    equal = np.full((300, 5), 0.3, np.float32)
    jitter = equal * (1 + 1e-7 * np.random.default_rng(0).normal(size=equal.shape))
    two = np.repeat(embeddings_of(2), 150, axis=0)
    for x, count in (
        (equal, "1 of the 300 rows is"),
        (jitter, "1 of the 300 rows is"),
        (two, "2 of the 300 rows are"),
    ):
        with pytest.raises(ValueError, match=f"must tell items apart, but only {count} distinct"):
            make(cls, width=4).fit(x)
    monkeypatch.setattr(encoder_module, "SAMPLE", 100)
    with pytest.raises(ValueError, match="1 of the 100 rows looked at is distinct"):
        make(cls, width=4).fit(equal)


@pytest.mark.parametrize("cls", ENCODERS)
def test_encoder_errors_say_what_is_wrong(cls, tmp_path):
    x = embeddings_of()
    for call in (
        lambda e: e.encode(x),
        lambda e: e.decode(np.zeros((1, 1), int)),
        lambda e: e.save(tmp_path),
    ):
        with pytest.raises(
            RuntimeError, match=f"this {cls.__name__} has no codebooks yet: call fit"
        ):
            call(make(cls))
    with pytest.raises(ValueError, match="seed must lie below 2..31 − levels, got 2147483647"):
        make(cls, seed=2**31 - 1)
    with pytest.raises(ValueError, match="width 64 needs .* got 60"):
        make(cls, width=64).fit(x)
    for bad in (np.nan, np.inf, 1e15, np.finfo(np.float32).min):
        broken = x.copy()
        broken[7, 1] = bad
        with pytest.raises(ValueError, match="1 rows are not, the first is row 7"):
            make(cls, width=4).fit(broken)
    encoder = make(cls, width=4).fit(x)
    with pytest.raises(ValueError, match="first is row 0"):
        encoder.encode(np.full((2, 5), np.nan))
    for wrong in (x[:, :4], x[0]):
        with pytest.raises(ValueError, match=r"shape \[n, 5\], got"):
            encoder.encode(wrong)
    with pytest.raises(ValueError, match=r"shape \[n, d\], got \[\]"):
        encoder.fit(np.float32(1))
    with pytest.raises(ValueError, match=r"\[m, 1..2\], got \[3, 3\]"):
        encoder.decode(np.zeros((3, 3), int))
    with pytest.raises(ValueError, match="code 4 at level 2"):
        encoder.decode(np.array([[0, 4]]))
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        cls(levels=0)
    for name, bad in {"levels": 2.0, "seed": None, "width": 8.0}.items():
        with pytest.raises(TypeError, match=f"{name} must be an integer, got {bad}"):
            cls(**{name: bad})


@pytest.mark.parametrize("cls", ENCODERS)
def test_large_embeddings_below_the_limit_are_encoded(cls):
    x = embeddings_of(200, 48)
    x *= np.float32(0.99e15 / np.abs(x).max())
    assert len(np.unique(make(cls, width=8).fit(x).encode(x), axis=0)) > 8


@pytest.mark.parametrize("cls", [*ENCODERS, SidTable])
def test_a_missing_or_damaged_file_is_named(cls, tmp_path):
    made = SidTable(CODES, (3, 2)) if cls is SidTable else make(cls, width=4).fit(embeddings_of())
    for damage in (
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_text("{}"),
    ):
        for suffix in ("json", "safetensors"):
            made.save(tmp_path)
            (path,) = tmp_path.glob(f"*.{suffix}")
            damage(path)
            with pytest.raises(ValueError, match=path.name):
                cls.load(tmp_path)


# --- residual k-means -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_tree_is_recovered_up_to_the_names_of_the_codes(seed):
    widths = (12, 6, 4)
    truth, x = planted_tree(widths, (1.0, 0.6, 0.35), seed)
    encoder = ResidualKMeans(levels=3, width=widths, seed=seed).fit(x)
    codes = encoder.encode(x)
    for level, width in enumerate(widths):
        pairs = set(zip(codes[:, level].tolist(), truth[:, level].tolist()))
        # A bijection
        assert len(pairs) == width == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    # The noise is 0.01 and the level means are estimated
    assert np.abs(encoder.decode(codes) - x).max() < 0.12


def test_encode_picks_the_nearest_centroid_of_each_residual_and_decode_sums_them():
    encoder = ResidualKMeans(levels=3, width=(8, 5, 3), seed=1).fit(embeddings_of(200))
    x = embeddings_of(50, seed=2)
    codes = encoder.encode(x)
    assert codes.dtype == np.int64 and codes.shape == (50, 3)
    for row, code in zip(x.astype(np.float64), codes):
        residual = row.copy()
        total = np.zeros(5)
        for level, book in enumerate(encoder.codebooks_):
            distance = ((residual - book) ** 2).sum(axis=1)
            assert distance[code[level]] <= distance.min() + 1e-6
            residual = residual - book[code[level]]
            total = total + book[code[level]]
            prefix = encoder.decode(code[None, : level + 1])
            assert prefix.dtype == np.float32
            np.testing.assert_allclose(prefix[0], total, atol=1e-6)


def test_a_common_offset_changes_nothing():
    truth, x = planted_tree((6, 4), (1.0, 0.4), seed=0)
    codes = (
        ResidualKMeans(levels=2, width=(6, 4)).fit(x + np.float32(300)).encode(x + np.float32(300))
    )
    for level, width in enumerate((6, 4)):
        assert len(set(zip(codes[:, level].tolist(), truth[:, level].tolist()))) == width


@pytest.mark.parametrize("wide", [4, 20])
def test_a_wide_level_without_a_wards_start_still_fits(wide, monkeypatch):
    monkeypatch.setattr(residual_kmeans, "WARD_WIDTH", 3)
    x = embeddings_of(200)
    encoder = ResidualKMeans(levels=1, width=wide).fit(x)
    assert len(np.unique(encoder.encode(x))) == wide
    assert ((x - encoder.decode(encoder.encode(x))) ** 2).sum() < ((x - x.mean(axis=0)) ** 2).sum()


@pytest.mark.parametrize("distinct", [2, 3, 8])
def test_fewer_distinct_embeddings_than_codes_are_kept_exactly(distinct):
    x = np.repeat(embeddings_of(distinct), 10, axis=0)[
        np.random.default_rng(0).permutation(10 * distinct)
    ]
    encoder = ResidualKMeans(levels=3, width=8).fit(x)
    codes = encoder.encode(x)
    assert len(np.unique(codes[:, 0])) == distinct
    assert not codes[:, 1:].any()  # every residual is zero: always the first of the equal centroids
    np.testing.assert_array_equal(encoder.decode(codes), x)


def test_many_equal_embeddings_among_few_others_do_not_break_the_start():
    x = np.concatenate([np.zeros((5000, 4), np.float32), embeddings_of(60, 4)])
    encoder = ResidualKMeans(levels=2, width=32).fit(x)
    codes = encoder.encode(x)
    assert len(np.unique(codes[:5000], axis=0)) == 1 and np.isfinite(encoder.decode(codes)).all()


# --- RQ-VAE ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted_rqvae():
    truth, x = planted_tree((12, 6, 4), (1.0, 0.6, 0.35), seed=0, n=1000)
    return truth, x, RQVAE(levels=3, width=(12, 6, 4), hidden=(64,), latent=16, steps=1000).fit(x)


def test_the_codes_of_an_rqvae_follow_the_branches_of_a_planted_tree(planted_rqvae):
    truth, x, encoder = planted_rqvae
    codes = encoder.encode(x)
    same_branch, same_code = (
        column[:, None] == column[None, :] for column in (truth[:, 0], codes[:, 0])
    )
    # Measured 1 and 0; by chance 0.08
    assert same_code[same_branch].mean() > 0.9 and same_code[~same_branch].mean() < 0.02
    assert len(np.unique(codes, axis=0)) == len(np.unique(truth, axis=0))


def test_an_rqvae_reconstructs_a_planted_tree_as_residual_k_means_does(planted_rqvae):
    _, x, encoder = planted_rqvae
    kmeans = ResidualKMeans(levels=3, width=(12, 6, 4)).fit(x)
    errors = [
        np.square(e.decode(e.encode(x)) - x).sum() / np.square(x).sum() for e in (encoder, kmeans)
    ]
    assert errors[0] < errors[1] + 0.002, errors  # measured, over three seeds: at most 0.0002 more


def test_an_rqvae_encodes_as_its_modules_and_picks_the_nearest_codes(planted_rqvae):
    _, x, encoder = planted_rqvae
    arrays = {name: torch.from_numpy(array) for name, array in encoder._arrays.items()}
    modules = {"encoder": rqvae._mlp((32, 64, 16)), "decoder": rqvae._mlp((16, 64, 32))}
    for name, module in modules.items():
        module.load_state_dict(
            {key.removeprefix(f"{name}."): a for key, a in arrays.items() if key.startswith(name)}
        )
    with torch.no_grad():
        latent = modules["encoder"]((torch.from_numpy(x) - arrays["mean"]) / arrays["scale"])
        total = torch.zeros_like(latent)
        for level, code in enumerate(encoder.encode(x).T):
            book = torch.from_numpy(encoder.codebooks_[level])
            distance = torch.cdist((latent - total).double(), book.double())
            assert (
                distance.gather(1, torch.from_numpy(code)[:, None])[:, 0]
                <= distance.min(dim=1).values + 1e-5
            ).all()
            total = total + book[code]
        decoded = modules["decoder"](total) * arrays["scale"] + arrays["mean"]
    np.testing.assert_allclose(encoder.decode(encoder.encode(x)), decoded, atol=1e-5)


@pytest.mark.parametrize("alike", [0, 900])
def test_revival_brings_a_bad_start_back_to_life(alike, monkeypatch):
    class FarAway:
        """Codes where no latent is: one of them takes all items."""

        def __init__(self, levels, widths, seed):
            self.widths = widths

        def _fit(self, latents):
            return [100 + embeddings_of(width, latents.shape[1]) for width in self.widths], {}

    x = np.concatenate([np.tile(embeddings_of(1, 16), (alike, 1)), embeddings_of(100, 16, seed=1)])
    monkeypatch.setattr(rqvae, "ResidualKMeans", FarAway)
    revived = RQVAE(levels=2, width=32, hidden=(32,), latent=8, steps=400).fit(x)
    monkeypatch.setattr(rqvae, "_revive", lambda *arguments: None)
    left = RQVAE(levels=2, width=32, hidden=(32,), latent=8, steps=400).fit(x)
    assert sum(revived.dead_codes_) <= 4 and sum(left.dead_codes_) >= 40, (revived, left)


@pytest.mark.parametrize("change", [{"hidden": (32, 0)}, {"latent": 0}, {"steps": 0}, {"batch": 0}])
def test_an_rqvae_without_layers_or_steps_is_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        RQVAE(**change)


# --- OPQ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "levels", "padded"), [(12, 4, 12), (10, 4, 12), (5, 8, 8)])
def test_opq_gives_the_codes_of_faiss_with_the_same_rotation_and_codebooks(dim, levels, padded):
    x = embeddings_of(200, dim) @ embeddings_of(dim, dim, seed=1)
    encoder = OPQ(levels, width=16).fit(x)
    rotation = encoder._arrays["rotation"]
    mean = encoder._arrays["mean"]
    assert rotation.shape == (padded, dim)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(dim), atol=1e-4)  # nothing is lost
    transform = faiss.LinearTransform(dim, padded, True)
    faiss.copy_array_to_vector(rotation.ravel(), transform.A)
    faiss.copy_array_to_vector(-rotation @ mean, transform.b)
    transform.is_trained = True
    quantiser = faiss.ProductQuantizer(padded, levels, 4)
    faiss.copy_array_to_vector(np.stack(encoder.codebooks_).ravel(), quantiser.centroids)
    packed = quantiser.compute_codes(transform.apply(x))
    codes = encoder.encode(x)
    assert np.array_equal(codes, faiss.unpack_bitstrings(packed, levels, 4))
    theirs = (quantiser.decode(packed) @ rotation) + mean
    np.testing.assert_allclose(encoder.decode(codes), theirs, atol=1e-4)


def test_a_prefix_of_an_opq_code_leaves_the_other_slices_at_their_mean():
    x = embeddings_of(200, 8)
    encoder = OPQ(4, width=16).fit(x)
    codes = encoder.encode(x)
    turned = (encoder.decode(codes[:, :2]) - x.mean(axis=0)) @ encoder._arrays["rotation"].T
    np.testing.assert_allclose(turned[:, 4:], 0, atol=1e-5)
    np.testing.assert_allclose(turned[:, 2:4], encoder.codebooks_[1][codes[:, 1]], atol=1e-5)


def test_opq_beats_product_quantisation_without_a_rotation_where_dimensions_correlate():
    rng = np.random.default_rng(0)
    x = (
        rng.normal(size=(1000, 4)) @ rng.normal(size=(4, 16)) + 0.1 * rng.normal(size=(1000, 16))
    ).astype(np.float32)
    encoder = OPQ(4, width=16).fit(x)
    plain = faiss.ProductQuantizer(16, 4, 4)
    plain.train(x)
    error = np.square(x - encoder.decode(encoder.encode(x))).sum()
    assert error < 0.8 * np.square(x - plain.decode(plain.compute_codes(x))).sum()


@pytest.mark.parametrize("width", [12, 1, (8, 16)])
def test_opq_needs_one_power_of_two(width):
    with pytest.raises(ValueError, match="width must be one power of two"):
        OPQ(levels=2, width=width)


# --- the table ------------------------------------------------------------------------------------

# Groups: items 1 3 5, items 2 6, item 4
CODES = np.array([[0, 1], [2, 1], [0, 1], [0, 0], [0, 1], [2, 1]])


def test_extend_numbers_each_group_by_item_id():
    table = SidTable(CODES, width=(3, 2))
    assert table.codes.tolist() == [
        [0, 1, 0],
        [2, 1, 0],
        [0, 1, 1],
        [0, 0, 0],
        [0, 1, 2],
        [2, 1, 1],
    ]
    assert (table.widths, table.levels, table.base_levels, table.n_items) == ((3, 2, 3), 3, 2, 6)
    assert table.offsets == (3, 6, 8) and table.vocab_size == 3 + 3 + 2 + 3
    assert table.item_tokens.dtype == torch.int64
    assert table.item_tokens.tolist() == [
        [PAD] * 3,
        [3, 7, 8],
        [5, 7, 8],
        [3, 7, 9],
        [3, 6, 8],
        [3, 7, 10],
        [5, 7, 9],
    ]
    assert table.items_of([0, 1, 2]) == [5] and table.items_of([0, 0, 1]) == []


def test_share_leaves_the_codes_and_expands_a_hit():
    table = SidTable(CODES, width=(3, 2), collisions="share")
    assert table.codes.tolist() == CODES.tolist() and table.widths == (3, 2)
    assert table.items_of([[[0, 1], [2, 1]], [[0, 0], [1, 1]]]) == [[[1, 3, 5], [2, 6]], [[4], []]]
    assert table.items_of(torch.tensor([9, 1])) == []


def test_without_collisions_no_level_is_added():
    table = SidTable(CODES[[0, 1, 3]], width=4)
    assert table.levels == 2 and table.widths == (4, 4)


@settings(max_examples=60)
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
            assert table.codes[:, 2].tolist() == [
                groups[row].index(item) for item, row in enumerate(rows, start=1)
            ]
            assert table.widths[2] == max(map(len, groups.values()))
    tokens = table.item_tokens[1:].numpy()
    assert np.array_equal(tokens - np.array(table.offsets), table.codes)
    for level, (offset, width) in enumerate(zip(table.offsets, table.widths)):
        assert ((tokens[:, level] >= offset) & (tokens[:, level] < offset + width)).all()


def test_the_report_equals_numbers_worked_out_by_hand():
    report = SidTable(CODES, width=(3, 2)).report()
    assert json.loads(json.dumps(report)) == report  # plain values only
    assert (
        report["n_items"],
        report["levels"],
        report["unique_sids"],
        report["largest_group"],
    ) == (6, 3, 3, 3)
    assert report["collision_rate"] == pytest.approx(5 / 6)
    first, second, added = report["per_level"]
    # Code 0 four times, code 2 twice
    entropy = -(4 / 6 * math.log(4 / 6) + 2 / 6 * math.log(2 / 6))
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
    assert (second["used"], second["prefixes"], second["mean_group"], second["largest_group"]) == (
        2,
        3,
        2.0,
        3,
    )
    assert (added["width"], added["used"], added["prefixes"], added["largest_group"]) == (
        3,
        3,
        6,
        1,
    )
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
        want = np.square(rest).sum() / np.square(x - x.astype(np.float64).mean(axis=0)).sum()
        assert rows[level]["reconstruction_error"] == pytest.approx(want, rel=1e-5)
    assert 0 < rows[1]["reconstruction_error"] < rows[0]["reconstruction_error"] < 1
    assert rows[2]["reconstruction_error"] is None
    equal = np.full((60, 5), 0.1, np.float32)
    assert (
        SidTable(codes, width=encoder.widths).report(encoder, equal)["per_level"][0][
            "reconstruction_error"
        ]
        is None
    )
    with pytest.raises(ValueError, match="encoder without embeddings"):
        SidTable(codes, width=encoder.widths).report(encoder)
    with pytest.raises(ValueError, match=r"one row per item \(60\), got 59"):
        SidTable(codes, width=encoder.widths).report(encoder, x[:59])
    with pytest.raises(ValueError, match="60 rows are not"):
        SidTable(codes, width=encoder.widths).report(embeddings=np.full_like(x, np.nan))


def test_an_offset_of_all_embeddings_does_not_change_the_reconstruction_error(monkeypatch):
    """What all embeddings have in common is no achievement of the codes."""
    monkeypatch.setattr(table_module, "CHUNK", 17)
    x = embeddings_of(200)
    found = []
    for offset in (0, 8):
        moved = x + np.float32(offset)
        encoder = ResidualKMeans(levels=2, width=(4, 8)).fit(moved)
        rows = SidTable(encoder.encode(moved), encoder.widths, "share").report(encoder, moved)[
            "per_level"
        ]
        found.append([row["reconstruction_error"] for row in rows])
    assert found[0] == pytest.approx(found[1], rel=1e-3) and found[0][0] > 0.2

    class Mean:  # one code for all explains nothing
        def decode(self, codes):
            return np.repeat(x.astype(np.float64).mean(axis=0)[None], len(codes), axis=0)

    one_code = SidTable(np.zeros((200, 1), int), 1, "share").report(Mean(), x)["per_level"][0]
    assert one_code["reconstruction_error"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("n", "queries", "collisions"),
    [(60, 2000, "extend"), (60, 15, "share"), (7, 2000, "share"), (2, 9, "share")],
)
def test_the_report_counts_neighbours_with_the_same_prefix(n, queries, collisions, monkeypatch):
    monkeypatch.setattr(table_module, "QUERIES", queries)
    x = embeddings_of(n)
    codes = np.random.default_rng(1).integers(0, 2, (n, 3))
    x[0] = 0  # an item without a text has no neighbours
    sids = SidTable(codes, 2, collisions)
    rows = sids.report(embeddings=x)["per_level"]
    items = np.random.default_rng(0).permutation(np.arange(1, n))[:queries]
    cosine = (
        x @ x.T / np.maximum(np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(x, axis=1), 1e-9)
    )
    np.fill_diagonal(cosine, -2)
    for level, row in enumerate(rows, start=1):
        same = np.array([[(a[:level] == b[:level]).all() for b in sids.codes] for a in sids.codes])
        near = np.mean([same[i, np.argsort(-cosine[i])[: min(10, n - 1)]].mean() for i in items])
        assert row["neighbour_overlap"] == pytest.approx(near)
        assert row["chance_overlap"] == pytest.approx((same.sum() - n) / (n * (n - 1)))
        assert "reconstruction_error" not in row


def test_neighbours_of_equal_embeddings_leave_out_the_item_itself():
    x = np.repeat(embeddings_of(2), 30, axis=0)
    rows = SidTable(np.repeat([[0], [1]], 30, axis=0), 2, "share").report(embeddings=x)["per_level"]
    assert rows[0]["neighbour_overlap"] == 1 and rows[0]["chance_overlap"] == pytest.approx(29 / 59)
    items, neighbours = table_module._neighbours(x)
    assert neighbours.shape == (60, 10) and not (neighbours == items[:, None]).any()
    assert (
        SidTable(CODES, (3, 2)).report(embeddings=np.zeros((6, 2)))["per_level"][0][
            "neighbour_overlap"
        ]
        is None
    )
    assert "neighbour_overlap" not in SidTable([[0]], 1).report(embeddings=x[:1])["per_level"][0]


def test_a_residual_encoder_keeps_neighbours_together_far_more_than_chance():
    _, x = planted_tree((12, 6, 4), (1.0, 0.6, 0.35), seed=0)
    encoder = ResidualKMeans(levels=3, width=(12, 6, 4)).fit(x)
    first = SidTable(encoder.encode(x), encoder.widths).report(encoder, x)["per_level"][0]
    assert first["neighbour_overlap"] > 0.9 and first["chance_overlap"] < 0.1


def test_a_model_of_shared_sids_trains_and_recommends_every_sharer(tmp_path):
    items = np.arange(1, 31)
    # Three items a SID
    sids = SidTable(np.stack([items % 5, items % 2], axis=1), width=(5, 2), collisions="share")
    frame = pd.DataFrame(
        {"item_id": items, "title": "x", "brand": None, "categories": [[]] * 30, "text": None}
    )
    catalogue = Catalogue(
        "shop", frame, [np.roll(items, shift)[:8] for shift in range(30)], list(range(30))
    )
    config = TrainConfig.preset("smoke", max_updates=2)
    model = train(config, catalogue, sids, progress=False).model
    found, scores = recommend(model, catalogue.histories[:4], k=30, beam=30)
    exact = score_items(model, catalogue.histories[:4])
    for row in range(4):
        assert sorted(found[row].tolist()) == items.tolist()
        groups = found[row].view(10, 3)  # each SID's items together, by id, with one score
        assert all(sids.items_of(sids.codes[group[0] - 1]) == group.tolist() for group in groups)
        torch.testing.assert_close(scores[row], exact[row, found[row] - 1], rtol=1e-4, atol=1e-4)
    # Whichever of the sharers is the target: the first place of all three.
    for member in (3, 4, 5):
        ranks = evaluate(model, catalogue.histories[:4], found[:, member].numpy(), k=10)
        assert ranks["rank"].tolist() == [4] * 4 and ranks["sharers"].tolist() == [3] * 4
    assert metrics_of(ranks)["recall@5"] == pytest.approx(2 / 3), "places 4 and 5 of 4 to 6"
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.table.collisions == "share"
    assert torch.equal(recommend(again, catalogue.histories[:4], k=30, beam=30)[0], found)


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
    with pytest.raises(
        ValueError, match="collisions='drop' is unknown; use one of 'extend', 'share'"
    ):
        SidTable(CODES, collisions="drop")
    with pytest.raises(ValueError, match=r"shape \[..., 3\], got \[2\]"):
        SidTable(CODES).items_of([0, 1])


# --- published tables -----------------------------------------------------------------------------


def test_a_published_table_is_read_in_any_order(tmp_path):
    (tmp_path / "sids.txt").write_text("2 7 1\n1 0 3\n3 7 1\n")
    with gzip.open(tmp_path / "sids.txt.gz", "wt") as out:
        out.write("2 7 1\n1 0 3\n3 7 1\n")
    for name in ("sids.txt", "sids.txt.gz"):
        assert SidTable.from_file(tmp_path / name, width=8).codes.tolist() == [
            [0, 3, 0],
            [7, 1, 0],
            [7, 1, 1],
        ]
        shared = SidTable.from_file(tmp_path / name, width=8, collisions="share")
        assert shared.codes.tolist() == [[0, 3], [7, 1], [7, 1]]


def test_a_published_table_is_as_wide_as_its_highest_code_needs(tmp_path):
    for highest, width in ((3, 256), (255, 256), (256, 257), (4095, 4096)):
        (tmp_path / "sids.txt").write_text(f"1 0 {highest}\n2 1 2\n")
        table = SidTable.from_file(tmp_path / "sids.txt", collisions="share")
        assert table.widths == (width, width) and table.codes[0, 1] == highest


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1 2 3\n2 x 3\n", "line 2: expected `item_id c1 c2 …`"),
        ("1 2 3\n\n2 3 4\n", "line 2: expected"),
        ("1 2 1_3\n", "line 1: expected"),
        ("1 2 3\n2\n", "line 2: expected a new item id"),
        ("1 2 3\n1 2 3\n", "line 2: expected a new item id"),
        ("0 2 3\n", "line 1: ids seem to start at 0"),
        ("1 2 3\n2 4\n", "line 2: item 2 has 1 codes, the lines before have 2"),
        ("1 2 3\n4 4 4\n", "2 of the items 1..4 are missing, the first is item 2"),
        ("1 2 3\n2 2 65536\n", "item 2 has code 65536 at level 2"),
        ("1 2 3\n2 2 -1\n", "item 2 has code -1 at level 2"),
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
    assert (
        table.n_items == 12101
        and table.base_levels == 4
        and report["unique_sids"] == len(set(sids))
    )
    assert table.codes[:, :4].tolist() == list(map(list, sids))
    if variant == "rkmeans_zcr":  # collisions were removed at the source
        assert (
            table.levels == 4 and report["unique_sids"] == 12101 and report["collision_rate"] == 0
        )
    else:
        assert table.levels == 5 and report["collision_rate"] > 0
    assert table.items_of(table.codes[:3]) == [[1], [2], [3]]


INDEX = {
    "LC-Rec": {"1": ["<a_0>", "<b_3>"], "0": ["<a_200>", "<b_1>"]},
    "from 1": {"2": ["<a_0>", "<b_3>"], "1": ["<a_200>", "<b_1>"]},
    "a list": [["<a_200>", "<b_1>"], ["<a_0>", "<b_3>"]],
    "numbers": {"1": [0, 3], "0": [200, 1]},
    "names": {"B02": ["<a_0>", "<b_3>"], "B01": ["<a_200>", "<b_1>"]},
}


@pytest.mark.parametrize("kind", INDEX)
def test_an_index_file_is_read_in_the_order_of_the_items(tmp_path, kind, recwarn):
    path = tmp_path / "Beauty.index.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(INDEX[kind], indent=1).encode() + b"\r\n\n")
    table = SidTable.from_file(path, item_ids=["B01", "B02"])
    assert table.codes.tolist() == [[200, 1], [0, 3]] and table.widths == (256, 256)
    told = [str(warning.message) for warning in recwarn.list]
    assert len(told) == (kind in ("LC-Rec", "a list", "numbers"))
    assert all("ids 0..1 are taken for the items 1..2" in message for message in told)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("turned", [False, True])
def test_arrays_are_read_either_way_round(tmp_path, suffix, turned):
    codes = np.array([[0, 3], [7, 1], [7, 1]], np.int32)
    given = np.ascontiguousarray(codes.T) if turned else codes
    path = tmp_path / f"sids{suffix}"
    if suffix == ".npy":
        np.save(path, given)
    elif suffix == ".npz":
        np.savez(path, codes=given.astype(float))
    elif suffix == ".safetensors":
        save_file({"codes": torch.from_numpy(given)}, path)
    else:
        torch.save(torch.from_numpy(given), path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = SidTable.from_file(path, collisions="share")
    assert table.codes.tolist() == codes.tolist()
    told = [str(warning.message) for warning in caught]
    assert any("is taken for 2 levels, 3 items" in message for message in told) == turned


def test_what_only_code_could_unpack_is_refused(tmp_path):
    ran = tmp_path / "ran"

    class Malicious:
        def __reduce__(self):
            return (pathlib.Path.touch, (ran,))

    torch.save({"codes": Malicious()}, tmp_path / "sids.pt")
    np.save(tmp_path / "sids.npy", np.array([Malicious()], object), allow_pickle=True)
    for name in ("sids.pt", "sids.npy"):
        with pytest.raises(ValueError, match=f"{name} can't be read as an array"):
            SidTable.from_file(tmp_path / name)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", '{"0": ["<a_1>"', "must be JSON"),
        ("a.json", '{"0": "<a_1>"}', "item '0' must have a list such as"),
        ("a.json", '{"0": ["<a_1>", "x"]}', "item '0' must have a list such as"),
        ("a.json", "{}", "no items"),
        ("a.json", '{"0": ["<a_1>"], "0": ["<a_2>"]}', "'0' is named twice"),
        ("a.json", '{"0": 5}', "item '0' must have a list such as"),
        ("a.json", '{"0": []}', "item '0' must have a list such as"),
        (
            "a.json",
            '{"0": ["<a_1>"], "1": ["<a_1>", "<b_2>"]}',
            "item '1' has 2 codes, those before",
        ),
        ("a.json", '{"0": ["<a_1>"], "2": ["<a_2>"]}', "1 of the items 0..2 are missing.*item 1"),
        ("a.json", '{"B1": ["<a_1>"], "B2": ["<a_2>"]}', "give item_ids=catalogue.item_ids"),
        ("a.json", '{"0": ["<a_99999999999999999999>"]}', "codes must be below"),
        ("a.txt", "1 2\nx" + "7" * 100_000, "line 2: expected"),
        ("a.txt", "1 2\n2 " + "7" * 4000, "line 2: codes must be below"),
        ("a.txt", "1 2\n2" + " 7" * 100_000, "item 2 has 100000 codes"),
        ("a.npy", b"junk", "can't be read as an array"),
        ("a.pt", b"junk", "can't be read as an array"),
    ],
)
def test_a_bad_published_file_is_refused_in_few_words(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=complaint) as error:
        SidTable.from_file(tmp_path / name)
    assert len(str(error.value).replace(str(tmp_path), "")) < 400


def test_of_items_named_by_the_data_the_missing_one_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"B1": ["<a_1>"], "B2": ["<a_2>"]}')
    with pytest.raises(ValueError, match="1 of the 3 items are missing, the first is 'B3'"):
        SidTable.from_file(tmp_path / "a.json", item_ids=["B1", "B2", "B3"])


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.zeros(3, int), r"got the shape \[3\]"),
        (np.zeros((3, 0), int), r"got the shape \[3, 0\]"),
        (np.full((3, 2), 0.5), "must hold integers, got float64 such as 0.5"),
        (np.array([["a"]]), "must hold integers|can't be read"),
        (np.full((3, 2), -1), "item 1 has code -1"),
    ],
    ids=str,
)
def test_arrays_that_are_no_codes_are_refused(tmp_path, array, complaint):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=complaint):
        SidTable.from_file(tmp_path / "a.npy")


def test_many_items_on_one_sid_are_told(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1, 2]] * 9 + [[1, 3]]))
    with pytest.warns(UserWarning, match="9 of 10 items share one SID"):
        SidTable.from_file(tmp_path / "a.npy")
    with pytest.raises(ValueError, match='70,000 of 70,000 items share one SID.*"share"'):
        SidTable(np.zeros((70_000, 2), int), width=4)
