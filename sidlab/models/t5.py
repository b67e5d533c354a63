"""SidT5: an encoder-decoder recommender over semantic IDs, with a pruning layer inside the encoder.

A subclass of Hugging Face's T5 that overrides three short pieces and nothing else:

* `PrunedEncoder.forward`: the loop over encoder blocks, with the `TokenPruner` after block
  `after_layer`;
* `SidT5.forward`: output heads by level, cross-attention on the pruned mask, the MAP loss;
* the attention of the one block that scores, registered with `transformers.AttentionInterface`: all
  other blocks keep the library's fused attention. On a GPU that block is fused as well
  (`fast/scored_attention.py`).

An item is its SID's tokens, followed by one learned separator where `separators` is on. The decoder
starts from BOS and predicts the L tokens of the target; there is no EOS, for a SID has a fixed
length.

`PruningConfig(mode="reference")` repeats what RASTP's published code does, for comparison: it keeps
a share of the padded length (`pruning.reference_choice`), without position bias after the pruner,
hands the decoder the mask of the first K slots (its own layers get that of the kept ones), lets
padded queries vote, whose slots hold the first code and the separator (`published_padding`), scores
with the attention after dropout, lets separators compete, and uses unfused attention everywhere.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5PreTrainedModel, T5Stack
from transformers.utils.output_capturing import capture_outputs

from sidlab.fast import cpu_layers, kernels
from sidlab.models.base import PrunedStack, SidEmbedding, SidModel
from sidlab.models.beam_state import BeamState
from sidlab.models.t5_layers import (
    DeepFeedForward,
    NormedProjection,
    PrunedEncoderOutput,
    SidOutput,
    SidT5Config,
    library_mask,
    published_padding,
)
from sidlab.pruning import pool_tokens
from sidlab.sids.table import BOS, PAD, SidTable

# Items of history that `cross_bias` tells apart; those farther back share the last one's bias
ITEMS_BACK = 32


class PrunedEncoder(PrunedStack, T5Stack):
    """T5's encoder with a `TokenPruner` after block `pruning.after_layer`; without `pruning` it is
    T5's encoder.
    """

    attentions = property(lambda self: [block.layer[0].SelfAttention for block in self.block])

    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        truth=None,
        padded=True,
        **kwargs,
    ):
        """`input_ids` int64 [B, N] or `inputs_embeds` [B, N, d]; `attention_mask` [B, N] (default:
        not PAD); `truth` float [B, N], for the oracle scorer; `padded`: False where it is known
        that no slot is empty. Returns `PrunedEncoderOutput`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if attention_mask is None:
            attention_mask = (
                inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.long)
                if input_ids is None
                else (input_ids != PAD).long()
            )
        pruning = (
            self.pruning
            if self.training or (self.pruning is not None and self.pruning.at_inference)
            else None
        )
        reference = pruning is not None and pruning.mode == "reference"
        items = self.config.padded_items or self.config.max_items
        full = items * (len(self.config.widths) + self.config.separators)
        if reference and attention_mask.shape[1] != full:
            raise ValueError(
                f'mode="reference" prunes a share of the padded length: pad every history to {full}'
                f' slots (TrainConfig(padding="fixed")), got {attention_mask.shape[1]}'
            )
        if inputs_embeds is None:
            read = input_ids
            if reference:
                padding = published_padding(self.config, full, input_ids.device)
                read = torch.where(attention_mask.bool(), input_ids, padding)
            inputs_embeds = self.embed_tokens(read)  # [B, N, d]
        out = PrunedEncoderOutput(attention_mask=attention_mask)
        hidden = self.dropout(inputs_embeds)
        item = (
            self.items_of(input_ids, attention_mask)
            if self.config.encoder_mask == "items" or self.config.cross_bias
            else None
        )
        if self.config.cross_bias:
            out.items_back = (
                torch.where(attention_mask.bool(), item, -1).amax(1, keepdim=True) - item + 1
            )
        mask = self.self_mask(hidden, attention_mask if padded else None, item)
        bias = None
        eager = reference or self.config._attn_implementation == "eager"
        for number, block in enumerate(self.block, start=1):
            # For `scored_attention`
            ours = (
                {"eager": eager} if block.layer[0].SelfAttention.config is not self.config else {}
            )
            if ours and pruning is not None:
                # Fused scoring knows no such mask
                path = "plain" if self.config.encoder_mask == "items" else self.scoring_path
                ours |= {
                    "record": {},
                    "token_mask": attention_mask,
                    "reference": reference,
                    "path": path,
                }
            hidden, bias, _ = block(hidden, mask, bias, **ours, **kwargs)
            if pruning is not None and number == pruning.after_layer:
                centrality = ours["record"]["centrality"] if ours else None
                hidden, bias, mask = self.prune(
                    hidden, bias, centrality, input_ids, truth, out, padded, item
                )
        out.last_hidden_state = self.dropout(self.final_layer_norm(hidden))
        return out

    def items_of(self, input_ids, attention_mask):
        """Which item of its history each token belongs to, from 0: int64 [B, N]."""
        if input_ids is None:
            raise ValueError(
                f"encoder_mask={self.config.encoder_mask!r} and cross_bias={self.config.cross_bias}"
                " need input_ids, which say where an item begins; got inputs_embeds"
            )
        return (
            ((self.token_level[input_ids] == 0) & attention_mask.bool()).cumsum(1) - 1
        ).clamp_min(0)

    def visible(self, tokens, positions, levels):
        # [B, 1]; all see all, but under the mask of items its own item's and later ones
        n = tokens.sum(1, keepdim=True)
        if self.config.encoder_mask == "full":
            return n
        return n - torch.where(levels == 0, positions, 0).cummax(1).values

    def self_mask(self, hidden, tokens, item):
        """The library's form of the mask among the tokens of `hidden` [B, N, d]: `tokens` [B, N],
        None where all are real; `item` as `items_of` gives it.
        """
        if self.config.encoder_mask == "full":
            return create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden, attention_mask=tokens
            )
        seen = item.unsqueeze(1) <= item.unsqueeze(2)  # [B, N, N], rows are queries
        if tokens is not None:
            seen = seen & tokens.bool().unsqueeze(1)
        return library_mask(seen.unsqueeze(1), self.config, hidden.dtype)

    def prune(self, hidden, bias, centrality, input_ids, truth, out, padded=True, item=None):
        """Scores, chooses and gathers what block `pruning.after_layer` gave: `hidden` [B, N, d],
        `bias` [B or 1, H, N, N], `centrality` [B, N], `item` int64 [B, N], which item a token
        belongs to, where the mask or the cross-attention asks for it. Fills the fields of `out`;
        returns the state, bias and mask of the layers after the pruner.
        """
        pruning = self.pruning
        tokens = out.attention_mask
        if pruning.reduce == "pool":
            pruned = pool_tokens(hidden, tokens, pruning.keep)
        else:
            pruned = self.select(hidden, centrality, input_ids, truth, out)
        # What the decoder gets; the published code gathers its mask for the encoder's layers alone
        out.attention_mask = (
            tokens[:, : pruned.mask.shape[1]].long() if pruning.mode == "reference" else pruned.mask
        )
        out.positions = pruned.positions
        seen = pruned.mask if self.padded_after(padded) else None
        if out.items_back is not None:
            out.items_back = out.items_back.gather(1, pruned.positions)
        mask = self.self_mask(
            pruned.hidden, seen, None if item is None else item.gather(1, pruned.positions)
        )
        return pruned.hidden, self._bias_after(bias, pruned), mask

    def _bias_after(self, bias, pruned):
        """Relative position bias of the kept tokens, [B, H, K, K] or [1, H, K, K]."""
        slots = pruned.positions.shape[1]
        if self.pruning.positions == "none" or self.pruning.mode == "reference":
            return torch.zeros_like(bias[..., :slots, :slots])
        if self.pruning.positions == "compact":
            return bias[..., :slots, :slots]
        by_distance = kernels.by_distance(bias)  # [H, 2N − 1]
        # [B, K, K]
        distance = pruned.positions[:, None, :] - pruned.positions[:, :, None] + bias.shape[-1] - 1
        # By row, so that in the backward pass not all rows add into the same few numbers.
        pairs = distance.flatten(1)[:, None].expand(-1, len(by_distance), -1)  # [B, H, K · K]
        # [B, H, K, K]
        return (
            by_distance.expand(len(pairs), -1, -1).gather(2, pairs).unflatten(2, distance.shape[1:])
        )


