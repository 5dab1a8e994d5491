"""Folders of the repository, and the environment of other processes that use them."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Where modules are found: the package, tools, these helpers. pyproject.toml tells pytest the same.
FOLDERS = [ROOT, ROOT / "tests/support", ROOT / "tests/kernels", ROOT / "tests/build", ROOT / "benchmarks"]


def environment(**variables: str) -> dict[str, str]:
    """For a Python process of its own, with the modules that this one finds, and one thread."""
    path = os.pathsep.join([*map(str, FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
