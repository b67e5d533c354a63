"""Which windows make a batch, and which batches an update: every target weighs the same."""

from collections.abc import Iterator

import numpy as np
import torch


class LengthBatches(torch.utils.data.Sampler):
    """Batches of windows of similar length, `batch_tokens` slots each, newly shuffled every epoch.

    Windows are sorted by length with ties in random order, cut into batches, and the batches
    shuffled. The cuts depend on the lengths alone, so the number of batches is the same in every
    epoch. `tokens_per_item` turns lengths into slots. An epoch has a multiple of `accumulation`
    batches, whole updates: those at the end of the shuffle that fill none are left out. `mixed`: as
    many batches of as many windows, but of windows drawn without regard to length, to see what
    similar lengths change.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        tokens_per_item: int,
        batch_tokens: int,
        seed: int = 0,
        accumulation: int = 1,
        mixed: bool = False,
    ):
        longest = int(lengths.max()) * tokens_per_item
        if batch_tokens < longest:
            raise ValueError(
                f"batch_tokens={batch_tokens} is less than one window's {longest} tokens"
            )
        self.lengths = lengths
        self.seed = seed
        self.accumulation = accumulation
        self.mixed = mixed
        self.epoch = 0
        ordered = np.sort(lengths) * tokens_per_item
        cuts = [0]
        begin = 0
        while begin < len(ordered):
            # The longest window that still fits decides: slots = windows in the batch × its length.
            size = np.arange(1, min(batch_tokens // ordered[begin], len(ordered) - begin) + 1)
            begin += int(
                np.searchsorted(
                    size * ordered[begin : begin + len(size)], batch_tokens, side="right"
                )
            )
            cuts.append(begin)
        self.cuts = np.array(cuts)

    def set_epoch(self, epoch: int):
        """Choose the shuffle."""
        self.epoch = epoch

    def __len__(self):
        batches = len(self.cuts) - 1
        # Fewer than an update takes make a small one
        return batches // self.accumulation * self.accumulation or batches

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        if not self.mixed:
            order = order[np.argsort(self.lengths[order], kind="stable")]
        for b in rng.permutation(len(self.cuts) - 1)[: len(self)]:
            yield order[self.cuts[b] : self.cuts[b + 1]].tolist()


class StratifiedBatches(torch.utils.data.Sampler):
    """Updates in which every window weighs the same: samples of all lengths in proportion, as
    `accumulation` batches of similar length.

    An update has `size` windows, as many as fit `accumulation · batch_tokens` slots with their
    padding (or all, if fewer); batch c has `cuts[c]` to `cuts[c + 1]` of them, by length, cut so
    that the update has least padding. The epoch's windows, sorted by length with ties in random
    order, are dealt in blocks of one window for each update, so that all updates have (nearly) the
    same lengths and shapes come back. Up to `size` − 1 windows that fill no update are left out,
    each as likely as any other, anew every epoch. The batches with most slots come first.
    `tokens_per_item` turns lengths (int [windows], items of history) into slots. `mixed`: batches
    of as many windows, but drawn without regard to length. ValueError where an update would have
    fewer windows than batches.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        tokens_per_item: int,
        batch_tokens: int,
        seed: int = 0,
        accumulation: int = 1,
        mixed: bool = False,
    ):
        if len(lengths) < accumulation:
            raise ValueError(
                f"accumulation={accumulation} batches an update need as many windows, got"
                f" {len(lengths)}; use less"
            )
        self.lengths = lengths
        self.seed = seed
        self.accumulation = accumulation
        self.mixed = mixed
        self.epoch = 0
        distinct, counts = np.unique(lengths, return_counts=True)
        upto = np.cumsum(counts)
        budget = accumulation * batch_tokens // tokens_per_item
        # First as if a window could be parted; whole ones may need a little more, since what is
        # left of a length is padded to the next.
        ends = _least_padding(distinct, counts, accumulation)
        padded = int((np.diff(upto[ends], prepend=0) * distinct[ends]).sum())
        self.size = min(len(lengths), budget * len(lengths) // padded)
        while self.size >= accumulation:
            # Of the update's windows in order, so many must be as short as that in every update,
            # whatever is left out.
            short = upto * self.size // len(lengths)
            have = np.flatnonzero(np.diff(short, prepend=0))
            self.cuts, longest = _cut(distinct[have], np.diff(short[have], prepend=0), accumulation)
            if (np.diff(self.cuts) * longest).sum() <= budget:
                break
            self.size -= 1
        else:
            raise ValueError(
                f"batch_tokens={batch_tokens} is less than a window takes on average; use "
                f"{distinct[-1] * tokens_per_item}, the tokens of the longest, or more"
            )
        self.order = np.argsort(-np.diff(self.cuts) * longest, kind="stable")

    def set_epoch(self, epoch: int):
        """Choose the shuffle."""
        self.epoch = epoch

    def __len__(self):
        return self.accumulation * (len(self.lengths) // self.size)

    def updates(self) -> np.ndarray:
        """An epoch's windows, int64 [size, updates]: a column each, by length unless `mixed`."""
        rng = np.random.default_rng((self.seed, self.epoch))
        windows = len(self.lengths)
        order = rng.permutation(windows)
        if not self.mixed:
            order = order[np.argsort(self.lengths[order], kind="stable")]
        # Evenly spaced places from a random start: each place is left out with the same
        # probability.
        few = windows % self.size
        left_out = (np.arange(few) * windows + rng.integers(windows)) // max(few, 1)
        return rng.permuted(np.delete(order, left_out).reshape(self.size, -1), axis=1)

    def __iter__(self) -> Iterator[list[int]]:
        for update in self.updates().T:
            for c in self.order:
                yield update[self.cuts[c] : self.cuts[c + 1]].tolist()


def _least_padding(lengths, counts, classes):
    """Cut ascending `lengths` with `counts` windows each into at most `classes` classes, padded to
    their longest, with least slots in all: the index of each class's longest, int64 [classes].
    Dynamic programming over where the last class begins.
    """
    upto = np.concatenate([[0], np.cumsum(counts)])
    # Slots of a class of lengths[i:j], at [i, j]
    slots = np.where(
        np.tri(len(upto), k=0, dtype=bool),
        np.inf,
        (upto - upto[:, None]) * np.concatenate([[0], lengths]),
    )
    best = slots[0]
    begins = []
    for _ in range(min(classes, len(lengths)) - 1):
        total = best[:, None] + slots
        begins.append(total.argmin(0))
        best = total.min(0)
    ends = [len(lengths)]
    for begin in reversed(begins):
        ends.append(int(begin[ends[-1]]))
    return np.array(ends[::-1]) - 1


def _cut(lengths, counts, classes):
    """`classes` classes of an update's windows with least padding: (where they begin and end, int64
    [classes + 1]; the longest of each).
    """
    ends = _least_padding(lengths, counts, classes)
    cuts = np.concatenate([[0], np.cumsum(counts)[ends]])
    longest = lengths[ends]
    while len(longest) < classes:  # fewer lengths than that: halve what has most slots
        size = np.diff(cuts)
        c = int(np.argmax(np.where(size > 1, size * longest, 0)))
        cuts = np.insert(cuts, c + 1, (cuts[c] + cuts[c + 1]) // 2)
        longest = np.insert(longest, c, longest[c])
    return cuts, longest


class UserBatches(torch.utils.data.Sampler):
    """The published updates: `accumulation` groups of `users` users, of each group's windows at
    most `limit` drawn at random.

    An update's windows are dealt to its `accumulation` batches by length: its gradient stays the
    same, and it needs hardly any padding. Users that fill no whole update wait for another epoch's
    shuffle. (The published code draws with replacement, so that of 512 windows about 412 are
    distinct, and its loss is the mean of its batches' means.) ValueError where an update could have
    fewer windows than batches.
    """

    def __init__(
        self,
        windows,
        accumulation: int,
        seed: int = 0,
        *,
        users: int = 32,
        limit: int = 512,
    ):
        self.windows = windows
        self.accumulation = accumulation
        self.seed = seed
        self.users = users
        self.limit = limit
        self.epoch = 0
        self.with_windows = np.flatnonzero(np.diff(windows.of_user))
        if min(len(self.with_windows), limit) < accumulation:
            raise ValueError(
                f"accumulation={accumulation} batches an update need as many users and windows of"
                f" each group, got {len(self.with_windows)} users with windows and limit={limit}"
            )

    def set_epoch(self, epoch: int):
        """Choose the shuffle."""
        self.epoch = epoch

    def __len__(self):
        return self.accumulation * max(
            1, len(self.with_windows) // (self.users * self.accumulation)
        )

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.with_windows)
        size = self.users * self.accumulation
        of_user = self.windows.of_user
        all_lengths = self.windows.lengths
        for update in range(len(self) // self.accumulation):
            drawn = []
            for begin in range(update * size, min((update + 1) * size, len(order)), self.users):
                group = np.concatenate(
                    [
                        np.arange(of_user[u], of_user[u + 1])
                        for u in order[begin : begin + self.users]
                    ]
                )
                drawn.append(rng.permutation(group)[: self.limit])
            drawn = np.concatenate(drawn)
            lengths = all_lengths[drawn]
            # No padding at all, but too many or too few
            batches = [drawn[lengths == n] for n in np.unique(lengths)]
            # Merge the two neighbours whose merging adds least padding
            while len(batches) > self.accumulation:
                longest = [all_lengths[batch[0]] for batch in batches]
                i = int(np.argmin([len(batch) for batch in batches[:-1]] * np.diff(longest)))
                # The longest first
                batches[i : i + 2] = [np.concatenate([batches[i + 1], batches[i]])]
            while len(batches) < self.accumulation:
                i = int(np.argmax([len(batch) for batch in batches]))
                batches[i : i + 1] = np.array_split(batches[i], 2)
            yield from (batch.tolist() for batch in batches)
