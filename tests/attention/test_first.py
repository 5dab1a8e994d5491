"""One small case per kernel and per feature with its own code: a smoke test that runs first.

In this order: one tile; several tiles per block; masks, packed sequences; deterministic sums ("in turn").
"""

import itertools

import pytest

from cases import Case
from check import check_backward, check_forward
from device import on_device

DIMS = [(128, 128), (64, 64), (256, 256), (192, 128), (192, 192), (96, 96)]
SITUATIONS = {
    "one tile": {"seqlens_q": (64,), "seqlens_k": (64,)},
    "tiles of keys": {"seqlens_q": (64,), "seqlens_k": (400,)},
    "tiles of queries": {"seqlens_q": (400,), "seqlens_k": (64,), "num_heads": 4, "num_heads_k": 2},
    "causal": {"seqlens_q": (300,), "seqlens_k": (400,), "causal": True},
    "packed": {"seqlens_q": (200, 0, 70), "seqlens_k": (64, 30, 300), "packed": True, "window_size": (60, 20)},
    "modified": {"seqlens_q": (130,), "seqlens_k": (200,), "softcap": 2.0, "alibi": "heads", "dropout_p": 0.17},
}


@pytest.mark.parametrize("backward", ["forward", "in any order", "in turn"])
@pytest.mark.parametrize(
    ("situation", "dims"),
    [*itertools.product(SITUATIONS, DIMS)],
    ids=lambda x: x if isinstance(x, str) else "{}/{}".format(*x),
)
@pytest.mark.first
@on_device
def test_first(kernels, situation, dims, backward):
    case = Case(dtype="bfloat16", head_dim=dims[0], head_dim_v=dims[1], **SITUATIONS[situation])
    if backward == "forward":
        check_forward(case)
    else:
        check_backward(case, deterministic=backward == "in turn")
