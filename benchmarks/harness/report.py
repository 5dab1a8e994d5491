"""Results of one case, and the Markdown table of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.cases import Case

FLOOR = 0.95


@dataclass(frozen=True)
class Row:
    """One measured case. Ratios are a peer's time / our time: above 1 we are quicker."""

    case: Case
    rounds: int
    milliseconds: dict[str, float]  # median per implementation, ours included
    ratios: dict[str, float]  # median of per-round ratios, per peer

    @property
    def best_peer(self) -> str | None:
        """The peer that comes closest to us or beats us by most; None when torch cannot compute the case."""
        return min(self.ratios, key=self.ratios.__getitem__, default=None)

    @property
    def speedup(self) -> float | None:
        """Our speed relative to the best of torch's ways."""
        return self.ratios[self.best_peer] if self.best_peer else None

    def gigaflops(self) -> float:
        """Useful operations per second of ours."""
        return self.case.flops() / self.milliseconds["ours"] / 1e6

    def as_json(self) -> dict[str, Any]:
        """Plain data, for the results file."""
        return {
            "name": self.case.name,
            "case": asdict(self.case),
            "rounds": self.rounds,
            "milliseconds": {name: float(f"{value:.5g}") for name, value in self.milliseconds.items()},
            "ratios": {name: round(value, 3) for name, value in self.ratios.items()},
            "best_peer": self.best_peer,
            "speedup": None if self.speedup is None else round(self.speedup, 3),
            "gigaflops": float(f"{self.gigaflops():.4g}"),
        }


def one_line(row: Row) -> str:
    """For the terminal, while the benchmark runs."""
    peers = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in sorted(row.ratios.items(), key=lambda item: item[1]))
    flag = "  UNDER 0.95" if row.speedup is not None and row.speedup < FLOOR else ""
    return f"{row.case.name:<62} {row.milliseconds['ours']:10.3f} ms  {peers or 'no peer'}{flag}"


def table(rows: Sequence[Row]) -> str:
    """One section per group of cases."""
    sections = []
    for group in dict.fromkeys(row.case.group for row in rows):
        lines = [
            f"## {group}\n",
            "| case | ours, ms | GFLOP/s | torch's best | its ms | speed-up | other ways of torch |",
            "|---|---:|---:|---|---:|---:|---|",
        ]
        lines += [_table_row(row) for row in rows if row.case.group == group]
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def _table_row(row: Row) -> str:
    best, speedup = row.best_peer, row.speedup
    others = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row.ratios.items() if name != best)
    cells = [row.case.name.removeprefix(row.case.group).strip(), _number(row.milliseconds["ours"])]
    cells.append(f"{row.gigaflops():.3g}")
    if best is None or speedup is None:
        cells += ["none can", "", "", ""]
    else:
        flagged = f"**{speedup:.2f}x, under {FLOOR}**" if speedup < FLOOR else f"{speedup:.2f}x"
        cells += [best, _number(row.milliseconds[best]), flagged, others]
    return "| " + " | ".join(cells) + " |"


def _number(milliseconds: float) -> str:
    return f"{milliseconds:.4f}" if milliseconds < 1 else f"{milliseconds:.2f}"
