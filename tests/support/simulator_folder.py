"""The folder that the simulator is compiled into, for one process at a time."""

import contextlib
import fcntl
from collections.abc import Iterator

from paths import ROOT

FOLDER = ROOT / "build" / "sim"


@contextlib.contextmanager
def simulator_folder() -> Iterator[None]:
    """Waits until no other process of the tests has it: one would run what another is just linking."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
