"""The packed functions of version 1: their arguments, and the causal mask that is aligned top-left."""

import pytest
import torch

from flash_attn import flash_attn_varlen_func
from flash_attn.flash_attn_interface import (
    flash_attn_unpadded_func,
    flash_attn_unpadded_kvpacked_func,
    flash_attn_unpadded_qkvpacked_func,
)
from plain_attention import assert_near, assert_same, attention, gradients, leaves

H, HK, D = 4, 2, 8
CU_Q, CU_K = torch.tensor([0, 3, 3, 10], dtype=torch.int32), torch.tensor([0, 5, 8, 12], dtype=torch.int32)


def v1_call(layout, cu_q, cu_k):
    """The function, its leaves and arguments before the options."""
    q, k, v = leaves((int(cu_q[-1]), H, D), *[(int(cu_k[-1]), H if layout == "qkv" else HK, D)] * 2)
    if layout == "separate":
        return flash_attn_unpadded_func, [q, k, v], (q, k, v, cu_q, cu_k, 7, 7)
    if layout == "kv":
        kv = torch.stack([k, v], 1).detach().requires_grad_()
        return flash_attn_unpadded_kvpacked_func, [q, kv], (q, kv, cu_q, cu_k, 7, 7)
    qkv = torch.stack([q, k, v], 1).detach().requires_grad_()
    return flash_attn_unpadded_qkvpacked_func, [qkv], (qkv, cu_q, 7)


def plain_v1(q, k, v, cu_q, cu_k, causal, scale):
    """Attention of one sequence after another, the causal mask aligned top-left."""
    outs = []
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        keep = torch.ones(cu_q[b + 1] - cu_q[b], cu_k[b + 1] - cu_k[b], dtype=torch.bool)
        keep = keep.tril() if causal else keep
        outs.append(attention(q[None, rows], k[None, keys], v[None, keys], keep=keep, scale=scale)[0][0])
    return torch.cat(outs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("layout", "cu_k"),
    [("separate", CU_Q), ("separate", CU_Q.clone()), ("separate", CU_K), ("kv", CU_Q), ("kv", CU_K), ("qkv", CU_Q)],
)
def test_functions_of_version_1(layout, cu_k, causal):
    function, inputs, head = v1_call(layout, CU_Q, cu_k)
    out = function(*head, 0.0, 0.4, causal)
    parts = {"separate": inputs, "kv": [inputs[0], *inputs[-1].unbind(1)], "qkv": inputs[0].unbind(1)}[layout]
    expected = plain_v1(*parts, CU_Q, cu_k, causal, 0.4)
    assert_near([out], [expected])
    assert_near(gradients(out, inputs), gradients(expected, inputs))


def test_results_of_version_1():
    function, _, head = v1_call("separate", CU_Q, CU_K)
    torch.manual_seed(1)
    found = function(*head, 0.3, None, False, True, True)
    torch.manual_seed(1)
    expected = flash_attn_varlen_func(*head, 0.3, return_attn_probs=True, deterministic=True)
    assert_same(found, expected)
    with pytest.raises(TypeError, match=r"flash_attn_unpadded_func: causal: expected bool, got str 'no'"):
        function(*head, 0.0, None, "no")


def test_the_dropout_mask_of_version_1_is_independent_of_the_alignment():
    function, _, head = v1_call("separate", CU_Q, CU_K)
    torch.manual_seed(1)
    probs = function(*head, 0.5, None, True, True)[2]
    sees = torch.ones(7, 7, dtype=torch.bool).tril()
    assert not probs[..., ~sees].any()
    assert probs[0, :, 2, :3].all()
