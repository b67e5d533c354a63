"""The sweeps of the papers, their notebooks, and the verdicts on the papers' claims."""

import collections
import itertools
import json
import pathlib
import re

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import scipy.stats
from conftest import ROOT
from hypothesis import assume, given
from hypothesis import strategies as st

from sidlab.config import TrainConfig
from sidlab.data.load import load_catalogue
from sidlab.metrics import METRICS
from sidlab.pruning import PruningConfig
from sidlab.research import claims, studies, study_settings
from sidlab.research.compare import compare
from sidlab.research.cost import cost
from sidlab.research.runs import config_with
from sidlab.research.study_figures import (
    curves_figure,
    schedule_figure,
    strata_figure,
    study_figure,
)
from sidlab.windows import leave_one_out, training_windows


def test_every_setting_is_a_configuration_and_no_two_are_equal():
    for name, study in studies.STUDIES.items():
        made = []
        for label, setting in study.settings.items():
            config = config_with(
                "quick",
                0,
                {key: value for key, value in setting.items() if not key.startswith("sids.")},
            )
            made.append(
                (config, {key: value for key, value in setting.items() if key.startswith("sids.")})
            )
            assert (config.pruning is not None) == any(
                key.startswith("pruning.") for key in setting
            ), (name, label)
        assert all(one != other for i, one in enumerate(made) for other in made[:i]), name


NOTEBOOK = ROOT / "notebooks" / "study.ipynb"


def execute(output, **parameters):
    papermill.execute_notebook(
        NOTEBOOK,
        output,
        parameters,
        kernel_name="python3",
        cwd=str(ROOT),
        progress_bar=False,
    )


@pytest.mark.parametrize("name", studies.STUDIES)
def test_a_study_says_what_its_reader_needs(name):
    study = studies.STUDIES[name]
    about = study.about()
    for part in (study.title, study.question, study.published, study.reading):
        assert part and part in about
    assert f"{len(study.settings)} settings" in about and not re.search(r"[{}]|  ", about)


