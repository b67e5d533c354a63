"""The attention of the layer that scores: its output as ever, and the centrality of the history's
tokens.

Centrality needs every attention weight, and fused attention has none. So on a GPU the scores are
computed once more, in blocks, and only their column sums are kept (`kernels.column_sums`), outside
of what the backward pass remembers. `scored_attention` is registered with Hugging Face, so that one
layer can have it and the others keep the library's choice. `choose_path` says how:

* "plain": the attention matrix itself. On a CPU it exists anyway; `mode="reference"` and whoever
  asks for the weights need it.
* "sdpa": PyTorch's `scaled_dot_product_attention`, as in all other layers, and the scores in blocks
  (with their log-sum-exp, which it does not return, so in two passes). FlexAttention does return
  it, but cannot drop attention weights, compiles for seconds for every new length, and was no
  faster.

Every path scores the clean weights, before dropout. Before the fused path is used on a device for
the first time, a small example has to give the same output, centrality and gradients as the plain
one (outside of a CUDA graph, so warm up first); if it does not, or cannot run, there is a warning
and the plain one is used.
"""

import functools
import types
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from sidlab.checks import one_of
from sidlab.fast import cpu_layers, kernels
from sidlab.saliency import attention_centrality

PATHS = ("auto", "plain", "sdpa")
SCORED = "sidlab_scored"  # the name of `scored_attention` in the library


def scored_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    position_bias=None,
    record=None,
    token_mask=None,
    history=slice(None),
    reference=False,
    path="plain",
    eager=False,
    **kwargs,
):
    """Attention that also leaves the centrality of its clean, pre-dropout weights in the dict
    `record`: what the tokens in the slice `history` receive from one another. With `reference` that
    of the weights after dropout, to which padded queries contribute. Where `record` asks for it,
    the weights themselves as well. `path`: how it is computed; what `reference` and `record` ask
    for needs the plain one. Without `record` nothing is scored. `eager`: weights are given back,
    and dropout is PyTorch's own, as in the library's attention of that name.
    """
    causal = module.is_causal and query.shape[2] > 1
    if record is None and not eager:
        return cpu_layers.sdpa(
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
    one_of("scoring_path", path, PATHS)
    if eager:
        path = "plain"
    elif path == "auto":
        path = choose_path(query.device, query.dtype, query.shape[1], query.shape[3], causal)
    if path != "plain":
        output, record["centrality"] = fused_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            position_bias=position_bias,
            token_mask=token_mask,
            causal=causal,
            history=history,
        )
        return output, None
    key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    clean = cpu_layers.masked_softmax(query, key, attention_mask, scaling, position_bias, causal)
    weights = (F.dropout if eager else cpu_layers.dropout)(
        clean.to(value.dtype), dropout, module.training
    )
    if record is not None:
        votes = (weights if reference else clean).detach()[:, :, history, history]
        # [B, N]
        record["centrality"] = attention_centrality(votes, token_mask[:, history], reference)
        if record.get("keep_attention"):
            record["attention"] = clean.detach()
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(SCORED, scored_attention)
AttentionMaskInterface.register(SCORED, sdpa_mask)


@torch.compiler.assume_constant_result
def choose_path(
    device: torch.device, dtype: torch.dtype, heads: int, width: int, causal: bool = False
) -> str:
    """ "sdpa" or "plain": how to compute attention and scores on `device` for queries of `dtype`,
    with `heads` heads of `width` numbers. `causal`: queries see no later keys; without a position
    bias SDPA has its fastest kernels there.
    """
    return (
        "sdpa" if device.type == "cuda" and _works(device, dtype, heads, width, causal) else "plain"
    )


