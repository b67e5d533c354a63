"""The frontier shows exactly the recorded runs, the slider knows no others, and its words follow
from the numbers.
"""

import dataclasses
import re

import numpy as np
import pytest
from conftest import connect, frames_of
from traitlets import TraitError

from sidlab import viz
from sidlab.data.planted import planted_catalogue
from sidlab.figures import theme
from sidlab.research.compare import method_config
from sidlab.research.cost import cost
from sidlab.viz.frontier import FrontierExplorer, frontier_figure
from sidlab.windows import leave_one_out

KEEPS = (0.1, 0.2, 0.3333333333, 0.5, 0.7)  # as pandas writes a third
SCORERS = ("rastp", "recent", "random", "oracle")
COST = "seconds_per_1k_windows"


def run(scorer, keep, recall, seconds):
    return {
        "dropout": None if scorer else 0.0,
        "pruning.scorer": scorer,
        "pruning.keep": keep,
        "pruning.reduce": scorer and "select",
        "busy": False,
        "recall@10": recall,
        "recall@10_interval": [recall - 0.02, recall + 0.02],
        COST: seconds,
        "peak_memory_mb": 100 * seconds,
        "kept_token_fraction": keep,
        "mflops": 10 * (1 + (keep or 1)),
    }


def compared(rows, half=0.015):
    """As a study compares them with its first setting, each interval `half` to either side."""
    for row in rows:
        gain = row["recall@10"] - rows[0]["recall@10"]
        row["difference"] = None if row is rows[0] else gain
        row["difference_interval"] = None if row is rows[0] else [gain - half, gain + half]
    return rows


@pytest.fixture
def data():
    """Random scoring loses much more than the intervals' width, RASTP a hair; all recalls and costs
    differ.
    """
    rng = np.random.default_rng(0)
    lost = {"rastp": 0.01, "recent": 0.1, "random": 0.2, "oracle": -0.001}
    rows = [
        run(
            scorer, keep, 0.5 - lost[scorer] - rng.uniform(0, 0.005), 1 + keep + rng.uniform(0, 0.1)
        )
        for scorer in SCORERS
        for keep in KEEPS
    ]
    return {
        "hardware": {"processor": "an abacus", "gpu": None},
        "preset": "quick",
        "study": "strategies",
        "command": "make study STUDY=strategies",
        "seeds": 3,
        "rows": compared([run(None, None, 0.5, 2.0), *rows]),
    }


def recorded(data, scorer, keep):
    return next(
        row
        for row in data["rows"]
        if row["pruning.scorer"] == scorer and row["pruning.keep"] == keep
    )


def traces(figure, scorer):
    return [trace for trace in figure.data if trace.name == scorer]


def test_every_point_is_a_recorded_run(data):
    explorer = FrontierExplorer(data, keep=0.3)
    assert explorer.value("keep") == KEEPS[2]  # the nearest
    for keep in KEEPS:
        explorer.set(keep=keep)
        for scorer in SCORERS:
            line, chosen = traces(explorer.figure, scorer)
            rows = [recorded(data, scorer, k) for k in KEEPS]
            assert list(zip(line.x, line.y)) == [
                (row[COST], row["recall@10"] - 0.5) for row in rows
            ]
            row = recorded(data, scorer, keep)
            assert (list(chosen.x), list(chosen.y)) == ([row[COST]], [row["recall@10"] - 0.5])
            np.testing.assert_allclose(
                [chosen.error_y.array[0], chosen.error_y.arrayminus[0]], 0.015
            )
        (unpruned,) = traces(explorer.figure, "unpruned")
        assert (unpruned.x[0], unpruned.y[0]) == (2.0, 0)


def test_the_slider_holds_recorded_shares_only(data):
    slider = FrontierExplorer(data).controls["keep"]
    assert [value for _, value in slider._options_full] == list(KEEPS) and slider.label == "33%"
    with pytest.raises(TraitError, match="value not found"):
        slider.value = 0.4


def test_words_follow_from_the_numbers(data):
    explorer = FrontierExplorer(data, keep=0.5)
    said = dict(re.findall("<li><b>(.*?)</b>: (.*?)</li>", explorer.text))
    assert list(said) == list(SCORERS)
    for scorer in SCORERS:
        row = recorded(data, scorer, 0.5)
        lost = row["recall@10"] - 0.5
        assert (
            f"{lost:+.3f} [{lost - 0.015:+.3f}, {lost + 0.015:+.3f}] in recall@10" in said[scorer]
        )
        assert ("undecided" in said[scorer]) == (scorer in ("rastp", "oracle"))
        assert ("clearly worse" in said[scorer]) == (scorer in ("recent", "random"))
        assert f"Cost {1 - row[COST] / 2:.0%} lower" in said[scorer]
        assert (
            f"{row['recall@10']:.3f}" in explorer.text
            and f"{row[COST]:.3g} (× {row[COST] / 2:.2f})" in explorer.text
        )
    recorded(data, "rastp", 0.5).update(run("rastp", 0.5, 0.56, 2.5))
    compared(data["rows"])
    better = FrontierExplorer(data, keep=0.5).text
    assert "+0.060 [+0.045, +0.075] in recall@10, clearly better. Cost 25% higher" in better


