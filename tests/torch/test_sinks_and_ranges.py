"""Sinks, key ranges and largest scores in PyTorch: compile, opcheck, export, checkpointing, autocast, torch.func."""

from unittest.mock import patch

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import flash_attn
from compare import assert_bitwise
from flash_attn import autograd
from plain_attention import OpCalls, assert_same, leaves
from plain_sinks import prefix_ranges, strange_ranges

CU_Q, CU_K = torch.tensor([0, 5, 5, 17], dtype=torch.int32), torch.tensor([0, 9, 20, 33], dtype=torch.int32)
S_AUX = torch.tensor([0.5, -3.0, 2.0, 0.0])


def dense_of(seqlen=17, seqlen_k=33, dtype=torch.float32):
    return leaves((2, seqlen, 4, 16), (2, seqlen_k, 2, 16), (2, seqlen_k, 2, 16), dtype=dtype)


def varlen_of():
    return leaves((17, 4, 16), (33, 2, 16), (33, 2, 16), dtype=torch.float32)


def run_varlen(q, k, v, **options):
    return flash_attn.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 12, 13, **options)


PREFIX = prefix_ranges(17, 33, 20)[None]
PACKED_RANGES = torch.cat([prefix_ranges(5, 9, 3), strange_ranges(12)])
# (function, inputs, options); s_aux requires grad.
CALLS = {
    "sinks": (flash_attn.flash_attn_func, dense_of, {"s_aux": S_AUX, "causal": True}),
    "sinks in bfloat16": (
        flash_attn.flash_attn_func,
        lambda: dense_of(dtype=torch.bfloat16),
        {"s_aux": S_AUX.bfloat16(), "return_attn_probs": True},
    ),
    "ranges": (flash_attn.flash_attn_func, dense_of, {"key_ranges": PREFIX}),
    "max_logits": (flash_attn.flash_attn_func, dense_of, {"causal": True, "return_max_logits": True}),
    "everything": (
        flash_attn.flash_attn_func,
        dense_of,
        {
            "s_aux": S_AUX, "key_ranges": PREFIX, "return_max_logits": True, "return_attn_probs": True,
            "window_size": (20, 3), "softcap": 2.0, "deterministic": True,
        },
    ),
    "dropout": (flash_attn.flash_attn_func, dense_of, {"s_aux": S_AUX, "key_ranges": PREFIX, "dropout_p": 0.3}),
    "varlen": (
        run_varlen,
        varlen_of,
        {"s_aux": S_AUX, "key_ranges": PACKED_RANGES, "return_max_logits": True, "causal": True},
    ),
    "kvpacked": (
        flash_attn.flash_attn_kvpacked_func,
        lambda: leaves((2, 17, 4, 16), (2, 33, 2, 2, 16), dtype=torch.float32),
        {"s_aux": S_AUX, "causal": True},
    ),
    "qkvpacked": (
        flash_attn.flash_attn_qkvpacked_func,
        lambda: leaves((2, 17, 3, 4, 16), dtype=torch.float32),
        {"s_aux": S_AUX},
    ),
}  # fmt: skip
with_calls = pytest.mark.parametrize("name", CALLS)


def call_of(name):
    """The function, its inputs, options, and what gets gradients."""
    function, make, options = CALLS[name]
    inputs, options = make(), dict(options)
    if "s_aux" not in options:
        return function, inputs, options, inputs
    options["s_aux"] = options["s_aux"].clone().requires_grad_()
    return function, inputs, options, [*inputs, options["s_aux"]]


def results_of(function, inputs, options, wanted):
    """All results, and gradients of those that have some."""
    torch.manual_seed(21)
    results = function(*inputs, **options)
    results = list(results) if isinstance(results, tuple) else [results]
    loss = sum((r.float() * r.float().detach().cos()).sum() for r in results if r.requires_grad)
    return [*results, *torch.autograd.grad(loss, wanted)]


@with_calls
def test_the_way_through_python_changes_nothing(name):
    """Calls with sinks, but without ranges, take the fast path in C, which gives the same bits."""
    function, inputs, options, wanted = call_of(name)
    expected = results_of(function, inputs, options, wanted)
    with patch.object(autograd, "convert_arguments", wraps=autograd.convert_arguments) as through_python:
        results_of(function, inputs, options, wanted)
    assert through_python.called == bool({"key_ranges", "return_max_logits"} & options.keys())
    with patch.object(autograd, "_eager_call", return_value=None):
        assert_same(results_of(function, inputs, options, wanted), expected)


@with_calls
def test_compile(name):
    """One graph, forward and backward, with the same bits as eager mode; also without gradients."""
    function, inputs, options, wanted = call_of(name)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = results_of(function, inputs, options, wanted)
    assert_same(results_of(compiled, inputs, options, wanted), expected)
    with torch.no_grad():
        torch.manual_seed(21)
        alone = compiled(*inputs, **options)
    assert_same([alone[0] if isinstance(alone, tuple) else alone], expected[:1])


@pytest.mark.parametrize("name", [name for name in CALLS if name != "dropout"])
def test_compile_with_inductor(name):
    """Inductor sums the gradient of the sinks in another order, and changes no other result."""
    function, inputs, options, wanted = call_of(name)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    expected = results_of(function, inputs, options, wanted)
    found = results_of(compiled, inputs, options, wanted)
    if "s_aux" in options:
        torch.testing.assert_close(found.pop(), expected.pop(), rtol=1e-4, atol=1e-5)
    assert_same(found, expected)


