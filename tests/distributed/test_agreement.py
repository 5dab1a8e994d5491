"""Ranks that do not call alike all say so, and a rank that dies does not keep the others waiting."""

import datetime
import os
import time

import pytest
import torch

from distributed_world import World, group_of
from flash_attn.context_parallel import agreement, context_parallel_attention, shard
from flash_attn.context_parallel.ranks import resolve

pytestmark = pytest.mark.xdist_group("distributed")


def inputs(length=128, num_heads=4, dtype=torch.float32, head_dim=8):
    return [torch.zeros(1, length, num_heads, head_dim, dtype=dtype) for _ in range(3)]


def message(*arguments, **options):
    """What a call raises."""
    options.setdefault("group", group_of(2))
    try:
        context_parallel_attention(*arguments, **options)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def differing(rank):
    """By what its message says: a call whose arguments depend on the rank."""
    first, other = inputs(64), inputs(64, num_heads=2)
    return {
        "dropout_p: expected the same on every rank, got 0.0 on rank 0; 0.1 on rank 1": message(
            *first, dropout_p=0.1 * rank
        ),
        "q: expected the same on every rank, got (1, local_seqlen, 4, 8) torch.float32 on rank 0; "
        "(1, local_seqlen, 2, 8) torch.float32 on rank 1": message(*(other if rank else first)),
        "window_size: expected the same on every rank, got (-1, 0) on rank 0; (5, 0) on rank 1": message(
            *first, window_size=(5, 0) if rank else (-1, 0)
        ),
        "method: expected the same on every rank, got ring on rank 0; all_gather on rank 1": message(
            *first, method="all_gather" if rank else "ring"
        ),
        "k: expected the same on every rank, got (1, local_seqlen, 4, 8) torch.float32 that requires grad on rank 0": (
            message(first[0], first[1].clone().requires_grad_(rank == 0), first[2])
        ),
        "cu_seqlens: expected the same on every rank, got of lengths (64, 64) on rank 0; of lengths (128,) on rank 1": (
            message(
                *(x[0] for x in first), cu_seqlens=torch.tensor([0, 128] if rank else [0, 64, 128], dtype=torch.int32)
            )
        ),
        "s_aux: expected the same on every rank, got (4,) torch.float32 on rank 0; None on rank 1": message(
            *first, s_aux=None if rank else torch.zeros(4)
        ),
        "torch.is_grad_enabled(): expected the same on every rank, got True on rank 0; False on": without_grad(
            first, rank
        ),
        "on rank 1: cu_seqlens: expected values that start with 0 and never decrease, got [0, 200, 128]": message(
            *(x[0] for x in first), cu_seqlens=torch.tensor([0, 200, 128] if rank else [0, 64, 128])
        ),
        "on rank 1: method: expected 'ring', 'all_gather', 'ulysses' or ('ulysses', 'ring'), got str 'star'": message(
            *first, method="star" if rank else "ring"
        ),
        "on rank 0: layout: expected 'zigzag' or 'contiguous', got function": message(
            *first, layout="zigzag" if rank else message
        ),
        "on rank 1: q, k, v: expected one dtype among": message(first[0].int() if rank else first[0], *first[1:]),
        "on rank 0: k: expected the 64 rows of q, as queries and keys are cut alike, got shape (1, 60, 4, 8)": message(
            first[0], *(x[:, : 64 if rank else 60] for x in first[1:])
        ),
        "q: expected the shards of a zigzag layout of 130 rows, [64, 66] on the ranks, got [66, 64]": message(
            *inputs(64 if rank else 66)
        ),
        "q: expected the shards of a zigzag layout of 200 rows, [72, 128] on the ranks, got [64, 64]": message(
            *first, seqlen=200
        ),
    }


def without_grad(arguments, rank):
    with torch.set_grad_enabled(rank == 0):
        return message(*arguments)


def check_differences():
    for text, found in differing(group_of(2).rank()).items():
        assert text in found, f"{text!r} is not in {found!r}"
    q, k, v = inputs(64)
    assert message(q, k, v) == ""


def test_every_rank_names_what_differs(world):
    world.run(check_differences, ranks=2)


