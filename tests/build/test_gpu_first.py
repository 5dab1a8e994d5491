"""What a GPU is asked first, as far as it can be tried without one: tools/gpu_first.py and what it runs."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from paths import ROOT, environment
from tools import gpu_facts, gpu_first
from tools.gpu_first import FAILED, NO_TIME, PASSED, TIME_OVER, Step

# Starts a process that outlives it unless the group is killed, and does not react to being asked.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
if os.fork() == 0:
    open(sys.argv[1], "w").write(str(os.getpid()))
print("is here", flush=True)
time.sleep(100)
"""


def python(name: str, code: str, *arguments: str, seconds: float = 10, reserve: float = 0) -> Step:
    return Step(name, [sys.executable, "-c", code, *arguments], seconds, reserve)


@pytest.mark.parametrize(
    ("code", "outcome"), [("print(1)", PASSED), ("exit(1)", FAILED), ("import os; os.abort()", FAILED)]
)
def test_what_becomes_of_a_step(code, outcome, tmp_path):
    assert gpu_first.run(python("a step", code), tmp_path / "log", 20) == outcome


def test_a_step_that_hangs_is_killed_with_all_that_it_has_started(tmp_path):
    started = time.monotonic()
    assert gpu_first.run(python("a step", STUBBORN, str(tmp_path / "child")), tmp_path / "log", 2) == TIME_OVER
    assert time.monotonic() - started < 10
    assert set((tmp_path / "log").read_text().splitlines()) == {"is here"}
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rpartition(") ")[2].startswith("Z"):
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} is still there")


def test_tests_are_interrupted_first(tmp_path):
    """As they then say how far they have come."""
    code = "import time\ntry: time.sleep(100)\nexcept KeyboardInterrupt: print('half of them')"
    assert gpu_first.run(python("a step", code), tmp_path / "log", 2) == TIME_OVER
    assert (tmp_path / "log").read_text() == "half of them\n"


def test_a_command_that_is_not_there(tmp_path):
    assert gpu_first.run(Step("a step", [str(tmp_path / "nothing")], 10), tmp_path / "log", 5) == FAILED
    assert "No such file" in (tmp_path / "log").read_text()


def test_summary_has_the_end_of_what_every_step_printed(tmp_path):
    code = "[print('case', i) for i in range(30)]; exit(1)"
    assert not gpu_first.run_all([python("a", code), python("b", "print(2)")], tmp_path, time.time() + 20, 1.0)
    first, *lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert first.startswith("a: failed, ")
    assert [line.split()[1] for line in lines[:10]] == [str(i) for i in range(20, 30)]
    assert lines[10].startswith("b: passed, ")
    assert lines[11:] == ["    2"]
    assert (tmp_path / "a.log").read_text().startswith("case 0\n")


def test_what_is_left_goes_to_the_step_that_takes_all_but_its_reserve(tmp_path):
    hang = "import time; time.sleep(100)"
    chosen = [python("a", "print(1)"), python("rest", hang, seconds=560, reserve=10), python("b", "print(1)")]
    started = time.time()
    assert gpu_first.run_all(chosen, tmp_path, started + 13, 1.0), "that its time is over is no failure of the rest"
    assert time.time() - started < 8
    outcomes = [line.split()[1] for line in (tmp_path / "summary.txt").read_text().splitlines() if line[0] != " "]
    assert outcomes == ["passed,", "time", "passed,"]
    assert not gpu_first.run_all([python("a", hang, seconds=2)], tmp_path, time.time() + 20, 1.0)
    assert gpu_first.run_all(chosen, tmp_path, time.time(), 1.0)
    assert (tmp_path / "summary.txt").read_text().count(NO_TIME) == 3


def test_rehearsal(tmp_path):
    """Every step says something, and all of them together keep to the time."""
    more = {"RESULTS": str(tmp_path), "LIMIT": "10", "CUDA_VISIBLE_DEVICES": ""}
    started = time.monotonic()
    command = [sys.executable, "-m", "tools.gpu_first", "--rehearse"]
    subprocess.run(command, env=environment(**more), cwd=ROOT, stdout=subprocess.DEVNULL, timeout=200, check=False)
    assert time.monotonic() - started < 10 + 15
    page = (tmp_path / "summary.txt").read_text()
    assert all(f"{step.name}: " in page for step in gpu_first.steps("cpu"))


def test_steps_end_with_the_sanitizers():
    names = [step.name for step in gpu_first.steps("cuda")]
    assert len(set(names)) == len(names) >= 14
    assert [name for name in names if "primitives-" not in name][-5:] == [
        "first-cases",
        "bench-stage-1",
        "bench-stage-2",
        "tests",
        "sanitizer",
    ]


def test_facts_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_facts.main() == 0
    assert capsys.readouterr().out.count("no CUDA device") == 1
