"""Tables of cases, against the float64 reference, by every kernel. Rows that no sequence uses hold NaN."""

import itertools

import pytest

from cases import Case, edge_cases, key_range_cases, paged_cases, table
from check import check_backward, check_forward
from device import DEVICE, KERNELS, environment_of, for_kernels, needs_gpu

BOTH_PASSES = for_kernels([*table(), *edge_cases(), *key_range_cases()])
FORWARD = [*BOTH_PASSES, *for_kernels(paged_cases())]


def large_cases() -> list[Case]:
    """More tiles than multiprocessors, and many tiles in a row; too much for the CPU."""
    dims = [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
    full = [
        Case((2048,) * 3, (2048,) * 3, dtype="bfloat16", num_heads=8, num_heads_k=8, head_dim=dim, head_dim_v=dim_v)
        for dim, dim_v in dims
    ]
    masked = [
        Case(
            (2001, 1333), (1999, 2500), dtype="float16", num_heads=8, num_heads_k=2, head_dim=dim, head_dim_v=dim_v,
            packed=True, lse_grad=True, **mask,
        )
        for (dim, dim_v), mask in itertools.product(dims, [{"causal": True}, {"window_size": (300, 100)}])
    ]  # fmt: skip
    return [*full, *masked]


@pytest.fixture(params=KERNELS)
def kernels(request, monkeypatch):
    """Chooses them."""
    for name, value in environment_of(request.param).items():
        monkeypatch.setenv(name, value)


def of(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@of(FORWARD)
@pytest.mark.usefixtures("kernels")
def test_forward(case):
    check_forward(case, DEVICE)


@of(BOTH_PASSES)
@pytest.mark.usefixtures("kernels")
def test_backward(case):
    check_backward(case, DEVICE)


@needs_gpu
@of(BOTH_PASSES)
@pytest.mark.usefixtures("kernels")
def test_backward_in_any_order(case):
    """What training uses. On the CPU there is one order only."""
    check_backward(case, DEVICE, deterministic=False)


@needs_gpu
@of(large_cases())
@pytest.mark.usefixtures("kernels")
def test_large_problems(case):
    check_forward(case, DEVICE)
    check_backward(case, DEVICE, deterministic=False)
    check_backward(case, DEVICE)
