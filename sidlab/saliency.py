"""The saliency scorer: what makes a token worth keeping.

RASTP (arXiv 2511.16943) and STAMP's SAP (arXiv 2604.05329) score token i after one encoder layer by

    importance(i) = attention centrality(i) × semantic saliency(i)
    centrality(i) = Σ_heads Σ_queries A[head, query, i]        (`attention_centrality`)
    saliency(i)   = ‖hidden state of i‖₁                        (`semantic_saliency`)

Centrality is how much attention a token receives. Unlike the published code, only real queries vote
and the attention is the clean one (before dropout). A scorer is any callable from `Signals` to a
float tensor [B, N]; `SCORERS` holds the named ones, and "module:function" names one of your own.
Everything here runs under `no_grad`: which tokens are kept is a choice, not something gradients
flow through.
"""

import contextlib
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass
class Signals:
    """What a scorer may look at. Fields are None where unknown.

    Shapes: `hidden` float [B, N, d], the state after the scoring layer; `centrality` float [B, N];
    `mask` [B, N], 1 real, 0 padding; `positions` int64 [B, N], the token's place in its history, 0
    for the oldest; `levels` int64 [B, N], its level in its SID counted from 0, `L` for a separator;
    `item_index` int64 [B, N], which item of the history it belongs to, 0 for the oldest; `visible`
    int64 [B, N], how many tokens of its history see it; `truth` float [B, N], true information in
    nats (planted catalogue); `seed` int64 [B], one a row, for random scorers that must not depend
    on the other rows; `generator` for random scorers without it.
    """

    hidden: Tensor
    centrality: Tensor | None
    mask: Tensor
    positions: Tensor | None = None
    levels: Tensor | None = None
    item_index: Tensor | None = None
    visible: Tensor | None = None
    truth: Tensor | None = None
    seed: Tensor | None = None
    generator: torch.Generator | None = None


@torch.no_grad()
def attention_centrality(attention: Tensor, mask: Tensor, padding_votes: bool = False) -> Tensor:
    """Attention each token receives, summed over heads and real queries (RASTP, S_attn).

    Args: `attention` float [B, H, N, N], post-softmax, rows are queries; `mask` [B, N], 1 real, 0
    padding; `padding_votes`: padded queries count as well, as in the published code. Returns
    float32 [B, N], 0 at padding.
    """
    batch, _, queries, keys = attention.shape
    if queries != keys or mask.shape != (batch, keys):
        raise ValueError(
            f"attention must be [B, H, N, N] with mask [B, N], got {tuple(attention.shape)} and"
            f" {tuple(mask.shape)}"
        )
    # [B, N, N]; a product would be rounded to autocast's bfloat16, and scores would tie
    received = attention.sum(1, dtype=torch.float32)
    if not padding_votes:  # whatever stands in their rows, even NaN
        received = received.masked_fill(mask.unsqueeze(2) == 0, 0)
    return received.sum(1).masked_fill(mask == 0, 0)


@torch.no_grad()
def semantic_saliency(hidden: Tensor, p: float = 1) -> Tensor:
    """The p-norm of each hidden state: float [B, N, d] → float32 [B, N] (RASTP: S_sem, p = 1)."""
    return torch.linalg.vector_norm(hidden, ord=p, dim=-1, dtype=torch.float32)


def _need(signals: Signals, scorer: str, field: str) -> Tensor:
    value = getattr(signals, field)
    if value is None:
        raise ValueError(
            f"scorer={scorer!r} needs signals.{field}, which is None"
            + (
                "; only the planted catalogue knows it: recommend(…, truth=catalogue.truth)"
                if field == "truth"
                else ""
            )
        )
    return value


def _random(signals: Signals) -> Tensor:
    # Drawn by position in the history, so that padding on either side draws the same numbers.
    positions = _need(signals, "random", "positions")
    if signals.seed is not None:
        return (splitmix64(splitmix64(signals.seed)[:, None] + positions) & (2**24 - 1)) / 2**24
    generator = signals.generator
    device = generator.device if generator is not None else positions.device
    draw = torch.rand(positions.shape, generator=generator, device=device).to(positions.device)
    return draw.gather(1, positions.clamp_min(0))


