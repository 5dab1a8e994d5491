"""Resumable test runs: pytest --resume=FOLDER --stop-after=SECONDS -n N, with pytest-xdist.

FOLDER/results.jsonl gets a line for every test as soon as it has ended. The next run with the same code leaves out what
has passed, or crashed twice. A test that loses the GPU ends its process; pytest-xdist starts another.
"""

import hashlib
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from paths import ROOT

SOURCES = ("csrc/**/*.*", "simulator/**/*.*", "build_tools/*.py", "flash_attn/**/*.py", "tests/**/*.py")


def pytest_addoption(parser):
    parser.addoption("--resume", metavar="FOLDER", help="keep results there; leave out what has passed before")
    parser.addoption("--stop-after", metavar="SECONDS", type=float, default=1e9, help="then stop")


def pytest_configure(config):
    if config.getoption("--resume"):
        config.pluginmanager.register(Resume(config), "resume-run")


def fingerprint() -> str:
    """Changes with the code, torch and the device."""
    parts = [f"{version('torch')} {os.environ.get('FLASH_ATTN_TEST_DEVICE')}".encode()]
    parts += [path.read_bytes() for pattern in SOURCES for path in sorted(ROOT.glob(pattern)) if path.is_file()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


class Resume:
    """State of a run. Only the controller of pytest-xdist reads and writes the file."""

    def __init__(self, config):
        self.config, self.started = config, time.monotonic()
        if hasattr(config, "workerinput"):
            self.done, self.file = set(config.workerinput["done"]), None
            return
        folder, self.code = Path(config.getoption("--resume")), fingerprint()
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "results.jsonl").open("a+")
        self.file.seek(0)
        known = [json.loads(line) for line in self.file if line.endswith("}\n")]  # the last may be cut off
        past = [(each["test"], each["outcome"]) for each in known if each["code"] == self.code]
        self.done = {test for test, outcome in past if outcome == "passed" or past.count((test, "crashed")) > 1}
        self.file.write("\n")

    def pytest_configure_node(self, node):
        node.workerinput["done"] = [*self.done]  # the same for workers that start later

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid not in self.done]

    def pytest_runtest_logreport(self, report):
        if self.file is None or (report.when != "call" and report.passed):
            return
        outcome = "crashed" if report.when == "???" else report.outcome  # as pytest-xdist reports it
        line = {"test": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 2), "code": self.code}
        print(json.dumps({**line, "text": report.longreprtext[-2000:]}), file=self.file, flush=True)
        self.pytest_testnodedown()

    def pytest_testnodedown(self):  # without a GPU all processes end before any test
        if time.monotonic() - self.started > self.config.getoption("--stop-after"):
            pytest.exit("the time is over; run again to go on", returncode=1)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        if report.failed and self.file is None and "device" in sys.modules and sys.modules["device"].is_lost():
            os._exit(70)  # an orderly exit would wait for the device
        return report