def test_explorers_show_what_the_planted_settings_hold():
    """Four levels by four widths, MAP by item and by token, scorer by share."""
    sids = [s for s in studies.STUDIES["granularity"].settings.values() if "map.steps" not in s]
    assert {(s["sids.levels"], s["sids.width"]) for s in sids} == set(
        itertools.product((1, 2, 3, 4), (4, 8, 16, 32))
    )
    of_map = list(studies.STUDIES["map"].settings.values())
    assert sum(s.get("map.unit") == "token" for s in of_map) == 2 and len(of_map) == 12
    shares = collections.Counter(
        (s.get("pruning.scorer", "rastp"), s["pruning.keep"])
        for s in studies.STUDIES["strategies"].settings.values()
        if s and "pruning.reduce" not in s
    )
    wanted = set(itertools.product(("rastp", "recent", "random"), study_settings.KEEPS))
    assert wanted <= shares.keys() and set(shares.values()) == {1}
    for name in ("granularity", "map", "strategies"):
        shown = json.loads((studies.COURSE / f"{name}.json").read_text())
        labels = [row["label"] for row in shown["rows"]]
        # Whoever runs the study anew gets at least these
        assert set(labels) <= studies.STUDIES[name].settings.keys(), name
        assert labels[0] == next(iter(studies.STUDIES[name].settings)), name
        assert shown["command"] == studies.command(shown), name


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The notebook of one study by papermill, smoke runs of two settings and two seeds."""
    folder = tmp_path_factory.mktemp("study")
    parameters = dict(preset="smoke", seeds=2, only=2, output_dir=str(folder / "out"))
    execute(folder / "run.ipynb", study="strata", **parameters)
    return folder


def test_a_study_runs_pools_its_seeds_and_writes_what_it_found(ran):
    study = json.loads((ran / "out" / "strata-study.json").read_text())
    assert [row["label"] for row in study["rows"]] == ["unpruned", "recent"] and study["hardware"][
        "processor"
    ]
    for row in study["rows"]:
        low, high = row["recall@10_interval"]
        assert row["seeds"] == 2 and row["updates"] == 20 and low <= row["recall@10"] <= high
    files = sorted((ran / "out" / "runs").glob("*.json"))
    ranks = {
        seed: [
            np.array(json.loads(f.read_text())["ranks"]) for f in files if f"seed{seed}" in f.name
        ]
        for seed in (0, 1)
    }
    hits = {
        of_seed: sorted(float(((r > 0) & (r <= 10)).mean()) for r in ranks[of_seed])
        for of_seed in ranks
    }
    assert sum(row["recall@10"] for row in study["rows"]) == pytest.approx(
        (sum(hits[0]) + sum(hits[1])) / 2
    )
    assert study["rows"][0]["difference"] is None
    by_seed = [sum(row["recall@10_by_seed"][seed] for row in study["rows"]) for seed in (0, 1)]
    assert by_seed == pytest.approx([sum(hits[0]), sum(hits[1])])
    assert study["rows"][1]["difference"] == pytest.approx(
        study["rows"][1]["recall@10"] - study["rows"][0]["recall@10"]
    )
    outputs = [
        output
        for cell in nbformat.read(ran / "run.ipynb", 4).cells
        for output in cell.get("outputs", [])
    ]
    assert (
        sum("application/vnd.plotly.v1+json" in output.get("data", {}) for output in outputs) == 2
    )


def test_runs_of_two_devices_are_told(ran, tmp_path):
    frame = studies.run("strata", ran / "out", preset="smoke", seeds=2, only=2)
    files = [tmp_path / str(number) for number in range(len(frame))]
    for last, busy in (("a CPU", False), ("NVIDIA H100", True)):
        for file, made in zip(files, frame["file"]):
            device = last if file == files[-1] else "a CPU"
            file.write_text(
                json.dumps(
                    json.loads(pathlib.Path(made).read_text()) | {"busy": False, "device": device}
                )
            )
        assert studies.summarise(frame.assign(file=files))["busy"].tolist() == [busy] * 2


def test_schedules_are_shown_before_the_runs_and_pairs_behind_them(ran):
    parameters = dict(preset="smoke", seeds=1, only=2, output_dir=str(ran / "out"))
    execute(ran / "adaptive.ipynb", study="adaptive", **parameters)
    cells = nbformat.read(ran / "adaptive.ipynb", 4).cells
    drawn, run, pairs = (
        next(i for i, cell in enumerate(cells) if cell.cell_type == "code" and text in cell.source)
        for text in ("schedule_figure(", "studies.run(", "studies.versus(")
    )
    assert drawn < run < pairs and all(cells[place].outputs for place in (drawn, run))
    about = studies.STUDIES["adaptive"].about()
    shown = [
        o["data"].get("text/markdown") for c in cells for o in c.get("outputs", ()) if "data" in o
    ]
    assert about in shown
    study = json.loads((ran / "out" / "adaptive-study.json").read_text())
    assert (
        [row["label"] for row in study["rows"]] == ["unpruned", "constant 1/3"]
        and study["versus"] == []
        and study["only"] == 2
    )
    assert study["rows"][0]["sids"]["widths"] and study["rows"][0]["busy"] in (True, False)


def test_groups_cover_all_users_and_average_to_the_whole(ran):
    frame = studies.run("strata", ran / "out", preset="smoke", seeds=2, only=2)
    groups = studies.strata(frame, "planted")
    rows = studies.summarise(frame).set_index("label")["recall@10"]
    histories, targets = leave_one_out(load_catalogue("planted").histories).cases("test")
    for (label, _), part in groups.groupby(["label", "by"]):
        assert part["users"].sum() == len(targets)
        assert (part["users"] * part["recall@10"]).sum() / len(targets) == pytest.approx(
            rows[label]
        )
    lengths = np.array([len(h) for h in histories])
    short = groups[(groups["label"] == "unpruned") & (groups["group"] == "short")]["users"].item()
    assert short == (lengths <= np.quantile(lengths, 1 / 3)).sum()


def test_an_unknown_study_or_parameter_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="study='layers' is unknown; use one of 'strategies', 'layer-ratio'"
    ):
        studies.run("layers", tmp_path)
    with pytest.raises(ValueError, match="only must be at least 1, got -1"):
        studies.run("map", tmp_path, only=-1)
    failed = papermill.PapermillExecutionError
    with pytest.raises(failed, match="unknown parameter epochs; use study, dataset"):
        execute(tmp_path / "x.ipynb", epochs=3)
    with pytest.raises(failed, match="study='layers' is unknown; use one of 'strategies'"):
        execute(tmp_path / "x.ipynb", study="layers")


def test_a_summary_is_kept_where_pages_and_course_read_it(ran, tmp_path, monkeypatch):
    frame = studies.run("strata", ran / "out", preset="smoke", seeds=2, only=2)
    made = dict(dataset="planted", preset="quick", seeds=2, arch="t5", sids="", only=0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studies, "COURSE", tmp_path / "course")
    (tmp_path / "course").mkdir()
    with pytest.raises(ValueError, match="results/studies, which is no folder"):
        studies.save("strata", frame, tmp_path, keep=True, **made)
    (tmp_path / "results" / "studies").mkdir(parents=True)
    for look in ({"only": 2}, {"preset": "smoke"}):
        with pytest.raises(ValueError, match="keep=True is for whole studies"):
            studies.save("strata", frame, tmp_path, keep=True, **made | look)
    kept = tmp_path / "results" / "studies" / "strata-planted.json"
    shown = tmp_path / "course" / "strata.json"
    studies.save("strata", frame, tmp_path, keep=True, **made)
    assert kept.exists() and not shown.exists()
    shown.write_text("{}")  # the course shows it
    studies.save("strata", frame, tmp_path, keep=True, **made)
    assert shown.read_text() == kept.read_text()
    row = json.loads(shown.read_text())["rows"][1]
    assert (row["pruning.scorer"], row["pruning.keep"]) == ("recent", pytest.approx(1 / 3))
    other = made | {"dataset": "../data/amazon-beauty", "preset": "long", "arch": "qwen"}
    assert [str(path) for path in studies._kept({"study": "map"} | other, 0)] == [
        "results/studies/map-beauty-qwen-long.json"
    ]
    assert studies.command({"study": "map"} | other | {"sids": "my table"}) == (
        "make study STUDY=map DATASET=../data/amazon-beauty PRESET=long SEEDS=2 ARCH=qwen"
        " SIDS='my table'"
    )


def test_rows_hold_defaults_losses_and_predicted_flops(ran):
    frame = studies.run("strata", ran / "out", preset="smoke", seeds=2, only=2)
    catalogue = load_catalogue("planted")
    train = leave_one_out(catalogue.histories).train
    rows = studies.summarise(frame).to_dict("records")
    assert pd.isna(rows[0]["pruning.scorer"]) and rows[1]["pruning.scorer"] == "recent"
    keeps = [{}, {"pruning.keep": 0.5}, {"pruning.keep": 0.5, "pruning.scorer": "recent"}]
    filled = studies._with_defaults(pd.DataFrame(keeps))
    assert filled["pruning.scorer"].fillna("").tolist() == ["", "rastp", "recent"]
    for row, (label, runs) in zip(rows, frame.groupby("label", sort=False)):
        found = [json.loads(pathlib.Path(file).read_text()) for file in runs["file"]]
        losses = np.mean([one["curve"]["loss"] for one in found], axis=0)
        np.testing.assert_allclose(row["curve"]["loss"], losses)
        assert row["curve"]["loss_updates"] == found[0]["curve"]["step"]
        pruned = {"pruning": PruningConfig(scorer="recent")} if label == "recent" else {}
        config = TrainConfig.preset("smoke", **pruned)
        lengths = training_windows(train, config)
        expected = cost(config, found[0]["sids"]["widths"], lengths).training / 1e6
        assert row["mflops"] == pytest.approx(expected, rel=0.01)
        assert len(found[0]["sids"]["perplexity"]) == len(found[0]["sids"]["widths"])
    # What a model decides by itself is not told by lengths
    settings = studies.STUDIES["adaptive"].settings["mass 0.5"]
    assert studies._mflops("smoke", settings, catalogue, found[0]) is None


def fake_rows(name):
    rng = np.random.default_rng(0)
    rows = []
    for label, setting in studies.STUDIES[name].settings.items():
        recall = float(rng.uniform(0.3, 0.5))
        rows.append(
            {
                "label": label,
                **setting,
                "recall@10": recall,
                "recall@10_interval": [recall - 0.02, recall + 0.02],
                "seconds_per_1k_windows": float(rng.uniform(1, 3)),
                "peak_memory_mb": 200.0,
                "kept_token_fraction": float(rng.uniform(0.2, 1)),
            }
        )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("name", studies.STUDIES)
def test_figures_show_every_setting(name):
    rows = fake_rows(name)
    x = studies.STUDIES[name].x
    figure = study_figure(rows, x)
    if x is None:
        assert list(figure.layout.yaxis.ticktext) == rows["label"].tolist() and len(
            figure.data[0].x
        ) == len(rows)
        assert list(figure.data[0].x) == rows["recall@10"].tolist()
    else:
        shown = [
            (text, y)
            for trace in figure.data
            if trace.xaxis == "x"
            for text, y in zip(trace.text, trace.y)
        ]
        # Where the first is a point of a curve
        others = rows if name == "granularity" else rows[1:]
        assert sorted(shown) == sorted(zip(others["label"], others["recall@10"]))
        looks = {
            (t.line.color, t.line.dash, t.marker.symbol) for t in figure.data if t.xaxis == "x"
        }
        assert len(looks) == len([t for t in figure.data if t.xaxis == "x"])


def test_strata_figure_shows_both_sides():
    rows = pd.DataFrame(
        [
            {
                "label": label,
                "by": by,
                "group": group,
                "users": 10,
                "recall@10": 0.1,
                "recall@10_interval": [0.05, 0.2],
            }
            for label in ("unpruned", "rastp")
            for by in ("a", "b")
            for group in ("x", "y")
        ]
    )
    figure = strata_figure(rows)
    assert [trace.name for trace in figure.data] == ["unpruned", "unpruned", "rastp", "rastp"]
    assert figure.layout.yaxis.type is None
    rows.loc[rows["by"].eq("b") & rows["group"].eq("y"), "recall@10"] = 0.005
    figure = strata_figure(rows)
    assert (figure.layout.yaxis.type, figure.layout.yaxis2.type) == (None, "log")


def test_curves_show_the_mean_and_the_range_of_the_seeds(ran):
    rows = studies.summarise(studies.run("strata", ran / "out", preset="smoke", seeds=2, only=2))
    files = [
        json.loads(path.read_text())
        for path in sorted((ran / "out" / "runs").glob("planted-smoke-seed*.json"))
    ]
    curves = np.array([file["curve"]["recall@10"] for file in files])
    trace = curves_figure(rows).data[0]
    assert trace.name == "unpruned" and list(trace.x) == files[0]["curve"]["eval_step"]
    np.testing.assert_allclose(trace.y, curves.mean(0))
    np.testing.assert_allclose(np.array(trace.y) + trace.error_y.array, curves.max(0))
    np.testing.assert_allclose(np.array(trace.y) - trace.error_y.arrayminus, curves.min(0))


# --- Claims


def comparison(arch="t5", preset="quick", **differences):
    """Results in which a method has (seconds, memory, difference, half width of its interval)."""
    rows = [
        {
            "method": "unpadded",
            "recall@10": 0.4,
            "seconds_per_1k_windows": 2.0,
            "peak_memory_mb": 100.0,
            "difference": None,
        }
    ]
    for method, (seconds, memory, difference, half) in differences.items():
        versus = {
            "difference": difference,
            "difference_interval": [difference - half, difference + half],
            "difference_by_seed": [difference] * 3,
        }
        rows.append(
            {
                "method": method.replace("_", "-"),
                "recall@10": 0.4 + difference,
                "seconds_per_1k_windows": seconds,
                "peak_memory_mb": memory,
                **versus,
            }
        )
    for row in rows:
        row |= {"seeds": 3, "recall@5": 0.2, "ndcg@5": 0.1, "ndcg@10": 0.1} | {
            f"{metric}_interval": [0.3, 0.5] for metric in METRICS
        }
    return {
        "dataset": "planted",
        "preset": preset,
        "arch": arch,
        "summary": rows,
        "command": f"make reproduce {arch}",
        "hardware": {"processor": "p", "gpu": None, "threads": 1},
    }


def verdicts(*files):
    return {claim["claim"]: claim["verdict"] for claim in claims.judge(list(files))}


@pytest.mark.parametrize(
    "difference, half, verdict",
    [
        (0.0, 0.01, "confirmed"),
        (0.01, 0.005, "confirmed"),
        (-0.005, 0.01, "confirmed"),
        (-0.005, 0.002, "confirmed"),
        (-0.05, 0.01, "not confirmed"),
        (0.0, 0.05, "undecided"),
    ],
)
def test_quality_is_judged_by_its_interval(difference, half, verdict):
    """Kept: above −5 % of .4, that is −.02, for sure; lost: below. One seed decides nothing, and
    too low a ratio hurts exactly where quality is not kept.
    """
    results = comparison(rastp=(1.0, 50, difference, half))
    kept = "Quality is kept or slightly better."
    assert verdicts(results)[kept] == verdict
    for row in results["summary"]:
        row["seeds"] = 1
    assert verdicts(results)[kept] == "undecided"
    # RASTP had none
    assert verdicts(comparison("qwen", rastp=(1.0, 50, difference, half)))[kept] == "not run"
    ratio = study("layer-ratio", **{"unpruned": 0.4, "layer 2, keep 0.1": 0.4 + difference})
    ratio["rows"][1]["difference_interval"] = [difference - half, difference + half]
    hurts = {"confirmed": "not confirmed", "not confirmed": "confirmed"}.get(verdict, verdict)
    assert verdicts(ratio)["Too low a retention ratio hurts."] == hurts


KEPT = "Quality is kept or slightly better."


def of_seeds(*differences):
    """A comparison whose seeds have these differences; the interval over users is narrow."""
    results = comparison(rastp=(1.0, 50, float(np.mean(differences)), 1e-4))
    test = scipy.stats.ttest_1samp(differences, 0).confidence_interval()
    results["summary"][1] |= {
        "difference_by_seed": list(differences),
        "difference_seed_interval": list(test) if len(differences) > 4 else None,
    }
    return results


def test_seeds_must_agree_and_from_five_on_are_tested():
    assert verdicts(of_seeds(-0.010, -0.012, -0.011))[KEPT] == "confirmed"
    assert verdicts(of_seeds(-0.010, -0.025, 0.0))[KEPT] == "undecided", "one lies below −.02"
    five = (-0.010, -0.025, 0.0, -0.005, -0.012)
    p = scipy.stats.ttest_1samp(five, -0.02).pvalue
    assert verdicts(of_seeds(*five))[KEPT] == ("confirmed" if p < 0.05 else "undecided")
    assert verdicts(of_seeds(*(x - 0.04 for x in five)))[KEPT] == "not confirmed"
    assert verdicts(of_seeds(-0.01, -0.1, 0.1, -0.05, 0.06))[KEPT] == "undecided"


@given(st.lists(st.floats(0.001, 0.03), min_size=1, max_size=8))
def test_tests_of_one_claim_are_corrected_for_their_number(halves):
    files = [
        comparison(rastp=(1.0, 50, -0.01, half)) | {"command": str(number)}
        for number, half in enumerate(halves)
    ]
    claim = next(claim for claim in claims.judge(files) if claim["claim"] == KEPT)
    p = [2 * scipy.stats.norm.sf(0.01 / (half / scipy.stats.norm.ppf(0.975))) for half in halves]
    # Benjamini and Hochberg (1995) by hand: the largest k with p(k) ≤ k/n · 5 %.
    order = np.sort(p)
    holding = np.flatnonzero(order <= 0.05 * np.arange(1, len(p) + 1) / len(p))
    # At the very limit rounding decides
    limits = 0.05 * np.arange(1, len(p) + 1) / len(p)
    assume(np.abs(np.subtract.outer(order, limits)).min() > 1e-9)
    limit = order[holding[-1]] if len(holding) else -1.0
    found = [finding["verdict"] for finding in claim["findings"]]
    assert found == ["confirmed" if one <= limit else "undecided" for one in p]


def test_savings_are_judged_by_the_published_figure():
    speed = "Training is 1.23–1.38 times as fast."
    memory = "Training takes 17.2%–54.7% less memory."
    fast, near, slow = (
        verdicts(comparison(stamp=(2.0 / ratio, mb, 0, 0.01)))
        for ratio, mb in ((1.37, 82), (1.24, 83), (1.1, 83))
    )
    # Single runs differ by a tenth
    assert [found[speed] for found in (fast, near, slow)] == [
        "confirmed",
        "undecided",
        "not confirmed",
    ]
    seeds = comparison(stamp=(2.0 / 1.24, 83, 0, 0.01))
    of_seeds = {"unpadded": (1.995, 2.0, 2.005), "stamp": (1.61, 2.0 / 1.24, 1.615)}
    seeds["rows"] = [
        {"method": method, "seconds_per_1k_windows": value}
        for method, values in of_seeds.items()
        for value in values
    ]
    assert verdicts(seeds)[speed] == "confirmed"
    seeds["rows"][-1]["seconds_per_1k_windows"] = 1.7
    assert verdicts(seeds)[speed] == "undecided"
    assert fast[memory] == slow[memory] == "not run"  # on a CPU memory says nothing
    on_gpu = [comparison(stamp=(1.0, mb, 0, 0.01)) for mb in (82, 83)]
    for results in on_gpu:
        results["hardware"]["gpu"] = "H100"
    assert [verdicts(results)[memory] for results in on_gpu] == ["confirmed", "not confirmed"]
    both = verdicts(comparison(stamp=(1.0, 50, 0, 0.01)), comparison(stamp=(1.9, 50, 0, 0.01)))
    assert both[speed] == "mixed"
    only_padding_saved = comparison(padded=(9.0, 500, 0, 0.01), stamp=(2.1, 50, 0, 0.01))
    assert verdicts(only_padding_saved)[speed] == "not confirmed"
    padded = comparison(padded=(10.0, 500, 0, 0.01), rastp_reference=(5.0, 300, -0.1, 0.01))
    finding = next(
        c for c in claims.judge([padded]) if c["claim"].startswith("Training takes 26.7%")
    )
    assert (
        finding["verdict"] == "confirmed"
        and "2.00 times [1.81, 2.21] as fast as padded" in finding["findings"][0]["figures"]
    )


def test_seconds_of_a_busy_machine_say_nothing_and_those_of_the_study_do():
    busy = comparison(rastp=(1.0, 50, 0, 0.001)) | {"busy": "other jobs ran"}
    found = claims.judge([busy])[0]
    assert found["claim"].startswith("Training takes 26.7%") and found["verdict"] == "not run"
    rows = study("efficiency", **{"unpruned": 0.4, "keep 0.33": 0.4})
    for row, seconds in zip(rows["rows"], (1.6, 1.0)):
        row["seconds_per_1k_windows"] = seconds
    finding = claims.judge([busy, rows])[0]
    assert (
        finding["verdict"] == "confirmed"
        and "1.60 times [1.45, 1.77] as fast" in finding["findings"][0]["figures"]
    )
    for row, span in zip(rows["rows"], ([1.3, 1.7], [0.9, 1.1])):
        row["seconds_range"] = span
    # Two seeds are no spread
    assert "[1.45, 1.77]" in claims.judge([rows | {"seeds": 2}])[0]["findings"][0]["figures"]
    finding = claims.judge([rows | {"seeds": 3}])[0]
    assert (
        finding["verdict"] == "undecided"
        and "1.60 times [1.18, 1.89] as fast" in finding["findings"][0]["figures"]
    )
    rows["rows"][1]["busy"] = True
    assert claims.judge([rows])[0]["verdict"] == "not run"
    assert (
        claims.judge([study("efficiency", **{"unpruned": 0.4, "keep 0.1": 0.4})])[0]["verdict"]
        == "not run"
    )


def test_the_benchmark_is_evidence_too():
    steps = (
        ("published, without pruning", 6.0),
        ("published RASTP", 4.0),
        ("CUDA graphs", 1.5),
        ("pruning to a third", 1.0),
    )
    rows = [
        {"workload": "Beauty lengths", "variant": name, "seconds_per_1k_windows": seconds}
        for name, seconds in steps
    ]
    full = (
        ("nothing pruned", 3.0, 100.0),
        ("everything scored and kept", 3.1, 110.0),
        ("a third kept", 2.9, 80.0),
    )
    rows += [
        {
            "workload": "full histories",
            "variant": name,
            "seconds_per_1k_windows": seconds,
            "peak_mb": mb,
        }
        for name, seconds, mb in full
    ]
    for row in rows:
        row["quartiles"] = [
            0.98 * row["seconds_per_1k_windows"],
            1.02 * row["seconds_per_1k_windows"],
        ]
    bench = {
        "command": "python -m sidlab.research.bench",
        "rows": rows,
        "targets": [],
        "hardware": {"processor": "p", "gpu": "H100", "threads": 1},
    }
    found = {claim["claim"][:17]: claim for claim in claims.judge([bench])}
    figures = [finding["figures"] for finding in found["Training takes 26"]["findings"]]
    assert found["Training takes 26"]["verdict"] == "mixed" and figures == [
        "rastp-reference trains 1.50 times [1.44, 1.56] as fast as padded on Beauty lengths",
        "rastp trains 1.50 times [1.44, 1.56] as fast as unpadded on Beauty lengths",
        "rastp trains 1.03 times [0.99, 1.08] as fast as unpadded on full histories",
    ]
    assert found["Training takes 26"]["verdicts"] == {"benchmark": "mixed"}
    memory = found["Training takes 17"]
    assert (
        memory["verdict"] == "undecided"
        and "rastp takes 20.0% less memory" in memory["findings"][0]["figures"]
    )


def test_nothing_run_smoke_and_what_cannot_be_run_are_told_apart():
    nothing = verdicts()
    assert nothing["MAP alone beats the baseline."] == "not run"
    assert nothing["It holds on AL-GR-Tiny with a pretrained Qwen."] == "not testable here"
    assert (
        verdicts(comparison(preset="smoke", map=(2, 100, 0.1, 0.01)))[
            "MAP alone beats the baseline."
        ]
        == "not run"
    )
    assert (
        verdicts(comparison(map=(2, 100, 0.1, 0.01)))["MAP alone beats the baseline."]
        == "confirmed"
    )
    assert (
        verdicts(comparison("qwen", rastp=(1, 50, 0.0, 0.001)))[
            "It holds for decoder-only models, too."
        ]
        == "confirmed"
    )


def study(name, **values):
    rows = [
        {
            "label": label,
            "recall@10": value,
            "recall@10_interval": [value - 0.01, value + 0.01],
            "difference": value - 0.4,
            "difference_interval": [value - 0.41, value - 0.39],
            "kept_token_fraction": 0.3,
            "curve": {"mean": [value]},
        }
        for label, value in values.items()
    ]
    return {
        "study": name,
        "dataset": "planted",
        "preset": "quick",
        "seeds": 2,
        "arch": "t5",
        "rows": rows,
        "hardware": {"processor": "p", "gpu": None, "threads": 1},
    }


def test_studies_are_judged():
    def pairs(**differences):
        return {
            "versus": [
                {
                    "label": label,
                    "against": against,
                    "difference": d,
                    "difference_interval": [d - 0.01, d + 0.01],
                }
                for label, (against, d) in differences.items()
            ]
        }

    ratio = study(
        "layer-ratio",
        **{
            "unpruned": 0.4,
            "layer 2, keep 0.1": 0.3,
            "layer 1, keep 0.33": 0.2,
            "layer 2, keep 0.33": 0.399,
        },
    )
    adaptive = study(
        "adaptive",
        **{
            "unpruned": 0.4,
            "constant 1/3": 0.38,
            "stage, from 0.15": 0.34,
            "stage, from 0.6": 0.42,
        },
    )
    for row, start in zip(adaptive["rows"], (None, None, 0.15, 0.6)):
        row |= {"strategy.kind": start and "stage", "strategy.start": start, "pruning.keep": 1 / 3}
    adaptive |= pairs(
        **{"stage, from 0.15": ("constant 30%", -0.04), "stage, from 0.6": ("constant 40%", 0.04)}
    )
    strategies = study("strategies", unpruned=0.4) | pairs(
        rastp=("random", 0.05), recent=("random", -0.05)
    )
    found = verdicts(ratio, strategies, adaptive)
    assert found["Too low a retention ratio hurts."] == "confirmed"
    assert found["Up to two thirds of the tokens can go without a loss of accuracy."] == "confirmed"
    assert (
        found["Centrality × saliency finds the tokens that matter: better than a random third."]
        == "confirmed"
    )
    # The layer that validation users would choose is judged, though it loses on the test
    ratio["rows"][2]["curve"] = {"mean": [0.5]}
    assert (
        verdicts(ratio)["Up to two thirds of the tokens can go without a loss of accuracy."]
        == "not confirmed"
    )
    # What begins with most tokens is not what the paper claims.
    assert (
        next(v for c, v in found.items() if c.startswith("A ratio that changes")) == "not confirmed"
    )
    dilution = "Accuracy moves non-monotonically as SIDs get finer (Semantic Dilution Effect)."
    for differences, verdict in (
        ((0.1, -0.05), "confirmed"),
        ((0.1, 0.05), "not confirmed"),
        ((0.1, 0.0), "undecided"),
    ):
        found = pairs(**{"3 × 8": ("2 × 8", differences[0]), "3 × 16": ("3 × 8", differences[1])})
        assert verdicts(study("granularity", **{"2 × 8": 0.3}) | found)[dilution] == verdict


def test_a_model_that_is_far_from_the_published_one_decides_nothing():
    kept = "Quality is kept or slightly better."
    rows = comparison(rastp=(1.0, 50, 0.0, 0.0001)) | {"dataset": "x/amazon-beauty"}
    for base, verdict in ((0.03, "undecided"), (0.06, "confirmed")):
        rows["summary"][0]["recall@10"] = base
        found = next(claim for claim in claims.judge([rows]) if claim["claim"] == kept)
        assert found["verdict"] == verdict and (
            "not trained enough" in found["findings"][0]["figures"]
        ) == (verdict == "undecided")
    both = next(
        claim
        for claim in claims.judge([rows, comparison(rastp=(1.0, 50, -0.1, 0.0001))])
        if claim["claim"] == kept
    )
    assert both["verdict"] == "mixed" and both["verdicts"] == {
        "amazon-beauty": "confirmed",
        "planted": "not confirmed",
    }


def fake_runs(folder, settings, seeds=3, users=400):
    """{label: (hit rate, kept share)} as a frame of runs, with files of ranks."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        for label, (rate, kept) in settings.items():
            file = folder / f"{len(rows)}.json"
            ended = (
                None if kept == 1 else {"after_layer": 3 if label == "settled" else 2, "layers": 4}
            )
            file.write_text(
                json.dumps(
                    {"ranks": (rng.random(users) < rate).astype(int).tolist(), "ended": ended}
                )
            )
            rows.append(
                {"label": label, "seed": seed, "file": str(file), "kept_token_fraction": kept}
            )
    hits = {
        label: np.array(
            [
                json.loads(pathlib.Path(row["file"]).read_text())["ranks"]
                for row in rows
                if row["label"] == label
            ]
        )
        for label in settings
    }
    return pd.DataFrame(rows), hits


