"""Machine code of kernels, read from what cuobjdump prints: control flow, loops, the main loop."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import networkx

FUNCTION = re.compile(r"^\s*Function : (\S+)")
ARCHITECTURE = re.compile(r"^\s*code for (sm_\w+)")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P[T\d])\s+)?([A-Z][\w.]*)\s*([^;]*);")
ADDRESS = re.compile(r"0x([0-9a-f]+)\)?\s*$")
TENSOR = ("HMMA", "HGMMA")
ENDS_BLOCK = ("BRA", "BSYNC", "CALL", "EXIT", "RET", "BRX", "JMP")
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
    def is_conditional(self) -> bool:
        """Whether it may do nothing. A branch on a uniform predicate names that among its operands."""
        return bool(self.predicate) or bool(re.match(r"!?U?P\d, ", self.operands))

    @property
    def target(self) -> int | None:
        """The address that a branch names."""
        match = ADDRESS.search(self.operands)
        return int(match[1], 16) if match else None


# A loop: the blocks that lead back to where it begins.
Loop = frozenset[int]


class Function:
    """The code of one kernel for one architecture."""

    def __init__(self, name: str, architecture: str, instructions: list[Instruction]):
        self.name, self.architecture, self.instructions = name, architecture, instructions
        self.has_wgmma = any(each.name == "HGMMA" for each in instructions)

    @cached_property
    def targets(self) -> dict[int, int]:
        """Where branches go on, by their addresses; BSYNC where the last BSSY with its barrier register says."""
        found: dict[int, int] = {}
        registers: dict[str, int] = {}
        for each in self.instructions:
            target = registers.get(each.operands.strip()) if each.name == "BSYNC" else each.target
            if target is not None and each.name == "BSSY":
                registers[each.operands.partition(",")[0].strip()] = target
            elif target is not None and each.name in ("BRA", "BSYNC", "CALL", "JMP"):
                found[each.address] = target
        return found

    @cached_property
    def blocks(self) -> list[list[Instruction]]:
        """Instructions that are executed one after another."""
        starts = {following.address for this, following in pairwise(self.instructions) if this.name in ENDS_BLOCK}
        starts.update(self.targets.values())
        blocks: list[list[Instruction]] = []
        for each in self.instructions:
            if not blocks or each.address in starts:
                blocks.append([])
            blocks[-1].append(each)
        return blocks

    @cached_property
    def graph(self) -> networkx.DiGraph:
        """Which block leads to which. A call goes on behind it, too; some never return, and are jumps."""
        index_of = {block[0].address: index for index, block in enumerate(self.blocks)}
        graph = networkx.DiGraph()
        graph.add_nodes_from(index_of.values())
        for index, block in enumerate(self.blocks):
            last = block[-1]
            if self.targets.get(last.address) in index_of:
                graph.add_edge(index, index_of[self.targets[last.address]])
            goes_on = last.name not in ENDS_BLOCK or last.is_conditional or last.name == "CALL"
            if goes_on and index + 1 < len(self.blocks):
                graph.add_edge(index, index + 1)
        return graph

    @cached_property
    def loops(self) -> list[Loop]:
        """Parts of the graph in which every block leads to every other; and those within, when the head is left out."""

        def within(part: networkx.DiGraph) -> Iterator[Loop]:
            for blocks in networkx.strongly_connected_components(part):
                entries = (i for i in blocks if not blocks.issuperset(self.graph.predecessors(i)))
                head = min(entries, default=min(blocks))
                if len(blocks) > 1 or part.has_edge(head, head):
                    yield frozenset(blocks)
                    yield from within(part.subgraph(blocks - {head}))

        return list(within(self.graph))

    def count(self, loop: Loop, *opcodes: str) -> int:
        """How many instructions in a loop have an opcode that begins so."""
        return sum(each.opcode.startswith(opcodes) for i in loop for each in self.blocks[i])

    @cached_property
    def main_loop(self) -> Loop | None:
        """The smallest of the loops with most tensor instructions; None without any.

        With wgmma, of the innermost loops that have any: around it stand products before and after the loop.
        """
        tensor = {loop: self.count(loop, *TENSOR) for loop in self.loops}
        found = self.innermost(TENSOR) if self.has_wgmma else [loop for loop in tensor if tensor[loop]]
        return max(found, key=lambda loop: (tensor[loop], -len(loop)), default=None)

    def innermost(self, *kinds: Sequence[str]) -> list[Loop]:
        """The innermost loops that have instructions of each kind, of which one has opcodes that begin so.

        Not those that ask all warps whether values are nonfinite (BAR.RED): they compute rare tiles again.
        """
        found = [loop for loop in self.loops if all(self.count(loop, *kind) for kind in kinds)]
        found = [loop for loop in found if not any(other < loop for other in found)]
        return [loop for loop in found if not self.count(loop, "BAR.RED")]

    def in_double_precision(self) -> list[str]:
        """The opcodes that have anything to do with it, conversions among them, each once."""
        return list(dict.fromkeys(each.opcode for each in self.instructions if DOUBLE.match(each.opcode)))


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
