"""Column sums without the attention matrix: kernel and chunks against the direct softmax in
float64, and the models that use them.

Where there is a GPU the kernel is compiled and runs on it (`pytest -m gpu` runs just that);
elsewhere Triton interprets it (conftest.py) and `test_the_kernels_compile_for_a_gpu` takes it as
far as machine code.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import CUDA, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_t5 import CLOSE, HISTORIES, LABELS, batch, build, gradients
from torch.utils._python_dispatch import TorchDispatchMode

from sidlab.decoding import recommend
from sidlab.fast import kernels, scored_attention
from sidlab.pruning import PruningConfig
from sidlab.saliency import attention_centrality

DEVICE = "cuda" if CUDA else "cpu"
compiled = pytest.mark.gpu if CUDA else (lambda test: test)
NEAR = {"rtol": 1e-4, "atol": 1e-4}  # of float64 on the same rounded inputs, so for every dtype


def oracle(query, key, *, scaling=1.0, bias=None, mask=None, causal=False):
    """Column sums, float64, of the whole softmax matrix."""
    batch_size, heads, length, _ = query.shape
    scores = query.double() @ key.double().repeat_interleave(heads // key.shape[1], 1).mT * scaling
    at = torch.arange(length, device=query.device)
    if bias is not None:
        scores = scores + bias[:, length - 1 + at[None] - at[:, None]].double()
    seen = torch.ones(batch_size, 1, length, length, dtype=torch.bool, device=query.device)
    if mask is not None:
        seen = seen & (mask != 0)[:, None, None]
    if causal:
        seen = seen & (at[:, None] >= at)
    # NaN: a query without keys
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    if mask is not None:
        weights = weights * (mask != 0)[:, None, :, None]
    return weights.sum((1, 2))


@st.composite
def cases(draw, longest):
    """(query, key, options) of every shape, layout, dtype and mask."""
    rows = draw(st.integers(1, 2))
    groups = draw(st.integers(1, 2))
    members = draw(st.integers(1, 3))
    heads = groups * members
    length = draw(st.integers(1, longest))
    width = draw(st.sampled_from((1, 8, 20)))
    draws = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(shape, generator=draws)

    def flags(dtype):
        return (torch.rand(rows, length, generator=draws) < draw(st.sampled_from((0, 0.6, 1)))).to(
            dtype
        )

    query = normal(rows, length, heads, width).transpose(1, 2)
    key = normal(rows, groups, length, width)
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    options = {
        "scaling": draw(st.sampled_from((1, 0.3))),
        "bias": 3 * normal(heads, 2 * length - 1) if draw(st.booleans()) else None,
        "mask": flags(torch.long) if draw(st.booleans()) else None,
        "causal": draw(st.booleans()),
    }
    return (
        query.to(DEVICE, dtype),
        key.to(DEVICE, dtype),
        {
            name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
            for name, value in options.items()
        },
    )


def assert_right(case, backend, block):
    query, key, options = case
    found = kernels.column_sums(query, key, backend=backend, block=block, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), oracle(query, key, **options), **NEAR)


@settings(max_examples=80)
@given(cases(longest=30), st.sampled_from((1, 7, 16, None)))
def test_chunks_equal_the_whole_matrix(case, block):
    assert_right(case, "torch", block)


@compiled
@settings(max_examples=200 if CUDA else 12)
@given(cases(longest=200 if CUDA else 35))
def test_the_kernel_equals_the_whole_matrix(case):
    assert_right(case, "triton", 16)


@compiled
def test_the_kernel_with_everything_at_once():
    query = tensors(2, 6, 35, 20)[0]
    key = tensors(2, 2, 35, 20)[1]
    ones = torch.ones(2, 35, dtype=torch.long, device=DEVICE)
    mask = ones.clone()
    mask[0, :3] = 0
    mask[1, 20:] = 0
    options = {"bias": tensors(6, 69, count=1)[0], "mask": mask, "causal": True, "scaling": 0.2}
    assert_right((query, key.mT.contiguous().mT, options), "triton", 16)


@pytest.fixture(params=["torch", pytest.param("triton", marks=[pytest.mark.gpu] if CUDA else [])])
def backend(request):
    return request.param


def tensors(*shape, count=2, seed=0):
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_it_is_the_centrality_of_the_plain_path(backend):
    query, key = tensors(3, 2, 20, 8)
    by_distance = tensors(2, 39, count=1)[0]
    mask = torch.ones(3, 20, dtype=torch.long, device=DEVICE)
    mask[0, 12:] = 0
    mask[1, :5] = 0
    mask[2] = 0  # right padding, left padding, nothing else
    at = torch.arange(20, device=DEVICE)
    bias = by_distance[None, :, 19 + at - at[:, None]]  # [1, H, N, N], as T5 has it
    assert torch.equal(kernels.by_distance(bias), by_distance)
    weights = (
        (query @ key.mT + bias)
        .masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
        .softmax(-1)
    )
    expected = attention_centrality(weights, mask)
    found = kernels.column_sums(query, key, bias=by_distance, mask=mask, backend=backend)
    torch.testing.assert_close(found, expected, **NEAR)
    assert (found[mask == 0] == 0).all() and found[2].eq(0).all()
    # Every real query has one vote a head
    torch.testing.assert_close(found.sum(1), 2.0 * mask.sum(1), **NEAR)

    for strange in (torch.nan, torch.inf):  # padded queries do not count, whatever stands in them
        queries = query.masked_fill(mask[:, None, :, None] == 0, strange)
        torch.testing.assert_close(
            kernels.column_sums(queries, key, bias=by_distance, mask=mask, backend=backend),
            expected,
            **NEAR,
        )


def test_tf32_may_be_switched_on_by_either_switch():
    query, key = tensors(1, 2, 20, 8)
    expected = kernels.column_sums(query, key, backend="triton")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert kernels._tf32()
        torch.testing.assert_close(
            kernels.column_sums(query, key, backend="triton"), expected, rtol=1e-2, atol=1e-2
        )
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert not kernels._tf32()
    torch.set_float32_matmul_precision("high")
    assert kernels._tf32()
    torch.set_float32_matmul_precision("highest")


def test_it_repeats_and_leaves_gradients_and_autocast_alone(backend):
    query, key = (x.requires_grad_() for x in tensors(2, 2, 20, 8))
    bias = tensors(2, 39, count=1)[0].requires_grad_()
    found = kernels.column_sums(query, key, bias=bias, backend=backend)
    assert not found.requires_grad
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(kernels.column_sums(query, key, bias=bias, backend=backend), found)


def test_chunks_need_memory_for_a_chunk_only():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **kwargs or {})
            largest = max(
                [
                    largest,
                    *(
                        x.numel()
                        for x in torch.utils._pytree.tree_leaves(made)
                        if isinstance(x, torch.Tensor)
                    ),
                ]
            )
            return made

    query, key = tensors(2, 3, 256, 4)
    with Watch():
        kernels.column_sums(
            query, key, bias=tensors(3, 511, count=1)[0], causal=True, backend="torch", block=8
        )
    assert 0 < largest <= 2 * 3 * 8 * 256


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": torch.zeros(2, 3, 10, 8)}, r"H a multiple of Hkv"),
        ({"key": torch.zeros(2, 2, 9, 8)}, r"\[B, Hkv, N, dk\]"),
        ({"query": torch.zeros(2, 2, 0, 8), "key": torch.zeros(2, 2, 0, 8)}, "nothing empty"),
        ({"key": torch.zeros(2, 2, 10, 8, dtype=torch.float64)}, "float64"),
        ({"bias": torch.zeros(2, 10, 10)}, r"bias must be \[2, 19\], got \[2, 10, 10\]"),
        ({"mask": torch.ones(2, 9)}, r"mask must be \[2, 10\], got \[2, 9\]"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        kernels.column_sums(
            **{"query": torch.zeros(2, 2, 10, 8), "key": torch.zeros(2, 2, 10, 8)} | change
        )


def test_without_triton_chunks_are_used_and_the_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "triton", None)
    query, key = tensors(1, 2, 5, 8)
    torch.testing.assert_close(kernels.column_sums(query, key).double(), oracle(query, key), **NEAR)
    with pytest.raises(RuntimeError, match="not installed"):
        kernels.column_sums(query, key, backend="triton")


def test_the_kernels_compile_for_a_gpu(tmp_path):
    code = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sidlab.fast import kernels

made = []
for number, width, block, everything, chip in (
    ("bf16", 64, 64, True, 80),
    ("fp32", 256, 16, False, 90),
):
    types = dict.fromkeys(("query", "key"), "*" + number) | {"mask": "*i64"}
    types |= dict.fromkeys(("lse", "bias", "received"), "*fp32") | {"scaling": "fp32"}
    fixed = dict(GROUP=2, CAUSAL=everything, PRECISION="ieee")
    fixed |= dict(WIDTH=width - 3, BLOCK=block, BLOCK_WIDTH=width)
    fixed |= {} if everything else dict.fromkeys(("bias", "mask"))
    for kernel in (kernels._column_sums_kernel, kernels._log_sum_exp_kernel):
        names = kernel.arg_names
        signature = {
            name: "constexpr" if name in fixed else types.get(name, "i32") for name in names
        }
        constants = {
            (names.index(name),): value for name, value in fixed.items() if name in names
        }
        source = ASTSource(kernel, signature, constants)
        target = GPUTarget("cuda", chip, 32)
        binary = triton.compile(source, target=target, options={"num_stages": 2})
        made.append([len(binary.asm["cubin"]), binary.metadata.shared])
print(json.dumps(made))
"""
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    } | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout)
    assert len(made) == 4
    for size, shared in made:
        assert size > 0 and shared <= 48 * 1024  # what every GPU grants without being asked


