"""SidT5: an encoder-decoder recommender over semantic IDs, with a pruning layer inside the encoder.

A subclass of Hugging Face's T5 that overrides three short pieces and nothing else:

* `PrunedEncoder.forward`: the loop over encoder blocks, with the `TokenPruner` behind block `after_layer`;
* `SidT5.forward`: output heads by level, cross-attention on the pruned mask, the MAP loss;
* the attention of the one block that scores, registered with `transformers.AttentionInterface`: all other blocks keep the
  library's fused attention. On a GPU that block is fused as well (`models/scoring.py`).

An item is its SID's tokens, followed by one learned separator where `separators` is on. The decoder starts from BOS and
predicts the L tokens of the target; there is no EOS, for a SID has a fixed length.

`PruningConfig(mode="reference")` repeats what RASTP's published code does, for comparison: it keeps a share of the padded
length (`pruning.reference_choice`), without position bias behind the pruner, hands on the mask of the first K slots, lets padded
queries vote, scores with the attention after dropout, lets separators compete, and uses unfused attention everywhere.
"""

import copy
import dataclasses
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, T5Config, T5ForConditionalGeneration
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, sdpa_mask
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5PreTrainedModel, T5Stack
from transformers.utils.output_capturing import capture_outputs

from sidlab.map_loss import MapConfig, MapHead, map_loss
from sidlab.models import fast
from sidlab.models.scoring import choose_path, fused_attention
from sidlab.pruning import PruningConfig, TokenPruner, pool_tokens, reference_choice
from sidlab.saliency import Signals, attention_centrality, scramble, semantic_saliency, token_importance
from sidlab.sids.table import BOS, PAD, SidTable


class SidT5Config(T5Config):
    """T5's configuration plus: `widths`, codes per level; `separators`, one after each item; `max_items` of history;
    `ffn_hidden_layers`, 2 in RASTP's model and 1 in T5's; `embedding_init`, standard deviation of the initial token embeddings;
    `position_init`: half of the heads start out looking 1, 2, 3, … tokens back, with so strong a bias (None: none does, as in
    T5); `pruning` and `map`, the fields of `PruningConfig` and `MapConfig` as dicts, or None."""

    model_type = "sid_t5"

    widths: list[int] | tuple[int, ...] = (256, 256, 256)
    separators: bool = True
    max_items: int = 30
    ffn_hidden_layers: int = 1
    embedding_init: float = 0.05
    position_init: float | None = None
    pruning: dict | None = None
    map: dict | None = None

    def __post_init__(self, **kwargs):
        self.widths = list(self.widths)
        self.vocab_size = 3 + sum(self.widths)
        super().__post_init__(**kwargs)
        self.pad_token_id, self.bos_token_id, self.eos_token_id = PAD, BOS, None
        self.decoder_start_token_id = BOS
        self.scale_decoder_outputs = False  # T5's answer to embeddings of size 1; ours start small
        if self.pruning is not None:
            after = PruningConfig(**self.pruning | {"scorer": "rastp"}).after_layer
            if after > self.num_layers:
                raise ValueError(f"after_layer={after} lies beyond the last encoder layer; use 1..{self.num_layers}")
        if self.map is not None:
            MapConfig(**self.map)


@dataclasses.dataclass
class PrunedEncoderOutput(BaseModelOutput):
    """The encoder's output. With pruning `last_hidden_state` is [B, K, d], `attention_mask` and `positions` are int64 [B, K], and
    `importance`, `centrality`, `saliency` float32 [B, N] are the scores and their two factors. Without it K = N and the last
    four are None."""

    attention_mask: Tensor | None = None
    positions: Tensor | None = None
    importance: Tensor | None = None
    centrality: Tensor | None = None
    saliency: Tensor | None = None


@dataclasses.dataclass
class SidOutput(Seq2SeqLMOutput):
    """Hugging Face's output plus `main_loss` and `map_loss`, the two terms of `loss`, and `encoder_attention_mask` int64 [B, K],
    the mask of `encoder_last_hidden_state` behind the pruner."""

    main_loss: Tensor | None = None
    map_loss: Tensor | None = None
    encoder_attention_mask: Tensor | None = None


