"""bert_padding: conversion between padded batches and packed rows."""

import re

import pytest
import torch

from flash_attn import bert_padding
from flash_attn.bert_padding import (
    IndexFirstAxis,
    IndexFirstAxisResidual,
    IndexPutFirstAxis,
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from plain_attention import assert_near, assert_same, gradients, leaves

MASKS = {
    "padding on the right": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "padding on the left": [[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]],
    "an empty sequence": [[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]],
    "no padding": [[1, 1, 1, 1]] * 3,
    "nothing at all": [[0, 0, 0, 0]] * 3,
}
TRAILING = [(), (5,), (2, 3)]


def cases():
    return pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@cases()
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.int64])
@pytest.mark.parametrize("trailing", TRAILING, ids=str)
def test_unpad_input(trailing, mask_dtype, mask):
    mask = torch.tensor(mask)
    x = torch.randn(*mask.shape, *trailing, generator=torch.Generator().manual_seed(0))
    result = unpad_input(x, mask.to(mask_dtype))
    assert len(result) == 5
    rows, indices, cu_seqlens, max_seqlen, seqused = result
    lengths = mask.sum(1)
    assert torch.equal(rows, x[mask.bool()])
    assert torch.equal(indices, mask.flatten().nonzero().flatten())
    assert cu_seqlens.dtype == seqused.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert type(max_seqlen) is int
    assert max_seqlen == lengths.max()
    assert seqused.tolist() == lengths.tolist()
    padded = pad_input(rows, indices, *mask.shape)
    assert torch.equal(padded, x * mask.view(*mask.shape, *[1] * len(trailing)))


@cases()
def test_gradients_go_to_the_kept_rows(mask):
    mask = torch.tensor(mask)
    (x,) = leaves((*mask.shape, 5))
    rows, indices, *_ = unpad_input(x, mask)
    padded = pad_input(rows * 2, indices, *mask.shape)
    (dx,) = gradients(padded, [x])
    (dout,) = gradients(x * 1.0, [x])
    assert torch.equal(dx, 2 * dout * mask[..., None])


def test_padding_may_hold_anything():
    x = torch.ones(2, 3, 4)
    x[0, 2] = torch.nan
    x[1, 1:] = torch.inf
    rows, indices, cu_seqlens, *_ = unpad_input(x, torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert torch.equal(rows, torch.ones(3, 4))
    assert cu_seqlens.tolist() == [0, 2, 3]
    assert torch.isfinite(pad_input(rows, indices, 2, 3)).all()


def test_unused_mask_reserves_rows_that_are_not_used():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    x = torch.arange(8.0).view(2, 4, 1)
    rows, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask, unused)
    assert rows.flatten().tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert (cu_seqlens.tolist(), max_seqlen, seqused.tolist()) == ([0, 3, 7], 4, [2, 1])
    assert seqused.dtype == torch.int32


@pytest.mark.parametrize("trailing", TRAILING[1:], ids=str)
def test_index_functions_are_inverse_and_transposed(trailing):
    (x,) = leaves((6, *trailing))
    indices = torch.tensor([4, 0, 3])
    taken = index_first_axis(x, indices)
    assert torch.equal(taken, x[indices])
    put = index_put_first_axis(taken, indices, 6)
    expected = torch.zeros_like(x)
    expected[indices] = x.detach()[indices]
    assert torch.equal(put, expected)
    (dx,) = gradients(put, [x])
    kept = torch.zeros(6, *[1] * len(trailing), dtype=x.dtype)
    kept[indices] = 1
    assert torch.equal(dx, gradients(x * 1.0, [x])[0] * kept)


def round_trip(x, indices):
    """Results of the functions for (4, ...) rows, in both directions."""
    taken, same = index_first_axis_residual(x, indices)
    return (
        index_first_axis(x, indices),
        taken,
        same,
        index_put_first_axis(taken, indices, 4),
        pad_input(taken, indices, 2, 2),
    )


def round_trip_by_matrix(x, indices):
    places = torch.eye(4, dtype=x.dtype)[indices]
    taken = torch.tensordot(places, x, 1)
    put = torch.tensordot(places.t(), taken, 1)
    return taken, taken, x, put, put.unflatten(0, (2, 2))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("trailing", TRAILING, ids=str)