# --- the models


def model_with(path, **changes):
    model = build(PruningConfig(), **changes)
    model.encoder.scoring_path = path
    return model


@pytest.mark.parametrize("layout", [{"extra": 3}, {"side": "left"}])
def test_the_fused_path_keeps_the_same_tokens_and_gives_the_same_logits(layout):
    inputs = batch(**layout)
    inputs["input_ids"][2] = 0
    inputs["attention_mask"][2] = 0  # a row of nothing but padding
    plain = model_with("plain")
    fused = model_with("sdpa")
    with torch.no_grad():
        expected = plain.encoder(**inputs)
        found = fused.encoder(**inputs)
        torch.testing.assert_close(found.centrality, expected.centrality, **CLOSE)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, **CLOSE)
        assert torch.equal(found.positions, expected.positions) and torch.equal(
            found.attention_mask, expected.attention_mask
        )
        expected = plain(**inputs, labels=LABELS)
        found = fused(**inputs, labels=LABELS)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    for one, other in zip(
        recommend(fused, HISTORIES, k=5), recommend(plain, HISTORIES, k=5), strict=True
    ):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), **CLOSE)


def test_the_fused_path_trains_alike():
    inputs = batch() | {"labels": LABELS}
    plain = gradients(model_with("plain"), inputs)
    fused = gradients(model_with("sdpa"), inputs)
    assert plain.keys() == fused.keys()
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], **CLOSE)


