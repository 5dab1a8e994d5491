"""What goes wrong in other implementations of flash_attn_with_kvcache, a test for each."""

import os
from pathlib import Path

import pytest
import torch

import flash_attn
from compare import assert_bitwise
from device import on_device
from kvcache import KvCase, check_kvcache, make_kv_inputs, run_kvcache, whole

WIDE = (10**6, 10**6)
TURNING = {"cache_seqlens": (40, 7), "seqlen_q": 3, "rotary_dim": 64, "seqlen_new": 3}


@on_device
@pytest.mark.parametrize("mask", [{"window_size": WIDE}, {"window_size": (-1, 10**6)}, {"window_size": (10**6, -1)}])
def test_a_window_that_hides_nothing_still_turns_the_queries(mask):
    """Elsewhere a window wider than the cache counts as none, and then all queries are rotated as the first one."""
    case = KvCase(dtype="bfloat16", **TURNING, **mask)
    check_kvcache(case)
    x = make_kv_inputs(case)
    assert not torch.equal(run_kvcache(case, x)[0], run_kvcache(case, x, window_size=(-1, -1))[0])


@on_device
@pytest.mark.parametrize(
    "fields", [{}, {"alibi": "heads"}, {"window_size": (5, 0)}, {"head_dim": 13, "head_dim_v": 13}]
)
def test_one_query(fields):
    """Elsewhere causal is dropped for one query, and heads that share keys are one tile only in some cases."""
    shape = {"num_heads": 8, "num_heads_k": 2, "dtype": "bfloat16", "causal": True}
    check_kvcache(KvCase((40, 0, 7), 1, 1, rotary_dim=12, **{**shape, **fields}))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("head_dim", [13, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_rows_in_use_are_touched(dtype, head_dim):
    """Elsewhere a cache whose head_dim is no multiple of 8 is padded, used and copied back, all of it in each call."""
    caches = [torch.empty(2, 2**23, 1, head_dim, dtype=dtype) for _ in range(2)]
    q, k, v = (torch.ones(2, 2, 1, head_dim, dtype=dtype) for _ in range(3))
    before = resident_bytes()
    lengths = torch.zeros(2, dtype=torch.int32)
    for options in ({}, {"causal": True}, {"num_splits": 8}):
        out = flash_attn.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, **options)
        assert (out == 1).all()
    assert resident_bytes() - before < 2**25, "a cache takes 400 MB and more"


@on_device
def test_new_rows_that_no_query_sees_are_written():
    """Elsewhere rows to the left of every window are not appended."""
    case = KvCase((64, 3), 1, 200, dtype="bfloat16", causal=True, window_size=(4, 0))
    check_kvcache(case)
    x = make_kv_inputs(case)
    run_kvcache(case, x)
    for b, length in enumerate(case.cache_seqlens):
        place = x.place(b, range(length, length + 200))
        assert_bitwise("k_cache", x.k_cache[place], x.k[b])
        assert_bitwise("v_cache", x.v_cache[place], x.v[b])


@pytest.mark.parametrize("page_size", [0, 4])
def test_a_full_cache_spills_into_no_other_sequence(page_size):
    """Elsewhere rows past the capacity overwrite the next sequence."""
    case = KvCase((12, 5), 1, 4, spare=0, page_size=page_size)
    x = make_kv_inputs(case)
    before = [whole(cache).clone() for cache in (x.k_cache, x.v_cache)]
    x.cache_seqlens = torch.tensor([13, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cache_seqlens\[0\]"):
        run_kvcache(case, x)
    for cache, bits in zip((x.k_cache, x.v_cache), before, strict=True):
        assert torch.equal(whole(cache), bits)


@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_sequences_far_apart(stride):
    """Elsewhere a batch stride of 2^30 elements and more writes into sequence 0."""
    storage = torch.empty(stride + 2**21, dtype=torch.bfloat16)
    strides = {"size": (2, 16, 1, 64), "stride": (stride, 64, 64, 1)}
    k_cache, v_cache = (storage.as_strided(**strides, storage_offset=offset).fill_(2.0) for offset in (0, 2**20))
    q, k, v = (torch.randn(2, 3, 1, 64).bfloat16() for _ in range(3))
    near = [t.contiguous() for t in (k_cache, v_cache)]
    lengths = torch.tensor([2, 5], dtype=torch.int32)
    out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)
    expected = flash_attn.flash_attn_with_kvcache(q, *near, k, v, cache_seqlens=lengths, causal=True)
    for name, got, want in zip(("out", "k", "v"), (out, k_cache, v_cache), (expected, *near), strict=True):
        assert_bitwise(name, got, want)


@on_device
@pytest.mark.parametrize("page_size", [0, 1, 16])
def test_an_int_is_the_length_of_every_sequence(page_size):
    """Elsewhere an int with pages fails."""
    case = KvCase((30, 30, 30), 2, 2, dtype="bfloat16", page_size=page_size, causal=True, rotary_dim=32, given_as="int")
    check_kvcache(case)
    given = {length: make_kv_inputs(case) for length in (30, torch.full((3,), 30, dtype=torch.int32))}
    results = [run_kvcache(case, x, cache_seqlens=length) for length, x in given.items()]
    for name, a, b in zip(("out", "softmax_lse"), *results, strict=True):
        assert_bitwise(name, a, b)


@on_device
def test_sequences_may_share_a_row_of_the_cache():
    """By cache_batch_idx, as long as nothing is appended; elsewhere untested."""
    case = KvCase((30, 9, 17), 2, dtype="bfloat16", num_heads=4, causal=True)
    x = make_kv_inputs(case)
    index, lengths = (torch.tensor(values, dtype=torch.int32) for values in ([1, 0, 1, 1, 2], [9, 30, 9, 5, 17]))
    q = x.q[[0, 1, 2, 0, 1]]
    out = flash_attn.flash_attn_with_kvcache(
        q, x.k_cache, x.v_cache, cache_seqlens=lengths, cache_batch_idx=index, causal=True
    )
    for b, (row, length) in enumerate(zip(index.tolist(), lengths.tolist(), strict=True)):
        caches = (x.k_cache[row : row + 1], x.v_cache[row : row + 1])
        alone = flash_attn.flash_attn_with_kvcache(q[b : b + 1], *caches, cache_seqlens=length, causal=True)
        assert_bitwise("out", out[b : b + 1], alone)


@on_device
@pytest.mark.parametrize("page_size", [0, 4])
def test_decoding_step_by_step_equals_one_call(page_size):
    """Elsewhere seqlen_q > 1 is misunderstood: rows one at a time, and all at once by causal."""
    case = KvCase((6, 0), 9, 9, dtype="bfloat16", num_heads=4, causal=True, rotary_dim=32, page_size=page_size)
    at_once, stepwise = make_kv_inputs(case), make_kv_inputs(case)
    out, lse = run_kvcache(case, at_once)
    for i in range(9):
        part = {name: getattr(stepwise, name)[:, i : i + 1] for name in ("q", "k", "v")}
        own, own_lse = run_kvcache(case, stepwise, **part, cache_seqlens=stepwise.cache_seqlens + i)
        torch.testing.assert_close(own, out[:, i : i + 1], rtol=0.02, atol=0.02)
        torch.testing.assert_close(own_lse, lse[:, :, i : i + 1], rtol=1e-4, atol=1e-4)
    for name in ("k_cache", "v_cache"):
        assert_bitwise(name, getattr(stepwise, name), getattr(at_once, name))
