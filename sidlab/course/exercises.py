"""The checks of SIDs, scores, pruning and MAP: fixed inputs, the package's own function, and the
classic mistakes, each with what to tell the learner. `teach.check` runs them.
"""

import math

import numpy as np
import torch

from sidlab.course.checks import register
from sidlab.map_loss import map_loss
from sidlab.pruning import TokenPruner, kept_count
from sidlab.saliency import Signals, attention_centrality, semantic_saliency, token_importance
from sidlab.sids.encoder import residual_codes
from sidlab.sids.table import SidTable

_draw = torch.Generator().manual_seed(0)
# [B, N]: rows of 9, 5 and 1 real tokens
_mask = (torch.arange(9) < torch.tensor([[9], [5], [1]])).long()
# [B, H, N, N]
_attention = (
    torch.randn(3, 2, 9, 9, generator=_draw)
    .masked_fill(_mask[:, None, None] == 0, -torch.inf)
    .softmax(-1)
)
_hidden = torch.randn(3, 9, 8, generator=_draw)  # [B, N, d]
_centrality = attention_centrality(_attention, _mask)  # [B, N]
_importance = token_importance(Signals(_hidden, _centrality, _mask))  # [B, N]
_numpy = np.random.default_rng(0)
_books = [_numpy.normal(size=(6, 4)).astype(np.float32) * scale for scale in (2, 1, 0.5)]
# [n, L]
_codes = np.concatenate([_numpy.integers(0, 3, (20, 3)), [[0, 1, 2], [0, 1, 2], [2, 2, 1]]])


def _by_level(
    x,
    books,
    residual=lambda x, left, chosen: left - chosen,
    key=lambda left, book: ((left[:, None] - book) ** 2).sum(-1),
):
    codes = []
    left = x
    for book in books:
        codes.append(key(left, book).argmin(1))
        left = residual(x, left, book[codes[-1]])
    return np.stack(codes, axis=1)


register(
    "residual_codes",
    [(_numpy.normal(size=(30, 4)).astype(np.float32) * 2, _books)],
    residual_codes,
    {
        (
            "Every level quantises the same vector: subtract the chosen codebook row, so that the"
            " next level sees what is left."
        ): lambda x, books: _by_level(x, books, lambda x, left, chosen: left),
        (
            "Each level subtracts from the original vector: subtract from what the levels before"
            " have left."
        ): lambda x, books: _by_level(x, books, lambda x, left, chosen: x - chosen),
        (
            "This takes the row with the largest dot product, which favours long rows: take the"
            " one at the smallest distance."
        ): lambda x, books: _by_level(x, books, key=lambda left, book: -left @ book.T),
    },
)


def _groups(codes):
    return np.unique(codes, axis=0, return_counts=True)[1]


register(
    "collisions",
    [(_codes,), (_codes[:4] * 0 + np.arange(4)[:, None],)],
    lambda codes: SidTable(codes, int(codes.max()) + 1, collisions="share").report()[
        "collision_rate"
    ],
    {
        (
            "This is 1 - distinct / items: it leaves the first item of each group out, but that"
            " one shares its SID as well."
        ): (lambda codes: 1 - len(_groups(codes)) / len(codes)),
        "This is the share of the distinct SIDs that are shared: count items, not SIDs.": (
            lambda codes: (_groups(codes) > 1).mean()
        ),
        "This is the share of items whose SID is their own: the share of the others is asked.": (
            lambda codes: (_groups(codes) == 1).sum() / len(codes)
        ),
    },
)


def _shares(codes, width):
    return np.bincount(codes, minlength=width) / len(codes)


def _entropy(codes, width, log=np.log):
    share = _shares(codes, width)
    return -(share[share > 0] * log(share[share > 0])).sum()


def _entropy_of_all(codes, width):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(-(_shares(codes, width) * np.log(_shares(codes, width))).sum())


