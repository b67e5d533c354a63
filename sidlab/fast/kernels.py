"""Attention centrality without the attention matrix: from queries and keys, in O(N) memory.

Fused attention gives the output and no weights. The sum of the weights that a key receives, RASTP's
centrality (arXiv 2511.16943, S_attn; `saliency.attention_centrality`), is

    centrality(k) = Σ_heads Σ_queries exp(score(head, query, k) − lse(head, query))

with lse the logarithm of the query's softmax denominator. So `column_sums` computes the scores once
more, block by block, and keeps only the sums. Two implementations:

* "triton": two GPU kernels, the first for lse. In the second a program owns a block of keys and
  loops over the query heads of its key head and over blocks of queries, so that nothing is added
  atomically and the result is the same in every run. With TRITON_INTERPRET=1 in the environment
  before triton is imported they run on the CPU as well, slowly, for tests.
* "torch": the same in PyTorch, in chunks of queries; what a CPU uses, and a GPU without Triton.

Everything here runs under `no_grad`.
"""

import contextlib

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
# Windows, macOS and the CPU builds of torch come without it; `choose_backend` says so where it
# matters
except ImportError:
    triton = None


@torch.no_grad()
def column_sums(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    backend: str | None = None,
    block: int | None = None,
) -> Tensor:
    """Softmax weight that every key receives, summed over heads and real queries.

    Args: `query` float [B, H, N, dk] and `key` [B, Hkv, N, dk] of one dtype (float32, bfloat16,
    float16), head h of the queries meeting head h // (H / Hkv) of the keys; `scaling`, factor of
    query · key (1 in T5, dk^−½ elsewhere); `bias` float [H, 2N − 1], added to the scores by
    distance, entry N − 1 + key − query, which is all that T5's position bias is; `mask` [B, N], 1
    real, 0 padding; `causal`: queries see keys up to their own position; `backend`: "triton" or
    "torch" (None: Triton where it runs, on a GPU or interpreted); `block`: queries a chunk or tile,
    a power of 2 from 16 for Triton. Returns float32 [B, N], 0 at padding. Raises ValueError on
    shapes, dtypes or names that do not fit, RuntimeError where `backend` cannot run.
    """
    if (
        query.ndim != 4
        or key.ndim != 4
        or key.shape[::2] + key.shape[3:] != query.shape[::2] + query.shape[3:]
        or 0 in (*query.shape, *key.shape)
        or query.shape[1] % key.shape[1]
    ):
        raise ValueError(
            "query and key must be [B, H, N, dk] and [B, Hkv, N, dk] with H a multiple of Hkv and"
            f" nothing empty, got {list(query.shape)} and {list(key.shape)}"
        )
    if query.dtype != key.dtype or query.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        raise ValueError(
            f"query and key must both be float32, bfloat16 or float16, got {query.dtype} and"
            f" {key.dtype}"
        )
    batch, heads, length, _ = query.shape
    for name, value, shape in (
        ("bias", bias, (heads, 2 * length - 1)),
        ("mask", mask, (batch, length)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(value.shape)}")
    if choose_backend(backend, query.device) == "triton":
        return _launch(query, key, bias, mask, scaling=float(scaling), causal=causal, block=block)
    at = torch.arange(length, device=query.device)
    chunk = block or 128
    groups = key.shape[1]
    sums = query.new_zeros(batch, length, dtype=torch.float32)
    query = query.unflatten(1, (groups, -1)).float()
    key = key.unsqueeze(2).float().mT  # [B, Hkv, H/Hkv, N, dk], [B, Hkv, 1, dk, N]
    with torch.autocast(query.device.type, enabled=False):
        for rows in at.split(chunk):
            scores = query[:, :, :, rows] @ key * scaling  # [B, Hkv, H/Hkv, chunk, N]
            if bias is not None:
                scores = scores + bias[:, length - 1 + at - rows[:, None]].unflatten(
                    0, (groups, -1)
                )
            seen = torch.ones(len(rows), length, dtype=torch.bool, device=query.device)
            if causal:
                seen = rows[:, None] >= at
            if mask is not None:
                seen = (
                    seen
                    & (mask != 0)[:, None, None, None]
                    & (mask[:, rows] != 0)[:, None, None, :, None]
                )
            # A query without keys, and one that is padding, gives nobody anything.
            sums += scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0).sum((1, 2, 3))
    return sums


