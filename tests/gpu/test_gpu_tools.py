"""What other programs say: compute-sanitizer of the kernels, and the tests of the primitives compiled by nvcc."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from build_tools import cuda_archs, cuda_objects
from device import needs_gpu

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PRIMITIVES = ROOT / "tests" / "sim" / "primitives"


def find_sanitizer() -> str | None:
    """compute-sanitizer, wherever it comes from: PATH, the toolkit, a package."""
    home = cuda_objects.cuda_home()
    folders = [os.environ.get("PATH", ""), *(str(Path(p) / "nvidia" / "cu13" / "bin") for p in sys.path)]
    if home is not None:
        folders += [str(home / "bin"), str(home / "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


@needs_gpu
@pytest.mark.parametrize(("tool", "cases"), [("memcheck", "30"), ("racecheck", "8"), ("synccheck", "8")])
def test_compute_sanitizer(tool, cases):
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("there is no compute-sanitizer")
    # Every tensor in an allocation of its own, so that the first byte beside it is noticed.
    path = os.pathsep.join([str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    # Kernels of torch are not what is looked at.
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kernel_substring=flash_attn"]
    command += ["--padding", "256"] if tool == "memcheck" else []
    command += ["--print-limit", "20", sys.executable, str(HERE / "sanitized.py"), cases]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    text = done.stdout + done.stderr
    if "Device not supported" in text:
        pytest.skip(f"compute-sanitizer does not support {torch.cuda.get_device_name()}")
    assert done.returncode == 0, text[-4000:]
    assert "ran " in done.stdout
    assert "ERROR SUMMARY: 0 errors" in text or "RACECHECK SUMMARY: 0 hazards" in text, text[-2000:]


@needs_gpu
def test_primitives(tmp_path):
    """The assumptions of the simulator about single instructions hold on the device."""
    home = cuda_objects.cuda_home()
    if home is None:
        pytest.skip("there is no nvcc")
    major, minor = torch.cuda.get_device_capability()
    flags = cuda_archs.gencode_flags([cuda_archs.Arch(major, minor).machine_code])
    program = tmp_path / "primitives"
    command = [cuda_objects.nvcc_of(home), "-x", "cu", "-std=c++20", "-O1", *flags, f"-I{ROOT / 'csrc'}"]
    sources = sorted(map(str, PRIMITIVES.glob("*.cpp")))
    subprocess.run([*command, *sources, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, check=False)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert done.returncode == 0, "\n".join([*failed, done.stderr])
    assert done.stdout.count("\nok") > 10
