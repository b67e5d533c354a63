"""The benchmark's arithmetic, its samples and its pages. Nothing here asserts a time."""

import dataclasses
import gzip
import json
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import SHARED, needs_shared
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sidlab.batches import StratifiedBatches
from sidlab.decoding import recommend
from sidlab.fast import cpu_layers
from sidlab.model_building import build_model
from sidlab.research import bench, timing, waterfall
from sidlab.research.calibration import random_table
from sidlab.research.cost import cost
from sidlab.sids.residual_kmeans import SUBSET, ResidualKMeans
from sidlab.windows import Windows, leave_one_out

TINY = dict(d_model=16, d_kv=4, num_heads=2, d_ff=16, num_layers=3, num_decoder_layers=1)


def tiny(variant):
    return dataclasses.replace(variant, config=dataclasses.replace(variant.config, **TINY))


@needs_shared
def test_the_lengths_are_beautys():
    with gzip.open(SHARED / "amazon-beauty" / "sequences.txt.gz", "rt") as lines:
        train = leave_one_out([np.array(line.split()[1:], np.int64) for line in lines]).train
    assert np.bincount(Windows(train, 30).lengths, minlength=31)[1:].tolist() == list(timing.BEAUTY)


@pytest.mark.parametrize("batch_tokens", [512, 4096])
def test_an_update_stands_for_the_epoch(batch_tokens):
    config = dataclasses.replace(timing.OURS, batch_tokens=batch_tokens, accumulation=16)
    lengths = np.repeat(np.arange(1, 31), timing.BEAUTY).clip(max=29)
    sampler = StratifiedBatches(lengths, 5, batch_tokens, accumulation=16)
    real = 0
    slots = 0
    for batch in sampler:
        real = real + lengths[batch].sum()
        slots = slots + len(batch) * lengths[batch].max()
    parts, batches, share = timing.beauty_batches(config, 16)
    assert (
        (batches, len(parts)) == (len(sampler), 16)
        and share == pytest.approx(real / slots, abs=0.01)
        and share > 0.95
    )

    # What it costs, times updates of the epoch, is what the epoch costs.
    def flops(items):
        return cost(
            dataclasses.replace(config, batch_tokens=10**9, accumulation=1), timing.WIDTHS, items
        )

    sampled = sum(flops(part).training * len(part) for part in parts) * batches / 16
    whole = cost(config, timing.WIDTHS, lengths)
    assert sampled == pytest.approx(whole.training * whole.windows, rel=0.02)


def test_every_variant_trains_the_same_model_on_the_same_windows():
    sizes = set()
    lengths = [np.array([3, 4]), np.array([29])]
    for name, variant in (
        bench.WATERFALL | {bench.STOCK: timing.Variant(timing.PUBLISHED, stock=True)}
    ).items():
        training = timing.Training(tiny(variant), lengths)
        config = training.config
        sizes.add(
            (sum(p.numel() for p in training.model.parameters()), config.dropout, training.windows)
        )
        slots = [batch["input_ids"].shape[1] for batch in training.batches]
        assert slots == ([150, 150] if config.padding == "fixed" else [20, 145]), name
        dropouts = {type(m) for m in training.model.modules() if isinstance(m, nn.Dropout)}
        assert dropouts == (
            {nn.Dropout} if variant.config.stock_kernels else {cpu_layers.Dropout}
        ), name
        attention = {
            m.config._attn_implementation
            for m in training.model.modules()
            if hasattr(m, "relative_attention_num_buckets")
        }
        assert attention <= {
            "eager" if variant.config.stock_kernels else "sidlab",
            "sidlab_scored",
        }, name
        before = [p.detach().clone() for p in training.model.parameters()]
        assert training.passes() >= 0 and training.step() >= 0
        assert any(not torch.equal(a, b) for a, b in zip(before, training.model.parameters()))
    assert len(sizes) == 1


def test_a_pass_that_teaches_every_item_has_as_many_targets():
    lengths = [np.array([3, 4]), np.array([29])]
    every = timing.Training(tiny(bench.DENSE["every item a target"]), lengths)
    one = timing.Training(tiny(bench.DENSE["one target a window"]), lengths)
    assert (every.windows, one.windows) == (3 + 4 + 29, 3)
    assert every.passes() >= 0
    assert all(p.grad is not None for p in every.model.parameters())


def test_stock_and_reference_variant_are_the_same_encoder():
    variants = (timing.Variant(timing.PUBLISHED, stock=stock) for stock in (False, True))
    ours, stock = (timing.Training(tiny(variant), [np.array([5, 29])]) for variant in variants)
    stock.model.load_state_dict(
        {k: v for k, v in ours.model.state_dict().items() if k != "encoder.token_level"}
    )
    batch = ours.batches[0]
    one = ours.model.eval()(**batch).encoder_last_hidden_state
    other = stock.model.eval()(**batch).encoder_last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(one[real], other[real], rtol=1e-5, atol=1e-5)


def test_times_of_a_round_come_for_every_variant():
    variants = {name: tiny(variant) for name, variant in bench.WATERFALL.items()}
    times = timing.time_beauty(variants, 300, 2, 2)
    assert list(times) == list(variants) and all(
        t.shape == (2,) and (t > 0).all() for t in times.values()
    )
    assert {t.shape for t in timing.time_histories(variants, 2, 1).values()} == {(1,)}


