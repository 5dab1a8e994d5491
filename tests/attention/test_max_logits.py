"""The largest score of each head: of visible pairs, as softmax sees them, NaN if one of them is."""

import dataclasses
import math

import pytest
import torch

from cases import DTYPES, Case
from check import op_fwd, op_results
from compare import assert_bitwise
from device import DEVICE, for_device, on_device
from inputs import make_inputs
from reference import mask_of, sequences

pytestmark = on_device

# Tiles of queries; few queries whose keys are one chunk; several chunks, merged.
SHAPES = {"tiles": ((150,), (200,)), "few queries": ((3,), (70,)), "chunks": ((3,), (1300,))}
MASKS = [{}, {"causal": True}, {"window_size": (30, 2)}, {"key_ranges": "random"}, {"softcap": 2.0}]

with_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
with_types = pytest.mark.parametrize("dtype", DTYPES)
with_masks = pytest.mark.parametrize("mask", MASKS, ids=str)


def case_of(shape, dtype, **fields) -> Case:
    (case,) = for_device([Case(*shape, dtype, head_dim=8, head_dim_v=8, max_logits=True, **fields)])
    return case


@with_types
@with_shapes
@with_masks
def test_nan_wins_wherever_it_is_seen(shape, dtype, mask):
    """A NaN in one key, beside infinity: NaN for its head if a query sees it; else the bits of a run without it."""
    case = case_of(shape, dtype, **mask)
    x = make_inputs(case)
    (sequence,) = sequences(case)
    seen = mask_of(case, x, sequence).any(0)
    _, _, expected = op_results(case, x)
    assert torch.isfinite(expected).all()
    for key in (0, 17, 40, 64, case.seqlen_k // 2, case.seqlen_k - 1):
        k = x.k.clone()
        k[0, key, 0, 3] = math.nan
        if case.softcap == 0:
            k[0, min(key + 1, case.seqlen_k - 2), 0] = math.inf * x.q[0, -1, 0].sign()
        changed = dataclasses.replace(x, k=k)
        hidden = dataclasses.replace(x, k=torch.where(seen[None, :, None, None], x.k, k))
        _, _, got = op_results(case, changed if seen[key] else hidden)
        assert torch.isnan(got[0, 0]) == seen[key], key
        assert_bitwise("max_logits", got[0, 1], expected[0, 1])
        if not seen[key]:
            assert_bitwise("max_logits", got, expected)


@with_types
@with_shapes
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_scores(shape, dtype, value):
    """inf is the largest score, -inf the smallest: of one pair, and of all."""
    case = case_of(shape, dtype)
    x = make_inputs(case)
    x.q, x.k = x.q.abs() + 1, x.k.abs() + 1
    _, _, expected = op_results(case, x)
    for keys in (slice(5, 6), slice(None)):
        k = x.k.clone()
        k[0, keys, 0] = value
        _, _, got = op_results(case, dataclasses.replace(x, k=k))
        if value > 0 or keys == slice(None):
            assert got[0, 0] == value
        else:
            assert got[0, 0] <= expected[0, 0]
        assert_bitwise("max_logits", got[0, 1], expected[0, 1])


@with_types
@with_shapes
@with_masks
def test_other_results_are_the_same(shape, dtype, mask):
    """Asked for or not, and whatever the sinks, which are no logits."""
    case = case_of(shape, dtype, s_aux="all", **mask)
    x = make_inputs(case)
    out, lse, largest = op_results(case, x)
    for name, got, expected in zip(
        ("out", "softmax_lse"), op_fwd(dataclasses.replace(case, max_logits=False), x), (out, lse), strict=True
    ):
        assert_bitwise(name, got, expected)
    huge = dataclasses.replace(x, s_aux=x.s_aux + 1e4)
    assert_bitwise("max_logits", op_results(case, huge)[2], largest)
    assert not largest.requires_grad


@with_types
def test_nothing_visible(dtype):
    """-inf for a sequence without pairs, and only for it; unused rows do not count."""
    fields = {"num_heads": 4, "num_heads_k": 2, "key_ranges": "hostile", "unused_rows": 3, "packed": True}
    case = case_of(((70, 5, 0, 9), (90, 0, 4, 20)), dtype, **fields)
    x = make_inputs(case)
    x.key_ranges[75:84] = torch.tensor([7, 3], dtype=torch.int32, device=x.q.device)
    _, _, largest = op_results(case, x)
    expected = torch.tensor([False, True, True, True], device=x.q.device)
    assert torch.equal(torch.isneginf(largest), expected[:, None].expand(-1, 4))


@with_types
def test_threads_do_not_matter(dtype):
    """Tiles of a head are compared in any order. Equal zeros of both signs among them."""
    threads = torch.get_num_threads()
    x = make_inputs(case := case_of(((700,) * 2, (300,) * 2), dtype, num_heads=3, num_heads_k=3))
    x.q[:, :, 1] = torch.where(torch.arange(700, device=x.q.device)[:, None] % 2 == 0, 0.0, -0.0)
    bits = torch.int64 if dtype == "float64" and DEVICE == "cpu" else torch.int32
    try:
        _, _, expected = op_results(case, x)
        for n in (1, 2, 4) if DEVICE == "cpu" else (1, 1, 1):
            torch.set_num_threads(n)
            for _ in range(5):
                assert torch.equal(op_results(case, x)[2].view(bits), expected.view(bits))
    finally:
        torch.set_num_threads(threads)
