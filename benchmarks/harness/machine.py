"""What the numbers were measured on, and where results go."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import flash_attn
from harness.monitor import FIXED, Monitor
from harness.ours import kernels

BENCHMARKS = Path(__file__).resolve().parent.parent
# What a heading says of a machine, as far as it is known.
SHOWN = {
    "processor": "{}",
    "threads": "{} CPU threads",
    "driver": "driver {}",
    "cuda": "CUDA {}",
    "cudnn": "cuDNN {}",
    "power_limit_w": "power limit {:.0f} W",
    "sm_clock_max_mhz": "SM clock up to {:.0f} MHz",
    "memory_clock_mhz": "memory clock {:.0f} MHz",
}


def describe(device: str) -> dict[str, Any]:
    """Hardware, versions, commit and day; nothing that identifies one particular computer."""
    info = {
        "device": device,
        "processor": processor_name(device),
        "kernels": kernels(device),
        "torch": torch.__version__,
        "flash_attn": flash_attn.__version__,
        "commit": os.environ.get("COMMIT") or commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if device == "cuda":
        versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        return {**info, **versions, **Monitor(device).ask(FIXED)}
    isa = flash_attn.build_info()["cpu_instruction_set"]
    torch_isa = torch.backends.cpu.get_cpu_capability()
    return {**info, "threads": torch.get_num_threads(), "instruction_set": isa, "torch_instruction_set": torch_isa}


def processor_name(device: str) -> str:
    """The model name of the processor that does the work."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return names[0].strip() if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is checked out, marked when tracked files differ from it."""
    command = ["git", "-C", str(BENCHMARKS), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=-modified"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def results_folder(info: dict[str, Any]) -> Path:
    """RESULTS, or a folder named after the machine, for example results/cpu-amd-epyc-avx512-bf16-2-threads."""
    name = re.sub(r"\((R|TM)\)|CPU|Processor|@.*|\d+-Core", " ", info["processor"], flags=re.IGNORECASE)
    if info["device"] == "cpu":
        name = f"cpu {name} {info['instruction_set']} {info['threads']} threads"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder = Path(os.environ.get("RESULTS") or BENCHMARKS / "results" / slug)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save(name: str, content: dict[str, Any], markdown: str) -> None:
    """Write name.json and name.md, for the machine that the content names."""
    folder = results_folder(content["machine"])
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown + "\n")
    print(f"{markdown}\n\nwrote {name}.json and {name}.md to {folder}")


def heading(title: str, info: dict[str, Any]) -> str:
    """The first lines of every Markdown report."""
    parts = [text.format(info[key]) for key, text in SHOWN.items() if info.get(key) is not None]
    versions = f"torch {info['torch']}, flash-attn {info['flash_attn']}, commit {info['commit']}, {info['date']}"
    return f"# {title}\n\n{', '.join(parts)}  \n{versions}  \nOurs: {info['kernels']}\n"