def test_variants_take_turns_and_the_first_round_does_not_count():
    calls = []
    found = timing.take_turns(
        {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}, 3
    )
    assert "".join(calls) == "abcbcacababc"
    assert {name: values.tolist() for name, values in found.items()} == {
        "a": [6, 8, 10],
        "b": [4, 9, 11],
        "c": [5, 7, 12],
    }


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), st.floats(0.1, 10))
def test_ratio_and_its_interval(over, factor):
    over = np.array(over)
    value, (low, high) = timing.ratio(over, over * factor)
    assert value == pytest.approx(1 / factor) and low == pytest.approx(1 / factor) == pytest.approx(
        high
    )
    value, (low, high) = timing.ratio(over, np.full(len(over), factor), lambda r: 1 - r)
    assert value == pytest.approx(1 - np.median(over) / factor)
    assert 1 - over.max() / factor - 1e-9 <= low <= value <= high <= 1 - over.min() / factor + 1e-9


def test_report_says_what_is_met_short_and_skipped():
    report = bench.Report()
    report.target("a", 3.0, (2.0, 4.0), at_least=3)
    report.target("b", 2.9, None, at_least=3)
    report.target("c", 1.1, None, at_most=1.05)
    report.skip("d", "≥ 6", "no CUDA device here")
    assert [t["verdict"] for t in report.targets] == [
        "met",
        "short",
        "short",
        "skipped: no CUDA device here",
    ]
    assert all(
        list(t) == ["figure", "target", "value", "spread", "verdict"] for t in report.targets
    )
    lines = report.lines()
    assert "2 – 4" in lines[1] and lines[4].endswith("skipped: no CUDA device here")
    json.dumps(report.targets)


def test_memory_of_a_child_is_what_it_uses():
    assert timing.in_child(timing.peak_mb, _touch) == pytest.approx(200, rel=0.1)


def _touch():
    np.ones(200 * 2**17)  # 200 MB, and gone again
    np.ones(100 * 2**17)


def test_the_dict_trie_is_the_trie_and_the_library_finds_the_same_items():
    table = random_table(60, 3, 5)
    trie = table.trie
    root = timing.dict_trie(table)
    for a in range(5):
        node, found = trie.find(torch.tensor([a]))
        below = root.get(table.offsets[0] + a)
        assert (below is not None) == bool(found)
        if below is not None:
            assert (
                sorted(below)
                == (trie.allowed(1, node).nonzero().flatten() + table.offsets[1]).tolist()
            )
    model = build_model(dataclasses.replace(timing.OURS, **TINY), table).eval()
    histories = [np.array([1, 2, 3]), np.array([9])]
    beams = timing.library_search(model, table, histories, 4)()  # [2 · 4, 1 + L]
    items, _ = recommend(model, histories, k=1, beam=4)
    assert beams.view(2, 4, -1)[:, 0, 1:].tolist() == table.item_tokens[items[:, 0]].tolist()


def test_kmeans_learns_from_a_memory_map_within_little_memory(tmp_path):
    x = np.random.default_rng(0).standard_normal((200_000, 64), np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert len(x) > SUBSET * 8
    tracemalloc.start()
    codes = ResidualKMeans(levels=2, width=8).fit(mapped).encode(mapped)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * x.nbytes  # and the map itself: 2.2 of the input
    assert np.array_equal(codes, ResidualKMeans(levels=2, width=8).fit(x).encode(x))


def test_gpu_rows_ask_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="need a CUDA device.*make setup TORCH_INDEX"):
        bench.main(["--gpu"])


def test_the_page_shows_every_step(tmp_path, monkeypatch):
    report = bench.Report()
    variants = bench.WATERFALL
    times = {name: np.array([10.0 - n, 11.0 - n]) for n, name in enumerate(variants)}
    predicted = {
        name: cost(v.config, timing.WIDTHS, np.arange(1, 31)) for name, v in variants.items()
    }
    report.times("Beauty lengths", variants, times, predicted, "cpu")
    report.target("a figure", 3.0, (2.0, 4.0), at_least=3)
    report.skip("another", "≥ 6", "no CUDA device here")
    monkeypatch.setattr(bench, "run", lambda quick, device: report)
    paths = [tmp_path / name for name in ("bench.json", "bench.html")]
    rows = [
        {
            "label": label,
            "recall@10": 0.4,
            "difference": difference,
            "difference_interval": difference and [-0.02, 0.01],
            "seconds_to_recall": seconds,
            "seconds_per_1k_windows": 1.0,
            "curve": {name: [1, 2] for name in ("updates", "mean", "lowest", "highest")},
        }
        for label, difference, seconds in (("as it is", None, 30.0), ("fp32", -0.005, None))
    ]
    study = {
        "study": "fast",
        "dataset": "x/planted",
        "preset": "quick",
        "seeds": 3,
        "rows": rows,
        "hardware": {"gpu": None, "processor": "the CPU"},
    }
    (tmp_path / "fast-planted.json").write_text(json.dumps(study))
    files = [word for name, path in zip(("--json", "--page"), paths) for word in (name, str(path))]
    bench.main(["--quick", "--studies", str(tmp_path), *files])
    results = json.loads(paths[0].read_text())
    assert list(results) == ["command", "hardware", "versions", "rows", "targets"] and results[
        "command"
    ].endswith("bench --quick")
    page = paths[1].read_text()
    assert all(name in page for name in variants)
    assert (
        "planted, preset quick, 3 seeds" in page
        and "-0.0050 [-0.0200, +0.0100]" in page
        and ">never<" in page
    )
    assert "skipped: no CUDA device here" in page
    bars = waterfall.figure(results).data[0]
    assert len(bars.x) == len(variants) and bars.y[1].endswith("9.5 s, 1.11×")
