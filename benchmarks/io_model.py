"""How many bytes of global memory attention moves: exact counts of our CUDA kernels, and those of standard attention.

All for one head without a mask, elements of two bytes, head_dim_v = head_dim. The simulator counts the same numbers
(tests/kernels/test_io_model.py); tests/kernels/runner/io.cpp has the formula with masks, groups of heads and packed
sequences.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ELEMENT, FLOAT = 2, 4  # bytes


def tiles(length: int, size: int) -> int:
    """How many tiles of a size cover a length."""
    return -(-length // size)


def forward_bytes(seqlen: int, head_dim: int, block_m: int) -> int:
    """Each tile of block_m queries reads itself and all keys and values, and writes its rows of out and softmax_lse."""
    keys = tiles(seqlen, block_m) * seqlen * 2 * head_dim * ELEMENT
    return 2 * seqlen * head_dim * ELEMENT + keys + seqlen * FLOAT


def backward_bytes(seqlen: int, head_dim: int, block_m: int, block_n: int) -> int:
    """Preprocess, main kernel and finish, of which the main kernel grows with the square of seqlen."""
    tensor, rows = seqlen * head_dim * ELEMENT, seqlen * FLOAT
    dq_sums = tiles(seqlen, block_m) * block_m * head_dim * FLOAT
    preprocess = 2 * tensor + rows + rows + dq_sums + tiles(seqlen, block_m) * FLOAT
    per_key_tile = 2 * tensor + 2 * rows + dq_sums  # q, dout; softmax_lse, dsoftmax_sum; what is added to dq
    return preprocess + 4 * tensor + tiles(seqlen, block_n) * per_key_tile + dq_sums + tensor


def standard_forward_bytes(seqlen: int, head_dim: int) -> int:
    """FlashAttention, algorithm 0: S = Q K^T, P = softmax(S) and O = P V, each from and to memory."""
    return (4 * seqlen * head_dim + 4 * seqlen**2) * ELEMENT


def standard_backward_bytes(seqlen: int, head_dim: int) -> int:
    """FlashAttention, algorithm 3: dV, dP, dS, dQ and dK, each from and to memory, P having been kept."""
    return (10 * seqlen * head_dim + 7 * seqlen**2) * ELEMENT


def on_chip_bytes(head_dim: int, block_m: int, block_n: int) -> int:
    """What the forward kernel keeps in shared memory: a tile of queries, one of keys and one of values."""
    return (block_m + 2 * block_n) * head_dim * ELEMENT


def simulated() -> list[dict[str, Any]]:
    """What the simulator counts: pass, seqlen, block_m, block_n and bytes, for head_dim 64. Needs g++ and make."""
    command = ["make", "--silent", "-f", "tests/kernels/Makefile", "io"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]
