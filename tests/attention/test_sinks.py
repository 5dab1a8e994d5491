"""Sinks: scores of keys without a value, of any size, in any dtype, and their gradients."""

import dataclasses
import math

import pytest
import torch

import flash_attn
from cases import DTYPES, Case
from check import op_bwd, op_fwd
from compare import assert_bitwise, compare
from device import DEVICE, for_device, on_device
from inputs import eps_of, lse_dtype, make_inputs
from key_ranges import PATTERNS
from reference import attention

pytestmark = on_device

# Tiles of queries; few queries whose keys are one chunk; several chunks, merged.
SHAPES = {"tiles": ((150,), (200,)), "few queries": ((3,), (70,)), "chunks": ((3,), (1300,))}
SIZES = [0.0, 5.0, -5.0, 60.0, 86.0, 89.0, 104.0, -104.0, 1e4, -1e4, 1e30, -1e30]

with_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
with_types = pytest.mark.parametrize("dtype", DTYPES)


def case_of(shape, dtype, **fields) -> Case:
    (case,) = for_device([Case(*shape, dtype, head_dim=24, head_dim_v=16, **fields)])
    return case


@with_types
@with_shapes
def test_sinks_of_any_size(shape, dtype):
    """One per head: nothing overflows, and nothing is lost where a sink is far from the largest score."""
    case = case_of(shape, dtype, num_heads=len(SIZES), num_heads_k=len(SIZES) // 2, causal=True, s_aux="all")
    x = make_inputs(case)
    x.s_aux = torch.tensor(SIZES, device=x.q.device)
    out, lse = op_fwd(case, x)
    ref = attention(case, x)
    plain = attention(case, x, dtype=lse_dtype(x.q.dtype))
    for head, size in enumerate(SIZES):
        where = f"a sink of {size}"
        compare("softmax_lse", lse[:, head], ref.softmax_lse[:, head], [plain.softmax_lse[:, head]], 2.0, 1.0, where)
        error = (out[:, :, head].double() - ref.out[:, :, head]).abs()
        # Weights are no more exact than the differences of the sink to scores.
        allowed = (
            8 * (eps_of(out.dtype) + eps_of(lse.dtype) * (min(abs(size), 104) + 8)) * ref.out[:, :, head].abs().max()
        )
        assert (error <= allowed + torch.finfo(out.dtype).tiny).all(), where


@with_types
@with_shapes
def test_minus_infinity_is_no_sink(shape, dtype):
    case = case_of(shape, dtype, window_size=(40, 0), lse_grad=True)
    x = make_inputs(case)
    expected = op_fwd(case, x)
    expected = (*expected, *op_bwd(case, x, *expected))
    x.s_aux = torch.full((case.num_heads,), -math.inf, device=x.q.device)
    got = op_fwd(case, x)
    for i, (a, b) in enumerate(zip((*got, *op_bwd(case, x, *got)), expected, strict=True)):
        assert_bitwise(f"result {i}", a, b)


@with_types
@with_shapes
def test_nan_shows_in_its_head(shape, dtype):
    case = case_of(shape, dtype, s_aux="all")
    x = make_inputs(case)
    expected = op_fwd(case, x)
    x.s_aux = torch.where(torch.arange(case.num_heads, device=x.q.device) == 1, math.nan, x.s_aux)
    out, lse = op_fwd(case, x)
    assert torch.isnan(out[:, :, 1]).all()
    assert torch.isnan(lse[:, 1]).all()
    assert_bitwise("out", out[:, :, 0], expected[0][:, :, 0])
    assert_bitwise("softmax_lse", lse[:, 0], expected[1][:, 0])


@with_types
@with_shapes
def test_rows_without_keys_see_their_sink(shape, dtype):
    """out is 0, softmax_lse is the sink, gradients are 0, whatever their q and dout are."""
    case = case_of(shape, dtype, s_aux="some", key_ranges="random", lse_grad=True)
    x = make_inputs(case)
    rows = torch.arange(case.seqlen_q, device=x.q.device) % 3 == 1
    x.key_ranges[:, rows] = torch.tensor([9, 9], dtype=torch.int32, device=x.q.device)
    x.q[:, rows] = x.dout[:, rows] = math.nan
    out, lse = op_fwd(case, x)
    assert (out[:, rows] == 0).all()
    assert_bitwise("softmax_lse", lse[:, :, rows], x.s_aux.to(lse.dtype)[:, None].expand_as(lse[:, :, rows]))
    dq, dk, dv, _ = op_bwd(case, x, out, lse)
    assert (dq[:, rows] == 0).all()
    for name, gradient in {"dq": dq, "dk": dk, "dv": dv}.items():
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("sinks_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@with_types
def test_dtypes_of_sinks(dtype, sinks_dtype):
    """Any: results are the same for the same numbers, and the gradient has the dtype of the sinks."""
    case = case_of(SHAPES["tiles"], dtype, s_aux="all")
    x = make_inputs(case)

    def results(s_aux):
        leaf = s_aux.detach().requires_grad_()
        out = flash_attn.flash_attn_func(x.q, x.k, x.v, s_aux=leaf)
        return out, torch.autograd.grad(out, leaf, x.dout)[0]

    (out, gradient), (expected_out, expected) = results(x.s_aux.to(sinks_dtype)), results(x.s_aux)
    assert_bitwise("out", out, expected_out)
    assert gradient.dtype == sinks_dtype
    torch.testing.assert_close(gradient.double(), expected.double(), rtol=eps_of(sinks_dtype), atol=1e-6)


def sinks_gradient(case: Case, **fields) -> torch.Tensor:
    case = dataclasses.replace(case, **fields)
    x = make_inputs(case)
    leaf = x.s_aux.requires_grad_()
    masks = {"causal": case.causal, "key_ranges": x.key_ranges, "alibi_slopes": x.alibi_slopes}
    torch.manual_seed(3)
    function = flash_attn.flash_attn_func
    if case.packed:
        lengths = (x.cu_seqlens_q, x.cu_seqlens_k, case.seqlen_q, case.seqlen_k)
        out = flash_attn.flash_attn_varlen_func(x.q, x.k, x.v, *lengths, **masks, dropout_p=case.dropout_p, s_aux=leaf)
    else:
        out = function(x.q, x.k, x.v, **masks, dropout_p=case.dropout_p, s_aux=leaf)
    return torch.autograd.grad(out, leaf, x.dout.nan_to_num(0))[0]


@with_types
@pytest.mark.parametrize("pattern", ["", *PATTERNS])
def test_gradient_has_the_same_bits_every_time(dtype, pattern):
    """Whatever the number of threads: the sum over rows has a fixed order."""
    threads = torch.get_num_threads()
    fields = {"s_aux": "some", "key_ranges": pattern, "causal": True, "num_heads": 4, "num_heads_k": 2}
    cases = [
        case_of(((1500, 1500), (1700, 1700)), dtype, **fields),
        case_of(((700, 1, 2100), (300, 70, 1200)), dtype, packed=True, dropout_p=0.2, **fields),
    ]
    try:
        for case in cases:
            expected = sinks_gradient(case)
            for n in (1, 2, 4) if DEVICE == "cpu" else (1, 1, 1):
                torch.set_num_threads(n)
                assert_bitwise("ds_aux", sinks_gradient(case), expected, f"{n} threads, {case.name}")
    finally:
        torch.set_num_threads(threads)
