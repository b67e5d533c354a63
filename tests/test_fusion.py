"""Several sources in one SID: scales, orders, and that behaviour is what stands together."""

import numpy as np
import pytest

from sidlab.sids.fusion import collaborative_embeddings, fuse_codes, fuse_embeddings
from sidlab.sids.residual_kmeans import ResidualKMeans

RNG = np.random.default_rng(0)
SOURCES = {"text": RNG.normal(5, 100, (60, 8)), "behaviour": RNG.normal(0, 0.01, (60, 3))}


@pytest.mark.parametrize("weights", (None, {"text": 3.0, "behaviour": 1.0}))
def test_sources_weigh_what_they_are_told_to(weights):
    fused = fuse_embeddings(SOURCES, weights)
    assert fused.shape == (60, 11) and fused.dtype == np.float32
    for part, weight in ((fused[:, :8], (weights or {}).get("text", 1)), (fused[:, 8:], 1)):
        assert (part.astype(np.float64) ** 2).sum(1).mean() == pytest.approx(weight, rel=1e-4)
        assert np.abs(part.mean(0)).max() < 1e-5
    within = np.corrcoef(
        *(np.linalg.norm(x[:1] - x[1:], axis=1) for x in (fused[:, :8], SOURCES["text"]))
    )
    assert within[0, 1] > 0.999999  # distances inside a source keep their order


def test_levels_belong_to_their_source():
    codes, widths = fuse_codes(SOURCES, {"text": 2, "behaviour": 1}, width=(6, 5, 4))
    assert codes.shape == (60, 3) and widths == (6, 5, 4)
    text = ResidualKMeans(levels=2, width=(6, 5), seed=0).fit(SOURCES["text"].astype(np.float32))
    assert np.array_equal(codes[:, :2], text.encode(SOURCES["text"].astype(np.float32)))
    moved, _ = fuse_codes(
        SOURCES | {"behaviour": SOURCES["behaviour"][::-1]},
        {"text": 2, "behaviour": 1},
        width=(6, 5, 4),
    )
    assert np.array_equal(moved[:, :2], codes[:, :2]) and not np.array_equal(
        moved[:, 2], codes[:, 2]
    )


def test_items_of_one_circle_of_buyers_get_like_vectors():
    """Two groups of items that never meet, and one that nobody buys."""
    rng = np.random.default_rng(1)
    train = [rng.integers(1, 11, 8) for _ in range(80)] + [
        rng.integers(11, 21, 8) for _ in range(80)
    ]
    vectors = collaborative_embeddings(train, 21, dim=4)
    assert vectors.shape == (21, 4) and vectors.dtype == np.float32
    likeness = vectors @ vectors.T
    assert likeness[:10, :10].mean() > likeness[:10, 10:20].mean() + 0.3
    assert not vectors[20].any() and np.allclose(np.linalg.norm(vectors[:20], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_a_source_that_is_equal_up_to_rounding_is_refused_and_a_small_signal_is_not(dtype):
    text = SOURCES["text"]
    n = len(SOURCES["text"])
    same = np.tile(np.array([0.1, -3.3, 0], dtype), (n, 1))
    rounded = np.where(RNG.random(same.shape) < 0.5, same, np.nextafter(same, dtype(4)))
    rounded[:, 2] = 0
    signal = np.full((n, 2), 100, dtype)
    signal[0, 1] += 1
    for source in (same, rounded):
        for fuse in (fuse_embeddings, lambda sources: fuse_codes(sources, {"text": 1, "c": 1}, 4)):
            with pytest.raises(ValueError, match=r"sources\['c'\] says the same of every item"):
                fuse({"text": text, "c": source})
    fused = fuse_embeddings({"text": text, "c": signal})[:, 8:].astype(np.float64)
    assert (fused**2).sum(1).mean() == pytest.approx(1, rel=1e-3)
    assert (
        len(np.unique(fuse_codes({"text": text, "c": signal}, {"text": 1, "c": 1}, 4)[0][:, 1]))
        == 2
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: fuse_embeddings({}), "with one row an item"),
        (
            lambda: fuse_embeddings({"a": np.ones((3, 2)), "b": np.ones((4, 2))}),
            "with one row an item",
        ),
        (lambda: fuse_embeddings({"a": np.ones((3, 2))}), "says the same of every item"),
        (
            lambda: fuse_embeddings({"a": np.array([[1.0], [np.nan]])}),
            "must be finite; item 2 is not",
        ),
        (
            lambda: fuse_embeddings(SOURCES, {"text": 1.0}),
            "weights must give each of text, behaviour",
        ),
        *(
            (
                lambda weight=weight: fuse_embeddings(SOURCES, {"text": 1.0, "behaviour": weight}),
                f"a finite number above 0, got .*{weight}",
            )
            for weight in (0.0, np.nan, np.inf)
        ),
        (
            lambda: fuse_embeddings({"a": SOURCES["text"] * 1e-200}),
            "too small or too large for their squares",
        ),
        (lambda: fuse_embeddings({"a": np.ones((0, 2))}), "with one row an item"),
        (lambda: fuse_codes(SOURCES, {"text": 1, "behaviour": 0}), "at least 1 level"),
        (lambda: collaborative_embeddings([np.array([1])], 3), "no history of two items"),
    ],
)
def test_bad_sources_say_what_is_right(make, message):
    with pytest.raises(ValueError, match=message):
        make()
