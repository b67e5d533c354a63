"""The checks of measuring: metrics, cost, whole items, and what one brings oneself."""

import math

import numpy as np
import torch

from sidlab import metrics
from sidlab.course.checks import register
from sidlab.saliency import Signals
from sidlab.sids.trie import Trie

_draw = torch.Generator().manual_seed(1)
# 0: the target was not among the recommended items
_ranks = np.array([1, 0, 3, 10, 11, 0, 2, 5, 40])


def _mean_at(gain, hit=lambda ranks, k: (ranks > 0) & (ranks <= k)):
    return lambda ranks, k: np.where(hit(ranks, k), gain(np.maximum(ranks, 1)), 0).mean()


_wrong_hits = {
    "Rank 0 counts as a hit: it means that the target is missing, and gives 0.": (
        lambda ranks, k: ranks <= k
    ),
    "Rank k is left out: ranks count from 1, so rank k is among the first k.": (
        lambda ranks, k: (ranks > 0) & (ranks < k)
    ),
    "Ranks beyond k count: they give 0.": lambda ranks, k: ranks > 0,
}

register(
    "recall_at_k",
    [(_ranks, 1), (_ranks, 5), (_ranks, 10)],
    lambda ranks, k: float(metrics.recall_at(ranks, k).mean()),
    {
        **{message: _mean_at(np.ones_like, hit) for message, hit in _wrong_hits.items()},
        "The mean is over found targets only: every user counts.": (
            lambda ranks, k: (ranks[ranks > 0] <= k).mean()
        ),
        "This is the number of hits: divide by the number of users.": (
            lambda ranks, k: ((ranks > 0) & (ranks <= k)).sum()
        ),
    },
)

register(
    "ndcg",
    [(_ranks, 1), (_ranks, 5), (_ranks, 10)],
    lambda ranks, k: float(metrics.ndcg_at(ranks, k).mean()),
    {
        **{
            message: _mean_at(lambda ranks: 1 / np.log2(1 + ranks), hit)
            for message, hit in _wrong_hits.items()
        },
        (
            "The discount is log2(2 + rank), as if ranks counted from 0: rank 1 is the top, so"
            " log2(1 + rank)."
        ): _mean_at(lambda ranks: 1 / np.log2(2 + ranks)),
        "The discount uses the natural logarithm: use log2, so that the top gives 1.": _mean_at(
            lambda ranks: 1 / np.log(1 + ranks)
        ),
        "This is the reciprocal rank: the discount is 1 / log2(1 + rank).": _mean_at(
            lambda ranks: 1 / ranks
        ),
        "The mean is over found targets only: every user counts.": (
            lambda ranks, k: metrics.ndcg_at(ranks[ranks > 0], k).mean()
        ),
    },
)

register(
    "real_tokens",
    [([3, 10, 30, 45], 30, 4), ([1, 2, 3], 20, 5)],
    lambda lengths, max_items, tokens: float(np.minimum(lengths, max_items).mean() / max_items),
    {
        (
            "Histories longer than max_items are counted whole: only their last max_items items"
            " get slots."
        ): (lambda lengths, max_items, tokens: np.mean(lengths) / max_items),
        "This pads to the longest history: every history is padded to max_items.": (
            lambda lengths, max_items, tokens: (
                np.minimum(lengths, max_items).mean() / max(np.minimum(lengths, max_items))
            )
        ),
        "This is the share of padding: the share of real slots is asked.": (
            lambda lengths, max_items, tokens: 1 - np.minimum(lengths, max_items).mean() / max_items
        ),
        "Items are compared with tokens: multiply both, or neither, by tokens_per_item.": (
            lambda lengths, max_items, tokens: (
                np.minimum(lengths, max_items).mean() / (max_items * tokens)
            ),
            lambda lengths, max_items, tokens: (
                np.minimum(lengths, max_items).mean() * tokens / max_items
            ),
            lambda lengths, max_items, tokens: (
                np.minimum(np.multiply(lengths, tokens), max_items).mean() / max_items
            ),
        ),
    },
)

