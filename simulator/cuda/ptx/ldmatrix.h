// Host model of csrc/cuda/ptx/ldmatrix.h.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

template <bool kTranspose> FA_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    const sim::Regs4 loaded = sim::ldmatrix_x4(row, kTranspose);
    for (int i = 0; i < 4; ++i) r[i] = loaded.r[i];
}
template <bool kTranspose> FA_DEVICE void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
    sim::stmatrix_x4(row, {{r[0], r[1], r[2], r[3]}}, kTranspose);
}

}  // namespace flash_attn::ptx
