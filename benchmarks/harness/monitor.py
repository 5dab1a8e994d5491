"""Clocks, power and what holds the clocks back, from nvidia-smi: once, or all the time in the background."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import threading
from datetime import datetime
from typing import Any

PERIOD_MS = 100
STATE = {
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "driver": "driver_version",
}
SAMPLED = ("timestamp", "clocks.sm", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
# The bits of clocks_event_reasons that slow a busy GPU down (nvml.h, nvmlClocksEventReason*).
THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
}


def _query(fields: tuple[str, ...]) -> list[str]:
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    return ["nvidia-smi", f"--id={gpu}", "--format=csv,noheader,nounits", f"--query-gpu={','.join(fields)}"]


def device_state(device: str) -> dict[str, float | str]:
    """Clocks, limits and driver at this moment; nothing where nvidia-smi cannot tell."""
    if device != "cuda":
        return {}
    command = _query(tuple(STATE.values()))
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    found = dict(zip(STATE, text.strip().split(", "), strict=False))
    numbers: dict[str, float | str] = {name: x for name, each in found.items() if (x := _number(each)) is not None}
    return {**numbers, "driver": found["driver"]} if "driver" in found else numbers


def _number(text: str) -> float | None:
    """None for what nvidia-smi cannot tell, "[N/A]" for example."""
    try:
        return float(text)
    except ValueError:
        return None


class Monitor:
    """One nvidia-smi for the whole run, and its samples: (seconds since 1970, clock, power, temperature, reasons)."""

    def __init__(self, device: str):
        self.samples: list[tuple[float, float | None, float | None, float | None, int]] = []
        self._process: subprocess.Popen[bytes] | None = None
        if device != "cuda":
            return
        # To a terminal every line is written at once, to a pipe perhaps many together.
        try:
            source, sink = os.openpty()
        except OSError:
            source, sink = os.pipe()
        command = [*_query(SAMPLED), f"--loop-ms={PERIOD_MS}"]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.DEVNULL)
        except OSError:
            os.close(source)
        else:
            threading.Thread(target=self._read, args=(source,), daemon=True).start()
        os.close(sink)

    def _read(self, source: int) -> None:
        # When the process ends, reading from a terminal is an error.
        with contextlib.suppress(OSError), open(source, errors="replace") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    self.samples.append(parse_sample(line))

    def between(self, start: float, end: float) -> dict[str, Any]:
        """Median clock, highest power and temperature, and all throttles of an interval (seconds since 1970)."""
        chosen = [sample for sample in list(self.samples) if start <= sample[0] <= end]
        clocks, powers, temperatures = ([x for each in chosen if (x := each[i]) is not None] for i in (1, 2, 3))
        state: dict[str, Any] = {"samples": len(chosen)} if chosen else {}
        if clocks:
            state["sm_clock_mhz"] = statistics.median(clocks)
        if powers:
            state["power_w"] = max(powers)
        if temperatures:
            state["temperature_c"] = max(temperatures)
        throttles = [name for bit, name in THROTTLES.items() if any(each[4] & bit for each in chosen)]
        return {**state, "throttles": throttles} if throttles else state

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def parse_sample(line: str) -> tuple[float, float | None, float | None, float | None, int]:
    """One line of nvidia-smi; ValueError if it is none."""
    fields = [field.strip() for field in line.split(", ")]
    if len(fields) != len(SAMPLED):
        raise ValueError(line)
    time = datetime.strptime(fields[0], "%Y/%m/%d %H:%M:%S.%f").timestamp()
    reasons = int(fields[4], 16) if fields[4].startswith("0x") else 0
    return time, _number(fields[1]), _number(fields[2]), _number(fields[3]), reasons
