"""The device that the examples run on."""

from __future__ import annotations

import torch

import flash_attn


def choose_device(wanted: str) -> torch.device:
    """A GPU if there is one and this build of flash_attn has CUDA kernels; otherwise the CPU."""
    has_kernels = bool(flash_attn.build_info()["cuda_archs"])
    usable = torch.cuda.is_available() and has_kernels
    if wanted == "cuda" and not usable:
        reason = "flash_attn was built without CUDA kernels" if torch.cuda.is_available() else "torch sees no GPU"
        raise SystemExit(f"--device cuda: {reason}")
    return torch.device("cuda" if usable and wanted != "cpu" else "cpu")


def describe_machine(device: torch.device) -> str:
    """The device and precision of the demo."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, bfloat16"
    instruction_set = flash_attn.build_info()["cpu_instruction_set"]
    return f"CPU, {instruction_set}, {torch.get_num_threads()} threads, float32"
