"""The pruning layer: keep the most important tokens of each row, in their original order, and drop
the rest for good.

A row with n real tokens keeps ceil(keep · n) of them. That is a share of *its own* tokens, where
the published code keeps a share of the padded length, and so mostly prunes padding. Kept tokens are
gathered into a shorter tensor: every later layer is cheaper, which masking alone would
not give.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidlab.checks import integer, one_of, plain
from sidlab.saliency import SCORERS

UNITS = ("token", "item")
POSITIONS = ("original", "compact", "none")
REDUCTIONS = ("select", "pool")
MODES = ("corrected", "reference")


class Pruned(NamedTuple):
    """`hidden` [B, K, d]; `mask` int64 [B, K], 1 used; `positions` int64 [B, K], ascending slots in
    the unpruned row (0 where unused); `importance` float32 [B, N], the scores the choice was made
    from, None where tokens were pooled.
    """

    hidden: Tensor
    mask: Tensor
    positions: Tensor
    importance: Tensor | None


@dataclasses.dataclass(frozen=True)
class PruningConfig:
    """What to prune, where and by which score."""

    after_layer: int = 2  # counted from 1; the scores come from this layer, too
    keep: float = 1 / 3  # the kept share of each row's own tokens, in (0, 1]
    # A name in `saliency.SCORERS`, "module:function", or a callable (which no model is saved with)
    scorer: str | Callable = "rastp"
    unit: str = "token"  # or "item": whole items stay or go
    protect_separators: bool = False  # every separator stays, on top of the share
    # Which place a kept token has for later layers: "original", that in the full history;
    # "compact", that among the kept; "none", as in the published code by accident
    positions: str = "original"
    at_inference: bool = True  # prune when recommending, too, as the published code does
    reduce: str = "select"  # or "pool": average neighbours down to the share, which needs no scorer
    # Of each row only the smallest set of tokens that holds this share of the row's importance;
    # `keep` is then the most. For scores that are not negative, with unit="token"
    mass: float | None = None
    # "corrected", or "reference": what the published code does, for histories padded to a fixed
    # length (see `reference_choice` and the docstring of `models.t5`)
    mode: str = "corrected"

    def __post_init__(self):
        plain(self)
        _check_choice(self.keep, self.unit, self.mass)
        # A Fraction, say, which JSON does not know
        object.__setattr__(self, "keep", float(self.keep))
        one_of("positions", self.positions, POSITIONS)
        one_of("reduce", self.reduce, REDUCTIONS)
        one_of("mode", self.mode, MODES)
        if self.mode == "reference" or self.reduce == "pool":
            which = 'mode="reference"' if self.mode == "reference" else 'reduce="pool"'
            for name in (
                "unit",
                "protect_separators",
                "mass",
                *(["positions", "reduce"] if self.mode == "reference" else []),
            ):
                if getattr(self, name) != getattr(PruningConfig, name):
                    raise ValueError(
                        f"{which} knows no {name}={getattr(self, name)!r}; leave it out"
                    )
        if not callable(self.scorer) and ":" not in str(self.scorer):
            one_of("scorer", self.scorer, tuple(SCORERS))
        object.__setattr__(self, "after_layer", integer("after_layer", self.after_layer))

    def to_dict(self) -> dict:
        """JSON-ready; a callable scorer becomes "own:<name>"."""
        out = dataclasses.asdict(self)
        return (
            out | {"scorer": "own:" + getattr(self.scorer, "__name__", "scorer")}
            if callable(self.scorer)
            else out
        )


def kept_count(n: Tensor, keep: float) -> Tensor:
    """How many of `n` tokens (int64, any shape) are kept: ceil(keep · n − 1e-6) in float64, at
    least 1 where n > 0.

    The 1e-6 makes 1/3 of 30 ten and not eleven.

    >>> kept_count(torch.tensor([0, 1, 30, 31]), 1 / 3)
    tensor([ 0,  1, 10, 11])
    """
    count = torch.ceil(n.double() * keep - 1e-6).long()
    return torch.minimum(count.clamp_min(1), n)


class TokenPruner(nn.Module):
    """Keeps the `keep` share of each row's real tokens (`unit="token"`) or items (`unit="item"`),
    or less of them where `mass` says so (see `PruningConfig`); no parameters.

    >>> pruner = TokenPruner(keep=0.5)
    >>> hidden, mask = torch.randn(1, 4, 8), torch.ones(1, 4, dtype=torch.long)
    >>> pruner(hidden, mask, torch.tensor([[0.1, 0.9, 0.2, 0.7]])).positions
    tensor([[1, 3]])
    """

    def __init__(self, keep: float = 1 / 3, unit: str = "token", mass: float | None = None):
        super().__init__()
        _check_choice(keep, unit, mass)
        self.keep = keep
        self.unit = unit
        self.mass = mass

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor,
        importance: Tensor,
        *,
        protect: Tensor | None = None,
        item_index: Tensor | None = None,
        slots: int | None = None,
    ) -> Pruned:
        """Choose and gather.

        Args: `hidden` [B, N, d]; `mask` [B, N], 1 real, 0 padding; `importance` float [B, N]
        (ignored at padding); `protect` bool [B, N], tokens kept on top of the share; `item_index`
        int64 [B, N], needed by `unit="item"`, ascending from 0; `slots`: K if the caller knows it,
        enough for what is kept. Without it K is ceil(keep · N) in token mode, from the shape alone,
        and is read from the mask (one synchronisation on a GPU) in item mode, with `protect` and
        with `mass`. Returns `Pruned`. Where scores are equal the lowest position is kept. Raises
        ValueError on shapes that do not agree, and on too few `slots`: in token mode fewer than the
        shape alone asks for; in item mode on the CPU only, since a GPU would have to be waited for.
        """
        if (
            hidden.ndim != 3
            or mask.shape != hidden.shape[:2]
            or importance.shape != hidden.shape[:2]
        ):
            raise ValueError(
                "hidden, mask and importance must be [B, N, d], [B, N] and [B, N], got "
                f"{tuple(hidden.shape)}, {tuple(mask.shape)} and {tuple(importance.shape)}"
            )
        if slots is not None and slots < 0:
            raise ValueError(f"slots must be at least 0, got {slots}")
        kept = self.choose(mask, importance, protect=protect, item_index=item_index)
        width = mask.shape[1]
        from_shape = self.unit == "token" and protect is None and self.mass is None
        if slots is None or self.mass is not None:
            slots = (
                math.ceil(self.keep * width - 1e-6)
                if from_shape
                else int(kept.sum(1).max())
                if len(kept)
                else 0
            )
            # One also for rows of nothing but padding: no later layer takes less
            slots = max(slots, min(width, 1))
        else:
            # Token mode is never read from the mask, or a pass could not be recorded in a CUDA
            # graph.
            needed = math.ceil(self.keep * width - 1e-6) if self.unit == "token" else 0
            if self.unit == "item" and kept.device.type == "cpu" and len(kept):
                needed = int(kept.sum(1).max())
            if slots < needed:
                raise ValueError(
                    f"slots={slots} would drop tokens that are kept; give at least {needed}, or"
                    " None"
                )
        # The n-th kept token of a row goes to slot n; one slot more takes all that is dropped.
        slot = torch.where(kept, kept.cumsum(1) - 1, slots).clamp_max(slots)  # [B, N]
        places = torch.arange(width, device=mask.device).expand_as(slot)
        # [B, K]
        positions = slot.new_zeros(len(slot), slots + 1).scatter(1, slot, places)[:, :slots]
        used = torch.arange(slots, device=mask.device) < kept.sum(1, keepdim=True)  # [B, K]
        # [B, K, d]
        gathered = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return Pruned(gathered, used.long(), positions, importance)

    @torch.no_grad()
    def choose(
        self,
        mask: Tensor,
        importance: Tensor,
        *,
        protect: Tensor | None = None,
        item_index: Tensor | None = None,
    ) -> Tensor:
        """Which tokens stay: bool [B, N]. Arguments as in `forward`."""
        for name, given in (("protect", protect), ("item_index", item_index)):
            if given is not None and given.shape != mask.shape:
                raise ValueError(
                    f"{name} must be [B, N] like the mask, {tuple(mask.shape)}, got"
                    f" {tuple(given.shape)}"
                )
        real = mask.bool()
        # A real token always beats padding, even one whose score is −inf or NaN.
        lowest = torch.finfo(torch.float32).min
        score = torch.where(real, importance.float().nan_to_num(nan=lowest), -torch.inf)
        protect = real & protect.bool() if protect is not None else None
        if self.unit == "item":
            kept = self._whole_items(real, score, protect, item_index)
        else:
            candidates = score if protect is None else score.masked_fill(protect, -torch.inf)
            count = kept_count(real.sum(1), self.keep)
            if self.mass is not None:
                count = torch.minimum(count, self._holding_mass(candidates))
            kept = highest(candidates, count) & real
        return kept if protect is None else kept | protect

    def _holding_mass(self, score):
        """How many of the largest scores of each row hold the share `mass` of their sum: int64 [B],
        at least 1 where one is finite.
        """
        finite = score.clamp_min(0).double()
        if (score.masked_fill(score <= torch.finfo(torch.float32).min, 0) < 0).any():
            raise ValueError(
                f"mass={self.mass} is a share of the importance, so no score may be negative;"
                " choose another scorer"
            )
        total = finite.sum(1, keepdim=True)
        reached = finite.sort(dim=1, descending=True).values.cumsum(1)  # [B, N]
        return ((reached < self.mass * total - 1e-9 * total).sum(1) + 1).clamp_max(
            (score > -torch.inf).sum(1)
        )

    def _whole_items(self, real, score, protect, item_index):
        if item_index is None:
            raise ValueError(
                'unit="item" needs item_index [B, N]: which item each token belongs to'
            )
        item_index = item_index.clamp_min(0)
        votes = torch.where(real if protect is None else real & ~protect, score, 0.0)
        # [B, N], one column an item
        total = torch.zeros_like(score).scatter_add(1, item_index, votes)
        exists = torch.zeros_like(score).scatter_add(1, item_index, real.float()) > 0
        total = total.clamp_min(torch.finfo(torch.float32).min).masked_fill(~exists, -torch.inf)
        kept_items = highest(total, kept_count(exists.sum(1), self.keep)) & exists
        return kept_items.gather(1, item_index) & real


def reference_choice(hidden: Tensor, mask: Tensor, importance: Tensor, keep: float) -> Pruned:
    """What the published code keeps: floor(keep · N) of all N slots, padding among them, whatever
    the row's length.

    Arguments as in `TokenPruner.forward`; among padding, which scores nothing, which slots stay is
    `torch.topk`'s choice. `mask` of the result is that of the kept slots, as the encoder layers
    after the pruner get it there. The decoder gets that of the first K slots instead: the same with
    padding on the right, wrong with padding on the left (`models.t5`). `positions` are not zeroed
    where the mask is 0.
    """
    slots = math.floor(keep * mask.shape[1] + 1e-6)
    if slots < 1:
        raise ValueError(f"keep={keep:.4g} of {mask.shape[1]} slots leaves none")
    positions = importance.topk(slots, dim=1).indices.sort(1).values  # [B, K]
    # [B, K, d]
    gathered = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    return Pruned(gathered, mask.gather(1, positions).long(), positions, importance)


def pool_tokens(hidden: Tensor, mask: Tensor, keep: float) -> Pruned:
    """Average each row's n real tokens in ceil(keep · n) bins of neighbours, as even as they can
    be.

    `hidden` [B, N, d], `mask` [B, N]. Returns `Pruned` with `positions` the slots at which the bins
    start.
    """
    real = mask.bool()
    n = real.sum(1, keepdim=True)  # [B, 1]
    bins = kept_count(n, keep)
    slots = max(math.ceil(keep * mask.shape[1] - 1e-6), 1)
    place = real.cumsum(1) - 1  # among the real ones
    # [B, N]; padding goes to one bin more, which is dropped
    bin_of = torch.where(real, place * bins // n.clamp_min(1), slots)
    total = hidden.new_zeros(len(hidden), slots + 1, hidden.shape[-1])
    # [B, K, d]
    total = total.scatter_add(1, bin_of.unsqueeze(-1).expand_as(hidden), hidden)[:, :-1]
    size = torch.zeros_like(total[..., 0]).scatter_add(
        1, bin_of.clamp_max(slots - 1), (real * (bin_of < slots)).to(hidden.dtype)
    )
    used = torch.arange(slots, device=mask.device) < bins  # [B, K]
    starts = real & (bin_of != F.pad(bin_of, (1, 0), value=-1)[:, :-1])
    positions = torch.argsort(~starts, dim=1, stable=True)[:, :slots].masked_fill(~used, 0)
    return Pruned(total / size.clamp_min(1).unsqueeze(-1), used.long(), positions, None)


def highest(score: Tensor, count: Tensor) -> Tensor:
    """bool [B, N]: the `count[b]` highest scores of each row; of equal ones the lowest position."""
    order = torch.argsort(score, dim=1, descending=True, stable=True)  # [B, N]
    taken = torch.arange(score.shape[1], device=score.device) < count[:, None]
    return torch.zeros_like(taken).scatter(1, order, taken)


def check_keep(keep, name="keep"):
    if not isinstance(keep, numbers.Real) or not 0 < keep <= 1:
        raise ValueError(f"{name} is the kept fraction and must lie in (0, 1], got {keep!r}")


def _check_choice(keep, unit, mass):
    check_keep(keep)
    one_of("unit", unit, UNITS)
    if mass is not None and (
        not isinstance(mass, numbers.Real) or not 0 < mass <= 1 or unit != "token"
    ):
        raise ValueError(
            f'mass is a share of the importance in (0, 1] and needs unit="token", got mass={mass!r}'
            f" and unit={unit!r}"
        )
