"""Pruning that changes while a model trains: how much of a history is kept, and after which layer.

A `Strategy` says how, a callback (`AdaptPruning`, which `train` adds) does it before an update:

* "linear", "cosine": the kept share goes from `start` to the configured `keep` over the first
  `until` of the updates;
* "stage": the same in four equal steps. A summary of RASTP claims a ratio that changes with the
  stage of learning, more aggressive early; its code has none. `start` below `keep` is that reading,
  above it the opposite one;
* "loss-gap": guided by a learning signal (named as future work by STAMP, arXiv 2604.05329). It
  begins unpruned, and every `every` updates looks at the loss on a probe batch: one step down in
  `SHARES` (never below the configured `keep`) if the loss there is at most `bound` nats a token
  above the unpruned one, one step up if at the present share it is more. Taking the smallest share
  within the bound at once would take it for good: hardly trained, a model has no gap yet, and one
  trained pruned is worse at all tokens, which it never sees;
* "settled-layer": after the first `every` updates the pruner moves after the first layer whose
  ranking of the tokens has settled: where Spearman's correlation with the ranking of the next
  layer is at least `threshold`, the mean over the histories of a probe batch. Then it stays. (If
  none has, it moves after the last layer but one; the correlations are in the log as "agreement".)

Ratios by row are no strategy over time but a way to choose: `PruningConfig(mass=…)`. What a
strategy spends on its probe counts as training.
"""

import dataclasses
import itertools
import math

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from sidlab.checks import integer, number, one_of, plain
from sidlab.pruning import PruningConfig, check_keep

SCHEDULES = ("linear", "cosine", "stage")
KINDS = (*SCHEDULES, "loss-gap", "settled-layer")
SHARES = (0.1, 0.2, 1 / 3, 0.5, 0.7, 1.0)


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How pruning changes while a model trains."""

    kind: str = "cosine"  # one of `KINDS`
    # --- Schedules
    start: float = 0.15  # the kept share at first
    until: float = 0.5  # the share of the updates after which `keep` is reached
    # --- "loss-gap"
    bound: float = 0.02  # nats per token that the loss may be above the unpruned one
    # --- "settled-layer"
    threshold: float = 0.9  # Spearman's correlation from which on a ranking has settled
    # --- Both of these
    # Updates between two looks at the probe: a divisor of `eval_every`, so that a resumed run
    # decides as one that was not interrupted
    every: int = 50

    def __post_init__(self):
        plain(self)
        one_of("kind", self.kind, KINDS)
        check_keep(self.start, "start")
        for name in ("until", "bound", "threshold"):
            number(name, getattr(self, name))
        if not 0 < self.until <= 1:
            raise ValueError(f"until must lie in (0, 1], got {self.until}")
        integer("every", self.every)
        if not self.bound >= 0 or not -1 <= self.threshold <= 1:
            raise ValueError(
                f"bound must be >= 0 and threshold in [-1, 1], got {self.bound} and"
                f" {self.threshold}"
            )


def keep_at(strategy: Strategy, keep: float, progress: float) -> float:
    """The kept share of a schedule that ends at `keep`, when `progress` (0..1) of the updates are
    done.

    >>> [round(keep_at(Strategy("linear", start=0.2), 0.4, p), 2) for p in (0, 0.25, 0.5, 1)]
    [0.2, 0.3, 0.4, 0.4]
    """
    done = min(progress / strategy.until, 1.0)
    if strategy.kind == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    elif strategy.kind == "stage":
        done = min(math.floor(done * 4) / 3, 1.0)
    elif strategy.kind != "linear":
        raise ValueError(
            f"kind={strategy.kind!r} follows no schedule; what it keeps depends on the model"
        )
    return strategy.start + (keep - strategy.start) * done


class AdaptPruning(TrainerCallback):
    """Changes `model`'s pruning as `strategy` says; `probe` is a batch as the collator gives it."""

    def __init__(self, strategy: Strategy, model, probe: dict[str, Tensor]):
        self.strategy = strategy
        self.model = model
        self.keep = model.pruning.keep
        self.probe = {name: value for name, value in probe.items() if name != "map_labels"}

    def on_step_begin(self, args, state, control, **kwargs):
        kind = self.strategy.kind
        step = state.global_step
        if kind == "loss-gap":
            if step == 0:
                self._set(keep=1.0)
            elif step % self.strategy.every == 0:
                self._set(keep=self.within_bound())
        elif kind == "settled-layer":
            if step == self.strategy.every:
                agreement = self.agreement()
                state.log_history.append({"step": step, "agreement": agreement})
                self._set(after_layer=self.settled(agreement))
        else:
            self._set(keep=keep_at(self.strategy, self.keep, step / state.max_steps))

    def _set(self, **changes):
        self.model.set_pruning(dataclasses.replace(self.model.pruning, **changes))

    def within_bound(self) -> float:
        """The share to go on with: a step below or above the present one, or the same."""
        before = self.model.pruning
        shares = [self.keep, *(share for share in SHARES if share > self.keep)]
        place = shares.index(min(shares, key=lambda share: abs(share - before.keep)))
        unpruned = self._probe(dataclasses.replace(before, keep=1.0, mass=None)).main_loss

        def holds(share):
            return bool(
                self._probe(dataclasses.replace(before, keep=share)).main_loss - unpruned
                <= self.strategy.bound
            )

        if place > 0 and holds(shares[place - 1]):
            return shares[place - 1]
        return shares[place] if holds(shares[place]) else shares[min(place + 1, len(shares) - 1)]

    def settled(self, agreement: list[float]) -> int:
        """The first layer whose ranking of the tokens correlates with that of the next layer as
        asked.
        """
        return next(
            (layer for layer, r in enumerate(agreement, start=1) if r >= self.strategy.threshold),
            max(len(agreement), 1),
        )

    def agreement(self) -> list[float]:
        """Each layer's correlation with the next layer."""
        before = self.model.pruning
        layers = self.model.stack.config.num_hidden_layers
        rankings = [
            self._probe(
                dataclasses.replace(before, after_layer=layer, keep=1.0), encode=True
            ).importance
            for layer in range(1, layers + 1)
        ]
        return [
            spearman(one, other, self.probe["attention_mask"])
            for one, other in itertools.pairwise(rankings)
        ]

    @torch.no_grad()
    def _probe(self, pruning: PruningConfig, encode: bool = False):
        before = self.model.pruning
        training = self.model.training
        inputs = {name: value.to(self.model.device) for name, value in self.probe.items()}
        labels = inputs.pop("labels")
        try:
            self.model.eval()
            self.model.set_pruning(dataclasses.replace(pruning, at_inference=True))
            return self.model.encode(**inputs) if encode else self.model(**inputs, labels=labels)
        finally:
            self.model.set_pruning(before)
            self.model.train(training)


def spearman(one: Tensor, other: Tensor, mask: Tensor) -> float:
    """Spearman's rank correlation of each row's real tokens under two scores float [B, N], the mean
    over the rows in which both tell some apart; `mask` [B, N], 1 real. ValueError without such a
    row.
    """
    # Here, since scipy.stats is slow to import, and only "settled-layer" needs it.
    from scipy.stats import spearmanr

    rows = [
        (a[real], b[real])
        for a, b, real in zip(one.cpu(), other.cpu(), mask.cpu().bool())
        if real.any()
    ]
    found = [spearmanr(a, b).statistic for a, b in rows if a.min() < a.max() and b.min() < b.max()]
    if not found:
        raise ValueError("no history has two tokens to rank, with different scores")
    return float(np.mean(found))
