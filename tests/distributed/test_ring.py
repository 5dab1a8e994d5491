"""What the ring sends, in bytes, and that its results are the same in every run."""

import dataclasses

import pytest
import torch

from distributed_cases import PAIR, Case, make_inputs, on_many
from distributed_world import group_of

pytestmark = pytest.mark.xdist_group("distributed")


def bytes_sent(case):
    """What this rank sends from point to point, in forward and in backward."""
    sent, send = [], torch.distributed.batch_isend_irecv

    def count(operations):
        sent.append(sum(op.tensor.nbytes for op in operations if op.op is torch.distributed.isend))
        return send(operations)

    torch.distributed.batch_isend_irecv = count
    try:
        on_many(case, make_inputs(case))
    finally:
        torch.distributed.batch_isend_irecv = send
    return sum(sent)


def expected_bytes(case, pieces):
    """pieces: how many pieces of 32 rows all ranks send.

    Keys and values travel in forward and in backward, their gradients in backward, in float32 unless in float64.
    """
    size = torch.empty(0, dtype=getattr(torch, case.dtype)).element_size()
    row = max(case.batch_size, 1) * case.num_heads_k * (case.head_dim + case.head_dim_v)
    return pieces * 32 * row * (2 * size + max(size, 4))


CAUSAL = {"causal": True}
SENDS = [
    # All 2 * 4 pieces go to 3 other ranks.
    (Case("all", (256,), batch_size=2, ranks=4), 24),
    # The back pieces go to the ranks before only: 4 * 3 + 6.
    (Case("zigzag", (256,), batch_size=1, ranks=4, num_heads_k=4, options=CAUSAL), 18),
    (Case("contiguous", (128,), batch_size=1, ranks=4, layout="contiguous", options=CAUSAL), 6),
    # Piece i is needed by the rank of piece i + 1, which is the same for pieces 3 and 4.
    (Case("window", (256,), batch_size=1, ranks=4, options={**CAUSAL, "window_size": (20, 0)}), 6),
    (Case("window_1", (128,), batch_size=1, ranks=4, layout="contiguous", options={"window_size": (20, 0)}), 3),
    (Case("chunks", (128,), batch_size=1, ranks=4, layout="contiguous", options={"attention_chunk": 32}), 0),
    (Case("half", (256,), batch_size=1, ranks=4, head_dim_v=4, dtype="bfloat16", options=CAUSAL), 18),
    (Case("packed", (256, 256), ranks=4, options=CAUSAL), 36),
]


@pytest.mark.parametrize(("case", "pieces"), SENDS, ids=[str(case) for case, _ in SENDS])
def test_bytes_are_those_of_the_formula(world, case, pieces):
    assert sum(world.run(bytes_sent, case, ranks=case.ranks)) == expected_bytes(case, pieces)


def check_repeatable(case):
    inputs = make_inputs(case)
    first, again = on_many(case, inputs), on_many(case, inputs)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses", PAIR], ids=str)
def test_results_are_bitwise_repeatable(world, method):
    case = Case(
        *("repeated", (300, 90)),
        num_heads_k=2,
        head_dim=32,
        head_dim_v=32,
        dtype="bfloat16",
        method=method,
        ranks=4,
        options={**CAUSAL, "dropout_p": 0.1, "deterministic": True},
    )
    world.run(check_repeatable, case)
    world.run(check_repeatable, dataclasses.replace(case, dtype="float32"))


def check_no_communication(case):
    """A ring of one sends nothing and gathers nothing, but to compare."""
    return group_of(1).size(), bytes_sent(case)


def test_one_rank_sends_nothing(world):
    case = Case("alone", (200,), batch_size=1, ranks=1, options=CAUSAL)
    assert world.run(check_no_communication, case, ranks=1) == [(1, 0)]
