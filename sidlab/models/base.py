"""What all recommenders here share, whatever transformer they stand on: the SID table, the heads by
level, the two losses.

Token `t` of a target is predicted from the codes of level `t` alone. A `SidModel` has `table` (a
`SidTable`), `config.widths`, `lm_head` with a row for each token id, and `map_head` (None without
MAP). `decoding` asks it for `encode` and `search`.
"""

import copy
import dataclasses
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from sidlab.fast.scored_attention import SCORED
from sidlab.files import read_json, reading
from sidlab.map_loss import MapConfig, MapHead, map_loss
from sidlab.pruning import Pruned, PruningConfig, TokenPruner, reference_choice
from sidlab.saliency import SCORERS, Signals, semantic_saliency, splitmix64, token_importance
from sidlab.sids.table import BOS, PAD, SidTable


class LibraryInit:
    """Initialise as the library's own classes do.

    For classes defined elsewhere it passes over modules that own no parameter directly, such as
    T5's attention, and leaves their projections at standard deviation 1, some eight times too
    large; such a model hardly learns.
    """

    @classmethod
    def is_custom_code(cls) -> bool:
        return False

    def _init_weights(self, module):
        super()._init_weights(module)
        # Not saved, as it follows from the widths
        if isinstance(module, SidEmbedding) and module.level is not None:
            init.copy_(module.token_level, _levels_of(self.config))
            # The library leaves it at 1 in T5, which drowns the tokens
            init.normal_(module.level.weight, std=self.config.embedding_init)


def token_levels(widths, further: int = 0) -> Tensor:
    """Level of every token id: int64 [V]. BOS −1 (level 0 comes next), codes 0..L−1, PAD, SEP and
    `further` ids after the codes L.
    """
    n_levels = len(widths)
    codes = [level for level, width in enumerate(widths) for _ in range(width)]
    return torch.tensor([n_levels, -1, n_levels, *codes, *[n_levels] * further])


def _levels_of(config):
    return token_levels(config.widths, getattr(config, "text_vocab", 0))


class SidEmbedding(nn.Embedding):
    """Token embeddings, on request with a learned vector for each level, scaled, and with dropout.
    `options`: of `nn.Embedding`.

    `config`: a model's, whose `level_embeddings` and `embedding_norm` (a root mean square of 1) say
    what is done. `dropout`: of the result, while training. int64 [..., N] → float [..., N, d].
    """

    def __init__(self, config, width: int, *, dropout: float = 0.0, **options):
        super().__init__(config.vocab_size, width, **options)
        self.level = None
        self.normed = config.embedding_norm
        if config.level_embeddings:
            self.register_buffer("token_level", _levels_of(config), persistent=False)
            # Of BOS (−1), the codes' levels, and all else
            self.level = nn.Embedding(len(config.widths) + 2, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = super().forward(tokens)
        if self.level is not None:
            embedded = embedded + self.level(self.token_level[tokens] + 1)
        if self.normed:
            embedded = F.rms_norm(embedded, embedded.shape[-1:], eps=1e-6)
        return self.dropout(embedded)


class OutputProjection(nn.Linear):
    """The last product of an attention or feed-forward layer, with dropout of what it adds to the
    residual stream.
    """

    def __init__(self, linear: nn.Linear, dropout: float):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight = linear.weight
        self.bias = linear.bias
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))


@dataclasses.dataclass
class PrunedHistory:
    """What a pruner leaves of the histories: `attention_mask` and `positions` int64 [B, K];
    `importance`, `centrality`, `saliency` float32 [B, N], the scores and their two factors. Without
    pruning K = N, and all but the mask are None.
    """

    attention_mask: Tensor | None = None
    positions: Tensor | None = None
    importance: Tensor | None = None
    centrality: Tensor | None = None
    saliency: Tensor | None = None


@dataclasses.dataclass
class SidLosses:
    """`main_loss` and `map_loss`, the two terms of `loss`, and `encoder_attention_mask` int64 [B,
    K], the mask of the history after the pruner.
    """

    main_loss: Tensor | None = None
    map_loss: Tensor | None = None
    encoder_attention_mask: Tensor | None = None


def check_after_layer(pruning: PruningConfig | None, layers: int, of: str = "encoder ") -> None:
    """ValueError where `pruning` prunes after a layer that a model with so many layers does not
    have.
    """
    if pruning is not None and pruning.after_layer > layers:
        raise ValueError(
            f"after_layer={pruning.after_layer} lies beyond the last {of}layer; use 1..{layers}"
        )