def scored_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, position_bias=None, record=None,
                     token_mask=None, reference=False, path="plain", **kwargs):
    """Attention that also leaves the centrality of its clean, pre-dropout weights in the dict `record`; with `reference` that
    of the weights after dropout, to which padded queries contribute. Where `record` asks for it, the weights themselves as well.
    `path`: how it is computed, see `models.scoring`; what `reference` and `record` ask for needs the plain one."""
    if path == "auto":
        path = choose_path(query.device, query.dtype, query.shape[1], query.shape[3], dropout)
    if path != "plain":
        output, record["centrality"] = fused_attention(path, module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                                       position_bias=position_bias, token_mask=token_mask)
        return output, None
    clean = fast.masked_softmax(query, key, attention_mask, scaling, position_bias)
    # The published code keeps PyTorch's own dropout.
    weights = F.dropout(clean, dropout, module.training) if reference else fast.dropout(clean.to(value.dtype), dropout, module.training)
    record["centrality"] = attention_centrality((weights if reference else clean).detach(), token_mask, reference)  # [B, N]
    if record.get("keep_attention"):
        record["attention"] = clean.detach()
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("sidlab_scored", scored_attention)
AttentionMaskInterface.register("sidlab_scored", sdpa_mask)


class _LibraryInit:
    """Initialise as the library's own classes do.

    For classes defined elsewhere it passes over modules that own no parameter directly, such as T5's attention, and leaves
    their projections at standard deviation 1, some eight times too large; such a model hardly learns.
    """

    @classmethod
    def is_custom_code(cls) -> bool:
        return False


