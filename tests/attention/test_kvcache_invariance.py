"""The same bits for a sequence wherever it lies and whatever lies beside it; splits change rounding only."""

import dataclasses
import itertools

import pytest
import torch

import flash_attn
from cases import DTYPES, sampled
from compare import assert_bitwise, compare
from device import on_device
from kvcache import ONE_BUFFER, KvCase, check_kvcache, kv_attention, make_kv_inputs, run_kvcache
from layouts import WRITABLE
from reference import ORDERS

pytestmark = on_device

SAMPLE = 20  # of the combinations of dtypes, lengths and features, without --whole

LENGTHS = [1, 63, 300, 1100]
FEATURES = [
    {},
    {"seqlen_q": 4, "causal": True, "alibi": "heads", "softcap": 3.0},
    {"seqlen_new": 1, "rotary_dim": 16, "window_size": (200, 0)},
    {"seqlen_q": 5, "seqlen_new": 3, "causal": True, "num_splits": 3},
    {"seqlen_q": 30, "causal": True, "window_size": (500, 0)},
    {"num_heads": 8, "num_heads_k": 8, "seqlen_new": 1},
]
OTHERS = (3, 700, 0, -1, 1300, 64, 129)
CROWD = tuple(b * 37 % 211 - 1 for b in range(127))

# Each setting has the sequence at one place of the batch.
SETTINGS = {
    "a larger cache": {"spare": 333},
    "a batch of 8": {"others": OTHERS, "at": 4},
    "a batch of 128": {"others": CROWD, "at": 100},
    "another row of the cache": {"others": OTHERS, "at": 7, "shuffled": True},
    "one buffer": {"layout": ONE_BUFFER, "spare": 1},
    "heads before rows": {"layout": "heads before rows", "others": (5,)},
    "as an int": {"given_as": "int"},
    "pages of 1": {"page_size": 1},
    "pages of 16": {"page_size": 16, "others": OTHERS, "at": 2},
    "pages of 48": {"page_size": 48, "spare": 9},
    "pages of 256": {"page_size": 256, "others": CROWD, "at": 64},
}


