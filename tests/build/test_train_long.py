"""Training on sequences that are cut over processes, and the page about it, run as shown."""

import importlib
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from paths import ROOT
from test_examples import check_picture, python_blocks

PAGE = ROOT / "docs" / "context_parallel.md"


def torchrun(num_ranks, *command):
    """The output of a program in several processes on this machine's CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    result = subprocess.run(
        [*launcher, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


RUNS = [
    pytest.param(2, "ring", "zigzag"),
    pytest.param(4, "ring", "contiguous", marks=pytest.mark.whole),
    pytest.param(3, "all_gather", "zigzag", marks=pytest.mark.whole),
    pytest.param(2, "ulysses", "zigzag", marks=pytest.mark.whole),
]


@pytest.mark.parametrize(("num_ranks", "method", "layout"), RUNS)
def test_ranks_train_as_one_process_does(num_ranks, method, layout, tmp_path):
    """A small form, with a length that no number of ranks divides into pieces of 32."""
    options = ["--quick", "--compare", f"--method={method}", f"--layout={layout}", f"--out={tmp_path}"]
    output = torchrun(num_ranks, "examples/train_long.py", *options)
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| [\d.e+-]+ \|$", output, re.M)
    assert [int(step) for step, *_ in rows] == [0, 1, 2]
    assert all(abs(float(ours) - float(alone)) <= 1e-4 for _, ours, alone in rows), rows
    assert float(rows[-1][1]) < float(rows[0][1]) - 0.3, "it learns"
    assert "Loss: the same" in output
    found = json.loads((tmp_path / f"long-{num_ranks}.json").read_text())
    assert [f"{loss:.6f}" for loss in found["losses"]] == [ours for _, ours, _ in rows]
    assert len(found["peak_megabytes"]) == num_ranks
    check_picture(tmp_path / "context_parallel_memory.png")


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.whole)])
def test_blocks_of_the_page_run_on_ranks(num_ranks, tmp_path):
    """Here, as in test_examples.py without torchrun, what the page asserts is asserted.

    The program leaves without an interpreter's farewell: a thread of gloo that frees a tensor then aborts (torch 2.11).
    """
    blocks = [code for _, code in python_blocks(PAGE)]
    assert sum(code.count("assert ") for code in blocks) >= 4
    program = tmp_path / "page.py"
    program.write_text("\n".join([*blocks, 'print("ended", flush=True)', "import os", "os._exit(0)"]))
    assert torchrun(num_ranks, str(program)).count("ended") == num_ranks


def test_commands_of_the_page_exist():
    text = PAGE.read_text()
    for path in set(re.findall(r"(?:examples|benchmarks)/[\w/]+\.py", text)):
        assert (ROOT / path).is_file(), path


@pytest.fixture
def train_long(monkeypatch):
    for name in ("matplotlib", "tqdm"):
        pytest.importorskip(name)
    threads = torch.get_num_threads()
    yield importlib.import_module("train_long")
    torch.set_num_threads(threads)


def run_of(module, losses):
    return module.Run(losses=losses, seconds=[1.0] * len(losses), peak_bytes=1)


@pytest.mark.parametrize(("alone", "status"), [([5.0, 4.00005], 0), ([5.0, 4.0002], 1), ([5.0, math.nan], 1)])
def test_exit_status_tells_of_a_difference(train_long, alone, status, tmp_path, monkeypatch, capsys):
    """In one process, without torchrun."""
    runs = {True: run_of(train_long, alone), False: run_of(train_long, [5.0, 4.0])}
    monkeypatch.setattr(train_long, "train", lambda *arguments: runs[arguments[-1] is None])
    monkeypatch.setattr(sys, "argv", ["train_long.py", "--compare", "--device=cpu", f"--out={tmp_path}"])
    assert train_long.main() == status
    assert ("NOT the same" in capsys.readouterr().out) == bool(status)


def test_the_figure_shows_runs_of_the_same_settings(train_long, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(train_long, "plot_memory", lambda peaks, *_: shown.append(sorted(peaks, key=len)))
    same, other = {"context": 10, "method": "ring"}, {"context": 20, "method": "ring"}
    for settings, peaks in ((same, [8.0]), (other, [9.0, 9.0, 9.0]), (same, [4.0, 5.0])):
        train_long.save({"settings": settings, "peak_megabytes": peaks}, tmp_path)
    assert shown == [[[8.0]], [[9.0, 9.0, 9.0]], [[8.0], [4.0, 5.0]]]
