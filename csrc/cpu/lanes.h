// Sums and maxima over the lanes of vectors.
#pragma once
#include <utility>
#include "cpu/vec.h"

namespace flash_attn::cpu::FA_ISA {

// In each block of 2 kHalf lanes: the first half of x and the second of y, in place (kCross = false); or the second
// half of x and the first of y, each where the other was (true). Two such vectors have all that is left of x and y to
// be summed, and the first takes no shuffle.
template <int kHalf, bool kCross, class V, int... kLane>
FA_INLINE V halves(V x, V y, std::integer_sequence<int, kLane...>) {
    constexpr int kCount = sizeof...(kLane);
    return __builtin_shufflevector(x, y,
                                   ((kCross ? kLane ^ kHalf : kLane) + (kLane % (2 * kHalf) < kHalf ? 0 : kCount))...);
}

// Lane i of the result is the sum of the lanes of x[i], for i below the number of lanes. Overwrites x.
template <class V, int kHalf = sizeof(V) / sizeof(V{}[0]) / 2> FA_INLINE V lane_sums(V* x) {
    using Lanes = std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])>;
    if constexpr (kHalf == 0) {
        return x[0];
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < kHalf; ++i)
            x[i] = halves<kHalf, false>(x[i], x[i + kHalf], Lanes()) + halves<kHalf, true>(x[i], x[i + kHalf], Lanes());
        return lane_sums<V, kHalf / 2>(x);
    }
}

// Elements of x and y by turns, of the first half of each (kPart = 0) or of the second. Element: of any size.
template <int kPart, class Element, class V, int... kIndex>
FA_INLINE V interleave(V x, V y, std::integer_sequence<int, kIndex...>) {
    typedef Element Elements __attribute__((vector_size(sizeof(V))));
    constexpr int kCount = sizeof...(kIndex), kFirst = kPart * kCount / 2;
    return (V)__builtin_shufflevector((Elements)x, (Elements)y, (kFirst + kIndex / 2 + (kIndex % 2 ? kCount : 0))...);
}
template <int kPart, class Element, class V> FA_INLINE V interleave(V x, V y) {
    return interleave<kPart, Element>(x, y, std::make_integer_sequence<int, sizeof(V) / sizeof(Element)>());
}

// Combines all lanes of x; every lane of the result has the outcome.
template <class V, class F, int kHalf = sizeof(V) / sizeof(V{}[0]) / 2> FA_INLINE V reduce_lanes(V x, F combine) {
    using Lanes = std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])>;
    if constexpr (kHalf == 0) {
        return x;
    } else {
        return reduce_lanes<V, F, kHalf / 2>(combine(x, halves<kHalf, true>(x, x, Lanes())), combine);
    }
}
template <class V> FA_INLINE auto lane_sum(V x) {
    return reduce_lanes(x, [](V a, V b) __attribute__((always_inline)) { return a + b; })[0];
}
template <class V> FA_INLINE auto lane_max(V x) {
    return reduce_lanes(x, [](V a, V b) __attribute__((always_inline)) { return vmax(a, b); })[0];
}

}  // namespace flash_attn::cpu::FA_ISA
