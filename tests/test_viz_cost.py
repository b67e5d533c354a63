"""The explorers of cost against pruners that really prune, the library's own windows, arrays and
cost model; the calibration against a machine whose speed is planted.
"""

import dataclasses
import gzip
import json
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from conftest import SHARED, connect, frames_of, needs_shared

from sidlab.config import TrainConfig
from sidlab.pruning import PruningConfig, TokenPruner, reference_choice
from sidlab.research import calibration
from sidlab.research.calibration import (
    Speed,
    calibrate,
    one_batch,
    plain_config,
    random_table,
    time_steps,
)
from sidlab.research.cost import cost, recommend_flops
from sidlab.viz import CostCalculator, PaddingExplorer
from sidlab.viz.cost import PRESETS, expected_prefixes, table_bytes
from sidlab.viz.padding import (
    ON_BEAUTY,
    WIDTHS,
    five_core_lengths,
    padding_rows,
    windows_of_batches,
)
from sidlab.windows import Windows, leave_one_out

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(3, 60, 150)
STEPS = pd.DataFrame({"d_model": range(10)})
MACHINE = Speed(
    flop=2e-11,
    byte=3e-9,
    layer=4e-3,
    pruner=3e-3,
    error=0.1,
    device="a planted machine",
    steps=STEPS,
)
WAITING = Speed(
    flop=0.0,
    byte=0.0,
    layer=4e-3,
    pruner=3e-3,
    error=0.1,
    device="one that only waits",
    steps=STEPS,
)


