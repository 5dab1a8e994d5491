"""NaN and infinity: hidden elements do not affect results; visible ones affect only the rows that see them."""

import dataclasses
import math

import pytest
import torch

from cases import Case, paged_cases, used_key_cases
from check import op_bwd, op_fwd, op_probs, poisoned_memory
from compare import assert_bitwise
from device import on_device
from inputs import Inputs, make_inputs
from reference import visible

DTYPES = ["float32", "float64", "bfloat16", "float16"]
NAMES = ("out", "softmax_lse", "dq", "dk", "dv")

pytestmark = on_device

UNUSED = [
    Case((20, 5), (33, 64), packed=True, unused_rows=7, causal=True, lse_grad=True),
    Case((129, 0, 70), (65, 3, 200), packed=True, unused_rows=130, dropout_p=0.2, num_heads=4),
    *(dataclasses.replace(case, dtype="float32") for case in used_key_cases()[::3]),
]


@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", UNUSED, ids=lambda case: case.name)
def test_padding_does_not_matter(case, dtype, padding):
    """Rows after the last sequence and keys outside seqused_k and leftpad_k: the same bits as with zeros there."""
    case = dataclasses.replace(case, dtype=dtype)

    def results(value):
        x = make_inputs(case, padding=value)
        out, lse = op_fwd(case, x)
        return out, lse, *op_bwd(case, x, out, lse)[:3], op_probs(case, x, lse)

    with poisoned_memory():
        got = results(padding)
    for name, a, b in zip((*NAMES, "attn_probs"), got, results(0.0), strict=True):
        assert_bitwise(name, a, b, f"padding {padding}")
    assert all(not torch.isnan(t).any() for t in got)
    if case.unused_rows:
        out, lse, dq, dk, dv, _ = got
        for tensor in (out, dq, dk, dv):
            assert (tensor[-case.unused_rows :] == 0).all()
        assert torch.isneginf(lse[:, -case.unused_rows :]).all()


