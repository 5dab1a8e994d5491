// Rows of a register tile to global memory, as 16-bit elements.
#pragma once
#include "ptx/global.h"
#include "tile/acc_tile.h"

namespace flash_attn {

// Rows and columns past the valid ones are dropped. dst is the tile's corner and may lie anywhere; where it and its
// rows start at multiples of four bytes, elements are stored in pairs.
template <class Element, int kRows, int kCols> FA_DEVICE void store_rows(const AccTile<kRows, kCols>& t, Element* dst,
                                                                         int64_t row_stride, int valid_rows,
                                                                         int valid_cols) {
    const bool aligned = reinterpret_cast<uintptr_t>(dst) % 4 == 0 && row_stride % 2 == 0;
#pragma unroll
    for (int r = 0; r < t.kLaneRows; ++r) {
        if (lane_row(r) >= valid_rows) continue;
        Element* const row = dst + lane_row(r) * row_stride;
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n) {
            const int column = 8 * n + lane_column();
            const uint32_t pair = ptx::pack<Element>(t.x[r / 2][4 * n + r % 2 * 2], t.x[r / 2][4 * n + r % 2 * 2 + 1]);
            if (aligned && column + 1 < valid_cols) {
                ptx::store(reinterpret_cast<uint32_t*>(row + column), pair);
                continue;
            }
            if (column < valid_cols) ptx::store(row + column, Element{uint16_t(pair)});
            if (column + 1 < valid_cols) ptx::store(row + column + 1, Element{uint16_t(pair >> 16)});
        }
    }
}

}  // namespace flash_attn
