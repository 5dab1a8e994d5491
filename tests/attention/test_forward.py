"""The forward pass against the float64 reference."""

import itertools

import pytest
import torch

from cases import Case, edge_cases, paged_cases, shard_cases, table, used_key_cases
from check import check_forward, op_fwd, op_probs
from device import for_device, on_device
from inputs import make_inputs
from reference import visible
from variant_cases import variant_cases

CASES = [*table(), *edge_cases(), *used_key_cases(), *shard_cases(), *paged_cases(), *variant_cases()]


@pytest.mark.parametrize("case", for_device(CASES), ids=lambda case: case.name)
def test_tables(kernels, case):
    check_forward(case)


PICTURES = {
    ((2, 5), True, (-1, -1)): ["11110", "11111"],
    ((5, 2), True, (-1, -1)): ["00", "00", "00", "10", "11"],
    ((5, 2), False, (-1, -1)): ["11", "11", "11", "11", "11"],
    ((2, 5), False, (1, -1)): ["00111", "00011"],
    ((5, 2), False, (1, 1)): ["00", "00", "10", "11", "11"],
    ((3, 3), True, (1, 2)): ["100", "110", "011"],
    ((3, 3), False, (0, 0)): ["100", "010", "001"],
    ((3, 4), False, (-1, 1)): ["1110", "1111", "1111"],
}


def visible_keys(lengths, causal, window_size):
    """Keys with weight > 0, bool (seqlen_q, seqlen_k); checks out = 0 and softmax_lse = -inf for rows without any."""
    case = Case(*((n,) for n in lengths), "float64", 1, 1, 2, 2, causal=causal, window_size=window_size)
    x = make_inputs(case)
    out, lse = op_fwd(case, x)
    weights = op_probs(case, x, lse)[0, 0] > 0
    assert torch.equal(torch.isneginf(lse[0, 0]), ~weights.any(1))
    assert torch.equal((out[0, :, 0] == 0).all(1), ~weights.any(1))
    return weights.cpu()


@on_device
@pytest.mark.parametrize(("lengths", "causal", "window_size"), PICTURES)
def test_alignment(lengths, causal, window_size):
    """Masks are bottom-right aligned, for any lengths."""
    picture = ["".join("01"[int(x)] for x in row) for row in visible_keys(lengths, causal, window_size)]
    assert picture == PICTURES[lengths, causal, window_size]


@on_device
@pytest.mark.parametrize("causal", [False, True])
def test_masks_of_all_small_shapes(causal):
    for lengths in itertools.product(range(5), repeat=2):
        for window in itertools.product(range(-1, 5), repeat=2):
            expected = visible(*lengths, (window[0], 0 if causal else window[1]))
            assert torch.equal(visible_keys(lengths, causal, window), expected), (lengths, window)