@pytest.mark.parametrize("padding", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", paged_cases()[::4], ids=lambda case: case.name)
def test_unused_pages_do_not_matter(case, dtype, padding):
    case = dataclasses.replace(case, dtype=dtype)
    got = op_fwd(case, make_inputs(case, padding=padding))
    for name, a, b in zip(NAMES, got, op_fwd(case, make_inputs(case, padding=0.0)), strict=False):
        assert_bitwise(name, a, b)


def selecting_reference(case: Case, x: Inputs) -> tuple[torch.Tensor, ...]:
    """out, softmax_lse, dq, dk, dv of a dense case in float64, which never use hidden elements.

    Each query has its own copy of keys and values, zero where hidden, so that NaN spreads by selection only.
    """
    q, k, v = (t[0].double().requires_grad_() for t in (x.q, x.k, x.v))
    mask = visible(q.shape[0], k.shape[0], case.window, q.device, case.attention_chunk)
    seen = mask[:, :, None, None]
    own_q = torch.where(seen, q[:, None], 0.0)
    own_k = torch.where(seen, k[None], 0.0)
    own_v = torch.where(seen, v[None], 0.0)
    scores = (own_q * own_k).sum(-1) * case.scale
    scores = torch.where(mask[:, :, None], scores, -torch.inf)
    sees_any = mask.any(1)[:, None, None]
    probs = torch.softmax(torch.where(sees_any, scores, 0.0), 1)
    probs = torch.where(mask[:, :, None], probs, 0.0)
    out = (probs[..., None] * own_v).sum(1)
    lse = torch.logsumexp(scores, 1)
    grads = torch.autograd.grad(out, (q, k, v), x.dout[0].double())
    return out.detach()[None], lse.detach().T[None], *(grad[None] for grad in grads)


PLACES = [0, 17, 64, 130, 149]
MASKS = [{}, {"causal": True}, {"window_size": (20, 3)}, {"window_size": (0, 0)}, {"attention_chunk": 24}]


@pytest.mark.parametrize("features", MASKS, ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_shows_where_it_is_attended_to(dtype, where, features):
    """NaN in one row: it appears where the reference says, forward and backward; all else equals a run without it."""
    case = Case((150,), (150,), dtype=dtype, num_heads=1, num_heads_k=1, head_dim=6, head_dim_v=5, **features)
    clean = make_inputs(case)
    out, lse = op_fwd(case, clean)
    expected = (out, lse, *op_bwd(case, clean, out, lse)[:3])
    for place in PLACES:
        tensor = getattr(clean, where).clone()
        tensor[0, place, 0, 2] = math.nan
        x = dataclasses.replace(clean, **{where: tensor})
        out, lse = op_fwd(case, x)
        got = (out, lse, *op_bwd(case, x, out, lse)[:3])
        for name, result, ref, bits in zip(NAMES, got, selecting_reference(case, x), expected, strict=True):
            wrong = torch.isnan(result) != torch.isnan(ref)
            text = f"{name} with a NaN in {where} at row {place}: misplaced at {wrong.nonzero()[:5].tolist()}"
            assert not wrong.any(), text
            assert_bitwise(name, torch.where(torch.isnan(ref), bits, result), bits, text)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_values_show_in_their_column(dtype):
    """inf times a positive weight is inf; inf and -inf in one column give NaN."""
    case = Case((40,), (90,), dtype=dtype, causal=True, head_dim=8, head_dim_v=8)
    x = make_inputs(case)
    x.v[0, 60, 0, 3], x.v[0, 70, 1, 5], x.v[0, 80, 1, 5] = math.inf, math.inf, -math.inf
    out, _ = op_fwd(case, x)
    first, second, both = torch.zeros_like(out, dtype=torch.bool), torch.zeros_like(out, dtype=torch.bool), None
    first[0, 10:, 0, 3] = True
    second[0, 20:30, 1, 5] = True
    both = torch.zeros_like(second)
    both[0, 30:, 1, 5] = True
    assert torch.equal(torch.isposinf(out), first | second)
    assert torch.equal(torch.isnan(out), both)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("payload", [-1, 1])
def test_any_nan_stays_nan(dtype, payload):
    """Also NaN with all bits set, which integer rounding would turn into zero."""
    case = Case((20,), (20,), dtype=dtype, head_dim=8, head_dim_v=8)
    x = make_inputs(case)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.v.element_size()]
    quiet = torch.tensor([math.nan], dtype=x.v.dtype).view(integer)
    bits = torch.tensor([-1], dtype=integer) if payload < 0 else quiet + 1
    assert torch.isnan(bits.view(x.v.dtype)).all()
    for name in ("q", "k", "v"):
        tensor = getattr(x, name).clone()
        tensor[0, 4, 1, 3] = bits.view(tensor.dtype)[0]
        own = dataclasses.replace(x, **{name: tensor})
        out, lse = op_fwd(case, own)
        dq, _, _, _ = op_bwd(case, own, out, lse)
        rows = [4] if name == "q" else range(20)
        assert torch.isnan(out[0, rows, 1, 3]).all(), name
        assert torch.isnan(dq[0, rows, 1]).all(), name
        assert not torch.isnan(out[:, :, 0]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_nan_among_gradients_of_softmax_lse_stays_nan(dtype):
    """dlse is wider than the gradients, so a NaN in it can have all bits set when it is rounded."""
    case = Case((20,), (20,), dtype=dtype, head_dim=8, head_dim_v=8, causal=True, lse_grad=True)
    x = make_inputs(case)
    integer = {4: torch.int32, 8: torch.int64}[x.dlse.element_size()]
    x.dlse[0, 1, 4] = torch.tensor([-1], dtype=integer).view(x.dlse.dtype)[0]
    dq, dk, dv, _ = op_bwd(case, x, *op_fwd(case, x))
    expected = torch.zeros(20, dtype=torch.bool)
    expected[4] = True
    assert torch.equal(torch.isnan(dq[0, :, 1]).all(1), expected)
    assert torch.equal(torch.isnan(dk[0, :, 1]).all(1), torch.arange(20) <= 4)
    assert not torch.isnan(dv).any()
    assert not torch.isnan(dk[0, :, 0]).any()
