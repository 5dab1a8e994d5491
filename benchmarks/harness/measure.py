"""One case: which providers can compute it, whether all compute the same thing, and how long they take."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from harness import ours, sdpa, torch_others
from harness.cases import Case
from harness.compare import disagreements
from harness.failures import device_is_lost, reason, result_or_reason
from harness.monitor import Monitor
from harness.provider import OURS, Call, Problem, Provider, make_problem
from harness.timing import Timed, time_interleaved

PROVIDERS = (*ours.PROVIDERS, *sdpa.PROVIDERS, *torch_others.PROVIDERS)
HOST_BOUND = ("decode", "short", "grid")  # groups in which a call takes the host longer than a GPU
MIN_ROUNDS = 5

Row = dict[str, Any]


def build(problem: Problem, providers: Sequence[Provider]) -> tuple[list[Call], dict[str, Any], dict[str, str]]:
    """Calls, what each computes, and why the other providers are absent. Ours has to be there."""
    calls, results, absent = [], {}, {}
    for each in providers:
        name, why, found = each.name, each.why_not(problem.case), None
        if not why:
            call, why = result_or_reason(name, functools.partial(each.build, problem))
        if not why:
            name = call.name
            found, why = result_or_reason(name, call.run)
        if why:
            absent[name] = why
        else:
            calls.append(call)
            if each.computes:
                results[name] = found
    if OURS in absent:
        raise RuntimeError(f"{OURS}: {absent[OURS]}")
    return calls, results, absent


def function_of(call: Call, which: str) -> Callable[[], object]:
    """One pass, as a call without arguments."""
    if which == "forward":

        def forward() -> object:
            with torch.no_grad():
                return call.forward()

        return forward
    if which == "backward":
        with call.context():
            out = call.forward()
        return lambda: torch.autograd.grad(out, call.inputs, call.dout, retain_graph=True)
    return lambda: torch.autograd.grad(call.forward(), call.inputs, call.dout)


def captured(call: Call, which: str) -> Callable[[], object]:
    """The same pass as a CUDA graph, so that the time of the host is not in the samples."""
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    graph = torch.cuda.CUDAGraph()
    try:
        with call.context():
            with torch.cuda.stream(stream):
                function = function_of(call, which)  # here: a backward pass runs where its forward pass ran
                for _ in range(3):
                    function()
            with torch.cuda.graph(graph, stream=stream):
                function()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails does not
    graph.replay()
    torch.cuda.synchronize()

    def replay(owner: object = function) -> None:  # which owns what the graph reads
        graph.replay()

    return replay


def functions_of(case: Case, calls: Sequence[Call], which: str) -> tuple[dict[str, Timed], dict[str, str]]:
    """What is timed of a pass; and, of calls that are to be CUDA graphs, why some are not."""
    functions, host_timed = {}, {}
    for call in calls:
        if which not in call.passes:
            continue
        if case.device == "cuda" and case.group in HOST_BOUND:
            try:
                functions[call.name] = Timed(captured(call, which), repeats=False)
                continue
            except Exception as error:
                if device_is_lost(error):
                    raise
                host_timed[call.name] = reason(error.__context__ or error)
        functions[call.name] = Timed(function_of(call, which), call.context)
    return functions, host_timed


def measure(
    case: Case,
    stage: int,
    providers: Sequence[Provider],
    passes: Sequence[str],
    budget: float,
    monitor: Monitor,
    data: Callable[[Case], Problem] = make_problem,
) -> Row:
    """One row of results: milliseconds and ratios of every pass, and clocks and power during it."""
    torch.manual_seed(0)
    calls, results, absent = build(data(case), [each for each in providers if each.takes_part(case, stage)])
    reference, problems = disagreements(case, results)
    del results
    problems += [f"{case.name}: {name} fails: {why}" for name, why in absent.items() if name.startswith(OURS)]
    row: Row = {"name": case.name, "case": vars(case), "stage": stage, "reference": reference}
    row |= {"absent": absent, "problems": problems, "passes": {}}
    if stage == 2 and reference is None:
        return row
    for which in case.passes(passes):
        functions, host_timed = functions_of(case, calls, which)
        started = time.time()
        rounds = time_interleaved(functions, case.device, budget, min_rounds=MIN_ROUNDS)
        state = monitor.between(started, time.time())
        milliseconds = {name: 1e3 * each.median() for name, each in functions.items()}
        reference_time = functions.pop(OURS)
        row["passes"][which] = {
            "rounds": rounds,
            "milliseconds": {name: float(f"{value:.5g}") for name, value in milliseconds.items()},
            "ratios": {name: round(each.ratio_to(reference_time), 4) for name, each in functions.items()},
            "tflops": float(f"{case.flops(which) / milliseconds[OURS] / 1e9:.4g}"),
            "host_timed": host_timed,
            **state,
        }
    return row
