// Host model of csrc/cuda/ptx/wgmma.h.
#pragma once
#include "cuda/ptx/types.h"

namespace flash_attn::ptx {

enum class Major { kK, kMN };
enum class Swizzle { kNone = 0, k128B = 1, k64B = 2, k32B = 3 };

FA_DEVICE uint64_t wgmma_descriptor(const void* start, int leading_bytes, int stride_bytes, Swizzle swizzle) {
    return static_cast<uint64_t>((smem_address(start) & 0x3ffff) >> 4) |
           static_cast<uint64_t>(leading_bytes >> 4) << 16 | static_cast<uint64_t>(stride_bytes >> 4) << 32 |
           static_cast<uint64_t>(swizzle) << 62;
}
FA_DEVICE void wgmma_fence() { sim::wgmma_fence(); }
FA_DEVICE void wgmma_commit() { sim::wgmma_commit(); }
template <int kPending> FA_DEVICE void wgmma_wait() { sim::wgmma_wait(kPending); }
template <int kCount> FA_DEVICE void pin_registers(float (&)[kCount]) {}

template <int N> constexpr bool kIsWgmmaWidth =
    N == 32 || N == 40 || N == 64 || N == 80 || N == 96 || N == 112 || N == 128 || N == 176 || N == 192 || N == 256;

template <class Element, int N, Major kMajorA, Major kMajorB>
FA_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate) {
    static_assert(kIsWgmmaWidth<N>, "the widths of csrc/cuda/ptx/wgmma.h");
    sim::wgmma(
        {kElement<Element>, N, nullptr, desc_a, desc_b, kMajorA == Major::kMN, kMajorB == Major::kMN, accumulate, d});
}
template <class Element, int N, Major kMajorB>
FA_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b, bool accumulate) {
    static_assert(kIsWgmmaWidth<N>, "the widths of csrc/cuda/ptx/wgmma.h");
    sim::wgmma({kElement<Element>, N, a, 0, desc_b, false, kMajorB == Major::kMN, accumulate, d});
}

}  // namespace flash_attn::ptx
