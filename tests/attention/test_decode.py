"""Attention of few queries over many keys, as decoding has it: by flash_attn_func, packed, and over a KV cache."""

import functools
import math

import pytest
import torch

import flash_attn
from cases import DTYPES, Case, pairwise, sampled
from check import check_forward
from compare import assert_bitwise
from device import for_device, on_device
from inputs import make_inputs
from reference import visible

SAMPLE = 80  # cases of the table, without --whole

LENGTHS_K = [n + d for n in (32, 64, 128, 256, 512, 1024) for d in (-1, 0, 1)] + [1, 3, 2000]


def table() -> list[Case]:
    """All pairs of values of these axes: dense, packed and paged, with seqused_k and leftpad_k."""
    axes = {
        "seqlen_q": list(range(1, 9)),
        "seqlen_k": LENGTHS_K,
        "dtype": list(DTYPES),
        "heads": [(1, 1), (3, 1), (4, 4), (8, 2), (32, 1)],
        "dims": [(1, 1), (13, 40), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256)],
        "mask": [{}, {"causal": True}, {"window_size": (0, 0)}, {"window_size": (70, 2)}, {"attention_chunk": 48}],
        "softcap": [0.0, 2.0],
        "alibi": ["", "heads", "batch"],
        "dropout_p": [0.0, 0.0, 0.17],
        "keys": ["", "", "seqused_k", "leftpad_k", "both"],
        "kind": [{}, {"packed": True}, {"packed": True, "page_size": 16}],
    }
    cases = []
    for seed, row in enumerate(pairwise(axes)):
        keys, n = row["keys"], row["seqlen_k"]
        used = {"seqused_k": (n // 2, n), "leftpad_k": (n // 3, min(n, 70))}
        ranges = {name: value for name, value in used.items() if keys in (name, "both")}
        heads = {"num_heads": row["heads"][0], "num_heads_k": row["heads"][1]}
        dims = {"head_dim": row["dims"][0], "head_dim_v": row["dims"][1]}
        rest = {name: row[name] for name in ("dtype", "softcap", "alibi", "dropout_p")}
        lengths = ((row["seqlen_q"],) * 2, (n, n))
        cases.append(Case(*lengths, **ranges, **heads, **dims, **rest, **row["mask"], **row["kind"], seed=seed))
    return cases


TABLE = for_device(table())


def pytest_generate_tests(metafunc):
    if "sampled_case" in metafunc.fixturenames:
        metafunc.parametrize("sampled_case", sampled(TABLE, SAMPLE, metafunc.config), ids=lambda case: case.name)


@on_device
def test_table(sampled_case):
    check_forward(sampled_case)


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_k", [0, 1, 5, 7])
def test_queries_that_see_no_key(dtype, seqlen_k):
    for mask in ({"causal": True}, {"window_size": (2, 0)}, {"attention_chunk": 3}, {"window_size": (0, 0)}):
        shape = {"num_heads": 4, "head_dim": 16, "head_dim_v": 16}
        (case,) = for_device([Case((8, 8), (seqlen_k, seqlen_k), dtype=dtype, **mask, **shape)])
        check_forward(case)


def dense(q, k, v, **options):
    return flash_attn.flash_attn_func(q, k, v, **options, return_attn_probs=True)[:2]


def cached(q, k, v, **options):
    return flash_attn.flash_attn_with_kvcache(q, k, v, **options, return_softmax_lse=True)


FUNCTIONS = {"flash_attn_func": dense, "with_kvcache": cached, "in 5 splits": functools.partial(cached, num_splits=5)}
MASKS = [{}, {"causal": True}, {"window_size": (100, 1)}, {"attention_chunk": 96, "causal": True}]
SEQLEN_Q, SEQLEN_K, HEADS, HEADS_K = 4, 300, 4, 2


def inputs_of(dtype: str):
    shape = {"num_heads": HEADS, "num_heads_k": HEADS_K, "head_dim": 24, "head_dim_v": 24}
    x = make_inputs(Case((SEQLEN_Q,), (SEQLEN_K,), dtype=dtype, **shape))
    return x.q, x.k, x.v


def sees(mask: dict) -> torch.Tensor:
    left, right = mask.get("window_size", (-1, -1))
    window = (left, 0) if mask.get("causal") else (left, right)
    return visible(SEQLEN_Q, SEQLEN_K, window, attention_chunk=mask.get("attention_chunk", 0))


with_functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
with_types = pytest.mark.parametrize("dtype", DTYPES)


@on_device
@with_functions
@with_types
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_nan_shows_in_the_queries_that_see_it(dtype, function, mask):
    """NaN in one row of q, k or v: in no other query, in no head that does not use it; of v, in no other column."""
    q, k, v = inputs_of(dtype)
    clean, seen = function(q, k, v, **mask), sees(mask)
    for where, place in [("q", 2), *((name, place) for name in "kv" for place in (0, 150, 201, 298, 299))]:
        own = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        own[where][0, place, 1, 5] = math.nan
        out, lse = function(**own, **mask)
        touched = torch.zeros(SEQLEN_Q, HEADS, dtype=torch.bool)
        if where == "q":
            touched[place, 1] = True
        else:
            touched[:, HEADS // HEADS_K :] = seen[:, place, None].to(touched.device)
        columns = torch.arange(24) == 5 if where == "v" else torch.ones(24, dtype=torch.bool)
        assert torch.equal(torch.isnan(out[0]), touched[:, :, None] & columns), (where, place)
        assert torch.equal(torch.isnan(lse[0]), touched.T & (where != "v")), (where, place)
        untouched = torch.where(touched[:, :, None] & columns, clean[0][0], out[0])
        assert_bitwise("out", untouched, clean[0][0], f"NaN in {where} at {place}")


@on_device
@with_functions
@with_types
def test_masked_keys_may_hold_nan(dtype, function):
    """Keys that no query sees, NaN or infinite, change no bit."""
    q, k, v = inputs_of(dtype)
    for mask in ({"window_size": (60, 0)}, {"causal": True, "window_size": (0, 0)}, {"attention_chunk": 75}):
        hidden = ~sees(mask).any(0).to(q.device)
        assert hidden.any()
        expected = function(q, k, v, **mask)
        for value in (math.nan, math.inf, -math.inf):
            keys, values = k.clone(), v.clone()
            keys[:, hidden], values[:, hidden] = value, value
            for name, got, want in zip(("out", "lse"), function(q, keys, values, **mask), expected, strict=True):
                assert_bitwise(name, got, want, f"{value} outside {mask}")


@on_device
@with_functions
@with_types
def test_infinite_values(dtype, function):
    """inf in a value that a query sees is inf in its column; inf and -inf are NaN."""
    q, k, v = inputs_of(dtype)
    v[0, 10, 0, 3], v[0, 298, 1, 5], v[0, 299, 1, 5] = math.inf, math.inf, -math.inf
    out, lse = function(q, k, v, causal=True)
    infinite, both = torch.zeros_like(out, dtype=torch.bool), torch.zeros_like(out, dtype=torch.bool)
    infinite[0, :, :2, 3] = True
    infinite[0, 2:3, 2:, 5] = True
    both[0, 3:, 2:, 5] = True
    assert torch.equal(torch.isposinf(out), infinite)
    assert torch.equal(torch.isnan(out), both)
    assert torch.isfinite(lse).all()


@on_device
@with_functions
@with_types
def test_scores_of_any_size(dtype, function):
    """Huge, tiny and equal scores: the softmax average of the values."""
    q, k, v = inputs_of(dtype)
    ones = torch.ones_like(v)
    for factor in (1e-4, 1.0, 60.0, -60.0):
        out, lse = function(q.abs() * factor, k.abs() + 1, ones)
        assert torch.isfinite(lse).all(), factor
        assert ((out.double() - 1).abs() <= 8 * torch.finfo(out.dtype).eps).all(), factor
    out, lse = function(q * 0, k, v)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(SEQLEN_K)))
    mean = v.double().mean(1, keepdim=True).repeat_interleave(HEADS // HEADS_K, 2).expand(out.shape)
    torch.testing.assert_close(out.double(), mean, rtol=0, atol=4 * torch.finfo(out.dtype).eps)
