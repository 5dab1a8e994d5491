"""bert_padding: between padded batches and rows without padding."""

import re

import pytest
import torch

from flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from plain_attention import gradients, leaves

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