register(
    "perplexity",
    [(np.array([0, 0, 0, 1, 2, 2, 5]), 8), (_codes[:, 0], 4)],
    lambda codes, width: SidTable(codes[:, None], width, collisions="share").report()["per_level"][
        0
    ]["perplexity"],
    {
        "The entropy is in bits, but exp undoes the natural logarithm: use log, not log2.": (
            lambda codes, width: np.exp(_entropy(codes, width, np.log2))
        ),
        "The entropy is in nats, but 2 ** undoes log2: use exp.": (
            lambda codes, width: 2 ** _entropy(codes, width)
        ),
        "This is the entropy: perplexity is exp(entropy).": (
            _entropy,
            lambda codes, width: _entropy(codes, width, np.log2),
        ),
        (
            "This is the utilisation, used codes / width: it does not see how evenly the codes are"
            " used."
        ): (lambda codes, width: len(np.unique(codes)) / width),
        "This is the number of used codes: it does not see how evenly they are used.": (
            lambda codes, width: len(np.unique(codes))
        ),
        "An unused code gives 0 · log 0 = NaN: leave unused codes out of the sum.": _entropy_of_all,
    },
)

register(
    "centrality_of",
    [(_attention, _mask)],
    attention_centrality,
    {
        (
            "This sums over the keys, which is attention given: rows are queries, so sum over them"
            " for the attention received."
        ): (
            lambda attention, mask: attention.sum((1, 3)),
            lambda attention, mask: attention.sum((1, 3)) * mask,
            lambda attention, mask: attention.mean((1, 3)),
            lambda attention, mask: attention.mean((1, 3)) * mask,
        ),
        (
            "Padding votes: leave padded queries out of the sum, or most of the attention comes"
            " from them in a short history."
        ): (
            lambda attention, mask: attention.sum((1, 2)),
            lambda attention, mask: attention.mean(1).sum(1),
        ),
        "This averages over the heads: sum over them.": (
            lambda attention, mask: attention_centrality(attention, mask) / attention.shape[1]
        ),
        "This averages over queries: sum over them.": (
            lambda attention, mask: (
                attention_centrality(attention, mask) / mask.sum(1, keepdim=True)
            ),
            lambda attention, mask: attention_centrality(attention, mask) / mask.shape[1],
        ),
    },
)

register(
    "saliency_of",
    [(_hidden,)],
    semantic_saliency,
    {
        "This is the L2 norm: the L1 norm sums the absolute values.": lambda hidden: hidden.norm(
            dim=-1
        ),
        "This sums the values with their signs, so that they cancel: take absolute values first.": (
            lambda hidden: hidden.sum(-1)
        ),
        "This averages the absolute values: sum them.": lambda hidden: hidden.abs().mean(-1),
        "This sums over the tokens: sum over the last axis, the hidden size.": (
            lambda hidden: hidden.abs().sum(1)
        ),
    },
)


def _score(scorer):
    return lambda centrality, hidden, mask: token_importance(
        Signals(hidden, centrality, mask), scorer
    )


register(
    "importance_of",
    [(_centrality, _hidden, _mask)],
    _score("rastp"),
    {
        "Padding has a finite score: set it to -inf, or it could be kept.": (
            lambda centrality, hidden, mask: centrality * semantic_saliency(hidden)
        ),
        "This uses the L2 norm: RASTP's saliency is the L1 norm.": _score("rastp-l2"),
        "This adds the factors: multiply them.": _score(
            lambda s: s.centrality + semantic_saliency(s.hidden)
        ),
        "This is the centrality alone: multiply by the saliency.": _score("centrality"),
        "This is the saliency alone: multiply by the centrality.": _score("norm"),
    },
)


def _share_of(round_to):
    """The share of n rounded by `round_to`; at least 1 of what there is; at least 1."""
    return [
        lambda n, keep, least=least: max(least(n), round_to(n * keep))
        for least in (lambda n: 0, lambda n: min(n, 1), lambda n: 1)
    ]


