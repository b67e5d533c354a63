"""The explorers of recorded sweeps show exactly the recorded numbers, and only recorded runs can be
chosen.
"""

import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest
from conftest import connect, frames_of
from test_viz_recorded import compared

from sidlab.viz import DilutionExplorer, MapExplorer
from sidlab.viz.recorded import dilution_figure, map_figure

LEVELS = (1, 2, 3, 4)
WIDTHS = (4, 8, 16, 32)
ITEM_RUNS = [("item", steps, weight) for steps in (1, 2, 4) for weight in (0.1, 0.3, 1.0)]
TOKEN_RUNS = [("token", steps, weight) for steps in (1, 2) for weight in (0.1, 0.3, 1.0)]


def fake_row(number):
    """A row of a study's summary; each has numbers of its own."""
    rng = np.random.default_rng(number)
    row = {
        "busy": False,
        "updates": 190 + number,
        "mflops": 20.0 + number,
        "seconds_per_1k_windows": float(rng.uniform(0.5, 1.5)),
    }
    for metric in ("recall@5", "recall@10", "ndcg@5", "ndcg@10"):
        row[metric] = float(rng.uniform(0.3, 0.6))
        row[f"{metric}_interval"] = [row[metric] - 0.021, row[metric] + 0.022]
    row["curve"] = {
        "loss_updates": [20, 40, 60],
        "loss": rng.uniform(1, 2, 3).tolist(),
        "updates": [30, 60],
        "mean": rng.uniform(0.2, 0.5, 2).tolist(),
    }
    return row


def fake_data(study, rows, half=0.015):
    """Every row that is nowhere smaller is compared with it, as the study of SIDs does."""
    versus = []
    for row in rows if study == "granularity" else ():
        for other in rows:
            pair = [(one["sids.levels"], one["sids.width"]) for one in (other, row)]
            if row is not other and all(a <= b for a, b in zip(*pair)):
                gain = row["recall@10"] - other["recall@10"]
                versus.append(
                    {
                        "label": row["label"],
                        "against": other["label"],
                        "difference_interval": [gain - half, gain + half],
                    }
                )
    return {
        "study": study,
        "hardware": {"processor": "an abacus", "gpu": None},
        "preset": "quick",
        "command": "make study",
        "seeds": 3,
        "rows": compared(rows, half),
        "versus": versus,
    }


def granularity():
    rows = []
    for number, (levels, width) in enumerate(
        (level, width) for level in LEVELS for width in WIDTHS
    ):
        added = levels == 1
        report = {
            "widths": [width] * (levels + added),
            "collision_rate": 1.0 * added,
            "perplexity": [width - 0.5 + level for level in range(levels + added)],
        }
        rows.append(
            fake_row(number)
            | {
                "label": f"{levels} × {width}",
                "sids.levels": levels,
                "sids.width": width,
                "sids.collisions": "extend",
                "sids": report,
            }
        )
    return fake_data("granularity", rows)


def map_runs():
    rows = [
        fake_row(99) | {"label": "no MAP", "map.unit": None, "map.steps": None, "map.weight": None}
    ]
    # Pandas makes the steps floats, for one row has none
    for number, (unit, steps, weight) in enumerate(ITEM_RUNS + TOKEN_RUNS):
        rows.append(
            fake_row(number)
            | {
                "label": f"{steps} {unit}, weight {weight}",
                "map.unit": unit,
                "map.steps": float(steps),
                "map.weight": weight,
            }
        )
    return fake_data("map", rows)


MADE = {
    "granularity": (DilutionExplorer, granularity, {"levels": 2, "width": 16}),
    "map": (MapExplorer, map_runs, {"steps": 4, "weight": 1.0}),
}


@pytest.fixture(params=MADE)
def made(request):
    """(class, data, values of controls other than at the start)."""
    make, data, values = MADE[request.param]
    return make, data(), values


