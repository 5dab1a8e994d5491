"""What the benchmark makes of its results."""

from types import SimpleNamespace

from harness import report
from harness.cases import Case
from harness.published import COLUMNS
from harness.results import join
from harness.targets import missed, targets_table


def make_row(head_dim=128, ratio=2.0, *, seqlen=4096, head_dim_v=None, dtype="bf16", causal=True, **more):
    """A row as it is measured, of a dense case beside one peer."""
    shape = {"head_dim": head_dim, "head_dim_v": head_dim_v or head_dim, "num_heads": 16, "num_heads_k": 16}
    case = Case("cuda", "dense", dtype, seqlen, seqlen, causal=causal, backward=True, **shape)
    measured = {
        "rounds": 5, "milliseconds": {"ours": 1.0, "torch cudnn": ratio}, "ratios": {"torch cudnn": ratio},
        "tflops": 500.0, "host_timed": {}, **more,
    }  # fmt: skip
    return {
        "name": case.name, "case": vars(case), "stage": 1, "reference": "torch cudnn", "absent": {}, "problems": [],
        "passes": {"forward": measured},
    }  # fmt: skip


def results_with(*rows, **more):
    machine = {
        "device": "cuda", "processor": "NVIDIA H200", "torch": "2.11", "flash_attn": "2.8.3", "commit": "abc",
        "date": "today", "kernels": "the Hopper kernels", "driver": "580.65.06", "power_limit_w": 700.0,
        "sm_clock_max_mhz": 1980.0,
    }  # fmt: skip
    known = {"failed": {}, "crashed": {}, "left": 0, **more}
    return SimpleNamespace(machine=machine, joined=lambda: list(rows), **known)


def test_flex_joins_the_row_by_its_own_times():
    row, flex = make_row(ratio=1.5), make_row(ratio=1.5)
    measured = flex["passes"]["forward"]
    measured |= {"ratios": {"torch flex": 1.2}, "milliseconds": {"ours": 2.0, "torch flex": 2.4}}
    joined = join(row, {**flex, "absent": {}, "stage": 2})["passes"]["forward"]
    assert joined["ratios"] == {"torch cudnn": 1.5, "torch flex": 1.2}
    assert joined["milliseconds"] == {"ours": 1.0, "torch cudnn": 1.5, "torch flex": 2.4}
    assert row["passes"]["forward"]["ratios"] == {"torch cudnn": 1.5}


def test_what_is_missing_is_listed():
    row = {**make_row(), "absent": {"torch efficient": "no such head_dim"}, "problems": ["dq of ours and cudnn differ"]}
    second = {**make_row(64), "passes": {}, "absent": {"torch flex": "does not compile"}}
    text = report.markdown(results_with(row, second, failed={"a case": "CUDA out of memory"}))
    assert "- torch efficient: no such head_dim (dense bf16 causal" in text
    assert "- torch flex: does not compile (dense bf16 causal" in text
    assert "- dq of ours and cudnn differ" in text
    assert "- a case: CUDA out of memory" in text
    assert "compared with those of one peer: torch cudnn." in text
    assert "DISAGREES" in report.one_line(row)


def test_what_is_under_one_is_marked():
    row = make_row(ratio=0.9996)
    text = report.markdown(results_with(row))
    assert "| **1.000** |" in text
    assert "UNDER 1" in report.one_line(row)
    assert "Under 1, of all cases: 1\n" in text
    assert "UNDER" not in report.one_line(make_row(ratio=1.0))


def test_means_are_of_the_sweep_only():
    rows = [make_row(128, 2.0), make_row(64, 4.5, dtype="fp16"), make_row(96, 100.0)]
    rows += [make_row(192, 100.0, head_dim_v=128), {**make_row(128, 50.0), "name": "gqa"}]
    rows[-1]["case"] = {**rows[-1]["case"], "group": "gqa"}
    text = report.summary(rows)
    assert "- bf16, forward: 2.000 (1 ratios, 0 under 1)" in text
    assert "- fp16, all passes: 4.500 (1 ratios" in text
    assert "- all, all passes: 3.000 (2 ratios" in text


def test_published_figures_are_beside_ours_and_in_no_mean():
    rows = [make_row(128), make_row(128, seqlen=512), make_row(72), make_row(128, dtype="fp16")]
    text = report.markdown(results_with(*rows))
    _, published = text.split("## Published by others, on other machines, not part of ratios or means")
    assert all(who in published for who in COLUMNS)
    assert "| 128 | causal | 4096 | forward | 500 | 579 | 619 | 616 |" in published
    assert "| 128 | causal | 512 | forward | 500 | 292 |  |  |" in published
    assert published.count("| 500 |") == 2
    assert "cudnn-frontend" in published
    assert "arXiv 2407.08608" in published
    assert "- all, all passes: 2.000 (3 ratios" in text


def test_the_heading_says_what_ran_on_what():
    text = report.markdown(results_with(make_row(), crashed={"a case": "hung"}, left=3))
    assert "NVIDIA H200, driver 580.65.06, power limit 700 W, SM clock up to 1980 MHz" in text
    assert "Ours: the Hopper kernels" in text
    assert "**Not complete: 3 cases not measured yet, 1 failed.**" in text


def test_a_peer_whose_host_is_timed_is_marked():
    row = make_row(host_timed={"torch cudnn": "operation not permitted"})
    text = report.markdown(results_with(row))
    assert "could not be captured as CUDA graphs" in text
    assert "| cudnn\\* |" in text


def test_the_worst_row_decides_about_a_target():
    machine = {"device": "cpu", "instruction_set": "avx512_bf16"}
    rows = [make_row(dtype="fp32", ratio=ratio, seqlen=seqlen) for ratio, seqlen in ((1.9, 2048), (1.1, 4096))]
    assert not missed(rows, machine)
    for row in rows:
        measured = row["passes"]["forward"]
        measured["ratios"] = {"torch flash": measured["ratios"]["torch cudnn"], "ours, generic": 0.1}
    (line,) = [line for line in targets_table(rows, machine) if line.startswith("| fp32 causal")]
    assert line.endswith("| 1.2 | 1.10 | dense fp32 causal b1 n4096 h16 d128 forward | **missed** |")
    assert missed(rows, machine)
    assert targets_table(rows, {"device": "cuda"}) == []
