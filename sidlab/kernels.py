"""Attention centrality without the attention matrix: from queries, keys and the log-sum-exp, in O(N) memory.

Fused attention gives the output and, at best, the log-sum-exp of each query's scores, but no weights. The sum of the weights that a
key receives, RASTP's centrality (arXiv 2511.16943, S_attn; `saliency.attention_centrality`), is

    centrality(k) = Σ_heads Σ_queries exp(score(head, query, k) − lse(head, query))

so `column_sums` computes the scores once more, block by block, and keeps only the sums. Two implementations of each function:

* "triton": a GPU kernel. A program owns a block of keys and loops over the query heads of its key head and over blocks of queries,
  so that nothing is added atomically and the result is the same in every run. With TRITON_INTERPRET=1 in the environment before
  triton is imported it runs on the CPU as well, slowly, for tests.
* "torch": the same in PyTorch, in chunks of queries; what a CPU uses, and a GPU without Triton.

Everything here runs under `no_grad`.
"""

import contextlib

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS and the CPU builds of torch come without it; `choose_backend` says so where it matters
    triton = None


@torch.no_grad()
def column_sums(query: Tensor, key: Tensor, lse: Tensor | None = None, *, scaling: float = 1.0, bias: Tensor | None = None,
                mask: Tensor | None = None, segments: Tensor | None = None, causal: bool = False, backend: str | None = None,
                block: int | None = None) -> Tensor:
    """Softmax weight that every key receives, summed over heads and real queries.

    Args: `query` float [B, H, N, dk] and `key` [B, Hkv, N, dk] of one dtype (float32, bfloat16, float16), head h of the queries meeting
    head h // (H / Hkv) of the keys; `lse` float32 [B, H, N], natural logarithm of each query's softmax denominator under the same bias
    and masks (None: computed, at the price of one more product); `scaling`, factor of query · key (1 in T5, dk^−½ elsewhere); `bias`
    float, added to the scores: [1 or B, H, N, N], or [H, 2N − 1] by distance, entry N − 1 + key − query, which is all that T5's
    position bias is; `mask` [B, N], 1 real, 0 padding; `segments` int [B, N], which sequence of a packed
    row a token belongs to; `causal`: queries see keys up to their own position; `backend`: "triton" or "torch"
    (None: Triton where it runs, on a GPU or interpreted); `block`: queries a chunk or tile, a power of 2 from 16 for Triton.
    Returns float32 [B, N], 0 at padding. Raises ValueError on shapes, dtypes or names that do not fit, RuntimeError where `backend`
    cannot run.
    """
    _check(query, key, bias, {"mask": mask, "segments": segments})
    if lse is not None and (lse.shape != query.shape[:3] or lse.dtype != torch.float32):
        raise ValueError(f"lse must be float32 {list(query.shape[:3])} ([B, H, N]), got {lse.dtype} {list(lse.shape)}")
    shared = dict(bias=bias, mask=mask, segments=segments, scaling=float(scaling), causal=causal, block=block)
    if lse is None:
        lse = log_sum_exp(query, key, backend=backend, **shared)
    if choose_backend(backend, query.device) == "triton":
        return _launch(query, key, lse, **shared)
    sums = query.new_zeros(query.shape[0], query.shape[2], dtype=torch.float32)
    lse = lse.masked_fill(lse == -torch.inf, 0).unflatten(1, (key.shape[1], -1))  # a query without keys gives nobody anything
    with torch.autocast(query.device.type, enabled=False):
        for rows, scores in _chunks(query, key, **shared):
            weights = torch.exp(scores - lse[..., rows, None])  # [B, Hkv, H/Hkv, chunk, N]
            if mask is not None:
                weights = weights.masked_fill(mask[:, None, None, rows, None] == 0, 0)
            sums += weights.sum((1, 2, 3))
    return sums


def by_distance(bias: Tensor) -> Tensor:
    """[1, H, N, N], a bias that depends on key − query alone, as T5's → [H, 2N − 1], entry N − 1 + key − query: its first row and column
    hold all there is."""
    return torch.cat([bias[0, :, 1:, 0].flip(1), bias[0, :, 0]], dim=1)


