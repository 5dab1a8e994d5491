"""Rounding errors of long sums grew with their length: over keys in out and dq, over queries and heads in dk and dv.

Products were added to a single sum one after another: dv of 128 heads over one key head, with gradients of one, had an
error of 53 eps, plain attention 1 eps. Without float64: the reference is no more accurate.

Public threads: Dao-AILab/flash-attention#2864, zhuzilin/ring-flash-attention#42, pytorch/pytorch#39516
"""

import dataclasses

import pytest
import torch

from cases import Case
from check import op_bwd, op_fwd, plain_attention
from compare import assert_bitwise, compare
from inputs import Inputs, make_inputs
from reference import attention

MANY_HEADS = Case((256,), (256,), num_heads=128, num_heads_k=1, head_dim=32, head_dim_v=32)
MANY_TOKENS = Case((1024,), (1024,), num_heads=8, num_heads_k=1)
MANY_QUERIES = Case((8192,), (300,), num_heads=1, num_heads_k=1)
MANY_KEYS = Case((16,), (8192,), num_heads=1, num_heads_k=1)
KEYS_WITHOUT_SPLITS = Case((16,), (8192,), num_heads=16, num_heads_k=16, head_dim=16, head_dim_v=16)
SHORT_AND_LONG = Case((4096, 7, 0), (129, 300, 5), num_heads=2, num_heads_k=1, packed=True, causal=True)
LONG = [MANY_HEADS, MANY_TOKENS, MANY_QUERIES, MANY_KEYS, KEYS_WITHOUT_SPLITS, SHORT_AND_LONG]
NAMES = ("out", "softmax_lse", "dq", "dk", "dv")


def of_one_sign(x: Inputs) -> dict:
    """Gradients of one and positive values: sums without cancellation."""
    return {"dout": torch.ones_like(x.dout), "v": x.v.abs(), "v_rows": x.v_rows.abs()}


def equal_weights(x: Inputs) -> dict:
    """Equal terms: every addition rounds in the same direction."""
    return {**of_one_sign(x), "q": torch.zeros_like(x.q)}


def large_scores(x: Inputs) -> dict:
    return {"q": x.q.abs(), "k": x.k.abs(), "k_rows": x.k_rows.abs(), "dout": x.dout.abs()}


VALUES = [lambda x: {}, lambda x: {"dout": torch.ones_like(x.dout)}, of_one_sign, equal_weights, large_scores]


def check(case: Case, x: Inputs) -> None:
    """The rule of compare.py for all results."""
    out, lse = op_fwd(case, x)
    got = dict(zip(NAMES, (out, lse, *op_bwd(case, x, out, lse)), strict=False))
    ref, plain = attention(case, x, grads=True), plain_attention(case, x, None, grads=True)
    for name in NAMES:
        if name == "softmax_lse" and out.dtype != torch.float32:
            continue  # plain attention in a narrower dtype is no measure here
        factor, size = (2.0 if name in ("out", "softmax_lse") else 3.0), float(name == "softmax_lse")
        compare(name, got[name], getattr(ref, name), [getattr(p, name) for p in plain], factor, size, case.name)


@pytest.mark.parametrize("values", VALUES, ids=["random", "ones", "of_one_sign", "equal_weights", "large_scores"])
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_float32(case, values):
    if values is equal_weights and case.seqlen_k == 8192:
        case = dataclasses.replace(case, seqlens_k=(8000,))  # plain attention weighs 2^13 keys without rounding errors
    x = make_inputs(case)
    check(case, dataclasses.replace(x, **values(x)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", [MANY_HEADS, MANY_QUERIES, MANY_KEYS], ids=lambda case: case.name)
def test_narrow_types(case, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    x = make_inputs(case)
    check(case, dataclasses.replace(x, dout=torch.ones_like(x.dout)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_infinite_sums_stay_infinite(dtype):
    """The rounding error of an infinite sum is NaN, which must not appear."""
    case = dataclasses.replace(MANY_QUERIES, dtype=dtype, head_dim=8, head_dim_v=8)
    x = make_inputs(case)
    x.dout[0, 5, 0, 3] = torch.inf
    _, _, dv, _ = op_bwd(case, x, *op_fwd(case, x))
    expected = torch.zeros_like(dv, dtype=torch.bool)
    expected[..., 3] = True
    assert torch.equal(torch.isposinf(dv), expected)
    assert torch.isfinite(dv[~expected]).all()


def passes(case: Case, x: Inputs) -> list[torch.Tensor]:
    out, lse = op_fwd(case, x)
    return [out, lse, *op_bwd(case, x, out, lse)[:3]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_and_threads_do_not_matter(dtype):
    """The same bits in any batch and for any number of threads, also for sums with several parts."""
    case = Case((700,) * 3, (500,) * 3, dtype=dtype, num_heads=6, num_heads_k=2, causal=True)
    x = make_inputs(case)
    expected = passes(case, x)
    torch.set_num_threads(2)
    alone = dataclasses.replace(case, seqlens_q=(700,), seqlens_k=(500,))
    last = {name: getattr(x, name)[2:] for name in ("q", "k", "v", "dout", "dlse")}
    for name, whole, part in zip(NAMES, expected, passes(alone, dataclasses.replace(x, **last)), strict=True):
        assert_bitwise(name, part, whole[2:], dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_nan_beside_a_long_sum(dtype):
    """NaN appears only in rows that see it; all else equals a run without it."""
    case = Case(
        (300,), (300,), dtype=dtype, num_heads=32, num_heads_k=1, head_dim=13, head_dim_v=7, window_size=(40, 0)
    )
    x = make_inputs(case)
    clean = passes(case, x)
    x.q[0, 200, 3, 2] = torch.nan
    touched = {name: torch.zeros_like(t, dtype=torch.bool) for name, t in zip(NAMES, clean, strict=True)}
    touched["out"][0, 200, 3] = touched["softmax_lse"][0, 3, 200] = touched["dq"][0, 200, 3] = True
    touched["dk"][0, 160:201] = touched["dv"][0, 160:201] = True
    for name, got, expected in zip(NAMES, passes(case, x), clean, strict=True):
        assert torch.isnan(got[touched[name]]).all(), name
        assert_bitwise(name, got[~touched[name]], expected[~touched[name]])
