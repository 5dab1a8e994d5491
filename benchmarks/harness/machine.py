"""What the numbers were measured on, and where results go."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import flash_attn

BENCHMARKS = Path(__file__).resolve().parent.parent


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmark scripts have."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads for all providers")
    parser.add_argument("--quick", action="store_true", help="small and few, to see that everything runs")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder for the results (results/<machine>; after --quick or --only: results/partial/<machine>)",
    )


def default_device() -> str:
    """A GPU when there is one that this build of flash_attn has kernels for."""
    return "cuda" if torch.cuda.is_available() and flash_attn.build_info()["cuda_archs"] else "cpu"


def describe(device: str) -> dict[str, Any]:
    """Hardware, versions, commit and day; nothing that identifies one particular computer."""
    info = {
        "device": device,
        "processor": processor_name(device),
        "threads": torch.get_num_threads(),
        "instruction_set": flash_attn.build_info()["cpu_instruction_set"],
        "torch": torch.__version__,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "flash_attn": flash_attn.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if device == "cuda":
        info |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return info


def processor_name(device: str) -> str:
    """The model name of the processor that does the work."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is checked out, marked when tracked files differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("-modified" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(BENCHMARKS), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def machine_name(info: dict[str, Any]) -> str:
    """A folder name, for example cpu-amd-epyc-avx512-bf16-2-threads."""
    model = re.sub(r"\((R|TM)\)|CPU|Processor|@.*|\d+-Core", " ", info["processor"], flags=re.IGNORECASE)
    if info["device"] == "cuda":
        return _slug(model)
    return _slug(f"cpu {model} {info['instruction_set']} {info['threads']} threads")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def results_folder(arguments: argparse.Namespace, info: dict[str, Any]) -> Path:
    """Where this run's results go; partial runs never overwrite complete results."""
    partial = arguments.quick or getattr(arguments, "only", None)
    folder = BENCHMARKS / "results" / ("partial" if partial else "") / machine_name(info)
    folder = arguments.out or folder
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save(folder: Path, name: str, content: dict[str, Any], markdown: str) -> None:
    """Write name.json and name.md."""
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown + "\n")
    print(f"\nwrote {name}.json and {name}.md to {folder}")


def heading(title: str, info: dict[str, Any]) -> str:
    """The first lines of every Markdown report."""
    where = f"{info['processor']}, {info['threads']} CPU threads, {info['instruction_set']}"
    versions = f"torch {info['torch']}, flash-attn {info['flash_attn']}, commit {info['commit']}, {info['date']}"
    return f"# {title}\n\n{where}  \n{versions}\n"
