"""torch.ops.flash_attn.fwd and bwd on DTensors, once flash_attn.integrations.dtensor has registered their sharding."""

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from distributed_tensors import assert_near, distributed, mesh_of, whole
from distributed_world import group_of
from flash_attn.integrations import dtensor

pytestmark = pytest.mark.xdist_group("distributed")

BATCH, SEQLEN, SEQLEN_K, HEAD_DIM = 4, 7, 9, 8
LENGTHS = {
    "cu_seqlens_q": torch.tensor([0, 3, 3, 7], dtype=torch.int32),
    "cu_seqlens_k": torch.tensor([0, 2, 5, 9], dtype=torch.int32),
    "max_seqlen_q": 4,
    "max_seqlen_k": 4,
}
CAUSAL = {"causal": True}


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def ranges(batch):
    return torch.randint(0, SEQLEN_K + 1, (batch, SEQLEN, 2), dtype=torch.int32).sort(-1).values


# Numbers of heads and of key heads, the batch (None: packed), and the keyword arguments. Each tensor among these comes
# with its dimensions of heads and of the batch.
CALLS = {
    "plain": (4, 4, BATCH, dict),
    "grouped": (4, 2, BATCH, lambda: CAUSAL | {"return_max_logits": True}),
    "odd heads": (3, 3, BATCH, lambda: CAUSAL | {"seqused_k": (ints(3, 9, 0, 4), None, 0)}),
    "many heads": (24, 6, BATCH, lambda: CAUSAL),
    "one key head": (4, 1, BATCH, lambda: CAUSAL),
    "uneven batch": (4, 2, 3, lambda: {"window_size_left": 2}),
    "one sequence": (4, 2, 1, lambda: {"alibi_slopes": (torch.rand(1, 4), 1, 0), "q_starts": (ints(3), None, 0)}),
    "alibi of heads": (4, 2, BATCH, lambda: CAUSAL | {"alibi_slopes": (torch.rand(4), 0, None)}),
    "alibi of sequences": (4, 2, BATCH, lambda: {"alibi_slopes": (torch.rand(BATCH, 4), 1, 0)}),
    "sinks": (4, 2, BATCH, lambda: CAUSAL | {"s_aux": (torch.randn(4).double(), 0, None)}),
    "ranges": (4, 4, BATCH, lambda: {"key_ranges": (ranges(BATCH), None, 0), "return_max_logits": True}),
    "ranges of two": (4, 4, 2, lambda: {"key_ranges": (ranges(2), None, 0)}),
    "shared ranges": (4, 4, BATCH, lambda: {"key_ranges": (ranges(1), None, None)}),
    "starts": (4, 4, BATCH, lambda: CAUSAL | {"q_starts": (ints(0, 1, 2, 3), None, 0), "k_start": 1}),
    "lengths": (
        *(4, 4, BATCH),
        lambda: {"seqused_k": (ints(3, 9, 0, 4), None, 0), "leftpad_k": (ints(1, 0, 0, 2), None, 0)},
    ),
    "varlen": (4, 2, None, lambda: CAUSAL | {"alibi_slopes": (torch.rand(3, 4), 1, None), "return_max_logits": True}),
}  # fmt: skip


def prepare(name):
    """q, k and v; the options; of each tensor among these, the dimensions of heads and of the batch."""
    torch.manual_seed(1)
    num_heads, num_heads_k, batch, make_options = CALLS[name]
    shapes = [(SEQLEN, num_heads, HEAD_DIM), *[(SEQLEN_K, num_heads_k, HEAD_DIM)] * 2]
    if batch is not None:
        shapes = [(batch, *shape) for shape in shapes]
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    options = make_options() | (
        {name: x if type(x) is int else (x, None, None) for name, x in LENGTHS.items()} if batch is None else {}
    )
    dims = {name: x[1:] for name, x in options.items() if isinstance(x, tuple)}
    return inputs, {name: x[0] if isinstance(x, tuple) else x for name, x in options.items()}, dims


