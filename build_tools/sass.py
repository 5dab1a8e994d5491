"""Machine code of kernels, read from what cuobjdump prints: its loops, and what one pass of the main loop executes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

FUNCTION = re.compile(r"^\s*Function : (\S+)")
ARCHITECTURE = re.compile(r"^\s*code for (sm_\w+)")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P[T\d])\s+)?([A-Z][\w.]*)\s*([^;]*);")
ADDRESS = re.compile(r"0x([0-9a-f]+)\)?\s*$")
TENSOR = ("HMMA", "HGMMA", "IMMA", "QGMMA")
DOUBLE = re.compile(r"D(MUL|ADD|FMA|SETP|MNMX|MMA)\b|MUFU\.\w*64H|\w+\.(\w+\.)*F64\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, the predicate that may switch it off, its name and what stands behind that."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers: LDSM of LDSM.16.M88.4."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """What it is counted as: the opcode; of HGMMA also whether A is in shared memory (SS) or in registers (RS)."""
        if self.name != "HGMMA":
            return self.opcode
        return f"{self.opcode}.{'SS' if re.match(r'R[Z0-9]+, gdesc', self.operands) else 'RS'}"

    @property
    def is_conditional(self) -> bool:
        """Whether it may do nothing. A branch on a uniform predicate names that among its operands."""
        return bool(self.predicate) or bool(re.match(r"!?U?P\d, ", self.operands))

    @property
    def target(self) -> int | None:
        """The address that a branch names."""
        match = ADDRESS.search(self.operands)
        return int(match[1], 16) if match else None


@dataclass
class Block:
    """Instructions that are executed one after another."""

    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)  # indices of blocks


@dataclass(frozen=True)
class Loop:
    """A loop: the blocks that can be reached from its head and lead back to it."""

    head: int
    blocks: frozenset[int]


class Function:
    """The code of one kernel for one architecture."""

    def __init__(self, name: str, architecture: str, instructions: list[Instruction]):
        self.name, self.architecture, self.instructions = name, architecture, instructions

    @cached_property
    def blocks(self) -> list[Block]:
        """The graph of control flow. Subroutines within the function are separate parts of it."""
        reconverge = reconvergence(self.instructions)
        starts = {self.instructions[0].address} if self.instructions else set()
        ends_block = {"BRA", "BSYNC", "EXIT", "RET", "BRX", "JMP"}
        for this, following in zip(self.instructions, self.instructions[1:], strict=False):
            if this.name in ends_block:
                starts.add(following.address)
                target = reconverge.get(this.address, this.target if this.name in ("BRA", "JMP") else None)
                starts |= {target} if target is not None else set()
        blocks: list[Block] = []
        index_of: dict[int, int] = {}
        for each in self.instructions:
            if each.address in starts:
                index_of[each.address] = len(blocks)
                blocks.append(Block([]))
            blocks[-1].instructions.append(each)
        for index, block in enumerate(blocks):
            last = block.instructions[-1]
            goes_on = last.name not in ends_block or last.is_conditional
            target = reconverge.get(last.address, last.target if last.name in ("BRA", "JMP") else None)
            if target in index_of:
                block.successors.append(index_of[target])
            if goes_on and index + 1 < len(blocks):
                block.successors.append(index + 1)
        return blocks

    @cached_property
    def loops(self) -> list[Loop]:
        """All natural loops, one per head."""
        predecessors: dict[int, list[int]] = {}
        for index, block in enumerate(self.blocks):
            for successor in block.successors:
                predecessors.setdefault(successor, []).append(index)
        bodies: dict[int, set[int]] = {}
        for tail, head in self._back_edges():
            body, waiting = bodies.setdefault(head, {head}), [tail]
            while waiting:
                index = waiting.pop()
                if index not in body:
                    body.add(index)
                    waiting += predecessors.get(index, [])
        return [Loop(head, frozenset(body)) for head, body in bodies.items()]

    def _back_edges(self) -> Iterator[tuple[int, int]]:
        """Edges to a block that is on the way to where they start, by depth-first search."""
        state = dict.fromkeys(range(len(self.blocks)), "new")
        for root in range(len(self.blocks)):
            if state[root] != "new":
                continue
            state[root] = "open"
            stack = [(root, iter(self.blocks[root].successors))]
            while stack:
                index, successors = stack[-1]
                following = next(successors, None)
                if following is None:
                    state[index] = "done"
                    stack.pop()
                elif state[following] == "open":
                    yield index, following
                elif state[following] == "new":
                    state[following] = "open"
                    stack.append((following, iter(self.blocks[following].successors)))

    def count(self, blocks: Iterable[int], names: tuple[str, ...]) -> int:
        """How many instructions of these names the blocks hold."""
        return sum(each.name in names for index in blocks for each in self.blocks[index].instructions)

    @cached_property
    def main_loop(self) -> Loop | None:
        """The smallest of the loops with most tensor instructions; None without any.

        With wgmma, of the innermost loops that have any: around it stand products before and after the loop.
        """
        loops = self.loops
        if self.has_wgmma:
            loops = [each for each in loops if not self._inner_loops(each)]
        tensor = {loop: self.count(loop.blocks, TENSOR) for loop in loops}
        most = max(tensor.values(), default=0)
        if most == 0:
            return None
        return min((loop for loop in loops if tensor[loop] == most), key=lambda loop: len(loop.blocks))

    @cached_property
    def has_wgmma(self) -> bool:
        """Whether products are those of wgmma. Then TMA loads, in a loop of another warp."""
        return any(each.name == "HGMMA" for each in self.instructions)

    def usual_pass(self, parts: int = 1, *, fewest_products: bool = False) -> Counter[str]:
        """Instructions, by kind, of one pass of the main loop as it usually goes.

        Of all ways through the loop the one with most tensor instructions, or with fewest, among these that with most
        asynchronous copies (loads of the next tile, if not by TMA), among these the shortest: nothing to mask, no
        pages, no special cases, not the thread that does something for all. Loops within it that hold tensor
        instructions turn as often as parts says.
        """
        loop = self.main_loop
        if loop is None:
            return Counter()
        sign = -1 if fewest_products else 1
        best: dict[int, tuple[int, int, int]] = {}
        onward: dict[int, int | None] = {}
        for index in reversed(self._in_order(loop)):
            instructions = self.blocks[index].instructions
            copies = 0 if self.has_wgmma else self.count([index], ("LDGSTS",))
            own = (sign * self.count([index], TENSOR), copies, -len(instructions))
            ways = [s for s in self.blocks[index].successors if s in best and s != loop.head]
            if not ways and loop.head not in self.blocks[index].successors:
                continue  # leads out of the loop or around an inner one
            onward[index] = max(ways, key=best.__getitem__) if ways else None
            rest = max((best[way] for way in ways), default=(0, 0, 0))
            best[index] = (own[0] + rest[0], own[1] + rest[1], own[2] + rest[2])
        repeated = {index for each in self._inner_loops(loop) for index in each.blocks}
        passed: Counter[str] = Counter()
        at: int | None = loop.head
        while at is not None:
            for each in self.blocks[at].instructions:
                passed[each.kind] += parts if at in repeated else 1
            at = onward[at]
        return passed

    def _inner_loops(self, outer: Loop) -> list[Loop]:
        """The loops with tensor instructions within a loop."""
        return [each for each in self.loops if each.blocks < outer.blocks and self.count(each.blocks, TENSOR)]

    def _in_order(self, loop: Loop) -> list[int]:
        """The blocks of a loop, each after all that lead to it within one pass."""
        order: list[int] = []
        seen = {loop.head}
        stack = [(loop.head, iter(self.blocks[loop.head].successors))]
        while stack:
            index, successors = stack[-1]
            following = next(successors, None)
            if following is None:
                order.append(index)
                stack.pop()
            elif following in loop.blocks and following not in seen:
                seen.add(following)
                stack.append((following, iter(self.blocks[following].successors)))
        return order[::-1]


def in_double_precision(function: Function) -> list[str]:
    """The opcodes that have anything to do with it, conversions among them, each once."""
    found = [each.opcode for each in function.instructions if DOUBLE.match(each.opcode)]
    return list(dict.fromkeys(found))


def reconvergence(instructions: list[Instruction]) -> dict[int, int]:
    """Where each BSYNC goes on: what the last BSSY before it has put into its barrier register."""
    found, registers = {}, {}
    for each in instructions:
        if each.name == "BSSY" and each.target is not None:
            registers[each.operands.partition(",")[0].strip()] = each.target
        elif each.name == "BSYNC" and each.operands.strip() in registers:
            found[each.address] = registers[each.operands.strip()]
    return found


def parse(lines: Iterable[str]) -> Iterator[Function]:
    """The functions in the output of cuobjdump --dump-sass."""
    architecture, name, instructions = "", "", []
    for line in lines:
        if match := INSTRUCTION.match(line):
            instructions.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4].strip()))
        elif match := FUNCTION.match(line) or ARCHITECTURE.match(line):
            if instructions:
                yield Function(name, architecture, instructions)
                instructions = []
            if match.re is FUNCTION:
                name = match[1]
            else:
                architecture = match[1]
    if instructions:
        yield Function(name, architecture, instructions)
