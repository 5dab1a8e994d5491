// Warp-level matrix products.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

// acc[16, 8] += a[16, 16] * b[16, 8], fp32 accumulators acc[0 .. 3]. With g = lane / 4 and c = 2 (lane % 4), a register
// of a or b holds two adjacent elements:
//   a[0], a[1]: rows g and g + 8, columns c and c + 1;  a[2], a[3]: the same rows, columns c + 8 and c + 9
//   b0: rows c and c + 1 of column g;  b1: rows c + 8 and c + 9
//   acc[0], acc[1]: row g, columns c and c + 1;  acc[2], acc[3]: row g + 8
// PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions: mma", "Matrix Fragments for mma.m16n8k16".
template <class Element> FA_DEVICE void mma_m16n8k16(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, fp16>);
    if constexpr (std::is_same_v<Element, bf16>)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace flash_attn::ptx
