"""Users' calls of the padding helpers that were rejected although 2.8.3 accepts them, or silently misread.

Two kinds of failures. A helper stricter than the original: a model fails in the middle of a run with an error about the
dtype of an index. And additive masks, 0 for tokens to keep and a large negative number for others: read as a mask of 1
and 0, they keep the padding and drop the text without any error.

Public threads: verl-project/verl#7098, nishide-dev/unturtle#56
"""

import pytest
import torch

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from plain_attention import assert_near, assert_same, leaves

BATCH, CACHED, HEADS, HEAD_DIM = 3, 5, 2, 8
KEEP = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])  # left padding


def attention_by_sequence(q, k, v):
    """Attention of each sequence alone, without padding."""
    rows = [flash_attn_func(q[i : i + 1], k[i : i + 1, keep], v[i : i + 1, keep]) for i, keep in enumerate(KEEP.bool())]
    return torch.cat(rows)


def test_decoding_one_token_per_sequence():
    """As in generate(): cumulative lengths of the queries, int32, without the last, serve as their row indices."""
    q, k, v = leaves((BATCH, 1, HEADS, HEAD_DIM), *[(BATCH, CACHED, HEADS, HEAD_DIM)] * 2)
    expected = attention_by_sequence(q, k, v)
    packed_k, indices_k, cu_seqlens_k, max_seqlen_k, _ = unpad_input(k, KEEP)
    packed_v = index_first_axis(v.flatten(0, 1), indices_k.int())
    cu_seqlens_q = torch.arange(BATCH + 1, dtype=torch.int32)
    out = flash_attn_varlen_func(q.squeeze(1), packed_k, packed_v, cu_seqlens_q, cu_seqlens_k, 1, max_seqlen_k)
    padded = pad_input(out, cu_seqlens_q[:-1], BATCH, 1)
    assert_near([padded], [expected])
    upstream = torch.ones_like(padded)
    assert_near(
        torch.autograd.grad(padded, [q, k, v], upstream), torch.autograd.grad(expected, [q, k, v], upstream), atol=1e-10
    )


def test_rows_chosen_by_torch_arange():
    indices = torch.arange(BATCH, dtype=torch.int32)
    rows = torch.ones(BATCH, 1)
    assert torch.equal(pad_input(rows, indices, BATCH, 1), rows[:, None])
    assert torch.equal(index_first_axis(rows, indices), rows)


@pytest.mark.parametrize("dropped", [-torch.inf, torch.finfo(torch.float32).min, -10000.0])
def test_additive_mask_is_refused_and_its_message_helps(dropped):
    (x,) = leaves((BATCH, CACHED, HEAD_DIM))
    additive = torch.zeros(BATCH, CACHED).masked_fill(KEEP == 0, dropped)
    with pytest.raises(ValueError, match=r"additive .*pass attention_mask == 0"):
        unpad_input(x, additive)
    assert_same(unpad_input(x, additive == 0)[:3], unpad_input(x, KEEP)[:3])


def test_additive_mask_of_a_batch_without_padding():
    with pytest.raises(ValueError, match=r"additive .*pass attention_mask == 0"):
        unpad_input(torch.zeros(BATCH, CACHED, HEAD_DIM), torch.zeros(BATCH, CACHED))


def test_mask_of_ones_and_zeros_as_floats():
    (x,) = leaves((BATCH, CACHED, HEAD_DIM))
    assert_same(unpad_input(x, KEEP.float())[:3], unpad_input(x, KEEP)[:3])
