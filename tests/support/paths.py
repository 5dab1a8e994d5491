"""Folders of the repository, and the environment of child processes."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# sys.path of the tests: package, tools and helpers. The same as pythonpath in pyproject.toml.
FOLDERS = [ROOT, ROOT / "tests/support", ROOT / "tests/kernels", ROOT / "tests/build", ROOT / "benchmarks"]


def environment(**variables: str) -> dict[str, str]:
    """Environment of a Python child process with the same modules, limited to one thread."""
    path = os.pathsep.join([*map(str, FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
