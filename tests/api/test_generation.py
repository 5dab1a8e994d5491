"""MHA with a cache of keys and values: prefill, in one step or several, and decoding give the rows of one pass."""

from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from torch._dynamo.testing import CompileCounterWithBackend

from decoding import BATCH, CAPACITY, EMBED, HEAD_DIM, HEADS, MAX_BATCH, SEQLEN, make, one_pass, params_of, run, tokens
from flash_attn.modules.mha import MHA
from flash_attn.utils.generation import InferenceParams
from plain_attention import OpCalls, assert_near, assert_same

OPTIONS = {
    "causal": {},
    "not causal": {"causal": False},
    "scale": {"softmax_scale": 0.9},
    "GQA": {"num_heads_kv": 2},
    "MQA, not causal": {"num_heads_kv": 1, "causal": False},
    "window": {"window_size": (2, 0)},
    "window, not causal": {"window_size": (3, 1), "causal": False},
    "window that looks back": {"window_size": (-1, 0), "causal": False},
    "ALiBi": {"use_alibi": True},
    "ALiBi, GQA, window, not causal": {"use_alibi": True, "num_heads_kv": 2, "causal": False, "window_size": (4, 2)},
    "rotary": {"rotary_emb_dim": HEAD_DIM},
    "rotary, not causal": {"rotary_emb_dim": HEAD_DIM, "causal": False},
    "rotary, window, not causal": {"rotary_emb_dim": HEAD_DIM, "causal": False, "window_size": (3, 1)},
    "rotary in part, interleaved, GQA": {"rotary_emb_dim": 6, "rotary_emb_interleaved": True, "num_heads_kv": 2},
    "rotary, base, ALiBi": {"rotary_emb_dim": 2, "rotary_emb_base": 300.0, "use_alibi": True},
    "xPos": {"rotary_emb_dim": HEAD_DIM, "rotary_emb_scale_base": 8.0},
    "xPos, interleaved, GQA, window": {
        "rotary_emb_dim": 4, "rotary_emb_scale_base": 8.0, "rotary_emb_interleaved": True, "num_heads_kv": 2,
        "window_size": (3, 0),
    },
}  # fmt: skip
# Numbers of tokens of the calls.
STEPS = {"prefill and decode": (6, 1, 1, 1), "token by token": (1,) * SEQLEN, "in chunks": (3, 4, 2)}
with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
with_steps = pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
with_backends = pytest.mark.parametrize("use_flash_attn", [True, False], ids=["flash", "torch"])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def assert_untouched(params, rows):
    """Whatever is outside of the rows of the cache, index of sequences and rows, is NaN as before."""
    cache = params.key_value_memory_dict[0].clone()
    assert not cache[rows].isnan().any()
    cache[rows] = torch.nan
    assert cache.isnan().all()


@with_steps
@with_options
@with_backends
def test_steps_equal_one_pass(use_flash_attn, options, steps):
    module, x = make(use_flash_attn, **options), tokens()
    params = params_of(module)
    assert_near([run(module, x, steps, params)], [one_pass(module, x, steps)], atol=1e-12)
    assert_untouched(params, (slice(0, BATCH), slice(0, SEQLEN)))


DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [OPTIONS[name] for name in OPTIONS if "otary" in name or "xPos" in name], ids=str)
@with_backends
def test_dtypes(use_flash_attn, options, dtype):
    module, x = make(use_flash_attn, dtype, **options), tokens(dtype=dtype)
    steps = STEPS["prefill and decode"]
    out = run(module, x, steps, params_of(module))
    assert out.dtype == dtype
    assert_near([out], [one_pass(module, x, steps)], atol=DTYPES[dtype])


# Of the first six tokens; the three after them are kept.
MASKS = {
    "on the left": [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]],
    "on the right": [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
    "on both sides": [[0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1]],
    "an empty prompt": [[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "none": [[1, 1, 1, 1, 1, 1]] * 3,
}
with_masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def prompt_mask(rows):
    return torch.nn.functional.pad(torch.tensor(rows, dtype=torch.bool), (0, SEQLEN - 6), value=True)


@with_masks
@with_options
@with_backends
def test_padding(use_flash_attn, options, mask):
    """Positions and distances are those of the padded batch; padding may hold NaN."""
    module, x, mask = make(use_flash_attn, **options), tokens(), prompt_mask(mask)
    for steps in STEPS.values():
        expected = one_pass(module, x, steps, mask)
        out = run(module, x.masked_fill(~mask[..., None], torch.nan), steps, params_of(module), mask)
        assert_near([out], [expected], atol=1e-12)


@pytest.mark.parametrize("name", ["on the left", "none", "on the right"])
def test_padding_on_the_left_costs_nothing(name):
    """One call of the op, which is told how many rows to hide, if any."""
    module, x, mask = make(), tokens(), prompt_mask(MASKS[name])
    with OpCalls() as recorded:
        run(module, x, (6,), params_of(module), mask)
    ((op, arguments),) = recorded.calls
    assert op == "fwd_kvcache"
    hidden = {"on the left": [2, 5, 0], "none": None, "on the right": [0, 0, 0]}[name]
    leftpad = arguments.get("cache_leftpad")
    assert (leftpad if leftpad is None else leftpad.tolist()) == hidden


@pytest.mark.parametrize(
    ("causal", "shorter"), [(True, [1, 1, 1, 1, 1, 0, 1, 0]), (False, [1, 1, 1, 1, 1, 1, 0, 1])], ids=str
)
def test_columns_after_the_end_of_a_sequence_do_not_count(causal, shorter):
    module, x = make(causal=causal), tokens(2)
    params = params_of(module, lengths_per_sample=torch.zeros(2, dtype=torch.int32))
    module(x[:, :6], inference_params=params)
    params.lengths_per_sample = torch.tensor([6, 4], dtype=torch.int32)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], shorter])
    with OpCalls() as recorded:
        module(x[:, 6:8], inference_params=params, key_padding_mask=mask)
    ((_, arguments),) = recorded.calls
    assert arguments["cache_leftpad"].tolist() == [1, 0]


