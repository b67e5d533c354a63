"""Was the held-out item found, how high, and how sure are we: recall, NDCG, bootstrap intervals,
paired tests.

Every user has one target (leave-one-out). `U` users, `S` seeds, `k` recommended items.

`ranks` are int64 [U]: 1 for the top, 0 for missing. Where items share a SID the model can't tell
them apart, so the order among them is a lottery. There `ranks` have the dtype `SHARED`: "rank" is
the first place of all that share the target's SID, "sharers" how many they are, and recall and NDCG
are their expectation over all orders of such a group. Both kinds can be sliced, stacked and masked.
"""

from typing import NamedTuple

import numpy as np

SHARED = np.dtype([("rank", np.int64), ("sharers", np.int64)])
FEW_SEEDS = 5  # of fewer no interval over seeds is told
_CELLS = 2**22  # random numbers held at a time: 32 MB


def rank_of_target(items, targets) -> np.ndarray:
    """int64 [U]: the place (1 is the top) of `targets` [U] in the ranked lists `items` [U, k], 0
    where missing.

    Item ids count from 1; 0 in `items` means "no recommendation".
    """
    items = np.asarray(items)
    targets = np.asarray(targets)
    if items.ndim != 2 or targets.shape != items.shape[:1]:
        raise ValueError(
            f"items must be [U, k] and targets [U], got {items.shape} and {targets.shape}"
        )
    if targets.size and targets.min() < 1:
        raise ValueError(f"targets must be item ids from 1 on, got {targets.min()}")
    found = items == targets[:, None]  # [U, k]
    return np.where(found.any(axis=1), found.argmax(axis=1) + 1, 0).astype(np.int64)


def shared_ranks(ranks, sharers) -> np.ndarray:
    """`SHARED` [...] of the first places `ranks` and the sizes `sharers` of the groups, ints [...];
    ValueError for a size below 1.
    """
    ranks = np.asarray(ranks)
    sharers = np.asarray(sharers)
    if ranks.shape != sharers.shape or (sharers.size and sharers.min() < 1):
        raise ValueError(
            "sharers must be [U] as ranks are, each at least 1 (the target itself), got shape"
            f" {sharers.shape} for {ranks.shape}" + f" and {sharers.min()}" * bool(sharers.size)
        )
    out = np.empty(ranks.shape, SHARED)
    out["rank"] = ranks
    out["sharers"] = sharers
    return out


def stored(ranks) -> dict:
    """`ranks` for JSON: {"ranks": list}, and "sharers" beside it where items share SIDs. `ranks_of`
    reads it.
    """
    if ranks.dtype != SHARED:
        return {"ranks": ranks.tolist()}
    return {"ranks": ranks["rank"].tolist(), "sharers": ranks["sharers"].tolist()}


def ranks_of(results) -> np.ndarray:
    """[S, U]: the ranks of S results, dicts as `stored` makes them."""
    ranks = np.array([one["ranks"] for one in results])
    if not any("sharers" in one for one in results):
        return ranks
    return shared_ranks(
        ranks,
        np.array([one.get("sharers", np.ones(len(one["ranks"]), np.int64)) for one in results]),
    )


def recall_at(ranks, k: int) -> np.ndarray:
    """float64 [U]: 1 where the target is among the first k. With one target this is also the hit
    rate. Of `SHARED` ranks the share of the group's places that lie among the first k: clip(k −
    (rank − 1), 0, sharers) / sharers.
    """
    return _expected(ranks, k, np.ones_like)


def ndcg_at(ranks, k: int) -> np.ndarray:
    """float64 [U]: 1 / log2(1 + rank) where the target is among the first k, else 0. With one
    target the ideal DCG is 1 (Järvelin and Kekäläinen 2002). Of `SHARED` ranks the mean of that
    over the group's places.
    """
    return _expected(ranks, k, lambda places: 1 / np.log2(1 + places))


METRICS = {
    "recall@5": (recall_at, 5),
    "recall@10": (recall_at, 10),
    "ndcg@5": (ndcg_at, 5),
    "ndcg@10": (ndcg_at, 10),
}


def per_user(ranks) -> dict:
    """{name of a metric: float64 [S, U]} of ranks, ints or `SHARED`, [U] or [S, U]."""
    return {
        name: np.array([function(of_seed, k) for of_seed in np.atleast_2d(ranks)])
        for name, (function, k) in METRICS.items()
    }


def summary(ranks) -> dict:
    """Means over users: {"recall@5": …, "recall@10": …, "ndcg@5": …, "ndcg@10": …}."""
    if np.size(ranks) == 0:
        raise ValueError("ranks must hold at least one user")
    return {name: float(values.mean()) for name, values in per_user(ranks).items()}


