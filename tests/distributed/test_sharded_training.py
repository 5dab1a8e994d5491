"""Context parallel attention within models: checkpointing, DistributedDataParallel, FSDP, torch.compile, autocast."""

import warnings

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from distributed_world import group_of
from flash_attn import flash_attn_func
from flash_attn.context_parallel import context_parallel_attention, shard, unshard

pytestmark = pytest.mark.xdist_group("distributed")

SEQLEN, NUM_HEADS, HEAD_DIM = 200, 4, 8
WIDTH = NUM_HEADS * HEAD_DIM


class Layer(torch.nn.Module):
    """Causal attention with dropout, and its projections. group: None for one device."""

    def __init__(self, group=None, method="ring"):
        super().__init__()
        self.inputs = torch.nn.Linear(WIDTH, 3 * WIDTH, dtype=torch.float64)
        self.outputs = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.group, self.method = group, method

    def forward(self, x):
        q, k, v = self.inputs(x).unflatten(-1, (3, NUM_HEADS, HEAD_DIM)).unbind(-3)
        if self.group is None:
            out = flash_attn_func(q, k, v, dropout_p=0.1, causal=True)
        else:
            out = context_parallel_attention(
                q, k, v, group=self.group, method=self.method, dropout_p=0.1, causal=True, seqlen=SEQLEN
            )
        return x + self.outputs(out.flatten(-2))


class Model(torch.nn.Module):
    """Two layers. recompute: how layers are checkpointed."""

    def __init__(self, group=None, method="ring", recompute=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Layer(group, method) for _ in range(2))
        self.recompute = recompute

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.recompute is None else checkpoint(layer, x, use_reentrant=self.recompute)
        return x


