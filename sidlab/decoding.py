"""From a model to recommended items: beam search that walks only valid SIDs, and exact scoring as
its oracle.

The published code decodes unconstrained, so some beams end in codes that belong to no item. Here
each beam is a node of the trie of valid SIDs and grows only into that node's children. Scores are
log p(SID | history), the sum over levels of the log-softmax over all codes of the level: the same
number that exact scoring gives, so a wide enough beam equals it.
"""

import contextlib
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sidlab.checks import as_histories, integer
from sidlab.sids.table import BOS, PAD
from sidlab.windows import history_tokens, pad_histories, truth_tokens


@torch.no_grad()
def recommend(
    model,
    histories,
    k: int = 10,
    exclude_seen: bool = False,
    *,
    beam: int | None = None,
    batch_size: int = 256,
    truth=None,
) -> tuple[Tensor, Tensor]:
    """The k best next items of each history.

    Args: `model`: a `SidT5` or `SidQwen` with its table; `histories`: sequence of arrays of item
    ids, oldest first (the last `max_items` count); `exclude_seen`: never recommend an item of the
    history; `beam`: width of the search (default: max(k, 10), or more by the number of seen items
    if these are excluded); `truth`: the `PlantedTruth`, for models pruned by the oracle. Returns
    items int64 [B, k] and scores float32 [B, k], best first. Items that share a SID follow one
    another by id with equal scores. Where fewer than k items were found, the rest is item 0 with
    score −inf: the default beam finds k or all there are, and of a narrower one that finds fewer a
    warning tells.
    """
    table = table_of(model)
    k = integer("k", k)
    batch_size = integer("batch_size", batch_size)
    histories = as_histories(histories)
    beam = None if beam is None else integer("beam", beam)
    items = torch.zeros(len(histories), k, dtype=torch.long)
    scores = torch.full((len(histories), k), -torch.inf)
    n_seen = np.array([len(np.unique(h)) if exclude_seen else 0 for h in histories], np.int64)
    # Similar lengths together: less padding
    order = np.argsort([len(h) for h in histories], kind="stable")
    with _evaluating(model):
        for chunk in np.array_split(order, -(-len(order) // batch_size)) if len(order) else ():
            part = [histories[i] for i in chunk]
            seen = (
                pad_histories(part, max(len(h) for h in part), table.n_items)
                if exclude_seen
                else None
            )
            # [B]
            width = torch.from_numpy(
                max(k, 10) + n_seen[chunk] if beam is None else np.full(len(part), beam)
            )
            leaves, leaf_scores = beam_search(model, encode_histories(model, part, truth), width)
            found, score = items_of_leaves(
                table.trie_on(model.device), leaves, leaf_scores, k, seen
            )
            items[chunk] = found.cpu()
            scores[chunk] = score.cpu()
    short = ((items > 0).sum(1).numpy() < np.minimum(k, table.n_items - n_seen)).sum()
    if beam is not None and short:
        warnings.warn(
            f"beam={beam} is too narrow for k={k}: {short} of {len(histories)} histories got fewer"
            f" items. Leave beam out, or give {k + n_seen.max()}, k and the most items that a"
            " history excludes",
            stacklevel=3,
        )
    return items, scores


@contextlib.contextmanager
def _evaluating(model):
    """`model` in evaluation mode, and back in its own however this ends."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def encode_histories(model, histories, truth=None):
    """Run the model over histories (arrays of item ids): what `model.encode` returns."""
    return model.encode(**_inputs(model, histories, truth))


def _inputs(model, histories, truth):
    config = model.config
    table = table_of(model)
    # The published code prunes a share of the padded length, so the padding has to be the published
    # one.
    fixed = config.pruning is not None and config.pruning["mode"] == "reference"
    slots = (config.padded_items or config.max_items) if fixed else None
    padded = pad_histories(histories, config.max_items, table.n_items, slots)
    tokens = history_tokens(padded, table, config.separators)
    extra = {}
    if truth is not None:
        recent = [h[-config.max_items :] for h in histories]
        nats = truth.information(recent)
        extra["truth"] = truth_tokens(nats, table.levels, config.separators, tokens.shape).to(
            model.device
        )
    tokens = tokens.to(model.device)
    return {"input_ids": tokens, "attention_mask": (tokens != PAD).long(), **extra}


@torch.no_grad()
def beam_search(model, encoded, beam: int | Tensor) -> tuple[Tensor, Tensor]:
    """Trie leaves int64 [B, b] and log-probabilities float32 [B, b], best first, b ≤ `beam`; −inf
    marks an empty place. `encoded`: what `encode_histories` returns; `beam`: the width, one for all
    rows or int64 [B].
    """
    table = table_of(model)
    trie = table.trie_on(model.device)
    search = model.search(encoded)
    batch = len(encoded.attention_mask)
    beam = torch.as_tensor(beam).expand(batch)
    widest = int(beam.max())
    beam = beam.to(model.device).unsqueeze(-1)  # [B, 1]
    # Every search starts at the root
    nodes = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    scores = torch.zeros(batch, 1, device=model.device)
    tokens = torch.full((batch, 1), BOS, device=model.device)
    parents = None
    for depth, offset in enumerate(table.offsets):
        # [B, b, W]
        log_p = model.level_logits(search.step(tokens, parents), depth).float().log_softmax(-1)
        codes, children, valid = trie.children(depth, nodes)  # [B, b, C] each
        # [B, b·C]
        grown = (
            (scores.unsqueeze(-1) + log_p.gather(-1, codes))
            .masked_fill(~valid, -torch.inf)
            .flatten(1)
        )
        scores, choice = grown.topk(min(widest, grown.shape[1]), dim=1)  # [B, b']
        # As if each row were alone
        scores = scores.masked_fill(
            torch.arange(scores.shape[1], device=model.device) >= beam, -torch.inf
        )
        parents = choice // codes.shape[-1]
        nodes = children.flatten(1).gather(1, choice)
        tokens = codes.flatten(1).gather(1, choice) + offset
    return nodes, scores


@torch.no_grad()
def score_items(model, histories, *, chunk: int = 64, truth=None) -> Tensor:
    """log p(SID of the item | history) of every item by teacher forcing: float32 [B, n_items],
    column 0 is item 1.

    Slow and plain, a pass of the whole model for each history and item: the oracle of `recommend`.
    """
    inputs = _inputs(model, as_histories(histories), truth)
    out = []
    with _evaluating(model):
        for labels in model.table.item_tokens[1:].to(model.device).split(chunk):  # [c, L]
            targets = labels.repeat(len(histories), 1)  # [B·c, L]
            repeated = {name: x.repeat_interleave(len(labels), 0) for name, x in inputs.items()}
            logits = model(**repeated, labels=targets).logits  # [B·c, L, V]
            score = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum((1, 2))
            out.append(score.view(len(histories), -1))  # [B, c]
    return torch.cat(out, dim=1).cpu()


def table_of(model):
    if model.table is None:
        raise ValueError(
            "the model has no SidTable: build it with one, or call model.set_table(table)"
        )
    return model.table


def items_of_leaves(trie, leaves, scores, k, seen=None):
    """The first k items of ranked leaves, sharers expanded, `seen` [B, M] left out: items and
    scores [B, k].
    """
    # More of one leaf can't be among the first k; thousands of items that nobody described may
    # share one.
    items, valid = trie.leaf_items(leaves, k if seen is None else k + seen.shape[1])  # [B, b, M]
    valid = valid & (scores > -torch.inf).unsqueeze(-1)
    scores = scores.unsqueeze(-1).expand_as(items).flatten(1)
    items = items.flatten(1)
    valid = valid.flatten(1)
    if seen is not None:
        seen = torch.from_numpy(seen).to(items.device)
        valid = valid & ~(items.unsqueeze(-1) == seen.unsqueeze(1)).any(-1)
    first = torch.argsort(~valid, dim=1, stable=True)[:, :k]  # valid ones first, ranks kept
    keep = valid.gather(1, first)
    found = F.pad(items.gather(1, first).masked_fill(~keep, 0), (0, k - first.shape[1]))
    score = F.pad(
        scores.gather(1, first).masked_fill(~keep, -torch.inf),
        (0, k - first.shape[1]),
        value=-torch.inf,
    )
    return found, score
