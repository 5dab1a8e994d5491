"""Values computed in __init__ must survive how models are built, loaded, cast and moved.

Loaders build a model on the meta device, assign the checkpoint, and allocate the rest: rotary frequencies and ALiBi
slopes were buffers, and ended up uninitialised or in bfloat16. With the real transformers: tests/integrations.

Public threads: huggingface/transformers#48892, huggingface/transformers#45902, Dao-AILab/flash-attention#845
"""

import copy
import io
import pickle

import pytest
import torch

from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from plain_attention import assert_near, assert_same, gradients, leaves

EMBED, HEADS = 16, 2
KINDS = {
    "rotary": {"rotary_emb_dim": 8},
    "xPos": {"rotary_emb_dim": 8, "rotary_emb_scale_base": 512.0},
    "ALiBi": {"use_alibi": True},
    "ALiBi, GQA, rotary": {"use_alibi": True, "num_heads_kv": 1, "rotary_emb_dim": 4},
}


def build(kind, use_flash_attn=True, **kwargs):
    torch.manual_seed(4)
    return MHA(EMBED, HEADS, use_flash_attn=use_flash_attn, **KINDS[kind], **kwargs)


def in_model(module):
    return torch.nn.Sequential(torch.nn.Linear(EMBED, EMBED), module)


def fill_buffers(model):
    """As loaders do: replace every buffer by memory with arbitrary contents."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.full_like(buffer, 7.0, device="cpu")


def assigned(make, state):
    """Built on meta, parameters assigned, buffers replaced."""
    with torch.device("meta"):
        model = make()
    fill_buffers(model)
    model.load_state_dict(state, assign=True)
    return model


def emptied(make, state):
    """Moved off the meta device as a whole, then loaded."""
    model = make().to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    return model


def emptied_one_by_one(make, state):
    with torch.device("meta"):
        model = make()
    for module in model.modules():
        module.to_empty(device="cpu", recurse=False)
    fill_buffers(model)
    model.load_state_dict(state)
    return model


def unpickled(make, state):
    model = pickle.loads(pickle.dumps(make()))
    model.load_state_dict(state)
    return model


def saved_whole(make, state):
    file = io.BytesIO()
    model = make()
    model.load_state_dict(state)
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def cast_and_back(make, state):
    """Values that a cast would round are unchanged; parameters are loaded again."""
    model = make().bfloat16().half().float()
    model.load_state_dict(state)
    return model


def under_another_default(make, state):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = make()
    finally:
        torch.set_default_dtype(before)
    model.float().load_state_dict(state)
    return model


LOADERS = [assigned, emptied, emptied_one_by_one, unpickled, saved_whole, cast_and_back, under_another_default]


@pytest.mark.parametrize("use_flash_attn", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
def test_loaded_module_computes_the_same(loader, kind, use_flash_attn):
    module = in_model(build(kind, use_flash_attn))
    loaded = loader(lambda: in_model(build(kind, use_flash_attn)), module.state_dict())
    (x,) = leaves((2, 7, EMBED), dtype=torch.float32)
    found = []
    for each in (module, loaded, copy.deepcopy(loaded)):
        out = each(x)
        found.append([out, *gradients(out, (x, *each.parameters()))])
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("use_flash_attn", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_module_in_bfloat16(kind, use_flash_attn):
    """Built in, or cast to, bfloat16: angles and slopes stay those of float32."""
    exact = build(kind, use_flash_attn, dtype=torch.float64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        built = build(kind, use_flash_attn)
    finally:
        torch.set_default_dtype(before)
    built.load_state_dict(exact.state_dict())
    exact.load_state_dict(built.state_dict())
    (x,) = leaves((1, 600, EMBED), dtype=torch.bfloat16)
    expected = exact(x.double())
    for module in (built, copy.deepcopy(exact).bfloat16()):
        assert_near([module(x)], [expected], atol=0.03)


@pytest.mark.parametrize("device", [None, "meta"])
def test_frequencies_and_slopes_can_be_read(device):
    module = MHA(EMBED, HEADS, rotary_emb_dim=8, rotary_emb_scale_base=64.0, use_alibi=True, device=device)
    assert list(module.buffers()) == []
    assert_near([module.rotary_emb.inv_freq], [torch.tensor([1.0, 0.1, 0.01, 0.001])], atol=1e-8)
    assert_near([module.rotary_emb.scale], [(torch.arange(0, 8, 2) + 3.2) / 11.2], atol=1e-7)
    for inner in (module.inner_attn, module.inner_cross_attn):
        assert inner.alibi_slopes.dtype == torch.float32
        assert inner.alibi_slopes.tolist() == get_alibi_slopes(HEADS) == [0.0625, 0.00390625]


def test_frequencies_can_be_assigned():
    """As in code that rescales the positions of a trained model; also before leaving the meta device."""
    module, other = build("rotary"), build("rotary")
    (x,) = leaves((2, 7, EMBED), dtype=torch.float32)
    module(x)
    module.rotary_emb.inv_freq = module.rotary_emb.inv_freq / 4
    other.rotary_emb.base = 10000.0
    other.rotary_emb._compute_inv_freq = lambda device=None, **_: RotaryEmbedding(8).inv_freq.to(device) / 4
    assert_same([module(x), copy.deepcopy(module)(x)], [other(x)] * 2)
    assert not torch.equal(module(x), build("rotary")(x))


INNER = (FlashSelfAttention, SelfAttention, FlashCrossAttention, CrossAttention)


@pytest.mark.parametrize("kind", INNER)
@pytest.mark.parametrize("shape", [(HEADS,), (2, HEADS)], ids=str)
def test_slopes_that_are_given(kind, shape):
    """As a tensor of any dtype, per head or per batch entry and head, or as numbers; also assigned later."""
    slopes = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape) / 8
    (q, kv) = leaves((2, 5, HEADS, 8), (2, 5, 2, HEADS, 8), dtype=torch.float32)
    inputs = (torch.cat([q[:, :, None], kv], dim=2),) if "Self" in kind.__name__ else (q, kv)
    expected = kind(alibi_slopes=slopes)(*inputs)
    later = kind(alibi_slopes=slopes * 2)
    later.alibi_slopes = slopes
    for module in (kind(alibi_slopes=slopes.bfloat16()).half(), later):
        assert_same([module(*inputs), module.alibi_slopes], [expected, slopes])
    if len(shape) == 1:
        assert_same([kind(alibi_slopes=slopes.tolist())(*inputs)], [expected])
    assert not torch.equal(kind()(*inputs), expected)


@pytest.mark.parametrize("kind", INNER)
def test_slopes_without_values_say_so(kind):
    module = kind(alibi_slopes=torch.empty(HEADS, device="meta"))
    assert module.alibi_slopes.is_meta
    inputs = (torch.zeros(1, 3, 3, HEADS, 8),)
    if "Cross" in kind.__name__:
        inputs = (torch.zeros(1, 3, HEADS, 8), torch.zeros(1, 3, 2, HEADS, 8))
    assert module(*(x.to("meta") for x in inputs)).is_meta
    with pytest.raises(ValueError, match=f"{kind.__name__}: alibi_slopes: expected numbers .*, got .* meta device"):
        module(*inputs)
    with pytest.raises(ValueError, match="alibi_slopes: expected slopes that do not require grad"):
        kind(alibi_slopes=torch.nn.Parameter(torch.ones(HEADS)))
