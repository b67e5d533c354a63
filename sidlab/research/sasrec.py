"""SASRec: the next item by causal self-attention over item ids (Kang and McAuley 2018, arXiv
1808.09781).

The baseline without semantic IDs. Two things differ from the paper, as in the tuned reproductions:
the blocks are pre-norm, and the loss is the cross-entropy over all items in place of one sampled
negative per position.

Axes: `B` rows of `M` slots, `N` windows, `V` items (ids 1..V, 0 is padding), `D` width.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidlab.checks import integer
from sidlab.metrics import rank_of_target, summary
from sidlab.research.baselines import flat_histories
from sidlab.windows import Windows, pad_histories


class SASRecModel(nn.Module):
    """Items int64 [B, M] → hidden states [B, M, D]; an item's score is the product of a hidden
    state and its input embedding.

    Histories start in slot 0, so the causal mask hides the padding, which comes behind them, as
    well.
    """

    def __init__(
        self, n_items: int, d_model: int, layers: int, heads: int, max_items: int, dropout: float
    ):
        super().__init__()
        self.items = nn.Embedding(n_items + 1, d_model)
        self.places = nn.Embedding(max_items, d_model)
        for embedding in (self.items, self.places):
            nn.init.normal_(embedding.weight, std=0.02)
        block = nn.TransformerEncoderLayer(
            d_model, heads, d_model, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            block, layers, norm=nn.LayerNorm(d_model), enable_nested_tensor=False
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, items: Tensor) -> Tensor:
        # √D as in the authors' code: without it an item is lost among what the blocks add (Beauty:
        # a fifth less recall after 8 epochs). [B, M, D]
        x = self.items(items) * self.items.embedding_dim**0.5 + self.places.weight[: items.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(items.shape[1], device=items.device)
        return self.blocks(self.dropout(x), mask, is_causal=True)

    def scores(self, hidden: Tensor) -> Tensor:
        """[..., D] → [..., V + 1]; the padding 0 is never a target, and its score means nothing."""
        return hidden @ self.items.weight.T


def rows_of(windows: Windows) -> np.ndarray:
    """Windows that start at the same item share a row, since the causal mask predicts all their
    targets in one pass.

    int64 [rows, 3], `start`, `length` and `count`: a row reads `length` items from `start` on, and
    its last `count` slots predict a window's target each. A user of up to `max_items` + 1 items is
    one row with a prediction in every slot. Further windows of a longer user start one by one
    later; each is a row that predicts in its last slot alone, so that every target sees exactly the
    `max_items` items that it sees in any other model here.
    """
    start, first, count = np.unique(windows.start, return_index=True, return_counts=True)
    return np.stack([start, windows.target[first + count - 1] - start, count], axis=1)


class SASRec:
    """SASRec with early stopping; the defaults are tuned on the validation users of Amazon Beauty.

    Args: `d_model`, `layers`, `heads`, `dropout` of the transformer (its feed-forward layers are
    `d_model` wide, as in the paper); `max_items` of history; about `batch_windows` windows an
    update; AdamW with `learning_rate` and `weight_decay`; at most `epochs`, stopping after
    `patience` of them without a better validation recall@10. On a CPU a seed gives the same model
    every time.
    """

    def __init__(
        self,
        d_model: int = 128,
        layers: int = 2,
        heads: int = 2,
        max_items: int = 50,
        dropout: float = 0.5,
        epochs: int = 12,
        patience: int = 3,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        batch_windows: int = 512,
        seed: int = 0,
    ):
        for name, value in dict(
            layers=layers,
            max_items=max_items,
            epochs=epochs,
            patience=patience,
            batch_windows=batch_windows,
        ).items():
            integer(name, value)
        if heads < 1 or d_model < 1 or d_model % heads:
            raise ValueError(
                f"d_model must be a multiple of heads, got d_model={d_model} and heads={heads}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.architecture = dict(
            d_model=d_model, layers=layers, heads=heads, max_items=max_items, dropout=dropout
        )
        self.optimiser = dict(lr=learning_rate, weight_decay=weight_decay)
        self.max_items = max_items
        self.epochs = epochs
        self.patience = patience
        self.batch_windows = batch_windows
        self.seed = seed

    def fit(self, train_histories, n_items: int, validation=None):
        """train_histories: int64 arrays of item ids, each user's part for training
        (`history[:-2]`). validation: (histories, targets int64 [U]) chooses the best epoch; without
        it all `epochs` are trained and the last is kept.

        Sets `model_`, `n_items_` and `log_`, a dict an epoch: "loss" and, with validation,
        "recall@5", "recall@10", "ndcg@5", "ndcg@10".
        """
        flat_histories(train_histories, n_items)  # checks the ids
        if validation is not None and not len(validation[0]) == len(validation[1]) > 0:
            raise ValueError(
                f"validation must hold a target for each history, got {len(validation[0])} and"
                f" {len(validation[1])}"
            )
        windows = Windows(train_histories, self.max_items)
        rows = rows_of(windows)
        self.n_items_ = n_items
        self.log_ = []
        best = None
        best_epoch = 0
        with torch.random.fork_rng():  # the caller's random numbers stay as they are
            torch.manual_seed(self.seed)
            model = self.model_ = SASRecModel(n_items, **self.architecture).to(
                "cuda" if torch.cuda.is_available() else "cpu"
            )
            optimiser = torch.optim.AdamW(model.parameters(), **self.optimiser, fused=True)
            for epoch in range(self.epochs):
                order = np.random.default_rng((self.seed, epoch)).permutation(len(rows))
                cuts = np.flatnonzero(np.diff(rows[order, 2].cumsum() // self.batch_windows)) + 1
                losses = [
                    _step(model.train(), optimiser, windows.items, rows[batch])
                    for batch in np.split(order, cuts)
                ]
                self.log_.append({"loss": float(sum(losses)) / len(windows)})
                if validation is not None:
                    self.log_[-1] |= summary(
                        rank_of_target(self.recommend(validation[0]), validation[1])
                    )
                    if (
                        best is None
                        or self.log_[-1]["recall@10"] > self.log_[best_epoch]["recall@10"]
                    ):
                        best = copy.deepcopy(model.state_dict())
                        best_epoch = epoch
                    if epoch - best_epoch == self.patience:
                        break
        if best is not None:
            model.load_state_dict(best)
        return self

    @torch.no_grad()
    def recommend(self, histories, k: int = 10, exclude_seen: bool = False) -> np.ndarray:
        """int64 [U, k] item ids, best first; 0 where the catalogue has no item left. Reads the last
        `max_items` of each history.

        exclude_seen: leave out what is in the user's history.
        """
        k = integer("k", k)
        if not hasattr(self, "model_"):
            raise RuntimeError("recommend needs a fitted model: call fit first")
        model = self.model_.eval()
        device = self.model_.items.weight.device
        lengths = flat_histories(histories, self.n_items_)[1]
        ranked = np.zeros((len(lengths), k), np.int64)
        for users in (
            np.split(np.argsort(lengths, kind="stable"), range(256, len(lengths), 256))
            if len(lengths)
            else ()
        ):
            part = [histories[u] for u in users]
            # [B, M]
            items = torch.from_numpy(pad_histories(part, self.max_items, self.n_items_)).to(device)
            # [B, V + 1]
            scores = model.scores(
                model(items)[torch.arange(len(users), device=device), (items > 0).sum(dim=1) - 1]
            )
            scores[:, 0] = -torch.inf
            if exclude_seen:
                seen = pad_histories(part, int(lengths.max()), self.n_items_)
                scores.scatter_(1, torch.from_numpy(seen).to(device), -torch.inf)
            best, found = scores.topk(min(k, self.n_items_))
            ranked[users, : best.shape[1]] = torch.where(best > -torch.inf, found, 0).cpu().numpy()
        return ranked


def _step(model, optimiser, items, rows):
    """One update on `rows` [B, 3]; returns the summed loss of their windows."""
    device = model.items.weight.device
    hidden = []
    targets = []
    # An update mixes all lengths, or it follows one length at a time; four parts of similar length
    # save most of the padding.
    for part in np.array_split(rows[rows[:, 1].argsort()], min(4, len(rows))):
        start, length, count = part[:, :, None].swapaxes(0, 1)  # [B, 1] each
        place = np.arange(length.max())
        at = np.minimum(start + place, len(items) - 2)  # the padding must not reach beyond the end
        predicts = (place < length) & (place >= length - count)  # [B, M]
        inputs = torch.from_numpy(np.where(place < length, items[at], 0)).to(device)
        hidden.append(model(inputs)[torch.from_numpy(predicts).to(device)])  # [N, D]
        targets.append(torch.from_numpy(items[at + 1][predicts]).to(device))  # [N]
    hidden = torch.cat(hidden)
    targets = torch.cat(targets)
    loss = 0.0
    states = hidden.detach().requires_grad_()
    optimiser.zero_grad()
    # The scores of 64 windows at a time, forward and backward: they stay in the CPU's cache
    # and need next to no memory.
    for h, t in zip(states.split(64), targets.split(64)):
        part = F.cross_entropy(model.scores(h), t, reduction="sum")
        (part / len(targets)).backward()
        loss += part.detach()
    hidden.backward(states.grad)
    optimiser.step()
    return loss