def fused(dropout=0.0, seed=0):
    query, key, value = tensors(2, 2, 12, 8, count=3)
    module = build().encoder.block[0].layer[0].SelfAttention
    mask = torch.ones(2, 12, dtype=torch.long)
    torch.manual_seed(seed)
    return scored_attention.fused_attention(
        module,
        query.cpu(),
        key.cpu(),
        value.cpu(),
        None,
        dropout=dropout,
        scaling=None,
        position_bias=torch.zeros(1, 2, 12, 12),
        token_mask=mask,
    )


def test_scores_are_those_of_the_clean_weights():
    clean, expected = fused()
    dropped, found = fused(dropout=0.5)
    assert (clean - dropped).abs().max() > 0.1
    assert torch.equal(found, expected)


def test_an_unknown_path_is_refused():
    with pytest.raises(
        ValueError, match="scoring_path='flash' is unknown; use one of 'auto', 'plain', 'sdpa'"
    ):
        model_with("flash").encoder(**batch())


def test_a_compiled_encoder_has_the_kernel_in_its_graph():
    model = model_with("sdpa")
    inputs = batch()
    with torch.no_grad():
        expected = model.encoder(**inputs)
        found = torch.compile(model.encoder, backend="eager", fullgraph=True)(**inputs)
    torch.testing.assert_close(found.centrality, expected.centrality, **CLOSE)
    torch.compiler.reset()


