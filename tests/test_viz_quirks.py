"""Each quirk of the published code shows what it does, and the corrected code does not do it, on
the bundled model.
"""

import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from conftest import ROOT, connect, frames_of

from sidlab.config import TrainConfig
from sidlab.course.demo import load
from sidlab.model_building import build_model
from sidlab.pruning import PruningConfig, kept_count
from sidlab.sids.table import SidTable
from sidlab.viz import QuirkExplorer
from sidlab.viz.quirk_evidence import EMPTY, FILLED, KEPT, LENGTHS, PRUNED, QUIRKS, Subject
from sidlab.viz.quirks import quirk_figure

TOKENS = 4 * np.array(LENGTHS)  # three codes and a separator an item
SLOTS = 40
THIRD = 13  # of 40 slots, rounded down


@pytest.fixture(scope="module")
def demo():
    return load()


@pytest.fixture(scope="module")
def subject(demo):
    return Subject(demo.model, demo.catalogue)


@pytest.fixture(scope="module")
def evidence(subject):
    return {
        number: {mode: quirk[1](subject, mode) for mode in ("reference", "corrected")}
        for number, quirk in enumerate(QUIRKS, start=1)
    }


def counts(z, fate):
    return (z == fate).sum(1).tolist()


def test_the_subject_is_one_history_cut_and_padded(demo, subject):
    longest = max(demo.catalogue.histories, key=len)
    for row, n in zip(subject.right, LENGTHS):
        codes = row[: 4 * n].view(n, 4)
        assert (
            torch.equal(codes[:, :3], demo.table.item_tokens[longest[:-1][-n:]])
            and (codes[:, 3] == 2).all()
            and not row[4 * n :].any()
        )
    assert all(
        torch.equal(left[-n:], right[:n]) and not left[:-n].any()
        for left, right, n in zip(subject.left, subject.right, TOKENS)
    )
    # The copies are the model itself.
    model = demo.model
    model.set_pruning(PruningConfig())
    inputs = {
        "input_ids": subject.right,
        "attention_mask": subject.real.long(),
        "labels": subject.labels,
    }
    with torch.no_grad():
        expected = (
            model(**inputs).logits.log_softmax(-1).gather(-1, subject.labels[..., None]).sum((1, 2))
        )
    torch.testing.assert_close(subject.log_p("corrected"), expected, rtol=1e-5, atol=1e-5)
    model.set_pruning(None)


def test_1_kept_shares(evidence):
    reference, corrected = (evidence[1][mode] for mode in ("reference", "corrected"))
    assert counts(reference.z, KEPT) == np.minimum(TOKENS, THIRD).tolist()
    assert counts(reference.z, FILLED) == (THIRD - np.minimum(TOKENS, THIRD)).tolist()
    assert (
        counts(corrected.z, KEPT) == kept_count(torch.from_numpy(TOKENS), 1 / 3).tolist()
        and not (corrected.z == FILLED).any()
    )
    for e in (reference, corrected):
        assert counts(e.z, EMPTY) == (SLOTS - TOKENS - np.array(counts(e.z, FILLED))).tolist()
        assert list(e.bars.values()) == pytest.approx(np.array(counts(e.z, KEPT)) / TOKENS)


def test_2_without_position_bias_the_order_of_the_kept_tokens_does_not_matter(evidence):
    reference, corrected = (evidence[2][mode] for mode in ("reference", "corrected"))
    assert not reference.z.any() and np.abs(corrected.z).max() > 1
    assert max(reference.bars.values()) < 1e-4 and min(corrected.bars.values()) > 1e-3


def test_3_only_the_reference_looks_at_the_wrong_slots(evidence):
    reference, corrected = (evidence[3][mode] for mode in ("reference", "corrected"))
    changes = list(reference.bars.values())
    assert changes[0] < 1e-4 and min(changes[1:]) > 5e-3 and max(corrected.bars.values()) < 1e-4
    # The mask of the first slots, padding on the left
    seen = (SLOTS - TOKENS) < np.arange(1, THIRD + 1)[:, None]
    assert (np.isin(reference.z, (KEPT, FILLED)) == seen.T).all() and (reference.z == PRUNED).any()
    assert counts(corrected.z, KEPT) == kept_count(torch.from_numpy(TOKENS), 1 / 3).tolist()
    assert not np.isin(corrected.z, (PRUNED, FILLED)).any()


def test_4_votes_of_padding_are_its_share_of_the_slots(evidence):
    reference, corrected = (evidence[4][mode] for mode in ("reference", "corrected"))
    assert list(reference.bars.values()) == pytest.approx(1 - TOKENS / SLOTS, abs=1e-5)
    assert list(corrected.bars.values()) == pytest.approx([0] * 4, abs=1e-5)
    # Four heads, each gives away 1
    assert reference.z.shape == (SLOTS, TOKENS[2]) and reference.z.sum(1) == pytest.approx(
        [4] * SLOTS
    )
    assert np.isnan(corrected.z[TOKENS[2] :]).all()
    np.testing.assert_allclose(corrected.z[: TOKENS[2]], reference.z[: TOKENS[2]], atol=1e-5)