def bootstrap_interval(
    values, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """(low, high): percentile bootstrap interval, over users, of the mean of `values` [U] or [S, U]
    (Efron and Tibshirani 1993).

    Of several seeds (rows of the same users) each user's mean over seeds counts. So the interval
    says how the mean of these trained models would move with other users; how other seeds would
    move it, `seed_interval` says. Ranking metrics take few different values, so one multinomial
    draw of how often each occurs stands for drawing U users: the same distribution, in bounded
    memory.
    """
    values = _checked_values(values, "values").mean(axis=0)
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(
            f"level must be in (0, 1) and resamples at least 1, got {level} and {resamples}"
        )
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)  # [D]
    means = []
    chunk = max(1, _CELLS // len(counts))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        users = rng.multinomial(len(values), counts / len(values), size=size)  # [size, D]
        means.append(users @ distinct / len(values))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def seed_interval(of_seed, level: float = 0.95) -> tuple[float, float] | None:
    """(low, high): Student's t interval of the mean of `of_seed` [S], a number a seed: a metric, or
    the difference of two methods with the same seed (then it is that of the paired t-test).

    It says how other seeds would move the mean, on these users. None below `FEW_SEEDS`: so few say
    too little about their own spread, and are shown one by one instead.
    """
    of_seed = np.asarray(of_seed, np.float64)
    if of_seed.ndim != 1 or not np.isfinite(of_seed).all():
        raise ValueError(f"of_seed must be finite numbers [S], got shape {of_seed.shape}")
    if len(of_seed) < FEW_SEEDS:
        return None
    if np.ptp(of_seed) == 0:  # no spread, of which SciPy makes NaN
        return float(of_seed[0]), float(of_seed[0])
    from scipy import stats  # takes half a second, and those who only recommend never need it

    low, high = stats.ttest_1samp(of_seed, 0).confidence_interval(level)
    return float(low), float(high)


class PairedTest(NamedTuple):
    """How two methods differ on the same users."""

    difference: float  # mean of a − b
    interval: tuple[float, float]  # 95 %, over users: other users, these trained models
    p_value: float  # two-sided, over users
    by_seed: tuple[float, ...]  # the difference with each seed
    seed_interval: tuple[float, float] | None  # 95 %, over seeds; None below `FEW_SEEDS`


def paired_test(a, b, resamples: int = 10000, seed: int = 0) -> PairedTest:
    """Do two methods differ on the same users? Per-user values `a`, `b`: [U] or [S, U] (same users,
    same seeds).

    The interval over users is `bootstrap_interval` of the differences. The p-value is that of a
    sign-flip permutation test on them, averaged over seeds first: (1 + flips at least as extreme) /
    (1 + resamples). Both ask about these trained models; only `seed_interval`, of paired
    differences by seed, asks about others. Raises ValueError if users or seeds do not match.
    """
    a = _checked_values(a, "a")
    b = _checked_values(b, "b")
    if a.shape[1] != b.shape[1] or (a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0])):
        raise ValueError(
            f"a and b must hold the same users (and seeds), got [S, U] = {a.shape} and {b.shape}"
        )
    differences = a - b  # [S, U]
    by_seed = differences.mean(axis=1)
    interval = bootstrap_interval(differences, resamples=resamples, seed=seed)
    # [D]: flips leave sizes alone
    sizes, counts = np.unique(np.abs(differences.mean(axis=0)), return_counts=True)
    sizes, counts = sizes[sizes > 0], counts[sizes > 0]
    observed = abs(differences.mean(axis=0).sum())
    slack = 1e-9 * (sizes @ counts)  # a flip that gives the same sum in another order is as extreme
    rng = np.random.default_rng(seed)
    extreme = 0
    chunk = max(1, _CELLS // max(1, len(sizes)))
    for start in range(0, resamples, chunk):
        # [size, D]
        positive = rng.binomial(counts, 0.5, size=(min(chunk, resamples - start), len(counts)))
        extreme += int((np.abs((2 * positive - counts) @ sizes) >= observed - slack).sum())
    p_value = (1 + extreme) / (1 + resamples)
    return PairedTest(
        float(differences.mean()),
        interval,
        p_value,
        tuple(by_seed.tolist()),
        seed_interval(by_seed),
    )


def _expected(ranks, k, gain):
    """The mean of gain(place), 0 beyond k, over the places the target may have: float64 [U]."""
    ranks = np.asarray(ranks)
    first, sharers = (
        (ranks["rank"], ranks["sharers"])
        if ranks.dtype == SHARED
        else (ranks, np.ones(ranks.shape, np.int64))
    )
    found = _found(first, k)
    total = np.zeros(first.shape)
    for step in range(min(k, sharers.max(initial=1))):
        inside = found & (step < sharers) & (first + step <= k)
        total += np.where(inside, gain(np.maximum(first + step, 1).astype(np.float64)), 0.0)
    return total / sharers


def _found(ranks, k):
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if ranks.ndim != 1 or (ranks.size and ranks.min() < 0):
        raise ValueError(
            f"ranks must be [U], 1 for the top and 0 for missing, got shape {ranks.shape}"
        )
    return (ranks >= 1) & (ranks <= k)


def _checked_values(values, name):
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))  # [S, U]
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"{name} must be finite numbers [U] or [S, U], at least one user, got shape"
            f" {values.shape}"
        )
    return values