@pytest.mark.parametrize("indices", [[3, 0, 2], [1], []], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_types_of_indices(dtype, indices, trailing, compiled):
    torch.compiler.reset()
    call = torch.compile(round_trip, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else round_trip
    (x,) = leaves((4, *trailing))
    out, expected = call(x, torch.tensor(indices, dtype=dtype)), round_trip_by_matrix(x, indices)
    assert_near(out, expected)
    assert_near(gradients(out, [x]), gradients(expected, [x]))


def test_indices_of_int64_are_not_copied(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.Tensor, "index_select", lambda x, dim, rows: seen.append(rows))
    indices = torch.tensor([1, 0])
    index_first_axis(torch.zeros(2, 1), indices)
    assert seen[0] is indices


def test_a_mask_of_the_rows_serves_as_indices():
    (x,) = leaves((4, 3))
    keep = torch.tensor([True, False, False, True])
    out, expected = (round_trip(x, indices) for indices in (keep, keep.nonzero().flatten()))
    assert_same(out, expected)
    assert_same(gradients(out, [x]), gradients(expected, [x]))


@pytest.mark.parametrize("trailing", TRAILING, ids=str)
def test_autograd_classes_of_the_original(trailing):
    (x,) = leaves((4, *trailing))
    indices = torch.tensor([2, 0], dtype=torch.int32)
    rows = IndexFirstAxis.apply(x, indices)
    out = [rows, IndexPutFirstAxis.apply(rows, indices, 5), *IndexFirstAxisResidual.apply(x, indices)]
    expected = [rows, index_put_first_axis(rows, indices, 5), rows, x]
    assert_same(out, expected)
    assert_near(gradients(out, [x], retain_graph=True), gradients(expected, [x]))


@pytest.mark.parametrize("indices", [[0, 4], [-1, 0], [[0, 1]]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_of_no_row_are_refused(dtype, indices):
    indices = torch.tensor(indices, dtype=dtype)
    got = rf"from 0 to 3, got .*{re.escape(str(tuple(indices.shape)))}.* from {indices.min()} to {indices.max()}"
    with pytest.raises(IndexError, match=rf"index_first_axis: indices: expected .*{got}"):
        index_first_axis(torch.zeros(4, 3), indices)
    with pytest.raises(IndexError, match=rf"index_put_first_axis: indices: expected shape \(2,\) .*{got}"):
        pad_input(torch.zeros(2, 3), indices, 2, 2)


def test_indices_and_rows_differ_in_number():
    with pytest.raises(IndexError, match=r"indices: expected shape \(1,\) .*, got Tensor of shape \(2,\)"):
        pad_input(torch.zeros(1, 3), torch.tensor([0, 1]), 2, 2)


@pytest.mark.parametrize(
    ("indices", "error"),
    [
        (torch.tensor([0.0, 1.0]), TypeError),
        (torch.tensor([0, 1], dtype=torch.uint8), TypeError),
        (torch.tensor([True, True]), ValueError),
    ],
    ids=["float", "uint8", "short mask"],
)
def test_indices_of_other_types_are_refused(indices, error):
    for call in (
        lambda: index_first_axis(torch.zeros(4, 3), indices),
        lambda: pad_input(torch.zeros(2, 3), indices, 2, 2),
    ):
        with pytest.raises(error, match=r"axis: indices: expected.*, got Tensor of shape"):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_the_type_is_kept(dtype):
    x = torch.arange(12).view(2, 3, 2).to(dtype)
    rows, indices, *_ = unpad_input(x, torch.tensor([[1, 0, 1], [0, 1, 1]]))
    assert rows.dtype == pad_input(rows, indices, 2, 3).dtype == dtype


def test_rows_of_several_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.arange(18.0).view(3, 6, 1)
    rows, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(x, lengths)
    kept = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert rows.flatten().tolist() == indices.tolist() == kept
    assert (cu_seqlens.tolist(), cu_seqlens.dtype, max_seqlen) == ([0, 2, 5, 8, 10, 16], torch.int32, 6)
    assert type(max_seqlen) is int


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (3, 3), (6,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("argument", ["attention_mask", "unused_mask"])
def test_masks_of_another_shape_are_refused(argument, shape):
    masks = {"attention_mask": torch.ones(2, 3, dtype=torch.int32), argument: torch.ones(shape, dtype=torch.int32)}
    with pytest.raises(ValueError, match=rf"unpad_input: {argument}: expected .*2, 3.*, got {re.escape(str(shape))}"):
        unpad_input(torch.zeros(2, 3, 4), **masks)


@pytest.mark.parametrize("argument", ["attention_mask", "unused_mask"])
def test_masks_to_be_broadcast_are_refused_with_advice(argument):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    masks = {"attention_mask": mask, argument: mask[:, None, None]}
    with pytest.raises(ValueError, match=rf"got \(2, 1, 1, 3\): pass {argument}\.flatten\(1\)"):
        unpad_input(torch.zeros(2, 3, 4), **masks)
    assert torch.equal(masks[argument].flatten(1), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_floats_may_be_masks(dtype):
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]])
    x = torch.arange(8.0).view(2, 4, 1)
    for second in (unused, torch.zeros_like(unused)):
        expected = unpad_input(x, mask, second)
        result = unpad_input(x, mask.to(dtype), second.to(dtype))
        assert result[3] == expected[3]
        assert_same([*result[:3], result[4]], [*expected[:3], expected[4]])
    assert unpad_input(x[:0], mask[:0].to(dtype))[2].tolist() == [0]


LOWEST = torch.finfo(torch.float32).min
NO_MASKS = {
    "additive": [[0, 0, -torch.inf], [0, -torch.inf, -torch.inf]],
    "additive and finite": [[0, 0, LOWEST], [0, LOWEST, LOWEST]],
    "additive without padding": [[0, 0, 0], [0, 0, 0]],
    "weights": [[1, 1, 0.5], [1, 0.25, 0]],
    "NaN": [[1, 1, torch.nan], [1, 0, 0]],
}


@pytest.mark.parametrize("mask", NO_MASKS.values(), ids=NO_MASKS)
def test_floats_that_are_no_mask_are_refused(mask):
    mask = torch.tensor(mask, dtype=torch.float32)
    advice = r"got torch.float32 from \S+ to \S+: if it is additive \(0 keeps\), pass {0} == 0, else {0} != 0"
    with pytest.raises(ValueError, match=rf"unpad_input: attention_mask: expected .*{advice.format('attention_mask')}"):
        unpad_input(torch.zeros(2, 3, 4), mask)
    if mask.any():
        with pytest.raises(ValueError, match=rf"unpad_input: unused_mask: expected .*{advice.format('unused_mask')}"):
            unpad_input(torch.zeros(2, 3, 4), torch.ones(2, 3), mask)


def test_only_floats_are_looked_at(monkeypatch):
    monkeypatch.setattr(bert_padding, "_check_floats", None)
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.int64):
        mask = torch.tensor([[1, 1, 0]]).to(dtype)
        assert unpad_input(torch.zeros(1, 3, 4), mask, mask)[3] == 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_unpadding_looks_at_floats(backend):
    torch.compiler.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        call = torch.compile(lambda x, mask: unpad_input(x, mask)[0], fullgraph=True, backend=backend)
        (x,) = leaves((2, 3, 4))
        mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        assert torch.equal(call(x, mask), x[mask.bool()])
        with pytest.raises(RuntimeError, match="unpad_input: attention_mask: expected 1 to keep"):
            call(x, mask - 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float16, torch.float32])
def test_types_of_lengths(dtype):
    lengths = torch.tensor([[200, 101, 0], [0, 100, 1]])
    x = torch.arange(620.0).view(2, 310, 1)
    expected = unpad_input_for_concatenated_sequences(x, lengths)
    result = unpad_input_for_concatenated_sequences(x, lengths.to(dtype))
    assert_same(result[:3], expected[:3])
    assert (result[3], type(result[3])) == (200, int)
    assert result[2].tolist() == [0, 200, 301, 401, 402]


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([[True, True, False], [True, False, False]], TypeError, "got torch.bool: for a mask .* unpad_input"),
        ([[2, 2, 0], [1, 0, 0]], ValueError, r"at most seqlen = 3 in each row, got in row 0 list \[2, 2, 0\]"),
        ([[3, 0, 0], [4, -1, 0]], ValueError, r"whole numbers.* got in row 1 list \[4, -1, 0\]"),
        ([[1.5, 1.5, 0.0], [1.0, 0.0, 0.0]], ValueError, r"whole numbers.* got in row 0 list \[1.5, 1.5, 0.0\]"),
        ([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]], ValueError, r"got in row 0 list \[0.0, 0.0, -inf\]"),
        ([[0.0, 0.0, 0.0], [0.0, 0.0, torch.nan]], ValueError, r"got in row 1 list \[0.0, 0.0, nan\]"),
        ([[3, 0, 0]], ValueError, r"shape \(batch_size, seqlen\) = \(2, 3\), got \(1, 3\)"),
        ([3, 1], ValueError, r"shape \(batch_size, seqlen\) = \(2, 3\), got \(2,\)"),
        ([[[[3, 0, 0]]], [[[1, 0, 0]]]], ValueError, r"got \(2, 1, 1, 3\)"),
    ],
)
def test_lengths_that_no_row_can_hold_are_refused(lengths, error, message):
    function, argument = "unpad_input_for_concatenated_sequences", "attention_mask_in_length"
    with pytest.raises(error, match=rf"{function}: {argument}: expected .*{message}"):
        unpad_input_for_concatenated_sequences(torch.zeros(2, 3, 4), torch.tensor(lengths))
