"""What the two papers claim, and what came out here: `make paper` runs the comparisons and writes
the claims page from their files.

    python -m sidlab.research.claims DATASET … [--preset paper] [--seeds 3] [--arch t5 qwen]
        [--methods "unpadded rastp"] [--sids FILE] [--output runs/paper] [--evidence results]

A claim is judged by rules alone, from every results.json, study.json and benchmark below `--output`
and `--evidence`; nothing is typed in. A saving is confirmed where ours is at least the published
one over the whole of its spread (`_faster`), and not where all of it is less; pruned and unpruned
model pad alike, so that padding saved is not pruning's. Quality counts as kept where the difference
to the unpruned model is above −5 % of its recall@10, as lost where it is below, and as better or
worse where it is above or below 0; all other findings are undecided (`_test`). What decides is
tested at 5 %, corrected for the number of tests that a claim takes (false discovery rate). One seed
decides nothing about quality, nor does a model that is far from the published one (`MATURE`). RASTP
is judged by encoders with decoders, the only models that it had. Without a DATASET nothing is run.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from scipy import stats

from sidlab.files import reading, write_json
from sidlab.metrics import METRICS
from sidlab.research.compare import DEFAULT_METHODS, compare
from sidlab.research.jobs import cluster
from sidlab.research.page import write_claims, write_page
from sidlab.research.papers import PUBLISHED, RASTP_CLAIMS, STAMP_CLAIMS, data_name, published
from sidlab.research.studies import command as study_command

METHODS = f"{DEFAULT_METHODS} rastp-reference"
MARGIN = 0.05  # of the unpruned recall
LEVEL = 0.05  # of the tests of one claim together
# Of the lowest recall@10 published of an unpruned TIGER: what reaches less can't say what pruning
# costs
MATURE = 0.9
SINGLE = 0.1  # taken for the spread of a single run's seconds, which has none of its own
CONFIRMED = "confirmed"
REFUTED = "not confirmed"
UNDECIDED = "undecided"
NOT_RUN = "not run"
UNTESTABLE = "not testable here"


@dataclasses.dataclass(frozen=True)
class Claim:
    """`check` yields the findings in one file of results (`_found`); `missing` says why there may
    be none. A finding with "p" gets its verdict once all tests of the claim are known (`judge`).
    """

    paper: str
    text: str
    check: Callable[[dict], Iterator[dict]]
    missing: str


def _rows(results):
    return {row["method"]: row for row in results.get("summary", ())}


def _bench_rows(results, workload):
    """What the benchmark measured, by method: the published configuration and ours, each with and
    without pruning.
    """
    rows = [
        row
        for row in results.get("rows", ())
        if "targets" in results and row["workload"] == workload
    ]
    names = {
        "published, without pruning": "padded",
        "published RASTP": "rastp-reference",
        "nothing pruned": "unpadded",
        "a third kept": "rastp",
        "pruning to a third": "rastp",
    }
    named = {names[row["variant"]]: row for row in rows if row["variant"] in names}
    if "rastp" in named and "unpadded" not in named:  # the last two steps of the waterfall
        named["unpadded"] = rows[rows.index(named["rastp"]) - 1]
    return named


def _seeds(results):
    return results.get("seeds") or max(
        (row["seeds"] for row in results.get("summary", ())), default=1
    )


def _found(results, verdict, figures):
    """A finding: `verdict` on a claim in one run, the `figures` it rests on, the data set, where it
    was measured and by which command.
    """
    machine = results["hardware"]
    if "targets" in results:
        where = (
            f"the benchmark, {machine['gpu'] or machine['processor']}, {machine['threads']}"
            " thread(s)"
        )
        return {
            "verdict": verdict,
            "figures": figures,
            "data": "benchmark",
            "where": where,
            "command": results["command"],
        }
    data = data_name(results["dataset"])
    # Of older files: from scratch
    continued = "continued from one model, " if results.get("protocol") == "continue" else ""
    where = (
        f"{data}, {results.get('arch', 't5')}, preset {results['preset']}, {continued}"
        f"{_seeds(results)} seed(s), "
        f"{machine['gpu'] or machine['processor']}, {machine['threads']} thread(s)"
    )
    return {
        "verdict": verdict,
        "figures": figures,
        "data": data,
        "where": where,
        "command": results.get("command") or study_command(results),
    }


def _quality(results, row, bound, base, verdicts, figures):
    """A finding about a difference of recall@10: `verdicts` are what it says above and below
    `bound`. One seed decides nothing, nor does an unpruned model, of recall@10 `base`, that is not
    trained enough.
    """
    theirs = published(results["dataset"]).query("method == 'TIGER'")["recall@10"].min()
    if base < MATURE * theirs:  # NaN, where nothing is published, is never more
        figures += f" (not trained enough: {base:.4f} unpruned, published {theirs:.4f})"
        return _found(results, UNDECIDED, figures)
    if _seeds(results) < 2:
        return _found(results, UNDECIDED, f"{figures} (of other seeds it says nothing)")
    above = row["difference"] > bound
    found = _found(results, verdicts[0] if above else verdicts[1], figures)
    return found | {"p": _test(row, bound)}


def _test(row, bound):
    """Two-sided p-value of the difference of `row` being `bound`: the larger of that over users, by
    the width of their interval, and that over seeds. Of fewer than five seeds there is none over
    seeds; there all of them must lie on one side.
    """
    low, high = row["difference_interval"]
    deviation = (high - low) / 2 / stats.norm.ppf(0.975)
    distance = abs(row["difference"] - bound)
    if distance == 0:
        return 1.0
    p = 2 * stats.norm.sf(distance / deviation) if deviation else 0.0
    of_seed = np.array(row.get("difference_by_seed") or [row["difference"]])
    if row.get("difference_seed_interval"):
        of_seeds = stats.ttest_1samp(of_seed, bound).pvalue if np.ptp(of_seed) else 0.0
        return float(max(p, of_seeds))
    return float(p) if len(set(of_seed > bound)) == 1 else 1.0


def _t5(check):
    """The check, of models with an encoder alone."""
    return lambda results: check(results) if results.get("arch", "t5") == "t5" else iter(())


def _faster(pairs, least):
    """At least `least` times as fast, for each pair (pruned, base) of methods; and with the study
    of efficiency, for a third kept. The spread: of the benchmark's rounds the quartiles, of three
    seeds or more all of them, of fewer `SINGLE`. Files marked "busy" were measured beside other
    jobs: their seconds say nothing.
    """

    def spread(results, row):
        middle = row["seconds_per_1k_windows"]
        if "quartiles" in row:
            return row["quartiles"]
        of_seeds = row.get("seconds_range") or [  # a study's, or a comparison's
            one["seconds_per_1k_windows"]
            for one in results.get("rows", ())
            if one.get("method") == row.get("method", 0)
        ]
        known = _seeds(results) > 2 and len(of_seeds) > 1
        return (
            (min(of_seeds), max(of_seeds))
            if known
            else (middle * (1 - SINGLE / 2), middle * (1 + SINGLE / 2))
        )

    def check(results):
        tables = {"": _rows(results)}
        if results.get("study") == "efficiency":
            labels = {row["label"]: row for row in results["rows"]}
            tables = {"": {"rastp": labels.get("keep 0.33", {}), "unpadded": labels["unpruned"]}}
        if "targets" in results:
            tables = {
                " on " + workload: _bench_rows(results, workload)
                for workload in ("Beauty lengths", "full histories")
            }
        if results.get("busy") or any(row.get("busy") for row in results.get("rows", ())):
            return
        for on, rows in tables.items():
            for method, base in pairs:
                one, other = (rows.get(name, {}) for name in (method, base))
                if one.get("seconds_per_1k_windows") and other.get("seconds_per_1k_windows"):
                    ratio = other["seconds_per_1k_windows"] / one["seconds_per_1k_windows"]
                    low, high = spread(results, one)
                    floor, top = spread(results, other)
                    verdict = (
                        CONFIRMED
                        if floor / high >= least
                        else REFUTED
                        if top / low < least
                        else UNDECIDED
                    )
                    yield _found(
                        results,
                        verdict,
                        f"{method} trains {ratio:.2f} times [{floor / high:.2f}, {top / low:.2f}]"
                        f" as fast as {base}{on}",
                    )

    return check


def _less_memory(method, base, least):
    """Judged on a GPU alone: on a processor the resident size of a process is that of its
    allocator, more than of what is in use. What pruning saves without MAP is told, and decides
    nothing.
    """

    def check(results):
        if not results["hardware"]["gpu"]:
            return
        rows = _rows(results)
        field = "peak_memory_mb"
        what = "memory in training"
        if "targets" in results:
            rows = _bench_rows(results, "full histories")
            field = "peak_mb"
            what = "memory for activations on full histories"
        for name in (method, "rastp"):
            peaks = [rows.get(one, {}).get(field) for one in (name, base)]
            if all(peaks):
                saved = 1 - peaks[0] / peaks[1]
                verdict = UNDECIDED if name != method else CONFIRMED if saved >= least else REFUTED
                yield _found(results, verdict, f"{name} takes {saved:.1%} less {what} than {base}")

    return check


def _against(margin, *methods):
    """Recall@10 of the methods is above that of the unpruned model less `margin`, a share of it."""

    def check(results):
        rows = _rows(results)
        for method in methods:
            row = rows.get(method, {})
            if row.get("difference") is not None:
                base = rows["unpadded"]["recall@10"]
                yield _quality(
                    results,
                    row,
                    -margin * base,
                    base,
                    (CONFIRMED, REFUTED),
                    f"{method} − unpadded, recall@10: {_difference(row)}, of {base:.4f}",
                )

    return check


def _study(name):
    """A check of the rows {label: row} of one study."""

    def decorate(check):
        def of_file(results):
            if results.get("study") == name:
                yield from check(results, {row["label"]: row for row in results["rows"]})

        return of_file

    return decorate


@_study("layer-ratio")
def _too_low_hurts(results, rows):
    base = rows["unpruned"]["recall@10"]
    for label, row in rows.items():
        if label.endswith("keep 0.1"):
            figures = f"{label} − unpruned, recall@10: {_difference(row)}, of {base:.4f}"
            yield _quality(results, row, -MARGIN * base, base, (REFUTED, CONFIRMED), figures)


@_study("layer-ratio")
def _two_thirds_go(results, rows):
    """After some layer: STAMP doesn't say which. That with the best recall on validation users is
    judged.
    """
    base = rows["unpruned"]["recall@10"]
    third = [row for label, row in rows.items() if label.endswith("keep 0.33")]
    if third:
        best = max(third, key=lambda row: max(row["curve"]["mean"]))
        figures = (
            f"{best['label']} (the best of {len(third)} layers) − unpruned: {_difference(best)}, of"
            f" {base:.4f}"
        )
        yield _quality(results, best, -MARGIN * base, base, (CONFIRMED, REFUTED), figures)


@_study("granularity")
def _dilution(results, rows):
    pairs = results.get("versus", ())
    if not pairs:
        return
    clear = stats.false_discovery_control([_test(pair, 0) for pair in pairs]) < LEVEL
    better = [pair for pair, sure in zip(pairs, clear) if sure and pair["difference"] > 0]
    worse = [pair for pair, sure in zip(pairs, clear) if sure and pair["difference"] < 0]
    examples = "; ".join(
        f"{pair['label']} − {pair['against']} codes {_difference(pair)}"
        for pair in (*worse[:1], *better[:1])
    )
    figures = (
        f"of {len(pairs)} pairs of settings the finer one is clearly worse in {len(worse)} and"
        f" clearly better in {len(better)}: {examples}"
    )
    one_sided = len(pairs) in (len(worse), len(better))
    verdict = CONFIRMED if worse and better else REFUTED if one_sided else UNDECIDED
    # Its tests are corrected already: there is none left to correct.
    found = _quality(results, pairs[0], 0, _first(rows)["recall@10"], (verdict, verdict), figures)
    found.pop("p", None)
    yield found


def _first(rows):
    return next(iter(rows.values()))


def _pairs(results, rows, wanted, title):
    """The pairs of a study whose label is `wanted`: better than the other side."""
    for pair in results.get("versus", ()):
        if wanted(pair["label"]):
            figures = f"{title(pair)}, recall@10: {_difference(pair)}"
            base = _first(rows)["recall@10"]
            yield _quality(results, pair, 0, base, (CONFIRMED, REFUTED), figures)


@_study("strategies")
def _choice_matters(results, rows):
    title = "keeping a third by rastp − at random"
    yield from _pairs(results, rows, lambda label: label == "rastp", lambda pair: title)


@_study("adaptive")
def _stages_help(results, rows):
    def claimed(label):
        """Aggressive early, as claimed."""
        row = rows[label]
        return row.get("strategy.kind") == "stage" and row["strategy.start"] < row["pruning.keep"]

    yield from _pairs(results, rows, claimed, lambda pair: f"{pair['label']} − {pair['against']}")


def _decoder_only(results):
    if results.get("arch") == "qwen":
        yield from _against(MARGIN, "rastp", "stamp")(results)
        yield from _faster(
            [("rastp", "unpadded"), ("stamp", "unpadded")], STAMP_CLAIMS["speedup"][0]
        )(results)


def _nothing(results):
    return iter(())


CLAIMS = (
    Claim(
        "RASTP",
        f"Training takes {RASTP_CLAIMS['time_saved']:.1%} less time ({RASTP_CLAIMS['speedup']}"
        " times as fast).",
        _t5(
            _faster([("rastp-reference", "padded"), ("rastp", "unpadded")], RASTP_CLAIMS["speedup"])
        ),
        "needs `padded` and `rastp-reference`, or `unpadded` and `rastp`",
    ),
    Claim(
        "RASTP",
        "Quality is kept or slightly better.",
        _t5(_against(MARGIN, "rastp", "rastp-reference")),
        "needs `unpadded` and `rastp`",
    ),
    Claim(
        "RASTP",
        "A ratio that changes with the stage of learning helps (a summary of the paper; its code"
        " has none).",
        _stages_help,
        "needs the study `adaptive`",
    ),
    Claim(
        "both",
        "Centrality × saliency finds the tokens that matter: better than a random third.",
        _choice_matters,
        "needs the study `strategies`",
    ),
    Claim(
        "STAMP",
        "Training is {}–{} times as fast.".format(*STAMP_CLAIMS["speedup"]),
        _faster([("stamp", "unpadded")], STAMP_CLAIMS["speedup"][0]),
        "needs `unpadded` and `stamp`",
    ),
    Claim(
        "STAMP",
        "Training takes {:.1%}–{:.1%} less memory.".format(*STAMP_CLAIMS["memory_saved"]),
        _less_memory("stamp", "unpadded", STAMP_CLAIMS["memory_saved"][0]),
        "needs `unpadded` and `stamp` on a GPU",
    ),
    Claim(
        "STAMP",
        "Quality is kept or better.",
        _against(MARGIN, "stamp"),
        "needs `unpadded` and `stamp`",
    ),
    Claim(
        "STAMP",
        "MAP alone beats the baseline.",
        _against(0, "map"),
        "needs `unpadded` and `map`",
    ),
    Claim(
        "STAMP",
        "Up to two thirds of the tokens can go without a loss of accuracy.",
        _two_thirds_go,
        "needs the study `layer-ratio`",
    ),
    Claim(
        "STAMP", "Too low a retention ratio hurts.", _too_low_hurts, "needs the study `layer-ratio`"
    ),
    Claim(
        "STAMP",
        "Accuracy moves non-monotonically as SIDs get finer (Semantic Dilution Effect).",
        _dilution,
        "needs the study `granularity`",
    ),
    Claim(
        "STAMP",
        "It holds for decoder-only models, too.",
        _decoder_only,
        "needs a comparison with arch=qwen",
    ),
    Claim(
        "STAMP",
        "It holds on AL-GR-Tiny with a pretrained Qwen.",
        _nothing,
        "needs the 61 GB of AL-GR-Tiny, a pretrained checkpoint and GPUs (`sidlab.data.algr` and"
        " `SidQwen.from_checkpoint` take them)",
    ),
)


def judge(files: list[dict]) -> list[dict]:
    """Every claim with its findings in the loaded results and studies: {"paper", "claim",
    "verdict", "verdicts", "findings", "missing"}. The verdict is that of all findings which decide,
    where they agree, and "mixed" where not; "verdicts" has it for each data set.
    """
    out = []
    for claim in CLAIMS:
        findings = [
            finding
            for results in files
            if results.get("preset") != "smoke"
            for finding in claim.check(results)
        ]
        _correct(findings)
        of_data = {
            data: _verdict(finding["verdict"] for finding in findings if finding["data"] == data)
            for data in dict.fromkeys(finding["data"] for finding in findings)
        }
        verdict = _verdict(finding["verdict"] for finding in findings) or (
            UNTESTABLE if claim.check is _nothing else NOT_RUN
        )
        out.append(
            {
                "paper": claim.paper,
                "claim": claim.text,
                "verdict": verdict,
                "verdicts": of_data,
                "findings": findings,
                "missing": claim.missing,
            }
        )
    return out


def _correct(findings):
    """Undecided is every test that does not hold once it is corrected for how many there are."""
    tests = [finding for finding in findings if "p" in finding]
    if tests:
        for finding, p in zip(tests, stats.false_discovery_control([one["p"] for one in tests])):
            finding["p"] = float(p)
            if p >= LEVEL:
                finding["verdict"] = UNDECIDED


def _verdict(verdicts):
    found = set(verdicts)
    decided = found - {UNDECIDED} or found
    return decided.pop() if len(decided) == 1 else "mixed" if decided else None


def evidence(*folders) -> list[dict]:
    """All results of comparisons, studies and whole benchmarks below the folders, loaded; of equal
    commands on equal machines the one found last, of equal studies the one with most seeds. Not
    what was run for a quick look.
    """
    found = {}
    for folder in folders:
        for path in sorted(pathlib.Path(folder).rglob("*.json")):
            if path.name.endswith(
                ("results.json", "study.json", "bench.json")
            ) or path.parent.name in ("results", "studies"):
                with reading(path):
                    content = json.loads(path.read_text())
                if not isinstance(content, dict):  # as that of tools/run.py
                    continue
                look = content.get("only") or "--quick" in content.get("command", "")
                if content.keys() & {"summary", "study", "targets"} and not look:
                    names = ("study", "dataset", "preset", "arch", "sids")
                    same = str([content.get(name) or "" for name in names])
                    key = same if "study" in content else str(content.get("command"))
                    key += str(content["hardware"]) if "hardware" in content else ""
                    if key not in found or _seeds(content) >= _seeds(found[key]):
                        found[key] = content
    return list(found.values())


def beside_published(files: list[dict]) -> list[dict]:
    """Published rows of each data set, with ours of the same method: {"dataset", "method",
    "source", metrics, "METRIC_interval"}.
    """
    rows = []
    run = [data_name(results["dataset"]) for results in files if "summary" in results]
    for name in dict.fromkeys([*run, *PUBLISHED]):
        rows += [{"dataset": name, **row} for row in published(name).to_dict("records")]
        for results in files:
            if "summary" in results and data_name(results["dataset"]) == name:
                source = f"here: {results.get('arch', 't5')}, preset {results['preset']}"
                fields = [*METRICS, *(f"{metric}_interval" for metric in METRICS)]
                rows += [
                    {
                        "dataset": name,
                        "method": row["method"],
                        "source": source,
                        **{field: row[field] for field in fields},
                    }
                    for row in results["summary"]
                ]
    return rows


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        "sidlab.research.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("datasets", nargs="*", metavar="DATASET")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arch", nargs="+", default=["t5"])
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--sids", default="", help="a published SID file, or behaviour")
    parser.add_argument("--cluster", default="", help="the address of a Dask scheduler")
    parser.add_argument("--output", default="runs/paper")
    parser.add_argument(
        "--evidence", nargs="*", default=["results", "runs/studies", "runs/bench", "runs/bench-gpu"]
    )
    args = parser.parse_args(arguments)
    output = pathlib.Path(args.output)
    executor = cluster(args.cluster)
    for dataset in args.datasets:
        for arch in args.arch:
            methods = [
                name for name in args.methods.split() if arch == "t5" or name != "rastp-reference"
            ]
            if arch == "qwen" and args.methods == METHODS:
                methods.append("rastp-visible")
            folder = output / f"{data_name(dataset)}-{args.preset}-{arch}"
            results = compare(
                dataset,
                args.preset,
                methods,
                args.seeds,
                str(folder),
                args.sids,
                arch=arch,
                executor=executor,
            )
            write_page(results, folder / "index.html")
    files = evidence(*args.evidence, output)
    claims = judge(files)
    rows = beside_published(files)
    write_json(output / "claims.json", {"claims": claims, "published": rows})
    write_claims(claims, rows, output / "index.html")
    for claim in claims:
        own = "; ".join(
            f"{name}: {claim['verdicts'][name]}"
            for name in map(data_name, args.datasets)
            if name in claim["verdicts"]
        )
        print(f"{claim['verdict']:18} {claim['paper']}: {claim['claim']}{own and f' ({own})'}")
    if args.datasets and args.preset == "smoke":
        print(
            "Runs with the preset smoke are too short to judge anything by: these verdicts rest on"
            " the other files."
        )
    print(f"{len(files)} files of evidence; {output / 'index.html'}")


def _difference(row):
    return f"{_signed(row['difference'])} {_span(row['difference_interval'])}"


def _signed(value):
    return f"{value:+.4f}".replace("-", "−")


def _span(interval):
    return "[{:+.4f}, {:+.4f}]".format(*interval).replace("-", "−")


if __name__ == "__main__":
    main()