class SidT5(SidModel, T5ForConditionalGeneration):
    """Generates the SID of the next item from the SIDs of a history.

    Build it with `SidT5(config, table)`. `save_pretrained` writes the table beside the weights,
    `from_pretrained` reads it.
    """

    config_class = SidT5Config
    stack = property(lambda self: self.encoder)

    def __init__(self, config: SidT5Config, table: SidTable | None = None):
        # Not the parent's own __init__: it would build and initialise an encoder that is then
        # thrown away.
        T5PreTrainedModel.__init__(self, config)
        self.model_dim = config.d_model
        self.shared = SidEmbedding(config, config.d_model)
        encoder_config = copy.deepcopy(config)
        decoder_config = copy.deepcopy(config)
        encoder_config.is_decoder = False
        encoder_config.use_cache = False
        decoder_config.is_decoder = True
        decoder_config.num_layers = config.num_decoder_layers
        reference = config.pruning is not None and config.pruning.get("mode") == "reference"
        if reference or config._attn_implementation == "sdpa":
            encoder_config._attn_implementation = decoder_config._attn_implementation = (
                "eager" if reference else "sidlab"
            )
        self.encoder = PrunedEncoder(encoder_config)
        self.decoder = T5Stack(decoder_config)
        self.encoder.embed_tokens = self.decoder.embed_tokens = self.shared
        # The parent's tying: the heads of the levels are slices of the embedding. These keys come
        # back with `shared`.
        names = [name for name, _ in self.shared.named_parameters()]
        tied = {
            f"{stack}.embed_tokens.{name}": f"shared.{name}"
            for stack in ("encoder", "decoder")
            for name in names
        }
        if config.tie_embeddings:
            tied["lm_head.weight"] = "shared.weight"
        self._tied_weights_keys = tied
        self._keys_to_ignore_on_save = list(tied)
        self.cross_bias = nn.Embedding(ITEMS_BACK, config.num_heads) if config.cross_bias else None
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        plain = config.ffn_hidden_layers == 1 and config.ffn == "t5"
        with torch.random.fork_rng(devices=[], enabled=plain):
            for block in [*self.encoder.block, *self.decoder.block]:
                theirs = block.layer[-1].DenseReluDense
                ours = DeepFeedForward(config)
                if plain:  # the library's layer has drawn its weights already
                    ours.wi = theirs.wi
                    ours.wo = theirs.wo
                    ours._is_hf_initialized = True
                block.layer[-1].DenseReluDense = ours
        if config.residual_dropout is not None:
            for stack in (self.encoder, self.decoder):
                for module in (stack, *(layer for block in stack.block for layer in block.layer)):
                    module.dropout = nn.Dropout(config.residual_dropout)
        if not reference:
            cpu_layers.replace_dropout(self)
        if config.qk_norm:
            for layer in self._attentions():
                layer.q, layer.k = (
                    NormedProjection(linear, config.d_kv) for linear in (layer.q, layer.k)
                )
        self.finish(config.d_model, table, decoder_start_token_id=BOS)
        # T5's layer casts for a `wo` in float32, `DeepFeedForward` has all its weights in one dtype
        self._keep_in_fp32_modules = set()

    def _attentions(self):
        """All attention modules of both stacks."""
        layers = (
            layer
            for stack in (self.encoder, self.decoder)
            for block in stack.block
            for layer in block.layer[:-1]
        )
        return [getattr(layer, "SelfAttention", None) or layer.EncDecAttention for layer in layers]

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, NormedProjection):
            init.constant_(module.norm, self.config.d_kv**-0.25)
        if isinstance(module, SidT5):
            init.normal_(module.shared.weight, std=self.config.embedding_init)
            if not self.config.tie_embeddings:  # the library would draw them fifty times as large
                init.normal_(module.lm_head.weight, std=self.config.embedding_init)
            if module.cross_bias is not None:
                # Each head prefers newer items more gently than the one before it, as in ALiBi
                # (arXiv 2108.12409); the last has no preference. From zero, biases would take
                # thousands of steps to tell items apart.
                slopes = 2.0 ** -torch.arange(self.config.num_heads)
                slopes[-1] = 0.0
                init.copy_(module.cross_bias.weight, -slopes * torch.arange(ITEMS_BACK)[:, None])
            if self.config.zero_init:
                blocks = [*module.encoder.block, *module.decoder.block]
                for output in [
                    *(layer.o for layer in module._attentions()),
                    *(block.layer[-1].DenseReluDense.wo for block in blocks),
                ]:
                    init.zeros_(output.weight)
            if self.config.position_init is not None:
                for stack in (module.encoder, module.decoder):
                    bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias
                    start = bias.weight.detach().clone()
                    # T5 has a bias of its own for each distance below 8
                    for head in range(min(self.config.num_heads // 2, 7)):
                        start[head + 1, head] += self.config.position_init
                    init.copy_(bias.weight, start)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        map_labels=None,
        truth=None,
        padded=True,
        use_cache=None,
        num_items_in_batch=None,
        map_items_in_batch=None,
        **kwargs,
    ) -> SidOutput:
        """One pass.

        Args: `input_ids` int64 [B, N] and `attention_mask` [B, N]: the history; `labels` int64 [B,
        L]: the target's tokens; `map_labels` int64 [B, S, L], −100 where absent; `truth` float [B,
        N] for the oracle scorer; `padded`: False promises that no slot of the histories is empty,
        so that no mask is needed (a CUDA graph cannot look); the others as in T5. Returns
        `SidOutput`; `logits` [B, L, V] are −inf off each position's level, and left out (None)
        while training. `num_items_in_batch`, given by the Trainer, is the number of label tokens in
        the whole update, and `map_items_in_batch` int64 [S] that of each of MAP's steps: the loss
        is then this batch's part of the update's mean.

        Every item of a stretch is taught at once (`encoder_mask="items"`, nothing pruned) where
        `labels` is int64 [B, T, L]: `input_ids` holds T + 1 items, of which all but the first are
        targets; `map_labels` is [B, T, S, L], `logits` [B, T, L, V].
        """
        if labels is not None and labels.ndim == 3:
            return self._teach_all(
                input_ids,
                attention_mask,
                labels,
                map_labels,
                num_items_in_batch,
                map_items_in_batch,
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                truth=truth,
                padded=padded,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = PrunedEncoderOutput(
                last_hidden_state=encoder_outputs[0], attention_mask=attention_mask
            )
        # Cross-attention sees the pruned history, and so its mask.
        seen = getattr(encoder_outputs, "attention_mask", None)
        seen = attention_mask if seen is None else seen
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = self.shifted(labels)
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            past_key_values=past_key_values,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=self.cross_mask(
                encoder_outputs, seen if self.encoder.padded_after(padded) else None
            ),
            use_cache=use_cache,
            **kwargs,
        )
        hidden = decoded.last_hidden_state  # [B, L, d]
        out = SidOutput(
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            encoder_attention_mask=seen,
        )
        if labels is not None:
            self.add_losses(out, hidden, labels, map_labels, num_items_in_batch, map_items_in_batch)
        if labels is None or not self.training:
            out.logits = self.masked_logits(hidden, decoder_input_ids)
        return out

    def cross_mask(self, encoded, seen: Tensor | None) -> Tensor | None:
        """What the decoder sees of `encoded`: `seen` [B, K] itself, or with `cross_bias` a float
        mask [B, H, 1, K] with the bias in it. None where all is seen alike.
        """
        if self.cross_bias is None:
            return seen
        if encoded.items_back is None:
            raise ValueError(
                "cross_bias=True needs encoder_outputs as this model's own encoder gives them, with"
                " items_back"
            )
        return self._biased(
            encoded.items_back.unsqueeze(1), None if seen is None else seen.bool()[:, None, None]
        )

    def _biased(self, items_back, seen):
        """`cross_bias` of `items_back` int64 [B, Q, K], −∞ off `seen` bool [B, 1, Q, K]: float [B,
        H, Q, K].
        """
        # [B, H, Q, K]
        bias = self.cross_bias((items_back - 1).clamp(0, ITEMS_BACK - 1)).permute(0, 3, 1, 2)
        return bias if seen is None else torch.where(seen, bias, torch.finfo(bias.dtype).min)

    def _teach_all(
        self, input_ids, attention_mask, labels, map_labels, num_items_in_batch, map_items_in_batch
    ):
        """One pass over stretches of T + 1 items: the encoder reads the first T, each item seeing
        itself and those before it; the decoder reads the T targets side by side, each seeing its
        own tokens so far and the items before it.
        """
        if self.config.encoder_mask != "items":
            raise ValueError(
                f'labels {tuple(labels.shape)} of many targets need encoder_mask="items", got'
                f" {self.config.encoder_mask!r}"
            )
        _, targets, n_levels = labels.shape
        per_item = self.tokens_per_item(input_ids, labels)
        history = input_ids[:, :-per_item]
        tokens = (
            (history != PAD).long() if attention_mask is None else attention_mask[:, :-per_item]
        )
        encoded = self.encoder(input_ids=history, attention_mask=tokens)
        item = self.encoder.items_of(history, tokens).unsqueeze(1)  # [B, 1, N]
        target = torch.arange(targets, device=labels.device).repeat_interleave(n_levels)  # [T·L]
        # [B, T·L], the item before each target, padding aside
        newest = item[:, 0, ::per_item].repeat_interleave(n_levels, 1)
        place = torch.arange(targets * n_levels, device=labels.device)
        # [1, 1, T·L, T·L]
        own = ((target == target[:, None]) & (place <= place[:, None]))[None, None]
        back = newest.unsqueeze(2) - item + 1  # [B, T·L, N]
        seen = ((back >= 1) & tokens.bool().unsqueeze(1)).unsqueeze(1)  # [B, 1, T·L, N]
        cross = (
            self._biased(back, seen)
            if self.cross_bias is not None
            else library_mask(seen, self.config, self.dtype)
        )
        inputs = self.shifted(labels)  # [B, T, L]
        states = self.decoder(
            input_ids=inputs.flatten(1),
            attention_mask=library_mask(own, self.config, self.dtype),
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=cross,
        ).last_hidden_state
        hidden = states.unflatten(1, (targets, n_levels))  # [B, T, L, d]
        out = SidOutput(
            encoder_attention_mask=input_ids != PAD if attention_mask is None else attention_mask
        )
        self.add_losses(out, hidden, labels, map_labels, num_items_in_batch, map_items_in_batch)
        if not self.training:
            out.logits = self.masked_logits(hidden, inputs)
        return out

    def encode(self, input_ids, attention_mask, **kwargs) -> PrunedEncoderOutput:
        """The history as the decoder sees it; arguments as in `forward`."""
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def search(self, encoded: PrunedEncoderOutput) -> "BeamState":
        """The state of a beam search after `encoded`."""
        return BeamState(self, encoded)
