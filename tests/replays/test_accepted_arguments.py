"""Arguments that 2.8.3 accepts, in the forms that programs use, and that this package once rejected.

Public threads: huggingface/transformers#29075, Dao-AILab/flash-attention#487
"""

import numpy as np
import pytest
import torch

import flash_attn
from flash_attn import flash_attn_interface as interface
from flash_attn.flash_attention import FlashAttention
from flash_attn.modules.mha import FlashSelfAttention
from plain_attention import assert_same, leaves

FORMS = {
    # argument, value: equivalent forms
    "softmax_scale": (
        0.5,
        [torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16), np.float32(0.5), np.array(0.5)],
    ),
    "softcap": (2.0, [torch.tensor(2.0), torch.tensor(2), 2, np.float64(2)]),
    "dropout_p": (0.25, [torch.tensor(0.25), np.float16(0.25), np.array(0.25)]),
    "causal": (True, [torch.tensor(True), 1, np.bool_(True), np.array(True), torch.tensor(1)]),
    "window_size": ((2, 1), [[2, 1], torch.tensor([2, 1]), np.array([2, 1]), (torch.tensor(2), np.int64(1))]),
    "deterministic": (True, [1, np.bool_(True)]),
}
CASES = [(name, right, form) for name, (right, forms) in FORMS.items() for form in forms]


@pytest.mark.parametrize(("name", "right", "form"), CASES, ids=[f"{n}-{f!r}" for n, _, f in CASES])
def test_forms_of_numbers(name, right, form):
    (qkv,) = leaves((1, 6, 3, 2, 8))
    flat, cu = qkv.flatten(0, 1), torch.tensor([0, 2, 6], dtype=torch.int32)
    for call in (
        lambda **o: flash_attn.flash_attn_func(*qkv.unbind(2), **o),
        lambda **o: flash_attn.flash_attn_qkvpacked_func(qkv, **o),
        lambda **o: flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **o),
        lambda **o: flash_attn.flash_attn_varlen_func(*flat.unbind(1), cu, cu, 4, 4, **o),
        lambda **o: flash_attn.flash_attn_varlen_qkvpacked_func(flat, cu, 4, **o),
        lambda **o: flash_attn.flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, 4, 4, **o),
    ):
        found = []
        for value in (right, form):
            torch.manual_seed(2)
            out = call(**{name: value})
            found.append([out, *torch.autograd.grad(out.sum(), qkv)])
        assert_same(found[1], found[0])


@pytest.mark.parametrize("form", [torch.tensor(0.5), np.float32(0.5)], ids=repr)
def test_scales_of_modules(form):
    (qkv,) = leaves((1, 6, 3, 2, 8))
    assert_same([FlashAttention(softmax_scale=form)(qkv)[0]], [FlashAttention(softmax_scale=0.5)(qkv)[0]])
    assert_same([FlashSelfAttention(softmax_scale=form)(qkv)], [FlashSelfAttention(softmax_scale=0.5)(qkv)])


@pytest.mark.parametrize("name", ["softmax_scale", "softcap", "dropout_p"])
def test_numbers_that_want_gradients_are_refused(name):
    """They would silently get no gradient."""
    (qkv,) = leaves((1, 6, 3, 2, 8))
    with pytest.raises(TypeError, match=f"{name}: expected float"):
        flash_attn.flash_attn_qkvpacked_func(qkv, **{name: torch.tensor(0.5, requires_grad=True)})


@pytest.mark.parametrize("form", [torch.tensor(4), torch.tensor(4, dtype=torch.int32), np.int32(4)], ids=repr)
def test_longest_lengths(form):
    (qkv,) = leaves((6, 3, 2, 8))
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    expected = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 4)
    assert_same([flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, form)], [expected])
    out, *_ = interface._flash_attn_varlen_forward(*qkv.unbind(1), cu, cu, form, form, 0.0, None, False)
    assert_same([out], [expected])


OFF = {
    "any negative width is none": ({"window_size": (-5, 3)}, {"window_size": (-1, 3)}),
    "on both sides": ({"window_size": (-2, -7)}, {}),
    "of a causal call": ({"window_size": (2, -9), "causal": True}, {"window_size": (2, 0)}),
    "softcap below 0": ({"softcap": -1.0}, {}),
    "softcap of -0": ({"softcap": -0.0}, {}),
}


@pytest.mark.parametrize(("given", "same"), OFF.values(), ids=OFF)
def test_what_switches_an_option_off(given, same):
    q, k, v = leaves((1, 5, 2, 8), (1, 7, 2, 8), (1, 7, 2, 8))
    found = []
    for options in (given, same):
        out, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **options)
        found.append([out, lse, *torch.autograd.grad(out.sum() + lse.sum(), [q, k, v])])
    assert_same(found[0], found[1])


def test_keys_of_which_none_are_left():
    """Negative seqused_k, or leftpad_k beyond the last key: out is 0, softmax_lse -inf."""
    q, k = torch.randn(2, 3, 2, 8), torch.randn(2, 4, 2, 8)
    for seqused, leftpad in (((4, -1), (0, 0)), ((4, 2), (0, 3)), ((4, 4), (0, 4))):
        out, lse, _ = torch.ops.flash_attn.fwd(
            q, k, k, seqused_k=torch.tensor(seqused, dtype=torch.int32),
            leftpad_k=torch.tensor(leftpad, dtype=torch.int32),
        )  # fmt: skip
        assert_same([out[:1]], [flash_attn.flash_attn_func(q[:1], k[:1], k[:1])])
        assert (out[1] == 0).all()
        assert torch.isneginf(lse[1]).all()