register(
    "kept_count",
    [
        (0, 0.5),
        (1, 1 / 3),
        (2, 1 / 3),
        (5, 1 / 3),
        (10, 0.25),
        (10, 1.0),
        (30, 1 / 3),
        (31, 1 / 3),
        (100, 0.07),
    ],
    lambda n, keep: int(kept_count(torch.tensor(n), keep)),
    {
        (
            "This rounds down (floor): a share is rounded up (ceil), so that a short history keeps"
            " a token."
        ): _share_of(math.floor),
        "This rounds to the nearest: round up (ceil).": _share_of(round),
        "An empty history has nothing to keep: n = 0 gives 0.": (
            lambda n, keep: max(1, math.ceil(n * keep - 1e-6)),
            lambda n, keep: max(1, math.ceil(n * keep)),
        ),
        (
            "In floating point 0.07 · 100 is 7.000000000000001, and ceil makes 8 of it: subtract"
            " 1e-6 before rounding up."
        ): lambda n, keep: math.ceil(n * keep),
        "This is what is pruned: keep is the kept fraction.": (
            lambda n, keep: n - int(kept_count(torch.tensor(n), keep))
        ),
    },
)


def _best_first(importance, counts):
    """The positions of the `counts[b]` best tokens of each row, the best first."""
    return [row.argsort(descending=True).tolist()[:count] for row, count in zip(importance, counts)]


def _counts(mask, keep):
    return kept_count(mask.sum(1), keep).tolist()


def _padded_share(importance, mask, keep):
    return [
        sorted(row)
        for row in _best_first(importance, [math.ceil(keep * mask.shape[1] - 1e-6)] * len(mask))
    ]


register(
    "keep_top",
    [(_importance, _mask, 1 / 3), (_importance, _mask, 0.5)],
    lambda importance, mask, keep: [
        row.nonzero().flatten().tolist() for row in TokenPruner(keep).choose(mask, importance)
    ],
    {
        (
            "The positions stand in order of importance: sort them ascending, or the kept tokens"
            " change their order."
        ): lambda importance, mask, keep: _best_first(importance, _counts(mask, keep)),
        (
            "The positions are lost: 0, 1, 2 … count the kept tokens; give the places that they"
            " had in the full row."
        ): lambda importance, mask, keep: [list(range(count)) for count in _counts(mask, keep)],
        (
            "This keeps a share of the padded length: keep a share of each row's own real tokens,"
            " mask.sum(1)."
        ): (
            _padded_share,
            lambda *a: [[p for p in row if real[p]] for row, real in zip(_padded_share(*a), a[1])],
        ),
        "This rounds the share down (floor): round it up (ceil).": (
            lambda importance, mask, keep: [
                sorted(row) for row in _best_first(importance, (mask.sum(1) * keep + 1e-6).long())
            ],
            lambda importance, mask, keep: [
                sorted(row)
                for row in _best_first(importance, (mask.sum(1) * keep + 1e-6).long().clamp_min(1))
            ],
        ),
        "These are the least important tokens: keep the most important ones.": (
            lambda importance, mask, keep: [
                sorted(row)
                for row in (
                    _best_first(
                        (-importance).masked_fill(mask == 0, -torch.inf), _counts(mask, keep)
                    )
                )
            ]
        ),
    },
)


def _after(items, target, steps, shift=0, absent=None):
    places = range(target + 1 + shift, target + 1 + shift + steps)
    return [items[place] if place < len(items) else absent for place in places]


