"""The model on paper of context parallelism, against cases computed by hand."""

import pytest

import context_parallel_model as model
from context_parallel_model import Layer, Machine
from flash_attn.context_parallel.layout import make_cut, slot_lengths
from flash_attn.context_parallel.plan import Mask, make_plan
from paths import ROOT

LAYER = Layer(num_heads=4, num_heads_k=2, head_dim=8, element=2)
# Two GPUs in a node. A rank with 10 tokens of 40 waits for the network.
MACHINE = Machine(1e4, 1e4, gpus_per_node=2, nvlink=1000, infiniband=100, link_share=1, overhead=0)
SEQLEN, NUM_RANKS = 40, 4


def test_operations():
    """50 of 100 pairs, 4 heads, 8 elements, a multiplication and an addition, two products forward, five backward."""
    assert LAYER.forward_flops(10) == 50 * 4 * 8 * 2 * 2
    assert LAYER.backward_flops(10) == 50 * 4 * 8 * 2 * 5


def test_bytes():
    assert LAYER.query_bytes(10) == 10 * 4 * 8 * 2
    assert LAYER.key_bytes(10) == 10 * 2 * 8 * 2 * 2, "k and v, of two bytes"
    assert LAYER.key_gradient_bytes(10) == 10 * 2 * 8 * 2 * 4, "dk and dv, of four bytes"
    assert model.ulysses_bytes(LAYER, 10, 2) == 640 + 640 + 640, "q, out, and k and v"
    assert model.ulysses_bytes(LAYER, 10, 2, backward=True) == 640 + 640 + 640, "dout, dq, and dk and dv"
    assert model.ulysses_bytes(LAYER, 10, 4) == 640 + 640 + 1280, "two key heads, sent to four ranks"
    assert model.ulysses_bytes(LAYER, 10, 4, backward=True) == 640 + 640 + 2560, "dk and dv in float32"


def test_ideal_is_computation_alone():
    cost = model.ideal(LAYER, MACHINE, SEQLEN, NUM_RANKS)
    assert cost.forward == pytest.approx(2 * 1600 * 32 / 4 / 1e4)
    assert cost.backward == pytest.approx(5 * 1600 * 32 / 4 / 1e4)


def seconds_and_bytes(method):
    cost = model.METHODS[method](LAYER, MACHINE, SEQLEN, NUM_RANKS)
    return pytest.approx((cost.forward, cost.backward)), cost.memory


@pytest.mark.parametrize(
    ("method", "forward", "backward", "memory"),
    [
        # Of four steps of 0.64 and 1.6 s one is seen, and three transfers of 6.4 and 19.2; gradients go home in 12.8.
        ("ring", 0.64 + 3 * 6.4, 1.6 + 3 * 19.2 + 12.8, 2 * (640 + 1280)),
        # 2560 bytes of keys, half of them from the other node, over two cards; half of 5120 bytes goes there over one.
        ("all_gather", 2.56 + 6.4, 6.4 + 6.4 + 25.6, 2560 + 5120),
        # Half of 2560 bytes goes to the other node, and half of 3840.
        ("ulysses", 2.56 + 12.8, 6.4 + 19.2, 2560),
        # Half of 1920 bytes to the neighbour; then two steps of 1.28 and 3.2.
        ("ulysses + ring", 0.96 + 1.28 + 6.4, 0.96 + 3.2 + 19.2 + 12.8, 2 * (640 + 1280) + 1920),
    ],
)
def test_methods(method, forward, backward, memory):
    assert seconds_and_bytes(method) == ((forward, backward), memory)


@pytest.mark.parametrize("method", model.METHODS)
def test_one_rank_sends_nothing(method):
    machine = Machine(nvlink=1, infiniband=1, overhead=1e9)
    assert model.METHODS[method](LAYER, machine, SEQLEN, 1) == model.ideal(LAYER, machine, SEQLEN, 1)


def test_overhead_is_counted_per_transfer():
    machine = Machine(1e4, 1e4, gpus_per_node=2, nvlink=1000, infiniband=100, link_share=1, overhead=100)
    extra = {
        name: method(LAYER, machine, SEQLEN, NUM_RANKS).forward - method(LAYER, MACHINE, SEQLEN, NUM_RANKS).forward
        for name, method in model.METHODS.items()
    }
    assert extra == pytest.approx({"ring": 300, "all_gather": 100, "ulysses": 200, "ulysses + ring": 300})


def test_ulysses_needs_heads():
    assert model.ulysses(LAYER, MACHINE, 80, 8) is None
    assert model.ulysses_ring(LAYER, MACHINE, 80, 8) is not None, "two ranks share the heads"
    assert model.ulysses_ring(Layer(num_heads=3, num_heads_k=1), MACHINE, 80, 8) is None


def test_transfers_are_hidden_from_a_length_on():
    """4096 bytes of keys a token at 40 GB/s, 16384 FLOP a pair at 650 TFLOP/s; 12288 and 40960 at 500 backward."""
    assert model.hidden_from(Layer(), Machine(), 64) == pytest.approx((4062.5, 3750))
    assert model.hidden_from(Layer(), Machine(), 8) == pytest.approx((4062.5 / 9, 3750 / 9))
    assert model.hidden_from(Layer(), Machine(), 64, inner=8) == pytest.approx((4062.5 / 8, 3750 / 8))


@pytest.mark.parametrize("num_ranks", [8, 64])
def test_hidden_and_shown(num_ranks):
    """From the longer of both lengths on a ring takes no longer than its computation, but for the last gradients."""
    machine = Machine(overhead=0)
    least, most = sorted(model.hidden_from(Layer(), machine, num_ranks))
    hidden, shown = num_ranks * round(most + 1), num_ranks * round(least / 2)
    gradients = Layer().key_gradient_bytes(hidden // num_ranks) / machine.link(num_ranks)
    cost, best = (function(Layer(), machine, hidden, num_ranks) for function in (model.ring, model.ideal))
    assert (cost.forward, cost.backward) == pytest.approx((best.forward, best.backward + gradients))
    assert (
        model.ring(Layer(), machine, shown, num_ranks).forward
        > 1.5 * model.ideal(Layer(), machine, shown, num_ranks).forward
    )


def test_the_page_shows_what_the_model_says():
    page = (ROOT / "docs" / "context_parallel.md").read_text()
    assert model.table(Layer(), Machine()) in page
    assert model.thresholds(Layer(), Machine()) in page


def test_the_ring_moves_what_its_plan_says():
    """In every step some rank gets all keys of another, which the model counts; the last one gets half in each."""
    seqlen, num_ranks = 8192, 8
    cut = make_cut((seqlen,), num_ranks, "zigzag")
    plans = [make_plan(cut, Mask(left=-1, right=0, attention_chunk=0), rank) for rank in range(num_ranks)]
    received = [
        [sum(slot_lengths(cut, step.source)[slot] for slot in step.received) for step in plan] for plan in plans
    ]
    block = seqlen // num_ranks
    assert [max(rows) for rows in zip(*received, strict=True)] == [0] + 7 * [block]
    assert received[0] == [0] + 7 * [block]
    assert received[-1] == [0] + 7 * [block // 2]