def numbers(text):
    """{first cell: numbers in the others} of a text's table."""
    rows = (re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", text))
    return {row[0]: row[1:] for row in rows if row}


def test_lengths_have_the_asked_mean_and_five_items_at_least():
    for mean in (5.5, 8.9, 20, 40):
        lengths = five_core_lengths(mean)
        assert (
            lengths.mean() == pytest.approx(mean, rel=0.01)
            and lengths.min() == 5
            and lengths.max() <= 300
        )
        assert (np.diff(np.bincount(lengths)[5:12]) < 0).all(), "the longer, the rarer"
    for mean in (5, 152.5):
        with pytest.raises(ValueError, match=f"mean must lie above 5.*got {mean}"):
            five_core_lengths(mean)


@pytest.mark.parametrize("which, kind", [("prefixes", "prefixes"), ("published", "contiguous")])
def test_windows_are_counted_as_the_library_cuts_them(monkeypatch, which, kind):
    monkeypatch.setattr("sidlab.viz.padding.LIMIT", 10**9)
    split = leave_one_out([np.ones(n, np.int64) for n in LENGTHS])
    expected = np.bincount(Windows(split.train, 29, kind).lengths, minlength=30)[1:]
    found = windows_of_batches(LENGTHS, which)
    assert len(found) == 5 and found.sum(0).tolist() == expected.tolist()


def test_windows_of_the_test_and_of_a_limited_batch():
    split = leave_one_out([np.ones(n, np.int64) for n in LENGTHS])
    sizes = [min(len(h), 29) for h in split.cases("test")[0]]
    assert (
        windows_of_batches(LENGTHS, "test").sum(0).tolist()
        == np.bincount(sizes, minlength=30)[1:].tolist()
    )
    drawn = windows_of_batches(LENGTHS, "published")
    assert drawn.sum(1).max() == 512 and drawn.min() >= 0
    with pytest.raises(
        ValueError, match="which='all' is unknown; use one of 'published', 'prefixes', 'test'"
    ):
        windows_of_batches(LENGTHS, "all")
    with pytest.raises(ValueError, match="lengths leave no window"):
        windows_of_batches([3, 3], "prefixes")


@pytest.mark.parametrize("keep", [0.1, 1 / 3, 0.62, 1.0])
def test_slots_are_what_the_pruners_keep_and_flops_what_the_cost_model_says(keep):
    items = RNG.integers(1, 30, 64)  # the windows of two batches
    batches = np.array([np.bincount(part, minlength=30)[1:] for part in (items[:32], items[32:])])
    mask = (torch.arange(150) < 5 * torch.from_numpy(items)[:, None]).long()
    importance = torch.rand(mask.shape).masked_fill(mask == 0, -torch.inf)
    published = reference_choice(torch.zeros(64, 150, 1), mask, importance, keep)
    survivors = mask.gather(1, published.positions).sum().item() / 64
    own = TokenPruner(keep).choose(mask, importance).sum().item() / 64
    real = mask.sum().item() / 64
    longest = np.array([part.max() for part in (items[:32], items[32:])])
    rows = padding_rows(batches, keep)
    assert [row["real_kept"] for row in rows] == pytest.approx(
        [real, survivors, real, np.minimum(5 * items, 50).mean(), real, own]
    )
    total = [row["real_kept"] + row["padding_kept"] for row in rows]
    assert total == pytest.approx(
        [150, published.hidden.shape[1], 5 * longest.mean(), 50, real, own]
    )
    assert all(row["real_kept"] + row["real_lost"] == pytest.approx(real) for row in rows)
    assert (
        rows[1]["padding_dropped"] == pytest.approx(150 - real - rows[1]["padding_kept"])
        and rows[0]["padding_dropped"] == 0
    )

    def flops(lengths, **changes):
        config = TrainConfig.preset("paper", windows="prefixes", **changes)
        return np.mean([cost(config, WIDTHS, [n]).training for n in lengths])

    full = flops([1], padding="fixed")
    reference = PruningConfig(keep=keep, mode="reference")
    expected = [
        full,
        flops([1], padding="fixed", pruning=reference),
        flops(longest),
        flops([10]),
        flops(items),
        flops(items, pruning=PruningConfig(keep=keep)),
    ]
    assert [row["flops"] for row in rows] == pytest.approx([f / full for f in expected])


@needs_shared
def test_beauty_is_what_its_reference_numbers_say():
    with gzip.open(SHARED / "amazon-beauty" / "sequences.txt.gz", "rt") as lines:
        lengths = [len(line.split()) - 1 for line in lines]
    rows = padding_rows(windows_of_batches(lengths), 1 / 3)
    for row, known in zip(rows, ON_BEAUTY):
        assert known is None or row["flops"] == pytest.approx(known, abs=0.05), row["name"]
    assert 0.70 < rows[0]["padding_kept"] / 150 < 0.79
    test = padding_rows(windows_of_batches(lengths, "test"), 1 / 3)[1]
    assert test["real_kept"] / (test["real_kept"] + test["real_lost"]) == pytest.approx(
        0.84, abs=0.01
    )
    like_it = padding_rows(windows_of_batches(five_core_lengths(np.mean(lengths))), 1 / 3)
    assert [row["flops"] for row in like_it] == pytest.approx(
        [row["flops"] for row in rows], abs=0.05
    )


def test_padding_explorer_shows_its_rows():
    explorer = PaddingExplorer({"mine": LENGTHS}, source="mine", which="test", keep=0.5)
    rows = padding_rows(windows_of_batches(LENGTHS, "test"), 0.5)
    *fates, flops, known = explorer.figure.data
    for trace, key in zip(fates, ("real_kept", "real_lost", "padding_kept", "padding_dropped")):
        assert list(trace.x) == pytest.approx([row[key] for row in rows])
    assert list(flops.x) == pytest.approx([row["flops"] for row in rows])
    assert list(known.x) == [x for x in ON_BEAUTY if x] and known.marker.symbol == "diamond-open"
    cells = numbers(explorer.text)
    assert [float(cells[row["name"].replace("'", "&#x27;")][5]) for row in rows] == [
        round(row["flops"], 2) for row in rows
    ]
    lost = np.mean(np.minimum(LENGTHS - 1, 29) > 15)  # 75 slots are 15 items
    assert f"{lost:.0%} of the histories lose a real token" in explorer.text
    assert "approximation" not in explorer.text and "approximation" in PaddingExplorer().text
    looks = {(trace.marker.pattern.shape, trace.marker.color) for trace in fates}
    assert len(looks) == 4 and [trace.marker.pattern.shape for trace in fates] == [
        None,
        "x",
        None,
        "/",
    ]


def test_a_planted_speed_is_found(monkeypatch):
    planted = (3e-11, 2e-9, 5e-3, 4e-3)
    rng = np.random.default_rng(1)

    def fake(config, table, batch):
        size, slots = batch["input_ids"].shape
        assert slots == config.max_items * 4
        found = cost(
            dataclasses.replace(config, batch_tokens=10**9, accumulation=1),
            table.widths,
            np.full(size, config.max_items),
        )
        terms = (
            found.training * size,
            found.activation_bytes,
            config.num_layers + config.num_decoder_layers,
            config.pruning is not None,
        )
        return lambda: float(np.dot(planted, terms)) * rng.lognormal(0, 0.02)

    monkeypatch.setattr(calibration, "stepper", fake)
    found = calibrate(rounds=400)
    assert (found.flop, found.byte, found.layer, found.pruner) == pytest.approx(planted, rel=0.02)
    assert found.error < 0.01 and len(found.steps) == 2 * len(calibration.SIZES)
    config = plain_config(128, 4, 20, PruningConfig(keep=0.5))
    batch = one_batch(config, (64, 64, 64), 2000)
    assert batch.windows == 25 and batch.batches == 1
    exact = np.dot(planted, (batch.training * 25, batch.activation_bytes, 8, 1))
    assert found.seconds(config, batch) == pytest.approx(exact, rel=0.01)
    assert sum(found.parts(config, batch).values()) == found.seconds(config, batch)


def test_a_timed_step_trains_and_all_steps_take_turns(monkeypatch):
    models = []
    build = calibration.build_model
    monkeypatch.setattr(
        calibration, "build_model", lambda *args: models.append(build(*args)) or models[-1]
    )
    _, _, step = calibration.timed_size(32, 1, 3, 24)
    before = {name: p.clone() for name, p in models[0].named_parameters()}
    assert step() > 0
    assert all(
        not torch.equal(before[name], p)
        for name, p in models[0].named_parameters()
        if "relative_attention_bias" not in name
    )
    assert all(p.grad is None for p in models[0].parameters())
    turns = []
    seconds = iter(range(100))
    made = time_steps(
        {name: lambda name=name: turns.append(name) or next(seconds) for name in "ab"}, 2
    )
    assert turns == list("ababab") and made["a"].tolist() == [2, 4] and made["b"].tolist() == [3, 5]


@pytest.mark.parametrize(
    "n, width, levels", [(500, 4, 6), (4000, 8, 3), (20_000, 64, 2), (1000, 256, 4)]
)
def test_tables_take_as_much_memory_as_predicted(n, width, levels):
    table = random_table(n, levels, width)
    trie = table.trie
    arrays = [
        *trie.first_child,
        *trie.child_code,
        *trie._keys,
        trie.first_item,
        trie.item,
        table.item_tokens,
    ]
    assert trie.nbytes + table.item_tokens.nbytes == sum(a.numpy().nbytes for a in arrays)
    real = trie.nbytes + table.item_tokens.nbytes + table.codes.nbytes
    assert table_bytes(n, (width,) * levels) == pytest.approx(real, rel=0.02)
    assert expected_prefixes(n, (width,) * levels) == pytest.approx(trie.n_nodes[1:], rel=0.03)


def test_calculator_shows_what_speed_and_cost_model_predict():
    values = {
        "items": 25,
        "levels": 4,
        "width": 64,
        "d_model": 64,
        "layers": 3,
        "keep": 0.4,
        "after": 1,
        "slots": 1024,
        "windows": 1000,
    }
    explorer = CostCalculator(MACHINE, **values, epochs=3, tflops=2.0)
    full = plain_config(64, 3, 25)
    config = plain_config(64, 3, 25, PruningConfig(after_layer=1, keep=0.4))
    # 8 × 125 slots
    plain, pruned = (
        cost(dataclasses.replace(c, batch_tokens=10**6, accumulation=1), (64,) * 4, [25] * 8)
        for c in (full, config)
    )
    before, after = (
        2e-11 * c.training * 8 + 3e-9 * c.activation_bytes + 6 * 4e-3 + extra
        for c, extra in ((plain, 0), (pruned, 3e-3))
    )
    *parts, seconds, flops, activations, ring = explorer.figure.data
    assert np.sum([part.x for part in parts], axis=0) == pytest.approx(
        [before / 8 * 1000, after / 8 * 1000]
    )
    at = list(seconds.x).index(25)
    assert seconds.y[at] == pytest.approx(after / before) and (ring.x[0], ring.y[0]) == (
        25,
        seconds.y[at],
    )
    assert flops.y[at] == pytest.approx(pruned.training / plain.training)
    assert activations.y[at] == pytest.approx(pruned.activation_bytes / plain.activation_bytes)
    cells = numbers(explorer.text)
    assert cells["milliseconds a training step, here"][:2] == [
        f"{1000 * s:,.1f}" for s in (before, after)
    ]
    assert cells["GPU-hours at 2 TFLOP/s"][:2] == [
        f"{c.training * 3000 / 2e12 / 3600:,.3g}" for c in (plain, pruned)
    ]
    assert cells["time here, 375 updates"][0] == f"{375 * before:,.1f} s"
    assert cells["MB of parameters, gradients, AdamW"][0] == f"{plain.state_bytes / 2**20:,.0f}"
    assert (
        cells["MFLOPs to recommend to one user"][1]
        == f"{recommend_flops(config, (64,) * 4, [25]) / 1e6:,.0f}"
    )
    assert (
        f"Pruning saves {1 - after / before:.0%} of the time" in explorer.text
        and "a planted machine" in explorer.text
    )


def test_where_a_step_only_waits_pruning_does_not_pay():
    explorer = CostCalculator(WAITING, layers=4)
    # 3 of 8 × 4 ms
    assert (
        "Pruning costs 9% of the time" in explorer.text
        and "It pays at no length shown" in explorer.text
    )
    assert all(y == pytest.approx(35 / 32) for y in explorer.figure.data[4].y)
    assert (
        "It pays at every length shown"
        in CostCalculator(dataclasses.replace(MACHINE, pruner=0.0)).text
    )


def test_pruning_behind_more_layers_than_there_are_is_behind_the_last():
    explorer = CostCalculator(MACHINE, layers=2, after=7)
    assert "after layer 2 of 2" in explorer.text
    explorer.controls["layers"].value = 12
    assert "after layer 7 of 12" in explorer.text


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_all_controls_and_loses_its_name_with_the_next_move(name):
    explorer = CostCalculator(MACHINE, items=3, tflops=7.0)
    assert explorer.value("preset") == ""
    drawn = []
    draw = explorer.draw
    explorer.draw = lambda: drawn.append(1) or draw()
    explorer.controls["preset"].value = name
    assert len(drawn) == 1 and {
        control: explorer.value(control) for control in PRESETS[name]
    } == pytest.approx(PRESETS[name])
    assert (
        PRESETS[name].keys() == explorer.controls.keys() - {"preset", "tflops"}
        and explorer.value("tflops") == 7
    )
    fresh = CostCalculator(MACHINE, **PRESETS[name], tflops=7.0)
    assert fresh.text == explorer.text and fresh.value("preset") == name
    explorer.controls["epochs"].value += 1
    assert explorer.value("preset") == "" and len(drawn) == 2
    explorer.controls["epochs"].value -= 1
    assert explorer.value("preset") == name


def test_all_controls_are_on_the_page_and_most_of_them_folded():
    explorer = CostCalculator(MACHINE)
    shown, folded, *_ = explorer.children
    assert {*shown.children, *folded.children} == {*explorer.controls.values(), explorer.more}
    assert folded.layout.display == "none" and len(shown.children) < 7
    explorer.more.value = True
    assert folded.layout.display == "flex"


MADE = {
    "calculator": (
        lambda **values: CostCalculator(MACHINE, **values),
        {
            "preset": "wide and deep",
            "items": 33,
            "levels": 5,
            "width": 16,
            "d_model": 256,
            "layers": 6,
            "keep": 0.7,
            "after": 3,
            "slots": 8192,
            "windows": 1e6,
            "epochs": 4,
            "catalogue": 1e6,
            "tflops": 55.0,
        },
    ),
    "padding": (
        lambda **values: PaddingExplorer({"mine": LENGTHS}, **values),
        {"mean": 14.0, "keep": 0.6, "which": "prefixes", "source": "mine"},
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_following_equals_a_fresh_explorer_and_sends_little(name):
    make, values = MADE[name]
    explorer = make()
    assert values.keys() == explorer.controls.keys()
    sent = connect(explorer)
    for control, value in values.items():
        sent.clear()
        explorer.controls[control].value = value
        # A slow one also says that it works, and that it is done.
        # A preset moves all controls.
        most = {"source": 6, "which": 6, "preset": 4 + len(values)}.get(control, 4)
        assert 1 <= len(sent) <= most and sum(sent) < 200_000, control
    fresh = make(**{control: value for control, value in values.items() if control != "preset"})
    assert json.loads(go.Figure(explorer.figure).to_json()) == json.loads(
        go.Figure(fresh.figure).to_json()
    )
    assert explorer.text == fresh.text


@pytest.mark.parametrize("name", MADE)
def test_export_holds_a_frame_per_value_and_the_dark_theme_is_dark(name, tmp_path, dark):
    make, _ = MADE[name]
    explorer = make()
    assert explorer.figure.layout.template.layout.paper_bgcolor == "#14171A"
    page = explorer.export(tmp_path / "page.html").read_text(encoding="utf-8")
    frames = frames_of(page)
    assert len({frame["state"]["text"] for frame in frames}) == len(frames) > 20
    explorer.set(
        **{
            explorer.exported: (
                float(frames[7]["value"]) if name == "padding" else int(frames[7]["value"])
            )
        }
    )
    assert frames[7]["state"]["text"] == explorer.text
