"""Multi-step auxiliary prediction (MAP): the decoder also predicts what comes after the target.

STAMP (arXiv 2604.05329) says: several future steps, through a shared projection, heads dropped at
inference. The details below are our reading; the number of steps and the weight are not published.
With `h_t` the state that predicts target token t,

    h_t^(s) = h_t + P(RMSNorm(h_t) + e_s)        s = 1..S

(one projection P for all steps, one embedding e_s a step) goes through the model's own output head.
Its label is the same level of the s-th item after the target (`unit="item"`), or the token s places
on within the target (`unit="token"`). The loss is the weighted mean of the steps' cross-entropies.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidlab.checks import integer, number, one_of, plain

UNITS = ("item", "token")


@dataclasses.dataclass(frozen=True)
class MapConfig:
    """How far MAP looks ahead, and how much that counts."""

    steps: int = 2  # S, how many steps ahead
    weight: float = 0.3  # of the auxiliary loss beside the main one
    unit: str = "item"  # what a step is: the next "item", or the next "token" of the target
    decay: float = 1.0  # step s weighs decay^(s−1)

    def __post_init__(self):
        plain(self)
        one_of("unit", self.unit, UNITS)
        object.__setattr__(self, "steps", integer("steps", self.steps))
        for name in ("weight", "decay"):
            number(name, getattr(self, name))
        if not 0 <= self.weight < torch.inf or not 0 < self.decay <= 1:
            raise ValueError(
                f"weight must be >= 0 and finite and decay in (0, 1], got {self.weight} and"
                f" {self.decay}"
            )


class MapHead(nn.Module):
    """The shared projection: decoder states [B, L, d] → states of the steps [B, S, L, d].

    Plain parameters and no child modules: the model draws them in a fork of the random state
    (`models.base`), so that a model with the head starts from the same weights as one without.
    """

    def __init__(self, d_model: int, steps: int):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(d_model))
        self.step = nn.Parameter(torch.zeros(steps, d_model))
        self.projection = nn.Parameter(torch.zeros(d_model, d_model))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden, self.norm.shape, self.norm, eps=1e-6)
        inner = normed.unsqueeze(1) + self.step[:, None]  # [B, S, L, d]
        return hidden.unsqueeze(1) + F.linear(inner, self.projection)  # [B, S, L, d]


def map_loss(
    step_losses: Tensor, labels: Tensor, decay: float = 1.0, items: Tensor | None = None
) -> Tensor:
    """The auxiliary loss from per-token cross-entropies.

    Args: `step_losses` float [B, S, L], anything where there is no label; `labels` int64 [B, S, L],
    −100 where absent.
    Returns a scalar: Σ_s decay^(s−1) CE_s / Σ_s decay^(s−1) over the steps that have a label
    anywhere in the batch, CE_s being the mean over that step's labels. 0 (with a gradient of 0) if
    none has. `items` int64 [S]: how many labels each step has in a whole update of several batches;
    what is returned is then this batch's part of the update's loss, the sum of its batches' parts.
    """
    if step_losses.shape != labels.shape or labels.ndim != 3:
        raise ValueError(
            f"step_losses and labels must both be [B, S, L], got {tuple(step_losses.shape)} and"
            f" {tuple(labels.shape)}"
        )
    present = labels != -100
    count = present.sum((0, 2)) if items is None else items  # [S]
    total = torch.where(present, step_losses, 0.0).sum((0, 2))  # [S]
    weight = decay ** torch.arange(labels.shape[1], device=labels.device) * (count > 0)
    return (weight * total / count.clamp_min(1)).sum() / weight.sum().clamp_min(
        torch.finfo(weight.dtype).tiny
    )


def map_labels(tokens: Tensor, after: Tensor, config: MapConfig) -> Tensor:
    """Labels of the auxiliary steps.

    Args: `tokens` int64 [B, L], the target's SID tokens; `after` int64 [B, S, L], SID tokens of the
    S items after the target, −100 where there is none or where it must not be seen. Returns int64
    [B, S, L].
    """
    if config.unit == "item":
        return after
    out = torch.full(
        (len(tokens), config.steps, tokens.shape[1]), -100, dtype=torch.long, device=tokens.device
    )
    for s in range(1, min(config.steps, tokens.shape[1] - 1) + 1):
        out[:, s - 1, :-s] = tokens[:, s:]
    return out