def test_what_adapts_is_compared_at_equal_cost(tmp_path):
    settings = {
        "unpruned": (0.8, 1.0),
        "constant 0.2": (0.2, 0.2),
        "constant 0.5": (0.4, 0.5),
        "mass 0.5": (0.7, 0.3),
        "gap": (0.4, 0.9),
        "less than all": (0.1, 0.1),
        "settled": (0.4, 0.2),
    }
    frame, hits = fake_runs(tmp_path, settings)
    found = studies.versus("adaptive", frame).set_index("label")
    assert found["against"].to_dict() == {
        name: f"constant, {work} of the work"
        for name, work in (("mass 0.5", "65%"), ("gap", "95%"), ("settled", "80%"))
    }
    expected = (
        hits["mass 0.5"].mean()
        - (2 * hits["constant 0.2"].mean() + hits["constant 0.5"].mean()) / 3
    )
    assert found["difference"]["mass 0.5"] == pytest.approx(expected)
    expected = hits["settled"].mean() - (
        0.8 * hits["constant 0.5"].mean() + 0.2 * hits["unpruned"].mean()
    )
    # A third layer in front is like 60 % kept behind the second
    assert found["difference"]["settled"] == pytest.approx(expected)
    assert (
        found["difference_interval"]["mass 0.5"][0] > 0.2
        and found["difference_interval"]["gap"][1] < 0
    )