def values_and_gradients(inputs, options):
    """out, softmax_lse, max_logits and the gradients of q, k, v and s_aux, of a sum that all of them are in."""
    out, lse, max_logits = torch.ops.flash_attn.fwd(*inputs, **options)
    generator = torch.Generator().manual_seed(2)
    loss = 0
    for x in (out, lse):
        visible = torch.where(whole(x).isinf(), 0, whole(x))
        loss = loss + (visible * torch.rand(x.shape, generator=generator, dtype=x.dtype)).sum()
    sources = [*inputs, *(x for name, x in options.items() if name == "s_aux" and x.requires_grad)]
    return [whole(x) for x in (out, lse, max_logits, *torch.autograd.grad(loss, sources))]


def cut(x, mesh, cuts, dims=None):
    """A tensor cut by heads, by the batch or not at all in each dimension of the mesh; dims: where it has these."""
    heads, batch = (x.ndim - 2, 0) if dims is None else dims
    where = [{"heads": heads, "batch": batch, "nothing": None}[what] for what in cuts]
    return distributed(x, mesh, [Replicate() if dim is None else Shard(dim) for dim in where])


def check_call(name, of_q, of_keys, kept):
    """q is cut in one way, k and v in another; keyword tensors, as the results are."""
    dtensor.register()
    mesh = mesh_of(2) if len(of_q) == 1 else init_device_mesh("cpu", (2, 2))
    inputs, options, dims = prepare(name)
    if "s_aux" in options:
        # Its gradient pads a DTensor, which torch 2.11 itself cannot do on a mesh of two dimensions (IndexError).
        options["s_aux"].requires_grad_(len(of_q) == 1 or torch.__version__ >= "2.13")
    expected = values_and_gradients(inputs, options)
    sharded = [cut(x, mesh, cuts) for x, cuts in zip(inputs, (of_q, of_keys, of_keys), strict=True)]
    of_tensors = {key: cut(x, mesh, kept, dims[key]) for key, x in options.items() if key in dims}
    assert_near(values_and_gradients(sharded, options | of_tensors), expected)
    out, lse, _ = torch.ops.flash_attn.fwd(*sharded, **options | of_tensors)
    assert out.placements == cut(out.full_tensor(), mesh, kept).placements
    assert lse.placements == cut(lse.full_tensor(), mesh, kept, (lse.ndim - 2, 0)).placements


NOTHING, CUT_HEADS, CUT_BATCH = ("nothing",), ("heads",), ("batch",)
# What is cut, of q, of k and v, and of the results.
ROWS = [
    *((name, cuts, cuts, cuts) for name in CALLS for cuts in (NOTHING, CUT_HEADS, CUT_BATCH)),
    *(
        (name, ("batch", "heads"), ("batch", "heads"), ("batch", "heads"))
        for name in ("grouped", "sinks", "alibi of sequences", "ranges", "one sequence")
    ),
    *(
        (name, ("heads", "nothing"), ("heads", "nothing"), ("heads", "nothing"))
        for name in ("plain", "alibi of heads", "varlen")
    ),
    ("plain", ("heads", "heads"), ("heads", "heads"), ("heads", "heads")),
    # k and v are cut as q is.
    ("grouped", CUT_HEADS, NOTHING, CUT_HEADS),
    ("grouped", NOTHING, CUT_HEADS, CUT_HEADS),
    ("sinks", CUT_BATCH, CUT_HEADS, CUT_BATCH),
    ("alibi of sequences", ("batch", "heads"), ("heads", "batch"), ("batch", "heads")),
    ("sinks", ("batch", "heads"), ("heads", "batch"), ("batch", "heads")),
    ("starts", ("batch", "heads"), ("heads", "batch"), ("batch", "heads")),
    ("ranges of two", ("batch", "nothing"), ("heads", "heads"), ("batch", "heads")),
    ("many heads", ("batch", "heads"), ("heads", "heads"), ("batch", "heads")),
    # Ranks would have different numbers of heads.
    ("one key head", ("batch", "heads"), ("batch", "nothing"), ("batch", "nothing")),
    ("odd heads", ("batch", "heads"), ("batch", "heads"), ("batch", "nothing")),
    ("many heads", ("heads", "heads"), ("heads", "heads"), ("nothing", "nothing")),
]
# Likewise.
KEPT = {("odd heads", CUT_HEADS): NOTHING, ("one key head", CUT_HEADS): NOTHING}


