// Register tiles of one warp, in the layout of mma.sync accumulators (cuda/tile/lane.h).
#pragma once
#include "cuda/tile/lane.h"

namespace flash_attn {

// fp32 accumulators, [kRows, kCols]: element 4 n + 2 h + b of row block i is at row 16 i + 8 h + lane / 4, column 8 n +
// 2 (lane % 4) + b.
template <int kRows, int kCols> struct AccTile {
    static_assert(kRows % 16 == 0 && kCols % 8 == 0);
    static constexpr int kRowBlocks = kRows / 16, kPerBlock = kCols / 2;
    static constexpr int kLaneRows = 2 * kRowBlocks;
    float x[kRowBlocks][kPerBlock];

    FA_DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
            for (int j = 0; j < kPerBlock; ++j) x[i][j] = 0.f;
    }
    // Copy of columns [kWidth * i, kWidth * (i + 1)).
    template <int kWidth> FA_DEVICE AccTile<kRows, kWidth> columns(int i) const {
        AccTile<kRows, kWidth> part;
#pragma unroll
        for (int b = 0; b < kRowBlocks; ++b)
#pragma unroll
            for (int j = 0; j < kWidth / 2; ++j) part.x[b][j] = x[b][kWidth / 2 * i + j];
        return part;
    }
    // Calls f(r, column, value) for every element: its row is lane_row(r). column starts at the lane's first column.
    template <class F> FA_DEVICE void for_each(F f, int column = lane_column()) { visit(x, f, column); }
    template <class F> FA_DEVICE void for_each(F f, int column = lane_column()) const { visit(x, f, column); }
    // Calls select(n) before every 8 columns, then f(r, b, column, value) for their elements: b = 0, 1 is the index
    // among the lane's two columns.
    template <class Select, class F> FA_DEVICE void for_each_octet(Select select, F f) {
        zip_octets(*this, select, [&](int r, int b, int column, float& value, float&) { f(r, b, column, value); });
    }
    // f(r, b, column, value, value of the other tile).
    template <class Select, class F> FA_DEVICE void zip_octets(AccTile& other, Select select, F f) {
        const int column = lane_column();
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
            for (int n = 0; n < kCols / 8; ++n) {
                select(n);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    f(2 * i + j / 2, j % 2, 8 * n + column + j % 2, x[i][4 * n + j], other.x[i][4 * n + j]);
            }
    }

private:
    template <class Values, class F> FA_DEVICE static void visit(Values& values, F f, int column) {
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
            for (int j = 0; j < kPerBlock; ++j) f(2 * i + j / 2 % 2, j / 4 * 8 + column + j % 2, values[i][j]);
    }
};

// A tile packed to 16-bit elements, as the A operand of mma.sync: four registers per row block and 16 columns.
template <class Element, int kRows, int kCols> struct PackedTile {
    static_assert(kCols % 16 == 0);
    static constexpr int kRowBlocks = kRows / 16, kSteps = kCols / 16;
    uint32_t a[kRowBlocks][kSteps][4];

    FA_DEVICE explicit PackedTile(const AccTile<kRows, kCols>& t) {
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
            for (int j = 0; j < kCols / 4; ++j)
                a[i][j / 4][j % 4] = ptx::pack<Element>(t.x[i][2 * j], t.x[i][2 * j + 1]);
    }
};

}  // namespace flash_attn
