"""What torch and the driver say: a line each about build and GPU, and which tensor maps the driver accepts."""

from __future__ import annotations

import ctypes
import sys

import torch

import flash_attn

# Rows of the boxes that the kernels for Hopper load and store.
BOX_ROWS = (64, 80, 96, 112, 128)


def tensor_map_results() -> dict[int, int]:
    """The CUresult of cuTensorMapEncodeTiled for every box, with the dimensions that cuda/tile/copy_sm90.h explains."""
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
    print(flash_attn.build_info())
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        print("no CUDA device of compute capability 9.0 or later: tensor maps are not tried")
        return 0
    results = tensor_map_results()
    print(torch.cuda.get_device_properties(0), f"CUresult of tensor maps, by rows of a box: {results}", sep="\n")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main())
