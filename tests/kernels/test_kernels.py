"""The CUDA kernels, executed on the simulator: compiled with g++, run on the processor (simulator/README.md)."""

import os
import subprocess

import pytest

import list_cases
from mutation import mutations
from paths import ROOT
from simulator_folder import simulator_folder

RUN_CASE = ROOT / "build/sim/plain/run_case"

pytestmark = pytest.mark.xdist_group("simulator")  # not all versions of xdist keep to it: hence simulator_folder


def make(target: str) -> str:
    """The output of a target of tests/kernels/Makefile, which must not fail."""
    jobs = len(os.sched_getaffinity(0))
    command = ["make", "-f", "tests/kernels/Makefile", f"-j{jobs}", f"SIM_JOBS={jobs}", target]
    with simulator_folder():
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-10000:]
    return done.stdout


@pytest.fixture(scope="session")
def run_case():
    """Runs cases; returns the exit code and what was printed."""
    make(str(RUN_CASE.relative_to(ROOT)))

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([RUN_CASE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.returncode, done.stdout

    return run


def test_primitives():
    """Every instruction of csrc/ptx, plainly and under sanitizers."""
    make("primitives")


def test_cases():
    """Numbers, bits, untouched memory and bytes moved, for every case under three schedules."""
    make("cases")


def test_sanitized_cases():
    """AddressSanitizer and UBSan, with invalid lengths and tables among the cases."""
    make("sanitize")


@pytest.mark.parametrize("axes", [list_cases.AXES, list_cases.PAGED_AXES], ids=["main", "paged"])
def test_table_has_every_pair_of_values(axes):
    values, pairs = (part.split(" of ") for part in list_cases.coverage(axes).split(", ")[1:])
    assert values[0] == values[1].split()[0]
    assert pairs[0] == pairs[1].split()[0]


def test_every_case_has_a_line_of_its_own():
    lines = [list_cases.line_of(row) for row in list_cases.TABLES["all"]()]
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("line", ["seqlens_q=3", "seqlens_q=3 seqlens_k=4 head_dims=3", "seqlens_q=3 seqlens_k=x"])
def test_lines_that_are_not_understood(run_case, line):
    code, output = run_case(line)
    assert code == 2
    assert "not understood" in output


def test_head_dims_that_no_kernel_takes_are_refused(run_case):
    code, output = run_case("seqlens_q=3 seqlens_k=4 head_dim=257")
    assert code == 1
    assert "head_dim is 257, more than 256" in output


def test_a_replayed_case_prints_its_errors(run_case):
    code, output = run_case("--seed", "7", "--landing", "late", "seqlens_q=65 seqlens_k=70 causal=1 lse_grad=1")
    assert code == 0
    for name in ("out", "softmax_lse", "dq", "dk", "dv", "dsoftmax_sum", "attn_probs"):
        assert f"{name}: error" in output


def test_mutations_are_found_in_every_kernel():
    """Every barrier, wait and commit of the sources is broken by some mutation."""
    broken = {(m.path, m.line) for m in mutations.all_mutations()}
    for path in mutations.files():
        for number, line in enumerate(mutations.Scan(path).code.splitlines(), 1):
            if any(
                word in line
                for word in ("sync_threads", "cp_async_wait", "cp_async_commit", "wait_for_turn(", "pass_turn(")
            ):
                is_definition = line.lstrip().startswith(("FA_DEVICE", "template"))
                assert is_definition or (path, number) in broken, f"{path}:{number}"