def test_scorers_are_compared_with_chance_and_fine_sids_with_coarse_ones(tmp_path):
    frame, hits = fake_runs(
        tmp_path, {"unpruned": (0.8, 1.0), "rastp": (0.5, 0.3), "random": (0.3, 0.3)}
    )
    (row,) = studies.versus("strategies", frame).to_dict("records")
    assert (row["label"], row["against"]) == ("rastp", "random")
    work = dict.fromkeys(["unpruned", "rastp, keep 0.1", "random, keep 0.1", "recent, keep 0.2"], 1)
    assert studies.STUDIES["strategies"].pairs(work) == [
        ("rastp, keep 0.1", "random, keep 0.1", {"random, keep 0.1": 1})
    ]
    assert (
        row["difference"] == pytest.approx(hits["rastp"].mean() - hits["random"].mean())
        and row["difference_interval"][0] > 0.1
    )
    frame, _ = fake_runs(
        tmp_path, {label: (0.5, 1.0) for label in ("2 × 16", "3 × 8", "3 × 16", "3 × 16, stamp")}
    )
    found = studies.versus("granularity", frame)
    # 3 × 8 is not finer than 2 × 16
    assert set(zip(found["label"], found["against"])) == {("3 × 16", "2 × 16"), ("3 × 16", "3 × 8")}
    assert studies.versus("map", frame).empty


