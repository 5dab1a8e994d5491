"""One case of the GPU benchmark: who takes part, whether all compute the same thing, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from harness import gpu
from harness.cases import Case
from harness.dense import dense_implementations
from harness.failures import device_is_lost, reason
from harness.flex import FLEX
from harness.implementation import OURS, Implementation, differences, reference_of, results_of, why_not
from harness.monitor import Monitor
from harness.timing import Provider, time_interleaved
from harness.varlen import varlen_implementations

MIN_ROUNDS = 5


def line_up(case: Case, stage: int, device: str) -> tuple[list[Implementation], dict[str, str]]:
    """Ours first, its variants, and the peers of this stage that can compute the case; why the others cannot."""
    if stage == 2:
        torch.compiler.reset()  # FlexAttention compiles for every case, and stops doing so after some
    ours, *peers = (varlen_implementations if case.seqlens else dense_implementations)(case, device)
    peers = [peer for peer in peers if (peer.name == FLEX) == (stage == 2)]
    others = [*(gpu.variants(case, ours) if stage == 1 else []), *peers]
    ours.run()
    reasons = {each.name: gpu.too_large(case, each) or why_not(each) for each in others}
    absent = {name: why for name, why in reasons.items() if why}
    return [ours, *(each for each in others if each.name not in absent)], absent


def check(case: Case, implementations: Sequence[Implementation]) -> tuple[str | None, list[str]]:
    """The peer that the others are compared with, and a sentence for everything that differs from it."""
    reference = reference_of([each for each in implementations if not each.name.startswith(OURS)])
    if reference is None:
        return None, []
    expected = results_of(reference)
    problems = []
    for each in implementations:
        if each is not reference or case.dropout_p:
            problems += differences(case, results_of(each), expected, f"{each.name} and {reference.name}")
    return reference.name, problems


def contestants_of(
    case: Case, implementations: Sequence[Implementation], which: str, device: str
) -> tuple[dict[str, Provider], dict[str, str]]:
    """Who takes part in a pass; and, of calls that are captured as CUDA graphs, why some are not."""
    providers, host_timed = {}, {}
    for each in implementations:
        if which not in each.passes:
            continue
        if device == "cuda" and case.group in gpu.HOST_BOUND:
            try:
                providers[each.name] = Provider(gpu.captured(each, which), repeats=False)
                continue
            except Exception as error:
                if device_is_lost(error):
                    raise
                host_timed[each.name] = reason(error.__context__ or error)
        providers[each.name] = Provider(gpu.function_of(each, which), each.context)
    return providers, host_timed


def measure(
    case: Case, stage: int, passes: Sequence[str], device: str, budget: float, monitor: Monitor
) -> dict[str, Any]:
    """One row of results: milliseconds and ratios of every pass, and clocks and power during it."""
    torch.manual_seed(0)
    implementations, absent = line_up(case, stage, device)
    reference, problems = check(case, implementations)
    problems += [f"{case.name}: {name} fails: {why}" for name, why in absent.items() if name.startswith(OURS)]
    row: dict[str, Any] = {"name": case.name, "case": vars(case), "stage": stage, "reference": reference}
    row |= {"absent": absent, "problems": problems, "passes": {}}
    if stage == 2 and len(implementations) == 1:
        return row
    for which in gpu.passes_of(case, passes):
        providers, host_timed = contestants_of(case, implementations, which, device)
        started = time.time()
        rounds = time_interleaved(providers, device, budget, min_rounds=MIN_ROUNDS)
        state = monitor.between(started, time.time())
        milliseconds = {name: 1e3 * provider.median() for name, provider in providers.items()}
        ours = providers.pop(OURS)
        row["passes"][which] = {
            "rounds": rounds,
            "milliseconds": {name: float(f"{value:.5g}") for name, value in milliseconds.items()},
            "ratios": {name: each.ratio_to(ours) for name, each in providers.items()},
            "tflops": float(f"{gpu.flops(case, which) / milliseconds[OURS] / 1e9:.4g}"),
            "host_timed": host_timed,
            **state,
        }
    return row