register(
    "attention_flops",
    [(150, 128), (50, 64)],
    lambda n, d: 4 * n * n * d,
    {
        (
            "This is too small: there are two products of n · n · d (scores, and the weighted"
            " sum), and a multiply-add counts 2."
        ): (
            lambda n, d: 2 * n * n * d,
            lambda n, d: n * n * d,
        ),
        (
            "This counts the projections, which are linear in n: scores and weighted sum alone are"
            " asked."
        ): (
            lambda n, d: 8 * n * d * d,
            lambda n, d: 4 * n * n * d + 8 * n * d * d,
        ),
    },
)


register(
    "crossover",
    [(128, 512), (64, 128)],
    lambda d, f: 2 * d + f,
    {
        "The projections are forgotten: they are linear in n, too, 8 · n · d².": lambda d, f: f,
        "The feed-forward layer is forgotten: it is linear in n, too, 4 · n · d · f.": (
            lambda d, f: 2 * d
        ),
        (
            "The projections are four products of n · d · d, so 8 · n · d²: divided by 4 · n · d"
            " that is 2 · d."
        ): (lambda d, f: d + f),
        (
            "The feed-forward layer has two products of n · d · f, so 4 · n · d · f: divided by 4"
            " · n · d that is f."
        ): (lambda d, f: 2 * d + 2 * f),
    },
)


def _lost(lengths, keep, places=lambda keep, real: int(keep * 150 + 1e-6), most=30, each=False):
    real = np.array([5 * min(n, most) for n in lengths])
    lost = np.array([max(0, n - places(keep, n)) for n in real])
    return float((lost / real).mean() if each else lost.sum() / real.sum())


register(
    "lost_share",
    [([5, 8, 14, 45], 1 / 3), ([3, 12, 30], 0.2), ([3, 12, 30], 0.25)],
    _lost,
    {
        (
            "This keeps a share of each history's own tokens: the published rule takes it of all"
            " 150 slots."
        ): lambda lengths, keep: _lost(
            lengths, keep, lambda keep, real: math.ceil(keep * real - 1e-6)
        ),
        "Longer histories are cut to 30 items first.": lambda lengths, keep: _lost(
            lengths, keep, most=10**6
        ),
        "This is the mean of each history's share: sum tokens over all histories, then divide.": (
            lambda lengths, keep: _lost(lengths, keep, each=True)
        ),
        "This is the share that stays: the share that is removed is asked.": (
            lambda lengths, keep: 1 - _lost(lengths, keep)
        ),
    },
)

_sids = np.random.default_rng(0).integers(0, 4, (40, 3))
register(
    "trie_nodes",
    [(np.array([[0, 1], [3, 1], [0, 2], [3, 1]]),), (_sids,)],
    lambda codes: list(Trie(codes, 4).n_nodes[1:]),
    {
        "This counts the codes of each level: count beginnings, [0, 1] and [3, 1] are two.": (
            lambda codes: [len(np.unique(column)) for column in codes.T]
        ),
        "This counts items: two with the same SID share their nodes.": (
            lambda codes: [len(codes)] * codes.shape[1]
        ),
        "This starts with the root, depth 0: depths 1 to L are asked.": lambda codes: list(
            Trie(codes, 4).n_nodes[:-1]
        ),
    },
)


def _codes_only(signals, size=lambda hidden: hidden.abs().sum(-1), fill=-torch.inf, level=3):
    return torch.where(signals.levels == level, fill, signals.centrality * size(signals.hidden))


_place = torch.arange(12).repeat(2, 1)
_signals = Signals(
    hidden=torch.randn(2, 12, 8, generator=_draw),
    centrality=torch.rand(2, 12, generator=_draw),
    mask=torch.ones(2, 12, dtype=torch.long),
    positions=_place,
    levels=_place % 4,
    item_index=_place // 4,
)
register(
    "codes_only",
    [(_signals,)],
    _codes_only,
    {
        "Separators score 0: a code can score next to 0 as well. Give them −∞.": (
            lambda signals: _codes_only(signals, fill=0.0)
        ),
        "This is rastp with its separators: nothing is ruled out.": lambda signals: _codes_only(
            signals, level=9
        ),
        (
            "This rules out the last code, not the separator: levels count from 0, and the"
            " separator has the highest."
        ): lambda signals: _codes_only(signals, level=2),
        "This takes the Euclidean norm; RASTP's size is the L1 norm, abs().sum(-1).": (
            lambda signals: _codes_only(signals, lambda hidden: hidden.norm(dim=-1))
        ),
    },
)