def test_schedules_are_drawn_as_they_will_run():
    figure = schedule_figure(studies.STUDIES["adaptive"].settings)
    lines = {trace.name: trace.y for trace in figure.data}
    assert (
        "loss gap 0.02" not in lines
        and "mass 0.5" not in lines
        and set(lines["constant 0.5"]) == {0.5}
    )
    assert lines["cosine, from 0.15"][0] == pytest.approx(0.15) and lines["stage, from 0.6"][
        0
    ] == pytest.approx(0.6)
    assert all(
        lines[f"{kind}, from 0.15"][-1] == pytest.approx(1 / 3)
        for kind in ("linear", "cosine", "stage")
    )


def test_finer_sids_for_large_catalogues():
    study = studies.STUDIES["granularity"]
    small = study.settings_for(500)
    large = study.settings_for(12_000)
    assert (len(small), len(large)) == (32, 12)
    assert {setting["sids.width"] for setting in large.values()} == {64, 256}
    study = studies.STUDIES["inference"]
    assert study.settings_for(12_000) == study.settings
    # What only the planted explorers show is not run on large catalogues
    assert len(studies.STUDIES["map"].settings_for(12_000)) == 10
    assert len(studies.STUDIES["strategies"].settings_for(12_000)) == 10


def test_the_page_is_written_from_the_files_and_names_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    claims.main(
        [
            "planted",
            "--preset",
            "smoke",
            "--seeds",
            "1",
            "--methods",
            "unpadded rastp",
            "--arch",
            "qwen",
            "--output",
            str(tmp_path / "paper"),
            "--evidence",
        ]
    )
    assert "smoke are too short to judge anything by" in capsys.readouterr().out
    page = (tmp_path / "paper" / "index.html").read_text()
    found = json.loads((tmp_path / "paper" / "claims.json").read_text())
    # Smoke says nothing
    assert {claim["verdict"] for claim in found["claims"]} == {"not run", "not testable here"}
    files = claims.evidence(tmp_path / "paper")
    assert [file["arch"] for file in files] == ["qwen"] and "ARCH=qwen" in files[0]["command"]
    (tmp_path / "more").mkdir()
    bench = {"rows": [], "targets": [], "hardware": {"processor": "p", "gpu": None, "threads": 1}}
    for name, options in (("bench.json", ""), ("quick-bench.json", " --quick")):
        (tmp_path / "more" / name).write_text(
            json.dumps(bench | {"command": "python -m sidlab.research.bench" + options})
        )
    assert [
        file["command"] for file in claims.evidence(tmp_path / "more", tmp_path / "nothing")
    ] == ["python -m sidlab.research.bench"]
    (tmp_path / "studies").mkdir()
    for place, changes in enumerate(
        ({"seeds": 3, "sids": ""}, {"seeds": 1}, {"seeds": 9, "only": 2}, {"seeds": 1, "sids": "x"})
    ):
        (tmp_path / "studies" / f"{place}.json").write_text(
            json.dumps(study("map", **{"no MAP": 0.4}) | changes)
        )
    assert [
        (file["seeds"], file.get("sids", "")) for file in claims.evidence(tmp_path / "studies")
    ] == [(3, ""), (1, "x")]
    (tmp_path / "more" / "results.json").write_text(
        json.dumps(comparison(map=(2, 100, 0.1, 0.01)) | {"dataset": "x/amazon-beauty"})
    )
    claims.main(["--output", str(tmp_path / "again"), "--evidence", str(tmp_path / "more")])
    page = (tmp_path / "again" / "index.html").read_text()
    assert (
        "make reproduce t5" in page
        and ".0648" in page
        and "✓ confirmed" in page
        and "<script" not in page
    )


