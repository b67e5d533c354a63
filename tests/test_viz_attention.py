"""The attention explorer: its numbers against loops and against the model itself, clicks, and what
a move sends.
"""

import json
import re

import numpy as np
import pytest
import torch
from conftest import frames_of

import sidlab
from sidlab.course import demo
from sidlab.course.probe import Probe
from sidlab.decoding import score_items
from sidlab.viz import AttentionExplorer
from sidlab.viz.attention import SHOWN
from sidlab.viz.attention_figure import FAINT, SHADES, factors, small_multiples

SMALL, LARGE, CENTRALITY, SALIENCY, IMPORTANCE, STARS, LINES, ENDS = range(8)


@pytest.fixture(scope="module")
def world():
    return demo.load()


@pytest.fixture()
def explorer(world):
    return AttentionExplorer(world.model, world.catalogue, token=5)


def plain(figure):
    """Traces and shapes of a figure as lists, without the ids that a widget adds."""
    content = json.loads(figure.to_json())
    return [{k: v for k, v in trace.items() if k != "uid"} for trace in content["data"]], content[
        "layout"
    ]["shapes"]


def click(explorer, trace, x, y):
    explorer.acted({"trace": trace, "x": x, "y": y})


def test_factors_are_column_sums_and_l1_norms(world):
    probe = Probe(world.model, world.catalogue.histories[0][:-1])
    for layer, head in ((1, 2), (3, 0)):
        scores = factors(probe, layer, head)
        attention = probe.attention[layer - 1].double()
        attention = sum(attention) / len(attention) if head == 0 else attention[head - 1]
        for i in range(len(probe.tokens)):
            received = sum(float(attention[query, i]) for query in range(len(probe.tokens)))
            norm = sum(abs(float(value)) for value in probe.hidden[layer][i])
            assert scores["centrality"][i] == pytest.approx(received, rel=1e-4)
            assert scores["saliency"][i] == pytest.approx(norm, rel=1e-4)
            assert scores["importance"][i] == pytest.approx(received * norm, rel=1e-4)
        np.testing.assert_allclose(scores["attention"].sum(1), 1, rtol=1e-5)
        assert not np.allclose(scores["attention"].sum(0), 1, atol=0.1), "columns are not rows"


def test_the_mean_of_heads_orders_tokens_as_the_pruner_does(world):
    probe = Probe(world.model, world.catalogue.histories[3][:-1])
    pruned = probe.prune(sidlab.PruningConfig(after_layer=2, keep=0.5))
    ours = world.model.config.num_heads * factors(probe, 2)["importance"]
    np.testing.assert_allclose(ours, pruned.importance, rtol=1e-4)


def test_small_multiples_are_tiles_of_layers_and_heads():
    attention = torch.rand(2, 3, 50, 50)
    tiles = small_multiples(attention)
    assert tiles.shape == (2 * 25, 3 * 25) and tiles.dtype == np.uint8, "50 tokens share 25 cells"
    attention[1, 2] /= 100  # a head that is faint has a scale of its own
    tiles = small_multiples(attention)
    for layer, head, row, column in ((0, 0, 0, 0), (1, 2, 24, 3), (1, 2, 5, 5), (0, 1, 7, 24)):
        top = float(np.quantile(attention[layer, head], 0.98))
        strongest = float(
            attention[layer, head, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].max()
        )
        assert (
            abs(tiles[25 * layer + row, 25 * head + column] - SHADES * min(strongest / top, 1)) <= 1
        )
    assert small_multiples(attention[:, :, :48, :48]).shape == (2 * 48, 3 * 48)


