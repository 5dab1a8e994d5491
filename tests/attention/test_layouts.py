"""Memory layouts do not change any bit of the results."""

import dataclasses

import pytest
import torch

import flash_attn
from cases import Case
from check import op_bwd, op_fwd, op_fwd_into
from compare import assert_bitwise
from device import on_device
from inputs import make_inputs
from layouts import LAYOUTS, WRITABLE

DTYPES = ["float32", "float64", "bfloat16", "float16"]
DIMS = [(64, 64), (13, 40)]
NAMES = ("out", "softmax_lse", "dq", "dk", "dv", "dsoftmax_sum")

pytestmark = on_device


def results(case, x, grads=None):
    out, lse = op_fwd(case, x)
    return out, lse, *op_bwd(case, x, out, lse, grads)


def assert_nan_around(view, context):
    """Of the storage of a view, everything but the view itself is NaN."""
    whole = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
    inside = torch.zeros_like(whole, dtype=torch.bool).as_strided(view.shape, view.stride(), view.storage_offset())
    untouched = ~inside.fill_(True)._base
    assert torch.isnan(whole[untouched]).all(), context


def case_of(dtype, dims, **rest):
    shape = {"head_dim": dims[0], "head_dim_v": dims[1], "num_heads": 4, "num_heads_k": 2}
    return Case((70, 70), (133, 133), dtype=dtype, causal=True, lse_grad=True, **shape, **rest)


def assert_same_results(got, expected, context):
    for name, a, b in zip(NAMES[: len(expected)], got, expected, strict=True):
        assert_bitwise(name, a, b, context)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs(dtype, dims, layout):
    """q, k, v and dout in the layout, all together and one at a time."""
    case = case_of(dtype, dims)
    x = make_inputs(case)
    views = {name: LAYOUTS[layout](getattr(x, name)) for name in ("q", "k", "v", "dout")}
    plain = {name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()}
    expected = results(case, dataclasses.replace(x, **plain))
    for some in ["q k v dout", "q", "k", "v", "dout"]:
        chosen = {name: views[name] for name in some.split()}
        assert_same_results(results(case, dataclasses.replace(x, **{**plain, **chosen})), expected, f"{layout}: {some}")


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, layout):
    """dq, dk and dv are written in place in any layout, and nothing is written around them."""
    case = case_of(dtype, (13, 40))
    x = make_inputs(case)
    expected = results(case, x)
    views = [WRITABLE[layout](torch.zeros_like(t)) for t in (x.q, x.k, x.v)]
    got = results(case, x, views)
    assert_same_results(got, expected, layout)
    for view in views:
        assert_nan_around(view, layout)


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_out(dtype, layout):
    """fwd.out writes out in place in any layout, and nothing around it."""
    cases = [
        case_of(dtype, (13, 40)),
        case_of(dtype, (64, 64), float_results=True),
        dataclasses.replace(case_of(dtype, (32, 24)), seqlens_k=(0, 0)),
    ]
    for case in cases:
        x = make_inputs(case)
        expected = op_fwd(case, x)
        out = WRITABLE[layout](torch.full_like(expected[0], torch.nan))
        assert_same_results((out, *op_fwd_into(case, x, out)), expected, layout)
        assert_nan_around(out, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_of_packed_sequences(dtype):
    """Rows after the last sequence are zeros, as they are in new memory."""
    shape = {"packed": True, "unused_rows": 2, "head_dim": 16, "head_dim_v": 24}
    case = Case((9, 0, 40), (12, 3, 70), dtype, 4, 2, causal=True, **shape)
    x = make_inputs(case)
    expected = op_fwd(case, x)
    for order in ((0, 1, 2), (1, 0, 2), (0, 2, 1)):
        out = torch.full_like(expected[0].permute(order), torch.nan).contiguous()
        out = out.permute([order.index(i) for i in range(3)])
        assert_same_results((out, *op_fwd_into(case, x, out)), expected, f"{order}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_in_one_packed_tensor(dtype):
    case = dataclasses.replace(case_of(dtype, (32, 32)), seqlens_k=(70, 70), num_heads_k=4)
    x = make_inputs(case)
    expected = results(case, x)
    packed = torch.full((2, 70, 3, 4, 32), torch.nan, dtype=x.q.dtype)
    assert_same_results(results(case, x, packed.unbind(2)), expected, "gradients in one tensor")
    for i, name in enumerate(("dq", "dk", "dv")):
        assert_bitwise(name, packed[:, :, i], expected[2 + i])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["out", "softmax_lse", "dlse"])
def test_other_inputs_of_the_backward_pass(dtype, name):
    case = case_of(dtype, (40, 24))
    x = make_inputs(case)
    out, lse = op_fwd(case, x)
    expected = op_bwd(case, x, out, lse)
    tensors = {"out": out, "softmax_lse": lse, "dlse": x.dlse}
    t = tensors[name]
    views = [t.transpose(-1, -2).contiguous().transpose(-1, -2), torch.stack([t, t], -1)[..., 1]]
    for view in [*views, torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t)]:
        tensors[name] = view
        own = dataclasses.replace(x, dlse=tensors["dlse"])
        got = op_bwd(case, own, tensors["out"], tensors["softmax_lse"])
        for what, a, b in zip(NAMES[2:], got, expected, strict=True):
            assert_bitwise(what, a, b, f"{name} with strides {view.stride()}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_tensors(dtype):
    """alibi_slopes, cu_seqlens, seqused_k, leftpad_k and block_table as strided and expanded views."""
    base = Case((40, 9), (50, 33), dtype=dtype, packed=True, alibi="batch", dropout_p=0.2, seqused_k=(44, 30))
    for case in (base, dataclasses.replace(base, leftpad_k=(3, 0)), dataclasses.replace(base, page_size=16)):
        x = make_inputs(case)
        x.rng_state = torch.tensor([5, 6])
        expected = op_fwd(case, x)
        names = ("alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k", "block_table", "rng_state")
        given = {name: getattr(x, name) for name in names if getattr(x, name) is not None}
        strided = {name: torch.stack([t, t + 1], -1)[..., 0] for name, t in given.items()}
        for name, got, want in zip(NAMES, op_fwd(case, dataclasses.replace(x, **strided)), expected, strict=False):
            assert_bitwise(name, got, want, case.name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_gradients_by_autograd(dtype):
    """The gradient of sum() is an expanded scalar."""
    x = make_inputs(case_of(dtype, (24, 24)))
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    out, lse, _ = flash_attn.flash_attn_func(*leaves, return_attn_probs=True)
    got = torch.autograd.grad([out.sum(), lse.sum()], leaves, retain_graph=True)
    expected = torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)])
    for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=True):
        assert_bitwise(name, a, b)
        assert torch.isfinite(a).all()
