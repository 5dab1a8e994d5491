"""The benchmark for GPUs, as far as it can be tried without one."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_gpu
from build_tools import shards
from harness import gpu, gpu_race, monitor, results
from harness.dense import dense_implementations
from harness.flex import FLEX
from harness.implementation import Implementation, differences, distance, results_of, why_not
from harness.timing import Provider, time_interleaved

ROOT = Path(__file__).resolve().parents[2]
ONLY = "varlen|softcap|bf16.*(d256|n1x)"
QUICK = ["--device=cpu", "--budget=0.01", f"--only={ONLY}"]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the benchmark in this process, on a few small cases, and returns its exit status."""
    monkeypatch.setenv("RESULTS", str(tmp_path))
    for name in ("SHARD", "LIMIT", "COMMIT", shards.PIPE_VARIABLE, shards.RESTART_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(bench_gpu.gpu_figures, "draw", lambda *_: [])

    def run(*more, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return bench_gpu.main([*QUICK, *more])

    return run


def table(folder):
    return (folder / "gpu.md").read_text()


def content(folder):
    return json.loads((folder / "gpu.json").read_text())


# Runs.


def test_a_run_of_the_script(tmp_path):
    """As make gpu-bench calls it, with figures."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env |= {"RESULTS": str(tmp_path), "COMMIT": "0123456789ab"}
    command = [sys.executable, "benchmarks/bench_gpu.py", *QUICK, "--both"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=250, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = content(tmp_path)
    assert {row["case"]["group"] for row in found["rows"]} == {"dense", "varlen", "softcap", "decode"}
    assert all(row["problems"] == [] for row in found["rows"])
    assert found["machine"]["commit"] == "0123456789ab"
    dense = next(row for row in found["rows"] if row["case"]["group"] == "dense")
    assert dense["reference"] == "torch math"
    assert set(dense["passes"]) == {"forward", "backward", "both"}
    milliseconds = {which: set(measured["milliseconds"]) for which, measured in dense["passes"].items()}
    assert {"ours", "torch math"} <= milliseconds["forward"]
    assert "ours, deterministic" in milliseconds["backward"] - milliseconds["forward"] - milliseconds["both"]
    assert "| bf16 full " in table(tmp_path)
    assert "Ours: the CPU backend" in table(tmp_path)
    assert "commit 0123456789ab" in table(tmp_path)


def test_a_run_that_is_cut_off_leaves_tables(bench, tmp_path, monkeypatch):
    late = iter([False, False])
    monkeypatch.setattr(shards.Clock, "is_over", lambda _: next(late, True))
    assert bench() == 1
    found = content(tmp_path)
    assert (len(found["rows"]), found["left"] > 20) == (2, True)
    assert "**Not complete" in table(tmp_path)
    monkeypatch.setattr(shards.Clock, "is_over", lambda _: False)
    assert bench() == 0
    assert len(content(tmp_path)["rows"]) > 2


def test_shards_are_merged_and_half_lines_are_not_read(bench, tmp_path):
    assert bench(SHARD="1/2") == 0
    half = len(content(tmp_path)["rows"])
    with (tmp_path / "gpu-bench-1-of-2.jsonl").open("a") as file:
        file.write('{"test": "dense", "outco')
    assert bench(SHARD="2/2") == 0
    assert len(content(tmp_path)["rows"]) > half
    (tmp_path / "gpu.json").unlink()
    assert bench("--merge") == 0
    assert len(content(tmp_path)["rows"]) > half


def test_results_of_other_code_are_left_out(bench, tmp_path, monkeypatch):
    assert bench(SHARD="1/2") == 0
    before = {row["name"] for row in content(tmp_path)["rows"]}
    monkeypatch.setattr(shards, "code_fingerprint", lambda *_, **__: "other code")
    assert bench(SHARD="2/2") == 0
    assert not before & {row["name"] for row in content(tmp_path)["rows"]}


def test_two_processors_do_not_mix(bench, tmp_path, monkeypatch):
    assert bench() == 0
    before = (tmp_path / "gpu-bench-1-of-1.jsonl").read_text()
    described = bench_gpu.describe("cpu")
    monkeypatch.setattr(bench_gpu, "describe", lambda _: {**described, "processor": "NVIDIA H100"})
    with pytest.raises(SystemExit, match=re.escape(f"{described['processor']} and of NVIDIA H100")):
        bench()
    assert (tmp_path / "gpu-bench-1-of-1.jsonl").read_text() == before


def fail_for(monkeypatch, error):
    """The second case raises the error."""
    measure, count = bench_gpu.measure, iter(range(100))

    def failing(*arguments):
        if next(count) == 1:
            raise error
        return measure(*arguments)

    monkeypatch.setattr(bench_gpu, "measure", failing)


def test_a_case_that_fails_is_recorded_and_the_rest_runs(bench, tmp_path, monkeypatch):
    fail_for(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"))
    assert bench() == 1
    found = content(tmp_path)
    assert list(found["failed"].values()) == ["CUDA out of memory. Tried to allocate"]
    assert len(found["rows"]) > 2
    assert f"- {next(iter(found['failed']))}: CUDA out of memory." in table(tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("RESULTS", str(tmp_path))
    assert bench() == 0
    assert content(tmp_path)["failed"] == {}


def test_a_case_that_loses_the_device_ends_the_process(bench, tmp_path, monkeypatch):
    fail_for(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))

    def refuse():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="70"):
        bench()
    lines = shards.read_lines(tmp_path / "gpu-bench-1-of-1.jsonl")
    assert [line["outcome"] for line in lines if "test" in line] == ["passed", "crashed"]
    started, ended = ([line[key] for line in lines if key in line] for key in ("started", "test"))
    assert started == ended
    assert len(content(tmp_path)["rows"]) == 1
    assert bench() == 1
    assert len(content(tmp_path)["rows"]) > 2
    assert len(content(tmp_path)["failed"]) == 1


# Cases.


@pytest.mark.parametrize("count", range(2, 8))
def test_every_shard_has_all_masks_and_most_head_dims(count):
    sweep = [case for case in gpu.gpu_cases()[:36] if case.dtype == "bf16" and case.head_dim in gpu.SWEEP]
    assert len(sweep) == 36
    for first in range(count):
        own = sweep[first::count]
        assert {case.causal for case in own} == {False, True}
        assert len({case.head_dim for case in own}) == 3 or count == 7
        assert len({(case.head_dim, case.causal) for case in own}) >= (5 if count <= 3 else 2)


def test_the_most_valuable_cases_come_first():
    races = bench_gpu.all_races("cuda")
    names = [race.name for race in races]
    assert len(names) == len(set(names))
    first = [(race.case.dtype, race.case.head_dim, race.case.seqlen_q) for race in races[:6:2]]
    assert first == [("bf16", 128, seqlen) for seqlen in (4096, 16384, 8192)]
    stages = [race.stage for race in races]
    assert stages == sorted(stages)
    assert {race.case.group for race in races if race.stage == 2}.isdisjoint({"varlen", "dropout"})


def test_only_the_matrix_of_math_is_too_large():
    cases = {case.seqlen_q: case for case in gpu.gpu_cases() if case.group in ("dense", "decode")}
    math, flash = (Implementation(f"torch {name} + mask", None, (), None) for name in ("math", "flash"))
    assert [n for n, case in sorted(cases.items()) if gpu.too_large(case, math)] == [8192, 16384]
    assert not any(gpu.too_large(case, flash) for case in cases.values())


# Peers.


def dense_case(**changes):
    return replace(gpu.quick(gpu.gpu_cases()[0]), causal=True, **changes)


def test_a_peer_that_cannot_is_absent_with_a_reason(monkeypatch):
    def refuse():
        raise NotImplementedError("x" * 300 + "\nsecond line")

    def implementations(case, device):
        ours, *peers = dense_implementations(case, device)
        return [ours, *peers, replace(peers[0], name="torch odd", forward=refuse)]

    monkeypatch.setattr(gpu_race, "dense_implementations", implementations)
    row = gpu_race.measure(dense_case(), 1, ("forward",), "cpu", 0.0, monitor.Monitor("cpu"))
    assert row["absent"] == {"torch odd": "x" * 200}


def test_the_second_stage_is_flex_and_ours(monkeypatch):
    def implementations(case, device):
        ours, *peers = dense_implementations(case, device)
        return [ours, *peers, replace(peers[0], name=FLEX)]

    monkeypatch.setattr(gpu_race, "dense_implementations", implementations)
    first, second = (
        gpu_race.measure(dense_case(), stage, ("forward", "backward"), "cpu", 0.0, monitor.Monitor("cpu"))
        for stage in (1, 2)
    )
    assert not any(FLEX in measured["milliseconds"] for measured in first["passes"].values())
    assert {frozenset(each["milliseconds"]) for each in second["passes"].values()} == {frozenset({"ours", FLEX})}
    assert second["reference"] == FLEX
    joined = results.join(first, second)
    assert joined["passes"]["backward"]["ratios"].keys() > {"torch math", "ours, deterministic", FLEX}


def test_torch_says_in_a_warning_why_it_cannot():
    case = dense_case(head_dim_v=64)
    flash = next(each for each in dense_implementations(case, "cpu") if each.name == "torch flash")
    assert "same last dimension" in why_not(flash)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_results_agree_but_for_a_lost_tile(dtype):
    case = dense_case(dtype=dtype, seqlen_q=512, seqlen_k=512, batch_size=1)
    ours, *peers = dense_implementations(case, "cpu")
    expected = results_of(next(peer for peer in peers if peer.name == "torch math"))
    right = results_of(ours)
    assert set(right) == {"out", "dq", "dk", "dv"}
    assert differences(case, right, expected, "both") == []
    q, k, v = (x.detach().double() for x in ours.inputs)
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
    providers = {name: Provider(lambda name=name: calls.append(name), repeats=False) for name in "abc"}
    time_interleaved(providers, "cpu", 10.0, max_rounds=3)
    rounds = ["".join(calls[i : i + 3]) for i in range(6, 15, 3)]  # after two calls of each to warm up
    assert rounds == ["abc", "bca", "cab"]


# Clocks.


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A stand-in that says the same line again and again, with the time."""

    def make(values, once=""):
        script = tmp_path / "nvidia-smi"
        line = f'echo "$(date "+%Y/%m/%d %H:%M:%S.%3N"), {values}"'
        script.write_text(
            f'#!/bin/sh\ncase "$*" in *--loop-ms*) ;; *) echo "{once}"; exit ;; esac\n'
            f"while true; do {line}; sleep 0.02; done\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return make


def sampled():
    with monitor.Monitor("cuda") as watching:
        started = time.time()
        deadline = started + 20
        while len(watching.samples) < 3 and time.time() < deadline:
            time.sleep(0.02)
        return watching.between(started - 1, time.time() + 1)


def test_clocks_are_sampled_during_a_race(nvidia_smi):
    nvidia_smi("1755, 612.40, 55, 0x0000000000000024")
    state = sampled()
    assert state.pop("samples") >= 3
    assert state == {
        "sm_clock_mhz": 1755, "power_w": 612.4, "temperature_c": 55,
        "throttles": ["power cap", "thermal, software"],
    }  # fmt: skip


def test_what_nvidia_smi_cannot_tell_is_left_out(nvidia_smi):
    nvidia_smi("1755, [N/A], [Not Supported], [N/A]", once="1755, 1980, [N/A], [N/A], 700.00, 40, 580.65.06")
    state = sampled()
    assert state.pop("samples") >= 3
    assert state == {"sm_clock_mhz": 1755}
    assert monitor.device_state("cuda") == {
        "sm_clock_mhz": 1755, "sm_clock_max_mhz": 1980, "power_limit_w": 700, "temperature_c": 40,
        "driver": "580.65.06",
    }  # fmt: skip


def test_without_nvidia_smi_there_are_no_clocks(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert monitor.device_state("cuda") == {}
    with monitor.Monitor("cuda") as watching:
        assert watching.between(0, time.time()) == {}
