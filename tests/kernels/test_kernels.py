"""The CUDA kernels, executed on the simulator: compiled with g++, run on the processor (tests/kernels/README.md).

By default a sample of the cases runs; a failure names its seed. `--whole` runs all of them, and repeats some under
AddressSanitizer, UBSan and ThreadSanitizer. No test takes more than 40 s on two idle cores.
"""

import os
import re
import subprocess

import pytest

import list_cases
import sampling
import shards
import variants
from mutation import mutants, mutations
from mutation.equivalent import EQUIVALENT
from paths import ROOT
from simulator_folder import simulator_folder

RUN_CASE = ROOT / "build/sim/plain/run_case"
KERNELS = sorted(f"{path.parent.name}/{path.stem}" for path in ROOT.glob("csrc/cuda/sm*/*.cu"))
SANITIZERS = {"asan": "sanitize", "tsan": "race"}  # by flavour of the build: what runs in it
SAMPLE = 60  # cases
SHARDS, WHOLE_SHARDS = 3, 10

pytestmark = pytest.mark.xdist_group("simulator")  # not all versions of xdist keep to it: hence simulator_folder


only_whole = pytest.mark.whole  # .ci/run has them as stages of their own, race and sanitize


def pytest_generate_tests(metafunc):
    if "shard" in metafunc.fixturenames:
        count = WHOLE_SHARDS if metafunc.config.getoption("--whole") else SHARDS
        metafunc.parametrize("shard", [f"{i}/{count}" for i in range(count)])


def make(*arguments: str, makefile: str = "tests/kernels/Makefile") -> str:
    """The output of make, which must not fail."""
    jobs = len(os.sched_getaffinity(0))
    command = ["make", "-f", makefile, f"-j{jobs}", f"SIM_JOBS={jobs}", *arguments]
    with simulator_folder():
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-10000:]}"
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
    """Every instruction of csrc/cuda/ptx."""
    make("primitives-plain", makefile="simulator/Makefile")


def test_misuse():
    """What the simulator has to report, and what it must not."""
    make("misuse-plain", makefile="simulator/Makefile")


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles(kernel):
    """A test for each kernel, so that none takes long."""
    make(f"plain-{kernel}")


def test_cases(shard, request):
    """Results, bits, untouched memory and bytes moved, of cases under three schedules."""
    whole = request.config.getoption("--whole")
    make("cases", f"SHARD={shard}", *([] if whole else [f"SAMPLE={SAMPLE}", f"SEED={request.config.seed}"]))


@only_whole
@pytest.mark.parametrize("flavour", SANITIZERS)
@pytest.mark.parametrize("target", ["primitives", "misuse"])
def test_simulator_under_sanitizers(target, flavour):
    make(f"{target}-{flavour}", makefile="simulator/Makefile")


@only_whole
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("flavour", SANITIZERS)
def test_compiles_for_sanitizers(flavour, kernel):
    make(f"{flavour}-{kernel}")


@only_whole
@pytest.mark.parametrize("target", SANITIZERS.values())
def test_cases_under_sanitizers(target, shard):
    """AddressSanitizer and UBSan, with invalid lengths and tables among the cases; ThreadSanitizer."""
    make(target, f"SHARD={shard}")


@pytest.mark.parametrize("table", ["all", "race", "sanitize"])
@pytest.mark.parametrize("size", [1, 60])
def test_a_sample_has_every_kernel(table, size):
    rows = list_cases.TABLES[table]()
    sampled = sampling.sample(rows, size, seed=size)
    assert sampled == sampling.sample(rows, size, seed=size)
    assert set(sampled) <= set(rows)
    kernels = [
        {group[2:] for group in map(sampling.group_of, some) if group[1] == "reference"} for some in (rows, sampled)
    ]
    assert kernels[0] == kernels[1]
    assert len(sampled) == max(size, len(kernels[0]))


TABLES_OF_AXES = {
    "main": list_cases.AXES,
    "paged": list_cases.PAGED_AXES,
    "shards": shards.AXES,
    "variants": variants.AXES,
}


@pytest.mark.parametrize("axes", TABLES_OF_AXES.values(), ids=TABLES_OF_AXES)
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


BARRIERS = re.compile(r"sync_threads|cp_async_wait|cp_async_commit|wait_for_turn\(|pass_turn\(")


def test_mutations_are_found_in_every_kernel():
    """Every barrier, wait and commit of the sources is broken by some mutation."""
    spans = [(m.path, m.begin, m.end) for m in mutations.all_mutations()]
    for path in mutations.files():
        scan = mutations.Scan(path)
        for match in BARRIERS.finditer(scan.code):
            is_definition = scan.line_at(match.start()).lstrip().startswith(("FA_DEVICE", "template"))
            is_broken = any(path == p and begin <= match.start() < end for p, begin, end in spans)
            assert is_definition or is_broken, f"{path}: {scan.line_at(match.start())}"


def test_files_that_no_kernel_includes_have_no_mutants(run_case):
    """Their mutants would survive: policy/split.h serves the CPU alone."""
    with simulator_folder():
        laboratory = mutants.Laboratory(ROOT / "build/sim", {})
    left_out = set(mutations.all_mutations()) - set(laboratory.mutations)
    assert {mutation.path for mutation in left_out} == {"policy/split.h"}


def test_the_same_sources_have_the_same_seed():
    seed = sampling.seed_of_sources()
    assert seed == sampling.seed_of_sources()
    assert 0 <= seed < 2**31
    assert f"seed {seed}:" in make("--dry-run", "race", "SAMPLE=1")


def test_every_proof_is_of_a_mutant():
    proven = {f"{path}: {label}" for path, labels in EQUIVALENT.items() for label in labels}
    assert proven <= {mutation.name for mutation in mutations.all_mutations()}