def test_panels_show_every_recorded_run_and_the_cursor_stands_on_the_chosen_one():
    data = granularity()
    explorer = DilutionExplorer(data, levels=2, width=16, cost="seconds_per_1k_windows")
    by_setting = {(row["sids.levels"], row["sids.width"]): row for row in data["rows"]}
    figure = explorer.figure
    for i, levels in enumerate(LEVELS):
        of_level = [by_setting[levels, width] for width in WIDTHS]
        recalls, costs, ring = figure.data[3 * i : 3 * i + 3]
        assert list(recalls.y) == [row["recall@10"] for row in of_level]
        assert list(costs.y) == [row["seconds_per_1k_windows"] for row in of_level]
        assert list(recalls.x) == list(costs.x) == list(range(len(WIDTHS)))
        bars = recalls.error_y
        y = np.array(recalls.y)
        np.testing.assert_allclose(
            [y - bars.arrayminus, y + bars.array],
            np.transpose([row["recall@10_interval"] for row in of_level]),
        )
        # Told apart without colour: a ring and a pattern.
        chosen = [levels == 2 and width == 16 for width in WIDTHS]
        assert (
            list(ring.x) == [WIDTHS.index(16)] * (levels == 2)
            and [shape == "/" for shape in costs.marker.pattern.shape] == chosen
        )
        for trace in (recalls, costs):  # no mark at an edge, where it would be cut
            low, high = figure.layout["xaxis" + trace.xaxis[1:]].range
            assert low < min(trace.x) - 0.5 and max(trace.x) + 0.5 < high
    assert list(figure.data[3 + 2].y) == [by_setting[2, 16]["recall@10"]]
    assert [note.text for note in figure.layout.annotations[:4]] == [
        "1 level",
        "2 levels",
        "3 levels",
        "4 levels",
    ]


def test_it_opens_beside_the_best():
    explorer = DilutionExplorer()
    assert explorer.run()["recall@10"] < max(row["recall@10"] for row in explorer.runs)


@pytest.mark.parametrize("make", ["granularity", "map"])
def test_values_and_intervals_have_as_many_decimals(make):
    text = MADE[make][0](MADE[make][1]()).text
    found = re.findall(r"([-+]?\d\.\d+) \[([-+]?\d\.\d+), ([-+]?\d\.\d+)\]", text)
    assert found and all(
        len({len(number.partition(".")[2]) for number in numbers}) == 1 for numbers in found
    )


def test_text_of_the_granularity_sweep_says_cost_collisions_perplexity_and_tokens():
    text = DilutionExplorer(granularity(), levels=1, width=8, items=10).text
    row = next(
        row for row in granularity()["rows"] if (row["sids.levels"], row["sids.width"]) == (1, 8)
    )
    chosen = [
        re.findall("<td>(.*?)</td>", line)[1] for line in re.findall("<tr>(.*?)</tr>", text)[1:11]
    ]
    assert chosen == [
        "1 × 8",
        f"{row['recall@10']:.3f}",
        f"[{row['recall@10'] - 0.021:.3f}, {row['recall@10'] + 0.022:.3f}]",
        f"{row['mflops']:.3g}",
        f"{row['seconds_per_1k_windows']:.3g}",
        str(row["updates"]),
        "3",
        "30",
        "100%",
        "7.5 · (8.5, added against collisions)",
    ]


def test_clear_differences_are_counted():
    data = granularity()
    for number, row in enumerate(data["rows"]):
        row["recall@10"] = (0.37, 0.39)[number] if number < 2 else 0.4
    data = fake_data("granularity", data["rows"])
    for levels, width, of, better, worse in (
        (1, 4, 15, 0, 15),
        (1, 8, 12, 1, 0),  # 2 × 4 and its like are neither coarser nor finer
        (3, 8, 10, 1, 0),
    ):
        text = DilutionExplorer(data, levels=levels, width=width).text
        assert (
            f"it is clearly better than {better} of the {of} settings that are coarser or finer,"
            f" clearly worse than {worse}; the rest is undecided" in text
        )


def test_stamp_is_not_among_the_sizes():
    data = granularity()
    stamp = data["rows"][3] | {"label": "1 × 32, stamp", "map.steps": 2.0}
    assert DilutionExplorer(data | {"rows": [*data["rows"], stamp]}).runs == data["rows"]