def data():
    generator = torch.Generator().manual_seed(5)
    x, weights = (torch.randn(2, SEQLEN, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.requires_grad_(), weights


def on_one_device():
    """Gradients of the parameters and of x."""
    model, (x, weights) = Model(), data()
    torch.manual_seed(7)
    (model(x) * weights).sum().backward()
    return [parameter.grad for parameter in model.parameters()], x.grad


def loss_of_shard(model, group):
    """Run forward and backward with the loss of this rank's rows; returns the gradient of the whole x."""
    x, weights = data()
    local, local_weights = shard(x, 1, group), shard(weights, 1, group)
    torch.manual_seed(7)
    (model(local) * local_weights).sum().backward()
    return x.grad


def assert_near(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def summed(model, group):
    grads = [parameter.grad for parameter in model.parameters()]
    for grad in grads:
        torch.distributed.all_reduce(grad, group=group)
    return grads


def check_training(method, recompute, ranks):
    group = group_of(ranks)
    grads, dx = on_one_device()
    model = Model(group, method, recompute)
    assert_near([loss_of_shard(model, group)], [dx])
    assert_near(summed(model, group), grads)


@pytest.mark.parametrize("recompute", [None, False, True], ids=["kept", "checkpoint", "reentrant"])
@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_gradients_of_parameters_sum_to_those_of_one_device(world, method, recompute):
    ranks = 3 if method != "ulysses" else 2
    world.run(check_training, method, recompute, ranks, ranks=ranks)


def check_loss_of_the_whole():
    group = group_of(2)
    grads, dx = on_one_device()
    model, (x, weights) = Model(group), data()
    torch.manual_seed(7)
    (unshard(model(shard(x, 1, group)), 1, group, seqlen=SEQLEN) * weights).sum().backward()
    assert_near([x.grad], [dx])
    assert_near(summed(model, group), grads)


def test_a_loss_of_the_whole_on_every_rank(world):
    world.run(check_loss_of_the_whole, ranks=2)


def check_data_parallel():
    """The gradients are averaged over ranks, so the loss of a shard counts as often as there are ranks."""
    group = group_of(2)
    grads, dx = on_one_device()
    model = DistributedDataParallel(Model(group), process_group=group)
    x, weights = data()
    torch.manual_seed(7)
    (model(shard(x, 1, group)) * shard(weights, 1, group)).sum().mul(2).backward()
    assert_near([x.grad], [2 * dx])
    assert_near([parameter.grad for parameter in model.parameters()], grads)


def test_distributed_data_parallel(world):
    world.run(check_data_parallel, ranks=2)


def check_fully_sharded():
    mesh = torch.distributed.init_device_mesh("cpu", (4,))
    grads, _ = on_one_device()
    model = Model(mesh)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x, weights = data()
    torch.manual_seed(7)
    (model(shard(x, 1, mesh)) * shard(weights, 1, mesh)).sum().mul(4).backward()
    assert_near([parameter.grad.full_tensor() for parameter in model.parameters()], grads)


def test_fully_sharded_data_parallel(world):
    world.run(check_fully_sharded)


def check_compiled():
    group = group_of(2)
    grads, dx = on_one_device()
    model = Model(group)
    compiled = torch.compile(model, backend="aot_eager")
    assert_near([loss_of_shard(compiled, group)], [dx])
    assert_near(summed(model, group), grads)


def test_compile_breaks_the_graph_at_attention(world):
    world.run(check_compiled, ranks=2)


def check_compiled_shards():
    group = group_of(2)
    compiled = torch.compile(lambda x: unshard(shard(x, 1, group).sin(), 1, group), backend="aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*Dynamo")
        for length in (100, 150, 200):
            x = torch.randn(2, length, 3, requires_grad=True)
            y = compiled(x)
            y.sum().backward()
            assert torch.equal(y, x.sin()) and torch.equal(x.grad, x.cos())


def test_compile_breaks_the_graph_at_shards(world):
    """It does not trace how they are cut."""
    world.run(check_compiled_shards, ranks=2)


def check_autocast():
    group = group_of(2)
    q, k, v = (torch.randn(1, 96, 4, 8).requires_grad_() for _ in range(3))
    local = [shard(x, 1, group) for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = context_parallel_attention(*local, group=group)
    rounded = context_parallel_attention(*(x.bfloat16() for x in local), group=group)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rounded)
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_autocast_casts_the_inputs(world):
    world.run(check_autocast, ranks=2)


def counted_flops(call):
    with FlopCounterMode(display=False) as counter:
        call().sum().backward()
    return counter.get_total_flops()


def flops(method):
    """Those of this rank, and those of one device."""
    group = group_of(2)
    x = torch.randn(1, 256, 4, 8, requires_grad=True)
    local = shard(x, 1, group).detach().requires_grad_()
    return (
        counted_flops(lambda: context_parallel_attention(local, local, local, group=group, method=method)),
        counted_flops(lambda: flash_attn_func(x, x, x)),
    )


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_ranks_count_the_flops_of_one_device(world, method):
    ours, theirs = zip(*world.run(flops, method, ranks=2), strict=True)
    assert sum(ours) == theirs[0] > 0


def check_errors_of_backward():
    group = group_of(2)
    local = [shard(torch.randn(1, 96, 4, 8), 1, group).requires_grad_() for _ in range(3)]
    out, lse = context_parallel_attention(*local, group=group, return_lse=True)
    assert not lse.requires_grad
    (grad,) = torch.autograd.grad(out.sum(), local[0], create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad(grad.sum(), local[0])


def check_writes_before_backward():
    group = group_of(2)
    local = [shard(torch.randn(1, 96, 4, 8), 1, group).requires_grad_() for _ in range(3)]
    slopes = torch.rand(4)
    out = context_parallel_attention(*local, group=group, alibi_slopes=slopes)
    slopes.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_slopes_must_not_change_before_backward(world):
    world.run(check_writes_before_backward, ranks=2)


def test_second_derivatives_are_an_error(world):
    world.run(check_errors_of_backward, ranks=2)
