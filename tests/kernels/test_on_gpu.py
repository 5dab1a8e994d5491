"""What other programs say: compute-sanitizer of the kernels, and the tests of the primitives compiled by nvcc."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from build_tools import cuda_archs, cuda_objects
from device import BACKENDS, needs_gpu, on_device
from paths import ROOT, environment

pytestmark = on_device

PRIMITIVES = ROOT / "simulator/primitives"


def find_sanitizer() -> str | None:
    """compute-sanitizer, wherever it comes from: PATH, the toolkit, a package."""
    home = cuda_objects.cuda_home()
    folders = [os.environ.get("PATH", ""), *(str(Path(p) / "nvidia" / "cu13" / "bin") for p in sys.path)]
    if home is not None:
        folders += [str(home / "bin"), str(home / "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run_group(command: list[str], env: dict[str, str], seconds: float) -> tuple[int, str]:
    """Exit status and output of a command. When the time is over, all that it has started is killed."""
    process = subprocess.Popen(
        command,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
        start_new_session=True,
    )
    try:
        text = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return -signal.SIGKILL, process.communicate()[0] + f"\nkilled after {seconds:.0f} s"
    except BaseException:  # an interrupt must not leave it on the GPU
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, text


# racecheck does not know that an mbarrier orders what bulk copies write to shared memory, and reports the kernels for
# Hopper falsely: Dao-AILab/flash-attention, AI/RACECHECK_TMA_HAZARD.md. The simulator looks for their races.
TOOLS = [
    (tool, cases, kernels)
    for tool, cases in (("memcheck", "20"), ("synccheck", "8"), ("racecheck", "8"))
    for kernels in BACKENDS
    if (tool, kernels) != ("racecheck", "best")
]


@pytest.fixture
def folder(request, tmp_path) -> Path:
    """Where what other programs say is kept: beside the results, if they are kept."""
    return Path(request.config.getoption("--resume") or tmp_path)


@needs_gpu
@pytest.mark.sanitizer
@pytest.mark.last
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("tool", "cases", "kernels_name"), TOOLS)
def test_compute_sanitizer(tool, cases, kernels_name, folder):
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("there is no compute-sanitizer")
    # Every tensor in an allocation of its own, so that the first byte beside it is noticed.
    env = environment(FLASH_ATTN_BACKEND=BACKENDS[kernels_name], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    # Kernels of torch are not what is looked at.
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kernel_substring=flash_attn"]
    command += ["--padding", "256"] if tool == "memcheck" else []
    command += ["--print-limit", "20", sys.executable, str(ROOT / "tests/support/sanitized.py"), cases]
    status, text = run_group(command, env, 180)
    (folder / f"sanitizer-{tool}-{kernels_name}.txt").write_text(text)
    if "Device not supported" in text:
        pytest.skip(f"compute-sanitizer does not support {torch.cuda.get_device_name()}")
    assert status == 0, text[-4000:]
    assert "\nran " in text
    assert "ERROR SUMMARY: 0 errors" in text or "RACECHECK SUMMARY: 0 hazards" in text, text[-2000:]


def test_the_calls_for_the_sanitizer(device):
    """Without it: that shows whether they are right."""
    script = str(ROOT / "tests/support/sanitized.py")
    done = subprocess.run([sys.executable, script, "8"], env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout.endswith("\nran 8 cases\n"), done.stderr[-2000:]


@needs_gpu
@pytest.mark.first
@pytest.mark.timeout(200)
def test_primitives(tmp_path, folder):
    """The assumptions of the simulator about single instructions hold on the device."""
    home = cuda_objects.cuda_home()
    if home is None:
        pytest.skip("there is no nvcc")
    major, minor = torch.cuda.get_device_capability()
    target = f"-arch={cuda_archs.Arch(major, minor).machine_code}"
    program = tmp_path / "primitives"
    command = [cuda_objects.nvcc_of(home), "--threads", "0", "-x", "cu", "-std=c++20", "-O1", target]
    command += [f"-I{ROOT / 'csrc'}"]
    sources = sorted(map(str, PRIMITIVES.glob("*.cpp")))
    subprocess.run([*command, *sources, "-o", str(program)], check=True)
    groups = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    # In processes of their own: a kernel that fails costs the rest of its group only.
    results = {group: run_group([str(program), group], dict(os.environ), 20) for group in groups}
    text = "".join(f"{group}: exit status {status}\n{output}" for group, (status, output) in results.items())
    (folder / "primitives.txt").write_text(text)
    failed = [line for line in text.splitlines() if line.startswith("FAIL")]
    bad = {group: output[-500:] for group, (status, output) in results.items() if status != 0}
    assert not bad, "\n".join([*failed, *(f"{group}: {output}" for group, output in bad.items())])
    assert text.count("\nok") > (100 if major == 9 else 20)  # those of Hopper's instructions need a Hopper
