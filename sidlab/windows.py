"""From histories to batches: the leave-one-out split, training windows, batches of similar length,
the collator.

The last item of a user is the test target, the one before it the validation target, the rest is for
training. A training window is one prefix of that rest and its next item: every prefix is used once
an epoch. The published code instead draws from all contiguous stretches, early starts and late ones
(`kind="contiguous"`, `UserBatches`).

The published code pads every history to a fixed number of slots. Here an update is cut into batches
of similar length, so that with 16 of them at least 95 % of the slots are real; `fixed_slots=True`
keeps the very same batches and pads them as published, so that only the padding differs.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from sidlab.checks import as_histories, integer, one_of
from sidlab.map_loss import MapConfig, map_labels
from sidlab.sids.table import PAD, SEP, SidTable


@dataclasses.dataclass(frozen=True)
class Split:
    """Leave-one-out. Users with fewer than three items are left out and counted in `skipped`.

    `train`: list of int64 arrays, history[:-2]. For "validation" the history is history[:-2] and
    the target history[-2]; for "test" they are history[:-1] and history[-1].
    """

    train: list[np.ndarray]
    histories: list[np.ndarray]
    skipped: int

    def cases(self, part: str) -> tuple[list[np.ndarray], np.ndarray]:
        """Histories and targets (int64 [U]) of "validation" or "test"."""
        one_of("part", part, ("validation", "test"))
        cut = -2 if part == "validation" else -1
        return [h[:cut] for h in self.histories], np.array(
            [h[cut] for h in self.histories], np.int64
        )


def leave_one_out(histories) -> Split:
    """Split histories (arrays of item ids, oldest first) by leave-one-out."""
    usable = [h for h in as_histories(histories) if len(h) >= 3]
    if not usable:
        raise ValueError(
            "no user has three items or more, so there is nothing to train and test on"
        )
    return Split([h[:-2] for h in usable], usable, len(histories) - len(usable))


class Windows(torch.utils.data.Dataset):
    """Every prefix of every training history with its next item, as indices into one flat array.

    Window w has history `items[start[w]:target[w]]` (at most the last `max_items`) and target
    `items[target[w]]`; its user's training part ends before `end[w]`, so auxiliary labels never
    reach a user's last two items. `kind="contiguous"`: also every stretch that starts later; those
    that start too early are cut to the same `max_items` and count each. Windows stand by user; user
    u has those from `of_user[u]` to `of_user[u + 1]`. `windows[i]` is i itself: the `Collator`
    builds whole batches at once.
    """

    def __init__(self, train: list[np.ndarray], max_items: int, kind: str = "prefixes"):
        max_items = integer("max_items", max_items)
        one_of("kind", kind, ("prefixes", "contiguous"))
        sizes = np.array([len(h) for h in train], np.int64)
        self.items = (
            np.concatenate([np.asarray(h, np.int64) for h in train])
            if len(train)
            else np.empty(0, np.int64)
        )
        begin = np.cumsum(sizes) - sizes
        count = np.maximum(sizes - 1, 0)
        user = np.repeat(np.arange(len(sizes)), count)
        # Target's place within its user
        place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + 1
        self.target = begin[user] + place
        self.start = np.maximum(begin[user], self.target - max_items)
        if kind == "contiguous":
            later = np.arange(place.sum()) - np.repeat(np.cumsum(place) - place, place)
            user = np.repeat(user, place)
            self.target = np.repeat(self.target, place)
            self.start = np.maximum(begin[user] + later, self.target - max_items)
        self.end = (begin + sizes)[user]
        self.of_user = np.searchsorted(user, np.arange(len(sizes) + 1))
        if len(self.target) == 0:
            raise ValueError(
                "no training window: every user has fewer than two items before the held-out ones"
            )

    def __len__(self):
        return len(self.target)

    def __getitem__(self, index):
        return index

    @property
    def lengths(self) -> np.ndarray:
        """Items of history per window, int64 [windows]."""
        return self.target - self.start


class Stretches(torch.utils.data.Dataset):
    """The training histories in stretches of at most `max_items` + 1 items, of which a pass teaches
    every item but the first.

    Stretch r is `items[start[r]:stop[r]]`, its taught items are those from `taught[r]` on, and its
    user's training part ends before `end[r]`. A longer history has several; each but its first
    begins with items that the one before has taught, so that every item of a training part but its
    first is taught once, with at least half of `max_items` items before it where the history has so
    many. `stretches[i]` is i itself, as in `Windows`.
    """

    def __init__(self, train: list[np.ndarray], max_items: int):
        max_items = integer("max_items", max_items)
        usable = [np.asarray(h, np.int64) for h in train if len(h) >= 2]
        if not usable:
            raise ValueError(
                "nothing to teach: every user has fewer than two items before the held-out ones"
            )
        self.items = np.concatenate(usable)
        before = -(-max_items // 2)  # items of context in front of what a later stretch teaches
        rows = []
        begin = 0
        for history in usable:
            taught = 1
            while taught < len(history):
                start = 0 if taught == 1 else taught - before
                stop = min(start + max_items + 1, len(history))
                rows.append((begin + start, begin + stop, begin + taught, begin + len(history)))
                taught = stop
            begin += len(history)
        self.start, self.stop, self.taught, self.end = np.array(rows, np.int64).T

    def __len__(self):
        return len(self.start)

    def __getitem__(self, index):
        return index

    @property
    def lengths(self) -> np.ndarray:
        """Items of each stretch, int64 [stretches]."""
        return self.stop - self.start


def training_windows(train: list[np.ndarray], config) -> Windows | Stretches:
    """What the passes of a `TrainConfig` read of the training histories: `Stretches` where they
    teach every item, else `Windows`.
    """
    if config.targets == "all":
        return Stretches(train, config.max_items)
    return Windows(train, config.max_items, config.windows)


def history_tokens(items: np.ndarray, table: SidTable, separators: bool = True) -> Tensor:
    """Item ids int64 [B, M] (0 is padding) → token ids int64 [B, M · (L + separators)]; a separator
    follows its item.
    """
    items = torch.from_numpy(items)
    tokens = table.item_tokens[items]  # [B, M, L]
    if separators:
        after = torch.where(items > 0, SEP, PAD).unsqueeze(-1)
        tokens = torch.cat([tokens, after], dim=-1)  # [B, M, L + 1]
    return tokens.flatten(1)


def pad_histories(histories, max_items: int, n_items: int, slots: int | None = None) -> np.ndarray:
    """The last `max_items` of each history, padded on the right with 0 to the longest (or to
    `slots`): int64 [B, M].
    """
    recent = [h[-max_items:] for h in as_histories(histories)]
    out = np.zeros((len(recent), slots or max((len(h) for h in recent), default=0)), np.int64)
    for row, history in zip(out, recent):
        if len(history) == 0 or history.min() < 1 or history.max() > n_items:
            raise ValueError(
                f"a history must hold item ids in 1..{n_items} and at least one, got"
                f" {history.tolist()[:10]}"
            )
        row[: len(history)] = history
    return out


def truth_tokens(values: np.ndarray, levels: int, separators: bool, shape) -> Tensor:
    """What is true of each planted token ([U, M, planted levels], as `PlantedTruth.information`
    gives it), laid out as the token ids are: float32 `shape` = [U, N].

    A SID level takes the planted level of the same number; SID levels beyond the planted ones hold
    nothing, and the last SID level holds what planted levels are left.
    """
    out = np.zeros((*values.shape[:2], levels + separators), np.float32)
    shared = min(levels, values.shape[2])
    out[..., :shared] = values[..., :shared]
    out[..., shared - 1] += values[..., shared:].sum(-1)
    full = torch.zeros(shape)
    flat = torch.from_numpy(out).flatten(1)
    full[:, : flat.shape[1]] = flat
    return full


def add_padding_flag(batch: dict) -> dict:
    """`batch` with "padded", whether any slot is empty: asked here, on the CPU, because a GPU
    would have to be waited for.
    """
    return batch | {"padded": not bool(batch["attention_mask"].all())}


class Collator:
    """Window indices → a batch of tensors for the model.

    `input_ids`, `attention_mask` int64 [B, N]; `labels` int64 [B, L]; with `map_config` also
    `map_labels` int64 [B, S, L]; with `truth` (a `PlantedTruth`) also `truth` float32 [B, N].
    `fixed_slots`: pad to `max_items` items, as published.
    """

    def __init__(
        self,
        windows: Windows,
        table: SidTable,
        *,
        separators: bool,
        max_items: int,
        fixed_slots: bool = False,
        map_config: MapConfig | None = None,
        truth=None,
    ):
        self.windows = windows
        self.table = table
        self.separators = separators
        self.max_items = max_items
        self.fixed_slots = fixed_slots
        self.map_config = map_config
        self.truth = truth

    def __call__(self, indices: list[int]) -> dict[str, Tensor]:
        w = self.windows
        start = w.start[indices]
        target = w.target[indices]
        end = w.end[indices]
        length = target - start
        width = self.max_items if self.fixed_slots else int(length.max())
        place = np.arange(width)
        real = place < length[:, None]
        items = np.where(real, w.items[np.where(real, start[:, None] + place, 0)], 0)  # [B, M]
        tokens = history_tokens(items, self.table, self.separators)  # [B, N]
        labels = self.table.item_tokens[torch.from_numpy(w.items[target])]  # [B, L]
        batch = {"input_ids": tokens, "attention_mask": (tokens != PAD).long(), "labels": labels}
        if self.map_config is not None:
            ahead = target[:, None] + np.arange(1, self.map_config.steps + 1)  # [B, S]
            exists = ahead < end[:, None]
            after = self.table.item_tokens[
                torch.from_numpy(np.where(exists, w.items[np.where(exists, ahead, 0)], 0))
            ]
            after = after.masked_fill(~torch.from_numpy(exists).unsqueeze(-1), -100)  # [B, S, L]
            batch["map_labels"] = map_labels(labels, after, self.map_config)
        if self.truth is not None:
            histories = [row[:n] for row, n in zip(items, length)]
            nats = self.truth.information(histories)
            batch["truth"] = truth_tokens(nats, self.table.levels, self.separators, tokens.shape)
        return batch


class StretchCollator:
    """Indices of stretches → a batch of tensors for a model that teaches all their items but the
    first.

    `input_ids`, `attention_mask` int64 [B, N], of M items a row; `labels` int64 [B, M − 1, L], −100
    at padding and where another stretch teaches; with `map_config` also `map_labels` int64 [B, M −
    1, S, L].
    """

    def __init__(
        self,
        stretches: Stretches,
        table: SidTable,
        *,
        separators: bool,
        map_config: MapConfig | None = None,
    ):
        self.stretches = stretches
        self.table = table
        self.separators = separators
        self.map_config = map_config

    def __call__(self, indices: list[int]) -> dict[str, Tensor]:
        s = self.stretches
        start, stop, taught, end = (x[indices][:, None] for x in (s.start, s.stop, s.taught, s.end))
        place = start + np.arange(int((stop - start).max()))  # [B, M]
        items = np.where(place < stop, s.items[np.minimum(place, stop - 1)], 0)
        tokens = history_tokens(items, self.table, self.separators)  # [B, N]
        labels = self.table.item_tokens[torch.from_numpy(items[:, 1:])]  # [B, M - 1, L]
        absent = torch.from_numpy((place[:, 1:] >= stop) | (place[:, 1:] < taught)).unsqueeze(-1)
        batch = {
            "input_ids": tokens,
            "attention_mask": (tokens != PAD).long(),
            "labels": labels.masked_fill(absent, -100),
        }
        if self.map_config is not None:
            ahead = place[:, 1:, None] + np.arange(1, self.map_config.steps + 1)  # [B, M - 1, S]
            exists = ahead < end[:, :, None]
            # [B, M - 1, S, L]
            after = self.table.item_tokens[torch.from_numpy(s.items[np.where(exists, ahead, 0)])]
            after = after.masked_fill(~torch.from_numpy(exists).unsqueeze(-1), -100)
            of_target = map_labels(
                labels.flatten(0, 1), after.flatten(0, 1), self.map_config
            ).unflatten(0, labels.shape[:2])
            batch["map_labels"] = of_target.masked_fill(absent.unsqueeze(-1), -100)
        return batch