def _nearest_share(embeddings, codes, unit=True, itself=False, level=slice(0, 1)):
    rows = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True) if unit else embeddings
    alike = rows @ rows.T
    if not itself:
        alike = alike - np.diag(np.full(len(rows), np.inf))
    return float((codes[alike.argmax(1), level] == codes[:, level]).all(1).mean())


_rng = np.random.default_rng(3)
_vectors = (
    _rng.normal(size=(40, 6)) + 3 * np.eye(6)[_rng.integers(6, size=40)] + _rng.normal(size=6)
)
_vectors *= _rng.uniform(0.2, 5, size=(40, 1))
_first = np.stack([_vectors.argmax(1) % 4, _rng.integers(3, size=40)], axis=1)
register(
    "nearest_share",
    [(_vectors, _first)],
    _nearest_share,
    {
        "Every item is its own nearest one here: leave the diagonal out.": (
            lambda *both: _nearest_share(*both, itself=True)
        ),
        "These are dot products: long vectors win. Normalise the rows first.": (
            lambda *both: _nearest_share(*both, unit=False)
        ),
        "This asks for the whole SID; only the first code counts.": lambda *both: _nearest_share(
            *both, level=slice(None)
        ),
    },
)


def _relative(votes, mask, count=lambda mask: mask.sum(1, keepdim=True), weigh=True, clear=True):
    total = (votes * mask if weigh else votes).sum(1, keepdim=True)
    share = votes / (total / count(mask))
    return share * mask if clear else share


_real = (torch.arange(8) < torch.tensor([[8], [5], [2]])).long()
_votes = torch.rand(3, 8, generator=_draw) + 0.1
register(
    "relative_centrality",
    [(_votes, _real)],
    _relative,
    {
        "Padding is in the mean: sum over real tokens and divide by their number.": (
            lambda votes, mask: _relative(votes, mask, lambda mask: mask.shape[1], weigh=False),
            lambda votes, mask: _relative(votes, mask, weigh=False),
        ),
        "The sum is over real tokens, but it is divided by the padded length.": (
            lambda votes, mask: _relative(votes, mask, lambda mask: mask.shape[1])
        ),
        "Padding keeps a score: set it to 0.": lambda votes, mask: _relative(
            votes, mask, clear=False
        ),
        "This is the share of the sum, not of the mean.": lambda votes, mask: _relative(
            votes, mask, lambda mask: 1
        ),
    },
)


def _interval(values, ends=(0.025, 0.975)):
    return np.quantile(values, ends)


_hits = (_rng.random(40) < 0.5).astype(float)
_other = np.where(_rng.random(40) < 0.2, 1 - _hits, _hits)
_users = _rng.integers(0, 40, (200, 40))
register(
    "paired_interval",
    [(_hits, _other, _users), (_other, _hits, _users[:50])],
    lambda a, b, users: _interval((a - b)[users].mean(1)),
    {
        "This is b − a: the difference is asked for as a − b.": lambda a, b, users: _interval(
            (b - a)[users].mean(1)
        ),
        (
            "This subtracts the ends of two separate intervals: subtract user by user first, then"
            " resample."
        ): (
            lambda a, b, users: _interval(a[users].mean(1)) - _interval(b[users].mean(1)),
            lambda a, b, users: _interval(a[users].mean(1)) - _interval(b[users].mean(1))[::-1],
        ),
        (
            "These are the quantiles of single users' differences: take the mean of each resample"
            " first."
        ): (
            lambda a, b, users: _interval((a - b)[users]),
            lambda a, b, users: _interval(a - b),
        ),
        (
            "The mean is over the resamples, one for each user: take it over the users of a"
            " resample, axis 1."
        ): lambda a, b, users: _interval((a - b)[users].mean(0)),
        "These are the 5 % and 95 % quantiles, which hold 90 %: take 2.5 % and 97.5 %.": (
            lambda a, b, users: _interval((a - b)[users].mean(1), (0.05, 0.95))
        ),
    },
)
