"""The benchmark: what training, recommending and SID encoding cost here, against the published way
and against the cost model.

    python -m sidlab.research.bench [--quick] [--json FILE] [--page FILE]        (also: make bench)

Every figure is a ratio of medians over rounds in which all variants take turns, in one process; its
spread is the 95 % interval of a bootstrap over rounds. Peak memory is that of a child process of
its own, or what a GPU has allocated. How it is measured: `timing`.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time

import numpy as np
import torch

from sidlab.fast.precision import uses_bf16
from sidlab.fast.scored_attention import attention_path
from sidlab.files import write_json
from sidlab.pruning import PruningConfig
from sidlab.research import waterfall
from sidlab.research.cost import cost
from sidlab.research.machine import hardware, versions
from sidlab.research.timing import (
    BEAUTY,
    LENGTHS,
    OURS,
    PUBLISHED,
    WIDTHS,
    Training,
    Variant,
    beauty_batches,
    in_child,
    in_faster_precision,
    kmeans_peak,
    ratio,
    time_beauty,
    time_histories,
    time_recommend,
    training_peak,
)


def pruned(config, **changes):
    """`config`, pruning to a third after the second layer."""
    return dataclasses.replace(config, pruning=PruningConfig(**changes))


# From the published configuration to ours: each differs from the one before in what its name says.
WATERFALL = {
    "published, without pruning": Variant(PUBLISHED),
    "published RASTP": Variant(pruned(PUBLISHED, mode="reference")),
    "no padding, nothing pruned": Variant(dataclasses.replace(PUBLISHED, padding="batch")),
    "cheap dropout and attention": Variant(dataclasses.replace(OURS, precision="fp32")),
    "mixed precision": Variant(OURS),
    "pruning to a third": Variant(pruned(OURS)),
}
STOCK = "Hugging Face T5, eager, 150 slots"


def on_gpu(variants: dict[str, Variant]) -> dict[str, Variant]:
    """The same for a GPU, where the kit replays CUDA graphs: one step more in front of the last."""
    *first, last = variants
    return {name: variants[name] for name in first} | {
        "CUDA graphs": dataclasses.replace(variants[first[-1]], replay=True),
        last: dataclasses.replace(variants[last], replay=True),
    }


def replayed(variants: dict[str, Variant]) -> dict[str, Variant]:
    """The same, all from CUDA graphs."""
    return {name: dataclasses.replace(variant, replay=True) for name, variant in variants.items()}


FULL = {
    "nothing pruned": Variant(OURS),
    "everything scored and kept": Variant(pruned(OURS, keep=1.0)),
    "a third kept": Variant(pruned(OURS)),
}
# A decoder-only model of 24 layers as Qwen's small ones have, narrower to suit a CPU; and
# histories that fill 900 slots.
QWEN = dataclasses.replace(
    OURS,
    arch="qwen",
    ffn="t5",
    d_model=256,
    d_kv=32,
    num_heads=8,
    num_kv_heads=2,
    d_ff=768,
    num_layers=24,
    dropout=0.0,
)
LONG = dataclasses.replace(OURS, max_items=100, padded_items=None)
OTHERS = {
    "Qwen shape, 24 layers": (
        {"nothing pruned": Variant(QWEN), "a third kept": Variant(pruned(QWEN, after_layer=6))},
        WIDTHS,
    ),
    "100 items × 8 levels": (
        {
            "nothing pruned": Variant(LONG),
            "a third kept": Variant(pruned(LONG)),
        },
        (256,) * 8,
    ),
}

# Full histories, of which a pass teaches the next item or every item but the first.
DENSE = {
    "one target a window": Variant(dataclasses.replace(OURS, encoder_mask="items")),
    "every item a target": Variant(dataclasses.replace(OURS, targets="all")),
}


class Report:
    """Collects `rows` (what was measured) and `targets` (figures with what they should be)."""

    def __init__(self):
        self.rows = []
        self.targets = []

    def times(self, workload, variants, times, predicted, device, memory=()):
        """Rows of training: `times` as `time_beauty` gives them, `predicted`: the `Cost` of each
        variant.
        """
        for name, seconds in times.items():
            config = variants[name].config
            median = float(np.median(seconds))
            flops = predicted[name].training * 1000
            self.rows.append(
                {
                    "workload": workload,
                    "variant": name,
                    "seconds_per_1k_windows": median,
                    "quartiles": np.quantile(seconds, (0.25, 0.75)).tolist(),
                    "gflops_per_1k_windows": flops / 1e9,
                    "achieved_gflops_per_second": flops / 1e9 / median,
                    # The model of what autograd keeps knows the kit's own attention and
                    # dropout, and the published mode's.
                    "activation_mb_predicted": (
                        None if config.stock_kernels else predicted[name].activation_bytes / 2**20
                    ),
                    "peak_mb": dict(memory).get(name),
                    "attention": attention_kernel(variants[name], device),
                }
            )

    def target(self, figure, value, spread, at_least=None, at_most=None):
        met = value >= at_least if at_least is not None else value <= at_most
        wanted = f"≥ {at_least:g}" if at_least is not None else f"≤ {at_most:g}"
        self.targets.append(
            {
                "figure": figure,
                "target": wanted,
                "value": float(value),
                "spread": list(spread) if spread else None,
                "verdict": "met" if met else "short",
            }
        )

    def skip(self, figure, wanted, reason):
        self.targets.append(
            {
                "figure": figure,
                "target": wanted,
                "value": None,
                "spread": None,
                "verdict": f"skipped: {reason}",
            }
        )

    def lines(self) -> list[str]:
        """The table of targets, as text."""
        out = [f"{'figure':86} {'target':>8} {'value':>8}  {'95 % interval':15} verdict"]
        for t in self.targets:
            spread = "" if not t["spread"] else "{:.3g} – {:.3g}".format(*t["spread"])
            value = "" if t["value"] is None else f"{t['value']:.3g}"
            out.append(f"{t['figure']:86} {t['target']:>8} {value:>8}  {spread:15} {t['verdict']}")
        return out


def attention_kernel(variant: Variant, device: str) -> str:
    """Which attention a variant trains with, in words."""
    if variant.stock:
        return "all layers: eager"
    with torch.autocast(device, torch.bfloat16, enabled=uses_bf16(variant.config.precision)):
        return attention_path(Training(variant, [], device).model)


def run(quick: bool, device: str = "cpu") -> Report:
    """Measure everything; prints what it is at."""
    report = Report()
    gpu = device == "cuda"
    # On a GPU with batches of about as many windows as the published code's (about 500 in 150
    # slots)
    tokens, rounds = (65536 if gpu else 4096, 9) if not quick else (2048, 4)
    # Of Beauty's lengths: as many slots as four batches of full histories
    update = {"batch_tokens": tokens // 4, "accumulation": 16}

    log_progress("the faster precision")
    size = tokens // 150
    settled = in_faster_precision(WATERFALL | FULL, size, device)
    waterfall, full = ({name: settled[name] for name in variants} for variants in (WATERFALL, FULL))
    log_progress(f"training windows of Beauty's lengths, {rounds} rounds")
    variants = (on_gpu(waterfall) if gpu else waterfall) | {STOCK: Variant(PUBLISHED, stock=True)}
    times = time_beauty(variants, *update.values(), rounds, device)
    predicted = {
        name: cost(dataclasses.replace(v.config, **update), WIDTHS, LENGTHS)
        for name, v in variants.items()
    }
    report.times("Beauty lengths", variants, times, predicted, device)
    published, rastp, unpadded, *_, ours = (times[name] for name in WATERFALL)
    speedup = "published RASTP ÷ ours with pruning, seconds per window, Beauty lengths"
    report.target(
        f"{'GPU' if gpu else 'CPU'}: {speedup}", *ratio(rastp, ours), at_least=6 if gpu else 10
    )
    report.target("padded ÷ unpadded, nothing pruned", *ratio(published, unpadded), at_least=3)
    report.target(
        "reference variant ÷ Hugging Face's eager T5 (within 10 %)",
        *ratio(published, times[STOCK]),
        at_most=1.1,
    )
    real = beauty_batches(dataclasses.replace(OURS, **update), update["accumulation"])[2]
    report.target("real tokens in a batch, share", real, None, at_least=0.95)

    log_progress("full histories, nothing to unpad")
    runs = replayed(full) if gpu else full
    times = time_histories(runs, size, 2 * rounds + 1, device)
    items = np.full(size, OURS.max_items)
    predicted = {
        name: cost(dataclasses.replace(v.config, batch_tokens=10**9, accumulation=1), WIDTHS, items)
        for name, v in runs.items()
    }
    # Of passes that are not replayed, for a replay allocates nothing
    peaks = {
        name: training_peak(v, size, device) if gpu else in_child(training_peak, v, size)
        for name, v in full.items()
    }
    report.times("full histories", runs, times, predicted, device, peaks)
    plain, scored, third = FULL
    bound = predicted[plain].training / predicted[third].training
    share = ratio(times[third], times[plain], lambda r: (1 - r) / (1 - 1 / bound))
    report.target(
        f"T5, a third kept: time saved ÷ predicted (bound {bound:.2f}×, RASTP reports 1.36×)",
        *share,
        at_least=0.9,
    )
    saved = (
        (peaks[plain] - peaks[third])
        * 2**20
        / (predicted[plain].activation_bytes - predicted[third].activation_bytes)
    )
    figure = (
        "T5, a third kept: peak memory saved ÷ predicted (saves"
        f" {1 - peaks[third] / peaks[plain]:.0%}, STAMP reports 17–55 %)"
    )
    report.target(figure, saved, None, at_least=0.9)
    report.target(
        "everything scored and kept ÷ no scores", *ratio(times[scored], times[plain]), at_most=1.08
    )
    for workload, (pair, widths) in OTHERS.items():
        log_progress(workload)
        # On a GPU half as many: the activations of 24 layers are 12 GB then, by the cost model
        few = max(2, size // 4) if quick else size // 2 if gpu else size
        pair = in_faster_precision(pair, few, device, widths)
        pair = replayed(pair) if gpu else pair
        times = time_histories(pair, few, rounds, device, widths)
        predicted = {
            name: cost(
                dataclasses.replace(v.config, batch_tokens=10**9, accumulation=1),
                widths,
                np.full(few, v.config.max_items),
            )
            for name, v in pair.items()
        }
        report.times(workload, pair, times, predicted, device)
        bound = predicted[plain].training / predicted[third].training
        share = ratio(times[third], times[plain], lambda r, bound=bound: (1 - r) / (1 - 1 / bound))
        report.target(
            f"{workload}, a third kept: time saved ÷ predicted (bound {bound:.2f}×)",
            *share,
            at_least=0.9,
        )
    log_progress("one target a window, and every item")
    runs = in_faster_precision(DENSE, size, device)
    runs = replayed(runs) if gpu else runs
    times = time_histories(runs, max(2, size // 4), rounds, device)
    predicted = {
        "one target a window": cost(runs["one target a window"].config, WIDTHS, items),
        "every item a target": cost(runs["every item a target"].config, WIDTHS, items + 1),
    }
    report.times("full histories, seconds per 1,000 targets", runs, times, predicted, device)
    one, every = times.values()
    report.target(
        f"one target a window ÷ every item taught, seconds per target, {OURS.max_items} items",
        *ratio(one, every),
        at_least=5,
    )
    log_progress("recommending")
    by_size = time_recommend((10_000, 1_000_000), 32, 20, rounds, device)
    report.target(
        "recommend(), beam 20, per user: 1,000,000 ÷ 10,000 items",
        *ratio(by_size[1_000_000], by_size[10_000]),
        at_most=1.3,
    )
    epoch = sum(BEAUTY) / 1000 * float(np.median(ours))
    library = {} if gpu else time_recommend((100_000,), 32, 20, rounds, library=True)
    report.rows += [
        {
            "workload": "recommend, beam 20",
            "variant": str(name),
            "seconds_per_user": float(np.median(seconds)),
        }
        for name, seconds in (by_size | library).items()
    ]
    if gpu:
        report.rows.append(
            {"workload": "an epoch of Beauty (131,413 windows), extrapolated", "seconds": epoch}
        )
        return report
    report.target(
        "recommend(), 100,000 items: prefix_allowed_tokens_fn ÷ ours",
        *ratio(library["library"], library[100_000]),
        at_least=3,
    )
    figure = "ResidualKMeans, 1,000,000 × 256, 3 × 256: peak memory ÷ input"
    if quick:
        report.skip(figure, "≤ 2.2", "takes minutes: run without --quick")
    else:
        log_progress("residual k-means on a million items")
        peak, seconds = in_child(kmeans_peak, 1_000_000, 256)
        report.target(figure, peak, None, at_most=2.2)
        report.rows.append({"workload": "ResidualKMeans, fit and encode", "seconds": seconds})
    interval = [
        sum(BEAUTY) / 1000 * float(seconds) / 60 for seconds in np.quantile(ours, (0.025, 0.975))
    ]
    threads = torch.get_num_threads()
    report.target(
        f"minutes an epoch of Beauty (131,413 windows) takes, extrapolated; {threads}"
        f" thread{'s' * (threads > 1)}",
        epoch / 60,
        interval,
        at_most=4,
    )
    report.skip(
        f"GPU: {speedup}",
        "≥ 6",
        "run make bench-gpu" if torch.cuda.is_available() else "no CUDA device here",
    )
    return report


def log_progress(what):
    print(f"{time.strftime('%H:%M:%S')}  {what}", file=sys.stderr, flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m sidlab.research.bench",
        description="Measure this machine and compare with the targets.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="under three minutes on an idle machine; fewer rounds, smaller batches",
    )
    parser.add_argument("--gpu", action="store_true", help="the rows of a CUDA device")
    parser.add_argument(
        "--check",
        action="store_true",
        help="only say whether what is asked for can be measured here",
    )
    parser.add_argument("--json", metavar="FILE", help="write hardware, rows and targets")
    parser.add_argument(
        "--page", metavar="FILE", help="write a page with the waterfall and the table"
    )
    parser.add_argument(
        "--studies",
        metavar="FOLDER",
        default="results/studies",
        help=(
            "where the page finds results of the study `fast`, fast-*.json (default:"
            " results/studies)"
        ),
    )
    options = parser.parse_args(arguments)
    if options.gpu and not torch.cuda.is_available():
        sys.exit(
            "the GPU rows need a CUDA device, and this build of torch sees none: make setup"
            " TORCH_INDEX=https://download.pytorch.org/whl/cu130 on a machine with one; `make"
            " bench` measures the CPU rows"
        )
    if options.check:
        return
    report = run(options.quick, "cuda" if options.gpu else "cpu")
    command = (
        "python -m sidlab.research.bench" + " --quick" * options.quick + " --gpu" * options.gpu
    )
    results = {
        "command": command,
        "hardware": hardware(),
        "versions": versions(),
        "rows": report.rows,
        "targets": report.targets,
    }
    print("\n".join(report.lines()))
    if options.json:
        write_json(pathlib.Path(options.json), results)
    if options.page:
        studies = [
            json.loads(path.read_text())
            for path in sorted(pathlib.Path(options.studies).glob("fast-*.json"))
        ]
        waterfall.write_page(results, options.page, studies)


if __name__ == "__main__":
    main()
