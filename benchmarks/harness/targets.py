"""The speeds that this package promises on a CPU, and whether a run reached them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.measure import Row
from harness.provider import OURS

FLASH = "^torch flash$"
BF16 = "avx512_bf16"


@dataclass(frozen=True)
class Target:
    """At least `wanted` in every pass of the cases, to the best of the peers whose name matches."""

    name: str
    wanted: float
    applies: Callable[[dict[str, Any]], bool]
    peer: str = "."
    passes: tuple[str, ...] = ("forward", "both")
    instruction_set: str = ""  # without which the target does not hold


def _dense(dtype: str, causal: bool | None = None) -> Callable[[dict[str, Any]], bool]:
    return lambda case: (
        (case["group"], case["dtype"]) == ("dense", dtype)
        and case["seqlen_q"] in (2048, 4096)
        and causal in (None, case["causal"])
    )


def _group(name: str, seqlen: int) -> Callable[[dict[str, Any]], bool]:
    return lambda case: (case["group"], case["seqlen_k"]) == (name, seqlen)


TARGETS = (
    Target("fp32 full, seqlen 2048 and 4096, to torch flash", 1.05, _dense("fp32", causal=False), FLASH),
    Target("fp32 causal, seqlen 2048 and 4096, to torch flash", 1.2, _dense("fp32", causal=True), FLASH),
    Target("bf16 forward, seqlen 2048 and 4096, to torch flash", 2.0, _dense("bf16"), FLASH, ("forward",), BF16),
    Target("bf16 both passes, seqlen 2048 and 4096, to torch flash", 1.7, _dense("bf16"), FLASH, ("both",), BF16),
    Target("GQA 8/2, to torch flash", 1.4, _group("gqa", 2048), FLASH),
    Target("window 256 at seqlen 4096, to torch's best", 10.0, _group("window", 4096)),
    Target("ragged batch, to torch's best with a dense mask", 5.0, _group("varlen", 1024), "mask"),
    Target("no case under the floor, to torch's best", 0.95, lambda case: case["seqlen_k"] >= 512),
)


def outcomes(rows: Sequence[Row], machine: dict[str, Any]) -> list[tuple[Target, float | None, str]]:
    """Every target that holds for this machine, the worst ratio that belongs to it, if there is one, and where."""
    found: list[tuple[Target, float | None, str]] = []
    for target in TARGETS if machine["device"] == "cpu" else ():
        if target.instruction_set in ("", machine["instruction_set"].lower()):
            ratios = [
                (ratio, f"{row['name']} {which}")
                for row in rows
                if target.applies(row["case"])
                for which in row["passes"].keys() & target.passes
                for peer, ratio in row["passes"][which]["ratios"].items()
                if not peer.startswith(OURS) and re.search(target.peer, peer)
            ]
            found.append((target, *min(ratios, default=(None, ""))))
    return found


def missed(rows: Sequence[Row], machine: dict[str, Any]) -> bool:
    """Whether one of them was."""
    return any(reached is not None and reached < target.wanted for target, reached, _ in outcomes(rows, machine))


def targets_table(rows: Sequence[Row], machine: dict[str, Any]) -> list[str]:
    """Lines of Markdown; none where there are no targets."""
    lines = ["| target | wanted | reached | worst case | verdict |", "|---|---:|---:|---|---|"]
    for target, reached, where in outcomes(rows, machine):
        verdict = "not measured" if reached is None else "met" if reached >= target.wanted else "**missed**"
        value = "" if reached is None else f"{reached:.2f}"
        lines.append(f"| {target.name} | {target.wanted} | {value} | {where} | {verdict} |")
    return ["## Targets\n", *lines, ""] if len(lines) > 2 else []
