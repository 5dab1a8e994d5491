// What the softmax of a row gives once all of its keys have been seen.
#pragma once
#include "cpu/tile.h"

namespace flash_attn::cpu::FA_ISA {

template <class T> struct RowResult {
    T lse;
    T factor;  // of the sum of values, which were weighted by exp(score - top)
};

// top: the largest score, a natural logarithm. sum: of exp(score - top); 0 if the row sees no key. A sink is one more
// score, without a value. Weights are relative to the larger of the two, so that none overflows.
template <class T> FA_INLINE RowResult<T> row_result(T top, T sum, const T* sink, T rescale) {
    if (sum == 0) return {sink ? *sink : T(-INFINITY), T(0)};
    if (sink && *sink > top) {
        const T weight = std::exp(top - *sink), others = sum * weight;
        return {*sink + std::log1p(others), rescale * weight / (1 + others)};
    }
    const T total = sink ? sum + std::exp(*sink - top) : sum;
    return {top + std::log(total), rescale / total};
}

// Tiles of a head run on several threads: an atomic maximum does not depend on their order. NaN is above all numbers.
template <class T> FA_INLINE void raise_to(T x, T* highest) {
    x += T(0);  // of the two zeros, the positive one
    T found;
    __atomic_load(highest, &found, __ATOMIC_RELAXED);
    while (found == found && !(x <= found))
        if (__atomic_compare_exchange(highest, &found, &x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return;
}

// Writes softmax_lse of a row, and its share of max_logits. Returns the factor of its output. top: NaN if a score is.
template <class T>
FA_INLINE T finish_row(const FwdParams& params, int batch, int64_t query, int head, T top, T sum, T rescale) {
    const Problem& p = params.problem;
    const T* const sinks = static_cast<const T*>(p.score.sinks);
    const RowResult<T> result = row_result(top, sum, sinks ? sinks + head : nullptr, rescale);
    *row_ptr<T>(params.softmax_lse, batch, query, head) = result.lse;
    if (params.max_logits) raise_to(top, static_cast<T*>(params.max_logits) + int64_t(batch) * p.num_heads + head);
    return result.factor;
}

}  // namespace flash_attn::cpu::FA_ISA
