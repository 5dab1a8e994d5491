"""Training with tensor parallelism, FSDP, DistributedDataParallel and batches as DTensors is that of one process."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from distributed_tensors import assert_near, mesh_of, whole
from distributed_world import group_of
from flash_attn import flash_attn_func
from flash_attn.flash_attention import FlashMHA
from flash_attn.modules.mha import MHA

pytestmark = pytest.mark.xdist_group("distributed")

BATCH, SEQLEN, NUM_HEADS, NUM_HEADS_K, HEAD_DIM = 4, 10, 4, 2, 8
WIDTH = NUM_HEADS * HEAD_DIM


class Attention(torch.nn.Module):
    """Causal attention of grouped heads, with a projection for each of q, k and v. It takes any number of heads."""

    def __init__(self):
        super().__init__()
        widths = {"wq": WIDTH, "wk": NUM_HEADS_K * HEAD_DIM, "wv": NUM_HEADS_K * HEAD_DIM}
        for name, width in widths.items():
            self.add_module(name, torch.nn.Linear(WIDTH, width))
        self.wo = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (project(x).unflatten(-1, (-1, HEAD_DIM)) for project in (self.wq, self.wk, self.wv))
        return self.wo(flash_attn_func(q, k, v, causal=True).flatten(-2))


MODULES = {
    "plain": Attention,
    "FlashMHA": lambda: FlashMHA(WIDTH, NUM_HEADS, causal=True, sinks=True),
    "MHA": lambda: MHA(WIDTH, NUM_HEADS, NUM_HEADS_K, causal=True, use_flash_attn=True, use_alibi=True, sinks=True),
}


def build(name):
    torch.manual_seed(0)
    return MODULES[name]().double()


def data():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(BATCH, SEQLEN, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]


def step(module, x, target):
    """The loss and the parameters after two steps of training."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        out = module(x)
        out = out[0] if isinstance(out, tuple) else out
        loss = (out - target).square().mean()
        loss.backward()
        optimizer.step()
    return [whole(loss).detach(), *(whole(x).detach() for x in module.parameters())]


def compiled(module, wanted):
    torch.compiler.reset()
    return torch.compile(module, backend="aot_eager") if wanted else module


def check_tensor_parallel(local, is_compiled):
    expected = step(build("plain"), *data())
    columns, rows = ColwiseParallel(use_local_output=local), RowwiseParallel()
    plan = {"wq": columns, "wk": columns, "wv": columns, "wo": rows}
    module = parallelize_module(build("plain"), mesh_of(2), plan)
    assert_near(step(compiled(module, is_compiled), *data()), expected, 1e-10)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("local", [False, True])
def test_tensor_parallel(world, local, is_compiled):
    """local: attention gets the local heads as plain tensors, not as DTensors."""
    world.run(check_tensor_parallel, local, is_compiled, ranks=2)


def check_batches(name, is_compiled):
    mesh = mesh_of(2)
    expected = step(build(name), *data())
    module = distribute_module(build(name), mesh)
    batch = [distribute_tensor(x, mesh, [Shard(0)]) for x in data()]
    assert_near(step(compiled(module, is_compiled), *batch), expected, 1e-10)


@pytest.mark.parametrize(
    ("name", "is_compiled"), [("plain", False), ("FlashMHA", False), ("FlashMHA", True), ("MHA", False)]
)
def test_a_batch_as_a_dtensor(world, name, is_compiled):
    world.run(check_batches, name, is_compiled, ranks=2)


def options_of_mha():
    shared = {"num_heads_kv": 2, "causal": True, "use_flash_attn": True, "window_size": (3, 0), "dwconv": True}
    return MHA(WIDTH, NUM_HEADS, rotary_emb_dim=4, use_alibi=True, sinks=True, **shared).double()


def check_padding():
    mesh, module = mesh_of(2), options_of_mha()
    x, weights = data()
    keep = torch.rand(BATCH, SEQLEN) < 0.6
    expected = module(x, key_padding_mask=keep)
    grads = torch.autograd.grad((expected * weights).sum(), list(module.parameters()))
    module = distribute_module(module, mesh)
    x, keep, weights = (distribute_tensor(each, mesh, [Shard(0)]) for each in (x, keep, weights))
    out = module(x, key_padding_mask=keep)
    found = torch.autograd.grad((out * weights).sum(), list(module.parameters()))
    assert out.placements == (Shard(0),)
    assert_near([whole(each) for each in (out, *found)], [expected, *grads], 1e-10)


def test_a_padded_batch_as_a_dtensor(world):
    """With rotary embeddings, whose tables are plain tensors."""
    world.run(check_padding, ranks=2)


def own(x, size, rank):
    return x.chunk(size)[rank]


def mean_over_ranks(loss):
    torch.distributed.all_reduce(loss, group=group_of(2))
    return loss / 2


def check_data_parallel(wrap, name, is_compiled):
    rank = torch.distributed.get_rank()
    expected = step(build(name), *data())
    module = compiled(wrap(build(name)), is_compiled)
    loss, *parameters = step(module, *(own(x, 2, rank) for x in data()))
    assert_near([mean_over_ranks(loss), *parameters], expected, 1e-10)


def fsdp(module):
    return fully_shard(module, mesh=mesh_of(2))


def ddp(module):
    return DistributedDataParallel(module, process_group=group_of(2))


@pytest.mark.parametrize("wrap", [ddp, fsdp])
@pytest.mark.parametrize(("name", "is_compiled"), [("FlashMHA", False), ("FlashMHA", True), ("MHA", False)])
def test_data_parallel(world, wrap, name, is_compiled):
    world.run(check_data_parallel, wrap, name, is_compiled, ranks=2)


def check_both():
    """FSDP over the batch and tensor parallelism over heads, on a mesh of four ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    expected = step(build("plain"), *data())
    columns = ColwiseParallel(use_local_output=False)
    plan = {"wq": columns, "wk": columns, "wv": columns, "wo": RowwiseParallel()}
    module = fully_shard(parallelize_module(build("plain"), mesh["tensor"], plan), mesh=mesh["data"])
    loss, *parameters = step(module, *(own(x, 2, mesh["data"].get_local_rank()) for x in data()))
    torch.distributed.all_reduce(loss)
    assert_near([loss / 4, *parameters], expected, 1e-10)


def test_both(world):
    world.run(check_both)
