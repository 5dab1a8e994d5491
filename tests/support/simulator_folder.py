"""A lock on the build folder of the simulator, for one process at a time."""

import contextlib
import fcntl
from collections.abc import Iterator

from paths import ROOT

FOLDER = ROOT / "build" / "sim"


@contextlib.contextmanager
def simulator_folder() -> Iterator[None]:
    """Hold the lock, so that no process runs a program that another one is linking."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
