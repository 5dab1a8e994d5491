"""MHA and FlashMHA with sinks=True, on every path of theirs, against plain attention in float64."""

import pytest
import torch
import torch.nn.functional as F

import plain_sinks
from decoding import BATCH, EMBED, HEAD_DIM, HEADS, SEQLEN, make, one_pass, params_of, run, tokens
from flash_attn.flash_attention import FlashMHA
from flash_attn.modules.mha import MHA
from plain_attention import alibi_bias, assert_near, assert_same, gradients, leaves, visible

S_AUX = torch.tensor([0.5, -3.0, 2.0, 1.0], dtype=torch.float64)
SLOPES = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625])
MASK = torch.arange(SEQLEN) < torch.tensor([[9], [4], [0]])
OPTIONS = {
    "causal": {},
    "not causal": {"causal": False},
    "GQA": {"num_heads_kv": 2},
    "window": {"window_size": (2, 0)},
    "ALiBi": {"use_alibi": True},
    "checkpointing": {"checkpointing": True},
    "cross": {"cross_attn": True, "causal": False},
    "cross, window": {"cross_attn": True, "num_heads_kv": 2, "window_size": (3, 0)},
}
with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
with_backends = pytest.mark.parametrize("use_flash_attn", [True, False], ids=["flash", "torch"])


def with_sinks(use_flash_attn, **options):
    module = make(use_flash_attn, sinks=True, **options)
    with torch.no_grad():
        module.s_aux.copy_(S_AUX)
    return module


def project(module, x):
    """q, k and v of the parameters of MHA or FlashMHA."""
    if isinstance(module, FlashMHA):
        return module.Wqkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
    heads_kv = module.num_heads_kv
    if module.cross_attn:
        return module.Wq(x).unflatten(-1, (HEADS, HEAD_DIM)), *module.Wkv(x).unflatten(-1, (2, heads_kv, -1)).unbind(2)
    return module.Wqkv(x).unflatten(-1, (HEADS + 2 * heads_kv, HEAD_DIM)).split([HEADS, heads_kv, heads_kv], dim=2)


def plain(module, x, mask, is_self, options):
    keep = visible(SEQLEN, SEQLEN, module.causal, options.get("window_size", (-1, -1))).expand(BATCH, 1, -1, -1)
    if mask is not None:
        keep = keep & mask[:, None, None, :]
    bias = alibi_bias(SLOPES, SEQLEN, SEQLEN) if options.get("use_alibi") else None
    out, _ = plain_sinks.attention(*project(module, x), module.s_aux, keep, bias)
    if mask is not None and is_self:
        out = out.masked_fill(~mask[..., None, None], 0)
    return module.out_proj(out.flatten(2))


@with_options
@with_backends
@pytest.mark.parametrize("mask", [None, MASK, MASK.flip(1)], ids=["dense", "padded on the right", "padded on the left"])
def test_mha(use_flash_attn, options, mask):
    module = with_sinks(use_flash_attn, **options)
    (x,) = leaves((BATCH, SEQLEN, EMBED))
    out = module(x, key_padding_mask=mask)
    expected = plain(module, x, mask, not module.cross_attn, options)
    wanted = (x, *module.parameters())
    assert any(parameter is module.s_aux for parameter in wanted[1:])
    assert_near([out, *gradients(out, wanted)], [expected, *gradients(expected, wanted)])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, MASK], ids=["dense", "padded"])
def test_flash_mha(mask, causal):
    torch.manual_seed(4)
    module = FlashMHA(EMBED, HEADS, causal=causal, dtype=torch.float64, sinks=True)
    with torch.no_grad():
        module.s_aux.copy_(S_AUX)
    (x,) = leaves((BATCH, SEQLEN, EMBED))
    out, _ = module(x, key_padding_mask=mask)
    expected = plain(module, x, mask, True, {})
    wanted = (x, *module.parameters())
    assert_near([out, *gradients(out, wanted)], [expected, *gradients(expected, wanted)])


