// Sums of many terms, one per element of a tile, with rounding errors that do not grow with the number of terms.
#pragma once
#include "cpu/pack.h"

namespace flash_attn::cpu::FA_ISA {

// Terms are added to `recent`. After kTerms terms it is added to `total`, and the rounding error of that addition to
// `low` (Knuth's TwoSum). count is a multiple of the vector length.
template <class T> struct LongSum {
    static constexpr int kTerms = 16;
    T *recent, *total, *low;

    // `total` and `low` are allocated only if long_sums: needed for more than kTerms terms.
    static LongSum take(Arena& arena, int64_t count, bool long_sums) {
        T* const recent = arena.take<T>(count);
        T* const total = arena.take<T>(long_sums ? count : 0);
        return {recent, total, arena.take<T>(long_sums ? count : 0)};
    }
    void clear(int64_t count) const { memset(recent, 0, sizeof(T) * count); }

    // first: the first call since clear().
    void move_on(int64_t count, bool first) const {
        for (int64_t i = 0; i < count; i += kLanes<T>) {
            const Vec<T> x = load(recent + i), before = first ? Vec<T>{} : load(total + i), sum = before + x,
                         added = sum - before, lost = (before - (sum - added)) + (x - added);
            store(recent + i, Vec<T>{});
            store(total + i, sum);
            store(low + i, first ? lost : load(low + i) + lost);
        }
    }
    Vec<T> at(int64_t i, bool moved_on) const {
        const Vec<T> x = load(recent + i);
        if (!moved_on) return x;
        // The rounding error of an infinite sum is NaN.
        const Vec<T> lost = load(low + i);
        return load(total + i) + (x + select<T>(lost == lost, lost, Vec<T>{}));
    }
};

}  // namespace flash_attn::cpu::FA_ISA
