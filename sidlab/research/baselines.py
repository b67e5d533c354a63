"""What any model has to beat: the most popular items, and a table of items that stand next to each
other.

Both take one second to fit and no GPU. On Amazon Beauty and Sports the table is better than the
published TIGER.
"""

import numpy as np
import pandas as pd


class Popularity:
    """The most popular items of the training part, the same for all; ties: the lower item id."""

    def fit(self, train_histories, n_items: int):
        """train_histories: int64 arrays of item ids, each user's part for training
        (`history[:-2]`); may be empty.
        """
        # [n_items + 1]
        counts = np.bincount(flat_histories(train_histories, n_items)[0], minlength=n_items + 1)
        self.n_items_ = n_items
        # [n_items] item ids, most popular first
        self.popular_ = 1 + np.argsort(-counts[1:], kind="stable")
        return self

    def recommend(self, histories, k: int = 10, exclude_seen: bool = False) -> np.ndarray:
        """int64 [B, k] item ids, best first; 0 where the catalogue has no item left.

        exclude_seen: leave out what is in the user's history."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        items, lengths = flat_histories(histories, self.n_items_)
        ranked = np.zeros((len(lengths), k), dtype=np.int64)
        for row, history in enumerate(
            np.split(items, np.cumsum(lengths)[:-1]) if len(lengths) else ()
        ):
            most = k + len(history)
            best = pd.unique(
                np.concatenate([self._candidates(history, most), self.popular_[: 2 * most]])
            )
            best = best[~np.isin(best, history)][:k] if exclude_seen else best[:k]
            ranked[row, : len(best)] = best
        return ranked

    def _candidates(self, history, most):
        return np.empty(0, dtype=np.int64)


class NeighbourTable(Popularity):
    """Items that stood next to the history's items in somebody's training part.

    Each adjacent pair a, b of a training history adds 1 to b's weight as a neighbour of a, and 1/2
    to a's as one of b. A candidate's score is the sum over the history's items of its weight as
    their neighbour / (1 + steps back), where the last item is 0 steps back. Repeats count each
    time. The most popular items fill the list up.

    Many scores tie exactly: on the Amazon sets over 90 % of the pairs occur once. A tie goes to the
    candidate that the more recent item of the history proposes, then to the neighbour that was met
    first in training (in the order of users). Scores are rounded to 1e-9 before, so that ties don't
    depend on the order of a sum. The rule matters by up to .001 in recall: this is the one behind
    the numbers we print (see tests/test_baselines.py).
    """

    def fit(self, train_histories, n_items: int):
        """train_histories: int64 arrays of item ids, each user's part for training
        (`history[:-2]`); may be empty.
        """
        train_histories = list(train_histories)
        super().fit(train_histories, n_items)
        items, lengths = flat_histories(train_histories, n_items)
        user = np.repeat(np.arange(len(lengths)), lengths)
        adjacent = np.flatnonzero(user[1:] == user[:-1])
        left = items[adjacent]
        right = items[adjacent + 1]
        source = np.stack([left, right], axis=1).ravel()  # each pair once forward, once backward
        target = np.stack([right, left], axis=1).ravel()
        pairs, met, which = np.unique(
            source * (n_items + 1) + target, return_index=True, return_inverse=True
        )
        weight = np.bincount(
            which, weights=np.tile([1.0, 0.5], len(adjacent)), minlength=len(pairs)
        )
        order = np.lexsort((met, pairs // (n_items + 1)))  # by source, then by first meeting
        self.neighbours_ = pairs[order] % (n_items + 1)
        self.weights_ = weight[order]
        # Rows of the table, as in CSR
        self.starts_ = np.searchsorted(pairs // (n_items + 1), np.arange(n_items + 2))
        return self

    def _candidates(self, history, most):
        """The `most` best candidates or somewhat more, best first."""
        recent = history[::-1]
        degrees = self.starts_[recent + 1] - self.starts_[recent]
        shifts = self.starts_[recent] - (np.cumsum(degrees) - degrees)
        # The recent items' rows, one by one
        cells = np.arange(degrees.sum()) + np.repeat(shifts, degrees)
        if not cells.size:
            return cells
        steps_back = np.repeat(np.arange(len(recent)), degrees)
        weights = self.weights_[cells] / (1 + steps_back)
        # Group equal candidates, each group in order of proposal. Sorting keys is several times
        # faster than np.unique.
        keys = np.sort(self.neighbours_[cells] * cells.size + np.arange(cells.size))
        neighbour, proposal = np.divmod(keys, cells.size)
        start = np.flatnonzero(np.diff(neighbour, prepend=0))  # item ids are positive
        scores = np.add.reduceat(weights[proposal], start).round(9)
        if len(scores) > most:
            kept = scores >= np.partition(scores, -most)[-most]
            start = start[kept]
            scores = scores[kept]
        return neighbour[start][np.lexsort((proposal[start], -scores))]


def flat_histories(histories, n_items):
    """All item ids in one array, and the length of each history."""
    histories = list(histories)
    items = np.concatenate([np.empty(0, dtype=np.int64), *histories])
    if items.size and (items.dtype != np.int64 or items.min() < 1 or items.max() > n_items):
        raise ValueError(
            f"histories must hold integer item ids in 1..{n_items}, got {items.dtype} "
            f"in {items.min()}..{items.max()}"
        )
    return items.astype(np.int64, copy=False), np.array(
        [len(history) for history in histories], dtype=np.int64
    )
