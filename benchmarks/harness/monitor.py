"""Clocks, power and what holds the clocks back, from NVML: once, or all the time in the background."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

PERIOD = 0.1  # seconds
# The bits of nvmlClocksEventReasons that slow a busy GPU down.
THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
}

# Each asks the module pynvml about a GPU.
Queries = Mapping[str, Callable[[Any, Any], Any]]
SAMPLED: Queries = {
    "sm_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "power_w": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    "temperature_c": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    "reasons": lambda nvml, gpu: nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu),
}
FIXED: Queries = {
    "sm_clock_max_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "power_limit_w": lambda nvml, gpu: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
    "driver": lambda nvml, gpu: nvml.nvmlSystemGetDriverVersion(),
}
SUMMARIES: Mapping[str, Callable[[list[float]], float]] = {
    "sm_clock_mhz": statistics.median,
    "power_w": max,
    "temperature_c": max,
}


class Monitor:
    """NVML, if there is a GPU and nvidia-ml-py, and samples: (seconds since 1970, answers)."""

    def __init__(self, device: str):
        self.samples: list[tuple[float, dict[str, Any]]] = []
        self._nvml: Any = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if device == "cuda":
            try:
                import pynvml

                pynvml.nvmlInit()
                self._gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
                self._nvml = pynvml
            except Exception as error:  # noqa: BLE001 (clocks are not worth a run)
                print(f"no clocks and no power: {error}")

    def ask(self, queries: Queries) -> dict[str, Any]:
        """The answers of this moment; what NVML cannot tell is left out."""
        answers = {}
        for name, query in queries.items() if self._nvml is not None else ():
            with contextlib.suppress(Exception):  # NVMLError: not supported, for example
                answers[name] = query(self._nvml, self._gpu)
        return answers

    def _run(self) -> None:
        while self._nvml is not None and not self._ended.wait(PERIOD):
            self.samples.append((time.time(), self.ask(SAMPLED)))

    def between(self, start: float, end: float) -> dict[str, Any]:
        """Median clock, highest power and temperature, and all throttles of an interval (seconds since 1970)."""
        chosen = [answers for at, answers in list(self.samples) if start <= at <= end]
        state: dict[str, Any] = {"samples": len(chosen)} if chosen else {}
        for name, summarize in SUMMARIES.items():
            if values := [answers[name] for answers in chosen if name in answers]:
                state[name] = summarize(values)
        throttles = [name for bit, name in THROTTLES.items() if any(each.get("reasons", 0) & bit for each in chosen)]
        return {**state, "throttles": throttles} if throttles else state

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
