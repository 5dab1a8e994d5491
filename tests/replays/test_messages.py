"""Calls that cannot work raise a one-line error with the remedy, instead of an error from inside.

Public threads: pytorch/pytorch#110669, bowang-lab/scGPT#4, Dao-AILab/flash-attention#80, Dao-AILab/flash-attention#431
"""

import io
import warnings

import pytest
import torch

import flash_attn
from flash_attn.flash_attention import FlashAttention, FlashMHA
from flash_attn.modules.mha import MHA
from plain_attention import assert_near

EMBED, HEADS = 16, 2
LAYOUTS = [torch.strided, torch.jagged]
pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")


def nested(layout, *shape):
    return torch.nested.nested_tensor([torch.ones(2, *shape), torch.ones(3, *shape)], layout=layout)


def explains(call, start, *words):
    with pytest.raises(TypeError) as error:
        call()
    text = str(error.value)
    assert text.startswith(start), text
    for word in words:
        assert word in text, text


NESTED_CALLS = {
    "flash_attn_func": (lambda x: flash_attn.flash_attn_func(x, x, x), (1, 8)),
    "flash_attn_qkvpacked_func": (lambda x: flash_attn.flash_attn_qkvpacked_func(x), (3, 1, 8)),
    "flash_attn_kvpacked_func": (lambda x: flash_attn.flash_attn_kvpacked_func(torch.ones(2, 3, 1, 8), x), (2, 1, 8)),
    "FlashMHA": (lambda x: FlashMHA(EMBED, HEADS)(x), (EMBED,)),
    "MHA": (lambda x: MHA(EMBED, HEADS)(x), (EMBED,)),
    "FlashAttention": (lambda x: FlashAttention()(x, torch.ones(2, 3, dtype=torch.bool)), (3, 1, 8)),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", NESTED_CALLS)
def test_nested_tensors(name, layout):
    call, shape = NESTED_CALLS[name]
    remedy = "flash_attn_varlen_func" if name.startswith("flash") else "key_padding_mask"
    explains(lambda: call(nested(layout, *shape)), f"{name}: ", "expected a dense tensor", remedy, "a nested tensor")


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn], ids=["sparse", "mkldnn"])
def test_sparse_tensors(make):
    x = make(torch.ones(1, 3, 1, 8))
    explains(
        lambda: flash_attn.flash_attn_func(x, x, x),
        "flash_attn_func: 3 problems",
        "q: expected a dense",
        "layout torch.",
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("masks", [{}, {"src_key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}], ids=["", "mask"])
def test_in_the_place_of_multihead_attention(masks, grad, training):
    """torch's encoder layer calls attn(x, x, x, attn_mask=..., ...), with True = padding: it must be rejected."""
    layer = torch.nn.TransformerEncoderLayer(EMBED, HEADS, batch_first=True)
    layer.self_attn = FlashMHA(EMBED, HEADS)
    layer.train(training)
    with torch.set_grad_enabled(grad):
        explains(
            lambda: layer(torch.ones(2, 5, EMBED), **masks), "FlashMHA: expected self-attention", "attn(x)",
            "True = keep", "torch.nn.MultiheadAttention",
        )  # fmt: skip


def test_keywords_of_multihead_attention():
    x, module = torch.ones(2, 5, EMBED), FlashMHA(EMBED, HEADS)
    for call in (lambda: module(x, x, x), lambda: module(x, attn_mask=None), lambda: module(x, is_causal=True)):
        explains(call, "FlashMHA: expected self-attention", "attn(x, key_padding_mask=mask)")
    hooked = []
    module.register_forward_hook(lambda *_: hooked.append(True))
    module(x=x, key_padding_mask=None, need_weights=False)
    assert hooked == [True]


class Traced(torch.nn.Module):
    """A module from one tensor to one tensor."""

    def __init__(self, **options):
        super().__init__()
        self.attn = MHA(EMBED, HEADS, use_flash_attn=True, **options)

    def forward(self, x):
        return self.attn(x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated.*:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"rotary_emb_dim": 8, "use_alibi": True, "num_heads_kv": 1}], ids=str)
def test_jit_trace(options):
    """With and without gradients: the traced module can be saved, and trains like the original."""
    module, x = Traced(causal=True, **options), torch.randn(2, 5, EMBED)
    parameters = list(module.parameters())
    for needs_grad in (False, True):
        with torch.set_grad_enabled(needs_grad), warnings.catch_warnings():
            warnings.filterwarnings("error", message="flash_attn:.*")
            traced = torch.jit.trace(module, x, check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        assert_near([loaded(x).detach()], [module(x).detach()], atol=1e-6)
        expected = torch.autograd.grad(module(x).sum(), parameters)
        assert_near(torch.autograd.grad(traced(x).sum(), parameters), expected, atol=1e-6)
        names = dict(loaded.named_parameters())
        loaded_parameters = [names[name] for name, _ in module.named_parameters()]
        assert_near(torch.autograd.grad(loaded(x).sum(), loaded_parameters), expected, atol=1e-6)


def test_nothing_is_left_on_the_meta_device():
    """load_state_dict(assign=True) materialises everything that a model has."""
    state = MHA(EMBED, HEADS, rotary_emb_dim=8, use_alibi=True).state_dict()
    with torch.device("meta"):
        module = MHA(EMBED, HEADS, rotary_emb_dim=8, use_alibi=True)
    module.load_state_dict(state, assign=True)
    assert not any(x.is_meta for x in (*module.parameters(), *module.buffers()))
    assert torch.isfinite(module.to("cpu")(torch.ones(1, 3, EMBED))).all()
