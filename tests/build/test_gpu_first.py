"""What a GPU is asked first, as far as it can be tried without one: build_tools/gpu_first.py and what it runs."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from build_tools import gpu_first
from build_tools.gpu_first import FAILED, KILLED, NO_TIME, PASSED, UNFINISHED, Step
from harness.cases import cases_for

ROOT = Path(__file__).resolve().parents[2]
# Starts a process that outlives it unless the session is killed, and does not react to being asked.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    open(sys.argv[1], "w").write(str(os.getpid()))
print("is here", flush=True)
time.sleep(100)
"""


def python(code: str, *arguments: str, **more) -> Step:
    return Step("a step", [sys.executable, "-c", code, *arguments], 10, **more)


@pytest.mark.parametrize(
    ("code", "outcome"),
    [("print(1)", PASSED), ("exit(1)", FAILED), ("exit(2)", FAILED), ("import os; os.abort()", FAILED)],
)
def test_what_becomes_of_a_step(code, outcome, tmp_path):
    assert gpu_first.run(python(code), tmp_path, 20).outcome == outcome


def test_tests_that_run_out_of_time_have_not_failed(tmp_path):
    assert gpu_first.run(python("exit(2)", "pytest"), tmp_path, 20).outcome == UNFINISHED


def test_a_step_that_hangs_is_killed_with_all_that_it_has_started(tmp_path):
    started = time.monotonic()
    done = gpu_first.run(python(STUBBORN, str(tmp_path / "child")), tmp_path, 2)
    assert done.outcome == KILLED
    assert time.monotonic() - started < 10
    assert (tmp_path / "a-step.txt").read_text() == done.text
    assert set(done.text.splitlines()) == {"is here"}
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rpartition(") ")[2].startswith("Z"):
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} is still there")


def test_a_command_that_is_not_there(tmp_path):
    done = gpu_first.run(Step("a step", [str(tmp_path / "nothing")], 10), tmp_path, 5)
    assert done.outcome == FAILED
    assert "No such file" in done.text


def test_a_page_has_the_last_of_the_lines_that_matter(tmp_path):
    code = "print('noise'); [print('case', i, 'fails') for i in range(30)]; exit(1)"
    page = gpu_first.run(python(code, shows="^case"), tmp_path, 20).page().splitlines()
    assert page[0].startswith("a step: failed, ")
    assert [line.split()[1] for line in page[1:]] == [str(i) for i in range(18, 30)]


def test_what_is_left_goes_to_the_step_that_takes_all_but_its_reserve(tmp_path, monkeypatch):
    given = "import os; print(os.environ['LIMIT'])"
    chosen = [python(given), python(given, reserve=20), python("import time; time.sleep(6)"), python(given)]
    chosen[1] = Step("rest", chosen[1].command, 1000, reserve=20)
    monkeypatch.setattr(gpu_first, "steps", lambda folder, device: chosen)
    done = gpu_first.run_all(tmp_path, "cpu", time.time() + 64, 1.0)
    assert [each.outcome for each in done] == [PASSED] * 4
    assert int(done[0].text) == 2  # of ten seconds
    assert 30 <= int(done[1].text) <= 36
    done = gpu_first.run_all(tmp_path, "cpu", time.time() + 3.5, 1.0)
    assert [each.outcome for each in done] == [PASSED, NO_TIME, KILLED, NO_TIME]
    lines = [json.loads(line) for line in (tmp_path / "gpu-first.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines][-3:] == [NO_TIME, KILLED, NO_TIME]
    assert "rest: no time, 0 s" in (tmp_path / "summary.txt").read_text()


def rehearse(folder: Path, limit: int) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    more = {"PYTHONPATH": path, "RESULTS": str(folder), "LIMIT": str(limit), "CUDA_VISIBLE_DEVICES": "", "JOBS": "2"}
    command = [sys.executable, "-m", "build_tools.gpu_first", "--rehearse"]
    return subprocess.run(
        command, env={**os.environ, **more}, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )


def test_rehearsal(tmp_path):
    """Every step says something, and all of them together keep to the time."""
    started = time.monotonic()
    done = rehearse(tmp_path, 30)
    assert time.monotonic() - started < 30 + 10, done.stdout
    names = [step.name for step in gpu_first.steps(tmp_path, "cpu")]
    assert len(names) == 13
    lines = [json.loads(line) for line in (tmp_path / "gpu-first.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == names
    page = (tmp_path / "summary.txt").read_text()
    assert all(f"{name}: " in page for name in names)


def test_without_a_gpu_one_line_says_so():
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "build_tools.gpu_facts"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "no CUDA device" in line]
    assert len(lines) == 1, done.stdout + done.stderr


def test_object_files_that_are_packed_are_found_again(tmp_path, monkeypatch):
    """The tests of single instructions, too: they are compiled only if something has changed."""
    binary = tmp_path / "test_primitives"
    monkeypatch.setattr(gpu_first, "PRIMITIVES", binary)
    facts = {"nvcc": "13.0"}
    monkeypatch.setattr(gpu_first, "primitives_facts", lambda: facts)
    binary.write_text("binary")
    gpu_first.prebuilt.note(tmp_path, facts)
    gpu_first.compile_primitives()
    assert binary.read_text() == "binary"


@pytest.mark.parametrize(("device", "rows"), [("cuda", 18), ("cpu", 2)])
def test_the_telling_rows_are_among_those_of_the_benchmark(device, rows):
    cases = cases_for(device, quick=device == "cpu")
    assert sum(bool(re.search(gpu_first.TELLING[device], case.name)) for case in cases) >= rows
