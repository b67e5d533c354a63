"""The pruning explorer: its strip, heatmap and list are what `recommend` says for the same pruning; it follows; it sends little."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import connect, frames_of
from hypothesis import given, settings
from hypothesis import strategies as st

import sidlab
from sidlab.decoding import encode_histories
from sidlab.probe import Probe
from sidlab.pruning import PruningConfig
from sidlab.training import build_model
from sidlab.viz import PruningExplorer
from sidlab.viz.pruning import pruning_figure

LEVELS = 4  # three codes and a separator


@pytest.fixture(scope="module")
def world():
    catalogue = sidlab.load_catalogue("planted", n_users=30)
    encoder = sidlab.ResidualKMeans(3, (8, 8, 4), seed=0).fit(catalogue.embeddings)
    table = sidlab.SidTable(encoder.encode(catalogue.embeddings), (8, 8, 4))
    return build_model(sidlab.TrainConfig.preset("quick"), table).eval(), catalogue


def shown(explorer):
    """(kept tokens as (item, level), cells of the right heatmap that are drawn, recommended titles) as the reader sees them."""
    kept, _, pruned, texts, _, before, after = explorer.figure.data
    strip = {(int(x), int(base)) for x, base in zip(kept.x, kept.base)}
    assert len(strip) + len(pruned.x) == len(before.z) and len(texts.x) == len(pruned.x)
    rows = re.findall(r"<tr><td>(\d+)</td><td>(?:★ )?([^<]*)</td><td>", explorer.text)
    return strip, np.array([[cell is not None for cell in row] for row in np.array(after.z)]), [title for _, title in rows]


@settings(max_examples=10)
@given(st.integers(1, 9), st.integers(1, 16), st.booleans())
def test_every_token_is_marked_without_colour(world, items, sixteenths, known):
    model, catalogue = world
    probe = Probe(model, catalogue.histories[0][:items], catalogue.truth if known else None)
    pruned = probe.prune(PruningConfig(keep=sixteenths / 16, scorer="random"))
    titles = [f"item <{i}>" for i in range(len(probe.history))]
    figure, seen = pruning_figure(probe, pruned, titles, 2), {}
    kept_bars, kept_codes, pruned_bars, pruned_codes, stars, *_ = figure.data
    for bars, codes in ((kept_bars, kept_codes), (pruned_bars, pruned_codes)):
        for x, base, code, hover in zip(bars.x, bars.base, codes.text, bars.hovertext):
            token = LEVELS * int(x) + int(base)
            seen[token] = bars.name == "kept"
            assert f"item &lt;{int(x)}&gt;" in hover and f"importance {pruned.importance[token]:.4g}" in hover and f": {code}<" in hover
            assert (("truly informative" in hover), ("holds nothing" in hover)) == (
                (probe.truth[token] > 0, probe.truth[token] == 0) if known else (False, False))
    assert [seen[token] for token in range(len(probe.tokens))] == pruned.kept.tolist()
    assert not kept_bars.marker.pattern.shape and pruned_bars.marker.pattern.shape and stars.marker.symbol == "star"
    informative = set(np.flatnonzero(probe.truth > 0).tolist()) if known else set()
    assert {LEVELS * int(x) + int(y) for x, y in zip(stars.x, stars.y)} == informative and stars.showlegend == known


@pytest.mark.parametrize("values", [
    {"keep": 1 / 3}, {"keep": 0.1, "scorer": "recent", "layer": 1, "positions": "compact", "protect": True},
    {"keep": 0.5, "scorer": "oracle", "layer": 3, "unit": "item", "positions": "none"}, {"keep": 0.7, "scorer": "random", "layer": 4},
    {"keep": 1.0, "scorer": "norm"}])
def test_strip_heatmap_and_list_are_what_recommend_gives(world, values):
    model, catalogue = world
    explorer = PruningExplorer(model, catalogue, user=4)
    explorer.set(**values)
    history, layer = catalogue.histories[3][:-1], values.get("layer", 2)
    names = {"layer": "after_layer", "protect": "protect_separators"}
    model.set_pruning(PruningConfig(**{names.get(name, name): value for name, value in values.items()}))
    try:
        with torch.no_grad():
            encoded = encode_histories(model, [history], catalogue.truth)
        items, _ = sidlab.recommend(model, [history], k=10, truth=catalogue.truth)
    finally:
        model.set_pruning(None)
    stay = encoded.positions[0][encoded.attention_mask[0].bool()].tolist()
    strip, cells, titles = shown(explorer)
    assert strip == {(p // LEVELS, p % LEVELS) for p in stay}
    wanted = np.zeros((len(history) * LEVELS,) * 2, bool)
    if layer < 4:
        wanted[np.ix_(stay, stay)] = True
    assert (cells == wanted).all()
    assert titles == catalogue.items.title[items[0].numpy() - 1].tolist()
    assert f"<b>{len(stay)} of {len(history) * LEVELS} tokens kept.</b>" in explorer.text
    place, target = explorer.pruned.items.tolist(), int(explorer.histories[explorer.value("user") - 1][-1])
    found = f"place {place.index(target) + 1}" if target in place else "not in the list"
    assert explorer.figure.layout.title.text.startswith(f"{len(stay)} of {len(history) * LEVELS} tokens kept; next item: {found} (")


def test_heatmaps_are_the_mean_over_heads(world):
    model, catalogue = world
    explorer = PruningExplorer(model, catalogue, user=2, keep=0.5, layer=1)
    probe = Probe(model, catalogue.histories[1][:-1])
    pruned = probe.prune(PruningConfig(after_layer=1, keep=0.5))
    before, after = explorer.figure.data[-2:]
    assert np.abs(np.array(before.z, float) - probe.attention[0].mean(0).numpy()).max() <= 0.5e-4 + 1e-6
    rows = np.flatnonzero(pruned.kept)
    assert np.abs(np.array(after.z)[np.ix_(rows, rows)].astype(float) - pruned.attention[0].mean(0).numpy()).max() <= 0.5e-4 + 1e-6


def plain(figure):
    return [{key: value for key, value in trace.items() if key != "uid"} for trace in json.loads(figure.to_json())["data"]], \
        [axis.to_plotly_json() for axis in (figure.layout.xaxis, figure.layout.xaxis2, figure.layout.yaxis3)], \
        [note.text for note in figure.layout.annotations]


def without_time(text):
    return re.sub(r"<td>ms from.*?</tr>", "", text)


def test_following_equals_fresh(world):
    model, catalogue = world
    follower = PruningExplorer(model, catalogue)
    for values in ({"keep": 0.6}, {"user": 7, "scorer": "recent"}, {"layer": 4}, {"user": 2, "unit": "item", "keep": 0.2, "layer": 1}):
        for name, value in values.items():
            follower.controls[name].value = value
        fresh = PruningExplorer(model, catalogue, **{name: control.value for name, control in follower.controls.items()})
        assert plain(follower.figure) == plain(fresh.figure)
        assert without_time(follower.text) == without_time(fresh.text)


def test_a_move_sends_at_most_4_messages_and_200_kb(world):
    model, catalogue = world
    longest = [np.resize(catalogue.histories[0], 31)]  # 30 items and the target: as long as the model reads
    explorer = PruningExplorer(model, catalogue, histories=longest)
    sent = connect(explorer)
    for name, value in (("keep", 0.9), ("keep", 0.31), ("keep", 1.0), ("keep", 0.05), ("scorer", "recent"), ("unit", "item"),
                        ("positions", "none")):
        sent.clear()
        explorer.controls[name].value = value
        assert 2 <= len(sent) <= 4, "one for the control, two for the figure, one for the text"
        assert sum(sent) <= 200 * 1024


def test_own_scorers_join_the_menu_and_their_errors_are_shown_and_raised(world):
    model, catalogue = world

    def oldest(signals):
        return -signals.positions.float()

    def broken(signals):
        raise RuntimeError("no <idea>")

    explorer = PruningExplorer(model, catalogue, scorers={"mine": oldest, "broken": broken}, scorer="mine", keep=0.25)
    n = len(catalogue.histories[0]) - 1
    assert shown(explorer)[0] == {(p // LEVELS, p % LEVELS) for p in range(n)}
    with pytest.raises(RuntimeError, match="no <idea>"):
        explorer.controls["scorer"].value = "broken"
    assert 'role="alert"' in explorer.alert and "no &lt;idea&gt;" in explorer.alert
    explorer.controls["scorer"].value = "recent"
    assert explorer.alert == ""


@pytest.mark.parametrize("arguments, message", [
    ({"scorer": "rasp"}, "scorer='rasp' is unknown; use one of 'rastp'"), ({"unit": "items"}, "unit='items' is unknown"),
    ({"user": 60}, r"user must lie in 1..30, got 60"), ({"keep": 33}, "keep must lie in 0.05..1, got 33"),
    ({"layer": 9}, "layer must lie in 1..4"), ({"histories": [[1, 2], [3, 999]]}, r"item ids in 1..\d+, got \[3, 999\]"),
])
def test_what_the_controls_do_not_have_is_refused(world, arguments, message):
    with pytest.raises(ValueError, match=message):
        PruningExplorer(*world, **arguments)


def test_models_and_histories_that_do_not_fit_are_refused_or_left_out(world):
    model, catalogue = world
    with pytest.raises(ValueError, match="with a table of the catalogue's"):
        PruningExplorer(model, sidlab.load_catalogue("planted", kinds=24, n_users=5))
    qwen = build_model(sidlab.TrainConfig.preset("smoke", arch="qwen"), model.table)
    with pytest.raises(ValueError, match="got a SidQwen with"):
        PruningExplorer(qwen, catalogue)
    explorer = PruningExplorer(model, catalogue, histories=[[3], catalogue.histories[0], [5]])
    assert len(explorer.histories) == 1 and explorer.controls["user"].max == 1


def test_real_data_has_no_stars_and_no_oracle(world):
    model, catalogue = world
    real = sidlab.Catalogue("real", catalogue.items, catalogue.histories, catalogue.user_ids, embeddings=catalogue.embeddings)
    explorer = PruningExplorer(model, real)
    assert "oracle" not in explorer.controls["scorer"].options and len(explorer.figure.data[4].x) == 0
    assert "informative" not in explorer.text
    assert len(PruningExplorer(model, catalogue).figure.data[4].x) > 0
    with pytest.raises(ValueError, match="model and catalogue, or neither"):
        PruningExplorer(model)


def test_export_has_a_frame_for_each_value_and_opens_at_the_present_one(world, tmp_path):
    model, catalogue = world
    explorer = PruningExplorer(model, catalogue, keep=1 / 3)
    page = explorer.export(tmp_path / "x.html").read_text()
    frames = frames_of(page)
    values = [frame["value"] for frame in frames]
    assert values[0] == "5%" and values[-1] == "100%" and "33%" in values and len(values) == 22
    assert f'value="{values.index("33%")}"' in page
    kept = [len(frame["state"]["figure"]["data"][1]["text"]) for frame in frames]
    assert kept == sorted(kept) and kept[-1] == 4 * (len(catalogue.histories[0]) - 1)
