"""`bench.py decode`: its cases, that its providers agree, that caches are cold, and what is made of the results."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
from harness import decode_report
from harness.cases import Case
from harness.decode import CASES, COLD, LARGEST, SHORT, cache_bytes, cases_for, copies, make_problem
from harness.decode_providers import PROVIDERS, other_build
from harness.measure import measure
from harness.monitor import Monitor
from harness.provider import OURS
from harness.results import Results

BY_NAME = {provider.name: provider for provider in PROVIDERS}


def case_of(group="grid", **changes):
    """A small one, four heads over two of keys."""
    shape = {"batch_size": 2, "num_heads": 4, "num_heads_k": 2, "head_dim": 16, "head_dim_v": 16}
    return replace(Case("cpu", group, "fp32", seqlen_q=1, seqlen_k=64, **shape), **changes)


# Cases.


def test_the_grid_is_whole_but_for_what_is_too_large():
    for device, count in (("cpu", 2 * 2 * 2 * 3 * 2 * 3), ("cuda", 3 * 5 * 4 * 4 * 5)):
        cases = [case for case in CASES if (case.device, case.group) == (device, "grid")]
        names = {case.name for case in CASES if case.device == device}
        assert len(names) == len([case for case in CASES if case.device == device])
        assert max(map(cache_bytes, cases)) == LARGEST[device]
        assert 0.8 * count < len(cases) < count
        assert all(case.causal == (case.seqlen_q > 1) for case in cases)
    lengths = {case.seqlen_k for case in CASES if (case.device, case.group) == ("cpu", "bandwidth")}
    assert lengths == {8192, 16384, 32768, 65536}


def test_quick_cases_are_of_all_kinds():
    for device in ("cpu", "cuda"):
        kinds = [
            {(case.group, case.dtype, case.seqlen_q, case.num_heads, case.num_heads_k, case.head_dim) for case in cases}
            for cases in (cases_for(device), cases_for(device, quick=True))
        ]
        assert kinds[0] == kinds[1]
    assert sum(map(cache_bytes, cases_for("cpu", quick=True))) < 2**26


def test_caches_are_cold_but_for_short_ones():
    for case in CASES:
        number = copies(case)
        if case.device == "cuda" or case.seqlen_k < SHORT:
            assert number == 1
        else:
            assert number * cache_bytes(case) >= COLD
            assert (number - 1) * cache_bytes(case) < COLD


def test_every_call_reads_the_next_copy(monkeypatch):
    case = case_of()
    monkeypatch.setattr("harness.decode.SHORT", 1)
    monkeypatch.setattr("harness.decode.COLD", 3 * cache_bytes(case))
    problem, read = make_problem(case), []
    assert all(torch.equal(problem.caches[0], each) for each in problem.caches), "the same numbers"
    problem.turns = (read.append(turn) or turn for turn in itertools.cycle(range(len(problem.caches))))
    names = (OURS, "torch flash", "torch flash, folded", "plain read")
    for call in [BY_NAME[name].build(problem) for name in names]:
        call.forward()
    assert read == [0, 1, 2, 0]


# Runs.


def measured(case, providers=PROVIDERS, stage=1):
    return measure(case, stage, providers, ("forward",), 0.0, Monitor("cpu"), make_problem)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("num_heads_k", [4, 2, 1])
def test_all_providers_agree(dtype, seqlen_q, num_heads_k):
    changes = {"dtype": dtype, "seqlen_q": seqlen_q, "num_heads_k": num_heads_k, "causal": seqlen_q > 1}
    row = measured(case_of("bandwidth", seqlen_k=256, head_dim=64, head_dim_v=64, **changes))
    assert (row["problems"], row["absent"], row["reference"]) == ([], {}, "torch math")
    expected = {"ours, pages of 16", "ours, pages of 256", "torch flash", "torch math", "plain read"}
    expected |= {"torch flash, folded", "torch flash, expanded"} if num_heads_k < 4 else set()
    assert set(row["passes"]["forward"]["ratios"]) == expected


def test_a_wrong_result_is_told():
    def of_other_queries(problem):
        return BY_NAME[OURS].make_call(replace(problem, q=problem.q.flip(2)))

    ours = replace(BY_NAME[OURS], make_call=of_other_queries)
    row = measured(case_of(), [ours, *PROVIDERS[1:]])
    assert any("out of ours and torch math differ by" in problem for problem in row["problems"])


def test_what_would_expand_the_heads_to_too_much_is_absent(monkeypatch):
    monkeypatch.setitem(LARGEST, "cpu", cache_bytes(case_of()))
    row = measured(case_of())
    assert set(row["absent"]) == {"torch math", "torch flash, expanded"}
    assert "expands the heads, to more than " in row["absent"]["torch math"]
    assert (row["problems"], row["reference"]) == ([], "torch flash")


def test_another_build_is_timed_beside_this_one(monkeypatch):
    """A library that gives the op of this build another name stands for it."""
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    library = torch.library.Library("flash_attn_other", "DEF")
    op = torch.ops.flash_attn.fwd_kvcache.default
    library.define("fwd_kvcache" + str(op._schema).removeprefix("flash_attn::fwd_kvcache"))
    library.impl("fwd_kvcache", op, "CPU")
    row = measured(case_of(seqlen_q=4, causal=True), (*PROVIDERS, other_build("other", Path("other.so"))))
    assert row["problems"] == []
    assert "ours, other" in row["passes"]["forward"]["ratios"]


def test_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESULTS", str(tmp_path))
    (tmp_path / "partial-attention.json").write_text("{}")
    arguments = ["decode", "--device=cpu", "--quick", "--budget=0.001", "--stage=1", "--threads=1"]
    assert bench.main([*arguments, "--only=overhead|bandwidth.*bf16"]) == 0
    found = json.loads((tmp_path / "quick-decode.json").read_text())
    assert {row["case"]["group"] for row in found["rows"].values()} == {"overhead", "bandwidth"}
    table = (tmp_path / "quick-decode.md").read_text()
    assert "| bf16 full b1 n1x128 h8 d64 |" in table
    assert "**Not complete: " in table
    shown = capsys.readouterr().out
    assert "% of plain read" in shown
    before = found["rows"]
    assert bench.main([*arguments, "--only=overhead"]) == 0
    assert json.loads((tmp_path / "quick-decode.json").read_text())["rows"] == before


def test_complete_results_leave_those_of_attention_alone(tmp_path):
    (tmp_path / "partial-attention.json").write_text("{}")
    results = Results(tmp_path, {"processor": "a GPU"}, "code", ["a", "b"], name="decode")
    files = [{"partial-attention.json", f"{prefix}decode.json"} for prefix in ("partial-", "")]
    for job, expected in zip("ab", files, strict=True):
        results.rows[job] = {"name": job}
        results.save()
        assert {path.name for path in tmp_path.iterdir()} == expected


# Text.


def row_of(peers, microseconds=10.0, **changes):
    """As it is measured: ratios to ours."""
    case = case_of(**changes)
    ratios = {"plain read": 0.5, **peers}
    measured = {"milliseconds": {OURS: microseconds / 1e3}, "ratios": ratios, "host_timed": {}}
    return {"name": case.name, "case": vars(case), "passes": {"forward": measured}, "problems": []}


def test_the_line_of_a_case_tells_bytes_per_second():
    row = row_of({"torch flash": 3.0, "torch math": 9.0, "ours, pages of 16": 1.1})
    size = 2 * 2 * 64 * 2 * 16 * 4
    line = decode_report.one_line(row)
    assert f"10.0 us {size / 10e3:6.1f} GB/s  50% of plain read 3.00x flash" in line
    assert "UNDER" not in line
    assert "0.90x flash, folded  UNDER 1" in decode_report.one_line(row_of({"torch flash, folded": 0.9}))
    assert decode_report.one_line(row_of({})).endswith("50% of plain read")


def test_means_are_of_one_group_and_type():
    rows = [row_of({"torch flash": 4.0}), row_of({"torch flash": 9.0}), row_of({"torch flash": 0.5}, dtype="bf16")]
    text = decode_report.summary([*rows, {**rows[0], "passes": {}}])
    assert "- grid fp32, 2 cases: 50% of plain read, 6.00 times the best of torch" in text
    assert "- grid bf16, 1 cases: 50% of plain read, 0.50 times the best of torch" in text
    assert "Under 1, of all cases: 1\n" in text
