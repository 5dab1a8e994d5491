"""Whether object files are those of this code, by content.

ninja goes by the times of files, and those do not travel to another machine along with the files. So beside the object
files of the kernels lies what they were compiled from. Where that is what lies here, they are taken as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from build_tools import shards

FILE = "compiled_from.json"

# What has to be the same: of the folders of sources, the compiler, and every object file.
Facts = Mapping[str, str]

# Below csrc: what nvcc does not see.
OF_TORCH = ("cpu", "ops")


def fingerprint(folder: Path) -> str:
    """Changes with any source of kernels in a folder."""
    files = [path for suffix in (".h", ".inl", ".cu", ".cpp") for path in folder.rglob(f"*{suffix}")]
    files = [path for path in files if path.relative_to(folder).parts[0] not in OF_TORCH]
    return shards.fingerprint_of(files, *sorted(str(path.relative_to(folder)) for path in files))


def difference(folder: Path, facts: Facts, files: Sequence[Path]) -> str:
    """Why the object files in a folder cannot be taken as they are; empty if they can."""
    path = folder / FILE
    if not path.exists():
        return "nothing says what they were compiled from"
    known = json.loads(path.read_text())
    for name, value in facts.items():
        if known.get(name) != value:
            return f"{name} has changed: {known.get(name, 'nothing')} before, {value} now"
    missing = [file.name for file in files if not file.exists()]
    return f"{', '.join(missing)} is missing" if missing else ""


def forget(folder: Path) -> None:
    """Before compiling: it may end halfway."""
    (folder / FILE).unlink(missing_ok=True)


def note(folder: Path, facts: Facts) -> None:
    """After compiling."""
    (folder / FILE).write_text(json.dumps(dict(facts), indent=1) + "\n")
