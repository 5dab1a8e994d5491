"""What the driver says: one line each about the GPU, its clocks, and which tensor maps it accepts."""

from __future__ import annotations

import ctypes
import subprocess
import sys

QUERIES = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total,clocks_event_reasons.active"
# Rows of the boxes that the kernels for Hopper load and store.
BOX_ROWS = (64, 80, 96, 112, 128)


def nvidia_smi() -> str:
    """Its answer, or why there is none."""
    command = ["nvidia-smi", f"--query-gpu={QUERIES}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return (done.stdout + done.stderr).strip()


def tensor_map_results() -> dict[int, int]:
    """The CUresult of cuTensorMapEncodeTiled for every box, with the dimensions that cuda/tile/copy_sm90.h explains.

    Raises OSError where there is no driver.
    """
    import torch

    driver = ctypes.CDLL("libcuda.so.1")
    rows, columns = 256, 128
    memory = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    row_bytes = 2 * columns
    sizes = (ctypes.c_uint64 * 4)(columns, 1 << 30, (1 << 30) + 1, rows + 1)
    strides = (ctypes.c_uint64 * 3)(row_bytes, (1 << 34) - row_bytes, row_bytes)
    ones = (ctypes.c_uint32 * 4)(1, 1, 1, 1)
    # 16-bit numbers, no interleaving, swizzled over 128 bytes, 256 bytes into the level-2 cache, zeros outside.
    uint16, rank, interleave, swizzle, promotion, fill = 1, 4, 0, 3, 3, 0
    found = {}
    for box_rows in BOX_ROWS:
        storage = (ctypes.c_uint8 * (128 + 64))()
        place = (ctypes.addressof(storage) + 63) // 64 * 64
        box = (ctypes.c_uint32 * 4)(64, box_rows, 1, 1)
        found[box_rows] = driver.cuTensorMapEncodeTiled(
            ctypes.c_void_p(place), uint16, rank, ctypes.c_void_p(memory.data_ptr()), sizes, strides, box, ones,
            interleave, swizzle, promotion, fill,
        )  # fmt: skip
    return found


def main() -> int:
    """Print what there is to know; exit status 1 where a box is refused."""
    print(nvidia_smi())
    import torch

    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    if not torch.cuda.is_available():
        print("no CUDA device: tensor maps are not tried")
        return 0
    properties = torch.cuda.get_device_properties(0)
    print(
        f"compute capability {properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors"
    )
    if properties.major < 9:
        print("tensor maps are for compute capability 9.0 and later")
        return 0
    results = tensor_map_results()
    print("CUresult of tensor maps, by rows of a box: " + ", ".join(f"{rows} {code}" for rows, code in results.items()))
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main())