@torch.no_grad()
def log_sum_exp(query: Tensor, key: Tensor, *, scaling: float = 1.0, bias: Tensor | None = None, mask: Tensor | None = None,
                segments: Tensor | None = None, causal: bool = False, backend: str | None = None, block: int | None = None) -> Tensor:
    """Logarithm of each query's softmax denominator: float32 [B, H, N], −inf for a query without keys. Arguments and errors as in
    `column_sums`; for attention kernels that do not return it."""
    _check(query, key, bias, {"mask": mask, "segments": segments})
    shared = dict(bias=bias, mask=mask, segments=segments, scaling=float(scaling), causal=causal, block=block)
    if choose_backend(backend, query.device) == "triton":
        return _launch(query, key, None, **shared)
    with torch.autocast(query.device.type, enabled=False):
        return torch.cat([scores.logsumexp(-1).flatten(1, 2) for _, scores in _chunks(query, key, **shared)], dim=2)


def _check(query, key, bias, masks):
    if query.ndim != 4 or key.ndim != 4 or key.shape[::2] + key.shape[3:] != query.shape[::2] + query.shape[3:] \
            or 0 in (*query.shape, *key.shape) or query.shape[1] % key.shape[1]:
        raise ValueError("query and key must be [B, H, N, dk] and [B, Hkv, N, dk] with H a multiple of Hkv and nothing empty, got "
                         f"{list(query.shape)} and {list(key.shape)}")
    if query.dtype != key.dtype or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"query and key must both be float32, bfloat16 or float16, got {query.dtype} and {key.dtype}")
    batch, heads, length, _ = query.shape
    if bias is not None and list(bias.shape) not in ([1, heads, length, length], [batch, heads, length, length], [heads, 2 * length - 1]):
        raise ValueError(f"bias must be [1 or {batch}, {heads}, {length}, {length}] or, by distance, [{heads}, {2 * length - 1}], "
                         f"got {list(bias.shape)}")
    for name, value in masks.items():
        if value is not None and value.shape != (batch, length):
            raise ValueError(f"{name} must be [B, N] = {[batch, length]}, got {list(value.shape)}")


@torch.compiler.assume_constant_result
def choose_backend(backend: str | None, device: torch.device) -> str:
    """"triton" or "torch": what `column_sums` runs on `device` when asked for `backend`. Raises ValueError for an unknown name,
    RuntimeError for one that cannot run."""
    if backend not in (None, "triton", "torch"):
        raise ValueError(f'backend={backend!r} is unknown; use "triton", "torch" or None')
    runs = triton is not None and (device.type == "cuda" or triton.knobs.runtime.interpret)
    if backend == "triton" and not runs:
        missing = "Triton is not installed (pip install triton)" if triton is None else \
            "it needs a CUDA tensor, or TRITON_INTERPRET=1 in the environment before it is imported"
        raise RuntimeError(f'backend="triton" cannot run on {device}: {missing}')
    return backend or ("triton" if runs else "torch")


def _chunks(query, key, *, bias, mask, segments, scaling, causal, block):
    """For each chunk of queries: its slice and its scores float32 [B, Hkv, H/Hkv, chunk, N], −inf where a query may not look."""
    length, groups = query.shape[2], key.shape[1]
    at = torch.arange(length, device=query.device)
    query = query.unflatten(1, (groups, -1)).float()  # [B, Hkv, H/Hkv, N, dk]
    key = key.unsqueeze(2).float().mT  # [B, Hkv, 1, dk, N]
    for start in range(0, length, block or 128):
        rows = slice(start, start + (block or 128))
        scores = query[:, :, :, rows] @ key * scaling
        if bias is not None:
            by_pair = bias[None, :, length - 1 + at - at[rows, None]] if bias.ndim == 2 else bias[:, :, rows]  # [1 or B, H, chunk, N]
            scores = scores + by_pair.unflatten(1, (groups, -1))
        hidden = torch.zeros(1, len(at[rows]), length, dtype=torch.bool, device=query.device)
        if mask is not None:
            hidden = hidden | (mask[:, None] == 0)
        if segments is not None:
            hidden = hidden | (segments[:, rows, None] != segments[:, None])
        if causal:
            hidden = hidden | (at[rows, None] < at)
        yield rows, scores.masked_fill(hidden[:, None, None], -torch.inf)


