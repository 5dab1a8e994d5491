"""The benchmark, and as much of what is for GPUs as can be tried without one: the same cases, made small."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
from harness.cases import SWEEP, cases_for
from harness.compare import differences, distance
from harness.failures import result_or_reason
from harness.measure import PROVIDERS, measure
from harness.monitor import Monitor
from harness.ours import other_build
from harness.provider import OURS, Provider, make_problem
from harness.results import Results, join
from harness.timing import Timed, time_interleaved
from paths import ROOT, environment

ONLY = "varlen|softcap|bf16.*(d256|n1x)"
QUICK = ["--device=cpu", "--quick", "--budget=0.01", f"--only={ONLY}"]
BY_NAME = {provider.name: provider for provider in PROVIDERS}
FLEX = BY_NAME["torch flex"]
ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the benchmark in this process, on a few small cases, and returns its exit status."""
    monkeypatch.setenv("RESULTS", str(tmp_path))
    for name in ("LIMIT", "COMMIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(bench.plots, "draw", lambda *_: [])
    return lambda *more: bench.main([*QUICK, *more])


def table(folder):
    return (folder / "quick-attention.md").read_text()


def content(folder):
    return json.loads((folder / "quick-attention.json").read_text())


# Runs.


def test_a_run_of_the_script(tmp_path):
    """As make bench calls it, with figures."""
    env = environment(CUDA_VISIBLE_DEVICES="", RESULTS=str(tmp_path), COMMIT="0123456789ab")
    command = [sys.executable, "benchmarks/bench.py", *QUICK, "--passes=forward,backward,both"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=250, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = content(tmp_path)
    rows = list(found["rows"].values())
    assert {row["case"]["group"] for row in rows} == {"dense", "varlen", "softcap", "decode"}
    assert all(row["problems"] == [] for row in rows)
    assert found["machine"]["commit"] == "0123456789ab"
    dense = next(row for row in rows if row["case"]["group"] == "dense")
    assert dense["reference"] == "torch math"
    assert set(dense["passes"]) == {"forward", "backward", "both"}
    milliseconds = {which: set(measured["milliseconds"]) for which, measured in dense["passes"].items()}
    assert {"ours", "torch math"} <= milliseconds["forward"]
    assert "ours, deterministic" in milliseconds["backward"] - milliseconds["forward"] - milliseconds["both"]
    assert "| bf16 full " in table(tmp_path)
    assert "Ours: the CPU backend" in table(tmp_path)
    assert "commit 0123456789ab" in table(tmp_path)
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {f"quick-{name}.png" for name in ["speedups", *(f"throughput-{x}" for x in bench.PASSES)]}


@pytest.mark.parametrize("what", ["memory", "overhead"])
def test_the_other_measurements(what, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESULTS", str(tmp_path))
    monkeypatch.setattr(bench.memory, "MEASURED", {OURS: "black"})
    monkeypatch.setattr(bench.memory, "QUICK_SEQLENS", (1024, 2048))
    assert bench.main([what, "--device=cpu", "--quick", "--budget=0.001", "--threads=1"]) == 0
    assert json.loads((tmp_path / f"quick-{what}.json").read_text())["machine"]["threads"] == 1
    shown = {"memory": "linear.", "overhead": "| b1 n1 h1 d64 fp32 forward, no gradients |"}
    assert shown[what] in (tmp_path / f"quick-{what}.md").read_text()
    assert shown[what] in capsys.readouterr().out


def test_a_run_that_is_cut_off_leaves_tables(run, tmp_path, monkeypatch):
    times = iter([0, 0, 0])
    monkeypatch.setenv("LIMIT", "1")
    monkeypatch.setattr(bench, "monotonic", lambda: next(times, 2))
    assert run() == 1
    found = content(tmp_path)
    assert (len(found["rows"]), found["left"] > 20) == (2, True)
    assert "**Not complete" in table(tmp_path)
    monkeypatch.delenv("LIMIT")
    first = next(iter(found["rows"].values()))
    assert run() == 0
    rows = content(tmp_path)["rows"]
    assert len(rows) > 2
    assert first in rows.values()
    assert run("--again") == 0
    assert first not in content(tmp_path)["rows"].values()


def test_without_time_there_is_a_report_alone(run, tmp_path, monkeypatch):
    assert run() == 0
    rows = content(tmp_path)["rows"]
    (tmp_path / "quick-attention.md").unlink()
    monkeypatch.setenv("LIMIT", "0")
    assert run() == 0
    assert content(tmp_path)["rows"] == rows
    assert "| bf16 full " in table(tmp_path)


def test_results_of_other_code_are_left_out(run, tmp_path, monkeypatch):
    assert run("--only=varlen") == 0
    before = set(content(tmp_path)["rows"])
    monkeypatch.setattr(bench, "fingerprint", lambda *_: "other code")
    assert run("--only=softcap") == 0
    assert not before & set(content(tmp_path)["rows"])


def test_two_processors_do_not_mix(run, tmp_path, monkeypatch):
    assert run() == 0
    before = content(tmp_path)
    described = bench.describe("cpu")
    monkeypatch.setattr(bench, "describe", lambda _: {**described, "processor": "NVIDIA H100"})
    with pytest.raises(SystemExit, match=re.escape(f"{described['processor']} and of NVIDIA H100")):
        run()
    assert content(tmp_path) == before


def fail_for(monkeypatch, error):
    """The second case raises the error."""
    count = iter(range(100))

    def failing(*arguments):
        if next(count) == 1:
            raise error
        return measure(*arguments)

    monkeypatch.setattr(bench, "measure", failing)


def test_a_case_that_fails_is_recorded_and_the_rest_runs(run, tmp_path, monkeypatch):
    fail_for(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"))
    assert run() == 1
    found = content(tmp_path)
    assert list(found["failed"].values()) == ["CUDA out of memory. Tried to allocate"]
    assert len(found["rows"]) > 2
    assert f"- {next(iter(found['failed']))}: CUDA out of memory." in table(tmp_path)
    assert run() == 0
    assert content(tmp_path)["failed"] == {}


def test_a_case_that_loses_the_device_ends_the_process(run, tmp_path, monkeypatch):
    fail_for(monkeypatch, RuntimeError(ILLEGAL))

    def refuse():
        raise RuntimeError(ILLEGAL)

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="70"):
        run()
    found = content(tmp_path)
    assert (len(found["rows"]), list(found["crashed"].values())) == (1, [ILLEGAL])
    assert run() == 1
    again = content(tmp_path)
    assert len(again["rows"]) > 2
    assert again["crashed"] == found["crashed"]
    assert f"- {next(iter(found['crashed']))}: {ILLEGAL}" in table(tmp_path)
    with pytest.raises(RuntimeError, match=f"torch flash: {ILLEGAL}"):
        result_or_reason("torch flash", refuse)


# Results.


def results_in(folder, code="code"):
    return Results(folder, {"processor": "a GPU"}, code, ["a", "b"])


def test_partial_results_never_overwrite_complete_ones(tmp_path):
    results = results_in(tmp_path)
    for job in ("a", "b"):
        results.rows[job] = {"name": job, "of": "complete"}
        results.save()
        files = {path.name for path in tmp_path.iterdir()}
        assert files == {"partial-attention.json" if job == "a" else "attention.json"}
    complete = (tmp_path / "attention.json").read_text()
    assert results_in(tmp_path).rows == results.rows
    for code in ("other", "third"):
        newer = results_in(tmp_path, code)
        assert newer.rows == {}
        newer.rows["a"] = {"name": "a", "of": code}
        newer.save()
    assert (tmp_path / "attention.json").read_text() == complete
    assert results_in(tmp_path, "third").rows == newer.rows
    assert json.loads((tmp_path / "replaced-other.json").read_text())["rows"]["a"]["of"] == "other"


def test_a_case_in_which_the_process_ended_is_not_run_again(tmp_path):
    results = results_in(tmp_path)
    results.running = "a"
    results.save()
    later = results_in(tmp_path)
    assert later.todo("ab") == ["b"]
    assert later.crashed == {"a": "the process ended during it"}
    assert results_in(tmp_path, "other code").todo("ab") == ["a", "b"]


# Cases.


def test_the_most_valuable_cases_come_first():
    jobs = bench.all_jobs(cases_for("cuda"), PROVIDERS)
    names = [job.name for job in jobs]
    assert len(names) == len(set(names))
    first = [(job.case.dtype, job.case.head_dim, job.case.seqlen_q) for job in jobs[:6:2]]
    assert first == [("bf16", 128, seqlen) for seqlen in (4096, 16384, 8192)]
    assert {(job.case.head_dim, job.case.causal) for job in jobs[:18]} == {(d, c) for d in SWEEP for c in (False, True)}
    stages = [job.stage for job in jobs]
    assert stages == sorted(stages)
    assert {job.case.group for job in jobs if job.stage == 2}.isdisjoint({"varlen", "dropout"})


def test_quick_cases_are_those_of_both_devices():
    small, large = cases_for("cpu", quick=True), [*cases_for("cpu"), *cases_for("cuda")]
    kinds = [
        {(case.group, case.dtype, case.head_dim, case.head_dim_v, case.causal) for case in cases}
        for cases in (small, large)
    ]
    assert kinds[0] == kinds[1]
    assert {case.device for case in small} == {"cpu"}
    assert {case.dtype for case in cases_for("cuda", quick=True)} == {"bf16", "fp16"}


def test_only_the_matrix_of_math_is_too_large():
    cases = {case.seqlen_q: case for case in cases_for("cuda") if case.group in ("dense", "decode")}
    math, flash = BY_NAME["torch math"], BY_NAME["torch flash"]
    assert [n for n, case in sorted(cases.items()) if math.why_not(case)] == [8192, 16384]
    assert not any(flash.why_not(case) for case in cases.values())


# Providers.


def dense_case(**changes):
    case = next(case for case in cases_for("cpu", quick=True) if case.dtype == "bf16")
    return replace(case, causal=True, **changes)


def measured(case, stage, providers, passes):
    return measure(case, stage, providers, passes, 0.0, Monitor("cpu"))


def test_a_provider_that_cannot_is_absent_with_a_reason():
    def refuse(problem):
        call = BY_NAME["torch math"].make_call(problem)

        def fail():
            raise NotImplementedError("x" * 300 + "\nsecond line")

        return replace(call, forward=fail, name="")

    odd = [Provider("torch odd", refuse), Provider("torch huge", refuse, why_not=lambda case: "huge")]
    odd.append(Provider("torch none", lambda problem: {}["no such key"]))
    row = measured(dense_case(), 1, (*PROVIDERS, *odd), ("forward",))
    assert row["absent"] == {"torch odd": "x" * 200, "torch huge": "huge", "torch none": "'no such key'"}
    with pytest.raises(RuntimeError, match="ours: x"):
        measured(dense_case(), 1, (replace(odd[0], name=OURS), *PROVIDERS[1:]), ("forward",))


def test_the_second_stage_is_flex_and_ours():
    flex = replace(FLEX, make_call=BY_NAME[OURS].make_call, devices=("cpu",))
    providers = [flex if each is FLEX else each for each in PROVIDERS]
    first, second = (measured(dense_case(), stage, providers, ("forward", "backward")) for stage in (1, 2))
    assert not any(FLEX.name in each["milliseconds"] for each in first["passes"].values())
    assert {frozenset(each["milliseconds"]) for each in second["passes"].values()} == {frozenset({OURS, FLEX.name})}
    assert second["reference"] == FLEX.name
    joined = join(first, second)
    assert joined["passes"]["backward"]["ratios"].keys() > {"torch math", "ours, deterministic", FLEX.name}


def test_torch_says_in_a_warning_why_it_cannot():
    flash = BY_NAME["torch flash"].build(make_problem(dense_case(head_dim_v=32)))
    result, why = result_or_reason(flash.name, flash.run)
    assert result is None
    assert "same last dimension" in why


def test_another_build_is_timed_beside_this_one(monkeypatch):
    """A library that gives the op of this build another name stands for it."""
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    library = torch.library.Library("flash_attn_twin", "DEF")
    op = torch.ops.flash_attn.fwd.default
    library.define("fwd" + str(op._schema).removeprefix("flash_attn::fwd"))
    calls = []
    library.impl("fwd", lambda *a, **k: (calls.append(1), op(*a, **k))[1], "CompositeImplicitAutograd")
    twin = other_build("twin", Path("twin.so"))
    small = {case.group: case for case in cases_for("cpu", quick=True)}
    for group in ("gqa", "window", "alibi", "softcap", "varlen", "head_dim_v"):
        row = measured(small[group], 1, (*PROVIDERS, twin), ("forward", "both"))
        assert row["problems"] == []
        assert all("ours, twin" in each["ratios"] for each in row["passes"].values())
    assert calls
    assert not twin.takes_part(small["dropout"], 1)


def test_arguments_that_make_no_sense_are_named(capsys):
    for argument, text in (("--build=a-b=x.so", "expected NAME=PATH"), ("--passes=sideways", "expected some of")):
        with pytest.raises(SystemExit, match="2"):
            bench.main([argument])
        assert text in capsys.readouterr().err


# Comparison and timing.


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_results_agree_but_for_a_lost_tile(dtype):
    case = dense_case(dtype=dtype, seqlen_q=512, seqlen_k=512, batch_size=1)
    problem = make_problem(case)
    right, expected = (BY_NAME[name].build(problem).run() for name in (OURS, "torch math"))
    assert set(right) == {"out", "dq", "dk", "dv"}
    assert differences(case, right, expected, "both") == []
    q, k, v = (x.detach().double() for x in problem.inputs)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * case.head_dim**-0.5
    weights = scores.masked_fill(torch.ones(512, 512).triu(1).bool(), float("-inf")).softmax(-1)
    weights[:, 0, 384:, 64:128] = 0  # keys that one tile of queries of one head does not see
    lost = torch.einsum("bhij,bjhd->bihd", weights, v).to(right["out"].dtype)
    (text,) = differences(case, {"out": lost}, expected, "ours and torch math")
    assert "out of ours and torch math differ by" in text


def test_nan_is_noticed():
    expected = torch.randn(1, 300, 2, 64)
    result = expected.clone()
    assert distance(result, expected) == 0
    result[0, 299, 1, 0] = float("nan")
    case = dense_case()
    assert differences(case, {"out": result}, {"out": expected}, "both")
    assert differences(replace(case, dropout_p=0.1), {"out": result}, {}, "ours")
    assert not differences(replace(case, dropout_p=0.1), {"out": expected}, {}, "ours")


def test_everybody_begins_a_round_in_turn():
    calls = []
    functions = {name: Timed(lambda name=name: calls.append(name), repeats=False) for name in "abc"}
    time_interleaved(functions, "cpu", 10.0, max_rounds=3)
    rounds = ["".join(calls[i : i + 3]) for i in range(6, 15, 3)]  # after two calls of each to warm up
    assert rounds == ["abc", "bca", "cab"]
