"""What one file of results says of a claim: the rules by which it is confirmed or not."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from scipy import stats

from sidlab.research.papers import STAMP_CLAIMS, data_name, published
from sidlab.research.studies import command as study_command

MARGIN = 0.05  # of the unpruned recall
LEVEL = 0.05  # of the tests of one claim together
# Of the lowest recall@10 published of an unpruned TIGER: what reaches less can't say what pruning
# costs
MATURE = 0.9
SINGLE = 0.1  # taken for the spread of a single run's seconds, which has none of its own
CONFIRMED = "confirmed"
REFUTED = "not confirmed"
UNDECIDED = "undecided"


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


def seeds_of(results):
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
        f"{seeds_of(results)} seed(s), "
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
    if seeds_of(results) < 2:
        return _found(results, UNDECIDED, f"{figures} (of other seeds it says nothing)")
    above = row["difference"] > bound
    found = _found(results, verdicts[0] if above else verdicts[1], figures)
    return found | {"p": p_of(row, bound)}


def p_of(row, bound):
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


def of_t5(check):
    """The check, of models with an encoder alone."""
    return lambda results: check(results) if results.get("arch", "t5") == "t5" else iter(())


def faster(pairs, least):
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
        known = seeds_of(results) > 2 and len(of_seeds) > 1
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


def less_memory(method, base, least):
    """Judged on a GPU alone: on a CPU the resident size of a process is that of its
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


def against(margin, *methods):
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
def too_low_hurts(results, rows):
    base = rows["unpruned"]["recall@10"]
    for label, row in rows.items():
        if label.endswith("keep 0.1"):
            figures = f"{label} − unpruned, recall@10: {_difference(row)}, of {base:.4f}"
            yield _quality(results, row, -MARGIN * base, base, (REFUTED, CONFIRMED), figures)


@_study("layer-ratio")
def two_thirds_go(results, rows):
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
def dilution(results, rows):
    pairs = results.get("versus", ())
    if not pairs:
        return
    clear = stats.false_discovery_control([p_of(pair, 0) for pair in pairs]) < LEVEL
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
def choice_matters(results, rows):
    title = "keeping a third by rastp − at random"
    yield from _pairs(results, rows, lambda label: label == "rastp", lambda pair: title)


@_study("adaptive")
def stages_help(results, rows):
    def claimed(label):
        """Aggressive early, as claimed."""
        row = rows[label]
        return row.get("strategy.kind") == "stage" and row["strategy.start"] < row["pruning.keep"]

    yield from _pairs(results, rows, claimed, lambda pair: f"{pair['label']} − {pair['against']}")


def decoder_only(results):
    if results.get("arch") == "qwen":
        yield from against(MARGIN, "rastp", "stamp")(results)
        yield from faster(
            [("rastp", "unpadded"), ("stamp", "unpadded")], STAMP_CLAIMS["speedup"][0]
        )(results)


def nothing(results):
    return iter(())


def _difference(row):
    return f"{_signed(row['difference'])} {_span(row['difference_interval'])}"


def _signed(value):
    return f"{value:+.4f}".replace("-", "−")


def _span(interval):
    return "[{:+.4f}, {:+.4f}]".format(*interval).replace("-", "−")