def test_5_draws_disagree_more_where_scores_feel_the_dropout(evidence, subject):
    reference, corrected = (evidence[5][mode] for mode in ("reference", "corrected"))
    for e, mode in ((reference, "reference"), (corrected, "corrected")):
        draws = e.z[1:] == KEPT
        assert (e.z[0] == KEPT).tolist() == subject.encode(mode)[1][0].tolist()
        pairs = [
            (a & b).sum() / a.sum()
            for i, a in enumerate(draws)
            for j, b in enumerate(draws)
            if i != j
        ]
        assert (
            e.bars["attention"] == pytest.approx(np.mean(pairs))
            and e.bars["everywhere"] < e.bars["attention"]
        )
    assert reference.bars["attention"] < corrected.bars["attention"] - 0.03
    assert not subject.models["reference"].training


def test_6_items_are_cut_apart_unless_they_are_scored_whole(evidence):
    reference, corrected = (evidence[6][mode] for mode in ("reference", "corrected"))
    for e in (reference, corrected):
        per_item = (e.z == KEPT).sum(0)
        assert list(e.bars.values()) == [
            (per_item == 4).sum(),
            ((per_item > 0) & (per_item < 4)).sum(),
            (per_item == 0).sum(),
        ]
    assert reference.bars["cut apart"] > 0 and corrected.bars == {
        "kept whole": 4,
        "cut apart": 0,
        "dropped": 6,
    }


def test_7_only_the_scoring_layer_of_the_corrected_code_is_not_fused(evidence):
    reference, corrected = (evidence[7][mode] for mode in ("reference", "corrected"))
    # 2 × own tokens, 2 × history
    assert reference.bars == {"encoder": 4, "decoder": 4} and not (reference.z == KEPT).any()
    assert [name for name, row in zip(corrected.rows, corrected.z) if row[0] != KEPT] == [
        "encoder, layer 2"
    ]


def test_every_quirk_of_the_table_is_there_and_both_codes_are_in_the_text(demo):
    assert len(QUIRKS) == 7
    explorer = QuirkExplorer(demo.model, demo.catalogue)
    for number in range(1, 8):
        explorer.set(quirk=number)
        shown = explorer.evidence(number)
        for name in shown["reference"].bars:
            values = [
                f"{shown[mode].bars[name]:.3f}".rstrip("0").rstrip(".")
                for mode in ("reference", "corrected")
            ]
            assert re.search(
                f"<td>{name}</td><td>{values[0]}</td><td>{values[1]}</td>", explorer.text
            )


def test_following_equals_a_fresh_explorer_and_switching_the_mode_sends_little(demo):
    explorer = QuirkExplorer(demo.model, demo.catalogue)
    explorer.controls["quirk"].value = 4
    sent = connect(explorer)
    explorer.controls["mode"].value = "corrected"
    assert 1 <= len(sent) <= 4 and sum(sent) < 200_000
    explorer.controls["quirk"].value = 6
    fresh = QuirkExplorer(demo.model, demo.catalogue, quirk=6, mode="corrected")
    assert json.loads(go.Figure(explorer.figure).to_json()) == json.loads(
        go.Figure(fresh.figure).to_json()
    )
    assert explorer.text == fresh.text


def test_figure_tells_fates_and_modes_apart_without_colour(evidence):
    picture, *bars = quirk_figure(evidence[1], "reference").data
    assert {symbol for row in picture.text for symbol in row} == {"●", "×", "○", "·"}
    assert [bar.marker.pattern.shape for bar in bars] == ["/", ""] and bars[
        0
    ].marker.line.width > bars[1].marker.line.width
    numbers, *_ = quirk_figure(evidence[2], "reference").data
    bias = evidence[2]["corrected"].z
    assert (numbers.zmin, numbers.zmax) == pytest.approx((bias.min(), bias.max())), (
        "one scale for both modes"
    )


def test_export_has_a_frame_per_quirk(demo, tmp_path):
    page = (
        QuirkExplorer(demo.model, demo.catalogue)
        .export(tmp_path / "quirks.html")
        .read_text(encoding="utf-8")
    )
    frames = frames_of(page)
    assert [frame["value"] for frame in frames] == [name for name, *_ in QUIRKS]


def test_what_is_too_small_is_refused(demo):
    table = SidTable(np.array([[0, 1], [1, 0]]), 2)
    with pytest.raises(ValueError, match="more than 2 encoder layers"):
        QuirkExplorer(build_model(TrainConfig.preset("smoke", num_layers=2), table), demo.catalogue)
    with pytest.raises(ValueError, match="give model and catalogue, or neither"):
        QuirkExplorer(demo.model)


def test_the_notebook_has_the_seven_rows_in_this_order():
    source = (ROOT / "notebooks" / "source" / "07_padding_is_not_pruning.py").read_text(
        encoding="utf-8"
    )
    rows = re.findall(r"^# \| (\d) \|", source, re.MULTILINE)
    assert rows == [name[0] for name, *_ in QUIRKS]