def placed(sequence: KvCase, others: tuple[int, ...] = (), at: int = 0, **setting) -> tuple[torch.Tensor, torch.Tensor]:
    """out and softmax_lse of the sequence with others before and after it."""
    lengths = (*others[:at], *sequence.cache_seqlens, *others[at:])
    own = make_kv_inputs(sequence)
    case = dataclasses.replace(sequence, cache_seqlens=lengths, seed=sequence.seed + 1, **setting)
    x = make_kv_inputs(case)
    rows = range(sequence.cache_seqlens[0])
    for name in ("q", "k", "v"):
        if getattr(x, name) is not None:
            getattr(x, name)[at] = getattr(own, name)[0]
    for name in ("k_cache", "v_cache"):
        getattr(x, name)[x.place(at, rows)] = getattr(own, name)[own.place(0, rows)]
    if case.alibi:
        x.alibi_slopes = torch.linspace(0.01, 0.3, case.num_heads)
    if case.rotary_dim:
        angle = torch.arange(4096)[:, None] / torch.arange(1, case.rotary_dim // 2 + 1)
        x.rotary_cos, x.rotary_sin = angle.cos().to(x.q.dtype), angle.sin().to(x.q.dtype)
    out, lse = run_kvcache(case, x)
    return out[at], lse[at]


def pytest_generate_tests(metafunc):
    if "length" in metafunc.fixturenames:
        problems = sampled([*itertools.product(DTYPES, LENGTHS, FEATURES)], SAMPLE, metafunc.config)
        metafunc.parametrize(("dtype", "length", "features"), problems, ids=str)


def test_place_and_company_do_not_matter(dtype, length, features):
    shape = {"num_heads": 6, "num_heads_k": 2, "head_dim": 32, "head_dim_v": 32}
    sequence = KvCase((length,), dtype=dtype, **{**shape, **features})
    expected = placed(sequence)
    for setting, fields in SETTINGS.items():
        for name, got, alone in zip(("out", "softmax_lse"), placed(sequence, **fields), expected, strict=True):
            assert_bitwise(name, got, alone, f"{setting}: {sequence.name}")


@pytest.mark.parametrize("num_splits", [1, 2, 3, 8, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_splits_change_rounding_only(dtype, num_splits):
    for fields in (
        {"cache_seqlens": (1500, 1, 257), "causal": True, "seqlen_q": 3, "num_heads": 4},
        {"cache_seqlens": (700, 0, -1), "seqlen_new": 2, "rotary_dim": 64, "page_size": 16, "softcap": 2.0},
        {"cache_seqlens": (900, 30), "window_size": (40, 0), "alibi": "batch", "seqlen_q": 2},
    ):
        check_kvcache(KvCase(dtype=dtype, num_splits=num_splits, **fields))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_as_attention_over_the_gathered_keys(dtype):
    """Within rounding: flash_attn_func over the rows of the cache, old and appended."""
    case = KvCase((200, 65), 5, 5, dtype=dtype, num_heads=4, causal=True, page_size=16)
    x = make_kv_inputs(case)
    plain = [kv_attention(case, x, x.q.dtype, order)[0] for order in ORDERS]
    out, _ = run_kvcache(case, x)
    for b, end in enumerate(case.ends):
        place = x.place(b, range(end))
        other = flash_attn.flash_attn_func(x.q[b : b + 1], x.k_cache[place][None], x.v_cache[place][None], causal=True)
        compare("out", out[b], other[0], [each[b] for each in plain], context=case.name)


def test_repeated_calls():
    """The second call appends at the same place, and has the same bits."""
    case = KvCase((200, 65, 0), 2, 2, dtype="bfloat16", rotary_dim=32, causal=True)
    x = make_kv_inputs(case)
    for name, a, b in zip(("out", "softmax_lse"), run_kvcache(case, x), run_kvcache(case, x), strict=True):
        assert_bitwise(name, a, b)


def test_softmax_lse_only_on_request():
    case = KvCase((20, 6), 2, dtype="bfloat16")
    x = make_kv_inputs(case)
    out, _ = run_kvcache(case, x)
    assert_bitwise("out", run_kvcache(case, x, return_softmax_lse=False), out)


FLOATS, INTS = ("q", "k", "v", "rotary_cos", "rotary_sin"), ("cache_seqlens", "cache_leftpad", "alibi_slopes")


@pytest.mark.parametrize("place", [{"page_size": 4}, {"shuffled": True}], ids=str)
@pytest.mark.parametrize("layout", WRITABLE)
def test_layouts(layout, place):
    """q, k, v and the tables of rotary embedding in any layout; small tensors as strided and as expanded views."""
    case = KvCase(
        (30, 7, 7), 3, 2, dtype="bfloat16", num_heads=4, causal=True, rotary_dim=32, leftpad=(3, 0, 1), **place
    )
    case = dataclasses.replace(case, alibi="batch")
    other = make_kv_inputs(case)
    expected = (*run_kvcache(case, other), other.k_cache, other.v_cache)
    for some in (FLOATS, *((name,) for name in FLOATS)):
        x = make_kv_inputs(case)
        for name in some:
            tensor = getattr(x, name)
            is_table = tensor.dim() == 2
            view = WRITABLE[layout](tensor[None, :, None] if is_table else tensor)
            setattr(x, name, view[0, :, 0] if is_table else view)
        for name in (*INTS, "cache_batch_idx" if case.shuffled else "block_table"):
            tensor = getattr(x, name)
            setattr(x, name, torch.stack([tensor, tensor + 1], -1)[..., 0])
        results = (*run_kvcache(case, x), x.k_cache, x.v_cache)
        for name, a, b in zip(("out", "softmax_lse", "k_cache", "v_cache"), results, expected, strict=True):
            assert_bitwise(name, a, b, f"{layout}: {some}")


def test_expanded_inputs():
    """One row of q, k and v for all, one length, one row of a table of pages, one sequence for all queries."""
    q, k, v = (torch.randn(1, 1, 1, 64).bfloat16().expand(3, 2, 4, 64) for _ in range(3))
    for lengths in (torch.tensor(5, dtype=torch.int32).expand(3), 5):
        caches, others = ([torch.zeros(3, 16, 4, 64).bfloat16() for _ in range(2)] for _ in range(2))
        got = flash_attn.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths)
        dense = [t.contiguous() for t in (q, k, v)]
        expected = flash_attn.flash_attn_with_kvcache(dense[0], *others, *dense[1:], cache_seqlens=5)
        for name, a, b in zip(("out", "k", "v"), (got, *caches), (expected, *others), strict=True):
            assert_bitwise(name, a, b)
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    pools = [t.view(6, 8, 4, 64) for t in caches]
    shared = flash_attn.flash_attn_with_kvcache(q, *pools, cache_seqlens=20, block_table=table.expand(3, 3))
    own = flash_attn.flash_attn_with_kvcache(q, *pools, cache_seqlens=20, block_table=table.repeat(3, 1))
    assert_bitwise("out", shared, own)
