"""Look inside: one history in a model, opened up layer by layer, and pruned in any way without
running it anew.

The encoder runs once, unpruned, and leaves its hidden states and attention. Pruning after some
layer then needs only the layers after it and the decoder, which is what lets an explorer follow a
slider. What comes out is what `recommend` gives for the same model with the same `PruningConfig`
(and `at_inference`, which a probe does not ask for).
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from sidlab.decoding import beam_search, items_of_leaves, table_of
from sidlab.fast.scored_attention import SCORED
from sidlab.models.t5 import PrunedEncoderOutput
from sidlab.pruning import PruningConfig
from sidlab.saliency import attention_centrality
from sidlab.windows import history_tokens, pad_histories, truth_tokens


class Pruned(NamedTuple):
    """`kept` bool [N]; `importance` float32 [N] (None if pooled); `attention` float32 [layers
    after, H, K, K], of the layers after the pruner; `items` int64 [k] and `scores` float32 [k],
    the recommendations.
    """

    kept: Tensor
    importance: Tensor | None
    attention: Tensor
    items: Tensor
    scores: Tensor


def on_cpu(model):
    """`model`, or a copy where it stands on a GPU: one history is little work, and all of it is
    read as numbers.
    """
    return model if model.device.type == "cpu" else copy.deepcopy(model).cpu()


class Probe:
    """One history (item ids, oldest first; the last `max_items` count) in a `SidT5` that has its
    table.

    Attributes: `history` int64 [M]; `tokens`, `levels`, `item_index` int64 [N] (a token's id; its
    level from 0, L for a separator; its item's place in `history`); `hidden`, a list of float32 [N,
    d], 0 the embeddings, then the state after each layer; `attention` float32 [layers, H, N, N],
    post-softmax, rows are queries; `truth` float32 [N], nats, where a `PlantedTruth` is given.

    >>> probe = Probe(model, [3, 1, 4])  # doctest: +SKIP
    >>> probe.prune(PruningConfig(keep=0.5)).items  # doctest: +SKIP
    """

    @torch.no_grad()
    def __init__(self, model, history, truth=None):
        if not hasattr(model, "encoder"):
            raise ValueError(
                "a probe opens the encoder of a SidT5, and so do the explorers; got a"
                f" {type(model).__name__}"
            )
        self.model = on_cpu(model)
        config = model.config
        model = self.model
        self.history = pad_histories([history], config.max_items, table_of(model).n_items)[0]
        # Its own, so that the model stays as it is
        self._encoder = copy.deepcopy(model.encoder).eval()
        # [1, N]
        self.input_ids = history_tokens(self.history[None], model.table, config.separators).to(
            model.device
        )
        self.mask = torch.ones_like(self.input_ids)
        self.tokens = self.input_ids[0]
        self.levels = model.encoder.token_level[self.tokens]
        self.item_index = (self.levels == 0).cumsum(0) - 1
        self.truth = None
        if truth is not None:
            nats = truth.information([self.history])
            self.truth = truth_tokens(
                nats, model.table.levels, config.separators, self.input_ids.shape
            )[0]
        states, self._bias, self.attention = self._run(
            model.encoder.embed_tokens(self.input_ids), None, 0, self.item_index[None]
        )
        self.hidden = [state[0] for state in states]

    def _run(self, hidden, bias, first, item):
        """Blocks `first`, `first` + 1, … of the encoder: the states before and after each, the
        position bias, and the attention. `item` int64 [1, N], the item that each token belongs to.
        """
        states = [hidden]
        attention = []
        mask = self._encoder.self_mask(hidden, None, item)
        scored = copy.copy(self._encoder.config)
        scored._attn_implementation = SCORED
        for block in self._encoder.block[first:]:
            block.layer[0].SelfAttention.config = scored
            record = {"keep_attention": True}
            hidden, bias, _ = block(
                hidden, mask, bias, record=record, token_mask=self.mask[:, : hidden.shape[1]]
            )
            states.append(hidden)
            attention.append(record["attention"][0])
        shape = (0, self.model.config.num_heads, *(2 * [hidden.shape[1]]))
        return states, bias, torch.stack(attention) if attention else hidden.new_zeros(shape)

    def centrality(self, layer: int) -> Tensor:
        """Attention that each token receives in `layer` (from 1): float32 [N]."""
        return attention_centrality(self.attention[layer - 1][None], self.mask)[0]

    @torch.no_grad()
    def prune(
        self, pruning: PruningConfig | None, *, k: int = 10, beam: int | None = None, without=()
    ) -> Pruned:
        """Prune as `pruning` says (None: not at all) and recommend.

        `without`: positions of tokens that are taken out first, so that they neither are kept nor
        reach any later layer (the layers up to the pruner have seen them). Needs `pruning` with
        reduce="select". Of fewer than `k` items all come. Raises ValueError as the pruning layer
        does.
        """
        if pruning is not None and pruning.mode == "reference":
            raise ValueError(
                'a probe shows one history without padding, and mode="reference" prunes a share of'
                " the padded length"
            )
        if len(without) and (pruning is None or pruning.reduce != "select"):
            raise ValueError(f'without needs pruning with reduce="select", got pruning={pruning}')
        item = self.item_index[None]  # [1, N]
        encoder = self._encoder
        out = PrunedEncoderOutput(attention_mask=self.mask, items_back=len(self.history) - item)
        encoder.set_pruning(pruning)
        if pruning is None:
            states = [state[None] for state in self.hidden]
            attention = self.attention[:0]
        else:
            layer = pruning.after_layer
            keep = torch.ones(self.input_ids.shape[1], dtype=torch.bool, device=self.tokens.device)
            if len(without):
                keep[torch.as_tensor(without, device=keep.device)] = False
            out.attention_mask = self.mask * keep
            truth = self.truth[None].to(self.tokens.device) if self.truth is not None else None
            hidden, bias, _ = encoder.prune(
                self.hidden[layer][None],
                self._bias,
                self.centrality(layer)[None],
                self.input_ids,
                truth,
                out,
                item=item,
            )
            used = int(out.attention_mask.sum())
            out.attention_mask, out.positions = (
                out.attention_mask[:, :used],
                out.positions[:, :used],
            )
            out.items_back = out.items_back[:, :used]
            states, _, attention = self._run(
                hidden[:, :used], bias[..., :used, :used], layer, item.gather(1, out.positions)
            )
        out.last_hidden_state = encoder.final_layer_norm(states[-1])
        training = self.model.training
        try:
            leaves, scores = beam_search(self.model.eval(), out, beam or max(k, 10))
        finally:
            self.model.train(training)
        k = min(k, self.model.table.n_items)
        items, scores = items_of_leaves(
            self.model.table.trie_on(self.model.device), leaves, scores, k
        )
        kept = torch.ones_like(self.tokens, dtype=torch.bool)
        if pruning is not None:
            kept = torch.zeros_like(kept).index_fill(0, out.positions[0], True)
        importance = None if out.importance is None else out.importance[0]
        return Pruned(kept.cpu(), importance, attention, items[0].cpu(), scores[0].cpu())
