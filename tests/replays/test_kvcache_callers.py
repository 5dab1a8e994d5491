"""flash_attn_with_kvcache as inference engines call it: padded batches, pages, permuted caches, speculative tokens.

A padded batch has cache_seqlens of -1 and rows of -1 in block_table; caches of (seqlen, batch, heads, head_dim) and of
(batch, heads, seqlen, head_dim) are passed as permuted views; the sink of a head is applied by means of softmax_lse.

Callers: huggingface/transformers (continuous batching, static cache), NVIDIA/Megatron-LM (static and dynamic decoding)
"""

import inspect

import pytest
import torch

import flash_attn
import flash_attn_2_cuda
from compare import assert_bitwise
from plain_attention import assert_near, attention, visible
from rotation import rotated

H, HK, D = 8, 2, 32
ATOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

with_dtypes = pytest.mark.parametrize("dtype", ATOL, ids=str)


def random(*shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


@with_dtypes
@pytest.mark.parametrize("page_size", [4, 256])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("one_pool", [False, True])
def test_continuous_batching(page_size, dtype, options, one_pool):
    """transformers: one token each, a batch padded to a fixed size, keywords chosen by inspect.signature.

    one_pool: pages of keys and values are by turns in one tensor, of which both caches are views, a page apart.
    """
    lengths, slots, max_pages, steps = [6, 0, 13], 5, 6, 5
    seen = [[random(n, HK, D, dtype=dtype) for n in lengths] for _ in "kv"]
    caches = [torch.full((40, page_size, HK, D), torch.nan, dtype=dtype) for _ in "kv"]
    if one_pool:
        caches = [caches[0][:-1], caches[0][1:]]
    block_table = torch.full((slots, max_pages), -1, dtype=torch.int32)
    pool = (2 * torch.randperm(20)).tolist()
    for b, n in enumerate(lengths):
        pages = -(-(n + steps) // page_size)
        block_table[b, :pages] = ints([pool.pop() for _ in range(pages)])
        row = torch.arange(n)
        for cache, rows in zip(caches, seen, strict=True):
            cache[block_table[b].long()[row // page_size], row % page_size] = rows[b]
    known = inspect.signature(flash_attn.flash_attn_with_kvcache).parameters
    options = {name: x for name, x in {**options, "s_aux": None, "softmax_scale": 0.2}.items() if name in known}
    for step in range(steps):
        q, k, v = (random(slots, 1, heads, D, dtype=dtype) for heads in (H, HK, HK))
        cu_seqlens_k = ints([0, *(n + step + 1 for n in lengths), 0, 0]).cumsum(0, dtype=torch.int32)
        out = flash_attn.flash_attn_with_kvcache(
            *(q, *caches, k, v), causal=True, block_table=block_table, cache_seqlens=cu_seqlens_k.diff() - 1, **options
        )
        assert (out[len(lengths) :] == 0).all()
        for b in range(len(lengths)):
            for rows, new in zip(seen, (k, v), strict=True):
                rows[b] = torch.cat([rows[b], new[b]])
            keys, values = (rows[b][None].double() for rows in seen)
            scores = attention(q[b : b + 1].double(), keys, values, scale=0.2)[0]
            if "softcap" in options:
                scores = flash_attn.flash_attn_func(q[b : b + 1].double(), keys, values, causal=True, **options)
            assert_near([out[b : b + 1]], [scores], atol=ATOL[dtype])


@with_dtypes
def test_static_cache(dtype):
    """transformers: caches of (batch_size, num_heads_k, seqlen, head_dim), a prefill, and an int that counts up."""
    stored = [torch.full((2, HK, 24, D), torch.nan, dtype=dtype) for _ in "kv"]
    caches = [cache.transpose(1, 2) for cache in stored]
    q, k, v = (random(2, 20, heads, D, dtype=dtype) for heads in (H, HK, HK))
    expected, _ = attention(q.double(), k.double(), v.double(), keep=visible(20, 20, causal=True))
    for begin, end in [(0, 9), (9, 10), (10, 11), (11, 16), (16, 20)]:
        step = [x[:, begin:end] for x in (k, v)]
        out = flash_attn.flash_attn_with_kvcache(q[:, begin:end], *caches, *step, cache_seqlens=begin, causal=True)
        assert_near([out], [expected[:, begin:end]], atol=ATOL[dtype])
    for cache, rows in zip(stored, (k, v), strict=True):
        assert_bitwise("cache", cache[:, :, :20], rows.transpose(1, 2))
        assert torch.isnan(cache[:, :, 20:]).all()


@with_dtypes
@pytest.mark.parametrize("interleaved", [False, True])
def test_static_flash_decode(dtype, interleaved):
    """Megatron: caches of (seqlen, batch_size, heads, head_dim), rotary tables cast to the dtype of q, and a sink."""
    stored = [torch.full((30, 3, HK, D), torch.nan, dtype=dtype) for _ in "kv"]
    lengths, sink = [4, 11, 0], torch.linspace(-1, 2, H)
    past = [random(3, 11, HK, D, dtype=dtype) for _ in "kv"]
    for cache, rows in zip(stored, past, strict=True):
        cache[:11] = rows.transpose(0, 1)
        for b, n in enumerate(lengths):
            cache[n:, b] = torch.nan
    q, k, v = (random(3, 1, heads, D, dtype=dtype) for heads in (H, HK, HK))
    angle = torch.arange(30, dtype=torch.float64)[:, None] * torch.rand(D // 4, dtype=torch.float64)
    out, lse = flash_attn.flash_attn_with_kvcache(
        *(q, *(cache.permute(1, 0, 2, 3) for cache in stored), k, v),
        rotary_cos=angle.cos().to(q.dtype),
        rotary_sin=angle.sin().to(q.dtype),
        cache_seqlens=ints(lengths),
        rotary_interleaved=interleaved,
        return_softmax_lse=True,
    )
    with_sink = out * torch.sigmoid(lse - sink[:, None]).transpose(1, 2).unsqueeze(-1).to(out.dtype)
    for b, n in enumerate(lengths):
        turned = [rotated(x[b : b + 1].double(), angle[n : n + 1], interleaved) for x in (q, k)]
        keys = torch.cat([past[0][b : b + 1, :n].double(), turned[1]], 1)
        values = torch.cat([past[1][b : b + 1, :n].double(), v[b : b + 1].double()], 1)
        expected, expected_lse = attention(turned[0], keys, values)
        share = expected_lse.exp() / (expected_lse.exp() + sink[:, None].double().exp())
        expected = expected * share.transpose(1, 2).unsqueeze(-1)
        assert_near([with_sink[b : b + 1], lse[b : b + 1]], [expected, expected_lse], atol=2 * ATOL[dtype])
        assert_near([stored[0][n, b]], [turned[1][0, 0]], atol=ATOL[dtype])
        assert_bitwise("v_cache", stored[1][n, b], v[b, 0])


@with_dtypes
@pytest.mark.parametrize("window_size", [(-1, -1), (7, 0)])
@pytest.mark.parametrize("num_splits", [0, 1])
def test_dynamic_decode(dtype, window_size, num_splits):
    """Megatron: speculative tokens that are in the pages already; several queries for each sequence."""
    page_size, lengths, tokens = 16, [40, 3, 17], 3
    caches = [random(12, page_size, HK, D, dtype=dtype) for _ in "kv"]
    block_table = torch.randperm(12)[:9].view(3, 3).int()
    q = random(3, tokens, H, D, dtype=dtype)
    out = flash_attn.flash_attn_with_kvcache(
        *(q, *caches), cache_seqlens=ints(lengths), causal=True, window_size=window_size, block_table=block_table,
        num_splits=num_splits,
    )  # fmt: skip
    for b, n in enumerate(lengths):
        keys, values = (cache[block_table[b].long()].flatten(0, 1)[None, :n].double() for cache in caches)
        keep = visible(tokens, n, causal=True, window=window_size)
        assert_near([out[b : b + 1]], [attention(q[b : b + 1].double(), keys, values, keep=keep)[0]], atol=ATOL[dtype])


@with_dtypes
@pytest.mark.parametrize("with_out", [False, True])
def test_compiled_module(dtype, with_out):
    """flash_attn_2_cuda.fwd_kvcache, all arguments by position: [out, softmax_lse], in the caller's buffer if given."""
    generator = torch.Generator().manual_seed(3)
    q, k_cache, v_cache, k, v = (
        torch.randn(2, n, heads, D, generator=generator).to(dtype)
        for n, heads in ((3, H), (20, HK), (20, HK), (2, HK), (2, HK))
    )
    angle = torch.rand(20, D // 2, generator=generator)
    rotary, lengths, slopes = (angle.cos().to(dtype), angle.sin().to(dtype)), ints([5, 9]), torch.full((H,), 0.1)
    index, leftpad = ints([1, 0]), ints([0, 2])
    buffer = torch.full_like(q, torch.nan) if with_out else None
    others = k_cache.clone(), v_cache.clone()
    result = flash_attn_2_cuda.fwd_kvcache(
        *(q, k_cache, v_cache, k, v, lengths, *rotary, index, leftpad, None, slopes, buffer, 0.3, True, 6, 0, 2.0),
        *(False, 0),
    )
    expected = flash_attn.flash_attn_with_kvcache(
        *(q, *others, k, v, *rotary, lengths, index, leftpad), softmax_scale=0.3, causal=True, window_size=(6, 0),
        softcap=2.0, rotary_interleaved=False, alibi_slopes=slopes, return_softmax_lse=True,
    )  # fmt: skip
    assert isinstance(result, list)
    for name, a, b in zip(("out", "lse", "k", "v"), (*result, k_cache, v_cache), (*expected, *others), strict=True):
        assert_bitwise(name, a, b)
    assert buffer is None or result[0] is buffer


def test_compiled_module_with_pages():
    q, k_cache, v_cache = (torch.randn(n, m, h, D) for n, m, h in ((2, 3, H), (6, 4, HK), (6, 4, HK)))
    table, lengths = ints([[0, 3, -1], [5, 1, 2]]), ints([7, 9])
    out, _ = flash_attn_2_cuda.fwd_kvcache(
        *(q, k_cache, v_cache, None, None, lengths, None, None, None, None, table, None, None, 0.2, True, -1, -1, 0.0),
        *(True, 1),
    )
    expected = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, block_table=table, softmax_scale=0.2, causal=True, num_splits=1
    )
    assert_bitwise("out", out, expected)
