"""The SID explorer shows what residual k-means does: checked against a fit of its own, brute-force
prefixes and the planted tree.
"""

import collections
import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from conftest import connect, frames_of
from sklearn.feature_extraction.text import CountVectorizer

from sidlab.data.planted import planted_catalogue
from sidlab.sids.residual_kmeans import ResidualKMeans
from sidlab.sids.table import SidTable
from sidlab.viz import SidExplorer
from sidlab.viz.sid_figure import (
    AXES,
    SYMBOLS,
    main_plane,
    prefix_nodes,
    typical_words,
)

WORLD = planted_catalogue(20, seed=3)
SETTINGS = (
    {"levels": 3, "width": 8, "after": 1},
    {"levels": 2, "width": 16, "after": 2},
    {"levels": 1, "width": 2, "after": 0},
    {"levels": 3, "width": 4, "after": 2, "axes": AXES[1]},
    {"levels": 4, "width": 32, "after": 3},
)


@pytest.fixture(scope="module")
def explorer():
    return SidExplorer(WORLD)


def fitted(levels, width):
    encoder = ResidualKMeans(levels, width, 0).fit(WORLD.embeddings)
    return encoder, encoder.encode(WORLD.embeddings)


def plain(figure):
    content = json.loads(figure.to_json())
    for trace in content["data"]:
        trace.pop("uid", None)
    return content


