"""Runs the tests of this folder in shards that can be resumed, on the device that device.py names.

Environment: SHARD=i/n, every n-th test (1/1); LIMIT, seconds after which no test is started (330); RESULTS, the folder
of the file of results (build/gpu-test). A run leaves out what has passed before with the same code. A test that takes
more than a minute says so: pytest.mark.limit(seconds). build_tools/supervise.py kills what takes longer.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

import device

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from build_tools import preflight
from build_tools.shards import CRASHED, DEVICE_LOST, OUTCOMES, Clock, Shard, code_fingerprint

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# The modules that make inputs: in all of them, for the device.
MODULES = ("check", "test_backward", "test_dropout", "test_layouts", "test_metamorphic", "test_nan")
# What is told first, and what comes last, because it takes long or may do harm.
FIRST = ("test_primitives", "test_first")
LAST = (
    "test_many_sequences",
    "test_many_packed_sequences",
    "test_more_than_2_to_the_31_elements",
    "test_offsets_have_64_bits",
    "test_wrong_values_do_no_harm",
    "test_compute_sanitizer",
)


def fingerprint() -> str:
    name = torch.cuda.get_device_name() if device.IS_GPU else "cpu"
    tests = [path for folder in (HERE, HERE.parent) for path in folder.glob("*.py")]
    return code_fingerprint(torch.__version__, name, paths=tests)


def pytest_configure(config):
    reason = (preflight.unavailable_reason() or preflight.build_unavailable_reason()) if device.IS_GPU else ""
    if reason:
        pytest.exit(f"gpu-test: {reason}", returncode=1)
    folder = Path(os.environ.get("RESULTS") or ROOT / "build" / "gpu-test")
    try:
        config.shard = Shard(os.environ.get("SHARD") or "1/1", folder, fingerprint())
    except ValueError as error:
        pytest.exit(f"gpu-test: {error}", returncode=1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for products under deterministic algorithms
    config.clock = Clock(float(os.environ.get("LIMIT") or 330))
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def is_for_kernels(item) -> bool:
    """Not of a type that only the CPU has."""
    parameters = getattr(item, "callspec", None)
    return parameters is None or parameters.params.get("dtype") not in ("float32", "float64")


def rank(item) -> int:
    """Of two tests that of lower rank comes first."""
    name = item.originalname
    if name in FIRST:
        return FIRST.index(name) - len(FIRST)
    return 1 + LAST.index(name) if name in LAST else 0


def pytest_collection_modifyitems(config, items):
    kept = sorted(filter(is_for_kernels, items), key=rank)
    chosen = set(config.shard.choose([item.nodeid for item in kept]))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
    items[:] = [item for item in kept if item.nodeid in chosen]
    config.left = set(chosen)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    limit = item.get_closest_marker("limit")
    item.config.shard.start(item.nodeid, limit.args[0] if limit else 60)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" or report.outcome != "passed":
        shard = item.config.shard
        item.config.left.discard(item.nodeid)
        more = {"text": report.longreprtext[-2000:]} if report.longreprtext else {}
        if report.failed and device.IS_GPU and preflight.device_is_lost():
            shard.record(item.nodeid, CRASHED, report.duration, **more)
            sys.stderr.write(f"gpu-test: {item.nodeid} has crashed the device; run again to go on\n")
            sys.stderr.flush()
            os._exit(DEVICE_LOST)  # an orderly end would wait for the device
        shard.record(item.nodeid, report.outcome, report.duration, **more)
    return report


def pytest_runtest_logfinish(nodeid, location):
    session = pytest_runtest_logfinish.session
    if session.config.clock.is_over() and session.config.left:
        session.shouldstop = f"the time is over with {len(session.config.left)} tests left; run again to go on"


def pytest_sessionstart(session):
    pytest_runtest_logfinish.session = session


def pytest_sessionfinish(session, exitstatus):
    """Nothing left to do is a success, too."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.shard.outcomes:
        session.exitstatus = int(session.config.shard.count_of("failed") > 0)


def pytest_terminal_summary(terminalreporter, config):
    shard = config.shard
    counts = ", ".join(f"{shard.count_of(outcome)} {outcome}" for outcome in OUTCOMES)
    terminalreporter.write_line(
        f"gpu-test, shard {shard.index}/{shard.count}: {counts}, {len(config.left)} left; {shard.path}"
    )


@pytest.fixture(autouse=True)
def everything_on_the_device(monkeypatch):
    """Inputs, and whatever else a test makes."""
    for name in MODULES:
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], "make_inputs", device.make_inputs)
    with torch.device(device.DEVICE):
        yield
