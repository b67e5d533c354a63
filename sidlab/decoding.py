"""From a model to recommended items: beam search that walks only valid SIDs, and exact scoring as its oracle.

The published code decodes unconstrained, so some beams end in codes that belong to no item. Here each beam is a node of the
trie of valid SIDs and grows only into that node's children. Scores are log p(SID | history), the sum over levels of the
log-softmax over all codes of the level: the same number that exact scoring gives, so a wide enough beam equals it.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from sidlab.sids.table import BOS, PAD
from sidlab.windows import history_tokens, pad_histories, truth_tokens


@torch.no_grad()
def recommend(model, histories, k: int = 10, exclude_seen: bool = False, *, beam: int | None = None,
              batch_size: int = 256, truth=None) -> tuple[Tensor, Tensor]:
    """The k best next items of each history.

    Args: `model`: a `SidT5` with its table; `histories`: sequence of arrays of item ids, oldest first (the last `max_items`
    count); `exclude_seen`: never recommend an item of the history; `beam`: width of the search (default: max(k, 10), or more
    by the number of seen items if these are excluded); `truth`: the `PlantedTruth`, for models pruned by the oracle.
    Returns items int64 [B, k] and scores float32 [B, k], best first. Items that share a SID follow one another by id with equal
    scores. Where fewer than k items were found, the rest is item 0 with score −inf.
    """
    table = _table(model)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if beam is not None and beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    histories = [np.asarray(h, np.int64) for h in histories]
    items = torch.zeros(len(histories), k, dtype=torch.long)
    scores = torch.full((len(histories), k), -torch.inf)
    was_training = model.training
    model.eval()
    order = np.argsort([len(h) for h in histories], kind="stable")  # similar lengths together: less padding
    for chunk in np.array_split(order, max(1, -(-len(order) // batch_size))):
        if len(chunk) == 0:
            continue
        part = [histories[i] for i in chunk]
        seen = pad_histories(part, max(len(h) for h in part), table.n_items) if exclude_seen else None
        width = beam or max(k, 10) + (max(len(set(h.tolist())) for h in part) if exclude_seen else 0)
        leaves, leaf_scores = beam_search(model, encode_histories(model, part, truth), width)
        found, score = items_of_leaves(table.trie.to(model.device), leaves, leaf_scores, k, seen)
        items[chunk], scores[chunk] = found.cpu(), score.cpu()
    model.train(was_training)
    return items, scores


def encode_histories(model, histories, truth=None):
    """Run the encoder over histories (arrays of item ids): returns its output, a `PrunedEncoderOutput`."""
    config, table = model.config, _table(model)
    # The published code prunes a share of the padded length, so the padding has to be the published one.
    fixed = config.pruning is not None and config.pruning["mode"] == "reference"
    padded = pad_histories(histories, config.max_items, table.n_items, slots=config.max_items if fixed else None)
    tokens = history_tokens(padded, table, config.separators)
    extra = {}
    if truth is not None:
        recent = [h[-config.max_items :] for h in histories]
        nats = truth.information(recent)
        extra["truth"] = truth_tokens(nats, table.levels, config.separators, tokens.shape).to(model.device)
    tokens = tokens.to(model.device)
    return model.encoder(input_ids=tokens, attention_mask=(tokens != PAD).long(), **extra)


@torch.no_grad()
def beam_search(model, encoded, beam: int) -> tuple[Tensor, Tensor]:
    """Trie leaves int64 [B, b] and log-probabilities float32 [B, b], best first, b ≤ `beam`; −inf marks an empty place. `encoded`: what
    `encode_histories` returns."""
    table = _table(model)
    trie = table.trie.to(model.device)
    memory, memory_mask = encoded.last_hidden_state, encoded.attention_mask  # [B, K, d], [B, K]
    batch = len(memory)
    nodes = torch.zeros(batch, 1, dtype=torch.long, device=model.device)  # every search starts at the root
    scores = torch.zeros(batch, 1, device=model.device)
    tokens = torch.full((batch, 1), BOS, device=model.device)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    # Beams of one history attend to the same keys and values, which our own attention takes as they are; others need a copy for each.
    shared = model.decoder.config._attn_implementation == "sidlab"
    if shared:
        memory_mask = memory_mask[:, None, None].bool()  # [B, 1, 1, K], which the decoder hands on
    for depth, offset in enumerate(table.offsets):
        hidden = model.decoder(input_ids=tokens.reshape(-1, 1), encoder_hidden_states=memory, encoder_attention_mask=memory_mask,
                               past_key_values=cache, use_cache=True).last_hidden_state[:, -1]  # [B·b, d]
        logits = F.linear(hidden, model.lm_head.weight[offset : offset + table.widths[depth]])
        log_p = logits.float().log_softmax(-1).view(*nodes.shape, -1)  # [B, b, W]
        codes, children, valid = trie.children(depth, nodes)  # [B, b, C] each
        grown = (scores.unsqueeze(-1) + log_p.gather(-1, codes)).masked_fill(~valid, -torch.inf).flatten(1)  # [B, b·C]
        before, width = nodes.shape[1], min(beam, grown.shape[1])
        scores, choice = grown.topk(width, dim=1)  # [B, width]
        parent = choice // codes.shape[-1]
        nodes = children.flatten(1).gather(1, choice)
        tokens = codes.flatten(1).gather(1, choice) + offset
        rows = (torch.arange(batch, device=model.device)[:, None] * before + parent).flatten()
        cache.self_attention_cache.batch_select_indices(rows)
        if width != before and not shared:  # the same for all beams of a history, so this changes only with their number
            cache.cross_attention_cache.batch_select_indices(rows)
            memory, memory_mask = memory[rows], memory_mask[rows]
    return nodes, scores


@torch.no_grad()
def score_items(model, histories, *, chunk: int = 512, truth=None) -> Tensor:
    """log p(SID of the item | history) of every item by teacher forcing: float32 [B, n_items], column 0 is item 1.

    Slow and plain, L decoder steps for each item: the oracle of `recommend`.
    """
    table = _table(model)
    model.eval()
    encoded = encode_histories(model, [np.asarray(h, np.int64) for h in histories], truth)
    sids = table.item_tokens[1:].to(model.device)  # [n, L]
    out = []
    for part in sids.split(chunk):
        labels = part.repeat(len(histories), 1)  # [B·c, L]
        again = {"last_hidden_state": encoded.last_hidden_state.repeat_interleave(len(part), 0),
                 "attention_mask": encoded.attention_mask.repeat_interleave(len(part), 0)}
        logits = model(encoder_outputs=type(encoded)(**again), labels=labels).logits
        log_p = logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)  # [B·c, L]
        out.append(log_p.sum(-1).view(len(histories), -1))
    return torch.cat(out, dim=1).cpu()


def _table(model):
    if model.table is None:
        raise ValueError("the model has no SidTable: build it with one, or call model.set_table(table)")
    return model.table


def items_of_leaves(trie, leaves, scores, k, seen=None):
    """The first k items of ranked leaves, sharers expanded, `seen` [B, M] left out: items and scores [B, k]."""
    items, valid = trie.leaf_items(leaves)  # [B, b, M]
    valid = valid & (scores > -torch.inf).unsqueeze(-1)
    scores = scores.unsqueeze(-1).expand_as(items).flatten(1)
    items, valid = items.flatten(1), valid.flatten(1)
    if seen is not None:
        seen = torch.from_numpy(seen).to(items.device)
        valid = valid & ~(items.unsqueeze(-1) == seen.unsqueeze(1)).any(-1)
    first = torch.argsort(~valid, dim=1, stable=True)[:, :k]  # valid ones first, ranks kept
    keep = valid.gather(1, first)
    found = F.pad(items.gather(1, first).masked_fill(~keep, 0), (0, k - first.shape[1]))
    score = F.pad(scores.gather(1, first).masked_fill(~keep, -torch.inf), (0, k - first.shape[1]), value=-torch.inf)
    return found, score
