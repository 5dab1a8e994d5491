"""The tests and the benchmark for GPUs, as far as they can be tried without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))

from build_tools.shards import Shard, read_lines

ROOT = Path(__file__).resolve().parent.parent


def run(*command, **environment):
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *command]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=250, check=False)


def test_tests_for_gpus_pass_on_the_cpu(tmp_path):
    """A part of them, as make gpu-test runs them: that shows whether the tests are right. Then nothing is left."""
    settings = {"FLASH_ATTN_TEST_DEVICE": "cpu", "SHARD": "3/40", "JOBS": "2", "RESULTS": str(tmp_path)}
    command = ("-m", "build_tools.supervise", "gpu-test", sys.executable, "-m", "pytest", "-q", "tests/gpu")
    first = run(*command, **settings)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-2000:]
    again = run(*command, **settings)
    assert again.returncode == 0, again.stdout[-3000:]
    assert " 0 failed, 0 hung, 0 crashed" in again.stdout
    lines = [line for path in tmp_path.glob("gpu-test-*-of-80.jsonl") for line in read_lines(path)]
    outcomes = [line["outcome"] for line in lines if "test" in line]
    assert len(outcomes) > 25
    assert len(outcomes) == sum("started" in line for line in lines)
    assert set(outcomes) == {"passed", "skipped"}


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "build_tools.preflight", "gpu-test"),
        ("-m", "pytest", "-q", "tests/gpu"),
        ("benchmarks/bench.py", "--device=cuda"),
    ],
    ids=["preflight", "tests", "benchmark"],
)
def test_without_a_gpu_there_is_one_line(command, tmp_path):
    done = run(*command, FLASH_ATTN_TEST_DEVICE="cuda", RESULTS=str(tmp_path))
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert done.returncode == 1, lines
    assert len(lines) == 1, lines
    assert ": no CUDA device: torch " in lines[0]


# Shards.


def test_every_test_is_in_one_shard(tmp_path):
    names = [f"test_{i}" for i in range(23)]
    chosen = [name for i in range(1, 5) for name in Shard(f"{i}/4", tmp_path, "code").choose(names)]
    assert sorted(chosen) == sorted(names)


def test_a_run_goes_on_where_the_last_one_ended(tmp_path):
    first = Shard("1/1", tmp_path, "code")
    for name, outcome in [("a", "passed"), ("b", "failed"), ("c", "skipped")]:
        first.record(name, outcome, 0.5, text="why")
    with first.path.open("a") as file:
        file.write('{"test": "d", "outc')
    second = Shard("1/1", tmp_path, "code")
    assert second.choose(list("abcde")) == ["b", "d", "e"]
    second.record("b", "passed", 0.5)
    assert (second.count_of("passed"), second.count_of("failed")) == (2, 0)
    assert Shard("1/1", tmp_path, "code").choose(list("abcde")) == ["d", "e"]
    assert Shard("1/1", tmp_path, "other code").choose(list("ab")) == ["a", "b"]


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "a/b", "1/0", "-1/2"])
def test_bad_shards(text, tmp_path):
    with pytest.raises(ValueError, match="expected i/n with i from 1 to n, such as 1/3"):
        Shard(text, tmp_path, "code")