def test_the_figure_shows_the_chosen_layer_and_head(world, explorer):
    explorer.set(layer=3, head=2)
    probe = Probe(world.model, world.catalogue.histories[0][:-1], world.catalogue.truth)
    data = explorer.figure.data
    scores = factors(probe, 3, 2)
    np.testing.assert_allclose(data[LARGE].z, scores["attention"], atol=5.1e-5)
    for trace, name in (
        (CENTRALITY, "centrality"),
        (SALIENCY, "saliency"),
        (IMPORTANCE, "importance"),
    ):
        np.testing.assert_allclose(data[trace].y, scores[name], rtol=1e-6)
    np.testing.assert_allclose(
        data[CENTRALITY].y,
        np.sum(data[LARGE].z, axis=0),
        atol=0.01,
        err_msg="the margin is the sum of the columns",
    )
    wanted = world.catalogue.truth.informative([probe.history])[0]  # [M, 3], without separators
    assert data[STARS].x.tolist() == np.flatnonzero(np.pad(wanted, ((0, 0), (0, 1)))).tolist()


@pytest.mark.parametrize("remove", ["this token", "its whole item"])
def test_recommendations_without_a_token_are_the_models(world, explorer, remove):
    """Oracle: a scorer that ranks the removed tokens last, in the model's own pruned forward, and
    exact scoring of every item.
    """
    history = world.catalogue.histories[0]
    explorer.set(token=41, remove=remove)
    gone = [41] if remove == "this token" else [40, 41, 42, 43]
    n = 4 * (len(history) - 1)
    assert explorer.removed() == tuple(gone)

    def last(signals):
        return -torch.isin(signals.positions, torch.tensor(gone)).float()

    before = score_items(world.model, [history[:-1]])[0]
    world.model.set_pruning(
        sidlab.PruningConfig(after_layer=2, keep=1 - len(gone) / n, scorer=last)
    )
    try:
        after = score_items(world.model, [history[:-1]])[0]
    finally:
        world.model.set_pruning(None)
    target = int(history[-1])
    change = float(after[target - 1] - before[target - 1])
    assert abs(change) > 0.01, "a token that moves nothing would show nothing"
    places = [1 + int((scores > scores[target - 1]).sum()) for scores in (before, after)]
    assert f"<b>{change:+.3f}</b>), place {places[0]} → {places[1]}" in explorer.text
    cells = re.findall(r"<td>(.*?)</td>", explorer.text)
    ranked = torch.argsort(-after, stable=True)[:SHOWN].tolist()
    was = torch.argsort(-before, stable=True).tolist()
    for place, item in enumerate(ranked, start=1):
        shown = cells[5 * (place - 1) : 5 * place]
        up = was.index(item) + 1 - place
        assert shown[1].removeprefix("★ ") == world.catalogue.items.title[item]
        assert shown[2:4] == [f"{float(after[item].exp()):.1%}", f"{float(before[item].exp()):.1%}"]
        assert shown[4] == ("=" if up == 0 else f"▲ {up}" if up > 0 else f"▼ {-up}")


def test_nothing_removed_moves_nothing(explorer):
    explorer.set(remove="nothing")
    assert (
        "(<b>+0.000</b>)" in explorer.text and "▲" not in explorer.text and "▼" not in explorer.text
    )
    assert not explorer.figure.layout.shapes[-1].visible


def test_following_equals_a_fresh_one(world, explorer):
    longest = 1 + int(np.argmax([len(h) for h in world.catalogue.histories[:50]]))
    for moves in (
        {"layer": 4},
        {"head": 3, "user": longest},
        {"token": 60},
        {"user": 2},
        {"remove": "its whole item"},
        {"head": 0},
    ):
        for name, value in moves.items():
            explorer.controls[name].value = value
    assert explorer.value("token") == 4 * (len(world.catalogue.histories[1]) - 1) - 1, (
        "the last token of a shorter history"
    )
    fresh = AttentionExplorer(
        world.model,
        world.catalogue,
        layer=4,
        user=2,
        token=explorer.value("token"),
        remove="its whole item",
    )
    assert plain(explorer.figure) == plain(fresh.figure)
    assert explorer.text == fresh.text
    explorer.set(user=longest, token=60)
    assert explorer.value("token") == 60, "a token that only the new user has"


def test_tokens_are_named_by_item_and_level(world, explorer):
    title = world.catalogue.items.title[world.catalogue.histories[0][1] - 1]
    labels = [label for label, _ in explorer.controls["token"].options]
    assert labels[5] == f"item 2, level 2: {title}" and labels[7] == f"item 2, separator: {title}"
    assert explorer.text.startswith(f"<p><b>{labels[5]}: ")


