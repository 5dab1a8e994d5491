"""Runs on a GPU as make gpu-test makes them: what hangs or crashes costs one test, and the next run goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import resume
from paths import ROOT, environment

# Tests that do what their names say.
TESTS = """
import os, sys, time, types
def test_a(): pass
def test_b_fails(): assert False, "why"
def test_c_hangs():
    if os.fork() == 0:
        time.sleep(3)
        os._exit(0)
    time.sleep(100)
def test_d(): pass
def test_e_crashes(): os.abort()
def test_f_loses_the_device():
    sys.modules["device"] = types.SimpleNamespace(is_lost=lambda: True)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_g(): __import__("pytest").skip("a reason")
def test_h(): pass
"""
SLOW = "import time\n" + "".join(f"def test_{i}(): time.sleep(0.2)\n" for i in range(20))
NAMES = ("a", "b_fails", "c_hangs", "d", "e_crashes", "f_loses_the_device", "g", "h")


def run(folder: Path, *arguments: str, tests: str = TESTS, **variables: str) -> subprocess.CompletedProcess:
    """pytest in a process of its own, over toy tests, with the options of make gpu-test."""
    (folder / "toys").mkdir(exist_ok=True)
    (folder / "toys" / "test_toys.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "resume",
        "-p",
        "no:cacheprovider",
        f"--resume={folder / 'results'}",
    ]
    command += ["-n", "2", "--max-worker-restart=9", "--timeout=2", "--timeout-method=thread", *arguments, "toys"]
    env = environment(**variables)
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, timeout=100, check=False)


def lines(folder: Path) -> list[dict]:
    text = (folder / "results" / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in text if line]


def outcomes(folder: Path) -> dict[str, str]:
    return {each["test"].rpartition("test_")[2]: each["outcome"] for each in lines(folder)}


def test_what_hangs_or_crashes_costs_one_test(tmp_path):
    """It is recorded, and the rest runs. The next run leaves out what has passed, or crashed twice."""
    done = run(tmp_path)
    expected = dict.fromkeys(NAMES, "passed") | {"b_fails": "failed", "g": "skipped"}
    expected |= dict.fromkeys(("c_hangs", "e_crashes", "f_loses_the_device"), "crashed")
    assert outcomes(tmp_path) == expected, done.stdout + done.stderr
    assert done.returncode == 1
    assert len(lines(tmp_path)) == len(NAMES)
    assert "why" in next(each["text"] for each in lines(tmp_path) if each["outcome"] == "failed")

    with (tmp_path / "results" / "results.jsonl").open("a") as file:
        file.write('{"test": "toys/test_toys.py::test_a", "outc')  # half a line
    done = run(tmp_path, tests=TESTS + "def test_i(): pass\n")
    new = [each["test"].rpartition("test_")[2] for each in lines_until_cut(tmp_path)[len(NAMES) :]]
    crashes = ["c_hangs", "e_crashes", "f_loses_the_device"]
    assert sorted(new) == sorted(["b_fails", "g", "i", *crashes]), done.stdout
    third = run(tmp_path, tests=TESTS + "def test_i(): pass\n")
    new = [each["test"].rpartition("test_")[2] for each in lines_until_cut(tmp_path)[len(NAMES) + len(new) :]]
    assert sorted(new) == ["b_fails", "g"], third.stdout


def lines_until_cut(folder: Path) -> list[str]:
    text = (folder / "results" / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in text if line.endswith("}")]


def test_nothing_starts_when_the_time_is_over(tmp_path):
    done = run(tmp_path, "--stop-after=1", tests=SLOW)
    assert 1 <= len(lines(tmp_path)) < 20
    assert "the time is over; run again to go on" in done.stdout
    assert done.returncode != 0
    again = run(tmp_path, tests=SLOW)
    assert again.returncode == 0
    assert len(outcomes(tmp_path)) == len(lines(tmp_path)) == 20


def test_processes_that_end_before_any_test_are_not_started_for_ever(tmp_path):
    """As without a GPU: the time is looked at whenever one ends."""
    (tmp_path / "conftest.py").write_text("import os\ndef pytest_collection(session):\n"
        "    if hasattr(session.config, 'workerinput'): os._exit(1)\n")  # fmt: skip
    done = run(tmp_path, "--stop-after=1", "--max-worker-restart=1000", tests=SLOW)
    assert done.returncode != 0
    assert lines(tmp_path) == []


def test_sources_torch_and_device_make_the_fingerprint(tmp_path, monkeypatch):
    one = resume.fingerprint()
    assert resume.fingerprint() == one
    monkeypatch.setattr(resume, "version", lambda package: "9.9")
    assert resume.fingerprint() != one
    monkeypatch.undo()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "problem.h").write_text("int x;\n")
    monkeypatch.setattr(resume, "ROOT", tmp_path)
    other = resume.fingerprint()
    (tmp_path / "csrc" / "problem.h").write_text("int y;\n")
    assert len({one, other, resume.fingerprint()}) == 3


def test_other_code_starts_anew(tmp_path):
    passing = "def test_a(): pass\n"
    assert run(tmp_path, tests=passing).returncode == 0
    path = tmp_path / "results" / "results.jsonl"
    path.write_text(path.read_text().replace(lines(tmp_path)[0]["code"], "other"))
    assert run(tmp_path, tests=passing).returncode == 0
    assert len(lines(tmp_path)) == 2


def test_without_a_gpu_there_is_one_line():
    command = [sys.executable, "-m", "pytest", "-q", "--device=cuda", "tests/attention/test_first.py"]
    env = environment(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=100, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert done.returncode == 1, said
    assert len(said) == 1, said
    assert ": no CUDA device: torch " in said[0]
    assert os.environ["FLASH_ATTN_TEST_DEVICE"] in ("cpu", "cuda")
