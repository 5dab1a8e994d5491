// Vectors of the target instruction set as GCC vector extensions, with intrinsics only for instructions that the
// extensions cannot express. FA_X86_LEVEL: 0 none, 2 AVX2, 3 AVX-512.
#pragma once

#define FA_INLINE static inline __attribute__((always_inline))

namespace flash_attn::cpu::FA_ISA {

constexpr int kVectorBytes = FA_VECTOR_BYTES;

template <class T> struct VecOf;
template <> struct VecOf<float> {
    typedef float Type __attribute__((vector_size(kVectorBytes)));
    typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
    typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
};
template <> struct VecOf<double> {
    typedef double Type __attribute__((vector_size(kVectorBytes)));
    typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
    typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
};
template <> struct VecOf<uint32_t> {
    typedef uint32_t Type __attribute__((vector_size(kVectorBytes)));
    typedef uint32_t Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <class T> using Vec = typename VecOf<T>::Type;
template <class T> using IntVec = typename VecOf<T>::Int;  // as wide as Vec<T>; also a mask
template <class T> using IntLane = std::conditional_t<std::is_same_v<T, float>, int32_t, int64_t>;
template <class T> constexpr int kLanes = kVectorBytes / int(sizeof(T));
// One 16-bit integer per lane of a Vec<T>.
template <class T> struct HalfwordsOf {
    typedef uint16_t Type __attribute__((vector_size(kVectorBytes / sizeof(T) * 2), aligned(2), may_alias));
    typedef int16_t Signed __attribute__((vector_size(kVectorBytes / sizeof(T) * 2), aligned(2), may_alias));
};
template <class T> using Halfwords = typename HalfwordsOf<T>::Type;

template <class T> FA_INLINE Vec<T> load(const T* p) {
    return *reinterpret_cast<const typename VecOf<T>::Unaligned*>(p);
}
template <class T> FA_INLINE void store(T* p, Vec<T> x) { *reinterpret_cast<typename VecOf<T>::Unaligned*>(p) = x; }
// x - 0 is x, also for -0, so that nothing is computed; 0 + x would be.
template <class T> FA_INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }
template <class T> FA_INLINE IntVec<T> splat_int(IntLane<T> x) { return IntVec<T>{} + x; }
template <class T> FA_INLINE IntVec<T> lane_index() {
    IntVec<T> index;
    for (int i = 0; i < kLanes<T>; ++i) index[i] = i;
    return index;
}
template <class T> FA_INLINE IntVec<T> load_lanes(const IntLane<T>* p) {
    IntVec<T> x;
    memcpy(&x, p, sizeof x);
    return x;
}
template <class T> FA_INLINE Vec<T> select(IntVec<T> mask, Vec<T> a, Vec<T> b) { return mask ? a : b; }

// Elementwise max; the second operand if either is NaN.
FA_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) {
#if FA_X86_LEVEL == 3
    return (Vec<float>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif FA_X86_LEVEL == 2
    return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
FA_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) {
#if FA_X86_LEVEL == 3
    return (Vec<double>)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
#elif FA_X86_LEVEL == 2
    return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
    return a > b ? a : b;
#endif
}

// Whether any lane of x is above y.
FA_INLINE bool any_above(Vec<float> x, float y) {
#if FA_X86_LEVEL == 3
    return _mm512_cmp_ps_mask((__m512)x, (__m512)splat(y), _CMP_GT_OQ);
#elif FA_X86_LEVEL == 2
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)splat(y), _CMP_GT_OQ));
#else
    return x[0] > y || x[1] > y || x[2] > y || x[3] > y;
#endif
}
FA_INLINE bool any_above(Vec<double> x, double y) {
    bool any = false;
    for (int i = 0; i < kLanes<double>; ++i) any |= x[i] > y;
    return any;
}

