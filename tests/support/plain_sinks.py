"""Plain attention with sinks, and the key ranges that users make."""

import torch

import plain_attention


def attention(q, k, v, s_aux, keep=None, bias=None, dropped=None, **options):
    """plain_attention.attention with s_aux, (num_heads,).

    A sink is one more key, which all queries see: its value is 0, and so is its product, to which s_aux is added.
    """
    batch_size, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    whole = (batch_size, q.shape[2], seqlen_q, seqlen_k)
    k, v = (torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (k, v))
    if keep is not None:
        keep = _widened(keep.expand(whole), True)
    if dropped is not None:
        dropped = _widened(dropped, False)
    zeros = q.new_zeros(whole)
    of_keys = zeros if bias is None else zeros + bias
    bias = torch.cat([of_keys, s_aux.to(q.dtype)[:, None, None].expand(*whole[:3], 1)], -1)
    return plain_attention.attention(q, k, v, keep, bias, dropped=dropped, **options)


def _widened(x, value):
    return torch.cat([x, torch.full_like(x[..., :1], value)], -1)


def prefix_ranges(seqlen_q, seqlen_k, prefix):
    """(seqlen_q, 2): a query sees the prefix and all keys up to its position."""
    end = (torch.arange(seqlen_q) + 1 + seqlen_k - seqlen_q).clamp(min=prefix)
    return torch.stack([torch.zeros_like(end), end], -1).to(torch.int32)


def strange_ranges(seqlen_q):
    """(seqlen_q, 2): empty, reversed, and past both ends, in turn."""
    limit = 2**31 - 1
    pairs = [(2, 2), (4, 1), (-3, 2), (3, 99), (-limit - 1, limit), (limit, -limit - 1), (1, 3)]
    return torch.tensor([pairs[i % len(pairs)] for i in range(seqlen_q)], dtype=torch.int32)


def seen(key_ranges, seqlen_k):
    """Bool (..., seqlen_q, seqlen_k): the keys in the range of each query."""
    key = torch.arange(seqlen_k)
    return (key >= key_ranges[..., :1]) & (key < key_ranges[..., 1:])
