// Rows in place as vectors of operands, for products that pack nothing, and their dot products.
#pragma once
#include "cpu/lanes.h"
#include "cpu/pack.h"

namespace flash_attn::cpu::FA_ISA {

// Rows anywhere in a tensor: row i is at first + offset[i].
template <class E> struct RowsInPlace {
    const E* first;
    const int64_t* offset;

    const E* row(int i) const { return first + offset[i]; }
};

// One vector of elements becomes kParts vectors of operands. Of bfloat16 widened to fp32 they are the even elements and
// the odd ones, a shift and a mask: widening in order would take shuffles.
template <class E, class Dot> struct RowVectors {
    using T = Compute<E>;
    using Operand = typename Dot::Operand;
    static constexpr int L = kLanes<T>;
    static constexpr int kElements = kVectorBytes / int(sizeof(E));  // of one vector
    static constexpr int kParts = kElements / (L * Dot::kDepth);
    static constexpr bool kSplitsPairs = std::is_same_v<E, BFloat16> && kParts == 2;

    // Vectors of operands of a row.
    static constexpr int count_of(int length) { return ceil_div(length, kElements) * kParts; }

    // Part `part` of the vector at p. count: elements there, of type int or std::integral_constant; zeros follow them.
    template <class Count> FA_INLINE Vec<Operand> operand(const E* p, int part, Count count) {
        if constexpr (kSplitsPairs) {
            const Vec<uint32_t> x = pairs(p, count);
            return (Vec<float>)(part == 0 ? x << 16 : x & 0xffff0000u);
        } else if constexpr (Dot::kDepth == 2) {
            return pairs(p, count);
        } else {
            return load_some(p + part * L, clamp(count - part * L, 0, L));
        }
    }
    // A row of operands, zeros after its end.
    FA_INLINE void pack(const E* row, int length, Operand* out) {
        for (int i = 0; i < length; i += kElements)
            for (int part = 0; part < kParts; ++part, out += L)
                store(out, operand(row + i, part, min(kElements, length - i)));
    }

    // sums += factor * row. Pairs of rows are summed in the order of elements, single rows in that of parts.
    FA_INLINE void add_scaled(T factor, const E* row, int length, T* sums) {
        if constexpr (Dot::kDepth == 2) {
            for_each_vector<T>(length, [&](int i, int count) {
                store(sums + i, load(sums + i) + factor * load_some(row + i, count));
            });
        } else {
            for (int i = 0; i < length; i += kElements)
                for (int part = 0; part < kParts; ++part, sums += L)
                    store(sums, load(sums) + factor * operand(row + i, part, min(kElements, length - i)));
        }
    }
    // Sums of the operands of rows, back in the order of elements.
    FA_INLINE void restore_order(T* sums, int length) {
        if constexpr (kSplitsPairs)
            for (int i = 0; i < length; i += kElements) {
                const Vec<T> even = load(sums + i), odd = load(sums + i + L);
                store(sums + i, interleave<0, T>(even, odd));
                store(sums + i + L, interleave<1, T>(even, odd));
            }
    }

private:
    template <class Count> FA_INLINE Vec<uint32_t> pairs(const E* p, Count count) {
        Vec<uint32_t> x{};
        memcpy(&x, p, count == kElements ? sizeof x : sizeof(E) * count);
        return x;
    }
};

// Dot products of packed rows of q and rows of k in place, with vector lanes along the row. Their rounding depends on
// nothing but the length: passes that compute a score in different tiles get the same bits.
template <class E, class Dot> class DotProducts {
    using T = Compute<E>;
    using Operand = typename Dot::Operand;
    using Rows = RowVectors<E, Dot>;
    static constexpr int L = kLanes<T>;

public:
    // As many as registers allow, a multiple of the vector length; also the most keys of one step.
    static constexpr int kAccumulators = FA_MICRO_ROWS * FA_MICRO_VECTORS >= 16 ? 16 : 8;

    // s[row][key], for a number of keys that is rounded up to kAccumulators. Meanwhile fetches as many rows of `next`.
    static void multiply(int num_rows, int num_keys, int length, Matrix<const Operand> q, RowsInPlace<E> k,
                         RowsInPlace<E> next, Matrix<T> s) {
        const auto groups = [&](int row, auto size) __attribute__((always_inline)) {
            constexpr int kRows = decltype(size)::value, kKeys = kAccumulators / kRows;
            for (; row + kRows <= num_rows; row += kRows, next = k)
                for (int key = 0; key < num_keys; key += kKeys)
                    step<kRows, kKeys>(length, {q.data + row * q.stride, q.stride}, {k.first, k.offset + key},
                                       {next.first, next.offset + key}, {s.data + row * s.stride + key, s.stride});
            return row;
        };
        const int fours = groups(0, std::integral_constant<int, 4>()),
                  twos = groups(fours, std::integral_constant<int, 2>());
        groups(twos, std::integral_constant<int, 1>());
    }

private:
    template <int kRows, int kKeys> static __attribute__((noinline)) void step(int length, Matrix<const Operand> q,
                                                                               RowsInPlace<E> k, RowsInPlace<E> next,
                                                                               Matrix<T> s) {
        Vec<T> acc[kRows * kKeys] = {};
        const auto add = [&](int i, auto count) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int n = 0; n < kKeys; ++n) __builtin_prefetch(next.row(n) + i);
#pragma GCC unroll 2
            for (int part = 0; part < Rows::kParts; ++part) {
                Vec<Operand> queries[kRows];
#pragma GCC unroll 4
                for (int m = 0; m < kRows; ++m) queries[m] = load(q.data + m * q.stride + i / Dot::kDepth + part * L);
#pragma GCC unroll 16
                for (int n = 0; n < kKeys; ++n) {
                    const Vec<Operand> x = Rows::operand(k.row(n) + i, part, count);
#pragma GCC unroll 4
                    for (int m = 0; m < kRows; ++m)
                        acc[m * kKeys + n] = Dot::multiply_add(acc[m * kKeys + n], x, queries[m]);
                }
            }
        };
        int i = 0;
        for (; i + Rows::kElements <= length; i += Rows::kElements)
            add(i, std::integral_constant<int, Rows::kElements>());
        if (i < length) add(i, length - i);
        T sums[kRows * kKeys];
#pragma GCC unroll 16
        for (int j = 0; j < kRows * kKeys; j += L) store(sums + j, lane_sums(acc + j));
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) memcpy(s.data + m * s.stride, sums + m * kKeys, sizeof(T) * kKeys);
    }
};

}  // namespace flash_attn::cpu::FA_ISA