def test_text_holds_all_runs(data):
    text = FrontierExplorer(data).text
    folded = text[text.index("<details>") :]
    for row in data["rows"]:
        assert f"<td>{row['recall@10']:.3f}</td>" in folded and f"<td>{row[COST]:.3g} (×" in folded
    assert (
        "an abacus" in text
        and data["command"] in text
        and "3 seeds. The intervals are over test users and seeds.</p>" in text
    )
    data["rows"][3]["busy"] = True
    rough = FrontierExplorer(data | {"seeds": 1}).text
    assert (
        "1 seed. The intervals are over test users: another seed" in rough
        and "the seconds are rough" in rough
    )


def test_older_models_are_called_older(data):
    assert "lder models" not in FrontierExplorer(data).text
    text = FrontierExplorer(data | {"older_models": True}).text
    assert (
        "<b>Older models</b>" in text and f"<code>{data['command']}</code> trains them anew" in text
    )


@pytest.mark.parametrize("cost_name", FrontierExplorer.COSTS)
def test_following_equals_a_fresh_explorer(data, cost_name):
    explorer = FrontierExplorer(data)
    fresh = FrontierExplorer(data, keep=0.7, cost=cost_name)
    explorer.controls["keep"].value = 0.7
    explorer.controls["cost"].value = cost_name
    assert explorer.text == fresh.text
    for moved, new in zip(explorer.figure.data, fresh.figure.data, strict=True):
        assert (moved.name, moved.x, moved.y, moved.error_y, moved.marker) == (
            new.name,
            new.x,
            new.y,
            new.error_y,
            new.marker,
        )
    assert (
        explorer.figure.layout.xaxis == fresh.figure.layout.xaxis
        and explorer.figure.layout.shapes == fresh.figure.layout.shapes
    )


def test_nothing_rests_on_colour(data):
    figure = frontier_figure(data["rows"][1:], data["rows"][0], 0.5, COST, "seconds")
    looks = {
        trace.name: (trace.marker.symbol, trace.line.dash)
        for trace in figure.data
        if trace.mode == "lines+markers"
    }
    assert looks == {scorer: theme.mark(scorer)[1:] for scorer in SCORERS}
    for line, chosen in (traces(figure, scorer) for scorer in SCORERS):
        assert (
            chosen.marker.size > 2 * line.marker.size
            and chosen.error_y.array
            and not line.error_y.array
        )


def test_export_has_a_frame_for_each_share_and_opens_at_the_chosen_one(data, tmp_path, dark):
    page = FrontierExplorer(data, keep=0.5).export(tmp_path / "frontier.html").read_text()
    frames = frames_of(page)
    assert [frame["value"] for frame in frames] == [
        "10%",
        "20%",
        "33%",
        "50%",
        "70%",
    ] and 'step="1" value="3"' in page
    for frame, keep in zip(frames, KEEPS):
        chosen = next(
            t
            for t in frame["state"]["figure"]["data"]
            if t["name"] == "rastp" and t["mode"] == "markers"
        )
        assert chosen["y"] == [recorded(data, "rastp", keep)["recall@10"] - 0.5]
        assert f"<b>{keep:.0%} of the tokens kept</b>" in frame["state"]["text"]


def test_a_move_sends_little(data):
    explorer = viz.FrontierExplorer(data)
    sent = connect(explorer)
    explorer.controls["keep"].value = 0.1
    assert 2 <= len(sent) <= 4 and sum(sent) < 200_000


def test_only_scorers_with_several_shares_are_shown(data):
    """The study has more ways to keep a third."""
    more = run("norm", KEEPS[2], 0.3, 2.5)
    pooled = run("rastp", KEEPS[2], 0.4, 1.1) | {"pruning.reduce": "pool"}
    explorer = FrontierExplorer(data | {"rows": compared([*data["rows"], more, pooled])})
    assert explorer.runs == data["rows"][1:]


def test_refuses_another_study(data):
    for other in (data | {"study": "map"}, data | {"rows": data["rows"][:1]}):
        with pytest.raises(ValueError, match="a summary of the study 'strategies', as `make study"):
            FrontierExplorer(other)


def test_bundled_recording():
    explorer = FrontierExplorer()
    data = explorer.data
    assert explorer.base["pruning.keep"] is None
    # Of windows
    lengths = np.concatenate(
        [
            np.arange(1, len(history))
            for history in leave_one_out(planted_catalogue().histories).train
        ]
    )
    for scorer, keep, method in (
        (None, None, "unpadded"),
        ("rastp", KEEPS[3], "rastp@1/2"),
        ("recent", KEEPS[2], "recent@1/3"),
    ):
        row = next(
            row
            for row in data["rows"]
            if (row["pruning.scorer"], row["pruning.keep"]) == (scorer, pytest.approx(keep))
        )
        # It was recorded with hardly any padding
        config = dataclasses.replace(method_config(method, "quick", 0), accumulation=64)
        assert row["mflops"] == pytest.approx(
            cost(config, (8, 8, 4), lengths).training / 1e6, rel=0.005
        )
    assert {row["pruning.scorer"] for row in explorer.runs} >= {
        "rastp",
        "random",
        "recent",
    } and len(explorer.frames()) >= 5
