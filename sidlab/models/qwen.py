"""SidQwen: a decoder-only recommender over semantic IDs, with a pruning layer between two of its
layers.

A subclass of Hugging Face's Qwen3. A row is [prompt] history BOS target; the loss is on the
target's L tokens, as in `SidT5`, and the history comes in the same batches. The pruner stands
after layer `after_layer` and touches history tokens alone: never the first token of the row (the
attention sink), the prompt, BOS or the target. Attention is causal, so labels cannot reach the
history's states, nor what is kept of it; and only history queries vote. Kept tokens keep the
rotation of their places in the full history, and what follows goes on at the place after it
(`positions="compact"`: at their places among the kept). Pooling (`reduce="pool"`) averages the
history alone, too; without a prompt the first token is in the first of its bins.

Causal attention favours early tokens: a later query cannot vote for them alone, but they are seen
by all. `scorer="rastp"` is the plain sum of the paper; "rastp-visible" divides it by the number of
queries that can see the token.

At inference the layers in front of the pruner cache the keys of the whole history, those after it
only the kept ones. A beam search never copies or reorders that cache: its beams are queries of one
row, and a mask says which of the new keys are a beam's own past.

There is no text by default. `SidQwen.from_checkpoint` starts from a pretrained Qwen3, whose text
tokens then stand after the SID tokens in the vocabulary, for a prompt in front of the history.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3ForCausalLM
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3PreTrainedModel
from transformers.utils.output_capturing import capture_outputs

from sidlab.fast import cpu_layers
from sidlab.models.base import (
    OutputProjection,
    PrunedStack,
    SidEmbedding,
    SidModel,
)
from sidlab.models.beam_state import BeamTree
from sidlab.models.qwen_layout import (
    PrunedDecoderOutput,
    SidCausalOutput,
    SidQwenConfig,
    check,
    cut_at_bos,
    last_slot,
    pool_but_last,
    without_bos,
)
from sidlab.pruning import pool_tokens
from sidlab.sids.table import BOS, PAD, SidTable


class PrunedDecoder(PrunedStack, Qwen3Model):
    """Qwen3's layers with a `TokenPruner` after layer `pruning.after_layer`."""

    check = staticmethod(check)
    attentions = property(lambda self: [layer.self_attn for layer in self.layers])

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = SidEmbedding(
            config, config.hidden_size, padding_idx=PAD, dropout=config.residual_dropout
        )
        if config.residual_dropout > 0:
            for layer in self.layers:
                layer.self_attn.o_proj = OutputProjection(
                    layer.self_attn.o_proj, config.residual_dropout
                )
                layer.mlp.down_proj = OutputProjection(layer.mlp.down_proj, config.residual_dropout)
            cpu_layers.replace_dropout(self)

    def padded_after(self, padded: bool) -> bool:
        # The token that always stays comes on top of whole items only where its own is not among
        # them (it has no say in that), so rows of one length may differ by one.
        on_top = self.pruning is not None and self.pruning.unit == "item" and self._protects()
        # Pooled are all tokens but the last, for which a slot may be left over.
        pools_but_last = (
            self.pruning is not None
            and self.pruning.reduce == "pool"
            and self.config.layout == "stream"
        )
        return super().padded_after(padded) or on_top or pools_but_last

    def _protects(self) -> bool:
        """Whether a token of the history always stays: the attention sink, or the one that
        predicts.
        """
        return self.config.layout == "stream" or not self.config.prompt

    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        tail=None,
        past_key_values=None,
        truth=None,
        padded=True,
        **kwargs,
    ):
        """`input_ids` int64 [B, N], the histories; `attention_mask` [B, N] (default: not PAD);
        `tail` int64 [B, T], what follows them; `past_key_values`, an empty cache to fill; `truth`
        float [B, N], for the oracle scorer; `padded`: False where it is known that no slot is
        empty. Returns `PrunedDecoderOutput`.
        """
        batch, width = input_ids.shape
        stream = self.config.layout == "stream"
        # [B, P]
        front = (
            input_ids.new_tensor((self.config.prompt or []) + [BOS] * stream)
            .long()
            .expand(batch, -1)
        )
        tail = input_ids[:, :0] if tail is None else tail
        history = slice(front.shape[1], front.shape[1] + width)
        if attention_mask is None:
            attention_mask = (input_ids != PAD).long()
        pruning = (
            self.pruning
            if self.training or (self.pruning is not None and self.pruning.at_inference)
            else None
        )
        out = PrunedDecoderOutput(attention_mask=attention_mask, past_key_values=past_key_values)

        def around(middle):  # ones before and after: prompt and tail are real
            return torch.cat([torch.ones_like(front), middle, torch.ones_like(tail)], dim=1)

        hidden = self.embed_tokens(torch.cat([front, input_ids, tail], dim=1))  # [B, P + N + T, d]
        mask = around(attention_mask.long())
        places = (mask.cumsum(1) - 1).clamp_min(0)
        split = pruning.after_layer if pruning is not None else len(self.layers)
        scores = pruning is not None and pruning.reduce == "select"
        record = (
            {"record": {}, "token_mask": mask, "history": history, "path": self.scoring_path}
            if scores
            else {}
        )
        hidden = self._run(
            self.layers[:split],
            hidden,
            mask if padded else None,
            places,
            past_key_values,
            record,
            **kwargs,
        )
        seen = [mask[:, : history.stop]]
        at = [seen[0].sum(1)]
        last = last_slot(attention_mask)  # [B]
        if pruning is not None:
            middle = hidden[:, history]
            if pruning.reduce == "pool":
                pruned = (
                    pool_but_last(middle, attention_mask, last, pruning.keep)
                    if stream
                    else pool_tokens(middle, attention_mask, pruning.keep)
                )
            else:
                centrality = record["record"]["centrality"]
                always = None
                if self._protects():
                    # The last token, or the first: the attention sink
                    place = last if stream else attention_mask.argmax(1)
                    slot = torch.arange(width, device=place.device)
                    always = (slot == place[:, None]) & attention_mask.bool()
                pruned = self.select(middle, centrality, input_ids, truth, out, always)
            out.attention_mask = pruned.mask
            out.positions = pruned.positions
            # [B, P + K + T, d]
            hidden = torch.cat(
                [hidden[:, : history.start], pruned.hidden, hidden[:, history.stop :]], dim=1
            )
            mask = around(pruned.mask)
            kept = places[:, history].gather(1, pruned.positions)  # [B, K]
            places = torch.cat([places[:, : history.start], kept, places[:, history.stop :]], dim=1)
            seen.append(mask[:, : history.start + pruned.mask.shape[1]])
            at.append(at[0])
            if pruning.positions == "compact":
                places = (mask.cumsum(1) - 1).clamp_min(0)
                at[1] = seen[1].sum(1)
            mask = mask if self.padded_after(padded) else None
            hidden = self._run(
                self.layers[split:], hidden, mask, places, past_key_values, {}, **kwargs
            )
        out.masks = (seen[0], seen[-1])
        out.lengths = (at[0], at[-1])
        out.last_hidden_state = self.norm(hidden)
        if stream:
            row = torch.arange(batch, device=hidden.device)
            # [B, d]
            out.next_state = out.last_hidden_state[
                row, len(front[0]) + last_slot(out.attention_mask)
            ]
        return out

    def _run(self, layers, hidden, mask, places, cache, record, **kwargs):
        """`hidden` [B, M, d] through `layers`, causally; `mask`, `places` [B, M]; no mask where all
        slots are real.
        """
        causal = mask
        if mask is None or mask.ndim == 2:
            causal = create_causal_mask(
                config=self.config, inputs_embeds=hidden, attention_mask=mask, past_key_values=None
            )
        rotation = self.rotary_emb(hidden, places)
        record = record | {"eager": self.config._attn_implementation == "eager"}
        for layer in layers:
            scores = layer.self_attn.config is not self.config
            hidden = layer(
                hidden,
                attention_mask=causal,
                position_ids=places,
                past_key_values=cache,
                use_cache=cache is not None,
                position_embeddings=rotation,
                **(record if scores else {}),
                **kwargs,
            )
        return hidden

    def extend(
        self,
        tokens: Tensor,
        depth: Tensor,
        past: Tensor,
        prefix: PrunedDecoderOutput,
        cache: DynamicCache,
    ) -> Tensor:
        """Tokens after a prefix that is in `cache`, which takes their keys in.

        Args: `tokens` int64 [B, q]; `depth` int64 [q] or [B, q], their places after the history,
        from 0; `past` bool [B, q, t + q], which of the t new tokens before and of these each one
        sees, itself included. Returns float [B, q, d].
        """
        hidden = self.embed_tokens(tokens)
        split = self.pruning.after_layer if self.pruning is not None else len(self.layers)
        for layers, seen, length in zip(
            (self.layers[:split], self.layers[split:]), prefix.masks, prefix.lengths
        ):
            before = seen.bool().unsqueeze(1).expand(-1, tokens.shape[1], -1)  # [B, q, P + K]
            mask = torch.cat([before, past], dim=-1).unsqueeze(1)  # [B, 1, q, P + K + t + q]
            if self.config._attn_implementation == "eager":
                mask = torch.where(mask, 0.0, torch.finfo(hidden.dtype).min)
            hidden = self._run(layers, hidden, mask, length.unsqueeze(1) + depth, cache, {})
        return self.norm(hidden)


