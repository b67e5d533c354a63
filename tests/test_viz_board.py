"""The board of one's own runs: it keeps, replaces, sorts, and draws what was written down."""

import re

import pytest

from sidlab.course.board import Board


def test_entries_are_kept_replaced_and_sorted(tmp_path):
    board = Board(tmp_path / "deep" / "board.json")
    assert board.rows == [] and len(board.frame()) == 0 and "No entry" in board._repr_html_()
    board.add("weak", "a", {"recall@10": 0.2})
    board.add("mine", "a", {"recall@10": 0.3, "low": 0.25, "high": 0.33})
    board.add("mine", "b", {"recall@10": 0.9})
    board.add("mine", "a", {"recall@10": 0.1, "low": 0.05, "high": 0.2, "note": "<b>"})
    again = Board(tmp_path / "deep" / "board.json")  # another kernel
    assert again.frame("a")[["name", "recall@10"]].values.tolist() == [["weak", 0.2], ["mine", 0.1]]
    assert again.frame()["contest"].tolist() == ["a", "a", "b"]
    assert "&lt;b&gt;" in again._repr_html_()
    with pytest.raises(ValueError, match="must hold 'recall@10', got \\['ndcg'\\]"):
        board.add("mine", "a", {"ndcg": 1})


def test_figure_shows_entries_with_intervals_and_anchors_as_lines(tmp_path):
    board = Board(tmp_path / "board.json")
    board.add("mine", "a", {"recall@10": 0.3, "low": 0.25, "high": 0.33})
    board.add("other", "b", {"recall@10": 0.9})
    board.add("rastp", "a", {"recall@10": 0.4})
    board.add("Bayes optimum", "a", {"recall@10": 0.6, "anchor": True})
    figure = board.figure("a")
    (entries,) = figure.data
    assert list(entries.y) == ["rastp", "mine"] and list(entries.x) == [0.4, 0.3]
    assert entries.error_x.array[1] == pytest.approx(0.03) and entries.error_x.arrayminus[
        1
    ] == pytest.approx(0.05)
    assert entries.error_x.array[0] == entries.error_x.arrayminus[0] == 0
    assert [line.x0 for line in figure.layout.shapes] == [
        0.6
    ] and "Bayes optimum 0.600" in figure.layout.annotations[0].text
    board.add("mine @ home", "a", {"recall@10": 0.2})  # no kept share, as in rastp@1/2
    assert list(board.figure("a").data[0].y) == ["rastp", "mine", "mine @ home"]


def test_the_table_leaves_empty_what_is_missing_and_names_bounds(tmp_path):
    board = Board(tmp_path / "board.json")
    board.add("mine", "a", {"recall@10": 0.3, "low": 0.25, "high": 0.33})
    board.add("Bayes optimum", "a", {"recall@10": 0.6, "anchor": True})
    board.add("other", "b", {"recall@10": 0.9, "anchor": False})
    for said in (board._repr_html_(), board.table("a").data):
        assert "NaN" not in said and "True" not in said and "anchor" not in said
    rows = [
        re.findall("<td>(.*?)</td>", row)
        for row in re.findall("<tr>(.*?)</tr>", board.table("a").data, re.DOTALL)
    ]
    assert rows == [
        ["Bayes optimum", "bound", "0.600", "", ""],
        ["mine", "", "0.300", "0.250", "0.330"],
    ]
    assert "bound" not in board.table("b").data


def test_long_names_are_cut_on_the_axis(tmp_path):
    board = Board(tmp_path / "board.json")
    for letter in "ab":
        board.add("x" * 400 + letter, "a", {"recall@10": 0.3})
    axis = board.figure("a").layout.yaxis
    assert len(set(axis.tickvals)) == 2 and max(map(len, axis.ticktext)) <= 40
