"""What README.md and results/README.md show is what results/*.json hold."""

import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT

from sidlab import load_catalogue
from sidlab.files import read_json
from sidlab.metrics import ranks_of
from sidlab.research.summary import COSTS, metrics_of

spec = importlib.util.spec_from_file_location("show", ROOT / "results" / "show.py")
show = importlib.util.module_from_spec(spec)
spec.loader.exec_module(show)


def test_readme_shows_the_results_that_are_kept():
    text, page = (path.read_text(encoding="utf-8") for path in (show.README, show.PAGE))
    assert show.updated(text) == text and show.page() == page, "run: python results/show.py"
    for path in (ROOT / "results").glob("amazon-*.json"):
        for row in json.loads(path.read_text())["summary"]:
            assert f"| {row['method']} | {row['recall@5']:.4f} | {row['recall@10']:.4f}" in page
    for path in (ROOT / "results").glob("continued-*.json"):
        rows = {row["method"]: row for row in json.loads(path.read_text())["summary"]}
        low, high = rows["rastp"]["difference_interval"]
        assert f"{rows['rastp']['difference']:+.4f} [{low:+.4f}, {high:+.4f}]" in text


def test_every_study_has_its_picture():
    """Drawn of the same figure: only the text can be asked here, without a browser."""
    studies = show.load("studies/*.json")
    for study in studies:
        svg = (ROOT / "results" / "studies" / show._picture_name(study)).read_text()
        figure = show.picture(study)
        assert show.digest(figure) in svg and svg.startswith("<svg"), "run: python results/show.py"
        assert figure.layout.title.text in svg
    assert len(list((ROOT / "results" / "studies").glob("*.svg"))) == len(studies)
    for path, figure in show.pictures().items():
        assert show.digest(figure) in path.read_text(), "run: python results/show.py"
    other = json.loads(json.dumps(studies[0]))
    other["rows"][1]["recall@10"] += 0.01
    assert show.digest(show.picture(other)) != show.digest(show.picture(studies[0]))


def test_results_hold_what_a_reader_needs_to_repeat_them():
    for path in (ROOT / "results").glob("*.json"):
        results = json.loads(path.read_text())
        assert (
            results["command"] and results["hardware"]["processor"] and results["versions"]["torch"]
        ), path


def test_a_readme_without_the_section_is_refused():
    with pytest.raises(ValueError, match="has no line"):
        show.updated("# Title\n")


def test_every_study_has_a_sentence_whose_better_and_worse_follow_from_intervals():
    from sidlab.research.studies import STUDIES

    sentences = show.sentences()
    assert sentences.keys() == STUDIES.keys()
    for name, study in STUDIES.items():
        rows = {}
        for place, label in enumerate(study.settings):
            recall = 0.5 - 0.01 * place
            rows[label] = {
                "label": label,
                "recall@10": recall,
                "recall@10_interval": [recall - 0.02, recall + 0.02],
                "kept_token_fraction": 0.3,
                "difference_interval": [-0.01 * place - 0.03, -0.01 * place + 0.03],
                "difference": -0.01 * place,
                "seconds_per_1k_windows": 1.0 + place,
                "real_token_fraction": 0.9,
                "seconds_to_recall": 9.0,
            }
        groups = [
            {
                "label": label,
                "by": by,
                "group": "short",
                "recall@10": 0.4,
                "recall@10_interval": [0.3, 0.5],
            }
            for label in rows
            for by in ("history length", "target popularity")
        ]
        labels = list(rows)
        pairs = [
            {
                "label": labels[1],
                "against": "random",
                "difference": d,
                "difference_interval": [d - 0.1, d + 0.1],
            }
            for d in (0, 1)
        ]
        text = sentences[name](rows, {"groups": groups, "versus": pairs})
        assert ("better" in text) == (
            name not in ("efficiency", "strata", "inference", "layer-ratio", "fast")
        ), name
        assert "nan" not in text and len(text) > 40, name


@pytest.mark.parametrize(
    "ends, words",
    [
        ([-0.3, -0.1], "clearly less"),
        ([-0.3, 0.1], "no clear difference"),
        ([0.1, 0.3], "clearly more"),
    ],
)
def test_what_is_clear_follows_from_the_interval(ends, words):
    row = {"recall@10": 0.3, "recall@10_interval": [0.2, 0.4], "seconds_to_recall": 9.0}
    rows = {
        "as it is": row,
        "fp32": row | {"label": "fp32", "difference": 0.1, "difference_interval": ends},
    }
    assert f", {words}," in show.sentences()["fast"](rows, {})


