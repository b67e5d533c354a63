"""Dropout and attention as they are cheap on a CPU: what `SidT5` uses there in place of
PyTorch's own.

`F.dropout` draws a number an element, one after the other; in a training step of the paper's size
that took longer than a third of all products. Here a random word of 64 bits serves eight elements.
T5's learned position bias leaves PyTorch's attention no fused kernel on a CPU, and dropout
neither, so attention is written out, with that dropout. Random numbers come from torch's global
generator: `manual_seed` repeats them and a resumed run goes on with them. On other devices
everything here is PyTorch's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def realised(p: float) -> float:
    """The probability with which `dropout` on a CPU zeroes an element: the multiple of 1/256
    nearest to `p`.

    >>> realised(0.15)
    0.1484375
    """
    return round(256 * p) / 256


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """`x` with each element zeroed with the probability `realised(p)`, independently, and the
    others divided by 1 − `realised(p)`, so that the mean stays. Float tensor of any shape → the
    same shape and dtype. PyTorch's own dropout on other devices than a CPU and where
    `realised(p)` is 0 or 1.
    """
    if not training or p == 0 or not _by_byte(x, p):
        return F.dropout(x, p, training)
    return _Dropout.apply(x, p)


def relu_dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """`dropout(relu(x))`, of which the backward pass needs the result alone: it is positive where a
    gradient flows. Shapes, dtypes and devices as in `dropout`.
    """
    return _ReluDropout.apply(x, p) if training and p > 0 else F.relu(x)


class Dropout(nn.Dropout):
    """`nn.Dropout` by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


def replace_dropout(model: nn.Module, kind: type[nn.Dropout] = Dropout) -> None:
    """Makes every dropout module inside `model` one of `kind`, of the same rate."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, kind(child.p))


def _by_byte(x, p):
    return x.device.type == "cpu" and 0 < realised(p) < 1


def _kept(x, p):
    """uint8, the shape of `x`: 1 with the probability 1 − realised(p), else 0."""
    # Without bounds the top bit would always be 0
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    # Compared in place, for a comparison that gives booleans is not vectorised and takes thirty
    # times as long.
    return words.view(torch.uint8)[: x.numel()].ge_(round(256 * p)).view(x.shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        kept = _kept(x, p)
        ctx.scale = 1 / (1 - realised(p))
        ctx.save_for_backward(kept)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).mul_(ctx.scale), None


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        if _by_byte(x, p):
            ctx.scale = 1 / (1 - realised(p))
            out = F.relu(x).mul_(_kept(x, p)).mul_(ctx.scale)
        else:
            ctx.scale = 1 / (1 - p) if p < 1 else 0.0
            out = F.dropout(F.relu(x), p, True)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return (
            torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[0], 0).mul_(ctx.scale),
            None,
        )


def masked_softmax(query, key, attention_mask, scaling=None, position_bias=None, causal=False):
    """Attention weights before dropout, float32 [B, H, N, M], of `query` [B, H, N, dk] and `key`
    [B, H, M, dk]. `attention_mask`: bool, True where attention may go, or a number to add; None
    with `causal`: each query sees the keys up to its own place.
    """
    scores = torch.matmul(query, key.transpose(2, 3))
    if scaling not in (None, 1.0):
        scores = scores * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = torch.ones(
            query.shape[2], key.shape[2], dtype=torch.bool, device=query.device
        ).tril()
    if attention_mask is not None:
        # `where` keeps this mask for its backward pass, `masked_fill` would keep the opposite
        boolean = attention_mask.dtype == torch.bool
        scores = (
            torch.where(attention_mask, scores, torch.finfo(scores.dtype).min)
            if boolean
            else scores + attention_mask
        )
    return torch.softmax(scores, dim=-1, dtype=torch.float32)


def sdpa(module, query, key, value, attention_mask, **kwargs):
    """The library's fused attention. On a GPU without cuDNN's kernel: it makes a new plan for every
    shape, which takes longer than many a batch of that shape.
    """
    if query.device.type != "cuda":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    position_bias=None,
    **kwargs,
):
    """Hugging Face's attention function of the models here: written out where a model trains with
    dropout on a CPU, the library's fused one everywhere else. Keys [B, H, M, dk] may serve b
    times as many queries [B · b, H, 1, dk], the beams of a search; then the mask is that of the
    keys, [B, 1, 1, M].
    """
    if len(query) != len(key):
        rows, heads, _, size = query.shape
        beams = query.view(len(key), -1, heads, size).transpose(1, 2)  # [B, H, b, dk]
        out, _ = sdpa(
            module,
            beams,
            key,
            value,
            attention_mask,
            scaling=scaling,
            position_bias=position_bias,
            **kwargs,
        )
        return out.reshape(rows, 1, heads, size), None
    if not module.training or dropout == 0 or not _by_byte(query, dropout):
        fused = position_bias is None and (
            attention_mask is None or attention_mask.dtype == torch.bool
        )
        if (
            fused
            and value.device.type == "cpu"
            and value.dtype == torch.bfloat16
            and value.requires_grad
        ):
            # The backward pass of PyTorch's fused attention takes eight times as long in bfloat16
            # as in float32.
            wide = (x.float() for x in (query, key, value))
            with torch.autocast("cpu", enabled=False):
                out, _ = sdpa(
                    module,
                    *wide,
                    attention_mask,
                    dropout=dropout,
                    scaling=scaling,
                    position_bias=position_bias,
                    **kwargs,
                )
            return out.to(value.dtype), None
        return sdpa(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            position_bias=position_bias,
            **kwargs,
        )
    key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    weights = masked_softmax(
        query, key, attention_mask, scaling, position_bias, causal=module.is_causal
    )
    weights = _Dropout.apply(weights.to(value.dtype), dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("sidlab", attention)
AttentionMaskInterface.register("sidlab", sdpa_mask)
