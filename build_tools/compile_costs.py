"""What compiling the kernels costs: size, memory, processor time, and that time relative to build_tools/calibration.cu.

Processor time depends on the machine and on what else runs there, often by a quarter from one minute to the next. So
calibration.cu is compiled again and again between the kernels, and meets the same conditions; and where time seems to
have grown, all is compiled once more, and the lesser time of each object file counts: what else runs can only add.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from build_tools import cuda_archs, cuda_objects
from build_tools.cuda_objects import ROOT, Object

ALLOWED_GROWTH = 1.25
# What must not grow by more than that.
LIMITED = ("kernels", "object_bytes", "peak_bytes", "relative_time")
CALIBRATION = ROOT / "build_tools" / "calibration.cu"
CALIBRATIONS = 10  # how often it is compiled

Log = dict[str, Any]


def calibrations(at_most: int) -> list[Object]:
    """Several of calibration.cu: it does not look at what it is compiled for, so their work is the same."""
    codes = tuple(cuda_archs.code_names(cuda_archs.parse(cuda_archs.DEFAULT)))
    count = min(at_most, CALIBRATIONS)
    return [Object(CALIBRATION, codes, cuda_objects.ELEMENTS[0], number) for number in range(1, count + 1)]


def interleaved(objects: Sequence[Object], between: Sequence[Object]) -> list[Object]:
    """The objects, with the others spread evenly between them."""
    step = -(-len(objects) // len(between))
    parts = [[other, *objects[i * step : (i + 1) * step]] for i, other in enumerate(between)]
    return [each for part in parts for each in part]


@dataclass(frozen=True)
class Compiled:
    """Object files that are up to date, and what measured.py wrote down of each."""

    folder: Path
    objects: list[Object]
    calibrations: list[Object]
    logs: list[Log]
    calibration_logs: list[Log]

    def costs(self) -> dict[str, float]:
        """Bytes, and seconds of processor time."""
        cpu_seconds = sum(log["cpu_seconds"] for log in self.logs)
        # The mean: a spell in which everything is slow adds to the sum above in proportion.
        calibration = statistics.mean(log["cpu_seconds"] for log in self.calibration_logs)
        return {
            "object_bytes": sum(each.path(self.folder).stat().st_size for each in self.objects),
            "peak_bytes": max(log["peak_bytes"] for log in self.logs),
            "cpu_seconds": round(cpu_seconds, 1),
            "calibration_cpu_seconds": round(calibration, 2),
            "relative_time": round(cpu_seconds / calibration, 1),
        }


def remove(wanted: list[Object], folder: Path) -> None:
    """All of these, and the calibrations, are to be compiled anew."""
    for each in [*wanted, *calibrations(len(wanted))]:
        each.path(folder).unlink(missing_ok=True)


def compile_all(home: Path, wanted: list[Object], folder: Path) -> Compiled:
    """Compile what is not up to date. Raises ToolError if that fails."""
    others = calibrations(len(wanted))
    cuda_objects.build(home, interleaved(wanted, others), folder)
    return Compiled(folder, wanted, others, _logs(wanted, folder), _logs(others, folder))


def compile_again(home: Path, before: Compiled) -> Compiled:
    """Compile all once more; of each file the lesser time counts."""
    remove(before.objects, before.folder)
    now = compile_all(home, before.objects, before.folder)
    return replace(
        now,
        logs=_quicker(before.logs, now.logs),
        calibration_logs=_quicker(before.calibration_logs, now.calibration_logs),
    )


def growth(costs: dict[str, float], committed: dict[str, float], keys: Sequence[str] = LIMITED) -> list[str]:
    """What has grown too much, a sentence each."""
    return [
        f"{key} has grown from {committed[key]} to {costs[key]}; if that has to be, run make report and commit it"
        for key in keys
        if costs[key] > ALLOWED_GROWTH * committed[key]
    ]


def _logs(built: Sequence[Object], folder: Path) -> list[Log]:
    return [json.loads(each.log(folder).read_text()) for each in built]


def _quicker(before: Sequence[Log], now: Sequence[Log]) -> list[Log]:
    return [min(pair, key=lambda log: float(log["cpu_seconds"])) for pair in zip(before, now, strict=True)]