def pruning_of(config) -> PruningConfig | None:
    """The `PruningConfig` that a model's configuration holds as a dict.

    A custom scorer becomes one that says it is missing until `set_scorer` gives it back: a model
    may come from a stranger, so what it names is never imported.
    """
    if config.pruning is None:
        return None
    scorer = config.pruning["scorer"]
    return PruningConfig(
        **config.pruning | {"scorer": scorer if scorer in SCORERS else _missing_scorer(scorer)}
    )


def _missing_scorer(name):
    def scorer(signals):
        raise ValueError(
            f"this model was built with a custom scorer ({name}), and a saved model imports"
            " nothing: give it back with model.set_scorer(function)"
        )

    # Saved again, it is known by the same name.
    scorer.__name__ = name.removeprefix("own:")
    return scorer


class PrunedStack(LibraryInit):
    """The mixin of the two stacks of layers that prune; `attentions`: the attention modules, one a
    layer.
    """

    check = staticmethod(check_after_layer)
    scoring_path = "auto"  # how the layer that scores computes attention: one of `scoring.PATHS`

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("token_level", _levels_of(config), persistent=True)
        self.set_pruning(pruning_of(config))

    def set_pruning(self, pruning: PruningConfig | None):
        """Prune as `pruning` says from now on, or (None) not at all; the attention in front of the
        pruner alone scores.
        """
        attentions = self.attentions
        if not isinstance(pruning, PruningConfig | None):
            raise TypeError(f"pruning must be a PruningConfig or None, got {pruning!r}")
        self.check(pruning, len(attentions))
        self.pruning = pruning
        self.pruner = (
            TokenPruner(pruning.keep, pruning.unit, pruning.mass) if pruning is not None else None
        )
        for number, attention in enumerate(attentions, start=1):
            attention.config = self.config
            if pruning is not None and pruning.reduce == "select" and number == pruning.after_layer:
                attention.config = copy.copy(self.config)
                attention.config._attn_implementation = SCORED

    def padded_after(self, padded: bool) -> bool:
        """Whether slots may be empty after the pruner; rows of one length are pruned to one
        length, unless it goes by their scores.
        """
        return padded or (self.pruning is not None and self.pruning.mass is not None)

    def visible(self, tokens: Tensor, positions: Tensor, levels: Tensor | None) -> Tensor:
        """How many tokens of its history see each one: int64 [B, N] or [B, 1]. Causal attention:
        itself and those after it. `tokens` [B, N], the mask; `positions`, `levels` int64 [B, N], as
        in `Signals`.
        """
        return tokens.sum(1, keepdim=True) - positions

    def select(
        self,
        hidden: Tensor,
        centrality: Tensor,
        input_ids: Tensor | None,
        truth: Tensor | None,
        out: PrunedHistory,
        always: Tensor | None = None,
    ) -> Pruned:
        """Scores and chooses tokens of `hidden` [B, N, d] and gathers them; `out.attention_mask` is
        their mask. Fills the scores of `out`. `always`: bool [B, N], one token of each row that
        stays whatever its score, on top of the share.
        """
        pruning = self.pruning
        tokens = out.attention_mask
        levels = item_index = slots = None
        protect = always
        if input_ids is not None:
            levels = self.token_level[input_ids]  # [B, N]
            item_index = ((levels == 0).cumsum(1) - 1).clamp_min(0)
        positions = (tokens.cumsum(1) - 1).clamp_min(0)
        # Random scorers draw from the global state in training, and otherwise by the history
        # itself, so that recommendations repeat.
        seed = (
            None
            if self.training or input_ids is None
            else (splitmix64(input_ids + (positions << 32)) * tokens).sum(1)
        )
        visible = self.visible(tokens, positions, levels)
        signals = Signals(
            hidden.detach(), centrality, tokens, positions, levels, item_index, visible, truth, seed
        )
        out.importance = token_importance(signals, pruning.scorer)
        out.centrality = centrality
        out.saliency = semantic_saliency(signals.hidden) * tokens
        if pruning.mode == "reference":
            return reference_choice(hidden, tokens, out.importance, pruning.keep)
        if pruning.protect_separators:
            if levels is None:
                raise ValueError(
                    "protect_separators=True needs input_ids, which say where the separators are;"
                    " got inputs_embeds"
                )
            separators = levels == len(self.config.widths)
            protect = separators if always is None else separators | always
        # So that the number of slots still follows from the shape alone
        elif always is not None and pruning.unit == "token":
            slots = min(
                max(math.ceil(pruning.keep * tokens.shape[1] - 1e-6), 1) + 1, tokens.shape[1]
            )
        return self.pruner(
            hidden, tokens, out.importance, protect=protect, item_index=item_index, slots=slots
        )