def splitmix64(x: Tensor) -> Tensor:
    """A hash of int64, any shape: equal numbers give equal results on every device, others
    unrelated ones (splitmix64's finaliser).
    """
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _visible(signals: Signals) -> Tensor:
    """`visible`, or where nobody says it, what it is under causal attention: a token is seen by
    itself and those after it.
    """
    if signals.visible is not None:
        return signals.visible
    return signals.mask.sum(1, keepdim=True) - _need(signals, "rastp-visible", "positions")


SCORERS: dict[str, Callable[[Signals], Tensor]] = {
    "rastp": lambda s: _need(s, "rastp", "centrality") * semantic_saliency(s.hidden),
    "rastp-l2": lambda s: _need(s, "rastp-l2", "centrality") * semantic_saliency(s.hidden, p=2),
    # What a token receives of each query that sees it: where attention is causal, older tokens are
    # seen by more.
    "rastp-visible": (
        lambda s: (
            _need(s, "rastp-visible", "centrality")
            * semantic_saliency(s.hidden)
            / _visible(s).clamp_min(1)
        )
    ),
    "norm": lambda s: semantic_saliency(s.hidden),
    "centrality": lambda s: _need(s, "centrality", "centrality"),
    "random": _random,
    "recent": lambda s: _need(s, "recent", "positions"),
    "oracle": lambda s: _need(s, "oracle", "truth"),
}


def named_scorer(name: str) -> Callable[[Signals], Tensor]:
    """The scorer of this name: one of `SCORERS`, or "module:function", which is imported.
    ValueError where there is none, TypeError where it is no function.
    """
    if name in SCORERS:
        return SCORERS[name]
    module, _, function = name.partition(":")
    if not (module and function):
        raise ValueError(
            f"scorer={name!r} is unknown; use one of {', '.join(SCORERS)}, or module:function or a"
            " callable"
        )
    if module == "own":
        raise ValueError(
            f"scorer={name!r} stands for a callable that could not be saved; a module needs another"
            " name than own"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ValueError(
            f"scorer={name!r}: {error}; the module's file must lie in this folder or on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise ValueError(
            f"scorer={name!r}: {error} (if it was added since the import, restart the kernel)"
        ) from error
    if not callable(found):
        raise TypeError(
            f"scorer={name!r} must be a function from Signals to a tensor [B, N], got {found!r}"
        )
    return found


def own_source(scorer: str | Callable) -> str | None:
    """The text that tells two versions of a custom scorer apart: of its module, where it has a
    name; None for those of `SCORERS`, and for what has no source.
    """
    if isinstance(scorer, str) and scorer not in SCORERS:
        named_scorer(scorer)
        scorer = sys.modules[scorer.partition(":")[0]]
    with contextlib.suppress(OSError, TypeError):
        return None if isinstance(scorer, str) else inspect.getsource(scorer)


@torch.no_grad()
def token_importance(
    signals: Signals, scorer: str | Callable[[Signals], Tensor] = "rastp"
) -> Tensor:
    """How much each token is worth keeping: float32 [B, N], −inf where the mask is 0.

    Args: `scorer`: a name as in `named_scorer`, or any callable from `Signals` to a float tensor
    [B, N]. Raises ValueError for an unknown name, a signal that is missing, or a custom scorer's
    result of the wrong shape or with NaN for a token.
    """
    score = (named_scorer(scorer) if isinstance(scorer, str) else scorer)(signals)
    if not (isinstance(scorer, str) and scorer in SCORERS):
        if not isinstance(score, Tensor) or score.shape != signals.mask.shape:
            got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(
                f"the scorer must return a tensor of shape {tuple(signals.mask.shape)} ([B, N]),"
                f" got {got}"
            )
        if (torch.isnan(score) & (signals.mask != 0)).any():
            raise ValueError("the scorer returned NaN; every real token needs a number")
    return score.float().masked_fill(signals.mask == 0, -torch.inf)