class SidQwen(SidModel, Qwen3ForCausalLM):
    """Generates the SID of the next item from the SIDs of a history.

    Build it with `SidQwen(config, table)`. `save_pretrained` writes the table beside the weights,
    `from_pretrained` reads it.
    """

    config_class = SidQwenConfig
    stack = property(lambda self: self.model)

    def __init__(self, config: SidQwenConfig, table: SidTable | None = None):
        # The parent's own would build and initialise a model that is then thrown away
        Qwen3PreTrainedModel.__init__(self, config)
        if config._attn_implementation == "sdpa":
            config._attn_implementation = "sidlab"  # the same, but for dropout on a CPU
        self.model = PrunedDecoder(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.finish(config.hidden_size, table, bos_token_id=BOS)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str, table: SidTable, prompt: str | None = None, **config
    ) -> "SidQwen":
        """A pretrained Qwen3, by name (where there is a network) or folder, extended by the SID
        tokens of `table`.

        `prompt`: text in front of every history, read by the checkpoint's tokenizer. `config`:
        further fields of `SidQwenConfig` (`separators`, `max_items`, `pruning`, `map`). The SID
        tokens start with the mean and the spread of the text embeddings. Raises ValueError where
        the checkpoint cannot be loaded or is no Qwen3.
        """
        from transformers import AutoConfig, AutoTokenizer

        try:
            theirs = AutoConfig.from_pretrained(checkpoint)
            if theirs.model_type != "qwen3":
                raise ValueError(
                    f"checkpoint={checkpoint!r} is a {theirs.model_type!r}; SidQwen takes Qwen3,"
                    " such as Qwen/Qwen3-0.6B"
                )
            source = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype="auto")
            text = (
                AutoTokenizer.from_pretrained(checkpoint)(
                    prompt, add_special_tokens=False
                ).input_ids
                if prompt
                else None
            )
        except OSError as error:
            raise ValueError(
                f"checkpoint={checkpoint!r} can't be loaded: {error}\nIt must be a local folder"
                " with a Qwen3 model, or a name on the Hugging Face hub and a network. Without"
                " one: `hf download NAME --local-dir FOLDER` elsewhere, and give FOLDER"
            ) from error
        if prompt and not text:
            raise ValueError(
                f"checkpoint={checkpoint!r} has no tokenizer that reads prompt={prompt!r}; save the"
                " checkpoint's there, too"
            )
        own = {
            name: value
            for name, value in theirs.to_dict().items()
            if name not in ("model_type", "architectures", "vocab_size")
        }
        first = 3 + sum(table.widths)
        prompt_ids = [first + token for token in text] if text else None
        model = cls(
            SidQwenConfig(
                **own | config, widths=table.widths, text_vocab=theirs.vocab_size, prompt=prompt_ids
            ),
            table,
        )
        model.to(source.dtype)
        state = source.state_dict()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = state[name].float()
            drawn = torch.randn(
                first, rows.shape[1], generator=torch.Generator().manual_seed(0)
            ) * rows.std(0) + rows.mean(0)
            state[name] = torch.cat([drawn, rows]).to(source.dtype)
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or any(
            not name.startswith(("map_head.", "model.token_level")) for name in missing
        ):
            raise ValueError(
                f"checkpoint={checkpoint!r} does not fit: missing {missing[:3]}, unexpected"
                f" {unexpected[:3]}"
            )
        return model

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SidQwen):
            init.normal_(module.model.embed_tokens.weight, std=self.config.embedding_init)
            if self.config.zero_init:
                for layer in module.model.layers:
                    init.zeros_(layer.self_attn.o_proj.weight)
                    init.zeros_(layer.mlp.down_proj.weight)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        labels=None,
        map_labels=None,
        truth=None,
        padded=True,
        past_key_values=None,
        use_cache=None,
        num_items_in_batch=None,
        map_items_in_batch=None,
        position_ids=None,
        cache_position=None,
        logits_to_keep=0,
        **kwargs,
    ) -> SidCausalOutput:
        """One pass.

        Args: `input_ids` int64 [B, N] and `attention_mask` [B, N]: the history; `labels` int64 [B,
        L]: the target's tokens; `map_labels` int64 [B, S, L], −100 where absent; `truth` float [B,
        N] for the oracle scorer; `decoder_input_ids` int64 [B, T], BOS and what follows (default:
        `labels` shifted). Without either, as `generate` calls it, `input_ids` are histories that
        end with BOS, all in the same column (layout "stream": that begin with it, padded on the
        left), or the next token after `past_key_values`. Returns `SidCausalOutput`; `logits` [B,
        T, V] are −inf off each position's level, and left out (None) while training.
        `num_items_in_batch`, `map_items_in_batch` and `padded` as in `SidT5`.

        Every item of a stretch is taught at once (layout "stream", nothing pruned) where `labels`
        is int64 [B, T, L]: `input_ids` holds T + 1 items, of which all but the first are targets;
        `map_labels` is [B, T, S, L], `logits` [B, T, L, V].
        """
        if labels is not None and labels.ndim == 3:
            return self._teach_all(
                input_ids,
                attention_mask,
                labels,
                map_labels,
                padded,
                num_items_in_batch,
                map_items_in_batch,
            )
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = self.shifted(labels)
        prefix = None
        if decoder_input_ids is None:
            prefix = getattr(past_key_values, "sid_prefix", None)
            if prefix is None:
                if self.config.layout == "stream" and use_cache is False:
                    raise ValueError(
                        'the layout "stream" generates with use_cache=True alone: without the cache'
                        " nothing tells codes that were generated from those of the history"
                    )
                cut = without_bos if self.config.layout == "stream" else cut_at_bos
                input_ids, attention_mask, decoder_input_ids = cut(input_ids, attention_mask)
            else:
                decoder_input_ids = input_ids
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=self.config)
        width = decoder_input_ids.shape[1]
        if prefix is not None:
            before = past_key_values.get_seq_length() - prefix.masks[0].shape[1]
            past = torch.ones(
                len(input_ids), width, before + width, dtype=torch.bool, device=input_ids.device
            ).tril(before)
            depth = torch.arange(before, before + width, device=input_ids.device)
            hidden = self.model.extend(decoder_input_ids, depth, past, prefix, past_key_values)
            out = SidCausalOutput(past_key_values=past_key_values)
        else:
            stream = self.config.layout == "stream"  # where BOS stands for the history's last token
            tail = decoder_input_ids[:, 1:] if stream else decoder_input_ids
            prefix = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                tail=tail,
                truth=truth,
                padded=padded,
                past_key_values=past_key_values,
                **kwargs,
            )
            states = prefix.last_hidden_state
            hidden = states[:, states.shape[1] - tail.shape[1] :]  # [B, T, d]
            if stream:
                hidden = torch.cat([prefix.next_state.unsqueeze(1), hidden], dim=1)
            out = SidCausalOutput(
                past_key_values=past_key_values,
                hidden_states=prefix.hidden_states,
                attentions=prefix.attentions,
                encoder_attention_mask=prefix.attention_mask,
            )
            if past_key_values is not None:
                # `generate` hands the cache on and nothing else of ours
                past_key_values.sid_prefix = prefix
        if labels is not None:
            self.add_losses(out, hidden, labels, map_labels, num_items_in_batch, map_items_in_batch)
        if labels is None or not self.training:
            out.logits = self.masked_logits(hidden, decoder_input_ids)
        return out

    def _teach_all(
        self,
        input_ids,
        attention_mask,
        labels,
        map_labels,
        padded,
        num_items_in_batch,
        map_items_in_batch,
    ):
        """One causal pass over stretches of T + 1 items: the last token of an item predicts the
        next item's first code, each code the next one.
        """
        if self.config.layout != "stream":
            raise ValueError(
                f'labels {tuple(labels.shape)} of many targets need the layout "stream", got'
                f" {self.config.layout!r}"
            )
        _, targets, n_levels = labels.shape
        per_item = self.tokens_per_item(input_ids, labels)
        # Nothing is predicted from the last item's last code on
        unread = 1 + self.config.separators
        mask = None if attention_mask is None else attention_mask[:, :-unread]
        out = self.model(input_ids=input_ids[:, :-unread], attention_mask=mask, padded=padded)
        states = out.last_hidden_state[:, -(input_ids.shape[1] - unread) :]
        # [B, T + 1, P, d]
        states = F.pad(states, (0, 0, 0, unread)).unflatten(1, (targets + 1, per_item))
        # [B, T, L, d]
        hidden = torch.cat([states[:, :-1, -1:], states[:, 1:, : n_levels - 1]], dim=2)
        mask = input_ids != PAD if attention_mask is None else attention_mask
        found = SidCausalOutput(encoder_attention_mask=mask)
        self.add_losses(found, hidden, labels, map_labels, num_items_in_batch, map_items_in_batch)
        if not self.training:
            found.logits = self.masked_logits(hidden, self.shifted(labels))
        return found

    def encode(self, input_ids, attention_mask, **kwargs) -> PrunedDecoderOutput:
        """The histories in the cache; arguments as in `forward`."""
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(config=self.config),
            **kwargs,
        )

    def search(self, encoded: PrunedDecoderOutput) -> "BeamTree":
        """The state of a beam search after `encoded`."""
        return BeamTree(self.model, encoded)