def by_distance(bias: Tensor) -> Tensor:
    """[1, H, N, N], a bias that depends on key − query alone, as T5's → [H, 2N − 1], entry N − 1 +
    key − query: its first row and column hold all there is.
    """
    return torch.cat([bias[0, :, 1:, 0].flip(1), bias[0, :, 0]], dim=1)


@torch.compiler.assume_constant_result
def choose_backend(backend: str | None, device: torch.device) -> str:
    """ "triton" or "torch": what `column_sums` runs on `device` when asked for `backend`. Raises
    ValueError for an unknown name, RuntimeError for one that cannot run.
    """
    if backend not in (None, "triton", "torch"):
        raise ValueError(f'backend={backend!r} is unknown; use "triton", "torch" or None')
    runs = triton is not None and (device.type == "cuda" or triton.knobs.runtime.interpret)
    if backend == "triton" and not runs:
        missing = (
            "Triton is not installed (pip install triton)"
            if triton is None
            else (
                "it needs a CUDA tensor, or TRITON_INTERPRET=1 in the environment before it is"
                " imported"
            )
        )
        raise RuntimeError(f'backend="triton" cannot run on {device}: {missing}')
    return backend or ("triton" if runs else "torch")


# One opaque node for torch.compile and CUDA graphs
@torch.library.custom_op("sidlab::column_sums", mutates_args=())
def _launch(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *,
    scaling: float,
    causal: bool,
    block: int | None,
) -> Tensor:
    batch, heads, length, width = query.shape
    padded = max(16, triton.next_power_of_2(width))
    # Tiles of 16 KB at most (up to 256 numbers of 4 bytes a head): few enough for the shared memory
    # of any GPU.
    block = block or min(64, max(16, 2**14 // (padded * query.element_size())))
    if query.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        query = query.float()
        key = key.float()  # NumPy, on which the interpreter builds, has no bfloat16
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    bias = None if bias is None else bias.contiguous()
    # As products elsewhere, so that both see the same scores
    exact = query.dtype != torch.float32 or not _tf32()
    lse, sums = (
        query.new_empty(batch, n, length, dtype=torch.float32) for n in (heads, key.shape[1])
    )
    arguments = (
        query,
        key,
        lse,
        bias,
        mask,
        *query.stride()[:3],
        *key.stride()[:3],
        *((0, 0) if mask is None else mask.stride()),
        length,
        scaling,
    )
    options = dict(
        GROUP=heads // key.shape[1],
        CAUSAL=causal,
        WIDTH=width,
        BLOCK=block,
        BLOCK_WIDTH=padded,
        PRECISION="ieee" if exact else "tf32",
        num_stages=2,
    )
    blocks = triton.cdiv(length, block)
    with (
        torch.cuda.device(query.device) if query.device.type == "cuda" else contextlib.nullcontext()
    ):
        _log_sum_exp_kernel[(blocks, heads, batch)](*arguments, **options)
        _column_sums_kernel[(blocks, key.shape[1], batch)](*arguments, sums, **options)
    return sums.sum(1)


def _tf32():
    try:
        return torch.get_float32_matmul_precision() != "highest"
    # Set by the newer switches, of which the older question wants to know nothing
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


@_launch.register_fake
def _(query, *others, **options):
    return query.new_empty((query.shape[0], query.shape[2]), dtype=torch.float32)


if triton is not None:
    # The interpreter is slow to enter a function of ours, so there is only this one below the two
    # kernels.

    @triton.jit
    def _scores(
        query,
        key,
        bias,
        mask,
        mask_n,
        q_at,
        k_at,
        length,
        scaling,
        CAUSAL: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Scores float32 [queries, keys] of one pair of tiles, −inf where a query may not look or
        does not exist.
        """
        seen = (q_at[:, None] < length) & (k_at[None, :] < length)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scaling
        if bias is not None:
            scores += tl.load(
                bias + length - 1 + k_at[None, :] - q_at[:, None], mask=seen, other=0.0
            ).to(tl.float32)
        if mask is not None:
            seen = seen & (tl.load(mask + k_at * mask_n, mask=k_at < length, other=0) != 0)[None, :]
        if CAUSAL:
            seen = seen & (q_at[:, None] >= k_at[None, :])
        return tl.where(seen, scores, float("-inf"))

    @triton.jit
    def _column_sums_kernel(
        query,
        key,
        lse,
        bias,
        mask,
        query_b,
        query_h,
        query_n,
        key_b,
        key_h,
        key_n,
        mask_b,
        mask_n,
        length,
        scaling,
        received,
        GROUP: tl.constexpr,
        CAUSAL: tl.constexpr,
        WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        start = tl.program_id(0) * BLOCK
        key_head = tl.program_id(1).to(tl.int64)
        batch = tl.program_id(2).to(tl.int64)
        k_at = start + tl.arange(0, BLOCK)
        column = tl.arange(0, BLOCK_WIDTH)[None, :]
        keys = tl.load(
            key + batch * key_b + key_head * key_h + k_at[:, None] * key_n + column,
            mask=(k_at[:, None] < length) & (column < WIDTH),
            other=0.0,
        )
        if mask is not None:
            mask += batch * mask_b
        bias_head = bias
        sums = tl.zeros([BLOCK], tl.float32)
        for member in range(GROUP):
            head = key_head * GROUP + member
            query_head = query + batch * query_b + head * query_h
            lse_head = lse + (batch * (tl.num_programs(1) * GROUP) + head) * length
            if bias is not None:
                bias_head = bias + head * (2 * length - 1)
            for q_start in range(start if CAUSAL else 0, length, BLOCK):
                q_at = q_start + tl.arange(0, BLOCK)
                counts = q_at < length
                row = tl.load(lse_head + q_at, mask=counts, other=0.0)
                # A query without keys gives nobody anything
                row = tl.where(row > float("-inf"), row, 0.0)
                if mask is not None:
                    counts = counts & (tl.load(mask + q_at * mask_n, mask=counts, other=0) != 0)
                queries = tl.load(
                    query_head + q_at[:, None] * query_n + column,
                    mask=(q_at[:, None] < length) & (column < WIDTH),
                    other=0.0,
                )
                scores = _scores(
                    queries,
                    keys,
                    bias_head,
                    mask,
                    mask_n,
                    q_at,
                    k_at,
                    length,
                    scaling,
                    CAUSAL,
                    PRECISION,
                )
                sums += tl.sum(tl.where(counts[:, None], tl.exp(scores - row[:, None]), 0.0), 0)
        tl.store(
            received + (batch * tl.num_programs(1) + key_head) * length + k_at,
            sums,
            mask=k_at < length,
        )

    @triton.jit
    def _log_sum_exp_kernel(
        query,
        key,
        lse,
        bias,
        mask,
        query_b,
        query_h,
        query_n,
        key_b,
        key_h,
        key_n,
        mask_b,
        mask_n,
        length,
        scaling,
        GROUP: tl.constexpr,
        CAUSAL: tl.constexpr,
        WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        start = tl.program_id(0) * BLOCK
        head = tl.program_id(1).to(tl.int64)
        batch = tl.program_id(2).to(tl.int64)
        q_at = start + tl.arange(0, BLOCK)
        column = tl.arange(0, BLOCK_WIDTH)[None, :]
        queries = tl.load(
            query + batch * query_b + head * query_h + q_at[:, None] * query_n + column,
            mask=(q_at[:, None] < length) & (column < WIDTH),
            other=0.0,
        )
        key_head = key + batch * key_b + (head // GROUP) * key_h
        if mask is not None:
            mask += batch * mask_b
        if bias is not None:
            bias += head * (2 * length - 1)
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for k_start in range(0, tl.minimum(start + BLOCK, length) if CAUSAL else length, BLOCK):
            k_at = k_start + tl.arange(0, BLOCK)
            keys = tl.load(
                key_head + k_at[:, None] * key_n + column,
                mask=(k_at[:, None] < length) & (column < WIDTH),
                other=0.0,
            )
            scores = _scores(
                queries, keys, bias, mask, mask_n, q_at, k_at, length, scaling, CAUSAL, PRECISION
            )
            # Running maximum and sum; a row that has seen no key yet has neither, and −inf − (−inf)
            # would be NaN
            above = tl.maximum(highest, tl.max(scores, 1))
            level = tl.where(above > float("-inf"), above, 0.0)
            total = total * tl.exp(highest - level) + tl.sum(tl.exp(scores - level[:, None]), 1)
            highest = above
        result = tl.where(
            total > 0, highest + tl.log(tl.where(total > 0, total, 1.0)), float("-inf")
        )
        tl.store(
            lse + (batch * tl.num_programs(1) + head) * length + q_at, result, mask=q_at < length
        )
