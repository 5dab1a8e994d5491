"""The CPU's tables of cases, against the float64 reference. Rows that no sequence uses hold NaN."""

import pytest

from cases import edge_cases, key_range_cases, paged_cases, table
from check import check_backward, check_forward
from device import DEVICE, for_kernels

BOTH_PASSES = for_kernels([*table(), *edge_cases(), *key_range_cases()])


@pytest.mark.parametrize("case", [*BOTH_PASSES, *for_kernels(paged_cases())], ids=lambda case: case.name)
def test_forward(case):
    check_forward(case, DEVICE)


@pytest.mark.parametrize("case", BOTH_PASSES, ids=lambda case: case.name)
def test_backward(case):
    check_backward(case, DEVICE)
