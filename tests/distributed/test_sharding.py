"""shard and unshard, and their gradients."""

import pytest
import torch

from distributed_cases import pair_of_groups
from distributed_world import group_of
from flash_attn.context_parallel import context_parallel_attention, shard, unshard

pytestmark = pytest.mark.xdist_group("distributed")

METHODS = ["ring", "all_gather", "ulysses"]
LENGTHS = {"sequence": (150,), "short": (3,), "empty": (0,), "documents": (90, 0, 5, 200)}


def whole(lengths, dim):
    shape = [2, 3]
    shape.insert(dim, sum(lengths))
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def arguments(lengths, layout, ranks):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0) if len(lengths) > 1 else None
    return {"group": group_of(ranks) if ranks else pair_of_groups(), "layout": layout, "cu_seqlens": cu_seqlens}


def check_round_trip(lengths, layout, ranks, dim):
    where = arguments(lengths, layout, ranks)
    x = whole(lengths, dim)
    local = shard(x, dim - 3, **where)
    assert torch.equal(unshard(local, dim, **where), x)
    if len(lengths) == 1:
        assert torch.equal(unshard(local, dim, **where, seqlen=lengths[0]), x)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 0], ids=["1", "2", "3", "4", "mesh"])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_unshard_is_the_inverse_of_shard(world, layout, ranks):
    for lengths in LENGTHS.values():
        for dim in range(3):
            world.run(check_round_trip, lengths, layout, ranks, dim, ranks=ranks or 4)


def check_memory(ranks):
    group = group_of(ranks)
    x = whole((150,), 1).requires_grad_()
    local = shard(x, 1, group)
    joined = unshard(local, 1, group)
    local += 1
    joined += 1
    assert torch.equal(joined, x + 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_results_do_not_share_memory(world, ranks):
    """Writes to results are allowed, and leave inputs as they are."""
    world.run(check_memory, ranks, ranks=ranks)


def function(x):
    return x.sin() * x


def check_gradients(lengths, layout, ranks):
    """The loss of the whole, on every rank, and the sum of losses of the shards have the gradient of one device."""
    where = arguments(lengths, layout, ranks)
    weights = whole(lengths, 1).cos()
    alone = whole(lengths, 1).requires_grad_()
    (function(alone) * weights).sum().backward()
    x = whole(lengths, 1).requires_grad_()
    (unshard(function(shard(x, 1, **where)), 1, **where) * weights).sum().backward()
    assert torch.allclose(x.grad, alone.grad, atol=1e-12)
    y = whole(lengths, 1).requires_grad_()
    (function(shard(y, 1, **where)) * shard(weights, 1, **where)).sum().backward()
    assert torch.allclose(y.grad, alone.grad, atol=1e-12)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("ranks", [2, 3, 0], ids=["2", "3", "mesh"])
def test_gradients_are_those_of_one_device(world, layout, ranks):
    for lengths in LENGTHS.values():
        world.run(check_gradients, lengths, layout, ranks, ranks=ranks or 4)


def check_second_derivative():
    x = whole((150,), 1).requires_grad_()
    (grad,) = torch.autograd.grad(function(shard(x, 1, group_of(2))).sum(), x, create_graph=True)
    grad.square().sum().backward()
    y = whole((150,), 1).requires_grad_()
    (other,) = torch.autograd.grad(function(y).sum(), y, create_graph=True)
    other.square().sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-12)


def test_shard_has_second_derivatives(world):
    world.run(check_second_derivative, ranks=2)


def check_default_device():
    """What is computed on the host has nothing to do with the default device of new tensors."""
    where = arguments((190, 20), "zigzag", 2)
    x = whole((190, 20), 0)
    with torch.device("meta"):
        local = shard(x, 0, **where)
        outs = [context_parallel_attention(*[local] * 3, method=method, **where) for method in METHODS]
        assert torch.equal(unshard(local, 0, **where), x)
    assert torch.allclose(outs[0], outs[1]) and torch.allclose(outs[0], outs[2])


def test_default_device_does_not_matter(world):
    world.run(check_default_device, ranks=2)


def check_positions():
    """Position of the rows of this rank in their documents, for rotary embeddings."""
    lengths = LENGTHS["documents"]
    where = arguments(lengths, "zigzag", 2)
    within = torch.cat([torch.arange(length) for length in lengths])
    return shard(within, 0, **where).tolist()


def test_positions_are_sharded_like_tokens(world):
    first, _ = world.run(check_positions, ranks=2)
    assert first == [*range(32), *range(5), *range(64), *range(192, 200)]


def errors():
    group, x = group_of(2), torch.zeros(64, 4)
    calls = {
        "x: expected torch.Tensor, got list": lambda: shard([1], 0, group),
        "dim: expected int, got str": lambda: shard(x, "0", group),
        "dim: expected a dimension of x, which has 2, got 2": lambda: shard(x, 2, group),
        "layout: expected 'zigzag' or 'contiguous', got str 'striped'": lambda: shard(x, 0, group, "striped"),
        "cu_seqlens: expected a last value of x.shape[0] = 64, got 60": lambda: shard(
            x, 0, group, cu_seqlens=torch.tensor([0, 60])
        ),
        "cu_seqlens: expected values that start with 0 and never decrease, got [0, 9, 5]": lambda: unshard(
            x, 0, group, cu_seqlens=torch.tensor([0, 9, 5])
        ),
        "cu_seqlens: expected a Tensor (batch_size+1,), int32 or int64, got": lambda: shard(
            x, 0, group, cu_seqlens=torch.zeros(2)
        ),
        "group: expected a ProcessGroup of which this process is a member": lambda: shard(x, 0, "world"),
        "x: expected a tensor with data, got one on the meta device": lambda: unshard(x.to("meta"), 0, group),
        "x: expected the shards of a zigzag layout of 128 rows, [64, 64] on the ranks, got [70, 58]": lambda: unshard(
            torch.zeros(70 if group.rank() == 0 else 58), 0, group
        ),
        "x: expected 96 rows along dimension 0, those of rank 0 of 1, got shape (64, 4)": lambda: (
            unshard(x, 0, group_of(1), seqlen=96) if group.rank() == 0 else None
        ),
    }
    for text, call in calls.items():
        try:
            call()
        except (TypeError, ValueError) as error:
            assert text in str(error)  # noqa: PT017  several calls
        else:
            assert "rank 0 of 1" in text and group.rank() == 1, text


def test_errors_name_the_argument(world):
    world.run(errors, ranks=2)
