"""Clocks and power during the benchmark, with a stand-in for NVML."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from harness.monitor import FIXED, Monitor


def refuse(*_):
    raise RuntimeError("Not Supported")


@pytest.fixture
def nvml(monkeypatch):
    """A stand-in for nvidia-ml-py."""
    names = {
        "nvmlInit": lambda: None, "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "NVML_CLOCK_SM": "SM", "NVML_CLOCK_MEM": "memory", "NVML_TEMPERATURE_GPU": 0,
        "nvmlDeviceGetClockInfo": lambda gpu, clock: {"SM": 1755, "memory": 3201}[clock],
        "nvmlDeviceGetMaxClockInfo": lambda gpu, clock: 1980, "nvmlSystemGetDriverVersion": lambda: "580.65.06",
        "nvmlDeviceGetPowerUsage": lambda gpu: 612400, "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 700000,
        "nvmlDeviceGetTemperature": lambda gpu, sensor: 55,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: 0x24,
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="0"))
    module = SimpleNamespace(**names)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def sampled():
    with Monitor("cuda") as watching:
        started = time.time()
        while len(watching.samples) < 3 and time.time() < started + 20:
            time.sleep(0.02)
        return watching.between(started - 1, time.time() + 1)


def test_clocks_are_sampled_in_the_background(nvml):
    state = sampled()
    assert state.pop("samples") >= 3
    assert state == {
        "sm_clock_mhz": 1755, "power_w": 612.4, "temperature_c": 55,
        "throttles": ["power cap", "thermal, software"],
    }  # fmt: skip


def test_what_nvml_cannot_tell_is_left_out(nvml):
    for name in ("PowerUsage", "Temperature", "CurrentClocksEventReasons"):
        setattr(nvml, f"nvmlDeviceGet{name}", refuse)
    state = sampled()
    assert state.pop("samples") >= 3
    assert state == {"sm_clock_mhz": 1755}
    nvml.nvmlDeviceGetClockInfo = refuse
    assert Monitor("cuda").ask(FIXED) == {"sm_clock_max_mhz": 1980, "power_limit_w": 700, "driver": "580.65.06"}


def test_without_nvml_there_are_no_clocks(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Monitor("cuda") as watching:
        assert watching.ask(FIXED) == {}
        assert watching.between(0, time.time()) == {}
    assert "no clocks" in capsys.readouterr().out
