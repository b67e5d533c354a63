"""The game of the pruning explorer: whom does a reader beat, by hand or with a rule?"""

import numpy as np
import torch

from sidlab.checks import integer
from sidlab.metrics import recall_at
from sidlab.pruning import PruningConfig, highest
from sidlab.saliency import token_importance

PLACES = 10  # of the list


def beaten(scores: dict) -> str:
    """Whom the reader, "you" in {name: (place, log-probability of the next item)}, beats."""
    mine = scores["you"][1]
    level = []
    worse = []
    for name, (_, theirs) in scores.items():
        if name == "you" or mine is None:
            continue
        if theirs is None or theirs < mine - 5e-3:
            worse.append(name)
        elif theirs < mine + 5e-3:
            level.append(name)
    said = [f"Better than {', '.join(worse)}." if worse else "Better than none so far."]
    said += [f"Level with {', '.join(level)}."] if level else []
    return " ".join(said)


def _recall(model, crowd, scorer, levels, newest, layer, positions):
    """(recall@10, kept tokens) of many users when `scorer` keeps as many tokens of each as the
    rule does. "rule": the rule itself, of which alone the tokens are counted; None: nothing is
    pruned."""
    from sidlab.decoding import encode_histories
    from sidlab.training import evaluate

    pruning = scorer and PruningConfig(
        after_layer=layer,
        keep=1.0,
        mass=1.0,
        positions=positions,
        scorer=as_many(keep_rule(levels, newest), None if scorer == "rule" else scorer),
    )
    histories = [history[:-1] for history in crowd]
    targets = np.array([history[-1] for history in crowd])
    before = model.pruning
    model.set_pruning(pruning)
    try:
        recall = float(recall_at(evaluate(model, histories, targets), PLACES).mean())
        kept = 0
        if scorer == "rule":
            with torch.no_grad():
                kept = int(encode_histories(model, histories).attention_mask.sum())
    finally:
        model.set_pruning(before)
    return recall, kept


def play_rule(model, crowd, levels, newest: int, layer: int, positions: str) -> dict:
    """A rule against scorers that keep as many tokens of each history of `crowd`, by recall@10.

    The rule keeps tokens of these `levels` (from 0; the last is the separator, where there is one)
    in the `newest` items. Returns {"levels", "newest", "rows", "text", "what", "share", "users"},
    all ready to be shown. ValueError for levels that there are not.
    """
    names = level_names(model)
    levels = tuple(sorted({integer("levels", level, 0) for level in levels}))
    if not levels or levels[-1] >= len(names):
        raise ValueError(
            f"levels must hold at least one of 0..{len(names) - 1}, got {list(levels)}"
        )
    newest = integer("newest", newest)
    scored = {
        name: _recall(model, crowd, name, levels, newest, layer, positions)
        for name in ("rule", "rastp", "random", "recent")
    }
    unpruned, _ = _recall(model, crowd, None, (), 1, layer, positions)
    total = sum(min(len(history) - 1, model.config.max_items) for history in crowd) * len(names)
    share = scored["rule"][1] / total
    rows = [
        ["your rule" if name == "rule" else name, f"{recall:.3f}"]
        for name, (recall, _) in scored.items()
    ]
    rows.append(["nothing pruned", f"{unpruned:.3f}"])
    kinds = ", ".join(names[level] for level in levels)
    what = f"keep {kinds} of the newest {newest} item{'s' * (newest > 1)}"
    said = ", ".join(f"{name} {recall}" for name, recall in rows)
    text = (
        f"sidlab: {what} ({share:.0%} of the tokens, after layer {layer}). "
        f"recall@10 of {len(crowd)} users: {said}."
    )
    return {
        "levels": list(levels),
        "newest": newest,
        "rows": rows,
        "text": text,
        "what": what,
        "share": f"{share:.0%}",
        "users": len(crowd),
    }


def keep_rule(levels, newest: int):
    """A scorer (see `saliency`): 1 for tokens of these `levels` (from 0) in the `newest` items,
    else 0."""
    wanted = torch.tensor(levels)

    def scorer(signals):
        real = signals.mask.bool()
        last = signals.item_index.masked_fill(~real, -1).amax(1, keepdim=True)  # [B, 1]
        chosen = (
            torch.isin(signals.levels, wanted.to(signals.levels.device))
            & (last - signals.item_index < newest)
            & real
        )
        return chosen.float()

    return scorer


def as_many(rule, scorer=None):
    """A scorer: 1 for as many tokens of each row as `rule` gives, those that `scorer` finds most
    important (None: the rule's own), else 0. With keep=1 and mass=1 exactly these are kept."""

    def chosen(signals):
        ones = rule(signals)
        return (
            ones
            if scorer is None
            else highest(token_importance(signals, scorer), ones.sum(1).long()).float()
        )

    return chosen


def level_names(model):
    return [f"level {v + 1}" for v in range(model.table.levels)] + [
        "separator"
    ] * model.config.separators
