"""One case of the simulator, and the line of key=value that runner/case.cpp reads."""

import dataclasses
from dataclasses import dataclass

from cases import Case

SMALL_SMEM, LARGE_SMEM = 101376, 232448  # bytes of shared memory per block: compute capability 8.6 or 12.0, and 9.0


@dataclass(frozen=True)
class Sim:
    """What a case of the simulator is told beside the problem."""

    check: str = "reference"
    layout: str = "rows"  # "rows", "heads" (before rows), "gaps" (odd offsets and strides), "chunks", "far"
    smem: int = LARGE_SMEM
    compute_capability: int = 80
    deterministic: bool = False
    seqlen_new: int = 0  # rows of a KV cache that seqused_k does not count


Row = tuple[Case, Sim]


def text_of(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(int(value)) if isinstance(value, bool) else str(value)


def line_of(row: Row) -> str:
    """The fields that are not at their defaults; an empty tuple is a field too."""
    parts = []
    for part in row:
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if value is not None and (field.default is dataclasses.MISSING or value != field.default):
                parts.append(f"{field.name}={text_of(value)}")
    return " ".join(parts)