def test_compile_with_dynamic_shapes():
    """The graph compiled for the first lengths is valid for all others."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flash_attn.flash_attn_func, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seqlen_q, seqlen_k in [(19, 35), (17, 33), (64, 129), (5, 7), (100, 40)]:
        inputs, s_aux = dense_of(seqlen_q, seqlen_k), S_AUX.clone().requires_grad_()
        ranges = prefix_ranges(seqlen_q, seqlen_k, 6)[None]
        options = {"s_aux": s_aux, "key_ranges": ranges, "return_max_logits": True}
        wanted = [*inputs, s_aux]
        expected = results_of(flash_attn.flash_attn_func, inputs, options, wanted)
        assert_same(results_of(compiled, inputs, options, wanted), expected)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * len(counts)


@with_calls
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(name, needs_grad):
    """The ops behind every call: schema, autograd registration, fake tensors, tracing with dynamic shapes."""
    function, inputs, options, wanted = call_of(name)
    with OpCalls() as recorded:
        results_of(function, inputs, options, wanted)
    assert {op for op, _ in recorded.calls} >= {"fwd", "bwd"}
    op, arguments = next((op, arguments) for op, arguments in recorded.calls if op == "fwd")
    arguments = {key: x.detach() if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    for key in ("q", "k", "v", "s_aux") if needs_grad else ():
        if arguments.get(key) is not None:
            arguments[key] = arguments[key].clone().requires_grad_()
    torch.library.opcheck(getattr(torch.ops.flash_attn, op).default, (), arguments)
    if "dropout_p" not in options:
        given = {key: arguments[key] for key in arguments if key not in "qkv" and key != "rng_state"}
        tensors = [arguments[key] for key in "qkv"]
        torch.library.opcheck(torch.ops.flash_attn._attention.default, (tensors,), given)


def test_opcheck_of_the_cache():
    q, k, v = (x.detach() for x in dense_of(1))
    torch.library.opcheck(torch.ops.flash_attn.fwd_kvcache.default, (q, k, v), {"s_aux": S_AUX, "cache_seqlen": 20})


def test_export():
    """torch.export keeps a single op, with its sinks and ranges."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.s_aux = torch.nn.Parameter(S_AUX.clone())

        def forward(self, q, k, v, key_ranges):
            call = {"key_ranges": key_ranges, "s_aux": self.s_aux, "return_max_logits": True}
            return flash_attn.flash_attn_func(q, k, v, causal=True, **call)

    inputs = (*(x.detach() for x in dense_of()), PREFIX)
    module = Attention()
    program = torch.export.export(module, inputs)
    assert sum("flash_attn." in str(node.target) for node in program.graph.nodes) == 1
    assert_same(program.module()(*inputs), module(*inputs))


@with_calls
def test_checkpointing(name):
    function, inputs, options, wanted = call_of(name)
    expected = results_of(function, inputs, options, wanted)

    def recomputed(*inputs, **options):
        return checkpoint(function, *inputs, use_reentrant=False, **options)

    assert_same(results_of(recomputed, inputs, options, wanted), expected)


@with_calls
def test_func_grad(name):
    """torch.func.grad and vjp give the gradients of autograd, of the sinks too."""
    function, inputs, options, wanted = call_of(name)
    number = len(inputs)

    def loss(*tensors):
        torch.manual_seed(21)
        given = {**options, **({"s_aux": tensors[-1]} if len(tensors) > number else {})}
        result = function(*tensors[:number], **given)
        return (result[0] if isinstance(result, tuple) else result).float().square().sum()

    expected = torch.autograd.grad(loss(*wanted), wanted)
    plain = [x.detach() for x in wanted]
    assert_same(torch.func.grad(loss, argnums=tuple(range(len(plain))))(*plain), expected)
    value, pull = torch.func.vjp(loss, *plain)
    assert_same(pull(torch.ones_like(value)), expected)


@pytest.mark.parametrize("name", ["sinks", "everything", "varlen", "kvpacked", "qkvpacked"])
def test_autocast_does_not_cast_sinks(name):
    """Other inputs are cast; the sinks, which bfloat16 would round, and their gradient keep their dtype."""
    function, inputs, options, _ = call_of(name)
    s_aux = (S_AUX + 2**-12).requires_grad_()
    options["s_aux"] = s_aux
    with torch.autocast("cpu", torch.bfloat16):
        found = results_of(function, inputs, options, [s_aux])
    cast = [x.detach().bfloat16() for x in inputs]
    assert_same(found, results_of(function, cast, options, [s_aux]))
    rounded = results_of(function, cast, {**options, "s_aux": s_aux.bfloat16()}, [s_aux])
    assert not torch.equal(found[-1], rounded[-1])


def test_second_derivatives_of_sinks_are_refused():
    function, inputs, options, wanted = call_of("sinks")
    grads = torch.autograd.grad(function(*inputs, **options).square().sum(), wanted, create_graph=True)
    assert all(grad.requires_grad for grad in grads)
    for grad in grads:
        with pytest.raises(RuntimeError, match="gradients of gradients are not supported"):
            torch.autograd.grad(grad.sum(), wanted, retain_graph=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_sinks_have_the_same_bits_every_time(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = [results_of(*call_of("varlen")) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(other, results[0], strict=True)):
            assert_bitwise(f"result {i}", a, b)


def test_a_changed_sink_is_noticed():
    function, inputs, options, wanted = call_of("sinks")
    s_aux = wanted[-1] * 1
    out = function(*inputs, **{**options, "s_aux": s_aux})
    with torch.no_grad():
        s_aux.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
