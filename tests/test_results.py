"""The README's results are those of results/*.json."""

import importlib.util
import json

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("show", ROOT / "results" / "show.py")
show = importlib.util.module_from_spec(spec)
spec.loader.exec_module(show)


def test_readme_shows_the_results_that_are_kept():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert show.updated(text) == text, "run: python results/show.py"
    for path in (ROOT / "results").glob("amazon-*.json"):
        for row in json.loads(path.read_text())["summary"]:
            assert f"| {row['method']} | {row['recall@5']:.4f} | {row['recall@10']:.4f}" in text


def test_results_hold_what_a_reader_needs_to_repeat_them():
    for path in (ROOT / "results").glob("*.json"):
        results = json.loads(path.read_text())
        assert results["command"] and results["hardware"]["processor"] and results["versions"]["torch"], path


def test_a_readme_without_the_section_is_refused():
    with pytest.raises(ValueError, match="has no line"):
        show.updated("# Title\n")
