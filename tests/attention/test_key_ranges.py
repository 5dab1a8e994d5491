"""Key ranges: equal to the masks that they can express, exact about what is hidden."""

import dataclasses
import math

import pytest
import torch

from cases import DTYPES, Case
from check import op_bwd, op_fwd, op_probs, poisoned_memory
from compare import assert_bitwise, compare
from device import for_device, on_device
from inputs import eps_of, make_inputs
from key_ranges import INT32, PATTERNS
from reference import mask_of, sequences

pytestmark = on_device

NAMES = ("out", "softmax_lse", "dq", "dk", "dv", "attn_probs")
SHAPES = {"tiles": ((300,), (300,)), "few queries": ((3,), (70,)), "chunks": ((3,), (1300,))}

with_types = pytest.mark.parametrize("dtype", DTYPES)
with_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def case_of(shape, dtype, **fields) -> Case:
    (case,) = for_device([Case(*shape, dtype, head_dim=24, head_dim_v=16, **fields)])
    return case


def results(case: Case, x) -> tuple[torch.Tensor, ...]:
    with poisoned_memory():
        out, lse = op_fwd(case, x)
        return out, lse, *op_bwd(case, x, out, lse)[:3], op_probs(case, x, lse)


def assert_near(got, expected, where):
    """Tiles may be cut in another way, so sums are rounded in another order."""
    for name, a, b in zip(NAMES, got, expected, strict=False):
        size = torch.where(torch.isfinite(b), b, 0.0).abs().max().item()
        compare(name, a, b.double(), [b.double() + 8 * eps_of(a.dtype) * size], context=where)


@with_types
@with_shapes
def test_ranges_of_all_keys_change_nothing(shape, dtype):
    case = case_of(shape, dtype, causal=True)
    x = make_inputs(case)
    expected = results(case, x)
    for begin, end in ((0, case.seqlen_k), (INT32.min, INT32.max), (-1, case.seqlen_k + 1)):
        ranges = torch.tensor([begin, end], dtype=torch.int32, device=x.q.device).expand(1, case.seqlen_q, 2)
        got = results(case, dataclasses.replace(x, key_ranges=ranges))
        for name, a, b in zip(NAMES, got, expected, strict=True):
            assert_bitwise(name, a, b, f"{begin}, {end}")


@with_types
@with_shapes
def test_ranges_as_a_window(shape, dtype):
    """Causal, as ranges: the same as the mask, also together with it."""
    case = case_of(shape, dtype, num_heads=4, num_heads_k=2, lse_grad=True)
    x = make_inputs(case)
    end = torch.arange(case.seqlen_q, device=x.q.device) + case.seqlen_k - case.seqlen_q + 1
    begin = (end - 51).clamp(min=0)
    ranges = torch.stack([begin, end], 1).int()[None]
    windowed = dataclasses.replace(case, window_size=(50, 0))
    expected = results(windowed, x)
    for each in (case, windowed):
        assert_near(results(each, dataclasses.replace(x, key_ranges=ranges)), expected, each.name)


@with_types
def test_documents_are_sequences(dtype):
    """Documents in one sequence are the same as packed sequences."""
    lengths = (63, 64, 1, 130, 65)
    packed = case_of((lengths, lengths), dtype, packed=True, causal=True, lse_grad=True)
    whole = case_of(((sum(lengths),),) * 2, dtype, packed=True, causal=True, lse_grad=True)
    x = make_inputs(packed)
    start = torch.cumsum(torch.tensor((0, *lengths)), 0)
    bounds = torch.stack([start[:-1], start[1:]], 1).repeat_interleave(torch.tensor(lengths), 0)
    one = torch.tensor([0, sum(lengths)], dtype=torch.int32, device=x.q.device)
    ranges = bounds.to(x.q.device, torch.int32)
    got = results(whole, dataclasses.replace(x, cu_seqlens_q=one, cu_seqlens_k=one, key_ranges=ranges))
    assert_near(got[:-1], results(packed, x)[:-1], whole.name)  # matrices of weights have other shapes


@with_types
@with_shapes
@pytest.mark.parametrize("pattern", PATTERNS)
def test_hidden_elements_do_not_matter(shape, dtype, pattern):
    """NaN and infinity in keys, values and queries that take no part change no bit."""
    case = case_of(shape, dtype, key_ranges=pattern, window_size=(200, 100), s_aux="some", lse_grad=True)
    x = make_inputs(case)
    x.key_ranges.clamp_(max=case.seqlen_k - 9)  # nobody sees the last keys
    (sequence,) = sequences(case)
    mask = mask_of(case, x, sequence)
    keys, rows = ~mask.any(0), ~mask.any(1)
    assert keys.any()
    expected = results(case, x)
    for value in (math.nan, math.inf, -math.inf):
        fields = {name: getattr(x, name).clone() for name in ("q", "k", "v", "dout")}
        for name, hidden in (("q", rows), ("dout", rows), ("k", keys), ("v", keys)):
            fields[name][:, hidden] = value
        got = results(case, dataclasses.replace(x, **fields))
        for name, a, b in zip(NAMES, got, expected, strict=True):
            assert_bitwise(name, a, b, f"{value} in {case.name}")


@with_types
@pytest.mark.parametrize("pattern", ["prefix", "documents", "random"])
def test_nan_shows_in_the_rows_that_see_it(dtype, pattern):
    case = case_of(SHAPES["tiles"], dtype, key_ranges=pattern, num_heads=1, num_heads_k=1)
    x = make_inputs(case)
    (sequence,) = sequences(case)
    mask = mask_of(case, x, sequence)
    clean = op_fwd(case, x)[0]
    for key in (0, 64, 100, 255, 299):
        v = x.v.clone()
        v[0, key, 0, 5] = math.nan
        out = op_fwd(case, dataclasses.replace(x, v=v))[0]
        expected = torch.zeros_like(out, dtype=torch.bool)
        expected[0, mask[:, key], 0, 5] = True
        assert torch.equal(torch.isnan(out), expected), key
        assert_bitwise("out", torch.where(expected, clean, out), clean)
