// bf16 and fp16 as bits. Shared by kernels and models, so every function is inlined: see sim.h.
#pragma once
#include <cstdint>

#define SIM_INLINE inline __attribute__((always_inline))

namespace sim {

SIM_INLINE uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
SIM_INLINE float bits_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// cvt.rn: to nearest, ties to even; NaN becomes 0x7fff.
SIM_INLINE uint16_t float_to_bf16(float x) {
    const uint32_t u = float_bits(x);
    return x != x ? uint16_t(0x7fff) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
SIM_INLINE float bf16_to_float(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }

SIM_INLINE uint16_t float_to_fp16(float x) {
    const uint32_t u = float_bits(x) & 0x7fffffff, sign = float_bits(x) >> 16 & 0x8000;
    constexpr uint32_t kTooLarge = 0x477ff000;  // 65520: half way from the largest fp16 to the next power of two
    constexpr uint32_t kNormal = 0x38800000;    // 2^-14, the smallest that is not a denormal
    if (x != x) return 0x7fff;
    if (u >= kTooLarge) return uint16_t(sign | 0x7c00);
    if (u >= kNormal) return uint16_t(sign | (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
    // Neighbours of 0.5 are 2^-24 apart, as denormals of fp16 are: this addition rounds.
    return uint16_t(sign | (float_bits(bits_float(u) + 0.5f) - float_bits(0.5f)));
}
SIM_INLINE float fp16_to_float(uint16_t bits) {
    const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    const float scaled = bits_float(magnitude) * 0x1p112f;  // exact, for denormals too
    return bits_float(sign | ((bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : float_bits(scaled)));
}

}  // namespace sim
