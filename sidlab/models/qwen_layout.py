"""The decoder-only model's configuration, and how its rows are laid out."""

import dataclasses

import torch
from torch import Tensor
from transformers import Qwen3Config
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from sidlab.checks import one_of
from sidlab.models.base import (
    PrunedHistory,
    SidLosses,
    check_after_layer,
)
from sidlab.pruning import PruningConfig, pool_tokens
from sidlab.sids.table import BOS, PAD

LAYOUTS = ("bos_last", "stream")


class SidQwenConfig(Qwen3Config):
    """Qwen3's configuration, plus the fields below."""

    model_type = "sid_qwen"

    widths: list[int] | tuple[int, ...] = (256, 256, 256)  # codes per level
    separators: bool = True  # one token after each item
    max_items: int = 30  # of history
    # A row: history BOS target; "stream": BOS history target, so that every token predicts the next
    layout: str = "bos_last"
    embedding_init: float = 0.05  # standard deviation of the initial token embeddings
    level_embeddings: bool = False  # a learned vector for each level, added to the token's
    embedding_norm: bool = False  # embeddings are scaled to a root mean square of 1
    # Of embeddings and of what each attention and feed-forward layer adds
    residual_dropout: float = 0.0
    # The output projections of attention and feed-forward layers start at zero
    zero_init: bool = False
    label_smoothing: float = 0.0  # of the training loss, over the codes of a level
    text_vocab: int = 0  # how many text tokens stand after the SID tokens
    prompt: list[int] | None = None  # ids in front of every history
    tie_word_embeddings: bool = True
    pruning: dict | None = None  # the fields of `PruningConfig`
    map: dict | None = None  # the fields of `MapConfig`

    def __post_init__(self, **kwargs):
        self.widths = list(self.widths)
        self.vocab_size = 3 + sum(self.widths) + self.text_vocab
        super().__post_init__(**kwargs)
        self.pad_token_id = PAD
        self.bos_token_id = BOS
        self.eos_token_id = None
        one_of("layout", self.layout, LAYOUTS)
        if "sliding_attention" in self.layer_types:
            raise ValueError(
                "SidQwen needs full attention in every layer; use_sliding_window must be False"
            )
        wrong = [
            token
            for token in self.prompt or []
            if not 3 + sum(self.widths) <= token < self.vocab_size
        ]
        if wrong:
            raise ValueError(
                "prompt must hold ids of text tokens,"
                f" {3 + sum(self.widths)}..{self.vocab_size - 1}, got {wrong[0]}"
            )


def check(pruning: PruningConfig | None, layers: int) -> None:
    """ValueError where a decoder-only model of so many layers cannot prune like this."""
    check_after_layer(pruning, layers, of="")
    if pruning is not None and (pruning.mode == "reference" or pruning.positions == "none"):
        what = 'mode="reference"' if pruning.mode == "reference" else 'positions="none"'
        raise ValueError(
            f"{what} belongs to T5: a rotation has no place to leave out; leave it out for SidQwen"
        )


def last_slot(mask):
    """The place of each row's last real token: [B, N] → int64 [B]; 0 in an empty row."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)


def pool_but_last(hidden, mask, last, keep):
    """`pool_tokens` of all but the last token of each row, which predicts and stays as it is, in a
    slot of its own.
    """
    at = last.unsqueeze(1)  # [B, 1]
    pooled = pool_tokens(hidden, mask.scatter(1, at, 0), keep)
    itself = hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))  # [B, 1, d]
    return pooled._replace(
        hidden=torch.cat([pooled.hidden, itself], dim=1),
        mask=torch.cat([pooled.mask, mask.gather(1, at)], dim=1),
        positions=torch.cat([pooled.positions, at], dim=1),
    )


def without_bos(input_ids, attention_mask):
    """History, its mask and BOS, of rows that begin with BOS: the model sets its own, so that it
    stands first whatever the padding.
    """
    if not ((input_ids == BOS).sum(1) == 1).all():
        raise ValueError(
            "without labels or decoder_input_ids, input_ids must hold BOS once a row, in front of"
            " every history"
        )
    mask = (input_ids != PAD).long() if attention_mask is None else attention_mask
    return input_ids, mask * (input_ids != BOS), input_ids.new_full((len(input_ids), 1), BOS)


def cut_at_bos(input_ids, attention_mask):
    """History, its mask and what begins with BOS, of rows that hold both."""
    columns = (input_ids == BOS).int().argmax(1)
    cut = int(columns[0])
    if not (input_ids[:, cut] == BOS).all():
        raise ValueError(
            "without labels or decoder_input_ids, input_ids must hold BOS after every history, in"
            " the same column: pad on the left"
        )
    mask = (input_ids != PAD).long() if attention_mask is None else attention_mask
    return input_ids[:, :cut], mask[:, :cut], input_ids[:, cut:]


@dataclasses.dataclass
class PrunedDecoderOutput(PrunedHistory, BaseModelOutputWithPast):
    """`last_hidden_state` [B, P + K + T, d], of what stands in front (P: prompt, and BOS in the
    layout "stream"), kept history and tail. `masks` and `lengths`: what a later token sees, in
    front of and after the pruner: int64 [B, P + N] and [B, P + K]; int64 [B] each, the place at
    which it stands. `next_state` [B, d], of the layout "stream": the state of the history's last
    token, which predicts.
    """

    masks: tuple[Tensor, Tensor] | None = None
    lengths: tuple[Tensor, Tensor] | None = None
    next_state: Tensor | None = None


@dataclasses.dataclass
class SidCausalOutput(SidLosses, CausalLMOutputWithPast):
    """Hugging Face's output and ours."""