def fused_attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    position_bias: Tensor | None,
    token_mask: Tensor,
    causal: bool = False,
    history: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Attention by path "sdpa", and the centrality of its clean weights.

    Args: `module`, the library's attention module; `query` float [B, H, N, dk], `key` and `value`
    [B, Hkv, N, dk]; `attention_mask` bool [B, 1, N, N] or None, the library's form of `token_mask`
    [B, N], 1 real, 0 padding, and of `causal`; `scaling`, None for 1; `position_bias` float [1, H,
    N, N] that depends on key − query alone, or None; `history`: the tokens that vote and are voted
    for. Without `causal` all of them. Returns the output [B, N, H, dk] and float32 [B, history], 0
    at padding, through which no gradient flows.
    """
    scaling = 1.0 if scaling is None else scaling
    output, _ = cpu_layers.sdpa(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        position_bias=position_bias,
    )
    # What comes after the history sees it, and does not vote; what stands in front of it sees, and
    # votes for, itself alone
    if causal:
        query = query[:, :, : history.stop]
        key = key[:, :, : history.stop]
        token_mask = token_mask[:, : history.stop]
    bias = None if position_bias is None else kernels.by_distance(position_bias)
    return (
        output,
        kernels.column_sums(query, key, scaling=scaling, bias=bias, mask=token_mask, causal=causal)[
            :, history
        ],
    )


@functools.cache
def _works(device, dtype, heads, width, causal=False):
    """Whether a small example comes out as it does with the attention matrix; a warning if not."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        length = 40
        generator = torch.Generator(device).manual_seed(0)
        draw = functools.partial(torch.randn, device=device, generator=generator)
        at = torch.arange(length, device=device)
        # T5's
        bias = draw(1, heads, 2 * length - 1)[..., length - 1 + at - at[:, None]].requires_grad_()
        inputs = [draw(2, heads, length, width, requires_grad=True) for _ in "qkv"]
        query, key, value = (x.to(dtype) for x in inputs[:3])
        # [B, N]
        tokens = (
            torch.arange(length, device=device)
            < torch.tensor([[length], [length - 7]], device=device)
        ).long()
        module = types.SimpleNamespace(is_causal=False)
        seen = tokens[:, None, None] != 0
        if causal:
            seen = seen & torch.ones(length, length, dtype=torch.bool, device=device).tril()
            bias = None
        else:
            inputs.append(bias)

        def results(output, centrality):
            return [output, centrality, *torch.autograd.grad((output.float() ** 2).sum(), inputs)]

        weights = query.float() @ key.float().mT * width**-0.5 + (0 if bias is None else bias)
        weights = weights.masked_fill(~seen, -torch.inf).softmax(-1)  # [B, H, N, N]
        expected = results(
            (weights @ value.float()).transpose(1, 2),
            torch.einsum("bhqk,bq->bk", weights.detach(), tokens.float()),
        )
        try:
            # Otherwise `fused_attention` may do without Triton
            kernels.column_sums(query, key, backend="triton")
            # Autocast, which is off here, would give SDPA's mask the dtype of the queries.
            bias = bias.to(dtype) if bias is not None else bias
            found = results(
                *fused_attention(
                    module,
                    query,
                    key,
                    value,
                    seen,
                    dropout=0.0,
                    scaling=width**-0.5,
                    position_bias=bias,
                    token_mask=tokens,
                    causal=causal,
                )
            )
            for one, other in zip(found, expected, strict=True):
                error = (one.float() - other).norm() / other.norm()
                if not error < 0.03:
                    raise ArithmeticError(f"its results are off by {float(error):.1%}")
        except Exception as error:  # noqa: BLE001  (compilers, drivers: the warning says what, and there is another path)
            warnings.warn(
                f'attention path "sdpa" does not work on {device} in {dtype} and is not used:'
                f" {error}",
                stacklevel=2,
            )
            return False
    return True


def attention_path(model) -> str:
    """In words, which attention the layers of `model` (a `SidT5`'s encoder, all of a `SidQwen`) run
    on its device, in its mode (`train` or `eval`) and under the current autocast.
    """
    stack = model.stack
    device = model.device
    others = model.stack.config._attn_implementation
    causal = not hasattr(stack, "block")
    dropout = (
        (model.config.attention_dropout if causal else model.config.dropout_rate)
        if model.training
        else 0.0
    )
    if others == "sidlab":  # as `cpu_layers.attention` decides
        others = "written out, dropout by bytes" if dropout > 0 and device.type == "cpu" else "sdpa"
    if (
        stack.pruning is None
        or stack.pruning.reduce != "select"
        or not (model.training or stack.pruning.at_inference)
    ):
        return f"all layers: {others}; none scores"
    path = stack.scoring_path
    if stack.pruning.mode == "reference" or others == "eager":
        path = "plain"
    elif path == "auto":
        dtype = (
            torch.get_autocast_dtype(device.type)
            if torch.is_autocast_enabled(device.type)
            else model.dtype
        )
        heads, width = ("num_attention_heads", "head_dim") if causal else ("num_heads", "d_kv")
        path = choose_path(
            device, dtype, getattr(model.config, heads), getattr(model.config, width), causal
        )
    names = {"plain": "plain attention", "sdpa": "SDPA + column sums"}
    by = (
        ""
        if path == "plain"
        else f" in {'Triton' if kernels.choose_backend(None, device) == 'triton' else 'PyTorch'}"
    )
    return (
        f"layer {stack.pruning.after_layer}, which scores: {names[path]}{by}; the others: {others}"
    )