@with_options
@with_backends
def test_prompts_of_different_lengths(use_flash_attn, options):
    """Padding after the prompts is overwritten by the tokens that follow: each sequence is as if alone."""
    module, x = make(use_flash_attn, **options), tokens()
    prompts = torch.tensor([6, 1, 4], dtype=torch.int32)
    mask = torch.arange(6) < prompts[:, None]
    params = params_of(module, lengths_per_sample=torch.zeros(BATCH, dtype=torch.int32))
    outs = [module(x[:, :6].masked_fill(~mask[..., None], torch.nan), inference_params=params, key_padding_mask=mask)]
    params.lengths_per_sample = prompts.clone()
    for seqlen in (1, 2):
        rows = params.lengths_per_sample[:, None] + torch.arange(seqlen)
        outs.append(module(x[torch.arange(BATCH)[:, None], rows], inference_params=params))
        params.lengths_per_sample += seqlen
    for b, prompt in enumerate(prompts.tolist()):
        expected = one_pass(module, x[b : b + 1, : prompt + 3], (prompt, 1, 2))
        assert_near([torch.cat([outs[0][b, :prompt], outs[1][b], outs[2][b]])], [expected[0]], atol=1e-12)


@with_masks
@pytest.mark.parametrize("options", [OPTIONS["causal"], OPTIONS["rotary, window, not causal"]], ids=str)
@with_backends
def test_lengths_with_padding(use_flash_attn, options, mask):
    """Columns of the mask are rows of the cache; those at the end of shorter sequences do not count."""
    module, x, mask = make(use_flash_attn, **options), tokens(), prompt_mask(mask)
    params = params_of(module, lengths_per_sample=torch.zeros(BATCH, dtype=torch.int32))
    params.key_value_memory_dict[0][:BATCH] = 0
    run(module, x, (6,), params, mask)
    before = params.key_value_memory_dict[0].clone()
    lengths = torch.tensor([4, 6, 5], dtype=torch.int32)
    params.lengths_per_sample = lengths
    rows = lengths[:, None] + torch.arange(2)
    new = x[torch.arange(BATCH)[:, None], rows]
    out = module(new, inference_params=params, key_padding_mask=mask[:, :8])
    for b, length in enumerate(lengths.tolist()):
        alone = InferenceParams(CAPACITY, 1, length, key_value_memory_dict={0: before[b : b + 1].clone()})
        expected = module(new[b : b + 1], inference_params=alone, key_padding_mask=mask[b : b + 1, : length + 2])
        assert_near([out[b]], [expected[0]], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@with_backends
def test_lengths_override_the_offset(use_flash_attn, dtype):
    """They may have more entries than x has sequences; a negative one skips its sequence."""
    module, x = make(use_flash_attn, rotary_emb_dim=4), tokens()
    params = params_of(module)
    run(module, x, (4,), params)
    before = params.key_value_memory_dict[0][1].clone()
    params.seqlen_offset = 1
    params.lengths_per_sample = torch.tensor([4, -1, 4, 99, 99], dtype=dtype)
    out = module(x[:, 4:6], inference_params=params)
    expected = one_pass(module, x, (4, 2))[:, 4:]
    expected[1] = module.out_proj.bias
    assert_near([out], [expected], atol=1e-12)
    assert_same([params.key_value_memory_dict[0][1]], [before])
    params.key_value_memory_dict[0][1, 4:6] = 0
    assert_untouched(params, (slice(0, BATCH), slice(0, 6)))


@with_backends
def test_batch_size_offset(use_flash_attn):
    """Parts of a batch, one after the other, in one cache."""
    module, x = make(use_flash_attn, rotary_emb_dim=HEAD_DIM), tokens()
    whole, parts = params_of(module), params_of(module)
    expected = run(module, x, (4, 1), whole)
    for begin, end in ((1, 3), (0, 1)):
        parts.seqlen_offset, parts.batch_size_offset = 0, begin
        assert_near([run(module, x[begin:end], (4, 1), parts)], [expected[begin:end]], atol=1e-12)
    assert_untouched(parts, (slice(0, BATCH), slice(0, 5)))


@with_backends
def test_caches_are_allocated_where_missing(use_flash_attn):
    """Any object with the attributes will do; lengths_per_sample may be missing."""
    x, caches = tokens(), {}
    modules = [make(use_flash_attn, num_heads_kv=2, layer_idx=i) for i in (0, 7)]
    params = SimpleNamespace(
        max_seqlen=SEQLEN, max_batch_size=4, seqlen_offset=0, batch_size_offset=0, key_value_memory_dict=caches
    )
    for module in modules:
        params.seqlen_offset = 0
        assert_near([run(module, x, (8, 1), params)], [module(x)], atol=1e-12)
    assert {i: cache.shape for i, cache in caches.items()} == dict.fromkeys((0, 7), (4, SEQLEN, 2, 2, HEAD_DIM))
    assert caches[0].dtype == torch.float64


def test_allocate_inference_cache():
    module = make(num_heads_kv=2)
    names = list(module.state_dict())
    cache = module.allocate_inference_cache(2, 5)
    assert (cache.shape, cache.dtype, cache.device) == ((2, 5, 2, 2, HEAD_DIM), torch.float64, torch.device("cpu"))
    assert module.allocate_inference_cache(2, 5, torch.float16).dtype == torch.float16
    assert MHA(EMBED, HEADS, device="meta").allocate_inference_cache(2, 5).is_meta
    run(module, tokens(), (2,), params_of(module))
    assert list(module.state_dict()) == names, "caches are not saved"


def test_reset():
    params = InferenceParams(8, 2, 5, lengths_per_sample=torch.tensor([3, 4]))
    params.reset(10, 3)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (10, 3, 0)
    assert params.lengths_per_sample.tolist() == [0, 0]
    assert params.key_value_memory_dict == {}
    assert params.key_value_memory_dict is not InferenceParams(1, 1).key_value_memory_dict


@with_backends
def test_arguments_of_the_call(use_flash_attn):
    """causal overrides the module's option; return_residual returns x too."""
    module, x = make(use_flash_attn, return_residual=True), tokens()
    out, residual = module(x, inference_params=params_of(module), causal=False)
    assert residual is x
    assert_near([out], [module(x, causal=False)[0]], atol=1e-12)


@with_backends
def test_inference_mode(use_flash_attn):
    """A cache that is allocated in inference mode can be used outside of it."""
    module, x = make(use_flash_attn, rotary_emb_dim=4), tokens()
    params = InferenceParams(CAPACITY, MAX_BATCH)
    with torch.inference_mode():
        out = run(module, x, (6,), params)
    out = torch.cat([out, run(module, x, (3,), params)], dim=1)
    assert_near([out], [module(x)], atol=1e-12)


@pytest.mark.parametrize("cache_dtype", [None, torch.bfloat16, torch.float32], ids=str)
@with_backends
def test_autocast(use_flash_attn, cache_dtype):
    module, x = make(use_flash_attn, torch.float32, rotary_emb_dim=4), tokens(dtype=torch.float32)
    params = InferenceParams(CAPACITY, MAX_BATCH)
    if cache_dtype is not None:
        params.key_value_memory_dict[0] = module.allocate_inference_cache(MAX_BATCH, CAPACITY, cache_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(module, x, (6, 1, 2), params)
    assert params.key_value_memory_dict[0].dtype == (torch.bfloat16 if cache_dtype is None else cache_dtype)
    assert_near([out], [module(x)], atol=3e-2)


ROTARY = {"rotary_emb_dim": HEAD_DIM, "num_heads_kv": 2}
COMPILED = {
    "an offset": (ROTARY, "offset"),
    "lengths": (ROTARY, "lengths"),
    "a mask": (ROTARY, "mask"),
    "xPos, ALiBi": ({"rotary_emb_dim": 4, "rotary_emb_scale_base": 8.0, "use_alibi": True}, "lengths"),
}


@pytest.mark.parametrize(("options", "kind"), COMPILED.values(), ids=COMPILED)
@with_backends
def test_compile(use_flash_attn, options, kind):
    """A whole graph, for all steps; lengths in a tensor need one, an offset that grows two."""
    torch.compiler.reset()
    module, x = make(use_flash_attn, **options), tokens()
    mask = prompt_mask(MASKS["holes"]) if kind == "mask" else None
    params = params_of(module)
    expected = one_pass(module, x, (5, 1, 1, 1, 1), mask)
    outs = [run(module, x, (5,), params, mask)]
    if kind == "lengths":
        params.lengths_per_sample = torch.full((BATCH,), 5, dtype=torch.int32)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(module, fullgraph=True, backend=counter)
    for i in range(5, SEQLEN):
        call = {} if mask is None else {"key_padding_mask": mask[:, : i + 1].contiguous()}
        outs.append(step(x[:, i : i + 1], inference_params=params, **call))
        params.seqlen_offset += 1
        if kind == "lengths":
            params.lengths_per_sample += 1
    assert_near([torch.cat(outs, dim=1)], [expected], atol=1e-12)
    # Older releases of torch guard the offset even where lengths take its place.
    needs_one = kind == "lengths" and Version(torch.__version__) >= Version("2.13")
    assert counter.frame_count <= (1 if needs_one else 2)
