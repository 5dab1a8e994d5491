"""Resumable test runs: pytest --resume=FOLDER --stop-after=SECONDS.

FOLDER/results.jsonl gets a line for every test as soon as it has finished. The next run with the same code repeats
failed tests and skips the others. A test that crashes the GPU ends its process, and pytest-xdist starts another.
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

SOURCES = ("csrc/**/*.[hc]*", "csrc/**/*.inl", "flash_attn/**/*.py", "tests/**/*.py")


def pytest_addoption(parser):
    parser.addoption("--resume", metavar="FOLDER", help="keep results there; leave out what has passed before")
    parser.addoption("--stop-after", metavar="SECONDS", type=float, default=1e9, help="start no test later")


def pytest_configure(config):
    if config.getoption("--resume"):
        config.pluginmanager.register(Resume(config), "resume-run")


def fingerprint() -> str:
    """A hash of the code, the torch version and the device."""
    parts = [version("torch").encode(), os.environ.get("FLASH_ATTN_TEST_DEVICE", "").encode()]
    parts += [path.read_bytes() for pattern in SOURCES for path in sorted(ROOT.glob(pattern))]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


class Resume:
    """Results of earlier runs. With pytest-xdist only the controller reads and writes the file."""

    def __init__(self, config):
        self.config, self.started = config, time.monotonic()
        self.is_worker = hasattr(config, "workerinput")
        if self.is_worker:
            self.done = set(config.workerinput["done"])
            return
        path, self.code = Path(config.getoption("--resume")) / "results.jsonl", fingerprint()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a+")
        self.file.seek(0)
        known = [json.loads(line) for line in self.file if line.endswith("}\n")]  # the last line may be truncated
        last = {each["test"]: each["outcome"] for each in known if each["code"] == self.code}
        self.done = {test for test, outcome in last.items() if outcome != "failed"}
        self.file.write("\n")

    def pytest_configure_node(self, node):
        node.workerinput["done"] = sorted(self.done)  # also for workers that are restarted

    def pytest_collection_modifyitems(self, config, items):
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.done])
        items[:] = [item for item in items if item.nodeid not in self.done]

    def pytest_runtest_logreport(self, report):
        if self.is_worker or (report.when != "call" and report.passed):
            return
        outcome = "crashed" if report.when == "???" else report.outcome  # "???": a crashed worker
        line = {"test": report.nodeid, "outcome": outcome, "text": report.longreprtext[-2000:], "code": self.code}
        self.file.write(json.dumps({**line, "seconds": round(report.duration, 2)}) + "\n")
        self.file.flush()
        if (
            run := self.config.pluginmanager.get_plugin("dsession")
        ) and time.monotonic() - self.started > self.config.getoption("--stop-after"):
            run.shouldstop = "the time is over; run again to go on"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        device = sys.modules.get("device")  # not imported: this process has not used the device
        if report.failed and self.is_worker and device is not None and device.is_lost():
            os._exit(70)  # an orderly exit would wait for the device
        return report
