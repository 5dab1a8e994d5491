"""Tests that hang or crash take their process down, and nothing else: build_tools/supervise.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from build_tools import shards
from build_tools.shards import Shard

ROOT = Path(__file__).resolve().parents[2]

# A runner of tests that do what their names say.
RUNNER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from build_tools.shards import CRASHED, DEVICE_LOST, Shard
names = sys.argv[1].split()
shard = Shard(os.environ["SHARD"], Path(os.environ["RESULTS"]), "code")
for name in shard.choose(names):
    print("runs", name, flush=True)
    shard.start(name, limit=1.0)
    if "hangs" in name:
        if os.fork() == 0:
            Path(os.environ["RESULTS"], "child-of-" + name).write_text(str(os.getpid()))
        time.sleep(100)
    if "crashes" in name:
        os.abort()
    if "loses" in name:
        shard.record(name, CRASHED, 0.1, text="E   CUDA error: an illegal memory access was encountered")
        os._exit(DEVICE_LOST)
    shard.record(name, "failed" if "fails" in name else "passed", 0.1)
"""


def supervise(folder: Path, names: str, code: str = RUNNER, **environment: str):
    command = [sys.executable, "-m", "build_tools.supervise", "gpu-test", sys.executable, "-c"]
    env = {**os.environ, "RESULTS": str(folder), **environment}
    return subprocess.run(
        [*command, code.format(root=str(ROOT)), names],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
        timeout=100,
        check=False,
    )


def outcomes(folder: Path) -> dict[str, str]:
    return {test: line["outcome"] for test, line in shards.results(folder, "gpu-test", "code").items()}


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # One that has ended and that nobody has waited for is none.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_hangs_or_crashes_is_recorded_and_the_rest_runs(tmp_path):
    done = supervise(tmp_path, "a b-fails c-hangs d e-crashes f-loses g")
    expected = {
        "a": "passed", "b-fails": "failed", "c-hangs": "hung", "d": "passed", "e-crashes": "crashed",
        "f-loses": "crashed", "g": "passed",
    }  # fmt: skip
    assert outcomes(tmp_path) == expected, done.stdout + done.stderr
    assert done.returncode == 1
    assert [line for line in done.stdout.splitlines() if line.startswith("runs ")] == [f"runs {n}" for n in expected]
    assert "gpu-test: 3 passed, 1 failed, 1 hung, 2 crashed, 0 skipped" in done.stdout
    assert "  crashed: f-loses: CUDA error: an illegal memory access was encountered" in done.stdout
    # What the test had started is gone too.
    assert not is_running(int((tmp_path / "child-of-c-hangs").read_text()))


def test_the_next_run_repeats_what_failed_and_leaves_out_what_hung(tmp_path):
    supervise(tmp_path, "a b-fails c-crashes")
    done = supervise(tmp_path, "a b-fails c-crashes d")
    assert [line for line in done.stdout.splitlines() if line.startswith("runs ")] == ["runs b-fails", "runs d"]


@pytest.mark.parametrize(("shard", "own"), [("1/1", "abcdefg"), ("2/3", "be")])
def test_jobs_share_the_tests(tmp_path, shard, own):
    """Each has its output in a file. A run with another number of jobs knows what is done."""
    done = supervise(tmp_path, " ".join("abcdefg"), JOBS="3", SHARD=shard)
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(tmp_path) == dict.fromkeys(own, "passed")
    output = [path.read_text().split() for path in sorted(tmp_path.glob("*.log"))]
    assert len(output) == 3
    assert sorted(word for words in output for word in words if word != "runs") == list(own)
    again = supervise(tmp_path, " ".join("abcdefg"), SHARD=shard)
    assert again.returncode == 0
    assert "runs" not in again.stdout


def test_the_limit_is_that_of_all_processes_together(tmp_path):
    """Nothing is started again when the time is over."""
    done = supervise(tmp_path, "a-hangs b", LIMIT="0")
    assert outcomes(tmp_path) == {"a-hangs": "hung"}
    assert done.returncode == 1


@pytest.mark.parametrize("code", ["import sys; sys.exit('no torch')", "import os; os.abort()"])
def test_a_command_that_does_not_begin_is_not_repeated(tmp_path, code):
    done = supervise(tmp_path, "", code, JOBS="2")
    assert done.returncode != 0
    assert done.stderr.count("no torch") == code.count("no torch") * 2


@pytest.mark.parametrize(
    ("name", "value", "message"), [("SHARD", "4/3", "SHARD=4/3: expected i/n"), ("JOBS", "x", "x")]
)
def test_wrong_settings_are_one_line(tmp_path, name, value, message):
    done = supervise(tmp_path, "a", **{name: value})
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_half_a_line_is_passed_over(tmp_path):
    shard = Shard("1/1", tmp_path, "code")
    shard.record("a", "passed", 0.1)
    with shard.path.open("a") as file:
        file.write('{"test": "b", "out')
    shard = Shard("1/1", tmp_path, "code")
    assert shard.choose(["a", "b"]) == ["b"]
    assert all(json.loads(line) for line in shard.path.read_text().splitlines())


def test_sources_and_choice_of_kernels_make_the_fingerprint(tmp_path, monkeypatch):
    one = shards.code_fingerprint("torch 2.11")
    assert shards.code_fingerprint("torch 2.11") == one
    assert shards.code_fingerprint("torch 2.12") != one
    path = tmp_path / "test.py"
    path.write_text("assert True")
    assert shards.code_fingerprint("torch 2.11", paths=[path]) != one
    monkeypatch.setenv("FLASH_ATTN_BACKEND", "sm80")
    assert shards.code_fingerprint("torch 2.11") != one
