"""Says in one line why nothing can be run on a GPU here, with exit status 1; says nothing if it can.

python -m build_tools.preflight NAME
"""

import sys

from build_tools import cuda_objects


def unavailable_reason() -> str:
    """Empty if there is a GPU that torch can use and that the kernels support, and a compiler for them."""
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
    if cuda_objects.cuda_home() is None:
        return "there is no nvcc; put it on PATH, or set CUDA_HOME"
    return ""


def build_unavailable_reason() -> str:
    """Empty if the extension, which is built, has the kernels for this GPU."""
    import torch

    import flash_attn

    major, minor = torch.cuda.get_device_capability()
    info = flash_attn.build_info()
    if (major, minor) == (9, 0) and not info["hopper_kernels"]:
        return f"the build has no kernels for Hopper, only {info['cuda_archs']}; run make clean, and see what it says"
    return "" if info["cuda_archs"] else "the extension is built for CPUs only; run make clean, and see what it says"


def device_is_lost() -> bool:
    """Whether the GPU refuses everything from here on: an error of one call is told once, this one always."""
    import torch

    for _ in range(2):
        try:
            torch.cuda.synchronize()
        except Exception:  # noqa: BLE001 (whatever it is, the device does not answer)
            continue
        return False
    return True


if __name__ == "__main__":
    if found := unavailable_reason():
        sys.exit(f"{sys.argv[1]}: {found}")
