"""The KV cache within PyTorch: op, torch.compile, grad mode, version counters, transforms, autocast, threads."""

import concurrent.futures
import re
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import flash_attn
from compare import assert_bitwise
from device import DEVICE, on_device
from flash_attn import kv_cache
from kvcache import LATENT, ONE_BUFFER, KvCase, KvInputs, arguments_of, make_kv_inputs, op_arguments_of, run_kvcache

SCHEMA = (
    "flash_attn::fwd_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, *, Tensor? k=None, Tensor? v=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, bool rotary_interleaved=True, SymInt? cache_seqlen=None, "
    "Tensor? cache_seqlens=None, Tensor? cache_batch_idx=None, Tensor? cache_leftpad=None, Tensor? block_table=None, "
    "Tensor? alibi_slopes=None, float? softmax_scale=None, bool causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0., Tensor? s_aux=None, "
    "int num_splits=0) -> (Tensor out, Tensor softmax_lse)"
)
SMALL = {"num_heads": 4, "head_dim": 16, "head_dim_v": 16, "dtype": "bfloat16", "causal": True}
CASES = {
    "dense": KvCase((9, 4), 2, head_dim_v=24, **{k: x for k, x in SMALL.items() if k != "head_dim_v"}),
    "dense, appending": KvCase((9, 4), 2, 2, rotary_dim=8, **SMALL),
    "paged": KvCase((9, 4), 2, page_size=4, **SMALL),
    "paged, appending": KvCase((9, 4), 1, 2, page_size=4, rotary_dim=16, interleaved=False, **SMALL),
    "one buffer": KvCase((9, 4), 2, layout=ONE_BUFFER, **SMALL),
    "one buffer, appending": KvCase((9, 4), 3, 1, layout=ONE_BUFFER, **SMALL),
    "latent, appending": KvCase((9, 4), 1, 2, layout=LATENT, num_heads_k=1, num_splits=2, **{**SMALL, "head_dim_v": 8}),
    "int": KvCase((9, 9), 2, 2, given_as="int", **SMALL),
    "whole cache": KvCase((9, 9), 2, given_as="None", spare=0, **SMALL),
    "everything": KvCase(
        (9, -1, 4), 2, 3, leftpad=(2, 0, 5), shuffled=True, rotary_dim=6, interleaved=False, window_size=(6, 1),
        attention_chunk=5, softcap=2.0, softmax_scale=0.4, alibi="batch", num_splits=3, head_dim=13, head_dim_v=13,
    ),
    "no batch": KvCase((), 2, 2, **SMALL),
}  # fmt: skip

with_cases = pytest.mark.parametrize("name", CASES)


def inputs_of(name: str):
    """Finite: opcheck takes two NaN for different values. Indices that are not in use are in range."""
    x = make_kv_inputs(CASES[name], padding=0.0)
    return CASES[name], x


def op(**arguments):
    return torch.ops.flash_attn.fwd_kvcache(**arguments)


def test_schema():
    assert str(torch.ops.flash_attn.fwd_kvcache.default._schema) == SCHEMA


@on_device
@with_cases
def test_opcheck(name):
    """Schema with its mutations, autograd registration, fake tensors, tracing with dynamic shapes."""
    case, x = inputs_of(name)
    torch.library.opcheck(torch.ops.flash_attn.fwd_kvcache.default, (), op_arguments_of(case, x))


@with_cases
def test_op_and_function_are_the_same(name):
    case, x = inputs_of(name)
    other = make_kv_inputs(case, padding=0.0)
    for what, a, b in zip(("out", "lse"), op(**op_arguments_of(case, x)), run_kvcache(case, other), strict=True):
        assert_bitwise(what, a, b)
    assert_bitwise("k_cache", x.k_cache, other.k_cache)
    assert_bitwise("v_cache", x.v_cache, other.v_cache)


# The fast path: plain calls take no other.


class Subclass(torch.Tensor):
    pass


NOT_PLAIN = {
    "numpy scalar": {"softmax_scale": np.float64(0.25)},
    "numpy length": {"cache_seqlens": np.int64(4)},
    "list": {"window_size": [3, 0]},
    "0-dim tensor": {"num_splits": torch.tensor(2)},
    "int for a bool": {"causal": 1},
    "int for a float": {"softcap": 1},
    "subclass": {"q": torch.ones(2, 2, 4, 16, dtype=torch.bfloat16).as_subclass(Subclass)},
    "subclass among optional ones": {"alibi_slopes": torch.ones(4).as_subclass(Subclass)},
}