def test_curves_are_the_chosen_runs_and_the_baseline_is_always_shown():
    data = map_runs()
    explorer = MapExplorer(data)
    base = data["rows"][0]
    for unit, steps, weight in [("item", 4, 1.0), ("token", 1, 0.1)]:
        explorer.set(unit=unit, steps=steps, weight=weight)
        run = next(
            row
            for row in data["rows"]
            if (row["map.unit"], row["map.steps"], row["map.weight"]) == (unit, steps, weight)
        )
        recall_without, recall_with, loss_without, loss_with, dots, ring = explorer.figure.data
        assert (
            list(recall_without.y) == base["curve"]["mean"]
            and list(recall_with.y) == run["curve"]["mean"]
        )
        assert (
            list(loss_without.y) == base["curve"]["loss"]
            and list(loss_with.y) == run["curve"]["loss"]
        )
        assert (
            list(loss_with.x) == run["curve"]["loss_updates"]
            and list(recall_with.x) == run["curve"]["updates"]
        )
        gains = {row["map.unit"]: [] for row in data["rows"][1:]}
        for row in data["rows"][1:]:
            gains[row["map.unit"]].append(row["recall@10"] - base["recall@10"])
        assert list(dots.y) == gains["item"] + gains["token"]
        assert list(ring.y) == [dots.y[ring.x[0]]] == [run["recall@10"] - base["recall@10"]]
        np.testing.assert_allclose([dots.error_y.array, dots.error_y.arrayminus], 0.015)
        gain = run["recall@10"] - base["recall@10"]
        assert f"{gain:+.3f} [{gain - 0.015:+.3f}, {gain + 0.015:+.3f}]" in explorer.text
        said = (
            "clearly better" if gain > 0.015 else "clearly worse" if gain < -0.015 else "undecided"
        )
        assert f"On the same users and seeds: {said}." in explorer.text
    assert (
        recall_without.line.dash != recall_with.line.dash
        and recall_without.marker.symbol != recall_with.marker.symbol
    )


def test_values_that_were_not_recorded_together_move_to_the_nearest_that_were():
    explorer = MapExplorer(map_runs(), unit="item", steps=4, weight=0.3)
    explorer.controls["unit"].value = "token"  # has one and two steps only
    assert [explorer.value(name) for name in ("unit", "steps", "weight")] == ["token", 2, 0.3]
    explorer.controls["steps"].value = 4
    assert explorer.value("steps") == 2 and explorer.run()["map.unit"] == "token"
    ragged = granularity()
    ragged["rows"] = [
        row
        for row in ragged["rows"]
        if (row["sids.levels"], row["sids.width"]) not in {(3, 8), (3, 4)}
    ]
    assert DilutionExplorer(ragged, levels=3, width=4).value("width") == 16
    with pytest.raises(Exception, match="Invalid selection"):
        explorer.controls["steps"].value = 3


def test_following_equals_a_fresh_explorer_and_sends_little(made):
    make, data, values = made
    explorer = make(data)
    sent = connect(explorer)
    for name, value in values.items():
        sent.clear()
        explorer.controls[name].value = value
        assert 1 <= len(sent) <= 4 and sum(sent) < 200_000
    fresh = make(data, **values)
    assert json.loads(go.Figure(explorer.figure).to_json()) == json.loads(
        go.Figure(fresh.figure).to_json()
    )
    assert explorer.text == fresh.text


def test_export_holds_a_frame_per_recorded_value(made, tmp_path):
    make, data, _ = made
    explorer = make(data)
    page = explorer.export(tmp_path / "page.html").read_text(encoding="utf-8")
    frames = frames_of(page)
    key = {"levels": "sids.levels", "weight": "map.weight"}[explorer.exported]
    assert [frame["value"] for frame in frames] == [
        f"{v:g}" for v in sorted({row[key] for row in explorer.runs})
    ]
    assert len({frame["state"]["text"] for frame in frames}) == len(frames)


def test_both_themes_and_figures_by_themselves(dark):
    rows = granularity()["rows"]
    figure = dilution_figure(rows, rows[5], "updates", "updates")
    assert figure.layout.template.layout.paper_bgcolor == "#14171A"
    assert "<b>updates</b>" in [note.text for note in figure.layout.annotations]
    runs = map_runs()["rows"]
    assert len(map_figure(runs[1:], runs[0], runs[3]).data) == 6
    assert (
        MapExplorer(map_runs()).figure.layout.template
        == go.Figure(layout_template="sidlab_dark").layout.template
    )


def test_another_study_is_refused():
    with pytest.raises(ValueError, match="of the study 'granularity', .* got one of 'map' with 16"):
        DilutionExplorer(map_runs())
    with pytest.raises(ValueError, match="with 1 settings"):
        MapExplorer(fake_data("map", map_runs()["rows"][:1]))


@pytest.mark.parametrize("name", MADE)
def test_bundled_recordings(name):
    explorer = MADE[name][0]()
    rows = explorer.data["rows"]
    assert explorer.data["study"] == name and explorer.run() in rows
    assert all(0 < row["recall@10"] < 1 for row in rows)
