// Four 8x8 matrices of 16-bit elements between shared memory and warp fragments. Lane l passes the 16-byte aligned
// address of row l % 8 of matrix l / 8; register m of lane l holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of
// matrix m, or of its transpose with kTranspose.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

// PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions: Warp-level matrix load instruction: ldmatrix".
template <bool kTranspose> FA_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SmemPtr row) {
    if constexpr (kTranspose)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(row.address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(row.address)
                     : "memory");
}

// sm_90. PTX ISA, "Warp-level matrix store instruction: stmatrix".
template <bool kTranspose> FA_DEVICE void stmatrix_x4(SmemPtr row, const uint32_t (&r)[4]) {
    if constexpr (kTranspose)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row.address),
                     "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                     : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row.address), "r"(r[0]),
                     "r"(r[1]), "r"(r[2]), "r"(r[3])
                     : "memory");
}

}  // namespace flash_attn::ptx
