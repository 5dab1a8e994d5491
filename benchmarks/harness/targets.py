"""The speeds that this package promises on a CPU, and whether a run reached them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.report import FLOOR, Row

BF16 = "avx512_bf16"


@dataclass(frozen=True)
class Target:
    """At least `wanted` in every row that `applies` selects, beside the best of the peers that `peer` selects."""

    name: str
    wanted: float
    applies: Callable[[Row], bool]
    peer: Callable[[str], bool] = lambda name: True
    needs: str = ""  # an instruction set without which the target does not hold


def _is_flash(name: str) -> bool:
    return name == "torch flash"


def _is_masked(name: str) -> bool:
    return "mask" in name


def _dense(dtype: str, causal: bool | None = None, backward: bool | None = None) -> Callable[[Row], bool]:
    def applies(row: Row) -> bool:
        case = row.case
        return (
            case.group == "dense"
            and case.dtype == dtype
            and case.seqlen_q in (2048, 4096)
            and causal in (None, case.causal)
            and backward in (None, case.backward)
        )

    return applies


def _group(group: str, seqlen: int) -> Callable[[Row], bool]:
    return lambda row: row.case.group == group and row.case.seqlen_k == seqlen


TARGETS = (
    Target("fp32 full, seqlen 2048 and 4096, to torch flash", 1.05, _dense("fp32", causal=False), _is_flash),
    Target("fp32 causal, seqlen 2048 and 4096, to torch flash", 1.2, _dense("fp32", causal=True), _is_flash),
    Target("bf16 forward, seqlen 2048 and 4096, to torch flash", 2.0, _dense("bf16", backward=False), _is_flash, BF16),
    Target("bf16 fwd+bwd, seqlen 2048 and 4096, to torch flash", 1.7, _dense("bf16", backward=True), _is_flash, BF16),
    Target("GQA 8/2, to torch flash", 1.4, _group("gqa", 2048), _is_flash),
    Target("window 256 at seqlen 4096, to torch's best", 10.0, _group("window", 4096)),
    Target("ragged batch, to torch's best with a dense mask", 5.0, _group("varlen", 1024), _is_masked),
    Target(
        "no case under the floor, to torch's best (fp32 with seqlen_q up to 16 excepted)",
        FLOOR,
        lambda row: not (row.case.dtype == "fp32" and row.case.seqlen_q <= 16),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """How one target went: its worst row decides."""

    name: str
    wanted: float
    reached: float | None  # None when no row of this run belongs to the target
    worst_case: str

    @property
    def verdict(self) -> str:
        """The word for the table."""
        return "not measured" if self.reached is None else "met" if self.reached >= self.wanted else "missed"

    def as_json(self) -> dict[str, Any]:
        """Plain data, for the results file."""
        return {
            "target": self.name,
            "wanted": self.wanted,
            "reached": None if self.reached is None else round(self.reached, 3),
            "worst_case": self.worst_case,
            "verdict": self.verdict,
        }


def check_targets(rows: Sequence[Row], instruction_set: str) -> list[Outcome]:
    """One outcome per target that holds for this processor."""
    return [_check(target, rows) for target in TARGETS if not target.needs or target.needs == instruction_set.lower()]


def _check(target: Target, rows: Sequence[Row]) -> Outcome:
    values = {}
    for row in filter(target.applies, rows):
        ratios = [ratio for peer, ratio in row.ratios.items() if target.peer(peer)]
        if ratios:
            values[row.case.name] = min(ratios)
    if not values:
        return Outcome(target.name, target.wanted, None, "")
    worst = min(values, key=values.__getitem__)
    return Outcome(target.name, target.wanted, values[worst], worst)


def targets_table(outcomes: Sequence[Outcome]) -> str:
    """Markdown, for the terminal and the report."""
    lines = ["| target | wanted | reached | worst case | verdict |", "|---|---:|---:|---|---|"]
    for outcome in outcomes:
        reached = "" if outcome.reached is None else f"{outcome.reached:.2f}x"
        verdict = f"**{outcome.verdict}**" if outcome.verdict == "missed" else outcome.verdict
        lines.append(f"| {outcome.name} | {outcome.wanted}x | {reached} | {outcome.worst_case} | {verdict} |")
    return "\n".join(lines)