@torch.library.custom_op("sidlab::column_sums", mutates_args=())  # one opaque node for torch.compile and CUDA graphs
def _launch(query: Tensor, key: Tensor, lse: Tensor | None, bias: Tensor | None, mask: Tensor | None, segments: Tensor | None, *,
             scaling: float, causal: bool, block: int | None) -> Tensor:
    """The kernel of `column_sums` or, where `lse` is None, of `log_sum_exp`."""
    batch, heads, length, width = query.shape
    padded = max(16, triton.next_power_of_2(width))
    # Tiles of 16 KB at most (up to 256 numbers of 4 bytes a head): few enough for the shared memory of any GPU.
    block = block or min(64, max(16, 2**14 // (padded * query.element_size())))
    if query.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        query, key = query.float(), key.float()  # NumPy, on which the interpreter builds, has no bfloat16
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    if bias is None:
        bias_strides, origin = (0, 0, 0, 0), 0
    elif bias.ndim == 2:  # neighbours along the keys, and backwards along the queries
        bias_strides, origin = (0, bias.stride(0), -bias.stride(1), bias.stride(1)), (length - 1) * bias.stride(1)
    else:
        bias_strides, origin = (bias.stride(0) * (bias.shape[0] > 1), *bias.stride()[1:]), 0
    # As products elsewhere, so that both see the same scores
    exact = query.dtype != torch.float32 or not _tf32()
    result = query.new_empty((batch, heads, length) if lse is None else (batch, key.shape[1], length), dtype=torch.float32)
    arguments = (query, key, result if lse is None else lse.contiguous(), bias, mask, segments, *query.stride()[:3], *key.stride()[:3],
                 *bias_strides, origin, *_strides(mask), *_strides(segments), length, scaling)
    options = dict(GROUP=heads // key.shape[1], CAUSAL=causal, WIDTH=width, BLOCK=block, BLOCK_WIDTH=padded,
                   PRECISION="ieee" if exact else "tf32", num_stages=2)
    blocks = triton.cdiv(length, block)
    with torch.cuda.device(query.device) if query.device.type == "cuda" else contextlib.nullcontext():
        if lse is None:
            _log_sum_exp_kernel[(blocks, heads, batch)](*arguments, **options)
            return result
        _column_sums_kernel[(blocks, key.shape[1], batch)](*arguments, result, **options)
        return result.sum(1)


@_launch.register_fake
def _(query, key, lse, *others, **options):
    shape = query.shape[:3] if lse is None else (query.shape[0], query.shape[2])
    return query.new_empty(shape, dtype=torch.float32)


def _tf32():
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by the newer switches, of which the older question wants to know nothing
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _strides(flags):
    return (0, 0) if flags is None else flags.stride()


if triton is not None:
    # The interpreter is slow to enter a function of ours, so there is only this one below the two kernels.

    @triton.jit
    def _scores(query, key, bias, bias_q, bias_k, mask, mask_n, segments, segment_n, q_at, k_at, length, scaling,
                CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
        """Scores float32 [queries, keys] of one pair of tiles, −inf where a query may not look or does not exist."""
        seen = (q_at[:, None] < length) & (k_at[None, :] < length)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scaling
        if bias is not None:
            scores += tl.load(bias + q_at[:, None] * bias_q + k_at[None, :] * bias_k, mask=seen, other=0.0).to(tl.float32)
        if mask is not None:
            seen = seen & (tl.load(mask + k_at * mask_n, mask=k_at < length, other=0) != 0)[None, :]
        if segments is not None:
            q_segment = tl.load(segments + q_at * segment_n, mask=q_at < length, other=0)
            k_segment = tl.load(segments + k_at * segment_n, mask=k_at < length, other=0)
            seen = seen & (q_segment[:, None] == k_segment[None, :])
        if CAUSAL:
            seen = seen & (q_at[:, None] >= k_at[None, :])
        return tl.where(seen, scores, float("-inf"))

    @triton.jit
    def _column_sums_kernel(query, key, lse, bias, mask, segments, query_b, query_h, query_n, key_b, key_h, key_n, bias_b, bias_h,
                            bias_q, bias_k, origin, mask_b, mask_n, segment_b, segment_n, length, scaling, received,
                            GROUP: tl.constexpr, CAUSAL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                            BLOCK_WIDTH: tl.constexpr, PRECISION: tl.constexpr):
        start, key_head, batch = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        k_at, column = start + tl.arange(0, BLOCK), tl.arange(0, BLOCK_WIDTH)[None, :]
        keys = tl.load(key + batch * key_b + key_head * key_h + k_at[:, None] * key_n + column,
                       mask=(k_at[:, None] < length) & (column < WIDTH), other=0.0)
        if mask is not None:
            mask += batch * mask_b
        if segments is not None:
            segments += batch * segment_b
            k_segment = tl.load(segments + tl.minimum(k_at, length - 1) * segment_n)
        bias_head = bias
        sums = tl.zeros([BLOCK], tl.float32)
        for member in range(GROUP):
            head = key_head * GROUP + member
            query_head = query + batch * query_b + head * query_h
            lse_head = lse + (batch * (tl.num_programs(1) * GROUP) + head) * length
            if bias is not None:
                bias_head = bias + origin + batch * bias_b + head * bias_h
            for q_start in range(start if CAUSAL else 0, length, BLOCK):
                q_at = q_start + tl.arange(0, BLOCK)
                meet = True
                if segments is not None:  # where the ranges of segments are disjoint there is nothing to do: most of a long packed row
                    q_segment = tl.load(segments + tl.minimum(q_at, length - 1) * segment_n)
                    meet = (tl.max(q_segment, 0) >= tl.min(k_segment, 0)) & (tl.min(q_segment, 0) <= tl.max(k_segment, 0))
                if meet:
                    counts = q_at < length
                    row = tl.load(lse_head + q_at, mask=counts, other=0.0)
                    row = tl.where(row > float("-inf"), row, 0.0)  # a query without keys gives nobody anything
                    if mask is not None:
                        counts = counts & (tl.load(mask + q_at * mask_n, mask=counts, other=0) != 0)
                    queries = tl.load(query_head + q_at[:, None] * query_n + column,
                                      mask=(q_at[:, None] < length) & (column < WIDTH), other=0.0)
                    scores = _scores(queries, keys, bias_head, bias_q, bias_k, mask, mask_n, segments, segment_n, q_at, k_at, length,
                                     scaling, CAUSAL, PRECISION)
                    sums += tl.sum(tl.where(counts[:, None], tl.exp(scores - row[:, None]), 0.0), 0)
        tl.store(received + (batch * tl.num_programs(1) + key_head) * length + k_at, sums, mask=k_at < length)

    @triton.jit
    def _log_sum_exp_kernel(query, key, lse, bias, mask, segments, query_b, query_h, query_n, key_b, key_h, key_n, bias_b, bias_h,
                            bias_q, bias_k, origin, mask_b, mask_n, segment_b, segment_n, length, scaling, GROUP: tl.constexpr,
                            CAUSAL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
                            PRECISION: tl.constexpr):
        start, head, batch = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        q_at, column = start + tl.arange(0, BLOCK), tl.arange(0, BLOCK_WIDTH)[None, :]
        queries = tl.load(query + batch * query_b + head * query_h + q_at[:, None] * query_n + column,
                          mask=(q_at[:, None] < length) & (column < WIDTH), other=0.0)
        key_head = key + batch * key_b + (head // GROUP) * key_h
        if mask is not None:
            mask += batch * mask_b
        if segments is not None:
            segments += batch * segment_b
            q_segment = tl.load(segments + tl.minimum(q_at, length - 1) * segment_n)
        if bias is not None:
            bias += origin + batch * bias_b + head * bias_h
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for k_start in range(0, tl.minimum(start + BLOCK, length) if CAUSAL else length, BLOCK):
            k_at = k_start + tl.arange(0, BLOCK)
            meet = True
            if segments is not None:
                k_segment = tl.load(segments + tl.minimum(k_at, length - 1) * segment_n)
                meet = (tl.max(q_segment, 0) >= tl.min(k_segment, 0)) & (tl.min(q_segment, 0) <= tl.max(k_segment, 0))
            if meet:
                keys = tl.load(key_head + k_at[:, None] * key_n + column, mask=(k_at[:, None] < length) & (column < WIDTH), other=0.0)
                scores = _scores(queries, keys, bias, bias_q, bias_k, mask, mask_n, segments, segment_n, q_at, k_at, length, scaling,
                                 CAUSAL, PRECISION)
                # Running maximum and sum; a row that has seen no key yet has neither, and −inf − (−inf) would be NaN
                above = tl.maximum(highest, tl.max(scores, 1))
                level = tl.where(above > float("-inf"), above, 0.0)
                total = total * tl.exp(highest - level) + tl.sum(tl.exp(scores - level[:, None]), 1)
                highest = above
        result = tl.where(total > 0, highest + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(lse + (batch * tl.num_programs(1) + head) * length + q_at, result, mask=q_at < length)
