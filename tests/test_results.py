"""What README.md and results/README.md show is what results/*.json hold."""

import importlib.util
import json

import pytest
from conftest import ROOT

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
