"""Attention of DTensors, cut by heads or by the batch, is that of one device: values, gradients, errors."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import flash_attn
from distributed_tensors import assert_near, distributed, mesh_of, whole

pytestmark = pytest.mark.xdist_group("distributed")

BATCH, SEQLEN, SEQLEN_K, HEAD_DIM = 4, 7, 9, 8
LENGTHS, LENGTHS_K = torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([0, 2, 5, 9], dtype=torch.int32)


def dense(num_heads=4, num_heads_k=4, batch=BATCH):
    k = (batch, SEQLEN_K, num_heads_k, HEAD_DIM)
    return (batch, SEQLEN, num_heads, HEAD_DIM), k, k


def varlen(num_heads_k):
    k = (SEQLEN_K, num_heads_k, HEAD_DIM)
    return (SEQLEN, 4, HEAD_DIM), k, k


def ranges():
    ends = torch.randint(0, SEQLEN_K + 1, (BATCH, SEQLEN, 2), dtype=torch.int32)
    return ends.sort(-1).values


# The function of a call, the shapes of its inputs, what makes its options.
DENSE, CAUSAL = flash_attn.flash_attn_func, {"causal": True}
PACKING = (LENGTHS, LENGTHS_K, 4, 4)
CALLS = {
    "plain": (DENSE, dense(), dict),
    "causal": (DENSE, dense(), lambda: {**CAUSAL, "return_attn_probs": True}),
    "grouped": (DENSE, dense(8, 2), lambda: {**CAUSAL, "return_attn_probs": True, "return_max_logits": True}),
    "few key heads": (DENSE, dense(4, 1), lambda: CAUSAL),
    "odd heads": (DENSE, dense(3, 3), lambda: {"alibi_slopes": torch.rand(3)}),
    "uneven batch": (DENSE, dense(4, 2, batch=3), lambda: {**CAUSAL, "return_attn_probs": True}),
    "less than a sequence each": (DENSE, dense(4, 2, batch=1), lambda: {"return_max_logits": True}),
    "window": (DENSE, dense(4, 2), lambda: {"window_size": (2, 1), "softcap": 2.0, "deterministic": True}),
    "alibi of heads": (DENSE, dense(), lambda: {**CAUSAL, "alibi_slopes": torch.rand(4)}),
    "alibi of sequences": (DENSE, dense(4, 2), lambda: {"alibi_slopes": torch.rand(BATCH, 4)}),
    "sinks": (DENSE, dense(4, 2), lambda: {**CAUSAL, "s_aux": torch.randn(4), "return_attn_probs": True}),
    "ranges": (DENSE, dense(), lambda: {"key_ranges": ranges(), "return_max_logits": True}),
    "shared ranges": (DENSE, dense(), lambda: {"key_ranges": ranges()[:1]}),
    "starts": (DENSE, dense(), lambda: {**CAUSAL, "q_start": torch.arange(4, dtype=torch.int32), "k_start": 1}),
    "kvpacked": (flash_attn.flash_attn_kvpacked_func, ((4, 7, 4, 8), (4, 9, 2, 2, 8)), lambda: CAUSAL),
    "qkvpacked": (flash_attn.flash_attn_qkvpacked_func, ((4, 7, 3, 4, 8),), lambda: CAUSAL),
    "varlen": (
        lambda q, k, v, **options: flash_attn.flash_attn_varlen_func(q, k, v, *PACKING, **options),
        varlen(2),
        lambda: {**CAUSAL, "return_attn_probs": True, "s_aux": torch.randn(4), "alibi_slopes": torch.rand(3, 4)},
    ),
    "varlen kvpacked": (
        lambda q, kv, **options: flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *PACKING, **options),
        ((7, 4, 8), (9, 2, 4, 8)),
        lambda: {"alibi_slopes": torch.rand(4)},
    ),
    "varlen qkvpacked": (
        lambda qkv, **options: flash_attn.flash_attn_varlen_qkvpacked_func(qkv, LENGTHS, 4, **options),
        ((7, 3, 4, 8),),
        lambda: {**CAUSAL, "return_attn_probs": True},
    ),
}  # fmt: skip
# The placement of an input of a number of dimensions.
CUTS = {
    "replicated": lambda ndim: Replicate(),
    "heads": lambda ndim: Shard(ndim - 2),
    "batch": lambda ndim: Shard(0),
}


def leaves(shapes):
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def values_and_gradients(function, inputs, options):
    """The results that are not empty, and the gradients of the inputs and of sinks."""
    results = function(*inputs, **options)
    results = [x for x in (results if isinstance(results, tuple) else (results,)) if x.numel() > 0]
    assert all(isinstance(x, DTensor) == isinstance(inputs[0], DTensor) for x in results)
    generator = torch.Generator().manual_seed(2)
    loss = 0
    for x in results:
        if x.requires_grad:
            visible = torch.where(whole(x).isinf(), 0, whole(x))
            loss = loss + (visible * torch.rand(x.shape, generator=generator, dtype=x.dtype)).sum()
    sources = [*inputs, *(x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad)]
    return [whole(x) for x in (*results, *torch.autograd.grad(loss, sources))]


def prepare(name):
    """The function of a call, its inputs and its options."""
    torch.manual_seed(1)
    function, shapes, make_options = CALLS[name]
    inputs, options = leaves(shapes), dict(make_options())
    if "s_aux" in options:
        options["s_aux"] = options["s_aux"].double().requires_grad_()
    return function, inputs, options


def check_call(name, cut):
    mesh, (function, inputs, options) = mesh_of(2), prepare(name)
    expected = values_and_gradients(function, inputs, options)
    sharded = [distributed(x, mesh, [CUTS[cut](x.dim())]) for x in inputs]
    assert_near(values_and_gradients(function, sharded, options), expected)
    tensors = {key: distributed(x, mesh, [Replicate()]) for key, x in options.items() if isinstance(x, torch.Tensor)}
    if tensors:
        assert_near(values_and_gradients(function, sharded, options | tensors), expected)


@pytest.mark.parametrize(
    ("name", "cut"), [(name, cut) for name in CALLS for cut in CUTS if cut != "batch" or "varlen" not in name]
)
def test_values_and_gradients_are_those_of_one_device(world, name, cut):
    world.run(check_call, name, cut, ranks=2)


HEADS, ROWS = Shard(2), Shard(1)
# Placements of q, k and v, and of out.
MIXED = [
    ((HEADS, Replicate(), HEADS), HEADS),
    ((Replicate(), Shard(0), Replicate()), Shard(0)),
    ((Shard(0), HEADS, HEADS), Shard(0)),
    ((Partial(), HEADS, Partial()), HEADS),
    ((Partial(), Partial(), Partial()), Replicate()),
    ((Shard(3), Shard(3), Shard(3)), Replicate()),
]


def check_mixed(placements, expected_placement):
    mesh, (function, inputs, options) = mesh_of(2), prepare("sinks")
    expected = values_and_gradients(function, inputs, options)
    sharded = []
    for x, placement in zip(inputs, placements, strict=True):
        is_sum = isinstance(placement, Partial)
        # Half of the tensor on each of two ranks adds up to the tensor.
        parts = DTensor.from_local(x.detach() / 2, mesh, [placement]) if is_sum else distributed(x, mesh, [placement])
        sharded.append(parts.detach().requires_grad_())
    out, lse, _ = function(*sharded, **options)
    assert out.placements == (expected_placement,)
    assert lse.placements == (Shard(1) if expected_placement == HEADS else expected_placement,)
    assert_near(values_and_gradients(function, sharded, options), expected)


@pytest.mark.parametrize(("placements", "expected"), MIXED)
def test_inputs_that_are_cut_differently(world, placements, expected):
    world.run(check_mixed, placements, expected, ranks=2)


def check_grid(name, placements):
    mesh, (function, inputs, options) = init_device_mesh("cpu", (2, 2)), prepare(name)
    sharded = [distributed(x, mesh, placements) for x in inputs]
    expected = values_and_gradients(function, inputs, options)
    assert_near(values_and_gradients(function, sharded, options), expected)


@pytest.mark.parametrize("name", ["grouped", "sinks", "alibi of sequences"])
@pytest.mark.parametrize("placements", [(Shard(0), HEADS), (HEADS, Replicate()), (HEADS, HEADS), (Shard(0), Shard(0))])
def test_a_mesh_of_two_dimensions(world, name, placements):
    """Two of four ranks share each of two key heads."""
    world.run(check_grid, name, placements)


def check_dropout(name, placements, is_compiled):
    """Only the first rank has the seed of one device."""
    mesh = mesh_of(2) if len(placements) == 1 else init_device_mesh("cpu", (2, 2))
    function, inputs, options = prepare(name)
    options = options | {"dropout_p": 0.4}
    torch.manual_seed(7)
    expected = values_and_gradients(function, inputs, options)
    sharded = [distributed(x, mesh, placements) for x in inputs]
    torch.compiler.reset()
    called = torch.compile(function, backend="aot_eager", fullgraph=True) if is_compiled else function
    torch.manual_seed(7 + torch.distributed.get_rank())
    assert_near(values_and_gradients(called, sharded, options), expected)


@pytest.mark.parametrize(
    ("name", "placements", "is_compiled"),
    [
        ("grouped", (HEADS,), False),
        ("grouped", (HEADS,), True),
        ("sinks", (Replicate(),), False),
        ("few key heads", (HEADS, Replicate()), False),
        ("grouped", (HEADS, HEADS), False),
        ("varlen", (Shard(1),), False),
        ("qkvpacked", (Shard(3),), False),
    ],
)
def test_dropout_mask_is_that_of_one_device(world, name, placements, is_compiled):
    world.run(check_dropout, name, placements, is_compiled, ranks=2 * len(placements))


def check_shared_key_heads(placements):
    mesh = mesh_of(2) if len(placements) == 1 else init_device_mesh("cpu", (2, 2))
    function, inputs, options = prepare("few key heads")
    of_keys = [Replicate() if placement == HEADS else placement for placement in placements]
    q, k, v = inputs
    sharded = [distributed(q, mesh, placements), *(distributed(x, mesh, of_keys) for x in (k, v))]
    assert function(*sharded, **options).placements == placements
    expected = values_and_gradients(function, inputs, options)
    assert_near(values_and_gradients(function, sharded, options), expected)


@pytest.mark.parametrize("placements", [(HEADS,), (HEADS, Shard(0)), (HEADS, HEADS)])
def test_ranks_share_key_heads(world, placements):
    """Queries are not gathered."""
    world.run(check_shared_key_heads, placements, ranks=2 * len(placements))


def check_gradient_that_is_cut_by_rows():
    mesh, (function, inputs, options) = mesh_of(2), prepare("sinks")
    sharded = [distributed(x, mesh, [HEADS]) for x in inputs]
    weights = torch.randn(BATCH, SEQLEN, 4, HEAD_DIM, dtype=torch.float64)
    out = function(*sharded, **options)[0]
    found = torch.autograd.grad((out.redistribute(mesh, [ROWS]) * distributed(weights, mesh, [ROWS])).sum(), sharded)
    expected = torch.autograd.grad((function(*inputs, **options)[0] * weights).sum(), inputs)
    assert [x.placements for x in found] == [(HEADS,)] * 3
    assert_near([whole(x) for x in found], expected)


def test_gradients_may_be_cut_by_rows(world):
    world.run(check_gradient_that_is_cut_by_rows, ranks=2)


def check_compiled(name, cut):
    mesh, (function, inputs, options) = mesh_of(2), prepare(name)
    sharded = [distributed(x, mesh, [CUTS[cut](x.dim())]) for x in inputs]
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = values_and_gradients(function, inputs, options)
    assert_near(values_and_gradients(compiled, sharded, options), expected)


@pytest.mark.parametrize(
    ("name", "cut"), [("sinks", "batch"), ("grouped", "heads"), ("qkvpacked", "heads"), ("varlen", "heads")]
)
def test_compile(world, name, cut):
    """One graph, forward and backward."""
    world.run(check_compiled, name, cut, ranks=2)


def check_compiled_for_any_length():
    mesh, counter = mesh_of(2), CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(DENSE, backend=counter, fullgraph=True)
    for length in (5, 7, 9, 20):
        shape = (2, length, 4, HEAD_DIM)
        inputs = leaves([shape, shape, shape])
        sharded = [distributed(x, mesh, [HEADS]) for x in inputs]
        assert_near(values_and_gradients(compiled, sharded, CAUSAL), values_and_gradients(DENSE, inputs, CAUSAL))
    assert counter.frame_count == 2


def test_compile_with_dynamic_shapes(world):
    """The graph of the second length is valid for all others."""
    world.run(check_compiled_for_any_length, ranks=2)


def check_errors():
    mesh, (function, inputs, _) = init_device_mesh("cpu", (4,)), prepare("grouped")
    rows = [distributed(x, mesh, [ROWS]) for x in inputs]
    message = r"k: expected heads or the batch to be cut, not the sequence, which flash_attn\.context_parallel is for"
    with pytest.raises(ValueError, match=message):
        function(*rows)
    with pytest.raises(ValueError, match="q: expected heads or the batch to be cut"):
        CALLS["varlen"][0](*(distributed(x, mesh, [Shard(0)]) for x in leaves(varlen(2))))
    heads = [distributed(x, mesh, [HEADS]) for x in inputs]
    with pytest.raises(TypeError, match=r"v: expected a DTensor, as the others are .*, got Tensor of shape"):
        function(*heads[:2], inputs[2])
    with pytest.raises(ValueError, match=r"dropout_p: expected 0 for DTensors whose batch is cut .*, got float 0\.1"):
        function(*(distributed(x, mesh, [Shard(0)]) for x in inputs), dropout_p=0.1)
    with pytest.raises(TypeError, match="dropout_p: expected float, got None"):
        function(*heads, dropout_p=None)
    with pytest.raises(ValueError, match="v: expected the mesh of q, got "):
        function(*heads[:2], distributed(inputs[2], init_device_mesh("cpu", (2, 2)), [Shard(0)] * 2))
    with pytest.raises(ValueError, match=r"k: expected at least 3 dimensions, got shape \(8,\)"):
        function(heads[0], distributed(torch.zeros(8), mesh, [Shard(0)]), heads[2])
    with pytest.raises(ValueError, match=r"softcap: expected .*, got nan"):
        function(*heads, softcap=float("nan"))


def test_errors(world):
    world.run(check_errors)


def test_torch_distributed_tensor_is_loaded_with_the_first_dtensor():
    program = "import sys, flash_attn.modules.mha; print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
