// Small matrix products on packed tiles: C (rows x columns) from A (rows x depth) and B (depth x columns); columns is a
// multiple of the vector length. A is read as broadcast scalars, so it needs no packing and may be transposed; B and C
// are read as whole vectors. The accumulators of a micro tile stay in registers.
#pragma once
#include "cpu/vec.h"

namespace flash_attn::cpu::FA_ISA {

// One multiply-add step: T times T, or a dot product of two bfloat16 pairs. Pair operands hold two neighbours along the
// depth, and depth counts pairs.
template <class T> struct PlainDot {
    using Accum = T;
    using Operand = T;
    static constexpr int kDepth = 1;
    FA_INLINE Vec<T> multiply_add(Vec<T> c, Vec<T> a, Vec<T> b) { return c + a * b; }
};
#if FA_BF16_DOT
struct Bf16Dot {
    using Accum = float;
    using Operand = uint32_t;
    static constexpr int kDepth = 2;
    FA_INLINE Vec<float> multiply_add(Vec<float> c, Vec<uint32_t> a, Vec<uint32_t> b) {
        return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    }
};
#endif

// How A B is combined with C. A B is summed completely before it is added to C, for accuracy.
enum class Update {
    kStore,       // C = A B
    kAdd,         // C = C + A B
    kRescaleAdd,  // C = C * factor[column] + A B
};

template <class T> struct Matrix {
    T* data;
    int64_t stride;
};

template <class Dot, Update kUpdate, bool kTransposedA, int kRows, int kVectors>
static __attribute__((noinline)) void micro_gemm(int depth, const typename Dot::Operand* a, int64_t a_stride,
                                                 const typename Dot::Operand* b, int64_t b_stride,
                                                 typename Dot::Accum* c, int64_t c_stride,
                                                 const typename Dot::Accum* factor) {
    using T = typename Dot::Accum;
    constexpr int L = kLanes<T>;
    Vec<T> acc[kRows][kVectors] = {};
#pragma GCC unroll 2
    for (int k = 0; k < depth; ++k) {
        Vec<typename Dot::Operand> bv[kVectors];
#pragma GCC unroll 8
        for (int n = 0; n < kVectors; ++n) bv[n] = load(b + k * b_stride + n * L);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
            const auto am = splat<typename Dot::Operand>(kTransposedA ? a[k * a_stride + m] : a[m * a_stride + k]);
#pragma GCC unroll 8
            for (int n = 0; n < kVectors; ++n) acc[m][n] = Dot::multiply_add(acc[m][n], am, bv[n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < kVectors; ++n) {
            T* const out = c + m * c_stride + n * L;
            if constexpr (kUpdate == Update::kAdd) acc[m][n] += load(out);
            if constexpr (kUpdate == Update::kRescaleAdd) acc[m][n] += load(out) * load(factor + n * L);
            store(out, acc[m][n]);
        }
}

// The remaining rows of a column block: one micro tile of exactly that height.
template <class Dot, Update kUpdate, bool kTransposedA, int kRows, int kVectors, class... Args>
FA_INLINE void gemm_last_rows(int rows, Args... args) {
    if constexpr (kRows > 0) {
        if (rows == kRows) return micro_gemm<Dot, kUpdate, kTransposedA, kRows, kVectors>(args...);
        gemm_last_rows<Dot, kUpdate, kTransposedA, kRows - 1, kVectors>(rows, args...);
    }
}

template <class Dot, Update kUpdate, bool kTransposedA, int kVectors>
FA_INLINE void gemm_columns(int rows, int depth, Matrix<const typename Dot::Operand> a, const typename Dot::Operand* b,
                            int64_t b_stride, typename Dot::Accum* c, int64_t c_stride,
                            const typename Dot::Accum* factor) {
    constexpr int kRows = FA_MICRO_ROWS;
    const int64_t a_row = kTransposedA ? 1 : a.stride;
    int m = 0;
    for (; m + kRows <= rows; m += kRows)
        micro_gemm<Dot, kUpdate, kTransposedA, kRows, kVectors>(depth, a.data + m * a_row, a.stride, b, b_stride,
                                                                c + m * c_stride, c_stride, factor);
    gemm_last_rows<Dot, kUpdate, kTransposedA, kRows - 1, kVectors>(rows - m, depth, a.data + m * a_row, a.stride, b,
                                                                    b_stride, c + m * c_stride, c_stride, factor);
}

template <class Dot, Update kUpdate, bool kTransposedA>
static __attribute__((noinline)) void gemm(int rows, int columns, int depth, Matrix<const typename Dot::Operand> a,
                                           Matrix<const typename Dot::Operand> b, Matrix<typename Dot::Accum> c,
                                           const typename Dot::Accum* factor = nullptr) {
    constexpr int L = kLanes<typename Dot::Accum>, kVectors = FA_MICRO_VECTORS;
    int n = 0;
    auto advance = [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        for (; n + V * L <= columns; n += V * L)
            gemm_columns<Dot, kUpdate, kTransposedA, V>(rows, depth, a, b.data + n, b.stride, c.data + n, c.stride,
                                                        factor ? factor + n : nullptr);
    };
    advance(std::integral_constant<int, kVectors>{});
    if constexpr (kVectors > 2) advance(std::integral_constant<int, 2>{});
    advance(std::integral_constant<int, 1>{});
}

// Longest sum over head_dim that is accumulated term by term. Longer ones are split into such sums, for accuracy.
constexpr int kLongestSum = 128;

// C = A B over head_dim, in partial sums of at most kLongestSum terms.
template <class Dot>
static void gemm_over_head_dim(int rows, int columns, int depth, Matrix<const typename Dot::Operand> a,
                               Matrix<const typename Dot::Operand> b, Matrix<typename Dot::Accum> c) {
    gemm<Dot, Update::kStore, false>(rows, columns, min(depth, kLongestSum), a, b, c);
    for (int k = kLongestSum; k < depth; k += kLongestSum)
        gemm<Dot, Update::kAdd, false>(rows, columns, min(depth - k, kLongestSum), {a.data + k, a.stride},
                                       {b.data + k * b.stride, b.stride}, c);
}

}  // namespace flash_attn::cpu::FA_ISA
