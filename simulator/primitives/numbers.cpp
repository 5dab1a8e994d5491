// Conversions between fp32 and pairs of 16-bit elements, and the approximate functions.
#include <cmath>
#include <initializer_list>
#include <vector>

#include "cuda/ptx/global.h"
#include "cuda/ptx/math.h"
#include "policy/divisor.h"
#include "primitives.h"

namespace flash_attn::primitives {
namespace {

constexpr int kThreads = 256;
inline uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}
inline float float_of(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

// ---------------------------------------------------------------- conversions, against arithmetic in double
template <class Element> struct Format {
    static constexpr bool kBf16 = std::is_same_v<Element, bf16>;
    static constexpr int kMantissa = kBf16 ? 7 : 10, kMinExponent = kBf16 ? -126 : -14;
    static constexpr uint16_t kInfinity = kBf16 ? 0x7f80 : 0x7c00, kCanonicalNan = 0x7fff;
};

template <class Element> double value_of(uint16_t bits) {
    using F = Format<Element>;
    const int exponent = (bits & 0x7fff) >> F::kMantissa, mantissa = bits & ((1 << F::kMantissa) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if ((bits & F::kInfinity) == F::kInfinity) return mantissa ? NAN : sign * HUGE_VAL;
    if (exponent == 0) return sign * std::ldexp(mantissa, F::kMinExponent - F::kMantissa);
    return sign * std::ldexp(mantissa + (1 << F::kMantissa), F::kMinExponent - F::kMantissa + exponent - 1);
}

// To nearest, ties to even: nearbyint rounds like that, in units of the last place.
template <class Element> uint16_t rounded(float x) {
    using F = Format<Element>;
    if (std::isnan(x)) return F::kCanonicalNan;
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double magnitude = std::fabs(static_cast<double>(x));
    if (std::isinf(x)) return sign | F::kInfinity;
    if (magnitude == 0) return sign;
    const int exponent = std::ilogb(magnitude) < F::kMinExponent ? F::kMinExponent : std::ilogb(magnitude);
    const double ulps = std::nearbyint(std::ldexp(magnitude, F::kMantissa - exponent));
    // Counted in units of the last place of its exponent, a number's bits go on without a gap at powers of two.
    const int64_t bits = (int64_t{exponent - F::kMinExponent} << F::kMantissa) + static_cast<int64_t>(ulps);
    return static_cast<uint16_t>(sign | (bits > F::kInfinity ? F::kInfinity : bits));
}

template <class Element> FA_KERNEL(kThreads, 1) unpack_kernel(float* lo, float* hi, int32_t* nonfinite) {
    constexpr uint32_t kExtremes = 0x00010000u | (std::is_same_v<Element, bf16> ? 0xff7fu : 0xfbffu);
    const int i = ptx::block_idx() * kThreads + ptx::thread_idx();
    const uint32_t pair = static_cast<uint32_t>(i) | static_cast<uint32_t>(65535 - i) << 16;
    ptx::store(lo + i, ptx::unpack_lo<Element>(pair));
    ptx::store(hi + 65535 - i, ptx::unpack_hi<Element>(pair));
    // A finite pair after it, with the smallest and the greatest number, leaves the marks as they are.
    const uint32_t marks = ptx::mark_nonfinite<Element>(0, pair), kept = ptx::mark_nonfinite<Element>(marks, kExtremes);
    const bool marked = ptx::any_nonfinite<Element>(marks) && ptx::any_nonfinite<Element>(kept);
    const bool clear = !ptx::any_nonfinite<Element>(marks) && !ptx::any_nonfinite<Element>(kept);
    ptx::store(nonfinite + i, (ptx::any_nonfinite<Element>(pair) ? 1 : 0) | (marked ? 2 : clear ? 0 : 4));
}

template <class Element> void test_unpack() {
    Buffer<float> lo(65536), hi(65536);
    Buffer<int32_t> nonfinite(65536);
    run(unpack_kernel<Element>, 65536 / kThreads, kThreads, 0, lo.data, hi.data, nonfinite.data);
    bool values = true, flags = true;
    for (int i = 0; i < 65536; ++i) {
        const double x = value_of<Element>(static_cast<uint16_t>(i)),
                     y = value_of<Element>(static_cast<uint16_t>(65535 - i));
        for (float got : {lo[i], hi[i]})
            values &=
                std::isnan(x) ? std::isnan(got) : got == static_cast<float>(x) && std::signbit(got) == std::signbit(x);
        flags &= nonfinite[i] == (std::isfinite(x) && std::isfinite(y) ? 0 : 3);
    }
    char what[60];
    std::snprintf(what, sizeof what, "unpack, %s, every value", type_name<Element>());
    expect(values, what);
    std::snprintf(what, sizeof what, "any_nonfinite and mark_nonfinite, %s", type_name<Element>());
    expect(flags, what);
}

template <class Element> FA_KERNEL(kThreads, 1) pack_kernel(const float* in, uint32_t* out) {
    const int i = ptx::block_idx() * kThreads + ptx::thread_idx();
    ptx::store(out + i, ptx::pack<Element>(ptx::load(in + 2 * i), ptx::load(in + 2 * i + 1)));
}

// Every value of the type, the middle between it and the next, and the neighbours of that in fp32; then special values.
template <class Element> void test_pack() {
    constexpr int kEach = 4, kSpecial = 2 * kThreads, kCount = kEach * 65536 + kSpecial;
    Buffer<float> in(kCount);
    Buffer<uint32_t> out(kCount / 2);
    for (int i = 0; i < 65536; ++i) {
        const float x = static_cast<float>(value_of<Element>(static_cast<uint16_t>(i)));
        const double next = value_of<Element>(static_cast<uint16_t>(i + 1));
        const float middle = static_cast<float>((x + next) / 2);
        const float points[kEach] = {x, middle, std::nextafterf(middle, -HUGE_VALF),
                                     std::nextafterf(middle, HUGE_VALF)};
        for (int j = 0; j < kEach; ++j) in[kEach * i + j] = points[j];
    }
    const float special[] = {0.f,
                             -0.f,
                             HUGE_VALF,
                             -HUGE_VALF,
                             NAN,
                             -NAN,
                             float_of(0x7f800001),
                             float_of(0xffbfffff),
                             65504.f,
                             65519.996f,
                             65520.f,
                             -65520.f,
                             1e5f,
                             3.4028235e38f,
                             3.3961775e38f,
                             -3.4e38f,
                             0x1p-24f,
                             0x1p-25f,
                             0x1.000002p-25f,
                             0x1p-26f,
                             0x1p-149f,
                             -0x1p-149f,
                             0x1p-134f,
                             0x1.8p-134f};
    for (int i = 0; i < kSpecial; ++i)
        in[kCount - kSpecial + i] = special[static_cast<size_t>(i) % (sizeof special / 4)];
    run(pack_kernel<Element>, kCount / 2 / kThreads, kThreads, 0, in.data, out.data);
    int wrong = 0;
    for (int i = 0; i < kCount; ++i) {
        const auto got = static_cast<uint16_t>(out[i / 2] >> 16 * (i % 2));
        if (got == rounded<Element>(in[i])) continue;
        if (wrong++ < 5)
            std::printf("  %a (%08x) becomes %04x, not %04x\n", in[i], bits_of(in[i]), got, rounded<Element>(in[i]));
    }
    char what[60];
    std::snprintf(what, sizeof what, "pack, %s, every value and tie", type_name<Element>());
    expect(wrong == 0, what);
}

// ---------------------------------------------------------------- functions
enum class Function { kExp2, kLog2, kReciprocal };
template <Function kFunction> FA_KERNEL(kThreads, 1) function_kernel(const float* in, float* out) {
    const int i = ptx::block_idx() * kThreads + ptx::thread_idx();
    const float x = ptx::load(in + i);
    ptx::store(out + i, kFunction == Function::kExp2   ? ptx::exp2(x)
                        : kFunction == Function::kLog2 ? ptx::log2(x)
                                                       : ptx::reciprocal(x));
}

inline bool is_denormal(double x) { return x != 0 && std::fabs(x) < 0x1p-126; }

// The documented errors: 2^-22 relative, for log2 2^-22 absolute near 1, where it is 0. Denormals count as zero.
// 2^NaN has no sign bit.
template <Function kFunction> bool right(float x, float got) {
    const double flushed = is_denormal(x) ? std::copysign(0., x) : static_cast<double>(x);
    double y = kFunction == Function::kExp2   ? std::exp2(flushed)
               : kFunction == Function::kLog2 ? std::log2(flushed)
                                              : 1 / flushed;
    if (std::isnan(y)) return std::isnan(got) && (kFunction != Function::kExp2 || !std::signbit(got));
    if (std::fabs(y) > 3.4028235e38) return got == static_cast<float>(std::copysign(HUGE_VAL, y));
    if (is_denormal(y)) return std::fabs(got) <= 0x1p-126f;
    const double error = std::fabs(got - y), bound = 0x1p-22;
    const bool near_one = kFunction == Function::kLog2 && flushed > 0.5 && flushed < 2 && flushed != 1;
    return error <= (near_one ? bound : bound * std::fabs(y));
}

template <Function kFunction> void test_function(const char* what, float first, float last) {
    constexpr int kCount = 64 * kThreads, kSpecial = 16;
    const float special[kSpecial] = {0.f,  -0.f,      HUGE_VALF, -HUGE_VALF, NAN,    1.f,    -1.f,  2.f,
                                     0.5f, 0x1p-127f, 0x1p-126f, 0x1p127f,   -126.f, -127.f, 127.f, 128.f};
    Buffer<float> in(kCount), out(kCount);
    for (int i = 0; i < kCount; ++i)
        in[i] = i < kSpecial ? special[i] : first + (last - first) * static_cast<float>(i) / (kCount - 1);
    run(function_kernel<kFunction>, kCount / kThreads, kThreads, 0, in.data, out.data);
    int wrong = 0;
    for (int i = 0; i < kCount; ++i)
        if (!right<kFunction>(in[i], out[i]) && wrong++ < 5) std::printf("  f(%a) = %a\n", in[i], out[i]);
    expect(wrong == 0, what);
}

// Quotients by what numbers of tiles and heads may be.
FA_KERNEL(32, 1) divide_kernel(const int32_t* numbers, Divisor divisor, int count, int32_t* quotients) {
    for (int i = ptx::thread_idx(); i < count; i += 32) ptx::store(quotients + i, divisor.quotient(numbers[i]));
}

void test_division() {
    const int divisors[] = {1, 2, 3, 5, 7, 12, 64, 641, 8190, 65536, 65537, 1 << 30, (1 << 30) + 1, INT32_MAX};
    for (const int d : divisors) {
        std::vector<int32_t> numbers = {0, 1, INT32_MAX - 1, INT32_MAX};
        for (int64_t k = 1; k * d <= INT32_MAX && numbers.size() < 4000; k = k * 3 / 2 + 1)
            for (int64_t n = k * d - 1; n <= k * d + 1 && n <= INT32_MAX; ++n) numbers.push_back(int32_t(n));
        const int count = static_cast<int>(numbers.size());
        Buffer<int32_t> in(count), out(count);
        for (int i = 0; i < count; ++i) in[i] = numbers[size_t(i)];
        run(divide_kernel, 1, 32, 0, in.data, make_divisor(d), count, out.data);
        bool ok = true;
        for (int i = 0; i < count; ++i) ok &= out[i] == in[i] / d;
        expect(ok, "division by", d);
    }
}

}  // namespace

void test_numbers() {
    test_division();
    test_unpack<bf16>();
    test_unpack<fp16>();
    test_pack<bf16>();
    test_pack<fp16>();
    test_function<Function::kExp2>("ex2.approx", -150, 130);
    test_function<Function::kLog2>("lg2.approx, near 1", 0.25f, 3);
    test_function<Function::kLog2>("lg2.approx", 0, 1e30f);
    test_function<Function::kReciprocal>("rcp.approx, near 1", -3, 3);
    test_function<Function::kReciprocal>("rcp.approx", -1e38f, 1e38f);
}

}  // namespace flash_attn::primitives