@pytest.mark.parametrize(
    ("name", "of_q", "of_keys", "kept"),
    [
        (name, of_q, of_keys, KEPT.get((name, of_q), kept))
        for name, of_q, of_keys, kept in ROWS
        if not (name == "varlen" and "batch" in of_q)
    ],
)
def test_values_and_gradients_are_those_of_one_device(world, name, of_q, of_keys, kept):
    """Results are cut as q is, unless heads cannot be cut evenly."""
    world.run(check_call, name, of_q, of_keys, kept, ranks=2 ** len(of_q))


def check_errors():
    dtensor.register()
    mesh, (inputs, _, _) = mesh_of(2), prepare("plain")
    fwd = torch.ops.flash_attn.fwd
    rows = [distributed(x, mesh, [Shard(1)]) for x in inputs]
    heads, whole_inputs = ([cut(x, mesh, (what,)) for x in inputs] for what in ("heads", "nothing"))
    message = (
        r"fwd: 3 problems(.|\n)*k: expected heads or the batch to be cut, not the sequence, which flash_attn\.context"
    )
    with pytest.raises(RuntimeError, match=message):
        fwd(*rows)
    slopes = torch.rand(4)
    # First calls that are right: a decision is not kept for others with the same q, k and v.
    fwd(*heads, alibi_slopes=distributed(slopes, mesh, [Shard(0)]))
    with pytest.raises(RuntimeError, match=r"alibi_slopes: expected placements \(Shard\(dim=0\),\), as this call cuts"):
        fwd(*heads, alibi_slopes=distributed(slopes, mesh, [Replicate()]))
    fwd(*whole_inputs, alibi_slopes=distributed(slopes, mesh, [Replicate()]))
    with pytest.raises(RuntimeError, match=r"alibi_slopes: expected placements \(Replicate\(\),\), as this call cuts"):
        fwd(*whole_inputs, alibi_slopes=distributed(slopes, mesh, [Shard(0)]))
    other = DeviceMesh.from_group(group_of(2), "cpu", mesh_dim_names=("other",))
    with pytest.raises(RuntimeError, match=r"alibi_slopes: expected the mesh of q, got DeviceMesh"):
        fwd(*heads, alibi_slopes=distributed(slopes, other, [Shard(0)]))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        fwd(*heads, alibi_slopes=slopes)
    state = distributed(torch.tensor([3, 4]), mesh, [Replicate()])
    fwd(*heads, dropout_p=0.0, rng_state=state)
    with pytest.raises(RuntimeError, match=r"dropout_p: expected 0 for tensors that are cut, unless flash_attn_func"):
        fwd(*heads, dropout_p=0.5, rng_state=state)
    expected = fwd(*inputs, dropout_p=0.5, rng_state=torch.tensor([3, 4]))[0]
    assert_near([fwd(*whole_inputs, dropout_p=0.5, rng_state=state)[0].full_tensor()], [expected])
    with pytest.raises(RuntimeError, match=r"softcap: expected .*, got nan"):
        fwd(*heads, softcap=float("nan"))
    out, lse, _ = fwd(*heads)
    with pytest.raises(RuntimeError, match=r"bwd: s_aux: expected placements \(Shard\(dim=0\),\), as this call cuts"):
        torch.ops.flash_attn.bwd(out, *heads, out, lse, s_aux=distributed(slopes, mesh, [Replicate()]))


def test_errors(world):
    world.run(check_errors, ranks=2)


def check_compiled():
    dtensor.register()
    mesh, (inputs, options, _) = mesh_of(2), prepare("grouped")

    def doubled(*inputs):
        # Local: torch 2.13 at times confuses the meshes of arguments and results, of its own ops as well.
        return torch.ops.flash_attn.fwd(*inputs, **options)[0].to_local() * 2

    torch.compiler.reset()
    sharded = [cut(x, mesh, ("heads",)) for x in inputs]
    out = torch.compile(doubled, backend="aot_eager", fullgraph=True)(*sharded)
    found = [DTensor.from_local(out, mesh, [Shard(2)]), *torch.autograd.grad(out.sum(), sharded)]
    plain = torch.ops.flash_attn.fwd(*inputs, **options)[0] * 2
    assert_near([x.full_tensor() for x in found], [plain, *torch.autograd.grad(plain.sum(), inputs)])


def test_compile(world):
    world.run(check_compiled, ranks=2)
