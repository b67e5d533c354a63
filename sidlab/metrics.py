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
from scipy.special import stdtrit

SHARED = np.dtype([("rank", np.int64), ("sharers", np.int64)])
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


class SeedNoise(NamedTuple):
    """How much a mean over users moves from seed to seed."""

    deviation: float  # standard, of one seed
    freedom: float  # the degrees of freedom that it was estimated with


def pooled_seed_noise(means) -> tuple[SeedNoise, SeedNoise]:
    """What several settings tell together of seeds, of which there are few: two seeds of one
    setting leave a single degree of freedom.

    `means`: [K, S], a mean over users for each of K settings and S > 1 seeds, the same ones for
    all. It is assumed that seeds move all settings alike much, by a part that settings share and
    one that is each one's own (two-way analysis of variance without replication).
    Returns the noise of a setting (freedom by Satterthwaite 1946), and that of what settings do not
    share: a difference of two has √2 times that. Of one setting there is nothing of the latter.
    Differences are exact; a setting's own 95 % interval holds in 88 to 93 % of cases only where two
    or three seeds move all settings together by much more than each alone. ValueError for other
    shapes.
    """
    means = np.asarray(means, np.float64)
    if means.ndim != 2 or means.shape[0] < 1 or means.shape[1] < 2:
        raise ValueError(
            f"means must be [K, S] with at least one setting and two seeds, got shape {means.shape}"
        )
    n_settings, n_seeds = means.shape
    of_seed = means.mean(axis=0) - means.mean()
    own = means - means.mean(axis=1, keepdims=True) - of_seed
    shared = (of_seed**2).sum() / (n_seeds - 1)
    freedom = (n_settings - 1) * (n_seeds - 1)
    own = (own**2).sum() / freedom if freedom else 0.0
    part = own * (1 - 1 / n_settings)
    spread = shared**2 / (n_seeds - 1) + (part**2 / freedom if freedom else 0.0)
    both = (shared + part) ** 2 / spread if spread else n_seeds - 1
    return SeedNoise((shared + part) ** 0.5, both), SeedNoise(own**0.5, freedom)


def bootstrap_interval(
    values,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    noise: SeedNoise | None = None,
) -> tuple[float, float]:
    """(low, high): percentile bootstrap interval of the mean of `values` [U] or [S, U] (Efron and
    Tibshirani 1993).

    Users are drawn with replacement. With S > 1 (rows of the same users) another seed is another
    model: each draw is moved by Student's t with S − 1 degrees of freedom times the standard error
    over seeds. Drawing a handful of seeds with replacement instead shows too little of their spread
    (of three, hardly more than a third of the width). That spread holds the noise of user and seed
    together, so it is taken off the draws of users, of which there are many; taken off the few
    seeds, it would often leave nothing of their spread. `noise`: what other settings tell of seeds,
    too (`pooled_seed_noise`); by default these rows alone tell it. Ranking metrics take few
    different values, so one multinomial draw of how often each occurs stands for drawing U users:
    the same distribution, in bounded memory.
    """
    values = _checked_values(values, "values")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(
            f"level must be in (0, 1) and resamples at least 1, got {level} and {resamples}"
        )
    if noise is not None and noise.freedom <= 0:
        raise ValueError(
            f"noise has no degree of freedom: of one setting there is no difference, got {noise}"
        )
    rng = np.random.default_rng(seed)
    n_seeds, n_users = values.shape
    distinct, counts = np.unique(values, axis=1, return_counts=True)  # [S, D], [D]
    means = []
    chunk = max(1, _CELLS // len(counts))
    for start in range(0, resamples, chunk):
        # [size, D]
        users = rng.multinomial(n_users, counts / n_users, size=min(chunk, resamples - start))
        means.append(users @ distinct.mean(axis=0) / n_users)
    means = np.concatenate(means)
    if n_seeds > 1:
        places = (rng.permutation(resamples) + 0.5) / resamples  # evenly, for the tails are long
        noise = noise or SeedNoise(values.mean(axis=1).std(ddof=1), n_seeds - 1)
        middle = values.mean()
        means = middle + (means - middle) * _share_of_users(values)
        means += stdtrit(noise.freedom, places) * noise.deviation / n_seeds**0.5
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _share_of_users(values):
    """What of the spread of users' means in `values` [S, U] is not noise of user and seed together,
    as a share of standard deviations.
    """
    n_seeds = len(values)
    of_user = values.mean(axis=0)
    noise = values - values.mean(axis=1, keepdims=True) - of_user + values.mean()
    noise = (noise**2).sum() / (n_seeds - 1) / n_seeds
    spread = ((of_user - of_user.mean()) ** 2).sum()
    return max(0.0, 1 - noise / spread) ** 0.5 if spread else 0.0


class PairedTest(NamedTuple):
    difference: float
    interval: tuple[float, float]
    p_value: float


def paired_test(
    a, b, resamples: int = 10000, seed: int = 0, noise: SeedNoise | None = None
) -> PairedTest:
    """Do two methods differ on the same users? Per-user values `a`, `b`: [U] or [S, U] (same users,
    same seeds).

    difference: mean of a − b. interval: its 95 % bootstrap interval over users (and seeds; `noise`:
    that of the difference, as in `bootstrap_interval`). p_value: two-sided sign-flip permutation
    test on the per-user differences, averaged over seeds first: (1 + flips at least as extreme) /
    (1 + resamples). It asks about these trained models; only the interval asks about other seeds,
    so it can include 0 where p is small.
    """
    a = _checked_values(a, "a")
    b = _checked_values(b, "b")
    if a.shape[1] != b.shape[1] or (a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0])):
        raise ValueError(
            f"a and b must hold the same users (and seeds), got [S, U] = {a.shape} and {b.shape}"
        )
    differences = a - b  # [S, U]
    interval = bootstrap_interval(differences, resamples=resamples, seed=seed, noise=noise)
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
    return PairedTest(float(differences.mean()), interval, (1 + extreme) / (1 + resamples))


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
