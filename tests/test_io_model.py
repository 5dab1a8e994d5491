"""benchmarks/io_model.py says to the byte what the simulator counts."""

import pytest

import io_model
from simulator_folder import simulator_folder

HEAD_DIM = 64

pytestmark = pytest.mark.xdist_group("simulator")  # not all versions of xdist keep to it: hence simulator_folder


def test_formulas_are_what_the_simulator_counts():
    with simulator_folder():
        counted = io_model.simulated()
    assert {row["pass"] for row in counted} == {"forward", "backward"}
    for row in counted:
        lengths = (row["seqlen"], HEAD_DIM, row["block_m"])
        formula = (
            io_model.forward_bytes(*lengths)
            if row["pass"] == "forward"
            else io_model.backward_bytes(*lengths, row["block_n"])
        )
        assert row["bytes"] == formula, row


def test_traffic_falls_with_on_chip_memory():
    """Theorem 2 of FlashAttention: Theta(seqlen^2 head_dim^2 / M); here within 20% of a constant times that."""
    seqlen, sizes = 1 << 16, (32, 64, 128, 256)
    products = [
        io_model.forward_bytes(seqlen, HEAD_DIM, size) * io_model.on_chip_bytes(HEAD_DIM, size, size) for size in sizes
    ]
    assert max(products) < 1.2 * min(products)
