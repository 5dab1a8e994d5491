"""examples/ladder: every rung computes attention, moves what its README says, and breaks as its exercises say."""

import functools
import re
import shutil
import subprocess

import pytest

from paths import ROOT
from simulator_folder import simulator_folder

LADDER = ROOT / "examples" / "ladder"
COLUMNS = ("error", "read", "written", "shared", "barriers", "mma")
# Exit codes of the simulator and of ThreadSanitizer.
DEADLOCK, RACE = 4, 66

pytestmark = pytest.mark.xdist_group("simulator")  # not all versions of xdist keep to it: hence simulator_folder


def climb(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the Makefile of the ladder."""
    command = ["make", "-f", "examples/ladder/Makefile", *arguments]
    with simulator_folder():
        return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows_of(table: str) -> dict[str, dict[str, float]]:
    """The rungs of a table by their names; the numbers of each by their columns."""
    lines = re.findall(r"^(\d [a-z ]+?) +([\d.]+(?: +\d+){5})$", table, re.M)
    return {name: dict(zip(COLUMNS, map(float, numbers.split()), strict=True)) for name, numbers in lines}


@pytest.fixture(scope="module")
def table() -> str:
    done = climb()
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_rung_is_attention(table):
    rows = rows_of(table)
    assert [name[0] for name in rows] == list("123456")
    # Half a unit in the last place of bf16, and from rung 4 on weights in bf16 too.
    assert all(row["error"] < 0.0025 for row in rows.values()), rows


def test_each_rung_saves_what_it_is_there_for(table):
    naive, online, shared, tensor, double, causal = rows_of(table).values()
    assert online["written"] < naive["written"] / 10
    assert online["read"] < naive["read"]
    assert shared["read"] < online["read"] / 50
    assert tensor["read"] == shared["read"]
    assert tensor["shared"] < shared["shared"] / 10
    assert double["read"] == tensor["read"]
    assert double["barriers"] == tensor["barriers"] / 2
    left = 36 / 64  # tiles on and below the diagonal
    assert causal["mma"] == double["mma"] * left
    assert causal["barriers"] == double["barriers"] * left
    assert causal["read"] < double["read"] * 0.6


def test_readme_shows_the_table(table):
    """All but the errors, whose last digits depend on the compiler."""
    counts = [
        {name: {**row, "error": None} for name, row in rows_of(text).items()}
        for text in (table, (LADDER / "README.md").read_text())
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("landing", ["early", "late"])
def test_any_schedule_will_do(table, landing):
    done = climb(f"ARGS=7 {landing}")
    assert done.returncode == 0, done.stdout
    assert done.stdout == table


whole = functools.partial(pytest.param, marks=pytest.mark.whole)  # what takes longest, or is shown by another one
FIRST_SYNC = "        ptx::sync_threads();  // the tiles are there\n"
LOAD = "        if (n + 1 < tiles) load_keys(n + 1);\n"
WAIT = "        ptx::cp_async_wait<0>();\n"


@pytest.mark.parametrize(
    ("rung", "edits", "arguments", "says"),
    [
        whole("1_naive", {"load(scores + key) - row_max": "load(scores + key)"}, [], None),
        whole("2_online_softmax", {"out[i] * rescale_factor": "out[i]"}, [], "this is not attention"),
        ("3_shared_tiles", {FIRST_SYNC: ""}, [], "nan"),
        (
            "3_shared_tiles",
            {FIRST_SYNC: "        if (thread < 32) ptx::sync_threads();\n"},
            [],
            f"32 lanes in bar.sync or bar.arrive: barrier 0, 32 of 64 threads arrived|Error {DEADLOCK}",
        ),
        whole("4_tensor_cores", {WAIT: ""}, ["ARGS=1 early"], None),
        ("4_tensor_cores", {WAIT: ""}, ["ARGS=1 late"], "Error"),
        whole("5_double_buffering", {LOAD: "", WAIT: LOAD + WAIT}, ["FLAVOUR=tsan"], f"data race|Error {RACE}"),
        ("6_causal_tiles", {"if (!a.mask.is_full_block": "if (false && !a.mask.is_full_block"}, [], "not attention"),
    ],
)
def test_exercises_end_as_the_readme_says(tmp_path, rung, edits, arguments, says):
    """A copy of the ladder with the edits of an exercise. says: parts of what is printed, or None where all is well."""
    copy = tmp_path / "ladder"
    shutil.copytree(LADDER, copy)
    source = copy / f"{rung}.cu"
    text = source.read_text()
    for before, after in edits.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    source.write_text(text)
    done = climb(f"LADDER={copy}", f"LADDER_BUILD={copy}/build", rung[0], *arguments)
    assert (done.returncode == 0) == (says is None), done.stdout
    for part in says.split("|") if says else ():
        assert part in done.stdout