def check_same_errors():
    q, k, v = inputs(64)
    calls = {
        "method: expected 'ring', 'all_gather', 'ulysses' or ('ulysses', 'ring'), got str 'star'": {"method": "star"},
        "layout: expected 'zigzag' or 'contiguous', got int 3": {"layout": 3},
        "group: expected a ProcessGroup of which this process is a member": {"group": None},
        "group: expected two groups or a 2-D mesh for method ('ulysses', 'ring'), got 1": {
            "method": ["ulysses", "ring"]
        },
        "group: expected one group or a 1-D mesh, got 2": {"group": (group_of(2), group_of(2))},
        "causal: expected bool, got str 'yes'": {"causal": "yes"},
        "dropout_p: expected a number in [0, 1), got 1": {"dropout_p": 1.0},
        "alibi_slopes: expected shape": {"alibi_slopes": torch.zeros(5)},
        "alibi_slopes: expected a tensor that does not require grad": {
            "alibi_slopes": torch.zeros(4, requires_grad=True)
        },
        "s_aux: expected torch.Tensor or None, got int 3": {"s_aux": 3},
        "s_aux: expected shape": {"s_aux": torch.zeros(5)},
        "seqlen: expected int, got float 1.5": {"seqlen": 1.5},
        "seqlen: expected a length of at least 0, got -1": {"seqlen": -1},
        "seqlen: expected None, as cu_seqlens is given, got 64": {"seqlen": 64, "cu_seqlens": torch.tensor([0, 64])},
    }
    for text, options in calls.items():
        found = message(q, k, v, **options)
        assert found.startswith("context_parallel_attention: ") and text in found, f"{text!r} is not in {found!r}"
    assert "q: expected a tensor with data, got one on the meta device" in message(*(x.to("meta") for x in (q, k, v)))
    found = message(q, k[..., :4], v[:, :, :3])
    assert "2 problems" in found and "k: expected shape" in found and "v: expected shape" in found


def test_errors_name_the_argument(world):
    world.run(check_same_errors, ranks=2)


def check_ulysses_heads():
    found = message(*inputs(64), method="ulysses", group=group_of(3))
    assert "q: expected num_heads divisible by the 3 ranks of the ulysses group, got 4" in found


def test_ulysses_needs_a_divisible_number_of_heads(world):
    world.run(check_ulysses_heads, ranks=3)


def count_gathers(check, variable):
    """How many comparisons three calls make."""
    os.environ.pop("FLASH_ATTN_CP_CHECK", None)
    if variable is not None:
        os.environ["FLASH_ATTN_CP_CHECK"] = variable
    calls, compare = [], agreement.compare
    agreement.compare = lambda *arguments: calls.append(1) or compare(*arguments)
    try:
        group = torch.distributed.new_group()
        for _ in range(3):
            context_parallel_attention(*inputs(64), group=group, check=check, seqlen=256)
    finally:
        agreement.compare = compare
        os.environ.pop("FLASH_ATTN_CP_CHECK", None)
    return len(calls)


@pytest.mark.parametrize(
    ("check", "variable", "expected"),
    [(None, None, 3), (None, "0", 1), (None, "1", 3), (False, None, 1), (True, "0", 3)],
)
def test_comparison_can_be_switched_off_but_for_the_first_call(world, check, variable, expected):
    assert world.run(count_gathers, check, variable) == [expected] * 4


def check_first_calls():
    ranks = resolve("test", torch.distributed.new_group())
    places = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda", 0), torch.device("cpu")]
    assert [ranks.is_new(place) for place in places] == [True, True, False, True]


def test_a_group_is_new_on_every_device(world):
    """Each has connections of its own."""
    world.run(check_first_calls)


def check_switches():
    group = torch.distributed.new_group()
    found = message(*inputs(32), group=group, check=group.rank() > 0, seqlen=128, layout="contiguous")
    assert "check: expected the same on every rank, got False on rank 0; True on ranks 1, 2, 3" in found


def test_first_call_compares_whether_ranks_compare(world):
    world.run(check_switches)


def leave_alone():
    """Rank 1 exits; the others attend."""
    if torch.distributed.get_rank() == 1:
        os._exit(1)
    q, k, v = (shard(torch.zeros(1, 256, 2, 8), 1, group_of(3)) for _ in range(3))
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        context_parallel_attention(q, k, v, group=group_of(3), check=False)
    return time.monotonic() - start


def test_a_rank_that_dies_is_an_error_on_the_others():
    world = World(3, timeout=datetime.timedelta(seconds=8))
    try:
        with pytest.raises(AssertionError, match="rank 1:\nthe process has ended") as raised:
            world.run(leave_alone)
        assert "rank 0" not in str(raised.value) and "rank 2" not in str(raised.value)
    finally:
        world.close()