def takes_the_fast_path(case: KvCase, x: KvInputs, other: KvInputs, **changes) -> bool:
    """Whether a call takes the fast path. It gives the same bits as the way through Python."""
    with patch.object(kv_cache, "_python_call", side_effect=kv_cache._python_call) as python_call:
        got = run_kvcache(case, x, **changes)
    with patch.object(kv_cache, "_eager_call", return_value=None):
        expected = run_kvcache(case, other, **changes)
    names = ("out", "softmax_lse", "k_cache", "v_cache")
    for name, a, b in zip(names, (*got, x.k_cache, x.v_cache), (*expected, other.k_cache, other.v_cache), strict=True):
        assert type(a) is type(b)
        assert_bitwise(name, a, b)
    return not python_call.called


@with_cases
def test_plain_calls_take_the_fast_path(name):
    case, x = inputs_of(name)
    assert takes_the_fast_path(case, x, make_kv_inputs(case, padding=0.0))
    with torch.no_grad():
        out = run_kvcache(case, x, q=x.q.requires_grad_(), return_softmax_lse=False)
    assert isinstance(out, torch.Tensor)


@pytest.mark.parametrize("changes", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_other_calls_do_not(changes):
    case, x = inputs_of("dense, appending")
    assert not takes_the_fast_path(case, x, make_kv_inputs(case, padding=0.0), **changes)


@pytest.mark.parametrize(
    "context", [torch.autocast("cpu", dtype=torch.bfloat16), torch.device("cpu")], ids=["autocast", "device"]
)
def test_calls_that_torch_intercepts_do_not(context):
    case, x = inputs_of("dense, appending")
    with context:
        assert not takes_the_fast_path(case, x, make_kv_inputs(case, padding=0.0))


@with_cases
def test_meta_and_fake_tensors_have_the_real_layout(name):
    case, x = inputs_of(name)
    arguments = op_arguments_of(case, x)
    real = op(**arguments)
    meta = op(**{key: t.to("meta") if isinstance(t, torch.Tensor) else t for key, t in arguments.items()})
    with FakeTensorMode() as mode:
        fake = op(**{key: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for key, t in arguments.items()})
    for a, b, c in zip(real, meta, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) == (c.shape, c.stride(), c.dtype)
        assert (b.device.type, c.device) == ("meta", a.device)


@on_device
@with_cases
def test_compile(name):
    """One graph, the same bits as eager mode, in the results and in the caches, which are written in place."""
    case, x = inputs_of(name)
    other = make_kv_inputs(case, padding=0.0)
    torch.compiler.reset()
    compiled = torch.compile(flash_attn.flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    expected = run_kvcache(case, other)
    for what, a, b in zip(("out", "softmax_lse"), compiled(**arguments_of(case, x)), expected, strict=True):
        assert_bitwise(what, a, b)
    assert_bitwise("k_cache", x.k_cache, other.k_cache)
    assert_bitwise("v_cache", x.v_cache, other.v_cache)


def step_one_buffer(q, cache, k, v, lengths):
    caches = (cache[:, :, 0], cache[:, :, 1])
    return flash_attn.flash_attn_with_kvcache(q * 2, *caches, k + 1, v.sin(), cache_seqlens=lengths, causal=True).cos()


def step_two_caches(q, cache, k, v, lengths):
    return flash_attn.flash_attn_with_kvcache(
        q * 2, cache[0], cache[1], k + 1, v.sin(), cache_seqlens=lengths, causal=True
    ).cos()


@pytest.mark.parametrize("step", [step_one_buffer, step_two_caches])
def test_inductor_copies_no_cache(step):
    """The code that inductor generates passes views of the caches to the op, and copies none."""
    capacity = 1237  # all numbers of elements of whole caches, and no others, are multiples of it
    torch.compiler.reset()
    q, k, v = (torch.randn(2, 3, n, 16) for n in (4, 2, 2))
    shape = (2, capacity, 2, 2, 16) if step is step_one_buffer else (2, 2, capacity, 2, 16)
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    cache, other = torch.zeros(shape), torch.zeros(shape)
    out, (code,) = run_and_get_code(torch.compile(step, fullgraph=True), q, cache, k, v, lengths)
    torch.testing.assert_close(out, step(q, other, k, v, lengths), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache, other, rtol=1e-6, atol=1e-6)
    assert (cache != 0).any()
    lines = [line for line in code.splitlines() if "rand_strided" not in line and "assert_size_stride" not in line]
    touching = [line for line in lines if any(int(n) % capacity == 0 for n in re.findall(r"\b[1-9]\d*", line))]
    assert len(touching) == 1, "\n".join(touching)
    assert re.search(r"torch\.ops\.flash_attn\.fwd_kvcache\S+\(\w+, (reinterpret_tensor\(.*\), ){2}k=", touching[0])


def test_compiled_steps_do_not_recompile():
    """An int cache_seqlens that grows with each step: one graph for the first, one for all others."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flash_attn.flash_attn_with_kvcache, fullgraph=True, backend=counter)
    caches, others = ([torch.zeros(2, 32, 2, 16) for _ in range(2)] for _ in range(2))
    for length in range(2, 12):
        q, k, v = (torch.randn(2, 1, n, 16) for n in (4, 2, 2))
        out = compiled(q, *caches, k, v, cache_seqlens=length, causal=True)
        expected = flash_attn.flash_attn_with_kvcache(q, *others, k, v, cache_seqlens=length, causal=True)
        assert_bitwise("out", out, expected, f"cache_seqlens {length}")
        assert_bitwise("k_cache", caches[0], others[0])
    assert counter.frame_count <= 2


def test_export():
    class Step(torch.nn.Module):
        def forward(self, q, k_cache, v_cache, k, v, lengths):
            return flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)

    q, k, v = (torch.randn(2, 1, n, 16) for n in (4, 2, 2))
    caches, others = ([torch.zeros(2, 32, 2, 16) for _ in range(2)] for _ in range(2))
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    program = torch.export.export(Step(), (q, *caches, k, v, lengths))
    assert sum("flash_attn.fwd_kvcache" in str(node.target) for node in program.graph.nodes) == 1
    assert_bitwise("out", program.module()(q, *caches, k, v, lengths), Step()(q, *others, k, v, lengths))
    assert_bitwise("v_cache", caches[1], others[1])


# Autograd.


@on_device
@with_cases
def test_inference_mode(name):
    case, x = inputs_of(name)
    expected = run_kvcache(case, make_kv_inputs(case, padding=0.0))
    with torch.inference_mode():
        for own in (x, make_kv_inputs(case, padding=0.0)):  # caches made outside of it, and inside
            for what, a, b in zip(("out", "softmax_lse"), run_kvcache(case, own), expected, strict=True):
                assert a.is_inference()
                assert_bitwise(what, a, b)


def test_without_grad():
    """Outputs of layers with parameters, as generate() has them; and grad mode without leaves."""
    torch.manual_seed(0)
    case, x = inputs_of("dense, appending")
    project = torch.nn.Linear(16, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        q, k = project(x.q), project(x.k)
        assert not run_kvcache(case, x, q=q, k=k)[0].requires_grad
        assert not run_kvcache(case, x, q=x.q.requires_grad_())[0].requires_grad
    with pytest.raises(ValueError, match=r"torch\.no_grad\(\)"):
        run_kvcache(case, x, q=project(x.q.detach()))
    assert not run_kvcache(case, x, q=x.q.detach())[0].requires_grad


@pytest.mark.parametrize("name", ["dense, appending", "paged, appending", "one buffer, appending", "latent, appending"])
def test_appending_counts_as_a_write(name):
    """The version counters grow, and autograd notices that a saved tensor was overwritten."""
    case, x = inputs_of(name)
    saved = torch.ones_like(x.k_cache).requires_grad_()
    product = saved * x.k_cache
    versions = x.k_cache._version, x.v_cache._version
    run_kvcache(case, x)
    assert x.k_cache._version > versions[0]
    assert x.v_cache._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_reading_counts_as_no_write():
    """Without new rows the version counters stay, and a cache that autograd has saved may be read."""
    case, x = inputs_of("dense")
    saved = torch.ones_like(x.k_cache).requires_grad_()
    product = saved * x.k_cache
    versions = x.k_cache._version, x.v_cache._version
    run_kvcache(case, x)
    assert (x.k_cache._version, x.v_cache._version) == versions
    product.sum().backward()


@pytest.mark.parametrize("name", ["dense", "dense, appending"])
def test_caches_of_inference_mode_outside_of_it(name):
    """They can be read. Writing raises an error before anything is written."""
    case, x = inputs_of(name)
    with torch.inference_mode():
        x.k_cache, x.v_cache = x.k_cache.clone(), x.v_cache.clone()
    before = x.k_cache.clone(), x.v_cache.clone()
    if x.k is None:
        assert_bitwise("out", run_kvcache(case, x)[0], run_kvcache(case, make_kv_inputs(case, padding=0.0))[0])
    else:
        with pytest.raises(RuntimeError, match="made in inference mode can be written in inference mode only"):
            run_kvcache(case, x)
    for cache, old in zip((x.k_cache, x.v_cache), before, strict=True):
        assert torch.equal(cache, old)


def test_derivatives_raise():
    """Neither reverse nor forward mode gives zeros in silence; the op alone says so too."""
    case, x = inputs_of("dense, appending")
    arguments = op_arguments_of(case, x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.q, torch.ones_like(x.q))
        with pytest.raises((RuntimeError, ValueError), match=r"(?i)jvp|forward.mode|forward AD|no_grad"):
            run_kvcache(case, x, q=dual)
    with pytest.raises(ValueError, match="no_grad"):
        torch.func.grad(lambda q: run_kvcache(case, x, q=q)[0].sum())(x.q)
    for name in ("q", "k", "v", "k_cache", "v_cache", "rotary_cos"):
        leaf = arguments[name].detach().requires_grad_()
        with pytest.raises((RuntimeError, ValueError), match=r"no_grad|no backward"):
            op(**{**arguments, name: leaf})[0].sum().backward()


def test_vmap_raises():
    case, x = inputs_of("dense")
    for run in (lambda q: run_kvcache(case, x, q=q), lambda q: op(**{**op_arguments_of(case, x), "q": q})):
        with pytest.raises(RuntimeError, match=r"(?i)vmap"):
            torch.vmap(run)(x.q[None])


@on_device
@pytest.mark.parametrize("rotary_dim", [0, 8])
def test_autocast(rotary_dim):
    """q, k, v and what turns them are cast to the dtype of the caches, which stay as they are."""
    case = KvCase((9, 4), 2, 2, rotary_dim=rotary_dim, **SMALL)
    x, other = make_kv_inputs(case), make_kv_inputs(case)
    wide = {
        name: t.float() for name in ("q", "k", "v", "rotary_cos", "rotary_sin") if (t := getattr(x, name)) is not None
    }
    with pytest.raises(ValueError, match="dtype"):
        run_kvcache(case, x, **wide)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = run_kvcache(case, x, **wide)
    for name, a, b in zip(("out", "softmax_lse"), got, run_kvcache(case, other), strict=True):
        assert_bitwise(name, a, b)
    assert_bitwise("k_cache", x.k_cache, other.k_cache)
    assert_bitwise("v_cache", x.v_cache, other.v_cache)


def test_autocast_to_another_dtype_than_the_caches():
    case = KvCase((9, 4), 2, 2, **{**SMALL, "dtype": "float32"})
    x, other = make_kv_inputs(case), make_kv_inputs(case)
    narrow = {name: getattr(x, name).bfloat16() for name in ("q", "k", "v")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = run_kvcache(case, x, **narrow)
    assert out.dtype == torch.float32
    assert_bitwise("out", out, run_kvcache(case, other, **{name: t.float() for name, t in narrow.items()})[0])


# Threads.

LARGER = [
    KvCase((900, 3, 257, -1, 64), 1, 1, num_heads=8, dtype=dtype, causal=True, page_size=page_size, rotary_dim=32)
    for dtype in ("float32", "bfloat16")
    for page_size in (0, 16)
] + [KvCase((3000,), 4, 2, num_heads=1, num_heads_k=1, dtype="bfloat16", num_splits=n) for n in (0, 1, 5)]


@pytest.mark.parametrize("case", LARGER, ids=lambda case: case.name)
def test_number_of_threads(case):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x = make_kv_inputs(case)
        results.append((*run_kvcache(case, x), x.k_cache, x.v_cache))
    for other in results[1:]:
        for name, a, b in zip(("out", "softmax_lse", "k_cache", "v_cache"), results[0], other, strict=True):
            assert_bitwise(name, a, b)


@pytest.mark.parametrize("threads_each", [1, 2])
def test_python_threads_at_once(threads_each):
    """Concurrent calls on caches of their own do not interfere."""
    inputs = [make_kv_inputs(case) for case in LARGER]
    expected = [run_kvcache(case, x) for case, x in zip(LARGER, inputs, strict=True)]

    def work(index):
        torch.set_num_threads(threads_each)
        return [run_kvcache(LARGER[index], inputs[index]) for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for index, results in enumerate(pool.map(work, range(len(LARGER)))):
            for result in results:
                for name, a, b in zip(("out", "softmax_lse"), result, expected[index], strict=True):
                    assert_bitwise(name, a, b, LARGER[index].name)


@pytest.mark.parametrize(
    "lengths", [5, torch.tensor([5, 5], dtype=torch.int32), torch.tensor([10, -1], dtype=torch.int32)]
)
def test_flops(lengths):
    """Two products for every pair of a query and a key, new keys included; a skipped sequence has none."""
    q, k, v = (torch.ones(2, 3, heads, dim) for heads, dim in ((4, 16), (2, 16), (2, 8)))
    k_cache, v_cache = torch.zeros(2, 40, 2, 16), torch.zeros(2, 40, 2, 8)
    with FlopCounterMode(display=False) as counter:
        flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths)
    num_keys = 13 if isinstance(lengths, torch.Tensor) and lengths[1] < 0 else 16
    assert counter.get_total_flops() == 2 * 4 * 3 * num_keys * (16 + 8)
