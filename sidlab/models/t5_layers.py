"""T5's configuration with our fields, and the layers in which our T5 differs from the library's."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.t5.modeling_t5 import T5DenseActDense

from sidlab.checks import one_of
from sidlab.fast import cpu_layers
from sidlab.models.base import PrunedHistory, SidLosses
from sidlab.sids.table import BOS, PAD, SEP

ENCODER_MASKS = ("full", "items")
FEED_FORWARDS = ("t5", "published")


class SidT5Config(T5Config):
    """T5's configuration, plus the fields below."""

    model_type = "sid_t5"

    widths: list[int] | tuple[int, ...] = (256, 256, 256)  # codes per level
    separators: bool = True  # one token after each item
    max_items: int = 30  # of history
    # With `mode="reference"`: so many items is every history padded to; None: `max_items`
    padded_items: int | None = None
    # Whom a history token sees: all; "items": its own item and those before it
    encoder_mask: str = "full"
    cross_bias: bool = False  # a learned bias of cross-attention by how many items back a token is
    qk_norm: bool = False  # queries and keys of each head are scaled to one size, which T5 does not
    ffn_hidden_layers: int = 1  # 2 in RASTP's model and 1 in T5's
    ffn: str = "t5"  # "published": biases, and dropout in other places (`DeepFeedForward`)
    embedding_init: float = 0.05  # standard deviation of the initial token embeddings
    # The output heads are slices of the embedding; False: weights of their own
    tie_embeddings: bool = True
    # Half of the heads start out looking 1, 2, 3, … tokens back, with so strong a bias; None: none
    # does
    position_init: float | None = None
    # Of embeddings, and what layers and stacks give; None: `dropout_rate`, as everywhere in T5
    residual_dropout: float | None = None
    level_embeddings: bool = False  # a learned vector for each level, added to the token's
    embedding_norm: bool = False  # embeddings are scaled to a root mean square of 1
    # The output projections of attention and feed-forward layers start at zero
    zero_init: bool = False
    label_smoothing: float = 0.0  # of the training loss, over the codes of a level
    pruning: dict | None = None  # the fields of `PruningConfig`
    map: dict | None = None  # the fields of `MapConfig`

    def __post_init__(self, **kwargs):
        self.widths = list(self.widths)
        self.vocab_size = 3 + sum(self.widths)
        super().__post_init__(**kwargs)
        self.pad_token_id = PAD
        self.bos_token_id = BOS
        self.eos_token_id = None
        self.decoder_start_token_id = BOS
        one_of("encoder_mask", self.encoder_mask, ENCODER_MASKS)
        one_of("ffn", self.ffn, FEED_FORWARDS)
        self.scale_decoder_outputs = False  # T5's answer to embeddings of size 1; ours start small


def published_padding(config, slots: int, device=None) -> Tensor:
    """What stands in padded slots in RASTP's published code: the first code of the first level, and
    the separator in every item's last slot (token ids int64 [N]). `config`: a model's.
    """
    place = torch.arange(slots, device=device) % (len(config.widths) + config.separators)
    return torch.where(place == len(config.widths), SEP, SEP + 1)


def library_mask(seen: Tensor, config, dtype: torch.dtype) -> Tensor:
    """`seen` bool [B, 1, N, M], True where attention may go, in the form that the attention of
    `config` takes.
    """
    if config._attn_implementation != "eager":
        return seen
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)


class NormedProjection(nn.Linear):
    """The product that makes queries or keys, each head's scaled to one size: a root mean square of
    `norm`, learned for each number. It starts so that scores are as large as those divided by the
    root of their width.
    """

    def __init__(self, linear: nn.Linear, width: int):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.norm = nn.Parameter(torch.full((width,), width**-0.25))

    def forward(self, x: Tensor) -> Tensor:
        heads = super().forward(x).unflatten(-1, (-1, len(self.norm)))  # [..., H, dk]
        return F.rms_norm(heads, self.norm.shape, self.norm.to(heads.dtype), eps=1e-6).flatten(-2)


class DeepFeedForward(T5DenseActDense):
    """T5's feed-forward layer with `ffn_hidden_layers` hidden layers, two in RASTP's model (d →
    d_ff → d_ff → d).

    `ffn="t5"`: no biases, dropout after every hidden layer. `ffn="published"`, RASTP's: biases,
    dropout after the last hidden layer alone and of the output, which the library's layer around
    this one drops once more.
    """

    def __init__(self, config: SidT5Config):
        super().__init__(config)
        biased = config.ffn == "published"
        self.output_dropout = None
        if biased:
            self.wi = nn.Linear(config.d_model, config.d_ff)
            self.wo = nn.Linear(config.d_ff, config.d_model)
            residual = config.residual_dropout
            self.output_dropout = nn.Dropout(config.dropout_rate if residual is None else residual)
        self.hidden = nn.ModuleList(
            nn.Linear(config.d_ff, config.d_ff, bias=biased)
            for _ in range(config.ffn_hidden_layers - 1)
        )
        # As T5 draws `wo`; marked, or the library would draw them again at its default size
        for layer in self.hidden:
            nn.init.normal_(layer.weight, std=config.initializer_factor * config.d_ff**-0.5)
            if biased:
                nn.init.zeros_(layer.bias)
            layer._is_hf_initialized = True

    def forward(self, hidden_states):
        layers = (self.wi, *self.hidden)
        for layer in layers:
            hidden_states = layer(hidden_states)
            if self.output_dropout is not None and layer is not layers[-1]:
                hidden_states = self.act(hidden_states)
            elif isinstance(self.dropout, cpu_layers.Dropout) and isinstance(self.act, nn.ReLU):
                hidden_states = cpu_layers.relu_dropout(
                    hidden_states, self.dropout.p, self.training
                )
            else:
                hidden_states = self.dropout(self.act(hidden_states))
        output = self.wo(hidden_states)
        return output if self.output_dropout is None else self.output_dropout(output)


@dataclasses.dataclass
class PrunedEncoderOutput(PrunedHistory, BaseModelOutput):
    """The encoder's output. With pruning `last_hidden_state` is [B, K, d]. `items_back` int64 [B,
    K], for `cross_bias`: how many items ago a token's item was, 1 for the newest.
    """

    items_back: Tensor | None = None


@dataclasses.dataclass
class SidOutput(SidLosses, Seq2SeqLMOutput):
    """Hugging Face's output and ours; `encoder_attention_mask` is the mask of
    `encoder_last_hidden_state`.
    """
