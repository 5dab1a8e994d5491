// Stores rows of a register tile to global memory, as 16-bit elements or as the fp32 numbers that they are.
#pragma once
#include "cuda/ptx/global.h"
#include "cuda/ptx/sync.h"
#include "cuda/tile/acc_tile.h"

namespace flash_attn {

// Two neighbouring elements of a row, as they are stored.
template <class Element> struct StoredPair {
    uint32_t bits;

    FA_DEVICE StoredPair(float lo, float hi) : bits(ptx::pack<Element>(lo, hi)) {}
    FA_DEVICE Element lo() const { return {uint16_t(bits)}; }
    FA_DEVICE Element hi() const { return {uint16_t(bits >> 16)}; }
};
// Not one number of 64 bits: ptxas would want both halves side by side long before they are stored, and spill.
template <> struct alignas(8) StoredPair<float> {
    float first, second;

    FA_DEVICE StoredPair(float lo, float hi) : first(lo), second(hi) {}
    FA_DEVICE float lo() const { return first; }
    FA_DEVICE float hi() const { return second; }
};

// Rows and columns past the valid ones are not stored. dst is the tile's first element, at any alignment; if it, the
// row stride and the valid columns are multiples of a pair, elements are stored in pairs.
template <class Element, int kRows, int kCols> FA_DEVICE void store_rows(const AccTile<kRows, kCols>& t, Element* dst,
                                                                         int64_t row_stride, int valid_rows,
                                                                         int valid_cols) {
    using Pair = StoredPair<Element>;
    const auto address = reinterpret_cast<uintptr_t>(dst);
    const bool in_pairs = address % sizeof(Pair) == 0 && row_stride % 2 == 0 && valid_cols % 2 == 0;
    const int columns = valid_cols - lane_column();  // valid ones from the lane's first one on
#pragma unroll
    for (int r = 0; r < t.kLaneRows; ++r) {
        if (lane_row(r) >= valid_rows) continue;
        Element* const row = dst + lane_row(r) * row_stride + lane_column();
        const auto for_each_pair = [&](auto store) {
#pragma unroll
            for (int n = 0; n < kCols / 8; ++n) {
                const float* const x = &t.x[r / 2][4 * n + r % 2 * 2];
                if (8 * n < columns) store(row + 8 * n, Pair(x[0], x[1]), 8 * n + 1 < columns);
            }
        };
        // Two loops, each of predicated stores at constant offsets: one that branches for each pair has more code.
        if (in_pairs) {
            for_each_pair([](Element* to, Pair pair, bool) { ptx::store(reinterpret_cast<Pair*>(to), pair); });
        } else {
            for_each_pair([](Element* to, Pair pair, bool has_second) {
                ptx::store(to, pair.lo());
                if (has_second) ptx::store(to + 1, pair.hi());
            });
        }
    }
}

// Stores the transpose: columns of the tile are rows of dst. Lanes that hold a column store neighbouring numbers.
template <int kRows, int kCols> FA_DEVICE void store_columns(const AccTile<kRows, kCols>& t, float* dst,
                                                             int64_t row_stride, int valid_rows, int valid_cols) {
    const int rows_left = valid_rows - lane_column();
    float* row = dst + lane_column() * row_stride;
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n, row += 8 * row_stride)
#pragma unroll
        for (int b = 0; b < 2; ++b)
#pragma unroll
            for (int r = 0; r < t.kLaneRows; ++r)
                if (8 * n + b < rows_left && lane_row(r) < valid_cols)
                    ptx::store(row + b * row_stride + lane_row(r), t.x[r / 2][4 * n + r % 2 * 2 + b]);
}

// Transposes pairs among the four lanes that share a row: lane i gets all of the i-th 8 of every 32 columns.
FA_DEVICE void transpose_quad(uint32_t (&pairs)[4]) {
    const int lane = lane_id();
#pragma unroll
    for (int step = 1; step <= 2; ++step) {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            const uint32_t low = pairs[i], high = pairs[i | step];
            const uint32_t received = ptx::float_bits(ptx::shfl_xor(ptx::bits_float(upper ? low : high), step));
            pairs[i] = upper ? received : low;
            pairs[i | step] = upper ? high : received;
        }
    }
}

// As store_rows(), in 16-byte stores where the type, dst, row stride and valid columns allow it. Needs some more
// registers.
template <class Element, int kRows, int kCols> FA_DEVICE void store_rows_by_eights(const AccTile<kRows, kCols>& t,
                                                                                   Element* dst, int64_t row_stride,
                                                                                   int valid_rows, int valid_cols) {
    constexpr bool kByEights = kCols % 32 == 0 && sizeof(Element) == 2;
    const auto address = reinterpret_cast<uintptr_t>(dst);
    const bool aligned = address % 16 == 0 && row_stride % 8 == 0 && valid_cols % 8 == 0;
    if (!aligned || !kByEights) return store_rows(t, dst, row_stride, valid_rows, valid_cols);
    if constexpr (kByEights) {
#pragma unroll
        for (int r = 0; r < t.kLaneRows; ++r)
#pragma unroll
            for (int n = 0; n < kCols / 8; n += 4) {
                uint32_t eight[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* const x = &t.x[r / 2][4 * (n + i) + r % 2 * 2];
                    eight[i] = ptx::pack<Element>(x[0], x[1]);
                }
                transpose_quad(eight);
                const int column = 8 * (n + lane_id() % 4);
                if (lane_row(r) < valid_rows && column < valid_cols)
                    ptx::store_16(dst + lane_row(r) * row_stride + column, eight);
            }
    }
}

}  // namespace flash_attn