def test_evidence_passes_over_other_files_and_names_a_damaged_one(tmp_path):
    for content in (
        [],
        {"summary_of": "something else"},
        {"summary": [], "command": "make", "rows": []},
    ):
        (tmp_path / f"{len(list(tmp_path.iterdir()))}-results.json").write_text(json.dumps(content))
    (tmp_path / "other.json").write_text("{")
    assert claims.evidence(tmp_path) == [{"summary": [], "command": "make", "rows": []}]
    (tmp_path / "cut-study.json").write_text('{"study": "ma')
    with pytest.raises(ValueError, match="cut-study.json"):
        claims.evidence(tmp_path)


def test_the_comparison_takes_a_decoder_only_model(tmp_path):
    results = compare(
        "planted", "smoke", "unpadded rastp-visible stamp", 1, str(tmp_path), arch="qwen"
    )
    rows = {row["method"]: row for row in results["summary"]}
    assert (
        rows["stamp"]["kept_token_fraction"] < 0.5
        and rows["unpadded"]["predicted_flops"] > rows["stamp"]["predicted_flops"]
    )
    assert json.loads((tmp_path / "results.json").read_text())["arch"] == "qwen"
    with pytest.raises(ValueError, match="belongs to T5"):
        compare("planted", "smoke", "rastp-reference", 1, str(tmp_path / "x"), arch="qwen")


def test_figures_show_single_seeds_where_there_are_several():
    for name in ("strategies", "layer-ratio"):
        rows = fake_rows(name).assign(**{"recall@10_by_seed": None})
        rows.at[1, "recall@10_by_seed"] = [0.31, 0.34]
        figure = study_figure(rows, studies.STUDIES[name].x)
        (dots,) = (trace for trace in figure.data if trace.name == "single seeds")
        values = dots.x if name == "strategies" else dots.y
        assert list(values) == [0.31, 0.34] and dots.marker.size < 9


@pytest.mark.parametrize("name", ["strategies", "map", "efficiency"])
def test_figures_of_runs_side_by_side_do_without_seconds(name):
    x = studies.STUDIES[name].x
    for missing in (None, float("nan")):
        rows = fake_rows(name).assign(seconds_per_1k_windows=missing)
        figure = study_figure(rows, x)
        shown = [value for trace in figure.data if trace.xaxis == "x" for value in trace.x]
        assert len(shown) >= len(rows) - 1