class PrunedEncoder(_LibraryInit, T5Stack):
    """T5's encoder with a `TokenPruner` behind block `pruning.after_layer`; without `pruning` it is T5's encoder."""

    scoring_path = "auto"  # how the block that scores computes attention: one of `scoring.PATHS`

    def __init__(self, config: SidT5Config):
        super().__init__(config)
        # Level of every token of the vocabulary: BOS −1 (level 0 comes next), codes 0..L−1, PAD and SEP L.
        n_levels = len(config.widths)
        level = [n_levels, -1, n_levels] + [level for level, width in enumerate(config.widths) for _ in range(width)]
        self.register_buffer("token_level", torch.tensor(level), persistent=True)
        self.pruning = None
        if config.pruning is not None:
            scorer = config.pruning["scorer"]
            own = _missing_scorer(scorer) if scorer.startswith("own:") else scorer
            self.set_pruning(PruningConfig(**config.pruning | {"scorer": own}))

    def set_pruning(self, pruning: PruningConfig | None):
        """Prune as `pruning` says from now on, or (None) not at all."""
        if pruning is not None and pruning.after_layer > len(self.block):
            raise ValueError(f"after_layer={pruning.after_layer} lies beyond the last encoder layer; use 1..{len(self.block)}")
        self.pruning = pruning
        self.pruner = TokenPruner(pruning.keep, pruning.unit) if pruning is not None else None
        for number, block in enumerate(self.block, start=1):
            attention = block.layer[0].SelfAttention
            attention.config = self.config
            if pruning is not None and pruning.reduce == "select" and number == pruning.after_layer:
                attention.config = copy.copy(self.config)  # this block alone scores; the others keep the library's choice
                attention.config._attn_implementation = "sidlab_scored"

    @capture_outputs
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, truth=None, **kwargs):
        """`input_ids` int64 [B, N] or `inputs_embeds` [B, N, d]; `attention_mask` [B, N] (default: not PAD); `truth` float [B, N],
        for the oracle scorer. Returns `PrunedEncoderOutput`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long) if input_ids is None else (input_ids != PAD).long()
            attention_mask = attention_mask.to(inputs_embeds.device)
        pruning = self.pruning if self.training or (self.pruning is not None and self.pruning.at_inference) else None
        reference = pruning is not None and pruning.mode == "reference"
        full = self.config.max_items * (len(self.config.widths) + self.config.separators)
        if reference and inputs_embeds.shape[1] != full:
            raise ValueError(f'mode="reference" prunes a share of the padded length: pad every history to {full} slots '
                             f'(TrainConfig(padding="fixed")), got {inputs_embeds.shape[1]}')
        out = PrunedEncoderOutput(attention_mask=attention_mask)
        hidden = self.dropout(inputs_embeds)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=attention_mask)
        bias = None
        for number, block in enumerate(self.block, start=1):
            scoring = pruning is not None and number == pruning.after_layer
            selects = self.pruning and self.pruning.reduce == "select" and number == self.pruning.after_layer
            plain = reference or self.config._attn_implementation == "eager"
            record = {"record": {}, "token_mask": attention_mask, "reference": reference,
                      "path": "plain" if plain else self.scoring_path} if selects else {}
            hidden, bias, _ = block(hidden, mask, bias, **record, **kwargs)
            if scoring:
                centrality = record["record"]["centrality"] if selects else None
                hidden, bias, mask = self.prune(hidden, bias, centrality, input_ids, truth, out)
        out.last_hidden_state = self.dropout(self.final_layer_norm(hidden))
        return out

    def prune(self, hidden, bias, centrality, input_ids, truth, out):
        """Scores, chooses and gathers what block `pruning.after_layer` gave: `hidden` [B, N, d], `bias` [B or 1, H, N, N], `centrality`
        [B, N]. Fills the fields of `out`; returns the state, bias and mask of the layers behind."""
        pruning, tokens = self.pruning, out.attention_mask
        if pruning.reduce == "pool":
            pruned = pool_tokens(hidden, tokens, pruning.keep)
        else:
            pruned = self._select(hidden, centrality, input_ids, truth, out)
        out.attention_mask, out.positions = pruned.mask, pruned.positions
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=pruned.hidden, attention_mask=pruned.mask)
        return pruned.hidden, self._bias_behind(bias, pruned), mask

    def _select(self, hidden, centrality, input_ids, truth, out):
        pruning, tokens = self.pruning, out.attention_mask
        levels = item_index = None
        if input_ids is not None:
            levels = self.token_level[input_ids]  # [B, N]
            item_index = ((levels == 0).cumsum(1) - 1).clamp_min(0)
        positions = (tokens.cumsum(1) - 1).clamp_min(0)
        # Random scorers draw from the global state in training, and otherwise by the history itself, so that recommendations repeat.
        seed = None if self.training or input_ids is None else (scramble(input_ids + (positions << 32)) * tokens).sum(1)
        signals = Signals(hidden.detach(), centrality, tokens, positions, levels, item_index, truth, seed)
        out.importance = token_importance(signals, pruning.scorer)
        out.centrality, out.saliency = centrality, semantic_saliency(signals.hidden) * tokens
        if pruning.mode == "reference":
            return reference_choice(hidden, tokens, out.importance, pruning.keep)
        protect = levels == len(self.config.widths) if pruning.protect_separators and levels is not None else None
        return self.pruner(hidden, tokens, out.importance, protect=protect, item_index=item_index)

    def _bias_behind(self, bias, pruned):
        """Relative position bias of the kept tokens, [B, H, K, K] or [1, H, K, K]."""
        slots = pruned.positions.shape[1]
        if self.pruning.positions == "none" or self.pruning.mode == "reference":
            return torch.zeros_like(bias[..., :slots, :slots])
        if self.pruning.positions == "compact":
            return bias[..., :slots, :slots]
        # T5's bias depends on the distance alone, so one row and one column of it hold all there is to gather.
        by_distance = torch.cat([bias[0, :, 1:, 0].flip(1), bias[0, :, 0]], dim=1)  # [H, 2N − 1], from −(N − 1) to N − 1
        distance = pruned.positions[:, None, :] - pruned.positions[:, :, None] + bias.shape[-1] - 1  # [B, K, K]
        return by_distance.index_select(1, distance.flatten()).view(-1, *distance.shape).transpose(0, 1)  # [B, H, K, K]


class DeepFeedForward(T5DenseActDense):
    """T5's feed-forward layer with `ffn_hidden_layers` hidden layers, two in RASTP's model (d → d_ff → d_ff → d)."""

    def __init__(self, config: SidT5Config):
        super().__init__(config)
        self.hidden = nn.ModuleList(nn.Linear(config.d_ff, config.d_ff, bias=False) for _ in range(config.ffn_hidden_layers - 1))
        for layer in self.hidden:  # as T5 draws `wo`; marked, or the library would draw them again at its default size
            nn.init.normal_(layer.weight, std=config.initializer_factor * config.d_ff**-0.5)
            layer._is_hf_initialized = True

    def forward(self, hidden_states):
        for layer in (self.wi, *self.hidden):
            hidden_states = layer(hidden_states)
            if isinstance(self.dropout, fast.Dropout) and isinstance(self.act, nn.ReLU):
                hidden_states = fast.relu_dropout(hidden_states, self.dropout.p, self.training)
            else:
                hidden_states = self.dropout(self.act(hidden_states))
        return self.wo(hidden_states)


class SidT5(_LibraryInit, T5ForConditionalGeneration):
    """Generates the SID of the next item from the SIDs of a history.

    Build it with `SidT5(config, table)`. `save_pretrained` writes the table beside the weights, `from_pretrained` reads it.
    """

    config_class = SidT5Config
    # The parent's tying: the heads of the levels are slices of the embedding. These keys come back with `shared`.
    _keys_to_ignore_on_save = list(T5ForConditionalGeneration._tied_weights_keys)

    def __init__(self, config: SidT5Config, table: SidTable | None = None):
        # Not the parent's own __init__: it would build and initialise an encoder that is then thrown away.
        T5PreTrainedModel.__init__(self, config)
        self.model_dim = config.d_model
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        encoder_config, decoder_config = copy.deepcopy(config), copy.deepcopy(config)
        encoder_config.is_decoder, encoder_config.use_cache = False, False
        decoder_config.is_decoder, decoder_config.num_layers = True, config.num_decoder_layers
        reference = config.pruning is not None and config.pruning.get("mode") == "reference"
        if reference or config._attn_implementation == "sdpa":
            encoder_config._attn_implementation = decoder_config._attn_implementation = "eager" if reference else "sidlab"
        self.encoder, self.decoder = PrunedEncoder(encoder_config), T5Stack(decoder_config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        plain = config.ffn_hidden_layers == 1
        with torch.random.fork_rng(devices=[], enabled=plain):
            for block in [*self.encoder.block, *self.decoder.block]:
                theirs, ours = block.layer[-1].DenseReluDense, DeepFeedForward(config)
                if plain:  # the library's layer has drawn its weights already
                    ours.wi, ours.wo, ours._is_hf_initialized = theirs.wi, theirs.wo, True
                block.layer[-1].DenseReluDense = ours
        if not reference:
            fast.replace_dropout(self)
        self.map_config = MapConfig(**config.map) if config.map is not None else None
        self.map_head = MapHead(config.d_model, self.map_config.steps) if self.map_config is not None else None
        self.table = None
        if table is not None:
            self.set_table(table)
        self.post_init()
        self.generation_config.update(max_new_tokens=len(config.widths), max_length=None, eos_token_id=None, pad_token_id=PAD,
                                      decoder_start_token_id=BOS)

    def set_table(self, table: SidTable):
        """Attach the `SidTable` this model speaks; its widths must be the model's."""
        if list(table.widths) != list(self.config.widths):
            raise ValueError(f"the table has widths {tuple(table.widths)}, the model {tuple(self.config.widths)}")
        self.table = table

    def set_pruning(self, pruning: PruningConfig | None):
        """Prune by another configuration, or (None) not at all. Pruning has no parameters, so any trained model can change it."""
        self.encoder.set_pruning(pruning)
        # What `save_pretrained` writes.
        self.config.pruning = self.encoder.config.pruning = None if pruning is None else pruning.to_dict()

    def set_scorer(self, scorer):
        """Replace the saliency scorer: a name or a callable (see `saliency.token_importance`)."""
        if self.encoder.pruning is None:
            raise ValueError("this model does not prune: call set_pruning with a PruningConfig first")
        self.set_pruning(dataclasses.replace(self.encoder.pruning, scorer=scorer))

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SidT5):
            init.normal_(module.shared.weight, std=self.config.embedding_init)
            if self.config.position_init is not None:
                for stack in (module.encoder, module.decoder):
                    bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias
                    start = bias.weight.detach().clone()
                    for head in range(min(self.config.num_heads // 2, 7)):  # T5 has a bias of its own for each distance below 8
                        start[head + 1, head] += self.config.position_init
                    init.copy_(bias.weight, start)
        elif isinstance(module, MapHead):
            # In a fork, so that adding the head leaves every other random number as it was.
            with torch.random.fork_rng(devices=[]):
                init.ones_(module.norm)
                init.normal_(module.step, std=0.02)
                init.normal_(module.projection, std=self.config.d_model**-0.5)

    def forward(self, input_ids=None, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None,
                encoder_outputs=None, past_key_values=None, inputs_embeds=None, labels=None, map_labels=None, truth=None,
                use_cache=None, num_items_in_batch=None, **kwargs) -> SidOutput:
        """One pass.

        Args: `input_ids` int64 [B, N] and `attention_mask` [B, N]: the history; `labels` int64 [B, L]: the target's tokens;
        `map_labels` int64 [B, S, L], −100 where absent; `truth` float [B, N] for the oracle scorer; the others as in T5.
        Returns `SidOutput`; `logits` [B, L, V] are −inf off each position's level, and left out (None) while training.
        `num_items_in_batch`, given by the Trainer, is the number of label tokens in the whole update: the loss is then this
        batch's part of the update's mean.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
                                           truth=truth, **kwargs)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = PrunedEncoderOutput(last_hidden_state=encoder_outputs[0], attention_mask=attention_mask)
        # Cross-attention sees the pruned history, and so its mask.
        seen = getattr(encoder_outputs, "attention_mask", None)
        seen = attention_mask if seen is None else seen
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = self._shift_right(labels)
        decoded = self.decoder(
            input_ids=decoder_input_ids, attention_mask=decoder_attention_mask, past_key_values=past_key_values,
            encoder_hidden_states=encoder_outputs.last_hidden_state, encoder_attention_mask=seen,
            use_cache=use_cache, **kwargs,
        )
        hidden = decoded.last_hidden_state  # [B, L, d]
        out = SidOutput(
            past_key_values=decoded.past_key_values, decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions, cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state, encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions, encoder_attention_mask=seen,
        )
        if labels is not None:
            self._add_losses(out, hidden, labels, map_labels, num_items_in_batch)
        if labels is None or not self.training:
            token_level = self.encoder.token_level
            level = token_level[decoder_input_ids] + 1  # [B, L], what each position predicts
            out.logits = self.lm_head(hidden).masked_fill(level.unsqueeze(-1) != token_level, -torch.inf)
        return out

    def _add_losses(self, out, hidden, labels, map_labels, num_items_in_batch):
        share = 1.0 if num_items_in_batch is None else (labels != -100).sum() / num_items_in_batch
        losses = self._token_losses(hidden, labels)  # [B, L]
        out.main_loss = losses.sum() / (labels != -100).sum().clamp_min(1)
        out.loss = out.main_loss * share
        if self.map_head is not None and map_labels is not None:
            states = self.map_head(hidden)  # [B, S, L, d]
            by_item = self.map_config.unit == "item"
            steps = [self._token_losses(states[:, s], map_labels[:, s], shift=0 if by_item else s + 1)
                     for s in range(self.map_config.steps)]
            out.map_loss = map_loss(torch.stack(steps, dim=1), map_labels, self.map_config.decay)
            out.loss = out.loss + self.map_config.weight * out.map_loss * share

    def _token_losses(self, hidden, labels, shift=0):
        """Cross-entropy of each label against the codes of its own level: [B, L, d] and [B, L] → float32 [B, L], 0 at −100.

        Position t predicts level t, or level t + `shift` for MAP's token unit.
        """
        losses = []
        first = 3 + sum(self.config.widths[:shift])  # token id of the level's code 0
        for position, width in enumerate(self.config.widths[shift:]):
            logits = F.linear(hidden[:, position], self.lm_head.weight[first : first + width])  # [B, W]
            label = torch.where(labels[:, position] == -100, -100, labels[:, position] - first)
            losses.append(F.cross_entropy(logits.float(), label, ignore_index=-100, reduction="none"))
            first += width
        losses += [torch.zeros(len(hidden), device=hidden.device)] * min(shift, labels.shape[1])
        return torch.stack(losses, dim=1)

    def save_pretrained(self, save_directory, *args, drop_map=False, state_dict=None, **kwargs):
        """As in Hugging Face, with the `SidTable` in the same folder. `drop_map`: leave out the MAP head, which inference does
        not use; the loaded model recommends the same."""
        if drop_map and self.map_head is not None:
            state = state_dict if state_dict is not None else self.state_dict()
            bare = SidT5(copy.deepcopy(self.config), self.table)
            bare.config.map = bare.map_config = bare.map_head = None
            bare.load_state_dict({k: v for k, v in state.items() if not k.startswith("map_head.")})
            return bare.save_pretrained(save_directory, *args, **kwargs)
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        if self.table is not None:
            self.table.save(save_directory)

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        loaded = super().from_pretrained(folder, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if os.path.isfile(os.path.join(folder, "sids.json")):
            model.set_table(SidTable.load(folder))
        return loaded


def _missing_scorer(name):
    def scorer(signals):
        raise ValueError(f"this model was built with an own scorer ({name}); give it back with model.set_scorer(function)")

    return scorer
