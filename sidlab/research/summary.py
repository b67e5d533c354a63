"""One summary of runs, whoever asks: comparisons, studies and claims are views of it.

A `Run` is one finished run; `summarise` makes a row of all runs with one label. What is said of
quality: means over seeds with 95 % intervals over users (other users, these models); each seed by
itself; and from five seeds on an interval over seeds (other seeds, these users). Differences are
paired, on the same users and seeds.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from sidlab.metrics import (
    bootstrap_interval,
    paired_test,
    per_user,
    ranks_of,
    seed_interval,
)

COSTS = (
    "train_seconds",
    "seconds_per_1k_windows",
    "real_token_fraction",
    "kept_token_fraction",
    "peak_memory_mb",
    "evaluation_seconds",
    "windows",
    "updates",
)
# Of runs side by side they would be wrong, so their records carry none.
SECONDS = ("train_seconds", "seconds_per_1k_windows", "evaluation_seconds")


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run, or a baseline, which has neither seed nor costs."""

    label: str  # what the runs of several seeds have in common: a method, a setting
    seed: int | None
    # What the run's file holds: "ranks" (`metrics.stored`), the only part that a baseline has,
    # "row" (metrics and costs), "curve", "sids", "ended" (`one_run.run`), "device", "precision",
    # "busy"; and to repeat it, "spec", "hardware" and "versions"
    result: dict

    @property
    def costs(self) -> dict:
        """{name of `COSTS`: number, or None where it was not measured}."""
        row = self.result.get("row", {})
        return {name: row.get(name) for name in COSTS}


def summarise(
    runs: Iterable[Run], against: Callable[[str], str | None] = lambda label: None
) -> list[dict]:
    """A row a label, in the order of `runs`, which hold the same seeds for all labels.

    `against`: of a label, that of the other side of its difference, or None. Fields of a row:
    "label", "seeds" (their number); of each metric its mean, "METRIC_interval", "METRIC_by_seed"
    and "METRIC_seed_interval" (None below five seeds); medians of `COSTS` and "seconds_range" (per
    1,000 windows, of the fastest and the slowest seed), None where nothing was measured;
    "kept_informative", means; what `difference` gives of recall@10; "busy": other jobs ran beside
    one of them.
    """
    of_label: dict[str, list[Run]] = {}
    for run in runs:
        of_label.setdefault(run.label, []).append(run)
    ranks = {label: ranks_of([run.result for run in group]) for label, group in of_label.items()}
    rows = []
    for label, group in of_label.items():
        seconds = [run.costs["seconds_per_1k_windows"] for run in group]
        known = [run.result.get("row", {}).get("kept_informative") for run in group]
        other = against(label)
        rows.append(
            {
                "label": label,
                "seeds": len(group),
                **quality_of(ranks[label]),
                **{name: _median([run.costs[name] for run in group]) for name in COSTS},
                "seconds_range": [min(seconds), max(seconds)] if None not in seconds else None,
                "kept_informative": known[0]
                and {part: float(np.mean([one[part] for one in known])) for part in known[0]},
                **difference(hits(ranks[label]), None if other is None else hits(ranks[other])),
                "against": other,
                "busy": any(run.result.get("busy", False) for run in group),
            }
        )
    return rows


def metrics_of(ranks) -> dict:
    """Recall and NDCG at 5 and 10 of ranks [U] or [S, U], each with its interval over users."""
    out = {}
    for name, values in per_user(ranks).items():
        out[name] = float(values.mean())
        out[f"{name}_interval"] = list(bootstrap_interval(values))
    return out


def quality_of(ranks) -> dict:
    """`metrics_of`, and beside it what seeds say: each one's mean and the interval over them."""
    out = metrics_of(ranks)
    for name, values in per_user(ranks).items():
        of_seed = values.mean(axis=1)
        out[f"{name}_by_seed"] = of_seed.tolist()
        out[f"{name}_seed_interval"] = _listed(seed_interval(of_seed))
    return out


def hits(ranks) -> np.ndarray:
    """Whether each user's item is among ten, as an expectation where items share SIDs: [S, U]."""
    return per_user(ranks)["recall@10"]


def difference(values, other) -> dict:
    """The paired difference of per-user values [S, U]: "difference", "difference_interval",
    "difference_by_seed", "difference_seed_interval" and "p_value" of `metrics.paired_test`; all
    None where `other` is.
    """
    test = None if other is None else paired_test(values, other)
    return {
        "difference": test and test.difference,
        "difference_interval": test and list(test.interval),
        "difference_by_seed": test and list(test.by_seed),
        "difference_seed_interval": test and _listed(test.seed_interval),
        "p_value": test and test.p_value,
    }


def _listed(interval):
    return interval if interval is None else list(interval)


def _median(values):
    return None if None in values else float(np.median(values))
