"""Says in one line why nothing can be run on a GPU here, with exit status 1; says nothing if it can.

python build_tools/preflight.py NAME
"""

import sys


def trouble() -> str:
    """Empty if there is a GPU that torch can use and that the kernels support."""
    try:
        import torch
    except ModuleNotFoundError:
        return f"{sys.executable} has no torch"
    if torch.version.cuda is None:
        return f"no CUDA device: torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return f"no CUDA device: torch {torch.__version__} finds none"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and the kernels need 8.0 or newer"
        )
    return ""


if __name__ == "__main__":
    if found := trouble():
        sys.exit(f"{sys.argv[1]}: {found}")
