"""The memory of a training step, from configuration and lengths: what is kept for backward."""

import numpy as np


def activations(config, widths, slots, kept, padded, padded_after, fused, bf16, taught=1):
    """Bytes that autograd keeps per window. Residuals, norms, softmax and loss are float32,
    operands of products take `w` bytes. `padded`: a batch has empty slots; without, there is no
    mask and all its rows share one position bias. `fused` follows the derivative of PyTorch's
    memory-efficient attention, the one kernel of a GPU that takes a learned bias.
    """
    d = config.d_model
    f = config.d_ff
    heads = config.num_heads
    hidden = config.ffn_hidden_layers
    decoders = config.num_decoder_layers
    p = config.pruning
    levels = len(widths) * taught
    ahead = steps_ahead(config, widths)
    inner = heads * config.d_kv
    drop = config.dropout > 0
    w = 2 if bf16 else 4
    reference = p is not None and p.mode == "reference"
    # What dropout drew: a byte, or PyTorch's number on a CPU
    noise = drop * (4 if reference else 1)
    # Of what is not inside a layer
    outer = noise if config.residual_dropout is None else int(config.residual_dropout > 0)

    # Input, scale, normalised; the result, which mixed precision casts for each product that reads
    # it
    def norm(n, readers=1):
        return n * (8 * d + 4 + d * (2 * readers if bf16 else 4))

    # Queries, keys, values in v bytes, result; weights, noise, weights as read
    def explicit(n, m, by_row=False, v=w if drop else 4):
        return inner * (v * (n + 2 * m) + w * n) + heads * n * m * (4 + noise + v * (drop or v < 4))

    # And one number a query; a bias for every row of the batch, its last axis rounded up to 8
    def in_kernel(n, m, by_row):
        return w * inner * 2 * (n + m) + heads * n * (4 + by_row * w * (-(-m // 8) * 8))

    # Of a hidden layer, the result after dropout is all; PyTorch keeps that before and the noise
    dropped, outputs = (1, 3) if config.ffn == "published" else (hidden, 2)

    def layer(n, attention):
        kept = f * (w * hidden + dropped * reference * drop * (noise + w))
        return norm(n, 3) + attention + norm(n) + n * (outputs * d * outer + kept)

    plain = in_kernel if fused and not reference else explicit
    # A CPU's kernel takes no learned bias
    cross = (plain if drop or reference else in_kernel)(levels, kept, padded_after)
    # A mask of one byte; the library's plain attention adds one instead, and keeps none
    masked = padded & ~np.bool_(reference)
    total = slots * d * outer + masked * slots**2  # with the embeddings
    total = total + (p.after_layer - 1 if p is not None else config.num_layers) * layer(
        slots, plain(slots, slots, padded)
    )
    if p is not None:
        later = config.num_layers - p.after_layer
        moved = p.positions == "original" and not reference  # each row its own bias, gathered
        # On a GPU scores are computed once more, and nothing of them is kept
        written_out = p.reduce == "select" and plain is explicit
        total = total + layer(
            slots, explicit(slots, slots, v=w) if written_out else plain(slots, slots, padded)
        )
        total = total + (p.reduce == "select") * 4 * slots * d
        total = (
            total
            + (8 * kept**2 if moved and later else 0)
            + (padded_after & ~np.bool_(reference)) * kept**2
        )
        attention = in_kernel if p.positions == "none" and not drop and not reference else plain
        total = total + later * layer(kept, attention(kept, kept, padded_after | moved))
    # Last norm, read by all cross-attention
    total = total + kept * (8 * d + 4 + d * ((4 * decoders if bf16 else 4) + outer))
    total = total + decoders * (
        layer(levels, plain(levels, levels, False)) + norm(levels) + cross + levels * d * outer
    )
    total = (
        total + norm(levels) + levels * d * (2 * outer + (8 + 2 * w * len(ahead) if ahead else 0))
    )
    return (
        total
        + 4 * taught * (sum(widths) + sum(map(sum, ahead)))
        + _embedded(config, slots + levels)
    )


def _embedded(config, n):
    """Bytes that the levers on embeddings and residuals keep of n tokens."""
    # A byte each
    dropped = (2 * config.num_layers + 1) * bool(config.residual_dropout and config.arch == "qwen")
    return n * config.d_model * (dropped + 4 * config.embedding_norm)


def qwen_activations(config, widths, slots, kept, padded, padded_after, fused, bf16, taught=1):
    """As `activations`, of a decoder-only model. A CPU has a fused kernel for it too, unless
    it drops attention weights.
    """
    d = config.d_model
    f = config.d_ff
    heads = config.num_heads
    dk = config.d_kv
    levels = len(widths)
    p = config.pruning
    w = 2 if bf16 else 4
    drop = config.dropout > 0
    ahead = steps_ahead(config, widths)
    inner = heads * dk
    kv = kv_size(config)

    def norm(n, readers):
        return n * (8 * d + 4 + d * (2 * readers if bf16 else 4))

    # Queries, keys, values, result; one number a query; a mask, and then keys and values for all
    # heads
    def in_kernel(n, masked):
        # A CPU's kernel gets float32 (`cpu_layers.attention`), and its result is read in w bytes
        v = w if fused else 4
        read = w * inner * (v != w)
        return n * (v * (2 * inner + 2 * kv) + read + 4 * heads) + masked * n * (
            v * 2 * (inner - kv) + w * n
        )

    def explicit(n, masked):  # weights, what dropout drew, weights as read
        return 4 * n * w * inner + heads * n * n * (4 + drop + w * (drop or w < 4)) + masked * n * n

    def layer(n, attention):
        rotated = n * ((4 + w) * (inner + kv) + 4 * (heads + kv // dk))  # norms of queries and keys
        return norm(n, 3) + rotated + attention + norm(n, 2) + 4 * n * w * f

    plain = explicit if drop and not fused else in_kernel
    n = slots + levels
    m = kept + levels
    before = p.after_layer if p is not None else config.num_layers
    scores = p is not None and p.reduce == "select"
    total = (before - scores) * layer(n, plain(n, padded))
    if scores:
        total = (
            total + layer(n, explicit(n, padded) if not fused else in_kernel(n, padded)) + 4 * n * d
        )
    total = total + (config.num_layers - before) * layer(m, plain(m, padded_after))
    total = total + 8 * config.d_kv * (n + (m if p is not None else 0))  # rotations
    heads_read = (2 * (1 + len(ahead)) if bf16 else 0) + (8 + 2 * w * len(ahead) if ahead else 0)
    total = total + m * (12 * d + 4) + levels * taught * d * heads_read
    return total + 4 * taught * (sum(widths) + sum(map(sum, ahead))) + _embedded(config, n)


def kv_size(config):
    return (config.num_kv_heads or config.num_heads) * config.d_kv


def steps_ahead(config, widths):
    """Widths of the levels that each of MAP's steps predicts; by tokens, step s has no label for
    the first s levels.
    """
    steps = range(1, config.map.steps + 1) if config.map is not None else ()
    return [widths[s if config.map.unit == "token" else 0 :] for s in steps]
