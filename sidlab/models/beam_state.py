"""What a beam search carries from token to token."""

import copy

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache


class BeamState:
    """What a beam search in a `SidT5` carries from level to level: the cached keys and values of
    the decoder.
    """

    def __init__(self, model, encoded):
        self.decoder = model.decoder
        self.memory = encoded.last_hidden_state  # [B, K, d]
        self.mask = model.cross_mask(encoded, encoded.attention_mask)  # [B, K], or [B, H, 1, K]
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.width = 1
        # Beams of one history attend to the same keys and values, which our own attention takes as
        # they are; others need a copy for each.
        self.shared = self.decoder.config._attn_implementation == "sidlab"
        if self.shared and self.mask.ndim == 2:
            self.mask = self.mask[:, None, None].bool()  # [B, 1, 1, K], which the decoder hands on

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """`tokens` int64 [B, b], the last token of each beam, and `parents` int64 [B, b], the beam
        of the step before that it goes on from (None at the first step) → decoder states [B, b, d].
        """
        batch, width = tokens.shape
        if parents is not None:
            rows = (
                torch.arange(batch, device=tokens.device)[:, None] * self.width + parents
            ).flatten()
            self.cache.self_attention_cache.batch_select_indices(rows)
            # The same for all beams of a history: this changes only with their number
            if width != self.width and not self.shared:
                self.cache.cross_attention_cache.batch_select_indices(rows)
                self.memory = self.memory[rows]
                self.mask = self.mask[rows]
            self.width = width
        out = self.decoder(
            input_ids=tokens.reshape(-1, 1),
            encoder_hidden_states=self.memory,
            encoder_attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.last_hidden_state[:, -1].view(batch, width, -1)


class BeamTree:
    """What a beam search in a `SidQwen` carries from level to level: a cache with the history and
    every beam so far, and `past`, which of them are each beam's own.
    """

    def __init__(self, decoder, encoded):
        self.decoder = decoder
        self.encoded = encoded
        self.cache = _copy(encoded)
        self.past = None
        self.depth = 0

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """As `models.t5.BeamState.step`."""
        if parents is None and self.encoded.next_state is not None:
            # The history's last token predicts the first code
            return self.encoded.next_state.unsqueeze(1)
        batch, width = tokens.shape
        own = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        if self.past is not None:
            inherited = self.past.gather(
                1, parents.unsqueeze(-1).expand(-1, -1, self.past.shape[-1])
            )
            own = torch.cat([inherited, own], dim=-1)  # [B, b, t + b]
        self.past, depth = own, torch.tensor([self.depth], device=tokens.device)
        self.depth += 1
        return self.decoder.extend(tokens, depth, own, self.encoded, self.cache)


def _copy(encoded):
    """The cache of `encoded` to go on from, which stays as it is: tensors are shared, for new keys
    go into new ones.
    """
    cache = copy.copy(encoded.past_key_values)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    return cache