class SidModel(LibraryInit):
    """The mixin of `SidT5` and `SidQwen`. `stack` is their `PrunedStack`."""

    table: SidTable | None = None

    def finish(self, d_model: int, table: SidTable | None, **generation):
        """The end of a model's `__init__`: `map_head` as `config.map` asks for it, the table, the
        weights, how to generate.
        """
        self.map_config = MapConfig(**self.config.map) if self.config.map is not None else None
        self.map_head = (
            MapHead(d_model, self.map_config.steps) if self.map_config is not None else None
        )
        if table is not None:
            self.set_table(table)
        self.post_init()
        self.generation_config.update(
            max_new_tokens=len(self.config.widths),
            max_length=None,
            eos_token_id=None,
            pad_token_id=PAD,
            **generation,
        )

    def _init_weights(self, module):
        super()._init_weights(module)
        # In a fork, so that adding the head leaves every other random number as it was
        if isinstance(module, MapHead):
            with torch.random.fork_rng(devices=[]):
                init.ones_(module.norm)
                init.normal_(module.step, std=0.02)
                init.normal_(module.projection, std=len(module.norm) ** -0.5)

    def set_table(self, table: SidTable):
        """Attach the `SidTable` this model speaks; its widths must be the model's."""
        if not isinstance(table, SidTable):
            raise TypeError(f"table must be a SidTable, got {table!r}")
        if list(table.widths) != list(self.config.widths):
            raise ValueError(
                f"the table has widths {tuple(table.widths)}, the model {tuple(self.config.widths)}"
            )
        self.table = table

    @property
    def pruning(self) -> PruningConfig | None:
        """How this model prunes now."""
        return self.stack.pruning

    def set_pruning(self, pruning: PruningConfig | None):
        """Prune by another configuration, or (None) not at all. Pruning has no parameters, so any
        trained model can change it. Under `mode="reference"` a model that was not built with it
        keeps its own attention and dropout in the other layers.
        """
        self.stack.set_pruning(pruning)
        # What `save_pretrained` writes.
        self.config.pruning = self.stack.config.pruning = (
            None if pruning is None else pruning.to_dict()
        )

    def set_scorer(self, scorer):
        """Replace the saliency scorer: a name or a callable (see `saliency.token_importance`)."""
        if self.pruning is None:
            raise ValueError(
                "this model does not prune: call set_pruning with a PruningConfig first"
            )
        self.set_pruning(dataclasses.replace(self.pruning, scorer=scorer))

    def shifted(self, labels: Tensor) -> Tensor:
        """BOS and all but the last label: int64 [..., L]."""
        return F.pad(labels[..., :-1].masked_fill(labels[..., :-1] == -100, 0), (1, 0), value=BOS)

    def tokens_per_item(self, input_ids: Tensor, labels: Tensor) -> int:
        """Of the histories in `input_ids` [B, N], where `labels` [B, T, L] teach all their items
        but the first. ValueError where the two do not fit, or the model prunes.
        """
        if self.pruning is not None and (self.training or self.pruning.at_inference):
            raise ValueError(
                "a pass that teaches every item prunes nothing, for each target would keep other"
                " tokens: set_pruning(None), or teach one target a pass, labels [B, L]"
            )
        batch, targets, n_levels = labels.shape
        per_item = n_levels + self.config.separators
        if input_ids.shape != (batch, (targets + 1) * per_item):
            raise ValueError(
                f"input_ids must be [{batch}, {(targets + 1) * per_item}], one item more than there"
                f" are labels, got {tuple(input_ids.shape)}"
            )
        return per_item

    def level_logits(self, hidden: Tensor, level: int) -> Tensor:
        """Logits of the codes of `level` (from 0): [..., d] → [..., W]."""
        first = 3 + sum(self.config.widths[:level])  # token id of the level's code 0
        return F.linear(hidden, self.lm_head.weight[first : first + self.config.widths[level]])

    def add_losses(
        self, out, hidden, labels, map_labels, num_items_in_batch, map_items_in_batch=None
    ):
        """Fills `loss`, `main_loss` and `map_loss` of `out` from the states [B, L, d] that predict
        the target's tokens `labels` [B, L], or of T targets a row: [B, T, L, d] and [B, T, L].
        """
        n_levels = len(self.config.widths)
        if labels.ndim not in (2, 3) or labels.shape[-1] != n_levels:
            raise ValueError(
                f"labels must be [B, {n_levels}], the tokens of one SID a row, or [B, T,"
                f" {n_levels}] of T targets, got {tuple(labels.shape)}"
            )
        if labels.ndim == 3:
            hidden = hidden.flatten(0, 1)
            labels = labels.flatten(0, 1)
            map_labels = map_labels.flatten(0, 1) if map_labels is not None else None
        share = 1.0 if num_items_in_batch is None else (labels != -100).sum() / num_items_in_batch
        losses = self._token_losses(hidden, labels)  # [B, L]
        out.main_loss = losses.sum() / (labels != -100).sum().clamp_min(1)
        out.loss = out.main_loss * share
        if self.map_head is not None and map_labels is not None:
            wanted = (len(labels), self.map_config.steps, labels.shape[1])
            if map_labels.shape != wanted:
                raise ValueError(
                    f"map_labels must be {list(wanted)} ([B, S, L], S being map.steps), got"
                    f" {tuple(map_labels.shape)}"
                )
            states = self.map_head(hidden)  # [B, S, L, d]
            by_item = self.map_config.unit == "item"
            steps = [
                self._token_losses(states[:, s], map_labels[:, s], shift=0 if by_item else s + 1)
                for s in range(self.map_config.steps)
            ]
            out.map_loss = map_loss(
                torch.stack(steps, dim=1), map_labels, self.map_config.decay, map_items_in_batch
            )
            part = share if map_items_in_batch is None else 1.0  # which the counts make it already
            out.loss = out.loss + self.map_config.weight * out.map_loss * part

    def _token_losses(self, hidden, labels, shift=0):
        """Cross-entropy of each label against the codes of its own level: [B, L, d] and [B, L] →
        float32 [B, L], 0 at −100.

        Position t predicts level t, or level t + `shift` for MAP's token unit.
        """
        losses = []
        first = 3 + sum(self.config.widths[:shift])
        for position, width in enumerate(self.config.widths[shift:]):
            logits = self.level_logits(hidden[:, position], position + shift)  # [B, W]
            label = torch.where(labels[:, position] == -100, -100, labels[:, position] - first)
            losses.append(
                F.cross_entropy(
                    logits.float(),
                    label,
                    ignore_index=-100,
                    reduction="none",
                    label_smoothing=self.config.label_smoothing if self.training else 0.0,
                )
            )
            first += width
        losses += [torch.zeros(len(hidden), device=hidden.device)] * min(shift, labels.shape[1])
        return torch.stack(losses, dim=1)

    def masked_logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Logits [..., L, V] of the states [..., L, d] after `tokens` int64 [..., L], −inf off the
        level that each position predicts.
        """
        level = self.stack.token_level
        return self.lm_head(hidden).masked_fill(
            (level[tokens] + 1).unsqueeze(-1) != level, -torch.inf
        )

    def save_pretrained(self, save_directory, *args, drop_map=False, state_dict=None, **kwargs):
        """As in Hugging Face, with the `SidTable` in the same folder. `drop_map`: leave out the MAP
        head, which inference does not use; the loaded model recommends the same.
        """
        if drop_map and self.map_head is not None:
            bare = copy.copy(self)  # which shares the weights
            bare.config = copy.deepcopy(self.config)
            bare._modules = self._modules | {"map_head": None}
            bare.config.map = bare.map_config = None
            state = state_dict and {
                k: v for k, v in state_dict.items() if not k.startswith("map_head.")
            }
            return bare.save_pretrained(save_directory, *args, state_dict=state, **kwargs)
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        if self.table is not None:
            self.table.save(save_directory)
        else:  # nor may another model's stay there
            for name in ("sids.json", "sids.safetensors"):
                pathlib.Path(save_directory, name).unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        file = pathlib.Path(folder) / "config.json"
        own = cls.config_class.model_type
        if file.parent.is_dir() and (kind := read_json(file).get("model_type")) != own:
            raise ValueError(f"{folder} holds a {kind!r} model; {cls.__name__} loads {own!r}")
        with reading(folder):
            loaded = super().from_pretrained(folder, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pathlib.Path(folder, "sids.json").exists():
            model.set_table(SidTable.load(folder))
        return loaded
