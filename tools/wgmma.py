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

from tools.sass import Function, Instruction

REGISTER = re.compile(r"(?<![\w.])R(\d+)")
PRODUCT = re.compile(r"R(\d+), (?:R(\d+)(?:\.reuse)?, )?gdesc\[")
SHAPE = re.compile(r"\.64x(\d+)x16")
WAIT = re.compile(r"gsb0, 0x([0-9a-f]+)")
PREDICATE = re.compile(r"^!?U?P[T\d]$")
EXPONENTIAL = "MUFU.EX2"  # 2 to the power of a number
# Their first register is read.
WITHOUT_RESULT = ("BAR", "WARPSYNC", "BRX", "JMX", "RET", "NANOSLEEP")

# In flight: accumulators ("D") and A operands ("A"), by register: how many groups have been closed since the youngest
# product that uses it was issued, -1 being the group that is still open.
State = dict[tuple[str, int], int]


def widths(instruction: Instruction, sources: int) -> tuple[int, list[int]]:
    """How many registers in a row its result is, and each of its sources."""
    name, *parts = instruction.opcode.split(".")
    if name in ("F2F", "F2I", "I2F"):  # to the first type from the second
        is_wide = [part.endswith("64") for part in parts]
        return 1 + any(is_wide[:1]), [1 + any(is_wide[1:])] * sources
    if "WIDE" in parts:  # of a wide product, factors are single registers
        return 2, [1] * (sources - 1) + [2]
    count = 1
    if name in ("LDSM", "STSM") and parts[-1].isdecimal():
        count = int(parts[-1])
    elif "128" in parts or "F32x4" in parts:
        count = 4
    elif "64" in parts or name in ("DADD", "DMUL", "DFMA", "DSETP") or (name == "CS2R" and "32" not in parts):
        count = 2
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


def step(instruction: Instruction, state: State) -> set[int]:
    """Bring what is in flight up to date, in place; returns registers that the instruction touches too early."""
    opcode, operands = instruction.opcode, instruction.operands
    if instruction.name == "HGMMA":
        shape, product = SHAPE.search(opcode), PRODUCT.match(operands)
        if shape is None or product is None:
            raise ValueError(f"{opcode} {operands}: not understood")
        own = range(int(product[1]), int(product[1]) + int(shape[1]) // 2)
        a = range(int(product[2]), int(product[2]) + 4) if product[2] else range(0)
        early = {each for each in a if ("D", each) in state} | {each for each in own if ("A", each) in state}
        state |= dict.fromkeys([*(("D", each) for each in own), *(("A", each) for each in a)], -1)
        if "gsb0" in operands:
            state |= {key: age + 1 for key, age in state.items()}
        return early
    if opcode.startswith("WARPGROUP.DEPBAR"):
        wait = WAIT.search(operands)
        if wait is None:
            raise ValueError(f"{opcode} {operands}: not understood")
        for key in [key for key, age in state.items() if age >= int(wait[1], 16)]:
            del state[key]
        return set()
    written, read = accesses(instruction)
    return {each for each in written | read if ("D", each) in state or (each in written and ("A", each) in state)}


def in_flight(function: Function) -> dict[int, State]:
    """What is in flight where a block begins, of every block that some way leads to. Where ways meet: either's."""
    before: dict[int, State] = {0: {}}
    waiting = [0]
    while waiting:
        index = waiting.pop()
        state = dict(before[index])
        for each in function.blocks[index]:
            step(each, state)
        for following in function.graph.successors(index):
            is_new, known = following not in before, before.setdefault(following, {})
            news = {key: age for key, age in state.items() if key not in known or age < known[key]}
            known |= news
            if news or is_new:
                waiting.append(following)
    return before


def follow(function: Function, before: dict[int, State]) -> Iterator[tuple[int, Instruction, bool, set[int]]]:
    """Block, instruction, whether accumulators are in flight there, and registers that it touches too early."""
    for index in before:
        state = dict(before[index])
        for each in function.blocks[index]:
            is_beside = any(kind == "D" for kind, _ in state)
            yield index, each, is_beside, step(each, state)


def find(function: Function) -> Iterator[str]:
    """A sentence for every instruction that touches a register too early, and for products that nothing leads to."""
    before = in_flight(function) if function.has_wgmma else {}
    for _, each, _, early in follow(function, before):
        if early:
            yield f"{each.opcode} {each.operands} at {each.address:#x}: R{min(early)} is in flight"
    for index, block in enumerate(function.blocks):
        for each in block if index not in before else []:
            if each.name == "HGMMA":
                yield f"{each.opcode} at {each.address:#x}: no way that leads here was found"


def overlap(function: Function) -> float | None:
    """Which share of a loop's exponentials is computed while a product is under way.

    Of the innermost loops that hold both, the one with the least share; None: there is no such loop.
    """
    loops = function.innermost(["HGMMA"], [EXPONENTIAL])
    places = follow(function, in_flight(function)) if loops else ()
    beside = [index for index, each, is_beside, _ in places if is_beside and each.opcode.startswith(EXPONENTIAL)]
    shares = [sum(i in loop for i in beside) / function.count(loop, EXPONENTIAL) for loop in loops]
    return min(shares, default=None)
