// Host model of csrc/cuda/ptx/mma.h.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

template <class Element> FA_DEVICE void mma_m16n8k16(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, fp16>);
    const sim::Acc4 sum =
        sim::mma_m16n8k16({{acc[0], acc[1], acc[2], acc[3]}}, {{a[0], a[1], a[2], a[3]}}, b0, b1, kElement<Element>);
    for (int i = 0; i < 4; ++i) acc[i] = sum.x[i];
}

}  // namespace flash_attn::ptx
