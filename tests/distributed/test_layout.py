"""How documents are cut, and what each rank computes, sends and receives: pure functions, in one process."""

import itertools
import random
import weakref

import pytest
import torch

from flash_attn.context_parallel.layout import (
    all_ranks,
    local_length,
    make_cut,
    order_of,
    piece_of,
    rows_of,
    slot_lengths,
)
from flash_attn.context_parallel.plan import Mask, make_plan

LENGTHS = [(), (0,), (1,), (31,), (64,), (65,), (1000,), (5, 0, 300), (128, 128), (33, 1000, 7)]
LAYOUTS = ["zigzag", "contiguous"]
MASKS = [
    Mask(-1, -1, 0),
    Mask(-1, 0, 0),
    Mask(0, 0, 0),
    Mask(20, 0, 0),
    Mask(31, 31, 0),
    Mask(32, 32, 0),
    Mask(100, -1, 0),
    Mask(-1, 0, 60),
    Mask(-1, -1, 200),
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_are_a_partition_of_aligned_pieces(lengths, num_ranks, layout):
    cut = make_cut(lengths, num_ranks, layout)
    rows = torch.cat([rows_of(cut, rank) for rank in range(num_ranks)])
    assert sorted(rows.tolist()) == list(range(sum(lengths)))
    for rank in range(num_ranks):
        assert len(rows_of(cut, rank)) == local_length(cut, rank) == sum(slot_lengths(cut, rank))
        for slot in cut.slots:
            assert all(start % 32 == 0 for start in piece_of(cut, rank, slot)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_a_rank(layout):
    cut = make_cut((100, 70), 2, layout)
    expected = {
        # Four pieces of 32 rows at most; the last document has no fourth.
        "zigzag": [
            [*range(32), *range(100, 132), *range(96, 100)],
            [*range(32, 64), *range(132, 164), *range(64, 96), *range(164, 170)],
        ],
        # Two pieces of 64.
        "contiguous": [[*range(64), *range(100, 164)], [*range(64, 100), *range(164, 170)]],
    }
    assert [rows_of(cut, rank).tolist() for rank in (0, 1)] == expected[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neighbours_join_to_the_shards_of_fewer_ranks(layout):
    cut = make_cut((700, 90), 6, layout)
    joined = cut.joined(3)
    for rank in range(2):
        rows = [rows_of(cut, 3 * rank + i) for i in range(3)]
        assert sorted(torch.cat(rows).tolist()) == sorted(rows_of(joined, rank).tolist())


def test_order_of_brings_rows_into_place():
    cut = make_cut((100, 70), 2, "zigzag")
    source = torch.cat([rows_of(cut, rank) for rank in (0, 1)])
    whole = ((cut.whole(), 0),)
    assert torch.equal(source[order_of(source, all_ranks(cut), whole)], torch.arange(170))
    assert torch.equal(torch.arange(170)[order_of(source, whole, all_ranks(cut))], source)


def test_orders_of_few_batches_are_kept():
    """They are as long as the batch, on the GPU; documents are cut differently in every step of training."""
    x, alive = torch.empty(0), []
    for length in range(100, 130):
        cut = make_cut((length,), 2, "zigzag")
        alive.append(weakref.ref(order_of(x, all_ranks(cut), ((cut.whole(), 0),))))
    assert 0 < sum(order() is not None for order in alive) <= 8


def visible(mask, queries, keys):
    """(queries, keys): whether a query at a position sees a key at a position."""
    i, j = queries[:, None], keys[None]
    seen = torch.ones(len(queries), len(keys), dtype=torch.bool)
    if mask.right >= 0:
        seen &= j - i <= mask.right
    if mask.left >= 0:
        seen &= i - j <= mask.left
    if mask.attention_chunk > 0:
        seen &= i // mask.attention_chunk == j // mask.attention_chunk
    return seen


def positions(cut, rank, slot):
    starts, lengths = piece_of(cut, rank, slot)
    return [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("num_ranks", [1, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_those_that_the_mask_shows(mask, num_ranks, layout):
    for lengths in LENGTHS:
        cut = make_cut(lengths, num_ranks, layout)
        for rank in range(num_ranks):
            for step in make_plan(cut, mask, rank):
                pairs = {(pair.q_slot, pair.k_slot): pair.used for pair in step.pairs}
                for q_slot, k_slot in itertools.product(cut.slots, cut.slots):
                    queries, keys = positions(cut, rank, q_slot), positions(cut, step.source, k_slot)
                    seen = [bool(visible(mask, i, j).any()) for i, j in zip(queries, keys, strict=True)]
                    assert ((q_slot, k_slot) in pairs) == any(seen), (lengths, rank, step)
                    if pairs.get((q_slot, k_slot)) is not None:
                        used = pairs[q_slot, k_slot]
                        assert [n > 0 for n in used] == seen, (lengths, rank, step)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_send_meets_its_receive(mask, layout):
    lengths = random.Random(0).choices(range(400), k=5)
    cut = make_cut(lengths, 5, layout)
    plans = [make_plan(cut, mask, rank) for rank in range(5)]
    for rank, plan in enumerate(plans):
        assert len(plan) == 5
        for t, step in enumerate(plan):
            assert plans[step.target][t].source == rank
            assert step.sent == plans[step.target][t].received
            assert set(step.received) == ({pair.k_slot for pair in step.pairs} if t > 0 else set())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neighbours_alone_communicate_if_a_window_is_smaller_than_a_piece(layout):
    cut = make_cut((32 * 16,), 8, layout)
    plans = [make_plan(cut, Mask(20, 0, 0), rank) for rank in range(8)]
    partners = {(rank, step.target) for rank, plan in enumerate(plans) for step in plan if step.sent}
    assert partners
    assert all(abs(rank - target) == 1 for rank, target in partners)


def test_causal_zigzag_is_balanced_and_sends_three_quarters():
    cut = make_cut((32 * 16,), 8, "zigzag")
    plans = [make_plan(cut, Mask(-1, 0, 0), rank) for rank in range(8)]
    assert {sum(len(step.pairs) for step in plan) for plan in plans} == {2 * 8 + 1}
    sent = sum(len(step.sent) for plan in plans for step in plan)
    assert sent == 8 * 7 * 2 * 3 // 4


def test_last_shard_of_contiguous_causal_sends_nothing():
    cut = make_cut((32 * 4,), 4, "contiguous")
    plans = [make_plan(cut, Mask(-1, 0, 0), rank) for rank in range(4)]
    assert [sum(len(step.sent) for step in plan) for plan in plans] == [3, 2, 1, 0]