// Adding this rounds to an integer, held in the low bits of the mantissa.
template <class T> constexpr T kRoundingMagic = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);
template <class T> constexpr int kMantissaBits = sizeof(T) == 4 ? 23 : 52;
template <class T> constexpr int kExponentBias = sizeof(T) == 4 ? 127 : 1023;

template <class T> struct SplitExponent {
    IntVec<T> integer;
    Vec<T> fraction;  // |fraction| <= 1/2
};
template <class T> FA_INLINE SplitExponent<T> split_exponent(Vec<T> x) {
    const Vec<T> magic = splat<T>(kRoundingMagic<T>), rounded = x + magic;
    return {(IntVec<T>)rounded - (IntVec<T>)magic, x - (rounded - magic)};
}
template <class T> FA_INLINE Vec<T> power_of_two(IntVec<T> n) {
    return (Vec<T>)((n + kExponentBias<T>) << kMantissaBits<T>);
}

// (2^f - 1) / f for |f| <= 1/2, minimax polynomials: relative error of 2^f 2.5e-9 and 4e-18.
FA_INLINE Vec<float> exp2_slope(Vec<float> f) {
    Vec<float> p = splat(0.00015461444698564681f);
    p = p * f + 0.0013400428177615764f;
    p = p * f + 0.0096180566785246547f;
    p = p * f + 0.05550327226670302f;
    p = p * f + 0.24022650922288757f;
    return p * f + 0.69314720670283259f;
}
FA_INLINE Vec<double> exp2_slope(Vec<double> f) {
    constexpr double c[] = {4.4553152618178062e-10, 7.0741959721851219e-09, 1.0178060727411918e-07,
                            1.3215432528553506e-06, 1.5252733831771266e-05, 0.00015403530463731823,
                            0.0013333558146418384,  0.0096181291075872598,  0.055504108664821562,
                            0.24022650695910158,    0.69314718055994529};
    Vec<double> p = splat(c[0]);
#pragma GCC unroll 10
    for (int i = 1; i < 11; ++i) p = p * f + c[i];
    return p;
}

// 2^x for x up to the largest exponent. Results below the normal range become 0 (without AVX-512 they are denormal
// above 2^-126.5); NaN gives NaN.
template <class T> FA_INLINE Vec<T> exp2_by_bits(Vec<T> x) {
    // vmax returns its second operand for NaN, so NaN propagates; 2^-bias is assembled as 0.
    const SplitExponent<T> e = split_exponent<T>(vmax(splat<T>(-kExponentBias<T>), x));
    return (exp2_slope(e.fraction) * e.fraction + T(1)) * power_of_two<T>(e.integer);
}
FA_INLINE Vec<double> exp2(Vec<double> x) { return exp2_by_bits<double>(x); }
FA_INLINE Vec<float> exp2(Vec<float> x) {
#if FA_X86_LEVEL == 3
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
    const Vec<float> fraction = (Vec<float>)_mm512_reduce_ps((__m512)x, 0), integer = x - fraction;
    const Vec<float> p = exp2_slope(fraction) * fraction + 1.f;
    return (Vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)integer);
#else
    return exp2_by_bits<float>(x);
#endif
}

// tanh |x| = e / (e + 2) with e = exp(2 |x|) - 1: keeps the relative accuracy near 0.
template <class T> FA_INLINE Vec<T> tanh(Vec<T> x) {
    const Vec<T> magnitude = x < T(0) ? -x : x, largest = splat<T>(20);  // tanh 20 rounds to 1 in fp32 and fp64
    const SplitExponent<T> s = split_exponent<T>((magnitude > largest ? largest : magnitude) * T(2 * kLog2e));
    const Vec<T> scale = power_of_two<T>(s.integer);
    const Vec<T> e = exp2_slope(s.fraction) * s.fraction * scale + (scale - T(1));
    const Vec<T> result = e / (e + T(2));
    return x < T(0) ? -result : result;
}

}  // namespace flash_attn::cpu::FA_ISA
