// Sums of many terms, one per element of a tile, whose rounding errors do not grow with the number of terms.
#pragma once
#include "cpu/pack.h"

namespace flash_attn::cpu::FA_ISA {

// Terms are added into `recent`. What kTerms of them have given moves on into `total`, and what that rounds off into
// `low` (Knuth's TwoSum). count is a multiple of the vector length.
template <class T> struct LongSum {
    static constexpr int kTerms = 16;
    T *recent, *total, *low;

    // More than kTerms terms are added only if `long_sums`.
    static LongSum take(Arena& arena, int64_t count, bool long_sums) {
        T* const recent = arena.take<T>(count);
        T* const total = arena.take<T>(long_sums ? count : 0);
        return {recent, total, arena.take<T>(long_sums ? count : 0)};
    }
    void clear(int64_t count) const { memset(recent, 0, sizeof(T) * count); }

    // first: nothing has moved on since clear().
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
        // What an infinite sum rounds off is NaN.
        const Vec<T> lost = load(low + i);
        return load(total + i) + (x + select<T>(lost == lost, lost, Vec<T>{}));
    }
};

}  // namespace flash_attn::cpu::FA_ISA