def test_packed_sequences():
    module = with_sinks(True)
    (x,) = leaves((BATCH, SEQLEN, EMBED))
    cu_seqlens = torch.arange(BATCH + 1, dtype=torch.int32) * SEQLEN
    out = module(x.flatten(0, 1), cu_seqlens=cu_seqlens, max_seqlen=SEQLEN)
    assert_near([out.unflatten(0, (BATCH, SEQLEN))], [module(x)])


CACHED = {name: options for name, options in OPTIONS.items() if "cross" not in name and name != "checkpointing"}
PADDING = {
    "none": None,
    "on the left": torch.arange(SEQLEN) >= torch.tensor([[3], [0], [5]]),
    "holes": torch.arange(SEQLEN) % 3 != torch.tensor([[0], [1], [1]]),
}


@pytest.mark.parametrize("mask", PADDING.values(), ids=PADDING)
@pytest.mark.parametrize("steps", [(6, 1, 2), (1,) * SEQLEN], ids=["prefill and decode", "token by token"])
@pytest.mark.parametrize("options", CACHED.values(), ids=CACHED)
@with_backends
def test_steps_equal_one_pass(use_flash_attn, options, steps, mask):
    module, x = with_sinks(use_flash_attn, **options), tokens()
    with torch.no_grad():
        found = run(module, x, steps, params_of(module), mask)
        assert_near([found], [one_pass(module, x, steps, mask)], atol=1e-12)
        module.s_aux.fill_(-torch.inf)
        assert (run(module, x, steps, params_of(module), mask) - found).abs().max() > 1e-3, "the sinks matter"


def test_a_cache_passes_no_gradients_to_sinks():
    module, x = with_sinks(True), tokens()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter is module.s_aux)
    with pytest.raises(ValueError, match=r"^MHA: inference_params: expected None unless in torch.no_grad"):
        module(x, inference_params=params_of(module))


MODULES = {
    "MHA": lambda **options: MHA(EMBED, HEADS, use_flash_attn=True, **options),
    "MHA in torch": lambda **options: MHA(EMBED, HEADS, **options),
    "FlashMHA": lambda **options: FlashMHA(EMBED, HEADS, **options),
}
with_modules = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)


@with_modules
def test_the_parameter_is_there_only_if_asked_for(build):
    """It starts at 0 and draws no random numbers: all other weights are those of the module without."""
    states = []
    for options in ({}, {"sinks": True}):
        torch.manual_seed(0)
        states.append(build(**options).state_dict())
    s_aux = states[1].pop("s_aux")
    assert (s_aux.shape, s_aux.abs().sum()) == ((HEADS,), 0)
    assert list(states[0]) == list(states[1])
    assert_same(states[0].values(), states[1].values())
    assert build().s_aux is None
    assert build(sinks=True, dtype=torch.bfloat16, device="meta").s_aux.dtype == torch.bfloat16


@with_modules
@pytest.mark.parametrize("value", [-torch.inf, -1e4])
def test_no_weight_for_the_sink_is_no_sink(build, value):
    torch.manual_seed(0)
    module = build(sinks=True)
    (x,) = leaves((BATCH, SEQLEN, EMBED), dtype=torch.float32)
    with torch.no_grad():
        module.s_aux.fill_(value)
    out = module(x)
    module.s_aux = None
    for found, expected in zip(*(x if isinstance(x, tuple) else (x,) for x in (out, module(x))), strict=True):
        assert found is expected is None or torch.allclose(found, expected, atol=1e-6)


@with_modules
def test_compile_and_training(build):
    """Under torch.compile and autocast; the sinks are learned."""
    torch.compiler.reset()
    module = build(sinks=True)
    (x,) = leaves((BATCH, SEQLEN, EMBED), dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        results = []
        for function in (module, compiled):
            module.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = function(x)
            out = out[0] if isinstance(out, tuple) else out
            F.mse_loss(out.float(), torch.ones_like(x)).backward()
            results.append([out, *(parameter.grad for parameter in module.parameters())])
            assert module.s_aux.grad.abs().min() > 0
            assert module.s_aux.grad.dtype == torch.float32
        assert_same(*results)