# --- the evidence

spec = importlib.util.spec_from_file_location("evidence", ROOT / "results" / "evidence.py")
evidence = importlib.util.module_from_spec(spec)
sys.modules["evidence"] = evidence  # dataclasses look there
spec.loader.exec_module(evidence)


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A small comparison whose records go into a temporary folder."""
    monkeypatch.setattr(evidence, "RECORDS", tmp_path / "runs")
    monkeypatch.setattr(evidence, "HERE", tmp_path)
    monkeypatch.setattr(evidence, "FOLDER", tmp_path / "work")
    return evidence.comparison("small", "planted", "smoke", "unpadded random", 2)


def fake_run_all(asked, folder, executor):
    """Every run finds the item of two users out of three."""
    for name, spec in asked.items():
        asked_of.append(name)
        ranks = np.arange(len(load_catalogue("planted").histories)) % 3
        yield {
            "row": metrics_of(ranks) | dict.fromkeys(COSTS) | {"kept_informative": None},
            "curve": None,
            "ranks": ranks.tolist(),
            "device": "a CPU",
            "precision": "fp32",
            "busy": True,
            "beside": True,
            "spec": spec,
        }


asked_of = []


def test_a_run_of_the_evidence_is_done_once_after_the_one_it_starts_from(
    part, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evidence, "run_all", fake_run_all)
    monkeypatch.setattr(evidence, "parts", lambda data: [part])
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--minutes", "200", "--workers", "2"])
    asked_of.clear()
    evidence.main()
    assert part.missing == [] and part.whole_seeds() == 2
    for seed in (0, 1):
        base = asked_of.index(f"base-seed{seed}")
        after = [
            name for name in part.specs if name.endswith(str(seed)) and "base-seed" not in name
        ]
        assert len(after) == 3 and all(asked_of.index(name) > base for name in after)
    record = read_json(part.record("random-seed1"))
    assert (
        record["commit"] and record["minutes"] >= 0 and record["spec"] == part.specs["random-seed1"]
    )
    made = json.loads((tmp_path / "planted-smoke.json").read_text())
    (row,) = [row for row in made["summary"] if row["method"] == "random"]
    assert row["seeds"] == 2 and row["recall@10"] == pytest.approx(2 / 3, abs=0.001)
    # Again: nothing is run, and the same is written
    asked_of.clear()
    evidence.main()
    assert asked_of == [] and "8 of 8 runs, 2 of 2 seeds" in capsys.readouterr().out
    part.record("random-seed1").unlink()
    assert part.missing == ["random-seed1"] and part.whole_seeds() == 1


def test_nothing_begins_that_cannot_end_in_time(part, monkeypatch):
    monkeypatch.setattr(evidence, "run_all", fake_run_all)
    monkeypatch.setattr(evidence, "parts", lambda data: [part])
    asked_of.clear()
    for minutes, done in (("0", set()), ("59", set()), ("61", {"base-seed0", "base-seed1"})):
        monkeypatch.setattr(sys, "argv", ["evidence.py", "--minutes", minutes])
        evidence.main()
        assert set(asked_of) >= done and bool(asked_of) == bool(done)


def test_runs_that_parts_have_in_common_are_one(tmp_path):
    """Of the whole list: equal names of records mean equal runs."""
    folder = tmp_path / "amazon-beauty"
    folder.mkdir()
    (folder / "items.jsonl").write_text('{"item_id": 1}\n')
    (folder / "sequences.txt").write_text("u 1 1 1 1\n")
    shutil.copytree(folder, tmp_path / "amazon-sports")
    found = {}
    for part in evidence.parts(tmp_path):
        for name, spec in part.specs.items():
            assert found.setdefault(part.record(name).name, spec) == spec
            assert spec.get("start") is None or spec["start"] in part.specs
    continued = [part for part in evidence.parts(tmp_path) if "amazon-beauty" in part.title]
    assert any("base-seed0" in part.specs for part in continued)


def test_the_records_that_are_kept_are_of_runs_that_are_asked_for():
    paths = list((ROOT / "results" / "runs").glob("*.json.gz"))
    assert paths
    for path in paths:
        record = read_json(path, "spec", "ranks", "row", "commit")
        assert record["row"]["recall@10"] == pytest.approx(
            metrics_of(ranks_of([record])[0])["recall@10"]
        )
