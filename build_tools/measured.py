"""Runs one compiler and writes down what it said and what it cost.

    python build_tools/measured.py LOG COMMAND...

LOG becomes a JSON file with the processor time, the largest resident set of any of its processes, and what was printed.
What is no mere information about registers is printed here as well. Where the compiler says that it makes products of
wgmma wait for one another, or that setmaxnreg has no effect, the command has failed: the kernel would be right, and
several times slower.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

# What `ptxas -v` has to say about every kernel. Information with a number in parentheses is a warning in disguise:
# products of wgmma that wait for one another, setmaxnreg that has no effect.
RESOURCE_USAGE = re.compile(
    r"^(ptxas|nvlink) info\s*: (?!.*(\(C\d|Performance Loss|setmaxnreg))|^\s+\d+ bytes stack frame, |^\s*$"
)
SLOW_KERNEL = re.compile(r"^ptxas (info|warning)\s*: \(C75\d\d\)", re.MULTILINE)


def main(log: str, *command: str) -> int:
    """Run the command; the exit status is its own, or 1 if what it made must not be used, and is removed."""
    started = time.perf_counter()
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    for line in result.stdout.splitlines():
        if not RESOURCE_USAGE.match(line):
            print(line, file=sys.stderr)
    content = {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "seconds": round(time.perf_counter() - started, 3),
        "peak_bytes": usage.ru_maxrss * 1024,
        "command": command,
        "output": result.stdout,
    }
    Path(log).write_text(json.dumps(content, indent=1) + "\n")
    if result.returncode == 0 and SLOW_KERNEL.search(result.stdout):
        print("error: this compiler makes a slow kernel of that (C75xx); CUDA 13.0 does not", file=sys.stderr)
        Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
        return 1
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
