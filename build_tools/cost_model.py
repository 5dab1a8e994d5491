"""What a multiprocessor can do per clock, and what a kernel asks of it: blocks that fit, cycles on each unit.

The method is that of roofs: every unit alone, as if it never waited. Rates are those of NVIDIA's documents (CUDA C++
Programming Guide, "Arithmetic Instructions" and "Technical Specifications per Compute Capability"); where a rate is not
documented, the comment names where it comes from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor of a compute capability."""

    name: str
    smem_bytes: int
    threads: int
    blocks: int
    registers: int = 65536

    def blocks_that_fit(self, threads: int, registers: int, smem_bytes: int) -> int:
        """How many blocks are resident at once; 0: it cannot be launched."""
        warps = -(-threads // WARP)
        # A warp's registers come in units of 256; warps are placed on four schedulers.
        warps_by_registers = self.registers // (-(-registers * WARP // 256) * 256) // 4 * 4
        # In units of 128 bytes, and 1 KB of every block is the system's.
        smem_of_block = -(-smem_bytes // 128) * 128 + 1024
        return min(
            self.blocks, self.threads // (warps * WARP), warps_by_registers // warps, self.smem_bytes // smem_of_block
        )


MULTIPROCESSORS = (
    Multiprocessor("8.0", 164 * 1024, 2048, 32),
    Multiprocessor("8.6", 100 * 1024, 1536, 16),
    Multiprocessor("8.9", 100 * 1024, 1536, 24),
    Multiprocessor("9.0", 228 * 1024, 2048, 32),
    Multiprocessor("12.0", 100 * 1024, 1536, 24),
)


@dataclass(frozen=True)
class Rates:
    """Per multiprocessor and clock."""

    tensor: float  # multiply-adds of mma.sync, bf16 or fp16 with fp32 sums
    fp32: float  # lanes
    wgmma: float = math.inf  # multiply-adds, where there is wgmma
    integer_multiply: float = 64  # lanes, on the units of fp32
    alu: float = 64  # lanes: integers, logic, comparisons, minimum and maximum, conversions to 16 bits
    mufu: float = 16  # lanes: exp2 and the like
    smem: float = 128  # bytes
    issue: float = 4  # instructions of warps
    # Bytes of fp32 sums in global memory. Not documented: about 30 GB/s per multiprocessor were seen on an H200.
    reduction: float = 16


RATES = {
    "sm_80": Rates(tensor=1024, fp32=64),
    # mma.sync reaches 62.9% of what wgmma does (2048): Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU
    # Architecture via Microbenchmarking", 2024.
    "sm_90a": Rates(tensor=0.629 * 2048, fp32=128, wgmma=2048),
}
# TFLOP/s that large products of bf16 matrices were seen to reach on an H200; its power sets the clock. What a model
# says of a kernel is a share of that.
H200_TFLOPS = 788.0

FP32 = {"FFMA", "FMUL", "FADD"}
SMEM_ACCESS = {"LDS", "STS", "LDGSTS"}
REDUCTIONS = {"RED", "REDG"}
ALU = {
    "BMSK", "F2FP", "FMNMX", "FSEL", "FSET", "FSETP", "IABS", "IADD", "IADD3", "IMNMX", "ISETP", "LEA", "LOP", "LOP3",
    "MOV", "P2R", "PLOP3", "PRMT", "R2P", "SEL", "SGXT", "SHF", "SHL", "SHR", "VIADD", "VIADDMNMX", "VIMNMX",
}  # fmt: skip
UNITS = ("tensor", "mufu", "fp32", "alu", "smem", "issue", "reduction")


def work(passed: Mapping[str, float]) -> dict[str, float]:
    """What instructions of one warp, counted by kind, ask of each unit: lanes, bytes, multiply-adds."""
    total = dict.fromkeys((*UNITS, "integer_multiply", "wgmma"), 0.0)
    for opcode, times in passed.items():
        name = opcode.partition(".")[0]
        total["issue"] += times
        if name == "HMMA":
            total["tensor"] += times * tensor_products(opcode)
        elif name == "HGMMA":
            products, smem_bytes = wgmma_share(opcode)
            total["wgmma"] += times * products
            total["smem"] += times * smem_bytes
        elif name == "MUFU":
            total["mufu"] += times * WARP
        elif name in FP32:
            total["fp32"] += times * WARP
        elif name in ("IMAD", "IMUL"):
            total["integer_multiply"] += times * WARP
        elif name in ALU:
            total["alu"] += times * WARP
        elif name in ("LDSM", "STSM"):
            total["smem"] += times * 128 * int(opcode.rpartition(".")[2])
        elif name in SMEM_ACCESS or name == "SHFL":
            total["smem"] += times * WARP * access_bytes(opcode)
        elif name in REDUCTIONS:
            total["reduction"] += times * WARP * access_bytes(opcode)
    return total


def tensor_products(opcode: str) -> int:
    """Multiply-adds of one instruction: HMMA.16816 is 16 x 8 x 16."""
    match = re.match(r"HMMA\.(16)(8)(8|16)\b", opcode)
    return int(match[1]) * int(match[2]) * int(match[3]) if match else 0


def wgmma_share(kind: str) -> tuple[float, float]:
    """A warp's quarter of one HGMMA.64xNx16: multiply-adds, and bytes of operands read from shared memory.

    B, N x 16, always comes from there, and A, 64 x 16, if the kind ends in SS.
    """
    match = re.match(r"HGMMA\.64x(\d+)x16\b.*\.([SR])S$", kind)
    if match is None:
        raise ValueError(f"{kind}: no shape that the model knows")
    columns = int(match[1])
    return 64 * columns * 16 / 4, (2 * 16 * columns + (2 * 16 * 64 if match[2] == "S" else 0)) / 4


def access_bytes(opcode: str) -> int:
    """Bytes per lane: 4, or what the modifier says, in bits or as a vector (F32x4)."""
    vector = re.search(r"\.F32x(\d)\b", opcode)
    if vector is not None:
        return 4 * int(vector[1])
    sizes = [int(part) for part in opcode.split(".") if part in ("16", "32", "64", "128")]
    return sizes[-1] // 8 if sizes else 4


def cycles(
    passed: Mapping[str, float], warps: int, architecture: str, filled_bytes: int = 0, reduced_bytes: int = 0
) -> dict[str, float]:
    """Cycles of every unit of a multiprocessor for what all warps of a block do, and TMA for them.

    Args:
        filled_bytes: what TMA writes to shared memory.
        reduced_bytes: what it reads there and adds to sums in global memory.
    """
    rates, amount = RATES[architecture], work(passed)
    per_unit = {unit: amount[unit] / getattr(rates, unit) for unit in UNITS}
    per_unit["fp32"] += amount["integer_multiply"] / rates.integer_multiply
    per_unit["tensor"] += amount["wgmma"] / rates.wgmma
    total = {unit: warps * value for unit, value in per_unit.items()}
    total["smem"] += (filled_bytes + reduced_bytes) / rates.smem
    total["reduction"] += reduced_bytes / rates.reduction
    return total


def utilisation(of: Mapping[str, float]) -> tuple[str, float, float]:
    """The unit that limits, and the shares of time in which the tensor units work: at most, and if nothing overlaps.

    At most: all units run side by side, and the slowest decides. Without overlap: tensor products, exponentials, the
    busier of fp32 and integers, and shared memory, one after the other.
    """
    binding = max(UNITS, key=lambda unit: of[unit])
    one_by_one = of["tensor"] + of["mufu"] + max(of["fp32"], of["alu"]) + of["smem"]
    return binding, of["tensor"] / of[binding], of["tensor"] / one_by_one
