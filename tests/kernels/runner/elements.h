// 16-bit floating point numbers for test code, written independently of the kernels' conversions, and random bits.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include "problem.h"

namespace flash_attn::runner {

// Spreads numbers in sequence over all 64 bits (Steele et al., "Fast splittable pseudorandom number generators").
inline uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

// A NaN in bf16, in fp16 and, twice, in fp32, that no arithmetic makes: what has these bits was never written.
constexpr uint16_t kUntouched = 0x7fed;
constexpr uint32_t kUntouchedRow = 0x7fed7fed;

// Rounds to nearest, ties to even, by dropping `bits` of the mantissa; NaN and infinities stay.
inline float drop_mantissa(float x, int bits) {
    const uint32_t u = std::bit_cast<uint32_t>(x), half = (1u << (bits - 1)) - 1;
    const uint32_t rounded = (u + half + (u >> bits & 1)) & ~((1u << bits) - 1);
    return x != x ? x : std::bit_cast<float>(rounded);
}

// What the result of an operation in some type is rounded to.
struct Exact {
    double operator()(double x) const { return x; }
};
struct ToFloat {
    float operator()(float x) const { return x; }
};
struct ToBf16 {
    float operator()(float x) const { return drop_mantissa(x, 16); }
};
// fp16 without a limit to its exponent: the yardstick where fp16 itself would overflow.
struct ToWideFp16 {
    float operator()(float x) const { return drop_mantissa(x, 13); }
};
struct ToFp16 {
    float operator()(float x) const {
        const float size = std::fabs(x), rounded = drop_mantissa(x, 13);
        const float magic = 0.75f;  // the spacing of floats around it is that of fp16 below 2^-14
        const float tiny = std::copysign((size + magic) - magic, x);
        const float large =
            std::fabs(rounded) > 65504.f ? std::copysign(std::numeric_limits<float>::infinity(), x) : rounded;
        return x != x ? x : size < 0x1p-14f ? tiny : large;
    }
};

inline float round_to(ElementType type, float x) { return type == ElementType::kBFloat16 ? ToBf16()(x) : ToFp16()(x); }

inline double eps_of(ElementType type) { return type == ElementType::kBFloat16 ? 0x1p-7 : 0x1p-10; }
constexpr double kFloatEps = 0x1p-23;

inline float to_float(ElementType type, uint16_t bits) {
    if (type == ElementType::kBFloat16) return std::bit_cast<float>(uint32_t(bits) << 16);
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float size = std::ldexp(float(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
    if (exponent == 31)
        size = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
    return bits >> 15 ? -size : size;
}

inline uint16_t to_bits(ElementType type, float value) {
    const float x = round_to(type, value);
    const uint32_t u = std::bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000u;
    if (type == ElementType::kBFloat16) return uint16_t(u >> 16);
    if (x != x) return uint16_t(sign | 0x7e00u);
    if (std::isinf(x)) return uint16_t(sign | 0x7c00u);
    if (std::fabs(x) < 0x1p-14f) return uint16_t(sign | uint32_t(std::ldexp(std::fabs(x), 24)));
    return uint16_t(sign | (((u >> 23 & 255) - 112) << 10) | (u >> 13 & 1023));
}

}  // namespace flash_attn::runner