def no_nones(node):
    return (
        {k: no_nones(v) for k, v in node.items() if v is not None}
        if isinstance(node, dict)
        else node
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_map_is_what_a_fit_of_these_levels_leaves(explorer, setting):
    explorer.set(**({"axes": AXES[0]} | setting))
    encoder, codes = fitted(setting["levels"], setting["width"])
    x = WORLD.embeddings
    after = setting["after"]
    left = x - (encoder.decode(codes[:, :after]) if after else x.mean(axis=0))
    circle, items, centroids, _ = explorer.figure.data
    assert np.hypot(circle.x, circle.y) == pytest.approx(
        np.sqrt((left.astype(float) ** 2).sum(axis=1).mean()), rel=1e-5
    )
    seen = left if setting.get("axes", AXES[0]) == AXES[0] else x - x.mean(axis=0)
    directions = np.linalg.svd(seen.astype(float), full_matrices=False)[2][:2]
    expected = np.abs(left @ directions.T)  # either sign
    assert np.abs(np.column_stack([items.x, items.y])) == pytest.approx(expected, abs=1e-4)
    level = min(after + 1, setting["levels"])
    assert list(items.marker.symbol) == [SYMBOLS[c] for c in codes[:, level - 1]]
    assert len(centroids.x) == (
        len(np.unique(codes[:, level - 1])) if after < setting["levels"] else 0
    )


def test_residuals_shrink_and_centroids_stand_amid_their_items(explorer):
    radius = []
    for after in range(4):
        explorer.set(levels=4, width=8, after=after, axes=AXES[0])
        circle, items, centroids, _ = explorer.figure.data
        radius.append(np.hypot(circle.x[0], circle.y[0]))
        assert (
            max(np.abs(items.x).max(), np.abs(items.y).max())
            < explorer.figure.layout.xaxis.range[1]
        )
        code = fitted(4, 8)[1][:, after]
        for place, c in enumerate(np.unique(code)):
            here = code == c
            assert centroids.x[place] == pytest.approx(np.array(items.x)[here].mean(), abs=1e-3)
            assert centroids.y[place] == pytest.approx(np.array(items.y)[here].mean(), abs=1e-3)
    assert all(later < earlier for earlier, later in itertools.pairwise(radius))


@pytest.mark.parametrize("setting", SETTINGS)
def test_tree_holds_every_prefix_and_hatches_shared_sids(explorer, setting):
    explorer.set(**setting)
    levels = setting["levels"]
    codes = fitted(setting["levels"], setting["width"])[1]
    count = collections.Counter(
        "-".join(map(str, sid[:level])) for sid in codes.tolist() for level in range(1, levels + 1)
    )
    tree = explorer.figure.data[3]
    found = dict(zip(tree.ids, tree.values))
    assert found.pop("all") == 160 and found == count
    assert all(
        parent == (name.rpartition("-")[0] or "all")
        for name, parent in zip(tree.ids[1:], tree.parents[1:])
    )
    hatched = {name for name, shape in zip(tree.ids, tree.marker.pattern.shape) if shape}
    assert hatched == {name for name in count if name.count("-") == levels - 1 and count[name] > 1}


def test_text_holds_the_meters(explorer):
    for setting in SETTINGS:
        explorer.set(**setting)
        encoder, codes = fitted(setting["levels"], setting["width"])
        report = SidTable(codes, setting["width"]).report(encoder, WORLD.embeddings)
        text = explorer.text
        said = " ".join(re.sub(r"<[^>]+>", " ", text).split())
        assert (
            f"{report['unique_sids']} different ones" in said
            and f"{report['collision_rate']:.1%} of the items share" in said
        )
        assert ("de-duplication digit" in said) == (report["largest_group"] > 1)
        for row in report["per_level"][: setting["levels"]]:
            for shown in (
                f"{row['used']} of {row['width']}",
                f"{row['perplexity']:.1f}",
                f"{row['reconstruction_error']:.1%}",
            ):
                assert shown in said
        assert all(title in said for title in WORLD.items.title), "the map as a table"


def test_words_name_the_branches_of_the_planted_tree():
    counter = CountVectorizer(binary=True)
    has_word = counter.fit_transform(WORLD.items.text)
    nodes = prefix_nodes(
        WORLD.truth.tree, has_word, counter.get_feature_names_out(), WORLD.items.title.tolist()
    )
    item = {
        "-".join(map(str, path)): title
        for path, title in zip(WORLD.truth.tree.tolist(), WORLD.items.title)
    }
    for node in nodes:
        below = [title for path, title in item.items() if f"{path}-".startswith(f"{node['id']}-")]
        assert node["items"] == len(below) and all(
            title in below for title in node["titles"].removesuffix(" …").split("; ")
        )
        assert node["share"] == pytest.approx(1)
        department = WORLD.items.categories[WORLD.items.title.tolist().index(below[0])][-1].lower()
        brand = WORLD.items.brand[WORLD.items.title.tolist().index(below[0])].lower()
        assert node["word"] == (department, brand, below[0].split()[-1])[node["level"] - 1]


def test_no_word_where_none_rises():
    words, share, _ = typical_words(
        np.array([0, 0, 1]), np.array([[1, 0], [1, 0], [1, 0]]), np.array(["a", "b"])
    )
    assert words.tolist() == ["", ""] and share.tolist() == [0, 0]


def test_main_plane_is_the_same_for_either_sign():
    x = np.random.default_rng(0).normal(size=(50, 6)) * [5, 3, 1, 1, 1, 1]
    plane = main_plane(x)
    assert plane == pytest.approx(main_plane(-x)) and plane.T @ plane == pytest.approx(
        np.eye(2), abs=1e-9
    )
    assert np.abs(plane[:2]).argmax(axis=0).tolist() == [0, 1]


def test_following_equals_a_fresh_explorer(explorer):
    for setting in SETTINGS:
        for name, value in setting.items():
            explorer.controls[name].value = value
        values = {name: control.value for name, control in explorer.controls.items()}
        fresh = SidExplorer(WORLD, **values)
        assert (
            no_nones(plain(explorer.figure)) == no_nones(plain(fresh.figure))
            and explorer.text == fresh.text
        )


def test_items_are_known_again_and_move_only_on_axes_that_stay(explorer):
    explorer.set(levels=3, width=8, after=0, axes=AXES[1])
    before = explorer.figure.data[1]
    assert (
        len(set(before.ids)) == len(before.ids) == 160
        and explorer.figure.layout.transition.duration == 600
    )
    reach = explorer.figure.layout.xaxis.range
    explorer.set(after=1)
    after = explorer.figure.data[1]
    assert (
        after.ids == before.ids
        and explorer.figure.layout.xaxis.range == reach
        and "The axes stay" in explorer.text
    )
    _, codes = fitted(3, 8)  # all items of a code move by the same step: its centroid
    step = np.column_stack([np.subtract(before.x, after.x), np.subtract(before.y, after.y)])
    for code in np.unique(codes[:, 0]):
        assert np.ptp(step[codes[:, 0] == code], axis=0) == pytest.approx(0, abs=1e-4)
    explorer.set(axes=AXES[0])
    assert explorer.figure.layout.transition.duration is None and "The axes change" in explorer.text


def test_small_parts_of_the_tree_have_codes_only_and_words_on_hover(explorer):
    explorer.set(levels=3, width=8)
    tree = explorer.figure.data[3]
    for name, label, items, hover in zip(
        tree.ids[1:], tree.labels[1:], tree.values[1:], tree.hovertext[1:]
    ):
        code, _, word = label.partition(" ")
        assert code == name.rpartition("-")[2]
        assert bool(word) == (items >= 160 / 72) or "word" not in hover
    assert any(
        items < 3 and "have the word" in hover for items, hover in zip(tree.values, tree.hovertext)
    )


def test_a_word_of_400_letters_stays_out_of_the_labels():
    items = WORLD.items.assign(title="a" * 400, text="a" * 400)
    explorer = SidExplorer(dataclasses.replace(WORLD, items=items, embeddings=WORLD.embeddings))
    tree = explorer.figure.data[3]
    assert max(map(len, tree.labels)) < 30 and max(map(len, tree.hovertext)) < 400
    assert max(len(hover) for hover in explorer.figure.data[1].hovertext) < 120


def test_each_width_is_fitted_once(monkeypatch):
    fits = []
    fit = ResidualKMeans.fit
    monkeypatch.setattr(
        ResidualKMeans, "fit", lambda self, x: fits.append(self.widths) or fit(self, x)
    )
    explorer = SidExplorer(WORLD)
    for width, levels, after in ((8, 2, 0), (4, 2, 1), (8, 4, 3), (4, 1, 1), (8, 3, 0)):
        explorer.set(width=width, levels=levels, after=after)
    assert fits == [(8,) * 4, (4,) * 4]


def test_a_move_sends_at_most_four_messages_and_200_kb(explorer):
    explorer = SidExplorer(WORLD)
    sent = connect(explorer)
    for name, value in (
        ("width", 32),
        ("levels", 4),
        ("after", 2),
        ("axes", AXES[0]),
        ("width", 12),
    ):
        sent.clear()
        explorer.controls[name].value = value
        assert 2 <= len(sent) <= 4 and sum(sent) < 200_000, (name, sent)


def test_exported_page_has_a_frame_per_value(explorer, tmp_path):
    explorer.set(levels=3, width=8)
    for explorer.exported, shown in (
        ("after", ["0", "1", "2", "3"]),
        ("width", ["2", "4", "6", "8", "12", "16", "24", "32"]),
    ):
        frames = frames_of(explorer.export(tmp_path / "x.html").read_text())
        assert [frame["value"] for frame in frames] == shown
    assert len({len(frame["state"]["figure"]["data"]) for frame in frames}) == 1


def test_large_catalogues_are_sampled_and_say_so():
    copies = 20
    items = WORLD.items.loc[np.repeat(np.arange(160), copies)].assign(
        item_id=np.arange(1, 160 * copies + 1)
    )
    noise = np.random.default_rng(0).normal(0, 0.02, (160 * copies, WORLD.embeddings.shape[1]))
    embeddings = (np.repeat(WORLD.embeddings, copies, axis=0) + noise).astype(np.float32)
    large = dataclasses.replace(WORLD, items=items, embeddings=embeddings, truth=None)
    explorer = SidExplorer(large, sample=50, levels=3, width=8)
    assert (
        "a random sample of 50 items" in explorer.text
        and "prefixes of fewer than 11 items" in explorer.text
    )
    assert len(explorer.figure.data[1].x) == 50 and not explorer.controls["width"].continuous_update
    tree = explorer.figure.data[3]
    assert tree.values[0] == 3200 and min(tree.values) >= 11 and len(tree.ids) <= 1 + 3 * 300
    assert "random sample" not in SidExplorer(WORLD).text


def test_titles_are_escaped_and_missing_ones_numbered():
    titles = ["<script>", None, *WORLD.items.title[2:]]
    text = ["<b>bold</b> & wild", None, *WORLD.items.text[2:]]
    explorer = SidExplorer(
        dataclasses.replace(
            WORLD, items=WORLD.items.assign(title=titles, text=text), embeddings=WORLD.embeddings
        )
    )
    assert (
        "<script>" not in explorer.text
        and "&lt;script&gt;" in explorer.text
        and "item 2" in explorer.text
    )
    assert all(
        "<script>" not in hover for trace in explorer.figure.data for hover in trace.hovertext or ()
    )


def test_errors_and_themes(dark):
    with pytest.raises(
        ValueError,
        match="width=64 is not offered for 160 items; use one of 2, 4, 6, 8, 12, 16, 24, 32",
    ):
        SidExplorer(WORLD, width=64)
    assert SidExplorer(WORLD).figure.layout.template.layout.paper_bgcolor == "#14171A"
    assert len(set(SYMBOLS)) == 32
