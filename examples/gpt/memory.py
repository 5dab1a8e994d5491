"""Peak memory of a function call, and free memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
M_MMAP_THRESHOLD, LARGE = -3, 2**20  # malloc.h of glibc


def peak_memory(function: Callable[[], None], device: str) -> int:
    """Peak bytes that `function` allocates on top of what the process holds before the call."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _resident_bytes()
    function()
    return max(0, _peak_resident_bytes() - before)


def return_freed_tensors() -> None:
    """Large tensors go back to the system when they are freed, so that peak_memory does not count what is free.

    Otherwise glibc keeps up to 32 MB each in its heap, which fragments. On other systems this does nothing.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def _resident_bytes() -> int:
    """Current resident memory of the process; on Linux this also resets the recorded peak."""
    if not STATUS.exists():
        return _peak_resident_bytes()
    with contextlib.suppress(OSError):  # read-only /proc: an earlier, higher peak may hide a small one
        Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak_resident_bytes() -> int:
    """On Linux from /proc: getrusage would include the parent process, which is larger."""
    if STATUS.exists():
        return _status_bytes("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def free_memory(device: str) -> int:
    """Bytes that can be allocated without swapping, within the limits of a container."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return min(_host_available_bytes(), _container_available_bytes())


def _host_available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _container_available_bytes() -> int:
    """Memory left under a cgroup (v2) limit; a very large number without one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if limit == "max" else max(0, int(limit) - used)
