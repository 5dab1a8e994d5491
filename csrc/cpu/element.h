// Element types of tensors, and conversions from vectors of them to vectors of the compute type.
#pragma once
#include "cpu/vec.h"

namespace flash_attn::cpu::FA_ISA {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

#if defined(__aarch64__)
typedef __fp16 NativeHalf;  // GCC 12 has no _Float16 in C++ on this target
#else
typedef _Float16 NativeHalf;
#endif

template <class E> using Compute = std::conditional_t<std::is_same_v<E, double>, double, float>;

FA_INLINE float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

FA_INLINE float to_compute(float x) { return x; }
FA_INLINE double to_compute(double x) { return x; }
FA_INLINE float to_compute(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
FA_INLINE float to_compute(Float16 x) {
#if FA_X86_LEVEL >= 2
    return _cvtsh_ss(x.bits);
#else
    NativeHalf half;
    memcpy(&half, &x, sizeof half);
    return float(half);
#endif
}

// Rounds to bf16 (nearest, ties to even), in the upper half of each word; NaN stays NaN.
FA_INLINE Vec<uint32_t> round_to_bf16(Vec<float> x) {
    const Vec<uint32_t> u = (Vec<uint32_t>)x, rounded = u + (0x7fffu + ((u >> 16) & 1u));
    return (Vec<uint32_t>)((u & 0x7fffffffu) > 0x7f800000u ? (u | 0x400000u) : rounded);
}

FA_INLINE Vec<float> load_elements(const float* p) { return load(p); }
FA_INLINE Vec<double> load_elements(const double* p) { return load(p); }
FA_INLINE Vec<float> load_elements(const BFloat16* p) {
    const Halfwords<float> bits = *reinterpret_cast<const Halfwords<float>*>(p);
    return (Vec<float>)(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
}
FA_INLINE Vec<float> load_elements(const Float16* p) {
#if FA_X86_LEVEL == 3
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif FA_X86_LEVEL == 2
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vec<float> x{};
    for (int i = 0; i < kLanes<float>; ++i) x[i] = to_compute(p[i]);
    return x;
#endif
}

FA_INLINE void store_elements(float* p, Vec<float> x) { store(p, x); }
FA_INLINE void store_elements(double* p, Vec<double> x) { store(p, x); }
FA_INLINE void store_elements(BFloat16* p, Vec<float> x) {
    *reinterpret_cast<Halfwords<float>*>(p) = __builtin_convertvector(round_to_bf16(x) >> 16, Halfwords<float>);
}
FA_INLINE void store_elements(Float16* p, Vec<float> x) {
#if FA_X86_LEVEL == 3
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif FA_X86_LEVEL == 2
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<float>; ++i) {
        const NativeHalf half = NativeHalf(x[i]);
        memcpy(p + i, &half, sizeof half);
    }
#endif
}

// Loads count < lanes elements; the other lanes are 0, and memory past the elements is not accessed.
template <class E> FA_INLINE Vec<Compute<E>> load_elements(const E* p, int count) {
    E padded[kLanes<Compute<E>>] = {};
    memcpy(padded, p, sizeof(E) * count);
    return load_elements(padded);
}
template <class E> FA_INLINE void store_elements(E* p, Vec<Compute<E>> x, int count) {
    E padded[kLanes<Compute<E>>];
    store_elements(padded, x);
    memcpy(p, padded, sizeof(E) * count);
}

// Calls f(index, count) for each vector of a row; count is kLanes except for the last one.
template <class T, class F> FA_INLINE void for_each_vector(int length, F f) {
    int i = 0;
    for (; i + kLanes<T> <= length; i += kLanes<T>) f(i, kLanes<T>);
    if (i < length) f(i, length - i);
}
template <class E> FA_INLINE Vec<Compute<E>> load_some(const E* p, int count) {
    return count == kLanes<Compute<E>> ? load_elements(p) : load_elements(p, count);
}
template <class E> FA_INLINE void store_some(E* p, Vec<Compute<E>> x, int count) {
    count == kLanes<Compute<E>> ? store_elements(p, x) : store_elements(p, x, count);
}

}  // namespace flash_attn::cpu::FA_ISA
