"""Draw how many bytes of global memory the CUDA kernels move, counted by the simulator, beside theorem 2 of the paper.

    python benchmarks/plot_io.py

Needs g++ and make, no GPU. Writes docs/memory_traffic.png. After figure 2 of "FlashAttention: Fast and Memory-Efficient
Exact Attention with IO-Awareness" (Dao et al., 2022).
"""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import io_model

HEAD_DIM = 64
SEQLENS = [2**i for i in range(7, 17)]
FORWARD_TILE, BACKWARD_TILE = (128, 64), (64, 128)  # queries, keys: csrc/cuda/sm80/config.h
OURS, STANDARD, THEORY = "#2b5f8a", "#f2a65a", "#777777"
MIB = 2**20


def total(seqlen: int) -> float:
    """What our forward and backward pass move, in MiB per head."""
    forward = io_model.forward_bytes(seqlen, HEAD_DIM, FORWARD_TILE[0])
    return (forward + io_model.backward_bytes(seqlen, HEAD_DIM, *BACKWARD_TILE)) / MIB


def standard(seqlen: int) -> float:
    """What standard attention moves, in MiB per head."""
    forward = io_model.standard_forward_bytes(seqlen, HEAD_DIM)
    return (forward + io_model.standard_backward_bytes(seqlen, HEAD_DIM)) / MIB


def draw_lengths(axes: Axes, counted: list[dict[str, Any]]) -> None:
    """Forward and backward together, over the sequence length."""
    axes.loglog(SEQLENS, [standard(n) for n in SEQLENS], color=STANDARD, label=r"standard attention, $\Theta(Nd+N^2)$")
    axes.loglog(SEQLENS, [total(n) for n in SEQLENS], color=OURS, label="ours: exact formula")
    theory = [total(SEQLENS[-1]) * (n / SEQLENS[-1]) ** 2 for n in SEQLENS]
    axes.loglog(SEQLENS, theory, "--", color=THEORY, label=r"theorem 2: $\propto N^2d^2/M$")
    by_seqlen: dict[int, dict[str, int]] = {}
    for row in counted:
        if (row["block_m"], row["block_n"]) in (FORWARD_TILE, BACKWARD_TILE):
            by_seqlen.setdefault(row["seqlen"], {})[row["pass"]] = row["bytes"]
    dots = {n: sum(passes.values()) / MIB for n, passes in by_seqlen.items() if len(passes) == 2}
    axes.plot(list(dots), list(dots.values()), "o", color=OURS, label="ours: counted by the simulator")
    ratio = standard(SEQLENS[-1]) / total(SEQLENS[-1])
    axes.set_title(f"Forward and backward: {ratio:.1f}x fewer bytes at {SEQLENS[-1]}")
    axes.set_xlabel("sequence length N")
    axes.set_ylabel("global memory traffic, MiB per head")


def draw_tiles(axes: Axes, counted: list[dict[str, Any]]) -> None:
    """The forward pass of 1024 queries and keys, over what fits on chip."""
    squares = [row for row in counted if row["block_m"] == row["block_n"]]
    memory = [io_model.on_chip_bytes(HEAD_DIM, row["block_m"], row["block_n"]) / 1024 for row in squares]
    traffic = [row["bytes"] / MIB for row in squares]
    theory = [traffic[0] * memory[0] / m for m in memory]
    axes.axhline(io_model.standard_forward_bytes(1024, HEAD_DIM) / MIB, color=STANDARD, label="standard attention")
    axes.loglog(memory, theory, "--", color=THEORY, label=r"theorem 2: $\propto N^2d^2/M$")
    axes.loglog(memory, traffic, "o-", color=OURS, label="ours: counted by the simulator")
    for m, t, row in zip(memory, traffic, squares, strict=True):
        axes.annotate(f"{row['block_m']} x {row['block_n']}", (m, t), textcoords="offset points", xytext=(6, 6))
    axes.set_title("Forward, N = 1024: larger tiles, fewer bytes")
    axes.set_xticks(memory, [f"{m:.0f}" for m in memory])
    axes.minorticks_off()
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.margins(0.12)
    axes.set_xlabel("on-chip memory M for the tiles of q, k and v, KiB")


def main() -> None:
    """Count, draw, and print some totals."""
    counted = io_model.simulated()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    draw_lengths(left, counted)
    draw_tiles(right, counted)
    for axes in (left, right):
        axes.grid(True, which="major", alpha=0.3)
        axes.legend()
    figure.tight_layout()
    target = io_model.ROOT / "docs" / "memory_traffic.png"
    figure.savefig(target, dpi=120)
    print(f"wrote {target.relative_to(io_model.ROOT)}")
    for seqlen in (1024, 8192, 65536):
        print(f"N = {seqlen:5}: ours {total(seqlen):9.1f} MiB, standard {standard(seqlen):9.1f} MiB per head")


if __name__ == "__main__":
    main()
