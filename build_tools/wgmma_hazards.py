"""Registers of wgmma that machine code touches too early, and how much of the softmax runs beside products.

wgmma is asynchronous: from its issue until a wait for its group, its accumulators may be neither read nor written, and
the registers of its A operand not written (PTX ISA, "wgmma.fence", "wgmma.wait_group"). Kernels say so in PTX, and
ptxas has to keep to it when it allocates registers and moves instructions. Versions before 13.3 are known not to do so
always, and no simulator sees it. So the machine code is followed along every way that control may take.

FlashAttention-3 (2024, section 3.2) computes the softmax of one tile while the product of the one before is under way.
ptxas may undo it, by moving the wait for the product up: that changes no result, and is seen in the machine code alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from build_tools.sass import Function, Instruction, Loop

REGISTER = re.compile(r"(?<![\w.])R(\d+)")
PRODUCT = re.compile(r"R(\d+), (?:R(\d+)(?:\.reuse)?, )?gdesc\[")
SHAPE = re.compile(r"\.64x(\d+)x16")
WAIT = re.compile(r"gsb0, 0x([0-9a-f]+)")
PREDICATE = re.compile(r"^!?U?P[T\d]$")
# Their first register is read.
WITHOUT_RESULT = ("BAR", "WARPSYNC", "BRX", "JMX", "RET", "NANOSLEEP")

# In flight: register -> how many groups have been closed since the youngest product that uses it was issued, -1 being
# the group that is still open. Accumulators and A operands apart.
State = tuple[dict[int, int], dict[int, int]]


def width(instruction: Instruction) -> int:
    """How many registers in a row each of its data operands is."""
    name, *parts = instruction.opcode.split(".")
    if name in ("LDSM", "STSM"):
        return int(parts[-1]) if parts[-1].isdecimal() else 1
    if "128" in parts or "F32x4" in parts:
        return 4
    if "64" in parts or "WIDE" in parts or name in ("DADD", "DMUL", "DFMA", "DSETP"):
        return 2
    return 2 if name == "CS2R" and "32" not in parts else 1


def widths(instruction: Instruction, sources: int) -> tuple[int, list[int]]:
    """The same of its result, and of each of its sources."""
    name, *parts = instruction.opcode.split(".")
    count = width(instruction)
    if name in ("F2F", "F2I", "I2F"):  # to the first type from the second
        is_wide = [part.endswith("64") for part in parts]
        return 1 + any(is_wide[:1]), [1 + any(is_wide[1:])] * sources
    if "WIDE" in parts:  # of a wide product, factors are single registers
        return count, [1] * (sources - 1) + [count]
    return count, [count] * sources


def registers(operand: str, count: int) -> set[int]:
    """Those that an operand names. What lies between brackets is an address, of two registers if it says so."""
    found = set()
    for match in REGISTER.finditer(operand):
        before, after = operand[: match.start()], operand[match.end() :]
        is_address = before.count("[") > before.count("]")
        own = (2 if after.startswith(".64") else 1) if is_address else count
        found |= set(range(int(match[1]), int(match[1]) + own))
    return found


def accesses(instruction: Instruction) -> tuple[set[int], set[int]]:
    """Registers that it writes, and that it reads."""
    operands = [each.strip() for each in instruction.operands.split(",")]
    while operands and PREDICATE.match(operands[0]):
        del operands[0]
    has_result = bool(operands) and re.match(r"R\d", operands[0]) and instruction.name not in WITHOUT_RESULT
    sources = operands[1 if has_result else 0 :]
    own, others = widths(instruction, len(sources))
    written = registers(operands[0], own) if has_result else set()
    return written, set().union(*map(registers, sources, others))


def step(instruction: Instruction, accumulators: dict[int, int], operands: dict[int, int]) -> set[int]:
    """Bring what is in flight up to date, in place; returns registers that the instruction touches too early."""
    if instruction.name == "HGMMA":
        shape, product = SHAPE.search(instruction.opcode), PRODUCT.match(instruction.operands)
        if shape is None or product is None:
            raise ValueError(f"{instruction.opcode} {instruction.operands}: not understood")
        own = range(int(product[1]), int(product[1]) + int(shape[1]) // 2)
        a = range(int(product[2]), int(product[2]) + 4) if product[2] else range(0)
        early = {each for each in a if each in accumulators} | {each for each in own if each in operands}
        accumulators |= dict.fromkeys(own, -1)
        operands |= dict.fromkeys(a, -1)
        if "gsb0" in instruction.operands:
            for kind in (accumulators, operands):
                kind |= {register: age + 1 for register, age in kind.items()}
        return early
    if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        wait = WAIT.search(instruction.operands)
        if wait is None:
            raise ValueError(f"{instruction.opcode} {instruction.operands}: not understood")
        for kind in (accumulators, operands):
            for register in [register for register, age in kind.items() if age >= int(wait[1], 16)]:
                del kind[register]
        return set()
    written, read = accesses(instruction)
    return {each for each in written | read if each in accumulators} | {each for each in written if each in operands}


def merge(into: State, other: State) -> bool:
    """Where two ways meet, what is in flight on either is; returns whether that is news."""
    changed = False
    for mine, theirs in zip(into, other, strict=True):
        for register, age in theirs.items():
            if register not in mine or age < mine[register]:
                mine[register] = age
                changed = True
    return changed


def in_flight(function: Function) -> dict[int, State]:
    """What is in flight where a block begins, of every block that some way leads to."""
    before: dict[int, State] = {0: ({}, {})}
    waiting = [0]
    while waiting:
        index = waiting.pop()
        accumulators, operands = (dict(kind) for kind in before[index])
        for each in function.blocks[index].instructions:
            step(each, accumulators, operands)
        for following in function.blocks[index].successors:
            if following not in before:
                before[following] = (dict(accumulators), dict(operands))
            elif not merge(before[following], (accumulators, operands)):
                continue
            waiting.append(following)
    return before


def find(function: Function) -> Iterator[str]:
    """A sentence for every instruction that touches a register too early, and for products that nothing leads to."""
    if not function.has_wgmma:
        return
    before = in_flight(function)
    for index, block in enumerate(function.blocks):
        accumulators, operands = (dict(kind) for kind in before.get(index, ({}, {})))
        for each in block.instructions:
            if index not in before:
                if each.name == "HGMMA":
                    yield f"{each.opcode} at {each.address:#x}: no way that leads here was found"
            elif early := step(each, accumulators, operands):
                yield f"{each.opcode} {each.operands} at {each.address:#x}: R{min(early)} is in flight"


def overlap(function: Function) -> float | None:
    """Which share of a loop's exponentials is computed while a product is under way.

    Of the innermost loops that hold both, the one with the least share; None: there is no such loop.
    """
    loops = [
        each for each in function.loops if function.count(each.blocks, ("HGMMA",)) and exponentials(function, each)
    ]
    loops = [each for each in loops if not any(other.blocks < each.blocks for other in loops)]
    if not loops:
        return None
    before = in_flight(function)
    shares = []
    for loop in loops:
        beside = 0
        for index in loop.blocks & before.keys():
            accumulators, operands = (dict(kind) for kind in before[index])
            for each in function.blocks[index].instructions:
                beside += is_exponential(each) and bool(accumulators)
                step(each, accumulators, operands)
        shares.append(beside / exponentials(function, loop))
    return min(shares)


def is_exponential(instruction: Instruction) -> bool:
    """2 to the power of a number."""
    return instruction.opcode.startswith("MUFU.EX2")


def exponentials(function: Function, loop: Loop) -> int:
    """How many a loop holds."""
    return sum(is_exponential(each) for index in loop.blocks for each in function.blocks[index].instructions)
