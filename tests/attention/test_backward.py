"""Gradients against float64 gradients of the reference by autograd."""

import dataclasses
import math

import pytest
import torch

from cases import DTYPES, Case, edge_cases, large_cases, shard_cases, table, used_key_cases
from check import check_backward, check_forward, op_bwd, op_fwd
from compare import assert_bitwise
from device import for_device, needs_gpu, on_device
from inputs import make_inputs
from variant_cases import variant_cases

CASES = [*table(), *edge_cases(), *used_key_cases(), *shard_cases()]
CASES += [case for case in variant_cases() if not case.page_size]
of_every_case = pytest.mark.parametrize("case", for_device(CASES), ids=lambda case: case.name)


@of_every_case
def test_tables(kernels, case):
    check_backward(case)


@needs_gpu
@of_every_case
def test_tables_in_any_order(kernels, case):
    """Nondeterministic mode, as in training: the summation order of dQ varies on a GPU. On the CPU it is fixed."""
    check_backward(case, deterministic=False)


@needs_gpu
@pytest.mark.parametrize("case", large_cases(), ids=lambda case: case.name)
def test_large_problems(kernels, case):
    check_forward(case)
    check_backward(case, deterministic=False)
    check_backward(case)


@on_device
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_without_keys_take_either_infinity(dtype, packed):
    """A row without keys has softmax_lse -inf here and +inf in 2.8.3: backward accepts both, with any gradients."""
    case = Case((70,), (40,), dtype=dtype, causal=True, packed=packed, lse_grad=True)
    x = make_inputs(case)
    out, lse = op_fwd(case, x)
    empty = torch.isneginf(lse)
    assert empty.sum() == 30 * case.num_heads
    expected = op_bwd(case, x, out, lse)
    x.dlse[empty] = torch.nan
    rows = empty.transpose(-1, -2)
    x.dout[rows] = torch.nan
    got = op_bwd(case, x, out, torch.where(empty, torch.inf, lse))
    for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=False):
        assert_bitwise(name, a, b)
    assert (got[0][rows] == 0).all()


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_rows_marked_as_seeing_nothing_take_no_part(dtype, infinity):
    """A row with infinite softmax_lse has zero gradients and contributes nothing to dk and dv, whatever its mask."""
    case = Case((70, 70), (200, 200), dtype=dtype)
    x = make_inputs(case)
    out, lse = op_fwd(case, x)
    few = dataclasses.replace(case, seqlens_q=(40, 40))
    rows = {name: getattr(x, name)[:, :40] for name in ("q", "dout")}
    expected = op_bwd(few, dataclasses.replace(x, **rows, dlse=x.dlse[..., :40]), out[:, :40], lse[..., :40])
    lse[..., 40:] = infinity
    dq, dk, dv, _ = op_bwd(case, x, out, lse)
    assert (dq[:, 40:] == 0).all()
    for name, got, want in zip(("dq", "dk", "dv"), (dq[:, :40], dk, dv), expected, strict=False):
        assert_bitwise(name, got, want)


def test_only_some_inputs_need_gradients():
    """Every subset of q, k and v that requires grad gets the same gradients, also with an odd head_dim."""
    import flash_attn

    case = Case((33,), (65,), head_dim=59, head_dim_v=59)
    x = make_inputs(case)

    def grads(needed):
        leaves = {name: getattr(x, name).clone().requires_grad_(name in needed) for name in "qkv"}
        out = flash_attn.flash_attn_func(*leaves.values())
        assert out.shape == x.dout.shape
        return torch.autograd.grad(out, [leaves[name] for name in needed], x.dout)

    expected = dict(zip("qkv", grads("qkv"), strict=True))
    for needed in ("q", "k", "v", "qk", "qv", "kv"):
        for name, grad in zip(needed, grads(needed), strict=True):
            assert_bitwise(f"d{name} when {needed} need gradients", grad, expected[name])


def test_one_output_unused():
    """Losses of softmax_lse alone and of out alone: the other output has no gradient."""
    import flash_attn

    leaves = [torch.randn(1, 20, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out, lse, _ = flash_attn.flash_attn_func(*leaves, return_attn_probs=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), leaves, retain_graph=True, materialize_grads=True)
    assert [bool((grad != 0).any()) for grad in (dq, dk, dv)] == [True, True, False]
    both = torch.autograd.grad(out.sum() + lse.sum(), leaves, retain_graph=True)
    alone = torch.autograd.grad(out.sum(), leaves)
    for total, part, other in zip(both, alone, (dq, dk, dv), strict=True):
        torch.testing.assert_close(total, part + other, rtol=1e-12, atol=1e-13)
