"""utils.distributed: results and gradients in two processes."""

import importlib.util
import sys
import types

import pytest
import torch

from flash_attn.utils import distributed
from plain_attention import assert_same, leaves

WORLD_SIZE = 2
FUNCTIONS = {"all_gather": (8, 3), "reduce_scatter": (2, 3), "all_reduce": (4, 3)}  # input (4, 3) to this shape
MARKS = {"first": "_shared_params", "second": None, "third": "_sequence_parallel", "fourth": "_sequence_parallel"}


def leaf(rank):
    """A leaf whose transpose, not contiguous, is the input (4, 3) of a rank."""
    return leaves((3, 4), seed=10 + rank)[0]


def upstream(name, rank):
    """The gradient of the function's output on a rank."""
    return leaves(FUNCTIONS[name], seed=20 + rank)[0].detach()


def model(rank):
    """Parameters with different values on each rank, and gradients of 1 and 2."""
    module = torch.nn.Module()
    for i, (name, mark) in enumerate(MARKS.items()):
        parameter = torch.nn.Parameter(leaves((2, 3), seed=30 + 10 * i + rank)[0].detach().t())
        parameter.grad = torch.full_like(parameter, 1.0 + rank)
        if mark:
            setattr(parameter, mark, True)
        module.register_parameter(name, parameter)
    module.fourth.grad = module.fourth.grad if rank == 0 else None
    frozen = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
    frozen._sequence_parallel = True
    module.frozen = frozen
    return module


def call_functions(rank, group):
    found = {}
    for name in FUNCTIONS:
        x = leaf(rank)
        out = getattr(distributed, name)(x.t(), group)
        (dx,) = torch.autograd.grad(out, x, upstream(name, rank))
        contiguous = x.detach().t().contiguous()
        raw, handle = getattr(distributed, f"{name}_raw")(contiguous, group)
        assert handle is None
        later, handle = getattr(distributed, f"{name}_raw")(x.detach().t(), group, async_op=True)
        handle.wait()
        assert (raw is contiguous) == (name == "all_reduce")
        assert torch.equal(x, leaf(rank)), "the input was written to"
        found[name] = [out.detach(), dx.t(), raw, later]
    return found


def call_models(rank, group):
    shared, summed, alone = model(rank), model(rank), model(rank)
    distributed.sync_shared_params(shared, group)
    distributed.allreduce_sequence_parallel_grad(summed, group)
    last = torch.distributed.new_group([1])
    if rank == 1:
        distributed.sync_shared_params(alone, last)
        assert_same(alone.parameters(), model(rank).parameters())
    return {
        "shared": [shared.get_parameter(name).detach() for name in MARKS],
        "summed": [summed.get_parameter(name).grad for name in MARKS],
        "frozen": summed.frozen.grad,
    }


def worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    try:
        group = torch.distributed.group.WORLD
        found = call_functions(rank, group) | call_models(rank, group)
        with pytest.raises(ValueError, match=r"reduce_scatter: input_: .*world_size = 2 divides, got shape \(3, 4\)"):
            distributed.reduce_scatter(leaf(rank), group)
        torch.save(found, f"{folder}/found{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of each rank."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def expected_of(name):
    """Expected values and gradients on each rank, computed in one process."""
    inputs = [leaf(rank).detach().t() for rank in range(WORLD_SIZE)]
    grads = [upstream(name, rank) for rank in range(WORLD_SIZE)]
    total = inputs[0] + inputs[1]
    if name == "all_gather":
        return [torch.cat(inputs)] * 2, (grads[0] + grads[1]).chunk(2)
    if name == "reduce_scatter":
        return total.chunk(2), [torch.cat(grads)] * 2
    return [total] * 2, grads


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(found, name):
    values, grads = expected_of(name)
    for rank in range(WORLD_SIZE):
        out, dx, raw, later = found[rank][name]
        assert_same([out, dx, raw, later], [values[rank], grads[rank], values[rank], values[rank]])


def test_shared_parameters_are_those_of_the_first_rank(found):
    for rank in range(WORLD_SIZE):
        of_rank, of_first = (list(model(r).parameters()) for r in (rank, 0))
        assert_same(found[rank]["shared"], [of_first[0], *of_rank[1:4]])


def test_gradients_of_sequence_parallel_parameters_are_summed(found):
    for rank in range(WORLD_SIZE):
        ones = torch.ones(3, 2, dtype=torch.float64)
        own = (1 + rank) * ones
        assert_same(found[rank]["summed"], [own, own, 3 * ones, ones])
        assert found[rank]["frozen"] is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((12, 4), [3, 3, 3, 3]), ((10, 4), [3, 3, 2, 2]), ((2, 4), [1, 1, 0, 0]), ((40, 3, 8), [16, 16, 8])],
)
def test_dimension_of_a_rank(arguments, expected):
    dim, world_size, *multiple_of = arguments
    found = [distributed.get_dim_for_local_rank(dim, world_size, r, *multiple_of) for r in range(world_size)]
    assert found == expected
    assert sum(found) == dim


def test_functions_are_those_of_the_classes():
    classes = (distributed.AllGatherFunc, distributed.ReduceScatterFunc, distributed.AllReduceFunc)
    assert all(issubclass(function, torch.autograd.Function) for function in classes)
    found = (distributed.all_gather, distributed.reduce_scatter, distributed.all_reduce)
    assert found == tuple(function.apply for function in classes)


def test_import_without_torch_distributed(monkeypatch):
    nothing = types.ModuleType("torch.distributed")
    nothing.is_available = lambda: False
    monkeypatch.setitem(sys.modules, "torch.distributed", nothing)
    monkeypatch.setattr(torch, "distributed", nothing)
    spec = importlib.util.spec_from_file_location("without_distributed", distributed.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.get_dim_for_local_rank(10, 4, 1) == 3