def test_clicks_choose(explorer):
    click(explorer, LARGE, 9, 30)
    assert explorer.value("token") == 9
    click(explorer, SALIENCY, 12, 0)
    assert explorer.value("token") == 12 and explorer.figure.layout.shapes[-1].x0 == 11.5
    click(explorer, ENDS, 3, 0)
    assert explorer.value("token") == 3
    click(explorer, SALIENCY, 12, 0)
    side = explorer.content["figure"]["layout"]["xaxis"]["range"][1] / 4 + 0.125
    assert side == len(explorer._probe(1).tokens)
    click(explorer, SMALL, 3 * side, 2 * side - 1)
    assert (explorer.value("layer"), explorer.value("head")) == (2, 4)
    assert explorer.value("token") == 12, "as it was"


def test_it_opens_where_the_removal_moves_the_list(explorer, world):
    opening = AttentionExplorer(world.model, world.catalogue)
    moved = re.findall(r"<td>(=|new|[▲▼] \d+)</td>", opening.text)
    assert len(moved) == SHOWN and sum(cell != "=" for cell in moved) > SHOWN // 2


@pytest.mark.parametrize("user", [1, 2, 12])
def test_hover_labels_name_tokens_and_no_tick_stands_on_one(world, user):
    """The label of place i is the alias of "+i" (`hoverformat`), but where a tick stands plotly
    shows the tick's own text.
    """
    explorer = AttentionExplorer(world.model, world.catalogue, user=user)
    layout = explorer.figure.layout
    history = world.catalogue.histories[user - 1][:-1]
    n = 4 * len(history)
    names = [
        f"{level} of item {m} ({world.catalogue.items.title[item - 1]})"
        for m, item in enumerate(history, start=1)
        for level in ("level 1", "level 2", "level 3", "separator")
    ]
    for axis in (layout.xaxis2, layout.yaxis2):
        assert axis.hoverformat == "+d" and axis.labelalias == {
            f"+{i}": name for i, name in enumerate(names)
        }
    step = -(-n // 48)
    side = -(-n // step)
    assert len(explorer.figure.data[SMALL].z) == 4 * side and (side < n) == (user == 12), (
        "user 12: two tokens share a cell"
    )
    for place in (0, 1, side + 2, 4 * side - 1):
        tile, cell = divmod(place, side)
        assert layout.xaxis.labelalias[f"+{place}"].startswith(names[cell * step])
        assert layout.xaxis.labelalias[f"+{place}"].endswith(f" in head {tile + 1}")
        assert layout.yaxis.labelalias[f"+{place}"].startswith(
            f"layer {tile + 1}: {names[cell * step]}"
        )
    for axis in (layout.xaxis, layout.yaxis, layout.xaxis2, layout.yaxis2):
        assert all(
            abs(tick - round(tick)) > (axis.range[1] - axis.range[0]) / 10_000
            for tick in axis.tickvals
        )
    for trace in explorer.figure.data[:2]:
        assert trace.hovertemplate.startswith("%{y} looks at %{x}: ")


def test_lines_lead_from_the_token_to_what_it_looks_at_and_are_as_thick_as_the_weights(explorer):
    explorer.set(layer=2, head=4, token=21)
    weights = np.array(explorer.figure.data[LARGE].z)[21]
    lines = explorer.figure.data[LINES]
    ends = explorer.figure.data[ENDS]
    assert list(ends.x) == np.flatnonzero(weights >= FAINT).tolist() and list(
        ends.customdata
    ) == pytest.approx(weights[ends.x])
    # Top left, bottom left, bottom right, top right, a gap
    corners = np.array(lines.x, float).reshape(-1, 5)
    for corner, end in zip(corners, ends.x, strict=True):
        assert [corner[0] + corner[3], corner[1] + corner[2]] == pytest.approx(
            [2 * 21, 2 * end], abs=0.01
        )
        assert corner[2] - corner[1] == pytest.approx(weights[end] / weights.max(), abs=0.01)
    most = int(weights.argmax())
    assert (
        f"It looks most at {explorer._names(explorer._probe(1))[most]}: {weights[most]:.3f}"
        in explorer.text
    )


def test_titles_of_axes_lie_on_no_other_panel(explorer):
    layout = explorer.figure.layout
    axes = [layout[f"yaxis{number}"] for number in ("", 2, 3, 4, 5)]
    assert not any(axis.title.text for axis in axes), (
        "beside the large heatmap there is another one"
    )
    assert {note.text for note in layout.annotations} == {
        "what the chosen token looks at",
        "centrality",
        "saliency",
        "importance",
    }


def test_a_word_of_400_letters_stays_out_of_the_labels(world):
    items = world.catalogue.items.assign(title="a" * 400)
    long = sidlab.Catalogue(
        "own",
        items,
        world.catalogue.histories[:2],
        ["a", "b"],
        embeddings=world.catalogue.embeddings,
    )
    explorer = AttentionExplorer(world.model, long)
    labels = [label for label, _ in explorer.controls["token"].options] + list(
        explorer.figure.layout.xaxis2.labelalias.values()
    )
    assert max(map(len, labels)) < 80


def test_messages_and_bytes_of_a_move(world, explorer):
    longest = 1 + int(np.argmax([len(h) for h in world.catalogue.histories[:50]]))
    explorer.set(user=longest)
    sent = []

    class Comm:
        comm_id = "x"

        def send(self, data=None, metadata=None, buffers=None):
            sent.append((len(str(data)) + sum(memoryview(b).nbytes for b in buffers or ()), data))

        def close(self, *args, **kwargs):
            pass

        on_msg = on_close = close

    for widget in (explorer.view.state, *explorer.controls.values()):
        widget.comm = Comm()
    for name, value in (
        ("token", 30),
        ("token", 31),
        ("layer", 4),
        ("head", 1),
        ("remove", "nothing"),
    ):
        sent.clear()
        explorer.controls[name].value = value
        assert 0 < len(sent) <= 4 and sum(size for size, _ in sent) < 200_000
        paths = [
            path for _, data in sent for path in data["state"] if path.startswith("/figure/data/")
        ]
        traces = {int(path.split("#")[1].split("/")[0]) for path in paths}
        wanted = {
            "layer": {LARGE, CENTRALITY, SALIENCY, IMPORTANCE, STARS},
            "head": {LARGE, CENTRALITY, IMPORTANCE, STARS},
        }
        assert traces - {LINES, ENDS} == wanted.get(name, set()), (
            "the small maps stay on the page, and all maps if only the token moves"
        )
    sent.clear()
    explorer.controls["user"].value = 1
    assert sum(size for size, _ in sent) < 200_000


def test_exported_page_has_a_frame_per_token(explorer, tmp_path):
    page = explorer.export(tmp_path / "x.html").read_text()
    frames = frames_of(page)
    assert [frame["value"] for frame in frames] == [
        label for label, _ in explorer.controls["token"].options
    ]
    assert [frame["state"]["figure"]["layout"]["shapes"][-1]["x0"] for frame in frames] == [
        i - 0.5 for i in range(len(frames))
    ]


def test_without_a_truth_and_with_wrong_arguments(world, dark):
    bare = sidlab.Catalogue(
        "own",
        world.catalogue.items,
        world.catalogue.histories[:2],
        ["a", "b"],
        embeddings=world.catalogue.embeddings,
    )
    explorer = AttentionExplorer(world.model, bare)
    assert len(explorer.figure.data[STARS].x) == 0 and "nats" not in explorer.text
    assert explorer.figure.layout.template.layout.paper_bgcolor == "#14171A"
    with pytest.raises(ValueError, match="model and catalogue"):
        AttentionExplorer(world.model)
    for name, value, of in (
        ("layer", 5, "layer must lie in 1..4"),
        ("head", 9, "head must lie in 0..4"),
        ("token", 999, "token must lie in 0"),
        ("remove", "all", "remove='all' is unknown; use one of 'nothing'"),
    ):
        with pytest.raises(ValueError, match=of):
            AttentionExplorer(world.model, bare, **{name: value})
