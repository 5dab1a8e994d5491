"""float64 gradients against finite differences, through out and softmax_lse, for every feature."""

import pytest
import torch
from torch.autograd import gradcheck

import flash_attn

FEATURES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "left window": {"window_size": (2, -1)},
    "causal window": {"causal": True, "window_size": (4, -1)},
    "softcap": {"softcap": 0.8},
    "scale": {"softmax_scale": 1.3},
    "dropout": {"dropout_p": 0.3},
    "alibi": {"alibi": "heads"},
    "alibi of a batch": {"alibi": "batch", "causal": True},
    "sinks": {"s_aux": True},
    "sinks, causal": {"s_aux": True, "causal": True},
    "sinks, dropout": {"s_aux": True, "dropout_p": 0.3},
    "key ranges": {"key_ranges": True},
    "everything": {
        "causal": True, "window_size": (5, -1), "softcap": 1.5, "softmax_scale": 0.7, "dropout_p": 0.25,
        "alibi": "batch",
    },
    "everything with sinks": {
        "window_size": (5, 2), "softcap": 1.5, "softmax_scale": 0.7, "dropout_p": 0.25, "alibi": "batch", "s_aux": True,
        "key_ranges": True,
    },
}  # fmt: skip


def options_of(feature, batch_size, num_heads, rows=()):
    """The options of a feature, and the sinks, which are an input. rows: dimensions of the queries."""
    options = dict(FEATURES[feature])
    sinks = [torch.randn(num_heads, dtype=torch.float64, requires_grad=True)] if options.pop("s_aux", False) else []
    if options.pop("key_ranges", False):
        begin = torch.randint(-1, 3, rows)
        options["key_ranges"] = torch.stack([begin, begin + torch.randint(0, 5, rows)], -1).int()
    alibi = options.pop("alibi", "")
    if alibi:
        shape = (num_heads,) if alibi == "heads" else (batch_size, num_heads)
        options["alibi_slopes"] = torch.rand(shape) * 0.5
    return options, sinks


def rows(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def seeded(function, num_inputs, *args, **options):
    """(out, finite part of softmax_lse) with the same dropout mask every time. args: the inputs, and perhaps sinks."""
    torch.manual_seed(11)
    inputs, sinks = args[:num_inputs], args[num_inputs:]
    if sinks:
        options["s_aux"] = sinks[0]
    out, lse, _ = function(*inputs, **options, return_attn_probs=True)
    return out, lse.masked_fill(torch.isneginf(lse.detach()), 0.0)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("lengths", [(4, 7), (7, 4)], ids=str)
def test_dense(feature, lengths):
    options, sinks = options_of(feature, 2, 2, (2, lengths[0]))
    q, k, v = rows(2, lengths[0], 2, 3), rows(2, lengths[1], 1, 3), rows(2, lengths[1], 1, 2)
    assert gradcheck(lambda *x: seeded(flash_attn.flash_attn_func, 3, *x, **options), (q, k, v, *sinks))


@pytest.mark.parametrize("feature", FEATURES)
def test_varlen(feature):
    options, sinks = options_of(feature, 4, 2, (10,))
    q, k, v = rows(10, 2, 2), rows(11, 1, 2), rows(11, 1, 3)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 0, 3, 4, 9], [0, 2, 2, 6, 10]))

    def run(q, k, v, *sinks):
        return seeded(flash_attn.flash_attn_varlen_func, 7, q, k, v, cu_q, cu_k, 5, 4, *sinks, **options)

    assert gradcheck(run, (q, k, v, *sinks))


@pytest.mark.parametrize("feature", ["full", "causal", "everything", "sinks", "sinks, dropout"])
def test_packed_inputs(feature):
    options, sinks = options_of(feature, 2, 2)
    q, kv, qkv = rows(2, 3, 2, 2), rows(2, 4, 2, 2, 2), rows(2, 3, 3, 2, 2)
    assert gradcheck(lambda *x: seeded(flash_attn.flash_attn_kvpacked_func, 2, *x, **options), (q, kv, *sinks))
    assert gradcheck(lambda *x: seeded(flash_attn.flash_attn_qkvpacked_func, 1, *x, **options), (qkv, *sinks))


def test_tiles_larger_than_one():
    """A few random directions through sequences of several tiles."""
    q, k, v = rows(1, 150, 2, 8), rows(1, 290, 1, 8), rows(1, 290, 1, 8)

    def run(*x):
        return seeded(flash_attn.flash_attn_func, 3, *x, causal=True, window_size=(140, -1), softcap=2.0)

    assert gradcheck(run, (q, k, v), fast_mode=True)