_bought = [31, 12, 45, 7, 26, 18]
register(
    "map_labels",
    [(_bought, 2, 2), (_bought, 3, 3), (_bought, 5, 2), ([9, 4], 0, 3)],
    _after,
    {
        "The labels begin at the target, one too early: step 1 predicts the item after it.": (
            lambda items, target, steps: _after(items, target, steps, shift=-1)
        ),
        "The labels begin one too late: step 1 predicts the item right after the target.": (
            lambda items, target, steps: _after(items, target, steps, shift=1)
        ),
        (
            "Steps beyond the training part are left out: give None for each, so that there are"
            " always S labels."
        ): lambda items, target, steps: items[target + 1 : target + 1 + steps],
        "Steps beyond the training part repeat its last item: they have no label, so give None.": (
            lambda items, target, steps: _after(items, target, steps, absent=items[-1])
        ),
    },
)

_losses = torch.rand(3, 3, 2, generator=_draw) * 4  # [B, S, L]
_labels = torch.full((3, 3, 2), -100)  # step 1 has three items, step 2 has one, step 3 none
_labels[:, 0] = 7
_labels[0, 1] = 8


def _step_sums(losses, labels):
    return torch.where(labels != -100, losses, 0).sum((0, 2))  # [S]


def _step_counts(losses, labels):
    return (labels != -100).sum((0, 2))  # [S]


def _step_means(losses, labels):
    return _step_sums(losses, labels) / _step_counts(losses, labels)  # [S], NaN without labels


register(
    "map_loss",
    [
        (_losses, _labels),
        (_losses, torch.full_like(_labels, -100)),
        (_losses.masked_fill(_labels == -100, torch.nan), _labels),
    ],
    map_loss,
    {
        (
            "0 · NaN is NaN, so multiplying by a mask does not hide what stands there: choose with"
            " torch.where."
        ): (
            lambda losses, labels: (
                (
                    (losses * (labels != -100)).sum((0, 2))
                    / _step_counts(losses, labels).clamp_min(1)
                ).sum()
                / (_step_counts(losses, labels) > 0).sum().clamp_min(1)
            )
        ),
        (
            "This averages over all labels at once, so that later steps, which have fewer, weigh"
            " less: average each step, then the steps."
        ): (
            lambda *a: _step_sums(*a).sum() / _step_counts(*a).sum(),
            lambda *a: _step_sums(*a).sum() / _step_counts(*a).sum().clamp_min(1),
        ),
        "Places without a label (-100) count as a loss of 0: divide by the number of labels.": (
            lambda *a: _step_sums(*a).sum() / a[0].numel()
        ),
        "Places without a label (-100) count like the others: leave them out.": (
            lambda losses, labels: losses.mean()
        ),
        (
            "A step without labels counts as a loss of 0: divide by the number of steps that have"
            " labels."
        ): (lambda *a: _step_means(*a).nan_to_num().mean()),
        "A step without labels gives 0 / 0 = NaN: leave such steps out.": (
            lambda *a: _step_means(*a).mean()
        ),
        "Without any label this is 0 / 0 = NaN: it has to be 0.": (
            lambda *a: _step_means(*a).nanmean()
        ),
        "This sums over the steps: average over those that have labels.": (
            lambda *a: _step_means(*a).nansum()
        ),
    },
)


def _gather(hidden, positions):
    return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))  # [B, K, d]


register(
    "gather",
    [(_hidden, torch.tensor([[1, 4, 7, 8], [1, 2, 3, 5], [2, 5, 6, 7]]))],
    _gather,
    {
        (
            "These are the first K tokens: the positions are lost; take the tokens that stand at"
            " them."
        ): lambda hidden, positions: hidden[:, : positions.shape[1]],
        "Every row takes the tokens at the first row's positions: each row has its own.": (
            lambda hidden, positions: hidden[:, positions[0]]
        ),
        (
            "hidden[:, positions] takes every row's positions in every row, [B, B, K, d]: index"
            " the batch axis as well, or use gather."
        ): lambda hidden, positions: hidden[:, positions],
        "The positions are read as if they counted from 1: they count from 0.": (
            lambda hidden, positions: _gather(hidden, (positions - 1).clamp_min(0))
        ),
    },
)