def test_which_path_is_taken_and_told(monkeypatch):
    model = model_with("auto")
    assert (
        scored_attention.attention_path(model)
        == "layer 2, which scores: plain attention; the others: sdpa"
    )
    assert scored_attention.attention_path(build()) == "all layers: sdpa; none scores"
    model.encoder.scoring_path = "sdpa"
    by = "PyTorch" if CUDA else "Triton"  # of the CPU, where Triton is interpreted or not at all
    assert (
        scored_attention.attention_path(model)
        == f"layer 2, which scores: SDPA + column sums in {by}; the others: sdpa"
    )
    model.set_attn_implementation("eager")  # whoever wants to see the weights sees all of them
    assert (
        scored_attention.attention_path(model)
        == "layer 2, which scores: plain attention; the others: eager"
    )
    assert model.encoder(**batch(), output_attentions=True).attentions[1].shape == (4, 2, 32, 32)

    for works, path in ((True, "sdpa"), (False, "plain")):
        monkeypatch.setattr(scored_attention, "_works", lambda *_, works=works: works)
        assert scored_attention.choose_path(torch.device("cuda"), torch.bfloat16, 6, 64) == path
        assert scored_attention.choose_path(torch.device("cpu"), torch.float32, 6, 64) == "plain"


@pytest.fixture
def check():
    scored_attention._works.cache_clear()
    yield lambda dtype=torch.float32, causal=False: scored_attention._works(
        torch.device(DEVICE), dtype, 2, 16, causal
    )
    scored_attention._works.cache_clear()


def test_the_fused_path_is_used_only_after_its_check(check, monkeypatch, recwarn):
    state = torch.get_rng_state()
    assert check() and check(torch.bfloat16) and check(causal=True) and not recwarn.list
    with torch.inference_mode():
        assert check(torch.float16)
    assert torch.equal(torch.get_rng_state(), state)

    scored_attention._works.cache_clear()
    right = kernels.column_sums
    monkeypatch.setattr(
        kernels, "column_sums", lambda *args, **options: 1.2 * right(*args, **options)
    )
    with pytest.warns(UserWarning, match='path "sdpa" does not work .* its results are off by 20'):
        assert not check()
    assert not check()
    assert len(recwarn.list) == 0, "one warning, once"
    monkeypatch.setattr(
        kernels, "column_sums", lambda *args, **options: right(*args, **options | {"causal": False})
    )
    with pytest.warns(UserWarning, match='path "sdpa" does not work'):
        assert not check(causal=True)


def test_without_triton_there_is_a_warning_and_no_fused_path(check, monkeypatch):
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert not check()


@pytest.mark.gpu
@pytest.mark.skipif(
    not CUDA, reason="no CUDA device: fused attention and its kernels have not run compiled"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_on_a_gpu_the_fused_path_works(dtype, dropout, recwarn):
    sizes = {"d_kv": 64, "num_heads": 6, "d_model": 128}
    model = build(PruningConfig(), **sizes, dropout=dropout).cuda().train()
    inputs = {k: v.cuda() for k, v in batch().items()}
    plain = model_with("plain", **sizes, dropout=dropout).cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        assert "SDPA" in scored_attention.attention_path(model)
        model(**inputs, labels=LABELS.cuda()).loss.backward()
        found = model.eval().encoder(**inputs)
        expected = plain.encoder(**inputs)
    assert not [w for w in recwarn.list if "does not work" in str(w.message)]
    assert all(
        torch.isfinite(p.grad).all() for p in model.encoder.parameters() if p.grad is not None
    )
    near = NEAR if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(found.centrality, expected.centrality, **near)
